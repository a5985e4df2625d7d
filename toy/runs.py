"""What the experiments share: runs that are kept in a file, the field of Prop. 1, and tables.

A run is one training with one seed; a text, its key, names it. `complete` computes the runs that a
JSON file lacks and writes the file after each of them, so that the same command continues where it
was interrupted.
"""
import argparse
import hashlib
import json
import multiprocessing
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

import drift_rae as dr

RESULTS = Path(__file__).with_name("results")     # what the pages' tables are printed from

# ---- The command line of geometry, ablation and rivals


def make_parser(doc, quick):
    """The flags that all three have; doc: of the script, quick: what --quick does."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="measure, and write into this folder; without it: print the "
                                 "tables of toy/results")
    add("--teacher", type=Path, default=dr.Config.teacher, help="default: toy/teacher.pt")
    add("--quick", action="store_true", help=f"measure {quick}")
    return parser


def parse_seeds(parser, argv):
    """Parse --seeds, too. --quick takes one seed, and writes into out/ if there is no --out."""
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the table (default: 3)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise dr.UserError("--seeds must be at least 1")
    if args.quick:
        args.seeds = 1
        args.out = args.out or Path("out")
    return args


# ---- Runs


def get_runs(name, args, jobs, work, workers=None):
    """-> {key: run} for the jobs {key: job}.

    With an --out these are computed, unless args.out/NAME.json holds them. Without it they are read
    from the committed file toy/results/NAME.json.
    """
    if args.out:
        return complete(args.out / f"{name}.json", args.teacher, jobs, work, workers)
    path = RESULTS / f"{name}.json"
    committed = json.loads(path.read_text())["runs"]
    for key in jobs:
        if key not in committed:
            raise dr.UserError(f"no run in {path} is called {key}: give an --out to make it")
    return {key: committed[key] for key in jobs}


def complete(path, teacher, jobs, work, workers=None):
    """jobs {key: job} -> {key: work(job)}, read from the JSON file or else computed.

    The file belongs to one teacher, which it knows by a hash. Each worker computes one run at a
    time; by default there are as many workers as cores.
    """
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()[:16]
    saved = {"teacher": digest, "runs": {}}
    if path.exists():
        saved = json.loads(path.read_text())
    if saved["teacher"] != digest:
        raise dr.UserError(f"{path} holds runs of another teacher than {teacher}: remove it, or "
                           "choose another --out")
    runs = saved["runs"]
    missing = {key: job for key, job in jobs.items() if key not in runs}
    if missing:
        for key, result in in_workers(work, missing, workers):
            runs[key] = result
            save_json(path, saved)
    return {key: runs[key] for key in jobs}


def in_workers(work, jobs, workers=None):
    """Yield (key, work(job)) for jobs {key: job}, as worker processes finish them."""
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:
        results = pool.imap_unordered(partial(call, work), jobs.items())
        yield from tqdm(results, "runs", len(jobs), disable=None)


def call(work, item):
    key, job = item
    return key, work(job)


def start_worker():
    torch.set_num_threads(1)            # the matrices are small: two runs beat two threads
    # Ctrl-C reaches every process. Only the main process answers: it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A progress bar appears only on a terminal. Those of the workers would overwrite each other.
    sys.stderr.isatty = lambda: False


def save_json(path, content):
    text = json.dumps(content, indent=1)
    dr.save(path, lambda file: file.write(text.encode()))


def save_png(path, picture):
    dr.save(path, partial(picture.save, format="PNG"))


# ---- Teacher and student


def open_teacher(path):
    """A file that toy/digits.py made -> the flow model, the RAE, and the whole content."""
    checkpoint = dr.load(path)
    if "judge" not in checkpoint:
        raise dr.UserError(f"{path} is not a teacher of digits, which toy/digits.py makes")
    network = dr.read_network(checkpoint, path)
    return network, dr.load_autoencoder(checkpoint, path, ""), checkpoint


def distilled(teacher, latents, labels, cfg, loss_function=dr.variant_loss):
    """Distil as drift_rae.py does, from latents in memory -> the moving average of the student.

    The student starts from `teacher`. dr.variant_loss heeds cfg.field and cfg.windows.
    """
    student, ema, optimizer = dr.prepare(teacher, cfg)
    class_sampler = dr.ClassSampler(labels, cfg)
    positives = dr.load_positives(TensorDataset(latents, labels), class_sampler, None, cfg)
    steps = dr.distil(student, ema, optimizer, positives, cfg, loss_function=loss_function)
    for _ in steps:
        pass
    return ema


# ---- The field of Prop. 1


@torch.no_grad()
def gradient_field(x, pos, neg, tau, noise=None):
    """The field of Prop. 1, V = τ·∇ log(q̂/p̂) at the queries [L,N,D]. Arguments: see drift_field.

    q̂ and p̂ are the kernel density estimates Σ exp(−‖x − y‖/τ) over the positives y and over the
    negatives y. Their gradient divides every displacement y − x by its length. Eq. (11), the field
    that the paper uses, leaves that division out.
    """
    query = x if noise is None else x + noise
    to_pos = dr.distances(query, pos)                       # [L,N,P]
    to_neg = dr.distances(query, neg)                       # [L,N,M]
    to_neg.diagonal(dim1=1, dim2=2).fill_(torch.inf)        # k ≠ j: no sample repels itself
    return mean_direction(query, pos, to_pos, tau) - mean_direction(query, neg, to_neg, tau)


def mean_direction(query, targets, distance, tau):
    """Σ w·(y − query)/‖y − query‖ over the targets y, where w is the softmax of −distance/τ.

    A distance below 0.01·τ counts as 0.01·τ. Otherwise a target on which a query happens to lie
    would divide by zero, and one close by would pull in a direction of rounding errors.
    """
    w = (-distance / tau).softmax(-1)                       # [L,N,targets]
    w = w / distance.clamp(min=0.01 * tau)
    return w @ targets - w.sum(-1, keepdim=True) * query


def gradient_loss(gen, pos, extra_neg, cfg, generator):
    """dr.variant_loss with gradient_field in place of cfg.field."""
    total = 0
    for window in cfg.windows:
        parts = [dr.tokens(latents, window) for latents in (gen, pos, extra_neg)]
        loss, info = dr.drift_loss(*parts, cfg.temperatures, field=gradient_field,
                                   perturb=cfg.perturb, generator=generator)
        total = total + loss.mean()
    return total, info


# ---- Tables


def mean_sd(values):
    """Mean and standard deviation over the seeds. Of one seed the deviation is NaN."""
    values = np.asarray(values, float)
    sd = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return np.mean(values), sd


def cell(values, digits=2):
    """The text "mean ± standard deviation" over the seeds. Of one seed it is the value.

    Where one seed is far off, a mean would say little. Then the text lists the seeds' values.
    """
    if max(values) > 3 * np.median(values) > 0:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    mean, sd = mean_sd(values)
    text = f"{mean:,.{digits}f}"
    return text if np.isnan(sd) else f"{text} ± {sd:.{digits}f}"


def print_table(header, rows):
    """Print texts as a table in Markdown. header: a list; rows: a list of lists."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_means(rows, by, digits):
    """Print one line per combination of values in the columns `by`, with means over its rows.

    rows: dicts; digits: {column: number of decimals}.
    """
    groups = {}
    for row in rows:
        key = tuple(str(row[name]) for name in by)
        groups.setdefault(key, []).append(row)
    lines = []
    for key, same in groups.items():
        cells = [cell([row[name] for row in same], n) for name, n in digits.items()]
        lines.append([*key, *cells])
    print_table([*by, *digits], lines)
