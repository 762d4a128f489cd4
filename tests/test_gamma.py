"""The stationary gamma of every objective and estimator, and the update that moves log gamma to it."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from models import build_ensemble, build_vae
from objectives import ESTIMATORS, LEARN, dot, posterior_score
from vsm.cli import UserError
from vsm.gamma import DECAY, LARGEST_MOVE, StationaryGamma

CASES = [(learn, estimator) for learn, entry in LEARN.items() if entry.gamma
         for estimator in (ESTIMATORS if entry.takes("estimator") else ("plugin",))]
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
    loss = LEARN[learn](vae, *batch, **options).mean()
    return loss.detach(), torch.autograd.grad(loss, vae.log_gamma, retain_graph=True)[0]


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
    assert learn != "bao" or mean_of_ratios != pytest.approx(numerator / denominator, rel=1e-5)  # the others have D below


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
    old, new = DECAY / (1 + DECAY), 1 / (1 + DECAY)
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


@pytest.mark.parametrize("learn", [learn for learn, entry in LEARN.items() if not entry.gamma])
def test_an_objective_without_a_closed_form_is_refused(learn):
    with pytest.raises(UserError, match=f"{learn} has none"):
        StationaryGamma(learn, torch.zeros(()), D)
