"""Tables and figures from finished image runs, beside the paper's numbers (Tables 1 and 2; Figures 4, 8-17).

All of them, each against the whole test set of its run:
    python evaluate.py runs/images/*
Seconds on a CPU, after the quick run of train_images.py:
    python evaluate.py runs/images/*glyphs* --images 20 --iw-samples 10
Signal-to-noise ratio of every objective's decoder gradient at one trained model:
    python evaluate.py --gradient-snr runs/images/RUN

Each run folder gets an eval.npz, used again while its checkpoint and the settings stay the same; --out the table and the figures.
"""

import argparse
import hashlib
import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import metrics
import plots
import train_images
from data import cache_folder, load_images
from objectives import ESTIMATORS, LEARN, dot
from training import EVALUATION, joint_loss, learn_loss, seed_of
from vsm.cli import Formatter, UserError, command_line, positive
from vsm.device import pick_device, set_precision
from vsm.features import Features, digest, features_of, kept
from vsm.quality import Reference, fids
from vsm.runs import (
    NOT_IDENTITY,
    flag_name,
    group_by_seed,
    load_arrays,
    load_checkpoint,
    load_config,
    load_finished,
    save_arrays,
    write_atomic,
)

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
NOISE_LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
SNR_SAMPLES = (1, 2, 5, 10)
COLUMNS = {"fid": "FID", "kid_x1000": "KID x1000", "negative_elbo": "-ELBO", "negative_iw_bound": "-IW bound",
           "reconstruction_mse": "MSE", "latent_mmd": "MMD^2", "posterior_fd": "posterior FD"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train_images.py made")
    flag = parser.add_argument_group("experiment").add_argument
    flag("--images", type=positive, default=500, help="how many test images the importance-weighted bound and denoising take")
    flag("--iw-samples", type=positive, default=100, help="samples of the importance-weighted bound")
    flag("--gradient-snr", action="store_true", help="instead: signal-to-noise ratio of the decoder's gradient, in each run's folder")
    flag("--snr-draws", type=positive, default=100, help="minibatches that its mean and variance are taken over")
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
    refuse_other_versions(args.runs)
    evaluate, evaluated = gradient_snr if args.gradient_snr else evaluate_run, []
    for run in dict.fromkeys(map(Path, args.runs)):
        try:
            evaluate(run, args, device)
            evaluated.append(run)
        except UserError as error:
            print(f"skipped {run}: {error}", file=sys.stderr)
    if not evaluated:
        raise UserError("none of these runs could be evaluated")
    if not args.gradient_snr:
        evaluated.sort(key=order)
        write_table(evaluated, Path(args.out))
        draw(evaluated, Path(args.out))


def refuse_other_versions(runs):
    """Raises UserError for a run whose flags are not the flags of this train_images.py: its model might be built otherwise."""
    known = vars(train_images.parse_args([])).keys() - {"overwrite", "dry_run"}
    for run in runs:
        try:
            config = load_config(run)
        except UserError:
            continue  # named and skipped later
        if config.get("script") != "train_images":
            raise UserError(f"{run} is a run of {config.get('script')}.py; evaluate.py reads those of train_images.py")
        flags = config.get("flags", {}).keys()
        differ = [f"it has --{flag_name(key)}, which is unknown now" for key in sorted(flags - known)] + \
            [f"it lacks --{flag_name(key)}" for key in sorted(known - flags)]
        if differ:
            raise UserError(f"{run} was made by another version of train_images.py: {'; '.join(differ)}; "
                            "train it again or leave it out")


def finished(run):
    """A run's config and whether it diverged. Raises UserError for one that is missing, half or damaged."""
    config, arrays = load_config(run), load_finished(run)
    return config, str(arrays["status"]) != "ok"


def load_model(run, config, image_shape, device):
    """The trained VAE of a run, from its own flags and checkpoint."""
    vae = train_images.vae_of(config["flags"], image_shape)
    tensors = load_checkpoint(run / "checkpoint.pt")["trainer"]["tensors"]
    try:
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in tensors.items() if name.startswith("vae.")})
    except RuntimeError as error:
        raise UserError(f"its checkpoint does not hold the model of its config.json ({str(error).splitlines()[0]})") from error
    return vae.to(device, memory_format=torch.channels_last)  # as in training, to the bit


# ------------------------------------------------------------------------------------------------------------ one run


def evaluate_run(run, args, device):
    """eval.npz of one run; a diverged run is counted in the table and measured no further, nor is one whose checkpoint is gone."""
    config, diverged = finished(run)
    save, checkpoint = run / "eval.npz", run / "checkpoint.pt"
    if diverged:
        return
    if not checkpoint.exists():
        if not save.exists():
            raise UserError("it has no checkpoint.pt, so there is no model to evaluate")
        print(f"{run}: evaluated before, and its checkpoint is gone")
        return
    flags = config["flags"]
    root = args.data_root or flags["data_root"]
    reference = reference_set(flags["data"], root, flags["test_limit"], args.inception_weights, device)
    settings = {"checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12], "images": args.images,
                "iw_samples": args.iw_samples, **reference.about}
    if save.exists() and not args.overwrite and load_arrays(save)["config"].get("evaluation") == settings:
        print(f"{run}: evaluated before")
        return
    print(f"{run}: evaluating")
    vae = load_model(run, config, reference.test.shape[1:], device)
    seed = seed_of(flags["seed"], EVALUATION)
    result = {}
    if reference.network:
        quality = Reference(reference.test, reference.network, metrics.feature_statistics(reference.features))
        result = fids(vae, quality, flags["noise"], torch.Generator(device).manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)
    result |= prior_metrics(vae, reference, generator)
    result |= data_metrics(vae, reference.test[:args.images], flags["noise"], args.iw_samples, generator)
    save_arrays(save, {**config, "evaluation": settings}, status="ok", **result)


def prior_metrics(vae, reference, generator):
    """FID and KID of as many samples as there are test images, the floor beside them, and the latent MMD's sd under its null."""
    n = len(reference.test)
    z1, z2 = (vae.sample(vae.prior, vae.noise(vae.prior, min(n, 2000), generator), relaxed=False) for _ in range(2))
    result = {"latent_mmd_null_sd": metrics.mmd_null_sd(z1, z2, n),
              "latent_mmd_scaled_null_sd": metrics.mmd_null_sd(z1, z2, n, scaled=True)}
    if reference.network:
        result |= distances(reference.network(metrics.sample_images(vae, n, generator)), reference.features)
    return {name: value.cpu() for name, value in result.items()} | reference.floor


def distances(features1, features2):
    """Sample quality from features [n, d]: FID; KID over subsets (mean and sd) and over all pairs; not scaled by 1000."""
    fid = metrics.frechet_distance(*metrics.feature_statistics(features1), *metrics.feature_statistics(features2))
    kid, sd = metrics.kernel_distance(features1, features2)
    return {"fid": fid, "kid": kid, "kid_subset_sd": sd, "kid_full": metrics.latent_mmd(features1, features2, scaled=True)}


def data_metrics(vae, images, noise, samples, generator, block=100):
    """The importance-weighted bound against its number of samples, and the denoising error against the noise; means over images."""
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


class TestSet(NamedTuple):
    """The test images on the device, their features, FID and KID of as many training images, and what they were made with."""
    test: torch.Tensor
    network: Features | None
    features: torch.Tensor | None
    floor: dict
    about: dict


@cache
def reference_set(name, root, test_limit, inception_weights, device):
    """Raises UserError where the data are missing; without a feature network the reference has none, and stderr says why."""
    data = load_images(name, root, test_limit, test_limit)
    train, test = (part[:len(data.test)].to(device) for part in (data.train, data.test))
    about = {"data": name, "test_images": len(test)}
    try:
        network = features_of(name, root, device, inception_weights)
    except UserError as error:
        print(f"no FID and KID for {name}: {error}", file=sys.stderr)
        return TestSet(test, None, None, {}, about)

    def make():
        features = network(test)
        return {"features": features, **{f"{key}_floor": value for key, value in distances(network(train), features).items()}}

    arrays = kept(cache_folder() / f"reference-{digest(train, test)}-{network.about['hash']}.npz", make)
    floor = {key: value for key, value in arrays.items() if key.endswith("_floor")}
    return TestSet(test, network, torch.from_numpy(arrays["features"]), floor, {**about, "features": network.about})


# ----------------------------------------------------------------------------------------------------------- the table


def order(run):
    """By data set and network, and within them as in the paper's tables."""
    flags, label = load_config(run)["flags"], load_config(run)["label"]
    return flags["data"], flags["net"], [*PAPER["objectives"], label].index(label), flags["seed"]


def row_of(run):
    """One run's numbers for the table: its last test metrics and its eval.npz."""
    last = {key: value[-1] for key, value in load_arrays(run / "metrics.npz").items() if key in COLUMNS}
    arrays = load_arrays(run / "eval.npz")
    quality = {"fid": arrays.get("fid", np.nan), "kid_x1000": 1000 * arrays.get("kid", np.nan)}
    return last | quality | {"negative_iw_bound": arrays["negative_iw_bound"][-1]}


def write_table(runs, out):
    """Means and standard errors over seeds beside the paper's numbers: table.md, also printed, and table.npz."""
    configs, diverged = zip(*(finished(run) for run in runs))
    rows = []
    for name, members in group_by_seed(runs, configs):
        config, ok = configs[members[0]], [row_of(runs[i]) for i in members if not diverged[i]]
        row = {"data": config["flags"]["data"], "net": config["flags"]["net"], "objectives": name, "n": len(ok),
               "diverged": len(members) - len(ok), **published(config)}
        for key in COLUMNS:
            values = np.array([numbers.get(key, np.nan) for numbers in ok], float)
            row[f"{key}_mean"] = values.mean() if len(values) else np.nan
            row[f"{key}_se"] = values.std(ddof=1) / len(values)**0.5 if len(values) > 1 else np.nan
        rows.append(row)
    loaded = [load_arrays(run / "eval.npz") for run, bad in zip(runs, diverged) if not bad]
    references = {}
    for arrays in loaded:
        about, flags = arrays["config"]["evaluation"], arrays["config"]["flags"]
        _, _, null_sds = references.setdefault((about["data"], about["test_images"]), (about, arrays, {}))
        null_sds[f"{flags['dim_z']} {flags['latent']} latents"] = arrays["latent_mmd_null_sd"]
    references = references.values()
    save_arrays(out / "table.npz", {"runs": [str(run) for run in runs], "paper": PAPER["source"]},
                **{key: np.array([row[key] for row in rows]) for key in rows[0]})
    text = "\n".join([*markdown(rows, references), "", *footnotes(configs, references), f"- paper: {PAPER['source']}"])
    write_atomic(out / "table.md", f"{text}\n".encode())
    print(f"\n{text}\n\n{out}/table.md")


def published(config):
    """The paper's FID and KID x1000 for this data, network and pair, or nan."""
    flags, objectives = config["flags"], PAPER["objectives"]
    table = PAPER.get(f"{flags['data']} {flags['net']}")
    known = table and config["label"] in objectives and flags["latent"] == "gaussian"
    return {f"paper_{key}": table[key][objectives.index(config["label"])] if known else np.nan for key in ("fid", "kid_x1000")}


def markdown(rows, references):
    """The table's lines: a row per group of seeds, then for each set of test images the floor, what training images get."""
    header = ["data", "net", "objectives", "runs"]
    for key, title in COLUMNS.items():
        header += [title, "paper"] if f"paper_{key}" in rows[0] else [title]
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
    for row in rows:
        line = [row["data"], row["net"], row["objectives"], f"{row['n']}"]
        line[-1] += f" (+{row['diverged']} diverged)" if row["diverged"] else ""
        for key in COLUMNS:
            line.append(spread(row[f"{key}_mean"], row[f"{key}_se"]))
            if f"paper_{key}" in row:
                line.append(spread(row[f"paper_{key}"]))
        lines.append(line)
    for about, arrays, _ in references:
        if "fid_floor" in arrays:
            floor = [spread(arrays["fid_floor"]), "", spread(1000 * arrays["kid_floor"])]
            line = [about["data"], "", f"floor: {about['test_images']} training images", "", *floor]
            lines.append(line + [""] * (len(header) - len(line)))
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(mean, error=np.nan):
    """mean ± error to two digits of the error; "-" where there is no mean."""
    if np.isnan(mean):
        return "-"
    if not error > 0 or abs(mean) > 1e6:
        return f"{mean:.4g}" + ("" if np.isnan(error) else f" ± {error:.2g}")
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def footnotes(configs, references):
    """What the numbers mean and what they were made with, a Markdown list."""
    defaults = vars(train_images.parse_args([]))
    shared = {key: value for key, value in configs[0]["flags"].items()
              if key not in (*NOT_IDENTITY, *train_images.AXES) and all(config["flags"][key] == value for config in configs)}
    budget = " ".join(f"--{flag_name(key)} {value}" for key, value in shared.items() if value != defaults[key])
    notes = ["- mean ± standard error over the runs, which differ in their seed; lower is better; a diverged run is in no mean",
             f"- budget of all runs: {budget or 'the defaults, which are those of the paper'}"]
    for about, _, null_sds in references:
        n, network = about["test_images"], about.get("features")
        if network:
            accuracy = f", test accuracy {network['accuracy']:.4f}" if network["accuracy"] else ""
            notes.append(f"- {about['data']}: FID and KID of N = {n} decoder means of prior draws against the {n} clean test images; "
                         f"KID over 100 subsets of {min(n, 1000)}; features: {network['name']}{accuracy}, weights {network['hash']}")
        null = ", ".join(f"{sd:.2g} ({latents})" for latents, sd in null_sds.items())
        notes.append(f"- {about['data']}: MMD^2 is 0 for equal laws, with a standard deviation of {null}; "
                     f"-IW bound: {about['iw_samples']} samples from q, first {min(n, about['images'])} test images; "
                     "-ELBO and -IW bound in nats per noisy image, MSE per pixel of the clean one")
    return notes


def draw(runs, out):
    """The figures over all runs, and grids of samples of the first finished seed of each group."""
    configs, diverged = zip(*(finished(run) for run in runs))
    plots.trajectories(runs, out / "trajectories.png")
    measured = [run for run, bad in zip(runs, diverged) if not bad]
    if not measured:
        return
    plots.importance_bound(measured, out / "importance_bound.png")
    plots.denoising(measured, out / "denoising.png")
    for latent, figure in (("gaussian", plots.posterior_sd), ("bernoulli", plots.posterior_mean)):
        chosen = [run for run, config in zip(runs, configs) if run in measured and config["flags"]["latent"] == latent]
        if chosen:
            figure(chosen, out / f"{figure.__name__}.png")
    firsts = [next((runs[i] for i in members if not diverged[i]), None) for _, members in group_by_seed(runs, configs)]
    pictured = [run for run in firsts if run and "samples" in load_arrays(run / "metrics.npz")]  # published runs may come without
    if pictured:
        plots.samples(pictured, out / "samples.png")


# ------------------------------------------------------------------------------------------- signal-to-noise of gradients


def gradient_snr(run, args, device):
    """gradient_snr.npz: the signal-to-noise ratio of d loss / d theta at one trained model, by learning objective and N.

    ||E g||^2 / tr Var(g) over minibatches of the run's size, with fresh noise and posterior draws, both estimated without bias; eval
    mode, so that batch norm couples no data. Beside it the cosine of E g with the negative ELBO's: is it variance, or the direction?
    """
    config, diverged = finished(run)
    if diverged:
        raise UserError("it diverged, so there is no trained model")
    flags = config["flags"]
    data = load_images(flags["data"], args.data_root or flags["data_root"], flags["limit"], flags["test_limit"])
    vae = load_model(run, config, data.train.shape[1:], device).eval()
    vae.encoder.requires_grad_(False)
    objectives = [(learn, estimator) for learn in LEARN for estimator in (ESTIMATORS if LEARN[learn].has_estimator else ("plugin",))]
    objectives.remove(("swersky", "released"))  # on images the same as plugin
    if vae.latent == "bernoulli":
        objectives.remove(("fae", "plugin"))
    names = [f"{LEARN[learn].letter} {estimator}" if LEARN[learn].has_estimator else LEARN[learn].letter for learn, estimator in objectives]
    shape = len(objectives), len(SNR_SAMPLES)
    result = {name: np.full(shape, np.nan) for name in ("snr", "snr_log_gamma", "cosine_to_elbo", "gradient_norm")}
    images = data.train.to(device)
    for column, samples in enumerate(SNR_SAMPLES):
        for row, (learn, estimator) in enumerate(objectives):
            if estimator == "unbiased" and samples < 2:
                continue
            generator = torch.Generator(device).manual_seed(seed_of(flags["seed"], EVALUATION, row, samples))
            mean, signal, variance = gradient_moments(vae, images, flags, learn, estimator, samples, args.snr_draws, generator)
            if learn == "elbo":
                elbo_mean, elbo_signal = mean, signal
            result["snr"][row, column], result["snr_log_gamma"][row, column] = (signal / variance).tolist()
            result["gradient_norm"][row, column] = signal[0].sqrt()
            cosine = dot(mean[:-1], elbo_mean[:-1]) / (signal[0].sqrt() * elbo_signal[0].sqrt())
            result["cosine_to_elbo"][row, column] = 1 if learn == "elbo" else cosine
            print(f"{run}: {names[row]}, N = {samples}: signal to noise {result['snr'][row, column]:.3g}", flush=True)
    save_arrays(run / "gradient_snr.npz", {**config, "evaluation": {"draws": args.snr_draws}}, status="ok",
                objectives=np.array(names), samples=np.array(SNR_SAMPLES), **result)
    plots.gradient_snr([run], run / "gradient_snr.png")
    print(f"{run / 'gradient_snr.png'}")


def gradient_moments(vae, images, flags, learn, estimator, samples, draws, generator):
    """E g [P], and ||E g||^2 and tr Var(g) without bias, each [2]: of the decoder's weights, of log_gamma (the last of the P)."""
    theta = [*vae.decoder.parameters(), vae.log_gamma]
    total, squares = 0, 0
    for _ in range(draws):
        rows = torch.randint(len(images), (flags["batch"],), generator=generator, device=images.device)
        x = images[rows].float() / 255
        x = x + flags["noise"] * torch.randn(x.shape, generator=generator, device=x.device)

        def noise(q):
            return vae.noise(q, samples, generator)

        loss = joint_loss(vae, x, learn, noise) if LEARN[learn].joint else learn_loss(vae, x, learn, noise, estimator)
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), theta)]).double()
        total, squares = total + g, squares + halves(g)
    mean = total / draws
    variance = (squares - draws * halves(mean)) / (draws - 1)
    return mean, halves(mean) - variance / draws, variance


def halves(g):
    """Squared norms of the gradient of the decoder's weights and of log_gamma, [2]."""
    return torch.stack([dot(g[:-1], g[:-1]), g[-1] ** 2])


if __name__ == "__main__":
    command_line(parse_args, main)
