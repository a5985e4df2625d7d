"""Drift-RAE (arXiv 2606.15553) in one file: a flow teacher in RAE latent space -> a one-step generator.

MNIST, Fréchet distance in a judge's features, 3 seeds: student in one step 3.04 ± 0.35, teacher in 49 steps
3.00 ± 0.19, in one 119; halves of the data 1.48. 492 s on 2 cores (AMD EPYC). ImageNet-256 is not reproduced.

    python drift_rae.py                              MNIST on a CPU: RAE, teacher, student, table, picture
    python drift_rae.py --teacher ckpt.pt            distil this teacher; --preset imagenet256 is Table 8
    python drift_rae.py --sample 1000 --to FILE      draw images into an .npz or a .png

Read it beside the paper:

    1 Drifting      §3.3  Eq. (11) drift_field, Eq. (12) laplace_noise, Eq. (10) drift_loss
    2 RAE           §3.1  images <-> latents
    3 DiT^DH        §3.1  v(x, t | y), teacher and student
    4 Flow          §3.1  Eq. (1)-(4) flow_matching_loss; §3.3  Eq. (8) one_step
    5 Distillation  §4    train_step, from noise to the moving average; its loop
    6 Data, 7 Checkpoints, 8 Sampling, 9 Configuration (Table 8)

Latents are [B,D,h,w] outside the loss and [C,N,D] inside it: C tokens of N samples of one class, D wide.
"""
import argparse
import copy
import dataclasses
import math
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader
from tqdm import tqdm, trange

# ---- 1  Drifting (§3.3): each generated token is pulled to real ones and pushed from other generated ones.

def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def drift_field(x, pos, neg, temperature, scale, *, noise=None, self_mask=True):
    """V of Eq. (11), in latent units; carries no gradient.

    x     [C,N,D]  queries: token c of the N generated samples of one class
    pos   [C,P,D]  positives: the same token of real samples
    neg   [C,M,D]  negatives: generated samples, the first N being x itself, which self_mask leaves out
    noise [C,N,D]  added to the queries alone: Prop. 1 differentiates at fixed kernel centres
    """
    x, pos, neg = at_least_float32(x), at_least_float32(pos), at_least_float32(neg)
    query = x if noise is None else x + noise  # Eq. (12)
    tau = scale * temperature                  # the kernel is exp(−distance / τ)
    with torch.autocast(x.device.type, enabled=False):
        logits_pos = -torch.cdist(query, pos) / tau  # [C,N,P]
        logits_neg = -torch.cdist(query, neg) / tau  # [C,N,M]
        if self_mask:
            logits_neg.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # k ≠ j
        # Modification 1: each softmax over its own targets alone. Both sum to 1, so the query drops out of
        # Σ w⁺·(y − query) − Σ w⁻·(x_k − query):
        return logits_pos.softmax(-1) @ pos - logits_neg.softmax(-1) @ neg  # [C,N,D]


@torch.no_grad()
def y_softmax_field(x, pos, neg, temperature, scale, *, noise):
    """The field as Deng et al. released it, with a second softmax over the generated samples (Table 3 A)."""
    targets = torch.cat([neg, pos], 1)  # [C,M+P,D]
    distance = torch.cdist(x + noise, targets) / scale
    distance.diagonal(dim1=1, dim2=2).add_(100)  # instead of a mask
    logits = -distance / temperature             # [C,N,M+P]
    affinity = (logits.softmax(-1) * logits.softmax(-2)).clamp(min=1e-6).sqrt()
    w_neg, w_pos = affinity.split([neg.shape[1], pos.shape[1]], -1)
    mass_neg, mass_pos = w_neg.sum(-1, keepdim=True), w_pos.sum(-1, keepdim=True)
    return (w_pos * mass_neg) @ pos - (w_neg * mass_pos) @ neg


def laplace_noise(x, generator=None):
    """n of Eq. (12), like x [C,N,D]: a uniform direction, a norm from |Laplace(0, 1)|, which is Exp(1)."""
    direction = F.normalize(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype), dim=-1)
    norm = torch.empty_like(direction[..., :1]).exponential_(generator=generator)
    return norm * direction


def drift_loss(gen, pos, extra_neg=None, temperatures=(0.02, 0.05, 0.2), *, perturb=True, y_softmax=False,
               generator=None):
    """Eq. (10), ‖G − sg[G + Ṽ]‖² with Ṽ summed over the temperatures -> (loss [C], info).
    gen [C,N,D] with gradient, pos [C,P,D]; extra_neg [C,E,D] only helps to estimate the repulsion.
    perturb=False, y_softmax=True is the loss that Deng et al. released, the paper's baseline.
    info, 0-d: `scale`, S; `drift_τ`, the root mean square of ‖V_τ‖/S, not normalised.
    The paper leaves the units open; these are Deng et al.'s: τ and the perturbation in units of S, the mean
    distance between generated samples and targets; coordinates in units of S/√D; V divided by its root mean
    square over the whole call; the loss a mean over N and D where Eq. (10) has a sum.
    """
    gen = at_least_float32(gen)
    x = gen.detach()
    neg = x if extra_neg is None else torch.cat([x, extra_neg.detach()], 1)  # [C,M,D]
    scale = torch.cdist(x, torch.cat([neg, pos.detach()], 1)).mean().clamp(min=1e-3)  # S
    unit = (scale / x.shape[-1] ** 0.5).clamp(min=1e-3)
    n = laplace_noise(x, generator) if perturb else torch.zeros_like(x)  # one n serves all temperatures
    field = y_softmax_field if y_softmax else drift_field
    drift, info = torch.zeros_like(x), {"scale": scale}
    for tau in temperatures:
        V = field(x, pos, neg, tau, scale, noise=tau * scale * n) / unit  # Eq. (11) at Eq. (12)
        rms = V.square().mean().clamp(min=1e-8).sqrt()
        drift += V / rms  # Ṽ
        info[f"drift_{tau:g}"] = rms
    target = x / unit + drift  # sg[G + Ṽ]
    return (gen / unit - target).square().mean((1, 2)), info


def tokens(latents, window=1):
    """[N,D,h,w] -> [C,N,D·window²]: a drifting problem for each window of window×window tokens.
    1 is the paper; larger ones, our addition, also see whether neighbouring tokens belong together.
    """
    if latents.shape[-1] % window:
        raise ValueError(f"a window of {window} does not divide a grid of {list(latents.shape[-2:])} tokens")
    return F.unfold(latents, window, stride=window).permute(2, 0, 1)


# ---- 2  Representation Autoencoder (§3.1; code bytetriper/RAE): a frozen DINOv2 encoder and a ViT decoder.

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=nn.Identity()):  # [B,N,D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(rope(q), rope(k), v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale, under DINOv2's key names."""
    def __init__(self, dim, heads, mlp_dim, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, mlp_dim), "fc2": nn.Linear(mlp_dim, dim)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """DINOv2 with registers; loads dinov2_vitb14_reg4_pretrain.pth strictly."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_registers=4, mlp_ratio=4):
        super().__init__()
        self.grid = img_size // patch_size
        self.num_prefix = 1 + num_registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, num_registers, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid**2, embed_dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # in the released file, of no use here
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, int(embed_dim * mlp_ratio), 1e-6)
                                      for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, 1e-6)  # likewise: an RAE drops the affine part

    def features(self, x):
        """Normalised images [B,3,H,W] -> class, register and patch tokens [B,1+R+N,D] before any norm."""
        x = self.patch_embed["proj"](x)  # [B,D,h,w]
        cls, pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if x.shape[-2:] != (self.grid, self.grid):  # 518 pixels -> 224, say
            pos = pos.mT.unflatten(-1, (self.grid, self.grid))
            pos = F.interpolate(pos, x.shape[-2:], mode="bicubic", antialias=True).flatten(2).mT
        prefix = torch.cat([self.cls_token + cls, self.register_tokens], 1)  # registers have no position
        return self.blocks(torch.cat([prefix.expand(len(x), -1, -1), x.flatten(2).mT + pos], 1))

    def forward(self, x):
        """Normalised images [B,3,H,W] -> patch tokens [B,N,D] after a LayerNorm without affine."""
        x = self.features(x)[:, self.num_prefix:]
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sincos_2d(dim, grid):
    """Fixed 2-D sine-cosine position embedding of MAE and DiT, [grid²,dim], column first."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    position = torch.arange(grid, dtype=torch.float64)
    row, col = torch.meshgrid(position, position, indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (col, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


class Decoder(nn.Module):
    """The RAE's ViT decoder: tokens [B,N,D] -> images [B,3,H,W] in normalised pixel space."""
    def __init__(self, latent_dim, width, depth, num_heads, mlp_dim, patch_size, grid):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.embed = nn.Linear(latent_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        pos_embed = F.pad(sincos_2d(width, grid), (0, 0, 1, 0)).unsqueeze(0)  # a zero for the class token
        self.register_buffer("pos_embed", pos_embed)
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_dim, 1e-12) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], 1) + self.pos_embed
        x = self.pred(self.norm(self.blocks(x)))[:, 1:].unflatten(1, (self.grid, self.grid))
        x = x.unflatten(-1, (self.patch_size, self.patch_size, 3))      # [B,h,w,p,q,3]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B,3,h·p,w·q]

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
        width, latent_dim = sd["embed.weight"].shape
        depth = sum(key.endswith("norm1.weight") for key in sd)
        for i in range(depth):
            sd[f"blocks.{i}.ls1.gamma"] = sd[f"blocks.{i}.ls2.gamma"] = torch.ones(width)  # it has none
            for kind in ("weight", "bias"):
                qkv = [sd.pop(f"blocks.{i}.attention.attention.{name}.{kind}")
                       for name in ("query", "key", "value")]
                sd[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
        grid, patch_size = math.isqrt(sd["pos_embed"].shape[1] - 1), math.isqrt(len(sd["pred.bias"]) // 3)
        model = cls(latent_dim, width, depth, num_heads, len(sd["blocks.0.mlp.fc1.bias"]), patch_size, grid)
        model.load_state_dict(sd)
        return model


class RAE(nn.Module):
    """Frozen encoder, decoder, and the statistics [D,h,w] that normalise each latent channel and position.
    sigmoid: a pixel is the sigmoid of the logit 6·(x − ½), for digits, nearly black and white.
    """
    def __init__(self, encoder, decoder, mean, var, input_size, eps=1e-5, sigmoid=False):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.input_size, self.sigmoid = input_size, sigmoid
        self.register_buffer("mean", mean)
        self.register_buffer("std", (var + eps).sqrt())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet's
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def encode(self, images):
        """Images [B,3,H,W] in [0,1] -> normalised latents [B,D,h,w]."""
        images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")  # as released
        x = self.encoder((images - self.pixel_mean) / self.pixel_std)                       # [B,N,D]
        return (x.mT.unflatten(-1, self.mean.shape[-2:]) - self.mean) / self.std

    def decode(self, latents):
        """Normalised latents [B,D,h,w] -> images [B,3,H,W] around [0,1], not clamped."""
        x = self.decoder((latents * self.std + self.mean).flatten(2).mT)  # of tokens [B,N,D]
        images = x * self.pixel_std + self.pixel_mean
        return torch.sigmoid(6 * images - 3) if self.sigmoid else images


# ---- 3  DiT^DH (code bytetriper/RAE): a deep narrow transformer conditions a shallow wide head by token.

class RoPE(nn.Module):
    """Rotary embedding over a grid² of tokens; the buffers are part of the released state dict."""
    def __init__(self, head_dim, grid):
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        angle = torch.outer(torch.arange(grid).float(), freqs).repeat_interleave(2, -1)  # [g,d/2]
        angle = torch.cat([angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)], 1)  # [g²,d]: row, column
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):  # [B,heads,N,d]
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


class DiTBlock(nn.Module):
    """adaLN block; its condition is one vector a sample [B,1,D] (encoder) or a token [B,N,D] (head)."""
    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, 1e-6)
        swiglu = mlp_dim * 2 // 3
        self.mlp = nn.ModuleDict({"w12": nn.Linear(dim, 2 * swiglu), "w3": nn.Linear(swiglu, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        a, b = self.mlp["w12"](self.norm2(x) * (1 + scale2) + shift2).chunk(2, -1)
        return x + gate2 * self.mlp["w3"](F.silu(a) * b)


class DiTDH(nn.Module):
    """Velocity v(x, t | y) of the flow, teacher and student alike; official state-dict keys.
    hidden_size, depth and num_heads are pairs (encoder, head); class num_classes is "no class".
    In train() mode a label is replaced by "no class" with class_dropout_prob.
    """
    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes, mlp_ratio=4.0,
                 class_dropout_prob=0.1):
        super().__init__()
        self.input_size, self.in_channels = input_size, in_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.depth = tuple(depth)
        self.grad_checkpoint = False  # True: keep a block's input alone and compute the rest anew
        enc, head = hidden_size
        self.register_buffer("pos_embed", sincos_2d(enc, input_size).unsqueeze(0))
        self.s_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, enc, 1)})
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, head, 1)})
        self.s_projector = nn.Linear(enc, head) if enc != head else nn.Identity()
        mlp = nn.Sequential(nn.Linear(512, enc), nn.SiLU(), nn.Linear(enc, enc))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_embedder.register_buffer("W", torch.randn(256))
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, enc)})
        self.enc_feat_rope = RoPE(enc // num_heads[0], input_size)
        self.dec_feat_rope = RoPE(head // num_heads[1], input_size)
        self.blocks = nn.ModuleList(DiTBlock(d, h, int(d * mlp_ratio + 1e-6))  # not 7.999…
                                    for d, n, h in zip(hidden_size, depth, num_heads) for _ in range(n))
        self.final_layer = nn.ModuleDict({
            "norm_final": nn.RMSNorm(head, 1e-6), "linear": nn.Linear(head, in_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(head, 2 * head))})
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
            if name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
                nn.init.normal_(m.weight, std=0.02)
            if name.endswith(("adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(m.weight)  # adaLN-Zero: blocks start as the identity, the output as 0

    def checkpointed(self, block, *inputs):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return recompute(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def forward(self, x, t, y):
        """x [B,D,h,w], t [B] in [0,1], y [B] class indices -> velocity [B,D,h,w]."""
        if self.training:
            dropped = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
            y = y.masked_fill(dropped, self.num_classes)
        angle = 2 * math.pi * t.view(-1, 1, 1) * self.t_embedder.W             # Fourier features
        t = self.t_embedder["mlp"](torch.cat([angle.sin(), angle.cos()], -1))  # [B,1,E]
        c = F.silu(t + self.y_embedder["embedding_table"](y).unsqueeze(1))
        s = self.s_embedder["proj"](x).flatten(2).mT + self.pos_embed  # [B,N,E]
        for block in self.blocks[:self.depth[0]]:
            s = self.checkpointed(block, s, c, self.enc_feat_rope)
        s = self.s_projector(F.silu(t + s))                               # [B,N,H]: one condition a token
        out = at_least_float32(self.x_embedder["proj"](x).flatten(2).mT)  # stays fp32 under autocast
        for block in self.blocks[self.depth[0]:]:
            out = self.checkpointed(block, out, s, self.dec_feat_rope)
        shift, scale = self.final_layer["adaLN_modulation"](s).chunk(2, -1)
        out = self.final_layer["linear"](self.final_layer["norm_final"](out) * (1 + scale) + shift)
        return out.mT.unflatten(-1, x.shape[-2:])  # [B,D,h,w]

    @classmethod
    def from_state_dict(cls, sd):
        """All sizes are read off the tensors, the heads off the RoPE buffers; then a strict load.
        Where encoder and head are equally wide the last two blocks are the head, as in every released model.
        """
        hidden = len(sd["s_embedder.proj.weight"]), len(sd["x_embedder.proj.weight"])
        heads = [d // sd[f"{name}_feat_rope.freqs_cos"].shape[1] for d, name in zip(hidden, ("enc", "dec"))]
        n_blocks = sum(key.endswith("norm1.weight") for key in sd)
        widths = [len(sd[f"blocks.{i}.norm1.weight"]) for i in range(n_blocks)]
        n_enc = widths.count(hidden[0]) if hidden[0] != hidden[1] else n_blocks - 2
        # SwiGLU is int(2/3·int(D·ratio)) wide; the smallest ratio that gives both widths
        swiglu = [sd[f"blocks.{i}.mlp.w3.weight"].shape[1] for i in (0, n_blocks - 1)]
        ratio = max(math.ceil(1.5 * width) / d for width, d in zip(swiglu, hidden))
        model = cls(math.isqrt(sd["pos_embed"].shape[1]), sd["s_embedder.proj.weight"].shape[1], hidden,
                    (n_enc, n_blocks - n_enc), heads, len(sd["y_embedder.embedding_table.weight"]) - 1, ratio)
        model.load_state_dict(sd)
        return model


# ---- 4  Flow teacher (§3.1) and one-step student (§3.3). t = 1 is noise, t = 0 is data.

def time_shift(u, shift):
    """u in [0,1] -> t; shift > 1 spends more time near the noise, as high dimensions need."""
    return shift * u / (1 + (shift - 1) * u)


def flow_matching_loss(model, latents, y, shift=1.0, generator=None):
    """Eq. (1)-(4): y_t = (1−t)·y + t·ε, and v regresses ε − y. latents [B,D,h,w], y [B] -> scalar."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    t = time_shift(torch.rand(len(latents), generator=generator, device=latents.device), shift)
    t_ = t.view(-1, 1, 1, 1)
    v = model((1 - t_) * latents + t_ * noise, t, y)
    return (v - (noise - latents)).square().mean()


def train_flow(model, latents, labels, steps, *, batch_size=128, lr=1.5e-3, shift=1.0, decay=0.995, seed=0):
    """Train a flow on latents [n,D,h,w] with labels [n] -> the moving average of its weights."""
    generator = torch.manual_seed(seed)  # the global one, from which forward drops labels
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, cycle_momentum=False)
    for _ in trange(steps, desc="teacher"):
        i = torch.randint(len(latents), (batch_size,), generator=generator)
        loss = flow_matching_loss(model, latents[i], labels[i], shift, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for e, p in zip(ema.parameters(), model.parameters()):
            e.lerp_(p.detach(), 1 - decay)
    return ema


@torch.no_grad()
def ode_sample(model, z, y, steps=50, shift=1.0, cfg_scale=1.0, cfg_interval=(0, 1)):
    """The official Euler sampler (there shift = √48), z [B,D,h,w] -> same: `steps` grid points.
    cfg_scale ≠ 1: classifier-free guidance where t lies in cfg_interval, ends included.
    """
    x = z
    times = time_shift(1 - torch.linspace(0, 0.999, steps, device=z.device), shift)
    for t, t_next in zip(times[:-1], times[1:]):
        v = model(x, t.expand(len(z)), y)
        if cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]:
            v_null = model(x, t.expand(len(z)), torch.full_like(y, model.num_classes))
            v = v_null + cfg_scale * (v - v_null)
        x = x + (t_next - t) * v
    return x


def one_step(model, z, y):
    """Eq. (8): G(z) = z − v(z, 1). z [B,D,h,w], y [B] -> latents [B,D,h,w]."""
    return z - model(z, torch.ones(len(z), device=z.device), y)


@torch.no_grad()
def guide(model, w):
    """A copy whose class embeddings are e(y) + w·(e(y) − e(∅)): guidance at no cost.
    Ours: the abstract of the paper's v2 speaks of extrapolation and gives no formula.
    """
    model = copy.deepcopy(model)
    table = model.y_embedder["embedding_table"].weight  # its last row is e(∅), and stays
    table += w * (table - table[-1:])
    return model


# ---- 5  Distillation (§4): one class at a time, gradients accumulated over the classes of a step.

def world():
    return int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def rank():
    return int(os.environ.get("RANK", 0))


def seeded(cfg, *what):
    """A generator for each thing that is drawn: neither a break nor the number of ranks changes it.
    what: (step, 0, 1) classes, (step, c + 1, 1) positives, (step, c + 1, 0) noise; (i, 0, 2) sample i.
    """
    return np.random.default_rng([cfg.seed, *what])


def autocast(cfg):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bf16")


def train_step(student, ema, optimizer, batch, step, cfg):
    """One step, from noise to the moving average. batch: this rank's (class, positives [P,D,h,w])."""
    log = Counter()  # its update() adds
    for c, pos in batch:
        generator = torch.Generator(cfg.device).manual_seed(int(seeded(cfg, step, c + 1, 0).integers(2**63)))
        z = torch.randn(cfg.n_neg + cfg.n_extra_neg, *pos.shape[1:], generator=generator, device=cfg.device)
        y = torch.full((len(z),), c, device=cfg.device)
        gen, extra = z.split([cfg.n_neg, cfg.n_extra_neg])
        with autocast(cfg):  # gen first: it caches bf16 weights, and those of no_grad carry no gradient
            gen = one_step(student, gen, y[:cfg.n_neg])  # Eq. (8)
            if cfg.n_extra_neg:
                with torch.no_grad():  # modification 3
                    extra = one_step(student, extra, y[cfg.n_neg:])
        total = 0
        for window in cfg.windows:  # (1,) in the paper
            loss, info = drift_loss(tokens(gen, window), tokens(pos, window), tokens(extra, window),
                                    cfg.temperatures, perturb=cfg.perturb, y_softmax=cfg.y_softmax,
                                    generator=generator)  # Eq. (10)-(12)
            total = total + loss.mean()
            log.update({name: value / len(cfg.windows) for name, value in info.items()})
        (total / cfg.n_class).backward()
        log.update(loss=total.detach())
    if world() > 1:
        for p in student.parameters():
            distributed.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)  # Table 8, as learning rate and average
    if not norm.isfinite():  # before a weight moves: the last save stays good
        raise ValueError(f"the gradient is NaN or infinite at step {step}: start anew with a lower --lr")
    optimizer.param_groups[0]["lr"] = cfg.lr - (cfg.lr - cfg.lr / 100) * step / cfg.steps
    optimizer.step()
    optimizer.zero_grad()
    decay = 0.5 * (cfg.ema / 0.5) ** min(1, step / cfg.ema_warmup)
    for e, p in zip(ema.parameters(), student.parameters()):
        e.lerp_(p.detach(), 1 - decay)
    return log, norm


def distil(student, source, labels, cfg, rae=None, state=None):
    """cfg.steps steps -> the moving average of the student. Writes OUT/log.csv and, to resume, OUT/state.pt.
    source, labels, rae: as in `positives`. Ctrl-C or SIGTERM: finish the step, save, raise KeyboardInterrupt.
    """
    student.eval()  # no label is dropped
    ema = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    start, rows, stop = 0, [], 0
    if state:
        student.load_state_dict(state["student"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows = state["step"], state["log"]
    net = torch.compile(student, dynamic=False) if cfg.compile else student
    known = labels.max() + 1
    classes = {step: seeded(cfg, step, 0, 1).choice(known, cfg.n_class, replace=False)[rank()::world()]
               for step in range(start, cfg.steps)}
    latents = positives(source, labels, [(step, int(c)) for step in classes for c in classes[step]], cfg, rae)
    began = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)
    signals = []
    handlers = {number: signal.signal(number, lambda *caught: signals.append(caught))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in tqdm(classes, "distil", total=cfg.steps, initial=start, disable=rank() > 0):
            log, norm = train_step(net, ema, optimizer, zip(classes[step].tolist(), latents), step, cfg)
            totals = torch.stack([*log.values(), torch.full_like(norm, len(signals))]) / cfg.n_class
            if world() > 1:
                distributed.all_reduce(totals)  # so all ranks stop at the same step
            *means, stop = totals.tolist()
            rows.append({"step": step, **dict(zip(log, means)), "grad_norm": norm.item(),
                         "seconds": time.perf_counter() - began})
            if rank() == 0 and (stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
                saved = {"student": student.state_dict(), "ema": ema.state_dict(), "log": rows,
                         "optimizer": optimizer.state_dict(), "step": step + 1,
                         "config": dataclasses.asdict(cfg)}
                write_atomically(Path(cfg.out, "state.pt"), partial(torch.save, saved))
                lines = [rows[0], *(row.values() for row in rows)]  # a dict's keys: the header
                table = "\n".join(",".join(map(str, line)) for line in lines)
                write_atomically(Path(cfg.out, "log.csv"), lambda file: file.write(table.encode()))
            if stop:
                break
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop:
        if world() > 1:
            distributed.barrier()  # until rank 0 has saved
        raise KeyboardInterrupt(f"step {step + 1} is saved, go on with --resume")
    return ema


# ---- 6  Data: real images of one class at a time (§3.3).

def center_crop(image, size):
    """ADM's, of a PIL image: halve while twice too large, resize the short side, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(s // 2 for s in image.size), Image.BOX)
    ratio = size / min(image.size)
    image = image.resize(tuple(round(s * ratio) for s in image.size), Image.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return image.crop((left, top, left + size, top + size))


def to_uint8(images):
    """[n,3,H,W] around [0,1] -> uint8 [n,H,W,3] on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


def read_image(path, size):
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(center_crop(image.convert("RGB"), size)))
    except Exception as error:  # of half a dozen kinds, and not all name the file
        raise ValueError(f"{path} cannot be read, mend or remove it: {error}") from error


@torch.no_grad()
def encode(rae, images, cfg):
    """Images uint8 [n,H,W,3] -> latents [n,D,h,w] on the device."""
    with autocast(cfg):
        batches = images.split(cfg.batch_size)
        latents = [rae.encode(batch.to(cfg.device).permute(0, 3, 1, 2) / 255) for batch in batches]
    return torch.cat(latents)


def own_session(worker):
    os.setsid()  # Ctrl-C or SIGTERM to the whole process group: readers live on until the step is saved


def positives(source, labels, pairs, cfg, rae=None):
    """Yields latents [P,D,h,w] of real images of the class, for each (step, class) of pairs.
    source: latents [n,D,h,w], or an ImageFolder for the rae to encode; labels [n].
    The draw depends on seed, step and class alone; with replacement where a class is small.
    """
    def draw(step, c):
        rng, members, n = seeded(cfg, step, c + 1, 1), np.flatnonzero(labels == c), cfg.n_pos
        return rng.choice(members, n, replace=len(members) < n), rng.random(n) < 0.5 * cfg.flip

    indices = (draw(*pair)[0] for pair in pairs)
    if isinstance(source, torch.Tensor):
        yield from (source[i] for i in indices)
    else:
        loader = DataLoader(source, batch_sampler=indices, num_workers=cfg.workers,
                            worker_init_fn=own_session)
        for pair, (images, _) in zip(pairs, loader):
            mirrored = draw(*pair)[1]
            images[mirrored] = images[mirrored].flip(2)
            yield encode(rae, images, cfg)


# ---- 7  Checkpoints, ours and the released ones: read without unpickling, loaded strictly.

def write_atomically(path, write):
    """write(file) under a temporary name, then rename: path is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's
        raise OSError(f"cannot write {path}, an old file is kept: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path, build, mmap=None):
    """build(what torch.load finds in path), or one sentence on a cut, foreign or malicious file."""
    try:
        return build(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except FileNotFoundError:
        raise
    except Exception as error:  # of half a dozen kinds; torch's advice follows the first sentence
        reason = " ".join(f"{type(error).__name__}: {error}".split()).partition(". ")[0]
        raise ValueError(f"{path} is damaged or not what belongs there, {reason[:300]}") from error


def load_teacher(path):
    """The DiT^DH of our checkpoint or an official one, a raw state dict or the key `ema`; in eval mode."""
    return load(path, build_teacher)


def build_teacher(checkpoint):
    sd = {key.replace("module.", "").replace("_orig_mod.", ""): value  # of DDP, torch.compile
          for key, value in checkpoint.get("ema", checkpoint).items()}
    if bad := [key for key, value in sd.items() if not value.isfinite().all()]:
        raise ValueError(f"{bad[0]} holds NaN or infinity")
    return DiTDH.from_state_dict(sd).eval()


def build_encoder(sd):
    """DINOv2 with registers from its native state dict; 64 channels a head, as in all its sizes."""
    patch_size = sd["patch_embed.proj.weight"].shape[-1]
    _, positions, dim = sd["pos_embed"].shape
    depth = sum(key.endswith("norm1.weight") for key in sd)
    registers = sd["register_tokens"].shape[1]
    encoder = ViT(math.isqrt(positions) * patch_size, patch_size, dim, depth, max(1, dim // 64), registers)
    encoder.load_state_dict(sd)
    return encoder


def build_rae(saved):  # ours, as toy/digits.py saves it
    encoder, decoder = ViT(**saved["encoder_args"]), Decoder(**saved["decoder_args"])
    encoder.load_state_dict(saved["encoder"])
    decoder.load_state_dict(saved["decoder"])
    return RAE(encoder, decoder, saved["mean"], saved["var"], saved["input_size"], sigmoid=saved["sigmoid"])


def released_rae(models):
    """bytetriper/RAE's, its files where README's two download commands put them."""
    encoder = load(Path(models, "dinov2_vitb14_reg4_pretrain.pth"), build_encoder)
    decoder = load(Path(models, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"),
                   partial(Decoder.from_official, num_heads=16))
    mean, var = load(Path(models, "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
                     lambda stat: (stat["mean"], stat["var"]))
    return RAE(encoder, decoder, mean, var, mean.shape[-1] * encoder.patch_embed["proj"].kernel_size[0])


def load_pair(path, cfg):
    """(generator, RAE, what else our own files bring) of a teacher or student, on the device."""
    model, found = load(path, lambda found: (build_teacher(found), found))
    ours = {key: found[key] for key in ("rae", "images", "labels", "judge") if key in found}
    rae = load(path, lambda found: build_rae(found["rae"])) if ours else released_rae(cfg.models)
    shape = [model.in_channels, model.input_size, model.input_size]
    if list(rae.mean.shape) != shape:
        raise ValueError(f"{path} makes latents {shape}, its autoencoder {list(rae.mean.shape)}")
    return model.to(cfg.device), rae.to(cfg.device), ours


# ---- 8  Sampling: an .npz or a picture.

@torch.no_grad()
def generate(sampler, rae, labels, cfg, first=0):
    """Images uint8 [n,H,W,3] of sampler(z, y) -> latents for labels [n]; the i-th from noise first + i."""
    images = []
    for batch in torch.arange(len(labels)).split(cfg.batch_size):
        z = [seeded(cfg, first + i, 0, 2).standard_normal(rae.mean.shape, np.float32) for i in batch.tolist()]
        with autocast(cfg):
            latents = sampler(torch.from_numpy(np.stack(z)).to(cfg.device), labels[batch].to(cfg.device))
        images.append(to_uint8(rae.decode(latents)))  # in fp32: bf16 rounds by half a grey level
    return torch.cat(images)


def save_grid(path, images, columns):
    """Images uint8 [n,H,W,3] -> a PNG with `columns` of them in a row."""
    save = partial(torchvision.utils.save_image, images.permute(0, 3, 1, 2) / 255, format="png")
    write_atomically(path, partial(save, nrow=columns, padding=1))


def sample(cfg):
    """--sample: class-balanced images in --to FILE.npz (ADM's layout) or FILE.png, made by all ranks."""
    to, n = Path(cfg.to), cfg.sample
    model, rae, _ = load_pair(cfg.student or Path(cfg.out, "student.pt"), cfg)
    known = [str(c) for c in range(model.num_classes)]
    classes = cfg.classes.split(",") if cfg.classes else known
    if not set(classes) <= set(known):
        raise ValueError(f"--classes {cfg.classes}: this model knows the classes 0 to {known[-1]}")
    if to.suffix == ".png" and n % len(classes):
        raise ValueError(f"a picture has a row a class: --sample a multiple of {len(classes)}, not {n}")
    i = torch.arange(n)
    order = i * len(classes) // n if to.suffix == ".png" else i % len(classes)  # §4: as many of each class
    labels = torch.tensor([int(c) for c in classes])[order]
    generator = partial(one_step, guide(model, cfg.guidance))
    side = rae.decoder.grid * rae.decoder.patch_size
    raw = to.with_name(f".{to.name}.raw.tmp")
    try:
        raw.touch()  # all ranks fill this file
        with open(raw, "r+b") as file:
            for batch in tqdm(i.split(cfg.batch_size)[rank()::world()], "sample", disable=rank() > 0):
                file.seek(int(batch[0]) * side * side * 3)
                file.write(generate(generator, rae, labels[batch], cfg, int(batch[0])).numpy())
        if world() > 1:
            distributed.barrier()
        if rank() == 0:
            images = np.memmap(raw, np.uint8, "r", shape=(n, side, side, 3))
            if to.suffix == ".png":
                save_grid(to, torch.from_numpy(images.copy()), columns=n // len(classes))
            else:
                write_atomically(to, partial(np.savez, arr_0=images, arr_1=labels.numpy()))
    finally:
        if rank() == 0:
            raw.unlink(missing_ok=True)


# ---- 9  Configuration (§4, Table 8) and command. Every field is a flag: --n-pos 128, --no-perturb.

def option(default, help, low=None, high=2**31, choices=None):
    return dataclasses.field(default=default, metadata=dict(help=help, bounds=(low, high), choices=choices))


@dataclasses.dataclass
class Config:
    preset: str = option("digits", "defaults of all other flags", choices=("digits", "imagenet256"))
    teacher: str = option("", "checkpoint of the flow teacher, ours or official; '': OUT/teacher.pt")
    data: str = option("", "folder of images, a subfolder a class; '': those in the teacher's file")
    models: str = option("models", "folder of the released files, for an official teacher")
    out: str = option("out", "folder for all that is written")
    resume: bool = option(False, "go on from OUT/state.pt, under its configuration")
    seed: int = option(0, "seed of everything random", 0)
    device: str = option("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = option("fp32", "autocast of the networks, not of the field", choices=("fp32", "bf16"))
    compile: bool = option(False, "torch.compile the generator in training")
    grad_checkpoint: bool = option(False, "less memory, more time")
    workers: int = option(4, "processes a rank that read --data ahead", 0, 1024)
    steps: int = option(250, "optimizer steps", 1)
    n_class: int = option(10, "classes a step, one after the other", 1)
    n_pos: int = option(256, "positives a class and step: as many as negatives (Table 7)", 1)
    n_neg: int = option(64, "generated samples with gradient a class and step", 2)
    n_extra_neg: int = option(192, "generated samples without gradient, for the repulsion", 0)
    temperatures: tuple = option((0.02, 0.05, 0.2), "τ of the fields, in mean distances", 1e-6)
    windows: tuple = option((1,), "sides, in tokens, of what drifts as one; 1: the paper", 1)
    perturb: bool = option(True, "Eq. (12): perturbed queries (Tables 3 B, 5)")
    y_softmax: bool = option(False, "Deng et al.'s field (Tables 3 A, 5)")
    flip: bool = option(False, "with --data: mirror half of the positives")
    lr: float = option(7e-4, "learning rate at step 0; it falls linearly to a hundredth", 1e-12)
    ema: float = option(0.99, "decay of the weights' moving average", 0.5, 1.0)
    ema_warmup: int = option(50, "steps over which that decay rises from 0.5", 1)
    save_every: int = option(50, "steps between two writes of OUT/state.pt, log.csv", 1)
    sample: int = option(0, "only draw this many class-balanced images", 0)
    student: str = option("", "checkpoint to sample from; '': OUT/student.pt")
    to: str = option("", "where to: FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or FILE.png (a row a class)")
    classes: str = option("", "classes to sample, as in 1,5,9; '': all")
    guidance: float = option(0.0, "guidance at no cost (ours); 0.1 suits the digits", -10, 10)
    batch_size: int = option(256, "images a batch, in sampling and encoding", 1)


PRESETS = {"digits": {}, "imagenet256": dict(  # Table 8
    dtype="bf16", steps=10_000, n_class=32, flip=True, lr=3e-5, ema=0.9995, ema_warmup=1000,
    save_every=500, batch_size=64, workers=8)}


def parse(argv=None):
    """Command line -> (Config, the flags that were given); flags go before the preset."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for f in dataclasses.fields(Config):
        how = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            how = dict(type=type(f.default[0]), nargs="+")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default!r})", **how)
    given = vars(parser.parse_args(argv))
    cfg = Config(**PRESETS[given.get("preset", "digits")] | given)
    for f in dataclasses.fields(Config):
        low, high = f.metadata["bounds"]
        for value in np.ravel(getattr(cfg, f.name)):
            if low is not None and not low <= value <= high:
                parser.error(f"--{f.name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if bool(cfg.sample) != cfg.to.endswith((".npz", ".png")):
        parser.error("sampling takes --sample N and --to FILE.npz or FILE.png")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds none")
    return cfg, given


def run(cfg, state, began):
    """Distil; write student.pt, samples.png and, for the digits, metrics.json to OUT."""
    out = Path(cfg.out)
    student, rae, ours = load_pair(cfg.teacher or out / "teacher.pt", cfg)  # §3.3: it starts from the teacher
    student.grad_checkpoint = cfg.grad_checkpoint
    if cfg.data:
        size = rae.decoder.grid * rae.decoder.patch_size
        source = torchvision.datasets.ImageFolder(cfg.data, loader=partial(read_image, size=size))
        labels = np.array(source.targets)
    elif "images" in ours:
        source, labels = encode(rae, ours["images"], cfg), ours["labels"].numpy()
    else:
        raise ValueError("this teacher's file brings no images: name a folder of them with --data")
    if not world() <= cfg.n_class <= student.num_classes == labels.max() + 1:
        raise ValueError(f"it must hold: {world()} processes <= --n-class {cfg.n_class} <= classes of the "
                         f"teacher {student.num_classes} = classes of images {labels.max() + 1}")
    ema = distil(student, source, labels, cfg, rae, state)
    if rank() > 0:
        return
    saved = {"ema": ema.state_dict()} | ({"rae": ours["rae"]} if ours else {})
    write_atomically(out / "student.pt", partial(torch.save, saved))
    if "judge" in ours:
        from toy.digits import report
        report(ema, rae, ours, cfg, began)
    else:
        labels = torch.arange(min(10, student.num_classes)).repeat_interleave(8)
        save_grid(out / "samples.png", generate(partial(one_step, ema), rae, labels, cfg), columns=8)


def main(argv=None):
    began = time.perf_counter()
    cfg, given = parse(argv)
    out, state = Path(cfg.out), None
    if cfg.resume:  # under the saved configuration: only where and how it runs may change
        saved, state = load(out / "state.pt", lambda old: (Config(**old["config"]), old), mmap=True)
        if fixed := given.keys() - {"out", "resume", "device", "teacher", "data", "models", "workers",
                                    "save_every", "compile", "grad_checkpoint", "batch_size"}:
            raise ValueError(f"a resumed run keeps its {fixed.pop()}: leave that flag out")
        cfg = dataclasses.replace(saved, **given | {"out": cfg.out, "device": cfg.device})
    elif not cfg.sample:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "state.pt").exists():
            step, steps = load(out / "state.pt", lambda old: (old["step"], old["config"]["steps"]), mmap=True)
            if step < steps:
                raise ValueError(f"{out} holds a run at step {step} of {steps}: --resume, or change --out")
        if not cfg.teacher and cfg.preset == "digits" and rank() == 0 and not (out / "teacher.pt").exists():
            from toy.digits import make_teacher
            make_teacher(out / "teacher.pt", cfg.seed)
    if cfg.device == "cuda":
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(cfg.device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    if world() > 1:
        gpu = torch.device(cfg.device) if cfg.device.startswith("cuda") else None
        distributed.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    sample(cfg) if cfg.sample else run(cfg, state, began)
    if world() > 1:
        distributed.destroy_process_group()


def command(main):
    """main(), but bad input ends in one sentence and a non-zero exit, without a traceback."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(str(error).strip().rpartition("\n")[2])  # above it, a reader process's traceback


if __name__ == "__main__":
    command(main)
