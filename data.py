"""Images for all four scripts: one function, build_dataset, and four kinds of source.

    --data shapes      ten classes, drawn by shapes.py; no files, an endless train set, a disjoint test set
    --data cifar10     the binary archive, found under --data-root or downloaded once
    --data DIR         ImageFolder layout: train/ and val/ (or test/) inside or not, nested, or flat; what is
                       a split and what a class: runtime/folders.py
    --data FILE.npz    ADM's layout: arr_0 uint8 (n, H, W, 3), optional arr_1 labels

    source --crop, flip--> ImageDataset --keys of GlobalBatches--> items --collate--> (B, 3, H, W), (B,)

A sample is a function of (seed, epoch, index) alone, so workers, processes and restarts cannot change it.
"""
import hashlib
import io
import math
import os
import shutil
import stat
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from common import UserError, sample_rng    # before torch, see runtime/processes.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from runtime import files, folders
from shapes import Shapes

# What may be in a file, whatever its suffix; not EPS, for example, for which Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# EXIF's orientation -> what puts the image upright.
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
# On other processors, such as ARM, PyTorch's resize of bytes has no vector code and is slower than Pillow's.
TORCH_RESIZES_FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ---------------------------------------------- preprocessing ----------------------------------------------

def resize_short_side(image, size):
    """Scale an RGB PIL image so that its short side has `size` px: halve it with a box filter while at least
    `size` remains, then resize bicubically [ADM]. Returns uint8 (3, H, W).

    The box filter is fast and avoids aliasing. The bicubic step is PyTorch's where that has vector code: it
    takes a third of Pillow's time. Both resample rows, round, resample columns and round, but with weights of
    different precision: 0.3 % of a photo's values differ by one grey level, one in two million by two.
    """
    # A thin strip, scaled up as a whole, could take gigabytes: keep its middle.
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
    """ADM's preprocessing [Table 7 "center crop"]: scale the short side to `size`, take the middle square.
    RGB PIL image -> uint8 (3, size, size)."""
    pixels = resize_short_side(image, size)
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top:top + size, left:left + size]


def to_float(images):
    """uint8 (B, 3, H, W) in 0..255 -> float32 in [-1, 1], the range of every model here."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] -> uint8, clamped, rounded to nearest. (Tools that truncate are half a level off.)"""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------- data sets and batches -----------------------------------------

class ImageDataset(torch.utils.data.Dataset):
    """A source, cropped and flipped. Keys are (epoch, index); items are (uint8 (3, size, size), label int).

    A source is an object with `classes` (names or None), `length` (None: endless), fingerprint() (a text that
    tells it from any other) and source[index] -> (RGB PIL image, label). If it returns more, the items have
    more. An item that cannot be read *is* a UserError, and so is the batch that `collate` makes of it: raised
    in a worker process, the message would be buried in a traceback.
    """

    def __init__(self, source, size, flip=False, seed=0):
        self.source, self.size, self.flip, self.seed = source, size, flip, seed
        self.classes, self.length = source.classes, source.length

    @staticmethod
    def crop(image, size, rng):
        """ADM's crop: RGB PIL image -> uint8 (3, size, size). To replace it: dataset.crop = a function."""
        return center_crop(image, size)

    def __getitem__(self, key):
        epoch, index = key
        try:
            image, *labels = self.source[index]
        except UserError as e:
            return e
        rng = sample_rng(self.seed, "augment", epoch, index)
        image = self.crop(image, self.size, rng)
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return image, *labels


def build_dataset(data, split, size, data_root="data", flip=False, seed=0):
    """The data set that --data names (see the top of this file), as an ImageDataset. Prints a line about it.

    split: "train" or "test"; only "train" is flipped. size: px, square. Of several processes rank 0 lists a
    folder, and the others get its list.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}")
    if data == "shapes":
        source, tests = Shapes(split, size, seed), "a random stream of their own"
    elif data == "cifar10":
        source, tests = read_cifar10(split, data_root), "test_batch.bin"
    elif data.lower().endswith(".npz"):
        source, tests = read_npz(data), ""
    else:
        source = folders.from_rank_zero(f"{split} images of {data}", lambda: Folder(data, split))
        tests = source.held_out
    folders.announce(data, split, source, tests)
    return ImageDataset(source, size, flip and split == "train", seed)


def collate(items):
    """A list of ImageDataset items -> (uint8 (B, 3, H, W), labels (B,) int64, and a tuple of B values for
    anything that follows them), or the first UserError among the items."""
    if errors := [item for item in items if isinstance(item, UserError)]:
        return errors[0]
    images, labels, *more = zip(*items)
    return torch.stack(images), torch.tensor(labels), *more


class GlobalBatches:
    """This process's part of every global batch: yields one list of ImageDataset keys per forward pass.

    Position p = step * batch_size + i of the run, i in [0, batch_size), shows image p mod n of epoch p // n,
    in an order shuffled by (seed, epoch). Micro-batch a of process r takes a contiguous range of i. So the
    global batch has the same images for any number of processes and accumulation steps, and a run can start
    at any step. length: n; None for an endless data set, whose images come in order.
    """

    def __init__(self, length, batch_size, start, stop, seed=0, rank=0, world=1, accumulate=1):
        self.length, self.batch_size, self.start, self.stop, self.seed = length, batch_size, start, stop, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.order, self.epoch = None, None

    def positions(self):
        """The i of this process's samples: (accumulate, micro-batch size) int array."""
        return np.arange(self.batch_size).reshape(self.accumulate, self.world, -1)[:, self.rank]

    def __iter__(self):
        for step in range(self.start, self.stop):
            for micro in self.positions():
                yield [self.key(step * self.batch_size + int(i)) for i in micro]

    def key(self, position):
        """The key of the run's position p."""
        if self.length is None:
            return 0, position
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            self.order, self.epoch = (
                sample_rng(self.seed, "epoch-order", epoch, 0).permutation(self.length), epoch)
        return epoch, int(self.order[place])


def some_images(dataset, count, batch_size=250):
    """`count` images of a data set (fewer if it is smaller), always the same, in batches from `collate`. They
    come from a fixed shuffle: a folder's files are sorted by class, so the first thousand may be of one."""
    indices = range(count) if dataset.length is None else \
        sample_rng(0, "some-images", 0, 0).permutation(dataset.length)[:count].tolist()
    for start in range(0, len(indices), batch_size):
        batch = collate([dataset[0, i] for i in indices[start:start + batch_size]])
        if isinstance(batch, UserError):
            raise batch
        yield batch


# ------------------------------------------------- sources -------------------------------------------------

class Folder:
    """Images in a folder. The first level of sub-folders names the classes; without them labels are -1.

    train/ and val/ (or test/, validation/) are found by name. A folder without them serves as both splits:
    then test figures are figures on training images. files: their paths; folder: where this split's are;
    held_out: the test split's folder, or None.
    """

    def __init__(self, root, split):
        self.root = root = Path(root)
        if not root.is_dir():
            raise UserError(f"--data {root}: no such folder (nor one of: shapes, cifar10, a .npz file)")
        found = folders.Listing(root, split)
        self.folder, self.held_out, self.classes = found.folder, found.held_out, found.classes
        self.files, self.labels, self.sizes = found.paths, found.labels, found.sizes
        self.length = len(self.files)

    def fingerprint(self):
        digest = hashlib.sha256()
        for name, label, size in zip(self.files.names, self.labels, self.sizes):
            size = None if size < 0 else size                                                # a broken link
            digest.update(os.path.basename(name) + f" {label} {size}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, index):
        path, content = self.files[index], b""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise OSError("no regular file")                       # to read a named pipe would never end
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                depth = 8
                if image.format == "PNG":                             # only verify() looks at its checksums
                    Image.open(io.BytesIO(content), formats=FORMATS).verify()
                    depth = content[24]
                image.load()
                return to_rgb(upright(image), depth), int(self.labels[index])
        except Exception as e:    # a damaged file can raise nearly anything: OSError, SyntaxError, zlib.error
            why = folders.why_no_image(content, FORMATS) if isinstance(e, UnidentifiedImageError) else e
            raise UserError(f"cannot read image {path}: {why}; replace or delete it") from e


def upright(image):
    """A Pillow image, turned as its EXIF orientation says. Only that tag is read: cameras write odd ones, and
    Pillow, which would write all of them back, refuses some."""
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:                                                       # EXIF that cannot be read at all
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image, depth=8):
    """Any Pillow image to RGB: 16-bit grey is scaled, not clipped; transparency is laid over white.

    depth: bits per channel in the file. Pillow gives a PNG's transparent colour in these, pixels in 8.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        eight = (grey.astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        eight[grey == clear] = 255
        return Image.fromarray(eight).convert("RGB")
    if clear is not None and depth != 8 and image.mode in ("L", "RGB"):
        scale = lambda value: value >> 8 if depth == 16 else value * 255 // (2 ** depth - 1)
        image.info["transparency"] = scale(clear) if image.mode == "L" else tuple(map(scale, clear))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class Arrays:
    """Images held in memory or mapped from a file: uint8 (n, H, W, 3) and integer labels (n,)."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.classes, self.length = images, labels, classes, len(images)

    def fingerprint(self):
        digest = hashlib.sha256()
        for start in range(0, self.length, 1000):                     # they may be a memory map of gigabytes
            digest.update(np.ascontiguousarray(self.images[start:start + 1000]))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def __reduce_ex__(self, protocol):
        """A memory map pickles as all of its data: a worker that is not forked maps the file again."""
        if isinstance(self.images, np.memmap):
            return read_npz, (self.images.filename,)
        return super().__reduce_ex__(protocol)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])


def map_array(path, name):
    """An array of an .npz file as a read-only memory map, so that each process reads only the images it uses;
    None if the array is compressed. (numpy.load ignores mmap_mode for an .npz.)"""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)                      # here are the lengths of two fields to skip
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            return None
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
        if dtype.hasobject or 0 in shape:
            return None
        if file.tell() + dtype.itemsize * math.prod(shape) > os.path.getsize(path):
            raise ValueError("the file is cut short")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def read_npz(path):
    """An ADM sample or reference file as Arrays; labels are -1 where the file has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise UserError(f"it has no array 'arr_0' (found: {', '.join(file.files) or 'nothing'})")
            images = map_array(path, "arr_0")
            images = file["arr_0"] if images is None else images
            labels = file["arr_1"] if "arr_1" in file else np.full(len(images), -1)
    except Exception as e:              # zipfile, zlib, numpy and the system raise many kinds of error here
        raise UserError(f"cannot read {path}: {files.npz_fault(e)}; it should be an .npz file in ADM's "
                        "layout") from e
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}, it should be uint8 (n, H, W, 3)")
    if (labels.shape != (len(images),) or labels.dtype.kind not in "iuf"
            or not np.isfinite(labels).all() or (labels != labels.astype(np.int64)).any()
            or labels.min() < -1):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {labels.shape}, it should hold the class numbers, "
                        f"from 0 on, of {len(images)} images")
    labels = labels.astype(np.int64)                                                # some writers save floats
    return Arrays(images, labels, [str(i) for i in range(labels.max() + 1)] or None)


def read_cifar10(split, root):
    """CIFAR-10 as Arrays, from the unpacked folder or the binary archive in `root`; if neither is there, the
    archive is downloaded.

    A record is 3073 bytes: the label, then 32 x 32 values of red, of green, of blue. (The pickled "python
    version" is not read: unpickling could run code from the file.)
    """
    root = Path(root)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder, archive = root / "cifar-10-batches-bin", root / "cifar-10-binary.tar.gz"
    try:
        if folder.is_dir():
            records = [(folder / name).read_bytes() for name in names]
        else:
            if not archive.exists():
                download(CIFAR10_URL, archive, CIFAR10_MD5)
            elif hashlib.md5(archive.read_bytes()).hexdigest() != CIFAR10_MD5:
                raise UserError(f"{archive} is not CIFAR-10's binary version (MD5 {CIFAR10_MD5}); delete it")
            with tarfile.open(archive) as tar:
                records = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
    except (OSError, KeyError, EOFError, zlib.error, tarfile.TarError) as e:
        raise UserError(f"cannot read CIFAR-10 under {root}: {e}; delete it to download it again") from e
    records = np.frombuffer(b"".join(records), np.uint8)
    if len(records) == 0 or len(records) % 3073:
        raise UserError(f"CIFAR-10 under {root} is cut short; delete it to download it again")
    labels, images = np.split(records.reshape(-1, 3073), [1], axis=1)
    images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)                              # (n, 32, 32, 3)
    return Arrays(images, labels[:, 0].astype(int), CIFAR10_CLASSES)


def download(url, path, md5):
    """Fetch url to path with a progress bar; the file appears under its name only when its MD5 is right."""
    def fetch(part):
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
                with tqdm.wrapattr(response, "read", response.length, desc=path.name) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
        except OSError as e:
            raise UserError(f"cannot download {url}: {e}; without network, put the file at {path}") from e
        if (found := hashlib.md5(part.read_bytes()).hexdigest()) != md5:
            raise UserError(f"{url} arrived damaged (MD5 {found}, not {md5}); try again")

    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, fetch)
