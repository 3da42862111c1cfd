"""One training step: accumulation, devices, collectives, donation, averaging."""

import functools
import pathlib
import re
import types

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tpu_blocks
from ml_collections import FrozenConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.config import evaluated_weights
from vit_at.data import augment
from vit_at.distributed import sharding
from vit_at.models import tpu_attention, training_dtype
from vit_at.models.blocks import Unstacked
from vit_at.training.attack import Draws, draw, perturb
from vit_at.training.masking import Masking
from vit_at.training.setup import compile_step, initial_state
from vit_at.training.step import TrainState, _update

SHAPE = (6, 8, 8, 3)


# --- Steps ------------------------------------------------------------------------------------

# Two settings only, so that few programs have to be compiled.
MASKED = {
    "masking__ard": True,
    "masking__prm": True,
    "masking__warmup_epochs": 1.0,
    "threat__eps_warmup_epochs": 2.0,
    "epochs": 3,
}
NATURAL = {"objective": "natural", "ema_decay": 0.75, "label_smoothing": 0.3}


def start(num_devices=1, **changes):
    """(setup, first state, batches on the devices)."""
    setup = runs.tiny_setup(num_devices, **changes)
    state = initial_state(setup, runs.optimizer_of(setup))
    return setup, state, (sharding.split_batch(b, setup.mesh) for b in runs.batches(setup, 99))


def values(metrics):
    return {name: float(value) for name, value in metrics.compute().items()}


@functools.cache  # several tests compare with the same steps
def take_steps(count, num_devices=1, **changes):
    """(metrics of each step, final state), on the host."""
    setup, state, batches = start(num_devices, **changes)
    batch = next(batches)
    step = runs.compiled_step(setup, state, batch)
    history = []
    for _ in range(count):
        state, metrics = step(state, batch)
        history.append(values(metrics))
        batch = next(batches)
    return history, jax.device_get(state)


@pytest.mark.parametrize(
    ("objective", "devices"),
    [runs.slow("at", 2), ("at", 4), runs.slow("trades", 4), runs.slow("mart", 4)],
)
def test_results_do_not_depend_on_the_number_of_devices(objective, devices):
    """In l2, where rounding stays small: a sign near 0 would turn it into two steps of a pixel."""
    options = MASKED | {"threat__norm": "l2", "threat__eps": 0.5, "threat__step_size": 0.25}
    one, _ = take_steps(4, 1, objective=objective, **options)
    several, _ = take_steps(4, devices, objective=objective, **options)
    # TRADES starts where its gradient is the difference of nearly equal logits: rounding grows.
    tolerance = 1e-2 if objective == "trades" else 1e-5
    for a, b in zip(one, several, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=2e-6)
    assert len({metrics["loss"] for metrics in one}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_a_step_with_scanned_blocks_is_the_same(objective, monkeypatch):
    """As for a plain function, whose parameters ``unstack_blocks`` does not change."""
    options = MASKED | {"threat__norm": "l2", "threat__eps": 0.5, "threat__step_size": 0.25}
    laid_out, state = take_steps(4, 1, objective=objective, **options)
    monkeypatch.setattr(models, "unstack_blocks", lambda apply, params: params)
    scanned, of_scanned = take_steps.__wrapped__(4, 1, objective=objective, **options)
    tolerance = 1e-2 if objective == "trades" else 1e-5  # as between numbers of devices
    for a, b in zip(laid_out, scanned, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=2e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, state.params, of_scanned.params)


def test_attention_is_by_a_kernel_unless_the_configuration_says_otherwise(monkeypatch):
    of_device = models.for_device
    on_a_tpu = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(models, "for_device", lambda apply, _: of_device(apply, on_a_tpu))
    ran = tpu_blocks.stand_in(monkeypatch, tpu_attention)
    for fused in (False, True):
        setup, state, batches = start(model__fused_attention=fused)
        setup = setup._replace(model=setup.model.clone(dtype="bfloat16"))
        assert not ran
        compile_step(setup, runs.optimizer_of(setup)).lower(state, next(batches))
    assert set(ran) == {"attention_forward", "attention_backward"}


@pytest.mark.slow
def test_stochastic_depth_does_not_depend_on_devices_or_micro_batches():
    def step(devices, drop_path, **changes):
        setup = runs.tiny_setup(devices, objective="natural", **changes)
        setup = setup._replace(model=setup.model.clone(drop_path=drop_path))
        state = initial_state(setup, runs.optimizer_of(setup))
        batch = sharding.split_batch(next(runs.batches(setup, 1)), setup.mesh)
        _, metrics = runs.compiled_step(setup, state, batch)(state, batch)
        return values(metrics)

    one = step(1, 0.5)
    assert step(4, 0.5, accumulate_steps=2) == pytest.approx(one, rel=1e-5)
    assert step(1, 0.0)["loss"] != pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("parts", [2, runs.slow(4)])
def test_accumulation_does_not_change_the_update(parts):
    """AT with masks: the draws are those of the whole batch."""
    plain_history, plain = take_steps(1, **MASKED)
    history, state = take_steps(1, accumulate_steps=parts, **MASKED)
    assert history[0] == pytest.approx(plain_history[0], rel=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.params, plain.params)
    jax.tree.map(close, state.opt_state, plain.opt_state)


def test_eps_and_keep_probability_grow_with_the_epochs_done():
    """Four steps an epoch: eps is whole after two epochs, the keep probability after one."""
    history, _ = take_steps(9, **MASKED)
    eps = [metrics["eps"] for metrics in history]
    np.testing.assert_allclose(eps, [*np.arange(1, 9) / 80, 0.1], rtol=1e-6)
    keep = [metrics["keep_probability"] for metrics in history]
    np.testing.assert_allclose(keep, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1], rtol=1e-6)


def test_the_natural_step_reports_clean_accuracy_and_the_smoothed_loss():
    setup, state, batches = start(**NATURAL)
    batch = next(batches)
    apply = jax.jit(models.classifier(setup.model, setup.config.data.mean, setup.config.data.std))
    logits = np.asarray(apply(state.params, augment.to_float(batch["image"])), np.float64)
    smooth = 0.7 * np.eye(3)[batch["label"]] + 0.1
    log_sum = np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(smooth * (logits - log_sum)).sum(-1).mean()
    (metrics,), _ = take_steps(1, **NATURAL)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    accuracy = np.mean(logits.argmax(-1) == np.asarray(batch["label"]))
    assert metrics["accuracy_clean"] == pytest.approx(accuracy)
    assert not metrics.keys() & {"accuracy_adv", "keep_probability"}


def test_averaged_weights_are_the_exponential_mean_of_the_weights():
    setup, state, batches = start(**NATURAL)
    step = runs.compiled_step(setup, state, next(batches))
    expected = jax.device_get(state.params)
    for _ in range(3):
        state, _ = step(state, next(batches))
        now = jax.device_get(state.params)
        expected = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * new, expected, now)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(state.weights("ema")), expected)


@pytest.mark.slow
def test_stochastic_averaging_is_the_equal_mean_of_the_last_epochs():
    """SWA over the last 1.5 of 3 epochs of four steps: the weights after steps 7 to 12."""
    setup, state, batches = start(objective="natural", epochs=3, swa_epochs=1.5)
    step = runs.compiled_step(setup, state, next(batches))
    seen = []
    for count in range(1, 13):
        state, _ = step(state, next(batches))
        seen.append(jax.device_get(state.params))
        mean = jax.tree.map(lambda *trees: np.mean(trees, 0), *seen[6:] or seen[-1:])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        if count in (3, 7, 9, 12):
            jax.tree.map(close, jax.device_get(state.weights("swa")), mean)


@pytest.mark.parametrize(("swa_epochs", "averaged"), [(1.5, 8), (1.4, 7), (0.1, 1), (4, 20)])
def test_stochastic_averaging_begins_with_a_whole_step(swa_epochs, averaged):
    """Of 4 epochs of five steps, so that no weight counts in part."""
    config = FrozenConfigDict({"epochs": 4, "swa_epochs": swa_epochs})
    fields = {"config": config, "optimizer": optax.sgd(1.0), "steps_per_epoch": 5}
    params = {"w": jnp.zeros(20)}
    state = TrainState(jnp.array(0), params, fields["optimizer"].init(params), None, params)
    for row in np.eye(20):  # the n-th weights have n ones
        state = _update(types.SimpleNamespace(**fields), state, {"w": -row})
    expected = np.minimum(20 - np.arange(20), averaged) / averaged
    np.testing.assert_allclose(state.swa["w"], expected, rtol=1e-5)


def test_the_averaged_weights_are_evaluated_where_there_are_any():
    for changes, name in (
        ({}, "raw"),
        ({"ema_decay": 0.9}, "ema"),
        ({"ema_decay": 0.9, "swa_epochs": 1.0}, "swa"),
        ({"ema_decay": 0.9, "swa_epochs": 1.0, "eval__weights": "raw"}, "raw"),
    ):
        assert evaluated_weights(runs.smoke(**changes)) == name
    state = TrainState(0, params={"a": 1}, opt_state=(), ema=None)
    assert state.weights("raw") is state.params


def test_the_state_is_donated():
    setup, state, batches = start(**NATURAL)
    batch = next(batches)
    new_state, _ = runs.compiled_step(setup, state, batch)(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new_state))


# --- The attack on a mesh ---------------------------------------------------------------------


def attack_of(setup, objective="trades"):
    """(per-device attack, its arguments in the global view)."""
    apply = models.classifier(setup.model, setup.config.data.mean, setup.config.data.std)
    threat = Threat.of(setup.config.threat)
    attack = functools.partial(perturb, apply, objective=objective, threat=threat)
    params = models.init_params(setup.model, jax.random.key(0))
    (batch,) = runs.batches(setup, 1)
    images, targets = augment.to_float(batch["image"]), augment.one_hot(batch["label"], 3)
    masking = Masking(ard=True, prm=True, warmup_epochs=4.0, patch_size=2)
    drawn = draw(
        jax.random.key(1),
        objective=objective,
        threat=threat,
        masking=masking,
        progress=2.0,
        image_shape=images.shape,
        num_blocks=setup.model.num_blocks,
    )
    return attack, (params, images, targets, drawn)


def mapped_attack(setup, attack):
    split, whole = sharding.SPLIT, sharding.WHOLE
    specs = (whole, split, split, Draws(split, whole, whole))
    return jax.jit(sharding.map_shards(attack, setup.mesh, specs))


@pytest.mark.parametrize("objective", ["at", runs.slow("trades")])
def test_the_mapped_attack_has_no_collective(objective):
    setup = runs.tiny_setup(4)
    attack, arguments = attack_of(setup, objective)
    program = mapped_attack(setup, attack).lower(*arguments).compile().as_text()
    assert "while" in program
    assert not re.findall(hlo.COLLECTIVES, program)


@pytest.mark.slow
def test_in_the_whole_step_the_attacks_loop_holds_no_collective():
    """The gradient's reduction does hold some, so the pattern would find one."""
    setup, state, batches = start(4, **MASKED)
    program = runs.compiled_step(setup, state, next(batches)).as_text()
    inside = hlo.reachable(program, hlo.loop_body(program, "/shard_map/jvp()/while"))
    assert "transpose(jvp(VisionTransformer))" in inside
    assert not re.findall(hlo.COLLECTIVES, inside)
    assert re.findall(hlo.COLLECTIVES, program)


@pytest.mark.slow
def test_pmap_of_the_same_attack_gives_the_same_numbers():
    setup = runs.tiny_setup(4)
    attack, (params, images, targets, drawn) = attack_of(setup)

    def per_device(x):
        return x.reshape(4, x.shape[0] // 4, *x.shape[1:])

    mapped = mapped_attack(setup, attack)(params, images, targets, drawn)
    axes = (None, 0, 0, Draws(0, None, None))
    with_pmap = jax.pmap(attack, in_axes=axes, devices=jax.devices()[:4])(
        params,
        per_device(images),
        per_device(targets),
        drawn._replace(delta=per_device(drawn.delta)),
    )
    np.testing.assert_allclose(mapped, with_pmap.reshape(mapped.shape), atol=1e-6)
    assert np.abs(np.asarray(mapped) - np.asarray(images)).max() > 0.05


def test_batches_that_the_devices_do_not_divide_are_refused():
    mesh = sharding.make_mesh(jax.devices()[:4])
    sharding.check_batch_size("batch_size", 16, mesh, 4)
    with pytest.raises(ValueError, match=r"batch_size is 30, which 4 devices do not divide.* 32"):
        sharding.check_batch_size("batch_size", 30, mesh)
    with pytest.raises(ValueError, match=r"4 devices times 3 micro-batches.* 12"):
        sharding.check_batch_size("batch_size", 16, mesh, 3)


# --- The platform -----------------------------------------------------------------------------


def mesh_of(platform):
    """A mesh of one device that is not there."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))


def test_what_follows_from_the_platform_of_the_mesh():
    setup = runs.tiny_setup()
    apply = models.classifier(setup.model, (0.5,), (0.5,))
    params = jax.eval_shape(lambda: models.init_params(setup.model, jax.random.key(0)))
    with setup.config.unlocked():
        setup.config.dtype = "auto"
    for platform, parts, dtype in (("cpu", 8, "float32"), ("tpu", 2, "bfloat16")):
        mesh = mesh_of(platform)
        assert sharding.platform(mesh) == platform
        assert sharding.in_parts(jnp.zeros((64, 3)), mesh, 2).shape == (parts, 64 // parts, 3)
        assert training_dtype(setup.config, sharding.platform(mesh)) == dtype
    assert models.unstack_blocks(lambda params, x: x, params) is params
    assert isinstance(models.unstack_blocks(apply, concrete(params))["blocks"], Unstacked)


def concrete(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_nothing_asks_which_backend_the_process_has():
    """A program may be compiled for devices that are not there."""
    package = pathlib.Path(models.__file__).parents[1]
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 50
    assert [str(path) for path, text in sources.items() if "default_backend" in text] == []
