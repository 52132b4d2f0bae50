"""Tests that students do not see: one or more a blank, against loops and closed forms, on data of a seed.

The seed is the environment's COURSE_SEED; grade.py --seed sets it. A function that returns the numbers of the
visible tests fails here. `pytest course/hidden.py` runs all on the solution.
"""
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flow  # noqa: E402
import hog  # noqa: E402
import losses  # noqa: E402
import maetok  # noqa: E402
import metrics  # noqa: E402
import sit  # noqa: E402
import train_tokenizer as trainer  # noqa: E402
from common import UserError, sample_rng  # noqa: E402
from study import theory  # noqa: E402

SEED = int(os.environ.get("COURSE_SEED", 0))
TINY = dict(image_size=16, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1, num_latents=3,
            latent_dim=4, aux_targets={"hog": 7}, aux_depth=1)


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


# ------------------------------------------------- A1 -------------------------------------------------

def test_patchify(rng):
    P, h, w, c = (int(n) for n in rng.integers(2, 5, 4))
    w += h                                                             # never a square
    images = torch.randn(2, c, h * P, w * P)
    found = maetok.patchify(images, P)
    assert found.shape == (2, h * w, P * P * c)
    for b, i, j in itertools.product(range(2), range(h), range(w)):
        close(found[b, i * w + j],
              images[b, :, i * P:(i + 1) * P, j * P:(j + 1) * P].permute(1, 2, 0).flatten())
    for size in ((h * P + 1, w * P), (h * P, w * P + 1)):
        with pytest.raises(ValueError):
            maetok.patchify(torch.zeros(1, c, *size), P)


def test_rotate():
    x, angle = torch.randn(2, 4, 5, 12), torch.randn(4, 5, 6) * 3
    found = maetok.rotate(x, angle.cos(), angle.sin())
    for i in range(6):
        matrix = torch.stack((torch.stack((angle[..., i].cos(), -angle[..., i].sin()), -1),
                              torch.stack((angle[..., i].sin(), angle[..., i].cos()), -1)), -2)
        turned = (matrix @ x[..., [i, i + 6]][..., None])[..., 0]
        close(found[..., [i, i + 6]], turned)
    assert maetok.rotate(x.bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_rope_angles(kind, rng):
    rows, columns, before, after = (int(n) for n in rng.permutation(4) + 1)
    rope = maetok.RoPE2D(kind, 3, 2, 8)
    cos, sin = rope((rows, columns), before, after)
    f = rope.freqs.detach()
    assert cos.shape == sin.shape == (len(f), f.shape[2], before + rows * columns + after, 4)
    for place in range(cos.shape[2]):
        n = place - before
        x, y = (n % columns, n // columns) if 0 <= n < rows * columns else (0, 0)
        angle = x * f[:, 0] + y * f[:, 1]
        close(cos[:, :, place], angle.cos())
        close(sin[:, :, place], angle.sin())


def test_sobel(rng):
    image = torch.randn(1, 2, 6, 9)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    gx, gy = (g.numpy() for g in hog.sobel(image))
    for c, y, x in itertools.product(range(2), range(6), range(9)):
        p = padded[0, c, y:y + 3, x:x + 3]
        sides = [a[0] + 2 * a[1] + a[2] for a in (p[:, 0], p[:, 2], p[0], p[2])]   # left, right, above, below
        assert gx[0, c, y, x] == pytest.approx(sides[0] - sides[1], abs=1e-4)
        assert gy[0, c, y, x] == pytest.approx(sides[2] - sides[3], abs=1e-4)


@pytest.mark.parametrize("cell", [3, 4, 8])
def test_gaussian_window(cell):
    window = hog.gaussian_window(cell)
    assert window.shape == (2 * cell, 2 * cell) and window.dtype == torch.float32
    i = np.arange(2 * cell) - (cell - 0.5)
    oracle = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * cell ** 2))
    close(window, torch.from_numpy(oracle / oracle.sum()), 1e-6)


# An odd number of bins: of an even one, pi / 2 is a border, and at the image's edge gy is 0 but for rounding.
@pytest.mark.parametrize("patch, cell, bins", [(8, 4, 9), (4, 4, 7)])
def test_hog_features(patch, cell, bins, rng):
    H, W = 2 * patch, 3 * patch
    images = torch.from_numpy(rng.uniform(-1, 1, (2, 3, H, W))).float()
    found = hog.hog_features(images, patch, cell, bins)
    gx, gy = (g.double().numpy() for g in hog.sobel(images))
    window = np.tile(hog.gaussian_window(cell).numpy(), (H // cell, W // cell))[:H, :W]
    number = np.floor(np.arctan2(gx, gy) % np.pi / np.pi * bins).clip(max=bins - 1)
    side = patch // cell
    assert found.shape == (2, 6, 3 * bins * side ** 2) and found.dtype == torch.float32
    found = found.reshape(2, 2, 3, 3, bins, side, side)          # image, patch row, column, colour, bin, cell
    for b, i, j, c, u, v in itertools.product(range(2), range(2), range(3), range(3),
                                              range(side), range(side)):
        top, left = i * patch + u * cell, j * patch + v * cell
        part = np.s_[top:top + cell, left:left + cell]
        strength = (np.hypot(gx[b, c], gy[b, c]) * window)[part]
        histogram = np.array([strength[number[b, c][part] == k].sum() for k in range(bins)])
        close(found[b, i, j, c, :, u, v], torch.from_numpy(histogram / np.linalg.norm(histogram)), 1e-4)
    assert hog.hog_features(torch.full((1, 3, H, W), rng.uniform(-1, 1)), patch, cell, bins).abs().max() == 0


# ------------------------------------------------- A2 -------------------------------------------------

def generators(count, rng):
    """A function: rows -> a new numpy Generator for each of these rows of `count`, the same at every call."""
    seeds = rng.integers(2 ** 31, size=count)
    return lambda rows=slice(None): [np.random.default_rng(seed) for seed in seeds[rows]]


def test_random_mask(rng):
    make = generators(300, rng)
    low, high = sorted(rng.uniform(0.1, 0.9, 2))
    N = int(rng.integers(30, 60))
    mask = maetok.random_mask(make(), N, low, high)
    hidden = mask.sum(1)
    assert mask.dtype == torch.bool and mask.shape == (300, N)
    assert hidden.min() >= math.ceil(low * N) and hidden.max() <= math.ceil(high * N)
    assert abs(hidden.double().mean() / N - ((low + high) / 2 + 0.5 / N)) < 0.05
    assert (mask.double().mean(0) - mask.double().mean()).abs().max() < 0.15
    assert torch.equal(maetok.random_mask(make(slice(7, 9)), N, low, high), mask[7:9])
    count = int(rng.integers(2, N - 1))                               # a ratio just above count / N: one more
    assert (maetok.random_mask(make(slice(5)), N, (count + 0.2) / N, (count + 0.2) / N).sum(1)
            == count + 1).all()
    for bad in ((0.5, 0.4), (-0.1, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError):
            maetok.random_mask(make(slice(1)), N, *bad)


def test_encoder(rng):
    """The pixels of hidden patches are not read, those of visible ones are,
    and a hidden one keeps its place."""
    encoder = maetok.MAETok(maetok.MAETokConfig(**TINY)).encoder
    images, mask = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, rng.permutation(16)[:7]] = True
    pixels = mask.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    latents = encoder(images, mask)
    assert latents.shape == (2, 3, 4)
    close(encoder(torch.where(pixels, torch.randn_like(images), images), mask), latents)
    assert (encoder(torch.where(pixels, images, images + 1), mask) - latents).abs().min(0)[0].max() > 1e-4
    latents.square().sum().backward()
    assert encoder.mask_token.grad.abs().sum() > 0 and encoder.latent_positions.grad.abs().sum() > 0
    assert (encoder(images, mask.roll(1, 1)) - latents).abs().max() > 1e-4


def test_encoder_without_a_mask():
    encoder = maetok.MAETok(maetok.MAETokConfig(**TINY | dict(class_token=True, ape="both"))).encoder
    images = torch.randn(2, 3, 16, 24)
    nothing = torch.zeros(2, 24, dtype=torch.bool)
    close(encoder(images, None), encoder(images, nothing))
    x = encoder.patch_embed(maetok.patchify(images, 4)) + encoder.positions((4, 6))
    x = torch.cat((encoder.class_token.expand(2, 1, 16), x,
                   (encoder.latent_tokens + encoder.latent_positions).expand(2, 3, 16)), 1)
    close(encoder(images, None), encoder.to_latent(encoder.transformer(x, (4, 6), 1)[:, -3:]))


def test_decoder(rng):
    config = maetok.MAETokConfig(**TINY)
    latents, grid = torch.randn(3, 3, 4), tuple(int(n) for n in rng.integers(2, 6, 2))
    plain, pooled = (maetok.Decoder(config, 1, 16, 2, 9, pool=pool) for pool in (False, True))
    pooled.load_state_dict(plain.state_dict())
    values = plain(latents, grid)
    assert values.shape == (3, grid[0] * grid[1], 9)
    close(values, plain.head(plain.image_tokens(latents, grid)))
    close(pooled(latents, grid), values.mean(1))


def test_forward(rng):
    model = maetok.MAETok(maetok.MAETokConfig(**TINY | dict(variational=True))).eval()
    images, mask = torch.randn(2, 3, 24, 16), torch.from_numpy(rng.random((2, 24)) < 0.5)
    noise = torch.randn(2, 3, 4)
    output = model(images, mask, noise)
    mean, logvar = model.posterior(images, mask).chunk(2, -1)
    close(output.posterior, torch.cat((mean, logvar), -1))
    close(output.latents, mean + logvar.exp().sqrt() * noise)
    close(output.reconstruction, model.decode(output.latents, (24, 16)))
    close(output.aux["hog"], model.aux_decoders["hog"](output.latents, (6, 4)))
    close(model(images, mask).latents, mean)
    output.aux["hog"].sum().backward()
    assert model.encoder.latent_tokens.grad.abs().sum() > 0 and model.decoder.head.weight.grad is None


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_masked_feature_loss(kind, rng):
    prediction, target = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    mask = torch.from_numpy(rng.random((4, 6)) < 0.5)
    mask[0], mask[1] = False, True
    images = []
    for b in range(4):
        values = [((p - t) ** 2).mean() if kind == "mse" else -(p * t).sum() / p.norm() / t.norm()
                  for p, t, hidden in zip(prediction[b], target[b], mask[b]) if hidden]
        images.append(sum(values) / len(values) if values else torch.zeros(()))
    found = maetok.masked_feature_loss(prediction.bfloat16().float(), target, mask, kind)
    assert found.dtype == torch.float32
    close(maetok.masked_feature_loss(prediction, target, mask, kind), sum(images) / 4)
    with pytest.raises(ValueError):
        maetok.masked_feature_loss(prediction, target, mask, "huber")


def test_adaptive_weight(rng):
    weight = torch.randn(3, 5, requires_grad=True)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    for scale in (1.0, 1e-4):                                          # the second is as small as the epsilon
        found = losses.adaptive_weight((weight * a).sum(), (weight * b).sum() * scale, weight)
        assert found.item() == pytest.approx((a.norm() / (b.norm() * scale + 1e-4)).item(), rel=1e-4)
    assert losses.adaptive_weight((weight * a).sum() * 1e6, (weight * 0).sum(), weight).item() == 1e4
    assert weight.grad is None and not found.requires_grad


class Critic(nn.Module):
    """In the adversary's place: logits that depend on each pixel and on the view."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def look(self, images, view):
        return (images * self.weight).mean((1, 2, 3)) * view


def test_tokenizer_objective(rng):
    percep, disc, aux, kl = (float(w) for w in rng.uniform(0.1, 0.9, 4))
    config = trainer.Config(percep_weight=percep, percep_warmup=10, disc_weight=disc, aux_weight=aux,
                            kl_weight=kl, targets="hog", variational=True)
    critic, last = Critic(), torch.randn(6, 4, requires_grad=True)
    images, features, target = torch.rand(2, 3, 4, 4), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    x = torch.randn(2, 3, 4, 6) @ last
    posterior, loss_mask = torch.randn(2, 3, 8), torch.from_numpy(rng.random((2, 5)) < 0.5)
    loss_mask[:, 0] = True
    output = maetok.MAETokOutput(x, None, {"hog": features}, posterior)
    lpips = lambda a, b: (a - b).square().mean((1, 2, 3)) * 2
    step = int(rng.integers(1, 9))
    batch = trainer.Batch(images, ~loss_mask, loss_mask, torch.zeros(2, 3, 4), {"hog": target},
                          [None] * 4 + [0.5])
    networks = losses.Objective({}, lpips, critic)
    loss, terms = trainer.tokenizer_objective(config, step, batch, output, networks, last,
                                              torch.autocast("cpu", enabled=False))
    recon = F.mse_loss(x, images)
    expected = recon + percep * step / 10 * 2 * recon
    adv = -0.5 * (x * critic.weight.detach()).mean()
    g1, g2 = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (expected, adv))
    expected = expected + disc * g1 / (g2 + 1e-4) * adv
    squares = (features - target).square().mean(-1)
    expected = expected + aux * sum(s[m].mean() for s, m in zip(squares, loss_mask)) / 2
    expected = expected + kl * maetok.kl_divergence(posterior)
    close(loss, expected, 1e-4)
    assert {"recon", "percep", "adv", "adaptive_weight", "hog", "kl"} == set(terms)
    loss.backward()
    assert critic.weight.grad is None and last.grad.abs().sum() > 0


def test_mask_range(rng):
    top, share, steps = (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.3, 0.9)),
                         int(rng.integers(50, 200)) * 10)
    config = trainer.Config(stage2_mask=top, stage2_ramp=share, stage2_steps=steps, steps=77, mask_low=0.1,
                            mask_high=0.3)
    last = share * steps - 1
    for part in (0.0, 0.25, 1.0):
        assert trainer.mask_range(config, 2, part * last) == pytest.approx((top * (1 - part),) * 2, abs=1e-6)
    assert (trainer.mask_range(config, 2, steps - 1) == (0, 0)
            and trainer.mask_range(config, 1, 5) == (0.1, 0.3))
    config = trainer.Config(mask_draw="normal", mask_low=0.4, mask_high=0.6, seed=SEED)
    step = int(rng.integers(1000))
    numbers = sample_rng(SEED, "mask-rate", step, 0)
    while not 0.4 <= (rate := numbers.normal(0.6, 0.25)) <= 0.6:
        pass
    assert trainer.mask_range(config, 1, step) == pytest.approx((rate, rate))


# ------------------------------------------------- A3 -------------------------------------------------

PATHS = ("linear", "cosine")


def coefficients(t, path):
    """alpha, sigma and their derivatives at times t, by hand."""
    if path == "linear":
        return 1 - t, t, -1.0 + 0 * t, 1.0 + 0 * t
    h = math.pi / 2
    return np.cos(h * t), np.sin(h * t), -h * np.sin(h * t), h * np.cos(h * t)


@pytest.mark.parametrize("path", PATHS)
def test_path_coefficients(path, rng):
    t = rng.random((3, 1, 2))
    found = flow.path_coefficients(torch.from_numpy(t), path)
    for ours, expected in zip(found, coefficients(t, path), strict=True):
        close(ours, torch.from_numpy(expected), 1e-9)
    with pytest.raises(ValueError):
        flow.path_coefficients(torch.zeros(1), "straight")


@pytest.mark.parametrize("path", PATHS)
def test_interpolate(path, rng):
    x, noise, t = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3, 3)), rng.random(3)
    state, v = flow.interpolate(*map(torch.from_numpy, (x, noise, t)), path)
    for b in range(3):
        alpha, sigma, d_alpha, d_sigma = coefficients(t[b], path)
        close(state[b], torch.from_numpy(alpha * x[b] + sigma * noise[b]), 1e-9)
        close(v[b], torch.from_numpy(d_alpha * x[b] + d_sigma * noise[b]), 1e-9)


def test_flow_matching_loss(rng):
    prediction, target = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5)
    found = flow.flow_matching_loss(prediction, target)
    assert found.dtype == torch.float32
    close(found,
          torch.stack([((p.double() - t.double()) ** 2).sum() / 15 for p, t in zip(prediction, target)]))


def test_drop_labels(rng):
    make, probability = generators(2000, rng), float(rng.uniform(0.2, 0.8))
    y = torch.from_numpy(rng.integers(0, 7, 2000))
    found = flow.drop_labels(make(), y, 7, probability)
    assert found.dtype == torch.int64 and abs((found == 7).double().mean().item() - probability) < 0.05
    assert torch.equal(found[found != 7], y[found != 7])
    assert torch.equal(flow.drop_labels(make(slice(90, 99)), y[90:99], 7, probability), found[90:99])
    assert ((flow.drop_labels(make(), y, 7, 1.0) == 7).all()
            and torch.equal(flow.drop_labels(make(), y, 7, 0.0), y))


@pytest.mark.parametrize("path", PATHS)
def test_expected_noise(path, rng):
    x, noise, t = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 3)), rng.random(4)
    parts = [coefficients(value, path) for value in t]
    state = np.stack([p[0] * a + p[1] * n for p, a, n in zip(parts, x, noise)])
    v = np.stack([p[2] * a + p[3] * n for p, a, n in zip(parts, x, noise)])
    v, state, t = map(torch.from_numpy, (v, state, t))
    close(flow.expected_noise(v, state, t, path), torch.from_numpy(noise), 1e-9)
    close(flow.expected_noise(v[:1], state[:1], t[0].item(), path), torch.from_numpy(noise[:1]), 1e-9)
    assert flow.expected_noise(v.float(), state.float(), 0.5, path).dtype == torch.float32


def field(rng):
    """A velocity that depends on state and time, and the times it was called at."""
    a, b, times = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)), []

    def velocity(x, t, **more):
        times.append((t, more))
        return (torch.sin(a * x) + b * t * x).double()
    return velocity, times


def test_euler(rng):
    velocity, times = field(rng)
    steps, start = int(rng.integers(3, 9)), torch.randn(2, 2, 3)
    states = []
    found = flow.euler(velocity, start, steps, states)
    x = start.double()
    for i in range(steps):
        x = x - velocity(x, 1 - i / steps) / steps
    assert (found.dtype == torch.float32 and len(states) == steps + 1
            and states[0][0] == 1 and states[-1][0] == 0)
    close(found, x)
    with pytest.raises(ValueError):
        flow.euler(velocity, start, 0)


def test_heun(rng):
    velocity, times = field(rng)
    steps, start = int(rng.integers(3, 9)), torch.randn(2, 2, 3)
    found = flow.heun(velocity, start, steps)
    assert len(times) == 2 * steps - 1
    x = start.double()
    for i in range(steps):
        v = velocity(x, 1 - i / steps)
        if i < steps - 1:
            v = (v + velocity(x - v / steps, 1 - (i + 1) / steps)) / 2
        x = x - v / steps
    close(found, x)


def test_heun_hands_the_start_of_a_step_on(rng):
    velocity, times = field(rng)
    flow.heun(velocity, torch.randn(1, 2, 3), 4, decide="step")
    assert [more.get("start", t) for t, more in times] == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25]
    times.clear()
    flow.heun(velocity, torch.randn(1, 2, 3), 4)
    assert all(more == {} for _, more in times)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", ["sigma", "t"])
def test_euler_maruyama(path, diffusion, rng):
    velocity, _ = field(rng)
    steps, last, start = int(rng.integers(4, 9)), float(rng.uniform(0.02, 0.2)), torch.randn(2, 2, 3).double()
    noises = torch.randn(steps, 2, 2, 3).double()
    found = flow.euler_maruyama(velocity, start, steps, noise=lambda step: noises[step], last=last, path=path,
                                diffusion=diffusion)
    x, times = start, [*np.linspace(1, last, steps), 0.0]
    for step, (t, following) in enumerate(zip(times, times[1:])):
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        v = velocity(x, t)
        score = -(alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma) / sigma
        w = 2 * (sigma if diffusion == "sigma" else t)
        x = x - (t - following) * (v - w / 2 * score)
        if step < steps - 1:
            x = x + math.sqrt(w * (t - following)) * noises[step]
    close(found, x, 1e-7)
    for bad in (dict(steps=0), dict(last=0.0), dict(diffusion="2t")):
        with pytest.raises(ValueError):
            flow.euler_maruyama(velocity, start, **bad)


class Model(nn.Module):
    """Velocity = a number a class, the scale times beta where it is told one; notes the rows of its calls."""

    def __init__(self, values, guidance_free=False):
        super().__init__()
        self.config = sit.SiTConfig(num_latents=2, latent_dim=3, width=8, heads=2, depth=1,
                                    num_classes=len(values) - 1, guidance_free=guidance_free)
        self.values, self.rows = nn.Parameter(torch.as_tensor(values)), []

    def forward(self, x, t, y, beta=None):
        self.rows.append(len(x))
        return (self.values[y] * (1 if beta is None else beta))[:, None, None].expand_as(x)


def test_guidance(rng):
    values = rng.normal(size=6)
    model, y = Model(values), torch.from_numpy(rng.integers(0, 5, 4))
    low, high = sorted(rng.uniform(0.1, 0.9, 2))
    scale, x = float(rng.uniform(1.5, 4)), torch.randn(4, 2, 3).double()
    velocity = flow.guided_velocity(model, y, scale, (low, high))
    c = torch.from_numpy(values)[y][:, None, None].expand(4, 2, 3)
    for t, inside in ((low, True), (high, True), ((low + high) / 2, True), (low - 0.01, False),
                      (high + 0.01, False)):
        model.rows.clear()
        close(velocity(x, t), values[5] + scale * (c - values[5]) if inside else c, 1e-9)
        assert model.rows == [8 if inside else 4]
    close(velocity(x, high + 0.01, start=high), values[5] + scale * (c - values[5]), 1e-9)
    close(velocity(x, high, start=high + 0.01), c, 1e-9)


def test_guidance_by_a_worse_model(rng):
    good, bad = rng.normal(size=(2, 6))
    y, x = torch.from_numpy(rng.integers(0, 5, 4)), torch.randn(4, 2, 3).double()
    velocity = flow.guided_velocity(Model(good), y, 1.7, (0.0, 0.5), Model(bad))
    c, u = (torch.from_numpy(v)[y][:, None, None].expand(4, 2, 3) for v in (good, bad))
    close(velocity(x, 0.4), u + 1.7 * (c - u), 1e-9)
    close(velocity(x, 0.6), c, 1e-9)


def test_guidance_free(rng):
    values = rng.normal(size=6)
    model, y, x = Model(values, True), torch.from_numpy(rng.integers(0, 5, 4)), torch.randn(4, 2, 3).double()
    velocity = flow.guided_velocity(model, y, 2.5, (0.0, 0.5))
    c = torch.from_numpy(values)[y][:, None, None].expand(4, 2, 3)
    close(velocity(x, 0.4), c / 2.5, 1e-6)
    close(velocity(x, 0.6), c, 1e-6)
    assert model.rows == [4, 4]
    with pytest.raises(ValueError):
        flow.guided_velocity(model, y, 0.5)


def test_modulate():
    x, shift, scale = torch.randn(2, 5, 3), torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    found = sit.modulate(x, shift, scale)
    for b, i in itertools.product(range(2), range(5)):
        close(found[b, i], x[b, i] + x[b, i] * scale[b, 0] + shift[b, 0])


# ------------------------------------------------- A4 -------------------------------------------------

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
