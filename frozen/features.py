"""From images to features: what evaluate.py measures samples, reconstructions and references with.

    open_samples, open_data     image lists: samples and references as they are, data sets cropped to size
    feature_network             Inception, or a small classifier trained on the spot
    collect                     features of a list, as streamed statistics, over all processes
    reference                   what to compare with: images, or statistics that were saved

`args` is evaluate.py's command line with rank, world and device added.
"""
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import common
from common import UserError, sample_rng
from data import Folder, GlobalBatches, build_dataset, collate, read_npz, to_float
from metrics import FeatureStatistics
from frozen.inception import load_inception
from frozen.pretrained import load_teacher


# ------------------------------------------- images and processes -------------------------------------------

class Images(NamedTuple):
    """A fixed list of square images, read when they are needed."""
    name: str
    size: int
    labels: np.ndarray                # (n,) int64, -1 unknown
    read: object                      # index -> uint8 (3, size, size)


def open_samples(path):
    """Samples or a reference: an .npz in ADM's layout or a folder, in file order,
    nothing resized or cropped."""
    folder = Path(path).is_dir()
    source = Folder(path, "train") if folder else read_npz(path)
    labels = np.asarray(source.labels)
    if folder and source.classes is None:                                      # sample.py's 000123_class7.png
        named = [re.search(r"_class(\d+)$", file.stem) for file in source.files]
        labels = np.array([int(name[1]) if name else -1 for name in named])
    size = source[0][0].size
    if size[0] != size[1]:
        raise UserError(f"{path} holds images of {size[1]} x {size[0]} px; they should be square")

    def read(index):
        image = source[index][0]
        if image.size != size:
            raise UserError(f"{path}: image {index} has {image.size[0]} x {image.size[1]} px, the first "
                            f"{size[0]} x {size[1]}; all must have one size")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return Images(str(path), size[0], labels, read)


def open_data(args, data, split, size, count):
    """`count` images of a data set (0: all), always the same, in a fixed shuffle; centre crop to size."""
    dataset = build_dataset(data, split, size, args.data_root)
    if dataset.length is None:
        order = range(count or 10_000)
    else:
        order = sample_rng(0, "some-images", 0, 0).permutation(dataset.length)[:count or None].tolist()
    labels = getattr(dataset.source, "labels", None)
    # Shapes are drawn, and have no list of labels: sample i is of class i mod 10.
    labels = np.array([i % 10 if labels is None else labels[i] for i in order])

    def read(index):
        item = dataset[0, order[index]]
        if isinstance(item, UserError):
            raise item
        return item[0]

    return Images(f"{data} ({split})", size, labels, read)


def share(count, rank, world):
    """The contiguous part of range(count) that is this process's."""
    return range(rank * count // world, (rank + 1) * count // world)


def batches(images, args, title):
    """This process's images: (indices, uint8 (B, 3, H, W)), with a progress bar."""
    mine = share(len(images.labels), args.rank, args.world)
    with tqdm(total=len(mine), desc=title, unit="img", disable=args.rank > 0) as bar:
        for start in range(0, len(mine), args.batch_size):
            indices = mine[start:start + args.batch_size]
            yield indices, torch.stack([images.read(i) for i in indices])
            bar.update(len(indices))


def gather(rows, args):
    """The (n_r, ...) CPU tensors of all processes, one after the other, on every process."""
    if args.world == 1:
        return rows
    everyone = [None] * args.world
    dist.all_gather_object(everyone, rows)
    return torch.cat(everyone)


# --------------------------------------------- feature networks ---------------------------------------------

def small_classifier(num_classes):
    """A plain convolutional network for images of 16 px or more:
    (B, 3, H, W) float in [-1, 1] -> (B, num_classes) logits.

    The last but one output, 128 values a image after global average pooling, can serve as a feature. [ours]
    """
    layers, channels = [], 3
    for width, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@torch.enable_grad()
def train_classifier(train_set, device, steps=800, batch_size=64, seed=0):
    """Train small_classifier on a labelled ImageDataset: AdamW, 1e-3 falling linearly to 0, cross-entropy.
    In eval mode."""
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
    """What the small classifier offers in place of Inception's output; it has no spatial features.
    EfficientNet's averaged features have no logits either."""
    pool: torch.Tensor                # (B, 128)
    logits: torch.Tensor | None       # (B, num_classes)
    spatial: None = None


def load_classifier(args, data, size):
    """The classifier of this data set and size, in eval mode, and its name: trained once, kept in --cache.

    Under torchrun rank 0 trains it and the others read the file.
    """
    with common.rank_zero_first(args.rank, args.world):
        train_set = build_dataset(data, "train", size, args.data_root, flip=True)
        if not train_set.classes:
            raise UserError(f"--data {data} has no classes to train a classifier on")
        key = hashlib.sha256(json.dumps(
            [train_set.source.fingerprint(), size, args.classifier_steps]).encode()).hexdigest()[:16]
        cached = Path(args.cache) / f"classifier_{key}.pt"
        if cached.exists():
            try:
                checkpoints.load_checkpoint(cached)
            except UserError as e:
                print(f"warning: {e}; it is trained again")
                cached.unlink()
        if not cached.exists():
            model = train_classifier(train_set, args.device, args.classifier_steps)
            cached.parent.mkdir(parents=True, exist_ok=True)
            state = {"config": {"data": data, "size": size}, "model": model.state_dict()}
            checkpoints.atomic_write(cached, lambda path: torch.save(state, path))
    model = small_classifier(len(train_set.classes))
    checkpoints.load_weights(model, checkpoints.load_checkpoint(cached)["model"], cached)
    return model.to(args.device).eval(), f"classifier {key}"


def feature_network(args, data, size):
    """--features as (function, name). The function takes uint8 (B, 3, H, W) to .pool, .logits, .spatial.

    The name says with what and on which input path features were made: those of another name do not compare.
    """
    if args.features == "inception":
        with common.rank_zero_first(args.rank, args.world):
            network = load_inception(args.weights_dir, args.device)
        return lambda images: network(images, args.resize), f"inception {args.resize}"
    if args.features == "efficientnet":
        # ImageNet-trained, from a package; an 8 x 8 grid of features whatever the size, averaged
        teacher = load_teacher("efficientnet-lite0", size // 8, device=args.device)
        return (lambda images: ClassifierFeatures(teacher(to_float(images)).mean(1), None),
                "efficientnet-lite0, stride 16")
    if data is None:
        raise UserError("--features classifier needs --data: labelled real images to train the classifier on")
    model, name = load_classifier(args, data, size)

    def network(images):
        pool = model[:-1](to_float(images))
        return ClassifierFeatures(pool, model[-1](pool))

    return network, name


def distance_name(args, kind):
    """What the Fréchet distance is called: rfid or gfid (kind "r", "g") in Inception's features only."""
    return f"{kind}fid" if args.features == "inception" else f"frechet_in_{args.features}_features_not_fid"


class Features(NamedTuple):
    """Of a set of images. vectors and logits are None where they were not asked for."""
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    vectors: torch.Tensor | None      # (n, d) float32, in file order
    logits: torch.Tensor | None       # (n, classes) float32


@torch.no_grad()
def collect(args, network, stream, vectors=0, logits=False):
    """Features of all images of a stream of (indices, uint8 batches), merged over processes.

    vectors: of so many images, the first in order, the features themselves are kept; statistics need none.
    """
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


PRECISION_IMAGES = 10_000             # reference images whose manifold is compared [ADM]


def read_reference(args, network, name, size):
    """--reference FILE.npz as (Features, description): ready statistics where it has them."""
    wanted = ("mu", "sigma", "mu_s", "sigma_s", "vectors", "network", "count")
    try:
        with np.load(args.reference, allow_pickle=False) as file:
            keys = set(file.files)
            stored = {key: file[key] for key in wanted if key in keys}
    except Exception as e:   # zipfile, zlib, numpy and the OS each have their own for a broken file
        raise UserError(f"cannot read {args.reference}: {e}") from e
    ready = {"mu", "sigma"} <= keys
    if not ready and "arr_0" not in keys:
        raise UserError(f"{args.reference} has neither images (arr_0) nor statistics (mu, sigma); "
                        f"found: {', '.join(sorted(keys)) or 'nothing'}")
    if str(stored.pop("network", name)) != name:
        raise UserError(f"{args.reference} holds statistics of other features than '{name}'; "
                        "give the same --features and --resize as when it was saved")
    count = int(stored.pop("count", 2))                                          # ADM's files do not say it
    stored = {key: torch.from_numpy(array) for key, array in stored.items()}
    images = open_samples(args.reference) if "arr_0" in keys else None
    if images is not None and images.size != size:
        raise UserError(f"images of {size} px cannot be compared with those of {images.size} px in "
                        f"{args.reference}; take a reference of the same size")
    if not ready:
        return (collect(args, network, batches(images, args, "reference"), vectors=PRECISION_IMAGES),
                f"{len(images.labels)} images of {args.reference}")
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in stored or covariance not in stored:
            continue
        m, c = stored[mean], stored[covariance]
        if (m.ndim != 1 or c.shape != 2 * m.shape or m.is_complex() or c.is_complex()
                or not (m.isfinite().all() and c.isfinite().all())):
            raise UserError(f"{args.reference}: {mean} and {covariance} should be finite real numbers, (d,) "
                            "and (d, d)")
        scale = c.double().diagonal().abs().max().clamp(min=1e-300)
        if (c - c.T).abs().max() > 1e-4 * scale or torch.linalg.eigvalsh(c.double()).min() < -1e-4 * scale:
            raise UserError(f"{args.reference}: {covariance} is no covariance, it is asymmetric "
                            "or indefinite")
    pool = FeatureStatistics.from_covariance(stored["mu"], stored["sigma"], count)
    spatial = (FeatureStatistics.from_covariance(stored["mu_s"], stored["sigma_s"], count)
               if {"mu_s", "sigma_s"} <= set(stored) else None)
    vectors = stored.get("vectors")
    if vectors is None and images is not None:
        first = images._replace(labels=images.labels[:PRECISION_IMAGES])
        vectors = collect(args, network, batches(first, args, "reference"), PRECISION_IMAGES).vectors
    return Features(pool, spatial, vectors, None), f"statistics in {args.reference}"


def reference(args, network, name, data, size):
    """What samples are compared with: --reference, else --reference-images of data's training split."""
    if args.reference:
        return read_reference(args, network, name, size)
    if data is None:
        raise UserError("compare with what? Give --reference FILE.npz or --data")
    images = open_data(args, data, "train", size, args.reference_images)
    return (collect(args, network, batches(images, args, "reference"), PRECISION_IMAGES),
            f"{len(images.labels)} images of {images.name}")


def few_images(count, dim):
    """A warning for the protocol line: the covariance of few images is too small in most directions."""
    return "" if count >= 5 * dim else (f"; only {count} images for {dim} features: biased upwards, "
                                        "compare at equal numbers")


def save_statistics(path, real, name):
    """A reference's statistics under ADM's names, with what precision and recall need, and by what made."""
    arrays = dict(zip(("mu", "sigma"), real.pool.mean_and_covariance()))
    arrays |= {"network": name, "count": real.pool.count}
    if real.spatial is not None:
        arrays |= dict(zip(("mu_s", "sigma_s"), real.spatial.mean_and_covariance()))
    if real.vectors is not None:
        arrays["vectors"] = real.vectors

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    checkpoints.atomic_write(Path(path), write)
    print(f"wrote {path}")
