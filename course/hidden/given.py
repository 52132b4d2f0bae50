"""What the hidden tests share: the seed's numbers, a small tokenizer, a comparison.

The seed is the environment's COURSE_SEED; grade.py --seed sets it.
"""
import os

import numpy as np
import pytest
import torch

import losses
import maetok

SEED = int(os.environ.get("COURSE_SEED", 0))
TINY = dict(image_size=16, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1, num_latents=3,
            latent_dim=4, aux_depth=1)


def tiny(targets=(), **changes):
    """A small tokenizer. targets: dict, name -> values per patch."""
    made = {}
    for name, dim in dict(targets).items():
        made[name] = losses.Target()
        made[name].dim = dim
    return maetok.MAETok(maetok.MAETokConfig(**TINY | changes), made)


@pytest.fixture(autouse=True)
def rng(request):
    """The test's own numbers, which differ by seed and test."""
    numbers = np.random.default_rng([SEED, *request.node.name.encode()])
    torch.manual_seed(int(numbers.integers(2 ** 31)))
    return numbers


def close(found, expected, tolerance=1e-5):
    """Same shape, and equal within `tolerance`, in float64."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach().double(), expected.detach().double(),
                               rtol=tolerance, atol=tolerance)


def generators(count, rng):
    """A function: rows -> a new numpy Generator for each of these rows of `count`, the same at every call."""
    seeds = rng.integers(2 ** 31, size=count)
    return lambda rows=slice(None): [np.random.default_rng(seed) for seed in seeds[rows]]
