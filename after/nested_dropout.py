"""Latents that are ordered: an image from its first 1, 2, 4 ... tokens.
                                    [after the paper: FlexTok, 2502.13967; One-D-Piece, 2501.10064]

While the tokenizer trains, each image keeps its first k tokens and loses the others, k being drawn from 1, 2,
4 ... and L. What most helps the reconstruction then moves to the front: one tokenizer for every length. Only
for learnable latents, whose order is free; FlexTok and One-D-Piece quantise theirs, these stay continuous.
To remove it: this file, the field `nested_dropout`, the lines with that name or `lengths`,
`evaluate.py lengths`.
"""
import torch
from torch import Tensor


def possible_lengths(num_latents: int) -> list[int]:
    """1, 2, 4 ... below L, and L."""
    return [2 ** i for i in range(num_latents.bit_length()) if 2 ** i < num_latents] + [num_latents]


def draw_lengths(rngs: list, num_latents: int) -> Tensor:
    """How many tokens each image keeps, (B,) int64, from one numpy Generator an image:
    all lengths alike often."""
    choices = possible_lengths(num_latents)
    return torch.tensor([choices[rng.integers(len(choices))] for rng in rngs])


def keep_first(latents: Tensor, lengths: Tensor) -> Tensor:
    """latents (B, L, C) with 0 in place of all tokens but the first lengths (B,). The decoder adds
    its positions to them, so 0 is a token that is known to be empty; as many tokens as before keep
    one batch one tensor."""
    kept = torch.arange(latents.shape[1], device=latents.device) < lengths[:, None]                   # (B, L)
    return latents * kept[..., None]

