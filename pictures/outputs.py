"""What sample.py writes, by the ending of --out: a grid, ADM's sample file, or a folder of PNG files.

Images come from part files (n, H, W, 3) uint8, one after the other: they are never all in memory, except for
a grid.
"""
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import files
from runtime.processes import UserError
from pictures.draw import sample_grid

# With Pillow's endings of pictures: a file that is not written here, not the name of a folder.
OTHER_FILES = {".npy", ".pt", ".json", ".csv", ".txt", ".html", ".zip", ".tar", ".tgz", ".gz", ".mp4"}


def kind_of(out):
    """".png", ".npz" or "" for a folder. Raises UserError for the ending of another kind of file."""
    if not Path(out).name:
        raise UserError(f"--out {str(out)!r} has no name: give FILE.png, FILE.npz or a folder")
    ending = Path(out).suffix.lower()
    if ending in (".png", ".npz"):
        return ending
    if ending in OTHER_FILES | Image.registered_extensions().keys():
        raise UserError(f"--out {out}: {ending} files are not written; give FILE.png (a grid), FILE.npz "
                        "(ADM's layout) or a folder of PNG files")
    return ""


def check_outputs(outs, report):
    """Look at the names of --out and --report before the work starts. Raises UserError."""
    for out in outs:
        kind_of(out)
    if report and Path(report).suffix.lower() != ".png":
        raise UserError(f"--report {report}: the sheet is a PNG file; give FILE.png")


def whole_part(path):
    """The images of a finished part, uint8 (n, H, W, 3). Raises UserError if it is damaged."""
    if (part := files.load_npy(path)) is None:
        raise UserError(f"{path} is damaged; run the same command again")
    return part


def write_npz(path, parts, labels):
    """ADM's sample file: arr_0 uint8 (n, H, W, 3), arr_1 int64 labels. Streamed, never all in memory."""
    def write(temporary):
        first = whole_part(parts[0])
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as entry:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(whole_part(part).tobytes())
            with file.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)
    files.atomic_write(path, write)


def write_outputs(outs, parts, labels, names):
    """Turn the part files into what --out asks for. labels: (n,) int64, -1 where there is no class; names: of
    the classes, where they are known."""
    for out in outs:
        out.parent.mkdir(parents=True, exist_ok=True)
        kind = kind_of(out)
        if kind == ".npz":
            write_npz(out, parts, labels)
        elif kind == ".png":
            images = np.concatenate([whole_part(part) for part in parts])
            files.write_png(out, sample_grid(images, labels, names))
        else:
            out.mkdir(exist_ok=True)
            for i, image in enumerate(image for part in parts for image in whole_part(part)):
                Image.fromarray(image).save(out / f"{i:06d}_class{labels[i]}.png")
        print(f"wrote {out}")
