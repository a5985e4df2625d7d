"""§3.2 on real digits: is an RAE's space more anisotropic, concentrated and curved than a VAE's?

    python toy/geometry.py [--seeds 1]     table, geometry.json, theorem1.* and curvature.png in OUT
    python toy/geometry.py --quick         two spaces and few steps: a look, no result

The RAE is OUT/teacher.pt's, made if missing; the VAEs are toy/vae.py's. A second call goes on.
"""
import argparse
import copy
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (Config, build_rae, command, encode, ode_sample, one_step,  # noqa: E402
                       reading, require, to_uint8, tokens, write_atomically)
from toy import vae  # noqa: E402
from toy.digits import make_teacher  # noqa: E402
from toy.plot import COLOURS, Axes, sheet  # noqa: E402
from toy.runs import Metrics, cell, complete, distil_aside, print_table  # noqa: E402

VAES = {"VAE-16": 16, "VAE-64": 64, "VAE-128": 128}         # width of their tokens
DIMS = [2**k for k in range(2, 13)]                         # of Theorem 1: 4 … 4096
FULL = {"spaces": ["RAE-64", *VAES], "dims": DIMS,
        "steps": (*vae.STEPS, Config.steps)}                # of VAE, flow, student
QUICK = {"spaces": ["RAE-64", "VAE-64"], "dims": DIMS[:9], "steps": (200, 200, 20)}
PAPER = {
    "paper: SD-VAE": [{"PR raw": 0.2068, "SE raw": 0.378, "NN-d raw": 4.308, "S-MMD raw": 0.00576}],
    "paper: RAE": [{"PR raw": 0.0630, "SE raw": 0.2110, "NN-d raw": 1.0664, "S-MMD raw": 0.07913}]}
PAPER_CURVATURE = {"paper: RAE, κ = 1e-3": 1e-3 * (16 * 16 * 768)**0.5,  # Fig. 1, times √dimensions
                   "paper: SD-VAE, κ = 1e-5": 1e-5 * (32 * 32 * 4)**0.5}

def average(rows):
    """Dicts of numbers or tensors -> one of their means."""
    means = {}
    for key in rows[0]:
        values = [np.asarray(row[key]) for row in rows]
        means[key] = float(np.mean(values))
    return means

# ---- Theorem 1: scattered targets share the weight, and the attraction vanishes.

# r, or None for √(3/d), which makes x as long as y; τ; whether τ is in mean distances S, as usual
SETTINGS = {"r = 1, τ = 1": (1.0, 1.0, False), "r = 1, τ = 4": (1.0, 4.0, False),
            "‖x‖ = ‖y‖, τ = 0.2 S": (None, 0.2, True), "‖x‖ = ‖y‖, τ = 0.05 S": (None, 0.05, True),
            "‖x‖ = ‖y‖, τ = 0.02 S": (None, 0.02, True)}

def theorem1(d, r, tau, in_mean_distances, queries=64, seed=0):
    """The field at `queries` of d generated x ~ U[−r,r]^d, with d positives y uniform on the unit
    sphere. The theorem: all means go to 1. share_pos, 1/Σw² over d: of the positives that count.
    """
    g = torch.Generator().manual_seed(seed)
    r = r or (3 / d)**0.5
    y = F.normalize(torch.randn(d, d, generator=g), dim=-1)
    x = (2 * torch.rand(d, d, generator=g) - 1) * r
    to_pos = torch.cdist(x[:queries], y)                            # [Q,d]
    to_neg = torch.cdist(x[:queries], x)
    if in_mean_distances:
        tau = tau * (to_pos.mean() + to_neg.mean()) / 2
    to_neg.fill_diagonal_(torch.inf)                                # k ≠ j
    w_pos = (-to_pos / tau).softmax(-1)
    w_neg = (-to_neg / tau).softmax(-1)
    attraction, repulsion = w_pos @ y, w_neg @ x
    table = {"v_pos2": d * attraction.square().sum(-1)}
    table["v_neg"] = repulsion.norm(dim=-1) / (r / 3**0.5)
    table["share_pos"] = 1 / w_pos.square().sum(-1) / d
    return table

def simulate(dims):
    """A row for each setting and d, of 256 queries."""
    rows = []
    for setting, arguments in SETTINGS.items():
        for d in dims:
            seeds = range(256 // min(64, d))
            draws = [theorem1(d, *arguments, seed=seed) for seed in seeds]
            rows.append({"setting": setting, "d": d} | average(draws))
    return rows

# ---- Tables 1 and 2.

def kernel(a, b):
    """The mean of exp(−‖a − b‖/√d) over the pairs of a, b [C,·,d] -> [C]."""
    distance = torch.cdist(a, b) / a.shape[-1]**0.5
    return (-distance).exp().mean((1, 2))

def statistics(x):
    """Of x [C,n,d], n samples of one class in each of C tokens -> each [C].
    PR and SE go from 1/d to 1, which is isotropic; concentrated: a small NN-d, a large S-MMD.
    """
    x = x - x.mean(1, keepdim=True)
    d = x.shape[2]
    mu = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0)               # n − 1 drops out
    p = mu / mu.sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1)
    two = torch.cdist(x, x).topk(2, largest=False).values           # the sample itself, the nearest
    eye = torch.eye(d, dtype=x.dtype)
    rho = x.norm(dim=-1).mean(1)
    poles = torch.cat([eye, -eye]) * rho.view(-1, 1, 1)             # ±ρ·e_i [C,2d,d]
    table = {"PR": 1 / (d * p.square().sum(1))}                     # Eq. (47)
    table["SE"] = entropy.exp() / d                                 # Eq. (48)
    table["NN-d"] = two[..., 1].mean(1) / d**0.5                    # Eq. (49)
    table["S-MMD"] = kernel(x, x) + kernel(poles, poles) - 2 * kernel(x, poles)     # Eq. (50)-(53)
    return table

def class_statistics(latents, labels):
    """Latents [n,D,h,w], labels [n] -> means over classes and tokens (App. B.1)."""
    classes = [tokens(latents[labels == c]) for c in labels.unique()]
    return average([statistics(x.double()) for x in classes])

def token_statistics(raw, labels):
    """The same of normalised latents, then of raw ones."""
    normalised = (raw - raw.mean(0)) / raw.std(0)
    table = class_statistics(normalised, labels)
    table_raw = class_statistics(raw, labels)
    return table | {f"{name} raw": value for name, value in table_raw.items()}

# ---- Figure 1; does drifting work here?

def curvature(path):
    """n curves [K,n,…] at equal steps of time -> κ = ‖x''⊥‖/‖x'‖² [K−2,n], angles turned [n]."""
    x = path.flatten(2).double()
    before, now, after = x[:-2], x[1:-1], x[2:]
    v = (after - before) / 2                                        # the step of time cancels in κ
    a = after - 2 * now + before
    along = (a * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
    a = a - along * v
    speed = v.norm(dim=-1)
    turn = a.norm(dim=-1) / speed                                   # radians in a step
    return turn / speed, turn.sum(0)

def flow_curvature(teacher, shape):
    """Of 32 paths: mean, 10th and 90th percentile of κ·√dimensions over t [3,48]; means over t."""
    z = torch.randn(32, *shape)
    y = torch.arange(32) % 10
    kappa, angle = curvature(vae.ode_path(teacher, z, y))
    scaled = kappa * math.prod(shape)**0.5                          # by the length of the noise
    band = [scaled.mean(1), scaled.quantile(0.1, 1), scaled.quantile(0.9, 1)]
    means = average([{"κ": kappa, "κ·√dimensions": scaled, "degrees turned": angle.rad2deg()}])
    return torch.stack(band).tolist(), means

@torch.no_grad()
def measure(sampler, space, metrics):
    """What Metrics says of a sample for each of its labels."""
    same = torch.Generator().manual_seed(0)                         # for all methods
    noise = torch.randn(len(metrics.labels), *space.rae.mean.shape, generator=same)
    batches = zip(noise.split(250), metrics.labels.split(250))
    images = [to_uint8(space.rae.decode(sampler(z, y))) for z, y in batches]
    return metrics(torch.cat(images), metrics.labels)

def study(job):
    """One space with one seed. job: its name, the seed, teacher.pt, steps."""
    name, seed, file, steps = job
    torch.manual_seed(seed)
    with reading(file) as checkpoint:
        metrics = Metrics(checkpoint)
    if name in VAES:
        space, mean = vae.vae_space(checkpoint, VAES[name], steps[0])
        views = {name: space.raw, f"{name}, posterior mean": mean}
        explained = (mean / space.rae.std).var(0).mean().item()     # of the normalised variance
    else:
        rae = build_rae(checkpoint["rae"])
        latents = encode(rae, checkpoint["images"], Config(device="cpu"))
        space = vae.Space(rae, latents * rae.std + rae.mean, latents, checkpoint["labels"])
        views = {name: space.raw}
        explained = math.nan
    views["N(0, I)"] = torch.randn_like(space.latents)
    tables = {view: token_statistics(x, space.labels) for view, x in views.items()}
    teacher = vae.flow_teacher(space, steps[1], seed)
    student = copy.deepcopy(teacher).requires_grad_(True)
    cfg = Config(device="cpu", seed=seed, steps=steps[2], save_every=steps[2])
    distilled = distil_aside(student, space.latents, space.labels, cfg)
    samplers = {"teacher, 50 steps": partial(ode_sample, teacher),
                "teacher, 1 step": partial(one_step, teacher),
                "distilled": partial(one_step, distilled)}
    rebuilt = to_uint8(space.rae.decode(space.latents[::2]))
    methods = {"autoencoder": metrics(rebuilt, metrics.labels)}
    for method, sampler in samplers.items():
        methods[method] = measure(sampler, space, metrics)
    band, path = flow_curvature(teacher, space.rae.mean.shape)
    path["posterior's share"] = 1 - explained
    return {"space": name, "statistics": tables, "methods": methods, "band": band, "path": path}

# ---- Pictures and the table.

def draw_theorem1(rows, dims, path):
    charts = []
    titles = {"v_pos2": "d·E‖V⁺‖²: 1 is an attraction of length 1/√d",
              "v_neg": "repulsion E‖V⁻‖ / (r/√3)", "share_pos": "share of the positives that count"}
    for name, title in titles.items():
        axes = Axes("", "dimensions d, and samples; black: Theorem 1", title, (dims[0], dims[-1]),
                    (0.04, 40), x_log=True, y_log=True, size=(480, 400), font=16)
        axes.line(dims, np.ones(len(dims)), "#000000")
        for i, setting in enumerate(SETTINGS):
            values = [row[name] for row in rows if row["setting"] == setting]
            axes.line(dims, values, COLOURS[i])
            if name == "share_pos":
                axes.text(dims[0], 24 / 1.6**i, setting, COLOURS[i])
        charts.append(axes.image())
    with write_atomically(path) as file:
        sheet(charts, 3).save(file, "PNG")

def draw_curvature(runs, spaces, path):
    title = "Curvature of the teacher's paths: their mean, and 80 % of them"
    y_label = "κ·√dimensions: radians per length of the noise"
    legend = dict(zip(spaces, COLOURS))
    axes = Axes(title, "t (1: noise, 0: data)", y_label, (0, 1), (3e-4, 30), y_log=True,
                legend=legend, size=(820, 480))
    t = 1 - np.linspace(0, 0.999, 50)[1:-1]
    for space, colour in legend.items():
        bands = [run["band"] for run in runs if run["space"] == space]
        mean, low, high = np.mean(bands, 0)
        axes.line(t, mean, colour, low, high)
    for name, value in PAPER_CURVATURE.items():
        axes.diamonds(0.5, value)
        axes.text(0.51, value, name)
    with write_atomically(path) as file:
        axes.image().save(file, "PNG")

def three_digits(values):
    mean = np.mean(values)
    if np.isnan(mean):
        return ""
    digits = 2 - int(np.floor(np.log10(abs(mean) + 1e-9)))
    return cell(values, max(0, digits))

def print_measures(runs, spaces):
    """A row a measure; a column a space, of the seeds."""
    columns = {space: [] for space in spaces}
    for run in runs:
        distances = {f"Fréchet, {method}": row["fd"] for method, row in run["methods"].items()}
        column = run["statistics"][run["space"]] | run["path"] | distances
        columns[run["space"]].append(column)
    columns |= PAPER
    rows = []
    for measure in column:
        row = [measure]
        for seeds in columns.values():
            values = [seed.get(measure, math.nan) for seed in seeds]
            row.append(three_digits(values))
        rows.append(row)
    print_table(["", *columns], rows)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of what is written (default: out)")
    add("--seeds", type=int, default=1, help="of VAEs, flows and students (default: 1)")
    add("--quick", action="store_true", help="two spaces and few steps: a look, no result")
    args = parser.parse_args(argv)
    require(args.seeds > 0, "--seeds must be at least 1")
    size = QUICK if args.quick else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = args.out / "teacher.pt"
    if not teacher.exists():
        make_teacher(teacher)
    theorem = simulate(size["dims"])
    draw_theorem1(theorem, size["dims"], args.out / "theorem1.png")
    with write_atomically(args.out / "theorem1.json", "w") as file:
        json.dump(theorem, file, indent=1)
    jobs = {}
    for seed in range(args.seeds):
        for name in size["spaces"]:
            key = f"{name}, seed {seed}, steps {size['steps']}"
            jobs[key] = name, seed, teacher, size["steps"]
    runs = list(complete(args.out / "geometry.json", teacher, jobs, study).values())
    draw_curvature(runs, size["spaces"], args.out / "curvature.png")
    print_measures(runs, size["spaces"])

if __name__ == "__main__":
    command(main)
