"""A GPU's rules, held against the scripts' own main() on a machine without one (pretend_cuda.py): no
operation or collective mixes devices, and a step makes the host wait for nothing.

The rank is 0 of 2 wherever the script trains, so that the collectives are there too.
"""
import numpy as np
import pytest
import torch
from PIL import Image
from pretend_cuda import RuleBroken, pretend_cuda, replace_everywhere
from random_frozen import use_random_networks
from test_train_tokenizer import TINY

import checkpoints
import common
import evaluate
import flow
import losses
import sample
import train_diffusion
import train_tokenizer
from frozen.pretrained import ViTConfig, VisionTransformer
from measures import training as measure
from pictures import draw
from runtime import processes, resuming

ON_GPU = [*TINY, "--device", "cuda", "--dtype", "bfloat16", "--workers", "0", "--log-every", "100",
          "--save-every", "100", "--data", "shapes"]
SIT = ("--width 32 --depth 2 --heads 2 --batch-size 8 --warmup 2 --log-every 100 --save-every 100 "
       "--workers 0 --device cuda --dtype bfloat16 --cache-images 40").split()


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """A DINO of two narrow layers that looks at 32 px, VGG with random weights, the same measurements for any
    number of steps."""
    use_random_networks(monkeypatch.setattr)
    monkeypatch.setattr(measure, "EVAL_IMAGES", 8)
    monkeypatch.setattr(measure, "LATENT_IMAGES", 8)
    # Its strokes are drawn on the CPU, thousands of small operations that each pass through the pretence.
    monkeypatch.setattr(draw, "hog_picture", lambda features, *args, **options: (
        features.cpu(), Image.new("RGB", (8, 8)))[1])
    monkeypatch.setattr(losses.DinoDiscriminator, "SIZE", 32)
    monkeypatch.setattr(losses, "load_vit", lambda *args, device, **options: VisionTransformer(
        ViTConfig(32, 12, 2, 16, 14), 16).eval().requires_grad_(False).to(device))


def waits(monkeypatch, main, argv, world=2):
    """What a run waits for, {line: times}, and the device it ran on."""
    with pretend_cuda(monkeypatch, world) as gpu:
        main([str(a) for a in argv])
    assert gpu.operations > 100
    assert gpu.collectives or world == 1
    return gpu.waits


def tokenizer(out, steps, *options):
    return [*ON_GPU, "--out", out, "--steps", steps, "--stage2-steps", steps, *options]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--disc dino --disc-start 1 --percep-weight 1 --batch-size 4",
                                     "--disc patch --disc-start 1 --variational --accumulate 2 "
                                     "--checkpointing"], ids=["dino, LPIPS", "patch, KL, checkpointing"])
def test_tokenizer(tmp_path, monkeypatch, options):
    """Both stages. Twice as many steps wait as often: for logging, saving and measuring, once per stage."""
    few, more = (waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / str(n), n, *options.split()))
                 for n in (2, 4))
    assert few == more and few
    state = checkpoints.load_checkpoint(tmp_path / "4")
    assert state["step"] == 8
    assert all(r["gpu_speed_used"] > 0 for r in checkpoints.read_metrics(tmp_path / "4") if "loss" in r)
    assert all(type(t) is torch.Tensor and t.isfinite().all() for t in state["ema"].values())


@pytest.mark.parametrize("options, kind", [([], ()), (["--no-cache", "--checkpointing", "--accumulate", "2"],
                                                      ["--variational"])],
                         ids=["cached latents", "images, KL, checkpointing"])
def test_diffusion_and_sampler(tmp_path, monkeypatch, options, kind):
    waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / "tokenizer", 2, *kind))
    few, more = (waits(monkeypatch, train_diffusion.main,
                       [*SIT, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / str(n),
                        "--steps", n, *options])
                 for n in (3, 6))
    assert few == more and few
    assert checkpoints.load_checkpoint(tmp_path / "6")["step"] == 6
    if options:
        return
    for sampler in flow.SAMPLERS:
        options = ["--ckpt", tmp_path / "6", "--sampler", sampler, "--num", "4", "--cfg", "2",
                   "--device", "cuda", "--cfg-interval", "0", "0.75"]
        outs = {n: tmp_path / f"{sampler}{n}.npz" for n in (3, 6)}
        few, more = (waits(monkeypatch, sample.main, [*options, "--steps", n, "--out", outs[n]], world=1)
                     for n in outs)
        assert few == more and few
        assert np.load(outs[6])["arr_0"].shape == (4, 16, 16, 3)


def test_evaluate_recon(tmp_path, monkeypatch):
    waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / "run", 2))
    waits(monkeypatch, evaluate.main, ["recon", tmp_path / "run", "--features", "none", "--num-images", "8",
                                       "--device", "cuda", "--out", tmp_path / "recon"], world=1)
    assert (tmp_path / "recon.json").exists()


# ---------------------------------- the rules are seen to be broken ----------------------------------

def test_a_mask_left_on_the_cpu_is_found(tmp_path, monkeypatch):
    replace_everywhere(monkeypatch, "to_device", lambda tensor, device: tensor)
    with pytest.raises(RuleBroken, match="maetok.py.*cuda:0 and cpu"):
        waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path, 2))


def test_a_cpu_tensor_in_a_collective_is_found(tmp_path, monkeypatch):
    all_mean = processes.all_mean
    replace_everywhere(monkeypatch, "all_mean", lambda values: all_mean(values.cpu()))
    with pytest.raises(RuleBroken, match="collective under NCCL got a CPU tensor"):
        waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path, 2))


@pytest.mark.parametrize("wait", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.cpu(),
                                  lambda x: x + torch.ones(len(x)).to(x.device, non_blocking=True)[:, None]],
                         ids=["a number read back", "a size by values", "a copy to the host",
                              "memory not pinned"])
def test_a_wait_inside_the_step_is_found(tmp_path, monkeypatch, wait):
    update = common.EMA.update
    monkeypatch.setattr(common.EMA, "update", lambda self, model: (
        update(self, model), wait(next(p for p in model.parameters() if p.ndim == 2).detach())))
    few, more = (waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / str(n), n)) for n in (2, 4))
    assert sum(more.values()) - sum(few.values()) >= 4                     # two steps more in each stage


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 8])
def test_every_rank_meets_the_others_in_the_same_order(tmp_path, monkeypatch, world):
    """The first and the last rank's collectives: the tensors' shapes and the lines that ask for them; of
    barriers, which have no tensors, rank 0 meets some at lines of its own."""
    monkeypatch.setattr(resuming, "check_same_step", lambda *where: None)          # the ranks share no folder
    orders = []
    for rank in (0, world - 1):
        with pretend_cuda(monkeypatch, world, rank) as gpu:
            train_tokenizer.main([str(word) for word in tokenizer(
                tmp_path / str(rank), 2, "--disc", "dino", "--disc-start", 1, "--batch-size", 2 * world)])
        orders.append([(line if shapes else "barrier", shapes) for line, shapes in gpu.collectives])
    assert orders[0] == orders[1] and len(orders[0]) > 20
