"""The signal-to-noise ratio of the decoder's gradient, by learning objective and number of posterior samples, at trained models.

    python -m studies.gradient_snr runs/images/RUN

The paper asks in its discussion whether the variance of the gradient explains the failures of swersky and bao. Each image run is
measured at its last checkpoint; its folder gets gradient_snr.npz and the figure.
"""

import copy
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import load_images, moved_folder, noisy
from evaluate import checked_config, of_each_run, run_status
from objectives import LEARN, dot
from training import EVALUATION, latent_noise, seed_of, shared_losses, theta_loss
from vsm.cli import Parser, UserError, command_line, positive
from vsm.device import pick_device, set_precision
from vsm.figures import images as figures
from vsm.loading import flags_of, load_vae, place_of_images
from vsm.runs import save_arrays
from vsm.tables import failed, with_error

SAMPLES = (1, 2, 5, 10)
BLOCKS = 10  # the jackknife leaves out one block of draws at a time


class Moments(NamedTuple):
    """Moments of the decoder's gradient g [P], whose last component is that of log_gamma.

    mean [P]: E g. signal: ||E g||^2. variance: tr Var(g). Both are unbiased estimates. snr_se: the standard error of their ratio.
    These three are [2]: one number for the decoder's weights, one for log_gamma.
    """
    mean: torch.Tensor
    signal: torch.Tensor
    variance: torch.Tensor
    snr_se: torch.Tensor


def measure_gradient_snr(vae, images, flags, draws, tell=lambda line: None):
    """Statistics of the decoder's gradient g = d loss / d theta at `vae`, arrays [objectives, len(SAMPLES)] by name.

    The keys objectives and samples name the axes; undefined entries are NaN. snr is ||E g||^2 / tr Var(g) over minibatches with
    fresh noise and posterior draws; snr_log_gamma is that of log gamma alone. Each has its standard error over draws, by the
    jackknife, in a key that ends in _se. cosine_to_elbo is the cosine between E g and the negative ELBO's E g.

    images: uint8 training images on the model's device. flags: a run's batch, noise and seed. Batch norm is in evaluation mode,
    in which it couples no data; the model is left as it was. tell: gets a line of text for each entry.
    """
    objectives = compared_objectives(vae.latent, flags["noise"])
    names = [LEARN[name].letter + (f" {estimator}" if LEARN[name].takes("estimator") else "") for name, estimator in objectives]
    result = defaultdict(lambda: np.full((len(objectives), len(SAMPLES)), np.nan))
    vae = differentiable_decoder(vae, "eval")
    for column, samples in enumerate(SAMPLES):
        for row, (learn, estimator) in enumerate(objectives):
            if estimator == "unbiased" and samples < 2:
                continue
            generator = torch.Generator(images.device).manual_seed(seed_of(flags["seed"], EVALUATION, row, samples))
            moments = gradient_moments(vae, images, flags, learn, estimator, samples, draws, generator)
            if learn == "elbo":
                elbo = moments
            snr, error, norm = moments.signal / moments.variance, moments.snr_se, moments.signal[0].sqrt()
            cosine = 1 if learn == "elbo" else dot(moments.mean[:-1], elbo.mean[:-1]) / (norm * elbo.signal[0].sqrt())
            values = {"snr": snr[0], "snr_se": error[0], "snr_log_gamma": snr[1], "snr_log_gamma_se": error[1],
                      "cosine_to_elbo": cosine, "gradient_norm": norm}
            for key, value in values.items():
                result[key][row, column] = value
            ratio = with_error(snr[0].item(), error[0].item(), ".3g", ".1g")
            tell(f"{names[row]}, N = {samples}: the signal-to-noise ratio is {ratio}")
    return {"objectives": np.array(names), "samples": np.array(SAMPLES), **result}


def compared_objectives(latent, noise):
    """[(objective, estimator)] with the ELBO first, without duplicates and without those that latents or noise do not allow."""
    pairs = [(name, estimator) for name, entry in LEARN.items()
             for estimator in (entry.estimators if entry.takes("estimator") else ("plugin",))]
    pairs.remove(("swersky", "released"))  # equals plugin on images
    return [pair for pair in pairs
            if (latent == "gaussian" or not LEARN[pair[0]].joint) and (noise or not LEARN[pair[0]].takes("t"))]


def differentiable_decoder(vae, mode):
    """A copy of the model in which only theta requires gradients, and batch norm is in `mode`."""
    vae = copy.deepcopy(vae).train(mode == "train").requires_grad_(True)
    vae.encoder.requires_grad_(False)
    return vae


def gradient_moments(vae, images, flags, learn, estimator, samples, draws, generator):
    """The Moments of the gradient over `draws` minibatches of the images, each with its own noise and posterior draws."""
    theta, blocks = [*vae.decoder.parameters(), vae.log_gamma], min(BLOCKS, draws)
    total = squares = 0
    left_out = [[0, 0, 0] for _ in range(blocks)]  # sum of g, of its squares, and the number of draws
    for draw in range(draws):
        g = minibatch_gradient(vae, theta, images, flags, learn, estimator, samples, generator)
        total, squares = total + g, squares + squared_norms(g)
        part = left_out[draw % blocks]
        part[:] = part[0] + g.float(), part[1] + squared_norms(g), part[2] + 1
    signal, variance = unbiased_moments(total, squares, draws)
    if draws < 3:  # the jackknife would leave one draw, which has no variance
        return Moments(total / draws, signal, variance, torch.full_like(signal, math.nan))
    parts = (unbiased_moments(total - part_total, squares - part_squares, draws - n) for part_total, part_squares, n in left_out)
    ratios = torch.stack([part_signal / part_variance for part_signal, part_variance in parts])
    return Moments(total / draws, signal, variance, ratios.std(0, correction=0) * (blocks - 1) ** 0.5)


def noisy_minibatch(images, flags, generator):
    """A random minibatch of `images`, uint8, in [0, 1] and with the run's noise, and that noise before scaling."""
    rows = torch.randint(len(images), (flags["batch"],), generator=generator, device=images.device)
    x, _, standard = noisy(images[rows], flags["noise"], generator)
    return x, standard


def minibatch_gradient(vae, theta, images, flags, learn, estimator, samples, generator):
    """The gradient d loss / d theta of one random minibatch, a float64 vector [P]."""
    x, data_noise = noisy_minibatch(images, flags, generator)
    noise = latent_noise(vae, x, samples, generator)
    if LEARN[learn].joint:
        loss, _ = shared_losses(vae, x, learn, learn, noise)
    else:
        t = -data_noise.flatten(1) / flags["noise"] if LEARN[learn].takes("t") else None
        loss = theta_loss(vae, x, learn, noise, estimator=estimator, t=t)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), theta)]).double()


def unbiased_moments(total, squares, draws):
    """Unbiased ||E g||^2 and tr Var(g), each [2], from the sums over draws of g [P] and of its squared norms [2]."""
    mean = total / draws
    variance = (squares - draws * squared_norms(mean)) / (draws - 1)
    return squared_norms(mean) - variance / draws, variance


def squared_norms(g):
    """The squared norms of the two parts of g [P], the decoder's weights and log_gamma: [2]."""
    return torch.stack([dot(g[:-1], g[:-1]), g[-1] ** 2])


def parser_of_runs(description):
    """The parser of a measurement of trained image models, to which it adds flags of its own."""
    parser = Parser(description=description)
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="folders that train_images.py made")
    flag("--data-root", default=None, help="folder of the data sets (default: the one that each run had)")
    flag("--data", type=moved_folder, metavar="folder:PATH", help="where the pictures of runs on a folder are now")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    return parser


def measure_models(args, name, settings, measure):
    """Write {name}.npz of each run: the arrays that measure(run, vae, images, flags) returns, and `settings` in its config.

    vae is the model of the run's last checkpoint, images are its training images, uint8 on the device. Returns the paths. A run
    that cannot be measured is named on stderr; raises UserError where none can.
    """
    device = pick_device(args.device)
    set_precision("float32", device)

    def measured(run):
        config, status = checked_config(run), run_status(run)
        if failed(status):
            raise UserError(f"it {status.partition('@')[0]}, so there is no trained model")
        vae, flags, save = load_vae(run.name, device), flags_of(config), Path(run.name) / f"{name}.npz"
        data = load_images(*place_of_images(run, config, args), flags["limit"], flags["test_limit"])
        arrays = measure(run, vae, data.train.to(device), flags)
        save_arrays(save, {**config, "evaluation": settings}, status=status, **arrays)
        return save

    return of_each_run(args.runs, measured)


def parse_args(argv=None):
    parser = parser_of_runs(__doc__)
    parser.add_argument("--draws", type=positive, default=100, help="minibatches that the mean and variance are taken over")
    args = parser.parse_args(argv)
    if args.draws < 2:
        parser.error("--draws must be at least 2: the variance divides by the number of draws less one")
    return args


def main(args):
    def measure(run, vae, images, flags):
        return measure_gradient_snr(vae, images, flags, args.draws, lambda line: print(f"{run}: {line}", flush=True))

    for save in measure_models(args, "gradient_snr", {"draws": args.draws}, measure):
        figures.gradient_snr([save.parent], save.with_suffix(".png"))
        print(save.with_suffix(".png"))


if __name__ == "__main__":
    command_line(parse_args, main)
