"""Sets of images for evaluate.py: samples, data sets, reconstructions, images that a model draws.

Every set is read in batches of (indices, uint8 (B, 3, H, W)). Under torchrun each process reads its own part.
`args` is evaluate.py's command line with rank, world and device.
"""
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoints
import common
from cache import posterior_rngs
from common import UserError, sample_rng
from data import Folder, build_dataset, read_npz, to_float, to_uint8
from flow import sample_latents
from maetok import load_tokenizer
from runtime.processes import autocast
from sit import load_diffusion


class Images(NamedTuple):
    """A fixed list of square images, read when they are needed."""
    name: str
    size: int
    labels: np.ndarray                # (n,) int64, -1 unknown
    read: object                      # index -> uint8 (3, size, size)
    classes: list = None              # their names, where they are known


def open_samples(path):
    """Samples or a reference, in file order, not resized or cropped: an .npz in ADM's layout, or a folder."""
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
    if not data:
        raise UserError("which images? Give --data")
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

    return Images(f"{data} ({split})", size, labels, read, dataset.classes)


def without_classes(images, figures):
    """{"left_out": why} where not all of Images have a class, without which there are no `figures`; else {}.
    """
    missing, count = int((images.labels < 0).sum()), len(images.labels)
    return {"left_out": f"{figures}: {missing:,} of {count:,} images of {images.name} have no class"} \
        if missing else {}


def run_folder(path):
    """A run folder from itself or from a checkpoint in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def data_of(data, config):
    """--data, or else the data of a run's config. Raises UserError where that is a path that is not here."""
    trained_on = config.get("data", "")
    if not data and trained_on not in ("", "shapes", "cifar10") and not os.path.exists(trained_on):
        raise UserError(f"the run's images, --data {trained_on}, are not here; put them there, or (in "
                        "evaluate.py) give another --data")
    return data or trained_on


def open_tokenizer(args, path):
    """(the tokenizer of a run or checkpoint, --data or else the data it was trained on)."""
    data = data_of(args.data, checkpoints.load_checkpoint(path, mapped=True)["config"])
    return load_tokenizer(path, args.device), data


def share(count, rank, world):
    """This process's part of range(count), contiguous."""
    return range(rank * count // world, (rank + 1) * count // world)


def batches(images, args, title):
    """This process's part of Images, with a progress bar."""
    mine = share(len(images.labels), args.rank, args.world)
    with tqdm(total=len(mine), desc=title, unit="img", disable=args.rank > 0) as bar:
        for start in range(0, len(mine), args.batch_size):
            indices = mine[start:start + args.batch_size]
            yield indices, torch.stack([images.read(i) for i in indices])
            bar.update(len(indices))


def reconstruct(tokenizer, indices, images):
    """Images (B, 3, H, W) in [-1, 1], decoded from their latents, as uint8: what a diffusion model without
    error would draw. A KL-VAE's latents are samples of its posterior, as the diffusion model is trained on;
    decoded means lack their noise, and a distance to them would count it as the diffusion model's."""
    h = tokenizer.encode(images, rngs=posterior_rngs(tokenizer, indices))
    # Rounded to 256 levels, as a picture on disk would be: the paper's numbers are of uint8 images.
    return to_uint8(tokenizer.decode(h, images.shape[-2:]))


def reconstructions(args, tokenizer, images):
    """Images as `batches`, each by `reconstruct`."""
    for indices, x in batches(images, args, "reconstructing"):
        yield indices, reconstruct(tokenizer, indices, to_float(x.to(args.device)))


def gather(rows, args):
    """The (n_r, ...) CPU tensors of all processes, one after the other, on every process."""
    if args.world == 1:
        return rows
    everyone = [None] * args.world
    dist.all_gather_object(everyone, rows)
    return torch.cat(everyone)


# ---------------------------------------------- drawn samples ----------------------------------------------

class Sampler:
    """Of an extra, sample.py and evaluate.py take the class AddToSampler. It has add_arguments(add), for its
    options, and wrap(model, tokenizer, config, args), which returns the model to be sampled."""
    ROLE = "Sampler"


def add_extras(parser, argv):
    """The options --tokenizer and --add, and those of the extras that a command line (None: sys.argv's) names
    with it. Their names are args.added_options."""
    parser.add_argument("--tokenizer", help="decode by this run of train_tokenizer.py, which must have the "
                        "same encoder: the decoder of another stage")
    parser.add_argument("--add", default="", help="extras: files of after/ or variants/, joined by commas")
    early, names = common.OneLineParser(add_help=False, allow_abbrev=False), []
    early.add_argument("--add", default="")
    for extra in common.split_names(early.parse_known_args(argv)[0].add):
        common.addition(Sampler, extra).add_arguments(
            lambda *flags, **options: names.append(parser.add_argument(*flags, **options).dest))
    parser.set_defaults(added_options=names)


def load_model(path, args, device):
    """(model, tokenizer, config) as sit.load_diffusion, with the extras of --add and the decoder of
    --tokenizer. Raises UserError for another encoder."""
    model, tokenizer, config = load_diffusion(path, device)
    if args.tokenizer:
        other = load_tokenizer(args.tokenizer, device)
        if common.fingerprint(other.encoder) != common.fingerprint(tokenizer.encoder):
            raise UserError(f"--tokenizer {args.tokenizer} has another encoder than the one whose latents "
                            f"{path} has learned; only decoders may differ")
        # Each stage measures its latents when it ends. SiT was trained with the statistics of its tokenizer.
        other.latent_mean, other.latent_std = tokenizer.latent_mean, tokenizer.latent_std
        tokenizer = other
    scales = getattr(args, "scales", [getattr(args, "cfg", 1)])
    if config.get("label_dropout") == 0 and {*scales} != {1} and not args.add + config.get("add", ""):
        raise UserError(f"{path} was trained with --label-dropout 0: guidance would lead away from a null "
                        "class that has learned nothing; give a scale of 1")
    for name in common.split_names(args.add):
        model = common.addition(Sampler, name).wrap(model, tokenizer, config, args)
    return model, tokenizer, config


def draws(args, model, tokenizer, config, labels, scale, interval, title):
    """Samples of a diffusion model, as `batches`: one for each of `labels` (n,), the images that sample.py
    draws at this guidance scale. config: of sit.load_diffusion."""
    mine = share(len(labels), args.rank, args.world)
    with tqdm(total=len(mine), desc=title, unit="img", disable=args.rank > 0) as bar:
        for start in range(0, len(mine), args.batch_size):
            indices = np.array(mine[start:start + args.batch_size])
            with autocast(args.dtype, args.device):
                z = sample_latents(model, indices, labels[indices], args.seed, scale, interval, args.sampler,
                                   args.steps, config["path"])
                images = to_uint8(tokenizer.decode(z, normalized=True))
            yield indices, images                            # outside: feature networks run in float32
            bar.update(len(indices))
