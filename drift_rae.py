"""Drift-RAE (arXiv 2606.15553) in one file: a flow teacher in RAE space -> a one-step generator.

MNIST, Fréchet distance in a classifier's features, 3 seeds: student in one step 2.16 ± 0.20,
teacher in 49 steps 1.85 ± 0.21; halves of the real ones 1.48. 304 s on 2 CPU cores (AMD EPYC).

    python drift_rae.py                           MNIST on a CPU: RAE, teacher, student, table
    python drift_rae.py --teacher ckpt.pt         distil this teacher; --preset imagenet256: Table 8
    python drift_rae.py --sample 1000 --to FILE   draw images into an .npz or a .png

A Representation Autoencoder (RAE) is a frozen encoder, DINOv2, and a decoder trained to invert it:
an image becomes a grid of tokens, its latents. The teacher is a flow among them, v(x, t | y): a
DiT^DH that takes 49 steps to an image. The student starts as its copy and learns to take one step,
by drifting: each token that it makes is pulled to the class's real tokens of its place and pushed
from the others that it makes there. Where both are distributed alike, V = 0, and it is done.
The paper's modifications: (1) softmax over targets, (2) perturbed queries, (3) detached negatives.

To read beside the paper; sections 1 to 4 are the method:
    1 Configuration   §4    Table 8, all of it: PRESETS over the digits' defaults
    2 Drifting        §3.3  Eq. (5), (11) drift_field · Eq. (12) laplace_noise · Eq. (10) drift_loss
    3 Flow            §3.1  Eq. (1)-(4) flow_matching_loss (for toy/digits.py) · Eq. (8) one_step
    4 Distillation    §4    class_loss, train_step, distil
    5 RAE · 6 DiT^DH · 7 Data · 8 Checkpoints · 9 Sampling · 10 Command
§3.2, why drifting suits this space, and the tables of §4: toy/.

Latents are [B,D,h,w] outside the loss and [C,N,D] inside it: C tokens of N samples of one class."""
import csv
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections import defaultdict
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from inspect import getsource
from itertools import islice
from math import isqrt, pi
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image
from tqdm import tqdm

# ---- 1  Configuration (§4, Table 8): each line is a flag, as in --n-pos 128, its comment the help

@dataclass
class Config:
    steps: int = 100                  # optimizer steps
    n_class: int = 10                 # classes per step, one after the other
    n_pos: int = 256                  # real images per class, as many as negatives (Table 7)
    n_neg: int = 64                   # generated samples per class that carry gradient
    n_extra_neg: int = 192            # the same without gradient: modification 3
    temperatures: tuple = (0.02, 0.05, 0.2)   # τ of the fields, in mean distances S
    field: str = "softmax"            # Eq. (11), modification 1; y-softmax: Deng et al.'s
    perturb: bool = True              # Eq. (12), perturbed queries: modification 2
    windows: tuple = (1,)             # sides, in tokens, of what drifts as one (ours); 1: the paper
    lr: float = 1e-3                  # learning rate at step 0
    lr_final: float = 0.01            # what it falls to, linearly, as a share of --lr
    betas: tuple = (0.9, 0.95)        # decay of AdamW's two moments
    weight_decay: float = 0.0         # AdamW's
    clip: float = 1.0                 # largest norm of the gradient
    ema: float = 0.99                 # decay of the weights' moving average, which is the result
    ema_warmup: int = 50              # steps over which that decay rises from 0.5
    # the run
    preset: str = "digits"            # the defaults shown; imagenet256: Table 8, with flip and bf16
    teacher: str = ""                 # checkpoint of the flow, ours or official; '': OUT/teacher.pt
    data: str = ""                    # images, a subfolder per class; '': the teacher file's
    flip: bool = False                # with --data: mirror half of the positives
    models: str = "models"            # folder of the released files, where the teacher is official
    out: str = "out"                  # folder for all that a run writes
    resume: bool = False              # go on from OUT/state.pt, under its configuration
    save_every: int = 50              # steps between writes of OUT/state.pt, log.csv, samples.png
    seed: int = 0                     # of everything random but the digits' judge
    device: str = "auto"              # cpu, cuda, mps; auto: cuda where there is one
    dtype: str = "fp32"               # bf16: autocast of the networks, not of the field
    compile: bool = False             # torch.compile the student in training
    grad_checkpoint: bool = False     # recompute blocks in the backward pass: less memory
    workers: int = 4                  # processes per rank that read --data ahead
    batch_size: int = 256             # images per batch, in sampling and encoding
    sample: int = 0                   # only draw this many images, with OUT/student.pt
    to: str = ""                      # FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or FILE.png
    classes: str = ""                 # with --sample: these, as in 1,5,9; '': all
    guidance: float = 0.0             # with --sample: w of e(y) + w·(e(y) − e(∅)), free (ours)

# Table 8. The paper's 16 epochs: 10,000 · 32 · 64 samples with gradient, of 1.28 million images.
PRESETS = {"digits": {}, "imagenet256": dict(
    steps=10_000, n_class=32, lr=3e-5, ema=0.9995, ema_warmup=1000, flip=True, dtype="bf16",
    save_every=100, workers=8, batch_size=64)}

# ---- 2  Drifting (§3.3): each generated token is pulled to real and pushed from generated ones

@torch.no_grad()
def drift_field(x, pos, neg, temperature, scale, *, noise=None):
    """V of Eq. (11), [C,N,D]: how each generated token is to move, in latent units.
    x     [C,N,D]  queries: token c of the N generated samples of one class
    pos   [C,P,D]  positives: the same token of real samples
    neg   [C,M,D]  negatives: generated samples, the first N being x itself
    noise [C,N,D]  added to the queries alone, Eq. (12): Prop. 1 differentiates at fixed targets
    The kernel is exp(−distance / (temperature · scale)). Prop. 1 also divides each displacement by
    its length, Eq. (11) does not: V is not quite its gradient (which is in toy/runs.py)."""
    query = x if noise is None else x + noise
    tau = scale * temperature
    logits_pos = -torch.cdist(query, pos) / tau              # [C,N,P]
    logits_neg = -torch.cdist(query, neg) / tau              # [C,N,M]
    logits_neg.diagonal(dim1=1, dim2=2).fill_(-torch.inf)    # k ≠ j: none is its own negative
    w_pos = logits_pos.softmax(-1)                           # modification 1: over targets alone
    w_neg = logits_neg.softmax(-1)
    # Σ w⁺·(y − query) − Σ w⁻·(x_k − query): both weights sum to 1, and the query drops out
    attraction = w_pos @ pos                                 # [C,N,D]
    repulsion = w_neg @ neg
    return attraction - repulsion

@torch.no_grad()
def y_softmax_field(x, pos, neg, temperature, scale, *, noise=None):
    """What modification 1 replaces, as Deng et al. released it; arguments and units as above.
    Weights are √(softmax over the targets · softmax over the samples, the "y-softmax")."""
    query = x if noise is None else x + noise
    targets = torch.cat([neg, pos], 1)                       # [C,M+P,D]
    distance = torch.cdist(query, targets) / scale
    distance.diagonal(dim1=1, dim2=2).add_(100)              # k ≠ j; the clamp leaves 1e-3
    logits = -distance / temperature
    affinity = logits.softmax(-1) * logits.softmax(-2)
    affinity = affinity.clamp(min=1e-6).sqrt()
    w_neg, w_pos = affinity.split([neg.shape[1], pos.shape[1]], -1)
    mass_neg = w_neg.sum(-1, keepdim=True)                   # [C,N,1]
    mass_pos = w_pos.sum(-1, keepdim=True)
    # both weights sum to mass⁺ · mass⁻: the query drops out here, too
    attraction = (w_pos * mass_neg) @ pos
    repulsion = (w_neg * mass_pos) @ neg
    return attraction - repulsion

FIELDS = {"softmax": drift_field, "y-softmax": y_softmax_field}

def laplace_noise(x, generator=None):
    """n of Eq. (12), like x [C,N,D]: uniform direction, norm from |Laplace(0, 1)| = Exp(1)."""
    normal = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    direction = F.normalize(normal, dim=-1)
    norm = torch.empty_like(direction[..., :1]).exponential_(generator=generator)
    return norm * direction

def drift_loss(gen, pos, extra_neg=None, temperatures=(0.02, 0.05, 0.2), *, field=drift_field,
               perturb=True, generator=None):
    """Eq. (10), ‖G − sg[G + Ṽ]‖² -> (loss [C], a mean where the paper has a sum; info).
    gen [C,N,D] with gradient, pos [C,P,D]; extra_neg [C,E,D] only helps to estimate the repulsion.
    The temperatures' Ṽ are added: the direction of the paper's mean of losses. The units, which
    it leaves open, are those of Deng et al.'s code (its loss: y_softmax_field, perturb=False).
    Ṽ is normalised, so the loss hardly falls: watch info's `drift_τ`, rms ‖V_τ‖/S; `scale` is S."""
    x, pos = gen.detach(), pos.detach()
    neg = x if extra_neg is None else torch.cat([x, extra_neg.detach()], 1)
    targets = torch.cat([neg, pos], 1)
    scale = torch.cdist(x, targets).mean().clamp(min=1e-3)   # S, one number: unit of τ and n
    unit = (scale / x.shape[-1] ** 0.5).clamp(min=1e-3)      # S/√D: unit of a coordinate
    n = laplace_noise(x, generator) if perturb else torch.zeros_like(x)      # one n for all τ
    info = {"scale": scale}
    drift = torch.zeros_like(x)
    for temperature in temperatures:
        noise = temperature * scale * n                      # Eq. (12): modification 2
        with torch.autocast(x.device.type, enabled=False):   # whoever calls: float32 products
            V = field(x, pos, neg, temperature, scale, noise=noise)          # Eq. (11)
        V_scaled = V / unit
        rms = V_scaled.square().mean().clamp(min=1e-8).sqrt()        # one number, too
        drift += V_scaled / rms                              # Ṽ: of RMS 1, however small V is
        info[f"drift_{temperature:g}"] = rms
    target = x / unit + drift                                # sg[G + Ṽ]
    loss = (gen / unit - target).square().mean((1, 2))
    return loss, info

def tokens(latents, window=1):
    """[N,D,h,w] -> [C,N,D·window²]: a drifting problem for each window of tokens; 1: the paper."""
    require(latents.shape[-1] % window == 0, f"windows of {window} do not divide the tokens' grid")
    return F.unfold(latents, window, stride=window).permute(2, 0, 1)

# ---- 3  Flow (§3.1): t = 1 is noise, t = 0 is data; a model is any model(x, t, y) -> velocity

def time_shift(u, shift):
    """u in [0,1] -> t; shift > 1 spends more time near the noise, as high dimensions need."""
    return shift * u / (1 + (shift - 1) * u)

def flow_matching_loss(model, latents, y, shift=1.0):
    """Eq. (1)-(4): x_t = (1−t)·x + t·ε, v regresses ε − x. latents x [B,D,h,w], classes y [B]."""
    noise = torch.randn(latents.shape, device=latents.device)
    u = torch.randn(len(latents), device=latents.device).sigmoid()       # as released teachers
    t = time_shift(u, shift)
    t_column = t.view(-1, 1, 1, 1)
    v = model((1 - t_column) * latents + t_column * noise, t, y)
    return (v - (noise - latents)).square().mean()

@torch.no_grad()
def ode_sample(model, z, y, steps=50, shift=1.0, cfg_scale=1.0, cfg_interval=(0, 1)):
    """The official Euler sampler (there shift = √48), z [B,D,h,w] -> same: `steps` grid points.
    cfg_scale ≠ 1: classifier-free guidance where t lies in cfg_interval, ends included."""
    x = z
    times = time_shift(1 - torch.linspace(0, 0.999, steps, device=z.device), shift)
    for t, t_next in zip(times[:-1], times[1:]):
        v = model(x, t.expand(len(z)), y)
        if cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]:
            no_class = torch.full_like(y, model.num_classes)
            v_null = model(x, t.expand(len(z)), no_class)
            v = v_null + cfg_scale * (v - v_null)
        x = x + (t_next - t) * v
    return x

def one_step(model, z, y):
    """Eq. (8): G(z) = z − v(z, 1), the student. z [B,D,h,w], y [B] -> latents [B,D,h,w]."""
    return z - model(z, torch.ones(len(z), device=z.device), y)

# ---- 4  Distillation (§4): class by class, gradients accumulated over the classes of a step

def class_loss(student, label, pos, step, cfg):
    """Loss of one class, a sum over the windows, and what to log; pos [P,D,h,w]: real latents."""
    generator = torch_stream(cfg, "noise", step, label)      # the same whatever the rank
    n = cfg.n_neg + cfg.n_extra_neg
    z = torch.randn(n, *pos.shape[1:], generator=generator, device=cfg.device)
    y = torch.full((n,), label, device=cfg.device)
    with autocast(cfg):
        # before extra_neg: a weight that autocast first casts under no_grad is cached without grad
        gen = one_step(student, z[:cfg.n_neg], y[:cfg.n_neg])
        extra_neg = gen[:0]                                  # none
        if cfg.n_extra_neg:
            with torch.no_grad():                            # modification 3
                extra_neg = one_step(student, z[cfg.n_neg:], y[cfg.n_neg:])
    total = 0
    for window in cfg.windows:                               # (1,) in the paper
        latents = [tokens(x, window) for x in (gen, pos, extra_neg)]
        loss, info = drift_loss(*latents, cfg.temperatures, field=FIELDS[cfg.field],
                                perturb=cfg.perturb, generator=generator)
        total = total + loss.mean()                          # over the tokens
    return total, info | {"loss": total.detach()}            # scale, drift: the last window's

def train_step(student, ema, optimizer, batch, step, cfg):
    """One step, from noise to the moving average -> what to log, means over the step's classes.
    batch: this rank's (class, positives [P,D,h,w]), one by one; all ranks together have n_class."""
    log = defaultdict(float)
    for label, pos in batch:
        loss, info = class_loss(student, label, pos, step, cfg)
        (loss / cfg.n_class).backward()
        for name, value in info.items():
            log[name] += value / cfg.n_class
    sum_over_ranks(p.grad for p in student.parameters())
    sum_over_ranks(log.values())
    norm = clip_grad_norm_(student.parameters(), cfg.clip)
    if not norm.isfinite():
        raise FloatingPointError(f"NaN or infinite gradient at step {step}: is --lr too high?")
    optimizer.param_groups[0]["lr"] = cfg.lr - (cfg.lr - cfg.lr * cfg.lr_final) * step / cfg.steps
    optimizer.step()
    optimizer.zero_grad()
    warmth = min(1, step / cfg.ema_warmup)
    update_average(ema, student, decay=0.5 * (cfg.ema / 0.5) ** warmth)
    return log | {"grad_norm": norm}

def update_average(average, model, decay):
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p.detach(), 1 - decay)

def distil(student, data, cfg, rae=None, state=None):
    """Train `student`, a copy of the teacher -> the moving average of its weights, in eval mode.
    data, rae: as in `batches`. Writes OUT/log.csv, OUT/state.pt; given the rae, OUT/samples.png.
    state: what a state.pt holds, to go on from there; the student has its weights already."""
    student.eval()                                           # no label is dropped
    ema = deepcopy(student).requires_grad_(False)
    optimizer = AdamW(student.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay,
                      fused=True)
    log = []
    began = perf_counter()
    if state:
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        began -= log[-1]["seconds"]                          # its clock goes on
    middle = f"drift_{cfg.temperatures[len(cfg.temperatures) // 2]:g}"
    steps = batches(data, len(log), cfg, rae)
    bar = tqdm(steps, "distil", cfg.steps, initial=len(log), disable=rank() > 0,
               unit="images", unit_scale=cfg.n_class * cfg.n_pos)        # real ones
    for step, batch in bar:
        means = train_step(student, ema, optimizer, batch, step, cfg)
        row = {name: value.item() for name, value in means.items()}
        log.append({"step": step, **row, "seconds": perf_counter() - began})
        bar.set_postfix(drift=row[middle], grad_norm=row["grad_norm"])
        done = step + 1
        if rank() == 0 and (done == cfg.steps or done % cfg.save_every == 0):
            save_state(student, ema, optimizer, log, cfg)
            if rae:
                path = Path(cfg.out, "samples.png")
                save_grid(path, partial(one_step, ema), rae, data.classes[:10], 8, cfg)
    return ema

# ---- The method ends here. Below: the networks, and what a real run needs.

# ---- 5  Representation Autoencoder (§3.1; code bytetriper/RAE): a frozen encoder, a ViT decoder

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
    def forward(self, x, rope=nn.Identity()):                # [B,N,D]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))     # [B,N,3,heads,d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # [B,heads,N,d] each
        out = F.scaled_dot_product_attention(rope(q), rope(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))

class Mlp(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
    def forward(self, x):
        return self.gamma * x

class Block(nn.Module):
    """Pre-norm transformer block with LayerScale, under DINOv2's key names."""
    def __init__(self, dim, heads, mlp_dim, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, mlp_dim)
        self.ls2 = LayerScale(dim)
    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

class PatchEmbed(nn.Sequential):
    """Images or latents [B,C,H,W] -> a token per patch, [B,D,h,w]."""
    def __init__(self, channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

class ViT(nn.Module):
    """DINOv2 with registers; loads dinov2_vitb14_reg4_pretrain.pth strictly."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_registers=4,
                 mlp_ratio=4):
        super().__init__()
        self.grid = img_size // patch_size
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))    # released, of no use here
        mlp_dim = int(mlp_ratio * embed_dim)
        blocks = [Block(embed_dim, num_heads, mlp_dim, 1e-6) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, 1e-6)            # of use to eval_fid.py alone
    def features(self, x):
        """Normalised images [B,3,H,W] -> class, register and patch tokens [B,1+R+N,D], no norm."""
        x = self.patch_embed(x)                              # [B,D,h,w]
        pos = self.pos_embed[:, 1:].mT.unflatten(-1, (self.grid, -1))
        pos = F.interpolate(pos, x.shape[-2:], mode="bicubic", antialias=True)   # 518 pixels -> 224
        patches = (x + pos).flatten(2).mT                    # [B,N,D]
        cls = self.cls_token + self.pos_embed[:, :1]
        prefix = torch.cat([cls, self.register_tokens], 1)   # registers have no position
        return self.blocks(torch.cat([prefix.expand(len(x), -1, -1), patches], 1))
    def forward(self, x):
        """Normalised images [B,3,H,W] -> patch tokens [B,N,D], after a LayerNorm without affine."""
        patches = self.features(x)[:, 1 + self.register_tokens.shape[1]:]
        return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)

def grid_angles(n, grid, dtype):
    """Angles position · 10000^(−i/n), i < n, of rows and of columns, [grid²,n] each."""
    frequency = 10000.0 ** (-torch.arange(n, dtype=dtype) / n)
    angle = torch.outer(torch.arange(grid, dtype=dtype), frequency)
    return angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)

def sincos_2d(dim, grid):
    """Fixed 2-D sine-cosine position embedding of MAE and DiT, [grid²,dim], column first."""
    row, column = grid_angles(dim // 4, grid, torch.float64)
    parts = [column.sin(), column.cos(), row.sin(), row.cos()]
    return torch.cat(parts, 1).float()

class Decoder(nn.Module):
    """The RAE's ViT decoder: tokens [B,N,D] -> images [B,3,H,W] in normalised pixel space."""
    def __init__(self, latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid):
        super().__init__()
        self.patch_size, self.image_size = patch_size, grid * patch_size
        self.embed = nn.Linear(latent_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        pos_embed = torch.cat([torch.zeros(1, width), sincos_2d(width, grid)])   # 0: class token
        self.register_buffer("pos_embed", pos_embed.unsqueeze(0))
        blocks = [Block(width, num_heads, mlp_dim, 1e-12) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)
    def forward(self, x):
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.embed(x)], 1) + self.pos_embed
        patches = self.pred(self.norm(self.blocks(x)))[:, 1:]    # [B,N,p·p·3]
        patches = patches.unflatten(-1, (-1, 3)).mT.flatten(2)   # [B,N,3·p·p]
        return F.fold(patches.mT, self.image_size, self.patch_size, stride=self.patch_size)
    @classmethod
    def from_official(cls, state_dict, num_heads):
        """The released decoder (bytetriper/RAE); sizes but the heads are read off the tensors."""
        sd = {}
        for key, value in state_dict.items():
            for official, short in OFFICIAL_KEYS:
                key = key.replace(official, short)
            sd[key] = value
        width, latent_dim = sd["embed.weight"].shape
        depth = sum(key.endswith("norm1.weight") for key in sd)
        for block in [f"blocks.{i}" for i in range(depth)]:
            for kind in ("weight", "bias"):
                qkv = [sd.pop(f"{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
                sd[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            sd[f"{block}.ls1.gamma"] = sd[f"{block}.ls2.gamma"] = torch.ones(width)  # it has none
        mlp_dim = len(sd["blocks.0.mlp.fc1.bias"])
        patch_size = isqrt(len(sd["pred.bias"]) // 3)
        grid = isqrt(sd["pos_embed"].shape[1] - 1)
        model = cls(latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid)
        model.load_state_dict(sd)
        return model

OFFICIAL_KEYS = [("decoder_layers", "blocks"), ("attention.attention", "attn"),
                 ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"),
                 ("output.dense", "mlp.fc2"), ("layernorm_before", "norm1"),
                 ("layernorm_after", "norm2"), ("trainable_cls_token", "cls_token"),
                 ("decoder_", "")]

def pixel_logits(images):
    """A pixel as a logit, 6·(x − ½): for the digits, which are nearly black and white."""
    return 6 * images - 3

class RAE(nn.Module):
    """Frozen encoder and decoder; statistics [D,h,w] normalise each channel at each position."""
    def __init__(self, encoder, decoder, mean, var, input_size, eps=1e-5, sigmoid=False):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.input_size, self.sigmoid = input_size, sigmoid
        self.register_buffer("mean", mean)
        self.register_buffer("std", (var + eps).sqrt())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False).eval()
    def encode(self, images):
        """Images [B,3,H,W] in [0,1] -> normalised latents [B,D,h,w]."""
        images = F.interpolate(images, self.input_size, mode="bicubic")      # as released
        x = self.encoder((images - self.pixel_mean) / self.pixel_std)    # [B,N,D]
        latents = x.mT.unflatten(-1, self.mean.shape[-2:])
        return (latents - self.mean) / self.std
    def decode(self, latents):
        """Normalised latents [B,D,h,w] -> images [B,3,H,W] around [0,1], not clamped."""
        latents = latents * self.std + self.mean
        x = self.decoder(latents.flatten(2).mT)              # of tokens [B,N,D]
        images = x * self.pixel_std + self.pixel_mean
        return torch.sigmoid(pixel_logits(images)) if self.sigmoid else images       # digits: yes

# ---- 6  DiT^DH (code bytetriper/RAE): a deep narrow encoder conditions each token of a wide head

def zero(layer):
    """adaLN-Zero: blocks begin as the identity, the output as 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

def ada_ln(dim, n):
    return nn.Sequential(nn.SiLU(), zero(nn.Linear(dim, n * dim)))

def modulate(x, shift, scale):
    return x * (1 + scale) + shift

class RoPE(nn.Module):
    """Rotary embedding over a grid² of tokens; the buffers are part of the released state dict."""
    def __init__(self, head_dim, grid):
        super().__init__()
        angle = torch.cat(grid_angles(head_dim // 4, grid, torch.float32), 1)    # [g²,d/2]
        angle = angle.repeat_interleave(2, 1)                # [g²,d]: a pair turns together
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())
    def forward(self, x):                                    # [B,heads,N,d]
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)        # each pair by 90 degrees
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)

class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)

class DiTBlock(nn.Module):
    """adaLN block; condition: one vector per sample, [B,1,D], or in the head per token, [B,N,D]."""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, 1e-6)
        self.mlp = SwiGLU(dim, 8 * dim // 3)                 # as many weights as an MLP 4·dim wide
        self.adaLN_modulation = ada_ln(dim, 6)
    def forward(self, x, condition, rope):
        modulation = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

class TimestepEmbedder(nn.Module):
    """t [B] -> [B,1,D], over Gaussian Fourier features."""
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(512, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("W", torch.randn(256))
    def forward(self, t):
        angle = 2 * pi * t.view(-1, 1, 1) * self.W           # [B,1,256]
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))

class LabelEmbedder(nn.Module):
    """y [B] -> [B,1,D]; in train() mode dropout_prob of the labels become num_classes: no class."""
    def __init__(self, num_classes, dim, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)
    def forward(self, y):
        if self.training:
            dropped = torch.rand_like(y, dtype=torch.float32) < self.dropout_prob
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y).unsqueeze(1)

class FinalLayer(nn.Module):
    def __init__(self, dim, channels):
        super().__init__()
        self.norm_final = nn.RMSNorm(dim, 1e-6)
        self.linear = zero(nn.Linear(dim, channels))
        self.adaLN_modulation = ada_ln(dim, 2)
    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class DiTDH(nn.Module):
    """Velocity v(x, t | y) of the flow, teacher and student alike; official state-dict keys.
    hidden_size, depth and num_heads are pairs (encoder, head); class num_classes is "no class"."""
    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 class_dropout_prob=0.1):
        super().__init__()
        self.input_size, self.in_channels = input_size, in_channels
        self.num_classes, self.depth = num_classes, tuple(depth)
        narrow, wide = hidden_size
        self.register_buffer("pos_embed", sincos_2d(narrow, input_size).unsqueeze(0))
        self.s_embedder = PatchEmbed(in_channels, narrow, 1)
        self.x_embedder = PatchEmbed(in_channels, wide, 1)
        self.s_projector = nn.Identity() if narrow == wide else nn.Linear(narrow, wide)
        self.t_embedder = TimestepEmbedder(narrow)
        self.y_embedder = LabelEmbedder(num_classes, narrow, class_dropout_prob)
        self.enc_feat_rope = RoPE(narrow // num_heads[0], input_size)
        self.dec_feat_rope = RoPE(wide // num_heads[1], input_size)
        self.blocks = nn.ModuleList()                        # the encoder's, then the head's
        for width, n, heads in zip(hidden_size, depth, num_heads):
            self.blocks += [DiTBlock(width, heads) for _ in range(n)]
        self.final_layer = FinalLayer(wide, in_channels)
    def forward(self, x, t, y):
        """x [B,D,h,w], t [B] in [0,1], y [B] class indices -> velocity [B,D,h,w]."""
        time_embedding = self.t_embedder(t)                  # [B,1,E]
        condition = F.silu(time_embedding + self.y_embedder(y))
        features = self.s_embedder(x).flatten(2).mT + self.pos_embed     # [B,N,E]
        for block in self.blocks[:self.depth[0]]:
            features = block(features, condition, self.enc_feat_rope)
        # one condition per token; a SiLU here and another in each adaLN, both as released
        condition = self.s_projector(F.silu(time_embedding + features))      # [B,N,H]
        out = self.x_embedder(x).flatten(2).mT
        out = out.to(x.dtype)                                # fp32, as `+ pos_embed` above
        for block in self.blocks[self.depth[0]:]:
            out = block(out, condition, self.dec_feat_rope)
        out = self.final_layer(out, condition)               # [B,N,D]
        return out.mT.unflatten(-1, x.shape[-2:])
    @classmethod
    def from_state_dict(cls, sd):
        """Sizes are read off the tensors, the heads off the RoPE buffers; then a strict load."""
        require(all(value.isfinite().all() for value in sd.values()), "it holds NaN or infinity")
        narrow, in_channels = sd["s_embedder.proj.weight"].shape[:2]
        wide = len(sd["x_embedder.proj.weight"])
        head_dims = [sd[f"{part}_feat_rope.freqs_cos"].shape[1] for part in ("enc", "dec")]
        num_heads = (narrow // head_dims[0], wide // head_dims[1])
        widths = [len(value) for key, value in sd.items() if key.endswith("norm1.weight")]
        n_head = 2 if narrow == wide else widths.count(wide)         # 2 in all released models
        depth = (len(widths) - n_head, n_head)
        input_size = isqrt(sd["pos_embed"].shape[1])
        num_classes = len(sd["y_embedder.embedding_table.weight"]) - 1
        model = cls(input_size, in_channels, (narrow, wide), depth, num_heads, num_classes)
        model.load_state_dict(sd)
        return model

# ---- 7  Data: random numbers, and real images of one class at a time (§3.3)

# A draw depends on seed, purpose and place, not on what was drawn before: so a resumed run draws
# what an unbroken one does, and several ranks what one does.
STREAMS = {"noise": 0, "positives": 1, "classes": 1, "samples": 2}   # classes have no label: −1

def stream(cfg, purpose, index, label=-1):
    """NumPy's generator for a purpose at step (or of sample) `index`, perhaps of one class."""
    return np.random.default_rng([cfg.seed, index, label + 1, STREAMS[purpose]])

def torch_stream(cfg, purpose, index, label=-1):
    """The same for tensors, on the device."""
    seed = stream(cfg, purpose, index, label).integers(2**63)
    return torch.Generator(cfg.device).manual_seed(int(seed))

@dataclass
class Positives(Dataset):
    """Item (step, label): that label, n_pos real images of it, with replacement if it has fewer."""
    source: object                    # latents [n,D,h,w], or an ImageFolder of uint8 [H,W,3]
    labels: np.ndarray                # [n]
    cfg: Config
    @cached_property
    def classes(self):
        return np.unique(self.labels).tolist()               # that have images
    def __getitem__(self, item):
        step, label = item
        rng = stream(self.cfg, "positives", step, label)
        n = self.cfg.n_pos
        members = np.flatnonzero(self.labels == label)
        chosen = rng.choice(members, n, replace=len(members) < n)
        if isinstance(self.source, torch.Tensor):
            return label, self.source[chosen]
        images = torch.stack([self.source[i][0] for i in chosen])
        if self.cfg.flip:
            mirrored = rng.random(n) < 0.5
            images[mirrored] = images[mirrored].flip(2)
        return label, images

def batches(data, first, cfg, rae=None):
    """Yields (step, batch) from step `first` on; batch: this rank's (class, latents [P,D,h,w]).
    data: Positives; images are encoded by the rae."""
    chosen = {}
    for step in range(first, cfg.steps):
        rng = stream(cfg, "classes", step)
        labels = rng.choice(data.classes, cfg.n_class, replace=False)
        chosen[step] = labels.tolist()[rank()::world()]
    items = [(step, label) for step in chosen for label in chosen[step]]
    pairs = map(data.__getitem__, items)
    if isinstance(data.source, ImageFolder):
        loader = DataLoader(data, batch_size=None, sampler=items, num_workers=cfg.workers)
        pairs = ((label, encode(rae, images, cfg)) for label, images in loader)
    for step in chosen:
        yield step, islice(pairs, len(chosen[step]))         # train_step takes them all

def center_crop(image, size):
    """ADM's, of a PIL image: halve while twice too large, resize the short side, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def read_image(path, size):
    try:
        image = Image.open(path).convert("RGB")
    except Exception as error:                               # of many kinds; few name the file
        raise ValueError(f"{path} cannot be read, mend or remove it: {error}") from error
    return torch.from_numpy(np.array(center_crop(image, size)))

def encode(rae, images, cfg):
    """Images uint8 [n,H,W,3] -> latents [n,D,h,w] on the device."""
    pixels = images.to(cfg.device).permute(0, 3, 1, 2) / 255
    with autocast(cfg):
        return torch.cat([rae.encode(batch) for batch in pixels.split(cfg.batch_size)])

def to_uint8(images):
    """[n,3,H,W] around [0,1] -> uint8 [n,H,W,3] on the CPU."""
    levels = (images.clamp(0, 1) * 255).round()
    return levels.byte().permute(0, 2, 3, 1).cpu()

# ---- 8  Checkpoints, ours and the released ones: read without unpickling, loaded strictly

@contextmanager
def reading(path, mmap=False):
    """What torch.load finds; for a missing, cut, foreign or malicious file one sentence."""
    try:
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]          # torch's advice takes pages
        raise ValueError(f"cannot read {path}: {type(error).__name__}, {reason}") from error

@contextmanager
def write_atomically(path, mode="wb"):
    """A file of another name, renamed at the end: path is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                 # the latter is torch.save's
        raise OSError(f"cannot write {path}, an old file is kept: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)

def load_teacher(path):
    """The DiT^DH of our or an official checkpoint, a raw state dict or the key `ema`; eval mode."""
    with reading(path) as checkpoint:
        return DiTDH.from_state_dict(checkpoint.get("ema", checkpoint)).eval()

def build_rae(saved):
    """The RAE that toy/digits.py saves."""
    encoder, decoder = ViT(**saved["encoder_args"]), Decoder(**saved["decoder_args"])
    encoder.load_state_dict(saved["encoder"])
    decoder.load_state_dict(saved["decoder"])
    settings = {key: saved[key] for key in ("mean", "var", "input_size", "sigmoid")}
    return RAE(encoder, decoder, **settings)

def released_rae(models, vit_b14=(518, 14, 768, 12, 12)):
    """bytetriper/RAE's, its files where README's two download commands put them."""
    encoder = ViT(*vit_b14)
    with reading(Path(models, "dinov2_vitb14_reg4_pretrain.pth")) as state_dict:
        encoder.load_state_dict(state_dict)
    with reading(Path(models, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt")) as state_dict:
        decoder = Decoder.from_official(state_dict, num_heads=16)
    with reading(Path(models, "stats/dinov2/wReg_base/imagenet1k/stat.pt")) as statistics:
        mean, var = statistics["mean"], statistics["var"]
    return RAE(encoder, decoder, mean, var, input_size=mean.shape[-1] * vit_b14[1])

def load_pair(path, cfg, weights=None):
    """-> network, RAE, and what our own file holds beside them; weights: a resumed student's."""
    with reading(path) as checkpoint:
        model = DiTDH.from_state_dict(weights or checkpoint.get("ema", checkpoint)).eval()
        saved = checkpoint if "rae" in checkpoint else {}
        rae = build_rae(saved["rae"]) if saved.get("rae") else None
    rae = rae or released_rae(cfg.models)
    shape = [model.in_channels, model.input_size, model.input_size]
    require(list(rae.mean.shape) == shape, f"latents {shape} are not of {path}'s autoencoder")
    return model.to(cfg.device), rae.to(cfg.device), saved

def save_state(student, ema, optimizer, log, cfg):
    """Write OUT/state.pt and OUT/log.csv."""
    state = {"student": student.state_dict(), "ema": ema.state_dict(), "log": log,
             "optimizer": optimizer.state_dict(), "config": asdict(cfg)}
    with write_atomically(Path(cfg.out, "state.pt")) as file:
        torch.save(state, file)
    with write_atomically(Path(cfg.out, "log.csv"), "w") as file:
        table = csv.DictWriter(file, log[0], lineterminator="\n")
        table.writeheader()
        table.writerows(log)

# ---- 9  Sampling: an .npz or a picture

def guide(model, w):
    """A copy whose class embeddings are e(y) + w·(e(y) − e(∅)): guidance at no cost.
    Ours: the abstract of the paper's v2 speaks of extrapolation and gives no formula."""
    model = deepcopy(model)
    table = model.y_embedder.embedding_table.weight.data     # its last row is e(∅), and stays
    table += w * (table - table[-1:])
    return model

@torch.no_grad()
def generate(sampler, rae, labels, cfg):
    """Images uint8 [n,H,W,3] of sampler(z, y) -> latents, for labels [n]."""
    images = []
    for batch in tqdm(torch.arange(len(labels)).split(cfg.batch_size), leave=False):
        generators = [torch_stream(cfg, "samples", i) for i in batch.tolist()]
        z = [torch.randn(rae.mean.shape, generator=g, device=cfg.device) for g in generators]
        with autocast(cfg):
            latents = sampler(torch.stack(z), labels[batch].to(cfg.device))
        images.append(to_uint8(rae.decode(latents)))         # in fp32: bf16 has too few grey levels
    return torch.cat(images)

def save_grid(path, sampler, rae, classes, n_each, cfg):
    """A PNG of n_each samples of each class, a row per class; the same noise each time."""
    labels = torch.tensor(classes).repeat_interleave(n_each)
    images = generate(sampler, rae, labels, cfg)
    with write_atomically(path) as file:
        save_image(images.permute(0, 3, 1, 2) / 255, file, format="png", nrow=n_each, padding=1)

def sample(cfg):
    """--sample: as many images of each class (§4) to FILE.npz (for eval_fid.py) or FILE.png."""
    model, rae, saved = load_pair(Path(cfg.out, "student.pt"), cfg)
    sampler = partial(one_step, guide(model, cfg.guidance))
    classes = distilled = saved.get("classes", [*range(model.num_classes)])
    if cfg.classes:
        classes = [int(name) for name in cfg.classes.split(",")]
    require(set(classes) <= set(distilled), f"--classes: the student was distilled on {distilled}")
    n_each, rest = divmod(cfg.sample, len(classes))
    require(rest == 0, f"--sample must be a multiple of {len(classes)}, the number of classes")
    if cfg.to.endswith(".png"):
        save_grid(Path(cfg.to), sampler, rae, classes, n_each, cfg)
    else:
        labels = torch.tensor(classes).repeat(n_each)
        images = generate(sampler, rae, labels, cfg)
        with write_atomically(Path(cfg.to)) as file:
            np.savez(file, arr_0=images.numpy(), arr_1=labels.numpy())

# ---- 10  Command

def world():
    return int(os.environ.get("WORLD_SIZE", 1))              # set by torchrun

def rank():
    return int(os.environ.get("RANK", 0))

def sum_over_ranks(tensors):
    if world() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)

def autocast(cfg):
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bf16")

def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)

CHOICES = {"field": FIELDS, "preset": PRESETS, "device": ["auto", "cpu", "cuda", "mps"],
           "dtype": ["fp32", "bf16"]}
NARGS = {"betas": 2}

def parse(argv=None):
    """Command line -> the flags that were given, {field of Config: value}."""
    comments = dict(re.findall(r"    (\w+): .*  # (.*)", getsource(Config)))
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    for field in fields(Config):
        kind = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is bool:
            kind = {"action": BooleanOptionalAction}
        elif field.type is tuple:
            kind = {"type": type(field.default[0]), "nargs": NARGS.get(field.name, "+")}
        kind["help"] = f"{comments[field.name]} (default: {field.default!r})"
        parser.add_argument("--" + field.name.replace("_", "-"), default=SUPPRESS, **kind)
    return vars(parser.parse_args(argv))

LIMITS = {"steps": (1, 1e9), "n_class": (1, 1e9), "n_pos": (1, 1e9), "n_neg": (2, 1e9),
          "n_extra_neg": (0, 1e9), "temperatures": (1e-6, 1e6), "windows": (1, 1e3), "lr": (0, 1e3),
          "lr_final": (0, 1), "betas": (0, 1), "weight_decay": (0, 1e3), "clip": (0, 1e9),
          "ema": (0.5, 1), "ema_warmup": (1, 1e9), "save_every": (1, 1e9), "seed": (0, 1e18),
          "workers": (0, 1e3), "batch_size": (1, 1e9), "sample": (0, 1e9), "guidance": (-10, 10)}
MAY_CHANGE = {"out", "resume", "device", "teacher", "data", "models", "workers", "save_every",
              "compile", "grad_checkpoint", "batch_size"}    # flags that --resume allows

def check(cfg):
    """ValueError for settings that cannot work."""
    for name, (low, high) in LIMITS.items():
        for value in np.atleast_1d(getattr(cfg, name)):
            require(low <= value <= high, f"{name} must be from {low:g} to {high:g}, not {value}")
    to_file = cfg.to.endswith((".npz", ".png"))
    require(to_file == bool(cfg.sample), "sampling takes --sample N --to FILE.npz or FILE.png")

def resume(given):
    """-> the saved Config, of which flags may change little, and the saved state."""
    for name in given:
        require(name in MAY_CHANGE, f"a resumed run keeps its {name}: leave that flag out")
    changes = {"device": "auto", "out": Config.out} | given      # it may go on elsewhere
    with reading(Path(changes["out"], "state.pt"), mmap=True) as state:
        return Config(**state["config"] | changes), state

def begin(cfg):
    """Before a new run: spare an unfinished one; train the digits' teacher if it is missing."""
    out = Path(cfg.out)
    old = out / "state.pt"
    if old.exists():
        with reading(old, mmap=True) as state:
            left = state["config"]["steps"] - len(state["log"])
        require(left == 0, f"{out} holds a run that lacks {left} steps: --resume, or change --out")
        old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    if not cfg.teacher and cfg.preset == "digits" and not (out / "teacher.pt").exists():
        from toy.digits import make_teacher
        make_teacher(out / "teacher.pt", cfg.seed)

def connect(cfg):
    """Find this process's device, and the other ranks."""
    available = {"cuda": torch.cuda.is_available(), "cpu": True,
                 "mps": torch.backends.mps.is_available()}
    if cfg.device == "auto":
        cfg.device = "cuda" if available["cuda"] else "cpu"
    require(available[cfg.device], f"--device {cfg.device}: torch finds none")
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.allow_tf32 = False              # fp32 is fp32
    if world() > 1:
        distributed.init_process_group("nccl" if cfg.device == "cuda" else "gloo")

def run(cfg, state, began):
    """Distil; write student.pt and, for the digits, the report to OUT."""
    out = Path(cfg.out)
    teacher = cfg.teacher or out / "teacher.pt"
    student, rae, saved = load_pair(teacher, cfg, state and state["student"])
    if cfg.data:
        reader = partial(read_image, size=rae.decoder.image_size)
        source = ImageFolder(cfg.data, loader=reader)
        labels = np.array(source.targets)
        names, n = source.classes, student.num_classes
        numbered = all(name.isdigit() for name in names)     # as in 217/
        if numbered:
            labels = np.array(names, int)[labels]
        require(labels.max() < n and (numbered or len(names) == n), f"{cfg.data} must hold {n} "
                "folders, one per class of the teacher, or some named by its number, as in 217/")
    else:
        require("images" in saved, "this teacher's file has no images: name a folder with --data")
        source, labels = encode(rae, saved["images"], cfg), saved["labels"].numpy()
    data = Positives(source, labels, cfg)
    require(world() <= cfg.n_class <= len(data.classes), f"it must hold: processes {world()} <= "
            f"--n-class {cfg.n_class} <= classes of the images {len(data.classes)}")
    if cfg.grad_checkpoint:                                  # keep a block's input alone
        for block in student.blocks:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if cfg.compile:
        student.compile(dynamic=False)
    ema = distil(student, data, cfg, rae, state)
    if rank() > 0:
        return
    with write_atomically(out / "student.pt") as file:
        contents = {"ema": ema.state_dict(), "rae": saved.get("rae"), "classes": data.classes}
        torch.save(contents, file)
    if "judge" in saved:
        from toy.digits import report
        report(ema, rae, saved, cfg, began)

def main(argv=None):
    began, given = perf_counter(), parse(argv)
    if given.get("resume"):
        cfg, state = resume(given)
    else:
        cfg, state = Config(**PRESETS[given.get("preset", Config.preset)] | given), None
    check(cfg)
    if not (cfg.resume or cfg.sample or rank() > 0):         # other ranks wait in `connect`
        begin(cfg)
    connect(cfg)
    if not cfg.sample:
        run(cfg, state, began)
    elif rank() == 0:
        sample(cfg)
    if world() > 1:
        distributed.destroy_process_group()

def command(main):
    """main(), but bad input ends in one sentence and a non-zero exit, without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved of a run goes on with drift_rae.py --resume")
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(str(error).strip().rpartition("\n")[2])     # above it, of a reader: a traceback

if __name__ == "__main__":
    command(main)
