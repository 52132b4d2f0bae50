"""USiT, the third diffusion model: noise and a class -> latent tokens (B, L, C).          [Sec. 4.4, Table 3]

    python train_diffusion.py --add usit --preset usit-2b --tokenizer RUN --data IMAGENET

USiT is DC-AE's name (Chen et al. 2024, arXiv:2410.10733) for a U-ViT (Bao et al. 2023, arXiv:2209.12152)
trained with SiT's objective. A U-ViT is a plain ViT with two ideas:

    everything is a token    the sequence is [class ; time ; latents]; no adaLN, attention alone conditions
    long skips               the output of block i also goes straight to its mirror image, across the middle:

        in_blocks   1 -> 2 -> ... -> n ---> mid_block
                    |    |           |          |
        out_blocks  n <- ... <- 2 <- 1 <--------+        x <- skip_linear([x ; skip]) before each of them

`depth` counts the mirrored blocks, 2n; the middle one comes on top [U-ViT, DC-AE]: depth 28 has 29.
Paths, loss, samplers and guidance are those of flow.py. DATA AT t = 0, NOISE AT t = 1.
To remove it: delete this file.

Shapes: B batch · L latent tokens · C latent channels · T all tokens, 2 + L · D width
Provenance tags: [Table 3] the paper (arXiv:2502.03444v2) · [DC-AE] its code · [U-ViT] · [ours]
"""
from dataclasses import dataclass

from common import Count, UserError, split_names    # before torch, see runtime/processes.py

import torch
import torch.nn as nn

from sit import Attention, LabelEmbedder, SiT, SiTConfig, time_features


@dataclass
class USiTConfig(SiTConfig):
    """The fields of SiTConfig. The defaults are USiT-2B on MAETok's latents [Table 3].

    By count it has 1.58 G parameters (DC-AE's model list: 1580.40 M, with 256 tokens); "2B" is its name.
    """
    # ---- USiT (USiTConfig in variants/usit.py) ----
    width: Count = 2048          # D [DC-AE]
    heads: Count = 32            # nh [DC-AE]
    depth: Count = 28            # blocks, not counting the middle one [DC-AE]

    def __post_init__(self):
        super().__post_init__()
        if "lightningdit" in split_names(getattr(self, "add", "")):           # a trainer's config has it
            raise UserError("--add usit,lightningdit: these are two models, choose one")
        if self.depth % 2:
            raise ValueError(f"depth is {self.depth}: USiT's blocks come in mirrored pairs, give an even "
                             "number (the middle block comes on top)")


SIZES = {
    "H": dict(width=1152, depth=28, heads=16),       # 501 M [DC-AE]
    "2B": dict(width=2048, depth=28, heads=32),      # 1.58 G [Table 3]
}


class Block(nn.Module):
    """Pre-norm ViT block: LayerNorm with weights (eps 1e-5), attention without bias on q, k, v [U-ViT], MLP
    with exact GELU.

    skip: a block of the second half, which first brings its input and its mirror image's output, 2D channels
    together, back to D.
    """

    def __init__(self, width, heads, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        """x, skip (B, T, D) -> (B, T, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class USiT(SiT):
    """Velocity of the latents, given their noisy state, the time and the class. Sizes: USiTConfig.

    Of SiT it takes what surrounds the network: the check of shapes, velocity and times for samplers.
    """

    def __init__(self, config):
        nn.Module.__init__(self)                                                 # none of SiT's parts
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)                       # patch size 1 [DC-AE]
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + c.num_latents, c.width))        # learned [U-ViT]
        self.in_blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth // 2))
        self.mid_block = Block(c.width, c.heads)
        self.out_blocks = nn.ModuleList(Block(c.width, c.heads, skip=True) for _ in range(c.depth // 2))
        self.norm = nn.LayerNorm(c.width)
        self.linear = nn.Linear(c.width, c.latent_dim)
        self.initialise()

    def initialise(self):                                                        # [U-ViT]
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The table of classes keeps PyTorch's normal(0, 1), which is also the scale of the time's features.

    def network(self, x, t, y):
        # The time token is the D sines and cosines of t themselves, without an MLP, t unscaled [DC-AE].
        time = time_features(t, self.config.width).to(self.pos_embed.dtype)                        # (B, D)
        tokens = (self.y_embedder(y)[:, None], time[:, None], self.x_embedder(x).to(x.dtype))
        x = torch.cat(tokens, dim=1) + self.pos_embed                                           # (B, 2+L, D)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())                          # last in, first out: the nearest are joined
        return self.linear(self.norm(x)[:, 2:])                                                    # (B, L, C)


class AddToDiffusion:
    """See common.attach."""
    Config, Model = USiTConfig, USiT
    # DC-AE's own recipe for its U-ViTs, which the paper takes over with the model.      [Table 3; rebuttal]
    BETAS = (0.99, 0.99)
    PRESETS = {"usit-2b": SIZES["2B"] | dict(batch_size=1024, warmup=5000, steps=500_000, keep_every=50_000)}
