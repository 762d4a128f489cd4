"""The audit passes the right objectives and says what is wrong with deliberately wrong ones."""

import numpy as np
import pytest

import audit
from objectives import LEARN, Objective, dot, likelihood_score, posterior_score
from small_runs import main
from vsm.runs import load_arrays


def findings(name, **options):
    return {finding.title: finding for check in audit.CHECKS for finding in check(name, options, 0)[0]}


@pytest.mark.parametrize("name, options, notes", [
    pytest.param("elbo", {}, set(), marks=pytest.mark.slow), pytest.param("fd", {}, {"target"}, marks=pytest.mark.slow),
    pytest.param("bao", {"estimator": "plugin"}, {"estimator"}, marks=pytest.mark.slow),
    ("swersky", {"estimator": "plugin"}, {"bias", "estimator"}), ("bao", {"estimator": "unbiased"}, set()),
    ("dsm", {"estimator": "unbiased"}, set())])
def test_right_objectives_pass(name, options, notes):
    found = findings(name, **options)
    assert {title for title, finding in found.items() if finding.verdict == "note"} == notes
    assert not [finding for finding in found.values() if finding.verdict == "WRONG"]


def test_the_numbers_of_the_released_estimator_are_those_of_images():
    """On vectors it couples the data of a minibatch and has no fixed point; the paper's images have kappa 1 + 1/N."""
    found, arrays = audit.check_contraction("bao", {"estimator": "released"}, 0)
    assert arrays["kappa"][1] == pytest.approx([2, 1.5, 1.2, 1.05], abs=1e-6)
    assert (arrays["kappa_limit"], arrays["kappa_slope"]) == pytest.approx((1, 1), abs=1e-6)
    assert [finding.verdict for finding in found] == ["ok", "ok", "note"]


def test_a_composition_is_named():
    (swersky,), _ = audit.check_composition("swersky", {"estimator": "plugin"}, 0)
    (elbo,), _ = audit.check_composition("elbo", {}, 0)
    assert swersky.text == "2 E 1/2 |a|^2 -1 1/2 |E a|^2 +1 lap" and elbo.text == "1 -log p(x|z) +1 KL"


def objective(loss):
    """An objective from its loss in a [N, B, D], the Laplacian [B] and b, which is a function."""
    return lambda vae, x, q, z: loss(*likelihood_score(vae, x, q, z), lambda: posterior_score(vae, x, q, z))


FACTOR = objective(lambda a, lap, _: dot(a, a).mean(0) + lap - dot(a.mean(0), a.mean(0)))
SIGN = objective(lambda a, lap, b: dot(a.mean(0), a.mean(0)) / 2 - dot(a, b()).mean(0) + lap)
MINIBATCH = objective(lambda a, lap, _: dot(a, a).mean(0) + lap - a.mean((0, 1)).square().sum() / 2)
DETACHED = objective(lambda a, lap, _: dot(a, a.detach()).mean(0) / 2 + lap)
REDUCED = objective(lambda a, lap, _: (dot(a, a).mean(0) / 2 + lap).mean())


@pytest.mark.parametrize("wrong, titles, words", [(FACTOR, {"target", "bias"}, "a factor or a sign is off"),
                                                  (SIGN, {"target", "bias"}, "a factor or a sign is off"),
                                                  (MINIBATCH, {"coupling", "target"}, "a mean over the minibatch"),
                                                  (DETACHED, {"gradient"}, "is detached")])
def test_wrong_objectives_are_caught(monkeypatch, wrong, titles, words):
    monkeypatch.setitem(LEARN, "wrong", Objective(wrong, "W", needs_b=wrong is SIGN))
    caught = {finding.title: finding.text for finding in findings("wrong").values() if finding.verdict == "WRONG"}
    assert set(caught) == titles and any(words in text for text in caught.values())


def test_a_reduced_loss_is_caught(monkeypatch):
    monkeypatch.setitem(LEARN, "wrong", Objective(REDUCED, "W"))
    assert audit.check_form("wrong", {}, 0)[0][0].verdict == "WRONG"


def test_the_script_writes_its_report(tmp_path, capsys):
    main(audit, "bao", "--out", tmp_path / "run")
    assert "kappa: for N = 1, 2, 5, 20: alpha 0.5: 1.500, 1.250, 1.100, 1.025" in capsys.readouterr().out
    arrays = load_arrays(tmp_path / "run" / "metrics.npz")
    np.testing.assert_allclose(arrays["kappa"][1], [2, 1.5, 1.2, 1.05], rtol=1e-6)
    assert arrays["verdict"].tolist().count("note") == 1
    assert "| kappa " in (tmp_path / "run" / "audit.md").read_text()


def test_a_wrong_objective_ends_with_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.setitem(LEARN, "wrong", Objective(FACTOR, "W"))
    monkeypatch.setattr(audit, "CHECKS", (audit.check_target,))
    for _ in range(2):  # an audit always runs again
        with pytest.raises(SystemExit, match="findings are wrong"):
            main(audit, "wrong", "--out", tmp_path / "run")
