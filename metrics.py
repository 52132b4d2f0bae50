"""What is measured, as mathematics: no networks, files or command lines here.

    frechet_distance                        FID and sFID, of the features' Gaussians      [Sec. 4.1]
    inception_score, precision_recall       beside FID in ADM's evaluation suite          [Tables 2, 10]
    psnr, ssim                              reconstructions, image by image               [Table 4]
    standardise, pca, linear_probe          the latent space                              [Sec. 4.3, App. B.3]
    GaussianMixture, fit_mixture            EM for Gaussian mixtures                      [Fig. 2a, 8]

Sums and factorisations are in float64, distances of features in float32.
Letters: n vectors · d dimensions · K mixture components.
"""
import math
from typing import NamedTuple

from runtime.processes import UserError    # before torch, see there

import numpy as np
import scipy                               # its parts load when they are used
import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------- Fréchet distance --------------------------------------------

def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians; FID, if the features are Inception's.
    m: (d,), C: (d, d) float64.

    C1 C2 has the eigenvalues of the symmetric A^T C2 A for any A with A A^T = C1, and the trace of its root
    is the sum of their roots. A is a Cholesky factor with pivoting, which stops at the rank of C1: singular
    covariances need no epsilon on the diagonal. At d = 2048, 4 to 8 times faster than sqrtm.
    """
    mean1, covariance1, mean2, covariance2 = (x.double().numpy() for x in
                                              (mean1, covariance1, mean2, covariance2))
    if mean1.shape != mean2.shape:
        raise UserError(f"statistics of {len(mean1)} and of {len(mean2)} features cannot be compared")
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance1, lower=1)      # P^T C1 P = L L^T
    L, order = np.tril(factor)[:, :rank], pivots - 1
    product = L.T @ covariance2[np.ix_(order, order)] @ L                                           # (r, r)
    trace = np.sqrt(scipy.linalg.eigvalsh(product).clip(0)).sum() if rank else 0.0
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * trace
    return max(float(distance), 0.0)                                 # rounding may leave it at -1e-9


# ------------------------------------ Inception Score, precision, recall ------------------------------------

def inception_score(logits: Tensor, chunk: int = 5000) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)), averaged over chunks in file order, as in ADM's suite. The score
    grows with the chunk. logits: (n, classes) *without* the last layer's bias, as is customary.
    Returns (mean, standard deviation over chunks)."""
    scores = []
    for part in logits.split(chunk):
        log_p = part.double().log_softmax(1)
        marginal = log_p.exp().mean(0)
        divergence = log_p.exp() * (log_p - marginal.log())
        scores.append(divergence.nan_to_num().sum(1).mean().exp())                               # 0 log 0 = 0
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def few_classes_at_once(labels: Tensor, chunk: int = 5000) -> bool:
    """Whether the first chunk of labels (n,) lacks many of the classes, as where samples are sorted by class:
    their Inception Score is then of fewer classes than they have. -1, no label, says nothing."""
    return len(labels[:chunk].unique()) < 0.75 * len(labels.unique())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Precision and recall of Kynkäänniemi et al. (2019), as in ADM's suite. real, fake: features (n, d).

    A set's manifold is the union of balls around its points, each with the distance to the k-th neighbour in
    the set as its radius. Precision: the fraction of fakes in the reals' manifold (<=); recall: the reverse.
    `block` rows at a time, so that an n x n matrix is never in memory.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"too few images: precision and recall with {k} neighbours need more than {k} "
                        f"on both sides, here are {len(real)} and {len(fake)}")
    # Centred: far from the origin |a|^2 + |b|^2 - 2 ab is a small difference of large numbers.
    centre = real.double().mean(0)
    real, fake = ((x.double() - centre).float() for x in (real, fake))
    # Equal distances (of duplicate images, say) must count, so what rounding may have parted is equal: radii
    # are computed a little larger, distances a little smaller. A float32 product ab of d terms is off by less
    # than 6 sqrt(d) 2^-24 |a||b|, all but once in 3e7 (Ipsen and Zhou 2020); 4 more for the sums.
    rounding = (6 * math.sqrt(real.shape[1]) + 4) * 2 ** -24
    squares = lambda x, factor: (x.double().square().sum(1) * factor).float()

    def squared_radii(points):
        norms, radii = squares(points, 1 + rounding), []
        for start in range(0, len(points), block):
            distances = torch.addmm(norms, points[start:start + block], points.T, alpha=-2)
            distances.diagonal(start).fill_(math.inf)                                             # not itself
            radii.append(distances.topk(k, largest=False).values[:, -1] + norms[start:start + block])
        return torch.cat(radii)

    norms, reach = squares(real, 1 - rounding), squared_radii(real)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, norm, radius in zip(*(x.split(block) for x in
                                    (fake, squares(fake, 1 - rounding), squared_radii(fake)))):
        distances = torch.addmm(norms, part, real.T, alpha=-2) + norm[:, None]                 # of all pairs
        precise += (distances <= reach).any(1).sum().item()
        recalled |= (distances <= radius[:, None]).any(0)
    return precise / len(fake), recalled.double().mean().item()


# ---------------------------------------------- PSNR and SSIM -----------------------------------------------

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, data range 1: uint8 (B, 3, H, W) twice -> (B,) float64.
    Equal images get 100 dB, not infinity, so that means stay finite."""
    error = (a.double() - b.double()).div(255).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image: uint8 (B, 3, H, W) twice, read as [0, 1] -> (B,) float64.

    7 x 7 uniform window, sample covariance, per channel, no border: scikit-image's defaults. data_range 1.0
    is right for [0, 1]; the released code passes 2.0, which makes both constants 4 times larger and the
    result higher. Compare at the same value only.
    """
    if min(a.shape[-2:]) < 7:
        raise UserError(f"SSIM's window is 7 x 7: images of {a.shape[-2]} x {a.shape[-1]} px are too small")
    a, b = a.double() / 255, b.double() / 255
    mean = lambda x: F.avg_pool2d(x, 7, stride=1)                          # windows that lie within the image
    sample = 49 / 48
    ma, mb = mean(a), mean(b)
    va, vb, cov = (sample * (mean(x) - m) for x, m in ((a * a, ma * ma), (b * b, mb * mb), (a * b, ma * mb)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))
    return similarity.mean((1, 2, 3))


# --------------------------------------------- the latent space ---------------------------------------------

def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Shift and scale each column of tensors (n, d) to mean 0 and variance 1 *of train*; constant columns are
    only shifted."""
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return [((x - mean) / std).to(train.dtype) for x in (train, *others)]


def pca(x: Tensor, fraction: float = 0.9, dims: int = 0) -> tuple[Tensor, Tensor, float]:
    """Principal axes of x (n, d) that hold `fraction` of its variance, or exactly `dims` axes.     [App. B.3]

    Returns mean (d,), axes (d, m) and the fraction that they hold; (x - mean) @ axes projects. The smaller of
    the d x d and n x n eigenproblems is solved; X^T maps the eigenvectors of the latter to axes.
    """
    if dims > min(x.shape[1], len(x) - 1):
        raise UserError(f"{dims} dimensions cannot be had from {len(x)} latents of {x.shape[1]} values")
    x = x.double()
    mean = x.mean(0)
    x = x - mean
    if len(x) >= x.shape[1]:
        variances, axes = torch.linalg.eigh(x.T @ x)
    else:
        variances, axes = torch.linalg.eigh(x @ x.T)
        axes = F.normalize(x.T @ axes, dim=0)
    variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)                          # largest first
    held = variances.cumsum(0) / variances.sum()
    dims = dims or min(int((held < fraction).sum()) + 1, len(held))
    return mean, axes[:, :dims], held[dims - 1].item()


def linear_probe(x: Tensor, labels: Tensor, num_classes: int, strength: float = 1.0,
                 iterations: int = 300) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: weight (d, classes) and bias (classes,).         [Sec. 4.3]

    Minimises mean cross-entropy + |weight|^2 / (2 n strength), where strength is scikit-learn's C.
    x: (n, d) standardised float; labels: (n,) int64. A test image's class is (x @ weight + bias).argmax(1).
    """
    n, d = x.shape
    target = F.one_hot(labels, num_classes).to(x.dtype)

    def loss_and_gradient(flat):
        wb = torch.from_numpy(flat).to(x.dtype).reshape(d + 1, num_classes)
        log_p = (x @ wb[:-1] + wb[-1]).log_softmax(1)
        residual = (log_p.exp() - target) / n                                       # (n, classes): dL/dlogits
        gradient = torch.cat(((residual.T @ x).T + wb[:-1] / (n * strength), residual.sum(0, keepdim=True)))
        loss = -(log_p * target).sum() / n + wb[:-1].square().sum() / (2 * n * strength)
        return loss.item(), gradient.double().flatten().numpy()

    flat = scipy.optimize.minimize(loss_and_gradient, np.zeros((d + 1) * num_classes), jac=True,
                                   method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-6}).x
    wb = torch.from_numpy(flat).to(x.dtype).reshape(d + 1, num_classes)
    return wb[:-1], wb[-1]


# -------------------------------------------- Gaussian mixtures ---------------------------------------------

class GaussianMixture(NamedTuple):
    """A mixture of K Gaussians, float64."""
    weights: torch.Tensor             # (K,), sum 1 (the released code does not normalise them)
    means: torch.Tensor               # (K, d)
    covariances: torch.Tensor         # (K, d, d) full, or (K, d) diagonal


REGULARISATION = 1e-6                 # added to variances, as in scikit-learn: keeps them above 0
BLOCK = 2 ** 21                       # numbers of T at a time, so that they stay in the processor's cache


def sufficient_statistics(x: Tensor, full: bool) -> Tensor:
    """T(x) of the Gaussian family, a column per vector: (b, d) -> (m, b). The d values, then the products
    x_i x_j with j >= i (full; m = d + d(d+1)/2), or the squares (m = 2d). The log-density is linear in T: one
    matrix product gives it for all K components."""
    T = x.T.contiguous()                                                                          # (d, b)
    return torch.cat((T, *(T[i:] * T[i] for i in range(len(T)))) if full else (T, T * T))


def natural_parameters(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """(K, m) and (K, 1) such that  parameters @ T + constants  is log(weight_k N(x; mean_k, cov_k))."""
    weights, means, covariances = mixture
    d = means.shape[1]
    if covariances.ndim == 3:
        factor, failed = torch.linalg.cholesky_ex(covariances)
        if failed.any():
            raise UserError("a component of the mixture has collapsed: take fewer components or more images")
        precision = torch.cholesky_inverse(factor)                                                # (K, d, d)
        linear = (precision @ means[..., None])[..., 0]                                           # (K, d)
        # -1/2 x^T P x over pairs i <= j: half on the diagonal; the other pairs occur twice
        i, j = torch.triu_indices(d, d)
        quadratic = -precision[:, i, j] * torch.where(i == j, 0.5, 1.0)
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    else:
        linear, quadratic, log_det = means / covariances, -0.5 / covariances, covariances.log().sum(1)
    constants = weights.log() - 0.5 * (d * math.log(2 * math.pi) + log_det + (linear * means).sum(1))
    return torch.cat((linear, quadratic), 1), constants[:, None]


def log_joint(mixture, x):
    """Blocks (K, b) of log(weight_k N(x; mean_k, covariance_k)) for standardised x (n, d), in x's dtype."""
    parameters, constants = (p.to(x.dtype) for p in natural_parameters(mixture))
    for part in x.split(max(64, BLOCK // parameters.shape[1])):
        yield torch.addmm(constants, parameters, sufficient_statistics(part, mixture.covariances.ndim == 3))


def negative_log_likelihood(mixture: GaussianMixture, x: Tensor) -> Tensor:
    """-log sum_k weight_k N(x; mean_k, covariance_k) of each vector, in nats: (n, d) float64 -> (n,).
    [App. B.3, Fig. 2a]"""
    return -torch.cat([joint.logsumexp(0) for joint in log_joint(mixture, x)])


def weighted_gaussians(responsibilities: Tensor, x: Tensor, full: bool) -> GaussianMixture:
    """The M-step: component k is the Gaussian of x (n, d) weighted by responsibilities[k] (n,).

    In more than a few dimensions nearly all responsibilities are negligible, so each component reads only
    its own vectors. They are centred before they are squared, so that rounding leaves covariances definite.
    """
    (K, _), d = responsibilities.shape, x.shape[1]
    negligible = 1e-8 if x.dtype == torch.float32 else 1e-12
    # eps: an empty component divides by it
    counts = responsibilities.sum(1, dtype=torch.float64) + 10 * torch.finfo(torch.float64).eps
    means = torch.zeros(K, d, dtype=torch.float64)
    covariances = torch.zeros(*(K, d, d) if full else (K, d), dtype=torch.float64)
    for k in range(K):
        own = (responsibilities[k] > negligible).nonzero()[:, 0]
        weights, vectors = responsibilities[k, own] / counts[k].to(x.dtype), x[own]  # (n_k,), (n_k, d)
        mean = weights @ vectors
        vectors -= mean
        means[k] = mean
        covariances[k] = vectors.T @ (vectors * weights[:, None]) if full else weights @ vectors.square()
    (covariances.diagonal(dim1=1, dim2=2) if full else covariances).add_(REGULARISATION)
    return GaussianMixture(counts / counts.sum(), means, covariances)


def em_step(mixture: GaussianMixture, x: Tensor) -> tuple[GaussianMixture, float]:
    """One EM step on x (n, d): the new mixture, and the mean log-likelihood of x under the *old* one.

    Products are in x's dtype, all else is float64. With float32 x a step takes half the time and is off by
    about 1e-6 |x|^2 / (smallest variance) nats.
    """
    responsibilities, total = [], 0.0
    for joint in log_joint(mixture, x):                                                           # (K, b)
        largest = joint.amax(0)
        joint.sub_(largest).exp_()
        sums = joint.sum(0)
        total += (largest + sums.log()).sum(dtype=torch.float64).item()
        responsibilities.append(joint.div_(sums))
    return weighted_gaussians(torch.cat(responsibilities, 1), x,
                              mixture.covariances.ndim == 3), total / len(x)


def start_mixture(x: Tensor, K: int, full: bool, rng: np.random.Generator) -> GaussianMixture:
    """K means drawn as in k-means++, with probability proportional to the squared distance to the nearest one
    so far; one covariance for all, that of x around the nearest means. (The usual start, a covariance per
    component from its few nearest vectors, makes outliers collapse.)"""
    nearest, owner = torch.full((len(x),), math.inf, dtype=x.dtype), torch.zeros(len(x), dtype=torch.int64)
    index = int(rng.integers(len(x)))
    for k in range(K):
        distance = (x - x[index]).square().sum(1)
        owner[distance < nearest] = k
        nearest = torch.minimum(nearest, distance)
        cumulated = nearest.cumsum(0)
        index = min(int(torch.searchsorted(cumulated, rng.random() * cumulated[-1])), len(x) - 1)
    counts = torch.bincount(owner, minlength=K).double()
    means = x.new_zeros(K, x.shape[1]).index_add_(0, owner, x) / counts.clamp(min=1)[:, None]
    pooled = weighted_gaussians(x.new_ones(1, len(x)), x - means[owner], full).covariances
    weights = (counts + 1) / (counts + 1).sum()
    return GaussianMixture(weights, means, pooled.repeat(K, *[1] * (pooled.ndim - 1)))


def fit_mixture(x, K, full=True, starts=2, iterations=100, tolerance=1e-3, seed=0, progress=None):
    """The best of several EM runs on standardised x (n, d): (GaussianMixture, its mean log-likelihood on x).

    A run takes steps in float32 until one gains less than `tolerance` nats per vector (scikit-learn's rule
    and value), then in float64 by the same rule. progress: a tqdm bar, moved by one per step.
    """
    if len(x) < 2 * K:
        raise UserError(f"too few images: {K} components need at least {2 * K}, here are {len(x)}")
    x, best = x.double(), (None, -math.inf)
    for start in range(starts):
        mixture = start_mixture(x, K, full, np.random.default_rng((seed, start)))
        for vectors in (x.float(), x):
            before = -math.inf
            for _ in range(iterations):
                following, value = em_step(mixture, vectors)
                if progress is not None:
                    progress.update()
                if not value - before >= tolerance:                                            # also if NaN
                    break
                mixture, before = following, value
        found = mixture, -negative_log_likelihood(mixture, x).mean().item()
        best = max(best, found, key=lambda pair: pair[1])
    return best
