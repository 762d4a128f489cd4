"""The trainers against plain loops in float64: which half moves when, on what data and noise, by which loss and step size."""

import copy
import types

import pytest
import torch
from torch.autograd import grad

import train_images
import train_synthetic
from models import build_ensemble, build_vae
from objectives import INFER, LEARN
from small_runs import CPU, run_steps, train_on
from train_synthetic import EnsembleTrainer
from training import INIT, NEVER, NOISE, ORDER, ImageTrainer, seed_of, theta_loss
from vsm import loop
from vsm.distributions_2d import DISTRIBUTIONS

IMAGES = torch.randint(256, (17, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
DETACHED = ("fd", "fd-weighted")  # Algorithm 1 takes z as a constant there
ESTIMATED = ("swersky", "bao")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(mine, expected):
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-8)


def image_vae(latent="gaussian"):
    torch.manual_seed(0)
    return build_vae("mlp", (1, 2, 3), 2, width=6, latent=latent, temperature=0.7, init_sd=0.5)


def settings(**changes):
    return dict(learn="fd", infer="kld", estimator="plugin", samples=2, inner_steps=2, noise=0.1, batch=5, lr=1e-2,
                seed=3) | changes


def plain_draw(vae, x, n, generator, exact):
    """q(z|x) and z, by the definitions of the reparametrisation, the binary concrete relaxation and exact 0/1 draws."""
    q, shape = vae.encode(x), (n, len(x), 2)
    if vae.latent == "gaussian":
        return q, q.mean + q.stddev * torch.randn(shape, generator=generator)
    logits = q.base_dist.logits + torch.logit(torch.rand(shape, generator=generator), eps=torch.finfo(x.dtype).eps)
    return q, (logits > 0).double() if exact else torch.sigmoid(logits / 0.7)


def plain_images(vae, steps, *, learn, infer, estimator, samples, inner_steps, noise, batch, lr, seed,
                 infer_samples=None, lr_half_life=None, one_pass=False):
    """Algorithm 1 without freezing, in-place sums or graphs. Returns per half [losses, gradient norms], a number per update."""
    generator = torch.Generator().manual_seed(seed_of(seed, NOISE))
    halves = list(vae.encoder.parameters()), [*vae.decoder.parameters(), vae.log_gamma]
    optimisers = [torch.optim.Adam(half, lr, foreach=False) for half in halves]
    history = [], []

    def descend(loss, *which):
        gradients = iter(grad(loss, [p for i in which for p in halves[i]]))
        for i in which:
            for p in halves[i]:
                p.grad = next(gradients)
            history[i].append((loss.item(), sum(p.grad.square().sum().item() for p in halves[i]) ** 0.5))
        for i in which:
            optimisers[i].step()
    for step in range(steps):
        epoch, place = divmod(step, len(IMAGES) // batch)
        order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(seed_of(seed, ORDER, epoch)))
        x = IMAGES[order[place * batch:(place + 1) * batch]].float() / 255
        x = (x + noise * torch.randn(x.shape, generator=generator)).requires_grad_()
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = lr * (0.5 ** (epoch / lr_half_life) if lr_half_life else 1)
        if learn == "fae":
            descend(LEARN["fae"](vae, x, *plain_draw(vae, x, samples, generator, exact=False)).mean(), 0, 1)
            continue
        q, z = plain_draw(vae, x, infer_samples or samples, generator, exact=False)
        options = {"estimator": estimator} if learn in ESTIMATED else {}
        if one_pass:  # theta by the samples from before phi's step
            shared = LEARN[learn](vae, x, q, z.detach(), **options).mean()
        descend(INFER[infer](vae, x, q, z.detach() if infer in DETACHED else z).mean(), 0)
        if one_pass:
            descend(shared, 1)
        elif step % inner_steps == inner_steps - 1:
            q, z = plain_draw(vae, x, samples, generator, exact=True)
            descend(LEARN[learn](vae, x, q, z.detach(), **options).mean(), 1)
    return history


@pytest.mark.parametrize("changes", [
    dict(samples=3, infer_samples=1, inner_steps=3, lr_half_life=0.5), dict(learn="elbo", infer="fd", infer_samples=3),
    dict(learn="bao", infer="fd-weighted", estimator="unbiased"), dict(learn="bao", estimator="released"),
    dict(learn="swersky", infer="fd-repar", estimator="unbiased", inner_steps=1), dict(learn="fae", infer="fae", lr_half_life=2),
    dict(learn="bao", latent="bernoulli"), dict(learn="elbo", inner_steps=1, one_pass=True),
    dict(learn="swersky", inner_steps=1, estimator="unbiased", one_pass=True),
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_image_trainer_equals_a_plain_loop(changes):
    latent = changes.get("latent", "gaussian")
    flags, vae = settings(**{name: value for name, value in changes.items() if name != "latent"}), image_vae(latent)
    plain, trainer = copy.deepcopy(vae), run_steps(ImageTrainer(vae, IMAGES, **flags), 8)
    history = plain_images(plain, 8, **flags)
    for mine, expected in zip(vae.parameters(), plain.parameters()):
        assert_close(mine, expected)
    phi, theta = (torch.tensor(rows).mean(0).tolist() for rows in history)
    assert trainer.averages(reset=False) == pytest.approx(dict(infer_loss=phi[0], learn_loss=theta[0], infer_grad_norm=phi[1],
                                                               learn_grad_norm=theta[1]), rel=1e-6)
    assert trainer.sums[:, -1].tolist() == [len(rows) for rows in history] and trainer.step == trainer.clock == 8
    trainer.averages()
    assert trainer.sums.eq(0).all()


PAIRS = [(learn, infer) for learn in LEARN for infer in INFER if learn == infer or not (LEARN[learn].joint or INFER[infer].joint)]


@pytest.mark.parametrize("learn, infer", PAIRS)
def test_every_pair_moves_both_halves_and_stays_finite(learn, infer):
    vae = image_vae()
    before, trainer = copy.deepcopy(vae), ImageTrainer(vae, IMAGES, **settings(learn=learn, infer=infer))
    for step in range(4):
        trainer.run_step()
        moved = [any(not torch.equal(p, q) for p, q in zip(getattr(vae, half).parameters(), getattr(before, half).parameters()))
                 for half in ("encoder", "decoder")]
        assert moved == [True, LEARN[learn].joint or step > 0]
    assert trainer.diverged is None and all(p.isfinite().all() for p in vae.parameters())
    assert all(value.isfinite() and (value > 0 or "loss" in name) for name, value in trainer.averages().items())


def test_a_graph_of_each_kind_of_update_stands_for_all_of_its_kind():
    """The first closure of each kind, called again as a graph is replayed, trains as the closures of the later steps do."""
    class FirstOfItsKind:
        def __init__(self):
            self.first = {}

        def run(self, kind, update, state, generators):
            assert set(state()) == set(replayed.state()) and generators == replayed.generators
            self.first.setdefault(kind, update)()

    eager, replayed = (ImageTrainer(image_vae(), IMAGES, **settings(learn="bao", inner_steps=3)) for _ in range(2))
    replayed.graphs = FirstOfItsKind()
    run_steps(eager, 7), run_steps(replayed, 7)
    assert len(replayed.graphs.first) == 2
    assert all(torch.equal(mine, expected) for mine, expected in zip(replayed.state().values(), eager.state().values()))


@pytest.mark.parametrize("learn, infer, expected", [("fd", "kld", True), ("fd", "fd-repar", False), ("fae", "fae", False)])
def test_weights_are_channels_last_where_nothing_is_differentiated_twice_through_the_networks(learn, infer, expected):
    vae = build_vae("conv", (3, 32, 32), 2, width=2)
    ImageTrainer(vae, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), **settings(learn=learn, infer=infer))
    assert vae.encoder[0].weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_a_narrow_resnet_trains_a_step_and_stays_contiguous():
    """In channels_last its strided 1x1 convolution of 4 channels would corrupt the heap (PyTorch 2.14 on a CPU)."""
    vae = build_vae("resnet", (1, 32, 32), 2, width=4)
    trainer = ImageTrainer(vae, torch.zeros(5, 1, 32, 32, dtype=torch.uint8), **settings(inner_steps=1))
    trainer.run_step()
    assert trainer.diverged is None and vae.encoder[0].weight.is_contiguous()


def test_every_flag_of_the_image_script_reaches_the_trainer(digits, tmp_path, monkeypatch):
    flags = dict(learn="bao", infer="fd-weighted", estimator="unbiased", samples=4, infer_samples=3, inner_steps=7, noise=0.3,
                 batch=60, lr=2e-3, seed=9, lr_half_life=2.5, gamma="stationary")
    words, given = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))], {}

    def stop(vae, images, **options):
        given.update(options, vae=vae)
        raise ZeroDivisionError
    monkeypatch.setattr(train_images, "ImageTrainer", stop)
    with pytest.raises(ZeroDivisionError):
        train_on(digits, tmp_path / "run", *words, "--no-graph")
    torch.manual_seed(seed_of(9, INIT))
    expected = build_vae("mlp", (1, 32, 32), 3, width=4, init_sd=1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in given.pop("vae").state_dict().items())
    assert given == flags | {"graph": False, "one_pass": False}


SMALL = ["--seeds", "2", "--seed", "4", "--batch", "6", "--hidden", "3", "--steps-per-epoch", "2", "--inner-lr", "0.05",
         "--lr", "1e-2"]


def ensemble(*argv):
    args = train_synthetic.parse_args([*SMALL, *map(str, argv), "--device", "cpu"])
    return args, EnsembleTrainer(args, CPU)


def plain_encoder_step(vae, x, infer, noise, rate):
    """One step of SGD in place; returns the loss before it. x [1, B, 2], noise [M, 1, B, 2]."""
    q, phi = vae.encode(x), list(vae.encoder.parameters())
    z = q.mean + q.stddev * noise
    loss = INFER[infer](vae, x, q, z.detach() if infer in DETACHED else z).mean()
    for p, gradient in zip(phi, grad(loss, phi)):
        p.data -= rate * gradient
    return loss.item()


def plain_member(args, seed, steps):
    """One member by itself: K encoder steps, J more that the decoder's gradient sees (by differences), then Adam on theta."""
    K, J, M, N, B = args.inner_steps, args.bilevel_steps, args.infer_samples, args.samples, args.batch
    law = DISTRIBUTIONS[args.data]
    vae = build_ensemble(2, 2, args.hidden, [seed_of(seed, INIT)], init_sd=args.init_sd)
    generator, theta = torch.Generator().manual_seed(seed_of(seed, NOISE)), theta_of(vae)
    adam, losses = torch.optim.Adam(theta, args.lr, foreach=False), []
    sizes = [law.dim_noise * B, *[M * 2 * B] * (K + J), N * 2 * B]
    options = {"estimator": args.estimator} if args.learn in ESTIMATED else {}
    for step in range(steps):
        data, *infer, learn = torch.empty(sum(sizes)).normal_(generator=generator).split(sizes)
        x = law.transform(data.view(law.dim_noise, B).T)[None].requires_grad_()
        infer, learn = [noise.view(M, 2, B).mT[:, None] for noise in infer], learn.view(N, 2, B).mT[:, None]
        factor = 0.5 ** (step // args.steps_per_epoch / args.lr_half_life) if args.lr_half_life else 1
        for noise in infer[:K]:
            infer_loss_now = plain_encoder_step(vae, x, args.infer, noise, args.inner_lr * factor)

        def learn_loss_of(model):
            for noise in infer[K:]:
                plain_encoder_step(model, x, args.infer, noise, args.inner_lr * factor)
            q = model.encode(x)
            return LEARN[args.learn](model, x, q, (q.mean + q.stddev * learn).detach(), **options).mean()

        gradient = differences(learn_loss_of, vae) if J else grad(learn_loss_of(vae), theta)
        loss = learn_loss_of(vae).item()  # moves phi by the kept steps
        for p, g in zip(theta, gradient):
            p.grad = g
        adam.param_groups[0]["lr"] = args.lr * factor
        adam.step()
        losses.append((infer_loss_now, loss))
    return vae, torch.tensor(losses).mean(0)


def theta_of(vae):
    return [*vae.decoder.parameters(), vae.log_gamma]


def differences(loss_of, vae, h=1e-5):
    """The gradient of loss_of(vae) by theta by central differences, a number at a time."""
    def moved(index, k, shift):
        other = copy.deepcopy(vae)
        theta_of(other)[index].data.view(-1)[k] += shift
        return loss_of(other).item()
    return [torch.tensor([(moved(index, k, h) - moved(index, k, -h)) / (2 * h) for k in range(p.numel())]).view_as(p)
            for index, p in enumerate(theta_of(vae))]


@pytest.mark.parametrize("argv", [
    ["--samples", 3, "--infer-samples", 2, "--inner-steps", 3, "--lr-half-life", 0.5],
    ["--learn", "bao", "--infer", "fd", "--estimator", "unbiased", "--samples", 2, "--infer-samples", 1, "--data", "sparse"],
    ["--learn", "swersky", "--infer", "fd-weighted", "--estimator", "released", "--inner-steps", 1],
    ["--learn", "fae", "--data", "spiral", "--inner-steps", 2],
    ["--learn", "bao", "--infer", "fd-weighted", "--bilevel-steps", 1, "--inner-steps", 1, "--lr-half-life", 0.5, "--samples", 2,
    "--estimator", "unbiased"]], ids=lambda argv: "-".join(str(word) for word in argv if not str(word).startswith("--")))
def test_each_member_of_an_ensemble_equals_a_plain_loop(argv):
    args, made = ensemble(*argv)
    steps = 3 if args.bilevel_steps else 5
    run_steps(made, steps)
    averages = made.averages()
    for i, seed in enumerate((4, 5)):
        vae, losses = plain_member(args, seed, steps)
        for mine, expected in zip(made.vae.parameters(), vae.parameters()):
            torch.testing.assert_close(mine[i], expected[0], rtol=1e-5, atol=1e-6 if args.bilevel_steps else 1e-9)
        assert_close(torch.stack([averages["infer_loss"][i], averages["learn_loss"][i]]), losses)
    assert made.clock == made.step == steps


def test_the_weighted_divergence_has_s_itself_as_a_constant_weight():
    """1/2 sum_d (s_d c_d)^2 with log q by hand; its gradient is that of c alone."""
    vae, x = image_vae(), IMAGES[:3] / 255.0
    z, phi = torch.randn(1, 3, 2), list(vae.encoder.parameters())
    found = INFER["fd-weighted"](vae, x, vae.encode(x), z)
    mean, sd = (lambda q: (q.mean, q.stddev))(vae.encode(x))
    w = z.clone().requires_grad_()
    log_p = -(w**2).sum() / 2 - ((x - vae.decode(w)) ** 2).sum() / 2 / vae.log_gamma.exp()
    c = -(z - mean) / sd**2 - grad(log_p, w)[0]
    expected = sum((sd[:, d].detach() * c[0, :, d]) ** 2 for d in range(2)) / 2
    assert_close(found, expected)
    for mine, theirs in zip(grad(found.sum(), phi), grad(expected.sum(), phi)):
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", [name for name, entry in LEARN.items() if not entry.joint])
@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_the_loss_of_theta_reaches_no_phi_and_takes_exact_draws(name, latent, monkeypatch):
    vae, x, drawn = image_vae(latent), IMAGES[:4] / 255.0, []
    noise, decode = torch.randn(3, 4, 2), vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: (drawn.append(z), decode(z))[1])
    vae.encoder.requires_grad_(False)  # as both trainers do
    loss = theta_loss(vae, x, name, noise, t=-x.flatten(1))
    assert loss.shape == (4,) and not drawn[0].requires_grad
    if latent == "bernoulli":
        assert drawn[0].unique().tolist() == [0, 1]
    assert all(g.abs().max() > 0 for g in grad(loss.sum(), [*vae.decoder.parameters(), vae.log_gamma]))


@pytest.mark.parametrize("argv, expected", [
    (["--learn", "fd"], ("kld", 1)), (["--learn", "fae"], ("fae", 1)), (["--samples", "3"], ("kld", 3)),
    (["--samples", "3", "--infer-samples", "2"], ("kld", 2))])
def test_the_pair_is_filled_in(argv, expected):
    args = train_synthetic.parse_args(argv)
    assert (args.infer, args.infer_samples) == expected


def spoil(trainer, *members):
    trainer.vae.log_gamma.data[list(members) if members else ...] = torch.nan


def test_the_clock_reads_the_first_update_that_met_a_value_that_is_not_finite():
    trainer = ImageTrainer(image_vae(), IMAGES, **settings())
    for step in range(6):
        if step == 3:
            spoil(trainer)
        trainer.run_step()
        assert (trainer.diverged, trainer.diverged_at) == ((None, NEVER) if step < 3 else (3, 3))


def test_a_member_has_diverged_where_any_of_its_values_is_not_finite():
    _, made = ensemble("--seeds", 3)
    made.clock.fill_(7)
    made.note_divergence(torch.tensor([1, torch.inf, 1]), torch.tensor([torch.nan, 1, 1]))
    made.clock.fill_(9)
    made.note_divergence(torch.tensor([torch.nan, 1, 1]))
    assert made.diverged_at.tolist() == [7, 7, NEVER]


@pytest.mark.parametrize("ill, status, diverged_at", [
    ((), "ok", [NEVER, NEVER]), ((1,), "ok", [NEVER, 2]), ((0, 1), "diverged@4", [2, 4])])
def test_a_run_stops_once_every_member_has_diverged(monkeypatch, ill, status, diverged_at):
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0)
    _, made = ensemble("--inner-steps", 1)
    checkpoints, run_step, nothing = [], made.run_step, lambda *_, **__: None
    run = types.SimpleNamespace(path="memory", load_checkpoint=nothing, save_metrics=nothing, log=nothing,
                                save_checkpoint=lambda value: checkpoints.append(value["trainer"]["step"]))

    def step():
        if made.step in (2, 4) and ill:  # the members fall ill one after the other
            spoil(made, *ill[:made.step // 2])
        run_step()

    made.run_step = step
    found, history = loop.train(run, made, epochs=5, eval_every=2, evaluate=lambda: {})
    assert found == status and made.step == (10 if status == "ok" else 5)
    assert [int(epoch) for epoch in history["epoch"]] == ([0, 2, 4, 5] if status == "ok" else [0, 2])
    assert made.diverged_at.tolist() == diverged_at and checkpoints == ([0, 4, 8, 10] if status == "ok" else [0, 4])
