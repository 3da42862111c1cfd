"""The full standard AutoAttack: ours against the official PyTorch code, on one model and images.

    pip install timm torch git+https://github.com/fra31/auto-attack   # only for the comparison
    python benchmarks/official_autoattack.py --images=256 --out=benchmarks/results/autoattack.json

The model is a small robust ViT (tests/data/autoattack) in float32; in PyTorch it is timm's module.
``--export=DIR`` takes a model that ``vit-at export`` wrote instead, and its test images:

    vit-at train digits_sgd && vit-at export runs/digits_sgd
    python benchmarks/official_autoattack.py --export=runs/digits_sgd/export --eps=0.15 --images=128

``--outcomes FILE`` takes ours from an evaluation that has been made, of the same model and images:

    vit-at evaluate cifar10_convit_128x5_conv --attacks=autoattack --num_examples=1000 --workdir=W
    ... --images=1000 --outcomes W/autoattack/*/per_example.npz

Seconds are the wall time of the whole cascade; ours include compilation. Both run on all cores or
on the GPU. Forward and backward passes are counted in images. Without PyTorch, timm or autoattack,
only ours runs. Run again after a stop, it goes on with the attack that was stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import reference_autoattack as reference

from vit_at.data import sources
from vit_at.data.examples import Examples
from vit_at.distributed import devices, sharding
from vit_at.evaluation.evaluator import Evaluator
from vit_at.evaluation.protocol import AUTOATTACK, Attack


class Subject(NamedTuple):
    """What is attacked: examples, and the model in two forms.

    model: () -> ours, (apply, params); net: () -> timm's module; mean, std: of its normalisation.
    """

    examples: Examples
    model: Any
    net: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]


def recorded(count: int) -> Subject:
    """The recorded model and the first of its images; nothing of JAX is set up yet."""
    data = reference.arrays("images")
    pixels, labels = data["images"][:count], data["labels"][:count].astype(np.int32)

    def net():
        import timm
        import torch

        sizes = {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 4}
        module = timm.create_model("deit_tiny_patch16_224", num_classes=10, **sizes)
        state = {n: torch.tensor(v) for n, v in reference.arrays("model_weights").items()}
        module.load_state_dict(state)
        return module

    rows, names = np.arange(len(labels)), tuple(map(str, range(10)))
    read = lambda rows: (pixels[rows], labels[rows])  # noqa: E731
    examples = Examples("recorded", names, pixels.shape[1:], rows, rows, read)
    model = lambda: (reference.apply(), reference.parameters())  # noqa: E731
    return Subject(examples, model, net, reference.MEAN, reference.STD)


def exported(directory: str, count: int) -> Subject:
    """A model that ``vit-at export`` wrote, and the first images of its test split."""
    import vit_at

    model = vit_at.load(directory)
    data = model.config.data
    examples = sources.load(data, data.test_split).take(np.arange(count))

    def net():
        sys.path.append(directory)
        from load import load

        return load(directory).model

    return Subject(examples, lambda: (model.func, model.args[0]), net, data.mean, data.std)


def ours(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Our cascade: the robust images after each attack, seconds and passes through the model.

    It runs as in ``vit-at evaluate``, with the audit, which seconds leave out.
    """
    from vit_at.attacks import Threat, autoattack

    results, run = [], autoattack.run

    def observed(*arguments, **settings):
        results.append(run(*arguments, **settings))
        return results[-1]

    apply, params = subject.model()
    attack = Attack("autoattack", AUTOATTACK, Threat(options.norm, options.eps), version="standard")
    evaluator = Evaluator(
        apply,
        subject.examples,
        [attack],
        sharding.make_mesh(),
        batch_size=options.batch,
        seed=0,
    )
    with mock.patch.object(autoattack, "run", observed):  # it says more than the evaluation does
        evaluator.run(attack, params, progress=True)
    result = results[0]  # later ones are the audit's
    work = {}
    for name, done in result.work.items():
        backward = (done["passes"] - 1) // 2  # a backward pass counts as two forward passes
        forward = done["passes"] - 2 * backward
        work[name] = {"forward": done["steps"] * forward, "backward": done["steps"] * backward}
        work[name]["computed"] = done["computed"] * done["passes"]
    after = {name: robust.tolist() for name, robust in result.robust.items()}
    return {"robust": after, "seconds": result.seconds, "model_evaluations": work}


def recorded_outcomes(path: str) -> dict[str, Any]:
    """The robust images after each attack, from ``per_example.npz`` of an AutoAttack ledger."""
    stored = np.load(path)
    robust, after = stored["clean_correct"], {"clean": stored["clean_correct"].tolist()}
    for i, name in enumerate(stored["attacks"].tolist()):
        robust = robust & (stored["broken_by"] != i)
        after[name] = robust.tolist()
    return {"robust": after}


def official(
    subject: Subject, options: argparse.Namespace, record: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """The same for the official package, attack by attack as in its own cascade.

    record: of a run that was stopped, which goes on with its next attack. Yields it after each
    attack, so that hours on a CPU are not lost with the last one.
    """
    import torch
    from autoattack import AutoAttack

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, (pixels, labels) = subject.net(), subject.examples.read(np.arange(len(subject.examples)))
    net.to(device).eval().requires_grad_(False)
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1)
        for values in (subject.mean, subject.std)
    )
    seen = {"forward": 0, "backward": 0}

    def model(x):
        seen["forward"] += len(x)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda g: seen.update(backward=seen["backward"] + len(g)))
        return net((x - mean) / std)

    images = pixels.astype(np.float32) / 255
    x = torch.tensor(np.moveaxis(images, -1, 1).copy(), device=device)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    adversary = AutoAttack(
        model,
        norm=reference.THEIR_NAME[options.norm],
        eps=options.eps,
        version="standard",
        device=device,
        seed=0,
        verbose=False,
    )
    if record is None:
        clean = np.concatenate([model(part).argmax(1).cpu() for part in x.split(options.batch)])
        record = {"robust": {"clean": (clean == labels).tolist()}, "seconds": 0.0}
        record |= {"model_evaluations": {}, "threads": torch.get_num_threads()}
    *_, robust = map(np.array, record["robust"].values())
    for name in list(adversary.attacks_to_run):
        if name in record["robust"]:
            continue
        seen.update(forward=0, backward=0)
        began = time.perf_counter()
        left = np.flatnonzero(robust)  # as in ``run_standard_evaluation``
        if len(left):
            adversary.attacks_to_run = [name]
            moved = adversary.run_standard_evaluation(x[left], y[left], bs=options.batch)
            wrong = torch.cat([model(part).argmax(1) for part in moved.split(options.batch)])
            robust[left] = (wrong == y[left]).cpu().numpy()
        record["robust"][name] = robust.tolist()
        record["model_evaluations"][name] = dict(seen)
        record["seconds"] += time.perf_counter() - began
        spent = f"{record['seconds']:.0f} s"
        print(f"official {name}: {robust.sum()} robust after {spent}", file=sys.stderr)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="how many of the images")
    parser.add_argument("--export", default="", help="directory of an exported model")
    parser.add_argument("--norm", default="linf", choices=tuple(reference.EPS))
    parser.add_argument("--eps", type=float, default=0.0, help="default: the recorded model's")
    parser.add_argument("--batch", type=int, default=256, help="batch size of both")
    parser.add_argument("--outcomes", default="", help="of ours, which then does not run")
    parser.add_argument("--only", default="", choices=("", "ours", "official"))
    parser.add_argument("--out", default="", help="JSON file for the result")
    options = parser.parse_args()
    devices.configure(options.batch, cache="")
    options.eps = options.eps or reference.EPS[options.norm]
    count = options.images
    subject = exported(options.export, count) if options.export else recorded(count)
    arguments = {k: v for k, v in vars(options).items() if k not in ("outcomes", "only", "out")}
    report = {"arguments": arguments, "machine": common.machine()}
    if options.out and Path(options.out).exists():
        stored = json.loads(Path(options.out).read_text())
        if stored | report == stored:  # of the same arguments, on the same machine
            report = stored
    if options.only != "official" and "ours" not in report:
        made = recorded_outcomes(options.outcomes) if options.outcomes else ours(subject, options)
        report["ours"] = made
        common.write_json(options.out, report)
    if options.only != "ours":
        try:
            for record in official(subject, options, report.get("official")):
                report["official"] = record
                common.write_json(options.out, report)
        except ImportError as error:
            print(f"the official code is skipped: {error}", file=sys.stderr)
    rows = []
    for name in ("ours", "official"):
        if name in report:
            counts = " ".join(str(sum(kept)) for kept in report[name]["robust"].values())
            spent = ["-", "-", "-"]
            if "seconds" in report[name]:
                work = report[name]["model_evaluations"].values()
                passes = [sum(w[kind] for w in work) for kind in ("forward", "backward")]
                spent = [f"{report[name]['seconds']:.0f}", *(f"{count:,}" for count in passes)]
            rows.append([name, counts, *spent])
    common.print_table(["", "robust after each", "s", "forward", "backward"], rows)
    if len(rows) == 2:
        if "seconds" in report["ours"]:
            report["speedup"] = report["official"]["seconds"] / report["ours"]["seconds"]
            print(f"{report['speedup']:.2f} times as fast")
        for name, theirs in report["official"]["robust"].items():
            kept = report["ours"]["robust"][name]
            differ = [i for i, other in enumerate(theirs) if kept[i] != other]
            print(f"after {name}: {len(differ)} of {len(kept)} images differ: {differ[:20]}")
    common.write_json(options.out, report)


if __name__ == "__main__":
    main()
