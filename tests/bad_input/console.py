"""Logging to Weights & Biases: names of projects, and a package that is not there."""

import sys
import unittest.mock

from bad_input.case import Case

from vit_at.configs import digits_sgd
from vit_at.training.loop import train


def named(project):
    return Case(
        ["train", "digits_sgd:smoke", f"--wandb={project}"], "can't name a Weights & Biases"
    )


def without_the_package(folder):
    with unittest.mock.patch.dict(sys.modules, {"wandb": None}):
        train(digits_sgd.get_config("smoke"), folder / "run", wandb="vits")


CASES = {
    "wandb without a project": Case(
        ["train", "digits_sgd:smoke", "--wandb"], "expected one argument"
    ),
    "project with its owner": named("me/vits"),
    "project as an address": named("https://wandb.ai/me/vits"),
    "project with a percent sign": named("100%"),
    "project of spaces": named("  "),
    "project of two lines": named("a\nb"),
    "project too long": named("v" * 129),
    "project that is True": Case(
        lambda folder: train(digits_sgd.get_config("smoke"), folder / "run", wandb=True),
        "--wandb=True can't name",
    ),
    "wandb that is not installed": Case(without_the_package, "needs the package wandb; install it"),
    "misspelled wandb": Case(["train", "digits_sgd", "--wanbd=vits"], "the nearest are --wandb"),
    "wandb as a field": Case(["train", "digits_sgd", "--config.wandb=vits"], "'wandb' is unknown"),
    "wandb for an evaluation": Case(["evaluate", ".", "--wandb=vits"], "'wandb' is unknown"),
}
