"""Average velocities, for sampling in 1, 2 or 4 steps.               [after the paper: MeanFlow, 2505.13447]

    u(x_t, r, t) = 1/(t - r) * integral of v from r to t,  so  x_r = x_t - (t - r) u in one step of any length

Differentiated by t along the path, with r fixed:  u = v - (t - r) du/dt.  The right side, with the model's
own u in the derivative and no gradient through it, is the target. Where r = t it is v: ordinary flow
matching, for most of the samples. The model is told t and t - r.
Data at t = 0, noise at t = 1; linear path. The derivative needs attention's math kernel: torch 2.13 has no
forward-mode differentiation of the fused ones. Guidance mixes two average velocities as it does two others
[ours; MeanFlow trains with it].
To remove it: this file, the field `mean_flow`, and the lines with that name, `span` or `average`.
"""
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def draw_spans(rngs: list, t: Tensor, other: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """(t, t - r), (B,) each, from two draws of times (B,): r <= t,
    and r = t but for `part` of the samples."""
    apart = torch.tensor([rng.random() < part for rng in rngs])
    later, earlier = torch.maximum(t, other), torch.minimum(t, other)
    return torch.where(apart, later, t), torch.where(apart, later - earlier, 0.0)


@torch.no_grad()
def mean_flow_target(model, x_t: Tensor, v: Tensor, t: Tensor, y: Tensor, span: Tensor) -> Tensor:
    """v - (t - r) du/dt, (B, L, C) float32. x_t, v: (B, L, C); t, span = t - r: (B,).

    du/dt is one Jacobian-vector product: along (v, 1, 1) in (x_t, t, t - r), as r stands still.
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
