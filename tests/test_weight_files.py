"""weight_files.py: the safetensors package as oracle, a server on this machine, many kinds of damage."""
import http.server
import json
import os
import re
import threading

import pytest
import safetensors.torch
import torch

from common import UserError
from frozen.weight_files import WeightFile, find_weights, read_safetensors, read_weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache; the folder of its checkpoints."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


# ------------------------------------------- find, download -------------------------------------------

def test_weights_dir_comes_before_the_hub_cache_and_other_names_of_a_file_count(tmp_path, hub):
    weights, mine = WeightFile("net.pth", "http://localhost/net.pth", also="old-net.pth"), tmp_path / "mine"
    hub.mkdir(parents=True)
    mine.mkdir()
    (hub / "net.pth").touch()
    assert find_weights(weights, mine) == find_weights(weights) == hub / "net.pth"
    for name in ("net.safetensors", "old-net.pth", "net.pth"):        # each wins over those before
        (mine / name).touch()
        assert find_weights(weights, mine) == mine / name
    with pytest.raises(UserError, match="nowhere is no folder"):
        find_weights(weights, tmp_path / "nowhere")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves 1000 zero bytes; under /cut it stops after 600."""
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(600 if self.path == "/cut" else 1000))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Address of a server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


ZEROS_1000 = "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"


def test_download_is_checked_and_leaves_only_the_whole_file(server, hub, tmp_path, capsys):
    path = find_weights(WeightFile("net.pth", server + "/net", ZEROS_1000[:8], 1000))
    assert path == hub / "net.pth" and path.read_bytes() == bytes(1000)
    assert "net.pth" in capsys.readouterr().err                       # the bar
    assert find_weights(WeightFile("net.pth", server, "f00d"), tmp_path) == path    # no second download
    for weights, message in ((WeightFile("x.pth", server + "/cut"), "600 of 1000 bytes"),
                             (WeightFile("x.pth", server, size=999), "1000 of 999 bytes"),
                             (WeightFile("x.pth", server, "f00d"), "sha256 is 541b3e9d, not f00d")):
        with pytest.raises(UserError, match=message):
            find_weights(weights, tmp_path / "home")
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["hub"]


def test_without_network_one_line_says_which_file_to_put_where(monkeypatch, hub, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    url = "http://127.0.0.1:9/file.pth"                               # the discard port: nobody listens
    for folder, where in (("", hub), (str(tmp_path), tmp_path)):
        with pytest.raises(UserError) as e:
            find_weights(WeightFile("net.pth", url), folder)
        message = str(e.value)
        assert f"save {url} as {where / 'net.pth'}" in message and "refused" in message
        assert "\n" not in message
    assert list(hub.iterdir()) == []


# --------------------------------------------- read, check ---------------------------------------------

def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "page.pth").write_bytes(b"<html>404</html>")
    torch.save(["a"], tmp_path / "list.pth")
    for name, message in (("cut", "is damaged"), ("page", "is damaged"), ("list", "no table of tensors")):
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / f"{name}.pth")
    read_weights(whole)


class Trap:
    """Unpickling this would leave a file behind."""
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, "trap.pth")
    with pytest.raises(UserError, match="is damaged or no file of weights"):
        read_weights("trap.pth")
    assert not (tmp_path / "trap").exists()


def test_floats_come_as_float32_from_both_kinds_of_file(tmp_path):
    state = {"half": torch.randn(3, 2).half(), "brain": torch.randn(4).bfloat16(), "whole": torch.arange(5)}
    torch.save(state, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        read = read_weights(tmp_path / name, skip=re.compile("^br"))
        assert set(read) == {"half", "whole"} and torch.equal(read["whole"], state["whole"])
        assert read["half"].dtype == torch.float32 and torch.equal(read["half"], state["half"].float())


def test_safetensors_equal_the_package(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8)
    state = {f"{dtype}": (torch.randn(3, 5) * 50).to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4),
              "odd": torch.arange(3, dtype=torch.uint8)}
    safetensors.torch.save_file(state, tmp_path / "t.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "t.safetensors")
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


A, B = ({"dtype": "F32", "shape": [2], "data_offsets": offsets} for offsets in ([0, 8], [8, 16]))


@pytest.mark.parametrize("header, size, message", [
    (None, 4, "no header"),
    (10 ** 12, 0, "a header of 1000000000000 bytes in a file of 8"),
    (b"{'a': 1}", 0, "no JSON"),
    (b"\xff\xfe", 0, "no JSON"),
    (b"[" * 100_000, 0, "no JSON"),
    (b'{"a": {}, "a": {}}', 0, "twice"),
    ([A], 8, "no table"),
    ({"a": 3}, 8, "entry of a"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "entry of a"),
    ({"a": A | {"dtype": "F31"}}, 8, "unknown dtype"),
    ({"a": A | {"dtype": ["F32"]}}, 8, "unknown dtype"),
    ({"a": A | {"shape": [-2]}}, 8, "shape"),
    ({"a": A | {"shape": [True, 2]}}, 8, "shape"),
    ({"a": A | {"shape": [2.0]}}, 8, "shape"),
    ({"a": A | {"data_offsets": [8, 0]}}, 8, "spans -8 bytes"),
    ({"a": A | {"data_offsets": [0, 8, 8]}}, 8, "offsets"),
    ({"a": A | {"data_offsets": [-8, 0]}}, 8, "offsets"),
    ({"a": A | {"shape": [3]}}, 8, "spans 8 bytes where dtype and shape make 12"),
    ({"a": A | {"shape": [2 ** 62, 4, 2]}}, 8, "shape"),
    ({"a": A | {"shape": [0, 2 ** 62], "data_offsets": [0, 0]}}, 0, "shape"),
    ({"a": A, "b": B | {"data_offsets": [4, 12]}}, 12, "b starts at byte 4 of the data, not at 8"),
    ({"a": A, "b": B | {"data_offsets": [12, 20]}}, 20, "b starts at byte 12 of the data, not at 8"),
    ({"b": B}, 16, "b starts at byte 8 of the data, not at 0"),
    ({"a": A, "b": B}, 12, "tensors end at byte 16 of 12"),
    ({"a": A, "b": B}, 20, "tensors end at byte 16 of 20"),
])
def test_malformed_safetensors_are_refused(tmp_path, header, size, message):
    path = tmp_path / "t.safetensors"
    if isinstance(header, (list, dict)):
        header = json.dumps(header).encode()
    if isinstance(header, int):
        start = header.to_bytes(8, "little")
    else:
        start = b"" if header is None else len(header).to_bytes(8, "little") + header
    path.write_bytes(start + bytes(size))
    with pytest.raises(UserError, match=message):
        read_safetensors(path)
