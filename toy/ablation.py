"""Do the paper's modifications help? The tables of §4 on the digits, over paired seeds.

    python toy/ablation.py                  all tables -> ablation.json, ablation.png, guidance.png
    python toy/ablation.py --rows 3 late    two tables
    python toy/ablation.py --quick          Tables 3 and 5, with 2 seeds and few steps

All rows start from one teacher, toy/teacher.pt; a seed is one distillation. What a row does not
change is the default of drift_rae.py, except that there are 50 steps. The first row of a
table is its reference. Differences from the reference are taken seed by seed. They are called
better or worse where the 95 % t-interval excludes 0, which 1 of 20 differences does by chance.
Runs are kept in OUT/ablation.json, so an interrupted command continues where it stopped.
"""
import argparse
import dataclasses
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import digits, plot, runs  # noqa: E402

# ---- What is compared


class Row(NamedTuple):
    name: str
    changes: dict               # of Config's defaults
    paper: float = np.nan       # FID on ImageNet-256
    start: str = "teacher"      # where the student starts: the teacher's weights, or "scratch"
    loss: str = "latents"       # "latents", "Prop. 1" or "decode–encode"
    guidance: float = 0.0       # dr.guide's weight, for the finished student
    longer: int = 1             # factor of the steps
    one_seed: bool = False      # with seed 0 alone, because the row takes long


class Table(NamedTuple):
    title: str
    rows: list                  # the first is the reference


def counts(positives, negatives):
    return dict(n_pos=positives, n_neg=64, n_extra_neg=negatives - 64)


SMALL, LARGE = counts(64, 64), counts(256, 256)
CLEAN, Y = dict(perturb=False), dict(field="y-softmax")
FAST, WIDE = dict(lr=2e-3), dict(windows=(1, 2))
LATE = dict(longer=5, one_seed=True)
TABLES = {
    "3": Table("Table 3: the three modifications", [
        Row("A: Deng et al.", SMALL | CLEAN | Y, 2.01), Row("B: Eq. (11), (12)", SMALL, 1.94),
        Row("C: B at 256/64+192", LARGE, 1.77)]),
    "rate": Table("Table 3 at a learning rate of 2e-3 in place of 1e-3", [
        Row("A", SMALL | CLEAN | Y | FAST), Row("B", SMALL | FAST), Row("C", LARGE | FAST)]),
    "5": Table("Table 5: perturbation and y-softmax, at 64/64", [
        Row("perturbed", SMALL, 1.94), Row("clean", SMALL | CLEAN, 2.44),
        Row("perturbed, y-softmax", SMALL | Y, 2.14),
        Row("clean, y-softmax", SMALL | CLEAN | Y, 2.01)]),
    "7": Table("Table 7: positives/negatives", [
        Row("256/256", counts(256, 256), 1.77), Row("256/64", counts(256, 64), 4.66),
        Row("128/128", counts(128, 128), 1.87), Row("128/64", counts(128, 64), 2.50),
        Row("64/256", counts(64, 256), 4.95), Row("64/128", counts(64, 128), 2.88),
        Row("64/64", counts(64, 64), 1.94)]),
    "6": Table("Table 6: negatives with gradient (the paper: 1.77 to 1.80)", [
        Row("64 of 256", LARGE), Row("128 of 256", dict(n_neg=128, n_extra_neg=128)),
        Row("256 of 256", dict(n_neg=256, n_extra_neg=0))]),
    "temperatures": Table("Temperatures", [
        Row("0.02, 0.05, 0.2", {}),
        *(Row(f"{tau} alone", dict(temperatures=(tau,))) for tau in (0.02, 0.05, 0.2))]),
    "windows": Table("Windows of {w}×{w} tokens drift as one vector (our addition)", [
        Row("{1}", {}), Row("{2}", dict(windows=(2,))), Row("{1, 2}", WIDE)]),
    "field": Table("The field of Prop. 1 (our addition), twice the steps", [
        Row("Eq. (11)", {}, longer=2), Row("Prop. 1", {}, loss="Prop. 1", longer=2)]),
    "both": Table("Windows and the field of Prop. 1, four times the steps", [
        Row("{1}", {}, longer=4), Row("{1, 2}, rate 2e-3", FAST | WIDE, longer=4),
        Row("the same, Prop. 1", FAST | WIDE, loss="Prop. 1", longer=4)]),
    "guidance": Table("Guidance of C, our reading of the abstract of the paper's second version", [
        Row(f"w = {w:g}", {}, guidance=w) for w in (0.0, 0.05, 0.1, 0.2, 0.4)]),
    "9": Table("Table 9: from scratch", [
        Row("from scratch", {}, 100.31, "scratch"),
        Row("decode–encode", {}, 7.04, "scratch", "decode–encode"),
        Row("from the teacher", {})]),
    "late": Table("Tables 5 and 9, later: 5 times the steps, at 64/64", [
        Row("perturbed", SMALL, **LATE), Row("clean", SMALL | CLEAN, **LATE),
        Row("from scratch", SMALL, 100.31, "scratch", **LATE),
        Row("decode–encode", SMALL, 7.04, "scratch", "decode–encode", **LATE)]),
}
METRICS = {"fd": "Fréchet ↓", "precision": "precision ↑", "recall": "recall ↑",
           "label_accuracy": "label ↑"}

# ---- One run


def decode_encode_loss(gen, pos, extra_neg, cfg, generator, rae):
    """Table 9's decode–encode: all latents pass through the decoder and the encoder.

    The positives must do so, too. Otherwise the field would not vanish for a perfect generator,
    because decoding and encoding changes latents.
    """
    parts = [rae.encode(rae.decode(latents)) for latents in (gen, pos, extra_neg)]
    return dr.latent_loss(*parts, cfg, generator)


def distil_and_measure(job):
    """job: (the teacher's path, start, loss, Config, weights of the guidance).

    -> {weight: what Metrics returns}, whose values are NaN if the training diverges.
    """
    path, start, loss, cfg, weights = job
    network, rae, checkpoint = runs.open_teacher(path)
    if start == "scratch":
        torch.manual_seed(cfg.seed)
        network = dr.DiTDH(**digits.TEACHER)
    losses = {"latents": dr.variant_loss, "Prop. 1": runs.gradient_loss,
              "decode–encode": partial(decode_encode_loss, rae=rae)}
    latents, labels = checkpoint["latents"], checkpoint["labels"]
    try:
        student = runs.distilled(network, latents, labels, cfg, losses[loss])
    except dr.UserError:        # train_step: the gradient is NaN or infinite
        return {str(w): dict.fromkeys(METRICS, np.nan) for w in weights}
    measure = digits.Metrics(checkpoint)
    metrics = {}
    for w in weights:
        sampler = partial(dr.one_step, dr.guide(student, w))
        images = dr.generate(sampler, rae, measure.labels, cfg)
        metrics[str(w)] = measure(images, measure.labels)
    return metrics


# ---- All runs


def key_of(row, cfg):
    """The name of a run in ablation.json: everything that its result depends on."""
    names = [option.name for option in dataclasses.fields(cfg)]
    method = names[:names.index("preset")]                  # the later fields are about the command
    settings = [f"{name}={getattr(cfg, name)}" for name in method]
    return ", ".join([row.start, row.loss, *settings])


def runs_of(tables, args):
    """Yield (key, row, Config) for every seed of every row. Rows with equal keys are one run."""
    for table in tables:
        for row in TABLES[table].rows:
            steps = row.longer * args.steps
            for seed in range(1 if row.one_seed else args.seeds):
                cfg = dr.Config(device="cpu", seed=seed, steps=steps, **row.changes)
                yield key_of(row, cfg), row, cfg


def plan(args):
    """-> {key: what distil_and_measure takes}, for the chosen tables."""
    # A run is measured for all tables, also those that are not chosen now, to be trained only once.
    weights = defaultdict(set)
    for key, row, _ in runs_of(TABLES, args):
        weights[key].add(row.guidance)
    jobs = {}
    for key, row, cfg in runs_of(args.rows, args):
        jobs[key] = args.teacher, row.start, row.loss, cfg, weights[key]
    return jobs


def gather(table, args, done):
    """-> {name of a row: {metric: its values, one per seed}}; done: what `complete` returned."""
    results = {row.name: defaultdict(list) for row in TABLES[table].rows}
    for key, row, _ in runs_of([table], args):
        metrics = done[key][str(row.guidance)]
        for metric in METRICS:
            results[row.name][metric].append(metrics[metric])
    return results


# ---- Tables and pictures

BARS = {"better": "#b5dfb5", "worse": "#f0b8b0", "": "#cfd8e6"}
LEGEND = {"better": "#229944", "worse than the first": "#c8102e"}


def paired(a, b):
    """Values of the same seeds -> mean of a − b, half of its 95 % t-interval, verdict."""
    difference = np.subtract(a, b)
    n = len(difference)
    mean, sd = runs.mean_sd(difference)
    half = stats.t.ppf(0.975, n - 1) * sd / n**0.5
    verdict = ""
    if mean + half < 0:
        verdict = "better"
    if mean - half > 0:
        verdict = "worse"
    return mean, half, verdict


def show(tables):
    """Print one table for the page: means, and the difference from the first row."""
    header = ["", "seeds", *METRICS.values(), "Δ Fréchet, 95 %", "", "paper's FID"]
    lines = []
    for table, results in tables.items():
        title, rows = TABLES[table]
        lines.append([f"**{title}**"] + [""] * (len(header) - 1))
        reference = results[rows[0].name]["fd"]
        for row in rows:
            values = results[row.name]
            cells = [runs.cell(values[metric], 2 if metric == "fd" else 3) for metric in METRICS]
            mean, half, verdict = paired(values["fd"], reference)
            difference = f"{mean:+.2f}"
            if not np.isnan(half):                          # it is NaN for one seed
                difference += f" ± {half:.2f}"
            if row is rows[0]:
                difference, verdict = "", "reference"
            paper = "" if np.isnan(row.paper) else f"{row.paper:.2f}"
            lines.append([row.name, str(len(values["fd"])), *cells, difference, verdict, paper])
    runs.print_table(header, lines)


def panel(table, results):
    """The Fréchet distances: one dot per seed, a bar at the mean, a diamond at the paper's FID."""
    title, rows = TABLES[table]
    numbers = [row.paper for row in rows]
    for values in results.values():
        numbers += values["fd"]
    lowest, highest = np.nanmin(numbers), np.nanmax(numbers)
    low, high = 0, 1.1 * highest
    log = highest > 20 * lowest
    if log:
        low, high = lowest / 2, highest * 2
    names = {-i: row.name for i, row in enumerate(rows)}
    label = "Fréchet distance; hollow: the paper's FID"
    axes = plot.Axes(title, label, "", (low, high), (0.4 - len(rows), 0.6), x_log=log,
                     y_ticks=names, legend=LEGEND, size=(680, 110 + 36 * len(rows)), right=80)
    reference = results[rows[0].name]["fd"]
    for i, row in enumerate(rows):
        fd = results[row.name]["fd"]
        verdict = paired(fd, reference)[2]
        axes.bar(np.mean(fd), -i, BARS[verdict])
        axes.points(fd, -i, "#1f3f77")
        axes.diamonds(row.paper, -i)
        axes.text(high, -i, f"{np.mean(fd):.2f}")
    return axes.image()


def guidance_curve(results):
    """Precision over recall: a pale dot per seed, and a line through the means."""
    recall = np.array([values["recall"] for values in results.values()])        # [rows,seeds]
    precision = np.array([values["precision"] for values in results.values()])
    limits = [(x.min() - 0.01, x.max() + 0.01) for x in (recall, precision)]
    title = TABLES["guidance"].title
    axes = plot.Axes(title, "recall", "precision", *limits, right=90)
    axes.points(recall, precision, "#b4c6e4")
    x, y = recall.mean(1), precision.mean(1)
    blue = plot.COLOURS[0]
    axes.line(x, y, blue)
    axes.points(x, y, blue, radius=6)
    for i, name in enumerate(results):
        axes.text(x[i], y[i], name, anchor="ls")
    return axes.image()


# ---- The command

FULL = {"seeds": 3, "steps": 50, "rows": list(TABLES)}
QUICK = {"seeds": 2, "steps": 12, "rows": ["3", "5"]}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of the results (default: out)")
    add("--teacher", type=Path, default=dr.Config.teacher, help="default: toy/teacher.pt")
    add("--quick", action="store_true", help="Tables 3 and 5, with few seeds and steps")
    add("--seeds", type=int, help="seeds per row (default: 3; with --quick 2)")
    add("--steps", type=int, help="optimizer steps (default: 50; with --quick 12)")
    add("--rows", nargs="+", choices=TABLES, help="tables (default: all; with --quick 3 5)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.seeds, args.steps, args.jobs) < 1:
        raise dr.UserError("--seeds, --steps and --jobs must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    dr.make_folder(args.out)
    runs.open_teacher(args.teacher)     # refuse a wrong file before the workers start
    jobs = plan(args)
    done = runs.complete(args.out / "ablation.json", args.teacher, jobs, distil_and_measure,
                         args.jobs)
    tables = {name: gather(name, args, done) for name in args.rows}
    show(tables)
    panels = [panel(name, results) for name, results in tables.items()]
    runs.save_png(args.out / "ablation.png", plot.sheet(panels, 2))
    if "guidance" in tables:
        runs.save_png(args.out / "guidance.png", guidance_curve(tables["guidance"]))


if __name__ == "__main__":
    dr.run_as_script(main)
