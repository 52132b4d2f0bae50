"""Train the tokenizer: masked modelling, then the pixel decoder alone.   [Sec. 3.2, 3.3, 4.1, Table 7]

    python train_tokenizer.py                           # laptop: drawn shapes, a few minutes on two cores
    python train_tokenizer.py --preset cifar10          # CIFAR-10 at 32 px
    python train_tokenizer.py --preset cifar10,vae      # an ablation row at that scale
    # the paper, on one node; with --nnodes and a rendezvous (README) on several:
    torchrun --nproc-per-node=8 train_tokenizer.py --preset maetok-b-256 --data /data/imagenet

One step, for a batch of images I with patch tokens x:
    hide 40-60 % of the patches; h = E([x ; z]); decode the pixels I^ and for each target j y^_j from h
                                                                                               [Eq. 4, 5, 7]
    L = |I^ - I|^2 + LPIPS(I^, I) + 0.4 w L_adv + sum over j of |y^_j - y_j|^2 on the hidden patches
                                                                     (w: adaptive weight)         [Eq. 6, 8]
    AdamW on L; then a step of the discriminator; then the moving average of the weights
Stage 2 freezes E, lowers the mask ratio to 0 and drops the sum over j.

The same command resumes from the last checkpoint, with any number of processes.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see runtime/processes.py

import torch
import torch.nn.functional as F

import checkpoints
import losses
from runtime import files, resuming
from common import (Count, Decay, Positive, Seed, Share, TrainState, UserError, Weight, Whole, Workers,
                    standard_normal, step_rngs)
from data import GlobalBatches, build_dataset, collate, to_float
from hog import hog_dim
from losses import PERCEP_WARMUP, adaptive_weight, differentiated, generator_loss
from maetok import MAETokConfig, Tokenizer, Transformer, kl_divergence, random_mask, tokenizer_of
from measures.training import measure_latents, test_numbers, training_grid
from runtime.processes import (autocast, data_parallel, exchange_gradients, faster_products, rank_zero_first,
                               run, start_processes, to_device)

# Constants: Table 7's where tagged, otherwise not in the paper.
BETAS, WEIGHT_DECAY = (0.9, 0.95), 1e-4                 # AdamW [Table 7]
CLIP = 1.0                                              # largest gradient norm [released code]


@dataclass
class Config(MAETokConfig):
    """Everything a run depends on. The defaults are Table 7's; without --preset it is "shapes"."""
    # ---- run ----
    preset: str = "shapes"       # names joined by commas, later ones win; see SCALES and ABLATIONS
    add: str = ""                # extras, files of variants/ and after/, joined by commas; order matters
    out: str = ""                # folder of the run (default: runs/tokenizer-DATA-PRESET)
    stage: str = "both"          # both, 1 (masked training) or 2 (decoder only, from --init or a stage 1)
    init: str = ""               # start from the EMA weights of this checkpoint or run folder
    seed: Seed = 0               # of weights, data order, augmentation, masks and noise
    device: str = "auto"         # auto, cpu, cuda or mps
    dtype: str = "auto"          # autocast: auto (bfloat16 where fast), float32, bfloat16
    compile: bool = False        # torch.compile the model; pays off on GPUs in runs longer than some minutes
    checkpointing: bool = False  # less memory, more time: the backward pass computes blocks again
    workers: Workers = -1        # loader processes for each training process; -1: 8 on CUDA, none elsewhere
    # ---- data ----
    data: str = ""               # shapes, cifar10, a folder or an .npz file; see data.py
    data_root: str = "data"      # where cifar10 is looked for and downloaded to
    flip: bool = True            # random horizontal flip [Table 7]
    # ---- masked modelling ----
    targets: str = "hog,dinov2-l,siglip-l"   # auxiliary targets [Table 1b]: names in losses.TARGETS, or empty
    aux_weight: Weight = 1.0     # of the auxiliary losses; the paper gives none, 1.0 [released code]
    hog_cell: Count = 8          # px [MaskFeat]; small images need smaller cells
    mask_low: Share = 0.4        # smallest mask ratio [Sec. 4.1, Table 1c]
    mask_high: Share = 0.6       # largest mask ratio; both 0: nothing hidden
    kl_weight: Weight = 1e-6     # of a KL-VAE's divergence [released code]
    # ---- perceptual and adversarial loss ----
    percep_weight: Weight = 1.0  # lambda_1 of LPIPS [Eq. 6, Table 7]; 0 needs no VGG weights
    disc: str = "dino"           # dino (heads on DINO-S/16 [released code; Table 7: DINOv2-S]), patch or none
    disc_weight: Weight = 0.4    # lambda_2, times the adaptive weight [Eq. 6, Table 7]
    disc_start: Whole = 30_000   # step, counted through both stages, at which the GAN begins [Table 7]
    weights_dir: str = ""        # folder of the frozen networks' files; else torch hub's cache, else download
    # ---- optimisation ----
    steps: Count = 500_000       # of stage 1 [Table 7]; the ablations of Tables 1, 6 and 13 use 250,000
    batch_size: Count = 512      # images per step over all processes [Table 7]
    accumulate: Count = 1        # forward passes per step, for batches that do not fit the device
    lr: Positive = 1e-4          # peak [Table 7 "base learning rate", not scaled by batch size]
    warmup: Whole = 10_000       # steps [Table 7]
    ema: Decay = 0.9999          # decay [released code]
    # ---- stage 2 ----
    stage2_steps: Whole = 50_000  # decoder fine-tuning with the encoder frozen [Sec. 4.1]
    # If the ramp is shorter than the stage, the rest uses clean images; Sec. 3.3 uses only those.
    stage2_ramp: Share = 1.0     # part of stage 2 in which the mask ratio falls to 0 [Sec. 4.1: all of it]
    stage2_lr: Positive = 1e-4   # peak; the paper is silent
    stage2_warmup: Whole = 1000  # steps [ours]
    # ---- logs ----
    log_every: Count = 100       # steps between lines of metrics.jsonl
    save_every: Count = 5000     # steps between checkpoints and pictures

    def __post_init__(self):
        super().__post_init__()
        self.out = self.out or common.run_name("tokenizer", Path(self.data).stem, self.preset)
        common.check_choices(self, stage=("both", "1", "2"), disc=("none", "dino", "patch"))
        if not self.mask_low <= self.mask_high < 1:
            raise UserError(f"--mask-low {self.mask_low} and --mask-high {self.mask_high}: low <= high < 1")
        if self.stage == "2" and not self.stage2_steps:
            raise UserError("--stage 2 needs --stage2-steps of 1 or more")
        if "hog" in common.split_names(self.targets):
            hog_dim(self.patch_size, self.hog_cell)           # raises ValueError for cells that fill no patch


# The scale of a run. The first is the default.
_SMALL = dict(targets="hog", percep_weight=0.0, disc="none",                           # needs no weight files
              hog_cell=4, latent_dim=16, aux_depth=1, batch_size=32, lr=3e-3, warmup=200, ema=0.998,
              stage2_ramp=0.3, stage2_lr=3e-3, stage2_warmup=100, log_every=50, save_every=500)
SCALES = {
    "shapes": _SMALL | dict(
        data="shapes", image_size=32, patch_size=8, width=96, heads=4, encoder_depth=3, decoder_depth=3,
        num_latents=16, flip=False, steps=4000, warmup=100, stage2_steps=3000, stage2_warmup=50),
    "photos": _SMALL | dict(                                                     # a folder of your own [ours]
        image_size=64, patch_size=8, width=128, heads=4, encoder_depth=3, decoder_depth=3, num_latents=32,
        latent_dim=32, steps=2500, stage2_steps=1500),
    "cifar10": _SMALL | dict(
        data="cifar10", image_size=32, patch_size=4, width=96, heads=3, encoder_depth=3, decoder_depth=2,
        num_latents=32, aux_depth=2, aux_weight=3.0, steps=60_000, stage2_steps=20_000),
    "cifar10-box": _SMALL | dict(
        data="cifar10", image_size=32, patch_size=4, width=128, heads=4, encoder_depth=4, decoder_depth=4,
        learnable_latents=False, steps=8000, stage2_steps=8000),
    # Between CIFAR-10 and the paper: ViT-S at 64 px, half a day on a GPU of 24 GB (docs/running.md). [ours]
    "imagenet64": dict(image_size=64, patch_size=8, width=384, heads=6, num_latents=64, hog_cell=4,
                       targets="hog", disc="patch", disc_start=20_000, steps=80_000, batch_size=256, lr=3e-4,
                       warmup=2000, ema=0.9995, stage2_steps=15_000),
    "maetok-b-256": dict(),                                                            # Table 7: the defaults
    "maetok-b-512": dict(image_size=512),                                              # Table 7
}
# The paper's comparisons, to be joined to a scale. Tables 1 and 6, except the +FT row, are before decoder
# fine-tuning: --preset maetok-b-256,vae --stage 1 --steps 250000. Table 1c has HOG alone: hog,mask-0-60.
_NO_MASK, _NO_AUX = dict(mask_low=0.0, mask_high=0.0), dict(targets="")
ABLATIONS = {
    "ae": _NO_MASK | _NO_AUX,                                    # plain autoencoder [Tables 1a, 6]
    "vae": _NO_MASK | _NO_AUX | dict(variational=True),          # KL-VAE [Table 1a]
    "vae-mask": dict(variational=True),                          # KL-VAE + masked modelling [Table 1a]
    "image-latents": dict(learnable_latents=False),              # no learnable tokens, L = N [Tables 6, 13a]
    "pixel": _NO_AUX,                                   # masked, pixel decoder only [Table 1b, Table 6 row 4]
    "hog": dict(targets="hog"), "dinov2": dict(targets="dinov2-l"), "siglip": dict(targets="siglip-l"),
    "combined": dict(targets="hog,dinov2-l,siglip-l"),              # [Table 1b; SigLIP is its "CLIP" row]
    "no-mask": _NO_MASK,                                            # Eq. 8 on all patches [Table 6 row 2]
    **{f"aux-{n}": dict(aux_depth=n) for n in (1, 3, 6, 12)},                               # [Table 1d]
    **{f"mask-{low}-{high}": dict(mask_low=low / 100, mask_high=high / 100)                 # [Table 1c]
       for low, high in ((0, 60), (10, 40), (20, 60), (40, 40), (40, 60))},
    "latents-256": dict(num_latents=256),                                                   # [Table 13a]
}
RESUMABLE_WITH = {"out", "stage", "init", "device", "dtype", "compile", "checkpointing", "workers",
                  "accumulate", "data", "data_root", "log_every", "save_every", "weights_dir"}


# ---------------------------------------------- the two stages ----------------------------------------------

class Stage(NamedTuple):
    """Stage 1: masked modelling of the whole tokenizer [Sec. 3.2]. Stage 2: the pixel decoder on the frozen
    encoder's latents [Sec. 3.3]. Steps count through both: stage 1 is [0, steps), stage 2 follows."""
    number: int
    first: int                                          # step
    end: int                                            # the step after its last


# ----------------------------------------------- the method -----------------------------------------------

class Batch(NamedTuple):
    """A micro-batch on the device, with all that is random about it."""
    images: torch.Tensor                                # (B, 3, H, W) in [-1, 1]
    mask: torch.Tensor                                  # (B, N) bool, True = hidden
    noise: torch.Tensor | None                          # (B, L, C) of a KL-VAE
    targets: dict                                       # name -> (B, N, D_j), y_j of Eq. 8; none in stage 2
    windows: list | None                                # crops of the discriminator's calls; None: no GAN yet
    more: dict                                          # further inputs of the model, from extras


class Method(Tokenizer):
    """What one step of training does: the paper. Extras (--add) are put in front of this class and override
    its methods."""
    Config, PRESETS = Config, SCALES | ABLATIONS
    EMA_WARMUP = True                                   # smaller decay in the first steps [ours]

    def __init__(self, config, device):
        self.config, self.device = config, device
        # Stage 2 has no auxiliary decoders. From --init no need to load gigabytes of teachers for them.
        names = [] if config.stage == "2" and config.init else common.split_names(config.targets)
        self.targets = {name: self.build_target(name) for name in names}
        self.lpips = losses.build_lpips(config, device) if config.percep_weight else None
        self.adversary = None                                         # made in `start`, after the model

    def dataset(self, split):
        """Training or test images ("train", "test"), a data.ImageDataset."""
        c = self.config
        return build_dataset(c.data, split, c.image_size, c.data_root, c.flip, c.seed)

    def batches(self, length, start, stop, processes):
        """Which images every step shows, a data.GlobalBatches."""
        c = self.config
        return GlobalBatches(length, c.batch_size, start, stop, c.seed, processes.rank, processes.world,
                             c.accumulate)

    def build_target(self, name):
        """The auxiliary target of that name, a losses.Target."""
        return losses.build_target(name, self.config, self.device)

    def build_adversary(self):
        """The discriminator, a losses.Adversary, or None."""
        return losses.build_adversary(self.config, self.device)

    def optimizer(self, model):
        """AdamW [Table 7]. Weight decay on the matrices of linear layers alone: not on norms, biases, tokens,
        positions, nor the discriminator's spectrally normalised weights [ours]."""
        decay, rest = [], []
        for name, p in model.named_parameters():
            if p.requires_grad:
                (decay if p.ndim >= 2 and name.endswith("weight") else rest).append(p)
        groups = [dict(params=decay, weight_decay=WEIGHT_DECAY), dict(params=rest, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=BETAS, fused=self.device.type != "mps")

    def learning_rate(self, stage, step):
        """Warm-up [Table 7], linear [ours], then half a cosine down to 0 [Table 7]. The discriminator's, too
        [released code]."""
        c, step, steps = self.config, step - stage.first, stage.end - stage.first
        peak, warmup = (c.lr, c.warmup) if stage.number == 1 else (c.stage2_lr, c.stage2_warmup)
        if step < warmup:
            return peak * (step + 1) / warmup
        return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    def mask_range(self, stage, step):
        """(low, high) mask ratio. Stage 1: 40-60 %. Stage 2: falls linearly from 60 % to 0 [Sec. 4.1]; where
        stage2_ramp < 1 it reaches 0 early, and the stage ends on the clean images of Sec. 3.3."""
        c = self.config
        if stage.number == 1:
            return c.mask_low, c.mask_high
        ramp = max(1, c.stage2_ramp * c.stage2_steps - 1)              # - 1: the ramp's last step has ratio 0
        ratio = c.mask_high * max(0.0, 1 - (step - stage.first) / ramp)
        return ratio, ratio

    def draw_windows(self, step, micro, positions):
        """What each call of the discriminator in this step sees of its images."""
        return losses.draw_windows(self.config, step, micro)

    def batch(self, stage, step, micro, positions, loaded):
        """What the loader gave, (images, labels, ...), as a Batch. Randomness depends on (seed, step) and on
        a sample's position in the global batch (or, for windows, on micro, the number of the forward pass),
        never on the process."""
        config, noise, targets = self.config, None, {}
        images, _, *more = loaded
        images = to_float(images.to(self.device, non_blocking=True))
        num_patches = (images.shape[-1] // config.patch_size) ** 2
        mask = random_mask(step_rngs(config, "mask", step, positions), num_patches,
                           *self.mask_range(stage, step))                                        # M, Sec. 3.2
        if config.variational:
            rngs = step_rngs(config, "noise", step, positions)
            noise = to_device(standard_normal(rngs, config.latent_shape(num_patches)), self.device)
        if stage.number == 1:
            targets = {name: target.features(images, *more) for name, target in self.targets.items()}
        adversarial = self.adversary is not None and step >= config.disc_start
        windows = self.draw_windows(step, micro, positions) if adversarial else None
        return Batch(images, to_device(mask, self.device), noise, targets, windows, {})

    def objective(self, step, batch, output, model):
        """L = L_recon + lambda_1 L_percep + lambda_2 w L_adv [Eq. 6] + aux_weight * the sum over targets of
        L_mask [Eq. 8], and for a VAE its KL term [Table 1a]. lambda_1 grows from 0 over PERCEP_WARMUP
        steps; w compares L_adv with what comes before it, pixels and LPIPS.
        output: model.forward's. Returns (loss, {name: term}): float32 scalars, the terms not weighted.
        """
        config, images, reconstruction = self.config, batch.images, output.reconstruction.float()
        terms = {"recon": F.mse_loss(reconstruction, images)}
        loss = terms["recon"]
        if self.lpips is not None:
            terms["percep"] = differentiated(lambda x: self.lpips(x, images).mean(), reconstruction)
            loss = loss + config.percep_weight * min(1.0, step / PERCEP_WARMUP) * terms["percep"]
        if batch.windows:
            self.adversary.requires_grad_(False)                           # its own step comes after this one
            with autocast(config.dtype, self.device, config.width):
                terms["adv"] = differentiated(
                    lambda x: generator_loss(self.adversary.logits(x, batch.windows[-1])), reconstruction)
            terms["adaptive_weight"] = adaptive_weight(loss, terms["adv"], model.decoder.head.weight)
            loss = loss + config.disc_weight * terms["adaptive_weight"] * terms["adv"]
        # Where nothing is hidden (preset no-mask), Eq. 8 is taken on all patches [ours].
        mask = batch.mask if config.mask_high > 0 else torch.ones_like(batch.mask)
        for name, y in batch.targets.items():
            terms[name] = self.targets[name].loss(output.aux[name], y, mask)
            loss = loss + self.targets[name].weight * terms[name]
        if batch.noise is not None:
            terms["kl"] = kl_divergence(output.posterior)
            loss = loss + config.kl_weight * terms["kl"]
        return loss, terms


# ------------------------------------------------ one stage ------------------------------------------------

def train_step(method, stage, state, batches, loader, wrapped, wrapped_adversary, log):
    """One step: gradients of every forward pass, AdamW, the discriminator, EMA, log. wrapped: the model and
    the adversary under DistributedDataParallel, or as they are."""
    config, model, step = method.config, state.model, state.step
    lr = common.set_learning_rate(state.optimizer, method.learning_rate(stage, step))
    for micro, positions in enumerate(batches.positions()):
        batch = method.batch(stage, step, micro, positions, next(loader))
        with exchange_gradients(micro + 1 == config.accumulate, wrapped, wrapped_adversary):
            with autocast(config.dtype, method.device, config.width):
                output = wrapped(batch.images, batch.mask, batch.noise, **batch.more)
            loss, terms = method.objective(step, batch, output, model)                       # Eq. 6 + Eq. 8
            (loss / config.accumulate).backward()
            if batch.windows:
                method.adversary.requires_grad_(True)                            # `objective` froze it
                reconstruction = output.reconstruction.float().detach()
                with autocast(config.dtype, method.device, config.width):
                    disc_loss, disc_terms = wrapped_adversary(batch.images, reconstruction, batch.windows)
                (disc_loss / config.accumulate).backward()
                terms |= disc_terms
        log.add(terms | {"loss": loss})
    grad_norm = common.optimizer_step(state.optimizer, CLIP)
    log.check_finite(loss, grad_norm)
    if batch.windows:
        common.set_learning_rate(state.others["adversary_optimizer"], lr)
        log.check_finite(common.optimizer_step(state.others["adversary_optimizer"], CLIP))
    state.ema.update(model)
    state.step += 1
    log.end_step(state, stage=lambda: stage.number, lr=lambda: lr, grad_norm=grad_norm.item,
                 mask=lambda: sum(method.mask_range(stage, step)) / 2)


def train_stage(method, stage, state, train_set, test_set, processes):
    """Train from state.step to the end of `stage`; checkpoints, logs and pictures on the way."""
    config, model = method.config, state.model
    batches = method.batches(train_set.length, state.step, stage.end, processes)
    loader = common.batch_loader(train_set, batches, config.workers, processes.device, collate)
    if config.compile:
        common.compile_parts(model, Transformer)
    wrapped = data_parallel(model, processes)
    wrapped_adversary = data_parallel(method.adversary, processes)
    log = checkpoints.Log(config, processes, state.step, stage.first, stage.end, f"stage {stage.number}",
                          shown=("recon", "percep", "adv", "kl", *method.targets),
                          draw=lambda path: training_grid(method, stage, state.ema.model, test_set, path))
    one_step = lambda loader, log: train_step(method, stage, state, batches, loader, wrapped,
                                              wrapped_adversary, log)
    loader = resuming.rehearse(one_step, method, state, stage.end, loader)
    while state.step < stage.end:
        with log.counted():
            one_step(loader, log)


# ------------------------------------------------ the run ------------------------------------------------

def start_from(config, model, adversary, path):
    """--init: copy the EMA weights of another run's encoder and decoder into `model`; of auxiliary decoders
    and the discriminator what fits. Raises UserError for another model."""
    state = checkpoints.load_checkpoint(path, mapped=True)
    source = tokenizer_of(state, path)
    if source.config.heads != config.heads:                         # another model, with weights of one shape
        raise UserError(f"{path} holds weights of another model: {source.config.heads} heads")
    for part in ("encoder", "decoder"):
        checkpoints.load_weights(getattr(model, part), getattr(source, part).state_dict(), path)
    model.latent_mean, model.latent_std = source.latent_mean, source.latent_std
    for name, weight in model.aux_decoders.state_dict().items():
        found = state["ema"].get(f"aux_decoders.{name}")
        if found is not None and found.shape == weight.shape:
            weight.copy_(found)
    shapes = lambda weights: {name: w.shape for name, w in weights.items()}
    if adversary is not None and shapes(state.get("adversary") or {}) == shapes(adversary.state_dict()):
        checkpoints.load_weights(adversary, state["adversary"], path)


def check_resumable(config, checkpoint):
    """Refuse to resume a run with options that change what it learns."""
    # Batch norm, LeCAM and the adaptive weight depend on the size of a forward pass: fixed after disc_start.
    fixed = {"accumulate"} if config.disc != "none" and checkpoint["step"] > config.disc_start else set()
    resuming.check_same_config(checkpoint["config"], config, RESUMABLE_WITH - fixed, config.out)
    if config.stage == "1" and checkpoint["stage"] == 2:
        raise UserError(f"the run in {config.out} is in stage 2 already; choose another --out for --stage 1")
    if config.stage == "2" and checkpoint["stage"] == 1 and (config.init or not checkpoint["measured"]):
        raise UserError(f"--stage 2 goes on in {config.out} when stage 1 there is finished, without --init")


def start_stage_2(method, state):
    """Freeze the encoder, drop the auxiliary decoders [Sec. 3.3]; the loss is Eq. 6 alone (a KL-VAE's term
    has no gradient). It starts from the EMA weights, with a new EMA and optimizer; the discriminator and its
    optimizer carry over [ours]."""
    state.model.load_state_dict(state.ema.model.state_dict())
    state.model.freeze_encoder()
    state.ema = common.EMA(state.model, method.config.ema, method.EMA_WARMUP)
    state.optimizer = method.optimizer(state.model)
    state.facts |= {"stage": 2, "measured": False}


def start(method, processes):
    """The TrainState to go on from: new, from --init, or where the last run of this command stopped."""
    config, device, out = method.config, processes.device, Path(method.config.out)
    torch.manual_seed(config.seed)
    model = faster_products(method.Model(config, method.targets))
    method.adversary = method.build_adversary()                   # after the model: the order of random draws
    if processes.rank == 0:
        files.lock(out)
    checkpoint = checkpoints.find_checkpoint(out, processes.rank)
    if checkpoint is not None:
        check_resumable(config, checkpoint)
        if checkpoint["stage"] == 2:
            model.freeze_encoder()
    elif config.init:
        start_from(config, model, method.adversary, config.init)
    elif config.stage == "2":
        raise UserError("--stage 2 needs a trained encoder: give --init CHECKPOINT, "
                        "or an --out with a finished stage 1")
    model.to(device)
    if config.checkpointing:
        common.recompute_blocks(model)
    state = TrainState(model, common.EMA(model, config.ema, method.EMA_WARMUP), method.optimizer(model))
    state.facts = {"kind": "tokenizer", "add": common.model_extras(method, config.add), "stage": 1,
                   "measured": False}                 # whether the stage is over, latent mean and std are set
    if method.adversary:
        state.others = {"adversary": method.adversary,
                        "adversary_optimizer": method.optimizer(method.adversary)}
    if checkpoint is not None:
        checkpoints.restore(state, checkpoint, out)
    elif config.stage == "2":
        state.step = config.steps                                  # --init replaces stage 1
        start_stage_2(method, state)
    resuming.check_same_step(state.step, out, *processes)
    return state


def end_stage(method, state, train_set, test_set, processes):
    """Measure on test images, and the latents' mean and deviation, then save. The weights are saved already:
    a failure here repeats only the measuring."""
    if processes.rank == 0:
        averaged, number = state.ema.model, state.facts["stage"]
        record = {"step": state.step, "stage": number, "event": f"end of stage {number}",
                  **test_numbers(method, averaged, test_set)}
        checkpoints.append_metrics(method.config.out, record)
        print(json.dumps(record), flush=True)
        measure_latents(method.config, averaged, train_set, method.device)
        state.model.latent_mean.copy_(averaged.latent_mean)
        state.model.latent_std.copy_(averaged.latent_std)
    state.facts["measured"] = True
    checkpoints.save(method.config, state, processes)


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    method_class = common.attach_named(Method, argv)                                # --add
    config = common.parse_config(method_class.Config, method_class.PRESETS, list(SCALES), __doc__, argv)
    if not config.data:
        raise UserError("which images? Give --data FOLDER (ImageFolder layout), FILE.npz, cifar10 or shapes")
    rank, world, device = processes = start_processes(config.device)
    common.check_batch(config, world)
    with rank_zero_first(rank):
        method = method_class(config, device)                                     # loads the frozen networks
        train_set, test_set = method.dataset("train"), method.dataset("test")
    state = start(method, processes)
    end = config.steps if config.stage == "1" else config.steps + config.stage2_steps
    checkpoints.start_run(config, state, processes, end, train_set)

    # ---- stage 1: masked modelling [Sec. 3.2]; stage 2: the pixel decoder alone [Sec. 3.3] ----
    for stage in Stage(1, 0, config.steps), Stage(2, config.steps, end):
        if stage.number < state.facts["stage"] or stage.first == stage.end:
            continue                                       # a resumed run is past it, or it has no steps
        if stage.number > state.facts["stage"]:
            start_stage_2(method, state)
        if state.step < stage.end:
            train_stage(method, stage, state, train_set, test_set, processes)
        if not state.facts["measured"]:
            end_stage(method, state, train_set, test_set, processes)
    preset = "sit-xl" if config.preset.startswith("maetok") else config.preset.split(",")[0]
    checkpoints.end_run(config, processes, f"train_diffusion.py --preset {preset} --tokenizer")


if __name__ == "__main__":
    run(main)
