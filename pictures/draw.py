"""All that is drawn, with Pillow: charts for evaluate.py and the study, grids of images, training curves.

The panels of a chart stand side by side; the series of a panel share its axes, which is what comparing them
needs. Training curves stand one below the other, each with axes of its own.
"""
import math

import numpy as np
import torch
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


def _ticks(low, high, log):
    """Round numbers for an axis from low to high, three to seven of them where it is linear or spans less
    than ten times: [(position, number)]. On a logarithmic axis low, high and positions are exponents of 10.
    """
    if log and high - low >= 1:
        digits = (1, 2, 5) if high - low < 2 else (1,)
        numbers = [d * 10.0 ** e for e in range(math.floor(low), math.ceil(high) + 1) for d in digits]
        numbers = [n for n in numbers if low <= math.log10(n) <= high]
    else:
        first, last = (10 ** low, 10 ** high) if log else (low, high)
        unit = 10.0 ** math.floor(math.log10(last - first))
        count = lambda step: math.floor(last / step) - math.ceil(first / step) + 1
        step = next(unit * d for d in (5, 2, 1, 0.5, 0.2) if count(unit * d) >= 3)
        numbers = [step * n for n in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return [(math.log10(n) if log else n, n) for n in numbers]


def _axes(draw, font, box, title, xlabel, points, log):
    """Frame, title and ticks in `box` (left, top, right, bottom); returns the function from data to pixels.
    points: (n, 2), what has to lie inside; log: whether (x, y) hold logarithms to base 10."""
    left, top, right, bottom = box
    low, high = np.min(points, 0), np.max(points, 0)
    room = np.where(high > low, 0.03 * (high - low), 0.5)                       # one value: any range will do
    low, high = low - room, high + room
    draw.rectangle(box, outline="grey")
    draw.text((left, top - 22), title, fill="black", font=font)
    draw.text(((left + right) / 2, bottom + 34), xlabel, fill="black", font=font, anchor="mm")
    to_pixel = lambda x, y: (left + (x - low[0]) / (high[0] - low[0]) * (right - left),
                             bottom - (y - low[1]) / (high[1] - low[1]) * (bottom - top))
    for x, number in _ticks(low[0], high[0], log[0]):
        px = to_pixel(x, 0)[0]
        draw.line((px, bottom, px, bottom + 4), fill="grey")
        draw.text((px, bottom + 12), f"{number:.6g}", fill="black", font=font, anchor="mm")
    for y, number in _ticks(low[1], high[1], log[1]):
        py = to_pixel(0, y)[1]
        draw.line((left + 1, py, right - 1, py), fill="lightgrey")
        draw.text((left - 6, py), f"{number:.6g}", fill="black", font=font, anchor="rm")
    return to_pixel


def _box(panel):
    """Where the axes of a panel stand, (left, top, right, bottom) in px."""
    return (panel * PANEL[0] + LEFT, TOP, (panel + 1) * PANEL[0] - RIGHT, PANEL[1] - BOTTOM)


def line_chart(panels, xlabel, log_x=False, log_y=False):
    """panels: title -> {name of a series: [(x, y) or (x, y, lowest y, highest y), ...]}. Marks at the points,
    a whisker from lowest to highest; a legend below where there is more than one series, each in one colour
    in all panels. Returns a PIL image."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    sheet, draw, font = _sheet(len(panels), names if len(names) > 1 else [])
    scale = [math.log10 if log else float for log in (log_x, log_y)]
    for panel, (title, series) in enumerate(panels.items()):
        series = {name: [(scale[0](x), *map(scale[1], ys)) for x, *ys in points]
                  for name, points in series.items()}
        every = [(x, y) for points in series.values() for x, *ys in points for y in ys]
        to_pixel = _axes(draw, font, _box(panel), title, xlabel, every, (log_x, log_y))
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
        to_pixel = _axes(draw, font, _box(panel), title, "", points, (False, False))
        for point, label in zip(points, classes):
            x, y = to_pixel(*point)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLOURS[label % len(COLOURS)])
    return sheet


def sheet_of(charts, columns=2):
    """PIL images on one sheet, row by row."""
    width, height = (max(getattr(chart, side) for chart in charts) for side in ("width", "height"))
    sheet = Image.new("RGB", (width * min(columns, len(charts)), height * -(-len(charts) // columns)),
                      "white")
    for number, chart in enumerate(charts):
        sheet.paste(chart, (number % columns * width, number // columns * height))
    return sheet


# ---------------------------------------- grids and training curves ----------------------------------------

def image_grid(rows, titles, cell=96, title_width=150):
    """Rows of images under one another, a title before each.
    rows: lists of PIL images, or uint8 (n, 3, H, W) tensors.

    Images are brought to `cell` px by nearest neighbour when they are smaller, so that pixels stay pixels.
    """
    rows = [[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in row.cpu()]
            if isinstance(row, torch.Tensor) else row
            for row in rows]
    height = [max(cell, row[0].height if row else 0) for row in rows]
    width = max((max(cell, i.width) for row in rows for i in row), default=cell)
    columns, gap = max(map(len, rows)), 4
    sheet = Image.new("RGB", (title_width + columns * (width + gap), sum(height) + gap * len(rows)), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for row, title, h in zip(rows, titles, height, strict=True):
        draw.multiline_text((6, y + h // 2 - 8 * len(title.split("\n"))), title, fill="black", font=font)
        for column, image in enumerate(row):
            if image.size != (width, h):
                shrinks = image.width > width or image.height > h
                image = image.resize((width, h), Image.BICUBIC if shrinks else Image.NEAREST)
            sheet.paste(image, (title_width + column * (width + gap), y))
        y += h + gap
    return sheet


def plot_curves(curves, width=900, height=220):
    """One panel a curve, log scale where the values call for it.
    curves: title -> [(x, y), ...]; what is not finite is left out, and so are empty ones.

    Returns a PIL image."""
    curves = {title: [(x, y) for x, y in points if math.isfinite(y)] for title, points in curves.items()}
    curves = {title: list(zip(*points)) for title, points in curves.items() if points}
    sheet = Image.new("RGB", (width, height * len(curves)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, (xs, ys)) in enumerate(curves.items()):
        # a rate that falls to nothing reads better linearly
        log = min(ys) > 0 and 3 < max(ys) / min(ys) < 1e4
        points = [(x, math.log10(y) if log else y) for x, y in zip(xs, ys)]
        box = (LEFT, panel * height + TOP, width - RIGHT, (panel + 1) * height - 24)
        to_pixel = _axes(draw, font, box, title + (" (log scale)" if log else ""), "", points, (False, log))
        pixels = [to_pixel(*point) for point in points]
        draw.line(pixels if len(pixels) > 1 else pixels * 2, fill="steelblue", width=2)
    return sheet


def recon_picture(shown, cell=128):
    """Originals over reconstructions, each with its PSNR. shown: [(uint8 (3, H, W), uint8 (3, H, W), dB)]."""
    tiles, font = ([], []), ImageFont.load_default(13)
    for original, redrawn, value in shown:
        for row, image in zip(tiles, (original, redrawn)):
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
            side = max(cell, image.width)
            row.append(image.resize((side, side), Image.NEAREST))
        captioned = Image.new("RGB", (side, side + 20), "white")
        captioned.paste(tiles[1][-1])
        ImageDraw.Draw(captioned).text((side / 2, side + 9), f"{value:.2f} dB", fill="black", font=font,
                                       anchor="mm")
        tiles[1][-1] = captioned
    return image_grid(list(tiles), ["original", "reconstruction"], cell=cell)
