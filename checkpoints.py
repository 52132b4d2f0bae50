"""Checkpoints and logs: what a run writes, and how it is read again.

A reader of the paper need not open this file. What is read is checked before it is used: checksums, keys,
finite weights. Whatever is wrong is a UserError that says what to do.
"""
import copy
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
import zipfile
from pathlib import Path

from runtime.processes import Stopped, StopFlag, UserError, all_mean, barrier, printable    # before torch

import torch
from tqdm import tqdm

from pictures.draw import plot_curves
from runtime import files
from runtime.checks import check_content, check_weights
from runtime.meter import Meter
from runtime.resuming import check_same_data

# ----------------------------------------------- checkpoints -----------------------------------------------

# A small tokenizer and its SiT, trained on the shapes (`make box`): what sample.py draws from by default.
DEFAULT_MODEL = Path(__file__).parent / "assets" / "shapes.pt"
KEEP = 3               # numbered checkpoints that stay: the second-newest replaces a damaged newest one


def numbered_checkpoints(out):
    """The step_*.pt files of a run, newest step first (by number: the largest file may be a broken one)."""
    found = [path for path in Path(out).glob("step_*.pt") if path.stem[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def save(config, state, processes):
    """One checkpoint of a common.TrainState, written by rank 0. All wait until it is written: if saving
    fails, all stop."""
    if processes.rank == 0:
        content = state.facts | {"step": state.step, "config": dataclasses.asdict(config),
                                 "ema_updates": state.ema.updates, "ema": state.ema.model.state_dict(),
                                 "trained_on": state.trained_on}
        parts = state.others | {"model": state.model, "optimizer": state.optimizer}
        content |= {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(config.out, content, getattr(config, "keep_every", 0))
    barrier()


def restore(state, checkpoint, path):
    """The content of a checkpoint into a common.TrainState of the same parts."""
    load_weights(state.model, checkpoint["model"], path)
    load_weights(state.ema.model, checkpoint["ema"], path)
    load_optimizer(state.optimizer, checkpoint["optimizer"], path)
    for name, part in state.others.items():
        load = load_optimizer if isinstance(part, torch.optim.Optimizer) else load_weights
        load(part, checkpoint[name], path)
    state.ema.updates, state.step = checkpoint["ema_updates"], checkpoint["step"]
    state.facts = copy.deepcopy({name: checkpoint[name] for name in state.facts})     # no pages of the file
    state.trained_on = checkpoint["trained_on"]


def save_checkpoint(out, content, keep_every=0):
    """Write `content` (tensors and plain Python values, with an int "step") to out/step_NNNNNNN.pt and, as
    another name of the same file, out/last.pt. The newest KEEP numbered files stay, and as milestones those
    whose step is a multiple of `keep_every` (0: none). Raises UserError for weights that are not finite."""
    out = Path(out)
    weights = [part for part in content.values() if isinstance(part, dict)]
    if not all_finite(t for part in weights for t in part.values()):
        raise UserError(f"the weights are not finite at step {content['step']}; this checkpoint is not "
                        f"written, those in {out} are from before. Try a lower --lr or a longer --warmup "
                        "in another --out")
    numbered = out / f"step_{content['step']:07d}.pt"
    files.atomic_write(numbered, lambda path: torch.save(content, path))
    link_last(numbered)
    for path in numbered_checkpoints(out)[KEEP:]:
        if not keep_every or int(path.stem[5:]) % keep_every:
            path.unlink()


def link_last(numbered):
    """Make last.pt a hard link to a numbered checkpoint, or a copy where the file system has no links."""
    def link(path):
        try:
            os.link(numbered, path)
        except OSError:
            shutil.copyfile(numbered, path)

    files.atomic_write(numbered.with_name("last.pt"), link)


def all_finite(tensors):
    """Whether no float tensor holds NaN or infinity. One number is read back, however many they are."""
    flags = [t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


class Checkpoint(dict):
    """The content of a checkpoint, a dict in which a missing key is a UserError."""

    def __init__(self, state, path):
        super().__init__(state)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} has no {key!r}: it is damaged or of another version")


def load_checkpoint(path, mapped=False):
    """Read one checkpoint (a file, or a run folder's last.pt) to the CPU, as a Checkpoint. Raises UserError
    if it is damaged: torch.load alone does not check the checksums in the file.

    mapped: its tensors are the file's pages, which all processes of a machine share. To be copied from at
    once: who writes into the file, instead of replacing it, kills the reader."""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"wrong checksum of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise UserError(f"{path} is not a checkpoint of this project: it has no 'config'")
        check_content(state, path)
        return Checkpoint(state, path)
    except UserError:
        raise
    # torch.load raises RuntimeError, EOFError, UnpicklingError, ... by where it was cut
    except Exception as e:
        raise UserError(f"{path} is damaged or no checkpoint ({type(e).__name__}); use another one") from e


def find_checkpoint(out, rank=0):
    """The newest complete checkpoint of a run, or None if it has none yet. A damaged one is skipped with a
    warning; if last.pt is damaged or missing, rank 0 replaces it."""
    candidates = [p for p in (Path(out) / "last.pt", *numbered_checkpoints(out)) if p.exists()]
    for path in candidates:
        try:
            state = load_checkpoint(path, mapped=True)
        except UserError as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr, flush=True)
            continue
        if path.name != "last.pt" and rank == 0:
            link_last(path)
        return state
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {out} can be read; "
                        "delete them to start again")
    return None


def load_weights(model, state, path):
    """load_state_dict with one clear line for weights of another model, or not finite."""
    check_weights(model, state, path)
    if not all_finite(state.values()):
        raise UserError(f"{path} holds weights that are NaN or infinite: that training failed; take an "
                        "earlier one")
    model.load_state_dict(state)


def load_optimizer(optimizer, state, path):
    """The same for an optimizer's state."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} holds an optimizer's state of another model, or a damaged one: {e}") from e


# ------------------------------------------------ logs ------------------------------------------------

class Log:
    """A training loop's progress bar, its lines in metrics.jsonl (means of the terms over forward passes and
    processes since the last line), and what happens at the end of a step: checkpoints, pictures, signals. The
    host waits for the GPU only when a line is written."""

    def __init__(self, config, processes, step, start, end, title, shown, draw):
        """step: of the run, now; start, end: the loop's first step and the one after its last. shown: names
        of the terms in the bar. draw: called with a path when a checkpoint is saved, to draw a picture
        there."""
        self.config, self.processes, self.end, self.shown, self.draw = config, processes, end, shown, draw
        self.step, self.time = step, time.perf_counter()
        self.terms, self.names = {}, frozenset()
        self.finite = torch.ones((), device=processes.device)
        self.stop, self.meter = StopFlag(processes), Meter(processes.device, getattr(config, "dtype", "auto"))
        self.bar = tqdm(total=end - start, initial=step - start, desc=title, disable=processes.rank > 0,
                        mininterval=1.0)

    def end_step(self, state, **more):
        """After a step: write a record, draw and save where it is time to. more: functions without arguments,
        for the record's further values. Raises Stopped after saving if a signal has arrived."""
        step, config = state.step, self.config
        self.bar.update()
        self.meter.end_step()
        saving = step % config.save_every == 0 or step == self.end
        stop = self.stop.read(now=saving)
        saving = saving or stop
        if step % config.log_every == 0 or saving:
            self.write(step, **{name: value() for name, value in more.items()})
        if saving:
            if self.processes.rank == 0:
                self.draw(Path(config.out) / f"grid_{step:07d}.png")
                draw_curves(config)
            save(config, state, self.processes)
        if stop:
            raise Stopped(stop)
        if step == self.end:
            self.bar.close()
            self.stop.close()

    def counted(self):
        """A context for a step. On a GPU the operations of the first one are counted, and again when the
        loss gets other terms."""
        return self.meter.counted(self.names)

    def add(self, terms):
        """terms: {name: scalar tensor} of one forward pass."""
        self.names = frozenset(terms)
        for name, term in terms.items():
            # A sum in place: scalars kept from each step, among large tensors, would keep free memory apart.
            total, count = self.terms.get(name, (torch.zeros_like(term, dtype=torch.float32), 0))
            self.terms[name] = total.add_(term.detach()), count + 1

    def check_finite(self, *values):
        """Remember whether these scalars were ever not finite; `write` raises."""
        self.finite *= sum(value.detach() for value in values).isfinite()

    def write(self, step, **more):
        """One record: the means, more's values, images per second. Raises UserError if a value to be checked
        was not finite."""
        means = [total / count for total, count in self.terms.values()]
        *means, finite = all_mean(torch.stack([*means, self.finite])).tolist()
        if finite < 1:
            raise UserError(f"the loss or its gradient is not finite at step {step} or up to "
                            f"{self.config.log_every} before; the checkpoints in {self.config.out} are from "
                            "before that. Try --dtype float32, or in another --out a lower --lr or a longer "
                            "--warmup")
        steps, seconds = step - self.step, time.perf_counter() - self.time
        self.step, self.time = step, time.perf_counter()
        record = {"step": step, **dict(zip(self.terms, means)), **more,
                  "images_per_second": steps * self.config.batch_size / seconds,
                  **self.meter.read(steps, seconds)}
        self.terms = {}
        if self.processes.rank == 0:
            append_metrics(self.config.out, record)
            self.bar.set_postfix({name: f"{record[name]:.4f}" for name in self.shown if name in record}
                                 | {"img/s": f"{record['images_per_second']:.0f}"}, refresh=False)


def append_metrics(out, record):
    """Add one JSON line to out/metrics.jsonl."""
    with open(Path(out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(out):
    """The records of out/metrics.jsonl. A last line that a crash cut short is dropped; any other line that is
    not a record is skipped with a warning."""
    path, records = Path(out) / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                print(printable(f"warning: {path}, line {number} is not a record; skipped"), file=sys.stderr)
    return records


def start_run(config, state, processes, end, train_set):
    """What rank 0 does in a run's folder before it trains from state.step to `end`."""
    if processes.rank == 0:
        check_same_data(state, config, train_set)
        options, out = dataclasses.asdict(config), Path(config.out)
        files.remove_debris(out)
        files.write_json(out / "config.json", options)
        cut_metrics(out, state.step, state.facts.get("measured", True))
        given = {name: value for name, value in getattr(config, "given", {}).items() if name != "preset"}
        print(f"{'resuming' if state.step else 'starting'} {out} at step {state.step} of {end}: preset "
              f"{config.preset}" + "".join(f", {name} = {value!r}" for name, value in given.items())
              + f"; all options are in {out}/config.json")
        millions = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
                             for name, part in state.model.named_children())
        print(f"parameters: {millions}; {processes.world} x {processes.device}", flush=True)
    barrier()                                         # the fingerprint of a large .npz takes rank 0 minutes


def end_run(config, processes, then, more=""):
    """The last words of a run. then, more: the command that comes next, before and after the run's folder."""
    if processes.rank == 0:
        draw_curves(config)
        print(f"done: {config.out}/last.pt, loss.png, metrics.jsonl, grid_*.png\n"
              f"next: python {then} {shlex.quote(config.out)}{more}")


def draw_curves(config):
    """loss.png of a run, of its log: with a target's loss that of the best constant, where it is known, and a
    mark where stage 2 begins."""
    records = read_metrics(config.out)
    constants = {name.removesuffix("_constant"): value for r in records for name, value in r.items()
                 if name.endswith("_constant")}
    second = min((r["step"] for r in records if r.get("stage") == 2), default=None)
    files.write_png(Path(config.out) / "loss.png", plot_curves(curves(config.out), constants, second))


def cut_metrics(out, step, measured=True):
    """Drop the records that a run resumed at `step` writes again; measured: not the end of a stage there."""
    records = [r for r in read_metrics(out)
               if r["step"] < step or r["step"] == step and (measured or "event" not in r)]
    files.atomic_write(Path(out) / "metrics.jsonl",
                 lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in records)))


def curves(out):
    """{name: [(step, value)]} of all numbers in a run's log, for plot_curves; of ends of stages PSNR."""
    records = [r if "event" not in r else {name: r[name] for name in ("step", "psnr") if name in r}
               for r in read_metrics(out)]
    names = dict.fromkeys(name for r in records for name, value in r.items() if isinstance(value, float))
    found = {name: [(r["step"], r[name]) for r in records if name in r] for name in names}
    bins = max((len(r["loss_t"]) for r in records if r.get("loss_t")), default=0)       # a diffusion run's
    for b in sorted({0, bins // 2, bins - 1}) if bins else ():
        found[f"loss for t in [{b / bins:g}, {(b + 1) / bins:g})"] = [
            (r["step"], r["loss_t"][b]) for r in records if r.get("loss_t") and r["loss_t"][b] is not None]
    return found
