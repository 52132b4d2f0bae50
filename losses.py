"""The terms of the tokenizer's objective: perceptual, adversarial, auxiliary targets.   [Sec. 4.1, Eq. 6, 8]

    L = L_recon + lambda_1 L_percep + lambda_2 L_adv + sum over targets j of L_mask^j
                                                                     (summed in train_tokenizer.objective)
    L_percep   LPIPS: differences of VGG-16 features, weighted by learned heads
    L_adv      -D(reconstruction); the discriminator D learns D(image) > 1 and D(reconstruction) < -1 (hinge)
    lambda_2   0.4 times the adaptive weight, which balances the two gradients at the decoder's last layer
    L_mask^j   Eq. 8 of target j: HOG, or the features of a frozen teacher. TARGETS lists them

Two discriminators: DinoDiscriminator, trainable heads on a frozen DINO ViT-S/16 [released code], and
PatchDiscriminator, a small convolutional network that needs no weights from elsewhere [ours].
Images are (B, 3, H, W) float in [-1, 1] throughout.
"""
import common    # before torch, see there

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm

from frozen.pretrained import (IMAGENET, TEACHERS, channel_constants, load_lpips_heads, load_teacher,
                               load_vgg16, load_vit, normalize)
from hog import hog_dim, hog_features
from maetok import masked_feature_loss
from runtime.processes import all_mean, autocast_dtype, cast_matrices

LECAM_WEIGHT = 1e-3                                                                        # [Table 7]
PERCEP_WARMUP = 10_000                                  # steps in which LPIPS grows from 0 [released code]


# ------------------------------------------------ perceptual ------------------------------------------------

class LPIPS:
    """Learned perceptual image patch similarity (Zhang et al. 2018), VGG-16, version 0.1.

    vgg: normalised images -> five feature maps; heads: five (1, c, 1, 1) tensors of non-negative weights
    (frozen.pretrained.load_vgg16, load_lpips_heads). A plain object, so that its frozen networks are not
    part of a trained module.
    """
    # ImageNet's mean and standard deviation for images in [-1, 1], rounded [LPIPS].
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, vgg, heads):
        self.vgg, self.heads = vgg, heads

    def features(self, images):
        shift, scale = (channel_constants(v, images.device) for v in (self.SHIFT, self.SCALE))
        # Unit length over channels at each place. 1e-20: the derivative of a root at 0 is infinite, and flat
        # patches have features that are 0 in every channel.
        return [f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10)
                for f in self.vgg((images - shift) / scale)]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: two (B, 3, H, W) in [-1, 1] -> (B,) float32. Gradients go to both images."""
        with torch.autocast(a.device.type, enabled=False):
            pairs = zip(self.features(a.float()), self.features(b.float()), self.heads)
            return sum(F.conv2d((f - g).square(), w.to(f)).mean((1, 2, 3)) for f, g, w in pairs)


def build_lpips(config, device) -> LPIPS:
    """LPIPS with its public weights. Raises UserError where they are missing."""
    where = dict(weights_dir=config.weights_dir, device=device)
    return LPIPS(load_vgg16(**where), load_lpips_heads(**where))


# ------------------------------------------- adversarial losses -------------------------------------------

def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits, any shapes: it wants real > 1 and fake < -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """L_adv of Eq. 6: the decoder wants its reconstructions' logits high."""
    return -fake.mean()


def differentiated(loss, x: Tensor) -> Tensor:
    """loss(x), a scalar, with its gradient at x taken at once: every backward pass from it begins at x. So
    adaptive_weight and the step share one pass through the networks of `loss` [ours; the released code passes
    them twice], and their activations are freed."""
    value = loss(x)
    gradient, = torch.autograd.grad(value, x)
    return value.detach() + (gradient * (x - x.detach())).sum()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|grad L_rec| / (|grad L_adv| + 1e-4) at the decoder's last weight, in [0, 1e4]: a detached scalar.
    (Esser et al. 2021)

    reconstruction_loss: pixels and LPIPS, all of Eq. 6 but the adversarial term; adversarial_loss: that one.
    Over several processes the gradients are averaged first: one weight, that of the whole batch [ours; the
    released code has one per process].
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        gradient, = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(all_mean(gradient).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class LeCAM(nn.Module):
    """A penalty that keeps the discriminator's logits near their moving averages (Tseng et al. 2021):
    E[relu(D(x) - fake_ema)^2] + E[relu(real_ema - D(x_hat))^2]. Weight 0.001 [Table 7].

    The averages are buffers: a checkpoint holds them. Decay 0.999 [released code].
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
        self.real_ema.lerp_(all_mean(real.mean()), 1 - self.decay)
        self.fake_ema.lerp_(all_mean(fake.mean()), 1 - self.decay)


# ---------------------------------------------- discriminators ----------------------------------------------

class PatchDiscriminator(nn.Module):
    """Convolutions with spectral norm, a logit for each of many overlapping patches: (B, 3, H, W) -> (B, n).

    Three halvings at 64 px and more, two below (a patch then spans 26 px). [ours, after pix2pix's PatchGAN]
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

    def forward(self, images, window=None):
        """window: ignored (DinoDiscriminator's)."""
        return self.layers(images).flatten(1)


class BatchNorm(nn.Module):
    """Batch norm of (B, c, T) by the statistics of the whole batch, over all processes, with gradients.

    torch's SyncBatchNorm does the same, on GPUs only. No running averages: the discriminator is used only
    while it trains.
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
        """All processes have equally many values, so the mean of their means is the mean."""
        return dist_grad.all_reduce(statistic) / dist.get_world_size() if dist.is_initialized() else statistic


class Residual(nn.Module):
    """(x + f(x)) / sqrt(2), which keeps the variance."""

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

    The paper says DINOv2-S; the released code loads DINO v1, as we do. In every readout the class token is
    added to each patch. The design is StyleGAN-T's (Sauer et al. 2023).
    dino: the frozen pretrained.VisionTransformer, held in a tuple so that it is not a submodule: not in the
    state dict, the optimizer or DDP.
    """
    SIZE = 224                                                              # px: what DINO was trained on

    def __init__(self, dino):
        super().__init__()
        self.frozen = (dino,)
        self.heads = nn.ModuleList(_discriminator_head(dino.config.width) for _ in range(5))

    def forward(self, images, window=None):
        """(B, 3, H, W) -> (B, 5 * 196) logits.

        window: (top, left) of a 224-px crop, as fractions in [0, 1) of the positions it can take; None: the
        whole image, brought to 224 px (larger ones by area, smaller ones bicubically).
        """
        S, (H, W) = self.SIZE, images.shape[-2:]
        if window is not None and min(H, W) > S:
            top, left = int(window[0] * (H - S + 1)), int(window[1] * (W - S + 1))
            images = images[..., top:top + S, left:left + S]
        elif (H, W) != (S, S):
            images = F.interpolate(images, (S, S), mode="area" if min(H, W) >= S else "bicubic")
        readouts = self.frozen[0].intermediate(normalize(images, *IMAGENET), after=(0, 3, 6, 9, 12))
        return torch.cat([head((x[:, 1:] + x[:, :1]).transpose(1, 2)).flatten(1)
                          for head, x in zip(self.heads, readouts, strict=True)], dim=1)


class Adversary(nn.Module):
    """The discriminator with its own training step, whose loss is forward().

    One forward call for images and reconstructions, because DistributedDataParallel needs one. They pass
    through the network separately, each normalised by its own batch.
    """

    def __init__(self, discriminator, lecam_decay=0.999):
        super().__init__()
        self.discriminator, self.lecam = discriminator, LeCAM(lecam_decay)

    def logits(self, images, window):
        """D(images), (B, n) float32: the network may run in bfloat16, the losses do not."""
        return self.discriminator(images, window).float()

    def forward(self, images, reconstructions, windows):
        """L_D = hinge + 0.001 LeCAM -> (loss, {name: detached term}).

        reconstructions: detached by the caller. windows: draw_windows'; the first two are used.
        """
        real, fake = self.logits(images, windows[0]), self.logits(reconstructions, windows[1])
        self.lecam.update(real.detach(), fake.detach())          # before the penalty is taken [released code]
        terms = {"disc": hinge_loss(real, fake), "lecam": self.lecam(real, fake)}
        loss = terms["disc"] + LECAM_WEIGHT * terms["lecam"]
        terms |= {"disc_real": real.mean(), "disc_fake": fake.mean()}
        return loss, {name: term.detach() for name, term in terms.items()}


def draw_windows(config, step: int, micro: int) -> list:
    """The windows of the discriminator's three calls in a step: on images, on reconstructions, and on
    reconstructions for the decoder's own loss. One coin per call, shared by its batch: a 224-px crop at
    (top, left), or None, the whole image [released code]."""
    coins = common.sample_rng(config.seed, "disc-window", step, micro).random((3, 3)).tolist()
    return [(top, left) if crop < 0.5 else None for crop, top, left in coins]


def build_adversary(config, device, kind=Adversary) -> Adversary | None:
    """The adversary that config.disc names: "dino", "patch" or "none". Raises UserError for missing
    weights."""
    if config.disc == "none":
        return None
    if config.disc == "patch":
        discriminator = PatchDiscriminator(config.image_size)
    else:
        dino = load_vit("dino-s", 16, gelu="tanh", weights_dir=config.weights_dir, device=device)
        cast_matrices(dino, autocast_dtype(config.dtype, device, config.width))
        if config.checkpointing:   # not the heads: a second call would update spectral norm's vectors again
            common.recompute_blocks(dino)
        discriminator = DinoDiscriminator(dino)
    # With A accumulation passes the decay is its A-th root, so that one step moves the averages equally far.
    return kind(discriminator, 0.999 ** (1 / config.accumulate)).to(device)


# -------------------------------------------- auxiliary targets --------------------------------------------

class Target:
    """What one auxiliary decoder predicts: a target j of Eq. 7 and 8. A new target is a class like the two
    below and its name in TARGETS. Its attributes: dim, D_j; weight, of its loss in the sum."""

    def features(self, images: Tensor, *more) -> Tensor:
        """y_j: images (B, 3, H, W) in [-1, 1] -> (B, N, D_j) float32. more: what else the data set gives."""
        raise NotImplementedError

    def decoder(self, model) -> nn.Module:
        """D^j of Eq. 7: a module, latents (B, L, C) and grid (rows, columns) -> predictions (B, N, D_j)."""
        return model.build_decoder(model.config.aux_depth, self.dim)

    def loss(self, prediction: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Eq. 8: predictions and targets (B, N, D_j), mask (B, N) bool, True = hidden -> float32 scalar."""
        return masked_feature_loss(prediction, y, mask)

    def constant_loss(self, targets: list, masks: list) -> Tensor:
        """The loss of the best constant prediction for several batches, which a decoder must beat: for a mean
        squared error that constant is the mean over all hidden patches. targets, masks: as in `loss`."""
        y = torch.cat([y[mask] for y, mask in zip(targets, masks)])[None]                   # (1, hidden, D_j)
        mean = y.mean(1, keepdim=True).expand_as(y)
        return self.loss(mean, y, torch.ones(y.shape[:2], dtype=torch.bool, device=y.device))


class HOGTarget(Target):
    """Histograms of oriented gradients of every patch [Table 1b]."""

    def __init__(self, name, config, device):
        self.patch_size, self.cell_size = config.patch_size, config.hog_cell
        self.dim, self.weight = hog_dim(config.patch_size, config.hog_cell), config.aux_weight

    def features(self, images, *more):
        return hog_features(images, self.patch_size, self.cell_size)


class TeacherTarget(Target):
    """Patch features of a frozen teacher: DINOv2, SigLIP [Table 1b]."""

    def __init__(self, name, config, device):
        self.teacher = load_teacher(name, config.patch_size, config.weights_dir, device)
        self.dim, self.weight = TEACHERS[name].dim, config.aux_weight

    def features(self, images, *more):
        return self.teacher(images)


# What --targets can name: target name -> class.
TARGETS = {"hog": HOGTarget, **dict.fromkeys(TEACHERS, TeacherTarget)}


def build_target(name, config, device) -> Target:
    """The target of that name, its frozen network loaded."""
    if name not in TARGETS:
        raise common.UserError(f"unknown auxiliary target {name}; there are: {', '.join(TARGETS)}")
    return TARGETS[name](name, config, device)
