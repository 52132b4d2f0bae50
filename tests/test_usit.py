"""usit.py: DC-AE's published counts, the long skips, and the block against PyTorch's own."""
import pytest
import torch
import torch.nn as nn

from variants.usit import SIZES, Block, USiT, USiTConfig

TINY = dict(num_latents=5, latent_dim=6, width=32, heads=4, depth=4, num_classes=10)
X, T, Y = torch.randn(3, 5, 6), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 10])


def tiny(**changes):
    """A small model with every weight drawn at random."""
    model = USiT(USiTConfig(**(TINY | changes)))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def count(**config):
    with torch.device("meta"):
        return sum(p.numel() for p in USiT(USiTConfig(**config)).parameters())


@pytest.mark.parametrize("size, published", [("H", 500.87), ("2B", 1580.40)])
def test_parameter_counts_are_those_of_dc_aes_model_list(size, published):
    # Theirs have 16 x 16 tokens with 32 channels, in millions to two decimals; the paper's "2B" is a name.
    assert round(count(**SIZES[size], num_latents=256) / 1e6, 2) == published


def test_parameter_count_of_the_papers_usit_2b():
    D, half = 2048, 14
    block = 3 * D * D + (D * D + D) + (8 * D * D + 5 * D) + 4 * D        # qkv, proj, MLP, two norms
    ends = 32 * D + D + 1001 * D + 130 * D + 2 * D + 32 * D + 32         # in, classes, positions, norm, out
    assert count() == (2 * half + 1) * block + half * (2 * D * D + D) + ends == 1_580_134_432


def test_an_odd_depth_is_refused():
    with pytest.raises(ValueError, match="mirrored pairs"):
        USiTConfig(**(TINY | dict(depth=5)))


def test_block_equals_pytorchs_pre_norm_encoder_layer():
    ours = Block(32, 4)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    oracle = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="gelu", batch_first=True,
                                        norm_first=True)
    for theirs, mine in ((oracle.linear1, ours.mlp[0]), (oracle.linear2, ours.mlp[2]),
                         (oracle.norm1, ours.norm1), (oracle.norm2, ours.norm2),
                         (oracle.self_attn.out_proj, ours.attn.proj)):
        theirs.load_state_dict(mine.state_dict())
    oracle.self_attn.in_proj_weight.data.copy_(ours.attn.qkv.weight)
    nn.init.zeros_(oracle.self_attn.in_proj_bias)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), oracle(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_late_block_is_given_the_output_of_its_mirror_image():
    model, seen = tiny(depth=6), {}
    for name in ("in_blocks", "out_blocks"):
        for i, block in enumerate(getattr(model, name)):
            block.register_forward_hook(lambda module, inputs, output, key=(name, i):
                                        seen.__setitem__(key, (inputs, output)))
    model(X, T, Y)
    for i in range(3):
        assert torch.equal(seen["out_blocks", i][0][1], seen["in_blocks", 2 - i][1])
    # and it is joined by one linear layer of [x ; skip], before everything else in the block
    block, ((x, skip), out) = model.out_blocks[0], seen["out_blocks", 0]
    W, plain = block.skip_linear.weight, Block(32, 4)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("skip")})
    torch.testing.assert_close(out, plain(x @ W[:, :32].T + skip @ W[:, 32:].T + block.skip_linear.bias),
                               rtol=1e-4, atol=1e-4)


def test_a_gradient_reaches_the_early_blocks_through_the_skips_alone():
    # With the short way shut, in the middle and into each late block, the first block is still heard.
    model = tiny()
    for block in model.out_blocks:
        block.skip_linear.weight.data[:, :32] = 0                        # x's half of [x ; skip]
    nn.init.normal_(model.out_blocks[-1].skip_linear.weight[:, 32:])
    model(X, T, Y).square().sum().backward()
    first, second = (block.mlp[2].weight.grad.abs().max() for block in model.in_blocks)
    assert first > 1e-3
    # the last late block listens to the first early one only; what came by the middle is cut off
    assert second == 0 and model.mid_block.mlp[2].weight.grad.abs().max() == 0


def test_class_and_time_stand_before_the_latents_and_every_token_has_its_position():
    model, seen = tiny(), []
    model.in_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(X, T, Y)
    k = torch.arange(16)
    angle = T[:, None] * 10000.0 ** (-k / 16)
    tokens = torch.cat((model.y_embedder.embedding_table.weight[Y][:, None],
                        torch.cat((angle.cos(), angle.sin()), 1)[:, None],
                        X @ model.x_embedder.weight.T + model.x_embedder.bias), 1)
    torch.testing.assert_close(seen[0], tokens + model.pos_embed)
