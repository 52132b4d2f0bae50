"""Captions as a target: a weighted bag of sub-words that an auxiliary decoder predicts.         [Sec. 4.1]

    caption --unescape, lower case--> pieces --merges--> BPE indices --IDF, sum 1--> target (B, V)
    image tokens of the auxiliary decoder --mean--> linear --> logits (B, V);  loss: softmax cross-entropy

The paper says no more than that the decoder "predicts the discrete indices of text captions [...] using a BPE
tokenizer", after SuperClass (Huang et al. 2024). So vocabulary, weights, pooling by the mean and loss are
those of SuperClass's code: which sub-words occur counts, order and number do not. V is the vocabulary's size.
"""
import functools
import gzip
import html
import math
import re
import zlib
from collections import Counter

import torch
import torch.nn.functional as F

from common import UserError, sample_rng, to_device
from frozen.weight_files import WeightFile, find_weights

CLIP_VOCABULARY = WeightFile(
    "bpe_simple_vocab_16e6.txt.gz",
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz", "924691ac", 1_356_917)
CLIP_MERGES = 48_894                             # of the file's 262,144; the rest CLIP does not use
CLIP_TOKENS = 512 + CLIP_MERGES + 2              # 49,408: bytes, bytes that end a word, merges, start and end
COUNTED, COUNTED_ENDLESS = 100_000, 4_000        # training captions that weights are counted over, at most


# ------------------------------------------- captions to indices -------------------------------------------

# CLIP's pattern, its \p{L} and \p{N} in the terms of `re`: contractions, runs of letters, single digits, runs
# of anything else that is no white space.
PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def split(caption):
    """A caption in lower case, cut into the pieces that BPE looks at one by one.

    HTML entities are resolved twice, as CLIP does. Unlike CLIP: mangled encodings are not repaired (ftfy),
    "<|startoftext|>" and "<|endoftext|>" in a caption are text like any other, and U+0345 and the control
    characters 1C to 1F, which `regex` and `re` class differently, may be cut elsewhere.
    """
    caption = html.unescape(html.unescape(caption)).lower()
    # Numerals that are no decimal digits, as in m², are letters to `re` and pieces of their own to CLIP.
    return PIECE.findall("".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in caption))


class ClipEncoding:
    """CLIP's byte-pair encoding: caption -> indices below CLIP_TOKENS, without start and end token.

    merges: pairs of symbols, the first merged first. All of the caption is read; CLIP stops at 75.
    """

    def __init__(self, merges):
        # Bytes that print stand for themselves, the others for the characters from 256 on, so that no symbol
        # of the text file is white space. This order is that of the indices.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbol = dict(zip(printable + others, map(chr, [*printable, *range(256, 256 + len(others))])))
        symbols = list(self.symbol.values())
        symbols += [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
        self.index = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        self.encode_piece = functools.lru_cache(100_000)(self.encode_piece)      # most pieces come again

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
    """CLIP's merges from its vocabulary file: a comment, then two symbols a line. Raises UserError."""
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
    caption -> indices below `size`; other words are passed over."""

    def __init__(self, captions, size):
        count = Counter(word for caption in captions for word in split(caption) if word.isalnum())
        self.index = {word: i for i, word in enumerate(sorted(count, key=lambda w: (-count[w], w))[:size])}

    def __call__(self, caption):
        return [self.index[word] for word in split(caption) if word in self.index]


# ------------------------------------------- indices to a target -------------------------------------------

def idf_weights(tokens, size):
    """Inverse document frequency of each index, (V,) float32: log((n + 1) / (captions with it + 1)).

    tokens: a list of indices for each of n captions. What stands in every caption, as start and end tokens
    would, weighs 0. SuperClass counts while it trains, so that its targets depend on the step; we count once
    before, so that they are a function of the data alone [ours].
    """
    found = torch.tensor([i for row in tokens for i in set(row)], dtype=torch.int64)
    df = torch.bincount(found, minlength=size)
    return ((len(tokens) + 1) / (df + 1)).log()


def weighted(tokens, idf):
    """The entries of bag_of_words that are not 0: (caption, index, value), each 1-D, no place twice."""
    places = [(b, i) for b, row in enumerate(tokens) for i in sorted(set(row))]
    b, i = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).unbind(1)
    total = torch.zeros(len(tokens)).index_add_(0, b, idf[i])
    return b, i, idf[i] / total[b].clamp(min=1e-12)


def bag_of_words(tokens, idf):
    """Targets (B, V) float32: the IDF weights of the indices in each caption, scaled to sum 1.

    tokens: B lists of indices, repetitions and order without effect; idf: (V,). A caption without any index,
    or of weight 0 throughout, gets zeros: it says nothing and contributes nothing to the loss.
    """
    b, i, value = weighted(tokens, idf)
    target = torch.zeros(len(tokens), len(idf))
    target[b, i] = value
    return target


def text_loss(logits, target):
    """Softmax cross-entropy, mean over images: logits (B, V), target (B, V) -> float32 scalar. One prediction
    per image: unlike Eq. 8 there are no patches to mask."""
    return F.cross_entropy(logits.float(), target)


class TextTarget:
    """What compute_targets calls for "text": captions -> (B, V) targets on `device`.

    log_marginal: (V,), the constant prediction to beat: log of the mean target of the training captions, with
    one more caption spread evenly, or a word never seen would cost infinitely much. Counting takes captions
    from a fixed shuffle of `dataset`, so every process and every resumed run has the same weights.
    Raises UserError for captions or a vocabulary that cannot be read.
    """

    def __init__(self, config, dataset, device):
        size, self.device, captions = config.aux_targets["text"], torch.device(device), []
        for i in (range(COUNTED_ENDLESS) if dataset.length is None else
                  sample_rng(0, "captions", 0, 0).permutation(dataset.length)[:COUNTED].tolist()):
            try:
                captions.append(dataset.source.caption(i))
            except UserError:
                if not dataset.skip_corrupt:
                    raise
        self.encode = (WordEncoding(captions, size) if config.text_vocab == "words" else
                       ClipEncoding(read_merges(find_weights(CLIP_VOCABULARY, config.weights_dir))))
        tokens = [self.encode(caption) for caption in captions]
        self.idf = idf_weights(tokens, size)
        _, i, value = weighted(tokens, self.idf)
        if not value.any():
            raise UserError("all training captions consist of the same words: there is nothing to predict")
        marginal = torch.full((size,), 1 / size).index_add_(0, i, value)
        self.log_marginal = (marginal / marginal.sum()).log().to(device)

    def __call__(self, captions):
        return to_device(bag_of_words([self.encode(caption) for caption in captions], self.idf), self.device)
