"""The ledger of AutoAttack: evaluations that are resumed, interrupted and refused."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import linear_problem
import numpy as np
import pytest
from linear_problem import attack, linear, median_eps, problem

from vit_at.attacks import autoattack
from vit_at.attacks.autoattack import Budget, cascade, ledger
from vit_at.attacks.autoattack.ledger import LEDGER_FILE
from vit_at.errors import UserError


def test_an_evaluation_resumes_with_any_batch_size(tmp_path):
    params, images, labels = problem()
    eps = median_eps(params, images, labels, "linf")
    options = {"eps": eps, "attacks": ["apgd-ce"], "workdir": tmp_path}
    whole = attack(params, images, labels, batch_size=24, **options)
    for batch_size in (8, 4):
        resumed = attack(params, images, labels, batch_size=batch_size, **options)
        np.testing.assert_array_equal(whole.robust["apgd-ce"], resumed.robust["apgd-ce"])
    with pytest.raises(UserError, match="of another model"):
        attack((params[0] * 1.1, params[1]), images, labels, batch_size=8, **options)


def test_a_ledger_of_something_else_is_refused(tmp_path):
    params, images, labels = problem(8)
    attack(params, images, labels, eps=0.05, attacks=["apgd-ce"], workdir=tmp_path)
    again = functools.partial(attack, attacks=["apgd-ce"], workdir=tmp_path)
    with pytest.raises(UserError, match="another model"):
        again((params[0] + 1e-1, params[1]), images, labels, eps=0.05)
    with pytest.raises(UserError, match="data"):
        again(params, images[::-1], labels[::-1], eps=0.05)
    with pytest.raises(UserError, match=r"eps 0.05 -> 0.06"):
        again(params, images, labels, eps=0.06)
    (tmp_path / LEDGER_FILE).write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="can't be read"):
        again(params, images, labels, eps=0.05)


def quantised(surrogate, params, images):
    """Pixels in 16 levels, whose gradient is 0; with a surrogate, that of the identity (BPDA)."""
    levels = jnp.round(15 * images) / 15
    if surrogate:
        levels = images + jax.lax.stop_gradient(levels - images)
    return linear(params, levels)


def test_another_gradient_of_the_same_logits_is_another_evaluation(tmp_path):
    params, images, labels = problem(8)
    images = np.round(15 * images).astype(np.float32) / 15

    def run(surrogate, **options):
        model = functools.partial(quantised, surrogate, params)
        options = {"attacks": ["apgd-ce"], "workdir": tmp_path, "budget": Budget(5)} | options
        return autoattack.run(model, images, labels, eps=0.1, **options)

    first = run(False, batch_size=8)
    assert run(False, batch_size=4).columns.keys() == first.columns.keys()
    with pytest.raises(UserError, match="its input gradient differs"):
        run(True, batch_size=8)
    old = dict(np.load(tmp_path / LEDGER_FILE))
    assert old.pop("gradient").shape == images.shape
    np.savez(tmp_path / LEDGER_FILE, **old)  # as before the gradient was kept
    np.testing.assert_array_equal(run(True, batch_size=8).adversarial, first.adversarial)
    options = {"attacks": ["square"], "workdir": tmp_path / "square", "batch_size": 8}
    for surrogate in (False, True):  # Square takes logits only
        run(surrogate, **options)


def test_a_randomised_model_is_recognised(tmp_path):
    params, images, labels = problem(8)

    def noisy(scale, images, key):
        noise = 0.01 * jax.random.normal(key, images.shape)
        straight = images + jax.lax.stop_gradient(noise)
        return linear(params, scale * straight + jax.lax.stop_gradient((1 - scale) * straight))

    def run(scale):
        options = {"attacks": "rand", "workdir": tmp_path, "budget": Budget(2, samples=2)}
        model = functools.partial(noisy, scale)
        return autoattack.run(model, images, labels, eps=0.1, batch_size=8, **options)

    np.testing.assert_array_equal(run(1.0).adversarial, run(1.0).adversarial)
    with pytest.raises(UserError, match="its input gradient differs"):
        run(0.5)


def test_a_workdir_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    params, images, labels = problem(8)
    run = functools.partial(attack, params, images, labels, eps=0.05, attacks=["apgd-ce"])
    (tmp_path / "file").touch()
    for workdir, said in ((tmp_path / "file" / "below", "its path is a file"), ("/proc/aa", "")):
        with pytest.raises(UserError, match=f"{workdir} could not be written.*{said}") as caught:
            run(workdir=workdir)
        assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(workdir="")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    run(workdir="~/aa")
    assert (tmp_path / "aa" / LEDGER_FILE).exists()


def test_a_finished_ledger_is_not_run_again(tmp_path):
    params, images, labels = problem(8)
    first = attack(params, images, labels, eps=0.05, workdir=tmp_path)
    second = attack(params, images, labels, eps=0.05, workdir=tmp_path)
    np.testing.assert_array_equal(first.adversarial, second.adversarial)
    assert first.work == second.work
    with np.load(tmp_path / "per_example.npz") as table:
        np.testing.assert_array_equal(table["worst_case_correct"], first.robust["square"])


class Killed(Exception):
    pass


@functools.cache
def whole_run():
    """(``attack`` with its arguments, its undisturbed result)"""
    params, images, labels = problem(24)
    eps = median_eps(params, images, labels, "linf")
    run = functools.partial(attack, params, images, labels, eps=eps)
    return run, run()


@pytest.fixture
def run_killed(monkeypatch, tmp_path):
    """``run_killed(saves)``: the run, or None if it was killed after so many saves."""
    monkeypatch.setattr(cascade, "_WRITING_SHARE", 1e9)  # after every round
    save, left = ledger.Store.save, [0]

    def save_and_die(store, what):
        save(store, what)
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    def run(saves):
        left[0] = saves
        with contextlib.suppress(Killed):
            return whole_run()[0](workdir=tmp_path)

    monkeypatch.setattr(ledger.Store, "save", save_and_die)
    return run


def assert_same_result(result, whole):
    np.testing.assert_array_equal(result.adversarial, whole.adversarial)
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(result.columns[name], column)


def test_interrupted_anywhere_it_ends_the_same(run_killed, tmp_path):
    """Killed again and again right after a save, a few saves further each time."""
    kills = 0
    while (resumed := run_killed(6)) is None:
        assert {path.name for path in tmp_path.glob("slots_*")} <= SLOTS
        kills += 1
    assert kills > 2
    _, whole = whole_run()
    assert_same_result(resumed, whole)
    assert whole.work == resumed.work
    assert not list(tmp_path.glob("slots_*"))


SLOTS = {f"slots_{name}_0-of-1.npz" for name in (0, 1)}


@pytest.mark.parametrize("what", ["gone", "of another program"])
def test_without_the_state_of_its_runs_they_begin_again(what, run_killed, tmp_path):
    """As after another number of processes, each of which keeps the state of its own runs."""
    assert run_killed(4) is None
    for path in tmp_path.glob("slots_*"):
        state = dict(np.load(path))
        path.unlink()
        if what != "gone":
            np.savez(path, **state | {"1": state["1"][..., None]})
    resumed, (_, whole) = run_killed(100), whole_run()
    assert_same_result(resumed, whole)
    assert resumed.work != whole.work


@pytest.mark.slow
def test_kill_9(tmp_path):
    """A process killed at three moments, and the same command, end bit for bit the same."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(linear_problem.__file__)!r})
        import numpy as np, linear_problem as t
        from vit_at.attacks.autoattack import Budget
        params, images, labels = t.problem(48)
        eps = t.median_eps(params, images, labels, "linf")
        result = t.attack(params, images, labels, eps=eps, budget=Budget(queries=2000),
                          workdir=sys.argv[1], progress=True)
        np.save(sys.argv[1] + "/result.npy", result.adversarial)
    """)

    def start(name):
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)])

    assert start("whole").wait() == 0
    for seconds in (6, 9, 12):
        process = start("killed")
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    whole, killed = (np.load(tmp_path / name / "result.npy") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole, killed)
