"""What the scripts write to disk, and how they read it again: files, locks, checkpoints, logs.

A file appears under its name only when it is whole (`atomic_write`), a run's folder belongs to one
process (`lock`), and what comes back is checked before it is used: checksums, keys, finite weights.
Whatever is wrong is a UserError that says what to do.
"""
import dataclasses
import glob
import json
import math
import os
import shutil
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import UserError

try:
    import fcntl
except ImportError:                                                                # Windows has no such locks
    fcntl = None


# ------------------------------------------------- files -------------------------------------------------

def atomic_write(path, write):
    """Call write(temporary path), then rename it to `path`: a reader or a crash never meets half a file."""
    path = Path(path)
    if not path.name:
        raise UserError(f"{str(path)!r} is no name for a file")
    for debris in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not _alive(debris.name.split(".")[-2]):
            debris.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, RuntimeError) as e:             # torch.save says RuntimeError when the disk is full
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; is the disk full?") from e
    finally:
        temporary.unlink(missing_ok=True)


def _alive(pid):
    """Whether a process of this machine has this number (a string); of another machine's nothing is known."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def _to_disk(path):
    """Wait until a file or folder is on disk: fsync also tells what errors the file system kept to itself."""
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_npy(path, array):
    """numpy.save under exactly this name (numpy would append .npy to a temporary one), and behind the data,
    where numpy does not look, their CRC-32.

    numpy writes a permuted view through a buffer of C's whose last error, a full disk say, it does not
    notice; a contiguous array is written in one piece.
    """
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.save(file, array)
        file.write(b"crc32" + struct.pack("<I", zlib.crc32(array)))
    if os.path.getsize(path) < array.nbytes:
        raise OSError(f"{os.path.getsize(path)} bytes of more than {array.nbytes} arrived")


def load_npy(path):
    """A file of save_npy as a read-only memory map, or None if there is none or it is not what was saved."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            return array if file.read() == b"crc32" + struct.pack("<I", zlib.crc32(array)) else None
    except Exception:                               # numpy has many for a file that is none of its own
        return None


def write_json(path, value):
    """Anything that JSON can hold, by way of atomic_write."""
    atomic_write(path, lambda p: p.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def write_png(path, picture):
    """A PIL image, by way of atomic_write."""
    atomic_write(path, lambda p: picture.save(p, "PNG"))


def read_json(path):
    """The dict in a JSON file. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}); delete it") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no object); delete it")
    return found


_locks = {}


def lock(folder):
    """Hold a folder for this process until it ends, however it ends.
    Raises UserError if another process does.

    A POSIX record lock: on NFS too, and not handed on to a loader's workers. Where the file system has none,
    a line says that nobody watches.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or folder.resolve() in _locks:
        return
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{holder} is at work in {folder}; wait for it, stop it, or "
                        "choose another --out") from e
    except OSError as e:
        print(f"note: no locks in {folder} ({e.strerror}): two runs in it would destroy each other",
              file=sys.stderr)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder.resolve()] = file


def unlock(folder):
    """Let go of a folder that is to be deleted, and delete the lock's file."""
    (Path(folder) / ".lock").unlink(missing_ok=True)
    if file := _locks.pop(Path(folder).resolve(), None):
        file.close()


def remove_debris(folder):
    """Delete what killed processes left half written in a run's folder: atomic_write's temporary files.
    Only for the one process that is at work in the folder, before it starts."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# ----------------------------------------------- checkpoints -----------------------------------------------

# A small tokenizer and its SiT, trained on the shapes (`make box`): what sample.py draws from by default.
BOX = Path(__file__).parent / "assets" / "shapes.pt"


def numbered_checkpoints(out):
    """The step_*.pt files of a run, newest step first (by number: the largest file may be a broken one)."""
    files = [path for path in Path(out).glob("step_*.pt") if path.stem[5:].isdigit()]
    return sorted(files, key=lambda path: int(path.stem[5:]), reverse=True)


def checkpoint_budget(model, save_every, steps, keep, keep_every):
    """A line that says how much disk a run's checkpoints take: weights, EMA and AdamW's two moments each."""
    gigabytes = 4 * sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    every = math.lcm(save_every, keep_every) if keep_every else 0
    milestones = steps // every if every else 0
    return (f"checkpoints: about {gigabytes:.2g} GB each, every {save_every} steps; the newest {keep} stay"
            + (f" and {milestones} milestones, one in {every} steps" if milestones else "")
            + f": up to {gigabytes * (keep + milestones):.3g} GB in all")


def save_checkpoint(out, state, keep, keep_every=0):
    """Write `state` (tensors and plain Python values, with an int "step") to
    out/step_NNNNNNN.pt and out/last.pt.

    Both names are one file on disk (a hard link; a copy where the file system has none). The newest `keep`
    numbered files stay, and as milestones those whose step is a multiple of `keep_every` (0: none).
    Whenever a crash comes, the last whole checkpoint is there under one of the names. Weights that are not
    finite are not saved: UserError.
    """
    out = Path(out)
    if not all_finite(t for part in ("model", "ema", "adversary") for t in state.get(part, {}).values()):
        raise UserError(f"the weights are not finite at step {state['step']}; this checkpoint is not "
                        f"written, those in {out} are from before. Try a lower --lr or a longer --warmup "
                        "in another --out")
    numbered = out / f"step_{state['step']:07d}.pt"
    atomic_write(numbered, lambda path: torch.save(state, path))
    link_last(numbered)
    for path in numbered_checkpoints(out)[keep:]:
        if not keep_every or int(path.stem[5:]) % keep_every:
            path.unlink()


def link_last(numbered):
    """Make last.pt beside a numbered checkpoint another name of it."""
    def link(path):
        try:
            os.link(numbered, path)
        except OSError:
            shutil.copyfile(numbered, path)

    atomic_write(numbered.with_name("last.pt"), link)


def all_finite(tensors):
    """Whether no tensor of floating point holds NaN or infinity: one number read back,
    however many they are."""
    flags = [t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


class Checkpoint(dict):
    """What a checkpoint holds. A key that it lacks is a UserError."""

    def __init__(self, state, path):
        super().__init__(state)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} has no {key!r}: it is damaged or of another version")


def load_checkpoint(path):
    """Read one checkpoint (a file, or a run folder's last.pt) to the CPU, as a Checkpoint.
    Raises UserError if it is not a whole one: torch.load alone does not look at the checksums in the file."""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"wrong checksum of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise UserError(f"{path} is no checkpoint of this project: it has no 'config'")
        return Checkpoint(state, path)
    except UserError:
        raise
    # torch.load raises RuntimeError, EOFError, UnpicklingError, ... by where it was cut
    except Exception as e:
        raise UserError(f"{path} is damaged or no checkpoint ({type(e).__name__}); use another one") from e


def find_checkpoint(out, rank=0):
    """The newest whole checkpoint of a run, or None if it has none yet. A damaged one is passed over with a
    warning, and if last.pt is it or is missing, rank 0 makes it anew."""
    candidates = [p for p in (Path(out) / "last.pt", *numbered_checkpoints(out)) if p.exists()]
    for path in candidates:
        try:
            state = load_checkpoint(path)
        except UserError as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr, flush=True)
            continue
        if path.name != "last.pt" and rank == 0:
            link_last(path)
        return state
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {out} can be read; "
                        "delete them to start anew")
    return None


def load_weights(model, state, path):
    """load_state_dict with one clear line for weights of another model, or not finite. Raises UserError."""
    if isinstance(state, dict) and not all_finite(state.values()):
        raise UserError(f"{path} holds weights that are NaN or infinite: that training failed; take an "
                        "earlier one")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        first = str(e).splitlines()[1].strip() if len(str(e).splitlines()) > 1 else str(e)
        raise UserError(f"{path} holds weights of another model: {first}") from e


def load_optimizer(optimizer, state, path):
    """The same for an optimizer's state. Raises UserError."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} holds an optimizer's state of another model, or a damaged one: {e}") from e


def check_same_config(saved, config, free, path):
    """Refuse to resume a run under another configuration; fields in `free` may change.
    Raises UserError."""
    now = dataclasses.asdict(config)
    # A field younger than the checkpoint: its default is what was done before there was a choice.
    saved = {f.name: f.default for f in dataclasses.fields(config)
             if f.default is not dataclasses.MISSING} | saved
    changed = [f"{k} {saved.get(k)!r} -> {now.get(k)!r}" for k in sorted(now | saved)
               if k not in free and saved.get(k) != now.get(k)]
    if changed:
        raise UserError(f"the checkpoint in {path} is of another run ({'; '.join(changed[:6])}"
                        f"{'; ...' if len(changed) > 6 else ''}); choose another --out or the same options")


def check_same_step(step, out, rank, world, device):
    """Refuse to train when processes resumed at different steps, or when not all see what rank 0 writes:
    nodes without a shared folder. Raises UserError on every rank."""
    if world > 1:
        # A name that nobody has used: a fresh folder of the same name may be there on each node.
        mark = [f".shared-{os.urandom(8).hex()}.tmp"]            # debris, should this process be killed
        dist.broadcast_object_list(mark)
        if rank == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / mark[0]).touch()
        dist.barrier()
        seen = torch.tensor(float((Path(out) / mark[0]).exists()), device=device)
        dist.all_reduce(seen, dist.ReduceOp.MIN)
        if rank == 0:
            (Path(out) / mark[0]).unlink()
        if seen < 1:
            raise UserError(f"not all processes see {out}: it must be one folder that all nodes share")
        steps = torch.tensor([step, -step], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise UserError(f"the processes found different checkpoints: "
                            f"{out} must be one folder that all nodes share")


# ------------------------------------------------ logs ------------------------------------------------

def append_metrics(out, record):
    """Add one JSON line to out/metrics.jsonl."""
    with open(Path(out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(out):
    """The records of out/metrics.jsonl. A last line that a crash cut short is dropped; any other that is no
    record is passed over, with a warning."""
    path, records = Path(out) / "metrics.jsonl", []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                print(f"warning: {path}, line {number} is no record; passed over", file=sys.stderr)
    return records


def start_run(config, step, measured=True):
    """What rank 0 does in a run's folder before it trains from `step` on. measured: the checkpoint holds what
    an end-of-stage record of that step tells; else that record will be written again, and goes."""
    out = Path(config.out)
    remove_debris(out)
    write_json(out / "config.json", dataclasses.asdict(config))
    cut_metrics(out, step, measured)
    print("\n".join(f"{k} = {v!r}" for k, v in dataclasses.asdict(config).items()))


def cut_metrics(out, step, measured=True):
    """Drop the records after `step`: a resumed run will write them again."""
    records = [r for r in read_metrics(out)
               if r["step"] < step or r["step"] == step and (measured or "event" not in r)]
    atomic_write(Path(out) / "metrics.jsonl",
                 lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in records)))
