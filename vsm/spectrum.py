"""Linear VAEs on real images: which variances does each learning objective give its model? (`python param_recovery.py --spectrum mnist`)

The data are the pixels less their mean, without those that never change; gamma is given and held.
Every model starts at the PCA solution, the maximum of the likelihood, so that a spectrum that departs from it is the objective's doing.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from data import load_images
from objectives import LEARN
from vsm.cli import UserError
from vsm.linear import expected_slope, kappa, linear_vae, set_posterior

SAMPLES = (1, 2, 5, 20)
OBJECTIVES = (("elbo", "plugin"), ("fd", "plugin"), ("swersky", "plugin"), ("swersky", "unbiased"), ("bao", "plugin"), ("bao", "unbiased"))
DECAY = 100  # steps after which the step has halved; it falls as 1 / (1 + step / DECAY)
EXPECTED_UPDATES = 1000


def spectrum(args, device):
    """The arrays of metrics.npz: M models of K = `--latents` latents, D pixels. Eigenvalues are sorted, the largest first.

    objective, estimator, samples, kappa [M]; gamma; eigenvalues [D] of the data; learnt [M, K], those of gamma I + W W' after
    training, and expected [M, K], after expected updates from a random start; second_moment [M, K], E z^2 of the aggregate posterior of
    the latent with the j-th largest weights.
    """
    pixels = load_pixels(args).to(device)
    gamma = args.gamma
    C = (pixels.T.double() @ pixels.double()) / len(pixels)
    models = [(objective, estimator, N) for objective, estimator in OBJECTIVES for N in SAMPLES if estimator != "unbiased" or N > 1]
    bar = tqdm(models, desc="models", disable=None)
    rows = [one_model(pixels, C, args, *model) for model in bar]
    ends = {round(kappa(*model), 9): model for model in models}  # the expected update depends on the model through kappa alone
    ends = {key: expected_end(C, args, *model) for key, model in ends.items()}
    objective, estimator, samples = (np.array(column) for column in zip(*models))
    return {"objective": objective, "estimator": estimator, "samples": samples, "gamma": gamma,
            "kappa": np.array([kappa(*model) for model in models]), "eigenvalues": descending(C),
            "expected": np.stack([ends[round(kappa(*model), 9)] for model in models]),
            **{key: np.stack([row[key] for row in rows]) for key in rows[0]}}


def load_pixels(args):
    """The training images as float32 rows less their mean, without the pixels that never change."""
    pixels = load_images(args.spectrum, args.data_root, limit=args.limit).train.flatten(1)
    pixels = pixels[:, (pixels != pixels[0]).any(0)].float() / 255
    if args.latents > pixels.shape[1]:
        raise UserError(f"--latents {args.latents} are more than the {pixels.shape[1]} pixels of {args.spectrum} that change")
    return pixels - pixels.mean(0)


def descending(C):
    return torch.linalg.eigvalsh(C).flip(0).cpu().numpy()


def one_model(pixels, C, args, objective, estimator, N):
    gamma = args.gamma
    W = train(pixels, C, args, objective, estimator, N)
    W = W[:, W.square().sum(0).argsort(descending=True)]
    vae = linear_vae(W, gamma)
    set_posterior(vae)
    phi, s2 = vae.encoder.phi.data, (2 * vae.encoder.log_std.data).exp()
    learnt = gamma + torch.linalg.svdvals(W).square()
    return {"learnt": learnt.cpu().numpy(), "second_moment": ((phi @ C * phi).sum(1) + s2).cpu().numpy()}


def expected_end(C, args, objective, estimator, N):
    """The eigenvalues of gamma I + W W' [K] after expected updates from random weights."""
    W = torch.randn(len(C), args.latents, generator=torch.Generator().manual_seed(args.seed), dtype=torch.float64).to(C) / math.sqrt(len(C))
    for _ in range(EXPECTED_UPDATES):
        W = W - 0.5 * expected_slope(W, C, args.gamma, objective, estimator, N)
    return args.gamma + torch.linalg.svdvals(W).square().cpu().numpy()


def train(pixels, C, args, objective, estimator, N):
    """W [D, K], float64: gradient steps of the objective on minibatches, q held at the exact posterior of the W before each step.

    Each image is in its minibatch twice, with posterior noise of either sign, so that the terms of the gradient that are linear in the
    noise cancel. The step is `--lr` times gamma^2 (gamma for the ELBO, in whose gradient gamma appears
    once) and falls as one over the number of
    steps. W is the average over the last half of the steps.
    """
    gamma, device = args.gamma, pixels.device
    values, vectors = torch.linalg.eigh(C)
    start = vectors[:, -args.latents:] * (values[-args.latents:] - gamma).clamp(min=0).sqrt()
    vae = linear_vae(start.float(), gamma, (1, 1, len(C)))  # as an image, for the released estimator's sake
    vae.encoder.requires_grad_(False)
    optimiser = torch.optim.SGD(vae.decoder.parameters(), lr=args.lr * (gamma if objective == "elbo" else gamma**2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step / DECAY))
    options = {"estimator": estimator} if objective in ("swersky", "bao") else {}
    generator = torch.Generator(device).manual_seed(args.seed)
    average, averaged = torch.zeros_like(vae.decoder.weight), args.iterations - args.iterations // 2
    for step in range(args.iterations):
        set_posterior(vae)
        x = pixels[torch.randint(len(pixels), (args.batch // 2,), generator=generator, device=device)]
        x = torch.cat((x, x)).view(-1, 1, 1, len(C)).requires_grad_(objective == "bao")
        q = vae.encode(x)
        noise = torch.randn(N, args.batch // 2, args.latents, generator=generator, device=device)
        z = vae.sample(q, torch.cat((noise, -noise), 1)).detach()
        optimiser.zero_grad()
        LEARN[objective](vae, x, q, z, **options).mean().backward(inputs=[vae.decoder.weight])
        optimiser.step()
        schedule.step()
        if step >= args.iterations // 2:
            average += vae.decoder.weight.detach() / averaged
    return average.double()


def report_spectrum(arrays):
    """Print, for every model, learnt over predicted variances of the ten largest directions, E z^2, and the active latents."""
    K, gamma = arrays["learnt"].shape[1], arrays["gamma"]
    print("objective estimator  N   kappa   v / learnt (mean)   learnt / predicted, 10 largest   E z^2 (mean)   active, predicted")
    for m, k in enumerate(arrays["kappa"]):
        v, learnt = arrays["eigenvalues"][:K], arrays["learnt"][m]
        ratio = (learnt / np.maximum(v / k, gamma))[:10]
        print(f"{arrays['objective'][m]:9} {arrays['estimator'][m]:9} {arrays['samples'][m]:3} {k:7.3f} {(v / learnt)[:10].mean():14.3f} "
              f"{ratio.min():22.3f} to {ratio.max():.3f} {arrays['second_moment'][m, :10].mean():19.3f} "
              f"{(learnt > 1.05 * gamma).sum():12} {(v > 1.05 * k * gamma).sum():6}")
    error = np.abs(arrays["expected"] / np.maximum(arrays["eigenvalues"][:K] / arrays["kappa"][:, None], gamma) - 1)
    print(f"expected updates, largest error of all {K} directions: {100 * error.max():.2g} %; of the ten largest {100 * error[:, :10].max():.2g} %")
