"""study/rehearse.py: its parts of a run, and faults that it has to find. The scripts run as forks."""
import errno
import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from forked import SERVER, child
from PIL import Image
from test_faults import SIT
from test_train_tokenizer import TINY

import cache
import checkpoints
import losses
import train_diffusion
import train_tokenizer
from common import UserError
from data import ImageDataset
from runtime import loaders
from study import rehearse

COMMAND = ["python", "train_tokenizer.py"]


def parts(*options):
    plan = rehearse.make_plan([*COMMAND, *options])
    return [(p.name, p.steps, p.first) for p in plan.parts], plan.short, plan.end


def test_a_run_is_cut_where_its_steps_change_their_cost():
    sizes = "--steps 100 --stage2-steps 60".split()
    gan = [*sizes, "--disc", "patch", "--disc-start"]
    one, two, with_gan = "stage 1", "stage 2", ", with the GAN"
    assert parts(*sizes) == ([(one, 100, 1), (two, 60, 6)], {"steps": 5, "stage2_steps": 5}, 10)
    assert parts(*gan, "30") == ([(one, 30, 1), (one + with_gan, 70, 6), (two + with_gan, 60, 11)],
                                 {"steps": 10, "stage2_steps": 5, "disc_start": 5}, 15)
    assert parts(*gan, "0") == ([(one + with_gan, 100, 1), (two + with_gan, 60, 6)],
                                {"steps": 5, "stage2_steps": 5, "disc_start": 0}, 10)
    assert parts(*gan, "110") == ([(one, 100, 1), (two, 10, 6), (two + with_gan, 50, 11)],
                                  {"steps": 5, "stage2_steps": 10, "disc_start": 10}, 15)
    assert parts(*gan, "160")[0] == [(one, 100, 1), (two, 60, 6)]                       # never
    assert parts(*gan, "30", "--stage", "1") == ([(one, 30, 1), (one + with_gan, 70, 6)], {
        "steps": 10, "stage2_steps": 0, "disc_start": 5}, 10)
    assert parts(*gan, "110", "--stage", "2") == ([(two, 10, 101), (two + with_gan, 50, 106)], {
        "steps": 100, "stage2_steps": 10, "disc_start": 105}, 110)
    plan = rehearse.make_plan("train_diffusion.py --tokenizer T --cache-images 30000".split())
    assert [plan.with_cache(count).cached for count in (5000, 90_000, None)] == [5000, 30_000, 30_000]
    for command in ([], ["python", "sample.py"]):
        with pytest.raises(UserError, match="which run"):
            rehearse.make_plan(command)
    with pytest.raises(UserError, match="unknown preset maetok-256"):
        parts("--preset", "maetok-256")


# ------------------------------------------------ whole runs ------------------------------------------------

class Fork:
    """In place of subprocess.Popen. prepare: called in the fork, before the script's main."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __call__(self, argv, stdout, stderr, start_new_session):
        self.process = SERVER.Process(target=child, args=(argv[1].removesuffix(".py"), argv[2:], {},
                                                          stdout.name, self.prepare))
        self.process.start()
        self.pid = self.process.pid
        return self

    def poll(self):
        self.returncode = self.process.exitcode
        return self.returncode

    def wait(self):
        self.process.join()


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """A function: rehearse a script's options with a fault -> what is printed."""
    def call(*options, script="train_tokenizer.py", prepare=None):
        monkeypatch.setattr(rehearse, "subprocess", SimpleNamespace(Popen=Fork(prepare)))
        rehearse.main(["--price", "2", "--json", str(tmp_path / "found.json"), "--", "python", script,
                       *map(str, options)])
        return json.loads((tmp_path / "found.json").read_text())
    return call


def few_steps_of_sampling():
    train_diffusion.GRID_STEPS = 2


@pytest.mark.slow
def test_a_run_is_rehearsed_and_leaves_nothing(tmp_path, rehearsed, capsys, monkeypatch):
    out = tmp_path / "run"
    found = rehearsed(*TINY, "--disc", "patch", "--disc-start", 3, "--out", out)
    assert not list(tmp_path.glob("run*"))
    printed = capsys.readouterr().out
    assert "killed, then resumed     at its checkpoint" in printed and " at 2 an hour" in printed
    assert list(found["parts"]) == ["stage 1", "stage 1, with the GAN", "stage 2, with the GAN"]
    assert all(part["seconds"] > 0 for part in found["parts"].values())
    assert len(found["end_of_stage_seconds"]) == 2
    # The real run: same size of checkpoints, and as many of them.
    train_tokenizer.main([*TINY, "--disc", "patch", "--disc-start", "3", "--out", str(out)])
    real = sorted(out.glob("step_*.pt"))
    assert found["checkpoint_bytes"] == pytest.approx(real[-1].stat().st_size, rel=0.01)
    assert found["checkpoints"] == checkpoints.KEEP + 1

    monkeypatch.setattr(cache, "SHARD_IMAGES", 20)
    monkeypatch.setattr(train_diffusion, "GRID_STEPS", 2)
    found = rehearsed(*SIT, "--tokenizer", out, "--out", tmp_path / "sit", script="train_diffusion.py",
                      prepare=few_steps_of_sampling)
    train_diffusion.main([*SIT, "--steps", "4", "--tokenizer", str(out), "--out", str(tmp_path / "sit")])
    latents = sum(path.stat().st_size for path in (tmp_path / "sit/latents").glob("*.npy"))
    assert found["disk_bytes"]["cache"] == pytest.approx(latents, rel=0.1)       # two shards; one was seen


def gan_without_memory():
    def logits(self, images, window):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    losses.Adversary.logits = logits


def gan_with_nan():
    train_tokenizer.generator_loss = lambda fake: fake.mean() * float("nan")


def disk_full_at_the_third_checkpoint():
    save, times = torch.save, []

    def third(content, path):
        times.append(path)
        if len(times) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)
    torch.save = third


def checkpoints_that_cannot_be_read():
    save = torch.save

    def half(content, path):
        save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
    torch.save = half


def worker_that_dies():
    get, parent = ImageDataset.__getitem__, os.getpid()

    def item(self, key):
        if os.getpid() != parent and key[1] > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, key)
    ImageDataset.__getitem__ = item
    multiprocessing.set_start_method("fork", force=True)             # of the workers, as in a run of its own


def small_shared_memory():
    loaders.room = lambda path: (6400, 6400)


def picture_that_fails():
    def draw(*values):
        raise UserError("the font is missing")
    train_tokenizer.training_grid = draw


def measuring_that_fails():
    def measure(*values):
        raise UserError("latents are not finite")
    train_tokenizer.measure_latents = measure


def photos(folder, damage=None):
    """Two classes of 40 images; damage: a function of the last file's path."""
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "val" / name).mkdir(parents=True)
        for i in range(40):
            for split in ("train", "val"):
                Image.new("RGB", (20, 20), (i, 50, 90)).save(folder / split / name / f"{i}.png")
    if damage:
        damage(folder / "train/dog/39.png")
    return folder


def empty_class(path):
    for file in path.parent.iterdir():
        file.unlink()


GAN = ["--disc", "patch", "--disc-start", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("options, prepare, said", [
    (GAN, gan_without_memory, "fails at step 6 .stage 1, with the GAN.: .*memory is full.*--accumulate"),
    (GAN, gan_with_nan, "fails at step 6 .stage 1, with the GAN.: .*not finite"),
    ([], disk_full_at_the_third_checkpoint, "fails at .*is the disk full"),
    ([], checkpoints_that_cannot_be_read, "fails at .*none of the .* checkpoints .* can be read"),
    (["--workers", "1"], worker_that_dies, "fails at .*loader process.* failed"),
    (["--workers", "1"], small_shared_memory, "fails at its start: .*--workers"),
    ([], picture_that_fails, "fails at the checkpoint or picture of step 4 .stage 1.: the font"),
    ([], measuring_that_fails, "fails at the end of stage 1: latents are not finite"),
    (["--batch-size", "7", "--accumulate", "2"], None, "fails at its start: .*--batch-size"),
    (["--disc", "dino", "--weights-dir", "{weights}"], None, "fails at its start: .*dino_deitsmall16"),
    (["--data", "{broken}"], None, "39.png"),
    (["--data", "{empty}"], None, "dog"),
    (["--out", "{file}/run"], None, "{file}"),
], ids=lambda value: getattr(value, "__name__", None) or str(value)[:40])
def test_a_fault_is_found_and_named(options, prepare, said, tmp_path, rehearsed):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/dino_deitsmall16_pretrain.pth").write_bytes(b"not this")
    (tmp_path / "file").write_text("")
    places = {"weights": tmp_path / "weights", "file": tmp_path / "file"}
    if "{broken}" in options:
        places["broken"] = photos(tmp_path / "b", lambda path: path.write_bytes(path.read_bytes()[:60]))
    if "{empty}" in options:
        places["empty"] = photos(tmp_path / "e", empty_class)
    options = [word.format(**places) for word in options]
    out = [] if "--out" in options else ["--out", tmp_path / "run"]
    with pytest.raises((UserError, OSError), match=said.replace("{file}", str(tmp_path / "file"))):
        rehearsed(*TINY, *out, *options, prepare=prepare)
    assert not (tmp_path / "run.rehearsal").exists()


def test_a_run_without_room_is_refused(monkeypatch, tmp_path):
    plan, found = rehearse.make_plan([*COMMAND, "--out", str(tmp_path / "a/b")]), {"disk_bytes": {
        "checkpoints": 3 * 10 ** 9, "pictures": 10 ** 9}}
    monkeypatch.setattr(rehearse.loaders, "room", lambda path: (10 ** 12, 3.5e9))
    with pytest.raises(UserError, match=r"--out .*b has 3.5 GB free, the run needs 4.0 .checkpoints 3.0 GB"):
        rehearse.check_disk(plan, found)
    monkeypatch.setattr(rehearse.loaders, "room", lambda path: (10 ** 12, 4.5e9))
    rehearse.check_disk(plan, found)
