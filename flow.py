"""Between noise and latents: paths and objective, samplers, guidance.           [Sec. 4.1, Table 8, App. C.2]

    training   latents x, noise eps, time t --interpolate--> x_t and its velocity v;
               the model learns v(x_t, t, class) by squared error
    sampling   noise x_1 --euler_maruyama, 250 calls of the model--> x_0, the normalised latents;
               MAETok.decode turns these into images

These are SiT's objective and samplers (Ma et al. 2024, arXiv:2401.08740). The model is in sit.py, the
training loop in train_diffusion.py.

Time runs from data to noise everywhere: DATA AT t = 0, NOISE AT t = 1. Samplers go from 1 down to 0.

Shapes: B batch · L latent tokens · C latent channels. A label y is an int64 in [0, num_classes]; num_classes
itself is the null class, "no class given".

Provenance tags: [Sec. 4.1], [Table 8] the paper (arXiv:2502.03444v2) · [SiT] its diffusion model's paper ·
[released code] what only the authors' code shows · [ours] all are silent.
"""
import functools
import math

from common import UserError, sample_rng, standard_normal    # before torch, see runtime/processes.py

import numpy as np
import torch
from torch import Tensor

from runtime.processes import to_device

# ------------------------------------------- paths and objective -------------------------------------------
# A path mixes data x and noise eps:  x_t = alpha x + sigma eps,  with alpha, sigma = 1, 0 at t = 0 and
# 0, 1 at t = 1. Its velocity, dx_t/dt for a fixed pair, is  v = alpha' x + sigma' eps.  The model learns
# E[v | x_t]. [SiT, Sec. 2]

def path_coefficients(t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma, alpha', sigma' at times t, a float tensor of any shape: four tensors like t.

    path: "linear", the usual one, or "cosine", which SiT calls GVP [SiT]. Raises ValueError for others.
    """
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        h = math.pi / 2
        return torch.cos(h * t), torch.sin(h * t), -h * torch.sin(h * t), h * torch.cos(h * t)
    raise ValueError(f"path is {path!r}: choose linear or cosine")


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """x, noise eps (B, L, C) and times t (B,) -> the state x_t and its velocity v, (B, L, C) each: training's
    input and target. [SiT's, whose training the paper follows, Sec. 4.1]"""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t[:, None, None], path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of the velocity: (B, L, C) -> (B,) float32, one value per sample, so that losses can be
    binned by t."""
    return (prediction.float() - target.float()).square().mean((1, 2))


def sample_times(rngs: list, kind: str = "uniform", path: str = "linear") -> Tensor:
    """Training times, (B,) float32 on the CPU, from one numpy Generator per sample: independent of batch and
    process.

    kind: "uniform" on [0, 1], SiT's "original training setting" [Sec. 4.1], or "logit-normal": fewer times
    near either end [the released code's README]. With n standard normal, sigma / alpha = e^n on either path:
    t = sigmoid(n) on the linear one, (2 / pi) atan(e^n) on the cosine one. Raises ValueError for others.
    """
    if kind == "uniform":
        return torch.tensor([rng.random() for rng in rngs], dtype=torch.float32)
    if kind == "logit-normal":
        n = torch.tensor([rng.standard_normal() for rng in rngs], dtype=torch.float64)
        return (n.sigmoid() if path == "linear" else n.exp().atan() * (2 / math.pi)).float()
    raise ValueError(f"times are {kind!r}: choose uniform or logit-normal")


def drop_labels(rngs: list, y: Tensor, null_class: int, probability: float = 0.1) -> Tensor:
    """Labels (B,) int64 with some replaced by the null class, so that one model learns both velocities of
    guidance.

    rngs: one numpy Generator per sample. null_class: the model's num_classes. probability: 0.1 [SiT]; 1 drops
    all labels, which trains an unconditional model [Table 5].
    """
    dropped = torch.tensor([rng.random() < probability for rng in rngs], dtype=torch.bool, device=y.device)
    return torch.where(dropped, null_class, y)


def expected_noise(v: Tensor, x: Tensor, t: Tensor | float, path: str = "linear") -> Tensor:
    """E[eps | x_t], (B, L, C), from the velocity v and the state x = x_t, (B, L, C) each; t: a float or (B,).

    x_t = alpha x + sigma eps and v = alpha' x + sigma' eps are two equations in x and eps. Expectations obey
    them too. Their determinant  alpha sigma' - alpha' sigma  is 1 on the linear path and pi/2 on the cosine
    path, never 0. On the linear path the result is  x_t + (1 - t) v.
    """
    # A Python float stays on the CPU: its scalars need no copy to the GPU.
    t = t.to(x).reshape(-1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=x.dtype)
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    return (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)


# ------------------------------------------------ samplers ------------------------------------------------
# From noise at t = 1 to data at t = 0. All take
#   velocity     a callable: state (B, L, C), t (a float) -> (B, L, C) in any float dtype; guided_velocity
#                makes one
#   x            (B, L, C), standard normal noise
#   times        of the states, a list of floats from 1 down to 0; time_grid makes one
# and return the state at t = 0 in x's dtype. In between it is float64 [released code]: hundreds of small
# additions to a 16-bit state would round off most of each.

LAST = 0.04              # where Euler-Maruyama's last step starts [released code]


def time_grid(steps: int, last: float | None = None) -> list[float]:
    """steps + 1 times from 1 to 0, equally spaced; with `last` equally spaced from 1 to `last`, then 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    if last is None:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    if not 0 < last < 1:
        raise ValueError(f"last is {last}: the last step starts between 0 and 1")
    return [*torch.linspace(1, last, steps, dtype=torch.float64).tolist(), 0.0]


def precise(x: Tensor) -> Tensor:
    """x in the dtype of a sampler's state."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)     # Apple GPUs have no float64


@torch.no_grad()
def euler(velocity, x: Tensor, times: list) -> Tensor:
    """Euler's method for the ODE dx/dt = v: one call per step, an error of first order in its length."""
    dtype, x = x.dtype, precise(x)
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, t).to(x)
    return x.to(dtype)


@torch.no_grad()
def heun(velocity, x: Tensor, times: list) -> Tensor:
    """Heun's method for the ODE dx/dt = v: an Euler step, then the same step again with the mean of the
    velocities at its two ends. An error of second order, for 2 n - 1 calls in n steps.

    The last step is an Euler step, a convention of Karras et al. (2022), whose denoiser cannot be asked at
    t = 0. The method stays second order.
    """
    dtype, x = x.dtype, precise(x)
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t).to(x)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next).to(x)) / 2
        x = x + (t_next - t) * v
    return x.to(dtype)


@torch.no_grad()
def euler_maruyama(velocity, x: Tensor, times: list, noise=None, path: str = "linear") -> Tensor:
    """The Euler-Maruyama method for SiT's reverse SDE; the paper's sampler, with 250 steps [Table 8].

        dx = (v - w/2 s) dt + sqrt(w) dW        t falling from 1 to 0; s: the score of x_t

    x_t has the same distribution as under the ODE for any w(t) >= 0 [SiT]. Here w = 2 sigma(t), which is 2t
    on the linear path [released code]. Since s = -E[eps | x_t] / sigma, the drift v - w/2 s is then
    v + E[eps | x_t]: nothing is divided by a small sigma.

    times: time_grid(steps, LAST). The last step, from 0.04 to 0, is deterministic: noise added there would
    stay in the sample. It uses the drift over its whole length, so it must be short beside the data's spread
    [released code].
    noise: a callable, step 0 ... steps - 2 -> (B, L, C) standard normal. With one stream per sample, a sample
    is the same in any batch. None: torch's global generator.
    """
    dtype, x = x.dtype, precise(x)
    noise = noise or (lambda step: torch.randn_like(x))
    sigmas = path_coefficients(torch.tensor(times, dtype=torch.float64), path)[1].tolist()
    for step, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t).to(x)
        drift = v + expected_noise(v, x, t, path)                                    # v - w/2 s
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * sigmas[step] * (t - t_next)) * noise(step).to(x)   # sqrt(w |dt|) n
    return x.to(dtype)


# The names of --sampler. A model's class has this table as `samplers`.
SAMPLERS = {"euler-maruyama": euler_maruyama, "euler": euler, "heun": heun}


# ------------------------------------------------ guidance ------------------------------------------------

def call(model, x: Tensor, t: float, y: Tensor, **more) -> Tensor:
    """The model's velocity of state x (B, L, C) at one time t with labels y (B,), in x's dtype.

    more: further inputs of the model, one float each for the whole batch. The model is called in the widest
    dtype of its weights: matrices may be bfloat16 beside float32 norms (runtime.processes.cast_matrices).
    """
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    fill = lambda value: torch.full((len(x),), value, dtype=torch.float32, device=x.device)
    return model(x.to(dtype), fill(t), y, **{name: fill(value) for name, value in more.items()}).to(x.dtype)


def inside(t: float, interval: tuple) -> bool:
    """Whether guidance acts at time t: interval = (low, high), both ends included."""
    # 1e-6: a sampler's times are rounded, and 0.7000000000000001 is still the end of [0, 0.7].
    return interval[0] - 1e-6 <= t <= interval[1] + 1e-6


def guided_velocity(model, y: Tensor, cfg_scale: float = 1.0, interval: tuple = (0.0, 1.0)):
    """A sampler's velocity: classifier-free guidance in an interval of times.                     [App. C.2]

        u + cfg_scale (c - u)

    c and u are the model's velocities with the labels y (B,) and with the null class; all channels are guided
    [released code]. Outside the interval it is c [App. C.2, after Kynkäänniemi et al. 2024: guidance of the
    noisiest states costs variety]. u is computed only where it is needed, with c as one batch of 2B. The main
    results of SiT-XL: scale 1.9 in [0, 0.75] at 256 px, 1.5 in [0, 0.7] at 512 px [App. C.2].
    """
    null_class = model.config.num_classes
    if null_class == 0 and cfg_scale != 1:
        raise UserError("--cfg: an unconditional model cannot be guided")                   # its c is u
    null = torch.full_like(y, null_class)

    def velocity(x, t, **more):
        if cfg_scale == 1 or not inside(t, interval):
            return call(model, x, t, y, **more)
        c, u = call(model, torch.cat((x, x)), t, torch.cat((y, null)), **more).chunk(2)
        return u + cfg_scale * (c - u)

    return velocity


def check_guidance(model, cfg_scale: float, interval=(0.0, 1.0)) -> None:
    """Raises UserError for a scale that the model cannot be guided with: its velocity() refuses it; or for an
    interval that is none."""
    if interval[0] > interval[1]:
        raise UserError("--cfg-interval LOW HIGH must satisfy LOW <= HIGH")
    model.velocity(torch.zeros(1, dtype=torch.int64), cfg_scale)


# ------------------------------------------- drawing samples -------------------------------------------

def choose_labels(num, classes, num_classes, kind, seed):
    """The class of every sample, (num,) int64: balanced (each of `classes` in turn) or random (drawn from
    seed and i); for classes ["null"] the null class, as of an unconditional model [Table 5]."""
    if num_classes == 0 and classes and classes != ["null"]:
        raise UserError("--classes: this model was trained without classes; leave the option out")
    if num_classes == 0 or classes == ["null"]:
        return np.full(num, num_classes)                                          # files get -1, no class
    if classes and "null" in classes:
        raise UserError("--classes null cannot be joined with other classes: draw those by another command")
    classes = np.asarray(classes if classes else range(num_classes))
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"--classes must lie in 0..{num_classes - 1}, the classes of this model")
    if kind == "balanced":
        return classes[np.arange(num) % len(classes)]
    return np.array([classes[sample_rng(seed, "sample-label", 0, i).integers(len(classes))]
                     for i in range(num)])


def state_times(model, sampler: str, steps: int) -> list[float]:
    """The times of a sampler's states, from 1 to 0."""
    return model.times(steps, LAST if sampler == "euler-maruyama" else None)


def sample_latents(model, indices, labels, seed, cfg_scale=1.0, interval=(0.0, 1.0), sampler="euler-maruyama",
                   steps=250, path="linear", trajectory=None):
    """Normalised latents (B, L, C) of the samples with these indices and labels (both (B,) ints).

    All noise of sample i, the start and every Euler-Maruyama step, comes from its own generator (seed, i).
    The model says how it is sampled: SiT.velocity, SiT.times and SiT.samplers. trajectory: a list, to which
    (t, state) of each call of the velocity is appended, and then the result.
    """
    device, shape = next(model.parameters()).device, (model.config.num_latents, model.config.latent_dim)
    rngs = [sample_rng(seed, "sample", 0, int(i)) for i in indices]
    draw = lambda: to_device(standard_normal(rngs, shape), device)
    velocity = model.velocity(torch.as_tensor(labels, device=device), cfg_scale, interval)
    noted = lambda x, t, **more: trajectory.append((t, x.float())) or velocity(x, t, **more)
    options = dict(noise=lambda step: draw(), path=path) if sampler == "euler-maruyama" else {}
    x = model.samplers[sampler](velocity if trajectory is None else noted, draw(),
                                state_times(model, sampler, steps), **options)
    if trajectory is not None:
        trajectory.append((0.0, x))
    return x
