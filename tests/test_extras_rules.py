"""A GPU's rules (test_cuda_rules.py) for the extras, and Muon in two processes."""
import numpy as np
import pytest
from forked import in_two_processes
from test_cuda_rules import SIT, small_networks, tokenizer, waits                    # noqa: F401 (a fixture)
from test_train_tokenizer import TINY, logged_losses, train

import after.muon                                       # noqa: F401 (conftest.py: no extras, none of this)
import checkpoints
import sample
import train_diffusion
import train_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--add released --disc patch --disc-start 1 --batch-size 4",
    "--add tables,muon --mixed-size 32 --ape encoder",
    "--add nested_dropout,latent_noise --variational"],
    ids=["released", "two sizes, Muon", "noise, lengths"])
def test_tokenizer(tmp_path, monkeypatch, options):
    few, more = (waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / str(n), n, *options.split()))
                 for n in (2, 4))
    assert few == more and few


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--add muon,time_shift", "--add repa --repa dinov2-s --repa-block 1 --no-cache",
    "--add lightningdit,guidance_free", "--add usit"], ids=lambda text: text.split()[1])
def test_diffusion_and_sampler(tmp_path, monkeypatch, options):
    """Without MeanFlow: torch.func.jvp, of its target, crashes on pretended tensors."""
    size = ["--image-size", "28", "--patch-size", "14", "--hog-cell", "7"] if "repa" in options else []
    waits(monkeypatch, train_tokenizer.main, tokenizer(tmp_path / "tokenizer", 2, *size))
    few, more = (waits(monkeypatch, train_diffusion.main,
                       [*SIT, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / str(n), "--steps", n,
                        *options.split()])
                 for n in (3, 6))
    assert few == more and few
    draw = ["--ckpt", tmp_path / "6", "--num", "4", "--cfg", "2", "--device", "cuda"]
    if "guidance_free" not in options:
        draw += ["--add", "autoguidance", "--guide-ckpt", tmp_path / "3"]
    few, more = (waits(monkeypatch, sample.main, [*draw, "--steps", n, "--out", tmp_path / f"{n}.npz"],
                       world=1)
                 for n in (3, 6))
    assert few == more and few
    assert len(np.load(tmp_path / "6.npz")["arr_0"]) == 4


@pytest.mark.slow
def test_muon_in_two_processes_follows_one_and_the_number_may_change(tmp_path):
    options = ["--add", "muon", "--steps", "20", "--stage2-steps", "4", "--save-every", "10"]
    train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options], tmp_path / "log")
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
    for path in ("last.pt", "step_0000024.pt", "step_0000020.pt"):
        (tmp_path / "two" / path).unlink()
    assert checkpoints.find_checkpoint(tmp_path / "two")["step"] == 10
    train(tmp_path / "two", *options)
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
