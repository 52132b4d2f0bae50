"""study/memory.py and CUDA's rules of autocast, on a machine without a GPU."""
import pytest
import torch
import torch.nn.functional as F
from cuda_autocast import CudaAutocast

import train_diffusion
import train_tokenizer
from study import memory


def test_cudas_lists_of_autocast():
    x, w = torch.randn(2, 8), torch.randn(8, 8, requires_grad=True)
    with CudaAutocast("cuda", torch.bfloat16):
        product = F.linear(x, w)
        assert product.dtype == (x @ x.T).dtype == torch.bfloat16
        assert F.layer_norm(product, (8,)).dtype == product.softmax(1).dtype == torch.float32
        assert F.gelu(product).dtype == (product + 1).dtype == torch.bfloat16                   # in neither
        assert torch.cat((product, x)).dtype == torch.float32
        with CudaAutocast("cuda", enabled=False):
            assert (x @ x.T).dtype == torch.float32
        assert (x @ x.T).dtype == torch.bfloat16
    assert (x @ x.T).dtype == torch.float32
    product.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(F.linear(x, w), product, atol=0, rtol=0)          # a product as PyTorch's
    assert w.grad.dtype == torch.float32


def test_what_lives_is_counted():
    with memory.Live() as live:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2:]
        assert live.now == 4096                                                  # 4,000 bytes, rounded up
        b = a + 1
        del a
        assert live.now == 8192                                                  # the view holds it
        del view, b
        assert live.now == 0 and live.peak == 8192


SIT = dict(width=64, depth=3, heads=2)
TOKENIZER = dict(image_size=32, patch_size=8, width=64, heads=2, encoder_depth=2, decoder_depth=2,
                 aux_depth=1, num_latents=4, latent_dim=4, hog_cell=4, targets="hog", percep_weight=0.0,
                 disc="patch")


@pytest.mark.parametrize("script, small", [(train_diffusion, SIT), (train_tokenizer, TOKENIZER)])
def test_a_steps_memory_is_its_state_and_grows_with_the_batch(script, small, monkeypatch):
    monkeypatch.setitem(script.Method.PRESETS, "small", small)
    one, two, three = (memory.peak(memory.Row(script, "small", n)) for n in (64, 128, 192))
    assert two - one == pytest.approx(three - two, rel=0.02) and two > 1.3 * one
    assert memory.peak(memory.Row(script, "small", 192, True)) < 0.8 * three
    if script is train_diffusion:
        config = script.Method.Config(**small)
        model = script.Method(config, None, memory.CPU).Model(config)
        numbers = sum(p.numel() for p in model.parameters())
        # Weights, EMA, both moments: 16 bytes, and bfloat16 copies of the matrices. Gradients come when
        # activations go.
        assert 16 * numbers < one - (two - one) < 18.5 * numbers


@pytest.mark.parametrize("again", [False, True])
def test_the_batches_of_the_table_fit(again, monkeypatch):
    """Also where they were not computed, and where another part of the step has the peak."""
    monkeypatch.setitem(train_diffusion.Method.PRESETS, "small", SIT)
    small, large = (memory.Row(train_diffusion, "small", n, again) for n in (8, 64))
    found = {row: memory.peak(row) for row in (small, large)}
    monkeypatch.setattr(memory, "SPARE", 0)
    monkeypatch.setattr(memory, "GPUS", [found[small] * part / 2 ** 30 for part in (0.5, 3, 9)])
    none, *fits = memory.largest(found, small, large)
    assert none == 0 and fits[0] < fits[1] > 64
    gib = lambda n: memory.peak(small._replace(batch=n)) / 2 ** 30
    for n, room in zip(fits, memory.GPUS[1:]):
        assert gib(n) <= room < gib(n + 16) and n % 8 == 0


def test_the_page_holds_the_table_and_nothing_that_a_terminal_said():
    page = (memory.ROOT / "docs/memory.md").read_text()
    table = page.split("<!-- study.memory -->\n")[1].split("<!-- /study.memory -->")[0]
    assert len(table.splitlines()) > 10 and all(line.startswith("| ") or line == "|---|---|---|---|---|"
                                                for line in table.splitlines())
