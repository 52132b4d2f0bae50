"""hog.py against a loop over pixels written from the definition, and scikit-image where the two recipes
coincide."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hog
from hog import gaussian_window, hog_dim, hog_features, sobel
from pictures.draw import hog_picture


def naive_hog(image, patch, cell=8, bins=9):
    """(3, H, W) float64 -> (N, D): MaskFeat's definition, one pixel at a time."""
    C, H, W = image.shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    i = np.arange(2 * cell) - (2 * cell - 1) / 2
    w = np.exp(-i ** 2 / (2 * cell ** 2))
    window = np.outer(w, w) / np.outer(w, w).sum()
    histogram = np.zeros((C, H // cell, W // cell, bins))
    for c in range(C):
        for y in range(H):
            for x in range(W):
                around = padded[c, y:y + 3, x:x + 3]
                gx, gy = (around * kernel).sum(), (around * kernel.T).sum()
                b = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                histogram[c, y // cell, x // cell, b] += (
                    math.hypot(gx, gy) * window[y % (2 * cell), x % (2 * cell)])
    histogram /= np.maximum(np.linalg.norm(histogram, axis=-1, keepdims=True), 1e-12)
    g, features = patch // cell, []
    for row in range(H // patch):
        for column in range(W // patch):
            block = histogram[:, row * g:(row + 1) * g, column * g:(column + 1) * g]        # (C, g, g, bins)
            features.append(block.transpose(0, 3, 1, 2).reshape(-1))
    return np.stack(features)


def test_sobel_sums_in_the_order_of_a_convolution():
    """Kernel row by row from the left, in float32: another order turns exact zeros into +-1e-8, and bins
    flip. Equality is by construction: each operation is rounded once, and doubling is exact."""
    image = torch.rand(1, 1, 9, 11, generator=torch.Generator().manual_seed(3))
    padded = np.pad(image[0, 0].numpy(), 1, mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
    for found, k in zip(sobel(image), (kernel, kernel.T)):
        for y in range(9):
            for x in range(11):
                total = np.float32(0)
                for i in range(3):
                    for j in range(3):
                        total = np.float32(total + np.float32(k[i, j] * padded[y + i, x + j]))
                assert found[0, 0, y, x].item() == total


def clear_images(*shape):
    """Images in which rounding, and so the order in which sobel sums, decides no bin: there is no gradient in
    the first and last column, where gx is 0 and on a bin's border, and no other angle is close to one."""
    while True:
        images = torch.rand(shape) * 2 - 1
        for column in (0, 1, -2, -1):
            images[..., column] = images[..., :1, column]
        padded = F.pad(images.double(), (0, 0, 1, 1), mode="reflect").flatten(0, 1)[:, None]
        kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).double()
        gx, gy = F.conv2d(padded, torch.stack((kernel, kernel.T))[:, None]).unbind(1)
        place = torch.atan2(gx, gy) / math.pi * 9
        if (place - place.round()).abs().min() > 1e-5:
            return images


@pytest.mark.parametrize("shape, patch, cell",
                         [((32, 48), 16, 8), ((24, 24), 8, 8), ((16, 16), 8, 4), ((12, 12), 4, 4)])
def test_equals_the_pixel_loop(shape, patch, cell):
    images = clear_images(2, 3, *shape)
    ours = hog_features(images, patch, cell)
    assert ours.dtype == torch.float32 and ours.shape[-1] == hog_dim(patch, cell)
    for image, features in zip(images, ours):
        np.testing.assert_allclose(features.numpy(), naive_hog(image.double().numpy(), patch, cell),
                                   atol=2e-5)


def test_equals_scikit_image_where_the_recipes_coincide(monkeypatch):
    # On a sum of a row profile and a column profile Sobel is 4 x the central difference. scikit-image has no
    # Gaussian window and counts the angle from the other axis (hence the transposed image);
    # the border differs by design.
    monkeypatch.setattr(hog, "gaussian_window", lambda cell, device: torch.ones(2 * cell, 2 * cell))
    skimage_hog = pytest.importorskip("skimage.feature").hog
    rng = np.random.default_rng(0)
    image = rng.normal(size=(40, 1)).cumsum(0) + rng.normal(size=(1, 40)).cumsum(1)
    ours = hog_features(torch.tensor(image).float().expand(1, 3, 40, 40), 8)[0].reshape(5, 5, 3, 9)
    theirs = skimage_hog(image.T, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1),
                         block_norm="L2", feature_vector=False)[:, :, 0, 0].transpose(1, 0, 2)
    np.testing.assert_allclose(ours[1:-1, 1:-1, 0].numpy(), theirs[1:-1, 1:-1], atol=1e-4)


def test_sobel_is_a_correlation_with_the_kernel():
    images = torch.rand(2, 3, 9, 7)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    for found, k in zip(sobel(images), (kernel, kernel.T)):
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect").reshape(6, 1, 11, 9)
        oracle = F.conv2d(padded, k[None, None]).reshape(2, 3, 9, 7)
        torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-5)


def test_sobel_signs_and_padding():
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)                        # brighter to the right
    gx, gy = sobel(ramp)
    with torch.autocast("cpu", torch.bfloat16):
        assert sobel(ramp)[0].dtype == torch.float32
    assert (gx[..., 1:-1] == -8).all() and (gx[..., [0, -1]] == 0).all() and (gy == 0).all()


def test_108_values_at_256_and_512_and_the_order_of_images_in_large_batches():
    assert hog_dim(16) == 108
    for size in (256, 512):
        images = torch.rand(6, 3, size, size) * 2 - 1                  # more than one CPU group
        features = hog_features(images, 16)
        assert features.shape == (6, (size // 16) ** 2, 108)
        assert torch.equal(features[5], hog_features(images[5:], 16)[0])


def test_every_cell_has_unit_norm_and_flat_images_are_zero():
    features = hog_features(torch.rand(1, 3, 32, 32), 16).reshape(4, 3, 9, 4)
    torch.testing.assert_close(features.norm(dim=2), torch.ones(4, 3, 4))
    for grey in range(0, 256, 5):
        assert (hog_features(torch.full((1, 3, 32, 32), grey / 127.5 - 1), 16) == 0).all()
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1 / 127.5                                             # one grey level, the faintest edge
    assert hog_features(step, 16).reshape(4, 3, 9, 4).norm(dim=2).max() == pytest.approx(1)


def test_computed_in_float32_from_bfloat16_images_too():
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).bfloat16()
    expected = hog_features(images.float(), 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog_features(images, 16), expected)
    assert torch.equal(hog_features(images, 16), expected)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16-px patches"):
        hog_features(torch.zeros(1, 3, 24, 32), 16)
    with pytest.raises(ValueError, match="do not fill"):
        hog_features(torch.zeros(1, 3, 24, 24), 12, 8)


def test_window_is_the_16_pixel_gaussian():
    window = gaussian_window(8)
    assert window.shape == (16, 16) and abs(window.sum().item() - 1) < 1e-6
    assert abs((window[0, 0] / window[7, 7]).item() - math.exp(-(7.5 ** 2 - 0.5 ** 2) / 64)) < 1e-5


def test_picture_strokes_run_along_the_edge():
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1                                                 # a vertical edge
    picture = np.asarray(hog_picture(hog_features(image, 8)[0], (1, 1), 8,
                                     pixels_per_cell=48))[..., 0].astype(float)
    ys, xs = np.nonzero(picture > 100)
    assert np.ptp(ys) > 3 * np.ptp(xs)
