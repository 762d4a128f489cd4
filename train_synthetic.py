"""Train an ensemble of small VAEs on 2-D data with one pair of learning and inference objectives, then evaluate it.

One point of the paper's Figure 3, ten seeds at once (minutes on two cores):
    python train_synthetic.py --data mixture --learn fd --infer kld --inner-steps 5
A small run (seconds):
    python train_synthetic.py --data mixture --seeds 3 --batch 100 --epochs 5 --test-size 500 --importance-samples 2000

A run writes config.json, checkpoint.pt, metrics.npz and PNGs into a folder under runs/synthetic. The same command resumes it.
"""

import math

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call

from metrics import importance, negative_elbo, posterior_fd
from models import build_ensemble
from objectives import INFER, LEARN, dot, label
from training import EVALUATION, INIT, NOISE, TrainingState, adam, decay, phi_loss, seed_of, set_gradients, set_rate, theta_loss
from vsm.cli import command_line
from vsm.cuda_graphs import compiled, refuse_to_compile
from vsm.device import evaluating, pick_device
from vsm.distributions_2d import distribution
from vsm.figures.synthetic import synthetic_samples
from vsm.flags import announce, default_inner_lr, synthetic_args
from vsm.gamma import StationaryGamma
from vsm.loop import stack, train
from vsm.runs import Run


class EnsembleTrainer(TrainingState):
    """S VAEs that train at once. Each draws data and noise from its own generator and so equals a run of its seed alone.

    One decoder update (Section B.1 of the paper) is K encoder steps by SGD, J more whose dependence on theta is kept, and one
    step of Adam on theta.
    """

    def __init__(self, args, device):
        seeds = range(args.seed, args.seed + args.seeds)
        self.args, self.law, self.steps_per_epoch = args, distribution(args.data, args.noise), args.steps_per_epoch
        vae = build_ensemble(2, 2, args.hidden, [seed_of(seed, INIT) for seed in seeds], init_sd=args.init_sd).to(device)
        self.phi, self.theta = list(vae.encoder.parameters()), [*vae.decoder.parameters(), vae.log_gamma]
        graph = device.type == "cuda" and not args.no_graph
        stepped = self.theta if args.gamma == "learned" else self.theta[:-1]  # by Adam
        self.adam = adam(stepped, args.lr, graph, args.lr_half_life is not None)
        super().__init__(vae, [self.adam], [torch.Generator(device).manual_seed(seed_of(seed, NOISE)) for seed in seeds],
                         torch.zeros(2, 2, len(seeds)), members=(len(seeds),), graph=graph, seeds=seeds)
        self.stationary = StationaryGamma(args.learn, vae.log_gamma, 2) if args.gamma == "stationary" else None
        self.tensors = self.stationary.tensors if self.stationary else {}
        self.rate = torch.ones((), device=device)  # the factor of both step sizes under --lr-half-life
        if args.compile:
            self.infer, self.learn = compiled(self.infer), compiled(self.learn)

        # The standard normals of one update, a row per member: first those of the data, then those of z in each step.
        shapes = [(self.law.dim_noise, args.batch), (args.inner_steps + args.bilevel_steps, args.infer_samples, 2, args.batch),
                  (args.samples, 2, args.batch)]
        sizes = [math.prod(shape) for shape in shapes]
        self.noise = torch.empty(len(seeds), sum(sizes), device=device)
        data, infer, learn = (part.unflatten(1, shape) for part, shape in zip(self.noise.split(sizes, 1), shapes))
        self.data_noise = data.mT  # [S, B, dim_noise]
        self.infer_noise = infer.permute(1, 2, 0, 4, 3)  # [K + J, M, S, B, Dz]
        self.learn_noise = learn.permute(1, 0, 3, 2)  # [N, S, B, Dz]

    def run_step(self):
        """One decoder update, from new noise."""
        for row, generator in zip(self.noise, self.generators):
            row.normal_(generator=generator)
        if self.args.lr_half_life:
            self.rate.fill_(decay(self.step, self.steps_per_epoch, self.args.lr_half_life))
            set_rate(self.adam, self.args.lr * self.rate)
        self.advance("update", self.update)

    def update(self):
        """One decoder update. It depends on `noise` and the state alone and never waits for the device."""
        args, vae, x = self.args, self.vae, self.law.transform(self.data_noise)
        vae.encoder.requires_grad_(True)
        vae.decoder.requires_grad_(False)
        score = [-self.data_noise[..., -2:] / args.noise] if LEARN[args.learn].takes("t") else []  # that of the data's noise
        for noise in self.infer_noise[:args.inner_steps]:
            infer, *gradient = self.infer(vae, x, noise, *score)
            with torch.no_grad():
                if args.lr_half_life:
                    torch._foreach_mul_(gradient, self.rate)
                torch._foreach_add_(self.phi, gradient, alpha=-args.inner_lr)

        vae.encoder.requires_grad_(args.bilevel_steps > 0)
        vae.decoder.requires_grad_(True)
        learn, gradient, phi = self.learn(vae, x, self.infer_noise[args.inner_steps:], self.learn_noise, *score)
        set_gradients(self.theta, gradient)
        self.adam.step()
        if self.stationary:
            self.stationary.update(learn, vae.log_gamma.grad)
        with torch.no_grad():
            if args.bilevel_steps:
                torch._foreach_copy_(self.phi, phi)
            one = torch.ones_like(learn)
            self.sums += torch.stack([torch.stack([infer, one]), torch.stack([learn, one])])
            self.note_divergence(learn, vae.log_gamma)
            self.clock += 1

    def infer(self, vae, x, noise, t=None):
        """The loss of phi per member [S], followed by its gradients."""
        loss = phi_loss(vae, x, self.args.infer, noise, estimator=self.args.estimator, t=t).mean(-1)
        return loss.detach(), *grad(loss.sum(), list(vae.encoder.parameters()))

    def learn(self, vae, x, kept_noise, noise, t=None):
        """The loss of theta per member [S], its gradients, and phi after the J kept steps; kept_noise [J, M, S, B, Dz]."""
        args, phi, options = self.args, dict(vae.encoder.named_parameters()), {"estimator": self.args.estimator, "t": t}
        for step_noise in kept_noise:
            lr = args.inner_lr * self.rate if args.lr_half_life else args.inner_lr
            phi = kept_step(vae, phi, x, args.infer, step_noise, lr, **options)
        if args.bilevel_steps:
            loss = bilevel_loss(vae, phi, x, args.learn, noise, **options).mean(-1)
        else:
            loss = theta_loss(vae, x, args.learn, noise, **options).mean(-1)
        gradient = grad(loss.sum(), [*vae.decoder.parameters(), vae.log_gamma])
        return loss.detach(), gradient, [p.detach() for p in phi.values()]

    def progress(self, rate):
        """The numbers beside the progress bar: medians of the losses over the members, and the number that has diverged."""
        infer, learn = (self.sums[:, 0] / self.sums[:, 1]).nanmedian(1).values.tolist()
        return {"infer": f"{infer:.4g}", "learn": f"{learn:.4g}", "diverged": (self.diverged_at < self.clock).sum().item()}

    def averages(self, reset=True):
        """Means since the last reset of the two training losses, per member [S]."""
        return dict(zip(("infer_loss", "learn_loss"), self.means(reset)[:, 0]))


def kept_step(vae, phi, x, infer, noise, lr, **options):
    """phi after an SGD step whose graph is kept: a function of theta and of phi before the step, as dicts of tensors by name.

    The step takes its gradient with respect to `here`, a view of phi. An objective that takes z (`--infer fd`) or z and its
    weight (`fd-weighted`) as constants gets them from phi itself, so the outer gradient still flows through them.
    """
    x, here = x.detach().requires_grad_(), {name: p.view_as(p) for name, p in phi.items()}
    q = vae.posterior(functional_call(vae.encoder, here, x))
    held = q if INFER[infer].reparametrised else vae.posterior(functional_call(vae.encoder, phi, x))
    loss = INFER[infer](vae, x, q, vae.sample(held, noise), weight=held.base_dist.scale, **options).mean(-1).sum()
    gradient = grad(loss, list(here.values()), create_graph=True)
    return {name: p - lr * g for (name, p), g in zip(phi.items(), gradient)}


def bilevel_loss(vae, phi, x, learn, noise, **options):
    """theta_loss [S, B] where phi is a function of theta; z is reparametrised, so that the gradient is exact."""
    x = x.detach().requires_grad_()  # a new leaf, because phi depends on x too, but b_n is the derivative at fixed phi
    q = vae.posterior(functional_call(vae.encoder, phi, x))
    return LEARN[learn](vae, x, q, vae.sample(q, noise), **options)


def evaluation_generator(device):
    """A generator with the same seed in every run, so that all runs and members share test data, posterior and prior samples."""
    return torch.Generator(device).manual_seed(seed_of(0, EVALUATION))


def measure(trainer, test, importance_samples, log_density=None, samples=5):
    """The test metrics of one evaluation during training: means over the test data per member [S], and posterior_sd [S, Dz].

    nll_curve is the negative log likelihood of the first 500 test points, by `importance_samples` draws from the prior.
    excess_curve, where the law's log density [B] at the test points is given, is nll_curve less the law's own. They show whether
    training has converged.
    """
    vae, x = trainer.vae, test.expand(len(trainer.vae.log_gamma), -1, -1)
    generator = evaluation_generator(test.device)
    with evaluating(vae):
        row = {"posterior_sd": vae.encode(x).stddev.mean(1), "log_gamma": vae.log_gamma.detach().clone()}
    row |= {"negative_elbo": negative_elbo(vae, x, samples, generator).mean(1),
            "posterior_fd": posterior_fd(vae, x, samples, generator).mean(1)}
    row["nll_curve"] = -importance(vae, x[:, :500], max(importance_samples, 1), generator=generator).log_likelihood.mean(1)
    if log_density is not None:
        row["excess_curve"] = row["nll_curve"] + log_density[:500].mean()
    return {name: value.cpu() for name, value in row.items()}


def evaluate(trainer, test, samples):
    """The final evaluation of every member, by importance sampling: NumPy arrays, [S] unless stated, nan if a member diverged.

    Means over the test data, each with its standard error over the data in <name>_se:
    nll                   negative log likelihood by `samples` draws from the prior, nats
    nll_posterior         the same by samples / 100 draws from q(z|x) per datum, as a check
    sm_loss               score matching loss, the Fisher divergence less a constant
    fisher_divergence     only where the law's density is known, as the next two
    nll_excess, sm_excess nll and sm_loss less the law's own at the same points; their standard errors are of paired differences
    Others: ess [S, 3], the quantiles 0, 0.01 and 0.5 of the effective sample size over the data; model_samples [S, 1000, 2];
    variance_ratio and second_moment [S, Dz] of `moments`; diverged_at, the step or -1; member_status.
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
    for value in result.values():  # the values of a diverged member depend on when the loop noticed the divergence
        value[diverged_at >= 0] = torch.nan
    result = {name: value.cpu().numpy() for name, value in result.items()} | {"diverged_at": diverged_at.cpu().numpy()}
    result["member_status"] = np.array(["ok" if step < 0 else f"diverged@{step}" for step in result["diverged_at"]])
    return result


def moments(vae, law, x, samples=20_000):
    """What the theory of linear VAEs predicts: 1 / kappa and, for active latents, kappa.

    variance_ratio [S] is the total variance of the model over that of the data; second_moment [S, Dz] is E z^2 of the aggregate
    posterior over the data x [S, B, 2].
    """
    generator = evaluation_generator("cpu")  # the same draws on every device
    data_variance = law.sample(100_000, generator).var(0).sum()
    with evaluating(vae):
        g = vae.decode(torch.randn(samples, vae.dim_z, generator=generator).to(x.device).expand(len(x), -1, -1))
        q = vae.encode(x)
        model_variance = g.var(1).sum(-1) + x.shape[-1] * vae.log_gamma.exp()
        return {"variance_ratio": model_variance / data_variance.to(x.device), "second_moment": (q.mean**2 + q.variance).mean(1)}


def parse_args(argv=None):
    return synthetic_args(argv, __doc__)


def name_of(args):
    """The label of the pair, with the encoder's step size where it is not the default, which makes another point of a sweep."""
    step = f", step {args.inner_lr:g}" if args.inner_lr != default_inner_lr(args.infer) else ""
    return label(args.learn, args.infer, args.samples, args.estimator) + step


def main(args):
    device = pick_device(args.device)
    if args.compile:
        refuse_to_compile(device)
    trainer = EnsembleTrainer(args, device)
    announce(args, name_of(args), *describe(args, trainer))
    with Run(args.out, "train_synthetic", vars(args), device, args.overwrite, label=name_of(args)) as run:
        if not run.status:
            fit(run, args, trainer)
        if not (run.path / "samples.png").exists():
            synthetic_samples([run.path], run.path / "samples.png")


def fit(run, args, trainer):
    test = trainer.law.sample(args.test_size, evaluation_generator("cpu")).to(trainer.device)  # the same points on every device
    log_density = trainer.law.log_prob(test.double()) if trainer.law.log_prob else None
    status, history = train(run, trainer, args.epochs, args.eval_every,
                            lambda: measure(trainer, test, args.importance_samples // 4, log_density))
    result = evaluate(trainer, test, args.importance_samples)
    run.save_metrics(**stack(history), **result, test_data=test.cpu().numpy(), status=status)
    nll = result["nll"][result["diverged_at"] < 0]
    print(f"{run.path}: {status}, {len(nll)} of {args.seeds} members have not diverged, "
          f"their mean NLL is {nll.mean() if len(nll) else math.nan:.4f} nats")


def describe(args, trainer):
    """Data, model and updates in words, for `announce`."""
    encoder, decoder = (sum(p[0].numel() for p in params) for params in (trainer.phi, trainer.theta))
    updates = args.epochs * args.steps_per_epoch
    return (f"{args.data}: minibatches of {args.batch} fresh points, {args.test_size} test points",
            f"{args.seeds} members, {encoder:,} encoder and {decoder:,} decoder parameters each; {updates:,} decoder updates on "
            f"{trainer.device}, each after {args.inner_steps} encoder updates and {args.bilevel_steps} bi-level ones")


if __name__ == "__main__":
    command_line(parse_args, main)
