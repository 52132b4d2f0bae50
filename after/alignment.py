"""Latents aligned with a frozen teacher's features.                     [after the paper: VA-VAE, 2501.01423]

The tokenizer that the paper compares with throughout (Fig. 2, Table 13a): a KL-VAE with one latent for
each patch, whose linear image z' = W z shall point where the teacher's feature f of that patch does,
and whose patches shall be as similar to one another as the teacher's. Both only up to a margin, which
leaves room for the pixels:

    mean over patches i   of  relu(1 - 0.5 - cos(z'_i, f_i))
    + mean over pairs i, j of  relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - 0.25)

Weight 0.1 times the adaptive weight at the encoder's last layer.
To remove it: this file, the fields and the row `align...` and `va-vae`, and the lines with `align`.
"""
import torch.nn.functional as F
from torch import Tensor

from frozen.pretrained import TEACHERS


def check_alignment(config) -> None:
    """Raise ValueError for a tokenizer config (--align TEACHER) that cannot be aligned."""
    if config.align and config.align not in TEACHERS:
        raise ValueError(f"--align {config.align}: choose {', '.join(TEACHERS)}")
    if config.align and config.learnable_latents:
        raise ValueError("--align compares latent n with patch n: add --no-learnable-latents")


def alignment_loss(aligned: Tensor, features: Tensor, cosine_margin=0.5, distance_margin=0.25) -> Tensor:
    """The two terms above, a float32 scalar. aligned: W z, and features: the teacher's, (B, N, D) each."""
    z, f = (F.normalize(x.float(), dim=-1) for x in (aligned, features))
    towards = (1 - cosine_margin - (z * f).sum(-1)).relu().mean()                           # over (B, N)
    among = ((z @ z.mT - f @ f.mT).abs() - distance_margin).relu().mean()                   # over (B, N, N)
    return towards + among
