"""Pack a trained diffusion run: only the EMA weights of SiT and tokenizer, in float16, and their options.

    python -m study.box RUN assets/shapes.pt     # RUN of train_diffusion.py; `make box`, `make box-cifar10`
"""
import sys
from pathlib import Path

from runtime.processes import UserError, run    # before torch, see there

import torch

import checkpoints
from runtime import files


def pack(path, out):
    """Write the part of a checkpoint or run folder of train_diffusion.py that sampling needs."""
    state = checkpoints.load_checkpoint(path)
    if state.get("kind") != "diffusion":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a diffusion model")
    half = lambda weights: {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    tokenizer = state["tokenizer"]
    # Of this machine's folders only the names.
    named = lambda config: {key: Path(value).name if str(value).startswith("/") else value
                            for key, value in config.items()}
    content = {key: state[key] for key in ("kind", "step", "add", "classes")}
    content |= {"config": named(state["config"]), "ema": half(state["ema"])}
    content["tokenizer"] = tokenizer | {"config": named(tokenizer["config"]), "ema": half(tokenizer["ema"])}
    files.atomic_write(out, lambda path: torch.save(content, path))


def main(argv=None):
    """argv: RUN OUT."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise UserError("give two arguments: the run to pack, and the file to write")
    pack(*argv)
    print(f"wrote {argv[1]}")


if __name__ == "__main__":
    run(main)
