"""Theorem 2.1 in a toy world: samples needed to learn the score of a mixture of K Gaussians. [App. A]

    python evaluate.py theory
    python evaluate.py theory --panels K d B

Letters: n samples · d dimensions · K modes, with means of norm B.
"""
import math

from common import Count, Positive, Range, UserError, number    # before torch, see runtime/processes.py

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from measures.features import Report
from pictures.draw import line_chart, sheet_of

USES = ()
PAGE = {"page": ["Theorem 2.1 in a toy world", "Sec. 2, App. A",
                 "More modes need more samples for the same error: the lines are further right as K grows."],
        "meanings": {"exponent": "The samples needed grow as this power of K, d or B; Theorem 2.1's "
                                 "bounds are 4, 5 and 6."}}


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("--components", type=number(Count), nargs="+", default=[2, 4, 8, 16, 32], help="K")
    add("--panels", nargs="+", choices=("K", "d", "B"), default=["K"],
        help="what is varied, of the theorem's K^4 d^5 B^6 (default K)")
    add("--fixed-components", type=number(Count), default=8, help="K where d or B is varied (default 8)")
    add("--panel-dims", type=number(Count), nargs="+", default=[4, 8, 16, 32, 64], help="d that are tried")
    add("--panel-norms", type=number(Positive), nargs="+", default=[3.0, 4.5, 6.0, 9.0, 12.0],
        help="B that are tried")
    add("--dims", type=number(Count), default=16, help="d (default 16)")
    add("--norm", type=number(Positive), default=6.0, help="B, of the means (default 6)")
    add("--time", type=Range(float, 0, 1, low_open=True, high_open=True), default=0.5,
        help="noise time t of the score (default 0.5)")
    add("--samples", type=number(Count), nargs="+", default=[64, 256, 1024, 4096, 16384],
        help="n that are tried")
    add("--error", type=number(Positive), default=0.1, help="the error to reach (default 0.1)")
    add("--steps", type=number(Count), default=300, help="of training (default 300)")
    add("--repeats", type=number(Count), default=4, help="with other mixtures and samples (default 4)")


def mixture_score(x: Tensor, means: Tensor, t: float) -> Tensor:
    """Score of sum_i N(mean_i, I) / K after time t of dx = -x dt + sqrt(2) dW.                    [Eq. 11-14]

    x (n, d), means (K, d): the true ones give the exact score, learned ones the network of Eq. 13. The
    process leaves the covariance at I and shrinks means by exp(-t).
    """
    means = means * math.exp(-t)
    weights = (x @ means.T - 0.5 * means.square().sum(1)).softmax(1)          # w_i(x): |x|^2 cancels [Eq. 14]
    return weights @ means - x


def fit_score(samples: Tensor, start: Tensor, t: float, steps: int = 300, batch: int = 2048, lr: float = 0.05,
              seed: int = 0) -> Tensor:
    """Train Eq. 13's network at noise scale t on samples (n, d), from means `start` (K, d).        [Eq. 10]

    The exact score in Eq. 10 is not known in training. As in DDPM it is replaced by the score of x_t given
    x_0, -noise / sigma, whose mean given x_t is the exact score, so the minimiser is the same (Vincent 2011).
    Noise is new in every step, so that n counts samples of the data alone. Adam, lr falling linearly to 0.
    Returns means (K, d).
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
    for n in sorted({*args.samples}):
        errors = []
        for repeat in range(args.repeats):
            generator = torch.Generator().manual_seed((1_000_000 * args.seed + 1000 * repeat + K) % 2 ** 63)
            truth = F.normalize(torch.randn(K, d, generator=generator), dim=1) * B
            x = truth[torch.randint(K, (n,), generator=generator)]
            x = x + torch.randn(n, d, generator=generator)
            start = truth + 0.5 * torch.randn(K, d, generator=generator)    # warm [Assumption A.2]
            found = fit_score(x, start, args.time, args.steps, seed=repeat)
            errors.append(score_error(found, truth, args.time))
            bar.update()
        points.append((n, math.exp(np.mean(np.log(errors)))))
    return points


def measure(args):
    """The samples with which a score is learned to a fixed error, for each K, d or B. [Theorem 2.1]

    For each of --components, with --panels also of --panel-dims and --panel-norms, the others fixed: draw n
    samples of a mixture, fit the network of Eq. 13 to them, and measure the error of its score. Growing n
    gives the n at which the error falls below --error. The slope of log n over log K, d or B is the exponent
    that the theorem bounds from above by 4, 5 or 6.
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
                # The error falls with n; interpolated between the two n beside the target.
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
    result = {"panels": panels, "theorem": THEOREM, "what_it_shows": sentence, "protocol": protocol} | PAGE
    return Report(panels.get("K", {}) | result, table, {".png": sheet_of(charts)})
