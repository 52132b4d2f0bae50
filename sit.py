"""SiT, the diffusion model: noise and a class -> latent tokens (B, L, C).                 [Sec. 4.1, Table 8]

    x_t, t, class --SiT--> the velocity of x_t

The architecture is SiT's (Ma et al. 2024, arXiv:2401.08740): a DiT, here with patch size 1 on a 1D
sequence of tokens. What it learns and how it is sampled, the same for all three diffusion models, stands
in flow.py.

Time runs from data to noise everywhere: DATA AT t = 0, NOISE AT t = 1.

Shape legend, the same in every file:
    B batch · L latent tokens · C latent channels · D width · nh heads · hs head size
A label y is an int64 in [0, num_classes]; num_classes itself is the null class, which
stands for "no class given".

Provenance tags: [Sec. 4.1], [Table 8] the paper (arXiv:2502.03444v2) · [SiT] its diffusion model's paper ·
[released code] what only the authors' code shows · [ours] all are silent.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
from after.x_prediction import velocity_of_data
from checkpoints import load_checkpoint, load_weights
from common import Count, Linear, Positive, Share, UserError, Weight, Whole, check_ranges
from maetok import tokenizer_of


@dataclass
class SiTConfig:
    """Everything that fixes the weights' shapes. The defaults are SiT-XL/1 on MAETok's latents [Table 8].

    Raises ValueError for values that cannot make a model.
    """
    # ---- diffusion model (SiTConfig in sit.py) ----
    num_latents: Count = 128     # L, the tokenizer's
    latent_dim: Count = 32       # C, the tokenizer's
    width: Count = 1152          # D [Table 8]
    heads: Count = 16            # nh [Table 8]
    depth: Count = 28            # blocks [Table 8]
    mlp_ratio: Positive = 4.0    # hidden width of the MLP / D
    num_classes: Whole = 1000    # the null class comes on top; 0: unconditional, it is the only one [Table 5]
    # Guidance-free training: the model is told 1 / guidance scale and learns the guided velocity itself.
    guidance_free: bool = False  # guidance-free training [rebuttal; Chen et al. 2025]; not with usit
    # ---- after the paper, all off: docs/after.md ----
    time_shift: Weight = 1.0     # of times in training and sampling; above 1 to the noise; 0: by L x C [RAE]
    x_prediction: bool = False   # the output is read as the data, the velocity made of it [JiT]; linear path
    mean_flow: Share = 0.0    # part of the samples that learn an average velocity [MeanFlow: 0.25]; sit alone

    def __post_init__(self):
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided over {self.heads} heads")
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd: positions are pairs of a sine and a cosine")


# The sizes of DiT and SiT, to be spread into a config: SiTConfig(**SIZES["L"]).                         [SiT]
SIZES = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),       # 458 M, the ablations [Sec. 4.1]
    "XL": dict(width=1152, depth=28, heads=16),      # 675 M, the main results [Table 8]
}


# ----------------------------------------------- conditioning -----------------------------------------------

def position_table(length: int, width: int) -> Tensor:
    """Fixed 1D positions [Table 8 "1D sinusoidal"]: (1, L, D) float32.

    Channels 2i and 2i+1 are sine and cosine of position * 10000^(-2i/D): neighbours, not halves
    [released code].
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)                # (D/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency                          # (L, D/2)
    return torch.stack((angle.sin(), angle.cos()), -1).reshape(1, length, width).float()


def time_features(t: Tensor, size: int = 256) -> Tensor:
    """t (B,) -> (B, size) float32: the cosines of t * 10000^(-i/(size/2)), then the sines.

    t goes in as it is, in [0, 1]. The frequencies were made for step numbers up to 1000, so only the first
    few features move much; the weights learned with it leave no choice [released code]. Angles are float32
    under any autocast: just below t = 1 bfloat16's spacing is 1/256, about the length of one of 250 sampling
    steps, so neighbouring steps would be rounded to the same time, or to two that are twice as far apart.
    """
    frequency = torch.exp(-math.log(10000) / (size // 2) * torch.arange(size // 2, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1] -> (B, D): 256 features and an MLP of two layers."""

    def __init__(self, width, features=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(time_features(t, self.mlp[0].in_features).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class (B,) -> (B, D). The last row is the null class; drop_labels says when it is trained."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


# ----------------------------------------------- transformer -----------------------------------------------
# Modules carry the names of the released checkpoints: their weights load as they are, less
# the stored `pos_embed`.

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm's second half: x (B, L, D), shift and scale (B, 1, D). Unlike
    MAETok's decoder, 1 + scale."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention; positions are in the tokens already."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, L, hs)
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, nh, L, hs)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two layers with the tanh form of GELU between them [SiT]."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block, modulated by the condition c: shift and scale after each norm, a gate on each branch
    (adaLN-zero).

    The layer that makes them starts at zero, so the gates are 0 and a new block returns its input [SiT].
    """

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """x (B, L, D), c (B, D) -> (B, L, D)."""
        # each (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """The last norm, modulated by c, and the layer back to latent channels: (B, L, D) -> (B, L, C)."""

    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)                         # each (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity of the latents, given their noisy state, the time and the class. See
    SiTConfig for the sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)       # patch size 1: a token is a patch [Sec. 4.1]
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.beta_embedder = TimestepEmbedder(c.width) if c.guidance_free else None
        self.span_embedder = TimestepEmbedder(c.width) if c.mean_flow else None
        self.register_buffer("pos_embed", position_table(c.num_latents, c.width), persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.latent_dim)
        self._init_weights()

    def _init_weights(self):                                         # [SiT], which takes it from DiT
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        # adaLN-zero: blocks start as the identity and the output as 0: the loss starts at
        # E|v|^2 whatever the depth.
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks),
                      self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y, beta=None, hidden_after=0, span=None):
        """x (B, L, C) state in the weights' dtype, t (B,) float in [0, 1], y (B,) int64 class -> velocity
        (B, L, C).

        beta: (B,) float in [0, 1], 1 / guidance scale, for a model of guidance-free training; None: 1.
        span: (B,) float in [0, 1], t - r of an average velocity (after/mean_flow.py); None: 0.
        hidden_after: k > 0 returns (velocity, tokens after k blocks (B, L, D)), which REPA trains on.
        Raises ValueError when x is not (B, num_latents, latent_dim): one token would
        silently take every position.
        """
        if x.shape[1:] != (self.config.num_latents, self.config.latent_dim):
            raise ValueError(f"latents of shape {tuple(x.shape)} given to a model of "
                             f"{self.config.num_latents} tokens with {self.config.latent_dim} channels")
        c = self.t_embedder(t) + self.y_embedder(y)                                                # (B, D)
        if self.beta_embedder is not None:
            c = c + self.beta_embedder(torch.ones_like(t) if beta is None else beta)
        if self.span_embedder is not None:
            c = c + self.span_embedder(torch.zeros_like(t) if span is None else span)
        x_t, x = x, self.x_embedder(x) + self.pos_embed                                            # (B, L, D)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if number == hidden_after:
                hidden = x
        v = self.final_layer(x, c)                                                                 # (B, L, C)
        v = velocity_of_data(v, x_t, t) if self.config.x_prediction else v
        return (v, hidden) if hidden_after else v


def sit_macs(config: SiTConfig) -> int:
    """Multiply-accumulates (MACs) of one forward pass of one sample, an int.

    Counted: every linear layer, and attention's two products, queries with keys and weights with values.
    Not counted: softmax, norms, GELU, biases, modulation, sums, look-ups. One MAC is two FLOPs in the usual
    terms. SiT-XL/1 has 58.4 G at 128 tokens and 524.6 G at 1024, 9.0 times as many. The paper has 48.5 and
    373.3 "Gflops", 7.7 times, and does not say what it counts [Sec. 4.5]; leaving attention's products out
    gives 57.3 and 456.9, 8.0 times.
    """
    L, C, D, hidden = (config.num_latents, config.latent_dim, config.width,
                       int(config.width * config.mlp_ratio))
    block = L * (3 * D * D + D * D + 2 * D * hidden)     # qkv, proj, MLP
    block += 2 * L * L * D                               # q k^T and weights v, all heads together
    block += 6 * D * D                                   # adaLN: once a sample, not once a token
    # x_embedder, t_embedder, the last adaLN, linear
    ends = L * C * D + (256 * D + D * D) + 2 * D * D + L * D * C
    return config.depth * block + ends


# -------------------------------------------- trained models --------------------------------------------

def model_classes(name: str) -> tuple[type, type]:
    """(model, its config) of --model. Raises UserError for a name that none has."""
    if name == "sit":
        return SiT, SiTConfig
    # Not at the top: the variants are made from this file's parts.
    if name == "lightningdit":
        from variants.lightningdit import LightningDiT, LightningDiTConfig
        return LightningDiT, LightningDiTConfig
    if name == "usit":
        from variants.usit import USiT, USiTConfig
        return USiT, USiTConfig
    raise UserError(f"--model {name}: choose sit, lightningdit, usit")


def build_config(values: dict) -> SiTConfig:
    """The model's own config out of a run's, a dict. Raises UserError for sizes that cannot make a model."""
    config = model_classes(values["model"])[1]
    names = {field.name for field in dataclasses.fields(config)}
    try:
        return config(**{k: v for k, v in values.items() if k in names})
    except ValueError as e:
        raise UserError(str(e)) from e


def build_model(values: dict) -> nn.Module:
    """The model that a run's config, a dict, describes."""
    return model_classes(values["model"])[0](build_config(values))


def load_diffusion(path, device="cpu"):
    """(the model with the EMA weights, its tokenizer, config dict with the names of the classes as "classes")
    from a checkpoint or run folder of train_diffusion.py, both in eval mode. Raises UserError."""
    state = load_checkpoint(path)
    if state.get("kind") != "diffusion":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a diffusion model")
    try:
        model = build_model(state["config"])
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path} has a config this version cannot build: {e}") from e
    load_weights(model, state["ema"], path)
    tokenizer = tokenizer_of(state["tokenizer"], path)
    names = {"classes": state.get("classes", [])}                      # checkpoints had none before
    return model.to(device).eval().requires_grad_(False), tokenizer.to(device), state["config"] | names


def load_guide(path, model, tokenizer, config, device):
    """The worse model of autoguidance, which must share latents, path and classes with `model`.
    Raises UserError."""
    guide, its_tokenizer, its_config = load_diffusion(path, device)
    if common.fingerprint(its_tokenizer.encoder) != common.fingerprint(tokenizer.encoder):
        raise UserError(f"--guide-ckpt {path} was trained on another tokenizer's latents")
    for what, its, ours in (("classes", guide.config.num_classes, model.config.num_classes),
                            ("path", its_config["path"], config["path"])):
        if its != ours:
            raise UserError(f"--guide-ckpt {path}: {what} {its}, the model's {ours}; they must agree")
    return guide
