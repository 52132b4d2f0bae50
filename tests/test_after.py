"""Extensions from after the paper (docs/after.md), of after/ and variants/repa.py: each does what its name
says, attaches with --add, and resumes.

One section for each, with its own imports; deleting an extension deletes its section.
"""
import argparse
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from random_frozen import use_random_networks

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
from common import UserError
from data import build_dataset, some_images, to_float, to_uint8
from losses import build_adversary

TOKENIZER = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 "
             "--aux-depth 1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 4 "
             "--stage2-steps 2 --warmup 2 --stage2-warmup 1 --log-every 1 --save-every 1000 "
             "--device cpu").split()


def tokenize(out, *options):
    train_tokenizer.main([*TOKENIZER, "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def streams(count, name="test"):
    return [common.sample_rng(0, name, 0, i) for i in range(count)]


def test_images(count=64):
    return to_float(torch.cat([images for images, *_
                               in some_images(build_dataset("shapes", "test", 16), count)]))


test_images.__test__ = False


def attached(names, **config):
    """A new diffusion model with these extras."""
    kind = common.attach(sit.Diffusion, names)
    return kind.Model(kind.Config(**config))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenize(folder)
    return folder


@pytest.fixture
def random_networks(monkeypatch):
    use_random_networks(monkeypatch.setattr)


DIFFUSION = ("--width 32 --depth 2 --heads 2 --cache-images 40 --batch-size 8 --steps 6 --warmup 2 "
             "--log-every 1 --save-every 1000 --device cpu").split()


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

from after.latent_noise import draw_noise  # noqa: E402


def test_latent_noise_is_half_normal_over_images_and_an_images_own():
    noise = draw_noise(streams(400), (16, 8), 0.8)
    sigmas = noise.std((1, 2))
    # |N(0, s^2)| has mean s sqrt(2/pi) and median 0.674 s: one sigma for all images would have both equal.
    assert abs(sigmas.mean() - 0.8 * (2 / np.pi) ** 0.5) < 0.08 and abs(sigmas.median() - 0.674 * 0.8) < 0.08
    assert torch.equal(noise[5:7], draw_noise(streams(7)[5:], (16, 8), 0.8))


@pytest.mark.slow
def test_latent_noise_changes_stage_2_alone_and_makes_the_decoder_bear_it(tmp_path):
    options = ["--steps", 100, "--stage2-steps", 200, "--lr", 3e-3, "--stage2-lr", 3e-3]
    options += ["--add", "latent_noise", "--latent-noise"]
    exact, noisy = (tokenize(tmp_path / strength, *options, strength) for strength in "01")
    assert noisy["add"] == []                                              # the checkpoint needs no extra
    records = [[r["recon"] for r in checkpoints.read_metrics(tmp_path / name) if "recon" in r]
               for name in "01"]
    assert records[0][:100] == records[1][:100] and records[0][101] < records[1][101]
    images, errors = test_images(), {}
    noise = torch.randn(len(images), 4, 4, generator=torch.Generator().manual_seed(0))
    for name, state in (("exact", exact), ("noisy", noisy)):
        model = maetok.tokenizer_of(state, name)
        assert all(torch.equal(w, exact["ema"][f"encoder.{k}"])
                   for k, w in model.encoder.state_dict().items())
        z = model.encode(images, normalize=True)
        errors[name] = [(model.decode(x, normalized=True) - images).square().mean().item()
                        for x in (z, z + noise)]
    # What noise adds to the error; measured: 0.5 and 0.6 times as much, with two seeds.
    added = {name: with_noise - without for name, (without, with_noise) in errors.items()}
    assert 0 < added["noisy"] < 0.85 * added["exact"]


# ----------------------------------------------- time shift -----------------------------------------------

from after.time_shift import shift_of, shift_times  # noqa: E402


@pytest.mark.parametrize("names", ["released,mean_flow", "mean_flow,released", "released,guidance_free",
                                   "usit,released", "usit,lightningdit", "lightningdit,usit", "muon,muon"])
def test_extras_that_do_not_go_together_are_refused(names):
    with pytest.raises(UserError, match="--add (released|mean_flow)|two models|named twice"):
        common.parse_config(*(lambda kind: (kind.Config, kind.PRESETS, [*kind.PRESETS], ""))(
            common.attach_named(train_diffusion.Method, ["--add", names])), ["--add", names])


def test_shifted_times_have_shifted_odds_of_noise_to_data():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    shifted = shift_times(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))
    torch.testing.assert_close(shift_times(shifted, 1 / 3.0), t)
    # LightningDiT counts time from noise to data: its 0.3 is our 1 / 0.3.
    torch.testing.assert_close(1 - shift_times(1 - t, 0.3), shift_times(t, 1 / 0.3))
    # MAETok's latents are as large as RAE's base; four times as many values double the shift.
    config = common.attach(sit.Diffusion, ["time_shift"]).Config
    assert shift_of(config()) == 1 and shift_of(config(latent_dim=128)) == 2
    assert shift_of(config(latent_dim=128, time_shift=3)) == 3


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_shifted_samplers_spend_their_steps_near_the_noise_and_still_end_at_the_data(sampler):
    small = dict(num_latents=2, latent_dim=2, width=16, depth=1, heads=2)
    model = attached(["time_shift"], **small, time_shift=4.0)
    plain, shifted = (flow.state_times(m, sampler, 20)[:-1] for m in (sit.SiT(sit.SiTConfig(**small)), model))
    assert len(plain) == len(shifted) and shifted[0] == 1
    assert np.median(shifted) > 0.7 > np.median(plain)
    if sampler == "euler-maruyama":
        assert shifted[-1] == pytest.approx(0.04)        # from there one step to 0 without noise: a short one
    # Data N(0, 1/4) on the linear path: the velocity is known and leads from N(0, 1) to N(0, 1/4).
    velocity = lambda x, t, **_: (t - (1 - t) / 4) / (t * t + (1 - t) ** 2 / 4) * x
    x = torch.randn(400, 4, 2, generator=torch.Generator().manual_seed(0))
    found = model.samplers[sampler](velocity, x, flow.state_times(model, sampler, 100))
    assert found.std() == pytest.approx(0.5, rel=0.1)


def test_time_shift_trains_on_shifted_times_and_samples_alike(tmp_path, tokenizer):
    diffuse(tmp_path / "plain", tokenizer)
    state = diffuse(tmp_path / "shifted", tokenizer, "--add", "time_shift", "--time-shift", 8)
    counts = [[sum(n is not None for n in r["loss_t"][:5]) for r in checkpoints.read_metrics(tmp_path / name)]
              for name in ("plain", "shifted")]
    assert sum(counts[1]) < sum(counts[0])                                  # fewer steps had a time below 1/2
    assert state["config"]["time_shift"] == 8
    shift = lambda s: ["--add", "time_shift", "--time-shift", s]
    own, plain, again = (draw(tmp_path / "shifted", tmp_path / f"{n}.npz", "--sampler", "euler", *options)
                         for n, options in enumerate(([], shift(1), shift(8))))
    assert np.array_equal(own, again) and np.abs(own - plain).max() > 0
    # A model that was trained without a shift can be sampled with one.
    plain, shifted = (draw(tmp_path / "plain", tmp_path / f"{n}.npz", "--sampler", "euler", *options)
                      for n, options in enumerate(([], shift(8)), 3))
    assert np.abs(shifted - plain).max() > 0


# ---------------------------------------------- x-prediction ----------------------------------------------

@pytest.mark.parametrize("name", ["sit", "lightningdit", "usit"])
def test_x_prediction_turns_the_data_into_the_velocity_down_to_its_clip(name):
    extras = ["x_prediction"] if name == "sit" else [name, "x_prediction"]
    model = attached(extras, num_latents=3, latent_dim=2, width=16, depth=2, heads=2)
    x, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    last = model.linear if name == "usit" else model.final_layer.linear
    last.register_forward_hook(lambda module, inputs, output: x)                 # a model that knows the data
    t, y = torch.tensor([0.9, 0.3, 0.06, 0.01]), torch.zeros(4, dtype=torch.int64)
    x_t, v = flow.interpolate(x, noise, t)
    found = model(x_t, t, y)
    torch.testing.assert_close(found[:3], v[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[3], v[3] * 0.01 / 0.05,                      # not 1 / 0.01 of its errors
                               rtol=1e-3, atol=1e-4)


def test_x_prediction_trains_samples_and_wants_the_linear_path(tmp_path, tokenizer):
    state = diffuse(tmp_path / "run", tokenizer, "--add", "x_prediction", "--steps", 60, "--lr", 3e-3)
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:3])
    assert state["add"] == ["x_prediction"]
    draw(tmp_path / "run", tmp_path / "x.npz", "--cfg", 2)
    # A new model answers 0, the mean of the data: v = x_t / t and not 0,
    # so the first loss tells the two apart.
    diffuse(tmp_path / "plain", tokenizer, "--steps", 1)
    assert losses(tmp_path / "plain")[0] != curve[0]
    with pytest.raises(UserError, match="linear path, not --path cosine"):
        diffuse(tmp_path / "cosine", tokenizer, "--add", "x_prediction", "--path", "cosine")


# --------------------------------------------- nested dropout ---------------------------------------------

from after.nested_dropout import draw_lengths, keep_first, possible_lengths  # noqa: E402


def test_lengths_are_powers_of_two_equally_often_and_zero_what_comes_after():
    assert possible_lengths(6) == [1, 2, 4, 6] and possible_lengths(8) == [1, 2, 4, 8]
    counts = torch.bincount(draw_lengths(streams(2000), 8), minlength=9)
    assert counts.sum() == counts[[1, 2, 4, 8]].sum() and counts[[1, 2, 4, 8]].min() > 420
    h = torch.randn(3, 4, 2)
    kept = keep_first(h, torch.tensor([1, 4, 2]))
    assert torch.equal(kept[1], h[1]) and torch.equal(kept[0, :1], h[0, :1]) and (kept[0, 1:] == 0).all()
    assert torch.equal(kept[2, :2], h[2, :2]) and (kept[2, 2:] == 0).all()


@pytest.mark.slow
def test_nested_dropout_makes_few_tokens_worth_more(tmp_path, capsys):
    options = ["--steps", 300, "--stage2-steps", 1, "--lr", 3e-3, "--mask-low", 0, "--mask-high", 0]
    psnr = {}
    for name, more in (("plain", []), ("nested", ["--add", "nested_dropout"])):
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
    with pytest.raises(UserError, match="--add nested_dropout orders learnable latents"):
        tokenize(tmp_path, "--add", "nested_dropout", "--no-learnable-latents")


def test_each_image_of_a_batch_is_decoded_from_its_own_length(tmp_path):
    kind = common.attach(maetok.Tokenizer, ["nested_dropout"])
    model = kind.Model(kind.Config(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1,
                                   decoder_depth=1, num_latents=4, latent_dim=4))
    images, lengths = torch.randn(3, 3, 16, 16), torch.tensor([4, 1, 2])
    output, whole = model(images, lengths=lengths), model(images)
    assert torch.equal(output.latents, keep_first(whole.latents, lengths))
    torch.testing.assert_close(output.reconstruction, model.decode(output.latents))


def test_the_order_of_add_is_the_order_of_what_is_done_to_the_latents():
    latents, noise, lengths = torch.randn(2, 4, 4), torch.randn(2, 4, 4), torch.tensor([1, 2])
    for names in (["nested_dropout", "latent_noise"], ["latent_noise", "nested_dropout"]):
        kind = common.attach(maetok.Tokenizer, names)
        model = kind.Model(kind.Config(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1,
                                       decoder_depth=1, num_latents=4, latent_dim=4))
        found = model.decode_all(latents, (4, 4), added=noise, lengths=lengths).latents
        noisy_first = names[-1] == "latent_noise"                        # the last name is asked first
        expected = (keep_first(latents + noise, lengths) if noisy_first
                    else keep_first(latents, lengths) + noise)
        assert torch.equal(found, expected)


# ------------------------------------------------ MeanFlow ------------------------------------------------

from after.mean_flow import adaptive_weights, draw_spans, mean_flow_target  # noqa: E402


class GaussianAverage(torch.nn.Module):
    """The average velocity of data N(0, s^2), in closed form: x_t is N(0, a(t)^2),
    and the flow keeps x / a(t)."""
    s = 0.5

    def deviation(self, t):
        return (self.s ** 2 * (1 - t) ** 2 + t ** 2).sqrt()

    def forward(self, x, t, y, span):
        end = x * (self.deviation(t - span) / self.deviation(t))[:, None, None]
        return (x - end) / span[:, None, None]


def test_the_mean_flow_target_of_the_true_average_velocity_is_itself():
    model, t = GaussianAverage(), torch.rand(50, dtype=torch.float64) * 0.6 + 0.4
    span, x = t * torch.rand(50, dtype=torch.float64).clamp(0.1), torch.randn(50, 3, 2, dtype=torch.float64)
    v = ((t - model.s ** 2 * (1 - t)) / model.deviation(t) ** 2)[:, None, None] * x     # of the marginal flow
    target = mean_flow_target(model, x, v, t, None, span).double()
    torch.testing.assert_close(target, model(x, t, None, span), rtol=1e-4, atol=1e-5)     # it returns float32
    assert (target - v).abs().max() > 0.1                                                 # no matter of r = t


def test_the_derivative_of_a_sit_is_that_of_finite_differences():
    model = attached(["mean_flow"], num_latents=3, latent_dim=2, width=16, depth=2, heads=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, v, y = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.zeros(4, dtype=torch.int64)
    t, span = torch.tensor([0.9, 0.7, 0.5, 0.3]), torch.tensor([0.9, 0.2, 0.0, 0.1])
    found = (v - mean_flow_target(model, x, v, t, y, span)) / span.clamp(min=1e-9)[:, None, None]
    ahead, behind = (model(x + h * v, t + h, y, span=span + h) for h in (1e-2, -1e-2))
    slope = (ahead - behind) / 2e-2
    for i in (0, 1, 3):
        assert (found[i] - slope[i]).norm() < 0.05 * slope[i].norm()
    assert torch.equal(mean_flow_target(model, x, v, t, y, span)[2], v[2])              # r = t: flow matching
    assert (model(x, t, y, span=span) - model(x, t, y))[[0, 1, 3]].abs().amax((1, 2)).min() > 1e-4


def test_spans_are_ordered_and_apart_in_their_part():
    t, other = torch.rand(4000), torch.rand(4000)
    later, span = draw_spans(torch.rand(4000) < 0.25, t, other)
    apart = span > 0
    assert abs(apart.float().mean() - 0.25) < 0.03 and torch.equal(later[~apart], t[~apart])
    assert torch.equal(later[apart], torch.maximum(t, other)[apart]) and (later - span > -1e-6).all()


@pytest.mark.slow
def test_one_step_of_mean_flow_finds_the_modes_where_one_of_euler_finds_their_mean():
    distances = {}
    for part in (0.0, 0.75):
        torch.manual_seed(0)
        model = attached(["mean_flow"], num_latents=2, latent_dim=2, width=32, depth=1, heads=2,
                         num_classes=0)
        optimizer, y = (torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)),
                        torch.zeros(64, dtype=torch.int64))
        for step in range(250):                                         # data: all 2 or all -2, deviation 0.1
            common.set_learning_rate(optimizer, 5e-3 * (1 - step / 250))
            rngs = [common.sample_rng(0, "test", step, i) for i in range(64)]
            x = torch.randint(0, 2, (64, 1, 1)) * 4.0 - 2 + 0.1 * torch.randn(64, 2, 2)
            t, other = flow.sample_times(rngs), flow.sample_times(rngs)
            t, span = draw_spans(torch.tensor([rng.random() < part for rng in rngs]), t, other)
            x_t, v = flow.interpolate(x, torch.randn(64, 2, 2), t)
            target = mean_flow_target(model, x_t, v, t, y, span) if part else v
            losses = flow.flow_matching_loss(model(x_t, t, y, span=span), target)
            (losses * adaptive_weights(losses) if part else losses).mean().backward()
            common.optimizer_step(optimizer, 1.0)
        velocity = model.eval().velocity(torch.zeros(200, dtype=torch.int64))
        sampler = model.samplers["euler"] if part else flow.euler
        samples = sampler(velocity, torch.randn(200, 2, 2), [1.0, 0.0])
        distances[part] = (samples.abs() - 2).abs().mean().item()
    # Measured, with two seeds: 0.2 against 1.2 and 1.4.
    assert distances[0.75] < 0.5 * distances[0.0] and distances[0.0] > 0.7


def test_mean_flow_trains_resumes_and_samples_in_one_step(tmp_path, tokenizer):
    options = ["--add", "mean_flow", "--mean-flow", 0.5]
    whole = diffuse(tmp_path / "whole", tokenizer, *options)
    diffuse(tmp_path / "cut", tokenizer, *options, "--save-every", 3)
    (tmp_path / "cut" / "step_0000006.pt").unlink()
    (tmp_path / "cut" / "last.pt").unlink()
    again = diffuse(tmp_path / "cut", tokenizer, *options, "--save-every", 3)
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())
    assert any("span_embedder" in k for k in whole["ema"]) and np.isfinite(losses(tmp_path / "whole")).all()
    draw(tmp_path / "whole", tmp_path / "x.npz", "--sampler", "euler", "--steps", 1, "--cfg", 2)
    with pytest.raises(UserError, match="--add mean_flow is for sit"):
        diffuse(tmp_path / "other", tokenizer, "--add", "lightningdit,mean_flow")


# ----------------------------------------------- alignment -----------------------------------------------

from after import alignment  # noqa: E402
from after.alignment import TEACHERS, AlignmentTarget, alignment_loss  # noqa: E402
from frozen import pretrained  # noqa: E402


def test_the_alignment_loss_is_its_formula_patch_by_patch_and_zero_within_the_margins():
    z, f = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())
    towards = np.mean([max(0, 0.5 - cosine(z[b, i], f[b, i])) for b in range(2) for i in range(3)])
    among = np.mean([max(0, abs(cosine(z[b, i], z[b, j]) - cosine(f[b, i], f[b, j])) - 0.25)
                     for b in range(2) for i in range(3) for j in range(3)])
    assert (alignment_loss(z, f).item() == pytest.approx(towards + among, abs=1e-5)
            and towards > 0 and among > 0)
    # Within the margins nothing is asked for: at 30 degrees from the teacher, all patches alike.
    near = f + (0.1 * f.norm(dim=-1, keepdim=True)
                * torch.nn.functional.normalize(torch.randn(2, 3, 5), dim=-1))
    assert alignment_loss(near, f) == 0


def test_the_constant_to_beat_is_the_mean_direction(monkeypatch):
    monkeypatch.setattr("losses.load_teacher", lambda *args: None)
    config = argparse.Namespace(patch_size=4, weights_dir="", aux_weight=1.0)
    target, y = AlignmentTarget("dinov2-s", config, "cpu"), torch.randn(3, 4, 5) + 1
    mean = torch.nn.functional.normalize(y, dim=-1).mean((0, 1)).expand_as(y)
    found = target.constant_loss([y[:2], y[2:]], None)
    expected = (2 * alignment_loss(mean[:2], y[:2]) + alignment_loss(mean[2:], y[2:])) / 3
    torch.testing.assert_close(found, expected)


def test_the_alignment_loss_has_its_adaptive_weight(tmp_path, random_networks, monkeypatch):
    for module in (train_tokenizer, alignment):
        monkeypatch.setattr(module, "PERCEP_WARMUP", 4)
    seen, weight = [], train_tokenizer.adaptive_weight

    def remember(reconstruction, term, layer):
        seen.append((reconstruction.item(), weight(reconstruction, term, layer).item(), layer.shape))
        return torch.tensor(seen[-1][1])

    monkeypatch.setattr("after.alignment.adaptive_weight", remember)
    tokenize(tmp_path, "--preset", "shapes,va-vae", "--add", "alignment", "--align", "dinov2-s", "--stage", 1,
             "--percep-weight", 0.5, "--align-weight", 0.3)
    records = [r for r in checkpoints.read_metrics(tmp_path) if "loss" in r]
    assert len(seen) == len(records) == 4
    for step, (r, (reconstruction, ratio, shape)) in enumerate(zip(records, seen)):
        expected = r["recon"] + 0.5 * step / 4 * r["percep"]
        assert reconstruction == pytest.approx(expected, rel=1e-5) and shape == (8, 32)       # mean, variance
        assert r["loss"] == pytest.approx(expected + 0.3 * ratio * r["align"] + 1e-6 * r["kl"], rel=1e-5)


@pytest.mark.slow
def test_va_vae_aligns_its_latents_in_stage_1_and_drops_the_projection_in_stage_2(tmp_path, random_networks,
                                                                                    monkeypatch):
    monkeypatch.setitem(TEACHERS, "dinov2-s", pretrained._dinov2("s", 48, 2, 3, 0))              # a small one
    options = ["--preset", "shapes,va-vae", "--add", "alignment", "--align", "dinov2-s", "--steps", 80,
               "--lr", 3e-3]
    found = {}
    for weight in (0, 1):
        state = tokenize(tmp_path / str(weight), *options, "--align-weight", weight, "--stage", 1)
        found[weight] = [r["align"] for r in checkpoints.read_metrics(tmp_path / str(weight)) if "align" in r]
        assert state["ema"]["aux_decoders.align.weight"].shape == (48, 4) and state["add"] == []
    end = checkpoints.read_metrics(tmp_path / "1")[-1]
    assert end["align_loss"] < end["align_constant"]
    assert np.mean(found[1][-10:]) < 0.9 * np.mean(found[1][:5])
    assert np.mean(found[1][-10:]) < 0.95 * np.mean(found[0][-10:])
    assert maetok.load_tokenizer(tmp_path / "1").encode(test_images(2)).shape == (2, 16, 4)
    state = tokenize(tmp_path / "2", *options, "--stage", 2, "--init", tmp_path / "1")
    assert not any("align" in name for name in state["ema"])
    maetok.tokenizer_of(state, "stage 2")
    for message, wrong in (("choose dinov2-s", ["--align", "clip", "--no-learnable-latents"]),
                           ("which --compile does not give", [*options[:2], "--compile"]),
                           ("add --no-learnable-latents", ["--align", "dinov2-s"])):
        with pytest.raises(UserError, match=message):
            tokenize(tmp_path / "3", "--add", "alignment", *wrong)


# -------------------------------------------------- Muon --------------------------------------------------

from after.muon import Muon, orthogonal  # noqa: E402


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 12, 40), (1, 40, 12)])
def test_orthogonal_keeps_singular_vectors_and_makes_all_values_about_one(shape):
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    u = U * torch.linspace(1, 0.02, Vh.shape[-2], dtype=torch.float64) @ Vh
    for scale in (1e-4, 1, 1e4):                                    # of gradients: it must not matter
        inner = U.mT @ orthogonal(scale * u) @ Vh.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert 0.67 < values.min() and values.max() < 1.21
        torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.03), (torch.bfloat16, 0.003)])
def test_muon_takes_the_steps_of_pytorchs_and_adamw_those_of_the_rest(dtype, tolerance):
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    mine, theirs = ([torch.nn.Parameter(torch.ones(s) + i) for i, s in enumerate([*shapes, (7,)])]
                    for _ in range(2))
    ours = Muon([dict(params=mine[4:]), dict(params=mine[:4], weight_decay=0.1, muon=2.0)], lr=0.01,
                weight_decay=0.3)
    ours.dtype = dtype
    oracles = [torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
               torch.optim.AdamW(theirs[4:], lr=0.01, weight_decay=0.3)]
    for _ in range(4):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (ours, *oracles):
            optimizer.step()
    for i, (a, b) in enumerate(zip(mine, theirs)):
        moved, expected = a.detach() - 1 - i, b.detach() - 1 - i
        # PyTorch's products are bfloat16.
        error = (moved - expected).norm() / expected.norm()                              # nan without a step
        assert error < (tolerance if i < 4 else 1e-6)


def test_muon_is_for_matrices_of_blocks_and_nothing_is_left_out(random_networks):
    cpu, made = torch.device("cpu"), []
    for names in (["muon"], ["released", "muon"], ["muon", "released"]):
        kind = common.attach(train_tokenizer.Method, names)
        config = kind.Config(**kind.PRESETS["shapes"])
        method = kind(config, cpu)
        whole, frozen = (method.Model(config, method.targets) for _ in range(2))
        for model in (whole, frozen.freeze_encoder()):
            made.append((model, method.optimizer(model), 0.0 if "released" in names else 1e-4))
    for names in (["muon"], ["lightningdit", "muon"], ["usit", "muon"]):
        kind = common.attach(train_diffusion.Method, names)
        config = kind.Config(num_latents=4, latent_dim=4, width=32, depth=2, heads=2, num_classes=3)
        method, model = kind(config, None, cpu), kind.Model(config)
        made.append((model, method.optimizer(model), 0.0))
        assert made[-1][1].defaults["betas"] == method.BETAS
    for model, optimizer, weight_decay in made:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        assert sorted(map(id, given)) == sorted(trained)
        groups = [group for group in optimizer.param_groups if "muon" in group]
        blocks = {trained[id(p)] for group in groups for p in group["params"]}
        expected = {name for name in trained.values() if re.search(
            r"block.*\b(attn\.(qkv|q|kv|proj)|mlp\.[\w.]+|skip_linear)\.weight$", name)}
        assert blocks == expected and len(blocks) >= 8
        assert [group["weight_decay"] for group in groups] == [weight_decay]
    kind = common.attach(train_tokenizer.Method, ["muon"])
    rounded = kind(kind.Config(**kind.PRESETS["shapes"] | dict(dtype="bfloat16")), cpu)
    assert optimizer.dtype == torch.float32 and rounded.optimizer(whole).dtype == torch.bfloat16
    for disc in ("patch", "dino"):                                      # discriminators keep AdamW
        config = kind.Config(**kind.PRESETS["shapes"] | dict(disc=disc))
        adversary = build_adversary(config, cpu)
        assert type(kind(config, cpu).optimizer(adversary)) is torch.optim.AdamW


def test_muon_resumes_bit_for_bit_in_both_stages_and_only_as_muon(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "KEEP", 9)

    def train(out, muon=2.0, *options):
        add = ["--add", "muon", "--muon", muon] if muon else []
        return tokenize(out, "--stage2-steps", 4, *add, *options)

    whole = train(tmp_path / "whole")
    for cut in (3, 6):                                              # within stage 1 [0, 4) and stage 2 [4, 8)
        out = tmp_path / f"cut{cut}"
        train(out, 2.0, "--save-every", 3)
        for path in out.glob("*.pt"):
            if path.name == "last.pt" or int(path.stem[5:]) > cut:
                path.unlink()
        again = train(out, 2.0, "--save-every", 3)
        assert again["step"] == 8
        assert all(torch.equal(w, again["model"][k]) for k, w in whole["model"].items())
    other = train(tmp_path / "other", 0)
    assert any(not torch.equal(w, other["model"][k]) for k, w in whole["model"].items() if "blocks" in k)
    for muon, message in ((0, "add 'muon' -> ''"), (1.0, "muon 2.0 -> 1.0")):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "whole", muon)


def test_sit_trains_with_muon_and_resumes(tmp_path, tokenizer):
    whole = diffuse(tmp_path / "whole", tokenizer, "--add", "muon")
    diffuse(tmp_path / "cut", tokenizer, "--add", "muon", "--save-every", 3)
    for name in ("step_0000006.pt", "last.pt"):
        (tmp_path / "cut" / name).unlink()
    again = diffuse(tmp_path / "cut", tokenizer, "--add", "muon", "--save-every", 3)
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())
    adamw = diffuse(tmp_path / "adamw", tokenizer)
    assert any(not torch.equal(w, adamw["ema"][k]) for k, w in whole["ema"].items())


# ----------------------------- from the rebuttal: fine-tuning without guidance -----------------------------

def test_guidance_free_fine_tuning_starts_from_the_trained_model(tmp_path, tokenizer):
    trained = diffuse(tmp_path / "trained", tokenizer, "--steps", 40, "--lr", 3e-3)
    diffuse(tmp_path / "tuned", tokenizer, "--add", "guidance_free", "--init", tmp_path / "trained",
            "--steps", 1, "--lr", 1e-9, "--warmup", 0)
    model, old = (sit.load_diffusion(tmp_path / name)[0] for name in ("tuned", "trained"))
    x, t, y = torch.randn(3, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 4, 10])
    for beta in (torch.ones(3), torch.full((3,), 0.3)):
        torch.testing.assert_close(model(x, t, y, beta=beta), old(x, t, y), rtol=1e-4, atol=1e-4)
    # One step moves the new embedder: it has a gradient although it answers 0.
    state = diffuse(tmp_path / "more", tokenizer, "--add", "guidance_free", "--init", tmp_path / "trained",
                    "--steps", 2, "--lr", 1e-3)
    assert state["model"]["beta_embedder.mlp.2.weight"].abs().max() > 0
    assert diffuse(tmp_path / "more", tokenizer, "--add", "guidance_free", "--init", tmp_path / "trained",
                   "--steps", 2, "--lr", 1e-3)["step"] == 2                                       # it resumes
    before, after = (s["final_layer.linear.weight"] for s in (trained["ema"], state["model"]))
    assert not torch.equal(before, after)
    draw(tmp_path / "more", tmp_path / "x.npz", "--cfg", 2)


def test_init_refuses_other_latents_and_other_models(tmp_path, tokenizer):
    diffuse(tmp_path / "trained", tokenizer)
    tokenize(tmp_path / "other", "--seed", 1)
    for message, its, options in (("another tokenizer's latents", tmp_path / "other", []),
                                  ("--path linear -> cosine", tokenizer, ["--path", "cosine"]),
                                  ("another kind of model", tokenizer, ["--add", "usit"]),
                                  ("weights of another model", tokenizer, ["--depth", 1])):
        with pytest.raises(UserError, match=message):
            diffuse(tmp_path / "run", its, "--init", tmp_path / "trained", *options)


# ------------------------------- REPA with the authors' recipe for 1D latents -------------------------------

from variants.repa import MLPHead, Repa  # noqa: E402


def test_repas_mlp_repeats_every_token_along_its_patches():
    model = sit.SiT(sit.SiTConfig(num_latents=4, latent_dim=4, width=32, depth=2, heads=2, num_classes=3))
    repa = Repa(model, model, 1, MLPHead(16, 4, 32, 7))
    args = torch.randn(2, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    hidden = []
    model.blocks[0].register_forward_hook(lambda block, inputs, tokens: hidden.append(tokens))
    assert repa(*args).shape == (2, 4, 4) and repa.features.shape == (2, 16, 7)     # 16 patches: four a token
    for patch in range(16):
        torch.testing.assert_close(repa.features[:, patch], repa.head.layers(hidden[0][:, patch // 4]))
    with pytest.raises(UserError, match="5 tokens do not divide the 16 patches"):
        MLPHead(16, 5, 32, 7)


@pytest.mark.slow
def test_repa_with_the_mlp_learns_its_teacher(tmp_path, tokenizer, random_networks):
    options = "--no-cache --add repa --repa dinov2-s --repa-block 1 --repa-head mlp --steps 30 --lr 3e-3"
    diffuse(tmp_path, tokenizer, *options.split())
    agreement = [r["repa"] for r in checkpoints.read_metrics(tmp_path)]
    assert agreement[-1] < agreement[0] - 0.2                                                      # -cos
    with pytest.raises(UserError, match="choose decoder or mlp"):
        diffuse(tmp_path / "other", tokenizer, "--add", "repa", "--no-cache", "--repa-head", "linear")


# ---------------------------------- the theorem's other exponents, the toy ----------------------------------

def test_theory_measures_every_exponent_and_states_the_theorem(tmp_path):
    evaluate.main(["theory", "--panels", "d", "B", "--fixed-components", "3", "--dims", "8",
                   "--panel-dims", "4", "16", "--panel-norms", "4", "8", "--samples", "32", "256", "2048",
                   "--repeats", "2", "--steps", "150", "--device", "cpu", "--out", str(tmp_path / "t")])
    found = json.loads((tmp_path / "t.json").read_text())
    # Modes well apart: a mean costs d K / n of error whatever its norm, so exponents near 1 and 0,
    # below 5 and 6.
    assert 0.5 < found["panels"]["d"]["exponent"] < 1.6 and abs(found["panels"]["B"]["exponent"]) < 0.6
    assert "K^4 d^5 B^6" in found["theorem"] and "d^5, B^6" in found["what_it_shows"]
    assert "K" not in found["panels"]


def test_many_close_modes_look_compact_and_still_need_many_components(tmp_path):
    evaluate.main(["compactness", "--no-umap", "--device", "cpu", "--out", str(tmp_path / "c")])
    found = json.loads((tmp_path / "c.json").read_text())
    close, distant = found["rows"]
    assert close["radius_pca"] < 0.5 * distant["radius_pca"]
    assert close["nll"]["30"] < close["nll"]["4"]
    assert distant["nll"]["4"] < min(distant["nll"][k] for k in ("1", "30"))
    assert "pip install umap-learn" in found["protocol"] and (tmp_path / "c.png").exists()


def test_umap_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn; or leave --umap out"):
        evaluate.main(["compactness", "--umap", "--device", "cpu", "--out", str(tmp_path / "c")])


# --------------------------------------------- the measurements ---------------------------------------------

from study import after as study  # noqa: E402


def test_rows_share_what_they_do_not_change():
    args = argparse.Namespace(out="runs/x", plan=study.SETTINGS["smoke"], data="shapes", preset="shapes",
                              device="cpu")
    titles = {name: list(study.commands(args, name, 0)) for name in study.ROWS}
    assert titles["latent noise 0.8"] == ["stage2", "recon", "samples, 25 steps"]
    assert titles["time shift 3"] == ["diffusion", "samples, 25 steps"]
    assert titles["nested dropout"] == ["stage1", "stage2", "recon", "diffusion", "samples, 25 steps",
                                        "lengths"]
    assert study.part(args, "8 channels, x-prediction", 1, "stage2") == Path("runs/x/8-channels_1/stage2")
    for name, row in study.ROWS.items():
        options = [str(o) for arguments in study.commands(args, name, 0).values() for o in arguments]
        assert all(str(o) in options for o in (*row.tokenizer, *row.stage2) if str(o).startswith("--"))
        assert row.against == "" or list(study.ROWS).index(row.against) < list(study.ROWS).index(name)
        assert set(row.sampler_steps) <= set(study.ROWS["baseline"].sampler_steps)


def test_a_verdict_needs_every_seed():
    assert study.verdict("psnr", {0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == "better"
    assert study.verdict("gap, guidance 1", {0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == "worse"
    assert study.verdict("psnr", {0: 2.0, 1: 1.0}, {0: 1.0, 1: 2.0}) == "seeds disagree"
    assert study.verdict("psnr", {0: 2.0}, {0: 1.0}) == "one seed"
    assert study.verdict("psnr", {0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}) == "shared"


@pytest.mark.slow
def test_the_measurements_run_resume_and_are_tabled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("study.study.subprocess", forked)
    command = ["--setting", "smoke", "--rows", "latent noise 0.8", "--out", str(tmp_path), "--device", "cpu"]
    study.main([*command, "--minutes", "0.0001"])
    assert "time is up" in capsys.readouterr().out
    study.main(command)
    assert capsys.readouterr().out.endswith("done\n")
    log = (tmp_path / "latent-noise-0-8_0" / "log.txt").read_text()
    base, result = (json.loads((tmp_path / name / "result.json").read_text())
                    for name in ("baseline_0", "latent-noise-0-8_0"))
    assert {f"gap, guidance {s}, {n} steps" for s in (1, 2) for n in (1, 2, 4, 25)} <= set(base)
    assert "--latent-noise 0.8" in log and result["against"] == "baseline" and result["psnr"] != base["psnr"]
    table = (tmp_path / "after.md").read_text()
    assert "| latent noise 0.8 | baseline | psnr |" in table and "| one seed |" in table
    assert (tmp_path / "latent_noise.png").exists()
    study.main(command)
    assert (tmp_path / "latent-noise-0-8_0" / "log.txt").read_text() == log            # nothing was run twice
    with pytest.raises(UserError, match="other options"):
        study.main([*command[:-1], "auto"])


def test_usit_2b_has_dc_aes_own_values():
    kind = common.attach(train_diffusion.Method, ["usit"])
    config = kind.Config(**kind.PRESETS["usit-2b"])
    assert (config.batch_size, kind.BETAS, config.warmup, config.lr, config.steps) == (
        1024, (0.99, 0.99), 5000, 1e-4, 500_000)


@pytest.mark.parametrize("method", [train_tokenizer.Method, train_diffusion.Method])
def test_an_extras_options_are_there_only_with_it(method, capsys):
    plain = {f.name for f in dataclasses.fields(method.Config)}
    options = {"latent_noise": {"latent_noise"}, "nested_dropout": set(), "muon": {"muon"},
               "alignment": {"align", "align_weight"}, "time_shift": {"time_shift"}, "x_prediction": set(),
               "guidance_free": set(), "mean_flow": {"mean_flow"}}
    for name, own in options.items():
        if not hasattr(common.find_extra(name), f"AddTo{method.ROLE}"):
            with pytest.raises(UserError, match=f"after/{name}.py cannot be added here"):
                common.attach(method, [name])
            continue
        assert not own & plain
        kind = common.attach(method, [name])
        assert {f.name for f in dataclasses.fields(kind.Config)} - plain == own
        with pytest.raises(SystemExit):
            common.parse_config(kind.Config, kind.PRESETS, list(method.PRESETS), "", ["--help"])
        printed = capsys.readouterr().out
        assert all(f"--{option.replace('_', '-')}" in printed for option in own)


@pytest.mark.parametrize("options", [["--add", "mean_flow"], ["--add", "x_prediction,time_shift"]])
def test_checkpointing_changes_nothing_in_diffusion(tmp_path, tokenizer, options):
    plain, less = (diffuse(tmp_path / name, tokenizer, *options, *more)["model"]
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert all(torch.equal(w, less[k]) for k, w in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--add", "nested_dropout,latent_noise"],
                                     ["--preset", "shapes,va-vae", "--add", "alignment",
                                      "--align", "dinov2-s"]])
def test_checkpointing_changes_nothing_in_tokenizers(tmp_path, options, random_networks):
    plain, less = (tokenize(tmp_path / name, *options, *more)["model"]
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert all(torch.equal(w, less[k]) for k, w in plain.items())
