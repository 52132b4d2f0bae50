"""maetok.py: the architecture against independent oracles, the paper's counts, and what the method promises.
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from maetok import (MAETok, MAETokConfig, Block, Decoder, RoPE2D, kl_divergence, masked_feature_loss,
                    patchify, random_mask, rotate, unpatchify)

TINY = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2, decoder_depth=2, num_latents=5,
            latent_dim=6, aux_targets={"hog": 27, "anything": 10}, aux_depth=1)


def tiny(**changes):
    return MAETok(MAETokConfig(**(TINY | changes))).eval()


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def parameters(**config):
    with torch.device("meta"):
        return sum(p.numel() for p in MAETok(MAETokConfig(**config)).parameters())


def test_parameter_count_of_the_paper_size():
    # The paper says 176 M for encoder and decoder, the released checkpoint has 173.9 M; ours, without the
    # released extras (class token, position table, LayerScale, latent modulation), has 171.6 M.
    assert parameters() == 171_639_584
    assert abs(parameters() / 176e6 - 1) < 0.03
    assert parameters(image_size=512) == parameters()          # nothing depends on the image size


def test_released_initialisation():
    model = MAETok(MAETokConfig(image_size=64, width=64, heads=4, encoder_depth=2, decoder_depth=2,
                                num_latents=64, ape="encoder", class_token=True, latent_modulation=True,
                                initialisation="released"))
    seen = 0
    for name, p in model.named_parameters():
        if ".modulation." in name:
            assert (p == 0).all(), name
            seen += 1
        elif name.endswith("class_token"):
            assert 0 < p.abs().max() < 1e-5, name
        elif name.endswith(("_tokens", "_positions", ".table", "qkv.weight", "head.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            seen += 1
    assert seen >= 10


def test_parameter_count_of_the_released_variant():
    # 173,890,592 by the released key list, of which these are stored but never used: the decoder's
    # patch_embed and pos_embed and its last norm's modulation.
    unused = (3 * 16 * 16 * 768 + 768) + 257 * 768 + (32 * 1536 + 1536)
    ours = parameters(rope="mixed", ape="encoder", class_token=True, layer_scale=1e-5, latent_modulation=True)
    assert ours == 173_890_592 - unused


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (256, 384)])
def test_full_size_shapes_on_the_meta_device(size):
    with torch.device("meta"):
        model = MAETok(MAETokConfig(aux_targets={"hog": 108, "dinov2": 1024}))
        output = model(torch.empty(2, 3, *size))
    N = size[0] * size[1] // 256
    assert output.latents.shape == (2, 128, 32)
    assert output.reconstruction.shape == (2, 3, *size)
    assert output.aux["hog"].shape == (2, N, 108) and output.aux["dinov2"].shape == (2, N, 1024)


def test_one_set_of_weights_runs_at_any_size_the_patch_divides():
    for model in (tiny(), tiny(rope="none", ape="both"), tiny(rope="mixed", ape="encoder", class_token=True)):
        for size in ((16, 16), (32, 32), (16, 24)):
            latents = model.encode(torch.randn(2, 3, *size))
            assert latents.shape == (2, 5, 6)
            assert model.decode(latents, size).shape == (2, 3, *size)
    with pytest.raises(ValueError, match="multiples"):
        tiny().encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="multiples"):
        tiny().decode(torch.zeros(1, 5, 6), (18, 16))


@pytest.mark.parametrize("bad, message", [
    (dict(image_size=18), "multiple of patch_size"), (dict(patch_size=0), "from 1 to"),
    (dict(heads=0), "from 1 to"), (dict(width=30), "head size"), (dict(rope="sine"), "axial"),
    (dict(ape="decoder"), "none, encoder or both"),
    (dict(latent_modulation=True, learnable_latents=False), "learnable")])
def test_impossible_configurations_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MAETokConfig(**(TINY | bad))


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


class Recorder(nn.Module):
    """Stands in for a Transformer: notes what it is given, answers twice the tokens."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, grid, before, latents=None):
        self.calls.append((x, tuple(grid), before))
        return 2 * x


@pytest.mark.parametrize("changes", [{}, dict(class_token=True, ape="encoder"), dict(learnable_latents=False),
                                     dict(learnable_latents=False, class_token=True)])
def test_the_encoder_reads_its_latents_from_the_learnable_tokens(changes):
    encoder = tiny(**changes).encoder
    encoder.transformer = Recorder()
    images, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 24) < 0.5
    latents = encoder(images, mask)
    (x, grid, before), = encoder.transformer.calls
    L = 5 if changes.get("learnable_latents", True) else 0
    assert grid == (4, 6) and before == ("class_token" in changes) and x.shape == (2, before + 24 + L, 32)
    positions = encoder.positions(grid)[0] if "ape" in changes else torch.zeros(24, 32)
    patches = F.unfold(images, 4, stride=4).reshape(2, 3, 16, 24).permute(0, 3, 2, 1).reshape(2, 24, 48)
    for b in range(2):
        if before:
            torch.testing.assert_close(x[b, 0], encoder.class_token[0, 0])
        for n in range(24):
            token = encoder.mask_token[0, 0] if mask[b, n] else encoder.patch_embed(patches[b, n])
            torch.testing.assert_close(x[b, before + n], token + positions[n], rtol=1e-4, atol=1e-5)
        for i in range(L):
            torch.testing.assert_close(x[b, before + 24 + i],
                                       encoder.latent_tokens[0, i] + encoder.latent_positions[0, i])
    kept = x[:, before + 24:] if L else x[:, before:]
    torch.testing.assert_close(latents, encoder.to_latent(2 * kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [False, True])
def test_a_decoder_pools_before_its_head(pool):
    config = MAETokConfig(**TINY)
    decoder, latents = Decoder(config, 1, 32, 2, out_dim=7, pool=pool), torch.randn(2, 5, 6)
    tokens = decoder.image_tokens(latents, (3, 4))
    found = decoder(latents, (3, 4))
    assert found.shape == ((2, 7) if pool else (2, 12, 7))
    for b in range(2):
        rows = [tokens[b, n] @ decoder.head.weight.T + decoder.head.bias for n in range(12)]
        torch.testing.assert_close(found[b], sum(rows) / 12 if pool else torch.stack(rows),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aux_depth", [0, 1])
def test_forward_is_encode_and_decode_under_the_mask(aux_depth):
    model = tiny(aux_depth=aux_depth)
    images, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 24) < 0.5
    output = model(images, mask)
    torch.testing.assert_close(output.latents, model.encode(images, mask))
    torch.testing.assert_close(output.reconstruction, model.decode(output.latents, (16, 24)))
    tokens = model.decoder.image_tokens(output.latents, (4, 6))
    assert list(output.aux) == ["hog", "anything"] and output.posterior is None
    for name, decoder in model.aux_decoders.items():
        torch.testing.assert_close(output.aux[name],
                                   decoder(output.latents, (4, 6)) if aux_depth else decoder(tokens))


def test_block_equals_pytorchs_pre_norm_encoder_layer():
    ours = Block(32, 4, 4.0)
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
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x, None, None), oracle(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------ positions ------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_multiplication_by_a_complex_number(dtype):
    x, angle = torch.randn(2, 3, 7, 8).to(dtype), torch.randn(1, 3, 7, 4)
    found = rotate(x, angle.cos(), angle.sin())
    z = torch.complex(x[..., :4].float(), x[..., 4:].float()) * torch.polar(torch.ones_like(angle), angle)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), torch.cat((z.real, z.imag), -1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_rope_depends_on_relative_position_only(kind):
    rope = RoPE2D(kind, depth=2, heads=3, head_size=16)
    cos, sin = rope((6, 7), before=0, after=0)
    q, k = torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1), torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1)
    scores = (rotate(q, cos[-1], sin[-1])
              @ rotate(k, cos[-1], sin[-1]).transpose(-1, -2))[0].reshape(3, 6, 7, 6, 7)
    # The same step of (+2 rows, -1 column) from two places gives one score; another step gives another.
    torch.testing.assert_close(scores[:, 1, 3, 3, 2], scores[:, 3, 6, 5, 5], rtol=1e-4, atol=1e-4)
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 3, 4]).abs().min() > 1e-3
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 5, 2]).abs().min() > 1e-3


def test_rope_rotates_image_tokens_by_the_documented_angles_and_leaves_the_others():
    rope = RoPE2D("axial", depth=1, heads=1, head_size=8)
    cos, sin = rope((2, 3), before=1, after=4)
    assert cos.shape == (1, 1, 11, 4)
    assert (torch.equal(cos[0, 0, [0, 7, 8, 9, 10]], torch.ones(5, 4))
            and (sin[0, 0, [0, 7, 8, 9, 10]] == 0).all())
    angle = torch.tensor([2 * 1.0, 2 * 0.1, 1 * 1.0, 1 * 0.1])  # column 2, row 1; frequencies 100^0, 100^-1/2
    torch.testing.assert_close(cos[0, 0, 1 + 5], angle.cos())
    torch.testing.assert_close(sin[0, 0, 1 + 5], angle.sin())


def test_mixed_rope_learns_its_frequencies_per_layer_and_head():
    model = tiny(rope="mixed")
    freqs = model.encoder.transformer.rope.freqs
    assert freqs.shape == (2, 2, 2, 8) and freqs.requires_grad
    model.decode(model.encode(torch.randn(1, 3, 16, 16))).square().sum().backward()
    assert (freqs.grad.abs().amax((1, 3)) > 0).all()                      # every layer and head


def test_positions_come_from_rope_alone():
    images = torch.randn(1, 3, 16, 16)
    shuffled = unpatchify(patchify(images, 4)[:, torch.randperm(16)], 4, (4, 4))
    same = lambda model: torch.allclose(model.encode(images), model.encode(shuffled), atol=1e-5)
    assert same(tiny(rope="none"))                              # without it the encoder sees a bag of patches
    assert (not same(tiny(rope="axial")) and not same(tiny(rope="mixed"))
            and not same(tiny(rope="none", ape="both")))


# ------------------------------------------------ masking ------------------------------------------------

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


@pytest.mark.parametrize("changes",
                         [{}, dict(class_token=True, ape="encoder"), dict(learnable_latents=False)])
def test_hidden_patches_do_not_reach_the_latents(changes):
    model = tiny(**changes)
    images, mask = torch.randn(2, 3, 16, 16), random_mask(rngs(2), 16)
    hidden, visible = (unpatchify(torch.randn(2, 16, 48) * m[..., None], 4, (4, 4)) for m in (mask, ~mask))
    assert torch.equal(model.encode(images, mask), model.encode(images + hidden, mask))
    assert not torch.allclose(model.encode(images, mask), model.encode(images + visible, mask))
    assert not torch.allclose(model.encode(images, mask), model.encode(images))
    with torch.no_grad():
        before = model.encode(images, mask)
        model.encoder.mask_token += torch.randn(32)                      # replaced by this token, not dropped
    assert not torch.allclose(before, model.encode(images, mask))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_auxiliary_loss_is_a_mean_over_hidden_patches(kind):
    prediction, target = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    images = []
    for b in range(3):
        values = []
        for n in range(5):
            p, t = prediction[b, n].numpy(), target[b, n].numpy()
            if mask[b, n]:
                values.append(((p - t) ** 2).mean() if kind == "mse" else
                              -(p @ t) / np.linalg.norm(p) / np.linalg.norm(t))
        images.append(np.mean(values))
    torch.testing.assert_close(masked_feature_loss(prediction, target, mask, kind).item(),
                               float(np.mean(images)), rtol=1e-5, atol=1e-6)
    changed = prediction + torch.randn_like(prediction) * ~mask[..., None]
    assert torch.equal(masked_feature_loss(prediction, target, mask, kind),
                       masked_feature_loss(changed, target, mask, kind))
    assert masked_feature_loss(prediction, target, torch.zeros_like(mask), kind) == 0
    with pytest.raises(ValueError):
        masked_feature_loss(prediction, target, mask, "l1")


# ------------------------------------------------ variants ------------------------------------------------

def test_auxiliary_decoders_are_separate_and_as_deep_as_asked():
    model = tiny(aux_depth=3, aux_width=16, aux_heads=1)
    hog, other = model.aux_decoders["hog"], model.aux_decoders["anything"]
    assert len(hog.transformer.blocks) == 3 and hog.head.weight.shape == (27, 16)
    output = model(torch.randn(2, 3, 16, 16))
    output.aux["hog"].square().sum().backward()
    assert hog.image_token.grad.abs().sum() > 0 and model.encoder.latent_tokens.grad.abs().sum() > 0
    assert other.image_token.grad is None and model.decoder.image_token.grad is None
    assert isinstance(tiny(aux_depth=0).aux_decoders["hog"], nn.Linear)


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
    oracle = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                               torch.distributions.Normal(torch.zeros(()),
                                                                          torch.ones(()))).sum((1, 2)).mean()
    torch.testing.assert_close(kl_divergence(output.posterior), oracle)


def test_latent_modulation_touches_latent_tokens_only():
    block = Block(16, 2, 2.0, modulation_dim=6)
    assert not block.norm1.elementwise_affine
    seen = []
    block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, latents = torch.randn(1, 7, 16), torch.randn(1, 3, 6)
    block(x, None, latents)
    normed = F.layer_norm(x, (16,), eps=1e-6)
    shift, scale = block.modulation(latents).chunk(4, -1)[:2]
    torch.testing.assert_close(seen[0][:, :4], normed[:, :4])
    torch.testing.assert_close(seen[0][:, 4:], normed[:, 4:] * scale + shift)


def test_normalised_latents_round_trip():
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    model.latent_mean.fill_(0.3)
    model.latent_std.fill_(2.5)
    z, normalised = model.encode(images), model.encode(images, normalize=True)
    torch.testing.assert_close(normalised, (z - 0.3) / 2.5)
    torch.testing.assert_close(model.decode(normalised, normalized=True), model.decode(z))
    assert "latent_std" in model.state_dict()


def test_freezing_leaves_only_the_pixel_decoder_to_train():
    model = tiny().freeze_encoder()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decoder.") for name in trained)
    assert model(torch.randn(1, 3, 16, 16)).aux == {}
