"""Processes, devices and signals: what keeps a run alive under torchrun, on a cluster and on a full disk.

A reader of the paper need not open this file. The training loops are in train_tokenizer.py and
train_diffusion.py; this file starts their processes (`run`, `start_processes`) and stops them without loss.
"""
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from runtime.packages import end_script, missing

if missing():
    end_script()

# OpenMP threads spin while they wait. Where another program has one of the cores, they take the time of the
# thread they wait for, and a small model takes up to 50 times as long. torch reads this when it is imported,
# so the scripts import this file (or common.py, which does) before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


def printable(text):
    """Text with control characters, line breaks and bytes that are not UTF-8 escaped: a file's name may hold
    them, and must not move the terminal's cursor or look like a line of ours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class UserError(ValueError):
    """An error that the user can fix: one line, exit status 2. The message says what is wrong and what to do.
    """

    def __init__(self, message):
        super().__init__(printable(message))


# ---------------------------------------------- start and end ----------------------------------------------

class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived. A BaseException, so that `except Exception` does not swallow it."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


_signals, _finish_steps = [], [False]
STOPPING = [number for name in ("SIGTERM", "SIGHUP")                          # Windows has no SIGHUP
            if (number := getattr(signal, name, None))]


def _on_signal(number, frame):
    _signals.append(number)
    if not _finish_steps[0] or len(_signals) > 1:     # outside a training loop, or the second signal: at once
        raise Stopped(number)


def signalled():
    """The number of the last SIGTERM or SIGHUP that reached this process, else 0."""
    return _signals[-1] if _signals else 0


class StopFlag:
    """Whether a SIGTERM or SIGHUP reached any process of a training loop, which asks once per step, finishes
    the step, saves and raises Stopped: a cluster that takes its machine back costs no work.

    The processes exchange the flag on the device that they train on, and read what they sent in the step
    before: all read the same, and the host never waits for the GPU to run dry.
    """

    def __init__(self, processes):
        _finish_steps[0] = True
        self.world, self.device, self.sent = processes.world, processes.device, None

    def read(self, now):
        """The signal's number or 0, the same in every process. now: this step's too; the host then waits."""
        if self.world == 1:
            return signalled()
        sent, self.sent = [self.sent, self._send()], None
        if not now:
            self.sent = sent.pop()
        found = 0
        for wait, flag in filter(None, sent):
            wait()
            found = max(found, int(flag))
        return found

    def _send(self):
        """Returns (a function that waits for the exchange, the CPU tensor that then holds its result)."""
        flag = torch.full((1,), signalled(), dtype=torch.int32, device=self.device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if self.device.type != "cuda":
            return work.wait, flag
        work.wait()                                                  # NCCL: the GPU waits, the host does not
        host = torch.zeros(1, dtype=torch.int32).pin_memory()
        host.copy_(flag, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return copied.synchronize, host

    def close(self):
        """The loop is over and saved: a signal stops the process at once. Raises Stopped."""
        _finish_steps[0] = False
        if signalled():
            raise Stopped(signalled())


def _complain(text):
    """A line on stderr, below any progress bar."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(printable(text), file=sys.stderr, flush=True)


class _Steady:
    """stdout or stderr. When the terminal is closed, the pipe is cut or the log's disk is full, what is
    written is lost, and the run continues."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):                              # ValueError: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def _steady_streams():
    """Make stdout and stderr ones that cannot fail."""
    # Where the numbers 0, 1, 2 are free, as after `2>&-`, the next file that is opened would get them, and a
    # library's messages be written into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Steady):
            continue
        if stream is None:
            stream = open(os.devnull, "w")
        elif hasattr(stream, "reconfigure"):                                         # a notebook's has none
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")                 # file names need not be UTF-8
        setattr(sys, name, _Steady(stream))


def run(main):
    """Call main() as a script. A UserError becomes one line on stderr and exit status 2, as do a full disk
    and a full memory; Ctrl-C is status 130, SIGTERM 143, SIGHUP 129."""
    _steady_streams()
    others = multiprocessing.active_children()                                       # a notebook's, say
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:                        # nohup ignores SIGHUP
            signal.signal(number, _on_signal)
    status = 0
    try:
        main()
    except (UserError, OSError) as e:             # OSError: a full disk, a file where a folder should be, ...
        _complain(f"error: {e}")
        status = 2
    except torch.OutOfMemoryError as e:
        _complain(f"error: the GPU's memory is full ({str(e).splitlines()[0]}); try a smaller --batch-size, "
                  "in training in another --out; or there --checkpointing, or --accumulate 2 or more (more, "
                  "smaller forward passes per step; a GAN's run takes another number until --disc-start)")
        status = 2
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to resume from the last checkpoint")
        status = 130
    except Stopped as e:
        _complain(f"stopped by {signal.Signals(e.number).name}; run the same command again to resume")
        status = 128 + e.number
    except (MemoryError, RuntimeError) as e:
        if signalled():                  # another process got the signal too, and its absence is the error
            _complain(f"stopped by {signal.Signals(signalled()).name} before a step was finished; run the "
                      "same command again to resume from the last checkpoint")
            status = 128 + signalled()
        elif isinstance(e, MemoryError) or re.search(
                "can't allocate memory|Storage size calculation", str(e)):
            first = (str(e).splitlines() or ["MemoryError"])[0]
            _complain(f"error: not enough memory for these sizes ({first[:200]})")
            status = 2
        elif "DataLoader worker" in str(e):        # PyTorch's handler of SIGCHLD raises it, wherever that is
            _complain(f"error: a loader process failed ({str(e).strip()[:200]}): there may be too little "
                      "memory; give fewer --workers, 0 for none")
            status = 2
        else:
            raise
    if dist.is_initialized() and status == 0:
        _leave()
        dist.destroy_process_group()     # after an error the other ranks may be stuck; torchrun ends them
    for child in multiprocessing.active_children():
        if child not in others:                                       # a loader's worker: it ignores SIGTERM
            child.kill()
    sys.stdout.flush()
    if status:
        os._exit(status) if dist.is_initialized() else sys.exit(status)


# ------------------------------------------------ processes ------------------------------------------------

class Processes(NamedTuple):
    """Which process this is, of how many, and its device."""
    rank: int
    world: int
    device: torch.device


def start_processes(device="auto"):
    """Join torchrun's process group if there is one. Returns Processes.

    device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda", "mps". nccl on CUDA, gloo elsewhere.
    Raises UserError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and (reason := _unusable_gpu()):
            raise UserError(f"this machine has a GPU that torch {torch.__version__} cannot use ({reason}): "
                            "install a build of torch for its driver (docs/running.md), or give --device cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA GPU; "
                        "use --device cpu or install a CUDA build of torch")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or mps")
    rank, world, local = _place()
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: "
                            f"torchrun --nproc-per-node is larger than the {torch.cuda.device_count()} GPUs "
                            "here")
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True   # float32 products outside autocast: 10 mantissa bits
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    here = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        _join(rank, world, here)
    return Processes(rank, world, here)


def _unusable_gpu():
    """Why torch cannot use an NVIDIA GPU that is there; "" if none is there, or it is hidden on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not list(Path("/dev").glob(GPUS)):
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:                        # an old driver; a build without CUDA
        return str(e).splitlines()[0].rstrip(".")
    return "it sees none"


GPUS = "nvidia[0-9]*"                                                   # their files in /dev


def _place():
    """(rank, world, rank on this machine), from torchrun's environment. Raises UserError for half of one."""
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} & set(os.environ):
        if absent := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                      if name not in os.environ]:
            raise UserError(f"RANK or WORLD_SIZE is set, but not {', '.join(absent)}: start several "
                            "processes by torchrun, and one with both of them unset")
    try:
        return [int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    except ValueError as e:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, as torchrun sets them: "
                        f"{e}") from e


_store, _meetings = [], itertools.count()                                # the store of the process group


def _join(rank, world, device):
    """Join the process group, whose collectives wait 10 minutes (30 under gloo) for each other."""
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world))
        # device_id: NCCL then need not guess which GPU belongs to this process.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, device_id=device if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as e:
        variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
        raise UserError(f"the processes cannot reach each other ({str(e).splitlines()[0][:200]}); where a "
                        f"machine's name means 127.0.0.1 to it, set {variable} to its network interface, one "
                        "that `ip addr` lists") from e
    _store[:] = [store]


def first_process():
    """Whether this is rank 0, or the only process; known before start_processes."""
    return os.environ.get("RANK", "0") == "0"


def barrier():
    """Wait until every process is here, at most four hours. Not a collective, which would give up after
    minutes: the others wait while rank 0 downloads, lists images, measures or writes."""
    if _store:
        _meet(f"meeting {next(_meetings)}", dist.get_world_size(), 4 * 3600)


def _meet(name, count, seconds):
    """Wait until `count` processes have said `name` to the store."""
    end, pause = time.monotonic() + seconds, 0.001
    arrived = _store[0].add(name, 1)
    while arrived < count:
        if time.monotonic() > end:
            raise UserError(f"after {seconds:g} s only {arrived} of {count} processes are here; the others "
                            "hang or have ended")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        arrived = _store[0].add(name, 0)


def _leave():
    """Rank 0, whose process may hold the store, is the last to go."""
    if _store:
        with contextlib.suppress(UserError, RuntimeError):
            _meet("end", dist.get_world_size() if dist.get_rank() == 0 else 0, 60)


def _follow(launcher):
    """End this process when torchrun, its parent, is killed. It would train on unseen, in a locked folder."""
    while os.getppid() == launcher:
        time.sleep(1)
    _complain("error: torchrun is gone; this process ends too")
    os._exit(2)


@contextlib.contextmanager
def rank_zero_first(rank):
    """Rank 0 runs the block first, then one process of every other node, then the rest: a download happens
    once, or once per node where the cache is not shared."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    turn = 0 if rank == 0 else 1 if local == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


def all_mean(values):
    """Mean over processes of a float tensor, in place. No gradient passes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def data_parallel(module, processes):
    """`module` under DistributedDataParallel, or itself where there is one process (or no module). Buffers
    are not sent: those of all models here are the same everywhere."""
    if processes.world == 1 or module is None:
        return module
    # gradient_as_bucket_view: gradients live in the buckets that are sent, not in a copy beside them.
    return DistributedDataParallel(
        module, gradient_as_bucket_view=True, forward_sync_buffers=False,
        device_ids=[processes.device.index] if processes.device.type == "cuda" else None)


@contextlib.contextmanager
def exchange_gradients(now, *wrapped):
    """Forward and backward passes of data_parallel's modules in this block. Unless `now`, their gradients
    stay in the process: with accumulation only the last pass of a step exchanges them."""
    with contextlib.ExitStack() as stack:
        for module in wrapped:
            if isinstance(module, DistributedDataParallel) and not now:
                stack.enter_context(module.no_sync())
        yield


# ------------------------------------------------- devices -------------------------------------------------

def to_device(tensor, device):
    """A CPU tensor on `device`. On CUDA through pinned memory: else the host would wait until the GPU has
    done all its work, and the GPU then for the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# Matrix units (AMX) or AVX-512's instructions for bfloat16. In narrower models casts cost what the products
# gain (docs/speed.md).
NATIVE_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
BFLOAT16_WIDTH = 96


def autocast_dtype(name, device, width=0):
    """--dtype to a torch dtype. auto: bfloat16 on GPUs that have it, and on CPUs that have it for models at
    least BFLOAT16_WIDTH wide; else float32."""
    if name == "auto":
        # Without emulation: a V100 or T4 computes in bfloat16 too, many times slower than in float32.
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                  else device.type == "cpu" and NATIVE_BFLOAT16 and width >= BFLOAT16_WIDTH)
        return torch.bfloat16 if native else torch.float32
    if name not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {name}: choose auto, float32 or bfloat16")
    return getattr(torch, name)


def autocast(name, device, width=0):
    """A context in which the matrix products of a model of `width` run in --dtype `name`."""
    dtype = autocast_dtype(name, device, width)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def cast_matrices(model, dtype):
    """Linear and convolution weights of a frozen model to `dtype`, in place; norms, embeddings and tables
    keep theirs. Under autocast the result is the same, without a cast in every call. Returns the model."""
    if dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                module.to(dtype)
    return model


def _amd_processor():
    """True on an AMD processor whose float32 matrix products PyTorch leaves to Intel's MKL."""
    cpuinfo = Path("/proc/cpuinfo")
    return (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
            and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text())


AMD_PROCESSOR = _amd_processor()


def faster_products(model):
    """On AMD processors, let the large nn.Linear layers of `model` compute as 1 x 1 convolutions, in place:
    up to twice the speed (docs/speed.md). Elsewhere nothing changes. Returns the model. [ours]

    PyTorch gives matrix products on x86 to MKL, which keeps to half-wide vectors on AMD; convolutions go to
    oneDNN, which does not. Below 512 x 512 weights MKL is the faster one.
    """
    for module in model.modules() if AMD_PROCESSOR else ():
        if isinstance(module, nn.Linear) and module.weight.numel() >= 2 ** 18:
            module.forward = functools.partial(_as_convolution, module)
    return model


def _as_convolution(layer, x):
    """layer(x) of (B, T, D) in float32 on a CPU as a convolution; in any other case layer(x) as ever. The sum
    is the same: a contiguous (B, T, D) is in memory a channels-last picture of 1 x T pixels."""
    if not (x.is_cpu and x.ndim == 3 and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")):
        return F.linear(x, layer.weight, layer.bias)
    picture = x.transpose(1, 2).unsqueeze(2)                                                # (B, D, 1, T)
    return F.conv2d(picture, layer.weight[:, :, None, None], layer.bias).squeeze(2).transpose(1, 2)
