"""The images that the experiments train on, as uint8 tensors [n, C, H, W]. docs/data.md is the page for users.

    ROOT/MNIST/raw, ROOT/FashionMNIST/raw    train-images-idx3-ubyte[.gz] and its three sisters; padded with zeros to 32x32
    ROOT/celeba/img_align_celeba[.zip]       NNNNNN.jpg as released; ROOT may also be that folder or zip
    folder:PATH                              any images, PATH a folder or a zip
    glyphs                                   digits drawn here from matplotlib's fonts; needs no file and no network

DATA_SETS has one entry for each name. Pictures are converted once, to an array that is kept beside the data, or in $VSM_CACHE if
that is set, or in ./cache if the data are read-only. Pillow, torchvision and matplotlib are imported where they are used, so that
--help is fast.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from vsm.cli import UserError
from vsm.glyphs import FONTS, draw_glyphs
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
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# A small file can expand to many GB. These bounds are far above any real data set and below any real memory.
MAX_IDX_BYTES = 2**30
MAX_PICTURE_BYTES = 2**27
MAX_PICTURE_ASPECT = 100  # the long side over the short one, which becomes 32 or 64 pixels


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


def load_images(name, root="data", limit=0, test_limit=0):
    """The ImageData of the data set `name`, a key of DATA_SETS or folder:PATH.

    It keeps the first `limit` training images and the first `test_limit` test images of the official order; 0 keeps all.
    Raises UserError for an unknown name, for missing data (with the layout that is wanted) and for damaged data (with the file).
    """
    if min(limit, test_limit) < 0:
        raise UserError(f"a limit of {min(limit, test_limit)} images: it must be positive, or 0 for all")
    folder = name.removeprefix("folder:") if name.startswith("folder:") else ""
    if not folder and name not in DATA_SETS:
        raise UserError(f"unknown data {name!r}; choose one of {data_names()}")
    try:
        data = load_folder(folder) if folder else DATA_SETS[name](Path(root))
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read ({error.strerror or error})") from error
    require_images(name, data.train, data.train_labels, "training")
    require_images(name, data.test, data.test_labels, "test")
    train, train_labels = first_rows(limit, data.train), first_rows(limit, data.train_labels)
    test, test_labels = first_rows(test_limit, data.test), first_rows(test_limit, data.test_labels)
    recipe = {"size": list(train.shape[1:]), **data.recipe, "counts": {"train": len(train), "test": len(test)}}
    return ImageData(train, test, train_labels, test_labels, recipe)


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


def digest(*tensors):
    """The first 12 hexadecimal digits of the SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------- idx files


def load_idx(name, dataset, root):
    """A data set in MNIST's format from root/dataset/raw, downloaded by torchvision's class `dataset` where files are missing."""
    folder = root / dataset / "raw"
    if not all(path.exists() for path in idx_paths(folder)):
        download(dataset, folder)
    paths = idx_paths(folder)
    train, train_labels, test, test_labels = [read_idx(path) for path in paths]
    for images, labels, images_path, labels_path in ((train, train_labels, *paths[:2]), (test, test_labels, *paths[2:])):
        if images.shape != (*labels.shape, 28, 28):
            raise UserError(f"{images_path} holds images {images.shape}; its file of labels wants {(*labels.shape, 28, 28)}")
        if labels.max(initial=0) > 9:
            raise UserError(f"{labels_path} holds the label {labels.max()}; the ten classes of {name} are 0 to 9")
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
                        f"put {', '.join(IDX_FILES)} there, plain or .gz, or name another data root") from error
    finally:
        socket.setdefaulttimeout(usual_timeout)


# ------------------------------------------------------------------------------------------------- CelebA and any pictures


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
            return pictures.convert("celeba", train, test, 64, "official, by file number: train 1-162770, test 182638-202599")
    raise UserError(f"no CelebA in {root}: put its pictures (of the training set, 1-162770, and the test set, 182638-202599) at "
                    f"{root}/celeba/img_align_celeba/NNNNNN.jpg or, zipped, at {root}/celeba/img_align_celeba.zip, "
                    "or name that folder or zip as the data root")


def load_folder(text):
    """The pictures of the folder or zip `text`; every tenth is a test image. They become 64x64, or 32x32 if they are small."""
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"the home folder in folder:{text} is unknown; write its path out") from error
    pictures = Pictures(path)
    if len(pictures.names) < 2:
        raise UserError(f"{path} holds fewer than two pictures ({' '.join(EXTENSIONS)}); a training and a test set want more")
    test = pictures.names[::10]
    train = [name for i, name in enumerate(pictures.names) if i % 10]
    size = 64 if min(pictures.open(test[0]).size) >= 64 else 32
    return pictures.convert("folder", train, test, size, "every 10th of the sorted paths, from the first, is a test image")


def is_picture(name):
    """Whether a path has the extension of a picture and no leading dot in its file name."""
    return name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith(".")


def regular_pictures(folder):
    """{relative path: its os.stat_result} of the pictures in `folder` and its subfolders; links to folders are not followed.

    Only regular files count: reading a FIFO named x.png would wait for ever. Raises OSError for what cannot be read.
    """
    def refuse(error):
        raise error

    found = {}
    for place, _, names in os.walk(folder, onerror=refuse):
        for path in (Path(place, name) for name in names if is_picture(name)):
            if stat.S_ISREG((status := path.stat()).st_mode):
                found[path.relative_to(folder).as_posix()] = status
    return found


def open_zip(path):
    """The zip at `path`. Raises UserError where it is none, or damaged."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, EOFError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is neither a folder of pictures nor a whole zip of them ({error})") from error


class Pictures:
    """The pictures of a zip, or of a folder and its subfolders: sorted `names`, and a `stamp` that changes when they do."""

    def __init__(self, source):
        from PIL import Image
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # otherwise only a warning, up to twice Pillow's bound
        self.source, self.archive = Path(os.path.realpath(source)), None
        try:
            status = source.stat()
            if stat.S_ISDIR(status.st_mode):
                found = regular_pictures(source)
                self.names, statuses = sorted(found), list(found.values())
            elif stat.S_ISREG(status.st_mode):
                self.archive = open_zip(source)
                self.names, statuses = sorted(filter(is_picture, self.archive.namelist())), [status]
            else:
                raise UserError(f"{source} is neither a folder nor a file; name a folder of pictures or a zip of them")
        except OSError as error:
            mend = "name a folder of pictures or a zip of them" if error.errno == errno.ENOENT else "mend it or take it away"
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); {mend}") from error
        newest = max((status.st_mtime_ns for status in statuses), default=0)
        self.stamp = [len(self.names), sum(status.st_size for status in statuses), newest]

    def read(self, name):
        """The bytes of a picture's file. Raises UserError for a file too large for a picture, and for an encrypted one."""
        path = Path(f"{self.source}/{name}")
        member = self.archive and self.archive.getinfo(name)
        size = member.file_size if member else path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than {MAX_PICTURE_BYTES:,}; make it smaller or take it away")
        if not member:
            return path.read_bytes()
        if member.flag_bits & 1:
            raise UserError(f"{path} is encrypted; unpack the zip and name the folder")
        content = io.BytesIO()
        try:
            with self.archive.open(member) as file:
                shutil.copyfileobj(file, content, 4096)  # small reads: LZMA and bzip2 expand all that one read takes
        except NotImplementedError as error:
            raise UserError(f"{path} cannot be unpacked by Python ({error}); unpack the zip and name the folder") from error
        return content.getvalue()

    def open(self, name):
        """A picture as RGB, turned upright.

        Raises UserError for one that is damaged, of an absurd size, or of more than 8 bits a channel, which Pillow would clip.
        """
        from PIL import Image, ImageOps
        file = f"{self.source}/{name}"
        try:
            picture = Image.open(io.BytesIO(self.read(name)))
            if picture.mode.startswith(("I", "F")):
                raise UserError(f"{file} has more than 8 bits a channel; save it with 8 first")
            if max(picture.size) > MAX_PICTURE_ASPECT * min(picture.size):
                raise UserError(f"{file} has {picture.width}x{picture.height} pixels, too long for a square; take it away")
            return ImageOps.exif_transpose(picture).convert("RGB")
        except (UserError, MemoryError):
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UserError(f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller or take it away") from error
        except Exception as error:  # the readers raise almost anything, depending on the format and the damage
            raise UserError(f"{file} is damaged ({type(error).__name__})") from error

    def convert(self, data, train, test, size, split):
        """ImageData of the named pictures, resized and cropped; from the cache, or converted and cached."""
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
    """Resize the short side to `size` and crop the central square, bit for bit as torchvision does: uint8 [3, size, size]."""
    from PIL import Image
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    crop = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(crop).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------- arrays that are made once and kept


def cache_folder():
    """The folder for what is made once and can be made again: $VSM_CACHE, or ./cache."""
    return Path(os.environ.get("VSM_CACHE", "cache"))


def cache_path(source):
    """The path of the converted array of `source` (None: the glyphs). The mode is checked because root may write anywhere."""
    if source and "VSM_CACHE" not in os.environ and os.access(source.parent, os.W_OK) and source.parent.stat().st_mode & 0o222:
        return source.with_name(f"{source.name}.converted.npy")
    name = f"{source.name}-{zlib.crc32(os.fsencode(source)):08x}" if source else "glyphs"
    return cache_folder() / f"{name}.npy"


def cached(path, recipe, shape, rows):
    """The array of this recipe and shape at `path`, memory-mapped; where it is not there, it is made from the arrays of rows().

    The file is written whole or not at all; one process writes it, the others wait. Raises UserError where that fails.
    """
    if (images := read_cache(path, recipe, shape)) is not None:
        return images
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_cache(path, recipe, shape) is None:
                print(f"making {path}; this happens once", file=sys.stderr)
                write_cache(path, recipe, shape, rows())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); set VSM_CACHE to a folder with room") from error
    return np.load(path, mmap_mode="r")


def read_cache(path, recipe, shape):
    """The cached array, or None where it is absent, of another recipe, or damaged."""
    try:
        images = np.load(path, mmap_mode="r")
        same_recipe = json.loads(path.with_suffix(".json").read_text()) == recipe
    except Exception:  # the readers raise almost anything, depending on the damage; a damaged cache is made again
        return None
    whole = images.shape == shape and images.dtype == np.uint8 and images.flags.c_contiguous
    return images if same_recipe and whole else None


def write_cache(path, recipe, shape, rows):
    """Write the arrays `rows` as one uint8 array to `path`, and then the recipe beside it."""
    path.with_suffix(".json").unlink(missing_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:  # not memory-mapped: a full disk would then be a SIGBUS
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.writelines(row.tobytes() for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(path.with_suffix(".json"), json.dumps(recipe, indent=1).encode())


# --------------------------------------------------------------------------------------------------------------- glyphs


def load_glyphs():
    """70,000 drawn digits. A change of vsm/glyphs.py must raise the version in the recipe; otherwise old caches stay in use."""
    recipe = {"name": "glyphs", "source": f"digits of {len(FONTS)} fonts, affine jitter (version 2), seed 0",
              "size": [1, 32, 32], "crop": None, "filter": None, "pad": 2, "split": "60,000 + 10,000 independent draws"}
    images = cached(cache_path(None), dict(recipe, fonts=FONTS), (70_000, 1, 32, 32), lambda: draw_glyphs(70_000))
    labels = np.arange(70_000) % 10
    return ImageData(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:], recipe)
