"""What study.py measured: numbers, tables, charts.                       [Tables 1a-1c, 5, 6, Fig. 2a, 5]

`report` gathers the rows and seeds that are complete and leaves OUT/SETTING.json (every number and command),
OUT/SETTING.md (tables) and OUT/SETTING_*.png. A "unit" is one row with one seed.
"""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

import checkpoints
from runtime import files
from pictures.draw import image_grid, line_chart, plot_curves, sheet_of

DISTANCE = "frechet_in_{}_features_not_fid".format         # network: the small "classifier" or "efficientnet"

# Which of two rows the paper finds better: (better, worse, gFID of both by SiT-L without guidance, where).
# The semantic teachers are DINOv2 and SigLIP there, and Table 6 has them in both rows. Table 1c gives HOG
# another gFID (17.18) than Table 1b (13.54) at one rFID (2.43). EQUAL is no row: ae_at_psnr makes it.
EQUAL = "AE at the same PSNR"
PAPER = [
    ("MAETok (HOG)", "AE", "13.54, 24.47", "Tables 1a, 1b"),
    ("MAETok (HOG)", EQUAL, "–", "its claim"),
    ("MAETok (HOG), 8 channels", "AE, 8 channels", "–", "as the first"),
    ("MAETok (HOG, EfficientNet)", "AE", "5.78, 24.47", "Table 1a"),
    ("MAETok (HOG, EfficientNet)", "MAETok (HOG)", "5.78, 13.54", "Table 1b"),
    ("MAETok (HOG)", "AE + mask, pixels", "13.54, 17.18", "Table 1b"),
    ("MAETok (HOG)", "AE + HOG, no mask", "5.78, 8.44", "Table 6, all targets"),
    ("AE + HOG, no mask", "AE", "8.44, 24.47", "Table 6, all targets"),
    ("AE + mask, pixels", "AE", "17.18, 24.47", "Tables 1a, 1b"),
    ("KL-VAE", "AE", "22.17, 24.47", "Table 1a"),
    ("KL-VAE", EQUAL, "–", "as the line above"),
    ("MAETok (HOG)", "KL-VAE", "13.54, 22.17", "Tables 1a, 1b"),
    ("KL-VAE", "MAETok, mask 0-60 %", "22.17, 24.15", "Tables 1a, 1c"),
    ("KL-VAE + mask", "KL-VAE", "18.17, 22.17", "Table 1a"),
    ("MAETok (HOG)", "no learnable tokens", "5.78, 6.85", "Table 6"),
    ("MAETok (HOG)", "MAETok, mask 0-60 %", "17.18, 24.15", "Table 1c"),
    ("MAETok, mask 0-60 %", "AE", "24.15, 24.47", "Tables 1a, 1c"),
    ("MAETok, mask 0-60 %", EQUAL, "–", "its claim"),
    ("MAETok (HOG)", "MAETok, mask 40 %", "17.18, 18.27", "Table 1c"),
    ("MAETok, mask 40 %", "AE", "18.27, 24.47", "Tables 1a, 1c"),
    ("MAETok, mask 40 %", EQUAL, "–", "its claim"),
    ("no learnable tokens", "AE, no learnable tokens", "–", "as the first"),
]


# ------------------------------------------------- numbers -------------------------------------------------

def planned(points, every):
    """Rows of a curve without those of checkpoints at which a piece of the work ended: multiples of `every`
    steps and the last one, so that all seeds have the same."""
    return [row for row in points if row["step"] % every == 0 or row is points[-1]]


# (ratio, above, below the line); a row that was not measured in ImageNet features lacks theirs.
RATIOS = (("recon over samples", "recon distance stage2", "distance stage2 cfg 1"),
          ("recon over samples imagenet", "recon distance imagenet", "distance imagenet cfg 1"),
          ("null class over gaussian", "gap null class", "gap gaussian"),
          ("null class over gaussian imagenet", "gap null class imagenet", "gap gaussian imagenet"),
          ("loss over gaussian", "diffusion loss", "gaussian loss"))


def read_unit(name, folder, done):
    """The numbers of one row and seed, from the files its commands left in `folder`: {measure: number};
    "curve cfg 1" and "curve cfg 2" are lists of [step, distance, gap, class accuracy], "curve imagenet" of
    [step, distance, gap], "loss curve" of [step, loss], "seconds" a dict by command, "... over ..." ratios.
    `done`: study.read_done's, of a unit that is complete."""
    read = lambda file: json.loads((folder / f"{file}.json").read_text())
    result = {}

    def add(row, suffix, network="classifier"):
        result.update({f"distance {suffix}": row[DISTANCE(network)], f"gap {suffix}": row["diffusion_gap"]})
        if "assigned_to_requested_class" in row:
            result[f"accuracy {suffix}"] = row["assigned_to_requested_class"]

    for stage in ("stage1", "stage2"):
        recon = read(f"recon_{stage}")
        result |= {f"psnr {stage}": recon["psnr"], f"recon distance {stage}": recon[DISTANCE("classifier")],
                   f"recon accuracy {stage}": recon["reconstructions_assigned_to_their_class"],
                   f"kept {stage}": recon["share_of_feature_variance_kept"]}
    result["classifier accuracy"] = recon["originals_assigned_to_their_class"]
    for row in read("samples_stage1")["rows"]:
        add(row, f"stage1 cfg {row['scale']:g}")
    options = done["diffusion"]["arguments"]
    every = int(options[options.index("--save-every") + 1])
    for name_of_curve, scale in (("curve", 1), ("guided_curve", 2)):
        points = planned(read(name_of_curve)["rows"], every)
        add(points[-1], f"stage2 cfg {scale}")
        result[f"curve cfg {scale}"] = [[row["step"], row[DISTANCE("classifier")], row["diffusion_gap"],
                                         row["assigned_to_requested_class"]] for row in points]
    if "curve, ImageNet" in done:
        result["curve imagenet"] = [[row["step"], row[DISTANCE("efficientnet")], row["diffusion_gap"]]
                                    for row in planned(read("curve_imagenet")["rows"], every)]
    if "recon, ImageNet" in done:
        recon = read("recon_imagenet")
        result |= {"recon distance imagenet": recon[DISTANCE("efficientnet")],
                   "kept imagenet": recon["share_of_feature_variance_kept"]}
        for row in read("samples_imagenet")["rows"]:
            add(row, f"imagenet cfg {row['scale']:g}", "efficientnet")
    # The null class of the conditional model.                                       [Table 5]
    add(read("null_class")["rows"][-1], "null class")
    if "null class, ImageNet" in done:
        add(read("null_class_imagenet")["rows"][-1], "null class imagenet", "efficientnet")
    gaussian = read("gaussian")
    add(gaussian, "gaussian")
    result["gaussian loss"] = gaussian["gaussian_loss"]
    if "Gaussian, ImageNet" in done:
        add(read("gaussian_imagenet"), "gaussian imagenet", "efficientnet")
    latents = read("latents")[name]
    result |= {"probe": latents["linear_probe_accuracy"]}
    for row in latents["mixtures"]:
        result |= {f"nll {kind} K {row['K']}": row[f"nll_{kind}"] for kind in ("full", "diagonal")}
    records = checkpoints.read_metrics(folder / "diffusion")
    result["diffusion loss"] = float(np.mean([r["loss"] for r in records[-max(1, len(records) // 10):]]))
    result["loss curve"] = [[float(np.mean([r[key] for r in part])) for key in ("step", "loss")]
                            for part in np.array_split(records, min(12, len(records)))]
    add(read("samples_unconditional")["rows"][-1], "unconditional")
    for ratio, above, below in RATIOS:
        if above in result and below in result:
            result[ratio] = result[above] / result[below]
    result["seconds"] = {title: round(entry["seconds"]) for title, entry in done.items()}
    return result


# ------------------------------------------------- tables --------------------------------------------------

# Columns: title -> (key, digits, factor). What a setting has not measured is left out.
SUMMARY = {                                                 # as docs/study.md and README.md have it
    "PSNR, dB": ("psnr stage2", 1, 1), "linear-probe accuracy, %": ("probe", 1, 100),
    "reconstructions' distance, classifier": ("recon distance stage2", 1, 1),
    "gap, classifier": ("gap stage2 cfg 1", 1, 1), "gap, ImageNet features": ("gap imagenet cfg 1", 1, 1),
    "distance, classifier": ("distance stage2 cfg 1", 1, 1),
    "distance, ImageNet features": ("distance imagenet cfg 1", 1, 1),
    "null class, classifier": ("distance null class", 1, 1),
    "null class, ImageNet features": ("distance null class imagenet", 1, 1),
    "loss / Gaussian's": ("loss over gaussian", 2, 1)}
TOKENIZERS = {
    "PSNR, stage 1": ("psnr stage1", 2, 1), "stage 2": ("psnr stage2", 2, 1),
    "rec. distance, stage 1": ("recon distance stage1", 2, 1), " stage 2": ("recon distance stage2", 2, 1),
    "rec. / samples' distance, %": ("recon over samples", 0, 100),
    "class of rec., %": ("recon accuracy stage2", 1, 100), "variance of rec., %": ("kept stage2", 0, 100),
    "linear-probe accuracy, %": ("probe", 1, 100),
    # At K = 1 it is the same for any latents, d/2 (1 + ln 2 pi).
    "NLL K=5": ("nll full K 5", 2, 1), "K=20": ("nll full K 20", 2, 1), "K=50": ("nll full K 50", 2, 1)}
DIFFUSION = {
    "loss": ("diffusion loss", 3, 1), "loss / Gaussian's": ("loss over gaussian", 3, 1),
    "gap": ("gap stage2 cfg 1", 2, 1), "gap, cfg 2": ("gap stage2 cfg 2", 2, 1),
    "distance": ("distance stage2 cfg 1", 2, 1), "distance, cfg 2": ("distance stage2 cfg 2", 2, 1),
    "distance, stage 1": ("distance stage1 cfg 1", 2, 1),
    "distance, stage 1, cfg 2": ("distance stage1 cfg 2", 2, 1),
    "class, %": ("accuracy stage2 cfg 1", 1, 100), "class, cfg 2, %": ("accuracy stage2 cfg 2", 1, 100),
    "null class": ("distance null class", 2, 1), "null class, gap": ("gap null class", 2, 1),
    "Gaussian": ("distance gaussian", 2, 1), "Gaussian, gap": ("gap gaussian", 2, 1),
    "null class's gap / Gaussian's": ("null class over gaussian", 2, 1),
    "uncond.": ("distance unconditional", 2, 1), "uncond., gap": ("gap unconditional", 2, 1)}
IMAGENET = {
    "rec. distance": ("recon distance imagenet", 2, 1),
    "rec. / samples' distance, %": ("recon over samples imagenet", 0, 100),
    "variance of rec., %": ("kept imagenet", 0, 100),
    "gap": ("gap imagenet cfg 1", 2, 1), "gap, cfg 2": ("gap imagenet cfg 2", 2, 1),
    "distance": ("distance imagenet cfg 1", 2, 1), "distance, cfg 2": ("distance imagenet cfg 2", 2, 1),
    "null class": ("distance null class imagenet", 2, 1),
    "null class, gap": ("gap null class imagenet", 2, 1),
    "Gaussian": ("distance gaussian imagenet", 2, 1), "Gaussian, gap": ("gap gaussian imagenet", 2, 1),
    "null class's gap / Gaussian's": ("null class over gaussian imagenet", 2, 1)}
READING = """Lowest to highest of the seeds. Stage 2 decodes, but where
stage 1 is named.

- rec.: the reconstructions' distance to the real images, the same in percent of the samples' distance, the
  fraction in which the classifier sees their class, the fraction of its features' variance that they keep
  (blurry pictures differ less).
- gap: the distance between samples and the same tokenizer's reconstructions. cfg 2: guidance 2. class: the
  fraction of samples in which the classifier sees the class asked for.
- Without classes [Table 5]: distances of the null class of the conditional model, and of a model of its own,
  trained half as long (uncond.).
- loss: of SiT's velocity. Most of it follows from the covariance of the latents, so it does not compare
  across latent spaces; loss / Gaussian's has the loss of the best affine velocity below it. Gaussian: samples
  of that one, to hold against the null class; null class's gap / Gaussian's: below 1 where SiT learned more
  than mean and covariance. NLL: nats of held-out latents after a PCA, by mixtures of K."""
# What the paper's order is looked for in: title -> (key, digits, factor, whether less is better).
ORDER = {
    "distance, ImageNet features": ("distance imagenet cfg 1", 2, 1, True),
    "distance, classifier": ("distance stage2 cfg 1", 2, 1, True),
    "gap, ImageNet features": ("gap imagenet cfg 1", 2, 1, True),
    "gap, classifier": ("gap stage2 cfg 1", 2, 1, True),
    "null class, ImageNet features": ("distance null class imagenet", 2, 1, True),
    "null class, classifier": ("distance null class", 2, 1, True),
    "uncond., classifier": ("distance unconditional", 2, 1, True),
    "linear-probe accuracy, %": ("probe", 1, 100, False)}
GUIDED = {"class accuracy at guidance 2, %": ("accuracy stage2 cfg 2", 1, 100, False)}
# At each checkpoint of the diffusion model: title -> (key, column, digits, factor).           [Fig. 5b]
CURVES = {
    "distance, classifier": ("curve cfg 1", 1, 2, 1), "gap, classifier": ("curve cfg 1", 2, 2, 1),
    "class accuracy at guidance 2, %": ("curve cfg 2", 3, 1, 100),
    "distance, ImageNet features": ("curve imagenet", 1, 2, 1),
    "gap, ImageNet features": ("curve imagenet", 2, 2, 1)}


def cells(seeds, columns):
    """One row of a Markdown table, its cells alone: lowest to highest of the seeds."""
    found = []
    for key, digits, factor in columns.values():
        values = [factor * seed[key] for seed in seeds.values() if key in seed]
        ends = dict.fromkeys(f"{f(values):.{digits}f}" for f in (min, max)) if values else "–"
        found.append("–".join(ends))
    return " | ".join(found)


def markdown(rows, columns, sources):
    """A Markdown table of `cells`. sources: {row: where the paper has it}. Empty if nothing of it was
    measured."""
    every = [seed for seeds in rows.values() for seed in seeds.values()]
    columns = {title: column for title, column in columns.items() if any(column[0] in seed for seed in every)}
    if not columns:
        return ""
    return "\n".join(["| row | " + " | ".join(title.strip() for title in columns) + " |",
                      "|---" * (len(columns) + 1) + "|",
                      *(f"| {name} [{sources[name]}] | {cells(seeds, columns)} |"
                        for name, seeds in rows.items())])


def over_training(rows, sources):
    """Markdown tables of each of CURVES at each checkpoint of the diffusion model: which latents are learned
    faster?"""
    tables = []
    for title, (key, column, digits, factor) in CURVES.items():
        curves = {name: {seed: {point[0]: point[column] for point in unit.get(key, ())}
                         for seed, unit in seeds.items()} for name, seeds in rows.items()}
        steps = sorted({step for seeds in curves.values() for curve in seeds.values() for step in curve})
        columns = {f"{step} steps": (step, digits, factor) for step in steps}
        if table := markdown(curves, columns, sources):
            tables.append(f"{title[0].upper()}{title[1:]}\n\n{table}")
    return "\n\n".join(tables)


AES = ("AE, 8 channels", "AE, 16 channels", "AE")


def ae_at_psnr(rows, name):
    """The AE at row `name`'s reconstruction, {seed: {key of ORDER: number}}: on straight lines between the
    AEs of 8, 16 and 32 channels that there are, at that row's PSNR after stage 2. Empty beyond them."""
    result = {}
    for seed, unit in rows[name].items():
        aes = [rows[ae][seed] for ae in AES if seed in rows.get(ae, {})]
        if len(aes) < 2:
            continue
        at = unit["psnr stage2"]
        psnr = [ae["psnr stage2"] for ae in aes]                           # more channels, a higher PSNR
        if psnr[0] <= at <= psnr[-1]:
            result[seed] = {key: float(np.interp(at, psnr, [ae[key] for ae in aes]))
                            for key, *_ in ORDER.values() if all(key in ae for ae in aes)}
    return result


def verdicts(rows):
    """A Markdown table: does each pair of PAPER that was measured stand in the paper's order? "yes" or "no"
    where every seed of one row is better than every seed of the other; where their ranges touch, "open". Two
    seeds against two fall apart by chance once in three times."""
    lines = ["| better | worse | gFID in the paper | " + " | ".join(ORDER) + " |",
             "|---" * (len(ORDER) + 3) + "|"]
    for better, worse, gfid, source in PAPER:
        other = rows.get(worse) if worse != EQUAL else better in rows and ae_at_psnr(rows, better)
        if not (better in rows and other):
            continue
        # The AE at a row's PSNR is one for each seed: only these are held against it.
        ours = {seed: unit for seed, unit in rows[better].items() if worse != EQUAL or seed in other}
        words = []
        for key, digits, factor, less in ORDER.values():
            a, b = ([factor * seed[key] for seed in seeds.values() if key in seed]
                    for seeds in (ours, other))
            if not (a and b):
                words.append("–")
                continue
            ahead, behind = (a, b) if less else (b, a)
            word = "yes" if max(ahead) < min(behind) else "no" if min(ahead) > max(behind) else "open"
            once = " (1 seed)" if min(len(a), len(b)) == 1 else ""
            words.append(f"{word}{once}: {np.mean(a):.{digits}f}, {np.mean(b):.{digits}f}")
        lines.append(f"| {better} | {worse} | {gfid} [{source}] | " + " | ".join(words) + " |")
    return "\n".join(lines)


def at_equal_psnr(rows):
    """A Markdown table, titles of ORDER by rows: lowest to highest of the seeds, in brackets of the AE of the
    same seeds and PSNRs, see ae_at_psnr, and behind the colon the least gain of a seed on the AE of any seed.
    Empty without these AEs."""
    beside = {name: aes for name in rows if name not in AES and (aes := ae_at_psnr(rows, name))}
    others = {seed for ae in AES for seed in rows.get(ae, ())}
    pairs = {name: [(rows[name][seed], ae) for seed in aes for other in others
                    for ae in ae_at_psnr(rows | {name: {other: rows[name][seed]}}, name).values()]
             for name, aes in beside.items()}
    lines = [f"| measure ↓ | {' | '.join(beside)} |", "|---" * (len(beside) + 1) + "|"]
    for title, (key, *_, less) in ORDER.items():
        column, found = {title: (key, 1, 1)}, []
        for name, aes in beside.items():
            ours = {seed: rows[name][seed] for seed in aes}
            gains = [ae[key] - unit[key] for unit, ae in pairs[name] if key in ae and key in unit]
            found.append(f"{cells(ours, column)} ({cells(aes, column)}): {round(min(gains), 1) + 0:.1f}"
                         if gains else "–")
        if less and set(found) != {"–"}:
            lines.append(f"| {title} | {' | '.join(found)} |")
    return "\n".join(lines) if beside else ""


def halves(rows):
    """A Markdown table: of what MAETok (HOG) gains on the AE, how much does each of its halves bring alone,
    the target and the mask [Tables 1b, 6]? Of means over the seeds that the three rows share. Empty where a
    row is missing; "–" where MAETok gains nothing."""
    parts, lines = ("AE + HOG, no mask", "AE + mask, pixels"), []
    for title, (key, *_, less) in ORDER.items():
        shares = []
        for part in parts:
            three = [rows.get(name, {}) for name in ("AE", part, "MAETok (HOG)")]
            shared = [seed for seed in three[0] if all(key in seeds.get(seed, {}) for seeds in three)]
            if not shared:
                break
            ae, half, both = (np.mean([seeds[seed][key] for seed in shared]) for seeds in three)
            gains = both < ae if less else both > ae
            shares.append(f"{100 * (half - ae) / (both - ae):.0f}" if gains else "–")
        else:
            lines.append(f"| {title} | " + " | ".join(shares) + " |")
    return "\n".join([f"| of MAETok (HOG)'s gain on the AE, % | {' | '.join(parts)} |", "|---|---|---|",
                      *lines]) if lines else ""


def lead(rows, ours="MAETok (HOG)", other="AE"):
    """A Markdown table: row `ours` less row `other`, of means over seeds, with the 95 % interval of Welch's
    t. Empty where one has fewer than two seeds."""
    lines = []
    for title, (key, digits, factor, _) in (ORDER | GUIDED).items():
        a, b = ([factor * seed[key] for seed in rows.get(name, {}).values() if key in seed]
                for name in (ours, other))
        if min(len(a), len(b)) > 1:
            low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
            lines.append(f"| {title} | {np.mean(a) - np.mean(b):+.{digits}f} | {low:+.{digits}f} to "
                         f"{high:+.{digits}f} |")
    head = [f"| measure | {ours} less {other} | 95 % interval |", "|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def of_one_shape(rows):
    """The rows whose latents have the same shape, the KL-VAE with one weight: those to look at together."""
    return {name: seeds for name, seeds in rows.items() if not re.search("channels|weight|learnable", name)}


def rank_correlations(rows):
    """Spearman's, of means over seeds: the linear probe [Fig. 5a] and the diffusion loss [Fig. 2b] against
    distances. Over the rows `of_one_shape`. A Markdown list."""
    chosen = [seeds.values() for seeds in of_one_shape(rows).values()]
    lines = []
    for title, key in (("Linear probe", "probe"), ("Diffusion loss", "diffusion loss"),
                       ("Diffusion loss over the Gaussian's", "loss over gaussian")):
        for against in ("distance, classifier", "distance, ImageNet features", "gap, classifier"):
            other = ORDER[against][0]
            points = [[np.mean([seed[k] for seed in seeds]) for k in (key, other)] for seeds in chosen
                      if all(key in seed and other in seed for seed in seeds)]
            if len(points) > 2:
                value = scipy.stats.spearmanr(*zip(*points)).statistic
                lines.append(f"- {title} against {against}: {value:.2f}, {len(points)} rows.")
    return "\n".join(lines)


# ------------------------------------------------ pictures -------------------------------------------------

def spread(values):
    """(mean, lowest, highest), for a chart."""
    return np.mean(values), min(values), max(values)


def report(args, units, sources):
    """Write OUT/SETTING.json, .md and .png, and the tables to the screen. args: study.py's, for `setting`,
    `data`, `out`, `plan`; units: {row: {seed: (folder, done)}}, at least one; sources: as in `markdown`."""
    plan, out = args.plan, Path(args.out)
    rows = {name: {seed: read_unit(name, *unit) for seed, unit in seeds.items()}
            for name, seeds in units.items()}
    machines = {entry["machine"] for seeds in units.values() for _, done in seeds.values()
                for entry in done.values()}
    accuracy = np.mean([unit["classifier accuracy"] for seeds in rows.values() for unit in seeds.values()])
    # The command lines as they were run for each row's first seed.
    commands = {name: {title: "python " + shlex.join(entry["arguments"])
                       for title, entry in seeds[min(seeds)][1].items()} for name, seeds in units.items()}
    result = {"setting": args.setting, "data": args.data, "plan": plan | {"rows": list(rows)}, "rows": rows,
              "reference_curves": reference_curves(units), "commands": commands,
              "protocol": f"{' and '.join(sorted(machines))}; "
              f"{plan['samples']} samples, EMA weights, Euler, {plan['sampler_steps']} steps; distances in "
              f"features of a classifier trained on the real images (right on {100 * accuracy:.0f} % of the "
              "test images), or of EfficientNet-Lite0 (not FID); "
              "seeds of each row: " + ", ".join(f"{name} {len(seeds)}" for name, seeds in rows.items())}
    files.write_json(out / f"{args.setting}.json", result)
    tables = {"Summary": SUMMARY, "Tokenizers": TOKENIZERS,
              "Samples, in the classifier's features": DIFFUSION,
              "In EfficientNet-Lite0's features": IMAGENET}
    tables = {title: markdown(rows, columns, sources) for title, columns in tables.items()}
    tables |= {"Over diffusion steps": over_training(rows, sources),
               "Does the paper's order hold?": verdicts(rows), "How sure is the lead?": lead(rows),
               "Beside the AE at the same PSNR": at_equal_psnr(rows), "The target or the mask?": halves(rows),
               "Rank correlations over rows": rank_correlations(rows), "How to read this": READING,
               "Protocol": result["protocol"]}
    tables = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items() if table)
    print(f"\n{tables}")
    files.atomic_write(out / f"{args.setting}.md", lambda p: p.write_text(tables + "\n"))
    charts = {**line_charts(rows), "samples": sample_sheet(units), **loss_chart(result["reference_curves"])}
    for name, picture in charts.items():
        files.write_png(out / f"{args.setting}_{name}.png", picture)
    print(f"wrote {out}/{args.setting}.json, .md, _{'.png, _'.join(charts)}.png")


def line_charts(rows):
    """{"curves": over diffusion steps [Fig. 5b], "figures": diffusion loss over steps [Fig. 2b], its second
    half over the Gaussian's, and below the linear probe against distances [Fig. 5a], "mixtures": NLL against
    K [Fig. 2a], "psnr": measures against it}. The first two of the rows `of_one_shape`, or of all where there
    is none of these."""
    alike, panels = of_one_shape(rows) or rows, []
    for title, (key, column, _, factor) in CURVES.items():
        series = {name: [(points[0][0], *spread([factor * point[column] for point in points]))
                         for points in zip(*(seed[key] for seed in seeds.values()))]
                  for name, seeds in alike.items() if all(key in seed for seed in seeds.values())}
        panels += [(title, series)] if series else []
    pictures = {"curves": sheet_of([line_chart(dict(panels[n:n + 3]), "diffusion step")
                                    for n in range(0, len(panels), 3)], columns=1)}
    over_seeds = lambda curves: [(points[0][0], *spread([y for _, y in points])) for points in zip(*curves)]
    late = lambda curve: curve[len(curve) // 2:]
    loss = {"diffusion loss": lambda seed: seed["loss curve"],
            "over the loss of a Gaussian": lambda seed: [(step, y / seed["gaussian loss"])
                                                         for step, y in late(seed["loss curve"])]}
    losses = line_chart(
        {title: {name: over_seeds(map(curve_of, seeds.values())) for name, seeds in alike.items()}
         for title, curve_of in loss.items()}, "diffusion step")
    panels = {}
    for title in ("distance, classifier", "distance, ImageNet features", "gap, classifier"):
        key = ORDER[title][0]
        panels[title] = {name: [(100 * np.mean([seed["probe"] for seed in seeds.values()]),
                                 *spread([seed[key] for seed in seeds.values()]))]
                         for name, seeds in alike.items() if all(key in seed for seed in seeds.values())}
    probe = line_chart({title: series for title, series in panels.items() if series},
                       "linear-probe accuracy, %")
    pictures["figures"] = sheet_of([losses, probe], columns=1)
    panels = {}
    for kind in ("full", "diagonal"):
        first = next(iter(next(iter(rows.values())).values()))
        keys = [key for key in first if key.startswith(f"nll {kind} K ")]
        panels[f"NLL of held-out latents, {kind}"] = {
            name: [(int(key.split()[-1]), *spread([seed[key] for seed in seeds.values()])) for key in keys]
            for name, seeds in rows.items()}
    pictures["mixtures"] = line_chart(panels, "K", log_x=True)
    # Rows of four times as many tokens, at 30 dB, would squeeze the others into a corner.
    widths = {name: [n for n in (f"{name}, 8 channels", f"{name}, 16 channels", name) if n in rows]
              for name in rows if "channels" not in name and "no learnable" not in name}
    panels = {}
    for title in ("distance, ImageNet features", "distance, classifier", "gap, classifier",
                  "linear-probe accuracy, %"):
        key, _, factor, _ = ORDER[title]
        # A row without this measure stays, empty: it keeps its colour.
        panels[title] = {name: [(np.mean([seed["psnr stage2"] for seed in rows[n].values()]),
                                 *spread([factor * seed[key] for seed in rows[n].values()]))
                                for n in names if all(key in seed for seed in rows[n].values())]
                         for name, names in widths.items()}
    if panels := [(title, series) for title, series in panels.items() if any(series.values())]:
        pictures["psnr"] = sheet_of([line_chart(dict(panels[n:n + 2]),
                                                "PSNR after stage 2, dB; lines join 8, 16, 32 channels")
                                     for n in range(0, len(panels), 2)], columns=1)
    return pictures


def reference_curves(units, name="MAETok (HOG)", points=20):
    """What losses the default row has had with seed 0, {stage: [record]}: for "What should I see?"."""
    curves = {}
    if 0 not in units.get(name, {}):
        return curves
    for part in ("stage1", "stage2", "diffusion"):
        records = [r for r in checkpoints.read_metrics(units[name][0][0] / part) if "loss" in r]
        chosen = sorted(set(np.linspace(0, len(records) - 1, points).astype(int))) if records else []
        curves[part] = [{key: r[key] for key in ("step", "loss", "recon", "hog") if key in r}
                        for r in (records[i] for i in chosen)]
    return curves


def loss_chart(curves):
    """{"losses": a chart of `reference_curves`}; empty without them."""
    losses = {f"{part}: {key}": [(record["step"], record[key]) for record in records if key in record]
              for part, records in curves.items() for key in ("recon", "hog", "loss")
              if part == "diffusion" or key != "loss"}
    return {"losses": plot_curves(losses)} if any(losses.values()) else {}


SHEET = ("AE", "KL-VAE", "AE + mask, pixels", "MAETok (HOG)", "MAETok (HOG, EfficientNet)")


def sample_sheet(units):
    """Guided samples of the first seed of five rows at most, of SHEET where it was measured: the same classes
    from the same noise below one another."""
    chosen = [name for name in SHEET if name in units] or [*units][:5]
    rows = []
    for name in chosen:
        with np.load(units[name][min(units[name])][0] / "sheet.npz") as file:
            first = np.unique(file["arr_1"], return_index=True)[1][:10]              # one of each class
            rows.append([Image.fromarray(image) for image in file["arr_0"][first]])
    return image_grid(rows, chosen, cell=112, title_width=210)
