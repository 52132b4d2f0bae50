"""The latents of a training set, encoded once, before the diffusion model is trained.

A reader of the paper need not open this file. The tokenizer is frozen, so its latents of an image never
change: train_diffusion.py reads them from a memory map, and its loop needs neither images nor encoder.
"""
import hashlib
import sys
from pathlib import Path

import common    # before torch, see runtime/processes.py

import numpy as np
import torch
from tqdm import tqdm

from runtime import files
from common import UserError, sample_rng
from data import collate, to_float
from runtime.processes import barrier

SHARD_IMAGES = 8192     # at 128 x 32 latents, two flips, float16: 134 MB per shard, 157 shards for ImageNet


def posterior_rngs(tokenizer, indices, draw=0, seed=0):
    """What MAETok.encode samples a KL-VAE's posterior with: a generator for each image; None for another
    tokenizer. draw: which sample of it; in a cache 1 is the mirror image's, without one it is the step."""
    return [sample_rng(seed, "posterior", draw, int(i)) for i in indices] \
        if tokenizer.config.variational else None


def encode_once(config, tokenizer, dataset, processes):
    """The latents of `dataset`, an ImageDataset without flips, as a LatentCache in the run's folder."""
    length = min(config.cache_images or dataset.length or 0, dataset.length or config.cache_images)
    if length == 0:
        raise UserError(f"--data {config.data} is endless: say with --cache-images how many to encode, "
                        "or --no-cache")
    # All that the latents depend on: encoder weights, normalisation, images, preprocessing.
    parts = [common.fingerprint(tokenizer.encoder), float(tokenizer.latent_mean), float(tokenizer.latent_std),
             dataset.source.fingerprint(), dataset.size, config.flip, config.cache_images,
             "shuffled" if config.cache_images and dataset.length else "in order",
             *["posterior"] * tokenizer.config.variational]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    cache = LatentCache(Path(config.out) / "latents", key, length, config.flip, config.seed)
    cache.build(tokenizer, dataset, min(64, config.batch_size), config.workers, processes)
    return cache


class LatentCache(torch.utils.data.Dataset):
    """Memory-mapped latents. Keys are (epoch, index), as those of ImageDataset; items are (float32 (L, C) of
    unit variance, label int). The flip is drawn from (seed, epoch, index)."""

    def __init__(self, folder, key, length, flip, seed):
        self.folder, self.key, self.length, self.flip, self.seed = Path(folder), key, length, flip, seed
        self.shards, meta = None, self.folder / "meta.json"
        if meta.exists() and files.read_json(meta).get("key") != key:
            raise UserError(f"{folder} holds latents of another tokenizer, data set or preprocessing; "
                            "delete it, or choose another --out")

    def shard_paths(self, shard):
        return self.folder / f"latents_{shard:05d}.npy", self.folder / f"labels_{shard:05d}.npy"

    def whole(self, shard, shape):
        """Whether a shard is there, is what was written, and has latents of this shape."""
        paths = self.shard_paths(shard)
        sound = all((array := files.load_npy(path)) is not None and array.shape == wanted
                    for path, wanted in zip(paths, (shape, shape[:1])))
        if not sound and any(path.exists() for path in paths):
            print(f"warning: shard {shard} of {self.folder} is damaged, or of another version of this code; "
                  "it is encoded again", file=sys.stderr)
        return sound

    @torch.no_grad()
    def build(self, tokenizer, dataset, batch_size, workers, processes):
        """Encode the shards that are not there yet. They appear by renaming, so an interruption costs one."""
        rank, world, device = processes
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            files.remove_debris(self.folder)
            if not (self.folder / "meta.json").exists():
                files.write_json(self.folder / "meta.json", {"key": self.key})
        barrier()                                          # no shard is begun before the debris is gone
        order = range(self.length)
        if dataset.length and self.length < dataset.length:
            # Not the first images: the files of a folder are sorted by class.
            order = sample_rng(0, "some-images", 0, 0).permutation(dataset.length)[:self.length].tolist()
        parts = [order[a:a + SHARD_IMAGES] for a in range(0, self.length, SHARD_IMAGES)]
        shape = 2 if self.flip else 1, *tokenizer.config.latent_shape()
        todo = [s for s in range(rank, len(parts), world) if not self.whole(s, (len(parts[s]), *shape))]
        bar = tqdm(total=sum(len(parts[s]) for s in todo), desc="encoding", disable=rank > 0 or not todo)
        batches = {s: [[(0, i) for i in parts[s][a:a + batch_size]]
                       for a in range(0, len(parts[s]), batch_size)] for s in todo}
        # One loader for all shards: to start its processes takes seconds.
        loader = common.batch_loader(dataset, sum(batches.values(), []), workers, device, collate)
        for shard in todo:
            encoded = []
            for keys, (images, numbers, *_) in zip(batches[shard], loader):
                images = to_float(images.to(device))
                views = [images, images.flip(-1)] if self.flip else [images]
                indices = [index for _, index in keys]
                rngs = [posterior_rngs(tokenizer, indices, view) for view in (0, 1)]
                z = torch.stack([tokenizer.encode(x, normalize=True, rngs=r) for x, r in zip(views, rngs)], 1)
                encoded.append((z.half().cpu().numpy(), numbers.numpy()))       # (B, 1 or 2, L, C), (B,)
                bar.update(len(images))
            for path, array in zip(self.shard_paths(shard), zip(*encoded)):
                files.atomic_write(path, lambda p: files.save_npy(p, np.concatenate(array)))
        bar.close()
        barrier()

    def __getstate__(self):
        """Without the maps, which pickle as all of their data: a worker that is not forked maps again."""
        return self.__dict__ | {"shards": None}

    def __getitem__(self, key):
        if self.shards is None:
            self.shards = [[np.load(path, mmap_mode="r") for path in self.shard_paths(shard)]
                           for shard in range(-(-self.length // SHARD_IMAGES))]
        epoch, index = key
        shard, place = divmod(index, SHARD_IMAGES)
        latents, labels = self.shards[shard]
        view = int(self.flip and sample_rng(self.seed, "flip", epoch, index).random() < 0.5)
        return torch.from_numpy(latents[place, view].astype(np.float32)), int(labels[place])
