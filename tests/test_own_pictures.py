"""A user's own pictures: which files count, what the cache and a run know of them, and where they may move."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train_images
from examples import own_pictures
from small_runs import IMAGES, main
from studies import latent_scale
from test_data import refused, scratch  # noqa: F401
from test_pictures import cache_holds_nothing, few, picture, write_celeba, write_pictures, zip_of  # noqa: F401
from vsm import loading, pictures
from vsm.cache import digest
from vsm.cli import UserError, command_line
from vsm.pictures import Pictures
from vsm.runs import load_arrays, status_of

FEWEST = data.FEWEST_PICTURES
SMALL = [*IMAGES, "--inner-steps", "1", "--batch", "9"]


def test_the_cache_sees_names_and_every_date(tmp_path):
    folder = write_pictures(tmp_path / "any", range(11))
    first = data.load_images(f"folder:{folder}")
    (folder / "00.bmp").rename(folder / "99.bmp")  # the split moves on by one
    assert torch.equal(data.load_images(f"folder:{folder}").test[0], first.train[0])
    (folder / "99.bmp").rename(folder / "00.bmp")
    os.utime(folder / "10.bmp", (2e9, 2e9))
    assert data.load_images(f"folder:{folder}").recipe == first.recipe  # other dates alone make no other images
    picture(77).save(folder / "05.bmp")
    os.utime(folder / "05.bmp", (1e9, 1e9))  # as large as before, and not the newest file
    changed = data.load_images(f"folder:{folder}")
    assert torch.equal(changed.train[4], torch.from_numpy(pictures.resize_and_crop(picture(77), 64).copy()))
    assert changed.recipe["digest"] != first.recipe["digest"] == digest(first.train, first.test)
    assert data.load_images(f"folder:{folder}", limit=2).recipe["digest"] == changed.recipe["digest"]
    one, other = (Pictures(zip_of(tmp_path / "z", {"a.png": content})) for content in (b"one", b"two"))  # of one name and size
    assert one.stamp != other.stamp


def test_the_example_trains_for_as_many_updates_as_asked_in_whole_epochs(tmp_path, monkeypatch):
    seen, folder = [], f"folder:{write_pictures(tmp_path / 'any', range(30))}"
    monkeypatch.setattr(train_images, "main", seen.append)
    argv = [folder, "--updates", "7", "--components", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="ended as None"):
        own_pictures.main(own_pictures.parse_args(argv))
    an_epoch = len(data.load_images(folder).train) // seen[0].batch
    assert (seen[0].epochs - 1) * an_epoch < 7 <= seen[0].epochs * an_epoch and an_epoch == 2


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "below/.cache"])
def test_pictures_in_hidden_folders_are_not_read(tmp_path, hidden):
    folder = write_pictures(tmp_path / ".pics", range(3))  # the folder that is named may be hidden
    (folder / hidden).mkdir(parents=True)
    (folder / "00.bmp").rename(folder / hidden / "00.bmp")
    (folder / "01.bmp").rename(folder / "..01.bmp")
    assert Pictures(folder).names == ["02.bmp"] and not Pictures(folder).others
    names = [f"{hidden}/00.bmp", "02.bmp", "./04.bmp", f"a/{hidden}/", f"a/{hidden}/05.bmp", "below/"]
    assert Pictures(zip_of(tmp_path / "z", dict.fromkeys(names, b""))).names == ["./04.bmp", "02.bmp"]


def test_gifs_are_read_and_other_files_are_counted(tmp_path, capsys):
    folder, frame = write_pictures(tmp_path / "any", range(2)), picture(5, 64, 64).quantize(8)
    frame.save(folder / "x.gif", save_all=True, append_images=[picture(6, 64, 64)])
    for name in ("a.heic", "b.HEIC", "c.txt", "README", ".hidden"):
        (folder / name).write_bytes(b"")
    images = data.load_images(f"folder:{folder}")
    np.testing.assert_array_equal(images.train[1], np.asarray(frame.convert("RGB")).transpose(2, 0, 1))
    [line] = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line and "not read" in line]
    assert all(words in line for words in ("2 .heic", "1 .txt", "1 without extension"))
    data.load_images(f"folder:{folder}")
    assert not capsys.readouterr().err


def test_rotated_by_its_camera(tmp_path):
    upright, exif = picture(1, 64, 100), Image.Exif()
    exif[0x0112] = 8  # shown upright after a quarter turn
    for i in range(2):
        upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"{i}.png", exif=exif)
    np.testing.assert_array_equal(data.load_images(f"folder:{tmp_path}").train[0], pictures.resize_and_crop(upright, 64))


def test_one_conversion_names_all_damaged_pictures(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "any", range(8))
    for number in (0, 3, 7):
        (folder / f"{number:02d}.bmp").write_bytes(b"junk")
    message = refused([], f"folder:{folder}")
    assert [f"{folder}/{number:02d}.bmp is damaged" in message for number in range(8)] == [n in (0, 3, 7) for n in range(8)]
    monkeypatch.setattr(pictures, "NAMED_FILES", 2)
    message = refused([], f"folder:{folder}")
    assert "00.bmp" not in message and message.endswith("; and 1 more") and cache_holds_nothing(tmp_path / "cache")


def test_eleven_pictures_are_enough_and_ten_are_not(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(data, "FEWEST_PICTURES", FEWEST)
    folder, out = write_pictures(tmp_path / "any", range(10), width=32, height=32), tmp_path / "run"
    message = fails(train_images, "--data", f"folder:{folder}", "--out", out)
    assert f"{folder} holds 10 pictures" in message and "11 or more" in message and "every tenth is a test picture" in message
    picture(10).save(folder / "10.bmp")
    main(train_images, *SMALL, "--data", f"folder:{folder}", "--epochs", 1, "--out", out)
    assert status_of(out) == "ok"


def test_a_run_knows_its_pictures_wherever_they_lie(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(write_pictures(tmp_path / "pics", range(21), width=32, height=32).parent)
    flags = "--data", "folder:pics", "--epochs"
    main(train_images, *SMALL, *flags, 1)
    [run] = (tmp_path / "runs" / "images").iterdir()
    main(train_images, *SMALL, "--data", "folder:./pics/", "--epochs", 2)
    main(train_images, *SMALL, "--data", f"folder:{tmp_path}/pics", "--epochs", 3)
    assert [*run.parent.iterdir()] == [run] and load_arrays(run / "metrics.npz")["epoch"].max() == 3
    for path in (tmp_path / "pics").iterdir():
        os.utime(path, (1e9, 1e9))
    main(train_images, *SMALL, *flags, 4)
    (tmp_path / "pics").rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    assert "pics cannot be read" in fails(train_images, *flags, 5, "--out", run)
    arguments = [run, "--images", 4, "--iw-samples", 2, "--device", "cpu", "--out", tmp_path / "out"]
    main(evaluate, *arguments, "--data", f"folder:{tmp_path}/elsewhere", "--sampler", "gaussian")
    main(train_images, *SMALL, "--data", f"folder:{tmp_path}/elsewhere", "--epochs", 5, "--out", run)
    main(evaluate, *arguments)  # the run knows where its pictures are now
    assert (run / "eval.npz").exists() and status_of(run) == "ok" and load_arrays(run / "metrics.npz")["epoch"].max() == 5
    picture(99, 32, 32).save(tmp_path / "elsewhere" / "07.bmp")
    loading.recipe_at.cache_clear()
    capsys.readouterr()
    other = f"not those that {run} was trained on"
    assert other in fails(train_images, *SMALL, "--data", f"folder:{tmp_path}/elsewhere", "--out", run, "--epochs", 6)
    for script, words in ((evaluate, arguments), (latent_scale, [run, "--data", f"folder:{tmp_path}/elsewhere"])):
        with pytest.raises(SystemExit):
            command_line(lambda: script.parse_args([*map(str, words)]), script.main)
        assert other in capsys.readouterr().err
    assert "mnist is not folder:PATH" in fails(evaluate, run, "--data", "mnist")


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pics", range(2))
    write_celeba(tmp_path / "root", "folder")
    assert {data.data_name(f"folder:{path}") for path in ("pics", "./pics/", "~/pics", "root/../pics", tmp_path / "pics")} == {
        f"folder:{tmp_path}/pics"}
    assert [data.data_name(name) for name in ("mnist", "folder:", "~/x")] == ["mnist", "folder:", "~/x"]
    assert len(data.load_images("folder:~/pics").train) == 1 and len(data.load_images("celeba", "~/root").train) == 3
    assert not (tmp_path / "~").exists()
