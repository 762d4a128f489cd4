"""Train an ensemble of small VAEs on 2-D data with one pair of learning and inference objectives, then evaluate it exactly.

One point of the paper's Figure 3, ten seeds at once (minutes on two cores):
    python train_synthetic.py --data mixture --learn fd --infer kld --inner-steps 5
Seconds:
    python train_synthetic.py --data mixture --seeds 3 --batch 100 --epochs 5 --test-size 500 --importance-samples 2000

The run is a folder under runs/synthetic: config.json, checkpoint.pt, metrics.npz, PNGs. The same command again resumes it.
"""

import argparse
import math

import torch
from torch.autograd import grad
from torch.func import functional_call

import plots
from distributions import LAWS
from metrics import evaluating, importance, negative_elbo, posterior_fd
from models import build_ensemble
from objectives import ESTIMATORS, HAS_ESTIMATOR, INFER, LEARN, dot, label
from runs import Formatter, Run, command_line, count, pick_device, positive, positive_float, run_name
from training import EVALUATION, INIT, NOISE, adam, infer_loss, learn_loss, seed_of, stack, train

AXES = ("data", "infer", "learn", "inner_steps", "bilevel_steps", "seed")


def kept_step(vae, phi, x, infer, noise, lr):
    """phi after one more SGD step, as a function of theta and of phi before it: {name: tensor} in, {name: tensor} out.

    The step differentiates by `here`, which z of `--infer fd` does not see: held in the step, z stays a function of phi all the same.
    """
    x, here = x.detach().requires_grad_(), {name: p.view_as(p) for name, p in phi.items()}
    q = vae.posterior(functional_call(vae.encoder, here, x))
    z = vae.sample(vae.posterior(functional_call(vae.encoder, phi, x)) if infer == "fd" else q, noise)
    loss = INFER[infer](vae, x, q, z).mean(-1).sum()
    gradient = grad(loss, list(here.values()), create_graph=True)
    return {name: p - lr * g for (name, p), g in zip(phi.items(), gradient)}


def bilevel_loss(vae, phi, x, learn, noise, estimator="plugin"):
    """The loss of theta [S, B] where phi is a function of theta: z is reparametrised, so that the gradient is exact."""
    x = x.detach().requires_grad_()  # a leaf of its own: phi depends on x too, but b_n is the derivative at fixed phi
    q = vae.posterior(functional_call(vae.encoder, phi, x))
    return LEARN[learn](vae, x, q, vae.sample(q, noise), **({"estimator": estimator} if learn in HAS_ESTIMATOR else {}))


class EnsembleTrainer:
    """S VAEs that train at once, each on minibatches and noise from a generator of its own, so that it equals its seed alone.

    One decoder update (B.1 of the paper): K encoder steps by SGD, J more whose dependence on theta is kept, then Adam on theta.
    """

    def __init__(self, args, device):
        seeds = range(args.seed, args.seed + args.seeds)
        self.args, self.law, self.device, self.steps_per_epoch = args, LAWS[args.data], device, args.steps_per_epoch
        self.vae = build_ensemble(2, 2, args.hidden, [seed_of(seed, INIT) for seed in seeds], init_sd=args.init_sd).to(device)
        self.phi, self.theta = list(self.vae.encoder.parameters()), [*self.vae.decoder.parameters(), self.vae.log_gamma]
        self.adam = adam(self.theta, args.lr)
        self.generators = [torch.Generator(device).manual_seed(seed_of(seed, NOISE)) for seed in seeds]
        # Standard normals of one update, a row per member: what the data are made of, then what each step's z is made of.
        self.shapes = [(self.law.dim_noise, args.batch), (args.inner_steps + args.bilevel_steps + 1, args.samples, 2, args.batch)]
        self.noise = torch.empty(len(seeds), sum(map(math.prod, self.shapes)), device=device)
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.diverged_at = torch.full((len(seeds),), torch.iinfo(torch.int64).max, device=device)
        self.sums = torch.zeros(3, len(seeds), device=device)  # of the two losses, and their number
        self.step = 0

    def run_step(self):
        for row, generator in zip(self.noise, self.generators):
            row.normal_(generator=generator)
        self.update()
        self.step += 1

    def update(self):
        """One minibatch and the `noise` drawn for it; nothing here waits for the device."""
        args, vae = self.args, self.vae
        data, z = (part.unflatten(1, shape) for part, shape in zip(self.noise.split([*map(math.prod, self.shapes)], 1), self.shapes))
        x, noise = self.law.transform(data.mT), z.permute(1, 2, 0, 4, 3)  # [S, B, 2], [K + J + 1, N, S, B, Dz]

        self.differentiate(phi=True)
        for k in range(args.inner_steps):
            infer = infer_loss(vae, x, args.infer, lambda q: noise[k]).mean(-1)
            gradient = grad(infer.sum(), self.phi)
            with torch.no_grad():
                torch._foreach_add_(self.phi, gradient, alpha=-args.inner_lr)

        if args.bilevel_steps:
            self.differentiate(phi=True, theta=True)
            phi = dict(vae.encoder.named_parameters())
            for k in range(args.inner_steps, args.inner_steps + args.bilevel_steps):
                phi = kept_step(vae, phi, x, args.infer, noise[k], args.inner_lr)
            learn = bilevel_loss(vae, phi, x, args.learn, noise[-1], args.estimator).mean(-1)
        else:
            self.differentiate(theta=True)
            learn = learn_loss(vae, x, args.learn, lambda q: noise[-1], args.estimator).mean(-1)

        for p, gradient in zip(self.theta, grad(learn.sum(), self.theta)):
            p.grad = gradient
        self.adam.step()
        with torch.no_grad():
            if args.bilevel_steps:
                torch._foreach_copy_(self.phi, list(phi.values()))
            self.sums += torch.stack([infer, learn, torch.ones_like(learn)])
            bad = torch.where((learn + vae.log_gamma).isfinite(), self.diverged_at, self.clock)
            self.diverged_at.copy_(torch.minimum(self.diverged_at, bad))
            self.clock += 1

    def differentiate(self, phi=False, theta=False):
        for params, moves in ((self.phi, phi), (self.theta, theta)):
            for p in params:
                p.requires_grad_(moves)
