"""Train an ensemble of small VAEs on 2-D data with one pair of learning and inference objectives, then evaluate it exactly.

One point of the paper's Figure 3, ten seeds at once (minutes on two cores):
    python train_synthetic.py --data mixture --learn fd --infer kld --inner-steps 5
Seconds:
    python train_synthetic.py --data mixture --seeds 3 --batch 100 --epochs 5 --test-size 500 --importance-samples 2000

The run is a folder under runs/synthetic: config.json, checkpoint.pt, metrics.npz, PNGs. The same command again resumes it.
"""

import argparse
import math

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call

import plots
from metrics import importance, negative_elbo, posterior_fd
from models import build_ensemble
from objectives import ESTIMATORS, HAS_ESTIMATOR, INFER, LEARN, dot, label
from training import (
    EVALUATION,
    INIT,
    NOISE,
    adam,
    infer_loss,
    learn_loss,
    resolve_pair,
    restore,
    restore_generator,
    seed_of,
    set_gradients,
    stack,
    state_of,
    train,
)
from vsm.cli import Formatter, command_line, count, positive, positive_float
from vsm.device import evaluating, pick_device
from vsm.laws import LAWS
from vsm.runs import Run, run_name
from vsm.speed import capture, compiled, refuse_to_compile

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
        self.generators = [torch.Generator(device).manual_seed(seed_of(seed, NOISE)) for seed in seeds]
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.diverged_at = torch.full((len(seeds),), torch.iinfo(torch.int64).max, device=device)
        self.sums = torch.zeros(3, len(seeds), device=device)  # of the losses of phi and theta, and their number
        self.step, self.graph, self.captured = 0, device.type == "cuda" and not args.no_graph, None
        self.adam = adam(self.theta, args.lr, capturable=self.graph)
        if args.compile:
            self.infer, self.learn = compiled(self.infer), compiled(self.learn)

        # The standard normals of one update, a row per member: first what the data are made of, then what each step's z is made of.
        data, z = (self.law.dim_noise, args.batch), (args.inner_steps + args.bilevel_steps + 1, args.samples, 2, args.batch)
        self.noise = torch.empty(len(seeds), math.prod(data) + math.prod(z), device=device)
        first, rest = self.noise.split([math.prod(data), math.prod(z)], dim=1)
        self.data_noise = first.unflatten(1, data).mT  # [S, B, dim_noise]
        self.z_noise = rest.unflatten(1, z).permute(1, 2, 0, 4, 3)  # [K + J + 1, N, S, B, Dz]

    def run_step(self):
        """One decoder update, captured where there is a GPU, eager elsewhere."""
        for row, generator in zip(self.noise, self.generators):
            row.normal_(generator=generator)
        self.step += 1
        if not self.graph:
            self.update()
            return
        if self.captured is None:
            self.captured = capture(self.update, self.state())
        self.captured.replay()

    def update(self):
        """A function of `noise` and of the state alone; nothing here waits for the device."""
        args, vae, x = self.args, self.vae, self.law.transform(self.data_noise)
        vae.encoder.requires_grad_(True)
        vae.decoder.requires_grad_(False)
        for noise in self.z_noise[:args.inner_steps]:
            infer, *gradient = self.infer(vae, x, noise)
            with torch.no_grad():
                torch._foreach_add_(self.phi, gradient, alpha=-args.inner_lr)

        vae.encoder.requires_grad_(args.bilevel_steps > 0)
        vae.decoder.requires_grad_(True)
        learn, gradient, phi = self.learn(vae, x, self.z_noise[args.inner_steps:])
        set_gradients(self.theta, gradient)
        self.adam.step()
        with torch.no_grad():
            if args.bilevel_steps:
                torch._foreach_copy_(self.phi, phi)
            self.sums += torch.stack([infer, learn, torch.ones_like(learn)])
            bad = torch.where((learn + self.vae.log_gamma).isfinite(), self.diverged_at, self.clock)
            self.diverged_at.copy_(torch.minimum(self.diverged_at, bad))
            self.clock += 1

    def infer(self, vae, x, noise):
        """The loss of phi per member [S], and its gradients."""
        loss = infer_loss(vae, x, self.args.infer, lambda q: noise).mean(-1)
        return loss.detach(), *grad(loss.sum(), list(vae.encoder.parameters()))

    def learn(self, vae, x, noise):
        """The loss of theta per member [S], its gradients, and phi after the J kept steps; noise [J + 1, N, S, B, Dz]."""
        args, phi = self.args, dict(vae.encoder.named_parameters())
        for step_noise in noise[:-1]:
            phi = kept_step(vae, phi, x, args.infer, step_noise, args.inner_lr)
        if args.bilevel_steps:
            loss = bilevel_loss(vae, phi, x, args.learn, noise[-1], args.estimator).mean(-1)
        else:
            loss = learn_loss(vae, x, args.learn, lambda q: noise[-1], args.estimator).mean(-1)
        gradient = grad(loss.sum(), [*vae.decoder.parameters(), vae.log_gamma])
        return loss.detach(), gradient, [p.detach() for p in phi.values()]

    @torch.no_grad()
    def state(self):
        return state_of(self.vae, self.adam) | {"clock": self.clock, "sums": self.sums, "diverged_at": self.diverged_at}

    def save(self):
        return {"step": self.step, "generators": [generator.get_state() for generator in self.generators],
                "tensors": {name: tensor.cpu() for name, tensor in self.state().items()}}

    def load(self, saved):
        restore(self.state(), saved["tensors"])
        self.step = saved["step"]
        for i, (generator, state) in enumerate(zip(self.generators, saved["generators"])):
            restore_generator(generator, state, seed_of(self.args.seed + i, NOISE, self.step))

    def progress(self, rate):
        infer, learn = (self.sums[:2] / self.sums[2]).nanmedian(1).values.tolist()
        return {"infer": f"{infer:.4g}", "learn": f"{learn:.4g}", "diverged": (self.diverged_at < self.clock).sum().item()}

    def averages(self):
        """Means per member since the last call of the two training losses, [S]."""
        infer, learn = (self.sums[:2] / self.sums[2]).cpu()
        self.sums.zero_()
        return {"infer_loss": infer, "learn_loss": learn}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", choices=LAWS, default="mixture", help="2-D distribution")
    flag("--learn", choices=LEARN, default="fd", help="objective of the decoder")
    flag("--infer", choices=INFER, default=None, help="objective of the encoder (default: kld; fae with --learn fae)")
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how swersky and bao estimate squared expectations under q")
    flag("--samples", type=positive, default=1, help="posterior samples per datum, N")
    flag("--seeds", type=positive, default=10, help="members of the ensemble: this many seeds, from --seed on")
    flag("--seed", type=count, default=0, help="the first member's seed: of its weights, data and noise")
    flag = parser.add_argument_group("model").add_argument
    flag("--hidden", type=positive, default=30, help="units of each of the two hidden layers (100 in Figure 6)")
    flag("--init-sd", type=positive_float, default=0.1, help="initial standard deviation of p(x|z)")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--bilevel-steps", type=count, default=0, help="further encoder updates through which the decoder's gradient flows, J. Needed in "
         "principle by swersky and bao, whose q stands for a posterior that depends on the decoder; elbo with kld has nothing to gain, as "
         "both halves descend one loss; with fd it is another algorithm than Alg. 1. All are allowed, to be compared")
    flag("--batch", type=positive, default=1000, help="fresh data per decoder update")
    flag("--lr", type=positive_float, default=1e-4, help="Adam's step size, of the decoder")
    flag("--inner-lr", type=positive_float, default=None, help="SGD's step size, of the encoder (default: 1e-2 for kld, 1e-3 for the others)")
    flag("--steps-per-epoch", type=positive, default=100, help="decoder updates per epoch")
    flag("--epochs", type=positive, default=100, help="epochs (1000 in Figure 6)")
    flag = parser.add_argument_group("output").add_argument
    flag("--test-size", type=positive, default=5000, help="unseen data that the trained models are evaluated on")
    flag("--importance-samples", type=positive, default=100_000, help="samples of the prior per member in the exact evaluation")
    flag("--eval-every", type=positive, default=5, help="epochs between looks at the test data while training")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--no-graph", action="store_true", help="on a GPU, do not capture the updates in CUDA graphs")
    flag("--compile", action="store_true", help="on a CPU, compile the updates with all their derivatives by TorchInductor: needs a C++ compiler "
         "and up to a minute, once per pair, N and J")
    flag("--out", default=None, help="the run's folder (default: runs/synthetic/ and the flags that matter)")
    flag("--overwrite", action="store_true", help="redo a run that is there")
    flag("--dry-run", action="store_true", help="say what would run, train nothing, write nothing")
    args = parser.parse_args(argv)
    resolve_pair(parser, args)
    args.inner_lr = args.inner_lr or default_inner_lr(args.infer)
    args.out = args.out or "runs/synthetic/" + run_name(args, AXES, vars(parser.parse_args([])) | {"inner_lr": default_inner_lr(args.infer)})
    return args


def default_inner_lr(infer):
    return 1e-2 if infer == "kld" else 1e-3


def name_of(args):
    """The pair, and the encoder's step size where it is not the paper's: points of a sweep that are not the same."""
    step = f", step {args.inner_lr:g}" if args.inner_lr != default_inner_lr(args.infer) else ""
    return label(args.learn, args.infer) + step


def main(args):
    device = pick_device(args.device)
    if args.compile:
        refuse_to_compile(device)
    trainer = EnsembleTrainer(args, device)
    if args.dry_run:
        describe(args, trainer)
        return
    with Run(args.out, "train_synthetic", vars(args), device, args.overwrite, label=name_of(args)) as run:
        if not run.status:
            fit(run, args, trainer)
        plots.synthetic_samples([run.path], run.path / "samples.png")


def fit(run, args, trainer):
    test = trainer.law.sample(args.test_size, evaluation_generator(trainer.device))
    status, history = train(run, trainer, args.epochs, args.eval_every, lambda: look(trainer.vae, test))
    result = evaluate(trainer, test, args.importance_samples)
    run.save_metrics(**stack(history), **result, test_data=test.cpu().numpy(), status=status)
    nll = result["nll"][result["diverged_at"] < 0]
    print(f"{run.path}: {status}, {len(nll)} of {args.seeds} members alive, NLL {nll.mean() if len(nll) else math.nan:.4f} nats on average")


def evaluation_generator(device):
    """The same in every run: all members of all runs meet the same test data, posterior samples and prior samples."""
    return torch.Generator(device).manual_seed(seed_of(0, EVALUATION))


def look(vae, test, samples=5):
    """What is cheap to follow while training, means over the test data: [S], and posterior_sd [S, Dz]."""
    x, generator = test.expand(len(vae.log_gamma), -1, -1), evaluation_generator(test.device)
    with evaluating(vae):
        row = {"posterior_sd": vae.encode(x).stddev.mean(1), "log_gamma": vae.log_gamma.detach().clone()}
    row |= {"negative_elbo": negative_elbo(vae, x, samples, generator).mean(1),
            "posterior_fd": posterior_fd(vae, x, samples, generator).mean(1)}
    return {name: value.cpu() for name, value in row.items()}


def evaluate(trainer, test, samples):
    """The exact evaluation of every member: NumPy arrays, [S] where nothing else is said. NaN for a member that diverged.

    nll, sm_loss and fisher_divergence (where the law's score is known) are means over the test data, with _se their standard errors over
    the data; nll_posterior is the cross-check of nll by samples / 100 draws from q(z|x) a datum; ess the quantiles 0, .01, .5 of the
    effective sample size over the data [S, 3]; model_samples [S, 1000, 2].
    """
    vae, law, S = trainer.vae, trainer.law, len(trainer.vae.log_gamma)
    x, generator = test.expand(S, -1, -1), evaluation_generator(test.device)
    prior = importance(vae, x, samples, generator=generator)
    posterior = importance(vae, x, -(-samples // 100), "posterior", generator, chunk=8)
    per_datum = {"nll": -prior.log_likelihood, "nll_posterior": -posterior.log_likelihood, "sm_loss": prior.score_matching_loss}
    if law.log_prob:
        gap = law.score(x.double()) - prior.score
        per_datum["fisher_divergence"] = 1 / 2 * dot(gap, gap)
    result = {name: value.mean(1) for name, value in per_datum.items()}
    result |= {f"{name}_se": value.std(1) / value.shape[1] ** 0.5 for name, value in per_datum.items()}
    result["ess"] = prior.ess.quantile(torch.tensor([0, 0.01, 0.5], dtype=prior.ess.dtype, device=test.device), dim=1).T
    with evaluating(vae):
        z, noise = (torch.randn(1000, 2, generator=generator, device=test.device) for _ in range(2))
        result["model_samples"] = vae.decode(z.expand(S, -1, -1)) + (vae.log_gamma / 2).exp()[:, None, None] * noise
    result["diverged_at"] = torch.where(trainer.diverged_at < trainer.clock, trainer.diverged_at, -1)
    result = {name: value.cpu().numpy() for name, value in result.items()}
    result["member_status"] = np.array(["ok" if step < 0 else f"diverged@{step}" for step in result["diverged_at"]])
    if law.entropy is not None:
        result["data_entropy"] = np.array(law.entropy)
    return result


def describe(args, trainer):
    parameters = [sum(p[0].numel() for p in params) for params in (trainer.phi, trainer.theta)]
    updates = args.epochs * args.steps_per_epoch
    print(f"{name_of(args)} on {args.data}: {args.seeds} members, {parameters[0]:,} encoder and {parameters[1]:,} decoder "
          f"parameters each\n{updates:,} decoder updates on {trainer.device}, after each {args.inner_steps} encoder updates and "
          f"{args.bilevel_steps} kept ones\nwould write {args.out}")


if __name__ == "__main__":
    command_line(parse_args, main)
