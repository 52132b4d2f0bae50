"""Images for all four scripts: one function, build_dataset, and five kinds of source.

    --data shapes       ten classes drawn on the fly, no files; endless train set, disjoint test set
                        (the default; shapes.py)
    --data captioned-shapes  the same pictures with captions, "a red star on green"
    --data cifar10      the binary archive, found under --data-root or downloaded once
    --data DIR          ImageFolder layout (train/ and val/ or test/ inside, or not), nested,
                        or flat without classes; captions, if asked for, in captions.jsonl or .txt files
    --data FILE.npz     ADM's layout: arr_0 uint8 (n, H, W, 3), optional arr_1 labels

A sample is a function of (seed, epoch, index) alone: workers, ranks and restarts cannot change it.
"""
import hashlib
import io
import json
import math
import os
import stat
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, sample_rng
from shapes import CaptionedShapes, Shapes

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# What may be in such a file, whatever its name says: not EPS, say, for which Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Elsewhere, on ARM say, PyTorch's bicubic resize of bytes has no vector code, and is slower than Pillow's.
TORCH_RESIZES_FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ------------------------------------------------ files ------------------------------------------------

class Arrays:
    """Images held in memory: uint8 (n, H, W, 3) and integer labels (n,)."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.classes, self.length = images, labels, classes, len(images)

    def fingerprint(self):
        digest = hashlib.sha256()
        for start in range(0, self.length, 1000):                      # they may be a memory map of gigabytes
            digest.update(np.ascontiguousarray(self.images[start:start + 1000]))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])


def map_array(path, name):
    """An array of an .npz file as a read-only memory map, so that each process touches only the images it
    reads; None if it is compressed. (numpy.load takes no notice of mmap_mode inside an .npz.)"""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)                             # the local header; lengths of name and extra field
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            return None
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or 0 in shape:
            return None
        if file.tell() + dtype.itemsize * math.prod(shape) > os.path.getsize(path):
            raise ValueError("the file is cut short")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def read_npz(path):
    """An ADM sample or reference file as Arrays; labels are -1 where the file has none. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise UserError(f"{path} has no array 'arr_0' (found: {', '.join(file.files) or 'nothing'})")
            images = map_array(path, "arr_0")
            images = file["arr_0"] if images is None else images
            labels = file["arr_1"] if "arr_1" in file else np.full(len(images), -1)
    except UserError:
        raise
    except Exception as e:   # zipfile, zlib, numpy and the OS each have their own for a broken file
        raise UserError(f"cannot read {path}: {e}; "
                        "it should be an .npz file as numpy.savez writes them") from e
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}, it should be uint8 (n, H, W, 3)")
    if labels.shape != (len(images),):
        raise UserError(f"{path}: arr_1 has shape {labels.shape}, "
                        f"it should hold one label for {len(images)} images")
    if labels.dtype.kind not in "iuf" or (labels != labels.astype(np.int64)).any() or labels.min() < -1:
        raise UserError(f"{path}: arr_1 is {labels.dtype}, it should hold class numbers from 0 on")
    labels = labels.astype(np.int64)                                               # some writers leave floats
    return Arrays(images, labels, [str(i) for i in range(labels.max() + 1)] or None)


def read_cifar10(split, root):
    """CIFAR-10 from its binary archive as Arrays, downloaded to `root` if it is not there. Raises UserError.

    A record is 3073 bytes: the label, then 32 x 32 values of red, of green, of blue. Read from
    the archive or from the unpacked folder cifar-10-batches-bin. (The pickled "python version"
    would run code from the file.)
    """
    root = Path(root)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder, archive = root / "cifar-10-batches-bin", root / "cifar-10-binary.tar.gz"
    try:
        if folder.is_dir():
            records = [(folder / name).read_bytes() for name in names]
        else:
            if not archive.exists():
                download(CIFAR10_URL, archive, md5=CIFAR10_MD5)
            elif hashlib.md5(archive.read_bytes()).hexdigest() != CIFAR10_MD5:
                raise UserError(f"{archive} is not CIFAR-10's binary version (MD5 {CIFAR10_MD5}); delete it")
            with tarfile.open(archive) as tar:
                records = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
    except (OSError, KeyError, EOFError, zlib.error, tarfile.TarError) as e:
        raise UserError(f"cannot read CIFAR-10 under {root}: {e}; "
                        "delete what is there to download it again") from e
    records = np.frombuffer(b"".join(records), np.uint8)
    if len(records) == 0 or len(records) % 3073:
        raise UserError(f"CIFAR-10 under {root} is cut short; delete it to download it again")
    records = records.reshape(-1, 3073)
    return Arrays(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(int),
                  CIFAR10_CLASSES)


def download(url, path, md5):
    """Fetch url to path with a progress bar; the file appears under its name only when its MD5 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != md5:
            raise UserError(f"{url} arrived damaged (MD5 {digest.hexdigest()}, not {md5}); try again")
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"cannot download {url}: {e}; without network, put the file at {path}") from e
    finally:
        part.unlink(missing_ok=True)


class PathList:
    """Many paths below one folder as two arrays: indexing gives a Path.

    A list of 1.28 million Paths is 0.5 GB that fork gives to every worker for nothing, until the
    first garbage collection writes to each object and so copies it, in every worker; arrays have nothing
    to write to.
    """

    def __init__(self, root, paths):
        self.root = os.fsencode(root)
        names = [os.fsencode(path.relative_to(root)) for path in paths]
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([len(name) for name in names])

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return Path(os.fsdecode(os.path.join(self.root, self.names[start:self.ends[index]].tobytes())))


class Folder:
    """Images in a folder. The first level of sub-folders names the classes; none: a flat folder, labels -1.

    ImageNet's train/ and val/ (or test/, validation/) are found by name. A folder without them serves as both
    splits: then test figures are figures on training images, and a line says so.
    captions: look for captions.jsonl, whose lines are {"file": path from there, "caption": text}; without one
    the caption of x.jpg is x.txt.
    """

    def __init__(self, root, split, captions=False):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"--data {root}: no such folder (nor one of: shapes, cifar10, a .npz file)")
        train = root / "train" if (root / "train").is_dir() else root
        held_out = next((root / name for name in ("val", "test", "validation")
                         if (root / name).is_dir()), None)
        if train == root and held_out is not None:
            raise UserError(f"{root} has {held_out.name}/ but no train/: "
                            f"give --data {held_out} to use it alone")
        if split == "test" and held_out is None and os.environ.get("RANK", "0") == "0":
            print(f"note: {root} has no val/ or test/ folder: test figures below are on training images")
        # Class numbers are the training folder's in both splits, or a class missing from val/ would shift the
        # others. The sub-folders that hold an image tell: no need to list 1.28 million of them for that.
        self.classes = sorted(entry.name for entry in os.scandir(train)
                              if entry.is_dir() and next(_walk_images(entry.path), None)) or None
        number = {name: i for i, name in enumerate(self.classes or [])}
        folder = held_out if split == "test" and held_out is not None else train
        self.files = _image_files(folder)
        names = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in self.files]
        if unknown := set(names) - set(number) - {None}:
            raise UserError(f"{folder} has classes that {train} lacks: {', '.join(sorted(unknown)[:5])}")
        self.labels = np.array([-1 if name is None else number[name] for name in names])
        self.files = PathList(folder, self.files)
        self.length = len(self.files)
        tables = [f / "captions.jsonl" for f in (folder, root) if (f / "captions.jsonl").is_file()]
        self.table = tables[0] if captions and tables else None
        self.captions = read_captions(self.table) if self.table else {}

    def caption(self, index):
        """The caption of an image. Raises UserError where there is none."""
        path, advice = self.files[index], "; write one, or pass --skip-corrupt"
        if self.table is not None:
            where, text = self.table, self.captions.get(path.relative_to(self.table.parent).as_posix())
        else:
            where = path.with_suffix(".txt")
            try:
                text = where.read_text(encoding="utf-8")
            except FileNotFoundError:
                text = None
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"cannot read caption {where}: {e}{advice}") from e
        if text is None:
            raise UserError(f"{path} has no caption: {where} "
                            f"{'is not there' if self.table is None else 'has no line for it'}{advice}")
        if not text.strip():
            raise UserError(f"{path} has an empty caption in {where}{advice}")
        return text

    def fingerprint(self):
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels):
            size = file.stat().st_size if file.exists() else None                    # a link to nothing
            digest.update(os.fsencode(file.name) + f" {label} {size}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, index):
        path = self.files[index]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise OSError("no regular file")                   # a named pipe would be waited for for ever
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.format == "PNG":                            # only verify() looks at its checksums
                    Image.open(io.BytesIO(content), formats=FORMATS).verify()
                image.load()
                ImageOps.exif_transpose(image, in_place=True)       # else it copies what needs no turning
                return to_rgb(image), int(self.labels[index])
        # a damaged file can raise nearly anything: OSError, SyntaxError, zlib.error, ...
        except Exception as e:
            raise UserError(f"cannot read image {path}: {e}; "
                            "replace or delete it, or pass --skip-corrupt") from e


def read_captions(path):
    """{file: caption} of a JSON-lines file. Raises UserError that names the first bad line."""
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            entry = None
        if not (isinstance(entry, dict) and isinstance(entry.get("file"), str)
                and isinstance(entry.get("caption"), str)):
            raise UserError(f'{path}, line {number} is not {{"file": "...", "caption": "..."}}')
        if entry["file"] in captions:
            raise UserError(f"{path}, line {number}: a second caption for {entry['file']}; one per image")
        captions[entry["file"]] = entry["caption"]
    return captions


def _walk_images(root):
    """Yield the image files below a folder. Raises UserError when a sub-folder cannot be read."""
    def stop(error):
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    above = {}                              # a folder's path -> the folders above it, and itself, as they are
    for folder, below, names in os.walk(root, followlinks=True, onerror=stop):
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in (path := above.get(os.path.dirname(folder), frozenset())):
            below.clear()                                                 # a link back up: it would never end
            continue
        above[folder] = path | {here}
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _image_files(root):
    """All image files below a folder, sorted. Raises UserError when there is none."""
    files = sorted(_walk_images(root))
    if not files:
        raise UserError(f"no images in {root} (looked for {' '.join(sorted(IMAGE_SUFFIXES))}, "
                        "nested folders too)")
    return files


def to_rgb(image):
    """Any Pillow image to RGB: 16-bit grey scaled, not cut off; transparency laid over white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257                          # 16 bits to 8
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------- preprocessing ----------------------------------------------

def resize_short_side(image, size):
    """Scale an RGB PIL image so that its short side has `size` px, as ADM does: halve by box filter while
    that leaves at least `size`, then bicubic. Returns uint8 (3, H, W).

    The box steps keep the result free of aliasing and are fast. The bicubic step is PyTorch's where that has
    vector instructions: a third of Pillow's time. Both resample rows, round, resample columns and round, with
    weights of 16 or 22 bits: 0.3 % of a photo's values differ by one grey level, one in two million by two.
    """
    # a thin strip, scaled up whole, could take gigabytes: keep its middle
    if max(image.size) > 8 * min(image.size):
        width, height = (min(side, 8 * min(image.size)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    width, height = (round(side * (size / min(image.size))) for side in image.size)
    if not TORCH_RESIZES_FAST:
        image = image.resize((width, height), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                             # (3, H, W)
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """ADM's preprocessing [Table 7 "center crop"]: short side to `size`, then the middle square.
    RGB PIL image -> uint8 (3, size, size)."""
    pixels = resize_short_side(image, size)
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top:top + size, left:left + size]


def random_crop(image, size, rng, min_fraction=0.8):
    """The released code's augmentation: a random square of 80 to 100 % of the short side. RGB PIL image ->
    uint8 (3, size, size)."""
    pixels = resize_short_side(image, int(rng.integers(size, math.ceil(size / min_fraction) + 1)))
    _, H, W = pixels.shape
    left, top = rng.integers(0, W - size + 1), rng.integers(0, H - size + 1)
    return pixels[:, top:top + size, left:left + size]


def to_float(images):
    """uint8 (B, 3, H, W) in 0..255 -> float32 in [-1, 1], the range of every model here."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] -> uint8, clamped, rounded to nearest.
    (Some tools truncate instead; that is half a level off.)"""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageDataset(torch.utils.data.Dataset):
    """A source with cropping and flips. Keys are (epoch, index), or (epoch, index, size) for another size
    than the set's own; items are (uint8 (3, size, size), label int), and with captions (..., ..., str).

    With skip_corrupt a file that cannot be read is replaced by the next one in the list and counted in
    `skipped` (shared with the loader's workers). Without it the item *is* a UserError, which `collate` hands
    on: raising in a worker would bury the message in a traceback.
    """

    def __init__(self, source, size, flip=False, crop="center", seed=0, skip_corrupt=False, captions=False):
        self.source, self.size, self.flip, self.crop, self.seed = source, size, flip, crop, seed
        self.captions = captions
        self.skip_corrupt, self.classes, self.length = skip_corrupt, source.classes, source.length
        self.skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, key):
        epoch, index, *size = key
        size = size[0] if size else self.size
        for attempt in range(100):
            place = index if self.length is None else (index + attempt) % self.length
            try:
                image, label = self.source[place]
                caption = [self.source.caption(place)] if self.captions else []
                break
            except UserError as e:
                if not self.skip_corrupt:
                    return e
                self.skipped += 1
        else:
            return UserError(f"100 unreadable images in a row from number {index} on: "
                             "is this the right folder?")
        rng = sample_rng(self.seed, "augment", epoch, index)
        image = random_crop(image, size, rng) if self.crop == "random" else center_crop(image, size)
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return image, label, *caption


def collate(items):
    """A list of dataset items -> (uint8 (B, 3, H, W), labels (B,) int64), or the first UserError among them.
    A data set with captions adds a third, B strings.
    """
    for item in items:
        if isinstance(item, UserError):
            return item
    images, labels, *captions = zip(*items)
    return torch.stack(images), torch.tensor(labels), *captions


def build_dataset(data, split, size, data_root="data", flip=False, crop="center", seed=0,
                  skip_corrupt=False, captions=False):
    """The data set that --data names (see the module docstring), as an ImageDataset.

    split: "train" or "test"; flips and random crops are for "train" only. size: px, square.
    captions: items come with their captions. Raises UserError for what is missing or unreadable.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}")
    if data == "shapes":
        source = Shapes(split, size, seed)
    elif data == "captioned-shapes":
        source = CaptionedShapes(split, size, seed)
    elif data == "cifar10":
        source = read_cifar10(split, data_root)
    elif data.endswith(".npz"):
        source = read_npz(data)
    else:
        source = Folder(data, split, captions)
    if captions and not hasattr(source, "caption"):
        raise UserError(f"--data {data} has no captions; choose captioned-shapes, or a folder with a .txt "
                        "file beside each image or with captions.jsonl")
    train = split == "train"
    return ImageDataset(source, size, flip and train, crop if train else "center", seed, skip_corrupt,
                        captions)


class GlobalBatches:
    """This process's share of every global batch: yields lists of keys of
    ImageDataset, one list a forward pass.

    Position p = step * batch_size + i of the run, i in [0, batch_size), shows image p mod n of epoch p // n
    in an order shuffled by (seed, epoch). Micro-batch a of process r takes a contiguous part of i, so the
    global batch is the same set of images for any number of processes and accumulation steps,
    and a run can start at any step.
    sizes: of images, px, taken in turn step by step.
    """

    def __init__(self, length, batch_size, start, stop, seed=0, rank=0, world=1, accumulate=1, sizes=()):
        self.length, self.batch_size, self.start, self.stop, self.seed = length, batch_size, start, stop, seed
        self.rank, self.world, self.accumulate, self.sizes = rank, world, accumulate, sizes
        self.order, self.epoch = None, None

    def positions(self):
        """The i of this process's samples: (accumulate, micro-batch size) int array."""
        return np.arange(self.batch_size).reshape(self.accumulate, self.world, -1)[:, self.rank]

    def __len__(self):
        return (self.stop - self.start) * self.accumulate

    def __iter__(self):
        for step in range(self.start, self.stop):
            size = (self.sizes[step % len(self.sizes)],) if self.sizes else ()
            for micro in self.positions():
                yield [self.key(step * self.batch_size + int(i)) + size for i in micro]

    def key(self, position):
        if self.length is None:
            return 0, position
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            self.order, self.epoch = (
                sample_rng(self.seed, "epoch-order", epoch, 0).permutation(self.length), epoch)
        return epoch, int(self.order[place])


def some_images(dataset, count, batch_size=250):
    """`count` images of a data set (fewer if it is smaller), always the same, in batches of (uint8
    (B, 3, H, W), labels).

    From a fixed shuffle: the files of a folder are sorted by class, and its first thousand may be one class.
    """
    if dataset.length is None:
        indices = range(count)
    else:
        indices = sample_rng(0, "some-images", 0, 0).permutation(dataset.length)[:count].tolist()
    for start in range(0, len(indices), batch_size):
        batch = collate([dataset[0, i] for i in indices[start:start + batch_size]])
        if isinstance(batch, UserError):
            raise batch
        yield batch
