"""variants/released_tokenizer.py: the authors' model, targets, discriminator and schedule; training it."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Named
from forked import in_two_processes
from random_frozen import use_random_networks
from test_train_tokenizer import TINY, assert_same_weights, logged_losses, train

import checkpoints
import common
import losses
import maetok
from common import UserError
from frozen.pretrained import IMAGENET
from losses import PatchDiscriminator
from maetok import MAETokConfig, patchify, random_mask, rotate, unpatchify
from train_tokenizer import Method, Stage
from variants import released_tokenizer
from variants.random_crop import random_crop
from variants.released_tokenizer import (Augmentation, MixedRoPE, ModulatedBlock, ReleasedAdversary,
                                         ReleasedMAETok, ScaledBlock, cut_out,
                                         diff_augment, draw_augmentations)

CPU = torch.device("cpu")
ADDED = common.attach(Method, ["released"])
RELEASED = ["--add", "released"]


def tiny(**changes):
    config = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2, decoder_depth=2,
                  num_latents=5, latent_dim=6, aux_depth=1)
    return ReleasedMAETok(MAETokConfig(**config | changes), {"hog": Named(27), "anything": Named(7)})


def varied(model):
    """Random numbers for every parameter: at first gains are 1e-5 and the modulation is 0."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def method(**changes):
    """The trainer's Method with the extra, without frozen networks."""
    config = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1, decoder_depth=1,
                  aux_depth=1, num_latents=4, latent_dim=4, hog_cell=4, targets="", percep_weight=0.0,
                  disc="none", data="shapes")
    return ADDED(ADDED.Config(**config | changes), CPU)


# ------------------------------------------------ the model ------------------------------------------------

def test_parameter_count_of_the_released_variant():
    # 173,890,592 by the released key list, of which these are stored but never used: the decoder's
    # patch_embed and pos_embed and its last norm's modulation.
    unused = (3 * 16 * 16 * 768 + 768) + 257 * 768 + (32 * 1536 + 1536)
    with torch.device("meta"):
        model = ReleasedMAETok(MAETokConfig())
    assert sum(p.numel() for p in model.parameters()) == 173_890_592 - unused


def test_released_initialisation():
    model = tiny(image_size=64, width=64, heads=4, num_latents=64)
    seen = 0
    for name, p in model.named_parameters():
        if ".modulation." in name:
            assert (p == 0).all(), name
            seen += 1
        elif name.endswith("class_token"):
            assert 0 < p.abs().max() < 1e-5, name
        elif "aux_" not in name and name.endswith(("_tokens", "_positions", "qkv.weight", "head.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            seen += 1
    assert seen >= 10


def test_one_set_of_weights_runs_at_any_size_the_patch_divides():
    model = tiny()
    for size in ((16, 16), (32, 32), (16, 24)):
        latents = model.encode(torch.randn(2, 3, *size))
        assert latents.shape == (2, 5, 6) and model.decode(latents, size).shape == (2, 3, *size)


class Recorder(torch.nn.Module):
    """Takes the place of a transformer: keeps its arguments, returns twice its first."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, *rest):
        self.calls.append((x, *rest))
        return 2 * x


def test_the_encoder_reads_its_latents_from_the_learnable_tokens():
    encoder = varied(tiny()).encoder
    encoder.transformer = Recorder()
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16) < 0.5
    latents = encoder(images, mask)
    (x, grid, before), = encoder.transformer.calls
    assert grid == (4, 4) and before == 1 and x.shape == (2, 1 + 16 + 5, 32)
    patches = F.unfold(images, 4, stride=4).reshape(2, 3, 16, 16).permute(0, 3, 2, 1).reshape(2, 16, 48)
    for b in range(2):
        torch.testing.assert_close(x[b, 0], encoder.class_token[0, 0])
        for n in range(16):                                              # the position comes after the mask
            token = encoder.mask_token[0, 0] if mask[b, n] else encoder.patch_embed(patches[b, n])
            expected = token + encoder.image_positions[0, n // 4, n % 4]
            torch.testing.assert_close(x[b, 1 + n], expected, rtol=1e-4, atol=1e-5)
        for i in range(5):
            torch.testing.assert_close(x[b, 17 + i],
                                       encoder.latent_tokens[0, i] + encoder.latent_positions[0, i])
    torch.testing.assert_close(latents, encoder.to_latent(2 * x[:, 17:]), rtol=1e-4, atol=1e-5)


def test_the_table_is_resampled_bicubically_for_another_grid():
    encoder = varied(tiny()).encoder
    encoder.transformer = Recorder()
    encoder(torch.zeros(1, 3, 16, 24), torch.ones(1, 24, dtype=torch.bool))             # mask tokens only
    found = encoder.transformer.calls[0][0][0, 1:25] - encoder.mask_token[0, 0]
    table = encoder.image_positions[0].permute(2, 0, 1)[None]
    expected = F.interpolate(table, size=(4, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hidden_patches_do_not_reach_the_latents():
    model = varied(tiny())
    rngs = [np.random.default_rng(i) for i in range(2)]
    images, mask = torch.randn(2, 3, 16, 16), random_mask(rngs, 16)
    hidden, visible = (unpatchify(torch.randn(2, 16, 48) * m[..., None], 4, (4, 4)) for m in (mask, ~mask))
    assert torch.equal(model.encode(images, mask), model.encode(images + hidden, mask))
    assert not torch.allclose(model.encode(images, mask), model.encode(images + visible, mask))


def test_patches_have_positions():
    model, images = varied(tiny()), torch.randn(1, 3, 16, 16)
    shuffled = unpatchify(patchify(images, 4)[:, torch.randperm(16)], 4, (4, 4))
    same = lambda: torch.allclose(model.encode(images), model.encode(shuffled), atol=1e-5)
    assert not same()
    with torch.no_grad():
        model.encoder.image_positions.zero_()
    assert not same()                                                                   # RoPE alone
    with torch.no_grad():
        model.encoder.transformer.rope.freqs.zero_()
    assert same()                                                                       # nothing else


def test_mixed_rope_depends_on_relative_position_only():
    cos, sin = MixedRoPE(depth=2, heads=3, head_size=16)((6, 7), before=0, others=0)
    q, k = torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1), torch.randn(1, 3, 1, 16).expand(-1, -1, 42, -1)
    scores = (rotate(q, cos[1], sin[1])
              @ rotate(k, cos[1], sin[1]).transpose(-1, -2))[0].reshape(3, 6, 7, 6, 7)
    # The same step of (+2 rows, -1 column) from two places gives one score; another step gives another.
    torch.testing.assert_close(scores[:, 1, 3, 3, 2], scores[:, 3, 6, 5, 5], rtol=1e-4, atol=1e-4)
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 3, 4]).abs().min() > 1e-3
    assert (scores[:, 1, 3, 3, 2] - scores[:, 1, 3, 5, 2]).abs().min() > 1e-3


def test_mixed_rope_leaves_the_other_tokens_and_starts_at_right_angles():
    rope = MixedRoPE(depth=1, heads=2, head_size=8)
    cos, sin = rope((2, 3), before=1, others=4)
    assert cos.shape == (1, 2, 11, 4)
    others = [0, 7, 8, 9, 10]
    assert (cos[0, :, others] == 1).all() and (sin[0, :, others] == 0).all()
    fx, fy = rope.freqs[0]                                                               # (nh, hs/2) each
    torch.testing.assert_close((2 * fx + 1 * fy).cos(), cos[0, :, 1 + 5])                # column 2, row 1
    magnitude = torch.tensor([1.0, 10 ** -0.5] * 2).expand(2, 4)
    torch.testing.assert_close((fx ** 2 + fy ** 2).sqrt(), magnitude)
    assert (fx[:, :2] * fx[:, 2:] + fy[:, :2] * fy[:, 2:]).abs().max() < 1e-6


def test_mixed_rope_learns_its_frequencies_per_layer_and_head():
    model = varied(tiny())
    freqs = model.encoder.transformer.rope.freqs
    assert freqs.shape == (2, 2, 2, 8) and freqs.requires_grad
    model.decode(model.encode(torch.randn(1, 3, 16, 16))).square().sum().backward()
    assert (freqs.grad.abs().amax((1, 3)) > 0).all()                      # every layer and head


def test_the_encoders_branches_have_gains():
    block, x = varied(ScaledBlock(16, 2)), torch.randn(1, 7, 16)
    rope = torch.ones(7, 4), torch.zeros(7, 4)
    after = x + block.layer_scale1.gamma * block.attn(block.norm1(x), rope)
    expected = after + block.layer_scale2.gamma * block.mlp(block.norm2(after))
    torch.testing.assert_close(block(x, rope), expected)
    assert (ScaledBlock(16, 2).layer_scale1.gamma == 1e-5).all()


def test_latent_modulation_touches_latent_tokens_only():
    block = varied(ModulatedBlock(16, 2, 6))
    assert not block.norm1.elementwise_affine
    seen = []
    block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, latents = torch.randn(1, 7, 16), torch.randn(1, 3, 6)
    block(x, (torch.ones(7, 4), torch.zeros(7, 4)), latents)
    normed = F.layer_norm(x, (16,), eps=1e-6)
    shift, scale = block.modulation(latents).chunk(4, -1)[:2]
    torch.testing.assert_close(seen[0][:, :4], normed[:, :4])
    torch.testing.assert_close(seen[0][:, 4:], normed[:, 4:] * scale + shift)


def test_auxiliary_decoders_are_narrow_separate_and_have_a_class_token():
    model = tiny(aux_depth=3)
    hog, other = model.aux_decoders["hog"], model.aux_decoders["anything"]
    assert len(hog.transformer.blocks) == 3 and hog.head.weight.shape == (27, 192)
    assert hog.transformer.blocks[0].attn.heads == 3
    assert hog.class_token.shape == (1, 1, 192) and model.decoder.class_token is None
    output = varied(model)(torch.randn(2, 3, 16, 24))
    assert output.aux["hog"].shape == (2, 24, 27) and output.aux["anything"].shape == (2, 24, 7)
    output.aux["hog"].square().sum().backward()
    assert hog.image_token.grad.abs().sum() > 0 and model.encoder.latent_tokens.grad.abs().sum() > 0
    assert other.image_token.grad is None and model.decoder.image_token.grad is None


def test_it_needs_learnable_latents():
    with pytest.raises(UserError, match="needs learnable latents"):
        method(learnable_latents=False)


# ------------------------------------------------- targets -------------------------------------------------

@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(released_tokenizer, "load_teacher", lambda *args, **options: (args, options))
    return method(targets="siglip-so400m,hog", aux_weight=0.5).targets


def test_teachers_are_fed_as_dinov2_and_compared_by_cosine(target):
    args, options = target["siglip-so400m"].teacher
    assert args[:2] == ("siglip-so400m", 4) and options == dict(mean_std=IMAGENET, gelu="exact")
    assert target["siglip-so400m"].weight == 0.5 and target["siglip-so400m"].dim == 1152
    assert type(target["hog"]) is losses.HOGTarget


def test_the_cosine_loss_is_a_mean_over_hidden_patches(target):
    loss = target["siglip-so400m"].loss
    prediction, y = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    images = []
    for b in range(3):
        pairs = [(prediction[b, n].numpy(), y[b, n].numpy()) for n in range(5) if mask[b, n]]
        images.append(np.mean([-(p @ t) / np.linalg.norm(p) / np.linalg.norm(t) for p, t in pairs]))
    torch.testing.assert_close(loss(prediction, y, mask).item(), float(np.mean(images)), rtol=1e-5, atol=1e-6)
    changed = prediction + torch.randn_like(prediction) * ~mask[..., None]
    assert torch.equal(loss(prediction, y, mask), loss(changed, y, mask))
    assert loss(prediction, y, torch.zeros_like(mask)) == 0


def test_no_constant_is_better_than_the_mean_direction(target):
    teacher, y = target["siglip-so400m"], [torch.randn(2, 5, 7) + 1, torch.randn(1, 5, 7) * 3 + 1]
    masks = [torch.rand(part.shape[:2]) < 0.7 for part in y]
    best = teacher.constant_loss(y, masks).item()
    hidden = torch.cat([part[mask] for part, mask in zip(y, masks)])
    cosine = lambda constant: -F.cosine_similarity(constant.expand_as(hidden), hidden, dim=-1).mean().item()
    mean = F.normalize(hidden, dim=-1).mean(0)
    assert best == pytest.approx(cosine(mean), rel=1e-5)
    assert all(cosine(mean + 0.1 * torch.randn(7)) > best for _ in range(50))
    assert cosine(hidden.mean(0)) > best


# ---------------------------------------------- discriminator ----------------------------------------------

def augmentation(colour=False, translation=False, cutout=False, amounts=(0.5,) * 7):
    return Augmentation(None, (colour, translation, cutout), torch.tensor([amounts]))


def test_augmentation_off_is_the_image_itself():
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(diff_augment(image, augmentation()), image)


def test_translation_moves_by_whole_pixels_and_fills_with_zeros():
    image = torch.rand(1, 3, 16, 16) + 1
    moved = diff_augment(image, augmentation(translation=True,                           # 2 rows, -1 column
                                             amounts=(0, 0, 0, 1.0, 0.25, 0, 0)))
    assert torch.equal(moved[..., :14, 1:], image[..., 2:, :15])
    assert moved[..., 14:, :].abs().max() == 0 and moved[..., 0].abs().max() == 0


def test_colour_changes_by_the_drawn_amounts():
    image = torch.rand(1, 3, 8, 8)
    colour = lambda *amounts: diff_augment(image, augmentation(colour=True, amounts=(*amounts, 0, 0, 0, 0)))
    assert torch.allclose(colour(0.7, 0.5, 0.5), image + 0.2, atol=1e-6)
    assert torch.allclose(colour(0.5, 0.0, 0.5), image.mean(1, keepdim=True).expand_as(image), atol=1e-6)
    assert torch.allclose(colour(0.5, 0.5, 1.0), image.mean() + 1.5 * (image - image.mean()), atol=1e-5)


def test_cutout_makes_a_square_of_its_size_and_lets_gradients_pass_elsewhere():
    image = torch.ones(1, 3, 20, 20, requires_grad=True)
    cut = cut_out(image, torch.tensor([[0.5, 0.5]]), 0.2)
    assert (cut == 0).sum() == 3 * 4 * 4 and (cut[..., 8:12, 8:12] == 0).all()
    cut.sum().backward()
    assert torch.equal(image.grad, (cut != 0).float())


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    images, amounts, on = torch.rand(4, 3, 16, 16), torch.rand(4, 7), (True, True, True)
    together = diff_augment(images, Augmentation(None, on, amounts))
    assert not torch.equal(together, images)
    for i in range(4):
        alone = diff_augment(images[i:i + 1], Augmentation(None, on, amounts[i:i + 1]))
        assert torch.allclose(alone, together[i:i + 1], atol=1e-6)


def test_augmentations_are_the_same_for_any_number_of_processes_and_new_at_every_call_and_step():
    config = method().config
    whole, half = (draw_augmentations(config, 7, 0, part, CPU) for part in (range(8), range(4, 8)))
    for a, b in zip(whole, half, strict=True):
        assert (a.window, a.parts, a.cutout) == (b.window, b.parts, b.cutout)
        assert torch.equal(a.amounts[4:], b.amounts)
    assert all(a.parts == (True, True, True) and a.cutout == 0.5 for a in whole[2:4])
    assert all(a.cutout == 0.2 for a in (*whole[:2], whole[4]))
    drawn = [a for step in range(200) for a in draw_augmentations(config, step, 0, range(1), CPU)]
    free = [a.parts for i, a in enumerate(drawn) if i % 5 not in (2, 3)]
    assert len(set(free)) == 8 and abs(np.mean(free) - 0.5) < 0.05         # each of the three by its own coin
    assert abs(np.mean([a.window is None for a in drawn]) - 0.5) < 0.07
    assert len({a.amounts.sum().item() for a in drawn}) == len(drawn)


class Identity(torch.nn.Module):
    """A discriminator that returns what it was given."""

    def forward(self, images, window=None):
        return images.flatten(1)


def test_consistency_compares_with_the_unaugmented_images_strongly_augmented_outside_the_weight():
    adversary, amounts, on = ReleasedAdversary(Identity()), torch.rand(4, 2, 7), (True, True, True)
    pair = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    calls = [Augmentation(None, (True, False, False), a) for a in amounts[:2]]
    calls += [Augmentation(None, on, a, 0.5) for a in amounts[2:]]
    loss, terms = adversary(*pair, [*calls, "the decoder's own"])
    mild = [diff_augment(x, a) for x, a in zip(pair, calls)]
    strong = [diff_augment(x, a) for x, a in zip(pair, calls[2:])]
    oracle = sum((a - b).square().mean().item() for a, b in zip(mild, strong)) / 2
    assert terms["consistency"].item() == pytest.approx(oracle, rel=1e-4)
    plain = 0.4 * (terms["disc"] + 1e-3 * terms["lecam"]).item()
    assert loss.item() == pytest.approx(plain + 4 * oracle, rel=1e-4)


def test_lecam_moves_before_its_penalty_and_is_inside_the_weight(monkeypatch):
    monkeypatch.setattr(losses, "LECAM_WEIGHT", 0.3)
    adversary = ReleasedAdversary(PatchDiscriminator(16), lecam_decay=0.5)
    adversary.lecam.real_ema.fill_(1.0), adversary.lecam.fake_ema.fill_(-1.0)
    images, fakes = torch.rand(2, 4, 3, 16, 16)
    logits = []
    adversary.discriminator.register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach()))
    loss, terms = adversary(images, fakes, [augmentation()] * 5)
    real, fake = logits[:2]
    moved = 0.5 + 0.5 * real.mean(), -0.5 + 0.5 * fake.mean()
    expected = (real - moved[1]).relu().square().mean() + (moved[0] - fake).relu().square().mean()
    assert terms["lecam"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversary.lecam.real_ema.item() == pytest.approx(moved[0].item(), rel=1e-5)
    weighted = 0.4 * (terms["disc"] + 0.3 * terms["lecam"]) + 4 * terms["consistency"]
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-5)


def test_the_window_of_a_call_reaches_the_discriminator():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, images, window):
            seen.append(window)
            return images.flatten(1)

    ReleasedAdversary(Spy()).logits(torch.rand(1, 3, 8, 8), augmentation()._replace(window=(0.25, 0.5)))
    assert seen == [(0.25, 0.5)]


# ------------------------------------------------- training -------------------------------------------------

def test_the_preset_is_the_authors_schedule():
    config = ADDED.Config(**ADDED.PRESETS["maetok-b-256"] | ADDED.PRESETS["released"])
    assert (config.lr, config.warmup, config.steps) == (2e-4, 5004, 500_400)
    assert config.targets == "hog,dinov2-l,siglip-so400m" and not ADDED.EMA_WARMUP


def test_learning_rate_counts_the_cosine_from_step_zero():
    made = method(lr=2e-4, warmup=5004, steps=500_400, stage2_lr=1e-4, stage2_warmup=10, stage2_steps=1010)
    rate = lambda step: made.learning_rate(Stage(1, 0, 500_400), step)
    assert rate(0) == pytest.approx(1e-5)                       # n / warmup: the first step has the start
    assert rate(2502) == pytest.approx((1e-5 + 2e-4) / 2)
    assert rate(250_200) == pytest.approx((2e-4 + 2e-5) / 2) and rate(500_400) == pytest.approx(2e-5)
    second = lambda step: made.learning_rate(Stage(2, 500_400, 501_410), 500_400 + step)
    assert second(0) == pytest.approx(1e-5) and second(9) == second(10) == pytest.approx(1e-4)
    assert second(510) == pytest.approx((1e-4 + 2e-5) / 2) and second(1010) == pytest.approx(2e-5)


def test_the_mask_ratio_is_one_per_step_from_the_cut_normal():
    made, first, second = method(steps=3000, stage2_steps=11), Stage(1, 0, 3000), Stage(2, 3000, 3011)
    ratios = [made.mask_range(first, step) for step in range(2000)]
    assert all(low == high and 0.4 <= low <= 0.6 for low, high in ratios)
    assert abs(np.mean(ratios) - 0.505) < 0.005                      # the released code's mean is 0.505
    assert made.mask_range(first, 7) == ratios[7] and len(set(ratios)) == 2000
    assert made.mask_range(second, 3000) == (0.6, 0.6) and made.mask_range(second, 3010) == (0.0, 0.0)
    assert method(mask_low=0.0, mask_high=0.0).mask_range(first, 5) == (0.0, 0.0)
    masks = made.batch(first, 3, 0, range(6), (torch.zeros(6, 3, 16, 16, dtype=torch.uint8), None)).mask
    assert (masks.sum(1) == math.ceil(ratios[3][0] * 16)).all()


def test_training_images_are_cropped_at_random_and_test_images_are_not():
    made = method()
    assert made.dataset("train").crop is random_crop and made.dataset("test").crop is not random_crop


def test_no_parameter_is_decayed():
    made = method(targets="hog")
    model = made.Model(made.config, made.targets)
    groups = made.optimizer(model).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(group["weight_decay"] == 0 for group in groups)


def test_it_trains_through_both_stages_resumes_and_loads(tmp_path, monkeypatch):
    use_random_networks(monkeypatch.setattr)
    options = [*RELEASED, *"--targets hog,dinov2-s --percep-weight 1 --disc patch --disc-start 2".split()]
    whole = train(tmp_path / "run", *options)
    records = [r for r in checkpoints.read_metrics(tmp_path / "run") if "loss" in r]
    assert whole["step"] == 10 and whole["add"] == ["released"]
    assert np.isfinite(logged_losses(tmp_path / "run")).all()
    for r in records:
        expected = r["recon"] + r["step"] / 10_000 * r["percep"] - r["percep"] / 10_000
        if r["stage"] == 1:
            expected += r["hog"] + r["dinov2-s"]
        if r["step"] > 2:
            expected += 0.4 * r["adaptive_weight"] * r["adv"]
        assert r["loss"] == pytest.approx(expected, rel=1e-4) and ("consistency" in r) == (r["step"] > 2)
    end = next(r for r in checkpoints.read_metrics(tmp_path / "run") if r.get("event") == "end of stage 1")
    assert -1 <= end["dinov2-s_constant"] <= 1 and end["dinov2-s_constant"] < 0
    model = maetok.load_tokenizer(tmp_path / "run")
    assert isinstance(model, ReleasedMAETok)
    assert all(torch.equal(w, whole["ema"][f"encoder.{k}"]) for k, w in model.encoder.state_dict().items())
    for path in (tmp_path / "run").glob("*.pt"):
        if path.name != "step_0000005.pt":
            path.unlink()
    assert_same_weights(whole, train(tmp_path / "run", *options))


def test_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path):
    options = [*RELEASED, *"--targets hog --disc patch --disc-start 2".split()]
    plain, less = (train(tmp_path / name, *options, *more)
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert_same_weights(plain, less)


def test_ema_has_no_warmup(tmp_path):
    options = [*RELEASED, *"--targets hog --stage 1 --ema 0.9999".split()]
    first, last = (train(tmp_path / steps, *options, "--steps", steps) for steps in ("1", "6"))
    gap = lambda part: max((part[k] - first["model"][k]).abs().max().item()
                           for k in part if k not in ("latent_mean", "latent_std"))
    # Six steps at 0.9999 leave the average where it was; with a warm-up it would follow the weights.
    assert gap(last["ema"]) < 0.1 * gap(last["model"])


@pytest.mark.slow
def test_two_processes_with_the_gan_equal_one(tmp_path):
    options = [*RELEASED, *"--targets hog --disc patch --disc-start 2 --stage 1".split()]
    one = train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options], tmp_path / "log")
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
    other = checkpoints.load_checkpoint(tmp_path / "two")
    for key, weight in one["model"].items():
        torch.testing.assert_close(weight, other["model"][key], atol=2e-4, rtol=0)
