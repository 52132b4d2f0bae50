"""The four commands: names of files, numbers that cannot be had, odd checkpoints; one clear line for each."""
import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cache
import checkpoints
import common
import evaluate
import metrics
import sample
import train_diffusion
from common import UserError
from data import build_dataset
from maetok import MAETok, MAETokConfig, load_tokenizer
from measures import features
from pictures import outputs
from runtime import files
from runtime.processes import printable
from sit import SiT, SiTConfig, load_diffusion

SIZES = dict(image_size=16, patch_size=8, width=16, heads=2, encoder_depth=1, decoder_depth=1, num_latents=2,
             latent_dim=3)


def tokenizer_content(**changes):
    """What a finished run of train_tokenizer.py saves, with random weights."""
    config = MAETokConfig(**(SIZES | changes))
    return {"kind": "tokenizer", "add": [], "stage": 2, "step": 1, "measured": True,
            "config": dataclasses.asdict(config) | {"data": "shapes", "data_root": "data", "seed": 0},
            "ema": MAETok(config).state_dict()}


def diffusion_content(classes=("a", "b", "c"), **changes):
    """The same of train_diffusion.py. changes: of the tokenizer's config."""
    tokenizer = tokenizer_content(**changes)
    latents = (tokenizer["config"][name] for name in ("num_latents", "latent_dim"))
    config = SiTConfig(*latents, width=16, heads=2, depth=1, num_classes=len(classes))
    return {"kind": "diffusion", "add": [], "step": 1, "classes": list(classes), "tokenizer": tokenizer,
            "config": dataclasses.asdict(config) | {"data": "shapes", "data_root": "data", "seed": 0,
                                                    "path": "linear"},
            "ema": SiT(config).state_dict()}


def saved(path, content):
    torch.save(content, path)
    return str(path)


def draw(ckpt, *options):
    sample.main(["--ckpt", str(ckpt), "--steps", "2", "--num", "4", "--device", "cpu", *map(str, options)])


def measure(*options):
    evaluate.main([*map(str, options), "--device", "cpu"])


# ------------------------------------------------- classes -------------------------------------------------

def test_classes_of_a_model_without_classes_are_refused(tmp_path):
    ckpt = saved(tmp_path / "x.pt", diffusion_content(classes=()))
    with pytest.raises(UserError, match="--classes: this model was trained without classes"):
        draw(ckpt, "--classes", 3, 7, "--out", tmp_path / "s.npz")
    draw(ckpt, "--classes", "null", "--out", tmp_path / "s.npz")
    assert (np.load(tmp_path / "s.npz")["arr_1"] == -1).all()


def test_training_on_images_without_classes_says_what_it_means(tmp_path, monkeypatch, capsys):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat/a.png")
    ckpt = saved(tmp_path / "t.pt", tokenizer_content())
    argv = ["--tokenizer", ckpt, "--out", str(tmp_path / "d"), "--device", "cpu", "--data"]
    monkeypatch.setattr(train_diffusion, "start", lambda *args: 1 / 0)
    for data, said in ((str(tmp_path / "flat"), True), ("shapes", False)):
        with pytest.raises(ZeroDivisionError):
            train_diffusion.main([*argv, data])
        assert ("the model is unconditional" in capsys.readouterr().out) == said


# ---------------------------------------------- names of files ----------------------------------------------

def test_the_ending_of_out_counts_in_any_case(tmp_path):
    ckpt = saved(tmp_path / "x.pt", diffusion_content())
    names = ("GRID.PNG", "X.NPZ", "folder.v2")
    draw(ckpt, "--out", *(tmp_path / name for name in names))
    assert Image.open(tmp_path / "GRID.PNG").format == "PNG"
    assert np.load(tmp_path / "X.NPZ")["arr_0"].shape == (4, 16, 16, 3)
    assert len(list((tmp_path / "folder.v2").glob("*.png"))) == 4
    assert build_dataset(str(tmp_path / "X.NPZ"), "train", 16).length == 4


@pytest.mark.parametrize("options", [
    ["--out", "grid.jpg"], ["--out", "a.png", "b.JPEG"], ["--out", "x.webp"], ["--out", "x.npy"],
    ["--out", "x.tiff"], ["--out", "x.zip"], ["--report", "sheet.jpg"]])
def test_files_that_are_not_written_are_refused_before_the_work(options):
    with pytest.raises(UserError, match="PNG"):
        sample.main([*options, "--ckpt", "nowhere"])


def test_a_tilde_is_the_home_folder_in_every_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    saved(tmp_path / "home/x.pt", diffusion_content())
    sample.main(["--ckpt=~/x.pt", "--out=~/s.npz", "--steps", "1", "--num", "2", "--device", "cpu"])
    assert (tmp_path / "home/s.npz").exists() and not (tmp_path / "~").exists()
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args",
                        lambda self, args=None, namespace=None: (parsers.append(list(args)), 1 / 0))
    for main in (evaluate.main, train_diffusion.main):
        with pytest.raises(ZeroDivisionError):
            main(["--out", "~/run", "--data=~", "--names", "a~b"])
        home = tmp_path / "home"
        assert parsers.pop() == ["--out", f"{home}/run", f"--data={home}", "--names", "a~b"]


def test_without_a_home_folder_a_tilde_is_refused(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)          # no HOME, and a uid without a name
    with pytest.raises(UserError, match="no home folder"):
        files.expand_home("--out=~/x")
    assert files.expand_home("--out=x~/") == "--out=x~/"


def test_out_may_have_the_ending_that_the_result_gets(tmp_path):
    ckpt = saved(tmp_path / "t.pt", tokenizer_content())
    for out in ("r.json", "r2.PNG", "r3/"):
        measure("recon", ckpt, "--features", "none", "--num-images", 2, "--out", f"{tmp_path}/{out}")
    assert {"r.json", "r2.json", "r3.json"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "r.json.json").exists()


def test_names_with_control_characters_are_escaped():
    name = "a\nerror: forged\x1b[2J\u202eb\udcff.png"
    assert str(UserError(f"cannot read {name}")) == printable(f"cannot read {name}") == (
        "cannot read a\\nerror: forged\\x1b[2J\\u202eb\\udcff.png")
    assert printable("Größe 像 a b.png") == "Größe 像 a b.png"


def test_an_image_named_to_forge_a_line_makes_one_line(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = "--image-size 16 --patch-size 8 --width 16 --heads 2 --steps 1 --batch-size 1 --device cpu"
    (folder / "a\nerror: forged\x1b[31m.png").write_bytes(b"no image")
    argv = [sys.executable, ROOT / "train_tokenizer.py", "--data", folder, "--out", tmp_path / "t",
            *sizes.split()]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=200)
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: cannot read image"), done.stderr
    assert "\x1b[31m" not in done.stderr
    assert not any(line.startswith("error: forged") for line in done.stderr.splitlines())


# ------------------------------------------------- evaluate -------------------------------------------------

class Colours(torch.nn.Module):
    """In place of the FID network: colour means."""

    def forward(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1) / 255
        return SimpleNamespace(pool=x, logits=x[:, :5], spatial=x[:, 5:])


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr(features, "load_inception", lambda *args: Colours())


def noise(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_a_picture_in_place_of_samples_is_named(tmp_path, inception):
    Image.new("RGB", (16, 16)).save(tmp_path / "samples.png")
    np.save(tmp_path / "x.npy", noise(4))
    np.savez(tmp_path / "objects.npz", np.array([None, {}]))
    np.savez(tmp_path / "s.npz", noise(4))
    for name in ("samples.png", "x.npy", "objects.npz"):
        for argv in (["generation", tmp_path / name, "--data", "shapes"],
                     ["generation", tmp_path / "s.npz", "--reference", tmp_path / name]):
            with pytest.raises(UserError, match="not an .npz file of numbers") as error:
                measure(*argv)
            assert "pickle" not in str(error.value)


def test_latents_in_one_dimension(tmp_path):
    ckpt = saved(tmp_path / "t.pt", tokenizer_content(num_latents=1, latent_dim=1))
    two = saved(tmp_path / "two.pt", tokenizer_content())
    options = ["--train-images", 40, "--test-images", 10, "--components", 1, 2, "--starts", 1]
    for run, more in ((ckpt, []), (two, ["--dims", 1])):
        measure("latents", run, *options, *more, "--no-umap", "--out", tmp_path / "l")
        assert json.loads((tmp_path / "l.json").read_text())[str(run)]["dims"] == 1


def test_equal_pictures_have_no_share_of_variance(tmp_path, inception):
    (tmp_path / "same").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"same/{i}.png")
    ckpt = saved(tmp_path / "t.pt", tokenizer_content())
    measure("recon", ckpt, "--data", tmp_path / "same", "--features", "inception", "--no-lpips", "--out",
            tmp_path / "r")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rfid"] > 0 and "share_of_feature_variance_kept" not in found


def test_inception_score_of_samples_sorted_by_class_says_so(tmp_path, inception, monkeypatch):
    monkeypatch.setattr(metrics.few_classes_at_once, "__defaults__", (20,))              # in place of 5000
    for labels, said in ((np.arange(40) // 4, True), (np.arange(40) % 10, False), (np.full(40, -1), False)):
        np.savez(tmp_path / "s.npz", noise(40), labels)
        np.savez(tmp_path / "real.npz", noise(40))
        measure("generation", tmp_path / "s.npz", "--reference", tmp_path / "real.npz")
        protocol = json.loads((tmp_path / "s.npz.json").read_text())["protocol"]
        assert ("sorted by class" in protocol) == said
    labels = torch.arange(10_000) // 1000
    sure = torch.eye(10)[labels] * 100
    assert metrics.few_classes_at_once(labels, 5000)
    assert metrics.inception_score(sure)[0] == pytest.approx(5)                          # of ten classes
    assert metrics.inception_score(sure[torch.randperm(10_000)])[0] == pytest.approx(10, rel=1e-3)


def test_a_result_is_on_disk_before_it_is_printed(tmp_path, monkeypatch):
    """`evaluate.py ... | head` ends the process at its first line."""
    ckpt = saved(tmp_path / "t.pt", tokenizer_content())

    def closed(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(evaluate, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        measure("recon", ckpt, "--features", "none", "--num-images", 2, "--out", tmp_path / "r")
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 2
    assert (tmp_path / "r.png").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("option", ["--out", "--save-statistics"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(option, tmp_path, monkeypatch):
    np.savez(tmp_path / "s.npz", noise(4))
    monkeypatch.setattr(evaluate, "open_samples", lambda *args: 1 / 0)
    (tmp_path / "file").write_text("")
    argv = ["generation", tmp_path / "s.npz", "--data", "shapes", "--out", tmp_path / "x", option]
    with pytest.raises(UserError, match="cannot write to the folder.*choose another"):
        measure(*argv, tmp_path / "file/x")

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Permission denied\); choose"):
        patch.setattr(files.tempfile, "TemporaryFile", refuse)                       # root may write anywhere
        measure(*argv, tmp_path / "other/x")
    with pytest.raises(ZeroDivisionError):
        measure(*argv, tmp_path / "new/folder/x")
    assert not (tmp_path / "new").exists()                                            # nothing is made yet


def test_the_protocol_has_the_dtype_that_was_used(tmp_path, inception):
    ckpt = saved(tmp_path / "x.pt", diffusion_content())
    draw(ckpt, "--out", tmp_path / "s.npz")
    assert files.read_json(tmp_path / "s.npz.settings.json")["dtype"] == "float32"
    measure("generation", tmp_path / "s.npz", "--data", "shapes", "--reference-images", 20)
    protocol = json.loads((tmp_path / "s.npz.json").read_text())["protocol"]
    assert "dtype float32" in protocol and "auto" not in protocol


def test_a_runs_relative_data_is_found_from_other_folders(tmp_path, monkeypatch):
    (tmp_path / "here/photos").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    method = train_diffusion.Method
    parse = lambda *argv: common.parse_config(method.Config, method.PRESETS, list(method.PRESETS), "", argv)
    assert parse("--data", "photos").data == str(tmp_path / "here/photos")
    assert parse("--data", "shapes").data == "shapes"
    # A run from before, with a relative path: the message names the run's data and the way out.
    content = tokenizer_content()
    content["config"]["data"] = "photos"
    ckpt = saved(tmp_path / "t.pt", content)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserError, match="the run's images, --data photos, are not here"):
        measure("recon", ckpt, "--features", "none")
    measure("recon", ckpt, "--features", "none", "--data", "shapes", "--num-images", 2)


# ------------------------------------------- docstrings left out -------------------------------------------

def test_help_without_docstrings():
    """python -OO leaves them out."""
    code = ("import sys, evaluate, sample, train_diffusion, train_tokenizer\n"
            "for argv in ([sample], [train_diffusion], [train_tokenizer], [evaluate], [evaluate, 'recon'],\n"
            "             [evaluate, 'latents']):\n"
            "    try:\n"
            "        argv[0].main([*argv[1:], '--help'])\n"
            "    except SystemExit:\n"
            "        print('helped')")
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("helped") == 6, done.stderr


# ----------------------------------------------- checkpoints -----------------------------------------------

@pytest.mark.parametrize("change", [
    lambda c: c["config"].update(path="spiral"), lambda c: c["config"].update(data=["a"]),
    lambda c: c["config"].update(seed="one"), lambda c: c.update(add=[3]), lambda c: c.update(add="muon"),
    lambda c: c.update(classes=3), lambda c: c.update(ema=[1]), lambda c: c.update(tokenizer=[]),
    lambda c: c["config"].pop("path"), lambda c: c["tokenizer"].pop("config"),
    lambda c: c["tokenizer"].pop("ema"), lambda c: c["tokenizer"].update(config=3),
    lambda c: c["ema"].update({"x_embedder.weight": c["ema"]["x_embedder.weight"].to_sparse()}),
    lambda c: c["ema"].update({"x_embedder.weight": c["ema"]["x_embedder.weight"].to("meta")}),
    lambda c: c["ema"].update({"x_embedder.weight": 3}), lambda c: c["ema"].update({"more": torch.ones(1)}),
    lambda c: c["tokenizer"]["ema"].update({"latent_mean": c["tokenizer"]["ema"]["latent_mean"].to_sparse()}),
    lambda c: c["ema"].pop("x_embedder.bias")])
def test_an_odd_checkpoint_is_one_line(change, tmp_path):
    content = diffusion_content()
    change(content)
    with pytest.raises(UserError) as error:
        load_diffusion(saved(tmp_path / "x.pt", content))
    line = str(error.value).replace(str(tmp_path), "")
    assert "x.pt" in line and len(line) < 200


@pytest.mark.parametrize("part", ["ema", "tokenizer"])
def test_shapes_are_compared_before_a_tensor_is_computed_with(part, tmp_path, monkeypatch):
    """A file of some kilobytes holds a tensor that would fill 14 GB."""
    content = diffusion_content()
    weights = content["ema"] if part == "ema" else content["tokenizer"]["ema"]
    weights[next(iter(weights))] = torch.ones(1).expand(60_000, 60_000)
    path = saved(tmp_path / "x.pt", content)
    assert Path(path).stat().st_size < 10 ** 6
    finite = checkpoints.all_finite
    monkeypatch.setattr(checkpoints, "all_finite", lambda tensors: finite(
        t for t in tensors if t.numel() < 10 ** 9 or 1 / 0))                              # 1 / 0: it raises
    with pytest.raises(UserError, match=r"has shape \(60000, 60000\)"):
        load_diffusion(path)


def test_class_names_that_are_numbers(tmp_path):
    ckpt = saved(tmp_path / "x.pt", diffusion_content(classes=(7, 8.5, None)))
    assert load_diffusion(ckpt)[2]["classes"] == ["7", "8.5", "None"]
    draw(ckpt, "--out", tmp_path / "s.png")


def test_a_checkpoint_without_a_data_root_draws_its_sheet(tmp_path):
    content = diffusion_content()
    del content["config"]["data_root"], content["config"]["seed"]
    command = ["--ckpt", str(saved(tmp_path / "x.pt", content)), "--report", str(tmp_path / "SHEET.PNG"),
               "--steps", "2", "--device", "cpu"]
    for choice in ("--num", "--classes"):                                   # would be without effect
        with pytest.raises(UserError, match=f"leave out.*{choice}"):
            sample.main([*command, choice, "1"])
    sample.main(command)
    assert Image.open(tmp_path / "SHEET.PNG").width > 100


def test_a_shard_that_is_not_what_was_written_is_encoded_again(tmp_path, capsys):
    latents = cache.LatentCache(tmp_path, "key", 4, False, 0)
    paths, shape = latents.shard_paths(0), (4, 1, 2, 3)

    def write(content, save):
        for path, array in zip(paths, (content, np.zeros(4, np.int64))):
            save(path, array)
        return latents.whole(0, shape), capsys.readouterr().err

    assert write(np.zeros(shape, np.float16), files.save_npy) == (True, "")
    for wrong in ((np.zeros(shape, np.float16), np.save), (np.zeros((4, 2, 3), np.float16), files.save_npy)):
        whole, said = write(*wrong)
        assert not whole and "damaged, or of another version" in said and "encoded again" in said
    write(np.zeros(shape, np.float16), files.save_npy)
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    assert not latents.whole(0, shape) and "damaged" in capsys.readouterr().err
    paths[0].unlink()
    assert not latents.whole(0, shape) and "damaged" in capsys.readouterr().err
    paths[1].unlink()
    assert not latents.whole(0, shape) and not capsys.readouterr().err                   # a new cache


def test_sound_checkpoints_are_still_read(tmp_path):
    assert load_tokenizer(saved(tmp_path / "t.pt", tokenizer_content())).config.image_size == 16
    assert outputs.kind_of("samples-cfg1.9") == outputs.kind_of(tmp_path) == ""
