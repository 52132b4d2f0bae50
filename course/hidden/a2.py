"""Hidden tests of A2: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a2.py` runs
all on the solution.
"""
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import losses
import maetok
import train_tokenizer as trainer
from course.hidden.given import (TINY, close, generators, rng, same_gradients, strided, tiny,  # noqa: F401
                                 unchanged)


def test_random_mask(rng):
    make = generators(300, rng)
    low, high = sorted(rng.uniform(0.1, 0.9, 2))
    N = int(rng.integers(30, 60))
    images = make()
    mask = maetok.random_mask(images, N, low, high)
    hidden = mask.sum(1)
    assert mask.dtype == torch.bool and mask.shape == (300, N) and len(images) == 300
    assert hidden.min() >= math.ceil(low * N) and hidden.max() <= math.ceil(high * N)
    assert torch.equal(maetok.random_mask(make(slice(7, 9)), N, low, high), mask[7:9])
    count = int(rng.integers(2, N - 1))                               # a ratio just above count / N: one more
    for ratio in ((count + 0.2) / N, (count + 1e-4) / N):
        assert (maetok.random_mask(make(slice(5)), N, ratio, ratio).sum(1) == count + 1).all()


def test_random_mask_of_ratios_that_are_rounded(rng):
    """Floating point makes 0.55 * 100 and 0.07 * 100 a little more than 55 and 7: they are not rounded up."""
    make = generators(3, rng)
    for percent in (7, 14, 28, 55, 56, 57, 58, *rng.integers(1, 100, 5)):
        assert (maetok.random_mask(make(), 100, percent / 100, percent / 100).sum(1) == percent).all()
    assert maetok.random_mask(make(), 4, 0.99, 0.99).all() and maetok.random_mask(make(), 1, 0.1, 0.2).all()
    assert not maetok.random_mask(make(), 7, 0, 0).any()


def test_random_mask_of_ranges_that_are_refused(rng):
    make = generators(2, rng)
    assert maetok.random_mask([], 16, 0.4, 0.6).shape == (0, 16)
    for bad in ((0.5, 0.4), (-0.1, 0.5), (0.5, 1.0), (1.0, 1.0), (-0.2, -0.1), (0.2, 1.5)):
        for images in (make(), []):
            with pytest.raises(ValueError):
                maetok.random_mask(images, 16, *bad)


def test_random_mask_is_uniform(rng):
    """Ratios between 0.3 and 0.7, drawn by image; of 8 patches every set of one size is equally likely."""
    mask = maetok.random_mask(generators(4000, rng)(), 8, 0.3, 0.7)
    hidden = mask.sum(1)
    for count, share in ((3, 0.1875), (4, 0.3125), (5, 0.3125), (6, 0.1875)):
        assert abs((hidden == count).double().mean() - share) < 0.035                # 5 standard errors
    for count in (3, 4, 5, 6):
        rows = mask[hidden == count].double()
        together = rows.T @ rows / len(rows)                                # shares of places, and of pairs
        expected = torch.full((8, 8), count * (count - 1) / 56).fill_diagonal_(count / 8)
        assert (together - expected).abs().max() < 2.6 / len(rows) ** 0.5            # 5.2 standard errors


def test_image_tokens(rng):
    P, h, w = (int(n) for n in rng.integers(2, 5, 3))
    w += h
    encoder = tiny(patch_size=P, image_size=P).encoder
    nn.init.normal_(encoder.patch_embed.bias)
    images, mask = torch.randn(2, 3, h * P, w * P), torch.from_numpy(rng.random((2, h * w)) < 0.5)
    mask[0, :2], mask[1, :2] = torch.tensor([True, False]), torch.tensor([False, True])
    images.requires_grad_()
    weights = encoder.patch_embed.weight, encoder.patch_embed.bias
    patches = torch.stack([images[:, :, i * P:(i + 1) * P, j * P:(j + 1) * P].permute(0, 2, 3, 1).flatten(1)
                           for i in range(h) for j in range(w)], 1)
    tokens = patches @ weights[0].T + weights[1]
    with unchanged(images, mask, *encoder.parameters()):
        hidden, plain = encoder.image_tokens(images, mask), encoder.image_tokens(images, None)
    expected = torch.where(mask[..., None], encoder.mask_token, tokens)
    assert hidden.shape == plain.shape == (2, h * w, 16)
    same_gradients(plain, tokens, images, *weights)
    same_gradients(hidden, expected, images, encoder.mask_token, *weights)
    with torch.no_grad():
        one = torch.zeros_like(mask)
        one[1, 2] = True
        for some in (torch.zeros_like(mask), torch.ones_like(mask), one):          # nothing, all, one hidden
            oracle = torch.where(some[..., None], encoder.mask_token, tokens)
            close(encoder.image_tokens(images, some), oracle, 1e-4)
        with torch.autocast("cpu", torch.bfloat16):                # the embedding's dtype: that of a product
            for some in (mask, None):
                assert encoder.image_tokens(images, some).dtype == torch.bfloat16
        assert encoder.image_tokens(images, mask).dtype == torch.float32
        found = encoder.bfloat16().image_tokens(images.bfloat16(), mask)
        assert found.dtype == torch.bfloat16
        close(found, expected, 0.1)


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
    assert (encoder(images, mask.roll(1, 1)) - latents).abs().max() > 1e-4
    close(encoder(images[1:], mask[1:]), latents[1:])    # each image by itself, in any batch


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("learnable, L, variational", [(True, 3, False), (True, 1, True), (False, 3, True)])
def test_encoder_by_hand(learnable, L, variational, masked, rng):
    encoder = tiny(learnable_latents=learnable, num_latents=L, variational=variational).encoder
    images, mask = torch.randn(2, 3, 16, 24, requires_grad=True), torch.from_numpy(rng.random((2, 24)) < 0.5)
    mask[:, :2] = torch.tensor([True, False])
    mask = mask if masked else None
    calls = []
    handle = encoder.transformer.register_forward_hook(lambda *call: calls.append(call))
    with unchanged(images, *encoder.parameters(), *[mask] * masked):
        found = encoder(images, mask)
    handle.remove()
    assert len(calls) == 1
    x = encoder.image_tokens(images, mask)
    if learnable:
        x = torch.cat((x, (encoder.latent_tokens + encoder.latent_positions).expand(2, L, 16)), 1)
    x = encoder.transformer(x, (4, 6))
    expected = encoder.to_latent(x[:, 24:] if learnable else x)
    assert found.shape == (2, L if learnable else 24, 8 if variational else 4)
    same_gradients(found, expected, images, *(p for name, p in encoder.named_parameters()
                                              if masked or name != "mask_token"))


def leaves(decoder):
    """A decoder's parameters but those of its last layer."""
    return [p for name, p in decoder.named_parameters() if not name.startswith("head")]


@pytest.mark.parametrize("learnable, L", [(True, 3), (True, 1), (False, 3)])
@pytest.mark.parametrize("one_row", [True, False])
def test_decoder_tokens(learnable, L, one_row, rng):
    grid = (1, 5) if one_row else tuple(int(n) for n in rng.permutation(4)[:2] + 2)
    N = grid[0] * grid[1]
    decoder = tiny(learnable_latents=learnable, num_latents=L).decoder
    nn.init.normal_(decoder.from_latent.bias)
    latents = torch.randn(2, L if learnable else N, 4, requires_grad=True)
    parameters = [p for p in leaves(decoder) if p not in set(decoder.transformer.parameters())]
    with unchanged(latents, *parameters):
        found = decoder.tokens(latents, grid)
    h = latents @ decoder.from_latent.weight.T + decoder.from_latent.bias
    e = decoder.image_token.expand(2, N, 16)
    expected = torch.cat((e, h + decoder.latent_positions), 1) if learnable else e + h
    assert found.shape == (2, N + L if learnable else N, 16)
    same_gradients(found, expected, latents, *parameters)
    with torch.no_grad():
        with unchanged(latents):                    # without a graph in-place changes would go unnoticed
            decoder.tokens(latents.detach(), grid)
        close(decoder.tokens(strided(latents), grid), expected)
        other = torch.randn(5, L if learnable else 6, 4)                   # nothing is kept of the first call
        assert decoder.tokens(other, (2, 3)).shape == (5, 6 + L if learnable else 6, 16)


@pytest.mark.parametrize("learnable", [True, False])
def test_decoder(learnable, rng):
    grid = tuple(int(n) for n in rng.permutation(4)[:2] + 2)
    N, L = grid[0] * grid[1], 3 if learnable else grid[0] * grid[1]
    decoder, latents = tiny(learnable_latents=learnable).decoder, torch.randn(2, L, 4, requires_grad=True)
    calls = []
    handle = decoder.transformer.register_forward_hook(lambda *call: calls.append(call))
    with unchanged(latents, *decoder.parameters()):
        found = decoder.image_tokens(latents, grid)
    handle.remove()
    assert found.shape == (2, N, 16) and len(calls) == 1
    x, e = decoder.from_latent(latents), decoder.image_token.expand(2, N, 16)
    x = torch.cat((e, x + decoder.latent_positions), 1) if learnable else e + x
    same_gradients(found, decoder.transformer(x, grid)[:, :N], latents, *leaves(decoder))


@pytest.mark.parametrize("learnable", [True, False])
def test_decode_all(learnable, rng):
    model = tiny({"hog": 7, "other": 3}, learnable_latents=learnable)
    nn.init.normal_(model.decoder.head.weight)                             # pixels far outside [-1, 1], too
    rows, columns = (int(n) for n in rng.permutation(4)[:2] + 2)
    h = torch.randn(2, 3 if learnable else rows * columns, 4, requires_grad=True)
    posterior, calls = torch.randn(2, 3, 8), []
    handles = [decoder.transformer.register_forward_hook(lambda *call: calls.append(call))
               for decoder in (model.decoder, *model.aux_decoders.values())]
    with unchanged(h, posterior, *model.parameters()):
        output = model.decode_all(h, (rows, columns), posterior)
    for handle in handles:
        handle.remove()
    assert len(calls) == 3                                                      # each decoder once
    assert isinstance(output, maetok.MAETokOutput)
    assert output.latents is h and output.posterior is posterior
    assert list(output.aux) == ["hog", "other"]
    pixels = model.decoder(h, (rows, columns)).reshape(2, rows, columns, 4, 4, 3)
    pixels = pixels.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4 * rows, 4 * columns)
    assert pixels.abs().max() > 1
    same_gradients(output.reconstruction, pixels, h, *model.decoder.parameters())
    for name, decoder in model.aux_decoders.items():
        same_gradients(output.aux[name], decoder(h, (rows, columns)), h, *decoder.parameters())
    output.aux["other"].square().sum().backward()
    assert h.grad.abs().sum() > 0 and model.decoder.head.weight.grad is None
    assert model.decode_all(h, (rows, columns)).posterior is None
    plain = tiny(learnable_latents=learnable).decode_all(h, (rows, columns))         # as in stage 2
    assert plain.aux == {} and plain.reconstruction.shape == pixels.shape


class Added(maetok.MAETok):
    """Its decoders see latents to which something is added."""

    def decode_all(self, h, grid, posterior=None, added=0):
        return super().decode_all(h + added, grid, posterior)


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("variational, noisy", [(True, True), (True, False), (False, True), (False, False)])
def test_latents(learnable, variational, noisy, rng):
    """In training mode, too: nothing is drawn, noise that is not asked for is not added."""
    model = tiny(variational=variational, learnable_latents=learnable).train()
    images, mask = torch.randn(2, 3, 24, 16, requires_grad=True), torch.from_numpy(rng.random((2, 24)) < 0.5)
    mask[:, :2] = torch.tensor([True, False])
    noise = torch.randn(2, 3 if learnable else 24, 4) if noisy else None
    if variational:
        with torch.no_grad():
            model.encoder.to_latent.bias[4:] += torch.tensor([0.0, 25.0, -60.0, 1.0])
    calls = []
    handle = model.encoder.register_forward_hook(lambda *call: calls.append(call))
    with unchanged(images, mask, *[noise] * noisy, *model.parameters()):
        h, posterior = model.latents(images, mask, noise)
    handle.remove()
    assert len(calls) == 1                                                      # the encoder runs once
    expected = model.encoder(images, mask)
    parameters = images, *model.encoder.parameters()
    if variational:
        mean, logvar = expected[..., :4], expected[..., 4:].clip(-30, 20)
        expected = mean + logvar.exp().sqrt() * noise if noisy else mean
        same_gradients(posterior, torch.cat((mean, logvar), -1), *parameters)
    else:
        assert posterior is None
    same_gradients(h, expected, *parameters)
    with torch.no_grad():
        again, _ = model.latents(images)
        close(again, model.encoder(images, None)[..., :4])


def test_forward(rng):
    model = tiny({"hog": 7}, variational=True).eval()
    images, mask = torch.randn(2, 3, 24, 16), torch.from_numpy(rng.random((2, 24)) < 0.5)
    noise = torch.randn(2, 3, 4)
    output = model(images, mask, noise)
    mean, logvar = model.encoder(images, mask).chunk(2, -1)
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


@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 1, 1), (2, 700, 3)])
def test_masked_feature_loss(shape, rng):
    B, N, D = shape
    prediction, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mask = torch.from_numpy(rng.random((B, N)) < 0.5)
    mask[0], mask[1] = False, True
    images = [(prediction[b][mask[b]] - target[b][mask[b]]).pow(2).sum() / max(1, int(mask[b].sum())) / D
              for b in range(B)]
    expected = torch.stack(images).sum() / B
    with unchanged(prediction, target, mask):
        found = maetok.masked_feature_loss(prediction, target, mask)
    assert found.dtype == torch.float32
    same_gradients(found, expected, prediction, tolerance=1e-5)
    with torch.no_grad():
        with unchanged(prediction, target, mask):                              # not in place on plain tensors
            close(maetok.masked_feature_loss(prediction.detach(), target, mask), found)
        close(maetok.masked_feature_loss(strided(prediction), strided(target), mask.T.contiguous().T), found)
        with torch.autocast("cpu", torch.bfloat16):
            close(maetok.masked_feature_loss(prediction, target, mask), found)
        assert maetok.masked_feature_loss(prediction.double(), target.double(), mask).dtype == torch.float32
        half = prediction.bfloat16(), target.bfloat16()
        for p, t in (half, (half[0], target), (prediction, half[1]), [100 * x.half() for x in half]):
            found = maetok.masked_feature_loss(p, t, mask)
            assert found.dtype == torch.float32
            oracle = ((p.double() - t.double()).square().mean(-1) * mask).sum(1) / mask.sum(1).clamp(min=1)
            assert found.item() == pytest.approx(oracle.mean().item(), rel=1e-5)


def test_masked_feature_loss_of_nothing_hidden():
    """It is 0, and so is its gradient."""
    prediction = torch.randn(2, 4, 3, requires_grad=True)
    loss = maetok.masked_feature_loss(prediction, torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool))
    gradient, = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_adaptive_weight(rng):
    weight = torch.randn(3, 5, requires_grad=True)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    for scale in (1.0, 1e-4):                                          # the second is as small as the epsilon
        found = losses.adaptive_weight((weight * a).sum(), (weight * b).sum() * scale, weight)
        expected = min((a.norm() / (b.norm() * scale + 1e-4)).item(), 1e4)
        assert found.item() == pytest.approx(expected, rel=1e-4)
    assert losses.adaptive_weight((weight * a).sum() * 1e6, (weight * 0).sum(), weight).item() == 1e4
    assert losses.adaptive_weight((weight * 0).sum(), (weight * b).sum(), weight).item() == 0
    assert weight.grad is None and not found.requires_grad


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 1, 4)])
def test_adaptive_weight_leaves_graph_and_gradients_alone(shape):
    """Both losses can still be differentiated; no parameter has another .grad than before."""
    weight, other = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    kept = weight.grad = torch.randn(shape)
    x = (weight * other).tanh()
    loss, adversarial = (x - 1).square().sum(), (x ** 3).sum()
    expected = [torch.autograd.grad(part, weight, retain_graph=True)[0] for part in (loss, adversarial)]
    with unchanged(kept, weight, other, loss, adversarial):
        found = losses.adaptive_weight(loss, adversarial, weight)
    assert weight.grad is kept and other.grad is None
    assert isinstance(found, torch.Tensor) and found.shape == () and found.dtype == torch.float32
    assert not found.requires_grad
    ratio = expected[0].norm() / (expected[1].norm() + 1e-4)
    assert found.item() == pytest.approx(ratio.item(), rel=1e-5)
    gradient, = torch.autograd.grad(loss + found * adversarial, weight)
    close(gradient, expected[0] + ratio * expected[1])


def test_adaptive_weight_averages_gradients_over_processes(monkeypatch):
    """Of two, where the other one's gradient is this one's with its last axis rolled."""
    def all_reduce(x, *args, **options):
        x += x.roll(1, -1) if x.ndim else x.clone()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda *args: 2)
    weight, a, b = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.randn(3, 5)
    for scale in (1.0, 1e-4):
        found = losses.adaptive_weight((weight * a).sum(), (weight * b).sum() * scale, weight)
        norms = [((x + x.roll(1, -1)) / 2).norm() for x in (a, b * scale)]
        expected = min((norms[0] / (norms[1] + 1e-4)).item(), 1e4)
        assert found.item() == pytest.approx(expected, rel=1e-4)


class Critic(nn.Module):
    """Takes the adversary's place: logits that depend on each pixel and on the window. Notes its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.seen = []

    def logits(self, images, window):
        self.seen.append((images.dtype, torch.is_autocast_enabled("cpu"), window))
        return (images * self.weight).mean((1, 2, 3)) * (window or 0.7)


class Doubled(losses.Target):
    """A target whose loss is Eq. 8 with twice its features: prediction and y are not alike."""

    def loss(self, prediction, y, mask):
        assert mask.dtype == torch.bool
        return super().loss(prediction, 2 * y, mask)


class Objective:
    """A training method without networks to load, one batch, and what the model makes of it."""

    def __init__(self, rng, **changes):
        percep, disc, aux, kl = (float(w) for w in rng.uniform(0.1, 0.9, 4))
        given = dict(percep_weight=percep, disc_weight=disc, kl_weight=kl, aux_weight=7.0, variational=True,
                     dtype="float32")
        self.config = trainer.Config(**given | changes)
        self.method = object.__new__(trainer.Method)
        self.critic, self.lpips_dtypes = Critic(), []
        vars(self.method).update(config=self.config, device=torch.device("cpu"), lpips=self.lpips,
                                 adversary=self.critic, targets={"hog": Doubled(), "other": losses.Target()})
        self.method.targets["hog"].weight, self.method.targets["other"].weight = aux, 0.3
        self.model = tiny()
        self.model.decoder.head.weight = self.last = nn.Parameter(torch.randn(6, 4))
        self.images, self.x = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 6) @ self.last
        self.features = {"hog": torch.randn(2, 5, 3, requires_grad=True),
                         "other": torch.randn(2, 5, 2, requires_grad=True)}
        self.y = {name: torch.randn(x.shape) for name, x in self.features.items()}
        self.posterior = torch.randn(2, 3, 8, requires_grad=True)
        self.mask = torch.from_numpy(rng.random((2, 5)) < 0.5)
        self.mask[:, :2] = torch.tensor([True, False])
        self.output = maetok.MAETokOutput(self.x, None, self.features, self.posterior)
        self.batch = trainer.Batch(self.images, self.mask, torch.zeros(2, 3, 4), self.y, [7.0, 8.0, 0.5], {})

    def lpips(self, a, b):
        self.lpips_dtypes.append((a.dtype, b.dtype))
        return (a - b).square().mean((1, 2, 3)) * 2 + torch.tensor([0.5, 1.0])

    def __call__(self, step):
        inputs = self.images, self.mask, self.x, self.posterior, *self.features.values(), *self.y.values()
        with unchanged(*inputs, self.last, self.critic.weight):
            return self.method.objective(step, self.batch, self.output, self.model)

    def check(self, step, mask=None):
        """Every term and their sum as by hand, with the parts that self.method and self.batch have."""
        loss, terms = self(step)
        x, c = self.output.reconstruction.float(), self.config
        by_hand = {"recon": F.mse_loss(x, self.images)}
        expected = by_hand["recon"]
        if self.method.lpips:
            by_hand["percep"] = self.lpips(x, self.images).sum() / 2
            expected = expected + c.percep_weight * min(1, step / 10) * by_hand["percep"]
        if self.batch.windows:
            adv = -(x * self.critic.weight.detach()).mean() * (self.batch.windows[-1] or 0.7)
            g1, g2 = (torch.autograd.grad(part, self.last, retain_graph=True)[0].norm()
                      for part in (expected, adv))
            by_hand |= {"adv": adv, "adaptive_weight": g1 / (g2 + 1e-4)}
            expected = expected + c.disc_weight * by_hand["adaptive_weight"] * adv
        for name in self.batch.targets:
            squares = (self.features[name] - (2 if name == "hog" else 1) * self.y[name]).square().mean(-1)
            share = (self.mask if mask is None else mask).double()
            by_hand[name] = ((squares * share).sum(1) / share.sum(1).clamp(min=1)).mean()
            expected = expected + self.method.targets[name].weight * by_hand[name]
        if self.batch.noise is not None:
            by_hand["kl"] = maetok.kl_divergence(self.posterior)
            expected = expected + c.kl_weight * by_hand["kl"]
        assert terms.keys() == by_hand.keys()
        for name, value in by_hand.items():
            assert terms[name].dtype == torch.float32
            close(terms[name], value, 1e-4)
        used = [self.last, *(self.features[name] for name in self.batch.targets),
                *[self.posterior] * (self.batch.noise is not None)]
        same_gradients(loss, expected, *used, tolerance=2e-4)
        loss.backward()
        assert self.critic.weight.grad is None
        return loss, terms


@pytest.fixture
def objective(rng, monkeypatch):
    """A function that makes an Objective; the perceptual loss grows over 10 steps."""
    monkeypatch.setattr(trainer, "PERCEP_WARMUP", 10)
    return lambda **changes: Objective(rng, **changes)


def test_objective(objective, rng):
    for step in (0, int(rng.integers(1, 9)), 10, 25):
        objective().check(step)


def test_objective_without_what_does_not_apply(objective):
    """No LPIPS, a VAE's second stage, which takes the mean and no targets, a GAN that sees whole images."""
    case = objective()
    case.method.lpips = case.method.adversary = None
    case.batch = case.batch._replace(windows=None)
    case.check(3)
    case = objective()                                                                  # stage 2
    case.batch = case.batch._replace(noise=None, targets={}, mask=torch.zeros_like(case.mask))
    case.output = case.output._replace(aux={})
    case.check(3)
    case = objective(variational=False)
    case.batch, case.output = case.batch._replace(noise=None), case.output._replace(posterior=None)
    case.check(3)
    case = objective()                             # None in the list: the discriminator sees whole images
    case.batch = case.batch._replace(windows=[0.3, None, None])
    case.check(3)
    assert case.critic.seen[-1][2] is None
    case = objective()                                               # a GAN that does not take part yet
    case.batch = case.batch._replace(windows=None)
    case.check(3)
    assert not case.critic.seen


def test_objective_of_masks(objective):
    """All patches where mask_high is 0; otherwise the batch's mask, also one with nothing hidden: mask_low 0
    can draw it."""
    case = objective(mask_low=0.0, mask_high=0.0)
    case.mask[:] = False
    case.check(3, mask=torch.ones_like(case.mask))
    case = objective(mask_low=0.0, mask_high=0.6)
    case.check(3)
    case = objective(mask_low=0.0, mask_high=0.6)
    case.mask[1] = False
    case.check(3)
    case = objective(mask_low=0.0, mask_high=0.6)
    case.mask[:] = False
    _, terms = case.check(3)
    assert terms["hog"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_objective_precision(dtype, objective):
    """The model may answer in bfloat16: the terms are float32. Only the adversary runs under autocast."""
    case = objective(dtype=dtype)
    case.output = case.output._replace(reconstruction=case.x.bfloat16())
    loss, terms = case(3)
    assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in terms.values())
    exact = F.mse_loss(case.x.bfloat16().double(), case.images.double())
    assert terms["recon"].item() == pytest.approx(exact.item(), rel=1e-6)
    assert set(case.lpips_dtypes) == {(torch.float32, torch.float32)}
    assert case.critic.seen == [(torch.float32, dtype == "bfloat16", 0.5)]
    assert not torch.is_autocast_enabled("cpu")


def method_of(**config):
    """A training method with this configuration, and no networks loaded."""
    method = object.__new__(trainer.Method)
    vars(method).update(config=trainer.Config(**config), device=torch.device("cpu"))
    return method


def test_mask_range(rng):
    top, share, steps = (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.3, 0.9)),
                         int(rng.integers(50, 200)) * 10)
    method = method_of(stage2_ramp=share, stage2_steps=steps, steps=77, mask_low=0.1, mask_high=top)
    stage, last = trainer.Stage(2, 77, 77 + steps), share * steps - 1
    for part in (0.0, 0.25, 1.0):
        assert method.mask_range(stage, 77 + part * last) == pytest.approx((top * (1 - part),) * 2, abs=1e-6)
    for step in (77 + math.ceil(last), 77 + math.ceil(last) + 1, 76 + steps):
        assert method.mask_range(stage, step) == (0, 0)
    for step in (0, 5, 76):
        assert method.mask_range(trainer.Stage(1, 0, 77), step) == (0.1, top)


def test_mask_range_at_its_limits():
    """A second stage or a ramp of one step, no ramp at all, nothing hidden, the whole stage."""
    for share, steps in ((1.0, 1), (0.5, 2), (0.0, 50), (0.001, 50)):
        method = method_of(stage2_ramp=share, stage2_steps=steps, steps=20, mask_low=0.2, mask_high=0.5)
        stage = trainer.Stage(2, 20, 20 + steps)
        assert method.mask_range(stage, 20) == (0.5, 0.5)
        for step in range(21, 20 + steps):
            assert method.mask_range(stage, step) == (0, 0)
    method = method_of(stage2_steps=3, steps=20, mask_low=0.0, mask_high=0.6)
    ratios = [method.mask_range(trainer.Stage(2, 20, 23), step) for step in (20, 21, 22)]
    assert ratios == [pytest.approx((ratio, ratio)) for ratio in (0.6, 0.3, 0)]
    method = method_of(stage2_steps=9, steps=20, mask_low=0.0, mask_high=0.0)
    stage = trainer.Stage(2, 20, 29)
    assert method.mask_range(trainer.Stage(1, 0, 20), 3) == method.mask_range(stage, 20) == (0, 0)
    assert method.mask_range(stage, 28) == (0, 0)
