"""Theorem 2.1 in a toy world: samples needed to learn the score of a mixture of K Gaussians. [App. A]

`evaluate.py theory` prints what `samples_needed` finds. Letters: n samples · d dimensions · K modes, with means
of norm B.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import UserError
from pictures.draw import line_chart


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
    """Train Eq. 13's network at noise scale t on the given samples (n, d), from means `start` (K, d). [Eq. 10]

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


def samples_needed(args):
    """The samples n with which Eq. 13's network reaches the error --error, for each K.     [Theorem 2.1]

    For each K: draw n samples of a mixture, fit the network to them, measure how far its score is from the true
    one; repeat for growing n, and read off the n at which the error falls below --error. The slope of log n over
    log K is the exponent that the theorem bounds from above by 4.
    args: the options of `evaluate.py theory`. Returns (result, table, PIL image).
    """
    d, t, rows, curves = args.dims, args.time, [], {}
    with tqdm(total=len(args.components) * len(args.samples) * args.repeats, desc="theory") as bar:
        for K in args.components:
            points = []
            for n in args.samples:
                errors = []
                for repeat in range(args.repeats):
                    generator = torch.Generator().manual_seed(1_000_000 * args.seed + 1000 * repeat + K)
                    truth = F.normalize(torch.randn(K, d, generator=generator), dim=1) * args.norm         # B
                    x = truth[torch.randint(K, (n,), generator=generator)]
                    x = x + torch.randn(n, d, generator=generator)
                    start = truth + 0.5 * torch.randn(K, d, generator=generator)    # warm [Assumption A.2]
                    found = fit_score(x, start, t, args.steps, seed=repeat)
                    errors.append(score_error(found, truth, t))
                    bar.update()
                points.append((n, math.exp(np.mean(np.log(errors)))))
            curves[f"K = {K}"] = points
            log_n, log_e = np.log(points).T
            # The error falls with n; where it crosses the target is read off between neighbours.
            needed = (math.exp(np.interp(-math.log(args.error), -log_e, log_n))
                      if log_e[-1] <= math.log(args.error) <= log_e[0] else None)
            rows.append({"K": K, "samples_needed": needed, "errors": points})
    found = [(row["K"], row["samples_needed"]) for row in rows if row["samples_needed"]]
    if len(found) < 2:
        raise UserError(f"--error {args.error} is crossed within --samples for fewer than two K; "
                        "choose another")
    exponent, offset = np.polyfit(*np.log(found).T, 1)
    sentence = (f"In this toy world the samples needed grow as K^{exponent:.2f}: more modes need more "
                "samples at equal d and B. It does not show the theorem's K^4, a number of samples that is "
                "enough at worst, nor anything about a real network, which is not handed the form of the "
                "solution and a start near it.")
    protocol = (f"d = {d}, means of norm {args.norm:g} in random directions, noise time {t:g}, error "
                f"{args.error:g} = E|s - score|^2 summed over d, {args.repeats} repeats, "
                f"{args.steps} Adam steps, seed {args.seed}")
    result = {"exponent": float(exponent), "rows": rows, "what_it_shows": sentence, "protocol": protocol}
    fit = [(K, math.exp(offset) * K ** exponent) for K, _ in found]
    errors = line_chart({"error against samples n": curves}, "n", log_x=True, log_y=True)
    needed = line_chart({f"n for error {args.error:g} against K": {
        f"fit: K^{exponent:.2f}": fit, "measured": found}}, "K", log_x=True, log_y=True)
    side_by_side = Image.new("RGB", (errors.width + needed.width, max(errors.height, needed.height)), "white")
    side_by_side.paste(errors)
    side_by_side.paste(needed, (errors.width, 0))
    return result, [("K", "samples needed"), *found], side_by_side
