"""Pack a trained diffusion run for shipping: EMA weights of SiT and tokenizer alone, in float16.

    python -m study.box RUN assets/shapes.pt        # RUN of train_diffusion.py; `make box` trains it first
"""
import sys

import torch

import checkpoints
import common
from common import UserError


def pack(run, out):
    """Write what sampling needs of a checkpoint or run folder of train_diffusion.py. Raises UserError."""
    state = checkpoints.load_checkpoint(run)
    if state.get("kind") != "diffusion":
        raise UserError(f"{run} is a checkpoint of kind {state.get('kind')!r}, not a diffusion model")
    half = lambda weights: {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    content = {key: state[key] for key in ("kind", "step", "config")} | {"classes": state.get("classes", [])}
    content["ema"] = half(state["ema"])
    content["tokenizer"] = state["tokenizer"] | {"ema": half(state["tokenizer"]["ema"])}
    checkpoints.atomic_write(out, lambda path: torch.save(content, path))


def main(argv=None):
    """argv: RUN OUT."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise UserError("give two arguments: the run to pack, and the file to write")
    pack(*argv)
    print(f"wrote {argv[1]}")


if __name__ == "__main__":
    common.run(main)
