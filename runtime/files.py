"""Files that are complete or absent, and folders that belong to one process.

A reader of the paper need not open this file. A file appears under its name only when it is complete
(`atomic_write`), a run's folder belongs to one process (`lock`), and arrays carry a checksum. Whatever is
wrong is a UserError that says what to do.
"""
import errno
import json
import os
import re
import socket
import struct
import sys
import tempfile
import zlib
from pathlib import Path

from runtime.processes import UserError    # before torch, see there

import numpy as np

try:
    import fcntl
except ImportError:                                                                # Windows has no such locks
    fcntl = None


def atomic_write(path, write):
    """Call write(temporary path), then rename it to `path`: a reader or a crash never meets half a file."""
    path = Path(path)
    if not path.name:
        raise UserError(f"{str(path)!r} is not a file name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, RuntimeError) as e:     # without a number: torch.save's and numpy's own, of a full disk
        full = getattr(e, "errno", None) in (None, errno.ENOSPC, getattr(errno, "EDQUOT", None))
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}"
                        + ("; is the disk full, or a quota?" if full else "")) from e
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path):
    """Wait until a file or folder is on disk, so that its errors show."""
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_npy(path, array):
    """numpy.save under exactly this name, with the data's CRC-32 after them, which numpy ignores."""
    array = np.ascontiguousarray(array)      # a permuted view goes through a buffer whose errors numpy misses
    with open(path, "wb") as file:
        np.save(file, array)
        file.write(b"crc32" + struct.pack("<I", zlib.crc32(array)))
    if os.path.getsize(path) < array.nbytes:
        raise OSError(f"{os.path.getsize(path)} bytes of more than {array.nbytes} arrived")


def load_npy(path):
    """A file of save_npy as a read-only memory map, or None if it is missing or damaged."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            return array if file.read() == b"crc32" + struct.pack("<I", zlib.crc32(array)) else None
    except Exception:                               # numpy raises many kinds of error here
        return None


def write_json(path, value):
    """Write a value as JSON, atomically."""
    atomic_write(path, lambda p: p.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def write_png(path, picture):
    """Write a PIL image as PNG, atomically."""
    atomic_write(path, lambda p: picture.save(p, "PNG"))


def read_json(path):
    """The dict in a JSON file. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}); delete it") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no object); delete it")
    return found


_locks = {}


def lock(folder):
    """Hold a folder for this process until it ends. Raises UserError if another process holds it. A POSIX
    record lock: it works on NFS, and loader workers do not inherit it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or folder.resolve() in _locks:
        return
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{holder} is at work in {folder}; wait for it, stop it, or "
                        "choose another --out") from e
    except OSError as e:
        print(f"note: {folder} is not locked ({e.strerror}): two runs in it would destroy each other",
              file=sys.stderr)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder.resolve()] = file


def unlock(folder):
    """Release a folder that is to be deleted, and delete the lock's file."""
    (Path(folder) / ".lock").unlink(missing_ok=True)
    if file := _locks.pop(Path(folder).resolve(), None):
        file.close()


def remove_debris(folder):
    """Delete the temporary files that killed processes left in a folder that this process holds."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# ------------------------------------------------ file names ------------------------------------------------

def expand_home(word):
    """A word of a command line, with the home folder in place of a leading ~: "~/x", "--out=~/x"."""
    option, name = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.S).groups()
    expanded = os.path.expanduser(name)
    if re.match("~(/|$)", expanded):
        raise UserError(f"{name}: there is no home folder here (HOME is not set); give the whole path")
    return (option or "") + expanded


def whole_path(name):
    """A path that exists, from the root on: a run's images are found from other folders too. Any other name,
    as that of a data set, is returned as it is."""
    return os.path.abspath(name) if os.path.exists(name) and name not in ("shapes", "cifar10") else name


def check_writable(folder, option="--out"):
    """Refuse a folder that this user cannot write to, or make: before the work, not after it."""
    try:
        while not os.path.lexists(folder):                                   # it is made when it is needed
            folder = os.path.dirname(folder) or "."
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"cannot write to the folder {folder} ({e.strerror or e}); "
                        f"choose another with {option}") from e


def npz_fault(error):
    """Why an .npz file cannot be read, from what numpy raised. numpy takes other files for pickles, and
    advises to trust them."""
    known = isinstance(error, UserError) or not re.search("pickle|context manager", str(error))
    return str(error) if known else "it is not an .npz file of numbers"
