"""What the scripts share: configuration, extras, random streams, the steps of a training loop, EMA.

Helpers: the scripts call them, and they call nothing back. The training loops are in the scripts, processes
and signals in runtime/processes.py, files in runtime/files.py.
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime.processes import UserError, first_process    # before torch, see there
from runtime import loaders
from runtime.files import expand_home, whole_path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------- configuration ----------------------------------------------

class Range:
    """The values that a number may take. `Annotated[int, Range(...)]` is the type of a config's field;
    called with text, a Range converts it for argparse."""

    def __init__(self, kind, low, high, low_open=False, high_open=False):
        self.kind, self.low, self.high, self.low_open, self.high_open = kind, low, high, low_open, high_open

    def __str__(self):
        what = "a whole number" if self.kind is int else "a number"
        return (f"{what} {'above' if self.low_open else 'from'} {self.low:,} "
                f"{'and below' if self.high_open else 'to'} {self.high:,}")

    def allows(self, value):
        """Whether value lies in the range; NaN does not."""
        kinds = (int, np.integer) if self.kind is int else (int, float, np.number)
        return (isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
                and not (self.low_open and value == self.low or self.high_open and value == self.high))

    def __call__(self, text):
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not self.allows(value):
            raise argparse.ArgumentTypeError(f"must be {self}, not {text[:40]!r}")
        return value


Count, Whole = Annotated[int, Range(int, 1, 10 ** 9)], Annotated[int, Range(int, 0, 10 ** 9)]   # 0: none, all
Seed, Workers = Annotated[int, Range(int, 0, 2 ** 63 - 1)], Annotated[int, Range(int, -1, 1000)]
Share, Decay = Annotated[float, Range(float, 0, 1)], Annotated[float, Range(float, 0, 1, high_open=True)]
Positive = Annotated[float, Range(float, 0, 10 ** 6, low_open=True)]
Weight = Annotated[float, Range(float, 0, 10 ** 6)]


def number(kind):
    """The Range in a type as above, else None: number(Count) is the `type=` of an argparse option."""
    return next((m for m in getattr(kind, "__metadata__", ()) if isinstance(m, Range)), None)


def check_ranges(config):
    """Compare every number of a config dataclass with its range."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), number(field.type)
        if allowed and not allowed.allows(value):
            raise UserError(f"--{field.name.replace('_', '-')} must be {allowed}, not {str(value)[:40]}")


def check_choices(config, **choices):
    """Compare text fields of a config with what they may be: check_choices(config, disc=("none", "dino")).
    Raises UserError."""
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {value}: choose {' or '.join(allowed)}")


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors. A value's leading ~ is the home folder, also in --out=~/x,
    which no shell expands."""
    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(map(expand_home, sys.argv[1:] if args is None else args), namespace)


# Help of one line per option, however narrow the terminal.
OneLineHelp = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=38, width=160)


def _comments(config_class):
    """The groups (`# ---- title ----`) and help texts (the comment beside a field) in a config dataclass's
    source: {field: (group, help)}. Comments above a field are not printed."""
    found = {}
    for cls in reversed(config_class.__mro__[:-1]):
        group = "options"
        source = "" if "composed" in cls.__dict__ else inspect.getsource(cls)        # attach() made the class
        for line in textwrap.dedent(source).splitlines():
            if title := re.match(r"    # ---- (.*?) -+$", line):
                group = title[1]
            elif entry := re.match(r"    (\w+): [^=]+=.*?(?:  # (.*))?$", line):
                found[entry[1]] = (group, entry[2] or "")
    return found


def parse_config(config_class, presets, scales, description, argv=None, hidden=()):
    """Build a config from the command line. Precedence: the class's defaults < presets < options.

    presets: name -> {field: value}; `--preset a,b` applies them left to right. scales: those of them that fix
    the size of a run; the first is the default, and comes first when the first one named is no scale.
    hidden: fields without an option, which the script sets. Raises UserError for unknown options, presets and
    values.
    """
    variants = [name for name in presets if name not in scales]
    description = description or ""                                    # python -OO leaves docstrings out
    description += (f"\nDefaults below are the paper's or those of the source named with them; "
                    f"`--preset` (default {scales[0]}) changes many at once.\nScales: {', '.join(scales)}."
                    + f"\nVariants to join to a scale: {', '.join(variants)}." * bool(variants))
    parser = OneLineParser(description=description,
                           usage="%(prog)s [--preset NAME,...] [--add NAME,...] [--OPTION VALUE ...]",
                           allow_abbrev=False, argument_default=argparse.SUPPRESS,
                           formatter_class=OneLineHelp)
    comments, groups = _comments(config_class), {}
    for field in dataclasses.fields(config_class):
        allowed = number(field.type)
        if field.name in hidden or not (allowed or field.type in (str, bool)):
            continue
        title, text = comments[field.name]
        if not text:
            raise ValueError(f"{config_class.__name__}.{field.name} has no comment to be its help")
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else \
               {"type": allowed or str, "metavar": (allowed.kind if allowed else str).__name__.upper()}
        default = f"default {field.default!r}" if field.default != "" else ""
        if (small := presets[scales[0]].get(field.name, field.default)) != field.default:
            default += f"{'; ' if default else ''}{scales[0]}: {small!r}"
        text = (f"{text} ({default})" if default else text).replace("%", "%%")
        group.add_argument("--" + field.name.replace("_", "-"), **kind, help=text)
    given = vars(parser.parse_args(argv))
    if "data" in given:
        given["data"] = whole_path(given["data"])
    if not given.get("out", "default").strip():
        raise UserError("--out is empty: name a folder, or leave the option out")
    names = split_names(given.get("preset", ""))
    if unknown := [name for name in names if name not in presets]:
        raise UserError(f"unknown preset {', '.join(unknown)} (an extra's needs its --add); there are: "
                        f"{', '.join(presets)}")
    if not names or names[0] not in scales:
        names.insert(0, scales[0])
        if (data := given.get("data", scales[0])) != scales[0] and first_process():
            print(f"note: --preset names no scale: it is {scales[0]}; for --data {data} there is "
                  f"{data if data in scales else 'photos'}")
    if second := [name for name in names[1:] if name in scales]:
        raise UserError(f"preset {second[0]} fixes the scale of a run: only the first preset may")
    values = {}
    for name in names:
        values |= presets[name]
    try:
        config = config_class(**(values | given | {"preset": ",".join(names)}))
        config.given = given                                                 # for checkpoints.start_run
        return config
    except UserError:
        raise
    except ValueError as e:
        raise UserError(str(e)) from e


def run_name(kind, *parts):
    """The default --out: runs/KIND-PARTS, of names of data, tokenizer and preset; what another contains is
    left out."""
    kept = []
    for part in (part.replace(",", "-") for part in parts):
        kept = [other for other in kept if other not in part]
        kept += [part] * all(part not in other for other in kept)
    return "-".join([f"runs/{kind}", *kept])


def split_names(text):
    """"a, b" -> ["a", "b"]. Raises UserError for a name that comes twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{text}: {twice[0]} is named twice")
    return names


# ------------------------------------------------- extras -------------------------------------------------
# The core is the paper. What is not in it is a file of after/, variants/ or study/ that attaches from
# outside: the core imports none, and whoever deletes the folders still has the whole method.

EXTRAS = ("after", "variants", "study")


def find_extra(name):
    """The module NAME of one of the folders above. Raises UserError."""
    home = Path(__file__).parent
    for folder in EXTRAS:
        if name.isidentifier() and (home / folder / f"{name}.py").exists():
            return importlib.import_module(f"{folder}.{name}")
    raise UserError(f"there is no {name}.py in {', '.join(f'{folder}/' for folder in EXTRAS)}")


def addition(base, name):
    """What the extra `name` adds to the class `base` (see attach): its class AddToROLE."""
    module = find_extra(name)
    if not hasattr(module, f"AddTo{base.ROLE}"):
        raise UserError(f"{module.__name__.replace('.', '/')}.py cannot be added here: it has no "
                        f"AddTo{base.ROLE}")
    return getattr(module, f"AddTo{base.ROLE}")


def attach(base, names):
    """The class `base` with the extras `names` (a list) in front of it, later ones before earlier ones.

    base has a ROLE ("Tokenizer", "Diffusion"), a Config, a Model and PRESETS. The extra's class
    AddToTokenizer may have a Config (a dataclass: its options), a Model (a mixin, or a subclass of the
    base's; with TRAINING_ONLY it is not needed to load the weights), PRESETS, and any method of base, which
    it overrides and may call by super(). Raises UserError.
    """
    for name in names:
        add = addition(base, name)
        parts = {part: type(part, (getattr(add, part), getattr(base, part)),
                            {"__module__": add.__module__, "composed": True})
                 for part in ("Config", "Model") if hasattr(add, part)}
        if "Config" in parts:
            parts["Config"] = dataclass(parts["Config"])
        parts["PRESETS"] = base.PRESETS | getattr(add, "PRESETS", {})
        base = type(base.__name__, (add, base), parts)
    return base


def attach_named(base, argv=None):
    """`base` with the extras that a command line (None: sys.argv's) names after --add."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--add", default="")
    return attach(base, split_names(parser.parse_known_args(argv)[0].add))


def model_extras(base, names):
    """Those of --add's names ("a,b") without which the trained model cannot be built again, as a list."""
    return [name for name in split_names(names) if hasattr(add := addition(base, name), "Model")
            and not getattr(add, "TRAINING_ONLY", False)]


def build_model(base, config, extras):
    """The base.Model of a checkpoint: config is a run's whole config (a dict), extras are model_extras'.
    Raises UserError or ValueError."""
    kind = attach(base, extras)
    names = {field.name for field in dataclasses.fields(kind.Config)}
    return kind.Model(kind.Config(**{k: v for k, v in config.items() if k in names}))


# ---------------------------------------------- random streams ----------------------------------------------

def sample_rng(seed, stream, major, minor):
    """A numpy Generator for one purpose and one sample: a function of (seed, stream, major, minor) alone.

    Philox is counter-based: the seed and the stream's name make the key, major and minor (step and position,
    or epoch and index) the upper words of the counter. No two streams overlap, and starting one is cheap.
    """
    key = np.array((seed, zlib.crc32(stream.encode())), np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array((0, 0, minor, major), np.uint64)))


def step_rngs(config, name, step, positions):
    """One generator for each sample of a micro-batch, from (seed, step, global sample index)."""
    return [sample_rng(config.seed, name, step, int(i)) for i in positions]


def standard_normal(rngs, shape):
    """(B, *shape) float32 on the CPU, one sample from each generator."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


# ---------------------------------------- steps of a training loop ----------------------------------------

def check_batch(config, world):
    """Raises UserError for a batch that cannot be divided over processes and accumulation steps."""
    if config.batch_size % (world * config.accumulate):
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {world} processes x "
                        f"{config.accumulate} accumulation steps")


def batch_loader(dataset, batches, workers, device, collate):
    """An iterator over a data set's batches. An item that is a UserError is raised.
    workers: -1 for 8 on CUDA and none elsewhere."""
    workers = (8 if device.type == "cuda" else 0) if workers < 0 else workers
    for batch in loaders.batches(dataset, workers, batch_sampler=batches, collate_fn=collate,
                                 pin_memory=device.type == "cuda"):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def set_learning_rate(optimizer, lr):
    """Returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimizer_step(optimizer, clip):
    """Clip the gradient's norm, step, zero_grad. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups
                                           for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def recompute(function, *inputs):
    """function(*inputs) under activation checkpointing: the backward pass calls it again from its inputs. It
    may have no side effects and draw no random numbers."""
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)                       # a frozen network, say; torch.compile fails on these


def recompute_blocks(network):
    """Put the transformer blocks of `network` (classes named ...Block) under activation checkpointing."""
    for module in network.modules():
        if type(module).__name__.endswith("Block"):
            # a partial, not a closure: in a deep copy, as EMA makes one, it belongs to the copy
            module.forward = functools.partial(recompute, module.forward)


def compile_parts(model, kind):
    """torch.compile the modules of a class, one by one. Not the whole model: the adaptive weight asks for the
    gradient of the decoder's head alone, which in a compiled model is the whole backward pass."""
    for part in model.modules():
        if isinstance(part, kind):
            part.compile()


class EMA:
    """Exponential moving average of a model's weights: ema += (1 - decay) * (weights - ema); buffers are
    copied.

    With `warmup` the decay is min(decay, (1 + n) / (10 + n)) after n updates: at once 0.9999 would remember a
    random start for tens of thousands of steps. By step 90,000 the two are the same. [ours; SiT and the
    released code have no warm-up]
    """

    def __init__(self, model, decay, warmup=True):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        weights = [w.detach() for w in model.parameters()]
        torch._foreach_lerp_(list(self.model.parameters()), weights, 1 - decay)   # few kernels, not one each
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


@dataclass
class TrainState:
    """What training changes, and what a checkpoint holds of it (checkpoints.save and restore)."""
    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    others: dict = dataclasses.field(default_factory=dict)   # name -> module or optimizer trained beside it
    facts: dict = dataclasses.field(default_factory=dict)    # plain values to be kept: "kind", "add", ...
    trained_on: dict = dataclasses.field(default_factory=dict)   # see resuming.check_same_data


def fingerprint(model):
    """A hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
