"""The authors' released checkpoints, run exactly, in our own classes.                      [Sec. 4, App. C.2]

    tokenizer = load_released_tokenizer(find_released("maetok-b-128", weights_dir))    # a maetok.MAETok
    model = load_released_sit(find_released("sit-xl_maetok-b-128", weights_dir))       # a sit.SiT

On Hugging Face there are MAETok/maetok-b-128, MAETok/sit-xl_maetok-b-128 and both with -512 behind, each with
a config.json and a model.safetensors. Sizes are read off the tensors (config.json has none of the
tokenizer's widths). Every tensor must be known, there, of its shape and float32; else a UserError lists it.

What is unknown of the released models, and where it is an option here:
  - the path that SiT was trained on: `path` of flow.py's samplers, linear unless told otherwise; noise_share,
    below, asks the weights themselves.
  - the density of its training times, uniform [Sec. 4.1] or logit-normal [released code's README]:
    `train_diffusion.py --times`. Samplers do not need to know.

Shapes: N image patches · L latent tokens · C latent channels · D width · P patch size · hs head size.
All of this is [released code]; tags stand where something else is the source.
"""
import json
import math
from pathlib import Path

import torch

from common import UserError
from maetok import MAETok, MAETokConfig
from sit import SiT, SiTConfig
from frozen.weight_files import WeightFile, check_state, find_weights, read_safetensors

# The paper's protocol: image size -> repositories, and options of sample.py.                       [App. C.2]
RELEASED = {
    256: dict(tokenizer="maetok-b-128", sit="sit-xl_maetok-b-128", sampler="euler-maruyama", steps=250,
              path="linear", cfg=1.9, cfg_interval=(0.0, 0.75)),
    512: dict(tokenizer="maetok-b-128-512", sit="sit-xl_maetok-b-128-512", sampler="euler-maruyama",
              steps=250, path="linear", cfg=1.5, cfg_interval=(0.0, 0.7)),
}
FILES = ("config.json", "model.safetensors")
HEAD_SIZE = 64          # of the tokenizer; no tensor tells how many heads its channels are divided over

# Stored, but nothing reads them: left-overs of the ViT that the decoder was made from, and patch indices.
UNUSED = {"decoder.model.patch_embed.proj.weight", "decoder.model.patch_embed.proj.bias",
          "decoder.model.pos_embed", "decoder.model.norm.adaLN_modulation.1.weight",
          "decoder.model.norm.adaLN_modulation.1.bias", "encoder.freqs_t_x", "encoder.freqs_t_y",
          "decoder.freqs_t_x", "decoder.freqs_t_y"}

# Part of a name in maetok.MAETok -> in the released tokenizer; applied from top to bottom.
NAMES = {
    "encoder.patch_embed": "encoder.model.patch_embed.proj", "encoder.class_token": "encoder.model.cls_token",
    "encoder.positions.table": "encoder.model.pos_embed", "encoder.to_latent": "quant_conv",
    "decoder.from_latent": "post_quant_conv", "decoder.image_token": "decoder.mask_token",
    "decoder.head": "decoder.to_pixel.model", "latent_positions": "latent_pos_embed",
    "transformer.rope.freqs": "freqs", "transformer.blocks": "model.blocks", "transformer.norm": "model.norm",
    "layer_scale": "ls", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "modulation.1": "adaLN_modulation.1",
}


# -------------------------------------------------- files --------------------------------------------------

def find_released(name, weights_dir=""):
    """The folder of one released repository: weights_dir/NAME, else NAME in torch hub's cache.

    What is in neither is downloaded, to weights_dir if it is given, else to the cache; under torchrun call
    this inside common.rank_zero_first. Raises UserError for other names and, without network, one that says
    which file to put where.
    """
    names = [size[part] for size in RELEASED.values() for part in ("tokenizer", "sit")]
    if name not in names:
        raise UserError(f"{name} is no released model; there are: {', '.join(names)}")
    # The repository's name stays in the path: all four call their files the same.
    config, weights = (find_weights(WeightFile(
        f"{name}/{file}", f"https://huggingface.co/MAETok/{name}/resolve/main/{file}"), weights_dir).parent
        for file in FILES)
    if config != weights:
        raise UserError(f"the files of {name} are scattered, one in {config} and one in {weights}: "
                        "put both into one of them")
    return weights


def read_released(folder):
    """({name: tensor}, config.json as a dict) of a folder with both files. Raises UserError."""
    folder = Path(folder)
    if lacking := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(f"{folder} has no {' and no '.join(lacking)}: save both from "
                        "https://huggingface.co/MAETok in it")
    weights = read_safetensors(folder / "model.safetensors")
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError as e:
        raise UserError(f"{folder / 'config.json'} is damaged: {e}; delete it and fetch it again") from e
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'config.json'} is no table of settings")
    return weights, settings


def _number(settings, key, path):
    """settings[key] as a finite float. Raises UserError."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{path}: config.json has {key} = {value!r}, it should be a number")
    return float(value)


def _check(weights, shapes, settings, sizes, path):
    """Names, shapes and dtypes of the tensors, and the sizes that config.json names. Raises UserError."""
    check_state(shapes, weights, path)
    if wrong := [f"{key} {weights[key].dtype}" for key in shapes if weights[key].dtype != torch.float32]:
        raise UserError(f"{path} should hold float32 throughout, not {', '.join(wrong[:5])}")
    # All four repositories have files of the same names; a config.json of another one would go unnoticed
    # otherwise, and with it the mean and std of the latents.
    if wrong := [f"{key} {settings[key]!r}, not {size}" for key, size in sizes.items()
                 if settings.get(key, size) != size]:
        raise UserError(f"{path}: config.json does not belong to these weights ({'; '.join(wrong)}); "
                        "take both files from one repository")


# ---------------------------------------------- the tokenizer ----------------------------------------------

def load_released_tokenizer(folder, device="cpu"):
    """The released tokenizer in `folder`, a MAETok in eval mode, without gradients.

    encode(normalize=True) and decode(normalized=True) use config.json's vq_mean and vq_std. Raises UserError.
    """
    return tokenizer_from(*read_released(folder), folder).to(device)


def tokenizer_from(weights, settings, path):
    """The same from tensors {name: tensor} and settings already read; meta tensors make a MAETok of them.
    `path` is for messages."""
    weights = {key: value for key, value in weights.items() if key not in UNUSED}
    depth = {part: len({key.split(".")[3] for key in weights if key.startswith(f"{part}.model.blocks.")})
             for part in ("encoder", "decoder")}
    refuse_variants(weights, path)
    try:
        _, L, D = weights["encoder.latent_tokens"].shape
        P = weights["encoder.model.patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(weights["encoder.model.pos_embed"].shape[1] - 1)     # patches in a row
        if D % HEAD_SIZE:
            raise ValueError(f"width {D} is no multiple of the head size {HEAD_SIZE}")
        config = MAETokConfig(
            image_size=side * P, patch_size=P, width=D, heads=D // HEAD_SIZE, encoder_depth=depth["encoder"],
            decoder_depth=depth["decoder"], num_latents=L, latent_dim=weights["quant_conv.weight"].shape[0],
            mlp_ratio=weights["encoder.model.blocks.0.mlp.fc1.weight"].shape[0] / D,
            rope="mixed", ape="encoder", class_token=True, layer_scale=1e-5, latent_modulation=True)
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{path} holds no released tokenizer, or not all of one: {e!r}") from e
    with torch.device("meta"):                                       # no memory: all weights are put in below
        model = MAETok(config)

    # ---- every tensor there, and nothing else ----
    state = {ours: value for ours, value in model.state_dict().items() if not ours.startswith("latent_")}
    names = {ours: _released_name(ours) for ours in state}
    shapes = {names[ours]: value.shape for ours, value in state.items()}
    shapes |= {f"{part}.freqs": (2, depth[part], D // 2) for part in depth}
    shapes |= {"encoder.model.pos_embed": (1, 1 + side ** 2, D),
               "encoder.model.patch_embed.proj.weight": (D, 3, P, P)}
    if "encoder.mask_token" not in weights and "decoder.mask_token" in weights:
        # Saved with masking switched off, the file has none. Whole images, all it is for now, need none.
        weights["encoder.mask_token"] = torch.zeros_like(weights["decoder.mask_token"])
    _check(weights, shapes, settings, path=path, sizes={
        "image_size": config.image_size, "num_latent_tokens": L, "codebook_embed_dim": config.latent_dim})

    # ---- their layout into ours ----
    for ours, name in names.items():
        value = weights[name]
        if ours.endswith(("qkv.weight", "qkv.bias")):
            value = _pairs_to_halves(value, config.heads)
        elif ours == "encoder.patch_embed.weight":                   # a convolution's, (D, 3, P, P)
            value = value.permute(0, 2, 3, 1).reshape(D, -1)
        elif ours == "encoder.class_token":                          # pos_embed's first row is its position
            value = value + weights["encoder.model.pos_embed"][:, :1]
        elif ours == "encoder.positions.table":
            value = value[:, 1:].reshape(1, side, side, D)
        elif ours.endswith("rope.freqs"):                            # (x and y, depth, nh hs/2)
            value = value.reshape(2, -1, config.heads, HEAD_SIZE // 2).transpose(0, 1)
        state[ours] = value.contiguous()
    mean, std = _number(settings, "vq_mean", path), _number(settings, "vq_std", path)
    if std <= 0:
        raise UserError(f"{path}: config.json has vq_std = {std}, it should be positive")
    device = weights["quant_conv.weight"].device
    state["latent_mean"], state["latent_std"] = torch.tensor([mean, std], device=device)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def refuse_variants(weights, path):
    """Files that the authors' training script writes as it was published differ from the released ones: its
    yaml's RoPE keys are ignored, for one. Raises a UserError that names how this one does."""
    width = {part: weights[key].shape[0] for part in ("encoder", "decoder")
             if (key := f"{part}.model.blocks.0.attn.proj.weight") in weights}
    found = [text for text, there in (
        ("position tables only, no rotary frequencies (encoder.freqs)",
         width and not any(f"{part}.freqs" in weights for part in width)),
        ("a class token in the main decoder (decoder.model.cls_token)", "decoder.model.cls_token" in weights),
        ("LayerScale in the decoder", any(key.startswith("decoder.model.blocks.0.ls") for key in weights)),
        (f"an encoder of width {width.get('encoder')} with a decoder of width {width.get('decoder')}",
         len(set(width.values())) > 1)) if there]
    if found:
        raise UserError(f"{path} is of a variant that the authors' script trains as published, not of the "
                        f"released models: it has {'; '.join(found)}. "
                        "Only the released variant can be run here")


def _released_name(name):
    """Name of a tensor in MAETok -> its name in the released file."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _pairs_to_halves(qkv, heads):
    """Reorder q's and k's rows in a qkv weight (3D, D) or bias (3D,): even channels of a head, then odd ones.

    RoPE turns channels (2i, 2i+1) there and (i, i + hs/2) here (maetok.rotate). Queries and keys meet in dot
    products only, so the same shuffle of both changes nothing else.
    """
    q, k, v = qkv.reshape(3, heads, HEAD_SIZE, *qkv.shape[1:])
    q, k = (torch.cat((part[:, 0::2], part[:, 1::2]), dim=1) for part in (q, k))
    return torch.stack((q, k, v)).reshape(qkv.shape)


# ------------------------------------------- the diffusion model -------------------------------------------

def load_released_sit(folder, device="cpu"):
    """The released diffusion model in `folder`, a SiT in eval mode, without gradients. Raises UserError."""
    return sit_from(*read_released(folder), folder).to(device)


def sit_from(weights, settings, path):
    """The same from tensors and settings already read. Names are sit.py's; the stored positions are used."""
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    try:
        D, C = weights["x_embedder.weight"].shape
        config = SiTConfig(num_latents=weights["pos_embed"].shape[1], latent_dim=C, width=D, depth=depth,
                           heads=int(_number(settings, "num_heads", path)),
                           mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / D,
                           num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1)
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{path} holds no released diffusion model, or not all of one: {e!r}") from e
    with torch.device("meta"):
        model = SiT(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check(weights, shapes | {"pos_embed": model.pos_embed.shape}, settings, path=path, sizes={
        "input_size": config.num_latents, "in_channels": C, "hidden_size": D, "depth": depth,
        "num_classes": config.num_classes})
    model.load_state_dict({name: weights[name] for name in shapes}, assign=True)
    model.pos_embed = weights["pos_embed"]
    return model.eval().requires_grad_(False)


@torch.no_grad()
def noise_share(model, samples=16):
    """Which path a model was trained on: about 1 says linear, about 0 says cosine.                     [ours]

    At t = 1 the state is noise alone, and tells nothing of the data: the linear path's velocity is
    eps - E[x], the cosine path's -pi/2 E[x]. What is returned is the slope of v on eps, both centred.
    """
    c, weight = model.config, next(model.parameters())
    noise = torch.randn(samples, c.num_latents, c.latent_dim, generator=torch.Generator().manual_seed(0))
    noise = noise.to(weight)
    y = torch.full((samples,), c.num_classes, device=weight.device)             # the null class: all the data
    v = model(noise, torch.ones(samples, device=weight.device), y)
    v, noise = (part.cpu().double() - part.cpu().double().mean(0) for part in (v, noise))
    return ((v * noise).sum() / noise.square().sum()).item()
