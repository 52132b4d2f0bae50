"""Hidden tests of A1: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a1.py` runs
all on the solution.
"""
import contextlib

import numpy as np
import pytest
import torch

import hog
import maetok
from course.hidden.given import close, rng, same_gradients, strided, unchanged  # noqa: F401


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patchify(channels, rng):
    P, h, w = (int(n) for n in rng.integers(2, 5, 3))
    w += h                                                             # never a square
    images = torch.randn(2, channels, h * P, w * P, requires_grad=True)
    with unchanged(images):
        found = maetok.patchify(images, P)
    expected = torch.stack([images[:, :, i * P:(i + 1) * P, j * P:(j + 1) * P].permute(0, 2, 3, 1).flatten(1)
                            for i in range(h) for j in range(w)], 1)
    assert torch.equal(found, expected)
    same_gradients(found, expected, images)
    assert torch.equal(maetok.patchify(strided(images), P), expected)
    for dtype in (torch.bfloat16, torch.float64):
        half = maetok.patchify(images.to(dtype), P)
        assert half.dtype == dtype and torch.equal(half, expected.to(dtype))
    assert torch.equal(maetok.patchify(images, 1), images.flatten(2).transpose(1, 2))
    square = images[..., :h * P]
    assert torch.equal(maetok.patchify(square, h * P), square.permute(0, 2, 3, 1).reshape(2, 1, -1))
    for size in ((h * P + 1, w * P), (h * P, w * P + 1), (h * P + 1, w * P - 1)):
        with pytest.raises(ValueError):
            maetok.patchify(torch.zeros(1, channels, *size), P)


@pytest.mark.parametrize("pairs", [1, 6])
def test_rotate(pairs):
    x, angle = torch.randn(2, 4, 5, 2 * pairs, requires_grad=True), torch.randn(4, 5, pairs) * 3
    angle.requires_grad_()
    cos, sin = angle.cos(), angle.sin()
    with unchanged(x, cos, sin):
        found = maetok.rotate(x, cos, sin)
    columns = [None] * 2 * pairs
    for i in range(pairs):
        matrix = torch.stack((torch.stack((angle[..., i].cos(), -angle[..., i].sin()), -1),
                              torch.stack((angle[..., i].sin(), angle[..., i].cos()), -1)), -2)
        columns[i], columns[i + pairs] = (matrix @ x[..., [i, i + pairs]][..., None])[..., 0].unbind(-1)
    same_gradients(found, torch.stack(columns, -1), x, angle)
    with torch.no_grad():
        with unchanged(x, cos, sin):                # without a graph in-place changes would go unnoticed
            maetok.rotate(x.detach(), cos, sin)
        close(maetok.rotate(strided(x), cos, sin), found)
        for some in (angle[0], angle[:1], angle[None].repeat(2, 1, 1, 1)):        # (T, hs/2), one head, all
            every = some.expand(2, 4, 5, pairs)
            close(maetok.rotate(x, some.cos(), some.sin()), maetok.rotate(x, every.cos(), every.sin()))
        with torch.autocast("cpu", torch.bfloat16):
            assert maetok.rotate(x, cos, sin).dtype == torch.float32
            close(maetok.rotate(x, cos, sin), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotate_is_computed_in_float32(dtype):
    """Rounded once, at the end."""
    x, angle = torch.randn(2, 4, 5, 12).to(dtype), torch.randn(4, 5, 6)
    (a, b), cos, sin = x.double().chunk(2, -1), angle.cos(), angle.sin()
    exact = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    found = maetok.rotate(x, cos, sin)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 2e-6).all()


def test_rope_angles(rng, monkeypatch):
    rope = maetok.RoPE2D(12)
    rows, columns, others = (int(n) for n in rng.permutation(4)[:3] + 2)
    for grid, after in ((((rows, columns), others),) * 2 + (((1, columns), 0), ((rows, 1), 1))):
        freqs = (torch.rand(3) * 2).requires_grad_()
        rope.freqs = freqs
        cos, sin = rope(grid, after)
        angles = [torch.cat((col * freqs, row * freqs)) for row in range(grid[0]) for col in range(grid[1])]
        angle = torch.stack([*angles, *[0 * torch.cat((freqs, freqs))] * after])
        assert cos.dtype == sin.dtype == torch.float32 and rope.freqs is freqs
        same_gradients(cos, angle.cos(), freqs)
        same_gradients(sin, angle.sin(), freqs)
        with unchanged(freqs), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            again = rope(grid, others=after)
        assert again[0].dtype == again[1].dtype == torch.float32
        close(torch.stack(again), torch.stack((cos, sin)))
    # A device without values, which autocast refuses: a tensor that is made elsewhere fails as on a GPU.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    assert all(made.device.type == "meta" for made in maetok.RoPE2D(12).to("meta")((2, 3), 2))


def correlations(images):
    """gx and gy of float64 numpy images (B, C, H, W), one kernel entry after the other."""
    (H, W), kernel = images.shape[-2:], np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    return [sum(k[i, j] * padded[..., i:i + H, j:j + W] for i in range(3) for j in range(3))
            for k in (kernel, kernel.T)]


@pytest.mark.parametrize("shape", [(2, 4, 6, 9), (1, 1, 2, 3), (2, 3, 7, 2)])
def test_sobel(shape):
    image = torch.randn(shape)
    expected = [torch.from_numpy(g) for g in correlations(image.double().numpy())]
    with unchanged(image):
        found = hog.sobel(image)
    for made in (found, hog.sobel(strided(image))):
        assert all(g.dtype == torch.float32 for g in made)
        for g, oracle in zip(made, expected, strict=True):
            close(g, oracle)
    with torch.autocast("cpu", torch.bfloat16):
        under = hog.sobel(image)
    for g, oracle in zip(under, expected):
        assert g.dtype == torch.float32
        close(g, oracle)


@pytest.mark.parametrize("cell", [1, 3, 4, 8])
def test_gaussian_window(cell):
    with torch.autocast("cpu", torch.bfloat16):
        window = hog.gaussian_window(cell)
    assert window.shape == (2 * cell, 2 * cell) and window.dtype == torch.float32
    i = np.arange(2 * cell) - (cell - 0.5)
    oracle = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * cell ** 2))
    close(window, torch.from_numpy(oracle / oracle.sum()), 1e-6)
    assert hog.gaussian_window(cell, "meta").device.type == "meta"


def clear_images(shape, bins, rng):
    """float32 images and their gradients, such that rounding decides no bin.

    The values are multiples of 1/64: the gradients are exact, in whatever order they are summed. No angle is
    close to the border of two bins, but for gx = 0, which is exactly on one: bin 0. (gy = 0 is a border too
    where the number of bins is even.)
    """
    while True:
        images = rng.integers(-64, 65, shape) / 64
        gx, gy = correlations(images)
        place = np.arctan2(gx, gy) / np.pi * bins
        if (np.abs(place - np.round(place))[gx != 0] > 1e-5).all():
            return torch.from_numpy(images).float(), np.hypot(gx, gy), (np.floor(place) % bins).astype(int)


@pytest.mark.parametrize("patch, cell, bins", [(8, 4, 9), (4, 4, 7), (8, 2, 5), (3, 3, 1)])
def test_hog_features(patch, cell, bins, rng, monkeypatch):
    H, W, side = 2 * patch, 3 * patch, patch // cell
    images, magnitude, number = clear_images((3, 3, H, W), bins, rng)
    with unchanged(images):
        found = hog.hog_features(images, patch, cell, bins)
    i = np.arange(2 * cell) - (cell - 0.5)
    window = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * cell ** 2))
    strength = magnitude * np.tile(window / window.sum(), (H // cell, W // cell))[:H, :W]
    cells = lambda x: x.reshape(3, 3, H // cell, cell, W // cell, cell).sum((3, 5))
    histogram = np.stack([cells(strength * (number == k)) for k in range(bins)], -1)
    histogram /= np.linalg.norm(histogram, axis=-1, keepdims=True)
    patches = [histogram[:, :, row:row + side, column:column + side]
               for row in (0, side) for column in (0, side, 2 * side)]
    expected = torch.from_numpy(np.stack([p.transpose(0, 1, 4, 2, 3).reshape(3, -1) for p in patches], 1))
    assert found.dtype == torch.float32 and not found.requires_grad
    close(found, expected, 2e-5)
    for same in (strided(images), images.double(), images.bfloat16(), images.clone().requires_grad_()):
        found = hog.hog_features(same, patch, cell, bins)                      # n / 64 is exact in bfloat16
        assert found.dtype == torch.float32
        close(found, expected, 2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        close(hog.hog_features(images, patch, cell, bins), expected, 2e-5)
    for pixels in (1, H * W, 2 * H * W):                                # groups of one image, of two and one
        monkeypatch.setattr(hog, "CPU_PIXELS", pixels)
        close(hog.hog_features(images, patch, cell, bins), expected, 2e-5)


def test_hog_features_of_flat_and_faint_images(rng):
    """A gradient counts from 1e-5 on, that of a ramp is 8 times its step."""
    assert hog.hog_features(torch.full((1, 3, 16, 24), rng.uniform(-1, 1)), 8, 4).abs().max() == 0
    ramp = torch.arange(24.0).expand(1, 3, 16, 24)
    assert hog.hog_features(ramp * 1e-6, 8, 4).abs().max() == 0
    for step in (2e-6, float(rng.uniform(4e-6, 9e-6)), 1e-3):
        features = hog.hog_features(ramp * step, 8, 4).reshape(1, 6, 3, 9, 2, 2)
        close(features.norm(dim=3), torch.ones(1, 6, 3, 2, 2))
        close(features[:, :, :, :, 0, 0].max(3)[0], torch.ones(1, 6, 3))
    edge = torch.ones(1, 3, 16, 24)
    edge[..., 8:, :] = -1
    edge[..., ::3] -= 2 ** -23                              # angles of about -6e-8: the last bin or the first
    close(hog.hog_features(edge, 8, 4).reshape(1, 6, 3, 9, 4).norm(dim=3).amax(3), torch.ones(1, 6, 3))


@pytest.mark.parametrize("size, patch, cell", [((16, 12), 8, 4), ((12, 16), 8, 4), ((12, 12), 8, 4),
                                               ((12, 12), 6, 4), ((16, 16), 4, 8)])
def test_hog_features_of_sizes_that_do_not_fit(size, patch, cell):
    with pytest.raises(ValueError):
        hog.hog_features(torch.zeros(2, 3, *size), patch, cell)
