"""study/theory.py: the score of a mixture and its fit. Students of the course have this file."""
import argparse
import math

import numpy as np
import pytest
import torch

from study import theory


def test_score_is_the_gradient_of_the_log_density():
    means, t = torch.randn(3, 4, dtype=torch.float64) * 2, 0.4
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3).double()),
        torch.distributions.Independent(torch.distributions.Normal(means * math.exp(-t), 1.0), 1))
    gradient, = torch.autograd.grad(density.log_prob(x).sum(), x)
    np.testing.assert_allclose(theory.mixture_score(x.detach(), means, t).detach(), gradient, atol=1e-12)


def test_sizes_may_come_in_any_order_and_seeds_be_large():
    args = argparse.Namespace(samples=[256, 64, 256], repeats=1, time=0.1, steps=20, seed=2 ** 63 - 1)
    found = theory.error_curve(args, 2, 4, 2.0, argparse.Namespace(update=lambda: None))
    assert [n for n, _ in found] == [64, 256]


def test_the_learned_score_of_one_mode_is_as_good_as_the_sample_mean():
    """K = 1: s = e^-t mean - x, the minimiser is the sample mean, its error e^-2t |sample mean - mean|^2."""
    truth = torch.ones(1, 8)
    x = truth + torch.randn(400, 8)
    found = theory.fit_score(x, torch.zeros(1, 8), t=0.5, steps=400)
    assert (found - x.mean(0)).abs().max() < 0.03
    expected = math.exp(-1) * (found - truth).square().sum().item()
    assert theory.score_error(found, truth, 0.5) == pytest.approx(expected, rel=1e-4)
