"""Flags of the training command: what is mistyped ends in one sentence and status 2."""

import os
import pathlib
import subprocess
import sys

import pytest

RECIPE = "--config=configs/digits_sgd.py"
ROOT = pathlib.Path(__file__).parent.parent


def test_overrides_of_every_type_take_effect(parse):
    config = parse(
        f"{RECIPE}:ard_prm",
        "--config.threat.eps=8/255",
        "--config.threat.step_size=2.0/255",
        "--config.epochs=3",
        "--config.data.flip=True",
        "--config.data.mean=(0.1,0.2,0.3)",
        "--config.objective=trades",
    )
    assert config.threat.eps == 8 / 255
    assert config.threat.step_size == 2 / 255
    assert config.epochs == 3
    assert config.data.flip is True
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.objective == "trades"
    assert config.masking.prm
    assert config.is_locked


def test_the_recipe_can_stand_behind_a_space(parse):
    assert parse("--config", "configs/digits_sgd.py", "--config.epochs=3").epochs == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [RECIPE, "--config.optimiser.name=sgd"],
            "'optimiser.name' is unknown; the nearest are opti",
        ),
        ([RECIPE, "--config.thraet.eps=0.1"], "the nearest are threat.eps"),
        ([RECIPE, "--config.epoch=3"], "the nearest are epochs"),
        ([RECIPE, "--config.model=vit"], "'model' is unknown; the nearest are model."),
        ([RECIPE, "--config.threat.eps=eight"], "threat.eps is 'eight'; it must be a number"),
        ([RECIPE, "--config.threat.eps=8/0"], "threat.eps is '8/0'; it must be a number"),
        ([RECIPE, "--config.epochs=2.5"], "epochs is '2.5'; it must be a whole number"),
        ([RECIPE, "--config.data.flip=maybe"], "data.flip is 'maybe'; it must be True or False"),
        ([RECIPE, "--config.epochs", "3"], "'3' is no flag"),
        ([RECIPE, "smoke"], "'smoke' is no flag"),
        ([RECIPE, "--wrokdir=x"], "workdir"),
        ([RECIPE, "--epochs=3"], "'epochs'"),
        ([RECIPE + ":smok"], "'smok' is unknown; use smoke"),
        ([RECIPE + ":model"], "write model=NAME"),
        (["--config=configs/nothing.py"], "'configs/nothing.py' can't be loaded"),
        (["--config", "configs/nothing.py"], "'configs/nothing.py' can't be loaded"),
        (["--config=configs/nothing.py:smoke", "--config.epochs=3"], "'configs/nothing.py'"),
        ([], "--config=configs/digits_sgd.py"),
        (["--workdir=x"], "--config=configs/digits_sgd.py"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_status_2(parse, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("config.epochz = 3", "epochz"),
        ("config.epochs = 'three'", "three"),
        ("import nonesuch", "nonesuch"),
        ("config.epochs = = 3", "syntax"),
    ],
)
def test_a_mistake_inside_a_recipe_is_one_sentence_too(parse, capsys, tmp_path, recipe, said):
    path = tmp_path / "mine.py"
    body = f"    config = default.get_config()\n    {recipe}\n    return config\n"
    path.write_text(f"from vit_at.configs import default\n\n\ndef get_config():\n{body}")
    with pytest.raises(SystemExit) as ended:
        parse(f"--config={path}")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def run_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vit_at.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_the_flags_and_the_command():
    ended = run_main("--help")
    assert "python -m vit_at.main --config=" in ended.stdout
    for flag in ("--config", "--workdir", "--compilation_cache"):
        assert flag in ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_refused_value_leaves_no_work_directory(tmp_path):
    workdir = tmp_path / "run"
    ended = run_main(f"{RECIPE}:smoke", "--config.threat.eps=8", f"--workdir={workdir}")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("error: threat.eps is 8;")
    assert "Traceback" not in ended.stderr
    assert not workdir.exists()
