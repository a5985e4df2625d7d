"""toy/ablation.py on a tiny teacher: an interrupted run goes on, tables are naive numbers, decode–encode."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from drift_rae import Config, drift_field, one_step, tokens
from toy import ablation

FLAGS = ["--seeds", "1", "--steps", "1", "--jobs", "1"]


@pytest.fixture(scope="module")
def out(teacher, tmp_path_factory):
    """Table 3, ended after its first run by Ctrl-C, and gone on with."""
    out = tmp_path_factory.mktemp("ablation with space ü")
    shutil.copy(teacher, out / "teacher.pt")
    script = subprocess.Popen(
        [sys.executable, ablation.__file__, "--out", out, "--rows", "3", *FLAGS], text=True,
        stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell's & ignores it
    path = out / "ablation.json"
    while not path.exists() and script.poll() is None:
        time.sleep(0.01)
    os.killpg(script.pid, signal.SIGINT)                    # as a terminal does: to parent and workers
    err = script.communicate(timeout=60)[1]
    assert script.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    before = json.loads(path.read_text())
    assert len(before["runs"]) < 3
    before["runs"][0]["metrics"]["0"]["fd"] = 123.0         # would be lost, were it run again
    path.write_text(json.dumps(before))
    ablation.main(["--out", str(out), "--rows", "3", "guidance", "9", *FLAGS])
    assert json.loads(path.read_text())["runs"][:len(before["runs"])] == before["runs"]
    return out


def test_equal_rows_are_one_run(out, tmp_path, capsys, monkeypatch):
    """C stands in all three tables, and guides its own students; a finished command runs nothing."""
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert len(runs) == 5                                   # A, B, C, scratch, decode–encode
    assert all(0 <= m["precision"] <= 1 and run["drift"][-1] > 0 for run in runs for m in run["metrics"].values())
    monkeypatch.setattr(ablation.multiprocessing, "get_context", None)
    (out / "guidance.png").unlink()
    ablation.main(["--out", str(out), "--rows", "guidance", *FLAGS])
    assert capsys.readouterr().out.count("| w = ") == 5 and Image.open(out / "guidance.png").width
    done = {ablation.key(run["start"], run["config"]): run for run in runs}
    for flags, missing in (FLAGS, 26 - 5), ([*FLAGS, "--steps", "2"], 26), ([*FLAGS, "--seeds", "3"], 70 - 5):
        assert len(ablation.jobs_to_do(ablation.parse(flags), done)) == missing
    shutil.copy(out / "ablation.json", tmp_path)
    (tmp_path / "teacher.pt").write_bytes(b"another")
    with pytest.raises(ValueError, match="another teacher"):
        ablation.main(["--out", str(tmp_path), *FLAGS])


def test_tables_are_the_naive_ones(tmp_path, capsys):
    """B and C are better than A by as much in the mean; only C is so in every seed."""
    fds = {0: (1, 2, 3), 1: (0.1, 2.3, 3), 2: (0.79, 1.8, 2.81)}
    args, runs = ablation.parse([]), []
    for row, fd in fds.items():
        for cfg, x in zip(ablation.configs(ablation.TABLES["3"][1][row], args), fd):
            runs.append({"start": "teacher", "config": vars(cfg),
                         "metrics": {"0": dict.fromkeys(ablation.METRICS, 0.5) | {"fd": x}}})
    (tmp_path / "ablation.json").write_text(json.dumps({"teacher": "", "runs": runs}))
    ablation.main(["--out", str(tmp_path), "--rows", "3", "--markdown"])
    lines = capsys.readouterr().out.splitlines()[-3:]
    a, b, c = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert a[1:4] == ["3", "2.00 ± 1.00", "0.500 ± 0.000"] and a[-3:] == ["", "reference", "2.01"]
    assert b[-3].startswith("-0.20") and b[-2] == "" and c[-3:] == ["-0.20 ± 0.02", "better", "1.77"]
    assert [file.name for file in tmp_path.iterdir()] == ["ablation.json"]  # nothing was run
    x, y = np.random.default_rng(0).normal(size=(2, 5))
    mean = sum(x - y) / 5
    half = 2.7764451 * np.sqrt(sum((x - y - mean)**2) / 4 / 5)            # Student's t at 97.5 %, df = 4
    x, y = dict(enumerate(x)), dict(enumerate(y)) | {5: 9}                  # a seed of one row does not count
    assert np.allclose(ablation.paired(x, y)[:2], (mean, half), rtol=1e-6)
    assert ablation.paired({0: 1}, {0: 2})[2] == ablation.paired({0: np.nan, 1: 1}, {0: 2, 1: 2})[2] == ""


def test_a_run_that_ends_in_nan_is_kept(teacher, monkeypatch):
    monkeypatch.setattr(ablation, "distil", Mock(side_effect=ValueError("the gradient is NaN")))
    row, args = ablation.TABLES["7"][1][-1], ablation.parse(FLAGS)
    [cfg] = ablation.configs(row, args)
    runs = {ablation.key("teacher", vars(cfg)): ablation.work((teacher, "teacher", cfg, {0.0}))}
    assert np.isnan(ablation.values(row, args, json.loads(json.dumps(runs)))[0])
    ablation.panel("7", args, runs)


def test_decode_encode_drifts_nowhere_for_a_perfect_generator(teacher):
    """G(z) = z of real latents drifts as little as real against real, if the positives were decoded, too."""
    cfg, total = Config(device="cpu"), {}
    student, decoded, _, ours = ablation.prepare(teacher, "pixels", cfg)
    real = ablation.prepare(teacher, "teacher", cfg)[1]         # 20 of each class in turn
    student.student.forward = lambda x, t, y: torch.zeros_like(x)
    through = one_step(student, real, ours["labels"])
    for name, x, y in ("real", real, real), ("both", through, decoded), ("one", through, real):
        total[name] = 0
        for c in range(0, 200, 20):
            gen, pos = tokens(x[c:c + 10]), tokens(y[c + 10:c + 20])
            scale = torch.cdist(gen, torch.cat([gen, pos], 1)).mean()
            total[name] += (drift_field(gen, pos, gen, 0.2, scale) / scale).square().mean()
    assert total["both"] < 1.3 * total["real"] and total["one"] > 4 * total["real"], total
