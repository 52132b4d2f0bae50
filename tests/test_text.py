"""variants/text.py: CLIP's encoding against transformers, targets by hand, training on captioned shapes."""
import gzip
import math
import types
import unicodedata

import numpy as np
import pytest
import regex
import torch
from forked import in_two_processes
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import checkpoints
import common
import train_tokenizer
from common import UserError
from test_train_tokenizer import TINY, assert_same_weights, logged_losses, targets_of, train
from variants import text
from variants.text import (CLIP_MERGES, CLIP_TOKENS, ClipEncoding, TextTarget, WordEncoding, bag_of_words,
                           idf_weights, read_merges, split)

TEXT = "--add text --data shapes --text-vocab words --text-words 32".split()


# ------------------------------------------- captions to indices -------------------------------------------

# Overlaps ("aaa"), a merge that waits for another, word ends, bytes of é and of emoji, ranks that cross.
MERGES = [tuple(pair.split()) for pair in (
    "s t;st a;sta r</w>;t a;r e;re d</w>;a a;aa a</w>;o n</w>;g re;gre e;gree n</w>;Ã ©;Ã ©</w>;ð Ł;ðŁ ĺ;a b;"
    "b a;ab c</w>;c a;' s</w>;! !;! !</w>;!! !</w>;e d</w>;a r</w>;st ar</w>;æ Ĺ;æĹ ¥</w>").split(";")]
CAPTIONS = ["A red star on green", "stars, STARTED: start!!", "aaaa aaa aa ababab abcab baab",
            "é café éé RED's", "😀😀 日本語 don't we'll  I'M it's's", "x_y __ 3.14 2024 m² ½ Ⅷ", "", " ",
            "!!! !!!!! _'s 's''s"]


def clip_in_transformers(merges):
    letters = list(bytes_to_unicode().values())
    assert set(letters) == set(ByteLevel.alphabet())
    symbols = letters + [c + "</w>" for c in letters] + list(map("".join, merges))
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges)


def test_byte_pair_encoding_equals_transformers():
    ours, theirs = ClipEncoding(MERGES), clip_in_transformers(MERGES)
    rng = np.random.default_rng(0)
    random = ["".join(rng.choice(list("aabcdegnorst é!'_1²日 "), 40)) for _ in range(200)]
    used = set()
    for caption in CAPTIONS + random:
        assert ours(caption) == theirs(caption)["input_ids"][1:-1], caption
        used.update(ours(caption))
    assert len(used & set(range(512, 512 + len(MERGES)))) > 20               # the merges were put to work


def test_pieces_are_those_of_clips_pattern():
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
    rng = np.random.default_rng(0)
    ranges = [(0x20, 0x7f), (0xa0, 0x250), (0x370, 0x530), (0x660, 0x66a), (0x2070, 0x2190), (0x4e00, 0x4f00)]
    for _ in range(300):
        caption = "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40))
        caption += rng.choice(["'s", "'ll", "'LL", "''d", "x're", "2've"])
        # Letters younger than Python's tables are none to it; entities are the next line's.
        caption = "".join(c for c in caption if unicodedata.category(c) != "Cn" and c != "&")
        assert split(caption) == pattern.findall(caption.lower()), caption
    assert split("Tom &amp;amp; Jerry &lt;3") == ["tom", "&", "jerry", "<", "3"]      # entities, even twice


def vocabulary_file(path, lines):
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *lines]).encode()))
    return path


def test_the_vocabulary_file_gives_49408_tokens_and_damage_is_refused(tmp_path):
    letters = list(bytes_to_unicode().values())[:94]
    some = letters[:25]
    lines = [f"{a} {b}{c}{d}" for a in letters for b in some for c in some for d in ("", "</w>")]
    path = vocabulary_file(tmp_path / "v.gz", lines)                    # longer than needed, as the real one
    encoding = ClipEncoding(read_merges(path))
    assert len(lines) > CLIP_MERGES and len(encoding.rank) == CLIP_MERGES
    assert CLIP_TOKENS == 49_408 and len(encoding.index) == CLIP_TOKENS - 2
    assert encoding("!") == [256] and encoding("a") == [320]          # "a</w>" is 320 in CLIP's published ids
    for damaged, message in ((path.read_bytes()[:5000], "cannot read"), (b"<html>", "cannot read"),
                             (vocabulary_file(tmp_path / "x", lines[:9]).read_bytes(), "not hold 48894"),
                             (vocabulary_file(tmp_path / "x", ["a"] * 50_000).read_bytes(), "not hold")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_merges(path)


def test_words_are_the_most_frequent_ones():
    encoding = WordEncoding(["a red star", "a RED ring!", "a blue, blue ring"], 4)
    assert list(encoding.index) == ["a", "blue", "red", "ring"]
    assert encoding("Ring, blue & yellow: a ring") == [3, 1, 0, 3]


# ------------------------------------------- indices to a target -------------------------------------------

class Captions:
    """What TextTarget needs of an ImageDataset."""
    def __init__(self, captions):
        self.captions, self.length, self.source = captions, len(captions), self

    def caption(self, index):
        if not self.captions[index]:
            raise UserError("empty")
        return self.captions[index]


def words(size):
    return types.SimpleNamespace(text_words=size, text_vocab="words", text_weight=1.0, weights_dir="")


TOKENS = [[0, 1, 1, 2], [0, 1], [0, 3], [0]]                      # index 0 in each, 1 in two, 4 in none


def test_bag_weights_by_hand():
    idf = idf_weights(TOKENS, 5)
    w1, w2 = math.log(5 / 3), math.log(5 / 2)                                # log((n + 1) / (df + 1))
    torch.testing.assert_close(idf, torch.tensor([0, w1, w2, w2, math.log(5)]))
    target = bag_of_words([[2, 1, 0, 1, 1], [0], [], [4, 3]], idf)
    w4 = math.log(5)
    torch.testing.assert_close(target, torch.tensor([[0, w1 / (w1 + w2), w2 / (w1 + w2), 0, 0], [0.0] * 5,
                                                     [0.0] * 5, [0, 0, 0, w2 / (w2 + w4), w4 / (w2 + w4)]]))


def test_the_loss_and_its_gradient_are_the_closed_form():
    logits, B = torch.randn(4, 5, dtype=torch.double, requires_grad=True), 4
    target = bag_of_words(TOKENS, idf_weights(TOKENS, 5))
    loss = TextTarget(words(5), Captions(["a red star", "a ring"]), "cpu").loss(logits, target, None)
    expected = 0.0
    for row, wanted in zip(logits.tolist(), target.tolist()):
        total = sum(math.exp(x) for x in row)
        expected -= sum(t * math.log(math.exp(x) / total) for x, t in zip(row, wanted)) / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    gradient, = torch.autograd.grad(loss, logits)
    softmax = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    torch.testing.assert_close(gradient, (softmax * target.sum(1, keepdim=True) - target) / B,
                               rtol=1e-5, atol=1e-7)
    assert gradient[3].abs().max() == 0                           # a caption of weightless words says nothing


def test_the_constant_is_the_mean_target_of_the_training_captions():
    target = TextTarget(words(5), Captions(["a red star", "a red ring", "a star"]), "cpu")
    red, ring, star = (math.log(4 / (df + 1)) for df in (2, 1, 2))
    mean = {"a": 0, "red": red / (red + star) + red / (red + ring), "ring": ring / (red + ring),
            "star": star / (red + star) + 1}
    assert target.encode.index == {"a": 0, "red": 1, "star": 2, "ring": 3}
    expected = torch.tensor([mean[word] + 0.2 for word in ("a", "red", "star", "ring")] + [0.2]) / 4
    torch.testing.assert_close(target.log_marginal.exp(), expected)
    y = target.features(None, ("a ring", "RED a red star on blue"))
    torch.testing.assert_close(y[:, :4], torch.tensor([[0, 0, 0, 1.0], [0, 0.5, 0.5, 0]]))
    constant = -(y.sum(0) * target.log_marginal).sum() / 2
    torch.testing.assert_close(target.constant_loss([y[:1], y[1:]], None), constant)


def test_weights_come_from_at_most_so_many_captions_always_the_same(monkeypatch):
    monkeypatch.setattr(text, "COUNTED", 50)
    captions = Captions([f"word number {'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10]}" for i in range(100)])
    a, b = (TextTarget(words(30), captions, "cpu") for _ in range(2))
    assert torch.equal(a.idf, b.idf) and torch.equal(a.log_marginal, b.log_marginal)
    assert a.idf.max() <= math.log(51)                                             # 50 captions, not 100


def test_captions_without_information_or_text_are_refused():
    with pytest.raises(UserError, match="nothing to predict"):
        TextTarget(words(5), Captions(["a star", "A star!"]), "cpu")
    with pytest.raises(UserError, match="empty"):
        TextTarget(words(5), Captions(["a star", "", "a ring"]), "cpu")


# ------------------------------------------------ the model ------------------------------------------------

def method(add, **options):
    """The trainer's Method with the extras `add`."""
    kind = common.attach(train_tokenizer.Method, add)
    config = dict(image_size=16, patch_size=4, width=32, heads=2, encoder_depth=1, decoder_depth=1,
                  aux_depth=1, num_latents=4, latent_dim=4, hog_cell=4, percep_weight=0.0, disc="none",
                  data="shapes", targets="hog,text", text_vocab="words", text_words=7)
    return kind(kind.Config(**config | options), torch.device("cpu"))


@pytest.mark.parametrize("linear", [False, True])
def test_the_caption_is_predicted_from_the_mean_image_token(linear):
    made = method(["text", "tables"], aux_linear=linear)
    model, images = made.Model(made.config, made.targets), torch.rand(2, 3, 16, 16)
    output, decoder = model(images), model.aux_decoders["text"].decoder
    source = model.decoder if linear else decoder                # or the pixel decoder (Table 1d)
    tokens = source.image_tokens(output.latents, (4, 4))
    # The head is linear: the mean of its outputs over patches is its output at the mean.
    expected = torch.stack([decoder.head(t) for t in tokens.unbind(1)]).mean(0)
    torch.testing.assert_close(output.aux["text"], expected)
    assert output.aux["text"].shape == (2, 7) and output.aux["hog"].shape == (2, 16, 27)


def test_the_papers_size_with_four_targets_has_clips_vocabulary(monkeypatch):
    config = train_tokenizer.Config(image_size=512, targets="hog,dinov2-l,siglip-l")
    targets = targets_of(config, monkeypatch)
    monkeypatch.setattr(text, "find_weights", lambda *args: None)
    monkeypatch.setattr(text, "read_merges", lambda path: [])
    options = types.SimpleNamespace(text_vocab="clip", text_weight=1.0, weights_dir="")
    targets["text"] = TextTarget(options, Captions(["a red star", "a ring"]), "cpu")
    with torch.device("meta"):
        model = train_tokenizer.Method.Model(config, targets)
        output = model(torch.empty(1, 3, 512, 512))
    assert output.aux["text"].shape == (1, 49_408) and output.aux["siglip-l"].shape == (1, 1024, 1024)
    decoders = model.aux_decoders["siglip-l"], model.aux_decoders["text"].decoder
    assert [len(decoder.transformer.blocks) for decoder in decoders] == [3, 3]


def test_images_come_with_captions_only_while_the_target_is_trained():
    for options, length in (({}, 3), (dict(targets="hog"), 2), (dict(stage="2", init="run"), 2)):
        made = method(["text"], **options)
        assert len(made.dataset("train")[0, 0]) == len(made.dataset("test")[0, 0]) == length
        assert ("text" in made.targets) == (length == 3)
        assert made.dataset("train") is made.dataset("train")                   # a folder is listed only once


# ------------------------------------------------- training -------------------------------------------------

def test_training_beats_the_best_constant_on_captioned_shapes(tmp_path):
    train(tmp_path, *TEXT, *"--targets text --stage 1 --steps 150 --warmup 10 --lr 1e-2 --batch-size 16 "
                            "--latent-dim 8 --save-every 150 --log-every 50".split())
    record = checkpoints.read_metrics(tmp_path)[-1]
    assert record["text_loss"] < record["text_constant"] - 0.12, record
    assert 2.5 < record["text_constant"] < math.log(32)                  # better than not knowing the words


def test_text_joins_other_targets_with_its_own_weight_and_ends_with_stage_1(tmp_path):
    state = train(tmp_path, *TEXT, "--targets", "text,hog", "--text-weight", "0.3", "--aux-weight", "2")
    for r in checkpoints.read_metrics(tmp_path):
        if "loss" in r and r["stage"] == 1:
            assert r["loss"] == pytest.approx(r["recon"] + 2 * r["hog"] + 0.3 * r["text"], rel=1e-5)
        elif "loss" in r:
            assert "text" not in r and r["loss"] == pytest.approx(r["recon"])
    assert state["step"] == 10 and not any(name.startswith("aux_decoders") for name in state["model"])


@pytest.mark.slow
def test_two_processes_equal_one_and_resuming_is_exact(tmp_path):
    options = [*TEXT, "--targets", "hog,text", "--stage", "1", "--save-every", "3"]
    whole = train(tmp_path / "one", *options)
    in_two_processes("train_tokenizer", [*TINY, "--out", tmp_path / "two", *options], tmp_path / "log")
    for term in ("loss", "text"):
        one, other = ([r[term] for r in checkpoints.read_metrics(tmp_path / name) if term in r]
                      for name in ("one", "two"))
        assert len(one) == 6
        np.testing.assert_allclose(one, other, atol=1e-4)
    for name in ("last.pt", "step_0000006.pt"):
        (tmp_path / "one" / name).unlink()
    before = logged_losses(tmp_path / "one")
    assert_same_weights(whole, train(tmp_path / "one", *options))
    assert logged_losses(tmp_path / "one") == before


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                # nobody listens: as without a network
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures/one.png")
    np.savez(tmp_path / "x.npz", np.zeros((2, 16, 16, 3), np.uint8))
    for message, options in (
            ("--data has no captions; choose shapes", ["--data", str(tmp_path / "x.npz")]),
            ("--text-vocab latin: choose clip or words", [*TEXT, "--text-vocab", "latin"]),
            ("argument --text-words: must be a whole number from 1", [*TEXT, "--text-words", "0"]),
            ("argument --text-weight: must be a number from 0", [*TEXT, "--text-weight", "-1"]),
            ("has no caption", ["--data", str(tmp_path / "pictures"), "--text-vocab", "words"]),
            ("no bpe_simple_vocab_16e6.txt.gz in", ["--data", "shapes"])):
        with pytest.raises(UserError, match=message) as e:
            train(tmp_path / "run", "--add", "text", "--targets", "text", *options)
        assert "\n" not in str(e.value)
