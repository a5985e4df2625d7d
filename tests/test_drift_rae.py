"""The method against naive float64 loops, closed forms, the official implementations' numbers."""
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parameters_to_vector

import drift_rae as dr
from toy.digits import train_flow
from toy.runs import gradient_field

TAUS = (0.05, 0.1, 0.2)
FIELDS = list(dr.FIELDS.values())
IMAGENET = dr.Config(**dr.PRESETS["imagenet256"], device="cpu")


def golden(name):
    path = Path(__file__).parent / "golden" / f"{name}.pt"
    return torch.load(path, weights_only=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shapes):
    g = seeded(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def problem(seed, C, N, P, E, D):
    """Of C tokens: N samples, P positives, E extra negatives, and noise for the samples."""
    return normal(seed, (C, N, D), (C, P, D), (C, E, D), (C, N, D))


def error(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a, b):
    return error(a, b) / b.abs().max().item()


def flat(model):
    return parameters_to_vector(model.parameters()).detach()


def tiny(classes=2, hidden=(16, 24), depth=(1, 1), heads=(2, 2), **dropout):
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, hidden, depth, heads, classes, **dropout)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


# ---- The method in naive loops

def naive_shift(query, targets, tau):
    """A sum of Eq. (11), term by term: query [D], targets [n,D]; tau in latent units."""
    kernel = [torch.exp(-(y - query).norm() / tau) for y in targets]
    total = sum(kernel)
    return sum(k / total * (y - query) for k, y in zip(kernel, targets))


def naive_field(query, pos, neg, tau):
    """Eq. (11), query [C,N,D] perturbed or not."""
    V = torch.zeros_like(query)
    for c in range(len(query)):
        for j, x in enumerate(query[c]):
            others = torch.cat([neg[c, :j], neg[c, j + 1:]])         # k ≠ j
            V[c, j] = naive_shift(x, pos[c], tau) - naive_shift(x, others, tau)
    return V


def naive_loss(gen, pos, extra, temperatures, noise):
    """Eq. (10), Deng et al.'s units (paper.md §6) -> loss [C], S, the raw drifts, Ṽ [C,N,D]."""
    neg = torch.cat([gen, extra], 1)
    distances = []
    for c in range(len(gen)):
        targets = torch.cat([neg[c], pos[c]])
        distances += [(x - y).norm() for x in gen[c] for y in targets]
    S = torch.stack(distances).mean()
    drift = torch.zeros_like(gen)
    raw = []
    for tau in temperatures:
        V = naive_field(gen + tau * S * noise, pos, neg, tau * S)
        mean_square = V.square().sum(-1).mean()
        raw.append(mean_square.sqrt().item() / S.item())
        drift += V / V.square().mean().sqrt()
    loss = drift.square().mean((1, 2))
    return loss, S.item(), raw, drift


def naive_tokens(x, window):
    """tokens(), cut by hand."""
    found = []
    for i in range(0, x.shape[2], window):
        for j in range(0, x.shape[3], window):
            square = x[:, :, i:i + window, j:j + window]
            found.append(square.reshape(len(x), -1))
    return torch.stack(found)


def noise_stream(cfg, step, c):
    """Of class c at a step: the released numbers hang on this seed."""
    rng = np.random.default_rng([cfg.seed, step, c + 1, 0])
    return seeded(int(rng.integers(2**63)))


def naive_samples(model, c, step, cfg):
    """G(z) for the z of the step, and the generator that then draws the perturbation."""
    g = noise_stream(cfg, step, c)
    n = cfg.n_neg + cfg.n_extra_neg
    z = torch.randn(n, 3, 2, 2, generator=g).to(flat(model).dtype)
    samples = z - model(z, torch.ones(n), torch.full((n,), c))
    return samples, g


def naive_class(model, c, pos, step, cfg):
    """The loss of class c, with gradient, and what is to be logged of it; model in float64."""
    samples, g = naive_samples(model, c, step, cfg)
    total = 0
    for window in cfg.windows:
        gen = naive_tokens(samples[:cfg.n_neg], window)
        extra = naive_tokens(samples[cfg.n_neg:], window).detach()
        real = naive_tokens(pos.double(), window)
        x = gen.detach()
        noise = dr.laplace_noise(x.float(), g).double()
        _, S, raw, drift = naive_loss(x, real, extra, cfg.temperatures, noise)
        unit = S / x.shape[-1] ** 0.5
        target = x / unit + drift
        total = total + (gen / unit - target).square().mean()
    return total, [S, *raw, total.item()]


# ---- Eq. (11), Prop. 1

SIZES = pytest.mark.parametrize("sizes", [
    (1, 2, 3, 0, 1), (2, 5, 4, 3, 7), (3, 4, 9, 6, 16), (1, 28, 27, 3, 5)])      # C, N, P, E, D


@SIZES
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("noisy", [False, True])
def test_field_is_eq_11(sizes, dtype, tolerance, noisy):
    x, pos, extra, noise = problem(0, *sizes)
    neg = torch.cat([x, extra], 1)
    noise = 0.3 * noise if noisy else torch.zeros_like(x)
    expected = naive_field(x + noise, pos, neg, 0.34)
    x, pos, neg, noise = [tensor.to(dtype) for tensor in (x, pos, neg, noise)]
    V = dr.drift_field(x, pos, neg, 0.2, 1.7, noise=noise if noisy else None)
    assert V.dtype == dtype
    assert error(V, expected) < tolerance


@pytest.mark.parametrize("field", FIELDS)
def test_no_noise_is_noise_of_zero(field):
    x, pos, extra, noise = problem(0, 2, 5, 4, 3, 7)
    neg = torch.cat([x, extra], 1)
    V = field(x, pos, neg, 0.2, 1.7)
    assert torch.equal(V, field(x, pos, neg, 0.2, 1.7, noise=0 * noise))
    assert not torch.equal(V, field(x, pos, neg, 0.2, 1.7, noise=noise))


def log_density(x, targets, tau):
    """That of the kernel exp(−distance/τ) around targets [n,D], but for a constant."""
    distance = (targets - x).norm(dim=1)
    return torch.logsumexp(-distance / tau, 0)


def log_ratio_gradient(query, pos, neg, tau):
    """∇ log q̂/p̂ at each query [N,D], by autograd; k ≠ j."""
    query = query.clone().requires_grad_()
    log_ratio = 0
    for j, x in enumerate(query):
        others = torch.cat([neg[:j], neg[j + 1:]])
        log_ratio += log_density(x, pos, tau) - log_density(x, others, tau)
    return torch.autograd.grad(log_ratio, query)[0]


def field_weights(x, pos, neg, noise, tau):
    """−w⁻ and w⁺ [N,M+P], read off the field: each target gets one more coordinate, where it has
    a millionth and all others 0; noise puts the queries at 0 there."""
    n_neg = len(neg)
    n_targets = n_neg + len(pos)
    tick = 1e-6 * torch.eye(n_targets, dtype=x.dtype)
    targets = torch.cat([neg, pos])
    targets = torch.cat([targets, tick], 1).unsqueeze(0)
    noise = torch.cat([noise, -tick[:len(x)]], 1).unsqueeze(0)
    wide_x = targets[:, :len(x)]
    V = dr.drift_field(wide_x, targets[:, n_neg:], targets[:, :n_neg], tau, 1.0, noise=noise)
    return V[0, :, -n_targets:] / 1e-6


def test_weights_are_the_gradient_of_the_log_density_ratio():
    """Prop. 1 for l = 1: ∇ log q̂/p̂ = Σ w·(target − query)/‖target − query‖ / τ."""
    x, pos, extra, noise = [tensor[0] for tensor in problem(3, 1, 5, 8, 4, 6)]
    neg = torch.cat([x, extra])
    query = x + 0.3 * noise
    w = field_weights(x, pos, neg, 0.3 * noise, 0.7)         # [5,17]
    away = torch.cat([neg, pos]) - query.unsqueeze(1)        # [5,17,6]
    direction = away / away.norm(dim=-1, keepdim=True)
    expected = (w.unsqueeze(-1) * direction).sum(1) / 0.7
    assert error(log_ratio_gradient(query, pos, neg, 0.7), expected) < 1e-8
    one = torch.ones(5, dtype=torch.float64)
    assert error(w[:, :9].sum(1), -one) < 1e-8
    assert error(w[:, 9:].sum(1), one) < 1e-8


def test_gradient_field_is_the_gradient_of_the_log_density_ratio():
    """Times S·τ."""
    x, pos, extra, noise = problem(0, 1, 5, 7, 3, 6)
    neg = torch.cat([x, extra], 1)
    tau = 0.5 * 1.7
    V = gradient_field(x, pos, neg, 0.5, 1.7, noise=noise)
    gradient = log_ratio_gradient(x[0] + noise[0], pos[0], neg[0], tau)
    assert error(V[0], 1.7 * tau * gradient) < 1e-9


def test_gradient_field_is_finite_where_a_query_lies_on_a_target():
    x = torch.zeros(1, 3, 4)
    V = gradient_field(x, x, x, 0.05, 1.0)
    assert torch.equal(V, torch.zeros(1, 3, 4))


@pytest.mark.parametrize("shift,low,high", [(0.0, 0, 4), (0.3, 10, 1000)])
def test_field_vanishes_in_the_mean_only_when_the_distributions_agree(shift, low, high):
    x, pos = normal(0, (1000, 16, 2), (1000, 15, 2))
    V = dr.drift_field(x, pos + shift, x, 0.2, 2.0).mean(1)
    standard_error = V.std(0).max() / 1000**0.5
    assert low <= V.mean(0).abs().max() / standard_error < high


@pytest.mark.parametrize("field", FIELDS)
def test_field_is_equivariant(field):
    x, pos, extra, noise = problem(0, 3, 6, 7, 4, 5)
    def moved(x, pos, extra, noise):
        neg = torch.cat([x, extra], 1)
        return field(x, pos, neg, 0.1, 3.0, noise=noise)
    V = moved(x, pos, extra, noise)
    assert error(moved(x + 2, pos + 2, extra + 2, noise), V) < 1e-9
    rotation, _ = torch.linalg.qr(normal(1, (5, 5))[0])
    turned = [tensor @ rotation for tensor in (x, pos, extra, noise)]
    assert error(moved(*turned), V @ rotation) < 1e-9
    order = [3, 0, 5, 1, 4, 2]
    permuted = moved(x[:, order], pos, extra, noise[:, order])
    assert error(permuted, V[:, order]) < 1e-9
    assert error(moved(x, pos.flip(1), extra.flip(1), noise), V) < 1e-9


# ---- Eq. (10), (12)

@SIZES
@pytest.mark.parametrize("perturb", [False, True])
def test_loss_is_eq_10(sizes, perturb):
    C, N, P, E, D = sizes
    gen, pos, extra, _ = problem(7 * N, *sizes)
    noise = perturb * dr.laplace_noise(gen, seeded(5))
    expected, S, raw, drift = naive_loss(gen, pos, extra, TAUS, noise)
    gen.requires_grad_()
    how = {"perturb": perturb, "generator": seeded(5)}
    loss, info = dr.drift_loss(gen, pos, extra if E else None, TAUS, **how)
    loss.sum().backward()
    assert relative(loss, expected) < 1e-6
    assert info.pop("scale").item() == pytest.approx(S, rel=1e-9)
    assert list(info) == [f"drift_{tau}" for tau in TAUS]
    assert [rms.item() for rms in info.values()] == pytest.approx(raw, rel=1e-6)
    # descent moves G along Ṽ
    assert relative(gen.grad, -2 * drift * D**0.5 / S / (N * D)) < 1e-6


@pytest.mark.parametrize("case", ["plain", "with_neg", "close"])
def test_loss_is_the_released_baseline(case):
    g = golden("drift_loss")
    official = g | g.get(case, {})
    gen = official["gen"].requires_grad_()
    how = {"perturb": False, "field": dr.y_softmax_field}
    loss, info = dr.drift_loss(gen, g["pos"], official.get("neg"), g["R_list"], **how)
    loss.sum().backward()
    assert relative(loss, official["loss"]) < 1e-4
    assert relative(gen.grad, official["grad"]) < 1e-4
    assert info["scale"].item() == pytest.approx(official["info"]["scale"], rel=1e-4)
    for tau in g["R_list"]:                                  # they log the mean square
        expected = official["info"][f"loss_{tau}"]
        assert info[f"drift_{tau:g}"].item() ** 2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("field", FIELDS)
def test_negatives_and_positives_get_no_gradient_but_count(field):
    gen, pos, extra, _ = problem(1, 2, 4, 5, 6, 3)
    for tensor in (gen, pos, extra):
        tensor.requires_grad_()
    def loss(pos, extra):
        return dr.drift_loss(gen, pos, extra, field=field, generator=seeded(0))[0]
    first = loss(pos, extra)
    first.sum().backward()
    assert gen.grad.abs().sum() > 0
    assert pos.grad is None
    assert extra.grad is None
    assert not torch.equal(loss(pos + 1, extra), first)
    assert not torch.equal(loss(pos, extra + 1), first)


def test_perturbation_is_laplace_in_norm_and_uniform_in_direction():
    n = dr.laplace_noise(torch.zeros(2, 4000, 3), seeded(0)).flatten(0, 1)
    norm = n.norm(dim=1, keepdim=True)
    # |Laplace(0, 1)| is Exp(1)
    assert stats.kstest(norm.flatten().numpy(), "expon").pvalue > 1e-3
    for axis in (n / norm).T.numpy():                        # uniform, for points of a sphere
        assert stats.kstest(axis, "uniform", (-1, 2)).pvalue > 1e-3


@pytest.mark.parametrize("field", FIELDS)
def test_loss_stays_in_float32_under_autocast(field):
    """Of 30 samples: from 26 on cdist is a matrix product, which autocast would do in bf16."""
    *latents, _ = problem(2, 2, 30, 30, 5, 16)
    latents = [tensor.float() for tensor in latents]
    def loss_and_gradient(gen, pos, extra):
        gen = gen.clone().requires_grad_()
        loss, info = dr.drift_loss(gen, pos, extra, field=field, generator=seeded(0))
        loss.sum().backward()
        return loss.detach(), gen.grad, *info.values()
    plain = loss_and_gradient(*latents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_and_gradient(*latents)
    assert len(plain) == len(mixed) == 6
    for a, b in zip(plain, mixed):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_tokens_are_windows(window):
    x = torch.arange(2 * 3 * 36.0).view(2, 3, 6, 6)
    assert torch.equal(dr.tokens(x, window), naive_tokens(x, window))


def test_a_token_is_one_place_of_the_latents_and_windows_must_fit():
    x = torch.arange(2 * 3 * 36.0).view(2, 3, 6, 6)
    assert dr.tokens(x).shape == (36, 2, 3)
    assert torch.equal(dr.tokens(x)[7], x[:, :, 1, 1])
    with pytest.raises(ValueError, match="windows of 4 do not divide"):
        dr.tokens(x, 4)


# ---- A training step, §4

STEP = 2
CFG = dr.Config(device="cpu", seed=4, steps=10, n_class=2, n_pos=4, n_neg=3, n_extra_neg=2,
                windows=(1, 2), temperatures=(0.05, 0.2), ema=0.9, ema_warmup=4)


class NotingOptimizer(torch.optim.SGD):
    """Notes the gradient; its step adds 1 to each weight."""
    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        self.gradient = parameters_to_vector(p.grad for p in params)
        for p in params:
            p.add_(1)


@pytest.fixture
def student():
    return tiny()


@pytest.fixture
def ema(student):
    return deepcopy(student).requires_grad_(False)


@pytest.fixture
def optimizer(student):
    return NotingOptimizer(student.parameters())


@pytest.fixture
def batch():
    real, = normal(1, (2, 4, 3, 2, 2))
    real = real.float()
    return [(1, real[0]), (0, real[1])]


@pytest.mark.parametrize("clip", [1.0, 0.3, 1e6])
def test_a_step_clips_the_gradient_of_naive_loops(student, ema, optimizer, batch, clip):
    """Two classes, two windows, in float64."""
    exact = deepcopy(student).double()
    for c, pos in batch:
        loss, _ = naive_class(exact, c, pos, STEP, CFG)
        (loss / 2).backward()                                # of two classes
    expected = parameters_to_vector(p.grad for p in exact.parameters())
    cfg = replace(CFG, clip=clip)
    norm = dr.train_step(student, ema, optimizer, batch, STEP, cfg)["grad_norm"]
    assert norm > 1.1
    assert norm.item() == pytest.approx(expected.norm().item(), rel=1e-4)
    share = min(1, clip / norm.item())
    assert relative(optimizer.gradient, share * expected) < 1e-4
    assert all(p.grad is None for p in student.parameters())


def test_a_step_logs_means_over_its_classes_of_the_last_window(student, ema, optimizer, batch):
    exact = deepcopy(student).double()
    rows = [naive_class(exact, c, pos, STEP, CFG)[1] for c, pos in batch]
    log = dr.train_step(student, ema, optimizer, batch, STEP, CFG)
    log.pop("grad_norm")
    assert list(log) == ["scale", "drift_0.05", "drift_0.2", "loss"]
    means = [value.item() for value in log.values()]
    assert means == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-4)


def test_the_average_follows_the_weights_after_they_moved(student, ema, optimizer, batch):
    before = flat(student)
    dr.train_step(student, ema, optimizer, batch, STEP, CFG)
    decay = 0.5 * (0.9 / 0.5) ** (STEP / 4)
    expected = decay * before + (1 - decay) * (before + 1)
    assert error(flat(ema), expected) < 1e-6


def test_extra_negatives_are_generated_without_gradient(student, ema, optimizer, batch):
    calls = []
    def note(model, inputs):
        calls.append((len(inputs[0]), torch.is_grad_enabled()))
    student.register_forward_pre_hook(note)
    dr.train_step(student, ema, optimizer, batch, STEP, CFG)
    assert calls == [(3, True), (2, False)] * 2              # modification 3, of two classes


def test_a_gradient_of_nan_stops_the_run_before_a_weight_moves(student, ema, optimizer):
    before = flat(student)
    bad = torch.full((4, 3, 2, 2), torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite gradient at step 2"):
        dr.train_step(student, ema, optimizer, [(0, bad)], STEP, CFG)
    assert torch.equal(flat(student), before)
    assert torch.equal(flat(ema), before)


@pytest.mark.parametrize("field", dr.FIELDS)
@pytest.mark.parametrize("perturb", [False, True])
def test_the_configuration_chooses_field_and_perturbation(student, batch, field, perturb):
    c, pos = batch[0]
    cfg = replace(CFG, field=field, perturb=perturb, windows=(1,))
    samples, g = naive_samples(student, c, STEP, cfg)
    latents = [dr.tokens(x) for x in (samples[:3], pos, samples[3:])]
    how = {"field": dr.FIELDS[field], "perturb": perturb, "generator": g}
    expected, _ = dr.drift_loss(*latents, CFG.temperatures, **how)
    loss, _ = dr.class_loss(student, c, pos, STEP, cfg)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("step,lr,decay", [
    (0, 3e-5, 0.5), (500, 2.8515e-5, math.sqrt(0.5 * 0.9995)),
    (1000, 2.703e-5, 0.9995), (9999, 3.0297e-7, 0.9995)])
def test_schedules_are_table_8(student, ema, optimizer, step, lr, decay):
    for p in [*student.parameters(), *ema.parameters()]:
        nn.init.zeros_(p)
    cfg = replace(IMAGENET, dtype="fp32", n_class=1, n_neg=4, n_extra_neg=0)
    pos = torch.ones(4, 3, 2, 2)
    dr.train_step(student, ema, optimizer, [(0, pos)], step, cfg)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-6)
    # the weights went from 0 to 1
    assert flat(ema).numpy() == pytest.approx(1 - decay, rel=1e-5)


def test_learning_rate_falls_to_the_share_that_the_configuration_names(
        student, ema, optimizer, batch):
    cfg = replace(CFG, lr=0.1, lr_final=0.4)                 # STEP is 2 of 10
    dr.train_step(student, ema, optimizer, batch, STEP, cfg)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 - 0.2 * (0.1 - 0.04))


def test_imagenet_preset_is_table_8():
    c = IMAGENET
    assert (c.n_class, c.n_pos, c.n_neg, c.n_extra_neg) == (32, 256, 64, 192)
    assert (c.temperatures, c.windows) == ((0.02, 0.05, 0.2), (1,))
    assert (c.field, c.perturb) == ("softmax", True)
    assert (c.steps, c.lr, c.lr_final) == (10_000, 3e-5, 0.01)
    assert (c.betas, c.weight_decay, c.clip) == ((0.9, 0.95), 0, 1)
    assert (c.ema, c.ema_warmup) == (0.9995, 1000)
    assert (c.flip, c.dtype) == (True, "bf16")


# ---- Distillation

def real_data(cfg):
    latents, = normal(0, (12, 3, 2, 2))
    return dr.Positives(latents.float(), np.arange(12) % 3, cfg)


def drawn(first, cfg):
    """The batches from a step on, as (step, class, numbers)."""
    found = []
    for step, batch in dr.batches(real_data(cfg), first, cfg):
        found += [(step, c, pos.tolist()) for c, pos in batch]
    return found


def test_adamw_gets_what_the_configuration_says(student, tmp_path):
    cfg = replace(CFG, betas=(0.7, 0.8), weight_decay=0.3, lr=0.02)
    cfg = replace(cfg, steps=1, out=str(tmp_path))
    dr.distil(student, real_data(cfg), cfg)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    group, = state["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.7, 0.8), 0.3, 0.02)


def test_positives_are_of_the_class_and_repeat_only_where_there_are_too_few():
    for n_pos in (4, 9):
        data = real_data(replace(CFG, n_pos=n_pos))
        c, pos = data[5, 2]
        rng = np.random.default_rng([4, 5, 3, 1])            # seed, step, class + 1, purpose
        chosen = rng.choice([2, 5, 8, 11], n_pos, replace=n_pos > 4)
        assert c == 2
        assert torch.equal(pos, data.source[chosen])


def test_draws_depend_on_seed_step_and_class_alone(monkeypatch):
    unbroken = drawn(0, CFG)
    classes = [c for _, c, _ in unbroken]
    for step in range(10):
        rng = np.random.default_rng([4, step, 0, 1])
        assert classes[2 * step:2 * step + 2] == rng.choice(3, 2, replace=False).tolist()
    assert drawn(7, CFG) == unbroken[14:]                    # as in a resumed run
    assert drawn(0, replace(CFG, seed=5)) != unbroken
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert drawn(0, CFG) == unbroken[rank::2]


CFG_OF_TWO_POINTS = dr.Config(
    device="cpu", n_class=2, n_pos=16, n_neg=16, n_extra_neg=16, steps=25, lr=5e-3, ema=0.8,
    ema_warmup=10)


class TwoPoints:
    """Class 0 lies around a point, class 1 around its opposite; noise z to start from."""
    def __init__(self):
        shape = (128, 3, 2, 2)
        centre, noise, z = normal(0, shape[1:], shape, shape)
        self.labels = torch.arange(2).repeat_interleave(64)
        sign = (1 - 2 * self.labels).view(-1, 1, 1, 1)
        self.centres = (sign * centre).float()
        self.latents = self.centres + 0.1 * noise.float()
        self.z = z.float()

    def distance(self, samples):
        """From the point of the label, as a share of its norm, in the mean."""
        away = (samples - self.centres).flatten(1).norm(dim=1)
        return (away.mean() / self.centres[0].norm()).item()

    def train(self, model, steps, **how):
        return train_flow(model, self.latents, self.labels, steps, **how)


@pytest.fixture(scope="module")
def two_points():
    return TwoPoints()


@pytest.fixture(scope="module")
def teacher_of_two_points(two_points):
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, (32, 32), (1, 1), (2, 2), 2)
    return two_points.train(model, 200, batch=32, lr=2e-2, decay=0.9)


@torch.no_grad()
def test_teacher_learns_two_points(two_points, teacher_of_two_points):
    teacher = teacher_of_two_points
    assert not teacher.training
    samples = dr.ode_sample(teacher, two_points.z, two_points.labels, 20)
    assert two_points.distance(samples) < 0.5
    torch.manual_seed(1)
    loss = dr.flow_matching_loss(teacher, two_points.latents, two_points.labels)
    assert loss < 0.5                                        # at first 2.2


def test_student_is_nearer_in_one_step_than_its_teacher(
        two_points, teacher_of_two_points, tmp_path):
    cfg = replace(CFG_OF_TWO_POINTS, out=str(tmp_path))
    data = dr.Positives(two_points.latents, two_points.labels.numpy(), cfg)
    copy = deepcopy(teacher_of_two_points).requires_grad_().train()
    student = dr.distil(copy, data, cfg)
    assert not student.training
    assert not any(p.requires_grad for p in student.parameters())
    distances = []
    for model in (student, teacher_of_two_points):
        with torch.no_grad():
            samples = dr.one_step(model, two_points.z, two_points.labels)
        distances.append(two_points.distance(samples))
    assert distances[0] < 0.8 * distances[1]


def test_training_of_the_flow_repeats_with_its_seed(two_points):
    def weights(seed):
        return flat(two_points.train(tiny(), 3, seed=seed))
    first = weights(0)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_of_the_flow_is_taken_after_the_step(two_points, decay):
    model = tiny()
    average = two_points.train(model, 3, decay=decay)
    assert torch.equal(flat(average), flat(model)) == (decay == 0)


# ---- Flow, Eq. (1)-(4), (8)

def test_flow_matching_loss_of_the_exact_velocity_is_zero():
    """y_t = (1−t)·y + t·ε, so towards a point mass at y it is (y_t − y)/t."""
    latents = torch.randn(64, 3, 2, 2, generator=seeded(0))
    def exact(x, t, y):
        return (x - latents) / t.view(-1, 1, 1, 1)
    torch.manual_seed(1)
    assert dr.flow_matching_loss(exact, latents, None) < 1e-6


def test_flow_matching_loss_of_no_velocity_is_the_second_moment_of_noise_minus_data():
    latents = torch.randn(64, 3, 2, 2, generator=seeded(0))
    def still(x, t, y):
        return torch.zeros_like(x)
    torch.manual_seed(1)
    loss = dr.flow_matching_loss(still, latents, None).item()
    assert loss == pytest.approx(1 + latents.square().mean().item(), rel=0.1)


def test_times_of_flow_matching_are_logit_normal_but_for_the_shift():
    times = []
    def note(x, t, y):
        times.append(t)
        return x
    torch.manual_seed(2)
    dr.flow_matching_loss(note, torch.zeros(20000, 1, 1, 1), None, shift=3.0)
    u = times[0] / (3 - 2 * times[0])                        # the shift undone
    assert u.logit().mean().item() == pytest.approx(0, abs=0.03)
    assert u.logit().std().item() == pytest.approx(1, abs=0.03)


def test_one_step_is_eq_8():
    z = torch.randn(3, 2, 2, 2)
    calls = []
    def velocity(x, t, y):
        calls.append((x, t, y))
        return 0.25 * x
    assert torch.equal(dr.one_step(velocity, z, "label"), 0.75 * z)
    (x, t, y), = calls
    assert x is z
    assert torch.equal(t, torch.ones(3))
    assert y == "label"


@torch.no_grad()
def test_sampler_matches_the_official_one():
    g = golden("ode")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    def draw(steps, *guidance):
        return dr.ode_sample(model, g["z"], g["y"], steps, g["shift"], *guidance)
    assert error(draw(10), g["samples_10"]) < 1e-4
    assert error(draw(50), g["samples_50"]) < 1e-4
    guided = draw(10, g["cfg_scale"], g["cfg_interval"])
    assert error(guided, g["samples_10_cfg"]) < 1e-4


@torch.no_grad()
def test_guidance_acts_inside_its_interval_only():
    g = golden("ditdh")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    times = {"class": [], "no class": []}
    def note(model, inputs):
        _, t, y = inputs
        times["no class" if y[0] == 7 else "class"].append(t[0].item())
    model.register_forward_pre_hook(note)
    guidance = {"cfg_scale": 2.0, "cfg_interval": (0.3, 0.7)}
    dr.ode_sample(model, g["x"][:1], g["y"][:1], 6, **guidance)
    inside = [t for t in times["class"] if 0.3 <= t <= 0.7]
    assert 0 < len(inside) < len(times["class"]) == 5
    assert times["no class"] == inside


# ---- DiT^DH

@torch.no_grad()
def test_ditdh_matches_the_official_one():
    g = golden("ditdh")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    assert error(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-4


def test_fresh_position_embeddings_are_the_official_ones():
    g = golden("ditdh")
    sizes = ["input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"]
    fresh = dr.DiTDH(*[g["config"][name] for name in sizes]).state_dict()
    for rope in ("enc_feat_rope", "dec_feat_rope"):
        for name in (f"{rope}.freqs_cos", f"{rope}.freqs_sin"):
            assert error(fresh[name], g["state_dict"][name]) < 1e-6
    assert error(fresh["pos_embed"], g["state_dict"]["pos_embed"]) < 1e-6


@torch.no_grad()
def test_fresh_ditdh_outputs_zero_and_its_blocks_are_the_identity():
    """adaLN-Zero; all other layers start as PyTorch has them, none of them at zero."""
    model = dr.DiTDH(2, 3, (16, 24), (2, 1), (2, 2), 5)
    x = torch.randn(4, 3, 2, 2)
    velocity = model(x, torch.rand(4), torch.arange(4))
    assert torch.equal(velocity, torch.zeros_like(x))
    ropes = [model.enc_feat_rope, model.enc_feat_rope, model.dec_feat_rope]
    for block, rope, width in zip(model.blocks, ropes, (16, 16, 24), strict=True):
        features, condition = torch.randn(2, 4, 4, width)
        assert torch.equal(block(features, condition, rope), features)
    for name, p in model.named_parameters():
        starts_at_zero = "adaLN_modulation" in name or "final_layer.linear" in name
        assert (p.count_nonzero() == 0) == starts_at_zero, name


@torch.no_grad()
@pytest.mark.parametrize("hidden,depth,heads", [
    ((32, 64), (3, 1), (4, 2)), ((64, 32), (1, 4), (2, 4)),
    ((48, 48), (3, 2), (4, 4)), ((24, 40), (2, 2), (2, 5))])
def test_sizes_are_read_off_the_tensors(hidden, depth, heads):
    model = tiny(11, hidden, depth, heads)
    again = dr.DiTDH.from_state_dict(model.state_dict()).eval()
    assert (again.depth, again.num_classes) == (depth, 11)
    assert (again.input_size, again.in_channels) == (2, 3)
    x, t = torch.randn(2, 3, 2, 2), torch.rand(2)
    y = torch.tensor([3, 11])
    assert torch.equal(again(x, t, y), model(x, t, y))


@torch.no_grad()
def test_labels_are_dropped_in_training_only():
    model = tiny(4, class_dropout_prob=1.0)
    x, t = torch.randn(2, 3, 2, 2), torch.rand(2)
    y = torch.tensor([0, 1])
    dropped = model.train()(x, t, y)
    kept = model.eval()(x, t, y)
    no_class = model(x, t, torch.tensor([4, 4]))
    assert torch.equal(dropped, no_class)
    assert error(kept, no_class) > 1e-4


def test_share_of_dropped_labels_is_the_probability():
    torch.manual_seed(0)
    embedder = dr.LabelEmbedder(4, 8, 0.3)
    no_class = embedder.embedding_table.weight[4]
    dropped = (embedder(torch.arange(4000) % 4) == no_class).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)     # 5 standard errors


def test_guide_extrapolates_the_classes_of_a_copy():
    model = tiny(4)
    table = model.y_embedder.embedding_table.weight
    before = table.detach().clone()
    after = dr.guide(model, 0.3).y_embedder.embedding_table.weight
    expected = 1.3 * before[:4] - 0.3 * before[4]
    assert error(after[:4], expected) < 1e-6
    assert torch.equal(after[4], before[4])
    assert torch.equal(table, before)
    assert torch.equal(flat(dr.guide(model, 0.0)), flat(model))


# ---- RAE

def official_rae(g, **how):
    encoder = dr.ViT(98, 14, 32, 3, 4)
    encoder.load_state_dict(g["encoder_state_dict_native"])
    decoder = dr.Decoder.from_official(g["decoder_state_dict"], num_heads=4)
    mean, var = g["stats"]["mean"], g["stats"]["var"]
    return dr.RAE(encoder, decoder, mean, var, g["config"]["encoder_input_size"], **how)


@torch.no_grad()
def test_encoder_matches_dinov2():
    g = golden("dinov2_reg_native")
    sizes = ["img_size", "patch_size", "embed_dim", "depth", "num_heads"]
    vit = dr.ViT(*[g["config"][name] for name in sizes])
    vit.load_state_dict(g["state_dict"])
    assert error(vit(g["pixel_values"]), g["tokens"]) < 1e-4     # 98 pixels -> 56: interpolated
    assert error(vit(g["pixel_values_full"]), g["tokens_full"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("grid", [2, 7, 37])
def test_interpolating_positions_to_their_own_grid_is_exactly_the_identity(grid):
    vit = dr.ViT(3 * grid, 3, embed_dim=8, depth=0, num_heads=1)
    images = torch.randn(2, 3, 3 * grid, 3 * grid)
    patches = vit.patch_embed(images).flatten(2).mT
    found = vit.features(images)
    assert torch.equal(found[:, 5:], patches + vit.pos_embed[:, 1:])
    assert torch.equal(found[1, :1], vit.cls_token[0] + vit.pos_embed[0, :1])
    assert torch.equal(found[1, 1:5], vit.register_tokens[0])


@torch.no_grad()
def test_decoder_matches_the_official_one():
    g = golden("decoder")
    decoder = dr.Decoder.from_official(g["state_dict"], num_heads=4)
    assert error(decoder(g["latents"]), g["image"]) < 1e-4
    fresh = dr.Decoder(32, 48, 3, 4, 96, 4, 4)
    assert error(fresh.pos_embed, decoder.pos_embed) < 1e-6


@pytest.mark.parametrize("size", ["", "_noresize"])
def test_encoding_matches_the_official_one(size):
    g = golden("rae")
    expected = g["latent" + size]
    wrong = official_rae(g).encode(g["image" + size]) - expected
    wrong_of_channel = wrong.abs().amax((0, 2, 3))
    assert (wrong_of_channel / expected.abs().amax((0, 2, 3))).max() < 1e-3


def test_decoding_matches_the_official_one():
    g = golden("rae")
    rae = official_rae(g)
    assert error(rae.decode(g["latent"]), g["reconstruction"]) < 1e-4
    assert error(rae.decode(g["latent_random"]), g["decoded_random"]) < 1e-4


def test_autoencoder_is_frozen_and_in_eval_mode():
    rae = official_rae(golden("rae"))
    assert not any(p.requires_grad for p in rae.parameters())
    assert not any(part.training for part in rae.modules())


def test_sigmoid_takes_a_pixel_for_a_logit():
    g = golden("rae")
    images = official_rae(g, sigmoid=True).decode(g["latent"])
    logit = 6 * (g["reconstruction"] - 0.5)
    assert error(images, 1 / (1 + torch.exp(-logit))) < 1e-4
