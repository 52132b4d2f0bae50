"""The small model that comes with the code: used when no other is named, and what it can do."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import evaluate
import metrics
import sample
import train_diffusion
import train_tokenizer
from data import build_dataset, some_images, to_float
from flow import sample_latents
from runtime import files
from shapes import SHAPES
from sit import load_diffusion
from test_train_tokenizer import TINY


def tiny_sit(tokenizer, out):
    """Ten steps of a tiny SiT on a tokenizer's latents."""
    train_diffusion.main(["--tokenizer", str(tokenizer), "--out", str(out), *(
        "--width 32 --depth 1 --heads 2 --cache-images 40 --batch-size 8 --steps 10 --save-every 5 "
        "--log-every 2 --device cpu").split()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    train_tokenizer.main([*TINY, "--out", str(folder / "tokenizer")])
    tiny_sit(folder / "tokenizer", folder / "diffusion")
    return folder


def test_without_a_model_the_one_in_assets_is_drawn_from_and_measured(run, tmp_path, monkeypatch):
    small = shutil.copyfile(run / "diffusion/last.pt", tmp_path / "small.pt")
    monkeypatch.setattr(checkpoints, "DEFAULT_MODEL", small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    sample.main(["--steps", "3", "--device", "cpu"])
    # So is what lies beside it; what lies elsewhere is drawn as the paper draws.
    beside, elsewhere = (shutil.copyfile(small, tmp_path / name) for name in ("beside.pt", "runs/other.pt"))
    sample.main(["--ckpt", str(beside), "--steps", "3", "--device", "cpu", "--out", "beside.png"])
    given = ["--ckpt", str(elsewhere), "--steps", "3", "--device", "cpu"]
    sample.main([*given, "--cfg", "2", "--sampler", "heun", "--out", "given.png"])
    sample.main([*given, "--out", "plain.png"])
    pixels = [np.asarray(Image.open(f"{name}.png")) for name in ("samples", "beside", "given", "plain")]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], pixels[3]) and pixels[0].shape[0] > 10 * 32    # a row for each class
    settings = files.read_json("samples.png.settings.json")
    assert (settings["ckpt"], settings["cfg"], settings["steps"]) == (str(small), 2, 3)
    evaluate.main(["recon", "--num-images", "4", "--features", "none", "--device", "cpu"])
    assert files.read_json(tmp_path / "runs/box/recon.json")["images"] == 4


def test_another_model_trains_on_the_tokenizer_of_a_diffusion_model(run, tmp_path):
    """A checkpoint of train_diffusion.py contains its tokenizer: --tokenizer takes it from there."""
    tiny_sit(run / "diffusion/last.pt", tmp_path / "again")
    trained, given = (load_diffusion(path)[1] for path in (tmp_path / "again", run / "diffusion"))
    for (name, a), b in zip(trained.state_dict().items(), given.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_model_in_assets_draws_the_class_it_is_asked_for():
    assert checkpoints.DEFAULT_MODEL.stat().st_size <= 6_000_000
    model, tokenizer, config = load_diffusion(checkpoints.DEFAULT_MODEL)
    assert config["classes"] == list(SHAPES)
    images, labels = zip(*some_images(build_dataset("shapes", "train", 32), 1000))
    z, y = tokenizer.encode(to_float(torch.cat(images)), normalize=True).flatten(1), torch.cat(labels)
    weight, bias = metrics.linear_probe(z.double(), y, 10)
    test, _ = next(some_images(build_dataset("shapes", "test", 32), 100))
    again = tokenizer.reconstruct(to_float(test))
    assert metrics.psnr((to_float(test) + 1) / 2, (again.clamp(-1, 1) + 1) / 2).mean() > 28.5
    classes = np.arange(40) % 10
    drawn = sample_latents(model, range(40), classes, 0, 2.0, steps=25, path=config["path"])
    # Through the decoder and the encoder again: what counts is what the picture shows.
    seen = tokenizer.encode(tokenizer.decode(drawn, normalized=True).clamp(-1, 1), normalize=True).flatten(1)
    found = (seen.double() @ weight + bias).argmax(1).numpy()
    assert (found == classes).mean() > 0.8


def test_the_model_of_photographs_in_assets(tmp_path):
    """What stands in docs/measured.md needs a classifier of half an hour; here what a glance sees."""
    path = checkpoints.DEFAULT_MODEL.with_name("cifar10.pt")
    assert path.stat().st_size <= 16_000_000
    model, tokenizer, config = load_diffusion(path)
    assert config["classes"] == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert tokenizer.config.latent_shape() == (model.config.num_latents, model.config.latent_dim) == (64, 16)
    # Sky and sea behind airplanes and ships; grass, sand and leaves behind deer and frogs.
    drawn = sample_latents(model, range(16), np.repeat([0, 8, 4, 6], 4), 0, 2.0, sampler="heun", steps=8)
    images = tokenizer.decode(drawn, normalized=True)
    blue, brown = (images[:, 2] - images[:, 1]).mean((1, 2)).chunk(2)
    assert blue.mean() > brown.mean() + 0.2
    # Its reconstructions, on images that neither has seen.
    evaluate.main(["recon", str(path), "--data", "shapes", "--num-images", "100", "--features", "none",
                   "--out", str(tmp_path / "recon"), "--device", "cpu"])
    assert files.read_json(tmp_path / "recon.json")["psnr"] > 25
