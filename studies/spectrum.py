"""Linear VAEs on real images: which variances does each learning objective give its model?

    python -m studies.spectrum mnist        # 29 models, by minibatches: 15 min on a CPU

The data are the pixels less their mean, without the pixels that never change; gamma is given and stays fixed. Every model starts
at the PCA solution, the maximum of the likelihood, so that a departure from its spectrum is due to the objective.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from data import data_name, load_images
from objectives import LEARN
from studies.figures import spectrum as figures
from vsm.cli import Parser, UserError, add_output, command_line, count, positive, positive_float
from vsm.device import pick_device
from vsm.linear import expected_slope, kappa, linear_vae, set_posterior
from vsm.names import run_name
from vsm.runs import Run

SAMPLES = (1, 2, 5, 20)
OBJECTIVES = (("elbo", "plugin"), ("fd", "plugin"), ("swersky", "plugin"), ("swersky", "unbiased"), ("bao", "plugin"),
              ("bao", "unbiased"), ("dsm", "plugin"), ("dsm", "unbiased"))
NOISE = 0.1  # sd of the noise in the data of an objective that takes its score
DECAY = 100  # steps after which the step has halved; it falls as 1 / (1 + step / DECAY)
EXPECTED_UPDATES = 1000


def learn_spectra(args, device):
    """The arrays of metrics.npz, for M models of K = `--latents` latents and D pixels. Eigenvalues fall.

    objective, estimator, samples, kappa [M] say what a model is trained by; gamma is the decoder's variance; eigenvalues [D] are
    the data's without noise, whose sd is noise [M]; all eigenvalues fall. learnt [M, K] are the eigenvalues of gamma I + W W'
    after training, expected [M, K] those after updates by the expected gradient from random weights. second_moment [M, K] is
    E z^2 under the aggregate posterior, by falling weight.
    """
    pixels = load_pixels(args).to(device)
    C, values, start = principal_components(pixels, args)
    models = [(*objective, N) for objective in OBJECTIVES for N in SAMPLES if objective[1] != "unbiased" or N > 1]
    rows = [train_one_model(pixels, C, start, args, *model) for model in tqdm(models, desc="models", disable=None)]
    keys = [(noise_of(model[0]), round(kappa(*model), 9)) for model in models]  # the expected update depends on them alone
    expected = {key: expected_eigenvalues(with_noise(C, model[0]), args, *model)
                for key, model in dict(zip(keys, models)).items()}
    objective, estimator, samples = (np.array(column) for column in zip(*models))
    return {"objective": objective, "estimator": estimator, "samples": samples, "gamma": args.gamma,
            "kappa": np.array([kappa(*model) for model in models]), "eigenvalues": values.cpu().numpy(),
            "noise": np.array([noise for noise, _ in keys]), "expected": np.stack([expected[key] for key in keys]),
            **{key: np.stack([row[key] for row in rows]) for key in rows[0]}}


def noise_of(objective):
    return NOISE if LEARN[objective].takes("t") else 0.0


def with_noise(C, objective):
    """The covariance C of the pixels, and that of the noise that the objective's data have."""
    return C + noise_of(objective) ** 2 * torch.eye(len(C), dtype=C.dtype, device=C.device)


def load_pixels(args):
    """The training images as float32 rows less their mean, without the pixels that never change."""
    pixels = load_images(args.data, args.data_root, limit=args.limit).train.flatten(1)
    pixels = pixels[:, (pixels != pixels[0]).any(0)].float() / 255
    if args.latents > pixels.shape[1]:
        raise UserError(f"--latents {args.latents} are more than the {pixels.shape[1]} pixels of {args.data} that change")
    return pixels - pixels.mean(0)


def principal_components(pixels, args):
    """The covariance C of the pixels [D, D], its eigenvalues, which fall [D], and W [D, K] at the maximum of the likelihood."""
    C = (pixels.T.double() @ pixels.double()) / len(pixels)
    values, vectors = torch.linalg.eigh(C)
    W = vectors[:, -args.latents:] * (values[-args.latents:] - args.gamma).clamp(min=0).sqrt()
    return C, values.flip(0), W


def train_one_model(pixels, C, start, args, objective, estimator, N):
    """The rows `learnt` and `second_moment` [K] of one model; NaN where it diverges."""
    W = trained_weights(pixels, start, args, objective, estimator, N)
    if not W.isfinite().all():
        return dict.fromkeys(("learnt", "second_moment"), np.full(args.latents, math.nan))
    W = W[:, W.square().sum(0).argsort(descending=True)]
    vae = linear_vae(W, args.gamma)
    set_posterior(vae)
    phi, s2 = vae.encoder.phi.data, (2 * vae.encoder.log_std.data).exp()
    return {"learnt": model_variances(W, args.gamma),
            "second_moment": ((phi @ with_noise(C, objective) * phi).sum(1) + s2).cpu().numpy()}


def model_variances(W, gamma):
    """The K largest eigenvalues of gamma I + W W', which fall."""
    return (gamma + torch.linalg.svdvals(W).square()).cpu().numpy()


def expected_eigenvalues(C, args, objective, estimator, N):
    """The eigenvalues of gamma I + W W' [K] after updates by the expected gradient, from random weights."""
    generator = torch.Generator().manual_seed(args.seed)
    W = torch.randn(len(C), args.latents, generator=generator, dtype=torch.float64).to(C) / math.sqrt(len(C))
    for _ in range(EXPECTED_UPDATES):
        W = W - 0.5 * expected_slope(W, C, args.gamma, objective, estimator, N)
    return model_variances(W, args.gamma)


def trained_weights(pixels, start, args, objective, estimator, N):
    """W [D, K] after gradient steps of the objective on minibatches from `start`; NaN where it diverges.

    In each step q is held fixed at the exact posterior of the W before the step. Each image is in its minibatch twice, with
    posterior noise of either sign, so that the terms of the gradient that are linear in the noise cancel. If the data have
    noise, it is there four times, with either sign of both. The step is `--lr` times gamma^2 (gamma for the ELBO, in whose
    gradient gamma appears once) and falls as one over the number of steps. The result is the average of W over the last half.
    """
    gamma, device = args.gamma, pixels.device
    vae = linear_vae(start.float(), gamma, (1, 1, len(start)))  # as an image, which the released estimator needs
    vae.encoder.requires_grad_(False)
    optimiser = torch.optim.SGD(vae.decoder.parameters(), lr=args.lr * (gamma if objective == "elbo" else gamma**2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step / DECAY))
    generator = torch.Generator(device).manual_seed(args.seed)
    average, first = torch.zeros_like(vae.decoder.weight), args.iterations // 2  # the first step that is in the average
    sd, t = noise_of(objective), None
    images = args.batch // (4 if sd else 2)
    for step in range(args.iterations):
        set_posterior(vae)
        x = pixels[torch.randint(len(pixels), (images,), generator=generator, device=device)]
        noise = torch.randn(N, images, args.latents, generator=generator, device=device)
        if sd:
            e = torch.randn(x.shape, generator=generator, device=device)
            x, noise, t = torch.cat((x + sd * e, x - sd * e)), torch.cat((noise, noise), 1), torch.cat((-e, e, -e, e)) / sd
        x = torch.cat((x, x)).view(-1, 1, 1, len(start)).requires_grad_(LEARN[objective].needs_b)
        q = vae.encode(x)
        z = vae.sample(q, torch.cat((noise, -noise), 1)).detach()
        optimiser.zero_grad()
        LEARN[objective](vae, x, q, z, estimator=estimator, t=t).mean().backward(inputs=[vae.decoder.weight])
        optimiser.step()
        schedule.step()
        if not vae.decoder.weight.isfinite().all():
            return torch.full_like(start, math.nan)
        if step >= first:
            average += vae.decoder.weight.detach() / (args.iterations - first)
    return average.double()


def report_spectrum(arrays):
    """Print a line for every model: learnt against predicted variances in the ten largest directions, E z^2, active latents."""
    K, gamma = arrays["learnt"].shape[1], arrays["gamma"]
    print("ten largest directions: learnt / predicted variance, means of v / learnt and of E z^2; active latents, predicted")
    print("objective estimator  N   kappa  v / learnt  learnt / predicted    E z^2   active")
    for m, k in enumerate(arrays["kappa"]):
        v, learnt = arrays["eigenvalues"][:K] + arrays["noise"][m] ** 2, arrays["learnt"][m]
        ratio = (learnt / np.maximum(v / k, gamma))[:10]
        print(f"{arrays['objective'][m]:9} {arrays['estimator'][m]:9} {arrays['samples'][m]:3} {k:7.3f} "
              f"{(v / learnt)[:10].mean():11.3f}{ratio.min():12.3f} to {ratio.max():.3f} "
              f"{arrays['second_moment'][m, :10].mean():8.3f} {(learnt > 1.05 * gamma).sum():5} {(v > 1.05 * k * gamma).sum():3}")
    v = arrays["eigenvalues"][:K] + arrays["noise"][:, None] ** 2
    error = 100 * np.abs(arrays["expected"] / np.maximum(v / arrays["kappa"][:, None], gamma) - 1)
    print(f"expected updates, largest error: {error.max():.2g} % of all {K} directions, {error[:, :10].max():.2g} % of ten")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=data_name, help="mnist, fashion, celeba, glyphs or folder:PATH")
    flag = parser.add_argument
    flag("--data-root", default="data", help="folder of the data sets")
    flag("--limit", type=count, default=0, help="use the first so many training images; 0: all")
    flag("--latents", type=positive, default=48, help="number of latents")
    flag("--gamma", type=positive_float, default=0.25, help="variance of p(x|z), which is not learnt")
    flag("--seed", type=count, default=0, help="seed of the minibatches and the posterior samples")
    flag("--iterations", type=positive, default=1500, help="gradient steps")
    flag("--lr", type=positive_float, default=0.2, help="the first step, in units of gamma^2")
    flag("--batch", type=positive, default=100, help="data per step, a multiple of 4")
    add_output(flag, "runs/spectrum", "cpu", " (the models are so small that a CPU is as fast)")
    args = parser.parse_args(argv)
    if args.batch % 4:
        parser.error(f"--batch {args.batch} must be a multiple of 4: an image is in its minibatch twice, with noise four times")
    args.out = args.out or f"runs/spectrum/{run_name(args, ('data', 'seed'), vars(parser.parse_args([args.data])))}"
    return args


def main(args):
    device = pick_device(args.device)
    with Run(args.out, "spectrum", vars(args), device, args.overwrite) as run:
        if not run.status:
            arrays = learn_spectra(args, device)
            run.save_metrics(**arrays, status="ok" if np.isfinite(arrays["learnt"]).all() else f"diverged@{args.iterations}")
            report_spectrum(arrays)
        figures.spectrum([run.path], run.path / "spectrum.png")


if __name__ == "__main__":
    command_line(parse_args, main)
