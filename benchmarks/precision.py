"""How exact, and how fast, each ``eval.precision`` is: on a GPU, or emulated on a CPU.

    python benchmarks/precision.py --emulate --data_dir=DIR --out=FILE.json

For a model of the package and its first test images, of logits and their gradients by the images:
the largest and mean error against float64, relative to the largest value. For PGD-20 and CW-20
from the same random starts, and with --autoattack for the standard AutoAttack: images whose outcome
differs from float32's. On a GPU also the seconds of an attack. 'tf32' is one product in TF32, JAX's
own choice on a GPU; no evaluation uses it.

The emulation rounds the operands of each product as the algorithm does, and adds up its narrower
products in float32. It says nothing about time, and tensor cores may round sums differently.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
from jax import lax

import vit_at
from vit_at import models
from vit_at.attacks import Threat, autoattack
from vit_at.data import sources
from vit_at.distributed import devices, precision, sharding
from vit_at.evaluation.evaluator import make_outcome_fn
from vit_at.evaluation.protocol import parse_attacks

PRECISIONS = precision.PRECISIONS
PRECISIONS["tf32"] = "TF32_TF32_F32"  # to compare with
Array = jax.Array


# --- Emulation --------------------------------------------------------------------------------


def _bfloat16(x: Array) -> Array:
    return lax.reduce_precision(x, 8, 7)


def _tf32(x: Array) -> Array:
    return lax.reduce_precision(x, 8, 10)


def _parts(x: Array, rounded: Callable[[Array], Array], count: int) -> list[Array]:
    """``count`` numbers of narrow type, the largest first, whose sum is nearly x."""
    parts = []
    for _ in range(count):
        parts.append(rounded(x))
        x = x - parts[-1]
    return parts


# Name: rounding, parts of each operand, and the products (i, j) of parts that are added up.
ALGORITHMS = {
    "bf16x9": (_bfloat16, 3, [(i, j) for i in range(3) for j in range(3)]),
    "bf16x6": (_bfloat16, 3, [(i, j) for i in range(3) for j in range(3) if i + j < 3]),
    "tf32x3": (_tf32, 2, [(0, 0), (0, 1), (1, 0)]),
    "tf32": (_tf32, 1, [(0, 0)]),
}


def emulated(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, with all its products of float32 as an algorithm computes them."""
    rounded, count, terms = ALGORITHMS[name]

    def product(a, b, **parameters):
        left, right = _parts(a, rounded, count), _parts(b, rounded, count)
        products = [lax.dot_general_p.bind(left[i], right[j], **parameters) for i, j in terms]
        return sum(reversed(products))  # the smallest first

    def run(jaxpr, constants, *arguments):
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(v):
            return v.val if isinstance(v, jax.extend.core.Literal) else values[v]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            inner = next((p for p in eqn.params.values() if hasattr(p, "jaxpr")), None)
            if eqn.primitive is lax.dot_general_p:
                results = [product(*operands, **eqn.params)]
            elif eqn.primitive.name in ("jit", "custom_vjp_call", "custom_jvp_call"):
                results = run(inner.jaxpr, inner.consts, *operands)
            else:
                assert inner is None, f"products in a {eqn.primitive} are not seen"
                results = eqn.primitive.bind(*operands, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            values |= dict(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def call(*arguments):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        flat = run(closed.jaxpr, closed.consts, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return call


def with_emulation(apply: Callable[..., Array], name: str) -> Callable[..., Array]:
    """(params, images) -> logits, whose gradient by the images is emulated, too."""

    def unrolled(params, images):
        return apply(models.unstack_blocks(apply, params), images)

    @jax.custom_vjp
    def logits(params, images):
        return emulated(unrolled, name)(params, images)

    def backward(residuals, cotangent):
        params, images = residuals

        def to_images(params, images, cotangent):
            return jax.vjp(lambda x: unrolled(params, x), images)[1](cotangent)[0]

        return None, emulated(to_images, name)(params, images, cotangent)

    logits.defvjp(lambda *inputs: (logits(*inputs), inputs), backward)
    return logits


# --- Measurement ------------------------------------------------------------------------------


def errors(apply: Any, params: Any, images: np.ndarray, exact: tuple[Any, Any]) -> dict[str, Any]:
    """{logits, gradient: {max, mean}}: errors relative to the largest exact value."""
    found = _values(apply, params, images)
    row = {}
    for name, value, truth in zip(("logits", "gradient"), found, exact, strict=True):
        error = np.abs(np.asarray(value, np.float64) - truth) / np.abs(truth).max()
        row[name] = {"max": float(error.max()), "mean": float(error.mean())}
    return row


def _values(apply, params, images):
    """Logits, and the gradient of the sum of their log-sum-exps, as PGD takes one."""

    def loss(x):
        logits = apply(params, x)
        return (jax.nn.logsumexp(logits, -1) - logits[:, 0]).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(images)
    return np.asarray(logits), np.asarray(gradient)


def exact_values(model: Any, data: Any, params: Any, images: np.ndarray) -> tuple[Any, Any]:
    """``_values`` in float64."""
    with jax.enable_x64(True), precision.products("float32"):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        apply = models.classifier(model.clone(dtype="float64"), data.mean, data.std)
        return _values(apply, wide, images.astype(np.float64))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="cifar10_convit_96x4", help="a packaged model or an export")
    add("--data_dir", default="", help="of its data")
    add("--images", type=int, default=256)
    add("--steps", type=int, default=20, help="of PGD and CW")
    add("--autoattack", action="store_true", help="runs it too")
    add("--emulate", action="store_true", help="on a CPU")
    add("--out", default="", help="JSON file")
    options = parser.parse_args()
    devices.configure(options.images, cache="")
    loaded = vit_at.load(options.model)
    data = loaded.config.data.copy_and_resolve_references().unlock()
    data.dir = options.data_dir or data.dir
    pixels, labels = sources.load(data, data.test_split).read(np.arange(options.images))
    images, labels = pixels.astype(np.float32) / 255, labels.astype(np.int32)
    threat = Threat.of(loaded.config.threat)
    threat = Threat(threat.norm, threat.eps, threat.step_size, options.steps)
    arguments = {k: v for k, v in vars(options).items() if k not in ("data_dir", "out")}
    report: dict[str, Any] = {"arguments": arguments, "machine": common.machine(), "rows": {}}
    exact = exact_values(loaded.model, data, loaded.params, images)
    for name in PRECISIONS:
        emulates = options.emulate and name != "float32"
        apply = with_emulation(loaded.func, name) if emulates else loaded.func
        how = "float32" if options.emulate else name
        row = _measure(apply, loaded.params, pixels, labels, threat, how, options)
        with precision.products(how):
            row |= errors(apply, loaded.params, images, exact)
        report["rows"][name] = row
        common.write_json(options.out, report)
    _print(report["rows"], not options.emulate)


def _print(rows: dict[str, Any], timed: bool) -> None:
    """A Markdown table; differing images are counted against float32."""
    attacks = [name for name in rows["float32"] if isinstance(rows["float32"][name], list)]
    header = ["products", "logits: max, mean", "gradient: max, mean"]
    header += [f"{name}: correct, differ" for name in attacks] + ["PGD, s"] * timed
    table = []
    for name, row in rows.items():
        cells = [f"{row[k]['max']:.1e}, {row[k]['mean']:.1e}" for k in ("logits", "gradient")]
        for attack in attacks:
            differ = np.not_equal(row[attack], rows["float32"][attack]).sum()
            cells.append(f"{np.sum(row[attack])}, {differ}")
        cells += [f"{row[k]:.3g}" for k in row if k.startswith("pgd") and k.endswith("_s")] * timed
        table.append([name, *cells])
    common.print_table(header, table)


def _measure(apply, params, pixels, labels, threat, how, options) -> dict[str, Any]:
    """Outcomes of clean images, PGD and CW; on a GPU also the seconds of a second run."""
    mesh, row = sharding.make_mesh(), {}
    batch = {"image": pixels, "label": labels, "index": np.arange(len(labels), dtype=np.uint32)}
    batch, params = sharding.split_batch(batch, mesh), sharding.replicate(params, mesh)
    names = f"clean,pgd-{options.steps},cw-{options.steps}"
    for attack in parse_attacks(names, threat, precision=how):
        outcome = make_outcome_fn(apply, attack, mesh, seed=0)
        row[attack.name] = np.asarray(outcome(params, batch)["correct"]).tolist()
        if not options.emulate:
            began = time.perf_counter()
            jax.block_until_ready(outcome(params, batch))
            row[f"{attack.name}_s"] = time.perf_counter() - began
    if options.autoattack:
        result = autoattack.run(
            functools.partial(apply, params),
            pixels.astype(np.float32) / 255,
            labels,
            norm=threat.norm,
            eps=threat.eps,
            batch_size=64,
            precision=how,
        )
        row |= {name: robust.tolist() for name, robust in result.robust.items()}
    return row


if __name__ == "__main__":
    main()
