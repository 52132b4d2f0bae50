"""Orthogonal steps for the matrices of the transformer blocks.
                              [after the paper: Muon, Jordan et al. 2024; scaled as in Moonlight, 2502.16982]

    train_tokenizer.py --add muon --muon 2

    m = 0.95 m + 0.05 g      momentum of the gradient g
    u = 0.05 g + 0.95 m      Nesterov's look ahead; its singular value decomposition: u = U S V^T
    W = W - k lr (0.2 sqrt(max(rows, columns)) U V^T + weight_decay W)                            k: `muon`

All directions in which a matrix acts are learned at the same pace; AdamW's steps lie mostly along a few of
them. With the factor, a step has about the root mean square of AdamW's, 0.2, so AdamW's learning rate is a
good start; 2 to 4 times that was better here. All other parameters (embeddings, heads, biases, norms, tokens,
modulation) are trained by AdamW.

torch.optim.Muon rounds to bfloat16, which takes ten times as long on a processor without bfloat16 products.
Here products are in the run's --dtype, and matrices of the same shape are multiplied together.
To remove it: delete this file.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from common import Weight
from runtime.processes import autocast_dtype

MOMENTUM = 0.95                                         # [Jordan et al. 2024], as are the coefficients below


def orthogonal(u: Tensor, steps=5) -> Tensor:
    """Approximately U V^T of matrices u = U S V^T, (n, rows, columns) float32 or bfloat16.

    Newton-Schulz: each step maps singular values s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five steps bring
    those above 0.002 of u's norm to 0.68 ... 1.2; much smaller ones stay small.
    """
    if u.shape[-2] > u.shape[-1]:
        return orthogonal(u.mT, steps).mT                                       # the smaller Gram matrix
    x = u / (torch.linalg.matrix_norm(u, keepdim=True) + 1e-7)                  # s <= 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but groups with "muon" take the steps above, at that multiple of their learning rate."""
    dtype = torch.float32                                                        # of the products

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "muon" in group:
                self.orthogonal_step(group)
                for p in group["params"]:
                    p.grad = None                                                # AdamW skips these
        super().step()

    def orthogonal_step(self, group):
        lr, shapes = group["muon"] * group["lr"], {}
        for p in group["params"]:
            if p.grad is not None:
                if not self.state[p]:                            # "step": AdamW needs it to load the state
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                shapes.setdefault(p.shape, []).append(p)
        for shape, matrices in shapes.items():
            gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            steps = orthogonal(updates.to(self.dtype)).to(updates.dtype)
            torch._foreach_add_(matrices, steps.unbind(), alpha=-lr * 0.2 * max(shape) ** 0.5)


def with_muon(adamw, model, times: float, dtype: torch.dtype):
    """A Muon optimizer of the same parameter groups, in which the matrices of the transformer blocks have
    their own group with "muon": times, and products in `dtype`. adamw itself if `model` has no such matrices
    (a discriminator)."""
    blocks = {p for name, p in model.named_parameters()
              if p.requires_grad and p.ndim == 2 and "block" in name and "modulation" not in name}
    if not blocks:
        return adamw
    first, defaults = adamw.param_groups[0], adamw.defaults                     # first: the group with decay
    groups = [dict(params=[p for p in group["params"] if p not in blocks], weight_decay=group["weight_decay"])
              for group in adamw.param_groups]
    matrices = [p for p in model.parameters() if p in blocks]
    groups.append(dict(params=matrices, weight_decay=first["weight_decay"], muon=times))
    muon = Muon(groups, lr=defaults["lr"], betas=defaults["betas"], fused=defaults["fused"])
    muon.dtype = dtype
    return muon


class AddToTokenizer:
    """See common.attach."""
    @dataclass
    class Config:
        # ---- Muon ----
        muon: Weight = 2.0           # the blocks' matrices train with Muon, at this multiple of lr

    def optimizer(self, model):
        dtype = autocast_dtype(self.config.dtype, self.device, self.config.width)
        return with_muon(super().optimizer(model), model, self.config.muon, dtype)


class AddToDiffusion(AddToTokenizer):
    """The same for train_diffusion.py."""
