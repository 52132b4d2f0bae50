"""Keep docs/reading.md true, and make one offline HTML page of it.

    python docs/reading.py                    # cut the code on the page from the sources again
    python docs/reading.py --figures          # also draw docs/figures again, from the model in assets/
    python docs/reading.py --figures RUN      # and the sheet of HOG, from a run of stage 1 (see the page)
    python docs/reading.py --html OUT.html    # the page, with everything inside: `make read`

On the page a comment says what the block of code below it is:

    <!-- code: maetok.py patchify: x = images ... return x -->

the lines of that function from the first one that contains "x = images" to the next one that contains
"return x". ` | ` joins several such ranges to one block. `<!-- output: shapes -->` stands above what `shapes`
below prints. The rest of the page is written by hand.
"""
import argparse
import ast
import base64
import html
import math
import os
import re
import sys
import textwrap
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

PAGE, FIGURES = ROOT / "docs/reading.md", ROOT / "docs/figures"
LONGEST = 12                           # lines of a block
FENCE = r"(?:\[`.*\n\n)?```%s\n((?:(?!```).*\n)*)```\n"       # a link to the definition, a block of code
BLOCK = re.compile(r"(<!-- code: (\S+\.py) ([\w.]+): (.+?) -->\n)(?:%s)?" % FENCE % "python")
OUTPUT = re.compile(r"(<!-- output: (\w+) -->\n)(?:%s)?" % FENCE % "text")


# ------------------------------------------------ excerpts ------------------------------------------------

class Gone(Exception):
    """An excerpt that the sources no longer have; the text says which."""


def definition(source, name):
    """(first, last) line of `name`, such as Class.method, in a Python source, or None."""
    body, node = ast.parse(source).body, None
    for part in name.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part), None)
        if node is None:
            return None
        body = node.body
    return node.lineno, node.end_lineno


def excerpt(file, name, ranges):
    """The lines that a comment on the page names: (line of the definition, text)."""
    where = f"docs/reading.md: {file}, {name}"
    if not (ROOT / file).exists():
        raise Gone(f"{where}: there is no such file")
    source = (ROOT / file).read_text()
    found = definition(source, name)
    if found is None:
        raise Gone(f"{where}: there is no such function or class")
    lines, parts, at = source.splitlines()[found[0] - 1:found[1]], [], 0
    for part in ranges.split(" | "):
        first, *last = part.split(" ... ")
        index = []
        for text in (first, *last):
            at = next((i for i in range(at, len(lines)) if text in lines[i]), None)
            if at is None:
                after = " after those before it" if index else ""
                raise Gone(f"{where}: no line contains `{text}`{after}")
            index.append(at)
        parts.append(textwrap.dedent("\n".join(lines[index[0]:index[-1] + 1])))
        at = index[-1] + 1
    text = "\n".join(parts)
    if len(text.splitlines()) > LONGEST:
        raise Gone(f"{where}: {len(text.splitlines())} lines, more than {LONGEST}")
    return found[0], text


def with_excerpts(page):
    """The page with every block of code, and every printed output, as it is now."""
    def code(match):
        comment, file, name, ranges, _ = match.groups()
        line, text = excerpt(file, name, ranges)
        return f"{comment}[`{Path(file).stem}.{name}`](../{file}#L{line})\n\n```python\n{text}\n```\n"

    return OUTPUT.sub(lambda match: f"{match[1]}```text\n{PRINTED[match[2]]()}\n```\n", BLOCK.sub(code, page))


# ------------------------------------------------- figures -------------------------------------------------

STYLE = """
.card{fill:#fff;stroke:#d0d7de}.box{fill:#eef4fb;stroke:#3b6ea5}.aux{fill:#fdf3e4;stroke:#b7791f}
.x{fill:#cfe0f3;stroke:#3b6ea5}.m{fill:#fff;stroke:#8c959f;stroke-dasharray:3 2}
.z{fill:#d9efdc;stroke:#3a7d44}.e{fill:#ece4f6;stroke:#7a56a8}
.line{fill:none;stroke:#57606a;stroke-width:1.3}.tip{fill:#57606a}
.band{fill:#3b6ea5;fill-opacity:.3}.curve{fill:none;stroke:#3b6ea5;stroke-width:2}
.mark{stroke:#b7791f;stroke-dasharray:4 3}
text{fill:#1f2328;font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px}
.soft{fill:#57606a}.bold{font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117;stroke:#30363d}.box{fill:#12263f;stroke:#6ea8e0}.aux{fill:#33260f;stroke:#e0a94a}
.x{fill:#1c3d63;stroke:#6ea8e0}.m{fill:#0d1117;stroke:#8b949e}
.z{fill:#173d20;stroke:#6cc07a}.e{fill:#33244a;stroke:#b794e6}
.line{stroke:#9aa4af}.tip{fill:#9aa4af}.band{fill:#6ea8e0}.curve{stroke:#6ea8e0}
.mark{stroke:#e0a94a}text{fill:#e6edf3}.soft{fill:#9aa4af}}
"""


def svg(width, height, title, parts):
    """An SVG on a card of its own, legible on any page; its colours follow the reader's light or dark."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
            f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def text(x, y, content, kind=""):
    """SVG of a line of text at (x, y) px. kind: a class of STYLE, as below."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{html.escape(content)}</text>'


def texts(x, y, lines, kind="", gap=17):
    """The same of several lines, `gap` px apart, as a list."""
    return [text(x, y + gap * i, line, kind) for i, line in enumerate(lines)]


def rect(kind, x, y, width, height, radius=3):
    """SVG of a rectangle with round corners."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def circle(x, y):
    """SVG of a latent token."""
    return f'<circle class="z" cx="{x:g}" cy="{y:g}" r="9.5"/>'


def arrow(*points):
    """A line through points (x, y), with a tip at its end."""
    (a, b), (x, y) = points[-2:]
    length = math.hypot(x - a, y - b)
    u, v = (x - a) / length, (y - b) / length
    tip = [(x, y), (x - 8 * u - 4 * v, y - 8 * v + 4 * u), (x - 8 * u + 4 * v, y - 8 * v - 4 * u)]
    joined = lambda points: " ".join(f"{p:.4g},{q:.4g}" for p, q in points)
    return (f'<polyline class="line" points="{joined([*points[:-1], (x - 6 * u, y - 6 * v)])}"/>'
            f'<polygon class="tip" points="{joined(tip)}"/>')


def architecture():
    """Fig. 3 with this code's names and shapes."""
    hidden, parts = (1, 2, 5), []
    # the image, its patches and the latent tokens
    for n in range(6):
        parts += [rect("m" if n in hidden else "x", 24 + n % 3 * 30, 46 + n // 3 * 30, 30, 30, 0),
                  rect("m" if n in hidden else "x", 212, 42 + 26 * n, 20, 20)]
        parts += [text(222, 57 + 26 * n, "m", "mid soft")] if n in hidden else []
    parts += [text(69, 32, "images I", "mid bold"), text(69, 126, "(B, 3, H, W)", "mid code soft"),
              arrow((122, 76), (204, 76)), text(162, 52, "patchify", "mid code"),
              text(162, 68, "patch_embed", "mid code"),
              text(222, 32, "x", "mid bold"), text(204, 190, "(B, N, D)", "end code soft"),
              *(circle(222, 222 + 25 * n) for n in range(3)),
              text(204, 226, "latent_tokens +", "end code"), text(204, 243, "latent_positions", "end code"),
              text(204, 260, "z", "end bold"), text(204, 277, "(B, L, D)", "end code soft")]
    # encoder
    parts += [rect("box", 260, 40, 98, 240, 8), text(309, 132, "encoder", "mid bold"),
              *texts(309, 152, ["12 blocks", "2D RoPE on x"], "mid soft"),
              text(309, 192, "Eq. 4", "mid soft"),
              *(arrow((236, y), (259, y)) for y in (104, 247))]
    # latents
    parts += [arrow((359, 247), (432, 247)), text(395, 238, "to_latent", "mid code"),
              *(circle(448, 222 + 25 * n) for n in range(3)), text(426, 302, "latents h", "mid bold"),
              text(426, 319, "(B, L, C)", "mid code soft"),
              text(426, 336, "what diffusion learns", "mid soft")]
    # decoders
    for y, kind, title, lines in ((40, "box", "decoder", ["12 blocks", "Eq. 5"]),
                                  (214, "aux", "aux_decoders", ["3 blocks each", "Eq. 7"])):
        shift = 6 if kind == "aux" else 0
        parts += [rect(kind, 586 + s, y + s, 116, 104, 8) for s in range(2 * shift, -1, -6)]
        parts += [text(644, y + 40, title, "mid bold"), *texts(644, y + 62, lines, "mid soft")]
        parts += [rect("e", 520, y + 4 + 20 * n, 15, 15) for n in range(3)]
        parts += [f'<circle class="z" cx="527.5" cy="{y + 73 + 20 * n}" r="7.5"/>' for n in range(2)]
        parts += [text(510, y + 32, "e", "end bold"), text(510, y + 87, "h", "end bold"),
                  arrow((542, y + 52), (584, y + 52)),
                  arrow((460, 247), (480, 247), (480, y + 82), (496, y + 82))]
    parts += [text(527, 32, "image_token, N times", "mid code"), text(486, 196, "from_latent", "code"),
              arrow((703, 92), (744, 92)), arrow((715, 266), (744, 266)),
              *texts(752, 74, ["reconstruction"], "bold"), *texts(752, 92, ["(B, 3, H, W)"], "code soft"),
              *texts(752, 110, ["all pixels: Eq. 6"], "soft"),
              *texts(752, 240, ["aux[name]"], "bold"), *texts(752, 258, ["(B, N, D_j)"], "code soft"),
              *texts(752, 276, ["hog, dinov2-l,", "siglip-l; hidden", "patches: Eq. 8"], "soft")]
    parts += [rect("m", 24, 330, 14, 14), text(46, 342, "hidden patch: mask_token m", "soft"),
              text(24, 366, "Stage 2: encoder frozen, aux_decoders dropped, only the decoder trains.",
                   "soft")]
    return svg(890, 384, "MAETok: encoder, latents, pixel decoder and auxiliary decoders (Fig. 3)", parts)


def mask_ratios(config, steps=400):
    """[(step, lowest, highest ratio)] over both stages, from the trainer's own rule."""
    from train_tokenizer import Method, Stage
    method, end = types.SimpleNamespace(config=config), config.steps + config.stage2_steps
    stages = Stage(1, 0, config.steps), Stage(2, config.steps, end)
    return [(step, *Method.mask_range(method, stage, step)) for stage in stages
            for step in sorted({stage.first + round(i * (stage.end - stage.first - 1) / steps)
                                for i in range(steps + 1)})]


def mask_ratio():
    """Mask ratio over the steps of both stages, for the paper's preset and for the laptop's."""
    from train_tokenizer import SCALES, Config
    parts = []
    for panel, name in enumerate(("maetok-b-256", "shapes")):
        config = Config(**SCALES[name])
        left, right, top, bottom = 58 + 440 * panel, 420 + 440 * panel, 52, 200
        end = config.steps + config.stage2_steps
        place = lambda step, ratio: (left + step / end * (right - left),
                                     bottom - ratio / 0.7 * (bottom - top))
        rows = mask_ratios(config)
        one, two = [r for r in rows if r[0] < config.steps], [r for r in rows if r[0] >= config.steps]
        (x0, low), (x1, high) = place(one[0][0], one[0][1]), place(config.steps, one[0][2])
        # The ramp is straight: its corners are enough.
        corners = [two[0], *[r for r in two if r[1] == 0][:1], two[-1]]
        path = " ".join("{:.1f},{:.1f}".format(*place(step, ratio)) for step, ratio, _ in corners)
        parts += [text((left + right) / 2, 26, f"--preset {name}", "mid code"),
                  *(f'<line class="line" x1="{left}" y1="{y}" x2="{x}" y2="{z}"/>'
                    for y, x, z in ((bottom, right, bottom), (top - 8, left, bottom))),
                  rect("band", x0, high, x1 - x0, low - high, 0),
                  f'<polyline class="curve" points="{path}"/>',
                  f'<line class="mark" x1="{x1:.1f}" y1="{top - 8}" x2="{x1:.1f}" y2="{bottom}"/>',
                  text((x0 + x1) / 2, (low + high) / 2 + 4, "drawn per image", "mid"),
                  text(x1 - 6, top + 2, f"stage 2 begins: step {config.steps:,}", "end soft"),
                  *(text(left - 8, place(0, r)[1] + 4, f"{100 * r:.0f} %", "end soft")
                    for r in (0, 0.2, 0.4, 0.6)),
                  text(left, bottom + 18, "0", "mid soft"), text(right, bottom + 18, f"{end:,}", "end soft"),
                  text((left + right) / 2, bottom + 36, "step", "mid soft")]
    return svg(880, 248, "Mask ratio over the steps of both stages", parts)


VECTORS = {"architecture.svg": architecture, "mask_ratio.svg": mask_ratio}


def test_images(count, size=32):
    """Drawn shapes of the test split, (count, 3, size, size) in [-1, 1]."""
    import numpy as np
    import torch
    from data import to_float
    from shapes import Shapes
    shapes = Shapes("test", size, seed=0)
    pixels = np.stack([np.array(shapes[i][0]) for i in range(count)])
    return to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def tile(image, side=96):
    """(3, H, W) in [-1, 1] -> a PIL image, single pixels visible."""
    from data import to_uint8
    from PIL import Image
    pixels = to_uint8(image[None])[0].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.NEAREST)


def headed(sheet, names, title_width, cell=96):
    """A sheet of pictures.draw.image_grid with a name above each column."""
    from PIL import Image, ImageDraw, ImageFont
    taller = Image.new("RGB", (sheet.width, sheet.height + 24), "white")
    taller.paste(sheet, (0, 24))
    for column, name in enumerate(names):
        ImageDraw.Draw(taller).text((title_width + column * (cell + 4) + cell / 2, 12), name, fill="black",
                                    font=ImageFont.load_default(14), anchor="mm")
    return taller


def save(name, picture):
    """A PNG of few colours: a third of the bytes, no difference to the eye."""
    FIGURES.mkdir(exist_ok=True)
    picture.quantize(256, dither=0).save(FIGURES / name, optimize=True)


def attention(columns=(0, 3, 5, 6, 9, 12, 14), block=-1, count=200):
    """What latent tokens look at: attention in one block of the encoder, mean over heads."""
    import torch
    from maetok import load_tokenizer, rotate
    from pictures.draw import image_grid
    model, images = load_tokenizer(ROOT / "assets/shapes.pt"), test_images(count)
    encoder, kept = model.encoder, []

    def keep(module, arguments):
        x, rope = arguments
        q, k, _ = module.qkv(x).reshape(*x.shape[:2], 3, module.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *rope), rotate(k, *rope)
        kept.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))            # (B, nh, T, T)

    handle = encoder.transformer.blocks[block].attn.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model.encode(images)
    handle.remove()
    rows, cols = model.grid(images.shape[-2:])
    N, P = rows * cols, model.config.patch_size
    weights = kept[0].mean(1)[:, N:, :N]                                                   # (B, L, N)

    def spot(image, w):
        """The image, darkened where w (N,) is small."""
        light = (0.12 + 0.88 * w / w.max()).reshape(1, rows, cols)
        return (image + 1) * light.repeat_interleave(P, 1).repeat_interleave(P, 2) - 1

    white = torch.ones(3, 32, 32)
    grid = [[tile(white)] + [tile(spot(white, weights[:, c].mean(0))) for c in columns]]
    titles = [f"mean over\n{count} images"]
    for i in (0, 5, 8):
        grid.append([tile(images[i])] + [tile(spot(images[i], weights[i, c])) for c in columns])
        titles.append("one image")
    return headed(image_grid(grid, titles, title_width=96), ["", *(f"token {c}" for c in columns)], 96)


def denoising(classes=(3, 6, 8), columns=8, steps=250, scale=2.0):
    """One trajectory per class, decoded at equally spaced times from noise to data."""
    import numpy as np
    import torch
    from flow import sample_latents
    from pictures.draw import image_grid
    from sit import load_diffusion
    model, tokenizer, config = load_diffusion(ROOT / "assets/shapes.pt")
    states = []
    sample_latents(model, range(len(classes)), np.array(classes), 0, scale, (0.0, 1.0), "euler-maruyama",
                   steps, config["path"], states)
    with torch.inference_mode():
        shown = [tokenizer.decode(min(states, key=lambda state: abs(state[0] - t))[1], normalized=True)
                 for t in np.linspace(1, 0, columns)]
    grid = [[tile(images[row]) for images in shown] for row in range(len(classes))]
    return headed(image_grid(grid, [config["classes"][c] for c in classes], title_width=80),
                  [f"t = {t:.2g}" for t in np.linspace(1, 0, columns)], 80)


def hog_tile(features, grid, patch, cell, side=96, bins=9, scale=4):
    """(N, D_hog) of one image -> strokes along its edges. Brightness has one scale for all pictures, so that
    a prediction can be compared with its target."""
    from PIL import Image, ImageDraw
    (rows, cols), g = grid, patch // cell
    x = features.reshape(rows, cols, 3, bins, g, g).clamp(0, 1).amax(2).permute(0, 3, 1, 4, 2)
    x = x.reshape(rows * g, cols * g, bins)
    picture, s = Image.new("RGB", (scale * side,) * 2), scale * side / (rows * g)
    draw = ImageDraw.Draw(picture)
    for i in range(rows * g):
        for j in range(cols * g):
            for b in x[i, j].argsort().tolist():                              # weak strokes first
                angle, level = (b + 0.5) * math.pi / bins, int(255 * x[i, j, b].sqrt())
                dx, dy = 0.46 * s * math.cos(angle), -0.46 * s * math.sin(angle)
                u, v = (j + 0.5) * s, (i + 0.5) * s
                draw.line((u - dx, v - dy, u + dx, v + dy), (level,) * 3, int(s / 7))
    return picture.resize((side, side), Image.LANCZOS)


def outlined(picture, mask, columns):
    """A tile with its hidden patches outlined."""
    from PIL import ImageDraw
    draw, side = ImageDraw.Draw(picture), picture.width // columns
    for n in mask.nonzero()[:, 0].tolist():
        x, y = n % columns * side, n // columns * side
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(255, 150, 0))
    return picture


def masked_sheet(run, count=7, seed=1):
    """What stage 1 sees, draws and predicts. run: a folder of train_tokenizer.py --stage 1 with HOG alone."""
    import torch
    from checkpoints import load_checkpoint, load_weights
    from common import build_model, sample_rng
    from hog import hog_features
    from losses import HOGTarget
    from maetok import MAETok, Tokenizer, random_mask
    from pictures.draw import image_grid, mask_out
    state = load_checkpoint(run, mapped=True)
    base = build_model(Tokenizer, state["config"], state["add"]).config
    target = HOGTarget("hog", types.SimpleNamespace(**state["config"]), torch.device("cpu"))
    model = MAETok(base, {"hog": target})
    load_weights(model, state["ema"], run)
    model.eval()
    P, cell, images = base.patch_size, target.cell_size, test_images(500)
    grid = model.grid(images.shape[-2:])
    rngs = [sample_rng(seed, "reading", 0, i) for i in range(len(images))]
    masks = random_mask(rngs, math.prod(grid), 0.5, 0.5)
    features = hog_features(images, P, cell)
    mean = features[masks].mean(0)                                     # the best constant prediction
    with torch.inference_mode():
        output, whole = model(images[:count], masks[:count]), model.reconstruct(images[:count])
    grey, side = mask_out(images, masks, P), grid[1]
    each = lambda draw: [draw(i) for i in range(count)]
    strokes = lambda x: hog_tile(x, grid, P, cell)
    rows = {"input": each(lambda i: tile(images[i])), "masked input": each(lambda i: tile(grey[i])),
            "reconstruction of\nthe masked input":
                each(lambda i: outlined(tile(output.reconstruction[i]), masks[i], side)),
            "reconstruction of\nthe whole input": each(lambda i: tile(whole[i])),
            "HOG target\nabove the mean":
                each(lambda i: outlined(strokes(features[i] - mean), masks[i], side)),
            "HOG predicted\nabove the mean":
                each(lambda i: outlined(strokes(output.aux["hog"][i] - mean), masks[i], side))}
    return image_grid(list(rows.values()), list(rows))


def draw_figures(run=None):
    """Write docs/figures. The sheet of HOG needs a run: the model in assets/ has no HOG decoder."""
    FIGURES.mkdir(exist_ok=True)
    for name, draw in VECTORS.items():
        (FIGURES / name).write_text(draw(), encoding="utf-8")
    save("attention.png", attention())
    save("denoising.png", denoising())
    if run:
        save("masked.png", masked_sheet(run))


# ---------------------------------------------- printed shapes ----------------------------------------------

def shapes():
    """The tensors between an image and its reconstruction, in the model of assets/."""
    import torch
    from maetok import load_tokenizer
    model, lines = load_tokenizer(ROOT / "assets/shapes.pt"), []
    show = lambda name, tensor, what: lines.append(f"{name:<34}{str(tuple(tensor.shape)):<16}{what}")
    parts = {"encoder.patch_embed": "x: N = 16 patches of width D = 96", "encoder.transformer": "[x ; z]",
             "encoder.to_latent": "h: L = 16 tokens of C = 16 channels",
             "decoder.from_latent": "h, as wide as e",
             "decoder.transformer": "[e ; h]", "decoder.head": "pixels of each patch"}
    handles = [model.get_submodule(name).register_forward_hook(
        lambda module, given, result, name=name, what=what: show(name, result, what))
        for name, what in parts.items()]
    images = torch.zeros(1, 3, 32, 32)
    show("images", images, "I")
    with torch.inference_mode():
        show("MAETok.forward(images)", model(images).reconstruction, "I^")
    for handle in handles:
        handle.remove()
    return "\n".join(lines)


PRINTED = {"shapes": shapes}


# -------------------------------------------------- HTML --------------------------------------------------

def slug(heading):
    """GitHub's anchor of a heading."""
    plain = re.sub(r"[`*]|\$", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def markdown(out):
    """A parser of the page's Markdown, with equations as MathML and links from where `out` will lie."""
    from latex2mathml.converter import convert
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    def mathml(latex, display):
        text = convert(latex, display=display).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
        text = text.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')         # norms
        return text.replace("<mi>log</mi>", '<mspace width=".17em"/><mi>log</mi><mspace width=".17em"/>')

    def equation(latex, options):
        """Parts between \\qquad are formulas of their own, so that a narrow screen can put them on lines."""
        if not options["display_mode"]:
            return mathml(latex, "inline")
        return "".join(f"<span>{mathml(part, 'block')}</span>" for part in latex.split(r"\qquad"))

    def code(source, language, _):
        marked = highlight(source, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))
        return f'<pre class="code"><code>{marked}</code></pre>'

    parser = MarkdownIt("commonmark", {"html": True, "highlight": code}).enable("table")
    parser.use(dollarmath_plugin, renderer=equation, allow_labels=False)
    rules = parser.renderer.rules

    def link(tokens, i, options, env):
        target = tokens[i].attrs["href"]
        if not target.startswith("#"):
            path, _, anchor = target.partition("#")
            path = os.path.relpath((PAGE.parent / path).resolve(), out.parent).replace(os.sep, "/")
            tokens[i].attrs["href"] = path + (f"#{anchor}" if anchor else "")
        return parser.renderer.renderToken(tokens, i, options, env)

    def image(tokens, i, options, env):
        path = PAGE.parent / tokens[i].attrs["src"]
        kind = "svg+xml" if path.suffix == ".svg" else path.suffix[1:]
        data = base64.b64encode(path.read_bytes()).decode()
        return (f'<span class="wide"><img alt="{html.escape(tokens[i].content)}" '
                f'src="data:image/{kind};base64,{data}"></span>')

    def heading(tokens, i, options, env):
        tokens[i].attrs["id"] = slug(tokens[i + 1].content)
        return parser.renderer.renderToken(tokens, i, options, env)

    rules |= {"link_open": link, "image": image, "heading_open": heading,
              "table_open": lambda *_: '<div class="wide"><table>\n',
              "table_close": lambda *_: "</table></div>\n"}
    return parser


def page_html(out):
    """The page as one HTML document: no script, nothing from outside."""
    from pygments.formatters import HtmlFormatter
    source = re.sub(r"<!--.*?-->\n?", "", PAGE.read_text(encoding="utf-8"), flags=re.S)
    body = markdown(out).render(source)
    heads = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body, re.S)
    contents = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title in heads)
    title = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.S)[1]
    colours = lambda style: HtmlFormatter(style=style).get_style_defs(".code")
    css = ((ROOT / "docs/reading.css").read_text() + colours("friendly")
           + "@media (prefers-color-scheme:dark){" + colours("github-dark") + "}"
           + ".code,pre.code{background:var(--panel)}")
    return ("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>{title}</title><style>{css}</style></head>\n"
            f"<body><nav><details open><summary>Contents</summary><ul>{contents}</ul></details></nav>"
            f"<main>{body}</main></body></html>\n")


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="?", const="", metavar="RUN", help="draw docs/figures again")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the page as one HTML file")
    args = parser.parse_args(argv)
    try:
        if args.html:
            out = args.html.resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(page_html(out), encoding="utf-8")
            print(f"wrote {args.html}, {out.stat().st_size / 1e6:.1f} MB")
            return
        if args.figures is not None:
            draw_figures(args.figures)
        PAGE.write_text(with_excerpts(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    except Gone as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
