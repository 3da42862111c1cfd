"""Examples: held in memory or streamed, sliced, selected, held out."""

import data_sets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_at.data import cache, sources
from vit_at.data.examples import Examples
from vit_at.errors import UserError


def test_cached_reads_equal_streamed_reads():
    streamed = sources.load(
        data_sets.config(image_size=12, mean=(0, 0, 0), cache_gib=0), "train[:600]"
    )
    loaded = sources.load(data_sets.config(image_size=12, mean=(0, 0, 0)), "train[:600]")
    for threads in (1, 3):
        held = cache.in_memory(streamed, threads)
        rows = np.array([599, 0, 3, 3])
        for a, b, c in zip(streamed.read(rows), held.read(rows), loaded.read(rows), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def test_only_small_sets_are_cached(monkeypatch):
    calls = []
    monkeypatch.setattr(cache, "in_memory", lambda examples, threads: calls.append(threads))
    sources.load(data_sets.config(cache_gib=359 * 64 / 2**30), "test", threads=3)
    assert calls == [3]
    assert sources.load(data_sets.config(cache_gib=358 * 64 / 2**30), "test") is not None
    assert calls == [3]


def test_of_a_part_of_a_large_set_only_the_part_is_decoded(monkeypatch):
    decoded = []
    original = cache.in_memory
    monkeypatch.setattr(cache, "in_memory", lambda e, threads: decoded.append(e) or original(e))
    held = sources.load(data_sets.config(cache_gib=7 * 64 / 2**30), "test", count=7)
    assert [len(examples) for examples in decoded] == [len(held)] == [7]
    whole = sources.load(data_sets.config(cache_gib=0), "test")
    np.testing.assert_array_equal(held.read(np.arange(7))[0], whole.read(np.arange(7))[0])


def test_labels_are_read_without_decoding(monkeypatch):
    streamed, held = (sources.load(data_sets.config(cache_gib=gib), "test[:300]") for gib in (0, 1))
    expected = held.read(np.arange(300))[1]
    monkeypatch.setattr(sources, "decode", None)
    backwards = streamed.relabelled(streamed.class_names[::-1])
    for examples in (streamed, held):
        np.testing.assert_array_equal(examples.labels(), expected)
    np.testing.assert_array_equal(backwards.labels(), 9 - expected)
    np.testing.assert_array_equal(streamed.take(np.array([7, 3])).labels(), expected[[7, 3]])


def test_select_takes_the_first_and_refuses_more_than_there_are():
    whole = sources.load(data_sets.config(), "test[:45]")
    assert len(sources.select(whole, 7)) == 7
    assert sources.select(whole, 0) is whole
    for count in (46, -1):
        with pytest.raises(UserError, match=f"{count} examples .* has 45"):
            sources.load(data_sets.config(), "test[:45]", count=count)


def test_slices_and_views_keep_the_original_indices():
    whole = sources.load(data_sets.config(), "test")
    part = sources.load(data_sets.config(), "test[40:48]")
    np.testing.assert_array_equal(part.indices, np.arange(40, 48))
    view = part.take(np.array([5, 1])).take(np.array([1]))
    np.testing.assert_array_equal(view.indices, [41])
    for a, b in zip(view.read(np.array([0])), whole.read(np.array([41])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_slices_add_up():
    parts = [sources.load(data_sets.config(), f"train[{s}]") for s in (":90%", "90%:")]
    both = sources.load(data_sets.config(), "train[:90%]+train[90%:]")
    np.testing.assert_array_equal(np.concatenate([p.indices for p in parts]), np.arange(1438))
    np.testing.assert_array_equal(both.indices, np.arange(1438))


@given(n=st.integers(1, 358), seed=st.integers(0, 2**32))
def test_hold_out_is_disjoint_complete_and_reproducible(n, seed):
    examples = make_examples(359)
    train, held = sources.hold_out(examples, n, seed)
    assert len(held) == n
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train.indices, held.indices])), np.arange(359)
    )
    np.testing.assert_array_equal(held.indices, sources.hold_out(examples, n, seed)[1].indices)


def make_examples(n):
    def read(rows):
        images = np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 2, 1))
        return images.astype(np.uint8), rows.astype(np.int32)

    return Examples("made", ("a",), (2, 2, 1), np.arange(n), np.arange(n), read)


def test_hold_out_depends_on_the_seed_and_takes_the_right_images():
    examples = make_examples(200)
    train, held = sources.hold_out(examples, 50, 1)
    assert set(held.indices) != set(sources.hold_out(examples, 50, 2)[1].indices)
    np.testing.assert_array_equal(held.read(np.arange(50))[1], held.indices)
    np.testing.assert_array_equal(train.read(np.arange(150))[1], train.indices)


def test_hold_out_of_nothing_and_of_too_much():
    examples = make_examples(10)
    assert sources.hold_out(examples, 0, 0) == (examples, None)
    for n in (10, -1):
        with pytest.raises(UserError, match=rf"data.validation_examples is {n}; .* 10 examples"):
            sources.hold_out(examples, n, 0)
