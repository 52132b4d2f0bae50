"""lightningdit.py: each part that makes it more than a SiT, against PyTorch's own or a formula."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from variants.lightningdit import (Attention, Block, LightningDiT, LightningDiTConfig, RMSNorm, SwiGLU,
                                   rotary_angles, velocity_direction_loss)
from flow import euler, flow_matching_loss, guided_velocity, interpolate, time_grid
from sit import SIZES

TINY = dict(num_latents=5, latent_dim=6, width=32, heads=4, depth=2, num_classes=10)


def randomized(module, std=0.3):
    """Every weight drawn at random, since a new model answers 0 to everything."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def tiny(**changes):
    return randomized(LightningDiT(LightningDiTConfig(**(TINY | changes))), 0.2)


# ------------------------------------------------- counts -------------------------------------------------

def count_by_hand(D, depth, L=128, C=32, classes=1000):
    hidden = 2 * 4 * D // 3
    linear = lambda n_in, n_out: n_in * n_out + n_out
    block = (linear(D, 3 * D) + linear(D, D)                                                 # attention
             + 2 * linear(D, hidden) + linear(hidden, D)                                     # SwiGLU
             + linear(D, 6 * D) + 2 * D)                                                    # adaLN, two gains
    ends = (linear(C, D) + linear(256, D) + linear(D, D) + (classes + 1) * D                 # embedders
            + D + linear(D, 2 * D) + linear(D, C))                                           # final layer
    return depth * block + ends


@pytest.mark.parametrize("size, exact, paper", [("XL", 674_961_824, 675e6), ("L", 457_890_816, None),
                                                ("B", 130_359_584, None), ("S", 32_886_944, None)])
def test_parameter_counts(size, exact, paper):
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(**SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == exact
    assert count_by_hand(SIZES[size]["width"], SIZES[size]["depth"]) == exact
    assert paper is None or abs(exact / paper - 1) < 1e-3               # "675M" [Tables 2 and 3]


def test_an_odd_head_size_is_refused():
    with pytest.raises(ValueError, match="even head size"):
        LightningDiTConfig(**(TINY | dict(width=36, heads=12)))


# ------------------------------------------------- parts -------------------------------------------------

def test_rmsnorm_equals_pytorchs_and_its_gain_counts():
    ours, oracle = randomized(RMSNorm(16)), nn.RMSNorm(16, eps=1e-6)
    oracle.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 16) * 7 + 2
    torch.testing.assert_close(ours(x), oracle(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(RMSNorm(16)(x).square().mean(-1), torch.ones(3, 5))


def test_swiglu_is_a_silu_gate_times_a_linear_layer():
    mlp = randomized(SwiGLU(8, 20))
    x = torch.randn(4, 8, dtype=torch.float64)
    W, b, V, c = (p.double() for p in (*mlp.w12.parameters(), *mlp.w3.parameters()))
    gate, value = x @ W[:20].T + b[:20], x @ W[20:].T + b[20:]
    expected = (gate / (1 + torch.exp(-gate)) * value) @ V.T + c
    torch.testing.assert_close(mlp.double()(x), expected)


def test_the_hidden_width_of_swiglu_is_two_thirds_of_the_mlps():
    for width, hidden in ((1152, 3072), (384, 1024), (32, 85)):
        assert Block(width, 4, False).mlp.w3.in_features == hidden


def naive_attention(attention, x, theta=10000.0):
    """Complex numbers turn one query and one key at a time; no shared code."""
    B, L, D = x.shape
    nh, hs = attention.heads, D // attention.heads
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias).reshape(B, L, 3, nh, hs)
    turn = lambda v, m: [complex(v[i], v[i + hs // 2]) * complex(math.cos(m * theta ** (-2 * i / hs)),
                         math.sin(m * theta ** (-2 * i / hs))) for i in range(hs // 2)]
    out = torch.zeros(B, L, nh, hs)
    for b in range(B):
        for h in range(nh):
            q = [turn(qkv[b, m, 0, h].tolist(), m) for m in range(L)]
            k = [turn(qkv[b, n, 1, h].tolist(), n) for n in range(L)]
            scores = torch.tensor([[sum((a * c.conjugate()).real for a, c in zip(q[m], k[n]))
                                    for n in range(L)] for m in range(L)]) / math.sqrt(hs)
            out[b, :, h] = scores.softmax(-1) @ qkv[b, :, 2, h]
    return F.linear(out.reshape(B, L, D), attention.proj.weight, attention.proj.bias)


@torch.no_grad()
def test_attention_with_rope_agrees_with_complex_numbers():
    attention, x = randomized(Attention(16, 2, qk_norm=False)), torch.randn(2, 6, 16)
    torch.testing.assert_close(attention(x, rotary_angles(6, 8)), naive_attention(attention, x),
                               rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_depends_on_relative_positions_alone():
    attention, x = randomized(Attention(16, 2, qk_norm=False)), torch.randn(2, 6, 16)
    cos, sin = rotary_angles(50, 8)
    at = lambda first: attention(x, (cos[first:first + 6], sin[first:first + 6]))
    torch.testing.assert_close(at(0), at(40), rtol=1e-3, atol=1e-4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])                            # and it does depend on them
    assert (attention(x[:, order], (cos[:6], sin[:6])) - at(0)[:, order]).abs().max() > 0.01


def test_angles_of_far_positions_stay_exact_under_autocast_and_in_a_bfloat16_model():
    angle = np.arange(128)[:, None] * 10000.0 ** (-np.arange(0, 72, 2) / 72)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotary_angles(128, 72)
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-5)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-5)


@torch.no_grad()
def test_qk_norm_is_off_by_default_and_takes_the_scale_out_of_queries_and_keys():
    x, rope = torch.randn(2, 6, 16), rotary_angles(6, 8)
    assert not LightningDiTConfig().qk_norm
    for qk_norm in (False, True):
        attention = randomized(Attention(16, 2, qk_norm))
        assert any("q_norm" in name for name, _ in attention.named_parameters()) == qk_norm
        before = attention(x, rope)
        attention.qkv.weight[:32] *= 9
        attention.qkv.bias[:32] *= 9
        same = torch.allclose(attention(x, rope), before, rtol=1e-3, atol=1e-4)
        assert same == qk_norm
    attention.q_norm.weight *= 3                                        # the gain is learned
    assert not torch.allclose(attention(x, rope), before, rtol=1e-2)


@torch.no_grad()
def test_block_is_adaln_zero_around_attention_and_swiglu():
    block, rope = randomized(Block(16, 2, False)), rotary_angles(5, 8)
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    m = F.linear(F.silu(c), *block.adaLN_modulation[1].parameters()).reshape(2, 6, 1, 16)
    norm = lambda x, gain: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    h = x + m[:, 2] * block.attn(norm(x, block.norm1.weight) * (1 + m[:, 1]) + m[:, 0], rope)
    expected = h + m[:, 5] * block.mlp(norm(h, block.norm2.weight) * (1 + m[:, 4]) + m[:, 3])
    torch.testing.assert_close(block(x, c, rope), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------ the model ------------------------------------------------

X, T, Y = torch.randn(3, 5, 6), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 10])


def test_a_new_model_answers_zero():
    assert torch.equal(LightningDiT(LightningDiTConfig(**TINY))(X, T, Y), torch.zeros(3, 5, 6))


@pytest.mark.parametrize("name", ["blocks.0.norm1.weight", "blocks.1.norm2.weight",
                                  "final_layer.norm_final.weight"])
def test_the_gains_of_the_norms_reach_the_output(name):
    model = tiny()
    gain = dict(model.named_parameters())[name]
    changed = functional_call(model, {name: gain * 1.5}, (X, T, Y))
    assert (changed - model(X, T, Y)).abs().max() > 1e-4


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_residual_stream_stays_float32_under_autocast(qk_norm):
    model, seen = tiny(qk_norm=qk_norm), []
    expected = model(X, T, Y)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X, T, Y)
    assert seen == [torch.float32] * 2 and (out - expected).norm() < 0.05 * expected.norm()
    assert model.bfloat16()(X.bfloat16(), T, Y).dtype == torch.bfloat16


# ------------------------------------------------ objective ------------------------------------------------

def test_direction_loss_is_one_minus_the_cosine_at_any_length():
    a, b = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    cosine = np.array([[np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(ps, qs)]
                       for ps, qs in zip(a.numpy(), b.numpy())])
    loss = velocity_direction_loss(a, b)
    np.testing.assert_allclose(loss, (1 - cosine).mean(1), rtol=1e-5)
    torch.testing.assert_close(velocity_direction_loss(a * torch.rand(3, 5, 1), b), loss)
    torch.testing.assert_close(velocity_direction_loss(a, -2 * a), torch.full((3,), 2.0))
    assert velocity_direction_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def learn(steps=400, **changes):
    """Train on two token pairs, (2, -2) for class 0 and (-2, 2) for class 1, deviation 0.1.
    Returns losses and the samples' mean distance from their pair (0.08 were they perfect)."""
    torch.manual_seed(0)
    model = LightningDiT(LightningDiTConfig(num_latents=2, latent_dim=2, width=32, heads=2, depth=1,
                                            num_classes=2, **changes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    losses, centre = [], torch.tensor([[2.0, -2.0], [-2.0, 2.0]])[..., None].expand(2, 2, 2)
    for _ in range(steps):
        y, t = torch.randint(2, (64,)), torch.rand(64)
        state, v = interpolate(centre[y] + 0.1 * torch.randn(64, 2, 2), torch.randn(64, 2, 2), t)
        prediction = model(state, t, y)
        loss = flow_matching_loss(prediction, v).mean()
        optimizer.zero_grad()
        (loss + velocity_direction_loss(prediction, v).mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    y = torch.arange(60) % 2
    samples = euler(guided_velocity(model.eval(), y), torch.randn(60, 2, 2), time_grid(50))
    return losses, (samples - centre[y]).abs().mean().item()


def test_a_tiny_model_learns_two_classes_and_euler_samples_them():
    losses, distance = learn()
    assert losses[0] > 4 and np.mean(losses[-50:]) < 0.5                # measured: 5.3 and 0.25
    assert distance < 0.3                                               # measured: 0.15


def test_with_rope_alone_tokens_do_not_find_their_places():
    # Why sine_table is on by default. Tokens that cannot be told apart have 0 for their mean: distance 2.
    losses, distance = learn(sine_table=False)
    assert np.mean(losses[-50:]) > 1 and distance > 1                   # measured: 1.5 and 2.0
