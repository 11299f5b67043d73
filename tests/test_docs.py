"""What the documentation says is there: its links, its files, its flags, its commands, its figures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from lowrank.cli.resolve import with_network
from lowrank.config.command_line import pairs
from lowrank.config.positional import parse_words
from lowrank.config.tools import CONVERT_WORDS, EXPORT, IMPORT, INSPECT, INSPECT_WORDS
from lowrank.train.network_module import facade_of, find_module
from tools.make_flags import SURFACES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "assets").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PARSERS = {
    "tools/export_lora.py": (EXPORT, CONVERT_WORDS),
    "tools/import_lora.py": (IMPORT, CONVERT_WORDS),
    "tools/inspect_lora.py": (INSPECT, INSPECT_WORDS),
}
# flags of other programs, and of the lines of a prompt file, that pages speak of
FOREIGN = {"--check", "--ss", "--network_merge", "--network_pre_calc", "--fp16"}
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]+")

# files of the reader that a command needs while it is read
EXAMPLES = {"config/lycoris_tlora.json": "tests/fixtures/lycoris/lycoris_tlora.json"}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Script and words of every `python SCRIPT …` and `accelerate launch SCRIPT …`, broken lines joined."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    for script, rest in re.findall(
        r"^(?:[# ]*)(?:[A-Z_]+=\S+ )*(?:python|accelerate launch) (\S+\.py)(.*)$", joined, flags=re.MULTILINE
    ):
        # […] marks what may be left out
        yield script, shlex.split(re.sub(r"[\[\]]", " ", rest), comments=True)


def dead(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        lost = not target.exists() or (fragment and fragment not in anchors(target))
        found += [link] if lost and "://" not in link else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    assert dead(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_script_that_is_called_is_there(page):
    text = page.read_text(encoding="utf-8")
    called = re.findall(r"(?:python|bash|launch) ((?:[\w.]+/)*\w+\.(?:py|sh))", text)
    elsewhere = {"train_network.py"}  # docs/kohya.md, in a checkout of sd-scripts
    assert [s for s in called if s not in elsewhere and "NAME" not in s and not (ROOT / s).is_file()] == []


@pytest.fixture(scope="module")
def flags():
    """Every flag of every script, and those that the small scripts name in their text."""
    parsers = [surface.parser() for surface in SURFACES] + [
        command.parser() for command, _ in PARSERS.values()
    ]
    known = FOREIGN.union(*(parser._option_string_actions for parser in parsers))
    for file in [*ROOT.glob("*.sh"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        known.update(FLAG.findall(file.read_text(encoding="utf-8")))
    return known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_is_one_of_ours(page, flags):
    assert set(FLAG.findall(page.read_text(encoding="utf-8"))) <= flags


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=name)
def test_every_command_is_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    surfaces = {surface.prog: surface for surface in SURFACES}
    for script, words in commands(page.read_text(encoding="utf-8")):
        if script in PARSERS:
            parse_words(PARSERS[script][0], words, PARSERS[script][1])
        if script not in surfaces or "…" in words:  # … stands for the reader's own flags
            continue
        parsed = surfaces[script].parse([EXAMPLES.get(word, word) for word in words])
        assert not [note for note in parsed.notes if "ignored" in note], words
        if "network_module" in parsed.specs:
            network = with_network(parsed, "networks.lora").network
            facade = facade_of(find_module(network.network_module))
            given = pairs("--network_args", network.network_args)
            assert facade is None or set(given) <= set(facade.known), words


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the table in docs/PAGE whose first line begins with HEAD, a list for each line."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text.split(f"\n{head}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(file: str):
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def test_what_the_demos_models_draw_is_what_was_measured():
    metrics = results("assets/demo/metrics.json")
    families = {"FLUX": "flux", "SD 1.5": "sd15", "SDXL": "sdxl"}
    rows = table("demo.md", "| | content | style |")
    assert len(rows) == 9
    for row, *cells in rows:
        title, kind = row.split(", ")
        told = metrics[families[title]]["shares"][kind]
        shares = [f"{v['share']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in told.values()]
        assert cells == [*shares, str(told["style"]["n"])], row


def test_the_demos_merges_are_what_was_measured():
    names = {"ΔR-triu": "delta_r_triu", "ΔR": "delta_r", "QR-LoRA": "qrlora", "LoRA": "lora"}
    families = {"FLUX": "flux", "SD 1.5": "sd15", "SDXL": "sdxl"}

    def shown(share: dict[str, float]) -> str:
        return f"{share['share']:.2f} ({share['low']:.2f}–{share['high']:.2f})"

    rows = table("demo.md", "| method | rank |")
    assert [row[0] for row in rows] == [f"{family}, {name}" for family in families for name in names]
    for row, *cells in rows:
        family, name = row.split(", ")
        of = results(f"benchmarks/results/demo_merge_{families[family]}.json")[names[name]]
        rates, alone, merged = of["learning rates"], of["style alone"], of["merge"]
        best = max(merged, key=lambda pair: merged[pair]["both"]["share"])
        assert cells == [
            str(of["rank"]),
            f"{rates['content']:g} / {rates['style']:g}",
            shown(of["content alone"]["content"]),
            f"{shown(alone['style'])} / {shown(alone['content'])}",
            shown(of["content with known styles"]["both"]),
            f"{shown(merged[best]['both'])} at {best}",
        ], row


def test_the_times_of_a_step_are_what_was_measured():
    measured = results("benchmarks/results/step_time_cpu.json")["rows"]
    rows = table("benchmarks.md", "| method | / PEFT LoRA |")
    assert len(rows) == len(measured)
    for row, *cells in rows:
        of = measured[{"frozen base": "base", "PEFT LoRA": "peft"}.get(row, row)]
        low, high = of["quartiles"]
        ratios = [f"{of['ratio_to_peft']:.3f}", f"{low:.3f}–{high:.3f}", f"{of['ratio_to_base']:.3f}"]
        assert cells == [*ratios, f"{of['trained_parameters']:,}"], row


def test_the_times_of_a_basis_are_what_was_measured():
    measured = results("benchmarks/results/decomposition.json")["rows"]
    rows = table("benchmarks.md", "| W | method | CPU-s |")
    assert len(rows) == len(measured)
    for (_, _, seconds, ratio, angle, memory), of in zip(rows, measured, strict=True):
        told = [float(number) for number in re.findall(r"[\d.]+", seconds)]
        times = of["cpu_s"]
        assert told == pytest.approx([median(times), min(times), max(times)], rel=0.01)
        assert ratio == (f"{of['cpu_ratio']:.1f}× less" if "cpu_ratio" in of else "")
        assert (float(angle), float(memory)) == pytest.approx((of["sin_max"], of["memory"]), rel=0.02)


def test_the_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[1](#a-b-c) [2](#b) [3](none.md) [4](https://example.org/none)\n")
    assert dead(page) == ["#b", "none.md"]
    text = "accelerate launch a.py --one 1 \\\n  --two [--three]  # why\n# A=1 python b.py x\n"
    assert list(commands(text)) == [("a.py", ["--one", "1", "--two", "--three"]), ("b.py", ["x"])]
