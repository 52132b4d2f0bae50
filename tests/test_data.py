"""data.py: every kind of source, broken files, preprocessing, and samples that depend on (seed, epoch, index)
alone."""
import functools
import hashlib
import http.server
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError, sample_rng
from data import (CIFAR10_CLASSES, GlobalBatches, build_dataset, center_crop, collate,
                  some_images, read_npz, resize_short_side, to_float, to_rgb, to_uint8)
from shapes import SHAPES, Shapes


def photo(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def array(dataset, index, epoch=0):
    return dataset[epoch, index][0].numpy()


def test_a_folders_paths_are_bytes_in_one_array(tmp_path):
    """Also names that are not UTF-8; no object per path to which a worker's garbage collector could write."""
    names = ["a/x.png", "b/\u00fc.png", "b/z.png", "b/\udcff and a longer name.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = data.Folder(tmp_path, "train")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in source.files) == sorted(names)
    assert isinstance(source.files.names, np.ndarray) and source.files.names.dtype.kind == "S"
    assert isinstance(source.labels, np.ndarray) and source[2][1] == 1
    with pytest.raises(IndexError):
        source.files[4]


def test_npz_files_are_mapped_not_read(tmp_path):
    """Eight processes that score 50,000 samples need not hold them eight times."""
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6)
    np.savez(tmp_path / "plain.npz", images, labels)
    np.savez_compressed(tmp_path / "small.npz", images, labels)
    plain, small = (data.read_npz(tmp_path / name) for name in ("plain.npz", "small.npz"))
    assert isinstance(plain.images, np.memmap) and not isinstance(small.images, np.memmap)
    assert np.array_equal(plain.images, images) and np.array_equal(small.images, images)
    assert plain.fingerprint() == small.fingerprint() and plain[3][1] == 3
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(images), labels)
    assert np.array_equal(data.read_npz(tmp_path / "fortran.npz").images, images)


# ------------------------------------------------ shapes ------------------------------------------------

def test_shapes_are_a_function_of_seed_and_index():
    a, b = (build_dataset("shapes", "train", 32, seed=3) for _ in range(2))
    assert np.array_equal(array(a, 10 ** 9 + 7), array(b, 10 ** 9 + 7))             # endless
    assert not np.array_equal(array(a, 0), array(build_dataset("shapes", "train", 32, seed=4), 0))
    assert not np.array_equal(array(a, 0), array(build_dataset("shapes", "test", 32, seed=3), 0))
    assert [a[0, i][1] for i in range(12)] == [*range(10), 0, 1]


def test_shapes_at_two_sizes_are_the_same_drawing():
    small, large = (build_dataset("shapes", "train", size) for size in (32, 256))
    for i in range(10):
        shrunk = np.asarray(Image.fromarray(array(large, i).transpose(1, 2, 0)).reduce(8), int)
        assert np.abs(shrunk - array(small, i).transpose(1, 2, 0)).mean() < 2


def test_shapes_are_whole_antialiased_and_visible():
    source = Shapes("train", 64, 0)            # shapes end 3 % of the side from the frame: 2 px
    outlines = [outline for outline, _ in SHAPES.values()]
    assert max(np.linalg.norm(outline, axis=-1).max() for outline in outlines) <= 1.001
    for i in range(200):
        image = np.asarray(source[i][0], int).reshape(64, 64, 3)
        edge = np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))
        assert (edge == edge[0]).all()                                            # the frame is background
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 4                   # more than two flat colours
        contrast = np.abs((image - edge[0]) @ (0.299, 0.587, 0.114)).max()
        assert contrast > 45


# ------------------------------------------------ folders ------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """An ImageFolder with the files that trip loaders: grey, CMYK, palette, alpha, 16 bit, EXIF-rotated,
    WebP, nested."""
    root = tmp_path / "images"
    (root / "train/a/deep").mkdir(parents=True)
    (root / "train/b").mkdir()
    (root / "val/a").mkdir(parents=True)
    (root / "val/b").mkdir()
    image = photo(40, 30)
    image.save(root / "train/a/rgb.png")
    image.convert("L").save(root / "train/a/deep/grey.JPEG")
    image.convert("CMYK").save(root / "train/a/cmyk.jpg")
    image.convert("P").save(root / "train/b/palette.png")
    image.save(root / "train/b/lossless.webp", lossless=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    image.save(root / "train/b/rotated.png", exif=rotated)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(root / "train/b/clear.png")
    Image.fromarray(np.full((30, 40), 65535, np.uint16)).save(root / "train/b/sixteen.png")
    image.save(root / "val/a/one.png")
    image.save(root / "val/b/two.png")
    (root / "train/b/.hidden.png").write_bytes(b"junk")
    (root / "train/notes.txt").write_text("no image")
    return root


def test_folder_layout_classes_and_modes(folder):
    train, test = (build_dataset(str(folder), split, 30) for split in ("train", "test"))
    names = [str(f.relative_to(folder / "train")) for f in train.source.files]
    assert train.classes == ["a", "b"] and train.length == 8 and test.length == 2
    items = {name: train[0, i] for i, name in enumerate(names)}
    assert {name: label for name, (_, label) in items.items()} == {n: int(n.startswith("b")) for n in names}
    assert all(image.shape == (3, 30, 30) and image.dtype == torch.uint8 for image, _ in items.values())
    assert torch.equal(items["a/rgb.png"][0], items["b/lossless.webp"][0])
    assert (items["b/clear.png"][0] == 255).all() and (items["b/sixteen.png"][0] == 255).all()
    grey = items["a/deep/grey.JPEG"][0]
    assert torch.equal(grey[0], grey[1])
    whole = center_crop(photo(40, 30).rotate(-90, expand=True), 30)             # EXIF 6 is stored on its side
    assert torch.equal(items["b/rotated.png"][0], whole)


def test_flat_folder_has_no_classes_and_serves_both_splits(tmp_path, capsys):
    photo(20, 20).save(tmp_path / "x.png")
    dataset = build_dataset(str(tmp_path), "test", 16)
    assert dataset.classes is None and dataset[0, 0][1] == -1
    assert "training images" in capsys.readouterr().out


def test_class_numbers_are_those_of_the_training_folder(folder):
    shutil.rmtree(folder / "val/a")
    assert build_dataset(str(folder), "test", 16)[0, 0][1] == 1                # b, though it is alone in val/
    (folder / "val/new").mkdir()
    photo(20, 20).save(folder / "val/new/x.png")
    with pytest.raises(UserError, match="has classes that .* lacks: new"):
        build_dataset(str(folder), "test", 16)
    shutil.rmtree(folder / "train")
    with pytest.raises(UserError, match="val/ but no train/"):
        build_dataset(str(folder), "train", 16)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build_dataset(str(tmp_path / "nowhere"), "train", 16)
    with pytest.raises(UserError, match="no images in"):
        build_dataset(str(tmp_path), "train", 16)


def test_corrupt_file_is_named_also_from_a_worker_process(folder):
    path = folder / "train/a/cmyk.jpg"
    path.write_bytes(path.read_bytes()[:200])
    index = [f.name for f in build_dataset(str(folder), "train", 16).source.files].index("cmyk.jpg")
    dataset = build_dataset(str(folder), "train", 16)
    assert all(isinstance(dataset[0, i], UserError) == (i == index) for i in range(8))
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=collate,
                                         batch_sampler=[[(0, i) for i in range(8)], [(1, index + 1)]])
    error, (images, labels) = loader
    assert isinstance(error, UserError) and len(images) == len(labels) == 1
    assert str(path) in str(error) and "replace or delete it" in str(error) and "\n" not in str(error)
    with pytest.raises(UserError, match="cmyk.jpg"):
        list(some_images(dataset, 8))


# ------------------------------------------------ arrays ------------------------------------------------

def test_npz_in_adm_layout(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images, np.arange(5))
    dataset = build_dataset(str(tmp_path / "x.npz"), "train", 20)
    assert dataset.length == 5 and dataset[0, 3][1] == 3
    assert np.array_equal(array(dataset, 3), images[3].transpose(2, 0, 1))
    np.savez(tmp_path / "y.npz", images)
    assert read_npz(tmp_path / "y.npz")[0][1] == -1 and read_npz(tmp_path / "y.npz").classes is None
    np.savez(tmp_path / "z.npz", images, np.arange(5.0))
    assert read_npz(tmp_path / "z.npz").labels.dtype == np.int64


@pytest.mark.parametrize("content, message", [
    (dict(images=np.zeros(3)), r"no array 'arr_0' \(found: images\)"),
    (dict(arr_0=np.zeros((2, 4, 4, 3))), "should be uint8"),
    (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(3)), "class numbers.* of 2 images"),
    (dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8), arr_1=np.array(["cat"])), "class numbers"),
    (dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8), arr_1=np.array([0.5])), "class numbers"),
    (dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8), arr_1=np.array([-2])), "class numbers"),
    (None, "cannot read")])
def test_bad_npz_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK junk") if content is None else np.savez(path, **content)
    with pytest.raises(UserError, match=message):
        read_npz(path)


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_binary_layout(tmp_path, packed, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = rng.integers(0, 256, (6, 4, 3073), np.uint8)
    records[..., 0] %= 10
    for name, record in zip([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], records):
        (folder / name).write_bytes(record.tobytes())
    if packed:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
            tar.add(folder, "cifar-10-batches-bin")
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="is not CIFAR-10's binary version"):
            build_dataset("cifar10", "train", 32, data_root=str(tmp_path))
        monkeypatch.setattr(data, "CIFAR10_MD5",
                            hashlib.md5((tmp_path / "cifar-10-binary.tar.gz").read_bytes()).hexdigest())
    train, test = (build_dataset("cifar10", split, 32, data_root=str(tmp_path))
                   for split in ("train", "test"))
    assert (train.length, test.length, train.classes) == (20, 4, CIFAR10_CLASSES)
    image, label = train[0, 4 * 2 + 3]                                          # the third file's last record
    assert label == records[2, 3, 0] and np.array_equal(image.numpy().reshape(-1), records[2, 3, 1:])


def test_cifar10_cut_short_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(bytes(3000))
    with pytest.raises(UserError, match="cut short"):
        build_dataset("cifar10", "test", 32, data_root=str(tmp_path))


# ---------------------------------------------- preprocessing ----------------------------------------------

def pixels(image):
    """A PIL image as an int array (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1).astype(int)


def test_center_crop_follows_adm():
    image = photo(20, 16)
    assert np.array_equal(center_crop(image, 16), pixels(image)[:, :, 2:18])             # nothing to resample
    halved = np.asarray(photo(32, 32), float).reshape(16, 2, 16, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    # box filter; two passes round
    assert np.abs(center_crop(photo(32, 32), 16).numpy() - halved).max() <= 1
    assert center_crop(photo(7, 300), 16).shape == (3, 16, 16)                        # enlarged if it must be
    assert resize_short_side(photo(1, 3000), 256).shape == (3, 2048, 256)               # not 768,000 x 256


SIDES = [(32, 32), (33, 47), (47, 33), (63, 31), (64, 90), (65, 129), (2, 3), (1, 1), (5, 4), (31, 200),
         (500, 375), (375, 500), (511, 640), (512, 640), (1023, 767), (100, 3000), (700, 90), (333, 501)]


@pytest.mark.parametrize("size, fast", [(32, True), (37, True), (256, True), (37, False)])
def test_resampling_is_pillows_but_for_rounding(monkeypatch, size, fast):
    """Odd and even, upright and wide, tiny, equal, huge and very long, against ADM's own steps in Pillow.

    Rows before columns, in two calls: by itself Pillow 13 takes columns first where an image is tall and
    narrow, and what clipping does in between depends on the order. (Not fast is Pillow's one call.)
    """
    monkeypatch.setattr(data, "TORCH_RESIZES_FAST", fast)
    levels = np.zeros(256, int)                                            # how often they are so far apart
    for width, height in SIDES:
        noise = photo(width, height)
        smooth = photo(9, 7).resize((width, height), Image.BICUBIC)
        for image in (noise, smooth):
            slow = image
            if max(width, height) > 8 * min(width, height):
                w, h = (min(side, 8 * min(width, height)) for side in (width, height))
                left, top = (width - w) // 2, (height - h) // 2
                slow = slow.crop((left, top, left + w, top + h))
            while min(slow.size) >= 2 * size:
                slow = slow.resize(tuple(side // 2 for side in slow.size), Image.BOX)
            w, h = (round(side * (size / min(slow.size))) for side in slow.size)
            if fast:
                slow = slow.resize((w, slow.height), Image.BICUBIC)
            slow = slow.resize((w, h), Image.BICUBIC)
            off = np.abs(resize_short_side(image, size).numpy() - pixels(slow))
            levels += np.bincount(off.ravel(), minlength=256)
            left, top = (w - size) // 2, (h - size) // 2
            middle = pixels(slow.crop((left, top, left + size, top + size)))
            assert np.abs(center_crop(image, size).numpy() - middle).max() <= 2, (width, height)
    assert levels[3:].sum() == 0 and levels[2] < 1e-4 * levels.sum() and levels[1] < 0.01 * levels.sum()


def test_download_appears_under_its_name_only_when_it_is_whole(tmp_path):
    (tmp_path / "server").mkdir()
    content = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "server/file.bin").write_bytes(content)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(handler, directory=tmp_path / "server")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, path = f"http://127.0.0.1:{server.server_port}", tmp_path / "here/file.bin"
        with pytest.raises(UserError, match="arrived damaged"):
            data.download(f"{address}/file.bin", path, "0" * 32)
        with pytest.raises(UserError, match="cannot download .*404.*without network, put the file at"):
            data.download(f"{address}/nowhere", path, "0" * 32)
        assert list(path.parent.iterdir()) == []                                     # and no temporary file
        data.download(f"{address}/file.bin", path, hashlib.md5(content).hexdigest())
        assert path.read_bytes() == content
        server.shutdown()


def test_transparency_over_white_and_palette_with_transparency():
    image = Image.new("LA", (2, 2), (0, 128))
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [127] * 3
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(palette))[0, 0].tolist() == [255] * 3


def test_range_conversion_round_trips_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_flips_depend_on_seed_epoch_and_index_alone(folder):
    dataset = build_dataset(str(folder), "train", 30, flip=True, seed=1)
    plain = build_dataset(str(folder), "train", 30)
    flips = [[not np.array_equal(array(dataset, i, epoch), array(plain, i)) for i in range(8)]
             for epoch in range(8)]
    assert 0.25 < np.mean(flips) < 0.75 and flips[0] != flips[1]
    again = build_dataset(str(folder), "train", 30, flip=True, seed=1)
    loader = torch.utils.data.DataLoader(again, batch_sampler=[[(1, 5), (0, 2)], [(0, 5)]], num_workers=2,
                                         collate_fn=collate)
    batches = [images for images, _ in loader]
    assert np.array_equal(batches[0][0].numpy(), array(dataset, 5, 1))
    assert np.array_equal(batches[1][0].numpy(), array(dataset, 5, 0))


def test_another_crop_takes_the_place_of_adms_and_its_draws_come_before_the_flip(folder):
    dataset = build_dataset(str(folder), "train", 16, flip=True, seed=1)
    dataset.crop = lambda image, size, rng: torch.full((3, size, size), int(rng.integers(256)))
    for key in ((0, 1), (0, 2), (4, 1)):
        rng = sample_rng(1, "augment", *key)
        assert (dataset[key][0] == rng.integers(256)).all()


# ------------------------------------------------ batches ------------------------------------------------

def test_global_batches_are_the_same_images_for_any_split():
    whole = list(GlobalBatches(100, 12, 0, 20, seed=5))
    for world, accumulate in ((2, 1), (1, 3), (2, 3)):
        parts = [list(GlobalBatches(100, 12, 0, 20, 5, rank, world, accumulate)) for rank in range(world)]
        for step in range(20):
            keys = [key for part in parts for micro in part[step * accumulate:(step + 1) * accumulate]
                    for key in micro]
            assert sorted(keys) == sorted(whole[step])
    assert list(GlobalBatches(100, 12, 7, 20, seed=5)) == whole[7:]           # a resumed run
    keys = [key for batch in whole for key in batch]
    assert sorted(i for e, i in keys if e == 0) == list(range(100))           # an epoch shows each image once
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    assert list(GlobalBatches(None, 4, 3, 4)) == [[(0, 12), (0, 13), (0, 14), (0, 15)]]


def test_what_a_source_returns_after_the_label_is_passed_on():
    class Source:
        classes, length = None, 3

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), index, f"caption {index}", {"more": index}

    images, labels, captions, more = collate([data.ImageDataset(Source(), 8)[0, i] for i in range(3)])
    assert images.shape == (3, 3, 8, 8) and labels.tolist() == [0, 1, 2]
    assert captions == ("caption 0", "caption 1", "caption 2") and more[2] == {"more": 2}


def test_some_images_are_of_all_classes_and_end_with_the_data(folder, tmp_path):
    for i in range(60):                                     # files are sorted by class: 30 of a, then 32 of b
        photo(20, 20, i).save(folder / f"val/{'ab'[i // 30]}/{i}.png")
    dataset = build_dataset(str(folder), "test", 16)
    first, again = ([labels.tolist() for _, labels in some_images(dataset, 20, 8)] for _ in range(2))
    assert first == again and [len(labels) for labels in first] == [8, 8, 4]
    assert 4 < sum(sum(first, [])) < 16

    np.savez(tmp_path / "x.npz", np.zeros((5, 8, 8, 3), np.uint8))
    dataset = build_dataset(str(tmp_path / "x.npz"), "test", 8)
    assert [len(images) for images, _ in some_images(dataset, 1000, batch_size=2)] == [2, 2, 1]
