"""Hidden tests of A1: against loops and closed forms, on data of a seed (given.py).

A function that returns the numbers of the visible tests fails here. `pytest course/hidden/a1.py` runs
all on the solution.
"""
import itertools

import numpy as np
import pytest
import torch

import hog
import maetok
from course.hidden.given import close, rng  # noqa: F401


def test_patchify(rng):
    P, h, w, c = (int(n) for n in rng.integers(2, 5, 4))
    w += h                                                             # never a square
    images = torch.randn(2, c, h * P, w * P)
    found = maetok.patchify(images, P)
    assert found.shape == (2, h * w, P * P * c)
    for b, i, j in itertools.product(range(2), range(h), range(w)):
        close(found[b, i * w + j],
              images[b, :, i * P:(i + 1) * P, j * P:(j + 1) * P].permute(1, 2, 0).flatten())
    for size in ((h * P + 1, w * P), (h * P, w * P + 1)):
        with pytest.raises(ValueError):
            maetok.patchify(torch.zeros(1, c, *size), P)


def test_rotate():
    x, angle = torch.randn(2, 4, 5, 12), torch.randn(4, 5, 6) * 3
    found = maetok.rotate(x, angle.cos(), angle.sin())
    for i in range(6):
        matrix = torch.stack((torch.stack((angle[..., i].cos(), -angle[..., i].sin()), -1),
                              torch.stack((angle[..., i].sin(), angle[..., i].cos()), -1)), -2)
        turned = (matrix @ x[..., [i, i + 6]][..., None])[..., 0]
        close(found[..., [i, i + 6]], turned)
    assert maetok.rotate(x.bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16


def test_rope_angles(rng):
    rows, columns, others = (int(n) for n in rng.permutation(4)[:3] + 1)
    rope = maetok.RoPE2D(12)
    rope.freqs = torch.rand(3) * 2
    cos, sin = rope((rows, columns), others)
    assert cos.shape == sin.shape == (rows * columns + others, 6)
    for place in range(rows * columns + others):
        inside = place < rows * columns
        col, row = (place % columns, place // columns) if inside else (0, 0)
        angle = torch.cat((col * rope.freqs, row * rope.freqs))
        close(cos[place], angle.cos())
        close(sin[place], angle.sin())


def test_sobel(rng):
    image = torch.randn(1, 2, 6, 9)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    gx, gy = (g.numpy() for g in hog.sobel(image))
    for c, y, x in itertools.product(range(2), range(6), range(9)):
        p = padded[0, c, y:y + 3, x:x + 3]
        sides = [a[0] + 2 * a[1] + a[2] for a in (p[:, 0], p[:, 2], p[0], p[2])]   # left, right, above, below
        assert gx[0, c, y, x] == pytest.approx(sides[0] - sides[1], abs=1e-4)
        assert gy[0, c, y, x] == pytest.approx(sides[2] - sides[3], abs=1e-4)


@pytest.mark.parametrize("cell", [3, 4, 8])
def test_gaussian_window(cell):
    window = hog.gaussian_window(cell)
    assert window.shape == (2 * cell, 2 * cell) and window.dtype == torch.float32
    i = np.arange(2 * cell) - (cell - 0.5)
    oracle = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * cell ** 2))
    close(window, torch.from_numpy(oracle / oracle.sum()), 1e-6)


# An odd number of bins: with an even one pi / 2 is a border of two bins, and at the image's edge rounding
# decides the sign of gy.
@pytest.mark.parametrize("patch, cell, bins", [(8, 4, 9), (4, 4, 7)])
def test_hog_features(patch, cell, bins, rng):
    H, W = 2 * patch, 3 * patch
    images = torch.from_numpy(rng.uniform(-1, 1, (2, 3, H, W))).float()
    found = hog.hog_features(images, patch, cell, bins)
    gx, gy = (g.double().numpy() for g in hog.sobel(images))
    window = np.tile(hog.gaussian_window(cell).numpy(), (H // cell, W // cell))[:H, :W]
    number = np.floor(np.arctan2(gx, gy) % np.pi / np.pi * bins).clip(max=bins - 1)
    side = patch // cell
    assert found.shape == (2, 6, 3 * bins * side ** 2) and found.dtype == torch.float32
    found = found.reshape(2, 2, 3, 3, bins, side, side)          # image, patch row, column, colour, bin, cell
    for b, i, j, c, u, v in itertools.product(range(2), range(2), range(3), range(3),
                                              range(side), range(side)):
        top, left = i * patch + u * cell, j * patch + v * cell
        part = np.s_[top:top + cell, left:left + cell]
        strength = (np.hypot(gx[b, c], gy[b, c]) * window)[part]
        histogram = np.array([strength[number[b, c][part] == k].sum() for k in range(bins)])
        close(found[b, i, j, c, :, u, v], torch.from_numpy(histogram / np.linalg.norm(histogram)), 1e-4)
    assert hog.hog_features(torch.full((1, 3, H, W), rng.uniform(-1, 1)), patch, cell, bins).abs().max() == 0
