"""Captions for a data set of images: of the drawn shapes, and of folders.                         [Sec. 4.1]

    --data shapes   "a red star on green": the class, and the nearest of eleven colour names
    --data DIR      from captions.jsonl, whose lines are {"file": path from there, "caption": text}; without
                    such a file the caption of x.jpg is the text of x.txt beside it
"""
import json
from hashlib import sha256

import numpy as np

from common import UserError
from data import Folder
from shapes import Shapes

COLOURS = {"black": (50, 50, 50), "white": (205, 205, 205), "grey": (128, 128, 128), "red": (190, 55, 55),
           "yellow": (200, 195, 60), "green": (65, 170, 65), "cyan": (60, 185, 185), "blue": (60, 75, 190),
           "purple": (130, 60, 165), "pink": (205, 105, 165), "brown": (115, 75, 45)}


def captioned(dataset):
    """The same ImageDataset, with items (image, label, caption); caption(index) of its source gives a caption
    without the image. Raises UserError for images that have no captions."""
    kinds = {Shapes: CaptionedShapes, Folder: CaptionedFolder}
    if type(dataset.source) not in kinds:
        raise UserError("--data has no captions; choose shapes, or a folder with a .txt file beside each "
                        "image or with captions.jsonl")
    dataset.source = kinds[type(dataset.source)](dataset.source)
    return dataset


class Captioned:
    """A source (see data.ImageDataset) that returns a caption after image and label."""

    def __init__(self, source):
        self.source, self.classes, self.length = source, source.classes, source.length

    def fingerprint(self):
        return self.source.fingerprint()

    def __getitem__(self, index):
        return *self.source[index], self.caption(index)


class CaptionedShapes(Captioned):
    """Shapes, and what is in the picture."""

    def caption(self, index):
        names, values = list(COLOURS), np.array(list(COLOURS.values()))
        background, colour = (names[np.square(values - rgb).sum(1).argmin()]
                              for rgb in self.source.colours(index)[1:])
        return f"a {colour} {self.classes[index % len(self.classes)]} on {background}"


class CaptionedFolder(Captioned):
    """A Folder, and its captions: from captions.jsonl in the folder of the split or in the whole data set's,
    else from a .txt file beside each image."""

    def __init__(self, source):
        super().__init__(source)
        inside = [folder for folder in source.folder.parents if source.root in (folder, *folder.parents)]
        tables = [folder / "captions.jsonl" for folder in (source.folder, *inside)]
        self.table = next((table for table in tables if table.is_file()), None)
        self.captions = read_captions(self.table) if self.table else {}

    def fingerprint(self):
        """The images' and those of a captions.jsonl: --text-vocab words counts them at each start."""
        captions = repr(sorted(self.captions.items())).encode() if self.captions else b""
        return super().fingerprint() + (sha256(captions).hexdigest() if captions else "")

    def caption(self, index):
        """Raises UserError for an image whose caption is missing or empty."""
        path, advice = self.source.files[index], "; write one, or delete the image"
        if self.table is not None:
            where, text = self.table, self.captions.get(path.relative_to(self.table.parent).as_posix())
        else:
            where = path.with_suffix(".txt")
            try:
                text = where.read_text(encoding="utf-8-sig")              # Windows puts a mark in front
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


def read_captions(path):
    """{file: caption} of a JSON-lines file. Raises UserError that names the first bad line."""
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}; it should be text in UTF-8") from e
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
