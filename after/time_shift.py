"""Times shifted by the size of the latents.               [after the paper: SD3, 2403.03206; RAE, 2510.11690]

    python train_diffusion.py --add time_shift --tokenizer RUN             # training and sampling of that run
    python sample.py --ckpt RUN --add time_shift --time-shift 3.33         # sampling only

    t' = s t / (1 + (s - 1) t)        data at t = 0, noise at t = 1: s > 1 spends more of training and of the
                                      sampler's steps near the noise

The more values a latent has, the more of them agree on what the image is, and the more noise it takes to hide
it: at equal t a larger latent is the easier task. SD3 derives s = sqrt(n / m) for n values where m were tuned
without a shift; RAE takes m = 4096 for n values of any shape. MAETok's 128 x 32 are 4096 values, so that rule
does not shift them. LightningDiT's sampling shift of 0.3 (its code has data at t = 1) is s = 1 / 0.3 here.
To remove it: delete this file.
"""
from dataclasses import dataclass

from common import Positive, Weight, number    # before torch, see runtime/processes.py

from flow import time_grid

BASE = 4096                     # values of a latent that need no shift [RAE]


def shift_times(t, shift: float):
    """Times t in [0, 1], a number or a tensor, shifted: 0 and 1 stay. Its inverse is the shift 1 / s."""
    return shift * t / (1 + (shift - 1) * t)


def shift_of(config) -> float:
    """The shift that a model was trained with: config.time_shift, or for 0 RAE's, of its L x C values."""
    return config.time_shift or (config.num_latents * config.latent_dim / BASE) ** 0.5


def shifted(times, shift: float, steps, last=None) -> list[float]:
    """A model's `times` (SiT.times), shifted. Euler-Maruyama's `last` stays where it is."""
    grid = times(steps, None if last is None else shift_times(last, 1 / shift))
    return [shift_times(t, shift) for t in grid]


class AddToDiffusion:
    """See common.attach. The checkpoint is then sampled with the same shift."""

    @dataclass
    class Config:
        # ---- shifted times (after/time_shift.py) ----
        time_shift: Weight = 0.0     # above 1: more steps near the noise; 0: by L x C [RAE]

    class Model:
        def times(self, steps, last=None):
            return shifted(super().times, shift_of(self.config), steps, last)

    def draw_times(self, rngs):
        return shift_times(super().draw_times(rngs), shift_of(self.config))


class AddToSampler:
    """See sample.py. Replaces the shift that the model was trained with."""

    @staticmethod
    def add_arguments(add):
        add("--time-shift", type=number(Positive), default=1.0,
            help="of the sampler's times, see after/time_shift.py; LightningDiT: 3.33 (default 1: none)")

    @staticmethod
    def wrap(model, tokenizer, config, args):
        model.times = lambda steps, last=None: shifted(time_grid, args.time_shift, steps, last)
        return model
