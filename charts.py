"""Line and scatter charts drawn with Pillow, for evaluate.py; training curves are common.plot_curves's.

Panels stand side by side; the series of a panel share its axes, which is what comparing them needs.
"""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd",
           "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#000000", "#98df8a", "#ffbb78", "#393b79")
PANEL, LEFT, RIGHT, TOP, BOTTOM = (460, 340), 64, 14, 30, 44            # px: size of a panel, its margins


def _sheet(panels, names):
    """An empty picture for that many panels, the names in their colours below them: (image, draw, font)."""
    font = ImageFont.load_default(12)
    width = 16 + max((math.ceil(font.getlength(name)) for name in names), default=0)
    columns = max(1, (PANEL[0] * panels - LEFT) // width)
    height = 8 + 16 * -(-len(names) // columns) if names else 0
    sheet = Image.new("RGB", (PANEL[0] * panels, PANEL[1] + height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(names):
        draw.text((LEFT + number % columns * width, PANEL[1] + 4 + 16 * (number // columns)), name,
                  fill=COLOURS[number % len(COLOURS)], font=font)
    return sheet, draw, font


def _axes(draw, font, panel, title, xlabel, low, high, unscale):
    """Frame, title and three ticks a side; returns the function from data to pixels. low, high: (x, y)."""
    left, right = panel * PANEL[0] + LEFT, (panel + 1) * PANEL[0] - RIGHT
    top, bottom = TOP, PANEL[1] - BOTTOM
    high = [h if h > l else l + 1 for l, h in zip(low, high)]                   # one value: any range will do
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.text((left, 8), title, fill="black", font=font)
    draw.text(((left + right) / 2, PANEL[1] - 10), xlabel, fill="black", font=font, anchor="mm")
    to_pixel = lambda x, y: (left + (x - low[0]) / (high[0] - low[0]) * (right - left),
                             bottom - (y - low[1]) / (high[1] - low[1]) * (bottom - top))
    for share in (0, 0.5, 1):
        x, y = (l + share * (h - l) for l, h in zip(low, high))
        px, py = to_pixel(x, y)
        draw.line((left, py, right, py), fill="lightgrey")
        draw.text((px, bottom + 10), f"{unscale[0](x):.5g}", fill="black", font=font,
                  anchor={0: "lm", 0.5: "mm", 1: "rm"}[share])
        draw.text((left - 4, py), f"{unscale[1](y):.4g}", fill="black", font=font, anchor="rm")
    return to_pixel


def line_chart(panels, xlabel, log_x=False, log_y=False):
    """panels: title -> {name of a series: [(x, y) or (x, y, lowest y, highest y), ...]}. Marks at the points,
    a whisker from lowest to highest; a legend below where there is more than one series, each in one colour
    in all panels. Returns a PIL image."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    sheet, draw, font = _sheet(len(panels), names if len(names) > 1 else [])
    scale = [math.log10 if log else float for log in (log_x, log_y)]
    unscale = [(lambda v: 10 ** v) if log else float for log in (log_x, log_y)]
    for panel, (title, series) in enumerate(panels.items()):
        series = {name: [(scale[0](x), *map(scale[1], ys)) for x, *ys in points]
                  for name, points in series.items()}
        every = np.array([(x, y) for points in series.values() for x, *ys in points for y in ys])
        to_pixel = _axes(draw, font, panel, title, xlabel, every.min(0), every.max(0), unscale)
        for name, points in series.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            pixels = [to_pixel(x, y) for x, y, *_ in points]
            draw.line(pixels, fill=colour, width=2)
            for x, y in pixels:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            for x, _, *spread in points:
                draw.line([to_pixel(x, y) for y in spread], fill=colour, width=3)
    return sheet


def scatter_chart(panels, names):
    """panels: title -> (points (n, 2), classes (n,) ints below len(names)). One colour a class, the legend
    below. Returns a PIL image."""
    sheet, draw, font = _sheet(len(panels), names)
    for panel, (title, (points, classes)) in enumerate(panels.items()):
        to_pixel = _axes(draw, font, panel, title, "", points.min(0), points.max(0), (float, float))
        for point, label in zip(points, classes):
            x, y = to_pixel(*point)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLOURS[label % len(COLOURS)])
    return sheet
