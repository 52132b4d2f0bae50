"""train_tokenizer.py: presets, schedules, stages, exact resumption, process counts, crashes and bad input."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import in_two_processes
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import common
import losses
import maetok
import train_tokenizer as trainer
from common import UserError
from data import build_dataset, some_images, to_float
from maetok import MAETok
from measures import training as measure
from shapes import Shapes
from train_tokenizer import ABLATIONS, SCALES, Config, Method, Stage

PRESETS = Method.PRESETS
TINY = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 --aux-depth "
        "1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 6 --stage2-steps 4 --warmup 2 "
        "--stage2-warmup 1 --log-every 1 --save-every 5 --device cpu").split()
NO_NETWORKS = dict(targets="", percep_weight=0.0, disc="none")


def train(out, *options):
    trainer.main([*TINY, "--out", str(out), *options])
    return checkpoints.load_checkpoint(out)


def command(out, *options, launcher=()):
    start = [sys.executable, *launcher] if launcher else [sys.executable]
    return [*start, str(ROOT / "train_tokenizer.py"), *TINY, "--out", str(out), *map(str, options)]


def run(argv, **kwargs):
    return subprocess.run(argv, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def torchrun(processes):
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def logged_losses(out):
    return [r["loss"] for r in checkpoints.read_metrics(out) if "loss" in r]


def targets_of(config, monkeypatch):
    """The auxiliary targets of a config, without the teachers' networks."""
    monkeypatch.setattr(losses, "load_teacher", lambda *args: None)
    return {name: losses.build_target(name, config, "cpu") for name in common.split_names(config.targets)}


def assert_same_weights(a, b):
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part} {name}"


# ------------------------------------------ presets and schedules ------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_runs_its_shapes_on_the_meta_device(name, monkeypatch):
    values = PRESETS[name] if name in SCALES else PRESETS["shapes"] | PRESETS[name]
    config = Config(**values)
    size = config.image_size
    with torch.device("meta"):
        model = MAETok(config, targets_of(config, monkeypatch))
        output = model(torch.empty(1, 3, size, size), noise=None)
    assert output.reconstruction.shape == (1, 3, size, size)
    N = (size // config.patch_size) ** 2
    assert output.latents.shape == (1, config.num_latents if config.learnable_latents else N,
                                    config.latent_dim)
    assert (output.posterior is not None) == name.startswith("vae")
    cells = (config.patch_size // config.hog_cell) ** 2                # of a patch; 9 bins, 3 channels each
    targets = {"ae": {}, "vae": {}, "pixel": {}, "dinov2": {"dinov2-l": 1024}, "siglip": {"siglip-l": 1024}}
    if name in ("combined", "maetok-b-256", "maetok-b-512"):
        targets[name] = {"hog": 108, "dinov2-l": 1024, "siglip-l": 1024}
    assert {target: tuple(features.shape[1:]) for target, features in output.aux.items()} == {
        target: (N, dim) for target, dim in targets.get(name, {"hog": cells * 27}).items()}


def test_paper_presets_are_table_7():
    config = Config(**PRESETS["maetok-b-256"])
    assert (config.image_size, config.width, config.heads, config.encoder_depth, config.decoder_depth,
            config.patch_size, config.num_latents, config.latent_dim) == (256, 768, 12, 12, 12, 16, 128, 32)
    assert (config.lr, config.batch_size, config.warmup, config.steps, config.stage2_steps) == (
        1e-4, 512, 10_000, 500_000, 50_000)
    assert (trainer.WEIGHT_DECAY, trainer.BETAS, losses.LECAM_WEIGHT) == (1e-4, (0.9, 0.95), 1e-3)
    assert (config.mask_low, config.mask_high, config.aux_depth, config.targets) == (
        0.4, 0.6, 3, "hog,dinov2-l,siglip-l")
    assert (config.percep_weight, config.disc, config.disc_weight, config.disc_start) == (
        1.0, "dino", 0.4, 30_000)
    assert Config(**PRESETS["maetok-b-512"]).image_size == 512
    assert ABLATIONS["mask-0-60"] == dict(mask_low=0.0, mask_high=0.6)


def test_imagenet64_is_the_size_that_its_times_are_computed_for(monkeypatch):
    """docs/running.md has hours by these counts, of the model without its loss networks."""
    config = Config(**PRESETS["imagenet64"])
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model = MAETok(config, targets_of(config, monkeypatch))
        output = model(torch.empty(1, 3, 64, 64), torch.empty(1, 64, dtype=torch.bool))
        (output.reconstruction.sum() + output.aux["hog"].sum()).backward()
    assert sum(p.numel() for p in model.parameters()) == 48_239_564
    assert counter.get_total_flops() == pytest.approx(38.8e9, rel=1e-2)
    assert output.latents.shape == (1, 64, 32)


def test_imagenet64_trains_through_both_stages_with_one_layer_of_each(tmp_path):
    trainer.main(["--preset", "imagenet64", "--data", "shapes", "--encoder-depth", "1", "--decoder-depth",
                  "1", "--aux-depth", "1", "--percep-weight", "0", "--disc-start", "1", "--batch-size", "2",
                  "--steps", "2", "--stage2-steps", "1", "--log-every", "1", "--device", "cpu",
                  "--out", str(tmp_path)])
    last = checkpoints.read_metrics(tmp_path)[1]
    assert last["step"] == 2 and np.isfinite([last["recon"], last["hog"], last["disc"]]).all()
    assert maetok.load_tokenizer(tmp_path).config.num_latents == 64


def test_windows_are_the_same_in_every_process_and_new_in_every_call_and_step():
    """A window depends on (seed, step, micro-batch) alone, so that all processes crop alike."""
    config = Config(**NO_NETWORKS)
    assert losses.draw_windows(config, 7, 0) == losses.draw_windows(config, 7, 0)
    assert losses.draw_windows(config, 7, 0) != losses.draw_windows(config, 7, 1)
    windows = [w for step in range(400) for w in losses.draw_windows(config, step, 0)]
    assert abs(np.mean([window is None for window in windows]) - 0.5) < 0.05
    places = [window for window in windows if window is not None]
    assert len(set(places)) == len(places) and 0 <= np.min(places) and np.max(places) < 1


def test_learning_rate_warms_up_and_follows_a_cosine_in_each_stage():
    config = Config(**NO_NETWORKS, steps=110, warmup=10, lr=1.0, stage2_steps=50, stage2_warmup=5,
                    stage2_lr=3.0)
    rate = partial(Method(config, torch.device("cpu")).learning_rate, Stage(1, 0, 110))
    assert abs(rate(0) - 0.1) < 1e-9 and abs(rate(9) - 1.0) < 1e-9 and abs(rate(10) - 1.0) < 1e-9
    assert abs(rate(60) - 0.5) < 1e-9 and abs(rate(110)) < 1e-9
    rate = partial(Method(config, torch.device("cpu")).learning_rate, Stage(2, 110, 160))
    assert abs(rate(110) - 0.6) < 1e-9 and abs(rate(114) - 3.0) < 1e-9 and abs(rate(160)) < 1e-9


def test_stage_2_lowers_the_mask_ratio_from_60_percent_to_none():
    config = Config(**PRESETS["maetok-b-256"] | NO_NETWORKS)
    method, stage = Method(config, torch.device("cpu")), Stage(2, 500_000, 550_000)
    ramp = [method.mask_range(stage, 500_000 + step) for step in (0, 24_999.5, 49_999)]
    np.testing.assert_allclose(ramp, [(0.6, 0.6), (0.3, 0.3), (0, 0)], atol=1e-9)
    assert method.mask_range(Stage(1, 0, 500_000), 3) == (0.4, 0.6)
    early = Method(Config(**NO_NETWORKS, stage2_ramp=0.5), torch.device("cpu"))
    assert [early.mask_range(stage, 500_000 + step)[0] for step in (0, 24_999, 40_000)] == [0.6, 0, 0]
    never = Method(Config(**NO_NETWORKS, mask_low=0.0, mask_high=0.0, stage2_steps=1), torch.device("cpu"))
    assert never.mask_range(Stage(2, 500_000, 500_001), 500_000) == (0, 0)


def test_weight_decay_is_for_matrices_of_linear_layers_only(monkeypatch):
    config = Config(**PRESETS["shapes"])
    model = MAETok(config, targets_of(config, monkeypatch))
    decay, rest = Method(config, torch.device("cpu")).optimizer(model).param_groups
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert decay["weight_decay"] == 1e-4 and {id(p) for p in decay["params"]} == linear
    assert rest["weight_decay"] == 0 and len(rest["params"]) + len(linear) == len(list(model.parameters()))


# ---------------------------------------------- the two stages ----------------------------------------------

def test_stage_2_trains_the_pixel_decoder_on_the_latents_of_stage_1(tmp_path):
    one = train(tmp_path, "--stage", "1")
    assert one["stage"] == 1 and one["step"] == 6 and any(k.startswith("aux_decoders") for k in one["model"])
    two = train(tmp_path)                                            # the same run continues with stage 2
    assert (two["stage"] == 2 and two["step"] == 10
            and not any(k.startswith("aux_decoders") for k in two["model"]))
    for part in ("model", "ema"):
        encoder = [k for k in two[part] if k.startswith("encoder.")]
        assert all(torch.equal(two[part][k], one["ema"][k]) for k in encoder)        # frozen at stage 1's EMA
    assert any(not torch.equal(two["model"][k], one["ema"][k])
               for k in two["model"] if k.startswith("decoder."))
    events = [r for r in checkpoints.read_metrics(tmp_path) if "event" in r]
    assert [e["stage"] for e in events] == [1, 2] and all(e["psnr"] > 0 for e in events)
    assert events[0]["hog_constant"] > 0 and "hog_loss" not in events[1]
    assert [r["mask"] for r in checkpoints.read_metrics(tmp_path) if r["stage"] == 2 and "mask" in r][-1] == 0


def test_stage_2_alone_from_a_checkpoint(tmp_path):
    one = train(tmp_path / "one", "--stage", "1")
    two = train(tmp_path / "two", "--stage", "2", "--init", str(tmp_path / "one"))
    assert all(torch.equal(two["model"][k], one["ema"][k]) for k in two["model"] if k.startswith("encoder."))
    assert [r["stage"] for r in checkpoints.read_metrics(tmp_path / "two") if "loss" in r] == [2] * 4
    with pytest.raises(UserError, match="give --init"):
        train(tmp_path / "three", "--stage", "2")
    with pytest.raises(UserError, match="is in stage 2 already"):
        train(tmp_path / "two", "--stage", "1", "--init", str(tmp_path / "one"))
    # A finished tokenizer can start a new stage 1 too, and one with other targets.
    train(tmp_path / "four", "--stage", "1", "--init", str(tmp_path / "two"))
    train(tmp_path / "five", "--stage", "2", "--init", str(tmp_path / "one"), "--targets", "")
    (tmp_path / "one/step_0000006.pt").unlink()
    os.replace(tmp_path / "one/step_0000005.pt", tmp_path / "one/last.pt")
    with pytest.raises(UserError, match="goes on in .*one when stage 1 there is finished"):
        train(tmp_path / "one", "--stage", "2")


def test_stage_2_after_stage_1_in_the_same_folder_is_both(tmp_path):
    both = train(tmp_path / "both")
    train(tmp_path / "turns", "--stage", "1")
    turns = train(tmp_path / "turns", "--stage", "2")
    assert both["step"] == turns["step"] == 10
    assert_same_weights(both, turns)
    with pytest.raises(UserError, match="is in stage 2 already"):
        train(tmp_path / "turns", "--stage", "1")
    with pytest.raises(UserError, match="needs --stage2-steps"):
        train(tmp_path / "none", "--stage", "2", "--init", str(tmp_path / "both"), "--stage2-steps", "0")


def test_a_stage_that_only_needs_measuring_again_is_not_trained(tmp_path, monkeypatch):
    """So a signal ends it at once: nothing of it waits for the end of a step."""
    state = train(tmp_path, "--stage", "1")
    torch.save(state | {"measured": False}, tmp_path / "last.pt")
    (tmp_path / "step_0000006.pt").unlink()
    monkeypatch.setattr(trainer, "train_stage", None)
    assert train(tmp_path, "--stage", "1")["measured"]


def test_without_masking_the_auxiliary_decoders_learn_from_all_patches(tmp_path, monkeypatch):
    state = train(tmp_path, "--preset", "no-mask", "--stage", "1")
    assert all(r["hog"] > 0 for r in checkpoints.read_metrics(tmp_path) if "hog" in r)
    torch.manual_seed(0)
    config = Config(**state["config"])
    fresh = MAETok(config, targets_of(config, monkeypatch)).state_dict()
    assert not torch.equal(state["model"]["aux_decoders.hog.head.weight"],
                           fresh["aux_decoders.hog.head.weight"])


def test_measurements_are_made_again_when_they_were_cut_short(tmp_path, monkeypatch, capsys):
    def unreadable(*args):
        raise UserError("a test image is broken")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="broken"):
        patch.setattr(trainer, "test_numbers", unreadable)
        train(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 6                # stage 1 is safe
    maetok.load_tokenizer(tmp_path)
    assert "mean and std are not measured" in capsys.readouterr().err
    state = train(tmp_path)
    assert state["step"] == 10 and state["measured"]
    assert [r["step"] for r in checkpoints.read_metrics(tmp_path) if "event" in r] == [6, 10]


def test_both_stages_of_a_kl_vae_decode_samples(tmp_path, monkeypatch):
    noises, forward = [], maetok.MAETok.forward

    def recorded(self, images, mask=None, noise=None):
        noises.append(noise)
        return forward(self, images, mask, noise)

    monkeypatch.setattr(maetok.MAETok, "forward", recorded)
    monkeypatch.setattr(trainer, "test_numbers", lambda *args: {})
    monkeypatch.setattr(trainer, "training_grid", lambda *args: None)
    train(tmp_path, "--variational")
    assert len(noises) == 10 and all(0.5 < noise.std() < 1.5 for noise in noises)
    assert len({noise[0, 0, 0].item() for noise in noises}) == 10


def test_saved_tokenizer_offers_normalised_latents(tmp_path):
    train(tmp_path)
    tokenizer = maetok.load_tokenizer(tmp_path)
    images = torch.stack([torch.from_numpy(np.array(Shapes("train", 16, 0)[i][0]))
                          for i in range(500)]).permute(0, 3, 1, 2)
    images = images.float() / 127.5 - 1
    z = tokenizer.encode(images, normalize=True)
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1 and tokenizer.latent_std != 1
    torch.testing.assert_close(tokenizer.decode(z, normalized=True),
                               tokenizer.decode(tokenizer.encode(images)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no checkpoint at"):
        maetok.load_tokenizer(tmp_path / "nowhere")


def test_training_lowers_the_loss_and_pictures_appear(tmp_path):
    train(tmp_path, "--steps", "60", "--stage2-steps", "20", "--lr", "2e-3", "--save-every", "40")
    curve = logged_losses(tmp_path)
    assert np.mean(curve[50:60]) < 0.8 * np.mean(curve[:5])
    for name in ("grid_0000040.png", "grid_0000060.png", "grid_0000080.png", "loss.png"):
        assert min(Image.open(tmp_path / name).size) > 90
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 2e-3


@pytest.mark.parametrize("options", [["--preset", "ae"], ["--preset", "vae-mask"],
                                     ["--preset", "image-latents"], ["--dtype", "bfloat16"]])
def test_variants_train_through_both_stages(tmp_path, options):
    state = train(tmp_path, *options)
    assert state["step"] == 10 and np.isfinite(logged_losses(tmp_path)).all()
    assert ("kl" in checkpoints.read_metrics(tmp_path)[0]) == ("vae-mask" in options)
    maetok.load_tokenizer(tmp_path)


def test_accumulation_equals_the_whole_batch(tmp_path):
    whole = train(tmp_path / "a")
    parts = train(tmp_path / "b", "--accumulate", "4")
    np.testing.assert_allclose(logged_losses(tmp_path / "a"), logged_losses(tmp_path / "b"), atol=1e-4)
    for k, v in whole["model"].items():
        torch.testing.assert_close(v, parts["model"][k], atol=2e-4, rtol=0)


# ------------------------------------------------ resuming ------------------------------------------------

def test_resuming_inside_stage_2_is_exact_too(tmp_path):
    whole = train(tmp_path / "whole", "--save-every", "4")
    train(tmp_path / "cut", "--save-every", "4")
    (tmp_path / "cut/last.pt").unlink()
    (tmp_path / "cut/step_0000010.pt").unlink()
    assert checkpoints.find_checkpoint(tmp_path / "cut")["step"] == 8
    assert_same_weights(whole, train(tmp_path / "cut", "--save-every", "4"))


def test_truncated_checkpoint_goes_back_to_the_one_before(tmp_path, capsys):
    whole = train(tmp_path)
    with open(tmp_path / "last.pt", "r+b") as file:                  # the same file as step_0000010.pt
        file.truncate(3000)
    assert_same_weights(whole, train(tmp_path))
    assert "damaged" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(tmp_path)
    before = (tmp_path / "last.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_text()
    train(tmp_path)
    assert before == ((tmp_path / "last.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_text())


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(losses.HOGTarget, "loss", lambda self, prediction, *rest: (
        calls.append(1), prediction.mean() * (float("nan") if len(calls) == 12 else 1.0))[1])
    with pytest.raises(UserError, match="not finite at step 12 .* another --out a lower --lr"):
        train(tmp_path, "--stage", "1", "--steps", "20", "--save-every", "4", "--log-every", "100")
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 8


@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path, part):
    """The last optimizer step can spoil weights whose loss and gradient were fine."""
    state = train(tmp_path, "--stage", "1")
    state[part]["decoder.head.weight"][0, 0] = float("nan")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="the weights are not finite at step 6"):
        checkpoints.save_checkpoint(tmp_path, state)
    assert (tmp_path / "last.pt").read_bytes() == before
    torch.save(dict(state), tmp_path / "last.pt")
    with pytest.raises(UserError, match="holds weights that are NaN or infinite"):
        if part == "ema":
            maetok.load_tokenizer(tmp_path)
        train(tmp_path, "--stage", "1")


# ------------------------------------------------ processes ------------------------------------------------

@pytest.mark.slow
def test_two_processes_follow_one_and_may_change_in_number(tmp_path):
    options = ["--steps", "20", "--stage2-steps", "4", "--save-every", "10"]
    train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options], tmp_path / "log")
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
    assert len(logged_losses(tmp_path / "one")) == 24
    # Started with two processes, continued with one.
    for path in ("last.pt", "step_0000024.pt", "step_0000020.pt"):
        (tmp_path / "two" / path).unlink()
    assert checkpoints.find_checkpoint(tmp_path / "two")["step"] == 10
    train(tmp_path / "two", *options)
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)


@pytest.mark.slow
def test_two_torchrun_agents_on_loopback(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    agents = [subprocess.Popen(command(tmp_path, "--stage", "1", "--steps", "4", launcher=launcher),
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
              for _ in range(2)]
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), "\n".join(outputs)
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 4
    train(tmp_path / "alone", "--stage", "1", "--steps", "4")
    np.testing.assert_allclose(logged_losses(tmp_path), logged_losses(tmp_path / "alone"), atol=1e-4)


# ------------------------------------------------ bad input ------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("options, message", [
    (["--data", "nowhere"], "--data nowhere: no such folder (nor one of: shapes, cifar10, a .npz file)"),
    (["--preset", "tiny"], "unknown preset tiny "), (["--out", "a-file"], "a-file")])
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, options, message):
    (tmp_path / "a-file").write_text("in the way")
    process = run(command("run", *options), cwd=tmp_path)
    lines = process.stderr.strip().splitlines()
    assert (process.returncode == 2 and len(lines) == 1
            and lines[0].startswith("error: ") and message in lines[0])


def test_every_kind_of_bad_input_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.jpg").write_bytes(b"no jpeg")
    train(tmp_path / "run", "--stage", "1")
    before = (tmp_path / "run/last.pt").read_bytes()
    cases = [
        ("no images in", ["--data", tmp_path / "empty"]),
        ("cannot read image", ["--data", tmp_path / "broken", "--workers", "1"]),
        ("unknown preset", ["--preset", "maetok-b-1024"]),
        ("not a multiple of patch_size", ["--image-size", "30"]),
        ("HOG cells", ["--hog-cell", "3"]),
        ("of another run", ["--width", "64", "--out", tmp_path / "run"]),
        ("weights of another model", ["--width", "64", "--stage", "2", "--init", tmp_path / "run"]),
        ("not divisible by 1 processes x 3", ["--accumulate", "3"]),
        ("unknown auxiliary target", ["--targets", "hog,sift"]),
        ("--mask-low 0.9 and --mask-high 0.6: low <= high < 1", ["--mask-low", "0.9"]),
        ("which images", ["--preset", "maetok-b-256"]),
        ("no checkpoint at", ["--init", tmp_path / "nowhere"]),
        ("choose both or 1 or 2", ["--stage", "3"]),
        ("--steps: must be a whole number from 1 to", ["--steps", "-1"]),
        ("--stage2-lr: must be a number above 0", ["--stage2-lr", "0"]),
        ("--mask-high: must be a number from 0 to 1", ["--mask-high", "1.5"]),
        ("low <= high < 1", ["--mask-high", "1"]),
        ("there is no sift.py in after/, variants/, study/", ["--add", "sift"]),
        ("weights of another model", ["--heads", "1", "--stage", "2", "--init", tmp_path / "run"]),
        ("--device tpu", ["--device", "tpu"]),
    ]
    for message, options in cases:
        with pytest.raises(UserError, match=message) as e:
            train(tmp_path / "new", *map(str, options))
        assert "\n" not in str(e.value)
    assert (tmp_path / "run/last.pt").read_bytes() == before          # nothing lost


# ------------------------------------------- measurements, extras -------------------------------------------

def test_numbers_on_test_images_are_those_of_the_equations(monkeypatch):
    """PSNR and Eq. 8 do not depend on the batches; the best constant is better than others."""
    monkeypatch.setattr(measure, "EVAL_IMAGES", 11)
    options = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1, decoder_depth=1,
                   aux_depth=1, num_latents=4, latent_dim=4, hog_cell=4, percep_weight=0.0, disc="none",
                   targets="hog", data="shapes", steps=100)
    methods = [Method(Config(**options, batch_size=size), torch.device("cpu")) for size in (4, 64)]
    model = MAETok(methods[0].config, methods[0].targets).eval()
    dataset = build_dataset("shapes", "test", 16)
    parts, whole = (measure.test_numbers(method, model, dataset) for method in methods)
    assert parts["images"] == 11 and parts == pytest.approx(whole, rel=1e-4)
    images = to_float(next(some_images(dataset, 11))[0])
    mask = measure.half_hidden(methods[0].config, 16, 0, 11)
    assert (mask.sum(1) == 8).all() and not torch.equal(mask[0], mask[1])
    y = methods[0].targets["hog"].features(images)
    with torch.no_grad():
        prediction = model(images, mask).aux["hog"]
    assert whole["hog_loss"] == pytest.approx((prediction - y)[mask].square().mean().item(), rel=1e-4)
    constant = lambda value: (y[mask] - value).square().mean().item()
    assert whole["hog_constant"] == pytest.approx(constant(y[mask].mean(0)), rel=1e-4)
    assert whole["hog_constant"] < min(constant(0), constant(y[mask].mean(0) + 0.01))
    errors = (model.reconstruct(images).clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
    assert whole["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=0.05)     # 8 bits


def test_a_short_run_measures_no_more_images_than_it_has_seen():
    config = Config(**NO_NETWORKS, steps=3, batch_size=8, accumulate=2)
    assert [measure.few(config, count) for count in (10, 1000)] == [10, 24]
    assert measure.eval_batch(config) == 4 and measure.eval_batch(Config(batch_size=512)) == 64


class AddToTokenizer:
    """An extra with all that an extra may have: latents times a factor, and a learned shift of them."""
    PRESETS = {"thrice": dict(factor=3.0)}

    @dataclass
    class Config:
        # ---- an extra ----
        factor: common.Positive = 2.0        # of the latents

    class Model:
        def __init__(self, config, targets=None):
            super().__init__(config, targets)
            self.shift = torch.nn.Parameter(torch.zeros(config.latent_dim))

        def decode_all(self, h, *rest, shifted=None, **more):
            return super().decode_all(h * self.config.factor + (0 if shifted is None else self.shift), *rest,
                                      **more)

    def batch(self, stage, *rest):
        batch = super().batch(stage, *rest)
        batch.more["shifted"] = torch.ones(1)
        return batch


def test_an_extra_brings_its_options_its_model_and_its_part_of_a_step(tmp_path, monkeypatch, capsys):
    home, extra = common.find_extra, SimpleNamespace(__name__="after.example", AddToTokenizer=AddToTokenizer)
    monkeypatch.setattr(common, "find_extra", lambda name: extra if name == "example" else home(name))
    with pytest.raises(SystemExit):
        trainer.main(["--add", "example", "--help"])
    assert "--factor FLOAT" in (text := capsys.readouterr().out) and "of the latents (default 2.0)" in text
    plain = train(tmp_path / "plain", "--save-every", "4")
    state = train(tmp_path / "run", "--add", "example", "--preset", "thrice", "--save-every", "4")
    assert state["add"] == ["example"] and plain["add"] == [] and state["config"]["factor"] == 3.0
    assert state["model"]["shift"].abs().sum() > 0 and state["model"].keys() - plain["model"].keys() == {
        "shift"}
    assert maetok.load_tokenizer(tmp_path / "run").shift.shape == (4,)
    with pytest.raises(UserError, match="add 'example' -> ''"):
        train(tmp_path / "run", "--save-every", "4")
    for name in ("last.pt", "step_0000010.pt", "step_0000008.pt"):
        (tmp_path / "run" / name).unlink()
    assert_same_weights(state, train(tmp_path / "run", "--add", "example", "--preset", "thrice",
                                     "--save-every", "4"))
    # Without the extra's file the checkpoint says what is missing.
    monkeypatch.undo()
    with pytest.raises(UserError, match="there is no example.py in after/, variants/, study/"):
        maetok.load_tokenizer(tmp_path / "run")


# ------------------------------------------------- a GPU -------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("less", [[], ["--checkpointing"]])
def test_cuda_bfloat16_and_compile(tmp_path, less):
    state = train(tmp_path, "--device", "cuda", "--dtype", "bfloat16", "--compile", *less)
    assert state["step"] == 10 and np.isfinite(logged_losses(tmp_path)).all()
