"""variants/tables.py: learned position tables, linear auxiliary heads, training at two sizes."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Named
from forked import in_two_processes
from test_train_tokenizer import TINY, assert_same_weights, logged_losses, train

import checkpoints
import common
import maetok
from common import UserError
from maetok import MAETok, Tokenizer, patchify, unpatchify
from variants.tables import TablesMAETok

TABLES = common.attach(Tokenizer, ["tables"])
ADD = ["--add", "tables"]


def tiny(**changes):
    config = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=2, decoder_depth=2,
                  num_latents=5, latent_dim=6, aux_depth=1)
    return TABLES.Model(TABLES.Config(**config | changes), {"hog": Named(27), "anything": Named(7)})


# -------------------------------------------- learned positions --------------------------------------------

@pytest.mark.parametrize("ape", ["encoder", "both"])
def test_one_set_of_weights_runs_at_any_size_the_patch_divides(ape):
    model = tiny(ape=ape)
    for size in ((16, 16), (32, 32), (16, 24)):
        latents = model.encode(torch.randn(2, 3, *size))
        assert latents.shape == (2, 5, 6) and model.decode(latents, size).shape == (2, 3, *size)


def test_positions_come_from_the_table_alone():
    images = torch.randn(1, 3, 16, 16)
    shuffled = unpatchify(patchify(images, 4)[:, torch.randperm(16)], 4, (4, 4))
    same = lambda model: torch.allclose(model.encode(images), model.encode(shuffled), atol=1e-5)
    model, latents = tiny(ape="both"), torch.randn(1, 5, 6)
    assert not same(model)
    patches = patchify(model.decode(latents), 4)[0]
    assert torch.pdist(patches).min() > 1e-3
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part.image_positions.zero_()
    assert same(model)                                          # now the encoder sees a bag of patches
    assert torch.pdist(patchify(model.decode(latents), 4)[0]).max() < 1e-5         # and all patches are equal
    assert not same(tiny())                                                         # without the option: RoPE


def test_only_the_encoder_can_have_a_table():
    model = tiny(ape="encoder")
    assert not hasattr(model.decoder, "image_positions")
    assert model.encoder.transformer.rope.freqs.abs().max() == 0
    assert model.decoder.transformer.rope.freqs.abs().max() > 0
    auxiliary = tiny(ape="both").aux_decoders["hog"]
    assert auxiliary.image_positions.shape == (1, 4, 4, 32)


def test_a_table_is_added_after_masking_and_resampled_for_another_grid():
    model = tiny(ape="both")
    table = model.encoder.image_positions[0].detach()                                # (rows, columns, D)
    assert 0.9 < table.std() < 1.1                                                   # as other positions
    found = model.encoder.image_tokens(torch.randn(1, 3, 16, 16), torch.ones(1, 16, dtype=torch.bool))
    torch.testing.assert_close(found[0], model.encoder.mask_token[0] + table.flatten(0, 1))
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=(4, 6), mode="bicubic", antialias=True)
    expected = expected[0].flatten(1).T
    images, mask = torch.zeros(1, 3, 16, 24), torch.ones(1, 24, dtype=torch.bool)
    torch.testing.assert_close(model.encoder.image_tokens(images, mask)[0],
                               model.encoder.mask_token[0] + expected, rtol=1e-4, atol=1e-5)
    tokens = model.decoder.tokens(torch.zeros(1, 5, 6), (4, 4))[0]
    torch.testing.assert_close(tokens[:16], model.decoder.image_token[0]
                               + model.decoder.image_positions[0].flatten(0, 1))
    assert len(tokens) == 21


def test_the_average_keeps_the_table_and_its_silent_rope():
    average = common.EMA(tiny(ape="both"), 0.9).model
    assert average.encoder.transformer.rope.freqs.abs().max() == 0


# ---------------------------------------- linear auxiliary decoders ----------------------------------------

def test_linear_heads_read_the_pixel_decoders_image_tokens():
    model, images = tiny(aux_linear=True), torch.randn(2, 3, 16, 24)
    output = model(images)
    tokens = model.decoder.image_tokens(output.latents, (4, 6))
    for name, dim in (("hog", 27), ("anything", 7)):
        head = model.aux_decoders[name].head
        assert isinstance(head, torch.nn.Linear) and head.weight.shape == (dim, 32)
        torch.testing.assert_close(output.aux[name], tokens @ head.weight.T + head.bias)
    torch.testing.assert_close(output.reconstruction, model.decode(output.latents, (16, 24)))


def test_linear_heads_see_what_other_extras_make_of_the_latents():
    pytest.importorskip("after.nested_dropout")

    def build(*names):
        kind = common.attach(Tokenizer, names)
        fields = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1, decoder_depth=1,
                      num_latents=4, latent_dim=4, aux_depth=1, aux_linear=True)
        return kind.Model(kind.Config(**fields), {"hog": Named(27)})

    model, lengths = build("tables", "nested_dropout"), torch.tensor([1, 4])
    whole, cut = model(torch.ones(2, 3, 16, 16)), model(torch.ones(2, 3, 16, 16), lengths=lengths)
    assert not torch.allclose(whole.aux["hog"][0], cut.aux["hog"][0])
    assert torch.equal(whole.aux["hog"][1], cut.aux["hog"][1])
    with pytest.raises(UserError, match="must be named before the extra that brings lengths"):
        build("nested_dropout", "tables")(torch.ones(2, 3, 16, 16), lengths=lengths)


# ------------------------------------------------- training -------------------------------------------------

@pytest.mark.parametrize("options", [["--preset", "aux-linear"], ["--preset", "ape"], ["--ape", "encoder"],
                                     ["--preset", "ape", "--mixed-size", "24", "--flip"]])
def test_the_rows_train_through_both_stages_and_load(tmp_path, options):
    state = train(tmp_path, *ADD, *options)
    assert state["step"] == 10 and np.isfinite(logged_losses(tmp_path)).all() and state["add"] == ["tables"]
    assert isinstance(maetok.load_tokenizer(tmp_path), TablesMAETok)
    assert maetok.load_tokenizer(tmp_path).encode(torch.rand(2, 3, 16, 24)).shape == (2, 4, 4)


def test_steps_take_two_image_sizes_in_turn_and_the_tokenizer_runs_at_others(tmp_path, monkeypatch):
    seen, forward = [], MAETok.forward
    monkeypatch.setattr(MAETok, "forward", lambda self, images, *rest:
                        (seen.append(images.shape[-1]), forward(self, images, *rest))[1])
    train(tmp_path / "run", *ADD, "--mixed-size", "24", "--steps", "4", "--stage2-steps", "2")
    trained = [size for size, before in zip(seen, [0, *seen]) if size != before]      # evaluation is at 16 px
    assert trained[:4] == [16, 24, 16, 24]
    tokenizer = maetok.load_tokenizer(tmp_path / "run")
    for size in ((16, 16), (24, 24), (32, 16)):
        latents = tokenizer.encode(torch.rand(2, 3, *size))
        assert latents.shape == (2, 4, 4) and tokenizer.decode(latents, size).shape == (2, 3, *size)


def test_two_sizes_resume_exactly(tmp_path):
    options = [*ADD, "--mixed-size", "24"]
    whole = train(tmp_path, *options)
    for path in tmp_path.glob("*.pt"):
        if path.name != "step_0000005.pt":
            path.unlink()
    assert_same_weights(whole, train(tmp_path, *options))


@pytest.mark.slow
def test_two_sizes_in_two_processes_equal_one(tmp_path):
    options = [*ADD, "--mixed-size", "24", "--stage", "1"]
    train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options], tmp_path / "log")
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)


def test_bad_input_is_one_line(tmp_path):
    for message, options in (("--ape decoder: choose none or encoder or both", ["--ape", "decoder"]),
                             ("must be a multiple of the patch", ["--mixed-size", "18"]),
                             ("needs learnable latents", ["--mixed-size", "24", "--no-learnable-latents"])):
        with pytest.raises(UserError, match=message) as e:
            train(tmp_path / "bad", *ADD, *options)
        assert "\n" not in str(e.value)
    train(tmp_path / "run", *ADD)
    with pytest.raises(UserError, match="mixed_size 0 -> 24"):
        train(tmp_path / "run", *ADD, "--mixed-size", "24")
    assert checkpoints.load_checkpoint(tmp_path / "run")["add"] == ["tables"]
