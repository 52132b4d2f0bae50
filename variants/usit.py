"""USiT, the third diffusion model: noise and a class -> latent tokens (B, L, C).          [Sec. 4.4, Table 3]

DC-AE's name (Chen et al. 2024, arXiv:2410.10733) for a U-ViT (Bao et al. 2023, arXiv:2209.12152) trained with
SiT's objective. A U-ViT is a plain ViT with two ideas:

    everything is a token    the sequence is [class ; time ; latents]; no adaLN, attention alone conditions
    long skips               the output of block i also goes straight to its mirror image, across the middle:

        in_blocks   1 -> 2 -> ... -> n ---> mid_block
                    |    |           |          |
        out_blocks  n <- ... <- 2 <- 1 <--------+        x <- skip_linear([x ; skip]) before each of them

`depth` counts the mirrored blocks, 2n; the middle one comes on top [U-ViT, DC-AE]: depth 28 has 29.
Paths, loss, samplers and guidance are flow.py's; `forward` takes and returns what SiT's does.
DATA AT t = 0, NOISE AT t = 1.

Shape legend: B batch · L latent tokens · C latent channels · T all tokens, 2 + L · D width
· nh heads · hs head size
Provenance tags: [Table 3] the paper (arXiv:2502.03444v2) · [DC-AE] its code · [U-ViT] · [ours]
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from after.x_prediction import velocity_of_data
from common import Count, Linear
from sit import LabelEmbedder, SiTConfig, time_features


@dataclass
class USiTConfig(SiTConfig):
    """The fields of SiTConfig. The defaults are USiT-2B on MAETok's latents [Table 3].

    By count it has 1.58 G parameters (DC-AE's model list: 1580.40 M, with 256 tokens); "2B" is its name.
    Raises ValueError for values that cannot make a model.
    """
    width: Count = 2048          # D [DC-AE]
    heads: Count = 32            # nh [DC-AE]
    depth: Count = 28            # blocks, not counting the middle one [DC-AE]

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_free:
            raise ValueError("guidance-free training conditions through adaLN, which usit has not: "
                             "choose sit or lightningdit")
        if self.depth % 2:
            raise ValueError(f"depth is {self.depth}: USiT's blocks come in mirrored pairs, give an even "
                             "number (the middle block comes on top)")


SIZES = {
    "H": dict(width=1152, depth=28, heads=16),       # 501 M [DC-AE]
    "2B": dict(width=2048, depth=28, heads=32),      # 1.58 G [Table 3]
}


class Attention(nn.Module):
    """Multi-head self-attention; no bias on q, k, v [U-ViT]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, T, hs)
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, nh, T, hs)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm ViT block: LayerNorm with weights (eps 1e-5), attention, MLP with exact GELU.

    skip: the block of the second half, which first brings its input and its mirror image's output, 2D
    channels together, back to D.
    """

    def __init__(self, width, heads, mlp_ratio, skip=False):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        """x, skip (B, T, D) -> (B, T, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class USiT(nn.Module):
    """Velocity of the latents, given their noisy state, the time and the class. See
    USiTConfig for the sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)                       # patch size 1 [DC-AE]
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + c.num_latents, c.width))        # learned [U-ViT]
        self.in_blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth // 2))
        self.mid_block = Block(c.width, c.heads, c.mlp_ratio)
        self.out_blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio, skip=True)
                                        for _ in range(c.depth // 2))
        self.norm = nn.LayerNorm(c.width)
        self.linear = nn.Linear(c.width, c.latent_dim)
        self._init_weights()

    def _init_weights(self):                                                     # [U-ViT]
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The table of classes keeps PyTorch's normal(0, 1), which is also the scale of the time's features.

    def forward(self, x, t, y):
        """x (B, L, C) state in the weights' dtype, t (B,) float in [0, 1], y (B,) int64 class, num_classes
        being the null class -> velocity (B, L, C).

        Raises ValueError when x is not (B, num_latents, latent_dim).
        """
        if x.shape[1:] != (self.config.num_latents, self.config.latent_dim):
            raise ValueError(f"latents of shape {tuple(x.shape)} given to a model of "
                             f"{self.config.num_latents} tokens with {self.config.latent_dim} channels")
        # The time token is the D sines and cosines of t themselves, without an MLP, t unscaled [DC-AE].
        time = time_features(t, self.config.width).to(self.pos_embed.dtype)                        # (B, D)
        tokens = (self.y_embedder(y)[:, None], time[:, None], self.x_embedder(x).to(x.dtype))
        x_t, x = x, torch.cat(tokens, dim=1) + self.pos_embed                                   # (B, 2+L, D)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())                          # last in, first out: the nearest are joined
        v = self.linear(self.norm(x)[:, 2:])                                                       # (B, L, C)
        return velocity_of_data(v, x_t, t) if self.config.x_prediction else v
