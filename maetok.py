"""MAETok, the tokenizer: images (B, 3, H, W) <-> latent tokens (B, L, C).        [Sec. 3, Fig. 3]

    image --patch_embed--> x --mask--> [x ; z] --encoder--> h --+--> [e ; h] ---decoder---> pixels [Eq. 4, 5]
                                        z: L learnable tokens   +--> [e_j ; h] --aux decoder j--> y_j  [Eq. 7]

A plain autoencoder. Three things make it MAETok: the latents come from *learnable* tokens that read the image
through attention, 40-60 % of the patches are hidden from the encoder while it trains, and shallow auxiliary
decoders must predict features (HOG, DINOv2, SigLIP) of the hidden patches from the latents alone.
(One target is of the whole image: "text", the words of its caption, predicted from the mean image token.)
`MAETok.forward` at the end of this file is Fig. 3; everything above it is its parts, in the order of use.

Shape legend, the same in every file:
    B batch · N image patches · L latent tokens · T all tokens of a transformer · D width · C latent channels
    P patch size · H, W image size in pixels · D_j width of target j · nh heads · hs head size
The paper writes H for the latent channels; here that is C. Images are RGB floats in [-1, 1].

Provenance tags: [Eq. 7], [Sec. 3.2], [Table 7] the paper (arXiv:2502.03444v2) · [released code] what only the
authors' code shows · [ours] both are silent.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from after.alignment import TEACHERS, check_alignment
from after.nested_dropout import keep_first
from checkpoints import load_checkpoint, load_weights
from common import Count, Linear, Positive, UserError, Weight, Whole, check_ranges


@dataclass
class MAETokConfig:
    """Everything that fixes the weights' shapes. The defaults are the paper's tokenizer at 256 px [Table 7].

    Raises ValueError for values that cannot make a model (sides the patch does not
    divide, odd head sizes, ...).
    """
    # ---- tokenizer (MAETokConfig in maetok.py) ----
    image_size: Count = 256          # px; what decode() draws by default, and the grid of a position table
    patch_size: Count = 16           # P, px
    width: Count = 768               # D of encoder and decoder (ViT-B)
    heads: Count = 12                # nh
    encoder_depth: Count = 12        # blocks
    decoder_depth: Count = 12        # blocks
    mlp_ratio: Positive = 4.0        # hidden width of the MLP / D
    num_latents: Count = 128         # L
    latent_dim: Count = 32           # C
    learnable_latents: bool = True   # False: read from the image tokens, L = N [Tables 6, 13a]
    variational: bool = False        # True: KL-VAE, the encoder predicts mean and log-variance [Table 1a]
    rope: str = "axial"              # 2D RoPE on image tokens: axial | mixed (learnable frequencies) | none
    ape: str = "none"                # learned positions on image tokens: none, encoder or both [Table 13b]
    aux_targets: dict[str, int] = field(default_factory=dict)   # name -> D_j, e.g. {"hog": 108} [Eq. 7]
    aux_depth: Whole = 3             # blocks of each auxiliary decoder; 0 is the "linear" row [Table 1d]
    aux_width: Whole = 0             # 0: D, as the main decoder [Sec. 3.2]; released code: 192
    aux_heads: Whole = 0             # 0: nh; released code: 3
    class_token: bool = False        # encoder and aux decoders carry a class token [released code]
    layer_scale: Weight = 0.0        # > 0: LayerScale in the encoder with this init; released code: 1e-5
    latent_modulation: bool = False  # decoders modulate their latent tokens by the raw latent [released code]
    initialisation: str = "xavier"   # of new weights: xavier [as MAE] or released, see initialise()
    # ---- after the paper, all off: docs/after.md ----
    align: str = ""                  # teacher whose patch features the latents are aligned with [VA-VAE]

    def __post_init__(self):
        check_ranges(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of "
                             f"patch_size {self.patch_size}")
        for width, heads in ((self.width, self.heads),
                             (self.aux_width or self.width, self.aux_heads or self.heads)):
            if width % heads or (width // heads) % 4:
                raise ValueError(f"width {width} over {heads} heads: 2D RoPE needs a head size that is a "
                                 "multiple of 4")
        if self.rope not in ("axial", "mixed", "none"):
            raise ValueError(f"rope is {self.rope!r}: choose axial, mixed or none")
        if self.initialisation not in ("xavier", "released"):
            raise ValueError(f"initialisation is {self.initialisation!r}: choose xavier or released")
        check_alignment(self)
        if self.ape not in ("none", "encoder", "both"):
            raise ValueError(f"ape is {self.ape!r}: choose none, encoder or both")
        if self.latent_modulation and not self.learnable_latents:
            raise ValueError("latent_modulation acts on separate latent tokens: it needs learnable_latents")


# -------------------------------------------- patches and masks --------------------------------------------

def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flat patches, row by row: (B, c, H, W) -> (B, N, P*P*c), values in
    (row, column, channel) order.

    Raises ValueError when the patch does not divide both sides.
    """
    B, c, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"an image of {H} x {W} px cannot be cut into {P}-px patches: "
                         "both sides must be multiples")
    x = images.reshape(B, c, H // P, P, W // P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify: (B, N, P*P*c) and grid = (H/P, W/P) -> (B, c, H, W)."""
    B, _, length = patches.shape
    P, (h, w) = patch_size, grid
    x = patches.reshape(B, h, w, P, P, length // (P * P))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * P, w * P)


def mask_out(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Images (B, c, H, W) as the encoder sees them: the patches of mask (B, N) bool are 0, grey."""
    P, (H, W) = patch_size, images.shape[-2:]
    return unpatchify(patchify(images, P).masked_fill(mask[..., None], 0), P, (H // P, W // P))


def random_mask(rngs: list, num_patches: int, low: float = 0.4, high: float = 0.6) -> Tensor:
    """Choose which patches the encoder does not see: M of [Sec. 3.2].

    rngs: one numpy Generator per image, so that an image's mask does not depend on the batch it sits in.
    low, high: the mask ratio is drawn uniformly from [low, high], per image [ours: the
    paper only says "40%-60%"; the released code draws one ratio per batch from a normal(0.6, 0.25) cut to
    that range, which the trainer reproduces by passing low = high = that ratio].
    Returns (B, N) bool on the CPU, True = hidden; each row hides ceil(ratio * N) patches [released code].
    """
    if not 0 <= low <= high < 1:
        raise ValueError(f"mask ratios must satisfy 0 <= low <= high < 1, not low={low}, high={high}")
    mask = np.zeros((len(rngs), num_patches), bool)
    for row, rng in zip(mask, rngs):
        hidden = math.ceil(rng.uniform(low, high) * num_patches - 1e-9)   # 1e-9: 0.55 * 100 > 55 in floats
        row[rng.permutation(num_patches)[:hidden]] = True
    return torch.from_numpy(mask)


# ------------------------------------------- 2D rotary positions -------------------------------------------

class RoPE2D(nn.Module):
    """Rotation angles of the image tokens; latent and class tokens get angle 0, that is, no rotation.
    [Sec. 3.1]

    A token at column x, row y (here x is no image) turns its i-th pair of query and key channels by
    x * f[0, i] + y * f[1, i].
    axial: the first half of the pairs looks at x alone, the second half at y alone; the same in every layer
    and head.
    mixed: f is learnable, one set a layer and head, started in a random direction for every head (RoPE-Mixed,
    Heo et al. 2024); what the released weights use. Angles grow with the patch index and know nothing of the
    image size, which is why the same weights run on any grid [Table 13b].
    Base frequencies theta: 100 for axial, 10 for mixed, as in Heo et al. [the paper is silent;
    released code: 10].
    """

    def __init__(self, kind, depth, heads, head_size):
        super().__init__()
        quarter = torch.arange(head_size // 4)
        if kind == "axial":
            magnitude = 100.0 ** (-quarter / (head_size // 4))
            zero = torch.zeros_like(magnitude)
            f = torch.stack((torch.cat((magnitude, zero)), torch.cat((zero, magnitude))))   # (2, hs/2)
            self.register_buffer("freqs", f[None, :, None], persistent=False)               # (1, 2, 1, hs/2)
        else:
            magnitude = 10.0 ** (-quarter / (head_size // 4))
            direction = torch.rand(depth, heads, 1) * 2 * math.pi
            across = direction + math.pi / 2             # the second half of the pairs looks at a right angle
            fx = torch.cat((magnitude * direction.cos(), magnitude * across.cos()), -1)    # (depth, nh, hs/2)
            fy = torch.cat((magnitude * direction.sin(), magnitude * across.sin()), -1)
            self.freqs = nn.Parameter(torch.stack((fx, fy), 1))                         # (depth, 2, nh, hs/2)

    def forward(self, grid, before, after):
        """grid = (rows, columns) of image tokens; before, after: how many other tokens stand on either side.

        Returns cos and sin, each (depth or 1, nh or 1, T, hs/2) float32.
        """
        rows, columns = grid
        index = torch.arange(rows * columns, device=self.freqs.device)
        x, y = (index % columns)[:, None], (index // columns)[:, None]                  # (N, 1)
        f = self.freqs.float()
        angle = x * f[:, 0, :, None] + y * f[:, 1, :, None]                             # (depth, nh, N, hs/2)
        angle = F.pad(angle, (0, 0, before, after))                                     # (depth, nh, T, hs/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + hs/2) of x (B, nh, T, hs) by the angles; in float32, returned in x's dtype.

    The released code pairs neighbouring channels (2i, 2i+1); the two differ by a fixed shuffle of q's and k's
    rows. Halves are used here because they are contiguous in memory.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


# ----------------------------------------------- transformer -----------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention; queries and keys of image tokens are rotated by their 2D position."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x, rope):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, T, hs)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, nh, T, hs)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch [released code: encoder only, init 1e-5]."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: LayerNorm (eps 1e-6), attention, MLP with exact GELU, biases everywhere.

    modulation_dim > 0 gives the released decoder's block: its norms have no weights of their own; the raw
    latents (B, L, C) make shift and scale for the latent tokens instead, x * scale + shift (not 1 + scale),
    and leave the image tokens alone. The latent tokens are the last L of the sequence.
    """

    def __init__(self, width, heads, mlp_ratio, layer_scale=0.0, modulation_dim=0):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not modulation_dim)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not modulation_dim)
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))
        self.layer_scale1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.layer_scale2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.modulation = (nn.Sequential(nn.SiLU(), nn.Linear(modulation_dim, 4 * width))
                           if modulation_dim else None)

    def forward(self, x, rope, latents):
        if self.modulation is None:
            x = x + self.layer_scale1(self.attn(self.norm1(x), rope))
            return x + self.layer_scale2(self.mlp(self.norm2(x)))
        shift1, scale1, shift2, scale2 = self.modulation(latents).chunk(4, dim=-1)          # each (B, L, D)
        x = x + self.attn(modulate_latent_tokens(self.norm1(x), shift1, scale1), rope)
        return x + self.mlp(modulate_latent_tokens(self.norm2(x), shift2, scale2))


def modulate_latent_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D) with its last L tokens replaced by  token * scale + shift; shift, scale: (B, L, D)."""
    L = shift.shape[1]
    return torch.cat((x[:, :-L], x[:, -L:] * scale + shift), dim=1)


class Transformer(nn.Module):
    """`depth` blocks over [other tokens ; image tokens ; latent tokens] and a last LayerNorm:
    (B, T, D) -> (B, T, D)."""

    def __init__(self, depth, width, heads, mlp_ratio, rope, layer_scale=0.0, modulation_dim=0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, modulation_dim)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not modulation_dim)
        self.rope = None if rope == "none" else RoPE2D(rope, depth, heads, width // heads)

    def forward(self, x, grid, before, latents=None):
        """grid: (rows, columns) of the image tokens, which start at position `before`."""
        ropes = [None] * len(self.blocks)
        if self.rope is not None:
            cos, sin = self.rope(grid, before, after=x.shape[1] - before - grid[0] * grid[1])
            ropes = [(cos[i % len(cos)], sin[i % len(sin)])            # one for all, or each
                     for i in range(len(self.blocks))]
        for block, rope in zip(self.blocks, ropes):
            x = block(x, rope, latents)
        return self.norm(x)


class PositionTable(nn.Module):
    """Learned absolute positions of image tokens, resampled bicubically to other grids [Table 13b "APE"]."""

    def __init__(self, grid, width):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, grid, grid, width))

    def forward(self, grid):
        table = self.table.permute(0, 3, 1, 2)                                         # (1, D, rows, columns)
        if table.shape[-2:] != tuple(grid):
            table = F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True)
        return table.flatten(2).transpose(1, 2)                                        # (1, N, D)


# ------------------------------------------- encoder and decoder -------------------------------------------

class Encoder(nn.Module):
    """h = E([x ; z]), the latents being read from the learnable tokens' places alone.              [Eq. 4]"""

    def __init__(self, config):
        super().__init__()
        c, D = config, config.width
        self.patch_size = c.patch_size
        self.patch_embed = Linear(3 * c.patch_size ** 2, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))                                # m of [Sec. 3.2]
        self.class_token = nn.Parameter(torch.zeros(1, 1, D)) if c.class_token else None
        self.positions = PositionTable(c.image_size // c.patch_size, D) if c.ape != "none" else None
        self.num_latents = c.num_latents if c.learnable_latents else 0
        if c.learnable_latents:
            self.latent_tokens = nn.Parameter(torch.zeros(1, c.num_latents, D))             # z of [Eq. 4]
            self.latent_positions = nn.Parameter(torch.zeros(1, c.num_latents, D))          # 1D APE
        self.transformer = Transformer(c.encoder_depth, D, c.heads, c.mlp_ratio, c.rope, c.layer_scale)
        self.to_latent = nn.Linear(D, c.latent_dim * (2 if c.variational else 1))

    def forward(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """images (B, 3, H, W), mask (B, N) bool or None -> (B, L, C), or (B, L, 2C) mean and log-variance."""
        B, _, H, W = images.shape
        grid = (H // self.patch_size, W // self.patch_size)
        x = self.patch_embed(patchify(images, self.patch_size))                             # (B, N, D)
        if mask is not None:
            # Replaced, not dropped as in MAE: the sequence keeps its length and the encoder knows
            # what it misses. After patch embedding and before positions, so that a mask token
            # still knows where it is.
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        if self.positions is not None:
            x = x + self.positions(grid)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(B, -1, -1), x), dim=1)                   # (B, 1+N, D)
        if self.num_latents:
            z = (self.latent_tokens + self.latent_positions).expand(B, -1, -1)
            x = torch.cat((x, z), dim=1)                                                    # (B, (1+)N+L, D)
        before = 0 if self.class_token is None else 1
        x = self.transformer(x, grid, before)
        h = x[:, -self.num_latents:] if self.num_latents else x[:, before:]                 # (B, L, D)
        return self.to_latent(h)                     # h of [Eq. 4], (B, L, C): a linear layer takes D to C


class Decoder(nn.Module):
    """x_hat = D([e ; h]) [Eq. 5], y_hat^j for an auxiliary target j [Eq. 7]: read from the image tokens'
    places, then a linear layer to `out_dim` values per patch.

    e has the decoder's width D; h is projected from C to D first.
    The pixel decoder and every auxiliary decoder are this class; they differ in depth and out_dim.
    e is one learned token repeated N times, distinguished by RoPE alone [released code]. N learned tokens, as
    Eq. 5 could be read, would tie the weights to one image size.
    """

    def __init__(self, config, depth, width, heads, out_dim, class_token=False, pool=False):
        super().__init__()
        c = config
        self.pool = pool
        self.learnable_latents = c.learnable_latents
        self.from_latent = nn.Linear(c.latent_dim, width)
        self.image_token = nn.Parameter(torch.zeros(1, 1, width))                           # e of [Eq. 5]
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.positions = PositionTable(c.image_size // c.patch_size, width) if c.ape == "both" else None
        if c.learnable_latents:
            self.latent_positions = nn.Parameter(torch.zeros(1, c.num_latents, width))      # 1D APE
        self.transformer = Transformer(depth, width, heads, c.mlp_ratio, c.rope,
                                       modulation_dim=c.latent_dim if c.latent_modulation else 0)
        self.head = Linear(width, out_dim)

    def image_tokens(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents h (B, L, C) -> the image tokens after the last norm, (B, N, D): x_hat of [Eq. 5]."""
        B, N = len(latents), grid[0] * grid[1]
        tokens = self.from_latent(latents)                                                  # (B, L, D)
        e = self.image_token.expand(B, N, -1)
        if self.positions is not None:
            e = e + self.positions(grid)
        if self.learnable_latents:
            x = torch.cat((e, tokens + self.latent_positions), dim=1)                       # (B, N+L, D)
        else:
            # latent n belongs to patch n: it sits on the image token itself [ours; Table 13a is silent]
            x = e + tokens
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(B, -1, -1), x), dim=1)
        before = 0 if self.class_token is None else 1
        x = self.transformer(x, grid, before, latents)
        return x[:, before:before + N]

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents (B, L, C), grid (rows, columns) -> (B, N, out_dim), or with `pool` (B, out_dim): of the
        mean image token, as SuperClass pools [the paper is silent]."""
        x = self.image_tokens(latents, grid)
        # Before the head: logits of 49,408 sub-words for every patch would take gigabytes.
        return self.head(x.mean(1) if self.pool else x)


def initialise(model: nn.Module, kind: str = "xavier") -> None:
    """New weights, in place. kind "xavier": Xavier for linear layers, as MAE (He et al. 2022); normal(0, 1)
    for tokens and positions [ours]. "released": truncated normal 0.02 for linear layers, normal 0.02 for
    tokens and positions, 1e-6 for class tokens; the decoder's modulation starts at 0 [released code].

    normal(0, 1) makes tokens and positions as large as a projected latent. At the usual 0.02 the decoder gets
    L latents that it cannot distinguish until the positions have grown, and small runs lose much of their
    time to that. The paper is silent on both.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            (nn.init.xavier_uniform_(module.weight) if kind == "xavier"
             else nn.init.trunc_normal_(module.weight, std=0.02))
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("_token", "_tokens", "_positions", ".table")):
            class_token = name.endswith("class_token")
            nn.init.normal_(parameter, std=1.0 if kind == "xavier" else 1e-6 if class_token else 0.02)
        elif kind == "released" and ".modulation." in name:
            nn.init.zeros_(parameter)


# ------------------------------------------------ the model ------------------------------------------------

class MAETokOutput(NamedTuple):
    """What MAETok.forward returns."""
    reconstruction: torch.Tensor      # (B, 3, H, W), about [-1, 1], not clamped
    latents: torch.Tensor             # (B, L, C): what the decoders saw
    aux: dict[str, torch.Tensor]      # name -> (B, N, D_j) predictions for every patch, hidden or not;
                                      # "text" -> (B, D_j) logits
    posterior: torch.Tensor | None    # (B, L, 2C) mean and log-variance of a KL-VAE, else None
    aligned: torch.Tensor | None = None   # (B, N, D) W z [after the paper: VA-VAE, 2501.01423], else None


class MAETok(nn.Module):
    """The tokenizer. See the module docstring for the picture and MAETokConfig for the variants."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, c.decoder_depth, c.width, c.heads, out_dim=3 * c.patch_size ** 2)
        self.align = nn.Linear(c.latent_dim, TEACHERS[c.align].dim) if c.align else None
        self.aux_decoders = nn.ModuleDict()
        for name, dim in c.aux_targets.items():
            if c.aux_depth == 0:
                # The "linear" row of Table 1d. One linear layer cannot take L latents to N patches
                # by itself; we put it on the pixel decoder's image tokens [ours: the paper does not
                # say what it is linear in].
                self.aux_decoders[name] = nn.Linear(c.width, dim)
            else:
                self.aux_decoders[name] = Decoder(c, c.aux_depth, c.aux_width or c.width,
                                                  c.aux_heads or c.heads, out_dim=dim,
                                                  class_token=c.class_token, pool=name == "text")
        # One scalar mean and std over all latents of the training set, measured after training and kept with
        # the weights: a diffusion model wants unit variance, and forgetting this at one end costs everything.
        self.register_buffer("latent_mean", torch.zeros(()))
        self.register_buffer("latent_std", torch.ones(()))
        initialise(self, c.initialisation)

    def grid(self, size):
        """(H, W) in px -> (rows, columns) of patches.
        Raises ValueError when the patch does not divide a side."""
        P = self.config.patch_size
        if size[0] % P or size[1] % P:
            raise ValueError(f"{size[0]} x {size[1]} px cannot be cut into {P}-px patches: "
                             "both must be multiples")
        return size[0] // P, size[1] // P

    def posterior(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """A KL-VAE's (B, L, 2C): mean and log-variance, the latter kept in [-30, 20] against overflow."""
        mean, logvar = self.encoder(images, mask).chunk(2, dim=-1)
        return torch.cat((mean, logvar.clamp(-30, 20)), dim=-1)

    def encode(self, images: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Images to latents.                                                                          [Eq. 4]

        images: (B, 3, H, W) float in [-1, 1], sides multiples of P. mask: (B, N)
        bool, True = hidden, or None.
        normalize: return (h - latent_mean) / latent_std, what a diffusion model is trained on.
        Returns (B, L, C); of a KL-VAE the mean.
        """
        h = (self.posterior(images, mask).chunk(2, dim=-1)[0] if self.config.variational
             else self.encoder(images, mask))
        return (h - self.latent_mean) / self.latent_std if normalize else h

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None,
               normalized: bool = False) -> Tensor:
        """Latents (B, L, C) to images (B, 3, H, W).                                                   [Eq. 5]

        size: (H, W) in px, default the square config.image_size.
        normalized: the latents are encode(normalize=True)'s.
        """
        if normalized:
            latents = latents * self.latent_std + self.latent_mean
        grid = self.grid(size or (self.config.image_size, self.config.image_size))
        return unpatchify(self.decoder(latents, grid), self.config.patch_size, grid)

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images)): (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(images), images.shape[-2:])

    def forward(self, images: Tensor, mask: Tensor | None = None, noise: Tensor | None = None,
                added: Tensor | None = None, lengths: Tensor | None = None) -> MAETokOutput:
        """Fig. 3 in one pass: encode what the mask leaves, decode pixels and auxiliary features.

        images (B, 3, H, W), mask (B, N) bool or None; noise (B, L, C) standard normal for a KL-VAE's sample
        (None: its mean). The module draws no random numbers itself, so a step can be repeated exactly.
        added: (B, L, C), in standard deviations of the latents, on what the decoders see
        (after/latent_noise.py).
        lengths: (B,) int, of how many tokens the decoders see (after/nested_dropout.py).
        Returns MAETokOutput.
        """
        grid = self.grid(images.shape[-2:])
        posterior = None
        if self.config.variational:
            posterior = self.posterior(images, mask)
            mean, logvar = posterior.chunk(2, dim=-1)
            h = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        else:
            h = self.encoder(images, mask)                                       # h = E([x ; z])    [Eq. 4]
        if added is not None:
            h = h + self.latent_std * added                    # [after the paper: DeTok, 2507.15856]
        if lengths is not None:
            h = keep_first(h, lengths)                         # [after the paper: FlexTok, 2502.13967]
        image_tokens = self.decoder.image_tokens(h, grid)                        # x^ = D([e ; h])   [Eq. 5]
        reconstruction = unpatchify(self.decoder.head(image_tokens), self.config.patch_size, grid)
        aux = {}
        for name, decoder in self.aux_decoders.items():                          # y^j = Dj([ej ; h]) [Eq. 7]
            if self.config.aux_depth == 0:
                aux[name] = decoder(image_tokens.mean(1) if name == "text" else image_tokens)
            else:
                aux[name] = decoder(h, grid)
        return MAETokOutput(reconstruction, h, aux, posterior, self.align(h) if self.align else None)

    def freeze_encoder(self) -> "MAETok":
        """Prepare the second stage [Sec. 3.3]: the encoder stops learning, the auxiliary decoders go."""
        self.encoder.requires_grad_(False)
        self.aux_decoders, self.align = nn.ModuleDict(), None
        return self


# ------------------------------------ losses that are part of the method ------------------------------------

def masked_feature_loss(prediction: Tensor, target: Tensor, mask: Tensor, kind: str = "mse") -> Tensor:
    """The loss of one auxiliary target, on hidden patches only.                                       [Eq. 8]

    prediction: y_hat^j, target: y^j, (B, N, D_j); mask: M, (B, N) bool, True = hidden. kind: "mse", the
    paper's, or "cosine", the negative cosine that the released code uses for DINOv2 and CLIP. Means over D_j,
    over the hidden patches of each image, then over images, so that the value does not depend on how a batch
    is split over processes [Eq. 8 writes a plain sum; its sum over j is in tokenizer_objective]. An image
    with nothing hidden contributes 0.
    Returns a float32 scalar.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "mse":
        per_patch = (prediction - target).square().mean(-1)                                 # (B, N)
    elif kind == "cosine":
        per_patch = -F.cosine_similarity(prediction, target, dim=-1)                        # (B, N)
    else:
        raise ValueError(f"auxiliary loss {kind!r}: choose mse or cosine")
    mask = mask.float()
    return ((per_patch * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def kl_divergence(posterior: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of a KL-VAE's posterior (B, L, 2C): summed over L and C, mean over B.
    Float32 scalar.

    [Table 1a's VAE.] The sum is latent diffusion's. But latent diffusion sums the reconstruction over pixels
    too, where this objective takes their mean: beside a mean over 256 x 256 x 3 values the same weight of
    1e-6 weighs about 2e5 times as much. The paper gives no weight.
    """
    mean, logvar = posterior.float().chunk(2, dim=-1)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()


# ------------------------------------------- a trained tokenizer -------------------------------------------

def load_tokenizer(path, device="cpu") -> MAETok:
    """The trained tokenizer in a checkpoint or run folder of train_tokenizer.py, or the one inside a
    checkpoint of train_diffusion.py: MAETok with the EMA weights, in eval mode.

    Its encode(normalize=True) and decode(normalized=True) use the stored latent mean and std; a checkpoint
    from the middle of a stage has none yet, which a warning says. Raises UserError.
    """
    return tokenizer_of(load_checkpoint(path), path).to(device)


def tokenizer_of(state: dict, path) -> MAETok:
    """The same from a checkpoint already read; `path` is for messages."""
    if state.get("kind") == "diffusion":
        state = state["tokenizer"]
    if state.get("kind") != "tokenizer":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a tokenizer")
    names = {field.name for field in dataclasses.fields(MAETokConfig)}
    try:
        model = MAETok(MAETokConfig(**{k: v for k, v in state["config"].items() if k in names}))
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a config this version cannot build: {e}") from e
    if state["stage"] == 2:
        model.freeze_encoder()                                                  # drops the auxiliary decoders
    load_weights(model, state["ema"], path)
    if not state["measured"]:
        print(f"warning: {path} is from the middle of training, "
              "its latent mean and std are not measured yet: normalised latents are the raw ones",
              file=sys.stderr)
    return model.eval().requires_grad_(False)
