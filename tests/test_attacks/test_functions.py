"""The forms in which a model comes to AutoAttack, and the sentence for what is none of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_at.attacks import autoattack
from vit_at.attacks.autoattack.functions import as_function
from vit_at.errors import UserError

IMAGES = np.random.default_rng(0).random((6, 4, 4, 3), np.float32)


class Linen(nn.Module):
    """A network with the usual switch between training and inference."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


class Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(48, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x.reshape(len(x), -1))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.reshape(len(x), -1))


def scaled(kernel, x, scale):
    return scale * x.reshape(len(x), -1) @ kernel


def forms():
    linen, plain = Linen(), Plain()
    variables = linen.init(jax.random.key(0), IMAGES, train=False)
    of_plain = plain.init(jax.random.key(0), IMAGES)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(48, 4)), jnp.float32)
    return {
        "linen apply": functools.partial(linen.apply, variables, train=False),
        "mutable": functools.partial(linen.apply, variables, train=False, mutable=False),
        "unhashable": functools.partial(linen.apply, variables, train=False, rngs={}),
        "pair": (plain, of_plain),
        "nnx": Nnx(),
        "function": lambda x: scaled(kernel, x, 1.0),
        "partial": functools.partial(
            lambda k, x, scale: scale * x.reshape(len(x), -1) @ k, kernel, scale=2.0
        ),
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_of_a_model_is_attacked(form):
    model = forms()[form]
    plain = functools.partial(model[0].apply, model[1]) if form == "pair" else model
    labels = np.asarray(plain(IMAGES)).argmax(1)
    options = {"eps": 0.5, "attacks": ["apgd-ce"], "batch_size": 4, "budget": autoattack.Budget(3)}
    result = autoattack.run(model, IMAGES, labels, **options)
    assert result.robust["clean"].all()
    wrong = np.asarray(plain(result.adversarial)).argmax(1) != labels
    np.testing.assert_array_equal(wrong, ~result.robust["apgd-ce"])


def test_arrays_are_traced_and_equal_calls_share_a_program():
    traces = []

    @jax.jit
    def run(function, images):
        traces.append(function)
        return function(images)

    linen = Linen()
    for seed in range(2):
        variables = linen.init(jax.random.key(seed), IMAGES, train=False)
        bound = functools.partial(linen.apply, variables, train=False)
        np.testing.assert_allclose(run(as_function(bound), IMAGES), bound(IMAGES), rtol=1e-5)
    assert len(traces) == 1
    leaves = jax.tree.leaves(as_function(bound))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (3, "logits_fn is a int; it must be a function"),
        ((1, 2), "logits_fn is a tuple"),
        (lambda x: np.asarray(x).sum((1, 2, 3)), r"can't be traced by JAX \(TracerArrayConv"),
        (lambda x: x.numpy(), "can't be traced by JAX"),
        (lambda: 0, r"can't be called with \(images\)"),
        (functools.partial(lambda a, b: a, 1, 2), r"can't be called with \(images\)"),
    ],
)
def test_what_cannot_be_attacked_is_one_sentence(model, said):
    with pytest.raises(UserError, match=said) as caught:
        autoattack.run(model, IMAGES, np.zeros(6, int))
    assert len(str(caught.value).splitlines()) == 1
