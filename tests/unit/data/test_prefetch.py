"""Which images make an epoch, and work done ahead of its use."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.data import plan
from lowrank.data.dataset import Dataset, Example, Subset
from lowrank.data.prefetch import ahead
from lowrank.errors import Refused


def placed(counts, is_reg):
    dataset = Dataset((Subset("x"),))
    return [
        plan.place_examples(dataset, [Example(f"{i}", ("",), (8, 8), repeats, False, 0)])[0]
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


def named(count, *, subset=0, is_reg=False, size=(8, 8)):
    return [Example(Path(f"{subset}-{i:03}.png"), ("",), size, 1, is_reg, subset) for i in range(count)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 3)), min_size=1, max_size=12
    ),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_image_is_in_exactly_one_bucket_and_every_repeat_in_one_batch(
    rows, batch_size, bucketed, epoch
):
    dataset = Dataset(
        (Subset(Path("x")),),
        resolution=(512, 512),
        batch_size=batch_size,
        enable_bucket=bucketed,
        bucket_reso_steps=64,
    )
    examples = [
        Example(Path(f"{i}.png"), ("",), (width, height), repeats, False, 0)
        for i, (width, height, repeats) in enumerate(rows)
    ]
    group = plan.place_examples(dataset, examples)
    members = plan.by_bucket(group)
    in_buckets = Counter(one.example.path for many in members.values() for one in many)
    assert in_buckets == Counter(example.path for example in examples)
    assert all(width * height <= 512 * 512 for width, height in members)
    batches = plan.epoch_batches([group], 0, epoch)
    assert len(batches) == plan.batch_count([group])
    assert all(
        len({one.where.bucket for one in batch}) == 1 and len(batch) <= batch_size for batch in batches
    )
    in_batches = Counter(one.example.path for batch in batches for one in batch)
    assert in_batches == {example.path: example.repeats for example in examples}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]), st.integers(0, 9))
def test_what_is_held_out_is_what_sd_scripts_validates_with(count, share, seed):
    examples = named(count)
    shuffled = [one.path for one in examples]
    random.seed(seed), random.shuffle(shuffled)  # its own words: the global stream, then the list's tail
    expected = set(shuffled[count - round(count * share) :])
    dataset = Dataset((Subset(Path("x")),), validation_split=share, validation_seed=seed)
    train, held = plan.hold_out(dataset, examples, seed + 1)
    assert {one.path for one in held} == expected
    assert [one.path for one in train] == [one.path for one in examples if one.path not in expected]
    assert plan.hold_out(Dataset((Subset(Path("x")),), validation_split=share), examples, seed) == (
        train,
        held,
    )


def test_holding_out_is_by_folder_spares_regularisation_and_never_what_another_dataset_trains_on(caplog):
    subsets = (Subset(Path("a")), Subset(Path("b")), Subset(Path("c"), is_reg=True))
    dataset = Dataset(subsets, validation_split=0.2)
    examples = [*named(10), *named(5, subset=1), *named(10, subset=2, is_reg=True)]
    (train,), (held,) = plan.split_holdout([dataset], [examples], 0)
    assert Counter(one.subset for one in held) == {0: 2, 1: 1} and len(train) == 22
    _, again = plan.split_holdout([dataset, Dataset(subsets)], [examples, examples], 0)
    assert again == [[], []] and "holds out no image" in caplog.text
    with pytest.raises(Refused, match="holds out every image; lower it"):
        plan.split_holdout([Dataset(subsets, validation_split=0.9)], [named(1)], 0)
    with pytest.raises(Refused, match="validation_split 1 is not"):
        Dataset(subsets, validation_split=1)


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
