"""The images that the experiments train on, as uint8 tensors [n, C, H, W].

    data = load_images("mnist", root="data", limit=10_000)
    data.train, data.test, data.train_labels, data.test_labels, data.recipe

    ROOT/MNIST/raw, ROOT/FashionMNIST/raw    train-images-idx3-ubyte[.gz] and its three sisters; padded with zeros to 32x32
    ROOT/celeba/img_align_celeba[.zip]       NNNNNN.jpg as released; ROOT may also be that folder or zip
    folder:PATH                              any images, PATH a folder or a zip
    glyphs                                   digits drawn here from matplotlib's fonts; needs no file and no network

Pictures are converted once, to a memory-mapped array beside the data: in $VSM_CACHE where set, in ./cache where the data are read-only.
"""

import contextlib
import fcntl
import gzip
import http.client
import io
import json
import math
import os
import re
import socket
import struct
import sys
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from torchvision import datasets
from tqdm import tqdm

from runs import UserError, write_atomic

IDX_FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CELEBA_TRAIN, CELEBA_TEST = range(1, 162771), range(182638, 202600)  # by file number; between them lies the validation set
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)

GLYPH_FONTS = [f"DejaVu{family}.ttf" for family in (
    "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique",
    "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")] + [
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmti10.ttf", "cmtt10.ttf"]


class ImageData(NamedTuple):
    """Train and test images, uint8 [n, C, H, W] in 0..255; labels int64 [n] or None; how they were made, as plain JSON."""
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None
    test_labels: torch.Tensor | None
    recipe: dict


def load_images(name, root="data", limit=0, test_limit=0):
    """The data set `name`: mnist, fashion, celeba, glyphs or folder:PATH.

    `limit` and `test_limit` keep the first so many images of the official order; 0 keeps all.
    Raises UserError: unknown name, data that are missing (it says which layout is wanted) or damaged (it says which file).
    """
    if limit < 0 or test_limit < 0:
        raise UserError(f"limits of {limit} and {test_limit} images: they must be positive, or 0 for all")
    if name in IDX_FOLDERS:
        data = load_idx(name, Path(root))
    elif name == "celeba":
        data = load_celeba(Path(root))
    elif name == "glyphs":
        data = load_glyphs()
    elif name.startswith("folder:") and len(name) > len("folder:"):
        data = load_folder(Path(name.removeprefix("folder:")).expanduser())
    else:
        raise UserError(f"unknown data {name!r}; choose mnist, fashion, celeba, glyphs or folder:PATH")
    train, test, train_labels, test_labels = (None if part is None else torch.from_numpy(np.array(part[:count or None]))
                                              for part, count in zip(data[:4], (limit, test_limit) * 2))
    return ImageData(train, test, train_labels, test_labels, {**data.recipe, "counts": {"train": len(train), "test": len(test)}})


# ---- MNIST and Fashion-MNIST ----

def load_idx(name, root):
    folder = root / IDX_FOLDERS[name] / "raw"
    paths = [next((path for path in (folder / file, folder / f"{file}.gz") if path.exists()), None) for file in IDX_FILES]
    if None in paths:
        download(IDX_FOLDERS[name], root, folder)
        paths = [folder / file for file in IDX_FILES]
    train, train_labels, test, test_labels = (read_idx(path) for path in paths)
    for images, labels, path in ((train, train_labels, paths[0]), (test, test_labels, paths[2])):
        if images.shape != (len(labels), 28, 28):
            raise UserError(f"{path} holds images {list(images.shape)}, where its labels' file wants [{len(labels)}, 28, 28]")
    pad = ((0, 0), (2, 2), (2, 2))
    return ImageData(np.pad(train, pad)[:, None], np.pad(test, pad)[:, None], train_labels.astype(np.int64), test_labels.astype(np.int64),
                     {"name": name, "source": "idx", "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "official"})


def read_idx(path):
    """A uint8 idx file, plain or .gz, as an array. Raises UserError for a damaged one."""
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        zeros, kind, ndim = struct.unpack(">HBB", raw[:4])
        if (zeros, kind) != (0, 8):
            raise ValueError("it does not begin as an idx file of bytes does")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(struct.unpack(f">{ndim}I", raw[4:4 + 4 * ndim]))
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); delete it to download it again, or copy it anew") from error


def download(dataset, root, folder):
    """Fetch the idx files through torchvision, quietly. Raises UserError where that fails, leaving no empty folder."""
    print(f"downloading {dataset} to {folder}", file=sys.stderr)
    made = [path for path in (folder, folder.parent, root) if not path.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(datasets, dataset)(root, download=True)
    except (RuntimeError, OSError, http.client.HTTPException, *DAMAGE) as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise UserError(f"{folder} lacks files and {dataset} cannot be downloaded ({str(error).strip().splitlines()[-1]}); "
                        f"put {', '.join(IDX_FILES)} there, plain or .gz, or name their root with --data-root") from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---- CelebA and folders of pictures ----

def load_celeba(root):
    places = [root / top / name for top in ("celeba", "") for name in ("img_align_celeba", "img_align_celeba.zip")]
    if root.is_file() or next(root.glob("[0-9]" * 6 + ".*"), None):
        places.append(root)
    for place in filter(Path.exists, places):
        pictures = Pictures(place)
        numbers = {int(Path(name).stem): name for name in pictures.names if re.fullmatch(r"\d{6}", Path(name).stem)}
        if numbers:
            train, test = ([numbers[i] for i in sorted(numbers) if i in part] for part in (CELEBA_TRAIN, CELEBA_TEST))
            if not train or not test:
                raise UserError(f"{place} holds {len(train)} training images of CelebA (000001-162770) and {len(test)} test images "
                                "(182638-202599); some of both are needed")
            return pictures.convert("celeba", train, test, 64, "official, by file number: train 1-162770, test 182638-202599")
    raise UserError(f"no CelebA in {root}: put its 202,599 pictures, or some, at {root}/celeba/img_align_celeba/NNNNNN.jpg, "
                    f"or the official zip at {root}/celeba/img_align_celeba.zip, or name that folder or zip as the data root")


def load_folder(path):
    if not path.exists():
        raise UserError(f"{path} does not exist; folder:PATH wants a folder, or a zip, of pictures ({', '.join(PICTURES)})")
    pictures = Pictures(path)
    names = pictures.names
    if len(names) < 2:
        raise UserError(f"{path} holds {len(names)} pictures ({', '.join(PICTURES)}); a training and a test set need two or more")
    size = 64 if min(pictures.open(names[0]).size) >= 64 else 32
    train, test = [name for i, name in enumerate(names) if i % 10], names[::10]
    return pictures.convert("folder", train, test, size, "every 10th of the sorted paths, from the first, is a test image")


class Pictures:
    """The pictures of a folder (and of those below it) or of a zip: sorted `names`, and a `stamp` that changes when they do."""

    def __init__(self, source):
        self.source = source.resolve()
        if source.is_dir():
            files = {path.relative_to(source).as_posix(): path.stat() for path in source.rglob("*")}
            self._read = lambda name: (source / name).read_bytes()
        else:
            try:
                archive = zipfile.ZipFile(source)
            except DAMAGE as error:
                raise UserError(f"{source} is not a whole zip file ({error}); a download cut short leaves such a file") from error
            files = dict.fromkeys(archive.namelist(), source.stat())
            self._read = archive.read
        self.names = sorted(name for name in files if name.lower().endswith(PICTURES) and not Path(name).name.startswith("."))
        stats = [files[name] for name in self.names]
        self.stamp = [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]

    def open(self, name):
        """A picture as RGB, upright. Raises UserError for a damaged one."""
        try:
            return ImageOps.exif_transpose(Image.open(io.BytesIO(self._read(name)))).convert("RGB")
        except DAMAGE as error:
            raise UserError(f"{self.source}/{name} is damaged ({error})") from error

    def convert(self, data, train, test, size, split):
        """The named pictures, resized and cropped: from the cache, or into it."""
        names = train + test
        recipe = {"name": data, "source": self.source.name, "size": [3, size, size], "crop": f"short side to {size}, centre {size}x{size}",
                  "filter": "bilinear, antialiased (Pillow)", "pad": 0, "split": split}

        def rows():
            with ThreadPool() as pool:  # Pillow decodes and resizes outside the interpreter's lock
                yield from tqdm(pool.imap(lambda name: resize_and_crop(self.open(name), size), names, chunksize=16),
                                f"converting {self.source.name}", len(names), unit="image", disable=None)

        name = f"{self.source.name}-{zlib.crc32(str(self.source).encode()):08x}.npy"
        images = cached(cache_folder(self.source.parent) / name, dict(recipe, stamp=self.stamp), (len(names), 3, size, size), rows)
        return ImageData(images[:len(train)], images[len(train):], None, None, recipe)


def resize_and_crop(picture, size):
    """Short side to `size`, then the central square, as torchvision's Resize and CenterCrop do to the bit: uint8 [3, size, size]."""
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# ---- a cache of uint8 arrays ----

def cache_folder(beside=None):
    """$VSM_CACHE where set, else `beside` where it can be written, else ./cache."""
    if "VSM_CACHE" in os.environ:
        return Path(os.environ["VSM_CACHE"])
    return beside if beside and os.access(beside, os.W_OK) else Path("cache")


def cached(path, recipe, shape, rows):
    """The array at `path`, memory-mapped; made from the arrays that `rows()` yields where none of this recipe is there.

    Whole or not at all: a temporary name, then a rename. One process makes it, others wait. Raises UserError where it cannot be written.
    """
    if (images := read_cache(path, recipe, shape)) is not None:
        return images
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_cache(path, recipe, shape) is None:
                print(f"making {path}, once", file=sys.stderr)
                write_cache(path, recipe, shape, rows())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); the environment variable VSM_CACHE may name another folder") from error
    return np.load(path, mmap_mode="r")


def read_cache(path, recipe, shape):
    """The cached array, or None where it is absent, of another recipe, or damaged."""
    try:
        images = np.load(path, mmap_mode="r")
        return images if json.loads(path.with_suffix(".json").read_text()) == recipe and images.shape == shape else None
    except (OSError, ValueError, EOFError):
        return None


def write_cache(path, recipe, shape, rows):
    path.with_suffix(".json").unlink(missing_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:  # written, not memory-mapped: there a full disk would be a SIGBUS
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.writelines(row.tobytes() for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(path.with_suffix(".json"), json.dumps(recipe, indent=1).encode())


# ---- glyphs: MNIST's shape without MNIST ----

def load_glyphs():
    recipe = {"name": "glyphs", "source": f"digits of {len(GLYPH_FONTS)} fonts, affine jitter, seed 0", "size": [1, 32, 32],
              "crop": None, "filter": None, "pad": 2, "split": "60,000 + 10,000 independent draws"}
    images = cached(cache_folder() / "glyphs.npy", dict(recipe, fonts=GLYPH_FONTS), (70_000, 1, 32, 32),
                    lambda: tqdm(draw_glyphs(70_000), "drawing glyphs", 140, disable=None))
    labels = np.arange(70_000) % 10
    return ImageData(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:], recipe)


def draw_glyphs(count, seed=0, batch=500):
    """Yields `count` digits in batches, uint8 [<= batch, 1, 32, 32]; image i shows i % 10 and does not depend on `count`."""
    atlas = glyph_atlas()
    u = torch.rand(count, 7, generator=torch.Generator().manual_seed(seed))
    for start in range(0, count, batch):
        draw = u[start:start + batch]
        font, digit = (draw[:, 0] * len(atlas)).long(), torch.arange(start, start + len(draw)) % 10
        angle, shear, sx, sy, dx, dy = (2 * draw[:, 1:] - 1).T  # in [-1, 1]
        angle, shear, sx, sy = angle * math.radians(10), shear * 0.15, 1.1 + 0.15 * sx, 1.1 + 0.15 * sy
        cos, sin = angle.cos(), angle.sin()
        affine = torch.stack([cos * sx, (shear * cos - sin) * sy, dx * 1.5 / 14, sin * sx, (shear * sin + cos) * sy, dy * 1.5 / 14], -1)
        grid = F.affine_grid(affine.view(-1, 2, 3), (len(draw), 1, 84, 84), align_corners=False)
        images = F.avg_pool2d(F.grid_sample(atlas[font, digit], grid, align_corners=False), 3)  # 3 x 3 samples a pixel: antialiased
        yield F.pad((images * 255).round(), (2, 2, 2, 2)).to(torch.uint8).numpy()


def glyph_atlas():
    """Every digit of every font, centred, digit height 60 of 84 pixels: float [fonts, 10, 1, 84, 84] in [0, 1]."""
    import matplotlib
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    atlas = np.zeros((len(GLYPH_FONTS), 10, 1, 84, 84), np.float32)
    for i, name in enumerate(GLYPH_FONTS):
        _, top, _, bottom = ImageFont.truetype(folder / name, 100).getbbox("0")
        font = ImageFont.truetype(folder / name, 100 * 60 / (bottom - top))
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            canvas = Image.new("L", (84, 84))
            ImageDraw.Draw(canvas).text((42 - (left + right) / 2, 42 - (top + bottom) / 2), str(digit), fill=255, font=font)
            atlas[i, digit, 0] = np.asarray(canvas) / 255
    return torch.from_numpy(atlas)
