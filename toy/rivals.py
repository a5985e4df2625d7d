"""What else could one do with this teacher? The families of distillation side by side, at equal budgets.

    python toy/rivals.py                 every method on OUT/teacher.pt -> OUT/rivals.json, rivals.png
    python toy/rivals.py --space vae     the same in the space of geometry.py's VAE-64, -> rivals_vae.png
    python toy/rivals.py --quick         a tenth of the budget: a look, nothing to judge by
    python toy/rivals.py --rates         what RATES below was chosen from -> OUT/rivals_rates.json

All students start from the teacher's weights and spend as many network evaluations as drift_rae.py's default.
Of one sample a forward pass is 1, a backward pass 2 (1 to the input alone), a forward-mode product 2; those
of the teacher, a second network and generated pairs count. A student's falling learning rate, clipping and
moving average are the default's. Throughout x_t = (1−t)·x + t·ε, v(x_t, t) ≈ ε − x, and G(z) = z − v(z, 1).
A row that is done is not computed again: the same command goes on where it was interrupted.
"""
import argparse
import copy
import hashlib
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Attention, Config, Decoder, build_teacher, command, distil, encode,  # noqa: E402
                       flow_matching_loss, generate, load, load_pair, ode_sample, one_step, write_atomically)
from toy.ablation import start_worker  # noqa: E402
from toy.digits import DECODER, Metrics, make_teacher  # noqa: E402
from toy.geometry import ode_path, vae64  # noqa: E402
from toy.plot import panels  # noqa: E402

BATCH = 256         # samples a step where nothing else is said
GRID = 50           # points of the teacher's Euler grid, as in drift_rae.py's report
CANDIDATES = (2e-4, 7e-4, 2e-3)
RATES = {           # the best of these at a quarter of the budget, RAE, seed 0 (--rates); msd-2 has drift's
    "regression": 7e-4, "reflow": 7e-4, "dmd": 2e-3, "sid": 2e-4, "twinflow": 2e-3, "ard-4": 7e-4,
    "step-4": 2e-4, "drift-a": 2e-3, "drift": 7e-4, "drift-windows": 2e-3,
    "consistency": 2e-4}    # 7e-4 was better at a quarter; the whole budget ends at 75 with it
RESULTS = ("fd", "precision", "recall", "label_accuracy", "evaluations", "seconds")
NFE = {"teacher-4": 4, "teacher-50": GRID - 1, "ard-4": 4, "step-4": 4}     # of a sample; else 1


def column(t):
    return t.view(-1, 1, 1, 1)


class Task:
    """A flow teacher, latents [n,D,h,w] with labels [n], and a budget of evaluations; `spent` counts them."""

    def __init__(self, teacher, latents, labels, budget, lr, seed):
        self.teacher = teacher.requires_grad_(False).eval()
        self.latents, self.labels = latents, labels
        self.budget, self.spent = budget, 0
        self.lr, self.seed = lr, seed

    def student(self):
        return copy.deepcopy(self.teacher).requires_grad_(True)

    def draw(self, n):
        """-> real latents [n,D,h,w], their labels [n], noise like the latents."""
        i = torch.randint(len(self.latents), (n,))
        return self.latents[i], self.labels[i], torch.randn_like(self.latents[i])

    def fit(self, student, loss, cost, share=1.0):
        """Spend a share of the budget on steps of `cost` evaluations -> the student's moving average."""
        steps = int(share * self.budget) // cost
        self.spent += steps * cost
        ema = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - 0.99 * step / steps)
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            decay = 0.5 * (Config.ema / 0.5) ** min(1, step / Config.ema_warmup)
            for e, p in zip(ema.parameters(), student.parameters()):
                e.lerp_(p.detach(), 1 - decay)
        return ema

    @torch.no_grad()
    def paths(self, model, steps, share):
        """Spend a share of the budget on the model's ODE -> points [n,steps+1,D,h,w] of its paths from the
        noise to the end, their times [steps+1], labels [n]. The sampler stops at t = 0.001; here that is 0.
        """
        n = int(share * self.budget) // (GRID - 1)
        self.spent += n * (GRID - 1)
        _, labels, noise = self.draw(n)
        grid = 1 - torch.linspace(0, 0.999, GRID)
        index = torch.linspace(0, GRID - 1, steps + 1).round().long()
        points = [ode_path(model, z, y)[index].transpose(0, 1)
                  for z, y in zip(noise.split(BATCH), labels.split(BATCH))]
        return torch.cat(points), torch.cat([grid[index[:-1]], torch.zeros(1)]), labels


# ---- Regression on the ends of trajectories (Luhman & Luhman 2101.02388), and on points between.

def path_loss(model, points, times, y):
    """‖v(x_s, t_s) − (x_s − x_s+1)/(t_s − t_s+1)‖²; with one step, from z to x̂, it is ‖G(z) − x̂‖²."""
    now, after = points[:, :-1], points[:, 1:]                              # [B,S,D,h,w]
    velocity = (now - after) / column(times[:-1] - times[1:])
    return (model(now, times[:-1], y) - velocity).square().mean()


class PathAttention(Attention):
    """Causal by blocks: `points` of one path stand side by side in the batch, x [B·S,N,D], and the tokens of
    a point see its own and those of the earlier points.
    """
    points = 1

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # [B·S,heads,N,d]
        q, k, v = (u.unflatten(0, (-1, self.points)).transpose(1, 2).flatten(2, 3)          # [B,heads,S·N,d]
                   for u in (rope(q), rope(k), v))
        point = torch.arange(self.points).repeat_interleave(x.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, point.unsqueeze(1) >= point)
        out = out.unflatten(2, (self.points, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)      # [B·S,N,heads,d]
        return self.proj(out.flatten(2))


class Points(nn.Module):
    """A DiT^DH at S points of each path: x [B,S,D,h,w], times [S], y [B] -> velocities like x.
    history: in the lower layers, DiT^DH's encoder, a point also sees the earlier ones of its path.
    """
    def __init__(self, net, history=False):
        super().__init__()
        self.net = net
        self.lower = net.blocks[:net.depth[0]] if history else []
        for block in self.lower:
            attention = PathAttention(block.attn.qkv.in_features, block.attn.heads)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention

    def forward(self, x, times, y):
        for block in self.lower:
            block.attn.points = len(times)
        v = self.net(x.flatten(0, 1), times.repeat(len(x)), y.repeat_interleave(len(times)))
        return v.unflatten(0, x.shape[:2])


def regress(task, student, points, times, y, share):
    """Fit path_loss with a share of the budget, on paths that are drawn again and again."""
    def loss():
        i = torch.randint(len(y), (BATCH // (len(times) - 1),))     # BATCH points: the cost is by tokens
        return path_loss(student, points[i], times, y[i])

    return task.fit(student, loss, 3 * BATCH, share)


def few_steps(task, steps, history=False):
    """steps = 1: regression on pairs (z, x̂); more: step distillation, with history ARD (2504.11295). Half of
    the budget makes the teacher's paths. No cache: with history a sample computes 10 points in its 4 steps.
    """
    points, times, y = task.paths(task.teacher, steps, 1 / 2)
    ema = regress(task, Points(task.student(), history), points, times, y, 1 / 2)

    def sampler(z, y):
        path = [z]
        for s in range(steps):
            first = 0 if history else s
            v = ema(torch.stack(path[first:], 1), times[first:s + 1], y)[:, -1]
            path.append(path[-1] + (times[s + 1] - times[s]) * v)
        return path[-1]

    return sampler


def reflow(task):
    """Rectified flow (2209.03003), InstaFlow (2309.06380): flow matching on the straight lines between z and
    x̂ of the pairs; then regression on fresh pairs of the straightened network.
    """
    pairs, _, y = task.paths(task.teacher, 1, 1 / 4)
    student = task.student()

    def loss():
        i = torch.randint(len(y), (BATCH,))
        z, x = pairs[i].unbind(1)
        t = torch.rand(BATCH)
        v = student((1 - column(t)) * x + column(t) * z, t, y[i])
        return (v - (z - x)).square().mean()

    straight = task.fit(student, loss, 3 * BATCH, 1 / 4)
    student = copy.deepcopy(straight).requires_grad_(True)
    ema = regress(task, Points(student), *task.paths(straight, 1, 1 / 4), 1 / 4)
    return partial(one_step, ema.net)


# ---- Consistency, mean velocity (2303.01469; sCM 2503.09641; MeanFlow 2505.13447; MF-RAE)

def consistency_loss(student, teacher, x, y, noise):
    """u(x_t, t) is the mean velocity from t down to 0: u = v − t·du/dt along the teacher's path.
    The derivative is a forward-mode product along (v, 1). A sample's squared error is divided by itself.
    """
    t = torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * noise
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):     # the others have no forward mode
        v = teacher(x_t, t, y)
        _, change = torch.func.jvp(lambda x, t: student(x, t, y), (x_t, t), (v, torch.ones_like(t)))
        target = v - column(t) * change
    error = (student(x_t, t, y) - target).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()


def consistency(task):
    u = task.student()
    ema = task.fit(u, lambda: consistency_loss(u, task.teacher, *task.draw(BATCH)), (1 + 2 + 3) * BATCH)
    return partial(one_step, ema)


# ---- Scores: a second network follows the student's own flow.

def denoised(x, y, *networks):
    """Each network's x̂ = x_t − t·v(x_t, t) at one t in [0.02, 0.98] a sample."""
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * torch.randn_like(x)
    return [x_t - column(t) * v(x_t, t, y) for v in networks]


def dmd_loss(x, y, real, fake):
    """½‖x − sg[x − g]‖² with g = (x̂_fake − x̂_real) / mean|x − x̂_real|: DMD (2311.18828) without its
    regression, as DMD2 (2405.14867), but without that one's GAN loss.
    """
    with torch.no_grad():
        x_real, x_fake = denoised(x, y, real, fake)
        g = (x_fake - x_real) / (x - x_real).abs().mean((1, 2, 3), keepdim=True)
    return 0.5 * (x - (x - g).detach()).square().mean()


def sid_loss(x, y, real, fake):
    """⟨x̂_real − x̂_fake, x̂_fake − x⟩ / sg[mean|x − x̂_real|]: SiD (2404.04057) at α = 1, without the GAN loss
    of SiDA. The gradient runs through both networks into their inputs.
    """
    x_real, x_fake = denoised(x, y, real, fake)
    weight = 1 / (x - x_real).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (weight * (x_real - x_fake) * (x_fake - x)).mean()


def scores(task, loss, cost, updates, n=BATCH // 2):
    """Before each step of the student, which costs a sample `cost` evaluations, the second network takes
    `updates` at a constant rate, each for 1 + 3. n: samples a step.
    """
    student, fake = task.student(), task.student()
    optimizer = torch.optim.AdamW(fake.parameters(), task.lr, (0.9, 0.95), weight_decay=0.0, fused=True)

    def step():
        fake.requires_grad_(True)
        for _ in range(updates):
            _, y, z = task.draw(n)
            with torch.no_grad():
                x = one_step(student, z, y)
            optimizer.zero_grad()
            flow_matching_loss(fake, x, y).backward()
            nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
            optimizer.step()
        fake.requires_grad_(False)
        _, y, z = task.draw(n)
        return loss(one_step(student, z, y), y, task.teacher, fake)

    return partial(one_step, task.fit(student, step, n * (cost + updates * (1 + 3))))


# ---- Self-adversarial twins: TwinFlow (2512.05150), without its any-step term RCGM.

class TwoTimes(nn.Module):
    """v(x, t, r), the mean velocity from t to r (r = t: the instantaneous one), at −t that of the student's
    own samples. An embedding of r, zero at first, is added to that of t (by a hook: DiTDH has no r).
    """
    def __init__(self, net):
        super().__init__()
        self.net, self.embed = net, copy.deepcopy(net.t_embedder["mlp"])
        nn.init.zeros_(self.embed[2].weight)
        nn.init.zeros_(self.embed[2].bias)

    def forward(self, x, t, y, r=None):
        r = t if r is None else r
        angle = 2 * torch.pi * r.view(-1, 1, 1) * self.net.t_embedder.W                         # [B,1,256]
        shift = self.embed(torch.cat([angle.sin(), angle.cos()], -1))
        hook = self.net.t_embedder["mlp"].register_forward_hook(lambda mlp, given, out: out + shift)
        try:
            return self.net(x, t, y)
        finally:
            hook.remove()


def twinflow_loss(net, x, y, z):
    """Three terms: the twin at −t learns the flow of sg[G(z)], ‖v(x_t, −t, −t) − (ε − G)‖²; the twins'
    difference d, clamped to ±1, moves the student, ½‖v(z, 1, 0) − sg[v(z, 1, 0) + d]‖²; and flow matching on
    data at (t, t).
    """
    t, noise = torch.rand(len(z)), torch.randn_like(z)
    v = net(z, torch.ones(len(z)), y, torch.zeros(len(z)))
    fake = (z - v).detach()
    x_t = (1 - column(t)) * fake + column(t) * noise
    twin = net(x_t, -t, y)
    with torch.no_grad():
        d = (net(x_t, t, y) - twin).clamp(-1, 1)            # v_real − v_fake
    return ((twin - (noise - fake)).square().mean() + 0.5 * (v - (v + d).detach()).square().mean()
            + flow_matching_loss(net, x, y))


def twinflow(task):
    net = TwoTimes(task.student())
    ema = task.fit(net, lambda: twinflow_loss(net, *task.draw(BATCH)), (3 + 3 + 1 + 3) * BATCH)
    return lambda z, y: z - ema(z, torch.ones(len(z)), y, torch.zeros(len(z)))


# ---- Drifting (Deng et al. 2602.04770; Drift-RAE 2606.15553; windows, ours), and in parts (MSD 2410.23274)

def drifting(task, student=None, members=slice(None), first=0, share=1.0, **changes):
    """drift_rae.py's distil on the latents [members], whose classes begin with `first`."""
    cfg = Config(device="cpu", lr=task.lr, seed=task.seed, **changes)
    cost = cfg.n_class * (3 * cfg.n_neg + cfg.n_extra_neg)
    cfg.steps = cfg.save_every = int(share * task.budget) // cost
    task.spent += cfg.steps * cost
    with tempfile.TemporaryDirectory() as folder:       # for the log and state, which nobody reads
        cfg.out = folder
        labels = (task.labels[members] - first).numpy()
        return partial(one_step, distil(student or task.student(), task.latents[members], labels, cfg))


def several_students(task):
    """Two students, half the classes and half the budget each. A sample needs one; here both are computed."""
    half = task.teacher.num_classes // 2
    samplers = []
    for first in (0, half):
        student = task.student()
        members = (task.labels >= first) & (task.labels < first + half)
        table = student.y_embedder["embedding_table"].weight.data
        table[:2 * half] = table[:2 * half].roll(-first, 0)     # its class c is first + c
        samplers.append(drifting(task, student, members, first, 1 / 2, n_class=half))

    def both(z, y):
        low, high = (sampler(z, y % half) for sampler in samplers)
        return torch.where(column(y < half), low, high)

    return both


# ---- The rows

METHODS = {
    "teacher-1": lambda task: partial(one_step, task.teacher),
    "teacher-4": lambda task: partial(ode_sample, task.teacher, steps=5),
    "teacher-50": lambda task: partial(ode_sample, task.teacher, steps=GRID),
    "regression": partial(few_steps, steps=1),
    "reflow": reflow,
    "consistency": consistency,
    "dmd": partial(scores, loss=dmd_loss, cost=3 + 1 + 1, updates=5),     # as DMD2
    "sid": partial(scores, loss=sid_loss, cost=3 + 2 + 2, updates=1),
    "twinflow": twinflow,
    "ard-4": partial(few_steps, steps=4, history=True),
    "step-4": partial(few_steps, steps=4),
    "msd-2": several_students,
    "drift-a": partial(drifting, n_pos=64, n_extra_neg=0, perturb=False, y_softmax=True),
    "drift": drifting,
    "drift-windows": partial(drifting, windows=(1, 2)),
}
BUDGET = Config.steps * Config.n_class * (3 * Config.n_neg + Config.n_extra_neg)


def open_space(out, space):
    """-> flow teacher, latents, the autoencoder that decodes them, what else is in OUT/teacher.pt."""
    cfg, file = Config(device="cpu"), out / "vae64.pt"
    teacher, rae, ours = load_pair(out / "teacher.pt", cfg)
    if space == "rae":
        return teacher, encode(rae, ours["images"], cfg), rae, ours
    if not file.exists():
        latents, _, vae, flow = vae64(ours)
        saved = {"ema": flow.state_dict(), "latents": latents, "decoder": vae.decoder.state_dict(),
                 "mean": vae.mean, "var": vae.std.square()}
        write_atomically(file, partial(torch.save, saved))
    saved = load(file, lambda found: found)
    decoder = Decoder(**DECODER | {"latent_dim": len(saved["mean"])})
    decoder.load_state_dict(saved["decoder"])
    vae = RAE(None, decoder, saved["mean"], saved["var"], input_size=28, eps=0, sigmoid=True)
    return build_teacher(saved), saved["latents"], vae, ours


def work(job):
    """job: the folder of teacher.pt, what is known of a row before -> the row; its digits go to a file."""
    out, row = job
    teacher, latents, rae, ours = open_space(out, row["space"])
    torch.manual_seed(row["seed"])
    task = Task(teacher, latents, ours["labels"], row["budget"], row["lr"], row["seed"])
    began = time.perf_counter()
    try:
        sampler = METHODS[row["method"]](task)
    except (ValueError, RuntimeError) as error:
        if "finite" not in str(error):                      # a gradient that is not: the row says NaN
            raise
        return row | dict.fromkeys(RESULTS, np.nan)
    seconds = time.perf_counter() - began
    measure = Metrics(ours)
    images = generate(sampler, rae, measure.labels, Config(device="cpu"))
    digits = np.hstack(two_a_class(images).numpy())         # [28,20·28,3]
    write_atomically(strip_path(out, row), partial(Image.fromarray(digits).save, format="PNG"))
    return row | measure(images, measure.labels) | {"evaluations": task.spent, "seconds": seconds}


def two_a_class(images):
    return images.unflatten(0, (10, -1))[:, :2].transpose(0, 1).flatten(0, 1)


def strip_path(out, row):
    return out / "rivals" / "{space}-{method}-{seed}-{budget}-{lr}.png".format(**row)


def rows_of(args):
    """What is known of each row of the command before it is computed."""
    teacher = args.out / ("teacher.pt" if args.space == "rae" else "vae64.pt")
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()[:16]
    budget = BUDGET // (10 if args.quick else 1) // (4 if args.rates else 1)
    for seed in range(args.seeds):
        for method in args.methods:
            for lr in CANDIDATES if args.rates else [RATES.get(method, Config.lr)]:
                yield dict(method=method, space=args.space, seed=seed, nfe=NFE.get(method, 1), budget=budget,
                           lr=lr, teacher=digest)


def measure_all(args, path):
    """-> all rows of the command, in its order; path is written after each."""
    saved = json.loads(path.read_text()) if path.exists() else []
    wanted = list(rows_of(args))
    todo = [(args.out, known) for known in wanted if not any(known.items() <= row.items() for row in saved)]
    with (mp.get_context("spawn").Pool(min(os.cpu_count(), len(todo) or 1), start_worker) as pool,
          tqdm(total=len(todo), desc="rows") as bar):
        for row in pool.imap_unordered(work, todo):
            saved.append(row)
            text = json.dumps(saved, indent=1).encode()
            write_atomically(path, lambda file: file.write(text))
            bar.update()
    return [row for known in wanted for row in saved if known.items() <= row.items()]


def show(rows):
    """Mean and standard deviation over the seeds, of each method and learning rate."""
    names = ["method", "lr", "nfe", *RESULTS]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for key in dict.fromkeys((row["method"], row["lr"]) for row in rows):
        cells = [key[0]]
        for name in names[1:]:
            x = [row[name] for row in rows if (row["method"], row["lr"]) == key]
            digits = {"nfe": 0, "evaluations": 0, "seconds": 0, "fd": 2, "lr": 4}.get(name, 3)
            spread = f" ± {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 and np.std(x) > 1e-9 else ""
            cells.append(f"{np.mean(x):,.{digits}f}{spread}")
        print(f"| {' | '.join(cells)} |")


def draw_strips(rows, ours, path, out):
    """A strip a method, of seed 0: a digit's place stands for its class and, but in `real`, for its noise."""
    images = {"real": two_a_class(ours["images"])}
    for row in (row for row in rows if row["seed"] == 0 and not np.isnan(row["fd"])):
        strip = torch.from_numpy(np.array(Image.open(strip_path(out, row))))
        images[f"{row['method']}, {row['fd']:.2f}"] = strip.unflatten(1, (20, 28)).transpose(0, 1)
    write_atomically(path, partial(panels(images, rows=2).save, format="PNG"))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of teacher.pt, made if missing (default: out)")
    add("--seeds", type=int, default=1, help="of the distillation; the teacher is one (default: 1)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS) + "; default: all")
    add("--space", choices=("rae", "vae"), default="rae", help="the teacher's, or a VAE's with its own flow")
    add("--quick", action="store_true", help="a tenth of the budget")
    add("--rates", action="store_true", help="try three learning rates at a quarter of the budget")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    args.methods = args.methods or list(RATES if args.rates else METHODS)
    return args


def main(argv=None):
    args = parse(argv)
    (args.out / "rivals").mkdir(parents=True, exist_ok=True)
    if not (args.out / "teacher.pt").exists():
        make_teacher(args.out / "teacher.pt")
    ours = open_space(args.out, args.space)[-1]             # trains the VAE, before there are workers
    rows = measure_all(args, args.out / ("rivals_rates.json" if args.rates else "rivals.json"))
    show(rows)
    if not args.rates:
        draw_strips(rows, ours, args.out / f"rivals{'_vae' * (args.space == 'vae')}.png", args.out)


if __name__ == "__main__":
    command(main)
