"""toy/geometry.py: statistics against closed forms and naive loops, Theorem 1's limits, the script itself."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import toy.digits
import toy.geometry as gm


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint cut to 20 images of each class, hardly trained."""
    path = tmp_path_factory.mktemp("geometry") / "teacher.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.digits, "make_judge", partial(toy.digits.make_judge, 11))
        toy.digits.make_teacher(path, steps=(11, 11, 11))
    checkpoint = torch.load(path, weights_only=True)
    few = {k: checkpoint[k].unflatten(0, (10, 500))[:, :20].flatten(0, 1) for k in ("images", "labels")}
    torch.save(checkpoint | few, path)
    return path


def test_statistics_in_closed_form():
    for d, rho, centre in ((3, 1.0, 0.0), (7, 2.5, -4.0)):                  # the poles themselves
        eye = torch.eye(d, dtype=torch.float64) * rho
        found = gm.statistics(torch.cat([eye, -eye]).unsqueeze(0) + centre)
        expected = {"PR": 1, "SE": 1, "NN-d": rho * math.sqrt(2 / d), "S-MMD": 0}
        assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, abs=1e-6)
    g = torch.Generator().manual_seed(0)
    found = gm.statistics(torch.randn(1, 50, 1, generator=g).double() * torch.arange(1.0, 9.0) + 5)  # a line
    assert [found["PR"].item(), found["SE"].item()] == pytest.approx([1 / 8, 1 / 8], abs=1e-9)
    # n samples of an isotropic Gaussian look less isotropic than it is: PR -> 1/(1 + d/n)
    x = torch.randn(20, 174, 128, generator=g, dtype=torch.float64)
    assert gm.statistics(x)["PR"].mean().item() == pytest.approx(1 / (1 + 128 / 174), abs=0.01)


def naive(x):
    """Eq. (47)-(53) of one token's samples x [n,d], in loops."""
    n, d = x.shape
    mu = np.linalg.eigvalsh(np.cov(x.T))
    p = mu / mu.sum()
    nearest = [min(np.linalg.norm(x[a] - x[b]) for b in range(n) if b != a) for a in range(n)]
    x = x - x.mean(0)
    rho = np.mean([np.linalg.norm(a) for a in x])
    poles = [sign * rho * np.eye(d)[k] for sign in (1, -1) for k in range(d)]

    def kernel(a, b):
        return np.mean([math.exp(-np.linalg.norm(u - v) / d**0.5) for u in a for v in b])

    return (mu.sum()**2 / (d * (mu**2).sum()), math.exp(-(p * np.log(p)).sum()) / d,
            np.mean(nearest) / d**0.5, kernel(x, x) + kernel(poles, poles) - 2 * kernel(x, poles))


def test_statistics_against_naive_loops():
    g = torch.Generator().manual_seed(1)
    raw, labels = torch.randn(24, 5, 2, 3, generator=g), torch.arange(24) % 2
    raw[:, 0] *= 3
    views = (raw - raw.mean(0)) / raw.std(0), raw
    classes = [x[labels == c].double().numpy() for x in views for c in (0, 1)]
    rows = [[naive(x[:, :, i, j]) for i in range(2) for j in range(3)] for x in classes]
    expected = np.reshape(rows, (2, 12, 4)).mean(1).flatten()
    got = gm.token_statistics(raw, labels)
    assert list(got) == ["PR", "SE", "NN-d", "S-MMD", "PR raw", "SE raw", "NN-d raw", "S-MMD raw"]
    assert list(got.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_curvature_of_known_curves():
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    circle = torch.stack([3 * (2 * math.pi * t).cos(), 3 * (2 * math.pi * t).sin()], -1)
    line = torch.stack([t**2 + t, 2 * (t**2 + t)], -1)                      # at a changing speed
    kappa, angle = gm.curvature(torch.stack([circle, line], 1))
    assert kappa[:, 0].numpy() == pytest.approx(1 / 3, rel=1e-3)
    assert kappa[:, 1].numpy() == pytest.approx(0, abs=1e-6)
    assert angle.tolist() == [pytest.approx(2 * math.pi, rel=0.01), pytest.approx(0, abs=1e-6)]


def test_theorem1():
    # where τ is long against the spread of the distances, its limits
    row = gm.average([gm.theorem1(512, *gm.SETTINGS["r = 1, τ = 4"], seed=seed) for seed in range(4)])
    assert list(row.values()) == pytest.approx([1, 1, 1, 1], abs=0.1)
    shares = [gm.average([gm.theorem1(64, None, tau, True)])["share_pos"] for tau in (0.2, 0.05, 0.02)]
    assert shares[0] > 0.8 > 0.4 > shares[1] > 0.15 > shares[2]     # at the paper's τ it needs far more


def test_vae(teacher):
    mean, log_var = torch.randn(2, 5, 3, 2, 2)
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum()
    assert gm.divergence(mean, log_var).item() == pytest.approx(expected.item(), rel=1e-5)
    latents, labels, vae, flow = gm.vae64(torch.load(teacher, weights_only=True), steps=(11, 11))
    assert latents.mean(0).abs().max() < 1e-4 and (latents.var(0) - 1).abs().max() < 1e-4
    images = vae.decode(gm.one_step(flow, latents, labels))
    assert images.shape == (200, 3, 28, 28) and 0 <= images.min() and images.max() <= 1


def test_the_command_and_its_next_sitting(teacher, capsys, monkeypatch):
    """Tiny, but all of it, in its own processes."""
    monkeypatch.setattr(gm, "simulate", lambda largest, simulate=gm.simulate: simulate(16))
    flags = ["--out", str(teacher.parent), "--quick", "--steps", "11", "11", "1"]
    gm.main(flags)
    said = capsys.readouterr().out
    for words in ("Theorem 1", "paper: RAE", "posterior mean", "N(0, I), 64 wide", "RAE-64, distilled"):
        assert words in said
    file = teacher.with_name("geometry.json")
    result = json.loads(file.read_text())
    assert {run["space"] for run in result["runs"].values()} == {"RAE-64", "VAE-64"}
    for run in result["runs"].values():
        assert np.shape(run["band"]) == (3, 48)
        assert run["methods"]["untrained"]["spread"] > 1    # G(z) = z: noise of the variance of all classes
        run["path"]["κ"] = 12345.0
    assert all(Image.open(teacher.with_name(f"{name}.png")).height >= 400 for name in ("theorem1", "curvature"))
    file.write_text(json.dumps(result))
    gm.main(flags)      # nothing is done again
    assert capsys.readouterr().out.count("12345") == 2
    assert json.loads(file.read_text()) == result
