"""toy/two_moons.py in small runs: its data and measures, the collapse and its cure, the command."""
import json
import math
from functools import partial

import helpers
import pytest
import torch
from PIL import Image

import drift_rae as dr
from toy import runs
from toy import two_moons as tm

MEASURES = {"energy_distance", "energy_floor", "spread_ratio", "attraction", "effective_positives"}
CELLS = [("concentrated", "drift-rae", 2), ("concentrated", "drift-rae", 3),
         ("scattered", "drift-rae", 2), ("scattered", "drift-rae", 3),
         ("scattered", "features", 3), ("scattered", "projection", 3)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def row_of(regime, method, dim, steps, seed=0):
    return tm.run((regime, method, dim, seed, steps))[0]


def test_moons_are_standardised():
    points = tm.moons(100_000)
    assert points.mean(0).abs().max() < 0.02
    assert (points.std(0) - 1).abs().max() < 0.02


@pytest.mark.parametrize("dim", [3, 512])
def test_noise_keeps_its_total_variance_or_the_width_of_the_moons(dim):
    concentrated = tm.sample_data("concentrated", dim, 4000).var(0)
    assert concentrated[:2].sum().item() == pytest.approx(2, abs=0.1)
    expected = 0.2 * (dim - 2) / dim
    assert concentrated[2:].sum().item() == pytest.approx(expected, rel=0.1)
    scattered = tm.sample_data("scattered", dim, 4000).var(0)
    assert scattered[2:].mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("regime", ["concentrated", "scattered"])
def test_generator_starts_about_as_wide_as_the_data(regime):
    data = partial(tm.sample_data, regime, 128)
    samples = tm.make_generator(data)(torch.randn(4000, 8))
    ratio = samples.std(0) / data(4000).std(0)
    assert samples.shape == (4000, 128)
    assert 0.8 < ratio.mean() < 1.2


def test_energy_distance_of_two_points():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert tm.energy_distance(points[:1], points[1:]).item() == pytest.approx(10)


def test_energy_floor_is_the_mean_between_two_sets_of_data():
    x, y = tm.moons(200 * 200).view(2, 100, 200, 2)
    between = tm.energy_distance(x, y)
    floor = 2 * tm.distance(y, y) / 200
    assert between.item() == pytest.approx(floor.item(), rel=0.2)


def naive_attraction(x, pos):
    """Eq. (11)'s weights, one query and one positive at a time, in float64."""
    x = x.double()
    pos = pos.double()
    targets = torch.cat([x, pos])
    distances = [(a - b).norm() for a in x for b in targets]
    scale = sum(distances) / len(distances)
    lengths = []
    counts = []
    for tau in (0.02, 0.05, 0.2):
        for query in x:
            kernel = [math.exp(-(query - y).norm() / (tau * scale)) for y in pos]
            weights = [k / sum(kernel) for k in kernel]
            centre = sum(w * y for w, y in zip(weights, pos))
            lengths.append(centre.norm())
            counts.append(1 / sum(w * w for w in weights))
    unit = sum(y.norm() for y in pos) / len(pos)
    return sum(lengths) / len(lengths) / unit, sum(counts) / len(counts)


def test_attraction_equals_a_naive_loop():
    x = torch.randn(5, 6)
    pos = torch.randn(7, 6)
    length, count = tm.attraction(x, pos)
    expected_length, expected_count = naive_attraction(x, pos)
    assert length.item() == pytest.approx(expected_length.item(), abs=1e-5)
    assert count.item() == pytest.approx(expected_count, abs=1e-4)


def test_pull_and_push_add_up_to_the_drift():
    x = torch.randn(6, 3)
    pos = torch.randn(8, 3)
    pull, push = tm.pull_and_push(x, pos, 0.7)
    V = dr.drift_field(x[None], pos[None], x[None], 0.7)[0]
    assert torch.allclose(pull + push, V, atol=1e-5)
    # Without a choice, the pull leads all the way to the one positive.
    pull, _ = tm.pull_and_push(x, pos[:1], 0.7)
    assert torch.allclose(x + pull, pos[:1].expand(6, 3), atol=1e-5)


def test_pull_and_push_use_the_scale_of_the_loss():
    x = torch.randn(6, 3)
    pos = torch.randn(8, 3)
    _, info = dr.drift_loss(x[None], pos[None])
    assert tm.mean_distance(x, pos).item() == pytest.approx(info["scale"].item(), rel=1e-3)


def test_projection_keeps_a_plane():
    points = torch.randn(5, 40)
    see = tm.make_view("projection", 40)
    seen = see(points)
    basis = see(torch.eye(40))                              # [D,2]
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-5)
    assert torch.allclose(see(seen @ basis.T), seen, atol=1e-5)     # a point of the plane stays


def test_features_train_the_first_two_coordinates_alone():
    data = partial(tm.sample_data, "scattered", 6)
    generator = tm.make_generator(data)
    before = generator[-1].weight.clone()
    see = tm.make_view("features", 6)
    steps = list(tm.train(generator, data, see, steps=3))
    moved = (generator[-1].weight != before).any(1)
    assert steps == [0, 1, 2, 3]
    assert moved.tolist() == [True, True, False, False, False, False]


def test_scattered_data_collapses_but_concentrated_data_and_features_do_not():
    collapsed = row_of("scattered", "drift-rae", 128, steps=200)
    concentrated = row_of("concentrated", "drift-rae", 128, steps=200)
    features = row_of("scattered", "features", 128, steps=200)
    projection = row_of("scattered", "projection", 128, steps=200)
    assert collapsed["spread_ratio"] < 0.6
    assert collapsed["attraction"] < 0.3
    for row in (concentrated, features):
        assert 0.85 < row["spread_ratio"] < 1.15
        assert row["attraction"] > 0.7
        assert row["energy_distance"] < collapsed["energy_distance"] / 10
        assert row["effective_positives"] < collapsed["effective_positives"] / 2
    # Two wrong dimensions: the pull is as strong as with the features, the moons are not learnt.
    assert projection["attraction"] > 0.7
    assert projection["effective_positives"] < collapsed["effective_positives"] / 2
    assert projection["energy_distance"] > 10 * features["energy_distance"]


def test_command_writes_rows_pictures_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tm, "DIMS", (2, 3))
    monkeypatch.setattr(tm, "STEPS", tm.FRAMES)
    out = tmp_path / "a folder"
    helpers.run("--out", out, "--seeds", 2, main=tm.main)
    rows = json.loads((out / "two_moons.json").read_text())
    cells = [(row["regime"], row["method"], row["dim"]) for row in rows]
    assert cells[::2] == CELLS
    assert cells[1::2] == CELLS
    assert [row["seed"] for row in rows] == 6 * [0, 1]
    assert all(math.isfinite(row[name]) for row in rows for name in MEASURES)
    again = row_of("scattered", "drift-rae", 3, tm.FRAMES, seed=1)     # here, not in a worker
    assert rows[7] == again
    assert rows[6] != rows[7]
    table = capsys.readouterr().out
    assert table.count("scattered") == 4
    assert table.count("±") == 6 * len(tm.COLUMNS)
    with Image.open(out / "two_moons.png") as png:
        assert png.size == (2 * 300, 4 * 360)
    with Image.open(out / "drift.png") as png:
        assert png.size == (720, 520)
    with Image.open(out / "two_moons.gif") as gif:
        assert gif.n_frames == tm.FRAMES + 1
        assert gif.width == 3 * tm.PANEL["size"][0]
    assert len(list(out.iterdir())) == 4                    # no temporary file is left


def test_show_prints_the_table_of_a_file_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    row = {"regime": "scattered", "dim": 512, "method": "features", "energy_floor": 0.0018,
           "energy_distance": 0.00251, "attraction": 0.95, "effective_positives": 15.2}
    rows = [row | {"seed": 0, "spread_ratio": 0.9}, row | {"seed": 1, "spread_ratio": 1.1}]
    (tmp_path / "two_moons.json").write_text(json.dumps(rows))
    helpers.run("--show", main=tm.main)
    header, _, line = capsys.readouterr().out.strip().splitlines()
    assert header == ("| data | loss sees | D | energy distance ↓ | spread | pull "
                      "| positives that count |")
    assert line == ("| scattered | features (oracle) | 512 | 0.0025 ± 0.0000 | 1.00 ± 0.14 "
                    "| 0.95 ± 0.00 | 15 ± 0 |")
    assert len(list(tmp_path.iterdir())) == 1               # no folder out/


@pytest.mark.parametrize("flags", ["--colour red", "--seeds 0", "--seeds none"])
def test_bad_flag_ends_before_anything_is_written(flags, tmp_path):
    out = tmp_path / "out"
    said = helpers.refusal("--out", out, *flags.split(), main=tm.main)
    assert flags.split()[0] in said
    assert not out.exists()
