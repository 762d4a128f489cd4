"""Deliberate one-line mistakes in the source, each of which must fail a test.

Every mistake is made in a temporary copy of the repository, where the tests named beside it run; the survivors are printed.
The exit code is the number of survivors.

    python tests/mutants.py              # a few minutes
    python tests/mutants.py training     # only the mistakes in files whose name contains this word
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (imported once here, so that the forked tests need not)
import pytest
import scipy.optimize  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (Adam's first step imports it, which takes seconds)
import torch._inductor  # noqa: F401
import torch.fx.experimental.proxy_tensor  # noqa: F401
import torchvision.models.resnet  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = "test_cuda.py::test_what_capture_does_besides_cuda"
MOMENTS = "test_synthetic.py::test_the_moments_are_those_of_samples"
GAMMA = "test_gamma.py::test_stationary_gamma_arrives_within_some_updates"
DENSITIES = [f"test_metrics.py::{name}" for name in ("test_densities_integrate_to_one_and_match_their_samples",
                                                     "test_integrated_densities_are_those_of_their_samples",
                                                     "test_known_values_of_the_laws")]
SETTINGS = [f"test_evaluate.py::{name}" for name in ("test_groups_differ_in_their_seed_alone",
                                                     "test_settings_leave_out_what_most_runs_have_and_a_note_names_it",
                                                     "test_widths_are_in_the_order_of_numbers_and_the_usual_settings_come_first")]
TESTS = {file: [f"tests/{test if '::' in test else f'test_{test}.py'}" for test in tests] for file, tests in {
    "vsm/flags.py": ["wiring", "speed"], "vsm/loop.py": ["wiring", "runs"],
    "training.py": ["wiring", STAND_IN, GAMMA, "capture"], "train_synthetic.py": ["wiring", "speed", GAMMA, "capture", MOMENTS],
    "train_images.py": ["wiring"], "vsm/device.py": ["wiring"], "vsm/fid.py": ["quality"], "vsm/gamma.py": ["gamma"],
    "evaluate.py": ["quality", "evaluate"], "vsm/image_table.py": ["evaluate"], "vsm/cuda_graphs.py": ["speed", STAND_IN],
    "audit.py": ["audit"], "vsm/toys/mixtures.py": ["toys"],
    "vsm/linear.py": ["theory"], "studies/tables.py": ["studies"], "data.py": ["data", "capture"], "metrics.py": ["metrics"],
    "vsm/pictures.py": ["own_pictures", "pictures"], "objectives.py": ["wiring", "objectives"], "models.py": ["models", "wiring"],
    "vsm/samplers.py": ["test_loading.py::test_a_sampler_is_fitted_to_the_images_of_its_run_with_its_noise"],
    "vsm/features.py": ["test_data.py::test_a_lenet_is_of_its_labels_and_has_its_accuracy_on_test_images"],
    "vsm/loading.py": ["test_loading.py::test_an_exported_model_is_the_same_and_replaces_nothing"],
    "studies/figures/sweep_2d.py": ["test_synthetic.py::test_the_truth_of_a_sweep_has_the_noise_of_its_data"],
    "vsm/tables.py": ["evaluate"],
    **dict.fromkeys(("vsm/figures/images.py", "vsm/figures/recovery.py", "studies/packs.py"), ["plots"]),
    "vsm/names.py": ["test_runs.py::test_a_run_of_another_value_of_a_flag_is_another_run", *SETTINGS],
    "vsm/figures/toys.py": ["toy_inference"],
    "studies/gradient_snr.py": ["test_studies.py::test_gradient_snr"], "vsm/distributions_2d.py": DENSITIES}.items()}

# By file: the text to replace (found once), its replacement. Of the mistakes in compiled and captured updates, several are right
# on a CPU without graphs, and wrong in a graph.
MUTANTS = {
    "training.py": [
        ("or (self.step + 1) % self.inner_steps == 0", "or self.step % self.inner_steps == 0"),
        ("seed_of(self.seed, ORDER, epoch)", "seed_of(self.seed, ORDER, 0)"),
        ("self.begin_epoch(self.step // self.steps_per_epoch)", "self.begin_epoch(0)"),
        ("self.cursor += self.batch", "self.cursor += 1"), ("self.cursor.copy_(torch.arange(self.batch))", "pass"),
        ("self.noise, self.generator)", "self.noise, torch.Generator().manual_seed(0))"),
        ("self.noise, self.generator)", "0, self.generator)"),
        ("samples, generator)\n\n\nclass", "samples, torch.Generator().manual_seed(0))\n\n\nclass"),
        ("self.images[self.order[self.cursor]]", "self.images[self.cursor]"),
        ("self.advance(with_decoder, lambda", "self.advance(True, lambda"),
        ("x, self.infer_samples, self.generator)", "x, self.samples, self.generator)"),
        ("x, self.samples, self.generator)\n                loss = theta",
         "x, self.infer_samples, self.generator)\n                loss = theta"),
        ("x, self.samples, self.generator)\n            loss, other", "x, 1, self.generator)\n            loss, other"),
        ("self.samples, self.infer_samples, self.inner_steps = samples, infer_samples or samples",
         "self.samples, self.infer_samples, self.inner_steps = infer_samples or samples, samples"),
        ("theta_loss(self.vae, x, self.learn, z_noise, **options)", "theta_loss(self.vae, x, self.learn, z_noise, t=t)"),
        ("self.step_by(loss, self.theta)", "self.step_by(loss, self.theta, self.phi)"),
        ("self.step_by(loss, self.phi)", "self.step_by(loss, self.phi, self.theta)"),
        ("self.step_by(loss, self.phi, self.theta)", "self.step_by(loss, self.phi, keep_graph=True)"),
        ("z if INFER[infer].reparametrised else z.detach(), **options)", "z, **options)"),
        ("z if INFER[infer].reparametrised else z.detach(), **options)", "z.detach(), **options)"),
        ("relaxed=False).detach()", ").detach()"),
        ("relaxed=False).detach()", "relaxed=False)"),
        ("vae.sample(q, noise)\n    decoded", "vae.sample(q, noise).detach()\n    decoded"),
        ("p.requires_grad_(group in groups)", "p.requires_grad_(group is self.phi)"), ("loss.mean(), [p", "loss.sum(), [p"),
        ("[*vae.decoder.parameters(), *learned]", "[*vae.decoder.parameters()]"),
        ("p.grad = gradient if", "p.grad = p.grad if p.grad is not None else gradient if"),
        ("group.optimiser.step()", "self.phi.optimiser.step()"), ("[p.grad for p in group.params]", "[p.grad for p in params]"),
        ("if self.lr_half_life:", "if False:"), ("for optimiser in self.optimisers:", "for optimiser in self.optimisers[:1]:"),
        ("for optimiser in self.optimisers:", "for optimiser in self.optimisers[1:]:"),
        ("step // steps_per_epoch / half_life", "step / steps_per_epoch / half_life"),
        ("self.sums[:, :-1] / self.sums[:, -1:]", "self.sums[:, :-1] / self.sums[:1, -1:]"),
        ("            self.sums.zero_()", "            pass"),
        ("(self.diverged_at < self.clock).all()", "(self.diverged_at < self.clock).any()"),
        ("self.diverged_at.max().item()", "self.diverged_at.min().item()"),
        ("torch.where(finite, NEVER, self.clock)", "torch.where(finite, NEVER, self.clock + 1)"),
        ("torch.minimum(self.diverged_at", "torch.maximum(self.diverged_at"),
        ("for value in values]).all(0)", "for value in values]).any(0)"), ("self.clock += 1", "self.clock = self.clock + 1"),
        ('"order": self.order, "cursor": self.cursor}', '"order": self.order}'),
        ("torch.zeros((), dtype=torch.int64, device=device)", "torch.zeros((), dtype=torch.int64)"),
        ("self.captured_generators = self.generators", "pass"),
        ("update, self.state, self.captured_generators)", "update, dict, self.captured_generators)"),
        ("images[0].numel()) if", "images[0, 0].numel()) if")],
    "vsm/gamma.py": [
        ("DECAY = 0.99", "DECAY = 0.9"), ("(self.means > 0).all(0)", "(self.means[1] > 0)"),
        ("        move.clamp_(-LARGEST_MOVE, LARGEST_MOVE)\n", "")],
    "vsm/flags.py": [
        ("args.infer_samples = args.infer_samples or args.samples", "args.infer_samples = args.samples"),
        ("args.infer or (args.learn if learn.joint else", "args.infer or (args.learn if False else"),
        ("if args.compile and args.bilevel_steps and args.lr_half_life:", "if False:")],
    "vsm/loop.py": [
        ("epoch % eval_every == 0 or trainer.step == total", "epoch % eval_every == 0"),
        ("time.monotonic() - seconds", "time.monotonic()")],
    "vsm/device.py": [
        ("if learn in LEARN and LEARN[learn].joint or infer", "if False or infer")],
    "train_images.py": [
        ("infer_samples=args.infer_samples", "infer_samples=args.samples"), (" lr_half_life=args.lr_half_life,", ""),
        ("graph=not args.no_graph", "graph=True"), ("seed_of(args.seed, INIT)", "args.seed")],
    "data.py": [
        ("digest(data.train, data.test)", "digest(data.train)"), ("digest(data.train, data.test)", "digest(train, test)"),
        ("dict(recipe, fonts=FONTS)", "recipe"), (".float() / 255", ".float() / 256"),
        ("clean + noise * standard", "clean + standard"), ("generator=generator, device=clean.device)", "generator=generator)")],
    "vsm/pictures.py": [
        ("dict(recipe, stamp=self.stamp)", "recipe"), ("os.fsencode(self.source)", "os.fsencode(self.source.name)"),
        ("round((width - size) / 2)", "(width - size) // 2")],
    "metrics.py": [
        ("vae.noise(vae.prior, len(images), generator)", "vae.noise(vae.prior, min(len(images), 100), generator)"),
        ("reconstruction_mse(vae, x, clean)", "reconstruction_mse(vae, x)"),
        ("(nearest_distances(rows, rows, k + 1) for", "(nearest_distances(rows, rows, k) for")],
    "models.py": [
        ("n_in = width * side // 8", "n_in = width * 4"), ("2 * math.log(init_sd)", "math.log(init_sd)"),
        ("eps=torch.finfo(like.dtype).eps)", "eps=0.1)"), ("torch.sigmoid(logits / self.temperature)", "torch.sigmoid(logits)"),
        ("(logits > 0)", "(logits > 0.5)"), ("h.relu_() if i else h", "h.relu_()"), ("weight_sd * torch.randn", "torch.randn"),
        ("norm(n_out) if layers else nn.Identity()", "nn.Identity()"),
        ("norm(n_in), nn.ReLU(inplace=True)]\n    while", "nn.ReLU(inplace=True)]\n    while"),
        ("return F.relu(self.branch(h) + self.shortcut(h))", "return self.branch(h) + self.shortcut(h)"),
        ("if len(image_shape) > 1:\n        decoder += [nn.Sigmoid(), ", "if len(image_shape) > 1:\n        decoder += ["),
        ("n_out, stride = width * 2**stage, 1 if", "n_out, stride = width * 2**stage, 2 if"),
        ("return net(v).float()", "return net(v)"), ('std="softplus", init_sd=0.1):', 'std="exp", init_sd=0.1):'),
        ("else 2 * dim_z\n", "else 2 * dim_z + 2\n"),
        ("nn.GroupNorm(math.gcd(32, channels), channels)", "nn.GroupNorm(1, channels)")],
    "train_synthetic.py": [
        ("self.infer_noise[:args.inner_steps]:", "self.infer_noise[1:args.inner_steps]:"),
        ("self.infer_noise[args.inner_steps:], self", "self.infer_noise[:args.bilevel_steps], self"),
        ("args.infer_samples, 2, args.batch)", "args.samples, 2, args.batch)"),
        ("self.stationary.update(learn,", "self.stationary.update(infer,"),
        ("(args.samples, 2, args.batch)]", "(args.infer_samples, 2, args.batch)]"),
        ("torch._foreach_mul_(gradient, self.rate)", "pass"), ("set_rate(self.adam, self.args.lr * self.rate)", "pass"),
        ("args.inner_lr * self.rate if args.lr_half_life else", "args.inner_lr if args.lr_half_life else"),
        ("torch._foreach_copy_(self.phi, phi)", "pass"), ('{"estimator": self.args.estimator, "t": t}', '{"t": t}'),
        ("self.note_divergence(learn, vae.log_gamma)", "self.note_divergence(learn.mean(), vae.log_gamma)"),
        ("torch.stack([infer, one]), torch.stack([learn, one])", "torch.stack([learn, one]), torch.stack([infer, one])"),
        ("noise, estimator=self.args.estimator, t=t).mean(-1)", "noise, estimator=self.args.estimator, t=t).sum(-1)"),
        ("row.normal_(generator=generator)", "row.normal_(generator=self.generators[0])"),
        ("row.normal_(generator=generator)", "row.normal_(generator=generator) if self.step == 0 else row"),
        ("compiled(self.infer), compiled(self.learn)", "compiled(self.infer), self.learn"),
        ("self.clock += 1", "self.clock = self.clock + 1"), ("self.sums += torch.stack", "self.sums = self.sums + torch.stack"),
        ("functional_call(vae.encoder, phi, x))\n    loss", "functional_call(vae.encoder, here, x))\n    loss"),
        ("{name: p - lr * g for", "{name: p - lr * g.detach() for"),
        ("q, vae.sample(q, noise), **options", "q, vae.sample(q, noise).detach(), **options"),
        ("log_density[:500].mean()", "log_density.mean()")],
    "vsm/cuda_graphs.py": [
        ("        if code is None:", "        if True:"),
        ("functional_call(Method(function, module), leaves,", "functional_call(Method(function, module), {},"),
        ("torch._inductor.compile(make_fx(pure)(params, *tensors), [params, *tensors])", "make_fx(pure)(params, *tensors)"),
        ('if device.type != "cpu":', "if False:"), ("if not cpp_compiler():", "if False:"),
        ("if kind not in self.graphs:", "if True:"), ("        self.graphs[kind].replay()", "        pass"),
        ("                tensor.copy_(value)", "                pass"), ("        generator.set_state(value)", "        pass")],
    "objectives.py": [
        ("(q.base_dist.scale.detach() if", "(q.base_dist.scale if"),
        ("(q.base_dist.scale.detach() if", "(q.base_dist.scale.detach() ** 2 if"),
        ('if samples == 1 and estimator == "plugin"', "if samples == 1"),
        ('if samples == 1 and estimator == "plugin"', 'if samples == 2 and estimator == "plugin"'),
        ("if learn.joint:", "if False:"), ("gamma / 2 * dot(a, a)", "gamma * dot(a, a)"),
        ("score_n, create_graph=keep", "score_n, create_graph=False"),
        ("keep = vae.log_gamma.requires_grad or _requires_grad(vae.decoder, z)", "keep = _requires_grad(vae.decoder, z)"),
        ("if a is None or w is not z:", "if a is None:"), ("a.var(0).sum(-1) / len(a)", "a.var(0).sum(-1)"),
        ("dot(a.mean(0), b.sum(0))", "dot(a.mean(0), b.mean(0))"),
        ("score = (u / q.base_dist.scale, (u**2 - 1)", "score = (u / q.base_dist.scale, (u**2)"),
        ("x.dim() == len(q.batch_shape) + 1:", "x.dim() == 2:"), ('"FD", reparametrised=False', '"FD"'),
        ('"B", "#009E73", needs_b=True', '"B", "#009E73"')],
    "vsm/distributions_2d.py": [
        ("@ A + 0.01 * e", "@ A.T + 0.01 * e"), ("centre, sd = 0.5, 0.2", "centre, sd = 0.5, 0.04"),
        ("- math.log(0.0109)", "- math.log(0.0109) / 2"), ("self.sd[0] ** 2 + self.sd[1] * u", "self.sd[0] + self.sd[1] * u"),
        ("torch.special.ndtr(u[..., 2:]).sqrt()", "torch.special.ndtr(u[..., 2:])"), ("- r.log() - math.log((2", "- math.log((2"),
        ("1 / 2 * (score**2)", "(score**2)"), ("self.radius + self.sd * u[", "self.radius + u["),
        ("math.log(16 / (nodes - 1))", "math.log(8 / (nodes - 1))")],
    "vsm/linear.py": [
        ("1 - variance_share * (1 - V)", "1 - variance_share * V"), ("1 - mean_share * (1 - 2 * V)", "1 - mean_share * (1 - V)"),
        ('kappa_0 = 0.0 if objective in ("fd", "swersky")', 'kappa_0 = 0.0 if objective in ("fd",)'),
        ("1 - (1 - 2 * lr) ** steps", "1 - (1 - lr) ** steps"), ("1 - (1 - lr * v / V) ** steps", "1 - (1 - lr / V) ** steps"),
        ("grid[solved[0]] if", "grid[solved[-1]] if"), ("return B + alpha / N", "return B + alpha * N")],
    "vsm/fid.py": [
        ("part.to(device), noise,", "part.to(device), 0.1,"), ("q.mean**2 + q.variance", "q.mean**2 + q.stddev"),
        ("mmd_null_sd(z1, z2, n).cpu()", "mmd_null_sd(z1, z2, len(z1)).cpu()"), ("min(n, 2000)", "n"),
        ("digest(train, test)", "digest(test)"), ("sample_latents(vae.prior, n))", "sample_latents(aggregate, n))"),
        ("-{network.description['hash']}.npz", ".npz")],
    "evaluate.py": [
        ('fids(vae, reference, flags["noise"]', "fids(vae, reference, 0.1"),
        ("mmd_nulls(vae, len(reference.images)", "mmd_nulls(vae, 20"),
        ('settings["images"]], flags["noise"]', 'settings["images"]], 0.2'),
        ('status.startswith("unfinished@"):  #', 'status.startswith("never"):  #'),
        ('flags["noise"], seed=seed)', "0.3, seed=seed)"), (' "samplers": names,', ""),
        ("getattr(args, key) or before", "getattr(args, key) or BOUND")],
    "vsm/image_table.py": [
        ("self.last | evaluation |", "evaluation | self.last |"), ('"conv", usual.get("samples"))', '"conv", 5)'),
        ("and value != defaults.get(key))", ")"),
        ('"test_images", "digest"))', '"test_images"))')],
    "audit.py": [
        ("split_kappa(name, 1.0, image=True, **options)", "split_kappa(name, 1.0, **options)"),
        ("measured_kappa(name, samples, alpha, image=True, **options)", "measured_kappa(name, samples, alpha, **options)")],
    "vsm/tables.py": [("student.ppf(0.975,", "student.ppf(0.95,")],
    "studies/tables.py": [
        ("settings_of(configs, of_model)),", "settings_of(configs, of_model + of_training)),"), ("and other == model]", "]"),
        ('("samples", *of_training, *unnamed)]', "(*of_training, *unnamed)]"),
        ("run.finished() | latent", "run.arrays() | latent"),
        ('for arrays in runs if arrays["status"] == "ok"]', "for arrays in runs]"),
        ('"KLD-ELBO" and arrays["status"] == "ok":', '"KLD-ELBO":')],
    "vsm/features.py": [
        ("digest(data.train, data.train_labels)", "digest(data.train)")],
    "vsm/samplers.py": [
        ('images[some], flags["noise"], torch', "images[some], 0.1, torch")],
    "vsm/loading.py": [
        ('root = args.data_root or flags["data_root"]', 'root = flags["data_root"] or args.data_root'),
        ('args.data if args.data and flags["data"].startswith("folder:") else', "args.data if args.data else")],
    "studies/figures/sweep_2d.py": [('flags.get("noise", 0), arrays', "0, arrays")],
    "vsm/toys/mixtures.py": [("['exact_right_mass'][l]", "['exact_right_mass'][0]")],
    "studies/packs.py": [("row.get(block, -1) for", "row.get(block, 0) for")],
    "vsm/names.py": [
        ('"compile", "jobs")', '"compile", "jobs", "precision")'), ("> len(configs) / 2}", ">= len(configs) / 2}"),
        ('f"without {flag_name(key)}" if key in usual else ""', '""'), ("[float(part) if i % 2 else part", "[part"),
        ("usual_flags(mine) if leave_out_usual else None", "usual_flags(mine)")],
    "vsm/figures/toys.py": [('(ax, arrays["caught"][l, i, p], arrays["diverged"][l, i, p])', "(ax, caught, diverged)")],
    "vsm/figures/images.py": [("mean - values.min(0), values.max(0) - mean]", "values.max(0) - mean, mean - values.min(0)]"),
                              ('list(arrays["objectives"]).index(name) for', "0 for")],
    "vsm/figures/recovery.py": [('flags["w_star"] ** 2', "w ** 2")],
    "studies/gradient_snr.py": [
        ("flags, args.draws, lambda", "flags, 2, lambda")]}


def copy_of_the_repository(folder):
    ignored = shutil.ignore_patterns(".git", "runs", "data", "__pycache__", ".*cache")
    return Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignored))


def survives(copy, tests):
    """Whether the tests pass, run in a forked process, where the packages are imported already."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        os.chdir(copy)
        sys.dont_write_bytecode = True
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def main(word):
    torch.set_num_threads(1)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(folder)
        chosen = [(file, *mutant) for file, mutants in MUTANTS.items() if word in file for mutant in mutants]
        for file in dict.fromkeys(file for file, *_ in chosen):
            if not survives(copy, TESTS[file]):
                sys.exit(f"the tests of {file} fail without any mistake: {' '.join(TESTS[file])}")
        for file, old, new in chosen:
            source = (copy / file).read_text()
            if source.count(old) != 1:
                sys.exit(f"{file} has {source.count(old)} places, not one, that read: {old}")
            (copy / file).write_text(source.replace(old, new))
            if survives(copy, TESTS[file]):
                survivors += 1
                print(f"SURVIVES {file}: {old!r} -> {new!r}", flush=True)
            (copy / file).write_text(source)
    print(f"{survivors} of {len(chosen)} mistakes survive")
    sys.exit(survivors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only files whose name contains this word")
    main(parser.parse_args().word)
