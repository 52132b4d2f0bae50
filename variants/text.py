"""Captions as a target: a weighted bag of sub-words that an auxiliary decoder predicts.         [Sec. 4.1]

    train_tokenizer.py --add text --targets hog,text --text-vocab words --data shapes
    caption --unescape, lower case--> pieces --merges--> BPE indices --IDF, sum 1--> target (B, V)
    image tokens of the auxiliary decoder --mean--> linear --> logits (B, V);  loss: softmax cross-entropy

The paper says only that the decoder "predicts the discrete indices of text captions [...] using a BPE
tokenizer", after SuperClass (Huang et al. 2024). So vocabulary, weights, mean pooling and loss are those of
SuperClass's code. Which sub-words occur matters, their order and number do not. V is the size of the
vocabulary. captions.py says which data has captions.
To remove it: delete this file and captions.py.
"""
import functools
import gzip
import html
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass

from common import Count, UserError, Weight, check_choices, sample_rng, split_names    # before torch

import torch
import torch.nn as nn
import torch.nn.functional as F

from frozen.weight_files import WeightFile, find_weights
from losses import Target
from runtime.processes import to_device
from variants.captions import captioned

CLIP_VOCABULARY = WeightFile(
    "bpe_simple_vocab_16e6.txt.gz",
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz", "924691ac", 1_356_917)
CLIP_MERGES = 48_894                             # of the file's 262,144; CLIP does not use the others
CLIP_TOKENS = 512 + CLIP_MERGES + 2              # 49,408: bytes, bytes that end a word, merges, start and end
COUNTED, COUNTED_ENDLESS = 100_000, 4_000        # largest number of training captions that are counted


# ------------------------------------------- captions to indices -------------------------------------------

# CLIP's pattern, with \p{L} and \p{N} in the terms of `re`: contractions, runs of letters, single digits,
# runs of anything else except white space.
PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def split(caption):
    """A caption in lower case, cut into pieces that BPE encodes one by one.

    HTML entities are resolved twice, as in CLIP. Unlike in CLIP, mangled encodings are not repaired (ftfy),
    "<|startoftext|>" and "<|endoftext|>" in a caption are ordinary text, and U+0345 and the control
    characters 1C to 1F, which `regex` and `re` classify differently, may be cut elsewhere.
    """
    caption = html.unescape(html.unescape(caption)).lower()
    # Numerals that are not decimal digits, as in m², are letters for `re` and separate pieces for CLIP.
    return PIECE.findall("".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in caption))


class ClipEncoding:
    """CLIP's byte-pair encoding: caption -> indices below CLIP_TOKENS, without start and end token.

    merges: pairs of symbols, in the order of merging. The whole caption is read; CLIP stops after 75 indices.
    """

    def __init__(self, merges):
        # A printable byte is its own symbol; the others are the characters from 256 on, so that no symbol of
        # the text file is white space. Indices follow this order.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbol = dict(zip(printable + others, map(chr, [*printable, *range(256, 256 + len(others))])))
        symbols = list(self.symbol.values())
        symbols += [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
        self.index = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        self.encode_piece = functools.lru_cache(100_000)(self.encode_piece)      # most pieces occur often

    def __call__(self, caption):
        return [i for piece in split(caption) for i in self.encode_piece(piece)]

    def encode_piece(self, piece):
        parts = [self.symbol[byte] for byte in piece.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            first = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if first not in self.rank:
                break
            merged = []
            while parts:
                n = 2 if tuple(parts[:2]) == first else 1
                merged.append("".join(parts[:n]))
                parts = parts[n:]
            parts = merged
        return [self.index[part] for part in parts]


def read_merges(path):
    """CLIP's merges from its vocabulary file: a comment, then two symbols per line."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {e}; delete it to have it downloaded again") from e
    merges = [tuple(line.split()) for line in lines[1:1 + CLIP_MERGES]]
    if len(merges) < CLIP_MERGES or any(len(pair) != 2 for pair in merges):
        raise UserError(f"{path} does not hold {CLIP_MERGES} merges: it is not CLIP's vocabulary; delete it")
    return merges


class WordEncoding:
    """--text-vocab words: the `size` most frequent words of some captions, which needs no file [ours].
    caption -> indices below `size`; other words are ignored."""

    def __init__(self, captions, size):
        count = Counter(word for caption in captions for word in split(caption) if word.isalnum())
        self.index = {word: i for i, word in enumerate(sorted(count, key=lambda w: (-count[w], w))[:size])}

    def __call__(self, caption):
        return [self.index[word] for word in split(caption) if word in self.index]


# ------------------------------------------- indices to a target -------------------------------------------

def idf_weights(tokens, size):
    """Inverse document frequency of each index, (V,) float32: log((n + 1) / (captions with it + 1)).

    tokens: a list of indices for each of n captions. An index that is in every caption, as start and end
    tokens would be, has weight 0. SuperClass counts during training, so its targets depend on the step; we
    count once before training, so they are a function of the data alone [ours].
    """
    found = torch.tensor([i for row in tokens for i in set(row)], dtype=torch.int64)
    df = torch.bincount(found, minlength=size)
    return ((len(tokens) + 1) / (df + 1)).log()


def weighted(tokens, idf):
    """The non-zero entries of bag_of_words: (caption, index, value), each 1-D, every place once."""
    places = [(b, i) for b, row in enumerate(tokens) for i in sorted(set(row))]
    b, i = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).unbind(1)
    total = torch.zeros(len(tokens)).index_add_(0, b, idf[i])
    return b, i, idf[i] / total[b].clamp(min=1e-12)


def bag_of_words(tokens, idf):
    """Targets (B, V) float32: the IDF weights of the indices in each caption, scaled to sum 1.

    tokens: B lists of indices, whose repetitions and order have no effect; idf: (V,). A caption without an
    index of positive weight gets zeros and contributes nothing to the loss.
    """
    b, i, value = weighted(tokens, idf)
    target = torch.zeros(len(tokens), len(idf))
    target[b, i] = value
    return target


# ----------------------------------------------- the target -----------------------------------------------

class Pooled(nn.Module):
    """An auxiliary decoder whose head reads the mean image token, as SuperClass pools [the paper is silent]:
    latents (B, L, C) -> (B, V). The mean comes before the head, because logits of 49,408 sub-words for every
    patch would take gigabytes."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents, grid):
        return self.decoder.head(self.decoder.image_tokens(latents, grid).mean(1))


class TextTarget(Target):
    """The bag of words of an image's caption, one (V,) target per image instead of one per patch.

    dataset: the training images. The weights, and with "words" the vocabulary, are counted over their
    captions, in the order of a fixed shuffle, so all processes and resumed runs agree. log_marginal: (V,),
    the best constant prediction: log of the mean target of these captions and one more that is spread evenly,
    because a word never seen would otherwise cost infinitely much.
    """

    def __init__(self, config, dataset, device):
        self.weight, self.device = config.text_weight, torch.device(device)
        self.dim = size = CLIP_TOKENS if config.text_vocab == "clip" else config.text_words
        indices = (range(COUNTED_ENDLESS) if dataset.length is None else
                   sample_rng(0, "captions", 0, 0).permutation(dataset.length)[:COUNTED].tolist())
        captions = [dataset.source.caption(i) for i in indices]
        self.encode = (WordEncoding(captions, size) if config.text_vocab == "words" else
                       ClipEncoding(read_merges(find_weights(CLIP_VOCABULARY, config.weights_dir))))
        tokens = [self.encode(caption) for caption in captions]
        self.idf = idf_weights(tokens, size)
        _, i, value = weighted(tokens, self.idf)
        if not value.any():
            raise UserError("all training captions consist of the same words: there is nothing to predict")
        marginal = torch.full((size,), 1 / size).index_add_(0, i, value)
        self.log_marginal = (marginal / marginal.sum()).log().to(device)

    def features(self, images, captions):
        """(B, V) float32."""
        return to_device(bag_of_words([self.encode(caption) for caption in captions], self.idf), self.device)

    def decoder(self, model):
        return Pooled(super().decoder(model))

    def loss(self, prediction, y, mask):
        """Softmax cross-entropy, mean over images: logits (B, V) and y (B, V) -> float32 scalar. One
        prediction per image: unlike in Eq. 8 there are no patches to mask."""
        return F.cross_entropy(prediction.float(), y)

    def constant_loss(self, targets, masks):
        """Of log_marginal. With a large vocabulary, the mean of a few test captions would know their rare
        words, so it would not be a fair constant."""
        y = torch.cat(targets)
        return self.loss(self.log_marginal.expand_as(y), y, None)


class AddToTokenizer:
    """See common.attach."""
    @dataclass
    class Config:
        # ---- captions ----
        text_weight: Weight = 1.0    # of the captions' cross-entropy [ours: the paper gives none]
        text_vocab: str = "clip"     # clip, its 49,408 sub-words [Sec. 4.1], or words of the captions [ours]
        text_words: Count = 1000     # how many, for words

        def __post_init__(self):
            super().__post_init__()
            check_choices(self, text_vocab=("clip", "words"))

    def __init__(self, config, device):
        self.datasets = {}                                          # a large folder is listed only once
        super().__init__(config, device)

    def dataset(self, split):
        if split not in self.datasets:
            started = self.config.stage == "2" and self.config.init                          # without targets
            needed = "text" in split_names(self.config.targets) and not started
            dataset = super().dataset(split)
            self.datasets[split] = captioned(dataset) if needed else dataset
        return self.datasets[split]

    def build_target(self, name):
        if name == "text":
            return TextTarget(self.config, self.dataset("train"), self.device)
        return super().build_target(name)
