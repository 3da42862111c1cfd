"""From step number to batch: order, prefetching, and each process's part of a global batch.

The batch of step s is a pure function of (seed, s). An epoch has S steps; epoch s // S permutes the
data set with its own seed, and step s reads the (s mod S)-th slice. So a run resumes exactly from
its step number. The global batches do not depend on the number of processes; each process reads
its own contiguous part. The examples after the last full batch of an epoch are dropped; they differ
every epoch. Evaluation reads every example exactly once, and masks the rows that pad a batch.
"""

import functools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from vit_at.data.examples import Examples
from vit_at.data.extra import Extra, joined
from vit_at.distributed import devices
from vit_at.errors import UserError

Batch = dict[str, np.ndarray]

# Images that a thread reads at once: enough to hide the cost of a call, and few enough that the
# threads share the first batch.
PART = 32
PREFETCHED_BATCHES = 2
_EXTRA_SEED = 2**32  # more than any seed: the extra images have an order of their own


@functools.lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The read-only permutation [n] in which an epoch reads n examples."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order = rng.permutation(n)
    order.flags.writeable = False
    return order


def stream(n: int, seed: int, start: int, count: int) -> np.ndarray:
    """Positions [count] of an endless order of n examples, epoch after epoch, from ``start`` on."""
    found = []
    while count:
        epoch, first = divmod(start, n)
        found.append(epoch_order(n, seed, epoch)[first : first + count])
        start, count = start + len(found[-1]), count - len(found[-1])
    return np.concatenate(found)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of full batches in n examples; UserError if there is none."""
    if n < batch_size:
        raise UserError(
            f"batch_size is {batch_size}, more than the {n} training examples; make it smaller"
        )
    return n // batch_size


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    threads: int,
    process: tuple[int, int] = (0, 1),
    extra: Extra | None = None,
) -> Iterator[Batch]:
    """The batches of steps first_step to last_step - 1, read ahead by background threads.

    Args:
      batch_size: images of a global batch, over all processes.
      seed: of the order, see `epoch_order`.
      threads: number of threads that read and decode; 0 means one per core.
      process: (index, count) of the processes.
      extra: whose images stand last in every batch, in an endless order of their own; the images
        before them are then in an endless order, too.

    Returns:
      An iterator over {"image": [b, S, S, C] uint8, "label": [b] int32}: this process's contiguous
      part of each batch, b = batch_size // count.

    Raises:
      UserError: the batch size is too large or no multiple of the processes; from the iterator, an
        image can't be read.
    """
    steps = steps_per_epoch(len(examples), batch_size)
    mine = _process_part(batch_size, *process, "batch_size")

    def order(step: int) -> np.ndarray:
        epoch, start = step // steps, step % steps * batch_size
        return epoch_order(len(examples), seed, epoch)[start : start + batch_size]

    if extra is not None:
        order = functools.partial(_order_with_extra, len(examples), extra, batch_size, seed)
        examples = joined(examples, extra.examples)
    batches = _prefetched(examples, order, range(first_step, last_step), threads, mine)
    return ({"image": batch["image"], "label": batch["label"]} for batch in batches)


def _order_with_extra(n: int, extra: Extra, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions in ``joined`` of a batch: the training images, then the extra ones."""
    own, count = batch_size - extra.images, extra.images
    first = stream(n, seed, step * own, own)
    rest = stream(len(extra.examples), seed + _EXTRA_SEED, step * count, count)
    return np.concatenate([first, n + rest])


def eval_batches(
    examples: Examples, *, batch_size: int, threads: int, process: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Every example exactly once, in order; all processes get equally many batches.

    Returns:
      An iterator over {"image": [b, S, S, C] uint8, "label": [b] int32, "mask": [b] bool, "index":
      [b] int64}: this process's contiguous part of each global batch. index is the position in
      `examples`. Rows of padding have mask False, index -1, label 0 and a black image.

    Raises:
      UserError: the batch size is no multiple of the processes; from the iterator, an image can't
        be read.
    """
    mine = _process_part(batch_size, *process, "eval.batch_size")
    batches = range(-(-len(examples) // batch_size))

    def order(batch: int) -> np.ndarray:
        index = np.arange(batch * batch_size, (batch + 1) * batch_size)
        return np.where(index < len(examples), index, -1)

    parts = _prefetched(examples, order, batches, threads, mine)
    return ({**part, "mask": part["index"] >= 0} for part in parts)


def _process_part(batch_size: int, index: int, count: int, field: str) -> slice:
    if batch_size < 1 or batch_size % count:
        raise UserError(f"{field} is {batch_size}; it must be a multiple of the {count} processes")
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _prefetched(
    examples: Examples, order: Callable[[int], np.ndarray], steps: range, threads: int, mine: slice
) -> Iterator[Batch]:
    """This process's part of each step's batch; a batch holds the examples `order(step)`."""
    parts = -(-(mine.stop - mine.start) // PART)  # per batch

    def read(part: int) -> Batch:
        index = order(part // parts)[mine]
        return _read(examples, np.array_split(index, parts)[part % parts])

    buffer = PREFETCHED_BATCHES * parts
    # No more threads can have work than parts are read ahead; grain warns of more.
    ahead = grain.ReadOptions(min(threads or devices.cores(), buffer), buffer)
    numbers = grain.MapDataset.range(steps.start * parts, steps.stop * parts)
    return iter(numbers.map(read).to_iter_dataset(ahead).batch(parts, batch_fn=_concatenate))


def _read(examples: Examples, index: np.ndarray) -> Batch:
    """The batch of these positions; -1 means padding."""
    present = index >= 0
    images = np.zeros((len(index), *examples.image_shape), np.uint8)
    labels = np.zeros(len(index), np.int32)
    if present.any():
        images[present], labels[present] = examples.read(index[present])
    return {"image": images, "label": labels, "index": index}


def _concatenate(parts: list[Batch]) -> Batch:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
