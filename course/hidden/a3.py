"""Hidden tests of A3: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a3.py` runs
all on the solution.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import flow
import sit
from common import UserError
from course.hidden.given import close, generators, rng, strided, unchanged  # noqa: F401


PATHS = ("linear", "cosine")


def coefficients(t, path):
    """alpha, sigma and their derivatives at times t, by hand."""
    if path == "linear":
        return 1 - t, t, -1.0 + 0 * t, 1.0 + 0 * t
    h = math.pi / 2
    return np.cos(h * t), np.sin(h * t), -h * np.sin(h * t), h * np.cos(h * t)


def normal(*shape):
    """Normal numbers, float64, that are not contiguous in memory."""
    return strided(torch.randn(*shape, dtype=torch.float64))


def differentiable(function, *inputs):
    """Autograd's gradients of all results are those of small differences, for all inputs (float64)."""
    def together(*inputs):                # gradcheck looks past one result of several that has no gradient
        found = function(*inputs)
        return torch.stack(found) if isinstance(found, tuple) else found
    assert torch.autograd.gradcheck(together, [x.detach().clone().requires_grad_() for x in inputs])


# ------------------------------------------- paths and objective -------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_path_coefficients(path, rng):
    for shape in ((3, 1, 2), (4,), ()):
        t = torch.tensor(rng.random(shape))
        with unchanged(t):
            found = flow.path_coefficients(t, path)
        for ours, expected in zip(found, coefficients(t.numpy(), path), strict=True):
            close(ours, torch.as_tensor(expected), 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_path_coefficients_are_like_t(path):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for device in ("cpu", "meta"):                # meta: no numbers, and no other device joins in
            t = torch.rand(2, 3, dtype=dtype, device=device)
            for found in flow.path_coefficients(t, path):
                assert found.shape == (2, 3) and found.dtype == dtype and found.device.type == device
    with torch.no_grad():
        assert len(flow.path_coefficients(torch.zeros(1), path)) == 4
    differentiable(lambda t: flow.path_coefficients(t, path), torch.tensor([0.01, 0.4, 0.99]).double())


def test_other_paths_are_refused():
    for name in ("straight", "Linear", "gvp", ""):
        with pytest.raises(ValueError, match="linear or cosine"):
            flow.path_coefficients(torch.zeros(1), name)


@pytest.mark.parametrize("path", PATHS)
def test_interpolate(path, rng):
    x, noise, t = normal(3, 3, 3), normal(3, 3, 3), torch.tensor(rng.random(3))
    with unchanged(x, noise, t):
        state, v = flow.interpolate(x, noise, t, path)
    for b in range(3):
        alpha, sigma, d_alpha, d_sigma = coefficients(t[b].item(), path)
        close(state[b], alpha * x[b] + sigma * noise[b], 1e-12)
        close(v[b], d_alpha * x[b] + d_sigma * noise[b], 1e-12)
    differentiable(lambda *inputs: flow.interpolate(*inputs, path), x[:2], noise[:2], t[:2])
    assert all(found.dtype == torch.float32 and found.shape == (1, 2, 4) for found in
               flow.interpolate(torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.rand(1), path))


def test_flow_matching_loss():
    prediction, target = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    exact = lambda p, t: torch.stack([((a.double() - b.double()) ** 2).sum() / 15 for a, b in zip(p, t)])
    for p, t in ((prediction, target), (prediction.double(), target.double()), (normal(4, 3, 5), target),
                 (prediction.bfloat16(), target), (prediction.bfloat16(), target.bfloat16()),
                 (500 * prediction.half(), target.half())):                    # half ends below 500 squared
        with unchanged(p, t):
            found = flow.flow_matching_loss(p, t)
        assert found.dtype == torch.float32
        close(found, exact(p, t))


def test_flow_matching_loss_has_its_gradient(rng):
    prediction, target = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    prediction[1] = target[1]                                          # a loss of 0 has the gradient 0
    prediction.requires_grad_()
    weights = torch.tensor(rng.uniform(1, 2, 4)).float()
    losses = flow.flow_matching_loss(prediction, target)
    assert losses[1] == 0 and (losses[[0, 2, 3]] > 0).all()
    (losses * weights).sum().backward()
    close(prediction.grad, 2 / 15 * weights[:, None, None] * (prediction - target))


class Fixed(np.random.Generator):
    """A generator whose random() is always `value`."""

    def __init__(self, value):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, size=None, **_):
        return self.value if size is None else np.full(size, self.value)


def test_drop_labels(rng):
    make, probability = generators(300, rng), float(rng.uniform(0.2, 0.8))
    y = torch.from_numpy(rng.integers(0, 7, 300))
    with unchanged(y):
        found = flow.drop_labels(make(), y, 7, probability)
    below = torch.tensor([rng.random() < probability for rng in make()])
    assert found.dtype == torch.int64 and torch.equal(found, torch.where(below, 7, y))
    assert torch.equal(flow.drop_labels(make(slice(90, 99)), y[90:99], 7, probability), found[90:99])


def test_drop_labels_at_the_limits(rng):
    y = torch.from_numpy(rng.integers(0, 7, 20))
    for probability, expected in ((0.0, y), (1.0, torch.full((20,), 7))):
        for make in (generators(20, rng), lambda: [Fixed(0.0)] * 20):
            with unchanged(y):
                assert torch.equal(flow.drop_labels(make(), y, 7, probability), expected)
    # "below": not at the probability itself
    assert flow.drop_labels([Fixed(0.25), Fixed(0.2499)], y[:2], 7, 0.25).tolist() == [y[0], 7]
    assert flow.drop_labels([Fixed(0.2549), Fixed(0.2551)], y[:2], 7, 0.255).tolist() == [7, y[1]]
    # an unconditional model, whose only class is 0
    assert flow.drop_labels(generators(20, rng)(), y, 0, 1.0).tolist() == [0] * 20
    assert flow.drop_labels(generators(9, rng)(), torch.zeros(9, dtype=torch.int64, device="meta"), 7,
                            0.5).device.type == "meta"


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_drop_labels_draws_once(probability, rng):
    make = generators(5, rng)
    used, fresh = make(), make()
    flow.drop_labels(used, torch.arange(5), 9, probability)
    for a, b in zip(used, fresh):
        b.random()
        assert a.random() == b.random()


@pytest.mark.parametrize("path", PATHS)
def test_expected_noise(path, rng):
    x, noise, t = normal(4, 2, 3), normal(4, 2, 3), torch.tensor([0.0, 1.0, *rng.uniform(0.1, 0.9, 2)])
    parts = [coefficients(value, path) for value in t.tolist()]
    state = strided(torch.stack([p[0] * a + p[1] * n for p, a, n in zip(parts, x, noise)]))
    v = strided(torch.stack([p[2] * a + p[3] * n for p, a, n in zip(parts, x, noise)]))
    for times in (t, t[:, None, None]):
        with unchanged(v, state, times):
            close(flow.expected_noise(v, state, times, path), noise, 1e-12)
    for b, value in enumerate(t.tolist()):
        with unchanged(v, state):
            close(flow.expected_noise(v[b:b + 1], state[b:b + 1], value, path), noise[b:b + 1], 1e-12)
    for value in (0.5, t):                                            # t comes in float64, the rest does not
        for dtype in (torch.float32, torch.bfloat16):
            assert flow.expected_noise(v.to(dtype), state.to(dtype), value, path).dtype == dtype
    differentiable(lambda v, state, t: flow.expected_noise(v, state, t, path), v[2:], state[2:], t[2:])


# ------------------------------------------------ samplers ------------------------------------------------

def test_time_grid(rng):
    last = float(rng.uniform(0.01, 0.2))
    for steps in range(1, 60):
        even, short = flow.time_grid(steps), flow.time_grid(steps, last)
        for times in (even, short):
            assert isinstance(times, list) and all(isinstance(t, float) for t in times)
            assert len(times) == steps + 1
            assert times[0] == 1 and times[-1] == 0                   # no sampler may miss the end by 1e-17
        np.testing.assert_allclose(even, [1 - i / steps for i in range(steps + 1)], rtol=0, atol=1e-14)
        before = [1 - i * (1 - last) / max(1, steps - 1) for i in range(steps)]
        np.testing.assert_allclose(short, [*before, 0], rtol=0, atol=1e-14)


def test_time_grid_refuses(rng):
    steps, last = int(rng.integers(3, 40)), float(rng.uniform(0.01, 0.2))
    for bad in ((0,), (-steps,), (0, last), (-steps, last)):
        with pytest.raises(ValueError, match="at least one step"):
            flow.time_grid(*bad)
    for bad in ((steps, 0.0), (steps, 1.0), (steps, -last), (steps, 1 + last), (1, 0.0), (1, 1.0)):
        with pytest.raises(ValueError, match="last"):
            flow.time_grid(*bad)


def field(rng):
    """A velocity that depends on state and time; it answers in `dtype`, and notes states and times."""
    a, b = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1))

    def velocity(x, t):
        assert x.dtype == torch.float64 and isinstance(t, float)
        velocity.states.append(x.clone())
        velocity.times.append(t)
        return (torch.sin(a * x) + b * t * x + 0.3).to(velocity.dtype)
    velocity.dtype, velocity.states, velocity.times = torch.float64, [], []
    return velocity


def falling(rng):
    """Unequal times from 1 to 0. The last steps are short."""
    return [1.0, *sorted(rng.uniform(0.05, 0.95, int(rng.integers(3, 8))).tolist(), reverse=True), 0.01, 1e-5,
            0.0]


def result_of(step_of, x, times):
    """The last state of a sampler, float64: a loop over step_of(number, state, t, following)."""
    x = x.double()
    for step, (t, following) in enumerate(zip(times, times[1:])):
        x = step_of(step, x, t, following)
    return x


def check_sampler(sampler, step_of, velocity, times):
    """A sampler against its recipe: states and result in all dtypes, its arguments unchanged."""
    for dtype, answer in ((torch.float64, torch.float64), (torch.float64, torch.bfloat16),
                          (torch.float64, torch.float32), (torch.float32, torch.bfloat16),
                          (torch.bfloat16, torch.float32)):
        velocity.dtype = answer
        start, before = torch.randn(2, 2, 3).to(dtype), list(times)
        velocity.states.clear()
        with unchanged(start):
            found = sampler(velocity, start, times)
        asked, velocity.states = velocity.states, []
        expected = result_of(step_of, start, times)
        for ours, state in zip(asked, velocity.states, strict=True):
            close(ours, state, 1e-12)
        assert times == before and found.dtype == dtype
        close(found, expected, {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


def test_euler(rng):
    velocity, times = field(rng), falling(rng)
    flow.euler(velocity, torch.randn(2, 2, 3), times)
    assert velocity.times == times[:-1]
    for times in (times, [1.0, 0.02, 0.0], [1.0, 0.0]):
        check_sampler(flow.euler, lambda _, x, t, following: x - (t - following) * velocity(x, t).double(),
                      velocity, times)


def test_heun(rng):
    velocity, times = field(rng), falling(rng)
    flow.heun(velocity, torch.randn(2, 2, 3), times)
    assert velocity.times == [t for pair in zip(times, times[1:]) for t in pair][:-1]

    def step_of(_, x, t, following):
        v = velocity(x, t).double()
        if following > 0:
            v = (v + velocity(x - (t - following) * v, following).double()) / 2
        return x - (t - following) * v
    for times in (times, [1.0, 0.02, 0.0], [1.0, 0.0]):
        check_sampler(flow.heun, step_of, velocity, times)


@pytest.mark.parametrize("path", PATHS)
def test_euler_maruyama(path, rng):
    velocity, times, asked = field(rng), falling(rng), []
    noises = torch.randn(len(times) - 2, 2, 2, 3).double()

    def noise(step):
        asked.append(step)
        return noises[step].to(noise.dtype)

    def step_of(step, x, t, following):
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        v = velocity(x, t).double()
        score = -(alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma) / sigma
        x = x - (t - following) * (v - sigma * score)
        if following > 0:
            x = x + math.sqrt(2 * sigma * (t - following)) * noises[step].to(noise.dtype).double()
        return x

    def sampler(*args, **options):
        return flow.euler_maruyama(*args, noise=noise, path=path, **options)

    noise.dtype, state = torch.float64, torch.get_rng_state()
    sampler(velocity, torch.zeros(2, 2, 3), times)
    assert velocity.times == times[:-1] and asked == list(range(len(times) - 2))
    assert torch.equal(torch.get_rng_state(), state), "noise was given, and drawn all the same"
    for noise.dtype, times in ((torch.float64, times), (torch.bfloat16, times),
                               (torch.float64, [1.0, 0.02, 0.0]), (torch.float64, [1.0, 0.0])):
        check_sampler(sampler, step_of, velocity, times)


def test_euler_maruyama_draws_noise_like_its_state(rng):
    velocity, times, seed = field(rng), falling(rng), int(rng.integers(2 ** 31))
    start = torch.randn(2, 2, 3)
    torch.manual_seed(seed)
    noises = [torch.randn(2, 2, 3, dtype=torch.float64) for _ in times[2:]]
    expected = flow.euler_maruyama(velocity, start.double(), times, noise=lambda step: noises[step])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        torch.manual_seed(seed)
        close(flow.euler_maruyama(velocity, start.to(dtype), times), expected, tolerance)


# ------------------------------------------------ guidance ------------------------------------------------

class Model(nn.Module):
    """Velocity = a number for each class, times the state; notes what it is called with."""

    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.config = sit.SiTConfig(num_latents=2, latent_dim=3, width=8, heads=2, depth=1,
                                    num_classes=len(values) - 1)
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.values, self.rows = nn.Parameter(torch.as_tensor(values).to(dtype)), []

    def forward(self, x, t, y, **more):
        self.rows.append(len(x))
        self.seen = x, t, y, more
        return self.values[y][:, None, None] * x


class Recorder(nn.Module):
    """Velocity = 2 x; its parameters have these dtypes, the last one is frozen, a buffer has float64."""

    def __init__(self, *dtypes):
        super().__init__()
        self.weights = nn.ParameterList(torch.full((1,), 2.0, dtype=dtype) for dtype in dtypes)
        self.weights[-1].requires_grad_(False)
        self.register_buffer("table", torch.zeros(1, dtype=torch.float64))
        self.calls = []

    def forward(self, x, t, y, **more):
        self.calls.append((x, t, y, more))
        return self.weights[0].to(x) * x


def test_call(rng):
    values, t, number = rng.normal(size=6), float(rng.uniform()), float(rng.uniform())
    model, y = Model(values, torch.float32), torch.from_numpy(rng.integers(0, 5, 4))
    x = normal(4, 2, 3)
    with unchanged(x, y):
        found = flow.call(model, x, t, y, number=number, other=0.0)
    close(found, torch.from_numpy(values)[y][:, None, None] * x, 1e-6)
    state, times, labels, more = model.seen
    assert model.rows == [4] and found.dtype == torch.float64
    assert state.dtype == times.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(labels, y) and torch.equal(state, x.float())
    assert torch.equal(times, torch.full((4,), t)) and list(more) == ["number", "other"]
    for given, expected in ((more["number"], number), (more["other"], 0.0)):
        assert given.dtype == torch.float32 and torch.equal(given, torch.full((4,), expected))


def test_call_dtypes():
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for weights, expected in (([brain], brain), ([half], half), ([single], single), ([double], double),
                              ([brain, single], single), ([single, brain], single), ([single, half], single),
                              ([brain, half], single), ([half, brain, half], single),
                              ([brain, double, single], double)):
        for state in (double, single, brain):
            model = Recorder(*weights)
            found = flow.call(model, torch.ones(3, 2, 3, dtype=state), 0.3, torch.zeros(3, dtype=torch.int64),
                              more=0.7)
            (x, t, _, more), = model.calls
            assert x.dtype == expected and found.dtype == state and t.dtype == more["more"].dtype == single
    model, x = Recorder(single), torch.ones(3, 2, 3, device="meta")
    flow.call(model, x, 0.3, torch.zeros(3, dtype=torch.int64, device="meta"), more=0.7)
    (_, t, _, more), = model.calls
    assert t.device == more["more"].device == x.device


def test_call_has_its_gradient():
    model, x = Recorder(torch.float32, torch.float32), torch.ones(3, 2, 3, dtype=torch.float64)
    flow.call(model, x.requires_grad_(), 0.3, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert (x.grad == 2).all() and model.weights[0].grad.item() == 18


def test_inside(rng):
    low, high = sorted(rng.uniform(0.1, 0.9, 2).tolist())
    high += 0.01
    for t in (low, high, (low + high) / 2, low - 1e-9, high + 1e-9, low - 9e-7, high + 9e-7):
        assert flow.inside(t, (low, high)) is True, t
    for t in (0.0, 1.0, low - 1e-3, high + 1e-3, low - 1.2e-6, high + 1.2e-6):
        assert flow.inside(t, (low, high)) is False, t
    assert flow.inside(low, (low, low)) and not flow.inside(low + 1e-4, (low, low))


def test_guidance(rng):
    values = rng.normal(size=6)
    model, y = Model(values), torch.from_numpy(rng.integers(0, 5, 4))
    low, high = sorted(rng.uniform(0.1, 0.9, 2).tolist())
    scale, x = float(rng.uniform(2.1, 4)), normal(4, 2, 3)
    velocity = flow.guided_velocity(model, y, scale, (low, high))
    c, u = torch.from_numpy(values)[y][:, None, None] * x, values[5] * x
    for t, inside in ((low, True), (high, True), ((low + high) / 2, True), (low - 0.01, False),
                      (high + 0.01, False), (high + 1e-9, True), (low - 1e-9, True)):
        model.rows.clear()
        with unchanged(x, y):
            close(velocity(x, t, number=t, other=0.0), u + scale * (c - u) if inside else c, 1e-12)
        assert model.rows == [8 if inside else 4]
        state, times, labels, more = model.seen
        assert torch.equal(state, torch.cat((x, x)) if inside else x)
        assert labels.dtype == torch.int64 and labels.tolist() == y.tolist() + ([5] * 4 if inside else [])
        for given, expected in ((times, t), (more["number"], t), (more["other"], 0.0)):
            close(given, torch.full((8 if inside else 4,), expected), 1e-6)


def test_guidance_at_the_limits(rng):
    values = rng.normal(size=6)
    model, y, x = Model(values), torch.from_numpy(rng.integers(0, 5, 4)), torch.randn(4, 2, 3).double()
    c, u = torch.from_numpy(values)[y][:, None, None] * x, values[5] * x
    for scale in (0.0, 0.5, 1.01, float(rng.uniform(1.2, 3))):                # (0, 1): all times are inside
        for t in (0.0, 1.0, float(rng.uniform())):
            model.rows.clear()
            close(flow.guided_velocity(model, y, scale)(x, t), u + scale * (c - u), 1e-12)
            assert model.rows == [8]
    model.rows.clear()
    for t in (0.0, 1.0):
        close(flow.guided_velocity(model, y)(x, t), c, 1e-12)
    assert model.rows == [4, 4]


def test_guidance_is_precise(rng):
    """A bfloat16 model's two velocities are combined in the state's dtype."""
    values = torch.tensor(rng.normal(size=6)).bfloat16()
    model, y = Model(values, torch.bfloat16), torch.from_numpy(rng.integers(0, 5, 4))
    scale = float(rng.uniform(1.5, 4))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = torch.randn(4, 2, 3, dtype=dtype)
        c, u = (values[y][:, None, None] * x.bfloat16()).double(), (values[5] * x.bfloat16()).double()
        found = flow.guided_velocity(model, y, scale)(x, 0.5)
        assert found.dtype == dtype
        close(found, u + scale * (c - u), tolerance)


def test_guidance_has_its_gradient(rng):
    values, y = torch.tensor(rng.normal(size=6)), torch.from_numpy(rng.integers(0, 5, 4))
    for scale in (1.0, float(rng.uniform(1.5, 4))):
        model, x = Model(values), torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)
        flow.guided_velocity(model, y, scale)(x, 0.5).sum().backward()
        expected = scale * 6 * torch.bincount(y, minlength=6).double()
        expected[5] = 24 * (1 - scale)
        close(model.values.grad, expected, 1e-9)
        close(x.grad, (values[5] + scale * (values[y] - values[5]))[:, None, None].expand(4, 2, 3), 1e-9)


def test_guidance_needs_classes():
    model, y = Model([0.5]), torch.zeros(4, dtype=torch.int64)
    for scale in (0.0, 0.5, 2.0):
        with pytest.raises(UserError, match="unconditional model"):
            flow.guided_velocity(model, y, scale)
    assert model.rows == []
    x = torch.randn(4, 2, 3).double()
    close(flow.guided_velocity(model, y)(x, 0.5), 0.5 * x, 1e-9)
    assert model.rows == [4]


# ----------------------------------------------- transformer -----------------------------------------------

def test_modulate():
    x, shift, scale = normal(3, 3, 4), normal(3, 1, 4), normal(3, 1, 4)
    with unchanged(x, shift, scale):
        found = sit.modulate(x, shift, scale)
    for b in range(3):
        for i in range(3):
            close(found[b, i], x[b, i] + x[b, i] * scale[b, 0] + shift[b, 0], 1e-12)
    differentiable(sit.modulate, x, shift, scale)
    for dtype in (torch.float32, torch.bfloat16):
        assert sit.modulate(x.to(dtype), shift.to(dtype), scale.to(dtype)).dtype == dtype
