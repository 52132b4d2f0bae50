"""REPA: a middle layer of the diffusion model predicts a frozen teacher's patch features.
                                                                [rebuttal; Yu et al. 2024, arXiv:2410.06940]

    python train_diffusion.py --add repa --no-cache --preset sit-xl --tokenizer RUN --data IMAGENET

    image --teacher--> f (B, N, D_teacher)
    x_t --blocks 1 ... k--> tokens (B, L, D) --head--> f^         loss: velocity's - repa_weight * cos(f^, f)

For 2D latents token n belongs to patch n; MAETok's L tokens belong to none. Two heads:
    decoder   a decoder of the tokenizer's kind, one block deep: queries at the patches attend to the tokens,
              as in [Eq. 7]. [ours: the rebuttal does not say]
    mlp       three layers on each token, as for 2D latents [REPA]; token l then answers for the N/L patches
              from l N/L on, although it does not belong to them [the authors' REPA code for 1D latents]

The head is used in training only. Sampling needs neither this file nor the teacher. To remove it: delete it.
"""
import dataclasses
import math
from dataclasses import dataclass

from common import Count, UserError, Weight, check_choices, split_names    # before torch

import torch
import torch.nn as nn
import torch.nn.functional as F

from frozen.pretrained import TEACHERS, load_teacher
from maetok import Decoder, new_weights
from runtime.processes import faster_products

MLP_WIDTH = 2048                                                                                    # [REPA]


class MLPHead(nn.Module):
    """Tokens (B, L, D) -> (B, N, dim). Raises UserError if L does not divide N."""

    def __init__(self, num_patches, num_latents, width, dim):
        super().__init__()
        self.patches_per_token, rest = divmod(num_patches, num_latents)
        if rest:
            raise UserError(f"--repa-head mlp: {num_latents} tokens do not divide the {num_patches} patches; "
                            "choose decoder")
        self.layers = nn.Sequential(nn.Linear(width, MLP_WIDTH), nn.SiLU(), nn.Linear(MLP_WIDTH, MLP_WIDTH),
                                    nn.SiLU(), nn.Linear(MLP_WIDTH, dim))

    def forward(self, tokens):
        return self.layers(tokens).repeat_interleave(self.patches_per_token, 1)


class DecoderHead(Decoder):
    """Tokens (B, L, D) -> (B, N, dim)."""

    def __init__(self, grid, tokenizer_config, width, dim):
        super().__init__(dataclasses.replace(tokenizer_config, latent_dim=width), depth=1, out_dim=dim)
        self.grid = grid
        new_weights(self)

    def forward(self, tokens):
        return super().forward(tokens, self.grid)


class Repa(nn.Module):
    """`network` with a head on the tokens after block `after` of `model`, the diffusion model in it.
    `features`: the head's output of the last forward pass."""

    def __init__(self, network, model, after, head):
        super().__init__()
        self.network, self.head = network, head
        model.blocks[after - 1].register_forward_hook(self.keep)

    def keep(self, block, inputs, tokens):
        if torch.is_grad_enabled():                # another extra may call the model a second time, without
            self.tokens = tokens

    def forward(self, x_t, t, y, **more):
        v = self.network(x_t, t, y, **more)
        self.features = self.head(self.tokens)
        return v


class AddToDiffusion:
    """See common.attach."""

    @dataclass
    class Config:
        # ---- REPA (variants/repa.py) ----
        repa: str = "dinov2-l"        # the teacher [rebuttal]
        repa_weight: Weight = 0.5     # of that loss, -cos [REPA]
        repa_block: Count = 8         # after so many blocks [REPA: 8 of 28]
        repa_head: str = "decoder"    # from tokens to patches: decoder [ours] or mlp [authors' REPA code]
        weights_dir: str = ""         # folder of the teacher's file; else torch hub's cache, else download

        def __post_init__(self):
            super().__post_init__()
            check_choices(self, repa=TEACHERS, repa_head=("decoder", "mlp"))
            if self.cache:
                raise UserError("--add repa needs the images: add --no-cache")
            if "usit" in split_names(self.add) or self.repa_block > self.depth:
                raise UserError(f"--add repa reads tokens after --repa-block of 1 to {self.depth} blocks "
                                "of sit or lightningdit")

    def __init__(self, config, tokenizer, device):
        super().__init__(config, tokenizer, device)
        self.teacher = load_teacher(config.repa, tokenizer.config.patch_size, config.weights_dir, device)

    def network(self, model):
        c, image = self.config, self.tokenizer.config
        grid = self.tokenizer.grid((image.image_size,) * 2)
        head = (DecoderHead(grid, image, c.width, self.teacher.dim) if c.repa_head == "decoder" else
                MLPHead(math.prod(grid), c.num_latents, c.width, self.teacher.dim))
        self.others["repa_head"] = faster_products(head).to(self.device)
        self.repa = Repa(super().network(model), model, c.repa_block, head)
        return self.repa

    def objective(self, prediction, x_t, v, batch):
        loss, losses, terms = super().objective(prediction, x_t, v, batch)
        found, features = self.repa.features.float(), self.teacher(batch.images)             # (B, N, dim)
        terms["repa"] = -F.cosine_similarity(found, features, dim=-1).mean(1).mean()
        return loss + self.config.repa_weight * terms["repa"], losses, terms
