"""toy/two_moons.py with tiny settings: its parts, the direction of each claim the README makes, the command line."""
import json
import math
import re
from functools import cache

import pytest
import torch
from PIL import Image

from toy import two_moons as tm

KEYS = {"regime", "dim", "seed", "method", "energy_distance", "energy_floor", "spread_ratio", "v_pos", "v_neg",
        "effective_positives"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded():
    return torch.Generator().manual_seed(0)


@cache
def cell(regime, dim, method="drift-rae", steps=150, seed=0, n_shots=0):
    return tm.run_cell((regime, dim, seed, method, steps, n_shots))[0]


def test_moons_are_standardised_and_lie_in_their_plane():
    g = seeded()
    xy = tm.moons(200_000, g)
    assert xy.mean(0).abs().max() < 0.01 and (xy.std(0) - 1).abs().max() < 0.01
    frame = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q
    x = tm.embed(xy, frame, 0.1, g)
    assert torch.allclose(x @ frame[:, :2], xy, atol=1e-5)
    assert (x @ frame[:, 2:]).std(0).sub(0.1).abs().max() < 0.002


def test_energy_distance_tells_clouds_apart():
    a, b, c = (tm.moons(1000, g) for g in (seeded(), seeded(), torch.Generator().manual_seed(1)))
    assert abs(tm.energy_distance(a, b)) < 1e-5 and 0 < tm.energy_distance(a, c) < 0.01
    assert tm.energy_distance(a, 0.1 * c) > 0.5
    # single points: 2·‖a−b‖ and nothing else
    assert tm.energy_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(10)


def test_attraction_is_one_over_root_p_for_uniform_weights_and_one_for_the_nearest():
    y = torch.randn(64, 4096, generator=seeded())
    assert tm.attraction(y, y, torch.tensor(1e9)) == pytest.approx(1 / math.sqrt(64), rel=0.05)     # Theorem 1
    assert tm.attraction(y, y, torch.tensor(1e-3)) == pytest.approx(1, rel=0.02)


def test_map_keeps_the_plane_and_drops_the_noise_where_pca_cannot():
    g, dim = seeded(), 64
    frame = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    phi = tm.concentrating_map(frame, 1.0, g)
    assert phi(frame.T).shape == (dim, 2)                                   # it found that two directions are shared
    assert phi(frame.T[:2]).norm() > 1 and phi(frame.T[2:]).norm() < 0.01
    x = tm.embed(tm.moons(4096, g), frame, 1.0, g)
    first = torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:]
    assert (first.T @ frame[:, :2]).square().sum() / 2 < 0.5


def test_same_seed_same_row_and_pictures_change_no_number():
    rows = [tm.run_cell(("scattered", 8, seed, "drift-rae", 6, shots))[0] for seed, shots in ((0, 0), (0, 3), (1, 0))]
    assert rows[0] == rows[1] and rows[0]["energy_distance"] != rows[2]["energy_distance"]
    assert rows[0].keys() >= KEYS


def test_generator_starts_at_the_scale_of_the_scattered_data():
    for identity in (False, True):
        net = tm.Generator(64, identity)
        assert net(torch.randn(2000, net.noise)).detach().std(0).mean() == pytest.approx(1, abs=0.05)


def test_concentrated_works():
    for dim in (8, 32, 128):
        row = cell("concentrated", dim)
        assert 0.8 < row["spread_ratio"] < 1.2 and row["energy_distance"] < 0.08, row


def test_scattered_shrinks_with_the_dimension_as_the_attraction_falls():
    rows = [cell("scattered", dim) for dim in (8, 32, 128)]
    for low, high in zip(rows, rows[1:]):
        assert high["spread_ratio"] < low["spread_ratio"] and high["energy_distance"] > low["energy_distance"]
    assert rows[0]["spread_ratio"] > 0.8 and rows[-1]["spread_ratio"] < 0.6
    assert rows[0]["attraction"] > rows[-1]["attraction"]
    for dim, row in zip((32, 128), rows[1:]):
        concentrated = cell("concentrated", dim)
        assert concentrated["effective_positives"] < row["effective_positives"]
        assert concentrated["attraction"] > row["attraction"]


def test_feature_map_cures_the_scattered_data():
    raw, mapped = cell("scattered", 128), cell("scattered", 128, "features")
    assert raw["spread_ratio"] < 0.6 and 0.85 < mapped["spread_ratio"] < 1.15
    assert mapped["energy_distance"] < raw["energy_distance"] / 5


def test_identity_path_does_not_collapse_and_does_not_learn_the_moons():
    row = cell("scattered", 256, "identity path", steps=100)
    gauss = tm.energy_distance(torch.randn(2000, 2, generator=seeded()), tm.moons(2000, seeded()))
    assert 0.85 < row["spread_ratio"] < 1.15 and row["energy_distance"] > gauss / 2


def test_y_softmax_collapses_where_the_single_softmax_does_not_and_perturbation_changes_little():
    for method in ("baseline", "perturb only"):
        assert cell("scattered", 32, method, steps=100)["spread_ratio"] < 0.4
    assert cell("concentrated", 32, "baseline")["spread_ratio"] > 0.6
    both, single = (cell("scattered", 32, m)["spread_ratio"] for m in ("drift-rae", "single softmax only"))
    assert min(both, single) > 0.6 and abs(both - single) < 0.3


def test_command_writes_rows_and_pictures(tmp_path, capsys):
    out = tmp_path / "a folder"
    assert tm.main(["--out", str(out), "--seeds", "1", "--dims", "3", "2", "--steps", "4"]) == 0     # two processes
    rows = json.loads((out / "two_moons.json").read_text())
    assert all(r.keys() >= KEYS and all(map(math.isfinite, list(r.values())[4:])) for r in rows)
    assert {(r["regime"], r["dim"], r["method"]) for r in rows} == {
        *((regime, d, "drift-rae") for regime in tm.SIGMA for d in (2, 3)),
        ("scattered", 3, "features"), ("scattered", 3, "identity path")}
    assert rows[3] == cell("scattered", 3, steps=4)                         # bit for bit what one process finds
    assert re.search(r"features +scattered +3 ", capsys.readouterr().out)
    with Image.open(out / "two_moons.png") as png, Image.open(out / "two_moons.gif") as gif:
        assert png.width > 400 and gif.n_frames > 1
    assert len(list(out.iterdir())) == 3                                    # no temporary file is left


@pytest.mark.parametrize("args, saying", [
    (["--colour", "red"], "--colour"), (["--dims", "1"], "--dims must be at least 2"),
    (["--steps", "0"], "--steps must be at least"), (["--seeds", "none"], "--seeds")])
def test_bad_flag_exits_with_2(args, saying, tmp_path, capsys):
    assert tm.main([*args, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and re.search(saying, err[0])
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert tm.main(["--out", str(tmp_path / "file" / "out"), "--quick"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
