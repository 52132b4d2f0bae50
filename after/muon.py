"""Orthogonal steps for the matrices of the transformer blocks.          [after the paper: Muon, 2502.16982]

    m = 0.95 m + 0.05 g      momentum of the gradient g
    u = 0.05 g + 0.95 m      Nesterov's look ahead; its singular value decomposition: u = U S V^T
    W = W - lr * 0.2 sqrt(max(rows, columns)) U V^T

All directions in which a matrix acts are learnt at one pace, where AdamW's steps are mostly along few of
them. The factor gives a step the root mean square of AdamW's, so that learning rates carry over. All else
(embeddings, heads, biases, norms, tokens, adaLN) is left to AdamW.

torch.optim.Muon rounds to bfloat16, which takes a processor without bfloat16 products ten times as long;
here the products are float32, and matrices of one shape share them.
To remove it: this file, the fields `muon`, and the lines with `muon`.
"""
import torch
from torch import Tensor

MOMENTUM = 0.95                                         # [Jordan et al. 2024], as are the coefficients below


def orthogonal(u: Tensor, steps=5) -> Tensor:
    """U V^T of matrices u = U S V^T, (..., rows, columns) float32: singular values between 0.7 and 1.2.

    Newton-Schulz: each step maps singular values s to 3.4445 s - 4.775 s^3 + 2.0315 s^5.
    """
    if u.shape[-2] > u.shape[-1]:
        return orthogonal(u.mT, steps).mT                                       # the smaller Gram matrix
    x = u / (torch.linalg.matrix_norm(u, keepdim=True) + 1e-7)                  # s <= 1
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def split_blocks(named: list) -> tuple:
    """[(name, parameter)] in two: matrices of transformer blocks [parameter], and the rest as it came."""
    matrix = lambda name, p: p.ndim == 2 and "block" in name and "adaLN" not in name
    return [p for name, p in named if matrix(name, p)], [(n, p) for n, p in named if not matrix(n, p)]


class Muon(torch.optim.AdamW):
    """AdamW, but a group with "muon" takes the steps above, at so many times the learning rate."""

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in groups:
            if "muon" in group:
                self.orthogonal_step(group)
        self.param_groups = [group for group in groups if "muon" not in group]
        super().step()
        self.param_groups = groups

    def orthogonal_step(self, group):
        lr, shapes = group["muon"] * group["lr"], {}
        for p in group["params"]:
            if p.grad is not None:
                if not self.state[p]:                            # "step": AdamW asks for it when it is loaded
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, MOMENTUM)))
        for shape, pairs in shapes.items():
            matrices, updates = zip(*pairs)
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, orthogonal(torch.stack(updates)).unbind(),
                                alpha=-lr * 0.2 * max(shape) ** 0.5)
