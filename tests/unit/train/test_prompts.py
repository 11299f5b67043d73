"""Prompt files: what they mean, and one sentence for each that means nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank.errors import Refused
from lowrank.train.prompts import Prompt, parse_line, parse_lines, read_prompts

DEFAULT = Prompt("", width=64, height=64)


def test_txt_toml_and_json_prompts_are_equivalent(tmp_path):
    wanted = [Prompt("a cat", "blurry", width=512, height=768, sample_steps=28, guidance_scale=3.0, seed=1)]
    texts = {
        "p.txt": "# cats\n\na cat --n blurry --w 512 --h 775 --s 28 --g 3 --d 1\n",
        "p.toml": "[prompt]\nwidth=512\nheight=768\nnegative_prompt='blurry'\n[[prompt.subset]]\n"
        "prompt='a cat'\nsample_steps=28\nguidance_scale=3\nseed=1\n",
        "p.json": '[{"prompt": "a cat", "negative_prompt": "blurry", "width": 512.0, "height": "768", '
        '"sample_steps": 28, "guidance_scale": 3, "seed": 1, "enum": 0}]',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name, DEFAULT) == wanted


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_prompt_files_of_windows_editors(name, encoding, tmp_path):
    texts = {
        "p.txt": "# mine\r\nein Kätzchen --d 1\r\n",
        "p.toml": "[prompt]\nseed=1\n[[prompt.subset]]\nprompt='ein Kätzchen'\n",
        "p.json": '[{"prompt": "ein Kätzchen", "seed": 1}]',
    }
    (tmp_path / name).write_bytes(texts[name].encode(encoding))
    assert read_prompts(tmp_path / name, DEFAULT) == [Prompt("ein Kätzchen", width=64, height=64, seed=1)]


def test_prompt_file_in_another_encoding(tmp_path):
    (tmp_path / "p.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    with pytest.raises(Refused, match=r"is neither UTF-8 nor UTF-16 .* save it as UTF-8"):
        read_prompts(tmp_path / "p.txt", DEFAULT)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.toml", "prompt='x'", "is not of the form"),
        ("p.toml", "[prompt]\nsubset=[1]", "is not of the form"),
        ("p.toml", "[prompt]\nsubset='x'", "is not of the form"),
        ("p.json", "[1]", "is not a list of prompt lines"),
        ("p.json", "3", "is not a list of prompt lines"),
        ("p.json", '"abc"', "is not a list of prompt lines"),
        ("p.json", '{"a": 1}', "is not a list of prompt lines"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.json", '[{"prompt": null}]', "holds an empty prompt"),
        ("p.yaml", "x", "is neither .txt, .toml nor .json"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused) as caught:
        read_prompts(tmp_path / name, DEFAULT)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "drawn", "said"),
    [
        ("p.txt", "x --s 2000", {"sample_steps": 1000}, "sample_steps 2000 becomes 1000"),
        ("p.txt", "x --s 0", {"sample_steps": 1}, "sample_steps 0 becomes 1"),
        ("p.txt", "x --w 48 --h 8", {"width": 48, "height": 16}, "height 8 becomes 16"),
        ("p.txt", "x --w 512.7", {"width": 512}, "width 512.7 becomes 512"),
        ("p.txt", "x --d -1 --l 7.5", {"seed": 0, "scale": 7.5}, "seed -1 becomes 0"),
        ("p.txt", "x --d 9223372032559808512", {"seed": 2**63 - 2**32}, ""),
        ("p.txt", "x --w five", {"width": 64}, "line 1: width 'five' is not a number and is left out"),
        ("p.txt", "x --g nan", {"guidance_scale": 3.5}, "guidance_scale 'nan' is not a number"),
        ("p.txt", "x --cn edges.png --fs 3", {}, "--cn is unknown here and is left out"),
        ("p.json", '[{"prompt": "x", "height": 1e999}]', {"height": 64}, "height inf is not a number"),
        ("p.json", '[{"prompt": "x", "seed": true}]', {"seed": None}, "seed True is not a number"),
        (
            "p.json",
            '[{"prompt": "x", "hight": 96}]',
            {},
            "hight is unknown here and is left out (did you mean",
        ),
        ("p.toml", "[prompt]\nprompt='x'\nsample_steps=20.5", {"sample_steps": 20}, "becomes 20"),
    ],
)
def test_what_kohya_accepts_is_accepted_with_a_line(tmp_path, name, text, drawn, said, caplog):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, DEFAULT) == [replace(DEFAULT, prompt="x", **drawn)]
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_prompts_as_lines_of_a_flag():
    lines = ("a cat --w 32 --d 1", "", "a dog")
    assert [(p.prompt, p.width, p.seed) for p in parse_lines(lines, DEFAULT)] == [
        ("a cat", 32, 1),
        ("a dog", 64, None),
    ]


def test_sides_are_rounded_down_to_tokens():
    assert parse_line("x --w 527 --h 31", DEFAULT).width == 512
    assert parse_line("x --w 527 --h 31", DEFAULT, step=8).width == 520


def test_a_line_may_name_its_sampler():
    assert parse_line("x --ss euler_a --L 2", DEFAULT).sample_sampler == "euler_a"


def test_an_empty_text_file_draws_nothing(tmp_path, caplog):
    """Some launchers write the file even when nothing is to be drawn."""
    (tmp_path / "p.txt").write_text("# nothing\n")
    assert read_prompts(tmp_path / "p.txt", Prompt("")) == []
    assert "is empty" in caplog.text
