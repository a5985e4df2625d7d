"""Quality of generated images against a reference, in the numbers that papers quote.

    python eval_fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          # FID, precision, recall, IS
    python eval_fid.py generated/ real/ --features dinov2 --json out.json   # FD-DINOv2, precision, recall
    python eval_fid.py generated/ real/ --features pixels                   # raw pixels: needs no weights

An input is a folder of images, an .npz of images (arr_0 uint8 [N, H, W, 3], as ADM's) or one of statistics
(mu, sigma: Fréchet distance only). In this order: metrics, networks, reading, command.
"""
import argparse
import itertools
import json
import math
import os
import pickle
import sys
import zipfile
import zlib
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path

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
BAD_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError)
BAD_WEIGHTS = (RuntimeError, TypeError, KeyError, ValueError, IndexError, AttributeError, EOFError,
               pickle.UnpicklingError)


class UserError(Exception):
    """Something the user can put right: exit_code prints it as one sentence."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (all flags: --help)")


def exit_code(main):
    """main(argv) -> one that returns 0, or 2 after one sentence on what is wrong, or 130 after Ctrl-C."""
    script = Path(main.__code__.co_filename).name

    @wraps(main)
    def run(argv=None):
        try:
            main(argv)
            return 0
        except KeyboardInterrupt as e:
            print(f"{script}: interrupted{', ' * bool(str(e))}{e}", file=sys.stderr)
            return 130
        except torch.OutOfMemoryError as e:
            print(f"{script}: lower --batch-size, or --n-neg, or take --grad-checkpoint: {e}", file=sys.stderr)
            return 2
        except (UserError, OSError) as e:
            print(f"{script}: {e}", file=sys.stderr)
            return 2

    return run


def write_atomically(path, write):
    """write(file) to a temporary neighbour of path, then rename: path is the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:  # torch.save makes a RuntimeError of an OSError
        with explain(f"cannot write {path}, an old file is kept: is the disk full?", OSError, RuntimeError):
            with open(temporary, "wb") as f:
                write(f)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explain(sentence, *errors):
    """Turns the errors that bad input causes in a library into a UserError with that sentence."""
    try:
        yield
    except torch.OutOfMemoryError:                         # a RuntimeError; exit_code knows it
        raise
    except errors as error:
        raise UserError(f"{sentence} ({' '.join(str(error).split())[:200]})") from error


# ============================================= Fréchet distance (Heusel et al. 2017, Eq. 6)

def _root(sigma, which):
    """R [D, r] with R Rᵀ = Σ, r the numerical rank."""
    from scipy.linalg.lapack import dpstrf                 # pivoted Cholesky finds the rank: beats eigh
    if not np.isfinite(sigma).all():
        raise UserError(f"the {which} covariance holds NaN or infinite values")
    size = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-6 * size:
        raise UserError(f"the {which} covariance is not symmetric")
    factor, pivot, rank, _ = dpstrf(sigma, lower=1)        # stops at a pivot below D·eps·max Σ_ii
    root = np.empty((len(sigma), rank))
    root[pivot - 1] = np.tril(factor)[:, :rank]
    if rank == len(sigma) or np.abs(root @ root.T - sigma).max() <= 1e-10 * size:
        return root
    value, vector = np.linalg.eigh(sigma)                  # indefinite: by rounding (float32 files)?
    if value[0] < -1e-5 * max(value[-1], 0.0):
        raise UserError(f"the {which} covariance is not positive semi-definite: its eigenvalues start at "
                        f"{value[0]:.3g}")
    keep = value > 1e-12 * value[-1]
    return vector[:, keep] * np.sqrt(value[keep])


def _eigenvalues(symmetric):
    """Of float64 [n, n], on one thread: at 2048, two gain 0.25 s but lose 10 s where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigvalsh(torch.from_numpy(symmetric)).numpy()
    finally:
        torch.set_num_threads(threads)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ for mu [D] and sigma [D, D], as a float.

    With Σ = R Rᵀ, the non-zero eigenvalues of Σ1 Σ2 are those of MᵀM, M = R1ᵀ R2: real and positive, so no
    complex root. M is [r1, r2], the ranks: null directions never enter, whose rounding noise (√1e-16 each
    after the root) would add up, so that fewer samples than dimensions are exact too.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise UserError(f"the statistics do not have the same dimensions: mu {mu1.shape} and {mu2.shape}, "
                        f"sigma {sigma1.shape} and {sigma2.shape}")
    for mu, which in ((mu1, "first"), (mu2, "second")):
        if not np.isfinite(mu).all():
            raise UserError(f"the {which} mean holds NaN or infinite values")
    m = _root(sigma1, "first").T @ _root(sigma2, "second")  # [r1, r2]
    gram = m @ m.T if m.shape[0] < m.shape[1] else m.T @ m  # the smaller one: the other has null directions
    trace_root = np.sqrt(_eigenvalues(gram).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return float(max(distance, 0.0))                       # equal arguments may leave -1e-13


def mean_and_covariance(features):
    """float64 mean [D] and unbiased covariance [D, D] of features [n, D]: two passes over fixed blocks."""
    features = torch.as_tensor(features)
    mu = sum(x.sum(0) for _, x in _blocks(features)) / len(features)
    sigma = sum((x - mu).T @ (x - mu) for _, x in _blocks(features)) / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


# ============================================= precision and recall (Kynkäänniemi et al. 2019, Eq. 1-2)

def _blocks(x, block=2048):
    for i in range(0, len(x), block):
        yield slice(i, i + block), x[i:i + block].double()


def _squared_distances(a, b):
    """[n, m] from a [n, D] and b [m, D]."""
    a2, b2 = a.square().sum(1)[:, None], b.square().sum(1)
    d2 = (a2 + b2).addmm_(a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-13 * (a2 + b2), 0.0)    # below the rounding noise: the same point


def _radii(x, centre, k):
    """Squared distance of each row of x [n, D] to its k-th nearest other row, [n]."""
    radii = []
    for rows, a in _blocks(x):
        nearest = a.new_full((len(a), k), torch.inf)
        for cols, b in _blocks(x):
            d2 = _squared_distances(a - centre, b - centre)
            if rows == cols:
                d2.fill_diagonal_(torch.inf)               # the point itself is not its neighbour
            nearest = torch.cat([nearest, d2], 1).topk(k, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def precision_recall(real, fake, k=3):
    """Features [n, D] and [m, D], numpy or torch -> (precision, recall).

    Precision: the share of fake points within the k-th-neighbour ball of some real point; recall: vice versa.
    Distances come in tiles of 2048 x 2048 in float64, so the memory is that of the features.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UserError(f"features must be [n, D] and [m, D]: {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than k = {k} samples on both sides")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise UserError("the features hold NaN or infinite values")
    centre = real[:2048].double().mean(0)                  # |a|² + |b|² − 2ab cancels less near the origin
    real_radii, fake_radii = _radii(real, centre, k), _radii(fake, centre, k)
    real_in, fake_in = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (real, fake))
    for rows, a in _blocks(real):
        for cols, b in _blocks(fake):
            d2 = _squared_distances(a - centre, b - centre)
            fake_in[cols] |= (d2 <= real_radii[rows, None]).any(0)
            real_in[rows] |= (d2 <= fake_radii[cols]).any(1)
    return fake_in.double().mean().item(), real_in.double().mean().item()


# ============================================= Inception Score (Salimans et al. 2016)

def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) ‖ p(y)) of logits [n, K], a value for each split, rows i·n//splits : (i+1)·n//splits.

    Returns (mean, population std over the splits). Rows are taken in the order given: sorted by class, a
    split sees few classes and the score is far too low.
    """
    logits = torch.as_tensor(logits)
    if len(logits) < splits:
        raise UserError(f"an Inception Score over {splits} splits needs at least {splits} samples")
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)
        p = log_p.exp()                                                      # [n/splits, K]
        marginal = log_p.logsumexp(0) - math.log(len(p))                     # log p(y), [K]; never log 0
        scores.append((p * (log_p - marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ============================================= networks

def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of x [B, C, H, W]: source = target · in/out, no half-pixel centre."""
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device) * (n / size)
        low = source.long()
        weight = (source - low).view(-1, 1) if dim == 2 else source - low
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
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
        if images.dtype != torch.uint8 or resize not in ("tf", "pytorch"):
            raise ValueError(f"uint8 images, resize 'tf' or 'pytorch' expected: {images.dtype}, {resize!r}")
        x = images.float()
        if resize == "tf":                                                   # ADM, torch-fidelity
            x = (tf1_resize(x) - 128) / 128
        else:                                                                # pytorch-fid
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, block in self.named_children():                            # the order of the forward pass
            if name == "avgpool":
                break
            if hasattr(block, "branch_pool"):
                pool = F.max_pool2d if name == "Mixed_7c" else partial(F.avg_pool2d, count_include_pad=False)
                *branches, _ = block._forward(x)                             # the last: torchvision's pooling
                x = torch.cat([*branches, block.branch_pool(pool(x, 3, 1, 1))], 1)
            else:
                x = block(x)
        features = x.mean((2, 3))                                            # [B, 2048, 8, 8] -> [B, 2048]
        return features, features @ self.fc.weight.T


class DINOv2(torch.nn.Module):
    """Class token of DINOv2 ViT-L/14, no registers, after the final norm: FD-DINOv2 (Stein et al. 2023)."""

    def __init__(self, state):
        super().__init__()
        from drift_rae import ViT                          # not at the top: drift_rae imports this module
        # 37x37 positions -> 16x16 as DINOv2 does for models without registers: no antialias, offset 0.1
        cls, pos = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]      # [1, 1, D], [1, 37·37, D]
        grid, dim = math.isqrt(pos.shape[1]), pos.shape[2]
        pos = pos.mT.unflatten(2, (grid, grid))                              # [1, D, 37, 37]
        pos = F.interpolate(pos, scale_factor=(16.1 / grid, 16.1 / grid), mode="bicubic")
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        self.vit = ViT(224, 14, dim, depth, dim // 64, num_registers=0).eval().requires_grad_(False)
        self.vit.load_state_dict({**state, "pos_embed": torch.cat([cls, pos.flatten(2).mT], 1)})

    def forward(self, images):
        """uint8 [B, 3, H, W] -> features [B, D]."""
        images = map(Image.fromarray, images.permute(0, 2, 3, 1).numpy())
        images = [image.resize((224, 224), Image.BICUBIC) for image in images]
        x = torch.from_numpy(np.stack(images)).to(self.vit.pos_embed.device).permute(0, 3, 1, 2) / 255
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.vit.norm(self.vit.features((x - mean) / std)[:, 0])


def _pixels(images):
    if images[0].numel() > 3 * 64 * 64:
        raise UserError(f"the covariance of raw {images.shape[3]}x{images.shape[2]} pixels is too large: "
                        "pass --size 64 or less")
    return images.flatten(1) / 255, None


def load_extractor(name, resize, weights, device):
    """A function uint8 [B, 3, H, W] -> (features [B, D], logits [B, 1008] or None)."""
    if name == "pixels":
        return _pixels
    url, cached = WEIGHTS[name], os.path.join(torch.hub.get_dir(), "checkpoints")
    advice = (f"the {name} weights are not in {cached} and cannot be downloaded: get {url} elsewhere "
              "and pass the file with --weights")
    with (explain(f"cannot read {weights}" if weights else advice, OSError),
          explain(f"{weights or url} does not hold the {name} weights", *BAD_WEIGHTS)):
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:                                                                # looks in the cache first
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        model = DINOv2(state) if name == "dinov2" else FIDInception()
        if name == "inception":
            model.load_state_dict(state)
    model.to(device)
    torch.backends.cudnn.allow_tf32 = False                # TF32 rounds to 10 bits, 5e-4
    torch.backends.cuda.matmul.allow_tf32 = False
    if name == "dinov2":
        return lambda images: (model(images), None)
    return lambda images: model(images.to(device), resize)


# ============================================= reading images and statistics

def _to_uint8(array, name):
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):                      # true for NaN as well
            raise UserError(f"{name} holds float images outside [0, 1], from {array.min():.4g} to "
                            f"{array.max():.4g}: scale them, or store uint8")
        return np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name} holds {array.dtype} images, and uint8 or floats in [0, 1] are needed")
    return array


def _folder_images(path):
    """Every image under a folder, uint8 [H, W, 3], sorted by path."""
    readable = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in readable)
    if not files:
        raise UserError(f"{path} holds no image that Pillow reads")
    for file in files:
        with (explain(f"cannot read the image {file}", OSError, SyntaxError, ValueError),
              Image.open(file) as image):
            if image.mode[0] in "IF":                      # 16 or 32 bits, which convert("RGB") would clip
                yield np.stack([_to_uint8(np.asarray(image), file)] * 3, 2)
            else:
                yield np.asarray(image.convert("RGB"))


def _npz_images(path):
    """The rows of arr_0 [N, H, W, 3] or [N, H, W, 1], uint8 [H, W, 3], streamed from the zip member."""
    with (explain(f"{path} is truncated or damaged", *BAD_NPZ),
          zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member):
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[np.lib.format.read_magic(member)[0]](member)
        if len(shape) != 4 or shape[3] not in (1, 3) or fortran or dtype.hasobject:
            raise UserError(f"arr_0 of {path} is {dtype} {shape}, and images [N, H, W, 3] are needed")
        n_bytes = math.prod(shape[1:]) * dtype.itemsize
        for i in range(shape[0]):
            data = member.read(n_bytes)
            if len(data) < n_bytes:
                raise UserError(f"{path} is truncated: {i} of its {shape[0]} images are there")
            image = _to_uint8(np.frombuffer(data, dtype).reshape(shape[1:]), path)
            yield np.broadcast_to(image, (*shape[1:3], 3))


def read_images(path, batch_size, size=None):
    """Yields uint8 tensors [B, 3, H, W] of a folder or an .npz; one batch is in memory at a time."""
    from drift_rae import center_crop                      # not at the top: drift_rae imports this module
    images, shape = (_folder_images if path.is_dir() else _npz_images)(path), None
    for batch in iter(lambda: list(itertools.islice(images, batch_size)), []):
        if size:
            batch = [np.asarray(center_crop(Image.fromarray(x), size)) for x in batch]
        for x in batch:
            shape = shape or x.shape
            if x.shape != shape:
                raise UserError(f"the images of {path} differ in size, {shape[1]}x{shape[0]} and "
                                f"{x.shape[1]}x{x.shape[0]}: pass --size N to crop and resize them")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def _file_statistics(path, args, notes):
    """dict(mu, sigma, n) of an .npz, n None where the file does not say; {} if they are of other features."""
    with explain(f"{path} is truncated or damaged", *BAD_NPZ), np.load(path) as file:
        made = str(file["made"]) if "made" in file else None
        if made is None and "arr_0" in file and args.features != "inception":
            return {}                                      # ADM's reference files hold Inception statistics
        found = dict(mu=file["mu"], sigma=file["sigma"], n=int(file["n"]) if "n" in file else None)
    if made is None:
        notes.append(f"{path} does not say of which features its statistics are: taken as {describe(args)}")
    elif made != describe(args):
        raise UserError(f"the statistics of {path} are of {made}, not of {describe(args)}")
    return found


def contents(path):
    """Whether an input offers (images, statistics); at least one of them."""
    if path.is_dir():
        return True, False
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder nor an .npz, or it is truncated")
    with explain(f"{path} is truncated or damaged", *BAD_NPZ), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    images, statistics = "arr_0.npy" in names, {"mu.npy", "sigma.npy"} <= set(names)
    if not images and not statistics:
        raise UserError(f"{path} holds neither images (arr_0) nor statistics (mu and sigma), but {names}")
    return images, statistics


def load_side(path, args, extractor, notes):
    """dict(mu, sigma, n, features, logits, images) of one input; what it cannot give is None."""
    side = dict(mu=None, n=None, features=None, logits=None, images=None)
    has_images, has_statistics = contents(path)
    if has_statistics:
        side |= _file_statistics(path, args, notes)
    if not has_images:
        return side
    outputs = []
    for images in tqdm(read_images(path, args.batch_size, args.size), desc=path.name, disable=None):
        with torch.inference_mode():
            outputs.append([out if out is None else out.cpu() for out in extractor()(images)])
    if sum(len(features) for features, _ in outputs) < 2:
        raise UserError(f"{path} holds fewer than two images, which have no covariance")
    side["images"] = f"{images.shape[3]}x{images.shape[2]}"
    side["features"] = torch.cat([features for features, _ in outputs])      # [n, D]
    if outputs[0][1] is not None:
        side["logits"] = torch.cat([logits for _, logits in outputs])        # [n, 1008]
    if side["mu"] is None:
        side["mu"], side["sigma"] = mean_and_covariance(side["features"])
        side["n"] = len(side["features"])
    else:
        notes.append(f"in {path}, the Fréchet distance takes the statistics, precision and recall take the "
                     f"{len(side['features']):,} images")
    return side


# ============================================= command

def describe(args):
    return {"inception": f"inception with the {args.resize} resize", "pixels": "raw pixels in [0, 1]",
            "dinov2": "dinov2 (ViT-L/14 class token)"}[args.features]


def caveats(args, samples, reference):
    """A sentence for each reason not to compare with published numbers, and for each missing number."""
    dim = len(samples["mu"])
    for name, side in (("samples", samples), ("reference", reference)):
        if side["n"] is not None and side["n"] <= dim:
            yield f"{side['n']:,} images ({name}) in {dim} dimensions: the covariance is singular"
    if samples["n"] is not None and samples["n"] < 50_000:
        yield f"{samples['n']:,} samples: the distance falls as N grows, and published ones are of 50,000"
    if None not in (samples["images"], reference["images"]) and samples["images"] != reference["images"]:
        yield f"the samples are {samples['images']}, the reference is {reference['images']}"
    if args.features == "dinov2" and dim != 1024:
        yield f"features of {dim} dimensions are not ViT-L/14's: this is not the published FD-DINOv2"
    if samples["features"] is None or reference["features"] is None:
        yield "precision and recall need images on both sides"
    elif min(len(samples["features"]), len(reference["features"])) <= 3:
        yield "precision and recall (k = 3) need at least 4 images on both sides"
    if args.features == "inception" and (samples["logits"] is None or len(samples["logits"]) < 10):
        yield "the Inception Score needs at least 10 sample images"


def evaluate(args):
    """Every metric that the two inputs allow, as the dict that --json writes."""
    extractor = cache(partial(load_extractor, args.features, args.resize, args.weights, args.device))
    notes = []
    contents(args.samples)                                 # fails now rather than after the reference's hour
    reference = load_side(args.reference, args, extractor, notes)
    if args.save_stats:
        if reference["features"] is None or reference["n"] is None:
            raise UserError("--save-stats is for reference images; this reference is statistics already")
        stats = dict(mu=reference["mu"], sigma=reference["sigma"], n=reference["n"], made=describe(args))
        write_atomically(args.save_stats, lambda f: np.savez(f, **stats))
    samples = load_side(args.samples, args, extractor, notes)
    with explain(f"no distance between {args.samples} (first) and {args.reference} (second)", UserError):
        fd = frechet_distance(samples["mu"], samples["sigma"], reference["mu"], reference["sigma"])
    result = dict(samples=str(args.samples), reference=str(args.reference), features=args.features,
                  resize=args.resize, n_samples=samples["n"], n_reference=reference["n"], frechet_distance=fd,
                  precision=None, recall=None, inception_score=None)
    real, fake, logits = reference["features"], samples["features"], samples["logits"]
    if real is not None and fake is not None and min(len(real), len(fake)) > 3:
        result["precision"], result["recall"] = precision_recall(real.to(args.device), fake.to(args.device))
    if logits is not None and len(logits) >= 10:
        order = np.random.RandomState(2020).permutation(len(logits))         # torch-fidelity's
        result["inception_score"], result["inception_score_std"] = inception_score(logits)
        result["inception_score_shuffled"] = inception_score(logits[order])[0]
    return result | {"warnings": notes + list(caveats(args, samples, reference))}


def print_table(args, result):
    name = {"inception": "FID", "dinov2": "FD-DINOv2", "pixels": "FD (pixels)"}[args.features]
    count = {key: "N not stated" if result[key] is None else f"N = {result[key]:,}"
             for key in ("n_samples", "n_reference")}
    rows = [("samples", f"{args.samples}, {count['n_samples']}"),
            ("reference", f"{args.reference}, {count['n_reference']}"), ("features", describe(args)),
            (name, f"{result['frechet_distance']:.4f}")]
    rows += [(key, f"{result[key]:.4f}") for key in ("precision", "recall") if result[key] is not None]
    if result["inception_score"] is not None:
        score, std, shuffled = (result["inception_score" + key] for key in ("", "_std", "_shuffled"))
        rows.append(("Inception Score", f"{score:.3f} ± {std:.3f} over 10 splits ({shuffled:.3f} shuffled)"))
    print("\n".join(f"{key:<16} {value}" for key, value in rows))
    for note in result["warnings"]:
        print(f"warning: {note}")


def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="generated images: folder or .npz")
    parser.add_argument("reference", type=Path, help="real images or their statistics: folder or .npz")
    parser.add_argument("--features", choices=["inception", "dinov2", "pixels"], default="inception")
    parser.add_argument("--resize", choices=["tf", "pytorch"],
                        help="of inception: tf as ADM and torch-fidelity (default), pytorch as pytorch-fid")
    parser.add_argument("--size", type=int, help="resize and crop the images to this many pixels, as ADM")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--weights", type=Path, help="file (default: torch's hub cache, then the network)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--save-stats", type=Path, help="write the reference's statistics to this .npz")
    args = parser.parse_args(argv)
    if args.resize and args.features != "inception":
        raise UserError("--resize belongs to --features inception; dinov2 has its own, pixels have none")
    if args.features == "inception":
        args.resize = args.resize or "tf"
    if args.batch_size < 1 or (args.size is not None and args.size < 1):
        raise UserError("--batch-size and --size must be at least 1")
    for path in (args.json, args.save_stats):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"the folder of {path} does not exist")
    with explain(f"--device {args.device} cannot be used", RuntimeError, AssertionError):
        torch.zeros(1, device=args.device)
    return args


@exit_code
def main(argv):
    args = parse_args(argv)
    result = evaluate(args)
    if args.json:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_atomically(args.json, lambda f: f.write(text.encode()))
    print_table(args, result)


if __name__ == "__main__":
    sys.exit(main())
