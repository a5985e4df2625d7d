"""The teacher in the box: 5,000 real digits -> a tiny RAE, a flow model in its latents, a judge.

    python toy/digits.py --out DIR [--seed S]      trains them and writes DIR/teacher.pt
    python toy/digits.py                           prints the students' results in toy/results

toy/teacher.pt was made by this command, and `python drift_rae.py` distils it.

The encoder of an RAE must bring images of a class together. DINOv2 does; here a small ViT stands in
for it, which is trained to classify the digits. Classification alone would collapse each class to
a point, so the ViT also learns to reconstruct the pixels from its tokens linearly.

The judge is a small classifier of the digits. Samples are measured in its features, as FID measures
images in the features of an Inception network; these distances are no FIDs.

mnist.png: MNIST, Y. LeCun, C. Cortes, C. J. C. Burges, CC BY-SA 3.0. A row is a class, 500 tiles.
"""
import argparse
import json
import platform
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from eval_fid import frechet_distance, mean_and_covariance, precision_recall  # noqa: E402
from toy.plot import note, panels, sheet, write_gif  # noqa: E402

ENCODER = dict(img_size=28, patch_size=14, embed_dim=64, depth=3, num_heads=4, num_registers=4,
               mlp_ratio=4)
DECODER = dict(latent_dim=64, width=128, depth=3, num_heads=4, mlp_dim=256, patch_size=14, grid=2)
TEACHER = dict(input_size=2, in_channels=64, hidden_size=(96, 128), depth=(3, 1), num_heads=(4, 4),
               num_classes=10)
STEPS = (2000, 5000, 30000)     # of encoder, decoder and teacher
GUIDANCE = 0.05                 # of the report's last row
EIGHTY = torch.arange(10).repeat_interleave(8)      # the classes of the digits in the pictures


def load_digits():
    """-> images uint8 [5000,28,28,3], black 0 and white 255; labels int64 [5000]."""
    sheet = np.array(Image.open(Path(__file__).with_name("mnist.png")))
    tiles = sheet.reshape(10, 28, 500, 28).swapaxes(1, 2)       # [10,500,28,28]
    channel = torch.from_numpy(tiles).reshape(5000, 28, 28)
    images = torch.stack([channel, channel, channel], -1)
    return images, torch.arange(10).repeat_interleave(500)


def grey(images):
    """uint8 [n,28,28,3] -> [n,1,28,28] in [0,1]."""
    return images.permute(0, 3, 1, 2)[:, :1] / 255


def distorted(images):
    """Images [B,C,H,W], each under a random affine map close to the identity."""
    maps = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# ---- Training: the RAE, the flow teacher, the judge


def fit(params, loss, n, steps, lr, name, batch=256, after_step=None):
    """AdamW with a one-cycle learning rate on loss(i), where i are `batch` random indices below n.

    after_step(), if given, is called after each step.
    """
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1,
                                                   cycle_momentum=False)
    for _ in trange(steps, desc=name, disable=None):
        value = loss(torch.randint(n, (batch,)))
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        if not norm.isfinite():
            raise dr.UserError(f"the training of the {name} diverged: try another --seed")
        optimizer.step()
        schedule.step()
        if after_step:
            after_step()


def pixel_logits(images):
    """What RAE.decode passes through a sigmoid: the logit of a pixel is 6x − 3."""
    return 6 * images - 3


def make_rae(images, labels, steps):
    """Train the encoder, then the decoder -> the RAE as a checkpoint holds it.

    images [n,3,28,28] in [0,1]; steps of encoder and decoder.
    """
    dim, patch = ENCODER["embed_dim"], ENCODER["patch_size"]
    encoder, decoder = dr.ViT(**ENCODER), dr.Decoder(**DECODER)
    classify = nn.Linear(4 * dim, 10)
    reconstruct = nn.Linear(dim, patch**2)
    mean, var = torch.zeros(dim, 2, 2), torch.ones(dim, 2, 2)
    rae = dr.RAE(encoder, decoder, mean, var, input_size=28)

    def encoder_loss(i):
        x = distorted(images[i])
        tokens = rae.encode(x).flatten(2).mT                    # [B,4,D]
        patches = F.unfold(x[:, :1], patch, stride=patch).mT    # [B,4,196]
        class_loss = F.cross_entropy(classify(tokens.flatten(1)), labels[i])
        pixel_loss = F.mse_loss(reconstruct(tokens), patches)
        return class_loss + 100 * pixel_loss                    # with 10, strokes would be lost

    learned = nn.ModuleList([encoder, classify, reconstruct]).requires_grad_(True)
    fit(learned.parameters(), encoder_loss, len(images), steps[0], 2e-3, "encoder")
    with torch.no_grad():
        latents = rae.encode(images)
    mean, var = latents.mean(0), latents.var(0)
    rae = dr.RAE(encoder, decoder, mean, var, input_size=28)    # freezes both networks
    latents = rae.encode(images)

    def decoder_loss(i):
        # The latents are noisy, as in the RAE paper: the decoder must mend what a generator gets
        # slightly wrong.
        level = 0.6 * torch.rand(len(i), 1, 1, 1)
        noise = level * torch.randn_like(latents[i])
        logits = pixel_logits(rae.decode(latents[i] + noise))
        return F.binary_cross_entropy_with_logits(logits, images[i])

    decoder.requires_grad_(True)
    fit(decoder.parameters(), decoder_loss, len(images), steps[1], 2e-3, "decoder", batch=128)
    saved = {"encoder_args": ENCODER, "decoder_args": DECODER, "input_size": 28, "sigmoid": True}
    weights = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    return saved | weights | {"mean": mean, "var": var}


def train_flow(model, latents, labels, steps, lr=2e-3, batch=128, decay=0.999, seed=0):
    """Train a flow model on latents [n,D,h,w] -> the moving average of its weights."""
    torch.manual_seed(seed)
    ema = deepcopy(model).requires_grad_(False).eval()

    def loss(i):
        return dr.flow_matching_loss(model, latents[i], labels[i])

    average = partial(dr.update_average, ema, model, decay)
    fit(model.parameters(), loss, len(latents), steps, lr, "teacher", batch, average)
    return ema


def judge_network():
    """Grey images [n,1,28,28] -> logits [n,10]. The layers before the last give the features."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.GELU(),
        nn.Linear(64, 10))


def make_judge(steps=500):
    """Train the judge. Its seed is fixed: all runs are measured by the same judge."""
    torch.manual_seed(0)
    images, labels = load_digits()
    pixels = grey(images)
    judge = judge_network()

    def loss(i):
        logits = judge(distorted(pixels[i]))
        return F.cross_entropy(logits, labels[i])

    fit(judge.parameters(), loss, len(images), steps, 2e-3, "judge", batch=128)
    return judge


def make_teacher(path, seed=0, steps=STEPS):
    """Train everything and write the checkpoint. It holds the latents, not the images."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    images, labels = load_digits()
    pixels = images.permute(0, 3, 1, 2) / 255
    rae = make_rae(pixels, labels, steps[:2])
    checkpoint = {"rae": rae}
    # Half precision halves the file. The flow is trained on these same rounded numbers.
    latents = dr.load_autoencoder(checkpoint, path, "").encode(pixels).half()
    torch.manual_seed(seed)
    flow = dr.DiTDH(**TEACHER)
    teacher = train_flow(flow, latents.float(), labels, steps[2], seed=seed)
    checkpoint |= {"ema": teacher.state_dict(), "latents": latents, "labels": labels}
    checkpoint["judge"] = make_judge().state_dict()
    checkpoint["recipe"] = {"seed": seed, "steps": list(steps), "torch": str(torch.__version__),
                            "threads": torch.get_num_threads(), "machine": platform.platform(),
                            "seconds": time.perf_counter() - began}
    dr.save(path, partial(torch.save, checkpoint))


# ---- Measuring


class Metrics:
    """Compares images with R, every other one of the real digits. `others` is the other half.

    Called with images uint8 [n,28,28,3] and the labels [n] that were asked for, it returns
    fd              Fréchet distance to R in the judge's features; lower is better
    precision       share of the images that lie where R has images (k = 3)
    recall          share of R that lies where the images are
    label_accuracy  how often the judge assigns an image to the class that was asked for
    nearest_real    median distance in pixels to the nearest image of R, divided by that within R:
                    0 for copies of R, about 1 for new digits
    """

    def __init__(self, checkpoint):
        self.judge = judge_network().requires_grad_(False).eval()
        self.judge.load_state_dict(checkpoint["judge"])
        images, labels = load_digits()
        self.images, self.labels = images[::2], labels[::2]     # R
        self.others = images[1::2], labels[1::2]
        self.pixels, self.features, _ = self.judged(self.images)
        distance = torch.cdist(self.pixels, self.pixels)
        distance.fill_diagonal_(torch.inf)
        self.spacing = distance.amin(1).median()

    def judged(self, images):
        """-> grey pixels [n,784], features [n,64], the classes [n] that the judge sees."""
        pixels = grey(images)
        features = self.judge[:-1](pixels)
        logits = self.judge[-1](features)
        return pixels.flatten(1), features, logits.argmax(1)

    def __call__(self, images, labels):
        pixels, features, classes = self.judged(images)
        statistics = mean_and_covariance(features)
        fd = frechet_distance(*statistics, *mean_and_covariance(self.features))
        precision, recall = precision_recall(self.features, features)
        accuracy = (classes == labels).double().mean()
        nearest = torch.cdist(pixels, self.pixels).amin(1).median()
        return {"fd": fd, "precision": precision, "recall": recall,
                "label_accuracy": accuracy.item(), "nearest_real": (nearest / self.spacing).item()}


def film(steps, ema, rae, cfg, first_step):
    """Yield what `steps` yields; at the end, write OUT/training.gif, a film of the student.

    Its frames show the digits that the student makes of the same 80 noises: before the training,
    when the student is still the teacher, after each of the first 20 steps, which change most, and
    then after every few steps. The film of a resumed run begins where it was resumed.
    """
    def look(step):
        images = dr.generate(partial(dr.one_step, ema), rae, EIGHTY, cfg)
        frame = panels({f"one evaluation, after {step} training steps": images}, rows=5)
        return frame.quantize(16)                               # shades of grey

    frames = [look(first_step)]
    every = max(1, cfg.steps // 30)
    for step, log in steps:
        yield step, log
        done = step + 1
        if done <= 20 or done % every == 0 or done == cfg.steps:
            frames.append(look(done))
    if len(frames) > 1:
        dr.save(Path(cfg.out, "training.gif"), partial(write_gif, frames=frames))


TITLES = {"real": "real digits", "teacher_1step": "teacher, 1 evaluation",
          "teacher_50step": "teacher, 49 evaluations", "student_1step": "student, 1 evaluation"}


def draw_samples(rows, samplers, real, rae, cfg):
    """Real digits, and those of the models, which all start from the same 80 noises."""
    shown = {}
    for name, title in TITLES.items():
        images = real
        if name in samplers:
            images = dr.generate(samplers[name], rae, EIGHTY, cfg)
        shown[f"{title}\ndistance {rows[name]['fd']:.2f}"] = images
    picture = panels(shown, rows=10)
    words = {"The last three panels start from the same noise, digit by digit.": "black"}
    return sheet([picture, note(words, (picture.width, 60), 30)], 1)


def report(student, rae, checkpoint, cfg, log, began):
    """Measure student and teacher; write OUT/samples.png and metrics.json; print the table.

    Every row compares 2,500 images with R. "real" is the other half of the digits,
    "reconstruction" is R through encoder and decoder. The models were trained on both halves.
    """
    out = Path(cfg.out)
    measure = Metrics(checkpoint)
    teacher = dr.read_network(checkpoint, cfg.teacher).to(cfg.device)
    samplers = {"teacher_1step": partial(dr.one_step, teacher),
                "teacher_50step": partial(dr.ode_sample, teacher, steps=50),
                "student_1step": partial(dr.one_step, student),
                "student_guided": partial(dr.one_step, dr.guide(student, GUIDANCE))}
    labels = measure.labels
    rebuilt = dr.to_uint8(rae.decode(dr.encode(rae, measure.images, cfg)))
    rows = {"real": measure(*measure.others), "reconstruction": measure(rebuilt, labels)}
    for name, sampler in samplers.items():
        dr.generate(sampler, rae, labels[:cfg.batch_size], cfg)     # warm up, before the clock
        start = time.perf_counter()
        images = dr.generate(sampler, rae, labels, cfg)
        seconds = time.perf_counter() - start
        rows[name] = measure(images, labels) | {"seconds_per_image": seconds / len(labels)}

    real, _ = measure.others
    eight = real.unflatten(0, (10, -1))[:, :8].flatten(0, 1)    # of each class
    picture = draw_samples(rows, samplers, eight, rae, cfg)
    dr.save(out / "samples.png", partial(picture.save, format="PNG"))
    seconds = {"distil": log[-1]["seconds"], "total": time.perf_counter() - began}
    everything = rows | {"config": vars(cfg), "seed": cfg.seed, "seconds": seconds,
                         "versions": {"torch": str(torch.__version__)}}
    text = json.dumps(everything, indent=1)
    dr.save(out / "metrics.json", lambda file: file.write(text.encode()))
    print_table(rows)
    print(f"\nwritten to {out}: samples.png, training.gif, metrics.json, student.pt "
          f"({seconds['total']:.0f} s)")


DECIMALS = {"fd": 2, "precision": 3, "recall": 3, "label_accuracy": 3, "nearest_real": 2}
ROWS = {"real": "real digits, the other half", "reconstruction": "real digits, through the RAE",
        "teacher_1step": "teacher, 1 evaluation", "teacher_50step": "teacher, 49 evaluations",
        "student_1step": "**student, 1 evaluation**",
        "student_guided": "student, guidance 0.05, 1 evaluation"}


def print_table(rows):
    """rows: {name: what Metrics returns, perhaps with seconds_per_image}."""
    print("\n                  Fréchet    prec.   recall    label  nearest ms/image")
    for name, row in rows.items():
        line = f"{name:16}"
        for metric in DECIMALS:
            line += f" {row[metric]:8.3f}"
        if "seconds_per_image" in row:
            milliseconds = 1e3 * row["seconds_per_image"]
            line += f" {milliseconds:8.3f}"
        print(line)


def print_seeds():
    """Print means over toy/results/digits_*.json, which are the metrics.json of several seeds."""
    paths = Path(__file__).with_name("results").glob("digits_*.json")
    seeds = [json.loads(path.read_text()) for path in paths]
    print("| | distance ↓ | precision | recall | label accuracy | nearest |")
    print("|---|---|---|---|---|---|")
    for name, title in ROWS.items():
        line = f"| {title} |"
        for metric, decimals in DECIMALS.items():
            values = np.array([rows[name][metric] for rows in seeds])
            line += f" {values.mean():.{decimals}f}"
            if np.ptp(values) > 1e-4:                           # the real digits have no seeds
                line += f" ± {values.std(ddof=1):.{decimals}f}"
            line += " |"
        print(line)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="train, and write teacher.pt into this folder; without it: print "
                                 "what the students of toy/results reached")
    add("--seed", type=int, default=0, help="seed of everything except the judge (default: 0)")
    add("--steps", type=int, nargs=3, default=STEPS, help="steps of encoder, decoder and teacher")
    args = parser.parse_args(argv)
    if min(args.steps) < 11:
        raise dr.UserError("--steps: at least 11 each, because the rate warms up for a tenth")
    if args.out is None:
        print_seeds()
        return
    dr.make_folder(args.out)
    make_teacher(args.out / "teacher.pt", args.seed, args.steps)


if __name__ == "__main__":
    dr.run_as_script(main)
