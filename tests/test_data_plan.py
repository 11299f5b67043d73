"""Which images make an epoch, and work done ahead of its use."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.data import plan
from lowrank.data.ahead import ahead
from lowrank.data.records import Dataset, Example, Subset


def placed(counts, is_reg):
    dataset = Dataset((Subset("x"),))
    return [
        plan.place(dataset, [Example(f"{i}", ("",), (8, 8), repeats, False, 0)])[0]
        for i, repeats in enumerate(counts)
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 40))
def test_regularisation_balance_is_that_of_the_loop_in_sd_scripts(counts, total):
    expected, reached, first = [], 0, True
    while reached < total and counts:
        for index, repeats in enumerate(counts):
            if first:
                expected.append(repeats)
                reached += repeats
            else:
                expected[index] += 1
                reached += 1
            if reached >= total:
                break
        first = False
    assert [one.repeats for one in plan.balanced(placed(counts, True), total)] == expected


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ahead_keeps_order_looks_little_ahead_and_raises_in_place(workers):
    started = []

    def work(item):
        started.append(item)
        if item == 7:
            raise KeyError(item)
        return item * 2

    results = ahead(work, range(100), workers=workers)
    assert list(islice(results, 3)) == [0, 2, 4]
    assert len(started) <= 3 + 2 * workers
    assert list(islice(results, 4)) == [6, 8, 10, 12]
    with pytest.raises(KeyError):
        next(results)
    list(ahead(work, [1], workers=workers))
