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
WIRING, OBJECTIVES, SPEED, CAPTURE = (f"tests/test_{name}.py" for name in ("wiring", "objectives", "speed", "capture"))
STAND_IN = "tests/test_cuda.py::test_what_capture_does_besides_cuda"
TESTS = {"vsm/flags.py": [WIRING, SPEED], "vsm/bilevel.py": [WIRING, SPEED],
         "training.py": [WIRING, STAND_IN, CAPTURE], "train_synthetic.py": [WIRING, SPEED, CAPTURE], "train_images.py": [WIRING],
         "vsm/loop.py": [WIRING, "tests/test_runs.py"],
         "vsm/device.py": [WIRING], "vsm/fid.py": ["tests/test_quality.py"], "studies/auditing.py": ["tests/test_audit.py"],
         "evaluate.py": ["tests/test_quality.py", "tests/test_evaluate.py"],
         "vsm/image_table.py": ["tests/test_evaluate.py"],
         "vsm/gamma.py": ["tests/test_gamma.py"], "vsm/cuda_graphs.py": [SPEED, STAND_IN],
         "vsm/linear.py": ["tests/test_theory.py"], "studies/convergence.py": ["tests/test_study.py"],
         "data.py": ["tests/test_data.py"], "vsm/pictures.py": ["tests/test_own_pictures.py", "tests/test_pictures.py"],
         "metrics.py": ["tests/test_metrics.py"],
         "vsm/samplers.py": ["tests/test_samplers.py::test_a_sampler_is_fitted_to_the_images_of_its_run_with_its_noise"],
         "vsm/features.py": ["tests/test_data.py::test_a_lenet_is_of_its_labels_and_has_its_accuracy_on_test_images"],
         "vsm/loading.py": ["tests/test_loading.py::test_an_exported_model_is_the_same_and_replaces_nothing"],
         "vsm/evaluation_2d.py": ["tests/test_synthetic.py::test_the_moments_are_those_of_samples"],
         "studies/gradient_snr.py": ["tests/test_trained_models.py::test_gradient_snr"],
         "objectives.py": [WIRING, OBJECTIVES], "models.py": ["tests/test_models.py", WIRING], "vsm/distributions_2d.py": [
             f"tests/test_importance.py::{name}" for name in ("test_densities_integrate_to_one_and_match_their_samples",
                                                              "test_integrated_densities_are_those_of_their_samples",
                                                              "test_known_values_of_the_laws")]}

MUTANTS = [  # file, the text to replace (found once), its replacement
    # The order of the updates and what they draw.
    ("training.py", "with_decoder = (self.step + 1) % self.inner_steps == 0", "with_decoder = self.step % self.inner_steps == 0"),
    ("training.py", "seed_of(self.seed, ORDER, epoch)", "seed_of(self.seed, ORDER, 0)"),
    ("training.py", "self.begin_epoch(self.step // self.steps_per_epoch)", "self.begin_epoch(0)"),
    ("training.py", "self.cursor += self.batch", "self.cursor += 1"),
    ("training.py", "self.cursor.copy_(torch.arange(self.batch))", "pass"),
    ("training.py", "generator=self.generator, device=self.device)",
     "generator=torch.Generator().manual_seed(0), device=self.device)"),
    ("training.py", "return x + self.noise *", "return x + 0 *"),
    ("training.py", "samples, generator)\n\n\nclass", "samples, torch.Generator().manual_seed(0))\n\n\nclass"),
    ("training.py", "self.images[self.order[self.cursor]]", "self.images[self.cursor]"),
    ("training.py", ".float() / 255", ".float() / 256"),
    ("training.py", "self.advance(with_decoder, lambda", "self.advance(True, lambda"),
    # Which loss, of how many samples, moves which group.
    ("training.py", "x, self.infer_samples, self.generator)", "x, self.samples, self.generator)"),
    ("training.py", "x, self.samples, self.generator)\n                loss = theta",
     "x, self.infer_samples, self.generator)\n                loss = theta"),
    ("training.py", "x, self.samples, self.generator)\n            loss, other",
     "x, 1, self.generator)\n            loss, other"),
    ("training.py", "self.samples, self.infer_samples, self.inner_steps = samples, infer_samples or samples",
     "self.samples, self.infer_samples, self.inner_steps = infer_samples or samples, samples"),
    ("training.py", "x, self.learn, z_noise, estimator=self.estimator, t=t)", "x, self.learn, z_noise, t=t)"),
    ("training.py", "self.step_by(loss, self.theta)", "self.step_by(loss, self.theta, self.phi)"),
    ("training.py", "self.step_by(loss, self.phi)", "self.step_by(loss, self.phi, self.theta)"),
    ("training.py", "self.step_by(loss, self.phi, self.theta)", "self.step_by(loss, self.phi, keep_graph=True)"),
    ("training.py", "z if INFER[infer].reparametrised else z.detach())", "z)"),
    ("training.py", "z if INFER[infer].reparametrised else z.detach())", "z.detach())"),
    ("training.py", "relaxed=False).detach()", ").detach()"),
    ("training.py", "relaxed=False).detach()", "relaxed=False)"),
    ("training.py", "vae.sample(q, noise)\n    decoded", "vae.sample(q, noise).detach()\n    decoded"),
    ("training.py", "p.requires_grad_(group in groups)", "p.requires_grad_(group is self.phi)"),
    ("training.py", "loss.mean(), [p", "loss.sum(), [p"),
    ("training.py", "[*vae.decoder.parameters(), *learned]", "[*vae.decoder.parameters()]"),
    ("vsm/gamma.py", "DECAY = 0.99", "DECAY = 0.9"),
    ("vsm/gamma.py", "(self.means > 0).all(0)", "(self.means[1] > 0)"),
    ("vsm/gamma.py", "        move.clamp_(-LARGEST_MOVE, LARGEST_MOVE)\n", ""),
    ("training.py", "p.grad = gradient if", "p.grad = p.grad if p.grad is not None else gradient if"),
    ("training.py", "group.optimiser.step()", "self.phi.optimiser.step()"),
    ("training.py", "[p.grad for p in group.params]", "[p.grad for p in params]"),
    # Step sizes, sums, divergence, the pair.
    ("training.py", "if self.lr_half_life:", "if False:"),
    ("training.py", "for optimiser in self.optimisers:", "for optimiser in self.optimisers[:1]:"),
    ("training.py", "for optimiser in self.optimisers:", "for optimiser in self.optimisers[1:]:"),
    ("training.py", "step // steps_per_epoch / half_life", "step / steps_per_epoch / half_life"),
    ("training.py", "self.sums[:, :-1] / self.sums[:, -1:]", "self.sums[:, :-1] / self.sums[:1, -1:]"),
    ("training.py", "            self.sums.zero_()", "            pass"),
    ("training.py", "(self.diverged_at < self.clock).all()", "(self.diverged_at < self.clock).any()"),
    ("training.py", "self.diverged_at.max().item()", "self.diverged_at.min().item()"),
    ("training.py", "torch.where(finite, NEVER, self.clock)", "torch.where(finite, NEVER, self.clock + 1)"),
    ("training.py", "torch.minimum(self.diverged_at", "torch.maximum(self.diverged_at"),
    ("training.py", "for value in values]).all(0)", "for value in values]).any(0)"),
    ("vsm/flags.py", "args.infer_samples = args.infer_samples or args.samples", "args.infer_samples = args.samples"),
    ("vsm/flags.py", "args.infer or (args.learn if learn.joint else", "args.infer or (args.learn if False else"),
    ("vsm/loop.py", "epoch % eval_every == 0 or trainer.step == total", "epoch % eval_every == 0"),
    ("vsm/device.py", "if LEARN[learn].joint or infer", "if False or infer"),
    ("train_images.py", "infer_samples=args.infer_samples", "infer_samples=args.samples"),
    ("train_images.py", " lr_half_life=args.lr_half_life,", ""),
    ("train_images.py", "graph=not args.no_graph", "graph=True"),
    ("train_images.py", "seed_of(args.seed, INIT)", "args.seed"),
    # Which data, which of their numbers, and which key of a cache.
    ("data.py", "digest(data.train, data.test)", "digest(data.train)"),
    ("data.py", "digest(data.train, data.test)", "digest(train, test)"),
    ("data.py", "dict(recipe, fonts=FONTS)", "recipe"),
    ("vsm/pictures.py", "dict(recipe, stamp=self.stamp)", "recipe"),
    ("vsm/pictures.py", "os.fsencode(self.source)", "os.fsencode(self.source.name)"),
    ("vsm/pictures.py", "round((width - size) / 2)", "(width - size) // 2"),
    ("metrics.py", "vae.noise(vae.prior, len(images), generator)", "vae.noise(vae.prior, min(len(images), 100), generator)"),
    ("metrics.py", "reconstruction_mse(vae, x, clean)", "reconstruction_mse(vae, x)"),
    ("models.py", "n_in = width * side // 8", "n_in = width * 4"),
    # The ensembles.
    ("train_synthetic.py", "self.infer_noise[:args.inner_steps]:", "self.infer_noise[1:args.inner_steps]:"),
    ("train_synthetic.py", "self.infer_noise[args.inner_steps:], self", "self.infer_noise[:args.bilevel_steps], self"),
    ("train_synthetic.py", "args.infer_samples, 2, args.batch)", "args.samples, 2, args.batch)"),
    ("train_synthetic.py", "(args.samples, 2, args.batch)]", "(args.infer_samples, 2, args.batch)]"),
    ("train_synthetic.py", "torch._foreach_mul_(gradient, self.rate)", "pass"),
    ("train_synthetic.py", "set_rate(self.adam, self.args.lr * self.rate)", "pass"),
    ("train_synthetic.py", "args.inner_lr * self.rate if args.lr_half_life else", "args.inner_lr if args.lr_half_life else"),
    ("train_synthetic.py", "torch._foreach_copy_(self.phi, phi)", "pass"),
        ("train_synthetic.py", "{\"estimator\": self.args.estimator, \"t\": t}", "{\"t\": t}"),
    ("train_synthetic.py", "self.note_divergence(learn, vae.log_gamma)", "self.note_divergence(learn.mean(), vae.log_gamma)"),
    ("train_synthetic.py", "torch.stack([infer, one]), torch.stack([learn, one])",
     "torch.stack([learn, one]), torch.stack([infer, one])"),
    ("train_synthetic.py", "self.args.infer, noise).mean(-1)", "self.args.infer, noise).sum(-1)"),
    ("train_synthetic.py", "row.normal_(generator=generator)", "row.normal_(generator=self.generators[0])"),
    ("train_synthetic.py", "row.normal_(generator=generator)", "row.normal_(generator=generator) if self.step == 0 else row"),
    ("vsm/bilevel.py", "functional_call(vae.encoder, phi, x))\n    loss", "functional_call(vae.encoder, here, x))\n    loss"),
    ("vsm/bilevel.py", "{name: p - lr * g for", "{name: p - lr * g.detach() for"),
    ("vsm/bilevel.py", "q, vae.sample(q, noise), **options", "q, vae.sample(q, noise).detach(), **options"),
    # Compiled and captured updates. Several are right on a CPU without graphs, and wrong in a graph.
    ("vsm/cuda_graphs.py", "        if code is None:", "        if True:"),
    ("vsm/cuda_graphs.py", "functional_call(Method(function, module), leaves,", "functional_call(Method(function, module), {},"),
    ("vsm/cuda_graphs.py", "torch._inductor.compile(make_fx(pure)(params, *tensors), [params, *tensors])",
     "make_fx(pure)(params, *tensors)"),
    ("vsm/cuda_graphs.py", 'if device.type != "cpu":', "if False:"),
    ("vsm/cuda_graphs.py", "if not cpp_compiler():", "if False:"),
    ("vsm/cuda_graphs.py", "if kind not in self.graphs:", "if True:"),
    ("vsm/cuda_graphs.py", "        self.graphs[kind].replay()", "        pass"),
    ("vsm/cuda_graphs.py", "                tensor.copy_(value)", "                pass"),
    ("vsm/cuda_graphs.py", "        generator.set_state(value)", "        pass"),
    ("train_synthetic.py", "compiled(self.infer), compiled(self.learn)", "compiled(self.infer), self.learn"),
    ("vsm/flags.py", "if args.compile and args.bilevel_steps and args.lr_half_life:", "if False:"),
    ("train_synthetic.py", "self.clock += 1", "self.clock = self.clock + 1"),
    ("train_synthetic.py", "self.sums += torch.stack", "self.sums = self.sums + torch.stack"),
    ("training.py", "self.clock += 1", "self.clock = self.clock + 1"),
    ("training.py", "generator=self.generator, device=self.device)", "generator=self.generator)"),
    ("training.py", '"order": self.order, "cursor": self.cursor}', '"order": self.order}'),
    ("training.py", "torch.zeros((), dtype=torch.int64, device=device)", "torch.zeros((), dtype=torch.int64)"),
    ("training.py", "self.captured_generators = self.generators", "pass"),
    ("training.py", "self.state(), self.captured_generators)", "{}, self.captured_generators)"),
    # Objectives.
    ("objectives.py", "(q.base_dist.scale.detach() if", "(q.base_dist.scale if"),
    ("objectives.py", "(q.base_dist.scale.detach() if", "(q.base_dist.scale.detach() ** 2 if"),
    ("objectives.py", "if samples == 1 and estimator == \"plugin\"", "if samples == 1"),
    ("objectives.py", "if samples == 1 and estimator == \"plugin\"", "if samples == 2 and estimator == \"plugin\""),
    ("objectives.py", "if learn.joint:", "if False:"),
    ("objectives.py", "gamma / 2 * dot(a, a)", "gamma * dot(a, a)"),
    ("objectives.py", "score_n, create_graph=keep", "score_n, create_graph=False"),
    ("objectives.py", "keep = vae.log_gamma.requires_grad or _requires_grad(vae.decoder, z)",
     "keep = _requires_grad(vae.decoder, z)"),
    ("objectives.py", "if a is None or w is not z:", "if a is None:"),
    ("objectives.py", "a.var(0).sum(-1) / len(a)", "a.var(0).sum(-1)"),
    ("objectives.py", "dot(a.mean(0), b.sum(0))", "dot(a.mean(0), b.mean(0))"),
    ("objectives.py", "score = (u / q.base_dist.scale, (u**2 - 1)", "score = (u / q.base_dist.scale, (u**2)"),
    ("objectives.py", "x.dim() == len(q.batch_shape) + 1:", "x.dim() == 2:"),
    ("objectives.py", "\"FD\", reparametrised=False", "\"FD\""),
    ("objectives.py", "\"B\", \"#009E73\", needs_b=True", "\"B\", \"#009E73\""),
    # Models.
    ("models.py", "2 * math.log(init_sd)", "math.log(init_sd)"),
    ("models.py", "eps=torch.finfo(like.dtype).eps)", "eps=0.1)"),
    ("models.py", "torch.sigmoid(logits / self.temperature)", "torch.sigmoid(logits)"),
    ("models.py", "(logits > 0)", "(logits > 0.5)"),
    ("models.py", "h.relu_() if i else h", "h.relu_()"),
    ("models.py", "weight_sd * torch.randn", "torch.randn"),
    ("models.py", "norm(n_out) if layers else nn.Identity()", "nn.Identity()"),
    ("models.py", "norm(n_in), nn.ReLU(inplace=True)]\n    while", "nn.ReLU(inplace=True)]\n    while"),
    ("models.py", "return F.relu(self.branch(h) + self.shortcut(h))", "return self.branch(h) + self.shortcut(h)"),
    ("models.py", "if len(image_shape) > 1:\n        decoder += [nn.Sigmoid(), ",
     "if len(image_shape) > 1:\n        decoder += ["),
    ("models.py", "n_out, stride = width * 2**stage, 1 if", "n_out, stride = width * 2**stage, 2 if"),
    ("models.py", "return net(v).float()", "return net(v)"),
    ("models.py", 'std="softplus", init_sd=0.1):', 'std="exp", init_sd=0.1):'),
    ("models.py", "else 2 * dim_z\n", "else 2 * dim_z + 2\n"),
    ("models.py", "nn.GroupNorm(math.gcd(32, channels), channels)", "nn.GroupNorm(1, channels)"),
    # Laws.
    ("vsm/distributions_2d.py", "@ A + 0.01 * e", "@ A.T + 0.01 * e"),
    ("vsm/distributions_2d.py", "centre, sd = 0.5, 0.2", "centre, sd = 0.5, 0.04"),
    ("vsm/distributions_2d.py", "- math.log(0.0109)", "- math.log(0.0109) / 2"),
    ("vsm/distributions_2d.py", "self.sd[0] ** 2 + self.sd[1] * u", "self.sd[0] + self.sd[1] * u"),
    ("vsm/distributions_2d.py", "torch.special.ndtr(u[..., 2:]).sqrt()", "torch.special.ndtr(u[..., 2:])"),
    ("vsm/distributions_2d.py", "- r.log() - math.log((2", "- math.log((2"),
    ("vsm/distributions_2d.py", "1 / 2 * (score**2)", "(score**2)"),
    ("vsm/distributions_2d.py", "self.radius + self.sd * u[", "self.radius + u["),
    ("vsm/distributions_2d.py", "math.log(16 / (nodes - 1))", "math.log(8 / (nodes - 1))"),
    ("vsm/distributions_2d.py", "math.e * self.sd**2) - overlap", "math.e * self.sd**2)"),
    # Theory of bi-level steps, and what the tables of the study compare.
    ("vsm/linear.py", "1 - variance_share * (1 - V)", "1 - variance_share * V"),
    ("vsm/linear.py", "1 - mean_share * (1 - 2 * V)", "1 - mean_share * (1 - V)"),
    ("vsm/linear.py", 'kappa_0 = 0.0 if objective in ("fd", "swersky")', 'kappa_0 = 0.0 if objective in ("fd",)'),
    ("vsm/linear.py", "1 - (1 - 2 * lr) ** steps", "1 - (1 - lr) ** steps"),
    ("vsm/linear.py", "1 - (1 - lr * v / V) ** steps", "1 - (1 - lr / V) ** steps"),
    ("vsm/linear.py", "grid[solved[0]] if", "grid[solved[-1]] if"),
    ("vsm/linear.py", "return B + alpha / N", "return B + alpha * N"),
    # Which noise, which n, which estimator FID, the null of the MMD and the audit are of.
    ("vsm/fid.py", "clean + noise * torch", "clean + 0.1 * torch"),
    ("vsm/fid.py", "q.mean**2 + q.variance", "q.mean**2 + q.stddev"),
    ("vsm/fid.py", "mmd_null_sd(z1, z2, n).cpu()", "mmd_null_sd(z1, z2, len(z1)).cpu()"),
    ("vsm/fid.py", "min(n, 2000)", "n"),
    ("vsm/fid.py", "digest(train, test)", "digest(test)"),
    ("vsm/fid.py", "sample_latents(vae.prior, n))", "sample_latents(aggregate, n))"),
    ("evaluate.py", 'fids(vae, reference, flags["noise"]', "fids(vae, reference, 0.1"),
    ("evaluate.py", "mmd_nulls(vae, len(reference.images)", "mmd_nulls(vae, args.images"),
    ("evaluate.py", 'args.images], flags["noise"]', "args.images], 0.2"),
    ("evaluate.py", 'status.startswith("unfinished@"):  #', 'status.startswith("never"):  #'),
    ("evaluate.py", 'flags["noise"], seed=seed)', "0.3, seed=seed)"),
    ("vsm/image_table.py", "self.last | evaluation |", "evaluation | self.last |"),
    ("vsm/image_table.py", '{"infer_samples": flags["samples"]}', '{"infer_samples": 5}'),
    ("vsm/image_table.py", "flags.items()\n                          if key not in (*NOT_IDENTITY, *AXES) and",
     "flags.items()\n                          if"),
    ("studies/auditing.py", 'start, args, name, options.get("estimator", "plugin")', 'start, args, name, "plugin"'),
    ("studies/auditing.py", 'flags += ["--estimator", args.estimator]', 'flags += ["--estimator", "plugin"]'),
    ("studies/auditing.py", "split_kappa(name, 1.0, image=True, **options)", "split_kappa(name, 1.0, **options)"),
    ("studies/auditing.py", "measured_kappa(name, samples, alpha, image=True, **options)",
     "measured_kappa(name, samples, alpha, **options)"),
    ("studies/convergence.py", "settings_of(configs, of_model)),", "settings_of(configs, of_model + of_training)),"),
    ("studies/convergence.py", "and other == model}", "}"),
    ("studies/convergence.py", "run.finished() | latent", "run.arrays() | latent"),
    ("studies/convergence.py", "student.ppf(0.975,", "student.ppf(0.95,"),
    ("studies/convergence.py", 'for arrays in runs if arrays["status"] == "ok"]', "for arrays in runs]"),
    ("studies/convergence.py", '"KLD-ELBO" and arrays["status"] == "ok":', '"KLD-ELBO":'),
    # What connects the modules: keys of caches, and flags that are passed on.
    ("evaluate.py", '"samplers": names, **reference.settings}', "**reference.settings}"),
    ("vsm/fid.py", "-{network.description['hash']}.npz", ".npz"),
    ("vsm/features.py", "digest(data.train, data.train_labels)", "digest(data.train)"),
    ("vsm/image_table.py", 'settings.get("digest"), each.features', "each.features"),
    ("vsm/samplers.py", 'images[some], flags["noise"], seed)', "images[some], 0.1, seed)"),
    ("vsm/loading.py", 'args.data if args.data and flags["data"].startswith("folder:") else', "args.data if args.data else"),
    ("vsm/loop.py", "time.monotonic() - seconds", "time.monotonic()"),
    ("vsm/evaluation_2d.py", "log_density[:500].mean()", "log_density.mean()"),
    ("studies/gradient_snr.py", "args.draws, args.mode, lambda", 'args.draws, "eval", lambda'),
    ("studies/auditing.py", 'if LEARN[args.objective].takes("t") else []', 'if LEARN[name].takes("t") else []'),
]


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
        chosen = [mutant for mutant in MUTANTS if word in mutant[0]]
        for file in dict.fromkeys(mutant[0] for mutant in chosen):
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
