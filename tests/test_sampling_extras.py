"""Extras of the diffusion model, of after/ and variants/: other models in training, other objectives, and
what samplers then do. What is after the paper alone (time shift, x-prediction, MeanFlow) is in test_after.py.
"""
import numpy as np
import pytest
import torch
from random_frozen import use_random_networks
from test_flow import X, Y, FakeModel, gaussian
from test_sit import TINY, randomised, tiny
from test_train_diffusion import (TOKENIZER, diffusion, draw, losses, same_with_checkpointing,     # noqa: F401
                                  tokenizer, train)

import checkpoints
import common
import flow
import sit
import train_tokenizer
from after.autoguidance import autoguided_velocity
from after.guidance_free import Mixture, guidance_free_mixture
from common import UserError
from flow import LAST, expected_noise, flow_matching_loss, time_grid
from sit import SiT, SiTConfig
from train_diffusion import Method
from variants import released_sit
from variants.lightningdit import LightningDiT, LightningDiTConfig
from variants.repa import MLPHead, Repa

BOTH = pytest.mark.parametrize("name", ["sit", "lightningdit"])                   # conditioned through adaLN


def attached(name, *extras, **config):
    """A small model with these extras, every weight drawn at random."""
    kind = common.attach(sit.Diffusion, [*([] if name == "sit" else [name]), *extras])
    return randomised(kind.Model(kind.Config(**TINY | config))).eval()


# ---------------------------------------------- autoguidance ----------------------------------------------

def test_autoguidance_takes_the_worse_models_velocity_for_the_null_class():
    model, guide = tiny(), tiny()
    t = torch.full((3,), 0.4)
    with torch.no_grad():
        good, bad = model(X.float(), t, Y), guide(X.float(), t, Y)                   # the same labels in both
        velocity = lambda *more: autoguided_velocity(model, guide, Y, *more)(X, 0.4).float()
        torch.testing.assert_close(velocity(1.9, (0.0, 0.5)), bad + 1.9 * (good - bad), rtol=1e-4, atol=1e-4)
        for outside in (velocity(1.9, (0.0, 0.3)), velocity(1.0)):
            torch.testing.assert_close(outside, good, rtol=1e-4, atol=1e-4)


def test_a_model_without_classes_can_be_autoguided():
    model, guide, null = tiny(num_classes=0), tiny(num_classes=0), torch.zeros(3, dtype=torch.int64)
    t = torch.full((3,), 0.4)
    with torch.no_grad():
        good, bad = model(X.float(), t, null), guide(X.float(), t, null)
        guided = autoguided_velocity(model, guide, null, 3.0)(X, 0.4).float()
    torch.testing.assert_close(guided, bad + 3 * (good - bad), rtol=1e-4, atol=1e-4)


def test_autoguidance_from_an_earlier_checkpoint(tmp_path, diffusion, tokenizer):           # noqa: F811
    guided_by = lambda run: ["--add", "autoguidance", "--guide-ckpt", run]
    train(tmp_path / "early", tokenizer, "--lr", "2e-3")
    images = {}
    for name, options in {"guided": [*guided_by(tmp_path / "early"), "--cfg", 3],
                          "by itself": [*guided_by(diffusion), "--cfg", 3], "plain": []}.items():
        draw(diffusion, "--num", 4, *options, "--out", tmp_path / "x.npz")
        images[name] = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    assert np.abs(images["by itself"] - images["plain"]).max() <= 1   # good = bad: nothing to guide away from
    assert np.abs(images["guided"] - images["plain"]).max() > 1
    other = tmp_path / "other tokenizer"
    train_tokenizer.main([*TOKENIZER.split(), "--seed", "1", "--out", str(other)])
    train(tmp_path / "other", other)
    train(tmp_path / "cosine", tokenizer, "--path", "cosine")
    train(tmp_path / "unconditional", tokenizer, "--unconditional")
    train(tmp_path / "told", tokenizer, "--add", "guidance_free")
    for message, run, guide in (("another tokenizer", diffusion, tmp_path / "other"),
                                ("path cosine, the model's linear", diffusion, tmp_path / "cosine"),
                                ("classes 0, the model's 10", diffusion, tmp_path / "unconditional"),
                                ("guided without a guide", tmp_path / "told", diffusion)):
        with pytest.raises(UserError, match=message):
            draw(run, *guided_by(guide), "--out", tmp_path / "x.png")
    with pytest.raises(UserError, match="--guide-ckpt"):
        draw(diffusion, "--add", "autoguidance", "--out", tmp_path / "x.png")


# ------------------------------------------ guidance-free training ------------------------------------------

def test_guidance_free_loss_is_least_at_the_guided_velocity():
    """With c = label + 1 for the target and u = 11, v(x, c, beta) = u + (c - u) / beta makes it 0."""
    model, t, beta = FakeModel(), torch.full((3,), 0.4), torch.tensor([0.25, 0.5, 1.0])
    x, told = X.float(), []

    class Network(torch.nn.Module):
        def forward(self, x, t, y, beta):
            told.append(beta)
            return self.prediction

    mixture = Mixture(Network(), model)
    c = (Y + 1.0)[:, None, None].expand_as(x)
    guided = (11 + (c - 11) / beta[:, None, None]).requires_grad_()

    def loss(prediction):
        mixture.network.prediction = prediction
        return flow_matching_loss(mixture(x, t, Y, beta), c)

    assert loss(guided).shape == (3,) and loss(guided).abs().max() < 1e-6
    assert loss(guided + 0.1).min() > 1e-4
    assert model.calls[0][2].tolist() == [10, 10, 10] and torch.equal(told[0], beta)
    # an unguided prediction is right at beta = 1 alone
    assert (loss(c) < 1e-6).tolist() == [False, False, True]


def test_the_mixture_is_its_formula_and_u_has_no_gradient():
    c, u, beta = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.tensor([0.3, 1.0])
    found = guidance_free_mixture(c.bfloat16(), u, beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], 0.3 * c[0].bfloat16().float() + 0.7 * u[0])
    torch.testing.assert_close(found[1], c[1].bfloat16().float())
    model = attached("sit", "guidance_free")
    t, beta = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.3, 0.6, 0.9])
    x, weight, gradients = X.float(), torch.randn(3, 5, 6), []
    for part in (Mixture(model, model)(x, t, Y, beta), beta[:, None, None] * model(x, t, Y, beta=beta)):
        model.zero_grad()
        (part * weight).sum().backward()
        gradients.append(model.final_layer.linear.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_beta_is_uniform_and_1_where_the_label_was_dropped():
    kind = common.attach(Method, ["guidance_free"])
    config = kind.Config(num_latents=5, latent_dim=6, num_classes=10, tokenizer="x", label_dropout=0.2)
    method = kind(config, None, torch.device("cpu"))
    loaded = torch.randn(2000, 5, 6), torch.arange(2000) % 10
    batch = method.batch(3, range(2000), loaded)
    beta, null = batch.more["beta"], batch.y == 10
    assert 0.15 < null.float().mean() < 0.25 and (beta[null] == 1).all()
    assert abs(beta[~null].mean() - 0.5) < 0.03 and beta.min() >= 0 and (beta[~null] < 1).all()
    again = method.batch(3, range(500, 700), tuple(part[500:700] for part in loaded))
    assert torch.equal(again.more["beta"], beta[500:700])                       # a sample's own, in any batch
    plain = Method(config, None, torch.device("cpu")).batch(3, range(2000), loaded)
    assert plain.more == {} and all(torch.equal(getattr(plain, part), getattr(batch, part))
                                    for part in ("x", "noise", "t", "y"))


@BOTH
def test_guidance_free_sampling_is_one_call_that_is_told_the_scale(name):
    model = attached(name, "guidance_free")
    t = torch.full((3,), 0.4)
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        v = model.velocity(Y, 2.0, (0.0, 0.5))(X, 0.4).float()
        outside = model.velocity(Y, 2.0, (0.0, 0.3))(X, 0.4).float()
        assert calls == [3, 3]                                          # classifier-free guidance: 6 rows
        torch.testing.assert_close(v, model(X.float(), t, Y, beta=torch.full((3,), 0.5)))
        torch.testing.assert_close(outside, model(X.float(), t, Y))                       # beta = 1
        assert (v - outside).abs().max() > 1e-3
    flow.check_guidance(model, 1.5)
    with pytest.raises(UserError, match="from 1 on"):
        flow.check_guidance(model, 0.5)
    with pytest.raises(UserError, match="unconditional"):
        flow.check_guidance(attached(name, "guidance_free", num_classes=0), 2.0)


def test_guidance_free_training_learns_and_resumes(tmp_path, tokenizer):                    # noqa: F811
    options = ["--add", "guidance_free", "--steps", 40, "--lr", "3e-3", "--save-every", 20]
    whole = train(tmp_path / "whole", tokenizer, *options)
    assert np.mean(losses(tmp_path / "whole")[-5:]) < np.mean(losses(tmp_path / "whole")[:5])
    assert any("beta_embedder" in name for name in whole["model"]) and whole["add"] == ["guidance_free"]
    draw(tmp_path / "whole", "--num", 4, "--steps", 3, "--cfg", 2, "--out", tmp_path / "x.png")
    with pytest.raises(UserError, match="from 1 on"):
        draw(tmp_path / "whole", "--cfg", 0.5, "--out", tmp_path / "y.png")
    with pytest.raises(UserError, match="usit does not have"):
        train(tmp_path / "u", tokenizer, "--add", "usit,guidance_free")
    for name in ("last.pt", "step_0000040.pt"):
        (tmp_path / "whole" / name).unlink()
    again = train(tmp_path / "whole", tokenizer, *options)
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())


# -------------------------------------- sampling as the authors' code --------------------------------------

def test_euler_maruyama_as_released_takes_2t_on_the_cosine_path_too():
    """A naive loop by the score s = -E[eps | x_t] / sigma: drift v - t s, noise sqrt(2 t dt).
    On the linear path both choices are one."""
    def velocity(x, t):
        return torch.sin(3 * x) + t

    def naive(x, steps, path):
        times = [*np.linspace(1, 0.04, steps), 0.0]
        for step, (t, following) in enumerate(zip(times, times[1:])):
            v, sigma = velocity(x, t), gaussian(path).coefficients(t)[1]
            x = x + (following - t) * (v + t * expected_noise(v, x, t, path) / sigma)
            if following > 0:
                x = x + (2 * t * (t - following)) ** 0.5 * noise[step]
        return x

    start, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(9, 2, 3, 4, dtype=torch.float64)
    run = lambda path, module: module.euler_maruyama(velocity, start, time_grid(10, LAST),
                                                     noise=lambda step: noise[step], path=path)
    for path in ("linear", "cosine"):
        torch.testing.assert_close(run(path, released_sit), naive(start, 10, path))
    torch.testing.assert_close(run("linear", released_sit), run("linear", flow))
    assert (run("cosine", released_sit) - run("cosine", flow)).abs().max() > 0.05


def test_heun_as_released_decides_on_guidance_once_a_step():
    batches = []

    def doubled(model):
        model.forward = lambda x, t, y: batches.append((round(t[0].item(), 3), len(x))) or x
        batches.clear()
        flow.sample_latents(model, [0], [1], 0, 2.0, (0.0, 0.5), "heun", 4)
        return [t for t, size in batches if size == 2]

    assert doubled(attached("released_sit")) == [0.5, 0.25, 0.25]
    assert doubled(tiny()) == [0.5, 0.5, 0.25, 0.25]


def test_the_released_ways_are_those_of_a_model_that_has_them():
    """Without guidance, and on the linear path, all samplers are flow.py's."""
    model, plain = attached("released_sit"), tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    assert torch.equal(model.pos_embed, plain.pos_embed) and "pos_embed" in model.state_dict()

    def both(**options):
        return [flow.sample_latents(m, [0, 7], [1, 2], 0, steps=5, **options) for m in (model, plain)]

    for sampler in flow.SAMPLERS:
        torch.testing.assert_close(*both(sampler=sampler), rtol=1e-4, atol=1e-4)
    guided = dict(sampler="euler", cfg_scale=1.5, interval=(0.0, 0.7))
    torch.testing.assert_close(*both(**guided), rtol=1e-4, atol=1e-4)
    ours, theirs = both(path="cosine")
    assert (ours - theirs).abs().max() > 1e-3


# --------------------------------------------- the other models ---------------------------------------------

def test_presets_of_the_other_models_are_tables_9_and_3():
    lightning, usit = (common.attach(Method, [name]) for name in ("lightningdit", "usit"))
    config = lightning.Config(**lightning.PRESETS["lightningdit-xl"])
    assert (config.width, config.depth, config.heads) == (1152, 28, 16)
    assert (config.lr, lightning.BETAS, config.batch_size, config.steps, config.times, config.direction_loss,
            config.qk_norm, config.sine_table) == (
        2e-4, (0.9, 0.95), 1024, 400_000, "logit-normal", 1.0, False, True)
    config = usit.Config(**usit.PRESETS["usit-2b"])
    assert (config.width, config.depth, config.heads) == (2048, 28, 32)
    for kind, name in ((lightning, "lightningdit-xl"), (usit, "usit-2b")):
        config = kind.Config(**kind.PRESETS[name])               # Fig. 5b needs points: eight at least
        assert config.steps // config.keep_every >= 8 and config.keep_every % config.save_every == 0
        assert "shapes" in kind.PRESETS and isinstance(config, SiTConfig)


@pytest.mark.parametrize("name, kind", [("lightningdit", "LightningDiT"), ("usit", "USiT")])
def test_the_other_models_train_resume_and_sample(tmp_path, tokenizer, name, kind):         # noqa: F811
    state = train(tmp_path / "run", tokenizer, "--add", name)
    model, _, config = sit.load_diffusion(tmp_path / "run")
    assert kind in [cls.__name__ for cls in type(model).__mro__] and state["add"] == [name]
    assert config["add"] == name
    assert train(tmp_path / "run", tokenizer, "--add", name)["step"] == state["step"]        # nothing to do
    with pytest.raises(UserError, match=f"add {name!r} -> ''"):
        train(tmp_path / "run", tokenizer)
    draw(tmp_path / "run", "--num", 4, "--steps", 3, "--cfg", 2, "--sampler", "euler", "--out",
         tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_the_direction_loss_changes_the_gradient(tmp_path, tokenizer):                      # noqa: F811
    states = [train(tmp_path / str(weight), tokenizer, "--add", "lightningdit", "--direction-loss",
                    weight)["model"] for weight in (0, 1)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses(tmp_path / "0")[0] == losses(tmp_path / "1")[0]                  # what is logged is the MSE


@pytest.mark.parametrize("options", [
    ["--add", "lightningdit,guidance_free"], ["--add", "usit"],
    ["--no-cache", "--add", "repa", "--repa", "dinov2-s", "--repa-block", "1", "--accumulate", "2"]],
    ids=["lightningdit", "usit", "repa"])
def test_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path, tokenizer, options,     # noqa: F811
                                                          monkeypatch):
    use_random_networks(monkeypatch.setattr)
    same_with_checkpointing(tmp_path, tokenizer, *options)


# --------------------------------------------------- REPA ---------------------------------------------------

@pytest.mark.parametrize("kind, config", [(SiT, SiTConfig), (LightningDiT, LightningDiTConfig)])
def test_repa_reads_the_middle_layer_of_calls_with_a_gradient(kind, config):
    model = randomised(kind(config(**TINY))).eval()
    repa, seen = Repa(model, model, 1, MLPHead(5, 5, 32, 3)), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    args = X.float(), torch.full((3,), 0.4), Y
    v = repa(*args)
    assert torch.equal(repa.tokens, seen[0]) and torch.equal(repa.features, repa.head(seen[0]))
    with torch.no_grad():
        torch.testing.assert_close(v, model(*args))
    assert torch.equal(repa.tokens, seen[0])                       # the second call, without, changes nothing


@pytest.mark.slow
def test_repa_pulls_the_middle_layer_towards_the_teacher(tmp_path, tokenizer, monkeypatch):    # noqa: F811
    use_random_networks(monkeypatch.setattr)
    options = "--no-cache --add repa --repa dinov2-s --repa-block 1 --steps 30 --lr 3e-3 --seed 1".split()
    state = train(tmp_path / "run", tokenizer, *options)
    agreement = [r["repa"] for r in checkpoints.read_metrics(tmp_path / "run")]
    # Zero tokens would make it a hundred.
    assert checkpoints.read_metrics(tmp_path / "run")[0]["grad_norm"] < 5
    assert agreement[-1] < agreement[0] - 0.2                                          # -cos
    assert state["repa_head"]["head.weight"].shape[0] == 384
    assert not any("head" in name or "teacher" in name for name in state["ema"])     # sampling needs neither
    assert state["add"] == [] and type(sit.load_diffusion(tmp_path / "run")[0]) is SiT
    without = train(tmp_path / "without", tokenizer, *options, "--repa-weight", 0)
    assert not torch.equal(state["model"]["blocks.0.attn.qkv.weight"],
                           without["model"]["blocks.0.attn.qkv.weight"])


def test_bad_options_of_extras_are_named(tmp_path, tokenizer):                              # noqa: F811
    repa = ["--add", "repa", "--no-cache"]
    for message, options in [("even number", ["--add", "usit", "--depth", 3]),
                             ("even head size", ["--add", "lightningdit", "--width", 36, "--heads", 4]),
                             ("choose dinov2-s", [*repa, "--repa", "clip"]),
                             ("add --no-cache", ["--add", "repa"]),
                             ("--repa-block of 1 to 2", [*repa, "--repa-block", 3]),
                             ("of sit or lightningdit", ["--add", "usit,repa", "--no-cache"])]:
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", tokenizer, *options)
