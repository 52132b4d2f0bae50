"""Times shifted by the size of the latents.               [after the paper: SD3, 2403.03206; RAE, 2510.11690]

    t' = s t / (1 + (s - 1) t)        data at t = 0, noise at t = 1: s > 1 spends more of training and of the
                                      sampler's steps near the noise

The more values a latent has, the more of them agree on what the image is, and the more noise it takes to hide
it: at equal t a larger latent is the easier task. SD3 derives s = sqrt(n / m) for n values where m were tuned
without a shift; RAE takes m = 4096 for n values of any shape. MAETok's 128 x 32 are 4096 values, so that rule
leaves them alone. LightningDiT's sampling shift of 0.3, whose code has data at t = 1, is s = 1 / 0.3 here.
To remove it: this file, the field and option `time_shift`, and the lines with `shift`.
"""

BASE = 4096                     # values of a latent that need no shift [RAE]


def shift_times(t, shift: float):
    """Times t in [0, 1], a number or a tensor, shifted: 0 and 1 stay. Its inverse is the shift 1 / s."""
    return shift * t / (1 + (shift - 1) * t)


def shift_of(config) -> float:
    """The shift that a model was trained with: config.time_shift, or for 0 RAE's, of its L x C values."""
    return config.time_shift or (config.num_latents * config.latent_dim / BASE) ** 0.5
