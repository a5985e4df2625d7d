"""toy/ablation.py with tiny sizes: resumption, the table against the JSON, the intervals against a naive computation."""
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

TINY = "--steps 1 --seeds 2 --jobs 1".split()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Rows A and B, killed after its first run by Ctrl-C and resumed as --quick, so with C and Table 5."""
    out = tmp_path_factory.mktemp("ablation with space ü")
    make_teacher(out / "teacher.pt", steps=(30, 30, 30))
    command = [sys.executable, ablation.__file__, "--out", out, "--rows", "B", *TINY]
    path, p = out / "ablation.json", subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while not path.exists() and p.poll() is None:
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGINT)                     # as a terminal sends it: to parent and workers
    err = p.communicate(timeout=20)[1].decode()
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    before = json.loads(path.read_text())
    assert 1 <= len(before) < 4
    assert ablation.main(["--out", str(out), "--quick", *TINY]) == 0
    after = json.loads(path.read_text())
    assert after[:len(before)] == before                # `seconds` too: they were not done again
    assert sorted((r["row"], r["seed"]) for r in after) == [(name, seed) for name in ("A", "B", "C", "clean", "perturbed+y")
                                                            for seed in (0, 1)]
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
    return {"row": row, "seed": seed, "settings": ablation.settings(ablation.NAMED[row], 100), "teacher": "", "fd": fd,
            **dict.fromkeys(ablation.METRICS[1:], 0.5)}


def test_verdicts(tmp_path, capsys):
    """B and C differ from A by as much in the mean; only C does so in every seed alike."""
    runs = [entry(row, seed, 1 + seed - shift) for row, shifts in (("A", (0, 0, 0)), ("B", (0.9, -0.3, 0)), ("C", (0.21, 0.2, 0.19)))
            for seed, shift in enumerate(shifts)]
    (tmp_path / "ablation.json").write_text(json.dumps(runs))
    assert ablation.main(["--out", str(tmp_path), "--rows", "3", "--markdown"]) == 0
    lines = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert "better" not in lines["B"] and "worse" not in lines["B"] and "| A | -0.200 ± " in lines["B"]
    assert "better" in lines["C"] and "| A | -0.200 ± 0.025 |" in lines["C"]
    assert "1.77" in lines["C"] and list(tmp_path.iterdir()) == [tmp_path / "ablation.json"]     # nothing was run


def test_table_and_picture_are_the_json(out, capsys):
    runs = json.loads((out / "ablation.json").read_text())
    assert ablation.main(["--out", str(out), "--quick", "--markdown", *TINY]) == 0
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()]
    for name, same in (("A", "A"), ("B", "B"), ("C", "C"), ("clean+y", "A"), ("clean", "clean"), ("perturbed", "B")):
        line = next(line for line in table if line[0] == name)
        for cell, metric in zip(line[2:], ("fd", "precision", "recall", "label_accuracy", "drift")):
            a, b = (r[metric] for r in runs if r["row"] == same)
            assert cell == f"{(a + b) / 2:.3f} ± {abs(a - b) / 2:.3f}"
    assert Image.open(out / "ablation.png").width == 900
    assert all({"table", "seed", "seconds", "drift_first", "settings"} <= r.keys() for r in runs)


def test_rows_are_what_the_paper_varies():
    of = lambda name: ablation.settings(ablation.NAMED[name], 100)
    a = of("A")
    assert (a["y_softmax"], a["perturb"], a["n_pos"], a["n_neg"], a["n_extra_neg"]) == (True, False, 64, 64, 0)
    assert of("clean+y") == a and of("perturbed") == of("64/64") == of("B") and of("128/128") == of("64+64") == of("C")
    grid = {(p, n) for p in (32, 64, 128) for n in (32, 64, 128)}
    assert grid == {(of(f"{p}/{n}")["n_pos"], of(f"{p}/{n}")["n_neg"] + of(f"{p}/{n}")["n_extra_neg"]) for p, n in grid}
    assert of("scratch-5x")["steps"] == 500 and len(ablation.NAMED) == len(ablation.ROWS)
    assert all(row.against in ablation.NAMED for row in ablation.ROWS)


def test_collapse_is_found_where_it_begins():
    step, drift = list(range(0, 500, 10)), [1.0] * 20 + [0.5] * 10 + [0.4] * 10 + [3.0] * 10
    assert ablation.collapse({"trace": {"step": step, "drift": drift}}) == 400    # the mean of 5 is 0.92 there
    assert ablation.collapse({"trace": {"step": step, "drift": [1.0] * 20 + [0.5] * 30}}) == "never"


@pytest.mark.parametrize("args, saying", [
    (["--rows", "A", "Z"], "--rows Z"), (["--seeds", "0"], "--seeds"), (["--jobs", "x"], "--jobs"), (["--nonsense"], "--nonsense"),
    (["--markdown"], "no run of these rows")])
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
