"""losses.py: LPIPS, hinge and LeCAM, the adaptive weight, augmentation and the two discriminators."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import (LPIPS, Adversary, BatchNorm, DinoDiscriminator, LeCAM, PatchDiscriminator, View,
                    adaptive_weight, cut_out, diff_augment, generator_loss, hinge_loss)
from frozen.pretrained import IMAGENET, TEACHERS, VisionTransformer, ViTConfig


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


# ----------------------------------------------- augmentation -----------------------------------------------

def view(colour=False, translation=False, cutout=False, amounts=(0.5,) * 7):
    return View(None, (colour, translation, cutout), torch.tensor([amounts]))


def test_augmentation_off_is_the_image_itself():
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(diff_augment(image, view()), image)


def test_translation_moves_by_whole_pixels_and_fills_with_zeros():
    image = torch.rand(1, 3, 16, 16) + 1
    moved = diff_augment(image, view(translation=True,                                   # 2 rows, -1 column
                                     amounts=(0, 0, 0, 1.0, 0.25, 0, 0)))
    assert torch.equal(moved[..., :14, 1:], image[..., 2:, :15])
    assert moved[..., 14:, :].abs().max() == 0 and moved[..., 0].abs().max() == 0


def test_colour_changes_by_the_drawn_amounts():
    image = torch.rand(1, 3, 8, 8)
    colour = lambda *amounts: diff_augment(image, view(colour=True, amounts=(*amounts, 0, 0, 0, 0)))
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
    together = diff_augment(images, View(None, on, amounts))
    assert not torch.equal(together, images)
    for i in range(4):
        alone = diff_augment(images[i:i + 1], View(None, on, amounts[i:i + 1]))
        assert torch.allclose(alone, together[i:i + 1], atol=1e-6)


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
    assert torch.allclose(discriminator(images, crop=(0.5, 0.99)), window, atol=1e-5)
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


class Identity(torch.nn.Module):
    """A discriminator that shows what it was given."""

    def forward(self, images, crop=None):
        return images.flatten(1)


def test_consistency_compares_with_the_unaugmented_images_harshly_augmented_outside_the_weight():
    adversary, amounts = Adversary(Identity()), torch.rand(4, 2, 7)
    pair, all_on = torch.rand(2, 2, 3, 16, 16) * 2 - 1, (True, True, True)
    views = [View(None, (True, False, False), a) for a in amounts[:2]]
    views += [View(None, all_on, a) for a in amounts[2:]]
    plain, _ = adversary(*pair, views, weight=0.4)
    loss, terms = adversary(*pair, views, weight=0.4, consistency=4.0)
    mild = [diff_augment(x, v) for x, v in zip(pair, views)]
    harsh = [diff_augment(x, v, 0.5) for x, v in zip(pair, views[2:])]
    oracle = sum((a - b).square().mean().item() for a, b in zip(mild, harsh)) / 2
    assert terms["consistency"].item() == pytest.approx(oracle, rel=1e-4)
    assert (loss - plain).item() == pytest.approx(4 * oracle, rel=1e-4)


def test_lecam_moves_before_its_penalty_and_is_inside_the_weight():
    adversary = Adversary(PatchDiscriminator(16))
    adversary.lecam.real_ema.fill_(1.0), adversary.lecam.fake_ema.fill_(-1.0)
    adversary.lecam.decay = 0.5
    images, fakes = torch.rand(2, 4, 3, 16, 16)
    logits = []
    adversary.discriminator.register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach()))
    loss, terms = adversary(images, fakes, weight=0.4, lecam_weight=0.3)
    real, fake = logits
    moved = 0.5 + 0.5 * real.mean(), -0.5 + 0.5 * fake.mean()
    expected = (real - moved[1]).relu().square().mean() + (moved[0] - fake).relu().square().mean()
    assert terms["lecam"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversary.lecam.real_ema.item() == pytest.approx(moved[0].item(), rel=1e-5)
    assert loss.item() == pytest.approx(0.4 * (terms["disc"] + 0.3 * terms["lecam"]).item(), rel=1e-5)


def test_discriminator_learns_to_tell_two_kinds_of_images_apart():
    adversary = Adversary(PatchDiscriminator(16))
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=1e-3)
    for _ in range(40):
        smooth = F.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, (16, 16))
        loss, terms = adversary(torch.rand(8, 3, 16, 16) * 2 - 1, smooth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["disc"] < 0.5 and terms["disc_real"] > terms["disc_fake"] + 1
