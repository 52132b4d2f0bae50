"""flow.py: paths, objective, guidance, and samplers held against distributions known in closed form.

The oracle of the samplers is data whose velocity can be written down: a Gaussian, and a mixture of four.
"""
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn

import flow
from common import UserError
from flow import (LAST, call, check_guidance, choose_labels, drop_labels, euler, euler_maruyama,
                  expected_noise, flow_matching_loss, guided_velocity, heun, inside, interpolate,
                  path_coefficients, sample_latents, sample_times, time_grid)
from sit import SiT, SiTConfig
from test_sit import TINY, tiny

PATHS = ("linear", "cosine")


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def test_an_unconditional_model_has_the_null_class_only():
    model = tiny(num_classes=0)
    assert model.y_embedder.embedding_table.weight.shape == (1, 32)
    y = drop_labels(rngs(4), torch.tensor([3, 1, 4, 1]), null_class=0, probability=1.0)
    assert torch.equal(y, torch.zeros(4, dtype=torch.int64))
    samples = euler(guided_velocity(model, y), torch.randn(4, 5, 6), time_grid(3))
    assert samples.shape == (4, 5, 6) and samples.isfinite().all()
    check_guidance(model, 1.0)
    for refuses in (lambda: guided_velocity(model, y, cfg_scale=1.5), lambda: check_guidance(model, 1.5)):
        with pytest.raises(UserError, match="unconditional"):
            refuses()


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
    def score(v, x):                                                     # s = -E[eps | x_t] / sigma
        return -expected_noise(v, x, t, path) / modes.coefficients(t)[1]

    x = torch.randn(20, 1, 2, dtype=torch.float64, requires_grad=True)
    modes = GaussianMixture([0.3, 0.7], [[1.0, 0.5], [-1.0, 0.2]], 0.4, path)
    gradient, = torch.autograd.grad(modes.log_density(x, t).sum(), x)
    torch.testing.assert_close(score(modes.velocity(x, t), x), gradient)
    at_once = expected_noise(modes.velocity(x, t), x, torch.full((20,), t).double(), path)
    torch.testing.assert_close(at_once, expected_noise(modes.velocity(x, t), x, t, path))
    closed = gaussian(path)                                                # N(alpha m, alpha^2 s^2 + sigma^2)
    alpha, sigma, *_ = closed.coefficients(t)
    x = x.detach()[..., :1]
    torch.testing.assert_close(score(closed.velocity(x, t), x),
                               -(x - alpha * 1.5) / (alpha ** 2 * 0.25 + sigma ** 2))


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


def draw(name, velocity, x, steps=250, last=LAST, **options):
    """A sampler's result, with its own times."""
    times = time_grid(steps, last if name == "euler_maruyama" else None)
    return SAMPLERS[name](velocity, x, times, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler, ratio", [(euler, 2), (heun, 4)])
def test_order_of_the_ode_samplers(sampler, ratio, path):
    # The exact flow of a Gaussian takes the noise x_1 to m + s x_1.
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1)
    samples = [sampler(gaussian(path).velocity, x, time_grid(steps)) for steps in (40, 80, 160)]
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
        options = options | dict(path=path)
    samples = draw(name, gaussian(path).velocity, x, **options).flatten().numpy()
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
    options = dict(path=path) if name == "euler_maruyama" else {}
    samples = draw(name, modes.velocity, torch.randn(6000, 1, 2, dtype=torch.float64), **options)
    nearest = (samples - modes.means).square().sum(-1).argmin(-1)                                   # (B,)
    for k in range(4):
        mine = samples[nearest == k, 0]
        assert abs(len(mine) / 6000 - weights[k]) < 0.025                     # standard error 0.006
        assert (mine.mean(0) - modes.means[k]).abs().max() < 0.08
        assert 0.22 < mine.std(0).mean() < 0.36


@pytest.mark.parametrize("path", PATHS)
def test_euler_maruyama_is_the_documented_recipe_and_calls_the_model_n_times(path):
    target, calls, asked = gaussian(path), [], []
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    noises = torch.randn(9, 6, 1, 3, dtype=torch.float64)
    noise = lambda step: asked.append(step) or noises[step]
    ours = euler_maruyama(recorded(target.velocity, calls), x, time_grid(10, LAST), noise=noise, path=path)
    # d = v - w/2 s with w = 2 sigma, and x += d dt + sqrt(w) sqrt(|dt|) n; the last step, 0.04 to 0, without.
    times = np.linspace(1, 0.04, 10)
    for step, t in enumerate(times):
        dt = (times[step + 1] if step < 9 else 0.0) - t
        alpha, sigma, d_alpha, d_sigma = target.coefficients(t)
        v = target.velocity(x, t)
        score = (d_alpha * x - alpha * v) / (alpha * d_sigma - d_alpha * sigma) / sigma
        x = x + (v - sigma * score) * dt
        if step < 9:
            x = x + math.sqrt(2 * sigma) * math.sqrt(abs(dt)) * noises[step]
    torch.testing.assert_close(ours, x)
    assert [t for _, t in calls] == pytest.approx(times) and asked == list(range(9))


def test_euler_maruyama_takes_250_steps_and_ends_without_noise():
    calls, asked = [], []
    still = lambda x, t: -x / (2 - t)                                    # the drift, (2 - t) v + x, is then 0
    start = torch.zeros(1, 1, 1, dtype=torch.float64)
    last = euler_maruyama(recorded(still, calls), start, time_grid(250, LAST),
                          noise=lambda step: asked.append(step) or torch.ones(1, 1, 1))
    assert len(calls) == 250 and calls[0][1] == 1.0 and calls[-1][1] == pytest.approx(0.04)
    assert asked == list(range(249))
    values = [x.item() for x, _ in calls] + [last.item()]                # 249 times upwards, then not
    assert (all(a < b for a, b in zip(values[:-1], values[1:-1]))
            and values[-1] == pytest.approx(values[-2], abs=1e-9))


@pytest.mark.parametrize("sampler, times", [(euler, [1.0, 0.75, 0.5, 0.25]),
                                            (heun, [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])])
def test_ode_samplers_call_at_the_times_of_their_steps(sampler, times):
    calls = []
    sampler(recorded(lambda x, t: x, calls), torch.zeros(1, 1, 1), time_grid(4))
    assert [t for _, t in calls] == times
    calls.clear()
    sampler(recorded(lambda x, t: x, calls), torch.zeros(1, 1, 1), time_grid(250))
    assert len(calls) == (250 if sampler is euler else 499)


@pytest.mark.parametrize("name", SAMPLERS)
def test_time_runs_from_noise_at_1_to_data_at_0(name):
    # All data is one point p: v = eps - p = (x - p) / t. Whatever the noise, the sample is p.
    p = torch.tensor([3.0, -1.0])
    options = dict(steps=200, last=1e-3) if name == "euler_maruyama" else dict(steps=20)
    velocity = lambda x, t: (x - p) / t
    calls = []
    sample = draw(name, recorded(velocity, calls), torch.randn(5, 1, 2), **options)
    assert calls[0][1] == 1.0
    torch.testing.assert_close(sample, p.expand(5, 1, 2), rtol=0,
                               atol=0.1 if name == "euler_maruyama" else 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_is_float64_and_the_result_has_the_inputs_dtype(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        calls, x = [], torch.randn(2, 1, 3, dtype=dtype)
        result = draw(name, recorded(lambda x, t: x.to(torch.bfloat16), calls), x, 3)
        assert all(x.dtype == torch.float64 for x, _ in calls) and result.dtype == dtype


def test_a_sample_does_not_depend_on_its_batch():
    x, noises = torch.randn(4, 1, 3), torch.randn(4, 10, 1, 3)
    velocity, times = gaussian("linear").velocity, time_grid(10, LAST)
    sample = lambda rows: euler_maruyama(velocity, x[rows], times, noise=lambda step: noises[rows, step])
    assert torch.equal(sample(slice(0, 4))[2:3], sample(slice(2, 3)))


def test_without_given_noise_it_comes_from_torchs_generator():
    def run(seed):
        torch.manual_seed(seed)
        return euler_maruyama(gaussian("linear").velocity, torch.ones(4, 1, 3), time_grid(10, LAST))

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_times_are_equally_spaced_from_1_to_0():
    assert time_grid(4) == [1, 0.75, 0.5, 0.25, 0] and time_grid(1) == [1, 0]
    assert time_grid(4, 0.04) == pytest.approx([1, 0.68, 0.36, 0.04, 0]) and time_grid(1, 0.04) == [1, 0]
    for times, last in ((time_grid(250), 0), (time_grid(251, LAST)[:-1], LAST)):               # float64
        np.testing.assert_allclose(times, np.linspace(1, last, 251), rtol=0, atol=1e-15)


def test_impossible_steps_are_refused():
    for last in (None, LAST):
        with pytest.raises(ValueError, match="at least one step"):
            time_grid(0, last)
    for last in (0.0, 1.0):
        with pytest.raises(ValueError, match="last"):
            time_grid(5, last)


# ------------------------------------------------ guidance ------------------------------------------------

class FakeModel(nn.Module):
    """Velocity = label + 1, as c would be (null class 10: 11), and a record of every call. It is sampled as
    a SiT is."""
    velocity, times, samplers = SiT.velocity, SiT.times, SiT.samplers

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


def test_an_interval_includes_both_ends_and_what_rounding_makes_of_them():
    for t in (0.2, 0.5, 0.75, 0.2 - 1e-9, 0.75 + 1e-9):
        assert inside(t, (0.2, 0.75))
    assert inside(0.1 + 0.2, (0.0, 0.3)) and inside(0.0, (0.0, 1.0)) and inside(1.0, (0.0, 1.0))
    assert not inside(0.1999, (0.2, 0.75)) and not inside(0.7501, (0.2, 0.75))


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
        euler(guided_velocity(model, Y, 2.0, (low, high)), X, time_grid(steps))
        guided = [len(x) == 6 for x, _, _ in model.calls]
        assert guided == [round(low * steps) <= steps - i <= round(high * steps) for i in range(steps)]


def test_heun_decides_on_guidance_at_each_call():
    model = FakeModel()
    heun(guided_velocity(model, Y, 2.0, (0.0, 0.5)), X, time_grid(4))
    assert [t[0].item() for x, t, _ in model.calls if len(x) == 6] == [0.5, 0.5, 0.25, 0.25]


def test_further_inputs_reach_both_calls_of_guidance():
    seen = []

    class Told(FakeModel):
        def forward(self, x, t, y, span):
            seen.append(span.tolist())
            return super().forward(x, t, y)

    for scale in (2.0, 1.0):
        guided_velocity(Told(), Y, scale)(X, 0.4, span=0.5)
    assert seen == [[0.5] * 6, [0.5] * 3]


def test_scale_1_costs_one_forward_pass_of_the_batch():
    model = FakeModel()
    euler(guided_velocity(model, Y, 1.0), X, time_grid(10))
    assert [len(x) for x, _, _ in model.calls] == [3] * 10
    assert all(torch.equal(y, Y) for _, _, y in model.calls)


def test_a_call_fills_the_batch_with_one_time():
    """Further inputs, too: one float each for the whole batch."""
    seen = {}

    class Told(FakeModel):
        def forward(self, x, t, y, **more):
            seen.update(more)
            return super().forward(x, t, y)

    model = Told()
    v = call(model, X, 0.4, Y, beta=0.25, span=0.0)
    (_, t, y), = model.calls
    torch.testing.assert_close(t, torch.full((3,), 0.4))
    assert torch.equal(y, Y) and torch.equal(v, (Y + 1.0).double()[:, None, None].expand_as(X))
    assert list(seen) == ["beta", "span"] and seen["beta"].dtype == torch.float32
    assert seen["beta"].tolist() == [0.25] * 3 and seen["span"].tolist() == [0.0] * 3


def test_the_model_is_called_in_its_own_dtype_with_float32_times():
    for dtype in (torch.float32, torch.bfloat16):
        model = FakeModel(dtype)
        v = call(model, X, 0.991, Y)
        (x, t, _), = model.calls
        assert x.dtype == dtype and t.dtype == torch.float32 and v.dtype == torch.float64


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
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
            self.second = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, y):
            seen.append(x.dtype)
            return x

    v = call(Mixed(), torch.randn(2, 5, 6, dtype=torch.float64), 0.9, torch.zeros(2, dtype=torch.int64))
    assert v.dtype == torch.float64 and seen == [torch.float32]


# -------------------------------------------- drawing samples --------------------------------------------

def test_latents_are_drawn_by_250_steps_of_euler_maruyama_without_guidance():
    model = FakeModel()
    z = sample_latents(model, [3, 5], [2, 0], seed=1)
    assert z.shape == (2, 5, 6) and z.dtype == torch.float32
    assert [t.tolist() for _, t, _ in model.calls] == [
        pytest.approx([t, t]) for t in np.linspace(1, 0.04, 250)]
    assert all(y.tolist() == [2, 0] for _, _, y in model.calls)


@pytest.mark.parametrize("name", flow.SAMPLERS)
def test_a_drawn_sample_follows_from_seed_and_index(name):
    model = tiny()
    run = lambda indices, seed=1: sample_latents(model, indices, [2] * len(indices), seed, 2.0, (0.0, 0.75),
                                                 name, steps=5)
    z = run([3, 5, 8])
    torch.testing.assert_close(run([5]), z[1:2], rtol=1e-4, atol=1e-4)
    assert torch.equal(run([3, 5, 8]), z) and not torch.allclose(run([3, 5, 8], 2), z, atol=0.01)


def test_a_model_says_how_it_is_sampled():
    """The places where an extra attaches: velocity, times and samplers."""
    asked = []

    class Other(FakeModel):
        def velocity(self, y, cfg_scale, interval):
            asked.append((y.tolist(), cfg_scale, interval))
            return lambda x, t: -x

        def times(self, steps, last=None):
            asked.append((steps, last))
            return [1.0, 0.5, 0.0]

        samplers = flow.SAMPLERS | {"euler": lambda velocity, x, times: velocity(x, times[1]) - 1}

    z = sample_latents(Other(), [0], [4], 0, 1.5, (0.1, 0.6), "euler", 9)
    assert asked == [([4], 1.5, (0.1, 0.6)), (9, None)]
    start = sample_latents(Other(), [0], [4], 0, sampler="heun", steps=9, trajectory=(states := []))
    assert torch.equal(z, -states[0][1] - 1) and start.isfinite().all()
    assert [t for t, _ in states] == [1, 0.5, 0.5, 0] and torch.equal(states[-1][1], start)
    sample_latents(Other(), [0], [4], 0, steps=9)
    assert asked[-1] == (9, LAST)


def test_labels_are_in_turn_or_drawn_by_seed_and_index():
    assert choose_labels(7, None, 3, "balanced", 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert choose_labels(4, [2, 0], 3, "balanced", 0).tolist() == [2, 0, 2, 0]
    assert choose_labels(2, ["null"], 3, "balanced", 0).tolist() == [3, 3]
    assert choose_labels(2, None, 0, "balanced", 0).tolist() == [0, 0]
    random = choose_labels(200, [0, 2], 3, "random", 0)
    assert set(random) == {0, 2} and np.array_equal(choose_labels(50, [0, 2], 3, "random", 0), random[:50])
    for classes, message in (([3], "0..2"), ([-1], "0..2"), (["null", 1], "cannot be joined")):
        with pytest.raises(UserError, match=message):
            choose_labels(4, classes, 3, "balanced", 0)
    assert choose_labels(2, ["null"], 0, "balanced", 0).tolist() == [0, 0]
    with pytest.raises(UserError, match="trained without classes"):
        choose_labels(4, [3, 7], 0, "balanced", 0)
