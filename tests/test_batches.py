"""Batches: the order of windows, steps and their micro-batches, and the windows that score a data set."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, count, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.batches import (
    IGNORED,
    Batch,
    Cursor,
    Order,
    Window,
    divide,
    make_batch,
    next_step,
    scoring_windows,
)
from espalier.data.store import TokenStore
from espalier.errors import EspalierError

PAD = 60_000

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: max(sizes) > 1)
sequence_lengths = st.integers(1, 17)
seeds = st.integers(0, 2**40)
quickly = settings(deadline=None, max_examples=30, database=None)


def store_of(sizes: Sequence[int], flags: Sequence[bool] | None = None) -> TokenStore:
    """A store of documents of so many tokens; every token is its own position, so that none is like another."""
    with tempfile.TemporaryDirectory() as name:  # the open files outlive it
        folder = Path(name)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        np.arange(offsets[-1], dtype=np.uint16).tofile(folder / "tokens.bin")
        if flags is not None:
            np.array(flags, np.bool_).tofile(folder / "targets.bin")
        return TokenStore(folder, "text", np.dtype(np.uint16), offsets, np.array(sizes), flags is not None, "")


def predictions(store: TokenStore) -> set[int]:
    """Every position from which the next token of the same document is predicted."""
    ends = set((store.offsets[1:] - 1).tolist())
    return {i for i in range(store.tokens) if i not in ends}


def epoch_of(order: Order, epoch: int) -> list[Window]:
    return [order.window(epoch, position) for position in range(order.count(epoch))]


def steps_of(order: Order, cursor: Cursor, tokens: int, steps: int) -> Iterator[list[Window]]:
    for _ in range(steps):
        yield next_step(order, cursor, tokens)


# the order


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_visits_every_prediction_of_every_document_once(
    sizes: list[int], sequence_length: int, seed: int, epoch: int
) -> None:
    store = store_of(sizes)
    order = Order(store, sequence_length, seed)
    visited = Counter(i for w in epoch_of(order, epoch) for i in range(w.start, w.stop))
    assert set(visited) == predictions(store) and set(visited.values()) == {1}
    assert order.predictions == len(visited)


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds)
def test_a_window_is_not_empty_nor_too_long_and_stays_in_its_document(sizes: list[int], sequence_length: int, seed: int) -> None:
    store = store_of(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    for window in epoch_of(Order(store, sequence_length, seed), 0):
        assert 0 < len(window) <= sequence_length
        assert document[window.start] == document[window.stop]  # the last prediction's token too


def test_documents_that_fit_are_whole_in_every_epoch() -> None:
    order = Order(store_of([3, 9, 17, 2, 16]), 16, 0)
    for epoch in range(4):
        assert sorted(len(w) for w in epoch_of(order, epoch)) == [1, 2, 8, 15, 16]


def test_a_long_document_is_cut_elsewhere_in_every_epoch() -> None:
    order = Order(store_of([1000]), 64, 0)
    cuts = [min(w.stop for w in epoch_of(order, epoch)) for epoch in range(20)]
    assert len(set(cuts)) > 10 and min(cuts) >= 1 and max(cuts) <= 64


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    store = store_of([9] * 100)
    orders = [epoch_of(Order(store, 8, seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for one, other in combinations(orders, 2):
        assert one != other and Counter(one) == Counter(other)


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds)
def test_an_epoch_does_not_depend_on_the_epochs_before(sizes: list[int], sequence_length: int, seed: int) -> None:
    store = store_of(sizes)
    one = Order(store, sequence_length, seed)
    forward = [epoch_of(one, epoch) for epoch in range(3)]
    for epoch in (2, 0, 1):
        assert epoch_of(one, epoch) == forward[epoch]
        assert epoch_of(Order(store, sequence_length, seed), epoch) == forward[epoch]


def test_data_without_anything_to_predict_are_refused() -> None:
    with pytest.raises(EspalierError, match=r"no document of .* has two tokens"):
        Order(store_of([1, 0, 1]), 8, 0)


# steps


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, tokens=st.integers(1, 60))
def test_a_step_has_no_more_tokens_than_asked_for_unless_it_is_one_window(
    sizes: list[int], sequence_length: int, seed: int, tokens: int
) -> None:
    for windows in steps_of(Order(store_of(sizes), sequence_length, seed), Cursor(), tokens, 12):
        assert windows
        assert len(windows) == 1 or sum(map(len, windows)) <= tokens


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, tokens=st.integers(1, 60))
def test_a_step_is_as_large_as_it_may_be(sizes: list[int], sequence_length: int, seed: int, tokens: int) -> None:
    steps = list(steps_of(Order(store_of(sizes), sequence_length, seed), Cursor(), tokens, 12))
    for windows, following in pairwise(steps):
        assert sum(map(len, windows)) + len(following[0]) > tokens


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, tokens=st.integers(1, 60))
def test_steps_go_through_epoch_after_epoch_without_gap_or_repeat(
    sizes: list[int], sequence_length: int, seed: int, tokens: int
) -> None:
    order = Order(store_of(sizes), sequence_length, seed)
    taken = [window for step in steps_of(order, Cursor(), tokens, 15) for window in step]
    endless = (window for epoch in count() for window in epoch_of(order, epoch))
    assert taken == list(islice(endless, len(taken)))


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, tokens=st.integers(1, 60), stop=st.integers(0, 10))
def test_a_cursor_is_all_it_takes_to_go_on(sizes: list[int], sequence_length: int, seed: int, tokens: int, stop: int) -> None:
    store = store_of(sizes)
    cursor = Cursor()
    whole = Order(store, sequence_length, seed)
    list(steps_of(whole, cursor, tokens, stop))
    saved = copy.copy(cursor)
    rest = list(steps_of(whole, cursor, tokens, 6))
    assert list(steps_of(Order(store, sequence_length, seed), saved, tokens, 6)) == rest
    assert saved == cursor


# micro-batches


windows_of_any_size = st.lists(st.integers(1, 40), min_size=1, max_size=25).map(
    lambda sizes: [Window(100 * i, 100 * i + size) for i, size in enumerate(sizes)]
)


@quickly
@given(windows=windows_of_any_size, tokens=st.integers(1, 90), padded=st.booleans())
def test_every_window_is_in_one_micro_batch_and_none_is_too_large(windows: list[Window], tokens: int, padded: bool) -> None:
    parts = divide(windows, tokens, padded)
    assert Counter(w for part in parts for w in part) == Counter(windows)
    for part in parts:
        size = max(map(len, part)) * len(part) if padded else sum(map(len, part))
        assert part and (len(part) == 1 or size <= tokens)


@quickly
@given(windows=windows_of_any_size, tokens=st.integers(1, 90))
def test_no_two_packed_micro_batches_would_fit_into_one(windows: list[Window], tokens: int) -> None:
    for one, other in combinations(divide(windows, tokens), 2):
        assert sum(map(len, one + other)) > tokens


def test_padded_micro_batches_hold_windows_of_similar_length() -> None:
    windows = [Window(0, n) for n in (3, 30, 4, 29, 28, 5)]
    assert [sorted(map(len, part)) for part in divide(windows, 90, padded=True)] == [[28, 29, 30], [3, 4, 5]]


def rectangles(batch: Batch) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Inputs, targets (all positions) and positions of a batch, one list a window, without padding."""
    total = batch.input_ids.numel()
    targets = batch.targets
    if batch.rows is not None:
        targets = torch.full((total,), IGNORED)
        for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
            if target != IGNORED:
                assert targets[row] == IGNORED  # no position is predicted twice
                targets[row] = target
    parts = [t.reshape(-1).tolist() for t in (batch.input_ids, targets, batch.position_ids)]
    if batch.attention_mask is None:
        starts = np.cumsum([0, *batch.lengths]).tolist()
    else:
        starts = [i * batch.input_ids.shape[1] for i in range(len(batch.lengths) + 1)]
        for i, n in enumerate(batch.lengths):
            for part, filler in zip(parts, (PAD, IGNORED, 0), strict=True):
                assert set(part[starts[i] + n : starts[i + 1]]) <= {filler}
    inputs, goals, positions = ([part[a : a + n] for a, n in zip(starts, batch.lengths, strict=False)] for part in parts)
    return inputs, goals, positions


@quickly
@given(
    windows=windows_of_any_size,
    micro=st.integers(1, 200),
    padded=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, None]),
)
def test_a_batch_holds_its_windows_and_their_targets(windows: list[Window], micro: int, padded: bool, share: float | None) -> None:
    total = 100 * len(windows)
    flags = None if share is None else (np.random.default_rng(0).random(total) < share).tolist()
    store = store_of([100] * len(windows), flags)
    batch = make_batch(store, windows, micro, padded, PAD)
    inputs, targets, positions = rectangles(batch)
    for window, row, goals, places in zip(windows, inputs, targets, positions, strict=False):
        wanted = range(window.start + 1, window.stop + 1)
        assert row == list(range(window.start, window.stop))
        assert goals == [i if flags is None or flags[i] else IGNORED for i in wanted]
        assert places == list(range(len(window)))
    assert batch.tokens == sum(map(len, windows))
    assert batch.target_count == sum(flags is None or flags[i] for w in windows for i in range(w.start + 1, w.stop + 1))
    for filler, goals in zip(inputs[len(windows) :], targets[len(windows) :], strict=True):
        assert not padded and set(filler) == {PAD} and set(goals) == {IGNORED}


@quickly
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), micro=st.integers(1, 300))
def test_a_packed_row_has_one_of_few_sizes_and_never_more_than_the_micro_batch(sizes: list[int], micro: int) -> None:
    windows = [Window(0, n) for n in sizes]
    for part in divide(windows, micro):
        size = make_batch(store_of([50]), part, micro).input_ids.shape[1]
        taken = sum(map(len, part))
        if taken <= micro:
            assert taken <= size <= micro
            assert size % max(1, micro // 16) == 0 or size == micro
        else:
            assert len(part) == 1


def test_where_few_tokens_are_targets_only_their_rows_are_kept() -> None:
    flags = [i % 10 == 0 for i in range(500)]
    batch = make_batch(store_of([500], flags), [Window(0, 400)], 400)
    assert batch.rows is not None and batch.target_count == 40
    assert len(batch.rows) == len(batch.targets) == 64  # 40 filled up
    full = make_batch(store_of([500]), [Window(0, 400)], 400)
    assert full.rows is None and full.target_count == 400


def test_a_batch_without_targets_is_possible() -> None:
    batch = make_batch(store_of([50], [False] * 50), [Window(0, 20)], 32)
    assert batch.target_count == 0 and set(batch.targets.tolist()) <= {IGNORED}


# scoring


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths)
def test_scoring_predicts_everything_once_with_half_a_window_of_context(sizes: list[int], sequence_length: int) -> None:
    store = store_of(sizes)
    begins = {i: b for b, e in pairwise(store.offsets.tolist()) for i in range(b, e)}
    scored: Counter[int] = Counter()
    for window, skip in scoring_windows(store, sequence_length):
        assert 0 <= skip < len(window) <= sequence_length
        assert begins[window.start] == begins[window.stop]
        for i in range(window.start + skip, window.stop):
            seen = i + 1 - window.start  # the token itself and what stands before it
            assert seen >= min(i + 1 - begins[i], (sequence_length + 1) // 2)
            scored[i] += 1
    assert set(scored) == predictions(store) and set(scored.values()) == {1}


def test_scoring_can_end_after_some_documents() -> None:
    store = store_of([5, 5, 5])
    assert [window for window, _ in scoring_windows(store, 8, limit=2)] == [Window(0, 4), Window(5, 9)]


# tasks


@quickly
@given(sizes=lengths, sequence_length=sequence_lengths, seed=seeds, padded=st.booleans())
def test_micro_batches_are_of_one_task_and_hold_the_windows_that_they_would_without(sizes: list[int], sequence_length: int, seed: int, padded: bool) -> None:
    store = store_of(sizes)
    plain = Order(store, sequence_length, seed).batches(Cursor(), 4 * sequence_length, 2 * sequence_length, padded, PAD)
    store.tasks, store.task_of = ("x", "y", "z"), np.arange(len(sizes)) % 3
    told = Order(store, sequence_length, seed).batches(Cursor(), 4 * sequence_length, 2 * sequence_length, padded, PAD)

    def predicted(batches: list[Batch]) -> list[int]:
        return sorted(int(t) for batch in batches for t in batch.targets if t != IGNORED)

    assert predicted(told) == predicted(plain) and {batch.task for batch in plain} == {""}
    for batch in told:
        documents = {store.document_at(int(target)) for target in batch.targets if target != IGNORED}
        assert {store.tasks[store.task_of[one]] for one in documents} == {batch.task}
