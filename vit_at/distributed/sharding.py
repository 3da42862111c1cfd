"""Devices as one mesh axis, ``data``: batches are split over it, parameters are whole on each.

The step is written in the global view under jit. Only attack and gradient are mapped over the
shards (``map_shards``), so they hold no collective except the mean at their end.

With ``config.sharding='fsdp'`` the training state is split over the same axis, each array along its
longest dimension that the devices divide (``layout``). A step then gathers the parameters once, for
all attack steps and the gradient; each device keeps its part of the gradient and the update.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from vit_at.errors import UserError

_CPU_IMAGES = range(4, 9)  # images of a part on a CPU; docs/performance.md
AXIS = "data"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the single axis ``data`` over all devices of all processes."""
    # The devices of a process stand side by side, like the rows of a batch that it reads.
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (AXIS,))


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu', of a mesh's devices, which need not be there (AOT compilation)."""
    return mesh.devices.flat[0].platform


def check_batch_size(field: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises UserError where devices (times ``parts`` micro-batches) do not divide the batch."""
    shares = mesh.size * parts
    if batch_size % shares:
        nearest = max(shares, round(batch_size / shares) * shares)
        micro = f" times {parts} micro-batches" if parts > 1 else ""
        raise UserError(
            f"{field} is {batch_size}, which {mesh.size} devices{micro} do not divide; "
            f"the nearest that fits is {nearest}"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every array whole on every device; all processes must hold the same values."""
    return jax.tree.map(lambda x: place(x, NamedSharding(mesh, WHOLE)), tree)


def layout(tree: Any, mesh: Mesh, sharding: str) -> Any:
    """How a training state lies on the devices: a NamedSharding for each of its arrays.

    sharding: 'replicated'; or 'fsdp', where an array stays whole if the number of devices divides
      none of its dimensions.
    """

    def of_array(x):
        sizes = [size if size % mesh.size == 0 else 0 for size in x.shape]
        if sharding == "replicated" or not any(sizes):
            return NamedSharding(mesh, WHOLE)
        axis = int(np.argmax(sizes))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(of_array, tree)


def distribute(tree: Any, mesh: Mesh, sharding: str) -> Any:
    """Puts a training state that every process holds whole on the devices; see ``layout``."""
    return jax.tree.map(place, tree, layout(tree, mesh, sharding))


def place(x: Any, sharding: Sharding) -> jax.Array:
    """Puts an array that every process holds whole where its sharding says."""
    if sharding.is_fully_addressable or getattr(x, "sharding", None) == sharding:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return _mover(sharding)(x)
    return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)


@functools.cache
def _mover(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Kept, as each new one would be compiled again at every validation."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def split_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch, as global arrays split over the devices."""
    sharding = NamedSharding(mesh, SPLIT)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def my_part(count: int, mesh: Mesh) -> slice:
    """This process's rows of ``count`` that are split over the devices."""
    owners = [device.process_index for device in mesh.devices.flat]  # side by side
    of_device, first = count // mesh.size, owners.index(jax.process_index())
    own = owners.count(jax.process_index())
    return slice(first * of_device, (first + own) * of_device)


def my_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split over the devices; undoes ``split_batch``."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def gather(tree: Any) -> Any:
    """All rows of split arrays, on the host of every process; all processes must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_rows(array: jax.Array, rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Some rows [n], in ascending order, of a split array; as ``gather``, which sends them all.

    Every process has equally many of the array's rows.
    """
    mine = my_part(len(array), mesh)
    own = my_rows(array)[rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start]
    if jax.process_count() == 1:
        return own
    of_process = np.bincount(rows // (mine.stop - mine.start), minlength=jax.process_count())
    missing = of_process.max(initial=0) - len(own)
    sent = np.pad(own, ((0, missing), *[(0, 0)] * (own.ndim - 1)))
    every = multihost_utils.process_allgather(sent)
    return np.concatenate([part[:n] for part, n in zip(every, of_process, strict=True)])


def map_shards(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any = SPLIT
) -> Callable[..., Any]:
    """``function`` on each device's shard: jax.pmap's programming model under jit.

    The check of replication is off: it would reject loops whose carry starts as a constant.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def mean_over_devices(trees: Any, specs: Any) -> Any:
    """The mean over the devices of each array, inside ``map_shards``.

    specs: how the results lie on the devices: WHOLE, or split along an axis, for each array or
      each tree of arrays. A device receives only what it keeps.
    """

    def mean(spec, x):
        if AXIS not in tuple(spec):
            return lax.pmean(x, AXIS)
        axis = tuple(spec).index(AXIS)
        total = lax.psum_scatter(x, AXIS, scatter_dimension=axis, tiled=True)
        return total / lax.axis_size(AXIS)

    def means(spec, tree):
        return jax.tree.map(functools.partial(mean, spec), tree)

    return jax.tree.map(means, specs, trees, is_leaf=lambda x: isinstance(x, PartitionSpec))


def in_parts(examples: Any, mesh: Mesh, at_least: int = 1) -> Any:
    """A device's examples [b, ...] as parts [parts, b / parts, ...], to be processed in turn.

    Accelerators take ``at_least`` parts; CPUs take more, so that activations stay in cache.
    """
    count = len(jax.tree.leaves(examples)[0])
    size = count // at_least
    if platform(mesh) == "cpu":
        size = max((n for n in _CPU_IMAGES if size % n == 0), default=size)
    return jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), examples)
