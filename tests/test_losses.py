"""losses.py: LPIPS, hinge and LeCAM, the adaptive weight, the two discriminators, auxiliary targets."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from common import UserError
from frozen.pretrained import IMAGENET, TEACHERS, VisionTransformer, ViTConfig
from hog import hog_features
from losses import (LPIPS, TARGETS, Adversary, BatchNorm, DinoDiscriminator, LeCAM, PatchDiscriminator,
                    Target, adaptive_weight, build_adversary, build_target, draw_windows, generator_loss,
                    hinge_loss)
from maetok import masked_feature_loss


# ------------------------------------------------ perceptual ------------------------------------------------

def test_lpips_is_the_formula_written_as_loops():
    a, b = torch.rand(2, 2, 3, 4, 4) * 2 - 1
    kernels = [torch.randn(c, 3, 1, 1) for c in (2, 5)]
    heads = [torch.rand(1, c, 1, 1) for c in (2, 5)]
    lpips = LPIPS(lambda x: [F.conv2d(x, k, stride=s) for k, s in zip(kernels, (1, 2))], heads)
    shift, scale = np.array([-.030, -.088, -.188]), np.array([.458, .448, .450])
    for i in range(2):
        total = 0.0
        for kernel, head, stride in zip(kernels, heads, (1, 2)):
            places = [(y, x) for y in range(0, 4, stride) for x in range(0, 4, stride)]
            for y, x in places:
                f, g = (kernel[:, :, 0, 0].double().numpy() @ ((image[i, :, y, x].numpy() - shift) / scale)
                        for image in (a, b))
                f, g = f / np.sqrt((f ** 2).sum()), g / np.sqrt((g ** 2).sum())
                total += (head.flatten().numpy() * (f - g) ** 2).sum() / len(places)
        assert lpips(a, b)[i].item() == pytest.approx(total, rel=1e-5)
    assert lpips(a, a).abs().max() == 0


def test_lpips_has_finite_gradients_where_all_features_are_zero():
    image = torch.zeros(1, 3, 4, 4, requires_grad=True)
    lpips = LPIPS(lambda x: [F.relu(x - 100)], [torch.ones(1, 3, 1, 1)])
    lpips(image, torch.ones(1, 3, 4, 4)).sum().backward()
    assert image.grad.isfinite().all()


# ------------------------------------------- adversarial losses -------------------------------------------

def test_hinge_and_generator_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2.5) / 3))
    assert generator_loss(fake).item() == pytest.approx(0.5)


def test_adaptive_weight_is_the_ratio_of_the_gradients_that_backward_gives():
    layer, x = torch.nn.Linear(4, 6), torch.randn(8, 4)

    def losses():
        y = layer(x)
        return (y - 1).square().mean(), -(y ** 3).mean()

    norms = []
    for which in (0, 1):
        layer.zero_grad()
        losses()[which].backward()
        norms.append(layer.weight.grad.norm())
    layer.zero_grad()
    weight = adaptive_weight(*losses(), layer.weight)
    assert weight.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-5)
    assert layer.weight.grad is None and not weight.requires_grad
    loss, adversarial = losses()
    (loss + adaptive_weight(loss, adversarial, layer.weight) * adversarial).backward()     # the graph is kept
    layer.zero_grad()
    loss, nothing = losses()[0] * 1e6, (layer(x) * 0).sum()
    assert adaptive_weight(loss, nothing, layer.weight) == 1e4                      # clamped


def test_lecam_follows_a_sequence_by_hand():
    lecam, real_ema, fake_ema = LeCAM(decay=0.9), 0.0, 0.0
    for real, fake in (([1.0, 3.0], [-1.0, -2.0]), ([0.5, -0.5], [0.3, 0.1]), ([2.0, 2.0], [-4.0, 0.0])):
        expected = (np.mean([max(r - fake_ema, 0) ** 2 for r in real])
                    + np.mean([max(real_ema - f, 0) ** 2 for f in fake]))
        real, fake = torch.tensor(real), torch.tensor(fake)
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-5)
        lecam.update(real, fake)
        real_ema = 0.9 * real_ema + 0.1 * real.mean().item()
        fake_ema = 0.9 * fake_ema + 0.1 * fake.mean().item()
    assert lecam.state_dict()["real_ema"].item() == pytest.approx(real_ema, rel=1e-5)
    assert lecam.state_dict()["fake_ema"].item() == pytest.approx(fake_ema, rel=1e-5)


# ---------------------------------------------- discriminators ----------------------------------------------

def small_dino():
    return VisionTransformer(ViTConfig(32, 12, 2, 16, 14, mlp="tanh"), 16).eval().requires_grad_(False)


def test_dino_discriminator_has_the_released_size():
    with torch.device("meta"):
        adversary = Adversary(DinoDiscriminator(VisionTransformer(TEACHERS["dino-s"].vit, 16)))
    assert sum(p.numel() for p in adversary.parameters()) == 7_386_245            # the released code's heads
    assert not any("frozen" in name or "blocks" in name for name in adversary.state_dict())


def test_dino_discriminator_looks_at_a_window_or_at_the_whole():
    discriminator = DinoDiscriminator(small_dino())
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    assert discriminator(images).shape == (2, 5 * 14 * 14)
    window = discriminator(images[..., 16:240, 32:])
    # The spectral norms move at every call in training mode: compare like with like.
    discriminator.eval()
    window = discriminator(images[..., 16:240, 32:])
    assert torch.allclose(discriminator(images, window=(0.5, 0.99)), window, atol=1e-5)
    assert not torch.allclose(discriminator(images), window, atol=1e-2)


def test_gradients_reach_the_image_through_the_frozen_network():
    image = (torch.rand(1, 3, 224, 224) * 2 - 1).requires_grad_()
    discriminator = DinoDiscriminator(small_dino())
    discriminator(image).sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.frozen[0].parameters())


def test_convolutions_of_the_patch_discriminator_have_spectral_norm_one():
    discriminator = PatchDiscriminator(32)
    with torch.no_grad():
        for _ in range(30):
            logits = discriminator(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 8 * 8)
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_batch_norm_is_torchs_in_training_mode():
    x, ours, theirs = torch.randn(4, 6, 10), BatchNorm(6), torch.nn.BatchNorm1d(6, eps=1e-6)
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.weight.copy_(torch.arange(6)), layer.bias.copy_(torch.arange(6) / 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.allclose(ours(a), theirs(b), atol=1e-5)
    for layer, image in ((ours, a), (theirs, b)):
        (layer(image) ** 3).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-3)


def test_small_images_are_enlarged_bicubically_and_large_ones_shrunk_by_area():
    seen, discriminator = [], DinoDiscriminator(small_dino())
    discriminator.frozen[0].intermediate = lambda x, after: seen.append(x) or [torch.zeros(2, 197, 32)] * 5
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    for size, mode in ((32, "bicubic"), (448, "area")):
        images = torch.rand(2, 3, size, size) * 2 - 1
        discriminator(images)
        expected = (F.interpolate(images, (224, 224), mode=mode) / 2 + 0.5 - mean) / std
        assert torch.allclose(seen[-1], expected, atol=1e-4)


WHOLE = [None, None]                       # the windows of the discriminator's own step: it sees whole images


def test_lecam_moves_before_its_penalty_is_taken(monkeypatch):
    monkeypatch.setattr(losses, "LECAM_WEIGHT", 0.3)
    adversary = Adversary(PatchDiscriminator(16))
    adversary.lecam.real_ema.fill_(1.0), adversary.lecam.fake_ema.fill_(-1.0)
    adversary.lecam.decay = 0.5
    images, fakes = torch.rand(2, 4, 3, 16, 16)
    logits = []
    adversary.discriminator.register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach()))
    loss, terms = adversary(images, fakes, WHOLE)
    real, fake = logits
    moved = 0.5 + 0.5 * real.mean(), -0.5 + 0.5 * fake.mean()
    expected = (real - moved[1]).relu().square().mean() + (moved[0] - fake).relu().square().mean()
    assert terms["lecam"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversary.lecam.real_ema.item() == pytest.approx(moved[0].item(), rel=1e-5)
    assert loss.item() == pytest.approx((terms["disc"] + 0.3 * terms["lecam"]).item(), rel=1e-5)
    assert terms["disc_real"].item() == pytest.approx(real.mean().item(), rel=1e-5)
    assert not any(term.requires_grad for term in terms.values()) and loss.requires_grad


def test_each_call_of_the_discriminator_has_its_window_and_float32_logits():
    class Seen(torch.nn.Module):
        def forward(self, images, window):
            seen.append(window)
            return images.flatten(1).bfloat16()

    seen, adversary = [], Adversary(Seen())
    images = torch.rand(2, 3, 4, 4)
    adversary(images, images, ["of images", "of reconstructions", "the third"])
    assert adversary.logits(images, "the third").dtype == torch.float32
    assert seen == ["of images", "of reconstructions", "the third"]


def test_windows_are_coins_and_places_of_their_own_for_every_call_and_step():
    config = SimpleNamespace(seed=3)
    drawn = [draw_windows(config, step, micro) for step in range(150) for micro in (0, 1)]
    assert all(len(windows) == 3 for windows in drawn) and draw_windows(config, 7, 1) == drawn[15]
    crops = [window for windows in drawn for window in windows if window is not None]
    assert abs(len(crops) / 900 - 0.5) < 0.06                                      # standard error 0.017
    assert len(set(crops)) == len(crops)
    top, left = np.array(crops).T
    for place in (top, left):
        assert 0 <= place.min() and place.max() < 1 and abs(place.mean() - 0.5) < 0.06
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.2


def test_lecam_moves_equally_far_in_a_step_of_several_passes():
    for accumulate in (1, 4):
        adversary = build_adversary(SimpleNamespace(disc="patch", image_size=32, accumulate=accumulate),
                                    torch.device("cpu"))
        for _ in range(accumulate):
            adversary.lecam.update(torch.ones(3), -torch.ones(3))
        assert adversary.lecam.real_ema.item() == pytest.approx(0.001, rel=1e-3)
    assert build_adversary(SimpleNamespace(disc="none"), torch.device("cpu")) is None


def test_discriminator_learns_to_tell_two_kinds_of_images_apart():
    adversary = Adversary(PatchDiscriminator(16))
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=1e-3)
    for _ in range(40):
        smooth = F.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, (16, 16))
        loss, terms = adversary(torch.rand(8, 3, 16, 16) * 2 - 1, smooth, WHOLE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["disc"] < 0.5 and terms["disc_real"] > terms["disc_fake"] + 1


# -------------------------------------------- auxiliary targets --------------------------------------------

def test_the_hog_target_is_hog_of_every_patch():
    config = SimpleNamespace(patch_size=8, hog_cell=4, aux_weight=3.0)
    target, images = build_target("hog", config, torch.device("cpu")), torch.rand(2, 3, 16, 24) * 2 - 1
    assert target.dim == 108 and target.weight == 3.0
    assert torch.equal(target.features(images), hog_features(images, 8, 4))


def test_a_teachers_target_is_what_it_says_of_the_images(monkeypatch):
    asked = []
    load = lambda *call: asked.append(call) or (lambda images: images + 1)
    monkeypatch.setattr(losses, "load_teacher", load)
    config = SimpleNamespace(patch_size=16, weights_dir="there", aux_weight=0.5)
    target, images = build_target("dinov2-l", config, torch.device("cpu")), torch.rand(2, 3, 16, 16)
    assert asked == [("dinov2-l", 16, "there", torch.device("cpu"))]
    assert target.dim == TEACHERS["dinov2-l"].dim == 1024 and target.weight == 0.5
    assert torch.equal(target.features(images), images + 1)


def test_targets_are_the_names_of_one_table():
    assert TARGETS.keys() == {"hog", *TEACHERS}
    with pytest.raises(UserError, match="unknown auxiliary target pixels; there are: hog, dino"):
        build_target("pixels", None, None)


def test_the_best_constant_prediction_is_the_mean_over_hidden_patches():
    """Several batches of unequal numbers of hidden patches; no other constant has a smaller loss."""
    target, masks = Target(), [torch.rand(3, 6) < 0.5, torch.rand(2, 6) < 0.8]
    y = [torch.randn(*mask.shape, 4) + 1 for mask in masks]
    hidden = torch.cat([a[mask] for a, mask in zip(y, masks)])
    found = target.constant_loss(y, masks)
    torch.testing.assert_close(found, (hidden - hidden.mean(0)).square().mean())
    assert (hidden - hidden.mean(0) - 0.1).square().mean() > found
    torch.testing.assert_close(target.loss(y[0] + 1, y[0], masks[0]),
                               masked_feature_loss(y[0] + 1, y[0], masks[0]))
