"""Tables and figures from image runs, beside the paper's numbers (Tables 1 and 2; Figures 4, 8-17).

All of them, each against the whole test set of its run:
    python evaluate.py runs/images/*
Seconds on a CPU, after the quick run of train_images.py:
    python evaluate.py runs/images/*glyphs* --images 20 --iw-samples 10
Signal-to-noise ratio of every objective's decoder gradient at one trained model:
    python evaluate.py --gradient-snr runs/images/RUN

A RUN is a run folder, or a pack of runs (.npz), whose table is made again from its arrays. Each folder gets an eval.npz, used
again while its checkpoint, the test images and the settings stay the same; --out gets the table and the figures. A run that has
not ended is evaluated at its last checkpoint and labelled unfinished@<epoch>. A run that cannot be evaluated is named and
skipped; the exit code is 2 where none could be. docs/metrics.md says what the numbers mean.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import argparse
import contextlib
import hashlib
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

import metrics
import plots
from data import load_images
from training import EVALUATION, seed_of
from vsm import gradient_snr
from vsm.cli import Formatter, UserError, command_line, positive, sentence
from vsm.device import pick_device, set_precision
from vsm.image_table import Measured, by_data_and_pair, write_table
from vsm.loading import epochs_trained, flags_of, load_vae
from vsm.packs import StoredRun, open_runs
from vsm.quality import fids, prior_metrics, reference_set
from vsm.runs import group_by_seed, load_arrays, save_arrays

CURVES = ("epoch", "negative_elbo", "reconstruction_mse", "latent_mmd")  # of every image run: the table cannot do without
NOISE_LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train_images.py made, or packs of them")
    flag = parser.add_argument_group("experiment").add_argument
    flag("--images", type=positive, default=500, help="how many test images the importance-weighted bound and denoising take")
    flag("--iw-samples", type=positive, default=100, help="samples of the importance-weighted bound")
    flag("--gradient-snr", action="store_true",
         help="instead: signal-to-noise ratio of the decoder's gradient, in each run's folder")
    flag("--snr-draws", type=positive, default=100, help="minibatches that its mean and variance are taken over")
    flag("--snr-mode", choices=gradient_snr.MODES, default="eval",
         help="batch norm as in evaluation, where it couples no data, or as in training")
    flag = parser.add_argument_group("model").add_argument
    flag("--inception-weights", default=None, metavar="FILE", help="for colour images; without it torch-fidelity fetches them")
    flag = parser.add_argument_group("output").add_argument
    flag("--data-root", default=None, help="where the data sets are (default: where each run had them)")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--out", default="runs/evaluation", help="folder of the table and the figures")
    flag("--overwrite", action="store_true", help="evaluate again what has been evaluated")
    args = parser.parse_args(argv)
    if args.snr_draws < 2:
        parser.error("--snr-draws must be at least 2: a variance divides by one less")
    if args.inception_weights and not Path(args.inception_weights).is_file():
        parser.error(f"--inception-weights {args.inception_weights}: there is no such file")
    return args


def main(args):
    device = pick_device(args.device)
    set_precision("float32", device)
    runs, measured = [], []
    for path in dict.fromkeys(args.runs):
        with skipping(path):
            runs += open_runs([path])
    for run in runs:
        with skipping(run):
            measured.append(write_gradient_snr(run, args, device) if args.gradient_snr else measure(run, args, device))
    if not measured:
        raise UserError("none of these runs could be evaluated")
    if not args.gradient_snr:
        measured.sort(key=by_data_and_pair)
        write_table(measured, Path(args.out))
        draw(measured, Path(args.out))


@contextlib.contextmanager
def skipping(run):
    """One run that is missing, damaged or impossible does not stop the others: stderr gets its name and one sentence."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the other runs are evaluated)
        if os.environ.get("VSM_TRACEBACK"):
            traceback.print_exc()
        print(f"skipped {run}: {sentence(error)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ one run


def measure(run, args, device):
    """The Measured of a run, from its folder's model where it has a checkpoint, else from the arrays that are there.

    A diverged run is counted in the table and measured no further. Raises UserError for a run that cannot be evaluated.
    """
    config = checked_config(run)
    status = status_of(run)
    if not status.startswith("diverged@"):
        if (Path(run.name) / "checkpoint.pt").exists():
            evaluate_run(Path(run.name), config, status, args, device)
        elif not run.has("eval") and not (Path(run.name) / "eval.npz").exists():
            raise UserError("it has no checkpoint.pt, so there is no model to evaluate")
        else:
            print(f"{run}: evaluated before" + (", and its checkpoint is gone" if Path(run.name).is_dir() else ""))
    label = config["label"] + (f" {status}" if status.startswith("unfinished@") else "")
    run = with_config(run, flags_of(config), label)
    curves = {key: value for key, value in run.arrays().items() if key != "config" and value.ndim == 1}
    lengths = {len(curves.get(key, ())) for key in CURVES}
    if len(lengths) > 1 or 0 in lengths:
        raise UserError("its metrics.npz is damaged; delete it, and the command of its folder makes it again from the checkpoint")
    last = {key: value[-1] for key, value in curves.items() if len(value)}
    return Measured(run, status, last, {} if status.startswith("diverged@") else evaluation_of(run))


def checked_config(run):
    """The config of an image run. Raises UserError for another."""
    config = run.config
    if config["script"] != "train_images":
        raise UserError(f"it is a run of {config['script']}.py; evaluate.py reads those of train_images.py")
    if not isinstance(config.get("label"), str):
        raise UserError("its config.json is damaged: it has no label")
    flags_of(config)
    return config


def status_of(run):
    """ok, diverged@<step>, or unfinished@<epoch>, where the epoch is that of the last checkpoint."""
    arrays = run.arrays()
    if "status" in arrays:
        return str(arrays["status"])
    folder = Path(run.name)
    if (folder / "checkpoint.pt").exists():
        return f"unfinished@{round(epochs_trained(folder), 2):g}"
    if not run.has("eval"):
        raise UserError("it has not ended, and has no checkpoint to evaluate; the command that began it resumes it")
    return str(run.arrays("eval")["status"])


def with_config(run, flags, label):
    """A StoredRun with every flag in its config and in those of its arrays, and with this label."""
    def amended(config):
        return {**config, "flags": flags, "label": label}

    def arrays(part):
        loaded = run.arrays(part)
        return {**loaded, "config": amended(loaded["config"])}

    parts = [part for part in ("metrics", "eval") if run.has(part) or (Path(run.name) / f"{part}.npz").exists()]
    return StoredRun(run.name, lambda: amended(run.config), arrays, parts)


def evaluation_of(run):
    """The arrays of eval.npz. Raises UserError where it is damaged: it can be made again from the checkpoint."""
    try:
        arrays = run.arrays("eval")
        about = arrays["config"]["evaluation"]
        whole = {"data", "test_images", "images", "iw_samples"} <= about.keys() and arrays["negative_iw_bound"].ndim == 1 \
            and arrays["latent_mmd_null_sd"].ndim == 0 and (("fid_floor" in arrays) == ("kid_floor" in arrays))
    except (UserError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        place = f"{run}/eval.npz" if Path(run.name).is_dir() else "it"
        raise UserError(f"its eval.npz is damaged; delete {place} and evaluate the run again")
    return arrays


def evaluate_run(folder, config, status, args, device):
    """Write eval.npz of a run folder, unless it holds this checkpoint's evaluation with these settings, or a better one."""
    flags, save, old = flags_of(config), folder / "eval.npz", None
    root = args.data_root or flags["data_root"]
    reference = reference_set(flags["data"], root, flags["test_limit"], args.inception_weights, device)
    settings = {"checkpoint": hashlib.sha256((folder / "checkpoint.pt").read_bytes()).hexdigest()[:12], "images": args.images,
                "iw_samples": args.iw_samples, **reference.about}
    if save.exists():
        try:
            old = evaluation_of(open_runs([folder])[0])
        except UserError:
            print(f"{folder}: its eval.npz is damaged and is made again", file=sys.stderr)
    if old:
        about = old["config"]["evaluation"]
        if about == settings and not args.overwrite:
            print(f"{folder}: evaluated before")
            return
        if "fid" in old and not reference.network and about.get("checkpoint") == settings["checkpoint"]:
            print(f"{folder}: its eval.npz has FID and KID, which cannot be computed now, and is kept", file=sys.stderr)
            return
    print(f"{folder}: evaluating")
    vae, seed = load_vae(folder, device), seed_of(flags["seed"], EVALUATION)
    generator = torch.Generator(device).manual_seed(seed)
    result = fids(vae, reference, flags["noise"], generator) if reference.network else {}
    generator.manual_seed(seed)
    result |= prior_metrics(vae, reference, generator)
    result |= data_metrics(vae, reference.images[:args.images], flags["noise"], args.iw_samples, generator)
    save_arrays(save, {**config, "evaluation": settings}, status=status, **result)


def data_metrics(vae, images, noise, samples, generator, block=100):
    """The importance-weighted bound against its number of samples, and the denoising error against the noise, each a mean.

    images: uint8 [n, C, H, W]; the means are over them. samples: the largest number of the bound's samples.
    """
    counts = sorted({count for count in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if count < samples} | {samples})
    bounds, errors = [], []
    with metrics.evaluating(vae):
        for clean in images.split(block):
            clean = clean.float() / 255
            e = torch.randn(clean.shape, generator=generator, device=clean.device)
            bounds.append(torch.stack([metrics.iw_log_likelihood(vae, clean + noise * e, count, "posterior", generator, chunk=10)
                                       for count in counts]))
            errors.append(torch.stack([metrics.reconstruction_mse(vae, clean + level * e, clean) for level in NOISE_LEVELS]))
    return {"iw_samples": np.array(counts), "negative_iw_bound": -torch.cat(bounds, 1).mean(1).cpu(),
            "noise_levels": np.array(NOISE_LEVELS), "denoising_mse": torch.cat(errors, 1).mean(1).cpu()}


def write_gradient_snr(run, args, device):
    """gradient_snr.npz and its figure in the run's folder (gradient_snr_train in mode train), at its last checkpoint."""
    folder, config = Path(run.name), checked_config(run)
    status = status_of(run)
    if status.startswith("diverged@"):
        raise UserError("it diverged, so there is no trained model")
    vae, flags = load_vae(folder, device), flags_of(config)
    data = load_images(flags["data"], args.data_root or flags["data_root"], flags["limit"], flags["test_limit"])
    arrays = gradient_snr.gradient_snr(vae, data.train.to(device), flags, args.snr_draws, args.snr_mode,
                                       tell=lambda line: print(f"{run}: {line}", flush=True))
    save = folder / ("gradient_snr.npz" if args.snr_mode == "eval" else "gradient_snr_train.npz")
    config = {**config, "evaluation": {"draws": args.snr_draws, "mode": args.snr_mode}}
    save_arrays(save, config, status=status, **arrays)
    stored = StoredRun(run.name, lambda: config, lambda part: load_arrays(save), ["gradient_snr"])
    plots.gradient_snr([stored], save.with_suffix(".png"))
    print(save.with_suffix(".png"))
    return stored


# --------------------------------------------------------------------------------------------------------- the figures


def draw(measured, out):
    """The figures over all runs, and grids of samples of the first finished seed of each group."""
    alive = [each for each in measured if not each.diverged]
    figures = {"trajectories": measured, "importance_bound": alive, "denoising": alive}
    for figure, key in (("posterior_sd", "posterior_sd"), ("aggregate_posterior", "posterior_sd"),
                        ("posterior_mean", "posterior_mean_histogram")):
        figures[figure] = [each for each in alive if key in each.run.arrays() and (
            figure != "aggregate_posterior" or "aggregate_histogram" in each.run.arrays())]
    groups = group_by_seed([each.run for each in measured], [each.run.config for each in measured])
    firsts = [next((measured[i] for i in members if "samples" in measured[i].run.arrays()), None) for _, members in groups]
    figures["samples"] = [first for first in firsts if first]  # published runs may come without
    for figure, members in figures.items():
        if not members:
            continue
        try:
            plots.FIGURES[figure]([each.run for each in members], out / f"{figure}.png")
        except (UserError, KeyError, IndexError, ValueError) as error:
            print(f"{figure}.png was not drawn: {sentence(error)}", file=sys.stderr)


if __name__ == "__main__":
    command_line(parse_args, main)
