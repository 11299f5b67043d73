"""The caption pipeline, stage by stage, and what can be cached."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.flags_data import Captions
from lowrank.data.captions import draw_caption, possible_captions
from lowrank.data.dataset import Example
from lowrank.errors import Refused


def example(*lines):
    return Example(Path("x.png"), lines, (8, 8), 1, False, 0)


def draws(lines, count=400, *, epoch=0, step=0, max_train_steps=None, **values):
    one, made = example(*lines), Captions(**values)
    return [
        draw_caption(one, made, random.Random(i), epoch=epoch, step=step, max_train_steps=max_train_steps)
        for i in range(count)
    ]


def test_plain_caption_is_left_as_written():
    assert set(draws(["a cat,  in , <s> style,"])) == {"a cat,  in , <s> style,"}


def test_prefix_and_suffix_come_with_a_blank():
    assert set(draws(["cat"], caption_prefix="photo of a", caption_suffix="indoors")) == {
        "photo of a cat indoors"
    }


def test_dropout_empties_the_whole_caption_with_its_prefix():
    counts = Counter(draws(["cat"], 2000, caption_prefix="a", caption_dropout_rate=0.25))
    assert set(counts) == {"", "a cat"}
    assert 400 < counts[""] < 600


def test_every_second_epoch_has_no_captions():
    emptied = [
        draws(["cat"], 1, epoch=epoch, caption_dropout_every_n_epochs=2)[0] == "" for epoch in range(4)
    ]
    assert emptied == [False, True, False, True]


def test_wildcards_choose_lines_and_words_and_keep_escapes():
    found = set(draws(["a {red|blue} cat", "{{x}} dog"], caption_prefix="p", enable_wildcard=True))
    assert found == {"p a red cat", "p a blue cat", "p {x} dog"}
    assert set(draws(["a {red|blue} cat", "dog"])) == {"a {red|blue} cat"}


def test_shuffle_keeps_the_first_tokens():
    found = draws(["a, b, c, d"], shuffle_caption=True, keep_tokens=1)
    assert all(text.startswith("a, ") for text in found)
    assert len(set(found)) == 6
    assert all(sorted(text.split(", ")) == list("abcd") for text in found)


def test_keep_tokens_separator_fixes_head_and_tail():
    found = set(draws(["h1, h2 ||| a, b ||| t"], shuffle_caption=True, keep_tokens_separator="|||"))
    assert found == {"h1, h2, a, b, t", "h1, h2, b, a, t"}
    assert set(draws(["h ||| a"], keep_tokens_separator="|||")) == {"h ||| a"}


def test_tag_dropout_spares_the_fixed_tokens():
    found = draws(["k, a, b, c"], 1000, caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert all(text.split(", ")[0] == "k" for text in found)
    dropped = sum(3 - (len(text.split(", ")) - 1) for text in found)
    assert 1350 < dropped < 1650
    assert set(draws(["a, b"], caption_tag_dropout_rate=1.0)) == {""}


def test_warm_up_lets_tags_in_step_by_step():
    def count(step, **values):
        return len(draws(["a,b,c,d,e"], 1, step=step, token_warmup_min=1, **values)[0].split(", "))

    assert [count(step, token_warmup_step=10) for step in (0, 2, 3, 5, 9, 10, 99)] == [1, 1, 2, 3, 4, 5, 5]
    assert count(5, token_warmup_step=0.5, max_train_steps=20) == 3
    with pytest.raises(Refused, match="max_train_steps"):
        count(5, token_warmup_step=0.5)


def test_separators():
    text = draws(["a;b"], 1, shuffle_caption=True, caption_separator=";")[0]
    assert sorted(text.split("; ")) == ["a", "b"]
    found = set(draws(["a;;;b, c"], shuffle_caption=True, secondary_separator=";;;"))
    assert found == {"a,b, c", "c, a,b"}
    assert set(draws(["a;;;b"], secondary_separator=";;;")) == {"a,b"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ("cat",)),
        ({"caption_prefix": "a"}, ("a cat",)),
        ({"caption_dropout_rate": 0.1}, ("cat", "")),
        ({"caption_dropout_every_n_epochs": 3}, ("cat", "")),
        ({"caption_dropout_rate": 1.0}, ("",)),
        ({"caption_dropout_every_n_epochs": 1}, ("",)),
        ({"shuffle_caption": True}, None),
        ({"caption_tag_dropout_rate": 0.1}, None),
        ({"token_warmup_step": 5}, None),
        ({"enable_wildcard": True}, ("cat",)),
    ],
)
def test_possible_captions(values, expected):
    assert possible_captions(example("cat"), Captions(**values)) == expected


def test_possible_with_lines_and_choices():
    assert possible_captions(example("a", "b"), Captions(enable_wildcard=True)) == ("a", "b")
    assert possible_captions(example("a", "{b|c}"), Captions(enable_wildcard=True)) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab {}|,;", min_size=1, max_size=8), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2),
    st.integers(0, 3),
)
def test_what_is_drawn_is_possible(lines, shuffle, wildcard, rate, every, epoch):
    made = Captions(
        shuffle_caption=shuffle,
        enable_wildcard=wildcard,
        caption_dropout_rate=rate,
        caption_prefix="p",
        caption_dropout_every_n_epochs=every,
        secondary_separator=";",
    )
    listed = possible_captions(example(*lines), made)
    drawn = {draw_caption(example(*lines), made, random.Random(i), epoch=epoch) for i in range(20)}
    assert listed is None or drawn <= set(listed)
    assert drawn == {draw_caption(example(*lines), made, random.Random(i), epoch=epoch) for i in range(20)}
