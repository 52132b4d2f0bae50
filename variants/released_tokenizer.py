"""The authors' released tokenizer, where it differs from the paper (docs/paper-and-code.md).  [released code]

    train_tokenizer.py --preset maetok-b-256,released --add released --data IMAGENET

    encoder     + class token, a learned position table on the image tokens, LayerScale, RoPE-Mixed
    decoders    RoPE-Mixed; the raw latents shift and scale the latent tokens; norms without weights
    auxiliary   width 192, 3 heads, a class token
    training    one mask ratio per step, random crops, SigLIP fed as DINOv2, -cos for teachers, DiffAug and
                consistency for the discriminator, another schedule and initialisation, no EMA warm-up

What differs is fixed here and has no options. Shapes: see maetok.py.
To remove it: delete variants/released*.py and random_crop.py.
"""
import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import losses
from common import UserError, sample_rng, step_rngs
from frozen.pretrained import IMAGENET, TEACHERS, load_teacher
from losses import Adversary, TeacherTarget, hinge_loss
from maetok import Block, Decoder, Encoder, MAETok, RoPE2D, Transformer
from runtime.processes import to_device
from variants.random_crop import random_crop

LAYER_SCALE = 1e-5                                              # the gains' first value
LR_START, LR_END = 1e-5, 2e-5                                   # of the warm-up; of the cosine
DISC_LOSS_WEIGHT, CONSISTENCY_WEIGHT = 0.4, 4.0                 # of hinge and LeCAM; of the consistency term


# ------------------------------------------------ the model ------------------------------------------------

class MixedRoPE(RoPE2D):
    """RoPE-Mixed (Heo et al. 2024): learned frequencies, one set per layer and head. Channel pair i of a
    token at (col, row) turns by col * f[0, i] + row * f[1, i]. At first each head has a random direction, and
    the second half of its pairs looks at a right angle to the first."""

    def __init__(self, depth, heads, head_size):
        nn.Module.__init__(self)
        magnitude = 10.0 ** (-torch.arange(head_size // 4) / (head_size // 4))
        direction = torch.rand(depth, heads, 1) * 2 * math.pi
        across = direction + math.pi / 2
        fx = torch.cat((magnitude * direction.cos(), magnitude * across.cos()), -1)        # (depth, nh, hs/2)
        fy = torch.cat((magnitude * direction.sin(), magnitude * across.sin()), -1)
        self.freqs = nn.Parameter(torch.stack((fx, fy), 1))                             # (depth, 2, nh, hs/2)

    def forward(self, grid, before, others):
        """grid = (rows, columns) of the image tokens; before, others: how many tokens come before and after
        them. Returns cos and sin, (depth, nh, T, hs/2) float32 each."""
        rows, columns = grid
        index = torch.arange(rows * columns, device=self.freqs.device)
        col, row = (index % columns)[:, None], (index // columns)[:, None]                            # (N, 1)
        f = self.freqs.float()
        angle = col * f[:, 0, :, None] + row * f[:, 1, :, None]                         # (depth, nh, N, hs/2)
        angle = F.pad(angle, (0, 0, before, others))                                    # (depth, nh, T, hs/2)
        return angle.cos(), angle.sin()


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x):
        return x * self.gamma


class ScaledBlock(Block):
    """The encoder's block: a LayerScale at the end of both branches."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.layer_scale1, self.layer_scale2 = LayerScale(width), LayerScale(width)

    def forward(self, x, rope):
        x = x + self.layer_scale1(self.attn(self.norm1(x), rope))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class ModulatedBlock(Block):
    """The decoders' block. Its norms have no weights; instead the raw latents (B, L, C) make shift and scale
    for the latent tokens, x * scale + shift (not 1 + scale). The image tokens are not modulated."""

    def __init__(self, width, heads, latent_dim):
        super().__init__(width, heads)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(latent_dim, 4 * width))

    def forward(self, x, rope, latents):
        shift1, scale1, shift2, scale2 = self.modulation(latents).chunk(4, dim=-1)          # each (B, L, D)
        x = x + self.attn(modulate_latent_tokens(self.norm1(x), shift1, scale1), rope)
        return x + self.mlp(modulate_latent_tokens(self.norm2(x), shift2, scale2))


def modulate_latent_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D) with its last L tokens replaced by  token * scale + shift; shift, scale: (B, L, D)."""
    L = shift.shape[1]
    return torch.cat((x[:, :-L], x[:, -L:] * scale + shift), dim=1)


class MixedTransformer(Transformer):
    """Blocks over [class token ; image tokens ; latent tokens], each with its own rotation; a last norm."""

    def __init__(self, blocks, norm, width, heads):
        nn.Module.__init__(self)
        self.blocks, self.norm = nn.ModuleList(blocks), norm
        self.rope = MixedRoPE(len(blocks), heads, width // heads)

    def forward(self, x, grid, before, *latents):
        """before: how many tokens come before the image tokens; latents: for ModulatedBlock."""
        cos, sin = self.rope(grid, before, x.shape[1] - before - grid[0] * grid[1])
        for i, block in enumerate(self.blocks):
            x = block(x, (cos[i], sin[i]), *latents)
        return self.norm(x)


class ReleasedEncoder(Encoder):
    """Positions are added after masking, so a mask token still knows its place."""

    def __init__(self, config):
        super().__init__(config)
        c, D = config, config.width
        side = c.image_size // c.patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.image_positions = nn.Parameter(torch.zeros(1, side, side, D))
        self.transformer = MixedTransformer([ScaledBlock(D, c.heads) for _ in range(c.encoder_depth)],
                                            nn.LayerNorm(D, eps=1e-6), D, c.heads)

    def forward(self, images, mask):
        B, grid = len(images), tuple(side // self.patch_size for side in images.shape[-2:])
        table = self.image_positions.permute(0, 3, 1, 2)                               # (1, D, rows, columns)
        if table.shape[-2:] != grid:
            table = F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True)
        x = self.image_tokens(images, mask) + table.flatten(2).transpose(1, 2)
        z = (self.latent_tokens + self.latent_positions).expand(B, -1, -1)
        x = torch.cat((self.class_token.expand(B, -1, -1), x, z), dim=1)                # (B, 1+N+L, D)
        return self.to_latent(self.transformer(x, grid, 1)[:, -self.num_latents:])


class ReleasedDecoder(Decoder):
    """The pixel decoder has no class token; the auxiliary decoders have one."""

    def __init__(self, config, depth, out_dim, class_token):
        super().__init__(config, depth, out_dim)
        D, heads = config.width, config.heads
        self.class_token = nn.Parameter(torch.zeros(1, 1, D)) if class_token else None
        self.transformer = MixedTransformer(
            [ModulatedBlock(D, heads, config.latent_dim) for _ in range(depth)],
            nn.LayerNorm(D, eps=1e-6, elementwise_affine=False), D, heads)

    def image_tokens(self, latents, grid):
        x, before = self.tokens(latents, grid), 0
        if self.class_token is not None:
            x, before = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1), 1
        return self.transformer(x, grid, before, latents)[:, before:before + grid[0] * grid[1]]


class ReleasedMAETok(MAETok):
    """The tokenizer of the released weights. It has learnable latents and is not variational."""
    AUX_WIDTH, AUX_HEADS = 192, 3

    def build_encoder(self):
        return ReleasedEncoder(self.config)

    def build_decoder(self, depth, out_dim):
        auxiliary = hasattr(self, "decoder")                        # the pixel decoder is built first
        config = (dataclasses.replace(self.config, width=self.AUX_WIDTH, heads=self.AUX_HEADS) if auxiliary
                  else self.config)
        return ReleasedDecoder(config, depth, out_dim, class_token=auxiliary)

    def initialise(self):
        """Truncated normal 0.02 for linear layers, normal 0.02 for tokens and positions, 1e-6 for class
        tokens; the modulation starts at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("_token", "_tokens", "_positions")):
                nn.init.normal_(parameter, std=1e-6 if name.endswith("class_token") else 0.02)
            elif ".modulation." in name:
                nn.init.zeros_(parameter)


# ----------------------------------------------- its targets -----------------------------------------------

class ReleasedTeacherTarget(TeacherTarget):
    """A teacher fed with ImageNet's mean and std and run with exact GELU, SigLIP too; compared by the mean of
    -cos(prediction, target) over the hidden patches."""

    def __init__(self, name, config, device):
        self.teacher = load_teacher(name, config.patch_size, config.weights_dir, device, mean_std=IMAGENET,
                                    gelu="exact")
        self.dim, self.weight = TEACHERS[name].dim, config.aux_weight

    def loss(self, prediction, y, mask):
        per_patch = -F.cosine_similarity(prediction.float(), y.float(), dim=-1)             # (B, N)
        mask = mask.float()
        return ((per_patch * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    def constant_loss(self, targets, masks):
        """The negative cosine is least at the mean of the unit vectors."""
        y = torch.cat([y[mask] for y, mask in zip(targets, masks)])                         # (hidden, D_j)
        mean = F.normalize(y, dim=-1).mean(0).expand_as(y)
        return self.loss(mean[None], y[None], torch.ones(1, len(y), dtype=torch.bool, device=y.device))


# -------------------------------------------- its discriminator --------------------------------------------

class Augmentation(NamedTuple):
    """The random crop and DiffAug of one call of the discriminator."""
    window: tuple | None        # (top, left) of DinoDiscriminator's crop, or None: the whole image
    parts: tuple                # colour, translation, cutout: on or off for the whole batch
    amounts: Tensor             # (B, 7) float, uniform in [0, 1): how much, per image
    cutout: float = 0.2         # size of the cutout, as a part of the sides


def draw_augmentations(config, step: int, micro: int, positions, device) -> list[Augmentation]:
    """The augmentations of the discriminator's five calls in a step: on images, on reconstructions, on both
    for the consistency term, and on reconstructions for the decoder's own loss.

    For each call, one coin per batch: a 224-px crop or the whole image; and one for each part of DiffAug. The
    amounts are drawn per image. All follow from (seed, step, sample), so processes agree.
    """
    coins = sample_rng(config.seed, "disc-view", step, micro).random((5, 6)).tolist()
    amounts = [rng.random((5, 7), np.float32) for rng in step_rngs(config, "augment", step, positions)]
    amounts = to_device(torch.from_numpy(np.stack(amounts, 1)), device)                         # (5, B, 7)
    found = []
    for call, (crop, top, left, *coin) in enumerate(coins):
        strong = call in (2, 3)                                      # consistency: all three parts, always
        parts = tuple(strong or c < 0.5 for c in coin)
        found.append(Augmentation((top, left) if crop < 0.5 else None, parts, amounts[call],
                                  0.5 if strong else 0.2))
    return found


def diff_augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """DiffAug (Zhao et al. 2020): colour, translation, cutout, with gradients. Images: (B, 3, H, W).

    Images and reconstructions are both augmented, so a discriminator gains nothing from remembering the
    training images.
    """
    B, _, H, W = images.shape
    colour, translation, cutout = augmentation.parts
    x, u = images, augmentation.amounts.to(images)[:, :, None, None, None]            # (B, 7, 1, 1, 1)
    if colour:
        x = x + (u[:, 0] - 0.5)                                                       # brightness
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * (2 * u[:, 1]) + grey                                         # saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * (u[:, 2] + 0.5) + mean                                       # contrast
    if translation:
        # By up to an eighth of the sides, zeros from outside: a gather from a zero-padded picture.
        dy, dx = ((u[:, 3 + i, :, :, 0] * 2 - 1) * size / 8 for i, size in ((0, H), (1, W)))     # (B, 1, 1)
        rows = (torch.arange(H, device=x.device)[:, None] + dy.round().long()).expand(B, H, W)
        columns = (torch.arange(W, device=x.device) + dx.round().long()).expand(B, H, W)
        inside = ((rows >= 0) & (rows < H) & (columns >= 0) & (columns < W))[:, None]
        place = rows.clamp(0, H - 1) * W + columns.clamp(0, W - 1)                    # (B, H, W)
        x = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view_as(x) * inside
    return cut_out(x, augmentation.amounts[:, 5:], augmentation.cutout) if cutout else x


def cut_out(images: Tensor, draws: Tensor, size: float) -> Tensor:
    """A grey square of `size` times the sides, its centre anywhere. draws: (B, 2) uniform in [0, 1)."""
    H, W = images.shape[-2:]
    y, x = ((torch.arange(n, device=images.device) + 0.5) / n for n in (H, W))
    cy, cx = draws.to(images)[:, 0, None, None], draws.to(images)[:, 1, None, None]   # (B, 1, 1)
    hole = ((y[:, None] - cy).abs() < size / 2) & ((x - cx).abs() < size / 2)         # (B, H, W)
    return images.masked_fill(hole[:, None], 0.0)


class ReleasedAdversary(Adversary):
    """The discriminator with DiffAug and a consistency term."""

    def logits(self, images, augmentation):
        return super().logits(diff_augment(images, augmentation), augmentation.window)

    def forward(self, images, reconstructions, augmentations):
        """L_D = 0.4 (hinge + 0.001 LeCAM) + 4.0 C -> (loss, {name: detached term}).

        C: mean squared difference between these logits and those of the same images under all of colour,
        translation and a large cutout, to which a good discriminator does not react.
        augmentations: draw_augmentations'.
        """
        pair = images, reconstructions
        real, fake, *strong = (self.logits(x, a) for x, a in zip(pair * 2, augmentations))
        self.lecam.update(real.detach(), fake.detach())          # before the penalty is taken
        terms = {"disc": hinge_loss(real, fake), "lecam": self.lecam(real, fake),
                 "consistency": F.mse_loss(torch.cat((real, fake)), torch.cat(strong))}
        loss = (DISC_LOSS_WEIGHT * (terms["disc"] + losses.LECAM_WEIGHT * terms["lecam"])
                + CONSISTENCY_WEIGHT * terms["consistency"])
        terms |= {"disc_real": real.mean(), "disc_fake": fake.mean()}
        return loss, {name: term.detach() for name, term in terms.items()}


# ----------------------------------------------- its training -----------------------------------------------

class AddToTokenizer:
    """See common.attach. Stage 2 is not released: it is the paper's, with a schedule that ends at LR_END."""
    Model = ReleasedMAETok
    PRESETS = {"released": dict(lr=2e-4, warmup=5004, steps=500_400, targets="hog,dinov2-l,siglip-so400m")}
    EMA_WARMUP = False

    @dataclasses.dataclass
    class Config:
        def __post_init__(self):
            super().__post_init__()
            if not self.learnable_latents:
                raise UserError("--add released modulates separate latent tokens: it needs learnable latents")

    def dataset(self, split):
        dataset = super().dataset(split)
        if split == "train":
            dataset.crop = random_crop                           # 80-100 % of the short side
        return dataset

    def build_target(self, name):
        if name in TEACHERS:
            return ReleasedTeacherTarget(name, self.config, self.device)
        return super().build_target(name)

    def build_adversary(self):
        return losses.build_adversary(self.config, self.device, ReleasedAdversary)

    def draw_windows(self, step, micro, positions):
        return draw_augmentations(self.config, step, micro, positions, self.device)

    def optimizer(self, model):
        """The released script falls back to Adam without weight decay, because of a misspelt key."""
        optimizer = super().optimizer(model)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer

    def mask_range(self, stage, step):
        """Stage 1: one ratio per step, from normal(0.6, 0.25) cut to [mask_low, mask_high]."""
        low, high = super().mask_range(stage, step)
        if stage.number == 2 or low == high:
            return low, high
        rng = sample_rng(self.config.seed, "mask-rate", step, 0)
        while not low <= (ratio := rng.normal(0.6, 0.25)) <= high:
            pass
        return ratio, ratio

    def learning_rate(self, stage, step):
        """Stage 1: linear from LR_START to the peak in the warm-up, then a cosine down to LR_END. It is
        counted from step 0, so the peak is never quite reached."""
        c = self.config
        if stage.number == 2:
            step, warmup, peak = step - stage.first, c.stage2_warmup, c.stage2_lr
            if step < warmup:
                return super().learning_rate(stage, stage.first + step)
            progress = (step - warmup) / max(1, c.stage2_steps - warmup)
        else:
            if step < c.warmup:
                return LR_START + (c.lr - LR_START) * step / c.warmup
            progress, peak = step / max(1, c.steps), c.lr
        return LR_END + 0.5 * (peak - LR_END) * (1 + math.cos(math.pi * min(1, progress)))
