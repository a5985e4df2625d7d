"""Do the paper's modifications help? §4's tables on the digits, each difference tested over paired seeds.

    python toy/ablation.py                     all tables -> OUT/ablation.json, ablation.png, guidance.png
    python toy/ablation.py --rows 3 late       two tables; the same command goes on where it was interrupted
    python toy/ablation.py --quick             Tables 3 and 5, 2 seeds, few steps
    python toy/ablation.py --markdown          the tables from OUT/ablation.json; nothing is run

One teacher serves all rows; a seed is one distillation, its positives and noise. What a row leaves open is
the default of drift_rae.py, at half its steps. The first row of a table is the reference; differences from it
are taken seed by seed, and called better or worse where a 95 % t-interval excludes 0: by chance 1 of 20 does.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (Config, DiTDH, command, distil, encode, generate, guide, load_pair,  # noqa: E402
                       one_step, write_atomically)
from toy.digits import TEACHER, Metrics, make_teacher  # noqa: E402
from toy.plot import COLOURS, Axes, sheet  # noqa: E402


# ---- What is compared

class Row(NamedTuple):
    name: str
    changes: dict               # of Config's defaults
    paper: float | None = None  # FID on ImageNet-256
    start: str = "teacher"      # of the student: teacher, scratch, or pixels (scratch and ThroughPixels)
    guidance: float = 0.0
    longer: int = 1             # times the steps; a longer row has one seed


def counts(positives, negatives):
    return dict(n_pos=positives, n_neg=min(64, negatives), n_extra_neg=max(0, negatives - 64))


SMALL, CLEAN, Y, FAST = counts(64, 64), dict(perturb=False), dict(y_softmax=True), dict(lr=2e-3)
TABLE_7 = {(256, 256): 1.77, (256, 64): 4.66, (128, 128): 1.87, (128, 64): 2.50, (64, 256): 4.95,
           (64, 128): 2.88, (64, 64): 1.94}
TABLES = {  # the first row of each is the reference
    "3": ("Table 3: the three modifications",
          [Row("A: Deng et al.", SMALL | CLEAN | Y, 2.01), Row("B: Eq. (11), (12)", SMALL, 1.94),
           Row("C: B at 256/64+192", counts(256, 256), 1.77)]),
    "rate": ("Table 3 at a learning rate of 2e-3 in place of 7e-4",
             [Row("A", SMALL | CLEAN | Y | FAST), Row("B", SMALL | FAST), Row("C", counts(256, 256) | FAST)]),
    "5": ("Table 5: perturbation and y-softmax, at 64/64",
          [Row("perturbed", SMALL, 1.94), Row("clean", SMALL | CLEAN, 2.44),
           Row("perturbed, y-softmax", SMALL | Y, 2.14), Row("clean, y-softmax", SMALL | CLEAN | Y, 2.01)]),
    "7": ("Table 7: positives/negatives", [Row("%d/%d" % n, counts(*n), fid) for n, fid in TABLE_7.items()]),
    "6": ("Table 6: negatives with gradient (the paper: 1.77 to 1.80)",
          [Row(f"{n} of 256", dict(n_neg=n, n_extra_neg=256 - n)) for n in (64, 128, 256)]),
    "temperatures": ("Temperatures", [Row("0.02, 0.05, 0.2", {})] + [
        Row(f"{tau} alone", dict(temperatures=(tau,))) for tau in (0.02, 0.05, 0.2)]),
    "windows": ("Windows (ours): sides, in tokens, of what drifts as one",
                [Row(str(set(w)), dict(windows=w)) for w in ((1,), (2,), (1, 2))]),
    "guidance": ("Guidance of C, our reading of v2's abstract",
                 [Row(f"w = {w:g}", {}, guidance=w) for w in (0, 0.05, 0.1, 0.2, 0.4)]),
    "9": ("Table 9: from scratch", [Row("from scratch", {}, 100.31, "scratch"),
                                    Row("decode–encode", {}, 7.04, "pixels"), Row("from the teacher", {})]),
    "late": ("Tables 5 and 9, later: 5 times the steps, at 64/64",
             [Row("perturbed", SMALL, longer=5), Row("clean", SMALL | CLEAN, longer=5),
              Row("from scratch", SMALL, 100.31, "scratch", longer=5),
              Row("decode–encode", SMALL, 7.04, "pixels", longer=5)]),
}
METRICS = {"fd": "Fréchet ↓", "precision": "precision ↑", "recall": "recall ↑", "label_accuracy": "label ↑"}


# ---- One run

class ThroughPixels(torch.nn.Module):
    """Table 9's decode–encode: a student whose one_step is encode(decode(G(z))), with gradient through both.
    The field vanishes for a perfect generator only if the positives have been through the decoder, too.
    """
    def __init__(self, student, rae):
        super().__init__()
        self.student, self.rae = student, rae

    def forward(self, x, t, y):
        return x - self.rae.encode(self.rae.decode(one_step(self.student, x, y)))    # one_step: x − this


def prepare(path, start, cfg):
    """-> (student as distil takes it, latents of the positives, RAE, what else is in the teacher's file)."""
    student, rae, ours = load_pair(path, cfg)
    latents = encode(rae, ours["images"], cfg)
    if start != "teacher":
        torch.manual_seed(cfg.seed)
        student = DiTDH(**TEACHER).eval()
    if start == "pixels":
        student = ThroughPixels(student, rae)
        with torch.no_grad():
            latents = torch.cat([rae.encode(rae.decode(batch)) for batch in latents.split(cfg.batch_size)])
    return student, latents, rae, ours


def work(job):
    """job: (teacher's path, start, Config, guidances to measure) -> a run of ablation.json."""
    path, start, cfg, guidances = job
    student, latents, rae, ours = prepare(path, start, cfg)
    run = {"start": start, "config": vars(cfg)}
    with tempfile.TemporaryDirectory() as out:
        try:
            student = distil(student, latents, ours["labels"].numpy(), replace(cfg, out=out))
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            return run | {"metrics": {f"{w:g}": dict.fromkeys(METRICS, np.nan) for w in guidances}}
        log = np.atleast_1d(np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True))
    raw = np.mean([log[name] for name in log.dtype.names if name.startswith("drift_")], 0)   # [steps]
    drift = [part.mean() for part in np.array_split(raw, min(20, cfg.steps))]
    measure, metrics = Metrics(ours), {}
    for w in guidances:
        sampler = partial(one_step, guide(student.student if start == "pixels" else student, w))
        images = generate(sampler, rae, measure.labels, cfg)
        metrics[f"{w:g}"] = measure(images, measure.labels)
    return run | {"metrics": metrics, "drift": drift}


# ---- All runs: ablation.json is {"teacher": its digest, "runs": [what work returns, …]}

def key(start, config):
    """Rows of the same key are one run; any other value of a field of Config makes it another."""
    return json.dumps([start, config])


def configs(row, args):
    steps, seeds = row.longer * args.steps, args.seeds if row.longer == 1 else 1
    return [Config(device="cpu", seed=seed, steps=steps, save_every=steps, **row.changes)
            for seed in range(seeds)]


def jobs_to_do(args, runs):
    """What `work` takes for each run that is missing, seed by seed, the long ones first."""
    jobs, missing = {}, {}
    for table, (_, rows) in TABLES.items():
        for row, cfg in ((row, cfg) for row in rows for cfg in configs(row, args)):
            name = key(row.start, vars(cfg))
            job = jobs.setdefault(name, (Path(args.out, "teacher.pt"), row.start, cfg, set()))
            job[-1].add(row.guidance)                       # also of tables that are not asked for now
            if table in args.rows and name not in runs:
                missing[name] = job
    return sorted(missing.values(), key=lambda job: (job[2].seed, -job[2].steps, -job[2].n_neg))


def start_worker():
    torch.set_num_threads(1)                                # small matrices: two runs abreast are faster
    sys.stderr = open(os.devnull, "w")                      # for their progress bars


def measure(args, path, known, runs):
    """Do what runs, of the teacher `known`, lack of the chosen tables; path is written after each."""
    teacher = Path(args.out, "teacher.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not teacher.exists():
        make_teacher(teacher)
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()[:16]
    if known not in (None, digest):
        raise ValueError(f"{path} is of another teacher than {teacher}: remove it, or take another --out")
    jobs = jobs_to_do(args, runs)
    if not jobs:
        return
    with (multiprocessing.get_context("spawn").Pool(min(args.jobs, len(jobs)), start_worker) as pool,
          tqdm(total=sum(job[2].steps for job in jobs), desc=f"{len(jobs)} runs", smoothing=0) as bar):
        for run in pool.imap_unordered(work, jobs):
            runs[key(run["start"], run["config"])] = run
            text = json.dumps({"teacher": digest, "runs": [*runs.values()]}, indent=1).encode()
            write_atomically(path, lambda file: file.write(text))
            bar.update(run["config"]["steps"])


# ---- Tables and pictures

def values(row, args, runs, metric="fd"):
    """{seed: value} of a row, as far as its runs are done."""
    return {cfg.seed: runs[name]["metrics"][f"{row.guidance:g}"][metric] for cfg in configs(row, args)
            if (name := key(row.start, vars(cfg))) in runs}


def mean_sd(x):
    mean = np.mean(x) if x else np.nan
    return mean, np.std(x, ddof=1) if len(x) > 1 else np.nan


def paired(a, b):
    """{seed: value} twice -> mean of a − b over the seeds of both, half its 95 % t-interval, verdict."""
    difference = [a[seed] - b[seed] for seed in a if seed in b]
    n = len(difference)
    mean, sd = mean_sd(difference)
    half = sd * stats.t.ppf(0.975, n - 1) / max(1, n)**0.5
    if mean + half < 0:
        return mean, half, "better"
    return mean, half, "worse" if mean - half > 0 else ""


def show(args, runs):
    """One table for the page: mean ± standard deviation over the seeds, difference from the first row."""
    lines = [["", "seeds", *METRICS.values(), "Δ Fréchet, 95 %", "", "paper's FID"]]
    lines.append(["---"] * len(lines[0]))
    for title, rows in (TABLES[table] for table in args.rows):
        lines.append([f"**{title}**"] + [""] * (len(lines[0]) - 1))
        for row in rows:
            fd = values(row, args, runs)
            mean, half, verdict = paired(fd, values(rows[0], args, runs))
            difference = ["", "reference"] if row is rows[0] else [f"{mean:+.2f} ± {half:.2f}", verdict]
            means = [mean_sd([*values(row, args, runs, metric).values()]) for metric in METRICS]
            cells = [f"{m:.{2 + (i > 0)}f} ± {sd:.{2 + (i > 0)}f}" for i, (m, sd) in enumerate(means)]
            paper = f"{row.paper:.2f}" if row.paper else ""
            lines.append([row.name, str(len(fd)), *cells, *difference, paper])
    for line in lines:
        print(f"| {' | '.join(line)} |".replace(" ± nan", ""))              # of a single seed


def panel(table, args, runs):
    """Fréchet distances: a dot a seed, a bar at the mean, a diamond at the paper's FID."""
    title, rows = TABLES[table]
    fds, names = [values(row, args, runs) for row in rows], {-i: row.name for i, row in enumerate(rows)}
    seen = [x for fd in fds for x in fd.values() if x > 0] + [row.paper for row in rows if row.paper]
    log = max(seen) > 20 * min(seen)
    low, high = (min(seen) / 2, max(seen) * 2) if log else (0, 1.1 * max(seen))
    axes = Axes(title, "Fréchet distance; hollow: the paper's FID", "", (low, high), (0.4 - len(rows), 0.6),
                x_log=log, y_ticks=names, legend={"better": "#229944", "worse than the first": "#c8102e"},
                size=(680, 110 + 36 * len(rows)), right=80)
    for y, row, fd in zip(names, rows, fds):
        mean, verdict = mean_sd([*fd.values()])[0], paired(fd, fds[0])[2]
        axes.bar(mean, y, {"better": "#b5dfb5", "worse": "#f0b8b0"}.get(verdict, "#cfd8e6"))
        axes.points([*fd.values()], y, "#1f3f77")
        axes.diamonds(row.paper or np.nan, y)
        axes.text(high, y, f"{mean:.2f}")
    return axes.image()


def guidance_curve(rows, args, runs):
    """Precision against recall: pale dots the seeds, a line through the means."""
    both = [np.array([list(values(row, args, runs, name).values()) for row in rows])        # [w,seeds]
            for name in ("recall", "precision")]
    means = [x.mean(1) for x in both]
    ranges = [(x.min() - 0.01, x.max() + 0.01) for x in both]
    axes = Axes(TABLES["guidance"][0], "recall", "precision", *ranges, right=90)
    axes.points(*both, "#b4c6e4")
    axes.line(*means, COLOURS[0])
    axes.points(*means, COLOURS[0], radius=6)
    for row, x, y in zip(rows, *means):
        axes.text(x, y, row.name, anchor="ls")
    return axes.image()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", default="out", help="folder of teacher.pt, made if missing, and results (default: out)")
    add("--quick", action="store_true", help="Tables 3 and 5 with few seeds and steps")
    add("--seeds", type=int, help="seeds of each row (default: 3; with --quick 2)")
    add("--steps", type=int, help="optimizer steps (default: half of drift_rae.py's; with --quick 1/8)")
    add("--rows", nargs="+", choices=TABLES, help="tables (default: all; with --quick 3 5)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each (default: all cores)")
    add("--markdown", action="store_true", help="print the tables from OUT/ablation.json; run nothing")
    parser.set_defaults(seeds=3, steps=Config().steps // 2, rows=[*TABLES])
    if parser.parse_args(argv).quick:
        parser.set_defaults(seeds=2, steps=Config().steps // 8, rows=["3", "5"])
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.jobs) < 1:
        parser.error("--seeds, --steps and --jobs must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    path = Path(args.out, "ablation.json")
    saved = json.loads(path.read_text()) if path.exists() else {"teacher": None, "runs": []}
    runs = {key(run["start"], run["config"]): run for run in saved["runs"]}
    if not args.markdown:
        measure(args, path, saved["teacher"], runs)
    args.rows = [table for table in args.rows if any(values(row, args, runs) for row in TABLES[table][1])]
    if not args.rows:
        raise ValueError(f"{path} has no run of these rows at {args.steps} steps: leave out --markdown")
    show(args, runs)
    if not args.markdown:
        pictures = {"ablation.png": sheet([panel(table, args, runs) for table in args.rows], 2)}
        if "guidance" in args.rows:
            pictures["guidance.png"] = guidance_curve(TABLES["guidance"][1], args, runs)
        for name, picture in pictures.items():
            write_atomically(Path(args.out, name), partial(picture.save, format="PNG"))


if __name__ == "__main__":
    command(main)
