"""Drift-RAE (arXiv 2606.15553) in one file: a flow teacher in RAE latent space -> a one-step generator.

On 1,740 real 8×8 digits, Fréchet distance of pixels, 3 seeds: student in one step 0.136 ± 0.006, teacher in 50 points
0.164 ± 0.014, in one step 2.6; 0.157 between two halves of the data. The first command below took 292 to 316 s on 2 CPU
cores (AMD EPYC). ImageNet-256 (the paper: FID 1.77) is not reproduced.

    python drift_rae.py                          digits on a CPU: RAE, teacher, student, table, samples.png
    python drift_rae.py --teacher ckpt.pt        distil this teacher (--data DIR; --preset imagenet256: Table 8)
    python drift_rae.py --resume                 go on from out/state.pt
    python drift_rae.py --sample 1000 --student out/student.pt --to samples.npz

Read it beside the paper, in this order:

    Eq. (5), (11)   drift_field, signed_weights     Eq. (12)        perturb
    Eq. (10)        drift_loss, normalised_drift    Eq. (1)-(4)     flow_matching_loss, ode_sample
    Eq. (8)         one_step                        Table 8         Config, PRESETS, learning_rate, ema_decay
    Prop. 1         signed_weights, and the tests   Modifications   1 signed_weights, 2 perturb, 3 class_gradient
    Theorem 1, Tables 1-2, 9, Figure 1: toy/geometry.py     Tables 3, 5-7, 9: toy/ablation.py

Latents are [B,D,h,w] outside the loss and [C,N,D] inside it: C tokens of N samples of one class, D wide.
"""
import argparse
import copy
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import weakref
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as compute_again
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from eval_fid import BAD_WEIGHTS, Parser, UserError, exit_code, explain, write_atomically

# ----------------------------------------------------------------------------------------------------
# Drifting (paper §3.1, §3.3). Each generated token is pulled to real ones and pushed from other generated ones.


def distances(q, y):
    """Euclidean distances of q [C,Q,D] and y [C,K,D] -> [C,Q,K], by one batched matrix product."""
    q2, y2 = (torch.linalg.vector_norm(a, dim=-1).square() for a in (q, y))     # no a² in memory
    sq = torch.baddbmm(y2.unsqueeze(1), q, y.mT, alpha=-2)                  # ‖y‖² − 2 q·y: nothing is [Q,K,D]
    return sq.add_(q2.unsqueeze(2)).clamp_(min=1e-8).sqrt_()


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def full_precision(device):
    """Neither autocast nor TF32: ‖x‖² + ‖y‖² − 2 x·y cancels, and short mantissas would show."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def signed_weights(logits, n_neg, self_mask=True, y_softmax=False):
    """Weights w of the field V = Σ w·target: + on positives, − on negatives; each row sums to 0.

    logits [...,N,K]: −distance/τ to n_neg negatives, then to the positives; overwritten if self_mask.
    Since a row sums to 0, Σ w·(target − x) = Σ w·target: the −x_j of Eq. (5) needs no line of its own. The weights are
    those of Prop. 1 with l = 1; its field divides each displacement by its length, Eq. (5) and (11) do not.
    """
    if self_mask:  # k ≠ j in Eq. (5): the first N negatives are the queries themselves
        logits.diagonal(dim1=-2, dim2=-1).fill_(-1e9)   # Deng et al. add 100 to the distance: the same for τ ≪ 1
    if not y_softmax:  # modification 1, Eq. (11): each softmax over its own targets, as Prop. 1 derives it
        return torch.cat([logits[..., :n_neg].softmax(-1).neg_(), logits[..., n_neg:].softmax(-1)], -1)
    # Deng et al. as released: one softmax over all targets, its geometric mean with the one over the generated
    # samples, and each sign's weights times the mass of the other sign
    affinity = (logits.softmax(-1) * logits.softmax(-2)).clamp_(min=1e-6).sqrt_()
    neg, pos = affinity[..., :n_neg], affinity[..., n_neg:]
    return torch.cat([-neg * pos.sum(-1, keepdim=True), pos * neg.sum(-1, keepdim=True)], -1)


@torch.no_grad()
def drift_field(x, pos, neg, temperature, scale, *, noise=None, self_mask=True):
    """V of Eq. (11) at x + noise, in latent units; single softmax. Carries no gradient.

    The field as the paper writes it, for one temperature (training takes all at once: normalised_drift).

    x     [C,N,D]  queries: token c of the N generated samples of one class
    pos   [C,P,D]  the same token of real samples
    neg   [C,M,D]  of generated samples; the first N are x itself, left out of its own sum if self_mask
    noise [C,N,D]  added to the queries, not to the kernel's centres (Eq. 12); latent units
    temperature and scale are scalars: the kernel is exp(−distance / (scale·temperature)).
    """
    if self_mask and neg.shape[1] < x.shape[1]:
        raise ValueError(f"drift_field: neg {list(neg.shape)} must begin with the rows of x {list(x.shape)}")
    x, pos, neg = (at_least_float32(t) for t in (x if noise is None else x + noise, pos, neg))
    V = torch.empty_like(x)                                                 # [C,N,D]
    with full_precision(x.device):
        for q, p, n, v in zip(*(t.split(8) for t in (x, pos, neg, V))):  # 8 independent tokens fit a CPU's cache
            targets = torch.cat([n, p], 1)                                  # [8,M+P,D]
            logits = distances(q, targets).div_(-scale * temperature)       # [8,N,M+P]
            torch.bmm(signed_weights(logits, n.shape[1], self_mask), targets, out=v)
    return V


def perturb(x, tau, generator=None):
    """Eq. (12), x + τ·n: n has a uniform direction and the norm |Laplace(0,1)|, which is Exp(1).

    x [C,N,D]; tau [1 or C,T,1,1] in latent units -> [C,T,N,D]. One n serves all temperatures: our reading.
    """
    n = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    norm = torch.empty_like(n[..., :1]).exponential_(generator=generator)
    return x.unsqueeze(1) + tau * (n * norm / n.norm(dim=-1, keepdim=True)).unsqueeze(1)


@torch.no_grad()
def normalised_drift(x, pos, extra_neg, temperatures, perturbed, y_softmax, drift_norm, perturb_all, token_scale,
                     generator):
    """Σ_τ Ṽ_τ [C,N,D] at x, or at the perturbed x; its unit of length; and what is worth logging (see drift_loss)."""
    (C, N, D), T, n_neg = x.shape, len(temperatures), x.shape[1] + extra_neg.shape[1]
    targets = torch.cat([x, extra_neg, pos], 1)                             # [C,K,D]
    dist = distances(x, targets)                 # [C,N,K]; S is their mean, self-distances included
    # S, the unit of τ and n: one for all tokens, as in Deng et al.'s code, or one a token
    scale = (dist.mean((1, 2), keepdim=True) if token_scale else dist.mean().view(1, 1, 1)).clamp(min=1e-3)
    tau = scale.unsqueeze(1) * torch.tensor(temperatures, device=x.device, dtype=x.dtype).view(T, 1, 1)
    query, centres = x.unsqueeze(1), targets                                # [C,1,N,D]
    if perturb_all:
        centres = perturb(targets, tau, generator)                          # [C,T,K,D]
        query = centres[:, :, :N]                                           # [C,T,N,D]
        dist = distances(query.flatten(0, 1), centres.flatten(0, 1)).view(C, T * N, -1)
    elif perturbed:  # modification 2: the query alone, since Prop. 1 differentiates at fixed kernel centres
        query = perturb(x, tau, generator)                                  # [C,T,N,D]
        dist = distances(query.flatten(1, 2), targets)                      # [C,T·N,K]
    weights = signed_weights(dist.unflatten(1, (-1, N)) / -tau, n_neg, y_softmax=y_softmax)     # [C,T,N,K]

    def weighted(w, y):  # Σ w·y for all τ at once -> [C,T,N,D]; perturbed centres y are [C,T,K,D]
        return w @ y if y.ndim == 4 else (w.flatten(1, 2) @ y).view(C, T, N, D)

    V = weighted(weights, centres)                                          # Eq. (11)
    unit = (scale / D**0.5).clamp(min=1e-3)      # Deng et al.: coordinates in which S is √D; [1 or C,1,1]
    # Ṽ of Eq. (10): divided by its root mean square over the whole call, as in Deng et al.'s code, or over each
    # sample's token, which is √D times the literal V/‖V‖
    scaled = V / unit.unsqueeze(1)
    power = scaled.square().mean((0, 2, 3) if drift_norm == "batch" else -1, keepdim=True)
    drift = (scaled / power.clamp(min=1e-8).sqrt()).sum(1)                  # [C,N,D]; the mean over τ, times T

    w_neg, w_pos = -weights[..., :n_neg], weights[..., n_neg:]              # each of mass 1 with single softmax
    mass = w_pos.sum(-1)
    V_pos = weighted(w_pos, centres[..., n_neg:, :]) - mass.unsqueeze(-1) * query
    rms = V.square().sum(-1).mean((0, 2)).sqrt()                            # [T]
    scale = scale.mean()
    info = {"scale": scale, **{f"drift_{t:g}": r / scale for t, r in zip(temperatures, rms)}}
    for name, v, w in (("positives", V_pos, w_pos), ("negatives", V_pos - V, w_neg)):
        info[f"v_{name[:3]}"] = v.norm(dim=-1).mean() / scale
        info[f"effective_{name}"] = (mass.square() / w.square().sum(-1)).mean()
    return drift, unit, info


def drift_loss(gen, pos, extra_neg=None, temperatures=(0.02, 0.05, 0.2), *, perturb=True, y_softmax=False,
               drift_norm="batch", perturb_all=False, token_scale=False, generator=None):
    """Eq. (10): ‖G − sg[G + Ṽ]‖², Ṽ summed over the temperatures -> (loss [C], info).

    A mean over N and D, in units of S/√D, as in Deng et al.'s code: a constant that AdamW ignores, and gradient
    clipping does not, times 1/S, which each call measures anew.

    gen [C,N,D] with gradient; pos [C,P,D]; extra_neg [C,E,D] only helps to estimate the repulsion
    (modification 3). drift_norm "batch" or "sample": what the field is divided by.
    perturb=False, y_softmax=True is the loss that Deng et al. released. perturb_all: the kernel's centres too;
    token_scale: an S for each token. Two other readings of §3.3, for the ablations.
    info, 0-d tensors: scale S; drift_τ, the root mean square of ‖V_τ‖/S; v_pos and v_neg, the mean
    ‖V⁺‖/S and ‖V⁻‖/S; effective_positives and effective_negatives, 1/Σw² for Σw = 1, means over τ
    (where all share the weight, as Theorem 1 has it for scattered latents, the field loses its direction).
    """
    for name, t in (("pos", pos), ("extra_neg", extra_neg)):
        if t is not None and (t.ndim != 3 or gen.ndim != 3 or t.shape[::2] != gen.shape[::2]):
            raise ValueError(f"drift_loss: {name} {list(t.shape)} does not go with gen {list(gen.shape)}; "
                             "both must be [C,·,D]")
    if drift_norm not in ("batch", "sample"):
        raise ValueError(f"drift_loss: drift_norm must be 'batch' or 'sample', not {drift_norm!r}")
    extra_neg = gen[:, :0] if extra_neg is None else extra_neg
    if gen.shape[1] + extra_neg.shape[1] < 2:
        raise ValueError("drift_loss: the repulsion needs at least two generated samples")
    with full_precision(gen.device):
        gen, pos, extra_neg = (at_least_float32(t) for t in (gen, pos, extra_neg))
        drift, unit, info = normalised_drift(gen.detach(), pos.detach(), extra_neg.detach(), tuple(temperatures),
                                             perturb, y_softmax, drift_norm, perturb_all, token_scale, generator)
        goal = gen.detach() / unit + drift
        return (gen / unit - goal).square().mean((1, 2)), info


# ----------------------------------------------------------------------------------------------------
# Representation Autoencoder (§3.1; code bytetriper/RAE): a frozen DINOv2 encoder and a ViT decoder.


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, rope=None):                                        # [B,N,D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block under DINOv2's key names; the decoder's has no LayerScale."""

    def __init__(self, dim, heads, mlp_dim, eps, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.ls1, self.ls2 = (LayerScale(dim) if layer_scale else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, mlp_dim), act=nn.GELU(), fc2=nn.Linear(mlp_dim, dim)))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2 with registers; loads dinov2_vitb14_reg4_pretrain.pth strictly."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_registers=4, mlp_ratio=4):
        super().__init__()
        self.grid, self.num_registers = img_size // patch_size, num_registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        if num_registers:
            self.register_tokens = nn.Parameter(torch.randn(1, num_registers, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid**2, embed_dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # in the released file, of no use here
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, int(embed_dim * mlp_ratio), 1e-6, True)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, 1e-6)                  # likewise: an RAE drops the affine part

    def features(self, x):
        """Normalised images [B,3,H,W] -> [B,1+R+N,D], after the last block and before any norm."""
        x = self.patch_embed["proj"](x)                                     # [B,D,h,w]
        cls, pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if x.shape[-2:] != (self.grid, self.grid):
            pos = pos.mT.unflatten(-1, (self.grid, self.grid)).float()
            pos = F.interpolate(pos, x.shape[-2:], mode="bicubic", antialias=True).flatten(2).mT
        prefix = [(self.cls_token + cls).expand(len(x), -1, -1)]
        if self.num_registers:
            prefix.append(self.register_tokens.expand(len(x), -1, -1))      # registers have no position
        x = torch.cat([*prefix, x.flatten(2).mT + pos], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        """Normalised images [B,3,H,W] -> patch tokens [B,N,D] after a LayerNorm without affine."""
        x = self.features(x)[:, 1 + self.num_registers:]
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sincos_2d(dim, grid):
    """Fixed 2-D sine-cosine position embedding of MAE and DiT, [grid²,dim]; the column comes first."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, col = torch.meshgrid(*2 * [torch.arange(grid, dtype=torch.float64)], indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (col, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


class Decoder(nn.Module):
    """The RAE's ViT decoder: tokens [B,N,D] -> images [B,3,H,W] in normalised pixel space."""

    def __init__(self, latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.embed = nn.Linear(latent_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.cat([torch.zeros(1, width), sincos_2d(width, grid)]).unsqueeze(0))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_dim, 1e-12, False) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens):
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), self.embed(tokens)], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))[:, 1:].unflatten(1, (self.grid, self.grid))
        x = x.unflatten(-1, (self.patch_size, self.patch_size, 3))          # [B,h,w,p,q,3]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)      # [B,3,h·p,w·q]

    @classmethod
    def from_official(cls, state_dict, num_heads):
        """The released decoder (bytetriper/RAE); all sizes but the heads are read off the tensors."""
        sd = {}
        for key, value in state_dict.items():
            for old, new in (("decoder_layers", "blocks"), ("attention.output.dense", "attn.proj"),
                             ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
                             ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
                             ("trainable_cls_token", "cls_token"), ("decoder_", "")):
                key = key.replace(old, new)
            sd[key] = value
        depth = 1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks."))
        for i in range(depth):
            for kind in ("weight", "bias"):
                qkv = [sd.pop(f"blocks.{i}.attention.attention.{n}.{kind}") for n in ("query", "key", "value")]
                sd[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
        width, latent_dim = sd["embed.weight"].shape
        model = cls(latent_dim, width, depth, num_heads, mlp_dim=len(sd["blocks.0.mlp.fc1.bias"]),
                    patch_size=math.isqrt(len(sd["pred.bias"]) // 3), grid=math.isqrt(sd["pos_embed"].shape[1] - 1))
        model.load_state_dict(sd)
        return model


class RAE(nn.Module):
    """Frozen encoder, decoder, and the statistics [D,h,w] that normalise each latent channel and position."""

    def __init__(self, encoder, decoder, mean, var, input_size, eps=1e-5):
        super().__init__()
        self.encoder, self.decoder, self.input_size, self.eps = encoder, decoder, input_size, eps
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet's
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def encode(self, images):
        """Images [B,3,H,W] in [0,1] -> normalised latents [B,D,h,w]."""
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")  # as released
        tokens = self.encoder((images - self.pixel_mean) / self.pixel_std)  # [B,N,D]
        return (tokens.mT.unflatten(-1, self.mean.shape[-2:]) - self.mean) / (self.var + self.eps).sqrt()

    def decode(self, latents):
        """Normalised latents [B,D,h,w] -> images [B,3,H,W] around [0,1], not clamped."""
        tokens = (latents * (self.var + self.eps).sqrt() + self.mean).flatten(2).mT    # [B,N,D]
        return self.decoder(tokens) * self.pixel_std + self.pixel_mean


# ----------------------------------------------------------------------------------------------------
# DiT^DH (code bytetriper/RAE): a deep narrow transformer conditions, token by token, a shallow wide head.


class RoPE(nn.Module):
    """Rotary embedding over a grid² of tokens; the buffers are part of the released state dict."""

    def __init__(self, head_dim, grid):
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        angle = torch.outer(torch.arange(grid).float(), freqs).repeat_interleave(2, -1)    # [g,d/2]
        row, col = angle.unsqueeze(1).expand(-1, grid, -1), angle.unsqueeze(0).expand(grid, -1, -1)
        angle = torch.cat([row, col], -1).flatten(0, 1)                                    # [g²,d]
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):                                                   # [B,heads,N,d]
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class DiTBlock(nn.Module):
    """adaLN block whose condition is one vector a sample [B,1,D] (encoder) or a token [B,N,D] (head)."""

    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)
        self.attn, self.mlp = Attention(dim, heads), SwiGLU(dim, mlp_dim * 2 // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TimeEmbedding(nn.Module):
    """Random Fourier features of t in [0,1], then an MLP."""

    def __init__(self, dim, features=256):
        super().__init__()
        self.register_buffer("W", torch.randn(features))
        self.mlp = nn.Sequential(nn.Linear(2 * features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):                                                   # [B]
        angle = 2 * math.pi * t.unsqueeze(1) * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], 1))           # [B,D]


class FinalLayer(nn.Module):
    def __init__(self, dim, out_channels):
        super().__init__()
        self.norm_final, self.linear = nn.RMSNorm(dim, 1e-6), nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiTDH(nn.Module):
    """Velocity v(x, t | y) of the flow, teacher and student alike; official state-dict keys.

    hidden_size, depth and num_heads are pairs (encoder, head); class num_classes is "no class".
    In train() mode a label is replaced by "no class" with class_dropout_prob.
    """

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes, mlp_ratio=4.0,
                 class_dropout_prob=0.1):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.class_dropout_prob, self.depth, (enc, dec) = class_dropout_prob, tuple(depth), hidden_size
        self.grad_checkpoint = False    # True: keep each block's input alone and compute the rest again in backward
        self.register_buffer("pos_embed", sincos_2d(enc, input_size).unsqueeze(0))
        self.s_embedder, self.x_embedder = (nn.ModuleDict({"proj": nn.Conv2d(in_channels, d, 1)}) for d in (enc, dec))
        self.s_projector = nn.Linear(enc, dec) if enc != dec else nn.Identity()
        self.t_embedder = TimeEmbedding(enc)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, enc)})
        self.enc_feat_rope, self.dec_feat_rope = (RoPE(d // h, input_size) for d, h in zip(hidden_size, num_heads))
        self.blocks = nn.ModuleList(DiTBlock(d, h, int(d * mlp_ratio + 1e-6))  # a ratio from a file may be 1e-16 off
                                    for d, n, h in zip(hidden_size, depth, num_heads) for _ in range(n))
        self.final_layer = FinalLayer(dec, in_channels)
        self.initialise()

    def initialise(self):
        for m in self.modules():
            if isinstance(m, nn.RMSNorm):
                m.reset_parameters()
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for m in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder["embedding_table"]):
            nn.init.normal_(m.weight, std=0.02)
        for m in [b.adaLN_modulation[1] for b in (*self.blocks, self.final_layer)] + [self.final_layer.linear]:
            nn.init.zeros_(m.weight)  # adaLN-Zero: every block starts as the identity, the output as 0

    def run(self, block, *args):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return compute_again(block, *args, use_reentrant=False, preserve_rng_state=False)   # blocks draw nothing
        return block(*args)

    def forward(self, x, t, y):
        """x [B,D,h,w], t [B] in [0,1], y [B] class indices -> velocity [B,D,h,w]."""
        if self.training and self.class_dropout_prob > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.class_dropout_prob, self.num_classes)
        t = self.t_embedder(t).unsqueeze(1)                                 # [B,1,E]
        c = F.silu(t + self.y_embedder["embedding_table"](y).unsqueeze(1))
        s = self.s_embedder["proj"](x).flatten(2).mT + self.pos_embed       # [B,N,E]
        for block in self.blocks[:self.depth[0]]:
            s = self.run(block, s, c, self.enc_feat_rope)
        s = self.s_projector(F.silu(t + s))                                 # [B,N,H]: one condition a token
        out = at_least_float32(self.x_embedder["proj"](x).flatten(2).mT)    # a residual stream, also under bf16
        for block in self.blocks[self.depth[0]:]:
            out = self.run(block, out, s, self.dec_feat_rope)
        return self.final_layer(out, s).mT.unflatten(-1, x.shape[-2:])

    @classmethod
    def from_state_dict(cls, sd):
        """Every size is read off the tensors, the heads off the RoPE buffers; then a strict load.

        Where encoder and head are equally wide nothing tells them apart: the last two blocks are the head, as
        in every released model.
        """
        hidden = sd["s_embedder.proj.weight"].shape[0], sd["x_embedder.proj.weight"].shape[0]
        heads = [d // sd[f"{n}_feat_rope.freqs_cos"].shape[1] for d, n in zip(hidden, ("enc", "dec"))]
        widths = [len(sd[f"blocks.{i}.norm1.weight"]) for i in range(sum(k.endswith("norm1.weight") for k in sd))]
        depth_enc = widths.count(hidden[0]) if hidden[0] != hidden[1] else len(widths) - 2
        # SwiGLU is int(2/3·int(D·ratio)) wide: the smallest ratio that gives both stages their widths
        rows = [sd[f"blocks.{i}.mlp.w3.weight"].shape[1] for i in (0, len(widths) - 1)]
        ratio = max(math.ceil(1.5 * r) / d for r, d in zip(rows, hidden))
        model = cls(math.isqrt(sd["pos_embed"].shape[1]), sd["s_embedder.proj.weight"].shape[1], hidden,
                    (depth_enc, len(widths) - depth_enc), heads,
                    len(sd["y_embedder.embedding_table.weight"]) - 1, ratio)
        model.load_state_dict(sd)
        return model


# ----------------------------------------------------------------------------------------------------
# Flow teacher (§3.1) and one-step student (§3.3). t = 1 is noise, t = 0 is data.


def time_shift(u, shift):
    """u in [0,1] -> t; shift > 1 spends more of the time near the noise, as high dimensions need."""
    return shift * u / (1 + (shift - 1) * u)


def flow_matching_loss(model, latents, y, shift=1.0, generator=None):
    """Eq. (1)-(4): y_t = (1−t)·y + t·ε, and the model regresses ε − y. latents [B,D,h,w], y [B] -> scalar."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    t = time_shift(torch.rand(len(latents), generator=generator, device=latents.device), shift)
    tt = t.view(-1, 1, 1, 1)
    return (model((1 - tt) * latents + tt * noise, t, y) - (noise - latents)).square().mean()


@torch.no_grad()
def ode_sample(model, z, y, steps=50, shift=1.0, cfg_scale=1.0, cfg_interval=(0, 1)):
    """The official Euler sampler: `steps` grid points u = 1 … 0.001, so steps − 1 steps. z [B,D,h,w] -> same.

    t = s·u/(1 + (s−1)·u); like the official one it stops just short of t = 0.

    With cfg_scale ≠ 1, classifier-free guidance where t lies in cfg_interval, ends included.
    """
    x, times = z, time_shift(1 - torch.linspace(0, 0.999, steps, device=z.device), shift)
    for t, t_next in zip(times[:-1], times[1:]):
        tb = t.expand(len(z))
        v = model(x, tb, y)
        if cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]:
            v_null = model(x, tb, torch.full_like(y, model.num_classes))
            v = v_null + cfg_scale * (v - v_null)
        x = x + (t_next - t) * v
    return x


def one_step(model, z, y):
    """Eq. (8): G(z) = z − v(z, 1). z [B,D,h,w], y [B] -> latents [B,D,h,w]."""
    return z - model(z, torch.ones(len(z), device=z.device), y)


# ----------------------------------------------------------------------------------------------------
# Configuration (§4, Table 8). Every field is a flag: --n-pos 128, --no-perturb, --temperatures 0.05 0.2.


def option(default, help, **kw):
    return dataclasses.field(default=default, metadata=dict(help=help, **kw))


@dataclasses.dataclass
class Config:
    preset: str = option("digits", "defaults of all other flags", choices=("digits", "imagenet256"))
    teacher: str = option("", "checkpoint of the flow teacher, ours or official (default: OUT/teacher.pt)")
    data: str = option("", "folder of real images, a subfolder a class (default: the images in the teacher's file)")
    cache: str = option("", "with --data: folder that keeps all latents in half precision, written once, resumable "
                            "(ImageNet: 503 GB), in one orientation each if --flip")
    latents: str = option("", "such a folder, made elsewhere, in place of --data")
    workers: int = option(4, "processes a rank that read ahead")
    models: str = option("models", "folder of the released decoder, encoder and statistics, for an official teacher")
    out: str = option("out", "folder for checkpoints, samples.png, log.csv and metrics.json")
    resume: bool = option(False, "go on from OUT/state.pt, under its configuration")
    seed: int = option(0, "seed of everything random; an OUT/teacher.pt that is there stays as it is")
    device: str = option("auto", "torch device; auto is cuda where there is one")
    dtype: str = option("fp32", "autocast of the networks; the field stays in fp32", choices=("fp32", "bf16"))
    compile: bool = option(False, "torch.compile the generator in training")
    grad_checkpoint: bool = option(False, "less memory, more time: activations are computed twice")
    # distillation
    init: str = option("teacher", "the student's first weights; scratch is Table 9", choices=("teacher", "scratch"))
    decode_encode: bool = option(False, "drift in the latents of the decoded images (Table 9)")
    steps: int = option(450, "optimizer steps")
    n_class: int = option(5, "classes a step, one after the other")
    n_pos: int = option(128, "positives: real images a class and step; Table 7: as many as negatives (digits: "
                             "more are better)")
    n_neg: int = option(64, "generated samples with gradient a class and step")
    n_extra_neg: int = option(0, "generated samples without gradient, in the repulsion only (Tables 3 C, 6)")
    temperatures: tuple = option((0.02, 0.05, 0.2), "τ of the fields, in mean distances", type=float, nargs="+")
    perturb_all: bool = option(False, "perturb positives and negatives as well as the query")
    token_scale: bool = option(False, "a unit of length S for each token, in place of one for all")
    perturb: bool = option(True, "Eq. (12): evaluate the field at perturbed queries (Tables 3 B, 5)")
    y_softmax: bool = option(False, "Deng et al.'s second softmax, over the generated samples (Tables 3 A, 5)")
    drift_norm: str = option("batch", "what Ṽ is divided by: RMS of the batch, or of each sample's token",
                             choices=("batch", "sample"))
    flip: bool = option(False, "with --data: flip half of the positives horizontally (not digits: a flipped 2 is no 2)")
    lr: float = option(1e-3, "learning rate at step 0")
    lr_min: float = option(1e-5, "learning rate after the last step; linear in between")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.995, "decay of the weights' moving average")
    ema_warmup: int = option(100, "steps over which that decay rises from 0.5")
    save_every: int = option(100, "steps between two writes of OUT/state.pt")
    plan: bool = option(False, "print what the run would cost in memory and hours on this device, and do nothing else")
    # sampling
    sample: int = option(0, "draw this many class-balanced images from --student, and do nothing else")
    student: str = option("", "checkpoint to sample from (default: OUT/student.pt)")
    to: str = option("", "where samples go: FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or a folder of PNGs")
    classes: str = option("", "classes to sample, as in 1,5,9 (default: all)")
    batch_size: int = option(256, "images a batch, in sampling and encoding")
    teacher_steps: int = option(50, "grid points of the teacher's Euler sampler")
    shift: float = option(1.0, "time shift of the teacher's sampler")


PRESETS = {  # digits: ours. imagenet256: Table 8; the shift is √(16·16·768/4096), as the teacher was trained
    "digits": {},
    "imagenet256": dict(dtype="bf16", steps=10_000, n_class=32, n_pos=256, n_neg=64, n_extra_neg=192, flip=True,
                        lr=3e-5, lr_min=3e-7, ema=0.9995, ema_warmup=1000, shift=math.sqrt(48), save_every=500,
                        batch_size=64, workers=8),
}


def learning_rate(step, cfg):
    """Table 8: max(3e-7, 3e-5 − (3e-5 − 3e-7)·t/10000)."""
    return max(cfg.lr_min, cfg.lr - (cfg.lr - cfg.lr_min) * step / cfg.steps)


def ema_decay(step, cfg):
    """Table 8: min(0.9995, 0.5·(0.9995/0.5)^(t/1000))."""
    return 0.5 * (cfg.ema / 0.5) ** min(1, step / cfg.ema_warmup)


# ----------------------------------------------------------------------------------------------------
# Files. Read without unpickling; written by write_atomically to a temporary name and renamed.


def read_checkpoint(path, advice="check the path"):
    """The dict that torch.load(weights_only=True) finds in path; a UserError says what is wrong with it."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}: {advice}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as e:  # torch raises half a dozen kinds here; each means: not a file we can read
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{path} is damaged or no torch checkpoint of plain tensors: {reason}") from e
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def load_teacher(path, checkpoint=None):
    """DiT^DH, in eval mode, from our checkpoint, an official one (key `ema`) or a raw state dict.

    checkpoint: what path holds, if it has been read already.
    """
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    with explain(f"{path} is not a DiT^DH checkpoint", *BAD_WEIGHTS):
        sd = checkpoint.get("ema", checkpoint).items()
        sd = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in sd}     # of DDP, torch.compile
        model = DiTDH.from_state_dict(sd)
    if bad := [k for k, v in model.state_dict().items() if not v.isfinite().all()]:
        raise UserError(f"{path} holds NaN or infinite weights, first in {bad[0]}: take an earlier checkpoint")
    return model.eval()


def load_encoder(cfg):
    """DINOv2 with registers from its native file in --models, else from torch's hub cache, else from the network."""
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    path = Path(cfg.models, Path(url).name)
    if path.exists():
        sd = read_checkpoint(path)
    else:
        with explain(f"no encoder at {path}, nor could it be downloaded: run curl --create-dirs -o {path} {url}",
                     OSError):
            sd = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    patch, (_, positions, dim) = sd["patch_embed.proj.weight"].shape[-1], sd["pos_embed"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks."))
    encoder = ViT(math.isqrt(positions) * patch, patch, dim, depth, max(1, dim // 64), sd["register_tokens"].shape[1])
    encoder.load_state_dict(sd)
    return encoder, patch


def load_rae(checkpoint, cfg):
    """The RAE inside our own checkpoint, else the released one under --models; sizes are read off the tensors."""
    if "rae" in checkpoint:
        rae = checkpoint["rae"]
        encoder, decoder = ViT(**rae["encoder_args"]), Decoder(**rae["decoder_args"])
        encoder.load_state_dict(rae["encoder"])
        decoder.load_state_dict(rae["decoder"])
        return RAE(encoder, decoder, rae["mean"], rae["var"], rae["input_size"])
    advice = f"run hf download nyu-visionx/RAE-collections --local-dir {cfg.models}"
    decoder = read_checkpoint(Path(cfg.models, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"), advice)
    stat = read_checkpoint(Path(cfg.models, "stats/dinov2/wReg_base/imagenet1k/stat.pt"), advice)
    encoder, patch = load_encoder(cfg)
    return RAE(encoder, Decoder.from_official(decoder, num_heads=16), stat["mean"], stat["var"],
               input_size=stat["mean"].shape[-1] * patch)


# ----------------------------------------------------------------------------------------------------
# Several processes: torchrun's, one a GPU, as its environment variables say. Alone, rank 0 of 1.


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


def barrier():
    if world() > 1:
        distributed.barrier()


@contextmanager
def process_group(cfg):
    """Joins the processes that torchrun has started."""
    if cfg.device.startswith("cuda"):
        torch.cuda.set_device(cfg.device)
        torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in fp32; never in the field
    if world() > 1:  # hours, since the others wait while rank 0 trains the digits' teacher or writes the report
        distributed.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo", timeout=timedelta(hours=6))
    yield
    if world() > 1:  # not after an error: the others would wait, and torchrun ends them
        distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------
# Data: real images of one class at a time.


def autocast(cfg):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bf16")


def center_crop(image, size):
    """ADM's centre crop of a PIL image: halve while twice too large, resize the short side, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(s // 2 for s in image.size), Image.BOX)
    ratio = size / min(image.size)
    image = image.resize(tuple(round(s * ratio) for s in image.size), Image.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return image.crop((left, top, left + size, top + size))


def to_float(images):
    """uint8 [n,H,W,3] -> [n,3,H,W] in [0,1]."""
    return images.permute(0, 3, 1, 2) / 255


def to_uint8(images):
    """[n,3,H,W] around [0,1] -> uint8 [n,H,W,3] on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


@torch.no_grad()
def encode(rae, x, cfg):
    """Images uint8 [n,H,W,3] -> latents [n,D,h,w] on the device; what are latents already stays as it is."""
    x = x.to(cfg.device, non_blocking=True)
    if x.dtype != torch.uint8:
        return x.float()
    with autocast(cfg):
        return torch.cat([rae.encode(to_float(batch)).float() for batch in x.split(cfg.batch_size)])


class Images(Dataset):
    """A folder of images, a subfolder a class. Item (indices [P], flip [P]) -> (uint8 [P,H,W,3], what was unreadable).

    The readable ones come first, in order; then they are repeated until there are P.
    """

    def __init__(self, folder, size):
        with explain(f"--data {folder} is no folder with a subfolder of images for each class", FileNotFoundError):
            found = torchvision.datasets.ImageFolder(folder)
        self.labels, self.size, self.unreadable = np.array(found.targets), size, set()
        self.paths = np.array([os.fsencode(path) for path, _ in found.samples])     # one array: workers can share it

    def __getitem__(self, item):
        images, unreadable = [], []
        for i, flip in zip(*item):
            try:
                with Image.open(os.fsdecode(self.paths[i])) as image:
                    image = np.asarray(center_crop(image.convert("RGB"), self.size))
            except Exception as e:  # Pillow raises half a dozen kinds; one bad file must not end a long run
                unreadable.append(f"{os.fsdecode(self.paths[i])}: {e}")
            else:
                images.append(image[:, ::-1] if flip else image)
        if not images:
            return torch.empty(0), unreadable
        return torch.from_numpy(np.stack([images[k % len(images)] for k in range(len(item[0]))])), unreadable


class Latents(Dataset):
    """Latents [n,D,h,w]: an array, or the folder of a cache. Item (indices [P], flip) -> ([P,D,h,w], []).

    From a cache, whose rows lie class after class, the indices of an item are of one class.
    """

    def __init__(self, array, labels):
        self.array, self.labels, self.unreadable = array, labels, set()

    def __getitem__(self, item):
        index, array = item[0], self.array
        if isinstance(array, Path):
            c = self.labels[index[0]]
            try:
                index, array = index - np.searchsorted(self.labels, c), np.load(class_file(array, c), mmap_mode="r")
            except (OSError, ValueError) as e:
                return torch.empty(0), [f"{class_file(array, c)}: {e}"]
        return torch.from_numpy(array[index]), []


def class_file(folder, c):
    return folder / f"{c:05d}.npy"


def survive_once(_):
    """SIGTERM may be sent to all processes of a group: workers must outlive it until the step is saved."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def read(source, items, cfg, workers):
    """Yields what source holds for each of the items; worker processes read ahead, names of bad files are printed."""
    workers = min(workers, os.cpu_count())
    loader = DataLoader(source, None, sampler=items, num_workers=workers, worker_init_fn=survive_once,
                        multiprocessing_context="fork" if workers else None,
                        pin_memory=cfg.device.startswith("cuda") and workers > 0)
    with explain("images can no longer be read: lower --workers, or give more shared memory", RuntimeError):
        for x, unreadable in loader:
            if not len(x):
                raise UserError(f"none of {len(unreadable)} images can be read, the first being {unreadable[0]}: "
                                "mend or remove them")
            for line in set(unreadable) - source.unreadable:
                source.unreadable.add(line)
                tqdm.write(f"unreadable image, skipped ({len(source.unreadable)} so far): {line}", sys.stderr)
            yield x


class Positives:
    """Real images of one class at a time (§3.3). What is drawn depends on the seed, the step and the class alone.

    source: Images or Latents. images: uint8 [n,H,W,3], where they are few and at hand.
    """

    def __init__(self, source, num_classes, cfg, rae=None, images=None):
        self.source, self.cfg, self.rae, self.images, self.labels = source, cfg, rae, images, source.labels
        if self.labels.max() + 1 != num_classes:
            raise UserError(f"the images have {self.labels.max() + 1} classes, the teacher has {num_classes}: "
                            "give the data it was trained on")
        self.members = [np.flatnonzero(self.labels == c) for c in range(num_classes)]
        few = [c for c in range(num_classes) if len(self.members[c]) < cfg.n_pos]
        if few and images is not None:
            raise UserError(f"class {few[0]} has {len(self.members[few[0]])} images and --n-pos asks for {cfg.n_pos}: "
                            "lower --n-pos")
        if few and rank() == 0:
            print(f"{len(few)} classes have fewer than --n-pos {cfg.n_pos} images and are drawn with replacement, the "
                  f"first is class {few[0]} with {len(self.members[few[0]])}")

    def draw(self, step, c):
        """(indices [P], which to flip [P]) of class c."""
        rng, n = random(self.cfg, step, c + 1, 1), self.cfg.n_pos
        return rng.choice(self.members[c], n, replace=len(self.members[c]) < n), rng.random(n) < 0.5 * self.cfg.flip

    def stream(self, pairs):
        """Yields latents [P,D,h,w] for each (step, class) of pairs."""
        workers = self.cfg.workers if self.images is None else 0
        for x in read(self.source, (self.draw(*pair) for pair in pairs), self.cfg, workers):
            yield encode(self.rae, x, self.cfg)


def cache(source, rae, cfg):
    """Encode all Images into --cache, a file of latents [n,D,h,w] in half precision for each class -> Latents.

    The ranks share the classes; what is there already is not made again.
    """
    counts, flip = np.bincount(source.labels), random(cfg, 0, 0, 2).random(len(source.labels)) < 0.5 * cfg.flip
    folder, info, made_of = Path(cfg.cache), Path(cfg.cache, "cache.json"), hashlib.sha256()
    for path in source.paths:
        made_of.update(os.path.relpath(path, os.fsencode(cfg.data)) + b"\n")
    for tensor in (*rae.encoder.parameters(), rae.mean, rae.var):
        made_of.update(tensor.cpu().numpy())
    about = {"shape": [len(flip), *rae.mean.shape], "images_per_class": counts.tolist(), "dtype": cfg.dtype,
             "flip_seed": cfg.seed if cfg.flip else None, "images_and_encoder": made_of.hexdigest()}
    if rank() == 0 and not info.exists():
        info.parent.mkdir(parents=True, exist_ok=True)
        need, free = 2 * math.prod(about["shape"]), shutil.disk_usage(info.parent).free
        print(f"{cfg.cache} will hold {need / 1e9:.1f} GB of latents; {free / 1e9:.1f} GB are free")
        if need > free:
            raise UserError(f"--cache {cfg.cache}: {need / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB: take "
                            "another disk, or leave --cache out and encode on the fly")
        write_atomically(info, lambda f: f.write(json.dumps(about).encode()))
    barrier()
    with explain(f"{info} is damaged: name an empty folder", ValueError):
        belongs = json.loads(info.read_text()) == about
    if not belongs:
        raise UserError(f"{cfg.cache} is the cache of other images, another encoder, --dtype, --flip or --seed: name "
                        "an empty folder, or use it as it is with --latents")
    missing = [c for c in range(len(counts)) if not class_file(folder, c).exists()][rank()::world()]
    barrier()                                           # nobody adds a file before all have seen what is missing
    parts = {c: np.array_split(np.flatnonzero(source.labels == c), math.ceil(counts[c] / 256)) for c in missing}
    images = read(source, [(part, flip[part]) for c in missing for part in parts[c]], cfg, cfg.workers)
    for c in tqdm(missing, desc="encode classes", disable=rank() > 0):
        x = torch.cat([encode(rae, next(images), cfg).half().cpu() for _ in parts[c]])
        write_atomically(class_file(folder, c), lambda f: np.save(f, x.numpy()))
    barrier()
    return Latents(folder, source.labels)


def cached(folder, rae):
    """The Latents of a finished cache, without the images."""
    with explain(f"{folder} is no cache: make it with --data DIR --cache {folder}", OSError, *BAD_WEIGHTS):
        about = json.loads(Path(folder, "cache.json").read_text())
        counts, shape = about["images_per_class"], about["shape"][1:]
    if shape != list(rae.mean.shape):
        raise UserError(f"{folder} holds latents of shape {shape}, the autoencoder makes {list(rae.mean.shape)}: they "
                        "do not belong together")
    if missing := [c for c in range(len(counts)) if not class_file(Path(folder), c).exists()]:
        raise UserError(f"{folder} is an unfinished cache, {len(missing)} classes are missing: finish it with --cache")
    return Latents(Path(folder), np.repeat(np.arange(len(counts)), counts))


def load_positives(rae, checkpoint, num_classes, cfg):
    """From --data, its --cache, --latents, or the few images that our own teacher's file brings."""
    if cfg.data:
        source = Images(cfg.data, rae.decoder.grid * rae.decoder.patch_size)
        return Positives(cache(source, rae, cfg) if cfg.cache else source, num_classes, cfg, rae)
    if cfg.latents:
        return Positives(cached(cfg.latents, rae), num_classes, cfg, rae)
    if "images" not in checkpoint:
        raise UserError("the teacher's file brings no images: name real ones with --data FOLDER, a subfolder a class")
    latents = Latents(encode(rae, checkpoint["images"], cfg).cpu().numpy(), checkpoint["labels"].numpy())
    return Positives(latents, num_classes, cfg, rae, checkpoint["images"])


# ----------------------------------------------------------------------------------------------------
# Training (§4): one class at a time, gradients accumulated over the classes of a step.


def tokens(latents):
    """[N,D,h,w] -> [C,N,D], the layout of the loss: one drifting problem a token."""
    return latents.flatten(2).permute(2, 0, 1)


def random(cfg, *what):
    """A generator of its own for each thing that is drawn.

    what: (step, 0, 1) the classes of a step, (step, class + 1, 1) the positives, (step, class + 1, 0) noise, (i, 0, 3)
    the noise of sample i, (0, 0, 2) the flips of a cache. So neither a break nor the number of ranks changes anything.
    """
    return np.random.default_rng([cfg.seed, *what])


def classes_of(step, num_classes, cfg):
    """The classes of a step that are this rank's."""
    return random(cfg, step, 0, 1).choice(num_classes, cfg.n_class, replace=False)[rank()::world()].tolist()


def loss_options(cfg):
    """drift_loss's keywords, all but its generator."""
    return {name: getattr(cfg, name) for name in ("temperatures", "perturb", "y_softmax", "drift_norm", "perturb_all",
                                                  "token_scale")}


def class_gradient(student, pos, c, step, cfg):
    """Add the gradient of Eq. (10) for one class to the student's; returns what drift_loss says. pos [P,D,h,w]."""
    generator = torch.Generator(cfg.device).manual_seed(int(random(cfg, step, c + 1, 0).integers(2**63)))
    z = torch.randn(cfg.n_neg + cfg.n_extra_neg, *pos.shape[1:], generator=generator, device=cfg.device)
    y = torch.full((len(z),), c, device=cfg.device)
    with autocast(cfg):
        # first, since autocast keeps the bf16 weights it makes, and through those made under no_grad flows no gradient
        gen = one_step(student, z[:cfg.n_neg], y[:cfg.n_neg])
        with torch.no_grad():  # modification 3: detached negatives
            extra = one_step(student, z[cfg.n_neg:], y[cfg.n_neg:]) if cfg.n_extra_neg else z[:0]
    loss, info = drift_loss(tokens(gen), tokens(pos), tokens(extra), **loss_options(cfg), generator=generator)
    (loss.mean() * world() / cfg.n_class).backward()    # DistributedDataParallel takes the mean over the ranks
    return {"loss": loss.mean().detach(), **info}


def gradient(student, latents, classes, step, cfg):
    """The clipped gradient of one step: (means over all ranks' classes of what is logged, norm before clipping).

    latents: an iterator, [P,D,h,w] for each of this rank's classes.
    """
    total = 0
    for k, c in enumerate(classes):
        wait = world() > 1 and k + 1 < len(classes)     # the ranks exchange gradients with their last class
        with student.no_sync() if wait else nullcontext():
            info = class_gradient(student, next(latents), c, step, cfg)
        total = total + torch.stack([v.double() for v in info.values()])
    if world() > 1:
        distributed.all_reduce(total)
    norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip).item()  # Table 8: 1.0
    if not math.isfinite(norm):  # before the optimizer moves a weight: state.pt stays good
        raise UserError(f"the loss or its gradient became NaN at step {step}: start anew with a lower --lr, or look at "
                        "the images and the teacher; the last save in --out is from before")
    return dict(zip(info, (total / cfg.n_class).tolist())), norm


def optimizer(student, cfg):
    """AdamW of Table 8; fused, it needs no memory of its own and, on a CPU too, a fraction of the time."""
    return torch.optim.AdamW(student.parameters(), cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


@torch.no_grad()
def move_average(ema, student, decay):
    for e, p in zip(ema.parameters(), student.parameters()):
        e.lerp_(p, 1 - decay)


class ThroughPixels(nn.Module):
    """The student, decoded and encoded again (Table 9): its one_step is RAE.encode(RAE.decode(G(z)))."""

    def __init__(self, student, rae):
        super().__init__()
        self.student, self.rae = student, rae

    def forward(self, z, t, y):
        return z - self.rae.encode(self.rae.decode(z - self.student(z, t, y)))


class Log:
    """OUT/log.csv, a row a step; a resumed run first drops the rows that it will write again."""

    def __init__(self, path, start):
        kept = path.read_text().splitlines(keepends=True)[:start + 1] if start and path.exists() else []
        write_atomically(path, lambda f: f.write("".join(kept).encode()))
        self.path, self.header = path, not kept

    def __call__(self, row):
        with open(self.path, "a") as f:
            if self.header:
                print(*row, sep=",", file=f)
            print(*row.values(), sep=",", file=f)
        self.header = False


@contextmanager
def stop_after_step():
    """Yields a list that Ctrl-C and SIGTERM fill, so that the step can be finished and saved.

    Alone, a second one acts at once (torchrun sends a second by itself).
    """
    stop = []

    def handle(number, frame):
        if stop and world() == 1:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_any_rank(flag, cfg):
    """Whether it is set on any rank; a collective call, so that all ranks decide alike."""
    flag = torch.tensor(float(flag), device=cfg.device)
    if world() > 1:
        distributed.all_reduce(flag)
    return flag.item() > 0


def train(student, positives, cfg, state=None):
    """Distil for cfg.steps steps -> (moving average of the student, seconds). state: contents of OUT/state.pt.

    Writes OUT/log.csv and OUT/state.pt. Ctrl-C finishes the step, saves and raises KeyboardInterrupt. The student
    comes and stays in eval mode: its labels are never dropped.
    """
    ema, opt = copy.deepcopy(student).requires_grad_(False), optimizer(student, cfg)
    start, seconds = 0, 0.0
    if state:
        start, seconds = state["step"], state["seconds"]
        with explain(f"{cfg.out}/state.pt does not belong to this teacher: resume with the one it began with",
                     RuntimeError, ValueError, KeyError):
            if not torch.equal(state["latent_mean"], positives.rae.mean.cpu()):
                raise ValueError("another autoencoder's latents")
            student.load_state_dict(state["student"])
            ema.load_state_dict(state["ema"])
            opt.load_state_dict(state["optimizer"])
        state.clear()                                   # gigabytes that the caller would hold for the whole run
    student.grad_checkpoint = cfg.grad_checkpoint
    net = ThroughPixels(student, positives.rae) if cfg.decode_encode else student
    if cfg.compile:
        torch._dynamo.config.optimize_ddp = False       # else DistributedDataParallel's buckets cut the graph up
        net = torch.compile(net, dynamic=False)
    if world() > 1:
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    steps = {step: classes_of(step, len(positives.members), cfg) for step in range(start, cfg.steps)}
    latents = positives.stream([(step, c) for step, classes in steps.items() for c in classes])
    log = Log(Path(cfg.out, "log.csv"), start) if rank() == 0 else None
    began = time.perf_counter() - seconds
    bar = tqdm(steps.items(), initial=start, total=cfg.steps, desc="distil", disable=rank() > 0)
    with stop_after_step() as signals:
        for step, classes in bar:
            lr = opt.param_groups[0]["lr"] = learning_rate(step, cfg)
            row, norm = gradient(net, latents, classes, step, cfg)
            opt.step()
            opt.zero_grad(set_to_none=False)            # DistributedDataParallel's buckets stay the gradients
            move_average(ema, student, ema_decay(step, cfg))
            seconds, stop = time.perf_counter() - began, on_any_rank(bool(signals), cfg)
            if log:
                speed = (step + 1) * cfg.n_class * (cfg.n_neg + cfg.n_extra_neg) / seconds
                log({"step": step, "lr": lr, "grad_norm": norm, "images_per_s": speed, **row})
                drift = sum(v for k, v in row.items() if k.startswith("drift_")) / len(cfg.temperatures)
                bar.set_postfix_str(f"drift {drift:.3f}, grad {norm:.2f}, {speed:.0f} images/s", refresh=False)
                if stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                    state = {"step": step + 1, "student": student.state_dict(), "ema": ema.state_dict(),
                             "optimizer": opt.state_dict(), "seconds": seconds, "config": dataclasses.asdict(cfg),
                             "latent_mean": positives.rae.mean.cpu()}
                    write_atomically(Path(cfg.out, "state.pt"), lambda f: torch.save(state, f))
            if stop:
                barrier()                               # nobody leaves before rank 0 has saved
                raise KeyboardInterrupt(f"step {step + 1} is saved in {cfg.out}/state.pt, go on with --resume")
    return ema, seconds


# ----------------------------------------------------------------------------------------------------
# Sampling and the report.


@torch.no_grad()
def generate(sampler, rae, labels, cfg, blocks=None):
    """Yields (which [b], images uint8 [b,H,W,3], seconds in sampler and decoder) for each batch of labels [N].

    sampler(z, y) -> latents. Sample i starts from noise of its own seed, whatever the batch or rank it is in.
    blocks: the numbers of the batches to make (default: all).
    """
    batches = torch.arange(len(labels)).split(cfg.batch_size)
    for b in range(len(batches)) if blocks is None else blocks:
        y = labels[batches[b]].to(cfg.device)
        z = np.stack([random(cfg, i, 0, 3).standard_normal(rae.mean.shape, np.float32) for i in batches[b].tolist()])
        z = torch.from_numpy(z).to(cfg.device)
        began = time.perf_counter()
        with autocast(cfg):
            latents = sampler(z, y)
        images = to_uint8(rae.decode(latents.float()))  # in float32: bf16 would round by half a grey level
        yield batches[b], images, time.perf_counter() - began


def sample_command(cfg):
    """--sample N: class-balanced images of the student to --to, an ADM .npz or a folder of PNGs.

    Shared over the ranks, memory independent of N. Each batch is a file until all are there, so the same command goes
    on where it was interrupted.
    """
    to, student = Path(cfg.to).absolute(), Path(cfg.student or Path(cfg.out, "student.pt"))
    if to.is_dir() and (to.suffix == ".npz" or any(to.iterdir())) or to.is_file() and to.suffix != ".npz":
        raise UserError(f"--to {to} is there already, and is no .npz file: name a new folder, or FILE.npz")
    to.parent.mkdir(parents=True, exist_ok=True)        # before the work, not after
    model, rae, _ = load_pair(student, cfg)
    with explain(f"--classes takes numbers with commas between them, as in 1,5,9, not {cfg.classes!r}", ValueError,
                 RuntimeError):
        classes = torch.tensor([int(c) for c in cfg.classes.split(",")] if cfg.classes else range(model.num_classes))
    if classes.min() < 0 or classes.max() >= model.num_classes:
        raise UserError(f"--classes {cfg.classes}: this model knows the classes 0 to {model.num_classes - 1}")
    labels = classes[torch.arange(cfg.sample) % len(classes)]  # §4: as many of each class
    job = [str(student), student.stat().st_mtime_ns, cfg.models, cfg.sample, cfg.classes, cfg.seed, cfg.batch_size,
           cfg.dtype]
    part = to.with_name(f"{to.name}.{hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]}.part")
    part.mkdir(exist_ok=True)
    files = [part / f"{b}.npy" for b in range(math.ceil(cfg.sample / cfg.batch_size))]
    todo = [b for b, file in enumerate(files) if not file.exists()][rank()::world()]
    barrier()                                           # nobody adds a file before all have seen what is missing
    batches = generate(lambda z, y: one_step(model, z, y), rae, labels, cfg, todo)
    for b, (_, images, _) in zip(tqdm(todo, desc="sample", disable=rank() > 0), batches):
        write_atomically(files[b], lambda f: np.save(f, images.numpy()))
    barrier()
    if rank() == 0:
        save_npz(to, files, labels) if to.suffix == ".npz" else save_pngs(to, files, labels, part / "png")
        shutil.rmtree(part)
        print(f"{cfg.sample} images in {cfg.to}")


def save_npz(to, files, labels):
    """ADM's layout, arr_0 uint8 [N,H,W,3] and arr_1 labels [N], from batches in files, one in memory at a time."""
    def write(f):
        with zipfile.ZipFile(f, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False,
                                                           "shape": (len(labels), *np.load(files[0]).shape[1:])})
                for file in files:
                    out.write(np.load(file))
            with archive.open("arr_1.npy", "w") as out:
                np.lib.format.write_array(out, labels.numpy())
    write_atomically(to, write)


def save_pngs(to, files, labels, folder):
    """A PNG an image, its class in its name; the folder is renamed to `to` when it is complete."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(image for file in files for image in np.load(file)):
        Image.fromarray(image).save(folder / f"{i:06d}_class{labels[i]}.png")
    os.replace(folder, to)


def contact_sheet(panels, rows, path):
    """Side by side {title: images uint8 [rows·k,H,W,3]}, a row of k images a class."""
    sheet = None
    for i, (title, x) in enumerate(panels.items()):
        x = F.pad(x, (0, 0, 0, 1, 0, 1), value=128)                         # a grey line between images
        x = x.unflatten(0, (rows, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
        strip = Image.fromarray(x.numpy())
        strip = strip.resize([s * max(1, 32 // (len(x) // rows)) for s in strip.size], Image.NEAREST)
        sheet = sheet or Image.new("RGB", ((strip.width + 12) * len(panels) - 12, strip.height + 18), "white")
        sheet.paste(strip, (i * (strip.width + 12), 18))
        ImageDraw.Draw(sheet).text((i * (strip.width + 12), 3), title, fill="black")
    write_atomically(path, lambda f: sheet.save(f, format="png"))


def report(teacher, student, rae, positives, cfg):
    """samples.png; where the real images are few and at hand, also the table -> what belongs in metrics.json."""
    k, of = min(8, cfg.n_pos), range(min(10, len(positives.members)))       # images a class in samples.png
    if positives.images is None:
        few = [[part[:k] for part in positives.draw(0, c)] for c in of]
        real = torch.cat([*read(positives.source, few, cfg, 0)])
        real = real if real.dtype == torch.uint8 else to_uint8(rae.decode(real.to(cfg.device).float()))
        labels = torch.tensor(of).repeat_interleave(k)
    else:
        real, labels = positives.images, torch.from_numpy(positives.labels)
    shown = torch.cat([(labels == c).nonzero()[:k, 0] for c in of])
    samplers = {"teacher_1step": lambda z, y: one_step(teacher, z, y),
                f"teacher_{(n := cfg.teacher_steps)}step": lambda z, y: ode_sample(teacher, z, y, n, cfg.shift),
                "student_1step": lambda z, y: one_step(student, z, y)}
    panels, metrics = {"real": real}, {}
    list(generate(samplers["teacher_1step"], rae, labels[:cfg.batch_size], cfg))    # or the first pays for warm-up
    for name, sampler in samplers.items():
        _, images, seconds = zip(*tqdm(generate(sampler, rae, labels, cfg), desc=name, leave=False))
        panels[name], metrics[name] = torch.cat(images), {"seconds_per_image": sum(seconds) / len(labels)}
    contact_sheet({name.replace("_", " ").replace("step", " step"): x[shown] for name, x in panels.items()},
                  len(of), Path(cfg.out, "samples.png"))
    if positives.images is not None:
        from toy.digits import table
        panels["reconstruction"] = to_uint8(rae.decode(rae.encode(to_float(real).to(cfg.device))))
        table(panels, labels, metrics)
    return metrics


# ----------------------------------------------------------------------------------------------------
# --plan: can I run this?


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **{k: None if k == "generator" else v for k, v in (kwargs or {}).items()})   # fakes take none
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()) not in self.alive:
                self.alive.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


def cost_of_a_class(model, cfg):
    """(bytes beyond weights and gradient at most, those of the drift alone, FLOPs) of one class of one step.

    From a run on fake tensors, which have shapes and no content: nothing is computed or allocated.
    """
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    with FakeTensorMode(), FlopCounterMode(display=False) as flops, Allocated() as memory:
        with torch.device(cfg.device):
            fake = DiTDH.from_state_dict({k: torch.empty(s) for k, s in shapes.items()}).eval()
        if cfg.grad_checkpoint:
            fake.grad_checkpoint = True
            for block in fake.blocks:  # on fake tensors it leaves cycles, which would count as memory
                block.register_forward_pre_hook(lambda *_: (gc.collect(), None)[1])
        for p in fake.parameters():
            p.grad = torch.empty_like(p)                # as it is from a step's second class on
        fixed = memory.now
        pos = torch.empty(cfg.n_pos, fake.in_channels, fake.input_size, fake.input_size, device=cfg.device)
        class_gradient(fake, pos, 0, 0, cfg)
        activations, total = memory.peak - fixed, flops.get_total_flops()
        gen, extra = (tokens(pos.new_empty(n, *pos.shape[1:])) for n in (cfg.n_neg, cfg.n_extra_neg))
        memory.peak = before = memory.now
        drift_loss(gen, tokens(pos), extra, **loss_options(cfg))
        return activations, memory.peak - before, total


def random_pair(cfg):
    """(generator, RAE, image size or None if latents are at hand): those of --teacher, or random ones as large."""
    if cfg.teacher:
        model, rae, checkpoint = load_pair(cfg.teacher, cfg)
    elif cfg.preset == "digits":
        from toy.digits import DECODER, ENCODER, TEACHER
        model, checkpoint = DiTDH(**TEACHER), {"images": None}
        rae = RAE(ViT(**ENCODER), Decoder(**DECODER), torch.zeros(48, 2, 2), torch.ones(48, 2, 2), 8)
    else:  # the released DiT^DH-XL, encoder ViT-B/14, decoder ViT-XL
        model, checkpoint = DiTDH(16, 768, (1152, 2048), (28, 2), (16, 16), 1000), {}
        rae = RAE(ViT(518, 14, 768, 12, 12), Decoder(768, 1152, 28, 16, 4096, 16, 16), torch.zeros(768, 16, 16),
                  torch.ones(768, 16, 16), 224)
    at_hand = cfg.cache or cfg.latents or "images" in checkpoint and not cfg.data
    size = None if at_hand else rae.decoder.grid * rae.decoder.patch_size
    return model.eval().to(cfg.device), rae.to(cfg.device), size


def median_seconds(function, cfg, repeats=3):
    """Of function() on the device, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if cfg.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def plan_command(cfg):
    """--plan: parameters, FLOPs, memory, and hours from a few steps on random data; reads no images."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * (cfg.device == "cpu")        # Linux: KiB
    model, rae, size = random_pair(cfg)
    activations, drift, flops = cost_of_a_class(model, cfg)
    n, n_rae = (sum(p.numel() for p in m.parameters()) for m in (model, rae))
    images = torch.zeros(cfg.n_pos, size, size, 3, dtype=torch.uint8) if size else torch.zeros(0)  # no image, no work
    with FlopCounterMode(display=False) as counter:
        encode(rae, images[:1], cfg)
    encoder = counter.get_total_flops() * len(images)
    total = flops + encoder
    print(f"{n / 1e6:.1f} M parameters, autoencoder {n_rae / 1e6:.1f} M; {total * cfg.n_class / 1e12:.4g} TFLOP a step "
          f"of {cfg.n_class} classes, of which the encoder {encoder / total:.0%}")
    memory = {"weights": 4 * n, "gradient": 4 * n, "AdamW's two moments": 8 * n, "moving average": 4 * n,
              "autoencoder": 4 * n_rae, "Python and its libraries": base, "drift": drift,
              "activations": activations - drift}
    for name, amount in (memory | {"together": (need := sum(memory.values()))}).items():
        print(f"{name:25}{amount / 1e9:10.3f} GB")
    cuda = cfg.device.startswith("cuda")
    have = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        print(f"{cfg.device} has {have / 1e9:.1f} GB: too little. Try --grad-checkpoint, --dtype bf16, a lower --n-neg")
        return
    # a CPU would take hours for a class of the true size: there, as few samples as 2 TFLOP allow, scaled by the FLOPs
    share = 1 if cuda else min(1, 2e12 / total)
    counts = {k: math.ceil(share * getattr(cfg, k)) for k in ("n_pos", "n_neg", "n_extra_neg")}
    part = dataclasses.replace(cfg, **counts)
    part.n_neg = max(2 - part.n_extra_neg, part.n_neg)          # the repulsion needs two samples
    pos = torch.randn(part.n_pos, model.in_channels, model.input_size, model.input_size, device=cfg.device)
    model.grad_checkpoint, opt, ema = cfg.grad_checkpoint, optimizer(model, cfg), copy.deepcopy(model)
    net, images = torch.compile(model, dynamic=False) if cfg.compile else model, images[:part.n_pos]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    update = median_seconds(lambda: (opt.step(), move_average(ema, model, 0.5)), cfg)
    seconds = median_seconds(lambda: (encode(rae, images, cfg), class_gradient(net, pos, 0, 0, part)), cfg)
    if share < 1:
        seconds *= total / (cost_of_a_class(model, part)[-1] + encoder / cfg.n_pos * part.n_pos)
    step = cfg.n_class * seconds + update
    speed = cfg.n_class * (cfg.n_neg + cfg.n_extra_neg) / step
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}: {seconds:.4g} s a class"
          f"{' (fewer samples, scaled up)' * (share < 1)}, {speed:.4g} images/s, {total / seconds / 1e12:.3g} TFLOP/s"
          + (f", at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""))
    print(f"{cfg.steps} steps: {cfg.steps * step / 3600:.3g} hours on one such device; with R of them an R-th, and the "
          "time to exchange gradients")


# ----------------------------------------------------------------------------------------------------
# Command line.


def load_pair(path, cfg):
    """(generator, RAE, checkpoint), on the device, or a UserError if they do not belong together."""
    checkpoint = read_checkpoint(path)
    model = load_teacher(path, checkpoint).to(cfg.device)
    with explain(f"the autoencoder of {path if 'rae' in checkpoint else f'--models {cfg.models}'} does not load",
                 *BAD_WEIGHTS):
        rae = load_rae(checkpoint, cfg).to(cfg.device)
    shape = [model.in_channels, model.input_size, model.input_size]
    if list(rae.mean.shape) != shape:
        raise UserError(f"{path} makes latents of shape {shape}, the autoencoder has {list(rae.mean.shape)}: "
                        "they do not belong together")
    return model, rae, checkpoint


def parse(argv):
    """Command line -> (Config, the flags that were given). The preset's values stand behind the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kw = {"default": argparse.SUPPRESS, **f.metadata}
        if "(default" not in kw["help"]:
            kw["help"] += f" (default: {f.default})"
        kw |= {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": kw.get("type", f.type)}
        parser.add_argument("--" + f.name.replace("_", "-"), **kw)
    given = vars(parser.parse_args(argv))
    if "temperatures" in given:
        given["temperatures"] = tuple(given["temperatures"])
    cfg = Config(**PRESETS[given.get("preset", "digits")] | given)
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda":
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return cfg, given


def check(cfg):
    """What is wrong with the flags, before anything is read or written."""
    least = dict.fromkeys(("steps", "n_class", "n_pos", "n_neg", "save_every", "batch_size", "ema_warmup"), 1)
    for name, low in (least | {"n_extra_neg": 0, "sample": 0, "seed": 0, "workers": 0, "teacher_steps": 2}).items():
        if not low <= getattr(cfg, name) < 2**31:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(cfg, name)}")
    for name in ("lr", "lr_min", "grad_clip", "shift"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(cfg, name)}")
    if not 0.5 <= cfg.ema < 1:
        raise UserError(f"--ema must be at least 0.5 and below 1, not {cfg.ema}")
    if cfg.n_neg + cfg.n_extra_neg < 2:
        raise UserError("the repulsion needs two samples: raise --n-neg or --n-extra-neg")
    if not all(0 < tau < math.inf for tau in cfg.temperatures):
        raise UserError("--temperatures must be positive")
    if bool(cfg.sample) != bool(cfg.to) or (cfg.classes or cfg.student) and not cfg.sample:
        raise UserError("sampling takes --sample N and --to FILE.npz or FOLDER; --student and --classes go with them")
    if world() > cfg.n_class and not cfg.sample:
        raise UserError(f"--n-class {cfg.n_class}: each of the {world()} processes needs a class a step")
    if cfg.perturb_all and not cfg.perturb or cfg.plan and cfg.decode_encode:
        raise UserError("--perturb-all does not go with --no-perturb, nor --plan with --decode-encode")
    if cfg.latents and (cfg.data or cfg.cache) or cfg.cache and not cfg.data:
        raise UserError("--latents DIR stands in place of --data; --cache DIR goes with --data")
    with explain(f"--device {cfg.device} is not there", RuntimeError, AssertionError):
        torch.empty(0, device=cfg.device)


def resume(cfg, given):
    """(configuration of the run in OUT/state.pt, its state). Only where and how to run may change."""
    state = read_checkpoint(Path(cfg.out, "state.pt"))
    if not {"step", "student", "ema", "optimizer", "config", "seconds", "latent_mean"} <= state.keys():
        raise UserError(f"{cfg.out}/state.pt is no state of a training run: start anew without --resume")
    free, saved = {"out", "resume", "device", "save_every", "teacher", "data", "cache", "latents", "workers", "models",
                   "batch_size", "compile", "grad_checkpoint"}, state["config"]
    if saved.keys() != dataclasses.asdict(cfg).keys():
        raise UserError(f"{cfg.out}/state.pt is of another version of this script: finish it with that, or start anew")
    if other := [k for k in given if k not in free and given[k] != saved[k]]:
        raise UserError(f"--{other[0].replace('_', '-')} was {saved[other[0]]} in the run to be resumed: leave the "
                        "flag out, or start anew without --resume")
    new = {k: v for k, v in given.items() if k in free} | {"device": cfg.device, "out": cfg.out}
    return Config(**saved | new), state


def distil_command(cfg, state):
    """Teacher (trained first, for the digits), distillation, student.pt, report."""
    began, out = time.perf_counter(), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    path, saved, done = Path(cfg.teacher or out / "teacher.pt"), out / "state.pt", out / "student.pt"
    if not state and saved.exists() and not (done.exists() and done.stat().st_mtime >= saved.stat().st_mtime):
        raise UserError(f"{saved} is of an unfinished run: go on with --resume, or remove it, or take another --out")
    if not cfg.teacher and cfg.preset != "digits":
        raise UserError("name the teacher's checkpoint with --teacher FILE")
    if not cfg.teacher and not path.exists() and rank() == 0:
        from toy.digits import make_teacher
        make_teacher(path, cfg.seed)
    barrier()
    teacher, rae, checkpoint = load_pair(path, cfg)
    teacher.cpu()                                       # it waits there for the report
    if rank() == 0:
        print(f"teacher: {path}")
    if "rae" not in checkpoint and cfg.preset == "digits" and rank() == 0:
        print("this is an official teacher and the hyperparameters are the digits': --preset imagenet256 is Table 8")
    if cfg.n_class > teacher.num_classes:
        raise UserError(f"--n-class {cfg.n_class}: the teacher knows only {teacher.num_classes} classes")
    positives = load_positives(rae, checkpoint, teacher.num_classes, cfg)
    if rank() == 0:
        for old in out.glob(".state.pt.*.tmp"):         # of a run that was killed while it saved
            old.unlink()
        if not state:
            saved.unlink(missing_ok=True)               # of a finished run: --resume must not take it for this one's
    student = copy.deepcopy(teacher).to(cfg.device)     # §3.3: it starts from the teacher's weights
    parts, checkpoint = {k: checkpoint[k] for k in ("rae",) if k in checkpoint}, None
    if rank() > 0:
        teacher = None                                  # gigabytes that only rank 0 needs again
    if cfg.init == "scratch":
        torch.manual_seed(cfg.seed)
        student.initialise()
    ema, distilled = train(student, positives, cfg, state)
    if rank() > 0:
        return
    parts |= {"ema": ema.state_dict(), "config": dataclasses.asdict(cfg)}
    write_atomically(done, lambda f: torch.save(parts, f))
    metrics = report(teacher.to(cfg.device), ema, rae, positives, cfg)
    total = time.perf_counter() - began
    metrics |= {"config": dataclasses.asdict(cfg), "seed": cfg.seed, "seconds": {"distil": distilled, "total": total},
                "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)},
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}     # Linux: KiB
    write_atomically(out / "metrics.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    print(f"distilled in {distilled:.0f} s, {total:.0f} s in all: student.pt, samples.png, metrics.json, log.csv in "
          f"{out}")


@exit_code
def main(argv):
    cfg, given = parse(argv)
    state = None
    if cfg.resume:
        cfg, state = resume(cfg, given)
    check(cfg)
    with process_group(cfg):
        plan_command(cfg) if cfg.plan else sample_command(cfg) if cfg.sample else distil_command(cfg, state)


if __name__ == "__main__":
    sys.exit(main())
