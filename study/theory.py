"""Theorem 2.1 in a toy world: samples needed to learn the score of a mixture of K Gaussians. [App. A]

`evaluate.py theory` prints what `samples_needed` finds, `evaluate.py compactness` the rebuttal's toy.
Letters: n samples · d dimensions · K modes, with means of norm B.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import metrics
from common import UserError
from pictures.draw import line_chart, scatter_chart, sheet_of


def mixture_score(x: Tensor, means: Tensor, t: float) -> Tensor:
    """Score of sum_i N(mean_i, I) / K after time t of dx = -x dt + sqrt(2) dW.                    [Eq. 11-14]

    x (n, d), means (K, d): true ones give the oracle, parameters the network of Eq. 13. The process leaves
    the covariance at I and shrinks means by exp(-t).
    """
    means = means * math.exp(-t)
    weights = (x @ means.T - 0.5 * means.square().sum(1)).softmax(1)          # w_i(x): |x|^2 cancels [Eq. 14]
    return weights @ means - x


def fit_score(samples: Tensor, start: Tensor, t: float, steps: int = 300, batch: int = 2048, lr: float = 0.05,
              seed: int = 0) -> Tensor:
    """Train Eq. 13's network at noise scale t on the given samples (n, d),
    from means `start` (K, d). [Eq. 10]

    The oracle in Eq. 10 is not known to who has samples; as in DDPM it is replaced by the score of x_t given
    x_0, -noise / sigma, whose mean given x_t it is: the same minimiser (Vincent 2011). Fresh noise every
    step, so that n counts samples of the data alone. Adam, lr falling linearly to 0. Returns means (K, d).
    """
    generator = torch.Generator().manual_seed(seed)
    means = start.clone().requires_grad_()
    optimizer, sigma = torch.optim.Adam([means], lr), math.sqrt(1 - math.exp(-2 * t))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = samples if len(samples) <= batch else samples[
            torch.randint(len(samples), (batch,), generator=generator)]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x_t = math.exp(-t) * x + sigma * noise
        loss = (mixture_score(x_t, means, t) + noise / sigma).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return means.detach()


def score_error(means: Tensor, truth: Tensor, t: float, count: int = 20_000, seed: int = 0) -> float:
    """E |s(x; means) - score of p_t|^2 over fresh x from p_t, by Monte Carlo.                     [Eq. 10]"""
    generator = torch.Generator().manual_seed(seed)
    centres = truth[torch.randint(len(truth), (count,), generator=generator)] * math.exp(-t)
    x = centres + torch.randn(centres.shape, generator=generator, dtype=truth.dtype)
    return (mixture_score(x, means, t) - mixture_score(x, truth, t)).square().sum(1).mean().item()


THEOREM = ("Theorem 2.1 [A.7]: to learn a mixture of K Gaussians in d dimensions, of unit covariance and "
           "with means of norm at most B, to an error epsilon, n' = Theta(K^4 d^5 B^6 / epsilon^2) samples "
           "are enough, if the means lie a multiple of sqrt(log min(K, d)) apart [A.1] and training starts "
           "within a fraction of that [A.2]")
BOUNDS = {"K": 4, "d": 5, "B": 6}                                                     # its exponents  [Eq. 3]


def error_curve(args, K, d, B, bar):
    """[(n, error of the fitted score)] for each n of --samples: geometric means over --repeats mixtures."""
    points = []
    for n in args.samples:
        errors = []
        for repeat in range(args.repeats):
            generator = torch.Generator().manual_seed(1_000_000 * args.seed + 1000 * repeat + K)
            truth = F.normalize(torch.randn(K, d, generator=generator), dim=1) * B
            x = truth[torch.randint(K, (n,), generator=generator)]
            x = x + torch.randn(n, d, generator=generator)
            start = truth + 0.5 * torch.randn(K, d, generator=generator)    # warm [Assumption A.2]
            found = fit_score(x, start, args.time, args.steps, seed=repeat)
            errors.append(score_error(found, truth, args.time))
            bar.update()
        points.append((n, math.exp(np.mean(np.log(errors)))))
    return points


def samples_needed(args):
    """The samples n with which Eq. 13's network reaches the error --error, for each K, d or B.  [Theorem 2.1]

    For each of --components, with --panels also of --panel-dims and --panel-norms, the others fixed: draw n
    samples of a mixture, fit the network to them, measure how far its score is from the true one; repeat for
    growing n, and read off the n at which the error falls below --error. The slope of log n over log K, d or
    B is the exponent that the theorem bounds from above by 4, 5 or 6.
    args: the options of `evaluate.py theory`. Returns (result, table, PIL image).
    """
    K, d, B = args.fixed_components, args.dims, args.norm
    cases = {"K": [(v, d, B) for v in args.components], "d": [(K, v, B) for v in args.panel_dims],
             "B": [(K, d, v) for v in args.panel_norms]}
    cases = {letter: cases[letter] for letter in cases if letter in args.panels}
    panels, charts, table = {}, [], [("varied", "value", "samples needed")]
    with tqdm(total=sum(map(len, cases.values())) * len(args.samples) * args.repeats, desc="theory") as bar:
        for letter, settings in cases.items():
            rows, curves, place = [], {}, "KdB".index(letter)
            for setting in settings:
                points = error_curve(args, *setting, bar)
                log_n, log_e = np.log(points).T
                # The error falls with n; where it crosses the target is read off between neighbours.
                needed = (math.exp(np.interp(-math.log(args.error), -log_e, log_n))
                          if log_e[-1] <= math.log(args.error) <= log_e[0] else None)
                curves[f"{letter} = {setting[place]:g}"] = points
                rows.append({letter: setting[place], "samples_needed": needed, "errors": points})
            found = [(row[letter], row["samples_needed"]) for row in rows if row["samples_needed"]]
            if len(found) < 2:
                raise UserError(f"--error {args.error} is crossed within --samples for fewer than two "
                                f"{letter}; choose another")
            exponent, offset = np.polyfit(*np.log(found).T, 1)
            panels[letter] = {"exponent": float(exponent), "rows": rows}
            table += [(letter, *pair) for pair in found]
            fit = [(v, math.exp(offset) * v ** exponent) for v, _ in found]
            charts += [line_chart({"error against samples n": curves}, "n", log_x=True, log_y=True),
                       line_chart({f"n for error {args.error:g} against {letter}": {
                           f"fit: {letter}^{exponent:.2f}": fit, "measured": found}}, letter, log_x=True,
                           log_y=True)]
    grown = " and as ".join(f"{letter}^{panel['exponent']:.2f}" for letter, panel in panels.items())
    bounds = ", ".join(f"{letter}^{BOUNDS[letter]}" for letter in panels)
    sentence = (f"In this toy world the samples needed grow as {grown}, all else equal. It does not show the "
                f"theorem's {bounds}, a number of samples that is enough at worst, nor anything about a real "
                "network, which is not handed the form of the solution and a start near it.")
    protocol = (f"where not varied K = {K}, d = {d}, means of norm {B:g} in random directions; noise time "
                f"{args.time:g}, error {args.error:g} = E|s - score|^2 summed over d, {args.repeats} "
                f"repeats, {args.steps} Adam steps, seed {args.seed}")
    result = {"panels": panels, "theorem": THEOREM, "what_it_shows": sentence, "protocol": protocol}
    return panels.get("K", {}) | result, table, sheet_of(charts)


def compactness(args, count=3000):
    """The rebuttal's toy: 30 close modes (A) and 4 distant ones (B), each seen in two dimensions.  [rebuttal]

    A looks more compact than B and yet has more modes: how compact a picture of latents is (Fig. 4) says
    little about how many modes they need (Fig. 2). Views: PCA, and UMAP where the package umap-learn is
    installed. The rebuttal gives no sizes: here means of norm 4 and 12 [ours].
    Returns (result, table, PIL image), as samples_needed.
    """
    views, rows, titles = {}, [], {"A, 30 close modes": (30, 4.0), "B, 4 distant modes": (4, 12.0)}
    for title, (K, norm) in titles.items():
        generator = torch.Generator().manual_seed(args.seed)
        means = F.normalize(torch.randn(K, args.dims, generator=generator), dim=1) * norm
        mode = torch.randint(K, (count,), generator=generator)
        x = means[mode] + torch.randn(count, args.dims, generator=generator)
        centre, axes, _ = metrics.pca(x, dims=2)
        shown = {"PCA": ((x.double() - centre) @ axes).numpy()}
        if args.umap:
            from umap import UMAP                        # optional; evaluate.py has looked for it
            shown["UMAP"] = UMAP(random_state=args.seed).fit_transform(x.numpy())
        train, test = metrics.standardise(x[: count // 2], x[count // 2:])
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
    protocol = (f"{count} samples each, d = {args.dims}, unit covariance, means of norm 4 and 12 in random "
                "directions; mixtures with diagonal covariances on standardised halves, NLL in nats on the "
                f"other half; seed {args.seed}"
                + ("" if args.umap else "; no UMAP: pip install umap-learn, then --umap"))
    return ({"rows": rows, "what_it_shows": sentence, "protocol": protocol}, table,
            scatter_chart(views, ["modes"]))
