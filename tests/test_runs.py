"""What a run must survive, and what must stop it at once with one line: signals, moved and changed images, a
small /dev/shm, a GPU that cannot be used, half of torchrun's environment, logs that cannot be written."""
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image
from test_train_tokenizer import TINY, assert_same_weights

import cache
import checkpoints
import common
import losses
import maetok
import sample
import train_diffusion
import train_tokenizer
from common import UserError
from data import collate
from frozen import weight_files
from runtime import files, loaders, meter, processes, resuming

CPU = torch.device("cpu")
SIT = ("--width 32 --depth 2 --heads 2 --cache-images 0 --batch-size 8 --steps 6 --warmup 2 --log-every 1 "
       "--save-every 3 --device cpu").split()
GAN = "--stage 1 --steps 6 --disc patch --disc-start 4".split()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(train_diffusion, "GRID_STEPS", 2)


def train(out, *options):
    train_tokenizer.main([*TINY, "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def train_sit(out, tokenizer, *options):
    train_diffusion.main([*SIT, "--tokenizer", str(tokenizer), "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


@pytest.fixture
def photos(tmp_path):
    """A folder of 12 images in two classes."""
    for i in range(12):
        path = tmp_path / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(path)
    return tmp_path / "photos"


# ------------------------------------------------ signals ------------------------------------------------

class Items(torch.utils.data.Dataset):
    def __init__(self, size=4):
        self.size = size

    def __getitem__(self, key):
        return torch.full((3, self.size, self.size), key, dtype=torch.uint8), os.getpid()


def test_workers_survive_the_signals_that_a_cluster_sends_to_all_processes():
    batches = common.batch_loader(Items(), [[i] for i in range(20)], 2, CPU, collate)
    workers = {int(next(batches)[1]) for _ in range(4)}
    assert len(workers) == 2 and os.getpid() not in workers
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    left = [images.flatten()[0].item() for images, _ in batches]
    assert left == list(range(4, 20))


def test_no_signal_reaches_a_worker_before_it_ignores_them(monkeypatch):
    """They are held from before the fork on."""
    held = []
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *args, **options: (
        held.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])), iter([1]))[1])
    assert list(loaders.batches(Items(), 1, [[0]])) == [1]
    assert {signal.SIGTERM, signal.SIGHUP} <= held[0]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_python_ends_although_a_loader_is_half_read():
    """As in a notebook: its workers ignore the SIGTERM that would end them."""
    code = """import sys, torch
from common import batch_loader
sys.half_read = batch_loader([(0,), (1,), (2,), (3,)], [[0], [1], [2], [3]], 1, torch.device("cpu"), list)
print(next(sys.half_read))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[(0,)]\n", "")


def test_the_flag_to_stop_is_exchanged_on_the_training_device_and_read_a_step_later(monkeypatch):
    """No second group, which may find no way between the nodes, and no wait inside the loop."""
    other = [0, 15, 0, 0, 15]                                                 # the other process's, by step

    def all_reduce(flag, op, async_op):
        assert async_op and op == dist.ReduceOp.MAX and flag.device == CPU
        number = other.pop(0)
        return SimpleNamespace(wait=lambda: flag.clamp_(min=number))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "new_group", None)
    stop = processes.StopFlag(processes.Processes(0, 2, CPU))
    assert [stop.read(now=False) for _ in range(3)] == [0, 0, 15]
    assert stop.read(now=False) == 0
    assert stop.read(now=True) == 15                                     # a step that saves misses no signal
    stop.close()


def test_a_signal_after_the_loop_stops_at_once(monkeypatch):
    stop = processes.StopFlag(processes.Processes(0, 1, CPU))
    assert processes._finish_steps == [True] and stop.read(now=False) == 0
    monkeypatch.setattr(processes, "_signals", [15])
    with pytest.raises(processes.Stopped):
        stop.close()
    assert processes._finish_steps == [False]


def test_processes_meet_at_the_store_and_collectives_keep_their_usual_timeout(monkeypatch):
    options = {}
    monkeypatch.setattr(dist, "rendezvous", lambda *args: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: options.update(more))
    monkeypatch.setattr(processes, "_store", [])
    processes._join(0, 2, CPU)
    assert "timeout" not in options and options["store"] is processes._store[0]
    other = threading.Thread(target=lambda: processes._meet("x", 2, 60))
    other.start()
    processes._meet("x", 2, 60)
    other.join()
    with pytest.raises(UserError, match="only 1 of 2 processes are here"):
        processes._meet("y", 2, 0.01)


def test_processes_that_cannot_reach_each_other_are_one_line(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Gloo connectFullMesh failed with ... Connection refused\nmore")

    monkeypatch.setattr(dist, "rendezvous", lambda *args: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(UserError, match="Connection refused.*GLOO_SOCKET_IFNAME") as e:
        processes._join(0, 2, CPU)
    assert "\n" not in str(e.value)


# ------------------------------------------- the GAN's dead end -------------------------------------------

def test_accumulation_may_change_until_the_gan_begins(tmp_path):
    train(tmp_path, *GAN, "--save-every", "2")
    state = dict(checkpoints.load_checkpoint(tmp_path))
    change = lambda step: train_tokenizer.check_resumable(
        train_tokenizer.Config(**state["config"] | {"accumulate": 2}), state | {"step": step})
    change(4)
    with pytest.raises(UserError, match="accumulate 1 -> 2"):
        change(5)


def test_the_step_that_is_tried_first_leaves_no_trace(tmp_path, monkeypatch):
    """Weights, averages, both optimizers, batch norms and records are those of a run without it."""
    plain = train(tmp_path / "plain", *GAN)
    steps, objective = [], train_tokenizer.Method.objective
    monkeypatch.setattr(train_tokenizer.Method, "objective", lambda self, step, batch, *rest: (
        steps.append((step, bool(batch.windows))), objective(self, step, batch, *rest))[1])
    monkeypatch.setattr(resuming, "REHEARSED_ON", {"cpu"})
    tried = train(tmp_path / "tried", *GAN)
    assert steps == [(4, True), (0, False), (1, False), (2, False), (3, False), (4, True), (5, True)]
    assert_same_weights(plain, tried)
    for part in ("optimizer", "adversary", "adversary_optimizer"):
        assert str(plain[part]) == str(tried[part])
    of = lambda name: [{k: v for k, v in r.items() if k in ("loss", "adv", "disc", "grad_norm", "psnr")}
                       for r in checkpoints.read_metrics(tmp_path / name)]
    assert of("plain") == of("tried")


def test_a_gan_that_does_not_fit_ends_in_the_first_minute(tmp_path, monkeypatch, capsys):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(resuming, "REHEARSED_ON", {"cpu"})
    monkeypatch.setattr(losses.Adversary, "logits", too_much)
    with pytest.raises(SystemExit) as stop:
        processes.run(lambda: train(tmp_path, *GAN))
    assert stop.value.code == 2 and not checkpoints.read_metrics(tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--checkpointing" in error and "until --disc-start" in error


# -------------------------------------------------- data --------------------------------------------------

def test_a_run_resumes_where_its_images_lie_now(tmp_path, photos):
    tokenizer, sit = tmp_path / "t", tmp_path / "d"
    whole = train(tmp_path / "whole", "--data", photos)
    train(tokenizer, "--data", photos, "--stage", "1")
    train_sit(sit, tokenizer, "--data", photos)
    os.rename(photos, tmp_path / "moved")
    assert_same_weights(whole, train(tokenizer, "--data", f"{tmp_path / 'moved'}/"))
    # The tokenizer's stage 2 has changed its decoder alone; where it measured the latents anew, SiT keeps
    # the scale that it has learned.
    before = checkpoints.load_checkpoint(sit)["tokenizer"]["ema"]
    later = checkpoints.load_checkpoint(tokenizer)
    later["ema"]["latent_std"] = later["ema"]["latent_std"] * 1.1
    torch.save(dict(later), tmp_path / "later.pt")
    train_sit(sit, tmp_path / "later.pt", "--data", tmp_path / "moved", "--steps", 9)
    after = checkpoints.load_checkpoint(sit)["tokenizer"]["ema"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"} and not any(name.startswith("aux") for name in after)
    train(tmp_path / "other", "--data", tmp_path / "moved", "--seed", 1)
    with pytest.raises(UserError, match="trained on another tokenizer"):
        train_sit(sit, tmp_path / "other", "--data", tmp_path / "moved", "--steps", 9)


@pytest.mark.parametrize("change, reason", [
    (lambda photos: (photos / "a/0.png").unlink(), "12 images -> 11 images"),
    (lambda photos: (photos / "b").rename(photos / "c"), "2 classes, a to b -> 2 classes, a to c"),
    (lambda photos: Image.new("RGB", (90, 90)).save(photos / "a/0.png"), "as many, other files or sizes")])
def test_a_run_does_not_resume_on_other_images(tmp_path, photos, change, reason):
    train(tmp_path / "t", "--data", photos, "--stage", "1")
    train_sit(tmp_path / "d", tmp_path / "t", "--data", photos)
    change(photos)
    for resume in (lambda: train(tmp_path / "t", "--data", photos),
                   lambda: train_sit(tmp_path / "d", tmp_path / "t", "--data", photos)):
        with pytest.raises(UserError, match=f"trained on other images.*{reason}.*choose another --out") as e:
            resume()
        assert "\n" not in str(e.value)


def test_the_end_of_a_diffusion_run_moves_until_its_learning_rate_falls(tmp_path, photos):
    train(tmp_path / "t", "--data", photos)
    sit = lambda name, *options: train_sit(tmp_path / name, tmp_path / "t", *options)
    whole, falls = sit("whole", "--steps", 9), sit("whole-falls", "--steps", 9, "--lr-decay", 0.3)
    sit("longer")                                                                                   # 8 steps
    assert_same_weights(whole, sit("longer", "--steps", 9))
    with pytest.raises(UserError, match="steps 9 -> 6"):
        sit("longer", "--steps", 6)
    # Six steps, as of a run without a fall; 0.3 of 9 steps begin after them.
    sit("moved", "--steps", 6)
    assert_same_weights(falls, sit("moved", "--steps", 9, "--lr-decay", 0.3))
    # Where the learning rate has fallen already there is another way, which the line names.
    for more in (lambda: sit("moved", "--steps", 20, "--lr-decay", 0.3),
                 lambda: train(tmp_path / "t", "--data", photos, "--steps", 20)):
        with pytest.raises(UserError, match="steps . -> .*--init"):
            more()


# ------------------------------------------ devices and launchers ------------------------------------------

def test_dtype_auto_is_bfloat16_for_wide_models_on_cpus_that_have_it(tmp_path, photos, monkeypatch):
    def run(name, *options):
        tokenizer = train(tmp_path / f"{name}-t", "--data", photos, *GAN, *options)
        sit = train_sit(tmp_path / f"{name}-d", tmp_path / "exact-t", *options)
        sample.main(["--ckpt", str(tmp_path / f"{name}-d"), "--steps", "2", "--num", "4", "--device", "cpu",
                     "--out", str(tmp_path / f"{name}.npz"), *options])
        settings = json.loads((tmp_path / f"{name}.npz.settings.json").read_text())
        return (tokenizer, sit), np.load(tmp_path / f"{name}.npz")["arr_0"], settings["dtype"]

    monkeypatch.setattr(processes, "NATIVE_BFLOAT16", True)
    exact, _, dtype = run("exact")                                                # narrow ones in float32
    assert dtype == "float32"
    rounded, images, _ = run("rounded", "--dtype", "bfloat16")
    monkeypatch.setattr(processes, "BFLOAT16_WIDTH", exact[0]["config"]["width"])
    found, same, dtype = run("found")
    assert dtype == "bfloat16" and np.array_equal(images, same)
    for a, b, c in zip(found, rounded, exact):
        assert_same_weights(a, b)
        assert any(not torch.equal(a["ema"][name], weight) for name, weight in c["ema"].items())
    monkeypatch.setattr(processes, "NATIVE_BFLOAT16", False)
    assert processes.autocast_dtype("auto", CPU, 10 ** 6) == torch.float32


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch):
    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old)
    monkeypatch.setattr(processes, "GPUS", "nul[l]")                                            # /dev/null
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"has a GPU.*cannot use \(.*driver.*too old.*--device cpu"):
        processes.start_processes("auto")
    assert processes.start_processes("cpu").device == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")                                         # hidden on purpose
    assert processes.start_processes("auto").device == CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(processes, "GPUS", "no-such-file-*")
    assert processes.start_processes("auto").device == CPU


@pytest.mark.parametrize("given", [dict(RANK="0"), dict(WORLD_SIZE="2"), dict(
    RANK="a", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")])
def test_half_of_torchruns_environment_is_one_line(given, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun"):
        processes.start_processes("cpu")


@pytest.mark.slow
def test_without_torch_there_is_one_line_with_the_command():
    for script in ("sample.py", "train_tokenizer.py", "evaluate.py"):
        done = subprocess.run([sys.executable, "-S", str(ROOT / script)], capture_output=True, text=True,
                              env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "torch" in done.stderr and "-m pip install -r" in done.stderr


# ------------------------------------------------- loaders -------------------------------------------------

def test_a_small_shared_memory_is_noticed_before_workers_start(monkeypatch):
    batches = [[0] * 64] * 3
    start = lambda workers: next(common.batch_loader(Items(256), batches, workers, CPU, collate))
    monkeypatch.setattr(loaders, "room", lambda path: (64_000_000, 60_000_000))             # Docker's 64 MB
    with pytest.raises(UserError, match="60 of 64 MB free.*8 processes hold 201 MB.*--shm-size.*--workers"):
        start(8)
    start(0)
    monkeypatch.setattr(loaders, "room", lambda path: (300_000_000, 300_000_000))
    loaders.check_shared_memory(Items(256), batches, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="hold 403 MB"):
        start(8)


@pytest.mark.parametrize("error", [
    OSError(errno.EMFILE, "Too many open files"), OSError(errno.EAGAIN, "Resource temporarily unavailable"),
    RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Read-only file system"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("can't start new thread"), EOFError(),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")])
def test_workers_that_cannot_be_started_or_die_are_one_line(error, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(torch.utils.data, "DataLoader", fails)
    with pytest.raises(UserError, match="2 loader processes failed.*ulimit -n.*--workers"):
        next(loaders.batches(Items(), 2, [[0]]))
    with pytest.raises(type(error)):                          # without workers the error is of another kind
        next(loaders.batches(Items(), 0, [[0]]))


def test_workers_are_kept_over_shards(tmp_path, monkeypatch):
    train(tmp_path / "t")
    monkeypatch.setattr(cache, "SHARD_IMAGES", 16)
    started, real = [], torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader",
                        lambda *args, **options: (started.append(1), real(*args, **options))[1])
    train_sit(tmp_path / "d", tmp_path / "t", "--cache-images", 40)
    assert len(list((tmp_path / "d/latents").glob("latents_*.npy"))) == 3
    assert len(started) == 2                                                    # to encode, and to train
    labels = [np.load(path) for path in sorted((tmp_path / "d/latents").glob("labels_*.npy"))]
    assert [len(part) for part in labels] == [16, 16, 8]
    assert (np.concatenate(labels) == np.arange(40) % 10).all()


# ------------------------------------------- checkpoints and logs -------------------------------------------

def test_a_checkpoint_to_resume_from_is_mapped_not_read(tmp_path, monkeypatch):
    """All processes of a machine share its pages, instead of a copy for each."""
    train(tmp_path)
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: (
        mapped.append(options.get("mmap")), load(*args, **options))[1])
    checkpoints.find_checkpoint(tmp_path)
    maetok.load_tokenizer(tmp_path)
    assert mapped == [True, True]
    checkpoints.load_checkpoint(tmp_path)
    assert mapped[2:] == [False]


def test_curves_are_drawn_at_every_checkpoint_and_have_memory_and_waiting(tmp_path, monkeypatch):
    train(tmp_path / "t")
    save, drawn = checkpoints.save, []
    for module, start in ((train_tokenizer, lambda out: train(out, "--save-every", 3)),
                          (train_diffusion,
                           lambda out: train_sit(out, tmp_path / "t", "--cache-images", 16))):
        out = tmp_path / module.__name__
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            def stop(config, state, processes):
                drawn.append((state.step, (out / "loss.png").exists()))
                save(config, state, processes)
                raise KeyboardInterrupt

            patch.setattr(checkpoints, "save", stop)
            start(out)
        record = checkpoints.read_metrics(out)[-1]
        assert 0.05 < record["peak_memory_gib"] < 50 and 0 < record["data_wait_seconds"] < 60
        assert "gpu_speed_used" not in record
    assert drawn == [(3, True)] * 2
    assert any(name.startswith("loss for t in [0, 0.1)") for name in checkpoints.curves(out))


def test_operations_are_counted_in_the_first_step_and_when_the_loss_changes(monkeypatch):
    """A linear layer of 4 x 5 on 3 inputs: 2 x 3 x 4 x 5 forward, as many for the gradient of its weight."""
    monkeypatch.setattr(meter, "product_speed", lambda device, dtype: 1000.0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 ** 30)
    m, layer = meter.Meter(torch.device("cuda"), "auto"), torch.nn.Linear(4, 5)
    for terms, batch in ((frozenset(), 3), (frozenset("a"), 3), (frozenset("a"), 100)):
        with m.counted(terms):
            layer(torch.ones(batch, 4)).sum().backward()
            m.end_step()
            layer(torch.ones(7, 4))                                         # drawing, which does not count
        assert m.flops == 240
    found = m.read(steps=10, seconds=4.0)
    assert found["gpu_speed_used"] == pytest.approx(240 * 10 / 4 / 1000) and found["peak_memory_gib"] == 1
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not meter.Meter(CPU, "auto").read(1, 1.0).keys() - {"data_wait_seconds", "peak_memory_gib"}


@pytest.mark.parametrize("number, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False),
                                          (errno.EROFS, False)])
def test_the_disk_is_only_called_full_when_it_is(number, full, tmp_path):
    def write(path):
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=os.strerror(number)) as e:
        files.atomic_write(tmp_path / "x", write)
    assert ("is the disk full" in str(e.value)) == full


def test_without_a_home_no_folder_is_called_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "~/.cache/torch/hub")            # no HOME, no name
    weights = weight_files.WeightFile("x.pth", "http://127.0.0.1:9/x.pth")
    with pytest.raises(UserError, match="no home folder.*--weights-dir"):
        weight_files.find_weights(weights)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/x.pth").touch()
    assert weight_files.find_weights(weights, "w").name == "x.pth"
    assert os.listdir(tmp_path) == ["w"]


# ------------------------------------------------- streams -------------------------------------------------

class Broken:
    """A stream whose disk is full, without `reconfigure`, as in a notebook."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = lambda self: self.write("")
    isatty = lambda self: False


@pytest.mark.parametrize("stream", [Broken, lambda: None], ids=["full", "closed"])
def test_a_run_survives_its_log(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    processes.run(lambda: train(tmp_path))
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 10


@pytest.mark.slow
def test_a_script_survives_a_closed_stderr(tmp_path):
    """Nor does the next file that is opened get its number, and a library's messages in it."""
    command = [sys.executable, ROOT / "train_tokenizer.py", *TINY, "--stage", "1", "--out", tmp_path]
    done = subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL, preexec_fn=lambda: os.close(2),
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and checkpoints.load_checkpoint(tmp_path)["step"] == 6


# --------------------------------------- what a run says of itself ---------------------------------------

@pytest.mark.parametrize("options, out", [
    ((), "runs/tokenizer-shapes"), (("--preset", "cifar10,vae"), "runs/tokenizer-cifar10-vae"),
    (("--data", "holiday/photos"), "runs/tokenizer-photos-shapes"),
    (("--data", "holiday/photos", "--preset", "photos"), "runs/tokenizer-photos"),
    (("--data", "birds.npz", "--preset", "photos"), "runs/tokenizer-birds-photos"),
    (("--data", "cifar10"), "runs/tokenizer-cifar10-shapes"),
    (("--data", "birds.npz", "--out", "here"), "here")])
def test_a_runs_folder_is_named_after_data_and_preset(options, out, capsys):
    config = common.parse_config(train_tokenizer.Config, train_tokenizer.SCALES | train_tokenizer.ABLATIONS,
                                 list(train_tokenizer.SCALES), "", list(options))
    assert config.out == out
    note = "note: --preset names no scale: it is shapes; for --data " + {
        "cifar10": "cifar10 there is cifar10\n"}.get(options[1:2] and options[1], "")
    printed = capsys.readouterr().out
    assert printed.startswith(note) if "--data" in options and "--preset" not in options else not printed


@pytest.mark.parametrize("options, out", [
    (("--tokenizer", "runs/tokenizer-shapes"), "runs/diffusion-shapes"),
    (("--tokenizer", "runs/tokenizer-cifar10-vae", "--preset", "cifar10"), "runs/diffusion-cifar10-vae"),
    (("--tokenizer", "runs/tokenizer-cifar10/", "--preset", "cifar10"), "runs/diffusion-cifar10"),
    (("--tokenizer", "runs/tokenizer-birds-photos/last.pt", "--preset", "photos"),
     "runs/diffusion-birds-photos"),
    (("--tokenizer", "mine", "--preset", "sit-b", "--data", "new/birds"), "runs/diffusion-birds-mine-sit-b")])
def test_a_diffusion_runs_folder_is_named_after_its_tokenizer_too(options, out):
    """So the printed next commands of two tokenizers do not lead into one folder."""
    assert common.parse_config(train_diffusion.Config, train_diffusion.PRESETS, list(train_diffusion.PRESETS),
                               "", list(options)).out == out


def test_a_run_says_what_it_resumes_what_was_asked_for_and_what_comes_next(photos, tmp_path, capsys):
    out = tmp_path / "run"
    train(out, "--data", photos, "--steps", 3, "--stage2-steps", 0)
    printed = capsys.readouterr().out
    assert f"starting {out} at step 0 of 3: preset shapes" in printed and "steps = 3" in printed
    assert "disc_weight" not in printed    # what differs from the preset
    assert f"next: python train_diffusion.py --preset shapes --tokenizer {out}\n" in printed
    train(out, "--data", photos, "--steps", 3, "--stage2-steps", 0)
    printed = capsys.readouterr().out
    assert f"resuming {out} at step 3 of 3" in printed
    train_sit(tmp_path / "sit", out, "--steps", 2)
    assert f"next: python sample.py --ckpt {tmp_path / 'sit'} --cfg 2\n" in capsys.readouterr().out
    os.rename(tmp_path / "sit", tmp_path / "a b")
    checkpoints.end_run(SimpleNamespace(out=f"{tmp_path}/a b"), SimpleNamespace(rank=0), "sample.py --ckpt")
    assert f"next: python sample.py --ckpt '{tmp_path}/a b'\n" in capsys.readouterr().out
