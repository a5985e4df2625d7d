"""Measures speeds and memory on this machine (a script, not a test). Run it on an idle machine.

    python tests/bench.py                 the digits: a training step, its parts, the drift loss
                                          at the paper's size, the Fréchet distance
    python tests/bench.py --size imagenet256 [--compile] [--grad-checkpoint]    the paper's run
    python tests/bench.py --rehearse      drift_rae.py itself with DiT^DH-S, on the CPU

Random weights of the true sizes cost as much time and memory as trained ones. For imagenet256 a
CPU only prints the numbers of parameters and of floating-point operations (FLOPs). A GPU also
measures the time of one class of a step, of its parts and of sampling, and the peak memory, and
works out the hours of the whole run.

The rehearsal writes files as they were released, but with random weights, and a few JPEG images.
Then it runs the commands of the README: a training step, a break, the rest of the run, samples.
It needs 11 GB in the folder for temporary files (TMPDIR chooses another one), and removes them.
"""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
import helpers  # noqa: E402
from eval_fid import frechet_distance  # noqa: E402
from toy.digits import DECODER, ENCODER, TEACHER  # noqa: E402

# The sizes of the teacher, the encoder and the decoder, and the pixels that the encoder sees.
SIZES = {"digits": (TEACHER, ENCODER, DECODER, 28),
         "imagenet256": (dr.DITDH_XL, dr.VIT_B14, dr.DECODER_XL, 224)}


def seconds_of(function):
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(repeats, functions):
    """{name: function} -> {name: median seconds}.

    The functions take turns, so that other work on the machine slows all of them alike.
    """
    for function in functions.values():
        function()                          # the first call also compiles and allocates
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return {name: median(values) for name, values in seconds.items()}


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def build(size, device):
    """-> DiT^DH and RAE with random weights. On the device "meta" they have only shapes."""
    teacher, encoder, decoder, input_size = SIZES[size]
    side = teacher["input_size"]
    shape = (teacher["in_channels"], side, side)
    with torch.device(device):
        model = dr.DiTDH(**teacher).eval()
        mean, var = torch.zeros(shape), torch.ones(shape)
        rae = dr.RAE(dr.ViT(**encoder), dr.Decoder(**decoder), mean, var, input_size)
    return model, rae


def class_flops(size, cfg):
    """-> {part of the work for one class of a step: its FLOPs}, counted on the meta device."""
    model, rae = build(size, "meta")
    side = rae.decoder.image_size
    z = torch.empty(1, *rae.mean.shape, device="meta")
    y = torch.zeros(1, dtype=torch.long, device="meta")
    image = torch.empty(1, 3, side, side, device="meta")
    forward = flops(partial(dr.one_step, model, z, y))
    encoding = flops(partial(rae.encode, image))
    passes = 3 * cfg.n_neg + cfg.n_extra_neg        # a backward pass costs two forward passes
    if cfg.grad_checkpoint:
        passes += cfg.n_neg                         # the forward pass is computed once more
    print(f"DiT^DH has {millions(model):.1f} M parameters, the autoencoder {millions(rae):.1f} M")
    return {"generator": passes * forward, "encoder": cfg.n_pos * encoding}


def time_class(size, cfg):
    """-> {name: median seconds} of steps of one class and of two, of their parts, of sampling."""
    model, rae = build(size, cfg.device)
    student, ema, optimizer = dr.prepare(model, cfg)
    del model                               # a real run does not keep the teacher, either
    student.recompute = cfg.grad_checkpoint
    if cfg.compile:
        student.compile(dynamic=False)
    side = rae.decoder.image_size
    images = torch.randint(256, (cfg.n_pos, side, side, 3), dtype=torch.uint8)
    normal = partial(torch.randn, device=cfg.device)
    pos = normal(cfg.n_pos, *rae.mean.shape)
    gen = normal(cfg.n_neg, *rae.mean.shape)
    extra = normal(cfg.n_extra_neg, *rae.mean.shape)
    z = normal(cfg.batch_size, *rae.mean.shape)
    labels = torch.zeros(cfg.batch_size, dtype=torch.long)
    labels_there = labels.to(cfg.device)

    def step(classes):
        positives = iter([(label, pos) for label in range(classes)])
        dr.train_step(student, ema, optimizer, positives, 0, replace(cfg, n_class=classes))

    def drift():
        dr.drift_loss(dr.tokens(gen), dr.tokens(pos), dr.tokens(extra))

    @torch.no_grad()
    def one_step():
        with dr.autocast(cfg):
            dr.one_step(ema, z, labels_there)

    sampler = partial(dr.one_step, ema)
    parts = {"one": partial(step, 1), "two": partial(step, 2), "drift": drift}
    parts["encoder"] = partial(dr.encode, rae, images, cfg)
    parts["one step"] = one_step
    parts["decoder"] = partial(rae.decode, z)
    parts["images"] = partial(dr.generate, sampler, rae, labels, cfg)
    return medians(5, parts)


def bench_class(size, cfg):
    """Print the time of a class, its parts, the optimizer and sampling -> seconds of a class."""
    seconds = time_class(size, cfg)
    a_class = seconds["two"] - seconds["one"] + seconds["encoder"]
    optimizer = max(0.0, 2 * seconds["one"] - seconds["two"])
    hours = cfg.steps * (cfg.n_class * a_class + optimizer) / 3600
    encoder_share = seconds["encoder"] / a_class
    drift_share = seconds["drift"] / a_class
    print(f"one class takes {1e3 * a_class:.1f} ms, of which the encoder takes "
          f"{encoder_share:.1%} and the drift {drift_share:.1%}")
    print(f"the optimizer takes {1e3 * optimizer:.1f} ms per step of {cfg.n_class} classes")
    print(f"{cfg.steps} steps take {hours:.3g} hours on one such device")
    print(f"sampling in batches of {cfg.batch_size}, images per second:")
    for name in ("one step", "decoder", "images"):
        print(f"    {name:9} {cfg.batch_size / seconds[name]:.0f}")
    return a_class


def bench_loss(device, n_tokens=256, n_neg=64, n_extra_neg=192, n_pos=256, dim=768):
    """Print the time of drift_loss at the paper's size, beside that of its matrix products."""
    normal = partial(torch.randn, device=device)
    gen = normal(n_tokens, n_neg, dim, requires_grad=True)
    extra_neg = normal(n_tokens, n_extra_neg, dim)
    pos = normal(n_tokens, n_pos, dim)
    x = gen.detach()
    targets = torch.cat([x, extra_neg, pos], 1)
    weights = normal(n_tokens, n_neg, targets.shape[1])

    def products():
        for _ in range(4):                  # distances: for S, then for each temperature
            x @ targets.mT
        for _ in range(3):                  # weighted sums: for each temperature
            weights @ targets

    loss = partial(dr.drift_loss, gen, pos, extra_neg)
    seconds = medians(5, {"its 7 matrix products": products, "drift_loss": loss,
                          "with Deng et al.'s field": partial(
                              loss, field=dr.y_softmax_field, perturb=False)})
    print(f"drift_loss: {n_tokens} tokens, {n_neg} + {n_extra_neg} samples, {n_pos} positives, "
          f"D = {dim}, float32, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        ratio = value / seconds["its 7 matrix products"]
        print(f"    {name:24} {value:7.3f} s, {ratio:.2f} times the products")


def sqrtm_distance(mu1, sigma1, mu2, sigma2):
    """The Fréchet distance as pytorch-fid computes it."""
    root = sqrtm(sigma1 @ sigma2).real
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
    return np.square(mu1 - mu2).sum() + traces


def bench_frechet(dim=2048):
    rng = np.random.default_rng(0)
    statistics = []
    for _ in range(2):
        x = rng.standard_normal((2 * dim, dim)) * np.linspace(1, 0.1, dim)
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    ours, theirs = frechet_distance(*statistics), sqrtm_distance(*statistics)
    seconds = medians(3, {"ours": partial(frechet_distance, *statistics),
                          "sqrtm": partial(sqrtm_distance, *statistics)})
    ratio = seconds["sqrtm"] / seconds["ours"]
    print(f"Fréchet distance, D = {dim}: {seconds['ours']:.2f} s; sqrtm takes {ratio:.1f} times as "
          f"long; the results differ by a fraction of {abs(ours / theirs - 1):.0e}")


def product_rate(n=8192):
    """-> FLOPs per second of a large bf16 matrix product."""
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    seconds = medians(10, {"product": partial(torch.mm, a, a)})
    return 2 * n**3 / seconds["product"]


def print_gpu(rate):
    """Compare the FLOPs per second of a class with those of a product; print the memory."""
    name = torch.cuda.get_device_name()
    memory = torch.cuda.max_memory_allocated() / 1e9
    product = product_rate()
    print(f"{name}: a bf16 product reaches {product / 1e12:.0f} TFLOP/s, a class "
          f"{rate / product:.0%} of that; at most {memory:.1f} GB")


# ---- The rehearsal

GB = 1e9
CLASSES = (207, 985)                        # golden retriever and daisy
HERE = Path(__file__).resolve().parent


def save_random(path, shapes):
    """Write a state dict of small random numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state_dict = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
    torch.save(state_dict, path)


def save_released(models, teacher):
    """Write the four released files, with random weights."""
    released = json.loads((HERE / "golden" / "released.json").read_text())
    with torch.device("meta"):
        encoder = dr.ViT(**dr.VIT_B14).state_dict()
    save_random(teacher, released["DiTDH-S"])
    save_random(models / helpers.DECODER, released["ViTXL_n08"])
    save_random(models / helpers.ENCODER, {key: x.shape for key, x in encoder.items()})
    statistics = models / helpers.STATISTICS
    statistics.parent.mkdir(parents=True)
    torch.save({"mean": None, "var": torch.ones(768, 16, 16)}, statistics)


def save_images(folder, n_each=8):
    """Write JPEG images of blurred noise, a folder per class, named by the class's number."""
    rng = np.random.default_rng(0)
    for label in CLASSES:
        (folder / str(label)).mkdir(parents=True)
        for i in range(n_each):
            noise = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((500, 400), Image.BICUBIC)
            image.save(folder / str(label) / f"{i}.JPEG")


def run_script(name, flags, until=None):
    """Run drift_rae.py as a process, or kill it as soon as the file `until` is there.

    Print its seconds, those of the processor alone and its memory, in which the files that it maps
    count, too. All this comes from wait4, which does not exist on Windows.
    """
    began = time.perf_counter()
    command = [sys.executable, dr.__file__, *map(str, flags)]
    process = subprocess.Popen(command)
    pid = 0                                 # 0: the process still runs
    while pid == 0:
        if until is not None and until.exists():
            os.kill(process.pid, signal.SIGKILL)        # as sudden as a power cut
        time.sleep(0.1)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    killed = until is not None and process.returncode == -signal.SIGKILL
    if process.returncode != 0 and not killed:
        sys.exit(f"the rehearsal failed: {name}")
    unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss, in bytes
    memory = unit * usage.ru_maxrss / GB
    print(f"{name:40} {time.perf_counter() - began:6.0f} s, processor "
          f"{usage.ru_utime + usage.ru_stime:4.0f} s, at most {memory:.1f} GB", flush=True)


def rehearse(folder):
    """The README's commands for ImageNet, at the true sizes, but with few and random images."""
    models, images, out = folder / "models", folder / "train", folder / "out"
    teacher = models / "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"
    began = time.perf_counter()
    # A process of its own gives all of its memory back when it ends.
    writer = multiprocessing.Process(target=save_released, args=(models, teacher))
    writer.start()
    writer.join()
    save_images(images)
    print(f"{'writing random weights and images':40} {time.perf_counter() - began:6.0f} s")

    where = ["--out", out, "--models", models, "--device", "cpu"]
    small = "--n-class 2 --n-pos 8 --n-neg 4 --n-extra-neg 4 --batch-size 4 --workers 1".split()
    run = ["--preset", "imagenet256", "--teacher", teacher, "--data", images, *small]
    run += ["--dtype", "fp32", "--steps", 2, "--save-every", 1]
    state, picture = out / "state.pt", folder / "samples.png"
    run_script("step 1, its state, then a kill", run + where, until=state)
    run_script("--resume: step 2, its state, a picture", ["--resume", *where])
    run_script("--sample 4", ["--sample", 4, "--to", picture, *where])

    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True)
    print(f"state.pt has {state.stat().st_size / GB:.2f} GB; the losses are "
          f"{log['loss'][0]:.4f} and {log['loss'][1]:.4f}; the picture of the samples has "
          "{} × {} pixels".format(*Image.open(picture).size))


def rehearse_in_temporary_folder(needed=11):
    free = shutil.disk_usage(tempfile.gettempdir()).free / GB
    if free < needed:
        sys.exit(f"the rehearsal needs {needed} GB in {tempfile.gettempdir()}, where {free:.1f} GB "
                 "are free: choose another folder with TMPDIR")
    print(f"DiT^DH-S on the CPU, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        rehearse(Path(folder))


# ---- The command


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="digits", help="sizes of the networks")
    parser.add_argument("--compile", action="store_true", help="compile the student")
    parser.add_argument("--grad-checkpoint", action="store_true",
                        help="recompute blocks in the backward pass: less memory")
    parser.add_argument("--rehearse", action="store_true",
                        help="run the commands for ImageNet on the CPU, with random weights")
    args = parser.parse_args()
    if args.rehearse:
        return rehearse_in_temporary_folder()
    gpu = torch.cuda.is_available()
    settings = {"compile": args.compile, "grad_checkpoint": args.grad_checkpoint,
                "device": "cuda" if gpu else "cpu"}
    cfg = dr.Config(**dr.PRESETS[args.size] | settings)
    parts = class_flops(args.size, cfg)
    total = sum(parts.values())
    encoder_share = parts["encoder"] / total
    print(f"one class takes {total / 1e12:.4g} TFLOPs, of which the encoder takes "
          f"{encoder_share:.1%}")
    print(f"a step of {cfg.n_class} classes takes {cfg.n_class * total / 1e12:.4g} TFLOPs")
    if args.size == "imagenet256" and not gpu:
        return print("seconds, memory and hours are measured on a GPU only")
    rate = total / bench_class(args.size, cfg)
    print(f"a class runs at {rate / 1e12:.3g} TFLOPs per second")
    if gpu:
        print_gpu(rate)
    bench_loss(cfg.device)
    bench_frechet()


if __name__ == "__main__":
    main()
