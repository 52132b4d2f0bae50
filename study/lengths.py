"""Reconstruction from the first 1, 2, 4 ... tokens.
                                    [after the paper: FlexTok, 2502.13967; One-D-Piece, 2501.10064]

    python evaluate.py lengths RUN       RUN of train_tokenizer.py --add nested_dropout, or another to compare

A rate-distortion curve, and a picture of images at growing length. Without nested dropout the tokens have no
order.
"""
import torch

import metrics
from common import Count, find_extra, number
from data import to_float, to_uint8
from measures.features import Report
from measures.image_sets import batches, gather, open_data, open_tokenizer
from pictures.draw import image_grid, line_chart

USES, nested_dropout = ("data",), find_extra("nested_dropout")
PAGE = ["Images from their first tokens", "after the paper: FlexTok",
        "With more tokens an image gains detail, beginning with its main colours. Without nested dropout the "
        "tokens have no order, and nothing can be seen until nearly all are there."]


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("run", help="run or checkpoint of train_tokenizer.py")
    add("--num-images", type=number(Count), default=1000, help="test images at most (default 1000)")


@torch.no_grad()
def measure(args):
    """Reconstruction from the first 1, 2, 4 ... L tokens [FlexTok]."""
    tokenizer, data = open_tokenizer(args, args.run)
    images = open_data(args, data, "test", tokenizer.config.image_size, args.num_images)
    values, shown = {}, {}
    for _, originals in batches(images, args, "reconstructing"):
        x = originals.to(args.device)
        h = tokenizer.encode(to_float(x))                                                   # (B, L, C)
        for k in nested_dropout.possible_lengths(h.shape[1]):
            kept = nested_dropout.keep_first(h, torch.full((len(h),), k, device=h.device))
            reconstructed = to_uint8(tokenizer.decode(kept, x.shape[-2:]))
            values.setdefault(k, []).append(metrics.psnr(x, reconstructed).cpu())
            shown.setdefault(k, reconstructed[:8])
        shown.setdefault("original", x[:8])
    rows = [{"tokens": k, "values": k * tokenizer.config.latent_dim,
             "psnr": gather(torch.cat(parts), args).mean().item()} for k, parts in values.items()]
    protocol = (f"{len(images.labels)} images of {images.name}, centre crop; EMA weights; other tokens set "
                "to 0; rate in latent values, which are not quantised")
    curve = {"PSNR in dB": {"": [(row["values"], row["psnr"]) for row in rows]}}
    titles = [k if k == "original" else f"{k} token{'s' * (k > 1)}" for k in shown]
    return Report({"rows": rows, "protocol": protocol, "page": PAGE}, [rows[0], *(r.values() for r in rows)],
                  {"_curve.png": line_chart(curve, "latent values", log_x=True),
                   ".png": image_grid(list(shown.values()), titles)})
