"""toy/rivals.py: losses vanish where theory says so, budgets are counted, the script continues."""
import json
import math
from functools import partial
from unittest.mock import Mock

import helpers
import pytest
import torch
from PIL import Image
from torch import nn

from drift_rae import DiTDH, ode_sample, one_step
from toy import rivals, runs, vae


@pytest.fixture
def net():
    return helpers.tiny_network(2, 6, (2, 1), classes=4, std=0.2)


@pytest.fixture
def data(net):
    """Real latents, labels, noise."""
    x = torch.randn(8, 6, 2, 2)
    return x, torch.arange(8) % 4, torch.randn(8, 6, 2, 2)


def constant(x, t, y):
    return torch.full_like(x, 2.0)


def nothing(x, t, y):
    return 0 * x


def make_constant(net):
    nn.init.zeros_(net.final_layer.linear.weight)
    nn.init.constant_(net.final_layer.linear.bias, 2.0)


def gradient(loss, net):
    total = 0
    for g in torch.autograd.grad(loss, net.parameters(), allow_unused=True):
        if g is not None:
            total += g.abs().sum().item()
    return total


# ---- Regression


def test_regression_is_zero_at_its_pairs(net, data):
    _, y, z = data
    points = torch.stack([z, one_step(net, z, y).detach()], 1)
    times = torch.tensor([1.0, 0.0])
    model = rivals.Points(net)
    assert rivals.path_loss(model, points, times, y) < 1e-10
    points[:, 1] += 0.5                 # ‖G(z) − x̂‖²
    assert rivals.path_loss(model, points, times, y).item() == pytest.approx(0.25, rel=1e-4)


def test_paths_are_the_samplers_at_four_of_its_times(net, data):
    x, y, _ = data
    task = rivals.Task(net, x, y, 49 * 8, 1e-3, 0)
    points, times, y = task.paths(constant, 4, 1)
    assert points.shape == (8, 5, 6, 2, 2)
    assert task.spent == 49 * 8
    assert times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=0.02)
    end = ode_sample(constant, points[:, 0], y)
    assert torch.allclose(points[:, -1], end, atol=1e-5)
    assert rivals.path_loss(constant, points, times, y) < 1e-3      # the last step is 0.001 shorter
    other = rivals.path_loss(nothing, points, times, y).item()
    assert other == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("history", [False, True])
def test_four_steps_of_a_constant_flow_end_where_it_does(net, data, history):
    """392 evaluations: four paths, no step of training."""
    x, y, z = data
    make_constant(net)
    task = rivals.Task(net, x, y, 49 * 8, 1e-3, 0)
    sampler = rivals.few_steps(task, 4, history)
    assert torch.allclose(sampler(z, y), z - 2, atol=1e-5)


@pytest.fixture
def three(net, data):
    """A network with history, three points [8,3,6,2,2] of each path, and its velocities there."""
    x = torch.randn(8, 3, 6, 2, 2)
    times = torch.tensor([1.0, 0.6, 0.3])
    first = net(x[:, 0], times[:1].expand(8), data[1])
    model = partial(rivals.Points(net, history=True), y=data[1])
    assert torch.allclose(model(x, times)[:, 0], first, atol=1e-5)     # alone it is the network
    return model, x, times


def test_a_point_sees_the_earlier_ones(three):
    model, x, times = three
    changed = x.clone()
    changed[:, 0] += 1
    difference = model(changed, times) - model(x, times)
    assert difference[:, 2].abs().max() > 1e-3


def test_a_point_does_not_see_the_later_ones(three):
    model, x, times = three
    expected = model(x, times)[:, :2]
    changed = x.clone()
    changed[:, 2] += 1
    assert torch.allclose(model(changed, times)[:, :2], expected, atol=1e-5)
    assert torch.allclose(model(x[:, :2], times[:2]), expected, atol=1e-5)


def test_reflow_leaves_a_straight_flow_alone(net, data):
    """The few steps of training move the network only a little."""
    x, y, z = data
    make_constant(net)
    task = rivals.Task(net, x, y, 4 * 3 * rivals.BATCH, 1e-4, 0)
    sampler = rivals.reflow(task)
    assert (sampler(z, y) - (z - 2)).abs().max() < 0.05


# ---- Consistency


def straight(x, t, y):
    """From everywhere straight to 0.7: the mean velocity is the velocity."""
    return (x - 0.7) / rivals.column(t)


def square(x, t, y):
    return 0 * x + rivals.column(t)**2      # the mean from 0 to t of three times itself


def three_squares(x, t, y):
    return 3 * square(x, t, y)


def test_consistency_is_zero_at_the_mean_velocity(data):
    x, y, noise = data
    assert rivals.consistency_loss(straight, straight, x, y, noise) < 1e-3
    assert rivals.consistency_loss(square, three_squares, x, y, noise) < 1e-3
    assert rivals.consistency_loss(three_squares, three_squares, x, y, noise) > 0.5


def test_consistency_has_a_gradient_through_the_network(net, data):
    x, y, noise = data
    loss = rivals.consistency_loss(net, net, x, y, noise)
    assert gradient(loss, net) > 0


# ---- Scores


LOSSES = [rivals.dmd_loss, rivals.sid_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_that_agree_give_no_gradient(loss, net, data):
    _, y, z = data
    student, other = [DiTDH(2, 6, (16, 24), (2, 1), (2, 2), 4).eval() for _ in range(2)]
    x = one_step(student, z, y)
    assert gradient(loss(x, y, net, net), student) < 1e-6
    x = one_step(student, z, y)
    assert gradient(loss(x, y, net, other), student) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_samples_move_to_what_the_real_score_expects(loss, data):
    """Here higher: x̂_real − x̂_fake = t."""
    def one(x, t, y):
        return 0 * x + 1

    x, y, _ = data
    x = x.requires_grad_()
    gradient, = torch.autograd.grad(loss(x, y, nothing, one), x)
    assert (gradient < 0).all()


# ---- Twins


def test_the_embedding_of_r_is_without_effect_at_first(net, data):
    x, y, _ = data
    t = torch.rand(8)
    expected = net(x, t, y)
    model = rivals.TwoTimes(net)
    assert torch.equal(model(x, t, y, r=0), expected)
    assert torch.equal(model(x, t, y), expected)
    nn.init.normal_(model.net.t_embedder.r_embedder.mlp[2].weight)
    assert not torch.equal(model(x, t, y, r=0), model(x, t, y))


class Twins(nn.Module):
    """v(x, t, t) is a power of t, v(z, 1, 0) a parameter of its own."""
    def __init__(self, power):
        super().__init__()
        self.power = power
        self.jump = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, y, r=None):
        if r is None:
            return 0 * x + rivals.column(t)**self.power
        return 0 * x + self.jump


@pytest.mark.parametrize("power, sign", [(2, 0), (1, -1)])
def test_twins_move_the_student_by_their_difference(power, sign, data):
    """None where v(x, t, t) = v(x, −t, −t); 2t for the power 1, so v(z, 1, 0) grows."""
    twins = Twins(power)
    rivals.twinflow_loss(twins, *data).backward()
    assert twins.jump.grad.sign() == sign


def test_twins_that_agree_leave_two_regressions(data):
    """On ε − x."""
    loss = rivals.twinflow_loss(Twins(2), *data).item()
    assert 2 < loss < 8


# ---- Two students


def test_two_students_share_the_classes(net, data):
    """Each is the teacher of its half, before a step."""
    x, y, z = data
    latents, labels = x.repeat(5, 1, 1, 1), y.repeat(5)
    task = rivals.Task(net, latents, labels, 10, 1e-3, 0)
    both = rivals.several_students(task)
    assert torch.allclose(both(z, y), one_step(net, z, y), atol=1e-5)


# ---- Budgets


@pytest.fixture
def evaluations(monkeypatch):
    """Evaluations, counted at the networks' doors, where a product is 1: so it is 1 more here."""
    spent = []
    forward, jvp = DiTDH.forward, torch.func.jvp

    def counted(self, x, t, y):
        v = forward(self, x, t, y)
        trained = next(self.parameters()).requires_grad
        backward = v.requires_grad * (1 + trained)
        spent.append(len(x) * (1 + backward))
        return v

    def counted_jvp(f, x, v):
        spent.append(len(x[0]))
        return jvp(f, x, v)

    monkeypatch.setattr(DiTDH, "forward", counted)
    monkeypatch.setattr(torch.func, "jvp", counted_jvp)
    return spent


@pytest.mark.parametrize("method", [name for name in rivals.METHODS if "teacher" not in name])
def test_a_method_spends_what_it_says_and_nearly_all_of_its_budget(method, teacher, evaluations):
    net, latents, labels, _ = rivals.open_space("rae", teacher, None)
    torch.manual_seed(0)
    task = rivals.Task(net, latents, labels, 16_000, 1e-3, 0)
    rivals.METHODS[method](task)
    assert sum(evaluations) == task.spent
    assert 0.7 * task.budget < task.spent <= task.budget


# ---- The command


def job_of_drifting(teacher, lr):
    row = {"method": "drift", "space": "rae", "seed": 0, "nfe": 1, "budget": 4 * 3840, "lr": lr}
    return teacher, teacher.parent, "key", row


def test_a_run_that_diverges_is_a_row_of_nan(few, teacher):
    """It really diverges, at an absurd rate."""
    row = rivals.distil_and_measure(job_of_drifting(teacher, 1e9))
    assert all(math.isnan(row[name]) for name in rivals.RESULTS)
    runs.print_means([row], ["method"], rivals.RESULTS)


def test_other_errors_stop_the_command(teacher, monkeypatch):
    broken = Mock(side_effect=ValueError("no latents"))
    monkeypatch.setitem(rivals.METHODS, "drift", broken)
    with pytest.raises(ValueError, match="no latents"):
        rivals.distil_and_measure(job_of_drifting(teacher, 1e-3))


@pytest.fixture
def command(few, teacher, tmp_path, monkeypatch):
    """command(*flags) -> the rows of the JSON file that it writes, {key: row}."""
    monkeypatch.setattr(rivals, "BUDGET", 80_000)
    out = tmp_path / "rivals with space ü"

    def command(*flags, name="rivals"):
        helpers.run("--out", out, "--teacher", teacher, *flags, main=rivals.main)
        command.file = out / f"{name}.json"
        assert Image.open(out / f"{name}.png").width
        return json.loads(command.file.read_text())["runs"]

    return command


def first_cells(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines[2:]]       # below header and rule


def test_the_command_computes_every_method_once(command, capsys):
    rows = command("--quick")
    assert len(rows) == len(rivals.METHODS)
    steps = {}
    for row in rows.values():
        assert row["space"] == "rae"
        assert row["evaluations"] <= 8000
        assert set(rivals.RESULTS) < set(row)
        steps[row["method"]] = row["nfe"]
        row["fd"] = 12345.0             # would be lost if it were computed again
    assert (steps["teacher-4"], steps["step-4"], steps["drift"]) == (4, 4, 1)
    saved = json.loads(command.file.read_text())
    command.file.write_text(json.dumps(saved | {"runs": rows}))
    capsys.readouterr()
    command("--quick")
    table = capsys.readouterr().out
    assert table.count("12,345.00") == len(rows)
    assert first_cells(table) == list(rivals.METHODS)


def test_rates_tries_three(command):
    rows = command("--rates", "--methods", "regression", name="rivals_rates")
    rates = [row["lr"] for row in rows.values()]
    assert sorted(rates) == list(rivals.CANDIDATES)         # in the order of finishing


def test_teachers_are_of_one_seed(command):
    rows = command("--quick", "--seeds", 2, "--methods", "teacher-1", "drift")
    assert sorted(row["seed"] for row in rows.values()) == [0, 0, 1]


def test_the_space_of_a_vae_has_rows_of_its_own(command, monkeypatch):
    monkeypatch.setattr(vae, "make_vae64", partial(vae.make_vae64, steps=(11, 11)))
    flags = ["--quick", "--space", "vae", "--methods", "teacher-1", "drift"]
    rows = command(*flags, name="rivals_vae")
    assert command.file.with_name("vae64.pt").exists()
    assert [row["space"] for row in rows.values()] == ["vae", "vae"]
