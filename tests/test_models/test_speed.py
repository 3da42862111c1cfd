"""What a run compiles, and what an attack computes how often: where speed is lost unnoticed."""

import collections

import jax
import jax.extend
import jax.numpy as jnp
import pytest
import runs
from etils import epath

from vit_at import models
from vit_at.attacks import Threat
from vit_at.distributed import devices
from vit_at.models import layers
from vit_at.training.attack import Draws, perturb
from vit_at.training.loop import Loop, train
from vit_at.training.setup import compile_step, initial_state

COMPILATION = devices._COMPILATION


@pytest.fixture
def compilations():
    """The names of the programs that have been compiled, or read from the cache, so far."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event == COMPILATION:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_compiles_its_step_and_each_attack_once(compilations, tmp_path, monkeypatch):
    """Three epochs: the second and the third, with their validations, compile nothing."""
    by_step = {}
    original = Loop._after_step

    def recording(self, state, step, ending):
        original(self, state, step, ending)
        by_step[step] = len(compilations)

    monkeypatch.setattr(Loop, "_after_step", recording)
    records = train(runs.smoke(**runs.QUICK | {"epochs": 3}), epath.Path(tmp_path) / "run")
    first_epoch, last_step = by_step[4], max(by_step)
    assert last_step == 12
    assert by_step[last_step] == first_epoch, compilations[first_epoch : by_step[last_step]]
    count = collections.Counter(compilations)
    assert count["jit(train_step)"] == 1
    assert count["jit(outcome)"] == 2 + len(records)  # validation's two, then the final ones


def products(jaxpr, attack_steps, inside=False):
    """(matrix products outside, inside) of the loop over attack steps, as the text has them."""
    total = [0, 0]
    for equation in jaxpr.eqns:
        total[inside] += equation.primitive.name == "dot_general"
        loop = equation.primitive.name == "scan" and equation.params["length"] == attack_steps
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found = products(inner, attack_steps, inside or loop)
            total = [a + b for a, b in zip(total, found, strict=True)]
    return total


def products_of_attack(objective):
    setup = runs.tiny_setup()
    apply = models.classifier(setup.model, setup.config.data.mean, setup.config.data.std)
    params = jax.eval_shape(lambda: models.init_params(setup.model, jax.random.key(0)))
    images, targets = jnp.zeros((4, 8, 8, 1)), jnp.zeros((4, 3))

    def attack(params):
        draws = Draws(images, None, None)
        threat = Threat(steps=7)
        return perturb(apply, params, images, targets, draws, objective=objective, threat=threat)

    forward = jax.make_jaxpr(lambda p: apply(p, images))(params)
    return products(jax.make_jaxpr(attack)(params).jaxpr, 7), products(forward.jaxpr, 7)[0]


def test_trades_computes_its_clean_logits_once_before_the_attack():
    (at_before, at_in_loop), forward = products_of_attack("at")
    (trades_before, trades_in_loop), _ = products_of_attack("trades")
    assert at_before == 0
    assert trades_before == forward
    assert trades_in_loop == at_in_loop


def products_of_step(objective, drop_path):
    setup = runs.tiny_setup(objective=objective, threat__steps=7)
    setup = setup._replace(model=setup.model.clone(drop_path=drop_path))
    optimizer = runs.optimizer_of(setup)
    state, (batch,) = initial_state(setup, optimizer), runs.batches(setup, 1)
    return products(compile_step(setup, optimizer).trace(state, batch).jaxpr, 7)


def test_a_trades_step_passes_over_its_clean_images_once():
    """MART has no clean pass in its attack, and the same two passes in its update."""
    (outside, _), (_, forward) = products_of_step("trades", 0.0), products_of_attack("at")
    assert outside == products_of_step("mart", 0.0)[0]
    assert products_of_step("trades", 0.5)[0] == outside + forward


def test_an_attack_has_no_gradient_of_weights():
    """Backward, a linear layer costs one product and an attention's two products four, but three in
    the last block, where one product gives both gradients by the tokens.
    """
    (_, in_loop), forward = products_of_attack("at")
    attention = 2 + 1  # more than two, in the body of all other blocks and in the last
    assert in_loop == 2 * forward + attention


def test_a_gated_branch_has_no_gradient_of_weights_in_an_attack():
    """Neither has the branch that lax.cond returns, whose results nothing could leave out."""

    def loss(params, x):
        return layers.gate_gradient(lambda w, x: x @ w, params, x, True).sum()

    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    for argument, expected in ((1, 2), (0, 3)):  # forward, input gradient, weight gradient
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=argument))(w, x)
        assert products(jaxpr.jaxpr, 7)[0] == expected
