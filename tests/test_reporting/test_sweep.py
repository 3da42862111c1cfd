"""Sweeps: what a recipe's ``add`` calls become, which runs are skipped, and the table."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax.numpy as jnp
import pytest
import runs as toy
from etils import epath
from test_study import record

from vit_at.errors import UserError
from vit_at.reporting import sweep
from vit_at.reporting.jobs import Job, jobs_of
from vit_at.workdir.checkpoint import Checkpoints
from vit_at.workdir.files import write_config

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits_sgd.py")


def recipe(tmp_path, body: str) -> str:
    """A file with the digits' configuration and this sweep."""
    path = tmp_path / "recipe.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        f"from vit_at.configs.digits_sgd import get_config\n\ndef sweep(add):\n{lines}\n"
    )
    return str(path)


def fill(run: Job, accuracy: float, **changes) -> None:
    """A finished work directory as the run would leave it, but for the given fields."""
    config = run.config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    write_config(run.workdir, config)
    records = [record(a, accuracy, seed=config.seed) for a in config.eval.attacks.split(",")]
    (run.workdir / "results.json").write_text(json.dumps(records))


def test_the_digits_sweep_is_three_trainings_of_three_seeds(tmp_path):
    runs = jobs_of(f"{DIGITS}:smoke", epath.Path(tmp_path))
    assert len(runs) == 9
    assert {run.variants for run in runs} == {"natural", "", "ard_prm"}
    assert [run.config.seed for run in runs] == [0, 1, 2] * 3
    last = runs[-1]
    assert last.name == "ard_prm-seed=2"
    assert last.config.masking.ard
    assert last.config.data.train_split == "train[:160]"  # of the variant that all have
    assert last.arguments == [
        f"--config={DIGITS}:ard_prm,smoke",
        "--config.seed=2",
        f"--workdir={tmp_path}/ard_prm-seed=2",
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("add('', {'threat.epz': 0.1})", "'threat.epz', which is unknown; the nearest are threat."),
        ("add('', {'seed': 1})\nadd('', {'seed': 1})", "adds the run 'seed=1' to its sweep twice"),
        ("add('ardd')", "config variant 'ardd' is unknown"),
        ("add('', {'epochs': 'many'})", "sets a value of a wrong kind"),
        ("add('', {'epochs': 0})", "epochs is 0"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_in_a_sentence(tmp_path, body, said):
    with pytest.raises(UserError, match=said):
        jobs_of(recipe(tmp_path, body), epath.Path(tmp_path))


def test_a_recipe_without_a_sweep_is_named(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from vit_at.configs.digits_sgd import get_config\n")
    with pytest.raises(UserError, match=r"plain\.py declares no sweep"):
        jobs_of(str(path))
    with pytest.raises(UserError, match="can't be loaded"):
        jobs_of(str(tmp_path / "nowhere.py"))


def test_only_what_was_measured_under_the_same_configuration_is_finished(tmp_path):
    runs = jobs_of(DIGITS, epath.Path(tmp_path))
    assert not any(run.finished for run in runs)
    fill(runs[0], 0.5)
    fill(runs[1], 0.5, epochs=3)
    fill(runs[2], 0.5)
    (runs[2].workdir / "results.json").write_text(json.dumps([record("clean", 0.5)]))
    assert [run.finished for run in runs[:3]] == [True, False, False]
    flagged = jobs_of(DIGITS, epath.Path(tmp_path), ["--config.epochs=3"])
    assert [run.finished for run in flagged[:3]] == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"data": "digits/1.0.0 train"}, {"transform": "resize10-crop8"}],
)
def test_what_was_measured_otherwise_does_not_finish_a_run(tmp_path, change):
    run = jobs_of(DIGITS, epath.Path(tmp_path))[0]
    fill(run, 0.5)
    assert run.finished
    attacks = run.config.eval.attacks.split(",")
    records = [record(attack, 0.5, **change) for attack in attacks]
    (run.workdir / "results.json").write_text(json.dumps(records))
    assert not run.finished


def test_a_run_that_was_evaluated_before_its_end_is_not_finished(tmp_path):
    """Records are of step 7: of the best weights, and then of those that a longer run left."""
    run = jobs_of(DIGITS, epath.Path(tmp_path))[0]
    fill(run, 0.5)
    values = {"step": 9, "best": {"step": 7, "robust": 0.5}, "stopped": False}
    state, checkpoints = {"params": {"x": jnp.zeros(3)}}, Checkpoints(run.workdir)
    finished = []
    for step, best, ended in ((9, 7, False), (10, 7, True), (11, 10, True)):
        values |= {"step": step, "best": {"step": best, "robust": 0.5}, "ended": ended}
        checkpoints.last.save(step, state, values)
        checkpoints.wait()
        finished.append(run.finished)
    checkpoints.close()
    assert finished == [False, True, False]


def test_fields_that_end_alike_keep_their_whole_name(tmp_path):
    body = "add('', {'threat.eps': 0.1, 'seed': 1})\nadd('', {'eval.threat.eps': 0.1, 'seed': 1})"
    names = [job.name for job in jobs_of(recipe(tmp_path, body), epath.Path(tmp_path))]
    assert names == ["threat.eps=0.1-seed=1", "eval.threat.eps=0.1-seed=1"]


def test_a_flag_for_all_runs_does_not_override_what_the_sweep_sets(tmp_path):
    place = recipe(tmp_path, "for seed in range(3):\n    add('', {'seed': seed})")
    with pytest.raises(UserError, match=r"--config.seed is given for all runs, but the sweep of"):
        jobs_of(place, epath.Path(tmp_path), ["--config.seed=7"])


def test_the_table_averages_over_finished_seeds_only(tmp_path):
    root = epath.Path(tmp_path)
    runs = jobs_of(DIGITS, root)
    for run, accuracy in zip(runs[:4], (0.1, 0.2, 0.3, 0.75), strict=True):
        fill(run, accuracy)
    lines = sweep.collect(runs, root).splitlines()
    assert lines[0] == "| training | seeds | clean % | CW-20 % | PGD-20 % | PGD-100 % |"
    assert lines[2] == "| natural | 3 | " + " | ".join(["20.0 ± 10.0"] * 4) + " |"
    assert lines[3] == "| AT | 1 | " + " | ".join(["75.0"] * 4) + " |"
    assert len(lines) == 4
    assert (root / "table.md").read_text().splitlines() == lines


def test_a_sweep_that_has_just_begun_has_no_table(tmp_path):
    runs = jobs_of(DIGITS, epath.Path(tmp_path))
    assert sweep.collect(runs, epath.Path(tmp_path)) == "no run has finished\n"


STAND_IN = """
import pathlib, sys
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True)
(workdir / "flags").write_text(repr(flags))
sys.exit(3 if flags["config.seed"] == "1" else 0)
"""


@pytest.mark.parametrize("parallel", [1, 3])
def test_all_jobs_run_and_those_that_fail_are_reported(tmp_path, capsys, parallel):
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    root = tmp_path / "root"
    words = [recipe(tmp_path, "for seed in range(3):\n    add('', {'seed': seed})")]
    words += [f"--root={root}", f"--parallel={parallel}"]
    words += [f"--launcher={sys.executable} {stand_in}", "--", "--config.epochs=3"]
    assert sweep.main(words) == 1
    made = sorted(path.parent.name for path in root.glob("*/flags"))
    assert made == ["seed=0", "seed=1", "seed=2"]
    assert "'config.epochs': '3'" in (root / "seed=2" / "flags").read_text()
    said = capsys.readouterr()
    assert "run seed=1 ended with status 3" in said.err
    assert "no run has finished" in said.out


WAITING = """
import pathlib, signal, sys, time
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(workdir / "started").touch()
time.sleep(60)
"""


def test_a_signal_ends_the_running_jobs_and_starts_no_more(tmp_path, capsys):
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(WAITING)
    root = tmp_path / "root"

    def interrupt():
        while len(list(root.glob("*/started"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    words = [recipe(tmp_path, "for seed in range(4):\n    add('', {'seed': seed})")]
    words += [f"--root={root}", "--parallel=2", f"--launcher={sys.executable} {stand_in}"]
    assert sweep.main(words) == 128 + signal.SIGTERM
    thread.join()
    assert sorted(path.parent.name for path in root.glob("*/started")) == ["seed=0", "seed=1"]
    said = capsys.readouterr()
    assert "run seed=0 ended with status 143" in said.err
    assert "run seed=1 ended with status 143" in said.err
    assert "seed=2" not in said.out + said.err
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_job_at_a_time_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main([f"{DIGITS}:smoke", f"--root={tmp_path}", "--parallel=0"])
    assert ended.value.code == 2
    assert "--parallel is 0" in capsys.readouterr().err


def test_an_index_chooses_one_run_and_dry_run_starts_none(tmp_path, capsys):
    words = [f"{DIGITS}:smoke", f"--root={tmp_path}", "--dry_run"]
    assert sweep.main([*words, "--index=3"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "vit_at.main" in x]
    assert f"--workdir={tmp_path}/seed=0" in line
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        sweep.main([*words, "--index=9"])
    assert ended.value.code == 2
    assert "the sweep has the runs 0 to 8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_real_runs_is_resumed_and_collected(tmp_path, capsys):
    body = "add('natural', {'seed': 0})\nadd('', {'seed': 0})"
    quick = [f"--config.{f.replace('__', '.')}={v}" for f, v in toy.QUICK.items()]
    words = [f"{recipe(tmp_path, body)}:smoke", f"--root={tmp_path / 'root'}", "--", *quick]
    assert sweep.main(words) == 0
    assert "| natural | 1 |" in capsys.readouterr().out
    assert sweep.main(words) == 0
    assert "2 runs, 2 of 2 finished" in capsys.readouterr().out
