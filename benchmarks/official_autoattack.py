"""The full standard AutoAttack: ours against the official PyTorch code, on one model and images.

    pip install timm torch git+https://github.com/fra31/auto-attack   # only for the comparison
    python benchmarks/official_autoattack.py --images=256 --out=benchmarks/results/autoattack.json

The model is a small robust ViT (tests/data/autoattack) in float32; in PyTorch it is timm's module.
Seconds are the wall time of the whole cascade; ours include compilation. Both run on all cores or
on the GPU. Forward and backward passes are counted in images. Without PyTorch, timm or autoattack,
only ours runs.
"""

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import common  # first: it puts the repository on the path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import reference_autoattack as reference


def ours(images: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Our cascade: the robust images after each attack, seconds and passes through the model.

    images: [n, 32, 32, 3] in [0, 1].
    """
    from vit_at.attacks import autoattack
    from vit_at.distributed import devices

    devices.configure(options.batch, cache="")
    logits_fn = functools.partial(reference.apply(), reference.parameters())
    eps = reference.EPS[options.norm]
    result = autoattack.run(
        logits_fn,
        images,
        labels,
        norm=options.norm,
        eps=eps,
        batch_size=options.batch,
        progress=True,
    )
    work = {}
    for name, done in result.work.items():
        backward = (done["passes"] - 1) // 2  # a backward pass counts as two forward passes
        forward = done["passes"] - 2 * backward
        work[name] = {"forward": done["steps"] * forward, "backward": done["steps"] * backward}
        work[name]["computed"] = done["computed"] * done["passes"]
    counts = {name: int(robust.sum()) for name, robust in result.robust.items()}
    return {"robust": counts, "seconds": result.seconds, "model_evaluations": work}


def official(images: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """The same for the official package, attack by attack as in its own cascade."""
    import timm
    import torch
    from autoattack import AutoAttack

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 4}
    net = timm.create_model("deit_tiny_patch16_224", num_classes=10, **sizes)
    state = {n: torch.tensor(v) for n, v in reference.arrays("model_weights").items()}
    net.load_state_dict(state)
    net.to(device).eval().requires_grad_(False)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (reference.MEAN, reference.STD)
    )
    seen = {"forward": 0, "backward": 0}

    def model(x):
        seen["forward"] += len(x)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda g: seen.update(backward=seen["backward"] + len(g)))
        return net((x - mean) / std)

    x = torch.tensor(np.moveaxis(images, -1, 1).copy(), device=device)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    adversary = AutoAttack(
        model,
        norm=reference.THEIR_NAME[options.norm],
        eps=reference.EPS[options.norm],
        version="standard",
        device=device,
        seed=0,
        verbose=False,
    )
    attacks = list(adversary.attacks_to_run)
    robust = np.concatenate([model(part).argmax(1).cpu() for part in x.split(options.batch)])
    robust = robust == labels
    counts, work, began = {"clean": int(robust.sum())}, {}, time.perf_counter()
    for name in attacks:  # on the images that are left, as in ``run_standard_evaluation``
        seen.update(forward=0, backward=0)
        left = np.flatnonzero(robust)
        if len(left):
            adversary.attacks_to_run = [name]
            moved = adversary.run_standard_evaluation(x[left], y[left], bs=options.batch)
            wrong = torch.cat([model(part).argmax(1) for part in moved.split(options.batch)])
            robust[left] = (wrong == y[left]).cpu().numpy()
        counts[name], work[name] = int(robust.sum()), dict(seen)
        spent = time.perf_counter() - began
        print(f"official {name}: {counts[name]} robust after {spent:.0f} s", file=sys.stderr)
    return {
        "robust": counts,
        "seconds": time.perf_counter() - began,
        "model_evaluations": work,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="how many of the 256 images")
    parser.add_argument("--norm", default="linf", choices=("linf", "l2"))
    parser.add_argument("--batch", type=int, default=256, help="batch size of both")
    parser.add_argument("--only", default="", choices=("", "ours", "official"))
    parser.add_argument("--out", default="", help="JSON file for the result")
    options = parser.parse_args()
    data = reference.arrays("images")  # not as JAX arrays: nothing of JAX is set up yet
    images = (data["images"][: options.images] / np.float32(255)).astype(np.float32)
    labels = data["labels"][: options.images].astype(np.int32)
    report = {"arguments": {k: v for k, v in vars(options).items() if k != "out"}}
    if options.only != "official":
        report["ours"] = ours(images, labels, options)
    if options.only != "ours":
        try:
            report["official"] = official(images, labels, options)
        except ImportError as error:
            print(f"the official code is skipped: {error}", file=sys.stderr)
    rows = []
    for name in ("ours", "official"):
        if name in report:
            work = report[name]["model_evaluations"].values()
            passes = [sum(w[kind] for w in work) for kind in ("forward", "backward")]
            counts = " ".join(str(count) for count in report[name]["robust"].values())
            seconds = f"{report[name]['seconds']:.0f}"
            rows.append([name, counts, seconds, f"{passes[0]:,}", f"{passes[1]:,}"])
    report["machine"] = common.machine()
    common.print_table(["", "robust after each", "s", "forward", "backward"], rows)
    if len(rows) == 2:
        report["speedup"] = report["official"]["seconds"] / report["ours"]["seconds"]
        print(f"{report['speedup']:.2f} times as fast")
    common.write_json(options.out, report)


if __name__ == "__main__":
    main()
