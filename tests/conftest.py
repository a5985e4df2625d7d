"""What the tests share: a tiny self-contained teacher, and the command as its user meets it."""
import contextlib
import io
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # here and in every process a test starts: only then are bits equal
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

import drift_rae as dr  # noqa: E402
from toy import digits  # noqa: E402

torch.set_num_threads(1)
SCRIPT = Path(dr.__file__)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """toy/digits.py's checkpoint, small, hardly trained, with 20 images a class; in a folder of odd name."""
    path = tmp_path_factory.mktemp("teacher with space ü") / "teacher.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make_judge", partial(digits.make_judge, 20))
        patch.setattr(digits, "ENCODER", digits.ENCODER | dict(depth=1))
        patch.setattr(digits, "DECODER", digits.DECODER | dict(width=32, depth=1, mlp_dim=64))
        patch.setattr(digits, "TEACHER", digits.TEACHER | dict(hidden_size=(32, 48), depth=(1, 1)))
        digits.make_teacher(path, steps=(11, 11, 11))
    saved = torch.load(path, weights_only=True)
    kept = torch.cat([(saved["labels"] == c).nonzero()[:20, 0] for c in range(10)])
    torch.save(saved | {"images": saved["images"][kept], "labels": saved["labels"][kept]}, path)
    return path


@pytest.fixture
def start():
    """start(*flags) runs the script, with ranks=n under torchrun; what lives after the test is killed."""
    started = []

    def start(*flags, ranks=0, **how):
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split() if ranks else []
        started.append(subprocess.Popen([sys.executable, *torchrun, SCRIPT, *map(str, flags)], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def run(*flags):
    dr.main([str(f) for f in flags])


def sentence(*flags):
    """What the command says as it refuses flags: one line, its handler's or, with code 2, argparse's."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        dr.command(partial(run, *flags))
    if stop.value.code == 2:
        return err.getvalue().splitlines()[-1]
    assert len(stop.value.code.splitlines()) == 1
    return stop.value.code      # which sys.exit prints, and exits with 1


def weights(path):
    """Every tensor of a state.pt or student.pt, the optimizer's included."""
    saved = torch.load(path, weights_only=True)
    tree = {part: saved[part] for part in ("ema", "student") if part in saved}
    for i, moments in saved["optimizer"]["state"].items() if "optimizer" in saved else ():
        tree[f"optimizer.{i}"] = moments
    return {f"{part}.{name}": x for part in tree for name, x in tree[part].items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def table(path):
    """log.csv without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]
