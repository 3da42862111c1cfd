"""Runs a kernel of Pallas block by block, as a TPU cuts its arrays, on arrays that JAX may trace.

What a block holds beyond the array is NaN: none of it may reach a result. (JAX's own interpreters
take no blocks of bfloat16 as words.)
"""

import types

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl


class Block:
    """What a kernel sees of an array: a reference that it reads and writes."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def reshape(self, *shape):
        """The same numbers as a matrix, to be taken as words."""
        self.matrix = shape
        return self

    def bitcast(self, dtype):
        """Rows of bfloat16 as half as many of words: two rows, the first in the low half."""
        assert dtype == jnp.uint32
        return self

    def _rows(self, rows, lanes):
        assert lanes == slice(None)
        first = 2 * (rows.start + rows.stride * np.arange(rows.size))
        return first, first + 1

    def __getitem__(self, where):
        rows = [self.array.reshape(self.matrix)[rows] for rows in self._rows(*where)]
        low, high = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in rows)
        return low | high << 16

    def __setitem__(self, where, words):
        matrix = self.array.reshape(self.matrix)
        for rows, half in zip(self._rows(*where), (words & 0xFFFF, words >> 16), strict=True):
            values = lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16)
            matrix = matrix.at[rows].set(values)
        self.array = matrix.reshape(self.shape)


def _unpack(words, *, index, packed_dtype, unpacked_dtype):
    half = (words >> 16 * index & 0xFFFF).astype(jnp.uint16)
    return lax.bitcast_convert_type(half, packed_dtype).astype(unpacked_dtype)


def _pack(parts, *, packed_dtype):
    halves = (lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16) for x in parts)
    low, high = (half.astype(jnp.uint32) for half in halves)
    return low | high << 16


def stand_in(monkeypatch, module):
    """Kernels of a module run here until the test ends. Returns a list that gets their names."""
    log = []
    monkeypatch.setattr(module, "pl", _pallas(log))
    words = types.SimpleNamespace(pack_elementwise=_pack, unpack_elementwise=_unpack)
    monkeypatch.setattr(module, "pltpu", words)
    return log


def _pallas(log):
    """Stands in for the module ``pl``."""
    step = []

    def pallas_call(kernel, *, out_shape, grid, in_specs, out_specs, name):
        def call(*arrays):
            log.append(name)
            result = jnp.full(out_shape.shape, jnp.nan, out_shape.dtype)
            for step[:] in np.ndindex(*grid):
                inputs = [_cut(a, spec, step) for a, spec in zip(arrays, in_specs, strict=True)]
                out = Block(jnp.full(out_specs.block_shape, jnp.nan, out_shape.dtype))
                kernel(*inputs, out)
                where, sizes = _window(out_shape.shape, out_specs, step)
                result = result.at[where].set(out.array[sizes])
            return result

        return call

    def when(condition):
        return lambda run: run() if condition else None

    return types.SimpleNamespace(
        pallas_call=pallas_call,
        program_id=lambda axis: step[axis],
        when=when,
        BlockSpec=pl.BlockSpec,
        ds=pl.ds,
        cdiv=pl.cdiv,
    )


def _cut(array, spec, step):
    where, sizes = _window(array.shape, spec, step)
    block = jnp.full(spec.block_shape, jnp.nan, array.dtype)
    return Block(block.at[sizes].set(array[where]))


def _window(shape, spec, step):
    """(where a block lies in an array, how much of it does)."""
    starts = [i * size for i, size in zip(spec.index_map(*step), spec.block_shape, strict=True)]
    ends = [min(a + size, n) for a, size, n in zip(starts, spec.block_shape, shape, strict=True)]
    pairs = list(zip(starts, ends, strict=True))
    return tuple(slice(*pair) for pair in pairs), tuple(slice(b - a) for a, b in pairs)
