"""Phases: what changes when, refusals, smaller images, and a resumed run across a change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at import models
from vit_at.errors import UserError
from vit_at.models import layers
from vit_at.training import metrics, phases
from vit_at.training.setup import compile_steps, initial_state

GROWING = "0 data.image_size=8 threat.steps=1; 2 data.image_size=16 threat.steps=3 threat.eps=1/10"


def config(text, **changes):
    changes |= {"epochs": 4, "data__image_size": 16, "model__patch_size": 2}
    return runs.resolved(phases=text, **changes)


def test_a_phase_keeps_what_the_phases_before_it_have_set():
    found = phases.of(config("1 threat.steps=2; 3 data.augment=random-erasing threat.eps=8/255"))
    assert [phase.epoch for phase in found] == [0, 1, 3]
    assert [phase.config.threat.steps for phase in found][1:] == [2, 2]
    assert found[2].config.threat.eps == pytest.approx(8 / 255)
    assert found[1].config.data.augment == ""
    assert [phase.epoch for phase in phases.of(config(GROWING))] == [0, 2]
    assert len(phases.of(config(""))) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("threat.steps=2", "phases has 'threat.steps=2'; a phase is an epoch and FIELD=VALUE"),
        ("1", "phases has '1'; a phase is an epoch"),
        ("2 threat.steps=1; 1 threat.steps=2", "from epoch 1; epochs must increase"),
        ("0 threat.steps=1; 0 threat.steps=2", "from epoch 0; epochs must increase"),
        ("4 threat.steps=1", r"less than epochs \(4\)"),
        ("1 beta=3", "phases has 'beta=3'; it may set threat.eps, "),
        ("1 threat.steps", "phases has 'threat.steps'"),
        ("1 threat.steps=many", "threat.steps is 'many'; it must be a whole number"),
        ("1 threat.steps=0", "in the phase from epoch 1: threat.steps is 0"),
        ("1 data.augment=blur", "in the phase from epoch 1: data.augment"),
        ("1 data.image_size=32", "at most that of the configuration, 16"),
        ("1 data.image_size=15", "in the phase from epoch 1: .* does not divide"),
    ],
)
def test_a_phase_that_cannot_be_is_one_sentence(text, sentence):
    made = config("")
    with made.unlocked():
        made.phases = text
    with pytest.raises(UserError, match=sentence) as raised:
        phases.check(made, models.build(made, 10, "float32"))
    assert "\n" not in str(raised.value)


def test_the_cost_is_the_mean_over_the_phases():
    made = config(GROWING)
    model = models.build(made, 10, "float32")
    small = model.clone(image_size=8).forward_flops()
    sizes = (small, model.forward_flops())
    costs = [
        metrics.step_flops(phase.config, forward)
        for phase, forward in zip(phases.of(made), sizes, strict=True)
    ]
    assert phases.mean_step_flops(made, model) == pytest.approx(sum(costs) / 2)
    assert costs[0] < costs[1] / 3


def test_positions_of_smaller_images_are_interpolated_and_the_class_token_keeps_its_own():
    positions = jax.random.normal(jax.random.key(0), (1, 1 + 16, 3))
    found = layers.resize_positions(positions, 1, 4)
    np.testing.assert_array_equal(found[:, 0], positions[:, 0])
    across = jnp.broadcast_to(jnp.arange(4.0)[:, None], (1, 4, 4, 1)).reshape(1, 16, 1)
    left, right = layers.resize_positions(across, 0, 4).reshape(2, 2).T
    np.testing.assert_allclose(left[0], left[1], rtol=1e-6)
    assert 0 < left[0] < 1 < 2 < right[0] < 3
    assert layers.resize_positions(positions, 1, 16) is positions


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convit_tiny", "xcit_nano_12_p16_224"])
def test_models_take_smaller_images(name):
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4}
    model = models.create(name, num_classes=3, **sizes)
    params = jax.eval_shape(lambda key: models.init_params(model, key), jax.random.key(0))
    logits = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x), params, jnp.ones((2, 8, 8, 3))
    )
    assert model.any_size
    assert logits.shape == (2, 3)


def test_each_phase_has_its_own_step():
    """Both take the same batch: the images become 4 pixels wide on the device."""
    setup = runs.tiny_setup(phases="0 data.image_size=4; 1 threat.eps=0.06", epochs=2)
    optimizer = runs.optimizer_of(setup)
    steps = compile_steps(setup, optimizer)
    assert [begin for begin, _ in steps] == [0, 4]
    batch = {"image": np.zeros((16, 8, 8, 1), np.uint8), "label": np.zeros(16, np.int32)}
    state = initial_state(setup, optimizer)
    for (_, step_fn), eps in zip(steps, (0.1, 0.06), strict=True):
        state, found = step_fn(state, batch)
        assert float(found.compute()["eps"]) == pytest.approx(eps)
    text = steps[0][1].trace(state, batch).jaxpr.pretty_print()
    assert "f32[16,4,4,1]" in text


@pytest.mark.slow
def test_a_run_resumes_bit_exactly_across_a_change(tmp_path, monkeypatch):
    changes = {"phases": "1 threat.steps=2 threat.eps=0.05", "eval__attacks": "clean"}
    made = runs.smoke(**(runs.QUICK | changes | {"eval__every_epochs": 1}))
    runs.assert_resumes_bit_exactly(made, tmp_path, monkeypatch, dies_at=5, last_step=8)
