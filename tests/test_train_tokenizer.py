"""train_tokenizer.py: presets, schedules, stages, exact resumption, process counts, crashes and bad input."""
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import common
import losses
import maetok
import train_tokenizer as trainer
from common import UserError
from shapes import Shapes
from maetok import MAETok
from frozen.pretrained import ViTConfig, VisionTransformer
from train_tokenizer import ABLATIONS, PRESETS, SCALES, Config

TINY = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 --aux-depth "
        "1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 6 --stage2-steps 4 --warmup 2 "
        "--stage2-warmup 1 --log-every 1 --save-every 5 --grid-every 0 --eval-images 16 --latent-images 64 "
        "--device cpu").split()


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


def assert_same_weights(a, b):
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part} {name}"


# ------------------------------------------ presets and schedules ------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_runs_its_shapes_on_the_meta_device(name):
    values = PRESETS[name] if name in SCALES else PRESETS["shapes"] | PRESETS[name]
    config = Config(**values)
    size = config.image_size
    with torch.device("meta"):
        output = MAETok(config)(torch.empty(1, 3, size, size), noise=None)
    assert output.reconstruction.shape == (1, 3, size, size)
    N = (size // config.patch_size) ** 2
    assert output.latents.shape == (1, config.num_latents if config.learnable_latents else N,
                                    config.latent_dim)
    assert (output.posterior is not None) == name.startswith(("vae", "va-vae"))
    targets = {"ae": {}, "vae": {}, "va-vae": {}, "pixel": {}, "dinov2": {"dinov2-l": 1024},
               "siglip": {"siglip-l": 1024}}
    if name in ("combined", "maetok-b-256", "maetok-b-512"):
        targets[name] = {"hog": 108, "dinov2-l": 1024, "siglip-l": 1024}
    cells = (config.patch_size // config.hog_cell) ** 2                # of a patch; 9 bins, 3 channels each
    targets["maetok-b-256-released"] = {"hog": 108, "dinov2-l": 1024, "siglip-so400m": 1152}
    assert {target: tuple(features.shape[1:]) for target, features in output.aux.items()} == {
        target: (N, dim) for target, dim in targets.get(name, {"hog": cells * 27}).items()}


def test_paper_presets_are_table_7():
    config = Config(**PRESETS["maetok-b-256"])
    assert (config.image_size, config.width, config.heads, config.encoder_depth, config.decoder_depth,
            config.patch_size, config.num_latents, config.latent_dim) == (256, 768, 12, 12, 12, 16, 128, 32)
    assert (config.lr, config.weight_decay, config.beta1, config.beta2, config.batch_size, config.warmup,
            config.steps, config.stage2_steps) == (1e-4, 1e-4, 0.9, 0.95, 512, 10_000, 500_000, 50_000)
    assert (config.mask_low, config.mask_high, config.aux_depth, config.rope) == (0.4, 0.6, 3, "axial")
    assert (config.targets, config.aux_loss, config.percep_weight, config.disc, config.disc_weight,
            config.disc_start, config.lecam, config.diffaug, config.consistency) == (
        "hog,dinov2-l,siglip-l", "mse", 1.0, "dino", 0.4, 30_000, 1e-3, False, 0.0)
    assert Config(**PRESETS["maetok-b-512"]).image_size == 512
    assert ABLATIONS["mask-0-60"] == dict(mask_low=0.0, mask_high=0.6)


def test_imagenet64_is_the_size_that_its_times_are_computed_for():
    """docs/running.md has hours by these counts, of the model without its loss networks."""
    config = Config(**PRESETS["imagenet64"])
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model = MAETok(config)
        output = model(torch.empty(1, 3, 64, 64), torch.empty(1, 64, dtype=torch.bool))
        (output.reconstruction.sum() + output.aux["hog"].sum()).backward()
    assert sum(p.numel() for p in model.parameters()) == 48_239_564
    assert counter.get_total_flops() == pytest.approx(38.8e9, rel=1e-2)
    assert output.latents.shape == (1, 64, 32)


def test_imagenet64_trains_through_both_stages_with_one_layer_of_each(tmp_path):
    trainer.main(["--preset", "imagenet64", "--data", "shapes", "--encoder-depth", "1", "--decoder-depth",
                  "1", "--aux-depth", "1", "--percep-weight", "0", "--disc-start", "1", "--batch-size", "2",
                  "--steps", "2", "--stage2-steps", "1", "--log-every", "1", "--grid-every", "0",
                  "--eval-images", "2", "--latent-images", "4", "--device", "cpu", "--out", str(tmp_path)])
    last = checkpoints.read_metrics(tmp_path)[1]
    assert last["step"] == 2 and np.isfinite([last["recon"], last["hog"], last["disc"]]).all()
    assert maetok.load_tokenizer(tmp_path).config.num_latents == 64


def test_released_learning_rate_counts_the_cosine_from_step_zero():
    rate = lambda step: trainer.learning_rate(step, 500_400, 2e-4, 5004, 1e-5, 2e-5, cosine_from="start")
    assert rate(0) == pytest.approx(1e-5)                       # n / warmup: the first step has the start
    assert rate(2502) == pytest.approx((1e-5 + 2e-4) / 2)
    assert rate(250_200) == pytest.approx((2e-4 + 2e-5) / 2) and rate(500_400) == pytest.approx(2e-5)


def test_views_are_the_same_for_any_number_of_processes_and_new_at_every_call_and_step():
    config = trainer.Config(diffaug=True, image_size=32, targets="")
    whole = losses.draw_views(config, 7, 0, range(8), torch.device("cpu"))
    half = losses.draw_views(config, 7, 0, range(4, 8), torch.device("cpu"))
    for a, b in zip(whole, half, strict=True):
        assert (a.crop, a.augment) == (b.crop, b.augment) and torch.equal(a.amounts[4:], b.amounts)
    assert all(view.augment == (True, True, True) for view in whole[2:4])
    views = [v for step in range(200)
             for v in losses.draw_views(config, step, 0, range(1), torch.device("cpu"))]
    free = [view.augment for i, view in enumerate(views) if i % 5 not in (2, 3)]
    assert len(set(free)) == 8 and abs(np.mean(free) - 0.5) < 0.05         # each of the three by its own coin
    assert abs(np.mean([view.crop is None for view in views]) - 0.5) < 0.07
    assert len({view.amounts.sum().item() for view in views}) == len(views)


def test_learning_rate_warms_up_and_follows_a_cosine():
    rate = lambda step: trainer.learning_rate(step, steps=110, peak=1.0, warmup=10, start=0.1, end=0.2)
    assert abs(rate(0) - 0.19) < 1e-9 and abs(rate(9) - 1.0) < 1e-9 and abs(rate(10) - 1.0) < 1e-9
    assert abs(rate(60) - 0.6) < 1e-9 and abs(rate(110) - 0.2) < 1e-9


def test_stage_2_lowers_the_mask_ratio_from_60_percent_to_none():
    config = Config(**PRESETS["maetok-b-256"])
    ramp = [trainer.mask_range(config, 2, step) for step in (0, 24_999.5, 49_999)]
    np.testing.assert_allclose(ramp, [(0.6, 0.6), (0.3, 0.3), (0, 0)], atol=1e-9)
    assert trainer.mask_range(config, 1, 3) == (0.4, 0.6)


def test_released_mask_rate_is_one_a_step_from_the_cut_normal():
    config = Config(**PRESETS["maetok-b-256-released"])
    rates = [trainer.mask_range(config, 1, step) for step in range(2000)]
    assert all(low == high and 0.4 <= low <= 0.6 for low, high in rates)
    assert abs(np.mean(rates) - 0.505) < 0.005                       # FACTS: mean 0.505


def test_weight_decay_is_for_matrices_of_linear_layers_only():
    model = MAETok(Config(**PRESETS["shapes"] | dict(rope="mixed", ape="both", class_token=True)))
    optimizer = trainer.build_optimizer(Config(**PRESETS["maetok-b-256"]), model, torch.device("cpu"))
    decay, rest = optimizer.param_groups
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert decay["weight_decay"] == 1e-4 and {id(p) for p in decay["params"]} == linear
    assert rest["weight_decay"] == 0 and len(rest["params"]) + len(linear) == len(list(model.parameters()))


# ---------------------------------------------- the two stages ----------------------------------------------

def test_stage_2_trains_the_pixel_decoder_on_the_latents_of_stage_1(tmp_path):
    one = train(tmp_path, "--stage", "1")
    assert one["stage"] == 1 and one["step"] == 6 and any(k.startswith("aux_decoders") for k in one["model"])
    two = train(tmp_path)                                            # the same run goes on into stage 2
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
    with pytest.raises(UserError, match="is not finished"):
        train(tmp_path / "one", "--stage", "2")


def test_without_masking_the_auxiliary_decoders_learn_from_all_patches(tmp_path):
    state = train(tmp_path, "--preset", "no-mask", "--stage", "1")
    assert all(r["hog"] > 0 for r in checkpoints.read_metrics(tmp_path) if "hog" in r)
    torch.manual_seed(0)
    fresh = MAETok(Config(**state["config"] | {"aux_targets": {}})).state_dict()
    assert not torch.equal(state["model"]["aux_decoders.hog.head.weight"],
                           fresh["aux_decoders.hog.head.weight"])


def test_measurements_are_made_again_when_they_were_cut_short(tmp_path, monkeypatch, capsys):
    def unreadable(*args):
        raise UserError("a test image is broken")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="broken"):
        patch.setattr(trainer, "evaluate", unreadable)
        train(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)["step"] == 6                # stage 1 is safe
    maetok.load_tokenizer(tmp_path)
    assert "not measured yet" in capsys.readouterr().err
    state = train(tmp_path)
    assert state["step"] == 10 and state["measured"]
    assert [r["step"] for r in checkpoints.read_metrics(tmp_path) if "event" in r] == [6, 10]


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
    train(tmp_path, "--steps", "60", "--stage2-steps", "20", "--lr", "2e-3", "--grid-every", "40",
          "--save-every", "100")
    curve = logged_losses(tmp_path)
    assert np.mean(curve[50:60]) < 0.8 * np.mean(curve[:5])
    for name in ("grid_0000040.png", "grid_0000060.png", "grid_0000080.png", "loss.png"):
        assert min(Image.open(tmp_path / name).size) > 90
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 2e-3


@pytest.mark.parametrize("options",
                         [["--preset", "ae"], ["--preset", "vae-mask"], ["--preset", "image-latents"],
                          ["--preset", "aux-linear"], ["--preset", "ape"], ["--dtype", "bfloat16"],
                          ["--aux-loss", "cosine"],
                          ["--rope", "mixed", "--latent-modulation", "--class-token",
                           "--layer-scale", "1e-5", "--ape", "encoder", "--mask-draw", "normal"]])
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

@pytest.mark.slow
def test_ten_steps_equal_five_a_kill_and_five_bit_for_bit(tmp_path):
    options = ["--steps", "10", "--stage", "1"]
    assert run(command(tmp_path / "whole", *options)).returncode == 0
    process = subprocess.Popen(command(tmp_path / "killed", *options),
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed/step_0000005.pt").exists():
        assert process.poll() is None and time.time() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (checkpoints.find_checkpoint(tmp_path / "killed")["step"] == 5
            or (tmp_path / "killed/step_0000010.pt").exists())
    # should the kill have come too late: go back to 5
    for debris in (tmp_path / "killed").glob("step_0000010.pt"):
        debris.unlink()
        os.replace(tmp_path / "killed/step_0000005.pt", tmp_path / "killed/last.pt")
    assert run(command(tmp_path / "killed", *options)).returncode == 0
    a, b = (checkpoints.load_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert a["step"] == b["step"] == 10
    assert_same_weights(a, b)
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")


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
    monkeypatch.setattr(trainer, "auxiliary_loss", lambda config, name, prediction, *rest: (
        calls.append(name), prediction.mean() * (float("nan") if len(calls) == 12 else 1.0))[1])
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
        checkpoints.save_checkpoint(tmp_path, state, keep=3)
    assert (tmp_path / "last.pt").read_bytes() == before
    torch.save(dict(state), tmp_path / "last.pt")
    with pytest.raises(UserError, match="holds weights that are NaN or infinite"):
        if part == "ema":
            maetok.load_tokenizer(tmp_path)
        train(tmp_path, "--stage", "1")


# ------------------------------------------------ processes ------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("muon", ["0", "2"])
def test_two_processes_follow_one_and_may_change_in_number(tmp_path, muon):
    options = ["--steps", "20", "--stage2-steps", "4", "--save-every", "10", "--muon", muon]
    train(tmp_path / "one", *options)
    two = run(command(tmp_path / "two", *options, launcher=torchrun(2)))
    assert two.returncode == 0, two.stderr
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
    assert len(logged_losses(tmp_path / "one")) == 24
    # Started with two processes, gone on with one.
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
    (["--preset", "tiny"], "unknown preset tiny; there are: "),
    (["--image-size", "30"], "is not a multiple of patch_size"),
    (["--accumulate", "3"], "not divisible by"), (["--out", "a-file"], "a-file")])
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
        ("mask ratios", ["--mask-low", "0.9"]),
        ("which images", ["--preset", "maetok-b-256"]),
        ("no checkpoint at", ["--init", tmp_path / "nowhere"]),
        ("choose both or 1 or 2", ["--stage", "3"]),
        ("--steps: must be a whole number from 1 to", ["--steps", "-1"]),
        ("--stage2-lr: must be a number above 0", ["--stage2-lr", "0"]),
        ("--eval-images: must be a whole number from 1", ["--eval-images", "0"]),
        ("--stage2-mask: must be a number from 0 to 1", ["--stage2-mask", "1.5"]),
        ("mask ratios", ["--stage2-mask", "1"]),
        ("weights of another model", ["--heads", "1", "--stage", "2", "--init", tmp_path / "run"]),
        ("--device tpu", ["--device", "tpu"]),
    ]
    for message, options in cases:
        with pytest.raises(UserError, match=message) as e:
            train(tmp_path / "new", *map(str, options))
        assert "\n" not in str(e.value)
    assert (tmp_path / "run/last.pt").read_bytes() == before          # nothing lost


# ------------------------------------------- several image sizes -------------------------------------------

def test_steps_take_two_image_sizes_in_turn_and_the_tokenizer_runs_at_others(tmp_path, monkeypatch):
    seen, forward = [], MAETok.forward
    monkeypatch.setattr(MAETok, "forward", lambda self, images, *rest:
                        (seen.append(images.shape[-1]), forward(self, images, *rest))[1])
    train(tmp_path / "run", "--mixed-size", "24", "--steps", "4", "--stage2-steps", "2")
    trained = [size for size, before in zip(seen, [0, *seen]) if size != before]      # evaluation is at 16 px
    assert trained[:4] == [16, 24, 16, 24]
    tokenizer = maetok.load_tokenizer(tmp_path / "run")
    for size in ((16, 16), (24, 24), (32, 16)):
        latents = tokenizer.encode(torch.rand(2, 3, *size))
        assert latents.shape == (2, 4, 4) and tokenizer.decode(latents, size).shape == (2, 3, *size)
    with pytest.raises(UserError, match="multiple of the patch"):
        train(tmp_path / "bad", "--mixed-size", "18")


# ------------------------------------ perceptual and adversarial terms ------------------------------------

GAN = "--disc patch --disc-start 2 --diffaug --consistency 4".split()


def test_every_term_of_the_objective_is_logged_and_they_sum_to_the_loss(tmp_path):
    options = ("--targets hog,dinov2-s --disc patch --disc-start 2 --percep-weight 1 --percep-warmup 4 "
               "--disc-weight 0.4 --aux-weight 0.5 --variational --random-frozen --steps 5 --stage 1").split()
    train(tmp_path / "run", *options)
    for r in checkpoints.read_metrics(tmp_path / "run"):
        if "loss" in r:
            step = r["step"] - 1
            expected = (r["recon"] + min(1, step / 4) * r["percep"] + 0.5 * (r["hog"] + r["dinov2-s"])
                        + 1e-6 * r["kl"])
            assert ("adv" in r) == ("disc" in r) == ("lecam" in r) == (step >= 2)
            if step >= 2:
                expected += 0.4 * r["adaptive_weight"] * r["adv"]
            assert r["loss"] == pytest.approx(expected, rel=1e-4)


class Critic(torch.nn.Module):
    """Stands in for losses.Adversary: logits are weighted pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 8, 8))

    def look(self, images, view):
        return (images * self.weight).sum((1, 2, 3))


@pytest.mark.parametrize("step, gan, vae", [(3, True, False), (10, True, True), (0, False, True)])
def test_the_objective_is_the_weighted_sum_of_its_terms(step, gan, vae):
    """Eq. 6 and 8 with stand-ins for the networks: every term by hand, every weight another one."""
    config = Config(percep_weight=0.7, percep_warmup=6, disc_weight=0.3, aux_weight=0.25, kl_weight=0.01,
                    targets="hog", variational=vae)
    last_layer, critic = torch.randn(5, 8, requires_grad=True), Critic()
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 5)
    reconstruction = noise @ last_layer
    lpips = lambda a, b: (a - b).abs().mean((1, 2, 3)) + 1
    features, target = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    mask, loss_mask = torch.rand(2, 4) < 0.5, torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    posterior = torch.randn(2, 3, 4)
    batch = trainer.Batch(images, mask, loss_mask, torch.randn(2, 3, 2) if vae else None, {"hog": target},
                          [f"view {i}" for i in range(5)] if gan else None)
    output = maetok.MAETokOutput(reconstruction, None, {"hog": features}, posterior if vae else None)
    loss, terms = trainer.tokenizer_objective(config, step, batch, output,
                                              losses.Objective({}, lpips, critic), last_layer,
                                              torch.autocast("cpu", enabled=False))

    mse = (reconstruction - images).square().mean()
    percep = lpips(reconstruction, images).mean()
    expected = mse + 0.7 * min(1, step / 6) * percep
    by_hand = {"recon": mse, "percep": percep}
    if gan:
        adv = -(reconstruction * critic.weight.detach()).sum((1, 2, 3)).mean()
        norms = [torch.autograd.grad(part, last_layer, retain_graph=True)[0].norm()
                 for part in (expected, adv)]
        by_hand |= {"adv": adv, "adaptive_weight": norms[0] / (norms[1] + 1e-4)}
        expected = expected + 0.3 * by_hand["adaptive_weight"] * adv
    hidden = (features - target).square().mean(-1)
    by_hand["hog"] = ((hidden[0, 0] + hidden[0, 3]) / 2 + hidden[1, 1]) / 2
    expected = expected + 0.25 * by_hand["hog"]
    if vae:
        mean, logvar = posterior.chunk(2, -1)
        by_hand["kl"] = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 2
        expected = expected + 0.01 * by_hand["kl"]
    assert terms.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(terms[name].detach(), value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert critic.weight.grad is None and last_layer.grad.abs().sum() > 0 and features.grad.abs().sum() > 0


def test_frozen_networks_stay_as_they_are_and_out_of_the_checkpoint(tmp_path, monkeypatch):
    caught, build = {}, trainer.build_objective

    def catch(config, device):
        caught["objective"] = objective = build(config, device)
        caught["networks"] = [objective.teachers["dinov2-s"].network, objective.lpips.vgg,
                              objective.adversary.discriminator.frozen[0]]
        caught["before"] = [common.fingerprint(network) for network in caught["networks"]]
        return objective

    monkeypatch.setattr(trainer, "build_objective", catch)
    monkeypatch.setattr(losses.DinoDiscriminator, "SIZE", 32)
    state = train(tmp_path / "run", *"--targets hog,dinov2-s --disc dino --disc-start 0 --percep-weight 1 "
                                     "--random-frozen --steps 2 --stage2-steps 2".split())
    assert [common.fingerprint(network) for network in caught["networks"]] == caught["before"]
    assert all(not p.requires_grad and p.grad is None for n in caught["networks"] for p in n.parameters())
    stored = sum(tensor.numel() for name, tensor in state["adversary"].items()
                 if not name.endswith(("_ema", "._u", "._v")))
    assert stored == 7_386_245                                         # the heads, and nothing of DINO
    monkeypatch.undo()
    assert state["model"].keys() == train(tmp_path / "plain", "--stage2-steps", "2")["model"].keys()


@pytest.mark.slow
def test_the_discriminators_step_leaves_the_tokenizer_alone_and_the_reverse(tmp_path):
    run = lambda name, *options: train(tmp_path / name, "--steps", "1", "--stage", "1", *options)
    without, silent, loud = (run("a", "--disc", "none"),
                             run("b", "--disc", "patch", "--disc-start", "0", "--disc-weight", "0"),
                             run("c", "--disc", "patch", "--disc-start", "0", "--disc-weight", "5"))
    assert_same_weights(without, silent)
    weight = "decoder.head.weight"
    assert not torch.equal(silent["model"][weight], loud["model"][weight])     # L_adv reaches the decoder ...
    for name, tensor in silent["adversary"].items():                           # ... and not the discriminator
        assert torch.equal(tensor, loud["adversary"][name]), name


def test_resuming_with_the_gan_is_exact(tmp_path):
    whole = train(tmp_path / "whole", *GAN)
    train(tmp_path / "parts", *GAN, "--save-every", "3", "--stage", "1")
    os.replace(tmp_path / "parts" / "step_0000003.pt", tmp_path / "parts" / "last.pt")
    for rest in (tmp_path / "parts").glob("step_*.pt"):
        rest.unlink()
    parts = train(tmp_path / "parts", *GAN)
    assert_same_weights(whole, parts)
    for name, tensor in whole["adversary"].items():
        assert torch.equal(tensor, parts["adversary"][name]), name
    assert whole["adversary"]["lecam.real_ema"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("disc", ["patch", "dino"])
def test_the_gan_runs_in_bfloat16(tmp_path, monkeypatch, disc):
    monkeypatch.setattr(losses.DinoDiscriminator, "SIZE", 32)
    state = train(tmp_path / disc, *GAN, "--disc", disc, "--random-frozen", "--dtype", "bfloat16")
    assert state["step"] == 10 and state["adversary"]["lecam.real_ema"].dtype == torch.float32
    assert np.isfinite(logged_losses(tmp_path / disc)).all()


@pytest.mark.slow
def test_stage_2_from_another_run_takes_its_discriminator_along(tmp_path, monkeypatch):
    first = train(tmp_path / "first", *GAN, "--stage", "1")
    taken, start = {}, trainer.start_from

    def spy(config, model, adversary, path):
        start(config, model, adversary, path)
        taken.update({name: tensor.clone() for name, tensor in adversary.state_dict().items()})

    monkeypatch.setattr(trainer, "start_from", spy)
    train(tmp_path / "second", *GAN, "--stage", "2", "--init", str(tmp_path / "first"))
    assert taken.keys() == first["adversary"].keys()
    assert all(torch.equal(tensor, first["adversary"][name]) for name, tensor in taken.items())


@pytest.mark.slow
@pytest.mark.parametrize("disc", ["patch", "dino"])
def test_two_processes_with_the_gan_equal_one(tmp_path, disc):
    """Synchronised batch norm, one adaptive weight, one LeCAM average: 10 steps, every term to 1e-4.

    After the first three adversarial steps the adaptive weight to 1e-3: it divides two gradients' norms, and
    Adam, which divides by the gradient's size, makes whole steps of rounding where gradients are next to 0.
    By dino's step 8 the two are 2.6e-4 apart with AVX2, 0.3e-4 with AVX-512; by step 5 4e-5 at most.

    With a smooth activation: now and then a value lies so near LeakyReLU's kink that float32's
    rounding, which differs with processor and number of processes, puts it on the other side, and the
    gradient changes by 1e-3.
    """
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import common, losses, train_tokenizer\n"
                      "from frozen.pretrained import ViTConfig, VisionTransformer\n"
                      "losses.nn.LeakyReLU = lambda slope: losses.nn.SiLU()\n"
                      "losses.DinoDiscriminator.SIZE = 32\n"                # 224 px would take minutes
                      "losses.load_vit = lambda *args, **options: VisionTransformer(\n"
                      "    ViTConfig(32, 12, 2, 16, 14), 16).eval().requires_grad_(False)\n"
                      "common.run(train_tokenizer.main)\n")
    options = [*TINY, *GAN, "--disc", disc, "--steps", "10", "--stage", "1"]
    for name, launcher in (("one", []), ("two", torchrun(2))):
        done = run([sys.executable, *launcher, str(script), *options, "--out", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
    one, two = (checkpoints.read_metrics(tmp_path / name) for name in ("one", "two"))
    terms = ("loss", "recon", "hog", "adv", "adaptive_weight", "disc", "lecam", "consistency")
    for a, b in zip(one, two, strict=True):
        for term in terms:
            if term in a:
                near = 1e-3 if term == "adaptive_weight" and a["step"] > 5 else 1e-4
                assert a[term] == pytest.approx(b[term], rel=near, abs=1e-5), (a["step"], term)
    assert "adv" in one[2]


@pytest.mark.slow
def test_a_missing_weight_file_is_one_line(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                # nobody listens: as without a network
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    done = run(command(tmp_path / "run", "--disc", "dino", "--weights-dir", tmp_path / "weights"))
    assert done.returncode == 2
    assert "dino_deitsmall16_pretrain.pth" in done.stderr.splitlines()[-1]



# ------------------------------------------- speed and memory -------------------------------------------

def test_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(losses.DinoDiscriminator, "SIZE", 32)
    monkeypatch.setattr(losses, "load_vit", lambda *args, **options: VisionTransformer(
        ViTConfig(32, 12, 2, 16, 14), 16).eval().requires_grad_(False))                    # a narrow DINO
    options = ("--disc dino --disc-start 1 --percep-weight 1 --percep-warmup 2 "
               "--random-frozen --steps 3 --stage2-steps 1 --batch-size 4 --accumulate 2 "
               "--eval-images 2").split()
    plain = train(tmp_path / "plain", *options)
    calls, block = [], maetok.Block.forward
    monkeypatch.setattr(maetok.Block, "forward",
                        lambda self, *x: (calls.append(self.training), block(self, *x))[1])
    less = train(tmp_path / "less", *options, "--checkpointing")
    assert logged_losses(tmp_path / "plain") == logged_losses(tmp_path / "less")
    assert_same_weights(plain, less)
    assert all(torch.equal(plain["adversary"][k], less["adversary"][k]) for k in plain["adversary"])
    # Two micro-batches a step. Stage 1: encoder, decoder and auxiliary decoder of one block, twice each;
    # stage 2: the decoder twice, the frozen encoder once.
    assert sum(calls) == 2 * (3 * 3 * 2 + 1 * (2 + 1))


@pytest.mark.slow
def test_checkpointing_in_two_processes_with_the_gan(tmp_path):
    options = [*GAN, "--accumulate", "2", "--steps", "5", "--stage", "1"]
    train(tmp_path / "one", *options)
    two = run(command(tmp_path / "two", *options, "--checkpointing", launcher=torchrun(2)))
    assert two.returncode == 0, two.stderr
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-3)


def test_averaged_weights_on_another_device_end_in_the_same_checkpoint(tmp_path, monkeypatch):
    near = train(tmp_path / "near", "--grid-every", "3")
    monkeypatch.setattr(common.EMA, "on", lambda self, device: copy.deepcopy(self.model))    # as from a CPU
    far = train(tmp_path / "far", "--grid-every", "3", "--ema-device", "cpu")
    assert_same_weights(near, far)
    assert far["ema"]["latent_std"] != 1


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading a number, and sizes that depend on values."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select",
                                                           "is_nonzero", "equal")
        return function(*args, **kwargs or {})


def test_a_step_never_reads_a_number_back(tmp_path, monkeypatch):
    """As many reads in 7 steps as in 4: those of logging, saving and measuring, once a stage."""
    counts = []
    for steps in (4, 7):
        with CountReads() as mode:
            train(tmp_path / str(steps), *GAN, "--variational", "--steps", str(steps), "--stage", "1",
                  "--log-every", "100", "--save-every", "100")
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("less", [[], ["--checkpointing", "--ema-device", "cpu"]])
def test_cuda_bfloat16_and_compile(tmp_path, less):
    state = train(tmp_path, "--device", "cuda", "--dtype", "bfloat16", "--compile", *less)
    assert state["step"] == 10 and np.isfinite(logged_losses(tmp_path)).all()
