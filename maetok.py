"""MAETok, the tokenizer: images (B, 3, H, W) <-> latent tokens (B, L, C).        [Sec. 3, Fig. 3]

    image I -patch_embed-> x --mask--> [x ; z] --encoder--> h --+--> [e ; h] --decoder--> x^ -> I^ [Eq. 4, 5]
                                        z: L learnable tokens   +--> [e ; h] --aux decoder j--> y^_j  [Eq. 7]

A plain autoencoder. Three things make it MAETok: the latents come from *learnable* tokens that read the image
through attention, 40-60 % of the patches are hidden from the encoder while it trains, and shallow auxiliary
decoders must predict features (HOG, DINOv2, SigLIP) of the hidden patches from the latents alone.
`MAETok.forward` and `decode_all` are Fig. 3; what is above them are its parts, in the order of use.

Shape legend, the same in every file:
    B batch · N image patches · L latent tokens · T all tokens of a transformer · D width · C latent channels
    P patch size · H, W image size in pixels · D_j width of target j · nh heads · hs head size
The paper writes H for the latent channels; here that is C. Its x are patch tokens, its images I; ^ marks what
a decoder predicts, and y_j (the paper's y^j) is target j. Images are RGB floats in [-1, 1].

Provenance tags: [Eq. 7], [Sec. 3.2], [Table 7] the paper (arXiv:2502.03444v2) · [released code] what only the
authors' code shows · [ours] both are silent.
"""
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
from checkpoints import Checkpoint, load_checkpoint, load_weights
from common import Count, UserError, check_ranges, standard_normal
from runtime.attention import attention
from runtime.checks import check_images, check_latents
from runtime.processes import faster_products, to_device


@dataclass
class MAETokConfig:
    """What the model is built from. The defaults are the paper's tokenizer at 256 px [Table 7]. Headings and
    comments are the text of --help; Count is an int with a range.

    Raises ValueError for values that cannot make a model, such as a patch that does not divide the image.
    """
    # ---- tokenizer ----
    image_size: Count = 256          # px, of training; also decode()'s default
    patch_size: Count = 16           # P, px
    width: Count = 768               # D of encoder and decoder (ViT-B)
    heads: Count = 12                # nh
    encoder_depth: Count = 12        # blocks
    decoder_depth: Count = 12        # blocks
    num_latents: Count = 128         # L
    latent_dim: Count = 32           # C
    learnable_latents: bool = True   # False: read from the image tokens, L = N [Tables 6, 13a]
    variational: bool = False        # True: KL-VAE, the encoder predicts mean and log-variance [Table 1a]
    aux_depth: Count = 3             # blocks of each auxiliary decoder [Table 1d]

    def __post_init__(self):
        check_ranges(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of "
                             f"patch_size {self.patch_size}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads: 2D RoPE needs a head size that is "
                             "a multiple of 4")

    def latent_shape(self, num_patches=None):
        """(L, C) of an image of num_patches N; by default of image_size."""
        N = num_patches or (self.image_size // self.patch_size) ** 2
        return self.num_latents if self.learnable_latents else N, self.latent_dim


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


def random_mask(rngs: list, num_patches: int, low: float = 0.4, high: float = 0.6) -> Tensor:
    """Choose which patches the encoder does not see: M of [Sec. 3.2].

    rngs: one numpy Generator per image, so that an image's mask does not depend on the batch it sits in.
    low, high: the mask ratio is drawn uniformly from [low, high], per image [ours: the paper says "40%-60%"].
    Returns (B, N) bool on the CPU, True = hidden; each row hides ceil(ratio * N) patches [released code].
    Raises ValueError for ratios outside 0 <= low <= high < 1.
    """
    if not 0 <= low <= high < 1:
        raise ValueError(f"mask ratios must satisfy 0 <= low <= high < 1, not low={low}, high={high}")
    mask = np.zeros((len(rngs), num_patches), bool)
    for row, rng in zip(mask, rngs):
        hidden = math.ceil(rng.uniform(low, high) * num_patches - 1e-9)   # 0.55 * 100 is 55.00000000000001
        row[rng.permutation(num_patches)[:hidden]] = True
    return torch.from_numpy(mask)


# ------------------------------------------- 2D rotary positions -------------------------------------------

class RoPE2D(nn.Module):
    """Rotation angles of the image tokens; latent tokens get angle 0, that is, no rotation.        [Sec. 3.1]

    Pair j of a query or key is its channels j and j + hs/2. In a token at column col and row row of the patch
    grid, pairs i < hs/4 turn by col * f_i and pairs hs/4 + i by row * f_i. The product of the query of one
    image token and the key of another then depends on their relative position alone. Angles depend on the
    patch index, not on the image size: the same weights run on any grid.
    f_i = 100^(-i / (hs/4)), as Heo et al. (2024) [ours; the paper is silent].
    """

    def __init__(self, head_size):
        super().__init__()
        freqs = 100.0 ** (-torch.arange(head_size // 4) / (head_size // 4))
        self.register_buffer("freqs", freqs, persistent=False)                                       # (hs/4,)

    def forward(self, grid, others):
        """grid = (rows, columns) of the image tokens, which come first; others: how many tokens follow.
        Returns cos and sin, (T, hs/2) float32 each."""
        rows, columns = grid
        index = torch.arange(rows * columns, device=self.freqs.device)
        col, row = (index % columns)[:, None], (index // columns)[:, None]                            # (N, 1)
        angle = torch.cat((col * self.freqs, row * self.freqs), dim=-1)                            # (N, hs/2)
        angle = F.pad(angle, (0, 0, 0, others))                                                    # (T, hs/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + hs/2) of x (B, nh, T, hs) by the angles: (a, b) -> (a cos - b sin,
    a sin + b cos). Computed in float32, returned in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


# ----------------------------------------------- transformer -----------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention; queries and keys of image tokens are rotated by their 2D position."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, T, hs)
        q, k = rotate(q, *rope), rotate(k, *rope)
        x = attention(q, k, v)                                       # (B, nh, T, hs)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: LayerNorm (eps 1e-6), attention, MLP with exact GELU, biases everywhere."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` blocks over [image tokens ; latent tokens], then LayerNorm: (B, T, D) -> (B, T, D)."""

    def __init__(self, depth, width, heads):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.rope = RoPE2D(width // heads)

    def forward(self, x, grid):
        """grid: (rows, columns) of the image tokens, which come first."""
        rope = self.rope(grid, others=x.shape[1] - grid[0] * grid[1])
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)


# ------------------------------------------- encoder and decoder -------------------------------------------

class Encoder(nn.Module):
    """h = E([x ; z]): the outputs at the latent-token positions, brought to C channels.            [Eq. 4]"""

    def __init__(self, config):
        super().__init__()
        c, D = config, config.width
        self.patch_size, self.learnable_latents, self.num_latents = (
            c.patch_size, c.learnable_latents, c.num_latents)
        self.patch_embed = nn.Linear(3 * c.patch_size ** 2, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))                                # m of [Sec. 3.2]
        if c.learnable_latents:
            # z of [Eq. 4] and its learned 1D APE [Sec. 3.1]. Only their sum matters; the paper names both.
            self.latent_tokens = nn.Parameter(torch.zeros(1, c.num_latents, D))
            self.latent_positions = nn.Parameter(torch.zeros(1, c.num_latents, D))
        self.transformer = Transformer(c.encoder_depth, D, c.heads)
        self.to_latent = nn.Linear(D, c.latent_dim * (2 if c.variational else 1))

    def image_tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """x of Eq. 4, with the mask token m in place of the hidden patches: (B, N, D).

        Hidden patches are replaced, not dropped as in MAE: the sequence keeps its length, and RoPE still
        tells a mask token its position."""
        x = self.patch_embed(patchify(images, self.patch_size))                             # (B, N, D)
        return x if mask is None else torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

    def forward(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """images (B, 3, H, W), mask (B, N) bool or None -> (B, L, C), or (B, L, 2C) mean and log-variance."""
        B, _, H, W = images.shape
        grid = (H // self.patch_size, W // self.patch_size)
        x = self.image_tokens(images, mask)                                                 # (B, N, D)
        if self.learnable_latents:
            z = (self.latent_tokens + self.latent_positions).expand(B, -1, -1)              # (B, L, D)
            x = torch.cat((x, z), dim=1)                                                    # (B, N+L, D)
        x = self.transformer(x, grid)
        return self.to_latent(x[:, -self.num_latents:] if self.learnable_latents else x)


class Decoder(nn.Module):
    """x^ = D([e ; h]) [Eq. 5] or y^_j of an auxiliary target j [Eq. 7]: the outputs at the image-token
    positions, and a linear layer that makes `out_dim` values per patch of each. The pixel decoder and every
    auxiliary decoder are this class; they differ in depth and out_dim.

    h is projected from C to the width first, and e has that width [released code]. e is one learned token,
    repeated N times and distinguished by RoPE alone [released code]; the paper's e has N tokens, which would
    tie the weights to one image size.
    """

    def __init__(self, config, depth, out_dim):
        super().__init__()
        c = config
        self.learnable_latents = c.learnable_latents
        self.from_latent = nn.Linear(c.latent_dim, c.width)
        self.image_token = nn.Parameter(torch.zeros(1, 1, c.width))                         # e of [Eq. 5]
        if c.learnable_latents:
            self.latent_positions = nn.Parameter(torch.zeros(1, c.num_latents, c.width))    # learned 1D APE
        self.transformer = Transformer(depth, c.width, c.heads)
        self.head = nn.Linear(c.width, out_dim)

    def tokens(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[e ; h], (B, N+L, D); without learnable latents e + h, as latent n belongs to patch n [ours]."""
        e = self.image_token.expand(len(latents), grid[0] * grid[1], -1)                    # (B, N, D)
        h = self.from_latent(latents)                                                       # (B, L, D)
        return torch.cat((e, h + self.latent_positions), dim=1) if self.learnable_latents else e + h

    def image_tokens(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents h (B, L, C) -> the image tokens after the last norm, (B, N, D): x^ of [Eq. 5]."""
        return self.transformer(self.tokens(latents, grid), grid)[:, :grid[0] * grid[1]]

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents (B, L, C), grid (rows, columns) -> (B, N, out_dim)."""
        return self.head(self.image_tokens(latents, grid))


def new_weights(model: nn.Module) -> None:
    """New weights from torch's generator, in place: Xavier for linear layers, as MAE; normal(0, 1) for tokens
    and positions [ours].

    Tokens and positions then are of the order of a projected latent. At the usual 0.02 the decoder cannot
    distinguish its L latents until the positions have grown, which costs small runs much of their time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("_token", "_tokens", "_positions")):
            nn.init.normal_(parameter)


# ------------------------------------------------ the model ------------------------------------------------

class MAETokOutput(NamedTuple):
    """What MAETok.forward returns."""
    reconstruction: torch.Tensor      # (B, 3, H, W), about [-1, 1], not clamped
    latents: torch.Tensor             # (B, L, C): what the decoders saw
    aux: dict[str, torch.Tensor]      # name -> (B, N, D_j) predictions for every patch, hidden or not
    posterior: torch.Tensor | None    # (B, L, 2C) mean and log-variance of a KL-VAE, else None


class MAETok(nn.Module):
    """The tokenizer. See the module docstring for the picture and MAETokConfig for the variants."""

    def __init__(self, config, targets=None):
        """targets: name -> losses.Target, whose auxiliary decoder is build_decoder(config.aux_depth, D_j)
        [Eq. 7], unless it is an extra's; none after training."""
        super().__init__()
        self.config = c = config
        self.encoder = self.build_encoder()
        self.decoder = self.build_decoder(c.decoder_depth, 3 * c.patch_size ** 2)
        self.aux_decoders = nn.ModuleDict({name: target.decoder(self)
                                           for name, target in (targets or {}).items()})
        # Scalar mean and std of the latents of training images, measured after training and kept with the
        # weights [released code]. A diffusion model needs latents of unit variance: without normalisation in
        # training *and* sampling it sees latents of the wrong scale.
        self.register_buffer("latent_mean", torch.zeros(()))
        self.register_buffer("latent_std", torch.ones(()))
        self.initialise()

    # Extras (files that attach by --add, see common.attach) override these three.
    def build_encoder(self):
        """The encoder, E of Eq. 4."""
        return Encoder(self.config)

    def build_decoder(self, depth, out_dim):
        """The pixel decoder of Eq. 5, or an auxiliary one of Eq. 7 (depth: config.aux_depth)."""
        return Decoder(self.config, depth, out_dim)

    def initialise(self):
        """New weights, in place."""
        new_weights(self)

    def grid(self, size):
        """(H, W) in px -> (rows, columns) of patches. Raises ValueError when P does not divide a side."""
        P = self.config.patch_size
        if size[0] % P or size[1] % P:
            raise ValueError(f"{size[0]} x {size[1]} px cannot be cut into {P}-px patches: "
                             "both must be multiples")
        return size[0] // P, size[1] // P

    def latents(self, images: Tensor, mask: Tensor | None = None,
                noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h = E([x ; z]), (B, L, C) [Eq. 4], and None. Of a KL-VAE [Table 1a]: mean + deviation * noise, with
        noise (B, L, C) standard normal (None: the mean), and mean and log-variance, (B, L, 2C)."""
        h = self.encoder(images, mask)
        if not self.config.variational:
            return h, None
        mean, logvar = h.chunk(2, dim=-1)
        logvar = logvar.clamp(-30, 20)                                                # against overflow
        h = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return h, torch.cat((mean, logvar), dim=-1)

    def encode(self, images: Tensor, mask: Tensor | None = None, normalize: bool = False,
               rngs: list | None = None) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1], sides multiples of P, to latents (B, L, C).           [Eq. 4]

        mask: (B, N) bool, True = hidden, or None. normalize: return (h - latent_mean) / latent_std, which a
        diffusion model is trained on. rngs: one numpy Generator per image; a KL-VAE then returns a sample of
        the posterior, otherwise its mean. Raises ValueError for other images.
        """
        check_images(self, images)
        noise = None
        if rngs is not None:
            shape = self.config.latent_shape(math.prod(self.grid(images.shape[-2:])))
            noise = to_device(standard_normal(rngs, shape), images.device)
        h, _ = self.latents(images, mask, noise)
        h = (h - self.latent_mean) / self.latent_std if normalize else h
        h.image_size = tuple(images.shape[-2:])                      # decode() refuses another size
        return h

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None,
               normalized: bool = False) -> Tensor:
        """Latents (B, L, C) to images (B, 3, H, W).                                                   [Eq. 5]

        size: (H, W) in px of the images; default: the square of config.image_size. normalized: as
        encode(normalize=True) returned them. Raises ValueError for latents of another shape or size.
        """
        grid = check_latents(self, latents, size)                                       # (rows, columns)
        if normalized:
            latents = latents * self.latent_std + self.latent_mean
        return unpatchify(self.decoder(latents, grid), self.config.patch_size, grid)

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images)): (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(images), images.shape[-2:])

    def forward(self, images: Tensor, mask: Tensor | None = None, noise: Tensor | None = None,
                **more) -> MAETokOutput:
        """Fig. 3 in one pass: encode what the mask leaves, decode pixels and auxiliary features.

        images (B, 3, H, W), mask (B, N) bool or None, noise of `latents`; more: what the decode_all of an
        extra (--add) takes beyond the one below. The module draws no random numbers itself, so a step can be
        repeated exactly.
        """
        h, posterior = self.latents(images, mask, noise)                          # h = E([x ; z])    [Eq. 4]
        return self.decode_all(h, self.grid(images.shape[-2:]), posterior, **more)

    def decode_all(self, h: Tensor, grid: tuple[int, int], posterior: Tensor | None = None) -> MAETokOutput:
        """Latents h (B, L, C) to pixels and auxiliary features: the right half of Fig. 3."""
        patches = self.decoder(h, grid)                                            # D([e ; h])        [Eq. 5]
        aux = {name: decode(h, grid) for name, decode in self.aux_decoders.items()}    # y^_j          [Eq. 7]
        return MAETokOutput(unpatchify(patches, self.config.patch_size, grid), h, aux, posterior)

    def freeze_encoder(self) -> "MAETok":
        """Prepare the second stage [Sec. 3.3]: the encoder is frozen, the auxiliary decoders are dropped."""
        self.encoder.requires_grad_(False)
        self.aux_decoders = nn.ModuleDict()
        return self


# ------------------------------------ losses that are part of the method ------------------------------------

def masked_feature_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The loss of one auxiliary target, on hidden patches only: a float32 scalar.                     [Eq. 8]

    prediction: y^_j, target: y_j, (B, N, D_j); mask: M, (B, N) bool, True = hidden. Means over D_j, over
    the hidden patches of each image, then over images, so that the value does not depend on how a batch is
    split over processes [Eq. 8 writes a plain sum]. An image with nothing hidden contributes 0.
    """
    per_patch = (prediction.float() - target.float()).square().mean(-1)                     # (B, N)
    mask = mask.float()
    return ((per_patch * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def kl_divergence(posterior: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of a KL-VAE's posterior (B, L, 2C): summed over L and C, mean over B.
    Float32 scalar.

    For Table 1a's VAE. Its weight of 1e-6 [released code] multiplies this sum, beside a mean over pixels.
    """
    mean, logvar = posterior.float().chunk(2, dim=-1)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()


# ------------------------------------------- a trained tokenizer -------------------------------------------

class Tokenizer:
    """The model and its config, which extras extend (common.attach); train_tokenizer.Method derives from
    it."""
    ROLE, Config, Model, PRESETS = "Tokenizer", MAETokConfig, MAETok, {}


def load_tokenizer(path, device="cpu") -> MAETok:
    """The trained tokenizer in a checkpoint or run folder of train_tokenizer.py, or the one inside a
    checkpoint of train_diffusion.py: MAETok with the EMA weights, in eval mode.

    Its encode(normalize=True) and decode(normalized=True) use the stored latent mean and std. In a checkpoint
    from the middle of a stage they are not measured, as a warning says. Raises UserError.
    """
    return tokenizer_of(load_checkpoint(path, mapped=True), path).to(device)


def tokenizer_of(state: dict, path) -> MAETok:
    """load_tokenizer of a checkpoint already read; `path` is for messages."""
    state = Checkpoint(state["tokenizer"] if state.get("kind") == "diffusion" else state, path)
    if state.get("kind") != "tokenizer":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a tokenizer")
    try:
        model = common.build_model(Tokenizer, state["config"], state["add"])
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from e
    weights = {name: w for name, w in state["ema"].items() if not name.startswith("aux_decoders.")}
    load_weights(model, weights, path)
    if not state["measured"]:
        print(f"warning: {path} is from the middle of a stage: its latent mean and std are not measured",
              file=sys.stderr)
    return faster_products(model).eval().requires_grad_(False)
