"""What a run folder gives: by load_vae the model that was trained, by load_sampler laws of z that are fitted after training."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data import load_images
from metrics import evaluate_images, iw_log_likelihood, nearest_distances, precision_recall
from small_runs import REAL, ROOT, RUNS, main, real
from train_synthetic import evaluation_generator, measure
from training import EVALUATION, seed_of
from vsm import samplers
from vsm.cli import UserError
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.fid import fids, posterior_samples, reference_of, sampler_metrics
from vsm.loading import epochs_trained, export, load_vae, place_of_images
from vsm.runs import NOT_IDENTITY, load_arrays, load_checkpoint, load_config
from vsm.samplers import SAMPLERS, Gaussians, SecondVAE, load_sampler
from vsm.stored_runs import open_runs

PUBLISHED = ROOT / "results"


@pytest.mark.parametrize("name", RUNS)
def test_an_image_run_reproduces_its_last_metrics(folders, digits, name):
    vae, recorded = load_vae(folders / name), load_arrays(folders / name / "metrics.npz")
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    for key, value in evaluate_images(vae, load_images("mnist", digits).test, 0.1, seed=seed_of(0, EVALUATION)).items():
        np.testing.assert_allclose(value, recorded[key][-1], rtol=0 if name == "conv" else 1e-5, err_msg=key)
    assert epochs_trained(folders / name) == 2


def recorded(name, pack):
    """The flags of a published model and the metrics of the same run in a pack."""
    flags = load_config(PUBLISHED / "models" / name)["flags"]
    (found,) = [run for run in open_runs([PUBLISHED / pack])
                if all(run.config["flags"][key] == value for key, value in flags.items() if key not in NOT_IDENTITY)]
    return flags, found.arrays()


def test_the_published_2d_models_reproduce_their_recorded_metrics():
    vae, (flags, arrays) = load_vae(PUBLISHED / "models" / "mixture-bao"), recorded("mixture-bao", "study2d.npz")
    test = DISTRIBUTIONS[flags["data"]].sample(flags["test_size"], evaluation_generator("cpu"))
    again = measure(SimpleNamespace(vae=vae), test, 100)
    for key in ("negative_elbo", "posterior_sd", "log_gamma"):
        np.testing.assert_allclose(again[key], arrays[key][-1], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name, pack", [
    pytest.param("mnist-mlp-elbo", "study_mnist.npz", marks=real("MNIST")),
    pytest.param("mnist-conv-elbo", "study_gamma.npz", marks=[real("MNIST"), pytest.mark.slow]),
    pytest.param("celeba-conv-elbo", "study_celeba_fid.npz", marks=[real("celeba"), pytest.mark.slow])])
def test_the_published_image_models_reproduce_their_recorded_metrics(name, pack):
    vae, (flags, arrays) = load_vae(PUBLISHED / "models" / name), recorded(name, pack)
    test = load_images(flags["data"], REAL, 0, flags["test_limit"]).test
    again = evaluate_images(vae, test, flags["noise"], seed=seed_of(flags["seed"], EVALUATION))
    for key in ("negative_elbo", "reconstruction_mse", "second_moment"):
        np.testing.assert_allclose(again[key], arrays[key][-1], rtol=1e-4, err_msg=key)


def test_an_exported_model_is_the_same_and_replaces_nothing(folders, digits, tmp_path):
    export(folders / "conv", tmp_path / "copy")
    z = torch.randn(4, 3)
    assert torch.equal(load_vae(tmp_path / "copy").decode(z), load_vae(folders / "conv").decode(z))
    config = load_config(tmp_path / "copy")
    assert place_of_images("", config, SimpleNamespace(data="folder:/nowhere", data_root=None)) == ("mnist", str(digits))
    shutil.copytree(digits, tmp_path / "moved")
    moved = SimpleNamespace(data=None, data_root=str(tmp_path / "moved"))
    assert place_of_images("", config, moved) == ("mnist", moved.data_root)
    config["data"]["counts"]["train"] += 49  # which make no further minibatch
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert epochs_trained(tmp_path / "copy") == 2
    with pytest.raises(UserError, match="exists and is kept"):
        export(folders / "mlp", tmp_path / "copy")


@pytest.mark.parametrize("name", ["conv", "mlp", "resnet"])
def test_a_model_loaded_twice_decodes_the_same_in_any_batch(folders, name):
    first, second = load_vae(folders / name), load_vae(folders / name)
    with pytest.raises(UserError, match="the device cuda:99 is not available here"):
        load_vae(folders / name, "cuda:99")
    z = torch.randn(4, 3)
    whole, halves = first.decode(z), torch.cat([second.decode(z[:2]), second.decode(z[2:])])
    assert torch.equal(whole, second.decode(z))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-6)


def test_a_member_of_a_2d_run_is_that_of_the_ensemble(folders):
    ensemble, x, z = load_vae(folders / "plane"), torch.randn(7, 2), torch.randn(5, 7, 2)
    together, images = ensemble.encode(x.expand(3, 7, 2)), ensemble.decode(z[:, None].expand(5, 3, 7, 2))
    saved = load_checkpoint(folders / "plane" / "checkpoint.pt")["trainer"]["tensors"]
    assert torch.equal(ensemble.log_gamma, saved["vae.log_gamma"])
    for member in range(3):
        vae = load_vae(folders / "plane", member=member)
        q = vae.encode(x)
        torch.testing.assert_close(q.mean, together.mean[member])
        torch.testing.assert_close(q.stddev, together.stddev[member])
        torch.testing.assert_close(vae.decode(z), images[:, member])
        assert vae.log_gamma == ensemble.log_gamma[member] and vae.log_gamma.shape == ()
        assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    for member in (3, -1):
        with pytest.raises(UserError, match="there is no member"):
            load_vae(folders / "plane", member=member)


def test_the_documented_lines_run(folders):
    for vae, event in ((load_vae(folders / "conv"), (1, 32, 32)), (load_vae(folders / "plane", member=0), (2,))):
        x = vae.decode(vae.prior.sample((8,)))
        q = vae.encode(x)
        assert x.shape == vae.decode(q.mean).shape == (8, *event) and iw_log_likelihood(vae, x, 20, "posterior").shape == (8,)


def edited(folder, to, edit):
    shutil.copytree(folder, to)
    config = load_config(to)
    edit(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("edit, words", [
    (lambda config: config["flags"].update(depth=3, gain=2), "this version does not know its --depth, --gain"),
    (lambda config: config["flags"].update(dim_z="many"), "does not hold the model of its config.json .TypeError"),
    (lambda config: config["flags"].pop("norm"), "does not hold the model of its config.json .KeyError: 'norm'"),
    (lambda config: config["flags"].update(net="transformer"), "'transformer' is none of mlp, .*VSM_IMPORT"),
    (lambda config: config["flags"].update(dim_z=5), "does not hold the model of its config.json"),
    (lambda config: config.update(script="toy_inference"), "toy_inference.py, which trains no VAE"),
    (lambda config: config.pop("data"), "KeyError: 'data'")])
def test_what_does_not_fit_is_named(folders, tmp_path, edit, words):
    with pytest.raises(UserError, match=words):
        load_vae(edited(folders / "conv", tmp_path / "run", edit))


@pytest.mark.parametrize("content, words", [
    (None, "does not exist"), *((content, "does not hold the model of its config.json") for content in (
        {}, {"trainer": None}, {"trainer": {"tensors": {"vae.log_gamma": 1.0}}}, {"trainer": {"tensors": {}}}))])
def test_a_checkpoint_of_another_form_is_named(folders, tmp_path, content, words):
    run = shutil.copytree(folders / "mlp", tmp_path / "run")
    (run / "checkpoint.pt").unlink()
    if content is not None:
        torch.save(content, run / "checkpoint.pt")
    with pytest.raises(UserError, match=words):
        load_vae(run)


def test_another_checkpoint_of_the_folder_and_a_member_of_an_image_run(folders, tmp_path):
    run = shutil.copytree(folders / "mlp", tmp_path / "run")
    (run / "checkpoint.pt").rename(run / "epoch2.pt")
    z = torch.randn(3, 3)
    assert torch.equal(load_vae(run, checkpoint="epoch2.pt").decode(z), load_vae(folders / "mlp").decode(z))
    with pytest.raises(UserError, match="leave out member 0"):
        load_vae(folders / "mlp", member=0)
    with pytest.raises(UserError, match="is not a run folder"):
        load_vae(tmp_path)


FITTED = SAMPLERS[1:]
MODEL = ROOT / "results" / "models" / "mnist-mlp-elbo"
QUICK = ["--images", 20, "--iw-samples", 5, "--device", "cpu"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "UPDATES", 16)
    return shutil.copytree(folders / "mlp", tmp_path / "run")


def limited(run, **flags):
    """The folder of a run whose config says that it had these flags."""
    config = load_config(run)
    (run / "config.json").write_text(json.dumps(config | {"flags": config["flags"] | flags}))
    return run


def clusters(n=4000):
    """Two Gaussian clusters, three quarters of the z [n, 2] around (-2, -2) and the others around (2, 2)."""
    root = torch.tensor([[0.8, 0.0], [0.4, 0.6]])
    which = (torch.rand(n, generator=generator(1)) < 0.25).float()[:, None]
    return 4 * which - 2 + torch.randn(n, 2, generator=generator(2)) @ root.T


def test_gaussians_draw_the_moments_of_their_components():
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[5.0, 0.0], [-5.0, 1.0]])
    roots = torch.tensor([[[1.0, 0.0], [2.0, 0.5]], [[0.1, 0.0], [0.0, 3.0]]])
    z = Gaussians(weights, means, roots).sample(40_000, generator())
    for k, part in enumerate((z[z[:, 0] > 0], z[z[:, 0] < 0])):
        assert abs(len(part) / 40_000 - weights[k]) < 0.01 and torch.allclose(part.mean(0), means[k], atol=0.1)
        assert torch.allclose(part.T.cov(), roots[k] @ roots[k].T, atol=0.2)


def test_one_gaussian_has_the_moments_of_the_latents_and_two_find_the_clusters():
    z = clusters()
    one = Gaussians(**{key: torch.as_tensor(value).float() for key, value in Gaussians.fit(z, 0, 1).items()})
    assert torch.allclose(one.means[0], z.mean(0), atol=1e-4)
    assert torch.allclose(one.roots[0] @ one.roots[0].T, z.T.cov(correction=0), atol=1e-3)
    two = Gaussians.fit(z, 0, 2)
    assert sorted(two["weights"].round(2)) == pytest.approx([0.25, 0.75], abs=0.03)
    assert sorted(two["means"][:, 0]) == pytest.approx([-2, 2], abs=0.15)


def test_a_second_vae_learns_that_latents_depend_on_each_other(monkeypatch):
    for key, value in {"UPDATES": 500, "WIDTH": 64, "RATE": 4e-3}.items():
        monkeypatch.setattr(samplers, key, value)
    z = clusters()
    z = (z - z.mean(0)) / z.std(0)
    drawn = SecondVAE(**SecondVAE.fit(z, 0, 1)).sample(4000, generator())
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.1) and torch.allclose(drawn.std(0), z.std(0), atol=0.15)
    assert drawn.T.corrcoef()[0, 1] > 0.55  # 0.93 in the data


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_the_same_latents_for_a_seed(run, name):
    sampler = load_sampler(run, name)
    z = sampler.sample(50, generator(3))
    assert z.shape == (50, 3) and torch.equal(z, sampler.sample(50, generator(3)))
    assert torch.equal(z, load_sampler(run, name).sample(50, generator(3))) and load_vae(run).decode(z).shape == (50, 1, 32, 32)


@pytest.mark.parametrize("name", FITTED)
def test_a_law_is_kept_as_plain_arrays_until_the_checkpoint_changes(run, name, monkeypatch):
    load_sampler(run, name, components=2)
    path = run / f"sampler-{name}.npz"
    before = load_arrays(path)
    assert all(value.dtype.kind == "f" for key, value in before.items() if key != "config")
    with monkeypatch.context() as patch:
        patch.setattr(samplers, "fit_sampler", None)  # it is not called
        load_sampler(run, name)
    path.unlink()
    load_sampler(run, name, components=2)
    assert all((load_arrays(path)[key] == value).all() for key, value in before.items() if key != "config")
    vae_file = torch.load(run / "checkpoint.pt", weights_only=True)
    vae_file["trainer"]["tensors"]["vae.encoder.1.0.bias"] += 1
    torch.save(vae_file, run / "checkpoint.pt")
    load_sampler(run, name)
    assert load_arrays(path)["config"]["checkpoint"] != before["config"]["checkpoint"]
    assert load_arrays(path)["config"]["components"] == before["config"]["components"]
    path.write_bytes(b"damaged")
    load_sampler(run, name)
    assert load_arrays(path)["config"]["sampler"] == name


def test_a_fitted_gaussian_has_the_moments_of_posterior_samples(run, digits):
    z, *_ = posterior_samples(load_vae(run), load_images("mnist", digits).train, 0.1, generator(5))
    drawn = load_sampler(run, "gaussian").sample(20_000, generator())
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=4 * (z.std(0) / 300**0.5).max())
    assert torch.allclose(drawn.T.cov(), z.T.cov(), rtol=0.35, atol=0.1)


def test_a_sampler_is_fitted_to_the_images_of_its_run_with_its_noise(run, digits, monkeypatch):
    seen, seed, images = [], seed_of(3, samplers.STREAM), load_images("mnist", digits).train
    monkeypatch.setattr(samplers, "IMAGES", 50)
    monkeypatch.setattr(samplers, "posterior_samples", lambda vae, *of: seen.append(of) or [torch.randn(len(of[0]), 3)])
    monkeypatch.setattr(Gaussians, "fit", lambda z, seed, components: seen.append((len(z), seed, components)) or {
        "weights": [1.0], "means": torch.zeros(1, 3), "roots": torch.eye(3)[None]})
    load_sampler(limited(run, limit=200, noise=0.4, seed=3), "mixture", components=7)
    assert torch.equal(seen[0][0], images[torch.randperm(200, generator=generator(seed))[:50]])
    assert seen[0][1] == 0.4 and seen[0][2].initial_seed() == seed and seen[1] == (50, seed, 7)


def test_the_number_of_components_is_that_of_the_file_unless_another_is_asked_for(run):
    for asked, found in ((3, 3), (None, 3), (2, 2)):
        assert load_sampler(run, "mixture", components=asked).law.weights.shape == (found,)
    for wrong in ({"components": 0}, {"fits": 0}, {"components": 2.5}):
        with pytest.raises(UserError, match="whole numbers of at least 1"):
            load_sampler(run, "mixture", **wrong)
    published = load_sampler(MODEL, data_root="/nowhere")
    assert load_vae(MODEL).decode(published.sample(4, generator())).shape == (4, 1, 32, 32)


def test_the_likeliest_of_several_fits_is_kept_and_their_number_is_that_of_the_file_unless_another_is_asked_for(run):
    z = torch.cat([torch.randn(60, 2, generator=generator(i)) / 5 + 3 * torch.tensor([i % 3, i // 3]) for i in range(6)])

    def likelihood(fits, seed):
        law = {key: torch.as_tensor(value).float() for key, value in Gaussians.fit(z, seed, 6, fits).items()}
        normal = torch.distributions.MultivariateNormal(law["means"], scale_tril=law["roots"])
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(law["weights"]), normal).log_prob(z).mean()

    assert min(likelihood(8, seed) for seed in range(4)) >= max(likelihood(1, seed) for seed in range(4)) - 0.01
    for asked, found in ((2, {"components": 3, "fits": 2}), (None, {"components": 3, "fits": 2}), (1, {"components": 3})):
        load_sampler(run, "mixture", components=3, fits=asked)
        config = load_arrays(run / "sampler-mixture.npz")["config"]
        assert {key: config[key] for key in config if key in ("components", "fits")} == found


@pytest.mark.parametrize("folder, name, words", [
    ("bernoulli", "mixture", "have the prior only"), ("plane", "gaussian", "no run of train_images.py"),
    ("mlp", "flow", "choose one of prior, gaussian")])
def test_what_has_no_sampler_is_refused(folders, folder, name, words):
    with pytest.raises(UserError, match=words):
        load_sampler(folders / folder, name)


def test_too_few_images_and_latents_that_are_not_finite_are_named(run):
    with pytest.raises(UserError, match="300 training images are too few"):
        load_sampler(run, "mixture", components=301)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["trainer"]["tensors"]["vae.encoder.1.0.bias"] += torch.nan
    torch.save(saved, run / "checkpoint.pt")
    with pytest.raises(UserError, match="not finite"):
        load_sampler(run, "gaussian")


def test_evaluate_measures_every_sampler(run, cache, tmp_path, capsys):
    argv = [run, *QUICK, "--out", tmp_path / "out"]
    main(evaluate, *argv)
    alone = load_arrays(run / "eval.npz")
    main(evaluate, *argv, "--sampler", *FITTED, "--components", 3, pictures=True)
    arrays, table = load_arrays(run / "eval.npz"), load_arrays(tmp_path / "out" / "table.npz")
    for key, value in alone.items():  # further samplers change no number of the prior
        assert key == "config" or (arrays[key] == value).all(), key
    endings = "", "_gaussian", "_mixture", "_two_stage"
    for ending in endings:
        for key in ("fid", "kid", "kid_full", "precision", "recall", "density", "coverage", "nearest"):
            assert np.isfinite(arrays[f"{key}{ending}"])
        assert table[f"fid{ending}_mean"][0] == arrays[f"fid{ending}"]
        assert table[f"kid_x1000{ending}_mean"][0] == pytest.approx(1000 * arrays[f"kid{ending}"])
    assert len({float(arrays[f"fid{ending}"]) for ending in endings}) == 4
    assert arrays["samples_mixture"].shape == (60, 1, 32, 32) and load_sampler(run).law.weights.shape == (3,)
    assert 0.5 < arrays["precision_floor"] <= 1
    assert {f"samples{ending}.png" for ending in endings} <= {file.name for file in (tmp_path / "out").iterdir()}
    text = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} " in text for name in ("prior", "gaussian", "mixture of 3", "two-stage", "training images"))
    assert text in capsys.readouterr().out
    main(evaluate, *argv)  # it measures nothing again, and loses nothing
    assert "evaluated before" in capsys.readouterr().out and "fid_two_stage" in load_arrays(run / "eval.npz")
    main(evaluate, *argv, "--draws", 2, "--fits", 2)
    arrays, text = load_arrays(run / "eval.npz"), (tmp_path / "out" / "table.md").read_text()
    assert arrays["fid_mixture"] == arrays["fid_draws_mixture"].mean() and arrays["fid_draws"].shape == (2,) and "draws" in text
    assert "| mixture of 3, best of 2 fits |" in text


def test_bernoulli_latents_have_their_prior_and_evaluate_names_them(folders, cache, tmp_path, monkeypatch, capsys):
    assert set(load_sampler(folders / "bernoulli", "prior").sample(100, generator()).unique().tolist()) == {0.0, 1.0}
    limited(shutil.copytree(folders / "bernoulli", tmp_path / "run"), limit=200)
    trained_on = []
    monkeypatch.setattr(evaluate, "sampler_metrics", lambda vae, samplers, reference, train, *rest: (
        trained_on.append(len(train)), sampler_metrics(vae, samplers, reference, train, *rest))[1])
    main(evaluate, tmp_path / "run", *QUICK, "--out", tmp_path / "out", "--sampler", "prior", "mixture")
    assert "its latents are 0 or 1, which mixture cannot be fitted to" in capsys.readouterr().err
    assert trained_on == [200]  # `nearest` is among the images of the training
    assert "precision" in (arrays := load_arrays(tmp_path / "run" / "eval.npz")) and "fid_mixture" not in arrays


def test_nearest_distances_do_not_depend_on_blocks():
    u, v = torch.randn(7, 2, 3, generator=generator()), torch.randn(11, 2, 3, generator=generator(1))
    exact = (u.flatten(1).double()[:, None] - v.flatten(1).double()).norm(dim=-1).sort(1).values
    for k, block in itertools.product((1, 4), (2, 5, 100)):
        assert torch.allclose(nearest_distances(u, v, k, block), exact[:, k - 1])
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    assert nearest_distances(images, images.flip(0)).eq(0).all()


def test_precision_and_recall_on_a_line():
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0], [2.5], [9.5]])
    # k = 1. Real balls: (-1, 1), (0, 2), (1, 5). Fake balls: (-1.5, 2.5), (8.5, 9.5), (0.5, 4.5), (9, 10).
    measured = {key: value.item() for key, value in precision_recall(real, fake, k=1, block=3).items()}
    assert measured == {"precision": 0.5, "recall": 1.0, "density": 0.75, "coverage": 1.0}


def test_density_has_mean_one_for_equal_laws_blocks_change_nothing_and_few_rows_have_a_smaller_k():
    u, v = (torch.randn(1500, 3, generator=generator(seed)) for seed in (1, 2))
    measured, again = precision_recall(u, v), precision_recall(u, v, block=64)
    assert measured["density"] == pytest.approx(1, abs=0.05) and measured == again
    assert precision_recall(u[:4], v[:3]) == precision_recall(u[:4], v[:3], k=2)


@pytest.mark.slow
@real("MNIST")
def test_the_published_model_has_the_fid_that_readme_and_results_give_for_each_sampler():
    vae, data = load_vae(MODEL), load_images("mnist", REAL, 2000, 2000)
    reference = reference_of(data.test, "mnist", REAL)
    found = fids(vae, reference, 0.1, generator()) | sampler_metrics(
        vae, {"mixture": load_sampler(MODEL, "mixture")}, reference, data.train, 0)
    assert found["fid"] == pytest.approx(15.3, abs=1) and found["fid_mixture"] == pytest.approx(3.3, abs=0.5)
