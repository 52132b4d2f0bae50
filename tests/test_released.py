"""variants/released.py: files in the authors' format, made here, against a forward pass written from its
description, and their conversion to checkpoints of ours."""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import maetok
import sample
import sit
import train_tokenizer
from common import UserError
from flow import path_coefficients
from frozen import weight_files
from maetok import MAETok
from sit import SiT, SiTConfig
from variants import released
from variants.released import (RELEASED, UNUSED, find_released, load_released_sit, load_released_tokenizer,
                               noise_share, sit_from, tokenizer_from)

SIZES = dict(D=128, depth=2, decoder_depth=3, L=5, C=4, P=8, side=3)     # a 24 px image, two heads of 64


def tokenizer_shapes(D=768, depth=12, decoder_depth=12, L=128, C=32, P=16, side=16):
    """{key: shape} of a released tokenizer, by rule."""
    N, linear = side * side, {}
    shapes = {"encoder.latent_tokens": (1, L, D), "encoder.model.cls_token": (1, 1, D),
              "decoder.mask_token": (1, 1, D), "encoder.model.norm.weight": (D,),
              "encoder.model.norm.bias": (D,)}
    for part, blocks in (("encoder", depth), ("decoder", decoder_depth)):
        shapes |= {f"{part}.latent_pos_embed": (1, L, D), f"{part}.model.pos_embed": (1, N + 1, D),
                   f"{part}.freqs": (2, blocks, D // 2), f"{part}.freqs_t_x": (N,), f"{part}.freqs_t_y": (N,),
                   f"{part}.model.patch_embed.proj.weight": (D, 3, P, P),
                   f"{part}.model.patch_embed.proj.bias": (D,)}
        for i in range(blocks):
            block = f"{part}.model.blocks.{i}"
            linear |= {f"{block}.attn.qkv": (3 * D, D), f"{block}.attn.proj": (D, D),
                       f"{block}.mlp.fc1": (4 * D, D), f"{block}.mlp.fc2": (D, 4 * D)}
            if part == "decoder":
                linear[f"{block}.adaLN_modulation.1"] = (4 * D, C)
            else:
                shapes |= {f"{block}.{name}": (D,) for name in ("norm1.weight", "norm1.bias", "norm2.weight",
                                                                "norm2.bias", "ls1.gamma", "ls2.gamma")}
    linear |= {"quant_conv": (C, D), "post_quant_conv": (D, C), "decoder.to_pixel.model": (3 * P * P, D),
               "decoder.model.norm.adaLN_modulation.1": (2 * D, C)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def sit_shapes(D=1152, depth=28, L=128, C=32, classes=1000):
    shapes = {"pos_embed": (1, L, D), "y_embedder.embedding_table.weight": (classes + 1, D)}
    linear = {"x_embedder": (D, C), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D),
              "final_layer.linear": (C, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(depth):
        linear |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D),
                   f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D),
                   f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def draw(shapes):
    """Random tensors, sized so that every one of them matters in the output and none drowns the others."""
    return {key: torch.randn(shape) * (1.0 if "latent" in key or "token" in key or "pos_embed" in key
                                       else 0.5 if "freqs" in key or len(shape) == 1
                                       else math.prod(shape[1:]) ** -0.5) for key, shape in shapes.items()}


def write(folder, weights, settings):
    """Both files of a repository: safetensors is 8 bytes of length, a JSON header, the data."""
    header, data = {}, b""
    for key, value in weights.items():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {"dtype": {torch.float32: "F32", torch.float16: "F16"}[value.dtype],
                       "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


SETTINGS = {"image_size": 24, "num_latent_tokens": 5, "codebook_embed_dim": 4, "vq_mean": 0.3, "vq_std": 2.5}


def change(folder, settings=SETTINGS, sizes=SIZES, **changes):
    """A tokenizer's folder with some tensors replaced, or None: left out."""
    weights = draw(tokenizer_shapes(**sizes)) | {key.replace("__", "."): v for key, v in changes.items()}
    return write(folder, {key: value for key, value in weights.items() if value is not None}, settings)


# ----------------------------------- the released forward pass, naively -----------------------------------

def naive_block(w, x, p, freqs, first, side, latents):
    """One block on x (T, D); image tokens start at `first`. latents: what modulates a decoder's, or None."""
    D, L = x.shape[1], SIZES["L"]

    def norm(x, i):
        if latents is None:
            return F.layer_norm(x, (D,), w[f"{p}.norm{i}.weight"], w[f"{p}.norm{i}.bias"], 1e-6)
        x = F.layer_norm(x, (D,), eps=1e-6)
        made = F.silu(latents) @ w[f"{p}.adaLN_modulation.1.weight"].T + w[f"{p}.adaLN_modulation.1.bias"]
        shift, scale = made[:, (2 * i - 2) * D:(2 * i - 1) * D], made[:, (2 * i - 1) * D:2 * i * D]
        return torch.cat((x[:-L], x[-L:] * scale + shift))

    def turned(vector, token, head):
        n = token - first
        if not 0 <= n < side * side:
            return vector
        out = vector.clone()
        for i in range(32):                                            # neighbouring pairs
            angle = (n % side) * freqs[0, head * 32 + i] + (n // side) * freqs[1, head * 32 + i]
            a, b = vector[2 * i], vector[2 * i + 1]
            out[2 * i] = a * angle.cos() - b * angle.sin()
            out[2 * i + 1] = a * angle.sin() + b * angle.cos()
        return out

    linear = lambda x, name: x @ w[f"{p}.{name}.weight"].T + w[f"{p}.{name}.bias"]
    gain = lambda i: w.get(f"{p}.ls{i}.gamma", torch.ones(()))
    q, k, v = linear(norm(x, 1), "attn.qkv").chunk(3, dim=1)
    heads = []
    for h in range(D // 64):
        part = slice(64 * h, 64 * h + 64)
        Q, K = (torch.stack([turned(row, n, h) for n, row in enumerate(m[:, part])]) for m in (q, k))
        heads.append((Q @ K.T / 8).softmax(-1) @ v[:, part])
    x = x + gain(1) * linear(torch.cat(heads, 1), "attn.proj")
    return x + gain(2) * linear(F.gelu(linear(norm(x, 2), "mlp.fc1")), "mlp.fc2")


def naive_encode(w, image):
    """image (3, H, W) -> raw latents (L, C)."""
    P, side = SIZES["P"], SIZES["side"]
    x = F.conv2d(image[None], w["encoder.model.patch_embed.proj.weight"],
                 w["encoder.model.patch_embed.proj.bias"], stride=P)[0].flatten(1).T
    x = torch.cat((w["encoder.model.cls_token"][0], x)) + w["encoder.model.pos_embed"][0]
    x = torch.cat((x, w["encoder.latent_tokens"][0] + w["encoder.latent_pos_embed"][0]))
    for i in range(SIZES["depth"]):
        x = naive_block(w, x, f"encoder.model.blocks.{i}", w["encoder.freqs"][:, i], 1, side, None)
    x = F.layer_norm(x, x.shape[1:], w["encoder.model.norm.weight"], w["encoder.model.norm.bias"], 1e-6)
    return x[-SIZES["L"]:] @ w["quant_conv.weight"].T + w["quant_conv.bias"]


def naive_decode(w, z):
    """z (L, C) -> image (3, H, W)."""
    P, side = SIZES["P"], SIZES["side"]
    h = z @ w["post_quant_conv.weight"].T + w["post_quant_conv.bias"] + w["decoder.latent_pos_embed"][0]
    x = torch.cat((w["decoder.mask_token"][0].expand(side * side, -1), h))
    for i in range(SIZES["decoder_depth"]):
        x = naive_block(w, x, f"decoder.model.blocks.{i}", w["decoder.freqs"][:, i], 0, side, z)
    x = F.layer_norm(x[:side * side], x.shape[1:], eps=1e-6)
    patches = x @ w["decoder.to_pixel.model.weight"].T + w["decoder.to_pixel.model.bias"]
    image = torch.zeros(3, side * P, side * P)
    for n, patch in enumerate(patches.reshape(-1, P, P, 3)):             # (p, q, c) order
        row, column = divmod(n, side)
        image[:, row * P:row * P + P, column * P:column * P + P] = patch.permute(2, 0, 1)
    return image


@pytest.mark.parametrize("extra, gone, words", [
    ({}, ("encoder.freqs", "decoder.freqs"), "position tables only"),
    ({"decoder.model.cls_token": (1, 1, 64)}, (), "a class token in the main decoder"),
    ({"decoder.model.blocks.0.ls1.gamma": (64,)}, (), "LayerScale in the decoder"),
    ({"decoder.model.blocks.0.attn.proj.weight": (128, 128)}, (), "width 64 with a decoder of width 128")])
def test_variants_of_the_authors_script_are_refused_by_name(extra, gone, words):
    shapes = {"encoder.freqs": (2, 1, 32), "decoder.freqs": (2, 1, 32)}
    shapes |= {f"{part}.model.blocks.0.attn.proj.weight": (64, 64) for part in ("encoder", "decoder")} | extra
    weights = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in gone}
    with pytest.raises(UserError, match=words):
        tokenizer_from(weights, {}, "file")


def test_tokenizer_encodes_and_decodes_as_the_released_code_does(tmp_path):
    weights = draw(tokenizer_shapes(**SIZES))
    model = load_released_tokenizer(write(tmp_path, weights, SETTINGS))
    close = lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert isinstance(model, MAETok) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    images, latents = torch.rand(2, 3, 24, 24) * 2 - 1, torch.randn(2, 5, 4)
    expected = torch.stack([naive_encode(weights, image) for image in images])
    assert expected.std() > 0.3
    close(model.encode(images), expected)
    close(model.encode(images, normalize=True), (expected - 0.3) / 2.5)
    expected = torch.stack([naive_decode(weights, z) for z in latents])
    assert expected.std() > 0.3
    close(model.decode(latents), expected)
    close(model.decode((latents - 0.3) / 2.5, normalized=True), expected)


def test_sit_keeps_its_stored_positions_and_takes_the_heads_from_the_config(tmp_path):
    weights = draw(sit_shapes(D=64, depth=2, L=6, C=8, classes=10))
    model = load_released_sit(write(tmp_path, weights, {"num_heads": 4, "path_type": "edm"}))
    oracle = SiT(SiTConfig(num_latents=6, latent_dim=8, width=64, heads=4, depth=2, num_classes=10))
    oracle.load_state_dict({key: value for key, value in weights.items() if key != "pos_embed"})
    x, t, y = torch.randn(3, 6, 8), torch.rand(3), torch.tensor([0, 4, 10])
    assert not torch.allclose(model(x, t, y), oracle(x, t, y), atol=1e-2)
    oracle.pos_embed = weights["pos_embed"]
    torch.testing.assert_close(model(x, t, y), oracle(x, t, y), rtol=0, atol=1e-6)


# ------------------------------------------- checkpoints of ours -------------------------------------------

@pytest.fixture
def weights_dir(tmp_path):
    """Both files of a small tokenizer and of a SiT for its latents, under the names of the 256-px models."""
    change(tmp_path / "maetok-b-128")
    write(tmp_path / "sit-xl_maetok-b-128", draw(sit_shapes(D=64, depth=2, L=5, C=4, classes=10)),
          {"num_heads": 4})
    return tmp_path


def convert(weights_dir, *options):
    out = weights_dir / "converted"
    released.main(["256", "--weights-dir", str(weights_dir), "--out", str(out), *options])
    return out


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_converted_model_is_loaded_as_a_run_and_sampled(weights_dir, path, capsys):
    out = convert(weights_dir, "--path", path)
    printed = capsys.readouterr().out
    assert f"--ckpt {out} --sampler euler-maruyama --steps 250 --cfg 1.9 --cfg-interval 0 0.75" in printed
    assert "fraction of noise in the velocity at t = 1" in printed
    model, tokenizer, config = sit.load_diffusion(out)
    assert config["path"] == path and tokenizer.config.num_latents == 5
    x, t, y, images = torch.randn(3, 5, 4), torch.rand(3), torch.tensor([0, 4, 10]), torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        expected = load_released_sit(weights_dir / "sit-xl_maetok-b-128")(x, t, y)
        assert torch.equal(model(x, t, y), expected)
    expected = load_released_tokenizer(weights_dir / "maetok-b-128").encode(images, normalize=True)
    assert torch.equal(tokenizer.encode(images, normalize=True), expected)
    assert torch.equal(maetok.load_tokenizer(out).encode(images, normalize=True), expected)
    sample.main(f"--ckpt {out} --num 2 --steps 2 --cfg 1.9 --cfg-interval 0 0.75 --device cpu "
                f"--out {weights_dir / 'x.npz'}".split())
    assert np.load(weights_dir / "x.npz")["arr_0"].shape == (2, 24, 24, 3)


def test_the_tokenizer_alone_is_enough_for_reconstructions_and_to_start_from(weights_dir):
    for path in (weights_dir / "sit-xl_maetok-b-128").iterdir():
        path.unlink()
    out = convert(weights_dir, "--only-tokenizer")
    tokenizer = load_released_tokenizer(weights_dir / "maetok-b-128")
    images = torch.rand(2, 3, 24, 24)
    assert torch.equal(maetok.load_tokenizer(out).reconstruct(images), tokenizer.reconstruct(images))
    train_tokenizer.main("--add released --image-size 24 --patch-size 8 --width 128 --heads 2 "
                         "--encoder-depth 2 --decoder-depth 3 --num-latents 5 --latent-dim 4 --targets hog "
                         f"--batch-size 2 --steps 1 --stage 1 --warmup 2 --device cpu --init {out} "
                         f"--out {weights_dir / 'run'}".split())
    trained = maetok.load_tokenizer(weights_dir / "run")
    for name, weight in trained.encoder.state_dict().items():                        # one small step away
        torch.testing.assert_close(weight, tokenizer.encoder.state_dict()[name], atol=1e-3, rtol=0)


def test_bad_options_are_one_line(weights_dir):
    for options, message in ((["128"], "choose from 256, 512"), (["256", "--path", "edm"], "linear"),
                             ([], "size")):
        with pytest.raises(UserError, match=message) as error:
            released.main(options)
        assert "\n" not in str(error.value)


# ------------------------------------------------ full size ------------------------------------------------

def on_meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("side", [16, 32])                              # 256 and 512 px
def test_full_size_tokenizer_on_the_meta_device(side):
    weights = on_meta(tokenizer_shapes(side=side))
    stored = {key: value.numel() for key, value in weights.items() if "freqs_t" not in key}
    unused = sum(stored[key] for key in UNUSED & stored.keys())
    if side == 16:
        assert len(weights) == 315 and sum(stored.values()) == 173_890_592 and unused == 838_656
    model = tokenizer_from(weights, {"vq_mean": 0.1, "vq_std": 3}, "meta")
    # Ours adds class token and position up when loading, and has a mask token: one row less, one more.
    assert sum(p.numel() for p in model.parameters()) == sum(stored.values()) - unused
    assert (model.config.image_size, model.config.heads, model.config.num_latents) == (16 * side, 12, 128)


def test_full_size_sit_on_the_meta_device():
    weights = on_meta(sit_shapes())
    assert len(weights) == 292 and sum(value.numel() for value in weights.values()) == 675_000_608
    model = sit_from(weights, {"num_heads": 16}, "meta")
    assert sum(p.numel() for p in model.parameters()) == 674_853_152
    assert model.config == SiTConfig()                                  # the paper's SiT-XL


# ------------------------------------------------ strictness ------------------------------------------------

def refused(folder, *words, load=load_released_tokenizer):
    with pytest.raises(UserError) as error:
        load(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["encoder__latent_tokens", "quant_conv__bias", "decoder__mask_token",
                                 "encoder__model__blocks__1__ls2__gamma", "decoder__freqs"])
def test_a_missing_tensor_is_refused_by_name(tmp_path, key):
    refused(change(tmp_path, **{key: None}), key.replace("__", "."))


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    refused(change(tmp_path, encoder__model__blocks__0__attn__q_norm__weight=torch.zeros(64)),
            "encoder.model.blocks.0.attn.q_norm.weight")


@pytest.mark.parametrize("key, shape", [
    ("encoder.model.blocks.1.mlp.fc2.weight", (128, 256)), ("decoder.freqs", (2, 2, 64)),
    ("encoder.model.pos_embed", (1, 9, 128)), ("decoder.to_pixel.model.bias", (191,)),
    ("encoder.model.patch_embed.proj.weight", (128, 1, 8, 8))])
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, key, shape):
    refused(change(tmp_path, **{key: torch.zeros(shape)}), key)


def test_half_precision_is_refused(tmp_path):
    refused(change(tmp_path, quant_conv__bias=torch.zeros(4).half()), "quant_conv.bias", "float16")


def test_what_is_stored_but_unused_may_be_there_or_not(tmp_path):
    images = torch.rand(1, 3, 24, 24)
    torch.manual_seed(1)
    whole = load_released_tokenizer(change(tmp_path / "whole"))
    torch.manual_seed(1)
    bare = load_released_tokenizer(change(tmp_path / "bare", **dict.fromkeys(UNUSED)))
    assert torch.equal(whole.decode(whole.encode(images)), bare.decode(bare.encode(images)))


def test_a_stored_mask_token_is_kept(tmp_path):
    token = torch.randn(1, 1, 128)
    model = load_released_tokenizer(change(tmp_path, encoder__mask_token=token))
    assert torch.equal(model.encoder.mask_token, token)


@pytest.mark.parametrize("settings, word", [
    ({"vq_std": 0}, "vq_std"), ({"vq_mean": None}, "vq_mean"), ({"vq_std": float("nan")}, "vq_std"),
    ({"image_size": 512}, "512"), ({"num_latent_tokens": 7}, "num_latent_tokens")])
def test_a_config_without_normalisation_or_of_other_weights_is_refused(tmp_path, settings, word):
    refused(change(tmp_path, settings=SETTINGS | settings), word)


def test_damaged_and_lacking_files_are_refused(tmp_path):
    folder = change(tmp_path)
    (folder / "config.json").write_text('{"vq_mean": ')
    refused(folder, "config.json", "damaged")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    refused(tmp_path / "nowhere", "config.json", "model.safetensors")


def test_a_sit_of_another_kind_is_refused(tmp_path):
    good = draw(sit_shapes(D=64, depth=2, L=6, C=8, classes=10))
    for number, (weights, settings, word) in enumerate((
            ({k: value for k, value in good.items() if k != "pos_embed"}, {"num_heads": 4}, "pos_embed"),
            (good | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, {"num_heads": 4}, "q_norm"),
            (good, {}, "num_heads"), (good, {"num_heads": 5}, "5 heads"),
            (good, {"num_heads": 4, "depth": 3}, "depth 3, not 2"))):
        refused(write(tmp_path / str(number), weights, settings), word, load=load_released_sit)


# -------------------------------------------- finding the files --------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch hub's cache, empty, and no network: what is asked for is recorded."""
    asked = []

    def no_network(request, **options):
        asked.append(request.full_url)
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weight_files.urllib.request, "urlopen", no_network)
    return asked


def test_files_are_found_in_the_given_folder_before_the_cache(tmp_path, hub):
    cached, given = tmp_path / "hub" / "checkpoints", tmp_path / "weights"
    write(cached / "maetok-b-128", {}, {})
    given.mkdir()
    assert find_released("maetok-b-128", str(given)) == cached / "maetok-b-128"
    write(given / "maetok-b-128", {}, {})
    assert find_released("maetok-b-128", str(given)) == given / "maetok-b-128"
    assert find_released("maetok-b-128") == cached / "maetok-b-128"
    (given / "maetok-b-128" / "config.json").unlink()
    with pytest.raises(UserError, match="scattered"):
        find_released("maetok-b-128", str(given))
    assert hub == []


def test_without_network_one_line_says_which_file_to_put_where(tmp_path, hub):
    (tmp_path / "weights").mkdir()
    # A model.safetensors that lies about without its repository's name could be any of the four.
    write(tmp_path / "weights", {}, {})
    with pytest.raises(UserError) as error:
        find_released("sit-xl_maetok-b-128", str(tmp_path / "weights"))
    url = "https://huggingface.co/MAETok/sit-xl_maetok-b-128/resolve/main/config.json"
    path = str(tmp_path / "weights" / "sit-xl_maetok-b-128" / "config.json")
    assert hub == [url] and url in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value)
    write(tmp_path / "weights" / "sit-xl_maetok-b-128", {}, {})
    (tmp_path / "weights" / "sit-xl_maetok-b-128" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape("sit-xl_maetok-b-128/model.safetensors")):
        find_released("sit-xl_maetok-b-128", str(tmp_path / "weights"))
    with pytest.raises(UserError, match="maetok-b-128-512"):
        find_released("maetok-l-128")


# ----------------------------------------- protocol, sampling path -----------------------------------------

def test_the_protocol_is_the_papers():
    guidance = {size: (e["steps"], e["cfg"], e["cfg_interval"]) for size, e in RELEASED.items()}
    assert guidance == {256: (250, 1.9, (0.0, 0.75)), 512: (250, 1.5, (0.0, 0.7))}           # [App. C.2]
    assert RELEASED[512]["tokenizer"] == RELEASED[256]["tokenizer"] + "-512" == "maetok-b-128-512"


@pytest.mark.parametrize("path, share", [("linear", 1), ("cosine", 0)])
def test_noise_share_tells_the_paths_apart(path, share):
    class Gaussian(torch.nn.Module):
        """The exact velocity for data of mean 0.7 and deviation 1.3."""
        def __init__(self):
            super().__init__()
            self.config = SiTConfig(num_latents=5, latent_dim=6)
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t, y):
            a, s, da, ds = path_coefficients(t[:, None, None], path)
            slope = (a * da * 1.69 + s * ds) / (a * a * 1.69 + s * s)
            return da * 0.7 + slope * (x - a * 0.7)

    assert noise_share(Gaussian()) == pytest.approx(share, abs=1e-3)
