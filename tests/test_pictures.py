"""CelebA, folders and zips of pictures: layouts, conversion, the cache, and everything that cannot be read."""

import errno
import io
import json
import multiprocessing
import os
import re
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import data
from small_runs import REAL, real
from test_data import refused, scratch  # noqa: F401
from vsm import pictures
from vsm.cli import UserError
from vsm.names import short_name
from vsm.pictures import Pictures
from vsm.runs import identity_of

NUMBERS = [1, 7, 162770, 162771, 182637, 182638, 202599]  # the ends of the three official splits


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "FEWEST_PICTURES", 2)


def picture(number, width=89, height=109):
    """A picture whose colour tells its number."""
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 196, 3)
    return Image.fromarray(noise.astype(np.uint8))


def write_pictures(folder, numbers, **size):
    """Pictures 00.bmp, 01.bmp and so on of a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(numbers):
        picture(number, **size).save(os.fsencode(folder / f"{i:02d}.bmp"))
    return folder


def jpeg(number, **size):
    buffer = io.BytesIO()
    picture(number, **size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_celeba(root, layout, numbers=NUMBERS):
    """Write CelebA in a layout and return what a user names as data root."""
    files = {f"{number:06d}.jpg": jpeg(number) for number in reversed(numbers)}
    if layout.endswith("zip"):
        path = root / "celeba" / "img_align_celeba.zip"
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"img_align_celeba/{name}", content)
                archive.writestr(f"__MACOSX/img_align_celeba/._{name}", b"junk")
        return {"zip": root, "root-zip": path}[layout]
    path = root / "celeba" / "img_align_celeba" / ("img_align_celeba" if layout == "nested" else "")
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return {"folder": root, "parent": root / "celeba", "root-folder": path, "nested": root}[layout]


def expected(number, size=64):
    square = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    return square(Image.open(io.BytesIO(jpeg(number))))


@pytest.mark.parametrize("layout", ["folder", "parent", "root-folder", "nested", "zip", "root-zip"])
def test_celeba_official_split_and_recipe(tmp_path, layout):
    images = data.load_images("celeba", write_celeba(tmp_path / "root", layout))
    assert images.train.shape == (3, 3, 64, 64) and images.train.dtype == torch.uint8 and images.train_labels is None
    assert torch.equal(images.train, torch.stack([expected(i) for i in (1, 7, 162770)]))
    assert torch.equal(images.test, torch.stack([expected(i) for i in (182638, 202599)]))
    recipe = images.recipe
    assert recipe["counts"] == {"train": 3, "test": 2} and "centre 64x64" in recipe["crop"] and "bilinear" in recipe["filter"]
    assert json.loads(json.dumps(recipe)) == recipe and str(tmp_path) not in json.dumps(recipe)


@pytest.mark.parametrize("size", [(178, 218), (218, 178), (64, 64), (65, 64), (40, 30), (64, 131), (131, 64), (500, 333)])
def test_resize_and_crop_is_torchvisions_to_the_bit(size):
    image = picture(3, *size)
    square = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()])
    np.testing.assert_array_equal(pictures.resize_and_crop(image, 64), square(image))


def test_cache_is_reused_and_follows_the_source(tmp_path, monkeypatch):
    root = write_celeba(tmp_path / "root", "folder")
    first = data.load_images("celeba", root)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "resize_and_crop", None)  # whoever converts again fails
        again = data.load_images("celeba", root, limit=1)
    assert torch.equal(again.train, first.train[:1]) and torch.equal(again.test, first.test)
    path = root / "celeba" / "img_align_celeba" / "000001.jpg"
    size = path.stat().st_size
    other = next(number for number in range(10, 100) if len(jpeg(number)) <= size)
    path.write_bytes(jpeg(other).ljust(size, b"\0"))  # as many bytes, but younger
    assert torch.equal(data.load_images("celeba", root).train[0], expected(other))
    dates = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(jpeg(6).ljust(size + 1, b"\0"))
    os.utime(path, ns=dates)  # as old, but longer
    assert torch.equal(data.load_images("celeba", root).train[0], expected(6))
    path.with_name("000002.jpg").write_bytes(jpeg(2))
    assert len(data.load_images("celeba", root).train) == 4
    [cache] = (tmp_path / "cache").glob("*.npy")
    cache.write_bytes(cache.read_bytes()[:-1])
    assert torch.equal(data.load_images("celeba", root).train[1], expected(2))


def test_cache_lies_beside_the_data_or_where_it_may_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("VSM_CACHE")
    monkeypatch.chdir(tmp_path)
    root = write_celeba(tmp_path / "root", "zip")
    data.load_images("celeba", root)
    assert (root / "celeba" / "img_align_celeba.zip.converted.npy").exists() and not Path("cache").exists()
    for path in (root / "celeba").glob("*converted*"):
        path.unlink()
    (root / "celeba").chmod(0o555)
    data.load_images("celeba", root)
    assert len(list(Path("cache").glob("*.npy"))) == 1 and len(list((root / "celeba").iterdir())) == 1
    monkeypatch.setenv("VSM_CACHE", "cache")
    [(tmp_path / name / "pics").mkdir(parents=True) for name in "ab"]
    assert Pictures(tmp_path / "a" / "pics").cache_path() != Pictures(tmp_path / "b" / "pics").cache_path()


def cache_holds_nothing(folder):
    return not [path for path in folder.iterdir() if path.suffix in (".npy", ".json", ".tmp")]


@pytest.mark.parametrize("failure", [RuntimeError("midway"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch, failure):
    root, convert, calls = write_celeba(tmp_path / "root", "folder"), pictures.resize_and_crop, []

    def fails_midway(image, size):
        calls.append(image)
        if len(calls) == 3:
            raise failure
        return convert(image, size)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "resize_and_crop", fails_midway)
        if isinstance(failure, OSError):
            refused(["No space left", "VSM_CACHE"], "celeba", root)
        else:
            with pytest.raises(RuntimeError):
                data.load_images("celeba", root)
    assert cache_holds_nothing(tmp_path / "cache") and len(data.load_images("celeba", root).train) == 3


def start_slow_conversion(root, log):
    """A process that converts, a tenth of a second a picture; it appends what it says, and the images' sum, to the file `log`."""
    def convert_slowly():
        sys.stderr, convert = open(log, "a"), pictures.resize_and_crop
        pictures.resize_and_crop = lambda image, size: (time.sleep(0.1), convert(image, size))[1]
        print("sum", data.load_images("celeba", root).train.sum().item(), file=sys.stderr, flush=True)

    process = multiprocessing.get_context("fork").Process(target=convert_slowly)
    process.start()
    return process


def test_a_killed_conversion_is_done_again(tmp_path):
    root, cache = write_celeba(tmp_path / "root", "folder"), tmp_path / "cache"
    process = start_slow_conversion(root, tmp_path / "log")
    while not list(cache.glob("*.tmp")):
        time.sleep(0.02)
        assert process.is_alive()
    process.kill()
    process.join()
    assert "sum" not in (tmp_path / "log").read_text() and not list(cache.glob("*.npy"))
    assert torch.equal(data.load_images("celeba", root).train[0], expected(1)) and not list(cache.glob("*.tmp"))


def test_two_processes_share_one_conversion(tmp_path):
    root = write_celeba(tmp_path / "root", "folder")
    for process in [start_slow_conversion(root, tmp_path / f"log{i}") for i in range(2)]:
        process.join()
    texts = [(tmp_path / f"log{i}").read_text() for i in range(2)]
    assert sum(text.count("making") for text in texts) == 1
    sums = [re.search(r"sum (\d+)", text)[1] for text in texts]
    assert sums[0] == sums[1] == str(data.load_images("celeba", root).train.sum().item())


@pytest.mark.parametrize("layout", ["folder", "zip"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_damaged_jpeg_names_the_file(tmp_path, layout, damage, monkeypatch):
    broken, whole = {"cut": jpeg(7)[:-300], "junk": b"<html>"}[damage], jpeg
    monkeypatch.setitem(globals(), "jpeg", lambda number: broken if number == 7 else whole(number))
    refused(["img_align_celeba", "000007.jpg", "damaged"], "celeba", write_celeba(tmp_path / "root", layout))
    assert cache_holds_nothing(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut", "html", "bytes"])
def test_damaged_zip_names_the_file(tmp_path, damage):
    path = write_celeba(tmp_path / "root", "root-zip")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255  # in the first member: its checksum fails
    path.write_bytes({"cut": whole[:-50], "html": b"<html>quota</html>", "bytes": bytes(flipped)}[damage])
    refused([path, "202599.jpg" if damage == "bytes" else "zip"], "celeba", tmp_path / "root")


def test_missing_celeba_says_the_layout(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere", write_celeba(tmp_path / "train-only", "folder", numbers=[1, 2])):
        refused([root, "celeba/img_align_celeba/NNNNNN.jpg", "img_align_celeba.zip", "162770", "182638"], "celeba", root)


def test_folder_of_any_pictures(tmp_path):
    folder = tmp_path / "any"
    (folder / "below").mkdir(parents=True)
    for i in range(11):
        image = picture(i, 80 + i, 120)
        image = [image, image.convert("L"), image.convert("RGBA"), image.convert("P")][i % 4]
        image.save(folder / (f"below/{i:02d}.PNG" if i % 2 else f"a{i:02d}.png"))
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    images = data.load_images(f"folder:{folder}")
    assert images.train.shape == (9, 3, 64, 64) and images.test.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(images.test[0], pictures.resize_and_crop(picture(0, 80, 120), 64))  # a00.png, the first by path
    np.testing.assert_array_equal(images.test[1], pictures.resize_and_crop(picture(9, 89, 120).convert("L").convert("RGB"), 64))
    assert torch.equal(data.load_images(f"folder:{folder}", limit=5, test_limit=1).train, images.train[:5])
    small = write_pictures(tmp_path / "small", range(2), width=80, height=36)
    assert data.load_images(f"folder:{small}").train.shape == (1, 3, 32, 32)


def test_what_would_be_read_wrongly_is_refused(tmp_path):
    write_pictures(tmp_path, range(3), width=64, height=64)
    Image.fromarray(np.full((64, 64), 30_000, np.uint16)).save(tmp_path / "deep.png")
    refused([tmp_path / "deep.png", "more than 8 bits"], f"folder:{tmp_path}")
    (tmp_path / "deep.png").unlink()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    refused([tmp_path / "link.png", "cannot be read"], f"folder:{tmp_path}")


def zip_of(path, pictures, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return path


def patched_zip(path, changes):
    """Change both headers of a zip's first member: {offset in the central header: value}; in the local one it lies 2 before."""
    content = bytearray(path.read_bytes())
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    for offset, value in changes.items():
        content[central + offset:central + offset + len(value)] = value
        content[local + offset - 2:local + offset - 2 + len(value)] = value
    path.write_bytes(content)


def bitmap(width, height):
    """A BMP header that promises so many pixels, without them."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("compression", "changes", "words"), [
    (zipfile.ZIP_STORED, {8: b"\1\0"}, "encrypted"),
    (zipfile.ZIP_STORED, {10: b"\x09\0"}, "cannot be unpacked"),  # deflate64
    (zipfile.ZIP_LZMA, None, "damaged (LZMAError)"),
    (zipfile.ZIP_BZIP2, None, "damaged"),
    (zipfile.ZIP_DEFLATED, None, "damaged")])
def test_zips_that_cannot_be_unpacked_name_the_picture(tmp_path, compression, changes, words):
    path = zip_of(tmp_path / "some.zip", {"a.png": jpeg(1), "b.png": jpeg(2)}, compression)
    if changes:
        patched_zip(path, changes)
    else:
        content = bytearray(path.read_bytes())
        content[50:90] = bytes(40)
        path.write_bytes(content)
    refused([f"{path}/a.png", words], f"folder:{path}")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_every_packing_that_python_knows(tmp_path, compression):
    path = zip_of(tmp_path / "some.zip", {f"{i}.jpg": jpeg(i) for i in range(2)}, compression)
    assert torch.equal(data.load_images(f"folder:{path}").train[0], expected(1))


@pytest.mark.parametrize(("compression", "honest"), [
    (zipfile.ZIP_DEFLATED, True), (zipfile.ZIP_DEFLATED, False), pytest.param(zipfile.ZIP_LZMA, False, marks=pytest.mark.slow)])
def test_a_zip_bomb_is_not_unpacked(tmp_path, compression, honest, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 2**20)
    path = zip_of(tmp_path / "bomb.zip", {"a.png": bytes(2**27)}, compression)
    if not honest:
        patched_zip(path, {24: struct.pack("<I", 1000)})  # it says that it expands to 1000 bytes
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("b.png", jpeg(2))
    tracemalloc.start()
    refused([f"{path}/a.png", "134,217,728 bytes" if honest else "damaged"], f"folder:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27 * 0.6  # what LZMA makes of one step is 60 MB, however much follows


@pytest.mark.parametrize(("content", "words"), [
    (bitmap(20_000, 20_000), "pixels"), (bitmap(10_000, 10_000), "pixels"), (bitmap(70_000, 2), "70000x2 pixels"),
    (bytes(2**20 + 1), "1,048,577 bytes")])
def test_pictures_of_absurd_size(tmp_path, content, words, monkeypatch, recwarn):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 2**20)
    (tmp_path / "a.png").write_bytes(content)
    picture(1).save(tmp_path / "b.png")
    refused([tmp_path / "a.png", words], f"folder:{tmp_path}")
    assert not recwarn.list


def test_only_regular_files_count_and_linked_folders_are_not_followed(tmp_path):
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "x.png")
    write_pictures(folder / "folder.png", range(2))
    (folder / "linked.png").symlink_to(folder / "folder.png" / "00.bmp")
    assert Pictures(folder).names == ["folder.png/00.bmp", "folder.png/01.bmp", "linked.png"]
    assert data.load_images(f"folder:{folder}").recipe["counts"] == {"train": 2, "test": 1}
    (folder / "loop.png").symlink_to(folder / "loop.png")
    refused([folder / "loop.png"], f"folder:{folder}")


def test_a_folder_that_may_not_be_read_is_named_and_not_left_out(tmp_path, monkeypatch):
    scandir = os.scandir

    def refusing(path):  # a superuser, as tests may be, may read everything
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    (tmp_path / "below").mkdir()
    write_pictures(tmp_path, range(2))
    monkeypatch.setattr(os, "scandir", refusing)
    refused([f"{tmp_path}/below cannot be read (Permission denied)"], f"folder:{tmp_path}")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "{tmp}/loop", "{tmp}/" + "x" * 5000, "{tmp}/fifo", "{tmp}/\udcff"])
def test_paths_that_lead_nowhere(tmp_path, path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    path = path.format(tmp=tmp_path)
    refused([path], f"folder:{path}")


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = write_pictures(tmp_path / "\udcff", range(2))
    assert len(data.load_images(f"folder:{folder}").train) == 1 and short_name(f"folder:{folder}").startswith("folder-")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "webp", "tif"])
def test_damaged_pictures_never_end_in_a_traceback(tmp_path, extension):
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    picture(1, 40, 40).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension))
    path, whole = tmp_path / f"a.{extension}", np.frombuffer(buffer.getvalue(), np.uint8)
    path.write_bytes(whole)
    pictures, refused = Pictures(tmp_path), 0
    for _ in range(60):
        content = whole.copy()
        content[rng.integers(0, min(len(content), 300), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(content)
        try:
            assert pictures.open(path.name).mode == "RGB"
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused


def test_a_damaged_cache_is_made_again(tmp_path):
    root = write_celeba(tmp_path / "root", "folder")
    first = data.load_images("celeba", root)
    [cache] = (tmp_path / "cache").glob("*.npy")
    array, rng = np.load(cache), np.random.default_rng(0)
    for wrong in (array.astype(np.int8), np.asfortranarray(array), array[1:]):
        np.save(cache, wrong)
        assert torch.equal(data.load_images("celeba", root).train, first.train)
    whole = cache.read_bytes()
    for _ in range(30):
        content = bytearray(whole)
        content[rng.integers(0, 100)] = rng.integers(0, 256)
        cache.write_bytes(content)
        assert torch.equal(data.load_images("celeba", root).train, first.train)


def test_unwritable_cache(tmp_path, monkeypatch):
    root = write_celeba(tmp_path / "root", "folder")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VSM_CACHE", str(tmp_path / "file" / "cache"))
    refused([tmp_path / "file", "VSM_CACHE"], "celeba", root)


@real("celeba_originals.zip")
def test_real_celeba_originals_agree_with_the_resized_ones():
    originals = data.load_images("celeba", REAL / "celeba_originals.zip")
    assert len(originals.train) + len(originals.test) <= 64 and originals.train.shape[1:] == (3, 64, 64)
    resized, names = Pictures(REAL / "celeba" / "img_align_celeba.zip"), Pictures(REAL / "celeba_originals.zip").names
    for name, image in zip(names[:5], originals.train[:5]):
        difference = image.float() - torch.from_numpy(pictures.resize_and_crop(resized.open(name), 64).astype(np.float32))
        assert difference.abs().mean() < 4  # theirs went through JPEG again


def test_pictures_without_a_digest_are_told_apart_by_their_folder():
    one, other = ({"script": "spectrum", "flags": {"data": f"folder:/{name}"}} for name in "ab")
    assert identity_of(one) != identity_of(other)
    assert identity_of({**one, "data": {}}) != identity_of({**one, "data": {"digest": "1"}}) == (
        identity_of({**other, "data": {"digest": "1"}}))
