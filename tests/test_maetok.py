"""maetok.py: the architecture against independent oracles, the paper's counts, and what the method promises.
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from losses import Target
from maetok import (MAETok, MAETokConfig, Block, RoPE2D, kl_divergence, masked_feature_loss,
                    patchify, random_mask, rotate, unpatchify)
from pictures.draw import mask_out

TINY = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2, decoder_depth=2, num_latents=5,
            latent_dim=6, aux_depth=1)


def target(dim):
    """An auxiliary target of `dim` values per patch; what it asks for plays no role in the model."""
    made = Target()
    made.dim = dim
    return made


def tiny(**changes):
    return MAETok(MAETokConfig(**(TINY | changes)), {"hog": target(27), "anything": target(10)}).eval()


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def parameters(**config):
    with torch.device("meta"):
        return sum(p.numel() for p in MAETok(MAETokConfig(**config)).parameters())


def test_parameter_count_of_the_paper_size():
    # The paper says 176 M for encoder and decoder, the released checkpoint has 173.9 M; ours, without what
    # only the released code has (class token, position table, LayerScale, latent modulation), has 171.6 M.
    assert parameters() == 171_639_584
    assert abs(parameters() / 176e6 - 1) < 0.03
    assert parameters(image_size=512) == parameters()          # nothing depends on the image size


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (256, 384)])
def test_full_size_shapes_on_the_meta_device(size):
    with torch.device("meta"):
        model = MAETok(MAETokConfig(), {"hog": target(108), "dinov2": target(1024)})
        output = model(torch.empty(2, 3, *size))
    N = size[0] * size[1] // 256
    assert output.latents.shape == (2, 128, 32)
    assert output.reconstruction.shape == (2, 3, *size)
    assert output.aux["hog"].shape == (2, N, 108) and output.aux["dinov2"].shape == (2, N, 1024)


def test_one_set_of_weights_runs_at_any_size_the_patch_divides():
    model = tiny()
    for size in ((16, 16), (32, 32), (16, 24)):
        latents = model.encode(torch.randn(2, 3, *size))
        assert latents.shape == (2, 5, 6)
        assert model.decode(latents, size).shape == (2, 3, *size)
    with pytest.raises(ValueError, match="multiples"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="multiples"):
        model.decode(torch.zeros(1, 5, 6), (18, 16))


@pytest.mark.parametrize("images, message", [
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8; data.to_float"),
    (torch.zeros(3, 16, 16), r"\(3, 16, 16\); one image is a batch"),
    (torch.zeros(2, 4, 16, 16), "channels come second"), (torch.zeros(2, 16, 16, 3), "channels come second"),
    (torch.zeros(2, 1, 16, 16), "channels come second"),
    (torch.rand(2, 3, 16, 16) * 255, "images / 127.5 - 1"),
    (torch.full((2, 3, 16, 16), torch.nan), "not numbers"), (torch.zeros(2, 3, 16, 16).double(), "float64"),
    (np.zeros((2, 3, 16, 16), np.float32), "a ndarray"), (torch.zeros(2, 3, 18, 16), "multiples")])
def test_images_that_would_be_encoded_to_nonsense_are_refused(images, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny().encode(images)
    assert "\n" not in str(error.value)


def test_images_on_a_gpu_are_looked_at_once(monkeypatch):
    """The host would have to wait for the GPU in every call. Meta tensors hold no values at all."""
    model, good, bad = tiny(), torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 255.0)
    assert tiny().to("meta").encode(good.to("meta")).shape == (1, 5, 6)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with pytest.raises(ValueError, match="far outside"):
        model.encode(bad)
    model.encode(bad)
    model.encode(good)


@pytest.mark.parametrize("learnable, latents, size, message", [
    (True, torch.zeros(2, 1, 6), None, "5 tokens of 6 channels"),          # would be given every position
    (True, torch.zeros(2, 5, 7), None, "5 tokens of 6 channels"),
    (False, torch.zeros(2, 16, 6), (16, 24), "24 tokens of 6 channels"),
    (True, torch.zeros(5, 6), None, r"float32 \(5, 6\)"), (True, [[0.0]], None, "not list"),
    (True, torch.zeros(2, 5, 6, dtype=torch.int64), None, "int64"),
    (True, torch.zeros(2, 5, 6), 16, r"size=\(H, W\)"), (True, torch.zeros(2, 5, 6), (16, 18), "multiples")])
def test_latents_that_cannot_be_decoded_are_refused(learnable, latents, size, message):
    with pytest.raises(ValueError, match=message):
        tiny(learnable_latents=learnable).decode(latents, size)


def test_latents_of_another_size_are_not_decoded_to_the_default_size():
    model = tiny()
    for normalize in (False, True):
        latents = model.encode(torch.zeros(2, 3, 16, 24), normalize=normalize)
        with pytest.raises(ValueError, match=r"16 x 24 px, not 16 x 16: give decode\(latents, size=\(16"):
            model.decode(latents, normalized=normalize)
        assert model.decode(latents, (16, 24), normalized=normalize).shape == (2, 3, 16, 24)
    assert model.decode(model.encode(torch.zeros(2, 3, 16, 16))).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("bad, message", [
    (dict(image_size=18), "multiple of patch_size"), (dict(patch_size=0), "from 1 to"),
    (dict(heads=0), "from 1 to"), (dict(width=30), "head size"), (dict(width=32, heads=16), "head size"),
    (dict(aux_depth=0), "from 1 to")])
def test_impossible_configurations_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MAETokConfig(**(TINY | bad))


def test_new_weights_are_xavier_and_normal():
    model = tiny(width=64, num_latents=64)
    for name, p in model.named_parameters():
        if name.endswith(("_token", "_tokens", "_positions")):
            assert p.std().item() == pytest.approx(1, rel=0.3), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx((2 / sum(p.shape)) ** 0.5, rel=0.15), name


# -------------------------------------------- patches and masks --------------------------------------------

def test_patchify_agrees_with_unfold_and_is_invertible():
    images = torch.randn(2, 3, 8, 12)
    ours = patchify(images, 4).reshape(2, 6, 4, 4, 3)
    oracle = F.unfold(images, 4, stride=4).transpose(1, 2).reshape(2, 6, 3, 4, 4).permute(0, 1, 3, 4, 2)
    assert torch.equal(ours, oracle)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)


def test_images_that_patches_do_not_fill_are_refused():
    for size in ((18, 16), (16, 18), (18, 18)):
        with pytest.raises(ValueError, match="multiples"):
            patchify(torch.zeros(1, 3, *size), 4)


def test_masked_out_patches_are_grey():
    images, mask = torch.rand(2, 3, 8, 12) + 1, torch.rand(2, 6) < 0.5
    found = mask_out(images, mask, 4)
    for b in range(2):
        for n in range(6):
            part = np.s_[b, :, n // 3 * 4:n // 3 * 4 + 4, n % 3 * 4:n % 3 * 4 + 4]
            assert torch.equal(found[part], images[part] * ~mask[b, n])


def test_random_mask_hides_the_share_it_was_asked_for():
    mask = random_mask(rngs(500), 64, 0.4, 0.6)
    hidden = mask.sum(1)
    assert mask.dtype == torch.bool and hidden.min() >= 26 and hidden.max() <= 39     # ceil of 40 % and 60 %
    assert abs(hidden.float().mean() - 32.5) < 1 and hidden.unique().numel() > 10     # uniform over the range
    assert (mask.float().mean(0) - 0.5).abs().max() < 0.12                            # no place is favoured
    assert (random_mask(rngs(4), 10, 0.6, 0.6).sum(1) == 6).all()
    assert not random_mask(rngs(2), 10, 0.0, 0.0).any()


def test_a_mask_belongs_to_its_sample_not_to_its_batch():
    assert torch.equal(random_mask(rngs(8), 16)[3:5], random_mask(rngs(8)[3:5], 16))
    with pytest.raises(ValueError):
        random_mask(rngs(1), 16, 0.6, 0.4)


# ------------------------------------------------ positions ------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_multiplication_by_a_complex_number(dtype):
    x, angle = torch.randn(2, 3, 7, 8).to(dtype), torch.randn(1, 3, 7, 4)
    found = rotate(x, angle.cos(), angle.sin())
    z = torch.complex(x[..., :4].float(), x[..., 4:].float()) * torch.polar(torch.ones_like(angle), angle)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), torch.cat((z.real, z.imag), -1), rtol=tolerance, atol=tolerance)


def test_rope_depends_on_relative_position_only():
    cos, sin = RoPE2D(head_size=16)((6, 7), others=0)
    q, k = torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1), torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0].reshape(3, 6, 7, 6, 7)
    # The same step of (+2 rows, -1 column) from two places gives one score; another step gives another.
    torch.testing.assert_close(scores[:, 1, 3, 3, 2], scores[:, 3, 6, 5, 5], rtol=1e-4, atol=1e-4)
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 3, 4]).abs().min() > 1e-3
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 5, 2]).abs().min() > 1e-3


def test_rope_rotates_image_tokens_by_the_documented_angles_and_leaves_the_others():
    cos, sin = RoPE2D(head_size=8)((2, 3), others=4)
    assert cos.shape == sin.shape == (10, 4) and cos.dtype == torch.float32
    assert torch.equal(cos[6:], torch.ones(4, 4)) and (sin[6:] == 0).all()
    angle = torch.tensor([2 * 1.0, 2 * 0.1, 1 * 1.0, 1 * 0.1])  # column 2, row 1; frequencies 100^0, 100^-1/2
    torch.testing.assert_close(cos[5], angle.cos())
    torch.testing.assert_close(sin[5], angle.sin())


def test_positions_come_from_rope_alone():
    images, model = torch.randn(1, 3, 16, 16), tiny()
    shuffled = unpatchify(patchify(images, 4)[:, torch.randperm(16)], 4, (4, 4))
    same = lambda: torch.allclose(model.encode(images), model.encode(shuffled), atol=1e-5)
    assert not same()
    model.encoder.transformer.rope.freqs.zero_()            # all angles 0: the encoder sees a bag of patches
    assert same()


# ----------------------------------------------- transformer -----------------------------------------------

def test_block_equals_pytorchs_pre_norm_encoder_layer():
    ours = Block(32, 4)
    oracle = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
                                        batch_first=True, norm_first=True)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    pairs = [(oracle.norm1, ours.norm1), (oracle.norm2, ours.norm2), (oracle.linear1, ours.mlp[0]),
             (oracle.linear2, ours.mlp[2]), (oracle.self_attn.out_proj, ours.attn.proj)]
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    oracle.self_attn.in_proj_weight.data.copy_(ours.attn.qkv.weight)
    oracle.self_attn.in_proj_bias.data.copy_(ours.attn.qkv.bias)
    x, no_rotation = torch.randn(2, 7, 32), (torch.ones(7, 4), torch.zeros(7, 4))
    torch.testing.assert_close(ours(x, no_rotation), oracle(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------- encoder and decoder -------------------------------------------

class Recorder(nn.Module):
    """Stands in for a Transformer: notes what it is given, answers twice the tokens."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, grid):
        self.calls.append((x, tuple(grid)))
        return 2 * x


def flat_patches(images):
    """4-px patches (B, N, 48) in the order of patchify, by F.unfold."""
    B, N = len(images), images.shape[-2] * images.shape[-1] // 16
    return F.unfold(images, 4, stride=4).reshape(B, 3, 16, N).permute(0, 3, 2, 1).reshape(B, N, 48)


def test_hidden_patches_become_the_mask_token():
    encoder = tiny().encoder
    nn.init.normal_(encoder.patch_embed.bias)
    images, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 24) < 0.5
    found, patches = encoder.image_tokens(images, mask), flat_patches(images)
    assert found.shape == (2, 24, 32)
    for b in range(2):
        for n in range(24):
            token = encoder.mask_token[0, 0] if mask[b, n] else encoder.patch_embed(patches[b, n])
            torch.testing.assert_close(found[b, n], token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.image_tokens(images, None), encoder.patch_embed(patches),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learnable", [True, False])
def test_the_encoder_reads_its_latents_from_the_learnable_tokens(learnable):
    encoder = tiny(learnable_latents=learnable).encoder
    encoder.transformer = Recorder()
    images, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 24) < 0.5
    latents = encoder(images, mask)
    (x, grid), = encoder.transformer.calls
    L = 5 if learnable else 0
    assert grid == (4, 6) and x.shape == (2, 24 + L, 32)
    torch.testing.assert_close(x[:, :24], encoder.image_tokens(images, mask))
    for b in range(2):
        for i in range(L):
            torch.testing.assert_close(x[b, 24 + i],
                                       encoder.latent_tokens[0, i] + encoder.latent_positions[0, i])
    kept = x[:, 24:] if learnable else x
    torch.testing.assert_close(latents, encoder.to_latent(2 * kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learnable", [True, False])
def test_hidden_patches_do_not_reach_the_latents(learnable):
    model = tiny(learnable_latents=learnable)
    images, mask = torch.randn(2, 3, 16, 16), random_mask(rngs(2), 16)
    hidden, visible = (unpatchify(torch.randn(2, 16, 48) * m[..., None], 4, (4, 4)) for m in (mask, ~mask))
    assert torch.equal(model.encode(images, mask), model.encode(images + hidden, mask))
    assert not torch.allclose(model.encode(images, mask), model.encode(images + visible, mask))
    assert not torch.allclose(model.encode(images, mask), model.encode(images))
    with torch.no_grad():
        before = model.encode(images, mask)
        model.encoder.mask_token += torch.randn(32)                      # replaced by this token, not dropped
    assert not torch.allclose(before, model.encode(images, mask))


def test_the_decoder_is_given_image_tokens_and_latents():
    decoder, latents = tiny().decoder, torch.randn(2, 5, 6)
    found = decoder.tokens(latents, (3, 4))
    assert found.shape == (2, 12 + 5, 32)
    for b in range(2):
        for n in range(12):
            assert torch.equal(found[b, n], decoder.image_token[0, 0])
        for i in range(5):
            torch.testing.assert_close(found[b, 12 + i], decoder.from_latent(latents[b, i])
                                       + decoder.latent_positions[0, i])


def test_latents_of_image_tokens_are_added_to_the_decoders():
    decoder, latents = tiny(learnable_latents=False).decoder, torch.randn(2, 12, 6)
    found = decoder.tokens(latents, (3, 4))
    assert found.shape == (2, 12, 32) and not hasattr(decoder, "latent_positions")
    for b in range(2):
        for n in range(12):
            torch.testing.assert_close(found[b, n],
                                       decoder.image_token[0, 0] + decoder.from_latent(latents[b, n]))


@pytest.mark.parametrize("learnable", [True, False])
def test_the_decoder_is_read_at_the_image_tokens(learnable):
    decoder = tiny(learnable_latents=learnable).decoder
    decoder.transformer, latents = Recorder(), torch.randn(2, 5 if learnable else 12, 6)
    found, rows = decoder.image_tokens(latents, (3, 4)), decoder(latents, (3, 4))
    (x, grid), _ = decoder.transformer.calls
    assert grid == (3, 4) and torch.equal(x, decoder.tokens(latents, (3, 4)))
    assert torch.equal(found, 2 * x[:, :12])
    torch.testing.assert_close(rows, found @ decoder.head.weight.T + decoder.head.bias)


# ------------------------------------------------ the model ------------------------------------------------

@pytest.mark.parametrize("learnable", [True, False])
def test_forward_is_encode_and_decode_under_the_mask(learnable):
    model = tiny(learnable_latents=learnable)
    images, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 24) < 0.5
    output = model(images, mask)
    torch.testing.assert_close(output.latents, model.encode(images, mask))
    torch.testing.assert_close(output.reconstruction, model.decode(output.latents, (16, 24)))
    assert list(output.aux) == ["hog", "anything"] and output.posterior is None
    for name, decoder in model.aux_decoders.items():
        torch.testing.assert_close(output.aux[name], decoder(output.latents, (4, 6)))


def test_latents_are_decoded_to_pixels_and_features():
    model, h, posterior = tiny(), torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 12)
    output = model.decode_all(h, (2, 3), posterior)
    assert output.latents is h and output.posterior is posterior
    torch.testing.assert_close(output.reconstruction, model.decode(h, (8, 12)))
    assert output.aux.keys() == {"hog", "anything"}
    for name, decoder in model.aux_decoders.items():
        torch.testing.assert_close(output.aux[name], decoder(h, (2, 3)))
    assert model.decode_all(h, (2, 3)).posterior is None
    for made in (output.reconstruction, *output.aux.values()):
        gradient, = torch.autograd.grad(made.square().sum(), h, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_what_an_extra_gives_reaches_the_decoders():
    class Shifted(MAETok):
        def decode_all(self, h, grid, posterior=None, shift=0.0):
            return super().decode_all(h + shift, grid, posterior)

    model, images = Shifted(MAETokConfig(**TINY)).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images, shift=2.0).latents, model.encode(images) + 2)
    torch.testing.assert_close(model(images).latents, model.encode(images))


def test_auxiliary_decoders_are_separate_and_as_deep_as_asked():
    model = tiny(aux_depth=3)
    hog, other = model.aux_decoders["hog"], model.aux_decoders["anything"]
    assert len(hog.transformer.blocks) == 3 and hog.head.weight.shape == (27, 32)
    output = model(torch.randn(2, 3, 16, 16))
    output.aux["hog"].square().sum().backward()
    assert hog.image_token.grad.abs().sum() > 0 and model.encoder.latent_tokens.grad.abs().sum() > 0
    assert other.image_token.grad is None and model.decoder.image_token.grad is None


def test_latents_read_from_image_tokens():
    model = tiny(learnable_latents=False)
    output = model(torch.randn(2, 3, 16, 24))
    assert output.latents.shape == (2, 24, 6) and output.reconstruction.shape == (2, 3, 16, 24)
    assert not hasattr(model.encoder, "latent_tokens")


def test_kl_vae_samples_with_the_given_noise():
    model, images, noise = tiny(variational=True), torch.randn(2, 3, 16, 16), torch.randn(2, 5, 6)
    output = model(images, noise=noise)
    mean, logvar = output.posterior.chunk(2, -1)
    torch.testing.assert_close(output.latents, mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(model.encode(images), mean)
    torch.testing.assert_close(model(images).latents, mean)
    oracle = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                               torch.distributions.Normal(torch.zeros(()),
                                                                          torch.ones(()))).sum((1, 2)).mean()
    torch.testing.assert_close(kl_divergence(output.posterior), oracle)
    # encode samples with the generators it is given, one per image, and an AE ignores them
    rngs = lambda: [np.random.default_rng(i) for i in range(2)]
    noise = torch.stack([torch.from_numpy(rng.standard_normal((5, 6), np.float32)) for rng in rngs()])
    torch.testing.assert_close(model.encode(images, rngs=rngs()), mean + torch.exp(logvar / 2) * noise)
    plain = tiny()
    assert torch.equal(plain.encode(images, rngs=rngs()), plain.encode(images))


def test_normalised_latents_round_trip():
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    model.latent_mean.fill_(0.3)
    model.latent_std.fill_(2.5)
    z, normalised = model.encode(images), model.encode(images, normalize=True)
    torch.testing.assert_close(normalised, (z - 0.3) / 2.5)
    torch.testing.assert_close(model.decode(normalised, normalized=True), model.decode(z))
    torch.testing.assert_close(model.reconstruct(images), model.decode(z))
    assert "latent_std" in model.state_dict()


def test_freezing_leaves_only_the_pixel_decoder_to_train():
    model = tiny().freeze_encoder()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decoder.") for name in trained)
    assert model(torch.randn(1, 3, 16, 16)).aux == {}


# ------------------------------------------------- losses -------------------------------------------------

def test_auxiliary_loss_is_a_mean_over_hidden_patches():
    prediction, y = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    images = []
    for b in range(3):
        images.append(np.mean([((prediction[b, n].numpy() - y[b, n].numpy()) ** 2).mean()
                               for n in range(5) if mask[b, n]]))
    torch.testing.assert_close(masked_feature_loss(prediction, y, mask).item(), float(np.mean(images)),
                               rtol=1e-5, atol=1e-6)
    changed = prediction + torch.randn_like(prediction) * ~mask[..., None]
    assert torch.equal(masked_feature_loss(prediction, y, mask), masked_feature_loss(changed, y, mask))
    nothing = masked_feature_loss(prediction.requires_grad_(), y, torch.zeros_like(mask))
    assert nothing == 0 and (torch.autograd.grad(nothing, prediction)[0] == 0).all()
    prediction = prediction.detach()
    half = prediction.bfloat16(), y.bfloat16()
    assert masked_feature_loss(*half, mask).dtype == torch.float32
    torch.testing.assert_close(masked_feature_loss(*half, mask),
                               masked_feature_loss(*(x.float() for x in half), mask), rtol=1e-6, atol=0)
