"""What the scripts must do identically: configuration, random streams, processes, steps of a loop, EMA.

Helpers only: each is called by the scripts and none calls back. The training loops themselves stand in
the scripts; what is written to disk stands in checkpoints.py.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import inspect
import os
import re
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

# OpenMP threads wait for one another by spinning. Where another program has one of the cores, they spin away
# the time slices of the very thread they wait for: a small model then takes up to 50 times as long. This is
# read when torch loads OpenMP, so the scripts import this file before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

class UserError(ValueError):
    """An error that the user can fix. Shown as one line, exit status 2; the message says what
    is wrong and what to do."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP came. No Exception, so that nothing takes it for a broken file."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


_signals, _finish_steps = [], [False]


def _on_signal(number, frame):
    _signals.append(number)
    if not _finish_steps[0] or len(_signals) > 1:             # outside a training loop, or impatient: at once
        raise Stopped(number)


def stop_signal(world):
    """The number of a SIGTERM or SIGHUP that reached any process, else 0. Training loops ask once a step,
    finish the step, save and raise Stopped, so that a cluster that takes its machine back costs nothing."""
    _finish_steps[0] = True
    number = _signals[-1] if _signals else 0
    if world > 1:
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_cpu_group())
        number = int(flag)
    return number


@functools.cache
def _cpu_group():
    """Processes that exchange CPU tensors: NCCL knows none, and reading a GPU's would wait for it."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def _complain(text):
    """A line on stderr, below any progress bar and not glued to it."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(text, file=sys.stderr, flush=True)


def run(main):
    """Call main() as a script. A UserError becomes one line on stderr and exit status 2, as do a full disk
    and a full memory; Ctrl-C is status 130, SIGTERM 143, SIGHUP 129."""
    sys.stdout.reconfigure(errors="backslashreplace")                         # file names need not be UTF-8
    for name in ("SIGTERM", "SIGHUP"):
        if (hasattr(signal, name)
                and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN):                # as nohup sets
            signal.signal(getattr(signal, name), _on_signal)
    status = 0
    try:
        main()
    except (UserError, OSError) as e:             # OSError: a full disk, a file where a folder should be, ...
        _complain(f"error: {e}")
        status = 2
    except torch.OutOfMemoryError as e:
        _complain(f"error: the GPU's memory is full ({str(e).splitlines()[0]}); try --accumulate 2 or more "
                  "(more, smaller forward passes a step), --checkpointing, or a smaller --batch-size")
        status = 2
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to resume from the last checkpoint")
        status = 130
    except Stopped as e:
        _complain(f"stopped by {signal.Signals(e.number).name}; run the same command again to resume")
        status = 128 + e.number
    except (MemoryError, RuntimeError) as e:
        if _signals:                        # a loader's worker, say, had the signal too, and is missed
            _complain(f"stopped by {signal.Signals(_signals[-1]).name} before a step was finished; run the "
                      "same command again to resume from the last checkpoint")
            status = 128 + _signals[-1]
        elif isinstance(e, MemoryError) or re.search(
                "can't allocate memory|Storage size calculation", str(e)):
            first = (str(e).splitlines() or ["MemoryError"])[0]
            _complain(f"error: not enough memory for these sizes ({first[:200]})")
            status = 2
        else:
            raise
    if dist.is_initialized() and status == 0:
        dist.destroy_process_group()     # after an error the other ranks may be stuck; torchrun ends them
    sys.stdout.flush()
    if status:
        os._exit(status) if dist.is_initialized() else sys.exit(status)


# ------------------------------------------------- layers -------------------------------------------------

def _amd_processor():
    """True on an AMD processor whose float32 matrix products PyTorch leaves to Intel's MKL."""
    cpuinfo = Path("/proc/cpuinfo")
    return (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
            and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text())


AMD_PROCESSOR = _amd_processor()


class Linear(nn.Linear):
    """nn.Linear; on AMD processors a large float32 one of (B, T, D) is a 1 x 1 convolution:
    it is faster. [ours]

    PyTorch gives matrix products on x86 to MKL, which keeps to half-wide vectors on AMD; convolutions go to
    oneDNN, which does not. The sum is the same, and a contiguous (B, T, D) is in memory a channels-last
    picture of 1 x T pixels. Up to twice the speed: docs/speed.md.
    """

    def forward(self, x):
        # Below 512 x 512 weights MKL is the faster one: by 8 % of the demo's training step.
        if not (AMD_PROCESSOR and self.weight.numel() >= 2 ** 18 and x.is_cpu and x.ndim == 3
                and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        picture = x.transpose(1, 2).unsqueeze(2)                                                # (B, D, 1, T)
        return F.conv2d(picture, self.weight[:, :, None, None], self.bias).squeeze(2).transpose(1, 2)


# ---------------------------------------------- configuration ----------------------------------------------

class Number:
    """A kind of number, the type of a config's field or of an option: its range stands where it is declared.
    Called with text it converts, as argparse wants it."""

    def __init__(self, kind, low, high, low_open=False, high_open=False):
        self.kind, self.low, self.high, self.low_open, self.high_open = kind, low, high, low_open, high_open

    def __str__(self):
        what = "a whole number" if self.kind is int else "a number"
        return (f"{what} {'above' if self.low_open else 'from'} {self.low:,} "
                f"{'and below' if self.high_open else 'to'} {self.high:,}")

    def allows(self, value):
        """Whether value is such a number; NaN is none."""
        kinds = (int, np.integer) if self.kind is int else (int, float, np.number)
        return (isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
                and not (self.low_open and value == self.low) and not (self.high_open and value == self.high))

    def __call__(self, text):
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not self.allows(value):
            raise argparse.ArgumentTypeError(f"must be {self}, not {text[:40]!r}")
        return value


Count, Whole = Number(int, 1, 10 ** 9), Number(int, 0, 10 ** 9)         # 0: none, all or automatic
Seed, Workers = Number(int, 0, 2 ** 63 - 1), Number(int, -1, 1000)
Keep = Number(int, 2, 10 ** 9)             # the spare is what a damaged checkpoint falls back to
Share, Decay = Number(float, 0, 1), Number(float, 0, 1, high_open=True)
Positive, Weight = Number(float, 0, 10 ** 6, low_open=True), Number(float, 0, 10 ** 6)


def check_ranges(config):
    """Hold every numeric field of a config dataclass against its type. Raises UserError."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(field.type, Number) and not field.type.allows(value):
            raise UserError(f"--{field.name.replace('_', '-')} must be {field.type}, not {str(value)[:40]}")


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, exit status 2."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class OneLineHelp(argparse.RawDescriptionHelpFormatter):
    """Help of one line per option, however narrow argparse takes the terminal to be."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=160)


def _comments(config_class):
    """Read groups and help texts off a config dataclass's own source: {field: (group, help)}.

    A line `# ---- title ----` opens a group; the comment beside a field is its help, so that what a reader
    sees and what --help prints cannot drift apart. Reasons stand above the field and are not printed.
    """
    found = {}
    for cls in reversed(config_class.__mro__[:-1]):
        group = "options"
        for line in inspect.getsource(cls).splitlines():
            if title := re.match(r"    # ---- (.*?) -+$", line):
                group = title[1]
            elif entry := re.match(r"    (\w+): [^=]+=.*?(?:  # (.*))?$", line):
                found[entry[1]] = (group, entry[2] or "")
    return found


def parse_config(config_class, presets, base, description, argv=None, hidden=(), shown=None):
    """Build a config from the command line. Precedence: the class's defaults < presets < options.

    presets: name -> {field: value}; `--preset a,b` applies them left to right. When the first
    one named is not in `base` (the presets that fix a scale; the first of them is the default),
    that default comes before it.
    hidden: fields that get no option because the script sets them, as are those that are no Number, str or
    bool. shown: fields that --help lists (None: all); --help-all lists the others too. A field without a
    comment is a ValueError.
    Raises UserError for unknown options, presets and values.
    """
    description += (f"\nDefaults below are the paper's or those of the source named with them; "
                    f"`--preset` (default {base[0]}) changes many at once.\nScales: {', '.join(base)}.\n"
                    f"Variants to join to a scale: "
                    f"{', '.join(name for name in presets if name not in base)}.")
    parser = OneLineParser(description=description,
                           usage="%(prog)s [--preset NAME[,NAME...]] [--OPTION VALUE ...]",
                           allow_abbrev=False, argument_default=argparse.SUPPRESS,
                           formatter_class=OneLineHelp)
    everything = shown is None or "--help-all" in (sys.argv if argv is None else argv)
    parser.add_argument("--help-all", action="help",
                        help="list every option, those of a preset or a test too")
    groups = {}
    comments = _comments(config_class)
    for field in dataclasses.fields(config_class):
        number = isinstance(field.type, Number)
        if not number and field.type not in (str, bool) or field.name in hidden:
            continue
        title, text = comments[field.name]
        if not text:
            raise ValueError(f"{config_class.__name__}.{field.name} has no comment to be its help")
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else \
               {"type": field.type, "metavar": (field.type.kind if number else field.type).__name__.upper()}
        default = f"default {field.default!r}" if field.default != "" else ""
        if (small := presets[base[0]].get(field.name, field.default)) != field.default:
            default += f"{'; ' if default else ''}{base[0]}: {small!r}"
        text = (f"{text} ({default})" if default else text).replace("%", "%%")
        group.add_argument("--" + field.name.replace("_", "-"), **kind,
                           help=text if everything or field.name in shown else argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    if not given.get("out", "default").strip():
        raise UserError("--out is empty: name a folder, or leave the option out")
    names = [name.strip() for name in given.get("preset", base[0]).split(",")]
    if unknown := [name for name in names if name not in presets]:
        raise UserError(f"unknown preset {', '.join(unknown)}; there are: {', '.join(presets)}")
    if names[0] not in base:
        names.insert(0, base[0])
    if second := [name for name in names[1:] if name in base]:
        raise UserError(f"preset {second[0]} fixes the scale of a run: "
                        "it stands first, and alone of its kind")
    values = {}
    for name in names:
        values |= presets[name]
    try:
        return config_class(**(values | given | {"preset": ",".join(names)}))
    except UserError:
        raise
    except ValueError as e:
        raise UserError(str(e)) from e


# ---------------------------------------------- random streams ----------------------------------------------

def sample_rng(seed, stream, major, minor):
    """A numpy Generator for one purpose and one sample:
    a function of (seed, stream, major, minor) and nothing else.

    Philox is counter-based: the seed and the stream's name make the key, major and minor (step and
    position, or epoch and index) the upper words of the counter, so no two streams overlap and
    starting one costs microseconds.
    """
    # Arrays of the right type: numpy takes twice as long to start a stream from lists.
    key = np.array((seed, zlib.crc32(stream.encode())), np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array((0, 0, minor, major), np.uint64)))


def step_rngs(config, name, step, positions):
    """One generator for each sample of a micro-batch, from (seed, step, global sample index)."""
    return [sample_rng(config.seed, name, step, int(i)) for i in positions]


# ------------------------------------------------ processes ------------------------------------------------

class Processes(NamedTuple):
    """Which of how many processes this is, and its device."""
    rank: int
    world: int
    device: torch.device


def start_processes(device="auto"):
    """Join torchrun's process group if there is one. Returns Processes.

    device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda", "mps". nccl on CUDA, gloo elsewhere.
    Raises UserError when a device is asked for that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA GPU; "
                        "use --device cpu or install a CUDA build of torch")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or mps")
    rank, world, local = (int(os.environ.get(k, d))
                          for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: "
                            f"torchrun --nproc-per-node is larger than the {torch.cuda.device_count()} GPUs "
                            "here")
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True   # float32 products outside autocast at 10 mantissa bits
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    if "RANK" in os.environ and not dist.is_initialized():
        # The others wait while rank 0 downloads weights or evaluates,
        # at times for more than the usual 10 min.
        # device_id: NCCL then need not guess which GPU is this process's at its first collective.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=4),
                                device_id=torch.device("cuda", local) if device == "cuda" else None)
    return Processes(rank, world, torch.device(device, local) if device == "cuda" else torch.device(device))


def _follow(launcher):
    """End this process when torchrun, its parent, is killed: else it would train on,
    unseen, in a locked folder."""
    while os.getppid() == launcher:
        time.sleep(1)
    _complain("error: torchrun is gone; this process ends too")
    os._exit(2)


@contextlib.contextmanager
def rank_zero_first(rank, world):
    """What stands in this block rank 0 does first, then one process of every other node, then the rest: a
    download happens once where the cache is shared, and once a node where it is not."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    turn = 0 if rank == 0 else 1 if local == 0 else 2
    if world > 1:
        for _ in range(turn):
            dist.barrier()
    yield
    if world > 1:
        for _ in range(2 - turn):
            dist.barrier()


def all_mean(values):
    """Mean over processes of a float tensor, in place. No gradient passes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def to_device(tensor, device):
    """A CPU tensor on `device`. On CUDA by way of pinned memory, or the host would wait until the GPU has
    done all it was given before, and the GPU then for the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast_dtype(name, device):
    """--dtype to a torch dtype. auto: bfloat16 on CUDA GPUs that have it, else float32."""
    if name == "auto":
        # Without emulation: a V100 or T4 computes in bfloat16 too, many times slower than in float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {name}: choose auto, float32 or bfloat16")
    return getattr(torch, name)


def cast_matrices(model, dtype):
    """Linear and convolution weights of a frozen model to `dtype`, in place; norms, embeddings and tables
    keep theirs. Returns the model.

    Autocast casts a weight anew in every call when it needs no gradient: its cache is for weights that do.
    Called under autocast the model computes the very same numbers as before, without those casts.
    """
    if dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                module.to(dtype)
    return model


# ---------------------------------------- steps of a training loop ----------------------------------------

def batch_loader(dataset, batches, workers, device, collate):
    """An iterator over a data set's batches. Raises the UserError that an item is in place of an image.
    workers: -1 for 8 on CUDA and none elsewhere."""
    workers = (8 if device.type == "cuda" else 0) if workers < 0 else workers
    for batch in torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                             collate_fn=collate, pin_memory=device.type == "cuda"):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def set_learning_rate(optimizer, lr):
    """Returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(optimizer, clip):
    """One step with gradients cut to the norm `clip`, which are then let go. Returns their norm before."""
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups
                                           for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Clock:
    """Samples per second since it was last asked."""

    def __init__(self, step):
        self.step, self.time = step, time.perf_counter()

    def rate(self, step, batch_size):
        steps, seconds = step - self.step, time.perf_counter() - self.time
        self.step, self.time = step, time.perf_counter()
        return steps * batch_size / seconds


class Averages:
    """Means of what a step logs, over forward passes and processes, until they are read. The host waits
    for the GPU only then."""

    def __init__(self, device):
        self.terms, self.finite = {}, torch.ones((), device=device)

    def add(self, terms):
        """terms: {name: scalar tensor} of one forward pass."""
        for name, term in terms.items():
            self.terms.setdefault(name, []).append(term.detach())

    def check_finite(self, *values):
        """Remember whether these scalars were ever not finite."""
        self.finite *= sum(value.detach() for value in values).isfinite()

    def read(self, step, config):
        """{name: mean} since the last reading. Raises UserError if a value to be checked was not finite."""
        means = [torch.stack(values).mean() for values in self.terms.values()]
        *means, finite = all_mean(torch.stack([*means, self.finite])).tolist()
        if finite < 1:
            raise UserError(f"the loss or its gradient is not finite at step {step} or up to "
                            f"{config.log_every} before; the checkpoints in {config.out} are from before "
                            "that. Try --dtype float32, or in another --out a lower --lr or a "
                            "longer --warmup")
        result, self.terms = dict(zip(self.terms, means)), {}
        return result


# ----------------------------------------- activation checkpointing -----------------------------------------

def recompute(function, *inputs):
    """function(*inputs) under activation checkpointing: of all that it computes only the inputs are kept, and
    the backward pass calls it a second time. It may have no side effects and draw no random numbers.
    """
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)                       # a frozen network, say; torch.compile fails on these


def recompute_blocks(network, kinds):
    """Put every module of `network` that is of one of these classes under activation checkpointing."""
    for module in network.modules():
        if isinstance(module, kinds):
            # a partial, not a closure: in a deep copy, as EMA makes one, it belongs to the copy
            module.forward = functools.partial(recompute, module.forward)


# ------------------------------------------------ EMA ------------------------------------------------

class EMA:
    """Exponential moving average of a model's weights: ema += (1 - decay) * (weights - ema), buffers copied.

    With `warmup` the decay grows as min(decay, (1 + n) / (10 + n)) with n updates made: 0.9999 would remember
    a random start for tens of thousands of steps. By step 90,000 the two are the same. [ours; SiT and the
    released code have no warm-up and start the average at the weights]
    place: "auto", beside the model, or "cpu", which from the start of training on saves a GPU one copy of the
    weights and costs their way to the host in every step.
    """

    def __init__(self, model, decay, place="auto", warmup=True):
        if place not in ("auto", "cpu"):
            raise UserError(f"--ema-device {place}: choose auto or cpu")
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0
        self.warmup = warmup
        if place == "cpu":
            self.model.cpu()

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        averages = list(self.model.parameters())
        weights = [w.detach().to(a.device) for a, w in zip(averages, model.parameters(), strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)         # few kernels, not one for each tensor
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def on(self, device):
        """The averaged model on `device`, to be used at once: itself, or a copy if it is kept elsewhere."""
        here = next(self.model.parameters()).device.type == device.type
        return self.model if here else copy.deepcopy(self.model).to(device)


def fingerprint(model):
    """A hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
