"""Noise on the latents while the decoder is fine-tuned.
                                                      [after the paper: DeTok, 2507.15856; RAE, 2510.11690]

    train_tokenizer.py --add latent_noise --latent-noise 0.8
    h --(+ sigma n)--> decoder          in stage 2 only; sigma is drawn per image

A sampler's latents are never exactly those of an encoder. A decoder trained on exact latents turns the error
into visible detail; one that has seen noise ignores it. Samples should improve; reconstructions get worse.
With --add nested_dropout,latent_noise the noise is added first; in the other order the empty tokens get it.
To remove it: delete this file.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import Weight, step_rngs
from runtime.processes import to_device


class AddToTokenizer:
    """See common.attach."""
    TRAINING_ONLY = True

    @dataclass
    class Config:
        # ---- latent noise ----
        latent_noise: Weight = 0.8   # strength, in standard deviations of the latents [RAE]

    class Model:
        def decode_all(self, h, *rest, added=None, **more):
            """added: (B, L, C) noise in units of the latents' standard deviation, or None."""
            return super().decode_all(h if added is None else h + self.latent_std * added, *rest, **more)

    def batch(self, stage, step, micro, positions, loaded):
        batch, c = super().batch(stage, step, micro, positions, loaded), self.config
        if stage.number == 2:
            rngs = step_rngs(c, "latent-noise", step, positions)
            noise = draw_noise(rngs, c.latent_shape(batch.mask.shape[1]), c.latent_noise)
            batch.more["added"] = to_device(noise, self.device)
        return batch


def draw_noise(rngs: list, shape: tuple, strength: float) -> Tensor:
    """Noise for the latents, (B, *shape) float32 on the CPU, from one numpy Generator per image.

    sigma = |N(0, strength^2)| per image [RAE; its code draws sigma uniformly from [0, strength], DeTok
    interpolates towards noise instead]. The unit is the latents' standard deviation, as in the diffusion
    model. Most images get little noise, so the decoder still sees nearly clean latents.
    """
    sigmas = [abs(rng.standard_normal()) * strength for rng in rngs]
    return torch.from_numpy(np.stack([np.float32(sigma) * rng.standard_normal(shape, np.float32)
                                      for sigma, rng in zip(sigmas, rngs)]))
