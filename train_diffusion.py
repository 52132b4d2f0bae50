"""Train SiT on the latents of a frozen tokenizer.                                         [Sec. 4.1, Table 8]

    python train_diffusion.py --tokenizer runs/tokenizer-shapes          # laptop, after train_tokenizer.py
    python train_diffusion.py --preset cifar10 --tokenizer runs/tokenizer-cifar10
    torchrun --nproc-per-node=8 train_diffusion.py --preset sit-xl --tokenizer RUN --data IMAGENET   # Table 8

One step, for a batch of latents x of unit variance with classes y:
    draw a time t in [0, 1] and noise eps; drop one label in ten, y = null
    x_t = (1 - t) x + t eps,  v = eps - x                                                 [flow.interpolate]
    AdamW on |v_theta(x_t, t, y) - v|^2; then the moving average of the weights               [SiT, Table 8]

The images are encoded once, both flips, into a cache beside the run (cache.py). The same command resumes from
the last checkpoint, with any number of processes.

Time: data at t = 0, noise at t = 1. Shapes: B batch · L latent tokens · C latent channels.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common    # before torch, see runtime/processes.py

import numpy as np
import torch
import torch.nn as nn

import checkpoints
from runtime import files, resuming
from cache import encode_once, posterior_rngs
from common import (Count, Decay, Positive, Seed, Share, UserError, Whole, Workers, standard_normal,
                    step_rngs)
from data import GlobalBatches, build_dataset, collate, to_float, to_uint8
from flow import drop_labels, flow_matching_loss, interpolate, sample_latents, sample_times
from maetok import tokenizer_of
from pictures.draw import image_grid
from runtime.processes import (all_mean, autocast, data_parallel, exchange_gradients, faster_products,
                               rank_zero_first, run, start_processes, to_device)
from sit import SIZES, Diffusion, SiTConfig, TimestepEmbedder, load_diffusion

CLIP = 1.0                                              # largest gradient norm [released code]
GRID_CFG, GRID_STEPS = 2.0, 50                          # of the pictures: guidance scale, Euler steps
TIME_BINS = 10                                          # of the loss by t in the log


@dataclass
class Config(SiTConfig):
    """Everything a run depends on. The defaults are the paper's SiT-XL [Table 8]; presets change them."""
    # ---- run ----
    preset: str = "shapes"        # names joined by commas, later ones win; see PRESETS in this file
    add: str = ""                 # extras, files of variants/ and after/, joined by commas; order matters
    tokenizer: str = ""           # run or checkpoint of train_tokenizer.py, or of this script: its tokenizer
    out: str = ""                 # folder of the run (default: runs/diffusion-DATA-PRESET)
    init: str = ""                # start from the EMA weights of this run or checkpoint, of the same latents
    seed: Seed = 0                # of weights, data order, flips, times, noise and label dropout
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # autocast: auto (bfloat16 where fast), float32, bfloat16
    compile: bool = False         # torch.compile the model; pays off on GPUs in runs longer than some minutes
    checkpointing: bool = False   # less memory, more time: the backward pass computes blocks again
    workers: Workers = -1         # loader processes for each training process; -1: 8 on CUDA, none elsewhere
    # ---- data ----
    data: str = ""                # shapes, cifar10, a folder or an .npz file (default: the tokenizer's)
    data_root: str = "data"       # where cifar10 is looked for and downloaded to
    flip: bool = True             # random horizontal flip [Table 8]; the cache holds both versions
    cache: bool = True            # encode all images once, before training; off: in every step
    cache_images: Whole = 0       # encode only so many; 0: all. An endless data set needs a number
    unconditional: bool = False   # without classes [Table 5]
    # ---- objective ----
    path: str = "linear"          # linear or cosine interpolant between data and noise; see flow.py
    times: str = "uniform"        # uniform [Sec. 4.1] or logit-normal [released code's README]
    label_dropout: Share = 0.1    # part of the labels replaced by the null class, for guidance [SiT]
    # ---- optimisation ----
    steps: Count = 4_000_000      # [Table 8]; SiT-L in the ablations: 400,000
    batch_size: Count = 256       # latents per step over all processes [Table 8]
    accumulate: Count = 1         # forward passes per step, for batches that do not fit the device
    lr: Positive = 1e-4           # constant [Table 8]
    warmup: Whole = 0             # steps of linear warm-up; none in the paper
    lr_decay: Share = 0.0         # part of the steps, at the end, in which lr falls to 0; none in the paper
    ema: Decay = 0.9999           # decay [SiT]
    # ---- logs ----
    log_every: Count = 100        # steps between lines of metrics.jsonl
    save_every: Count = 10_000    # steps between checkpoints and pictures
    keep_every: Whole = 500_000   # steps between checkpoints that stay, for Fig. 5b; 0: the newest only

    def __post_init__(self):
        super().__post_init__()
        run = Path(self.tokenizer)
        run = (run.parent if run.suffix == ".pt" else run).name.removeprefix("tokenizer-")
        self.out = self.out or common.run_name("diffusion", Path(self.data).stem, run, self.preset)
        common.check_choices(self, path=("linear", "cosine"), times=("uniform", "logit-normal"))


# The scale of a run. The first is the default.
PRESETS = {
    "shapes": dict(width=128, depth=6, heads=4, flip=False, cache_images=30_000, steps=3000, batch_size=64,
                   lr=1e-3, warmup=100, ema=0.998, log_every=50, save_every=375, keep_every=375),
    "photos": dict(width=192, depth=6, heads=3, steps=3000, batch_size=64, lr=1e-3, warmup=100, ema=0.998,
                   log_every=50, save_every=375, keep_every=375),
    "cifar10-box": dict(width=192, depth=8, heads=3, steps=12_500, batch_size=128, lr=1e-3, warmup=500,
                        lr_decay=0.1, ema=0.9998, times="logit-normal", save_every=1500, keep_every=1500),
    "cifar10": dict(width=256, depth=8, heads=4, steps=100_000, batch_size=128, lr=3e-4, warmup=500,
                    ema=0.9995, save_every=2000, keep_every=10_000),
    "imagenet64": SIZES["B"] | dict(steps=80_000, lr=2e-4, warmup=1000, ema=0.9995, save_every=5000,
                                    keep_every=10_000),                                               # [ours]
    "sit-s": SIZES["S"], "sit-b": SIZES["B"],
    "sit-l": SIZES["L"] | dict(steps=400_000, keep_every=50_000),            # [Sec. 4.1, ablations]
    "sit-xl": SIZES["XL"],                                                             # [Table 8]
}
# Options that may differ when a run is resumed: they do not change what is learned.
RESUMABLE_WITH = {"out", "tokenizer", "init", "device", "dtype", "compile", "checkpointing", "workers",
                  "accumulate", "data", "data_root", "log_every", "save_every", "keep_every", "weights_dir"}


# ----------------------------------------------- the method -----------------------------------------------

class Batch(NamedTuple):
    """A micro-batch on the device, with all that is random about it."""
    x: torch.Tensor                    # (B, L, C) latents of unit variance
    noise: torch.Tensor                # (B, L, C) standard normal, eps
    t: torch.Tensor                    # (B,) in [0, 1], noise at 1
    y: torch.Tensor                    # (B,) int64; the null class where the label was dropped or is missing
    images: torch.Tensor | None        # (B, 3, H, W) in [-1, 1], without a cache
    rngs: list                         # one numpy Generator per sample: extras continue to draw from it
    more: dict                         # further inputs of the model, from extras


class Method(Diffusion):
    """What one step of training does: the paper. Extras (--add) are put in front of this class and override
    its methods; nothing here knows of them."""
    Config, PRESETS = Config, PRESETS
    BETAS = (0.9, 0.999)                                # AdamW [Table 8]
    EMA_WARMUP = True                                   # smaller decay in the first steps [ours]

    def __init__(self, config, tokenizer, device):
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.others = {}                                # modules trained beside the model, from extras

    def network(self, model):
        """What is trained: the model. An extra may put a module around it."""
        return model

    def optimizer(self, network):
        """AdamW in one group: Table 8 has no weight decay, so there is nothing to exempt from it."""
        return torch.optim.AdamW(network.parameters(), lr=self.config.lr, betas=self.BETAS, weight_decay=0.0,
                                 fused=self.device.type != "mps")

    def draw_times(self, rngs):
        """Training times, (B,) on the CPU."""
        return sample_times(rngs, self.config.times, self.config.path)

    def batch(self, step, positions, loaded):
        """What the loader gave, (latents or images, labels), as a Batch. Everything random follows from
        (seed, step, global sample index), never from the process."""
        config, images, send = self.config, None, lambda tensor: to_device(tensor, self.device)
        x, y = loaded[0].to(self.device, non_blocking=True), loaded[1]
        if not config.cache:
            images = to_float(x)
            with torch.no_grad():
                x = self.tokenizer.encode(images, normalize=True, rngs=posterior_rngs(
                    self.tokenizer, positions, step, config.seed))
        rngs = step_rngs(config, "diffusion", step, positions)
        t = self.draw_times(rngs)
        noise = standard_normal(rngs, x.shape[1:])
        y = torch.where(y < 0, config.num_classes, y)               # an image without a class: the null class
        y = (drop_labels(rngs, y, config.num_classes, config.label_dropout) if config.num_classes
             else torch.zeros_like(y))
        return Batch(x, send(noise), send(t), send(y), images, rngs, {})

    def objective(self, prediction, x_t, v, batch):
        """E |v_theta(x_t, t, y) - v|^2 [SiT, Sec. 2]. prediction, x_t, v: (B, L, C). Returns (loss, squared
        error of each sample (B,), {name: term}): the terms that extras add, not weighted."""
        losses = flow_matching_loss(prediction, v)                                                   # (B,)
        return losses.mean(), losses, {}


# ------------------------------------------------ training ------------------------------------------------

class LossByTime:
    """The mean loss in each tenth of the times, data first, since the last line of the log."""

    def __init__(self, device):
        self.sums = torch.zeros(2, TIME_BINS, device=device)                              # losses, counts

    def add(self, t, losses):
        bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        self.sums.index_add_(1, bins, torch.stack((losses.detach(), torch.ones_like(losses))))

    def read(self):
        """A list, None where there was no sample; then all is 0 again."""
        sums, counts = all_mean(self.sums).tolist()
        self.sums.zero_()
        return [s / n if n else None for s, n in zip(sums, counts)]


def learning_rate(config, step):
    """Constant [Table 8], but for linear warm-up and, over the last `lr_decay` of the steps, a linear fall to
    0: a short run ends nearer to its minimum."""
    falling = max(1, config.lr_decay * config.steps)
    return config.lr * min(1, (step + 1) / max(1, config.warmup), (config.steps - step) / falling)


def train(method, state, network, train_set, processes):
    """Train from state.step to config.steps; checkpoints, logs and pictures on the way. train_set gives
    latents (a LatentCache), or images, which are then encoded in every step."""
    config, device = method.config, processes.device
    batches = GlobalBatches(train_set.length, config.batch_size, state.step, config.steps, config.seed,
                            processes.rank, processes.world, config.accumulate)
    loader = common.batch_loader(train_set, batches, config.workers, device, collate)
    if config.compile:
        state.model.compile()
    wrapped = data_parallel(network, processes)
    log = checkpoints.Log(config, processes, state.step, 0, config.steps, "diffusion", shown=("loss",),
                          draw=lambda path: draw_grid(method, state.ema.model, path))
    by_time = LossByTime(device)
    while (step := state.step) < config.steps:
        lr = common.set_learning_rate(state.optimizer, learning_rate(config, step))
        with log.counted():
            for micro, positions in enumerate(batches.positions()):
                batch = method.batch(step, positions, next(loader))
                x_t, v = interpolate(batch.x, batch.noise, batch.t, config.path)            # (B, L, C) each
                with exchange_gradients(micro + 1 == config.accumulate, wrapped):
                    with autocast(config.dtype, device, config.width):
                        prediction = wrapped(x_t, batch.t, batch.y, **batch.more)         # v_theta(x_t, t, y)
                    loss, losses, terms = method.objective(prediction, x_t, v, batch)
                    (loss / config.accumulate).backward()
                log.add({"loss": losses.mean()} | terms)
                by_time.add(batch.t, losses)
        grad_norm = common.optimizer_step(state.optimizer, CLIP)
        log.check_finite(loss, grad_norm)
        state.ema.update(state.model)
        state.step += 1
        log.end_step(state, loss_t=by_time.read, lr=lambda: lr, grad_norm=grad_norm.item)


@torch.no_grad()
def draw_grid(method, model, path, columns=10):
    """A PNG of samples, one class per column, without guidance and with it, from the same noise."""
    c, rows = method.config, {}
    for scale in (1.0, GRID_CFG) if c.num_classes else (1.0,):
        x = sample_latents(model, range(columns), np.arange(columns) % max(1, c.num_classes), c.seed, scale,
                           sampler="euler", steps=GRID_STEPS)
        rows[f"guidance {scale:g}"] = to_uint8(method.tokenizer.decode(x, normalized=True))
    files.write_png(path, image_grid(list(rows.values()), list(rows)))


# ------------------------------------------------ the run ------------------------------------------------

@torch.no_grad()
def start_from(config, model, tokenizer, path):
    """--init: copy the EMA weights of another run's model into `model`. An embedder that the other run lacks
    starts at 0, so fine-tuning starts from the trained model. Raises UserError for other latents, another
    network or path."""
    source, its_tokenizer, its_config = load_diffusion(path)
    if common.fingerprint(its_tokenizer.encoder) != common.fingerprint(tokenizer.encoder):
        raise UserError(f"--init {path} was trained on another tokenizer's latents")
    kind = lambda model: (type(model).network, type(model).forward)                # which functions these are
    if kind(source) != kind(model) or its_config["path"] != config.path:
        raise UserError(f"--init {path} holds another kind of model (--add {its_config.get('add', '')!r} -> "
                        f"{config.add!r}, --path {its_config['path']} -> {config.path}): use the same")
    weights = source.state_dict()
    for name, part in model.named_children():
        if isinstance(part, TimestepEmbedder) and not hasattr(source, name):
            nn.init.zeros_(part.mlp[2].weight)                                    # its bias is 0 already
            weights |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    checkpoints.load_weights(model, weights, path)


def load_tokenizer(path):
    """(tokenizer, what a diffusion checkpoint holds of it), of --tokenizer. Raises UserError."""
    if not path:
        raise UserError("which tokenizer? Give --tokenizer RUN_FOLDER_OR_CHECKPOINT of train_tokenizer.py")
    state = checkpoints.load_checkpoint(path)
    if state.get("kind") == "diffusion":
        state = checkpoints.Checkpoint(state["tokenizer"], path)
    tokenizer = tokenizer_of(state, path)
    if not state["measured"]:
        raise UserError(f"{path} is from the middle of a training stage: the mean and std of its latents, "
                        "without which diffusion fails, are measured at the end; finish that run first")
    kept = {k: state[k] for k in ("kind", "add", "stage", "step", "measured", "config", "ema")}
    kept["ema"] = {name: w for name, w in kept["ema"].items() if not name.startswith("aux_decoders.")}
    return tokenizer, kept


def start(method, tokenizer_state, classes, processes):
    """(TrainState to go on from, method.network of its model): new, from --init, or where the last run of
    this command stopped."""
    config, out = method.config, Path(method.config.out)
    torch.manual_seed(config.seed)
    model = faster_products(method.Model(config)).to(processes.device)
    if processes.rank == 0:
        files.lock(out)
    checkpoint = checkpoints.find_checkpoint(out, processes.rank)
    if checkpoint is not None:
        # Until the learning rate falls it does not depend on the number of steps: the end may be moved.
        ends = [(1 - c.get("lr_decay", 0)) * c["steps"] for c in (checkpoint["config"], vars(config))]
        end = {"steps", "lr_decay"} if checkpoint["step"] <= min(ends) else set()
        resuming.check_same_config(checkpoint["config"], config, RESUMABLE_WITH | end, out)
        known, now = tokenizer_of(checkpoint, out), method.tokenizer
        if common.fingerprint(known.encoder) != common.fingerprint(now.encoder):
            raise UserError(f"the run in {out} was trained on another tokenizer; choose another --out")
        # A stage 2 since then has another decoder and measured the latents anew: the model keeps its scale.
        for name in ("latent_mean", "latent_std"):
            tokenizer_state["ema"][name] = getattr(now, name).copy_(getattr(known, name)).cpu()
    elif config.init:
        start_from(config, model, method.tokenizer, config.init)
    if config.checkpointing:
        common.recompute_blocks(model)
    ema = common.EMA(model, config.ema, method.EMA_WARMUP)           # before an extra may hook into the model
    network = method.network(model)
    # The tokenizer is saved with the model, so that sampling needs no other file; the classes' names, too.
    facts = {"kind": "diffusion", "add": common.model_extras(method, config.add), "classes": classes,
             "tokenizer": tokenizer_state}
    state = common.TrainState(model, ema, method.optimizer(network), others=method.others, facts=facts)
    if checkpoint is not None:
        checkpoints.restore(state, checkpoint, out)
        state.facts["tokenizer"] = tokenizer_state
    resuming.check_same_step(state.step, out, *processes)
    return state, network


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    kind = common.attach_named(Method, argv)                                        # --add
    config = common.parse_config(kind.Config, kind.PRESETS, list(kind.PRESETS), __doc__, argv,
                                 hidden=("num_latents", "latent_dim", "num_classes"))
    rank, world, device = processes = start_processes(config.device)
    common.check_batch(config, world)
    tokenizer, tokenizer_state = load_tokenizer(config.tokenizer)
    config.data = config.data or tokenizer_state["config"]["data"]
    with rank_zero_first(rank):
        method = kind(config, tokenizer.to(device), device)                  # loads frozen networks, if any
        # The cache holds both flips of an image itself, so its images come unflipped.
        train_set = build_dataset(config.data, "train", tokenizer.config.image_size, config.data_root,
                                  config.flip and not config.cache, seed=config.seed)
    # What the tokenizer and the data fix.
    config.num_latents, config.latent_dim = tokenizer.config.latent_shape()
    classes = [] if config.unconditional else list(train_set.classes or ())
    config.num_classes = len(classes)
    if rank == 0 and not classes and not config.unconditional:
        print(f"note: --data {config.data} has no classes: the model is unconditional, without guidance")
    state, network = start(method, tokenizer_state, classes, processes)
    checkpoints.start_run(config, state, processes, config.steps, train_set)
    if config.cache:
        train_set = encode_once(config, tokenizer, train_set, processes)
    train(method, state, network, train_set, processes)
    guided = " --cfg 2" * bool(config.num_classes and config.label_dropout)
    checkpoints.end_run(config, processes, "sample.py --ckpt", guided)


if __name__ == "__main__":
    run(main)
