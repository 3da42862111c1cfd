"""Commands and options: names, missing arguments, directories that are no run."""

from bad_input.case import Case

CASES = {
    "no command": Case([], "no command is given; choose one of train"),
    "unknown command": Case(["trian"], "'trian' is unknown; the nearest are train"),
    "unknown shell": Case(["--print-completion=fish"], "invalid choice: 'fish'"),
    "no recipe": Case(["train"], "no recipe is given; name one"),
    "unknown recipe": Case(["train", "digits"], "'digits' is unknown"),
    "recipe file that is not there": Case(["train", "mine.py"], "'mine.py' can't be loaded"),
    "unknown variant": Case(["train", "digits_sgd:smok"], "'smok' is unknown"),
    "two recipes": Case(["train", "digits_sgd", "--config=digits_sgd"], "is no flag"),
    "abbreviated option": Case(["train", "digits_sgd", "--work=x"], "the nearest are --workdir"),
    "field without config": Case(["train", "digits_sgd", "--epochs=3"], "'epochs' is unknown"),
    "flag without a value": Case(["train", "digits_sgd", "--workdir"], "expected one argument"),
    "evaluate nothing": Case(["evaluate"], "required: WORKDIR"),
    "evaluate a folder that is not there": Case(["evaluate", "runs/x"], "runs/x"),
    "evaluate an empty folder": Case(["evaluate", "."], "config.json"),
    "checkpoint by a wrong name": Case(["evaluate", ".", "--checkpoint=lst"], "invalid choice"),
    "examples as a word": Case(["evaluate", ".", "--num_examples=all"], "invalid int value: 'all'"),
    "eps divided by zero": Case(["evaluate", ".", "--eps=8/0"], "invalid fraction value: '8/0'"),
    "report of nothing": Case(["report"], "required"),
    "report of a folder that is not there": Case(["report", "runs/x"], "runs/x"),
    "export of a folder that is not there": Case(["export", "runs/x"], "runs/x|required"),
    "prepare nothing": Case(["prepare"], "required"),
    "sweep of a recipe without one": Case(["sweep", "nothing"], "'nothing' is unknown"),
    "unknown model": Case(["models", "vit"], "'vit' is unknown; the nearest are vit_base"),
}
