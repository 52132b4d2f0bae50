"""From images to features, and to what evaluate.py compares samples and reconstructions with.

    feature_network                  Inception, or a small classifier trained on the spot
    FeatureStatistics, collect       features of a set of images, as streamed statistics, over all processes
    reference                        what to compare with: images, or statistics that were saved
    open_run, score                  samples of a diffusion run against a reference

`args` is evaluate.py's command line with rank, world and device.
"""
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
from runtime import files
import common
import metrics
from common import UserError
from data import GlobalBatches, build_dataset, collate, to_float
from flow import choose_labels
from measures.image_sets import (batches, data_of, draws, gather, load_model, open_data, open_samples,
                               reconstructions)
from frozen.inception import load_inception
from frozen.pretrained import load_teacher
from runtime.processes import autocast_dtype, cast_matrices, rank_zero_first


class Report(NamedTuple):
    """What a command of evaluate.py returns."""
    result: dict                      # for JSON; "protocol" says how it was measured
    table: list = []                  # rows to print
    pictures: dict = {}               # ending of the file's name -> PIL image


# --------------------------------------------- feature networks ---------------------------------------------

def small_classifier(num_classes):
    """A plain convolutional network for images of 16 px or more: (B, 3, H, W) float in [-1, 1] ->
    (B, num_classes) logits. The input of its last layer, 128 values per image, serves as a feature. [ours]"""
    layers, channels = [], 3
    for width, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@torch.enable_grad()
def train_classifier(train_set, device, steps=800, batch_size=64, seed=0):
    """small_classifier in eval mode, trained on a labelled ImageDataset: AdamW, the learning rate falling
    linearly from 1e-3 to 0, cross-entropy."""
    torch.manual_seed(seed)
    model = small_classifier(len(train_set.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    batches = GlobalBatches(train_set.length, batch_size, 0, steps, seed)
    loader = common.batch_loader(train_set, batches, -1, device, collate)
    for step, batch in enumerate(tqdm(loader, desc="classifier", total=steps)):
        if (batch[1] < 0).any():
            raise UserError("an image of --data has no class: the classifier needs all labelled")
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = F.cross_entropy(model(to_float(batch[0].to(device))), batch[1].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


class ClassifierFeatures(NamedTuple):
    """Features of the small classifier or EfficientNet, with the names of Inception's output."""
    pool: torch.Tensor                # (B, 128), EfficientNet (B, 112)
    logits: torch.Tensor | None       # (B, num_classes); EfficientNet: None
    spatial: None = None


def load_classifier(args, data, size, build=small_classifier, train=train_classifier):
    """The classifier of this data set and size, in eval mode, and its name. Rank 0 trains it once, and keeps
    it in --cache. build, train: another one's."""
    with rank_zero_first(args.rank):
        train_set = build_dataset(data, "train", size, args.data_root, flip=True)
        if not train_set.classes:
            raise UserError(f"--data {data} has no classes to train a classifier on")
        key = hashlib.sha256(json.dumps(
            [train_set.source.fingerprint(), size, args.classifier_steps,
             *[build.__name__] * (build is not small_classifier)]).encode()).hexdigest()[:16]
        cached = Path(args.cache) / f"classifier_{key}.pt"
        if cached.exists():
            try:
                checkpoints.load_checkpoint(cached)
            except UserError as e:
                print(f"warning: {e}; it is trained again")
                cached.unlink()
        if not cached.exists():
            model = train(train_set, args.device, args.classifier_steps)
            cached.parent.mkdir(parents=True, exist_ok=True)
            state = {"config": {"data": data, "size": size}, "model": model.state_dict()}
            files.atomic_write(cached, lambda path: torch.save(state, path))
    model = build(len(train_set.classes))
    checkpoints.load_weights(model, checkpoints.load_checkpoint(cached)["model"], cached)
    return model.to(args.device).eval(), f"classifier {key}"


def feature_network(args, data, size):
    """--features as (function, name). The function maps uint8 (B, 3, H, W) to .pool, .logits, .spatial.

    The name contains everything that features depend on: features of different names do not compare.
    """
    if args.features == "inception":
        with rank_zero_first(args.rank):
            return load_inception(args.weights_dir, args.device), "inception tf1"
    if args.features == "efficientnet":
        # ImageNet-trained, from a package; the mean of an 8 x 8 grid of features
        teacher = load_teacher("efficientnet-lite0", size // 8, device=args.device)
        return (lambda images: ClassifierFeatures(teacher(to_float(images)).mean(1), None),
                "efficientnet-lite0, stride 16")
    if not data:
        raise UserError("--features classifier needs --data: labelled real images to train the classifier on")
    model, name = load_classifier(args, data, size)

    def network(images):
        pool = model[:-1](to_float(images))
        return ClassifierFeatures(pool, model[-1](pool))

    return network, name


def distance_name(args, kind):
    """The name of the Fréchet distance: rfid or gfid (kind "r", "g") in Inception's features only."""
    return f"{kind}fid" if args.features == "inception" else f"frechet_in_{args.features}_features_not_fid"


# ----------------------------------------------- statistics -----------------------------------------------

class FeatureStatistics:
    """Mean and covariance of a stream of d-vectors, in float64. The memory does not grow with the stream: d
    vectors at a time are folded into (count, mean, scatter) by one matrix product."""

    def __init__(self, dim):
        self.waiting, self.folded = [], 0                      # a list of (b, d); vectors in mean and scatter
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)      # sum of (x - mean)(x - mean)^T

    @classmethod
    def from_covariance(cls, mean, covariance, count=2):
        """Statistics that were saved: mean (d,), covariance (d, d). For ADM's files, which do not give the
        count, any number from 2 on."""
        self = cls(len(mean))
        self.folded, self.mean, self.scatter = count, mean.double(), covariance.double() * (count - 1)
        return self

    @property
    def count(self):
        return self.folded + sum(map(len, self.waiting))

    def update(self, features):
        """Add features (b, d), any float dtype and device. Raises UserError for NaN and infinity."""
        x = features.detach().cpu().double()
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise UserError(f"features of shape {tuple(x.shape)} where (n, {len(self.mean)}) was expected")
        if not x.isfinite().all():
            raise UserError("the features hold NaN or infinite values: "
                            "are the weights of the feature network damaged, or the images not 0..255?")
        self.waiting.append(x)
        if self.count - self.folded >= len(self.mean):
            self._fold()

    def _fold(self):
        """The update of Chan, Golub and LeVeque (1983), without the cancellation in E[xx] - E[x]E[x]."""
        if not self.waiting:
            return
        x, self.waiting = torch.cat(self.waiting), []
        mean, total = x.mean(0), self.folded + len(x)
        delta = mean - self.mean
        self.mean = self.mean + delta * (len(x) / total)
        self.scatter = (self.scatter + (x - mean).T @ (x - mean)
                        + torch.outer(delta, delta) * (self.folded * len(x) / total))
        self.folded = total

    def all_reduce(self, world, device):
        """Merge over all processes; each then has the statistics of all. device: where processes can sum."""
        if world > 1:
            self._fold()
            sums = torch.cat((self.mean * self.folded, torch.ones(1).double() * self.folded)).to(device)
            dist.all_reduce(sums)
            sums = sums.cpu()
            mean = sums[:-1] / sums[-1]
            delta = self.mean - mean
            scatter = (self.scatter + self.folded * torch.outer(delta, delta)).to(device)
            dist.all_reduce(scatter)
            self.folded, self.mean, self.scatter = int(sums[-1]), mean, scatter.cpu()

    def mean_and_covariance(self):
        """Mean (d,) and unbiased covariance (d, d), float64. Raises UserError for fewer than 2 vectors."""
        if self.count < 2:
            raise UserError(f"too few images: a covariance needs 2 or more, here are {self.count}")
        self._fold()
        return self.mean, self.scatter / (self.folded - 1)


def frechet_between(a, b):
    """The Fréchet distance of two FeatureStatistics."""
    return metrics.frechet_distance(*a.mean_and_covariance(), *b.mean_and_covariance())


class Features(NamedTuple):
    """Features of a set of images. vectors and logits are None where they were not asked for."""
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    vectors: torch.Tensor | None      # (n, d) float32, in file order
    logits: torch.Tensor | None       # (n, classes) float32


@torch.no_grad()
def collect(args, network, stream, vectors=0, logits=False):
    """Features of a stream of (indices, uint8 batches), merged over processes. vectors: how many images, from
    the first on, whose features themselves are kept."""
    pool = spatial = None
    kept = {"vectors": [], "logits": []}
    for indices, images in stream:
        output = network(images.to(args.device))
        if pool is None:
            pool = FeatureStatistics(output.pool.shape[1])
            spatial = None if output.spatial is None else FeatureStatistics(output.spatial.shape[1])
        pool.update(output.pool)
        if spatial is not None:
            spatial.update(output.spatial)
        kept["vectors"] += [output.pool[:max(0, vectors - indices[0])].float().cpu()] if vectors else []
        kept["logits"] += [output.logits.float().cpu()] if logits and output.logits is not None else []
    if pool is None:
        raise UserError(f"too few images for {args.world} processes: each must have one at least")
    for statistics in (pool, spatial):
        if statistics is not None:
            statistics.all_reduce(args.world, args.device)
    kept = {name: gather(torch.cat(rows), args) if rows else None for name, rows in kept.items()}
    return Features(pool, spatial, **kept)


# ----------------------------------------------- references -----------------------------------------------

PRECISION_IMAGES = 10_000             # reference images whose manifold is compared [ADM]


def read_reference(args, network, name, size):
    """--reference FILE.npz as (Features, description): its statistics if it has them, else of its images."""
    wanted = ("mu", "sigma", "mu_s", "sigma_s", "vectors", "network", "count")
    try:
        with np.load(args.reference, allow_pickle=False) as file:
            keys = set(file.files)
            stored = {key: file[key] for key in wanted if key in keys}
    except Exception as e:   # zipfile, zlib, numpy and the OS raise different errors for a broken file
        raise UserError(f"cannot read {args.reference}: {files.npz_fault(e)}") from e
    ready = {"mu", "sigma"} <= keys
    if not ready and "arr_0" not in keys:
        raise UserError(f"{args.reference} has neither images (arr_0) nor statistics (mu, sigma); "
                        f"found: {', '.join(sorted(keys)) or 'nothing'}")
    if str(stored.pop("network", name)) != name:
        raise UserError(f"{args.reference} holds statistics of other features than '{name}'; "
                        "give the same --features as when it was saved")
    count = int(stored.pop("count", 2))                                          # ADM's files do not say it
    stored = {key: torch.from_numpy(array) for key, array in stored.items()}
    images = open_samples(args.reference) if "arr_0" in keys else None
    if images is not None and images.size != size:
        raise UserError(f"images of {size} px cannot be compared with those of {images.size} px in "
                        f"{args.reference}; take a reference of the same size")
    if not ready:
        return (collect(args, network, batches(images, args, "reference"), vectors=PRECISION_IMAGES),
                f"{len(images.labels)} images of {args.reference}")
    pool, spatial = (saved_statistics(args.reference, stored, *names, count)
                     for names in (("mu", "sigma"), ("mu_s", "sigma_s")))
    vectors = stored.get("vectors")
    if vectors is None and images is not None:
        first = images._replace(labels=images.labels[:PRECISION_IMAGES])
        vectors = collect(args, network, batches(first, args, "reference"), PRECISION_IMAGES).vectors
    return Features(pool, spatial, vectors, None), f"statistics in {args.reference}"


def saved_statistics(path, stored, mean, covariance, count):
    """Two arrays of a reference file as FeatureStatistics; None if they are not there. Raises UserError."""
    if mean not in stored or covariance not in stored:
        return None
    m, c = stored[mean], stored[covariance]
    if (m.ndim != 1 or c.shape != 2 * m.shape or m.is_complex() or c.is_complex()
            or not (m.isfinite().all() and c.isfinite().all())):
        raise UserError(f"{path}: {mean} and {covariance} should be finite real numbers, (d,) and (d, d)")
    scale = c.double().diagonal().abs().max().clamp(min=1e-300)
    if (c - c.T).abs().max() > 1e-4 * scale or torch.linalg.eigvalsh(c.double()).min() < -1e-4 * scale:
        raise UserError(f"{path}: {covariance} is not a covariance, it is asymmetric or indefinite")
    return FeatureStatistics.from_covariance(m, c, count)


def reference(args, network, name, data, size):
    """(Features, description) to compare with: --reference, else images of data's training split."""
    if args.reference:
        return read_reference(args, network, name, size)
    if not data:
        raise UserError("compare with what? Give --reference FILE.npz or --data")
    images = open_data(args, data, "train", size, args.reference_images)
    return (collect(args, network, batches(images, args, "reference"), PRECISION_IMAGES),
            f"{len(images.labels)} images of {images.name}")


def few_images(count, dim):
    """A warning for the protocol: the covariance of few images is too small in most directions."""
    return "" if count >= 5 * dim else (f"; only {count} images for {dim} features: biased upwards, "
                                        "compare at equal numbers")


def save_statistics(path, real, name):
    """Write a reference's statistics under ADM's names, with the vectors for precision and recall."""
    arrays = dict(zip(("mu", "sigma"), real.pool.mean_and_covariance()))
    arrays |= {"network": name, "count": real.pool.count}
    if real.spatial is not None:
        arrays |= dict(zip(("mu_s", "sigma_s"), real.spatial.mean_and_covariance()))
    if real.vectors is not None:
        arrays["vectors"] = real.vectors

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    files.atomic_write(Path(path), write)
    print(f"wrote {path}")


# --------------------------------------- samples of a diffusion run ---------------------------------------

class Run(NamedTuple):
    """A diffusion run, and what its samples are compared with."""
    model: nn.Module
    tokenizer: nn.Module
    config: dict
    network: object                   # of feature_network
    real: Features
    reconstructed: Features | None    # with --gap
    protocol: str


def open_run(args, path, source=""):
    """The Run of one checkpoint. source: what draws the samples, for the protocol."""
    model, tokenizer, config = load_model(path, args, args.device)
    unused = args.reference and args.features != "classifier" and not args.gap
    data, size = args.data if unused else data_of(args.data, config), tokenizer.config.image_size
    network, name = feature_network(args, data, size)
    real, against = reference(args, network, name, data, size)
    source = source or f"EMA weights; {'null class' if args.null_class else 'balanced labels'}"
    args.dtype = str(autocast_dtype(args.dtype, args.device, model.config.width)).removeprefix("torch.")
    protocol = (f"{args.num_images} samples at {size} px, drawn in {args.dtype}, against {against}; features "
                f"{name} in float32; {source}; {args.sampler}, {args.steps} steps; seed {args.seed}"
                + (f"; decoded by {args.tokenizer}" if args.tokenizer else "")
                + (f"; trained with --add {config['add']}" if config.get('add') else "")
                + (f"; sampled with --add {args.add}" if args.add else "")
                + "".join(f", {name} {getattr(args, name)}" for name in args.added_options))
    reconstructed = None
    if args.gap:
        images = open_data(args, data, "train", size, args.reference_images)
        reconstructed = collect(args, network, reconstructions(args, tokenizer, images))
        protocol += (f"; gap: to the tokenizer's reconstructions of {len(images.labels)} images of "
                     f"{images.name}"
                     + (", samples of the posterior" if tokenizer.config.variational else ""))
    return Run(model, tokenizer, config, network, real, reconstructed,
               protocol + few_images(args.num_images, len(real.pool.mean)))


@torch.no_grad()
def score(args, run, scale, interval, title):
    """Draw args.num_images samples of a Run and measure them, without a file in between: {the distance, with
    --gap the diffusion gap, Inception Score or class accuracy}."""
    cast_matrices(run.model, autocast_dtype(args.dtype, args.device))
    num_classes = run.model.config.num_classes
    labels = choose_labels(args.num_images, ["null"] if args.null_class else None, num_classes, "balanced",
                           args.seed)
    # A stream: the feature network gets each batch as it is drawn, and only the statistics are kept.
    fake = collect(args, run.network, draws(args, run.model, run.tokenizer, run.config, labels, scale,
                                            interval, title), logits=True)
    result = {distance_name(args, "g"): frechet_between(fake.pool, run.real.pool)}
    # A sample comes from diffusion and decoder, a reconstruction from the decoder alone. Their distance is
    # what diffusion has not learned, apart from what the decoder cannot draw.
    if run.reconstructed is not None:
        result["diffusion_gap"] = frechet_between(fake.pool, run.reconstructed.pool)
    if args.features == "inception":
        result["inception_score"] = metrics.inception_score(fake.logits)[0]
    elif args.features == "classifier" and num_classes and not args.null_class:
        right = fake.logits.argmax(1) == torch.from_numpy(labels)
        result["assigned_to_requested_class"] = right.double().mean().item()
    return result
