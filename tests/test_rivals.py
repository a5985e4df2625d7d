"""toy/rivals.py: each loss vanishes where theory says so, budgets are counted, the script goes on."""
import json
import shutil
import signal
from unittest.mock import Mock

import numpy as np
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
    _, y, z = data
    points, times = torch.stack([z, one_step(net, z, y).detach()], 1), torch.tensor([1.0, 0.0])
    model = rivals.Points(net)
    assert rivals.path_loss(model, points, times, y) < 1e-10
    points[:, 1] += 0.5                 # ‖G(z) − x̂‖²
    assert rivals.path_loss(model, points, times, y).item() == pytest.approx(0.25, rel=1e-4)


def test_a_path_in_four_steps(net, data):
    """A teacher of constant velocity 2 is met by itself; what follows its paths ends where they do."""
    def constant(x, t, y):
        return torch.full_like(x, 2.0)

    task = rivals.Task(net, *data[:2], 49 * 8, 1e-3, 0)
    points, times, y = task.paths(constant, 4, 1)
    assert points.shape == (8, 5, 6, 2, 2) and task.spent == 49 * 8
    assert times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=0.02)
    assert torch.allclose(points[:, -1], ode_sample(constant, points[:, 0], y), atol=1e-5)
    assert rivals.path_loss(constant, points, times, y) < 1e-3          # the last step is 0.001 shorter
    assert rivals.path_loss(lambda x, t, y: 0 * x, points, times, y).item() == pytest.approx(4, abs=0.1)
    nn.init.zeros_(net.final_layer["linear"].weight)
    nn.init.constant_(net.final_layer["linear"].bias, 2.0)
    for history in (False, True):       # 392 evaluations: four paths, no step of training
        sampler = rivals.few_steps(rivals.Task(net, *data[:2], 49 * 8, 1e-3, 0), 4, history)
        assert torch.allclose(sampler(data[2], data[1]), data[2] - 2, atol=1e-5)


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
    assert rivals.consistency_loss(straight, straight, x, y, noise) < 1e-3
    v = lambda x, t, y: 0 * x + 3 * rivals.column(t)**2  # noqa: E731
    u = lambda x, t, y: 0 * x + rivals.column(t)**2      # noqa: E731  ∫v from 0 to t, over t
    assert rivals.consistency_loss(u, v, x, y, noise) < 1e-3
    assert rivals.consistency_loss(v, v, x, y, noise) > 0.5
    assert gradient(rivals.consistency_loss(net, net, x, y, noise), net) > 0    # a product through DiT^DH


@pytest.mark.parametrize("loss", [rivals.dmd_loss, rivals.sid_loss])
def test_scores_agree(loss, net, data):
    """No gradient where both networks are one; where they differ x moves to the real one's x̂, here higher."""
    x, y, z = data
    student, other = (DiTDH(**SIZE).eval() for _ in range(2))
    assert gradient(loss(one_step(student, z, y), y, net, net), student) < 1e-6
    assert gradient(loss(one_step(student, z, y), y, net, other), student) > 1e-3
    x = x.requires_grad_()
    real, fake = lambda x, t, y: 0 * x, lambda x, t, y: 0 * x + 1       # x̂_real − x̂_fake = t
    g, = torch.autograd.grad(loss(x, y, real, fake), x)
    assert (g < 0).all()


def test_twins_agree(net, data):
    """No rectification where v(x, t, t) = v(x, −t, −t); the embedding of r is without effect at first."""
    x, y, z = data
    model = rivals.TwoTimes(net)
    t = torch.rand(8)
    assert torch.equal(model(x, t, y, 0 * t), net(x, t, y)) and torch.equal(model(x, t, y), net(x, t, y))
    nn.init.normal_(model.embed[2].weight)
    assert not torch.equal(model(x, t, y, 0 * t), model(x, t, y))

    class Twins(nn.Module):             # v(x, t, t) = power of t; v(z, 1, 0) a parameter of its own
        def __init__(self, power):
            super().__init__()
            self.power, self.jump = power, nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t, y, r=None):
            return 0 * x + (rivals.column(t)**self.power if r is None else self.jump)

    for power, sign in (2, 0), (1, -1):                                 # equal; d = 2t, so v(z, 1, 0) grows
        twins = Twins(power)
        rivals.twinflow_loss(twins, x, y, z).backward()
        assert twins.jump.grad.sign() == sign
    both = rivals.twinflow_loss(Twins(2), x, y, z).item()               # two regressions on ε − x remain
    assert 2 < both < 8


def test_two_students_share_the_classes(net, data):
    """Each is the teacher of its half, before a step."""
    x, _, z = data
    task = rivals.Task(net, x.repeat(5, 1, 1, 1), torch.arange(40) % 4, 10, 1e-3, 0)
    y = torch.arange(4).repeat(2)
    assert torch.allclose(rivals.several_students(task)(z, y), one_step(net, z, y), atol=1e-5)


def test_reflow_straightens_its_pairs(net, data):
    """On a flow that is straight already nothing changes but by the rate of training."""
    nn.init.zeros_(net.final_layer["linear"].weight)
    nn.init.constant_(net.final_layer["linear"].bias, 2.0)
    task = rivals.Task(net, *data[:2], 4 * 3 * rivals.BATCH, 1e-3, 0)
    assert (rivals.reflow(task)(data[2], data[1]) - (data[2] - 2)).abs().max() < 0.1


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


def test_a_run_that_diverges_is_a_row_of_nan(teacher, monkeypatch):
    """As it really happens, at an absurd rate; and the process can be terminated afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    known = dict(method="drift", space="rae", seed=0, nfe=1, budget=4 * 3840, lr=1e9)
    row = rivals.work((teacher.parent, known))
    assert all(np.isnan(row[name]) for name in rivals.RESULTS)
    assert signal.getsignal(signal.SIGTERM) is before
    rivals.show([row])
    monkeypatch.setitem(rivals.METHODS, "drift", Mock(side_effect=ValueError("no latents")))
    with pytest.raises(ValueError, match="no latents"):
        rivals.work((teacher.parent, known))


def test_the_command_and_its_next_sitting(teacher, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rivals with space ü"
    out.mkdir()
    shutil.copy(teacher, out / "teacher.pt")
    monkeypatch.setattr(rivals, "BUDGET", 80_000)
    rivals.main(["--out", str(out), "--quick"])
    rows = json.loads((out / "rivals.json").read_text())
    assert {row["method"] for row in rows} == set(rivals.METHODS)
    keys = "method space seed nfe fd precision recall label_accuracy evaluations seconds".split()
    assert all(set(keys) <= set(row) and row["space"] == "rae" and row["evaluations"] <= 8000 for row in rows)
    assert [row["nfe"] for row in rows if row["method"] in ("teacher-4", "step-4", "drift")] == [4, 4, 1]
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
    rates = json.loads((out / "rivals_rates.json").read_text())
    assert sorted(row["lr"] for row in rates) == list(rivals.CANDIDATES)     # as they are finished
    monkeypatch.setattr(rivals, "vae64", lambda ours: geometry.vae64(ours, steps=(11, 11)))
    rivals.main(["--out", str(out), "--quick", "--space", "vae", "--methods", "teacher-1", "drift"])
    assert (out / "rivals_vae.png").exists() and (out / "vae64.pt").exists()
    rows = json.loads((out / "rivals.json").read_text())
    assert [row["space"] for row in rows] == ["rae"] * 15 + ["vae"] * 2
