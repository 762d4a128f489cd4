"""Training: the alternating update of Algorithm 1 on images, and the state that every trainer keeps.

Read `ImageTrainer.update` first: it is one whole step. `train_synthetic.py` has the other trainer, for ensembles on 2-D data.
As in objectives.py, phi are the encoder's parameters and theta the decoder's and log_gamma.
"""

import numpy as np
import torch

from data import noisy
from objectives import INFER, LEARN
from vsm.cli import UserError
from vsm.cuda_graphs import Graphs
from vsm.device import to_channels_last
from vsm.gamma import StationaryGamma

NEVER = torch.iinfo(torch.int64).max


def seed_of(*key):
    """The seed of the stream of random numbers that these integers name, as in seed_of(seed, ORDER, epoch)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


INIT, ORDER, NOISE, EVALUATION = range(4)  # separate streams, so that evaluating more often changes no weight


def phi_loss(vae, x, infer, noise, **options):
    """The loss of phi per datum [B], from standard `noise` [N, B, Dz] of z. FD takes z as a constant (Section 3.3.2).

    An objective gets those of the `options` that it declares, such as its estimator.
    """
    x.requires_grad_(INFER[infer].needs_b)
    q = vae.encode(x)
    z = vae.sample(q, noise)
    return INFER[infer](vae, x, q, z if INFER[infer].reparametrised else z.detach(), **options)


def theta_loss(vae, x, learn, noise, **options):
    """The loss of theta per datum [B], from standard `noise` [N, B, Dz] of z. phi gets no gradient and z is a constant (Alg. 1).
    """
    x.requires_grad_(LEARN[learn].needs_b)  # b_n is the encoder's input gradient, a constant for theta
    with torch.set_grad_enabled(x.requires_grad):
        q = vae.encode(x)
    z = vae.sample(q, noise, relaxed=False).detach()
    return LEARN[learn](vae, x, q, z, **options)


def shared_losses(vae, x, infer, learn, noise, **options):
    """The losses of phi and of theta, each [B], from one forward pass and the same samples z.

    Where both are the same objective, such as that of the Fisher autoencoder, they are one tensor, whose gradient serves both.
    Neither q nor z is a constant here: the caller differentiates the first loss by phi alone and the second by theta alone.
    """
    x.requires_grad_(LEARN[learn].needs_b or INFER[infer].needs_b)
    q = vae.encode(x)
    z = vae.sample(q, noise)
    decoded = Decoded(vae, z)
    loss = INFER[infer](decoded, x, q, z, **options)
    if LEARN[learn].function is INFER[infer].function:
        return loss, loss
    return loss, LEARN[learn](decoded, x, q, z, **options)


class Decoded:
    """A model at samples z whose images it decodes once, for several objectives."""

    def __init__(self, vae, z):
        self.vae, self.z, self.g = vae, z, vae.decode(z)

    def decode(self, z):
        return self.g if z is self.z else self.vae.decode(z)

    def __getattr__(self, name):
        return getattr(self.vae, name)


def latent_noise(vae, x, samples, generator):
    """Standard noise [samples, B, Dz] for the z of a minibatch x [B, ...]: normal, or logistic for Bernoulli latents."""
    return vae.noise(vae.prior.expand(x.shape[:1]), samples, generator)


class Resumable:
    """What the loop `vsm.loop.updates` trains and checkpoints: a step counter, tensors and generators.

    A subclass defines `state`, {name: tensor} of all that a step changes, and `run_step`, which advances `step` by one or more,
    and sets `generators` and the `seeds` that restart them on another kind of device.
    """
    step, steps_per_epoch, unit, diverged = 0, 1, "iteration", None

    def progress(self, rate):
        """The numbers beside the progress bar; `rate` is in updates a second."""
        return {}

    def save(self):
        return {"step": self.step, "generators": [generator.get_state() for generator in self.generators],
                "tensors": {name: tensor.cpu() for name, tensor in self.state().items()}}

    @torch.no_grad()
    def load(self, saved):
        """Restore what save() returned. Raises UserError and changes nothing where `saved` does not fit."""
        state, tensors = self.state(), saved["tensors"]
        if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
            raise UserError("the checkpoint is not of what these flags train (its tensors have other names or shapes) and is "
                            "kept as it is; move it away or use --overwrite to start the run again")
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
        self.step = saved["step"]
        for generator, state, seed in zip(self.generators, saved["generators"], self.seeds):
            if len(state) == len(generator.get_state()):
                generator.set_state(state.cpu())
            else:  # saved on another kind of device
                generator.manual_seed(seed_of(seed, NOISE, self.step))


class TrainingState(Resumable):
    """The state of a trainer: model, clock, sums of losses, divergence, generators, checkpoints, and the switch to CUDA graphs.

    A subclass sets `steps_per_epoch`, puts the further tensors that its update changes into `tensors`, and defines `run_step`
    (which calls `advance`), `progress` and `averages`.

    clock counts updates on the device. diverged_at, of shape `members` (() or, for an ensemble, (S,)), is the clock's value at a
    member's first non-finite loss. sums: [2 groups (phi, theta), quantities, *members]; the last quantity counts the terms.
    """

    def __init__(self, vae, optimisers, generators, sums, members=(), graph=False, seeds=()):
        self.vae, self.optimisers, self.generators, self.seeds = vae, optimisers, generators, seeds
        self.device = device = vae.log_gamma.device
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.diverged_at = torch.full(members, NEVER, device=device)
        self.sums = sums.to(device)
        self.graphs = Graphs(device) if graph else None
        self.tensors = {}

    def advance(self, kind, update):
        """Call update(), or replay it from the CUDA graph of its `kind` where the trainer uses graphs."""
        self.step += 1
        if self.graphs is None:
            update()
        else:
            self.graphs.run(kind, update, self.state, self.captured_generators)

    captured_generators = ()  # the generators that draw inside an update
    unit = "epoch"

    def note_divergence(self, *values):
        """Set diverged_at to the clock for each member of which a value is not finite, if it has not diverged before."""
        finite = torch.stack([value.isfinite() for value in values]).all(0)
        self.diverged_at.copy_(torch.minimum(self.diverged_at, torch.where(finite, NEVER, self.clock)))

    @property
    def diverged(self):
        """The step at which the last member diverged, or None while one has not. Waits for the device."""
        return self.diverged_at.max().item() if (self.diverged_at < self.clock).all() else None

    def means(self, reset):
        """The means since the last reset, sums over counts: [2 groups, quantities - 1, *members]."""
        values = (self.sums[:, :-1] / self.sums[:, -1:]).cpu()
        if reset:
            self.sums.zero_()
        return values

    @torch.no_grad()
    def state(self):
        """Every tensor that a step changes, by name. Loading copies into them, so that captured graphs stay valid."""
        state = {f"vae.{name}": tensor.detach() for name, tensor in self.vae.state_dict(keep_vars=True).items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, moments in enumerate(optimiser.state.values()):
                state |= {f"adam.{i}.{j}.{name}": tensor for name, tensor in moments.items()}
        return state | {"clock": self.clock, "sums": self.sums, "diverged_at": self.diverged_at} | self.tensors


class ParameterGroup:
    """The parameters that one loss trains, phi or theta, and their optimiser, which leaves out those in `closed_form`."""

    def __init__(self, params, lr, capturable, scheduled, closed_form=()):
        stepped = list(params)
        self.params, self.optimiser = [*stepped, *closed_form], adam(stepped, lr, capturable, scheduled)


class ImageTrainer(TrainingState):
    """Trains a VAE on images, uint8 [n, C, H, W] on the device, by Adam on each group.

    The keywords are the flags of train_images.py. On a GPU each kind of update is captured in a CUDA graph at its first call and
    replayed afterwards, unless graph=False.
    """

    def __init__(self, vae, images, *, learn, infer, estimator, samples, inner_steps, noise, batch, lr, seed, graph=True,
                 infer_samples=None, lr_half_life=None, one_pass=False, gamma="learned"):
        to_channels_last(vae, learn, infer)
        self.images, self.learn, self.infer, self.estimator = images, learn, infer, estimator
        self.samples, self.infer_samples, self.inner_steps = samples, infer_samples or samples, inner_steps
        self.one_pass = one_pass
        self.noise, self.batch, self.seed, self.lr, self.lr_half_life = noise, batch, seed, lr, lr_half_life
        graph = graph and images.device.type == "cuda"
        self.generator = torch.Generator(images.device).manual_seed(seed_of(seed, NOISE))
        vae.log_gamma.requires_grad_(gamma != "fixed")
        self.stationary = StationaryGamma(learn, vae.log_gamma, images[0].numel()) if gamma == "stationary" else None
        learned, closed_form = ([vae.log_gamma] if gamma == mode else [] for mode in ("learned", "stationary"))
        self.phi = ParameterGroup(vae.encoder.parameters(), lr, graph, lr_half_life is not None)
        self.theta = ParameterGroup([*vae.decoder.parameters(), *learned], lr, graph, lr_half_life is not None, closed_form)
        super().__init__(vae, [self.phi.optimiser, self.theta.optimiser], [self.generator], graph=graph, seeds=[seed],
                         sums=torch.zeros(2, 3, dtype=torch.float64))  # loss, gradient norm, count
        self.captured_generators = self.generators
        self.steps_per_epoch = len(images) // batch
        self.order = torch.arange(len(images), device=self.device)
        self.cursor = torch.arange(batch, device=self.device)  # the positions in `order` of the next minibatch
        self.tensors = {"order": self.order, "cursor": self.cursor} | (self.stationary.tensors if self.stationary else {})

    def run_step(self):
        """Update number `step`, counted from 0: one minibatch, in which theta moves too if it is a K-th update."""
        if self.step % self.steps_per_epoch == 0:
            self.begin_epoch(self.step // self.steps_per_epoch)
        if self.lr_half_life:
            for optimiser in self.optimisers:
                set_rate(optimiser, self.lr * decay(self.step, self.steps_per_epoch, self.lr_half_life))
        with_decoder = LEARN[self.learn].joint or (self.step + 1) % self.inner_steps == 0
        self.advance(with_decoder, lambda: self.update(with_decoder))

    def update(self, with_decoder):
        """One minibatch: phi moves and, if `with_decoder`, then theta. A joint objective moves both by one loss.

        With `one_pass`, theta moves by the samples of the q from before phi's step, where Algorithm 1 draws new ones from after.
        """
        x, noise = self.minibatch()
        t = -noise.flatten(1) / self.noise if LEARN[self.learn].takes("t") else None  # the score of the data's noise
        options = {"estimator": self.estimator, "t": t}
        if LEARN[self.learn].joint or self.one_pass:
            self.train_only(self.phi, self.theta)
            z_noise = latent_noise(self.vae, x, self.samples, self.generator)
            loss, other = shared_losses(self.vae, x, self.infer, self.learn, z_noise, **options)
            if other is loss:
                self.step_by(loss, self.phi, self.theta)
            else:
                self.step_by(loss, self.phi, keep_graph=True)
                self.step_by(other, self.theta)
        else:
            self.train_only(self.phi)
            z_noise = latent_noise(self.vae, x, self.infer_samples, self.generator)
            loss = phi_loss(self.vae, x, self.infer, z_noise, **options)
            self.step_by(loss, self.phi)
            if with_decoder:
                self.train_only(self.theta)
                z_noise = latent_noise(self.vae, x, self.samples, self.generator)
                loss = theta_loss(self.vae, x, self.learn, z_noise, **options)
                self.step_by(loss, self.theta)
        self.clock += 1

    def minibatch(self):
        """The next images of this epoch's permutation in [0, 1], with noise, and that noise before scaling, each [B, C, H, W]."""
        x, _, standard = noisy(self.images[self.order[self.cursor]], self.noise, self.generator)
        self.cursor += self.batch
        return x, standard

    def train_only(self, *groups):
        """Freeze the other groups, so that their weights cost neither a gradient nor a double backward."""
        for group in (self.phi, self.theta):
            for p in group.params:
                p.requires_grad_(group in groups)

    def step_by(self, loss, *groups, keep_graph=False):
        """One Adam step of the parameter `groups` on the mean of loss [B] over the minibatch. It never waits for the device.

        With --gamma stationary, gamma then takes its closed form.
        """
        loss, params = loss.mean(), [p for group in groups for p in group.params]
        set_gradients(params, torch.autograd.grad(loss, params, retain_graph=keep_graph))
        for group, sums in zip((self.phi, self.theta), self.sums):
            if group in groups:
                norm = torch.nn.utils.get_total_norm([p.grad for p in group.params])
                sums += torch.stack([loss.detach(), norm, torch.ones_like(norm)])
                group.optimiser.step()
        if self.stationary and self.theta in groups:
            self.stationary.update(loss.detach(), self.vae.log_gamma.grad)
        self.note_divergence(loss.detach())

    def begin_epoch(self, epoch):
        order = torch.randperm(len(self.order), generator=torch.Generator().manual_seed(seed_of(self.seed, ORDER, epoch)))
        self.order.copy_(order)
        self.cursor.copy_(torch.arange(self.batch))

    def progress(self, rate):
        losses = {name: f"{loss / count:.4g}" for name, (loss, _, count) in zip(("infer", "learn"), self.sums.tolist()) if count}
        return {**losses, "gamma": f"{self.vae.log_gamma.exp().item():.2e}", "images/s": f"{rate * self.batch:.0f}"}

    def averages(self, reset=True):
        """Means since the last reset of the two losses (nats or Fisher divergence) and of the two gradient norms."""
        return dict(zip(("infer_loss", "learn_loss", "infer_grad_norm", "learn_grad_norm"), self.means(reset).T.flatten()))


def adam(params, lr, capturable, scheduled=False):
    """Fused Adam whose state exists from the start, so that it can be captured, saved and loaded in place.

    If it is both captured and `scheduled`, its step size is a tensor that `set_rate` changes in place.
    """
    rate = torch.tensor(lr, device=params[0].device) if capturable and scheduled else lr
    optimiser = torch.optim.Adam(params, rate, fused=True, capturable=capturable)
    for p in params:
        optimiser.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimiser


def decay(step, steps_per_epoch, half_life):
    """The factor of the step size at this step. It halves every `half_life` epochs and does not depend on the budget."""
    return 0.5 ** (step // steps_per_epoch / half_life)


def set_rate(optimiser, lr):
    group = optimiser.param_groups[0]
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def set_gradients(params, gradients):
    """Give each parameter its gradient in the parameter's memory layout, which autograd.grad does not promise.

    Fused Adam pairs their elements by memory position.
    """
    for p, gradient in zip(params, gradients):
        p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
