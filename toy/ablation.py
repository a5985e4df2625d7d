"""Do the paper's modifications help? Its ablations on the digits, each difference tested over paired seeds.

    python toy/ablation.py                          all rows, 5 seeds: tables, out/ablation.json, out/ablation.png
    python toy/ablation.py --rows 3 late --seeds 8  two tables; the same command goes on where it was interrupted
    python toy/ablation.py --quick                  Tables 3 and 5 with 3 seeds and few steps
    python toy/ablation.py --markdown               the tables from out/ablation.json; nothing is run

One teacher for all rows; the seeds vary the distillation: classes, positives, noise of training and sampling. A row
shares them with its reference, so the difference is taken seed by seed, and called "better" or "worse" only where
its 95 % t-interval excludes 0. There are some 30 comparisons: expect one or two such calls by chance.
The base, C, has 128 positives and 64 + 64 negatives where the paper has 256 and 64 + 192.
"""
import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import redirect_stderr
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import Config, generate, load_pair, load_positives, one_step, train  # noqa: E402
from eval_fid import Parser, UserError, exit_code, write_atomically  # noqa: E402
from toy.digits import make_teacher, pixel_metrics  # noqa: E402

TABLES = {"3": "Table 3: the three modifications", "5": "Table 5: perturbation and y-softmax, at 64 / 64",
          "late": "Table 5, the late collapse: 5 times the steps; fast: 3 times the learning rate",
          "7": "Table 7: positives / negatives in all",
          "6": "Table 6: negatives with + without gradient (the paper: 1.77 to 1.80 throughout)",
          "readings": "Readings of what the paper leaves open", "temperatures": "Temperatures",
          "9": "Table 9: from scratch"}


class Row(NamedTuple):
    table: str
    name: str
    paper: float | None     # FID on ImageNet-256, at the same counts, but for C (256 / 256)
    changes: dict           # of BASE
    against: str = "C"      # the reference: the row it is compared with
    longer: int = 1         # its steps, in --steps


BASE = dict(n_class=5, n_pos=128, n_neg=64, n_extra_neg=64, temperatures=[0.02, 0.05, 0.2], perturb=True,
            y_softmax=False, lr=1e-3, init="teacher", decode_encode=False,
            drift_norm="batch", perturb_all=False, token_scale=False)   # spelt out: Config's defaults may change
FEW, CLEAN, FAST, Y = dict(n_pos=64, n_extra_neg=0), dict(perturb=False), dict(lr=3e-3), dict(y_softmax=True)
SCRATCH, PIXELS = dict(init="scratch"), dict(init="scratch", decode_encode=True)
TABLE_7 = {(64, 64): 1.94, (64, 128): 2.88, (128, 64): 2.50, (128, 128): 1.87}
ROWS = [
    Row("3", "A", 2.01, FEW | CLEAN | Y, "A"), Row("3", "B", 1.94, FEW, "A"), Row("3", "C", 1.77, {}, "A"),
    Row("5", "clean+y", 2.01, FEW | CLEAN | Y, "A"), Row("5", "clean", 2.44, FEW | CLEAN, "A"),
    Row("5", "perturbed+y", 2.14, FEW | Y, "A"), Row("5", "perturbed", 1.94, FEW, "A"),
    Row("late", "clean-5x", None, FEW | CLEAN, "perturbed-5x", 5),
    Row("late", "perturbed-5x", None, FEW, "perturbed-5x", 5),
    Row("late", "clean-5x-fast", None, FEW | CLEAN | FAST, "perturbed-5x-fast", 5),
    Row("late", "perturbed-5x-fast", None, FEW | FAST, "perturbed-5x-fast", 5),
    *(Row("7", f"{p}/{n}", TABLE_7.get((p, n)), dict(n_pos=p, n_neg=min(n, 64), n_extra_neg=max(n - 64, 0)))
      for p in (32, 64, 128) for n in (32, 64, 128)),
    *(Row("6", f"{n}+{128 - n}", None, dict(n_neg=n, n_extra_neg=128 - n)) for n in (32, 64, 128)),
    Row("readings", "as-released", None, {}), Row("readings", "sample-norm", None, dict(drift_norm="sample")),
    Row("readings", "token-scale", None, dict(token_scale=True)),
    Row("readings", "perturb-all", None, dict(perturb_all=True)),
    Row("temperatures", "all-three", None, {}),
    *(Row("temperatures", f"tau={t}", None, dict(temperatures=[t])) for t in (0.02, 0.05, 0.2)),
    Row("9", "from-teacher", None, {}), Row("9", "scratch", 100.31, SCRATCH),
    Row("9", "decode-encode", 7.04, PIXELS, "scratch"), Row("9", "scratch-5x", None, SCRATCH, "C", 5),
    Row("9", "decode-encode-5x", None, PIXELS, "scratch-5x", 5)]
NAMED = {row.name: row for row in ROWS}
METRICS = ("fd", "precision", "recall", "label_accuracy", "drift")
COLUMNS = ("row", "seeds", "Fréchet ↓", "precision", "recall", "label", "drift", "paper's FID", "against",
           "Δ Fréchet, 95 %", "verdict")
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def settings(row, steps):
    """The run's fields of Config. Rows with equal settings are one run, shown in each."""
    return BASE | row.changes | {"steps": row.longer * steps}


def key(s, seed):
    return json.dumps(s, sort_keys=True), seed


def cost(s):
    """Seconds of a run on one thread of an idle core, a fit to a dozen settings on an AMD EPYC."""
    a_class = 0.014 + 27e-5 * s["n_neg"] + 11e-5 * s["n_extra_neg"] + 4.5e-5 * s["n_pos"]
    return round(2 + s["steps"] * s["n_class"] * a_class * (2 if s["decode_encode"] else 1))


def run(job):
    """One distillation and its metrics -> an entry of ablation.json. job: (Row, settings, seed, teacher's path)."""
    row, s, seed, teacher = job
    torch.set_num_threads(1)                            # the workers share the cores
    result = {"row": row.name, "table": row.table, "seed": seed, "settings": s}
    with tempfile.TemporaryDirectory() as out:
        cfg = Config(**s | {"temperatures": tuple(s["temperatures"])}, seed=seed, out=out, device="cpu",
                     save_every=2 * s["steps"])
        student, rae, checkpoint = load_pair(teacher, cfg)
        positives = load_positives(rae, checkpoint, student.num_classes, cfg)
        if cfg.init == "scratch":
            torch.manual_seed(seed)
            student.initialise()
        try:
            with redirect_stderr(io.StringIO()):        # its progress bar
                ema, result["seconds"] = train(student, positives, cfg)
        except KeyboardInterrupt:
            sys.exit(130)                               # the parent says so
        except UserError as e:
            if "NaN" not in str(e):
                raise
            return result | dict.fromkeys(METRICS) | {"error": str(e)}
        with open(Path(out, "log.csv"), newline="") as f:
            log = [{name: float(v) for name, v in line.items()} for line in csv.DictReader(f)]
    drift = [float(np.mean([v for name, v in line.items() if name.startswith("drift_")])) for line in log]
    labels = torch.from_numpy(positives.labels)         # as many samples as there are real digits, 174 a class
    images = torch.cat([x for _, x, _ in generate(lambda z, y: one_step(ema, z, y), rae, labels, cfg)])
    if row.table == "late":
        result["trace"] = {"step": list(range(0, len(log), 10)), "drift": drift[::10],
                           "grad_norm": [line["grad_norm"] for line in log[::10]]}
    return (result | pixel_metrics(images, labels, positives.images, labels)
            | {"drift": float(np.mean(drift[-10:])), "drift_first": drift[0]})


def read(path):
    """ablation.json -> {key: a finished run}."""
    try:
        runs = json.loads(path.read_text()) if path.exists() else []
        return {key(r["settings"], r["seed"]): r for r in runs if itemgetter("teacher", *METRICS)(r)}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}): remove it to start anew") from e


def measure(rows, args, path):
    """Do what ablation.json lacks of rows and of their references -> {key: run}."""
    runs, teacher, todo = read(path), Path(args.out, "teacher.pt"), {}
    if not teacher.exists():
        make_teacher(teacher)
    load_pair(teacher, Config(device="cpu"))            # a bad file is better said here than by a worker
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()[:16]
    if any(r["teacher"] != digest for r in runs.values()):
        raise UserError(f"{path} is of another teacher than {teacher}: remove it, or take another --out")
    for row in sorted({row.name for row in rows} | {row.against for row in rows}, key=list(NAMED).index):
        for seed in range(args.seeds):
            s = settings(NAMED[row], args.steps)
            if key(s, seed) not in runs and key(s, seed) not in todo:
                todo[key(s, seed)] = (NAMED[row], s, seed, str(teacher))
    if not todo:
        return runs
    todo = sorted(todo.values(), key=lambda job: (job[2], -cost(job[1])))   # seed by seed, the long ones first
    jobs, total = min(args.jobs, len(todo)), sum(cost(job[1]) for job in todo)
    print(f"{len(todo)} runs to do, about {total / jobs / 60:.1f} minutes on {jobs} idle cores; {len(runs)} are done. "
          "Ctrl-C keeps what is finished, the same command goes on")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is the parent's; the workers inherit this
    with (multiprocessing.get_context("spawn").Pool(jobs) as pool,
          tqdm(total=total, desc="ablation", smoothing=0, bar_format=BAR) as bar):      # counts estimated seconds
        signal.signal(signal.SIGINT, before)
        for n, r in enumerate(pool.imap_unordered(run, todo), 1):
            runs[key(r["settings"], r["seed"])] = r | {"teacher": digest}
            text = "[" + ",\n".join(map(json.dumps, runs.values())) + "]\n"
            write_atomically(path, lambda f: f.write(text.encode()))
            bar.set_postfix_str(f"{n}/{len(todo)} runs, last {r['row']} seed {r['seed']}", refresh=False)
            bar.update(cost(r["settings"]))
        pool.close()
        pool.join()
    return runs


def of(row, runs, args):
    """{seed: run} of a row, as far as they are done."""
    found = {seed: runs.get(key(settings(row, args.steps), seed)) for seed in range(args.seeds)}
    return {seed: r for seed, r in found.items() if r}


def column(runs, metric="fd"):
    return np.array([r[metric] for r in runs.values()], float)              # [seeds], nan after a NaN


def mean_se(x):
    return x.mean(), x.std(ddof=1) / len(x)**0.5 if len(x) > 1 else np.nan


def paired(a, b):
    """Mean of fd of a − fd of b over the seeds they share, and half of its 95 % t-interval. a, b {seed: run}."""
    both = a.keys() & b.keys()
    if len(both) < 2:
        return np.nan, np.nan
    mean, se = mean_se(column({i: a[i] for i in both}) - column({i: b[i] for i in both}))
    return mean, se * stats.t.ppf(0.975, len(both) - 1)


def compare(row, runs, args):
    """Against the row's reference: (name, mean, half the interval, verdict), or None if that is itself."""
    reference = NAMED[row.against]
    if settings(row, 1) == settings(reference, 1):
        return None
    mean, half = paired(of(row, runs, args), of(reference, runs, args))
    return row.against, mean, half, "better" if mean + half < 0 else "worse" if mean - half > 0 else "–"


def cells(row, runs, args):
    """A line of the table, as strings."""
    mine = of(row, runs, args)
    line = [row.name, str(len(mine)), *("{:.3f} ± {:.3f}".format(*mean_se(column(mine, m))) for m in METRICS),
            f"{row.paper:.2f}" if row.paper else ""]
    found = compare(row, runs, args)
    return line + ([found[0], f"{found[1]:+.3f} ± {found[2]:.3f}", found[3]] if found else [""] * 3)


def collapse(run):
    """The step at which the drift, a mean of 5 entries of the trace, is first twice its lowest so far, or "never"."""
    drift = [np.mean(run["trace"]["drift"][i:i + 5]) for i in range(len(run["trace"]["drift"]) - 4)]
    return next((run["trace"]["step"][i + 4] for i, d in enumerate(drift) if d > 2 * min(drift[:i + 1])), "never")


def finished(rows, runs, args):
    """{table: its rows that have a run}, without empty tables."""
    found = {t: [row for row in rows if row.table == t and of(row, runs, args)] for t in TABLES}
    return {t: here for t, here in found.items() if here}


def show(rows, runs, args):
    """Yields the lines of the tables, as text or as Markdown."""
    for table, here in finished(rows, runs, args).items():
        lines = [COLUMNS, *(cells(row, runs, args) for row in here)]
        width = [max(map(len, entries)) for entries in zip(*lines)]
        yield f"\n**{TABLES[table]}**\n" if args.markdown else f"\n{TABLES[table]}"
        for i, line in enumerate(lines):
            yield f"| {' | '.join(line)} |" if args.markdown else "  ".join(map(str.ljust, line, width)).rstrip()
            if args.markdown and i == 0:
                yield "|" + "---|" * len(COLUMNS)
        for row in here if table == "late" else ():
            at = [str(collapse(r)) if "trace" in r else "NaN" for r in of(row, runs, args).values()]
            yield "\n" * args.markdown + f"{row.name}: the drift is twice its lowest at step {', '.join(at)}"


def order(values):
    """{name: "no. 1", "no. 2", …} of {name: value}, from the smallest."""
    return {name: f"no. {1 + sum(v < value for v in values.values())}" for name, value in values.items()}


def draw(rows, runs, args, path):
    """ablation.png: Fréchet distances, a dot a seed and a bar a mean, and the order in the paper's table beside."""
    tables, left, right, high = finished(rows, runs, args), 150, 570, 21
    sheet = Image.new("RGB", (900, 34 + sum(high * len(here) + 54 for here in tables.values())), "white")
    pen, small, font, large = ImageDraw.Draw(sheet), *(ImageFont.load_default(size=n) for n in (12, 14, 15))
    pen.text((8, 8), f"Frechet distance on the digits, {args.steps} steps: a dot a seed, a bar a mean. "
             "Green: better than the row's reference, red: worse, by paired 95 % intervals.", "black", small)
    y = 34                                              # the font has neither é nor ×
    for table, here in tables.items():
        fd = {row.name: column(of(row, runs, args)) for row in here}
        top = 1.05 * max(np.nanmax(np.nan_to_num(v)) for v in fd.values()) or 1         # each table has its own axis
        tick = next(m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5) if top / (m * 10.0**e) <= 6)
        bottom, scale = y + 28 + high * len(here), (right - left) / top
        pen.text((8, y + 4), TABLES[table], "black", large)
        for x in np.arange(0, top, tick):
            pen.line((left + scale * x, y + 28, left + scale * x, bottom), "#dddddd")
            pen.text((left + scale * x, bottom + 1), f"{x:g}", "#666666", small, anchor="ma")
        paper = {row.name: row.paper for row in here if row.paper}
        ranks = order(paper), order({name: np.nan_to_num(fd[name].mean(), nan=np.inf) for name in paper})
        for row, middle in zip(here, range(y + 28 + high // 2, bottom, high)):
            values, found = fd[row.name][np.isfinite(fd[row.name])], compare(row, runs, args)
            fill = {"better": "#b5dfb5", "worse": "#f0b8b0"}.get(found and found[3], "#cfd8e6")
            pen.text((left - 8, middle), row.name, "black", font, anchor="rm")
            pen.rectangle((left, middle - 8, left + scale * (values.mean() if len(values) else 0), middle + 7), fill)
            for x in left + scale * values:
                pen.ellipse((x - 3, middle - 3, x + 3, middle + 3), "#1f3f77")
            texts = {15: f"{fd[row.name].mean():.3f}"}
            if row.paper:
                texts |= {65: ranks[1][row.name], 150: f"paper {row.paper:.2f}", 260: ranks[0][row.name]}
            for x, text in texts.items():
                pen.text((right + x, middle), text, "black", font, anchor="lm")
        y = bottom + 26
    write_atomically(path, lambda f: sheet.save(f, format="png"))


def parse(argv):
    """Command line -> (arguments, rows)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="out", help="folder of teacher.pt (trained if missing) and of the results (default: out)")
    add("--rows", nargs="+", metavar="ROW", help=f"rows by name, or tables: {', '.join(TABLES)} (default: all)")
    add("--seeds", type=int, metavar="N", help="seeds of each row, 0 to N − 1 (default: 5; with --quick 3)")
    add("--steps", type=int, metavar="N", help="optimizer steps of a row (default: 80; with --quick 40)")
    add("--jobs", type=int, metavar="N", default=os.cpu_count(), help="runs at a time, a thread each (default: cores)")
    add("--quick", action="store_true", help="Tables 3 and 5 with few seeds and steps")
    add("--markdown", action="store_true", help="print OUT/ablation.json as Markdown and do nothing else")
    args = parser.parse_args(argv)
    for name, default in (("seeds", 3 if args.quick else 5), ("steps", 40 if args.quick else 80)):
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    for name in ("seeds", "steps", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    chosen = args.rows or (["3", "5"] if args.quick else TABLES)
    if unknown := [name for name in chosen if name not in NAMED and name not in TABLES]:
        raise UserError(f"--rows {unknown[0]}: no such row or table; there are {', '.join([*TABLES, *NAMED])}")
    return args, [row for row in ROWS if row.table in chosen or row.name in chosen]


@exit_code
def main(argv):
    args, rows = parse(argv)
    path = Path(args.out, "ablation.json")
    if not args.markdown:
        path.parent.mkdir(parents=True, exist_ok=True)
    runs = read(path) if args.markdown else measure(rows, args, path)
    if not finished(rows, runs, args):
        raise UserError(f"{path} has no run of these rows at --steps {args.steps}: leave out --markdown")
    print("\n".join(show(rows, runs, args)))
    if not args.markdown:
        draw(rows, runs, args, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
