"""The command line: its commands, and mistakes that end in one sentence and status 2."""

import errno
import importlib
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import vit_at
from vit_at import cli, configs
from vit_at.config import flatten
from vit_at.configs import default, fields
from vit_at.errors import one_sentence_errors

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
        "--config.eval.threat.eps=.5 / 255",
        "--config.name=1/2",
    )
    assert config.threat.eps == 8 / 255
    assert config.eval.threat.eps == 0.5 / 255
    assert config.name == "1/2"  # text is no number
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
    "arguments",
    [
        ["digits_sgd:ard_prm", "--config.epochs=3"],
        ["--config.epochs=3", "configs/digits_sgd.py:ard_prm"],
        ["--config=digits_sgd:ard_prm", "--config.epochs=3"],
        ["--config", "digits_sgd:ard_prm", "--config.epochs=3"],
    ],
)
def test_a_recipe_is_given_by_name_or_file_with_or_without_the_flag(parse, arguments):
    config = parse(*arguments)
    assert (config.name, config.epochs) == ("digits_sgd-ard_prm", 3)


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
        (["digits_sdg"], "'digits_sdg' is unknown; the nearest are digits_sgd,"),
        (["digits_sdg"], "'vit-at recipes' lists all"),
        (["study/masks:cpu"], "the nearest are study/masking"),
        (["elsewhere/digits_sgd.py"], "by name: the nearest are digits_sgd,"),
        (["digits_sgd:smok"], "'smok' is unknown; use smoke"),
        (["digits_sgd", "smoke"], "'smoke' is no flag"),
        (["digits_sgd", RECIPE], "'digits_sgd' is no flag"),
        (["digits_sgd", "--work=x"], "'work' is unknown; the nearest are --workdir"),
        (["digits_sgd", "--epochs=3"], "--config.epochs"),
        (["digits_sgd", "--config.epochs"], "--config.FIELD=VALUE"),
        (["digits_sgd", "--num_processes=two"], "--num_processes: invalid int value: 'two'"),
        (["tests/conftest.py"], "it has no get_config"),
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
        ("config = None", "gives no value for accumulate_steps, awp.gamma, awp.warmup_epochs"),
        ("config.unlock(); del config.data.flip", "gives no value for data.flip;"),
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


# --- Every command ----------------------------------------------------------------------------


def lines_of(capsys, *arguments, status=0) -> list[str]:
    """What ``vit-at ARGUMENTS`` prints: on stdout, or on stderr where it refuses."""
    try:
        ended = cli.main(arguments)
    except SystemExit as exit_:
        ended = exit_.code
    printed = capsys.readouterr()
    assert ended == status, printed.err
    assert not (status and printed.out)
    return (printed.err if status else printed.out).splitlines()


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_that_shows_how_it_is_called(capsys, name):
    text = "\n".join(lines_of(capsys, name, "--help"))
    assert text.startswith(f"usage: vit-at {name} ")
    assert f"    vit-at {name} " in text
    assert name in "\n".join(lines_of(capsys, "--help"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command is given; choose one of train, evaluate, report"),
        (["trian"], "command 'trian' is unknown; the nearest are train"),
        (["digits_sgd"], "command 'digits_sgd' is unknown"),
        (["--versoin"], "'versoin' is unknown; the nearest are --version"),
        (["train"], "no recipe is given"),
        (["evaluate"], "required: WORKDIR"),
        (["evaluate", "runs/x", "--dat=there"], "'dat' is unknown; the nearest are --data"),
        (["evaluate", "runs/x", "--eps=8/0"], "--eps: invalid fraction value: '8/0'"),
        (["evaluate", "runs/x", "--checkpoint=bst"], "--checkpoint: invalid choice: 'bst'"),
        (["evaluate", "nowhere"], "no work directory or export"),
        (["report"], "required: WORKDIR"),
        (["report", "nowhere", "--output=x.html"], "'output' is unknown; the nearest are --out"),
        (["export", "nowhere", "more"], "'more' is no flag"),
        (["prepare"], "required: NAME"),
        (["prepare", "cifar10", "--data=x"], "the nearest are --data_dir"),
        (["prepare", "cifar1000"], "nearest: cifar100"),
        (["recipes", "digits_sdg"], "the nearest are digits_sgd"),
        (["models", "deit_tiny"], "'deit_tiny' is unknown; the nearest are deit_tiny_"),
        (["models", "--nmae=x"], "'nmae' is unknown"),
    ],
)
def test_a_mistake_in_any_command_is_one_sentence(capsys, arguments, said):
    (line,) = lines_of(capsys, *arguments, status=2)
    assert line.startswith("error: ")
    assert said in line


def test_the_package_and_the_front_of_the_command_line_load_nothing_heavy():
    heavy = {"jax", "flax", "tensorflow", "tensorflow_datasets", "ml_collections", "numpy"}
    for code in ("import vit_at", "import vit_at.cli", "import vit_at; dir(vit_at)"):
        code = f"import sys; {code}; print({heavy} & sys.modules.keys())"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.stdout.strip() == "set()", ended.stderr


def test_what_the_package_exports_is_what_its_home_has():
    assert set(vit_at.__all__) <= set(dir(vit_at))
    for name in vit_at.__all__:
        assert getattr(vit_at, name) is not None
    assert vit_at.create is importlib.import_module("vit_at.models").create
    assert vit_at.train is importlib.import_module("vit_at.training.loop").train
    assert callable(vit_at.autoattack.run)
    assert callable(vit_at.evaluate)
    assert vit_at.evaluate.evaluate.__name__ == "evaluate"
    with pytest.raises(AttributeError, match="no attribute 'crate'"):
        vit_at.crate  # noqa: B018


# --- What there is: fields, recipes, models, completions ---------------------------------------


def test_every_field_has_a_meaning_and_no_meaning_is_left_over():
    config = default.get_config()
    groups = {field.rpartition(".")[0] for field in flatten(config) if "." in field}
    assert sorted(fields.meanings()) == sorted([*flatten(config), *groups])
    for name, meaning in fields.meanings().items():
        assert len(meaning) > 5, name
        assert not re.match("likewise", meaning), name  # a line of the help stands alone


def test_help_of_a_recipe_lists_every_field_with_the_recipes_value(capsys):
    lines = lines_of(capsys, "train", "digits_sgd:ard_prm", "--config.seed=7", "--help")
    text = "\n".join(lines)
    for field in flatten(default.get_config()):
        assert f"  {field}=" in text
    assert "  threat.eps=0.15  " in text
    assert "  seed=7  " in text
    assert "  masking.ard=True  " in text
    (line,) = (line for line in lines if line.startswith("  data.flip="))
    assert line.split("  ", 2)[2].strip() == fields.meanings()["data.flip"]


def test_the_list_of_recipes_has_each_with_its_cost_and_variants(capsys):
    text = "\n".join(lines_of(capsys, "recipes"))
    for name in configs.names():
        assert re.search(rf"^{name} +\S.*\n +[\d.]+ [GTPE]FLOP a run", text, re.MULTILINE), name
    assert "variants cpu, small, gpu, paper, trades, mart" in text
    assert "model=NAME" in text
    assert "Expected clean / PGD-20" in "\n".join(lines_of(capsys, "recipes", "digits_sgd"))


def test_the_list_of_models_has_parameters_and_cost(capsys):
    names = ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
    tiny, swin = lines_of(capsys, "models", *names)
    assert re.fullmatch(r"deit_tiny_patch16_224 +5\.7 M +2\.\d GFLOP +224 px, patch 16", tiny)
    assert re.fullmatch(r"swin_tiny\S+ +28\.3 M +9\.0 GFLOP +224 px, patch 4", swin)


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_commands_recipes_and_models(capsys, shell):
    script = "\n".join(lines_of(capsys, f"--print-completion={shell}"))
    words = ("evaluate", "study/masking", "deit_tiny_patch16_224", "num_examples", "workdir")
    assert all(word in script for word in words)


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


def test_output_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, "-m", "vit_at", "recipes"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_the_traceback_of_an_explained_error_is_kept_in_the_work_directory(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, one_sentence_errors(str(tmp_path)):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "results.json")
    assert ended.value.code == 2
    kept = tmp_path / "traceback.txt"
    said = capsys.readouterr().err
    assert str(kept) in said
    assert said.count("\n") == 1
    assert "OSError: [Errno 27] File too large: 'results.json'" in kept.read_text()


def test_the_home_of_no_user_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "folder", "--config.data.name=folder:~nobody-of-this-name/x"])
    assert ended.value.code == 2
    assert "a path begins with ~ and a name that is no user" in capsys.readouterr().err


def test_an_interruption_while_a_command_is_imported_is_a_sentence(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["models"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; the same command starts again\n"


def test_a_bug_passes_the_boundary_and_an_interruption_is_130(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), one_sentence_errors(str(tmp_path)):
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as ended, one_sentence_errors(str(tmp_path)):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; the same command starts again\n"
    assert not list(tmp_path.iterdir())
