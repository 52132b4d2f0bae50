"""LightningDiT, the second diffusion model: noise and a class -> latent tokens (B, L, C). [Sec. 4.1, Table 9]

A SiT (sit.py) with the parts of today's language models (Yao & Wang 2025, arXiv:2501.01423):

    LayerNorm without weights   -> RMSNorm with a learned gain
    MLP with GELU               -> SwiGLU, as large as the MLP it replaces
    sine table added to tokens  -> 1D RoPE on top: positions also turn queries and keys
    squared error of v          -> the same plus 1 - cos(v^, v), `velocity_direction_loss` ["cosine loss"]

and, in training, logit-normal times (flow.sample_times), lr 2e-4, betas 0.9 and 0.95, batch 1024, 400 K
steps; in sampling, Euler with 250 steps (flow.euler) [Table 9].
Embedders are sit.py's; paths, losses, samplers and guidance are flow.py's; `forward` takes and returns
what SiT's does.

DATA AT t = 0, NOISE AT t = 1, as everywhere here. LightningDiT's own code counts time the other way round.

Shape legend: B batch · L latent tokens · C latent channels · D width · nh heads · hs head size
Provenance tags: [Table 9] the paper (arXiv:2502.03444v2) · [LightningDiT] its diffusion model's code · [ours]
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from after.x_prediction import velocity_of_data
from common import Linear
from sit import LabelEmbedder, SiTConfig, TimestepEmbedder, modulate, position_table

# Widths, depths and heads are SiT's, sit.SIZES: LightningDiTConfig(**SIZES["XL"]).                  [Table 9]


@dataclass
class LightningDiTConfig(SiTConfig):
    """SiTConfig and one choice more. The defaults are LightningDiT-XL/1 on MAETok's latents [Table 9].

    Raises ValueError for values that cannot make a model.
    """
    # ---- LightningDiT (LightningDiTConfig in lightningdit.py) ----
    # For runs whose attention logits grow without bound; off in the released configuration.
    qk_norm: bool = False        # RMSNorm on queries and keys, per head [LightningDiT]
    # Table 9 can be read as RoPE alone; then tokens are hard to tell apart where all is noise.
    sine_table: bool = True      # SiT's fixed positions, under RoPE [LightningDiT]

    def __post_init__(self):
        super().__post_init__()
        if self.width // self.heads % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads: RoPE turns pairs of channels, it "
                             "needs an even head size")


# ----------------------------------------------- transformer -----------------------------------------------

def rotary_angles(length, head_size, device=None):
    """cos and sin of position * 10000^(-2i/hs), (L, hs/2) float32 each: 1D RoPE [Table 9].

    A query at m and a key at n, turned by m f and n f, meet in a product that depends on m - n alone.
    Base 10000 is RoPE's usual one [the paper is silent]. Made anew in every call, in float32:
    a stored table would be rounded to bfloat16 with the weights, and the far positions would blur.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)               # (hs/2,)
    angle = torch.arange(length, device=device)[:, None] * frequency                               # (L, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel pairs (i, i + hs/2) of x (B, nh, L, hs) by the angles; in float32,
    returned in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis: LayerNorm without mean and bias (Zhang & Sennrich 2019).

    In float32 whatever x's dtype, which it returns. Unlike SiT's norms it has a weight, although adaLN scales
    right after it [LightningDiT].
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with 1D RoPE on queries and keys, and optionally RMSNorm before it."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, L, hs)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, nh, L, hs)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class SwiGLU(nn.Module):
    """A gated MLP:  w3(silu(a) * b)  with  a, b = w12(x)  (Shazeer 2020).

    Three matrices instead of two: at hidden width 2/3 of the MLP's it has as many weights.
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)                      # both first matrices, one product
        self.w3 = Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """SiT's block with the exchanged parts; adaLN-zero stays: shift and scale after each norm,
    a gate on each branch."""

    def __init__(self, width, heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        """x (B, L, D), c (B, D), rope: rotary_angles' -> (B, L, D)."""
        # each (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """The last norm, modulated by c, and the layer back to latent channels: (B, L, D) -> (B, L, C)."""

    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)                         # each (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LightningDiT(nn.Module):
    """Velocity of the latents, given their noisy state, the time and the class. See
    LightningDiTConfig for the sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)           # patch size 1 [Table 9]
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.beta_embedder = TimestepEmbedder(c.width) if c.guidance_free else None
        # Table 9 has "1D RoPE" where Table 8 has "1D sinusoidal"; LightningDiT's own code has RoPE and a sine
        # table. We keep both: RoPE says how far the other tokens are, but at t = 1, where they hold noise, an
        # average over them is little for a token to know its own place by. With RoPE alone a tiny model does
        # not learn "token 0 is 2, token 1 is -2" (test_lightningdit.py).
        table = position_table(c.num_latents, c.width) * c.sine_table
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio, c.qk_norm) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.latent_dim)
        self._init_weights()

    def _init_weights(self):                                         # SiT's [LightningDiT]; gains start at 1
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        # adaLN-zero: blocks start as the identity and the output as 0.
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks),
                      self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y, beta=None, hidden_after=0):
        """x (B, L, C) state in the weights' dtype, t (B,) float in [0, 1], y (B,) int64 class, num_classes
        being the null class -> velocity (B, L, C).

        beta and hidden_after: as sit.SiT.forward's.

        Raises ValueError when x is not (B, num_latents, latent_dim): one token would
        silently take every position.
        """
        if x.shape[1:] != (self.config.num_latents, self.config.latent_dim):
            raise ValueError(f"latents of shape {tuple(x.shape)} given to a model of "
                             f"{self.config.num_latents} tokens with {self.config.latent_dim} channels")
        rope = rotary_angles(x.shape[1], self.config.width // self.config.heads, x.device)
        c = self.t_embedder(t) + self.y_embedder(y)                                                # (B, D)
        if self.beta_embedder is not None:
            c = c + self.beta_embedder(torch.ones_like(t) if beta is None else beta)
        x_t, x = x, self.x_embedder(x) + self.pos_embed                                            # (B, L, D)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, c, rope)
            if number == hidden_after:
                hidden = x
        v = self.final_layer(x, c)                                                                 # (B, L, C)
        v = velocity_of_data(v, x_t, t) if self.config.x_prediction else v
        return (v, hidden) if hidden_after else v


# ------------------------------------------------ objective ------------------------------------------------

def velocity_direction_loss(prediction, target):
    """1 - cos(prediction, target) over the channels of each token: (B, L, C) -> (B,) float32, in [0, 2].
    ["additional loss: cosine loss", Table 9]

    Added to flow_matching_loss with weight 1 [LightningDiT]. The squared error is ruled by the tokens of
    large velocity; this term counts every token's direction alike.
    """
    return (1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean(1)
