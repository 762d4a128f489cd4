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
GLYPH_COUNTS = {"train": 60_000, "test": 10_000}


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
                     make_recipe(name, "idx", 32, 1, pad=2, split="official"))


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
    from torchvision import datasets  # only here: everything else works without torchvision's compiled parts
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
        names, stamp, read = open_pictures(place)
        numbers = {name: int(Path(name).stem) for name in names if re.fullmatch(r"\d{6}", Path(name).stem)}
        if numbers:
            names = sorted(numbers, key=numbers.get)
            train, test = ([name for name in names if numbers[name] in part] for part in (CELEBA_TRAIN, CELEBA_TEST))
            if not train or not test:
                raise UserError(f"{place} holds {len(train)} training images (numbers 1-162770) and {len(test)} test images "
                                "(182638-202599) of CelebA; it needs some of both")
            split = "official, by file number: train 1-162770, test 182638-202599"
            return convert(place, train, test, stamp, read, make_recipe("celeba", place.name, 64, 3, split=split))
    raise UserError(f"no CelebA in {root}: put the 202,599 pictures (or some) at {root}/celeba/img_align_celeba/NNNNNN.jpg, "
                    f"or the official {root}/celeba/img_align_celeba.zip, or name that folder or zip with --data-root")


def load_folder(path):
    if not path.exists():
        raise UserError(f"{path} does not exist; folder:PATH wants a folder, or a zip, of pictures ({', '.join(PICTURES)})")
    names, stamp, read = open_pictures(path)
    if len(names) < 2:
        raise UserError(f"{path} holds {len(names)} pictures ({', '.join(PICTURES)}); a training and a test set need two or more")
    size = 64 if min(read_picture(read, path, names[0]).size) >= 64 else 32
    train, test = [name for i, name in enumerate(names) if i % 10], names[::10]
    split = "by sorted path: every 10th, from the first, to the test set"
    return convert(path, train, test, stamp, read, make_recipe("folder", path.resolve().name, size, 3, split=split))


def open_pictures(source):
    """Sorted names of the pictures in a folder (and the folders below) or a zip, what tells whether they change, and name -> bytes."""
    def is_picture(name):
        return name.lower().endswith(PICTURES) and not Path(name).name.startswith(".")

    if source.is_dir():
        files = {path.relative_to(source).as_posix(): path.stat() for path in source.rglob("*") if is_picture(path.name)}
        stamp = [len(files), sum(file.st_size for file in files.values()), max((file.st_mtime_ns for file in files.values()), default=0)]
        return sorted(files), stamp, lambda name: (source / name).read_bytes()
    try:
        archive = zipfile.ZipFile(source)
    except DAMAGE as error:
        raise UserError(f"{source} is not a whole zip file ({error}); a failed download leaves such a file") from error
    names = sorted(filter(is_picture, archive.namelist()))
    return names, [len(names), source.stat().st_size, source.stat().st_mtime_ns], archive.read


def read_picture(read, source, name):
    """The picture as RGB, upright. Raises UserError for a damaged one."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(read(name)))).convert("RGB")
    except DAMAGE as error:
        raise UserError(f"{source}/{name} is damaged ({error})") from error


def resize_and_crop(picture, size):
    """Short side to `size` (Pillow's bilinear filter, antialiased), then the central square: uint8 [3, size, size].

    To the bit what torchvision's Resize(size) and CenterCrop(size) make of a PIL image.
    """
    short = min(picture.size)
    width, height = (size if side == short else int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def convert(source, train, test, stamp, read, recipe):
    """All pictures of the split, from the cache or into it."""
    size, names = recipe["size"][-1], train + test

    def pictures():
        with ThreadPool() as pool:
            yield from tqdm(pool.imap(lambda name: resize_and_crop(read_picture(read, source, name), size), names, chunksize=16),
                            f"converting {source.name}", len(names), unit="image", disable=None)

    images = cached(source, dict(recipe, stamp=stamp, counts=[len(train), len(test)]), (len(names), *recipe["size"]), pictures)
    return ImageData(images[:len(train)], images[len(train):], None, None, recipe)


def make_recipe(name, source, size, channels, pad=0, split=None):
    resized = {"crop": f"short side to {size}, centre {size}x{size}", "filter": "bilinear, antialiased (Pillow)"} if channels == 3 else {}
    return {"name": name, "source": source, "size": [channels, size, size], "crop": None, "filter": None, **resized, "pad": pad,
            "split": split}


# ---- a cache of uint8 arrays ----

def cached(source, recipe, shape, rows):
    """The array of `rows()`, memory-mapped; made where none with this recipe lies in the cache, whole or not at all.

    One process makes it, others wait for it. Raises UserError where it cannot be written.
    """
    path = cache_path(source)
    if (images := read_cache(path, recipe, shape)) is not None:
        return images
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (images := read_cache(path, recipe, shape)) is not None:
                return images
            path.with_suffix(".json").unlink(missing_ok=True)
            with open(temporary, "wb") as file:  # not through a memory map: a full disk would be SIGBUS there
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.writelines(row.tobytes() for row in rows())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            write_atomic(path.with_suffix(".json"), json.dumps(recipe, indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); name a folder with room in the environment variable VSM_CACHE") from error
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def read_cache(path, recipe, shape):
    """The cached array, or None: absent, of another recipe, or damaged."""
    try:
        images = np.load(path, mmap_mode="r") if json.loads(path.with_suffix(".json").read_text()) == recipe else None
    except (OSError, ValueError, EOFError):
        return None
    return images if images is not None and images.shape == shape and images.dtype == np.uint8 else None


def cache_path(source):
    """Beside the data; in $VSM_CACHE where set, in ./cache where the data are read-only or drawn here (`source` None)."""
    name = "glyphs" if source is None else f"{source.resolve().name}-{zlib.crc32(str(source.resolve()).encode()):08x}"
    if "VSM_CACHE" in os.environ:
        return Path(os.environ["VSM_CACHE"]) / f"{name}.npy"
    if source is not None:
        beside = source.resolve().parent / f"{name}.npy"
        if os.access(beside.parent, os.W_OK) or beside.exists():
            return beside
        print(f"{beside.parent} is read-only: its pictures, converted, are kept in ./cache (or $VSM_CACHE)", file=sys.stderr)
    return Path("cache") / f"{name}.npy"


# ---- glyphs: MNIST's shape without MNIST ----

def load_glyphs():
    recipe = make_recipe("glyphs", f"the ten digits of {len(GLYPH_FONTS)} fonts of matplotlib, affine jitter, seed 0", 32, 1, pad=2,
                         split="independent draws of one law")
    total = sum(GLYPH_COUNTS.values())
    images = cached(None, dict(recipe, fonts=GLYPH_FONTS, version=1), (total, 1, 32, 32), lambda: draw_glyphs(total, progress=True))
    labels = np.arange(total) % 10
    train = GLYPH_COUNTS["train"]
    return ImageData(images[:train], images[train:], labels[:train], labels[train:], recipe)


def draw_glyphs(count, seed=0, batch=500, progress=False):
    """Yields `count` digits in batches, uint8 [<= batch, 1, 32, 32]; image i shows i % 10 and does not depend on `count`."""
    atlas = glyph_atlas()
    u = torch.rand(count, 7, generator=torch.Generator().manual_seed(seed))
    for start in tqdm(range(0, count, batch), "drawing glyphs", disable=None if progress else True):
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
