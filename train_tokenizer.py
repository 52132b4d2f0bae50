"""Train the tokenizer: masked modelling, then the pixel decoder alone.   [Sec. 3.2, 3.3, 4.1, Table 7]

    python train_tokenizer.py                           # laptop: drawn shapes, a few minutes on two cores
    python train_tokenizer.py --preset cifar10          # CIFAR-10 at 32 px
    python train_tokenizer.py --preset cifar10,vae      # an ablation row at that scale
    # the paper, on one node; with --nnodes and a rendezvous (README) on several:
    torchrun --nproc-per-node=8 train_tokenizer.py --preset maetok-b-256 --data /data/imagenet

The same command resumes from the last checkpoint, with any number of processes.
"""
import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see there

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from after.alignment import alignment_loss
from after.latent_noise import draw_noise
from after.muon import Muon, split_blocks
from after.nested_dropout import draw_lengths
from common import (Count, Decay, Keep, Positive, Seed, Share, UserError, Weight, Whole, Workers,
                    sample_rng, step_rngs)
from data import GlobalBatches, build_dataset, collate, some_images, to_float, to_uint8
from hog import hog_dim, hog_features, hog_picture
from losses import (adaptive_weight, auxiliary_loss, build_objective, compute_targets, distance, draw_views,
                    generator_loss)
from maetok import (Block, MAETok, MAETokConfig, Transformer, kl_divergence, mask_out, masked_feature_loss,
                    random_mask, tokenizer_of)
from maetok import load_tokenizer  # noqa: F401   (for old imports)
from pictures.draw import image_grid, plot_curves
from metrics import psnr
from frozen.pretrained import TEACHERS
from variants.text import CLIP_TOKENS, TextTarget, text_loss


@dataclass
class Config(MAETokConfig):
    """Everything a run depends on. The defaults are the paper's 256-px tokenizer [Table 7];
    presets change them."""
    # ---- run ----
    preset: str = "shapes"       # names joined by commas, later ones win; see PRESETS in this file
    out: str = ""                # folder of the run (default: runs/tokenizer-PRESET)
    stage: str = "both"          # both, 1 (masked training) or 2 (decoder only, from --init or a stage 1)
    init: str = ""               # start from the EMA weights of this checkpoint or run folder
    seed: Seed = 0               # of weights, data order, augmentation, masks and noise
    device: str = "auto"         # auto, cpu, cuda or mps
    dtype: str = "auto"          # autocast: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    compile: bool = False        # torch.compile the model; pays off on GPUs in runs longer than some minutes
    checkpointing: bool = False  # less memory, more time: the backward pass computes blocks and losses again
    ema_device: str = "auto"     # where the averaged weights are kept: auto (beside the model) or cpu
    workers: Workers = -1        # loader processes for each training process; -1: 8 on CUDA, none elsewhere
    # ---- data ----
    data: str = ""               # shapes, captioned-shapes, cifar10, a folder or an .npz file; see data.py
    data_root: str = "data"      # where cifar10 is looked for and downloaded to
    mixed_size: Whole = 0        # px of a second size, which every other step trains at [Table 13b]; 0: none
    flip: bool = True            # random horizontal flip [Table 7]
    crop: str = "center"         # center [Table 7] or random, 80-100 % of the short side [released code]
    skip_corrupt: bool = False   # pass over unreadable images and count them, instead of stopping
    # ---- masked modelling ----
    targets: str = (             # auxiliary targets [Table 1b]: hog, text, frozen teachers; empty: none
        "hog,dinov2-l,siglip-l")
    aux_loss: str = "mse"      # mse [Eq. 8], cosine, or mixed: hog by mse, teachers by cosine [released code]
    aux_weight: Weight = 1.0     # of the auxiliary losses; the paper gives none, 1.0 [released code]
    hog_cell: Count = 8          # px [MaskFeat]; small images want smaller cells
    text_weight: Weight = 1.0    # of the captions' cross-entropy [ours: the paper gives none]
    text_vocab: str = "clip"     # clip, its 49,408 sub-words [Sec. 4.1], or words of the captions [ours]
    text_words: Count = 1000     # how many, for words
    mask_low: Share = 0.4        # smallest mask ratio [Sec. 4.1, Table 1c]
    mask_high: Share = 0.6       # largest mask ratio; 0 for a plain AE
    # The released code has one ratio per batch, from normal(0.6, 0.25) cut to [low, high].
    mask_draw: str = "uniform"   # uniform, per image [ours], or normal, per step [released code]
    teachers_as: str = (         # published, or released: ImageNet's mean and std, exact GELU [released code]
        "published")
    kl_weight: Weight = 1e-6     # of a KL-VAE's divergence [released code]
    # ---- perceptual and adversarial loss ----
    percep_weight: Weight = 1.0  # lambda_1 of LPIPS [Eq. 6, Table 7]; 0 needs no VGG weights
    percep_warmup: Whole = 10_000  # steps in which it grows from 0 [released code]
    disc: str = "dino"           # dino (heads on a frozen DINO-S/16), patch (needs no weight files) or none
    disc_weight: Weight = 0.4    # lambda_2, times the adaptive weight [Eq. 6, Table 7]
    disc_start: Whole = 30_000   # step, counted through both stages, at which the GAN begins [Table 7]
    disc_lr: Weight = 1e-4       # peak, on the tokenizer's schedule; the paper is silent
    disc_loss_weight: Weight = 1.0  # of hinge and LeCAM in the discriminator's own loss; released code: 0.4
    lecam: Weight = 1e-3         # weight of the LeCAM term in the discriminator's loss [Table 7]
    diffaug: bool = False        # differentiable augmentation of what it sees; on in the released code
    consistency: Weight = 0.0    # weight of equal logits for harshly augmented views; released code: 4.0
    weights_dir: str = ""        # folder of the frozen networks' files; else torch hub's cache, else download
    random_frozen: bool = False  # FOR TESTS ONLY: frozen networks with random weights, nothing downloaded
    # ---- optimisation ----
    steps: Count = 500_000       # of stage 1 [Table 7]; the ablations of Tables 1, 6 and 13 use 250,000
    batch_size: Count = 512      # images per step over all processes [Table 7]
    accumulate: Count = 1        # forward passes per step, for batches that do not fit the device
    lr: Positive = 1e-4          # peak [Table 7 "base learning rate", taken as it is]; released code: 2e-4
    lr_start: Weight = 0.0       # at the first step of the warm-up; released code: 1e-5
    lr_end: Weight = 0.0         # at the end of the cosine; released code: 2e-5
    warmup: Whole = 10_000       # steps [Table 7]
    cosine_from: str = (      # where the cosine begins: warmup, at its end, or start, step 0 [released code]
        "warmup")
    beta1: Decay = 0.9           # AdamW [Table 7]
    beta2: Decay = 0.95          # AdamW [Table 7]
    weight_decay: Weight = 1e-4  # on the matrices of linear layers only [Table 7]
    clip: Positive = 1.0         # largest gradient norm [released code]
    ema: Decay = 0.9999          # decay [released code]
    # Without it small runs would average over their random start.
    ema_warmup: bool = True      # smaller decay in the first steps [ours; released code: none]
    # ---- stage 2 ----
    stage2_steps: Whole = 50_000  # decoder fine-tuning with the encoder frozen [Sec. 4.1]
    stage2_mask: Share = 0.6     # mask ratio at its start, falling linearly to 0 [Sec. 4.1]
    # After the ramp, if it ends early, stage 2 trains on clean images, as Sec. 3.3 has it from the start.
    stage2_ramp: Share = 1.0     # part of stage 2 in which the mask ratio falls to 0 [Sec. 4.1: all of it]
    stage2_lr: Positive = 1e-4   # peak; the paper is silent
    stage2_warmup: Whole = 1000  # steps [ours]
    # ---- after the paper, all off: docs/after.md ----
    latent_noise: Weight = 0.0   # stage 2: noise on the decoder's latents, in their deviations; RAE: 0.8
    muon: Weight = 0.0           # > 0: the blocks' matrices train with Muon, at so many times lr
    nested_dropout: bool = False  # decode from the first 1, 2, 4 ... L tokens, drawn per image [FlexTok]
    align_weight: Weight = 0.1   # of the loss of --align, times its adaptive weight [VA-VAE]
    # ---- logs ----
    log_every: Count = 100       # steps between lines of metrics.jsonl
    save_every: Count = 5000     # steps between checkpoints
    keep: Keep = 3               # numbered checkpoints that stay, at least 2
    keep_every: Whole = 0        # and all whose step is a multiple of this; 0: none
    grid_every: Whole = 500      # steps between pictures; 0 for none
    eval_images: Count = 1000    # test images for PSNR at the end of each stage
    latent_images: Count = 10_000  # training images for the latents' mean and standard deviation

    def __post_init__(self):
        super().__post_init__()
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        if unknown := set(names) - {"hog", "text", *TEACHERS}:
            raise UserError(f"unknown auxiliary target {', '.join(sorted(unknown))}; there are: "
                            f"hog, text, {', '.join(TEACHERS)}")
        self.aux_targets = {name: hog_dim(self.patch_size, self.hog_cell) if name == "hog"
                            else (CLIP_TOKENS if self.text_vocab == "clip" else self.text_words)
                            if name == "text" else TEACHERS[name].dim for name in names}
        self.out = self.out or f"runs/tokenizer-{self.preset.replace(',', '-')}"
        random_mask([], 1, self.mask_low, self.mask_high)                             # these check the ranges
        random_mask([], 1, self.stage2_mask, self.stage2_mask)
        for name, value, choices in (("stage", self.stage, ("both", "1", "2")),
                                     ("crop", self.crop, ("center", "random")),
                                     ("aux-loss", self.aux_loss, ("mse", "cosine", "mixed")),
                                     ("disc", self.disc, ("none", "dino", "patch")),
                                     ("cosine-from", self.cosine_from, ("warmup", "start")),
                                     ("text-vocab", self.text_vocab, ("clip", "words")),
                                     ("teachers-as", self.teachers_as, ("published", "released")),
                                     ("mask-draw", self.mask_draw, ("uniform", "normal"))):
            if value not in choices:
                raise UserError(f"--{name} {value}: choose {' or '.join(choices)}")
        if self.align and self.compile:
            raise UserError("--align asks for a gradient in the middle of the model, which --compile has not")
        if self.nested_dropout and not self.learnable_latents:
            raise UserError("--nested-dropout orders learnable latents; "
                            "image tokens have their places already")
        if self.mixed_size and (self.mixed_size % self.patch_size or not self.learnable_latents):
            raise UserError(f"--mixed-size {self.mixed_size} must be a multiple of the patch, "
                            f"{self.patch_size} px, and needs learnable latents, whose number is the same "
                            "for all sizes")


# The scale of a run. The first is the default.
_NO_FROZEN = dict(targets="hog", percep_weight=0.0, disc="none")    # the small scales need no weight files
SCALES = {
    "shapes": dict(**_NO_FROZEN, data="shapes", image_size=32, patch_size=8, width=96, heads=4,
                   encoder_depth=3, decoder_depth=3, num_latents=16, latent_dim=16, aux_depth=1, hog_cell=4,
                   flip=False,
                   steps=4000, batch_size=32, lr=3e-3, warmup=100, ema=0.998, stage2_steps=3000,
                   stage2_ramp=0.3, stage2_lr=3e-3, stage2_warmup=50,
                   log_every=50, save_every=500),
    "cifar10": dict(**_NO_FROZEN, data="cifar10", image_size=32, patch_size=4, width=96, heads=3,
                    encoder_depth=3, decoder_depth=2, num_latents=32, latent_dim=16, aux_depth=2, hog_cell=4,
                    aux_weight=3.0, steps=60_000,
                    batch_size=32, lr=3e-3, warmup=200, ema=0.998, stage2_steps=20_000, stage2_ramp=0.3,
                    stage2_lr=3e-3, stage2_warmup=100, log_every=50, save_every=500),
    # Between the two: ViT-S at 64 px, for a GPU of 24 GB and half a day, see docs/running.md. [ours]
    "imagenet64": dict(image_size=64, patch_size=8, width=384, heads=6, num_latents=64, hog_cell=4,
                       targets="hog", disc="patch", disc_start=20_000, percep_warmup=2000, steps=80_000,
                       batch_size=256, lr=3e-4, warmup=2000, ema=0.9995, stage2_steps=15_000),
    "maetok-b-256": dict(),                                                            # Table 7: the defaults
    "maetok-b-512": dict(image_size=512),                                              # Table 7
    # What the released code does instead, as far as one value can say it
    # (docs/paper-and-code.md).
    "maetok-b-256-released": dict(rope="mixed", ape="encoder", class_token=True, layer_scale=1e-5,
                                  latent_modulation=True, aux_width=192, aux_heads=3, mask_draw="normal",
                                  crop="random", lr=2e-4, lr_start=1e-5, lr_end=2e-5, warmup=5004,
                                  steps=500_400, weight_decay=0.0, targets="hog,dinov2-l,siglip-so400m",
                                  aux_loss="mixed", teachers_as="released", diffaug=True, consistency=4.0,
                                  disc_lr=2e-4, disc_loss_weight=0.4, ema_warmup=False, cosine_from="start",
                                  initialisation="released"),
}
# The paper's comparisons. Join one to a scale: --preset cifar10,vae or --preset
# maetok-b-256,vae --steps 250000.
_NO_MASK, _NO_AUX = dict(mask_low=0.0, mask_high=0.0), dict(targets="")
ABLATIONS = {
    "ae": _NO_MASK | _NO_AUX,                                    # plain autoencoder [Tables 1a, 6]
    "vae": _NO_MASK | _NO_AUX | dict(variational=True),          # KL-VAE [Table 1a]
    "vae-mask": dict(variational=True),                          # KL-VAE + masked modelling [Table 1a]
    "image-latents": dict(learnable_latents=False),              # no learnable tokens, L = N [Tables 6, 13a]
    "pixel": _NO_AUX,                                   # masked, pixel decoder only [Table 1b, Table 6 row 4]
    "hog": dict(targets="hog"), "dinov2": dict(targets="dinov2-l"), "siglip": dict(targets="siglip-l"),
    "combined": dict(targets="hog,dinov2-l,siglip-l"),                                      # [Table 1b]
    "no-mask": _NO_MASK,                                  # auxiliary decoders see all patches [Table 6 row 2]
    "aux-linear": dict(aux_depth=0), "aux-1": dict(aux_depth=1), "aux-3": dict(aux_depth=3),
    "aux-6": dict(aux_depth=6), "aux-12": dict(aux_depth=12),                               # [Table 1d]
    "mask-0-60": dict(mask_low=0.0, mask_high=0.6), "mask-10-40": dict(mask_low=0.1, mask_high=0.4),
    "mask-20-60": dict(mask_low=0.2, mask_high=0.6), "mask-40-40": dict(mask_low=0.4, mask_high=0.4),
    "mask-40-60": dict(mask_low=0.4, mask_high=0.6),                                        # [Table 1c]
    "latents-256": dict(num_latents=256),                                                   # [Table 13a]
    "ape": dict(rope="none", ape="both"),                                                   # [Table 13b]
    # The paper's rival, in our architecture [Fig. 2, Table 13a].        [after the paper: VA-VAE, 2501.01423]
    "va-vae": _NO_MASK | _NO_AUX | dict(variational=True, learnable_latents=False, align="dinov2-l"),
}
PRESETS = SCALES | ABLATIONS
# What --help lists; --help-all lists the rest, which the released preset, an ablation or a test needs.
SHOWN = """preset out stage init seed device dtype compile checkpointing workers data flip skip_corrupt
    image_size patch_size width num_latents latent_dim variational targets mask_low mask_high aux_depth
    percep_weight disc disc_start weights_dir steps batch_size accumulate lr warmup stage2_steps stage2_lr
    save_every keep keep_every""".split()
# Options that may differ when a run is resumed: they do not change what is learned.
FREE = {"out", "stage", "init", "device", "dtype", "compile", "checkpointing", "ema_device", "workers",
        "accumulate", "data_root", "log_every", "save_every", "keep", "keep_every", "grid_every",
        "eval_images", "latent_images", "weights_dir"}


# ------------------------------------------- schedules and draws -------------------------------------------

def learning_rate(step, steps, peak, warmup, start=0.0, end=0.0, cosine_from="warmup"):
    """Linear warm-up to `peak`, then half a cosine down to `end` at `steps` [Table 7].

    cosine_from: "warmup", the cosine begins at `peak` where the warm-up ends; "start", it is counted from
    step 0, so the peak is never quite reached, and step n of the warm-up has n / warmup [released code].
    """
    if step < warmup:
        return start + (peak - start) * (step + (cosine_from == "warmup")) / warmup
    progress = step / max(1, steps) if cosine_from == "start" else (step - warmup) / max(1, steps - warmup)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1, progress)))


def mask_range(config, stage, step):
    """(low, high) mask ratio; `step` counts from the start of the stage."""
    if stage == 2:
        # Sec. 4.1 lowers the ratio from 60 % to 0; with stage2_ramp < 1 it reaches 0 early and the stage ends
        # on the clean images of Sec. 3.3. - 1: the ramp's last step has ratio 0.
        ramp = max(1, config.stage2_ramp * config.stage2_steps - 1)
        ratio = 0.0 if config.mask_high == 0 else config.stage2_mask * max(0.0, 1 - step / ramp)
        return ratio, ratio
    if config.mask_draw == "normal" and config.mask_high > config.mask_low:
        rng = sample_rng(config.seed, "mask-rate", step, 0)
        while not config.mask_low <= (rate := rng.normal(0.6, 0.25)) <= config.mask_high:
            pass
        return rate, rate
    return config.mask_low, config.mask_high


def build_optimizer(config, model, device):
    """AdamW with weight decay on matrices of linear layers only: not on norms, biases, tokens, positions,
    frequencies. With `muon` the matrices of transformer blocks go to Muon."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks, trained = split_blocks(trained) if config.muon else ([], trained)
    decay = [p for name, p in trained if p.ndim >= 2 and name.endswith("weight")]
    rest = [p for name, p in trained if not (p.ndim >= 2 and name.endswith("weight"))]
    groups = [dict(params=decay, weight_decay=config.weight_decay), dict(params=rest, weight_decay=0.0)]
    if blocks:
        groups.append(dict(params=blocks, weight_decay=config.weight_decay, muon=config.muon))
    return (Muon if blocks else torch.optim.AdamW)(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type != "mps")


# ------------------------------------------ what a step works with ------------------------------------------

class Stage(NamedTuple):
    """One of the two stages. Steps count through both: stage 1 is [0, steps), stage 2 follows."""
    number: int
    first: int
    last: int

    def learning_rate(self, config, step):
        """Of the tokenizer at `step`."""
        if self.number == 1:
            return learning_rate(step, config.steps, config.lr, config.warmup, config.lr_start, config.lr_end,
                                 config.cosine_from)
        return learning_rate(step - self.first, config.stage2_steps, config.stage2_lr, config.stage2_warmup,
                             end=config.lr_end)

    def discriminator_rate(self, config, step):
        """The discriminator's, on the same schedule."""
        return (config.disc_lr * self.learning_rate(config, step)
                / (config.lr, config.stage2_lr)[self.number - 1])


def stages(config):
    """Stage 1, masked modelling of the whole tokenizer [Sec. 3.2]; stage 2, the pixel decoder on the frozen
    encoder's latents [Sec. 3.3]."""
    return {1: Stage(1, 0, config.steps), 2: Stage(2, config.steps, config.steps + config.stage2_steps)}


@dataclass
class TrainState:
    """What training changes and a checkpoint holds."""
    model: MAETok
    ema: common.EMA
    optimizer: torch.optim.Optimizer
    adversary: torch.nn.Module | None                     # losses.Adversary
    adversary_optimizer: torch.optim.Optimizer | None
    stage: int = 1
    step: int = 0
    measured: bool = False                                # the stage is over, latent mean and std are set


class Batch(NamedTuple):
    """A micro-batch on the device, with all that is random about it."""
    images: torch.Tensor                                # (B, 3, H, W) in [-1, 1]
    mask: torch.Tensor                                  # (B, N) bool, True = hidden
    loss_mask: torch.Tensor                             # (B, N) bool: the patches of Eq. 8
    noise: torch.Tensor | None                          # (B, L, C), of a VAE
    targets: dict                                       # name -> (B, N, D_j), the y^j of Eq. 8
    views: list | None                                  # of the discriminator, once it has begun
    added: torch.Tensor | None = None                   # (B, L, C) latent noise [after the paper: DeTok]
    lengths: torch.Tensor | None = None                 # (B,) tokens that are kept [after the paper: FlexTok]
    align_to: torch.Tensor | None = None                # (B, N, D) teacher's [after the paper: VA-VAE]


def prepare_batch(config, stage, step, micro, positions, loaded, teachers, device):
    """What the loader gave, (images, labels[, captions]), as a Batch. Everything random comes from (seed,
    step, global sample index), never from the process."""
    images = to_float(loaded[0].to(device, non_blocking=True))
    num_patches = (images.shape[-1] // config.patch_size) ** 2
    low, high = mask_range(config, stage.number, step - stage.first)
    mask = random_mask(step_rngs(config, "mask", step, positions), num_patches, low, high)
    mask = common.to_device(mask, device)
    noise = added = lengths = None
    shape = config.num_latents if config.learnable_latents else num_patches, config.latent_dim
    if config.variational and stage.number == 1:
        draws = [rng.standard_normal(shape, np.float32)
                 for rng in step_rngs(config, "noise", step, positions)]
        noise = common.to_device(torch.from_numpy(np.stack(draws)), device)
    if config.latent_noise and stage.number == 2:
        added = draw_noise(step_rngs(config, "latent-noise", step, positions), shape, config.latent_noise)
        added = common.to_device(added, device)
    if config.nested_dropout:
        lengths = draw_lengths(step_rngs(config, "lengths", step, positions), config.num_latents)
        lengths = common.to_device(lengths, device)
    targets = compute_targets(config, images, teachers, *loaded[2:]) if stage.number == 1 else {}
    align_to = teachers[config.align](images) if config.align and stage.number == 1 else None
    loss_mask = (mask if config.mask_high > 0
                 else torch.ones_like(mask))                           # nothing hidden: Eq. 8 on all patches
    adversarial = config.disc != "none" and step >= config.disc_start
    views = draw_views(config, step, micro, positions, device) if adversarial else None
    return Batch(images, mask, loss_mask, noise, targets, views, added, lengths, align_to)


# ---------------------------------------------- the objective ----------------------------------------------

def tokenizer_objective(config, step, batch, output, networks, last_layer, autocast, latent_layer=None):
    """L = L_recon + lambda_1 L_percep + lambda_2 L_adv [Eq. 6] + the sum over targets of L_mask [Eq. 8], and
    for a VAE its KL term [Table 1a].

    output: of MAETok.forward. networks: losses.Objective. last_layer: the decoder's last weight.
    latent_layer: the encoder's, where latents are aligned (after/alignment.py).
    Returns (loss, {name: term}): float32 scalars, the terms not weighted.
    """
    x, x_hat = batch.images, output.reconstruction.float()
    terms = {"recon": F.mse_loss(x_hat, x)}
    loss = terms["recon"]
    if networks.lpips is not None:
        terms["percep"] = networks.lpips(x_hat, x).mean()
        ramp = min(1.0, step / max(1, config.percep_warmup))
        loss = loss + config.percep_weight * ramp * terms["percep"]
    if batch.align_to is not None:
        terms["align"] = alignment_loss(output.aligned, batch.align_to)
        loss = loss + config.align_weight * adaptive_weight(loss, terms["align"],
                                                            latent_layer) * terms["align"]
    if batch.views:
        networks.adversary.requires_grad_(False)                           # its own step comes after this one
        with autocast:
            terms["adv"] = generator_loss(networks.adversary.look(x_hat, batch.views[4]))
        # loss so far: L_recon + lambda_1 L_percep, all of Eq. 6 but this term
        terms["adaptive_weight"] = adaptive_weight(loss, terms["adv"], last_layer)
        loss = loss + config.disc_weight * terms["adaptive_weight"] * terms["adv"]
    for name, target in batch.targets.items():
        terms[name] = auxiliary_loss(config, name, output.aux[name], target, batch.loss_mask)
        loss = loss + (config.text_weight if name == "text" else config.aux_weight) * terms[name]
    if batch.noise is not None:
        terms["kl"] = kl_divergence(output.posterior)
        loss = loss + config.kl_weight * terms["kl"]
    return loss, terms


# ------------------------------------------------ one stage ------------------------------------------------

def train_stage(config, stage, state, networks, train_set, test_set, processes):
    """Train from state.step to the end of `stage`; checkpoints, logs and pictures on the way."""
    rank, world, device = processes
    dtype = common.autocast_dtype(config.dtype, device)
    sizes = (config.image_size, config.mixed_size) if config.mixed_size else (config.image_size,)
    batches = GlobalBatches(train_set.length, config.batch_size, state.step, stage.last, config.seed, rank,
                            world, config.accumulate, sizes)
    loader = common.batch_loader(train_set, batches, config.workers, device, collate)
    model, ema, adversary = state.model, state.ema, state.adversary
    if config.compile:
        for part in model.modules():
            # Not the decoder's head: the adaptive weight asks for its gradient, which would take the whole of
            # a compiled backward pass with it.
            if isinstance(part, Transformer):
                part.compile()
    wrapped, wrapped_adversary = model, adversary
    if world > 1:
        # gradient_as_bucket_view: gradients live in the buckets that are sent, not in a copy beside them.
        ddp = dict(device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        wrapped = DistributedDataParallel(model, **ddp)
        if adversary is not None:
            # No buffers to send: the spectral norms' are the same everywhere, as are all weights.
            wrapped_adversary = DistributedDataParallel(adversary, forward_sync_buffers=False, **ddp)
    log, clock = common.Averages(device), common.Clock(state.step)
    bar = tqdm(total=stage.last - stage.first, initial=state.step - stage.first, desc=f"stage {stage.number}",
               disable=rank > 0, mininterval=1.0)
    while (step := state.step) < stage.last:
        lr = common.set_learning_rate(state.optimizer, stage.learning_rate(config, step))
        if adversary is not None:
            common.set_learning_rate(state.adversary_optimizer, stage.discriminator_rate(config, step))
        for micro, positions in enumerate(batches.positions()):
            batch = prepare_batch(config, stage, step, micro, positions, next(loader), networks.teachers,
                                  device)
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with contextlib.ExitStack() as stack:
                # Gradients are exchanged at the last one only.
                if world > 1 and micro + 1 < config.accumulate:
                    stack.enter_context(wrapped.no_sync())
                    if batch.views:
                        stack.enter_context(wrapped_adversary.no_sync())
                with autocast:
                    output = wrapped(batch.images, batch.mask, batch.noise, batch.added, batch.lengths)
                loss, terms = tokenizer_objective(config, step, batch, output, networks,
                                                  model.decoder.head.weight, autocast,
                                                  model.encoder.to_latent.weight)
                (loss / config.accumulate).backward()
                if batch.views:
                    adversary.requires_grad_(True)
                    with autocast:
                        disc_loss, disc_terms = wrapped_adversary(
                            batch.images, output.reconstruction.float().detach(), batch.views[:4],
                            config.disc_loss_weight, config.lecam, config.consistency)
                    (disc_loss / config.accumulate).backward()
                    terms |= disc_terms
            log.add(terms | {"loss": loss})
        grad_norm = common.optimizer_step(state.optimizer, config.clip)
        log.check_finite(loss, grad_norm)
        if batch.views:
            log.check_finite(common.optimizer_step(state.adversary_optimizer, config.clip))
        ema.update(model)
        state.step = step = step + 1
        bar.update()

        stop = common.stop_signal(world)
        saving = step % config.save_every == 0 or step == stage.last or stop
        drawing = config.grid_every > 0 and (step % config.grid_every == 0 or step == stage.last)
        if step % config.log_every == 0 or saving or drawing:
            low, high = mask_range(config, stage.number, step - 1 - stage.first)
            record = {"step": step, "stage": stage.number, **log.read(step, config),
                      "grad_norm": float(grad_norm), "lr": lr, "mask": (low + high) / 2,
                      "images_per_second": clock.rate(step, config.batch_size)}
            if rank == 0:
                checkpoints.append_metrics(config.out, record)
                shown = ("recon", "percep", "adv", "kl", *config.aux_targets)
                bar.set_postfix({name: f"{value:.4f}" for name, value in record.items() if name in shown}
                                | {"img/s": f"{record['images_per_second']:.0f}"}, refresh=False)
        if rank == 0 and drawing:
            save_grid(config, stage.number, ema.on(device), test_set,
                      Path(config.out) / f"grid_{step:07d}.png", device)
        if saving:
            save(config, state, processes)
        if stop:
            raise common.Stopped(stop)
    bar.close()


def save(config, state, processes):
    """One checkpoint, written by rank 0; the others wait,
    so that none runs ahead of a checkpoint that fails."""
    if processes.rank == 0:
        content = {"kind": "tokenizer", "step": state.step, "stage": state.stage, "measured": state.measured,
                   "config": dataclasses.asdict(config), "model": state.model.state_dict(),
                   "ema": state.ema.model.state_dict(), "ema_updates": state.ema.updates,
                   "optimizer": state.optimizer.state_dict()}
        if state.adversary is not None:
            content |= {"adversary": state.adversary.state_dict(),
                        "adversary_optimizer": state.adversary_optimizer.state_dict()}
        checkpoints.save_checkpoint(config.out, content, config.keep, config.keep_every)
    if processes.world > 1:
        dist.barrier()


# ----------------------------------------------- measurements -----------------------------------------------

def eval_batch(config):
    """Images a forward pass outside training: no more than a training step of one process is likely to hold.
    """
    return max(1, min(64, config.batch_size // config.accumulate))


@torch.inference_mode()
def evaluate(config, model, dataset, teachers, device):
    """Numbers on test images: PSNR of unmasked images and, while auxiliary decoders are there,
    how well they do.

    Returns {"psnr": dB, "hog_loss": Eq. 8 at half of the patches hidden, "hog_constant": the same loss of the
    best constant prediction (the mean target over the same hidden patches, so no constant can do better)}.
    The constant of "text" is the mean target of the training captions: with a large vocabulary, the mean of
    few test captions would know their rare words.
    """
    psnrs, losses, hidden, seen = [], {}, {}, 0
    ratio = 0.5 if config.mask_high > 0 else 0.0
    for images, _, *captions in some_images(dataset, config.eval_images, batch_size=eval_batch(config)):
        images = to_float(images).to(device)
        reconstructed = model.reconstruct(images)
        psnrs.append(psnr(to_uint8(images).cpu(), to_uint8(reconstructed).cpu()))
        if model.aux_decoders:
            N = math.prod(model.grid(images.shape[-2:]))
            rngs = step_rngs(config, "eval-mask", 0, range(seen, seen + len(images)))
            mask, seen = random_mask(rngs, N, ratio, ratio).to(device), seen + len(images)
            output, loss_mask = model(images, mask), mask if ratio else torch.ones_like(mask)
            for name, target in compute_targets(config, images, teachers, *captions).items():
                losses.setdefault(name, []).append(
                    auxiliary_loss(config, name, output.aux[name], target, loss_mask) * len(images))
                hidden.setdefault(name, []).append(target if name == "text" else target[loss_mask])
    psnrs = torch.cat(psnrs)
    result = {"psnr": psnrs.mean().item(), "images": len(psnrs)}
    for name in losses:
        result[f"{name}_loss"] = (sum(losses[name]) / len(psnrs)).item()
        y = torch.cat(hidden[name])                                                # (all hidden patches, D_j)
        if name == "text":
            result["text_constant"] = text_loss(teachers[name].log_marginal.expand_as(y), y).item()
            continue
        # Mean squared error is least at the mean; negative cosine at the mean of the unit vectors.
        kind = distance(config, name)
        constant = y.mean(0) if kind == "mse" else F.normalize(y, dim=-1).mean(0)
        everything = torch.ones(1, len(y), dtype=torch.bool, device=device)
        result[f"{name}_constant"] = masked_feature_loss(constant.expand_as(y)[None], y[None], everything,
                                                         kind).item()
    return result


@torch.inference_mode()
def measure_latents(config, model, dataset, device):
    """Set the model's latent_mean and latent_std, one scalar each, over `latent_images`
    clean training images."""
    n, total, squares = 0, 0.0, 0.0
    for images, *_ in some_images(dataset, config.latent_images, batch_size=eval_batch(config)):
        h = model.encode(to_float(images).to(device)).cpu().double()
        n, total, squares = n + h.numel(), total + h.sum().item(), squares + h.square().sum().item()
    model.latent_mean.fill_(total / n)
    model.latent_std.fill_(math.sqrt(max(squares / n - (total / n) ** 2, 1e-12)))


@torch.inference_mode()
def save_grid(config, stage, model, dataset, path, device, count=8):
    """A PNG of test images: input, masked input, reconstructions, and HOG target and
    prediction drawn as strokes."""
    images = to_float(next(some_images(dataset, count))[0]).to(device)
    P = config.patch_size
    grid = model.grid(images.shape[-2:])
    rows = {"input": to_uint8(images)}
    if stage == 1 and config.mask_high > 0:
        mask = random_mask(step_rngs(config, "grid-mask", 0, range(len(images))),
                           grid[0] * grid[1], 0.5, 0.5).to(device)
        output = model(images, mask)
        rows["masked input"] = to_uint8(mask_out(images, mask, P))
        rows["reconstruction\nof the masked input"] = to_uint8(output.reconstruction)
    rows["reconstruction"] = to_uint8(model.reconstruct(images))
    if stage == 1 and "hog" in model.aux_decoders:
        predicted = (output if config.mask_high > 0 else model(images)).aux["hog"]
        cell = max(8, 96 // (images.shape[-1] // config.hog_cell))
        for title, features in (("HOG target", hog_features(images, P, config.hog_cell)),
                                ("HOG predicted", predicted)):
            rows[title] = [hog_picture(f, grid, P, config.hog_cell, pixels_per_cell=cell) for f in features]
    sheet = image_grid(list(rows.values()), list(rows))
    checkpoints.write_png(path, sheet)


def start_from(config, model, adversary, path):
    """Copy the EMA weights of another run's tokenizer into `model`: --init. Auxiliary decoders where the
    targets agree, the discriminator where both have the same kind.

    The sizes of image and auxiliary decoders may differ, anything else must not. Raises UserError.
    """
    state = checkpoints.load_checkpoint(path)
    source = tokenizer_of(state, path)
    free = ("image_size", "aux_targets", "aux_depth", "aux_width", "aux_heads", "initialisation")
    differ = [f"{f.name} {getattr(source.config, f.name)!r} -> {getattr(config, f.name)!r}" for f in
              dataclasses.fields(MAETokConfig) if f.name not in free
              and getattr(source.config, f.name) != getattr(config, f.name)]
    if differ:
        raise UserError(f"--init {path} holds weights of another model ({'; '.join(differ[:5])}); "
                        "give the same preset")
    checkpoints.load_weights(model.encoder, source.encoder.state_dict(), path)
    checkpoints.load_weights(model.decoder, source.decoder.state_dict(), path)
    model.latent_mean, model.latent_std = source.latent_mean, source.latent_std   # the unit of --latent-noise
    for name, decoder in source.aux_decoders.items():
        if name in model.aux_decoders:
            checkpoints.load_weights(model.aux_decoders[name], decoder.state_dict(), path)
    if adversary is not None and state["config"].get("disc") == config.disc:
        checkpoints.load_weights(adversary, state["adversary"], path)


def check_resumable(config, checkpoint, adversary):
    """Refuse to resume a run with what it cannot be resumed with. Raises UserError."""
    # Batch norm, LeCAM and the adaptive weight look at one forward pass: with a GAN its size matters.
    free = FREE - {"accumulate"} if adversary else FREE
    checkpoints.check_same_config(checkpoint["config"], config, free, config.out)
    if config.stage == "1" and checkpoint["stage"] == 2:
        raise UserError(f"the run in {config.out} is in stage 2 already; choose another --out for --stage 1")
    if config.stage == "2" and checkpoint["stage"] == 1 and not checkpoint["measured"]:
        raise UserError(f"stage 1 of the run in {config.out} is not finished; run it without --stage 2")


def load_state(state, checkpoint, path):
    """All that a checkpoint holds, but for the model's own weights, into `state`. Raises UserError."""
    state.stage, state.step, state.measured = (checkpoint[key] for key in ("stage", "step", "measured"))
    checkpoints.load_weights(state.ema.model, checkpoint["ema"], path)
    state.ema.updates = checkpoint["ema_updates"]
    checkpoints.load_optimizer(state.optimizer, checkpoint["optimizer"], path)
    if state.adversary is not None:
        checkpoints.load_weights(state.adversary, checkpoint["adversary"], path)
        checkpoints.load_optimizer(state.adversary_optimizer, checkpoint["adversary_optimizer"], path)


def start_stage_2(config, state, device):
    """The tokenizer is the EMA model, so it is the EMA's encoder that is frozen and whose latents are
    decoded; auxiliary decoders go, EMA and optimizer start anew. [Sec. 3.3]

    The loss is Eq. 6 alone, in the same loop; a discriminator and its optimizer carry on."""
    state.model.load_state_dict(state.ema.model.state_dict())
    state.model.freeze_encoder()
    state.ema = common.EMA(state.model, config.ema, config.ema_device, config.ema_warmup)
    state.optimizer = build_optimizer(config, state.model, device)
    state.stage, state.measured = 2, False


# ------------------------------------------------ main ------------------------------------------------

def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    config = common.parse_config(Config, PRESETS, list(SCALES), __doc__, argv, shown=SHOWN)
    if not config.data:
        raise UserError("which images? Give --data FOLDER (ImageFolder layout), FILE.npz, cifar10 or shapes")
    rank, world, device = processes = common.start_processes(config.device)
    if config.batch_size % (world * config.accumulate):
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {world} processes x "
                        f"{config.accumulate} accumulation steps")
    with common.rank_zero_first(rank, world):
        train_set, test_set = (build_dataset(config.data, split, config.image_size, config.data_root,
                                             config.flip, config.crop, config.seed, config.skip_corrupt,
                                             "text" in config.aux_targets)
                               for split in ("train", "test"))
    out = Path(config.out)
    end = config.steps if config.stage == "1" else config.steps + config.stage2_steps

    # ---- the model: new, from --init, or where the last run of this command stopped ----
    torch.manual_seed(config.seed)
    model = MAETok(config)
    with common.rank_zero_first(rank, world):
        networks = build_objective(config, device)       # frozen networks and the discriminator
        if "text" in config.aux_targets:
            networks.teachers["text"] = TextTarget(config, train_set, device)
    if rank == 0:
        checkpoints.lock(out)
    checkpoint = checkpoints.find_checkpoint(out, rank)
    if checkpoint is not None:
        check_resumable(config, checkpoint, networks.adversary)
        if config.init and rank == 0:
            print(f"note: resuming the run in {out}; --init {config.init} is not read again")
        if checkpoint["stage"] == 2:
            model.freeze_encoder()
        checkpoints.load_weights(model, checkpoint["model"], out)
    elif config.init:
        start_from(config, model, networks.adversary, config.init)
    elif config.stage == "2":
        raise UserError("--stage 2 needs a trained encoder: give --init CHECKPOINT, "
                        "or an --out with a finished stage 1")
    model.to(device)
    if config.checkpointing:
        common.recompute_blocks(model, Block)
    state = TrainState(model, common.EMA(model, config.ema, config.ema_device, config.ema_warmup),
                       build_optimizer(config, model, device), networks.adversary,
                       build_optimizer(config, networks.adversary, device) if networks.adversary else None)
    if checkpoint is not None:
        load_state(state, checkpoint, out)
    elif config.stage == "2":
        state.step = config.steps                                  # --init stands for a finished stage 1
        start_stage_2(config, state, device)
    checkpoint = None                                   # the memory of a whole checkpoint, in every process
    checkpoints.check_same_step(state.step, out, rank, world, device)
    if rank == 0:
        checkpoints.start_run(config, state.step, state.measured)
        count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
        print(f"parameters: encoder {count(model.encoder):.2f} M, decoder {count(model.decoder):.2f} M, "
              f"auxiliary {count(model.aux_decoders):.2f} M; {world} x {device}; "
              f"{out}/ at step {state.step} of {end}", flush=True)
        print(checkpoints.checkpoint_budget(model, config.save_every, end, config.keep, config.keep_every))

    # ---- stage 1: masked modelling [Sec. 3.2]; stage 2: the pixel decoder alone [Sec. 3.3] ----
    while state.step < end or not state.measured:
        if state.stage == 1 and state.step == config.steps and state.measured:
            start_stage_2(config, state, device)
        train_stage(config, stages(config)[state.stage], state, networks, train_set, test_set, processes)
        # The stage is saved by now: should a test image be unreadable, only the
        # measurements are to be made again.
        if rank == 0:
            averaged = state.ema.on(device)
            record = {"step": state.step, "stage": state.stage, "event": f"end of stage {state.stage}",
                      **evaluate(config, averaged, test_set, networks.teachers, device)}
            checkpoints.append_metrics(out, record)
            print(json.dumps(record), flush=True)
            measure_latents(config, averaged, train_set, device)
            for part in (model, state.ema.model):
                part.latent_mean.copy_(averaged.latent_mean)
                part.latent_std.copy_(averaged.latent_std)
        state.measured = True
        save(config, state, processes)
    if rank == 0:
        records = checkpoints.read_metrics(out)
        terms = ("recon", "percep", *config.aux_targets, "align", "kl", "adv", "adaptive_weight", "disc",
                 "disc_real", "disc_fake", "lecam", "lr")
        plot_curves({n: [(r["step"], r[n]) for r in records if n in r]
                            for n in terms}).save(out / "loss.png")
        if train_set.skipped + test_set.skipped:
            print(f"passed over unreadable images {int(train_set.skipped + test_set.skipped)} times")
        print(f"done: {out}/last.pt, loss.png, metrics.jsonl, grid_{state.step:07d}.png")


if __name__ == "__main__":
    common.run(main)
