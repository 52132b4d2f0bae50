"""Latents aligned with a frozen teacher's features.                     [after the paper: VA-VAE, 2501.01423]

    train_tokenizer.py --preset maetok-b-256,va-vae --add alignment

This is the tokenizer that the paper compares with throughout (Fig. 2, Table 13a): a KL-VAE with one latent
per patch. A linear map z' = W z of the latents should point in the direction of the teacher's feature f of
the same patch, and patches should be as similar to one another as the teacher's are. Both hold only up to a
margin, which leaves freedom for the pixels:

    mean over patches i   of  relu(1 - 0.5 - cos(z'_i, f_i))
    + mean over pairs i, j of  relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - 0.25)

Its weight is 0.1 times the adaptive weight at the encoder's last layer.
To remove it: delete this file.
"""
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import UserError, Weight
from frozen.pretrained import TEACHERS
from losses import PERCEP_WARMUP, TeacherTarget, adaptive_weight


def alignment_loss(aligned: Tensor, features: Tensor, cosine_margin=0.5, distance_margin=0.25) -> Tensor:
    """The two terms above, a float32 scalar. aligned: W z, and features: the teacher's, (B, N, D) each."""
    z, f = (F.normalize(x.float(), dim=-1) for x in (aligned, features))
    towards = (1 - cosine_margin - (z * f).sum(-1)).relu().mean()                           # over (B, N)
    among = ((z @ z.mT - f @ f.mT).abs() - distance_margin).relu().mean()                   # over (B, N, N)
    return towards + among


class LinearOfLatents(nn.Linear):
    """W: an auxiliary "decoder" that maps each latent by itself."""

    def forward(self, latents, grid):
        return super().forward(latents)                                                     # (B, N, D)


class AlignmentTarget(TeacherTarget):
    """The teacher's features of every patch, hidden or not, predicted from the latent of the same patch."""

    def __init__(self, name, config, device):
        super().__init__(name, config, device)
        self.weight = 0.0                           # the adaptive weight needs the other terms: see objective

    def decoder(self, model):
        return LinearOfLatents(model.config.latent_dim, self.dim)

    def loss(self, prediction, y, mask):
        return alignment_loss(prediction, y)

    def constant_loss(self, targets, masks):
        """Of the mean direction of all features, a good constant although not exactly the best one."""
        mean = sum(F.normalize(y, dim=-1).sum((0, 1)) for y in targets)                     # (D,)
        losses = [self.loss(mean.expand_as(y), y, None) * len(y) for y in targets]
        return sum(losses) / sum(len(y) for y in targets)


class AddToTokenizer:
    """See common.attach. The target is called "align"; it exists in stage 1 only, as all auxiliary
    targets."""
    PRESETS = {"va-vae": dict(mask_low=0.0, mask_high=0.0, targets="", variational=True,
                              learnable_latents=False)}                                  # [Fig. 2, Table 13a]

    @dataclass
    class Config:
        # ---- alignment ----
        align: str = "dinov2-l"      # teacher whose patch features the latents are aligned with [VA-VAE]
        align_weight: Weight = 0.1   # of the alignment loss, times its adaptive weight [VA-VAE]

        def __post_init__(self):
            super().__post_init__()
            if self.align not in TEACHERS:
                raise UserError(f"--align {self.align}: choose {', '.join(TEACHERS)}")
            if self.learnable_latents:
                raise UserError("--add alignment compares latent n with patch n: add --no-learnable-latents, "
                                "or the preset va-vae")
            if self.compile:
                raise UserError("--add alignment needs a gradient from the middle of the model, which "
                                "--compile does not give")

    def __init__(self, config, device):
        super().__init__(config, device)
        if config.stage != "2" or not config.init:                    # as the core's
            self.targets["align"] = AlignmentTarget(config.align, config, device)

    def objective(self, step, batch, output, model):
        loss, terms = super().objective(step, batch, output, model)
        if "align" in terms:
            reconstruction = terms["recon"]
            if "percep" in terms:
                ramp = self.config.percep_weight * min(1.0, step / PERCEP_WARMUP)
                reconstruction = reconstruction + ramp * terms["percep"]
            weight = adaptive_weight(reconstruction, terms["align"], model.encoder.to_latent.weight)
            loss = loss + self.config.align_weight * weight * terms["align"]
        return loss, terms
