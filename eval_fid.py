"""Quality of generated images against a reference, in the numbers that papers quote.

    python eval_fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          # FID, precision, recall, IS
    python eval_fid.py generated/ real/ --features dinov2 --json out.json   # FD-DINOv2, precision, recall
    python eval_fid.py generated/ real/ --features pixels                   # raw pixels: needs no weights

An input is a folder of images, an .npz of images (arr_0 uint8 [N, H, W, 3]) or one of statistics (mu, sigma),
which give a Fréchet distance alone. ADM's references hold both: the distance then takes the statistics.
"""
import argparse
import itertools
import json
import math
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

WEIGHTS = {
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}


# ============================================= Fréchet distance (Heusel et al. 2017, Eq. 6)

def _root(sigma):
    """R [D, r] with R Rᵀ = Σ, r the numerical rank."""
    value, vector = torch.linalg.eigh(sigma)               # ascending
    if value[0] < -1e-5 * abs(value[-1]):                  # float32 files are off by 1e-7
        raise ValueError(f"a covariance has negative eigenvalues, the lowest is {value[0]:.3g}")
    keep = value > len(sigma) * torch.finfo(torch.float64).eps * value[-1]
    return vector[:, keep] * value[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ for mu [D] and sigma [D, D], as a float.

    With Σ = R Rᵀ, the last trace is the sum of the singular values of R1ᵀ R2, [r1, r2]. Null directions never
    enter, whose rounding noise (1e-8 each after the root) would add up: so the distance is exact for fewer
    samples than dimensions too.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"the statistics do not have the same dimensions: {list(sigma1.shape)} and "
                         f"{list(sigma2.shape)}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold NaN or infinite values")
    trace_root = torch.linalg.svdvals(_root(sigma1).T @ _root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root
    return max(distance.item(), 0.0)                       # equal arguments may leave -1e-13


def mean_and_covariance(features):
    """float64 mean [D] and unbiased covariance [D, D] of features [n, D], in blocks: n may be a million."""
    blocks = torch.as_tensor(features).split(2048)
    mu = sum(x.double().sum(0) for x in blocks) / len(features)
    sigma = sum((x - mu).T @ (x - mu) for x in blocks) / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


# ============================================= precision and recall (Kynkäänniemi et al. 2019, Eq. 1-2)

def _squared_distances(a, b, rows=256):
    """Of a [n, D] to b [m, D], a block [rows, m] at a time."""
    b2 = b.square().sum(1)
    for x in a.split(rows):
        yield x.square().sum(1, keepdim=True) + b2 - 2 * (x @ b.T)


def _share_inside(points, centres, k):
    """Share of the points within the ball of some centre, which reaches to its k-th nearest other centre."""
    radii = torch.cat([d2.topk(k + 1, largest=False).values[:, k]            # k + 1: the first is itself
                       for d2 in _squared_distances(centres, centres)])
    inside = torch.cat([(d2 <= radii).any(1) for d2 in _squared_distances(points, centres)])
    return inside.double().mean().item()


def precision_recall(real, fake, k=3):
    """Features [n, D] and [m, D], numpy or torch -> (precision, recall), from distances in float64."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


# ============================================= Inception Score (Salimans et al. 2016)

def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) ‖ p(y)) of logits [n, K] -> (mean, population std) over consecutive splits.

    Rows are taken in the order given: sorted by class, a split sees few classes and the score is far too low.
    """
    logits = torch.as_tensor(logits)
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(log_p))                 # log p(y), [K]; never log 0
        kl = (log_p.exp() * (log_p - marginal)).sum(1)                       # [n/splits]
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ============================================= networks

def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of x [B, C, H, W]: source = target · in/out, no half-pixel centre."""
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device) * (n / size)
        low = source.long()
        weight = source - low
        if dim == 2:
            weight = weight[:, None]
        a = x.index_select(dim, low)
        b = x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return x


class FIDInception(torchvision.models.Inception3):
    """The network of the original FID (TensorFlow, 2015-12-05), under torchvision's parameter names.

    Only the 3x3 pooling branches differ from torchvision's: averages do not count the padding, and Mixed_7c
    pools by maximum (mseitzer/pytorch-fid, inception.py).
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.eval().requires_grad_(False)

    def forward(self, images, resize="tf"):
        """uint8 [B, 3, H, W] -> (features [B, 2048], logits [B, 1008] without the bias, as in ADM's IS)."""
        if images.dtype != torch.uint8:
            raise ValueError(f"uint8 images are needed, not {images.dtype}")
        x = images.float()
        if resize == "tf":                                                   # ADM, torch-fidelity
            x = (tf1_resize(x) - 128) / 128
        else:                                                                # pytorch-fid
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, block in self.named_children():                            # the order of the forward pass
            if name == "avgpool":
                break
            if not hasattr(block, "branch_pool"):
                x = block(x)
                continue
            if name == "Mixed_7c":
                pooled = F.max_pool2d(x, 3, 1, 1)
            else:
                pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            branches = block._forward(x)[:-1]                                # the last: torchvision's pooling
            x = torch.cat([*branches, block.branch_pool(pooled)], 1)
        features = x.mean((2, 3))                                            # [B, 2048, 8, 8] -> [B, 2048]
        return features, features @ self.fc.weight.T


class DINOv2(torch.nn.Module):
    """Class token of DINOv2 ViT-L/14, no registers, after the final norm: FD-DINOv2 (Stein et al. 2023)."""

    def __init__(self, state, dim=1024, depth=24, num_heads=16):
        super().__init__()
        from drift_rae import ViT
        # 37x37 positions -> 16x16 as DINOv2 does for models without registers: no antialias, offset 0.1
        cls, pos = state["pos_embed"].tensor_split([1], 1)                   # [1, 1, D], [1, 37·37, D]
        grid = math.isqrt(pos.shape[1])
        pos = pos.mT.unflatten(2, (grid, grid))                              # [1, D, 37, 37]
        pos = F.interpolate(pos, scale_factor=(16.1 / grid, 16.1 / grid), mode="bicubic")
        pos = torch.cat([cls, pos.flatten(2).mT], 1)
        self.vit = ViT(224, 14, dim, depth, num_heads, num_registers=0).eval().requires_grad_(False)
        self.vit.load_state_dict({**state, "pos_embed": pos, "register_tokens": torch.zeros(1, 0, dim)})

    def forward(self, images):
        """uint8 [B, 3, H, W] -> features [B, D]."""
        images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
        images = np.stack([image.resize((224, 224), Image.BICUBIC) for image in images])
        x = torch.from_numpy(images).to(self.vit.pos_embed.device).permute(0, 3, 1, 2) / 255
        mean = x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        return self.vit.norm(self.vit.features((x - mean) / std)[:, 0])


def pixels(images):
    if images[0].numel() > 3 * 64 * 64:
        raise ValueError("the covariance of raw pixels is too large: pass --size 64 or less")
    return images.flatten(1) / 255, None


def load_network(args):
    """A function uint8 [B, 3, H, W] -> (features [B, D], logits [B, 1008] or None)."""
    if args.features == "pixels":
        return pixels
    url = WEIGHTS[args.features]
    with reading(args.weights or f"{url} (if you have the file, pass it with --weights)"):
        if args.weights:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
        else:                                                                # looks in torch's cache first
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        if args.features == "dinov2":
            model = DINOv2(state)
        else:
            model = FIDInception()
            model.load_state_dict(state)
    model.to(args.device)
    torch.backends.cudnn.allow_tf32 = False                # TF32 rounds to 10 bits, 5e-4
    if args.features == "dinov2":
        return lambda images: (model(images), None)
    return lambda images: model(images.to(args.device), args.resize)


# ============================================= reading images and statistics

@contextmanager
def reading(path):
    """Damaged and foreign files make torch, zipfile, zlib, numpy and Pillow raise a dozen kinds of error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]        # some are pages long
        raise ValueError(f"cannot read {path}: {reason}") from error


def arrays(path):
    """The names in an .npz; a folder counts as images, arr_0."""
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
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _folder_images(path):
    """Every image under a folder, uint8 [H, W, 3], sorted by path."""
    known = Image.registered_extensions()
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in known):
        with reading(file), Image.open(file) as image:
            if image.mode[0] in "IF":                      # 16 or 32 bits, which convert would clip
                raise ValueError("images of 8 bits a channel are needed")
            yield np.asarray(image.convert("RGB"))


def _npz_images(path):
    """The rows of arr_0, uint8 [H, W, 3], streamed: 50,000 of 256x256 are 10 GB."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"arr_0 is {dtype} {shape}, and uint8 [N, H, W, 3] is needed")
        for _ in range(shape[0]):
            data = member.read(math.prod(shape[1:]))
            yield np.frombuffer(data, np.uint8).reshape(shape[1:])


def read_images(path, batch_size, size=None):
    """Yields uint8 tensors [B, 3, H, W]; one batch is in memory at a time."""
    images = _folder_images(path) if path.is_dir() else _npz_images(path)
    if size:
        images = (np.asarray(center_crop(Image.fromarray(x), size)) for x in images)
    shape = None
    while batch := list(itertools.islice(images, batch_size)):
        shape = shape or batch[0].shape
        if any(x.shape != shape for x in batch):
            raise ValueError(f"the images of {path} differ in size: pass --size N to crop and resize them")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def extract(path, args, network):
    """The images of an input -> features [n, D], logits [n, 1008] or None, their size as text."""
    features, logits = [], []
    for images in tqdm(read_images(path, args.batch_size, args.size), desc=path.name, disable=None):
        with torch.inference_mode():
            x, y = network(images)
        features.append(x.cpu())
        if y is not None:
            logits.append(y.cpu())
    n = sum(len(x) for x in features)
    if n < 10:                                             # the splits of the Inception Score
        raise ValueError(f"{path} holds {n} images, and at least 10 are needed")
    return torch.cat(features), torch.cat(logits) if logits else None, f"{images.shape[3]}x{images.shape[2]}"


def read_statistics(path, args):
    """(mu, sigma, n), n None where the file does not say. `made` is ours: ADM and pytorch-fid write none."""
    with reading(path), np.load(path) as file:
        made = str(file["made"]) if "made" in file else "inception"
        if made not in (args.features, describe(args)):
            raise ValueError(f"its statistics are of {made}, not of {describe(args)}")
        n = int(file["n"]) if "n" in file else None
        return file["mu"], file["sigma"], n


def load_side(path, args, network):
    """What one input gives: mu, sigma, n, features, logits, size, each None if it does not."""
    side = SimpleNamespace(mu=None, sigma=None, n=None, features=None, logits=None, size=None)
    names = arrays(path)
    if "mu" in names and (args.features == "inception" or "arr_0" not in names):
        side.mu, side.sigma, side.n = read_statistics(path, args)
    if "arr_0" in names:
        side.features, side.logits, side.size = extract(path, args, network)
    if side.mu is None:
        side.mu, side.sigma = mean_and_covariance(side.features)
        side.n = len(side.features)
    return side


# ============================================= command

def describe(args):
    return f"inception with the {args.resize} resize" if args.resize else args.features


def caveats(samples, reference):
    """A sentence for each reason not to compare with published numbers."""
    for name, side in (("samples", samples), ("reference", reference)):
        if side.n is not None and side.n <= len(side.mu):
            yield f"{side.n:,} images ({name}) in {len(side.mu)} dimensions: the covariance is singular"
    if samples.n is not None and samples.n < 50_000:
        yield f"{samples.n:,} samples: the distance falls as N grows, and published ones are of 50,000"
    if samples.size and reference.size and samples.size != reference.size:
        yield f"the samples are {samples.size}, the reference is {reference.size}"


def write_atomically(path, write):
    """write(file) under a temporary name, then rename: path is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
    temporary.replace(path)


def evaluate(args):
    """Every metric that the two inputs allow, as the dict that --json writes."""
    network = None
    if "arr_0" in arrays(args.samples) + arrays(args.reference):             # statistics need no weights
        network = load_network(args)
    reference = load_side(args.reference, args, network)
    if args.save_stats:
        if reference.n is None:
            raise ValueError(f"--save-stats is for images, and {args.reference} holds statistics already")
        stats = dict(mu=reference.mu, sigma=reference.sigma, n=reference.n, made=describe(args))
        write_atomically(args.save_stats, lambda file: np.savez(file, **stats))
    samples = load_side(args.samples, args, network)
    distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    result = dict(samples=str(args.samples), reference=str(args.reference), features=args.features,
                  resize=args.resize, n_samples=samples.n, n_reference=reference.n,
                  frechet_distance=distance, precision=None, recall=None,
                  inception_score=None, inception_score_std=None, inception_score_shuffled=None)
    if reference.features is not None and samples.features is not None:
        real, fake = reference.features.to(args.device), samples.features.to(args.device)
        result["precision"], result["recall"] = precision_recall(real, fake)
    if samples.logits is not None:
        order = np.random.RandomState(2020).permutation(len(samples.logits))  # torch-fidelity's
        result["inception_score"], result["inception_score_std"] = inception_score(samples.logits)
        result["inception_score_shuffled"], _ = inception_score(samples.logits[order])
    result["warnings"] = list(caveats(samples, reference))
    return result


def positive(text):
    if int(text) < 1:
        raise ValueError                                   # argparse: invalid positive value
    return int(text)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="generated images: folder or .npz")
    parser.add_argument("reference", type=Path, help="real images or their statistics: folder or .npz")
    parser.add_argument("--features", choices=["inception", "dinov2", "pixels"], default="inception")
    parser.add_argument("--resize", choices=["tf", "pytorch"], default="tf",
                        help="of inception: tf as ADM and torch-fidelity (default), pytorch as pytorch-fid")
    parser.add_argument("--size", type=positive, help="resize and crop the images to this many pixels")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time (default 64)")
    parser.add_argument("--weights", type=Path, help="file (default: torch's hub cache, then the network)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--save-stats", type=Path, help="write the reference's statistics to this .npz")
    args = parser.parse_args(argv)
    if args.features != "inception":
        args.resize = None
    for path in (args.json, args.save_stats):
        if path and not path.parent.is_dir():              # found now rather than after an hour
            parser.error(f"the folder of {path} does not exist")
    return args


def main(argv=None):
    args = parse_args(argv)
    result = evaluate(args)
    for key, value in result.items():
        if key != "warnings" and value is not None:
            print(f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}")
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")
    if args.json:
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("eval_fid.py: interrupted")
    except (ValueError, OSError) as error:
        sys.exit(f"eval_fid.py: {error}")
