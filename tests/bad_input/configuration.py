"""Configurations: types, tuples, bounds, contradictions, unknown names, from shell and Python."""

from bad_input.case import Case

import vit_at
from vit_at import configs


def flag(assignment: str, says: str, *more: str) -> Case:
    """A short run with one field changed."""
    return Case(command(assignment, *more), says)


def command(*assignments: str) -> list[str]:
    fields = [f"--config.{assignment}" for assignment in assignments]
    return ["train", "digits_sgd:smoke", "--no-report", "--workdir=run", *fields]


def python(says: str, **values) -> Case:
    """The same from Python; a dot in a field is written as two underscores."""

    def train(folder):
        config = configs.load("digits_sgd:smoke").unlock()
        with config.ignore_type():
            config.update_from_flattened_dict({f.replace("__", "."): v for f, v in values.items()})
        vit_at.train(config, folder / "run")

    return Case(train, says)


def without(field: str) -> Case:
    def train(folder):
        config = configs.load("digits_sgd:smoke").unlock()
        group, _, name = field.rpartition(".")
        del (config[group] if group else config)[name]
        vit_at.train(config, folder / "run")

    return Case(train, f"{field} is missing; start from")


# {field: (value, what the sentence says)}; a field may return with a space behind its name.
NUMBERS = {
    "seed": ("-1", "seed is -1; .* 0 or more"),
    "seed ": ("100000000000000000000", "seed is 1000.*at most 4294967295"),
    "seed  ": ("4294967296", "at most 4294967295"),
    "epochs": ("0", "1 or more"),
    "epochs ": ("1000000000000", "at most 1000000"),
    "epochs  ": ("1e3", "epochs is '1e3'; it must be a whole number"),
    "batch_size": ("0", "1 or more"),
    "batch_size ": ("4294967296", "at most 1048576"),
    "batch_size  ": ("1000", "batch_size"),
    "accumulate_steps": ("0", "1 or more"),
    "accumulate_steps ": ("33", "does not divide batch_size"),
    "accumulate_steps  ": ("9999999999", "at most 1048576"),
    "log_every_steps": ("0", "1 or more"),
    "log_every_steps ": ("10000000000", "at most 1000000000"),
    "beta": ("-6.0", "0 or more"),
    "beta ": ("nan", "beta is nan"),
    "beta  ": ("1e30", "at most 1000000"),
    "label_smoothing": ("1.0", "not including 1"),
    "ema_decay": ("-0.1", "from 0"),
    "ema_decay ": ("inf", "not including 1"),
    "model.patch_size": ("100000", "at most 8192"),
    "model.patch_size ": ("3", "does not divide data.image_size"),
    "model.patch_size  ": ("16", "leaves 1 tokens"),
    "model.embed_dim": ("100000", "at most 65536"),
    "model.embed_dim ": ("33", "does not divide model.embed_dim"),
    "model.depth": ("100000", "at most 1000"),
    "model.num_heads": ("3", "does not divide model.embed_dim"),
    "model.num_heads ": ("-2", "0 or more"),
    "model.mlp_ratio": ("0.0001", "less than one unit"),
    "model.mlp_ratio ": ("1e9", "at most 100"),
    "model.qk_scale": ("inf", "at most 10000"),
    "model.drop_path": ("1.0", "not including 1"),
    "data.validation_examples": ("-1", "0 or more"),
    "data.validation_examples ": ("160", "validation_examples"),
    "data.image_size": ("100000", "at most 8192"),
    "data.image_size ": ("0", "1 or more"),
    "data.crop_padding": ("16", "less than data.image_size"),
    "data.threads": ("1000000", "at most 1024"),
    "data.cache_gib": ("-1.0", "0 or more"),
    "data.cache_gib ": ("inf", "at most 1000000"),
    "mixing.mixup_alpha": ("1e30", "at most 10000"),
    "mixing.cutmix_probability": ("2.0", "from 0 to 1"),
    "threat.eps": ("0", "over 0"),
    "threat.eps ": ("8", "did you mean 8/255"),
    "threat.eps  ": ("8/0", "threat.eps"),
    "threat.step_size": ("1.0", "at most twice"),
    "threat.step_size ": ("nan", "threat.step_size is nan"),
    "threat.steps": ("1000000", "at most 10000"),
    "threat.eps_warmup_epochs": ("100.0", "at most 2"),
    "masking.keep_max": ("1.5", "from 0 to 1"),
    "masking.patch_size": ("-4", "0 or more"),
    "optimizer.learning_rate": ("1e30", "at most 1000"),
    "optimizer.learning_rate ": ("-0.1", "0 or more"),
    "optimizer.momentum": ("1.0", "not including 1"),
    "optimizer.b2": ("nan", "not including 1"),
    "optimizer.weight_decay": ("inf", "at most 1000"),
    "optimizer.clip_norm": ("-1.0", "0 or more"),
    "optimizer.drop_factor": ("10.0", "from 0 to 1"),
    "optimizer.warmup_epochs": ("2.0", "less than epochs"),
    "eval.every_epochs": ("0", "eval.checkpoint=last"),
    "eval.num_examples": ("-5", "0 or more"),
    "eval.batch_size": ("0", "1 or more"),
    "checkpoint.every_minutes": ("nan", "at most 1000000"),
    "checkpoint.every_steps": ("-1", "0 or more"),
    "checkpoint.keep": ("0", "1 or more"),
}
WORDS = {
    "name": ("", "name is empty"),
    "name ": ("../../etc/run", "names a directory"),
    "name  ": ("..", "names a directory"),
    "name   ": ("n" * 300, "at most 200 bytes"),
    "name    ": ("a\nb", "printable"),
    "dtype": ("float16", "nearest: bfloat16"),
    "sharding": ("fdsp", "nearest: fsdp"),
    "objective": ("trade", "nearest: trades"),
    "model.name": ("vit_bsae", "the nearest are vit_base"),
    "model.stem": ("convolution", "nearest: conv"),
    "model.remat": ("maybe", "True or False"),
    "model.pretrained": ("missing.pth", "missing.pth"),
    "data.name": ("cifar11", "cifar11"),
    "data.name ": ("folder:missing", "missing"),
    "data.train_split": ("train[", "train\\["),
    "data.test_split": ("train[:160]", "test"),
    "data.flip": ("2", "True or False"),
    "threat.norm": ("l0", "linf, l2, l1"),
    "awp.gamma": ("2", "from 0 to 1"),
    "awp.gamma ": ("small", "awp.gamma"),
    "optimizer.layer_decay": ("0", "over 0 and at most 1"),
    "threat.start": ("uniform", "random, zero, noise"),
    "optimizer.name": ("adam", "nearest: adamw"),
    "optimizer.schedule": ("cyclic", "optimizer.warmup_epochs"),
    "eval.validation_attack": ("pgd-2,clean", "must be one attack"),
    "eval.attacks": ("pgd", "pgd"),
    "eval.attacks ": ("cw-0", "cw-0"),
    "eval.checkpoint": ("newest", "best, last"),
    "eval.precision": ("tf32", "float32, bf16x9, bf16x6, tf32x3"),
    "modell.depth": ("3", "is unknown; the nearest are model.depth"),
}
TUPLES = {
    "data.mean": ("abc", "data.mean"),
    "data.mean ": ("()", "data.mean"),
    "data.mean  ": ("(127.0,)", "divide values of 0 to 255 by 255"),
    "data.mean   ": ('("a",)', "data.mean"),
    "data.mean    ": ("(0.5, 0.5, 0.5)", "3 channels and data.std 1"),
    "data.std": ("(0.0,)", "from 0.001 to 1"),
    "data.std ": ("(1e-30,)", "from 0.001 to 1"),
    "optimizer.drop_before_end": ("(-1.0,)", "0 or more"),
}
NAN = float("nan")
TABLE = NUMBERS | WORDS | TUPLES
CASES = {
    f"{field.strip()}={value[:20]!r}": flag(f"{field.strip()}={value}", says)
    for field, (value, says) in TABLE.items()
} | {
    "python: text for a whole number": python("epochs is '3'; it must be a whole", epochs="3"),
    "python: a list for a number": python(r"beta is \[6.0\]; it must be a number", beta=[6.0]),
    "python: None": python("batch_size is None; it must be a whole number", batch_size=None),
    "python: a switch for a number": python("threat.steps is True", threat__steps=True),
    "python: a number for a switch": python("model.remat is 1; .*True or False", model__remat=1),
    "python: a float for a whole number": python("model.depth is 2.0", model__depth=2.0),
    "python: a fraction as text": python("threat.eps is '8/255'", threat__eps="8/255"),
    "python: a number for text": python("objective is 3", objective=3),
    "python: a name with NUL": python("name is .*printable", name="a\0b"),
    "python: a path with NUL": python("data.dir is .*printable", data__dir="/a\0b"),
    "python: an endless word": python("data.name is .*at most 4096", data__name="x" * 10**6),
    "python: a number for a tuple": python("data.mean is 0.5; it must be a tuple", data__mean=0.5),
    "python: text in a tuple": python(
        "data.mean is .*tuple of numbers", data__mean=(0.5, "a", 0.5)
    ),
    "python: a tuple with NaN": python("data.mean is .*from 0 to 1", data__mean=(NAN,)),
    "python: an endless tuple": python(
        "optimizer.drop_before_end", optimizer__drop_before_end=(1.0,) * 10**4
    ),
    "python: weights that are not averaged": python(
        "eval.weights is 'ema', but ema_decay is 0", eval__weights="ema"
    ),
    "python: an average over more than all epochs": python(
        "swa_epochs is 99; it must be at most", swa_epochs=99
    ),
    "python: AWP after the end": python(
        "awp.warmup_epochs is 9", awp__gamma=0.1, awp__warmup_epochs=9
    ),
    "python: AWP without an attack": python(
        "awp.gamma is 0.1, but objective 'natural'", awp__gamma=0.1, objective="natural"
    ),
    "python: a decay of Swin's layers": python(
        "optimizer.layer_decay is 0.5 .*1 for Swin, XCiT",
        optimizer__layer_decay=0.5,
        model__name="swin_tiny_patch4_window7_224",
    ),
    "python: no seed": without("seed"),
    "python: no objective": without("objective"),
    "python: no eps": without("threat.eps"),
    "the corrected command runs": Case(
        command("seed=100000000000000000000"),
        "seed is 1000",
        corrected=command("seed=1", "epochs=1", "eval.attacks=clean"),
        slow=True,
    ),
}
