"""Measure what was trained, by the paper's measures. Each command prints a table with its protocol, writes
JSON and pictures, and renews report.html beside them. (Not here: the human evaluation, and the published
baselines, whose weights this project does not have.)

    python evaluate.py recon                                              # the small model in assets/
    python evaluate.py recon RUN --data IMAGENET                          # rFID, PSNR, SSIM, LPIPS, a picture
    torchrun --nproc-per-node=8 evaluate.py generation fid.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py generation samples.npz --data shapes --features classifier   # where FID has no meaning
    python evaluate.py latents RUN RUN2 --data cifar10                   # linear probe, mixtures [Fig. 2a, 8]
    python evaluate.py curve RUN                                              # over checkpoints [Fig. 5b]
    python evaluate.py cfg RUN --scales 1.5 1.9 --intervals 0:0.75 0:1        # [Table 12]

The mathematics is in metrics.py, networks and references are in measures/features.py, the drawing is in
pictures/draw.py. Images are uint8 wherever they are measured; networks run in float32. Under torchrun the
processes share the images.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see runtime/processes.py

import torch

import checkpoints
from runtime import files
import metrics
from common import Count, Seed, Share, UserError, Weight, Whole, number
from data import to_float
from flow import SAMPLERS, check_guidance
from measures import latent_space
from measures.features import (PRECISION_IMAGES, FeatureStatistics, Report, collect, distance_name,
                             feature_network, few_images, frechet_between, open_run, reference,
                             save_statistics, score)
from measures.image_sets import (add_extras, batches, gather, load_model, open_data, open_samples,
                               open_tokenizer, reconstruct, reconstructions, run_folder, without_classes)
from losses import build_lpips
from maetok import load_tokenizer
from pictures.draw import line_chart, recon_picture
from pictures.page import write_report
from runtime.processes import printable, rank_zero_first, run, start_processes


# -------------------------------------------------- recon --------------------------------------------------

@torch.no_grad()
def recon(args):
    """rFID, PSNR, SSIM and LPIPS of a tokenizer on test images.                                 [Sec. 4.1]

    Two kinds of number. PSNR, SSIM and LPIPS compare each reconstruction with its own original, and are means
    over images. rFID compares the *set* of reconstructions with the set of originals: it is small when the
    two have the same statistics, and grows when all images are a little blurry.
    """
    if not args.run:
        args.run, args.out = str(checkpoints.DEFAULT_MODEL), args.out or "runs/box/recon"
    tokenizer, data = open_tokenizer(args, args.run)
    size = args.size or tokenizer.config.image_size
    try:
        tokenizer.grid((size, size))
    except ValueError as e:
        raise UserError(f"--size {size}: {e}") from e
    args.out = args.out or str(run_folder(args.run) / f"recon_{size}")
    network, name = (None, "none") if args.features == "none" else feature_network(args, data, size)
    lpips = None
    if args.lpips or args.lpips is None and args.features == "inception":
        with rank_zero_first(args.rank):
            lpips = build_lpips(args, args.device)
    images = open_data(args, data, "test", size, args.num_images)
    statistics, rows, shown, found = [], [], [], []
    # One pass over the images: measures per image are kept, features only as a running mean and covariance.
    for indices, a in batches(images, args, "reconstructing"):
        a = a.to(args.device)                                                               # (B, 3, H, W)
        x = to_float(a)
        b = reconstruct(tokenizer, indices, x)
        values = [metrics.psnr(a, b), metrics.ssim(a, b), metrics.ssim(a, b, data_range=2.0)]
        if lpips is not None:
            values.append(lpips(x, to_float(b)).double())
        rows.append(torch.stack(values, 1).cpu())
        shown += list(zip(a.cpu(), b.cpu(), values[0])) if len(shown) < 8 else []
        if network is not None:
            outputs = [network(part) for part in (a, b)]
            statistics = statistics or [FeatureStatistics(outputs[0].pool.shape[1]) for _ in outputs]
            for of_set, output in zip(statistics, outputs):
                of_set.update(output.pool)
            if args.features == "classifier":
                found.append(torch.stack([output.logits.argmax(1) for output in outputs], 1).cpu())
    rows = gather(torch.cat(rows) if rows else torch.empty(0, 3 + (lpips is not None)), args)
    result = dict(zip(("psnr", "ssim", "ssim_data_range_2_as_released_code", "lpips"), rows.mean(0).tolist()))
    if network is not None:
        result |= compare_sets(args, statistics)
    if args.features == "classifier":
        found = gather(torch.cat(found), args) == torch.from_numpy(images.labels)[:, None]          # (n, 2)
        result |= without_classes(images, "classes assigned") or zip(
            ("originals_assigned_to_their_class", "reconstructions_assigned_to_their_class"),
            found.double().mean(0).tolist())
    result |= {"images": len(rows), "protocol": (
        f"{len(rows)} images of {images.name} at {size} px, centre crop; EMA weights; reconstructions "
        f"rounded to uint8, against the same images; features {name}; float32"
        + ("; latents: samples of the posterior" if tokenizer.config.variational else "")
        + (few_images(len(rows), len(statistics[0].mean)) if network is not None else ""))}
    return Report(result, pictures={".png": recon_picture(shown[:8])})


def compare_sets(args, statistics):
    """{rFID, variance kept} from the FeatureStatistics of originals and reconstructions of this process."""
    if not statistics:
        raise UserError(f"too few images for {args.world} processes: each must have one at least")
    for of_set in statistics:
        of_set.all_reduce(args.world, args.device)
    # Features of blurry images have less variance, which makes distances to them (--gap) smaller.
    real, fake = (of_set.mean_and_covariance()[1].trace().item() for of_set in statistics)
    return {distance_name(args, "r"): frechet_between(*statistics),
            **({"share_of_feature_variance_kept": fake / real} if real > 1e-9 else {})}    # equal images


# ------------------------------------------------ generation ------------------------------------------------

@torch.no_grad()
def generation(args):
    """gFID, sFID, Inception Score, precision and recall of samples; with --features classifier the Fréchet
    distance in a small classifier's features (not FID) and the fraction of samples it assigns to the class
    asked for."""
    if args.tokenizer and args.features != "classifier":
        raise UserError("--tokenizer: its reconstructions are compared by --features classifier alone")
    samples = open_samples(args.samples)
    labels, size = torch.from_numpy(samples.labels), samples.size
    # Samples and reference go through the same network, and each set is described by a Gaussian of its
    # features: FID is the Fréchet distance of the two. sFID: the same with features that depend on position.
    network, name = feature_network(args, args.data, size)
    fake = collect(args, network, batches(samples, args, "samples"), len(labels), logits=True)
    real, against = reference(args, network, name, args.data, size)
    result = {"samples": len(labels), distance_name(args, "g"): frechet_between(fake.pool, real.pool)}
    if fake.spatial is not None and real.spatial is not None:
        result["sfid"] = frechet_between(fake.spatial, real.spatial)
    if args.features == "inception":
        result["inception_score"], result["inception_score_std"] = metrics.inception_score(fake.logits)
    # FID mixes two errors. Precision: how many samples look real; recall: how much of the real variety they
    # have.
    if real.vectors is not None and args.rank == 0:
        result |= zip(("precision", "recall"), metrics.precision_recall(real.vectors, fake.vectors))
    if args.features == "classifier":
        result |= classified(args, network, labels, fake, size)
    counts = labels[labels >= 0].unique(return_counts=True)[1]
    kind = "unknown" if len(counts) == 0 else "balanced" if counts.max() - counts.min() <= 1 else "unbalanced"
    result["protocol"] = (
        f"{len(labels)} samples of {args.samples} at {size} px against {against}; features {name}; float32; "
        f"labels {kind}; precision and recall with k = 3 against up to {PRECISION_IMAGES} reference images"
        + ("; near 0 where samples are blurrier than the reference, so see those against the tokenizer's "
           "reconstructions of test images (a KL-VAE's: posterior samples)" if args.tokenizer else "") + "; "
        + ("Inception Score in file order, chunks of 5000; " if args.features == "inception" else "")
        + ("the samples are sorted by class, which makes Inception Score too low; "
           if args.features == "inception" and metrics.few_classes_at_once(labels) else "")
        + how_drawn(args.samples) + few_images(len(labels), len(fake.pool.mean)))
    if args.save_statistics and args.rank == 0:
        save_statistics(args.save_statistics, real, name)
    return Report(result)


def how_drawn(samples):
    """Guidance, steps, sampler, seed of samples, from the settings.json that sample.py leaves beside them."""
    note = Path(f"{str(samples).rstrip('/')}.settings.json")
    if not note.exists():
        return "guidance, steps and seed unknown"
    settings = files.read_json(note)
    return "drawn with " + ", ".join(f"{name} {value}" for name, value in settings.items()
                                     if name in ("cfg", "seed")
                                     or value and name not in ("weights", "num", "batch_size"))


def classified(args, network, labels, fake, size):
    """Class accuracy of samples, and of test images and reconstructions, which are its upper bounds."""
    tests = open_data(args, args.data, "test", size, args.test_images)
    truth = torch.from_numpy(tests.labels)
    accuracy = lambda found, wanted: (found.argmax(1) == wanted).float().mean().item()
    result = {}
    if (labels >= 0).all():
        if labels.max() >= fake.logits.shape[1]:
            raise UserError(f"{args.samples} has class {labels.max()}, --data {args.data} only "
                            f"0..{fake.logits.shape[1] - 1}")
        result["assigned_to_requested_class"] = accuracy(fake.logits, labels)
    else:
        print(f"note: {args.samples} has no labels (arr_1): nothing says which class a sample should be of")
    missing = without_classes(tests, "accuracy on test images")
    found = collect(args, network, batches(tests, args, "test images"), logits=True).logits
    result |= missing or {"classifier_test_accuracy": accuracy(found, truth)}
    if args.tokenizer:
        # Samples are drawn by the tokenizer's decoder: this is the decoder's part of the error.
        tokenizer = load_tokenizer(args.tokenizer, args.device)
        reconstructed = reconstructions(args, tokenizer, tests)
        found = collect(args, network, reconstructed, PRECISION_IMAGES, logits=True)
        result |= {} if missing else {
            "reconstructions_assigned_to_their_class": accuracy(found.logits, truth)}
        # A blurry sample is outside the manifold of sharp images: against them, precision and recall are near
        # 0 for every small tokenizer. Against reconstructions, which are as blurry, they show how much of
        # what the decoder can draw diffusion covers.
        result |= zip(("precision_against_reconstructions", "recall_against_reconstructions"),
                      metrics.precision_recall(found.vectors, fake.vectors))
    return result


# ---------------------------------------------- curve and cfg -----------------------------------------------

def curve(args):
    """Fréchet distance of samples over a run's numbered checkpoints.                              [Fig. 5b]

    All checkpoints start from the same noise, so that two neighbours differ by what was learned between them.
    """
    if args.null_class and args.cfg != 1 and not args.add:
        raise UserError("--null-class: guidance leads away from the null class itself; leave --cfg at 1")
    paths = checkpoints.numbered_checkpoints(args.run)[::-1]
    if not paths:
        raise UserError(f"{args.run} has no numbered checkpoints (step_*.pt): give a run folder of "
                        "train_diffusion.py; --keep-every keeps more of them")
    first = open_run(args, paths[0])
    check_guidance(first.model, args.cfg, args.cfg_interval)
    rows = []
    for path in paths:
        run = first._replace(model=load_model(path, args, args.device)[0])
        rows.append({"step": int(path.stem[5:])}
                    | score(args, run, args.cfg, args.cfg_interval, path.stem))
    charts = {key: {"": [(row["step"], row[key]) for row in rows]} for key in list(rows[0])[1:]}
    protocol = f"{first.protocol}; guidance {args.cfg:g} in {args.cfg_interval}"
    return Report({"rows": rows, "protocol": protocol}, [rows[0], *(row.values() for row in rows)],
                  {".png": line_chart(charts, "step")})


def cfg(args):
    """A sweep of guidance scale x interval. [Table 12]"""
    run = open_run(args, args.run)
    for scale in args.scales:
        check_guidance(run.model, scale)
    rows = [{"interval": list(interval), "scale": scale}
            | score(args, run, scale, interval, f"{scale:g} in {interval}")
            for interval in args.intervals for scale in args.scales]
    charts = {key: {f"{a:g}-{b:g}": [(r["scale"], r[key]) for r in rows if r["interval"] == [a, b]]
                    for a, b in args.intervals} for key in list(rows[0])[2:]}
    return Report({"rows": rows, "protocol": run.protocol}, [rows[0], *(row.values() for row in rows)],
                  {".png": line_chart(charts, "guidance scale")})


# --------------------------------------------- the command line ---------------------------------------------

def interval(text):
    """LOW:HIGH -> (low, high), for argparse."""
    low, high = map(float, text.split(":"))
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text}: 0 <= LOW <= HIGH <= 1 is needed")
    return low, high


def numbers(add, *rows):
    """Options with a number. rows: (name, type, default, help)."""
    for name, kind, default, text in rows:
        add(name, type=number(kind), default=default, help=f"{text} (default {default})")


def shared_options(parser, uses, argv):
    """The options of several commands. uses: which groups of them a command has."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    numbers(add, ("--seed", Seed, 0, "of everything that is drawn at random"))
    add("--out", help="the result is OUT.json, pictures are OUT*.png (default: in the run's folder or runs/)")
    if "data" in uses:
        add("--data", help="images: shapes, cifar10, a folder or an .npz file (default: those of the run)")
        add("--data-root", default="data", help="where cifar10 is looked for and downloaded to")
        numbers(add, ("--batch-size", Count, 50, "images at a time in each process"))
    if "features" in uses:
        add("--features", choices=("inception", "classifier", "efficientnet", *["none"] * ("none" in uses)),
            help="inception is FID's network; classifier: a small one trained on --data, where FID has no "
            "meaning; efficientnet: from a package (default inception; for the model in assets/ classifier)")
        add("--weights-dir", default="", help="folder with the pretrained weights")
        numbers(add, ("--classifier-steps", Count, 800, "of its training"))
        add("--cache", default="runs/cache", help="where it is kept (default runs/cache)")
    if "reference" in uses:
        add("--reference", help=".npz with images (arr_0) or statistics (mu, sigma, mu_s, sigma_s), as ADM's")
        numbers(add, ("--reference-images", Whole, 10_000, "of --data's training split; 0: all"))
    if "samples" in uses:
        add("run", help="run folder of train_diffusion.py, or a checkpoint")
        add("--gap", action="store_true", help="also the distance between samples and the tokenizer's "
            "reconstructions of reference images: what diffusion has not learned")
        add("--dtype", default="auto", help="of sampling: auto (bfloat16 where fast), float32, bfloat16")
        add("--sampler", choices=SAMPLERS, default="euler-maruyama")
        numbers(add, ("--num-images", Count, 1000, "samples per point; Table 12: 10000"),
                ("--steps", Count, 250, "[Table 8]"))
        add_extras(parser, argv)


def recon_options(add):
    """The options that only `recon` has. add: a parser's add_argument."""
    add("run", nargs="?", help="run of train_tokenizer.py, or a checkpoint (default: the model in assets/)")
    numbers(add, ("--size", Whole, 0, "px; 0: the tokenizer's"),
            ("--num-images", Count, 50_000, "test images at most"))
    add("--lpips", action=argparse.BooleanOptionalAction, help="default: with --features inception")


def generation_options(add):
    """The options that only `generation` has. add: a parser's add_argument."""
    add("samples", help=".npz of sample.py (arr_0 images, arr_1 labels) or a folder of images")
    add("--save-statistics", help="write the reference's statistics to this .npz, for --reference")
    add("--tokenizer", help="run of train_tokenizer.py, whose reconstructions are classified too")
    numbers(add, ("--test-images", Count, 2000, "real images to test the classifier on"))


def curve_options(add):
    """The options that only `curve` has. add: a parser's add_argument."""
    add("--null-class", action="store_true", help="samples of the null class, unguided [Table 5]")
    numbers(add, ("--cfg", Weight, 1.0, "guidance scale; 1: off, as in Fig. 5b"))
    add("--cfg-interval", type=number(Share), nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
        help="times, noise at 1, at which guidance acts (default 0 1)")


def cfg_options(add):
    """The options that only `cfg` has. add: a parser's add_argument."""
    add("--scales", type=number(Weight), nargs="+", default=[1.0, 1.5, 2.0, 3.0],
        help="of guidance (default 1 1.5 2 3)")
    add("--intervals", type=interval, nargs="+", default=[(0.0, 0.75), (0.0, 1.0)], metavar="LOW:HIGH",
        help="times, noise at 1, at which guidance acts (default 0:0.75 0:1)")


class Command(NamedTuple):
    """A command. A module with these three names can replace it: latent_space, and extras (find_extras)."""
    measure: object                   # args -> Report
    add_arguments: object             # add -> None; its own options
    USES: tuple                       # groups of shared_options


COMMANDS = {"recon": Command(recon, recon_options, ("data", "features", "none")),
            "generation": Command(generation, generation_options, ("data", "features", "reference")),
            "latents": latent_space,
            "curve": Command(curve, curve_options, ("data", "features", "reference", "samples")),
            "cfg": Command(cfg, cfg_options, ("data", "features", "reference", "samples"))}


def find_extras():
    """{name: first line of its docstring} of the extras that are commands: those with a measure(args)."""
    home = Path(__file__).parent
    texts = {path.stem: path.read_text(encoding="utf-8") for folder in common.EXTRAS
             for path in sorted((home / folder).glob("*.py"))}
    return {name: " ".join(text.split('"""')[1].splitlines()[0].split()) for name, text in texts.items()
            if re.search(r"^def measure\(args\)", text, re.M)}


def parse(argv):
    """(args, the command)."""
    raw = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = common.OneLineParser(description=__doc__, **raw)
    parsers, extras = parser.add_subparsers(dest="command", required=True), find_extras()
    asked, = (sys.argv[1:] if argv is None else argv)[:1] or [""]
    commands = COMMANDS | {name: common.find_extra(name) for name in extras if name == asked}
    for name, command in commands.items():
        text = command.measure.__doc__ or ""                               # python -OO leaves docstrings out
        sub = parsers.add_parser(name, help=text.split("\n\n")[0], description=text, **raw)
        sub.set_defaults(null_class=False)
        command.add_arguments(sub.add_argument)
        shared_options(sub, command.USES, argv)
    for name in [name for name in extras if name not in commands]:
        parsers.add_parser(name, help=extras[name])                                     # for --help alone
    args = parser.parse_args(argv)
    return args, commands[args.command]


def result_name(args):
    """OUT of a command: --out, without an ending that it gets here; else beside the samples, in the run's
    folder, or in runs/."""
    if args.out:
        return re.sub(r"\.(json|png)$", "", str(Path(args.out)), flags=re.I)
    if "samples" in args:
        return str(Path(args.samples))
    return str((run_folder(args.run) if getattr(args, "run", None) else Path("runs")) / args.command)


def write(args, report):
    """Write OUT.json, the pictures and the page of their folder. Then print the Report, the protocol last:
    `| head` may end the process there."""
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(f"{args.out}.json", {"command": args.command} | report.result)
    for ending, picture in report.pictures.items():
        files.write_png(f"{args.out}{ending}", picture)
    try:
        page = write_report(Path(args.out).parent)
    except UserError as e:
        page = f"no page: {e}"
    show = lambda cell: f"{cell:.4f}" if isinstance(cell, float) else str(cell)
    table = [[show(cell) for cell in row] for row in report.table]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(row, widths))))
    for name, value in report.result.items():
        if not isinstance(value, (list, dict)):
            print(printable(f"{name:40} {value if not isinstance(value, float) else round(value, 4)}"))
    print(f"wrote {', '.join(f'{args.out}{end}' for end in ('.json', *report.pictures))} and {page}")


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    args, command = parse(argv)
    if "features" in args and args.features is None:
        args.features = "classifier" if args.command == "recon" and not args.run else "inception"
    if args.device == "mps":
        raise UserError("--device mps: statistics need float64, which Apple GPUs lack; use cpu or cuda")
    args.rank, args.world, args.device = start_processes(args.device)
    # A distance must be right in its last printed digit: no 10-bit mantissas.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    files.check_writable(Path(result_name(args)).parent)
    if getattr(args, "save_statistics", None):
        files.check_writable(Path(args.save_statistics).parent, "--save-statistics")
    report = command.measure(args)
    if args.rank == 0:
        args.out = result_name(args)
        write(args, report)


if __name__ == "__main__":
    run(main)
