"""What a run is checked for before it trains: the options and images of its checkpoint, a folder that all
processes see, memory for what begins later.

A reader of the paper need not open this file.
"""
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import os
from pathlib import Path

from runtime.processes import UserError, barrier    # before torch, see there

import torch
import torch.distributed as dist


def check_same_config(saved, config, free, path):
    """Refuse to resume a run with other options, except those in `free`."""
    now = dataclasses.asdict(config)
    changed = [f"{k} {saved.get(k)!r} -> {now.get(k)!r}" for k in sorted(now | saved)
               if k not in free and saved.get(k) != now.get(k)]
    if changed:
        longer = any(line.startswith(("steps ", "stage2_steps ")) for line in changed)
        raise UserError(f"the checkpoint in {path} is of another run ({'; '.join(changed[:6])}"
                        f"{'; ...' if len(changed) > 6 else ''}); choose another --out or the same options"
                        + f". Its learning rate follows the number of steps: to train longer, --init {path} "
                        "starts another --out from its weights" * longer)


def check_same_data(state, config, dataset):
    """Refuse to resume on other images than before, wherever they lie. Notes in the state which these are."""
    classes, n = dataset.classes or [], dataset.length
    now = {"images": f"{n:,} images" if n else "endless images",
           "classes": f"{len(classes)} classes, {classes[0]} to {classes[-1]}" if classes else "no classes",
           "fingerprint": hashlib.sha256(repr([dataset.source.fingerprint(), classes]).encode()).hexdigest()}
    before, state.trained_on = state.trained_on, now
    if before and before["fingerprint"] != now["fingerprint"]:                        # empty: a new run
        what = [f"{before[k]} -> {now[k]}" for k in ("images", "classes") if before[k] != now[k]]
        raise UserError(f"the run in {config.out} was trained on other images than --data {config.data} has "
                        f"({'; '.join(what) or 'as many, other files or sizes'}): put them back, or choose "
                        "another --out")


def check_same_step(step, out, rank, world, device):
    """Refuse to train when nodes do not share the run's folder: some do not see what rank 0 writes, or
    resumed at another step. Raises UserError on every rank."""
    if world > 1:
        # A new name: each node may have a fresh folder of its own.
        mark = [f".shared-{os.urandom(8).hex()}.tmp"]            # debris, should this process be killed
        dist.broadcast_object_list(mark)
        if rank == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / mark[0]).touch()
        barrier()
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


# ------------------------------------------- a step to throw away -------------------------------------------

class NoLog:
    """In place of checkpoints.Log: every method does nothing."""

    def __getattr__(self, name):
        return lambda *values, **more: None


def _on_cpu(content):
    """A copy on the CPU of what state_dict() returns: memory of the GPU is what is to be measured."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {name: _on_cpu(part) for name, part in content.items()}
    return [_on_cpu(part) for part in content] if isinstance(content, list) else copy.copy(content)


@contextlib.contextmanager
def undone(state):
    """What the block does to a common.TrainState is undone, to the bit."""
    parts = [state.model, state.ema.model, state.optimizer, *state.others.values()]
    before, step, updates = [_on_cpu(part.state_dict()) for part in parts], state.step, state.ema.updates
    with torch.random.fork_rng(devices=[]):      # nothing here draws from a GPU's generator
        yield
    for part, content in zip(parts, before):
        part.load_state_dict(content)
    state.step, state.ema.updates = step, updates


REHEARSED_ON = {"cuda"}                                                    # devices whose memory is small


def rehearse(train_step, method, state, end, loader):
    """Do the first step with a GAN now, on the next batch, and undo it: a run whose memory is enough only
    until then ends in its first minute, not after days. train_step: function of (loader, log); end: the step
    after the stage's last. Returns a loader that gives the batch again."""
    begins = method.config.disc_start
    if method.device.type not in REHEARSED_ON or method.adversary is None or not state.step < begins < end:
        return loader
    first = next(loader)
    with undone(state):
        state.step = begins
        train_step(itertools.repeat(first), NoLog())
    return itertools.chain([first], loader)
