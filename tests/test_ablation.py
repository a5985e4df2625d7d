"""toy/ablation.py on a tiny teacher: it goes on after a break, its tables are naive numbers."""
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


def run(out, *flags):
    ablation.main(["--out", str(out), *FLAGS, *flags])


def saved(out):
    """{key: run} in the order in which they were done."""
    return json.loads((out / "ablation.json").read_text())["runs"]


def interrupt_after_first_run(out):
    """Table 3 in a process of its own, Ctrl-C -> what it says."""
    command = [sys.executable, ablation.__file__, "--out", out, "--rows", "3", *FLAGS]
    script = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, start_new_session=True)
    while not (out / "ablation.json").exists() and script.poll() is None:
        time.sleep(0.01)
    os.killpg(script.pid, signal.SIGINT)            # as a terminal does: to parent and workers
    err = script.communicate(timeout=60)[1]
    assert script.returncode == 1, err
    return err


@pytest.fixture(scope="module")
def out(teacher, tmp_path_factory):
    """Table 3, interrupted after its first run; then that, guidance and Table 9."""
    out = tmp_path_factory.mktemp("ablation with space ü")
    shutil.copy(teacher, out / "teacher.pt")
    err = interrupt_after_first_run(out)
    assert "interrupted" in err and "Traceback" not in err, err
    path = out / "ablation.json"
    half = json.loads(path.read_text())
    assert len(half["runs"]) < 3
    first = next(iter(half["runs"].values()))
    first["0.0"]["fd"] = 123.0                      # would be lost, were it run again
    path.write_text(json.dumps(half))
    run(out, "--rows", "3", "guidance", "9")
    assert half["runs"].items() <= saved(out).items()
    return out


def test_equal_rows_are_one_run(out):
    """C stands in all three tables, and guides its own students."""
    runs = saved(out)
    assert len(runs) == 5                           # A, B, C, scratch, decode–encode
    weights = sorted(len(metrics) for metrics in runs.values())
    assert weights == [1, 1, 1, 1, 5]
    for metrics in runs.values():
        assert all(0 <= m["precision"] <= 1 for m in metrics.values())


@pytest.mark.parametrize("flags, missing",
                         [([], 31 - 5), (["--steps", "2"], 31), (["--seeds", "3"], 85 - 5)])
def test_other_steps_and_seeds_are_other_runs(out, flags, missing):
    jobs = ablation.plan(ablation.parse([*FLAGS, *flags]))
    assert len(jobs.keys() - saved(out).keys()) == missing


def test_a_finished_command_runs_nothing(out, capsys, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", None)
    (out / "guidance.png").unlink()
    run(out, "--rows", "guidance")
    assert capsys.readouterr().out.count("| w = ") == 5
    assert Image.open(out / "guidance.png").width


def test_runs_of_another_teacher_are_refused(out, tmp_path):
    shutil.copy(out / "ablation.json", tmp_path)
    (tmp_path / "teacher.pt").write_bytes(b"another")
    with pytest.raises(ValueError, match="another teacher"):
        run(tmp_path)


def results_of(table, fds):
    """What `gather` gives for these Fréchet distances, a list a row; all else is 0.5."""
    results = {}
    for row, fd in zip(ablation.TABLES[table].rows, fds):
        results[row.name] = dict.fromkeys(ablation.METRICS, [0.5] * len(fd)) | {"fd": fd}
    return results


def test_gather_finds_each_rows_values():
    """Of its own run and guidance, in the order of the seeds."""
    args = ablation.parse([])
    runs = {}
    for key, row, cfg in ablation.runs_of(["guidance", "3"], args):
        metrics = dict.fromkeys(ablation.METRICS, 0.5)
        fd = cfg.n_extra_neg + cfg.seed + row.guidance
        runs.setdefault(key, {})[str(row.guidance)] = metrics | {"fd": fd}
    table_3 = ablation.gather("3", args, runs)
    guidance = ablation.gather("guidance", args, runs)
    assert table_3["B: Eq. (11), (12)"]["fd"] == [0, 1, 2]
    assert table_3["C: B at 256/64+192"]["fd"] == [192, 193, 194]
    assert guidance["w = 0.4"]["fd"] == [192.4, 193.4, 194.4]
    assert guidance["w = 0.4"]["recall"] == [0.5, 0.5, 0.5]


def test_a_table_names_what_is_better_in_every_seed(capsys):
    """B and C are better than A by as much in the mean; only C is so in every seed."""
    fds = [1, 2, 3], [0.1, 2.3, 3], [0.79, 1.8, 2.81]
    ablation.show({"3": results_of("3", fds)})
    lines = capsys.readouterr().out.splitlines()[-3:]
    a, b, c = [line.strip("| ").split(" | ") for line in lines]
    assert a[1:4] == ["3", "2.00 ± 1.00", "0.500 ± 0.000"]
    assert a[-3:] == ["", "reference", "2.01"]
    assert b[-3].startswith("-0.20") and b[-2] == ""
    assert c[-3:] == ["-0.20 ± 0.02", "better", "1.77"]


def test_the_interval_is_students_over_pairs():
    x, y = np.random.default_rng(0).normal(size=(2, 5))
    mean = sum(x - y) / 5
    variance = sum((x - y - mean)**2) / 4
    half = 2.7764451 * np.sqrt(variance / 5)        # Student's t at 97.5 %, df = 4
    assert np.allclose(ablation.paired(x, y)[:2], (mean, half), rtol=1e-6)


def test_one_seed_and_nan_give_no_verdict():
    assert ablation.paired([1], [2])[2] == ""
    assert ablation.paired([np.nan, 1], [2, 2])[2] == ""


def test_a_run_that_ends_in_nan_is_kept(teacher, monkeypatch):
    monkeypatch.setattr(ablation, "distil_aside", Mock(side_effect=FloatingPointError("NaN")))
    cfg = Config(device="cpu", steps=1)
    metrics = ablation.work((teacher, "teacher", cfg, {0.0}))
    metrics = json.loads(json.dumps(metrics))
    assert np.isnan(metrics["0.0"]["fd"])


def test_a_row_of_nan_can_be_drawn_and_printed():
    fds = [[1.0]] * 6 + [[np.nan]]
    results = results_of("7", fds)
    ablation.show({"7": results})
    assert ablation.panel("7", results).width


def squared_drift(gen, pos):
    """Of the samples [n,D,h,w] of one class, in the units of the loss."""
    gen, pos = tokens(gen), tokens(pos)
    scale = torch.cdist(gen, torch.cat([gen, pos], 1)).mean()
    V = drift_field(gen, pos, gen, 0.2, scale)
    return (V / scale).square().mean()


def test_decode_encode_drifts_nowhere_for_a_perfect_generator(teacher):
    """G(z) = z of real latents drifts as little as real against real, if all were decoded."""
    cfg = Config(device="cpu")
    student, decoded, _, ours = ablation.prepare(teacher, "pixels", cfg)
    _, real, _, _ = ablation.prepare(teacher, "teacher", cfg)
    student.student.forward = lambda x, t, y: torch.zeros_like(x)
    through = one_step(student, real, ours["labels"])
    both = one = least = 0
    for c in range(0, 200, 20):                     # 20 of each class in turn
        gen, pos = slice(c, c + 10), slice(c + 10, c + 20)
        least += squared_drift(real[gen], real[pos])
        both += squared_drift(through[gen], decoded[pos])
        one += squared_drift(through[gen], real[pos])
    assert both < 1.3 * least, (both, least)
    assert one > 4 * least, (one, least)
