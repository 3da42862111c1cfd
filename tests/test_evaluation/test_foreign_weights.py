"""Weight files written by PyTorch from timm's own models: the command finds timm's accuracy.

Each form of file, of each architecture, is evaluated by the command. The logits are compared with
timm's, and the outcome of each image under PGD with that of a plain PyTorch loop from the same
start. Skipped without torch and timm.
"""

import copy
import functools
import json
import pathlib

import golden
import jax
import numpy as np
import pytest

from vit_at import evaluate
from vit_at.attacks import Threat
from vit_at.attacks.threat import random_start
from vit_at.configs import default
from vit_at.evaluation.subject import of_file

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.slow  # compiles an attack for each architecture

EPS, STEP, STEPS, COUNT = 1 / 255, 0.4 / 255, 3, 16
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES = {"img_size": 32, "patch_size": 4, "num_classes": 10}
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODELS = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "convit_tiny": {"embed_dim": 12, "depth": 3, "num_heads": 2, "local_up_to_layer": 2},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
    },
}


class Normalise(torch.nn.Module):
    """RobustBench's first layer: buffers ``mean`` and ``std`` [1, 3, 1, 1]."""

    def __init__(self):
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


def wrapped(model):
    return torch.nn.Sequential(
        torch.nn.modules.container.OrderedDict([("normalize", Normalise()), ("model", model)])
    )


def stored(model, form):
    """What ``torch.save`` writes to a file of this form."""
    parallel, plain = torch.nn.DataParallel, model.state_dict()
    return {
        "plain": lambda: plain,
        "checkpoint_40": lambda: parallel(model).state_dict(),
        "robustbench.pt": lambda: wrapped(model).state_dict(),
        "parallel_inside.pt": lambda: wrapped(parallel(model)).state_dict(),
        "parallel_outside.pt": lambda: parallel(wrapped(model)).state_dict(),
        "nested.pth": lambda: {"epoch": 40, "state_dict": parallel(model).state_dict()},
        "nested.tar": lambda: {"model": plain, "optimizer": {"lr": torch.tensor(0.1)}},
        "nested.bin": lambda: {"model_state_dict": plain, "accuracy": 0.5},
        "averaged.pth": lambda: {"model": {n: 0 * v for n, v in plain.items()}, "ema": plain},
    }[form]()


FORMS = [
    "plain",
    "checkpoint_40",
    "robustbench.pt",
    "parallel_inside.pt",
    "parallel_outside.pt",
    "nested.pth",
    "nested.tar",
    "nested.bin",
    "averaged.pth",
]


@functools.cache
def of_timm(name):
    """timm's model, its images [N, C, H, W] and labels, and what PyTorch finds of them."""
    model = timm.create_model(name, **SIZES, **MODELS[name]).eval()
    for key, value in model.state_dict().items():  # buffers of integers stay
        if value.is_floating_point():
            value.copy_(torch.from_numpy(golden.weight(key, tuple(value.shape))))
    classifier = wrapped(copy.deepcopy(model)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3)).astype(np.uint8)
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        logits = classifier(images)
    labels = logits.argmax(-1)
    labels[:2] = (labels[:2] + 1) % 10  # these are wrong from the start
    labels[-1] = 9  # all classes are numbered
    return model, pixels, labels.numpy(), logits.numpy(), torch_pgd(classifier, images, labels)


def starts():
    """The random starts that ``vit-at evaluate --seed=0`` draws."""
    threat = Threat("linf", EPS, STEP, STEPS)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(COUNT)]
    drawn = [random_start(jax.random.split(k, 1)[0], (1, 32, 32, 3), threat)[0] for k in keys]
    return torch.from_numpy(np.stack(drawn).transpose(0, 3, 1, 2).copy())


def torch_pgd(classifier, images, labels):
    """Correct [N] bool after PGD on the cross-entropy."""
    attacked = (images + starts()).clamp(0, 1)
    for _ in range(STEPS):
        attacked.requires_grad_()
        loss = torch.nn.functional.cross_entropy(classifier(attacked), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        moved = attacked.detach() + STEP * gradient.sign()
        attacked = (images + (moved - images).clamp(-EPS, EPS)).clamp(0, 1)
    with torch.no_grad():
        return (classifier(attacked).argmax(-1) == labels).numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_command_finds_what_pytorch_finds(name, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, pixels, labels, logits, robust = of_timm(name)
    torch.save(stored(model, form), form)
    np.save("images.npy", pixels)
    np.save("labels.npy", labels)
    heads = {} if name.startswith(("convit", "swin")) else {"num_heads": 2}
    own = {} if form[:4] in ("robu", "para") else {"mean": MEAN, "std": STD}
    subject = of_file(form, name, default.get_config().unlock(), **heads, **own)
    ours = subject.apply(subject.params, pixels.astype(np.float32) / 255)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)

    given = {n: ",".join(map(str, v)) for n, v in own.items()} | heads
    options = [f"--{option}={value}" for option, value in given.items()]
    options += [f"--eps={EPS!r}", f"--step_size={STEP!r}", f"--attacks=clean,pgd-{STEPS}"]
    options += ["--data=npy:images.npy", "--batch_size=16", "--workdir=out"]
    assert evaluate.main([f"--weights={form}", f"--model={name}", *options]) == 0
    clean, pgd = json.loads(pathlib.Path("out/results.json").read_text())
    assert clean["correct"] == (logits.argmax(-1) == labels).sum()
    assert pgd["correct"] == robust.sum()
    assert 0 < robust.sum() < clean["correct"]
    with np.load("out/per_example.npz") as kept:
        (found,) = (kept[n] for n in kept.files if f"pgd-{STEPS}" in n and n.endswith("/correct"))
    np.testing.assert_array_equal(found, robust)
    said = capsys.readouterr().err
    assert ("prefix" in said) == (form != "plain")
    assert ("normalisation taken from the file: mean 0.4,0.5,0.6" in said) == (not own)
