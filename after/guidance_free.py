"""Guidance-free training: a model that is told the guidance scale, and needs one call per step.
                                                                          [rebuttal; Chen et al. 2025]

    python train_diffusion.py --add guidance_free --tokenizer RUN                    # new
    python train_diffusion.py --add guidance_free --tokenizer RUN --init TRAINED     # fine-tune a trained SiT

beta = 1 / guidance scale is a further input. In training the prediction, in every loss, is

    beta v(x_t, c, beta) + (1 - beta) sg[v(x_t, null, 1)]                                sg: no gradient

In expectation this must be the conditional velocity c. So the model itself tends to  u + (c - u) / beta,
where u is its unconditional velocity: that is the velocity guided by 1 / beta. Classifier-free guidance needs
both c and u for it, two calls. beta is uniform in [0, 1], and 1 where the label was dropped, which trains u
by the plain loss.

For SiT and LightningDiT (--add lightningdit,guidance_free): beta conditions through adaLN.
To remove it: delete this file.
"""
import torch
import torch.nn as nn

from common import UserError, split_names
from flow import call, inside
from runtime.processes import to_device
from sit import TimestepEmbedder


def guidance_free_mixture(prediction, u, beta):
    """The formula above, (B, L, C) float32. prediction: v(x_t, c, beta); u: v(x_t, null, 1); beta: (B,)."""
    b = beta[:, None, None]
    return b * prediction.float() + (1 - b) * u.float()


class Mixture(nn.Module):
    """`network` with the mixture as its output. model: the diffusion model in it, for u."""

    def __init__(self, network, model):
        super().__init__()
        self.network, self.model = network, model

    def forward(self, x_t, t, y, beta):
        prediction = self.network(x_t, t, y, beta=beta)
        with torch.no_grad():
            u = self.model(x_t, t, torch.full_like(y, self.model.config.num_classes))
        return guidance_free_mixture(prediction, u, beta)


class AddToDiffusion:
    """See common.attach."""

    class Config:
        def __post_init__(self):
            super().__post_init__()
            if "usit" in split_names(getattr(self, "add", "")):               # only a trainer's config has it
                raise UserError("--add guidance_free conditions through adaLN, which usit does not have: use "
                                "it with sit or lightningdit")

    class Model:
        def build_embedders(self):
            super().build_embedders()
            self.beta_embedder = TimestepEmbedder(self.config.width)

        def condition(self, t, y, beta=None, **more):
            """beta: (B,) float in [0, 1], 1 / guidance scale; None: 1."""
            return (super().condition(t, y, **more)
                    + self.beta_embedder(torch.ones_like(t) if beta is None else beta))

        def velocity(self, y, cfg_scale=1.0, interval=(0.0, 1.0)):
            """The guided velocity from one call."""
            super().velocity(y, cfg_scale, interval)                        # refuses to guide without classes
            if cfg_scale < 1:
                raise UserError("--cfg: a model of guidance-free training knows guidance scales from 1 on")
            return lambda x, t: call(self, x, t, y, beta=1 / cfg_scale if inside(t, interval) else 1.0)

    def network(self, model):
        return Mixture(super().network(model), model)

    def batch(self, step, positions, loaded):
        batch = super().batch(step, positions, loaded)
        beta = torch.tensor([rng.random() for rng in batch.rngs], dtype=torch.float32)
        null = batch.y == self.config.num_classes
        batch.more["beta"] = torch.where(null, 1.0, to_device(beta, self.device))
        return batch
