"""The memory that a training step takes on a GPU, without one: the table of docs/memory.md.

    python -m study.memory                  # print it, and write it into docs/memory.md; half an hour
    python -m study.memory --only sit-xl

The scripts' own training loops run two steps on fake tensors, which have shapes and dtypes but no values,
under CUDA's rules of autocast (tests/cuda_autocast.py), the GAN from the first step on. Counted is what
lives, rounded as PyTorch's allocator does: weights, gradients, AdamW's moments, EMA, activations. Not
counted: CUDA's own 1 to 4 GiB, gaps between blocks, workspaces of kernels.
"""
import argparse
import contextlib
import itertools
import re
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import common    # before torch, see runtime/processes.py

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoints
import train_diffusion
import train_tokenizer
from common import UserError
from frozen import pretrained
from runtime import processes
from runtime.processes import Processes, run
from tests.cuda_autocast import CudaAutocast, checkpoint
from tests.random_frozen import equal_heads

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BLOCK = 512                                         # bytes; the allocator rounds up to these


class Row(NamedTuple):
    """A run of the table: options of its script, images or latents per GPU."""
    script: object
    preset: str
    batch: int
    checkpointing: bool = False
    add: str = ""

    @property
    def name(self):
        return f"{self.preset}, {self.batch}" + ", checkpointing" * self.checkpointing


TOKENIZER, DIFFUSION = train_tokenizer, train_diffusion
KIND = {TOKENIZER: "tokenizer", DIFFUSION: "diffusion"}
# Two batches of each, the first that of the smallest GPU.
ROWS = [Row(script, preset, batch, again, add) for script, preset, batches, add in (
            (TOKENIZER, "imagenet64", (8, 256), ""), (TOKENIZER, "maetok-b-256", (8, 64), ""),
            (TOKENIZER, "maetok-b-512", (8, 32), ""), (DIFFUSION, "imagenet64", (8, 256), ""),
            (DIFFUSION, "sit-xl", (8, 256), ""), (DIFFUSION, "lightningdit-xl", (8, 256), "lightningdit"),
            (DIFFUSION, "usit-2b", (8, 256), "usit"))
        for again in (False, True) for batch in batches]
GPUS, SPARE = (24, 40, 80), 4                       # GiB; what the table's last columns leave free


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there: `now`, and `peak`."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = id(storage), -(-storage.nbytes() // BLOCK) * BLOCK

        def gone(reference):
            del self.storages[key]
            self.now -= size

        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)


class Data(NamedTuple):
    """In place of a data set, and of a loader that gives the same batch again and again."""
    batch: tuple
    length: int = 10 ** 6


class Log:
    """In place of checkpoints.Log: nothing is read, drawn or saved."""

    def __init__(self, *values, **options):
        pass

    def counted(self):
        return contextlib.nullcontext()

    def __getattr__(self, name):
        return lambda *values, **options: None


def to(module, *targets, **options):
    """In place of Module.to, which swaps tensors, and fake ones cannot be: only a dtype changes something."""
    dtype = next((target for target in targets if isinstance(target, torch.dtype)), None)
    for part in module.modules() if dtype else ():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(p.detach().to(dtype), p.requires_grad)
    return module


@contextlib.contextmanager
def replaced():
    """What a step must not do on fake tensors."""
    with contextlib.ExitStack() as stack:
        for target, name, value in (
                (torch, "autocast", CudaAutocast), (torch.nn.Module, "to", to), (checkpoints, "Log", Log),
                (common, "checkpoint", checkpoint), (torch.nn.init, "trunc_normal_", lambda t, **more: t),
                (common, "batch_loader", lambda dataset, *rest: itertools.repeat(dataset.batch)),
                (processes, "AMD_PROCESSOR", False), (pretrained, "find_weights", lambda *where: "random"),
                (pretrained, "load_frozen", lambda build, *w, **o: build().eval().requires_grad_(False)),
                (pretrained, "read_weights", equal_heads)):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def two_steps(row):
    """Run them, with the script's own loop."""
    kind = common.attach(row.script.Method, [row.add] if row.add else [])
    options = dict(preset=row.preset, steps=2, batch_size=row.batch, checkpointing=row.checkpointing,
                   dtype="bfloat16", workers=0)
    here = Processes(0, 1, CPU)
    if row.script is DIFFUSION:
        config = kind.Config(**kind.PRESETS[row.preset] | options | dict(num_classes=1000))
        method = kind(config, None, CPU)
        model = method.Model(config)
        shape, dtype = (config.num_latents, config.latent_dim), torch.float32
    else:
        config = kind.Config(**kind.PRESETS[row.preset] | options | dict(disc_start=0, stage2_steps=0))
        method = kind(config, CPU)
        model = method.Model(config, method.targets)
        method.adversary = method.build_adversary()
        shape, dtype = (3, config.image_size, config.image_size), torch.uint8
    dataset = Data((torch.empty(row.batch, *shape, dtype=dtype), torch.zeros(row.batch, dtype=torch.int64)))
    if config.checkpointing:
        common.recompute_blocks(model)
    network = method.network(model) if row.script is DIFFUSION else model
    ema = common.EMA(model, config.ema, method.EMA_WARMUP)
    state = common.TrainState(model, ema, method.optimizer(network))
    if row.script is DIFFUSION:
        train_diffusion.train(method, state, network, dataset, here)
    else:
        if method.adversary:
            state.others = {"adversary": method.adversary,
                            "adversary_optimizer": method.optimizer(method.adversary)}
        train_tokenizer.train_stage(method, train_tokenizer.Stage(1, 0, 2), state, dataset, dataset, here)


def peak(row):
    """Bytes of the most that lives in two steps of a Row."""
    with replaced(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        two_steps(row)
    return live.peak


def largest(found, small, large):
    """The largest batch with which SPARE stays free, a multiple of 8 or 0, for each of GPUS. found: {Row:
    bytes} of two batches of a run. The peak is that of the step's greediest part, each of which is linear in
    the batch: a convex function, so it lies below the line between two batches and above the line's
    continuation. Beyond the larger batch it is therefore computed where that line ends."""
    known, fits = {row.batch: found[row] / 2 ** 30 for row in (small, large)}, []
    for gpu in GPUS:
        (a, low), (b, high) = sorted(known.items())[-2:]
        end = int(b + (gpu - SPARE - high) * (b - a) / (high - low)) // 8 * 8
        if end > b:
            known[end] = peak(large._replace(batch=end)) / 2 ** 30
        fits.append(int(np.interp(gpu - SPARE, *zip(*((gib, n) for n, gib in sorted(known.items()))),
                                  left=0)) // 8 * 8)
    return fits


def table(found):
    """Markdown, of {Row: bytes} with the rows in pairs that differ in the batch alone."""
    lines = ["| run | GiB for n images or latents | " + " | ".join(f"n in {g} GiB" for g in GPUS) + " |",
             "|---" * (2 + len(GPUS)) + "|"]
    for small, large in zip(*[iter(found)] * 2):
        name = f"{KIND[small.script]} `{small.preset}`" + " `--checkpointing`" * small.checkpointing
        pair = " to ".join(f"{found[row] / 2 ** 30:.1f}" for row in (small, large))
        lines.append(f"| {name} | {pair} for {small.batch} to {large.batch} | "
                     + " | ".join(str(n or "–") for n in largest(found, small, large)) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(prog="python -m study.memory", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="presets with this in their name; the page stays as it is")
    args = parser.parse_args(argv)
    rows, found = [row for row in ROWS if args.only in row.preset], {}
    if not rows:
        raise UserError(f"--only {args.only}: there are {', '.join(sorted({row.preset for row in ROWS}))}")
    for row in rows:
        found[row] = peak(row)
        print(f"{row.name}: {found[row] / 2 ** 30:.1f} GiB", flush=True)
    text = table(found)
    print(text)
    if not args.only:
        page = ROOT / "docs/memory.md"
        marks = r"(?<=<!-- study.memory -->\n).*?(?=<!-- /study.memory -->)"
        page.write_text(re.sub(marks, text, page.read_text(), flags=re.S))
        print(f"wrote the table of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
