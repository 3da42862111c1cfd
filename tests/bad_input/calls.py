"""Evaluations: names of attacks, options, calls of ``vit_at.evaluate``, and damaged runs."""

import functools
import json
import shutil
import tempfile

import numpy as np
import runs
from bad_input.case import Case
from etils import epath

import vit_at
from vit_at.workdir.files import locked


@functools.cache
def trained() -> tempfile.TemporaryDirectory:
    """A run that all cases of a process copy; deleted when the process ends."""
    folder = tempfile.TemporaryDirectory()
    runs.trained(folder.name)
    return folder


def a_run(folder):
    shutil.copytree(trained().name, folder / "run")


def option(text, says, **more):
    """An option of the command, for a run that has been trained."""
    return Case(["evaluate", "run", "--attacks=pgd-1", *text.split(" ")], says, a_run, **more)


def word(text, says):
    """An option that is refused before a directory is read."""
    return Case(["evaluate", ".", *text.split(" ")], says)


def attacks(names, says=""):
    says = says or "is unknown; write clean, pgd-N or cw-N with N steps, 1 to 999999"
    return Case(["evaluate", "run", f"--attacks={names}"], says, a_run)


def call(says, **options):
    """A call from Python, for a run that has been trained."""

    def deed(folder):
        vit_at.evaluate(**{"source": folder / "run"} | options)

    return Case(deed, says, a_run)


def damaged(change, says, **more):
    """An evaluation of a run that ``change(its folder)`` has damaged."""

    def prepare(folder):
        a_run(folder)
        change(folder / "run")

    return Case(["evaluate", "run", "--attacks=clean"], says, prepare, **more)


def another_model(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["name"] = "vit_base_patch16"
    (run / "config.json").write_text(json.dumps(config))


def cut_arrays(run):
    for path in (run / "checkpoints" / "best").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])


def in_use(folder):
    with locked(epath.Path(folder / "run"), "evaluation"):
        vit_at.evaluate(folder / "run", "clean")


CLEAN = ["evaluate", "run", "--attacks=clean"]
COMMANDS = {
    "examples as a fraction": word("--num_examples=1.5", "invalid int value: '1.5'"),
    "batch size as a word": word("--batch_size=big", "invalid int value: 'big'"),
    "restarts as a float": word("--restarts=1e3", "invalid int value: '1e3'"),
    "eps of two slashes": word("--eps=8/255/2", "invalid fraction value: '8/255/2'"),
    "eps left empty": word("--eps=", "invalid fraction value: ''"),
    "eps with a decimal comma": Case(
        ["evaluate", "run", "--eps=0,03"], "eps is 3; .*did you mean 3/255", a_run
    ),
    "step size divided by zero": word("--step_size=2/0", "invalid fraction value: '2/0'"),
    "checkpoint left empty": word("--checkpoint=", "invalid choice: ''"),
    "misspelled attacks": word("--atacks=clean", "the nearest are --attacks"),
    "option of another command": word("--output=run", "option 'output' is unknown"),
    "field of the configuration": word("--config.threat.eps=0.1", "'config.threat.eps' is unknown"),
    "attacks without a value": word("--attacks", "expected one argument"),
}
ATTACKS = {
    "steps in exponents": attacks("pgd-1e2"),
    "steps in wide digits": attacks("pgd-\uff12\uff10"),
    "steps with zeros in front": attacks("pgd-007"),
    "steps beyond 32 bits": attacks("pgd-10000000000"),
    "comma at the end": attacks("clean,", "attack '' is unknown"),
    "misspelled attack": attacks("autoatack"),
    "steps of Square": attacks("square-100"),
    "steps of clean accuracy": attacks("clean-5"),
    "attack that only training has": attacks("trades"),
}
VALUES = {
    "eps beyond the image range": option("--eps=1.0001", "eps is 1.0001; .* at most 1"),
    "step size that is no number": option("--step_size=nan", "step_size is nan"),
    "more examples than there are": option(
        "--num_examples=49", "49 examples .* has 48", corrected=[*CLEAN, "--num_examples=48"]
    ),
    "restarts that fill the memory": option("--restarts=1000000000", "it must be at most 1000"),
    "split that selects nothing": option("--split=test[5:2]", "selects no examples"),
    "split over 100 percent": option("--split=test[:110%]", "no split"),
    "split that is a path": option("--split=../..", "no split '../..'"),
    "split that holds images twice": option("--split=test+test", "359 images of 'test' more than"),
    "split whose parts overlap": option("--split=test[:9]+test[5:7]", "2 images of 'test' more"),
}
CALLS = {
    "no directory": call("source is None; it must be the path", source=None),
    "directory as a number": call("source is 5; it must be the path", source=5),
    "directory as bytes": call("source is b'run'; it must be the path", source=b"run"),
    "attacks as a list": call(r"attacks is \['clean'\]; it must be a string", attacks=["clean"]),
    "attacks as bytes": call("attacks is b'clean'; it must be a string", attacks=b"clean"),
    "checkpoint by a word": call("'bets'; it must be best, last", checkpoint="bets"),
    "checkpoint by a path": call("it must be best, last", checkpoint="best/../last"),
    "split as a slice": call(r"split is slice\(.*; it must be a string", split=slice(3)),
    "examples as text": call("num_examples is 'all'; it must be a whole", num_examples="all"),
    "half an example": call("num_examples is 2.5; it must be a whole", num_examples=2.5),
    "examples as a switch": call("num_examples is True; it must be a whole", num_examples=True),
    "norm as a number": call("norm is 2; it must be a string", norm=2),
    "norm by a wrong word": call(
        "--norm is linff, where 'linff' is unknown; name one of linf", norm="linff", eps=0.1
    ),
    "norm with a comma at its end": call("where '' is unknown", norm="linf,", eps=[0.1, 0.1]),
    "eps as a table": call(r"eps is \[\[0.5\]\]; it must be", eps=np.array([[0.5]])),
    "eps with a switch": call(r"eps is \[True, 0.1\]; it must be", eps=(True, 0.1)),
    "several step sizes": call("step_size is .*; it must be a number", step_size=[0.1, 0.2]),
    "eps as text": call("eps is '8/255'; it must be a number", eps="8/255"),
    "eps as a list of texts": call("eps is .*'0.1'.*; it must be a number", eps=["0.1"]),
    "complex eps": call("eps is 1j; it must be a number", eps=1j),
    "eps as a switch": call("eps is True; it must be a number", eps=True),
    "step size as text": call("step_size is '1/255'; it must be", step_size="1/255"),
    "infinite step size": call("step_size is inf", step_size=float("inf")),
    "restarts as text": call("restarts is '2'; it must be a whole number", restarts="2"),
    "no batch size": call("batch_size is None; it must be a whole number", batch_size=None),
    "no seed": call("seed is None; it must be a whole number", seed=None),
    "data directory as a number": call("data_dir is 5; it must be a string", data_dir=5),
}
DIRECTORIES = {
    "run without its best checkpoint": damaged(
        lambda run: shutil.rmtree(run / "checkpoints" / "best"),
        "holds no 'best' checkpoint",
        corrected=[*CLEAN, "--checkpoint=last"],
    ),
    "run of an unknown model": damaged(another_model, "'vit_base_patch16' is unknown"),
    "checkpoint cut short": damaged(cut_arrays, "the 'best' checkpoint .* can't be read"),
    "run in use": Case(in_use, "in use by another evaluation", a_run),
}
CASES = COMMANDS | ATTACKS | VALUES | CALLS | DIRECTORIES
