"""common.py, checkpoints.py, runtime/: configuration, extras, random streams, EMA, checkpoints that survive
crashes, logs."""
import copy
import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT

import checkpoints
import common
from common import UserError
from maetok import MAETok, MAETokConfig
from pictures import draw
from runtime import files, processes, resuming


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
        processes.run(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--accumulate" in error and "--checkpointing" in error


@pytest.mark.slow
def test_one_process_of_every_node_goes_first(tmp_path):
    """Two nodes of two processes, played by four on this machine: rank 0, then rank 2, then the others."""
    script = tmp_path / "script.py"
    script.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from runtime import processes, resuming
rank, world, device = processes.start_processes("cpu")
os.environ["LOCAL_RANK"] = str(rank % 2)
with processes.rank_zero_first(rank):
    time.sleep(0.2 * (rank in (0, 2)))
    with open({str(tmp_path / "log")!r}, "a") as file:
        file.write(str(rank))
out = {str(tmp_path)!r} + "/out" + ("" if len(sys.argv) < 2 or rank < 2 else "2")
processes.run(lambda: resuming.check_same_step(0, out, rank, world, device))
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
    (["--preset", "huge"], "unknown preset huge .an extra.s needs its --add.; there are: small, large, hot"),
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


# ------------------------------------------------- extras -------------------------------------------------

class Plain:
    """What extras attach to: a model that answers with a list of who was asked, and a trainer's step."""
    ROLE, PRESETS = "Trainer", {"small": dict(width=4)}

    @dataclass
    class Config:
        # ---- first group ----
        width: common.Count = 8      # px
        preset: str = "small"        # names
        add: str = ""                # extras

    class Model:
        def __init__(self, config):
            self.config = config

        def forward(self):
            return ["plain"]

    def step(self):
        return ["plain"]


def extra(name, training_only=False):
    """A module with an extra that has an option NAME, and says its name before the others say theirs."""
    class AddToTrainer:
        TRAINING_ONLY = training_only

        class Model:
            def forward(self):
                return [name, *super().forward()]

        def step(self):
            return [name, *super().step()]

    return SimpleNamespace(__name__=f"after.{name}", AddToTrainer=AddToTrainer)


class OptionOfFirst:
    # ---- options of first ----
    strength: common.Share = 0.5     # of first


@pytest.fixture
def modules(monkeypatch):
    first, second = extra("first"), extra("second", training_only=True)
    first.AddToTrainer.Config = dataclass(OptionOfFirst)
    first.AddToTrainer.PRESETS = {"strong": dict(strength=1.0)}
    second.AddToTrainer.Model = type("Model", (second.AddToTrainer.Model,), {})
    found = {"first": first, "second": second, "elsewhere": SimpleNamespace(__name__="study.elsewhere")}
    real = common.find_extra
    monkeypatch.setattr(common, "find_extra", lambda name: found[name] if name in found else real(name))


def test_extras_go_in_front_of_what_they_are_added_to(modules):
    kind = common.attach(Plain, ["first", "second"])
    assert kind().step() == ["second", "first", "plain"]
    assert kind.Model(kind.Config()).forward() == ["second", "first", "plain"]
    assert common.attach(Plain, ["second", "first"])().step() == ["first", "second", "plain"]
    assert common.attach(Plain, []) is Plain and Plain().step() == ["plain"]            # nothing changed it
    assert kind.PRESETS == {"small": dict(width=4), "strong": dict(strength=1.0)}
    config = kind.Config(strength=0.25)
    assert (config.width, config.strength) == (8, 0.25) and isinstance(config, Plain.Config)


def test_options_of_an_extra_are_there_once_it_is_named(modules, capsys):
    def parse(*argv):
        kind = common.attach_named(Plain, list(argv))
        return common.parse_config(kind.Config, kind.PRESETS, ["small"], "Text.", list(argv))

    assert parse("--add", "first", "--strength", "0.1").strength == 0.1
    assert parse("--add", "second,first", "--preset", "strong").strength == 1.0
    for argv in (["--strength", "0.1"], ["--add", "second", "--strength", "0.1"]):
        with pytest.raises(UserError, match="unrecognized"):
            parse(*argv)
    with pytest.raises(UserError, match="--strength: must be a number from 0 to 1"):
        parse("--add", "first", "--strength", "2")
    with pytest.raises(SystemExit):
        parse("--add", "first", "--help")
    assert "options of first: --strength FLOAT of first (default 0.5)" in " ".join(
        capsys.readouterr().out.split())


@pytest.mark.parametrize("name, message", [
    ("nothing", "there is no nothing.py in after/, variants/, study/"),
    ("../maetok", "there is no ../maetok.py in"), ("os", "there is no os.py in"), ("maetok", "there is no"),
    ("elsewhere", "study/elsewhere.py cannot be added here: it has no AddToTrainer")])
def test_what_cannot_be_added_is_one_line(name, message, modules):
    with pytest.raises(UserError, match=message) as e:
        common.attach_named(Plain, ["--add", f"first, {name}"])
    assert "\n" not in str(e.value)


def test_a_checkpoints_model_needs_no_extra_that_was_only_for_training(modules):
    names = common.model_extras(Plain, "first, second")
    assert names == ["first"]
    config = dataclasses.asdict(common.attach(Plain, ["first", "second"]).Config(width=3)) | {"steps": 5}
    model = common.build_model(Plain, config, names)
    assert model.forward() == ["first", "plain"] and (model.config.width, model.config.strength) == (3, 0.5)


# ---------------------------------------------- random streams ----------------------------------------------

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
        checkpoints.save_checkpoint(tmp_path, {"step": step, "config": {}}, keep_every=300)
    assert [int(p.stem[5:]) for p in checkpoints.numbered_checkpoints(tmp_path)] == [1000, 900, 800, 600, 300]


def test_a_run_resumes_only_with_its_own_options():
    @dataclass
    class Config:
        lr: float = 1.0
        workers: int = 0
        extra: str = "none"
    check = lambda saved, **now: resuming.check_same_config(saved, Config(**now), {"workers"}, "runs/a")
    same = {"lr": 1.0, "workers": 0, "extra": "none"}
    check(same)
    check(same, workers=4)
    with pytest.raises(UserError, match="runs/a is of another run .lr 1.0 -> 2.0.; choose another --out"):
        check(same, lr=2.0)
    with pytest.raises(UserError, match="muon 2.0 -> None"):           # the run had an extra, not named now
        check(same | {"muon": 2.0})


def test_recomputed_blocks_run_again_in_the_backward_pass_and_nowhere_else():
    calls = []

    class TanhBlock(torch.nn.Linear):
        def forward(self, x):
            calls.append(self)
            return torch.tanh(super().forward(x))

    plain = torch.nn.Sequential(*(TanhBlock(4, 4) for _ in range(3)))
    again = copy.deepcopy(plain)
    common.recompute_blocks(again)
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
    files.remove_debris(tmp_path)
    for step in (5, 7, 10, 100, 1000):
        checkpoints.save_checkpoint(tmp_path, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last.pt", "step_0000010.pt", "step_0000100.pt", "step_0001000.pt", "step_best.pt"]
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 1000
    (tmp_path / "last.pt").unlink()
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 1000


def test_truncated_last_falls_back_with_a_warning(tmp_path, capsys):
    for step in (5, 10):
        checkpoints.save_checkpoint(tmp_path, state(step))
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
        files.atomic_write(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="is the disk full") as e:
        files.atomic_write("/tmp/never-written", lambda path: torch.save(state(1), "/dev/full"))
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


def train_state(width=3, seed=0):
    """A small state of which each part can be told from the others, and a step that changes them all."""
    torch.manual_seed(seed)
    model, critic = torch.nn.Linear(width, 2), torch.nn.Linear(2, 1)
    adamw = lambda module: torch.optim.AdamW(module.parameters())
    return common.TrainState(model, common.EMA(model, 0.5), adamw(model), 0,
                             {"adversary": critic, "adversary_optimizer": adamw(critic)},
                             {"kind": "example", "stage": 1})


def train_step(state):
    state.others["adversary"](state.model(torch.ones(4, 3))).sum().backward()
    for optimizer in (state.optimizer, state.others["adversary_optimizer"]):
        common.optimizer_step(optimizer, 1.0)
    state.ema.update(state.model)
    state.step += 1


@dataclass
class Run:
    out: str
    log_every: int = 2
    save_every: int = 3
    batch_size: int = 8


ONE = processes.Processes(0, 1, torch.device("cpu"))


def test_the_end_of_a_step_logs_draws_and_saves_when_it_is_time(tmp_path, monkeypatch):
    state, drawn, asked = train_state(), [], []
    log = checkpoints.Log(Run(str(tmp_path)), ONE, 0, 0, 7, "stage 1", shown=("loss",), draw=drawn.append)
    for step in range(1, 8):
        train_step(state)
        log.add({"loss": torch.tensor(float(step), requires_grad=True)})
        if step > 4:
            log.add({"adv": torch.tensor(5.0)})                                   # begins in the middle
        log.end_step(state, lr=lambda: asked.append(step) or 0.1)
    records = checkpoints.read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r.get("adv")) for r in records] == [
        (2, 1.5, None), (3, 3.0, None), (4, 4.0, None), (6, 5.5, 5.0), (7, 7.0, 5.0)]
    assert asked == [2, 3, 4, 6, 7]                             # read from the GPU for a record, else never
    assert all(r["lr"] == 0.1 and r["images_per_second"] > 0 for r in records)
    assert [path.name for path in drawn] == [f"grid_{step:07d}.png" for step in (3, 6, 7)]
    assert [int(p.stem[5:]) for p in checkpoints.numbered_checkpoints(tmp_path)] == [7, 6, 3]
    assert log.bar.n == 7 and log.bar.disable
    # A signal: the step is finished, saved, and then it stops.
    log = checkpoints.Log(Run(str(tmp_path)), ONE, 7, 7, 20, "stage 2", shown=(), draw=drawn.append)
    monkeypatch.setattr(processes, "_signals", [15])
    train_step(state)
    log.add({"loss": torch.tensor(1.0)})
    with pytest.raises(processes.Stopped):
        log.end_step(state)
    assert checkpoints.find_checkpoint(tmp_path)["step"] == 8
    assert checkpoints.read_metrics(tmp_path)[-1]["step"] == 8
    log.bar.close()


def test_a_value_that_is_not_finite_is_noticed_before_it_is_saved(tmp_path):
    state = train_state()
    log = checkpoints.Log(Run(str(tmp_path)), ONE, 0, 0, 7, "stage 1", shown=(), draw=print)
    for value in (1.0, float("inf"), 1.0):                                        # a later one hides nothing
        train_step(state)
        log.check_finite(torch.tensor(1.0), torch.tensor(value))
        log.add({"loss": torch.tensor(1.0)})
    with pytest.raises(UserError, match="not finite at step 3 or up to 2 before"):
        log.end_step(state)
    assert not list(tmp_path.iterdir())
    log.bar.close()


def test_what_was_saved_is_restored_and_nothing_of_another_kind(tmp_path):
    """Weights, average and optimizer of the model and of what is trained beside it, and plain facts."""
    trained, fresh = train_state(), train_state(seed=1)
    train_step(trained)
    trained.facts["stage"] = 2
    checkpoints.save(Run(str(tmp_path)), trained, ONE)
    checkpoint = checkpoints.find_checkpoint(tmp_path)
    checkpoints.restore(fresh, checkpoint, tmp_path)
    assert fresh.facts == {"kind": "example", "stage": 2}
    for state in (trained, fresh):
        train_step(state)
    assert fresh.step == fresh.ema.updates == 2
    for a, b in ((trained.model, fresh.model), (trained.ema.model, fresh.ema.model),
                 (trained.others["adversary"], fresh.others["adversary"])):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(UserError, match="weights of another model"):
        checkpoints.restore(train_state(width=5), checkpoint, tmp_path)


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


def test_curves_show_the_best_constant_and_where_stage_2_begins(tmp_path, monkeypatch):
    records = [{"step": n, "stage": 1 + (n > 3), "hog": 0.4 / n} for n in range(1, 7)]
    records.insert(3, {"step": 3, "stage": 1, "event": "end of stage 1", "psnr": 20.0, "hog_constant": 0.2})
    for record in records:
        checkpoints.append_metrics(tmp_path, record)
    seen = []
    plot = draw.plot_curves
    monkeypatch.setattr(checkpoints, "plot_curves", lambda *args: seen.append(args) or plot(*args))
    checkpoints.draw_curves(SimpleNamespace(out=tmp_path))
    curves, constants, second = seen[0]
    assert set(curves) == {"hog", "psnr"} and constants == {"hog": 0.2} and second == 4
    pixels = np.asarray(Image.open(tmp_path / "loss.png"))
    orange, grey = ((pixels == colour).all(-1) for colour in ((255, 140, 0), (128, 128, 128)))
    assert orange.sum(1).max() > 500 and grey.sum(0).max() > 100             # a line across, a line down


@pytest.mark.parametrize("batch", [2, 32])                 # PyTorch's choice of library depends on it
def test_faster_products_are_the_same_products(batch, monkeypatch):
    plain = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 8))
    x = torch.randn(batch, 20, 256, requires_grad=True)
    g = torch.randn(batch, 20, 1024) / 16
    first = lambda model: torch.autograd.grad(model[0](x), (x, *model[0].parameters()), g)
    called, convolve = [], torch.nn.functional.conv2d
    monkeypatch.setattr(processes.F, "conv2d", lambda *a: called.append(1) or convolve(*a))
    for amd in (False, True):
        monkeypatch.setattr(processes, "AMD_PROCESSOR", amd)
        ours = processes.faster_products(copy.deepcopy(plain))
        y = ours[0](x)
        assert len(called) == amd and y.is_contiguous()                           # by convolution on AMD only
        torch.testing.assert_close(y, plain[0](x), atol=1e-5, rtol=1e-5)
        for a, b in zip(first(ours), first(plain)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
        assert ours.state_dict().keys() == plain.state_dict().keys()
    called.clear()
    ours[2](y.tanh())                                                             # small layers never
    with torch.autocast("cpu", torch.bfloat16):                                   # nor what autocast rounds
        assert ours[0](x).dtype == torch.bfloat16
    assert not called and ours[0](x[0]).shape == (20, 1024) and not called        # nor (T, D)
    # A copy, which an EMA makes, has its own weights.
    average = common.EMA(ours, 0.5).model
    before = ours[0](x).detach()
    torch.nn.init.zeros_(ours[0].weight)
    torch.testing.assert_close(average[0](x), before)


def test_an_array_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk, as a file that takes only half: neither a cut file nor debris under any name."""
    images = np.arange(2 * 3 * 64 * 64, dtype=np.uint8).reshape(2, 3, 64, 64)
    images = images.transpose(0, 2, 3, 1)                                                   # a permuted view
    path = tmp_path / "part.npy"
    files.atomic_write(path, lambda p: files.save_npy(p, images))
    assert np.array_equal(np.load(path), images) and np.load(path).flags.c_contiguous
    path.unlink()
    monkeypatch.setattr(os.path, "getsize", lambda path: images.nbytes // 2)
    with pytest.raises(UserError, match="part.npy.*disk full"):
        files.atomic_write(path, lambda p: files.save_npy(p, images))
    assert not list(tmp_path.iterdir())


def test_matrices_cast_once_compute_what_autocast_computes():
    """The same products of the same rounded numbers, while norms and tables keep theirs."""
    model = MAETok(MAETokConfig(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2,
                                decoder_depth=1, num_latents=4, latent_dim=8)).eval().requires_grad_(False)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    exact = model.reconstruct(images)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.reconstruct(images)
        processes.cast_matrices(model, torch.bfloat16)
        found = model.reconstruct(images)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    error = lambda a, b: ((a - b).square().mean() / b.square().mean()).sqrt()
    assert error(found.float(), expected.float()) < 1e-4 < error(expected.float(), exact)
    whole = processes.cast_matrices(torch.nn.Linear(2, 2), torch.float32)
    assert whole.weight.dtype == torch.float32
