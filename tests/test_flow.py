"""flow.py: paths, objective, guidance, and samplers held against distributions known in closed form.

The oracle of the samplers is data whose velocity can be written down: a Gaussian, and a mixture of four.
"""
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn

from variants.lightningdit import LightningDiT, LightningDiTConfig
from flow import (drop_labels, euler, euler_maruyama, flow_matching_loss, guidance_free_mixture,
                  guided_velocity, heun, interpolate, path_coefficients, sample_times, sampling_times,
                  score_from_velocity, expected_noise)
from sit import SiT, SiTConfig
from test_sit import TINY, randomised, tiny

PATHS = ("linear", "cosine")


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def test_an_unconditional_model_has_the_null_class_only():
    model = tiny(num_classes=0)
    assert model.y_embedder.embedding_table.weight.shape == (1, 32)
    y = drop_labels(rngs(4), torch.tensor([3, 1, 4, 1]), null_class=0, probability=1.0)
    assert torch.equal(y, torch.zeros(4, dtype=torch.int64))
    samples = euler(guided_velocity(model, y), torch.randn(4, 5, 6), steps=3)
    assert samples.shape == (4, 5, 6) and samples.isfinite().all()
    with pytest.raises(ValueError, match="unconditional"):
        guided_velocity(model, y, cfg_scale=1.5)


# ------------------------------------------- paths and objective -------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_coefficients_and_their_derivatives(path):
    t = torch.tensor([[0.0, 0.2], [0.7, 1.0]], dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        assert value.shape == derivative.shape == t.shape
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)
    alpha, sigma = alpha.detach(), sigma.detach()
    ends = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((alpha.flatten()[[0, 3]], sigma.flatten()[[0, 3]])), ends)
    torch.testing.assert_close(alpha + sigma if path == "linear" else alpha ** 2 + sigma ** 2,
                               torch.ones_like(alpha))


@pytest.mark.parametrize("path", PATHS)
def test_paths_go_from_data_at_0_to_noise_at_1_with_these_derivatives(path):
    x, noise = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(interpolate(x, noise, torch.zeros(2, dtype=torch.float64), path)[0], x)
    torch.testing.assert_close(interpolate(x, noise, torch.ones(2, dtype=torch.float64), path)[0], noise)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    # (2, 5, 6, 2)
    jacobian = torch.autograd.functional.jacobian(lambda t: interpolate(x, noise, t, path)[0], t)
    derivative = torch.stack([jacobian[b, :, :, b] for b in range(2)])
    torch.testing.assert_close(interpolate(x, noise, t, path)[1], derivative)
    alpha, sigma, *_ = path_coefficients(t, path)
    torch.testing.assert_close(alpha + sigma if path == "linear" else alpha ** 2 + sigma ** 2,
                               torch.ones_like(t))


@pytest.mark.parametrize("path", PATHS)
def test_expected_noise_inverts_interpolation(path):
    x, noise = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    state, v = interpolate(x, noise, t, path)
    torch.testing.assert_close(expected_noise(v, state, t, path), noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected_noise(v[1:2], state[1:2], 0.3, path), noise[1:2],
                               rtol=1e-4, atol=1e-5)


class GaussianMixture:
    """Data from sum_k weights[k] N(means[k], std^2 I) over (B, L, C) = (B, 1, C),
    and the exact velocity and score."""

    def __init__(self, weights, means, std, path):
        # (K,), (K, C)
        self.weights, self.means = torch.tensor(weights).double(), torch.tensor(means).double()
        self.std, self.path = std, path

    def coefficients(self, t):                  # written here again, so that a wrong path cannot hide in both
        if self.path == "linear":
            return 1 - t, t, -1.0, 1.0
        h = math.pi / 2
        return math.cos(h * t), math.sin(h * t), -h * math.sin(h * t), h * math.cos(h * t)

    def log_density(self, x, t):                     # (B, 1, C) -> (B,)
        alpha, sigma, *_ = self.coefficients(t)
        variance = (alpha * self.std) ** 2 + sigma ** 2
        squares = (x - alpha * self.means).square().sum(-1)                                         # (B, K)
        constant = 0.5 * x.shape[-1] * math.log(2 * math.pi * variance)
        return torch.logsumexp(self.weights.log() - squares / (2 * variance), -1) - constant

    def velocity(self, x, t):                        # (B, 1, C) -> (B, 1, C)
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        variance = (alpha * self.std) ** 2 + sigma ** 2
        away = x - alpha * self.means                                                              # (B, K, C)
        share = torch.softmax(self.weights.log() - away.square().sum(-1) / (2 * variance), -1)[..., None]
        # E[x | x_t]
        data = (share * (self.means + alpha * self.std ** 2 / variance * away)).sum(1, keepdim=True)
        noise = (share * sigma / variance * away).sum(1, keepdim=True)                          # E[eps | x_t]
        return d_alpha * data + d_sigma * noise


def gaussian(path):
    return GaussianMixture([1.0], [[1.5]], 0.5, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_score_is_the_gradient_of_the_log_density(path, t):
    x = torch.randn(20, 1, 2, dtype=torch.float64, requires_grad=True)
    modes = GaussianMixture([0.3, 0.7], [[1.0, 0.5], [-1.0, 0.2]], 0.4, path)
    gradient, = torch.autograd.grad(modes.log_density(x, t).sum(), x)
    score = score_from_velocity(modes.velocity(x, t), x, t, path)
    torch.testing.assert_close(score, gradient)
    torch.testing.assert_close(
        score_from_velocity(modes.velocity(x, t), x, torch.full((20,), t).double(), path), score)
    closed = gaussian(path)                                                # N(alpha m, alpha^2 s^2 + sigma^2)
    alpha, sigma, *_ = closed.coefficients(t)
    x = x.detach()[..., :1]
    torch.testing.assert_close(score_from_velocity(closed.velocity(x, t), x, t, path),
                               -(x - alpha * 1.5) / (alpha ** 2 * 0.25 + sigma ** 2))


def test_there_is_no_score_of_data_without_noise():
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match="t = 0"):
        score_from_velocity(x, x, 0.0)
    with pytest.raises(ValueError, match="t = 0"):
        score_from_velocity(x, x, torch.tensor([0.5, 0.0]))
    assert score_from_velocity(x, x, torch.tensor([0.5, 0.01])).isfinite().all()


def test_unknown_paths_and_times_are_refused():
    with pytest.raises(ValueError, match="linear or cosine"):
        path_coefficients(torch.zeros(1), "quadratic")
    with pytest.raises(ValueError, match="uniform or logit-normal"):
        sample_times(rngs(1), "normal")


def test_loss_is_one_mean_a_sample():
    prediction, target = torch.randn(3, 5, 6).bfloat16(), torch.randn(3, 5, 6)
    loss = flow_matching_loss(prediction, target)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    for b in range(3):
        assert loss[b].item() == pytest.approx(((prediction[b].float() - target[b]).numpy() ** 2).mean(),
                                               rel=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_training_times_have_the_distribution_they_are_named_after(kind):
    times = sample_times(rngs(3000), kind)
    assert times.dtype == torch.float32 and times.shape == (3000,) and 0 <= times.min() and times.max() <= 1
    uniform = scipy.stats.kstest(times.numpy(), "uniform").pvalue
    normal = scipy.stats.kstest(scipy.special.logit(times.double().numpy()), "norm").pvalue
    good, bad = (uniform, normal) if kind == "uniform" else (normal, uniform)
    assert good > 0.01 and bad < 1e-6
    # a sample's time is its generator's alone
    assert torch.equal(sample_times(rngs(3000)[7:9], kind), times[7:9])


@pytest.mark.slow
def test_euler_maruyama_as_released_takes_2t_on_the_cosine_path_too():
    """A naive loop by the score: drift v - t s, noise sqrt(2 t dt);
    on the linear path both choices are one."""
    def velocity(x, t):
        return torch.sin(3 * x) + t

    def naive(x, steps, path):
        times = [*np.linspace(1, 0.04, steps), 0.0]
        for step, (t, following) in enumerate(zip(times, times[1:])):
            v = velocity(x, t)
            x = x + (following - t) * (v - t * score_from_velocity(v, x, t, path))
            if following > 0:
                x = x + (2 * t * (t - following)) ** 0.5 * noise[step]
        return x

    start, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(9, 2, 3, 4, dtype=torch.float64)
    run = lambda path, kind: euler_maruyama(velocity, start, 10, noise=lambda step: noise[step], path=path,
                                            diffusion=kind)
    for path in ("linear", "cosine"):
        torch.testing.assert_close(run(path, "t"), naive(start, 10, path))
    torch.testing.assert_close(run("linear", "t"), run("linear", "sigma"))
    assert (run("cosine", "t") - run("cosine", "sigma")).abs().max() > 0.05
    with pytest.raises(ValueError, match="sigma or t"):
        run("linear", "2t")


def test_heun_decides_on_guidance_at_each_call_or_once_a_step():
    batches = []

    class Model(torch.nn.Linear):
        config = SiTConfig(num_latents=2, latent_dim=3, width=8, heads=2, depth=1, num_classes=4)

        def forward(self, x, t, y):
            batches.append((round(t[0].item(), 3), len(x)))
            return x

    velocity = guided_velocity(Model(1, 1), torch.tensor([1]), 2.0, (0.0, 0.5))
    for decide, doubled in (("call", [0.5, 0.5, 0.25, 0.25]), ("step", [0.5, 0.25, 0.25])):
        batches.clear()
        heun(velocity, torch.zeros(1, 2, 3), steps=4, decide=decide)
        assert [t for t, size in batches if size == 2] == doubled


def test_logit_normal_times_are_logit_normal_in_sigma_over_alpha_on_both_paths():
    for path in ("linear", "cosine"):
        t = sample_times(rngs(3000), "logit-normal", path).double()
        alpha, sigma, *_ = path_coefficients(t, path)
        n = (sigma / alpha).log()
        assert abs(n.mean()) < 0.06 and abs(n.std() - 1) < 0.05, path


def test_dropped_labels_become_the_null_class():
    y = torch.arange(3000) % 10
    dropped = drop_labels(rngs(3000), y, null_class=10)
    assert dropped.dtype == torch.int64 and abs((dropped == 10).float().mean() - 0.1) < 0.02
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(drop_labels(rngs(3000)[100:200], y[100:200], 10), dropped[100:200])
    assert torch.equal(drop_labels(rngs(3000), y, 10, probability=0.0), y)


# ------------------------------------------------ samplers ------------------------------------------------

def recorded(velocity, calls):
    def wrapped(x, t):
        calls.append((x.clone(), t))
        return velocity(x, t)
    return wrapped


SAMPLERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler, ratio", [(euler, 2), (heun, 4)])
def test_order_of_the_ode_samplers(sampler, ratio, path):
    # The exact flow of a Gaussian takes the noise x_1 to m + s x_1.
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1)
    samples = [sampler(gaussian(path).velocity, x, steps) for steps in (40, 80, 160)]
    error = [(sample - (1.5 + 0.5 * x)).abs().max().item() for sample in samples]
    assert error[0] < 0.1
    for coarse, fine in zip(error, error[1:]):
        assert 0.9 * ratio < coarse / fine < 1.1 * ratio


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name, options",
                         [("euler", {}), ("heun", {}), ("euler_maruyama", dict(steps=500, last=0.01))])
def test_samplers_reach_the_mean_and_variance_of_a_gaussian(name, options, path):
    x = torch.randn(20_000, 1, 1, dtype=torch.float64)
    if name == "euler_maruyama":
        options = options | dict(path=path, generator=torch.Generator().manual_seed(1))
    samples = SAMPLERS[name](gaussian(path).velocity, x, **options).flatten().numpy()
    assert abs(samples.mean() - 1.5) < 0.02                          # standard error 0.0035
    assert abs(samples.var() / 0.25 - 1) < 0.05                      # standard error 0.01
    assert scipy.stats.kstest((samples[:2000] - samples.mean()) / samples.std(), "norm").pvalue > 0.01
    if name == "euler_maruyama":                                     # noise is added: x alone does not decide
        assert abs(np.corrcoef(samples, x.flatten().numpy())[0, 1]) < 0.5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_modes_of_a_mixture_are_hit_in_the_right_proportions(name, path):
    weights, means = [0.1, 0.2, 0.3, 0.4], [[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]]
    modes = GaussianMixture(weights, means, 0.3, path)
    options = dict(path=path, generator=torch.Generator().manual_seed(1)) if name == "euler_maruyama" else {}
    samples = SAMPLERS[name](modes.velocity, torch.randn(6000, 1, 2, dtype=torch.float64), **options)
    nearest = (samples - modes.means).square().sum(-1).argmin(-1)                                   # (B,)
    for k in range(4):
        mine = samples[nearest == k, 0]
        assert abs(len(mine) / 6000 - weights[k]) < 0.025                     # standard error 0.006
        assert (mine.mean(0) - modes.means[k]).abs().max() < 0.08
        assert 0.22 < mine.std(0).mean() < 0.36


def test_euler_maruyama_is_the_documented_recipe_and_calls_the_model_n_times():
    target, calls, asked = gaussian("linear"), [], []
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    noises = torch.randn(9, 6, 1, 3, dtype=torch.float64)
    noise = lambda step: asked.append(step) or noises[step]
    ours = euler_maruyama(recorded(target.velocity, calls), x, 10, noise=noise)
    # d = v - w/2 s with w = 2t, and x += d dt + sqrt(2t) sqrt(|dt|) n; the last step, 0.04 to 0, without n.
    times = np.linspace(1, 0.04, 10)
    for step, t in enumerate(times):
        dt = (times[step + 1] if step < 9 else 0.0) - t
        v = target.velocity(x, t)
        score = -((1 - t) * v + x) / t
        x = x + (v - t * score) * dt
        if step < 9:
            x = x + math.sqrt(2 * t) * math.sqrt(abs(dt)) * noises[step]
    torch.testing.assert_close(ours, x)
    assert [t for _, t in calls] == pytest.approx(times) and asked == list(range(9))


def test_euler_maruyama_takes_250_steps_and_ends_without_noise():
    calls, asked, states = [], [], []
    still = lambda x, t: -x / (2 - t)                                    # the drift, (2 - t) v + x, is then 0
    euler_maruyama(recorded(still, calls), torch.zeros(1, 1, 1), trajectory=states,
                   noise=lambda step: asked.append(step) or torch.ones(1, 1, 1))
    assert len(calls) == 250 and calls[0][1] == 1.0 and calls[-1][1] == pytest.approx(0.04)
    assert asked == list(range(249))
    values = [x.item() for _, x in states]                               # 249 times upwards, then not
    assert (all(a < b for a, b in zip(values[:-1], values[1:-1]))
            and values[-1] == pytest.approx(values[-2], abs=1e-9))


@pytest.mark.parametrize("sampler, times", [(euler, [1.0, 0.75, 0.5, 0.25]),
                                            (heun, [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])])
def test_ode_samplers_call_at_evenly_spaced_times_from_1(sampler, times):
    calls = []
    sampler(recorded(lambda x, t: x, calls), torch.zeros(1, 1, 1), 4)
    assert [t for _, t in calls] == times
    calls.clear()
    sampler(recorded(lambda x, t: x, calls), torch.zeros(1, 1, 1))
    assert len(calls) == (250 if sampler is euler else 249)


@pytest.mark.parametrize("name", SAMPLERS)
def test_time_runs_from_noise_at_1_to_data_at_0(name):
    # All data is one point p: v = eps - p = (x - p) / t. Whatever the noise, the sample is p.
    p = torch.tensor([3.0, -1.0])
    options = dict(steps=200, last=1e-3) if name == "euler_maruyama" else dict(steps=20)
    velocity = lambda x, t: (x - p) / t
    calls = []
    sample = SAMPLERS[name](recorded(velocity, calls), torch.randn(5, 1, 2), **options)
    assert calls[0][1] == 1.0
    torch.testing.assert_close(sample, p.expand(5, 1, 2), rtol=0,
                               atol=0.1 if name == "euler_maruyama" else 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_is_float64_and_the_result_has_the_inputs_dtype(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        calls, states, x = [], [], torch.randn(2, 1, 3, dtype=dtype)
        result = SAMPLERS[name](recorded(lambda x, t: x.to(torch.bfloat16), calls), x, 3, trajectory=states)
        assert all(x.dtype == torch.float64 for x, _ in calls) and result.dtype == dtype
        assert all(x.dtype == dtype for _, x in states)


@pytest.mark.parametrize("name, times",
                         [("euler", [1, 0.75, 0.5, 0.25, 0]), ("heun", [1, 0.75, 0.5, 0.25, 0]),
                          ("euler_maruyama", [1, 0.68, 0.36, 0.04, 0])])
def test_trajectory_holds_every_state_from_noise_to_result(name, times):
    calls, states, x = [], [], torch.randn(2, 1, 3, dtype=torch.float64)
    result = SAMPLERS[name](recorded(gaussian("linear").velocity, calls), x, 4, trajectory=states)
    assert [t for t, _ in states] == pytest.approx(times)
    assert torch.equal(states[0][1], x) and torch.equal(states[-1][1], result)
    seen = calls[::2] if name == "heun" else calls                       # the state at the start of each step
    assert all(torch.equal(state, at) for (_, state), (at, _) in zip(states, seen))


def test_a_sample_does_not_depend_on_its_batch():
    x, noises = torch.randn(4, 1, 3), torch.randn(4, 10, 1, 3)
    velocity = gaussian("linear").velocity
    sample = lambda rows: euler_maruyama(velocity, x[rows], 10, noise=lambda step: noises[rows, step])
    assert torch.equal(sample(slice(0, 4))[2:3], sample(slice(2, 3)))
    run = lambda seed: euler_maruyama(velocity, x, 10, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_impossible_steps_are_refused():
    x = torch.zeros(1, 1, 1)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="at least one step"):
            sampler(lambda x, t: x, x, 0)
    for last in (0.0, 1.0):
        with pytest.raises(ValueError, match="last"):
            euler_maruyama(lambda x, t: x, x, 5, last=last)


# ------------------------------------------------ guidance ------------------------------------------------

class FakeModel(nn.Module):
    """Velocity = label + 1, as c would be (null class 10: 11), and a record of every call."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.config, self.weight, self.calls = (
            SiTConfig(**TINY), nn.Parameter(torch.zeros((), dtype=dtype)), [])

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return (y + 1).to(x.dtype)[:, None, None].expand_as(x)


X, Y = torch.randn(3, 5, 6, dtype=torch.float64), torch.tensor([2, 0, 7])


def test_guidance_extrapolates_from_the_null_class_in_one_batch():
    model = FakeModel()
    v = guided_velocity(model, Y, 1.9, (0.0, 0.75))(X, 0.5)
    c, u = Y.double() + 1, 11.0
    torch.testing.assert_close(v, (u + 1.9 * (c - u))[:, None, None].expand_as(X))
    (x, t, y), = model.calls
    assert torch.equal(x, torch.cat((X, X)).float()) and torch.equal(t, torch.full((6,), 0.5))
    assert y.tolist() == [2, 0, 7, 10, 10, 10]


@pytest.mark.parametrize("t, rows",
                         [(0.1999, 3), (0.2, 6), (0.5, 6), (0.75, 6), (0.7501, 3), (1.0, 3), (0.0, 3)])
def test_the_interval_includes_both_ends_and_saves_the_rest(t, rows):
    model = FakeModel()
    v = guided_velocity(model, Y, 2.0, (0.2, 0.75))(X, t)
    assert [len(x) for x, _, _ in model.calls] == [rows]
    c = Y.double() + 1
    torch.testing.assert_close(v, (c if rows == 3 else 2 * c - 11)[:, None, None].expand_as(X))


def test_interval_ends_survive_the_rounding_of_a_samplers_times():
    # Of 10 even steps, 0.3 comes out as 0.30000000000000004; of 20, 0.55 comes out as 0.5499999999999999.
    for steps, low, high in ((10, 0.0, 0.3), (20, 0.55, 0.75)):
        model = FakeModel()
        euler(guided_velocity(model, Y, 2.0, (low, high)), X, steps)
        guided = [len(x) == 6 for x, _, _ in model.calls]
        assert guided == [round(low * steps) <= steps - i <= round(high * steps) for i in range(steps)]


def test_scale_1_costs_one_forward_pass_of_the_batch():
    model = FakeModel()
    euler(guided_velocity(model, Y, 1.0), X, 10)
    assert [len(x) for x, _, _ in model.calls] == [3] * 10
    assert all(torch.equal(y, Y) for _, _, y in model.calls)


def test_the_model_is_called_in_its_own_dtype_with_float32_times():
    for dtype in (torch.float32, torch.bfloat16):
        model = FakeModel(dtype)
        v = guided_velocity(model, Y, 1.5)(X, 0.991)
        (x, t, _), = model.calls
        assert x.dtype == dtype and t.dtype == torch.float32 and v.dtype == torch.float64


def test_autoguidance_takes_the_worse_models_velocity_for_the_null_class():
    model, guide = tiny(), tiny()
    t = torch.full((3,), 0.4)
    with torch.no_grad():
        good, bad = model(X.float(), t, Y), guide(X.float(), t, Y)                   # the same labels in both
        v = guided_velocity(model, Y, 1.9, (0.0, 0.5), guide)(X, 0.4).float()
        torch.testing.assert_close(v, bad + 1.9 * (good - bad), rtol=1e-4, atol=1e-4)
        outside = guided_velocity(model, Y, 1.9, (0.0, 0.3), guide)(X, 0.4).float()
    torch.testing.assert_close(outside, good, rtol=1e-4, atol=1e-4)


def test_guidance_free_loss_is_least_at_the_guided_velocity():
    """With c = label + 1 for the target and u = 11, v(x, c, beta) = u + (c - u) / beta makes it 0."""
    model, t, beta = FakeModel(), torch.full((3,), 0.4), torch.tensor([0.25, 0.5, 1.0])
    x = X.float()
    c = (Y + 1.0)[:, None, None].expand_as(x)
    guided = (11 + (c - 11) / beta[:, None, None]).requires_grad_()
    loss = lambda prediction: flow_matching_loss(guidance_free_mixture(model, prediction, x, t, Y, beta), c)
    assert loss(guided).shape == (3,) and loss(guided).abs().max() < 1e-6
    assert loss(guided + 0.1).min() > 1e-4
    assert model.calls[0][2].tolist() == [10, 10, 10]
    # an unguided prediction is right at beta = 1 alone
    assert (loss(c) < 1e-6).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
def test_guidance_free_sampling_is_one_call_that_is_told_the_scale(kind):
    config = LightningDiTConfig if kind is LightningDiT else SiTConfig
    model = randomised(kind(config(**TINY, guidance_free=True))).eval()
    t = torch.full((3,), 0.4)
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        v = guided_velocity(model, Y, 2.0, (0.0, 0.5))(X, 0.4).float()
        outside = guided_velocity(model, Y, 2.0, (0.0, 0.3))(X, 0.4).float()
        assert calls == [3, 3]                                          # classifier-free guidance: 6 rows
        torch.testing.assert_close(v, model(X.float(), t, Y, torch.full((3,), 0.5)))
        torch.testing.assert_close(outside, model(X.float(), t, Y))                       # beta = 1
        assert (v - outside).abs().max() > 1e-3
    with pytest.raises(ValueError, match="from 1 on"):
        guided_velocity(model, Y, 0.5)


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
def test_the_middle_layer_can_be_read(kind):
    config = LightningDiTConfig if kind is LightningDiT else SiTConfig
    model = randomised(kind(config(**TINY))).eval()
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        v, hidden = model(X.float(), torch.full((3,), 0.4), Y, hidden_after=1)
        torch.testing.assert_close(v, model(X.float(), torch.full((3,), 0.4), Y))
    assert hidden is seen[0]


def test_guidance_of_a_real_model_agrees_with_two_separate_passes():
    model = tiny()
    t, null = torch.full((3,), 0.4), torch.full((3,), 10)
    with torch.no_grad():
        c, u = model(X.float(), t, Y), model(X.float(), t, null)
        assert (c - u).abs().max() > 0.01
        v = guided_velocity(model, Y, 1.9)(X, 0.4).float()
    torch.testing.assert_close(v, u + 1.9 * (c - u), rtol=1e-4, atol=1e-4)


def test_the_state_is_given_in_the_widest_type_of_the_weights():
    """bfloat16 matrices stand first, beside float32 norms: the state must not be rounded to them."""
    seen = []

    class Mixed(nn.Module):
        config = tiny().config

        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
            self.second = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, y):
            seen.append(x.dtype)
            return x

    velocity = guided_velocity(Mixed(), torch.zeros(2, dtype=torch.int64), 2.0, (0.0, 0.5))
    for t in (0.9, 0.2):
        assert velocity(torch.randn(2, 5, 6, dtype=torch.float64), t).dtype == torch.float64
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("sampler", [euler, heun, euler_maruyama])
def test_sampling_times_are_those_at_which_the_model_is_called(sampler):
    called = []
    velocity = lambda x, t: called.append(t) or -x
    sampler(velocity, torch.randn(2, 3, 4), steps=7)
    assert sampling_times(sampler.__name__.replace("_", "-"), 7) == pytest.approx(called)
