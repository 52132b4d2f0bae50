"""Pack a trained diffusion run: only the EMA weights of SiT and tokenizer, in float16, and their options.

    python -m study.box RUN assets/shapes.pt               # RUN of train_diffusion.py; `make box` has both
    python -m study.box RUN assets/cifar10.pt TOKENIZER    # with the decoder of a run on the same encoder
"""
import sys
from pathlib import Path

from runtime.processes import UserError, run    # before torch, see there

import torch

import checkpoints
from runtime import files


def pack(path, out, decoder=None):
    """Write the part of a checkpoint or run folder of train_diffusion.py that sampling needs.

    decoder: a checkpoint or run of train_tokenizer.py whose decoder takes the place of the tokenizer's: stage
    2 may go on while SiT trains."""
    state = checkpoints.load_checkpoint(path)
    if state.get("kind") != "diffusion":
        raise UserError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not a diffusion model")
    half = lambda weights: {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    tokenizer = state["tokenizer"]
    if decoder is not None:
        other, its = checkpoints.load_checkpoint(decoder), tokenizer["ema"]
        weights = other["ema"] if other.get("kind") == "tokenizer" else {}
        if any(not torch.equal(w, weights.get(name, torch.empty(0)))
               for name, w in its.items() if name.startswith("encoder.")):
            raise UserError(f"{decoder} has another encoder than the one whose latents {path} has learned")
        statistics = {name: its[name] for name in ("latent_mean", "latent_std")}                     # SiT's
        tokenizer = {key: other[key] for key in tokenizer} | {"ema": weights | statistics}
    # Of this machine's folders only the names.
    named = lambda config: {key: Path(value).name if str(value).startswith("/") else value
                            for key, value in config.items()}
    content = {key: state[key] for key in ("kind", "step", "add", "classes")}
    content |= {"config": named(state["config"]), "ema": half(state["ema"])}
    content["tokenizer"] = tokenizer | {"config": named(tokenizer["config"]), "ema": half(tokenizer["ema"])}
    files.atomic_write(out, lambda path: torch.save(content, path))


def main(argv=None):
    """argv: RUN OUT [TOKENIZER]."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) not in (2, 3):
        raise UserError("give the run to pack, the file to write and, for another decoder, a tokenizer's run")
    pack(*argv)
    print(f"wrote {argv[1]}")


if __name__ == "__main__":
    run(main)
