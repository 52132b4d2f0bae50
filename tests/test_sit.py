"""sit.py: the network's structure and counts."""
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sit import SIZES, Block, SiT, SiTConfig, position_table, time_features

TINY = dict(num_latents=5, latent_dim=6, width=32, heads=4, depth=2, num_classes=10)


def tiny(random=True, **changes):
    """A small model; random: with every weight drawn at random, since a new one answers 0 to everything."""
    model = SiT(SiTConfig(**(TINY | changes))).eval()
    return randomised(model) if random else model


def randomised(model):
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def on_meta(**config):
    with torch.device("meta"):
        return SiT(SiTConfig(**config))


# --------------------------------------------- counts and names ---------------------------------------------

@pytest.mark.parametrize("size, exact, paper", [("XL", 674_853_152, 675e6), ("L", 457_857_056, 458e6),
                                                ("B", 130_328_096, None), ("S", 32_871_200, None)])
def test_parameter_counts(size, exact, paper):
    count = sum(p.numel() for p in on_meta(**SIZES[size]).parameters())
    assert count == exact
    assert paper is None or abs(count / paper - 1) < 1e-3                # as the paper prints them [Sec. 4.1]


def test_the_default_is_the_papers_xl_and_its_released_list_of_weights():
    assert dataclasses.asdict(SiTConfig()) == dataclasses.asdict(SiTConfig(**SIZES["XL"]))
    D, expected = 1152, {"x_embedder.weight": (1152, 32), "x_embedder.bias": (1152,),
                         "y_embedder.embedding_table.weight": (1001, 1152)}
    layers = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "final_layer.linear": (32, D),
              "final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(28):
        layers |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D),
                   f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D),
                   f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = on_meta().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    # with its stored pos_embed
    assert sum(value.numel() for value in state.values()) + 128 * 1152 == 675_000_608


@pytest.mark.parametrize("bad, message", [
    (dict(width=30), "divided over 4 heads"), (dict(width=33, heads=3), "odd"), (dict(depth=0), "from 1 to"),
    (dict(latent_dim=-1), "from 1 to"), (dict(num_classes=-1), "from 0 to")])
def test_impossible_configurations_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        SiTConfig(**(TINY | bad))


# ----------------------------------------------- the network -----------------------------------------------

def test_a_new_model_answers_zero_and_its_blocks_are_the_identity():
    model = tiny(random=False)
    x, t, y = torch.randn(3, 5, 6), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 10])
    assert torch.equal(model(x, t, y), torch.zeros(3, 5, 6))
    tokens, c = torch.randn(3, 5, 32), torch.randn(3, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
        assert block.attn(tokens).abs().min() > 0 and block.mlp(tokens).abs().min() > 0    # closed, not empty


def test_block_equals_pytorchs_pre_norm_encoder_layer_when_gates_are_open():
    ours = Block(32, 4)
    oracle = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0,
                                        activation=lambda x: F.gelu(x, approximate="tanh"),
                                        layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    nn.init.zeros_(ours.adaLN_modulation[1].weight)
    # shift, scale, gate
    ours.adaLN_modulation[1].bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(32)
    for theirs, mine in ((oracle.linear1, ours.mlp.fc1), (oracle.linear2, ours.mlp.fc2),
                         (oracle.self_attn.out_proj, ours.attn.proj)):
        theirs.load_state_dict(mine.state_dict())
    oracle.self_attn.in_proj_weight.data.copy_(ours.attn.qkv.weight)
    oracle.self_attn.in_proj_bias.data.copy_(ours.attn.qkv.bias)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x, torch.randn(2, 32)), oracle(x), rtol=1e-5, atol=1e-5)


def test_modulation_is_shift_scale_gate_of_attention_then_of_the_mlp():
    block = Block(16, 2)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    layer = block.adaLN_modulation[1]
    m = (c / (1 + torch.exp(-c)) @ layer.weight.T + layer.bias).reshape(2, 6, 1, 16)
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = x + m[:, 2] * block.attn(norm(x) * (1 + m[:, 1]) + m[:, 0])
    expected = expected + m[:, 5] * block.mlp(norm(expected) * (1 + m[:, 4]) + m[:, 3])
    torch.testing.assert_close(block(x, c), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_interleaved_sines_and_cosines():
    table = position_table(7, 10)
    for position in range(7):
        for i in range(5):
            angle = position / 10000 ** (2 * i / 10)
            assert abs(table[0, position, 2 * i] - math.sin(angle)) < 1e-6
            assert abs(table[0, position, 2 * i + 1] - math.cos(angle)) < 1e-6
    model = tiny()
    assert torch.equal(model.pos_embed, position_table(5, 32)) and "pos_embed" not in model.state_dict()
    x, t, y = torch.randn(2, 5, 6), torch.rand(2), torch.tensor([1, 2])
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    assert not torch.allclose(model(x[:, shuffle], t, y), model(x, t, y)[:, shuffle], atol=1e-3)
    model.pos_embed.zero_()                                            # the table is the only source of order
    torch.testing.assert_close(model(x[:, shuffle], t, y), model(x, t, y)[:, shuffle], rtol=1e-4, atol=1e-5)


def test_time_features_are_cosines_then_sines_of_unscaled_time():
    t = torch.tensor([0.0, 0.3, 1.0])
    features = time_features(t)
    assert features.shape == (3, 256)
    for b in range(3):
        for i in (0, 1, 64, 127):
            angle = float(t[b]) * 10000 ** (-i / 128)
            assert (abs(features[b, i] - math.cos(angle)) < 1e-6
                    and abs(features[b, 128 + i] - math.sin(angle)) < 1e-6)


def test_time_features_are_float32_under_autocast():
    t = torch.tensor([0.990, 0.991])                                          # one number in bfloat16
    plain = time_features(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(time_features(t), plain)
        assert tiny()(torch.randn(2, 5, 6), t, torch.tensor([1, 2])).dtype == torch.bfloat16
    assert not torch.equal(plain[0], plain[1])


X, T, Y = torch.randn(3, 5, 6), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 9, 10])


def test_velocity_depends_on_state_time_and_class_of_its_own_sample():
    model = tiny()
    v = model(X, T, Y)
    assert v.shape == X.shape
    others = (model(X + torch.randn(3, 5, 6), T, Y), model(X, T + 0.05, Y), model(X, T, (Y + 1) % 11))
    assert all((v - other).abs().amax((1, 2)).min() > 1e-4 for other in others)
    torch.testing.assert_close(v[1:2], model(X[1:2], T[1:2], Y[1:2]), rtol=1e-4, atol=1e-4)


def test_latents_of_another_shape_are_refused():
    for shape in ((2, 1, 6), (2, 4, 6), (2, 5, 7)):
        with pytest.raises(ValueError, match="5 tokens with 6 channels"):
            tiny()(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_an_extra_may_give_the_model_a_further_input():
    """build_embedders and condition are the places for it; forward passes it on."""
    class Told(SiT):
        def build_embedders(self):
            super().build_embedders()
            self.extra = nn.Linear(1, self.config.width)

        def condition(self, t, y, note=None, **more):
            c = super().condition(t, y, **more)
            return c if note is None else c + self.extra(note[:, None])

    model = randomised(Told(SiTConfig(**TINY)).eval())
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("extra")})
    assert torch.equal(model(X, T, Y), plain(X, T, Y))
    assert (model(X, T, Y, note=T) - model(X, T, Y)).abs().amax((1, 2)).min() > 1e-4
    with pytest.raises(TypeError, match="note"):
        plain(X, T, Y, note=T)
