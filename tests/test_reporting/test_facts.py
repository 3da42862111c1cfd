"""What a configuration says in words."""

import pytest

from vit_at import configs
from vit_at.reporting.facts import facts


def said(recipe, **fields):
    config = configs.load(recipe)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return dict(facts(config.to_dict()))


def test_the_recipe_of_the_paper():
    found = said("cifar10_sgd:ard_prm")
    assert found == {
        "training": "AT + ARD + PRM",
        "model": "vit_base_patch16_224, patch 4",
        "started from": "hf:timm/vit_base_patch16_224.orig_in21k_ft_in1k",
        "data": "cifar10 at 32 px, train",
        "augmentation": "crop after padding by 4, flip, mixup or CutMix on 30% of the batches",
        "training attack": "linf, eps 8/255, 10 steps of 2/255",
        "optimiser": "sgd, learning rate 0.1, step schedule, weight decay 0.0001, "
        "gradient clipped at 1",
        "length": "40 epochs, batch 64",
        "training dtype": "auto",
        "seed": "0",
    }


@pytest.mark.parametrize(
    ("recipe", "fields", "label", "text"),
    [
        ("cifar10_fast", {}, "training attack", "1 step of 8/255, from noise, not projected"),
        ("cifar10_sgd", {"threat.method": "apgd"}, "training attack", "10 steps of APGD, at first"),
        ("cifar10_sgd", {"threat.also": "l2:0.5:0.1"}, "training attack", "max with l2:0.5:0.1"),
        ("cifar10_sgd:natural", {}, "training attack", "none"),
        (
            "cifar10_small",
            {},
            "model",
            "embed_dim 128, depth 5, num_heads 4, patch 4, convolutions",
        ),
        ("cifar10_small", {}, "averaged weights", "EMA, decay 0.998"),
        ("cifar10_sgd", {"swa_epochs": 5.0}, "averaged weights", "SWA over 5 epochs"),
        ("cifar10_extra", {}, "data", "train, 70% of each batch from npz:1m.npz"),
        ("cifar10_extra", {}, "weight perturbation", "AWP, gamma 0.005"),
        ("cifar10_extra", {}, "label smoothing", "0.1"),
        ("imagenet_xl", {}, "phases", "data.image_size=84"),
        ("cifar10_sgd", {"data.augment": "random-erasing"}, "augmentation", "flip, random-erasing"),
        ("cifar10_sgd", {"optimizer.layer_decay": 0.75}, "optimiser", "0.75 times the rate"),
        ("digits_sgd", {}, "augmentation", "none"),
        ("digits_sgd", {}, "training attack", "eps warm-up over"),
    ],
)
def test_what_is_unusual_is_named(recipe, fields, label, text):
    assert text in said(recipe, **fields)[label]
