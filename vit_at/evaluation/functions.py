"""A function MODULE:NAME as what is evaluated: found, checked, and identified by what it computes.

of_function   the subject of such a function
"""

import importlib
import os
import re
import sys
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_at.attacks.autoattack import checks, flags
from vit_at.errors import UserError, in_one_line
from vit_at.evaluation.subject import Subject, results_directory

_PROBES = 8  # images on which a function is identified and checked
_PROBABILITY = 1e-2  # by which sums of probabilities may miss 1, also in half precision

Function = Callable[[jax.Array], jax.Array]


def of_function(name: str, config: ConfigDict, image_size: int = 0) -> Subject:
    """That of 'MODULE:NAME', a function of images [B, H, W, C] in [0, 1] to logits [B, K].

    JAX must be able to trace it. MODULE is imported, also from the current directory. A function
    has no parameters to hash. Its logits on a few fixed images and their gradient take their place,
    so its digest changes with the function's weights, and with its gradient alone (BPDA). It also
    differs between kinds of device, which round differently.

    Raises:
      UserError: there is no such function, or it does not map images to logits: finite ones, each
        image's independent of the others.
    """
    config.data.image_size = image_size or config.data.image_size
    if config.data.name == "digits":
        config.data.mean, config.data.std = config.data.mean[:1], config.data.std[:1]
    function = _imported(name)
    shape = (_PROBES, *[config.data.image_size] * 2, len(config.data.mean))
    images = np.random.default_rng(0).random(shape, np.float32)
    try:
        logits = jax.jit(function)(images)
    except Exception as error:  # of a function of the user's
        reason = f"{type(error).__name__}: {in_one_line(error, 200)}"
        raise UserError(
            f"--function is '{name}', which JAX can't trace on images {list(shape)} ({reason}); "
            "give a function of images [B, H, W, C] in [0, 1] to logits [B, K], and --image_size"
        ) from error
    if getattr(logits, "shape", ())[:-1] != (_PROBES,):
        raise UserError(
            f"--function is '{name}', which gives {np.shape(logits)} for images {list(shape)}; it "
            "must give logits [B, K]"
        )
    _check_logits(name, function, images, np.asarray(logits, np.float32))
    return Subject(
        lambda params, images01: function(images01),
        {"logits": logits} | _gradient(function, images, logits),
        config,
        {"source": name},
        results_directory(name.replace(":", ".")),
        logits.shape[-1],
    )


def _check_logits(name: str, function: Function, images: np.ndarray, logits: np.ndarray) -> None:
    """Refuses logits of which no accuracy can be told; warns of those that mislead attacks.

    AutoAttack checks the same; here it also holds for clean images, PGD and CW.
    """
    if bad := int((~np.isfinite(logits)).any(1).sum()):
        raise UserError(
            f"--function is '{name}', which gives NaN or infinity for {bad} of {_PROBES} random "
            "images; check its weights and its normalisation"
        )
    if (logits >= 0).all() and (abs(logits.sum(1) - 1) < _PROBABILITY).all():
        print(
            f"--function is '{name}', whose outputs are probabilities, not logits: the "
            "cross-entropy has vanishing gradients on them, so PGD overestimates robustness; "
            "return the logits, before the softmax",
            file=sys.stderr,
        )
    if found := flags.hidden_state(function, images):
        print(
            f"--function is '{name}', which gives other logits whenever JAX traces it ({found}): "
            "no result can be reproduced; draw no random numbers in it, or use a fixed "
            "jax.random.key",
            file=sys.stderr,
        )
        return

    def logits_at(places: np.ndarray) -> np.ndarray:
        batch = np.zeros_like(images)  # of one size, so that nothing else is compiled
        batch[: len(places)] = images[places]
        return np.asarray(jax.jit(function)(batch), np.float32)[: len(places)]

    try:
        checks.check_independence(logits_at, logits)
    except UserError as error:
        raise UserError(f"--function is '{name}', but {error}") from None


def _gradient(function: Function, images: np.ndarray, logits: jax.Array) -> dict[str, np.ndarray]:
    """{'gradient': [n] its length by each image, of weighted logits}; {} where JAX finds none.

    In two digits: on GPUs, the gradient of a convolution differs in the last bits from run to run.
    """
    weights = np.random.default_rng(1).standard_normal(logits.shape).astype(logits.dtype)

    @jax.jit
    def gradient(x):
        return jax.vjp(function, x)[1](weights)[0]

    try:
        traced = gradient.lower(images)
    except Exception:  # of a function of the user's, which only clean images and Square can use
        return {}
    lengths = np.linalg.norm(np.asarray(traced.compile()(images)).reshape(len(images), -1), axis=1)
    return {"gradient": np.array([float(f"{length:.2g}") for length in lengths])}


def _imported(name: str) -> Function:
    """The function of 'MODULE:NAME'."""
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise UserError(f"--function is '{name}'; write MODULE:NAME, such as mymodel:logits")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of a module of the user's
        reason = f"{type(error).__name__}: {in_one_line(error, 200)}"
        raise UserError(
            f"--function is '{name}', but module '{module}' can't be imported ({reason}); run the "
            "command where it lies, or correct it"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise UserError(
            f"--function is '{name}', but module '{module}' has no function '{attribute}'; name "
            "one that it has"
        )
    return function
