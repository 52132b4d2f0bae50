"""The small model that comes with the code: how it is packed, and what the one in assets/ can do."""
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
from common import UserError
from data import build_dataset, some_images, to_float
from flow import sample_latents
from shapes import SHAPES
from sit import load_diffusion
from study import box
from test_train_tokenizer import TINY


def tiny_sit(tokenizer, out):
    """Ten steps of a tiny SiT on a tokenizer's latents."""
    train_diffusion.main(["--tokenizer", str(tokenizer), "--out", str(out), *(
        "--width 32 --depth 1 --heads 2 --cache-images 40 --batch-size 8 --steps 10 --save-every 5 "
        "--log-every 2 --grid-every 0 --device cpu").split()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    train_tokenizer.main([*TINY, "--out", str(folder / "tokenizer")])
    tiny_sit(folder / "tokenizer", folder / "diffusion")
    return folder


def test_a_packed_model_is_the_trained_one_in_half_precision(run, tmp_path):
    box.main([str(run / "diffusion"), str(tmp_path / "small.pt")])
    assert (tmp_path / "small.pt").stat().st_size < (run / "diffusion/last.pt").stat().st_size / 4
    for ours, theirs in zip(load_diffusion(tmp_path / "small.pt"), load_diffusion(run / "diffusion")):
        if isinstance(ours, dict):
            assert ours == theirs and ours["classes"] == list(SHAPES)
            continue
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, rtol=2 ** -11, atol=2 ** -24, msg=name)    # half a float16 step
    with pytest.raises(UserError, match="not a diffusion model"):
        box.main([str(run / "tokenizer"), str(tmp_path / "small.pt")])
    with pytest.raises(UserError, match="two arguments"):
        box.main([])


def test_another_model_trains_on_the_tokenizer_of_a_packed_one(run, tmp_path):
    box.main([str(run / "diffusion"), str(tmp_path / "small.pt")])
    tiny_sit(tmp_path / "small.pt", tmp_path / "again")
    trained, packed = (load_diffusion(path)[1] for path in (tmp_path / "again", tmp_path / "small.pt"))
    for (name, a), b in zip(trained.state_dict().items(), packed.state_dict().values()):
        assert torch.equal(a, b), name


def test_without_a_model_the_packed_one_is_drawn_from_and_measured(run, tmp_path, monkeypatch, capsys):
    box.main([str(run / "diffusion"), str(tmp_path / "small.pt")])
    monkeypatch.setattr(checkpoints, "BOX", tmp_path / "small.pt")
    monkeypatch.chdir(tmp_path)
    sample.main(["--steps", "3", "--device", "cpu"])
    given = ["--ckpt", str(tmp_path / "small.pt"), "--cfg", "2", "--steps", "3", "--device", "cpu"]
    sample.main([*given, "--out", "given.png"])
    pixels = [np.asarray(Image.open(name)) for name in ("samples.png", "given.png")]
    assert np.array_equal(*pixels) and pixels[0].shape[0] > 10 * 32                     # a row for each class
    evaluate.main(["recon", "--num-images", "4", "--features", "none", "--device", "cpu"])
    assert checkpoints.read_json(tmp_path / "runs/box/recon.json")["images"] == 4
    with pytest.raises(UserError, match="not both"):
        sample.main([*given, "--released", "256"])


def test_the_model_in_assets_draws_the_class_it_is_asked_for():
    assert checkpoints.BOX.stat().st_size <= 6_000_000
    model, tokenizer, config = load_diffusion(checkpoints.BOX)
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
