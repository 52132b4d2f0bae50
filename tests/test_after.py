"""Extensions from after the paper (docs/after.md): each is off by default, does what its name says, and resumes.

One section for each; deleting an extension deletes its section.
"""
import json

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
import sit
import train_diffusion
import train_tokenizer
from after.nested_dropout import draw_lengths, keep_first, possible_lengths
from after.time_shift import shift_of, shift_times
from common import UserError
from data import build_dataset, some_images, to_float, to_uint8

TOKENIZER = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 --aux-depth "
             "1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 4 --stage2-steps 2 --warmup 2 "
             "--stage2-warmup 1 --log-every 1 --save-every 1000 --grid-every 0 --eval-images 16 "
             "--latent-images 64 --device cpu").split()


def tokenize(out, *options):
    train_tokenizer.main([*TOKENIZER, "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def streams(count, name="test"):
    return [common.sample_rng(0, name, 0, i) for i in range(count)]


def test_images(count=64):
    return to_float(torch.cat([images for images, *_ in some_images(build_dataset("shapes", "test", 16), count)]))


test_images.__test__ = False

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenize(folder)
    return folder


DIFFUSION = ("--width 32 --depth 2 --heads 2 --cache-images 40 --batch-size 8 --steps 6 --warmup 2 --log-every 1 "
             "--save-every 1000 --grid-every 0 --device cpu").split()


def diffuse(out, tokenizer, *options):
    train_diffusion.main([*DIFFUSION, "--tokenizer", str(tokenizer), "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def draw(run, out, *options):
    sample.main(["--ckpt", str(run), "--num", "4", "--steps", "4", "--device", "cpu", "--out", str(out),
                 *map(str, options)])
    return np.load(out)["arr_0"].astype(int)


def losses(out):
    return [r["loss"] for r in checkpoints.read_metrics(out)]


# ---------------------------------------------- latent noise ----------------------------------------------

def test_latent_noise_is_half_normal_over_images_and_an_images_own():
    from after.latent_noise import draw_noise
    noise = draw_noise(streams(400), (16, 8), 0.8)
    sigmas = noise.std((1, 2))
    # |N(0, s^2)| has mean s sqrt(2/pi) and median 0.674 s: one sigma for all images would have both equal.
    assert abs(sigmas.mean() - 0.8 * (2 / np.pi) ** 0.5) < 0.08 and abs(sigmas.median() - 0.674 * 0.8) < 0.08
    assert torch.equal(noise[5:7], draw_noise(streams(7)[5:], (16, 8), 0.8))


def test_latent_noise_changes_stage_2_alone_and_makes_the_decoder_bear_it(tmp_path):
    options = ["--steps", 100, "--stage2-steps", 200, "--lr", 3e-3, "--stage2-lr", 3e-3]
    exact, noisy = (tokenize(tmp_path / strength, *options, "--latent-noise", strength) for strength in "01")
    records = [[r["recon"] for r in checkpoints.read_metrics(tmp_path / name) if "recon" in r] for name in "01"]
    assert records[0][:100] == records[1][:100] and records[0][101] < records[1][101]
    images, errors = test_images(), {}
    noise = torch.randn(len(images), 4, 4, generator=torch.Generator().manual_seed(0))
    for name, state in (("exact", exact), ("noisy", noisy)):
        model = maetok.tokenizer_of(state, name)
        assert all(torch.equal(w, exact["ema"][f"encoder.{k}"]) for k, w in model.encoder.state_dict().items())
        z = model.encode(images, normalize=True)
        errors[name] = [(model.decode(x, normalized=True) - images).square().mean().item() for x in (z, z + noise)]
    # What noise adds to the error; measured: 0.5 and 0.6 times as much, with two seeds.
    added = {name: with_noise - without for name, (without, with_noise) in errors.items()}
    assert 0 < added["noisy"] < 0.85 * added["exact"]


# ----------------------------------------------- time shift -----------------------------------------------

def test_shifted_times_have_shifted_odds_of_noise_to_data():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    shifted = shift_times(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))
    torch.testing.assert_close(shift_times(shifted, 1 / 3.0), t)
    # LightningDiT counts time from noise to data: its 0.3 is our 1 / 0.3.
    torch.testing.assert_close(1 - shift_times(1 - t, 0.3), shift_times(t, 1 / 0.3))
    # MAETok's latents are as large as RAE's base; four times as many values double the shift.
    assert shift_of(sit.SiTConfig(time_shift=0)) == 1
    assert shift_of(sit.SiTConfig(time_shift=0, latent_dim=128)) == 2
    assert shift_of(sit.SiTConfig(latent_dim=128)) == 1 and shift_of(sit.SiTConfig(time_shift=3)) == 3


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_shifted_samplers_spend_their_steps_near_the_noise_and_still_end_at_the_data(sampler):
    plain, shifted = (flow.sampling_times(sampler, 20, shift) for shift in (1.0, 4.0))
    assert len(plain) == len(shifted) and shifted[0] == 1
    assert np.median(shifted) > 0.7 > np.median(plain)
    if sampler == "euler-maruyama":
        assert shifted[-1] == pytest.approx(0.04)             # from there one step to 0 without noise: a short one
    # Data N(0, 1/4) on the linear path: the velocity is known and leads from N(0, 1) to N(0, 1/4).
    velocity = lambda x, t, **_: (t - (1 - t) / 4) / (t * t + (1 - t) ** 2 / 4) * x
    x = torch.randn(400, 4, 2, generator=torch.Generator().manual_seed(0))
    run = {"euler": flow.euler, "heun": flow.heun, "euler-maruyama": flow.euler_maruyama}[sampler]
    assert run(velocity, x, 100, shift=4.0).std() == pytest.approx(0.5, rel=0.1)


def test_time_shift_trains_on_shifted_times_and_samples_alike(tmp_path, tokenizer):
    diffuse(tmp_path / "plain", tokenizer)
    state = diffuse(tmp_path / "shifted", tokenizer, "--time-shift", 8)
    counts = [[sum(n is not None for n in r["loss_t"][:5]) for r in checkpoints.read_metrics(tmp_path / name)]
              for name in ("plain", "shifted")]
    assert sum(counts[1]) < sum(counts[0])                                   # fewer steps had a time below 1/2
    assert state["config"]["time_shift"] == 8
    own, plain, again = (draw(tmp_path / "shifted", tmp_path / f"{n}.npz", "--sampler", "euler", *options) for
                         n, options in enumerate(([], ["--time-shift", 1], ["--time-shift", 8])))
    assert np.array_equal(own, again) and np.abs(own - plain).max() > 0
    # An older checkpoint knows no shift: none is its shift.
    del state["config"]["time_shift"]
    torch.save(dict(state), tmp_path / "old.pt")
    assert shift_of(sit.load_diffusion(tmp_path / "old.pt")[0].config) == 1


# ---------------------------------------------- x-prediction ----------------------------------------------

@pytest.mark.parametrize("name", ["sit", "lightningdit", "usit"])
def test_x_prediction_turns_the_data_into_the_velocity_down_to_its_clip(name):
    build, config = sit.model_classes(name)
    model = build(config(num_latents=3, latent_dim=2, width=16, depth=2, heads=2, x_prediction=True))
    x, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    last = model.linear if name == "usit" else model.final_layer.linear
    last.register_forward_hook(lambda module, inputs, output: x)                 # a model that knows the data
    t, y = torch.tensor([0.9, 0.3, 0.06, 0.01]), torch.zeros(4, dtype=torch.int64)
    x_t, v = flow.interpolate(x, noise, t)
    found = model(x_t, t, y)
    torch.testing.assert_close(found[:3], v[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[3], v[3] * 0.01 / 0.05, rtol=1e-3, atol=1e-4)     # not 1 / 0.01 of its errors


def test_x_prediction_trains_samples_and_wants_the_linear_path(tmp_path, tokenizer):
    state = diffuse(tmp_path / "run", tokenizer, "--x-prediction", "--steps", 60, "--lr", 3e-3)
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:3])
    assert state["config"]["x_prediction"] and sit.load_diffusion(tmp_path / "run")[0].config.x_prediction
    draw(tmp_path / "run", tmp_path / "x.npz", "--cfg", 2)
    # A new model answers 0, the mean of the data: v = x_t / t and not 0, so the first loss tells the two apart.
    diffuse(tmp_path / "plain", tokenizer, "--steps", 1)
    assert losses(tmp_path / "plain")[0] != curve[0]
    with pytest.raises(UserError, match="linear path, not --path cosine"):
        diffuse(tmp_path / "cosine", tokenizer, "--x-prediction", "--path", "cosine")


# --------------------------------------------- nested dropout ---------------------------------------------

def test_lengths_are_powers_of_two_equally_often_and_zero_what_comes_after():
    assert possible_lengths(6) == [1, 2, 4, 6] and possible_lengths(8) == [1, 2, 4, 8]
    counts = torch.bincount(draw_lengths(streams(2000), 8), minlength=9)
    assert counts.sum() == counts[[1, 2, 4, 8]].sum() and counts[[1, 2, 4, 8]].min() > 420
    h = torch.randn(3, 4, 2)
    kept = keep_first(h, torch.tensor([1, 4, 2]))
    assert torch.equal(kept[1], h[1]) and torch.equal(kept[0, :1], h[0, :1]) and (kept[0, 1:] == 0).all()
    assert torch.equal(kept[2, :2], h[2, :2]) and (kept[2, 2:] == 0).all()


def test_nested_dropout_makes_few_tokens_worth_more(tmp_path, capsys):
    options = ["--steps", 300, "--stage2-steps", 1, "--lr", 3e-3, "--mask-low", 0, "--mask-high", 0]
    psnr = {}
    for name, more in (("plain", []), ("nested", ["--nested-dropout"])):
        tokenize(tmp_path / name, *options, *more)
        evaluate.main(["lengths", str(tmp_path / name), "--num-images", "64", "--device", "cpu"])
        rows = json.loads((tmp_path / name / "lengths.json").read_text())["rows"]
        assert [(row["tokens"], row["values"]) for row in rows] == [(1, 4), (2, 8), (4, 16)]
        psnr[name] = [row["psnr"] for row in rows]
    assert psnr["nested"][0] > psnr["plain"][0] + 0.7       # measured: 1.4 and 2.5, with two seeds
    whole = maetok.load_tokenizer(tmp_path / "nested").reconstruct(test_images())
    found = metrics.psnr(to_uint8(test_images()), to_uint8(whole)).mean()
    assert psnr["nested"][-1] == pytest.approx(found.item(), abs=1e-3)        # all tokens: as ever
    assert Image.open(tmp_path / "nested" / "lengths.png").height > 4 * 90
    assert "rate in latent values" in capsys.readouterr().out


def test_nested_dropout_is_for_latents_without_a_place(tmp_path):
    with pytest.raises(UserError, match="--nested-dropout orders learnable latents"):
        tokenize(tmp_path, "--nested-dropout", "--no-learnable-latents")
