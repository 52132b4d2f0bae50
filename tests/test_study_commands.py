"""evaluate.py's commands of study/ and its --add; study/box.py."""
import copy
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import common
import evaluate
import flow
import maetok
import metrics
import sample
import train_diffusion
import train_tokenizer
from common import UserError
from data import build_dataset, some_images, to_float, to_uint8
from frozen import inception, pretrained
from measures import features, image_sets
from pictures.page import write_report
from runtime import files
from shapes import SHAPES
from sit import SiTConfig, load_diffusion
from study import box, gaussian, judge, speed
from test_box import tiny_sit
from test_evaluate import tiny_inception
from test_train_tokenizer import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny tokenizer and a SiT on its latents."""
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer.main([*TINY, "--out", str(folder / "tokenizer")])
    tiny_sit(folder / "tokenizer", folder / "diffusion")
    return folder


@pytest.fixture
def diffusion(trained, monkeypatch):
    """The SiT's run, with colour means in place of Inception."""
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    return trained / "diffusion"


def measure(*options):
    evaluate.main([*map(str, options), "--device", "cpu"])


# ------------------------------------------------- theory -------------------------------------------------

def test_theory_finds_that_more_modes_need_more_samples(tmp_path):
    measure("theory", "--components", 2, 8, "--dims", 8, "--samples", 64, 512, 4096, "--repeats", 2,
            "--steps", 150, "--out", tmp_path / "t")
    found = json.loads((tmp_path / "t.json").read_text())
    # Well apart, each of K means is estimated from n / K samples: an error of about dK/n, an exponent near 1.
    assert 0.5 < found["exponent"] < 1.6 and "K^4" in found["what_it_shows"]
    for row in found["rows"]:
        assert [e for _, e in row["errors"]] == sorted((e for _, e in row["errors"]), reverse=True)
    assert Image.open(tmp_path / "t.png").width > 500


def test_an_error_that_is_never_reached_is_named(tmp_path):
    with pytest.raises(UserError, match="--error 1e-09 is crossed within --samples for fewer than two K"):
        measure("theory", "--components", 2, 3, "--dims", 2, "--samples", 8, 16, "--repeats", 1, "--steps", 2,
                "--error", 1e-9, "--out", tmp_path / "t")


# ------------------------------------------------ gaussian ------------------------------------------------

def test_the_best_affine_velocity_and_its_loss():
    """Against least squares on draws of x_t, and against the loss that these leave."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 6)) ** 3 @ rng.standard_normal((6, 6)) / 4 + 0.5        # not a Gaussian
    config = SiTConfig(num_latents=3, latent_dim=2, width=8, depth=1, heads=1, num_classes=10)
    model, losses = gaussian.GaussianVelocity(torch.from_numpy(x).reshape(-1, 3, 2), config), []
    every = (np.arange(40) + 0.5) / 40
    for t in every:
        # Moments exactly as those of the 4,000 vectors, and noise independent of them.
        noise = rng.standard_normal(x.shape)
        noise -= noise.mean(0)
        noise -= (x - x.mean(0)) @ np.linalg.lstsq(x - x.mean(0), noise, rcond=None)[0]
        noise = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T, bias=True))).T
        state, target = (1 - t) * x + t * noise, noise - x
        affine = np.column_stack((state, np.ones(len(x))))
        fitted = affine @ np.linalg.lstsq(affine, target, rcond=None)[0]
        ours = model(torch.from_numpy(state).float().reshape(-1, 3, 2), torch.full((len(x),), t).float())
        np.testing.assert_allclose(ours.flatten(1).numpy(), fitted, atol=2e-3)
        losses.append(((fitted - target) ** 2).mean())
    assert model.loss == pytest.approx(np.mean(losses), rel=0.01)
    assert model.config.num_classes == 0 and config.num_classes == 10


def test_a_gaussian_of_the_latents_is_measured_as_the_null_class_is(tmp_path, diffusion, monkeypatch):
    options = ("--num-images", 40, "--steps", 100, "--sampler", "euler", "--reference-images", 60)
    measure("gaussian", diffusion, *options, "--latent-images", 200, "--gap", "--out", tmp_path / "g")
    found = json.loads((tmp_path / "g.json").read_text())
    # By hand: draws from the latents' mean and covariance, decoded.
    model, tokenizer, config = load_diffusion(diffusion)
    images = image_sets.open_data(Namespace(data_root="data"), config["data"], "train", 16, 200)
    z = tokenizer.encode(to_float(torch.stack([images.read(i) for i in range(200)])), normalize=True)
    flat = z.flatten(1).double()
    roots = torch.linalg.eigvalsh(torch.cov(flat.T)).clamp(min=0).sqrt()
    assert found["gaussian_loss"] == pytest.approx(np.pi / 2 * roots.mean().item(), rel=0.01)
    records = [json.loads(line) for line in (diffusion / "metrics.jsonl").read_text().splitlines()]
    assert found["diffusion_loss"] == pytest.approx([r["loss"] for r in records if "loss" in r][-1])
    assert found["gfid"] > 0 and "diffusion_gap" in found and "no classes" in found["protocol"]
    assert "too few for 16 values" in found["protocol"]
    seen, score = [], gaussian.score
    monkeypatch.setattr(gaussian, "score", lambda args, run, *rest: seen.append(run.model) or score(
        args, run, *rest))
    measure("gaussian", diffusion, *options, "--latent-images", 200, "--out", tmp_path / "g")
    drawn = flow.sample_latents(seen[0], np.arange(2000), np.zeros(2000), 0, sampler="euler", steps=100)
    assert (drawn.flatten(1).mean(0) - flat.mean(0)).abs().max() < 0.1
    spread = [torch.cov(vectors.T.double()).trace().item() for vectors in (drawn.flatten(1), flat)]
    assert spread[0] == pytest.approx(spread[1], rel=0.1)
    # The page has the meanings that the command's result brings.
    page = write_report(tmp_path).read_text()
    assert "What one Gaussian explains (g)" in page and "best affine prediction" in page


def test_a_gaussians_samples_take_no_extras(diffusion):
    with pytest.raises(UserError, match="a Gaussian's samples need none"):
        measure("gaussian", diffusion, "--add", "time_shift", "--time-shift", 3, "--num-images", 4)


@pytest.mark.parametrize("key, value", [("path", "cosine"), ("times", "logit-normal"), ("add", "time_shift"),
                                        ("add", "muon,guidance_free"), ("add", "mean_flow")])
def test_a_gaussian_is_compared_with_plain_velocity_losses_only(tmp_path, diffusion, key, value):
    state = torch.load(diffusion / "last.pt", weights_only=True)
    state["config"][key] = value
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"was trained with --{key} {value.removeprefix('muon,')}: "):
        measure("gaussian", tmp_path / "other.pt", "--num-images", 4, "--reference-images", 8)


# ------------------------------------------------ lengths ------------------------------------------------

def test_lengths_reconstruct_from_the_first_tokens(tmp_path, trained):
    """By hand: the other tokens set to 0."""
    measure("lengths", trained / "tokenizer", "--num-images", 6, "--out", tmp_path / "l")
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert [(row["tokens"], row["values"]) for row in rows] == [(1, 4), (2, 8), (4, 16)]
    model = maetok.load_tokenizer(trained / "tokenizer")
    images = next(some_images(build_dataset("shapes", "test", 16), 6))[0]
    for row in rows:
        h = model.encode(to_float(images))
        h[:, row["tokens"]:] = 0
        assert row["psnr"] == pytest.approx(metrics.psnr(images, to_uint8(model.decode(h))).mean().item())
    assert Image.open(tmp_path / "l.png").height > 4 * 90 and (tmp_path / "l_curve.png").exists()


# ------------------------------------------------- speed -------------------------------------------------

@pytest.mark.slow
def test_speed_counts_every_product_of_a_row(tmp_path):
    measure("speed", "--only", "SiT-B sampling call, 128", "HOG", "--sample-batch", 1, "--repeats", 1,
            "--out", tmp_path / "speed")
    result = json.loads((tmp_path / "speed.json").read_text())
    T, D, C, depth = 128, 768, 32, 12
    block = 12 * D * D * T + 2 * T * T * D + 6 * D * D                    # products, attention's two, adaLN
    around = 2 * T * D * C + 2 * D * D + 256 * D + D * D                  # in and out, last adaLN, time
    row = result["rows"]["SiT-B sampling call, 128 tokens"]
    assert list(result["rows"]) == ["HOG, 256 px", "SiT-B sampling call, 128 tokens"]
    assert row["flops"] == 2 * (depth * block + around)
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / result["peak_gflops"] / 1e9)
    assert 0.1 < row["peak_memory_gib"] < 20                    # its 130 M weights alone are 0.5
    with pytest.raises(UserError, match="no row"):
        measure("speed", "--only", "SiT-Z")


def test_a_step_with_all_frozen_networks_can_be_timed(monkeypatch, tmp_path):
    """At a small size; `evaluate.py speed` takes ViT-B at 256 px."""
    small = dict(image_size=32, patch_size=8, width=32, heads=2, encoder_depth=1, decoder_depth=1,
                 num_latents=4, latent_dim=4, disc="patch", targets="hog")
    monkeypatch.setitem(speed.PRESETS, "maetok-b-256", speed.PRESETS["maetok-b-256"] | small)
    for module in (pretrained, inception):
        monkeypatch.setattr(module, "load_frozen", module.load_frozen)       # undone when the test ends
    for name in ("find_weights", "read_weights"):
        monkeypatch.setattr(pretrained, name, getattr(pretrained, name))
    measure("speed", "--only", "full objective", "--repeats", 1, "--out", tmp_path / "speed")
    row, = json.loads((tmp_path / "speed.json").read_text())["rows"].values()
    assert row["flops"] > 3e9                                             # VGG is in it, forward and back
    measure("speed", "--compare", "--only", "two passes", "--repeats", 1, "--out", tmp_path / "c")
    assert list(json.loads((tmp_path / "c.json").read_text())["ratios"]) == ["full objective / two passes"]


def test_comparisons_give_the_ratio_of_two_calls_in_turn(tmp_path, monkeypatch, capsys):
    calls, clock = [], [0.0]

    def work(name, cost):
        def call():
            calls.append(name)
            clock[0] += cost
        return call

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speed, "COMPARISONS", {
        "ours / theirs": (lambda args: (work("ours", 2.0), work("theirs", 6.0)), "torch"),
        "absent": (lambda args: 1 / 0, "no_such_package"), "JPEG": (lambda args: 1 / 0, "PIL")})
    monkeypatch.setattr(speed, "host_work", lambda args: {"masks": 1e-4})
    measure("speed", "--compare", "--repeats", 3, "--out", tmp_path / "c")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["ratios"] == {"ours / theirs": {"ours": 2, "theirs": 6, "times": 3, "lowest": 3,
                                                 "highest": 3}}
    assert calls == ["ours", "theirs"] * 4 and found["host_work_seconds"] == {"masks": 1e-4}
    assert "absent: left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HOG / scikit-image", "EM, 5 steps / scikit-learn",
                                  "linear probe / scikit-learn", "SiT-B call, faster_products / nn.Linear",
                                  "SiT step of width 64, bfloat16 / float32"])
def test_both_sides_of_a_comparison_run(name):
    build, package = speed.COMPARISONS[name]
    pytest.importorskip(package)
    args = Namespace(device=torch.device("cpu"), dtype="float32", sit_batch=1, sample_batch=1,
                     seed=0, checkpointing=False)
    for call in build(args):
        call()


def test_measures_of_a_kl_vaes_latents_sample_its_posteriors(tmp_path, monkeypatch):
    """As what SiT is trained on: with the cache's noise."""
    train_tokenizer.main([*TINY, "--variational", "--out", str(tmp_path / "vae")])
    tiny_sit(tmp_path / "vae", tmp_path / "sit")
    monkeypatch.setattr(features, "load_inception", tiny_inception)
    seen, encode = [], maetok.MAETok.encode

    def recorded(self, images, mask=None, normalize=False, rngs=None):
        seen.append(None if rngs is None else [copy.deepcopy(rng).random() for rng in rngs])
        return encode(self, images, mask, normalize, rngs)

    monkeypatch.setattr(maetok.MAETok, "encode", recorded)
    counts = "--train-images", 60, "--test-images", 10, "--components", 2, "--out", tmp_path / "found"
    for command in (("latents", tmp_path / "vae", "--no-full", "--starts", 1, *counts),
                    ("diffusability", tmp_path / "vae", *counts),
                    ("gaussian", tmp_path / "sit", "--num-images", 4, "--steps", 2, "--reference-images", 8,
                     "--latent-images", 60)):
        seen.clear()
        measure(*command, "--batch-size", 7)
        first = next(draws for draws in seen if draws is not None)
        assert None not in seen and len(first) == 7 and len(set(first)) == 7
        assert first[3] == common.sample_rng(0, "posterior", 0, 3).random()


# -------------------------------------------------- judge --------------------------------------------------

def colours(path, count, wrong=0):
    """An .npz of noisy red, green and blue images with their classes, `wrong` of which are another's."""
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 3
    images = rng.integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 100
    labels[:wrong] = (labels[:wrong] + 1) % 3
    np.savez(path, arr_0=images, arr_1=labels)
    return path


def test_the_judge_learns_classes_and_counts_the_samples_that_show_them(tmp_path, monkeypatch):
    data, samples = colours(tmp_path / "d.npz", 96), colours(tmp_path / "s.npz", 30, wrong=6)
    monkeypatch.setattr(judge, "BATCH", 16)
    monkeypatch.setattr(judge, "LR", 0.02)                                          # for so few steps
    options = ["--data", data, "--classifier-steps", 60, "--cache", tmp_path / "cache"]
    measure("judge", samples, *options)
    found = json.loads((tmp_path / "s.npz.judge.json").read_text())
    assert found["test_accuracy"] == 1 and found["named_as_requested"] == pytest.approx(24 / 30)
    assert found["by_class"] == {"0": pytest.approx(0.8), "1": pytest.approx(0.8), "2": pytest.approx(0.8)}
    monkeypatch.setattr(judge, "train", None)                                        # it is not trained again
    measure("judge", samples, *options)
    for size, labels, message in ((16, {}, "none.npz: the judge needs the class of every image"),
                                  (16, {"arr_1": [0, 1, 3]}, "none.npz has a class 3, .* 3 classes"),
                                  (4, {"arr_1": [0, 1, 2]}, "none.npz has images of 4 px; the judge needs")):
        np.savez(tmp_path / "none.npz", arr_0=np.zeros((3, size, size, 3), np.uint8), **labels)
        with pytest.raises(UserError, match=message):
            measure("judge", tmp_path / "none.npz", *options, "--cache", tmp_path / "no_cache")


def test_the_judges_training_images_move_as_a_whole():
    x = torch.arange(5 * 3 * 9 * 9.0).reshape(5, 3, 9, 9)
    moved = judge.shifted(x, torch.Generator().manual_seed(1))
    offsets = set()
    for a, b in zip(x, moved):
        padded = torch.nn.functional.pad(a[None], [judge.SHIFT] * 4, mode="reflect")[0]
        fits = [(i, j) for i in range(9) for j in range(9) if torch.equal(padded[:, i:i + 9, j:j + 9], b)]
        assert len(fits) == 1
        offsets.update(fits)
    assert len(offsets) == 5


# --------------------------------------------------- box ---------------------------------------------------

def test_a_packed_model_is_the_trained_one_in_half_precision(trained, tmp_path):
    box.main([str(trained / "diffusion"), str(tmp_path / "small.pt")])
    packed = (tmp_path / "small.pt").read_bytes()
    assert len(packed) < (trained / "diffusion/last.pt").stat().st_size / 4
    for ours, theirs in zip(load_diffusion(tmp_path / "small.pt"), load_diffusion(trained / "diffusion")):
        if isinstance(ours, dict):
            folders = {"out": "diffusion", "tokenizer": "tokenizer"}           # without this machine's path
            assert ours == theirs | folders and ours["classes"] == list(SHAPES)
            assert str(trained) in theirs["out"] and str(trained).encode() not in packed
            continue
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, rtol=2 ** -11, atol=2 ** -24, msg=name)    # half a float16 step
    with pytest.raises(UserError, match="not a diffusion model"):
        box.main([str(trained / "tokenizer"), str(tmp_path / "small.pt")])
    with pytest.raises(UserError, match="two arguments"):
        box.main([])


def test_a_packed_model_is_drawn_from_measured_and_trained_on(trained, tmp_path, monkeypatch):
    small = tmp_path / "small.pt"
    box.main([str(trained / "diffusion"), str(small)])
    tiny_sit(small, tmp_path / "again")
    its, packed = (load_diffusion(path)[1] for path in (tmp_path / "again", small))
    for (name, a), b in zip(its.state_dict().items(), packed.state_dict().values()):
        assert torch.equal(a, b), name
    monkeypatch.setattr(checkpoints, "DEFAULT_MODEL", small)
    monkeypatch.chdir(tmp_path)
    sample.main(["--steps", "3", "--device", "cpu"])
    assert Image.open("samples.png").height > 10 * 32                                  # a row for each class
    evaluate.main(["recon", "--num-images", "4", "--features", "none", "--device", "cpu"])
    assert files.read_json(tmp_path / "runs/box/recon.json")["images"] == 4


def test_a_packed_model_names_its_extras(trained, tmp_path):
    """A model that an extra built is built by it again."""
    train_diffusion.main(["--tokenizer", str(trained / "tokenizer"), "--out", str(tmp_path / "shifted"), *(
        "--width 32 --depth 1 --heads 2 --cache-images 40 --batch-size 8 --steps 2 --device cpu "
        "--add time_shift --time-shift 3").split()])
    box.main([str(tmp_path / "shifted"), str(tmp_path / "small.pt")])
    model, _, _ = load_diffusion(tmp_path / "small.pt")
    assert model.times(2) == [1, 0.75, 0]                                            # 3 t / (1 + 2 t)


# --------------------------------------- cfg with --add, and the help ---------------------------------------

def test_the_sweep_compares_autoguidance(tmp_path, diffusion):
    options = ("--num-images", 20, "--steps", 3, "--reference-images", 40, "--scales", 1, 3, "--intervals",
               "0:1")
    weak = diffusion / "step_0000005.pt"
    # Ten steps hardly move a SiT. This guide has other weights, which samples depend on.
    state = torch.load(weak, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for name in ("final_layer.adaLN_modulation.1", "final_layer.linear"):
        weight = state["ema"][name + ".weight"]
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    torch.save(state, tmp_path / "weak.pt")
    found = {}
    guide = ("--add", "autoguidance", "--guide-ckpt", tmp_path / "weak.pt")
    for name, add in (("free", ()), ("auto", guide)):
        measure("cfg", diffusion, *options, *add, "--out", tmp_path / name)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert ("sampled with --add autoguidance, guide_ckpt" in found[name]["protocol"]) == (name == "auto")
    plain, guided = ([row["gfid"] for row in found[name]["rows"]] for name in ("free", "auto"))
    assert plain[0] == pytest.approx(guided[0], rel=1e-6) and abs(guided[1] / plain[1] - 1) > 0.005
    with pytest.raises(UserError, match="--guide-ckpt"):
        measure("cfg", diffusion, *options, "--add", "autoguidance")


def test_autoguided_samples_may_be_decoded_by_another_stage(tmp_path, diffusion, trained):
    train_tokenizer.main([*TINY, "--stage", "2", "--init", str(trained / "tokenizer"),
                          "--out", str(tmp_path / "other")])
    measure("cfg", diffusion, "--num-images", 8, "--steps", 3, "--reference-images", 40, "--gap",
            "--tokenizer", tmp_path / "other", "--scales", 2, "--intervals", "0:1", "--add", "autoguidance",
            "--guide-ckpt", diffusion / "step_0000005.pt", "--out", tmp_path / "cfg")
    found = json.loads((tmp_path / "cfg.json").read_text())
    assert f"decoded by {tmp_path / 'other'}" in found["protocol"] and "diffusion_gap" in found["rows"][0]


def test_help_lists_the_commands_of_the_extras_with_the_papers(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in (*evaluate.COMMANDS, "compactness", "gaussian", "lengths",
                                                   "speed", "theory"))
    assert common.find_extra("gaussian") is gaussian
