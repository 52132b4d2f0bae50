"""The perceptual and adversarial terms of the tokenizer's objective.                        [Sec. 4.1, Eq. 6]

    L = L_recon + lambda_1 L_percep + lambda_2 L_adv + L_mask [Eq. 8]     (summed in train_tokenizer.py)

    L_percep   LPIPS: differences of VGG-16 features, weighted by learned heads
    L_adv      -D(reconstruction); the discriminator D learns D(image) > 1 and D(reconstruction) < -1 (hinge)
    lambda_2   0.4 times the adaptive weight, which levels the two gradients at the decoder's last layer

Two discriminators: DinoDiscriminator, trainable heads on a frozen DINO ViT-S/16 [released code], and
PatchDiscriminator, a small convolutional network that needs no weights from elsewhere [ours].
Images are (B, 3, H, W) float in [-1, 1] throughout.
"""
import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm

import common
from hog import hog_features
from maetok import masked_feature_loss
from frozen.pretrained import (IMAGENET, ViTBlock, channel_constants, load_lpips_heads, load_teacher,
                               load_vgg16, load_vit, normalize)
from variants.text import text_loss


# ------------------------------------------------ perceptual ------------------------------------------------

class LPIPS:
    """Learned perceptual image patch similarity (Zhang et al. 2018), VGG-16, version 0.1.

    vgg: normalised images -> five feature maps; heads: five (1, c, 1, 1) tensors of non-negative weights
    (pretrained.load_vgg16, load_lpips_heads). A plain object: its frozen networks
    belong to no trained module.
    """
    # ImageNet's mean and standard deviation, brought to [-1, 1] and rounded.
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, vgg, heads):
        self.vgg, self.heads = vgg, heads

    def features(self, images):
        shift, scale = (channel_constants(v, images.device) for v in (self.SHIFT, self.SCALE))
        # Unit length over channels at each place. The sum is guarded too: the derivative of a root at 0 is
        # infinite, and flat patches do give features that are 0 in every channel.
        return [f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10)
                for f in self.vgg((images - shift) / scale)]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: two (B, 3, H, W) in [-1, 1] -> (B,) float32. Gradients go to both images."""
        with torch.autocast(a.device.type, enabled=False):
            return self.distance(a.float(), *self.features(b.float()))

    def distance(self, a, *b_features):
        pairs = zip(self.features(a), b_features, self.heads)
        return sum(F.conv2d((f - g).square(), w.to(f)).mean((1, 2, 3)) for f, g, w in pairs)


# ------------------------------------------- adversarial losses -------------------------------------------

def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits, any shapes: it wants real > 1 and fake < -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """L_adv of Eq. 6: the decoder wants its reconstructions' logits high."""
    return -fake.mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|grad L_rec| / (|grad L_adv| + 1e-4) at the decoder's last weight, in [0, 1e4]: a detached scalar.
    (Esser et al. 2021)

    reconstruction_loss: pixels and LPIPS, all of Eq. 6 but the adversarial term; adversarial_loss: that one.
    Over several processes the gradients are averaged first, so that all agree on one weight, the one of
    the whole batch [ours; the released code has one for each process].
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        gradient, = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(common.all_mean(gradient).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class LeCAM(nn.Module):
    """Keeps the discriminator near where it was: with a moving average of its mean logits,
    E[relu(D(x) - fake_ema)^2] + E[relu(real_ema - D(y))^2] (Tseng et al. 2021). Weight 0.001 [Table 7].

    The averages are buffers, so a checkpoint has them. Decay 0.999 [released code].
    """

    def __init__(self, decay=0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_ema", torch.zeros(()))
        self.register_buffer("fake_ema", torch.zeros(()))

    def forward(self, real, fake):
        """Logits of images and of reconstructions, any shapes -> scalar. Does not move the averages."""
        return F.relu(real - self.fake_ema).square().mean() + F.relu(self.real_ema - fake).square().mean()

    @torch.no_grad()
    def update(self, real, fake):
        self.real_ema.lerp_(common.all_mean(real.mean()), 1 - self.decay)
        self.fake_ema.lerp_(common.all_mean(fake.mean()), 1 - self.decay)


# --------------------------------------- differentiable augmentation ---------------------------------------

class View(NamedTuple):
    """How one call of the discriminator looks at its images; the trainer draws a new one for every call."""
    crop: tuple | None = None               # (top, left) of DinoDiscriminator's window; None: the whole image
    augment: tuple = (False, False, False)  # colour, translation, cutout: on or off for the whole batch
    amounts: torch.Tensor | None = None     # (B, 7) float uniform in [0, 1): how much, for each image


def draw_views(config, step: int, micro: int, positions, device) -> list[View]:
    """How the discriminator looks at each of its five calls in a step, a list of View: at images, at
    reconstructions, at both for the consistency term, and at reconstructions for the decoder's own loss.

    Window or whole image, and with DiffAug each of its three parts on or off, are coins thrown anew for every
    call and shared by its batch [released code]; window and amounts follow from (seed, step, sample), so that
    processes agree.
    """
    coins = common.sample_rng(config.seed, "disc-view", step, micro).random((5, 6)).tolist()
    amounts = [rng.random((5, 7), np.float32) for rng in common.step_rngs(config, "augment", step, positions)]
    amounts = common.to_device(torch.from_numpy(np.stack(amounts, 1)), device)                  # (5, B, 7)
    views = []
    for call, (crop, top, left, *on) in enumerate(coins):
        harsh = call in (2, 3)                                       # consistency: all three, certainly
        augment = tuple(harsh or config.diffaug and coin < 0.5 for coin in on)
        views.append(View((top, left) if crop < 0.5 else None, augment, amounts[call]))
    return views


def diff_augment(images: Tensor, view: View, cutout: float = 0.2) -> Tensor:
    """DiffAug (Zhao et al. 2020): colour, translation and cutout of `cutout` times the sides.

    Both sides of the discriminator see augmented images, and gradients pass, so that a discriminator that
    has learned the training images by heart is of no more use to itself. Which of the three are on is drawn
    once a batch, each with probability 0.5; their amounts are an image's own [released code].
    """
    B, _, H, W = images.shape
    colour, translation, cut = view.augment
    x = images
    if any(view.augment):
        u = view.amounts.to(images)[:, :, None, None, None]                           # (B, 7, 1, 1, 1)
    if colour:
        x = x + (u[:, 0] - 0.5)                                                       # brightness
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * (2 * u[:, 1]) + grey                                         # saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * (u[:, 2] + 0.5) + mean                                       # contrast
    if translation:
        # By up to an eighth, zeros from outside: a gather in a padded picture.
        dy, dx = ((u[:, 3 + i, :, :, 0] * 2 - 1) * size / 8 for i, size in ((0, H), (1, W)))     # (B, 1, 1)
        rows = (torch.arange(H, device=x.device)[:, None] + dy.round().long()).expand(B, H, W)
        columns = (torch.arange(W, device=x.device) + dx.round().long()).expand(B, H, W)
        inside = ((rows >= 0) & (rows < H) & (columns >= 0) & (columns < W))[:, None]
        place = rows.clamp(0, H - 1) * W + columns.clamp(0, W - 1)                    # (B, H, W)
        x = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view_as(x) * inside
    return cut_out(x, view.amounts[:, 5:], cutout) if cut else x


def cut_out(images: Tensor, draws: Tensor, size: float) -> Tensor:
    """A grey square of `size` times the sides, its centre anywhere. draws: (B, 2) uniform in [0, 1)."""
    H, W = images.shape[-2:]
    y, x = ((torch.arange(n, device=images.device) + 0.5) / n for n in (H, W))
    cy, cx = draws.to(images)[:, 0, None, None], draws.to(images)[:, 1, None, None]   # (B, 1, 1)
    hole = ((y[:, None] - cy).abs() < size / 2) & ((x - cx).abs() < size / 2)         # (B, H, W)
    return images.masked_fill(hole[:, None], 0.0)


# ---------------------------------------------- discriminators ----------------------------------------------

class PatchDiscriminator(nn.Module):
    """Convolutions with spectral norm, a logit for each of many overlapping patches: (B, 3, H, W) -> (B, n).

    Three halvings at 64 px and more, two below (a patch then spans 22 px). [ours, after pix2pix's PatchGAN]
    """

    def __init__(self, image_size, width=32):
        super().__init__()
        layers, channels = [], 3
        for i in range(3 if image_size >= 64 else 2):
            layers += [spectral_norm(nn.Conv2d(channels, width << i, 4, 2, 1)), nn.LeakyReLU(0.2)]
            channels = width << i
        layers += [spectral_norm(nn.Conv2d(channels, 2 * channels, 3, 1, 1)), nn.LeakyReLU(0.2),
                   spectral_norm(nn.Conv2d(2 * channels, 1, 3, 1, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images, crop=None):
        """crop is the other discriminator's affair."""
        return self.layers(images).flatten(1)


class BatchNorm(nn.Module):
    """Batch norm of (B, c, T) by the statistics of the whole batch, over all processes, with gradients.

    torch's SyncBatchNorm does the same on GPUs only. The discriminator is only ever used while it trains:
    there are no running averages.
    """

    def __init__(self, channels, eps=1e-6):                        # 1e-6 [released code]
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        mean = self.over_processes(x.mean((0, 2)))[:, None]
        variance = self.over_processes((x - mean).square().mean((0, 2)))[:, None]
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]

    @staticmethod
    def over_processes(statistic):
        """Every process has as many values, so the mean of means is the mean."""
        return dist_grad.all_reduce(statistic) / dist.get_world_size() if dist.is_initialized() else statistic


class Residual(nn.Module):
    """(x + f(x)) / sqrt(2): the variance stays as it was."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return (x + self.f(x)) / 2 ** 0.5


def _discriminator_head(channels):
    """Tokens (B, c, T) -> logits (B, 1, T). 1,477,249 parameters at 384 channels [released code]."""
    def unit(kernel):
        convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
        return nn.Sequential(spectral_norm(convolution), BatchNorm(channels), nn.LeakyReLU(0.2))
    return nn.Sequential(unit(1), Residual(unit(9)), spectral_norm(nn.Conv1d(channels, 1, 1)))


class DinoDiscriminator(nn.Module):
    """Five heads on a frozen DINO ViT-S/16: on its token embedding and on blocks 3, 6, 9, 12. [released code]

    The paper says DINOv2-S; the released code loads DINO v1, and that is what this is. In every readout the
    class token is added to each patch (as StyleGAN-T, Sauer et al. 2023, where the design is from).
    dino: the frozen pretrained.VisionTransformer. It is held in a tuple, so that it is no submodule: not in
    the state dict, the optimizer or DDP.
    """
    SIZE = 224                                                              # px: what DINO was trained on

    def __init__(self, dino):
        super().__init__()
        self.frozen = (dino,)
        self.heads = nn.ModuleList(_discriminator_head(dino.config.width) for _ in range(5))

    def forward(self, images, crop=None):
        """(B, 3, H, W) -> (B, 5 * 196) logits.

        crop: (top, left) of a 224-px window, each as a fraction in [0, 1) of the room there is; None brings
        the whole image to 224 px: larger ones by area, smaller ones bicubically. The released code flips a
        coin between them at every call.
        """
        S, (H, W) = self.SIZE, images.shape[-2:]
        if crop is not None and min(H, W) > S:
            top, left = int(crop[0] * (H - S + 1)), int(crop[1] * (W - S + 1))
            images = images[..., top:top + S, left:left + S]
        elif (H, W) != (S, S):
            images = F.interpolate(images, (S, S), mode="area" if min(H, W) >= S else "bicubic")
        readouts = self.frozen[0].intermediate(normalize(images, *IMAGENET), after=(0, 3, 6, 9, 12))
        return torch.cat([head((x[:, 1:] + x[:, :1]).transpose(1, 2)).flatten(1)
                          for head, x in zip(self.heads, readouts, strict=True)], dim=1)


class Adversary(nn.Module):
    """The discriminator with what its own training step needs. forward() is that step's loss.

    One forward call for images and reconstructions, so that DistributedDataParallel sees one; they pass
    through the network separately, each normalised by its own batch.
    """

    def __init__(self, discriminator, lecam_decay=0.999):
        super().__init__()
        self.discriminator, self.lecam = discriminator, LeCAM(lecam_decay)

    def look(self, images, view, cutout=0.2):
        """Logits of images as `view` shows them. float32: the networks may run in bfloat16, losses do not."""
        return self.discriminator(diff_augment(images, view, cutout), view.crop).float()

    def forward(self, images, reconstructions, views=(View(),) * 4, weight=1.0, lecam_weight=0.0,
                consistency=0.0):
        """weight (hinge + lecam_weight LeCAM) + consistency * C -> (loss, {name: detached term}).

        The reconstructions must be detached by the caller. views: of images and of reconstructions, then both
        once more for C, the mean squared difference between these logits and those of the un-augmented
        images under all of colour, translation and a cutout of half the sides: a good discriminator is
        indifferent to bad augmentation. C stands outside the discriminator's weight [released code].
        """
        pair = images, reconstructions
        real, fake = (self.look(x, view) for x, view in zip(pair, views))
        self.lecam.update(real.detach(), fake.detach())          # before the penalty is taken [released code]
        terms = {"disc": hinge_loss(real, fake), "lecam": self.lecam(real, fake)}
        loss = weight * (terms["disc"] + lecam_weight * terms["lecam"])
        if consistency > 0:
            harsh = [self.look(x, view, cutout=0.5) for x, view in zip(pair, views[2:])]
            terms["consistency"] = F.mse_loss(torch.cat((real, fake)), torch.cat(harsh))
            loss = loss + consistency * terms["consistency"]
        terms |= {"disc_real": real.mean(), "disc_fake": fake.mean()}
        return loss, {name: term.detach() for name, term in terms.items()}


# ------------------------------------------ what a config asks for ------------------------------------------

class Objective(NamedTuple):
    """What the loss needs besides the tokenizer. The frozen networks stand outside every trained module:
    in no state dict, EMA, optimizer or DDP."""
    teachers: dict                             # target name -> pretrained.Teacher; "text" -> text.TextTarget
    lpips: LPIPS | None
    adversary: Adversary | None                # trained beside the tokenizer, with its own optimizer


def build_objective(config, device: torch.device) -> Objective:
    """Load the frozen networks that the config asks for, and make the adversary. Raises UserError."""
    where = dict(weights_dir=config.weights_dir, device=device, random=config.random_frozen)
    style = dict(mean_std=IMAGENET, gelu="exact") if config.teachers_as == "released" else {}
    # Stage 2 has no auxiliary decoders, and should not load gigabytes for them.
    teachers = {name: load_teacher(name, config.patch_size, **where, **style)
                for name in (*config.aux_targets, config.align)
                if name not in ("hog", "text", "") and config.stage != "2"}
    lpips = LPIPS(load_vgg16(**where), load_lpips_heads(**where)) if config.percep_weight else None
    if lpips is not None and config.checkpointing:
        lpips.distance = functools.partial(common.recompute, lpips.distance)
    if config.disc == "none":
        return Objective(teachers, lpips, None)
    if config.disc == "patch":
        discriminator = PatchDiscriminator(config.image_size)
    else:
        dino = common.cast_matrices(load_vit("dino-s", 16, gelu="tanh", **where),
                                    common.autocast_dtype(config.dtype, device))
        if config.checkpointing:      # not the heads: a second call would turn spectral norm's vectors again
            common.recompute_blocks(dino, ViTBlock)
        discriminator = DinoDiscriminator(dino)
    # LeCAM's average moves once a forward pass: with accumulation, as far in all as in one step of the whole.
    return Objective(teachers, lpips, Adversary(discriminator, 0.999 ** (1 / config.accumulate)).to(device))


def compute_targets(config, images: Tensor, teachers: dict, captions=None) -> dict[str, Tensor]:
    """Target features y^j of every patch, (B, N, D_j) float32 each, keyed as config.aux_targets [Eq. 8];
    "text" is (B, D_j), one for each of the B captions."""
    return {name: hog_features(images, config.patch_size, config.hog_cell) if name == "hog"
            else teachers[name](captions if name == "text" else images) for name in config.aux_targets}


def auxiliary_loss(config, name: str, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The loss of one target: Eq. 8 on the hidden patches, or text's cross-entropy. Float32 scalar."""
    if name == "text":
        return text_loss(prediction, target)
    return masked_feature_loss(prediction, target, mask, distance(config, name))


def distance(config, name: str) -> str:
    """"mse" or "cosine" for one target, by --aux-loss."""
    return config.aux_loss if config.aux_loss != "mixed" else "mse" if name == "hog" else "cosine"
