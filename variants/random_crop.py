"""The released code's random crop of training images, where the paper's Table 7 says "center crop".

    dataset.crop = random_crop        of an ImageDataset (data.py) that trains
"""
import math

from data import resize_short_side


def random_crop(image, size, rng, min_fraction=0.8):
    """A random square of 80 to 100 % of the short side. RGB PIL image -> uint8 (3, size, size).
    [released code]"""
    pixels = resize_short_side(image, int(rng.integers(size, math.ceil(size / min_fraction) + 1)))
    _, H, W = pixels.shape
    left, top = rng.integers(0, W - size + 1), rng.integers(0, H - size + 1)
    return pixels[:, top:top + size, left:left + size]
