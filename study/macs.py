"""How many operations a SiT takes.                                                              [Sec. 4.5]"""
from sit import SiTConfig


def sit_macs(config: SiTConfig) -> int:
    """Multiply-accumulates (MACs) of one forward pass of one sample, an int.

    Counted: every linear layer, and attention's two products, queries with keys and weights with values. Not
    counted: softmax, norms, GELU, biases, modulation, sums, look-ups. One MAC is two FLOPs in usual terms.
    SiT-XL/1 has 58.4 G at 128 tokens and 524.6 G at 1024, 9.0 times as many. The paper has 48.5 and 373.3
    "Gflops", 7.7 times, and does not say what it counts [Sec. 4.5]. Without attention's products it would be
    57.3 and 456.9, 8.0 times.
    """
    L, C, D = config.num_latents, config.latent_dim, config.width
    block = L * (3 * D * D + D * D + 2 * D * 4 * D)      # qkv, proj, MLP
    block += 2 * L * L * D                               # q k^T and weights v, all heads together
    block += 6 * D * D                                   # adaLN: once per sample, not once per token
    # x_embedder, t_embedder, the last adaLN, linear
    ends = L * C * D + (256 * D + D * D) + 2 * D * D + L * D * C
    return config.depth * block + ends
