"""runtime/attention.py: the same attention everywhere, by products where PyTorch's gradient is slow."""
import pytest
import torch
import torch.nn.functional as F

from runtime import attention as module
from runtime.attention import attention


def heads(dtype, tokens=7, grad=True):
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 8).to(dtype).requires_grad_(grad) for _ in range(3)]


def results(call, inputs):
    out = call(*inputs)
    return out, *torch.autograd.grad(out.float().square().sum(), inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_and_its_gradients_are_softmax_of_the_products(dtype, tolerance):
    def by_hand(q, k, v):
        return (q @ k.mT / 8 ** 0.5).softmax(-1) @ v

    inputs = heads(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for found, expected in zip(results(attention, inputs), results(by_hand, exact)):
        assert found.dtype == dtype and (found - expected).norm() < tolerance * expected.norm()


def test_products_are_for_gradients_in_bfloat16_of_few_tokens_alone(monkeypatch):
    fused, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *x: fused.append(1) or kernel(*x))
    attention(*heads(torch.bfloat16))
    assert not fused
    for inputs in (heads(torch.float32), heads(torch.bfloat16, grad=False),
                   heads(torch.bfloat16, module.LONGEST + 1)):
        fused.clear()
        attention(*inputs)
        assert fused
