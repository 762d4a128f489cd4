"""The pictures of a folder or a zip: which files count, reading them, and making them squares of one size.

Pillow is imported where it is used, so that --help is fast.
"""

import errno
import io
import json
import os
import re
import shutil
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vsm.cache import cache_folder, cached, digest
from vsm.cli import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
HIDDEN = re.compile(r"(^|/)(\.(?!/)|__MACOSX|@eaDir)")  # in paths: files and folders in which programs keep their own pictures
NAMED_FILES = 10  # how many of the pictures that cannot be read one message names

# A small file can expand to many GB. These bounds are far above any real picture and below any real memory.
MAX_PICTURE_BYTES = 2**27
MAX_PICTURE_ASPECT = 100  # the long side over the short one, which becomes 32 or 64 pixels


def files_of(folder):
    """Yields the relative paths of the files in `folder` and its subfolders. Links to folders are not followed.

    Raises OSError for a folder that cannot be read.
    """
    def refuse(error):
        raise error

    root = os.path.join(folder, "")
    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not HIDDEN.match(name)]
        yield from (os.path.join(place, name)[len(root):] for name in names)


def sort_out(paths):
    """The sorted paths of pictures, by extension, and a Counter of the other files' extensions. Hidden files are left out."""
    paths = [path for path in paths if not (path.endswith("/") or HIDDEN.search(path))]
    pictures = sorted(path for path in paths if path.lower().endswith(EXTENSIONS))
    return pictures, Counter(Path(path).suffix.lower() or "without extension" for path in {*paths} - {*pictures})


def open_zip(path):
    """The zip at `path`. Raises UserError where it is none, or damaged."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, EOFError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is neither a folder of pictures nor a whole zip of them ({error})") from error


class Pictures:
    """The pictures of a zip, or of a folder and its subfolders, without hidden ones.

    names: their sorted paths. stamp: a digest of all names and sizes with, in a folder, the dates and, in a zip, the checksums.
    others: the numbers of the files that are no pictures, by extension.
    """

    def __init__(self, source):
        from PIL import Image
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # otherwise only a warning, up to twice Pillow's bound
        self.source, self.archive = Path(os.path.realpath(source)), None
        try:
            mode = source.stat().st_mode
            if stat.S_ISDIR(mode):
                names, self.others = sort_out(files_of(source))
                statuses = [(name, os.stat(os.path.join(source, name))) for name in names]
                stamp = [[name, status.st_size, status.st_mtime_ns] for name, status in statuses
                         if stat.S_ISREG(status.st_mode)]  # reading a FIFO named x.png would wait for ever
            elif stat.S_ISREG(mode):
                self.archive = open_zip(source)
                names, self.others = sort_out(self.archive.namelist())
                stamp = [[name, (member := self.archive.getinfo(name)).file_size, member.CRC] for name in names]
            else:
                raise UserError(f"{source} is neither a folder nor a file; name a folder of pictures or a zip of them")
        except OSError as error:
            absent = error.errno == errno.ENOENT and not source.exists()
            mend = "--data folder:PATH names a folder of pictures, or a zip of them" if absent else "mend it or take it away"
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); {mend}") from error
        self.names = [name for name, *_ in stamp]
        self.stamp = digest(np.frombuffer(json.dumps(stamp).encode(), np.uint8))

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
        """A picture as RGB, turned upright; of an animation, the first frame.

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

    def squares(self, names, size, recipe):
        """The named pictures as squares, uint8 [n, 3, size, size], and their digest: from the cache, or converted and cached.

        Raises UserError that names the pictures that cannot be read.
        """
        def square(name):
            try:
                return resize_and_crop(self.open(name), size)
            except UserError as error:
                return error

        def rows():
            if self.others:
                kinds = ", ".join(f"{count} {kind}" for kind, count in self.others.most_common())
                print(f"{self.source}: not read, since their names are not those of pictures: {kinds}", file=sys.stderr)
            refused = []
            with ThreadPool() as pool:  # Pillow decodes and resizes outside the interpreter's lock
                found = pool.imap(square, names, chunksize=16)
                for row in tqdm(found, f"converting {self.source.name}", len(names), unit="image", disable=None):
                    if isinstance(row, UserError):
                        refused.append(str(row))
                    elif not refused:
                        yield row
            if refused:
                more = f"; and {len(refused) - NAMED_FILES} more" if len(refused) > NAMED_FILES else ""
                raise UserError("; ".join(refused[:NAMED_FILES]) + more)

        return cached(self.cache_path(), dict(recipe, stamp=self.stamp), (len(names), 3, size, size), rows)

    def cache_path(self):
        """The path of the converted array: beside the source or, where that cannot be written, in the cache's folder."""
        parent = self.source.parent
        writable = os.access(parent, os.W_OK) and parent.stat().st_mode & 0o222  # the system lets root write anywhere
        if writable and "VSM_CACHE" not in os.environ:
            return self.source.with_name(f"{self.source.name}.converted.npy")
        return cache_folder() / f"{self.source.name}-{zlib.crc32(os.fsencode(self.source)):08x}.npy"


def resize_and_crop(picture, size):
    """Resize the short side to `size` and crop the central square, bit for bit as torchvision does: uint8 [3, size, size]."""
    from PIL import Image
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    crop = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(crop).transpose(2, 0, 1)
