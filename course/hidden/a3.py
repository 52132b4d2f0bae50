"""Hidden tests of A3: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a3.py` runs
all on the solution.
"""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import flow
import sit
from common import UserError
from course.hidden.given import close, generators, rng  # noqa: F401


PATHS = ("linear", "cosine")


def coefficients(t, path):
    """alpha, sigma and their derivatives at times t, by hand."""
    if path == "linear":
        return 1 - t, t, -1.0 + 0 * t, 1.0 + 0 * t
    h = math.pi / 2
    return np.cos(h * t), np.sin(h * t), -h * np.sin(h * t), h * np.cos(h * t)


@pytest.mark.parametrize("path", PATHS)
def test_path_coefficients(path, rng):
    t = rng.random((3, 1, 2))
    found = flow.path_coefficients(torch.from_numpy(t), path)
    for ours, expected in zip(found, coefficients(t, path), strict=True):
        close(ours, torch.from_numpy(expected), 1e-9)
    with pytest.raises(ValueError):
        flow.path_coefficients(torch.zeros(1), "straight")


@pytest.mark.parametrize("path", PATHS)
def test_interpolate(path, rng):
    x, noise, t = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3, 3)), rng.random(3)
    state, v = flow.interpolate(*map(torch.from_numpy, (x, noise, t)), path)
    for b in range(3):
        alpha, sigma, d_alpha, d_sigma = coefficients(t[b], path)
        close(state[b], torch.from_numpy(alpha * x[b] + sigma * noise[b]), 1e-9)
        close(v[b], torch.from_numpy(d_alpha * x[b] + d_sigma * noise[b]), 1e-9)


def test_flow_matching_loss(rng):
    prediction, target = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5)
    found = flow.flow_matching_loss(prediction, target)
    assert found.dtype == torch.float32
    close(found,
          torch.stack([((p.double() - t.double()) ** 2).sum() / 15 for p, t in zip(prediction, target)]))


def test_drop_labels(rng):
    make, probability = generators(2000, rng), float(rng.uniform(0.2, 0.8))
    y = torch.from_numpy(rng.integers(0, 7, 2000))
    found = flow.drop_labels(make(), y, 7, probability)
    assert found.dtype == torch.int64 and abs((found == 7).double().mean().item() - probability) < 0.05
    assert torch.equal(found[found != 7], y[found != 7])
    assert torch.equal(flow.drop_labels(make(slice(90, 99)), y[90:99], 7, probability), found[90:99])
    assert ((flow.drop_labels(make(), y, 7, 1.0) == 7).all()
            and torch.equal(flow.drop_labels(make(), y, 7, 0.0), y))


@pytest.mark.parametrize("path", PATHS)
def test_expected_noise(path, rng):
    x, noise, t = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 3)), rng.random(4)
    parts = [coefficients(value, path) for value in t]
    state = np.stack([p[0] * a + p[1] * n for p, a, n in zip(parts, x, noise)])
    v = np.stack([p[2] * a + p[3] * n for p, a, n in zip(parts, x, noise)])
    v, state, t = map(torch.from_numpy, (v, state, t))
    close(flow.expected_noise(v, state, t, path), torch.from_numpy(noise), 1e-9)
    close(flow.expected_noise(v[:1], state[:1], t[0].item(), path), torch.from_numpy(noise[:1]), 1e-9)
    assert flow.expected_noise(v.float(), state.float(), 0.5, path).dtype == torch.float32


def test_time_grid(rng):
    steps, last = int(rng.integers(3, 40)), float(rng.uniform(0.01, 0.2))
    even, short = flow.time_grid(steps), flow.time_grid(steps, last)
    assert len(even) == len(short) == steps + 1 and all(isinstance(t, float) for t in even + short)
    np.testing.assert_allclose(even, [1 - i / steps for i in range(steps + 1)], rtol=0, atol=1e-14)
    before = [1 - i * (1 - last) / (steps - 1) for i in range(steps)]
    np.testing.assert_allclose(short, [*before, 0], rtol=0, atol=1e-14)
    for bad in ((0,), (-steps,), (steps, 0.0), (steps, 1.0), (steps, -last)):
        with pytest.raises(ValueError):
            flow.time_grid(*bad)


def field(rng):
    """A velocity that depends on state and time, and the times at which it was called."""
    a, b, times = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)), []

    def velocity(x, t):
        times.append(t)
        return (torch.sin(a * x) + b * t * x).double()
    return velocity, times


def falling(rng):
    """Unequal times from 1 to 0."""
    return [1.0, *sorted(rng.uniform(0.05, 0.95, int(rng.integers(3, 8))).tolist(), reverse=True), 0.0]


def test_euler(rng):
    (velocity, _), times, start, states = field(rng), falling(rng), torch.randn(2, 2, 3), []
    found = flow.euler(velocity, start, times, states)
    x = start.double()
    for t, following in zip(times, times[1:]):
        x = x - (t - following) * velocity(x, t)
    assert found.dtype == torch.float32 and [t for t, _ in states] == times
    assert torch.equal(states[0][1], start) and torch.equal(states[-1][1], found)
    close(found, x)


def test_heun(rng):
    (velocity, calls), times, start, states = field(rng), falling(rng), torch.randn(2, 2, 3), []
    found = flow.heun(velocity, start, times, states)
    assert len(calls) == 2 * (len(times) - 1) - 1 and [t for t, _ in states] == times
    x = start.double()
    for t, following in zip(times, times[1:]):
        v = velocity(x, t)
        if following > 0:
            v = (v + velocity(x - (t - following) * v, following)) / 2
        x = x - (t - following) * v
    close(found, x)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_euler_maruyama(path, rng):
    (velocity, _), times, start = field(rng), falling(rng), torch.randn(2, 2, 3)
    noises = torch.randn(len(times), 2, 2, 3).double()
    found = flow.euler_maruyama(velocity, start, times, noise=lambda step: noises[step], path=path)
    x = start.double()
    for step, (t, following) in enumerate(zip(times, times[1:])):
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        v = velocity(x, t)
        score = -(alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma) / sigma
        x = x - (t - following) * (v - sigma * score)
        if following > 0:
            x = x + math.sqrt(2 * sigma * (t - following)) * noises[step]
    assert found.dtype == torch.float32
    close(found, x)


class Model(nn.Module):
    """Velocity = a number for each class; notes the rows of its calls and what else it is given."""

    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.config = sit.SiTConfig(num_latents=2, latent_dim=3, width=8, heads=2, depth=1,
                                    num_classes=len(values) - 1)
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.values, self.rows = nn.Parameter(torch.as_tensor(values).to(dtype)), []

    def forward(self, x, t, y, **more):
        self.rows.append(len(x))
        self.seen = x.dtype, t, more
        return self.values[y][:, None, None].expand_as(x)


def test_call(rng):
    values, t, number = rng.normal(size=6), float(rng.uniform()), float(rng.uniform())
    model, y = Model(values, torch.float32), torch.from_numpy(rng.integers(0, 5, 4))
    found = flow.call(model, torch.randn(4, 2, 3).double(), t, y, number=number)
    close(found, torch.from_numpy(values)[y][:, None, None].expand(4, 2, 3), 1e-6)
    dtype, times, more = model.seen
    assert found.dtype == torch.float64 and dtype == times.dtype == torch.float32
    close(times, torch.full((4,), t), 1e-6)
    assert more.keys() == {"number"}
    close(more["number"], torch.full((4,), number), 1e-6)


def test_inside(rng):
    low, high = sorted(rng.uniform(0.1, 0.9, 2).tolist())
    for t in (low, high, (low + high) / 2, low - 1e-9, high + 1e-9):
        assert flow.inside(t, (low, high)), t
    for t in (0.0, 1.0, low - 1e-3, high + 1e-3):
        assert not flow.inside(t, (low, high)), t


def test_guidance(rng):
    values = rng.normal(size=6)
    model, y = Model(values), torch.from_numpy(rng.integers(0, 5, 4))
    low, high = sorted(rng.uniform(0.1, 0.9, 2))
    scale, x = float(rng.uniform(1.5, 4)), torch.randn(4, 2, 3).double()
    velocity = flow.guided_velocity(model, y, scale, (low, high))
    c = torch.from_numpy(values)[y][:, None, None].expand(4, 2, 3)
    for t, inside in ((low, True), (high, True), ((low + high) / 2, True), (low - 0.01, False),
                      (high + 0.01, False)):
        model.rows.clear()
        close(velocity(x, t, number=t), values[5] + scale * (c - values[5]) if inside else c, 1e-9)
        assert model.rows == [8 if inside else 4]
        close(model.seen[2]["number"], torch.full((8 if inside else 4,), t), 1e-6)
    model.rows.clear()
    close(flow.guided_velocity(model, y)(x, high), c, 1e-9)
    assert model.rows == [4]


def test_guidance_needs_classes():
    model, y = Model([0.5]), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError):
        flow.guided_velocity(model, y, 2.0)
    x = torch.randn(4, 2, 3).double()
    close(flow.guided_velocity(model, y)(x, 0.5), torch.full_like(x, 0.5), 1e-9)


def test_modulate():
    x, shift, scale = torch.randn(2, 5, 3), torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    found = sit.modulate(x, shift, scale)
    for b, i in itertools.product(range(2), range(5)):
        close(found[b, i], x[b, i] + x[b, i] * scale[b, 0] + shift[b, 0])
