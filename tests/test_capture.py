"""What a CUDA graph asks of an update, tested without a GPU: every kind of update runs on the device `meta`, under watch.

An update may not wait for the device and may not make or meet a tensor of the host. It writes in place into tensors of state()
and tensors of its own alone, replaces no tensor of state(), and draws only from the generators that a checkpoint keeps.
Tensors on `meta` have shapes and no values, so the tests take little time. `meta` has no autocast, so bf16 is not tested here.
"""

from functools import partial

import pytest
import torch
from torch.distributions import kl_divergence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import small_runs
import train_synthetic
import training
from benchmarks.benchmark import pairs
from models import build_vae
from objectives import LEARN
from train_synthetic import EnsembleTrainer
from training import ImageTrainer
from vsm.distributions_2d import DISTRIBUTIONS, Mixture

PAIRS = list(pairs().values())
QUICK = {("elbo", "kld"), ("dsm", "kld"), ("fd", "fd"), ("swersky", "fd-weighted"), ("bao", "fd-repar"), ("fae", "fae")}
MARKED = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
META = torch.device("meta")
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor}
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Forbidden(Exception):
    """An update did what a CUDA graph cannot capture, or what its replay would not repeat."""


class Factories(TorchFunctionMode):
    """Refuses the functions that copy from the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_HOST:
            raise Forbidden(f"{function.__name__} copies from the host")
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Refuses operations that wait for the device, tensors of the host, writes into what is neither state nor of the update, and
    draws from other generators than the trainer's.
    """

    def __init__(self, state, generators):
        super().__init__()
        self.seeds = {generator.initial_seed() for generator in generators}  # operations get other objects
        self.storages = [tensor.untyped_storage() for tensor in state.values()]  # kept alive, so that no address is used again
        self.writable = {storage._cdata for storage in self.storages}
        self.seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name.split("::")[1]
        if name in WAITING:
            raise Forbidden(f"{name} waits for the device")
        if name in INDEXING and any(index.dtype == torch.bool for index in tensors(args[1])):
            raise Forbidden(f"{name} by a boolean mask waits for the device")
        if torch.Tag.nondeterministic_seeded in operation.tags:
            generator = kwargs.get("generator")
            if generator is None or generator.initial_seed() not in self.seeds:
                raise Forbidden(f"{name} draws from a generator that no checkpoint keeps")
        given = tensors((args, kwargs))
        self.refuse_host(name, given)
        arguments = operation._schema.arguments
        for argument, value in (*zip(arguments, args), *((argument, kwargs.get(argument.name)) for argument in arguments)):
            self.refuse_write(name, argument, value)
        without_kernel = operation is torch.ops.aten._fused_adam_.tensor_lr  # on `meta`
        result = None if without_kernel else operation(*args, **kwargs)
        made = tensors(result)
        self.refuse_host(name, made)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata not in known:
                self.storages.append(storage)
                self.writable.add(storage._cdata)
        self.seen += 1
        return result

    def refuse_write(self, name, argument, value):
        written = tensors(value) if argument.alias_info is not None and argument.alias_info.is_write else []
        if any(tensor.untyped_storage()._cdata not in self.writable for tensor in written):
            raise Forbidden(f"{name} writes into a tensor that is not in state()")

    @staticmethod
    def refuse_host(name, given):
        if any(tensor.device != META for tensor in given):
            raise Forbidden(f"{name} makes or meets a tensor of the host")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def watch(trainer, update):
    """Run update() twice by the rules, since the first makes the gradients that the second finds.

    Returns the number of operations of the second.
    """
    for _ in range(2):
        before = trainer.state()
        with Factories(), Operations(before, trainer.generators) as operations:
            update()
        after = trainer.state()
        assert list(before) == list(after)
        for name, tensor in before.items():
            if tensor.untyped_storage()._cdata != after[name].untyped_storage()._cdata:
                raise Forbidden(f"{name} is replaced")
    return operations.seen


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """Generators and a fused, capturable Adam, as on a GPU, for the device `meta`, which PyTorch refuses both."""
    cpu_generator, optimiser, make = torch.Generator, torch.optim.Adam, training.adam

    class OnHost:  # a class, since annotations of modules that PyTorch imports late name torch.Generator
        def __new__(cls, device=None):
            return cpu_generator()

    class Adam(optimiser):
        def __init__(self, params, lr, fused, capturable):
            super().__init__(params, 1e-3, capturable=capturable)
            self.param_groups[0] |= {"lr": lr, "fused": fused, "foreach": False}
            self._need_device_dtype_check_for_fused = False
    monkeypatch.setattr(torch, "Generator", OnHost)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    for module in (training, train_synthetic):
        monkeypatch.setattr(module, "adam", lambda params, lr, capturable, scheduled=False: make(params, lr, True, scheduled))


def image_trainer(learn="fd", infer="kld", net="mlp", latent="gaussian", **options):
    side = 32 if net == "conv" else 4
    vae = build_vae(net, (1, side, side), 3, width=4, latent=latent).to(META)
    images, options = torch.empty(9, 1, side, side, dtype=torch.uint8, device=META), {"samples": 2, "inner_steps": 2} | options
    trainer = small_runs.image_trainer(vae, images, learn=learn, infer=infer, **options)
    trainer.begin_epoch(0)
    return trainer


def watch_images(trainer):
    for with_decoder in (False, True):
        assert watch(trainer, partial(trainer.update, with_decoder)) > 50


def ensemble_trainer(learn="fd", infer="kld", *flags):
    argv = ["--learn", learn, "--infer", infer, "--seeds", "2", "--batch", "5", "--hidden", "4", "--inner-steps", "2",
            *(["--noise", "0.1"] if LEARN[learn].takes("t") else []), *flags]
    return EnsembleTrainer(train_synthetic.parse_args(argv), META)


def watch_ensemble(trainer):
    assert watch(trainer, trainer.update) > 50


def estimators(of):
    return [(learn, infer, estimator) for learn, infer in of if LEARN[learn].takes("estimator")
            for estimator in LEARN[learn].estimators if estimator != "plugin"]


@pytest.mark.parametrize("learn, infer", MARKED)
def test_every_pair_keeps_the_rules(learn, infer):
    watch_images(image_trainer(learn, infer))
    watch_ensemble(ensemble_trainer(learn, infer))


ONE_PASS = {"net": "conv", "inner_steps": 1, "one_pass": True}


@pytest.mark.parametrize("options", [{"net": "conv"}, {"lr_half_life": 1.0}, {"latent": "bernoulli"}, {"infer_samples": 3},
                                     {"gamma": "stationary"}, {"gamma": "fixed"}, {"learn": "elbo"} | ONE_PASS,
                                     {"learn": "swersky"} | ONE_PASS])
def test_another_network_latent_or_schedule_keeps_the_rules(options):
    watch_images(image_trainer(**{"learn": "bao"} | options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lr_half_life": 1.0}])
@pytest.mark.parametrize("learn, infer", PAIRS)
def test_every_pair_of_a_conv_network_keeps_the_rules(learn, infer, options):
    watch_images(image_trainer(learn, infer, "conv", **options))


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("learn", [learn for learn, infer in PAIRS if infer == "kld"])
def test_every_objective_of_bernoulli_latents_keeps_the_rules(learn, net):
    watch_images(image_trainer(learn, "kld", net, latent="bernoulli"))


@pytest.mark.slow
@pytest.mark.parametrize("learn, infer, estimator", estimators(PAIRS))
def test_every_estimator_keeps_the_rules(learn, infer, estimator):
    watch_images(image_trainer(learn, infer, estimator=estimator))
    watch_ensemble(ensemble_trainer(learn, infer, "--estimator", estimator, "--samples", "1" if estimator == "released" else "2"))


@pytest.mark.parametrize("law", DISTRIBUTIONS)
def test_every_law_keeps_the_rules(law):
    watch_ensemble(ensemble_trainer("fd", "kld", "--data", law))


@pytest.mark.parametrize("learn", [learn for learn, entry in LEARN.items() if entry.gamma])
def test_stationary_gamma_keeps_the_rules(learn):
    watch_images(image_trainer(learn, gamma="stationary"))
    watch_ensemble(ensemble_trainer(learn, "kld", "--gamma", "stationary"))


@pytest.mark.parametrize("learn, infer", [pytest.param(*pair, marks=() if pair == ("bao", "fd") else pytest.mark.slow)
                                          for pair in PAIRS])
def test_kept_steps_and_a_schedule_keep_the_rules(learn, infer):
    watch_ensemble(ensemble_trainer(learn, infer, "--bilevel-steps", "2", "--lr-half-life", "1"))


def after_update(change):
    """Returns a fault, which calls update() and then change(trainer)."""
    def inject(monkeypatch):
        update = ImageTrainer.update
        monkeypatch.setattr(ImageTrainer, "update", lambda trainer, moves: (update(trainer, moves), change(trainer)))
    return inject


def forget_cursor(monkeypatch):
    state = ImageTrainer.state
    monkeypatch.setattr(ImageTrainer, "state", lambda trainer: {k: v for k, v in state(trainer).items() if k != "cursor"})


def masked_kl(monkeypatch):
    monkeypatch.setattr(models.VAE, "kl", lambda vae, q: kl_divergence(q.base_dist, vae.prior.base_dist))


def clip(trainer):
    torch.nn.utils.clip_grad_norm_(trainer.phi.params, 1.0, error_if_nonfinite=True)


STRANGER, HOST_SCALAR = torch.Generator().manual_seed(1), torch.tensor(1 / 255)
FAULTS = {
    "clock re-bound": (after_update(lambda trainer: setattr(trainer, "clock", trainer.clock + 1)), "replaced"),
    "cursor left out of state()": (forget_cursor, "not in state"), "masked KL": (masked_kl, "waits|host"),
    "error_if_nonfinite": (after_update(clip), "waits"),
    "forgotten device": (after_update(lambda trainer: torch.zeros(3)), "host"),
    "float()": (after_update(lambda trainer: float(trainer.sums[0, 0])), "waits"),
    "host scalar": (after_update(lambda trainer: trainer.vae.log_gamma.detach() * HOST_SCALAR), "host"),
    "boolean mask": (after_update(lambda trainer: trainer.sums[trainer.sums > 0]), "waits"),
    "no generator": (after_update(lambda trainer: torch.randn(3, device=META)), "no checkpoint keeps"),
    "another generator": (after_update(lambda trainer: torch.rand(3, generator=STRANGER, device=META)), "no checkpoint keeps")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_update_is_caught(fault, monkeypatch):
    inject, message = FAULTS[fault]
    inject(monkeypatch)
    latent = "bernoulli" if fault == "masked KL" else "gaussian"
    with pytest.raises(Forbidden, match=message):
        watch_images(image_trainer("elbo", "kld", latent=latent))


def test_a_tensor_from_the_host_in_a_law_is_caught(monkeypatch):
    monkeypatch.setattr(Mixture, "transform", lambda law, u: u[..., :2] * torch.tensor([0.5, 0.2], device=u.device))
    with pytest.raises(Forbidden, match="copies from the host"):
        watch_ensemble(ensemble_trainer("fd", "kld", "--data", "mixture"))
