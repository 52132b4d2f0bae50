"""Rows of the paper's tables that need another model or other batches.                     [Tables 1d, 13b]

    train_tokenizer.py --preset maetok-b-256,ape --add tables              # learned positions [Table 13b]
    train_tokenizer.py --preset maetok-b-256 --add tables --mixed-size 384     # RoPE at two sizes [Table 13b]
    train_tokenizer.py --preset maetok-b-256,aux-linear --add tables       # linear auxiliary heads [Table 1d]

    ape          a table of learned absolute positions on the image tokens, without RoPE; it belongs to one
                 grid and is resampled bicubically for others
    mixed size   every other step trains at a second size; needs learnable latents, as many for every size
    aux-linear   y_j = a linear layer on the pixel decoder's image tokens. One linear layer cannot take L
                 latents to N patches by itself [ours: the paper does not say what it is linear in]

Name it before latent_noise and nested_dropout: --add tables,latent_noise.
To remove it: delete this file and mixed_size.py.
"""
from dataclasses import dataclass

from common import UserError, Whole, check_choices    # before torch, see runtime/processes.py

import torch
import torch.nn as nn
import torch.nn.functional as F

from maetok import Decoder, Encoder, MAETok, MAETokOutput, unpatchify
from variants.mixed_size import MixedSizeBatches, MixedSizeDataset


def table_positions(table, grid):
    """A table (1, rows, columns, D) of positions for a grid of patches: (1, N, D)."""
    table = table.permute(0, 3, 1, 2)                                                  # (1, D, rows, columns)
    if table.shape[-2:] != tuple(grid):
        table = F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True)
    return table.flatten(2).transpose(1, 2)


def add_table(module, config):
    """Give an encoder or decoder a table, and take its RoPE away: with frequency 0 nothing is rotated."""
    side = config.image_size // config.patch_size
    module.image_positions = nn.Parameter(torch.zeros(1, side, side, config.width))
    module.transformer.rope.freqs.zero_()


class TableEncoder(Encoder):
    """Positions are added after masking, so a mask token still knows its place."""

    def __init__(self, config):
        super().__init__(config)
        add_table(self, config)

    def image_tokens(self, images, mask):
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        return super().image_tokens(images, mask) + table_positions(self.image_positions, grid)


class TableDecoder(Decoder):
    """A decoder with a learned table on its image tokens [Table 13b]."""

    def __init__(self, config, depth, out_dim):
        super().__init__(config, depth, out_dim)
        add_table(self, config)

    def tokens(self, latents, grid):
        x, N = super().tokens(latents, grid), grid[0] * grid[1]
        return torch.cat((x[:, :N] + table_positions(self.image_positions, grid), x[:, N:]), dim=1)


class LinearDecoder(nn.Module):
    """An auxiliary decoder of depth 0. Its input are the pixel decoder's image tokens (B, N, D), not
    latents."""

    def __init__(self, width, out_dim):
        super().__init__()
        self.head = nn.Linear(width, out_dim)

    def image_tokens(self, tokens, grid):
        return tokens

    def forward(self, tokens, grid):
        return self.head(tokens)


class TablesMAETok(MAETok):
    """MAETok with the parts that the rows of Tables 1d and 13b exchange."""

    def build_encoder(self):
        return super().build_encoder() if self.config.ape == "none" else TableEncoder(self.config)

    def build_decoder(self, depth, out_dim):
        if self.config.aux_linear and hasattr(self, "decoder"):             # the pixel decoder is built first
            return LinearDecoder(self.config.width, out_dim)
        if self.config.ape == "both":
            return TableDecoder(self.config, depth, out_dim)
        return super().build_decoder(depth, out_dim)

    def decode_all(self, h, grid, posterior=None, **more):
        if not self.config.aux_linear:
            return super().decode_all(h, grid, posterior, **more)
        if more:
            raise UserError(f"--add tables must be named before the extra that brings {', '.join(more)}")
        tokens = self.decoder.image_tokens(h, grid)                                                # (B, N, D)
        x_hat = unpatchify(self.decoder.head(tokens), self.config.patch_size, grid)
        aux = {name: decoder(tokens, grid) for name, decoder in self.aux_decoders.items()}
        return MAETokOutput(x_hat, h, aux, posterior)


class AddToTokenizer:
    """See common.attach."""
    Model = TablesMAETok
    PRESETS = {"ape": dict(ape="both"), "aux-linear": dict(aux_linear=True)}                # [Tables 13b, 1d]

    @dataclass
    class Config:
        # ---- rows of Tables 1d and 13b ----
        ape: str = "none"            # learned positions instead of RoPE: none, encoder or both [Table 13b]
        aux_linear: bool = False     # auxiliary heads: linear on the pixel decoder's image tokens [Table 1d]
        mixed_size: Whole = 0        # px of a second size, for every other step [Table 13b]; 0: none

        def __post_init__(self):
            super().__post_init__()
            check_choices(self, ape=("none", "encoder", "both"))
            if self.mixed_size and (self.mixed_size % self.patch_size or not self.learnable_latents):
                raise UserError(f"--mixed-size {self.mixed_size} must be a multiple of the patch, "
                                f"{self.patch_size} px, and needs learnable latents, whose number is the "
                                "same for all sizes")

    def dataset(self, split):
        dataset = super().dataset(split)
        return MixedSizeDataset(dataset) if self.config.mixed_size and split == "train" else dataset

    def batches(self, length, start, stop, processes):
        c = self.config
        if not c.mixed_size:
            return super().batches(length, start, stop, processes)
        return MixedSizeBatches(length, c.batch_size, start, stop, c.seed, processes.rank, processes.world,
                                c.accumulate, sizes=(c.image_size, c.mixed_size))
