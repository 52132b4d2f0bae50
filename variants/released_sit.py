"""How the authors' code samples from SiT, where it differs from the paper and from SiT.       [released code]

    Euler-Maruyama    w = 2t on the cosine path, too; in flow.py w = 2 sigma(t), on the linear path also 2t
    Heun's method     decides once per step, at its start, whether guidance acts; in flow.py at each call
    positions         those stored with the weights; SiT's are computed

The models themselves are SiT's. variants/released.py reads the authors' files and writes a checkpoint of ours
that brings these along; `--add released` trains such a model.
"""
import math
from dataclasses import dataclass

from common import UserError, split_names    # before torch, see runtime/processes.py

import torch

from flow import SAMPLERS, expected_noise, guided_velocity, inside, path_coefficients, precise


@torch.no_grad()
def euler_maruyama(velocity, x, times, noise, path="linear"):
    """flow.euler_maruyama with w = 2t: the drift v - w/2 s is v + t/sigma E[eps | x_t]. On the cosine path
    t / sigma is within [2/pi, 1]."""
    dtype, x = x.dtype, precise(x)
    sigmas = path_coefficients(torch.tensor(times, dtype=torch.float64), path)[1].tolist()
    for step, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t).to(x)
        x = x + (t_next - t) * (v + t / sigmas[step] * expected_noise(v, x, t, path))
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise(step).to(x)
    return x.to(dtype)


@torch.no_grad()
def heun(velocity, x, times):
    """flow.heun; velocity gets the start of the step, at which it decides on guidance for both calls."""
    dtype, x = x.dtype, precise(x)
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t).to(x)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next, start=t).to(x)) / 2
        x = x + (t_next - t) * v
    return x.to(dtype)


class AddToDiffusion:
    """See common.attach."""

    @dataclass
    class Config:
        def __post_init__(self):
            super().__post_init__()
            if others := {"guidance_free", "mean_flow", "usit"} & {*split_names(getattr(self, "add", ""))}:
                raise UserError(f"--add released samples as the authors' SiT does, not with {others.pop()}")

    class Model:
        samplers = SAMPLERS | {"euler-maruyama": euler_maruyama, "heun": heun}

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("pos_embed", self.pos_embed)                # now a part of the checkpoint

        def velocity(self, y, cfg_scale=1.0, interval=(0.0, 1.0)):
            guided, plain = guided_velocity(self, y, cfg_scale), guided_velocity(self, y)
            return lambda x, t, start=None: (
                guided if inside(t if start is None else start, interval) else plain)(x, t)
