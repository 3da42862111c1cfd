"""Order, process parts, padding: which example is in which batch, for any sizes and processes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_at.data import pipeline
from vit_at.data.examples import Examples
from vit_at.errors import UserError


def make_examples(n, read=None):
    """Examples whose label is their position and whose pixels follow from it."""

    def read_rows(rows):
        images = np.broadcast_to(rows[:, None, None, None] % 251, (len(rows), 2, 2, 1))
        return images.astype(np.uint8), rows.astype(np.int32)

    rows = np.arange(n)
    return Examples("made", ("a",), (2, 2, 1), rows, rows, read or read_rows)


def train_labels(n, batch_size, first, last, *, seed=0, threads=2, processes=1):
    """[steps, batch] labels of the global batches, put together from all processes."""
    parts = [
        [
            batch["label"]
            for batch in pipeline.train_batches(
                make_examples(n),
                batch_size=batch_size,
                seed=seed,
                first_step=first,
                last_step=last,
                threads=threads,
                process=(index, processes),
            )
        ]
        for index in range(processes)
    ]
    return np.array([np.concatenate(step) for step in zip(*parts, strict=True)])


@given(n=st.integers(1, 500), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_epoch_order_is_a_permutation_that_only_its_arguments_decide(n, seed, epoch):
    order = pipeline.epoch_order(n, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    pipeline.epoch_order.cache_clear()
    np.testing.assert_array_equal(order, pipeline.epoch_order(n, seed, epoch))


def test_epoch_order_is_pinned_and_differs_by_seed_and_epoch():
    # A change of these numbers changes every run that is resumed after it.
    np.testing.assert_array_equal(pipeline.epoch_order(8, 0, 0), [3, 6, 4, 0, 7, 5, 2, 1])
    orders = {tuple(pipeline.epoch_order(50, *pair)) for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(orders) == 4
    with pytest.raises(ValueError, match="read-only"):
        pipeline.epoch_order(8, 0, 0)[0] = 1


def test_steps_per_epoch():
    assert pipeline.steps_per_epoch(1_281_167, 512) == 2502
    assert pipeline.steps_per_epoch(8, 8) == 1
    with pytest.raises(UserError, match=r"batch_size is 9, more than the 8 training examples"):
        pipeline.steps_per_epoch(8, 9)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 200),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 5),
    threads=st.integers(1, 4),
)
def test_an_epoch_shows_each_example_at_most_once_and_drops_the_remainder(
    n, batch_size, seed, threads
):
    batch_size = min(n, batch_size)
    steps = n // batch_size
    labels = train_labels(n, batch_size, 0, 2 * steps, seed=seed, threads=threads)
    assert labels.shape == (2 * steps, batch_size)
    for epoch in range(2):
        expected = pipeline.epoch_order(n, seed, epoch)[: steps * batch_size]
        np.testing.assert_array_equal(labels[epoch * steps : (epoch + 1) * steps].ravel(), expected)


@settings(max_examples=20, deadline=None)
@given(part=st.integers(1, 40), processes=st.integers(1, 4), first=st.integers(0, 20))
def test_processes_share_one_global_batch_and_any_step_can_come_first(part, processes, first):
    n, batch_size = 200, part * processes
    together = train_labels(n, batch_size, 0, first + 3)
    apart = train_labels(n, batch_size, first, first + 3, processes=processes)
    np.testing.assert_array_equal(apart, together[first:])


def test_each_process_reads_only_its_part():
    read = []

    def spy(rows):
        read.extend(rows)
        return np.zeros((len(rows), 2, 2, 1), np.uint8), rows.astype(np.int32)

    batches = pipeline.train_batches(
        make_examples(100, spy),
        batch_size=20,
        seed=0,
        first_step=0,
        last_step=1,
        threads=1,
        process=(1, 2),
    )
    (batch,) = batches
    assert sorted(read) == sorted(batch["label"])
    assert set(batch) == {"image", "label"}
    np.testing.assert_array_equal(batch["label"], pipeline.epoch_order(100, 0, 0)[10:20])


def test_no_more_than_a_few_batches_are_read_ahead():
    read = []

    def spy(rows):
        read.append(len(rows))
        return np.zeros((len(rows), 2, 2, 1), np.uint8), rows.astype(np.int32)

    batches = pipeline.train_batches(
        make_examples(10_000, spy), batch_size=100, seed=0, first_step=0, last_step=90, threads=2
    )
    for _ in range(5):
        next(batches)
    assert sum(read) <= 100 * (5 + pipeline.PREFETCHED_BATCHES + 1)
    assert max(read) <= pipeline.PART


def test_many_threads_have_no_warning_of_a_small_buffer(caplog):
    options = {"batch_size": 8, "threads": 16}
    batches = list(pipeline.eval_batches(make_examples(20), **options))
    assert len(batches) == 3
    assert not caplog.records


def test_batch_contents_and_types():
    options = {"batch_size": 70, "seed": 3, "first_step": 0, "last_step": 2, "threads": 0}
    for batch in pipeline.train_batches(make_examples(150), **options):
        assert batch["image"].shape == (70, 2, 2, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"] % 251)


def test_no_steps_give_no_batches():
    assert train_labels(10, 5, 4, 4).size == 0


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 150), part=st.integers(1, 50), processes=st.integers(1, 4))
def test_evaluation_sees_every_example_once_in_order(n, part, processes):
    examples, batch_size = make_examples(n), part * processes
    runs = [
        list(
            pipeline.eval_batches(
                examples,
                batch_size=batch_size,
                threads=2,
                process=(index, processes),
            )
        )
        for index in range(processes)
    ]
    assert {len(run) for run in runs} == {-(-n // batch_size)}
    batches = [batch for step in zip(*runs, strict=True) for batch in step]
    for batch in batches:
        assert batch["image"].shape == (part, 2, 2, 1)
        assert batch["mask"].dtype == bool
        assert not batch["image"][~batch["mask"]].any()
        assert not batch["label"][~batch["mask"]].any()
        assert (batch["index"][~batch["mask"]] == -1).all()
    if n:
        mask = np.concatenate([batch["mask"] for batch in batches])
        for key in ("index", "label"):
            values = np.concatenate([batch[key] for batch in batches])
            np.testing.assert_array_equal(values[mask], np.arange(n))
        pixels = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
        np.testing.assert_array_equal(pixels[mask], np.arange(n) % 251)


def test_batch_size_must_divide_among_processes():
    with pytest.raises(UserError, match=r"^batch_size is 10; .* multiple of the 4 processes"):
        train_labels(100, 10, 0, 1, processes=4)
    with pytest.raises(UserError, match=r"eval.batch_size is 10; it must be a multiple"):
        pipeline.eval_batches(make_examples(5), batch_size=10, threads=1, process=(0, 4))
    with pytest.raises(UserError, match=r"batch_size is 101, more than the 100"):
        train_labels(100, 101, 0, 1)


def test_a_readers_error_surfaces_as_it_is():
    def read(rows):
        if 13 in rows:
            raise UserError("image 13 can't be decoded")
        return np.zeros((len(rows), 2, 2, 1), np.uint8), rows.astype(np.int32)

    batches = pipeline.eval_batches(make_examples(40, read), batch_size=5, threads=2)
    assert [next(batches)["index"][0] for _ in range(2)] == [0, 5]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "image 13 can't be decoded"


def test_views_are_read_through_their_own_positions():
    examples = dataclasses.replace(make_examples(20)).take(np.array([7, 3, 11]))
    (batch,) = pipeline.eval_batches(examples, batch_size=4, threads=1)
    np.testing.assert_array_equal(batch["label"], [7, 3, 11, 0])
    np.testing.assert_array_equal(batch["index"], [0, 1, 2, -1])
