"""§3.2 on real digits: is an RAE's space more anisotropic, concentrated and curved than a VAE's?

    python toy/geometry.py [--out out] [--seeds 1]     tables, geometry.json, theorem1.png, curvature.png
    python toy/geometry.py --quick                     two spaces and few steps: a look, nothing to judge by

The RAE is that of OUT/teacher.pt, made if it is not there. The VAEs see the same digits and make the same 2×2
tokens, with an encoder and a decoder of the same size. As in latent diffusion, their latents are samples of
the posterior, here one an image. Flow and drifting see normalised latents, of mean 0 and variance 1 in each
channel and position; raw ones are what the encoder gives. Results in geometry.json are not computed again.
"""
import copy
import hashlib
import json
import math
import multiprocessing
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Config, Decoder, DiTDH, ViT, build_rae, command, distil, encode,  # noqa: E402
                       laplace_noise, load, ode_sample, one_step, to_uint8, tokens, train_flow,
                       write_atomically)
from toy.ablation import start_worker  # noqa: E402
from toy.digits import DECODER, ENCODER, TEACHER, Metrics, fit, make_teacher  # noqa: E402
from toy.plot import COLOURS, Axes, sheet  # noqa: E402

WIDTHS = {"RAE-64": None, "VAE-16": 16, "VAE-64": 64, "VAE-128": 128}       # of the VAEs' tokens
STEPS = (800, 1500, 250)                # of VAE, flow, each student
KL = 0.01                               # weight of the VAEs' divergence: made to reconstruct, as SD-VAE
PAPER = {"paper: SD-VAE": {"PR raw": 0.2068, "SE raw": 0.3781, "NN-d raw": 4.3083, "S-MMD raw": 0.00576},
         "paper: RAE": {"PR raw": 0.0630, "SE raw": 0.2110, "NN-d raw": 1.0664, "S-MMD raw": 0.07913}}
PAPER_CURVATURE = {"paper: RAE, κ = 1e-3": 1e-3 * (16 * 16 * 768)**0.5,     # Fig. 1, times √dimensions
                   "paper: SD-VAE, κ = 1e-5": 1e-5 * (32 * 32 * 4)**0.5}


def average(rows):
    """Dicts of numbers or tensors -> one of their means."""
    return {k: float(np.mean([np.asarray(row[k]) for row in rows])) for k in rows[0]}


# ---- Theorem 1: scattered targets share the weight, and the attraction vanishes.

# r, or None for √(3/d), which makes x as long as y; τ; whether τ is in mean distances S, as the paper's
SETTINGS = {"r = 1, τ = 1": (1.0, 1.0, False), "r = 1, τ = 4": (1.0, 4.0, False),
            **{f"‖x‖ = ‖y‖, τ = {tau} S": (None, tau, True) for tau in (0.2, 0.05, 0.02)}}


def theorem1(d, r, tau, in_mean_distances, queries=64, seed=0):
    """The field at `queries` of d generated x ~ U[−r,r]^d, with d positives y uniform on the unit sphere.
    The means of d·‖V⁺‖², ‖V⁻‖/(r/√3) and 1/Σw² over the number of targets all go to 1 by the theorem.
    """
    g, r = torch.Generator().manual_seed(seed), r or (3 / d)**0.5
    y = F.normalize(torch.randn(d, d, generator=g), dim=-1)
    x = (2 * torch.rand(d, d, generator=g) - 1) * r
    to_pos, to_neg = torch.cdist(x[:queries], y), torch.cdist(x[:queries], x)        # [Q,d]
    if in_mean_distances:
        tau = tau * (to_pos.mean() + to_neg.mean()) / 2
    to_neg.fill_diagonal_(torch.inf)                                        # k ≠ j
    w_pos, w_neg = (-to_pos / tau).softmax(-1), (-to_neg / tau).softmax(-1)
    return {"v_pos2": d * (w_pos @ y).square().sum(-1), "v_neg": (w_neg @ x).norm(dim=-1) / (r / 3**0.5),
            "share_pos": 1 / w_pos.square().sum(-1) / d, "share_neg": 1 / w_neg.square().sum(-1) / (d - 1)}


def simulate(largest):
    """A row for each setting and d = 4, 8, … largest, with 256 queries in each."""
    rows = []
    for setting, how in SETTINGS.items():
        for d in (2**k for k in range(2, int(math.log2(largest)) + 1)):
            draws = [theorem1(d, *how, seed=seed) for seed in range(256 // min(64, d))]
            rows.append({"setting": setting, "d": d} | average(draws))
    return rows


# ---- Tables 1 and 2.

def statistics(x):
    """Of x [C,n,d], n samples of one class in each of C tokens -> each [C].
    PR and SE go from 1/d to 1, which is isotropic; concentrated: a small NN-d, a large S-MMD.
    """
    x, d = x - x.mean(1, keepdim=True), x.shape[2]
    mu = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0)                       # n − 1 drops out
    p = mu / mu.sum(1, keepdim=True)
    nearest = torch.cdist(x, x).topk(2, largest=False).values[..., 1]       # the first is the sample itself
    eye = torch.eye(d, dtype=x.dtype)
    poles = torch.cat([eye, -eye]) * x.norm(dim=-1).mean(1).view(-1, 1, 1)  # ±ρ·e_i [C,2d,d]

    def kernel(a, b):
        return (-torch.cdist(a, b) / d**0.5).exp().mean((1, 2))

    return {"PR": 1 / (d * p.square().sum(1)),                              # Eq. (47)
            "SE": torch.special.entr(p).sum(1).exp() / d,                   # Eq. (48)
            "NN-d": nearest.mean(1) / d**0.5,                               # Eq. (49)
            "S-MMD": kernel(x, x) + kernel(poles, poles) - 2 * kernel(x, poles)}     # Eq. (50)-(53)


def token_statistics(raw, labels):
    """raw [n,D,h,w], labels [n] -> means over classes and tokens (App. B.1), normalised and raw."""
    views = (raw - raw.mean(0)) / raw.std(0), raw
    means = [average([statistics(tokens(x[labels == c].double())) for c in labels.unique()]) for x in views]
    return means[0] | {f"{name} raw": value for name, value in means[1].items()}


# ---- The spaces: normalised latents [n,D,2,2], an RAE that decodes them, and raw ones for Tables 1 and 2.

def rae_space(checkpoint):
    rae = build_rae(checkpoint["rae"])
    latents = encode(rae, checkpoint["images"], Config(device="cpu"))
    return SimpleNamespace(rae=rae, latents=latents, labels=checkpoint["labels"],
                           raw={"RAE-64": latents * rae.std + rae.mean})


def divergence(mean, log_var):
    """KL of N(mean, exp(log_var)) from N(0, I), summed over everything."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()


def vae_space(checkpoint, name, width, steps=STEPS[0]):
    """Train a VAE on the checkpoint's digits, with a Bernoulli likelihood, without their labels."""
    images = checkpoint["images"].permute(0, 3, 1, 2) / 255
    dim = max(ENCODER["embed_dim"], width)      # or the encoder would be narrower than the latents
    encoder = nn.Sequential(ViT(**ENCODER | {"embed_dim": dim}), nn.Linear(dim, 2 * width))
    decoder = Decoder(**DECODER | {"latent_dim": width})
    vae = RAE(encoder, decoder, torch.zeros(1, 2, 2), torch.ones(1, 2, 2), input_size=28, eps=0)

    def posterior(x):
        mean, log_var = vae.encode(x).chunk(2, 1)                           # [B,D,2,2]
        return mean, log_var, mean + (log_var / 2).exp() * torch.randn_like(mean)

    def loss(i):
        mean, log_var, latents = posterior(images[i])
        logits = 6 * vae.decode(latents) - 3                                # those of RAE's sigmoid
        nll = F.binary_cross_entropy_with_logits(logits, images[i], reduction="sum") / 3     # equal channels
        return (nll + KL * divergence(mean, log_var)) / images[i, 0].numel()

    vae.requires_grad_(True)
    fit(vae.parameters(), loss, len(images), steps, 2e-3, name)
    vae.requires_grad_(False)
    mean, _, raw = posterior(images)
    rae = RAE(None, decoder, raw.mean(0), raw.var(0), input_size=28, eps=0, sigmoid=True)
    return SimpleNamespace(rae=rae, latents=(raw - rae.mean) / rae.std, labels=checkpoint["labels"],
                           raw={name: raw, f"{name}, posterior mean": mean})


def flow_teacher(space, steps=STEPS[1], seed=0):
    """-> (flow teacher of the space, the same network untrained), in eval mode."""
    fresh = DiTDH(**TEACHER | {"in_channels": space.latents.shape[1]})
    teacher = train_flow(copy.deepcopy(fresh), space.latents, space.labels, steps, lr=3e-3, seed=seed)
    return teacher.requires_grad_(True), fresh.eval()


def vae64(checkpoint, seed=0, steps=STEPS):
    """-> latents [n,64,2,2], labels [n], a VAE whose decode() an RAE's caller can use, its flow teacher."""
    torch.manual_seed(seed)
    space = vae_space(checkpoint, "VAE-64", 64, steps[0])
    return space.latents, space.labels, space.rae, flow_teacher(space, steps[1], seed)[0]


# ---- Figure 1, and Table 9's question: does drifting work here?

def curvature(path):
    """path [K,n,…], n curves at equal steps of time -> κ = ‖x''⊥‖/‖x'‖² [K−2,n], the angles they turn [n]."""
    x = path.flatten(2).double()
    v, a = (x[2:] - x[:-2]) / 2, x[2:] - 2 * x[1:-1] + x[:-2]               # the step of time cancels in κ
    a = a - (a * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    turn = a.norm(dim=-1) / v.norm(dim=-1)                                  # radians in a step
    return turn / v.norm(dim=-1), turn.sum(0)


def ode_path(teacher, z, y):
    """The grid points [50,n,D,h,w] of ode_sample's paths, from the noise z to the end."""
    path = []

    def record(x, t, y):
        path.append(x)
        return teacher(x, t, y)

    path.append(ode_sample(record, z, y))
    return torch.stack(path)


def flow_curvature(teacher, shape, n=32):
    """Of n of the teacher's paths: κ·√dimensions over t, mean and 10th and 90th percentile [3,48]; means."""
    kappa, angle = curvature(ode_path(teacher, torch.randn(n, *shape), torch.arange(n) % 10))
    scaled = kappa * math.prod(shape)**0.5                                  # by the length of the noise
    band = torch.stack([scaled.mean(1), scaled.quantile(0.1, 1), scaled.quantile(0.9, 1)])
    means = average([{"κ": kappa, "κ·√dimensions": scaled, "degrees turned": angle.rad2deg()}])
    return {"band": band.tolist(), "path": means}


def compare(gen, pos):
    """Latents of one class, generated and real -> spread, and how many of the real ones count, 1/Σw²."""
    found = {"spread": (gen.var(0).sum() / pos.var(0).sum()).sqrt()}        # 0: a collapse
    x, y = tokens(gen), tokens(pos)
    scale, n = torch.cdist(x, torch.cat([x, y], 1)).mean(), laplace_noise(x)
    for tau in Config.temperatures:
        weights = (-torch.cdist(x + tau * scale * n, y) / (tau * scale)).softmax(-1)
        found[f"1/Σw², τ={tau}"] = 1 / weights.square().sum(-1)              # Theorem 1: -> all of them
    return found


@torch.no_grad()
def measure(sampler, space, metrics):
    """What Metrics says of a sample for each of its labels, with the mean of compare() over the classes."""
    same = torch.Generator().manual_seed(0)             # for all methods
    noise = torch.randn(len(metrics.labels), *space.latents.shape[1:], generator=same)
    latents = torch.cat([sampler(*batch) for batch in zip(noise.split(250), metrics.labels.split(250))])
    images = torch.cat([to_uint8(space.rae.decode(batch)) for batch in latents.split(250)])
    classes = [compare(latents[metrics.labels == c], space.latents[space.labels == c][:Config.n_pos])
               for c in range(10)]
    return metrics(images, metrics.labels) | average(classes)


def drifted(model, space, steps, seed):
    with tempfile.TemporaryDirectory() as folder:       # for the log and state, which nobody reads
        cfg = Config(device="cpu", seed=seed, steps=steps, n_class=5, save_every=steps, out=folder)
        return distil(copy.deepcopy(model), space.latents, space.labels.numpy(), cfg)


def study(job):
    key, name, width, seed, path, steps = job       # width of a VAE's tokens, teacher.pt
    torch.manual_seed(seed)
    checkpoint = load(path, lambda found: {k: found[k] for k in ("rae", "images", "labels", "judge")})
    metrics = Metrics(checkpoint)
    space = vae_space(checkpoint, name, width, steps[0]) if width else rae_space(checkpoint)
    raw = space.raw | {f"N(0, I), {space.latents.shape[1]} wide": torch.randn_like(space.latents)}
    views = {view: token_statistics(latents, space.labels) for view, latents in raw.items()}
    teacher, fresh = flow_teacher(space, steps[1], seed)
    rows = {"autoencoder": metrics(to_uint8(space.rae.decode(space.latents[::2])), metrics.labels),
            "teacher, 50 steps": measure(partial(ode_sample, teacher), space, metrics)}
    students = {"teacher, 1 step": teacher, "distilled": drifted(teacher, space, steps[2], seed),
                "untrained": fresh, "from scratch": drifted(fresh, space, steps[2], seed)}
    for method, student in students.items():
        rows[method] = measure(partial(one_step, student), space, metrics)
    curve = flow_curvature(teacher, space.latents.shape[1:])
    if width:       # of the variance of the normalised latents, what the posterior's width adds
        explained = (space.raw[f"{name}, posterior mean"] / space.rae.std).var(0).mean()
        curve["path"]["posterior's share"] = 1 - explained.item()
    return key, {"space": name, "seed": seed, "statistics": views, "methods": rows} | curve


# ---- Pictures and tables.

def draw_theorem1(rows, path):
    dims, charts = np.unique([row["d"] for row in rows]), []
    titles = {"v_pos2": "d·E‖V⁺‖²: 1 is an attraction of length 1/√d", "v_neg": "repulsion E‖V⁻‖ / (r/√3)",
              "share_pos": "share of the positives that count"}
    for name, title in titles.items():
        axes = Axes("", "dimensions d, and samples; black: Theorem 1", title, (dims[0], dims[-1]), (0.04, 40),
                    x_log=True, y_log=True, size=(480, 400), font=16)
        axes.line(dims, dims**0, "#000000")
        for i, (setting, colour) in enumerate(zip(SETTINGS, COLOURS)):
            axes.line(dims, [row[name] for row in rows if row["setting"] == setting], colour)
            if name == "share_pos":
                axes.text(dims[0], 24 / 1.6**i, setting, colour)
        charts.append(axes.image())
    write_atomically(path, partial(sheet(charts, 3).save, format="PNG"))


def draw_curvature(runs, path):
    colours = dict(zip(dict.fromkeys(run["space"] for run in runs), COLOURS))
    axes = Axes("Curvature of the teacher's paths: their mean, and 80 % of them", "t (1: noise, 0: data)",
                "κ·√dimensions: radians per length of the noise", (0, 1), (3e-4, 30), y_log=True,
                y_ticks={10.0**e: f"{10.0**e:g}" for e in range(-3, 2)}, legend=colours, size=(820, 480))
    for name, colour in colours.items():
        mean, low, high = np.mean([run["band"] for run in runs if run["space"] == name], 0)
        axes.line(1 - np.linspace(0, 0.999, 50)[1:-1], mean, colour, low, high)
    for name, value in PAPER_CURVATURE.items():
        axes.diamonds(0.5, value)
        axes.text(0.51, value, name)
    write_atomically(path, partial(axes.image().save, format="PNG"))


def cell(values):
    """Three digits of the mean, and the standard deviation over the seeds."""
    digits = int(np.clip(2 - np.floor(np.log10(abs(np.mean(values)) + 1e-9)), 0, 5))
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if values[1:] else "")


def print_table(title, pairs):
    rows = {}       # pairs: (name of the row, {column: value}), one for each seed
    for name, values in pairs:
        for column, value in values.items():
            rows.setdefault(name, {}).setdefault(column, []).append(value)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[name, *(cell(row[c]) if c in row else "" for c in columns)] for name, row in rows.items()]
    lines = [[title, *columns], ["---"] * (1 + len(columns)), *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("|", " | ".join(map(str.ljust, line, widths)), "|")


def tables(theorem, runs):
    """Titles and rows of what is printed; the first is the page's, with a row a measure, a column a space."""
    columns = [(run["space"], run["statistics"][run["space"]] | run["path"]
                | {f"Fréchet, {k}": row["fd"] for k, row in run["methods"].items()}) for run in runs]
    yield "", [(key, {space: x}) for space, values in columns + [*PAPER.items()] for key, x in values.items()]
    yield "Theorem 1, → 1", ((f"{row['setting']}, d = {row['d']}", {k: row[k] for k in list(row)[2:]})
                             for row in theorem if row["d"] in (16, 256, 4096))
    yield "Tables 1, 2", [row for run in [*runs, {"statistics": PAPER}] for row in run["statistics"].items()]
    yield "Table 9", [(f"{run['space']}, {k}", row) for run in runs for k, row in run["methods"].items()]


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out", help="folder of what is written (default: out)")
    parser.add_argument("--seeds", type=int, default=1, help="of VAEs, flows and students (default: 1)")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS, metavar="N",
                        help=f"of VAE, flow and each student (default: {' '.join(map(str, STEPS))})")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--quick", action="store_true", help="RAE-64 and VAE-64, steps 200 200 20")
    if parser.parse_args(argv).quick:
        parser.set_defaults(steps=(200, 200, 20))
    args = parser.parse_args(argv)
    if min(args.steps[:2]) < 11 or min(args.steps[2], args.seeds, args.workers) < 1:
        parser.error("--steps must be at least 11 11 1, --seeds and --workers at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, file = args.out / "teacher.pt", args.out / "geometry.json"
    if not teacher.exists():
        make_teacher(teacher)
    theorem = simulate(1024 if args.quick else 4096)
    digest, steps = hashlib.sha256(teacher.read_bytes()).hexdigest()[:8], tuple(args.steps)
    jobs = [(f"{name}, seed {seed}, steps {steps}, {digest}", name, WIDTHS[name], seed, teacher, steps)
            for seed in range(args.seeds) for name in (("RAE-64", "VAE-64") if args.quick else WIDTHS)]
    done = json.loads(file.read_text())["runs"] if file.exists() else {}
    todo = [job for job in jobs if job[0] not in done]
    with multiprocessing.get_context("spawn").Pool(args.workers, start_worker) as pool:
        for key, run in tqdm(pool.imap_unordered(study, todo), total=len(todo), desc="spaces × seeds"):
            done[key] = run
            result = json.dumps({"theorem1": theorem, "runs": done}, indent=1)
            write_atomically(file, lambda f: f.write(result.encode()))
    runs = [done[job[0]] for job in jobs]
    draw_theorem1(theorem, args.out / "theorem1.png")
    draw_curvature(runs, args.out / "curvature.png")
    for title, pairs in tables(theorem, runs):
        print_table(title, pairs)


if __name__ == "__main__":
    command(main)
