"""Quality of generated images against a reference, in the numbers that papers quote.

    python eval_fid.py samples.npz VIRTUAL_imagenet256_labeled.npz    # FID, precision, recall, IS
    python eval_fid.py generated/ real/ --features dinov2             # FD-DINOv2, precision, recall
    python eval_fid.py generated/ real/ --features pixels             # raw pixels: needs no weights

An input is a folder of images, or an .npz of images (arr_0 uint8 [N, H, W, 3]), of Inception's
statistics (mu, sigma), or of both, as ADM's: the FID takes the statistics, the rest needs images.
"""
import argparse
import itertools
import json
import math
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor
from tqdm import tqdm

WEIGHTS = {
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}


# ---- Fréchet distance (Heusel et al. 2017, Eq. 6)

def checked_statistics(mu, sigma):
    """mu [D] and sigma [D, D], numpy or torch, as float64 tensors."""
    mu = torch.as_tensor(mu, dtype=torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu {list(mu.shape)} and sigma {list(sigma.shape)} do not fit together")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("the statistics hold NaN or infinite values")
    return mu, sigma


def covariance_root(sigma):
    """R [D, r] with R Rᵀ = Σ, where r is the numerical rank."""
    values, vectors = torch.linalg.eigh(sigma)  # ascending
    if values[0] < -1e-5 * abs(values[-1]):     # float32 files are off by 1e-7
        raise ValueError(f"a covariance has negative eigenvalues, the lowest is {values[0]:.3g}")
    kept = values > len(sigma) * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ for mu [D] and sigma [D, D], as a float.

    With Σ = R Rᵀ, the last trace is the sum of the singular values of R1ᵀ R2 [r1, r2]. It is exact
    for fewer samples than dimensions too: null directions, whose noise would add up, never enter.
    """
    mu1, sigma1 = checked_statistics(mu1, sigma1)
    mu2, sigma2 = checked_statistics(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"the inputs do not have the same dimensions: {len(mu1)} and {len(mu2)}")
    root_product = covariance_root(sigma1).T @ covariance_root(sigma2)
    trace_root = torch.linalg.svdvals(root_product).sum()
    mean_term = (mu1 - mu2).square().sum()
    distance = mean_term + sigma1.trace() + sigma2.trace() - 2 * trace_root
    return max(distance.item(), 0.0)            # equal arguments may leave -1e-13


def mean_and_covariance(features):
    """float64 mean [D] and unbiased covariance [D, D] of features [n, D], n up to a million."""
    blocks = torch.as_tensor(features).split(2048)
    mu = sum(block.double().sum(0) for block in blocks) / len(features)
    scatter = 0
    for block in blocks:
        centred = block - mu                    # float64, as mu is
        scatter += centred.T @ centred
    sigma = scatter / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


# ---- precision and recall (Kynkäänniemi et al. 2019, Eq. 1-2)

def squared_distances(points, centres):
    """Of points [n, D] to centres [m, D], a block [256, m] at a time."""
    centre_norms = centres.square().sum(1)
    for block in points.split(256):
        block_norms = block.square().sum(1, keepdim=True)
        yield block_norms + centre_norms - 2 * (block @ centres.T)


def share_inside(points, centres, k):
    """Share of the points in the ball of some centre, which ends at its k-th nearest other."""
    radii = []
    for block in squared_distances(centres, centres):
        nearest = block.topk(k + 1, largest=False).values    # ascending; the first is itself
        radii.append(nearest[:, k])
    radii = torch.cat(radii)
    inside = [(block <= radii).any(1) for block in squared_distances(points, centres)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real, fake, k=3):
    """Features [n, D] and [m, D], numpy or torch -> (precision, recall), from float64 distances."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    return share_inside(fake, real, k), share_inside(real, fake, k)


# ---- Inception Score (Salimans et al. 2016)

def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) ‖ p(y)) of logits [n, K] -> (mean, population std) over consecutive splits.
    Of rows sorted by class a split sees few classes, and the score is far too low."""
    logits = torch.as_tensor(logits)
    scores = []
    for i in range(splits):
        start, end = i * len(logits) // splits, (i + 1) * len(logits) // splits
        log_p = logits[start:end].double().log_softmax(1)          # log p(y|x), [n/splits, K]
        log_marginal = log_p.logsumexp(0) - math.log(end - start)  # log p(y), [K]; never log 0
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ---- networks

def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of x [B, C, H, W]: source = target · in/out, no half pixel."""
    for _ in ("height", "width"):
        x = x.mT                # the side to be resized is now the last
        length = x.shape[3]
        source = torch.arange(size, device=x.device) * (length / size)
        low = source.long()
        high = (low + 1).clamp(max=length - 1)
        a, b = x[..., low], x[..., high]
        x = a + (b - a) * (source - low)
    return x


# The original's averages do not count the padding, those of torchvision's blocks do.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class FIDInceptionA(inception.InceptionA):
    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], 1)


class FIDInceptionC(inception.InceptionC):
    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], 1)


class FIDInceptionE(inception.InceptionE):
    def forward(self, x, pool=average_pool):
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        branch_pool = self.branch_pool(pool(x))
        return torch.cat([branch1x1, *branch3x3, *branch3x3dbl, branch_pool], 1)


class FIDInception(inception.Inception3):
    """The original FID's network (TensorFlow, 2015-12-05), under torchvision's parameter names.
    Only the 3x3 pooling is not torchvision's (mseitzer/pytorch-fid, inception.py)."""
    def __init__(self):
        blocks = [inception.BasicConv2d, FIDInceptionA, inception.InceptionB, FIDInceptionC,
                  inception.InceptionD, FIDInceptionE, inception.InceptionAux]
        super().__init__(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.eval().requires_grad_(False)

    def forward(self, images, resize="tf"):
        """uint8 [B, 3, H, W] -> features [B, 2048], logits [B, 1008] without bias, as ADM's IS."""
        if images.dtype != torch.uint8:
            raise ValueError(f"uint8 images are needed, not {images.dtype}")
        x = images.to(self.fc.weight.device).float()
        if resize == "tf":      # ADM, torch-fidelity
            x = (tf1_resize(x) - 128) / 128
        else:                   # pytorch-fid
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
        stem = [self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, self.maxpool1,
                self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, self.maxpool2]
        mixed = [self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b,
                 self.Mixed_6c, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b]
        for block in stem + mixed:
            x = block(x)
        x = self.Mixed_7c(x, pool=max_pool)    # this one alone; [B, 2048, 8, 8]
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


class DINOv2(torch.nn.Module):
    """Class token of DINOv2 ViT-L/14, no registers, normed, for FD-DINOv2 (Stein et al. 2023)."""
    def __init__(self, state, dim=1024, depth=24, num_heads=16):
        super().__init__()
        from drift_rae import ViT
        # 37x37 positions -> 16x16 as DINOv2 does without registers: no antialias, offset 0.1
        class_position, positions = state["pos_embed"].tensor_split([1], 1)
        grid = math.isqrt(positions.shape[1])
        positions = positions.mT.unflatten(2, (grid, grid))    # [1, D, 37, 37]
        positions = F.interpolate(positions, scale_factor=16.1 / grid, mode="bicubic")
        positions = positions.flatten(2).mT                    # [1, 16·16, D]
        state = dict(state, register_tokens=torch.zeros(1, 0, dim))
        state["pos_embed"] = torch.cat([class_position, positions], 1)
        self.vit = ViT(224, 14, dim, depth, num_heads, num_registers=0)
        self.vit.load_state_dict(state)
        self.eval().requires_grad_(False)

    def forward(self, images):
        """uint8 [B, 3, H, W] -> features [B, D], no logits."""
        resized = [to_pil_image(image).resize((224, 224), Image.BICUBIC) for image in images]
        x = torch.stack([to_tensor(image) for image in resized])
        x = x.to(self.vit.pos_embed.device)
        x = normalize(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return self.vit.norm(self.vit.features(x)[:, 0]), None


def pixels(images):
    """uint8 [B, 3, H, W] -> features [B, 3·H·W], no logits."""
    if images[0].numel() > 3 * 64 * 64:
        raise ValueError("the covariance of raw pixels is too large: pass --size 64 or less")
    return images.flatten(1) / 255, None


def load_network(args):
    """A function uint8 [B, 3, H, W] -> (features [B, D], logits [B, 1008] or None)."""
    if args.features == "pixels":
        return pixels
    torch.backends.cudnn.allow_tf32 = False    # TF32 rounds to 10 bits, 5e-4
    url = WEIGHTS[args.features]
    with reading(args.weights or f"{url} (if you have the file, pass it with --weights)"):
        if args.weights:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
        else:    # looks in torch's cache first
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        if args.features == "dinov2":
            return DINOv2(state).to(args.device)
        model = FIDInception()
        model.load_state_dict(state)
    return partial(model.to(args.device), resize=args.resize)


# ---- reading images and statistics

@contextmanager
def reading(path):
    """Damaged and foreign files make torch, zipfile, numpy, Pillow raise a dozen kinds of error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]     # some are pages long
        raise ValueError(f"cannot read {path}: {reason}") from error


def array_names(path):
    """What an .npz holds; a folder counts as images, arr_0."""
    if path.is_dir():
        return ["arr_0"]
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names and "mu" not in names:
            raise ValueError("it holds neither images (arr_0) nor statistics (mu and sigma)")
        return names


def center_crop(image, size):
    """ADM's centre crop: halve while twice too large, resize the short side, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def folder_images(path):
    """Every image under a folder, uint8 [H, W, 3], sorted by path."""
    suffixes = Image.registered_extensions()
    files = [file for file in path.rglob("*") if file.suffix.lower() in suffixes]
    for file in sorted(files):
        with reading(file), Image.open(file) as image:
            if image.mode[0] in "IF":                   # 16 or 32 bits, which convert would clip
                raise ValueError("images of 8 bits a channel are needed")
            yield np.asarray(image.convert("RGB"))


def npz_images(path):
    """The rows of arr_0, uint8 [H, W, 3], streamed: 50,000 of 256x256 are 10 GB."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"arr_0 is {dtype} {shape}, not C-ordered uint8 [N, H, W, 3]")
        for _ in range(shape[0]):
            row = member.read(math.prod(shape[1:]))
            yield np.frombuffer(row, np.uint8).reshape(shape[1:])


def read_images(path, batch_size, size=None):
    """Yields uint8 tensors [B, 3, H, W]; one batch is in memory at a time."""
    images = folder_images(path) if path.is_dir() else npz_images(path)
    shapes = set()
    while batch := list(itertools.islice(images, batch_size)):
        if size:
            batch = [np.asarray(center_crop(Image.fromarray(image), size)) for image in batch]
        shapes.update(image.shape for image in batch)
        if len(shapes) > 1:
            raise ValueError(f"the images of {path} differ in size: pass --size N to crop them")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


@dataclass
class Side:
    """What one input gives; None where it does not."""
    mu: np.ndarray = None           # [D]
    sigma: np.ndarray = None        # [D, D]
    n: int = None                   # images behind mu and sigma; files of statistics do not say
    features: torch.Tensor = None   # [n, D]
    logits: torch.Tensor = None     # [n, 1008]
    size: str = None                # of the images


@torch.inference_mode()
def extract(path, args, network):
    """The images of an input -> features [n, D], logits [n, 1008] or None, their size as text."""
    features, logits = [], []
    batches = read_images(path, args.batch_size, args.size)
    for images in tqdm(batches, desc=path.name, disable=None):
        batch_features, batch_logits = network(images)
        features.append(batch_features.cpu())
        if batch_logits is not None:
            logits.append(batch_logits.cpu())
    n = sum(len(batch) for batch in features)
    if n < 10:                                          # the splits of the Inception Score
        raise ValueError(f"{path} holds {n} images, and at least 10 are needed")
    logits = torch.cat(logits) if logits else None
    return torch.cat(features), logits, f"{images.shape[3]}x{images.shape[2]}"


def load_side(path, args, network):
    side = Side()
    names = array_names(path)
    if "mu" in names and args.features == "inception":
        with reading(path), np.load(path) as file:
            side.mu, side.sigma = file["mu"], file["sigma"]
    elif "arr_0" not in names:
        raise ValueError(f"{path} holds Inception's statistics alone, none of {args.features}")
    if "arr_0" in names:
        side.features, side.logits, side.size = extract(path, args, network)
    if side.mu is None:
        side.mu, side.sigma = mean_and_covariance(side.features)
        side.n = len(side.features)
    return side


# ---- command

def caveats(samples, reference):
    """A sentence for each reason not to compare with published numbers."""
    for name, side in (("samples", samples), ("reference images", reference)):
        if side.n is not None and side.n <= len(side.mu):
            yield f"{side.n:,} {name} in {len(side.mu)} dimensions: the covariance is singular"
    if samples.n is not None and samples.n < 50_000:
        yield f"{samples.n:,} samples: the distance falls as N grows, and papers take 50,000"
    if samples.size and reference.size and samples.size != reference.size:
        yield f"the samples are {samples.size}, the reference is {reference.size}"


def evaluate(args):
    """Every metric that the two inputs allow, as the dict that --json writes."""
    network = None
    if "arr_0" in array_names(args.samples) + array_names(args.reference):
        network = load_network(args)                    # statistics need no weights
    reference = load_side(args.reference, args, network)
    samples = load_side(args.samples, args, network)
    distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    precision = recall = score = score_std = shuffled_score = None
    if samples.features is not None and reference.features is not None:
        real = reference.features.to(args.device)
        fake = samples.features.to(args.device)
        precision, recall = precision_recall(real, fake)
    if samples.logits is not None:
        score, score_std = inception_score(samples.logits)
        order = np.random.RandomState(2020).permutation(len(samples.logits))    # torch-fidelity's
        shuffled_score, _ = inception_score(samples.logits[order])
    result = dict(samples=str(args.samples), reference=str(args.reference), features=args.features,
                  resize=args.resize, n_samples=samples.n, n_reference=reference.n)
    result.update(frechet_distance=distance, precision=precision, recall=recall,
                  inception_score=score, inception_score_std=score_std,
                  inception_score_shuffled=shuffled_score,
                  warnings=list(caveats(samples, reference)))
    return result


def parse_args(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flag = parser.add_argument
    flag("samples", type=Path, help="generated images: folder or .npz")
    flag("reference", type=Path, help="real images or their statistics: folder or .npz")
    flag("--features", choices=["inception", "dinov2", "pixels"], default="inception")
    flag("--resize", choices=["tf", "pytorch"], default="tf", help="as ADM, or as pytorch-fid")
    flag("--size", type=int, help="resize and crop the images to this many pixels")
    flag("--batch-size", type=int, default=64, help="images at a time (default 64)")
    flag("--weights", type=Path, help="file (default: torch's hub cache, then the network)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    flag("--device", choices=devices, default=devices[0])
    flag("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    if args.features != "inception":
        args.resize = None
    if args.batch_size < 1 or (args.size is not None and args.size < 1):
        parser.error("--batch-size and --size must be greater than 0")
    if args.json and not args.json.parent.is_dir():     # found now rather than after an hour
        parser.error(f"the folder of {args.json} does not exist")
    return args


def main(argv=None):
    args = parse_args(argv)
    result = evaluate(args)
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        if value is not None and key != "warnings":
            print(f"{key:<24} {value}")
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(args.json)                    # the file is the old one or the new one


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("eval_fid.py: interrupted")
    except (ValueError, OSError) as error:
        sys.exit(f"eval_fid.py: {error}")
