"""The image data by name: idx files, glyphs, data sets of one's own, names and start-up. Pictures: test_pictures.py."""

import gzip
import importlib.util
import json
import os
import re
import socket
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import data
import evaluate
import train_images
from data import glyph_atlas
from small_runs import CPU, REAL, main, real, train_on, write_idx
from vsm import features
from vsm.cache import digest
from vsm.cli import UserError
from vsm.names import short_name


def refused(words, name, *args, **options):
    """Loading these images ends in an error of one line, which says all the words. Returns it."""
    with pytest.raises(UserError) as error:
        data.load_images(str(name), *args, **options)
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text
    return text


def test_noisy_images_are_in_the_unit_interval_but_for_their_noise():
    images = torch.arange(256, dtype=torch.uint8).repeat(40).reshape(40, 1, 16, 16)
    x, clean, standard = data.noisy(images, 0.3, torch.Generator().manual_seed(0))
    again, *_ = data.noisy(images, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(clean, images.double().div(255).float()) and clean.min() == 0 and clean.max() == 1
    assert torch.allclose(x - clean, 0.3 * standard, atol=1e-6) and torch.equal(x, again)
    assert abs(standard.mean()) < 0.04 and abs(standard.std() - 1) < 0.03  # four standard errors


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """No cache and no network beside the test's own; hosts that are asked for do not exist."""
    monkeypatch.setenv("VSM_CACHE", str(tmp_path / "cache"))
    for mirrors in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(mirrors, "mirrors", ["http://localhost:9/"])


def write_mnist(root, compress=False, n_train=12, n_test=5):
    """Random images and labels in MNIST's files; returns them by the name of their file."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n).astype(np.uint8)
    write_idx(root, arrays, compress)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_idx_values_padding_and_limits(tmp_path, compress):
    arrays, images = write_mnist(tmp_path, compress), data.load_images("mnist", tmp_path)
    assert images.train.shape == (12, 1, 32, 32) and images.train.dtype == torch.uint8
    assert images.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(images.train[:, 0, 2:30, 2:30], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(images.test[:, 0, 2:30, 2:30], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(images.train_labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(images.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert images.train.sum() == images.train[:, :, 2:30, 2:30].sum()
    few = data.load_images("mnist", tmp_path, limit=4, test_limit=2)
    assert torch.equal(few.train, images.train[:4]) and torch.equal(few.test_labels, images.test_labels[:2])
    assert torch.equal(few.test, images.test[:2]) and torch.equal(few.train_labels, images.train_labels[:4])
    assert few.recipe["counts"] == {"train": 4, "test": 2} and few.recipe["pad"] == 2
    assert json.loads(json.dumps(few.recipe)) == few.recipe and str(tmp_path) not in json.dumps(few.recipe)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_the_digest_follows_every_pixel_and_no_limit(tmp_path, part):
    write_mnist(tmp_path)
    images, path = data.load_images("mnist", tmp_path), tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte"
    assert images.recipe["digest"] == digest(images.train, images.test)
    assert images.recipe["digest"] == data.load_images("mnist", tmp_path, 1, 1).recipe["digest"]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert data.load_images("mnist", tmp_path).recipe["digest"] != images.recipe["digest"]


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_missing_without_network_says_the_layout(tmp_path, name):
    start = time.monotonic()
    folder = tmp_path / "nowhere" / {"mnist": "MNIST", "fashion": "FashionMNIST"}[name] / "raw"
    refused([folder, "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", ".gz"], name, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists() and time.monotonic() - start < 20 and socket.getdefaulttimeout() is None


def test_download_fills_the_gaps_and_overwrites_nothing(tmp_path, monkeypatch, capfd):
    source = write_mnist(tmp_path / "mirror")
    write_mnist(tmp_path / "root", n_train=7)
    (tmp_path / "root" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()

    class Mirror:
        def __init__(self, root, download):
            self.raw_folder = tmp_path / "mirror" / "MNIST" / "raw"
            print("100%", file=sys.stderr)
    monkeypatch.setattr(datasets, "MNIST", Mirror)
    images = data.load_images("mnist", tmp_path / "root")
    assert len(images.train) == 7 and "100%" not in capfd.readouterr().err
    np.testing.assert_array_equal(images.test_labels, source["t10k-labels-idx1-ubyte"])


def test_damaged_gz_names_the_file(tmp_path):
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])
    refused([path, "damaged"], "mnist", tmp_path)


HEADER = struct.pack(">HBB3I", 0, 8, 3, 12, 28, 28)
WHOLE = HEADER + bytes(12 * 28 * 28)
DAMAGES = {"cut": (WHOLE[:-9], "fewer"), "empty": (b"", ""), "html": (b"<html>quota exceeded</html>", ""),
           "labels": (struct.pack(">HBBI", 0, 8, 1, 12) + bytes(12), ""),
           "count": (struct.pack(">HBB3I", 0, 8, 3, 11, 28, 28) + bytes(11 * 28 * 28), ""),
           "type": (WHOLE[:2] + b"\x0d" + WHOLE[3:], "0, 0, 8"), "magic": (b"\1" + WHOLE[1:], "0, 0, 8"),
           "long": (WHOLE + b"\0", "more"), "short": (WHOLE[:-1], "fewer"), "half header": (WHOLE[:9], ""),
           "huge": (WHOLE[:4] + b"\xff" + WHOLE[5:], "announces")}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_idx_names_the_file(tmp_path, damage, compress):
    write_mnist(tmp_path, compress)
    path, (content, words) = tmp_path / "MNIST" / "raw" / f"train-images-idx3-ubyte{'.gz' * compress}", DAMAGES[damage]
    path.write_bytes(gzip.compress(content) if compress else content)
    refused([path, words, *["damaged"] * (damage not in ("labels", "count"))], "mnist", tmp_path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(HEADER + bytes(2**26)))
    tracemalloc.start()
    refused([path, "more than the 9,408 bytes"], "mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_an_idx_file_is_a_regular_file(tmp_path, kind):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.unlink()
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    refused([path, "regular file"], "mnist", tmp_path)


@pytest.mark.parametrize(("name", "root", "options", "words"), [
    *((name, "{tmp}/" + "x" * 5000, {}, ["xxx", "File name too long"]) for name in ("mnist", "celeba")),
    ("svhn", "{tmp}", {}, ["svhn"]), ("folder:", "{tmp}", {}, []),
    ("folder:/no/such/folder", "{tmp}", {}, ["/no/such/folder"]), ("folder:{tmp}", "{tmp}", {}, ["{tmp}"])])
def test_unknown_empty_and_impossible_places(tmp_path, name, root, options, words):
    refused([word.format(tmp=tmp_path) for word in words], name.format(tmp=tmp_path), root.format(tmp=tmp_path), **options)


@real("MNIST/raw")
def test_real_mnist_is_torchvisions():
    images, theirs = data.load_images("mnist", REAL), datasets.MNIST(REAL, train=False)
    assert images.train.shape == (60000, 1, 32, 32) and images.train_labels.bincount().min() > 5000
    assert torch.equal(images.test[:, 0, 2:30, 2:30], theirs.data) and torch.equal(images.test_labels, theirs.targets)


@real("FashionMNIST/raw")
def test_real_fashion():
    images = data.load_images("fashion", REAL, limit=100)
    assert images.train.shape == (100, 1, 32, 32) and images.test.shape == (10000, 1, 32, 32)


def test_an_unknown_name_is_told_the_known_ones(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(data.DATA_SETS, "mine", None)
    message = fails(train_images, "--data", "svhn", "--data-root", tmp_path, "--out", tmp_path / "run")
    assert "mnist | fashion | celeba | glyphs | mine | folder:PATH" in message and not (tmp_path / "run").exists()


def example_of_the_documentation(folder):
    """The module that docs/data.md shows, loaded: it adds the data set `mine`."""
    [code] = re.findall(r"```python\n(.*?)```", (Path(data.__file__).parent / "docs" / "data.md").read_text(), re.DOTALL)
    (folder / "mine.py").write_text(code)
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def write_mine(root, classes=10):
    rng = np.random.default_rng(0)
    labels = {f"{part}_labels": np.arange(n) % classes for part, n in (("train", 120), ("test", 30))}
    images = {part: rng.integers(0, 256, (n, 1, 32, 32), np.uint8) for part, n in (("train", 120), ("test", 30))}
    np.savez(root / "mine.npz", **images, **labels)
    return images


def test_a_data_set_of_ones_own_from_training_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DATA_SETS", dict(data.DATA_SETS))
    example_of_the_documentation(tmp_path)
    images, loaded = write_mine(tmp_path), data.load_images("mine", tmp_path, limit=50)
    assert torch.equal(loaded.train, torch.from_numpy(images["train"][:50])) and len(loaded.test) == 30
    assert loaded.recipe["counts"] == {"train": 50, "test": 30} and loaded.recipe["source"] == "mine.npz"
    with pytest.raises(SystemExit):
        train_images.parse_args(["--help"])
    assert "mine | folder:PATH" in " ".join(capsys.readouterr().out.split())
    train_on(tmp_path, tmp_path / "run", "--data", "mine", "--epochs", 1)
    main(evaluate, tmp_path / "run", "--images", 10, "--iw-samples", 4, "--device", "cpu", "--out", tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mine |" in table and "LeNet-5 on mine" in table


def test_labels_that_a_lenet_cannot_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA_SETS", dict(data.DATA_SETS))
    example_of_the_documentation(tmp_path)
    write_mine(tmp_path, classes=11)
    with pytest.raises(UserError) as error:
        features.features_of("mine", tmp_path, CPU)
    assert re.fullmatch(r".*labels of mine.*0\.\.10.*0\.\.9.*", str(error.value))


def test_a_lenet_is_of_its_labels_and_has_its_accuracy_on_test_images(tmp_path, monkeypatch):
    monkeypatch.setenv("VSM_CACHE", str(tmp_path))
    zeros, trained = features.LeNet5().requires_grad_(False), []
    for p in zeros.parameters():
        p.zero_()  # every image is of class 0
    monkeypatch.setattr(features, "train_lenet5", lambda images, labels, name: (trained.append(labels.tolist()), zeros)[1])
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    for train_labels in ([0, 0, 0, 0], [0, 1, 1, 1]):
        whole = data.ImageData(images, images, torch.tensor(train_labels), torch.tensor([0, 0, 0, 1]), {"name": "mine"})
        monkeypatch.setitem(data.DATA_SETS, "mine", lambda root, whole=whole: whole)
        assert features.lenet5("mine", "")[1]["accuracy"] == 0.75
    assert trained == [[0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(("name", "channels", "labels", "network"), [
    ("grey", 1, True, "lenet"), ("colour", 3, True, "colour"), ("bare", 1, False, "colour")])
def test_the_data_choose_the_network_behind_fid(monkeypatch, tmp_path, name, channels, labels, network):
    images, digits = torch.zeros(4, channels, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64) if labels else None
    monkeypatch.setitem(data.DATA_SETS, name, lambda root: data.ImageData(images, images, digits, digits, {"name": name}))
    monkeypatch.setattr(features, "lenet5", lambda *_: (torch.nn.Linear(1, 1), {"name": "lenet"}))
    monkeypatch.setattr(features, "efficientnet", lambda: (torch.nn.Linear(1, 1), {"name": "colour"}))
    monkeypatch.setattr(features, "inception", lambda file: (torch.nn.Linear(1, 1), {"name": f"inception of {file}"}))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)

    def chosen(*weights):
        return features.features_of(name, "", CPU, *weights).description["name"]
    assert chosen() == network
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.touch()
    if network == "colour":
        assert (chosen(), chosen("mine.pth")) == (f"inception of {file}", "inception of mine.pth")
    else:
        assert chosen("mine.pth") == network


@pytest.mark.parametrize(("change", "words"), [
    ({"train": np.zeros((3, 1, 32, 32), np.float32)}, "float32"), ({"test": np.zeros((3, 32, 32), np.uint8)}, "[3, 32, 32]"),
    ({"test": np.zeros((0, 1, 32, 32), np.uint8)}, "no test images"), ({"train_labels": np.zeros(2, np.int64)}, "[2]"),
    ({"test_labels": np.zeros(3, np.uint8)}, "uint8")])
def test_a_loader_that_breaks_its_promise(monkeypatch, change, words):
    images, labels = np.zeros((3, 1, 32, 32), np.uint8), np.zeros(3, np.int64)
    whole = data.ImageData(images, images, labels, labels, {"name": "mine"})
    monkeypatch.setitem(data.DATA_SETS, "mine", lambda root: whole)
    assert data.load_images("mine").train.shape == (3, 1, 32, 32)
    monkeypatch.setitem(data.DATA_SETS, "mine", lambda root: whole._replace(**change))
    refused(["mine", words], "mine")


def test_short_names():
    assert [short_name(name) for name in data.DATA_SETS] == list(data.DATA_SETS)
    name = short_name("folder:/a/long path/with/many parts: of it")
    assert re.fullmatch(r"folder-many_parts_of_it-[0-9a-f]{6}", name)
    assert name == short_name("folder:/a/long path/with/many parts: of it") != short_name("folder:/b/many parts: of it")
    assert re.fullmatch(r"folder-[0-9a-f]{6}", short_name("folder:..")) and len(short_name(f"folder:{'x' * 5000}")) < 60


def test_digest_follows_every_tensor():
    a, b = torch.arange(6, dtype=torch.uint8), torch.arange(3)
    assert digest(a) == "17e88db187af" and digest(a.view(2, 3).T) == digest(torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.uint8))
    assert len({digest(a), digest(b), digest(a, b), digest(b, a), digest(a + 1)}) == 5


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


@pytest.mark.parametrize(("ink", "pixel"), [(1, 255), (0.25, 64), (0, 0)])
def test_ink_becomes_pixels(ink, pixel, monkeypatch):
    monkeypatch.setattr("data.F.grid_sample", lambda images, *_, **__: torch.full_like(images, ink))
    expected = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    expected[:, :, 2:30, 2:30] = pixel
    assert torch.equal(glyphs(3), expected)


def test_the_lenet_sees_numbers_from_0_to_1_without_the_padding():
    network = features.LeNet5()
    network.body = torch.nn.Identity()
    images = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    images[..., 2:-2, 2:-2] = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).repeat(7)
    assert torch.equal(network(images), torch.tensor([0, 0.2, 0.4, 1]).repeat(7).expand(1, 1, 28, 28))


def test_glyphs_can_be_told_apart():
    images, labels = glyphs(3000).flatten(1).float(), torch.arange(3000) % 10
    means = torch.stack([images[:2000][labels[:2000] == digit].mean(0) for digit in range(10)])
    assert 0.6 < (torch.cdist(images[2000:], means).argmin(1) == labels[2000:]).float().mean() < 0.999


def test_every_glyph_font_has_its_own_digits():
    atlas = glyph_atlas()
    assert atlas.shape == (21, 10, 1, 84, 84) and len(atlas.flatten(2).flatten(0, 1).unique(dim=0)) == 210
    assert atlas[..., [0, -1], :].max() == atlas[..., [0, -1]].max() == 0  # none is cut
    assert (atlas.amax((2, 3, 4)) == 1).all()  # ink is 255, and 1 here


def test_load_glyphs(tmp_path, monkeypatch):
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs", lambda count: (np.broadcast_to(batch, (count, 1, 32, 32)) for batch in draw(1)))
    images = data.load_images("glyphs", limit=30, test_limit=20)
    assert images.train.shape == (30, 1, 32, 32) and images.test.shape == (20, 1, 32, 32)
    assert images.train_labels.tolist() == [*range(10)] * 3 and images.test_labels.tolist() == [*range(10)] * 2
    assert images.recipe["name"] == "glyphs" and images.recipe["counts"] == {"train": 30, "test": 20}
    monkeypatch.setattr(data, "draw_glyphs", lambda count: [255 - images.train[:1].expand(count, 1, 32, 32).numpy()])
    assert torch.equal(data.load_images("glyphs", limit=30).train, images.train)  # from the cache
    monkeypatch.setattr(data, "FONTS", data.FONTS[::-1])
    assert torch.equal(data.load_images("glyphs", limit=1).train, 255 - images.train[:1])


@pytest.mark.slow
def test_all_glyphs_in_a_minute():
    start, images = time.monotonic(), data.load_images("glyphs")
    assert time.monotonic() - start < 60 and images.train.shape == (60000, 1, 32, 32) and images.test.shape == (10000, 1, 32, 32)
    assert len(torch.cat([images.train, images.test]).flatten(1).unique(dim=0)) > 69990  # train and test share no draw
