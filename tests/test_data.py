import errno
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

import data
from vsm.cli import UserError

REAL = Path(os.environ.get("VSM_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


def real(path):
    return pytest.mark.skipif(not (REAL / path).exists(), reason=f"no {path} in {REAL}; $VSM_DATA may name another folder")


def one_line(error, *words):
    """The text of a UserError is one line and says these words."""
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """No cache and no network beside the test's own; hosts that are asked for do not exist."""
    monkeypatch.setenv("VSM_CACHE", str(tmp_path / "cache"))
    for mirrors in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(mirrors, "mirrors", ["http://localhost:9/"])


# ---- idx files ----

def write_idx(root, compress=False, n_train=12, n_test=5, folder="MNIST"):
    rng, raw = np.random.default_rng(0), root / folder / "raw"
    raw.mkdir(parents=True)
    arrays = {"train-images-idx3-ubyte": rng.integers(0, 256, (n_train, 28, 28), np.uint8),
              "train-labels-idx1-ubyte": rng.integers(0, 10, n_train).astype(np.uint8),
              "t10k-images-idx3-ubyte": rng.integers(0, 256, (n_test, 28, 28), np.uint8),
              "t10k-labels-idx1-ubyte": rng.integers(0, 10, n_test).astype(np.uint8)}
    for name, array in arrays.items():
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        if compress:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_idx_values_padding_and_limits(tmp_path, compress):
    arrays = write_idx(tmp_path, compress)
    images = data.load_images("mnist", tmp_path)
    assert images.train.shape == (12, 1, 32, 32) and images.train.dtype == torch.uint8
    assert images.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(images.train[:, 0, 2:30, 2:30], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(images.test[:, 0, 2:30, 2:30], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(images.train_labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(images.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert images.train.sum() == images.train[:, :, 2:30, 2:30].sum()
    few = data.load_images("mnist", tmp_path, limit=4, test_limit=2)
    assert torch.equal(few.train, images.train[:4]) and torch.equal(few.test_labels, images.test_labels[:2])
    assert few.recipe["counts"] == {"train": 4, "test": 2} and few.recipe["pad"] == 2
    assert json.loads(json.dumps(few.recipe)) == few.recipe and str(tmp_path) not in json.dumps(few.recipe)


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_missing_without_network_says_the_layout(tmp_path, name):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load_images(name, tmp_path / "nowhere")
    folder = tmp_path / "nowhere" / {"mnist": "MNIST", "fashion": "FashionMNIST"}[name] / "raw"
    one_line(error, folder, "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", ".gz")
    assert not (tmp_path / "nowhere").exists() and time.monotonic() - start < 20


def test_download_fills_the_gaps_and_overwrites_nothing(tmp_path, monkeypatch, capfd):
    source = write_idx(tmp_path / "mirror")
    write_idx(tmp_path / "root", n_train=7)
    raw = tmp_path / "root" / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").unlink()

    class Mirror:
        def __init__(self, root, download):
            self.raw_folder = tmp_path / "mirror" / "MNIST" / "raw"
            print("100%", file=sys.stderr)

    monkeypatch.setattr(datasets, "MNIST", Mirror)
    images = data.load_images("mnist", tmp_path / "root")
    assert len(images.train) == 7 and "100%" not in capfd.readouterr().err
    np.testing.assert_array_equal(images.test_labels, source["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("damage", ["cut", "empty", "html", "labels", "count"])
def test_damaged_idx_names_the_file(tmp_path, damage):
    arrays = write_idx(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    labels = path.with_name("train-labels-idx1-ubyte")
    fewer = struct.pack(">HBB3I", 0, 8, 3, 11, 28, 28) + arrays["train-images-idx3-ubyte"][:11].tobytes()
    path.write_bytes({"cut": path.read_bytes()[:-9], "empty": b"", "html": b"<html>quota exceeded</html>",
                      "labels": labels.read_bytes(), "count": fewer}[damage])
    with pytest.raises(UserError) as error:
        data.load_images("mnist", tmp_path)
    one_line(error, path)


def test_damaged_gz_names_the_file(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError) as error:
        data.load_images("mnist", tmp_path)
    one_line(error, path, "damaged")


@real("MNIST/raw")
def test_real_mnist_is_torchvisions():
    images, theirs = data.load_images("mnist", REAL), datasets.MNIST(REAL, train=False)
    assert images.train.shape == (60000, 1, 32, 32) and images.train_labels.bincount().min() > 5000
    assert torch.equal(images.test[:, 0, 2:30, 2:30], theirs.data) and torch.equal(images.test_labels, theirs.targets)


@real("FashionMNIST/raw")
def test_real_fashion():
    images = data.load_images("fashion", REAL, limit=100)
    assert images.train.shape == (100, 1, 32, 32) and images.test.shape == (10000, 1, 32, 32)


# ---- CelebA and folders ----

NUMBERS = [1, 7, 162770, 162771, 182637, 182638, 202599]  # the ends of the three official splits


def picture(number, width=89, height=109):
    """A picture whose colour tells its number."""
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 196, 3)
    return Image.fromarray(noise.astype(np.uint8))


def jpeg(number, **size):
    buffer = io.BytesIO()
    picture(number, **size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_celeba(root, layout, numbers=NUMBERS):
    """CelebA in a layout; what to name as data root."""
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


@pytest.mark.parametrize("size", [(178, 218), (218, 178), (64, 64), (65, 64), (40, 30), (64, 131), (500, 333)])
def test_resize_and_crop_is_torchvisions_to_the_bit(size):
    image = picture(3, *size)
    square = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()])
    np.testing.assert_array_equal(data.resize_and_crop(image, 64), square(image))


def test_cache_is_reused_and_follows_the_source(tmp_path, monkeypatch):
    root = write_celeba(tmp_path / "root", "folder")
    first = data.load_images("celeba", root)
    with monkeypatch.context() as patch:
        patch.setattr(data, "resize_and_crop", None)  # whoever converts again fails
        again = data.load_images("celeba", root, limit=1)
    assert torch.equal(again.train, first.train[:1]) and torch.equal(again.test, first.test)
    path = root / "celeba" / "img_align_celeba" / "000001.jpg"
    path.write_bytes(jpeg(5))  # as many bytes or not, it is younger
    assert torch.equal(data.load_images("celeba", root).train[0], expected(5))
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


def cache_holds_nothing(folder):
    return not [path for path in folder.iterdir() if path.suffix in (".npy", ".json", ".tmp")]


@pytest.mark.parametrize("failure", [RuntimeError("midway"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch, failure):
    root, convert, calls = write_celeba(tmp_path / "root", "folder"), data.resize_and_crop, []

    def fails_midway(image, size):
        calls.append(image)
        if len(calls) == 3:
            raise failure
        return convert(image, size)

    with monkeypatch.context() as patch:
        patch.setattr(data, "resize_and_crop", fails_midway)
        with pytest.raises(UserError if isinstance(failure, OSError) else RuntimeError) as error:
            data.load_images("celeba", root)
        if isinstance(failure, OSError):
            one_line(error, "No space left", "VSM_CACHE")
    assert cache_holds_nothing(tmp_path / "cache")
    assert len(data.load_images("celeba", root).train) == 3


def start_slow_conversion(root):
    slow = f"""
import time, data
convert = data.resize_and_crop
data.resize_and_crop = lambda image, size: (time.sleep(0.4), convert(image, size))[1]
print(data.load_images("celeba", {str(root)!r}).train.sum().item())
"""
    return subprocess.Popen([sys.executable, "-c", slow], cwd=Path(data.__file__).parent, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_conversion_is_done_again(tmp_path):
    root, cache = write_celeba(tmp_path / "root", "folder"), tmp_path / "cache"
    process = start_slow_conversion(root)
    while not list(cache.glob("*.tmp")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    assert process.communicate()[0] == "" and not list(cache.glob("*.npy"))
    assert torch.equal(data.load_images("celeba", root).train[0], expected(1)) and not list(cache.glob("*.tmp"))


def test_two_processes_share_one_conversion(tmp_path):
    root = write_celeba(tmp_path / "root", "folder")
    outputs = [process.communicate() for process in [start_slow_conversion(root), start_slow_conversion(root)]]
    assert outputs[0][0] == outputs[1][0] != "" and sum("making" in err for _, err in outputs) == 1


@pytest.mark.parametrize("layout", ["folder", "zip"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_damaged_jpeg_names_the_file(tmp_path, layout, damage, monkeypatch):
    broken = {"cut": jpeg(7)[:-300], "junk": b"<html>"}[damage]
    whole = jpeg
    monkeypatch.setitem(globals(), "jpeg", lambda number: broken if number == 7 else whole(number))
    root = write_celeba(tmp_path / "root", layout)
    with pytest.raises(UserError) as error:
        data.load_images("celeba", root)
    one_line(error, "img_align_celeba", "000007.jpg", "damaged")
    assert cache_holds_nothing(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut", "html", "bytes"])
def test_damaged_zip_names_the_file(tmp_path, damage):
    path = write_celeba(tmp_path / "root", "root-zip")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255  # in the first member: its checksum fails
    path.write_bytes({"cut": whole[:-50], "html": b"<html>quota</html>", "bytes": bytes(flipped)}[damage])
    with pytest.raises(UserError) as error:
        data.load_images("celeba", tmp_path / "root")
    one_line(error, path, "202599.jpg" if damage == "bytes" else "zip")


def test_missing_celeba_says_the_layout(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere", write_celeba(tmp_path / "train-only", "folder", numbers=[1, 2])):
        with pytest.raises(UserError) as error:
            data.load_images("celeba", root)
        one_line(error, root, "celeba/img_align_celeba/NNNNNN.jpg", "img_align_celeba.zip", "162770", "182638")


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
    np.testing.assert_array_equal(images.test[0], data.resize_and_crop(picture(0, 80, 120), 64))  # a00.png, the first by path
    np.testing.assert_array_equal(images.test[1], data.resize_and_crop(picture(9, 89, 120).convert("L").convert("RGB"), 64))
    assert torch.equal(data.load_images(f"folder:{folder}", limit=5, test_limit=1).train, images.train[:5])
    small = tmp_path / "small"
    small.mkdir()
    for i in range(2):
        picture(i, 40, 36).save(small / f"{i}.png")
    assert data.load_images(f"folder:{small}").train.shape == (1, 3, 32, 32)


def test_what_would_be_read_wrongly_is_refused(tmp_path):
    for i in range(3):
        picture(i, 64, 64).save(tmp_path / f"{i}.png")
    Image.fromarray(np.full((64, 64), 30_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError) as error:
        data.load_images(f"folder:{tmp_path}")
    one_line(error, tmp_path / "deep.png", "more than 8 bits")
    (tmp_path / "deep.png").unlink()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError) as error:
        data.load_images(f"folder:{tmp_path}")
    one_line(error, tmp_path / "link.png", "cannot be read")


def test_rotated_by_its_camera(tmp_path):
    upright = picture(1, 64, 100)
    for i in range(2):
        exif = Image.Exif()
        exif[0x0112] = 8  # shown upright after a quarter turn
        upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"{i}.png", exif=exif)
    np.testing.assert_array_equal(data.load_images(f"folder:{tmp_path}").train[0], data.resize_and_crop(upright, 64))


@pytest.mark.parametrize("name", ["svhn", "folder:", "folder:/no/such/folder", "folder:{empty}"])
def test_unknown_and_empty(tmp_path, name):
    with pytest.raises(UserError) as error:
        data.load_images(name.format(empty=tmp_path), tmp_path)
    one_line(error, name.removeprefix("folder:").format(empty=tmp_path))


def test_negative_limit(tmp_path):
    with pytest.raises(UserError) as error:
        data.load_images("mnist", tmp_path, limit=-1)
    one_line(error, "-1")


def test_unwritable_cache(tmp_path, monkeypatch):
    root = write_celeba(tmp_path / "root", "folder")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VSM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as error:
        data.load_images("celeba", root)
    one_line(error, tmp_path / "file", "VSM_CACHE")


@real("celeba_originals.zip")
def test_real_celeba_originals_agree_with_the_resized_ones():
    originals = data.load_images("celeba", REAL / "celeba_originals.zip")
    assert len(originals.train) + len(originals.test) <= 64 and originals.train.shape[1:] == (3, 64, 64)
    resized, names = data.Pictures(REAL / "celeba" / "img_align_celeba.zip"), data.Pictures(REAL / "celeba_originals.zip").names
    for name, image in zip(names[:5], originals.train[:5]):
        difference = image.float() - torch.from_numpy(data.resize_and_crop(resized.open(name), 64).astype(np.float32))
        assert difference.abs().mean() < 4  # theirs went through JPEG again


# ---- glyphs ----

def glyphs(count, **options):
    return torch.from_numpy(np.concatenate(list(data.draw_glyphs(count, **options))))


def test_glyphs_are_drawn_alike_every_time():
    images = glyphs(64)
    assert images.shape == (64, 1, 32, 32) and images.dtype == torch.uint8
    assert images.sum() == images[:, :, 2:30, 2:30].sum()  # zero padding, as MNIST's
    assert torch.equal(glyphs(30, batch=7), images[:30])
    assert not torch.equal(glyphs(64, seed=1), images) and len(images.unique(dim=0)) == 64
    ink = images.flatten(1).float().mean(1) / 255
    assert ink.min() > 0.02 and ink.max() < 0.3


def test_glyphs_can_be_told_apart():
    images, labels = glyphs(3000).flatten(1).float(), torch.arange(3000) % 10
    means = torch.stack([images[:2000][labels[:2000] == digit].mean(0) for digit in range(10)])
    guessed = torch.cdist(images[2000:], means).argmin(1)
    assert 0.6 < (guessed == labels[2000:]).float().mean() < 0.999


def test_every_glyph_font_has_its_own_digits():
    atlas = glyphs_module.glyph_atlas()
    assert atlas.shape == (21, 10, 1, 84, 84)
    assert len(atlas.flatten(2).flatten(0, 1).unique(dim=0)) == 210
    assert atlas[..., [0, -1], :].max() == atlas[..., [0, -1]].max() == 0  # none is cut


def test_load_glyphs(tmp_path, monkeypatch):
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs", lambda count: (np.broadcast_to(batch, (count, 1, 32, 32)) for batch in draw(1)))
    images = data.load_images("glyphs", limit=30, test_limit=20)
    assert images.train.shape == (30, 1, 32, 32) and images.test.shape == (20, 1, 32, 32)
    assert images.train_labels.tolist() == [*range(10)] * 3 and images.test_labels.tolist() == [*range(10)] * 2
    assert images.recipe["name"] == "glyphs" and images.recipe["counts"] == {"train": 30, "test": 20}


@pytest.mark.slow
def test_all_glyphs_in_a_minute():
    start = time.monotonic()
    images = data.load_images("glyphs")
    assert time.monotonic() - start < 60 and images.train.shape == (60000, 1, 32, 32) and images.test.shape == (10000, 1, 32, 32)
    assert len(torch.cat([images.train, images.test]).flatten(1).unique(dim=0)) > 69990  # train and test share no draw
