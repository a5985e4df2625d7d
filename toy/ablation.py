"""Do the paper's modifications help? The tables of §4 on the digits, over eight paired seeds.

    python toy/ablation.py                  print the tables of toy/results/ablation.json
    python toy/ablation.py --out DIR        measure them anew: DIR/ablation.json and two pictures
    python toy/ablation.py --out DIR --rows 3 7       only these tables
    python toy/ablation.py --quick          Tables 3 and 5 with 2 seeds and few steps, into out/

All rows start from one teacher, toy/teacher.pt; a seed is one distillation. What a row does not
change is the default of drift_rae.py, except for the 50 steps and the learning rate RATE, which is
the best of the table "rates" and the same in all other tables. The first row of a table is its
reference, and differences from the reference are taken seed by seed. Where many differences are
tested, some seem to be real by chance. So the intervals are widened as Holm's method asks for, and
a row is called better or worse only where its interval excludes 0.
Runs are kept in DIR/ablation.json, so an interrupted command continues where it stopped.
"""
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
    loss: str = "latents"       # "latents", "Prop. 1" or "decode-encode"
    guidance: float = 0.0       # dr.guide's weight, for the finished student


class Table(NamedTuple):
    title: str
    rows: list                  # the first is the reference
    longer: int = 1             # factor of the steps
    seeds: range = range(8)


def counts(positives, negatives):
    return dict(n_pos=positives, n_extra_neg=negatives - 64)


RATE = 2e-3
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SMALL, LARGE = counts(64, 64), counts(256, 256)
CLEAN, Y = dict(perturb=False), dict(field="y-softmax")
TABLES = {
    "rates": Table("Rows A and C of Table 3 at five learning rates", [
        Row(f"{name}, rate {lr:g}", changes | dict(lr=lr))
        for name, changes in (("A", SMALL | CLEAN | Y), ("C", LARGE)) for lr in RATES],
        seeds=range(100, 102)),
    "7": Table("Table 7: positives/negatives", [
        Row("256/256", counts(256, 256), 1.77), Row("128/128", counts(128, 128), 1.87),
        Row("64/64", counts(64, 64), 1.94), Row("128/64", counts(128, 64), 2.50),
        Row("64/128", counts(64, 128), 2.88), Row("256/64", counts(256, 64), 4.66),
        Row("64/256", counts(64, 256), 4.95)]),
    "3": Table("Table 3: the three modifications", [
        Row("C: B with 256/256", LARGE, 1.77), Row("B: Eq. (11), (12)", SMALL, 1.94),
        Row("A: Deng et al.", SMALL | CLEAN | Y, 2.01)]),
    "5": Table("Table 5: perturbation and y-softmax, with 64/64", [
        Row("perturbed", SMALL, 1.94), Row("clean, y-softmax", SMALL | CLEAN | Y, 2.01),
        Row("perturbed, y-softmax", SMALL | Y, 2.14), Row("clean", SMALL | CLEAN, 2.44)]),
    "6": Table("Table 6: negatives with gradient", [
        Row("64 of 256", LARGE), Row("256 of 256", dict(n_neg=256, n_extra_neg=0))]),
    "guidance": Table("Guidance of 256/256 (our reading of the abstract of the second version)", [
        Row(f"w = {w:g}", LARGE, guidance=w) for w in (0.0, 0.05, 0.1, 0.2, 0.4)]),
    "additions": Table("Our additions", [
        Row("Drift-RAE", LARGE), Row("windows 1 and 2", LARGE | dict(windows=(1, 2))),
        Row("field of Prop. 1", LARGE, loss="Prop. 1")]),
    "later": Table("Tables 5 and 9, four times the steps, with 64/64", [
        Row("perturbed", SMALL), Row("clean", SMALL | CLEAN),
        Row("from scratch", SMALL, start="scratch"),
        Row("from scratch, decode-encode", SMALL, start="scratch", loss="decode-encode")],
        longer=4, seeds=range(3)),
}
FEW_SEEDS = ("rates", "later")      # tables in which no difference is tested
METRICS = {"fd": "distance ↓", "precision": "precision ↑", "recall": "recall ↑",
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
              "decode-encode": partial(decode_encode_loss, rae=rae)}
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
        all_metrics = measure(images, measure.labels)
        metrics[str(w)] = {name: round(all_metrics[name], 5) for name in METRICS}
    return metrics


# ---- All runs


def runs_of(table, args):
    """Yield (key, row, Config) for every seed of every row. Rows with equal keys are one run."""
    _, rows, longer, seeds = TABLES[table]
    for row in rows:
        changes = dict(lr=RATE, steps=longer * args.steps) | row.changes
        texts = [f"{name}={value}" for name, value in sorted(changes.items())]
        for seed in seeds[:args.seeds]:
            key = ", ".join([row.start, row.loss, *texts, f"seed={seed}"])
            yield key, row, dr.Config(device="cpu", seed=seed, **changes)


def plan(args):
    """-> {key: what distil_and_measure takes}, for the chosen tables."""
    # A run is measured for all tables, also those that are not chosen now, to be trained only once.
    weights = defaultdict(set)
    for table in TABLES:
        for key, row, _ in runs_of(table, args):
            weights[key].add(row.guidance)
    jobs = {}
    for table in args.rows:
        for key, row, cfg in runs_of(table, args):
            jobs[key] = args.teacher, row.start, row.loss, cfg, sorted(weights[key])
    return jobs


def gather(table, args, done):
    """-> {name of a row: {metric: its values, one per seed}}; done: {key: run}."""
    results = {row.name: defaultdict(list) for row in TABLES[table].rows}
    for key, row, _ in runs_of(table, args):
        metrics = done[key][str(row.guidance)]
        for metric in METRICS:
            results[row.name][metric].append(metrics[metric])
    return results


# ---- Statistics


def differences(tables):
    """Differences of the distances from those of each table's first row, paired by seed.

    Tables with few seeds are left out.
    tables: {table: what `gather` returns} -> {(table, row): array with one value per seed}
    """
    found = {}
    for table, results in tables.items():
        if table in FEW_SEEDS:
            continue
        reference, *others = results
        for name in others:
            pair = results[name]["fd"], results[reference]["fd"]
            found[table, name] = np.subtract(*pair)
    return found


def holm(differences):
    """Paired t-tests of {name: differences}, corrected by Holm's method for how many they are.

    -> {name: (low, high, verdict)}. The method tests the smallest p-value at the level 0.05/m, the
    next one at 0.05/(m − 1), and so on, and stops at the first that fails. An interval has the
    level at which its difference is tested. It may only be read as a verdict before the stop.
    """
    values = {name: x for name, x in differences.items() if len(x) > 1 and np.isfinite(x).all()}
    p_values = {name: stats.ttest_1samp(x, 0).pvalue for name, x in values.items()}
    in_order = sorted(values, key=p_values.get)
    found = {}
    stopped = False
    for rank, name in enumerate(in_order):
        level = 0.05 / (len(in_order) - rank)
        stopped = stopped or p_values[name] >= level
        x = values[name]
        half = stats.t.ppf(1 - level / 2, len(x) - 1) * stats.sem(x)
        verdict = "better" if x.mean() < 0 else "worse"
        found[name] = x.mean() - half, x.mean() + half, "" if stopped else verdict
    return found


def order(table, results):
    """Kendall's τ between the order of our means and of the paper's FIDs, and its p-value."""
    paper = [row.paper for row in TABLES[table].rows]
    ours = [np.mean(values["fd"]) for values in results.values()]
    return stats.kendalltau(paper, ours)


# ---- Tables and pictures


def show(tables):
    """Print the tables as they stand in toy/README.md."""
    found = differences(tables)
    intervals = holm(found)
    for table, results in tables.items():
        title, rows, _, _ = TABLES[table]
        print(f"\n**{title}**")
        header = ["", *METRICS.values(), "difference", "interval", "verdict", "paper's FID"]
        lines = []
        for row in rows:
            values = results[row.name]
            cells = [runs.cell(values[metric], 2 if metric == "fd" else 3) for metric in METRICS]
            difference = interval = verdict = ""
            if (table, row.name) in intervals:
                low, high, verdict = intervals[table, row.name]
                difference = f"{found[table, row.name].mean():+.2f}"
                interval = f"[{low:+.2f}, {high:+.2f}]"
            paper = "" if np.isnan(row.paper) else f"{row.paper:.2f}"
            lines.append([row.name, *cells, difference, interval, verdict, paper])
        runs.print_table(header, lines)
        if len(rows) > 4 and rows[0].paper > 0:             # not NaN
            tau, p = order(table, results)
            print(f"\nKendall's τ with the paper's order: {tau:.2f} (p = {p:.4f})")


VERDICTS = {"better": "#229944", "worse": "#c8102e", "": "#606060"}      # their colours


def draw_differences(tables):
    """All differences on one axis: a dot is a mean, a line its interval, the colour the verdict."""
    found = differences(tables)
    intervals = holm(found)
    shown = [-1, 1]                                         # the ends of the intervals, and these
    for low, high, _ in intervals.values():
        if high < 10:                                       # else a text says how large it is
            shown += [low, high]
    left, right = min(shown), max(shown) + 0.1
    lines = []                                              # (text, key or None), top to bottom
    for table, results in tables.items():
        reference, *others = results
        lines.append((f"{TABLES[table].title}; against {reference}:", None))
        lines += [(name, (table, name)) for name in others]
    bottom = 0.4 - len(lines)
    names = {-i: text if key else "" for i, (text, key) in enumerate(lines)}
    legend = {verdict or "no verdict": colour for verdict, colour in VERDICTS.items()}
    axes = plot.Axes("Difference of the distance (lower is better)",
                     "dot: mean over the seeds, line: interval at Holm's level", "",
                     (left, right), (bottom, 0.6), y_ticks=names, legend=legend,
                     size=(900, 100 + 24 * len(lines)))
    axes.line([0, 0], [0.6, bottom], "#000000")
    for i, (text, key) in enumerate(lines):
        if key is None:
            axes.text(0, -i, text)
        elif key in intervals:
            low, high, verdict = intervals[key]
            mean, colour = found[key].mean(), VERDICTS[verdict]
            if mean > right:
                axes.text(right, -i, f"{mean:+.0f}, off this axis  ", colour, "rm")
            else:
                axes.line([low, high], [-i, -i], colour)
                axes.points(mean, -i, colour, radius=5)
    return axes.image()


def draw_guidance(results):
    """Precision over recall: a pale dot per seed, a line through the means, and the distances."""
    recall = np.array([values["recall"] for values in results.values()])        # [rows,seeds]
    precision = np.array([values["precision"] for values in results.values()])
    limits = [(x.min() - 0.01, x.max() + 0.01) for x in (recall, precision)]
    title = "Guidance trades recall for precision"
    axes = plot.Axes(title, "recall", "precision", *limits, size=(820, 440), right=170)
    axes.points(recall, precision, "#b4c6e4")
    x, y = recall.mean(1), precision.mean(1)
    blue = plot.COLOURS[0]
    axes.line(x, y, blue)
    axes.points(x, y, blue, radius=6)
    for i, (name, values) in enumerate(results.items()):
        axes.text(x[i], y[i], f"{name}: distance {np.mean(values['fd']):.2f}", anchor="ls")
    return axes.image()


# ---- The command

FULL = {"seeds": 8, "steps": 50, "rows": list(TABLES)}
QUICK = {"seeds": 2, "steps": 12, "rows": ["3", "5"]}


def parse(argv):
    parser = runs.make_parser(__doc__, quick="Tables 3 and 5 with few seeds and steps")
    add = parser.add_argument
    add("--seeds", type=int, help="most seeds per row (default: 8; with --quick 2)")
    add("--steps", type=int, help="optimizer steps (default: 50; with --quick 12)")
    add("--rows", nargs="+", choices=TABLES, help="tables (default: all; with --quick 3 5)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick and args.out is None:
        args.out = Path("out")
    if min(args.seeds, args.steps, args.jobs) < 1:
        raise dr.UserError("--seeds, --steps and --jobs must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    if args.out:
        dr.make_folder(args.out)
        runs.open_teacher(args.teacher)     # refuse a wrong file before the workers start
    done = runs.get_runs("ablation", args, plan(args), distil_and_measure, args.jobs)
    tables = {name: gather(name, args, done) for name in args.rows}
    show(tables)
    if args.out is None:
        return
    tested = {name: results for name, results in tables.items() if name not in FEW_SEEDS}
    if tested:
        runs.save_png(args.out / "ablation.png", draw_differences(tested))
    if "guidance" in tables:
        runs.save_png(args.out / "guidance.png", draw_guidance(tables["guidance"]))


if __name__ == "__main__":
    dr.run_as_script(main)
