"""Training on images: the alternating update of Alg. 1, the loop around it, checkpoints that resume bit by bit.

Read `Trainer.update` first: it is the whole of one step. `train_synthetic.py` shares the losses, the loop, and what makes steps fast:
`capture` (a CUDA graph, on a GPU) and `compiled` (TorchInductor, on a CPU).
"""

import time

import numpy as np
import torch
from tqdm import tqdm

from objectives import HAS_ESTIMATOR, INFER, LEARN
from vsm.cli import UserError
from vsm.device import peak_memory
from vsm.speed import capture

LOOK_SECONDS, CHECKPOINT_SECONDS = 1, 60


def seed_of(*key):
    """One integer seed for a stream of random numbers named by integers, as in seed_of(seed, ORDER, epoch)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


INIT, ORDER, NOISE, EVALUATION = range(4)  # streams of randomness: evaluating more often changes no weight


def resolve_pair(parser, args):
    """Fill in --infer; end with a sentence for a pair or an estimator that has no meaning."""
    args.infer = args.infer or ("fae" if args.learn == "fae" else "kld")
    if (args.learn == "fae") != (args.infer == "fae"):
        parser.error("the Fisher autoencoder trains both halves by one loss: --learn fae goes with --infer fae and no other")
    if args.estimator != "plugin" and args.learn not in HAS_ESTIMATOR:
        parser.error(f"--estimator {args.estimator} has a meaning for --learn {' and '.join(HAS_ESTIMATOR)} only")
    if args.estimator == "unbiased" and args.samples < 2:
        parser.error("--estimator unbiased needs --samples of at least 2: it divides by N - 1")


def infer_loss(vae, x, infer, noise):
    """The loss of phi per datum [B], from standard noise [N, B, Dz]. KLD reparametrises z; FD takes it as a constant (3.3.2)."""
    q = vae.encode(x)
    z = vae.sample(q, noise(q))
    return INFER[infer](vae, x, q, z.detach() if infer == "fd" else z)


def learn_loss(vae, x, learn, noise, estimator="plugin"):
    """The loss of theta per datum [B]: phi gets no gradient and z is a constant (Alg. 1)."""
    x.requires_grad_(learn == "bao")  # b_n is the encoder's input gradient, a constant for theta
    with torch.set_grad_enabled(x.requires_grad):
        q = vae.encode(x)
    z = vae.sample(q, noise(q), relaxed=False).detach()
    return LEARN[learn](vae, x, q, z, **({"estimator": estimator} if learn in HAS_ESTIMATOR else {}))


def joint_loss(vae, x, noise):
    """The Fisher autoencoder's loss of theta and phi together, per datum [B]: z reparametrised, everything differentiable."""
    x.requires_grad_()
    q = vae.encode(x)
    return LEARN["fae"](vae, x, q, vae.sample(q, noise(q)))


class Trainer:
    """A VAE, its two optimisers, the training images (uint8 [n, C, H, W] on the device) and the state that a step changes.

    On a GPU each kind of update is captured once in a CUDA graph and replayed, unless graph=False.
    Raises UserError for fewer images than one minibatch.
    """

    def __init__(self, vae, images, *, learn, infer, estimator, samples, inner_steps, noise, batch, lr, seed, graph=True):
        if len(images) < batch:
            raise UserError(f"{len(images)} training images are fewer than one minibatch of {batch}; use a smaller --batch")
        if learn != "fae" and infer != "fd-repar":  # double backward, of batch norm above all, is slower in channels_last
            vae.to(memory_format=torch.channels_last)
        self.vae, self.images, self.device = vae, images, images.device
        self.learn, self.infer, self.estimator = learn, infer, estimator
        self.samples, self.inner_steps, self.noise, self.batch, self.seed = samples, inner_steps, noise, batch, seed
        self.graph, self.graphs = graph and self.device.type == "cuda", {}
        self.generator = torch.Generator(self.device).manual_seed(seed_of(seed, NOISE))

        self.phi, self.theta = list(vae.encoder.parameters()), [*vae.decoder.parameters(), vae.log_gamma]
        self.optimisers = [adam(params, lr, capturable=self.graph) for params in (self.phi, self.theta)]
        self.steps_per_epoch = len(images) // batch
        self.order = torch.arange(len(images), device=self.device)
        self.cursor = torch.arange(batch, device=self.device)  # rows of `order` that make the next minibatch
        self.clock = torch.zeros((), dtype=torch.int64, device=self.device)
        self.diverged_at = torch.full((), torch.iinfo(torch.int64).max, device=self.device)
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=self.device)  # phi, theta: loss, gradient norm, count
        self.step = 0

    def update(self, with_decoder):
        """One minibatch: phi moves; theta moves too on every K-th. The Fisher autoencoder moves both by one loss."""
        x = self.minibatch()
        if self.learn == "fae":
            self.differentiate(phi=True, theta=True)
            self.descend(joint_loss(self.vae, x, self.draw), self.phi + self.theta)
        else:
            self.differentiate(phi=True)
            self.descend(infer_loss(self.vae, x, self.infer, self.draw), self.phi)
            if with_decoder:
                self.differentiate(theta=True)
                self.descend(learn_loss(self.vae, x, self.learn, self.draw, self.estimator), self.theta)
        self.clock += 1

    def minibatch(self):
        """The next images of this epoch's permutation in [0, 1], with fresh noise, [B, C, H, W]."""
        x = self.images[self.order[self.cursor]].float() / 255
        self.cursor += self.batch
        return x + self.noise * torch.randn(x.shape, generator=self.generator, device=self.device)

    def draw(self, q):
        return self.vae.noise(q, self.samples, self.generator)

    def differentiate(self, phi=False, theta=False):
        """Freeze the half that does not move: its weights cost no gradient, and what depends on them no double backward."""
        for params, moves in ((self.phi, phi), (self.theta, theta)):
            for p in params:
                p.requires_grad_(moves)

    def descend(self, loss, params):
        """One Adam step of `params` on the mean of `loss` [B] over the minibatch; nothing here waits for the device."""
        loss = loss.mean()
        set_gradients(params, torch.autograd.grad(loss, params))
        for half, optimiser, sums in zip((self.phi, self.theta), self.optimisers, self.sums):
            if half[0].requires_grad:
                norm = torch.nn.utils.get_total_norm([p.grad for p in half])
                sums += torch.stack([loss.detach(), norm, torch.ones_like(norm)])
                optimiser.step()
        bad = torch.where(loss.isfinite(), self.diverged_at, self.clock)
        self.diverged_at.copy_(torch.minimum(self.diverged_at, bad))

    def run_step(self):
        """Update number `step`, counted from 0: captured where there is a GPU, eager elsewhere."""
        if self.step % self.steps_per_epoch == 0:
            self.begin_epoch(self.step // self.steps_per_epoch)
        self.step += 1
        with_decoder = self.step % self.inner_steps == 0
        if not self.graph:
            self.update(with_decoder)
            return
        if with_decoder not in self.graphs:
            self.graphs[with_decoder] = capture(lambda: self.update(with_decoder), self.state(), [self.generator])
        self.graphs[with_decoder].replay()

    def begin_epoch(self, epoch):
        order = torch.randperm(len(self.order), generator=torch.Generator().manual_seed(seed_of(self.seed, ORDER, epoch)))
        self.order.copy_(order)
        self.cursor.copy_(torch.arange(self.batch))

    @torch.no_grad()
    def state(self):
        """Every tensor that a step changes, by name. Loading copies into these, so captured graphs stay valid."""
        return state_of(self.vae, *self.optimisers) | {"order": self.order, "cursor": self.cursor, "clock": self.clock,
                                                       "sums": self.sums, "diverged_at": self.diverged_at}

    def save(self):
        return {"step": self.step, "generator": self.generator.get_state(), "tensors": {k: v.cpu() for k, v in self.state().items()}}

    def load(self, saved):
        restore(self.state(), saved["tensors"])
        self.step = saved["step"]
        restore_generator(self.generator, saved["generator"], seed_of(self.seed, NOISE, self.step))

    def progress(self, rate):
        infer, learn = (self.sums[:, 0] / self.sums[:, 2]).tolist()
        return {"infer": f"{infer:.4g}", "learn": f"{learn:.4g}", "gamma": f"{self.vae.log_gamma.exp().item():.2e}",
                "images/s": f"{rate * self.batch:.0f}"}

    def averages(self):
        """Means since the last call: the two training losses (nats or Fisher divergence) and the two gradient norms."""
        loss, norm, count = self.sums.T
        values = torch.stack([loss, norm]) / count
        self.sums.zero_()
        return dict(zip(("infer_loss", "learn_loss", "infer_grad_norm", "learn_grad_norm"), values.flatten().cpu()))


def adam(params, lr, capturable):
    """Fused Adam with its state made at once, so that it can be captured, saved and loaded in place."""
    optimiser = torch.optim.Adam(params, lr, fused=True, capturable=capturable)
    for p in params:
        optimiser.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimiser


def set_gradients(params, gradients):
    """Each in its parameter's memory layout, as autograd.grad's need not be: fused Adam pairs by memory."""
    for p, gradient in zip(params, gradients):
        p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)


def state_of(vae, *optimisers):
    """The tensors of a model and of its optimisers' moments, by name, in place."""
    state = {f"vae.{name}": tensor.detach() for name, tensor in vae.state_dict(keep_vars=True).items()}
    for i, optimiser in enumerate(optimisers):
        for j, moments in enumerate(optimiser.state.values()):
            state |= {f"adam.{i}.{j}.{name}": tensor for name, tensor in moments.items()}
    return state


def restore(state, saved):
    """Copy saved tensors into those of `state`, by name. Raises UserError, having copied nothing, where names or shapes differ."""
    if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in saved.items()}:
        raise UserError("the checkpoint is of another model than these flags make and is kept as it is; "
                        "move it away or use --overwrite to start the run again")
    for name, tensor in state.items():
        tensor.copy_(saved[name])


def restore_generator(generator, state, seed):
    """A generator's state; where it was saved on another kind of device, whose states are of another form, a new stream from `seed`."""
    if len(state) == len(generator.get_state()):
        generator.set_state(state.cpu())
    else:
        generator.manual_seed(seed)


def train(run, trainer, epochs, eval_every, evaluate):
    """Train to `epochs`, resuming from the run's checkpoint. evaluate() -> dict of CPU tensors, at epoch 0, every `eval_every` and the last.

    Returns the status, `ok` or `diverged@<step>` (a non-finite loss is a result), and the history: a list per metric.
    """
    saved = run.load_checkpoint()
    if saved and not (isinstance(saved, dict) and saved.keys() == {"trainer", "history", "seconds"}):
        raise UserError(f"{run.path}/checkpoint.pt is not a checkpoint of this script and is kept as it is; move it away")
    history, seconds = (saved["history"], saved["seconds"]) if saved else ({}, 0.0)
    if saved:
        trainer.load(saved["trainer"])
    total, started = epochs * trainer.steps_per_epoch, time.monotonic() - seconds
    last_look = last_save = time.monotonic()

    def checkpoint():
        run.save_checkpoint({"trainer": trainer.save(), "history": history, "seconds": time.monotonic() - started})

    def record():
        row = {"epoch": torch.tensor(trainer.step // trainer.steps_per_epoch), **evaluate(), **trainer.averages(),
               "seconds": torch.tensor(time.monotonic() - started), "peak_memory": torch.tensor(peak_memory(trainer.device))}
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        run.save_metrics(**stack(history))
        checkpoint()

    if not saved:
        record()
    with tqdm(total=total, initial=trainer.step, unit="step", smoothing=0.05, dynamic_ncols=True) as bar:
        while trainer.step < total:
            trainer.run_step()
            bar.update()
            epoch, remainder = divmod(trainer.step, trainer.steps_per_epoch)
            evaluates = remainder == 0 and (epoch % eval_every == 0 or trainer.step == total)
            if not evaluates and time.monotonic() - last_look < LOOK_SECONDS:
                continue
            # Only from here on does the host wait for the device.
            last_look = time.monotonic()
            if (trainer.diverged_at < trainer.clock).all():
                return f"diverged@{trainer.diverged_at.max().item()}", history
            bar.set_postfix(trainer.progress(bar.format_dict["rate"] or 0), refresh=False)
            if evaluates:
                record()
            elif last_look - last_save > CHECKPOINT_SECONDS:
                checkpoint()
            else:
                continue
            last_save = time.monotonic()
    return "ok", history


def stack(history):
    return {name: torch.stack(values).numpy() for name, values in history.items()}
