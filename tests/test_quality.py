"""FID along training, and what the aggregate posterior's metrics measure."""

import numpy as np
import pytest
import torch

import evaluate
import train_images
import vsm.fid
from data import DATA_SETS, ImageData, load_images
from metrics import evaluate_images, feature_statistics, frechet_distance, mmd_null_sd, precision_recall, quantise
from models import build_vae
from training import EVALUATION, seed_of
from vsm.features import Features
from vsm.fid import Reference, aggregate_posterior, fids, mmd_nulls, reference_of, reference_set
from vsm.runs import load_arrays, load_checkpoint

SMALL = ["--width", "4", "--dim-z", "3", "--samples", "2", "--batch", "50", "--epochs", "3", "--inner-steps", "2",
         "--eval-every", "1", "--lr", "1e-3", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(digits):
    return load_images("mnist", digits).test


def train(digits, out, *argv):
    train_images.main(train_images.parse_args([*SMALL, "--data-root", str(digits), "--out", str(out), *map(str, argv)]))
    return load_arrays(out / "metrics.npz"), load_checkpoint(out / "checkpoint.pt")["trainer"]


def test_fids_along_training_change_no_weight(digits, tmp_path, no_pictures):
    plain, weights = train(digits, tmp_path / "plain")
    measured, same = train(digits, tmp_path / "measured", "--fid-every", 2)
    assert all(torch.equal(tensor, same["tensors"][name]) for name, tensor in weights["tensors"].items())
    assert all(torch.equal(one, other) for one, other in zip(weights["generators"], same["generators"]))
    new = {"fid", "fid_aggregate", "fid_reconstruction"}
    assert measured.keys() - plain.keys() == new | {"fid_features"}
    assert str(measured["fid_features"]).startswith("LeNet-5 on mnist ")
    assert all(np.array_equal(plain[name], measured[name], equal_nan=plain[name].dtype.kind == "f")
               for name in plain if name not in ("seconds", "peak_memory", "config"))
    for name in new:
        assert np.isfinite(measured[name]).tolist() == [True, False, True, False], name
    assert measured["fid"][2] != measured["fid_aggregate"][2] != measured["fid_reconstruction"][2]


@pytest.mark.parametrize("learn", ["fd", "fae"])  # fae trains in another memory format
def test_eval_npz_and_the_run_have_the_same_fids_to_the_bit(digits, tmp_path, no_pictures, monkeypatch, learn):
    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: None)
    run = tmp_path / "run"
    measured, _ = train(digits, run, "--learn", learn, "--noise", 0.4, "--fid-every", 1, "--epochs", 1)
    evaluate.main(evaluate.parse_args([str(run), "--images", "20", "--iw-samples", "2", "--device", "cpu", "--out",
                                       str(tmp_path / "out")]))
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
    network = Features(torch.nn.Flatten(), {})
    network.network.forward = lambda x: x[:, 0, ::8, ::8].flatten(1).float()
    found = []
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


def test_fid_every_is_a_multiple_of_eval_every_and_wants_features(digits, tmp_path, fails):
    assert "--fid-every 3 is not a multiple of --eval-every 2" in fails(train_images, "--eval-every", 2, "--fid-every", 3)


def test_the_three_fids_are_those_of_their_definitions(digits, images):
    """With the pixels' means as features, every FID follows from the images that the decoder makes of a known z."""
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 3, width=8)
    for layer in vae.decoder[0][::2]:
        layer.weight.data *= 3  # images that depend on z
    network = Features(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten()), {})
    network.network.forward = lambda x, forward=network.network.forward: forward(x.float() / 255)
    reference = Reference(images, network, network(images), feature_statistics(network(images)), {}, {})
    result = fids(vae, reference, 0.0, torch.Generator().manual_seed(1), block=7)

    def fid(pictures):
        return frechet_distance(*feature_statistics(network(pictures)), *reference.statistics)

    q = vae.encode(images.float() / 255)
    decoder, encoder = vae.decoder, vae.encoder
    samples = quantise(vae.decode(torch.randn(60, 3, generator=torch.Generator().manual_seed(2))))
    assert result["fid"] == pytest.approx(fid(samples).item(), rel=0.05)
    # A posterior that is a point turns the reconstruction's FID into that of the reconstructed images.
    vae.encoder = torch.nn.Sequential(encoder, Pinned())
    pinned = fids(vae, reference, 0.0, torch.Generator().manual_seed(1))
    reconstructions = (vae.decode(q.mean).clamp(0, 1) * 255).round().byte()
    assert pinned["fid_reconstruction"] == pytest.approx(fid(reconstructions).item(), rel=1e-3)
    # Where the posterior is one point, whatever x is, the aggregate posterior is that point and not the prior.
    vae.encoder = torch.nn.Sequential(encoder, Pinned(0))
    point = fids(vae, reference, 0.0, torch.Generator().manual_seed(1))
    assert point["fid_aggregate"] == pytest.approx(point["fid_reconstruction"].item(), rel=1e-6)
    assert point["fid_aggregate"] != pytest.approx(point["fid"].item(), rel=1e-5)
    # A constant decoder gives one number for every z.
    vae.encoder, vae.decoder = encoder, Constant(decoder)
    constant = fids(vae, reference, 0.1, torch.Generator().manual_seed(1))
    assert len({value.item() for value in constant.values()}) == 1


class Pinned(torch.nn.Module):
    """A posterior of standard deviation e^-30 at the encoder's mean times `scale`, plus 1 - scale."""

    def __init__(self, scale=1):
        super().__init__()
        self.scale = scale

    def forward(self, h):
        return torch.cat([self.scale * h[..., :3] + 1 - self.scale, torch.full_like(h[..., 3:], -30)], -1)


class Constant(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.inner = decoder

    def forward(self, z):
        return self.inner(0 * z)


@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_the_aggregate_posteriors_moments_are_those_of_its_samples(images, latent):
    torch.manual_seed(0)
    vae = build_vae("mlp", (1, 32, 32), 4, width=16, latent=latent)
    with torch.no_grad():
        vae.encoder[-1][-1].bias += torch.tensor([0.5, -1, 0, 2] if latent == "bernoulli" else [0.5, -1, 0, 2, -1, -0.5, -3, -1])
        vae.encoder[-1][-1].weight /= vae.encoder(images.float() / 255).std(0)[:, None]  # every latent is active
    row = evaluate_images(vae, images, 0.0, seed=3)
    generator = torch.Generator().manual_seed(4)
    x = (images.float() / 255).repeat(300, 1, 1, 1)
    with torch.no_grad():
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, 1, generator), relaxed=False)[0].double()
    torch.testing.assert_close(row["second_moment"], z.square().mean(0), rtol=0.1, atol=0.02)
    active = q.mean.double().var(0) > 0.01
    assert row["active_second_moment"] == pytest.approx(row["second_moment"][active].mean().item())
    assert row["active_units"] == active.sum()
    assert row["aggregate_histogram"].sum() == pytest.approx((z[:, active].abs() <= 4).double().mean().item(), abs=0.05)
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


def test_the_reference_of_labelled_data(digits, images):
    reference = reference_of(images, "mnist", str(digits))
    mean, covariance = reference.statistics
    assert mean.shape == (84,) and covariance.shape == (84, 84)
    assert frechet_distance(*reference.statistics, *reference.statistics) == pytest.approx(0, abs=1e-6)


class FewPixels(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return self.factor * images.flatten(1)[:, :4].float()


def test_the_floor_is_that_of_the_training_images_and_of_as_many_as_test_images(monkeypatch):
    """Data sets with the same test images, and with other training images or another network, must not share the cached floor."""
    torch.manual_seed(0)
    train, test = torch.randint(256, (60, 1, 32, 32), dtype=torch.uint8), torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8)
    for name, part, factor in (("one", train, 1), ("other", train // 2, 1), ("another", train, 2)):
        network = Features(FewPixels(factor), {"hash": f"pixels{factor}"})
        monkeypatch.setattr(vsm.fid, "features_of", lambda *_, network=network: network)
        monkeypatch.setitem(DATA_SETS, name, lambda root, part=part: ImageData(part, test, None, None, {"name": name}))
        reference = reference_set(name, "", 0, None, torch.device("cpu"))
        assert reference.floor["fid_floor"] == pytest.approx(
            frechet_distance(*feature_statistics(network(part[:40])), *feature_statistics(network(test))).item())
        closeness = precision_recall(network(test), network(part[:40]))  # precision is that of the training images
        assert {key: reference.floor[f"{key}_floor"] for key in closeness} == closeness
