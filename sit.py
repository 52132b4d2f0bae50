"""SiT, the diffusion model: noise and a class -> latent tokens (B, L, C).                 [Sec. 4.1, Table 8]

    x_t --x_embedder, + positions--> tokens (B, L, D) --blocks--> --final_layer--> velocity of x_t (B, L, C)
    t_embedder + y_embedder = condition c (B, D), which shifts, scales and gates every block (adaLN-zero)

The architecture is SiT's (Ma et al. 2024, arXiv:2401.08740): a DiT, here with patch size 1 on a sequence of
tokens. What it learns and how it is sampled is in flow.py, its training in train_diffusion.py.

Time (DATA AT t = 0, NOISE AT t = 1), labels and provenance tags are as in flow.py.
Shapes: B batch · L latent tokens · C latent channels · D width · nh heads · hs head size
"""
import math
from dataclasses import dataclass

import common    # before torch, see runtime/processes.py

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from checkpoints import load_checkpoint, load_weights
from common import Count, UserError, Whole, check_ranges
from flow import SAMPLERS, guided_velocity, path_coefficients, time_grid
from maetok import tokenizer_of
from runtime.attention import attention
from runtime.processes import faster_products


@dataclass
class SiTConfig:
    """Everything that fixes the weights' shapes. The defaults are SiT-XL/1 on MAETok's latents [Table 8]."""
    # ---- diffusion model (SiTConfig in sit.py) ----
    num_latents: Count = 128     # L, the tokenizer's
    latent_dim: Count = 32       # C, the tokenizer's
    width: Count = 1152          # D [Table 8]
    heads: Count = 16            # nh [Table 8]
    depth: Count = 28            # blocks [Table 8]
    num_classes: Whole = 1000    # the null class comes on top; 0: unconditional, it is the only one [Table 5]

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
    """Fixed 1D positions [Table 8 "1D sinusoidal"]: (1, L, D) float32. Channels 2i and 2i+1 are sine and
    cosine of position * 10000^(-2i/D): neighbours, not halves [released code]."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)                # (D/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency                          # (L, D/2)
    return torch.stack((angle.sin(), angle.cos()), -1).reshape(1, length, width).float()


def time_features(t: Tensor, size: int = 256) -> Tensor:
    """t (B,) -> (B, size) float32: the cosines of t * 10000^(-i/(size/2)), then the sines.

    t in [0, 1] is not multiplied by 1000, although the frequencies were chosen for step numbers up to 1000;
    the released weights expect this [released code]. Angles are float32 under any autocast: just below t = 1
    the spacing of bfloat16 is 1/256, about one of 250 sampling steps, and steps would be rounded together.
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
    """Class (B,) -> (B, D). The last row is the null class, trained on the labels that drop_labels drops."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


# ----------------------------------------------- transformer -----------------------------------------------
# Modules have the names of the released checkpoints [released code].

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The second half of an adaptive LayerNorm: x (B, L, D), shift and scale (B, 1, D), both 0 at first."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention; the tokens already hold their positions."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, L, hs)
        x = attention(q, k, v)                                       # (B, nh, L, hs)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two layers with the tanh form of GELU between them; hidden width 4 D [SiT]."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block, modulated by the condition c: a shift and a scale after each norm, a gate
    on each branch (adaLN-zero). A new block's gates are 0, so that it returns its input [SiT]."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width)
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
    """Velocity of the latents, given their noisy state, the time and the class. `network` is the model; the
    methods before it build its parts, those after it say how it is sampled."""
    Final = FinalLayer

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)       # patch size 1: a token is a patch [Sec. 4.1]
        self.build_embedders()
        self.register_buffer("pos_embed", position_table(c.num_latents, c.width), persistent=False)
        self.blocks = nn.ModuleList(self.build_block() for _ in range(c.depth))
        self.final_layer = self.Final(c.width, c.latent_dim)
        self.initialise()

    def build_embedders(self):
        """The modules that `condition` sums up."""
        self.t_embedder = TimestepEmbedder(self.config.width)
        self.y_embedder = LabelEmbedder(self.config.num_classes, self.config.width)

    def build_block(self):
        return Block(self.config.width, self.config.heads)

    def initialise(self):
        """Random weights: Xavier, and normal 0.02 for the embedders of t and y [SiT, as DiT]."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        # adaLN-zero: blocks start as the identity and the output as 0, so the loss starts at E|v|^2.
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks),
                      self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def condition(self, t, y):
        """What modulates every block, (B, D). A subclass may have more inputs; `forward` passes them on."""
        return self.t_embedder(t) + self.y_embedder(y)

    def network(self, x, t, y, **more):
        """The transformer; arguments and result as forward's."""
        c = self.condition(t, y, **more)                                                           # (B, D)
        x = self.x_embedder(x) + self.pos_embed                                                    # (B, L, D)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)                                                              # (B, L, C)

    def forward(self, x, t, y, **more):
        """x (B, L, C) state in the weights' dtype, t (B,) float in [0, 1], y (B,) int64 class -> velocity
        (B, L, C). Raises ValueError for other shapes: one token would silently get every position."""
        if x.shape[1:] != (self.config.num_latents, self.config.latent_dim):
            raise ValueError(f"latents of shape {tuple(x.shape)} given to a model of "
                             f"{self.config.num_latents} tokens with {self.config.latent_dim} channels")
        return self.network(x, t, y, **more)

    # ---- how it is sampled, for flow.sample_latents ----
    samplers = SAMPLERS

    def velocity(self, y, cfg_scale=1.0, interval=(0.0, 1.0)):
        """A sampler's velocity, (state, t) -> (B, L, C). Raises UserError for an impossible scale."""
        return guided_velocity(self, y, cfg_scale, interval)

    def times(self, steps, last=None):
        """A sampler's times, from 1 to 0."""
        return time_grid(steps, last)


# -------------------------------------------- trained models --------------------------------------------

class Diffusion:
    """What `--add` puts an extra in front of: the model, and in train_diffusion.py its training."""
    ROLE, Config, Model, PRESETS = "Diffusion", SiTConfig, SiT, {}


def load_diffusion(path, device="cpu"):
    """(model with the EMA weights, its tokenizer, config) from a checkpoint or run folder of
    train_diffusion.py; both in eval mode. config: a dict, with the names of the classes as "classes"."""
    state = load_checkpoint(path, mapped=True)
    if state.get("kind") != "diffusion":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a diffusion model")
    try:
        path_coefficients(torch.zeros(()), state["config"].get("path"))                  # raises if unknown
        model = common.build_model(Diffusion, state["config"], state["add"])
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from e
    load_weights(model, state["ema"], path)
    tokenizer = tokenizer_of(state["tokenizer"], path)
    model = faster_products(model).to(device).eval().requires_grad_(False)
    return model, tokenizer.to(device), state["config"] | {"classes": [*map(str, state["classes"])]}
