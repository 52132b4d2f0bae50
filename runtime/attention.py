"""Softmax attention. A reader of the paper need not open this file."""
import torch
import torch.nn.functional as F

LONGEST = 384                                          # tokens; beyond, the matrix of weights costs more


def attention(q, k, v):
    """softmax(q k^T / sqrt(hs)) v of (B, nh, T, hs) each: PyTorch's kernel, which never holds the (T, T)
    weights. Only for its gradient in bfloat16 on CPUs, which takes 1.5 times (384 tokens) to 10 times (16)
    as long as these products, they are written out (docs/speed.md)."""
    if (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
            and max(q.shape[-2], k.shape[-2]) <= LONGEST):
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).float().softmax(-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
