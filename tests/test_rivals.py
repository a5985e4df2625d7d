"""toy/rivals.py: each loss vanishes where theory says so, budgets are counted, the script goes on."""
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from drift_rae import DiTDH, Config, encode, load_pair, ode_sample, one_step
from toy import geometry, rivals

SIZE = dict(input_size=2, in_channels=6, hidden_size=(16, 24), depth=(2, 1), num_heads=(2, 2), num_classes=4)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = DiTDH(**SIZE).eval()
    for p in model.parameters():        # nothing of adaLN-Zero's zeros
        nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def data(net):
    return torch.randn(8, 6, 2, 2), torch.arange(8) % 4, torch.randn(8, 6, 2, 2)    # x, y, noise


def gradient(loss, net):
    return sum(g.abs().sum().item() for g in torch.autograd.grad(loss, net.parameters(), allow_unused=True)
               if g is not None)


def test_regression_is_zero_at_its_pairs(net, data):
    """… and with four steps, on a path of its own."""
    _, y, z = data
    points, times = torch.stack([z, one_step(net, z, y).detach()], 1), torch.tensor([1.0, 0.0])
    model = rivals.Points(net)
    assert rivals.path_loss(model, points, times, y) < 1e-12 < rivals.path_loss(model, points + points**2, times, y)
    pairs = (one_step(net, z, y) - points[:, 1] - 1).square().mean()    # ‖G(z) − x̂‖², x̂ one off
    assert rivals.path_loss(model, points + torch.tensor([0, 1.0]).view(2, 1, 1, 1), times, y).item() == (
        pytest.approx(pairs.item(), rel=1e-4))
    task = rivals.Task(net, data[0], y, 49 * 8, 1e-3, 0)
    points, times, y = task.paths(net, 4, 1)
    assert points.shape == (8, 5, 6, 2, 2) and task.spent == 49 * 8 and times[0] == 1 and times[-1] == 0
    assert times[1:4].tolist() == pytest.approx([0.75, 0.5, 0.25], abs=0.02)
    assert torch.allclose(points[:, -1], ode_sample(net, points[:, 0], y), atol=1e-5)


def test_history_is_causal(net, data):
    """A point sees the earlier ones, not the later; alone it is the network itself."""
    x, times, y = torch.randn(8, 3, 6, 2, 2), torch.tensor([1.0, 0.6, 0.3]), data[1]
    before = net(x[:, 0], times[:1].expand(8), y)
    model = rivals.Points(net, history=True)
    v, later, earlier = model(x, times, y), x.clone(), x.clone()
    assert torch.allclose(v[:, 0], before, atol=1e-5)
    later[:, 2] += 1
    earlier[:, 0] += 1
    assert torch.allclose(model(later, times, y)[:, :2], v[:, :2], atol=1e-5)
    assert (model(earlier, times, y)[:, 2] - v[:, 2]).abs().max() > 1e-3
    assert torch.allclose(model(x[:, :2], times[:2], y), v[:, :2], atol=1e-5)


def test_consistency_is_zero_on_straight_paths(net, data):
    """v = (x_t − x*)/t leads from everywhere straight to x*: the mean velocity is the velocity."""
    x, y, noise = data
    straight = lambda x, t, y: (x - 0.7) / rivals.column(t)  # noqa: E731
    torch.manual_seed(0)                # t is not tiny
    assert rivals.consistency_loss(straight, straight, x, y, noise) < 1e-3
    bent = lambda x, t, y: (x - 0.7) * rivals.column(t)  # noqa: E731
    assert rivals.consistency_loss(bent, bent, x, y, noise) > 0.5
    assert gradient(rivals.consistency_loss(net, net, x, y, noise), net) > 0    # a product through DiT^DH


def test_scores_agree(net, data):
    """No gradient where both networks are one; and DMD's moves x as −g, SiD's as its formula."""
    x, y, z = data
    student, other = (DiTDH(**SIZE).eval() for _ in range(2))
    for loss in rivals.dmd_loss, rivals.sid_loss:
        assert gradient(loss(one_step(student, z, y), y, net, net), student) < 1e-6
        assert gradient(loss(one_step(student, z, y), y, net, other), student) > 1e-3
    x = x.requires_grad_()
    real, fake = lambda x, t, y: 0 * x, lambda x, t, y: 0 * x + 1     # x̂_fake − x̂_real = −t
    torch.manual_seed(1)
    g, = torch.autograd.grad(rivals.dmd_loss(x, y, real, fake), x)
    assert (g < 0).all()                # to where the real network's x̂ lies, higher


def test_twins_agree(net, data):
    """No rectification where v(x, t, t) = v(x, −t, −t); the embedding of r is without effect at first."""
    x, y, z = data
    model = rivals.TwoTimes(net)
    t = torch.rand(8)
    assert torch.equal(model(x, t, y, 0 * t), net(x, t, y)) and torch.equal(model(x, t, y), net(x, t, y))
    nn.init.normal_(model.embed[2].weight)
    assert not torch.equal(model(x, t, y, 0 * t), model(x, t, y))

    class Even(nn.Module):              # x_t → v: of t², and at t = 1, r = 0 a parameter of its own
        def __init__(self):
            super().__init__()
            self.jump = nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t, y, r=None):
            return x * rivals.column(t)**2 + (0 if r is None else self.jump)

    even = Even()
    assert gradient(rivals.twinflow_loss(even, x, y, z), even) == 0
    even.forward = lambda x, t, y, r=None: x * rivals.column(t) + (0 if r is None else even.jump)
    assert gradient(rivals.twinflow_loss(even, x, y, z), even) > 0


def cost_of(method, task, monkeypatch):
    """Evaluations of a run, counted at the networks' doors."""
    spent = [0]
    forward = DiTDH.forward

    def count(self, x, t, y):
        v = forward(self, x, t, y)
        learned = next(self.parameters()).requires_grad
        spent[0] += len(x) * (1 + v.requires_grad * (1 + learned))
        return v

    jvp = torch.func.jvp
    monkeypatch.setattr(DiTDH, "forward", count)
    monkeypatch.setattr(torch.func, "jvp", lambda f, x, v: (spent.append(len(x[0])), jvp(f, x, v))[1])
    rivals.METHODS[method](task)
    return sum(spent)                   # a product counts 1 at the door


@pytest.mark.parametrize("method", [name for name in rivals.METHODS if "teacher" not in name])
def test_budget(method, teacher, monkeypatch):
    """What a method says that it spent is what its networks did, and nearly all of the budget."""
    net, rae, ours = load_pair(teacher, Config(device="cpu"))
    latents = encode(rae, ours["images"], Config(device="cpu"))
    torch.manual_seed(0)
    task = rivals.Task(net, latents, ours["labels"], 16_000, 1e-3, 0)
    assert cost_of(method, task, monkeypatch) == task.spent
    assert 0.7 * task.budget < task.spent <= task.budget


def test_the_command_and_its_next_sitting(teacher, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rivals with space ü"
    out.mkdir()
    shutil.copy(teacher, out / "teacher.pt")
    monkeypatch.setattr(rivals, "BUDGET", 80_000)
    rivals.main(["--out", str(out), "--quick"])
    rows = json.loads((out / "rivals.json").read_text())
    assert {row["method"] for row in rows} == set(rivals.METHODS)
    keys = {"method", "space", "seed", "nfe", "fd", "precision", "recall", "label_accuracy", "evaluations", "seconds"}
    assert all(keys <= set(row) and row["space"] == "rae" and row["fd"] > 0 for row in rows)
    assert {row["method"]: row["nfe"] for row in rows if row["nfe"] > 1} == rivals.NFE
    rows[0]["fd"] = 12345.0             # would be lost, were it computed again
    (out / "rivals.json").write_text(json.dumps(rows))
    picture = Image.open(out / "rivals.png").size
    capsys.readouterr()
    rivals.main(["--out", str(out), "--quick"])
    printed = capsys.readouterr().out
    assert "12,345.00" in printed and Image.open(out / "rivals.png").size == picture
    order = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:]
    assert order == list(rivals.METHODS)
    rivals.main(["--out", str(out), "--rates", "--methods", "regression"])
    assert [row["lr"] for row in json.loads((out / "rivals_rates.json").read_text())] == list(rivals.CANDIDATES)
    monkeypatch.setattr(rivals, "vae64", lambda ours: geometry.vae64(ours, steps=(11, 11)))
    rivals.main(["--out", str(out), "--quick", "--space", "vae", "--methods", "teacher-1", "drift"])
    assert (out / "rivals_vae.png").exists() and (out / "vae64.pt").exists()
    assert [row["space"] for row in json.loads((out / "rivals.json").read_text())] == ["rae"] * 15 + ["vae"] * 2
