"""toy/ablation.py with tiny sizes: resumption, the table against the JSON, the intervals against a naive loop."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import integrate, optimize

from toy import ablation
from toy.digits import make_teacher

STEPS = ablation.parse([])[0].steps
TINY = "--steps 1 --seeds 1 --jobs 1".split()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Row B and its reference A, ended after their first run by Ctrl-C; resumed as --quick: with C and Table 5."""
    out = tmp_path_factory.mktemp("ablation with space ü")
    make_teacher(out / "teacher.pt", steps=(20, 20, 20))
    command = [sys.executable, ablation.__file__, "--out", out, "--rows", "B", *TINY, "--seeds", "3"]
    path, p = out / "ablation.json", subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell's background job would ignore it
    while not path.exists() and p.poll() is None:
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGINT)                     # as a terminal sends it: to parent and workers
    err = p.communicate(timeout=20)[1].decode()
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    before = json.loads(path.read_text())
    assert 1 <= len(before) < 6
    assert ablation.main(["--out", str(out), "--quick", *TINY]) == 0
    after = json.loads(path.read_text())
    assert after[:len(before)] == before                # `seconds` too: they were not done again
    assert sorted(r["row"] for r in after if r["seed"] == 0) == ["A", "B", "C", "clean", "perturbed+y"]
    return out


def t_quantile(p, df):
    """Of Student's t, by integrating its density."""
    c = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    cdf = lambda t: 0.5 + integrate.quad(lambda x: c * (1 + x * x / df) ** (-(df + 1) / 2), 0, t)[0]
    return optimize.brentq(lambda t: cdf(t) - p, 0, 100)


def test_paired_interval_is_the_naive_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=6), rng.normal(size=7)
    a, b = ({i: {"fd": v} for i, v in enumerate(values)} for values in (x, y))
    del a[2]                                            # seeds that only one row has do not count
    d = [x[i] - y[i] for i in (0, 1, 3, 4, 5)]
    mean = sum(d) / 5
    half = t_quantile(0.975, 4) * math.sqrt(sum((v - mean) ** 2 for v in d) / 4 / 5)
    assert np.allclose(ablation.paired(a, b), (mean, half), rtol=1e-9)
    assert np.isnan(ablation.paired({0: a[0]}, b)).all()        # one seed says nothing
    a[0]["fd"] = None                                           # nor does a run that ended in NaN
    assert np.isnan(ablation.paired(a, b)).all()


def entry(row, seed, fd):
    s = ablation.settings(ablation.NAMED[row], STEPS)
    return {"row": row, "seed": seed, "settings": s, "teacher": "", **dict.fromkeys(ablation.METRICS, 0.5), "fd": fd}


def test_verdicts(tmp_path, capsys):
    """B and C differ from A by as much in the mean; only C does so in every seed alike."""
    shifts = {"A": (0, 0, 0), "B": (0.9, -0.3, 0), "C": (0.21, 0.2, 0.19)}
    runs = [entry(row, seed, 1 + seed - shifts[row][seed]) for row in shifts for seed in range(3)]
    (tmp_path / "ablation.json").write_text(json.dumps(runs))
    assert ablation.main(["--out", str(tmp_path), "--rows", "3", "--markdown"]) == 0
    lines = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert "better" not in lines["B"] and "worse" not in lines["B"] and "| A | -0.200 ± " in lines["B"]
    assert "better" in lines["C"] and "| A | -0.200 ± 0.025 |" in lines["C"]
    assert "1.77" in lines["C"] and list(tmp_path.iterdir()) == [tmp_path / "ablation.json"]     # nothing was run


def test_quick_leaves_a_picture_and_the_promised_fields(out):
    assert Image.open(out / "ablation.png").width == 900
    for r in json.loads((out / "ablation.json").read_text()):
        assert {"table", "seed", "seconds", "drift_first", "settings", *ablation.METRICS} <= r.keys()
        assert 0 <= r["precision"] <= 1 and r["fd"] > 0 and r["drift"] == r["drift_first"] > 0          # of one step


def test_table_is_the_json(tmp_path, capsys):
    rng, runs = np.random.default_rng(0), []
    for name, seed in ((name, seed) for name in ("A", "B", "clean") for seed in range(5)):
        runs.append(entry(name, seed, 0) | dict(zip(ablation.METRICS, rng.random(5))))
    (tmp_path / "ablation.json").write_text(json.dumps(runs))
    assert ablation.main(["--out", str(tmp_path), "--seeds", "4", "--rows", "3", "5", "--markdown"]) == 0
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()]
    for name, same in (("A", "A"), ("B", "B"), ("clean+y", "A"), ("clean", "clean"), ("perturbed", "B")):
        line = next(line for line in table if line[0] == name)
        for cell, metric in zip(line[2:], ablation.METRICS):
            x = [r[metric] for r in runs if r["row"] == same and r["seed"] < 4]
            mean = sum(x) / 4
            assert line[1] == "4" and cell == f"{mean:.3f} ± {math.sqrt(sum((v - mean) ** 2 for v in x) / 3 / 4):.3f}"
    assert not any(line[0] in ("C", "perturbed+y") for line in table)       # have no run


def test_rows_are_what_the_paper_varies():
    of = lambda name: ablation.settings(ablation.NAMED[name], 100)
    a = of("A")
    assert (a["y_softmax"], a["perturb"], a["n_pos"], a["n_neg"], a["n_extra_neg"]) == (True, False, 64, 64, 0)
    assert of("clean+y") == a and of("perturbed") == of("64/64") == of("B")
    assert of("128/128") == of("64+64") == of("as-released") == of("C")
    grid = {(p, n) for p in (32, 64, 128) for n in (32, 64, 128)}
    rows = [of(f"{p}/{n}") for p, n in grid]
    assert grid == {(row["n_pos"], row["n_neg"] + row["n_extra_neg"]) for row in rows}
    assert of("scratch-5x")["steps"] == 500 and len(ablation.NAMED) == len(ablation.ROWS)
    assert all(row.against in ablation.NAMED for row in ablation.ROWS)


def test_nan_is_kept_and_shown(out, tmp_path, capsys, monkeypatch):
    def nan(*args):
        raise ablation.UserError("the loss or its gradient became NaN at step 3")
    monkeypatch.setattr(ablation, "train", nan)
    monkeypatch.setattr(ablation.torch, "set_num_threads", lambda n: None)
    bad = ablation.run((ablation.NAMED["B"], entry("B", 0, 0)["settings"], 0, str(out / "teacher.pt")))
    runs = [bad | {"teacher": ""}, entry("A", 0, 1.0), entry("B", 1, 1.0), entry("A", 1, 1.0)]
    (tmp_path / "ablation.json").write_text(json.dumps(runs))
    assert ablation.main(["--out", str(tmp_path), "--rows", "3", "--markdown"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| B "))
    assert "| nan ± nan |" in line and "better" not in line and "worse" not in line
    args, rows = ablation.parse([])
    ablation.draw(rows, ablation.read(tmp_path / "ablation.json"), args, tmp_path / "ablation.png")
    assert bad["fd"] is None and Image.open(tmp_path / "ablation.png").width == 900


def test_collapse_is_found_where_it_begins():
    step, drift = list(range(0, 500, 10)), [1.0] * 20 + [0.5] * 10 + [0.4] * 10 + [3.0] * 10
    assert ablation.collapse({"trace": {"step": step, "drift": drift}}) == 400    # the mean of 5 is 0.92 there
    assert ablation.collapse({"trace": {"step": step, "drift": [1.0] * 20 + [0.5] * 30}}) == "never"


@pytest.mark.parametrize("args, saying", [
    (["--rows", "A", "Z"], "--rows Z"), (["--seeds", "0"], "--seeds"), (["--jobs", "x"], "--jobs"),
    (["--nonsense"], "--nonsense"), (["--markdown"], "no run of these rows")])
def test_bad_input_ends_in_a_sentence(args, saying, tmp_path, capsys):
    assert ablation.main(["--out", str(tmp_path), *args]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and saying in err[0]


def test_bad_files_end_in_a_sentence(out, tmp_path, capsys):
    (tmp_path / "ablation.json").write_text("[{}")
    assert ablation.main(["--out", str(tmp_path), "--markdown"]) == 2 and "damaged" in capsys.readouterr().err
    (tmp_path / "ablation.json").write_text(json.dumps([entry("A", 0, 1.0)]))
    (tmp_path / "teacher.pt").write_bytes((out / "teacher.pt").read_bytes())
    assert ablation.main(["--out", str(tmp_path)]) == 2 and "another teacher" in capsys.readouterr().err
    (tmp_path / "teacher.pt").write_bytes(b"no checkpoint")
    assert ablation.main(["--out", str(tmp_path)]) == 2 and "damaged" in capsys.readouterr().err
