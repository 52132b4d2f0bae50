"""What the hidden tests share: the seed's numbers, a small tokenizer, comparisons of values and gradients.

The seed is the environment's COURSE_SEED; grade.py --seed sets it.
"""
import contextlib
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


def same_gradients(found, expected, *leaves, tolerance=1e-4):
    """Equal, and with equal gradients at each of the leaves, which both depend on, in a random direction."""
    close(found, expected, tolerance)
    direction = torch.randn(expected.shape)
    ours, theirs = (torch.autograd.grad((made.float() * direction).sum(), leaves, retain_graph=True)
                    for made in (found, expected))
    for gradient, oracle in zip(ours, theirs):
        close(gradient, oracle, tolerance * max(1.0, oracle.abs().max().item()))


@contextlib.contextmanager
def unchanged(*tensors):
    """What is done inside leaves the tensors' values as they are."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before):
        assert torch.equal(tensor, old), "an input was changed in place"


def strided(x):
    """The same values in another order in memory, as after a transpose: not contiguous."""
    return x.detach().transpose(0, -1).contiguous().transpose(0, -1)


def generators(count, rng):
    """A function: rows -> a new numpy Generator for each of these rows of `count`, the same at every call."""
    seeds = rng.integers(2 ** 31, size=count)
    return lambda rows=slice(None): [np.random.default_rng(seed) for seed in seeds[rows]]
