"""LightningDiT, the second diffusion model: noise and a class -> latent tokens (B, L, C). [Sec. 4.1, Table 9]

    python train_diffusion.py --add lightningdit --preset lightningdit-xl --tokenizer RUN --data IMAGENET
    python sample.py --ckpt RUN --sampler euler                                                  # 250 steps

A SiT (sit.py) with the parts of today's language models (Yao & Wang 2025, arXiv:2501.01423):

    LayerNorm without weights   -> RMSNorm with a learned gain
    MLP with GELU               -> SwiGLU, as large as the MLP it replaces
    sine table added to tokens  -> 1D RoPE on top: positions also turn queries and keys
    squared error of v          -> the same plus 1 - cos(v^, v), `velocity_direction_loss` ["cosine loss"]

In training: logit-normal times (flow.sample_times), lr 2e-4, betas 0.9 and 0.95, batch 1024, 400 K steps; in
sampling: Euler with 250 steps (flow.euler) [Table 9]. The rest is SiT's. To remove it: delete this file.

DATA AT t = 0, NOISE AT t = 1, as everywhere here. LightningDiT's own code counts time the other way round.

Shapes: B batch · L latent tokens · C latent channels · D width · nh heads · hs head size
Provenance tags: [Table 9] the paper (arXiv:2502.03444v2) · [LightningDiT] its diffusion model's code · [ours]
"""
from dataclasses import dataclass

from common import Weight    # before torch, see runtime/processes.py

import torch
import torch.nn as nn
import torch.nn.functional as F

import sit
from maetok import rotate
from runtime.attention import attention
from sit import SIZES, SiT, SiTConfig, modulate


@dataclass
class LightningDiTConfig(SiTConfig):
    """SiTConfig and two choices more. The defaults are LightningDiT-XL/1 on MAETok's latents [Table 9], with
    the widths, depths and heads of SiT: LightningDiTConfig(**SIZES["L"])."""
    # ---- LightningDiT (LightningDiTConfig in variants/lightningdit.py) ----
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
    Base 10000 is RoPE's usual one [the paper is silent]. Computed in float32 in every call: a stored table
    would be rounded to bfloat16 with the weights, and far positions would become indistinct.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)               # (hs/2,)
    angle = torch.arange(length, device=device)[:, None] * frequency                               # (L, hs/2)
    return angle.cos(), angle.sin()


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis: LayerNorm without mean and bias (Zhang & Sennrich 2019).

    Computed in float32, returned in x's dtype. Unlike SiT's norms it has a weight, although adaLN scales
    right after it [LightningDiT].
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * self.weight).to(x.dtype)


class Attention(sit.Attention):
    """SiT's attention with 1D RoPE on queries and keys, and optionally RMSNorm before it."""

    def __init__(self, width, heads, qk_norm):
        super().__init__(width, heads)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, L, hs)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        x = attention(q, k, v)                                       # (B, nh, L, hs)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class SwiGLU(nn.Module):
    """A gated MLP:  w3(silu(a) * b)  with  a, b = w12(x)  (Shazeer 2020).

    Three matrices instead of two: at hidden width 2/3 of the MLP's it has as many weights.
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)                      # both first matrices, one product
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """SiT's block with the exchanged parts; adaLN-zero stays: shift and scale after each norm, a gate on each
    branch."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * 4 * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        """x (B, L, D), c (B, D), rope: rotary_angles' -> (B, L, D)."""
        # each (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(sit.FinalLayer):
    """SiT's with RMSNorm."""

    def __init__(self, width, latent_dim):
        super().__init__(width, latent_dim)
        self.norm_final = RMSNorm(width)


class LightningDiT(SiT):
    """Velocity of the latents, given their noisy state, the time and the class. Sizes: LightningDiTConfig."""
    Final = FinalLayer

    def __init__(self, config):
        super().__init__(config)
        # Table 9 has "1D RoPE" where Table 8 has "1D sinusoidal"; LightningDiT's own code has RoPE and a sine
        # table. We keep both. RoPE tells a token how far away the others are; at t = 1 these are noise, and
        # an average over them says little about its own position. With RoPE alone a tiny model does not learn
        # "token 0 is 2, token 1 is -2" (test_lightningdit.py).
        if not config.sine_table:
            self.pos_embed.zero_()

    def build_block(self):
        return Block(self.config.width, self.config.heads, self.config.qk_norm)

    def network(self, x, t, y, **more):
        rope = rotary_angles(x.shape[1], self.config.width // self.config.heads, x.device)
        c = self.condition(t, y, **more)                                                           # (B, D)
        x = self.x_embedder(x) + self.pos_embed                                                    # (B, L, D)
        for block in self.blocks:
            x = block(x, c, rope)
        return self.final_layer(x, c)                                                              # (B, L, C)


# ------------------------------------------------- training -------------------------------------------------

def velocity_direction_loss(prediction, target):
    """1 - cos(prediction, target) over the channels of each token: (B, L, C) -> (B,) float32, in [0, 2].
    ["additional loss: cosine loss", Table 9]

    The squared error is dominated by the tokens of large velocity; this term counts the direction of every
    token alike.
    """
    return (1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean(1)


class AddToDiffusion:
    """See common.attach."""
    Model = LightningDiT
    BETAS = (0.9, 0.95)                                                                            # [Table 9]
    PRESETS = {"lightningdit-xl": SIZES["XL"] | dict(times="logit-normal", lr=2e-4, batch_size=1024,
                                                     steps=400_000, keep_every=50_000)}           # [Table 9]

    @dataclass
    class Config(LightningDiTConfig):
        # ---- LightningDiT (LightningDiTConfig in variants/lightningdit.py) ----
        direction_loss: Weight = 1.0     # weight of 1 - cos(prediction, velocity) [LightningDiT: 1; Table 9]

    def objective(self, prediction, x_t, v, batch):
        loss, losses, terms = super().objective(prediction, x_t, v, batch)
        direction = velocity_direction_loss(prediction, v).mean()
        return loss + self.config.direction_loss * direction, losses, terms
