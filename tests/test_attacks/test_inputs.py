"""What is refused at the front door of the attacks: one sentence each, from PGD and AutoAttack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.attacks import Threat, autoattack, pgd_attack
from vit_at.attacks.autoattack import Settings
from vit_at.errors import UserError

IMAGES, LABELS = np.full((5, 8, 8, 3), 0.5, np.float32), np.arange(5)


def logits_fn(images):
    return jax.nn.one_hot(jnp.arange(len(images)) * 0, 5) + images.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "l3"}, "norm is 'l3', which is unknown; use one of linf, l2, l1"),
        ({"eps": 8}, "eps is 8; .* 8/255, say, not 8"),
        ({"norm": "L2", "eps": 14}, "eps is 14; .* at most 13.8564"),
        ({"eps": 0}, "eps is 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": "8/255"}, "eps is the text '8/255'; give a number"),
        ({"eps": jnp.float32(8)}, "eps is 8; .* 8/255, say, not 8"),
        ({"eps": jnp.float32("nan")}, "eps is nan"),
        ({"eps": [0.1, 0.2]}, r"eps is \[0.1, 0.2\]; give a number"),
        ({"norm": "l2"}, "norm is 'l2' and eps is not given; give one"),
        ({"norm": "L1", "eps": None}, "norm is 'l1' and eps is not given"),
        ({"step_size": "2/255"}, "step_size is the text"),
        ({"step_size": 0}, "step_size is 0; it is in pixel units"),
        ({"step_size": -0.1}, "step_size is -0.1"),
        ({"step_size": 2}, "step_size is 2; .* at most 1"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"steps": 0}, "steps is 0; it must be an integer, 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; it must be an integer"),
        ({"steps": "5"}, "steps is '5'; it must be an integer"),
        ({"steps": None}, "steps is None; it must be an integer"),
    ],
)
def test_a_threat_that_is_none_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        pgd_attack(logits_fn, IMAGES, LABELS, jax.random.key(0), Threat(**options))
    if options.keys() <= {"norm", "eps"}:
        with pytest.raises(UserError, match=said):
            autoattack.run(logits_fn, IMAGES, LABELS, **options)


@pytest.mark.parametrize("norm", ["Linf", "LINF", "L2", "l2", "L1"])
def test_a_norm_is_known_in_any_case(norm):
    assert Threat(norm, 0.5).norm == Settings(norm, 0.5).norm == norm.lower()


def test_one_of_many_eps_is_refused():
    eps = np.full((5, 1, 1, 1), 0.1)
    eps[3] = 8
    with pytest.raises(UserError, match="eps is 8"):
        pgd_attack(logits_fn, IMAGES, LABELS, jax.random.key(0), Threat(eps=jnp.asarray(eps)))
    with pytest.raises(UserError, match=r"eps has the shape \(2,\); give one number"):
        autoattack.run(logits_fn, IMAGES, LABELS, eps=np.array([0.1, 0.2]))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES[0], LABELS, r"images have the shape \(8, 8, 3\)"),
        (IMAGES[:0], LABELS[:0], "N > 0"),
        (np.zeros((5, 3, 8, 8), np.float32), LABELS, r"looks like \[N, C, H, W\]; .*transpose"),
        (np.zeros((5, 8, 8, 3), np.uint8), LABELS, "images are uint8; divide them by 255"),
        (255 * IMAGES, LABELS, "images range from 127.5 to 127.5"),
        (IMAGES * np.nan, LABELS, "images range from nan"),
        (IMAGES, LABELS[:4], "one integer for each of the 5 images"),
        (IMAGES, LABELS / 2, "labels are float64"),
        (IMAGES, LABELS - 1, "labels range from -1 to 3, but the model has classes 0 to 4"),
        (IMAGES, LABELS + 1, "labels range from 1 to 5"),
        (IMAGES, LABELS + 2**32, "labels range from 4294967296"),  # 0 to 4 as int32
    ],
)
def test_images_and_labels_that_are_none_are_refused_by_every_attack(images, labels, said):
    with pytest.raises(UserError, match=said):
        pgd_attack(logits_fn, images, labels, jax.random.key(0), Threat())
    with pytest.raises(UserError, match=said):
        autoattack.run(logits_fn, images, labels, batch_size=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "dlr"}, "loss 'dlr' is unknown; use one of ce, cw"),
        ({"key": None}, "give a key"),
        ({"restarts": 0}, "restarts is 0"),
        ({"restarts": 2.0}, "restarts is 2.0; it must be an integer"),
        ({"key": 0}, r"key is 0, which is no key; give jax.random.key\(0\)"),
        ({"init": np.zeros((5, 8, 8, 3))}, r"init has the shape .* \[restarts, "),
        ({"init": np.zeros((0, 5, 8, 8, 3))}, "at least one restart"),
        ({"init": np.full((1, 5, 8, 8, 3), np.nan)}, "init holds NaN"),
        ({"init": [[0.0], [0.0, 0.0]]}, "init can't be read as an array"),
        ({"logits_fn": lambda x: x}, "logits_fn gives"),
        ({"logits_fn": lambda x: np.asarray(x).mean((1, 2))}, "can't be traced by JAX .Tracer"),
    ],
)
def test_other_arguments_of_pgd(options, said):
    defaults = {"logits_fn": logits_fn, "key": jax.random.key(0)}
    options = defaults | options
    first = (options.pop("logits_fn"), IMAGES, LABELS, options.pop("key"), Threat())
    with pytest.raises(UserError, match=said) as caught:
        pgd_attack(*first, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_pgd_takes_lists_and_an_eps_for_each_image():
    eps = jnp.linspace(0.01, 0.05, 5)[:, None, None, None]
    key, init = jax.random.key(0), np.zeros((1, *IMAGES.shape))
    for options in ({}, {"init": init}):
        expected = pgd_attack(logits_fn, IMAGES, LABELS, key, Threat(eps=eps), **options)
        lists = (IMAGES.tolist(), LABELS.tolist(), key, Threat(eps=np.asarray(eps)))
        found = pgd_attack(logits_fn, *lists, **{name: x.tolist() for name, x in options.items()})
        np.testing.assert_array_equal(found, expected)
        assert np.all(np.abs(expected - IMAGES) <= eps + 1e-6)


@pytest.mark.parametrize("seed", [-1, 2**40, None, 1.5, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match=f"seed is {seed}; it must be an integer from 0 to"):
        autoattack.run(logits_fn, IMAGES, LABELS, batch_size=8, seed=seed)


def test_attacks_that_are_none_are_refused():
    with pytest.raises(UserError, match="attacks is None; use standard, plus, rand or a list of"):
        autoattack.run(logits_fn, IMAGES, LABELS, batch_size=8, attacks=None)


def test_pgd_works_on_traced_arrays():
    threat = Threat(steps=2)
    attack = jax.jit(lambda x, y: pgd_attack(logits_fn, x, y, jax.random.key(0), threat))
    assert attack(IMAGES, LABELS).shape == IMAGES.shape


def test_pgd_under_jit_takes_arrays_from_around_it_and_checks_their_values():
    images, labels, wrong = jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(LABELS + 1)

    def attack(images, labels, key):
        return pgd_attack(logits_fn, images, labels, key, Threat(steps=2))

    key = jax.random.key(0)
    expected = attack(images, labels, key)
    for found in (
        jax.jit(lambda key: attack(images, labels, key))(key),
        jax.jit(lambda images: attack(images, labels, key))(images),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(UserError, match=r"images range from 127\.5"):
        jax.jit(lambda key: attack(255 * IMAGES, labels, key))(key)
    with pytest.raises(UserError, match="labels range from 1 to 5"):
        jax.jit(lambda images: attack(images, wrong, key))(images)
