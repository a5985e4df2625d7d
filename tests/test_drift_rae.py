"""The method against naive float64 loops, closed forms and the official implementations' numbers."""
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import drift_rae as dr

GOLDEN = Path(__file__).parent / "golden"
IMAGENET = dr.Config(**dr.PRESETS["imagenet256"])


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------------------------------- the field


def naive_field(x, centre, pos, neg, tau, self_mask=True):
    """Eq. (11), term by term. x [N,D] queries (perturbed or not); tau in latent units; one token."""
    V = torch.zeros_like(x)
    for j in range(len(x)):
        for sign, targets in ((1, pos), (-1, neg)):
            members = [k for k in range(len(targets)) if sign > 0 or k != j or not self_mask]
            w = torch.stack([torch.exp(-(targets[k] - x[j]).norm() / tau) for k in members])
            for weight, k in zip(w / w.sum(), members):
                V[j] += sign * weight * (targets[k] - x[j])
    return V


def naive_loss(gen, pos, extra, temperatures, noise, drift_norm):
    """Eq. (10) in Deng et al.'s units (paper.md §6); noise [C,N,D] of unit scale or None -> loss [C], scale, RMS."""
    C, N, D = gen.shape
    negs = torch.cat([gen, extra], 1)
    every = [(gen[c, j] - t).norm() for c in range(C) for j in range(N) for t in torch.cat([negs[c], pos[c]])]
    S = torch.stack(every).mean()
    total, rms = torch.zeros_like(gen), []
    for tau in temperatures:
        x = gen if noise is None else gen + tau * S * noise
        V = torch.stack([naive_field(x[c], gen[c], pos[c], negs[c], tau * S) for c in range(C)])
        rms.append((V.square().sum(-1).mean().sqrt() / S).item())
        V = V * D**0.5 / S
        total += V / (V.square().mean() if drift_norm == "batch" else V.square().mean(-1, keepdim=True)).sqrt()
    return total.square().mean((1, 2)), S, rms, total


SIZES = [(1, 2, 3, 0, 1), (2, 5, 4, 3, 7), (3, 4, 9, 6, 16), (9, 3, 2, 1, 5)]  # C, N, P, E, D


@pytest.mark.parametrize("C,N,P,E,D", SIZES)
@pytest.mark.parametrize("noisy,self_mask", [(False, True), (True, True), (True, False)])
def test_field_is_eq_11(C, N, P, E, D, noisy, self_mask):
    g = rng(C + N)
    x, pos, extra = (torch.randn(C, n, D, generator=g, dtype=torch.float64) for n in (N, P, E))
    noise = 0.3 * torch.randn(C, N, D, generator=g, dtype=torch.float64) if noisy else None
    neg = torch.cat([x, extra], 1)
    V = dr.drift_field(x, pos, neg, 0.2, 1.7, noise=noise, self_mask=self_mask)
    query = x + noise if noisy else x
    expected = torch.stack([naive_field(query[c], x[c], pos[c], neg[c], 0.34, self_mask) for c in range(C)])
    assert (V - expected).abs().max() < (1e-9 if self_mask else 2e-4)  # a distance of 0 is clipped at 1e-4


@pytest.mark.parametrize("C,N,P,E,D", SIZES)
@pytest.mark.parametrize("perturb,drift_norm", [(False, "batch"), (True, "batch"), (True, "sample")])
def test_loss_is_eq_10(C, N, P, E, D, perturb, drift_norm):
    g, taus = rng(7 * N), (0.05, 0.2)
    gen, pos, extra = (torch.randn(C, n, D, generator=g, dtype=torch.float64) for n in (N, P, E))
    noise = (dr.perturb(gen, torch.ones(1, 1, 1), rng(5))[:, 0] - gen) if perturb else None
    expected, S, rms, total = naive_loss(gen, pos, extra, taus, noise, drift_norm)
    gen.requires_grad_()
    loss, info = dr.drift_loss(gen, pos, extra, taus, perturb=perturb, drift_norm=drift_norm, generator=rng(5))
    loss.sum().backward()
    assert relative(loss, expected) < 1e-4 and abs(info["scale"] / S - 1) < 1e-4
    assert [info[f"drift_{t}"].item() for t in taus] == pytest.approx(rms, rel=1e-4)
    assert relative(gen.grad, -2 * total * D**0.5 / S / (N * D)) < 1e-4  # descent moves G along Ṽ


@pytest.mark.parametrize("case", ["plain", "with_neg", "close"])
def test_loss_is_the_released_baseline(case):
    g = golden("drift_loss")
    ref = g if case == "plain" else g[case]
    gen = (ref if case == "close" else g)["gen"].clone().requires_grad_()
    loss, info = dr.drift_loss(gen, g["pos"], ref.get("neg"), g["R_list"], perturb=False, y_softmax=True)
    loss.sum().backward()
    assert relative(loss, ref["loss"]) < 1e-4 and relative(gen.grad, ref["grad"]) < 1e-4
    assert info["scale"].item() == pytest.approx(ref["info"]["scale"], rel=1e-4)
    for tau in g["R_list"]:  # the released code logs the mean square of the force
        assert info[f"drift_{tau:g}"].item() ** 2 == pytest.approx(ref["info"][f"loss_{tau}"], rel=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_weights_are_the_gradient_of_the_log_density_ratio(power):
    """Prop. 1: ∇ log q̂/p̂ = (l/τ)·V_l for the kernel exp(−‖x‖^l/τ), by autograd."""
    g, tau = rng(3), 0.7
    x, pos, neg = (torch.randn(1, n, 6, generator=g, dtype=torch.float64) for n in (5, 8, 9))
    x.requires_grad_()
    log_q, log_p = (torch.logsumexp(-torch.cdist(x, y) ** power / tau, -1) for y in (pos, neg))
    (grad,) = torch.autograd.grad((log_q - log_p).sum(), x)
    x, targets = x.detach(), torch.cat([neg, pos], 1)
    dist = dr.distances(x, targets)
    w = dr.signed_weights(-(dist**power) / tau, 9, self_mask=False)
    away = targets.unsqueeze(1) - x.unsqueeze(2)                            # [1,N,K,D]
    V = (w.unsqueeze(-1) * away * dist.unsqueeze(-1) ** (power - 2)).sum(2)
    assert torch.allclose(grad, power / tau * V, atol=1e-9)


def test_field_vanishes_in_the_mean_when_the_distributions_agree():
    def mean_field(shift):
        V = []
        for seed in range(200):
            g = rng(seed)
            x, pos = torch.randn(4, 16, 2, generator=g), torch.randn(4, 15, 2, generator=g) + shift
            V.append(dr.drift_field(x, pos, x, 0.2, 2.0).mean((0, 1)))
        V = torch.stack(V)
        return V.mean(0).abs().max(), V.std(0).max() / 200**0.5
    mean, error = mean_field(0.0)
    assert mean < 4 * error
    mean, error = mean_field(0.3)
    assert mean > 10 * error


def test_field_is_equivariant():
    g = rng(0)
    x, pos, extra, noise = (torch.randn(3, n, 5, generator=g, dtype=torch.float64) for n in (6, 7, 4, 6))
    field = lambda x, pos, extra, noise: dr.drift_field(x, pos, torch.cat([x, extra], 1), 0.1, 3.0, noise=noise)
    V = field(x, pos, extra, noise)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    assert torch.allclose(field(x + 2, pos + 2, extra + 2, noise), V, atol=1e-9)
    assert torch.allclose(field(x @ Q, pos @ Q, extra @ Q, noise @ Q), V @ Q, atol=1e-9)
    order = torch.randperm(6, generator=g)
    assert torch.allclose(field(x[:, order], pos.flip(1), extra.flip(1), noise[:, order]), V[:, order], atol=1e-9)


def test_negatives_and_positives_get_no_gradient():
    g = rng(1)
    gen, pos, extra = (torch.randn(2, n, 3, generator=g, requires_grad=True) for n in (4, 5, 6))
    loss, _ = dr.drift_loss(gen, pos, extra, generator=rng(0))
    loss.sum().backward()
    assert extra.grad is None and pos.grad is None and gen.grad.abs().sum() > 0
    other, _ = dr.drift_loss(gen, pos, extra + 1, generator=rng(0))
    assert not torch.equal(loss, other)  # and yet they count


def test_perturbation_is_laplace_in_norm_and_uniform_in_direction():
    x = torch.zeros(2, 4000, 3)
    n = dr.perturb(x, torch.tensor([1.0, 0.5]).view(2, 1, 1), rng(0))       # [2,T,4000,3]
    assert torch.equal(n[:, 1], 0.5 * n[:, 0])
    n = n[:, 0].flatten(0, 1)
    assert stats.kstest(n.norm(dim=1).numpy(), "expon").pvalue > 1e-3       # |Laplace(0,1)| is Exp(1)
    for axis in (n / n.norm(dim=1, keepdim=True)).T.numpy():               # on S², each coordinate is uniform
        assert stats.kstest(axis, "uniform", (-1, 2)).pvalue > 1e-3


def test_loss_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="pos"):
        dr.drift_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="two generated"):
        dr.drift_loss(torch.zeros(2, 1, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="begin with the rows of x"):
        dr.drift_field(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), 0.1, 1.0)
    with pytest.raises(ValueError, match="drift_norm"):
        dr.drift_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), drift_norm="no")


def test_field_stays_in_float32_under_autocast():
    g = rng(2)
    gen, pos = torch.randn(2, 8, 16, generator=g), torch.randn(2, 8, 16, generator=g)
    plain, _ = dr.drift_loss(gen, pos, perturb=False)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = dr.drift_loss(gen, pos, perturb=False)
        field = dr.drift_field(gen.bfloat16(), pos, gen.bfloat16(), 0.1, 5.0)
    assert torch.equal(plain, cast)
    assert torch.equal(field, dr.drift_field(gen.bfloat16().float(), pos, gen.bfloat16().float(), 0.1, 5.0))


# ------------------------------------------------------------------------------------- networks and sampler


def test_ditdh_matches_the_official_one():
    g = golden("ditdh")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    with torch.no_grad():
        assert (model(g["x"], g["t"], g["y"]) - g["out"]).abs().max() < 1e-4
    c, sd = g["config"], g["state_dict"]
    fresh = dr.DiTDH(*(c[k] for k in ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")))
    for key in ("pos_embed", "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"):
        assert torch.allclose(fresh.state_dict()[key], sd[key], atol=1e-6)


def test_sampler_matches_the_official_one():
    g = golden("ode")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    for steps in (10, 50):
        out = dr.ode_sample(model, g["z"], g["y"], steps, g["shift"])
        assert (out - g[f"samples_{steps}"]).abs().max() < 1e-4
    out = dr.ode_sample(model, g["z"], g["y"], 10, g["shift"], g["cfg_scale"], g["cfg_interval"])
    assert (out - g["samples_10_cfg"]).abs().max() < 1e-4


def test_guidance_acts_inside_its_interval_only():
    g = golden("ditdh")
    model, n = dr.DiTDH.from_state_dict(g["state_dict"]).eval(), len(g["x_cfg"]) // 2
    lo, hi = g["cfg_interval_2"]
    for i, t in enumerate(g["t_cfg"][:n].tolist()):     # one Euler step away from t, by hand
        x, y = g["x_cfg"][i:i + 1], g["y_cfg"][i:i + 1]
        with torch.no_grad():
            v, null = (model(x, torch.tensor([t]), c) for c in (y, torch.tensor([7])))
        guided = null + g["cfg_scale"] * (v - null) if lo <= t <= hi else v
        assert torch.allclose(guided, g["out_cfg_interval_2"][i:i + 1], atol=1e-4)
    z, y, seen = g["x"][:1], g["y"][:1], []
    model.register_forward_pre_hook(lambda m, args: seen.append((args[1].item(), args[2].item())))
    dr.ode_sample(model, z, y, 6, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    assert [t for t, c in seen if c == 7] == [t for t, c in seen if c != 7 and 0.3 <= t <= 0.7] != []


def test_encoder_matches_the_official_one():
    g = golden("dinov2_reg_native")
    vit = dr.ViT(*(g["config"][k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")))
    vit.load_state_dict(g["state_dict"])
    with torch.no_grad():
        assert (vit(g["pixel_values"]) - g["tokens"]).abs().max() < 1e-4            # 98 -> 56: interpolated
        assert (vit(g["pixel_values_full"]) - g["tokens_full"]).abs().max() < 1e-4


def test_decoder_and_rae_match_the_official_ones():
    g = golden("decoder")
    decoder = dr.Decoder.from_official(g["state_dict"], num_heads=4)
    with torch.no_grad():
        assert (decoder(g["latents"]) - g["image"]).abs().max() < 1e-4
    assert torch.allclose(dr.Decoder(32, 48, 3, 4, 96, 4, 4).pos_embed, decoder.pos_embed, atol=1e-6)
    g = golden("rae")
    encoder = dr.ViT(98, 14, 32, 3, 4)
    encoder.load_state_dict(g["encoder_state_dict_native"])
    decoder = dr.Decoder.from_official(g["decoder_state_dict"], 4)
    rae = dr.RAE(encoder, decoder, g["stats"]["mean"], g["stats"]["var"], g["config"]["encoder_input_size"])
    for image, latent in (("image", "latent"), ("image_noresize", "latent_noresize")):
        z = rae.encode(g[image])
        assert ((z - g[latent]).abs().amax((0, 2, 3)) / g[latent].abs().amax((0, 2, 3))).max() < 1e-3
    assert (rae.decode(g["latent"]) - g["reconstruction"]).abs().max() < 1e-4
    assert (rae.decode(g["latent_random"]) - g["decoded_random"]).abs().max() < 1e-4
    assert not any(p.requires_grad for p in rae.parameters())


@pytest.mark.parametrize("hidden,depth,heads,ratio", [((32, 64), (3, 1), (4, 2), 4.0), ((64, 32), (1, 4), (2, 4), 8 / 3),
                                                      ((48, 48), (3, 2), (4, 4), 2.5), ((24, 40), (2, 2), (2, 5), 3.3)])
def test_sizes_are_read_off_the_tensors(hidden, depth, heads, ratio):
    torch.manual_seed(0)
    model = dr.DiTDH(3, 5, hidden, depth, heads, 11, ratio).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(2, 5, 3, 3), torch.rand(2), torch.tensor([3, 11])
    again = dr.DiTDH.from_state_dict(model.state_dict()).eval()
    assert again.depth == depth and again.num_classes == 11
    assert torch.equal(model(x, t, y), again(x, t, y))


def test_labels_are_dropped_in_training_only():
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, (16, 24), (1, 1), (2, 2), 4, class_dropout_prob=1.0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t, y, null = torch.randn(2, 3, 2, 2), torch.rand(2), torch.tensor([0, 1]), torch.tensor([4, 4])
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, null))
    assert not torch.allclose(model(x, t, y), model(x, t, null))


# ------------------------------------------------------------------------------ flow, student and schedules


def test_flow_matching_loss_is_eq_4():
    """With y_t = (1−t)·y + t·ε the exact velocity of a point mass at y is (y_t − y)/t: no loss is left."""
    latents = torch.randn(64, 3, 2, 2, generator=rng(0))
    exact = lambda x, t, y: (x - latents) / t.view(-1, 1, 1, 1)
    assert dr.flow_matching_loss(exact, latents, None, generator=rng(1)) < 1e-6
    zero = dr.flow_matching_loss(lambda x, t, y: torch.zeros_like(x), latents, None, generator=rng(1))
    assert zero.item() == pytest.approx(1 + latents.square().mean().item(), rel=0.1)
    times = []
    dr.flow_matching_loss(lambda x, t, y: times.append(t) or x, torch.zeros(20000, 1, 1, 1), None, 3.0, rng(2))
    u = torch.linspace(0, 1, 20001)[:-1]
    assert abs(times[0].mean() - (3 * u / (1 + 2 * u)).mean()) < 0.01


def test_one_step_is_eq_8():
    seen = {}
    def velocity(z, t, y):
        seen["t"] = t
        return 0.25 * z
    z = torch.randn(3, 2, 2, 2)
    assert torch.allclose(dr.one_step(velocity, z, torch.zeros(3)), 0.75 * z) and torch.equal(seen["t"], torch.ones(3))


@pytest.mark.parametrize("step,lr,ema", [
    (0, 3e-5, 0.5), (500, 2.8515e-5, math.sqrt(0.5 * 0.9995)), (1000, 2.703e-5, 0.9995), (9999, 3.0297e-7, 0.9995)])
def test_schedules_are_table_8(step, lr, ema):
    assert dr.learning_rate(step, IMAGENET) == pytest.approx(lr, rel=1e-6)
    assert dr.ema_decay(step, IMAGENET) == pytest.approx(ema, rel=1e-9)
    assert dr.ema_decay(2000, dataclasses.replace(IMAGENET, ema_warmup=1)) == 0.9995


def test_imagenet_preset_is_table_8():
    c = IMAGENET
    assert (c.n_class, c.n_pos, c.n_neg, c.n_extra_neg, c.steps) == (32, 256, 64, 192, 10_000)
    assert c.temperatures == (0.02, 0.05, 0.2) and c.grad_clip == 1.0 and c.perturb and not c.y_softmax
    assert c.shift == pytest.approx(math.sqrt(16 * 16 * 768 / 4096))


def test_center_crop_is_square_and_keeps_the_middle():
    from PIL import Image
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 50:] = 255
    out = np.asarray(dr.center_crop(Image.fromarray(wide), 8))
    assert out.shape == (8, 8, 3) and out[:, :3].max() == 0 and out[:, 5:].min() == 255
    assert dr.center_crop(Image.new("RGB", (5, 9)), 8).size == (8, 8)
