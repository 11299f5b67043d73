"""The documentation: its links, files, flags, commands and figures exist, and its prose is plain."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
from repository import ROOT

from lowrank.cli.resolve import with_network
from lowrank.config.flag import pairs
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.config.tools import EXPORT, EXTRACT_LORA, IMPORT, INSPECT
from lowrank.config.unsupported import IGNORED_BY_FLUX
from lowrank.data import dataset_config
from lowrank.train.network_module import facade_of, find_module
from tools import draw_qr_method
from tools.make_flags import SURFACES, TRAINERS, list_flags

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "assets").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PARSERS = {
    "tools/export_lora.py": EXPORT,
    "tools/import_lora.py": IMPORT,
    "tools/extract_lora.py": EXTRACT_LORA,
    "tools/inspect_lora.py": INSPECT,
}
# flags of other programs, and of the lines of a prompt file, that pages speak of
FOREIGN = {"--check", "--ss", "--network_merge", "--network_pre_calc", "--fp16"}
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]+")

# Words that make a sentence hard to read: a program does not speak, and a bare "of that" points nowhere.
RIDDLES = re.compile(
    r"\b(told|said|says|minds|likewise|nobody|of itself)\b|\bof that(?=\s*(?:[.,;:)]|$))",
    re.IGNORECASE | re.MULTILINE,
)
WORDS, COLUMNS = 35, 150  # of a sentence, and of a line outside tables and code

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
def test_links_resolve(page):
    assert dead(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_in_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    called = re.findall(r"(?:python|bash|launch) ((?:[\w.]+/)*\w+\.(?:py|sh))", text)
    elsewhere = {"train_network.py"}  # docs/kohya.md, in a checkout of sd-scripts
    assert [s for s in called if s not in elsewhere and "NAME" not in s and not (ROOT / s).is_file()] == []


@pytest.mark.skipif(
    not (ROOT / "lowrank" / "naming").is_dir(), reason="pages name the layout with lowrank/naming"
)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_in_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`(lowrank/[\w/.]+)`", text)
    named += [
        module.replace(".", "/") for module in re.findall(r"^from (lowrank[\w.]+) import", text, re.MULTILINE)
    ]
    assert [path for path in named if not ((ROOT / path).exists() or (ROOT / f"{path}.py").is_file())] == []


@pytest.fixture(scope="module")
def flags():
    """Every flag of every script, and those that the small scripts name in their text."""
    parsers = [command.parser() for command in (*SURFACES, *PARSERS.values())]
    known = FOREIGN.union(*(parser._option_string_actions for parser in parsers))
    for file in [*ROOT.glob("*.sh"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        known.update(FLAG.findall(file.read_text(encoding="utf-8")))
    return known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_docs_exist(page, flags):
    assert set(FLAG.findall(page.read_text(encoding="utf-8"))) <= flags


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=name)
def test_commands_in_docs_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    surfaces = {surface.prog: surface for surface in SURFACES}
    for script, words in commands(page.read_text(encoding="utf-8")):
        if script in PARSERS:
            PARSERS[script].parse(words)
        if script not in surfaces or "…" in words:  # … stands for the reader's own flags
            continue
        parsed = surfaces[script].parse([EXAMPLES.get(word, word) for word in words])
        assert not [note for note in parsed.notes if "ignored" in note], words
        if "network_module" in parsed.specs:
            network = with_network(parsed, "networks.lora").options.network
            facade = facade_of(find_module(network.network_module))
            given = pairs("--network_args", network.network_args)
            assert facade is None or set(given) <= set(facade.known), words


def test_pages_are_reachable_from_index():
    seen: set[Path] = set()
    pages = [ROOT / "docs" / "index.md"]
    while pages:
        page = pages.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
            pages += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert {name(page) for page in PAGES} - {
        name(page) for page in seen if page.is_relative_to(ROOT)
    } == set()


def test_index_links_all_pages():
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index.md"} - set(links) == set()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_pages_link_glossary(page):
    text = page.read_text(encoding="utf-8")
    generated = "` writes this page" in text  # by a script, for readers of another page
    assert generated or page.name in ("glossary.md", "versions.md") or "(glossary.md" in text


def test_readmes_link_index():
    for readme in ("README.md", "README-ja.md"):
        assert "(docs/index.md)" in (ROOT / readme).read_text(encoding="utf-8"), readme


def prose(text: str) -> str:
    """A page without its header, its code blocks and its code spans."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "X", text)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page's paragraphs and lists; tables, formulas and headings have none."""
    lines = [line for line in prose(text).splitlines() if not line.startswith(("|", "#", "    "))]
    body = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", body):
        yield from re.split(r"(?<=[.:!?;])\s+", " ".join(paragraph.split()))


def long_lines(text: str) -> list[str]:
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith(("|", "!["))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_has_no_banned_words(page):
    assert [match[0] for match in RIDDLES.finditer(prose(page.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_sentence_and_line_length(page):
    text = page.read_text(encoding="utf-8")
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > WORDS] == []
    assert long_lines(text) == []


def test_flags_page_has_each_training_flag_once():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    training = text.split("\n## inference_merge.py", 1)[0]
    for row in list_flags(TRAINERS):
        assert len(re.findall(rf"^\| `{row.names[0]}`", training, flags=re.MULTILINE)) == 1, row.names[0]


def test_twenty_flags_table():
    flags = [row[0].strip("`") for row in table("twenty_flags.md", "| flag | what it does |")]
    assert len(set(flags)) == 20
    for title in ("SD", "SDXL", "FLUX"):
        known = {alias for spec in TRAINERS[title].specs.values() for alias in spec.names}
        assert set(flags) <= known, title


@pytest.mark.parametrize(
    "script", ["train_network_ABM.py", "sdxl_train_network_ABM.py", "flux_train_qrlora.py"]
)
def test_first_adapter_commands_of_each_family(script):
    text = (ROOT / "docs" / "first_adapter.md").read_text(encoding="utf-8")
    ((_, words),) = [command for command in commands(text) if command[0] == script]
    surfaces = {surface.prog: surface for surface in SURFACES}
    parsed = surfaces[script].parse([*words, "--dry_run"])
    for flag in ("pretrained_model_name_or_path", "train_data_dir", "output_name", "sample_prompts", "seed"):
        assert flag in parsed.given, flag
    assert parsed.notes == ()


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the table in docs/PAGE whose first line begins with HEAD, a list for each line."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text.split(f"\n{head}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(file: str):
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def test_demo_model_table_equals_measurement():
    metrics = results("assets/demo/metrics.json")
    families = {"FLUX": "flux", "SD 1.5": "sd15", "SDXL": "sdxl"}
    rows = table("demo.md", "| | content | style |")
    assert len(rows) == 9
    for row, *cells in rows:
        title, kind = row.split(", ")
        told = metrics[families[title]]["shares"][kind]
        shares = [f"{v['share']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in told.values()]
        assert cells == [*shares, str(told["style"]["n"])], row


def test_demo_merge_table_equals_measurement():
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


def test_step_time_table_equals_measurement():
    measured = results("benchmarks/results/step_time_cpu.json")["rows"]
    rows = table("benchmarks.md", "| method | / PEFT LoRA |")
    assert len(rows) == len(measured)
    for row, *cells in rows:
        of = measured[{"frozen base": "base", "PEFT LoRA": "peft"}.get(row, row)]
        low, high = of["quartiles"]
        ratios = [f"{of['ratio_to_peft']:.3f}", f"{low:.3f}–{high:.3f}", f"{of['ratio_to_base']:.3f}"]
        assert cells == [*ratios, f"{of['trained_parameters']:,}"], row


def test_basis_time_table_equals_measurement():
    measured = results("benchmarks/results/decomposition.json")["rows"]
    rows = table("benchmarks.md", "| W | method | CPU-s |")
    assert len(rows) == len(measured)
    for (_, _, seconds, ratio, angle, memory), of in zip(rows, measured, strict=True):
        told = [float(number) for number in re.findall(r"[\d.]+", seconds)]
        times = of["cpu_s"]
        assert told == pytest.approx([median(times), min(times), max(times)], rel=0.01)
        assert ratio == (f"{of['cpu_ratio']:.1f}× less" if "cpu_ratio" in of else "")
        assert (float(angle), float(memory)) == pytest.approx((of["sin_max"], of["memory"]), rel=0.02)


def test_which_method_steps_equal_measurement():
    measured = results("benchmarks/results/step_time_cpu.json")["rows"]
    lora = measured["lora"]["trained_parameters"]

    def ratio(method: str) -> float:
        """Of a step to that of PEFT's LoRA; DoRA was measured against PEFT's DoRA."""
        rival = measured["peft dora"]["ratio_to_peft"] if method == "dora" else 1.0
        return round(measured[method]["ratio_to_peft"] * rival, 3)

    for methods, ratios, trained in table("which_method.md", "| method | step / PEFT LoRA |"):
        words = [f"tlora {word}" if word == "plain" else word for word in re.findall(r"[a-z_]{4,}", methods)]
        methods = [word for word in words if word in measured]
        numbers = [float(number) for number in re.findall(r"\d\.\d+", ratios)]
        assert numbers == [ratio(method) for method in methods], methods
        share = measured[methods[0]]["trained_parameters"] / lora
        assert float(trained) == pytest.approx(share, abs=0.006), methods


def test_merge_figures_equal_measurement():
    def best(family: str, method: str) -> str:
        merge = results(f"benchmarks/results/demo_merge_{family}.json")[method]["merge"]
        return f"{max(pair['both']['share'] for pair in merge.values()):.2f}".removeprefix("0")

    wins = [
        best(family, method) for family in ("sd15", "sdxl", "flux") for method in ("lora", "delta_r_triu")
    ]
    assert wins == ["1.00", ".41", ".94", ".34", ".56", ".50"]
    for page in ("README.md", "README-ja.md", "docs/which_method.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = [f"{round(100 * float(number))} %" for number in wins]
        assert [share for share in shown if not re.search(rf"(?<![\d.]){share}", text)] == [], page


def test_first_adapter_memory_table():
    """Trained numbers and base weights, from the real models' sizes without their memory."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # pyright: ignore

    from lowrank.adapters.targets import find
    from lowrank.models import blocks

    def sizes(make) -> tuple[int, dict[bool, int]]:
        with torch.device("meta"):
            model = make()
        sides = sum(sum(target.module.weight.shape[:2]) for target in find("unet", model))
        kinds = {False: None, True: "fp8"}
        return sides, {fp8: blocks.base_bytes(model, torch.bfloat16, kind)[0] for fp8, kind in kinds.items()}

    unet = {f: results(f"configs/models/{f}.json")["unet"] for f in ("sd15", "sdxl")}
    known = {
        "SD 1.5": sizes(lambda: UNet2DConditionModel.from_config(unet["sd15"])),
        "SDXL": sizes(lambda: UNet2DConditionModel.from_config(unet["sdxl"])),
        "FLUX.1-dev": sizes(lambda: FluxTransformer2DModel(guidance_embeds=True)),
    }
    rank = 0
    for command, trained, base, adapter, total in table(
        "first_adapter.md", "| command | trained parameters |"
    ):
        sides, weights = known[command.split(",")[0]]
        rank = int(found[1]) if (found := re.search(r"rank (\d+)", command)) else rank
        delta_r = "ΔR" in command
        assert delta_r or int(trained.replace(",", "")) == rank * sides, command
        assert float(base) == pytest.approx(weights["fp8" in command] / 2**30, abs=0.006), command
        assert float(total) == pytest.approx(float(base) + float(adapter), abs=0.011), command


def test_low_memory_tables():
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # pyright: ignore

    from lowrank.models import blocks

    with torch.device("meta"):
        flux: torch.nn.Module = FluxTransformer2DModel(guidance_embeds=True)
        unets = [
            UNet2DConditionModel.from_config(results(f"configs/models/{name}.json")["unet"])
            for name in ("sd15", "sdxl")
        ]
    for kinds, *cells in table("low_memory.md", "| kind | bytes per weight |"):
        for kind in kinds.removeprefix("unset, ").split():
            size = blocks.base_bytes(flux, torch.bfloat16, kind)[0]
            assert float(cells[1]) == pytest.approx(size / 2**30, abs=0.051), kind
    for kind, *cells in table("low_memory.md", "| FLUX.1-dev, GiB on the device |"):
        for count, cell in zip((0, 18, 35), cells, strict=True):
            size = blocks.base_bytes(flux, torch.bfloat16, kind, count)[0]
            assert float(cell) == pytest.approx(size / 2**30, abs=0.051), (kind, count)
    text = (ROOT / "docs" / "low_memory.md").read_text(encoding="utf-8")
    counts = [sum(map(len, blocks.stacks(unet))) for unet in unets]
    assert "SD 1.5 has {} and SDXL {}, and two stay".format(*counts) in text


def test_method_figure_is_current():
    """Pixels differ between versions of FreeType, so the file's record of its script is compared."""
    assert draw_qr_method.drawn_from(draw_qr_method.PICTURE) == draw_qr_method.source_hash()
    assert draw_qr_method.png() == draw_qr_method.png()


def test_docs_checks_detect_mistakes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[1](#a-b-c) [2](#b) [3](none.md) [4](https://example.org/none)\n")
    assert dead(page) == ["#b", "none.md"]
    text = "accelerate launch a.py --one 1 \\\n  --two [--three]  # why\n# A=1 python b.py x\n"
    assert list(commands(text)) == [("a.py", ["--one", "1", "--two", "--three"]), ("b.py", ["x"])]
    text = "A file is told. It learns less\nof that.\n\n```\nsaid\n```\n`said` and of that kind.\n"
    assert [match[0] for match in RIDDLES.finditer(prose(text))] == ["told", "of that"]
    assert list(sentences("# said\n\nOne two. Three\nfour: five\n- six\n\n| seven |\n")) == [
        *("One two.", "Three four:", "five", "- six")
    ]
    assert long_lines("x" * 151 + "\n| " + "x" * 151 + "\n```\n" + "x" * 151 + "\n```\n") == ["x" * 151]


# ---------- kohya


def kohyas_flags(trainer: str) -> dict[str, object]:
    return json.loads((ROOT / "tests/golden/kohya_flags.json").read_text())[trainer]


def differences() -> list[str]:
    """The first cells of the table of differences from kohya's scripts."""
    text = (ROOT / "docs" / "kohya.md").read_text(encoding="utf-8")
    section = text.partition("## Differences from kohya's scripts")[2].partition("\n## ")[0]
    return [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("trainer", ["sd", "sdxl", "flux"])
def test_table_of_differences_from_kohya_is_complete(trainer):
    """Flags that are refused or accepted without effect, and defaults that differ, are in the table."""
    surface = {"sd": SD_TRAIN, "sdxl": SDXL_TRAIN, "flux": FLUX_TRAIN}[trainer]
    specs = {alias[2:]: spec for spec in surface.specs.values() for alias in spec.names}
    equal = {*IGNORED_BY_FLUX.split(), "v2", "clip_skip"}  # without effect there too, or refused there too
    other = {*surface.refused, *surface.accepted, *surface.ignored} - equal
    rows, theirs = differences(), kohyas_flags(trainer)
    listed = {flag[2:] for row in rows for flag in FLAG.findall(row)}
    unset = {flag[2:] for row in rows if "unset" in row for flag in FLAG.findall(row)}
    off = (None, False, 0, [], ())
    # None means these values: INFO, .caption, safetensors
    named = {"console_log_level", "caption_extension", "save_model_as"}
    assert not theirs.keys() - specs.keys() - other - equal
    assert not (theirs.keys() & other) - listed
    different = {
        flag
        for flag, default in theirs.items()
        if flag in specs and specs[flag].default != default and str(specs[flag].default) != str(default)
        if not (specs[flag].default in off and default in off)
    }
    assert not different - named - unset
    assert {"resolution", "network_alpha"} < different  # it finds those that are there


def test_dataset_keys_without_support_are_in_the_pages_of_kohya():
    text = (ROOT / "docs" / "kohya.md").read_text(encoding="utf-8")
    for key in (*dataset_config._WITHOUT_EFFECT, *dataset_config._UNSUPPORTED):
        assert re.search(rf"`(--)?{key}`", text), key
