"""Latents that are ordered: an image from its first 1, 2, 4 ... tokens.
                                    [after the paper: FlexTok, 2502.13967; One-D-Piece, 2501.10064]

    train_tokenizer.py --add nested_dropout

During training each image keeps its first k tokens; k is drawn from 1, 2, 4 ... and L. The information that
helps the reconstruction most then moves to the first tokens, and one tokenizer serves every length. Only for
learnable latents, whose order is free. FlexTok and One-D-Piece quantise their latents; these stay continuous.
To remove it: delete this file and study/lengths.py.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from common import UserError, step_rngs
from runtime.processes import to_device


class AddToTokenizer:
    """See common.attach."""
    TRAINING_ONLY = True

    @dataclass
    class Config:
        def __post_init__(self):
            super().__post_init__()
            if not self.learnable_latents:
                raise UserError("--add nested_dropout orders learnable latents; image tokens have positions")

    class Model:
        def decode_all(self, h, *rest, lengths=None, **more):
            """lengths: (B,) int, how many tokens of each image the decoders see; None: all."""
            return super().decode_all(h if lengths is None else keep_first(h, lengths), *rest, **more)

    def batch(self, stage, step, micro, positions, loaded):
        batch = super().batch(stage, step, micro, positions, loaded)
        lengths = draw_lengths(step_rngs(self.config, "lengths", step, positions), self.config.num_latents)
        batch.more["lengths"] = to_device(lengths, self.device)
        return batch


def possible_lengths(num_latents: int) -> list[int]:
    """1, 2, 4 ... below L, and L."""
    return [2 ** i for i in range(num_latents.bit_length()) if 2 ** i < num_latents] + [num_latents]


def draw_lengths(rngs: list, num_latents: int) -> Tensor:
    """How many tokens each image keeps, (B,) int64, from one numpy Generator per image. All possible lengths
    are equally likely."""
    choices = possible_lengths(num_latents)
    return torch.tensor([choices[rng.integers(len(choices))] for rng in rngs])


def keep_first(latents: Tensor, lengths: Tensor) -> Tensor:
    """latents (B, L, C) with zeros in place of all tokens after the first lengths (B,). The decoder adds its
    positions, so it can tell that a zero token is empty; dropping tokens would give images of one batch
    different numbers of tokens."""
    kept = torch.arange(latents.shape[1], device=latents.device) < lengths[:, None]                   # (B, L)
    return latents * kept[..., None]

