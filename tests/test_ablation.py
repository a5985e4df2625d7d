"""toy/ablation.py on a tiny teacher: it continues after a break, and its tables are right."""
import json
import os
import signal
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import drift_rae as dr
from toy import ablation, runs

FLAGS = ["--seeds", "1", "--steps", "1", "--jobs", "1"]
CPU = dr.Config(device="cpu", perturb=False, temperatures=(0.2,))


def run(out, teacher, *flags):
    helpers.run("--out", out, "--teacher", teacher, *FLAGS, *flags, main=ablation.main)


def saved(out):
    """{key: run} in the order in which they were done."""
    return json.loads((out / "ablation.json").read_text())["runs"]


def interrupt_after_first_run(out, teacher):
    """Start Table 3 as a process and press Ctrl-C -> what the command says."""
    command = [sys.executable, ablation.__file__, "--out", out, "--teacher", teacher, *FLAGS]
    script = subprocess.Popen([*command, "--rows", "3"], text=True, stderr=subprocess.PIPE,
                              start_new_session=True)
    helpers.wait_for(out / "ablation.json", script)
    os.killpg(script.pid, signal.SIGINT)            # as a terminal does: to parent and workers
    err = script.communicate(timeout=60)[1]
    assert script.returncode == 1, err
    return err


@pytest.fixture(scope="module")
def out(teacher, tmp_path_factory):
    """Table 3, interrupted after its first run; then Table 3 again, guidance and later steps."""
    out = tmp_path_factory.mktemp("ablation with space ü")
    err = interrupt_after_first_run(out, teacher)
    assert "interrupted" in err and "Traceback" not in err, err
    path = out / "ablation.json"
    half = json.loads(path.read_text())
    assert len(half["runs"]) < 3
    first = next(iter(half["runs"].values()))
    first["0.0"]["fd"] = 123.0                      # would be lost if it were run again
    path.write_text(json.dumps(half))
    run(out, teacher, "--rows", "3", "guidance", "later")
    assert half["runs"].items() <= saved(out).items()
    return out


def test_equal_rows_are_one_run(out):
    """C stands in both tables, and is guided after its training."""
    done = saved(out)
    assert len(done) == 3 + 4                       # A, B, C, and four times the steps
    weights = sorted(len(metrics) for metrics in done.values())
    assert weights == 6 * [1] + [5]
    for metrics in done.values():
        assert all(0 <= m["precision"] <= 1 for m in metrics.values())


@pytest.mark.parametrize("flags, missing",
                         [([], 27 - 7), (["--steps", "2"], 27), (["--seeds", "2"], 54 - 7)])
def test_other_steps_and_seeds_are_other_runs(out, flags, missing):
    jobs = ablation.plan(ablation.parse([*FLAGS, *flags]))
    assert len(jobs.keys() - saved(out).keys()) == missing


def test_a_finished_command_runs_nothing(out, teacher, capsys, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", None)
    (out / "guidance.png").unlink()
    run(out, teacher, "--rows", "guidance")
    assert capsys.readouterr().out.count("| w = ") == 5
    assert Image.open(out / "guidance.png").width


def test_a_wrong_teacher_is_refused(out, teacher, tmp_path):
    another, other = tmp_path / "another.pt", tmp_path / "other.pt"
    torch.save(helpers.read(teacher), another)      # the same content, but other bytes
    torch.save(helpers.tiny_network().state_dict(), other)
    for path, words in {another: "another teacher", other: "not a teacher of digits",
                        tmp_path / "typo": "typo"}.items():
        said = helpers.refusal("--out", out, "--teacher", path, *FLAGS, main=ablation.main)
        assert words in said


def test_without_out_the_committed_tables_are_printed(monkeypatch, tmp_path, out, capsys):
    monkeypatch.setattr(runs, "RESULTS", out)
    helpers.run(*FLAGS, "--rows", "3", main=ablation.main)
    printed = capsys.readouterr().out
    fd = [metrics["0.0"]["fd"] for metrics in saved(out).values()]
    assert f"{fd[0]:.2f}" in printed
    said = helpers.refusal(*FLAGS, "--rows", "7", main=ablation.main)
    assert "--out" in said and "n_pos=128" in said


def results_of(table, fds):
    """What `gather` gives for these Fréchet distances, one list per row; all else is 0.5."""
    results = {}
    for row, fd in zip(ablation.TABLES[table].rows, fds):
        results[row.name] = dict.fromkeys(ablation.METRICS, [0.5] * len(fd)) | {"fd": fd}
    return results


def test_gather_finds_each_rows_values():
    """They are those of its own run and guidance, in the order of the seeds."""
    args = ablation.parse(["--seeds", "3"])
    done = {}
    for table in ("guidance", "3"):
        for key, row, cfg in ablation.runs_of(table, args):
            metrics = dict.fromkeys(ablation.METRICS, 0.5)
            fd = cfg.n_extra_neg + cfg.seed + row.guidance
            done.setdefault(key, {})[str(row.guidance)] = metrics | {"fd": fd}
    table_3 = ablation.gather("3", args, done)
    guidance = ablation.gather("guidance", args, done)
    assert table_3["B: Eq. (11), (12)"]["fd"] == [0, 1, 2]
    assert table_3["C: B with 256/256"]["fd"] == [192, 193, 194]
    assert guidance["w = 0.4"]["fd"] == [192.4, 193.4, 194.4]
    assert guidance["w = 0.4"]["recall"] == [0.5, 0.5, 0.5]


def test_a_table_names_what_is_better_in_every_seed(capsys):
    """In the mean B and A are better than C by the same amount, but only A is so in every seed."""
    fds = [1, 2, 3], [0.1, 2.3, 3], [0.79, 1.8, 2.81]
    ablation.show({"3": results_of("3", fds)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    c, b, a = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[-3:]]
    assert c[1:3] == ["2.00 ± 1.00", "0.500 ± 0.000"]
    assert c[-4:] == ["", "", "", "1.77"]
    assert b[-4] == "-0.20" and b[-2] == ""
    assert a[-4] == "-0.20" and a[-2:] == ["better", "2.01"]


def test_the_corrected_intervals_are_students_at_holms_levels():
    """Two of three differences are real. Holm tests them at 0.05/3 and 0.05/2, the last at 0.05."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=8)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    found = ablation.holm({"none": 0.1 + noise, "small": 1.5 + noise, "large": noise - 4})
    half = {"large": 3.12764, "small": 2.84124, "none": 2.36462}    # of Student's t, 7 degrees
    centre = {"large": -4, "small": 1.5, "none": 0.1}
    for name, t in half.items():
        low, high, _ = found[name]
        assert (low, high) == pytest.approx((centre[name] - t / 8**0.5, centre[name] + t / 8**0.5),
                                            abs=1e-4)
    assert [found[name][2] for name in half] == ["better", "worse", ""]


def test_holm_stops_at_the_first_difference_that_fails():
    """Each would pass alone at 0.05, but the smallest p-value fails at 0.05/2."""
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    noise = x - x.mean()
    found = ablation.holm({"a": noise + 2.2, "b": noise + 2.15})
    assert found["a"][2] == found["b"][2] == ""
    assert ablation.holm({"a": noise + 2.2})["a"][2] == "worse"


def test_one_seed_and_nan_give_no_interval():
    assert ablation.holm({"a": np.array([1.0]), "b": np.array([np.nan, 1.0])}) == {}


def test_kendalls_order_is_one_for_the_papers_order_and_less_for_another():
    same = results_of("7", [[float(i)] for i in range(7)])
    assert ablation.order("7", same) == pytest.approx((1, 2 / 5040))
    swapped = results_of("7", [[float(i)] for i in (1, 0, 2, 3, 4, 5, 6)])
    assert ablation.order("7", swapped)[0] == pytest.approx(1 - 4 / 42)


def test_a_run_that_diverges_is_kept_as_nan(teacher):
    cfg = dr.Config(device="cpu", steps=3, n_class=2, lr=1e9)
    metrics = ablation.distil_and_measure((teacher, "teacher", "latents", cfg, {0.0}))
    metrics = json.loads(json.dumps(metrics))
    assert np.isnan(metrics["0.0"]["fd"])


def test_a_row_of_nan_can_be_drawn_and_printed():
    fds = [[1.0, 2.0]] + 5 * [[2.0, 2.5]] + [[np.nan, 1.0]]
    results = results_of("7", fds)
    ablation.show({"7": results})
    assert ablation.draw_differences({"7": results}).width


def test_decode_encode_drifts_nowhere_for_a_perfect_generator(teacher):
    """Real latents drift as little against others of their class as they do without decoding."""
    _, rae, checkpoint = runs.open_teacher(teacher)
    real = checkpoint["latents"].float()
    decoded = rae.encode(rae.decode(real))
    least = both = one = 0
    for c in range(0, 200, 20):                     # 20 of each class in turn
        gen, pos, none = slice(c, c + 10), slice(c + 10, c + 20), real[:0]
        _, info = dr.latent_loss(real[gen], real[pos], none, CPU, None)
        least += info["V_0.2"]**2
        _, info = ablation.decode_encode_loss(real[gen], real[pos], none, CPU, None, rae)
        both += info["V_0.2"]**2
        _, info = dr.latent_loss(decoded[gen], real[pos], none, CPU, None)
        one += info["V_0.2"]**2
    assert both < 1.3 * least, (both, least)
    assert one > 4 * least, (one, least)


def test_the_gradient_field_trains_windows_too():
    """With equal weights, the loss is that of dr.drift_loss over both sizes of windows."""
    cfg = dr.Config(device="cpu", windows=(1, 2))
    gen, pos, extra = torch.randn(3, 6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    loss, info = runs.gradient_loss(gen, pos, extra, cfg, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    expected = 0
    for window in (1, 2):
        parts = [dr.tokens(x, window) for x in (gen, pos, extra)]
        one, one_info = dr.drift_loss(*parts, field=runs.gradient_field, generator=g)
        expected += one.mean()
    assert loss == expected
    assert info["V_0.05"] == one_info["V_0.05"]
