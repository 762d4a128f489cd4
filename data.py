"""The images that the experiments train on, as uint8 tensors [n, C, H, W]. docs/data.md is the page for users.

    ROOT/MNIST/raw, ROOT/FashionMNIST/raw    train-images-idx3-ubyte[.gz] and its three sisters; padded with zeros to 32x32
    ROOT/celeba/img_align_celeba[.zip]       NNNNNN.jpg as released; ROOT may also be that folder or zip
    folder:PATH                              any images, PATH a folder or a zip
    glyphs                                   digits drawn here from matplotlib's fonts; needs no file and no network

DATA_SETS has one entry for each name. Pictures are converted once, to an array that is kept beside the data, or in $VSM_CACHE if
that is set, or in ./cache if the data are read-only. torchvision is imported where it is used, so that --help is fast.
"""

import contextlib
import gzip
import io
import math
import os
import re
import socket
import struct
import sys
import tempfile
import zlib
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from vsm.cache import cache_folder, cached, digest
from vsm.cli import UserError
from vsm.pictures import EXTENSIONS, Pictures
from vsm.runs import write_atomic

# Name: a function that maps the data root (a Path) to ImageData, of arrays or CPU tensors. All else follows from what it returns.
DATA_SETS = {
    "mnist": lambda root: load_idx("mnist", "MNIST", root),
    "fashion": lambda root: load_idx("fashion", "FashionMNIST", root),
    "celeba": lambda root: load_celeba(root),
    "glyphs": lambda root: load_glyphs(),
}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CELEBA_TRAIN, CELEBA_TEST = range(1, 162771), range(182638, 202600)  # by file number; between them lies the validation set
MAX_IDX_BYTES = 2**30  # a small .gz file can expand to more than the memory holds
FONTS = [
    *(f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"]
FEWEST_PICTURES = 11  # the fewest of which two are test pictures, as MMD and FID need


class ImageData(NamedTuple):
    """Train and test images, uint8 [n, C, H, W] in 0..255; labels int64 [n] or None; how they were made, as plain JSON."""
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None
    test_labels: torch.Tensor | None
    recipe: dict


def data_names():
    """The choices of --data, for its help: "mnist | fashion | ... | folder:PATH"."""
    return " | ".join([*DATA_SETS, "folder:PATH"])


def data_name(text):
    """The type of --data: the name, with the path of folder:PATH made absolute, so that one folder has one name everywhere."""
    path = text.removeprefix("folder:")
    return f"folder:{os.path.abspath(os.path.expanduser(path))}" if path and path != text else text


def moved_folder(text):
    """The type of --data of scripts that read runs, where it says to which folder the pictures of the runs have moved."""
    if not (name := data_name(text)).startswith("folder:"):
        raise ArgumentTypeError(f"{text} is not folder:PATH; for other data than folders of pictures there is --data-root")
    return name


def load_images(name, root="data", limit=0, test_limit=0):
    """The ImageData of the data set `name`, a key of DATA_SETS or folder:PATH.

    It keeps the first `limit` training images and the first `test_limit` test images of the official order; 0 keeps all. The
    recipe gets `counts`, the numbers kept, and `digest`, which tells these pixels, before any limit, from all others.
    Raises UserError for an unknown name, for missing data (with the layout that is wanted) and for damaged data (with the file).
    """
    folder = name.removeprefix("folder:") if name.startswith("folder:") else ""
    if not folder and name not in DATA_SETS:
        raise UserError(f"unknown data {name!r}; choose one of {data_names()}")
    try:
        data = load_folder(Path(os.path.expanduser(folder))) if folder else DATA_SETS[name](Path(os.path.expanduser(root)))
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read ({error.strerror or error})") from error
    require_images(name, data.train, data.train_labels, "training")
    require_images(name, data.test, data.test_labels, "test")
    train, train_labels = first_rows(limit, data.train), first_rows(limit, data.train_labels)
    test, test_labels = first_rows(test_limit, data.test), first_rows(test_limit, data.test_labels)
    recipe = {"size": list(train.shape[1:]), **data.recipe, "counts": {"train": len(train), "test": len(test)}}
    if "digest" not in recipe:
        recipe["digest"] = digest(data.train, data.test)
    return ImageData(train, test, train_labels, test_labels, recipe)


def noisy(images, noise, generator=None):
    """Images uint8 [n, C, H, W] as the networks see them, in [0, 1] with Gaussian noise of sd `noise`.

    Returns these, the same without noise, and the noise before scaling: float32 [n, C, H, W] each.
    """
    clean = images.float() / 255
    standard = torch.randn(clean.shape, generator=generator, device=clean.device)
    return clean + noise * standard, clean, standard


def first_rows(count, array):
    """The first `count` rows (0: all) of an array as a tensor with memory of its own. None stays None."""
    if array is None:
        return None
    return torch.from_numpy(np.array(np.asarray(array[:count] if count else array)))


def require_images(name, images, labels, part):
    """Raises UserError where a loader's arrays are not what ImageData promises."""
    if "uint8" not in str(images.dtype) or images.ndim != 4:
        raise UserError(f"the {part} images of {name} are {images.dtype} {list(images.shape)}; they must be uint8 [n, C, H, W]")
    if len(images) == 0:
        raise UserError(f"{name} has no {part} images")
    if labels is not None and ("int64" not in str(labels.dtype) or labels.shape != images.shape[:1]):
        raise UserError(f"the {part} labels of {name} are {labels.dtype} {list(labels.shape)}, not int64 [{len(images)}]")


def load_idx(name, dataset, root):
    """A data set in MNIST's format from root/dataset/raw, downloaded by torchvision's class `dataset` where files are missing."""
    folder = root / dataset / "raw"
    if not all(path.exists() for path in idx_paths(folder)):
        download(dataset, folder)
    paths = idx_paths(folder)
    train, train_labels, test, test_labels = [read_idx(path) for path in paths]
    for images, labels, path in ((train, train_labels, paths[0]), (test, test_labels, paths[2])):
        if images.shape != (*labels.shape, 28, 28):
            raise UserError(f"{path} holds images {images.shape}; its file of labels wants {(*labels.shape, 28, 28)}")
    recipe = {"name": name, "source": "idx", "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "official"}
    train, test = (np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None] for images in (train, test))
    return ImageData(train, test, train_labels.astype(np.int64), test_labels.astype(np.int64), recipe)


def idx_paths(folder):
    """The paths of the four IDX_FILES in a folder, each plain or, where that is missing, with .gz."""
    return [folder / file if (folder / file).exists() else folder / f"{file}.gz" for file in IDX_FILES]


def read_idx(path):
    """A uint8 idx file, plain or .gz, as an array. Raises UserError for a damaged one.

    It decompresses one byte more than the header announces, to see whether the file ends there.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; take it away to download it again, or copy it anew")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            zeros, kind, ndim = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or kind != 8:
                raise ValueError("its first three bytes are not 0, 0, 8, as in an idx file of bytes")
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            size = math.prod(shape)
            if size > MAX_IDX_BYTES:
                raise ValueError(f"its header announces {size:,} bytes, more than {MAX_IDX_BYTES:,}")
            content = file.read(size + 1)
            if len(content) != size:
                raise ValueError(f"it holds {'more' if len(content) > size else 'fewer'} than the {size:,} bytes of its header")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to download it again, or copy it anew") from error
    return np.frombuffer(content, np.uint8).reshape(shape)


def download(dataset, folder):
    """Fetch the idx files that `folder` lacks through torchvision, without its output. Raises UserError where that fails."""
    from torchvision import datasets
    print(f"downloading {dataset} to {folder}", file=sys.stderr)
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
            fetched = Path(getattr(datasets, dataset)(temporary, download=True).raw_folder)
            folder.mkdir(parents=True, exist_ok=True)
            for file, path in zip(IDX_FILES, idx_paths(folder)):
                if not path.exists():
                    write_atomic(folder / file, (fetched / file).read_bytes())
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise UserError(f"{folder} lacks files and {dataset} cannot be downloaded ({last_line}); "
                        f"put {', '.join(IDX_FILES)} there, plain or .gz, or name another folder with --data-root") from error
    finally:
        socket.setdefaulttimeout(usual_timeout)


def load_celeba(root):
    """CelebA with its official training and test sets, from one of the places that the module's docstring names."""
    places = [root / top / name for top in ("celeba", "") for name in ("img_align_celeba", "img_align_celeba.zip")]
    if root.is_file() or next(root.glob("[0-9]" * 6 + ".*"), None):
        places.append(root)
    for place in filter(Path.exists, places):
        pictures = Pictures(place)
        by_number = {int(Path(name).stem): name for name in pictures.names if re.fullmatch(r"\d{6}", Path(name).stem)}
        train = [name for number, name in sorted(by_number.items()) if number in CELEBA_TRAIN]
        test = [name for number, name in sorted(by_number.items()) if number in CELEBA_TEST]
        if train and test:
            return converted(pictures, "celeba", train, test, 64, "official, by file number: train 1-162770, test 182638-202599")
    raise UserError(f"no CelebA in {root}: put its pictures (of the training set, 1-162770, and the test set, 182638-202599) at "
                    f"{root}/celeba/img_align_celeba/NNNNNN.jpg or, zipped, at {root}/celeba/img_align_celeba.zip, "
                    "or name that folder or zip with --data-root")


def load_folder(path):
    """The pictures of a folder or zip; every tenth is a test image. They become 64x64, or 32x32 if the first is smaller."""
    pictures = Pictures(path)
    if (count := len(pictures.names)) < FEWEST_PICTURES:
        raise UserError(f"{path} holds {count} pictures ({' '.join(EXTENSIONS)}); {FEWEST_PICTURES} or more are wanted, "
                        "because every tenth is a test picture and a run needs two of these")
    test = pictures.names[::10]
    train = [name for i, name in enumerate(pictures.names) if i % 10]
    size = 64
    with contextlib.suppress(UserError):  # the conversion names all pictures that cannot be read
        size = 64 if min(pictures.open(test[0]).size) >= 64 else 32
    return converted(pictures, "folder", train, test, size, "every 10th of the sorted paths, from the first, is a test image")


def converted(pictures, name, train, test, size, split):
    """ImageData of the pictures with these paths, which become squares of `size` pixels."""
    recipe = {"name": name, "source": pictures.source.name, "size": [3, size, size], "split": split, "pad": 0,
              "crop": f"short side to {size}, centre {size}x{size}", "filter": "bilinear, antialiased (Pillow)"}
    images, content = pictures.squares(train + test, size, recipe)
    return ImageData(images[:len(train)], images[len(train):], None, None, {**recipe, "digest": content})


def load_glyphs():
    """70,000 drawn digits. A change of draw_glyphs must raise the version in the recipe; otherwise old caches stay in use."""
    recipe = {"name": "glyphs", "source": f"digits of {len(FONTS)} fonts, affine jitter (version 2), seed 0",
              "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "60,000 + 10,000 independent draws"}
    images, content = cached(cache_folder() / "glyphs.npy", dict(recipe, fonts=FONTS), (70_000, 1, 32, 32),
                             lambda: draw_glyphs(70_000))
    labels = np.arange(70_000) % 10
    return ImageData(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:], {**recipe, "digest": content})


def draw_glyphs(count, seed=0, batch=500):
    """Yields `count` digits in batches, uint8 [at most batch, 1, 32, 32]. Image i shows the digit i % 10 and ignores `count`."""
    atlas, u = glyph_atlas(), torch.rand(count, 7, generator=torch.Generator().manual_seed(seed))
    for i in tqdm(torch.arange(count).split(batch), "drawing glyphs", disable=None):
        font, digit = (u[i, 0] * len(atlas)).long(), i % 10
        angle, shear, *zoom, dx, dy = ((2 * u[i, 1:] - 1) * torch.tensor([0.17, 0.15, 0.15, 0.15, 0.1, 0.1])).T
        (sx, sy), cos, sin = (1.1 + z for z in zoom), angle.cos(), angle.sin()
        affine = torch.stack([cos * sx, (shear * cos - sin) * sy, dx, sin * sx, (shear * sin + cos) * sy, dy], -1)
        grid = F.affine_grid(affine.view(-1, 2, 3), (len(i), 1, 84, 84), align_corners=False)
        images = F.avg_pool2d(F.grid_sample(atlas[font, digit], grid, align_corners=False), 3)  # 3x3 samples a pixel
        yield F.pad((images * 255).round(), (2, 2, 2, 2)).to(torch.uint8).numpy()


def glyph_atlas():
    """Every digit of every font, centred and about 60 of 84 pixels high: float [fonts, 10, 1, 84, 84] in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    atlas = np.zeros((len(FONTS), 10, 1, 84, 84), np.float32)
    for i, name in enumerate(FONTS):
        font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), 86)
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            canvas = Image.new("L", (84, 84))
            ImageDraw.Draw(canvas).text((42 - (left + right) / 2, 42 - (top + bottom) / 2), str(digit), fill=255, font=font)
            atlas[i, digit, 0] = np.asarray(canvas) / 255
    return torch.from_numpy(atlas)
