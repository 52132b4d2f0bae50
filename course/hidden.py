"""Tests that students do not see: one or more per blank, against loops and closed forms, on data of a seed.

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
from common import UserError  # noqa: E402
from study import theory  # noqa: E402

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


def test_rope_angles(rng):
    rows, columns, others = (int(n) for n in rng.permutation(4)[:3] + 1)
    rope = maetok.RoPE2D(12)
    rope.freqs = torch.rand(3) * 2
    cos, sin = rope((rows, columns), others)
    assert cos.shape == sin.shape == (rows * columns + others, 6)
    for place in range(rows * columns + others):
        inside = place < rows * columns
        col, row = (place % columns, place // columns) if inside else (0, 0)
        angle = torch.cat((col * rope.freqs, row * rope.freqs))
        close(cos[place], angle.cos())
        close(sin[place], angle.sin())


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


# An odd number of bins: with an even one pi / 2 is a border of two bins, and at the image's edge rounding
# decides the sign of gy.
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


def test_image_tokens(rng):
    P, h, w = (int(n) for n in rng.integers(2, 5, 3))
    w += h
    encoder = tiny(patch_size=P, image_size=P).encoder
    nn.init.normal_(encoder.patch_embed.bias)
    images, mask = torch.randn(2, 3, h * P, w * P), torch.from_numpy(rng.random((2, h * w)) < 0.5)
    hidden, plain = encoder.image_tokens(images, mask), encoder.image_tokens(images, None)
    assert hidden.shape == plain.shape == (2, h * w, 16)
    for b, i, j in itertools.product(range(2), range(h), range(w)):
        pixels = images[b, :, i * P:(i + 1) * P, j * P:(j + 1) * P].permute(1, 2, 0).flatten()
        token = encoder.patch_embed.weight @ pixels + encoder.patch_embed.bias
        close(plain[b, i * w + j], token, 1e-4)
        close(hidden[b, i * w + j], encoder.mask_token[0, 0] if mask[b, i * w + j] else token, 1e-4)
    assert encoder.bfloat16().image_tokens(images.bfloat16(), mask).dtype == torch.bfloat16


def test_encoder(rng):
    """The pixels of hidden patches are not read, those of visible ones are, and a hidden one keeps its
    position."""
    encoder = tiny().encoder
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


@pytest.mark.parametrize("learnable", [True, False])
def test_encoder_without_a_mask(learnable):
    encoder = tiny(learnable_latents=learnable).encoder
    images = torch.randn(2, 3, 16, 24)
    nothing = torch.zeros(2, 24, dtype=torch.bool)
    found = encoder(images, None)
    close(found, encoder(images, nothing))
    x = encoder.patch_embed(maetok.patchify(images, 4))
    if learnable:
        x = torch.cat((x, (encoder.latent_tokens + encoder.latent_positions).expand(2, 3, 16)), 1)
    x = encoder.transformer(x, (4, 6))
    close(found, encoder.to_latent(x[:, 24:] if learnable else x))


@pytest.mark.parametrize("learnable", [True, False])
def test_decoder_tokens(learnable, rng):
    grid = tuple(int(n) for n in rng.permutation(4)[:2] + 2)
    N, L = grid[0] * grid[1], 3 if learnable else grid[0] * grid[1]
    decoder, latents = tiny(learnable_latents=learnable).decoder, torch.randn(2, L, 4)
    found = decoder.tokens(latents, grid)
    assert found.shape == (2, N + 3 if learnable else N, 16)
    for b, i in itertools.product(range(2), range(L)):
        h = decoder.from_latent.weight @ latents[b, i] + decoder.from_latent.bias
        if learnable:
            close(found[b, N + i], h + decoder.latent_positions[0, i])
        else:
            close(found[b, i], h + decoder.image_token[0, 0])
    if learnable:
        close(found[:, :N], decoder.image_token.expand(2, N, 16))


@pytest.mark.parametrize("learnable", [True, False])
def test_decoder(learnable, rng):
    grid = tuple(int(n) for n in rng.permutation(4)[:2] + 2)
    N, L = grid[0] * grid[1], 3 if learnable else grid[0] * grid[1]
    decoder, latents = tiny(learnable_latents=learnable).decoder, torch.randn(2, L, 4)
    x, e = decoder.from_latent(latents), decoder.image_token.expand(2, N, 16)
    x = torch.cat((e, x + decoder.latent_positions), 1) if learnable else e + x
    found = decoder.image_tokens(latents, grid)
    assert found.shape == (2, N, 16)
    close(found, decoder.transformer(x, grid)[:, :N])


def test_decode_all(rng):
    model = tiny({"hog": 7, "other": 3}).eval()
    h, posterior = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 8)
    rows, columns = (int(n) for n in rng.permutation(4)[:2] + 2)
    output = model.decode_all(h, (rows, columns), posterior)
    close(output.reconstruction, model.decode(h, (4 * rows, 4 * columns)))
    assert output.latents is h and output.posterior is posterior
    assert list(output.aux) == ["hog", "other"]
    for name, dim in (("hog", 7), ("other", 3)):
        assert output.aux[name].shape == (2, rows * columns, dim)
        close(output.aux[name], model.aux_decoders[name](h, (rows, columns)))
    output.aux["other"].square().sum().backward()
    assert h.grad.abs().sum() > 0 and model.decoder.head.weight.grad is None
    assert model.decode_all(h, (rows, columns)).posterior is None


class Added(maetok.MAETok):
    """Its decoders see latents to which something is added."""

    def decode_all(self, h, grid, posterior=None, added=0):
        return super().decode_all(h + added, grid, posterior)


def test_forward(rng):
    model = tiny({"hog": 7}, variational=True).eval()
    images, mask = torch.randn(2, 3, 24, 16), torch.from_numpy(rng.random((2, 24)) < 0.5)
    noise = torch.randn(2, 3, 4)
    with torch.no_grad():
        model.encoder.to_latent.bias[4:] += torch.tensor([0.0, 40.0, -60.0, 1.0])
    output = model(images, mask, noise)
    mean, logvar = model.encoder(images, mask).chunk(2, -1)
    logvar = logvar.clip(-30, 20)
    close(output.posterior, torch.cat((mean, logvar), -1))
    close(output.latents, mean + logvar.exp().sqrt() * noise)
    close(output.reconstruction, model.decode(output.latents, (24, 16)))
    close(output.aux["hog"], model.aux_decoders["hog"](output.latents, (6, 4)))
    close(model(images, mask).latents, mean)
    output.aux["hog"].sum().backward()
    assert model.encoder.latent_tokens.grad.abs().sum() > 0 and model.decoder.head.weight.grad is None
    extra = Added(maetok.MAETokConfig(**TINY)).eval()
    amount = float(rng.uniform(1, 2))
    close(extra(images, mask, added=amount).latents, extra.encode(images, mask) + amount)


def test_masked_feature_loss(rng):
    prediction, target = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    mask = torch.from_numpy(rng.random((4, 6)) < 0.5)
    mask[0], mask[1] = False, True
    images = []
    for b in range(4):
        values = [((p - t) ** 2).mean() for p, t, hidden in zip(prediction[b], target[b], mask[b]) if hidden]
        images.append(sum(values) / len(values) if values else torch.zeros(()))
    close(maetok.masked_feature_loss(prediction, target, mask), sum(images) / 4)
    half = prediction.bfloat16(), target.bfloat16()
    found = maetok.masked_feature_loss(*half, mask)
    assert found.dtype == torch.float32
    close(found, maetok.masked_feature_loss(*(x.float() for x in half), mask), 1e-6)


def test_adaptive_weight(rng):
    weight = torch.randn(3, 5, requires_grad=True)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    for scale in (1.0, 1e-4):                                          # the second is as small as the epsilon
        found = losses.adaptive_weight((weight * a).sum(), (weight * b).sum() * scale, weight)
        expected = min((a.norm() / (b.norm() * scale + 1e-4)).item(), 1e4)
        assert found.item() == pytest.approx(expected, rel=1e-4)
    assert losses.adaptive_weight((weight * a).sum() * 1e6, (weight * 0).sum(), weight).item() == 1e4
    assert weight.grad is None and not found.requires_grad


class Critic(nn.Module):
    """Takes the adversary's place: logits that depend on each pixel and on the window."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def logits(self, images, window):
        return (images * self.weight).mean((1, 2, 3)) * window


class Doubled(losses.Target):
    """A target whose loss is twice Eq. 8."""

    def loss(self, prediction, y, mask):
        return 2 * super().loss(prediction, y, mask)


def method_of(config, **parts):
    """A training method with these parts, and no networks loaded."""
    method = object.__new__(trainer.Method)
    vars(method).update(config=config, device=torch.device("cpu"), **parts)
    return method


def test_objective(rng, monkeypatch):
    percep, disc, aux, kl = (float(w) for w in rng.uniform(0.1, 0.9, 4))
    config = trainer.Config(percep_weight=percep, disc_weight=disc, kl_weight=kl, variational=True,
                            dtype="float32")
    monkeypatch.setattr(trainer, "PERCEP_WARMUP", 10)
    critic, last, target = Critic(), torch.randn(6, 4, requires_grad=True), Doubled()
    target.weight = aux
    lpips = lambda a, b: (a - b).square().mean((1, 2, 3)) * 2
    method = method_of(config, lpips=lpips, adversary=critic, targets={"hog": target})
    model = tiny()
    model.decoder.head.weight = nn.Parameter(last.detach())
    last = model.decoder.head.weight
    images, features, y = torch.rand(2, 3, 4, 4), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    x = torch.randn(2, 3, 4, 6) @ last
    posterior, mask = torch.randn(2, 3, 8), torch.from_numpy(rng.random((2, 5)) < 0.5)
    mask[:, 0] = True
    output = maetok.MAETokOutput(x, None, {"hog": features}, posterior)
    step = int(rng.integers(1, 9))
    batch = trainer.Batch(images, mask, torch.zeros(2, 3, 4), {"hog": y}, [7.0, 8.0, 0.5], {})
    loss, terms = method.objective(step, batch, output, model)
    recon = F.mse_loss(x, images)
    expected = recon + percep * step / 10 * 2 * recon
    adv = -0.5 * (x * critic.weight.detach()).mean()
    g1, g2 = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (expected, adv))
    expected = expected + disc * g1 / (g2 + 1e-4) * adv
    squares = (features - y).square().mean(-1)
    expected = expected + aux * sum(2 * s[m].mean() for s, m in zip(squares, mask)) / 2
    expected = expected + kl * maetok.kl_divergence(posterior)
    close(loss, expected, 1e-4)
    assert {"recon", "percep", "adv", "adaptive_weight", "hog", "kl"} == set(terms)
    loss.backward()
    assert critic.weight.grad is None and last.grad.abs().sum() > 0
    # Nothing but Eq. 8, where nothing is hidden.
    config = trainer.Config(mask_low=0.0, mask_high=0.0)
    method = method_of(config, lpips=None, adversary=None, targets={"hog": target})
    batch = trainer.Batch(images, torch.zeros_like(mask), None, {"hog": y}, None, {})
    loss, terms = method.objective(step, batch, output._replace(posterior=None), model)
    close(loss, recon + aux * 2 * squares.mean(), 1e-4)
    assert terms.keys() == {"recon", "hog"}


def test_mask_range(rng):
    top, share, steps = (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.3, 0.9)),
                         int(rng.integers(50, 200)) * 10)
    method = method_of(trainer.Config(stage2_ramp=share, stage2_steps=steps, steps=77, mask_low=0.1,
                                      mask_high=top))
    stage, last = trainer.Stage(2, 77, 77 + steps), share * steps - 1
    for part in (0.0, 0.25, 1.0):
        assert method.mask_range(stage, 77 + part * last) == pytest.approx((top * (1 - part),) * 2, abs=1e-6)
    assert method.mask_range(stage, 76 + steps) == (0, 0)
    assert method.mask_range(trainer.Stage(1, 0, 77), 5) == (0.1, top)


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


def test_time_grid(rng):
    steps, last = int(rng.integers(3, 40)), float(rng.uniform(0.01, 0.2))
    even, short = flow.time_grid(steps), flow.time_grid(steps, last)
    assert len(even) == len(short) == steps + 1 and all(isinstance(t, float) for t in even + short)
    np.testing.assert_allclose(even, [1 - i / steps for i in range(steps + 1)], rtol=0, atol=1e-14)
    before = [1 - i * (1 - last) / (steps - 1) for i in range(steps)]
    np.testing.assert_allclose(short, [*before, 0], rtol=0, atol=1e-14)
    for bad in ((0,), (-steps,), (steps, 0.0), (steps, 1.0), (steps, -last)):
        with pytest.raises(ValueError):
            flow.time_grid(*bad)


def field(rng):
    """A velocity that depends on state and time, and the times at which it was called."""
    a, b, times = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)), []

    def velocity(x, t):
        times.append(t)
        return (torch.sin(a * x) + b * t * x).double()
    return velocity, times


def falling(rng):
    """Unequal times from 1 to 0."""
    return [1.0, *sorted(rng.uniform(0.05, 0.95, int(rng.integers(3, 8))).tolist(), reverse=True), 0.0]


def test_euler(rng):
    (velocity, _), times, start, states = field(rng), falling(rng), torch.randn(2, 2, 3), []
    found = flow.euler(velocity, start, times, states)
    x = start.double()
    for t, following in zip(times, times[1:]):
        x = x - (t - following) * velocity(x, t)
    assert found.dtype == torch.float32 and [t for t, _ in states] == times
    assert torch.equal(states[0][1], start) and torch.equal(states[-1][1], found)
    close(found, x)


def test_heun(rng):
    (velocity, calls), times, start, states = field(rng), falling(rng), torch.randn(2, 2, 3), []
    found = flow.heun(velocity, start, times, states)
    assert len(calls) == 2 * (len(times) - 1) - 1 and [t for t, _ in states] == times
    x = start.double()
    for t, following in zip(times, times[1:]):
        v = velocity(x, t)
        if following > 0:
            v = (v + velocity(x - (t - following) * v, following)) / 2
        x = x - (t - following) * v
    close(found, x)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_euler_maruyama(path, rng):
    (velocity, _), times, start = field(rng), falling(rng), torch.randn(2, 2, 3)
    noises = torch.randn(len(times), 2, 2, 3).double()
    found = flow.euler_maruyama(velocity, start, times, noise=lambda step: noises[step], path=path)
    x = start.double()
    for step, (t, following) in enumerate(zip(times, times[1:])):
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        v = velocity(x, t)
        score = -(alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma) / sigma
        x = x - (t - following) * (v - sigma * score)
        if following > 0:
            x = x + math.sqrt(2 * sigma * (t - following)) * noises[step]
    assert found.dtype == torch.float32
    close(found, x)


class Model(nn.Module):
    """Velocity = a number for each class; notes the rows of its calls and what else it is given."""

    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.config = sit.SiTConfig(num_latents=2, latent_dim=3, width=8, heads=2, depth=1,
                                    num_classes=len(values) - 1)
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.values, self.rows = nn.Parameter(torch.as_tensor(values).to(dtype)), []

    def forward(self, x, t, y, **more):
        self.rows.append(len(x))
        self.seen = x.dtype, t, more
        return self.values[y][:, None, None].expand_as(x)


def test_call(rng):
    values, t, number = rng.normal(size=6), float(rng.uniform()), float(rng.uniform())
    model, y = Model(values, torch.float32), torch.from_numpy(rng.integers(0, 5, 4))
    found = flow.call(model, torch.randn(4, 2, 3).double(), t, y, number=number)
    close(found, torch.from_numpy(values)[y][:, None, None].expand(4, 2, 3), 1e-6)
    dtype, times, more = model.seen
    assert found.dtype == torch.float64 and dtype == times.dtype == torch.float32
    close(times, torch.full((4,), t), 1e-6)
    assert more.keys() == {"number"}
    close(more["number"], torch.full((4,), number), 1e-6)


def test_inside(rng):
    low, high = sorted(rng.uniform(0.1, 0.9, 2).tolist())
    for t in (low, high, (low + high) / 2, low - 1e-9, high + 1e-9):
        assert flow.inside(t, (low, high)), t
    for t in (0.0, 1.0, low - 1e-3, high + 1e-3):
        assert not flow.inside(t, (low, high)), t


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
        close(velocity(x, t, number=t), values[5] + scale * (c - values[5]) if inside else c, 1e-9)
        assert model.rows == [8 if inside else 4]
        close(model.seen[2]["number"], torch.full((8 if inside else 4,), t), 1e-6)
    model.rows.clear()
    close(flow.guided_velocity(model, y)(x, high), c, 1e-9)
    assert model.rows == [4]


def test_guidance_needs_classes():
    model, y = Model([0.5]), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError):
        flow.guided_velocity(model, y, 2.0)
    x = torch.randn(4, 2, 3).double()
    close(flow.guided_velocity(model, y)(x, 0.5), torch.full_like(x, 0.5), 1e-9)


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
