"""Files of public weights: find or download them, read them, and put them into frozen networks.

Which files there are is in pretrained.py and inception.py. safetensors files are read without the package,
which nothing else here needs.
"""
import hashlib
import http.client
import json
import math
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import files
from common import UserError


# ------------------------------------------- find, download -------------------------------------------

@dataclass(frozen=True)
class WeightFile:
    """One public file of weights."""
    file: str             # the name it is looked for and kept under
    url: str
    sha256: str = ""      # first digits, often part of the public name ("": unknown)
    size: int = 0         # bytes (0: unknown; the size that the server gives is always checked)
    also: str = ""        # another common name of the same file


def find_weights(weights, weights_dir=""):
    """The path of a WeightFile: in weights_dir, else in torch hub's cache, else downloaded.

    A .safetensors file with the same stem is taken too (the Hugging Face form of DINOv2, say). Downloads go
    to weights_dir if one is given, else to the cache. Only downloads are checked against size and hash; keys
    and shapes are checked whenever a file is loaded. Under torch.distributed every rank that calls this
    downloads: call it inside processes.rank_zero_first. Raises UserError, with file, folder and address, when
    the file is not found and cannot be downloaded.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if str(folders[0]).startswith("~"):                  # HOME is not set, and the user's number has no name
        if not weights_dir:
            raise UserError("there is no home folder for weights (HOME is not set): give --weights-dir")
        folders = []
    if weights_dir:
        folders.insert(0, Path(weights_dir))
        if not folders[0].is_dir():
            raise UserError(f"--weights-dir {weights_dir} is no folder")
    for folder in folders:
        for name in (weights.file, weights.also, str(Path(weights.file).with_suffix(".safetensors"))):
            if name and (folder / name).is_file():
                return folder / name
    path = folders[0] / weights.file
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, lambda temporary: _download(weights, path, temporary))
    return path


def _download(weights, path, temporary):
    """Fetch weights.url into the file `temporary`, with a bar; check size and hash. path: for messages."""
    def failed(reason):
        raise UserError(f"no {weights.file} in {path.parent}, and its download failed ({reason}): "
                        f"save {weights.url} as {path}")
    network_errors = (OSError, http.client.HTTPException)          # URLError and timeouts are OSErrors
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(weights.url, headers={"User-Agent": "maetok"}), timeout=30)
    except network_errors as e:
        failed(e)
    size, digest, received = int(response.headers.get("Content-Length") or 0), hashlib.sha256(), 0
    bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=weights.file)
    with response, open(temporary, "wb") as file, bar:
        while True:
            try:
                block = response.read(1 << 20)
            except network_errors as e:
                failed(e)
            if not block:
                break
            file.write(block)
            digest.update(block)
            received += len(block)
            bar.update(len(block))
    for expected in (size, weights.size):
        if expected and received != expected:
            failed(f"{received} of {expected} bytes arrived")
    if not digest.hexdigest().startswith(weights.sha256):
        failed(f"sha256 is {digest.hexdigest()[:8]}, not {weights.sha256}; a proxy's page or a new file")


# --------------------------------------------- read, check ---------------------------------------------

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
                      "I8": torch.int8, "U8": torch.uint8}


def read_safetensors(path, skip=None):
    """Read a .safetensors file: {name: tensor on the CPU}.

    The format is 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, then
    the data. Nothing in it is trusted: the ranges must tile the data exactly, without gap or overlap, and
    have the size that follows from dtype and shape. skip: compiled pattern; tensors whose name it matches are
    not read (a text tower can be half of a file). Raises UserError for malformed files.
    """
    path = Path(path)

    def check(condition, what):
        if not condition:
            raise UserError(f"{path} is damaged or no safetensors file: {what}")

    def unique(pairs):
        check(len(dict(pairs)) == len(pairs), "a name stands twice in its header")
        return dict(pairs)

    whole = lambda values: isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        check(total >= 8, "it has no header")
        length = int.from_bytes(file.read(8), "little")
        # the upper limit is the format's own; without it a flipped bit would ask for terabytes
        check(length <= min(total - 8, 100_000_000), f"a header of {length} bytes in a file of {total}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique)
        except UserError:
            raise
        except (ValueError, RecursionError):
            check(False, "its header is no JSON")
        check(isinstance(header, dict), "its header is no table")
        header.pop("__metadata__", None)
        ranges = []
        for name, entry in header.items():
            check(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
                  f"the entry of {name} is not dtype, shape and data_offsets")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            check(isinstance(dtype, str) and dtype in SAFETENSORS_DTYPES,
                  f"{name} has the unknown dtype {dtype}")
            # the product: [0, 2**62, 2**62] is empty, and too much for PyTorch all the same
            check(whole(shape) and math.prod(max(v, 1) for v in shape) < 2 ** 60,
                  f"{name} has the shape {shape}")
            check(whole(offsets) and len(offsets) == 2, f"{name} has the offsets {offsets}")
            size = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
            check(offsets[1] - offsets[0] == size,
                  f"{name} spans {offsets[1] - offsets[0]} bytes where dtype and shape make {size}")
            ranges.append((*offsets, name))
        end = 0
        for start, stop, name in sorted(ranges):
            check(start == end, f"{name} starts at byte {start} of the data, not at {end}")
            end = stop
        check(end == total - 8 - length, f"its tensors end at byte {end} of {total - 8 - length} of the data")
        tensors = {}
        for start, stop, name in sorted(ranges):
            if skip is None or not skip.search(name):
                file.seek(8 + length + start)
                entry = header[name]
                tensors[name] = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])
                read = file.readinto(tensors[name].view(-1).view(torch.uint8).numpy())
                check(read == stop - start, f"{name} cannot be read")
    return tensors


def read_weights(path, skip=None):
    """{name: tensor on the CPU} of a .pth or .safetensors file, floats as float32, without names that match
    `skip`. Raises UserError for damaged files."""
    path = Path(path)
    if path.suffix == ".safetensors":
        state = read_safetensors(path, skip)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:                   # which one depends on where the file was cut
            raise UserError(f"{path} is damaged or no file of weights ({type(e).__name__}); "
                            "delete it, and put a complete one in its place or let it be downloaded") from e
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise UserError(f"{path} holds no table of tensors: it is another file than its name says")
        state = {name: tensor for name, tensor in state.items() if skip is None or not skip.search(name)}
    return {name: t.detach().float() if t.is_floating_point() else t for name, t in state.items()}


def check_state(expected, state, path):
    """Compare {name: shape} with {name: tensor}. Raises a UserError that lists the first of what differs."""
    wrong = [f"{k} {tuple(state[k].shape)} instead of {tuple(shape)}" for k, shape in expected.items()
             if k in state and state[k].shape != torch.Size(shape)]
    parts = [f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" for what, keys in
             (("missing", [k for k in expected if k not in state]),
              ("not known", [k for k in state if k not in expected]), ("of another shape", wrong)) if keys]
    if parts:
        raise UserError(f"the tensors in {path} do not fit the network: {'; '.join(parts)}")


# -------------------------------------------- fill a network --------------------------------------------

def load_frozen(build, weights, weights_dir, convert, skip=None):
    """Build a network on the meta device, give it the tensors of its file, freeze it. On the CPU.

    build: makes the module; convert: {name: tensor} of the file -> the module's names; skip: names in the
    file that are left out. Raises UserError as the functions above.
    """
    with torch.device("meta"):
        network = build()
    path = find_weights(weights, weights_dir)
    state = convert(read_weights(path, skip))
    check_state({k: v.shape for k, v in network.state_dict().items()}, state, path)
    # strict=False, after check_state: PyTorch's batch norm adds a counter that the public file does not have.
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval().requires_grad_(False)
