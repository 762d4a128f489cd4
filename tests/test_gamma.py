"""The stationary gamma of every objective and estimator, and the update that moves log gamma to it."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

import small_runs
import train_synthetic
from models import build_ensemble, build_vae
from objectives import LEARN, dot, posterior_score
from small_runs import CPU, run_steps
from train_synthetic import EnsembleTrainer
from vsm.gamma import LARGEST_MOVE, StationaryGamma

CASES = [(learn, estimator) for learn, entry in LEARN.items() if entry.gamma
         for estimator in (entry.estimators if entry.takes("estimator") else ("plugin",))]
D, N = 6, 3


def minibatches(shape=(D,), count=3):
    """A float64 model and, for each minibatch, the data, q and z."""
    torch.manual_seed(0)
    vae = build_vae("mlp", shape, 2, width=8).double()
    xs = [torch.randn(10, *shape).double().requires_grad_() for _ in range(count)]
    return vae, [(x, (q := vae.encode(x)), q.sample((N,))) for x in xs]


def loss_and_slope(learn, vae, batch, log_gamma, **options):
    """The mean loss and its derivative by log gamma at this value."""
    vae.log_gamma.data.fill_(log_gamma)
    loss = LEARN[learn](vae, *batch, t=noise_score(batch[0]), **options).mean()
    return loss.detach(), torch.autograd.grad(loss, vae.log_gamma, retain_graph=True)[0]


def noise_score(x):
    return -3 * x.detach().flatten(1)


def explicit(learn, vae, batch, estimator):
    """The two statistics as functions of r_n = x - g(z_n) and b_n, averaged over the minibatch."""
    x, q, z = batch
    r = (x - vae.decode(z)).flatten(2).detach()
    rbar = r.mean(0)
    square, mean_square = dot(r, r).mean(), dot(rbar, rbar).mean()
    if estimator == "unbiased":
        mean_square = mean_square - r.var(0).sum(-1).mean() / N
    if estimator == "released" and x.dim() == 2:
        mean_square = dot(rbar.mean(0), rbar.mean(0))
    if learn == "bao":
        b = posterior_score(vae, x, q, z).detach()
        product = dot(rbar, b.sum(0)) if estimator == "released" else dot(r, b).mean(0)
        return mean_square, D + product.mean()
    if learn == "dsm":
        return mean_square, -dot(rbar, noise_score(x)).mean()
    return 2 * square - mean_square if learn == "swersky" else square, torch.tensor(float(D))


@pytest.mark.parametrize("shape", [(D,), (1, 2, 3)])
@pytest.mark.parametrize("learn, estimator", CASES)
def test_the_ratio_of_means_over_minibatches_is_the_minimum_over_gamma(learn, estimator, shape):
    """Each minibatch gives its statistics at a gamma of its own; the ratio of their means minimises the mean loss."""
    vae, batches = minibatches(shape)
    options = {"estimator": estimator} if LEARN[learn].takes("estimator") else {}
    found = []
    for batch, log_gamma in zip(batches, (0.0, -1.3, 2.1)):
        gamma = torch.tensor(log_gamma, dtype=torch.float64).exp()
        found.append(torch.stack(LEARN[learn].gamma(*loss_and_slope(learn, vae, batch, log_gamma, **options), gamma, D)))
        expected = torch.stack([value.double() for value in explicit(learn, vae, batch, estimator)])
        assert torch.allclose(found[-1], expected, rtol=1e-8)
    numerator, denominator = torch.stack(found).mean(0).tolist()
    assert numerator > 0 and denominator > 0

    def loss(log_gamma):
        return sum(loss_and_slope(learn, vae, batch, log_gamma, **options)[0].item() for batch in batches)

    minimum = minimize_scalar(loss, bounds=(-8, 8), method="bounded", options={"xatol": 1e-9})
    assert math.log(numerator / denominator) == pytest.approx(minimum.x, abs=1e-6)
    mean_of_ratios = sum(value[0] / value[1] for value in found).item() / len(found)
    of_constants = learn not in ("bao", "dsm")  # of which D is the denominator
    assert of_constants or mean_of_ratios != pytest.approx(numerator / denominator, rel=1e-5)


def test_updates_arrive_at_the_stationary_gamma():
    vae, (batch,) = minibatches(count=1)
    gamma = StationaryGamma("swersky", vae.log_gamma, D)
    gamma.means = gamma.means.double()
    for _ in range(12):
        gamma.update(*loss_and_slope("swersky", vae, batch, vae.log_gamma.item()))
    assert loss_and_slope("swersky", vae, batch, vae.log_gamma.item())[1].abs() < 1e-9


def statistics(monkeypatch, *rows):
    """A trainer's gamma that gets these rows (numerators, denominators) of statistics in turn, for two members at gamma 1."""
    rows = iter(rows)
    monkeypatch.setitem(LEARN, "mine", LEARN["bao"].__class__(None, "M", gamma=lambda *_: tuple(map(torch.tensor, next(rows)))))
    log_gamma = torch.zeros(2, requires_grad=True)
    return log_gamma, StationaryGamma("mine", log_gamma, D)


def test_it_is_a_ratio_of_exponential_means(monkeypatch):
    log_gamma, gamma = statistics(monkeypatch, ([2.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 2.0]))
    gamma.update(None, None)
    assert log_gamma.tolist() == pytest.approx([math.log(2), 0], abs=1e-6)
    gamma.update(None, None)
    old, new = 0.99 / 1.99, 1 / 1.99
    assert log_gamma.tolist() == pytest.approx([math.log(2 * old + new), -math.log(old + 2 * new)], abs=1e-6)


@pytest.mark.parametrize("row", [(1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, 0.0), (0.0, 1.0), (math.nan, 1.0)])
def test_gamma_stays_where_the_loss_has_no_stationary_value(monkeypatch, row):
    """The other member is not touched by that."""
    log_gamma, gamma = statistics(monkeypatch, ([row[0], 2.0], [row[1], 1.0]))
    gamma.update(None, None)
    assert log_gamma.tolist() == pytest.approx([0, math.log(2)], abs=1e-6)


def test_a_denominator_near_zero_moves_log_gamma_by_a_bounded_step(monkeypatch):
    log_gamma, gamma = statistics(monkeypatch, ([1.0, 1e-30], [1e-30, 1.0]))
    gamma.update(None, None)
    assert log_gamma.tolist() == pytest.approx([LARGEST_MOVE, -LARGEST_MOVE])


def test_noise_can_leave_bao_without_a_stationary_gamma():
    """With a narrow posterior, b is large, and D + E[r . b] is negative in many minibatches."""
    vae, _ = minibatches()
    with torch.no_grad():
        list(vae.encoder.modules())[-1].bias[2:] -= 5  # log sd
    negative = 0
    for _ in range(20):
        x = torch.randn(10, D).double().requires_grad_()
        batch = x, (q := vae.encode(x)), q.sample((N,))
        negative += LEARN["bao"].gamma(*loss_and_slope("bao", vae, batch, 0.0), torch.ones(()).double(), D)[1].item() < 0
    assert 0 < negative < 20


def test_members_of_an_ensemble_have_each_their_own_gamma():
    ensemble, x = build_ensemble(2, 2, 8, [0, 1]), torch.randn(2, 20, 2)
    q = ensemble.encode(x)
    loss = LEARN["fd"](ensemble, x, q, q.sample((N,))).mean(-1)
    (slope,) = torch.autograd.grad(loss.sum(), ensemble.log_gamma, retain_graph=True)
    found = torch.stack(LEARN["fd"].gamma(loss, slope, ensemble.log_gamma.exp(), 2))
    assert found.shape == (2, 2) and found[1].tolist() == pytest.approx([2, 2], rel=1e-3) and found[0, 0] != found[0, 1]


def image_trainer(learn="swersky", gamma="stationary", **options):
    torch.manual_seed(0)
    vae = build_vae("mlp", (2, 2, 4), 2, width=8, init_sd=1.0)
    images = (torch.rand(40, 2, 2, 4, generator=torch.Generator().manual_seed(1)) * 255).byte()
    options = {"samples": 3, "inner_steps": 2} | options
    return small_runs.image_trainer(vae, images, learn=learn, gamma=gamma, batch=10, **options)


def ensemble_trainer(learn="swersky", gamma="stationary"):
    argv = ["--learn", learn, "--seeds", "2", "--batch", "50", "--hidden", "6", "--inner-steps", "1", "--samples", "3",
            "--init-sd", "1", "--lr", "1e-3", "--gamma", gamma]
    return EnsembleTrainer(train_synthetic.parse_args(argv), CPU)


both_trainers = pytest.mark.parametrize("trainer", [image_trainer, ensemble_trainer])


@both_trainers
def test_fixed_gamma_stays_and_the_decoder_trains(trainer):
    fixed = trainer(gamma="fixed")
    before = [p.clone() for p in fixed.vae.decoder.parameters()]
    run_steps(fixed, 4)
    assert (fixed.vae.log_gamma == 0).all()
    assert all(not torch.equal(p, old) for p, old in zip(fixed.vae.decoder.parameters(), before))


@both_trainers
@pytest.mark.parametrize("learn", ["elbo", "fd", "swersky", "bao"])
def test_stationary_gamma_arrives_within_some_updates(trainer, learn, monkeypatch):
    """It is where the mean slope of the loss by log gamma vanishes, while Adam's steps have moved log gamma by 0.02 at most."""
    losses, update = [], StationaryGamma.update
    monkeypatch.setattr(StationaryGamma, "update", lambda self, loss, slope: (losses.append(loss), update(self, loss, slope)))
    stationary, learned = run_steps(trainer(learn), 20), run_steps(trainer(learn, "learned"), 20)
    assert learned.vae.log_gamma.abs().max() < 0.021 and stationary.vae.log_gamma.abs().min() > 0.1
    assert torch.allclose(sum(losses), stationary.sums[1, 0].float())  # those of the decoder
    assert stationary.stationary.dim_x == (16 if trainer is image_trainer else 2)  # the pixels of both channels
    if trainer is image_trainer and not LEARN[learn].needs_b:
        shared = run_steps(trainer(learn, inner_steps=1, one_pass=True), 10).vae.log_gamma  # as many decoder updates
        assert shared.item() == pytest.approx(stationary.vae.log_gamma.item(), abs=0.1)
    expected = (stationary.stationary.means[0] / stationary.stationary.means[1]).log()
    assert torch.allclose(stationary.vae.log_gamma.detach(), expected, atol=1e-6)


@both_trainers
def test_a_resumed_run_with_stationary_gamma_equals_an_uninterrupted_one(trainer):
    first, resumed = run_steps(trainer(), 5), trainer()
    resumed.load(first.save())
    whole = run_steps(first, 5).state()
    for name, tensor in run_steps(resumed, 5).state().items():
        assert torch.equal(tensor, whole[name]), name
