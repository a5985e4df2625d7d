"""Drift-RAE in one file: distil a flow model into an image generator that needs one evaluation.

An implementation of "Distilling Drifting Transformers with Representation Autoencoders" (Zhang,
Xia, Li, Gu, arXiv 2606.15553), independent of its authors, who released no code. On MNIST digits
the student scores 1.28 in one evaluation, its teacher 78 in one and 1.74 in 49. (Fréchet distance
in a small classifier's features, no FID; lower is better. One half of the real digits scores 1.48;
the models saw both.) The paper's 1.77 FID on ImageNet-256 is not reproduced: nobody has tried.

A Representation Autoencoder (RAE) turns an image into a grid of vectors, called tokens. The encoder
is a frozen DINOv2 (for the digits a small ViT, trained by toy/digits.py), the decoder a ViT that
was trained to invert it. The tokens, normalised by stored statistics, are the latents. They cluster
by class, which drifting needs (§3.2). The teacher is a flow model on the latents: it takes 49
evaluations per image. The student starts from the teacher's weights and learns to do it in one.
This start matters, although its samples are blurs: from random weights training fails (Table 9: FID
100). Nothing else of the teacher is used, neither its samples nor its trajectories. Instead, each
generated token is pulled towards real tokens of the same class and grid position, and pushed away
from the other generated tokens there. Pull plus push is the drift V. Where real and generated
tokens are distributed alike, only the noise of finite batches is left of V. Normalising V makes
this noise as large as any other V, so the updates never shrink by themselves. The decaying learning
rate and the moving average of the weights even them out.

One training step (the paper's three modifications of Deng et al., arXiv 2602.04770, are marked):
    for each class y of this step:
        z ~ N(0, I)                                            64 + 192 noises
        gen   = z - v(z, t=1, y)           Eq. (8)             64 samples, with gradient
        extra = the same                   modification 3      192 samples, without gradient
        pos   = real latents of class y                        256 positives
        S     = mean distance from gen to (gen, extra, pos)    one number, the unit of length
        n     = a random vector for each token of gen          shared by the temperatures
        for τ in 0.02 S, 0.05 S, 0.2 S:                        the temperatures
            at every grid position:
                x  = gen + τ·n                 modification 2  Eq. (12)
                w+ = softmax(-|x - pos| / τ)   modification 1  over pos alone
                w- = softmax(-|x - neg| / τ)                   over neg: (gen, extra) but x's own
                V  = Σ w+·pos - Σ w-·neg       Eq. (11)        (both w sum to 1, so x cancels)
            drift += V / rms(V)                                rms over all samples and positions
        loss = |g - stop_gradient(g + drift)|²                 Eq. (10), g: gen in units of S/√D
    average the gradients over the classes, clip, AdamW, moving average of the weights
Commands (README.md has more):
    python drift_rae.py                               distils toy/teacher.pt and reports
    python drift_rae.py --teacher ckpt.pt             distils a teacher that toy/digits.py made
    python drift_rae.py --preset imagenet256 --data DIR      the paper's run, with released weights
    python drift_rae.py --sample 100 --to a.png       draws from out/student.pt
You can stop after section 4, the method (5 RAE, 6 DiT^DH, 7 Data, 8 Checkpoints, 10 Command).
    1 Configuration  Table 8             Config, PRESETS
    2 Drifting       Eq. (5), (10)-(12)  drift_field, laplace_noise, drift_loss, tokens
    3 Flow           Eq. (1)-(4), (8)    one_step, flow_matching_loss, ode_sample
    4 Distillation   §4                  class_loss, train_step, distil
    9 Variants       Tables 3, 5, 6, 7   the flags that give their rows; y_softmax_field, guide
Elsewhere: eval_fid.py (FID), toy/geometry.py (§3.2, Theorem 1), toy/runs.py (field of Prop. 1).
Latents are [B,D,h,w] outside the loss, [L,N,D] inside it: L grid positions, N samples, width D.
"""
import dataclasses
import os
import re
import shutil
import sys
import tempfile
import zipfile
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections import defaultdict
from copy import deepcopy
from datetime import timedelta
from functools import partial
from math import isqrt, pi
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint as recompute_later
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- 1  Configuration (§4, Table 8)

class UserError(Exception):
    """An error that the user can fix: the command prints its sentence without a traceback."""


def option(default, help, choices=None):
    """A field of Config. It is also a command-line flag: n_pos is --n-pos."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Config:
    # The method. These are the paper's values, unless PRESETS["imagenet256"] names another one.
    n_class: int = option(10, "classes per step; their gradients are averaged")
    n_neg: int = option(64, "generated samples per class with gradient: these are trained")
    n_extra_neg: int = option(192, "generated samples per class that only serve as negatives")
    n_pos: int = option(256, "real images per class; keep it equal to n_neg + n_extra_neg")
    temperatures: tuple = option((0.02, 0.05, 0.2), "temperatures of the field, in units of S")
    perturb: bool = option(True, "evaluate the field at perturbed samples, Eq. (12)")
    steps: int = option(300, "optimizer steps")
    lr: float = option(1e-3, "learning rate at step 0")
    lr_final: float = option(0.01, "final learning rate as a fraction of --lr; the decay is linear")
    betas: tuple = option((0.9, 0.95), "decay rates of AdamW's two moments")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "clip the gradient to this norm")
    ema: float = option(0.99, "decay of the weights' moving average (this average is the result)")
    ema_warmup: int = option(50, "steps over which that decay rises from 0.5")
    dtype: str = option("fp32", "bf16 runs the networks in bfloat16", ("fp32", "bf16"))
    flip: bool = option(False, "with --data: mirror half of the images")
    seed: int = option(0, "random seed")
    field: str = option("softmax", "y-softmax is Deng et al.'s field", ("softmax", "y-softmax"))
    windows: tuple = option((1,), "window sizes w: w×w tokens drift as one vector (our addition)")
    preset: str = option("digits", "imagenet256 is the paper's run", ("digits", "imagenet256"))
    # The run. --resume may change these options, down to batch_size.
    teacher: str = option(str(Path(__file__).with_name("toy") / "teacher.pt"),
                          "checkpoint of the flow model: ours or an official one")
    data: str = option("", "folder of images, a subfolder per class; '': the checkpoint's latents")
    models: str = option("models", "folder of the released autoencoder, for official teachers")
    out: str = option("out", "folder for everything that the run writes")
    resume: bool = option(False, "continue the run whose state is OUT/state.pt")
    save_every: int = option(50, "steps between two writes of OUT/state.pt and OUT/samples.png")
    device: str = option("auto", "auto is cuda if there is one", ("auto", "cpu", "cuda", "mps"))
    compile: bool = option(False, "compile the student with torch.compile")
    grad_checkpoint: bool = option(False, "recompute blocks in the backward pass: less memory")
    workers: int = option(4, "with --data: processes per rank that read images")
    batch_size: int = option(256, "images per batch when encoding and sampling")
    sample: int = option(0, "do not train: generate this many images from OUT/student.pt")
    to: str = option("", "with --sample: FILE.npz (arr_0: images, arr_1: classes) or FILE.png")
    classes: str = option("", "with --sample: generate only these classes, as in 3,7")
    guidance: float = option(0.0, "with --sample: extrapolate the class embedding by this weight")


# Table 8. Its 16 epochs: 10,000 steps × 32 classes × 64 trained samples / 1.28 million images.
PRESETS = {"digits": {}, "imagenet256": dict(
    n_class=32, steps=10_000, lr=3e-5, ema=0.9995, ema_warmup=1000, dtype="bf16", flip=True,
    teacher="models/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
    save_every=500, workers=8, batch_size=64)}

# ---- 2  Drifting (§3.3)

def distances(x, y):
    """Euclidean distances between x [L,N,D] and y [L,M,D] -> [L,N,M]."""
    x_squared = x.norm(dim=-1).square().unsqueeze(2)         # [L,N,1]; faster than x.square().sum
    y_squared = y.norm(dim=-1).square().unsqueeze(1)         # [L,1,M]
    squared = x_squared + y_squared - 2 * x @ y.mT
    return squared.clamp(min=1e-8).sqrt()                    # rounding can make it negative


@torch.no_grad()
def drift_field(x, pos, neg, tau, noise=None):
    """Eq. (11), and Eq. (5) if L = 1: the drift V [L,N,D], where each generated token should move.
    x     [L,N,D]  generated tokens (the queries): N samples of one class, L grid positions
    pos   [L,P,D]  positives: real tokens of that class at the same position
    neg   [L,M,D]  negatives: generated tokens; the first N rows are x itself
    tau            temperature of the kernel exp(−distance / tau), in latent units
    noise [L,N,D]  the perturbation of Eq. (12), or None; pos and neg stay clean
    Prop. 1: if each displacement (target − query) were divided by its length, V would be tau times
    the gradient of log(q / p). The kernel smooths pos to the density q, and neg to p.
    """
    query = x if noise is None else x + noise
    logits_pos = -distances(query, pos) / tau                # [L,N,P]
    logits_neg = -distances(query, neg) / tau                # [L,N,M]
    # k ≠ j: a sample is not its own negative. Because neg begins with x, that is the diagonal.
    logits_neg.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    # Modification 1: a softmax over each set of targets alone (section 9 has Deng et al.'s).
    w_pos = logits_pos.softmax(-1)
    w_neg = logits_neg.softmax(-1)
    # Σ w⁺·(pos − query) − Σ w⁻·(neg − query): each w sums to 1, so the query cancels.
    attraction = w_pos @ pos                                 # [L,N,D]
    repulsion = w_neg @ neg                                  # [L,N,D]
    return attraction - repulsion


def laplace_noise(x, generator=None):
    """n of Eq. (12), shaped like x [L,N,D]: a random direction of Laplace-distributed length."""
    normal = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    direction = F.normalize(normal, dim=-1)
    length = torch.empty_like(x[..., :1]).exponential_(generator=generator)  # |Laplace(0,1)|
    return length * direction


def drift_loss(gen, pos, extra_neg=None, temperatures=(0.02, 0.05, 0.2), *, field=drift_field,
               perturb=True, generator=None):
    """Eq. (10): ‖G − sg[G + Ṽ]‖², where sg stops the gradient -> (loss [L], info).

    gen [L,N,D] has gradient; pos [L,P,D]; extra_neg [L,E,D] or None (modification 3).
    The paper fixes no units. We take Deng et al.'s: S, the mean distance, for tau and the noise,
    and S/√D for gen (in these units a typical pair differs by about 1 in each coordinate).
    The gradient is −2Ṽ with respect to gen/unit. The paper averages the losses of the temperatures
    and sums over samples and positions. We add up the Ṽ and take means: the same direction, times
    a constant. AdamW ignores a constant, but the clipping does not.
    Because each Ṽ is normalised, the value of the loss only says how far the temperatures agree.
    Watch the size of V in info instead ("V_0.02" at temperature 0.02; "scale" is S)."""
    x, pos = gen.detach(), pos.detach()
    neg = x if extra_neg is None else torch.cat([x, extra_neg.detach()], 1)  # [L,M,D]
    with torch.autocast(x.device.type, enabled=False):       # float32, whoever calls this
        all_distances = torch.cat([distances(x, neg), distances(x, pos)], 2)     # [L,N,M+P]
        S = all_distances.mean().clamp(min=1e-3)             # self-distances count, too
        unit = (S / x.shape[-1] ** 0.5).clamp(min=1e-3)      # S/√D
        n = laplace_noise(x, generator) if perturb else None     # the same for all temperatures
        info = {"scale": S}
        drift = torch.zeros_like(x)
        for temperature in temperatures:
            tau = temperature * S
            noise = tau * n if perturb else None             # Eq. (12): modification 2
            V = field(x, pos, neg, tau, noise) / unit        # Eq. (11); unit cancels in V / rms
            # Ṽ = V/‖V‖: Deng et al. take one root mean square over all samples and positions.
            rms = V.square().mean().clamp(min=1e-8).sqrt()
            drift += V / rms
            info[f"V_{temperature:g}"] = rms
    target = x / unit + drift                                # sg[G + Ṽ]
    loss = (gen / unit - target).square().mean((1, 2))       # one value per position
    return loss, info


def tokens(latents, window=1):
    """Latents [N,D,h,w] -> [L,N,D]. With a window > 1 (section 9): [L/window²,N,D·window²]."""
    if latents.shape[-1] % window:
        raise UserError(f"--windows: {window} does not divide the grid of {latents.shape[-1]}")
    if window > 1:
        latents = F.unfold(latents, window, stride=window)
    return latents.flatten(2).permute(2, 0, 1).contiguous()


# ---- 3  Flow (§3.1): time t = 1 is noise, t = 0 is data; model(x, t, y) is the velocity v

def one_step(model, z, y):
    """Eq. (8): G(z) = z − v(z, 1), the student. Noise z [B,D,h,w], classes y [B] -> latents."""
    return z - model(z, torch.ones(len(z), device=z.device), y)


def time_shift(u, shift):
    """Map times u in [0,1] to t; a shift above 1 (for wide latents) moves them to noise."""
    return shift * u / (1 + (shift - 1) * u)


def flow_matching_loss(model, latents, y, shift=1.0):
    """Eq. (1)-(4): toy/digits.py trains a teacher with this loss. latents [B,D,h,w], y [B]."""
    noise = torch.randn(latents.shape, device=latents.device)
    u = torch.randn(len(latents), device=latents.device).sigmoid()   # as for the released teachers
    t = time_shift(u, shift)
    t_column = t.view(-1, 1, 1, 1)
    x_t = (1 - t_column) * latents + t_column * noise        # Eq. (1)
    return (model(x_t, t, y) - (noise - latents)).square().mean()


@torch.no_grad()
def ode_sample(model, z, y, steps=50, shift=1.0, cfg_scale=1.0, cfg_interval=(0, 1)):
    """The teacher's sampler, used by toy/: z [B,D,h,w] -> latents. The official Euler grid ends at
    t = 0.001. Its `steps` points take steps − 1 evaluations. On ImageNet the shift is √48. A
    cfg_scale other than 1 is classifier-free guidance, for t within cfg_interval."""
    x = z
    times = time_shift(1 - torch.linspace(0, 0.999, steps, device=z.device), shift)
    for t, t_next in zip(times[:-1], times[1:]):
        v = model(x, t.expand(len(z)), y)
        if cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]:
            null_class = torch.full_like(y, model.num_classes)   # the index for "no class"
            v_null = model(x, t.expand(len(z)), null_class)
            v = v_null + cfg_scale * (v - v_null)
        x = x + (t_next - t) * v
    return x


# ---- 4  Distillation (§4). First what it needs: processes, mixed precision, random numbers.

RANK = int(os.environ.get("RANK", 0))                        # torchrun numbers its processes
WORLD = int(os.environ.get("WORLD_SIZE", 1))                 # how many there are


def autocast(cfg):
    # No cache: a weight that was cast under no_grad must not be used where a gradient is needed.
    return torch.autocast(cfg.device, torch.bfloat16, cfg.dtype == "bf16", cache_enabled=False)


STREAMS = {"noise": 0, "data": 1, "samples": 2, "mirror": 3}


def numpy_stream(cfg, purpose, index, label=-1):
    """A generator per purpose, step (or sample) and class: a resumed run draws the same numbers."""
    return np.random.default_rng([cfg.seed, index, label + 1, STREAMS[purpose]])


def torch_stream(cfg, purpose, index, label=-1):
    seed = numpy_stream(cfg, purpose, index, label).integers(2**63)
    return torch.Generator(cfg.device).manual_seed(int(seed))


def latent_loss(gen, pos, extra_neg, cfg, generator):
    """Eq. (10) for one class, averaged over the grid positions. All latents are [·,D,h,w]."""
    loss, info = drift_loss(tokens(gen), tokens(pos), tokens(extra_neg), cfg.temperatures,
                            perturb=cfg.perturb, generator=generator)
    return loss.mean(), info


def class_loss(student, label, pos, step, cfg, loss_function=latent_loss):
    """Draw samples of one class and compare them with its positives [P,D,h,w]. loss_function is
    latent_loss or, for cfg.field and cfg.windows, variant_loss of section 9."""
    generator = torch_stream(cfg, "noise", step, label)
    n = cfg.n_neg + cfg.n_extra_neg
    z = torch.randn(n, *pos.shape[1:], generator=generator, device=cfg.device)
    y = torch.full((n,), label, device=cfg.device)
    with autocast(cfg):
        gen = one_step(student, z[:cfg.n_neg], y[:cfg.n_neg])
        extra_neg = z[:0]                                    # no samples
        if cfg.n_extra_neg > 0:
            with torch.no_grad():                            # modification 3
                extra_neg = one_step(student, z[cfg.n_neg:], y[cfg.n_neg:])
    return loss_function(gen, pos, extra_neg, cfg, generator)


def train_step(student, ema, optimizer, positives, step, cfg, loss_function=latent_loss):
    """One optimizer step -> what to log. `positives` yields (class, latents [P,D,h,w])."""
    log = defaultdict(float)                                 # name: mean over the classes
    for _ in range(RANK, cfg.n_class, WORLD):                # this process's share of the classes
        label, pos = next(positives)                         # load_positives chose the class
        loss, info = class_loss(student, label, pos, step, cfg, loss_function)
        (loss / cfg.n_class).backward()                      # gradients add up over the classes
        for name, value in {**info, "loss": loss.detach()}.items():
            log[name] += value / cfg.n_class
    if WORLD > 1:
        # One sum per step. DistributedDataParallel would average in every backward pass, which
        # is wrong where one process has more classes than another.
        for tensor in [*(p.grad for p in student.parameters()), *log.values()]:
            distributed.all_reduce(tensor)
    log["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
    if not log["grad_norm"].isfinite():
        raise UserError(f"the gradient is NaN or infinite at step {step}: try a lower --lr")
    lr_end = cfg.lr * cfg.lr_final                           # Table 8, like the warm-up below
    optimizer.param_groups[0]["lr"] = cfg.lr - (cfg.lr - lr_end) * step / cfg.steps
    optimizer.step()
    optimizer.zero_grad()
    warmup = min(1, step / cfg.ema_warmup)
    update_average(ema, student, decay=0.5 * (cfg.ema / 0.5) ** warmup)
    return log


@torch.no_grad()
def update_average(average, model, decay):
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)                                # a = decay·a + (1 − decay)·p


def prepare(teacher, cfg):
    """Return the student, its moving average and its optimizer, before the first step."""
    student = deepcopy(teacher).to(cfg.device).requires_grad_(True)
    student.eval()                                           # turns off label dropout
    ema = deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, cfg.betas, fused=True,
                                  weight_decay=cfg.weight_decay)
    return student, ema, optimizer


def distil(student, ema, optimizer, positives, cfg, first_step=0, loss_function=latent_loss):
    """Train in place, one step per iteration; yield (step, what to log). Writes no files."""
    for step in range(first_step, cfg.steps):
        yield step, train_step(student, ema, optimizer, positives, step, cfg, loss_function)


# ---- The method ends here. Below are the networks, and what a real run needs.

# ---- 5  Representation Autoencoder (§3.1; official code: bytetriper/RAE)


class Attention(nn.Module):
    """Multi-head self-attention, for all transformers of this file."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):                         # [B,L,D]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))     # [B,L,3,heads,d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # [B,heads,L,d] each
        if rope is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """DINOv2 multiplies the output of each branch by a learned vector."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """Transformer block of encoder and decoder, with the key names of DINOv2."""

    def __init__(self, dim, num_heads, mlp_dim, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, mlp_dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images or latents [B,C,H,W] -> one vector per patch, [B,D,h,w]."""

    def __init__(self, channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x)


class ViT(nn.Module):
    """The encoder: DINOv2 with registers. It loads dinov2_vitb14_reg4_pretrain.pth strictly."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_registers=4,
                 mlp_ratio=4):
        super().__init__()
        self.grid = img_size // patch_size
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, embed_dim))
        # mask_token is unused; it is kept so that the released file loads strictly.
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        mlp_dim = int(mlp_ratio * embed_dim)
        blocks = [Block(embed_dim, num_heads, mlp_dim, 1e-6) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, 1e-6)            # for FD-DINOv2 (eval_fid.py) alone

    def features(self, x):
        """Normalised images [B,3,H,W] -> class, register and patch tokens [B,1+R+L,D]."""
        x = self.patch_embed(x)                              # [B,D,h,w]
        # DINOv2 was trained at 518 pixels and runs at 224 here, so its position embedding is
        # interpolated.
        pos_embed = self.pos_embed[:, 1:].mT.unflatten(-1, (self.grid, -1))  # [1,D,37,37]
        pos_embed = F.interpolate(pos_embed, x.shape[-2:], mode="bicubic", antialias=True)
        patches = (x + pos_embed).flatten(2).mT              # [B,L,D]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        prefix = torch.cat([cls_token, self.register_tokens], 1)     # registers have no position
        x = torch.cat([prefix.expand(len(x), -1, -1), patches], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        """Normalised images [B,3,H,W] -> patch tokens [B,L,D], after a LayerNorm without affine."""
        patches = self.features(x)[:, 1 + self.register_tokens.shape[1]:]
        return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)


def grid_angles(n, grid, dtype):
    """For each token's row and column: position · 10000^(−i/n), i < n. Two tensors [grid²,n]."""
    frequency = 10000.0 ** (-torch.arange(n, dtype=dtype) / n)
    angle = torch.outer(torch.arange(grid, dtype=dtype), frequency)
    return angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)   # rows, columns


def sincos_2d(dim, grid):
    """The fixed sine-cosine position embedding of MAE and DiT, [grid²,dim], columns first."""
    row, column = grid_angles(dim // 4, grid, torch.float64)
    parts = [column.sin(), column.cos(), row.sin(), row.cos()]
    return torch.cat(parts, 1).float()


# decoder_layers.0.attention.attention.query.bias becomes blocks.0.attn.query.bias, for example.
# Replaced in this order: longer names before their parts, the bare prefix decoder_ last.
OFFICIAL_NAMES = {"decoder_layers": "blocks", "attention.attention": "attn",
                  "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
                  "output.dense": "mlp.fc2", "layernorm_before": "norm1",
                  "layernorm_after": "norm2", "trainable_cls_token": "cls_token", "decoder_": ""}


class Decoder(nn.Module):
    """The decoder of the RAE, a ViT: tokens [B,L,D] -> images [B,3,H,W] in normalised pixels."""

    def __init__(self, latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid):
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.image_size = grid * patch_size
        self.embed = nn.Linear(latent_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # The class token has a zero position embedding.
        pos_embed = torch.cat([torch.zeros(1, width), sincos_2d(width, grid)])
        self.register_buffer("pos_embed", pos_embed.unsqueeze(0))
        blocks = [Block(width, num_heads, mlp_dim, 1e-12) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, x):
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, self.embed(x)], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        patches = self.pred(self.norm(x))[:, 1:]             # [B,L,p·p·3]
        patches = patches.unflatten(-1, (self.patch_size, self.patch_size, 3))
        patches = patches.unflatten(1, (self.grid, self.grid))   # [B,g,g,p,p,3]
        pixels = patches.permute(0, 5, 1, 3, 2, 4)           # [B,3,g,p,g,p]
        return pixels.reshape(len(x), 3, self.image_size, self.image_size)

    @classmethod
    def from_official(cls, state_dict, num_heads, path="the decoder"):
        """The decoder that bytetriper/RAE released, under our key names.

        All sizes except the number of heads are read off the tensors' shapes; `path` is for error
        messages."""
        require_keys(state_dict, ("decoder_embed.weight", "decoder_pos_embed", "decoder_pred.bias",
                                  "decoder_norm.weight",
                                  "decoder_layers.0.intermediate.dense.bias"), path)
        sd = {}
        for key, value in state_dict.items():
            for official_name, name in OFFICIAL_NAMES.items():
                key = key.replace(official_name, name)
            sd[key] = value
        depth = sum(key.endswith("norm1.weight") for key in sd)
        for i in range(depth):
            for kind in ("weight", "bias"):
                keys = [f"blocks.{i}.attn.{part}.{kind}" for part in ("query", "key", "value")]
                require_keys(sd, keys, path)
                sd[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([sd.pop(key) for key in keys])
            sd[f"blocks.{i}.ls1.gamma"] = torch.ones_like(sd["norm.weight"])     # no LayerScale
            sd[f"blocks.{i}.ls2.gamma"] = torch.ones_like(sd["norm.weight"])
        width, latent_dim = sd["embed.weight"].shape
        mlp_dim = len(sd["blocks.0.mlp.fc1.bias"])
        patch_size = isqrt(len(sd["pred.bias"]) // 3)
        grid = isqrt(sd["pos_embed"].shape[1] - 1)
        model = cls(latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid)
        load_weights(model, sd, path)
        return model


class RAE(nn.Module):
    """Frozen encoder and decoder, and the statistics that normalise the latents.

    mean and var [D,h,w] are per channel and position; input_size is what the encoder sees.
    """

    def __init__(self, encoder, decoder, mean, var, input_size, eps=1e-5, sigmoid=False):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.input_size = input_size
        self.sigmoid = sigmoid
        self.register_buffer("mean", mean)
        self.register_buffer("std", (var + eps).sqrt())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def encode(self, images):
        """Images [B,3,H,W] in [0,1] -> normalised latents [B,D,h,w]."""
        images = F.interpolate(images, self.input_size, mode="bicubic")      # no antialias
        x = self.encoder((images - self.pixel_mean) / self.pixel_std)    # [B,L,D]
        latents = x.mT.unflatten(-1, self.mean.shape[-2:])
        return (latents - self.mean) / self.std

    def decode(self, latents):
        """Normalised latents [B,D,h,w] -> images [B,3,H,W] around [0,1], not clamped."""
        latents = latents * self.std + self.mean
        x = self.decoder(latents.flatten(2).mT)
        images = x * self.pixel_std + self.pixel_mean
        if self.sigmoid:    # our digits are black and white: push grey levels towards 0 and 1
            images = torch.sigmoid(6 * images - 3)
        return images


# Sizes as released. The loader needs VIT_B14 and the decoder's heads; tests/ use the rest.
VIT_B14 = dict(img_size=518, patch_size=14, embed_dim=768, depth=12, num_heads=12)
DECODER_XL = dict(latent_dim=768, width=1152, depth=28, num_heads=16, mlp_dim=4096, patch_size=16,
                  grid=16)

# ---- 6  DiT^DH, the network of teacher and student (official code: bytetriper/RAE)


def zero(layer):
    """Set a layer to zero (adaLN-Zero: blocks begin as the identity, the velocity as zero)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class RoPE(nn.Module):
    """Rotary position embedding for a square grid. Its buffers are part of the released files."""

    def __init__(self, head_dim, grid):
        super().__init__()
        rows, columns = grid_angles(head_dim // 4, grid, torch.float32)
        angle = torch.cat([rows, columns], 1)                # [L,d/2]
        angle = angle.repeat_interleave(2, 1)                # [L,d]: channels turn in pairs
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):                                    # [B,heads,L,d]
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)        # each pair, rotated by 90 degrees
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


class SwiGLU(nn.Module):
    """The gated feed-forward part of a DiT block."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class DiTBlock(nn.Module):
    """A block whose norms are shifted, scaled and gated by a condition (adaLN).

    The condition is one vector per sample [B,1,D] in the encoder, one per token [B,L,D] in the
    head.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.RMSNorm(dim, 1e-6)
        self.mlp = SwiGLU(dim, 8 * dim // 3)                 # as many weights as an MLP 4·dim wide
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(dim, 6 * dim)))

    def forward(self, x, condition, rope):
        modulation = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TimestepEmbedder(nn.Module):
    """Time t [B] -> [B,1,D], by Gaussian Fourier features and an MLP."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("W", torch.randn(frequencies))

    def forward(self, t):
        angle = 2 * pi * t.view(-1, 1, 1) * self.W           # [B,1,256]
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class LabelEmbedder(nn.Module):
    """Class y [B] -> [B,1,D]. Index num_classes is the null class, which means "no class".

    In train mode a fraction dropout_prob of the labels is replaced by the null class.
    """

    def __init__(self, num_classes, dim, dropout_prob):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y):
        if self.training:
            dropped = torch.rand_like(y, dtype=torch.float32) < self.dropout_prob
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y).unsqueeze(1)


class FinalLayer(nn.Module):
    """From the head's features to the velocity."""

    def __init__(self, dim, channels):
        super().__init__()
        self.norm_final = nn.RMSNorm(dim, 1e-6)
        self.linear = zero(nn.Linear(dim, channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(dim, 2 * dim)))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(nn.Module):
    """The velocity v(x, t, y): a deep narrow encoder, then a shallow wide head ("DH").

    The encoder turns x, t and y into one condition per token, and the head turns x and these
    conditions into the velocity. hidden_size, depth and num_heads are pairs (encoder, head). In
    the official key names s_ and enc_ belong to the encoder, x_ and dec_ to the head.
    """

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 class_dropout_prob=0.1):
        super().__init__()
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.depth = tuple(depth)
        self.recompute = False      # --grad-checkpoint: recompute the blocks in the backward pass
        narrow, wide = hidden_size
        self.register_buffer("pos_embed", sincos_2d(narrow, input_size).unsqueeze(0))
        self.s_embedder = PatchEmbed(in_channels, narrow, 1)
        self.x_embedder = PatchEmbed(in_channels, wide, 1)
        self.s_projector = nn.Identity() if narrow == wide else nn.Linear(narrow, wide)
        self.t_embedder = TimestepEmbedder(narrow)
        self.y_embedder = LabelEmbedder(num_classes, narrow, class_dropout_prob)
        self.enc_feat_rope = RoPE(narrow // num_heads[0], input_size)
        self.dec_feat_rope = RoPE(wide // num_heads[1], input_size)
        encoder = [DiTBlock(narrow, num_heads[0]) for _ in range(depth[0])]
        head = [DiTBlock(wide, num_heads[1]) for _ in range(depth[1])]
        self.blocks = nn.ModuleList(encoder + head)
        self.final_layer = FinalLayer(wide, in_channels)

    def run(self, block, x, condition, rope):
        if self.recompute and torch.is_grad_enabled():
            return recompute_later(block, x, condition, rope, use_reentrant=False)
        return block(x, condition, rope)

    def forward(self, x, t, y):
        """x [B,D,h,w], times t [B] in [0,1], classes y [B] -> velocity [B,D,h,w]."""
        time_embedding = self.t_embedder(t)                  # [B,1,narrow]
        condition = F.silu(time_embedding + self.y_embedder(y))
        features = self.s_embedder(x).flatten(2).mT + self.pos_embed     # [B,L,narrow]
        for block in self.blocks[:self.depth[0]]:
            features = self.run(block, features, condition, self.enc_feat_rope)
        # There is a SiLU here and another one in each block's adaLN, as in the official code.
        condition = self.s_projector(F.silu(time_embedding + features))      # [B,L,wide]
        out = self.x_embedder(x).flatten(2).mT               # [B,L,wide]
        # Autocast made bf16 of it; the sum over the blocks is kept in float32. The features are
        # float32 already, because pos_embed is.
        out = out.to(x.dtype)
        for block in self.blocks[self.depth[0]:]:
            out = self.run(block, out, condition, self.dec_feat_rope)
        out = self.final_layer(out, condition)               # [B,L,D]
        return out.mT.unflatten(-1, x.shape[-2:])

    @classmethod
    def from_state_dict(cls, sd, path="the state dict"):
        """A network whose sizes are read off the tensors. `path` is for error messages."""
        require_keys(sd, ("s_embedder.proj.weight", "x_embedder.proj.weight", "pos_embed",
                          "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_cos",
                          "y_embedder.embedding_table.weight"), path)
        narrow, in_channels = sd["s_embedder.proj.weight"].shape[:2]
        wide = len(sd["x_embedder.proj.weight"])
        head_dims = [sd[f"{part}_feat_rope.freqs_cos"].shape[1] for part in ("enc", "dec")]
        num_heads = (narrow // head_dims[0], wide // head_dims[1])
        block_widths = [len(value) for key, value in sd.items() if key.endswith(".norm1.weight")]
        head_depth = block_widths.count(wide)
        if narrow == wide:          # widths do not tell encoder and head apart
            head_depth = 2          # as in all released models
        depth = (len(block_widths) - head_depth, head_depth)
        input_size = isqrt(sd["pos_embed"].shape[1])
        num_classes = len(sd["y_embedder.embedding_table.weight"]) - 1   # without the null class
        model = cls(input_size, in_channels, (narrow, wide), depth, num_heads, num_classes)
        load_weights(model, sd, path)
        return model


DITDH_XL = dict(input_size=16, in_channels=768, hidden_size=(1152, 2048), depth=(28, 2),
                num_heads=(16, 16), num_classes=1000)        # 839 million parameters
DITDH_S = DITDH_XL | dict(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16))   # 197 million

# ---- 7  Data: the positives, which are real images of one class at a time (§3.3)


def center_crop(image, size):
    """ADM's crop of a PIL image: halve it while it is at least twice too large, resize its short
    side, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size):
    """-> uint8 [size,size,3]. As in ADM, the EXIF orientation is ignored."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):            # Pillow would clip these to white
                raise ValueError("it has more than 8 bits per channel")
            image = center_crop(image.convert("RGB"), size)
    except Exception as error:      # Pillow raises many kinds of errors, and few name the file
        raise UserError(f"cannot read the image {path}: {error}; replace or remove it") from error
    return torch.from_numpy(np.array(image))


class ImageClasses(ImageFolder):
    """A folder with one subfolder per class; hidden files and folders do not count.

    A subfolder is named by the number of its class. WordNet ids (as in ImageNet) also work if no
    class is missing; they are numbered alphabetically.
    """

    def __init__(self, root, num_classes, size):
        self.num_classes = num_classes
        self.skipped = []           # files that are not images
        loader = partial(read_image, size=size)
        # This calls the two methods below.
        super().__init__(root, loader=loader, is_valid_file=self.is_image)

    def is_image(self, path):
        parts = Path(path).relative_to(self.root).parts
        if any(part.startswith(".") for part in parts):      # hidden
            return False
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        self.skipped.append(path)
        return False

    def find_classes(self, directory):
        """-> names of the subfolders, {name: number of its class}; torchvision calls this."""
        names, _ = super().find_classes(directory)
        names = [name for name in names if not name.startswith(".")]
        if not names:
            raise UserError(f"--data: {directory} has no folder of a class")
        numbers = {name: int(name) for name in names if name.isdecimal()}
        wordnet_ids = [name for name in names if re.fullmatch(r"n\d{8}", name)]
        if len(wordnet_ids) == self.num_classes:
            numbers = {name: i for i, name in enumerate(wordnet_ids)}
        for name in names:
            if name not in numbers or numbers[name] >= self.num_classes:
                raise UserError(
                    f"the folder {directory}/{name} must be named by a class number below "
                    f"{self.num_classes}; WordNet ids also work if all {self.num_classes} classes "
                    "are there")
        return names, numbers


def open_images(folder, num_classes, size):
    """-> ImageClasses; says what is skipped."""
    try:
        dataset = ImageClasses(folder, num_classes, size)
    except OSError as error:        # a missing folder, or a class folder without images
        raise UserError(f"--data: {error}") from error
    if dataset.skipped and RANK == 0:
        print(f"{len(dataset.skipped)} files are skipped because their format is not supported; "
              f"the first is {dataset.skipped[0]}")
    return dataset


class ClassSampler:
    """A batch sampler: for each class of each step the indices of its positives.

    labels: the class of each item of the dataset. A class with fewer than n_pos items is drawn
    with replacement.
    """

    def __init__(self, labels, cfg, first_step=0):
        self.labels = np.asarray(labels)
        self.classes = np.unique(self.labels).tolist()
        self.cfg = cfg
        self.first_step = first_step

    def schedule(self):
        """Yield (step, class) for all classes of this rank, in the order of training."""
        for step in range(self.first_step, self.cfg.steps):
            rng = numpy_stream(self.cfg, "data", step)
            chosen = rng.choice(self.classes, self.cfg.n_class, replace=False)
            for label in chosen.tolist()[RANK::WORLD]:
                yield step, label

    def __iter__(self):
        for step, label in self.schedule():
            rng = numpy_stream(self.cfg, "data", step, label)
            members = np.flatnonzero(self.labels == label)
            too_few = len(members) < self.cfg.n_pos
            yield rng.choice(members, self.cfg.n_pos, replace=too_few).tolist()


def load_positives(dataset, class_sampler, rae, cfg):
    """Yield (class, latents [P,D,h,w]) in the order of training.

    The dataset holds latents [D,h,w], or with --data images uint8 [H,W,3], which are encoded here.
    """
    workers = cfg.workers if cfg.data else 0
    # Without the timeout, workers that lack shared memory could make the run hang forever.
    loader = DataLoader(dataset, batch_sampler=class_sampler, num_workers=workers,
                        timeout=300 if workers else 0)
    # The loader follows the same schedule, so its batches come in this order.
    for (step, label), (batch, labels) in zip(class_sampler.schedule(), loader):
        assert (labels == label).all()
        batch = batch.to(cfg.device)
        if cfg.data and cfg.flip:
            generator = torch_stream(cfg, "mirror", step, label)
            draws = torch.rand(len(batch), generator=generator, device=cfg.device)
            mirrored = (draws < 0.5).view(-1, 1, 1, 1)
            batch = torch.where(mirrored, batch.flip(2), batch)
        if cfg.data:
            batch = encode(rae, batch, cfg)
        yield label, batch.float()                           # latents may be stored as float16


@torch.no_grad()
def encode(rae, images, cfg):
    """Images uint8 [n,H,W,3] -> latents [n,D,h,w] on the device."""
    latents = []
    for batch in images.split(cfg.batch_size):
        pixels = batch.to(cfg.device).permute(0, 3, 1, 2) / 255
        with autocast(cfg):
            latents.append(rae.encode(pixels))
    return torch.cat(latents)


def to_uint8(images):
    """Images [n,3,H,W] around [0,1] -> uint8 [n,H,W,3] on the CPU, rounded."""
    levels = (images.clamp(0, 1) * 255).round()
    return levels.byte().permute(0, 2, 3, 1).cpu()


# ---- 8  Checkpoints: read without executing their code, loaded strictly, written atomically


def load(path):
    """Read a checkpoint that torch.save wrote -> dict."""
    try:
        # weights_only: a checkpoint from the internet must not be able to run code here.
        # mmap: read a tensor when it is used; torch's older file format cannot do this.
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))
    except Exception as error:      # torch raises many kinds of errors, with pages of advice
        raise UserError(f"cannot read {path}: {why_unreadable(path, error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds a {type(content).__name__}, not a dict")
    return content


def why_unreadable(path, error):
    """Say in words why torch.load failed."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return error.strerror
    if str(path).endswith(".safetensors"):
        return "safetensors files are not read; convert it with torch.save"
    with open(path, "rb") as file:
        start = file.read(200)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run git lfs pull"
    if b"<html" in start.lower() or b"<!doctype" in start.lower():
        return "it is a web page, not a checkpoint; download it again"
    foreign_class = re.search(r"GLOBAL (\S+)", str(error))
    if foreign_class:
        return (f"it holds an object of the class {foreign_class[1]}, and only tensors, numbers, "
                "text, lists and dicts are read; save its weights alone")
    if "weights_only" in str(error):    # torch's advice, to switch this protection off, is bad
        return "it is not a checkpoint of PyTorch; download it again"
    reason = str(error).partition("\n")[0]
    return f"{reason}; if the file is damaged, download it again"


def require_keys(found, keys, path):
    for key in keys:
        if key not in found:
            raise UserError(f"cannot use {path}: {key} is missing (files of diffusers, RAEv2 and "
                            "MF-RAE are not supported)")


def load_weights(model, state_dict, path):
    """model.load_state_dict, which is strict; an error becomes a sentence."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        first_reason = str(error).splitlines()[1].strip()
        raise UserError(f"cannot use {path}: {first_reason[:400]}") from error
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"cannot use {path}: the tensor {key} holds NaN or infinity")


def save(path, write):
    """Call write(file) on a temporary file and rename it, so that a crash leaves no half file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                          # on the disk, before the rename
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                 # torch.save raises RuntimeError
        reason = str(error)
        if path.parent.is_dir():
            reason += f"; {shutil.disk_usage(path.parent).free / 1e9:.1f} GB are free"
        kept = ", so the old file is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}{kept}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder):
    """Make a folder, and check early that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into the folder {folder}: {error.strerror}") from error


def read_network(checkpoint, path):
    """The DiT^DH of a checkpoint: ours, an official one, or a training checkpoint."""
    weights = checkpoint.get("ema", checkpoint.get("model", checkpoint))
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds no state dict, but a {type(weights).__name__}")
    # DistributedDataParallel and torch.compile put prefixes before the keys.
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): x for key, x in weights.items()}
    return DiTDH.from_state_dict(weights, path).eval()


def load_teacher(path):
    """The flow model that a file holds, in eval mode."""
    return read_network(load(path), path)


def load_autoencoder(checkpoint, path, models):
    """The RAE that our own checkpoints hold, or else the released one from the folder models."""
    if "rae" in checkpoint:
        saved = checkpoint["rae"]
        require_keys(saved, ("encoder_args", "decoder_args", "encoder", "decoder", "mean", "var",
                             "input_size", "sigmoid"), path)
        encoder = ViT(**saved["encoder_args"])
        decoder = Decoder(**saved["decoder_args"])
        load_weights(encoder, saved["encoder"], path)
        load_weights(decoder, saved["decoder"], path)
        settings = {key: saved[key] for key in ("mean", "var", "input_size", "sigmoid")}
        return RAE(encoder, decoder, **settings)
    path = Path(models, "dinov2_vitb14_reg4_pretrain.pth")
    encoder = ViT(**VIT_B14)
    load_weights(encoder, load(path), path)
    path = Path(models, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt")
    decoder = Decoder.from_official(load(path), num_heads=DECODER_XL["num_heads"], path=path)
    path = Path(models, "stats/dinov2/wReg_base/imagenet1k/stat.pt")
    statistics = load(path)
    require_keys(statistics, ["var"], path)
    var = statistics["var"]
    mean = statistics.get("mean")
    if mean is None:                # as in the released file: the official code subtracts nothing
        mean = torch.zeros_like(var)
    return RAE(encoder, decoder, mean, var, input_size=var.shape[-1] * VIT_B14["patch_size"])


def require_same_latents(network, rae, path):
    latents = [network.in_channels, network.input_size, network.input_size]
    if list(rae.mean.shape) != latents:
        raise UserError(f"the network of {path} takes latents {latents}, but the autoencoder makes "
                        f"{list(rae.mean.shape)}")


# ---- 9  Variants: options beyond the paper's method, and the rows of its tables
#
# Each row starts from the defaults, or from --preset imagenet256 --data DIR.
# Table 3   A  --n-pos 64 --n-extra-neg 0 --no-perturb --field y-softmax    (Deng et al.)
#           B  --n-pos 64 --n-extra-neg 0
#           C  no further flags
# Table 5   perturb no,  y-softmax kept     A
#           perturb no,  y-softmax removed  B with --no-perturb     (in the paper it collapsed)
#           perturb yes, y-softmax kept     B with --field y-softmax
#           perturb yes, y-softmax removed  B
# Table 6   --n-neg K --n-extra-neg 256-K
# Table 7   --n-pos P --n-extra-neg N-64, where N counts all negatives


@torch.no_grad()
def y_softmax_field(x, pos, neg, tau, noise=None):
    """--field y-softmax: Deng et al.'s field as released, which modification 1 replaces.

    A weight is the square root of a product: softmax over all targets × softmax over the generated
    samples (the "y-softmax"). Then the weights of the positives are multiplied by the sum of the
    negatives' weights, and the other way round. A softmax over all targets, divided by its sum over
    the positives, is a softmax over the positives. So without the square root and the y-softmax
    this would be drift_field times sum_neg · sum_pos, a factor per sample.
    toy/README.md compares the two fields.
    """
    query = x if noise is None else x + noise
    all_distances = torch.cat([distances(query, neg), distances(query, pos)], 2)     # [L,N,M+P]
    logits = -all_distances / tau
    # Leave the sample itself out. The clamp below still leaves it a weight of 1e-3, as theirs does.
    logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    affinity = logits.softmax(2) * logits.softmax(1)
    affinity = affinity.clamp(min=1e-6).sqrt()
    w_neg, w_pos = affinity.split([neg.shape[1], pos.shape[1]], 2)
    sum_neg = w_neg.sum(2, keepdim=True)                     # [L,N,1]
    sum_pos = w_pos.sum(2, keepdim=True)
    # All weights of a side sum to sum_neg · sum_pos, so here, too, the query cancels.
    attraction = (w_pos * sum_neg) @ pos
    repulsion = (w_neg * sum_pos) @ neg
    return attraction - repulsion


FIELDS = {"softmax": drift_field, "y-softmax": y_softmax_field}


def variant_loss(gen, pos, extra_neg, cfg, generator):
    """latent_loss with --field and --windows.

    Eq. (11) sees one token at a time, never whether the tokens of a sample belong together. With
    --windows 1 2 single tokens drift, and also windows of 2×2 tokens as one vector each (our
    addition). On the digits this lowered the distance after 50 steps from 1.76 to 1.64, with eight
    paired seeds and everything else equal (toy/README.md).
    """
    total = 0
    for window in cfg.windows:
        parts = [tokens(latents, window) for latents in (gen, pos, extra_neg)]
        loss, info = drift_loss(*parts, cfg.temperatures, field=FIELDS[cfg.field],
                                perturb=cfg.perturb, generator=generator)
        total = total + loss.mean()
    return total, info                                       # log the info of the last window


def guide(model, w):
    """--guidance w: a copy with the class embeddings e(y) + w·(e(y) − e(null class)).

    Guidance without a further evaluation: only a table changes. The abstract of the paper's second
    version mentions extrapolation but gives no formula; this is our reading. On the digits w = 0.05
    raised the label accuracy from 0.955 to 0.965 at about the same distance, and cost 0.014 of
    recall (50 steps, eight seeds).
    """
    model = deepcopy(model)
    table = model.y_embedder.embedding_table.weight.data
    null_class = table[-1:].clone()                          # the last row; it stays
    table.copy_(table + w * (table - null_class))
    return model


# ---- 10  Command


def whole_number(text):
    number = int(text)
    if number < 0:
        raise ArgumentTypeError(f"{text} is negative")
    return number


def finite_number(text):
    number = float(text)
    if not 0 <= number < torch.inf:
        raise ArgumentTypeError(f"{text} is negative or not finite")
    return number


def parse(argv=None):
    """Command line -> {field of Config: value} for the flags that were given."""
    types = {int: whole_number, float: finite_number, str: str}
    parser = ArgumentParser(description=__doc__.partition("\n")[0], argument_default=SUPPRESS)
    for entry in dataclasses.fields(Config):
        flag = "--" + entry.name.replace("_", "-")
        text = f"{entry.metadata['help']} (default: {entry.default})"
        if entry.type is bool:
            parser.add_argument(flag, action=BooleanOptionalAction, help=text)
        elif entry.type is tuple:                            # all numbers have the first one's type
            number = types[type(entry.default[0])]
            parser.add_argument(flag, type=number, nargs="+", help=text)
        else:
            parser.add_argument(flag, type=types[entry.type], help=text,
                                choices=entry.metadata["choices"])
    return vars(parser.parse_args(argv))


def configure(given):
    """Flags -> (Config, the state to resume, which is empty for a new run)."""
    if not given.get("resume"):
        preset = PRESETS[given.get("preset", Config.preset)]
        return Config(**(preset | given)), {}
    may_change = ("teacher", "data", "models", "out", "resume", "save_every", "device", "compile",
                  "grad_checkpoint", "workers", "batch_size")
    for name in given:
        if name not in may_change:
            flag = name.replace("_", "-")
            raise UserError(f"--resume keeps the saved configuration: leave out --{flag}")
    path = Path(given.get("out", Config.out), "state.pt")
    state = load(path)
    require_keys(state, ("config", "student", "ema", "optimizer", "log"), path)
    for name in state["config"]:
        if name not in Config.__dataclass_fields__:
            raise UserError(f"{path} was written by another version, which had the option {name}")
    # The run may continue on another machine: device and out are not taken from the file.
    here = {"device": Config.device, "out": Config.out}
    return Config(**(state["config"] | here | given)), state


def check(cfg):
    """Reject invalid settings before anything is read or written."""
    for name in ("steps", "n_class", "n_pos", "save_every", "batch_size", "ema_warmup"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} must be at least 1")
    if cfg.n_neg < 2:
        raise UserError("n_neg must be at least 2")          # the y-softmax would be empty with 1
    if min(cfg.temperatures) <= 0 or min(cfg.windows) < 1:
        raise UserError("temperatures must be greater than 0, and windows at least 1")
    if len(cfg.betas) != 2 or max(cfg.betas) >= 1 or not 0.5 <= cfg.ema <= 1:
        raise UserError("betas must be two numbers below 1, and ema one from 0.5 to 1")
    if not re.fullmatch(r"(\d+(,\d+)*)?", cfg.classes):
        raise UserError(f"--classes takes numbers, as in 3,7, not {cfg.classes}")
    if bool(cfg.sample) != bool(cfg.to):
        raise UserError("--sample N and --to FILE are used together")
    if cfg.to and not cfg.to.endswith((".npz", ".png")):
        raise UserError(f"--to takes FILE.npz or FILE.png, not {cfg.to}")


def choose_device(cfg):
    """Replace "auto", and check that the device is there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if cfg.device == "auto":
        cfg.device = "cuda" if available["cuda"] else "cpu"
    if not available[cfg.device]:
        raise UserError(f"--device {cfg.device}: PyTorch finds no such device")
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.allow_tf32 = False              # no TF32: keep full float32 precision
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def generate(sampler, rae, labels, cfg):
    """Images uint8 [n,H,W,3] of the classes in labels [n]; sampler(z, y) makes the latents."""
    size = rae.decoder.image_size
    images = torch.empty(len(labels), size, size, 3, dtype=torch.uint8)
    batches = torch.arange(len(labels)).split(cfg.batch_size)
    for indices in tqdm(batches, "samples", leave=False, disable=None):   # None: terminals only
        # One generator per image: the batch size then does not change what is drawn.
        generators = [torch_stream(cfg, "samples", i) for i in indices.tolist()]
        z = [torch.randn(rae.mean.shape, generator=g, device=cfg.device) for g in generators]
        with autocast(cfg):
            latents = sampler(torch.stack(z), labels[indices].to(cfg.device))
        # The decoder runs in float32, since bfloat16 has too few grey levels.
        images[indices] = to_uint8(rae.decode(latents.float()))
    return images


def save_grid(path, sampler, rae, classes, n_each, cfg):
    """A PNG with one row per class; the noise is the same at each call."""
    labels = torch.tensor(classes).repeat_interleave(n_each)
    images = generate(sampler, rae, labels, cfg).permute(0, 3, 1, 2)     # [n,3,H,W]
    grid = make_grid(images, n_each, padding=1).permute(1, 2, 0)
    picture = Image.fromarray(grid.numpy())
    save(path, partial(picture.save, format="PNG"))


def sample(cfg):
    """--sample: write equally many images of each class (§4) to FILE.npz or FILE.png."""
    to = Path(cfg.to)
    if to.is_dir():
        raise UserError(f"--to: {to} is a folder")
    make_folder(to.parent)
    path = Path(cfg.out, "student.pt")
    checkpoint = load(path)
    student = read_network(checkpoint, path).to(cfg.device)
    rae = load_autoencoder(checkpoint, path, cfg.models).to(cfg.device)
    require_same_latents(student, rae, path)
    require_keys(checkpoint, ["classes"], path)
    distilled = checkpoint["classes"]
    classes = distilled
    if cfg.classes:
        classes = [int(name) for name in cfg.classes.split(",")]
    if not set(classes) <= set(distilled):
        raise UserError(f"--classes: the student was distilled on the classes {distilled}")
    if cfg.sample % len(classes):
        raise UserError(f"--sample must be a multiple of {len(classes)}, the number of classes")
    n_each = cfg.sample // len(classes)
    sampler = partial(one_step, guide(student, cfg.guidance))
    try:
        if to.suffix == ".png":
            save_grid(to, sampler, rae, classes, n_each, cfg)
        else:
            labels = torch.tensor(classes).repeat(n_each)
            images = generate(sampler, rae, labels, cfg)
            save(to, partial(np.savez, arr_0=images.numpy(), arr_1=labels.numpy()))
    except KeyboardInterrupt:
        raise UserError(f"interrupted: the images are lost, {to} was not written") from None


def require_new_or_finished(out):
    """Do not overwrite a run that can still be resumed."""
    if (out / "state.pt").exists():
        state = load(out / "state.pt")
        missing = state["config"]["steps"] - len(state["log"])
        if missing > 0:
            raise UserError(f"{out} holds a run that has {missing} steps to go: continue it with "
                            "--resume, or choose another --out")


def save_run(student, ema, optimizer, log, cfg):
    """Write OUT/state.pt, from which --resume continues, and OUT/log.csv, a row per step."""
    state = {"student": student.state_dict(), "ema": ema.state_dict(), "log": log}
    state["optimizer"] = optimizer.state_dict()
    state["config"] = dataclasses.asdict(cfg)
    save(Path(cfg.out, "state.pt"), partial(torch.save, state))
    rows = [list(row.values()) for row in log]
    table = partial(np.savetxt, X=rows, fmt="%g", delimiter=",", header=",".join(log[0]),
                    comments="")
    save(Path(cfg.out, "log.csv"), table)


def main(argv=None):
    began = perf_counter()
    cfg, state = configure(parse(argv))
    check(cfg)
    choose_device(cfg)
    if cfg.sample:
        if RANK == 0:
            sample(cfg)
        return
    if WORLD > 1:
        # The other processes wait while one writes the state: allow a slow disk an hour.
        distributed.init_process_group("nccl" if cfg.device == "cuda" else "gloo",
                                       timeout=timedelta(hours=1))

    # The folder OUT. Only rank 0 writes into it.
    out = Path(cfg.out)
    if RANK == 0:
        make_folder(out)
        if not cfg.resume:
            require_new_or_finished(out)

    # The networks. A resumed run starts from its state instead of the teacher's weights.
    checkpoint = load(cfg.teacher)
    start_from, path = checkpoint, cfg.teacher
    if cfg.resume:
        start_from, path = state, out / "state.pt"
    # A state's weights are loaded once more below: read_network takes only the moving average.
    student, ema, optimizer = prepare(read_network(start_from, path), cfg)
    rae = load_autoencoder(checkpoint, cfg.teacher, cfg.models).to(cfg.device)
    require_same_latents(student, rae, cfg.teacher)
    log = []                                                 # one row per step
    if cfg.resume:
        student.load_state_dict(state["student"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    student.recompute = cfg.grad_checkpoint
    if cfg.compile:
        student.compile(dynamic=False)

    # The data: the latents in the teacher's checkpoint, or a folder of images.
    if cfg.data:
        dataset = open_images(cfg.data, student.num_classes, rae.decoder.image_size)
        labels = dataset.targets
    elif "latents" in checkpoint:
        dataset = TensorDataset(checkpoint["latents"], checkpoint["labels"])
        labels = checkpoint["labels"]
    else:
        raise UserError(f"{cfg.teacher} holds no latents: name a folder of images with --data")
    class_sampler = ClassSampler(labels, cfg, first_step=len(log))
    classes = class_sampler.classes
    if not WORLD <= cfg.n_class <= len(classes):
        raise UserError(f"--n-class is {cfg.n_class}, but it must be at least {WORLD}, the number "
                        f"of processes, and at most {len(classes)}, the classes with images")
    positives = load_positives(dataset, class_sampler, rae, cfg)

    # The training.
    loss_function = latent_loss
    if cfg.field != "softmax" or list(cfg.windows) != [1]:
        loss_function = variant_loss
    steps = distil(student, ema, optimizer, positives, cfg, len(log), loss_function)
    silent = True if RANK > 0 else None                      # None: silent without a terminal
    if RANK == 0 and "judge" in checkpoint:
        # A teacher of digits holds the judge, a classifier in whose features samples are measured.
        # toy/digits.py makes a film of the training, and the final report.
        from toy import digits
        steps = digits.film(steps, ema, rae, cfg, len(log))
    bar = tqdm(steps, "distil", cfg.steps, initial=len(log), disable=silent)
    start = perf_counter()
    if log:
        start -= log[-1]["seconds"]                          # continue the elapsed time
    saved = len(log)
    try:
        for step, means in bar:
            row = {name: value.item() for name, value in means.items()}
            log.append({"step": step, **row, "seconds": perf_counter() - start})
            bar.set_postfix(loss=row["loss"], grad_norm=row["grad_norm"])
            done = step + 1
            if done < cfg.steps and done % cfg.save_every > 0:
                continue
            if RANK == 0:
                save_run(student, ema, optimizer, log, cfg)
                if saved == 0:                               # remove what an older run left in OUT
                    for name in ("student.pt", "metrics.json", "training.gif"):
                        (out / name).unlink(missing_ok=True)
            saved = done                                     # from here the run can be resumed
            if RANK == 0:
                save_grid(out / "samples.png", partial(one_step, ema), rae, classes[:10], 8, cfg)
    except KeyboardInterrupt:
        advice = "nothing was saved"
        if saved > 0:
            advice = f"--resume --out {out} continues after step {saved}"
        raise UserError(f"interrupted: {advice}") from None

    # The result.
    if RANK == 0:
        contents = {"ema": ema.state_dict(), "classes": classes}
        if "rae" in checkpoint:
            contents["rae"] = checkpoint["rae"]
        save(out / "student.pt", partial(torch.save, contents))
        if "judge" in checkpoint:
            digits.report(ema, rae, checkpoint, cfg, log, began)
    if WORLD > 1:
        distributed.destroy_process_group()


OUT_OF_MEMORY = "out of memory: try --grad-checkpoint, a smaller --batch-size or a smaller --n-neg"
SHARED_MEMORY = ("the processes that read images lack shared memory: enlarge /dev/shm (start a "
                 "Docker container with --shm-size=16g), or use fewer --workers")
ADVICE = {
    "out of memory": OUT_OF_MEMORY,                          # on a GPU
    "DefaultCPUAllocator": OUT_OF_MEMORY,
    "shared memory": SHARED_MEMORY,
    "DataLoader timed out": f"no image was read for five minutes; perhaps {SHARED_MEMORY}",
    "killed by signal": f"a process that reads images was killed; perhaps {SHARED_MEMORY}",
    "exited unexpectedly": f"a process that reads images was killed; perhaps {SHARED_MEMORY}"}


def run_as_script(main):
    """Run main(). An error that the user can fix ends in one sentence, a bug in its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                 # a terminal may not know τ
    try:
        main()
    except UserError as error:
        # Processes that read images put a traceback before the sentence.
        sys.exit(str(error).rpartition("UserError: ")[2].strip())
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except RuntimeError as error:
        for symptom, advice in ADVICE.items():
            if symptom in str(error):
                sys.exit(advice)
        raise


if __name__ == "__main__":
    # toy/digits.py imports drift_rae: let it find this module instead of loading a second one.
    sys.modules["drift_rae"] = sys.modules["__main__"]
    run_as_script(main)
