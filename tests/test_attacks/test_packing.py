"""How AutoAttack's work is cut into batches and rounds, none of which changes an outcome."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_problem import attack, median_eps, problem

from vit_at import models
from vit_at.attacks.autoattack import Budget, cost, packing, programs
from vit_at.distributed import sharding


def test_same_outcome_on_any_number_of_devices_and_any_batch_size():
    params, images, labels = problem()
    eps = median_eps(params, images, labels, "l2")
    outcomes = []
    for devices, batch_size in ((1, 24), (4, 16)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        options = {"norm": "l2", "eps": eps, "batch_size": batch_size, "mesh": mesh}
        outcomes.append(attack(params, images, labels, **options).columns)
    for name in ("outcome", "run", "step"):
        np.testing.assert_array_equal(*(columns[name] for columns in outcomes))


def test_the_work_is_cut_for_the_devices_of_the_mesh():
    """Not for those of this process: the program for another platform can be compiled here."""
    accelerators = np.array([types.SimpleNamespace(platform="tpu")])
    cut = programs.cut_for(types.SimpleNamespace(devices=accelerators))
    assert cut.most_slots is None
    assert programs.cut_for(sharding.make_mesh()).most_slots == 8


@pytest.mark.parametrize(
    ("count", "batch_size", "width"),
    [(0, 24, 8), (5, 24, 8), (9, 24, 16), (20, 24, 24), (100, 1000, 128), (600, 1000, 1000)],
)
def test_a_batch_on_an_accelerator_is_the_smallest_one_doubled(count, batch_size, width):
    cut, mesh = programs._ON_AN_ACCELERATOR, types.SimpleNamespace(size=1)
    own = types.SimpleNamespace(_cut=cut, _mesh=mesh, _batch_size=batch_size)
    assert packing.Packing._width_for(own, count) == width


@pytest.mark.slow
def test_narrower_batches_on_accelerators_change_no_outcome(monkeypatch):
    params, images, labels = problem(24)
    options = {"norm": "l2", "eps": median_eps(params, images, labels, "l2"), "batch_size": 16}
    options |= {"mesh": sharding.make_mesh(jax.devices()[:1]), "budget": Budget(20, 100)}
    expected = attack(params, images, labels, **options).columns
    cut = programs._ON_AN_ACCELERATOR._replace(slots=1, worth_compiling=0.0)
    monkeypatch.setattr(packing, "cut_for", lambda mesh: cut)
    widths, round_ = [], packing.Packing._round

    def noted(self):
        widths.append(len(self._image))
        return round_(self)

    monkeypatch.setattr(packing.Packing, "_round", noted)
    found = attack(params, images, labels, **options).columns
    assert len(set(widths)) > 1
    assert set(widths) <= {16, 8, 4, 2, 1}
    for name in ("outcome", "run", "step"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("laid_out", [False, True])
def test_the_work_is_counted_in_operations(laid_out):
    model = models.create("vit_tiny_patch16_224", image_size=32, depth=3, num_classes=10)
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))

    def logits(params, images):
        return apply(models.unstack_blocks(apply, params) if laid_out else params, images)

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert cost.flop(logits, params, images) == pytest.approx(model.forward_flops(), rel=1e-6)


def test_slots_are_not_wasted():
    params, images, labels = problem(64)
    eps = median_eps(params, images, labels, "linf")
    result = attack(params, images, labels, eps=eps, attacks=["apgd-ce"], batch_size=16)
    work = result.work["apgd-ce"]
    assert work["steps"] / work["computed"] > 0.6
