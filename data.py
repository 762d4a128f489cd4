"""The images that the experiments train on, as uint8 tensors [n, C, H, W].

    data = load_images("mnist", root="data", limit=10_000)
    data.train, data.test, data.train_labels, data.test_labels, data.recipe

    ROOT/MNIST/raw, ROOT/FashionMNIST/raw    train-images-idx3-ubyte[.gz] and its three sisters; padded with zeros to 32x32
    ROOT/celeba/img_align_celeba[.zip]       NNNNNN.jpg as released; ROOT may also be that folder or zip
    folder:PATH                              any images, PATH a folder or a zip
    glyphs                                   digits drawn here from matplotlib's fonts; needs no file and no network

Pictures are converted once, to an array beside the data: in $VSM_CACHE where set, in ./cache where the data are read-only.
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
import shutil
import socket
import struct
import sys
import tempfile
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import matplotlib
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
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)

GLYPH_FONTS = [
    *(f"DejaVu{family}" for family in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique",
                                       "SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique",
                                       "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")),
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"]


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
    if min(limit, test_limit) < 0:
        raise UserError(f"a limit of {min(limit, test_limit)} images: it must be positive, or 0 for all")
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


def load_idx(name, root):
    paths = [root / IDX_FOLDERS[name] / "raw" / file for file in IDX_FILES]
    paths = [path if path.exists() else path.with_name(f"{path.name}.gz") for path in paths]
    if not all(path.exists() for path in paths):
        paths = download(IDX_FOLDERS[name], paths[0].parent)
    train, train_labels, test, test_labels = (read_idx(path) for path in paths)
    for images, labels, path in ((train, train_labels, paths[0]), (test, test_labels, paths[2])):
        if images.shape != (len(labels), 28, 28):
            raise UserError(f"{path} holds images {list(images.shape)}, where its labels' file wants [{len(labels)}, 28, 28]")
    recipe = {"name": name, "source": "idx", "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "official"}
    train, test = (np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None] for images in (train, test))
    return ImageData(train, test, train_labels.astype(np.int64), test_labels.astype(np.int64), recipe)


def read_idx(path):
    """A uint8 idx file, plain or .gz, as an array. Raises UserError for a damaged one."""
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        zeros, kind, ndim = struct.unpack(">HBB", raw[:4])
        if (zeros, kind) != (0, 8):
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(struct.unpack(f">{ndim}I", raw[4:4 + 4 * ndim]))
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); delete it to download it again, or copy it anew") from error


def download(dataset, folder):
    """The paths of the idx files in `folder`, fetched quietly through torchvision where missing. Raises UserError where that fails."""
    print(f"downloading {dataset} to {folder}", file=sys.stderr)
    socket.setdefaulttimeout(10)
    try:
        quiet = io.StringIO()
        with tempfile.TemporaryDirectory() as there, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            fetched = Path(getattr(datasets, dataset)(there, download=True).raw_folder)
            folder.mkdir(parents=True, exist_ok=True)
            for file in IDX_FILES:
                if not (folder / file).exists():
                    shutil.copy(fetched / file, folder / file)
    except (RuntimeError, http.client.HTTPException, *DAMAGE) as error:
        raise UserError(f"{folder} lacks files and {dataset} cannot be downloaded ({str(error).strip().splitlines()[-1]}); "
                        f"put {', '.join(IDX_FILES)} there, plain or .gz, or name another data root") from error
    finally:
        socket.setdefaulttimeout(None)
    return [folder / file for file in IDX_FILES]


def load_celeba(root):
    places = [root / top / name for top in ("celeba", "") for name in ("img_align_celeba", "img_align_celeba.zip")]
    if root.is_file() or next(root.glob("[0-9]" * 6 + ".*"), None):
        places.append(root)
    for place in filter(Path.exists, places):
        pictures = Pictures(place)
        numbers = {int(Path(name).stem): name for name in pictures.names if re.fullmatch(r"\d{6}", Path(name).stem)}
        train, test = ([numbers[i] for i in sorted(numbers) if i in part] for part in (CELEBA_TRAIN, CELEBA_TEST))
        if train and test:
            return pictures.convert("celeba", train, test, 64, "official, by file number: train 1-162770, test 182638-202599")
    raise UserError(f"no CelebA in {root}: put its 202,599 pictures (or some of the training numbers 1-162770 and some of the test "
                    f"numbers 182638-202599) at {root}/celeba/img_align_celeba/NNNNNN.jpg, or the official zip at "
                    f"{root}/celeba/img_align_celeba.zip, or name that folder or zip as the data root")


def load_folder(path):
    pictures = Pictures(path) if path.exists() else None
    if not pictures or len(pictures.names) < 2:
        raise UserError(f"{path} holds fewer than two pictures ({' '.join(EXTENSIONS)}); folder:PATH wants a folder or a zip of them")
    train, test = [name for i, name in enumerate(pictures.names) if i % 10], pictures.names[::10]
    size = 64 if min(pictures.open(test[0]).size) >= 64 else 32
    return pictures.convert("folder", train, test, size, "every 10th of the sorted paths, from the first, is a test image")


class Pictures:
    """The pictures of a folder (and of those below it) or of a zip: sorted `names`, and a `stamp` that changes when they do."""

    def __init__(self, source):
        self.source = source.resolve()
        try:
            archive = None if source.is_dir() else zipfile.ZipFile(source)
        except DAMAGE as error:
            raise UserError(f"{source} is not a whole zip file ({error}); a download cut short leaves such a file") from error
        self.read = archive.read if archive else lambda name: (source / name).read_bytes()
        names = archive.namelist() if archive else [path.relative_to(source).as_posix() for path in source.rglob("*")]
        self.names = sorted(name for name in names if name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith("."))
        files = [source.stat()] if archive else [(source / name).stat() for name in self.names]
        self.stamp = [len(self.names), sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)]

    def open(self, name):
        """A picture as RGB, upright. Raises UserError for a damaged one."""
        try:
            return ImageOps.exif_transpose(Image.open(io.BytesIO(self.read(name)))).convert("RGB")
        except DAMAGE as error:
            raise UserError(f"{self.source}/{name} is damaged ({type(error).__name__})") from error

    def convert(self, data, train, test, size, split):
        """The named pictures, resized and cropped: from the cache, or into it."""
        names = train + test
        recipe = {"name": data, "source": self.source.name, "size": [3, size, size], "split": split, "pad": 0,
                  "crop": f"short side to {size}, centre {size}x{size}", "filter": "bilinear, antialiased (Pillow)"}

        def rows():
            with ThreadPool() as pool:  # Pillow decodes and resizes outside the interpreter's lock
                yield from tqdm(pool.imap(lambda name: resize_and_crop(self.open(name), size), names, chunksize=16),
                                f"converting {self.source.name}", len(names), unit="image", disable=None)

        images = cached(cache_path(self.source), dict(recipe, stamp=self.stamp), (len(names), 3, size, size), rows)
        return ImageData(images[:len(train)], images[len(train):], None, None, recipe)


def resize_and_crop(picture, size):
    """Short side to `size`, then the central square, to the bit as torchvision's Resize and CenterCrop: uint8 [3, size, size]."""
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def cache_path(source):
    """Beside `source` (None: drawn here) where its folder is writable by its mode, not only to root; else $VSM_CACHE or ./cache."""
    if source and "VSM_CACHE" not in os.environ and os.access(source.parent, os.W_OK) and source.parent.stat().st_mode & 0o222:
        return source.with_name(f"{source.name}.converted.npy")
    name = f"{source.name}-{zlib.crc32(str(source).encode()):08x}" if source else "glyphs"
    return Path(os.environ.get("VSM_CACHE", "cache")) / f"{name}.npy"


def cached(path, recipe, shape, rows):
    """The array at `path`, memory-mapped; made of the arrays that `rows()` yields where none of this recipe is there.

    It is written whole or not at all; one process makes it, others wait. Raises UserError where it cannot be written.
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
        raise UserError(f"cannot write {path} ({error.strerror}); set VSM_CACHE to a folder with room") from error
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


def load_glyphs():
    recipe = {"name": "glyphs", "source": f"digits of {len(GLYPH_FONTS)} fonts, affine jitter, seed 0", "size": [1, 32, 32],
              "crop": None, "filter": None, "pad": 2, "split": "60,000 + 10,000 independent draws"}
    images = cached(cache_path(None), dict(recipe, fonts=GLYPH_FONTS), (70_000, 1, 32, 32), lambda: draw_glyphs(70_000))
    labels = np.arange(70_000) % 10
    return ImageData(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:], recipe)


def draw_glyphs(count, seed=0, batch=500):
    """Yields `count` digits in batches, uint8 [<= batch, 1, 32, 32]; image i shows i % 10 and does not depend on `count`."""
    atlas = glyph_atlas()
    u = torch.rand(count, 7, generator=torch.Generator().manual_seed(seed))
    for start in tqdm(range(0, count, batch), "drawing glyphs", disable=None):
        draw = u[start:start + batch]
        font, digit = (draw[:, 0] * len(atlas)).long(), torch.arange(start, start + len(draw)) % 10
        angle, shear, *zoom, dx, dy = ((2 * draw[:, 1:] - 1) * torch.tensor([math.radians(10), 0.15, 0.15, 0.15, 1.5 / 14, 1.5 / 14])).T
        (sx, sy), cos, sin = (1.1 + z for z in zoom), angle.cos(), angle.sin()
        affine = torch.stack([cos * sx, (shear * cos - sin) * sy, dx, sin * sx, (shear * sin + cos) * sy, dy], -1)
        grid = F.affine_grid(affine.view(-1, 2, 3), (len(draw), 1, 84, 84), align_corners=False)
        images = F.avg_pool2d(F.grid_sample(atlas[font, digit], grid, align_corners=False), 3)  # 3x3 samples a pixel
        yield F.pad((images * 255).round(), (2, 2, 2, 2)).to(torch.uint8).numpy()


def glyph_atlas():
    """Every digit of every font, centred, digit height 60 of 84 pixels: float [fonts, 10, 1, 84, 84] in [0, 1]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    atlas = np.zeros((len(GLYPH_FONTS), 10, 1, 84, 84), np.float32)
    for i, name in enumerate(GLYPH_FONTS):
        _, top, _, bottom = ImageFont.truetype(folder / f"{name}.ttf", 100).getbbox("0")
        font = ImageFont.truetype(folder / f"{name}.ttf", 100 * 60 / (bottom - top))
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            canvas = Image.new("L", (84, 84))
            ImageDraw.Draw(canvas).text((42 - (left + right) / 2, 42 - (top + bottom) / 2), str(digit), fill=255, font=font)
            atlas[i, digit, 0] = np.asarray(canvas) / 255
    return torch.from_numpy(atlas)
