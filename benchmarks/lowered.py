"""Our programs for the devices of any mesh, lowered on shapes alone: ``compiled`` compiles them.

step         the training step
evaluate     the evaluation of one batch, such as PGD-20
autoattack   a round of one attack of AutoAttack
"""

import argparse
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import limits
import numpy as np
from common import Case
from jax.sharding import NamedSharding

from vit_at import main, models
from vit_at.attacks import Threat
from vit_at.attacks.autoattack import methods
from vit_at.attacks.autoattack.methods import Context, Problem
from vit_at.attacks.autoattack.programs import Program, Slots
from vit_at.attacks.autoattack.settings import Settings
from vit_at.distributed import sharding
from vit_at.evaluation.evaluator import make_outcome_fn
from vit_at.evaluation.protocol import Attack, parse_attacks
from vit_at.training import optim
from vit_at.training.setup import Setup, compile_step, resolve
from vit_at.training.step import init_state

STEPS_PER_EPOCH = 1000


def make_setup(options: argparse.Namespace, overrides: list[str], mesh: Any) -> Setup:
    """A recipe's setup without data. Evaluations run in float32, as they always do."""
    config, _ = main.parse([options.recipe, *overrides])
    with config.unlocked():
        config.model.name = options.shape.get("model", config.model.name)
        config.model.patch_size = options.shape.get("patch_size", config.model.patch_size)
        config.data.image_size = options.shape.get("image_size", config.data.image_size)
        config.model.depth = options.depth or config.model.depth
        config.batch_size = options.batch_per_device * mesh.size
        config.dtype = config.dtype if options.program == "step" else "float32"
    config = resolve(config, mesh)
    model = models.build(config, options.classes, config.dtype)
    data: Any = types.SimpleNamespace(num_classes=options.classes)
    return Setup(config, mesh, data, None, data, model, STEPS_PER_EPOCH)


def case(setup: Setup, options: argparse.Namespace) -> Case:
    """The case of this program on one device."""
    config, is_step = setup.config, options.program == "step"
    threat = Threat.of(config.threat) if is_step else _evaluated(setup, options).threat
    return Case(
        model=config.model.name,
        image_size=config.data.image_size,
        patch_size=config.model.patch_size,
        batch=options.batch_per_device,
        objective=config.objective if is_step else "pgd",
        masked=config.masking.ard or config.masking.prm,
        steps=threat.steps,
        dtype=config.dtype,
        depth=config.model.depth,
    )


def title(setup: Setup, options: argparse.Namespace) -> str:
    """Such as 'step: deit_tiny_patch16_224 32/4 b64 at-10 bfloat16'."""
    return f"{options.program}: {case(setup, options).title} {setup.config.dtype}"


def needed_flop(setup: Setup, options: argparse.Namespace) -> float:
    """Operations of a device that the program needs; of AutoAttack's program, those of no step."""
    return limits.case_flops(case(setup, options), setup.config)


def _evaluated(setup: Setup, options: argparse.Namespace) -> Attack:
    """The attack of ``evaluate``; PGD-20 where none is named, and beside AutoAttack's rounds."""
    name = options.attack if options.program == "evaluate" else ""
    return parse_attacks(name or "pgd-20", Threat.of(setup.config.threat))[0]


def _apply(setup: Setup) -> models.Classifier:
    return models.classifier(setup.model, setup.config.data.mean, setup.config.data.std)


def _params(setup: Setup) -> Any:
    params = jax.eval_shape(functools.partial(models.init_params, setup.model), jax.random.key(0))
    return _placed(params, setup.mesh, sharding.WHOLE)


def _placed(shapes: Any, mesh: Any, spec: Any) -> Any:
    lies = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes)


def _batch(setup: Setup, **dtypes: Any) -> dict[str, Any]:
    count, size = setup.config.batch_size, setup.config.data.image_size
    image = (count, size, size, len(setup.config.data.mean))
    shapes = {
        name: jax.ShapeDtypeStruct(image if name == "image" else (count,), dtype)
        for name, dtype in dtypes.items()
    }
    return _placed(shapes, setup.mesh, sharding.SPLIT)


def step(setup: Setup, options: argparse.Namespace) -> Any:
    """The training step, lowered."""
    optimizer = optim.make_optimizer(setup.config, STEPS_PER_EPOCH)
    ema = setup.config.ema_decay > 0
    state = jax.eval_shape(lambda params: init_state(params, optimizer, ema), _params(setup))
    layout = sharding.layout(state, setup.mesh, setup.config.sharding)
    state = jax.tree.map(
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), state, layout
    )
    batch = _batch(setup, image=np.uint8, label=np.int32)
    return compile_step(setup, optimizer).lower(state, batch)


def evaluate(setup: Setup, options: argparse.Namespace) -> Any:
    """The evaluation of one batch, lowered."""
    outcome = make_outcome_fn(_apply(setup), _evaluated(setup, options), setup.mesh, seed=0)
    batch = _batch(setup, image=np.uint8, label=np.int32, index=np.uint32)
    return jax.jit(outcome).lower(_params(setup), batch)


def autoattack(setup: Setup, options: argparse.Namespace) -> Any:
    """A round of one attack, lowered."""
    threat = setup.config.threat
    settings = Settings(threat.norm, threat.eps, mesh=setup.mesh)
    method = methods.make(options.attack or "apgd-ce", settings, options.classes)
    unstacked = functools.partial(models.unstack_blocks, _apply(setup))
    params = jax.eval_shape(unstacked, _params(setup))
    model = jax.tree_util.Partial(_apply(setup), _placed(params, setup.mesh, sharding.WHOLE))
    context = Context(model, jnp.uint32(0), jnp.float32(threat.eps))
    arrays = _batch(setup, image=np.float32, labels=np.int32, targets=np.int32, index=np.uint32,
                    run=np.int32)  # fmt: skip
    problem = Problem(*arrays.values())
    state = _placed(jax.eval_shape(method.start, context, problem), setup.mesh, sharding.SPLIT)
    slots = Slots(problem, state, _batch(setup, active=bool)["active"])
    with jax.default_matmul_precision("highest"):
        program = Program(method, setup.mesh, settings.randomised)
        return Program.advance.lower(program, context, slots, jnp.int32(25))
