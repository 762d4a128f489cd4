"""The images that the experiments train on, as uint8 tensors [n, C, H, W].

    ROOT/MNIST/raw, ROOT/FashionMNIST/raw    train-images-idx3-ubyte[.gz] and its three sisters; padded with zeros to 32x32
    ROOT/celeba/img_align_celeba[.zip]       NNNNNN.jpg as released; ROOT may also be that folder or zip
    folder:PATH                              any images, PATH a folder or a zip
    glyphs                                   digits drawn here from matplotlib's fonts; needs no file and no network

Pictures are converted once, to an array beside the data: in $VSM_CACHE where set, in ./cache where the data are read-only.
"""

import contextlib
import fcntl
import gzip
import io
import json
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

from vsm.cli import UserError
from vsm.runs import write_atomic

IDX_FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CELEBA_TRAIN, CELEBA_TEST = range(1, 162771), range(182638, 202600)  # by file number; between them lies the validation set
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DAMAGE = (OSError, EOFError, IndexError, SyntaxError, ValueError, struct.error, zlib.error, zipfile.BadZipFile,
          Image.DecompressionBombError)  # what readers raise, by how the file is damaged

GLYPH_FONTS = [
    *(f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
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
        if images.shape != (*labels.shape, 28, 28):
            raise UserError(f"{path} holds images {images.shape}, where its file of labels wants {(*labels.shape, 28, 28)}")
    recipe = {"name": name, "source": "idx", "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "official"}
    train, test = (np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None] for images in (train, test))
    return ImageData(train, test, train_labels.astype(np.int64), test_labels.astype(np.int64), recipe)


def read_idx(path):
    """A uint8 idx file, plain or .gz, as an array. Raises UserError for a damaged one."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        ndim = raw[3]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(struct.unpack(f">{ndim}I", raw[4:4 + 4 * ndim]))
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); delete it to download it again, or copy it anew") from error


def download(dataset, folder):
    """The idx files' paths in `folder`, those missing fetched quietly through torchvision. Raises UserError where that fails."""
    print(f"downloading {dataset} to {folder}", file=sys.stderr)
    socket.setdefaulttimeout(10)
    try:
        with tempfile.TemporaryDirectory() as there, contextlib.redirect_stderr(io.StringIO()):
            fetched = Path(getattr(datasets, dataset)(there, download=True).raw_folder)
            folder.mkdir(parents=True, exist_ok=True)
            for file in IDX_FILES:
                if not (folder / file).exists():
                    shutil.copy(fetched / file, folder / file)
    except (RuntimeError, *DAMAGE) as error:
        raise UserError(f"{folder} lacks files and {dataset} cannot be downloaded ({str(error).strip().rpartition(chr(10))[2]}); "
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
    raise UserError(f"no CelebA in {root}: put its pictures (of the training set, 1-162770, and the test set, 182638-202599) at "
                    f"{root}/celeba/img_align_celeba/NNNNNN.jpg or, zipped, at {root}/celeba/img_align_celeba.zip, "
                    "or name that folder or zip as the data root")


def load_folder(path):
    pictures = Pictures(path)
    if len(pictures.names) < 2:
        raise UserError(f"{path} holds fewer than two pictures ({' '.join(EXTENSIONS)}); a training and a test set want more")
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
            raise UserError(f"{source} is neither a folder of pictures nor a whole zip of them ({error})") from error
        self.read = archive.read if archive else lambda name: (source / name).read_bytes()
        names = archive.namelist() if archive else [path.relative_to(source).as_posix() for path in source.rglob("*")]
        self.names = sorted(name for name in names if name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith("."))
        try:
            files = [source.stat()] if archive else [(source / name).stat() for name in self.names]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend it or take it away") from error
        self.stamp = [len(self.names), sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)]

    def open(self, name):
        """A picture as RGB, upright. Raises UserError for a damaged one, or one of more than 8 bits, which Pillow would clip to white."""
        try:
            picture = Image.open(io.BytesIO(self.read(name)))
            if picture.mode.startswith(("I", "F")):
                raise UserError(f"{self.source}/{name} has more than 8 bits a channel; save it with 8 first")
            return ImageOps.exif_transpose(picture).convert("RGB")
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
    crop = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(crop).transpose(2, 0, 1)


def cache_folder():
    """$VSM_CACHE, or ./cache: for what is made once and can be made again."""
    return Path(os.environ.get("VSM_CACHE", "cache"))


def cache_path(source):
    """Where the array of `source` (None: drawn here) is kept; root, too, leaves a folder alone whose mode says read-only."""
    if source and "VSM_CACHE" not in os.environ and os.access(source.parent, os.W_OK) and source.parent.stat().st_mode & 0o222:
        return source.with_name(f"{source.name}.converted.npy")
    name = f"{source.name}-{zlib.crc32(str(source).encode()):08x}" if source else "glyphs"
    return cache_folder() / f"{name}.npy"


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


def load_glyphs():  # whoever changes the drawing raises the version, or old caches stay in use
    recipe = {"name": "glyphs", "source": f"digits of {len(GLYPH_FONTS)} fonts, affine jitter (version 2), seed 0",
              "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "60,000 + 10,000 independent draws"}
    images = cached(cache_path(None), dict(recipe, fonts=GLYPH_FONTS), (70_000, 1, 32, 32), lambda: draw_glyphs(70_000))
    labels = np.arange(70_000) % 10
    return ImageData(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:], recipe)


def draw_glyphs(count, seed=0, batch=500):
    """Yields `count` digits in batches, uint8 [<= batch, 1, 32, 32]; image i shows i % 10 and does not depend on `count`."""
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
    """Every digit of every font, centred, digits about 60 of 84 pixels high: float [fonts, 10, 1, 84, 84] in [0, 1]."""
    atlas = np.zeros((len(GLYPH_FONTS), 10, 1, 84, 84), np.float32)
    for i, name in enumerate(GLYPH_FONTS):
        font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), 86)
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            canvas = Image.new("L", (84, 84))
            ImageDraw.Draw(canvas).text((42 - (left + right) / 2, 42 - (top + bottom) / 2), str(digit), fill=255, font=font)
            atlas[i, digit, 0] = np.asarray(canvas) / 255
    return torch.from_numpy(atlas)
