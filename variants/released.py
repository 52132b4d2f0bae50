"""The authors' released models, run exactly by our own classes.                            [Sec. 4, App. C.2]

    python -m variants.released 256 --out runs/released-256    # reads the authors' files, writes a checkpoint
    python sample.py --ckpt runs/released-256 --cfg 1.9 --cfg-interval 0 0.75 --classes 207 360 --num 8
    python evaluate.py recon runs/released-256 --data IMAGENET

`--add released` trains the authors' variant (released_tokenizer.py, released_sit.py). On Hugging Face there
are MAETok/maetok-b-128, MAETok/sit-xl_maetok-b-128 and both with -512 at the end, each with a config.json and
a model.safetensors. Sizes are read from the tensors (config.json lacks the tokenizer's widths). All expected
tensors must be there, with their shape and float32, and no others; else a UserError lists the differences.

What is not known of the released models:
  - the path that SiT was trained on: --path, linear by default; noise_share, below, measures it on the
  weights. - the density of its training times, uniform [Sec. 4.1] or logit-normal [released code's README].
  Samplers do
    not need it.

Shapes: N image patches · L latent tokens · C latent channels · D width · P patch size · hs head size.
All of this is [released code] unless tagged otherwise.
To remove it: delete variants/released*.py and random_crop.py.
"""
import dataclasses
import json
import math
from pathlib import Path

import common    # before torch, see runtime/processes.py

import torch

import checkpoints
from runtime import files
from common import UserError
from frozen.weight_files import WeightFile, check_state, find_weights, read_safetensors
from maetok import MAETokConfig
from runtime.processes import run
from sit import Diffusion, SiTConfig
from variants.released_sit import AddToDiffusion  # noqa: F401   (for --add)
from variants.released_tokenizer import AddToTokenizer, ReleasedMAETok  # noqa: F401

# The paper's protocol: image size -> repositories, and options of sample.py.                       [App. C.2]
RELEASED = {
    256: dict(tokenizer="maetok-b-128", sit="sit-xl_maetok-b-128", sampler="euler-maruyama", steps=250,
              cfg=1.9, cfg_interval=(0.0, 0.75)),
    512: dict(tokenizer="maetok-b-128-512", sit="sit-xl_maetok-b-128-512", sampler="euler-maruyama",
              steps=250, cfg=1.5, cfg_interval=(0.0, 0.7)),
}
FILES = ("config.json", "model.safetensors")
HEAD_SIZE = 64          # of the tokenizer; the number of heads cannot be read from the tensors

# Stored but unused: parts of the ViT that the decoder was made from, and patch indices.
UNUSED = {"decoder.model.patch_embed.proj.weight", "decoder.model.patch_embed.proj.bias",
          "decoder.model.pos_embed", "decoder.model.norm.adaLN_modulation.1.weight",
          "decoder.model.norm.adaLN_modulation.1.bias", "encoder.freqs_t_x", "encoder.freqs_t_y",
          "decoder.freqs_t_x", "decoder.freqs_t_y"}

# Part of a name in ReleasedMAETok -> in the released file; applied from top to bottom.
NAMES = {
    "encoder.patch_embed": "encoder.model.patch_embed.proj", "encoder.class_token": "encoder.model.cls_token",
    "encoder.image_positions": "encoder.model.pos_embed", "encoder.to_latent": "quant_conv",
    "decoder.from_latent": "post_quant_conv", "decoder.image_token": "decoder.mask_token",
    "decoder.head": "decoder.to_pixel.model", "latent_positions": "latent_pos_embed",
    "transformer.rope.freqs": "freqs", "transformer.blocks": "model.blocks", "transformer.norm": "model.norm",
    "layer_scale": "ls", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "modulation.1": "adaLN_modulation.1",
}


# -------------------------------------------------- files --------------------------------------------------

def find_released(name, weights_dir=""):
    """The folder of one released repository: weights_dir/NAME, else NAME in torch hub's cache.

    Otherwise it is downloaded, to weights_dir if that is given, else to the cache. Raises UserError for other
    names and, without network, one that says which file to put where.
    """
    names = [size[part] for size in RELEASED.values() for part in ("tokenizer", "sit")]
    if name not in names:
        raise UserError(f"{name} is not a released model; there are: {', '.join(names)}")
    # The repository's name stays in the path: the files of all four have the same names.
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
        raise UserError(f"{folder / 'config.json'} holds no table of settings")
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
    # The files of all four repositories have the same names. A config.json of another one would bring a wrong
    # mean and std of the latents.
    if wrong := [f"{key} {settings[key]!r}, not {size}" for key, size in sizes.items()
                 if settings.get(key, size) != size]:
        raise UserError(f"{path}: config.json does not belong to these weights ({'; '.join(wrong)}); "
                        "take both files from one repository")


# ---------------------------------------------- the tokenizer ----------------------------------------------

def load_released_tokenizer(folder):
    """The released tokenizer in `folder`, a ReleasedMAETok in eval mode, without gradients.

    encode(normalize=True) and decode(normalized=True) use config.json's vq_mean and vq_std.
    """
    return tokenizer_from(*read_released(folder), folder)


def tokenizer_from(weights, settings, path):
    """The same from tensors {name: tensor} and settings already read; meta tensors give a model of meta
    tensors. `path` is for messages."""
    weights = {key: value for key, value in weights.items() if key not in UNUSED}
    depth = {part: len({key.split(".")[3] for key in weights if key.startswith(f"{part}.model.blocks.")})
             for part in ("encoder", "decoder")}
    refuse_variants(weights, path)
    try:
        _, L, D = weights["encoder.latent_tokens"].shape
        P = weights["encoder.model.patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(weights["encoder.model.pos_embed"].shape[1] - 1)     # patches in a row
        if D % HEAD_SIZE:
            raise ValueError(f"width {D} is not a multiple of the head size {HEAD_SIZE}")
        config = MAETokConfig(
            image_size=side * P, patch_size=P, width=D, heads=D // HEAD_SIZE, encoder_depth=depth["encoder"],
            decoder_depth=depth["decoder"], num_latents=L, latent_dim=weights["quant_conv.weight"].shape[0])
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{path} holds no released tokenizer, or only a part of one: {e!r}") from e
    with torch.device("meta"):                                      # without memory: the weights follow below
        model = ReleasedMAETok(config)

    # ---- all tensors must be there, and no others ----
    state = {ours: value for ours, value in model.state_dict().items() if not ours.startswith("latent_")}
    names = {ours: _released_name(ours) for ours in state}
    shapes = {names[ours]: value.shape for ours, value in state.items()}
    shapes |= {f"{part}.freqs": (2, depth[part], D // 2) for part in depth}
    shapes |= {"encoder.model.pos_embed": (1, 1 + side ** 2, D),
               "encoder.model.patch_embed.proj.weight": (D, 3, P, P)}
    if "encoder.mask_token" not in weights and "decoder.mask_token" in weights:
        # A file that was saved with masking off has no mask token. Whole images do not need one.
        weights["encoder.mask_token"] = torch.zeros_like(weights["decoder.mask_token"])
    _check(weights, shapes, settings, path=path, sizes={
        "image_size": config.image_size, "num_latent_tokens": L, "codebook_embed_dim": config.latent_dim})

    # ---- from their layout to ours ----
    for ours, name in names.items():
        value = weights[name]
        if ours.endswith(("qkv.weight", "qkv.bias")):
            value = _pairs_to_halves(value, config.heads)
        elif ours == "encoder.patch_embed.weight":                   # a convolution's, (D, 3, P, P)
            value = value.permute(0, 2, 3, 1).reshape(D, -1)
        elif ours == "encoder.class_token":                          # its position is pos_embed's first row
            value = value + weights["encoder.model.pos_embed"][:, :1]
        elif ours == "encoder.image_positions":
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
    """The authors' published training script writes files that differ from the released ones; for example, it
    ignores its yaml's RoPE keys. Raises a UserError that names the differences."""
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
        raise UserError(f"{path} holds the variant that the authors' published script trains, not a released "
                        f"model: it has {'; '.join(found)}. Only the released variant can be run here")


def _released_name(name):
    """Name of a tensor in ReleasedMAETok -> its name in the released file."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _pairs_to_halves(qkv, heads):
    """Reorder q's and k's rows in a qkv weight (3D, D) or bias (3D,): even channels of a head, then odd ones.

    RoPE turns channels (2i, 2i+1) there and (i, i + hs/2) here (maetok.rotate), because halves are contiguous
    in memory. Queries and keys meet in dot products only, which the same shuffle of both does not change.
    """
    q, k, v = qkv.reshape(3, heads, HEAD_SIZE, *qkv.shape[1:])
    q, k = (torch.cat((part[:, 0::2], part[:, 1::2]), dim=1) for part in (q, k))
    return torch.stack((q, k, v)).reshape(qkv.shape)


# ------------------------------------------- the diffusion model -------------------------------------------

def load_released_sit(folder):
    """The released diffusion model in `folder`, in eval mode, without gradients."""
    return sit_from(*read_released(folder), folder)


def sit_from(weights, settings, path):
    """The same from tensors and settings already read. Names are those of sit.py; the stored positions are
    used."""
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    try:
        D, C = weights["x_embedder.weight"].shape
        config = SiTConfig(num_latents=weights["pos_embed"].shape[1], latent_dim=C, width=D, depth=depth,
                           heads=int(_number(settings, "num_heads", path)),
                           num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1)
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{path} holds no released diffusion model, or only a part of one: {e!r}") from e
    with torch.device("meta"):
        model = common.attach(Diffusion, ["released"]).Model(config)
    _check(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}, settings, path=path,
           sizes={"input_size": config.num_latents, "in_channels": C, "hidden_size": D, "depth": depth,
                  "num_classes": config.num_classes})
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def noise_share(model, samples=16):
    """About 1 for a model trained on the linear path, about 0 for one trained on the cosine path.      [ours]

    At t = 1 the state is noise and holds no information on the data. There the linear path's velocity is
    eps - E[x] and the cosine path's is -pi/2 E[x]. Returns the slope of v on eps, both centred.
    """
    c, weight = model.config, next(model.parameters())
    noise = torch.randn(samples, c.num_latents, c.latent_dim, generator=torch.Generator().manual_seed(0))
    noise = noise.to(weight)
    y = torch.full((samples,), c.num_classes, device=weight.device)                         # the null class
    v = model(noise, torch.ones(samples, device=weight.device), y)
    v, noise = (part.cpu().double() - part.cpu().double().mean(0) for part in (v, noise))
    return ((v * noise).sum() / noise.square().sum()).item()


# ------------------------------------------- checkpoints in our format
# -------------------------------------------

def tokenizer_content(model):
    """What a checkpoint of train_tokenizer.py holds of a trained tokenizer."""
    return {"kind": "tokenizer", "step": 0, "stage": 2, "measured": True, "add": ["released"],
            "config": dataclasses.asdict(model.config) | {"data": "IMAGENET"}, "ema": model.state_dict()}


def diffusion_content(model, tokenizer, path):
    """What a checkpoint of train_diffusion.py holds of a trained model and its tokenizer."""
    return {"kind": "diffusion", "step": 0, "add": ["released"], "classes": [],
            "config": dataclasses.asdict(model.config) | {"path": path, "data": "IMAGENET"},
            "ema": model.state_dict(), "tokenizer": tokenizer_content(tokenizer)}


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(prog="python -m variants.released", description=__doc__,
                                  formatter_class=common.OneLineHelp)
    add = parser.add_argument
    add("size", type=int, choices=tuple(RELEASED), help="px, 256 or 512")
    add("--out", help="folder of the checkpoint (default: runs/released-SIZE)")
    add("--weights-dir", default="",
        help="folder of the authors' files; else torch hub's cache, else download")
    add("--path", choices=("linear", "cosine"), default="linear",
        help="the path that SiT was trained on, which is not published (default linear)")
    add("--only-tokenizer", action="store_true", help="without the diffusion model")
    args = parser.parse_args(argv)
    released, out = RELEASED[args.size], args.out or f"runs/released-{args.size}"
    tokenizer = load_released_tokenizer(find_released(released["tokenizer"], args.weights_dir))
    content = tokenizer_content(tokenizer)
    if not args.only_tokenizer:
        model = load_released_sit(find_released(released["sit"], args.weights_dir))
        print(f"fraction of noise in the velocity at t = 1: {noise_share(model):.2f} (about 1 if SiT was "
              "trained on the linear path, 0 if on the cosine path)")
        content = diffusion_content(model, tokenizer, args.path)
    files.lock(out)
    checkpoints.save_checkpoint(out, content)
    print(f"wrote {out}/last.pt. The paper's protocol [App. C.2]:")
    if not args.only_tokenizer:
        low, high = released["cfg_interval"]
        print(f"    python sample.py --ckpt {out} --sampler {released['sampler']} "
              f"--steps {released['steps']} --cfg {released['cfg']} --cfg-interval {low:g} {high:g}")
    print(f"    python evaluate.py recon {out} --data IMAGENET")


if __name__ == "__main__":
    run(main)
