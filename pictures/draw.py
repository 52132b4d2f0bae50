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
    curves: title -> [(x, y), ...]; empty ones are left out.

    Returns a PIL image."""
    curves = {title: list(zip(*points)) for title, points in curves.items() if points}
    sheet = Image.new("RGB", (width, height * len(curves)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, (xs, ys)) in enumerate(curves.items()):
        left, right, top, bottom = 70, width - 20, panel * height + 28, (panel + 1) * height - 26
        # a rate that falls to nothing reads better linearly
        log = min(ys) > 0 and 3 < max(ys) / min(ys) < 1e4
        values = [math.log10(y) for y in ys] if log else list(ys)
        low, high = min(values), max(values)
        high += 1e-9 + (high == low)
        first, last = min(xs), max(xs) + (max(xs) == min(xs))
        draw.text((left, top - 22), title + (" (log scale)" if log else ""), fill="black", font=font)
        draw.rectangle((left, top, right, bottom), outline="grey")
        for share in (0, 0.5, 1):
            y = bottom - share * (bottom - top)
            value = low + share * (high - low)
            draw.text((4, y - 8), f"{10 ** value if log else value:.4g}", fill="black", font=font)
            draw.line((left, y, right, y), fill="lightgrey")
            x = left + share * (right - left)
            draw.text((x - 20 * share, bottom + 4), f"{first + share * (last - first):.0f}", fill="black",
                      font=font)
        points = [(left + (x - first) / (last - first) * (right - left),
                   bottom - (v - low) / (high - low) * (bottom - top))
                  for x, v in zip(xs, values)]
        draw.line(points if len(points) > 1 else points * 2, fill="steelblue", width=2)
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
