"""The built-in data set: ten classes of shapes, drawn at any size. No files.

A sample is a function of (seed, split, index) alone; images are PIL RGB. The demo, the tests and the course
use these pictures.
"""
import numpy as np
from PIL import Image, ImageDraw

from common import sample_rng


def _circle(radius=1.0, centre=(0.0, 0.0), points=48):
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack((centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)), -1)


def _regular(points, radii=(1.0,)):
    angle = np.arange(points) * 2 * np.pi / points - np.pi / 2                    # the first corner points up
    radius = np.resize(radii, points)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((16 * np.sin(t) ** 3, -y - 2.5), -1) / 18.2          # within the unit circle


# Class name -> outline, and hole (drawn in the background colour), in units of the shape's radius; y points
# down. Every outline lies within the unit circle, so no rotation moves a shape out of the picture.
SHAPES = {
    "circle": (_circle(0.9), None),
    "square": (0.7 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), None),
    "triangle": (_regular(3), None),
    "star": (_regular(10, (1.0, 0.42)), None),
    "plus": (0.95 * np.array([(-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33), (.33, 1),
                              (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33)]), None),
    "ring": (_circle(0.95), _circle(0.55)),
    "heart": (_heart(), None),
    "moon": (_circle(0.95), _circle(0.8, (0.5, -0.15))),
    "arrow": (np.array([(0, -1), (.8, -.05), (.3, -.05), (.3, .95), (-.3, .95), (-.3, -.05), (-.8, -.05)]),
              None),
    "hourglass": (0.76 * np.array([(-.85, -1), (.85, -1), (.12, 0), (.85, 1), (-.85, 1), (-.12, 0)]), None),
}


class Shapes:
    """One flat-coloured shape on a flat background, antialiased, at any size.

    Class, position, radius, rotation (up to 20 degrees either way) and both colours vary. Colours do not
    depend on the class and either may be the brighter one, so no linear classifier of pixels can tell the
    classes apart. Sample i has class i mod 10. Train and test images come from different random streams.
    """
    classes = list(SHAPES)

    def __init__(self, split, size, seed, test_images=10_000):
        self.size, self.seed, self.stream = size, seed, f"shapes-{split}"
        self.length = None if split == "train" else test_images                    # None: endless

    def fingerprint(self):
        """A text that tells this source from any other, for the key of a cache."""
        return f"{self.stream} seed {self.seed} size {self.size}"

    def colours(self, index):
        """(generator, background, colour) of a sample: two RGB arrays, and the generator that drew them."""
        rng = sample_rng(self.seed, self.stream, 0, index)
        while True:
            background, colour = rng.integers(32, 224, (2, 3))
            # The luminances must differ (weights of ITU-R 601), or edges could be in one channel only.
            if abs((colour - background) @ (0.299, 0.587, 0.114)) > 50:
                return rng, background, colour

    def __getitem__(self, index):
        label = index % len(SHAPES)
        rng, background, colour = self.colours(index)
        radius = rng.uniform(0.34, 0.44)
        centre = 0.5 + rng.uniform(-1, 1, 2) * min(0.1, 0.47 - radius)       # the whole shape stays inside
        angle = np.deg2rad(rng.uniform(-20, 20))
        rotation = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        oversampling = 4 if self.size <= 128 else 2
        scale = self.size * oversampling
        coverage = Image.new("L", (scale, scale), 0)
        draw = ImageDraw.Draw(coverage)
        for outline, value in zip(SHAPES[self.classes[label]], (255, 0)):
            if outline is not None:
                points = (outline @ rotation * radius + centre) * scale - 0.5
                draw.polygon([tuple(p) for p in points.tolist()], fill=value)
        coverage = coverage.reduce(oversampling)                               # box filter
        image = Image.new("RGB", coverage.size, tuple(background.tolist()))
        image.paste(tuple(colour.tolist()), mask=coverage)
        return image, label
