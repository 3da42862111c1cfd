"""Augmentation: what each kind may do, its arithmetic beside torchvision's, and the targets."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.data import augment, randaugment
from vit_at.distributed import sharding
from vit_at.errors import UserError


def images(b=6, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).random((b, size, size, channels), np.float32)


def test_random_crop_shifts_within_the_padding_and_adds_black():
    x, padding = images(b=300, size=5, channels=1) + 1, 2
    cropped = np.asarray(augment.random_crop(jax.random.key(0), jnp.array(x), padding))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = collections.Counter()
    for before, after in zip(padded, cropped, strict=True):
        shifts = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if np.array_equal(before[i : i + 5, j : j + 5], after)
        ]
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) == 25  # every shift occurs


def test_random_flip_mirrors_about_half():
    x = images(b=400, size=4)
    flipped = np.asarray(augment.random_flip(jax.random.key(1), jnp.array(x)))
    same = np.all(flipped == x, (1, 2, 3))
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])
    assert 150 < same.sum() < 250


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augment_is_keyed_and_switchable(dtype):
    x = jnp.array((images(b=16) * 255).astype(dtype))
    run = jax.jit(augment.augment, static_argnames=("crop_padding", "flip"))
    a, b, c = (run(jax.random.key(k), x, crop_padding=4, flip=True) for k in (0, 0, 1))
    assert a.dtype == x.dtype
    assert a.shape == x.shape
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
    off = run(jax.random.key(0), x, crop_padding=0, flip=False)
    np.testing.assert_array_equal(off, x)
    only_flip = run(jax.random.key(0), x, crop_padding=0, flip=True)
    np.testing.assert_array_equal(np.sort(only_flip, axis=2), np.sort(x, axis=2))
    assert np.any(only_flip != x)


def test_to_float():
    converted = augment.to_float(jnp.arange(256).astype(jnp.uint8))
    assert converted.dtype == jnp.float32
    np.testing.assert_allclose(converted, np.arange(256) / 255, rtol=1e-7)


def test_one_hot_smoothing_is_pytorchs():
    soft = augment.one_hot(jnp.array([2, 0]), 4, 0.2)
    np.testing.assert_allclose(soft, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    np.testing.assert_array_equal(augment.one_hot(jnp.array([1]), 3), [[0, 1, 0]])


# --- By name ----------------------------------------------------------------------------------

ALL = "random-resized-crop-0.3,randaugment-2-9,color-jitter-0.4,random-erasing-0.5"


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision.transforms.v2.functional")


def as_torch(image):
    return pytest.importorskip("torch").from_numpy(np.moveaxis(np.asarray(image), -1, 0).copy())


def levels(size=15, channels=3, seed=0):
    """A smooth colour image of whole values 0 to 255, [size, size + 4, channels]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 150, size)[:, None, None] + rng.integers(
        0, 100, (size, size + 4, channels)
    )
    return ramp.astype(np.uint8)


# Operations whose values are not whole, and whether they need the luma.
BLENDS = {"Brightness": 0, "Color": 1, "Contrast": 1, "Sharpness": 0, "AutoContrast": 0}


@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_an_operation_is_torchvisions(torchvision, name, magnitude):
    apply_op = pytest.importorskip("torchvision.transforms.autoaugment")
    policy = apply_op.RandAugment(magnitude=magnitude)
    image = levels()
    function, most, directed = randaugment.OPERATIONS[name]
    space, signed = policy._augmentation_space(31, image.shape[:2])[name]
    assert signed == directed
    theirs = float(space[magnitude]) if space.ndim else 0.0
    for sign in (1, -1) if directed else (1,):
        expected = apply_op._apply_op(
            as_torch(image), name, sign * theirs, interpolation=policy.interpolation, fill=None
        )
        expected = np.moveaxis(expected.numpy(), 0, -1).astype(float)
        ours = np.asarray(function(jnp.array(image, jnp.float32), sign * most * magnitude / 30))
        if name in BLENDS:  # they truncate the result, and the luma before
            slack = 1e-3 + (abs(theirs) if BLENDS[name] else 0)
            assert ((expected <= ours + slack) & (expected > ours - 1 - slack)).all()
        else:  # other than pixels half way between two others
            assert (ours != expected).mean() < (0.02 if directed else 1e-9)


def test_color_jitter_blends_as_torchvision(torchvision):
    image = np.random.default_rng(0).random((6, 7, 3), np.float32)
    for ours, theirs in (
        (randaugment.brightness, torchvision.adjust_brightness),
        (randaugment.contrast, torchvision.adjust_contrast),
        (randaugment.saturation, torchvision.adjust_saturation),
    ):
        for factor in (0.6, 1.4):
            expected = np.moveaxis(theirs(as_torch(image), factor).numpy(), 0, -1)
            found = ours(jnp.array(image * 255), factor) / 255
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 1, 5, 9), (2, 7, 14, 3), (15, 15, 1, 1)])
def test_a_resized_crop_is_torchvisions(torchvision, box):
    image = np.random.default_rng(0).random((16, 16, 3), np.float32)
    expected = torchvision.resized_crop(as_torch(image), *box, [16, 16], antialias=True)
    top, left, height, width = box
    rows, columns = augment.crop_weights(top, height, 16), augment.crop_weights(left, width, 16)
    found = np.einsum("ih,hwc,jw->ijc", rows, image, columns)
    np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 0, -1), atol=1e-5)


def test_a_resized_crop_by_hand():
    # Pixels 1 and 2 of 4, stretched to 4: between them in quarters, and constant outside.
    expected = [[0, 1, 0, 0], [0, 0.75, 0.25, 0], [0, 0.25, 0.75, 0], [0, 0, 1, 0]]
    np.testing.assert_allclose(augment.crop_weights(1, 2, 4), expected, atol=1e-7)


def test_boxes_have_the_areas_and_aspects_asked_for():
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.vmap(lambda key: jnp.stack(augment.draw_box(key, 64, (0.2, 0.5), (0.5, 2), 64)))
    top, left, height, width = np.asarray(jax.jit(draw)(keys)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    area, aspect = height * width / 64**2, width / height
    assert area.min() > 0.19
    assert area.max() < 0.52
    assert 0.48 < aspect.min() < 0.55
    assert 1.8 < aspect.max() < 2.1
    assert abs(area.mean() - 0.35) < 0.01
    assert abs(np.log(aspect).mean()) < 0.05
    assert len(set(top)) > 40


def test_erasing_replaces_one_rectangle_of_about_half_of_the_images():
    x = jnp.full((200, 16, 16, 3), 2.0)
    (erase,) = augment.parse("random-erasing-0.5")
    erased = np.asarray(jax.jit(jax.vmap(erase))(jax.random.split(jax.random.key(0), 200), x))
    changed = (erased != 2).any(-1)
    assert 70 < changed.any((1, 2)).sum() < 130
    for mask, image in zip(changed, erased, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = np.ix_(range(rows[0], rows[-1] + 1), range(columns[0], columns[-1] + 1))
            assert mask[box].all()
            assert 0.01 < mask.mean() < 0.4
            assert image[box].max() <= 1


@pytest.mark.slow
def test_named_augmentations_are_keyed_by_image_on_any_number_of_devices():
    x = np.repeat(images(b=1, size=8), 24, axis=0)
    options = {"crop_padding": 0, "flip": False, "names": ALL}
    run = jax.jit(functools.partial(augment.augment, **options))
    found = []
    for count in (1, 4):
        mesh = sharding.make_mesh(jax.devices()[:count])
        found.append(np.asarray(run(jax.random.key(0), sharding.split_batch(x, mesh))))
    one, four = found
    assert one.shape == x.shape
    assert one.dtype == np.float32
    assert one.min() >= 0
    assert one.max() <= 1 + 1e-6
    np.testing.assert_allclose(one, four, atol=1e-6)
    assert len(np.unique(one.reshape(24, -1), axis=0)) == 24  # though the images are all the same


def test_a_grey_image_has_no_saturation():
    x = jnp.array(images(b=1, channels=1)[0])
    np.testing.assert_allclose(randaugment.saturation(x, 1.4), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("randaug", "'randaug', which is unknown.*nearest: randaugment"),
        ("random-erasing-1.5", "'random-erasing-1.5'; write random-erasing, or random-erasing-P"),
        ("randaugment-2", "randaugment-N-M with N from 1 to 20, M from 0 to 30"),
        ("randaugment-2-9.5", "randaugment-N-M"),
        ("color-jitter-0.4,", "''"),
        ("color-jitter-.", "color-jitter-S"),
    ],
)
def test_a_bad_name_is_one_sentence(names, says):
    with pytest.raises(UserError, match=says):
        augment.parse(names)
