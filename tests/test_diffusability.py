"""study/diffusability.py: scores of latents against closed forms and loops, and their correlations."""
import json
import math

import numpy as np
import pytest
import torch
from test_train_tokenizer import TINY

import evaluate
import metrics
import train_tokenizer
from common import UserError
from study import diffusability


def test_the_velocity_loss_of_one_gaussian_is_the_known_integral():
    """pi/2 sqrt(l) along an axis of variance l (study/gaussian.py), up to the sum over ten times."""
    variances = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    mean = torch.tensor([[3.0, -1.0, 0.0]], dtype=torch.float64)
    rng = np.random.default_rng(0)
    x = mean + torch.from_numpy(rng.standard_normal((40_000, 3))) * variances.sqrt()
    one = metrics.GaussianMixture(torch.ones(1, dtype=torch.float64), mean, variances)
    found = diffusability.mixture_velocity_loss(one, x, rng)
    assert found == pytest.approx(math.pi / 2 * variances.sqrt().mean().item(), rel=0.01)


def test_the_mixtures_velocity_is_the_conditional_mean():
    """Against integrals over x on a fine grid, of two unequal modes on a line."""
    weights, means, variances = [0.3, 0.7], [-2.0, 1.5], [0.04, 0.25]
    mixture = metrics.GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in
                                        (weights, [[m] for m in means], [[s] for s in variances])))
    grid = np.linspace(-5, 5, 4001)
    density = sum(w / math.sqrt(s) * np.exp(-(grid - m) ** 2 / 2 / s)
                  for w, m, s in zip(weights, means, variances))
    x = torch.tensor([[-2.1], [-0.4], [1.0], [2.2]], dtype=torch.float64)
    eps, total = np.random.default_rng(3), 0.0
    for t in (np.arange(10) + 0.5) / 10:
        noise = eps.standard_normal((4, 1))[:, 0]
        for value, e in zip(x[:, 0].numpy(), noise):
            x_t = (1 - t) * value + t * e
            chance = density * np.exp(-((x_t - (1 - t) * grid) / t) ** 2 / 2)
            velocity = (x_t - grid) / t                                        # eps - x, of each x that fits
            total += (e - value - (chance * velocity).sum() / chance.sum()) ** 2 / 40
    found = diffusability.mixture_velocity_loss(mixture, x, np.random.default_rng(3))
    assert found == pytest.approx(total, rel=1e-6)


def test_fitted_modes_leave_what_the_true_ones_leave():
    rng = np.random.default_rng(1)
    modes = torch.from_numpy(rng.standard_normal((4, 6)) * 3)
    x = modes[rng.integers(4, size=6000)] + torch.from_numpy(rng.standard_normal((6000, 6)) * 0.3)
    several, one = diffusability.velocity_losses(x[:4000], x[4000:], 4, 0)
    true = metrics.GaussianMixture(torch.full((4,), 0.25).double(), modes, torch.full((4, 6), 0.09).double())
    expected = diffusability.mixture_velocity_loss(true, x[4000:], np.random.default_rng(0))
    assert several == pytest.approx(expected, rel=0.03) and several < 0.8 * one


def test_effective_rank():
    assert diffusability.effective_rank(torch.randn(50_000, 8)) == pytest.approx(1, abs=1e-3)
    assert diffusability.effective_rank(torch.randn(100, 1) * torch.ones(8)) == pytest.approx(1 / 8)
    two = torch.randn(50_000, 8) * torch.tensor([1.0] * 2 + [0.0] * 6)
    assert diffusability.effective_rank(two) == pytest.approx(2 / 8, abs=1e-3)


def test_near_less_far_is_the_loop_over_pairs():
    tokens, (rows, columns) = torch.randn(2, 24, 5), (4, 6)
    for picture, found in zip(tokens, diffusability.near_less_far(tokens, (rows, columns))):
        near, far = [], []
        for a in range(24):
            for b in range(24):
                down, right = (a // columns - b // columns) / rows, (a % columns - b % columns) / columns
                apart = round(math.hypot(down, right), 6)
                cosine = torch.cosine_similarity(picture[a], picture[b], dim=0).item()
                near += [cosine] * (a != b and apart <= diffusability.NEAR)
                far += [cosine] * (apart >= diffusability.FAR)
        assert found.item() == pytest.approx(np.mean(near) - np.mean(far), abs=1e-5)
    assert diffusability.near_less_far(torch.ones(1, 24, 5), (rows, columns)).item() == pytest.approx(0)
    for grid in ((1, 1), (2, 2), (3, 3)):                                                    # no pair is near
        with pytest.raises(UserError, match="patches is too coarse"):
            diffusability.near_less_far(torch.randn(1, math.prod(grid), 5), grid)


def test_correlations_know_order_sign_and_how_far_they_can_be_trusted():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(12)
    names = [f"row {i // 2} {i % 2}" for i in range(12)]                       # six rows of two seeds
    scores = {"cube": truth ** 3, "opposite": -truth, "chance": rng.standard_normal(12), "same": np.ones(12)}
    outcomes = {"distance": truth, "half": [*truth[:6], *[np.nan] * 6], "few": [1.0] + [np.nan] * 11}
    rows = diffusability.correlations(scores, outcomes, names)
    found = {(row["outcome"], row["score"]): row for row in rows}
    assert {outcome for outcome, _ in found} == {"distance", "half"}                    # too few of the third
    row = found["distance", "cube"]
    assert row["correlation"] == row["chosen"] == row["held_out"] == 1 and row["tokenizers"] == 12
    assert found["distance", "opposite"]["correlation"] == -1 and found["half", "cube"]["tokenizers"] == 6
    row = found["distance", "chance"]
    assert row["low"] < 0 < row["high"] and row["low"] < row["correlation"] < row["high"]
    assert ("distance", "same") not in found


def test_rows_are_held_out_and_resampled_whole():
    """Two rows of three seeds each: whatever rows are drawn, a score that tells them apart ranks them; within
    one row alone nothing varies, so no seed of a held-out row was seen."""
    names = [f"{row} {seed}" for row in "abc" for seed in range(3)]
    outcome = {"distance": [0, 0, 0, 1, 1, 1, 5, 3, 4]}
    row, = diffusability.correlations({"score": [0, 0, 0, 1, 1, 1, 3, 5, 4]}, outcome, names)
    assert row["chosen"] == 1 and row["held_out"] == -1                                       # c is the third
    assert row["low"] == -1 and row["high"] == 1                            # draws of c alone, of a and b


def test_the_command_scores_runs_and_finds_their_rows(tmp_path):
    for seed in (0, 1):
        train_tokenizer.main([*TINY, "--stage", "1", "--seed", str(seed), "--out",
                              str(tmp_path / str(seed))])
    rows = {"AE": {"0": {"distance stage2 cfg 1": 2.0}, "1": {"distance stage2 cfg 1": 3.0}}}
    (tmp_path / "known.json").write_text(json.dumps({"rows": rows}))
    command = ["diffusability", str(tmp_path / "0"), str(tmp_path / "1"), "--features", "classifier",
               "--classifier-steps", "2", "--cache", str(tmp_path / "cache"), "--train-images", "60",
               "--test-images", "20", "--components", "2", "--device", "cpu",
               "--out", str(tmp_path / "found"), "--known", str(tmp_path / "known.json"), "--names"]
    evaluate.main([*command, "AE 0", "AE 1"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["scores"]) == {"AE 0", "AE 1"} and not found["correlations"]           # two are few
    for values in found["scores"].values():
        assert all(math.isfinite(value) for value in values.values())
        assert 0 < values["effective_rank"] <= 1 and 0 < values["velocity_variance"]
        assert 0 <= values["probe"] <= 1 and values["perturbed"] != values["reconstructed"]
    assert found["scores"]["AE 0"] != found["scores"]["AE 1"]
    evaluate.main(["diffusability", str(tmp_path / "found.json"), "--out", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again.json").read_text())["scores"] == found["scores"]
    with pytest.raises(UserError, match="known.json is not a JSON file of evaluate.py diffusability"):
        evaluate.main(["diffusability", str(tmp_path / "known.json")])
    with pytest.raises(UserError, match="found.json has 'AE 0', which is given already"):
        evaluate.main([*command[:2], str(tmp_path / "found.json"), "--names", "AE 0"])
    with pytest.raises(UserError, match="different settings do not compare"):
        evaluate.main([*command[:2], str(tmp_path / "found.json"), "--names", "AE 2"])
    (tmp_path / "empty.json").write_text('{"scores": {}, "settings": ""}')
    with pytest.raises(UserError, match="empty.json is not a JSON file"):
        evaluate.main(["diffusability", str(tmp_path / "empty.json")])
    for names, message in ((["AE 0", "AE 7"], "has no 'AE 7'; it has AE 0, AE 1"),
                           (["AE 0"], "as many different names"),
                           (["AE 0", "AE 0", "AE 1"], "as many different names")):
        with pytest.raises(UserError, match=message):
            evaluate.main([*command, *names])
    for content in ("[]", '{"rows": [{"scale": 1}]}', '{"rows": {"AE": {"0": 1}}}'):
        (tmp_path / "known.json").write_text(content)
        with pytest.raises(UserError, match="not a JSON file of study.study"):
            evaluate.main([*command, "AE 0", "AE 1"])
