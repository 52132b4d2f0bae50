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

import metrics
from common import UserError
from study import theory
from course.hidden.given import close, rng  # noqa: F401


def test_frechet_distance(rng):
    d = int(rng.integers(4, 9))
    a, b = rng.normal(size=(2, d, d + 2))
    c1, c2, m1, m2 = a @ a.T, b @ b.T, *rng.normal(size=(2, d))
    oracle = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert (metrics.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
            == pytest.approx(oracle, rel=1e-6))
    # Rank 1 against any: Tr (C1 C2)^(1/2) is (u^T C2 u)^(1/2) for C1 = u u^T.
    u = rng.normal(size=d)
    c1 = np.outer(u, u)
    oracle = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.sqrt(u @ c2 @ u)
    found = metrics.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
    assert isinstance(found, float) and found == pytest.approx(oracle, rel=1e-5)


def test_frechet_distance_refuses_two_sizes():
    with pytest.raises(UserError):
        metrics.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def test_precision_recall(rng):
    k = int(rng.integers(1, 5))
    real, fake = rng.normal(size=(50, 2)), rng.normal(size=(70, 2)) * 0.7 + 0.8

    def covered(queries, points):
        radius = np.sort(np.linalg.norm(points[:, None] - points, axis=-1), 1)[:, k]
        return (np.linalg.norm(queries[:, None] - points, axis=-1) <= radius).any(1).mean()

    found = metrics.precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k, block=16)
    assert found == pytest.approx((covered(fake, real), covered(real, fake)))
    with pytest.raises(UserError):
        metrics.precision_recall(torch.zeros(k, 2), torch.zeros(9, 2), k)


def test_psnr(rng):
    a, b = rng.integers(0, 256, (2, 4, 3, 5, 7))
    b[3] = a[3]
    found = metrics.psnr(*(torch.from_numpy(x.astype(np.uint8)) for x in (a, b)))
    error = ((a - b)[:3] ** 2).mean((1, 2, 3)) / 255 ** 2
    close(found, torch.from_numpy(np.append(-10 * np.log10(error), 100.0)), 1e-9)


@pytest.mark.parametrize("n", [6, 40])
def test_pca(n, rng):
    x = rng.normal(size=(n, 10)) * rng.uniform(0.2, 3, 10) + 4
    values, vectors = np.linalg.eigh(np.cov(x.T))
    held = np.cumsum(values[::-1]) / values.sum()
    fraction = float(rng.uniform(0.4, 0.85))
    m = int(np.argmax(held >= fraction)) + 1
    mean, axes, found = metrics.pca(torch.from_numpy(x), fraction)
    close(mean, torch.from_numpy(x.mean(0)), 1e-9)
    assert axes.shape == (10, m) and found == pytest.approx(held[m - 1])
    close(axes.abs(), torch.from_numpy(vectors[:, ::-1][:, :m].copy()).abs(), 1e-6)
    assert metrics.pca(torch.from_numpy(x), dims=3)[1].shape == (10, 3)
    with pytest.raises(UserError):
        metrics.pca(torch.from_numpy(x), dims=11)


def test_linear_probe(rng):
    strength = float(rng.uniform(0.05, 0.5))
    y = torch.from_numpy(rng.integers(0, 3, 120))
    x = torch.randn(120, 4, dtype=torch.float64) + torch.randn(3, 4)[y] + 0.5
    weight, bias = (p.requires_grad_() for p in metrics.linear_probe(x, y, 3, strength, iterations=1000))
    (F.cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * 120 * strength)).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


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
def test_negative_log_likelihood(full, rng):
    parts, x = mixture(rng, full), rng.normal(size=(30, 3)) * 2
    x[0] = 500.0
    joint = log_joint(parts, x)
    oracle = -np.logaddexp.reduce(joint, axis=1)
    close(metrics.negative_log_likelihood(parts, torch.from_numpy(x)), torch.from_numpy(oracle), 1e-7)


@pytest.mark.parametrize("full", [True, False])
def test_em_step(full, rng, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)
    parts, x = mixture(rng, full), rng.normal(size=(140, 3)) * 2
    joint = log_joint(parts, x)
    total = np.logaddexp.reduce(joint, axis=1)
    share = np.exp(joint - total[:, None])
    found, value = metrics.em_step(parts, torch.from_numpy(x))
    assert value == pytest.approx(total.mean())
    close(found.weights, torch.from_numpy(share.mean(0)), 1e-6)
    close(found.means, torch.from_numpy(share.T @ x / share.sum(0)[:, None]), 1e-6)


def test_mixture_score(rng):
    means, t = torch.from_numpy(rng.normal(size=(4, 3)) * 2), float(rng.uniform(0.1, 1))
    x = torch.from_numpy(rng.normal(size=(9, 3)) * 2).requires_grad_()
    log_density = torch.logsumexp(-0.5 * (x[:, None] - means * math.exp(-t)).square().sum(-1), 1)
    close(theory.mixture_score(x.detach(), means, t), torch.autograd.grad(log_density.sum(), x)[0], 1e-9)
