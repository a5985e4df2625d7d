"""What else could one do with this teacher? The families of distillation at equal budgets.

    python toy/rivals.py                all methods on toy/teacher.pt -> OUT/rivals.json and .png
    python toy/rivals.py --space vae    the same in the space of toy/vae.py's VAE-64 -> rivals_vae.*
    python toy/rivals.py --quick        a tenth of the budget: a look, not a result
    python toy/rivals.py --rates        what RATES was chosen from -> OUT/rivals_rates.*

All students start from the teacher's weights and spend as many network evaluations as drift_rae.py
does. Per sample, a forward pass counts as 1, a backward pass as 2 (as 1 if only the input has a
gradient), and a forward-mode product as 2. Evaluations of the teacher and of a second network
count, and so do those that generate training pairs. Decay of the learning rate, clipping and
moving average are those of drift_rae.py. Rows that are done are kept.

Throughout, x is data, ε or z noise, x_t = (1−t)·x + t·ε, v(x_t, t) ≈ ε − x, and a single step from
noise is G(z) = z − v(z, 1).
"""
import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import digits, plot, runs, vae  # noqa: E402

BATCH = 256         # samples per step where nothing else is said
GRID = 50           # points of the teacher's Euler grid, as in the report of drift_rae.py
CPU = dr.Config(device="cpu")


def column(t):
    """Times [B], shaped to multiply latents."""
    return t.view(-1, 1, 1, 1)


class Task:
    """A flow teacher, latents [n,D,h,w], labels [n], and a budget of evaluations.

    `spent` counts the evaluations.
    """

    def __init__(self, teacher, latents, labels, budget, lr, seed):
        self.teacher = teacher.requires_grad_(False).eval()
        self.latents, self.labels = latents, labels
        self.budget, self.spent = budget, 0
        self.lr, self.seed = lr, seed

    def student(self):
        return copy.deepcopy(self.teacher).requires_grad_(True)

    def draw(self, n):
        """-> real latents [n,D,h,w], their labels [n], noise shaped like the latents."""
        i = torch.randint(len(self.latents), (n,))
        return self.latents[i], self.labels[i], torch.randn_like(self.latents[i])

    def optimizer(self, net):
        return torch.optim.AdamW(net.parameters(), self.lr, (0.9, 0.95), weight_decay=0, fused=True)

    def fit(self, student, loss, cost, share=1.0):
        """Minimise loss() with a share of the budget -> the moving average of the student.

        A step costs `cost` evaluations.
        """
        steps = int(share * self.budget) // cost
        self.spent += steps * cost
        ema = copy.deepcopy(student).requires_grad_(False)
        optimizer = self.optimizer(student)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - 0.99 * step / steps)
            descend(student, optimizer, loss())
            warmth = min(1, step / dr.Config.ema_warmup)
            dr.update_average(ema, student, decay=0.5 * (dr.Config.ema / 0.5) ** warmth)
        return ema

    @torch.no_grad()
    def paths(self, model, steps, share):
        """Follow the model's ODE with a share of the budget.

        -> points [n,steps+1,D,h,w] of n paths, noise first; their times [steps+1]; labels [n].
        The last point, at t = 0.001, gets the time 0.
        """
        n = int(share * self.budget) // (GRID - 1)
        self.spent += n * (GRID - 1)
        _, labels, noise = self.draw(n)
        index = torch.linspace(0, GRID - 1, steps + 1).round().long()
        times = 1 - torch.linspace(0, 0.999, GRID)[index]
        times[-1] = 0
        points = []
        for z, y in zip(noise.split(BATCH), labels.split(BATCH)):
            path = vae.ode_path(model, z, y)                # [GRID,B,D,h,w]
            points.append(path[index].transpose(0, 1))      # [B,steps+1,D,h,w]
        return torch.cat(points), times, labels


def descend(net, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if not norm.isfinite():
        raise dr.UserError("the gradient is NaN or infinite: try a lower rate")     # as train_step
    optimizer.step()


# ---- Regression on the ends of trajectories (Luhman & Luhman 2101.02388), or on points between


def path_loss(model, points, times, y):
    """‖v(x_s, t_s) − (x_s − x_s+1)/(t_s − t_s+1)‖². With one step from z to x̂: ‖G(z) − x̂‖²."""
    now, after = points[:, :-1], points[:, 1:]              # [B,S,D,h,w]
    velocity = (now - after) / column(times[:-1] - times[1:])
    return (model(now, times[:-1], y) - velocity).square().mean()


class PathAttention(dr.Attention):
    """Attention over the tokens of S points of a path; a token does not see later points.

    x [B·S,N,D] holds the S = self.points points of each path one after another.
    """

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))        # [B·S,N,3,heads,d]
        qkv = qkv.unflatten(0, (-1, self.points))           # [B,S,N,3,heads,d]
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)             # [B,heads,S,N,d] each
        point = torch.arange(self.points).repeat_interleave(x.shape[1])
        seen = point.unsqueeze(1) >= point                  # [S·N,S·N]
        q = rope(q).flatten(2, 3)                           # [B,heads,S·N,d]
        k = rope(k).flatten(2, 3)
        v = v.flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, seen)             # [B,heads,S·N,d]
        out = out.unflatten(2, (self.points, -1)).permute(0, 2, 3, 1, 4)    # [B,S,N,heads,d]
        return self.proj(out.flatten(0, 1).flatten(2))


class Points(nn.Module):
    """A DiT^DH at S points of each path: x [B,S,D,h,w], times [S], y [B] -> velocities like x.

    With history, a point also sees the earlier points of its path, in the encoder of the DiT^DH.
    """

    def __init__(self, net, history=False):
        super().__init__()
        self.net = net
        self.lower = net.blocks[:net.depth[0]] if history else []
        for block in self.lower:
            attention = PathAttention(block.attn.qkv.in_features, block.attn.num_heads)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention

    def forward(self, x, times, y):
        for block in self.lower:
            block.attn.points = len(times)
        t = times.repeat(len(x))
        v = self.net(x.flatten(0, 1), t, y.repeat_interleave(len(times)))
        return v.unflatten(0, x.shape[:2])


def regress(task, student, paths, share):
    """Fit path_loss with a share of the budget; the paths are used again and again."""
    points, times, y = paths

    def loss():
        i = torch.randint(len(y), (BATCH // (len(times) - 1),))     # BATCH points in all
        return path_loss(student, points[i], times, y[i])

    return task.fit(student, loss, 3 * BATCH, share)


def few_steps(task, steps, history=False):
    """Step distillation: regression on the teacher's paths, which take half of the budget.

    With one step this is regression on pairs (z, x̂); with history it is ARD (2504.11295). Our ARD
    has no cache, so with four steps it computes 10 points per sample.
    """
    paths = task.paths(task.teacher, steps, 1 / 2)
    ema = regress(task, Points(task.student(), history), paths, 1 / 2)
    times = paths[1]

    def sampler(z, y):
        path = [z]
        for s in range(steps):
            first = 0 if history else s
            v = ema(torch.stack(path[first:], 1), times[first:s + 1], y)[:, -1]
            path.append(path[-1] + (times[s + 1] - times[s]) * v)
        return path[-1]

    return sampler


def reflow(task):
    """Rectified flow (2209.03003), InstaFlow (2309.06380), with a quarter of the budget per stage.

    Flow matching on the straight lines of the teacher's pairs (z, x̂) straightens the flow. Then
    regression on fresh pairs of the straightened network makes a single step of it.
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
    ema = regress(task, Points(student), task.paths(straight, 1, 1 / 4), 1 / 4)
    return partial(dr.one_step, ema.net)


# ---- Consistency, mean velocity (2303.01469; sCM 2503.09641; MeanFlow 2505.13447; MF-RAE)


def consistency_loss(student, teacher, x, y, noise):
    """u(x_t, t) becomes the mean velocity from t down to 0: u = v − t·du/dt on the teacher's path.

    A forward-mode product along (v, 1) gives du/dt. The squared error of a sample is divided by
    its own size.
    """
    t = torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * noise
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):     # other backends have no forward mode
        v = teacher(x_t, t, y)
        along = v, torch.ones_like(t)
        _, change = torch.func.jvp(lambda x, t: student(x, t, y), (x_t, t), along)
        target = v - column(t) * change
    error = (student(x_t, t, y) - target).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()


def consistency(task):
    """Per sample the teacher costs 1, the forward-mode product 2 and the student 3."""
    u = task.student()
    ema = task.fit(u, lambda: consistency_loss(u, task.teacher, *task.draw(BATCH)), 6 * BATCH)
    return partial(dr.one_step, ema)


# ---- Scores: a second network, "fake", learns the flow of the student's samples


def denoised(x, y, *networks):
    """The x̂ = x_t − t·v(x_t, t) of each network; t in [0.02, 0.98] is drawn once per sample."""
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * torch.randn_like(x)
    return [x_t - column(t) * v(x_t, t, y) for v in networks]


def dmd_loss(x, y, real, fake):
    """½‖x − sg[x − g]‖², g = (x̂_fake − x̂_real) / mean|x − x̂_real|; sg stops the gradient.

    This is DMD (2311.18828) without its regression, as in DMD2 (2405.14867), but also without the
    GAN loss of DMD2.
    """
    with torch.no_grad():
        x_real, x_fake = denoised(x, y, real, fake)
        size = (x - x_real).abs().mean((1, 2, 3), keepdim=True)
        target = x - (x_fake - x_real) / size
    return 0.5 * (x - target).square().mean()


def sid_loss(x, y, real, fake):
    """⟨x̂_real − x̂_fake, x̂_fake − x⟩ / sg[mean|x − x̂_real|]: SiD (2404.04057) at α = 1.

    The GAN loss of SiDA is left out. The gradient runs through both networks to their inputs.
    """
    x_real, x_fake = denoised(x, y, real, fake)
    size = (x - x_real).detach().abs().mean((1, 2, 3), keepdim=True)
    weight = 1 / size.clamp(min=1e-5)
    return (weight * (x_real - x_fake) * (x_fake - x)).mean()


def scores(task, loss, cost, updates):
    """Before each step of the student, which costs `cost` per sample, the fake network takes
    `updates` steps. Each of these costs 1 + 3 per sample.
    """
    n = BATCH // 2
    student, fake = task.student(), task.student()
    optimizer = task.optimizer(fake)

    def step():
        fake.requires_grad_(True)
        for _ in range(updates):
            _, y, z = task.draw(n)
            with torch.no_grad():
                x = dr.one_step(student, z, y)
            descend(fake, optimizer, dr.flow_matching_loss(fake, x, y))
        fake.requires_grad_(False)
        _, y, z = task.draw(n)
        return loss(dr.one_step(student, z, y), y, task.teacher, fake)

    return partial(dr.one_step, task.fit(student, step, n * (cost + updates * (1 + 3))))


# ---- Self-adversarial twins: TwinFlow (2512.05150), without its any-step term RCGM


class TwoTimeEmbedder(nn.Module):
    """The embedding of t plus an embedding of r, which is zero at first. No r means r = t."""

    def __init__(self, t_embedder):
        super().__init__()
        self.t_embedder = t_embedder
        self.r_embedder = copy.deepcopy(t_embedder)
        dr.zero(self.r_embedder.mlp[2])
        self.r = None

    def forward(self, t):
        r = t if self.r is None else torch.full_like(t, self.r)
        return self.t_embedder(t) + self.r_embedder(r)


class TwoTimes(nn.Module):
    """v(x, t, r), the mean velocity from time t to a number r; without r, the velocity at t.

    At a negative time −t it is the velocity of the flow of the student's own samples.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        net.t_embedder = TwoTimeEmbedder(net.t_embedder)

    def forward(self, x, t, y, r=None):
        self.net.t_embedder.r = r
        return self.net(x, t, y)


def twinflow_loss(net, x, y, z):
    """Three terms. The twin at −t learns the flow of sg[G(z)]: ‖v(x_t, −t, −t) − (ε − G)‖².

    The difference d of the twins, clamped to ±1, moves the student: ½‖v(z, 1, 0) − sg[v + d]‖².
    Flow matching on real latents keeps v(x, t, t).
    """
    t, noise = torch.rand(len(z)), torch.randn_like(z)
    v = net(z, torch.ones(len(z)), y, r=0)
    fake = (z - v).detach()
    x_t = (1 - column(t)) * fake + column(t) * noise
    twin = net(x_t, -t, y)
    with torch.no_grad():
        d = (net(x_t, t, y) - twin).clamp(-1, 1)            # v_real − v_fake
        target = v + d
    following = (twin - (noise - fake)).square().mean()
    rectification = 0.5 * (v - target).square().mean()
    return following + rectification + dr.flow_matching_loss(net, x, y)


def twinflow(task):
    net = TwoTimes(task.student())
    ema = task.fit(net, lambda: twinflow_loss(net, *task.draw(BATCH)), (3 + 3 + 1 + 3) * BATCH)
    return partial(dr.one_step, partial(ema, r=0))          # G(z) = z − v(z, 1, 0)


# ---- Drifting (Deng et al. 2602.04770; Drift-RAE 2606.15553; windows are our addition)


def drifting(task, loss_function=dr.variant_loss, **changes):
    """The distillation of drift_rae.py, with changes of its defaults."""
    cfg = dr.Config(device="cpu", lr=task.lr, seed=task.seed, **changes)
    cost = cfg.n_class * (3 * cfg.n_neg + cfg.n_extra_neg)
    cfg.steps = task.budget // cost
    task.spent += cfg.steps * cost
    student = runs.distilled(task.teacher, task.latents, task.labels, cfg, loss_function)
    return partial(dr.one_step, student)


def several_students(task):
    """Two students, as in MSD (2410.23274), with half of the classes and of the budget each.

    A sample needs one of them. The sampler evaluates both and keeps the right one.
    """
    half = task.teacher.num_classes // 2
    samplers = []
    for its in (task.labels < half, task.labels >= half):
        part = Task(task.teacher, task.latents[its], task.labels[its], task.budget // 2, task.lr,
                    task.seed)
        samplers.append(drifting(part, n_class=half))
        task.spent += part.spent

    def both(z, y):
        low, high = [sampler(z, y) for sampler in samplers]
        return torch.where(column(y < half), low, high)

    return both


# ---- The rows


def by_teacher(task, sampler):
    return partial(sampler, task.teacher)


METHODS = {         # name: function of a Task that returns a sampler (z, y) -> latents
    "teacher-1": partial(by_teacher, sampler=dr.one_step),
    "teacher-4": partial(by_teacher, sampler=partial(dr.ode_sample, steps=5)),
    "teacher-50": partial(by_teacher, sampler=partial(dr.ode_sample, steps=GRID)),
    "regression": partial(few_steps, steps=1),
    "reflow": reflow,
    "consistency": consistency,
    "dmd": partial(scores, loss=dmd_loss, cost=3 + 1 + 1, updates=5),   # 5 updates, as in DMD2
    "sid": partial(scores, loss=sid_loss, cost=3 + 2 + 2, updates=1),
    "twinflow": twinflow,
    "ard-4": partial(few_steps, steps=4, history=True),
    "step-4": partial(few_steps, steps=4),
    "msd-2": several_students,
    "drift-a": partial(drifting, n_pos=64, n_extra_neg=0, perturb=False, field="y-softmax"),
    "drift": drifting,
    "drift-windows": partial(drifting, windows=(1, 2)),
    "drift-gradient": partial(drifting, loss_function=runs.gradient_loss),
}
NFE = {"teacher-4": 4, "teacher-50": GRID - 1, "ard-4": 4, "step-4": 4}     # evaluations per sample
CANDIDATES = (3e-4, 1e-3, 3e-3)
RATES = {           # the best candidate with a quarter of the budget, in the RAE's space, seed 0
    "regression": 1e-3, "reflow": 1e-3, "dmd": 3e-3, "sid": 3e-4, "twinflow": 3e-4, "ard-4": 1e-3,
    "step-4": 3e-4, "drift-a": 3e-3, "drift": 3e-3, "drift-windows": 3e-3,
    "consistency": 3e-4,    # 1e-3 was better with a quarter, but diverges with the whole budget
    "msd-2": 3e-3, "drift-gradient": 3e-3}      # these two reuse the rate of drift
BUDGET = 384_000    # network evaluations, as many as 100 steps of drift_rae.py take
RESULTS = {"fd": 2, "precision": 3, "recall": 3, "label_accuracy": 3, "seconds": 0}     # decimals


def open_space(space, path, out):
    """-> flow teacher, latents, labels, the autoencoder that decodes the latents."""
    if space == "rae":
        teacher, rae, checkpoint = runs.open_teacher(path)
        return teacher, checkpoint["latents"].float(), checkpoint["labels"], rae
    teacher, space = vae.read_vae64(out / "vae64.pt")
    return teacher, space.latents, space.labels, space.rae


def distil_and_measure(job):
    """job: (the teacher's path, OUT, the row's key, what is known of the row) -> the whole row.

    A few samples per class go to the file OUT/rivals/key, for the picture.
    """
    path, out, key, row = job
    teacher, latents, labels, rae = open_space(row["space"], path, out)
    torch.manual_seed(row["seed"])
    task = Task(teacher, latents, labels, row["budget"], row["lr"], row["seed"])
    began = time.perf_counter()
    try:
        sampler = METHODS[row["method"]](task)
    except dr.UserError:                                    # the gradient became NaN or infinite
        return row | dict.fromkeys(RESULTS, torch.nan)
    row = row | {"evaluations": task.spent, "seconds": time.perf_counter() - began}
    measure = digits.Metrics(dr.load(path))
    images = dr.generate(sampler, rae, measure.labels, CPU)
    two = images.unflatten(0, (10, -1))[:, :2].clone()      # of each class: [10,2,28,28,3]
    dr.save(out / "rivals" / key, partial(torch.save, {"images": two}))
    return row | measure(images, measure.labels)


def jobs_of(args):
    """-> {key: what distil_and_measure takes} for the chosen methods."""
    jobs = {}
    budget = BUDGET // (10 if args.quick else 1) // (4 if args.rates else 1)
    for seed in range(args.seeds):
        for method in args.methods:
            if seed > 0 and method.startswith("teacher"):
                continue                                    # the teacher is not trained here
            for lr in CANDIDATES if args.rates else [RATES.get(method, dr.Config.lr)]:
                key = f"{args.space}-{method}-{seed}-{budget}-{lr}"
                row = dict(method=method, space=args.space, seed=seed, nfe=NFE.get(method, 1),
                           budget=budget, lr=lr)
                jobs[key] = args.teacher, args.out, key, row
    return jobs


def draw_strips(rows, out, path):
    """One strip per method, of seed 0. In every strip a place belongs to one class and one noise;
    the real digits have no noise."""
    images, _ = digits.load_digits()
    strips = {"real": images.unflatten(0, (10, -1))[:, :2]}
    for key, row in rows.items():
        if row["seed"] == 0 and row["fd"] > 0:              # not NaN
            saved = dr.load(out / "rivals" / key)
            strips[f"{row['method']}, {row['fd']:.2f}"] = saved["images"]
    tiles = {title: x.transpose(0, 1).flatten(0, 1) for title, x in strips.items()}
    runs.save_png(path, plot.panels(tiles, rows=2))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of all files (default: out)")
    add("--teacher", type=Path, default=dr.Config.teacher, help="default: toy/teacher.pt")
    add("--seeds", type=int, default=1, help="seeds of the distillation (default: 1)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--space", choices=("rae", "vae"), default="rae", help="the teacher's own, or a VAE's")
    add("--quick", action="store_true", help="a tenth of the budget")
    add("--rates", action="store_true", help="try three learning rates at a quarter of the budget")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise dr.UserError("--seeds must be at least 1")
    args.methods = args.methods or list(RATES if args.rates else METHODS)
    dr.make_folder(args.out / "rivals")
    runs.open_teacher(args.teacher)     # refuse a wrong file before the work starts
    name = "rivals"
    teacher = args.teacher
    if args.space == "vae":
        name = "rivals_vae"
        teacher = args.out / "vae64.pt"
        if not teacher.exists():
            vae.make_vae64(teacher)
    if args.rates:
        name += "_rates"
    jobs = jobs_of(args)
    rows = runs.complete(args.out / f"{name}.json", teacher, jobs, distil_and_measure)
    runs.print_means(rows.values(), ["method", "lr", "nfe"], RESULTS)
    draw_strips(rows, args.out, args.out / f"{name}.png")


if __name__ == "__main__":
    dr.run_as_script(main)
