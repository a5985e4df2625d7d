"""What experiments share: runs kept in a file, tables of means, Prop. 1's field, the digits' judge.

A run is one training with one seed, known by its key. `complete` computes the runs that a file
lacks and writes the file after each, so that the same command goes on where it was interrupted.
"""
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import FIELDS, Positives, distil, require, write_atomically  # noqa: E402
from eval_fid import frechet_distance, mean_and_covariance, precision_recall  # noqa: E402

def complete(path, teacher, jobs, work, workers=os.cpu_count()):
    """jobs: {key: what `work` takes} -> {key: what it returns}, from the JSON file or computed.

    The file is of one teacher: ValueError if it was begun with another.
    """
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()[:16]
    saved = {"teacher": digest, "runs": {}}
    if path.exists():
        saved = json.loads(path.read_text())
    require(saved["teacher"] == digest,
            f"{path} is of another teacher than {teacher}: remove it, or take another --out")
    runs = saved["runs"]
    missing = {key: job for key, job in jobs.items() if key not in runs}
    if missing:
        with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:
            results = pool.imap_unordered(partial(do, work), missing.items())
            for key, result in tqdm(results, "runs", len(missing)):
                runs[key] = result
                with write_atomically(path, "w") as file:
                    json.dump(saved, file, indent=1)
    return {key: runs[key] for key in jobs}

def start_worker():
    torch.set_num_threads(1)                # small matrices: two runs are faster than two threads
    sys.stderr = open(os.devnull, "w")      # for their progress bars

def do(work, item):
    key, job = item
    return key, work(job)

def distil_aside(student, latents, labels, cfg):
    """drift_rae.py's distil, its log and state in a folder that is gone afterwards."""
    data = Positives(latents, labels.numpy(), cfg)
    with tempfile.TemporaryDirectory() as folder:
        return distil(student, data, replace(cfg, out=folder))

def mean_sd(values):
    """Mean, and standard deviation over the seeds (NaN of one)."""
    values = np.asarray(values, float)
    sd = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return np.mean(values), sd

def cell(values, digits=2):
    """mean ± standard deviation, as the pages have it; of one seed the value."""
    mean, sd = mean_sd(values)
    text = f"{mean:,.{digits}f}"
    return text if np.isnan(sd) else f"{text} ± {sd:.{digits}f}"

def print_table(header, rows):
    """Lists of texts, as the page has them."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")

def print_means(rows, by, digits):
    """A line for each value of the columns `by`; digits: {column: decimals of its cells}."""
    groups = {}
    for row in rows:
        key = tuple(str(row[name]) for name in by)
        groups.setdefault(key, []).append(row)
    lines = []
    for key, same in groups.items():
        cells = [cell([row[name] for row in same], n) for name, n in digits.items()]
        lines.append([*key, *cells])
    print_table([*by, *digits], lines)

@torch.no_grad()
def gradient_field(x, pos, neg, temperature, scale, *, noise=None):
    """Prop. 1 to the letter: S·τ times the gradient of the log-density ratio that drift_field is
    nearly, so every displacement is divided by its length. Arguments and units as there."""
    query = x if noise is None else x + noise
    distance_pos = torch.cdist(query, pos) / scale          # [C,N,P]
    distance_neg = torch.cdist(query, neg) / scale          # [C,N,M]
    distance_neg.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # k ≠ j
    attraction = unit_pull(query, pos, distance_pos, temperature)
    repulsion = unit_pull(query, neg, distance_neg, temperature)
    return attraction - repulsion

def unit_pull(query, targets, distance, temperature):
    """Σ w·(y − query)/distance."""
    w = (-distance / temperature).softmax(-1)
    w = w / distance.clamp(min=1e-3)                        # closer, it has no direction
    return w @ targets - w.sum(-1, keepdim=True) * query

FIELDS["gradient"] = gradient_field     # for Config.field; the command does not offer it

def grey(images):
    """uint8 [n,28,28,3] -> [n,1,28,28] in [0,1]."""
    return images.permute(0, 3, 1, 2)[:, :1] / 255

def judge_network():
    """Grey images -> logits [n,10]. toy/digits.py trains it; all but its last layer is Metrics'."""
    layers = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.GELU()]
    layers += [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()]
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))

class Metrics:
    """Measures images against R, every other image of a teacher's file; .others are the rest.

    Of images uint8 [n,28,28,3], labels [n]: fd, precision and recall in the judge's features;
    label_accuracy, how often it sees the class that was asked for; nearest_real, the median pixel
    distance to the nearest image of R, over the same within R: 1 is as new as data, 0 a copy.
    """
    def __init__(self, checkpoint):
        self.judge = judge_network().requires_grad_(False).eval()
        self.judge.load_state_dict(checkpoint["judge"])
        images, labels = checkpoint["images"], checkpoint["labels"]
        self.images, self.labels = images[::2], labels[::2]     # R
        self.others = images[1::2], labels[1::2]
        self.pixels, self.features, _ = self.look(self.images)
        distance = torch.cdist(self.pixels, self.pixels)
        distance.fill_diagonal_(torch.inf)
        self.spacing = distance.amin(1).median()

    def look(self, images):
        """-> grey pixels [n,784], features [n,64], the classes [n] that the judge sees."""
        pixels = grey(images)
        features = self.judge[:-1](pixels)
        logits = self.judge[-1](features)
        return pixels.flatten(1), features, logits.argmax(1)

    def __call__(self, images, labels):
        pixels, features, classes = self.look(images)
        statistics = mean_and_covariance(features)
        fd = frechet_distance(*statistics, *mean_and_covariance(self.features))
        precision, recall = precision_recall(self.features, features)
        accuracy = (classes == labels).double().mean()
        nearest = torch.cdist(pixels, self.pixels).amin(1).median()
        return {"fd": fd, "precision": precision, "recall": recall,
                "label_accuracy": accuracy.item(), "nearest_real": (nearest / self.spacing).item()}
