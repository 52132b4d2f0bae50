"""Frozen networks with random weights instead of their public files, for tests that need none of those.

    python tests/random_frozen.py train_tokenizer.py --targets dinov2-s --device cpu ...

runs the script with teachers, discriminator, VGG and Inception of random weights. In a test's own process:
use_random_networks(monkeypatch.setattr).
"""
import math
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def random_frozen(build, *weights, **options):
    """As weight_files.load_frozen. Tensors are scaled as He's, so that no layer dies. They come from a
    generator of their own: they are the same on every rank, and the run's random streams are not touched."""
    import torch

    with torch.device("meta"):
        network = build()
    generator, state = torch.Generator().manual_seed(0), {}
    for key, t in network.state_dict().items():
        if t.ndim >= 2:
            state[key] = torch.randn(t.shape, generator=generator) * math.sqrt(2 / math.prod(t.shape[1:]))
        else:
            state[key] = torch.zeros(t.shape) if key.endswith(("bias", "mean")) else torch.ones(t.shape)
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval().requires_grad_(False)


def equal_heads(path):
    """As weight_files.read_weights of LPIPS's five heads: every channel weighs the same."""
    import torch

    from frozen.pretrained import VGG16_WIDTHS
    return {f"lin{k}.model.1.weight": torch.full((1, c, 1, 1), 1 / c) for k, c in enumerate(VGG16_WIDTHS)}


def use_random_networks(replace=setattr):
    """Put the functions above in place of those that read files. replace: setattr, or monkeypatch.setattr."""
    import common                                                    # noqa: F401   (before torch)
    from frozen import inception, pretrained

    replace(pretrained, "load_frozen", random_frozen)
    replace(inception, "load_frozen", random_frozen)
    replace(pretrained, "find_weights", lambda weights, folder: Path("random"))            # of the heads only
    replace(pretrained, "read_weights", equal_heads)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)                                          # as for the script itself, not tests/
    use_random_networks()
    script = sys.argv.pop(1)
    sys.argv[0] = script
    runpy.run_path(str(ROOT / script), run_name="__main__")
