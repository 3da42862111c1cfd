"""Float32 by several narrower products: which products, on which devices, and in which records."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at import config, models
from vit_at.attacks import Threat
from vit_at.distributed import precision
from vit_at.distributed.sharding import make_mesh
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import make_outcome_fn
from vit_at.evaluation.protocol import parse_attacks, record

PRESETS = [name for name in precision.PRECISIONS if name != "float32"]
SIZES = {"image_size": 16, "depth": 2, "num_classes": 3}


def lowered(name, how, **changes):
    """The text of logits and their gradient by the images, for a GPU."""
    model = models.create(name, **SIZES | changes)
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(lambda x, params: apply(params, x).sum()))
    with precision.products(how):
        text = gradient.trace(images, params).lower(lowering_platforms=("cuda",)).as_text()
    return text.splitlines()


def test_the_choices_of_a_configuration_are_those_of_the_devices():
    assert config.CHOICES["eval.precision"] == tuple(precision.PRECISIONS)


@pytest.mark.parametrize("how", PRESETS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deit_tiny_patch16_224", {"patch_size": 4}),
        ("convit_tiny", {"patch_size": 4, "stem": "conv"}),
        ("xcit_nano_12_p16_224", {"patch_size": 4}),
        ("convnext_tiny", {"depth": 10, "image_size": 32}),
    ],
)
def test_every_product_has_the_algorithm_and_every_convolution_full_precision(how, name, changes):
    text = lowered(name, how, **changes)
    products = [line for line in text if "stablehlo.dot_general" in line]
    count = {"bf16x9": 9, "bf16x6": 6, "tf32x3": 3}[how]
    assert products
    assert all(f"num_primitive_operations = {count}" in line for line in products)
    assert all(f"lhs_precision_type = {how.partition('x')[0]}," in line for line in products)
    convolutions = [line for line in text if "stablehlo.convolution" in line]
    assert bool(convolutions) == ("deit" not in name)
    assert all(line.count("precision HIGHEST") == 2 for line in convolutions)


def test_a_record_names_it_where_it_is_not_float32():
    threat = Threat("linf", 0.1, 0.05, 2)
    about = {"examples": runs.examples(4), "seed": 0, "weights": {"digest": "x"}}
    found = {
        how: record(parse_attacks("pgd-2", threat, precision=how)[0], np.ones(4, bool), **about)
        for how in ("float32", "tf32x3")
    }
    assert found["tf32x3"]["protocol"].pop("precision") == "tf32x3"
    assert found["tf32x3"] == found["float32"]


def test_an_evaluation_is_traced_with_the_precision_of_its_attack():
    seen = []

    def apply(params, images):
        seen.append(jax.config.jax_default_matmul_precision)
        return images.reshape(len(images), -1)[:, :3]

    (attack,) = parse_attacks("clean", Threat("linf", 0.1, 0.05, 2), precision="bf16x6")
    outcome = make_outcome_fn(apply, attack, make_mesh(jax.devices()[:1]), seed=0)
    images, labels = runs.examples(4).read(np.arange(4))
    outcome({}, {"image": images, "label": labels, "index": np.arange(4, dtype=np.uint32)})
    assert set(seen) == {"BF16_BF16_F32_X6"}


def test_devices_that_can_not_are_refused():
    says = r"--precision is 'tf32x3', which is for NVIDIA GPUs, but the devices are of kind 'cpu'"
    with pytest.raises(UserError, match=says):
        precision.check_precision("--precision", "tf32x3", make_mesh())
    with pytest.raises(UserError, match="precision is 'fp8'; use one of float32, bf16x9"):
        precision.check_precision("precision", "fp8", make_mesh())
    device = types.SimpleNamespace(platform="gpu")
    precision.check_precision("", "tf32x3", types.SimpleNamespace(devices=np.array([device])))
