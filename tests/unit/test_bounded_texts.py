"""Texts, JSON, TOML, numbers and paths from strangers: what is too large, too deep or endless is refused."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

from lowrank.config.flag import fields_of, literals, option, path, resolution, steps_or_share
from lowrank.errors import LONGEST, Refused
from lowrank.files import TOKENIZER_BITS, parse_json, parse_toml, read_json, read_text
from lowrank.models.weighting import weighted

DEEP = [("[", "]"), ('{"a":', "}")]


@pytest.mark.parametrize("depth", [100, 3_000, 200_000])
@pytest.mark.parametrize(("begin", "end"), DEEP)
def test_nested_brackets_are_refused(depth, begin, end):
    with pytest.raises(Refused, match=r"is not JSON: .*nested"):
        parse_json(begin * depth + "1" + end * depth, "x.json")
    begin, end = begin.replace('"a":', "a="), end
    with pytest.raises(Refused, match=r"is not TOML: .*nested"):
        parse_toml("a=" + begin * depth + "1" + end * depth, "x.toml")


@pytest.mark.parametrize("number", ["1" * 25, "1" * 5_000])
def test_long_integers_are_refused(number):
    with pytest.raises(Refused, match="is not JSON"):
        parse_json(f'{{"a": [{number}]}}', "x.json")
    for text in (number, f"0x{number}"):
        with pytest.raises(Refused, match="is not TOML"):
            parse_toml(f"a = {text}", "x.toml")


def test_settings_of_models_are_bounded(tmp_path):
    """transformers writes int(1e30) where a tokenizer has no limit; longer numbers and depth are refused."""
    path = tmp_path / "tokenizer_config.json"
    for text, reason in (
        (f'{{"model_max_length": {int(1e30)}}}', ""),
        ('{"a": ' + "1" * 60 + "}", "over 128 bits"),
        ("[" * 70 + "]" * 70, "64 levels"),
    ):
        path.write_text(text)
        if reason:
            with pytest.raises(Refused, match=f"tokenizer .*tokenizer_config.json is not JSON: .*{reason}"):
                read_json(path, "tokenizer", bits=TOKENIZER_BITS)
        else:
            assert read_json(path, "tokenizer", bits=TOKENIZER_BITS) == {"model_max_length": int(1e30)}
            with pytest.raises(Refused, match="over 64 bits"):
                read_json(path, "tokenizer")


def test_dotted_keys_take_no_quadratic_time():
    begin = time.process_time()
    for blank in ("", " "):
        with pytest.raises(Refused, match="more than 1000 parts"):
            parse_toml(f"a{blank}." * 200_000 + "a = 1", "x.toml")
    assert time.process_time() - begin < 5  # tomllib alone takes minutes
    assert parse_toml("a.b . c = 1", "x.toml") == {"a": {"b": {"c": 1}}}


def test_endless_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(8 << 30)
    (tmp_path / "small").write_bytes(b"x" * 11)
    for name, reason in (
        ("/dev/zero", "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "large", "has more than 16,777,216 bytes"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(Refused, match=f"caption .*{reason}.*; look there"):
            read_text(name, "caption", way_out="look there")
    with pytest.raises(Refused, match="has more than 10 bytes"):
        read_text(tmp_path / "small", "caption", limit=10)
    (tmp_path / "text").write_bytes("\ufeffä\r\nb\r".encode())
    assert read_text(tmp_path / "text", "caption") == "ä\nb\n"


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "inf%", "1e999", "²", "9" * 5_000])
def test_numbers_that_are_none_are_refused(text):
    for read in (steps_or_share, resolution):
        with pytest.raises(Refused):
            read(text)


def _spec(made):
    record = dataclasses.make_dataclass("Record", [("x", str, made)], frozen=True)
    return fields_of(record)["x"]


def test_impossible_paths_are_refused():
    folder = _spec(path("", "a folder"))
    for text, reason in (("a" * 300, "over 255 bytes"), ("ä" * 128, "over 255 bytes"), ("a\0b", "NUL")):
        with pytest.raises(Refused, match=reason):
            folder.from_toml(text)
    assert folder.from_toml("a" * 200 + "/" + "b" * 200)
    with pytest.raises(Refused, match="NUL"):
        _spec(option("", "a text")).from_toml("a\0b")


def test_long_values_are_cut_in_messages():
    for read in (
        lambda text: resolution(text),
        lambda text: literals("--optimizer_args", [f"a={text}"]),
        lambda text: literals("--optimizer_args", [text]),
        lambda text: _spec(option("x", "a word", choices=("x", "y"))).from_text(text),
    ):
        with pytest.raises(Refused) as refused:
            read("z" * 140_000)
        assert len(str(refused.value)) < 500
    assert len(str(Refused("y" * 140_000 + "; the way out"))) <= LONGEST
    assert str(Refused("y" * 140_000 + "; the way out")).endswith("; the way out")


def test_caption_weights_take_linear_time():
    begin = time.process_time()
    texts = ["(" * 100_000 + "a" + ")" * 100_000, "(a:" + "1" * 100_000, ":" * 200_000, "[(b" * 50_000]
    for text in texts:
        assert weighted(text)
    assert time.process_time() - begin < 10  # minutes where the time grows with the square
    assert weighted("((a:1.5))b") == [("a", pytest.approx(1.65)), ("b", 1.0)]
    assert weighted("(a:" + "9" * 400 + ")")[0][1] == pytest.approx(1.1)  # not infinity
