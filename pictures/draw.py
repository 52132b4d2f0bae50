"""Everything that is drawn, with Pillow: charts, grids of images, HOG features, training curves.

The panels of a chart are side by side; the series of a panel share its axes, so that they can be compared.
Training curves are one below the other, each with its own axes.
"""
import functools
import math
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd",
           "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#000000", "#98df8a", "#ffbb78", "#393b79")
PANEL, LEFT, RIGHT, TOP, BOTTOM = (460, 340), 64, 14, 30, 44            # px: size of a panel, margins


# ------------------------------------------------- letters -------------------------------------------------

LETTERS = str.maketrans({"ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "Æ": "AE", "œ": "oe",
                         "Œ": "OE", "đ": "d", "Đ": "D", "ı": "i", "–": "-", "—": "-"})


@functools.cache
def _has_glyph(letter):
    """Whether Pillow's own font, which has few more letters than ASCII, draws this one and not a box."""
    font = ImageFont.load_default(14)
    return letter == "\n" or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def drawable(text, number=None):
    """`text` as Pillow's font can draw it: without accents; where letters are missing even then, `number`
    instead of the text, or ? for each where there is no number."""
    if all(map(_has_glyph, text)):
        return text
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text.translate(LETTERS))
                    if not unicodedata.combining(letter))
    if number is not None and not all(map(_has_glyph, plain)):
        return str(number)
    return "".join(letter if _has_glyph(letter) else "?" for letter in plain)


# ------------------------------------------------- charts -------------------------------------------------

def _sheet(panels, names):
    """An empty picture for that many panels, with a legend of `names` below: (image, draw, font)."""
    font, names = ImageFont.load_default(12), [drawable(name, number) for number, name in enumerate(names)]
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
    """Round numbers for an axis from low to high: [(position, number)]; three to seven of them where it is
    linear or spans less than a factor of ten. On a logarithmic axis low, high and positions are exponents
    of 10."""
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
    points: (n, 2), which must lie inside; log: whether x and y are logarithms to base 10."""
    left, top, right, bottom = box
    low, high = np.min(points, 0), np.max(points, 0)
    room = np.where(high > low, 0.03 * (high - low), 0.5)                       # a single value
    low, high = low - room, high + room
    draw.rectangle(box, outline="grey")
    draw.text((left, top - 22), drawable(title), fill="black", font=font)
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
    """The axes of a panel: (left, top, right, bottom) in px."""
    return (panel * PANEL[0] + LEFT, TOP, (panel + 1) * PANEL[0] - RIGHT, PANEL[1] - BOTTOM)


def line_chart(panels, xlabel, log_x=False, log_y=False):
    """A PIL image of lines with marks. panels: title -> {series: [(x, y) or (x, y, lowest, highest), ...]}.

    A whisker goes from lowest to highest. A series has one colour in all panels; a single series needs no
    legend."""
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
    """Points in one colour per class, as a PIL image. panels: title -> (points (n, 2), classes (n,) ints).
    names: of the classes."""
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


# --------------------------------------------- grids of images ---------------------------------------------

def image_grid(rows, titles, cell=96, title_width=150):
    """Rows of images, a title before each, as a PIL image. rows: lists of PIL images, or uint8 (n, 3, H, W).

    Smaller images are enlarged to `cell` px by nearest neighbour, so that single pixels are visible."""
    rows = [[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in row.cpu()]
            if isinstance(row, torch.Tensor) else row for row in rows]
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


def sample_grid(images, labels, names, most=16):
    """Samples (n, H, W, 3) uint8 as a PIL image: a row for each of their labels (n,), of at most `most`.
    names: of the classes, where they are known."""
    classes, order = np.unique(labels), np.argsort(labels, kind="stable")
    tiles = [[Image.fromarray(images[i]) for i in order if labels[i] == c][:most] for c in classes]
    titles = [drawable(names[c], c) if 0 <= c < len(names) else str(c) for c in classes]
    return image_grid(tiles, titles, min(96, 3 * images.shape[1]), title_width=16 + 8 * max(map(len, titles)))


def recon_picture(shown, cell=128):
    """Originals and reconstructions with PSNR. shown: [(uint8 (3, H, W), uint8 (3, H, W), dB)]."""
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


def hog_picture(features, grid, patch_size, cell_size=8, bins=9, pixels_per_cell=24):
    """HOG features as strokes along the edges, brighter for stronger bins; colours are summed.

    features: (N, D_hog) of one image; grid: (rows, columns) of patches. Returns an RGB PIL image.
    """
    (rows, columns), g, s = grid, patch_size // cell_size, pixels_per_cell
    x = features.detach().float().cpu().reshape(rows, columns, -1, bins, g, g).clamp(min=0).sum(2)
    x = x.permute(0, 3, 1, 4, 2).reshape(rows * g, columns * g, bins)        # (cell rows, cell columns, bins)
    x = x / x.max().clamp(min=1e-6)
    greys, weak_first = (255 * x.sqrt()).int().tolist(), x.argsort(-1).tolist()
    angles = [(b + 0.5) * math.pi / bins for b in range(bins)]                # of the gradient, from vertical
    strokes = [(0.48 * s * math.cos(angle), -0.48 * s * math.sin(angle)) for angle in angles]    # of the edge
    picture = Image.new("RGB", (columns * g * s, rows * g * s))
    draw = ImageDraw.Draw(picture)
    for i in range(rows * g):
        for j in range(columns * g):
            centre_x, centre_y = (j + 0.5) * s, (i + 0.5) * s
            for b in weak_first[i][j]:                                        # strong strokes on top
                dx, dy = strokes[b]
                draw.line((centre_x - dx, centre_y - dy, centre_x + dx, centre_y + dy),
                          (greys[i][j][b],) * 3, max(1, s // 12))
    return picture


def mask_out(images, mask, patch_size):
    """Images (B, c, H, W) with the patches of mask (B, N) bool at 0, grey. (In their place the encoder gets a
    learned token.)"""
    rows, columns = (side // patch_size for side in images.shape[-2:])
    hidden = mask.reshape(-1, 1, rows, columns).repeat_interleave(patch_size, 2)
    return images.masked_fill(hidden.repeat_interleave(patch_size, 3), 0)


# --------------------------------------------- training curves ---------------------------------------------

def plot_curves(curves, constants=None, second=None, width=900, height=220):
    """One panel per curve, with a logarithmic axis where the values span a wide range, as a PIL image.
    curves: title -> [(x, y), ...]; values that are not finite and empty curves are left out. constants:
    title -> y of a line across, the best constant prediction's; second: x at which stage 2 begins."""
    curves = {title: [(x, y) for x, y in points if math.isfinite(y)] for title, points in curves.items()}
    curves = {title: list(zip(*points)) for title, points in curves.items() if points}
    sheet = Image.new("RGB", (width, height * len(curves)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, (xs, ys)) in enumerate(curves.items()):
        # a learning rate that falls to 0 is easier to read on a linear axis
        level = (constants or {}).get(title)
        every = [*ys, *([] if level is None else [level])]
        log = min(every) > 0 and 3 < max(every) / min(every) < 1e4
        scale = math.log10 if log else float
        points = [(x, scale(y)) for x, y in zip(xs, ys)]
        box = (LEFT, panel * height + TOP, width - RIGHT, (panel + 1) * height - 24)
        marks = [] if level is None else [(xs[0], scale(level)), (xs[-1], scale(level))]
        to_pixel = _axes(draw, font, box, title + (" (log scale)" if log else ""), "", points + marks,
                         (False, log))
        if marks:
            ends = [to_pixel(*mark) for mark in marks]
            draw.line(ends, fill="darkorange", width=1)
            end_x, end_y = ends[1]
            draw.text((end_x, end_y - 3), "best constant", fill="darkorange", font=font, anchor="rb")
        if second is not None and xs[0] < second <= xs[-1]:
            x = to_pixel(second, points[0][1])[0]
            draw.line((x, box[1], x, box[3]), fill="grey", width=1)
            left = x > width - 80                                                   # no room on the right
            draw.text((x - 3 if left else x + 3, box[1]), "stage 2", fill="grey", font=font,
                      anchor="ra" if left else "la")
        pixels = [to_pixel(*point) for point in points]
        draw.line(pixels if len(pixels) > 1 else pixels * 2, fill="steelblue", width=2)
    return sheet
