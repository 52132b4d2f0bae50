"""Which property of latents says, before a diffusion model is trained, how well it will draw?        [ours]

    python evaluate.py diffusability RUN ... --names "AE 0" ... --known study/results/study-sharp.json

RUNs of train_tokenizer.py, or what this command wrote of some. Scores of each, in about a minute:

probe              accuracy of a linear probe on the latents                            [Sec. 4.3, Fig. 5a]
mixture_nll        negative log-likelihood of K Gaussians on held-out latents            [App. B.3, Fig. 2a]
velocity_variance  velocity loss left by K Gaussians fitted in all dimensions: an upper bound of the variance
                   that no model can remove                     [after 2606.03578, whose estimator differs]
over_gaussian      that loss over the loss that one Gaussian leaves
effective_rank     exp(entropy of the covariance's spectrum) over the number of latent values
spatial            cosine similarity of near patches less that of far ones, before the encoder's last block,
                   which no loss trains at the patches                       [LDS of 2512.10794; radii ours]
perturbed          Fréchet distance from images to reconstructions from noisy latents     [pFID, 2509.12474]
psnr               of reconstructions, for comparison

With --known, a study's results, each score's rank correlation with the distances and gaps of samples that
the same rows and seeds had there; a name is a row's and a seed. Seeds of a row are alike: intervals are over
rows, and every third row is held out.
"""
import json
from pathlib import Path

# before torch, see runtime/processes.py
from common import Count, Positive, UserError, number, sample_rng, standard_normal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import metrics
from cache import posterior_rngs
from data import to_float, to_uint8
from measures.features import Report, collect, feature_network, frechet_between
from measures.image_sets import batches, gather, open_data, open_tokenizer, without_classes
from measures.latent_space import probe_accuracy

USES = ("data", "features")
PAGE = ["Which latents will diffusion learn?", "ours; Sec. 2",
        "Rank correlations with the samples' distances. One of size 1 would name the best tokenizer without "
        "training a diffusion model; the interval says how far few tokenizers support it."]
NEAR, FAR = 0.25, 0.5                 # radii of `spatial`, in image widths
TIMES = 10                            # of velocity_variance: the middles of as many equal parts of [0, 1]
NLL_DIMS = 32                         # of mixture_nll, which compares at equal numbers alone
# What a study's results call the outcomes: less is better.
OUTCOMES = {"distance, ImageNet": "distance imagenet cfg 1", "gap, ImageNet": "gap imagenet cfg 1",
            "distance, classifier": "distance stage2 cfg 1", "gap, classifier": "gap stage2 cfg 1"}


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("runs", nargs="+", help="runs or checkpoints of train_tokenizer.py, or JSON files of this command")
    add("--names", nargs="+", help="what to call the runs (default: their paths); with --known a row and a "
        "seed: 'AE 0'")
    add("--known", help="JSON of study.study, with the distances and gaps of the same rows and seeds")
    add("--train-images", type=number(Count), default=8000, help="(default 8000)")
    add("--test-images", type=number(Count), default=2000, help="held out (default 2000)")
    add("--components", type=number(Count), default=20, help="K (default 20)")
    add("--noise", type=number(Positive), default=0.3, help="of `perturbed`, for latents of unit variance "
        "(default 0.3)")


# -------------------------------------------------- scores --------------------------------------------------

def mixture_velocity_loss(mixture, x, rng):
    """Mean squared error of a latent value's velocity, over uniform times of the linear path, by what would
    be the best prediction if latents x (n, d) had this mixture of Gaussians with diagonal covariances.

    Given component k, x_t = (1 - t) x + t eps has the mean (1 - t) mu_k, the variance (1 - t)^2 s_k + t^2 and
    the covariance t - (1 - t) s_k with the velocity eps - x, whose mean is -mu_k; the prediction weighs the
    components by their probability given x_t. rng: numpy Generator of eps.
    """
    total, (weights, means, variances) = 0.0, mixture
    for t in (np.arange(TIMES) + 0.5) / TIMES:
        eps = torch.from_numpy(rng.standard_normal(x.shape))
        x_t = (1 - t) * x + t * eps
        seen = metrics.GaussianMixture(weights, (1 - t) * means, (1 - t) ** 2 * variances + t ** 2)
        chances = torch.cat(list(metrics.log_joint(seen, x_t)), 1).softmax(0).T                     # (n, K)
        slope = (t - (1 - t) * variances) / seen.covariances                                        # (K, d)
        # sum_k p(k | x_t) (slope_k (x_t - seen mean_k) - mu_k), without an array (n, K, d)
        predicted = x_t * (chances @ slope) - chances @ (slope * seen.means + means)                # (n, d)
        total += (eps - x - predicted).square().mean().item() / TIMES
    return total


def velocity_losses(x, held_out, K, seed):
    """mixture_velocity_loss on held-out latents (m, d) of K Gaussians and of one, fitted to latents x (n, d):
    along the axes of the PCA, where a diagonal covariance is the full one."""
    mean, axes, _ = metrics.pca(x, dims=x.shape[1])
    z, test = ((v.double() - mean) @ axes for v in (x, held_out))
    scale = z.std(0)                                        # EM's small regularisation is for unit variance
    losses = []
    for components in (K, 1):
        mixture, _ = metrics.fit_mixture(z / scale, components, full=False, starts=1, seed=seed)
        mixture = metrics.GaussianMixture(mixture.weights, mixture.means * scale,
                                          mixture.covariances * scale ** 2)
        losses.append(mixture_velocity_loss(mixture, test, np.random.default_rng(seed)))
    return losses


def effective_rank(x):
    """exp(entropy of the shares of variance along the PCA's axes) / d, in (0, 1], of x (n, d)."""
    shares = torch.linalg.eigvalsh(torch.cov(x.double().T)).clamp(min=0)
    shares = shares / shares.sum()
    return (torch.special.entr(shares).sum().exp() / len(shares)).item()


def near_less_far(tokens, grid):
    """Mean cosine similarity of pairs of patches nearer than NEAR, less that of pairs at FAR or further, in
    image widths: tokens (B, N, D) of a grid (rows, columns) -> (B,). UserError where no pair is near."""
    places = torch.cartesian_prod(*(torch.arange(n) / n for n in grid)).to(tokens)                  # (N, 2)
    distance = (places[:, None] - places).norm(dim=-1)
    near, far = ((distance > 0) & (distance < NEAR + 1e-6)).float(), (distance > FAR - 1e-6).float()
    if not near.any():
        raise UserError(f"a grid of {grid[0]} x {grid[1]} patches is too coarse for `spatial`, which takes "
                        "patches a quarter of the image apart: take smaller patches")
    unit = F.normalize(tokens, dim=-1)
    similarity = unit @ unit.mT                                                                  # (B, N, N)
    mean = lambda pairs: (similarity * pairs).sum((1, 2)) / pairs.sum()
    return mean(near) - mean(far)


def patch_outputs(tokenizer, x, rngs=None):
    """(latents (B, L, C), what the encoder's last block gets at the patches (B, N, D), their grid) of images
    x. rngs: of a KL-VAE's posterior."""
    seen, grid = [], tokenizer.grid(x.shape[-2:])
    hook = tokenizer.encoder.transformer.blocks[-1].register_forward_pre_hook(
        lambda block, inputs: seen.append(inputs[0]))
    latents = tokenizer.encode(x, normalize=True, rngs=rngs)
    hook.remove()
    # Latent tokens are behind the patches; the authors' encoder has a class token before them.
    count, c = grid[0] * grid[1], tokenizer.config
    first = seen[0].shape[1] - count - (c.num_latents if c.learnable_latents else 0)
    return latents, seen[0][:, first:first + count], grid


def encode(args, tokenizer, images, title):
    """(latents (n, L C), near_less_far (n,), labels (n,)) of Images."""
    latents, spatial = [], []
    for indices, x in batches(images, args, title):
        rngs = posterior_rngs(tokenizer, indices)
        h, tokens, grid = patch_outputs(tokenizer, to_float(x.to(args.device)), rngs)
        latents.append(h.flatten(1).cpu())
        spatial.append(near_less_far(tokens, grid).cpu())
    return gather(torch.cat(latents), args), gather(torch.cat(spatial), args), torch.from_numpy(images.labels)


def of_tokenizer(args, run):
    """{score: value} of the tokenizer of one run; None in processes other than rank 0, which only help."""
    tokenizer, data = open_tokenizer(args, run)
    size = tokenizer.config.image_size
    train, test = (open_data(args, data, split, size, count)
                   for split, count in (("train", args.train_images), ("test", args.test_images)))
    (x, _, y), (held_out, spatial, truth) = (encode(args, tokenizer, images, f"{run}: {split}")
                                             for images, split in ((train, "train"), (test, "test")))
    if not (x.isfinite().all() and held_out.isfinite().all()):
        raise UserError(f"the latents of {run} hold NaN or infinite values: its training has failed")
    if without_classes(train, "") or without_classes(test, ""):
        raise UserError(f"the probe needs classes, which --data {data} lacks")
    if len(x) <= x.shape[1]:
        raise UserError(f"--train-images {len(x)}: {x.shape[1]} latent values need more")
    network, _ = feature_network(args, data, size)
    psnr = []

    def reconstructions(noise):
        for indices, images in batches(test, args, "decoding"):
            h = held_out[list(indices)].unflatten(1, (-1, tokenizer.config.latent_dim))
            # whichever process draws it
            rngs = [sample_rng(args.seed, "perturb", 0, i) for i in indices]
            h = h + noise * standard_normal(rngs, h.shape[1:])
            pictures = to_uint8(tokenizer.decode(h.to(args.device), (size, size), normalized=True))
            if not noise:
                psnr.append(metrics.psnr(images.to(args.device), pictures).cpu())
            yield indices, pictures

    real, clean, noisy = (collect(args, network, stream).pool for stream in
                          (batches(test, args, "images"), reconstructions(0.0), reconstructions(args.noise)))
    psnr = gather(torch.cat(psnr), args).mean().item()
    if args.rank > 0:
        return None
    probed, probed_test = metrics.standardise(x, held_out)
    mean, axes, _ = metrics.pca(x, dims=min(NLL_DIMS, x.shape[1]))
    z, z_test = metrics.standardise(*((v.double() - mean) @ axes for v in (x, held_out)))
    mixture, _ = metrics.fit_mixture(z, args.components, full=False, starts=1, seed=args.seed)
    variance, gaussian = velocity_losses(x, held_out, args.components, args.seed)
    return {"probe": probe_accuracy(probed, y, probed_test, truth),
            "mixture_nll": metrics.negative_log_likelihood(mixture, z_test).mean().item(),
            "velocity_variance": variance, "over_gaussian": variance / gaussian,
            "effective_rank": effective_rank(x), "spatial": spatial.mean().item(),
            "perturbed": frechet_between(real, noisy), "psnr": psnr,
            "reconstructed": frechet_between(real, clean)}


# -------------------------------------------- what they predict --------------------------------------------

def read_scores(path):
    """({name: {score: value}}, settings) of a JSON file that this command wrote. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text())
        if not found["scores"]:
            raise ValueError
        return {name: dict(values) for name, values in found["scores"].items()}, found["settings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a JSON file of evaluate.py diffusability ({type(e).__name__})") from e


def gather_scores(args):
    """({name: {score: value}} of all that `runs` names, settings). Raises UserError where two have the same
    name, or other settings."""
    runs = [run for run in args.runs if not run.endswith(".json")]
    names, found = args.names or runs, {}
    if len(names) != len(runs) or len(set(names)) < len(names):
        raise UserError(f"--names: {len(runs)} runs need as many different names")
    own = (f"{args.train_images} training and {args.test_images} test images at most; of a KL-VAE, posterior "
           f"samples; {args.components} Gaussians, diagonal, one start; noise {args.noise:g}; features "
           f"{args.features}; seed {args.seed}")
    settings = {own} if runs else set()
    for path in args.runs:
        if path not in runs:
            scores, measured = read_scores(path)
            if twice := [name for name in scores if name in found or name in names]:
                raise UserError(f"{path} has {twice[0]!r}, which is given already")
            found, settings = found | scores, settings | {measured}
    if len(settings) > 1:
        raise UserError("scores of different settings do not compare: " + " | ".join(sorted(settings)))
    if args.known:                                                               # before the work starts
        read_known(args.known, [*found, *names])
    found |= {name: of_tokenizer(args, run) for name, run in zip(names, runs)}
    return found, settings.pop()


def read_known(path, names):
    """{outcome: [value of each name]} of a study's results. Raises UserError for a missing row or seed."""
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        units = {f"{row} {seed}": dict(found) for row, seeds in rows.items() for seed, found in seeds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--known {path} is not a JSON file of study.study ({type(e).__name__})") from e
    if missing := [name for name in names if name not in units]:
        raise UserError(f"--known {path} has no {missing[0]!r}; it has {', '.join(units)}")
    return {outcome: [units[name].get(key, np.nan) for name in names] for outcome, key in OUTCOMES.items()}


def rank_correlation(x, y):
    """Spearman's, of two arrays; NaN where one of them does not vary."""
    return float(spearmanr(x, y).statistic) if min(len(set(x)), len(set(y))) > 1 else np.nan


def correlations(scores, outcomes, names, seed=0, draws=2000):
    """Spearman's rank correlation of each score with each outcome over tokenizers.

    scores, outcomes: {name: [value per tokenizer]}, outcomes with NaN where one was not measured; names: of
    the tokenizers, a row and a seed. Returns [{"outcome", "score", "tokenizers", "correlation", "low", "high"
    (of 95 % of bootstrap samples of rows), "chosen" (without every third row), "held_out" (every third)}],
    for outcomes of at least six tokenizers and scores that vary.
    """
    rows, found = [name.rsplit(" ", 1)[0] for name in names], []
    distinct = list(dict.fromkeys(rows))
    held_out = np.isin(rows, distinct[2::3])
    rng = np.random.default_rng(seed)
    members = {row: [i for i, own in enumerate(rows) if own == row] for row in distinct}
    resampled = [[i for row in rng.choice(distinct, len(distinct)) for i in members[row]]
                 for _ in range(draws)]
    for outcome, values in outcomes.items():
        y = np.array(values, float)
        there = np.isfinite(y)
        if there.sum() < 6:
            continue
        for score, values in scores.items():
            x = np.array(values, float)
            rank = lambda index: rank_correlation(x[index], y[index])
            if np.isnan(rank(there)):
                continue
            samples = [rank([i for i in index if there[i]]) for index in resampled]
            low, high = np.nanquantile(samples, (0.025, 0.975)).tolist()
            row = {"correlation": rank(there), "low": low, "high": high,
                   "chosen": rank(there & ~held_out), "held_out": rank(there & held_out)}
            found.append({"outcome": outcome, "score": score, "tokenizers": int(there.sum())}
                         | {key: None if np.isnan(value) else value for key, value in row.items()})
    return found


@torch.no_grad()
def measure(args):
    """Scores of tokenizers' latents, and how they rank the samples of a study. [ours]"""
    found, settings = gather_scores(args)
    if args.rank > 0:
        return None
    outcomes = read_known(args.known, list(found)) if args.known else {}
    scores = {key: [values[key] for values in found.values()] for key in next(iter(found.values()))}
    rows = correlations(scores, outcomes, list(found), args.seed)
    protocol = settings + (f"; samples of {args.known}" if args.known else "")
    table = [("tokenizer", *scores), *((name, *values.values()) for name, values in found.items())]
    for row in [tuple(rows[0]), *(tuple(row.values()) for row in rows)] if rows else ():
        table.append(row + ("",) * (len(table[0]) - len(row)))
    return Report({"scores": found, "settings": settings, "correlations": rows, "protocol": protocol,
                   "page": PAGE}, table)
