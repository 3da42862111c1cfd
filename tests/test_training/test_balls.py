"""Training against several balls at once, and what an attack of training refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from ml_collections import FrozenConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.attacks.norms import NORMS
from vit_at.errors import UserError
from vit_at.training import step
from vit_at.training.masking import Masking


def balls_of(setup):
    """(step, the arguments of ``attacked`` after it) for the first batch of a tiny setup."""
    config = FrozenConfigDict(setup.config)
    apply = models.classifier(setup.model, config.data.mean, config.data.std)
    fields = (config, apply, None, setup.mesh, Masking(), 4, setup.model.num_blocks, 3)
    params = models.init_params(setup.model, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    targets = jax.nn.one_hot(jnp.arange(6) % 3, 3)
    threats = Threat.all_of(config.threat)
    deltas = tuple(jnp.zeros_like(images) + 0.01 for _ in threats)
    keys = jax.random.split(jax.random.key(2), 6)
    balls = tuple(step.Ball(threat, None, None) for threat in threats)
    return step.Step(*fields), params, balls, step.Part(images, targets, deltas, keys)


def test_the_draws_of_several_balls_share_no_key():
    keys = step.ball_keys(jax.random.key(0), 3)
    used = [*keys, *(part for key in keys for part in jax.random.split(key, 3))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in used}) == 12


def compiled(function, setup, params, balls, part):
    """A function of the step, of such arguments, in one program."""
    return jax.jit(lambda params, part: function(setup, params, balls, part))(params, part)


@pytest.mark.slow
def test_of_several_balls_the_worst_image_is_trained_on_or_all_of_them():
    """Tramer and Boneh 2019, equations 3 and 4: a maximum of losses, or their mean."""
    also = {"threat__also": "l2:0.4:0.1", "mixing__probability": 0.0}
    several, params, balls, part = balls_of(runs.tiny_setup(**also))
    mean = several._replace(
        config=FrozenConfigDict(runs.tiny_setup(**also, threat__combine="avg").config)
    )
    (worst,) = compiled(step.attacked, several, params, balls, part)
    each = compiled(step.attacked, mean, params, balls, part)
    assert len(each) == 2
    for ball, images in zip(balls, each, strict=True):
        size = NORMS[ball.threat.norm].size(images - part.images)
        assert float(size.max()) <= float(ball.threat.eps) * (1 + 1e-5)

    @jax.jit
    def losses(images):
        return optax.softmax_cross_entropy(several.apply(params, images), part.targets)

    np.testing.assert_allclose(losses(worst), jnp.stack([*map(losses, each)]).max(0), rtol=1e-5)
    _, metrics = compiled(step.loss_and_gradient, several, params, balls, part)
    np.testing.assert_allclose(metrics["loss"], losses(worst).mean(), rtol=1e-5)
    _, metrics = compiled(step.loss_and_gradient, mean, params, balls, part)
    expected = jnp.stack([*map(losses, each)]).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["trades", "mart"])
def test_all_objectives_take_several_balls(objective):
    changes = {"objective": objective, "threat__also": "l2:0.4:0.1", "threat__combine": "avg"}
    few = runs.tiny_setup(**changes, mixing__probability=0.0, threat__steps=1)
    _, metrics = compiled(step.loss_and_gradient, *balls_of(few))
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize(
    ("also", "sentence"),
    [
        ("l2", "threat.also has 'l2'; write NORM:EPS:STEP_SIZE"),
        ("l2:half:0.1", "write NORM:EPS:STEP_SIZE"),
        ("linf:0.1:0.1", "norm is named before or unknown; .* at most once"),
        ("LINF:0.1:0.1", "norm is named before or unknown; .* at most once"),
        ("l2:0.5:0.1,L2:0.4:0.1", "norm is named before or unknown"),
        ("l2:0.5:1.1", r"also\[l2\]\.step_size is 1.1; .* at most twice"),
        ("l2:500:100", r"also\[l2\]\.eps is 500; an L2 eps .* at most 100"),
        ("l2:nan:0.1", r"also\[l2\]\.eps is nan"),
        ("l2:1/0:0.1", "write NORM:EPS:STEP_SIZE"),
        ("l1:1e6:1", r"also\[l1\]\.eps is 1e\+06; an L1 eps .* at most 256"),
        ("l3:0.5:0.1", "named before or unknown; name each of linf, l2, l1 at most once"),
    ],
)
def test_a_ball_that_cannot_be_is_one_sentence(also, sentence):
    with pytest.raises(UserError, match=sentence):
        runs.resolved(threat__also=also)


def test_a_further_ball_of_255ths_is_refused_as_the_first_is():
    """An eps of 8 in linf would train on any image in [0, 1]."""
    with pytest.raises(UserError, match=r"also\[linf\]\.eps is 8; .* did you mean 8/255"):
        runs.resolved(threat__norm="l2", threat__also="linf:8:2")


def test_further_balls_may_be_written_in_any_case_and_as_fractions():
    config = runs.resolved(threat__norm="l2", threat__also="Linf:8/255:2/255, l1:12:1")
    first, *further = Threat.all_of(config.threat)
    assert first == Threat.of(config.threat)
    steps = config.threat.steps
    assert further == [Threat("linf", 8 / 255, 2 / 255, steps), Threat("l1", 12.0, 1.0, steps)]


def test_natural_training_refuses_further_balls():
    with pytest.raises(UserError, match=r"threat\.also is 'l2:0\.5:0\.1', but .* has no attack"):
        runs.resolved(objective="natural", threat__also="l2:0.5:0.1", mixing__probability=0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threat__also": "l1:12:1"}, "a norm is 'l1'"),
        ({"threat__start": "noise"}, "threat.start is 'noise'; use pgd"),
        ({"masking__prm": True, "masking__warmup_epochs": 0.0}, "masking.prm is on"),
    ],
)
def test_what_auto_pgd_cannot_do_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        runs.resolved(threat__method="apgd", **changes)
