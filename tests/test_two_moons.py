"""toy/two_moons.py in tiny runs: its measurements, the collapse and its cure, the command."""
import json
import math

import pytest
import torch
from PIL import Image

from toy import two_moons as tm

COLUMNS = {"regime", "dim", "seed", "method", "energy_distance", "energy_floor", "spread_ratio", "v_pos",
           "v_neg", "effective_positives", "attraction"}


def cell(regime, dim, method="drift-rae", steps=100, seed=0, n_shots=0):
    return tm.run_cell((regime, dim, seed, method, steps, n_shots))[0]


def naive_forces(x, y, noise, y_softmax):
    """Eq. (5) sample by sample in float64; with y_softmax, the weights of paper.md §6."""
    x, y, noise = x.double(), y.double(), noise.double()
    n, targets, total = len(x), torch.cat([x, y]), torch.zeros(3)
    for tau in (0.02, 0.05, 0.2):
        query = x + tau * noise
        kernel = torch.zeros(n, len(targets), dtype=torch.float64)
        for j in range(n):
            for i in set(range(len(targets))) - {j}:                        # k ≠ j
                kernel[j, i] = math.exp(-(query[j] - targets[i]).norm() / tau)
        for j, q in enumerate(query):
            neg, pos = kernel[j, :n] / kernel[j, :n].sum(), kernel[j, n:] / kernel[j, n:].sum()
            if y_softmax:
                affinity = (kernel[j] / kernel[j].sum() * kernel[j] / kernel.sum(0)).clamp(min=1e-6).sqrt()
                neg, pos = affinity[:n] * affinity[n:].sum(), affinity[n:] * affinity[:n].sum()
            v_pos = sum(w * (t - q) for w, t in zip(pos, y))
            v_neg = sum(w * (t - q) for w, t in zip(neg, x))
            effective = sum(pos)**2 / sum(w**2 for w in pos)
            total += torch.tensor([v_pos.norm(), v_neg.norm(), effective]) / (3 * n)
    return total.tolist()


@pytest.mark.parametrize("y_softmax", [False, True])
def test_forces_equal_a_naive_loop(y_softmax):
    g = torch.Generator().manual_seed(0)
    x, y, noise = (spread * torch.randn(n, 5, generator=g) for n, spread in ((6, 0.2), (7, 0.2), (6, 1)))
    found = tm.forces(x, y, noise, y_softmax)
    assert list(found.values()) == pytest.approx(naive_forces(x, y, noise, y_softmax), abs=2e-5)


def test_energy_distance():
    assert tm.energy_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(10)
    a, b = (tm.moons(1000, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert abs(tm.energy_distance(a, a)) < 1e-5 and 0 < tm.energy_distance(a, b) < 0.01


def test_map_finds_the_plane_and_drops_the_noise():
    g = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(64, 64, generator=g)).Q
    columns = tm.concentrating_map(frame, 1.0, g)(frame.T)
    assert columns.shape == (64, 2) and columns[:2].norm() > 1 and columns[2:].norm() < 0.01


def test_same_seed_same_row_and_pictures_change_no_number():
    row = cell("scattered", 8, steps=6)
    assert row == cell("scattered", 8, steps=6, n_shots=3) and row.keys() == COLUMNS
    assert row["energy_distance"] != cell("scattered", 8, steps=6, seed=1)["energy_distance"]


def test_scattered_data_collapses_concentrated_or_mapped_data_does_not():
    fine = [cell("concentrated", 128), *(cell("scattered", 128, m) for m in ("features", "identity path"))]
    collapsed = cell("scattered", 128)
    assert collapsed["spread_ratio"] < 0.4 and all(0.8 < row["spread_ratio"] < 1.2 for row in fine)
    assert all(row["energy_distance"] < collapsed["energy_distance"] / 4 for row in fine)
    assert collapsed["attraction"] < fine[0]["attraction"] and collapsed["v_neg"] < 0.7 * collapsed["v_pos"]


def test_y_softmax_collapses_where_the_single_softmax_does_not():
    assert cell("scattered", 32, "baseline")["spread_ratio"] < 0.3
    assert cell("scattered", 32)["spread_ratio"] > 0.6


def test_command_writes_rows_pictures_and_table(tmp_path, capsys):
    out = tmp_path / "a folder"
    tm.main(["--out", str(out), "--seeds", "1", "--dims", "3", "2", "--steps", "4", "--workers", "1"])
    rows = json.loads((out / "two_moons.json").read_text())
    assert all(row.keys() == COLUMNS and all(map(math.isfinite, list(row.values())[4:])) for row in rows)
    assert {(row["regime"], row["dim"], row["method"]) for row in rows} == {
        *((regime, d, "drift-rae") for regime in tm.SIGMA for d in (2, 3)),
        ("scattered", 3, "features"), ("scattered", 3, "identity path")}
    assert rows[3] == cell("scattered", 3, steps=4)                         # bit for bit, in another process
    assert capsys.readouterr().out.count("scattered") == 4
    with Image.open(out / "two_moons.png") as png, Image.open(out / "two_moons.gif") as gif:
        assert png.width > 400 and gif.n_frames > 1
    assert len(list(out.iterdir())) == 3                                    # no temporary file is left


@pytest.mark.parametrize("flag", ["--colour red", "--dims 1", "--steps 0", "--seeds none"])
def test_bad_flag_ends_before_anything_is_written(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tm.main([*flag.split(), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and flag.split()[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
