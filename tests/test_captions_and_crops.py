"""What attaches to data.py from outside: variants/captions.py, its layouts and their errors,
variants/random_crop.py and variants/mixed_size.py."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError
from data import GlobalBatches, build_dataset, collate
from shapes import Shapes
from variants.captions import COLOURS, captioned
from variants.mixed_size import MixedSizeBatches, MixedSizeDataset
from variants.random_crop import random_crop


def array(dataset, index, epoch=0):
    return dataset[epoch, index][0].numpy()


def noise(folder, count=8):
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")


# ------------------------------------------------ captions ------------------------------------------------

def test_captioned_shapes_are_the_shapes_and_their_captions_are_true():
    plain = build_dataset("shapes", "train", 32, seed=3)
    dataset = captioned(build_dataset("shapes", "train", 32, seed=3))
    nearest = lambda rgb: min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], rgb)))
    for i in range(100):
        image, label, caption = dataset[0, i]
        assert torch.equal(image, plain[0, i][0])
        colours, counts = np.unique(image.numpy().reshape(3, -1).T.astype(int), axis=0, return_counts=True)
        background = image[:, 0, 0].tolist()
        figure = next(c for c in colours[counts.argsort()[::-1]].tolist() if c != background)
        assert caption == f"a {nearest(figure)} {Shapes.classes[label]} on {nearest(background)}"
    again = captioned(build_dataset("shapes", "train", 64, seed=3))
    assert again[5, 10 ** 9][2] == dataset[0, 10 ** 9][2]                  # of seed and index alone
    test = captioned(build_dataset("shapes", "test", 32, seed=3))
    assert [dataset[0, i][2] for i in range(50)] != [test[0, i][2] for i in range(50)]
    assert dataset.source.fingerprint() == plain.source.fingerprint()


@pytest.fixture
def pictures(tmp_path):
    """Three images in train/, one below a sub-folder, and one in val/."""
    for name in ("train/one.png", "train/two.jpg", "train/deep/three.png", "val/deep/four.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (len(name) * 9, 0, 0)).save(tmp_path / name)
    return tmp_path


def captions_of(folder, split="train"):
    dataset = captioned(build_dataset(str(folder), split, 16))
    return {path.stem: dataset[0, i] if isinstance(dataset[0, i], UserError) else dataset[0, i][2]
            for i, path in enumerate(dataset.source.source.files)}


def test_text_files_and_json_lines_give_the_same_captions(pictures):
    written = {"train/one.png": "ein Öltank\n", "train/two.jpg": "two", "train/deep/three.png": "3 lines\n\n",
               "val/deep/four.png": "four"}
    for name, caption in written.items():
        (pictures / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    expected = {"one": "ein Öltank\n", "two": "two", "three": "3 lines\n\n"}
    assert captions_of(pictures) == expected and captions_of(pictures, "test") == {"four": "four"}
    for path in list(pictures.rglob("*.txt")):
        path.unlink()
    lines = [json.dumps({"file": name, "caption": caption, "url": 3}) for name, caption in written.items()]
    (pictures / "captions.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    assert captions_of(pictures) == expected and captions_of(pictures, "test") == {"four": "four"}
    (pictures / "val/captions.jsonl").write_text('{"file": "deep/four.png", "caption": "nearer"}')
    assert captions_of(pictures, "test") == {"four": "nearer"}


def test_edited_captions_are_another_data_set(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    found = []
    for text in ("a dog", "a cat", "a dog"):
        (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.png", "caption": text}))
        found.append(captioned(build_dataset(str(tmp_path), "train", 16)).source.fingerprint())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("name", ["captions.jsonl", "one.txt"])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, name):
    """Windows puts one in front of text."""
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    text = {"one.txt": "a", "captions.jsonl": '{"file": "one.png", "caption": "a"}'}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert captions_of(tmp_path) == {"one": "a"}
    (tmp_path / name).write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=f"cannot read .*{name}.*utf-8"):
        raise captions_of(tmp_path)["one"]


def test_captions_are_found_around_a_lone_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/one.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "images/one.png", "caption": "red"}')
    assert captions_of(tmp_path) == {"one": "red"}


def test_without_captions_asked_for_items_are_pairs(pictures):
    (pictures / "captions.jsonl").write_text("nonsense")                             # not even looked at
    dataset = build_dataset(str(pictures), "train", 16)
    images, labels = collate([dataset[0, i] for i in range(3)])
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == [0, -1, -1]


def test_missing_and_empty_captions_are_named(pictures):
    for name, caption in (("train/one", "one"), ("train/two", " \n"), ("val/deep/four", "four")):
        (pictures / f"{name}.txt").write_text(caption)
    found = captions_of(pictures)
    assert found["one"] == "one"
    assert "two.jpg has an empty caption in" in str(found["two"]) and "delete the image" in str(found["two"])
    assert "three.png has no caption:" in str(found["three"])
    assert "three.txt is not there" in str(found["three"])
    (pictures / "train/one.txt").write_bytes(b"\xff\xfe\xfa")
    assert "cannot read caption" in str(captions_of(pictures)["one"])
    dataset = captioned(build_dataset(str(pictures), "train", 16))
    assert isinstance(collate([dataset[0, i] for i in range(3)]), UserError)
    (pictures / "train/one.png").write_bytes(b"junk")
    assert "cannot read image" in str(captions_of(pictures)["one"])               # of the two, the image's
    Image.new("RGB", (16, 16)).save(pictures / "train/one.png")
    (pictures / "captions.jsonl").write_text('{"file": "train/one.png", "caption": ""}')
    found = captions_of(pictures)
    assert "empty caption" in str(found["one"]) and "has no line for it" in str(found["two"])


@pytest.mark.parametrize("line, message", [
    ('{"file": "b.png", "caption": "x"', 'line 2 is not {"file": "...", "caption": "..."}'),
    ('["b.png", "x"]', "line 2 is not"), ('{"file": "b.png"}', "line 2 is not"),
    ('{"file": "b.png", "caption": ["x"]}', "line 2 is not"), ("[" * 100_000, "line 2 is not"),
    ('{"file": "a.png", "caption": "x"}', "line 2: a second caption for a.png")])
def test_malformed_json_lines_are_named(pictures, line, message):
    (pictures / "captions.jsonl").write_text('{"file": "a.png", "caption": "first"}\n' + line)
    with pytest.raises(UserError) as e:
        captioned(build_dataset(str(pictures), "train", 16))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_arrays_have_no_captions(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="has no captions; choose shapes, or a folder"):
        captioned(build_dataset(str(tmp_path / "x.npz"), "train", 8))


# --------------------------------------------- crops and sizes ---------------------------------------------

def test_random_crop_stays_within_its_range():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 100).astype(np.uint8)[:, None, None], (1, 100, 3)))
    spans = []
    for seed in range(50):
        crop = random_crop(ramp, 32, np.random.default_rng(seed)).numpy().astype(float)
        assert crop.shape == (3, 32, 32)
        spans.append((crop[0, -1, 0] - crop[0, 0, 0]) / 255)
    assert 0.72 < min(spans) < 0.85 < 0.93 < max(spans) <= 1.01


def test_another_crop_draws_from_seed_epoch_and_index_alone(tmp_path):
    noise(tmp_path)
    dataset, again = (build_dataset(str(tmp_path), "train", 16, flip=True, seed=1) for _ in range(2))
    centred = array(dataset, 5)
    dataset.crop = again.crop = random_crop
    assert not np.array_equal(array(dataset, 5), array(dataset, 5, 1))
    assert not np.array_equal(array(dataset, 5), centred)
    assert np.array_equal(array(dataset, 5, 1), array(again, 5, 1))


def test_two_sizes_in_turn_are_the_same_images_at_another_size(tmp_path):
    noise(tmp_path)
    plain = {size: build_dataset(str(tmp_path), "train", size, flip=True) for size in (16, 24)}
    mixed = MixedSizeDataset(plain[16])
    for crop in (None, random_crop):
        if crop:
            plain[16].crop = plain[24].crop = mixed.crop = crop                 # one that comes later counts
        for index in range(4):
            assert np.array_equal(mixed[3, index][0], plain[16][3, index][0])
            for size in (16, 24):
                image, label = mixed[3, index, size]
                assert torch.equal(image, plain[size][3, index][0]) and label == plain[size][3, index][1]
    whole = list(GlobalBatches(8, 6, 0, 4, seed=5))
    sized = [[(*key, (16, 24)[step % 2]) for key in keys] for step, keys in enumerate(whole)]
    assert list(MixedSizeBatches(8, 6, 0, 4, seed=5, sizes=(16, 24))) == sized
    assert list(MixedSizeBatches(8, 6, 3, 4, seed=5, sizes=(16, 24))) == sized[3:]             # a resumed run
    parts = [list(MixedSizeBatches(8, 6, 0, 4, 5, rank, 2, 3, sizes=(16, 24))) for rank in range(2)]
    for step in range(4):
        assert sorted(key for part in parts for micro in part[3 * step:3 * step + 3]
                      for key in micro) == sorted(sized[step])
