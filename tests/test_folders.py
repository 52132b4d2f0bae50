"""Data that is not what it seems: splits and classes (runtime/folders.py), what is between the images, odd
files, test images without labels."""
import hashlib
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import train_tokenizer
from common import UserError
from data import build_dataset
from measures import image_sets
from pictures import draw
from test_train_tokenizer import TINY


def make(root, *names, colour="red"):
    """Small pictures below a folder; a name with / at its end is an empty folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            Image.new("RGB", (16, 16), colour).save(path)
    return root


def opened(root):
    """(classes, number of training images, of test images) of a data set."""
    train, test = (build_dataset(str(root), split, 16) for split in ("train", "test"))
    return train.classes, train.length, test.length


# ------------------------------------------------ splits ------------------------------------------------

@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("Train", "Test"), ("TRAIN", "Validation"), ("training", "testing"), ("train", "valid"),
    ("train2017", "val2017"), ("training_set", "test_set"), ("train", "eval"), ("images/train", "images/val"),
    ("train/images", "val/images")])
def test_the_usual_names_of_splits(tmp_path, train, test):
    names = [f"{train}/bus/1.png", f"{train}/car/1.png", f"{train}/car/2.png", f"{test}/car/1.png"]
    assert opened(make(tmp_path, *names)) == (["bus", "car"], 3, 1)
    (tmp_path / "annotations").mkdir()                       # without images it is nothing that could be read
    (tmp_path / "annotations/instances.json").write_text("{}")
    assert opened(tmp_path) == (["bus", "car"], 3, 1)


def test_the_first_of_several_test_splits_counts(tmp_path):
    make(tmp_path, "train/a/1.png", "validation/a/1.png", "validation/a/2.png", "test/a/1.png")
    assert opened(tmp_path) == (["a"], 1, 1)
    assert opened(make(tmp_path, *(f"val/a/{i}.png" for i in range(5)))) == (["a"], 1, 5)


@pytest.mark.parametrize("names, message", [
    (["bus/1.png", "car/1.png", "train/1.png"], "two ways: train/ .* beside it is bus/, car/.* train_"),
    (["bus/1.png", "Testing/1.png"], "two ways: Testing/ could be .* beside it is bus/"),
    (["train/a/1.png", "val/a/1.png", "more/1.png"], "two ways: train/, val/.* beside it is more/"),
    (["train/a/1.png", "loose.png"], "two ways: train/ could be .* beside it is loose.png"),
    (["images/1.png", "masks/1.png"], "two ways: images/ could be a folder of all images .* masks/"),
    (["train/a/1.png", "Training/a/1.png"], "Training/, train/: which are the training images"),
    (["imagenet/train/a/1.png", "imagenet/val/a/1.png"], "holds only imagenet/, .* give --data .*/imagenet"),
    (["valid/a/1.png"], "valid/ but no train/: to use it, give --data .*/valid")])
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message) as e:
        build_dataset(str(make(tmp_path, *names)), "train", 16)
    assert "\n" not in str(e.value)


def test_a_class_may_have_the_name_of_a_split_within_a_split(tmp_path):
    """As CIFAR-100's "train"."""
    make(tmp_path, "train/bus/1.png", "train/train/1.png", "test/train/1.png")
    assert opened(tmp_path) == (["bus", "train"], 2, 1)


def test_a_lone_folder_of_images_is_no_class(tmp_path):
    assert opened(make(tmp_path / "flat", "images/1.png", "images/2.png")) == (None, 2, 2)
    assert opened(make(tmp_path / "nested", "images/a/1.png", "images/b/1.png")) == (["a", "b"], 2, 2)
    assert opened(make(tmp_path / "one", "cats/1.png")) == (["cats"], 1, 1)


# -------------------------------------------- what is in between --------------------------------------------

HIDDEN = (".ipynb_checkpoints", ".Trash-1000", ".thumbnails", "__MACOSX", "@eaDir", "lost+found")


def test_hidden_folders_are_ignored(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/1.png", *(f"{name}/1.png" for name in HIDDEN),
         *(f"a/{name}/deep/1.png" for name in HIDDEN))
    scandir = os.scandir

    def no_entry(path):
        if "lost+found" in str(path):                                                      # only root may
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", no_entry)
    assert opened(tmp_path) == (["a", "b"], 2, 2)


def test_a_hidden_folder_does_not_take_the_labels_from_samples(tmp_path):
    make(tmp_path, "000000_class7.png", "000001_class3.png", ".ipynb_checkpoints/000000_class7.png")
    samples = image_sets.open_samples(tmp_path)
    assert samples.labels.tolist() == [7, 3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_an_image_is_named(tmp_path, split):
    """Left out, it would shift the numbers of all classes after it."""
    make(tmp_path, "train/a/1.png", "train/b/", "train/c/1.png", "val/c/1.png")
    (tmp_path / "train/b/1.tiff").write_bytes(b"II*\0")
    with pytest.raises(UserError, match=r"train/b has no image \(.jpeg .jpg .png .webp\).*numbers"):
        build_dataset(str(tmp_path), split, 16)
    assert opened(make(tmp_path, "train/b/1.png", "val/b/")) == (["a", "b", "c"], 3, 1)


# ------------------------------------------------- one line -------------------------------------------------

def test_a_line_says_what_was_opened(tmp_path, capsys):
    make(tmp_path, "train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "val/bee/1.png")
    opened(tmp_path)
    train, test = capsys.readouterr().out.splitlines()
    assert train == (f"data {tmp_path}: 3 images, 3 classes, ant to cow; test images from {tmp_path}/val")
    assert test == (f"data {tmp_path}: 1 test images, 3 classes, ant to cow; test images from {tmp_path}/val")
    opened(tmp_path)
    assert capsys.readouterr().out == ""                                                        # said once


@pytest.mark.parametrize("labels, classes", [(None, "no classes"), (np.arange(4), "4 classes, 0 to 3")])
def test_an_npz_has_its_training_images_as_test_images_and_says_so(tmp_path, capsys, labels, classes):
    arrays = [np.zeros((4, 8, 8, 3), np.uint8)] + ([] if labels is None else [labels])
    np.savez(tmp_path / "x.npz", *arrays)
    build_dataset(str(tmp_path / "x.npz"), "test", 8)
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith(f"4 test images, {classes}; test images are the training images")


def test_the_line_counts_what_is_in_no_class(tmp_path, capsys):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "val/1.png", "val/2.png")
    build_dataset(str(tmp_path), "test", 16)
    out = capsys.readouterr().out
    assert "2 test images, 2 classes, a to b, all of the test images without a class" in out


def test_of_drawn_images_and_from_rank_0_alone_with_no_control_characters(tmp_path, capsys, monkeypatch):
    from runtime import folders
    folders._announced.clear()
    build_dataset("shapes", "train", 16)
    assert "data shapes: endless images, 10 classes, circle to hourglass" in capsys.readouterr().out
    build_dataset(str(make(tmp_path / "one", "\x1b[31ma\nerror: b/1.png")), "train", 16)
    line, = capsys.readouterr().out.splitlines()
    assert "\x1b" not in line and "\\x1b[31ma\\nerror: b" in line
    monkeypatch.setenv("RANK", "1")
    build_dataset(str(make(tmp_path / "two", "a/1.png")), "train", 16)
    assert capsys.readouterr().out == ""


# ---------------------------------------- test images without labels ----------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def flat_val(tmp_path):
    """ImageNet as Kaggle has it: classes in train/, none in val/."""
    for i in range(48):
        make(tmp_path / "flat", f"train/{'ab'[i % 2]}/{i}.png", colour=["red", "blue"][i % 2])
        make(tmp_path / "flat", f"val/{i}.png", colour=["red", "blue"][i % 2])
    return tmp_path / "flat"


def test_no_linear_probe_without_test_labels(flat_val, tokenizer, tmp_path, capsys):
    evaluate.main(["latents", str(tokenizer), "--data", str(flat_val), "--components", "1", "--no-full",
                   "--no-umap", "--dims", "2", "--pixels", "--device", "cpu", "--out", str(tmp_path / "l")])
    numbers = json.loads((tmp_path / "l.json").read_text())[str(tokenizer)]
    assert "linear_probe_accuracy" not in numbers and "pixel_probe_accuracy" not in numbers
    assert numbers["left_out"].startswith("linear probe: 48 of 48 images of")
    assert "48 of 48 images" in capsys.readouterr().out and numbers["mixtures"]


def test_no_class_figures_without_test_labels(flat_val, tokenizer, tmp_path, capsys):
    options = ["--data", str(flat_val), "--features", "classifier", "--classifier-steps", "2", "--cache",
               str(tmp_path / "cache"), "--device", "cpu", "--out", str(tmp_path / "r")]
    evaluate.main(["recon", str(tokenizer), *options])
    result = json.loads((tmp_path / "r.json").read_text())
    assert not [name for name in result if "assigned" in name]
    assert "48 of 48 images" in result["left_out"] and "left_out" in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "s.npz", images, np.arange(48) % 2)
    evaluate.main(["generation", str(tmp_path / "s.npz"), "--tokenizer", str(tokenizer), *options])
    result = json.loads((tmp_path / "r.json").read_text())
    assert [name for name in result if "assigned" in name or "accuracy" in name] == [
        "assigned_to_requested_class"]
    assert "48 of 48 images" in result["left_out"]


# ------------------------------------------------ odd files ------------------------------------------------

def exif(*entries):
    """An EXIF block with orientation 6 and other entries (tag, type, count, four bytes)."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries])
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
            + b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4))


def exif_below(directory, tag, kind, count, value):
    """An EXIF block with orientation 6 and one entry in a sub-directory: 0x8769 is Exif's own, 0x8825 GPS's.
    After it are -1 and 0, at byte 56."""
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
            + struct.pack("<HHII", directory, 4, 1, 38) + bytes(4)
            + struct.pack("<HHHI", 1, tag, kind, count) + value + bytes(4) + struct.pack("<iI", -1, 0))


@pytest.mark.parametrize("block", [
    exif(), exif((0x0128, 2, 4, b"two\0")), exif((0x0128, 4, 1, struct.pack("<I", 70_000))),
    exif_below(0x8825, 0, 2, 4, b"2.2\0"), exif_below(0x8769, 0x9203, 10, 1, struct.pack("<I", 56))],
    ids=["plain", "resolution unit is text", "resolution unit is long", "GPS version is text",
         "brightness -1/0"])
def test_a_rotated_photo_is_upright_and_no_other_exif_tag_matters(tmp_path, block):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    image.save(tmp_path / "x.jpg", exif=block)
    with Image.open(tmp_path / "x.jpg") as stored:
        expected = np.asarray(stored.convert("RGB").transpose(Image.ROTATE_270))
    found = data.Folder(tmp_path, "train")[0][0]
    assert found.size == (8, 12) and np.array_equal(np.asarray(found), expected)


def test_all_eight_orientations(tmp_path):
    from PIL import ImageOps
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    for orientation in range(10):
        block = Image.Exif()
        block[0x0112] = orientation
        image.save(tmp_path / f"{orientation}.png", exif=block)
    for index, path in enumerate((source := data.Folder(tmp_path, "train")).files):
        with Image.open(path) as stored:
            stored.load()
            expected = np.asarray(ImageOps.exif_transpose(stored))
        assert np.array_equal(np.asarray(source[index][0]), expected), path.name


@pytest.mark.parametrize("content, kind", [
    (b"\0\0\0\x20ftypavif\0\0\0\0", "of kind AVIF, not JPEG, PNG"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "of kind HEIC"),
    (b"II*\0\x08\0\0\0", "of kind TIFF"), (b"MM\0*\0\0\0\x08", "of kind TIFF"),
    (b"\n<!DOCTYPE html><html>404", "of kind HTML"), (b"<svg xmlns=''/>", "of kind SVG"),
    (b"version https://git-lfs.github.com/spec/v1", "of kind Git LFS"), (b"%PDF-1.7", "of kind PDF"),
    (b"", "it is empty"), (b"some words", "of an unknown kind"),
    (b"\xff\xd8\xff\xe0", "JPEG header is damaged")])
def test_a_file_that_is_no_image_is_named_by_what_it_is(tmp_path, content, kind):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=kind) as e:
        data.Folder(tmp_path, "train")[0]
    assert "0x" not in str(e.value) and "x.jpg" in str(e.value) and "replace or delete it" in str(e.value)


def png(depth, colour_type, row, clear):
    """A PNG of two pixels. row: their bytes; clear: the transparent colour, in 16-bit numbers."""
    chunk = lambda name, content: (struct.pack(">I", len(content)) + name + content
                                   + struct.pack(">I", zlib.crc32(name + content)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("content, second", [
    (png(16, 0, struct.pack(">2H", 0x1234, 0x1235), [0x1234]), 18),
    (png(16, 2, struct.pack(">6H", 0x1234, 0x56, 0x9abc, *[0x2000] * 3), [0x1234, 0x56, 0x9abc]), 32),
    (png(8, 0, b"\x40\x41", [0x40]), 0x41), (png(4, 0, b"\x3a", [3]), 0xaa),
    (png(2, 0, b"\x60", [1]), 0xaa), (png(1, 0, b"\x80", [1]), 0)],
    ids=["16 bits, grey", "16 bits, RGB", "8 bits", "4 bits", "2 bits", "1 bit"])
def test_a_transparent_colour_is_white_at_any_depth(tmp_path, content, second):
    (tmp_path / "x.png").write_bytes(content)
    found = np.asarray(data.Folder(tmp_path, "train")[0][0])[0]
    assert found.tolist() == [[255] * 3, [second] * 3]


def test_class_names_that_the_font_lacks(tmp_path):
    """Accents are left out; a name in other letters is its class's number. Boxes would be all the same."""
    assert [draw.drawable(name, 5) for name in ("cat", "été", "Straße", "猫", "Ελ")] == [
        "cat", "ete", "Strasse", "5", "5"]
    images, names = np.zeros((2, 16, 16, 3), np.uint8), ["犬", "猫"]
    grids = [draw.sample_grid(images, np.array([0, 1]), titles) for titles in (names, ["0", "1"])]
    assert np.array_equal(*map(np.asarray, grids))
    charts = [draw.scatter_chart({"x": (np.array([[0, 0], [1, 1]]), [0, 1])}, legend)
              for legend in (names, ["0", "1"])]
    assert np.array_equal(*map(np.asarray, charts))


# ------------------------------------------------- listing -------------------------------------------------

def test_a_mapped_npz_is_pickled_as_its_name(tmp_path):
    """A loader's worker that is not forked gets the data set by pickle."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images, np.arange(200) % 3)
    dataset = build_dataset(str(tmp_path / "x.npz"), "train", 32)
    content = pickle.dumps(dataset)
    again = pickle.loads(content)
    assert len(content) < 2000 and isinstance(again.source.images, np.memmap)
    assert torch.equal(again[0, 7][0], dataset[0, 7][0]) and again[0, 7][1] == 1
    assert again.classes == dataset.classes
    np.savez_compressed(tmp_path / "y.npz", images)
    packed = pickle.loads(pickle.dumps(data.read_npz(tmp_path / "y.npz")))            # in memory: as it is
    assert np.array_equal(packed.images, images)


def test_a_file_is_looked_at_once(tmp_path, monkeypatch):
    """The size is known from the listing: the fingerprint asks the disk for nothing."""
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b/3.png").symlink_to(tmp_path / "nowhere")
    source = data.Folder(tmp_path, "train")
    size = (tmp_path / "a/1.png").stat().st_size
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "scandir"):
            patch.setattr(os, name, lambda *args, **options: pytest.fail("the disk was asked"))
        found = source.fingerprint()
    lines = f"1.png 0 {size}\n2.png 1 {size}\n3.png 1 None\n"
    assert found == hashlib.sha256(lines.encode()).hexdigest()


def test_files_come_in_the_order_of_their_folders(tmp_path):
    """"a/x" before "a-b/x", though "-" comes before "/"."""
    make(tmp_path, "a/x.png", "a-b/x.png", "a/c/x.png", "a/c.png")
    names = [path.relative_to(tmp_path).as_posix() for path in data.Folder(tmp_path, "train").files]
    assert names == sorted(names, key=lambda name: Path(name).parts) == ["a/c/x.png", "a/c.png", "a/x.png",
                                                                       "a-b/x.png"]


PROCESS = """
import os, sys
sys.path.insert(0, {root!r})
from runtime.processes import rank_zero_first, start_processes
import data
rank, world, device = start_processes("cpu")
scandir, scans = os.scandir, []
os.scandir = lambda path: scans.append(path) or scandir(path)
with rank_zero_first(rank):                                           # as the trainers open theirs
    train = data.build_dataset({folder!r}, "train", 16)
if rank == 0:
    data.build_dataset({folder!r} + "/train/a", "train", 16)         # by rank 0 alone, as a contact sheet
tests = [data.build_dataset({folder!r}, "test", 16) for _ in range(2)]
assert (train.length, train.classes, tests[1].length) == (3, ["a", "b"], 1)
assert train[0, 2][1] == 1
assert (rank == 0) == bool(scans), scans
print(rank, len(scans), train.source.fingerprint(), flush=True)
"""


@pytest.mark.slow
def test_rank_0_lists_for_all(tmp_path):
    folder = make(tmp_path / "images", "train/a/1.png", "train/a/2.png", "train/b/1.png", "val/a/1.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [subprocess.Popen([sys.executable, "-c", PROCESS.format(root=str(ROOT), folder=str(folder))],
                             env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
    (out, error), (out_1, error_1) = (process.communicate(timeout=120) for process in both)
    assert [process.returncode for process in both] == [0, 0], error + error_1
    assert "data " in out and "data " not in out_1                                         # rank 0's line
    assert out.split()[-1] == out_1.split()[-1] == data.Folder(folder, "train").fingerprint()
