"""Tables and figures from image runs, beside the paper's numbers (Tables 1 and 2; Figures 4, 8-17).

Evaluate every run, each against the test images that it has, all or its --test-limit:
    python evaluate.py runs/images/*
Fit other laws of z than the prior to the latents of training images, and measure their samples too:
    python evaluate.py runs/images/* --sampler gaussian mixture
The same in a minute on a CPU, after the quick run of train_images.py (two more for the first run of a data set, for which FID's
network is trained):
    python evaluate.py runs/images/*glyphs* --images 20 --iw-samples 10

A RUN is a run folder, or a pack of runs (.npz), whose stored arrays give the table again. Each folder gets an eval.npz, which is
used again while its checkpoint, the test images and the settings stay the same. The folder --out gets the table and the figures.
A run that has not ended is evaluated at its last checkpoint and labelled unfinished@<epoch>. A run that cannot be evaluated is
named and skipped; the exit code is 2 if no run could be evaluated. docs/metrics.md says what the numbers mean.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

import metrics
from data import load_images, moved_folder, noisy
from training import EVALUATION, seed_of
from vsm.cli import Parser, UserError, command_line, positive, sentence
from vsm.device import pick_device, set_precision
from vsm.fid import ending_of, fids, mmd_nulls, reference_set, sampler_metrics
from vsm.figures import images, latents, pictures
from vsm.image_table import COLUMNS, Measured, by_data_and_pair, write_table
from vsm.loading import epochs_trained, flags_of, load_vae, place_of_images
from vsm.names import group_by_seed
from vsm.runs import checkpoint_hash, load_arrays, save_arrays
from vsm.samplers import SAMPLERS, load_sampler, mixture_of
from vsm.stored_runs import StoredRun, open_runs
from vsm.tables import failed

CURVES = ("epoch", "negative_elbo", "reconstruction_mse", "latent_mmd")  # every image run has them, and the table needs them
BOUND = {"images": 500, "iw_samples": 100}  # of the importance-weighted bound


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train_images.py made, or packs of them")
    flag = parser.add_argument
    flag("--images", type=positive, help="test images for the importance-weighted bound (default: those of the run's evaluation, "
         f"or {BOUND['images']})")
    flag("--iw-samples", type=positive, help="posterior samples of the importance-weighted bound (default: those of the run's "
         f"evaluation, or {BOUND['iw_samples']})")
    flag("--sampler", nargs="+", choices=SAMPLERS, default=["prior"],
         help="laws of z to sample images from, beside the prior (docs/images.md)")
    flag("--components", type=positive, help="Gaussians of the sampler mixture (default: those of the run's fitted one, or 10)")
    flag("--fits", type=positive, help="fits of the sampler mixture from random starts, of which the likeliest is kept (default: "
         "as many as the run's fitted one had, or 1)")
    flag("--draws", type=positive, help="times that images are sampled; FID to coverage are means over them (default: those of "
         "the run's evaluation, or 1)")
    flag("--inception-weights", metavar="FILE", help="file of Inception's weights, for colour images (default: the one that "
         "torch-fidelity has fetched, or else the features are those of EfficientNet-Lite0)")
    flag("--data-root", help="folder of the data sets (default: the one that each run had)")
    flag("--data", type=moved_folder, metavar="folder:PATH", help="where the pictures of runs on a folder are now")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--out", type=os.path.expanduser, default="runs/evaluation", help="folder for the table and the figures")
    flag("--overwrite", action="store_true", help="evaluate runs again that have been evaluated")
    args = parser.parse_args(argv)
    if args.inception_weights and not Path(args.inception_weights).is_file():
        parser.error(f"--inception-weights {args.inception_weights}: there is no such file")
    return args


def main(args):
    device = pick_device(args.device)
    set_precision("float32", device)
    measured = sorted(of_each_run(args.runs, lambda run: measured_run(run, args, device)), key=by_data_and_pair)
    write_table(measured, Path(args.out))
    draw_figures(measured, Path(args.out))


def of_each_run(paths, measure):
    """The list of measure(run) over the runs of these folders and packs, without those that fail, which stderr names.

    Raises UserError where all of them fail.
    """
    results = []
    for path in dict.fromkeys(paths):
        with skipping(path):
            for run in open_runs([path]):
                with skipping(run):
                    results.append(measure(run))
    if not results:
        raise UserError("none of these runs could be evaluated")
    return results


@contextlib.contextmanager
def skipping(run):
    """A context in which any error ends only this run: stderr gets the run's name and one sentence, and the others go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever the error is, the other runs are evaluated)
        if os.environ.get("VSM_TRACEBACK"):
            traceback.print_exc()
        print(f"skipped {run}: {sentence(error)}", file=sys.stderr)


def measured_run(run, args, device):
    """The Measured of a run: from its model where its folder has a checkpoint, else from its stored arrays.

    A failed run is not evaluated; the table only counts it. Raises UserError for a run that cannot be evaluated.
    """
    config, status, folder = checked_config(run), run_status(run), Path(run.name)
    if not failed(status):
        if (folder / "checkpoint.pt").exists():
            evaluate_run(folder, config, status, args, device)
            (run,) = open_runs([folder])
        elif not run.has("eval"):
            raise UserError("it has no checkpoint.pt, so there is no model to evaluate" if folder.is_dir() else
                            "its pack holds no evaluation; python -m studies.tables tabulates what was measured in training")
        else:
            print(f"{run}: evaluated before" + (", and its checkpoint is gone" if folder.is_dir() else ""))
    if status.startswith("unfinished@"):
        run = with_changes(run, {"label": f"{config['label']} {status}"})
    last = {key: value[-1] for key, value in run.arrays().items() if key != "config" and value.ndim == 1 and len(value)}
    if not {*CURVES} <= last.keys():
        raise UserError("its metrics.npz is damaged; delete it, and the command of its folder makes it again from the checkpoint")
    return Measured(run, status, last, {} if failed(status) else run.arrays("eval"))


def checked_config(run):
    """The config of an image run. Raises UserError for a run of another kind, or with a damaged config."""
    config = run.config
    if config["script"] != "train_images":
        raise UserError(f"it is a run of {config['script']}.py, and only those of train_images.py have images")
    if not isinstance(config.get("label"), str):
        raise UserError("its config.json is damaged: it has no label")
    flags_of(config)
    return config


def run_status(run):
    """The status of a run: ok, diverged@<step>, exploded@<step>, or unfinished@<epoch>, with the epoch of the last checkpoint."""
    arrays = run.arrays()
    if "status" in arrays:
        return str(arrays["status"])
    folder = Path(run.name)
    if (folder / "checkpoint.pt").exists():
        return f"unfinished@{round(epochs_trained(folder), 2):g}"
    if not run.has("eval"):
        raise UserError("it has not ended, and has no checkpoint to evaluate; the command that began it resumes it")
    return str(run.arrays("eval")["status"])


def with_changes(run, config, **arrays):
    """The run with these entries in its config and in the configs beside its arrays, and with these arrays."""
    def changed(part):
        return (loaded := run.arrays(part)) | arrays | {"config": loaded["config"] | config}

    return StoredRun(run.name, lambda: run.config | config, changed, ["metrics", "eval"])


def evaluate_run(folder, config, status, args, device):
    """Write eval.npz of a run folder, unless it is there for the same checkpoint and settings."""
    flags, save = flags_of(config), folder / "eval.npz"
    place = place_of_images(folder, config, args)
    reference = reference_set(*place, flags["test_limit"], args.inception_weights, device)
    checkpoint, before, was = checkpoint_hash(folder), {}, None
    with contextlib.suppress(UserError):  # a damaged one is made again
        stored = load_arrays(save)
        before, was = stored["config"].get("evaluation", {}), str(stored.get("status"))
    before = BOUND | {"draws": 1} | before  # older ones have no draws
    asked = {*args.sampler, *before.get("samplers", [])}  # none gets lost
    names = [name for name in SAMPLERS if name == "prior" or name in asked and flags["latent"] == "gaussian"]
    asked_or_before = {key: getattr(args, key) or before[key] for key in (*BOUND, "draws")}
    settings = {"checkpoint": checkpoint, "samplers": names, **asked_or_before, **reference.settings}
    if "mixture" in names:
        settings |= mixture_of(folder, args.components, args.fits)
    elif (args.components or args.fits) and "mixture" not in args.sampler:
        print(f"{folder}: --components and --fits have no effect without --sampler mixture", file=sys.stderr)
    if missing := {*args.sampler} - {*names}:
        print(f"{folder}: its latents are 0 or 1, which {', '.join(sorted(missing))} cannot be fitted to", file=sys.stderr)
    if (before, was) == (settings, status) and not args.overwrite:
        print(f"{folder}: evaluated before")
        return
    print(f"{folder}: evaluating")
    vae, seed = load_vae(folder, device), seed_of(flags["seed"], EVALUATION)
    generator = torch.Generator(device).manual_seed(seed)
    samplers = {name: load_sampler(folder, name, device, args.components, args.data_root, args.data, args.fits) for name in names}
    result = fids(vae, reference, flags["noise"], generator, kid=settings["draws"] == 1) | reference.floor
    generator.manual_seed(seed)
    result |= mmd_nulls(vae, len(reference.images), generator)
    train = load_images(*place, flags["limit"], flags["test_limit"]).train.to(device)
    result |= sampler_metrics(vae, samplers, reference, train, seed, settings["draws"])
    result |= importance_bounds(vae, reference.images[:settings["images"]], flags["noise"], settings["iw_samples"], generator)
    if status.startswith("unfinished@"):  # the last row of metrics.npz is of an earlier epoch than the checkpoint
        row = metrics.evaluate_images(vae, reference.images, flags["noise"], seed=seed)
        result |= {key: value for key, value in row.items() if key in COLUMNS}
    save_arrays(save, {**config, "evaluation": settings}, status=status, **result)


def importance_bounds(vae, images, noise, samples, generator, block=100):
    """The importance-weighted bound in nats, a mean over images uint8 [n, C, H, W], by its number of samples, up to `samples`."""
    counts = sorted({count for count in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if count < samples} | {samples})
    bounds = []
    for part in images.split(block):
        x = noisy(part, noise, generator)[0]
        bounds.append(torch.stack([metrics.iw_log_likelihood(vae, x, n, "posterior", generator, chunk=10) for n in counts]))
    return {"iw_samples": np.array(counts), "negative_iw_bound": -torch.cat(bounds, 1).mean(1).cpu()}


def draw_figures(measured, out):
    """Draw the figures of all runs; the grids of samples have the first seed of each group that has samples."""
    alive = [each for each in measured if not each.failed]

    def with_arrays(*keys):
        return [each for each in alive if {*keys} <= each.run.arrays().keys()]

    groups = group_by_seed([each.run for each in measured], [each.run.config for each in measured])
    firsts = [next((measured[i] for i in members if "samples" in measured[i].run.arrays()), None) for *_, members in groups]
    figures = {images.trajectories: measured, latents.posterior_sd: with_arrays("posterior_sd"),
               latents.aggregate_posterior: with_arrays("posterior_sd", "aggregate_histogram"),
               latents.posterior_mean: with_arrays("posterior_mean_histogram"),
               pictures.samples: (firsts := [first for first in firsts if first])}  # published runs may have no samples
    drawings = [(figure, figure.__name__, [each.run for each in members]) for figure, members in figures.items()]
    for key in (f"samples{ending_of(name)}" for name in SAMPLERS[1:]):
        shown = [with_changes(each.run, {}, samples=each.evaluation[key]) for each in firsts if key in each.evaluation]
        drawings.append((pictures.samples, key, shown))
    for figure, name, members in drawings:
        try:
            if members:
                figure(members, out / f"{name}.png")
        except (UserError, KeyError, IndexError, ValueError) as error:
            print(f"{name}.png was not drawn: {sentence(error)}", file=sys.stderr)


if __name__ == "__main__":
    command_line(parse_args, main)
