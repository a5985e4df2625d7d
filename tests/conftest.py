"""What the tests share: a tiny self-contained teacher, and the command as its user meets it."""
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # in every process a test starts: only then are bits equal
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the CPU: two processes would ask for two GPUs
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import drift_rae as dr  # noqa: E402
from toy import digits  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)    # after a shell's &, all would ignore it
torch.set_num_threads(1)
SCRIPT = Path(dr.__file__)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """toy/digits.py's file, small, hardly trained, 20 images a class; in a folder of odd name."""
    path = tmp_path_factory.mktemp("teacher with space ü") / "teacher.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make_judge", partial(digits.make_judge, 20))
        patch.setitem(digits.ENCODER, "depth", 1)
        for name, value in {"width": 32, "depth": 1, "mlp_dim": 64}.items():
            patch.setitem(digits.DECODER, name, value)
        for name, value in {"hidden_size": (32, 48), "depth": (1, 1)}.items():
            patch.setitem(digits.TEACHER, name, value)
        digits.make_teacher(path, steps=(11, 11, 11))
    saved = torch.load(path, weights_only=True)
    images, labels = saved["images"], saved["labels"]
    first = torch.cat([torch.nonzero(labels == c)[:20, 0] for c in range(10)])
    torch.save(saved | {"images": images[first], "labels": labels[first]}, path)
    return path


@pytest.fixture
def start():
    """start(*flags) runs the script in a session of its own, with ranks=n under torchrun."""
    started = []

    def start(*flags, ranks=0, script=SCRIPT):
        torchrun = []
        if ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *torchrun, script, *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:     # what outlives its test
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def names(folder):
    return {path.name for path in folder.iterdir()}


def run(*flags):
    dr.main([str(flag) for flag in flags])


def sentence(*flags):
    """What the command says as it refuses flags: one line, its handler's or argparse's (code 2)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        dr.command(partial(run, *flags))
    if stop.value.code == 2:
        return err.getvalue().splitlines()[-1]
    assert len(stop.value.code.splitlines()) == 1
    return stop.value.code      # which sys.exit prints, and exits with 1


def interrupted(step, *flags):
    """What the command says as Ctrl-C comes at a step."""
    train_step = dr.train_step

    def broken(student, ema, optimizer, batch, at, cfg):
        if at == step:
            raise KeyboardInterrupt
        return train_step(student, ema, optimizer, batch, at, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dr, "train_step", broken)
        return sentence(*flags)


def weights(path):
    """Every tensor of a state.pt or student.pt, the optimizer's included."""
    saved = torch.load(path, weights_only=True)
    tensors = {}
    for part in ("ema", "student"):
        for name, x in saved.get(part, {}).items():
            tensors[f"{part}.{name}"] = x
    moments = saved.get("optimizer", {"state": {}})["state"]
    for i in moments:
        for name, x in moments[i].items():
            tensors[f"optimizer.{i}.{name}"] = x
    return tensors


def difference(a, b):
    """Of two state.pt or student.pt: the largest between two numbers; 0 where all are equal."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    largest = 0
    for name in a:
        error = (a[name] - b[name]).abs().max().item()
        largest = max(largest, error)
    return largest


def steps_saved(out):
    return len(torch.load(out / "state.pt", weights_only=True)["log"])


def table(out):
    """OUT/log.csv without its last column, the seconds."""
    lines = (out / "log.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


def assert_same_run(a, b):
    """Two OUTs, bit for bit; the second's seconds go on over a break."""
    assert difference(a / "state.pt", b / "state.pt") == 0
    assert difference(a / "student.pt", b / "student.pt") == 0
    assert table(a) == table(b)
    seconds = np.loadtxt(b / "log.csv", delimiter=",", skiprows=1, usecols=-1, ndmin=1)
    assert (np.diff(seconds) > 0).all()
