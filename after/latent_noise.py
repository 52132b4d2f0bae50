"""Noise on the latents while the decoder is fine-tuned.
                                                      [after the paper: DeTok, 2507.15856; RAE, 2510.11690]

    h --(+ sigma n)--> decoder          stage 2 alone, sigma drawn anew for each image

A sampler's latents are never quite an encoder's. A decoder that has only seen exact ones takes the difference
for detail; one that has seen noise lets it pass. The gain is in samples, the price in reconstructions.
To remove it: this file, the field `latent_noise`, and the lines with `latent_noise` or `added`.
"""
import numpy as np
import torch
from torch import Tensor


def draw_noise(rngs: list, shape: tuple, strength: float) -> Tensor:
    """Noise to be added to latents, (B, *shape) float32 on the CPU, from one numpy Generator an image.

    sigma = |N(0, strength^2)| for each image [RAE; its code draws it uniformly from [0, strength], DeTok
    interpolates towards noise instead]. In units of the latents' standard deviation, as a diffusion model
    sees them: most images get little noise, so clean latents stay in the training set.
    """
    sigmas = [abs(rng.standard_normal()) * strength for rng in rngs]
    return torch.from_numpy(np.stack([np.float32(sigma) * rng.standard_normal(shape, np.float32)
                                      for sigma, rng in zip(sigmas, rngs)]))
