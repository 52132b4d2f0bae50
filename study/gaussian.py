"""What a diffusion model would do that had learned the mean and the covariance of the latents and nothing
else.                                                                                         [ours; Fig. 2b]

Of all functions that are affine in the state x_t = (1 - t) x + t eps, one predicts the velocity eps - x best.
For latents that are one Gaussian no function does better. Its loss follows from the covariance alone, so it
says how much of a diffusion loss is the latents' spread over directions, which differs between tokenizers.
And samples can be drawn with it, as with a SiT: by the same sampler, whose step errors they then share (25
Euler steps reach only part of the smallest variances), so that nothing but the model differs.
"""
import dataclasses
import math

import torch
from torch import nn


class GaussianVelocity(nn.Module):
    """The best affine prediction of the velocity on the linear path, called as a SiT is.

    Along an eigenvector of the covariance with eigenvalue l, x_t has the variance (1 - t)^2 l + t^2 and the
    covariance t - (1 - t) l with the velocity, whose variance is 1 + l. The best prediction leaves a variance
    of l / ((1 - t)^2 l + t^2); with u = t / (1 - t) its mean over uniform t is the integral of l / (l + u^2)
    over u > 0, which is pi/2 sqrt(l).

    latents: (n, L, C) float, as the diffusion model is trained on; with n below some 20 L C the loss is
    biased downwards. config: that model's, a dataclass.
    loss: float, the mean squared error of a latent value's velocity over uniform times.
    """

    def __init__(self, latents, config):
        super().__init__()
        self.config = dataclasses.replace(config, num_classes=0)
        x = latents.flatten(1).double()                                             # (n, d), d = L C
        values, axes = torch.linalg.eigh(torch.cov(x.T, correction=0))              # (d,), (d, d): columns
        values = values.clamp(min=0)
        self.loss = (math.pi / 2 * values.sqrt().mean()).item()
        # Parameters, because the sampler asks a model's parameters for device and dtype.
        for name, value in (("mean", x.mean(0)), ("values", values), ("axes", axes)):
            self.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))

    def forward(self, x, t, y=None):
        """x_t (B, L, C), t (B,) -> velocity (B, L, C). y, labels, is not looked at."""
        t = t[:, None]                                                              # (B, 1)
        with torch.autocast(x.device.type, enabled=False):
            z = (x.flatten(1) - (1 - t) * self.mean) @ self.axes                    # (B, d), along the axes
            z = z * (t - (1 - t) * self.values) / ((1 - t) ** 2 * self.values + t ** 2).clamp(min=1e-12)
            return (z @ self.axes.T - self.mean).reshape(x.shape)
