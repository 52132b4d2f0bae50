"""Orthogonal steps for the matrices of the transformer blocks.
                              [after the paper: Muon, Jordan et al. 2024; scaled as in Moonlight, 2502.16982]

    m = 0.95 m + 0.05 g      momentum of the gradient g
    u = 0.05 g + 0.95 m      Nesterov's look ahead; its singular value decomposition: u = U S V^T
    W = W - k lr (0.2 sqrt(max(rows, columns)) U V^T + weight_decay W)                            k: `muon`

All directions in which a matrix acts are learnt at one pace, where AdamW's steps are mostly along few of
them. With the factor a step has about the root mean square of AdamW's, 0.2, so that its learning rate is a
good start; 2 to 4 times it was better here. All else (embeddings, heads, biases, norms, tokens, modulation)
is left to AdamW.

torch.optim.Muon rounds to bfloat16, which takes a processor without bfloat16 products ten times as long;
here the products are float32 (TF32 on CUDA), and matrices of one shape share them.
To remove it: this file, the fields `muon`, and the lines with `muon`.
"""
import torch
from torch import Tensor

MOMENTUM = 0.95                                         # [Jordan et al. 2024], as are the coefficients below


def orthogonal(u: Tensor, steps=5) -> Tensor:
    """U V^T, nearly, of matrices u = U S V^T, (..., rows, columns) float32.

    Newton-Schulz: each step maps singular values s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five bring those
    above 0.002 of u's norm to 0.68 ... 1.2; what is much smaller stays small.
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
    matrix = lambda name, p: p.ndim == 2 and "block" in name and "modulation" not in name
    return [p for name, p in named if matrix(name, p)], [(n, p) for n, p in named if not matrix(n, p)]


class Muon(torch.optim.AdamW):
    """AdamW, but a group with "muon" takes the steps above, at that multiple of its learning rate."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "muon" in group:
                self.orthogonal_step(group)
                for p in group["params"]:
                    p.grad = None                                                # AdamW passes over these
        super().step()

    def orthogonal_step(self, group):
        lr, shapes = group["muon"] * group["lr"], {}
        for p in group["params"]:
            if p.grad is not None:
                if not self.state[p]:                            # "step": AdamW asks for it when it is loaded
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                shapes.setdefault(p.shape, []).append(p)
        for shape, matrices in shapes.items():
            gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, orthogonal(updates).unbind(), alpha=-lr * 0.2 * max(shape) ** 0.5)
