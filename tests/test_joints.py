"""Numbers of whole runs, computed again in a few lines: what each script passes on to the modules that it joins."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import param_recovery
import train_images
import train_synthetic
from data import load_images
from metrics import importance, negative_elbo, posterior_fd, quantise
from models import NORMS
from objectives import LEARN, dot
from param_recovery import RULES, joint_fd, joint_kld, recover
from small_runs import CPU, IMAGES, SMALL, main, train, train_on
from studies import gradient_snr
from training import EVALUATION, seed_of
from vsm import fid, samplers
from vsm.cache import digest
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.fid import Reference, sampler_metrics
from vsm.image_table import Measured, bounds_of, reference_note, references_of, row_of, samplers_table, table_of
from vsm.loading import epochs_trained, load_vae, vae_of
from vsm.runs import load_arrays


def generator_of(*key):
    return torch.Generator().manual_seed(seed_of(*key))


def test_the_numbers_of_a_2d_run_are_those_of_its_members(tmp_path):
    """Three members, seeds 4 to 6; test data, posterior and prior samples are the same in every run."""
    arrays = train(tmp_path / "run", "--seed", 4, "--seeds", 3, "--test-size", 600, "--importance-samples", 3000,
                   "--data", "ring", "--init-sd", 0.5, "--lr", 0.01, "--steps-per-epoch", 10)
    law, generator = DISTRIBUTIONS["ring"], generator_of(0, EVALUATION)
    test, vae = law.sample(600, generator_of(0, EVALUATION)), load_vae(tmp_path / "run")
    x, exact = test.expand(3, -1, -1), test.double()
    prior = importance(vae, x, 3000, generator=generator)
    posterior = importance(vae, x, 30, "posterior", generator, chunk=8)
    nll, gap = -prior.log_likelihood, law.score(exact) - prior.score
    per_datum = {"nll": nll, "nll_posterior": -posterior.log_likelihood, "sm_loss": prior.score_matching_loss,
                 "fisher_divergence": dot(gap, gap) / 2, "nll_excess": nll + law.log_prob(exact),
                 "sm_excess": prior.score_matching_loss - law.score_matching_loss(exact)}
    expected = {name: value.mean(1) for name, value in per_datum.items()}
    expected |= {f"{name}_se": value.std(1) / 600**0.5 for name, value in per_datum.items()}
    z, noise = (torch.randn(1000, 2, generator=generator) for _ in range(2))
    expected["model_samples"] = vae.decode(z.expand(3, -1, -1)) + (vae.log_gamma / 2).exp()[:, None, None] * noise
    expected |= {"test_data": test, "ess": np.quantile(prior.ess, [0, 0.01, 0.5], axis=1).T}
    generator, last = generator_of(0, EVALUATION), arrays["epoch"].argmax()
    along = {name: metric(vae, x, 5, generator).mean(1)
             for name, metric in (("negative_elbo", negative_elbo), ("posterior_fd", posterior_fd))}
    along["nll_curve"] = -importance(vae, x[:, :500], 750, generator=generator).log_likelihood.mean(1)
    along |= {"posterior_sd": vae.encode(x).stddev.mean(1), "log_gamma": vae.log_gamma}
    for name, value in (expected | along).items():
        found = arrays[name][last] if name in along else arrays[name]
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("words, label", [
    ("--learn swersky --samples 1 --infer-samples 2", "KLD-S=F"), ("--learn swersky --samples 2 --infer-samples 1", "KLD-S"),
    ("--learn swersky --samples 2 --estimator unbiased", "KLD-S"), ("--learn swersky --samples 1 --estimator released", "KLD-S"),
    ("--learn bao --infer fd", "FD-B")])
def test_the_label_is_of_the_decoders_samples_and_estimator(digits, capsys, monkeypatch, words, label):
    for script, usual in ((train_images, [*IMAGES, "--data-root", digits]), (train_synthetic, SMALL)):
        monkeypatch.setattr(script, "Run", None)  # so that it ends after it has said what it would train
        with pytest.raises(TypeError):
            main(script, *usual, *words.split())
        assert capsys.readouterr().out.startswith(f"{label} on ")


@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_the_pictures_of_a_run_are_of_its_model_in_eval_mode_with_its_noise(digits, tmp_path, latent):
    """A ConvNet of two epochs: in training mode, batch norm would give other pictures."""
    run = tmp_path / "run"
    arrays = train_on(digits, run, "--net", "conv", "--latent", latent, "--noise", 0.4, "--seed", 2, "--epochs", 2, "--lr", 0.1)
    vae, clean, generator = load_vae(run), load_images("mnist", digits).test / 255, generator_of(2, EVALUATION)
    x = clean + 0.4 * torch.randn(clean.shape, generator=generator)
    draw = torch.randn if latent == "gaussian" else torch.rand
    z = draw(64, 3, generator=generator)
    z = z if latent == "gaussian" else (z > 0.5).float()
    expected = {"inputs": x, "samples": vae.decode(z), "reconstructions": vae.decode(vae.encode(x).mean)}
    for name, images in expected.items():
        assert arrays[name].shape[0] == (64 if name == "samples" else 60)
        np.testing.assert_allclose(arrays[name].astype(int), quantise(images).int(), atol=1, err_msg=name)
    assert np.ptp(arrays["reconstructions"].astype(int), axis=0).max() > 5  # they differ


MODELS = [  # flags of a model, and what the built model says of them
    ({"temperature": 0.3}, lambda vae: vae.temperature == 0.3), ({"precision": "bf16"}, lambda vae: vae.bf16),
    ({"precision": "tf32"}, lambda vae: not vae.bf16), ({"latent": "bernoulli"}, lambda vae: vae.latent == "bernoulli"),
    ({"init_sd": 0.3}, lambda vae: vae.log_gamma.item() == pytest.approx(2 * math.log(0.3))),
    ({"width": 5}, lambda vae: vae.encoder[0].out_channels == 5), ({"dim_z": 7}, lambda vae: vae.dim_z == 7),
    ({"net": "resnet"}, lambda vae: len(vae.encoder) == 14), ({"net": "mlp"}, lambda vae: len(vae.encoder) == 2),
    *(({"norm": norm}, lambda vae, norm=norm: isinstance(vae.encoder[4], type(NORMS[norm](8)))) for norm in NORMS)]


@pytest.mark.parametrize("flags, holds", MODELS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_the_model_is_that_of_its_flags(flags, holds):
    usual = {"net": "conv", "dim_z": 3, "width": 4, "norm": "batch", "latent": "gaussian", "temperature": 0.5, "init_sd": 1.0,
             "precision": "float32"}
    vae = vae_of(usual | flags, (3, 32, 32))
    assert holds(vae) and vae.decode(torch.zeros(2, vae.dim_z)).shape == (2, 3, 32, 32)


@pytest.mark.usefixtures("cache")
def test_an_evaluation_names_all_that_it_depends_on(digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(evaluate, "fids", lambda *_, **__: {"fid": torch.tensor(1.0)})
    monkeypatch.setattr(evaluate, "sampler_metrics", lambda *_: {})
    train_on(digits, run, "--limit", 200, "--test-limit", 40, "--epochs", 1)
    words = ["--images", 20, "--iw-samples", 5, "--sampler", "mixture", "--device", "cpu", "--out", tmp_path / "out"]
    for components in (2, 3):  # the second evaluation is of another law
        main(evaluate, run, *words, "--components", components)
        settings = load_arrays(run / "eval.npz")["config"]["evaluation"]
        features, test = settings.pop("features"), load_images("mnist", digits, 0, 40).test
        checkpoint = hashlib.sha256((run / "checkpoint.pt").read_bytes()).hexdigest()
        assert settings == {"checkpoint": checkpoint[:12], "images": 20, "iw_samples": 5, "samplers": ["prior", "mixture"],
                            "components": components, "draws": 1, "data": "mnist", "test_images": 40, "digest": digest(test)}
        assert features["name"] == "LeNet-5 on mnist"
        assert len(load_arrays(run / "sampler-mixture.npz")["weights"]) == components


def test_the_distances_of_features_are_those_of_their_definitions():
    one, other = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).double() for n in (30, 20))
    other += 1

    def mean_kernel(u, v):
        K = (u @ v.T / 6 + 1) ** 3
        return K.mean() if u is not v else (K.sum() - K.trace()) / (len(u) * (len(u) - 1))
    found = fid.distances(one, other)
    expected = mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other)
    assert found["kid_full"] == pytest.approx(expected.item())
    assert found["precision"] != found["recall"]


def test_nearest_is_of_the_first_images_alone_and_samples_are_the_first_of_a_sampler(monkeypatch):
    """Of 40 images the first 6 are copies of training images, and `nearest` is of 10; it is 1 where they are test images."""
    monkeypatch.setattr(fid, "NEIGHBOURS", 10)
    images = torch.randint(256, (80, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = torch.cat([images[:6], 255 - images[6:40], images[40:]])
    vae = torch.nn.Module()
    vae.decode = lambda z: made[z[:, 0].long()] / 255
    copies, tests = (SimpleNamespace(sample=lambda n, generator, first=first: first + torch.arange(n)[:, None])
                     for first in (0, 40))
    reference = Reference(images[40:], lambda part: part.flatten(1) / 255, images[40:].flatten(1) / 255, None, {}, {})
    found = sampler_metrics(vae, {"prior": tests, "two-stage": copies}, reference, images[:40], 0, shown=3)
    distances = fid.distances(made[:40].flatten(1) / 255, reference.features)
    assert {key: found[f"{key}_two_stage"] for key in distances} == distances and distances["precision"] != distances["recall"]
    assert found["nearest"] == 1 and found["nearest_two_stage"] == 0
    assert torch.equal(found["samples_two_stage"], made[:3]) and "samples" not in found


def test_the_distances_of_several_draws_are_means_over_them_and_of_each_sampler_alone(monkeypatch):
    images = torch.randint(256, (80, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = torch.nn.Module()
    vae.decode = lambda z: images[z[:, 0].long()] / 255
    some = SimpleNamespace(sample=lambda n, generator: torch.randint(80, (n, 1), generator=generator))
    reference = Reference(images[40:], lambda part: part.flatten(1) / 255, images[40:].flatten(1) / 255, None, {}, {})
    one, three, both = (sampler_metrics(vae, samplers, reference, images[:40], 0, draws) for draws, samplers in (
        (1, {"prior": some, "mixture": some}), (3, {"mixture": some}), (3, {"prior": some, "mixture": some})))
    generator = torch.Generator().manual_seed(0)
    drawn = [images[some.sample(40, generator)[:, 0]] for _ in range(3)]
    each = [fid.distances(part.flatten(1) / 255, reference.features) for part in drawn]
    for key in each[0]:
        assert three[f"{key}_mixture"] == both[key] == pytest.approx(sum(one[key].item() for one in each) / 3)
        assert one[f"{key}_mixture"] == each[0][key] and key not in one
    assert three["fid_draws_mixture"].tolist() == [one["fid"].item() for one in each]
    assert torch.equal(three["samples_mixture"], drawn[0]) and three["nearest_mixture"] == one["nearest_mixture"]


def test_a_figure_of_another_sampler_has_its_samples_and_a_run_its_new_label():
    run = SimpleNamespace(name="run", config={}, arrays=lambda part: {"samples": "prior", "epoch": 1, "config": {}})
    shown = evaluate.with_changes(run, {"label": "new"}, samples="mixture")
    assert shown.arrays() == {"samples": "mixture", "epoch": 1, "config": {"label": "new"}} and shown.config == {"label": "new"}


KEYS = ("fid", "fid_infinite", "kid", "precision", "recall", "density", "coverage")


def measured_with(features="LeNet", seed=0, scale=1.0):
    """A run whose every number differs from every other."""
    numbers = {f"{key}{ending}": scale * (start + i) for ending, start in (("", 3), ("_mixture", 103), ("_floor", 0.1))
               for i, key in enumerate(KEYS)}
    numbers |= {"fid_aggregate": 41 * scale, "fid_reconstruction": 42 * scale, "nearest": 0.5, "nearest_mixture": 0.25,
                "negative_iw_bound": np.array([59.0, 52.0]) * scale, "latent_mmd_null_sd": 0.5}
    curves = "negative_elbo", "reconstruction_mse", "latent_mmd", "posterior_fd", "active_second_moment"
    last = {key: scale * (61 + i) for i, key in enumerate(curves)}
    settings = {"data": "mnist", "test_images": 40, "images": 500, "iw_samples": 5, "digest": "d",
                "features": {"name": features, "hash": "h", "accuracy": 0.5}}
    flags = {"data": "mnist", "net": "conv", "latent": "gaussian", "dim_z": 3, "seed": seed}
    run = SimpleNamespace(name=f"run{seed}", config={"flags": flags, "label": "KLD-F"})
    return Measured(run, "ok", last, numbers | {"config": {"evaluation": settings}})


def test_every_column_of_the_tables_shows_its_own_number():
    members = [measured_with(seed=0), measured_with(seed=1, scale=3.0)]
    row = row_of("KLD-F", "", members)
    shown = {"fid": 3, "fid_infinite": 4, "kid_x1000": 5000, "fid_aggregate": 41, "fid_reconstruction": 42, "negative_elbo": 61,
             "negative_iw_bound": 52, "reconstruction_mse": 62, "latent_mmd": 63, "posterior_fd": 64, "active_second_moment": 65,
             "precision": 6, "recall": 7, "density": 8, "coverage": 9, "fid_mixture": 103, "kid_x1000_mixture": 105_000,
             "coverage_mixture": 109}
    for key, value in shown.items():  # the mean of v and 3 v is 2 v, and its standard error v
        assert (row[f"{key}_mean"], row[f"{key}_ci95"]) == pytest.approx((2 * value, 12.7062 * value), rel=1e-5), key
    floor = {key: value for key, value in members[0].evaluation.items() if key.endswith("_floor")}
    settings = members[0].evaluation["config"]["evaluation"]
    references = [{"settings": settings, "floor": floor, "null_sd": {"3 gaussian latents": [0.5]}, "draws": {1, 10},
                   "bounds": {(5, 500)}}]
    lines = table_of([row], references).splitlines()
    header, _, first, last = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = dict(zip(header, first))
    titles = {"FID": 3, "FID, infinite n": 4, "KID x1000": 5000, "FID, aggregate": 41, "FID, posterior": 42, "-ELBO": 61,
              "-IW bound": 52, "MSE": 62, "MMD^2": 63, "posterior FD": 64, "E z^2": 65}

    def text(value):
        return f"{2 * value} ± {12.7062 * value:.0f}"

    assert {title: found[title] for title in titles} == {title: text(value) for title, value in titles.items()}
    assert found["n"] == "2"
    floors = [cell for cell in last if cell.strip()]
    assert floors == ["mnist", "floor: 40 training images", "LeNet", "0.1", "1.1", "2100"]
    prior, mixture, training = ([cell.strip() for cell in line.split("|")[5:-1]]
                                for line in samplers_table([row], references)[0].splitlines()[2:])
    assert prior[:7] == [text(value) for value in (3, 4, 5000, 6, 7, 8, 9)]
    assert mixture[0] == text(103) and mixture[2] == text(105_000) and mixture[-1] == "0.25 ± 0"
    assert training[:7] == ["0.1", "1.1", "2100", "3.1", "4.1", "5.1", "6.1"]
    note = reference_note(references[0])
    assert all(words in note for words in ("first 40 test images", "100 subsets of 40", "N = 40", "over 1 or 10 draws"))


def test_numbers_of_features_that_differ_are_in_no_mean():
    row = row_of("KLD-F", "", [measured_with(), measured_with("EfficientNet", seed=1)])
    lost = {key.removesuffix("_mean") for key, value in row.items() if key.endswith("_mean") and np.isnan(value)}
    by_features = {f"{key}{ending}" for key in ("fid", "fid_infinite", "kid_x1000", *KEYS[3:]) for ending in ("", "_mixture")}
    assert by_features | {"fid_aggregate", "fid_reconstruction"} <= lost and not {"negative_elbo", "nearest"} & lost
    assert row["features"] == "EfficientNet, LeNet" and row["n"] == 2
    fewer = measured_with(seed=1)
    fewer.evaluation["config"]["evaluation"]["iw_samples"] = 1
    assert np.isnan(row_of("KLD-F", "", [fewer], {"mnist"})["negative_iw_bound_mean"])
    assert bounds_of([fewer, measured_with()]) == {(1, 500), (5, 500)}
    (reference,) = references_of([fewer, measured_with()])
    assert "or 5 samples from q, first 40 test images, which do not compare, so none is shown" in reference_note(reference)


@pytest.mark.parametrize("name", ["mixture", "two-stage"])
def test_the_seed_of_a_law_changes_its_fit(name, monkeypatch):
    monkeypatch.setattr(samplers, "UPDATES", 8)
    trainer, seeds = samplers.LatentTrainer, []
    monkeypatch.setattr(samplers, "LatentTrainer",
                        lambda *of, **options: seeds.append(options["seed"]) or trainer(*of, **options))
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    fits = [samplers.LAWS[name].fit(z, seed, 4) for seed in (1, 1, 2)]
    first, again, other = (torch.as_tensor(fit["means" if name == "mixture" else "encoder.1.0.weight"]) for fit in fits)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert seeds == ([] if name == "mixture" else [1, 1, 2])


def test_samples_of_a_second_vae_have_the_noise_of_its_decoder():
    vae = samplers.build_vae("mlp", (2,), 2, samplers.WIDTH, init_sd=0.1)
    for p in vae.decoder.parameters():
        p.data.zero_()
    z = samplers.SecondVAE(**vae.state_dict()).sample(4000, torch.Generator().manual_seed(0))
    assert z.std(0) == pytest.approx([0.1, 0.1], rel=0.05)


FLAGS = {"batch": 7, "noise": 0.3, "seed": 4}


@pytest.mark.parametrize("learn", LEARN)
def test_the_measured_gradient_is_that_of_the_decoders_loss_on_a_minibatch_of_the_run(linear, learn):
    """By the objective itself, at noise and draws in the order of the docstrings."""
    vae, estimator = linear.vae.float(), "unbiased"
    images = torch.randint(256, (30, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    theta, generator = [*vae.decoder.parameters(), vae.log_gamma], torch.Generator().manual_seed(2)
    found = gradient_snr.minibatch_gradient(vae, theta, images, FLAGS, learn, estimator, 3, torch.Generator().manual_seed(2))
    rows = torch.randint(30, (7,), generator=generator)
    noise = torch.randn(7, 4, generator=generator)
    x = (images[rows] / 255 + 0.3 * noise).requires_grad_()
    q = vae.encode(x)
    z = q.mean + q.stddev * torch.randn(3, 7, 3, generator=generator)
    options = {"estimator": estimator} if LEARN[learn].takes("estimator") else {}
    loss = LEARN[learn](vae, x, q, z if LEARN[learn].joint else z.detach(), **options,
                        **({"t": -noise / 0.3} if LEARN[learn].takes("t") else {}))
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), theta)])
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def unbiased_moments(g):
    """||E g||^2 and tr Var(g) from draws g [n, P]: of the decoder's weights, and of log_gamma, the last component."""
    variance = torch.stack([g[:, :-1].var(0).sum(), g[:, -1].var()])
    return torch.stack([g[:, :-1].mean(0).square().sum(), g[:, -1].mean() ** 2]) - variance / len(g), variance


def test_a_signal_to_noise_ratio_is_of_the_gradients_of_its_pair_from_the_seed_of_its_run(linear, monkeypatch):
    """Its error is the jackknife's, which leaves out one of four draws."""
    monkeypatch.setattr(gradient_snr, "SAMPLES", (1, 2))
    vae, images, found = linear.vae.float(), torch.randint(256, (30, 4), dtype=torch.uint8), []
    arrays = gradient_snr.measure_gradient_snr(vae, images, FLAGS, 4)
    for row, learn in enumerate(("elbo", "fd")):
        generator, copy = generator_of(4, EVALUATION, row, 2), gradient_snr.differentiable_decoder(vae, "eval")
        theta = [*copy.decoder.parameters(), copy.log_gamma]
        g = torch.stack([gradient_snr.minibatch_gradient(copy, theta, images, FLAGS, learn, "plugin", 2, generator)
                         for _ in range(4)])
        signal, variance = unbiased_moments(g)
        found.append((g.mean(0)[:-1], signal[0]))
        others = [unbiased_moments(g[torch.arange(4) != i]) for i in range(4)]
        errors = torch.stack([one / other for one, other in others]).std(0, correction=0) * 3**0.5
        for key, values in (("", signal / variance), ("_se", errors)):
            assert arrays[f"snr{key}"][row, 1] == pytest.approx(values[0].item(), rel=1e-3)
            assert arrays[f"snr_log_gamma{key}"][row, 1] == pytest.approx(values[1].item(), rel=1e-3)
    (elbo, of_elbo), (fd, of_fd) = found
    cosine = (elbo @ fd / (of_elbo * of_fd).sqrt()).item()
    assert arrays["cosine_to_elbo"][1, 1] == pytest.approx(cosine, rel=1e-4, nan_ok=True)


def test_a_measurement_is_of_the_training_images_of_its_run(digits, tmp_path):
    run, seen = tmp_path / "run", []
    train_on(digits, run, "--limit", 200, "--epochs", 1)
    args = SimpleNamespace(runs=[run], device="cpu", data=None, data_root=None)

    def measure(run, vae, images, flags):
        seen.append(images)
        return {"ones": np.ones(1)}

    gradient_snr.measure_models(args, "mine", {"draws": 2}, measure)
    assert torch.equal(seen[0], load_images("mnist", digits).train[:200]) and epochs_trained(run) == 1
    assert load_arrays(run / "mine.npz")["config"]["evaluation"] == {"draws": 2}


def test_the_figures_of_the_recovery_are_at_the_values_of_their_flags():
    argv = "--points 4 --gamma 0.5 --alpha 2 --w-star 0.7 --w-star-max 2 --alphas 0.5 2"
    arrays = param_recovery.closed_forms(param_recovery.parse_args(argv.split()))
    for i, (rule, divergence) in enumerate((("JKLD", joint_kld), ("JFD", joint_fd))):
        w, phi = recover(rule, 2.0, 0.5, 0.7)
        assert (arrays["example_w"][i], arrays["example_phi"][i]) == (w, phi)
        assert arrays[f"example_{rule.lower()}"][i] == divergence(w, phi, 2.0, 0.5, 0.7)
    for r, rule in enumerate(RULES):
        np.testing.assert_array_equal(arrays["w"][r, 1], recover(rule, 2.0, 0.5, np.linspace(0, 2, 4))[0])
        np.testing.assert_array_equal(arrays["checked_w"][r, 0], recover(rule, 0.5, 0.5, param_recovery.CHECKED)[0])
        np.testing.assert_array_equal(arrays["sweep_w"][r], recover(rule, param_recovery.SWEEP, 0.5, 0.7)[0])


def test_sampled_recoveries_stand_where_the_closed_forms_do(monkeypatch):
    monkeypatch.setattr(param_recovery, "recover_from_samples", lambda rule, alpha, w_star, args, device: (
        -recover(rule, alpha, args.gamma, w_star)[0], -recover(rule, alpha, args.gamma, w_star)[1]))  # the sign is arbitrary
    args = param_recovery.parse_args("--stochastic --alphas 0.5 2 --points 2 --gamma 0.5".split())
    closed, sampled = param_recovery.closed_forms(args), param_recovery.stochastic(args, CPU)
    np.testing.assert_allclose(sampled["sampled_w"], closed["checked_w"])
    np.testing.assert_allclose(sampled["sampled_phi"], np.where(closed["checked_w"] > 0, closed["checked_phi"], 0))
