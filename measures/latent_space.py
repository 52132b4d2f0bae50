"""evaluate.py latents: linear probe, Gaussian mixtures and pictures of the latents of tokenizers.
                                                                    [Sec. 2, 4.3, App. B.3, Fig. 2a, 4, 8]

Three views of one question: how structured is the latent space? A linear probe says how much of the class can
be read off by a hyperplane. The likelihood of held-out latents under mixtures of K Gaussians says how many
modes they need (Theorem 2.1: fewer modes are learned from fewer samples). The picture shows both.
"""
import argparse
import importlib.util
import math

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from cache import posterior_rngs
from common import Count, Range, UserError, Whole, number
from data import to_float
from measures.features import Report
from measures.image_sets import batches, gather, open_data, open_tokenizer, without_classes
from pictures.draw import line_chart, scatter_chart
from runtime.processes import barrier

USES = ("data",)


def add_arguments(add):
    """The options of `evaluate.py latents`."""
    add("runs", nargs="+", help="runs or checkpoints of train_tokenizer.py")
    add("--names", nargs="+", help="what to call them in tables and charts (default: their paths)")
    add("--components", type=number(Count), nargs="+", default=[1, 5, 10, 20, 50],
        help="K (default 1 5 10 20 50; paper: up to 200)")
    add("--train-images", type=number(Count), default=10_000, help="for probe and mixtures (default 10000)")
    add("--test-images", type=number(Count), default=2000, help="held out (default 2000)")
    add("--variance", type=Range(float, 0, 1, low_open=True), default=0.9,
        help="fraction that PCA keeps [App. B.3] (default 0.9)")
    add("--dims", type=number(Whole), default=0,
        help="keep exactly so many dimensions instead; NLL compares at equal numbers only")
    add("--starts", type=number(Count), default=2, help="EM runs per mixture, the best counts (default 2)")
    add("--iterations", type=number(Count), default=100, help="EM steps per run at most (default 100)")
    add("--full", action=argparse.BooleanOptionalAction, default=True, help="mixtures with full covariances "
        "beside diagonal ones; --no-full for many dimensions (default: full)")
    add("--pixels", action="store_true", help="a linear probe on the raw pixels too, for comparison")
    add_umap(add)


@torch.no_grad()
def measure(args):
    """Linear probe, Gaussian mixtures and a picture of tokenizers' latents. [Sec. 4.3, Fig. 2a, 4, 8]"""
    check_umap(args.umap)
    names = args.names or args.runs
    if not len(set(names)) == len(names) == len(args.runs):
        raise UserError(f"--names: {len(args.runs)} runs need as many different names")
    found = {}
    for name, path in zip(names, args.runs):
        found[name] = of_tokenizer(args, name, path)
        barrier()                                            # rank 0 fits for longer than a collective waits
    if args.rank > 0:
        return None
    result, table = {name: numbers for name, (numbers, _, _) in found.items()}, [
        ("tokenizer", "probe", "dims", "K", "NLL full", "NLL diagonal", "NLL full, train", "mean norm")]
    for name, numbers in result.items():
        table += [(name, numbers.get("linear_probe_accuracy", "-"), numbers["dims"], row["K"],
                   *(row.get(key, "-") for key in ("nll_full", "nll_diagonal", "nll_full_train",
                                                   "largest_mean_norm_full")))
                  for row in numbers["mixtures"]]
    dims = sorted({numbers["dims"] for numbers in result.values()})
    here = (f"here all have d = {dims[0]}" if len(dims) == 1 else
            f"here d differs ({', '.join(map(str, dims))}): give --dims {dims[0]}")
    kept = f"{args.dims} dimensions" if args.dims else f"{args.variance:.0%} of the variance"
    notes = {"caveat": "NLL curves compare at equal d only, and at K = 1 the standardised NLL is about "
                       f"d/2 (1 + ln 2 pi) for any latents: {here}",
             "protocol": f"{args.train_images} training and {args.test_images} test images at most, centre "
                         "crop, no flip; EMA weights, float32; of a KL-VAE, posterior samples; probe: "
                         f"L-BFGS, C = 1, standardised; mixtures: PCA to {kept}, standardised, "
                         f"{args.starts} starts, NLL in nats on the test images; seed {args.seed}"}
    kinds = ("full", "diagonal") if args.full else ("diagonal",)
    charts = {f"NLL, {kind} covariance": f"nll_{kind}" for kind in kinds}
    charts[f"largest mean norm ({kinds[0]})"] = f"largest_mean_norm_{kinds[0]}"
    charts = {title: {name: [(row["K"], row[key]) for row in numbers["mixtures"]]
                      for name, numbers in result.items()} for title, key in charts.items()}
    legend = found[names[0]][2]
    if any(classes != legend for _, _, classes in found.values()):                # each with its own --data
        legend = []
    views = {title: view for _, pictures, _ in found.values() for title, view in pictures.items()}
    return Report(result | notes, table, {"_mixtures.png": line_chart(charts, "K", log_x=True),
                                          "_classes.png": scatter_chart(views, legend)})


# --------------------------------------------- of one tokenizer ---------------------------------------------

def encode_set(args, tokenizer, images, title):
    """(latents (n, L C), labels (n,), pixels (n, 3 H W), or (n, 0) without --pixels) of image_sets.Images. An
    image is one vector here: its L tokens of C channels."""
    width = math.prod(tokenizer.config.latent_shape())
    encoded, raw = [torch.empty(0, width)], [torch.empty(0, 3 * images.size ** 2 if args.pixels else 0)]
    for indices, x in batches(images, args, title):
        h = tokenizer.encode(to_float(x.to(args.device)), rngs=posterior_rngs(tokenizer, indices))
        encoded.append(h.flatten(1).cpu())                                                          # (B, L*C)
        raw.append(to_float(x).flatten(1) if args.pixels else torch.empty(len(x), 0))
    return gather(torch.cat(encoded), args), torch.from_numpy(images.labels), gather(torch.cat(raw), args)


def first_classes(images, classes=10, count=1000):
    """Up to `count` images of the first ten classes that occur, for the picture: among 2,000 images from
    1,000 classes there are only 20. Images without a class (-1) count as one."""
    first = np.unique(images.labels)[:classes]
    chosen = np.flatnonzero(np.isin(images.labels, first))[:count]
    return images._replace(labels=images.labels[chosen], read=lambda index: images.read(chosen[index]))


def probe_accuracy(x, y, test_x, test_y):
    """Accuracy on test vectors of a linear probe fitted to training vectors. [Sec. 4.3]"""
    weight, bias = metrics.linear_probe(x, y, int(y.max()) + 1)
    return ((test_x @ weight + bias).argmax(1) == test_y).double().mean().item()


def mixture_rows(args, name, z, z_test):
    """Mixtures of K Gaussians fitted to z (n, d), and their likelihood on z_test: a dict per K. [App. B.3]"""
    rows = []
    for K in args.components:
        rows.append({"K": K})
        for kind in ("full", "diagonal") if args.full else ("diagonal",):
            with tqdm(desc=f"{name}: {K} components, {kind}", unit="step") as bar:
                mixture, train = metrics.fit_mixture(z, K, kind == "full", args.starts, args.iterations,
                                                     seed=args.seed, progress=bar)
            rows[-1] |= {f"nll_{kind}": metrics.negative_log_likelihood(mixture, z_test).mean().item(),
                         f"nll_{kind}_train": -train,
                         f"largest_mean_norm_{kind}": mixture.means.norm(dim=1).max().item()}
    return rows


def of_tokenizer(args, name, run):
    """(numbers, {title: (points, classes)} for pictures, class names) of the tokenizer of one run; None in
    processes other than rank 0, which only encode. name: for tables and charts."""
    tokenizer, data = open_tokenizer(args, run)
    size = tokenizer.config.image_size
    tests = open_data(args, data, "test", size, 0)
    sets = {"train": open_data(args, data, "train", size, args.train_images),
            "test": tests._replace(labels=tests.labels[:args.test_images]), "picture": first_classes(tests)}
    (x, y, raw), (held_out, truth, raw_test), (drawn, its_class, _) = (
        encode_set(args, tokenizer, images, f"{split} latents") for split, images in sets.items())
    if args.rank > 0:
        return None
    if not (x.isfinite().all() and held_out.isfinite().all()):
        raise UserError(f"the latents of {run} hold NaN or infinite values: its training has failed")
    numbers = {"tokenizer": run, "latent_values": x.shape[1]}

    # ---- linear probe on standardised, flattened latents [Sec. 4.3] ----
    # Standardised, because the penalty on the probe's weights must not depend on a channel's unit.
    probe_x, probe_test, probe_drawn = metrics.standardise(x, held_out, drawn)
    missing = (without_classes(sets["train"], "linear probe") or without_classes(sets["test"], "linear probe")
               or ({} if y.max() > 0 else {"left_out": f"linear probe: {data} has one class"}))
    if missing:
        numbers |= missing
        print(f"{name}: left out, {missing['left_out']}")
    else:
        numbers["linear_probe_accuracy"] = probe_accuracy(probe_x, y, probe_test, truth)
        if args.pixels:
            raw, raw_test = metrics.standardise(raw, raw_test)
            numbers["pixel_probe_accuracy"] = probe_accuracy(raw, y, raw_test, truth)
            print(f"{name}: a linear probe on the pixels themselves: {numbers['pixel_probe_accuracy']:.4f}")

    # ---- mixtures: flatten, PCA, standardise, fit; likelihood of other latents [App. B.3] ----
    # In all L * C dimensions a full covariance has more entries than there are images: hence the PCA.
    mean, axes, held = metrics.pca(x, args.variance, args.dims)
    z, z_test, z_drawn = metrics.standardise(*((v.double() - mean) @ axes for v in (x, held_out, drawn)))
    numbers |= {"dims": z.shape[1], "variance_held": held, "mixtures": mixture_rows(args, name, z, z_test)}

    # ---- the picture: test latents, in directions that were found on training latents ----
    views = class_views(z, y, z_drawn) | ({"UMAP": umap_2d(probe_drawn)} if args.umap else {})
    occurring, colours = its_class.unique(return_inverse=True)
    pictures = {f"{name}, test latents: {view}": (points, colours.tolist()) for view, points in views.items()}
    return numbers, pictures, [tests.classes[c] if c >= 0 else "no class" for c in occurring.tolist()]


# -------------------------------------------- in two dimensions --------------------------------------------

UMAP_INSTALLED = importlib.util.find_spec("umap") is not None


def add_umap(add):
    """The option --umap."""
    add("--umap", action=argparse.BooleanOptionalAction, default=UMAP_INSTALLED,
        help="draw by UMAP too [Fig. 4] (default: where the package umap-learn is installed)")


def check_umap(wanted):
    """Refuse --umap without the package, before the work starts. Raises UserError."""
    if wanted and not UMAP_INSTALLED:
        raise UserError("this needs a package that the project does not: pip install umap-learn; "
                        "or leave --umap out")


def umap_2d(x, seed=0):
    """Vectors (n, d) -> (n, 2) numpy. [Fig. 4]"""
    from umap import UMAP
    return UMAP(random_state=seed).fit_transform(x.numpy())


def class_views(z, y, drawn):
    """{title: points (m, 2)} of test latents `drawn` (m, d), in directions found on training latents z (n, d)
    with classes y (n,): discriminants, or PCA's first two axes where there are fewer than three classes."""
    if len(y.unique()) > 2:
        drawn, title = drawn @ discriminant_axes(z, y), "directions that separate training classes"
    else:
        title = "PCA"
    return {title: np.asarray(F.pad(drawn, (0, 1))[:, :2])}                                      # d may be 1


def discriminant_axes(x, y, count=2):
    """Fisher's linear discriminants of x (n, d) with classes y (n,) ints: (d, count) float64. Along these
    directions class means are furthest apart, relative to the spread within classes, which is 1 along each.

    With C classes there are at most C - 1. The within-class covariance gets 1e-3 of its mean variance on the
    diagonal: with few vectors it is singular, and directions without spread would win.
    """
    x, classes = x.double(), y.unique()
    means = torch.stack([x[y == c].mean(0) for c in classes])                                   # (C, d)
    within = sum((rows := x[y == c] - mean).T @ rows for c, mean in zip(classes, means)) / len(x)
    shares = torch.stack([(y == c).double().mean() for c in classes])
    centred = (means - shares @ means) * shares.sqrt()[:, None]
    within += max(1e-3 * within.diagonal().mean().item(), 1e-9) * torch.eye(len(within), dtype=torch.float64)
    _, axes = scipy.linalg.eigh((centred.T @ centred).numpy(), within.numpy())                  # ascending
    return torch.from_numpy(axes[:, ::-1][:, :count].copy())
