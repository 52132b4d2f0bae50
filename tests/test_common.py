"""common.py and checkpoints.py: configuration, random streams, EMA,
checkpoints that survive crashes, logs."""
import copy
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoints
import common
from pictures import draw
from common import UserError
from maetok import MAETok, MAETokConfig


@dataclass
class Base:
    # ---- first group ----
    width: common.Count = 8             # px, 100 % of it
    # A reason, which --help leaves out.
    rate: common.Positive = 1e-3         # per step


@dataclass
class Example(Base):
    # ---- second group ----
    preset: str = "small"      # names
    fast: bool = False         # go
    hidden: tuple = (1, 2)     # not an option

    def __post_init__(self):
        if self.width == 64 and not self.fast:
            raise ValueError("width is even")


PRESETS = {"small": dict(width=4), "large": dict(width=64, fast=True), "hot": dict(rate=0.5)}


def parse(*argv):
    return common.parse_config(Example, PRESETS, ["small", "large"], "Text.", list(argv))


def test_a_full_gpu_is_one_line_that_names_the_ways_out(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with pytest.raises(SystemExit) as stop:
        common.run(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--accumulate" in error and "--checkpointing" in error


@pytest.mark.slow
def test_one_process_of_every_node_goes_first(tmp_path):
    """Two nodes of two processes, played by four on this machine: rank 0, then rank 2, then the others."""
    script = tmp_path / "script.py"
    script.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpoints, common
rank, world, device = common.start_processes("cpu")
os.environ["LOCAL_RANK"] = str(rank % 2)
with common.rank_zero_first(rank, world):
    time.sleep(0.2 * (rank in (0, 2)))
    with open({str(tmp_path / "log")!r}, "a") as file:
        file.write(str(rank))
out = {str(tmp_path)!r} + "/out" + ("" if len(sys.argv) < 2 or rank < 2 else "2")
common.run(lambda: checkpoints.check_same_step(0, out, rank, world, device))
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
              str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    order = (tmp_path / "log").read_text()
    assert order[:2] == "02" and sorted(order[2:]) == ["1", "3"]
    assert not list((tmp_path / "out").iterdir())                                   # nothing is left behind
    alone = subprocess.run([*launch, "apart"], env=environment, capture_output=True, text=True)
    assert alone.returncode != 0 and "one folder that all nodes share" in alone.stderr


def test_precedence_is_default_preset_command_line():
    assert parse() == Example(width=4)
    assert parse("--preset", "large") == Example(width=64, fast=True, preset="large")
    assert parse("--preset", "large,hot", "--width", "5", "--no-fast") == Example(5, 0.5, "large,hot", False)
    assert parse("--preset", "hot") == Example(4, 0.5, "small,hot")  # a variant alone joins the default scale


@pytest.mark.parametrize("argv, message", [
    (["--preset", "huge"], "unknown preset huge; there are: small, large, hot"),
    (["--wdth", "3"], "unrecognized"), (["--width", "x"], "must be a whole number"),
    (["--wid", "3"], "unrecognized"),
    (["--width", "-1"], "from 1 to 1,000,000,000, not '-1'"), (["--width", "64"], "width is even"),
    (["--hidden", "3"], "unrecognized"),
    (["--preset", "hot,large"], "large fixes the scale"),
    (["--preset", "small,large"], "large fixes the scale")])
def test_bad_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as e:
        parse(*argv)
    assert "\n" not in str(e.value)


def test_help_shows_groups_and_the_comments_beside_the_fields(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "first group: --width" in text and "px, 100 % of it (default 8; small: 4)" in text
    assert "per step (default 0.001)" in text and "A reason" not in text and "second group: --preset" in text


def test_random_streams_are_reproducible_and_distinct():
    draw = lambda *key: common.sample_rng(*key).random(1000)
    keys = [(0, "mask", 1, 2), (0, "mask", 2, 1), (0, "mask", 1, 3), (1, "mask", 1, 2), (0, "noise", 1, 2)]
    draws = [draw(*key) for key in keys]
    assert np.array_equal(draws[0], draw(*keys[0]))
    assert np.unique(np.concatenate(draws)).size == 5000
    assert abs(np.concatenate(draws).mean() - 0.5) < 0.02


def test_ema_follows_its_closed_form_and_warms_up():
    model = torch.nn.BatchNorm1d(1)                                    # weights and a buffer
    ema = common.EMA(model, decay=0.5)
    values = [1.0, 5.0, -2.0, 4.0]
    expected = model.weight.item()
    for n, value in enumerate(values):
        model.weight.data.fill_(value)
        model.running_mean.fill_(value)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert abs(ema.model.weight.item() - expected) < 1e-6
    assert ema.model.running_mean.item() == 4.0 and not ema.model.weight.requires_grad


def test_average_without_warm_up_starts_at_the_weights_with_its_full_decay():
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        plain, warm = common.EMA(model, 0.9, warmup=False), common.EMA(model, 0.9)
        model.weight.fill_(2.0)
    plain.update(model), warm.update(model)
    assert plain.model.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert warm.model.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 2)


def test_milestones_stay_beside_the_newest_checkpoints(tmp_path):
    for step in range(100, 1100, 100):
        checkpoints.save_checkpoint(tmp_path, {"step": step, "config": {}}, keep=2, keep_every=300)
    assert [int(p.stem[5:]) for p in checkpoints.numbered_checkpoints(tmp_path)] == [1000, 900, 600, 300]
    line = checkpoints.checkpoint_budget(torch.nn.Linear(999, 1000), 100, 1000, 2, 300)
    assert "0.016 GB each" in line and "3 milestones" in line and "0.08 GB in all" in line


def test_a_run_begun_before_an_option_existed_resumes_with_its_default():
    @dataclass
    class Config:
        lr: float = 1.0
        young: str = "as before"
    checkpoints.check_same_config({"lr": 1.0}, Config(), set(), "out")
    with pytest.raises(common.UserError, match="young 'as before' -> 'new'"):
        checkpoints.check_same_config({"lr": 1.0}, Config(young="new"), set(), "out")


def test_ema_kept_elsewhere_is_lent_as_a_copy():
    model = torch.nn.Linear(2, 2)
    ema = common.EMA(model, decay=0.5, place="cpu")
    assert ema.on(torch.device("cpu")) is ema.model
    lent = ema.on(torch.device("meta"))                              # a second device that every machine has
    assert lent.weight.is_meta and not ema.model.weight.is_meta and not lent.training
    with pytest.raises(UserError, match="--ema-device gpu: choose auto or cpu"):
        common.EMA(model, decay=0.5, place="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ema_on_the_cpu_of_a_model_on_a_gpu():
    model = torch.nn.Linear(2, 2).cuda()
    here, there = (common.EMA(model, 0.5, place) for place in ("auto", "cpu"))
    for _ in range(3):
        torch.nn.init.normal_(model.weight)
        here.update(model)
        there.update(model)
    assert there.model.weight.device.type == "cpu" and there.on(torch.device("cuda", 0)).weight.is_cuda
    torch.testing.assert_close(here.model.weight.cpu(), there.model.weight)


def test_recomputed_blocks_run_again_in_the_backward_pass_and_nowhere_else():
    calls = []

    class Double(torch.nn.Linear):
        def forward(self, x):
            calls.append(self)
            return torch.tanh(super().forward(x))

    plain = torch.nn.Sequential(*(Double(4, 4) for _ in range(3)))
    again = copy.deepcopy(plain)
    common.recompute_blocks(again, Double)
    x = torch.randn(5, 4, requires_grad=True)
    for network in (plain, again):
        network(x).square().sum().backward()
    assert [calls.count(block) for block in (*plain, *again)] == [1, 1, 1, 2, 2, 2]
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), again.parameters()))
    assert plain.state_dict().keys() == again.state_dict().keys()
    # A copy, which an EMA makes, has its own weights; and without gradients there is nothing to do twice.
    ema = common.EMA(again, 0.5)
    before, _ = ema.model(x), [p.data.zero_() for p in again.parameters()]
    calls.clear()
    with torch.no_grad():
        assert torch.equal(ema.model(x), before)
    assert len(calls) == 3


# ----------------------------------------------- checkpoints -----------------------------------------------

def state(step):
    return {"step": step, "config": {"a": 1}, "model": {"w": torch.full((1000,), float(step))}}


def test_checkpoints_are_kept_and_the_newest_is_found(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path) is None
    (tmp_path / "step_best.pt").write_text("a user's own copy")
    (tmp_path / ".step_0000004.pt.99.tmp").write_text("left by a killed process")
    checkpoints.remove_debris(tmp_path)
    for step in (5, 10, 100, 1000):
        checkpoints.save_checkpoint(tmp_path, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step_0000100.pt", "step_0001000.pt",
                                                           "step_best.pt"]
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 1000
    (tmp_path / "last.pt").unlink()
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 1000


def test_truncated_last_falls_back_with_a_warning(tmp_path, capsys):
    for step in (5, 10):
        checkpoints.save_checkpoint(tmp_path, state(step), keep=2)
    with open(tmp_path / "last.pt", "r+b") as file:
        file.truncate(2000)
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 5
    assert "warning" in capsys.readouterr().err
    with open(tmp_path / "step_0000005.pt", "r+b") as file:
        file.truncate(0)
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        checkpoints.find_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    (tmp_path / "x").write_text("old")

    def write(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        checkpoints.atomic_write(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="is the disk full") as e:
        checkpoints.atomic_write("/tmp/never-written", lambda path: torch.save(state(1), "/dev/full"))
    assert "\n" not in str(e.value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoints.load_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no 'config'"):
        checkpoints.load_checkpoint(tmp_path / "list.pt")
    torch.save({"config": np.random.default_rng()}, tmp_path / "code.pt")     # would need to run code to load
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "code.pt")


def test_weights_of_another_model_are_refused_in_one_line():
    with pytest.raises(UserError, match="weights of another model") as e:
        checkpoints.load_weights(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4).state_dict(), "x.pt")
    assert "\n" not in str(e.value)


def test_metrics_are_cut_back_on_resume(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.append_metrics(tmp_path, {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')                                           # a crash in mid-line
    checkpoints.cut_metrics(tmp_path, 2)
    assert [r["step"] for r in checkpoints.read_metrics(tmp_path)] == [1, 2]


def test_pictures_hold_what_they_are_given():
    sheet = draw.image_grid([torch.zeros(3, 3, 8, 8, dtype=torch.uint8)] * 2, ["one", "two"], cell=20)
    pixels = np.asarray(sheet)
    assert pixels.shape[0] == 48 and (pixels[:20, 150:170] == 0).all()
    plot = np.asarray(draw.plot_curves({"a": [(0, 1.0), (1, 0.1), (2, 0.01)], "b": [(3, 2.0)], "none": [],
                                        "lost": [(0, math.nan), (1, math.inf)]}))
    assert ((plot[:220] == (70, 130, 180)).all(-1)).sum() > 200                  # the curve was drawn


@pytest.mark.parametrize("batch", [2, 32])                 # PyTorch's choice of library depends on it
def test_linear_by_convolution_is_linear(batch, monkeypatch):
    plain, ours = torch.nn.Linear(256, 1024), common.Linear(256, 1024)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(batch, 20, 256, requires_grad=True)
    g = torch.randn(batch, 20, 1024) / 16
    expected = torch.autograd.grad(plain(x), (x, *plain.parameters()), g)
    called = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(common.F, "conv2d", lambda *a: called.append(1) or convolve(*a))
    for amd in (True, False):
        monkeypatch.setattr(common, "AMD_PROCESSOR", amd)
        y = ours(x)
        assert len(called) == 1 and y.is_contiguous()                             # by convolution on AMD only
        torch.testing.assert_close(y, plain(x), atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(y, (x, *ours.parameters()), g), expected):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
        small = common.Linear(8, 16)
        small(x[..., :8])
        assert len(called) == 1                                                   # small ones never


def test_an_array_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk, as a file that takes only half: neither a cut file nor debris under any name."""
    images = np.arange(2 * 3 * 64 * 64, dtype=np.uint8).reshape(2, 3, 64, 64)
    images = images.transpose(0, 2, 3, 1)                                                   # a permuted view
    path = tmp_path / "part.npy"
    checkpoints.atomic_write(path, lambda p: checkpoints.save_npy(p, images))
    assert np.array_equal(np.load(path), images) and np.load(path).flags.c_contiguous
    path.unlink()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (os.truncate(number, images.nbytes // 2), sync(number)))
    with pytest.raises(UserError, match="part.npy.*disk full"):
        checkpoints.atomic_write(path, lambda p: checkpoints.save_npy(p, images))
    assert not list(tmp_path.iterdir())


def test_matrices_cast_once_compute_what_autocast_computes():
    """The same products of the same rounded numbers, while norms and tables keep theirs."""
    model = MAETok(MAETokConfig(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2,
                                decoder_depth=1, num_latents=4, latent_dim=8)).eval().requires_grad_(False)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    exact = model.reconstruct(images)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.reconstruct(images)
        common.cast_matrices(model, torch.bfloat16)
        found = model.reconstruct(images)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    error = lambda a, b: ((a - b).square().mean() / b.square().mean()).sqrt()
    assert error(found.float(), expected.float()) < 1e-4 < error(expected.float(), exact)
    whole = common.cast_matrices(torch.nn.Linear(2, 2), torch.float32)
    assert whole.weight.dtype == torch.float32
