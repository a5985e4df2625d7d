"""Compare generated images with real images, by the numbers that papers quote.

    python eval_fid.py samples.npz VIRTUAL_imagenet256_labeled.npz    # FID, precision, recall, IS
    python eval_fid.py generated/ real/ --features dinov2             # FD-DINOv2, precision, recall
    python eval_fid.py generated/ real/ --features pixels             # needs no network weights

The first input holds the generated images (the samples). The second input holds real images (the
reference). A network turns each image into a vector of D numbers, the features of the image. All
results are computed from these features:

FID        The Fréchet Inception Distance. The features come from Inception, a network that
           classifies photographs. One Gaussian is fitted to the features of the samples, and one to
           those of the reference. FID is the Fréchet distance of these Gaussians. Lower is better.
FD-DINOv2  The same distance, but of features of DINOv2, a network that was trained without labels.
precision  The share of the samples that lie among the reference images. It is low where samples
           look unrealistic.
recall     The share of the reference images that lie among the samples. It is low where the samples
           miss a part of the reference.
IS         The Inception Score of the samples. It is high where Inception recognises a class in each
           sample, and finds all classes equally often.

An input is a folder of images or an .npz file, which is NumPy's archive of named arrays. The array
arr_0 holds N images of HxW pixels, uint8 [N, H, W, 3]. The arrays mu [D] and sigma [D, D] hold the
mean and the covariance of Inception features. Most papers take their reference file from ADM
(Dhariwal and Nichol 2021, github.com/openai/guided-diffusion). ADM's file holds mu and sigma of all
real images, and in arr_0 only some of these images. FID then uses mu and sigma, while precision and
recall use arr_0.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import inception
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor
from tqdm import tqdm

WEIGHTS = {
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}


class UserError(Exception):
    """Something that the user can mend. The command prints its sentence without a traceback."""


# ---- Fréchet distance (Heusel et al. 2017, Eq. 6)
#
# Two Gaussians with means μ1, μ2 and covariances Σ1, Σ2 have the distance
#
#     |μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½
#
# We write each covariance Σ [D, D] as R Rᵀ, and call R [D, r] the root of Σ. Then the nonzero
# eigenvalues of Σ1 Σ2 are the squared singular values of R1ᵀ R2 [r1, r2], and the last trace is the
# sum of these singular values. To compute (Σ1 Σ2)^½ itself would be less exact. With fewer images
# than dimensions most eigenvalues are zero, and a square root magnifies their rounding errors.

def checked_statistics(mu, sigma):
    """Turns mu [D] and sigma [D, D] from NumPy or torch into float64 tensors."""
    mu = torch.as_tensor(mu, dtype=torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = f"mu {list(mu.shape)} and sigma {list(sigma.shape)}"
        raise ValueError(f"{shapes} do not fit together: [D] and [D, D] are needed")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("mu or sigma holds NaN or infinite values")
    return mu, sigma


def covariance_root(sigma):
    """Returns R [D, r] with R Rᵀ = Σ, where r is the numerical rank of the covariance Σ."""
    values, vectors = torch.linalg.eigh(sigma)    # eigenvalues in ascending order
    # A covariance has no negative eigenvalue. But where it was stored in float32, rounding turns
    # zeros into values down to about -1e-7 times the largest eigenvalue.
    if values[0] < -1e-5 * abs(values[-1]):
        lowest = f"{values[0]:.3g}"
        raise ValueError(f"sigma is no covariance: it has negative eigenvalues, down to {lowest}")
    kept = values > len(sigma) * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def distance_from_roots(mu1, root1, mu2, root2):
    """The Fréchet distance of two Gaussians, given mu [D] and a root [D, r] of each covariance."""
    mean_term = (mu1 - mu2).square().sum()
    traces = root1.square().sum() + root2.square().sum()    # tr R Rᵀ sums the squares in R
    trace_of_product_root = torch.linalg.svdvals(root1.T @ root2).sum()
    distance = mean_term + traces - 2 * trace_of_product_root
    return max(distance.item(), 0.0)    # rounding may leave -1e-13 for equal arguments


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Fréchet distance of two Gaussians, given mu [D] and sigma [D, D] from NumPy or torch."""
    mu1, sigma1 = checked_statistics(mu1, sigma1)
    mu2, sigma2 = checked_statistics(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"the Gaussians have different dimensions, {len(mu1)} and {len(mu2)}")
    return distance_from_roots(mu1, covariance_root(sigma1), mu2, covariance_root(sigma2))


def mean_and_covariance(features):
    """The mean [D] and the unbiased covariance [D, D] of features [n, D], as float64 arrays.

    The features are converted to float64 in blocks, so that a million of them fit into memory.
    """
    blocks = torch.as_tensor(features).split(2048)
    mu = sum(block.double().sum(0) for block in blocks) / len(features)
    scatter = 0
    for block in blocks:
        centred = block - mu    # float64, as mu is
        scatter += centred.T @ centred
    sigma = scatter / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def mean_and_root(features):
    """The mean [D] of features [n, D] and a root of their covariance, as float64 tensors."""
    n, dim = features.shape
    if n > dim:
        mu, sigma = checked_statistics(*mean_and_covariance(features))
        return mu, covariance_root(sigma)
    # Here there are no more images than dimensions. The covariance is Σ = Xᵀ X / (n − 1), where X
    # [n, D] are the centred features. So Xᵀ / √(n − 1) is a root of Σ already. To find a root from
    # Σ [D, D] would take minutes for raw pixels.
    mu = features.double().mean(0)
    centred = features.double() - mu
    return mu, centred.T / math.sqrt(n - 1)


# ---- precision and recall (Kynkäänniemi et al. 2019, Eq. 1-2)
#
# Each real image is the centre of a ball in feature space. The ball ends at the k-th nearest other
# real image. Precision is the share of the generated images that lie inside at least one ball.
# Recall exchanges the roles: the generated images are the centres, and the real images are counted.

def squared_distances(points, centres):
    """Yields the squared distances of float64 points [n, D] to centres [m, D] in blocks [256, m].

    The formula |a|² + |b|² − 2ab is fast, but where a equals b it gives a rounding error instead of
    zero. This matters for duplicated images, whose balls have radius zero: the error would put a
    point outside such a ball even if the point equals the centre. So a distance that may be nothing
    but a rounding error is set to zero.
    """
    # A sum of D products has an error of at most D · eps / 2 times |a|² + |b|². There are such sums
    # before and after the minus sign, which gives D · eps. The factor 2 covers the few operations
    # that remain.
    rounding = 2 * points.shape[1] * torch.finfo(torch.float64).eps
    centre_norms = centres.square().sum(1)
    for block in points.split(256):
        norms = block.square().sum(1, keepdim=True) + centre_norms
        distances = norms - 2 * (block @ centres.T)
        yield distances.where(distances > rounding * norms, 0)


def share_inside(points, centres, k):
    """The share of the points that lie in the ball of at least one centre."""
    radii = []
    for block in squared_distances(centres, centres):
        nearest = block.topk(k + 1, largest=False).values    # ascending; first the centre itself
        radii.append(nearest[:, k])
    radii = torch.cat(radii)
    inside = [(block <= radii).any(1) for block in squared_distances(points, centres)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real, fake, k=3):
    """Returns (precision, recall) of features real [n, D] and fake [m, D] from NumPy or torch."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    return share_inside(fake, real, k), share_inside(real, fake, k)


# ---- Inception Score (Salimans et al. 2016)

def inception_score(logits, splits=10):
    """Returns the mean and the standard deviation of the score over parts of the images.

    The parts are consecutive. The score of a part is exp E_x KL(p(y|x) ‖ p(y)). The logits [n, K]
    give the probability p(y|x) of each of the K classes y for each image x. The marginal p(y) is
    the mean of p(y|x) over the images of the part. The images must not be sorted by class.
    Otherwise each part contains few classes, and the score is far too low.
    """
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
    """Resizes x [B, C, H, W] to size x size pixels as TensorFlow 1 did, with linear interpolation.

    TensorFlow 1 reads new pixel i at i · (old size) / (new size). Newer libraries align the centres
    of the pixels instead, which changes FID.
    """
    for _ in ("height", "width"):
        x = x.mT    # transposed, so that the side to be resized is the last one
        length = x.shape[3]
        source = torch.arange(size, device=x.device) * (length / size)
        low = source.long()
        high = (low + 1).clamp(max=length - 1)
        a, b = x[..., low], x[..., high]
        x = a + (b - a) * (source - low)
    return x


# The original network's averages do not count the padding. Those of torchvision's blocks do.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class FIDInceptionA(inception.InceptionA):
    """torchvision's block, with the original average."""

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], 1)


class FIDInceptionC(inception.InceptionC):
    """torchvision's block, with the original average."""

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], 1)


class FIDInceptionE(inception.InceptionE):
    """torchvision's block, with the original average or, in the last block, a maximum."""

    def forward(self, x, pool=average_pool):
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        branch_pool = self.branch_pool(pool(x))
        return torch.cat([branch1x1, *branch3x3, *branch3x3dbl, branch_pool], 1)


class FIDInception(inception.Inception3):
    """The Inception network that FID is defined with (TensorFlow, 2015-12-05).

    Its parameters have the names of torchvision's Inception. The two networks differ only in their
    3x3 pooling (see mseitzer/pytorch-fid, inception.py).
    """

    def __init__(self):
        blocks = [inception.BasicConv2d, FIDInceptionA, inception.InceptionB, FIDInceptionC,
                  inception.InceptionD, FIDInceptionE, inception.InceptionAux]
        super().__init__(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.eval().requires_grad_(False)

    def forward(self, images, resize="tf"):
        """uint8 images [B, 3, H, W] -> features [B, 2048], logits [B, 1008].

        The last layer is used without its bias, as in ADM's Inception Score.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images must be uint8, not {images.dtype}")
        x = images.to(self.fc.weight.device).float()
        if resize == "tf":      # as ADM and torch-fidelity do
            x = (tf1_resize(x) - 128) / 128
        else:                   # as pytorch-fid does
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
        stem = [self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, self.maxpool1,
                self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, self.maxpool2]
        mixed = [self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b,
                 self.Mixed_6c, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b]
        for block in stem + mixed:
            x = block(x)
        x = self.Mixed_7c(x, pool=max_pool)    # [B, 2048, 8, 8]; the only block with a maximum
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


class DINOv2(torch.nn.Module):
    """DINOv2 ViT-L/14 without registers, whose class token FD-DINOv2 takes (Stein et al. 2023).

    The argument state is the dictionary of weights that DINOv2's authors released.
    """

    def __init__(self, state, dim=1024, depth=24, num_heads=16):
        super().__init__()
        from drift_rae import ViT
        # The released position embeddings are a grid of 37x37, but images of 224 pixels need 16x16.
        # DINOv2's own code interpolates them without antialiasing, if the network has no registers.
        # Its factor is 16.1 / 37 rather than 16 / 37, so that rounding cannot give a grid of 15x15.
        class_position, positions = state["pos_embed"].tensor_split([1], 1)
        grid = math.isqrt(positions.shape[1])
        positions = positions.mT.unflatten(2, (grid, grid))    # [1, D, 37, 37]
        positions = F.interpolate(positions, scale_factor=16.1 / grid, mode="bicubic")
        positions = positions.flatten(2).mT                    # [1, 16·16, D]
        # The released file has no register_tokens, while our ViT expects an empty tensor. A file of
        # a network with registers keeps its own tensor here, and is then refused for its shape.
        state = {"register_tokens": torch.zeros(1, 0, dim), **state}
        state["pos_embed"] = torch.cat([class_position, positions], 1)
        self.vit = ViT(224, 14, dim, depth, num_heads, num_registers=0)
        self.vit.load_state_dict(state)
        self.eval().requires_grad_(False)

    def forward(self, images):
        """uint8 images [B, 3, H, W] -> features [B, D] and, in place of logits, None."""
        resized = [to_pil_image(image).resize((224, 224), Image.BICUBIC) for image in images]
        x = torch.stack([to_tensor(image) for image in resized])
        x = x.to(self.vit.pos_embed.device)
        x = normalize(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return self.vit.norm(self.vit.features(x)[:, 0]), None


def pixels(images):
    """uint8 images [B, 3, H, W] -> features [B, 3·H·W] and, in place of logits, None."""
    if images[0].numel() > 3 * 64 * 64:
        raise UserError("--features pixels needs small images; pass --size 64 or less")
    return images.flatten(1) / 255, None


# ---- the user's files: weights
#
# Damaged and foreign files make torch, zipfile, NumPy and Pillow raise a dozen kinds of errors, and
# few of these errors name the file. So each kind of file is read in one place. The try statement in
# that place holds little more than a library's calls, and whatever they raise becomes a UserError.

def foreign_format(path):
    """Says what a file is, if it is of a kind that people often have in place of the right file."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git-LFS pointer, and 'git lfs pull' fetches the file itself"
    if b"<html" in start.lower() or b"<!doctype html" in start.lower():
        return "it is an HTML page, perhaps from a download that failed"
    if start[8:10] == b'{"':    # the format begins with 8 bytes for a length, and then JSON
        return "it is a .safetensors file"
    return None


def cause(error):
    """The text of an error in one line. A long text is cut, since some texts fill pages."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 200)


def cannot_read(path, reason, way_out):
    """Returns the UserError for a file that could not be read."""
    return UserError(f"cannot read {path}: {foreign_format(path) or reason}; {way_out}")


def read_weights(path, url):
    """Reads a dictionary of weights. The file should be the one that the URL offers."""
    way_out = f"replace it by {url}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise cannot_read(path, cause(error), "pass another path") from error
    except Exception as error:
        # We do not show torch's own text, because it advises to switch weights_only off. A file
        # that is loaded without weights_only can run any code.
        foreign_class = re.search(r"GLOBAL (\S+)", str(error))
        if foreign_class:
            reason = f"it holds a {foreign_class[1]}, but only tensors are safe to load"
        elif "TorchScript" in str(error):
            reason = "it is a TorchScript program rather than a dictionary of weights"
        else:
            reason = "it is damaged, or it is no checkpoint of PyTorch"
        raise cannot_read(path, reason, way_out) from error
    if not isinstance(state, dict):
        reason = f"it holds a {type(state).__name__} rather than a dictionary of weights"
        raise cannot_read(path, reason, way_out)
    return state


def download(url):
    """Downloads the file of the URL, unless it is in torch's cache, and returns its path there."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
        except Exception as error:    # no network, a server's refusal, a full disk
            reason = f"cannot download {url} to {file}: {cause(error)}"
            raise UserError(f"{reason}; download it in another way, and pass --weights") from error
    return file


def load_network(args):
    """Returns a function: uint8 images [B, 3, H, W] -> (features [B, D], logits or None)."""
    if args.features == "pixels":
        return pixels
    torch.backends.cudnn.allow_tf32 = False    # keep full float32 precision: TF32 has 10 bits
    url = WEIGHTS[args.features]
    path = args.weights or download(url)
    state = read_weights(path, url)
    try:
        if args.features == "dinov2":
            network = DINOv2(state)
        else:
            network = FIDInception()
            network.load_state_dict(state)
    except (KeyError, RuntimeError) as error:    # a name is missing, or a shape is wrong
        reason = f"{type(error).__name__}: {cause(error)}"
        way_out = f"replace it by {url}"
        raise UserError(f"{path} does not fit {args.features} ({reason}); {way_out}") from error
    network.to(args.device)
    if args.features == "dinov2":
        return network
    return partial(network, resize=args.resize)


# ---- the user's files: images and statistics

def center_crop(image, size):
    """Resizes the shorter side to size pixels and cuts out the middle square, as ADM does.

    Before that, the image is halved as long as its shorter side is at least twice too long.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def list_images(folder):
    """Returns (images, others), the files below a folder, each list sorted by path.

    An image is a file whose suffix torchvision counts among those of images, as in drift_rae.py.
    Hidden files and folders, such as .DS_Store or .ipynb_checkpoints, are in neither list.
    """
    def refuse(error):    # without this, os.walk silently skips a folder that it may not open
        raise cannot_read(error.filename, cause(error), "give yourself access to this folder")

    images, others = [], []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]    # walk only these
        for name in names:
            file = Path(parent, name)
            if name.startswith("."):
                continue
            if file.suffix.lower() in IMG_EXTENSIONS:
                images.append(file)
            else:
                others.append(file)
    return sorted(images), sorted(others)


def read_image(file):
    """Reads one image as uint8 [H, W, 3]. The EXIF orientation is ignored, as ADM does."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":    # 16 or 32 bits or floats, which convert() would clip
                raise ValueError(f"it has more than 8 bits per channel (mode {image.mode})")
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        way_out = "replace it by an image with 8 bits per channel, or remove it"
        raise cannot_read(file, cause(error), way_out) from error


NEW_NPZ = "check the path, or make the .npz file anew"


def array_names(path):
    """The names of the arrays in an .npz file. A folder counts as a file that holds arr_0."""
    if path.is_dir():
        return ["arr_0"]
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except Exception as error:
        raise cannot_read(path, cause(error), NEW_NPZ) from error
    names = [name.removesuffix(".npy") for name in members]
    if "arr_0" not in names and "mu" not in names:
        reason = "it holds neither images (arr_0) nor statistics (mu and sigma)"
        raise cannot_read(path, reason, NEW_NPZ)
    return names


def npz_images(path):
    """Yields the images of arr_0, uint8 [H, W, 3], one by one, since all may need 10 GB."""
    try:    # an error in the loop that consumes this generator does not arrive here
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                order = "Fortran" if fortran else "C"
                found = f"arr_0 is {dtype} {list(shape)} in {order} order"
                raise ValueError(f"{found}, but must be uint8 [N, H, W, 3] in C order")
            for _ in range(shape[0]):
                row = member.read(math.prod(shape[1:]))
                yield np.frombuffer(row, np.uint8).reshape(shape[1:])
    except Exception as error:
        raise cannot_read(path, cause(error), NEW_NPZ) from error


def read_statistics(path):
    """Reads mu and sigma of an .npz file. Returns mu [D] and the root of sigma, in float64."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu = file["mu"].astype(np.float64, casting="same_kind")
            sigma = file["sigma"].astype(np.float64, casting="same_kind")
    except Exception as error:
        raise cannot_read(path, cause(error), NEW_NPZ) from error
    try:
        mu, sigma = checked_statistics(mu, sigma)
        return mu, covariance_root(sigma)
    except ValueError as error:
        raise cannot_read(path, cause(error), NEW_NPZ) from error


def channels_first(images):
    """Stacks a list of B images [H, W, 3] into one tensor [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def read_images(path, batch_size, size=None):
    """Yields the images of a folder or an .npz file as uint8 tensors [B, 3, H, W].

    If size is given, each image is first resized and cropped to size x size pixels. Only one batch
    is in memory at a time.
    """
    if path.is_dir():
        files, _ = list_images(path)
        images = map(read_image, files)
    else:
        images = npz_images(path)
    shape, batch = None, []
    for image in images:
        if size:
            image = np.asarray(center_crop(Image.fromarray(image), size))
        shape = shape or image.shape
        if image.shape != shape:
            raise UserError(f"the images of {path} differ in size; pass --size N to crop them")
        batch.append(image)
        if len(batch) == batch_size:
            yield channels_first(batch)
            batch = []
    if batch:
        yield channels_first(batch)


# ---- command

@dataclass
class Summary:
    """What is computed from one of the two inputs. None means that the input does not allow it."""

    mu: torch.Tensor = None         # mean of the features, [D]
    root: torch.Tensor = None       # root of their covariance, [D, r]
    n: int = None                   # number of images that mu and root were computed from
    features: torch.Tensor = None   # [n, D]
    logits: torch.Tensor = None     # [n, 1008]
    size: str = None                # width and height of the images


@torch.inference_mode()
def add_features(summary, path, args, network):
    """Computes the features of all images, and sets features, logits and size of the summary."""
    features, logits = [], []
    batches = read_images(path, args.batch_size, args.size)
    for batch in tqdm(batches, desc=path.name, disable=None):    # None hides the bar in a log file
        batch_features, batch_logits = network(batch)
        features.append(batch_features.cpu())
        if batch_logits is not None:
            logits.append(batch_logits.cpu())
    n = sum(len(block) for block in features)
    if n < 10:    # the Inception Score needs an image for each of its ten parts
        suffixes = ", ".join(IMG_EXTENSIONS)
        reason = f"{path} holds {n} images, but at least 10 are needed"
        raise UserError(f"{reason}; the image files in a folder must end in {suffixes}")
    summary.features = torch.cat(features)
    if not summary.features.isfinite().all():
        reason = f"the features of {path} contain NaN or infinite values"
        raise UserError(f"{reason}; check that --weights is the right file")
    if logits:
        summary.logits = torch.cat(logits)
    summary.size = f"{batch.shape[3]}x{batch.shape[2]}"


def summarise(path, args, network, warnings):
    """Returns the Summary of one input. Appends to warnings what the user should know about it."""
    summary = Summary()
    names = array_names(path)
    has_images = "arr_0" in names
    use_statistics = "mu" in names and args.features == "inception"
    if not has_images and not use_statistics:
        reason = f"{path} holds only statistics of Inception features"
        raise UserError(f"{reason}; --features {args.features} needs images")
    if use_statistics and args.size:
        if has_images:
            use_statistics = False    # they describe the images before --size resized them
            warnings.append(f"mu and sigma were computed anew from the images in {path}, because "
                            "--size resizes the images")
        else:
            warnings.append(f"--size has no effect on {path}, which holds mu and sigma but no "
                            "images")
    if use_statistics:
        summary.mu, summary.root = read_statistics(path)
    if path.is_dir():
        _, others = list_images(path)
        if others:
            first = others[0].relative_to(path)
            warnings.append(f"{len(others):,} files in {path} are not images and were skipped; "
                            f"the first is {first}")
    if has_images:
        add_features(summary, path, args, network)
    if not use_statistics:
        summary.mu, summary.root = mean_and_root(summary.features)
        summary.n = len(summary.features)
    return summary


def caveats(samples, reference):
    """Yields a sentence for each reason not to compare the numbers with published ones."""
    for name, summary in (("samples", samples), ("reference images", reference)):
        if summary.n is not None and summary.n <= len(summary.mu):
            yield (f"{summary.n:,} {name} are too few for features of {len(summary.mu):,} "
                   "dimensions: their covariance is singular")
    if samples.n is not None and samples.n < 50_000:
        yield (f"there are {samples.n:,} samples, while papers take 50,000; the distance falls as "
               "the number grows")
    if samples.size and reference.size and samples.size != reference.size:
        yield (f"the samples have {samples.size} pixels, but the reference images have "
               f"{reference.size}")


def evaluate(args):
    """Computes all numbers that the two inputs allow. Returns the dictionary that --json writes."""
    network, warnings = None, []
    if "arr_0" in array_names(args.samples) + array_names(args.reference):
        network = load_network(args)    # mu and sigma alone need no network
    reference = summarise(args.reference, args, network, warnings)
    samples = summarise(args.samples, args, network, warnings)
    if len(samples.mu) != len(reference.mu):
        first = f"the features of {args.samples} have {len(samples.mu)} dimensions"
        second = f"those of {args.reference} have {len(reference.mu)}"
        advice = "compare features of one network, or pixels of one size (--size N)"
        raise UserError(f"{first} and {second}; {advice}")
    result = {"samples": str(args.samples), "reference": str(args.reference)}
    result |= {"features": args.features, "resize": args.resize}
    result |= {"n_samples": samples.n, "n_reference": reference.n}
    result["frechet_distance"] = distance_from_roots(samples.mu, samples.root,
                                                     reference.mu, reference.root)
    precision = recall = score = score_std = shuffled_score = None
    if samples.features is not None and reference.features is not None:
        real = reference.features.to(args.device)
        fake = samples.features.to(args.device)
        precision, recall = precision_recall(real, fake)
    if samples.logits is not None:
        score, score_std = inception_score(samples.logits)
        # torch-fidelity shuffles the images with this seed before it splits them
        order = np.random.RandomState(2020).permutation(len(samples.logits))
        shuffled_score, _ = inception_score(samples.logits[order])
    result |= {"precision": precision, "recall": recall}
    result |= {"inception_score": score, "inception_score_std": score_std}
    result["inception_score_shuffled"] = shuffled_score
    result["warnings"] = warnings + list(caveats(samples, reference))
    return result


def is_out_of_memory(error):
    """Whether memory ran out. On a CPU, torch raises a plain RuntimeError in this case."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)


def temporary_name(file):
    return file.with_name(f".{file.name}.tmp")


def check_json(file):
    """Checks that --json can be written, before the work, which may take an hour."""
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"cannot write {file}: it is no ordinary file; pass another --json")
        temporary_name(file).touch()
        temporary_name(file).unlink()
    except OSError as error:
        reason = f"cannot write {file}: {cause(error)}"
        raise UserError(f"{reason}; pass --json with another folder or name") from error


def write_json(file, result):
    """Writes a temporary file and renames it, so that a crash never leaves half a file."""
    temporary = temporary_name(file)
    try:
        with temporary.open("w") as stream:
            json.dump(result, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())    # put the data on the disk before replacing the old file
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(file.parent).free / 1e6
        reason = f"cannot write {file}: {cause(error)}, and {free:,.1f} MB are free"
        raise UserError(f"{reason}; copy the numbers from the screen") from error


def print_result(result):
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        if value is not None and key != "warnings":
            print(f"{key:<24} {value}")
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")


def parse_args(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flag = parser.add_argument
    flag("samples", type=Path, help="the generated images, a folder or an .npz file")
    flag("reference", type=Path, help="the real images or their statistics, a folder or .npz file")
    flag("--features", choices=["inception", "dinov2", "pixels"], default="inception",
         help="compute the numbers from features of this network (default inception) or from raw "
              "pixels")
    flag("--resize", choices=["tf", "pytorch"], default="tf",
         help="resize images to Inception's 299x299 pixels as ADM does (tf, the default) or as "
              "pytorch-fid does (pytorch)")
    flag("--size", type=int, metavar="N",
         help="first resize and crop each image to NxN pixels, as ADM does; mu and sigma are then "
              "computed from the images")
    flag("--batch-size", type=int, default=64, metavar="N",
         help="pass this many images through the network at a time (default 64); a smaller number "
              "needs less memory")
    flag("--weights", type=Path, metavar="FILE",
         help="take the network's weights from this file (default: the file in torch's cache, "
              "which is downloaded if it is missing)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    flag("--device", choices=devices, default=devices[0],
         help=f"run the network on this device (default on this machine: {devices[0]})")
    flag("--json", type=Path, metavar="FILE",
         help="also write the numbers to this file, with null for each number that the inputs do "
              "not allow")
    args = parser.parse_args(argv)
    if args.features != "inception":
        args.resize = None
    if args.batch_size < 1 or (args.size is not None and args.size < 1):
        parser.error("--batch-size and --size must be greater than 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.json:
        check_json(args.json)
    try:
        result = evaluate(args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"pass a smaller --batch-size than {args.batch_size}"
        if args.features == "pixels":
            advice += " or a smaller --size"
        raise UserError(f"there is too little memory; {advice}") from error
    try:
        if args.json:
            write_json(args.json, result)
    finally:    # print the numbers even where the disk is full
        print_result(result)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):    # the streams of a notebook lack this method
            stream.reconfigure(errors="replace")    # print "?" where a terminal lacks a letter
    try:
        main()
    except UserError as error:
        sys.exit(f"eval_fid.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_fid.py: interrupted")
