"""Our training step and PGD evaluation, exactly as ``vit_at.main`` runs them, on made-up images."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import CLASSES, EPS, STEP_SIZE, Case

from vit_at import models
from vit_at.attacks import Threat
from vit_at.configs import default
from vit_at.data.examples import Examples
from vit_at.distributed import sharding
from vit_at.evaluation.evaluator import make_outcome_fn
from vit_at.evaluation.protocol import Attack
from vit_at.training import optim
from vit_at.training.setup import Setup, compile_step, initial_state, resolve

STEPS_PER_EPOCH = 1000


def configuration(case: Case, changes: dict[str, Any] | None = None) -> Any:
    """The default recipe with the case's values, from scratch and without augmentation.

    changes: values of further fields.
    """
    config = default.get_config()
    with config.unlocked():
        config.objective = "at" if case.objective == "pgd" else case.objective
        config.batch_size, config.dtype = case.batch, case.dtype
        config.model.name, config.model.depth = case.model, case.depth
        config.model.patch_size, config.model.pretrained = case.patch_size, ""
        config.model.fused_attention = not case.plain_attention
        config.data.image_size = case.image_size
        config.data.crop_padding, config.data.flip = 0, False
        config.mixing.probability = 0.0
        config.threat.steps = case.steps
        config.masking.ard = config.masking.prm = case.masked
        config.masking.keep_max, config.masking.warmup_epochs = case.keep, 1e-9
        config.update_from_flattened_dict(changes or {})
    return resolve(config, sharding.make_mesh())


def make_setup(case: Case, changes: dict[str, Any] | None = None) -> Setup:
    """A setup on random images, on all devices; changes: of the configuration."""
    config = configuration(case, changes)
    rng = np.random.default_rng(0)
    shape = (case.batch, case.image_size, case.image_size, 3)
    images = rng.integers(0, 256, shape).astype(np.uint8)
    labels = rng.integers(0, CLASSES, case.batch).astype(np.int32)
    rows, names = np.arange(case.batch), tuple(map(str, range(CLASSES)))
    examples = Examples(
        "random", names, images.shape[1:], rows, rows, lambda r: (images[r], labels[r])
    )
    model = models.build(config, CLASSES, config.dtype)
    return Setup(config, sharding.make_mesh(), examples, None, examples, model, STEPS_PER_EPOCH)


def runner(case: Case) -> Callable[[], None]:
    """What does the case once, and waits for its end, each time it is called."""
    if case.objective == "pgd":
        return _evaluation(case)
    return training(make_setup(case), case.batch)[0]


def training(setup: Setup, batch_size: int) -> tuple[Callable[[], None], jax.stages.Compiled]:
    """(takes one training step and waits for its end each time it is called, its program)."""
    optimizer = optim.make_optimizer(setup.config, STEPS_PER_EPOCH)
    state = initial_state(setup, optimizer)
    images, labels = setup.train_set.read(np.arange(batch_size))

    def batch():
        return sharding.split_batch({"image": images, "label": labels}, setup.mesh)

    step = compile_step(setup, optimizer).lower(state, batch()).compile()

    def run():
        nonlocal state
        state, metrics = step(state, batch())
        jax.block_until_ready((state, metrics))

    return run, step


def _evaluation(case: Case):
    """On labels that the model predicts, and under a tiny eps: so that every image stays active."""
    setup = make_setup(case)
    apply = models.classifier(setup.model, setup.config.data.mean, setup.config.data.std)
    params = initial_state(setup, optim.make_optimizer(setup.config, STEPS_PER_EPOCH)).params
    threat = Threat("linf", EPS * 1e-5, STEP_SIZE * 1e-5, case.steps)
    outcome = make_outcome_fn(apply, Attack("pgd", "pgd", threat), setup.mesh, seed=0)
    images, _ = setup.train_set.read(np.arange(case.batch))
    logits = jax.jit(apply)(params, images.astype(np.float32) / 255)
    labels = np.argmax(np.asarray(logits), -1).astype(np.int32)
    index = np.arange(case.batch, dtype=np.uint32)

    def run():
        batch = {"image": images, "label": labels, "index": index}
        jax.block_until_ready(outcome(params, sharding.split_batch(batch, setup.mesh)))

    return run


def memory_peak() -> int | None:
    """Bytes of device memory at most in use so far; None where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
