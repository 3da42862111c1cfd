"""Which rows of a batch belong to a process."""

import types

import jax
import numpy as np
import pytest

from vit_at.distributed import sharding


@pytest.mark.parametrize(("process", "rows"), [(0, (0, 4)), (1, (4, 8)), (3, (12, 16))])
def test_a_processes_rows_stand_side_by_side(process, rows, monkeypatch):
    devices = [types.SimpleNamespace(process_index=number // 2) for number in range(8)]
    mesh = types.SimpleNamespace(devices=np.array(devices), size=8)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert sharding.my_part(16, mesh) == slice(*rows)


def test_rows_of_a_split_array_are_gathered_in_their_order():
    mesh = sharding.make_mesh()
    array = np.arange(24, dtype=np.float32).reshape(8, 3)
    (split,) = sharding.split_batch((array,), mesh)
    rows = np.array([0, 3, 7])
    np.testing.assert_array_equal(sharding.gather_rows(split, rows, mesh), array[rows])
    assert sharding.gather_rows(split, rows[:0], mesh).shape == (0, 3)
