"""FID, KID and MMD: closed forms, torch-fidelity's own functions on the same features, and the null law."""

import pytest
import torch

from metrics import (
    feature_distance,
    feature_statistics,
    frechet_distance,
    frechet_distance_at_infinity,
    kernel_distance,
    latent_mmd,
    mmd_null_sd,
)


def normal(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fid(features1, features2):
    return frechet_distance(*feature_statistics(features1), *feature_statistics(features2)).item()


def test_equal_covariances_give_the_squared_mean_distance():
    features, shift = normal(500, 20, 0), torch.linspace(-1, 1, 20)
    assert fid(features, features + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert fid(features, features) == pytest.approx(0, abs=1e-9)


def test_commuting_covariances_have_a_closed_form():
    basis = torch.linalg.qr(normal(6, 6, 1).double()).Q
    a, b = torch.linspace(0.1, 1, 6).double(), torch.linspace(2, 0.5, 6).double()
    distance = frechet_distance(torch.zeros(6), (basis * a) @ basis.T, torch.ones(6), (basis * b) @ basis.T)
    assert distance.item() == pytest.approx(6 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("n, d", [(400, 16), (40, 100)])
def test_fid_and_kid_agree_with_torch_fidelity(n, d):
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    from torch_fidelity import metric_fid, metric_kid
    features = normal(n, d, 0).relu(), (1.3 * normal(n + 10, d, 1) + 0.4).relu()
    theirs = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, features), verbose=False)
    assert fid(*features) == pytest.approx(theirs[fidelity.KEY_METRIC_FID], rel=1e-4)
    theirs = metric_kid.kid_features_to_metric(*features, kid_subsets=7, kid_subset_size=30, verbose=False)
    mean, sd = kernel_distance(*features, subsets=7, subset_size=30)
    assert mean.item() == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-4)
    assert sd.item() == pytest.approx(theirs[fidelity.KEY_METRIC_KID_STD], rel=1e-4)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 12, 30), (20, 12, 16), (40, 50, 10)])
def test_the_distance_of_features_is_that_of_their_statistics(n, m, d):
    features = normal(n, d, 0), 2 * normal(m, d, 1) + 0.3
    assert feature_distance(*features).item() == pytest.approx(fid(*features), rel=1e-6)


@pytest.mark.parametrize("features", [
    normal(5, 30, 1), normal(50, 1, 1) * torch.ones(30), torch.zeros(50, 30), normal(50, 30, 1, 1e6)])
def test_few_rank_one_and_collapsed_features_get_a_finite_number(features):
    for pair in ((features, normal(50, 30, 0)), (normal(50, 30, 0), features)):
        assert 0 < fid(*pair) < float("inf")
        assert torch.isfinite(torch.stack(kernel_distance(*pair, subsets=3))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_features_that_are_not_finite_raise_nothing(value):
    features = normal(50, 5, 0)
    features[3, 2] = value
    assert not 0 < fid(features, normal(50, 5, 1)) < 1e30
    kernel_distance(features, normal(50, 5, 1), subsets=2)


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_fid_at_infinity_of_gaussians_is_their_distance_whatever_the_number_of_samples(shift):
    """N(0, I) and N(shift, 1.2^2 I) in 30 dimensions: the squared distance of the means plus 0.2^2 per dimension."""
    exact, few, many = 30 * (shift**2 + 0.04), [], []
    for seed in range(8):
        for n, values in ((150, few), (600, many)):
            features = normal(n, 30, 2 * seed), 1.2 * normal(n + 5, 30, 2 * seed + 1) + shift
            values.append([fid(*features), frechet_distance_at_infinity(*features).item()])
    few, many = (torch.tensor(values).mean(0) for values in (few, many))
    assert few[0] > many[0] + 1.5 and many[0] > exact + 0.5  # the FID of finite samples is not comparable between numbers of them
    assert few[1].item() == pytest.approx(exact, abs=0.35) and many[1].item() == pytest.approx(exact, abs=0.15)


def test_fid_at_infinity_is_deterministic_and_needs_four_rows():
    features = normal(60, 5, 0), normal(50, 5, 1)
    value = frechet_distance_at_infinity(*features)
    assert value == frechet_distance_at_infinity(*features) != frechet_distance_at_infinity(*features, seed=1)
    assert value == frechet_distance_at_infinity(features[0][:50], features[1])
    assert frechet_distance_at_infinity(features[0], features[1][:4]).isfinite()
    assert frechet_distance_at_infinity(features[0], features[1][:3]).isnan()
    assert frechet_distance_at_infinity(features[0] * torch.nan, features[1]).isnan()


def test_kid_subsets_and_all_pairs_estimate_the_same():
    features = normal(300, 8, 0), 1.2 * normal(300, 8, 1)
    mean, sd = kernel_distance(*features, subsets=200, subset_size=100)
    full = latent_mmd(*features, scaled=True)
    assert abs(mean - full) < 4 * sd / 200**0.5 + 0.1 * full
    assert torch.equal(torch.stack(kernel_distance(*features)), torch.stack(kernel_distance(*features)))
    assert not torch.equal(kernel_distance(*features, subset_size=50)[0], kernel_distance(*features, subset_size=50, seed=1)[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_mmd_of_equal_laws_has_mean_zero_and_the_stated_null_sd(scaled):
    values = torch.stack([latent_mmd(normal(100, 4, 2 * i), normal(100, 4, 2 * i + 1), scaled) for i in range(400)])
    sd = mmd_null_sd(normal(4000, 4, -1), normal(4000, 4, -2), n=100, scaled=scaled)
    assert abs(values.mean()) < 4 * values.std() / 20
    assert sd == pytest.approx(values.std().item(), rel=0.25)
    assert latent_mmd(normal(100, 4, 0) + 1, normal(100, 4, 1), scaled) > 5 * sd


def test_null_sd_of_the_cubic_kernel_under_a_standard_normal():
    d, n = 10, 1000  # E kc^2 = E k^2 - 2 E h^2 + (E k)^2, h(v) = E_u k(u, v) = 1 + 3 |v|^2
    squared = 1 + 15 * d + 45 * (d**2 + 2 * d) + 15 * d * (d + 2) * (d + 4)
    centred = squared - 2 * (1 + 6 * d + 9 * (d**2 + 2 * d)) + (1 + 3 * d) ** 2
    exact = (centred * (4 / (n * (n - 1)) + 4 / n**2)) ** 0.5
    assert mmd_null_sd(normal(4000, d, 0), normal(4000, d, 1), n) == pytest.approx(exact, rel=0.05)
