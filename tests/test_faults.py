"""Nothing lost, nothing silent: kills, signals, two runs in one folder, damaged files, odd folders.

The runs that are killed are forks of a server that has imported everything, so that a kill costs little time.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from forked import SERVER
from conftest import ROOT
from PIL import Image
from test_train_tokenizer import TINY, assert_same_weights, torchrun

import cache
import checkpoints
import data
import maetok
import sample
import train_diffusion
import train_tokenizer
from common import UserError
from measures import features
from measures import training as measure
from runtime import files, processes

SIT = ("--width 32 --depth 2 --heads 2 --cache-images 40 --batch-size 8 --steps 30 --warmup 2 --log-every 1 "
       "--save-every 1 --device cpu").split()
MODULES = {"tokenizer": train_tokenizer, "diffusion": train_diffusion, "sample": sample}


def in_child(script, argv):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train_diffusion.GRID_STEPS = 2                         # of the pictures, drawn at every save
    processes.run(lambda: MODULES[script].main(argv))


def start(script, argv):
    process = SERVER.Process(target=in_child, args=(script, [str(a) for a in argv]))
    process.start()
    return process


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def sit(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sit")
    train_diffusion.main([*SIT, "--steps", "4", "--tokenizer", str(tokenizer), "--out", str(folder)])
    return folder


def kill_at_random(script, argv, longest, seed):
    """Start a command six times and kill it after up to `longest` seconds; then let it end."""
    rng, killed = random.Random(seed), 0
    for _ in range(6):
        process = start(script, argv)
        process.join(rng.uniform(0.02, longest))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 4                                                     # the others were done before
    process = start(script, argv)
    process.join()
    assert process.exitcode == 0


def records(folder):
    volatile = ("images_per_second", "data_wait_seconds", "peak_memory_gib")
    return [{k: v for k, v in record.items() if k not in volatile}
            for record in checkpoints.read_metrics(folder)]


def debris(folder):
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


# ------------------------------------------------ kills ------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script, workers", [("tokenizer", 0), ("tokenizer", 2), ("diffusion", 0)])
def test_kills_change_nothing(script, workers, tmp_path, tokenizer):
    argv = ([*TINY, "--steps", "20", "--stage2-steps", "12", "--save-every", "1"]
            if script == "tokenizer" else [*SIT, "--tokenizer", tokenizer])
    argv += ["--workers", workers]
    process = start(script, [*argv, "--out", tmp_path / "whole"])
    process.join()
    kill_at_random(script, [*argv, "--out", tmp_path / "killed"], 0.9, seed=len(script))
    a, b = (checkpoints.load_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert_same_weights(a, b)
    assert str(a["optimizer"]) == str(b["optimizer"]) and "rng" not in a
    assert records(tmp_path / "whole") == records(tmp_path / "killed")
    assert not debris(tmp_path)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted(
        p.name for p in (tmp_path / "killed").iterdir())


@pytest.mark.slow
def test_kills_of_a_sampling_run_change_nothing(tmp_path, sit):
    argv = ["--ckpt", sit, "--num", "200", "--steps", "8", "--batch-size", "1", "--device", "cpu"]
    sample.main([str(a) for a in [*argv, "--out", tmp_path / "whole.npz"]])
    kill_at_random("sample", [*argv, "--out", tmp_path / "killed.npz"], 0.3, seed=1)
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "killed.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}.npz{end}" for n in ("killed", "whole")
                                                          for end in ("", ".settings.json")]


def test_an_end_of_stage_record_without_its_checkpoint_is_not_doubled(tmp_path, monkeypatch):
    save = checkpoints.save

    def die(config, state, processes):
        if state.facts["measured"]:                                       # the end-of-stage record is written
            raise KeyboardInterrupt
        save(config, state, processes)

    monkeypatch.setattr(checkpoints, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.main([*TINY, "--stage", "1", "--out", str(tmp_path)])
    monkeypatch.undo()
    train_tokenizer.main([*TINY, "--stage", "1", "--out", str(tmp_path)])
    assert [r["event"] for r in checkpoints.read_metrics(tmp_path) if "event" in r] == ["end of stage 1"]


def test_a_last_pt_that_was_deleted_comes_back(tmp_path):
    argv = [*TINY, "--stage", "1", "--out", str(tmp_path)]
    train_tokenizer.main(argv)
    (tmp_path / "last.pt").unlink()
    train_tokenizer.main(argv)
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 6


# ------------------------------------------- signals and two runs -------------------------------------------

def script(name, argv, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / f"{name}.py"), *map(str, argv)], text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            # pytest itself may have been started by nohup; a group, to be signalled
                            preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_DFL), os.setpgrp()),
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("number, launcher, workers", [
    (signal.SIGTERM, (), 0), (signal.SIGHUP, (), 0), (signal.SIGTERM, (), 2),
    (signal.SIGTERM, torchrun(2), 0), (signal.SIGTERM, torchrun(2), 2)],
    ids=["SIGTERM", "SIGHUP", "SIGTERM, workers", "SIGTERM to torchrun", "SIGTERM to torchrun, workers"])
def test_a_signal_finishes_the_step_and_saves(number, launcher, workers, tmp_path, monkeypatch):
    """The signal goes to all processes of the group, as clusters send it; under torchrun to torchrun alone,
    which sends it on."""
    argv = [*TINY, "--stage", "1", "--steps", "200", "--save-every", "1000", "--log-every", "5",
            "--workers", workers]
    process = script("train_tokenizer", [*argv, "--out", tmp_path / "run"], launcher)
    wait_for(lambda: len(checkpoints.read_metrics(tmp_path / "run")) > 1, 120)
    process.send_signal(number) if launcher else os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    step = checkpoints.load_checkpoint(tmp_path / "run")["step"]
    assert 10 <= step < 200 and not debris(tmp_path / "run")
    assert f"stopped by {number.name}; run the same command again to resume\n" in errors
    if not launcher:
        assert process.returncode == 128 + number and errors.splitlines()[-1].startswith("stopped by")
        assert "Traceback" not in errors
    if not launcher and (workers or number == signal.SIGHUP):                # once for each number is enough
        for name in ("EVAL_IMAGES", "LATENT_IMAGES"):
            monkeypatch.setattr(measure, name, 16)
        for out in ("run", "whole"):
            train_tokenizer.main([*map(str, argv), "--out", str(tmp_path / out)])
        assert_same_weights(*(checkpoints.load_checkpoint(tmp_path / out) for out in ("run", "whole")))


@pytest.mark.slow
def test_workers_end_when_their_launcher_is_killed(tmp_path):
    argv = [*TINY, "--stage", "1", "--steps", "100000", "--log-every", "5", "--out", tmp_path]
    process = script("train_tokenizer", argv, torchrun(2))
    wait_for(lambda: len(checkpoints.read_metrics(tmp_path)) > 1, 120)
    pid = int((tmp_path / ".lock").read_text().split()[1])
    process.kill()
    process.communicate(timeout=60)

    def ended():
        return not os.path.exists(f"/proc/{pid}") or " Z " in open(f"/proc/{pid}/stat").read()

    wait_for(ended, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "sample"])
def test_two_runs_in_one_folder_are_refused(name, tmp_path, tokenizer, sit):
    out, argv = tmp_path / "run", {
        "tokenizer": [*TINY, "--steps", "100000", "--warmup", "2"],
        "diffusion": [*SIT, "--steps", "100000", "--tokenizer", tokenizer],
        "sample": ["--ckpt", sit, "--num", "100000", "--batch-size", "1", "--device", "cpu"]}[name]
    folder = tmp_path / "run.npz.parts" if name == "sample" else out
    out = tmp_path / "run.npz" if name == "sample" else out
    first = start(name, [*argv, "--out", out])
    try:
        wait_for(lambda: len(list(folder.glob("*"))) > 2)
        with pytest.raises(UserError,
                           match=f"process {first.pid} on .* is at work in .*choose another --out"):
            MODULES[name].main([str(a) for a in [*argv, "--out", out]])
    finally:
        first.kill()
        first.join()
    files.lock(folder)                                                              # gone with the process
    files.unlock(folder)


@pytest.mark.slow
def test_an_error_has_a_line_of_its_own_below_the_progress_bar(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/7.png").write_bytes(b"no picture")
    process = script("train_tokenizer", [*TINY, "--data", tmp_path / "images", "--out", tmp_path / "run"])
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and errors.replace("\r", "\n").count("\nerror: cannot read image") == 1
    assert errors.splitlines()[-1].startswith("error: cannot read image")


# ------------------------------------------------ damage ------------------------------------------------

def flip_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path, tokenizer):
    content = (tokenizer / "last.pt").read_bytes()
    weight = checkpoints.load_checkpoint(tokenizer)["ema"]["decoder.head.weight"].numpy().tobytes()
    at = content.find(weight)
    assert at > 0
    for place in (0.2, 0.8):
        (tmp_path / "x.pt").write_bytes(content)
        flip_bit(tmp_path / "x.pt", (at + place * len(weight)) / len(content))
        with pytest.raises(UserError, match="damaged"):
            maetok.load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["model", "ema", "optimizer", "stage", "measured", "step", "ema_updates"])
def test_a_checkpoint_that_lacks_a_key_is_one_line(key, tmp_path, tokenizer):
    state = dict(checkpoints.load_checkpoint(tokenizer))
    del state[key]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=f"has no '{key}'"):
        train_tokenizer.main([*TINY, "--out", str(tmp_path)])


def test_a_config_or_optimizer_of_another_shape_is_one_line(tmp_path, tokenizer):
    for change, message in ((dict(config=[1]), "can be read"),
                            (dict(config={"width": "wide"}), "--width must be a whole number"),
                            (dict(optimizer={"state": {}, "param_groups": []}), "optimizer's state"),
                            (dict(optimizer=3), "optimizer's state"), (dict(model=3), "another model")):
        torch.save(dict(checkpoints.load_checkpoint(tokenizer)) | change, tmp_path / "last.pt")
        with pytest.raises(UserError, match=message):
            if "width" in message:
                maetok.load_tokenizer(tmp_path)
            train_tokenizer.main([*TINY, "--out", str(tmp_path)])


@pytest.mark.parametrize("harm", ["bit", "cut", "empty", "garbage", "shape"])
@pytest.mark.parametrize("kind", ["latents", "labels"])
def test_a_damaged_shard_is_encoded_again(kind, harm, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(cache, "SHARD_IMAGES", 16)
    argv = [*SIT, "--steps", "2", "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    train_diffusion.main(argv)
    shard = tmp_path / f"latents/{kind}_00001.npy"
    whole = shard.read_bytes()
    if harm == "shape":
        files.save_npy(shard, np.zeros((16, 3), np.float16))
    else:
        shard.write_bytes({"cut": whole[:-40], "empty": b"", "garbage": b"\x93NUMPY" + bytes(300),
                           "bit": whole}[harm])
        if harm == "bit":
            flip_bit(shard, 0.9)
    train_diffusion.main(argv)
    assert shard.read_bytes() == whole and "shard 1 of" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_damaged_json_is_one_line(content, tmp_path, tokenizer, sit):
    (tmp_path / "run/latents").mkdir(parents=True)
    (tmp_path / "run/latents/meta.json").write_text(content)
    with pytest.raises(UserError, match="meta.json is damaged"):
        train_diffusion.main([*SIT, "--tokenizer", str(tokenizer), "--out", str(tmp_path / "run")])
    (tmp_path / "s.npz.parts").mkdir()
    (tmp_path / "s.npz.parts/settings.json").write_text(content)
    with pytest.raises(UserError, match="settings.json is damaged"):
        sample.main(["--ckpt", str(sit), "--num", "4", "--steps", "2", "--device", "cpu", "--out",
                     str(tmp_path / "s.npz")])


def test_a_bad_line_of_the_log_costs_that_line_alone(tmp_path, capsys):
    for step in range(4):
        checkpoints.append_metrics(tmp_path, {"step": step, "loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[1:1] = ["\x00\x00", '{"loss": 1}', "[3]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"st']))
    assert [r["step"] for r in checkpoints.read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("is not a record; skipped") == 3


def test_a_damaged_part_is_drawn_again(tmp_path, sit, monkeypatch):
    argv = ["--ckpt", str(sit), "--num", "6", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--out"]
    sample.main([*argv, str(tmp_path / "whole.npz")])
    monkeypatch.setattr(sample, "write_outputs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample.main([*argv, str(tmp_path / "s.npz")])
    monkeypatch.undo()
    parts = sorted((tmp_path / "s.npz.parts").glob("*.npy"))
    assert len(parts) == 3
    flip_bit(parts[0], 0.9)
    parts[1].write_bytes(parts[1].read_bytes()[:-30])
    sample.main([*argv, str(tmp_path / "s.npz")])
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "s.npz").read_bytes()


def test_samples_do_not_mix_with_older_ones(tmp_path, sit):
    argv = ["--ckpt", str(sit), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "pngs")]
    sample.main([*argv, "--num", "4"])
    sample.main([*argv, "--num", "4"])                                                    # the very same ones
    before = sorted(p.name for p in (tmp_path / "pngs").iterdir())
    with pytest.raises(UserError, match="would mix with them; delete it or choose another --out"):
        sample.main([*argv, "--num", "2"])
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == before
    assert not (tmp_path / "pngs.parts").exists()


def test_a_folder_of_samples_that_was_cut_short_is_completed(tmp_path, sit, monkeypatch):
    argv = ["--ckpt", str(sit), "--steps", "2", "--num", "6", "--device", "cpu",
            "--out", str(tmp_path / "pngs")]

    def half(outs, *rest):
        outs[0].mkdir()
        (outs[0] / "000000_class0.png").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write_outputs", half)
    with pytest.raises(KeyboardInterrupt):
        sample.main(argv)
    monkeypatch.undo()
    sample.main(argv)
    assert len(list((tmp_path / "pngs").iterdir())) == 6
    assert Image.open(tmp_path / "pngs/000000_class0.png").size == (16, 16)


def test_a_damaged_classifier_is_trained_again(tmp_path, capsys):
    args = type("args", (), {"rank": 0, "world": 1, "device": torch.device("cpu"), "data_root": "data",
                             "cache": str(tmp_path), "classifier_steps": 2})
    features.load_classifier(args, "shapes", 16)
    file, = tmp_path.glob("classifier_*.pt")
    flip_bit(file)
    features.load_classifier(args, "shapes", 16)
    assert "it is trained again" in capsys.readouterr().out
    checkpoints.load_checkpoint(file)


# ------------------------------------------------ folders ------------------------------------------------

def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


def test_links_back_up_end(tmp_path):
    for i in range(6):
        picture(tmp_path / f"images/{'ab'[i % 2]}/{i}.png")
    for name in ("a", "b"):
        (tmp_path / f"images/{name}/up").symlink_to(tmp_path / "images")
    (tmp_path / "images/a/self").symlink_to(tmp_path / "images/a")
    folder = data.Folder(tmp_path / "images", "train")
    assert folder.length == 6 and folder.classes == ["a", "b"]
    (tmp_path / "images/c").symlink_to(tmp_path / "images/a")                # a link to a sibling is a folder
    assert data.Folder(tmp_path / "images", "train").length == 9


def test_pipes_broken_links_and_odd_names(tmp_path):
    picture(tmp_path / "images/good.png")
    os.mkfifo(tmp_path / "images/pipe.jpg")
    (tmp_path / "images/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.rename(tmp_path / "images/good.png", os.fsencode(tmp_path / "images") + b"/g\xff.png")
    folder = data.Folder(tmp_path / "images", "train")
    assert folder.length == 3 and len(folder.fingerprint()) == 64
    found = {path.name: index for index, path in enumerate(folder.files)}
    assert folder[found["g\udcff.png"]][0].size == (20, 20)
    for name, message in (("pipe.jpg", "no regular file"), ("broken.jpg", "No such file")):
        with pytest.raises(UserError, match=f"cannot read image .*{name}.*{message}"):
            folder[found[name]]


def test_what_only_looks_like_an_image_is_refused(tmp_path):
    picture(tmp_path / "images/a.png")
    Image.new("F", (20, 20), 0.5).save(tmp_path / "images/b.jpg", "TIFF")
    (tmp_path / "images/c.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                                            b"%%EndComments\nshowpage\n")
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/d.png")
    content = bytearray((tmp_path / "images/d.png").read_bytes())
    at = content.find(b"IDAT")
    length = int.from_bytes(content[at - 4:at], "big")
    content[at + 4 + length] ^= 1                                                       # the chunk's checksum
    assert zlib.crc32(content[at:at + 4 + length]) != int.from_bytes(content[at + 4 + length:][:4], "big")
    (tmp_path / "images/d.png").write_bytes(content)
    folder = data.Folder(tmp_path / "images", "train")
    assert folder[0][0].size == (20, 20)
    for index in (1, 2, 3):
        with pytest.raises(UserError, match="cannot read image"):
            folder[index]


@pytest.mark.parametrize("change", ["complex", "asymmetric", "indefinite"])
def test_a_reference_that_is_no_covariance_is_refused(change, tmp_path):
    sigma = np.eye(4)
    sigma = {"complex": sigma + 1j, "asymmetric": sigma + np.triu(np.ones((4, 4)), 1),
             "indefinite": sigma - 2 * np.diag([1, 0, 0, 0])}[change]
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=sigma)
    args = type("args", (), {"reference": str(tmp_path / "r.npz")})
    with pytest.raises(UserError,
                       match="real numbers" if change == "complex" else "asymmetric or indefinite"):
        features.read_reference(args, None, "inception tf1", 16)


def test_json_of_a_record_is_what_was_written(tmp_path):
    files.atomic_write(tmp_path / "a.json", lambda path: path.write_text(json.dumps({"a": 1})))
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
