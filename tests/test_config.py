"""Recipes, variants and validation: what is refused, and that the sentence says how to mend it."""

import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from vit_at import config as configuration
from vit_at import configs
from vit_at.config import flatten
from vit_at.configs import common, default, digits_sgd
from vit_at.errors import UserError
from vit_at.models import build
from vit_at.training import objectives

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = ["default", *(name for name in configs.names() if "/" not in name)]


def recipe(name: str) -> ConfigDict:
    return default.get_config() if name == "default" else configs.load(name)


def changed(**changes) -> ConfigDict:
    """The default with other values; a dot in a field is written as two underscores."""
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({f.replace("__", "."): v for f, v in changes.items()})
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_locked_and_builds_its_model(name):
    config = recipe(name)
    objectives.check(config)
    assert config.is_locked
    assert config.name == name
    model = build(config, 10, "float32")
    images = jax.ShapeDtypeStruct((1, *[config.data.image_size] * 2, 3), "float32")
    if len(config.data.mean) == 1:
        images = images.update(shape=(*images.shape[:3], 1))
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_adds_no_field_to_the_default(name):
    assert set(flatten(recipe(name))) == set(flatten(default.get_config()))


def test_every_field_is_read_by_the_package():
    """By attribute, as in config.data.flip, or by name, as in ("embed_dim", ...), or as **group."""
    source = "\n".join(
        path.read_text()
        for path in sorted((ROOT / "vit_at").rglob("*.py"))
        if path.parent.name != "config"  # validation alone makes no field alive
    )
    validation = (ROOT / "vit_at" / "config" / "validation.py").read_text()
    whole_groups = set(re.findall(r"\*\*config\.(\w+)", source))
    dead = []
    for field in flatten(default.get_config()):
        group, _, name = field.rpartition(".")
        read = rf"\.{name}\b|[\"']{name}[\"']"
        alive = group in whole_groups or re.search(read, source)
        # The one field that only permits something is read where that is refused.
        alive = alive or re.search(rf"not config\.{re.escape(field)}\b", validation)
        if not alive:
            dead.append(field)
    assert not dead


REFUSED = [
    ({"threat__eps": 8.0}, ["threat.eps is 8", "pixel", "8/255"]),
    ({"threat__eps": 0.0}, ["threat.eps is 0", "over 0"]),
    ({"threat__eps": -0.1}, ["threat.eps is -0.1", "over 0"]),
    ({"threat__eps": float("nan")}, ["threat.eps is nan"]),
    ({"threat__norm": "l2", "threat__eps": 200.0}, ["threat.eps is 200", "L2"]),
    ({"threat__step_size": 0.1}, ["threat.step_size is 0.1", "twice threat.eps (0.0313"]),
    ({"threat__step_size": 0.0}, ["threat.step_size is 0", "over 0"]),
    ({"threat__steps": -1}, ["threat.steps is -1", "1 or more"]),
    ({"threat__steps": 0}, ["threat.steps is 0", "1 or more"]),
    ({"threat__norm": "linff"}, ["threat.norm is 'linff'", "linf, l2", "nearest: linf"]),
    ({"threat__start": "uniform"}, ["threat.start is 'uniform'", "random, zero, noise"]),
    (
        {"threat__start": "zero", "objective": "trades", "mixing__probability": 0.0},
        ["threat.start is 'zero'", "random"],
    ),
    ({"objective": "trade"}, ["objective is 'trade'", "natural, at, trades, mart", "trades)"]),
    ({"dtype": "bfloat"}, ["dtype is 'bfloat'", "nearest: bfloat16"]),
    ({"optimizer__name": "adam"}, ["optimizer.name is 'adam'", "nearest: adamw"]),
    ({"optimizer__schedule": "cosin"}, ["optimizer.schedule is 'cosin'", "nearest: cosine"]),
    ({"optimizer__schedule": "cyclic"}, ["cyclic", "optimizer.warmup_epochs", "above 0"]),
    ({"optimizer__warmup_epochs": 40.0}, ["optimizer.warmup_epochs is 40", "less than epochs"]),
    ({"optimizer__learning_rate": -0.1}, ["optimizer.learning_rate is -0.1", "0 or more"]),
    ({"optimizer__learning_rate": float("inf")}, ["optimizer.learning_rate is inf"]),
    ({"optimizer__momentum": 1.0}, ["optimizer.momentum is 1", "not including 1"]),
    ({"optimizer__drop_before_end": (5.0, -1.0)}, ["optimizer.drop_before_end", "-1.0"]),
    ({"objective": "trades"}, ["mixing.probability is 0.3", "trades", "set it to 0"]),
    ({"objective": "mart"}, ["mixing.probability is 0.3", "mart"]),
    (
        {"mixing__mixup_alpha": 0.0, "mixing__cutmix_alpha": 0.0},
        ["mixing.mixup_alpha and", "both 0"],
    ),
    ({"mixing__probability": 1.5}, ["mixing.probability is 1.5", "from 0 to 1"]),
    ({"label_smoothing": 1.0}, ["label_smoothing is 1.0", "not including 1"]),
    ({"name": " "}, ["name is empty"]),
    ({"threat__eps_warmup_epochs": 1e6}, ["threat.eps_warmup_epochs is 1e+06", "at most 40"]),
    ({"masking__prm": True, "epochs": 9}, ["masking.warmup_epochs is 10", "at most 9"]),
    ({"data__crop_padding": 32}, ["data.crop_padding is 32", "less than data.image_size"]),
    ({"ema_decay": 1.0}, ["ema_decay is 1.0", "not including 1"]),
    ({"masking__keep_max": 1.2}, ["masking.keep_max is 1.2", "from 0 to 1"]),
    ({"masking__prm": True, "masking__patch_size": 5}, ["masking.patch_size 5", "image_size 32"]),
    ({"objective": "natural", "masking__ard": True}, ["masking.ard", "natural"]),
    ({"data__std": (0.2, 0.0, 0.2)}, ["data.std", "from 0.001 to 1"]),
    ({"data__std": (0.2,)}, ["data.mean has 3 channels and data.std 1"]),
    ({"data__mean": (0.5, 0.5), "data__std": (0.5, 0.5)}, ["data.mean has 2", "1 (grey) or 3"]),
    ({"data__validation_examples": 0}, ["eval.checkpoint is 'best'", "eval.checkpoint=last"]),
    ({"eval__every_epochs": 0}, ["eval.checkpoint is 'best'", "eval.every_epochs 0"]),
    (
        {"eval__every_epochs": 0, "eval__checkpoint": "last", "eval__stop_if_overfitted": True},
        ["eval.stop_if_overfitted is True", "needs validation", "set that to False"],
    ),
    ({"eval__checkpoint": "newest"}, ["eval.checkpoint is 'newest'", "best, last"]),
    ({"accumulate_steps": 3}, ["accumulate_steps 3", "batch_size 64"]),
    ({"epochs": 0}, ["epochs is 0", "1 or more"]),
    ({"batch_size": -64}, ["batch_size is -64", "1 or more"]),
    ({"seed": -1}, ["seed is -1", "0 or more"]),
    ({"model__depth": -1}, ["model.depth is -1", "0 or more"]),
    ({"checkpoint__keep": 0}, ["checkpoint.keep is 0", "1 or more"]),
    ({"checkpoint__every_minutes": -1.0}, ["checkpoint.every_minutes is -1"]),
]


@pytest.mark.parametrize(
    ("changes", "said"),
    REFUSED,
    ids=[" ".join(f"{f}={v}" for f, v in c.items()) for c, _ in REFUSED],
)
def test_a_value_that_cannot_work_is_refused_with_field_value_and_remedy(changes, said):
    with pytest.raises(UserError) as caught:
        objectives.check(changed(**changes))
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in said:
        assert part in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"data__validation_examples": 0, "eval__checkpoint": "last"},
        {"threat__norm": "l2", "threat__eps": 0.5, "threat__step_size": 0.1},
        {"objective": "mart", "mixing__probability": 0.0, "threat__start": "zero"},
        {"optimizer__schedule": "cyclic", "optimizer__warmup_epochs": 5.0},
        {"threat__step_size": 16 / 255},
    ],
)
def test_unusual_values_that_work_are_allowed(changes):
    objectives.check(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__patch_size": 5}, "model.patch_size 5 does not divide data.image_size 32"),
        ({"model__patch_size": 16}, "leaves 4 tokens"),
        ({"model__name": "deit_tiny_patch16"}, "deit_tiny_patch16_224"),
        ({"model__num_heads": 5}, "model.num_heads 5 does not divide"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        build(changed(**changes), 10, "float32")


def test_few_tokens_can_be_allowed():
    config = changed(model__patch_size=16, model__allow_few_tokens=True)
    assert build(config, 10, "float32").num_tokens == 4


# --- Config strings ---------------------------------------------------------------------------


def test_variants_change_the_config_and_its_name():
    config = digits_sgd.get_config("model=deit_small_patch16_224,ard_prm")
    assert config.model.name == "deit_small_patch16_224"
    assert config.masking.ard
    assert config.masking.prm
    assert config.name == "digits_sgd-deit_small_patch16_224-ard_prm"
    assert config.is_locked


@pytest.mark.parametrize("variant", sorted(common.VARIANTS.keys() - common.TAKES_VALUE))
def test_every_bare_variant_gives_a_valid_config(variant):
    config = digits_sgd.get_config(variant)
    objectives.check(config)
    assert config.name == f"digits_sgd-{variant}"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "default"])
def test_every_recipe_has_a_smoke_variant_that_needs_no_data(name):
    config = configs.load(f"{name}:smoke")
    objectives.check(config)
    assert config.data.name == "digits"
    assert config.model.pretrained == ""
    assert config.epochs * 128 // config.batch_size <= 8
    assert config.eval.num_examples <= 48  # of the test images of digits
    build(config, 10, "float32")


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("smok", "'smok' is unknown; use smoke"),
        ("smoke,ard-prm", "'ard-prm' is unknown; use ard_prm"),
        ("xyzzy", "natural"),
        ("model", "write model=NAME"),
        ("model=", "write model=NAME"),
        ("smoke=3", "write smoke without a value"),
    ],
)
def test_a_mistaken_variant_is_refused_with_the_nearest(variants, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        digits_sgd.get_config(variants)


# --- Recipes by name --------------------------------------------------------------------------


def test_every_file_of_a_recipe_is_found_by_name():
    """So that a new file can't be left out: only these are no recipes."""
    files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    others = {
        "__init__.py",
        "common.py",
        "default.py",
        "fields.py",
        "study/__init__.py",
        "study/base.py",
    }
    assert {str(path) for path in files} - others == {f"{name}.py" for name in configs.names()}


@pytest.mark.parametrize("name", configs.names())
def test_a_recipe_is_the_same_by_name_and_by_file(name):
    by_name, by_file = (configs.load(r) for r in (name, str(ROOT / "configs" / f"{name}.py")))
    assert by_name.to_dict() == by_file.to_dict()
    assert configs.find(name).__name__ == f"vit_at.configs.{name.replace('/', '.')}"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("digits_sdg", "'digits_sdg' is unknown; the nearest are digits_sgd"),
        ("masking:cpu", "'masking' is unknown; the nearest are study/masking"),
        ("base", "'base' is unknown"),
        ("configs/digits_sdg.py", "there is no such file"),
        ("digits_sgd:ardd", "config variant 'ardd' is unknown; use ard"),
        ("study/masking:cpu,gpu", "'cpu' and 'gpu' exclude each other"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(recipe, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        configs.load(recipe)
    assert "\n" not in str(caught.value)


# --- JSON -------------------------------------------------------------------------------------


def test_differences_name_fields_with_both_values():
    old = {"epochs": 3, "threat": {"eps": 0.1, "norm": "linf"}, "gone": 1}
    new = {"epochs": 4, "threat": {"eps": 0.2, "norm": "linf"}}
    assert configuration.differences(old, new) == [
        "epochs 3 -> 4",
        "gone 1 -> None",
        "threat.eps 0.1 -> 0.2",
    ]


def test_evaluation_has_a_threat_of_its_own(parse):
    recipe = "digits_sgd"
    same = parse(recipe)
    assert configuration.evaluation_threat(same).to_dict() == same.threat.to_dict()
    own = parse(recipe, "--config.eval.threat.step_size=0.01", "--config.eval.threat.eps=0.1")
    threat = configuration.evaluation_threat(own)
    assert (threat.norm, threat.eps, threat.step_size) == ("linf", 0.1, 0.01)
    assert own.threat == same.threat
    configuration.validate(own)


@pytest.mark.parametrize(
    ("trained", "own", "tested"),
    [
        ((8 / 255, 2 / 255), {}, 2 / 255),
        ((8 / 255, 10 / 255), {}, 2 / 255),  # FGSM
        ((8 / 255, 1 / 255), {}, 1 / 255),
        ((8 / 255, 10 / 255), {"step_size": 10 / 255}, 10 / 255),
        ((8 / 255, 2 / 255), {"eps": 4 / 255}, 1 / 255),
    ],
)
def test_evaluation_takes_no_steps_that_are_too_long_for_it(trained, own, tested):
    config = digits_sgd.get_config()
    config.threat.eps, config.threat.step_size = trained
    config.eval.threat.update(own)
    assert configuration.evaluation_threat(config).step_size == tested
    configuration.validate(config)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm": "l2"}, "give eval.threat.eps and eval.threat.step_size too"),
        ({"norm": "l7"}, "eval.threat.norm is 'l7'"),
        ({"eps": 8.0}, "eval.threat.eps is 8; eps is in pixel units"),
        ({"eps": 0.01, "step_size": 0.03}, "eval.threat.step_size is 0.03; it must be over 0 and"),
        ({"step_size": -1.0}, "eval.threat.step_size is -1.0; it must be 0 or more"),
    ],
)
def test_a_threat_of_evaluation_that_makes_no_sense_is_refused(fields, said):
    config = digits_sgd.get_config()
    config.eval.threat.update(fields)
    with pytest.raises(UserError, match=re.escape(said)):
        configuration.validate(config)
