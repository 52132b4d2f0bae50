"""Extensions from after the paper (docs/after.md): each is off by default, does what its name says,
and resumes.

One section for each; deleting an extension deletes its section.
"""
import argparse
import dataclasses
import json
import re
from pathlib import Path

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
from after.alignment import alignment_loss
from after.mean_flow import adaptive_weights, draw_spans, mean_flow_target
from after.muon import Muon, orthogonal
from after.nested_dropout import draw_lengths, keep_first, possible_lengths
from after.time_shift import shift_of, shift_times
from common import UserError
from data import build_dataset, some_images, to_float, to_uint8
from losses import build_objective
from study import after as study

TOKENIZER = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 "
             "--aux-depth 1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 4 "
             "--stage2-steps 2 --warmup 2 --stage2-warmup 1 --log-every 1 --save-every 1000 --grid-every 0 "
             "--eval-images 16 --latent-images 64 --device cpu").split()


def tokenize(out, *options):
    train_tokenizer.main([*TOKENIZER, "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def streams(count, name="test"):
    return [common.sample_rng(0, name, 0, i) for i in range(count)]


def test_images(count=64):
    return to_float(torch.cat([images for images, *_
                               in some_images(build_dataset("shapes", "test", 16), count)]))


test_images.__test__ = False

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenize(folder)
    return folder


DIFFUSION = ("--width 32 --depth 2 --heads 2 --cache-images 40 --batch-size 8 --steps 6 --warmup 2 "
             "--log-every 1 --save-every 1000 --grid-every 0 --device cpu").split()


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


@pytest.mark.slow
def test_latent_noise_changes_stage_2_alone_and_makes_the_decoder_bear_it(tmp_path):
    options = ["--steps", 100, "--stage2-steps", 200, "--lr", 3e-3, "--stage2-lr", 3e-3]
    exact, noisy = (tokenize(tmp_path / strength, *options, "--latent-noise", strength) for strength in "01")
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
        assert shifted[-1] == pytest.approx(0.04)        # from there one step to 0 without noise: a short one
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
    assert sum(counts[1]) < sum(counts[0])                                  # fewer steps had a time below 1/2
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
    torch.testing.assert_close(found[3], v[3] * 0.01 / 0.05,                      # not 1 / 0.01 of its errors
                               rtol=1e-3, atol=1e-4)


def test_x_prediction_trains_samples_and_wants_the_linear_path(tmp_path, tokenizer):
    state = diffuse(tmp_path / "run", tokenizer, "--x-prediction", "--steps", 60, "--lr", 3e-3)
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:3])
    assert state["config"]["x_prediction"] and sit.load_diffusion(tmp_path / "run")[0].config.x_prediction
    draw(tmp_path / "run", tmp_path / "x.npz", "--cfg", 2)
    # A new model answers 0, the mean of the data: v = x_t / t and not 0,
    # so the first loss tells the two apart.
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


@pytest.mark.slow
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


# ------------------------------------------------ MeanFlow ------------------------------------------------

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
    model = sit.SiT(sit.SiTConfig(num_latents=3, latent_dim=2, width=16, depth=2, heads=2, mean_flow=0.25))
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
    later, span = draw_spans(streams(4000), t, other, 0.25)
    apart = span > 0
    assert abs(apart.float().mean() - 0.25) < 0.03 and torch.equal(later[~apart], t[~apart])
    assert torch.equal(later[apart], torch.maximum(t, other)[apart]) and (later - span > -1e-6).all()


@pytest.mark.slow
def test_one_step_of_mean_flow_finds_the_modes_where_one_of_euler_finds_their_mean():
    distances = {}
    for part in (0.0, 0.75):
        torch.manual_seed(0)
        model = sit.SiT(sit.SiTConfig(num_latents=2, latent_dim=2, width=32, depth=1, heads=2, num_classes=0,
                                      mean_flow=part))
        optimizer, y = (torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)),
                        torch.zeros(64, dtype=torch.int64))
        for step in range(250):                                         # data: all 2 or all -2, deviation 0.1
            common.set_learning_rate(optimizer, 5e-3 * (1 - step / 250))
            rngs = [common.sample_rng(0, "test", step, i) for i in range(64)]
            x = torch.randint(0, 2, (64, 1, 1)) * 4.0 - 2 + 0.1 * torch.randn(64, 2, 2)
            t, span = draw_spans(rngs, flow.sample_times(rngs), flow.sample_times(rngs), part)
            x_t, v = flow.interpolate(x, torch.randn(64, 2, 2), t)
            target = mean_flow_target(model, x_t, v, t, y, span) if part else v
            losses = flow.flow_matching_loss(model(x_t, t, y, span=span), target)
            (losses * adaptive_weights(losses) if part else losses).mean().backward()
            common.optimizer_step(optimizer, 1.0)
        velocity = flow.guided_velocity(model.eval(), torch.zeros(200, dtype=torch.int64))
        samples = flow.euler(velocity, torch.randn(200, 2, 2), 1, average=part > 0)
        distances[part] = (samples.abs() - 2).abs().mean().item()
    # Measured, with two seeds: 0.2 against 1.2 and 1.4.
    assert distances[0.75] < 0.5 * distances[0.0] and distances[0.0] > 0.7


def test_mean_flow_trains_resumes_and_samples_in_one_step(tmp_path, tokenizer):
    whole = diffuse(tmp_path / "whole", tokenizer, "--mean-flow", 0.5, "--grid-every", 6)
    diffuse(tmp_path / "cut", tokenizer, "--mean-flow", 0.5, "--grid-every", 6, "--save-every", 3)
    (tmp_path / "cut" / "step_0000006.pt").unlink()
    (tmp_path / "cut" / "last.pt").unlink()
    again = diffuse(tmp_path / "cut", tokenizer, "--mean-flow", 0.5, "--grid-every", 6, "--save-every", 3)
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())
    assert any("span_embedder" in k for k in whole["ema"]) and np.isfinite(losses(tmp_path / "whole")).all()
    draw(tmp_path / "whole", tmp_path / "x.npz", "--sampler", "euler", "--steps", 1, "--cfg", 2)
    with pytest.raises(UserError, match="--mean-flow is for sit"):
        diffuse(tmp_path / "other", tokenizer, "--mean-flow", 0.5, "--model", "lightningdit")


# ----------------------------------------------- alignment -----------------------------------------------

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


@pytest.mark.slow
def test_va_vae_aligns_its_latents_in_stage_1_and_drops_the_projection_in_stage_2(tmp_path):
    options = ["--preset", "shapes,va-vae", "--align", "dinov2-s", "--random-frozen", "--steps", 80,
               "--lr", 3e-3]
    found = {}
    for weight in (0, 1):
        state = tokenize(tmp_path / str(weight), *options, "--align-weight", weight, "--stage", 1)
        found[weight] = [r["align"] for r in checkpoints.read_metrics(tmp_path / str(weight)) if "align" in r]
        assert state["ema"]["align.weight"].shape == (384, 4)
    assert np.mean(found[1][-10:]) < 0.9 * np.mean(found[1][:5])
    assert np.mean(found[1][-10:]) < 0.95 * np.mean(found[0][-10:])
    model = maetok.load_tokenizer(tmp_path / "1")
    assert model.encode(test_images(2)).shape == (2, 16, 4) and model.align.out_features == 384
    state = tokenize(tmp_path / "2", *options, "--stage", 2, "--init", tmp_path / "1")
    assert not any("align" in name for name in state["ema"])
    maetok.tokenizer_of(state, "stage 2")
    for message, wrong in (("choose dinov2-s", ["--align", "clip", "--no-learnable-latents"]),
                           ("which --compile has not", [*options[:5], "--compile"]),
                           ("add --no-learnable-latents", ["--align", "dinov2-s"])):
        with pytest.raises(UserError, match=message):
            tokenize(tmp_path / "3", *wrong)


# -------------------------------------------------- Muon --------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 12, 40), (40, 12)])
def test_orthogonal_keeps_singular_vectors_and_makes_all_values_about_one(shape):
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    u = U * torch.linspace(1, 0.02, Vh.shape[-2], dtype=torch.float64) @ Vh
    for scale in (1e-4, 1, 1e4):                                    # of gradients: it must not matter
        inner = U.mT @ orthogonal(scale * u) @ Vh.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert 0.67 < values.min() and values.max() < 1.21
        torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-5, rtol=0)


def test_muon_takes_the_steps_of_pytorchs_and_adamw_those_of_the_rest():
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    mine, theirs = ([torch.nn.Parameter(torch.ones(s) + i) for i, s in enumerate([*shapes, (7,)])]
                    for _ in range(2))
    ours = Muon([dict(params=mine[4:]), dict(params=mine[:4], weight_decay=0.1, muon=2.0)], lr=0.01,
                weight_decay=0.3)
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
        assert (moved - expected).norm() < (0.03 if i < 4 else 1e-6) * expected.norm() and expected.norm() > 0


def test_muon_is_for_matrices_of_blocks_and_nothing_is_left_out():
    config = train_tokenizer.Config(**train_tokenizer.PRESETS["shapes"]
                                    | dict(muon=2.0, latent_modulation=True, class_token=True))
    whole, frozen = maetok.MAETok(config), maetok.MAETok(config)
    frozen.freeze_encoder()
    cpu = torch.device("cpu")
    made = [(model, train_tokenizer.build_optimizer(config, model, cpu)) for model in (whole, frozen)]
    for kind in ("sit", "lightningdit", "usit"):
        diffusion = train_diffusion.Config(model=kind, num_latents=4, latent_dim=4, width=32, depth=2,
                                           heads=2, num_classes=3, muon=4.0)
        model = train_diffusion.build_model(dataclasses.asdict(diffusion))
        made.append((model, train_diffusion.build_optimizer(diffusion, model, cpu)))
    for model, optimizer in made:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        assert sorted(map(id, given)) == sorted(trained)
        blocks = {trained[id(p)] for group in optimizer.param_groups if "muon" in group
                  for p in group["params"]}
        expected = {name for name in trained.values() if re.search(
            r"block.*\b(attn\.(qkv|q|kv|proj)|mlp\.[\w.]+|skip_linear)\.weight$", name)}
        assert blocks == expected and len(blocks) >= 8
    for disc in ("patch", "dino"):                                      # discriminators keep AdamW
        adversary = build_objective(dataclasses.replace(config, disc=disc, random_frozen=True), cpu).adversary
        assert type(train_tokenizer.build_optimizer(config, adversary, cpu)) is torch.optim.AdamW


def test_muon_resumes_bit_for_bit_in_both_stages_and_only_as_muon(tmp_path):
    def train(out, muon=2.0, *options):
        return tokenize(out, "--stage2-steps", 4, "--muon", muon, "--keep", 9, *options)

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
    with pytest.raises(UserError, match="muon 2.0 -> 0.0"):
        train(tmp_path / "whole", 0)


def test_sit_trains_with_muon_and_resumes(tmp_path, tokenizer):
    whole = diffuse(tmp_path / "whole", tokenizer, "--muon", 2)
    diffuse(tmp_path / "cut", tokenizer, "--muon", 2, "--save-every", 3)
    for name in ("step_0000006.pt", "last.pt"):
        (tmp_path / "cut" / name).unlink()
    again = diffuse(tmp_path / "cut", tokenizer, "--muon", 2, "--save-every", 3)
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())
    adamw = diffuse(tmp_path / "adamw", tokenizer)
    assert any(not torch.equal(w, adamw["ema"][k]) for k, w in whole["ema"].items())


# ----------------------------- from the rebuttal: fine-tuning without guidance -----------------------------

def test_guidance_free_fine_tuning_starts_from_the_trained_model(tmp_path, tokenizer):
    trained = diffuse(tmp_path / "trained", tokenizer, "--steps", 40, "--lr", 3e-3)
    diffuse(tmp_path / "tuned", tokenizer, "--guidance-free", "--init", tmp_path / "trained", "--steps", 1,
            "--lr", 1e-9, "--warmup", 0)
    model, old = (sit.load_diffusion(tmp_path / name)[0] for name in ("tuned", "trained"))
    x, t, y = torch.randn(3, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 4, 10])
    for beta in (torch.ones(3), torch.full((3,), 0.3)):
        torch.testing.assert_close(model(x, t, y, beta), old(x, t, y), rtol=1e-4, atol=1e-4)
    # One step moves the new embedder: it has a gradient although it answers 0.
    state = diffuse(tmp_path / "more", tokenizer, "--guidance-free", "--init", tmp_path / "trained",
                    "--steps", 2, "--lr", 1e-3)
    assert state["model"]["beta_embedder.mlp.2.weight"].abs().max() > 0
    assert diffuse(tmp_path / "more", tokenizer, "--guidance-free", "--init", tmp_path / "trained",
                   "--steps", 2, "--lr", 1e-3)["step"] == 2                                       # it resumes
    before, after = (s["final_layer.linear.weight"] for s in (trained["ema"], state["model"]))
    assert not torch.equal(before, after)
    draw(tmp_path / "more", tmp_path / "x.npz", "--cfg", 2)


def test_init_refuses_other_latents_and_other_models(tmp_path, tokenizer):
    diffuse(tmp_path / "trained", tokenizer)
    tokenize(tmp_path / "other", "--seed", 1)
    for message, its, options in (("another tokenizer's latents", tmp_path / "other", []),
                                  ("path 'linear' -> 'cosine'", tokenizer, ["--path", "cosine"]),
                                  ("model 'sit' -> 'usit'", tokenizer, ["--model", "usit"]),
                                  ("weights of another model", tokenizer, ["--depth", 1])):
        with pytest.raises(UserError, match=message):
            diffuse(tmp_path / "run", its, "--init", tmp_path / "trained", *options)


# ------------------------------- REPA with the authors' recipe for 1D latents -------------------------------

def test_repas_mlp_repeats_every_token_along_its_patches(tmp_path, tokenizer):
    model = sit.SiT(sit.SiTConfig(num_latents=4, latent_dim=4, width=32, depth=2, heads=2, num_classes=3))
    repa = train_diffusion.Repa(model, 1, maetok.load_tokenizer(tokenizer), 7, "mlp", hidden=16)
    args = torch.randn(2, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    v, features = repa(*args)
    _, hidden = model(*args, hidden_after=1)
    assert v.shape == (2, 4, 4) and features.shape == (2, 16, 7)                    # 16 patches: four a token
    for patch in range(16):
        torch.testing.assert_close(features[:, patch], repa.head(hidden[:, patch // 4]))
    odd = sit.SiT(sit.SiTConfig(num_latents=5, latent_dim=4, width=32, depth=2, heads=2))
    with pytest.raises(UserError, match="5 tokens do not divide the 16 patches"):
        train_diffusion.Repa(odd, 1, maetok.load_tokenizer(tokenizer), 7, "mlp")


@pytest.mark.slow
def test_repa_with_the_mlp_learns_its_teacher(tmp_path, tokenizer):
    options = "--no-cache --repa dinov2-s --repa-block 1 --repa-head mlp --random-frozen --steps 30 --lr 3e-3"
    diffuse(tmp_path, tokenizer, *options.split())
    agreement = [r["repa"] for r in checkpoints.read_metrics(tmp_path)]
    assert agreement[-1] < agreement[0] - 0.2                                                      # -cos
    with pytest.raises(UserError, match="choose decoder or mlp"):
        diffuse(tmp_path / "other", tokenizer, "--repa-head", "linear")


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
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn; or leave --umap out"):
        evaluate.main(["compactness", "--umap", "--device", "cpu", "--out", str(tmp_path / "c")])


# --------------------------------------------- the measurements ---------------------------------------------

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
def test_the_measurements_run_resume_and_are_tabled(tmp_path, capsys):
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
    config = train_diffusion.Config(**train_diffusion.PRESETS["usit-2b"])
    assert (config.batch_size, config.beta1, config.beta2, config.warmup, config.lr, config.weight_decay,
            config.steps) == (1024, 0.99, 0.99, 5000, 1e-4, 0.0, 500_000)


@pytest.mark.parametrize("module", [train_tokenizer, train_diffusion])
def test_all_are_off_by_default_and_out_of_the_short_help(module):
    off = dict(latent_noise=0, nested_dropout=False, align="", time_shift=1, x_prediction=False, mean_flow=0,
               muon=0)
    fields = {f.name: f.default for f in dataclasses.fields(module.Config)} | {"align_weight": None}
    assert all(fields[name] == value for name, value in off.items() if name in fields)
    assert len(off.keys() & fields) == 4 and not (off.keys() | {"align_weight"}) & set(module.SHOWN)
    assert not any(set(preset) & off.keys() for name, preset in module.PRESETS.items() if name != "va-vae")


def test_runs_from_before_the_extensions_resume(tmp_path, tokenizer):
    young = {"align", "latent_noise", "nested_dropout", "align_weight", "time_shift", "x_prediction",
             "mean_flow", "repa_head", "muon"}
    tokenize(tmp_path / "tokenizer")
    diffuse(tmp_path / "sit", tokenizer)
    for run, again in (("tokenizer", lambda: tokenize(tmp_path / "tokenizer")),
                       ("sit", lambda: diffuse(tmp_path / "sit", tokenizer))):
        state = dict(checkpoints.load_checkpoint(tmp_path / run))
        state["config"] = {k: v for k, v in state["config"].items() if k not in young}
        for path in (tmp_path / run).glob("*.pt"):
            path.unlink()
        torch.save(state, tmp_path / run / "last.pt")
        assert again()["step"] == state["step"]
    assert sit.load_diffusion(tmp_path / "sit")[0].config.mean_flow == 0


@pytest.mark.parametrize("options", [["--mean-flow", 0.5], ["--x-prediction", "--time-shift", 0]])
def test_checkpointing_changes_nothing_in_diffusion(tmp_path, tokenizer, options):
    plain, less = (diffuse(tmp_path / name, tokenizer, *options, *more)["model"]
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert all(torch.equal(w, less[k]) for k, w in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--nested-dropout", "--latent-noise", 0.8],
                                     ["--preset", "shapes,va-vae", "--align", "dinov2-s", "--random-frozen"]])
def test_checkpointing_changes_nothing_in_tokenizers(tmp_path, options):
    plain, less = (tokenize(tmp_path / name, *options, *more)["model"]
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert all(torch.equal(w, less[k]) for k, w in plain.items())
