"""The ledger of AutoAttack: evaluations that are resumed, interrupted and refused."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import linear_problem
import numpy as np
import pytest
from linear_problem import attack, median_eps, problem

from vit_at.attacks.autoattack import cascade, ledger
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
