"""toy/rivals.py: losses vanish where theory says so, budgets are counted, the script continues."""
import json
import math
from unittest.mock import Mock

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import drift_rae as dr
from drift_rae import DiTDH, ode_sample, one_step
from toy import rivals, runs

CPU = dr.Config(device="cpu")
TRAINED = [name for name in rivals.METHODS if name in rivals.RATES]


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
    end = z - 0.999 * net(z, torch.ones(8), y).detach()     # paths end at t = 0.001
    points = torch.stack([z, end])
    assert rivals.path_loss(net, (points, y)) < 1e-10
    points[1] += 0.5                    # ‖G(z) − x̂‖²
    assert rivals.path_loss(net, (points, y)).item() == pytest.approx(0.25, rel=1e-2)


def test_paths_are_the_samplers_at_four_of_its_times(net, data):
    x, y, _ = data
    task = rivals.Task(net, x, y, 49 * 8, CPU)
    points, y = task.make_paths(constant, 4, 1)
    assert points.shape == (5, 8, 6, 2, 2)
    assert task.spent == 49 * 8
    end = ode_sample(constant, points[0], y)
    assert torch.allclose(points[-1], end, atol=1e-5)
    far = (points[0] - points).mean((1, 2, 3, 4)) / 2       # how much time has passed
    assert far.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)
    assert rivals.path_loss(constant, (points, y)) < 0.01     # 49 steps are no multiple of four
    assert rivals.path_loss(nothing, (points, y)).item() == pytest.approx(4, abs=0.1)


def test_path_loss_asks_for_the_times_of_the_sampler(data):
    _, y, z = data
    asked = []

    def record(x, t, y):
        asked.append(t)
        return nothing(x, t, y)

    ode_sample(record, z, y, steps=5)
    times = torch.stack(asked)[:, 0]
    rivals.path_loss(record, (torch.randn(5, 8, 6, 2, 2), y))
    assert torch.allclose(asked[-1].unique().flip(0), times)


def test_along_a_path_the_flow_is_straight(data):
    """v(x_t, t) for x_t on the line from x̂ to z, at all times in (0, 1)."""
    _, y, z = data
    end = z - 0.999 * 2
    asked = []

    def on_line(x, t, y):
        asked.append(t)
        passed = (z.unsqueeze(0) - x.unsqueeze(1)) / 2      # [256,8,...]: from each noise
        error = (passed - (1 - t).view(-1, 1, 1, 1, 1)).abs().amax((2, 3, 4)).amin(1)
        assert error.max() < 1e-5
        return constant(x, t, y)

    paths = torch.stack([z, end]), y
    assert rivals.path_loss(on_line, paths, along=1) < 1e-10
    assert asked[0].min() < 0.1 and asked[0].max() > 0.9


def test_four_steps_of_a_constant_flow_end_where_it_does(net, data):
    """392 evaluations: four paths, no step of training."""
    x, y, z = data
    make_constant(net)
    task = rivals.Task(net, x, y, 49 * 8, CPU)
    student = rivals.train_steps(task, 4)
    assert torch.allclose(ode_sample(student, z, y, steps=5), z - 2 * 0.999, atol=1e-5)


def test_reflow_leaves_a_straight_flow_alone(net, data):
    """The few steps of training move the network only a little."""
    x, y, z = data
    make_constant(net)
    cfg = dr.Config(device="cpu", lr=1e-4)
    task = rivals.Task(net, x, y, 4 * 3 * rivals.BATCH, cfg)
    student = rivals.train_reflow(task)
    assert (one_step(student, z, y) - (z - 2)).abs().max() < 0.05


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


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_spends_what_it_says_and_nearly_all_of_its_budget(method, teacher, evaluations):
    net, _, checkpoint = runs.open_teacher(teacher)
    latents = checkpoint["latents"].float()
    torch.manual_seed(0)
    task = rivals.Task(net, latents, checkpoint["labels"], 16_000, CPU)
    rivals.METHODS[method].train(task)
    assert sum(evaluations) == task.spent
    assert 0.7 * task.budget < task.spent <= task.budget


# ---- The command


def run_of_drifting(rate):
    return {"method": "drift", "seed": 0, "budget": 4 * 3840, "rate": rate}


def test_a_run_that_diverges_is_a_row_of_nan(few, teacher, capsys):
    """It really diverges, at an absurd rate."""
    run = rivals.distil_and_measure(teacher, None, run_of_drifting(1e9))
    assert all(math.isnan(run[name]) for name in rivals.DECIMALS)
    rivals.show_table({"key": run})
    assert cells(capsys)[0][4] == "diverged"
    rivals.show_rates({"key": run})
    assert cells(capsys) == [["drift (Drift-RAE)", "diverged at 1e+09"]]
    assert rivals.draw_distances({"key": run}).width


def test_other_errors_stop_the_command(teacher, monkeypatch):
    broken = rivals.METHODS["drift"]._replace(train=Mock(side_effect=ValueError("no latents")))
    monkeypatch.setitem(rivals.METHODS, "drift", broken)
    with pytest.raises(ValueError, match="no latents"):
        rivals.distil_and_measure(teacher, None, run_of_drifting(1e-3))


@pytest.fixture
def command(few, teacher, tmp_path, monkeypatch):
    """command(*flags) -> the runs of the JSON file that it writes, {key: run}."""
    monkeypatch.setattr(rivals, "BUDGET", 8000)
    out = tmp_path / "rivals with space ü"

    def command(*flags):
        helpers.run("--out", out, "--teacher", teacher, *flags, main=rivals.main)
        return json.loads(command.file.read_text())["runs"]

    command.file = out / "rivals.json"
    return command


def cells(capsys):
    """The cells of the printed tables' rows."""
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return [row for row in rows if row[0] not in ("method", "---")]


def test_the_command_computes_every_method_once(command, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "BUDGET", 80_000)           # --quick takes a tenth
    done = command("--quick")
    assert [run["method"] for run in done.values()] == list(rivals.METHODS)
    for run in done.values():
        assert run["evaluations"] <= run["budget"] == 8000
        assert rivals.DECIMALS.keys() < run.keys()
        run["fd"] = 12345.0             # would be lost if it were computed again
    saved = json.loads(command.file.read_text())
    command.file.write_text(json.dumps(saved | {"runs": done}))
    capsys.readouterr()
    command("--quick")
    table = cells(capsys)
    assert [row[0] for row in table] == [method.title for method in rivals.METHODS.values()]
    assert {row[4] for row in table} == {"12,345.00"}
    nfe = {row[0]: row[2] for row in table}
    assert (nfe["teacher-4"], nfe["step-4"], nfe["drift (Drift-RAE)"]) == ("4", "4", "1")
    for name in ("rivals.png", "rivals_samples.png"):
        assert Image.open(command.file.with_name(name)).width


def test_rates_are_tried_with_the_whole_budget_and_another_seed(command, capsys):
    """They join the table's runs in one file."""
    command("--seeds", 1, "--methods", "teacher-1")
    capsys.readouterr()
    teacher, *three = command("--rates", "--methods", "regression", "consistency").values()
    assert teacher["method"] == "teacher-1"
    rates = [run["rate"] for run in three]
    assert rates == [3e-4, 1e-3, 3e-3, 3e-4, 1e-3, 3e-3]
    assert {(run["seed"], run["budget"]) for run in three} == {(100, 8000)}
    first, second = cells(capsys)
    assert [cell.split(" at ")[-1] for cell in first] == ["regression", "3e-4", "1e-3", "3e-3"]
    assert second[0] == "consistency"


def test_teachers_are_of_one_seed(command):
    done = command("--seeds", 2, "--methods", "teacher-1", "regression")
    assert [run["seed"] for run in done.values()] == [0, 0, 1]


def test_without_out_the_tables_come_from_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    args = rivals.parse(["--seeds", "8"])
    planned = rivals.plan_runs(args, rates=False) | rivals.plan_runs(args, rates=True)
    assert len(planned) == 3 + 9 * (8 + 3)
    done = {}
    for i, (key, run) in enumerate(planned.items()):
        values = dict.fromkeys(rivals.DECIMALS, 0.5)
        fds = {"drift": 2.0, "dmd": np.nan}
        done[key] = run | values | {"fd": fds.get(run["method"], 4 + i % 2)}
    runs.save_json(tmp_path / "rivals.json", {"runs": done})
    helpers.run("--seeds", 8, main=rivals.main)
    said = capsys.readouterr().out
    assert said.count("diverged") == 4          # in the table, and at three rates
    assert "real latents and the teacher | 1 | 2e-3 | 2.00 ± 0.00 | 0.500 ± 0.000" in said
    del done[key]
    runs.save_json(tmp_path / "rivals.json", {"runs": done})
    assert key in helpers.refusal("--seeds", 8, main=rivals.main)
