"""A compact picture of latents can have many modes.                                                [rebuttal]

    python evaluate.py compactness

The rebuttal's toy: 30 close modes (A) and 4 distant ones (B). A looks more compact than B in two dimensions
but has more modes: how compact latents look (Fig. 4) does not say how many modes they have (Fig. 2). The
rebuttal gives no sizes; here the means have norms of 4 and 12 [ours].
"""
from common import Range    # before torch, see runtime/processes.py

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from measures.features import Report
from measures.latent_space import add_umap, check_umap, umap_2d
from pictures.draw import scatter_chart

USES = ()
PAGE = ["Compact is not simple", "rebuttal",
        "A, with its 30 close modes, is one small cloud; B, with four distant ones, is four separate clouds: "
        "how compact latents look (Fig. 4) does not say how many modes they have (Fig. 2)."]
COUNT = 3000          # vectors of each mixture


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("--dims", type=Range(int, 2, 1000), default=32, help="d (default 32)")
    add_umap(add)


def measure(args):
    """30 close modes against 4 distant ones in two dimensions. [rebuttal]"""
    check_umap(args.umap)
    views, rows, titles = {}, [], {"A, 30 close modes": (30, 4.0), "B, 4 distant modes": (4, 12.0)}
    for title, (K, norm) in titles.items():
        generator = torch.Generator().manual_seed(args.seed)
        means = F.normalize(torch.randn(K, args.dims, generator=generator), dim=1) * norm
        mode = torch.randint(K, (COUNT,), generator=generator)
        x = means[mode] + torch.randn(COUNT, args.dims, generator=generator)
        centre, axes, _ = metrics.pca(x, dims=2)
        shown = {"PCA": ((x.double() - centre) @ axes).numpy()}
        if args.umap:
            shown["UMAP"] = umap_2d(x, args.seed)
        train, test = metrics.standardise(x[: COUNT // 2], x[COUNT // 2:])
        nll = {k: metrics.negative_log_likelihood(
            metrics.fit_mixture(train, k, False, starts=10, seed=args.seed)[0], test.double()).mean().item()
            for k in (1, 4, 30)}
        row = {"mixture": title, "nll": nll}
        for name, points in shown.items():
            views[f"{name}: {title}"] = points, (mode % 10).tolist()
            row[f"radius_{name.lower()}"] = float(np.sqrt(points.var(0).sum()))
        rows.append(row)
    radii = [key for key in rows[0] if "radius" in key]
    table = [("mixture", *(f"NLL, {k} components" for k in rows[0]["nll"]), *radii)]
    table += [(row["mixture"], *row["nll"].values(), *(row[key] for key in radii)) for row in rows]
    sentence = "; ".join(f"{row['mixture']}: radius {row['radius_pca']:.1f} in the PCA's plane, best "
                         f"described by {min(row['nll'], key=row['nll'].get)} components of 1, 4 and 30"
                         for row in rows)
    protocol = (f"{COUNT} samples each, d = {args.dims}, unit covariance, means of norm 4 and 12 in random "
                "directions; mixtures with diagonal covariances on standardised halves, NLL in nats on the "
                f"other half; seed {args.seed}"
                + ("" if args.umap else "; no UMAP: pip install umap-learn, then --umap"))
    return Report({"rows": rows, "what_it_shows": sentence, "protocol": protocol, "page": PAGE}, table,
                  {".png": scatter_chart(views, ["modes"])})
