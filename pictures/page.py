"""report.html: one page with the pictures, curves and numbers of a folder, and what they mean.

    runs/demo/report.html       renewed by every command of evaluate.py, and by sample.py --report

The page is made only from files in the folder: the JSON and PNG files of evaluate.py, a contact sheet, the
logs of training runs in sub-folders. It needs no server and no network: pictures are embedded as data.
"""
import base64
import html
import io
import json
import os
import sys
from pathlib import Path

from PIL import Image

import checkpoints
from runtime import files
from runtime.processes import printable
from pictures.draw import line_chart

# What a number means, and where it is in the paper. Keys as in evaluate.py's JSON. An extra's result has its
# own entries: {"page": [title, source, what to see], "meanings": {key: meaning}}.
MEANINGS = {
    "psnr":
        "Peak signal-to-noise ratio of reconstructions, dB: 10 log10(1 / mean squared error), pixels in 0"
        " to 1; mean over images. [Table 4]",
    "ssim": "Structural similarity of reconstructions with their originals; 1 is identical. [Table 4]",
    "ssim_data_range_2_as_released_code":
        "The same with the constants the authors' code uses; not comparable with the line above.",
    "lpips": "Perceptual distance of reconstructions from their originals (VGG features); lower is better.",
    "rfid": "Fréchet distance between the Inception features of reconstructions and originals. [Table 4]",
    "gfid": "Fréchet distance between the Inception features of samples and of real images. [Tables 2, 3]",
    "sfid": "The same in features that still know where in the picture they are.",
    "inception_score": "High when each sample is clearly of one class and all classes occur. [Table 2]",
    "frechet_in_classifier_features_not_fid":
        "Fréchet distance in the features of a small classifier trained on these very images. It ranks "
        "models on this data set; it is not FID and compares with no published number.",
    "frechet_in_efficientnet_features_not_fid":
        "Fréchet distance in the features of an EfficientNet-Lite0 trained on ImageNet; it is not FID.",
    "share_of_feature_variance_kept":
        "Variance of the reconstructions' features over that of the originals: below 1 where "
        "reconstructions are blurry.",
    "originals_assigned_to_their_class":
        "The classifier's accuracy on the originals: the upper bound of the next line.",
    "reconstructions_assigned_to_their_class":
        "Its accuracy on reconstructions: what the tokenizer loses of the class. Samples pass through the"
        " same decoder.",
    "assigned_to_requested_class":
        "Fraction of samples that the classifier finds to be of the class they were conditioned on.",
    "classifier_test_accuracy":
        "The classifier's accuracy on test images: how much the line above can be trusted.",
    "precision": "Fraction of samples that lie among the real images' features. [Table 10]",
    "recall": "Fraction of real images that lie among the samples' features: variety. [Table 10]",
    "precision_against_reconstructions":
        "Precision with reconstructions in place of real images: as blurry as the samples are, so it "
        "tells what diffusion itself gets wrong.",
    "recall_against_reconstructions": "Recall with reconstructions in place of real images.",
    "linear_probe_accuracy":
        "Accuracy of a linear classifier on the latents: how much of the class a hyperplane can read off."
        " [Sec. 4.3, Fig. 5a]",
    "pixel_probe_accuracy": "The same on raw pixels: what the encoder started from.",
    "diffusion_gap":
        "Fréchet distance between samples and the same tokenizer's reconstructions: what diffusion has not "
        "learned, apart from what the decoder cannot draw.",
    "dims": "Dimensions of the latents that PCA keeps for the mixtures. [App. B.3]",
}

# Command -> (title, where in the paper, what the picture should show).
SECTIONS = {
    "recon": (
        "Reconstruction", "Table 4; Sec. 3.3",
        "Above the originals, below what the decoder draws from their latents. Shapes and colours "
        "should agree; what is lost is in the edges and corners."),
    "latents": (
        "The latent space", "Sec. 2, 4.3; Fig. 2a, 4, 8",
        "Classes should form clouds of one colour. Mixtures: the negative log-likelihood of held-out "
        "latents falls as modes are added; the fewer modes it takes, the easier a latent space is for "
        "diffusion [Theorem 2.1]."),
    "generation": (
        "Samples, measured", "Tables 2, 3, 10",
        ""),
    "curve": (
        "Samples over training", "Fig. 5b",
        "The distance should fall, steeply at first."),
    "cfg": (
        "Guidance", "Table 12; App. C.2",
        "A valley: too little guidance leaves samples between classes, too much costs variety."),
}
SHEET = ("The pipeline on one sheet", "Fig. 3; Sec. 3",
         "From top to bottom: images; what the encoder sees while it trains; reconstructions without a mask; "
         "samples, each row from the same noise with more guidance, so that shapes get clearer and less "
         "varied; one sample on its way from noise to data. Each column of samples should show one class.")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; \
color: #222 }
img { max-width: 100%; border: 1px solid #ddd }
table { border-collapse: collapse; width: 100% }
td { border-top: 1px solid #ddd; padding: .3rem .6rem .3rem 0; vertical-align: top }
td.n { font-weight: 600 }
.see { background: #f3f6fa; padding: .5rem .8rem; border-left: 4px solid #4a7ab5 }
.source { color: #666; font-size: 90% }
"""


def embedded(picture):
    """A PIL image, or the path of a PNG, as an <img> with embedded data."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        content = buffer.getvalue()
    else:
        content = Path(picture).read_bytes()
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}"></p>'


def number_table(result, meanings):
    """The numbers of a result, at any depth, that have an entry in `meanings`, as HTML rows."""
    rows = []
    for key, value in result.items():
        if isinstance(value, dict):
            inner = number_table(value, meanings)
            rows += [f"<tr><td colspan=3><b>{html.escape(key)}</b></td></tr>", inner] if inner else []
        elif key in meanings and isinstance(value, (int, float)):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append(f"<tr><td class=n>{html.escape(key.replace('_', ' '))}</td><td class=n>{shown}</td>"
                        f"<td>{html.escape(meanings[key])}</td></tr>")
    return "\n".join(rows)


def section(title, source, see, body):
    """One section of the page. source: where in the paper; see: what the pictures should show; body: HTML."""
    return (f"<section><h2>{html.escape(title)}</h2><p class=source>{html.escape(source)}</p>{body}"
            + (f"<p class=see><b>What should I see?</b> {html.escape(see)}</p>" if see else "")
            + "</section>")


def training_section(run):
    """Curves of one training run, from its metrics.jsonl; "" for any other folder."""
    records = checkpoints.read_metrics(run)
    if not records or not (run / "config.json").exists():
        return ""
    if any("recon" in record for record in records):
        curves = {title: {"": [(r["step"], r[key]) for r in records if r.get(key, 0) > 0]}
                  for title, key in (("pixel loss, mean squared error", "recon"),
                                     ("HOG loss [Eq. 8]", "hog"))}
        ends = [record for record in records if "event" in record]
        body = "".join(f"<p>{html.escape(end['event'])}: PSNR {end['psnr']:.2f} dB on {end['images']} test "
                       "images</p>" for end in ends if "psnr" in end)
        title, source = f"Training the tokenizer ({run.name})", "Sec. 3.2, 3.3; Eq. 6, 8"
        see = ("The pixel loss falls while patches are hidden and drops again when stage 2 shows the decoder "
               "whole images. The HOG loss, on hidden patches alone, falls too: the latents know more than "
               "what the encoder saw.")
    elif any("loss_t" in record for record in records):
        last = len(records[-1]["loss_t"]) - 1
        curves = {title: {"": [(r["step"], value) for r in records if (value := pick(r))]}
                  for title, pick in (("loss, all times", lambda r: r["loss"]),
                                      ("loss near data, t < 0.1", lambda r: r["loss_t"][0]),
                                      ("loss near noise, t > 0.9", lambda r: r["loss_t"][last]))}
        body, title, source = "", f"Training the diffusion model ({run.name})", "Sec. 4.1; Table 8; Fig. 2b"
        see = ("All three fall and flatten, but not to zero: noise and data in x_t cannot be separated "
               "exactly. Losses of different tokenizers do not compare, because their latents differ.")
    else:
        return ""
    curves = {title: series for title, series in curves.items() if series[""]}
    return section(title, source, see, embedded(line_chart(curves, "step", log_y=True)) + body)


def result_section(path):
    """(place on the page, HTML) of a result of evaluate.py; (0, "") for any other JSON file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    entry = isinstance(result, dict) and SECTIONS.get(str(result.get("command")), result.get("page"))
    if not entry:
        return 0, ""
    title, source, see = entry
    pictures = [path.with_name(f"{path.stem}{name}.png") for name in ("", "_classes", "_mixtures", "_curve")]
    body = "".join(embedded(picture) for picture in pictures if os.path.isfile(picture))
    body += f"<table>{number_table(result, MEANINGS | result.get('meanings', {}))}</table>"
    body += "".join(f"<p class=source>{html.escape(str(result[key]))}</p>"
                    for key in ("what_it_shows", "caveat", "protocol") if key in result)
    order = list(SECTIONS.values()).index(entry) if entry in SECTIONS.values() else len(SECTIONS)
    return order, section(f"{title} ({path.stem})", source, see, body)


def sections(make, paths):
    """make(path) of each path. What cannot be read, or is not what its name says, is left out with a warning:
    the folder may hold anything, and the page is not worth the measurement that was just made."""
    made = []
    for path in paths:
        try:
            made.append(make(path))
        except Exception as e:                              # of JSON, of Pillow, of the system: many kinds
            print(printable(f"warning: {path} is left out of report.html ({type(e).__name__}: {e})"),
                  file=sys.stderr)
    return made


def write_report(folder, sheet=""):
    """Write folder/report.html from the folder's files; returns its path.

    Sections: the contact sheet (sample.py --report; by default folder/report.png), training runs in this
    folder or one level below, and each result of evaluate.py with its pictures. Other files are ignored.
    """
    folder = Path(folder)
    sheets = [path for path in [Path(sheet or folder / "report.png")] if os.path.isfile(path)]
    # os.path, not Path.exists(): the latter fails in a folder that this user may not enter.
    runs = [run for run in (folder, *sorted(folder.glob("*/"))) if os.path.isfile(run / "metrics.jsonl")]
    results = [path for path in sorted(folder.glob("*.json")) if os.path.isfile(path)]
    parts = sections(lambda path: section(*SHEET, embedded(path)), sheets)
    parts += sorted(sections(training_section, runs), key=lambda text: "Training the tokenizer" not in text)
    parts += [text for _, text in sorted(sections(result_section, results), key=lambda found: found[0])]
    page = ("<!doctype html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(folder.resolve().name)}</title><style>{STYLE}</style>"
            f"<h1>MAETok: what is in {html.escape(folder.as_posix())}</h1>"
            "<p>A plain autoencoder, trained to fill in hidden patches, turns images into latent tokens; a "
            "diffusion model learns to make such tokens from noise. <i>Masked Autoencoders Are Effective "
            "Tokenizers for Diffusion Models</i>, arXiv:2502.03444v2; equations and tables are "
            "that paper's.</p>"
            + "\n".join(filter(None, parts)) + "</html>\n").encode("utf-8", "backslashreplace")
    path = folder / "report.html"
    files.atomic_write(path, lambda temporary: temporary.write_bytes(page))
    return path
