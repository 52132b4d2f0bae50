"""Folders of images: what is a split, what is a class, which files there are. And what a file is.

A reader of the paper need not open this file. Where a folder can be read in two ways, both are named and
nothing is guessed. A folder is listed once, by one process (`from_rank_zero`).
"""
import json
import os
import pickle
import re
import time
import zlib
from itertools import islice
from pathlib import Path

from runtime.processes import UserError, first_process, printable    # before torch, see there

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TRAIN = ("train", "training")
TEST = ("val", "test", "validation", "valid", "testing", "eval", "dev")           # the first that is there
# With what is often added: train2017, test_set, val-images.
SPLIT = re.compile(rf"({'|'.join(TRAIN + TEST)})([ _-]?(images?|imgs?|set|data|20\d\d))?", re.I)
WRAPPERS = ("images", "image", "imgs", "img", "jpegimages")      # a folder around all images, not a class


# ------------------------------------------------- walking -------------------------------------------------

def is_image(name):
    """Whether a file's name is that of an image which is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def ignored(name):
    """Whether a folder is hidden or a system's own: thumbnails, waste baskets, what a repair has found."""
    return name.startswith(".") or name.lower() in ("lost+found", "__macosx", "@eadir", "$recycle.bin",
                                                    "system volume information")


def entries(folder):
    """Yield (an os.DirEntry, whether it is a folder) for the image files and the sub-folders of a folder, in
    no order. Raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                is_folder = _is_folder(entry)
                if not ignored(entry.name) if is_folder else is_image(entry.name):
                    yield entry, is_folder
    except OSError as e:
        raise UserError(f"cannot read folder {folder}: {e.strerror}") from e


def scan(folder):
    """(the sub-folders, the image files) of a folder as lists of os.DirEntry, sorted by name."""
    found = sorted(entries(folder), key=lambda pair: pair[0].name)
    return [entry for entry, is_folder in found if is_folder], [entry for entry, is_folder in found
                                                                if not is_folder]


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:                                                            # a link in a circle
        return False


def walk_images(root):
    """Yield the image files below a folder as os.DirEntry, in no order. A sub-folder that cannot be read is a
    UserError."""
    waiting = [(str(root), frozenset())]                    # a folder, (device, inode) of those above it
    while waiting:
        folder, above = waiting.pop()
        below = []
        for entry, is_folder in entries(folder):
            if is_folder:
                below.append(entry)
            else:
                yield entry
        if below:
            above |= {_identity(folder)}
        # A link to a folder above would never end.
        waiting += [(entry.path, above) for entry in below
                    if not (entry.is_symlink() and _identity(entry.path) in above)]


def _identity(path):
    found = os.stat(path)
    return found.st_dev, found.st_ino


def has_image(folder):
    """Whether an image file is below a folder."""
    return next(walk_images(folder), None) is not None


# ------------------------------------------------- splits -------------------------------------------------

def named(names):
    """"a/, b/, c/, ..." of an iterable."""
    first = list(islice(names, 5))
    return ", ".join(f"{name}/" for name in first[:4]) + ", ..." * (len(first) > 4)


def find_splits(root):
    """(folder of the training images, folder of the test images or None) of a data set.

    Splits are known by their usual names, in any case, where nothing else with images is beside them; without
    splits all are training images. Raises UserError where that could be meant otherwise.
    """
    folders, images = scan(root)
    names = [entry.name for entry in folders]
    splits = {name: SPLIT.fullmatch(name)[1].lower() for name in names if SPLIT.fullmatch(name)}
    around = [name for name in names if name.lower() in WRAPPERS]
    known = list(splits) or around[:1]
    rest = (f"{name}/" for name in names if name not in known and has_image(Path(root, name)))
    others = [*(entry.name for entry in images[:1]), *islice(rest, 4)]
    if known and others:
        kind = "the names of splits" if splits else "a folder of all images"
        raise UserError(f"--data {root} can be read in two ways: {named(known)} could be {kind} or classes, "
                        f"and beside it is {', '.join(others)}. For the first, move the others or give "
                        f"--data {Path(root, known[0])}; for classes, rename it, for example {known[0]}_")
    if splits:
        return _chosen(Path(root), splits)
    if around:
        return find_splits(Path(root, around[0]))
    if len(names) == 1 and not images and not SPLIT.fullmatch(names[0]):
        inner = scan(folders[0])[0]
        if any((match := SPLIT.fullmatch(entry.name)) and match[1].lower() in TRAIN for entry in inner):
            raise UserError(f"--data {root} holds only {names[0]}/, which has "
                            f"{named(entry.name for entry in inner)}: give --data {folders[0].path}")
    return Path(root), None


def _chosen(root, splits):
    """find_splits' result from {folder name: usual name}."""
    train = [name for name, word in splits.items() if word in TRAIN]
    test = sorted((name for name in splits if name not in train), key=lambda name: TEST.index(splits[name]))
    if not train:
        raise UserError(f"{root} has {test[0]}/ but no train/: to use it, give --data {root / test[0]}")
    if len(train) > 1:
        raise UserError(f"{root} has {named(train)}: which are the training images? Rename or move the other")
    return _inside(root / train[0]), _inside(root / test[0]) if test else None


def _inside(folder):
    """The folder of a split, or the lone images/ in it."""
    folders, images = scan(folder)
    lone = len(folders) == 1 and not images and folders[0].name.lower() in WRAPPERS
    return Path(folders[0].path) if lone else folder


# ------------------------------------------------- listing -------------------------------------------------

class Listing:
    """The image files of a split.

    folder, paths (a PathList), classes (names or None), labels (n,) int64 (-1: not in a class's folder),
    sizes (n,) int64 in bytes (-1: a broken link), train (the training split's folder), held_out (the test
    split's or None). Both splits number the classes of the training folder: a class missing from val/ must
    not shift the others.
    """

    def __init__(self, root, split):
        self.train, self.held_out = find_splits(root)
        self.folder = folder = self.held_out if split == "test" and self.held_out else self.train
        found, start = [], len(os.path.join(folder, ""))
        with tqdm(desc=f"listing {printable(folder)}", unit=" images", delay=1, leave=False,
                  disable=not first_process()) as bar:
            for entry in walk_images(folder):
                found.append((entry.path[start:].split(os.sep), _size(entry)))
                bar.update()
        if not found:
            raise UserError(f"no images in or below {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
        found.sort()
        tops = [parts[0] if len(parts) > 1 else None for parts, _ in found]
        self.classes = self._class_names({*tops} - {None})
        number = {None: -1} | {name: i for i, name in enumerate(self.classes or [])}
        if unknown := set(tops) - set(number):
            raise UserError(f"{folder} has classes that {self.train} lacks: {', '.join(sorted(unknown)[:5])}")
        self.labels = np.array([number[top] for top in tops])
        self.sizes = np.array([size for _, size in found])
        self.paths = PathList(folder, [os.sep.join(parts) for parts, _ in found])

    def _class_names(self, tops):
        """The sub-folders of the training split, sorted, or None. tops: those of this split with images."""
        folders = scan(self.train)[0]
        full = [entry.name for entry in folders
                if (entry.name in tops if self.folder == self.train else has_image(entry.path))]
        empty = sorted({entry.name for entry in folders} - {*full})
        if full and empty:
            raise UserError(
                f"{Path(self.train, empty[0])} has no image ({' '.join(sorted(IMAGE_SUFFIXES))})"
                + f", like {len(empty) - 1} more" * (len(empty) > 1) + ": left out, it would change the "
                f"numbers of the classes after it; put its images there, or move it out of {self.train}")
        return full or None


def _size(entry):
    try:
        return entry.stat().st_size
    except OSError:
        return -1


class PathList:
    """Many paths below one folder: indexing gives a Path.

    A list of 1.28 million Paths takes 0.5 GB, and reference counts and garbage collection write to each
    object: every forked worker would soon have its own copy. Nothing writes to an array of bytes.
    """

    def __init__(self, root, names):
        self.root, self.names = root, np.array([os.fsencode(name) for name in names])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.root / os.fsdecode(self.names[index])


_shared = {}


def from_rank_zero(name, make):
    """What make() returns in rank 0, in every process that asks for this name; it is made once.

    Through the store where the processes met, not by a collective: rank 0 may be the only one that asks, and
    the others may ask in their turn of processes.rank_zero_first, or wait here for hours.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    if name not in _shared:
        store, key = dist.distributed_c10d._get_default_store(), ascii(name)
        if dist.get_rank() == 0:
            _shared[name] = make()
            content = zlib.compress(pickle.dumps(_shared[name]), 1)
            starts = range(0, len(content), 1 << 22)                       # a value may have 8 MB, not more
            for start in starts:
                store.set(f"{key} {start}", content[start:start + starts.step])
            store.set(key, repr([*starts]))
        else:
            while not store.check([key]):
                time.sleep(0.1)
            content = b"".join(store.get(f"{key} {start}") for start in json.loads(store.get(key)))
            _shared[name] = pickle.loads(zlib.decompress(content))
    return _shared[name]


# ------------------------------------------------- in words -------------------------------------------------

_announced = set()


def announce(data, split, source, tests):
    """Print which images a command has opened, once: how many, the classes, where test images are. tests: a
    text, "" where the training images serve as test images."""
    kind = "images" if split == "train" else "test images"
    count = f"endless {kind}" if source.length is None else f"{source.length:,} {kind}"
    missing = int((getattr(source, "labels", np.zeros(1)) < 0).sum())
    names = source.classes or ()
    classes = "no classes" if not names else f"1 class, {names[0]}" if len(names) == 1 else \
        f"{len(names):,} classes, {names[0]} to {names[-1]}"
    if names and missing:
        classes += f", {'all' if missing == source.length else f'{missing:,}'} of the {kind} without a class"
    tests = f"from {tests}" if tests else "are the training images"
    line = f"data {data}: {count}, {classes}; test images {tests}"
    if first_process() and line not in _announced:
        _announced.add(line)
        print(printable(line), flush=True)


# What a file is, by its first bytes, in small letters.
KINDS = {rb"\xff\xd8\xff": "JPEG", rb"\x89png": "PNG", rb"gif8": "GIF", rb"riff....webp": "WEBP",
         rb"bm": "BMP", rb"....ftyp(avif|avis)": "AVIF", rb"....ftyp(hei[cfxms]|hev[cx]|mif1|msf1)": "HEIC",
         rb"....ftyp": "video", rb"ii[*+]\0|mm\0[*+]": "TIFF", rb"\xff\x0a|\0\0\0\x0cjxl ": "JPEG XL",
         rb"\0\0\0\x0cjp  |\xff\x4f\xff\x51": "JPEG 2000", rb"8bps": "Photoshop", rb"%pdf": "PDF",
         rb"%!ps": "PostScript", rb"pk\x03\x04": "zip", rb"\x1f\x8b": "gzip",
         rb"version https://git-lfs": "Git LFS", rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg": "SVG",
         rb"<(!doctype html|html|head|body|!--)": "HTML", rb"<\?xml": "XML", rb"[{\[]": "JSON"}


def file_kind(content):
    """What a file is by its content, as "TIFF"; "" if that is unknown."""
    start = content[:1000].lower()
    for text in (start, start.removeprefix(b"\xef\xbb\xbf").lstrip()):
        for pattern, kind in KINDS.items():
            if re.match(pattern, text, re.S):
                return kind
    return ""


def why_no_image(content, formats):
    """Why Pillow does not know the image in a file. formats: what it is asked to read."""
    if not content:
        return "it is empty"
    if (kind := file_kind(content)) in formats:
        return f"its {kind} header is damaged"
    return f"it is {f'a file of kind {kind}' if kind else 'of an unknown kind'}, not {', '.join(formats)}"
