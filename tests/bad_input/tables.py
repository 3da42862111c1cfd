"""Curves over eps, unions over norms, and transfer: options of ``vit-at evaluate``."""

from bad_input.calls import a_run
from bad_input.case import Case

import vit_at


def _command(*options: str, says: str) -> Case:
    return Case(["evaluate", "run", *options], says, prepare=a_run)


CASES = {
    "empty eps in a list": _command("--eps=0,,0.1", says="invalid fraction value: ''"),
    "eps by semicolons": _command("--eps=1/255;2/255", says="invalid fraction value"),
    "a negative eps in a list": _command("--eps=0.1,-0.1", says="--eps is -0.1; it must be over 0"),
    "a list of zeros": _command("--eps=0,0", says="--eps is 0, which is the clean images"),
    "a list in 255ths": _command("--eps=0,8", says="eval.threat.eps is 8; .* did you mean 8/255"),
    "a step too long for the smallest eps": _command(
        "--eps=0.01,0.1", "--step_size=0.05", says="at most twice eval.threat.eps"
    ),
    "an unknown norm in a list": _command("--norm=linf,l3", says="invalid choice: 'l3'"),
    "a norm twice": _command(
        "--norm=linf,linf", "--eps=0.1,0.2", says="has a norm twice; name each once"
    ),
    "two norms without eps": _command(
        "--norm=linf,l2", says="give --eps too|give one eps for each norm"
    ),
    "two norms and one eps": _command(
        "--norm=linf,l2", "--eps=0.1", says="--eps has 1 values; give one eps for each norm"
    ),
    "two norms and one step": _command(
        "--norm=linf,l2",
        "--eps=0.1,0.5",
        "--step_size=0.1",
        says="--step_size is 0.1 for the norms",
    ),
    "transfer from nowhere": _command(
        "--attacks=pgd-2", "--from=run2", says="no work directory or export 'run2'"
    ),
    "transfer from a gap in a list": _command(
        "--attacks=pgd-2", "--from=run2,,run3", says="--from is 'run2,,run3', where a directory"
    ),
    "transfer from itself": _command(
        "--attacks=pgd-2", "--from=run", says="a model is there twice"
    ),
    "transfer of AutoAttack": _command(
        "--attacks=autoattack", "--from=run2", says="takes pgd-N and cw-N only"
    ),
    "transfer without an attack": _command(
        "--attacks=clean", "--from=run2", says="without an attack; add one"
    ),
    "transfer over eps": _command(
        "--attacks=pgd-2", "--eps=0.05,0.1", "--from=run2", says="give one eps and one norm"
    ),
    "from Python: eps as a list of texts": Case(
        lambda folder: vit_at.evaluate(folder / "run", "pgd-2", eps=["0.1", "0.2"]),
        "eps is .*'0.1'.*; it must be a number, or a tuple of numbers",
        a_run,
    ),
}
