"""What a training script does with its command line, its streams and its names, beside training."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import audit
import evaluate
import param_recovery
import toy_inference
import train_images
import train_synthetic
import vsm.cli
from benchmarks import benchmark
from objectives import LEARN
from small_runs import IMAGES, ROOT, SMALL, environment
from studies import spectrum
from vsm.cli import command_line
from vsm.names import LONGEST_NAME


def test_names_are_short_and_differ():
    def name(script, *argv):
        return script.parse_args([*map(str, argv)]).out.rpartition("/")[2]

    path = "folder:/a/long/path/" + "deeper/" * 30 + "my pictures"
    assert len(name(train_images, "--data", path)) < 60 and "deeper" not in name(train_images, "--data", path)
    many = ["--samples", 17, "--infer-samples", 19, "--noise", 0.12345, "--width", 123, "--norm", "group", "--dim-z", 77,
            "--init-sd", 0.3, "--inner-steps", 9, "--batch", 333, "--lr", 0.000123, "--lr-half-life", 12.5, "--eval-every", 3]
    names = [name(train_images, *many, "--limit", limit, "--seed", seed) for limit in (1000, 1001) for seed in (0, 2**62)]
    assert len({*names}) == 4 and max(map(len, names)) <= LONGEST_NAME
    assert names[1].endswith(f"seed{2**62}") and names[0].endswith("seed0")


NO_WHOLE = "is not a whole number of 1 or more"
MISTAKES = {
    train_images: {
        "--data nothing": "unknown data 'nothing'", "--learn fae --infer kld": "--learn fae goes with --infer fae",
        "--data folder:/no/such/place": "/no/such/place cannot be read (No such file or directory); --data folder:PATH names",
        "--infer fae": "--learn fae goes with --infer fae", "--learn swersky --estimator unbiased --samples 1": "at least 2",
        "--estimator released": "applies to --learn swersky, bao, dsm only", "--samples 0": f"0 {NO_WHOLE}",
        "--lr nan": "nan is not a number above 0", "--batch 301": "more than the 300 training images",
        "--test-limit 1": "compare pairs of images", "--batch 1e3": f"1e3 {NO_WHOLE}", "--precision tf32": "GPU",
        "--learn sliced": "invalid choice", "--one-pass --learn bao --inner-steps 1": "--one-pass goes with --infer kld",
        "--one-pass --inner-steps 1 --samples 2 --infer-samples 1": "--infer-samples equal to --samples",
        "--learn fae --samples 2 --infer-samples 1": "--infer-samples must equal --samples",
        "--temperature 0.3": "--latent bernoulli only",
        "--latent bernoulli --learn fae": "--latent bernoulli goes with --infer kld",
        "--latent bernoulli --infer fd": "--latent bernoulli goes with --infer kld",
        "--eval-every 2 --fid-every 3": "--fid-every 3 is not a multiple of --eval-every 2",
        "--epochs 1 --inner-steps 7": "6 minibatches in all are fewer than the 7 of one decoder update"},
    train_synthetic: {
        "--inner-steps 0": f"0 {NO_WHOLE}", "--bilevel-steps -1": "-1 is not a whole number of 0 or more",
        "--seeds 0": f"argument --seeds: 0 {NO_WHOLE}", "--data moons": "invalid choice: 'moons'",
        "--learn swersky --estimator unbiased": "at least 2", "--estimator released": "applies to --learn swersky, bao, dsm only",
        "--learn fae --infer fd": "--learn fae goes with --infer fae", "--inner-lr nan": "nan is not a number above 0",
        "--inner-lr 0": "0 is not a number above 0", "--inner-lr 1e300": "argument --inner-lr: 1e300 is not",
        "--batch 4611686018427387904": "argument --batch: 4611686018427387904 is not", "--lr nan": "argument --lr: nan is not",
        "--learn fd3": "VSM_IMPORT", "--learn dsm": "needs the score of the noise in the data; give --noise above 0",
        "--learn dsm --noise 0.1 --estimator released": "plugin or unbiased, not released",
        "--learn swersky --gamma stationary --bilevel-steps 1": "q moves with gamma",
        "--compile --bilevel-steps 1 --lr-half-life 1": "--compile with --bilevel-steps fixes the step size"},
    param_recovery: {
        "--gamma -1": "-1 is not", "--gamma inf": "inf is not", "--alphas 0": "0 is not", "--alphas nan": "nan is not",
        "--samples 1": "with --stochastic only", "--samples 1 --stochastic": "at least 2", "--points 0": f"0 {NO_WHOLE}",
        "--device cuda:7": "cuda:7", "--iterations many": "many is not", "--seed 1": "with --stochastic only",
        "--iterations 5": "have a meaning with --stochastic only", "--w-star 1500": "there the search finds w",
        "--gamma 1e-6": "there the search finds w", "--alpha 1e-4": "there the search finds w",
        "--alphas 1e200": "a float32 can hold", f"--seed {2**63} --stochastic": "below 2^31"},
    toy_inference: dict.fromkeys([
        "--likelihoods cubic", "--likelihoods sym sym", "--lr 0", "--x nan", "--x 11", "--grid 0", "--family cauchy", "--seed -1",
        "--device cuda:9", "--iterations 1e6", "--components 3", "--target-sd 2", "--gradients --seed 1", f"--seed {2**63}",
        "--gradients --family mixture", "--family mixture --grid 3", "--gradients --target-sd 1e-200", "--objectives elbo",
        "--objectives fd fd", "--family mixture --objectives fd"], "error: "),
    benchmark: {
        "--precision tf32 --device cpu": "tf32 needs a CUDA GPU", "--device tpu": "not one of auto, cpu",
        "--pairs KLD-X": "invalid choice"},
    evaluate: {"run --inception-weights none.pth": "there is no such file", "run --iw-samples 0": "--iw-samples"},
    audit: {"fd3": "VSM_IMPORT"}, spectrum: {"mnist --batch 6": "must be a multiple of 4", "letters": "unknown data"}}


@pytest.mark.parametrize("script, argv", [(script, argv) for script in MISTAKES for argv in MISTAKES[script]])
def test_a_mistake_gets_one_sentence_and_leaves_no_folder(digits, tmp_path, fails, script, argv):
    usual = {train_images: [*IMAGES, "--data-root", digits], train_synthetic: SMALL}.get(script, [])
    assert MISTAKES[script][argv] in fails(script, *usual, *argv.split(), "--out", tmp_path / "run")
    assert script is spectrum or not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [train_images, train_synthetic])
@pytest.mark.parametrize("learn", [learn for learn, entry in LEARN.items() if not entry.gamma])
def test_a_stationary_gamma_without_a_closed_form_is_refused(script, learn, fails):
    assert "whose gamma has a closed form" in fails(script, "--learn", learn, "--gamma", "stationary")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(digits, fails):
    assert "finds no CUDA GPU" in fails(train_images, *IMAGES, "--data-root", digits, "--device", "cuda")


@pytest.mark.parametrize("script, first, others", [
    (train_images, "images/mnist-conv-kld-fd-seed0", ["--seed 1", "--learn elbo", "--infer fd", "--samples 1", "--net resnet",
                                                      "--learn bao --estimator released", "--norm group"]),
    (train_synthetic, "synthetic/mixture-kld-fd-5-0-seed0", ["--seed 1", "--seeds 3", "--learn elbo", "--infer fd", "--data ring",
                                                             "--inner-steps 1", "--bilevel-steps 5", "--hidden 100",
                                                             "--learn bao --estimator released", "--inner-lr 0.1"])])
def test_default_folders_of_a_sweep_never_collide(script, first, others):
    names = {script.parse_args(argv.split()).out for argv in ["", *others]}
    assert len(names) == 1 + len(others) and f"runs/{first}" in names


@pytest.mark.parametrize("script, argv, out", [
    (train_images, "--latent bernoulli --temperature 0.3", "images/mnist-conv-kld-fd-latentbernoulli-temperature0.3-seed0"),
    (train_synthetic, "--samples 5", "synthetic/mixture-kld-fd-5-0-samples5-seed0"),
    (train_images, "--gamma stationary", "images/mnist-conv-kld-fd-gammastationary-seed0"),
    (train_images, "--samples 2 --epochs 7 --jobs 2", "images/mnist-conv-kld-fd-samples2-seed0"),
    (toy_inference, "", "toy/gaussian-sym+soft-seed0"), (toy_inference, "--family mixture", "toy/mixture-sym+soft-seed0"),
    (toy_inference, "--gradients", "toy/gradients-sd0.5"),
    (toy_inference, "--likelihoods relu --lr 1e-3", "toy/gaussian-relu-lr0.001-seed0"),
    (toy_inference, "--objectives fd-weighted kld", "toy/gaussian-sym+soft-objectivesfd-weighted+kld-seed0")])
def test_default_folders_name_what_differs(script, argv, out):
    assert script.parse_args(argv.split()).out == f"runs/{out}"


def test_a_label_has_the_encoders_step_where_it_is_not_the_default_of_infer():
    labels = [train_synthetic.name_of(train_synthetic.parse_args(argv.split())) for argv in ("--infer fd", "--inner-lr 0.1")]
    assert labels == ["FD-F", "KLD-F, step 0.1"]


def test_a_traceback_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VSM_TRACEBACK", "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        command_line(lambda: train_synthetic.parse_args([*SMALL, "--out", str(tmp_path / "file" / "run")]), train_synthetic.main)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and text.startswith("Traceback") and "error: cannot write" in text.splitlines()[-1]


def test_a_module_of_ones_own_that_is_not_there_is_named(monkeypatch, fails):
    monkeypatch.setenv("VSM_IMPORT", "no_such_module")
    assert "VSM_IMPORT names no_such_module, which Python does not find" in fails(train_synthetic)


def test_a_reader_that_has_left_gets_no_traceback():
    code = "from vsm.cli import command_line; command_line(lambda: 'text', print)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_imports_and_a_command_line_take_little():
    """Evaluation does without the script that trained; drawing and image files have packages that are imported at their use."""
    code = ("import sys, train_synthetic, evaluate, benchmarks.benchmark, plots; plots.parse_args(['samples', 'x']); "
            "print([name for name in ('train_images', 'torchvision', 'matplotlib', 'PIL', 'scipy') if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True) == "[]\n"


def test_a_log_gets_a_line_a_minute_with_the_time_to_go(monkeypatch, capsys):
    monkeypatch.setattr(vsm.cli, "time", SimpleNamespace(monotonic=iter(range(10_000)).__next__))
    with vsm.cli.progress(1000) as bar:
        bar.mininterval = 0  # a display per update, which takes a second or more by this clock
        for _ in range(1000):
            bar.update()
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line]
    assert 5 < len(lines) < 20 and "\r" not in text and all("/1000" in line and "to go" in line for line in lines)


def test_neither_the_backend_nor_the_matplotlibrc_of_the_user_matters(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    hostile = environment() | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path)}
    ended = subprocess.run([sys.executable, ROOT / "train_synthetic.py", *SMALL, "--epochs", "1", "--out", tmp_path / "run"],
                           env=hostile, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "samples.png").exists()
