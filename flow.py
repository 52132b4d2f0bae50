"""Between noise and latents: paths and objective, samplers, guidance.           [Sec. 4.1, Table 8, App. C.2]

    training   latents x, noise eps, time t --interpolate--> x_t, v;
               the model learns v(x_t, t, class) by squared error
    sampling   noise x_1 --euler_maruyama, 250 calls of the model--> x_0,
               normalised latents --MAETok.decode--> images

SiT's objective and samplers (Ma et al. 2024, arXiv:2401.08740), shared by SiT, LightningDiT and USiT.

Time runs from data to noise everywhere: DATA AT t = 0, NOISE AT t = 1. Samplers go from 1 down to 0.

Shape legend, the same in every file: B batch · L latent tokens · C latent channels
A label y is an int64 in [0, num_classes]; num_classes itself is the null class,
which stands for "no class given".

Provenance tags: [Sec. 4.1], [Table 8] the paper (arXiv:2502.03444v2) · [SiT] its diffusion model's paper ·
[released code] what only the authors' code shows · [ours] all are silent.
"""
import functools
import math

import numpy as np
import torch
from torch import Tensor

import common
from after.time_shift import shift_of, shift_times
from common import UserError, sample_rng

# ------------------------------------------- paths and objective -------------------------------------------
# A path mixes data x and noise eps:  x_t = alpha x + sigma eps,  with alpha, sigma = 1, 0 at t = 0 and
# 0, 1 at t = 1. Its velocity, dx_t/dt for a fixed pair:  v = alpha' x + sigma' eps.  The model learns
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
    """x, noise eps (B, L, C) and times t (B,) -> state x_t and its velocity v, (B, L, C) each: training's
    input and target. [SiT's, whose training the paper follows, Sec. 4.1]"""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t[:, None, None], path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of the velocity: (B, L, C) -> (B,) float32, one mean per sample,
    for a trainer to sort by t.
    """
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
    """Labels (B,) int64 with some replaced by the null class,
    so that one model learns both halves of guidance.

    rngs: one numpy Generator per sample. null_class: the model's num_classes. probability: 0.1 [SiT]; 1 drops
    them all, which is how an unconditional model is trained [Table 5].
    """
    dropped = torch.tensor([rng.random() < probability for rng in rngs], dtype=torch.bool, device=y.device)
    return torch.where(dropped, null_class, y)


def expected_noise(v: Tensor, x: Tensor, t: Tensor | float, path: str = "linear") -> Tensor:
    """E[eps | x_t], (B, L, C), from the velocity.

    x_t = alpha x + sigma eps and v = alpha' x + sigma' eps are two equations in x and eps, and expectations
    obey them too. Their determinant  alpha sigma' - alpha' sigma  is 1 on the linear path and pi/2 on the
    cosine path, never 0.
    v, x: (B, L, C), x being x_t. t: a float or (B,).
    """
    # A float stays on the CPU, a scalar that kernels take by value: sent to a GPU,
    # the host would wait for it.
    t = t.to(x).reshape(-1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=x.dtype)
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    return (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)


def score_from_velocity(v: Tensor, x: Tensor, t: Tensor | float, path: str = "linear") -> Tensor:
    """The score of x_t, the gradient of the logarithm of its density:  s = -E[eps | x_t] / sigma.
    [SiT, Sec. 2]

    For given data, x_t is a Gaussian of deviation sigma, with the score
    -(x_t - alpha x) / sigma^2 = -eps / sigma; and the score of a mixture is the expectation over its parts.
    On the linear path that is  -(x_t + (1 - t) v) / t.
    As t -> 0 it grows like 1/sigma, and at t = 0 there is none: raises ValueError. Samplers need not go
    there: they use sigma s = -E[eps | x_t],  which is finite at all times.
    v, x, t, path: as expected_noise's.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
    if (t <= 0).any():
        raise ValueError("the score does not exist at t = 0, where the state is data without noise")
    return -expected_noise(v, x, t, path) / path_coefficients(t, path)[1]


# ------------------------------------------------ samplers ------------------------------------------------
# From noise at t = 1 to data at t = 0. All take
#   velocity     a callable: state (B, L, C), t (a float) -> (B, L, C) in any float dtype;
#                guided_velocity makes one
#   x            (B, L, C), standard normal noise
#   shift        of the times, see after/time_shift.py; 1: none
#   trajectory   a list, to which (t, state) is appended at the start and after every step; None: not kept
# and return the state at t = 0 in x's dtype. On the way it is float64 [released code]: hundreds of small
# additions to a 16-bit state would round off most of each.

LAST = 0.04              # where Euler-Maruyama's last step starts [released code]


def _state(x):
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)     # Apple GPUs have no float64


def _times(steps, last=None, shift=1.0):
    """steps + 1 times from 1 to 0, equally spaced, or with `last` as the one before 0 and
    equal spacing up to it; then shifted, but for `last`."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    if last is None:
        return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    times = torch.linspace(1, shift_times(last, 1 / shift), steps, dtype=torch.float64)
    return [*shift_times(times, shift).tolist(), 0.0]


def _keep(trajectory, t, x, dtype):
    if trajectory is not None:
        trajectory.append((t, x.to(dtype)))


@torch.no_grad()
def euler(velocity, x: Tensor, steps: int = 250, trajectory: list | None = None, shift: float = 1.0,
          average: bool = False) -> Tensor:
    """Euler's method for the ODE dx/dt = v: one call a step, an error of first order in the step's length.

    average: the velocity is asked for its mean over each step,
    which leaves no such error (after/mean_flow.py).
    """
    dtype, x, times = x.dtype, _state(x), _times(steps, shift=shift)
    _keep(trajectory, 1.0, x, dtype)
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, t, **({"span": t - t_next} if average else {})).to(x)
        _keep(trajectory, t_next, x, dtype)
    return x.to(dtype)


@torch.no_grad()
def heun(velocity, x: Tensor, steps: int = 125, trajectory: list | None = None, decide: str = "call",
         shift: float = 1.0) -> Tensor:
    """Heun's method for the ODE dx/dt = v: an Euler step, then again with the mean of the
    velocities at its two ends.

    An error of second order for 2 * steps - 1 calls: the default costs what 250 Euler steps do. The last step
    is an Euler step, as in Karras et al. (2022), and lands on the expected data: v at t = 0 takes its state
    for data and would leave half of the noise that is still there. One step of first order among many leaves
    the whole at second.
    decide: where guidance has an interval, "call" asks at each call's own time whether it holds
    [ours], "step" once at the start of a step for both of its calls [released code]; velocity is
    then guided_velocity's.
    """
    dtype, x, times = x.dtype, _state(x), _times(steps, shift=shift)
    _keep(trajectory, 1.0, x, dtype)
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t).to(x)
        if t_next > 0:
            asked = {"start": t} if decide == "step" else {}
            v = (v + velocity(x + (t_next - t) * v, t_next, **asked).to(x)) / 2
        x = x + (t_next - t) * v
        _keep(trajectory, t_next, x, dtype)
    return x.to(dtype)


@torch.no_grad()
def euler_maruyama(velocity, x: Tensor, steps: int = 250, noise=None, last: float = LAST,
                   path: str = "linear", generator=None, trajectory: list | None = None,
                   diffusion: str = "sigma", shift: float = 1.0) -> Tensor:
    """The Euler-Maruyama method for SiT's reverse SDE; the paper's sampler [Table 8].

        dx = (v - w/2 s) dt + sqrt(w) dW,  t falling from 1:
        x_t is distributed as the ODE's for any w(t) >= 0 [SiT]

    diffusion "sigma": w = 2 sigma(t) [ours], "t": w = 2t whatever the path [released code]; on the
    linear path both are 2t. As s is -E[eps|x_t] / sigma, the drift v - w/2 s is v + w/(2 sigma)
    E[eps|x_t]: for "sigma" nothing is divided by a small number, and for "t" on the cosine path
    t / sigma is within [2/pi, 1].
    `steps` calls, at linspace(1, last, steps). The step from `last` to 0 adds no noise, since none after it
    could take that away; it uses the SDE's drift over its whole length, so `last` must be small beside the
    data's spread [released code].
    noise: a callable, step 0 ... steps - 2 -> (B, L, C) standard normal, with which each sample can have its
    own stream and come out the same in any batch. None: torch's, from `generator`.
    Raises ValueError for steps < 1, last outside (0, 1) or another diffusion.
    """
    if diffusion not in ("sigma", "t"):
        raise ValueError(f"diffusion is {diffusion!r}: choose sigma or t")
    if not 0 < last < 1:
        raise ValueError(f"last is {last}: the last step starts between 0 and 1")
    dtype, x, times = x.dtype, _state(x), _times(steps, last, shift)
    if noise is None:
        device = generator.device if generator else x.device
        noise = lambda step: torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    sigmas = path_coefficients(torch.tensor(times, dtype=torch.float64), path)[1].tolist()
    _keep(trajectory, 1.0, x, dtype)
    for step, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t).to(x)
        half_w = sigmas[step] if diffusion == "sigma" else t                         # w / 2
        drift = v + half_w / sigmas[step] * expected_noise(v, x, t, path)           # v - w/2 * score
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * half_w * (t - t_next)) * noise(step).to(x)
        _keep(trajectory, t_next, x, dtype)
    return x.to(dtype)


# ------------------------------------------------ guidance ------------------------------------------------

def guidance_free_mixture(model, prediction: Tensor, x_t: Tensor, t: Tensor, y: Tensor,
                          beta: Tensor) -> Tensor:
    """Guidance-free training: beta v(x_t, c, beta) + (1 - beta) sg[v(x_t, null, 1)], (B, L, C), which takes
    the prediction's place in every loss.

    In expectation it must be the conditional velocity c, so the model itself tends to
    u + (c - u) / beta: the velocity guided by 1 / beta, u being its own unconditional one (sg: no
    gradient).
    Sampling then needs one call where classifier-free guidance needs two.  [rebuttal; Chen et al. 2025]
    model: for v(., null, 1). prediction: v(x_t, c, beta) with gradient. beta (B,): uniform in [0, 1], and 1
    where the label was dropped, which trains u by the plain loss.
    """
    with torch.no_grad():
        u = model(x_t, t, torch.full_like(y, model.config.num_classes))
    b = beta[:, None, None]
    return b * prediction.float() + (1 - b) * u.float()


def guided_velocity(model, y: Tensor, cfg_scale: float = 1.0, interval: tuple = (0.0, 1.0), guide=None):
    """A sampler's velocity: classifier-free guidance in an interval of times,
    u + cfg_scale (c - u). [App. C.2]

    c and u are the velocities with the labels y (B,) and with the null class; all channels are guided
    [released code].
    interval: (low, high), noise at 1, both ends included; outside it c is used as it is [App. C.2, after
    Kynkäänniemi et al. 2024: guiding the noisiest states costs variety]. Where c is used as it is, and at
    scale 1 everywhere, u is not computed; elsewhere c and u are one batch of 2B. SiT-XL's main results: 250
    steps, scale 1.9 in [0, 0.75] at 256 px, 1.5 in [0, 0.7] at 512 px [App. C.2]. The model is called in its
    weights' dtype; the two velocities are combined in the state's.

    Two other schemes on the same line, with their own u:
    autoguidance (Karras et al. 2024): u is the velocity of `guide`, a worse model of the same latents, such
    as an earlier checkpoint, with the same labels [rebuttal: 1 M of 4 M steps].
    guidance-free training: a model with config.guidance_free is told 1 / cfg_scale and returns the guided
    velocity from one call.
    Raises ValueError for an unconditional model with a scale other than 1: its c is u.
    """
    (low, high), null_class = interval, model.config.num_classes
    if null_class == 0 and cfg_scale != 1 and guide is None:
        raise ValueError("an unconditional model cannot be guided: leave cfg_scale at 1")
    if model.config.guidance_free and cfg_scale < 1:
        raise ValueError("a model of guidance-free training knows guidance scales from 1 on")
    # The widest of the weights' types: matrices may be bfloat16 beside float32 norms (common.cast_matrices).
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    null = torch.full_like(y, null_class)

    def velocity(x, t, start=None, span=None):
        # 1e-6: a sampler's times are rounded, and 0.7000000000000001 still is the end of [0, 0.7].
        guided = cfg_scale != 1 and low - 1e-6 <= (t if start is None else start) <= high + 1e-6
        if model.config.guidance_free or guide is not None:
            times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            if guide is None:
                beta = torch.full_like(times, 1 / cfg_scale if guided else 1.0)
                return model(x.to(dtype), times, y, beta).to(x.dtype)
            c = model(x.to(dtype), times, y).to(x.dtype)
            if not guided:
                return c
            u = guide(x.to(dtype), times, y).to(x.dtype)
            return u + cfg_scale * (c - u)
        inputs, labels = (torch.cat((x, x)), torch.cat((y, null))) if guided else (x, y)
        times = torch.full((len(inputs),), t, dtype=torch.float32, device=x.device)
        more = {} if span is None else {"span": torch.full_like(times, span)}
        v = model(inputs.to(dtype), times, labels, **more).to(x.dtype)
        if not guided:
            return v
        c, u = v.chunk(2)
        return u + cfg_scale * (c - u)

    return velocity


# ------------------------------------------- drawing samples -------------------------------------------

SAMPLERS = ("euler-maruyama", "euler", "heun")


def choose_labels(num, classes, num_classes, kind, seed):
    """The class of every sample, (num,) int64: balanced (each of `classes` in turn) or random (drawn from
    seed and i); for classes ["null"] the null class, as of an unconditional model [Table 5]."""
    if num_classes == 0 or classes == ["null"]:
        return np.full(num, num_classes)                                          # files get -1, no class
    if classes and "null" in classes:
        raise UserError("--classes null stands alone: other classes are drawn by another command")
    classes = np.asarray(classes if classes else range(num_classes))
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"--classes must lie in 0..{num_classes - 1}, the classes of this model")
    if kind == "balanced":
        return classes[np.arange(num) % len(classes)]
    return np.array([classes[sample_rng(seed, "sample-label", 0, i).integers(len(classes))]
                     for i in range(num)])


def sampling_times(sampler: str, steps: int, shift: float = 1.0) -> list[float]:
    """The times at which a sampler calls the velocity, in order."""
    if sampler == "euler-maruyama":
        return _times(steps, LAST, shift)[:-1]
    times = _times(steps, shift=shift)
    return times[:-1] if sampler == "euler" else [t for pair in zip(times, times[1:]) for t in pair][:-1]


def sample_latents(model, indices, labels, seed, cfg_scale=1.0, interval=(0.0, 1.0), sampler="euler-maruyama",
                   steps=250, path="linear", trajectory=None, guide=None, as_released=False, shift=None):
    """Normalised latents (B, L, C) of the samples with these indices and labels (both (B,) ints).
    guide: the worse model of autoguidance, see guided_velocity. as_released: Euler-Maruyama with w = 2t on
    any path and Heun deciding on guidance once a step, as the authors' code samples. shift: of the times;
    None: as the model was trained.

    All noise of sample i, the start and every Euler-Maruyama step, comes from its own generator (seed, i).
    """
    device, shape = next(model.parameters()).device, (model.config.num_latents, model.config.latent_dim)
    rngs = [sample_rng(seed, "sample", 0, int(i)) for i in indices]
    # By way of pinned memory: a plain copy would make the host wait for the GPU in every step.
    draw = lambda: common.to_device(torch.from_numpy(
        np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])), device)
    velocity = guided_velocity(model, torch.as_tensor(labels, device=device), cfg_scale, interval, guide)
    options = dict(trajectory=trajectory, shift=shift or shift_of(model.config))
    if sampler == "euler-maruyama":
        return euler_maruyama(velocity, draw(), steps, noise=lambda step: draw(), path=path,
                              diffusion="t" if as_released else "sigma", **options)
    if sampler == "heun":
        return heun(velocity, draw(), steps, decide="step" if as_released else "call", **options)
    return euler(velocity, draw(), steps, **options, average=bool(model.config.mean_flow) and guide is None)


def check_guidance(model, scale, guide=None):
    """Refuse scales and schemes that a model cannot do. Raises UserError."""
    if scale != 1 and model.config.num_classes == 0 and guide is None:
        raise UserError("--cfg: an unconditional model cannot be guided")
    if model.config.guidance_free and (scale < 1 or guide is not None):
        raise UserError("a model of guidance-free training takes --cfg from 1 on, and no --guide-ckpt")
