"""evaluate.py: every command runs from files alone, its numbers come from the images, bad input is named."""
import importlib.util
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import ROOT
from forked import in_two_processes
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import checkpoints
import evaluate
import maetok
import sample
import train_diffusion
import train_tokenizer
from common import UserError, sample_rng
from data import build_dataset, some_images, to_float, to_uint8
from measures import features, image_sets, latent_space
from shapes import Shapes
from test_train_tokenizer import TINY


def shapes(count, start=0):
    source = Shapes("test", 16, 1)
    return (np.stack([np.array(source[i][0]) for i in range(start, start + count)]),
            np.arange(start, start + count) % 10)


class Output(NamedTuple):
    pool: torch.Tensor
    logits: torch.Tensor
    spatial: torch.Tensor


def tiny_inception(weights_dir="", device="cpu"):
    """In place of the FID network: 12 colour means of 2 x 2 areas."""
    def network(images):
        x = F.adaptive_avg_pool2d(images.double(), 2).flatten(1) / 255
        return Output(x, x[:, :5] * 3, x[:, 5:])
    return network


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def colours_network(monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("diffusion")
    train_diffusion.main(["--tokenizer", str(tokenizer), "--out", str(folder), *(
        "--width 32 --depth 1 --heads 2 --cache-images 40 --batch-size 8 --steps 10 --save-every 5 "
        "--device cpu").split()])
    return folder


def classify(tmp_path, cache, *options):
    evaluate.main(["generation", str(tmp_path / "s.npz"), "--data", "shapes", "--features", "classifier",
                   "--classifier-steps", "150", "--test-images", "200", "--reference-images", "200",
                   "--cache", str(cache), "--device", "cpu", *map(str, options)])
    return json.loads((tmp_path / "s.npz.json").read_text())


def measure(*options):
    evaluate.main([*map(str, options), "--device", "cpu"])


# ------------------------------------------------ generation ------------------------------------------------

def test_share_of_the_requested_class(tmp_path, cache, tokenizer, capsys):
    images, labels = shapes(200)
    np.savez(tmp_path / "s.npz", images, labels)
    right = classify(tmp_path, cache, "--tokenizer", tokenizer)
    assert right["reconstructions_assigned_to_their_class"] < 0.4                # six steps of training: mush
    assert right["precision_against_reconstructions"] < 0.5 < right["precision"]     # these samples are sharp
    assert right["assigned_to_requested_class"] > 0.5 and right["classifier_test_accuracy"] > 0.5
    assert "protocol" in capsys.readouterr().out
    np.savez(tmp_path / "s.npz", images, (labels + 1) % 10)
    before = [p.stat().st_mtime_ns for p in cache.iterdir()]
    wrong = classify(tmp_path, cache)
    assert wrong["assigned_to_requested_class"] < 0.2
    assert wrong["classifier_test_accuracy"] == right["classifier_test_accuracy"]
    assert before == [p.stat().st_mtime_ns for p in cache.iterdir()]                         # trained once
    np.savez(tmp_path / "s.npz", 255 - images // 4)                          # no labels, unlike the real ones
    distance = "frechet_in_classifier_features_not_fid"
    far = classify(tmp_path, cache)
    assert "assigned_to_requested_class" not in far and far[distance] > 2 * right[distance]


def test_fid_of_files_by_numpy_and_scipy(tmp_path, monkeypatch):
    """Samples as .npz and as a folder, a reference as images, as saved, as ADM's statistics: one number."""
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    samples, real = shapes(40)[0], shapes(90, start=200)[0]
    np.savez(tmp_path / "s.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    (tmp_path / "s").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "s" / f"{i:06d}.png")
    a, b = (tiny_inception()(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (samples, real))
    distance = lambda x, y: ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        np.cov(x.T) + np.cov(y.T) - 2 * scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real)
    fid, sfid = distance(a.pool.numpy(), b.pool.numpy()), distance(a.spatial.numpy(), b.spatial.numpy())
    measure("generation", tmp_path / "s.npz", "--reference", tmp_path / "real.npz",
            "--save-statistics", tmp_path / "saved.npz")
    first = json.loads((tmp_path / "s.npz.json").read_text())
    assert first["gfid"] == pytest.approx(fid) and first["sfid"] == pytest.approx(sfid)
    assert "tf1" in first["protocol"] and "40 samples" in first["protocol"]
    saved = np.load(tmp_path / "saved.npz")
    np.savez(tmp_path / "adm.npz", arr_0=real, **{k: saved[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    for reference in ("saved.npz", "adm.npz"):
        measure("generation", tmp_path / "s", "--reference", tmp_path / reference, "--batch-size", 7)
        again = json.loads((tmp_path / "s.json").read_text())
        for key in ("gfid", "sfid", "inception_score", "precision", "recall"):
            assert again[key] == pytest.approx(first[key], rel=1e-6), (reference, key)
    with pytest.raises(UserError, match="other features"):
        measure("generation", tmp_path / "s", "--reference", tmp_path / "saved.npz", "--data", "shapes",
                "--features", "classifier", "--classifier-steps", 1, "--cache", tmp_path)


def test_two_processes_give_the_same_distance(tmp_path, cache):
    """Statistics merged, features gathered in order: as one process, and of files alone."""
    np.savez(tmp_path / "s.npz", *shapes(41))
    one = classify(tmp_path, cache)
    argv = ["generation", tmp_path / "s.npz", "--data", "shapes", "--features", "classifier",
            "--classifier-steps", "150", "--test-images", "200", "--reference-images", "200",
            "--cache", cache, "--device", "cpu", "--out", tmp_path / "two"]
    in_two_processes("evaluate", argv, tmp_path / "log")
    two = json.loads((tmp_path / "two.json").read_text())
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-4) if isinstance(value, float) else two[key] == value


# -------------------------------------------------- recon --------------------------------------------------

def test_recon_measures_the_reconstructions(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    monkeypatch.setattr(evaluate, "build_lpips", lambda *a: lambda x, y: (x - y).abs().amax((1, 2, 3)))
    measure("recon", tokenizer, "--num-images", 30, "--batch-size", 8, "--out", tmp_path / "r",
            "--data", "shapes")
    found = json.loads((tmp_path / "r.json").read_text())
    model = maetok.load_tokenizer(tokenizer)
    images = next(some_images(build_dataset("shapes", "test", 16), 30))[0]
    redrawn = to_uint8(model.decode(model.encode(to_float(images))))
    psnr = np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255)
                    for a, b in zip(images, redrawn)])
    assert found["psnr"] == pytest.approx(psnr) and found["images"] == 30
    assert found["ssim"] < found["ssim_data_range_2_as_released_code"] and found["rfid"] > 0
    spread = [tiny_inception()(x).pool.numpy().var(0).sum() for x in (redrawn, images)]
    assert found["share_of_feature_variance_kept"] == pytest.approx(spread[0] / spread[1])
    largest = (to_float(images) - to_float(redrawn)).abs().amax((1, 2, 3))                   # LPIPS' stand-in
    assert found["lpips"] == pytest.approx(largest.mean().item())
    assert Image.open(tmp_path / "r.png").width > 8 * 128
    measure("recon", tokenizer, "--num-images", 4, "--size", 32, "--features", "none",
            "--out", tmp_path / "r")
    assert not {"rfid", "lpips"} & set(json.loads((tmp_path / "r.json").read_text()))
    with pytest.raises(UserError, match="--size 30"):
        measure("recon", tokenizer, "--size", 30)


def test_recon_of_a_kl_vae_decodes_samples_of_its_posterior(tmp_path):
    train_tokenizer.main([*TINY, "--stage", "1", "--variational", "--out", str(tmp_path)])
    measure("recon", tmp_path, "--num-images", 5, "--features", "none", "--data", "shapes",
            "--out", tmp_path / "r")
    found, model = json.loads((tmp_path / "r.json").read_text()), maetok.load_tokenizer(tmp_path)
    images = next(some_images(build_dataset("shapes", "test", 16), 5))[0]
    means = model.encode(to_float(images))
    samples = model.encode(to_float(images), rngs=[sample_rng(0, "posterior", 0, i) for i in range(5)])
    psnr = [np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255)
                     for a, b in zip(images, to_uint8(model.decode(h)))]) for h in (means, samples)]
    assert found["psnr"] == pytest.approx(psnr[1]) and found["psnr"] != pytest.approx(psnr[0])
    assert "samples of the posterior" in found["protocol"]


# ------------------------------------------ latents, curve, cfg ------------------------------------------

@pytest.mark.slow
def test_latents_of_several_tokenizers(tmp_path, tokenizer, capsys):
    measure("latents", tokenizer, tokenizer, "--names", "one", "two", "--components", 1, 3,
            "--train-images", 300, "--test-images", 100, "--starts", 1, "--dims", 4, "--pixels",
            "--out", tmp_path / "l")
    found = json.loads((tmp_path / "l.json").read_text())
    assert found["one"]["dims"] == 4 and found["one"]["mixtures"] == found["two"]["mixtures"]
    model, sets, pixels = maetok.load_tokenizer(tokenizer), {}, {}
    for split, count in (("train", 300), ("test", 100)):
        x, y = zip(*some_images(build_dataset("shapes", split, 16), count))
        sets[split] = model.encode(to_float(torch.cat(x))).flatten(1).double(), torch.cat(y)
        pixels[split] = to_float(torch.cat(x)).flatten(1).double(), torch.cat(y)
    for what, vectors in (("linear", sets), ("pixel", pixels)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000))
        score = probe.fit(*vectors["train"]).score(*vectors["test"])
        assert found["one"][f"{what}_probe_accuracy"] == pytest.approx(score, abs=0.011)
    single, three = found["one"]["mixtures"]
    # At K = 1 standardised latents have this likelihood for any latents; more components fit better.
    assert single["nll_full_train"] == pytest.approx(2 * (1 + np.log(2 * np.pi)), abs=1e-3)
    assert three["nll_full_train"] < single["nll_full_train"] and single["largest_mean_norm_full"] < 1e-6
    assert "equal d" in capsys.readouterr().out
    for name in ("l_mixtures.png", "l_classes.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)).reshape(-1, 3), axis=0)) > 5


def test_latents_of_a_tokenizer_that_reads_them_from_its_image_tokens(tmp_path):
    """L = N = 16 there; the option num_latents has no part in it."""
    train_tokenizer.main([*TINY, "--no-learnable-latents", "--stage", "1", "--out", str(tmp_path / "image")])
    measure("latents", tmp_path / "image", "--train-images", 60, "--test-images", 30, "--components", 1,
            "--dims", 3, "--no-full", "--out", tmp_path / "l")
    found = json.loads((tmp_path / "l.json").read_text())[str(tmp_path / "image")]
    assert found["dims"] == 3 and 0 <= found["linear_probe_accuracy"] <= 1


def test_latents_of_images_of_high_classes_of_which_each_has_one(tmp_path, tokenizer):
    """sample.py --classes 207 360 writes such files; the picture has the classes that occur."""
    images = next(some_images(build_dataset("shapes", "train", 16), 60))[0].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "high.npz", arr_0=images, arr_1=200 + 3 * np.arange(60))
    measure("latents", tokenizer, "--data", tmp_path / "high.npz", "--train-images", 60, "--test-images", 30,
            "--components", 1, "--dims", 3, "--no-full", "--out", tmp_path / "l")
    assert Image.open(tmp_path / "l_classes.png").width > 100


def test_the_picture_has_whole_classes_however_many_there_are():
    images = image_sets.Images("many", 8, np.random.default_rng(0).integers(-1, 1000, 60_000),
                             lambda index: index)
    chosen = latent_space.first_classes(images)
    assert 500 < len(chosen.labels) <= 1000 and chosen.labels.max() == 8           # -1 is a class here, too
    assert all(images.labels[chosen.read(i)] == label for i, label in enumerate(chosen.labels))


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap-learn is installed")
def test_optional_packages_are_looked_for_before_the_run_is(tmp_path):
    with pytest.raises(UserError, match="pip install umap-learn"):
        measure("latents", tmp_path / "no-such-run", "--umap")


def test_mixtures_without_full_covariances_and_curves_in_bfloat16(tmp_path, tokenizer, diffusion,
                                                                  monkeypatch):
    measure("latents", tokenizer, "--train-images", 60, "--test-images", 30, "--components", 2, "--dims", 3,
            "--no-full", "--out", tmp_path / "l")
    rows = json.loads((tmp_path / "l.json").read_text())[str(tokenizer)]["mixtures"]
    assert "nll_diagonal" in rows[0] and "nll_full" not in rows[0]
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    seen, draw = [], image_sets.sample_latents
    monkeypatch.setattr(image_sets, "sample_latents", lambda *args, **options: (
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        or draw(*args, **options)))
    measure("curve", diffusion, "--num-images", 8, "--steps", 2, "--reference-images", 30,
            "--dtype", "bfloat16", "--out", tmp_path / "curve")
    assert set(seen) == {torch.bfloat16}
    assert "drawn in bfloat16" in json.loads((tmp_path / "curve.json").read_text())["protocol"]


def with_classes_that_matter(run, folder):
    """A copy of a run whose newest weights listen to the class: ten steps of training leave the layers of
    adaLN-zero so near 0 that guidance would move no pixel on one processor and a few on another."""
    shutil.copytree(run, folder)
    newest = max(folder.glob("step_*.pt"))
    state = torch.load(newest, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for name in ("y_embedder.embedding_table", "final_layer.adaLN_modulation.1", "final_layer.linear"):
        weight = state["ema"][name + ".weight"]
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    for path in (newest, folder / "last.pt"):
        path.unlink()
        torch.save(state, path)
    return folder


def test_curve_and_cfg_measure_what_sample_py_draws(tmp_path, diffusion, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    diffusion = with_classes_that_matter(diffusion, tmp_path / "run")
    options = ("--num-images", 30, "--steps", 3, "--reference-images", 60, "--batch-size", 16)
    measure("curve", diffusion, *options, "--out", tmp_path / "curve")
    rows = json.loads((tmp_path / "curve.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [5, 10]
    measure("cfg", diffusion, *options, "--scales", 1, 50, "--intervals", "0:1", "0:0",
            "--out", tmp_path / "cfg")
    table = {(tuple(row["interval"]), row["scale"]): row["gfid"]
             for row in json.loads((tmp_path / "cfg.json").read_text())["rows"]}
    # Without guidance the samples are the same in both intervals, and those of the last checkpoint.
    assert table[(0, 1), 1] == pytest.approx(rows[1]["gfid"], rel=1e-6)
    assert table[(0, 0), 1] == pytest.approx(rows[1]["gfid"], rel=1e-6)
    assert abs(table[(0, 1), 50] / table[(0, 1), 1] - 1) > 0.005                  # rounding moves it by 1e-6
    sample.main(["--ckpt", str(diffusion), "--num", "30", "--steps", "3", "--out", str(tmp_path / "s.npz"),
                 "--device", "cpu"])
    measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 60)
    drawn = json.loads((tmp_path / "s.npz.json").read_text())
    assert drawn["gfid"] == pytest.approx(rows[1]["gfid"], rel=1e-6)


def test_samples_without_a_class_are_the_null_class_of_the_model(tmp_path, diffusion, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    diffusion = with_classes_that_matter(diffusion, tmp_path / "run")
    options = ("--num-images", 12, "--steps", 3, "--reference-images", 60, "--out", tmp_path / "curve")
    rows = []
    for more in ((), ("--null-class",)):
        measure("curve", diffusion, *options, *more)
        rows.append(json.loads((tmp_path / "curve.json").read_text())["rows"][-1])
    assert "null class" in json.loads((tmp_path / "curve.json").read_text())["protocol"]
    assert abs(rows[1]["gfid"] / rows[0]["gfid"] - 1) > 0.001                # the class matters to this model
    draw = ["--ckpt", str(diffusion), "--classes", "null", "--steps", "3", "--device", "cpu"]
    sample.main([*draw, "--num", "12", "--out", str(tmp_path / "s.npz")])
    assert set(np.load(tmp_path / "s.npz")["arr_1"]) == {-1}
    measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 60)
    assert (json.loads((tmp_path / "s.npz.json").read_text())["gfid"]
            == pytest.approx(rows[1]["gfid"], rel=1e-6))
    for message, wrong in (("cannot be joined", ["--classes", "null", "3"]), ("leads away", ["--cfg", "2"])):
        with pytest.raises(UserError, match=message):
            sample.main([*draw, *wrong, "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="leads away"):
        measure("curve", diffusion, *options, "--null-class", "--cfg", 2)


def test_the_gap_is_the_distance_to_reconstructions_and_another_decoder_may_draw(
        tmp_path, diffusion, tokenizer, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    options = ("--num-images", 30, "--steps", 3, "--reference-images", 60, "--gap")
    measure("curve", diffusion, *options, "--out", tmp_path / "curve")
    found = json.loads((tmp_path / "curve.json").read_text())["rows"][-1]["diffusion_gap"]
    images = image_sets.open_data(Namespace(data_root="data"), "shapes", "train", 16, 60)
    model = maetok.load_tokenizer(tokenizer)
    x = to_float(torch.stack([images.read(i) for i in range(60)]))
    np.savez(tmp_path / "redrawn.npz",
             arr_0=to_uint8(model.decode(model.encode(x))).permute(0, 2, 3, 1).numpy())
    sample.main(["--ckpt", str(diffusion), "--num", "30", "--steps", "3", "--out", str(tmp_path / "s.npz"),
                 "--device", "cpu"])
    measure("generation", tmp_path / "s.npz", "--reference", tmp_path / "redrawn.npz")
    assert found == pytest.approx(json.loads((tmp_path / "s.npz.json").read_text())["gfid"], rel=1e-6)

    train_tokenizer.main([*TINY, "--stage", "2", "--init", str(tokenizer),
                          "--out", str(tmp_path / "other")])
    for name in (tokenizer, tmp_path / "other"):
        measure("cfg", diffusion, *options, "--tokenizer", name, "--scales", 1, "--intervals", "0:1",
                "--out", tmp_path / "cfg")
        gap = json.loads((tmp_path / "cfg.json").read_text())["rows"][0]["diffusion_gap"]
        assert (gap == pytest.approx(found, rel=1e-6)) == (name == tokenizer)
        sample.main(["--ckpt", str(diffusion), "--tokenizer", str(name), "--num", "4", "--steps", "2",
                     "--out", str(tmp_path / f"{name.name}.npz"), "--device", "cpu"])
    own, other = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in (tokenizer.name, "other"))
    sample.main(["--ckpt", str(diffusion), "--num", "4", "--steps", "2", "--device", "cpu",
                 "--out", str(tmp_path / "plain.npz")])
    assert np.array_equal(np.load(tmp_path / "plain.npz")["arr_0"], own) and not np.array_equal(own, other)
    train_tokenizer.main([*TINY, "--stage", "1", "--out", str(tmp_path / "third"), "--seed", "5"])
    with pytest.raises(UserError, match="another encoder"):
        measure("cfg", diffusion, *options, "--tokenizer", tmp_path / "third")


@pytest.mark.parametrize("variational", (False, True))
def test_the_gap_of_a_kl_vae_is_to_decoded_samples_of_its_posterior(monkeypatch, variational):
    """Its diffusion model learns samples: drawn without error, they decode to these and not to the means'."""
    torch.manual_seed(0)
    tokenizer = maetok.MAETok(maetok.MAETokConfig(
        image_size=16, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1, num_latents=4,
        latent_dim=4, variational=variational)).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)                          # a fresh decoder draws grey
    x = torch.from_numpy(shapes(3)[0]).permute(0, 3, 1, 2)
    monkeypatch.setattr(image_sets, "batches", lambda *_: [([5, 6, 7], x)])
    with torch.no_grad():
        (_, found), = image_sets.reconstructions(Namespace(device="cpu"), tokenizer, None)
        means = to_uint8(tokenizer.reconstruct(to_float(x)))
        rngs = [sample_rng(0, "posterior", 0, i) for i in (5, 6, 7)]
        samples = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x), rngs=rngs)))
    assert torch.equal(found, samples if variational else means)
    assert torch.equal(samples, means) != variational


def test_distance_in_efficientnet_features(tmp_path):
    """Against numpy and scipy on the teacher's own features; nothing of a classifier is in the result."""
    images = [np.random.default_rng(seed).integers(0, 256, (130, 16, 16, 3), np.uint8) for seed in (0, 1)]
    images[1] //= 2
    for name, array in zip(("s.npz", "r.npz"), images):
        np.savez(tmp_path / name, arr_0=array)
    measure("generation", tmp_path / "s.npz", "--reference", tmp_path / "r.npz", "--features", "efficientnet")
    found = json.loads((tmp_path / "s.npz.json").read_text())
    teacher = features.load_teacher("efficientnet-lite0", 2)
    x, y = (teacher(to_float(torch.from_numpy(a).permute(0, 3, 1, 2))).mean(1).double().numpy()
            for a in images)
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert found["frechet_in_efficientnet_features_not_fid"] == pytest.approx(expected, rel=1e-3)
    assert not any("assigned" in key for key in found)


# ------------------------------------------------ commands ------------------------------------------------

def test_a_module_with_measure_is_a_command(tmp_path, monkeypatch, capsys):
    """As those of study/: its options, those of its groups, its result, its pictures."""
    seen = []

    def measure_toy(args):
        """A toy. [nowhere]"""
        seen.append(args)
        return features.Report({"length": args.length, "protocol": "by hand"}, [("a", "b"), (1, 0.25)],
                               {"_x.png": Image.new("RGB", (8, 8))})

    toy = SimpleNamespace(measure=measure_toy, USES=("data",), add_arguments=lambda add: add(
        "--length", type=float, default=1.0, help="m"))
    monkeypatch.setattr(evaluate, "find_extras", lambda: {"toy": "A toy. [nowhere]"})
    monkeypatch.setattr(evaluate.common, "find_extra", {"toy": toy}.__getitem__)
    measure("toy", "--length", 2.5, "--data-root", "here", "--seed", 3, "--out", tmp_path / "t")
    assert (seen[0].length, seen[0].data_root, seen[0].seed, seen[0].rank) == (2.5, "here", 3, 0)
    assert json.loads((tmp_path / "t.json").read_text()) == {"command": "toy", "length": 2.5,
                                                             "protocol": "by hand"}
    assert "1  0.2500" in capsys.readouterr().out and Image.open(tmp_path / "t_x.png").size == (8, 8)
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "toy" in capsys.readouterr().out


def test_an_unknown_command_is_named_with_those_that_exist(monkeypatch):
    monkeypatch.setattr(evaluate, "find_extras", dict)
    with pytest.raises(UserError, match="'speed'") as error:
        evaluate.main(["speed"])
    assert all(name in str(error.value) for name in evaluate.COMMANDS) and "\n" not in str(error.value)


# ------------------------------------------------ bad input ------------------------------------------------

def test_bad_input_is_named(tmp_path, cache):
    images, labels = shapes(4)
    for message, arrays, options in [("has class 11", (images, labels + 8), []),
                                     ("should be square", (images[:, :8], labels), []),
                                     ("no such folder", (images, labels), ["--data", tmp_path / "nowhere"]),
                                     ("too few images", (images[:1], labels[:1]), [])]:
        np.savez(tmp_path / "s.npz", *arrays)
        with pytest.raises(UserError, match=message):
            classify(tmp_path, cache, *options)


def test_bad_samples_and_references_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    images, _ = shapes(20)
    np.savez(tmp_path / "s.npz", images)
    np.savez(tmp_path / "keys.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(12), sigma=np.zeros((12, 3)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "size.npz", images[:, :8, :8])
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    for message, name in [("neither images", "keys.npz"), ("should be finite", "shape.npz"),
                          ("cannot read", "broken.npz"), ("cannot be compared", "other.npz"),
                          ("of 16 px cannot be compared", "size.npz"), ("cannot read", "missing.npz")]:
        with pytest.raises(UserError, match=message):
            measure("generation", tmp_path / "s.npz", "--reference", tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no images"):
        measure("generation", tmp_path / "folder", "--data", "shapes")
    for i, image in enumerate((images[0], images[1][:8, :8])):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    with pytest.raises(UserError, match="all must have one size"):
        measure("generation", tmp_path / "folder", "--data", "shapes", "--reference-images", 20)
    monkeypatch.setattr(features, "load_inception",
                        lambda *a: lambda x: Output(*[torch.full((len(x), 12), float("nan"))] * 3))
    with pytest.raises(UserError, match="NaN"):
        measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 20)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    argv = [sys.executable, str(ROOT / "evaluate.py"), "curve", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert checkpoints.numbered_checkpoints(tmp_path) == []


def test_no_option_is_shortened_and_tokenizers_have_one_use(tmp_path, diffusion, colours_network):
    with pytest.raises(UserError, match="--ad"):
        evaluate.parse(["curve", "RUN", "--ad", "time_shift"])
    sample.main(["--ckpt", str(diffusion), "--classes", "3", "5", "--num", "10", "--steps", "2", "--cfg", "0",
                 "--device", "cpu", "--out", str(tmp_path / "s.npz")])
    options = ("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 40)
    with pytest.raises(UserError, match="--features classifier alone"):
        measure(*options, "--tokenizer", diffusion)
    measure(*options)
    protocol = json.loads((tmp_path / "s.npz.json").read_text())["protocol"]
    assert "labels balanced" in protocol and "cfg 0" in protocol                  # of the classes that occur


def test_a_null_class_that_learned_nothing_guides_nowhere(tmp_path, diffusion):
    state = torch.load(diffusion / "last.pt", weights_only=True)
    state["config"]["label_dropout"] = 0.0
    torch.save(state, tmp_path / "x.pt")
    for scale in (1, 2):
        draw = ["--ckpt", str(tmp_path / "x.pt"), "--cfg", str(scale), "--num", "2", "--steps", "2",
                "--device", "cpu", "--out", str(tmp_path / "s.png")]
        if scale == 1:
            sample.main(draw)
            continue
        with pytest.raises(UserError, match="--label-dropout 0"):
            sample.main(draw)
        with pytest.raises(UserError, match="--label-dropout 0"):
            measure("cfg", tmp_path / "x.pt", "--num-images", 2, "--scales", 1, 2)


def test_a_reference_file_is_enough_without_the_images(tmp_path, diffusion, colours_network):
    state = torch.load(diffusion / "last.pt", weights_only=True)
    state["config"]["data"] = "/nowhere/imagenet"
    torch.save(state, tmp_path / "moved.pt")
    real = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=real)
    options = ("cfg", tmp_path / "moved.pt", "--num-images", 8, "--steps", 2, "--scales", 1, "--intervals",
               "0:1", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "c")
    with pytest.raises(UserError, match="/nowhere/imagenet, are not here"):
        measure(*options, "--gap")
    measure(*options)
    assert json.loads((tmp_path / "c.json").read_text())["protocol"]


def test_protocols_name_how_samples_were_drawn(tmp_path, diffusion, monkeypatch):
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    sample.main(["--ckpt", str(diffusion), "--num", "20", "--steps", "3", "--cfg", "2.5", "--seed", "7",
                 "--device", "cpu", "--out", str(tmp_path / "s.npz")])
    measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 40)
    protocol = json.loads((tmp_path / "s.npz.json").read_text())["protocol"]
    assert "cfg 2.5" in protocol and "seed 7" in protocol and "steps 3" in protocol
    (tmp_path / "s.npz.settings.json").unlink()
    measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 40)
    assert "steps and seed unknown" in json.loads((tmp_path / "s.npz.json").read_text())["protocol"]
    measure("curve", diffusion, "--num-images", 8, "--steps", 3, "--reference-images", 30, "--cfg", 2.5,
            "--seed", 7, "--out", tmp_path / "curve")
    protocol = json.loads((tmp_path / "curve.json").read_text())["protocol"]
    assert "guidance 2.5 in (0.0, 1.0)" in protocol and "seed 7" in protocol and "3 steps" in protocol
