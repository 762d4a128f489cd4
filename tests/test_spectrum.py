"""The spectra that linear VAEs learn from images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from studies import spectrum
from vsm.runs import load_arrays


def test_the_spectra_of_images(tmp_path, capsys, digits, monkeypatch):
    monkeypatch.setattr(spectrum, "EXPECTED_UPDATES", 250)
    monkeypatch.setattr(spectrum, "OBJECTIVES", (("swersky", "plugin"), ("bao", "unbiased")))
    out = tmp_path / "run"
    argv = ["mnist", "--data-root", str(digits), "--latents", "4", "--iterations", "30", "--batch", "8",
            "--out", str(out)]
    spectrum.main(spectrum.parse_args(argv))
    arrays = load_arrays(out / "metrics.npz")
    assert arrays["status"] == "ok"
    assert arrays["learnt"].shape == arrays["expected"].shape == arrays["second_moment"].shape == (7, 4)
    v = arrays["eigenvalues"][:4]
    assert np.abs(arrays["expected"] / np.maximum(v / arrays["kappa"][:, None], arrays["gamma"]) - 1).max() < 0.02
    assert (out / "spectrum.png").stat().st_size > 10_000
    assert "largest error" in capsys.readouterr().out
    spectrum.main(spectrum.parse_args(argv))
    assert "finished before" in capsys.readouterr().out


def test_the_second_moment_counts_the_noise_in_the_data_of_dsm(monkeypatch):
    monkeypatch.setattr(spectrum, "trained_weights", lambda pixels, start, *_: start)
    C, W, args = 2 * torch.eye(2).double(), torch.eye(2)[:, :1].double(), SimpleNamespace(gamma=1.0, latents=1)
    for objective, variance in (("swersky", 2), ("dsm", 2 + spectrum.NOISE**2)):  # q(z|x) = N(x_1 / 2, 1 / 2)
        row = spectrum.train_one_model(None, C, W, args, objective, "plugin", 5)
        assert row["second_moment"] == pytest.approx(variance / 4 + 1 / 2) and row["learnt"] == pytest.approx(2)


def test_a_diverged_spectrum_says_so(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(spectrum, "EXPECTED_UPDATES", 1)
    monkeypatch.setattr(spectrum, "OBJECTIVES", (("fd", "plugin"),))
    argv = ["mnist", "--data-root", str(digits), "--latents", "2", "--iterations", "9", "--batch", "8",
            "--lr", "1e30"]
    spectrum.main(spectrum.parse_args([*argv, "--out", str(tmp_path / "run")]))
    assert load_arrays(tmp_path / "run" / "metrics.npz")["status"] == "diverged@9"


@pytest.mark.parametrize("argv, words", [(["mnist", "--batch", 5], "must be even"), (["letters"], "unknown data")])
def test_flags_of_the_spectrum_are_checked(fails, tmp_path, argv, words):
    assert words in fails(spectrum, *argv, "--out", tmp_path / "run")
