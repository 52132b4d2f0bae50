"""Hidden tests of A2: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a2.py` runs
all on the solution.
"""
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import maetok
import train_tokenizer as trainer
from course.hidden.given import TINY, close, generators, rng, tiny  # noqa: F401


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
