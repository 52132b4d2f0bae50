"""What a model is given, looked at first: images, latents, the content of a checkpoint.

A reader of the paper need not open this file. Each function raises one clear line for what would otherwise
end in an error about matrices, or in nonsense without a word.
"""
from runtime.processes import UserError    # before torch, see there

import torch

# ------------------------------------------- images and latents -------------------------------------------

LARGEST = 10                          # of a value that may be meant for [-1, 1]; those of 0..255 are larger


def check_images(model, images):
    """Raises ValueError for what MAETok.encode cannot take: it needs (B, 3, H, W) float in [-1, 1]."""
    wrong = None
    if not isinstance(images, torch.Tensor):
        wrong = f"a {type(images).__name__}; make a tensor of it"
    elif not images.is_floating_point():
        wrong = f"{str(images.dtype).removeprefix('torch.')}; data.to_float makes them from bytes"
    elif images.ndim == 3:
        wrong = f"{tuple(images.shape)}; one image is a batch too, images[None]"
    elif images.ndim != 4 or images.shape[1] != 3:
        wrong = f"{tuple(images.shape)}; channels come second, and are red, green and blue alone"
    elif (images.dtype not in {p.dtype for p in model.encoder.parameters()}
            and not torch.is_autocast_enabled(images.device.type)):
        wrong = f"{str(images.dtype).removeprefix('torch.')}; the model is not: images.float()"
    elif not _in_range(model, images):
        wrong = "far outside it, or not numbers; values in 0..255 become images / 127.5 - 1"
    if wrong:
        raise ValueError(f"encode() takes images (B, 3, H, W), float in [-1, 1]; these are {wrong}")


def _in_range(model, images):
    """Whether values can be meant for [-1, 1]. On a GPU, which the host would have to wait for, only those of
    a model's first call are looked at."""
    seen = not images.is_cpu and getattr(model, "saw_images", False)
    if seen or images.is_meta or images.numel() == 0 or torch.compiler.is_compiling():
        return True
    model.saw_images = True
    return bool(images.detach().abs().amax() <= LARGEST)                                     # False for NaN


def check_latents(model, latents, size):
    """The grid of patches (rows, columns) of what MAETok.decode is given: latents (B, L, C), and size (H, W)
    or None. Raises ValueError for what it cannot take."""
    c = model.config
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"decode() takes latents (B, L, C), a tensor, not {type(latents).__name__}")
    if not latents.is_floating_point() or latents.ndim != 3:
        raise ValueError("decode() takes latents (B, L, C), float, not "
                         f"{str(latents.dtype).removeprefix('torch.')} {tuple(latents.shape)}")
    try:
        H, W = size or (c.image_size, c.image_size)
        grid = model.grid((H, W))
    except TypeError as e:
        raise ValueError(f"decode() takes size=(H, W) in px, not {size!r}") from e
    known = getattr(latents, "image_size", (H, W))
    if size is None and known != (H, W):
        raise ValueError(f"these latents are of images of {known[0]} x {known[1]} px, not {H} x {W}: "
                         f"give decode(latents, size={known})")
    expected = c.latent_shape(grid[0] * grid[1])
    if latents.shape[1:] != expected:
        raise ValueError(f"latents of shape {tuple(latents.shape)} cannot be decoded to {H} x {W} px: "
                         f"{expected[0]} tokens of {expected[1]} channels are needed")
    return grid


# ----------------------------------------------- checkpoints -----------------------------------------------

# The types of what a checkpoint may hold, and of what its config may, except what a model's Config checks.
CONTENT = {"kind": str, "config": dict, "add": list, "step": int, "measured": bool, "ema": dict,
           "tokenizer": dict, "classes": list}
CONFIG = {"add": str, "data": str, "data_root": str, "path": str, "seed": int}


def check_content(state, path):
    """Compare what a checkpoint holds with the types above. Raises UserError."""
    for found, types in ((state, CONTENT), (state.get("config", {}), CONFIG)):
        for name, kind in types.items():
            if not isinstance(found.get(name, kind()), kind):
                raise UserError(f"{path}: its {name!r} is {type(found[name]).__name__}, not {kind.__name__}: "
                                "it is damaged or of another program")
    if not all(isinstance(name, str) for name in state.get("add", [])):
        raise UserError(f"{path}: its 'add' should be names, not {state['add']}")
    if "tokenizer" in state:
        check_content(state["tokenizer"], path)


def check_weights(model, state, path):
    """Compare a checkpoint's weights with a model's by name, kind and shape. Raises UserError.

    Before anything is computed with them: a file of a few bytes can hold a tensor of 60,000 x 60,000.
    """
    wrong, wanted = None, model.state_dict()
    if not isinstance(state, dict):
        wrong = f"{type(state).__name__}, no weights"
    elif names := sorted(map(str, wanted.keys() ^ state.keys())):
        here = "unknown" if names[0] in state else "missing"
        wrong = f"{names[0]} is {here}" + f", and {len(names) - 1} more differ" * (len(names) > 1)
    else:
        for name, weight in wanted.items():
            tensor = state[name]
            if (not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta
                    or tensor.is_quantized or tensor.is_complex()):
                wrong = f"{name} is no plain tensor of numbers, but sparse, empty or of another kind"
            elif tensor.shape != weight.shape:
                wrong = f"{name} has shape {tuple(tensor.shape)}, not {tuple(weight.shape)}"
            if wrong:
                break
    if wrong:
        raise UserError(f"{path} holds weights of another model: {wrong}")
