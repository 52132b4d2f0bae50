"""Average velocities, for sampling in 1, 2 or 4 steps.               [after the paper: MeanFlow, 2505.13447]

    python train_diffusion.py --add mean_flow --tokenizer RUN
    python sample.py --ckpt RUN --sampler euler --steps 4

    u(x_t, r, t) = 1/(t - r) * integral of v from r to t,  so  x_r = x_t - (t - r) u in one step of any length

Differentiated by t along the path, with r fixed:  u = v - (t - r) du/dt.  The right side is the target, with
the model's own u in the derivative and no gradient through it. For most samples r = t, and the target is v:
ordinary flow matching. The model is told t and t - r, the span.

Data at t = 0, noise at t = 1; linear path. The derivative needs attention's math kernel: torch 2.13 has no
forward-mode differentiation of the fused ones. Guidance mixes two average velocities as it does two others
[ours; MeanFlow trains with it].
To remove it: delete this file.
"""
from dataclasses import dataclass

from common import Share, UserError, split_names    # before torch, see runtime/processes.py

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow import SAMPLERS, precise
from runtime.processes import to_device
from sit import TimestepEmbedder


def draw_spans(apart: Tensor, t: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(t, t - r), (B,) each, from two draws of times (B,): r <= t, and r = t where `apart` (B,) is False."""
    later, earlier = torch.maximum(t, other), torch.minimum(t, other)
    return torch.where(apart, later, t), torch.where(apart, later - earlier, 0.0)


@torch.no_grad()
def mean_flow_target(model, x_t: Tensor, v: Tensor, t: Tensor, y: Tensor, span: Tensor) -> Tensor:
    """v - (t - r) du/dt, (B, L, C) float32. x_t, v: (B, L, C); t, span = t - r: (B,).

    du/dt is one Jacobian-vector product: along (v, 1, 1) in (x_t, t, t - r), as r is fixed.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x_t.device.type, enabled=False):
        # forward, not the call: neither torch.compile nor DDP take part in a product without gradient.
        u = lambda x, t, span: model.forward(x, t, y, span=span).float()
        _, change = torch.func.jvp(u, (x_t, t, span), (v, torch.ones_like(t), torch.ones_like(span)))
    return v - span[:, None, None] * change


def adaptive_weights(losses: Tensor, c: float = 1e-3) -> Tensor:
    """1 / (|error|^2 + c) of each sample, (B,) without gradient: MeanFlow's 1 / (.)^p with p = 1. A target
    with a large derivative in it then counts as much as any other."""
    return 1 / (losses.detach() + c)


@torch.no_grad()
def average_euler(velocity, x, times):
    """flow.euler with the average velocity of each step, which leaves no error of the step's length."""
    dtype, x = x.dtype, precise(x)
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, t, span=t - t_next).to(x)
    return x.to(dtype)


class AddToDiffusion:
    """See common.attach."""

    @dataclass
    class Config:
        # ---- average velocities (after/mean_flow.py) ----
        mean_flow: Share = 0.25      # part of the samples that learn an average velocity [MeanFlow]

        def __post_init__(self):
            super().__post_init__()
            added, path = getattr(self, "add", ""), getattr(self, "path", "linear")    # a trainer's config's
            others = {"lightningdit", "usit", "guidance_free", "repa"} & {*split_names(added)}
            if others or path != "linear":
                raise UserError("--add mean_flow is for sit on the linear path, not with "
                                + (" or ".join(sorted(others)) or f"--path {path}"))

    class Model:
        samplers = SAMPLERS | {"euler": average_euler}

        def build_embedders(self):
            super().build_embedders()
            self.span_embedder = TimestepEmbedder(self.config.width)

        def condition(self, t, y, span=None, **more):
            """span: (B,) float in [0, 1], t - r of an average velocity; None: 0, the velocity at t."""
            return (super().condition(t, y, **more)
                    + self.span_embedder(torch.zeros_like(t) if span is None else span))

    def network(self, model):
        self.model = model
        return super().network(model)

    def batch(self, step, positions, loaded):
        batch = super().batch(step, positions, loaded)
        other = to_device(self.draw_times(batch.rngs), self.device)
        apart = torch.tensor([rng.random() < self.config.mean_flow for rng in batch.rngs])
        t, batch.more["span"] = draw_spans(to_device(apart, self.device), batch.t, other)
        return batch._replace(t=t)

    def objective(self, prediction, x_t, v, batch):
        v = mean_flow_target(self.model, x_t, v, batch.t, batch.y, batch.more["span"])
        _, losses, terms = super().objective(prediction, x_t, v, batch)
        return (adaptive_weights(losses) * losses).mean(), losses, terms
