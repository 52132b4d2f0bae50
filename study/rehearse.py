"""Pass every event of a training run once, in minutes, before the run.

    python -m study.rehearse -- torchrun --nproc-per-node=8 train_tokenizer.py --preset maetok-b-256 ...
    python -m study.rehearse --price 20 -- python train_diffusion.py --preset sit-xl --tokenizer RUN

What follows -- is the run's command, as it will be given. It is started with all its sizes and processes, but
fewer steps and an --out beside its own, OUT.rehearsal. Images are listed and read; there are steps before the
GAN, with it and in stage 2 (of diffusion after one shard of the cache), checkpoints and pictures, and what is
measured at a stage's end. After a checkpoint all processes are killed, and the same command resumes. The
folder is deleted at the end.

It prints what each event took, the peaks of memory, and time, disk (and price) of the whole run. Exit status
2: the run fails at the event that is named, or does not fit. Of the images only those of these steps are
read. Of several nodes' runs rehearse one node's.
"""
import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see runtime/processes.py

import cache
import checkpoints
import train_diffusion
import train_tokenizer
from common import Positive, UserError, number
from data import build_dataset, some_images
from runtime import files, loaders
from runtime.processes import run

SCRIPTS = {"train_tokenizer.py": (train_tokenizer, train_tokenizer.SCALES),
           "train_diffusion.py": (train_diffusion, train_diffusion.PRESETS)}
STEPS, SAVE_EVERY = 5, 4               # of each part of the run; and between checkpoints
READ = 256                             # images that are read alone, for files per second


class Part(NamedTuple):
    """Steps of a run that cost the same."""
    name: str
    steps: int                         # of the whole run
    first: int                         # the rehearsal's first step of this part, from 1


class Plan(NamedTuple):
    """A command, what it asks for, and how it is rehearsed."""
    command: list                      # up to the script, with it
    options: list                      # what follows
    config: object                     # their Config
    tokenizer: bool                    # or diffusion
    parts: list                        # of Part
    short: dict                        # options that take the place of others
    end: int                           # the rehearsal's last step
    cached: int = 0                    # images in the whole run's cache of latents

    def with_cache(self, images):
        """For diffusion: one shard of the cache instead of all. images: how many there are; None: endless."""
        cached = 0
        if not self.tokenizer and self.config.cache:
            cached = min((count for count in (self.config.cache_images, images) if count), default=0)
        short = {"cache_images": min(cached, cache.SHARD_IMAGES)} if cached else {}
        return self._replace(cached=cached, short=self.short | short)


def make_plan(command):
    """The Plan of a run's command, a list of words. Raises UserError for another command or wrong options."""
    places = [i for i, word in enumerate(command) if Path(word).name in SCRIPTS]
    if not places:
        raise UserError("which run? After -- comes its command: python or torchrun ... train_tokenizer.py or "
                        "train_diffusion.py, and its options")
    words, options = command[:places[0] + 1], command[places[0] + 1:]
    module, scales = SCRIPTS[Path(words[-1]).name]
    method = common.attach_named(module.Method, options)
    hidden = ("num_latents", "latent_dim", "num_classes") if module is train_diffusion else ()
    config = common.parse_config(method.Config, method.PRESETS, list(scales), None, options, hidden)
    if module is train_diffusion:
        return Plan(words, options, config, False, [Part("steps", config.steps, 1)],
                    dict(steps=2 * STEPS), 2 * STEPS)
    if not config.data:
        raise UserError("which images? Give --data FOLDER (ImageFolder layout), FILE.npz, cifar10 or shapes")
    first, end = 0, config.steps + config.stage2_steps * (config.stage != "1")
    if config.stage == "2":
        first = config.steps
    gan = config.disc_start if config.disc != "none" else end
    parts, step, short = [], first, {"steps": 0, "stage2_steps": 0}
    for stage, start, stop in ("steps", first, config.steps), ("stage2_steps", config.steps, end):
        begin = min(max(gan, start), stop)
        for a, b, adversary in (start, begin, False), (begin, stop, True):
            if a < b:
                name = ("stage 1" if stage == "steps" else "stage 2") + ", with the GAN" * adversary
                parts.append(Part(name, b - a, step + 1))
                short[stage] += STEPS
                if adversary:
                    short.setdefault("disc_start", step)
                step += STEPS
    if config.stage == "2":
        short["steps"] = first
    return Plan(words, options, config, True, parts, short, step)


# -------------------------------------------------- the run -------------------------------------------------

def descendants(pid):
    """The processes that `pid` has started, and what they have started (Linux; elsewhere none)."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:                                                          # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


class Watch:
    """What is seen of a run from outside: when each step was logged, the least memory left, the most of
    /dev/shm, whether it was killed on the way."""

    def __init__(self, out):
        self.out, self.times, self.begun = out, {}, time.time()
        self.available, self.shm, self.shm_before, self.killed = [], 0, self.shm_used(), False

    @staticmethod
    def shm_used():
        total, free = loaders.room(loaders.SHM) if os.path.isdir(loaders.SHM) else (0, 0)
        return total - free

    def look(self):
        for record in checkpoints.read_metrics(self.out):
            self.times.setdefault((record["step"], "event" in record), time.time())
        self.shm = max(self.shm, self.shm_used() - self.shm_before)
        if os.path.exists("/proc/meminfo"):
            free = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
            self.available.append(int(free.split()[1]) * 1024)


def call(plan, out, log, watch, kill_after=None):
    """Run the rehearsal's command once. kill_after: kill it and all that it started when a checkpoint of that
    step or a later one is there. Returns its exit status, or None where it was killed."""
    options = plan.short | {"out": out, "save_every": SAVE_EVERY, "log_every": 1}
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with open(log, "ab") as file:
        process = subprocess.Popen([*plan.command, *plan.options, *given], stdout=file, stderr=file,
                                   start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            watch.look()
            saved = checkpoints.numbered_checkpoints(out)
            if kill_after is not None and saved and int(saved[0].stem[5:]) >= kill_after:
                return None
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        process.wait()
    watch.look()
    return process.returncode


def where_it_failed(plan, watch):
    """The name of the event after the last line that a run has logged."""
    if not watch.times:
        return "its start"
    step, measured = max(watch.times)
    part = [part for part in plan.parts if part.first <= step][-1]
    after = [other.name for other in plan.parts if other.first == step + 1] or [part.name]
    stage = part.name.split(",")[0]
    if measured or step == plan.end or not after[0].startswith(stage):
        return f"the end of {stage}"
    if step % SAVE_EVERY == 0:
        return f"the checkpoint or picture of step {step} ({part.name})"
    return f"step {step + 1} ({after[0]})"


def last_line(log):
    """The line of a log that says why the run failed."""
    lines = [line.split("\r")[-1].strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")


def rehearse(plan, out, log):
    """Start, kill, resume. Returns the Watch of the whole. Raises UserError where the run fails."""
    watch = Watch(out)
    gan = [part.first for part in plan.parts if "GAN" in part.name]
    # Not at the first checkpoint where there is another: the step after it says how long saving takes.
    kill_after = min(max([plan.parts[0].first + SAVE_EVERY, *gan[:1]]), plan.end - 1)
    status = call(plan, out, log, watch, kill_after)
    watch.killed = status is None
    if watch.killed:
        status = call(plan, out, log, watch)
    if status:
        raise UserError(f"the run fails at {where_it_failed(plan, watch)}: "
                        f"{last_line(log).removeprefix('error: ')} (all it said: {log})")
    if watch.killed and b"resuming " not in log.read_bytes():
        raise UserError("the run was killed after a checkpoint, and did not resume from it")
    return watch


# ------------------------------------------------ the numbers -----------------------------------------------

def read_images(plan):
    """{"images": how many there are (None: endless), "list_seconds", "files_per_second" of one process}."""
    config, begun = plan.config, time.perf_counter()
    if plan.tokenizer:
        data, size = config.data, config.image_size
    else:
        tokenizer, state = train_diffusion.load_tokenizer(config.tokenizer)
        data, size = config.data or state["config"]["data"], tokenizer.config.image_size
    dataset = build_dataset(data, "train", size, config.data_root)
    listed = time.perf_counter()
    read = sum(len(images) for images, *_ in some_images(dataset, READ, batch_size=32))
    return {"images": dataset.length, "list_seconds": listed - begun,
            "files_per_second": read / (time.perf_counter() - listed)}


def size_of(paths):
    return sum(path.stat().st_size for path in paths)


def costs(plan, out, watch):
    """What each part took, and the hours and bytes of the whole run that follow from it: a dict."""
    config, steps = plan.config, {r["step"]: r for r in checkpoints.read_metrics(out) if "event" not in r}
    seconds_of = lambda step: config.batch_size / steps[step]["images_per_second"]
    parts = {}
    for part, after in zip(plan.parts, [*plan.parts[1:], None]):
        mine = range(part.first, after.first if after else plan.end + 1)
        parts[part.name] = {
            "steps": part.steps, "seconds": statistics.median(map(seconds_of, mine)),
            "waiting": statistics.median(steps[s]["data_wait_seconds"] / seconds_of(s) for s in mine),
            "memory_gib": steps[mine[-1]]["peak_memory_gib"],
            "speed_used": steps[mine[-1]].get("gpu_speed_used")}
    # A step's line has the seconds since the line before: the first after a checkpoint, those of saving too.
    first, pictures = plan.parts[0].first, list(out.glob("grid_*.png"))
    saves = sum(part.steps for part in plan.parts) // config.save_every
    save = max(0.0, seconds_of(first + SAVE_EVERY) - parts[plan.parts[0].name]["seconds"])
    starting = watch.times[first, False] - watch.begun
    events = [watch.times[step, True] - watch.times[step, False] for step, event in watch.times if event]
    checkpoint, kept = (out / "last.pt").stat().st_size, checkpoints.KEEP + 1         # and one being written
    if getattr(config, "keep_every", 0):
        kept += config.steps // config.keep_every
    disk = {"checkpoints": kept * checkpoint, "pictures": saves * size_of(pictures) // len(pictures)}
    seconds = starting + saves * save + sum(events) + sum(p["steps"] * p["seconds"] for p in parts.values())
    if "cache_images" in plan.short:
        shard, files = plan.short["cache_images"], list((out / "latents").glob("*.npy"))
        took = max(p.stat().st_mtime for p in files) - (out / "latents/meta.json").stat().st_mtime
        times = plan.cached / shard
        disk["cache"], seconds = int(size_of(files) * times), seconds + took * (times - 1)
    return {"parts": parts, "start_seconds": starting, "save_seconds": save, "end_of_stage_seconds": events,
            "checkpoint_bytes": checkpoint, "checkpoints": kept, "disk_bytes": disk, "hours": seconds / 3600,
            "memory_gib": max(r["peak_memory_gib"] for r in steps.values()), "shm_bytes": watch.shm,
            "memory_left_bytes": min(watch.available, default=None), "killed": watch.killed}


def check_disk(plan, found):
    """Refuse a run for whose files there is no room."""
    where = Path(plan.config.out).absolute()
    while not where.exists():
        where = where.parent
    free, needed = loaders.room(where)[1], sum(found["disk_bytes"].values())
    if needed > free:
        what = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in found["disk_bytes"].items())
        raise UserError(f"--out {plan.config.out} has {free / 1e9:.1f} GB free, the run needs "
                        f"{needed / 1e9:.1f} ({what}): choose another --out"
                        + ", a larger --keep-every" * hasattr(plan.config, "keep_every"))


def as_text(plan, read, found, price):
    """What is printed."""
    size = lambda count: f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
    images = "endless" if read["images"] is None else f"{read['images']:,}"
    rows = [("images", f"{images}, listed in {read['list_seconds']:.1f} s; one process reads "
                       f"{read['files_per_second']:.0f} per second"),
            ("start and first step", f"{found['start_seconds']:.1f} s")]
    for name, part in found["parts"].items():
        rows.append((name, f"{part['steps']:,} steps of {part['seconds']:.3g} s, {part['waiting']:.0%} of it "
                           f"waiting for data; peak memory {part['memory_gib']:.2f} GiB"
                     + (f"; {part['speed_used']:.0%} of the GPU's speed" if part["speed_used"] else "")))
    rows += [("checkpoint and picture", f"{found['save_seconds']:.1f} s, {size(found['checkpoint_bytes'])}"),
             ("killed, then resumed", "at its checkpoint" if found["killed"] else "no: it ended too soon")]
    rows += [("end of a stage", f"{seconds:.1f} s") for seconds in found["end_of_stage_seconds"]]
    hours = found["hours"]
    rows += [("the whole run", (f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes")
              + (f", {hours * price:.2f} at {price:g} an hour" if price else "")),
             ("its disk", ", ".join(f"{name} {size(count)}" for name, count in found["disk_bytes"].items())),
             ("/dev/shm", size(found["shm_bytes"]))]
    if found["memory_left_bytes"] is not None:
        rows.append(("host memory left", size(found["memory_left_bytes"])))
    return "\n".join(f"{name:24} {text}" for name, text in rows)


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    argv = sys.argv[1:] if argv is None else argv
    own, command = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = common.OneLineParser(prog="python -m study.rehearse", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=number(Positive), help="of an hour of this machine")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args(own)
    plan = make_plan(command)
    read = read_images(plan)
    plan = plan.with_cache(read["images"])
    out = Path(f"{plan.config.out}.rehearsal")
    log = out.with_name(out.name + ".log")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    log.unlink(missing_ok=True)
    try:
        found = costs(plan, out, rehearse(plan, out, log))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print(as_text(plan, read, found, args.price))
    if args.json:
        files.write_json(args.json, {"command": command, **read, **found})
    check_disk(plan, found)
    log.unlink()


if __name__ == "__main__":
    run(main)
