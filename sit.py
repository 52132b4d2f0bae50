"""SiT, the diffusion model: noise and a class -> latent tokens (B, L, C).                 [Sec. 4.1, Table 8]

    training   latents x, noise eps, time t --interpolate--> x_t, v;
               SiT(x_t, t, class) learns v by squared error
    sampling   noise x_1 --euler_maruyama, 250 calls of SiT--> x_0,
               normalised latents --MAETok.decode--> images

The architecture and the objective are SiT's (Ma et al. 2024, arXiv:2401.08740): a DiT, here with patch size 1
on a 1D sequence of tokens. In order of use: the transformer, the paths between data and noise,
the samplers, guidance.

Time runs from data to noise everywhere: DATA AT t = 0, NOISE AT t = 1. Samplers go from 1 down to 0.

Shape legend, the same in every file:
    B batch · L latent tokens · C latent channels · D width · nh heads · hs head size
A label y is an int64 in [0, num_classes]; num_classes itself is the null class,
which stands for "no class given".

Provenance tags: [Sec. 4.1], [Table 8] the paper (arXiv:2502.03444v2) · [SiT] its diffusion model's paper ·
[released code] what only the authors' code shows · [ours] all are silent.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import Count, Linear, Positive, Whole, check_ranges


@dataclass
class SiTConfig:
    """Everything that fixes the weights' shapes. The defaults are SiT-XL/1 on MAETok's latents [Table 8].

    Raises ValueError for values that cannot make a model.
    """
    # ---- diffusion model (SiTConfig in sit.py) ----
    num_latents: Count = 128     # L, the tokenizer's
    latent_dim: Count = 32       # C, the tokenizer's
    width: Count = 1152          # D [Table 8]
    heads: Count = 16            # nh [Table 8]
    depth: Count = 28            # blocks [Table 8]
    mlp_ratio: Positive = 4.0    # hidden width of the MLP / D
    num_classes: Whole = 1000    # the null class comes on top; 0: unconditional, it is the only one [Table 5]
    guidance_free: bool = False  # guidance-free training: the model is told 1 / guidance scale and learns the
                                 # guided velocity itself [rebuttal; Chen et al. 2025]; not with usit

    def __post_init__(self):
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided over {self.heads} heads")
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd: positions are pairs of a sine and a cosine")


# The sizes of DiT and SiT, to be spread into a config: SiTConfig(**SIZES["L"]).                         [SiT]
SIZES = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),       # 458 M, the ablations [Sec. 4.1]
    "XL": dict(width=1152, depth=28, heads=16),      # 675 M, the main results [Table 8]
}


# ----------------------------------------------- conditioning -----------------------------------------------

def position_table(length, width):
    """Fixed 1D positions [Table 8 "1D sinusoidal"]: (1, L, D) float32.

    Channels 2i and 2i+1 are sine and cosine of position * 10000^(-2i/D): neighbours,
    not halves [released code].
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)                # (D/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency                          # (L, D/2)
    return torch.stack((angle.sin(), angle.cos()), -1).reshape(1, length, width).float()


def time_features(t, size=256):
    """t (B,) -> (B, size) float32: the cosines of t * 10000^(-i/(size/2)), then the sines.

    t goes in as it is, in [0, 1]. The frequencies were made for step numbers up to 1000, so only the first
    few features move much; the weights learned with it leave no choice [released code]. Angles are float32
    under any autocast: just below t = 1 bfloat16's spacing is 1/256, about the length of one of 250 sampling
    steps, so neighbouring steps would be rounded to the same time, or to two that are twice as far apart.
    """
    frequency = torch.exp(-math.log(10000) / (size // 2) * torch.arange(size // 2, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1] -> (B, D): 256 features and an MLP of two layers."""

    def __init__(self, width, features=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(time_features(t, self.mlp[0].in_features).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class (B,) -> (B, D). The last row is the null class; drop_labels says when it is trained."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


# ----------------------------------------------- transformer -----------------------------------------------
# Modules carry the names of the released checkpoints: their weights load as they are,
# less the stored `pos_embed`.

def modulate(x, shift, scale):
    """Adaptive LayerNorm's second half: x (B, L, D), shift and scale (B, 1, D).
    Unlike MAETok's decoder, 1 + scale."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention; positions are in the tokens already."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (B, nh, L, hs)
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, nh, L, hs)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two layers with the tanh form of GELU between them [SiT]."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block, modulated by the condition c: shift and scale after each norm,
    a gate on each branch (adaLN-zero).

    The layer that makes them starts at zero, so the gates are 0 and a new block returns its input [SiT].
    """

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """x (B, L, D), c (B, D) -> (B, L, D)."""
        # each (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """The last norm, modulated by c, and the layer back to latent channels: (B, L, D) -> (B, L, C)."""

    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)                         # each (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity of the latents, given their noisy state, the time and the class.
    See SiTConfig for the sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = nn.Linear(c.latent_dim, c.width)       # patch size 1: a token is a patch [Sec. 4.1]
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.beta_embedder = TimestepEmbedder(c.width) if c.guidance_free else None
        self.register_buffer("pos_embed", position_table(c.num_latents, c.width), persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.latent_dim)
        self._init_weights()

    def _init_weights(self):                                         # [SiT], which takes it from DiT
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        # adaLN-zero: blocks start as the identity and the output as 0: the loss
        # starts at E|v|^2 whatever the depth.
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks),
                      self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y, beta=None, hidden_after=0):
        """x (B, L, C) state in the weights' dtype, t (B,) float in [0, 1],
        y (B,) int64 class -> velocity (B, L, C).

        beta: (B,) float in [0, 1], 1 / guidance scale, for a model of guidance-free training; None: 1.
        hidden_after: k > 0 returns (velocity, tokens after k blocks (B, L, D)), which REPA trains on.
        Raises ValueError when x is not (B, num_latents, latent_dim): one token
        would silently take every position.
        """
        if x.shape[1:] != (self.config.num_latents, self.config.latent_dim):
            raise ValueError(f"latents of shape {tuple(x.shape)} given to a model of "
                             f"{self.config.num_latents} tokens with {self.config.latent_dim} channels")
        c = self.t_embedder(t) + self.y_embedder(y)                                                # (B, D)
        if self.beta_embedder is not None:
            c = c + self.beta_embedder(torch.ones_like(t) if beta is None else beta)
        x = self.x_embedder(x) + self.pos_embed                                                    # (B, L, D)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if number == hidden_after:
                hidden = x
        v = self.final_layer(x, c)                                                                 # (B, L, C)
        return (v, hidden) if hidden_after else v


def sit_macs(config):
    """Multiply-accumulates (MACs) of one forward pass of one sample, an int.

    Counted: every linear layer, and attention's two products, queries with keys and weights with values. Not
    counted: softmax, norms, GELU, biases, modulation, sums, look-ups.
    One MAC is two FLOPs in the usual terms.
    SiT-XL/1 has 58.4 G at 128 tokens and 524.6 G at 1024, 9.0 times as many. The paper has 48.5 and 373.3
    "Gflops", 7.7 times, and does not say what it counts [Sec. 4.5];
    leaving attention's products out gives 57.3 and 456.9, 8.0 times.
    """
    L, C, D, hidden = (config.num_latents, config.latent_dim, config.width,
                       int(config.width * config.mlp_ratio))
    block = L * (3 * D * D + D * D + 2 * D * hidden)     # qkv, proj, MLP
    block += 2 * L * L * D                               # q k^T and weights v, all heads together
    block += 6 * D * D                                   # adaLN: once a sample, not once a token
    # x_embedder, t_embedder, the last adaLN, linear
    ends = L * C * D + (256 * D + D * D) + 2 * D * D + L * D * C
    return config.depth * block + ends


# ------------------------------------------- paths and objective -------------------------------------------
# A path mixes data x and noise eps:  x_t = alpha x + sigma eps,  with
# alpha, sigma = 1, 0 at t = 0 and 0, 1 at t = 1.
# Its velocity, dx_t/dt for a fixed pair:  v = alpha' x + sigma' eps.  The model learns E[v | x_t].
# [SiT, Sec. 2]

def path_coefficients(t, path="linear"):
    """alpha, sigma, alpha', sigma' at times t, a float tensor of any shape: four tensors like t.

    path: "linear", the usual one, or "cosine", which SiT calls GVP [SiT]. Raises ValueError for others.
    """
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        h = math.pi / 2
        return torch.cos(h * t), torch.sin(h * t), -h * torch.sin(h * t), h * torch.cos(h * t)
    raise ValueError(f"path is {path!r}: choose linear or cosine")


def interpolate(x, noise, t, path="linear"):
    """Training's input and target: x, noise (B, L, C) and t (B,) -> state x_t and velocity v, (B, L, C) each.
    """
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t[:, None, None], path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def flow_matching_loss(prediction, target):
    """Squared error of the velocity: (B, L, C) -> (B,) float32, one mean a sample,
    for a trainer to sort by t."""
    return (prediction.float() - target.float()).square().mean((1, 2))


def sample_times(rngs, kind="uniform", path="linear"):
    """Training times, (B,) float32 on the CPU, from one numpy Generator a sample:
    independent of batch and process.

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


def drop_labels(rngs, y, null_class, probability=0.1):
    """Labels (B,) int64 with some replaced by the null class,
    so that one model learns both halves of guidance.

    rngs: one numpy Generator a sample. null_class: the model's num_classes. probability: 0.1 [SiT]; 1 drops
    them all, which is how an unconditional model is trained [Table 5].
    """
    dropped = torch.tensor([rng.random() < probability for rng in rngs], dtype=torch.bool, device=y.device)
    return torch.where(dropped, null_class, y)


def expected_noise(v, x, t, path="linear"):
    """E[eps | x_t], (B, L, C), from the velocity.

    x_t = alpha x + sigma eps and v = alpha' x + sigma' eps are two equations in x and eps, and expectations
    obey them too. Their determinant  alpha sigma' - alpha' sigma  is 1 on the linear path and pi/2 on the
    cosine path, never 0.
    v, x: (B, L, C), x being x_t. t: a float or (B,).
    """
    # A float stays on the CPU, a scalar that kernels take by value: sent to a GPU, the host would wait for it.
    t = t.to(x).reshape(-1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=x.dtype)
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    return (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)


def score_from_velocity(v, x, t, path="linear"):
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
#   trajectory   a list, to which (t, state) is appended at the start and after every step; None: not kept
# and return the state at t = 0 in x's dtype. On the way it is float64 [released code]: hundreds of small
# additions to a 16-bit state would round off most of each.

def _state(x):
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)     # Apple GPUs have no float64


def _times(steps, last=None):
    """steps + 1 times from 1 to 0, equally spaced, or with `last` as the one before 0
    and equal spacing up to it."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    if last is None:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return [*torch.linspace(1, last, steps, dtype=torch.float64).tolist(), 0.0]


def _keep(trajectory, t, x, dtype):
    if trajectory is not None:
        trajectory.append((t, x.to(dtype)))


@torch.no_grad()
def euler(velocity, x, steps=250, trajectory=None):
    """Euler's method for the ODE dx/dt = v: one call a step, an error of first order in the step's length."""
    dtype, x, times = x.dtype, _state(x), _times(steps)
    _keep(trajectory, 1.0, x, dtype)
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, t).to(x)
        _keep(trajectory, t_next, x, dtype)
    return x.to(dtype)


@torch.no_grad()
def heun(velocity, x, steps=125, trajectory=None, decide="call"):
    """Heun's method for the ODE dx/dt = v: an Euler step,
    then again with the mean of the velocities at its two ends.

    An error of second order for 2 * steps - 1 calls: the default costs what 250 Euler steps do. The last step
    is an Euler step, as in Karras et al. (2022), and lands on the expected data: v at t = 0 takes its state
    for data and would leave half of the noise that is still there.
    One step of first order among many leaves the whole at second.
    decide: where guidance has an interval, "call" asks at each call's own time whether it holds [ours], "step"
    once at the start of a step for both of its calls [released code]; velocity is then guided_velocity's.
    """
    dtype, x, times = x.dtype, _state(x), _times(steps)
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
def euler_maruyama(velocity, x, steps=250, noise=None, last=0.04, path="linear", generator=None,
                   trajectory=None, diffusion="sigma"):
    """The Euler-Maruyama method for SiT's reverse SDE; the paper's sampler [Table 8].

        dx = (v - w/2 s) dt + sqrt(w) dW,  t falling from 1:
        x_t is distributed as the ODE's for any w(t) >= 0 [SiT]

    diffusion "sigma": w = 2 sigma(t) [ours], "t": w = 2t whatever the path [released code]; on the linear path
    both are 2t. As s is -E[eps|x_t] / sigma, the drift v - w/2 s is v + w/(2 sigma) E[eps|x_t]: for "sigma"
    nothing is divided by a small number, and for "t" on the cosine path t / sigma is within [2/pi, 1].
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
    dtype, x, times = x.dtype, _state(x), _times(steps, last)
    if noise is None:
        device = generator.device if generator else x.device
        noise = lambda step: torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    sigmas = path_coefficients(torch.tensor(times, dtype=torch.float64), path)[1].tolist()
    _keep(trajectory, 1.0, x, dtype)
    for step, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t).to(x)
        half_w = sigmas[step] if diffusion == "sigma" else t
        drift = v + half_w / sigmas[step] * expected_noise(v, x, t, path)           # v - w/2 * score
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * half_w * (t - t_next)) * noise(step).to(x)
        _keep(trajectory, t_next, x, dtype)
    return x.to(dtype)


# ------------------------------------------------ guidance ------------------------------------------------

def guidance_free_mixture(model, prediction, x_t, t, y, beta):
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


def guided_velocity(model, y, cfg_scale=1.0, interval=(0.0, 1.0), guide=None):
    """A sampler's velocity from the model: classifier-free guidance, u + cfg_scale (c - u),
    for a span of times.

    Two other schemes on the same line, with their own u:
    autoguidance (Karras et al. 2024): u is the velocity of `guide`, a worse model of the same latents, such
    as an earlier checkpoint, with the same labels [rebuttal: 1 M of 4 M steps].
    guidance-free training: a model with config.guidance_free is told 1 / cfg_scale and returns the guided
    velocity from one call.

    c and u are the velocities with the labels y (B,) and with the null class;
    all channels are guided [released code].
    interval: (low, high), both ends included; outside it c is used as it is [App. C.2, after Kynkäänniemi et
    al. 2024: guiding the noisiest states costs variety]. Where c is used as it is, and at scale 1 everywhere,
    u is not computed; elsewhere c and u are one batch of 2B.
    SiT-XL's main results: 250 steps, scale 1.9 in [0, 0.75] at 256 px, 1.5 in [0, 0.7] at 512 px [App. C.2].
    The model is called in its weights' dtype; the two velocities are combined in the state's.
    Raises ValueError for an unconditional model with a scale other than 1: its c is u.
    """
    (low, high), null_class = interval, model.config.num_classes
    if null_class == 0 and cfg_scale != 1 and guide is None:
        raise ValueError("an unconditional model cannot be guided: leave cfg_scale at 1")
    if model.config.guidance_free and cfg_scale < 1:
        raise ValueError("a model of guidance-free training knows guidance scales from 1 on")
    dtype, null = next(model.parameters()).dtype, torch.full_like(y, null_class)

    def velocity(x, t, start=None):
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
        v = model(inputs.to(dtype), times, labels).to(x.dtype)
        if not guided:
            return v
        c, u = v.chunk(2)
        return u + cfg_scale * (c - u)

    return velocity
