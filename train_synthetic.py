"""Train an ensemble of small VAEs on 2-D data with one pair of learning and inference objectives, then evaluate it exactly.

One point of the paper's Figure 3, ten seeds at once (minutes on two cores):
    python train_synthetic.py --data mixture --learn fd --infer kld --inner-steps 5
Seconds:
    python train_synthetic.py --data mixture --seeds 3 --batch 100 --epochs 5 --test-size 500 --importance-samples 2000

The run is a folder under runs/synthetic: config.json, checkpoint.pt, metrics.npz, PNGs. The same command again resumes it.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import argparse
import copy
import math

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call

import plots
from metrics import importance, negative_elbo, posterior_fd
from models import build_ensemble
from objectives import ESTIMATORS, INFER, LEARN, dot, label
from training import (
    EVALUATION,
    INIT,
    NOISE,
    Ledger,
    adam,
    decay,
    infer_loss,
    learn_loss,
    options_of,
    resolve_pair,
    seed_of,
    set_gradients,
    set_rate,
    stack,
    train,
)
from vsm.cli import Formatter, command_line, count, positive, positive_float, seed_number
from vsm.device import evaluating, pick_device
from vsm.laws import LAWS
from vsm.packs import shown_member
from vsm.runs import Run, default_folder
from vsm.speed import compiled, refuse_to_compile

AXES = ("data", "infer", "learn", "inner_steps", "bilevel_steps", "seed")


def kept_step(vae, phi, x, infer, noise, lr):
    """phi after one more SGD step, as a function of theta and of phi before it: {name: tensor} in, {name: tensor} out.

    The step differentiates by `here`, which z of `--infer fd`, and z and the weight of `fd-weighted`, do not see: held in the step, they
    stay functions of phi all the same.
    """
    x, here = x.detach().requires_grad_(), {name: p.view_as(p) for name, p in phi.items()}
    q = vae.posterior(functional_call(vae.encoder, here, x))
    held = q if INFER[infer].reparametrised else vae.posterior(functional_call(vae.encoder, phi, x))
    options = {"weight": held.base_dist.scale} if INFER[infer].has_weight else {}
    loss = INFER[infer](vae, x, q, vae.sample(held, noise), **options).mean(-1).sum()
    gradient = grad(loss, list(here.values()), create_graph=True)
    return {name: p - lr * g for (name, p), g in zip(phi.items(), gradient)}


def bilevel_loss(vae, phi, x, learn, noise, estimator="plugin"):
    """The loss of theta [S, B] where phi is a function of theta: z is reparametrised, so that the gradient is exact."""
    x = x.detach().requires_grad_()  # a leaf of its own: phi depends on x too, but b_n is the derivative at fixed phi
    q = vae.posterior(functional_call(vae.encoder, phi, x))
    return LEARN[learn](vae, x, q, vae.sample(q, noise), **options_of(learn, estimator))


class EnsembleTrainer(Ledger):
    """S VAEs that train at once, each on minibatches and noise from a generator of its own, so that it equals its seed alone.

    One decoder update (B.1 of the paper): K encoder steps by SGD, J more whose dependence on theta is kept, then Adam on theta.
    """

    def __init__(self, args, device):
        seeds = range(args.seed, args.seed + args.seeds)
        self.args, self.law, self.steps_per_epoch = args, LAWS[args.data], args.steps_per_epoch
        vae = build_ensemble(2, 2, args.hidden, [seed_of(seed, INIT) for seed in seeds], init_sd=args.init_sd).to(device)
        self.phi, self.theta = list(vae.encoder.parameters()), [*vae.decoder.parameters(), vae.log_gamma]
        graph = device.type == "cuda" and not args.no_graph
        self.adam = adam(self.theta, args.lr, graph, args.lr_half_life is not None)
        super().__init__(vae, [self.adam], [torch.Generator(device).manual_seed(seed_of(seed, NOISE)) for seed in seeds],
                         torch.zeros(2, 2, len(seeds)), members=(len(seeds),), graph=graph, seeds=seeds)
        self.rate = torch.ones((), device=device)  # the factor of both step sizes under --lr-half-life
        if args.compile:
            self.infer, self.learn = compiled(self.infer), compiled(self.learn)

        # The standard normals of one update, a row per member: what the data are made of, then what each step's z is made of.
        shapes = [(self.law.dim_noise, args.batch), (args.inner_steps + args.bilevel_steps, args.infer_samples, 2, args.batch),
                  (args.samples, 2, args.batch)]
        self.noise = torch.empty(len(seeds), sum(map(math.prod, shapes)), device=device)
        data, infer, learn = (part.unflatten(1, shape) for part, shape in zip(self.noise.split(list(map(math.prod, shapes)), 1), shapes))
        self.data_noise = data.mT  # [S, B, dim_noise]
        self.infer_noise = infer.permute(1, 2, 0, 4, 3)  # [K + J, M, S, B, Dz]
        self.learn_noise = learn.permute(1, 0, 3, 2)  # [N, S, B, Dz]

    def run_step(self):
        """One decoder update, captured where there is a GPU, eager elsewhere."""
        for row, generator in zip(self.noise, self.generators):
            row.normal_(generator=generator)
        if self.args.lr_half_life:
            self.rate.fill_(decay(self.step, self.steps_per_epoch, self.args.lr_half_life))
            set_rate(self.adam, self.args.lr * self.rate)
        self.advance("update", self.update)

    def update(self):
        """A function of `noise` and of the state alone; nothing here waits for the device."""
        args, vae, x = self.args, self.vae, self.law.transform(self.data_noise)
        vae.encoder.requires_grad_(True)
        vae.decoder.requires_grad_(False)
        for noise in self.infer_noise[:args.inner_steps]:
            infer, *gradient = self.infer(vae, x, noise)
            with torch.no_grad():
                if args.lr_half_life:
                    torch._foreach_mul_(gradient, self.rate)
                torch._foreach_add_(self.phi, gradient, alpha=-args.inner_lr)

        vae.encoder.requires_grad_(args.bilevel_steps > 0)
        vae.decoder.requires_grad_(True)
        learn, gradient, phi = self.learn(vae, x, self.infer_noise[args.inner_steps:], self.learn_noise)
        set_gradients(self.theta, gradient)
        self.adam.step()
        with torch.no_grad():
            if args.bilevel_steps:
                torch._foreach_copy_(self.phi, phi)
            one = torch.ones_like(learn)
            self.sums += torch.stack([torch.stack([infer, one]), torch.stack([learn, one])])
            self.note_divergence(learn, vae.log_gamma)
            self.clock += 1

    def infer(self, vae, x, noise):
        """The loss of phi per member [S], and its gradients."""
        loss = infer_loss(vae, x, self.args.infer, lambda q: noise).mean(-1)
        return loss.detach(), *grad(loss.sum(), list(vae.encoder.parameters()))

    def learn(self, vae, x, kept_noise, noise):
        """The loss of theta per member [S], its gradients, and phi after the J kept steps; kept_noise [J, M, S, B, Dz]."""
        args, phi = self.args, dict(vae.encoder.named_parameters())
        for step_noise in kept_noise:
            phi = kept_step(vae, phi, x, args.infer, step_noise, args.inner_lr * self.rate if args.lr_half_life else args.inner_lr)
        if args.bilevel_steps:
            loss = bilevel_loss(vae, phi, x, args.learn, noise, args.estimator).mean(-1)
        else:
            loss = learn_loss(vae, x, args.learn, lambda q: noise, args.estimator).mean(-1)
        gradient = grad(loss.sum(), [*vae.decoder.parameters(), vae.log_gamma])
        return loss.detach(), gradient, [p.detach() for p in phi.values()]

    def progress(self, rate):
        """What the bar shows: medians over the members."""
        infer, learn = (self.sums[:, 0] / self.sums[:, 1]).nanmedian(1).values.tolist()
        return {"infer": f"{infer:.4g}", "learn": f"{learn:.4g}", "diverged": (self.diverged_at < self.clock).sum().item()}

    def averages(self, reset=True):
        """Means per member since the last reset of the two training losses, [S]."""
        return dict(zip(("infer_loss", "learn_loss"), self.means(reset)[:, 0]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", choices=LAWS, default="mixture", help="2-D distribution")
    flag("--learn", choices=LEARN, default="fd", help="objective of the decoder")
    flag("--infer", choices=INFER, default=None, help="objective of the encoder (default: kld; fae with --learn fae)")
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how swersky and bao estimate squared expectations under q")
    flag("--samples", type=positive, default=1, help="posterior samples per datum, N")
    flag("--infer-samples", type=positive, default=None, metavar="M", help="posterior samples per datum of the encoder's loss (default: N)")
    flag("--seeds", type=positive, default=10, help="members of the ensemble: this many seeds, from --seed on")
    flag("--seed", type=seed_number, default=0, help="the first member's seed: of its weights, data and noise")
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
    flag("--lr-half-life", type=positive_float, default=None, metavar="EPOCHS", help="both step sizes halve every so many epochs "
         "(default: they stay)")
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
    flag("--tensorboard", action="store_true", help="write scalars for TensorBoard too, into the run's folder")
    flag("--dry-run", action="store_true", help="say what would run, train nothing, write nothing")
    args = parser.parse_args(argv)
    resolve_pair(parser, args)
    if args.estimator == "released" and args.samples > 1:
        parser.error("--estimator released is of the code released for 2-D data, which has one sample; leave out --samples")
    if args.compile and args.bilevel_steps and args.lr_half_life:
        parser.error("--compile would freeze the step size of the kept steps; with --bilevel-steps it goes without --lr-half-life")
    args.inner_lr = args.inner_lr or default_inner_lr(args.infer)
    args.out = args.out or default_folder("synthetic", args, AXES,
                                                   vars(parser.parse_args([])) | {"inner_lr": default_inner_lr(args.infer), "infer_samples": args.samples})
    return args


def default_inner_lr(infer):
    return 1e-2 if infer == "kld" else 1e-3


def name_of(args):
    """The pair, and the encoder's step size where it is not the paper's: points of a sweep that are not the same."""
    step = f", step {args.inner_lr:g}" if args.inner_lr != default_inner_lr(args.infer) else ""
    return label(args.learn, args.infer, args.samples, args.estimator) + step


def main(args):
    device = pick_device(args.device)
    if args.compile:
        refuse_to_compile(device)
    trainer = EnsembleTrainer(args, device)
    describe(args, trainer)
    if args.dry_run:
        return
    with Run(args.out, "train_synthetic", vars(args), device, args.overwrite, args.tensorboard, label=name_of(args)) as run:
        if not run.status:
            fit(run, args, trainer)
        if not (run.path / "samples.png").exists():
            plots.synthetic_samples([run.path], run.path / "samples.png")


def fit(run, args, trainer):
    test = trainer.law.sample(args.test_size, evaluation_generator("cpu")).to(trainer.device)  # the same points on every device
    status, history = train(run, trainer, args.epochs, args.eval_every, lambda: look(trainer, test, args.importance_samples // 4))
    result = evaluate(trainer, test, args.importance_samples)
    run.save_metrics(**stack(history), **result, test_data=test.cpu().numpy(), status=status)
    nll = result["nll"][result["diverged_at"] < 0]
    print(f"{run.path}: {status}, {len(nll)} of {args.seeds} members alive, NLL {nll.mean() if len(nll) else math.nan:.4f} nats on average")


def evaluation_generator(device):
    """The same in every run: all members of all runs meet the same test data, posterior samples and prior samples."""
    return torch.Generator(device).manual_seed(seed_of(0, EVALUATION))


def look(trainer, test, importance_samples, samples=5):
    """What one follows while training, means over the test data, of each member [S]; posterior_sd [S, Dz].

    nll_curve and excess_curve are the negative log-likelihood, and that less the true law's, of the first 500 test points by a quarter of
    the final evaluation's importance samples: they show whether training has converged.
    """
    vae, law, x = trainer.vae, trainer.law, test.expand(len(trainer.vae.log_gamma), -1, -1)
    generator = evaluation_generator(test.device)
    with evaluating(vae):
        row = {"posterior_sd": vae.encode(x).stddev.mean(1), "log_gamma": vae.log_gamma.detach().clone()}
    row |= {"negative_elbo": negative_elbo(vae, x, samples, generator).mean(1),
            "posterior_fd": posterior_fd(vae, x, samples, generator).mean(1)}
    some = x[:, :500]
    row["nll_curve"] = -importance(vae, some, max(importance_samples, 1), generator=generator).log_likelihood.mean(1)
    if law.log_prob:
        row["excess_curve"] = row["nll_curve"] + law.log_prob(some[0].double()).mean()
    return {name: value.cpu() for name, value in row.items()}


def evaluate(trainer, test, samples):
    """The exact evaluation of every member: NumPy arrays, [S] where nothing else is said. NaN for a member that diverged.

    nll and sm_loss are means over the test data, with _se their standard errors over the data; so are, where the law's density is known,
    fisher_divergence, and nll_excess and sm_excess: nll and sm_loss less the true law's at the same points (the error is the paired one).
    nll_posterior is the cross-check of nll by samples / 100 draws from q(z|x) a datum; ess the quantiles 0, .01, .5 of the effective sample
    size over the data [S, 3]; model_samples [S, 1000, 2]. Theory predicts variance_ratio and second_moment (`moments`).
    """
    vae, law, S = trainer.vae, trainer.law, len(trainer.vae.log_gamma)
    x, generator = test.expand(S, -1, -1), evaluation_generator(test.device)
    prior = importance(vae, x, samples, generator=generator)
    posterior = importance(vae, x, -(-samples // 100), "posterior", generator, chunk=8)
    per_datum = {"nll": -prior.log_likelihood, "nll_posterior": -posterior.log_likelihood, "sm_loss": prior.score_matching_loss}
    if law.log_prob:
        points = test.double()
        gap = law.score(points) - prior.score
        per_datum |= {"fisher_divergence": 1 / 2 * dot(gap, gap), "nll_excess": per_datum["nll"] + law.log_prob(points),
                      "sm_excess": per_datum["sm_loss"] - law.score_matching_loss(points)}
    diverged_at = torch.where(trainer.diverged_at < trainer.clock, trainer.diverged_at, -1)
    result = {name: value.mean(1) for name, value in per_datum.items()}
    result |= {f"{name}_se": value.std(1) / value.shape[1] ** 0.5 for name, value in per_datum.items()}
    result["ess"] = prior.ess.quantile(torch.tensor([0, 0.01, 0.5], dtype=prior.ess.dtype, device=test.device), dim=1).T
    with evaluating(vae):
        z, noise = (torch.randn(1000, 2, generator=generator, device=test.device) for _ in range(2))
        result["model_samples"] = vae.decode(z.expand(S, -1, -1)) + (vae.log_gamma / 2).exp()[:, None, None] * noise
    result |= moments(vae, law, x)
    for value in result.values():  # how a diverged member looks depends on when the loop last looked at it
        value[diverged_at >= 0] = torch.nan
    result = {name: value.cpu().numpy() for name, value in result.items()} | {"diverged_at": diverged_at.cpu().numpy()}
    result["member_status"] = np.array(["ok" if step < 0 else f"diverged@{step}" for step in result["diverged_at"]])
    if law.entropy is not None:
        result["data_entropy"] = np.array(law.entropy)
    return result | density_of_members(vae, test, result["nll"], min(samples, 10_000))


def moments(vae, law, x, samples=20_000):
    """variance_ratio [S], the total variance of the model over the data's; second_moment [S, Dz], E z^2 of the aggregate posterior.

    The data x [S, B, 2] give the latter. On linear VAEs theory has 1 / kappa and, for active latents, kappa.
    """
    generator = evaluation_generator("cpu")  # the same draws on every device
    data_variance = law.sample(100_000, generator).var(0).sum()
    with evaluating(vae):
        g = vae.decode(torch.randn(samples, vae.dim_z, generator=generator).to(x.device).expand(len(x), -1, -1))
        q = vae.encode(x)
        model_variance = g.var(1).sum(-1) + x.shape[-1] * vae.log_gamma.exp()
        return {"variance_ratio": model_variance / data_variance.to(x.device), "second_moment": (q.mean**2 + q.variance).mean(1)}


def density_of_members(vae, test, nll, samples, side=81):
    """For the figure `density`: the log densities (nats) of the members with the median and the least NLL on a grid about the test data.

    density_grid [M, side, side] float16, first axis x1; density_grid_of [M] the members; density_extent [4] the grid's least and largest
    x1 and x2. M is 2, less where one member is both or all diverged.
    """
    low, high = np.quantile(test.cpu().numpy(), [0.002, 0.998], axis=0)
    margin = 0.3 * (high - low).max()
    extent = np.stack((low - margin, high + margin)).T  # [2, 2]
    members = list(dict.fromkeys((shown_member(nll), int(np.nanargmin(nll))))) if np.isfinite(nll).any() else []
    axes = [torch.linspace(*limits, side, device=test.device) for limits in extent.tolist()]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 2)
    grids = np.full((len(members), side, side), np.nan, np.float16)
    for grid, member in zip(grids, members):
        one = copy.deepcopy(vae)
        for p in one.parameters():
            p.data = p.data[member:member + 1]
        log_density = importance(one, points, samples, generator=evaluation_generator(test.device)).log_likelihood
        grid[:] = log_density.clamp(min=-6e4).reshape(side, side).cpu().numpy()
    return {"density_grid": grids, "density_grid_of": np.array(members, int), "density_extent": extent.ravel()}


def describe(args, trainer):
    """Three lines: data, model and updates, folder."""
    encoder, decoder = (sum(p[0].numel() for p in params) for params in (trainer.phi, trainer.theta))
    updates = args.epochs * args.steps_per_epoch
    print(f"{name_of(args)} on {args.data}: minibatches of {args.batch} fresh points, {args.test_size} test points\n"
          f"{args.seeds} members, {encoder:,} encoder and {decoder:,} decoder parameters each; {updates:,} decoder updates on "
          f"{trainer.device}, after each {args.inner_steps} encoder updates and {args.bilevel_steps} kept ones\n"
          f"{'would write' if args.dry_run else 'writes'} {args.out}", flush=True)
    if alias := LEARN[args.learn].alias(args.samples, args.estimator):
        print(f"{LEARN[args.learn].letter} with N = {args.samples} equals {alias}", flush=True)


if __name__ == "__main__":
    command_line(parse_args, main)
