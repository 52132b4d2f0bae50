"""Train SiT on the latents of a frozen tokenizer.                                         [Sec. 4.1, Table 8]

    python train_diffusion.py --tokenizer runs/tokenizer-shapes          # laptop, after train_tokenizer.py
    python train_diffusion.py --preset cifar10 --tokenizer runs/tokenizer-cifar10
    torchrun --nproc-per-node=8 train_diffusion.py --preset sit-xl --tokenizer RUN --data IMAGENET   # Table 8

The images are encoded once, both flips, into a cache of latents beside the run; the tokenizer is not needed
in the loop. The same command resumes from the last checkpoint, with any number of processes.

Time: data at t = 0, noise at t = 1, here and in flow.py.
Shapes: B batch · L latent tokens · C latent channels.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see there

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from after.mean_flow import adaptive_weights, draw_spans, mean_flow_target
from after.muon import Muon, split_blocks
from after.time_shift import shift_of, shift_times
from common import (Count, Decay, Keep, Positive, Seed, Share, UserError, Weight, Whole, Workers,
                    sample_rng)
from data import GlobalBatches, build_dataset, collate, to_float, to_uint8
from flow import (drop_labels, euler, flow_matching_loss, guidance_free_mixture, guided_velocity, interpolate,
                  path_coefficients, sample_times)
from frozen.pretrained import TEACHERS, load_teacher
from maetok import Decoder, initialise, masked_feature_loss, tokenizer_of
from pictures.draw import image_grid, plot_curves
from sit import SIZES, SiTConfig, build_config, build_model, load_diffusion
from sit import Block as SiTBlock
from variants.lightningdit import Block as LightningDiTBlock
from variants.lightningdit import velocity_direction_loss
from variants.usit import SIZES as USIT_SIZES
from variants.usit import Block as USiTBlock

TIME_BINS = 10


@dataclass
class Config(SiTConfig):
    """Everything a run depends on. The defaults are the paper's SiT-XL [Table 8]; presets change them."""
    # ---- run ----
    preset: str = "shapes"        # names joined by commas, later ones win; see PRESETS in this file
    tokenizer: str = ""           # run or checkpoint of train_tokenizer.py, or of this script: its tokenizer
    out: str = ""                 # folder of the run (default: runs/diffusion-PRESET)
    init: str = ""                # start from the EMA weights of this run or checkpoint, of the same latents
    seed: Seed = 0                # of weights, data order, flips, times, noise and label dropout
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # autocast: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    compile: bool = False         # torch.compile the model; pays off on GPUs in runs longer than some minutes
    checkpointing: bool = False   # less memory, more time: the backward pass computes blocks again
    ema_device: str = "auto"      # where the averaged weights are kept: auto (beside the model) or cpu
    workers: Workers = -1         # loader processes for each training process; -1: 8 on CUDA, none elsewhere
    # ---- data ----
    data: str = ""                # shapes, cifar10, a folder or an .npz file (default: the tokenizer's)
    data_root: str = "data"       # where cifar10 is looked for and downloaded to
    flip: bool = True             # random horizontal flip [Table 8]; the cache holds both versions
    skip_corrupt: bool = False    # pass over unreadable images and count them, instead of stopping
    cache: bool = True            # encode all images once, before training; off: in every step
    cache_images: Whole = 0       # encode only so many; 0: all. An endless data set needs a number
    cache_dtype: str = "float16"  # of the cached latents, which have unit variance: float16 or float32
    unconditional: bool = False   # forget the classes [Table 5]
    # ---- objective ----
    model: str = "sit"            # sit [Table 8], lightningdit [Table 9] or usit [Table 3]
    qk_norm: bool = False         # lightningdit: RMSNorm on queries and keys
    sine_table: bool = True       # lightningdit: fixed positions under its RoPE
    path: str = "linear"          # linear or cosine interpolant between data and noise; see flow.py
    times: str = "uniform"        # uniform [Sec. 4.1] or logit-normal [released code's README]
    label_dropout: Share = 0.1    # part of the labels replaced by the null class, for guidance [SiT]
    direction_loss: Weight = 0.0  # weight of 1 - cos(prediction, velocity); LightningDiT: 1 [Table 9]
    # REPA (Yu et al. 2024): a frozen teacher's patch features are predicted from a middle layer.
    repa: str = ""                # teacher of REPA, dinov2-l for instance [rebuttal]; needs --no-cache
    repa_weight: Weight = 0.5     # of that loss, -cos [REPA]
    repa_block: Count = 8         # after so many blocks [REPA: 8 of 28]
    repa_head: str = "decoder"  # from tokens to patches: decoder [ours] or mlp, repeated [authors' REPA code]
    weights_dir: str = ""         # folder of the teacher's file; else torch hub's cache, else download
    random_frozen: bool = False   # FOR TESTS ONLY: the teacher with random weights, nothing downloaded
    # ---- optimisation ----
    steps: Count = 4_000_000      # [Table 8]; SiT-L in the ablations: 400,000
    batch_size: Count = 256       # latents per step over all processes [Table 8]
    accumulate: Count = 1         # forward passes per step, for batches that do not fit the device
    lr: Positive = 1e-4           # constant [Table 8]
    warmup: Whole = 0             # steps of linear warm-up; none in the paper
    beta1: Decay = 0.9            # AdamW [Table 8]
    beta2: Decay = 0.999          # AdamW [Table 8]
    weight_decay: Weight = 0.0    # [Table 8]
    muon: Weight = 0.0            # > 0: the blocks' matrices train with Muon, at so many times lr
    clip: Positive = 1.0          # largest gradient norm [released code]
    ema: Decay = 0.9999           # decay [SiT]
    # Without it small runs would average over their random start.
    ema_warmup: bool = True       # smaller decay in the first steps [ours; SiT, released code: none]
    # ---- logs ----
    log_every: Count = 100        # steps between lines of metrics.jsonl
    save_every: Count = 10_000    # steps between checkpoints
    keep: Keep = 3                # numbered checkpoints that stay, at least 2
    # For Fig. 5b, and for autoguidance by the checkpoint of 1 M steps [rebuttal].
    keep_every: Whole = 500_000   # and all whose step is a multiple of this; 0: none
    grid_every: Whole = 10_000    # steps between pictures of samples; 0 for none
    grid_cfg: Weight = 2.0        # guidance scale of the second row of those pictures

    def __post_init__(self):
        super().__post_init__()
        self.out = self.out or f"runs/diffusion-{self.preset.replace(',', '-')}"
        path_coefficients(torch.zeros(1), self.path)                                  # these raise ValueError
        sample_times([], self.times)
        build_config(dataclasses.asdict(self))
        if self.x_prediction and self.path != "linear":
            raise UserError(f"--x-prediction divides by t: it knows the linear path, not --path {self.path}")
        if self.mean_flow and (self.model != "sit" or self.path != "linear" or self.guidance_free
                               or self.repa):
            raise UserError("--mean-flow is for sit on the linear path, not with --guidance-free or --repa")
        if self.repa and self.repa not in TEACHERS:
            raise UserError(f"--repa {self.repa}: choose {', '.join(TEACHERS)}")
        if self.repa_head not in ("decoder", "mlp"):
            raise UserError(f"--repa-head {self.repa_head}: choose decoder or mlp")
        if self.repa and self.cache:
            raise UserError("--repa looks at the images: add --no-cache")
        if self.repa and (self.model == "usit" or not 0 < self.repa_block <= self.depth):
            raise UserError(f"--repa reads tokens after --repa-block of 1 to {self.depth} blocks "
                            "of sit or lightningdit")
        if self.cache_dtype not in ("float16", "float32"):
            raise UserError(f"--cache-dtype {self.cache_dtype}: choose float16 or float32")


# The scale of a run. The first is the default.
PRESETS = {
    "shapes": dict(width=128, depth=6, heads=4, flip=False, cache_images=30_000, steps=3000, batch_size=64,
                   lr=1e-3, warmup=100, ema=0.998, log_every=50, save_every=375, keep_every=375,
                   grid_every=500),
    "cifar10": dict(width=256, depth=8, heads=4, steps=100_000, batch_size=128, lr=3e-4, warmup=500,
                    ema=0.9995, save_every=2000, keep_every=10_000, grid_every=2000),
    "imagenet64": SIZES["B"] | dict(steps=80_000, lr=2e-4, warmup=1000, ema=0.9995, save_every=5000,
                                    keep_every=10_000, grid_every=5000),                              # [ours]
    "sit-s": SIZES["S"], "sit-b": SIZES["B"],
    "sit-l": SIZES["L"] | dict(steps=400_000, keep_every=50_000),            # [Sec. 4.1, ablations]
    "sit-xl": SIZES["XL"],                                                             # [Table 8]
    "lightningdit-xl": SIZES["XL"] | dict(model="lightningdit", times="logit-normal", direction_loss=1.0,
                                          lr=2e-4, beta2=0.95, batch_size=1024, steps=400_000,
                                          keep_every=50_000),   # [Table 9]
    # DC-AE's own recipe for its U-ViTs, which the paper takes over with the model.      [Table 3; rebuttal]
    "usit-2b": USIT_SIZES["2B"] | dict(model="usit", batch_size=1024, beta1=0.99, beta2=0.99, warmup=5000,
                                       steps=500_000, keep_every=50_000),
}
# What --help lists; --help-all lists the rest.
SHOWN = """preset tokenizer out init seed device dtype compile checkpointing workers data cache cache_images
    unconditional model path times guidance_free width depth steps batch_size accumulate lr ema save_every
    keep keep_every grid_every""".split()
FREE = {"out", "tokenizer", "init", "device", "dtype", "compile", "checkpointing", "ema_device", "workers",
        "accumulate", "data_root", "log_every", "save_every", "keep", "keep_every", "grid_every", "grid_cfg",
        "weights_dir"}


# ------------------------------------------- the cache of latents -------------------------------------------

SHARD_IMAGES = 8192     # at 128 x 32 latents, two flips, float16: 134 MB a shard, 157 shards for ImageNet


def cache_key(config, tokenizer, dataset):
    """A hash of all that the cached latents depend on: encoder weights, normalisation, images, preprocessing.
    """
    parts = [common.fingerprint(tokenizer.encoder), float(tokenizer.latent_mean), float(tokenizer.latent_std),
             dataset.source.fingerprint(), dataset.size, dataset.crop, config.flip, config.cache_images,
             "shuffled" if config.cache_images and dataset.length else "in order", config.cache_dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LatentCache(torch.utils.data.Dataset):
    """Memory-mapped latents. Keys are (epoch, index); items are (float32 (L, C) of unit variance, label int).

    The flip is drawn from (seed, epoch, index), as ImageDataset draws it. Raises UserError for a folder with
    the latents of another tokenizer, data set or preprocessing.
    """

    def __init__(self, folder, key, length, flip, seed):
        self.folder, self.length, self.flip, self.seed = Path(folder), length, flip, seed
        meta = self.folder / "meta.json"
        if meta.exists() and checkpoints.read_json(meta).get("key") != key:
            raise UserError(f"{folder} holds latents of another tokenizer, data set or preprocessing; "
                            "delete it, or choose another --out")
        self.shards = None

    def shard_paths(self, shard):
        return self.folder / f"latents_{shard:05d}.npy", self.folder / f"labels_{shard:05d}.npy"

    @staticmethod
    def latent_shape(tokenizer):
        """(L, C) of an image of the tokenizer's size."""
        c = tokenizer.config
        return c.num_latents if c.learnable_latents else (c.image_size // c.patch_size) ** 2, c.latent_dim

    def whole(self, shard, shape):
        """Whether a shard is there, is what was written, and has latents of this shape."""
        latents, labels = (checkpoints.load_npy(path) for path in self.shard_paths(shard))
        count = min(SHARD_IMAGES, self.length - shard * SHARD_IMAGES)
        if (latents is not None and labels is not None and latents.shape == (count, *shape)
                and labels.shape == (count,)):
            return True
        if any(path.exists() for path in self.shard_paths(shard)):
            print(f"warning: shard {shard} of {self.folder} is damaged or unfinished; its images are encoded "
                  "again", file=sys.stderr)
        return False

    @torch.no_grad()
    def build(self, key, tokenizer, dataset, dtype, batch_size, workers, rank, world, device):
        """Encode what is not there yet; whole shards appear by renaming, so an interruption
        costs one shard at most."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            checkpoints.remove_debris(self.folder)
            checkpoints.write_json(self.folder / "meta.json", {"key": key})
        if world > 1:
            dist.barrier()                                      # no shard is begun before the debris is gone
        order = range(self.length)
        if dataset.length and self.length < dataset.length:
            # Not the first images: the files of a folder are sorted by class.
            order = sample_rng(0, "some-images", 0, 0).permutation(dataset.length)[:self.length].tolist()
        count = -(-self.length // SHARD_IMAGES)
        shape = (2 if self.flip else 1, *self.latent_shape(tokenizer))
        todo = [s for s in range(rank, count, world) if not self.whole(s, shape)]
        images_left = sum(min(SHARD_IMAGES, self.length - s * SHARD_IMAGES) for s in todo)
        with tqdm(total=images_left, desc="encoding", unit="img", disable=rank > 0 or not todo) as bar:
            for shard in todo:
                indices = order[shard * SHARD_IMAGES:(shard + 1) * SHARD_IMAGES]
                batches = [[(0, i) for i in indices[a:a + batch_size]]
                           for a in range(0, len(indices), batch_size)]
                latents, labels = [], []
                for batch in common.batch_loader(dataset, batches, workers, device, collate):
                    images = to_float(batch[0].to(device))
                    views = [images, images.flip(-1)] if self.flip else [images]
                    z = torch.stack([tokenizer.encode(view, normalize=True)
                                     for view in views], 1)                             # (B, views, L, C)
                    latents.append(z.to(getattr(torch, dtype)).cpu().numpy())
                    labels.append(batch[1].numpy())
                    bar.update(len(images))
                paths = self.shard_paths(shard)
                for path, array in zip(paths, (np.concatenate(latents), np.concatenate(labels))):
                    checkpoints.atomic_write(path, lambda p: checkpoints.save_npy(p, array))
        if world > 1:
            dist.barrier()

    def open(self):
        """Map the shards; only what is read comes into memory, and the system may drop it again."""
        count = -(-self.length // SHARD_IMAGES)
        self.shards = [[np.load(path, mmap_mode="r") for path in self.shard_paths(s)] for s in range(count)]

    def __getstate__(self):
        """Without the maps, which pickle as all of their data: a loader's worker that is not forked (Python
        3.14's are not) maps the shards itself."""
        return self.__dict__ | {"shards": None}

    def __getitem__(self, key):
        if self.shards is None:
            self.open()
        epoch, index = key
        latents, labels = self.shards[index // SHARD_IMAGES]
        place = index % SHARD_IMAGES
        view = int(self.flip and sample_rng(self.seed, "flip", epoch, index).random() < 0.5)
        return torch.from_numpy(latents[place, view].astype(np.float32)), int(labels[place])


# ------------------------------------------------ training ------------------------------------------------

class Repa(nn.Module):
    """A diffusion model and the head that reads a teacher's patch features off its middle layer.

    kind "decoder": from L latent tokens to N patches goes a decoder of the tokenizer's kind, one layer deep:
    queries in the patches' places look at the tokens, as in [Eq. 7]. No token belongs to a patch. [ours: the
    rebuttal does not say]
    kind "mlp": as for 2D latents, three layers on each token [REPA]; token l then answers for the N/L
    patches from l N/L on, whatever they show [the authors' REPA code for 1D latents]. Raises UserError
    if L does not divide N.
    forward(x, t, y, beta) -> (velocity (B, L, C), features (B, N, D_teacher)).
    """

    def __init__(self, model, after, tokenizer, dim, kind="decoder", hidden=2048):
        super().__init__()
        c = dataclasses.replace(tokenizer.config, latent_dim=model.config.width, latent_modulation=False,
                                ape="none", rope="axial")
        self.model, self.after, self.grid, self.kind = model, after, tokenizer.grid((c.image_size,) * 2), kind
        self.patches_per_token, rest = divmod(math.prod(self.grid), model.config.num_latents)
        if kind == "mlp":
            if rest:
                raise UserError(f"--repa-head mlp: {model.config.num_latents} tokens do not divide the "
                                f"{math.prod(self.grid)} patches; choose decoder")
            self.head = nn.Sequential(nn.Linear(model.config.width, hidden), nn.SiLU(),
                                      nn.Linear(hidden, hidden), nn.SiLU(),
                                      nn.Linear(hidden, dim))                             # width 2048 [REPA]
        else:
            self.head = Decoder(c, 1, c.width, c.heads, dim)
            initialise(self.head)

    def forward(self, x, t, y, beta=None):
        v, hidden = self.model(x, t, y, beta, hidden_after=self.after)
        if self.kind == "mlp":
            return v, self.head(hidden).repeat_interleave(self.patches_per_token, 1)
        return v, self.head(hidden, self.grid)


class Batch(NamedTuple):
    """A micro-batch on the device, with all that is random about it."""
    x: torch.Tensor                    # (B, L, C) latents of unit variance
    noise: torch.Tensor                # (B, L, C) standard normal
    t: torch.Tensor                    # (B,) in [0, 1], noise at 1
    y: torch.Tensor                  # (B,) int64, the null class where the label was dropped or there is none
    beta: torch.Tensor | None          # (B,) 1 / guidance scale, of guidance-free training
    images: torch.Tensor | None        # (B, 3, H, W) in [-1, 1], where there is no cache
    span: torch.Tensor | None = None   # (B,) t - r of an average velocity [after the paper: MeanFlow]


def build_optimizer(config, model, device):
    """AdamW, in one group: Table 8 has no weight decay, so there is nothing to exempt from it. With `muon`
    the matrices of transformer blocks go to Muon."""
    trained = list(model.named_parameters())
    blocks, trained = split_blocks(trained) if config.muon else ([], trained)
    groups = [dict(params=[p for _, p in trained])]
    if blocks:
        groups.append(dict(params=blocks, muon=config.muon))
    return (Muon if blocks else torch.optim.AdamW)(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        fused=device.type != "mps")


@dataclass
class TrainState:
    """What training changes and a checkpoint holds."""
    model: nn.Module
    ema: common.EMA
    optimizer: torch.optim.Optimizer
    tokenizer: dict                    # its checkpoint, so that sampling needs no other file
    repa: Repa | None                  # around the model
    classes: list                      # their names, for pictures; empty: the model knows none
    step: int = 0


def prepare_batch(config, step, positions, loaded, tokenizer, device):
    """What the loader gave, (latents or images, labels), as a Batch. Everything random comes from (seed,
    step, global sample index), never from the process."""
    x, y, images, beta = loaded[0].to(device, non_blocking=True), loaded[1], None, None
    if not config.cache:
        images = to_float(x)
        with torch.no_grad():
            x = tokenizer.encode(images, normalize=True)
    rngs = [sample_rng(config.seed, "diffusion", step, int(i)) for i in positions]
    draw_times = lambda: shift_times(sample_times(rngs, config.times, config.path), shift_of(config))
    t, span = draw_times(), None
    noise = np.stack([rng.standard_normal(x.shape[1:], np.float32) for rng in rngs])
    y = torch.where(y < 0, config.num_classes, y)               # an image without a class: the null class
    y = (drop_labels(rngs, y, config.num_classes, config.label_dropout) if config.num_classes
         else torch.zeros_like(y))
    noise, y = common.to_device(torch.from_numpy(noise), device), common.to_device(y, device)
    if config.guidance_free:
        beta = common.to_device(torch.tensor([rng.random() for rng in rngs], dtype=torch.float32), device)
        beta = torch.where(y == config.num_classes, 1.0, beta)
    if config.mean_flow:
        t, span = draw_spans(rngs, t, draw_times(), config.mean_flow)
        span = common.to_device(span, device)
    return Batch(x, noise, common.to_device(t, device), y, beta, images, span)


def predict(config, wrapped, model, x_t, batch):
    """(velocity (B, L, C), and with REPA the features read off a middle layer, else None)."""
    more = {name: value for name, value in (("beta", batch.beta), ("span", batch.span)) if value is not None}
    prediction = wrapped(x_t, batch.t, batch.y, **more)
    prediction, features = prediction if config.repa else (prediction, None)
    if config.guidance_free:
        prediction = guidance_free_mixture(model, prediction, x_t, batch.t, batch.y, batch.beta)
    return prediction, features


def added_losses(config, prediction, v, features, images, teacher, log):
    """What some variants add to the velocity's loss: LightningDiT's direction, REPA's agreement.
    A scalar or 0."""
    loss = 0.0
    if config.direction_loss:
        loss = loss + config.direction_loss * velocity_direction_loss(prediction, v).mean()
    if config.repa:
        everywhere = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        agreement = masked_feature_loss(features, teacher(images), everywhere, "cosine")
        loss = loss + config.repa_weight * agreement
        log.add({"repa": agreement})
    return loss


def train(config, state, train_set, tokenizer, teacher, processes):
    """Train from state.step to config.steps; checkpoints, logs and pictures on the way.

    train_set gives latents (a LatentCache), or images, which are then encoded in the loop.
    teacher: of REPA, or None.
    """
    rank, world, device = processes
    dtype = common.autocast_dtype(config.dtype, device)
    batches = GlobalBatches(train_set.length, config.batch_size, state.step, config.steps, config.seed, rank,
                            world, config.accumulate)
    loader = common.batch_loader(train_set, batches, config.workers, device, collate)
    model, wrapped = state.model, state.repa or state.model
    if config.compile:
        model.compile()
    if world > 1:
        # gradient_as_bucket_view: gradients live in the buckets that are sent, not in a copy beside them.
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True,
                                          device_ids=[device.index] if device.type == "cuda" else None)
    log, clock = common.Averages(device), common.Clock(state.step)
    by_time = torch.zeros(2, TIME_BINS, device=device)      # sums of losses, counts
    bar = tqdm(total=config.steps, initial=state.step, desc="diffusion", disable=rank > 0, mininterval=1.0)
    while (step := state.step) < config.steps:
        lr = common.set_learning_rate(state.optimizer, config.lr * min(1, (step + 1) / max(1, config.warmup)))
        for micro, positions in enumerate(batches.positions()):
            batch = prepare_batch(config, step, positions, next(loader), tokenizer, device)
            x_t, v = interpolate(batch.x, batch.noise, batch.t, config.path)                # (B, L, C) each
            if config.mean_flow:
                v = mean_flow_target(model, x_t, v, batch.t, batch.y, batch.span)
            # DDP averages gradients at the last micro-batch only
            partial = micro + 1 < config.accumulate and world > 1
            with wrapped.no_sync() if partial else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    prediction, features = predict(config, wrapped, model, x_t, batch)
                losses = flow_matching_loss(prediction, v)                                  # (B,)
                weights = adaptive_weights(losses) if config.mean_flow else 1.0
                loss = (weights * losses).mean()
                loss = loss + added_losses(config, prediction, v, features, batch.images, teacher, log)
                (loss / config.accumulate).backward()
            bins = (batch.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
            by_time.index_add_(1, bins, torch.stack((losses.detach(), torch.ones_like(losses))))
        grad_norm = common.optimizer_step(state.optimizer, config.clip)
        log.check_finite(loss, grad_norm)
        state.ema.update(model)
        state.step = step = step + 1
        bar.update()

        stop = common.stop_signal(world)
        saving = step % config.save_every == 0 or step == config.steps or stop
        drawing = config.grid_every > 0 and (step % config.grid_every == 0 or step == config.steps)
        if step % config.log_every == 0 or saving or drawing:
            means = log.read(step, config)
            sums, counts = common.all_mean(by_time).tolist()
            by_time.zero_()
            record = {"step": step, "loss": sum(sums) / sum(counts),
                      "loss_t": [s / n if n else None                                # tenths of t, data first
                                 for s, n in zip(sums, counts)],
                      "grad_norm": float(grad_norm), "lr": lr,
                      "latents_per_second": clock.rate(step, config.batch_size)} | means
            if rank == 0:
                checkpoints.append_metrics(config.out, record)
                bar.set_postfix({"loss": f"{record['loss']:.4f}",
                                 "img/s": f"{record['latents_per_second']:.0f}"}, refresh=False)
        if rank == 0 and drawing:
            save_grid(config, state.ema.on(device), tokenizer, Path(config.out) / f"grid_{step:07d}.png",
                      device)
        if saving:
            save(config, state, processes)
        if stop:
            raise common.Stopped(stop)
    bar.close()


def save(config, state, processes):
    """One checkpoint, written by rank 0. The tokenizer is inside, so that sampling needs no other file, and
    the names of the classes."""
    if processes.rank == 0:
        content = {"kind": "diffusion", "step": state.step, "config": dataclasses.asdict(config),
                   "model": state.model.state_dict(), "ema": state.ema.model.state_dict(),
                   "ema_updates": state.ema.updates, "optimizer": state.optimizer.state_dict(),
                   "tokenizer": state.tokenizer, "classes": state.classes}
        if state.repa:
            content["repa_head"] = state.repa.head.state_dict()
        checkpoints.save_checkpoint(config.out, content, config.keep, config.keep_every)
    if processes.world > 1:
        dist.barrier()


@torch.no_grad()
def save_grid(config, model, tokenizer, path, device, columns=10, steps=50):
    """A PNG of EMA samples, one class a column: without guidance, and guided by grid_cfg.
    Euler, 50 steps: quick."""
    y = torch.arange(columns, device=device) % max(1, config.num_classes)
    noise = [sample_rng(config.seed, "grid", 0, i).standard_normal(
             (config.num_latents, config.latent_dim), np.float32)
             for i in range(columns)]
    noise, rows = torch.from_numpy(np.stack(noise)).to(device), {}
    for scale in (1.0, config.grid_cfg) if config.num_classes else (1.0,):
        x = euler(guided_velocity(model, y, scale), noise, steps, shift=shift_of(config),
                  average=bool(config.mean_flow))
        rows[f"guidance {scale:g}"] = to_uint8(tokenizer.decode(x, normalized=True))
    sheet = image_grid(list(rows.values()), list(rows))
    checkpoints.write_png(path, sheet)


@torch.no_grad()
def start_from(config, model, tokenizer, path):
    """Copy the EMA weights of another run's model into `model`: --init. With --guidance-free this fine-tunes
    a trained SiT, as Chen et al. (2025) do for some per cent of its training.                [rebuttal: 1.51]

    What the new model has beside them, the embedder of 1 / scale or of a span, answers 0 at first:
    at the start it is the model that was trained. Raises UserError for a run of other latents, or
    another path or output.
    """
    source, its_tokenizer, its_config = load_diffusion(path)
    if common.fingerprint(its_tokenizer.encoder) != common.fingerprint(tokenizer.encoder):
        raise UserError(f"--init {path} was trained on another tokenizer's latents")
    differ = [f"{name} {its_config.get(name, default)!r} -> {getattr(config, name)!r}" for name, default in
              (("model", "sit"), ("path", "linear"), ("x_prediction", False))
              if its_config.get(name, default) != getattr(config, name)]
    if differ:
        raise UserError(f"--init {path} holds another kind of model ({'; '.join(differ)}); "
                        "give the same options")
    weights = source.state_dict()
    for name, new in model.state_dict().items():
        if name.startswith(("beta_embedder.", "span_embedder.")) and name not in weights:
            weights[name] = torch.zeros_like(new) if ".mlp.2." in name else new              # its last layer
    checkpoints.load_weights(model, weights, path)


def load_state(config, state, checkpoint):
    """All that a checkpoint holds into `state`. Raises UserError for one of another run."""
    out = config.out
    checkpoints.check_same_config(checkpoint["config"], config, FREE, out)
    if any(not torch.equal(v, checkpoint["tokenizer"]["ema"].get(k, torch.empty(0)))
           for k, v in state.tokenizer["ema"].items()):
        raise UserError(f"the run in {out} was trained on another tokenizer; choose another --out")
    state.step = checkpoint["step"]
    checkpoints.load_weights(state.model, checkpoint["model"], out)
    checkpoints.load_weights(state.ema.model, checkpoint["ema"], out)
    state.ema.updates = checkpoint["ema_updates"]
    if state.repa:
        checkpoints.load_weights(state.repa.head, checkpoint["repa_head"], out)
    checkpoints.load_optimizer(state.optimizer, checkpoint["optimizer"], out)


# ------------------------------------------------ main ------------------------------------------------

def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    config = common.parse_config(Config, PRESETS, list(PRESETS), __doc__, argv,
                                 hidden=("num_latents", "latent_dim", "num_classes"), shown=SHOWN)
    if not config.tokenizer:
        raise UserError("which tokenizer? Give --tokenizer RUN_FOLDER_OR_CHECKPOINT of train_tokenizer.py")
    rank, world, device = processes = common.start_processes(config.device)
    if config.batch_size % (world * config.accumulate):
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {world} processes x "
                        f"{config.accumulate} accumulation steps")
    source = checkpoints.load_checkpoint(config.tokenizer)
    source = source["tokenizer"] if source.get("kind") == "diffusion" else source    # it brings its own along
    tokenizer = tokenizer_of(source, config.tokenizer).to(device)
    if not source["measured"]:
        raise UserError(f"{config.tokenizer} is from the middle of a training stage: "
                        "the mean and std of its latents, without which diffusion fails, "
                        "are measured at the end; finish that run first")
    tokenizer_state = {k: source[k] for k in ("kind", "stage", "step", "measured", "config", "ema")}
    config.data = config.data or source["config"]["data"]
    # The cache holds both flips of an image itself, so its images come unflipped.
    with common.rank_zero_first(rank, world):
        train_set = build_dataset(config.data, "train", tokenizer.config.image_size, config.data_root,
                                  config.flip and not config.cache, "center", config.seed,
                                  config.skip_corrupt)

    # ---- what the tokenizer and the data fix ----
    config.num_latents, config.latent_dim = LatentCache.latent_shape(tokenizer)
    classes = [] if config.unconditional else list(train_set.classes or ())
    config.num_classes = len(classes)

    out = Path(config.out)
    torch.manual_seed(config.seed)
    model = build_model(dataclasses.asdict(config)).to(device)
    if config.init:
        start_from(config, model, tokenizer, config.init)
    if config.checkpointing:
        common.recompute_blocks(model, (SiTBlock, LightningDiTBlock, USiTBlock))
    ema = common.EMA(model, config.ema, config.ema_device, config.ema_warmup)
    repa = teacher = None
    if config.repa:
        with common.rank_zero_first(rank, world):
            teacher = load_teacher(config.repa, tokenizer.config.patch_size, config.weights_dir, device,
                                   config.random_frozen)
        repa = Repa(model, config.repa_block, tokenizer, teacher.dim, config.repa_head).to(device)
    optimizer = build_optimizer(config, repa or model, device)
    state = TrainState(model, ema, optimizer, tokenizer_state, repa, classes)
    if rank == 0:
        checkpoints.lock(out)
    checkpoint = checkpoints.find_checkpoint(out, rank)
    if checkpoint is not None:
        load_state(config, state, checkpoint)
    checkpoint = source = None                          # the memory of two checkpoints, in every process
    checkpoints.check_same_step(state.step, out, rank, world, device)
    if config.cache:
        length = min(config.cache_images or train_set.length or 0, train_set.length or config.cache_images)
        if length == 0:
            raise UserError(f"--data {config.data} is endless: say with --cache-images how many to encode, "
                            "or --no-cache")
        key = cache_key(config, tokenizer, train_set)
        cache = LatentCache(out / "latents", key, length, config.flip, config.seed)
        cache.build(key, tokenizer, train_set, config.cache_dtype, min(64, config.batch_size), config.workers,
                    rank, world, device)
        skipped, train_set = train_set.skipped, cache
    if rank == 0:
        checkpoints.start_run(config, state.step)
        if config.cache and skipped:
            print(f"passed over unreadable images {int(skipped)} times")
        print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M; {world} x {device}; "
              f"{out}/ at step {state.step} of {config.steps}", flush=True)
        print(checkpoints.checkpoint_budget(model, config.save_every, config.steps, config.keep,
                                            config.keep_every))
    train(config, state, train_set, tokenizer, teacher, processes)
    if rank == 0:
        records = checkpoints.read_metrics(out)
        curves = {"loss": [(r["step"], r["loss"]) for r in records]}
        for b in (0, TIME_BINS // 2, TIME_BINS - 1):
            curves[f"loss for t in [{b / TIME_BINS:g}, {(b + 1) / TIME_BINS:g})"] = [
                (r["step"], r["loss_t"][b]) for r in records if r["loss_t"][b] is not None]
        plot_curves(curves).save(out / "loss.png")
        print(f"done: {out}/last.pt, loss.png, metrics.jsonl, grid_*.png")


if __name__ == "__main__":
    common.run(main)
