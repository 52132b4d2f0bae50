"""train_tokenizer.py with frozen networks and a GAN: objective, two processes, memory and speed."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import in_two_processes
from random_frozen import use_random_networks
from test_train_tokenizer import TINY, assert_same_weights, command, logged_losses, run, train
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import common
import losses
import maetok
import train_tokenizer as trainer
from frozen.pretrained import ViTConfig, VisionTransformer
from measures import training as measure
from train_tokenizer import Config, Method

GAN = "--disc patch --disc-start 2".split()


@pytest.fixture
def random_networks(monkeypatch):
    """Frozen networks with random weights, and a DINO that looks at 32 px: nothing is downloaded."""
    use_random_networks(monkeypatch.setattr)
    monkeypatch.setattr(losses.DinoDiscriminator, "SIZE", 32)


@pytest.fixture
def narrow_dino(random_networks, monkeypatch):
    """A DINO of two narrow layers."""
    monkeypatch.setattr(losses, "load_vit", lambda *args, **options: VisionTransformer(
        ViTConfig(32, 12, 2, 16, 14), 16).eval().requires_grad_(False))


# ------------------------------------ perceptual and adversarial terms ------------------------------------

def test_every_term_of_the_objective_is_logged_and_they_sum_to_the_loss(tmp_path, random_networks,
                                                                        monkeypatch):
    monkeypatch.setattr(trainer, "PERCEP_WARMUP", 4)
    options = ("--targets hog,dinov2-s --disc patch --disc-start 2 --percep-weight 1 "
               "--disc-weight 0.4 --aux-weight 0.5 --variational --steps 5 --stage 1").split()
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
    """Takes the place of losses.Adversary: logits are weighted pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 8, 8))

    def logits(self, images, window):
        assert window == "third window"
        return (images * self.weight).sum((1, 2, 3))


def test_a_loss_differentiated_once_gives_the_same_gradients():
    """With other terms beside it, at a weight, several times, and bit for bit in its value."""
    passes, x, w = [], torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)

    def loss(y):
        features = (y * w.detach()).sin()
        features.register_hook(passes.append)
        return features.square().mean()

    gradients = []
    for make in (lambda y: loss(y), lambda y: losses.differentiated(loss, y)):
        y = (x * w).tanh()
        value = make(y)
        early, = torch.autograd.grad(value, w, retain_graph=True)
        (y.square().sum() + 0.3 * value).backward()
        gradients.append((value.detach(), early, x.grad, w.grad))
        x.grad = w.grad = None
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert gradients[0][0] == gradients[1][0] and len(passes) == 2 + 1          # twice, as usual; here once


@pytest.mark.parametrize("step, gan, vae, masked", [(3, True, False, True), (10, True, True, True),
                                                    (0, False, True, True), (3, False, False, False)])
def test_the_objective_is_the_weighted_sum_of_its_terms(step, gan, vae, masked, monkeypatch):
    """Eq. 6 and 8 with simple functions for the networks: every term by hand, each weight different."""
    config = Config(percep_weight=0.7, disc_weight=0.3, aux_weight=0.25, kl_weight=0.01, targets="hog",
                    variational=vae, dtype="float32", **{} if masked else dict(mask_low=0.0, mask_high=0.0))
    lpips = lambda a, b: (a - b).abs().mean((1, 2, 3)) + 1
    monkeypatch.setattr(trainer, "PERCEP_WARMUP", 6)
    monkeypatch.setattr(losses, "build_lpips", lambda *args: lpips)
    method = Method(config, torch.device("cpu"))
    method.adversary = critic = Critic()
    last_layer = torch.randn(5, 8, requires_grad=True)
    model = SimpleNamespace(decoder=SimpleNamespace(head=SimpleNamespace(weight=last_layer)))
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 5)
    reconstruction = noise @ last_layer
    features, target = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool() if masked else torch.zeros(2, 4).bool()
    posterior = torch.randn(2, 3, 4)
    batch = trainer.Batch(images, mask, torch.randn(2, 3, 2) if vae else None, {"hog": target},
                          ["first window", "second window", "third window"] if gan else None, {})
    output = maetok.MAETokOutput(reconstruction, None, {"hog": features}, posterior if vae else None)
    loss, terms = method.objective(step, batch, output, model)

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
    # Nothing is hidden from a plain AE: then the mean is over all patches.
    by_hand["hog"] = ((hidden[0, 0] + hidden[0, 3]) / 2 + hidden[1, 1]) / 2 if masked else hidden.mean()
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


def test_frozen_networks_stay_as_they_are_and_out_of_the_checkpoint(tmp_path, random_networks, monkeypatch):
    caught, start = {}, trainer.start

    def catch(method, processes):
        state = start(method, processes)
        caught["networks"] = [method.targets["dinov2-s"].teacher.network, method.lpips.vgg,
                              method.adversary.discriminator.frozen[0]]
        caught["before"] = [common.fingerprint(network) for network in caught["networks"]]
        return state

    monkeypatch.setattr(trainer, "start", catch)
    state = train(tmp_path / "run", *"--targets hog,dinov2-s --disc dino --disc-start 0 --percep-weight 1 "
                                     "--steps 1 --stage2-steps 1 --batch-size 4".split())
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
def test_the_gan_runs_in_bfloat16(tmp_path, narrow_dino, disc):
    state = train(tmp_path / disc, *GAN, "--disc", disc, "--dtype", "bfloat16")
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


def small_and_smooth():
    """What this test changes in the discriminators, for other processes."""
    losses.nn.LeakyReLU = lambda slope: torch.nn.SiLU()
    losses.DinoDiscriminator.SIZE = 32                                          # 224 px would take minutes
    losses.load_vit = lambda *args, **options: VisionTransformer(
        ViTConfig(32, 12, 2, 16, 14), 16).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("disc", ["patch", "dino"])
def test_two_processes_with_the_gan_equal_one(tmp_path, disc, narrow_dino, monkeypatch):
    """Synchronised batch norm, one adaptive weight, one LeCAM average: four adversarial steps, every term to
    1e-4.

    After the first of them the adaptive weight to 1e-3: it divides two gradients' norms, and Adam, which
    divides by the gradient's size, turns rounding into whole steps where gradients are close to 0. Measured:
    2e-5 in the first, 2.4e-4 in all. Not more steps: in the sixth the weight changes by 1e-3 on one process,
    if images change by 1e-7.

    With a smooth activation: now and then a value is so close to LeakyReLU's kink that float32's rounding,
    which differs with the number of processes, puts it on the other side: the gradient changes by 1e-3.
    """
    options = [*GAN, "--disc", disc, "--steps", "6", "--stage", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(losses.nn, "LeakyReLU", lambda slope: torch.nn.SiLU())
        train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, *options, "--out", tmp_path / "two"], tmp_path / "log",
                     small_and_smooth)
    one, two = (checkpoints.read_metrics(tmp_path / name) for name in ("one", "two"))
    terms = ("loss", "recon", "hog", "adv", "adaptive_weight", "disc", "lecam")
    for a, b in zip(one, two, strict=True):
        for term in terms:
            if term in a:
                near = 1e-3 if term == "adaptive_weight" and a["step"] > 3 else 1e-4
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


# ------------------------------------------- memory and speed -------------------------------------------

def test_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path, narrow_dino, monkeypatch):
    monkeypatch.setattr(trainer, "PERCEP_WARMUP", 2)
    options = ("--disc dino --disc-start 1 --percep-weight 1 --steps 3 --stage2-steps 1 --batch-size 4 "
               "--accumulate 2").split()
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
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options, "--checkpointing"],
                     tmp_path / "log")
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-3)


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading a number, and sizes that depend on values."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select",
                                                           "is_nonzero", "equal")
        return function(*args, **kwargs or {})


def test_a_step_never_reads_a_number_back(tmp_path, monkeypatch):
    """As many reads in 7 steps as in 4: those of logging, saving and measuring, once per stage."""
    monkeypatch.setattr(measure, "EVAL_IMAGES", 16)
    counts = []
    for steps in (4, 7):
        with CountReads() as mode:
            train(tmp_path / str(steps), *GAN, "--variational", "--steps", str(steps), "--stage", "1",
                  "--log-every", "100", "--save-every", "100")
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_compiled_transformers_train_as_plain_ones(tmp_path, monkeypatch):
    """With the compiler's tracing but without its kernels, which need a GPU or a C++ compiler. The adaptive
    weight takes gradients of two losses through what is compiled."""
    def compile_traced(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")
        compiled.append(module)

    compiled = []
    options = [*GAN, "--disc-start", "1", "--steps", "3", "--stage2-steps", "1"]
    plain = train(tmp_path / "plain", *options)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    traced = train(tmp_path / "traced", *options, "--compile")
    assert len(compiled) == 3 + 2             # encoder, decoder, HOG decoder; in stage 2 without the last
    np.testing.assert_allclose(logged_losses(tmp_path / "plain"), logged_losses(tmp_path / "traced"),
                               rtol=1e-4)
    assert plain["model"].keys() == traced["model"].keys()
