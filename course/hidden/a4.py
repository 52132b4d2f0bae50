"""Hidden tests of A4: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a4.py` runs
all on the solution.
"""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import metrics
from common import UserError
from study import theory
from course.hidden.given import close, rng, same_gradients, strided, unchanged  # noqa: F401


# --------------------------------------------- Fréchet distance --------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frechet_distance(dtype, rng):
    d = int(rng.integers(4, 9))
    a, b = rng.normal(size=(2, d, d + 6))
    given = [torch.from_numpy(part).to(dtype) for part in
             (rng.normal(size=d) + 1e6 * (dtype == torch.float64), a @ a.T, rng.normal(size=d), b @ b.T)]
    given[2] += given[0]
    given[1] = strided(given[1])
    m1, c1, m2, c2 = (part.double().numpy() for part in given)
    oracle = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    with unchanged(*given):
        found = metrics.frechet_distance(*given)
    assert isinstance(found, float) and found == pytest.approx(oracle, rel=1e-9)
    assert metrics.frechet_distance(*given[2:], *given[:2]) == pytest.approx(oracle, rel=1e-9)


def test_frechet_distance_of_singular_covariances(rng):
    """C1 = A A^T and C2 = B B^T of any rank: Tr (C1 C2)^(1/2) is the sum of the singular values of A^T B."""
    d = 8
    for r1, r2 in ((1, 8), (8, 1), (3, 5), (4, 2), (0, 8), (8, 0), (0, 3), (3, 0), (0, 0)):
        m1, m2 = rng.normal(size=(2, d))
        a, b = rng.normal(size=(d, r1)), rng.normal(size=(d, r2))
        roots = np.linalg.svd(a.T @ b, compute_uv=False).sum() if r1 * r2 else 0.0
        oracle = ((m1 - m2) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * roots
        found = metrics.frechet_distance(*map(torch.from_numpy, (m1, a @ a.T, m2, b @ b.T)))
        assert found == pytest.approx(oracle, rel=1e-5), (r1, r2)


def test_frechet_distance_is_never_negative(rng):
    for d in (1, 2, 3, 5, 8) * 10:
        a = rng.normal(size=(d, d + 2)) * 3
        mean, covariance = torch.from_numpy(rng.normal(size=d)), torch.from_numpy(a @ a.T)
        assert 0 <= metrics.frechet_distance(mean, covariance, mean, covariance) < 1e-9 * d * 100


def test_frechet_distance_refuses_two_sizes():
    for a, b in ((3, 4), (4, 3), (1, 4), (4, 1)):
        with pytest.raises(UserError, match="cannot be compared"):
            metrics.frechet_distance(torch.zeros(a), torch.eye(a), torch.zeros(b), torch.eye(b))


# ------------------------------------------- precision and recall ------------------------------------------

def covered(queries, points, k):
    """The share of queries in the balls around points, in whole numbers: equal is equal."""
    distances = np.square(points[:, None] - points).sum(-1)
    np.fill_diagonal(distances, distances.max() + 1)                                # not itself
    reach = np.sort(distances, 1)[:, k - 1]
    return (np.square(queries[:, None] - points).sum(-1) <= reach).any(1).mean()


def integer_sets(rng):
    """Features that are small integers. Some occur twice, and some fakes are copies of reals."""
    real, fake = rng.integers(0, 15, (50, 3)), rng.integers(4, 19, (70, 3))
    real[:6], fake[:5], fake[5:9] = real[6:12], real[20:25], fake[30:34]
    return real, fake


def test_precision_recall(rng):
    k = int(rng.choice([1, 2, 4, 5, 6]))
    real, fake = integer_sets(rng)
    precision, recall = covered(fake, real, k), covered(real, fake, k)
    expected = pytest.approx((precision, recall))
    a, b = torch.from_numpy(real).double(), torch.from_numpy(fake).double()
    for block in (1, 16, 50, 1000):
        with unchanged(a, b):
            found = metrics.precision_recall(a, b, k, block=block)
        assert found == expected and all(isinstance(share, float) for share in found)
    assert metrics.precision_recall(b, a, k, 13) == pytest.approx((recall, precision))
    assert metrics.precision_recall(strided(a), strided(b), k) == expected
    for dtype in (torch.float32, torch.bfloat16):
        assert metrics.precision_recall(a.to(dtype), b.to(dtype), k) == expected
    assert metrics.precision_recall(a.float() + 1e6, b.float() + 1e6, k) == expected         # far from 0
    for scale in (1e-4, 1.7, 1e4):
        assert metrics.precision_recall(scale * a, scale * b, k) == expected
    assert metrics.precision_recall(a, b) == pytest.approx((covered(fake, real, 3), covered(real, fake, 3)))


def test_precision_recall_at_the_edge_of_a_ball(rng):
    """Reals on a line, one apart: radius 1. A fake 1 away from the last one is in, 1.02 away out."""
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    real, fake = np.arange(4.0), np.array([-1.02, -1, -0.98, 3.5, 3.98, 4, 4.02, 30, 35])
    a, b = (torch.from_numpy(np.outer(line, direction)) for line in (real, fake))
    assert metrics.precision_recall(a, b, 1)[0] == pytest.approx(5 / 9)
    assert metrics.precision_recall(a, a, 1) == (1, 1)


def test_precision_recall_needs_more_than_k(rng):
    k = int(rng.integers(1, 6))
    x = torch.from_numpy(rng.normal(size=(20, 2)))
    for real, fake in ((x[:k], x), (x, x[:k]), (x[:k], x[:k]), (x[:0], x)):
        with pytest.raises(UserError, match="too few images"):
            metrics.precision_recall(real, fake, k)
    assert metrics.precision_recall(x[:k + 1], x[:k + 1], k) == (1, 1)
    with pytest.raises(UserError, match="too few images"):
        metrics.precision_recall(x, x[:3])


class Largest(TorchFunctionMode):
    """Notes the most bytes that the result of a torch function holds."""
    bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if type(x) is torch.Tensor:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def test_precision_recall_never_holds_all_distances(rng):
    real, fake = torch.from_numpy(rng.normal(size=(400, 2))), torch.from_numpy(rng.normal(size=(300, 2)))
    with Largest() as largest:
        metrics.precision_recall(real, fake, block=4)
    assert largest.bytes < 60_000                                      # 4 x 400 float64 are 12,800


# --------------------------------------------------- PSNR --------------------------------------------------

def test_psnr(rng):
    a, b = rng.integers(0, 256, (2, 4, 3, 5, 7))
    b[3] = a[3]
    a, b = (torch.from_numpy(x.astype(np.uint8)) for x in (a, b))
    error = ((a.numpy() - b.numpy().astype(float))[:3] ** 2).mean((1, 2, 3)) / 255 ** 2
    expected = torch.from_numpy(np.append(-10 * np.log10(error), 100.0))
    for x, y in ((a, b), (b, a), (strided(a), b), (a, b.contiguous(memory_format=torch.channels_last))):
        with unchanged(x, y):
            found = metrics.psnr(x, y)
        assert found.dtype == torch.float64 and found[3] == 100
        close(found, expected, 1e-12)
    close(metrics.psnr(a[:1], b[:1]), expected[:1], 1e-12)


def test_psnr_at_the_limits():
    black, white = (torch.full((1, 3, 4, 4), value, dtype=torch.uint8) for value in (0, 255))
    assert metrics.psnr(black, white).tolist() == metrics.psnr(white, black).tolist() == [0]
    # One value of many is off by 1: the mean is 1.25e-9, and below 1e-10.
    for size, expected in ((64, 10 * math.log10(3 * 64 ** 2 * 255 ** 2)), (256, 100)):
        a = torch.full((2, 3, size, size), 7, dtype=torch.uint8)
        b = a.clone()
        b[0, 1, 2, 3] = 6
        close(metrics.psnr(a, b), torch.tensor([expected, 100], dtype=torch.float64), 1e-9)


# --------------------------------------------------- PCA ---------------------------------------------------

@pytest.mark.parametrize("n", [6, 40])
def test_pca(n, rng):
    x = rng.normal(size=(n, 10)) * rng.uniform(0.2, 3, 10) + 4
    values, vectors = np.linalg.eigh(np.cov(x.T))
    held = np.cumsum(values[::-1]) / values.sum()
    fraction = float(rng.uniform(0.4, 0.85))
    m = int(np.argmax(held >= fraction)) + 1
    given = torch.from_numpy(x)
    for x in (given, strided(given)):
        with unchanged(x):
            mean, axes, found = metrics.pca(x, fraction)
        close(mean, x.mean(0), 1e-9)
        assert axes.shape == (10, m) and found == pytest.approx(held[m - 1]) and isinstance(found, float)
        close(axes.abs(), torch.from_numpy(vectors[:, ::-1][:, :m].copy()).abs(), 1e-6)
    mean, axes, found = metrics.pca(given.float(), fraction)
    assert mean.dtype == axes.dtype == torch.float64
    close(mean, given.float().double().mean(0), 1e-12)
    close(axes.T @ axes, torch.eye(m), 1e-9)
    moved = metrics.pca(given + 1e6, fraction)                         # far from 0, float64 has digits enough
    close(moved[1].abs(), torch.from_numpy(vectors[:, ::-1][:, :m].copy()).abs(), 1e-5)
    assert moved[2] == pytest.approx(held[m - 1], abs=1e-7)
    for m in range(1, min(10, n - 1)):            # the smallest number that does
        assert metrics.pca(given, held[m - 1] - 1e-9)[1].shape == (10, m)
        assert metrics.pca(given, held[m - 1] + 1e-9)[1].shape == (10, m + 1)
    for dims in range(1, min(10, n - 1) + 1):                                  # dims wins over fraction
        mean, axes, found = metrics.pca(given, 0.01, dims)
        assert axes.shape == (10, dims) and found == pytest.approx(held[dims - 1])
        close(axes.T @ axes, torch.eye(dims), 1e-9)
        close(axes.abs(), torch.from_numpy(vectors[:, ::-1][:, :dims].copy()).abs(), 1e-6)


def test_pca_at_the_limits(rng):
    for n, d in ((6, 10), (10, 10), (40, 10), (11, 10)):
        x, most = torch.from_numpy(rng.normal(size=(n, d))), min(d, n - 1)
        assert metrics.pca(x, dims=most)[1].shape == (d, most)
        for dims in (most + 1, most + 2, d + 1):
            with pytest.raises(UserError, match="dimensions cannot be had"):
                metrics.pca(x, dims=dims)
        assert metrics.pca(x, 1e-9)[1].shape == (d, 1)
    with pytest.raises(UserError, match="dimensions cannot be had"):
        metrics.pca(x[:1], dims=1)
    # All of the variance: rounding may not ask for an axis more than there are.
    for _ in range(60):
        x = torch.from_numpy(rng.normal(size=(30, 7)))
        mean, axes, found = metrics.pca(x, 1.0)
        assert axes.shape[1] <= 7 and found == pytest.approx(1)
    # Two axes of exactly half of the variance: "at least" 0.5 is one.
    x = torch.tensor([[2.0, 0], [-2, 0], [2, 0], [-2, 0], [0, 2], [0, -2], [0, 2], [0, -2]]).double()
    assert metrics.pca(x, 0.5)[1].shape == (2, 1) and metrics.pca(x, 0.51)[1].shape == (2, 2)


# ----------------------------------------------- linear probe ----------------------------------------------

def steepest(x, y, weight, bias, strength):
    """The largest component of the gradient of the documented loss."""
    weight, bias = (p.detach().double().requires_grad_() for p in (weight, bias))
    x = x.double()
    (F.cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * len(x) * strength)).backward()
    return max(weight.grad.abs().max().item(), bias.grad.abs().max().item())


def test_linear_probe(rng):
    strength = float(rng.uniform(0.05, 0.5))
    y = torch.from_numpy(rng.integers(0, 3, 120))
    x = strided(torch.randn(120, 4, dtype=torch.float64) + torch.randn(3, 4)[y] + 0.5)
    with torch.no_grad(), unchanged(x, y):                                       # as evaluate.py calls it
        weight, bias = metrics.linear_probe(x, y, 3, strength, iterations=1000)
        start = metrics.linear_probe(x, y, 3, strength, iterations=1)
        usual = metrics.linear_probe(x, y, 3, iterations=1000)
    assert weight.shape == (4, 3) and bias.shape == (3,) and weight.dtype == bias.dtype == torch.float64
    assert steepest(x, y, weight, bias, strength) < 1e-4 and steepest(x, y, *usual, 1.0) < 1e-4
    assert steepest(x, y, *start, strength) > 1e-3, "one iteration cannot be enough"


def test_linear_probe_of_float32(rng):
    y = torch.from_numpy(rng.integers(0, 3, 120))
    x = torch.randn(120, 4) + torch.randn(3, 4)[y]
    with torch.no_grad(), unchanged(x, y):
        weight, bias = metrics.linear_probe(x, y, 5)                   # two classes without a vector
    assert weight.shape == (4, 5) and bias.shape == (5,) and weight.dtype == bias.dtype == torch.float32
    assert weight.isfinite().all() and bias.isfinite().all()
    assert steepest(x, y, weight, bias, 1.0) < 1e-2


# ------------------------------------------------- mixtures ------------------------------------------------

def mixture(rng, full, K=3, d=3):
    roots = rng.normal(size=(K, d, d))
    covariances = roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(d) if full else rng.uniform(0.3, 2, (K, d))
    weights = rng.uniform(0.2, 1, K)
    return metrics.GaussianMixture(*map(torch.from_numpy,
                                        (weights / weights.sum(), rng.normal(size=(K, d)) * 2, covariances)))


def log_joint(parts, x):
    """log(weight_k N(x; k)), (n, K) in numpy."""
    rows = []
    for weight, mean, covariance in zip(*(part.numpy() for part in parts)):
        covariance = covariance if covariance.ndim == 2 else np.diag(covariance)
        away = x - mean
        rows.append(np.log(weight) - 0.5 * (len(mean) * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1]
                                            + (away @ np.linalg.inv(covariance) * away).sum(1)))
    return np.stack(rows, 1)


@pytest.mark.parametrize("full", [True, False])
def test_negative_log_likelihood(full, rng, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)                           # 64 vectors at a time: several blocks
    for K, n in ((3, 150), (1, 70), (4, 1)):
        parts, x = mixture(rng, full, K), rng.normal(size=(n, 3)) * 2
        x[0] = 500.0
        oracle = -np.logaddexp.reduce(log_joint(parts, x), axis=1)
        x = torch.from_numpy(x)
        with unchanged(x, *parts):
            found = metrics.negative_log_likelihood(parts, x)
        assert found.dtype == torch.float64
        close(found, torch.from_numpy(oracle), 1e-9)


@pytest.mark.parametrize("full", [True, False])
def test_em_step(full, rng, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)
    parts, x = mixture(rng, full), rng.normal(size=(140, 3)) * 2
    x[70] = 100.0                                                      # far from all: densities of e^-3000
    joint = log_joint(parts, x)
    total = np.logaddexp.reduce(joint, axis=1)
    share = np.exp(joint - total[:, None])
    means = share.T @ x / share.sum(0)[:, None]
    away = x[:, None] - means                                                                      # (n, K, d)
    covariances = np.einsum("nk,nki,nkj->kij", share, away, away) / share.sum(0)[:, None, None]
    covariances += metrics.REGULARISATION * np.eye(3)
    expected = (share.mean(0), means, covariances if full else np.einsum("kii->ki", covariances))
    given = torch.from_numpy(x)
    with unchanged(given, *parts):
        found, value = metrics.em_step(parts, given)
    assert isinstance(value, float) and value == pytest.approx(total.mean(), rel=1e-11)
    for ours, oracle in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        close(ours, torch.from_numpy(oracle.copy()), 5e-6)        # shares below 1e-12 are left out
    with unchanged(given):
        found, value = metrics.em_step(parts, given.float())
    assert isinstance(value, float) and value == pytest.approx(total.mean(), rel=1e-4)
    for ours, oracle in zip(found, expected):
        assert ours.dtype == torch.float64
        close(ours, torch.from_numpy(oracle.copy()), 5e-3)


# ------------------------------------------------- the score -----------------------------------------------

def test_mixture_score(rng):
    for K, t in ((4, float(rng.uniform(0.1, 1))), (1, 0.7), (3, 0.0)):
        means, given = (torch.from_numpy(rng.normal(size=(n, 3)) * 2) for n in (K, 9))
        given[0], given[1] = means[0] * math.exp(-t), 500.0            # at a mode, and far from all
        given, x = strided(given), given.clone().requires_grad_()
        log_density = torch.logsumexp(-0.5 * (x[:, None] - means * math.exp(-t)).square().sum(-1), 1)
        with unchanged(given, means):
            found = theory.mixture_score(given, means, t)
        close(found, torch.autograd.grad(log_density.sum(), x)[0], 1e-9)
        assert theory.mixture_score(given.float(), means.float(), t).dtype == torch.float32


def test_mixture_score_learns_its_means(rng):
    """Eq. 13's network: gradients go through the weights, too, and are finite everywhere."""
    t = float(rng.uniform(0.1, 1))
    means, x = torch.from_numpy(rng.normal(size=(4, 3))), torch.from_numpy(rng.normal(size=(9, 3)) * 2)
    x[0], x[1] = means[0] * math.exp(-t), 300.0
    means.requires_grad_()
    shrunk = means * math.exp(-t)
    weights = torch.exp(-0.5 * (x[:, None] - shrunk).square().sum(-1)[2:])
    weights = weights / weights.sum(1, keepdim=True)
    same_gradients(theory.mixture_score(x, means, t)[2:], weights @ shrunk - x[2:], means, tolerance=1e-6)
    gradient, = torch.autograd.grad(theory.mixture_score(x, means, t).square().sum(), means)
    assert gradient.isfinite().all()
