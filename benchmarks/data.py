"""The data path: the pipeline alone, and how long a training step waits for it.

    python benchmarks/data.py --data_dir DIR [--step deit_tiny_patch16_224@32/4] [--out FILE]

DIR is a TFDS directory with cifar10 and imagenet2012 in array_record format. Reported are images/s
of CIFAR-10 from memory, of JPEG decoding and resizing to 224 pixels and of reading a decoded copy
(``data.decoded_dir``), each with one thread and with one per core, and the share of the time of
some training steps that passed in waiting for a batch.
"""

import argparse
import tempfile
import time
from typing import Any

import jax
from common import Case, machine, parse_model, print_table, spread, write_json

from vit_at.configs import default
from vit_at.data import pipeline, sources
from vit_at.distributed import devices, sharding
from vit_at.errors import UserError
from vit_at.training import optim
from vit_at.training.setup import compile_step, initial_state


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="TFDS data directory")
    parser.add_argument("--step", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8, help="training steps that are timed")
    parser.add_argument("--attack_steps", type=int, default=10)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    devices.configure(options.batch)
    result: dict[str, Any] = {"machine": machine(), "pipeline": {}}
    rows = []
    cores = devices.cores()
    for name, measure in {
        "cifar10 from memory": lambda: _cifar(options.data_dir, options.batch),
        "JPEG to 224 px, 1 thread": lambda: _jpeg(options.data_dir, 1),
        f"JPEG to 224 px, {cores} threads": lambda: _jpeg(options.data_dir, cores),
        "decoded copy of 224 px, 1 thread": lambda: _copy(options.data_dir, 1),
        f"decoded copy of 224 px, {cores} threads": lambda: _copy(options.data_dir, cores),
    }.items():
        try:
            found = measure()
        except UserError as error:
            print(f"{name}: skipped, {error}")
            continue
        result["pipeline"][name] = found
        rows.append([name, f"{found['images_per_second']:,.0f}"])
    print_table(["pipeline", "images/s"], rows)
    try:
        result["training"] = _waiting(options)
        print(
            f"training: {result['training']['waiting_share']:.2%} of "
            f"{result['training']['seconds']:.3g} s waiting for data"
        )
    except UserError as error:
        print(f"training: skipped, {error}")
    write_json(options.out, result)


def _options(data_dir: str, name: str, size: int, cache_gib: float, decoded: str = "") -> Any:
    data = default.get_config().unlock().data
    data.dir, data.name, data.image_size, data.cache_gib = data_dir, name, size, cache_gib
    data.decoded_dir = decoded
    return data


def _cifar(data_dir: str, batch: int) -> dict[str, Any]:
    examples = sources.load(_options(data_dir, "cifar10", 32, 4.0), "train[:10000]")
    steps = 2000
    options = {"batch_size": batch, "seed": 0, "first_step": 0, "threads": 0}
    batches = pipeline.train_batches(examples, last_step=steps, **options)
    next(batches)
    start = time.perf_counter()
    count = sum(len(b["label"]) for b in batches)
    return {"images_per_second": count / (time.perf_counter() - start), "images": count}


def _copy(data_dir: str, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return _jpeg(data_dir, threads, directory, epochs=20)


def _jpeg(data_dir: str, threads: int, decoded: str = "", epochs: int = 1) -> dict[str, Any]:
    examples = sources.load(_options(data_dir, "imagenet2012", 224, 0.0, decoded), "train")
    steps, batch = epochs * (len(examples) // 32), 32
    options = {"batch_size": batch, "seed": 0, "first_step": 0, "threads": threads}
    batches = pipeline.train_batches(examples, last_step=steps, **options)
    start = time.perf_counter()
    count = sum(len(b["label"]) for b in batches)
    rate = count / (time.perf_counter() - start)
    return {"images_per_second": rate, "per_thread": rate / threads, "images": count}


def _waiting(options: argparse.Namespace) -> dict[str, Any]:
    """Trains on CIFAR-10, or at 224 pixels on ImageNet's JPEG files, as the loop does."""
    import ours

    case = Case(
        **parse_model(options.step),
        batch=options.batch,
        dtype=options.dtype,
        steps=options.attack_steps,
    )
    name, cache = ("cifar10", 4.0) if case.image_size == 32 else ("imagenet2012", 0.0)
    examples = sources.load(_options(options.data_dir, name, case.image_size, cache), "train[:640]")
    setup = ours.make_setup(case)._replace(train_set=examples)
    optimizer = optim.make_optimizer(setup.config, ours.STEPS_PER_EPOCH)
    step, state = compile_step(setup, optimizer), initial_state(setup, optimizer)
    read = {"batch_size": case.batch, "seed": 0, "first_step": 0, "threads": 0}
    batches = pipeline.train_batches(examples, last_step=options.steps + 1, **read)
    state, _ = step(state, sharding.split_batch(next(batches), setup.mesh))
    jax.block_until_ready(state)
    waits, start = [], time.perf_counter()
    for _ in range(options.steps):
        before = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - before)
        state, _ = step(state, sharding.split_batch(batch, setup.mesh))
        jax.block_until_ready(state)  # else a wait would hide behind the step before
    seconds = time.perf_counter() - start
    return {
        "case": case.title,
        "data": examples.name,
        "seconds": seconds,
        "waiting_share": sum(waits) / seconds,
        "wait": spread(waits),
    }


if __name__ == "__main__":
    main()
