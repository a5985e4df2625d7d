"""Do the paper's modifications help? §4's tables on the digits, with differences over paired seeds.

    python toy/ablation.py                  all tables -> ablation.json, ablation.png, guidance.png
    python toy/ablation.py --rows 3 late    two tables; goes on where it was interrupted
    python toy/ablation.py --quick          Tables 3 and 5, 2 seeds, few steps

One teacher serves all rows; a seed is one distillation. What a row leaves open is the default of
drift_rae.py, at half its steps. A table's first row is the reference: differences from it are taken
seed by seed, and called better or worse where a 95 % t-interval excludes 0; by chance 1 of 20 does.
"""
import argparse
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
from drift_rae import (Config, DiTDH, command, encode, generate, guide, load_pair,  # noqa: E402
                       one_step, write_atomically)
from toy.digits import TEACHER, Metrics, make_teacher  # noqa: E402
from toy.plot import COLOURS, Axes, sheet  # noqa: E402
from toy.runs import cell, complete, distil_aside, mean_sd, print_table  # noqa: E402

# ---- What is compared

class Row(NamedTuple):
    name: str
    changes: dict               # of Config's defaults
    paper: float = np.nan       # FID on ImageNet-256
    start: str = "teacher"      # of the student; or scratch, or pixels: scratch and ThroughPixels
    guidance: float = 0.0       # of the finished student
    longer: int = 1             # times the steps; from 5 on, a row has one seed

class Table(NamedTuple):
    title: str
    rows: list                  # the first is the reference

def counts(positives, negatives):
    return dict(n_pos=positives, n_neg=64, n_extra_neg=negatives - 64)

SMALL, LARGE = counts(64, 64), counts(256, 256)
CLEAN, Y = dict(perturb=False), dict(field="y-softmax")
FAST, WIDE = dict(lr=2e-3), dict(windows=(1, 2))
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
    "windows": Table("Windows (ours): sides, in tokens, of what drifts as one", [
        Row("{1}", {}), Row("{2}", dict(windows=(2,))), Row("{1, 2}", WIDE)]),
    "field": Table("The field of Prop. 1 (ours), twice the steps", [
        Row("Eq. (11)", {}, longer=2), Row("Prop. 1", dict(field="gradient"), longer=2)]),
    "both": Table("Windows and that field, four times the steps", [
        Row("{1}", {}, longer=4), Row("{1, 2}, rate 2e-3", FAST | WIDE, longer=4),
        Row("the same, Prop. 1", FAST | WIDE | dict(field="gradient"), longer=4)]),
    "guidance": Table("Guidance of C, our reading of v2's abstract", [
        Row(f"w = {w:g}", {}, guidance=w) for w in (0.0, 0.05, 0.1, 0.2, 0.4)]),
    "9": Table("Table 9: from scratch", [
        Row("from scratch", {}, 100.31, "scratch"), Row("decode–encode", {}, 7.04, "pixels"),
        Row("from the teacher", {})]),
    "late": Table("Tables 5 and 9, later: 5 times the steps, at 64/64", [
        Row("perturbed", SMALL, longer=5), Row("clean", SMALL | CLEAN, longer=5),
        Row("from scratch", SMALL, 100.31, "scratch", longer=5),
        Row("decode–encode", SMALL, 7.04, "pixels", longer=5)]),
}
BARS = {"better": "#b5dfb5", "worse": "#f0b8b0", "": "#cfd8e6"}
LEGEND = {"better": "#229944", "worse than the first": "#c8102e"}
METRICS = {"fd": "Fréchet ↓", "precision": "precision ↑", "recall": "recall ↑",
           "label_accuracy": "label ↑"}

# ---- One run

class ThroughPixels(torch.nn.Module):
    """Table 9's decode–encode: a student whose one_step is encode(decode(G(z))), with gradients.
    The field vanishes for a perfect generator only if the positives went through the decoder, too.
    """
    def __init__(self, student, rae):
        super().__init__()
        self.student, self.rae = student, rae

    def forward(self, x, t, y):
        images = self.rae.decode(one_step(self.student, x, y))
        return x - self.rae.encode(images)                  # one_step is x − this

def prepare(path, start, cfg):
    """-> student as distil takes it, latents of the positives, RAE, the teacher's file."""
    student, rae, ours = load_pair(path, cfg)
    latents = encode(rae, ours["images"], cfg)
    if start != "teacher":
        torch.manual_seed(cfg.seed)
        student = DiTDH(**TEACHER)
    if start == "pixels":
        student = ThroughPixels(student, rae)
        with torch.no_grad():
            latents = rae.encode(rae.decode(latents))
    return student, latents, rae, ours

def work(job):
    """(teacher's path, start, Config, weights of the guidance) -> {weight: what Metrics gives}."""
    path, start, cfg, weights = job
    student, latents, rae, ours = prepare(path, start, cfg)
    try:
        student = distil_aside(student, latents, ours["labels"], cfg)
    except FloatingPointError:                              # it diverged
        return {str(w): dict.fromkeys(METRICS, np.nan) for w in weights}
    if start == "pixels":
        student = student.student
    measure = Metrics(ours)
    metrics = {}
    for w in weights:
        images = generate(partial(one_step, guide(student, w)), rae, measure.labels, cfg)
        metrics[str(w)] = measure(images, measure.labels)
    return metrics

# ---- All runs

def runs_of(tables, args):
    """(key, row, Config) of every seed of every row; rows of the same key are one run."""
    for table in tables:
        for row in TABLES[table].rows:
            steps = row.longer * args.steps
            for seed in range(args.seeds if row.longer < 5 else 1):
                cfg = Config(device="cpu", seed=seed, steps=steps, save_every=steps, **row.changes)
                yield f"{row.start}: {cfg}", row, cfg

def plan(args):
    """{key: what `work` takes} of the chosen tables."""
    weights = defaultdict(set)              # also of tables that are not asked for now
    for key, row, _ in runs_of(TABLES, args):
        weights[key].add(row.guidance)
    return {key: (args.out / "teacher.pt", row.start, cfg, weights[key])
            for key, row, cfg in runs_of(args.rows, args)}

def gather(table, args, runs):
    """{row's name: {metric: its values, one a seed}}"""
    results = {row.name: defaultdict(list) for row in TABLES[table].rows}
    for key, row, _ in runs_of([table], args):
        metrics = runs[key][str(row.guidance)]
        for metric in METRICS:
            results[row.name][metric].append(metrics[metric])
    return results

# ---- Tables and pictures

def paired(a, b):
    """Values of the same seeds -> mean of a − b, half its 95 % t-interval, verdict."""
    difference = np.subtract(a, b)
    n = len(difference)
    mean, sd = mean_sd(difference)
    half = stats.t.ppf(0.975, n - 1) * sd / n**0.5
    verdict = ""
    if mean + half < 0:
        verdict = "better"
    if mean - half > 0:
        verdict = "worse"
    return mean, half, verdict

def show(tables):
    """One table for the page: mean ± standard deviation, difference from the first row."""
    header = ["", "seeds", *METRICS.values(), "Δ Fréchet, 95 %", "", "paper's FID"]
    lines = []
    for table, results in tables.items():
        title, rows = TABLES[table]
        lines.append([f"**{title}**"] + [""] * (len(header) - 1))
        reference = results[rows[0].name]["fd"]
        for row in rows:
            values = results[row.name]
            cells = [cell(values[metric], 2 if metric == "fd" else 3) for metric in METRICS]
            mean, half, verdict = paired(values["fd"], reference)
            difference = f"{mean:+.2f} ± {half:.2f}".removesuffix(" ± nan")     # of one seed
            if row is rows[0]:
                difference, verdict = "", "reference"
            paper = "" if np.isnan(row.paper) else f"{row.paper:.2f}"
            lines.append([row.name, str(len(values["fd"])), *cells, difference, verdict, paper])
    print_table(header, lines)

def panel(table, results):
    """Fréchet distances: a dot a seed, a bar at the mean, a diamond at the paper's FID."""
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
    axes = Axes(title, label, "", (low, high), (0.4 - len(rows), 0.6), x_log=log, y_ticks=names,
                legend=LEGEND, size=(680, 110 + 36 * len(rows)), right=80)
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
    """Precision against recall: pale dots the seeds, a line through the means."""
    recall = np.array([values["recall"] for values in results.values()])        # [rows,seeds]
    precision = np.array([values["precision"] for values in results.values()])
    limits = [(x.min() - 0.01, x.max() + 0.01) for x in (recall, precision)]
    axes = Axes(TABLES["guidance"].title, "recall", "precision", *limits, right=90)
    axes.points(recall, precision, "#b4c6e4")
    x, y = recall.mean(1), precision.mean(1)
    axes.line(x, y, COLOURS[0])
    axes.points(x, y, COLOURS[0], radius=6)
    for i, name in enumerate(results):
        axes.text(x[i], y[i], name, anchor="ls")
    return axes.image()

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of teacher.pt and results (default: out)")
    add("--quick", action="store_true", help="Tables 3 and 5 with few seeds and steps")
    add("--seeds", type=int, help="seeds of each row (default: 3; with --quick 2)")
    add("--steps", type=int, help="optimizer steps (default: half of drift_rae.py's; --quick: 1/8)")
    add("--rows", nargs="+", choices=TABLES, help="tables (default: all; with --quick 3 5)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: a core each)")
    parser.set_defaults(seeds=3, steps=Config.steps // 2, rows=list(TABLES))
    if parser.parse_args(argv).quick:
        parser.set_defaults(seeds=2, steps=Config.steps // 8, rows=["3", "5"])
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.jobs) < 1:
        parser.error("--seeds, --steps and --jobs must be at least 1")
    return args

def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = args.out / "teacher.pt"
    if not teacher.exists():
        make_teacher(teacher)
    runs = complete(args.out / "ablation.json", teacher, plan(args), work, args.jobs)
    tables = {name: gather(name, args, runs) for name in args.rows}
    show(tables)
    panels = [panel(name, results) for name, results in tables.items()]
    pictures = {"ablation.png": sheet(panels, 2)}
    if "guidance" in tables:
        pictures["guidance.png"] = guidance_curve(tables["guidance"])
    for name, picture in pictures.items():
        with write_atomically(args.out / name) as file:
            picture.save(file, "PNG")

if __name__ == "__main__":
    command(main)
