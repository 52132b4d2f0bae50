"""What SiT, LightningDiT and USiT have in common: forward(x, t, y) -> velocity, and that they learn; SiT's
operations as study/macs.py counts them. SiT alone is tested in test_sit.py.
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from flow import (LAST, drop_labels, euler, euler_maruyama, flow_matching_loss, guided_velocity, interpolate,
                  sample_times, time_grid)
from sit import SIZES, SiT, SiTConfig
from study.macs import sit_macs
from train_diffusion import PRESETS, Config
from variants.lightningdit import LightningDiT, LightningDiTConfig
from variants.usit import USiT, USiTConfig

MODELS = {"sit": (SiT, SiTConfig), "lightningdit": (LightningDiT, LightningDiTConfig),
          "usit": (USiT, USiTConfig)}
TINY = dict(num_latents=5, latent_dim=6, width=32, heads=4, depth=2, num_classes=10)
X, T, Y = torch.randn(3, 5, 6), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 9, 10])


def build(name, **config):
    model, its_config = MODELS[name]
    return model(its_config(**config))


def tiny(name):
    """A small model with every weight drawn at random, since a new one may answer 0 to everything."""
    model = build(name, **TINY)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_velocity_depends_on_state_time_and_class_of_its_own_sample(name):
    model = tiny(name)
    v = model(X, T, Y)
    assert v.shape == X.shape
    others = (model(X + torch.randn(3, 5, 6), T, Y), model(X, T + 0.05, Y), model(X, T, (Y + 1) % 11))
    assert all((v - other).abs().amax((1, 2)).min() > 1e-4 for other in others)
    torch.testing.assert_close(v[1:2], model(X[1:2], T[1:2], Y[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_another_shape_are_refused(name):
    for shape in ((2, 1, 6), (2, 4, 6), (2, 5, 7)):
        with pytest.raises(ValueError, match="5 tokens with 6 channels"):
            tiny(name)(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", MODELS)
def test_they_run_in_bfloat16_and_under_autocast(name):
    model = tiny(name)
    expected = model(X, T, Y)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(X, T, Y) - expected).norm() < 0.05 * expected.norm()
    assert model.bfloat16()(X.bfloat16(), T, Y).dtype == torch.bfloat16


@pytest.mark.parametrize("name, depth, lr", [("sit", 1, 1e-2), ("lightningdit", 1, 1e-2), ("usit", 2, 3e-3)])
def test_a_tiny_model_learns_two_classes_and_samples_them(name, depth, lr):
    # Class 0 is the token pair (2, -2), class 1 is (-2, 2), both with deviation 0.1.
    model = build(name, num_latents=2, latent_dim=2, width=32, heads=2, depth=depth, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    losses, centre = [], torch.tensor([[2.0, -2.0], [-2.0, 2.0]])[..., None].expand(2, 2, 2)
    for step in range(400):
        rngs = [np.random.default_rng([step, i]) for i in range(64)]
        y, t = torch.tensor([int(rng.integers(2)) for rng in rngs]), sample_times(rngs)
        state, v = interpolate(centre[y] + 0.1 * torch.randn(64, 2, 2), torch.randn(64, 2, 2), t)
        loss = flow_matching_loss(model(state, t, drop_labels(rngs, y, 2)), v).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    y = torch.arange(60) % 2
    distances = [(sampler(guided_velocity(model.eval(), y), torch.randn(60, 2, 2), time_grid(50, last))
                  - centre[y]).abs().mean()
                 for sampler, last in ((euler, None), (euler_maruyama, LAST))]
    # E|v|^2 = 5 at first. Measured: 0.37 to 0.42 at the end; distances 0.11 to 0.18, 0.08 were they perfect.
    assert losses[0] > 3 and np.mean(losses[-50:]) < 0.8 and max(distances) < 0.4


# ------------------------------------------------ operations ------------------------------------------------

@pytest.mark.parametrize("config", [TINY, dict(num_latents=128), dict(num_latents=1024),
                                    dict(SIZES["S"], num_latents=7, latent_dim=3)])
def test_macs_agree_with_pytorchs_counter(config):
    # On the meta device attention falls apart into the matrix products that the counter knows; the fused
    # kernel of the CPU counts as nothing.
    with torch.device("meta"):
        model = SiT(SiTConfig(**config))
        c = model.config
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(3, c.num_latents, c.latent_dim), torch.empty(3),
                  torch.empty(3, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * 3 * sit_macs(c)


def test_macs_of_the_paper_size():
    # The released model was counted at 58.4 and 524.5 G: its 28 blocks. Both ends add 0.01 and 0.08 G.
    whole = {L: sit_macs(SiTConfig(num_latents=L)) for L in (128, 1024)}
    assert whole == {128: 58_369_720_320, 1024: 524_557_172_736}
    blocks = {L: 28 * (whole[L] - sit_macs(SiTConfig(num_latents=L, depth=27))) for L in whole}
    assert {L: round(macs / 1e9, 1) for L, macs in blocks.items()} == {128: 58.4, 1024: 524.5}


def test_imagenet64_takes_the_operations_that_its_hours_are_from():
    """docs/running.md has hours by this count: three forward passes' operations for a step."""
    assert 6 * sit_macs(Config(**PRESETS["imagenet64"], num_latents=64)) == pytest.approx(33.3e9, rel=1e-2)
