"""Write docs/flags.md (one row for each flag) and tests/golden/*_flags.txt (the frozen command lines).

python tools/make_flags.py           write them
python tools/make_flags.py --check   exit 1 if a file differs from what this script would write
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lowrank.config.command_line import CommandLine  # noqa: E402
from lowrank.config.context import CALC_CONTEXT  # noqa: E402
from lowrank.config.effects import describe  # noqa: E402
from lowrank.config.flag import FlagSpec, shown  # noqa: E402
from lowrank.config.flux import FLUX_TRAIN  # noqa: E402
from lowrank.config.merge import INFERENCE_MERGE  # noqa: E402
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN  # noqa: E402
from lowrank.config.tools import EXTRACT_BASIS, SAVE_RESIDUAL, VISUALIZE_SIMILARITY  # noqa: E402

TRAINERS = {"SD": SD_TRAIN, "SDXL": SDXL_TRAIN, "FLUX": FLUX_TRAIN, "context": CALC_CONTEXT}
TOOLS = (INFERENCE_MERGE, SAVE_RESIDUAL, VISUALIZE_SIMILARITY, EXTRACT_BASIS)
SURFACES = (*TRAINERS.values(), *TOOLS)

INTRODUCTION = """# Flags

`tools/make_flags.py` writes this page from the declarations of the flags, and a test compares both.
New here? Start with [the twenty flags that matter](twenty_flags.md).

- The last four columns are the default in `train_network_ABM.py` (SD), `sdxl_train_network_ABM.py` (SDXL),
  `flux_train_qrlora.py` (FLUX) and `calc_lalora_context.py` (context).
  An empty cell: the flag is unset or off. `–`: the script has no such flag.
  `ignored`: the script accepts the flag, warns, and does nothing with it. `refused`: the script stops.
- Several names in one cell are aliases of one flag: kohya's name first, then the names of diffusers' scripts.
  Two aliases with different values are refused. One name given twice takes the last value.
- A unique beginning of a name is enough: `--network_mod`.
- `--no-…` turns a switch off, also one that a config file turns on.
- A value of type `text…` takes several words. Flags of the kind `key=value` use it:
  `--network_args rank_dropout=0.1 target=attn`.
- `--config_file run.toml` reads flags as keys of a TOML file, in any sections.
  The command line has precedence. Every run writes such a file, `config.toml`.
- `acts only with …`: a training script prints a line for such a flag if it cannot act in the run.
- An unknown flag or a value of the wrong type ends with exit code 2.
  Every other error that you can correct ends with exit code 1.
"""


class FlagRow(NamedTuple):
    """One flag over several scripts; `defaults` has one text for each script."""

    group: str
    names: tuple[str, ...]
    help: str
    values: str
    defaults: tuple[str, ...]


def kind(spec: FlagSpec) -> str:
    """The type of a flag in one word."""
    if spec.flag.choices:
        return " ".join(spec.flag.choices)
    if spec.flag.convert:
        return spec.flag.convert.__name__.replace("_", " ")
    name = {bool: "switch", int: "integer", float: "number", str: "text"}[spec.kind]
    return f"{name}…" if spec.many else name


def values(spec: FlagSpec) -> str:
    """Type, unit and limits of a flag."""
    flag = spec.flag
    marks = (("≥", flag.low), (">", flag.above), ("≤", flag.high), ("<", flag.below))
    limits = ", ".join(f"{mark} {limit:g}" for mark, limit in marks if limit is not None)
    return " ".join(filter(None, (kind(spec), flag.unit and f"[{flag.unit}]", limits)))


def default(spec: FlagSpec) -> str:
    """The default as typed; empty for a flag that is unset or off."""
    return "required" if spec.flag.required else shown(spec.default)


def list_flags(surfaces: Mapping[str, CommandLine]) -> list[FlagRow]:
    """Every flag of `surfaces` (by title), each once, in the order of the scripts.

    Only this function reads the declarations of flags.
    """
    specs = {title: surface.specs for title, surface in surfaces.items()}
    rows: dict[str, FlagRow] = {}
    for script, flags in specs.items():
        for name, spec in flags.items():
            if name not in rows:
                group = (spec.group.__doc__ or "").splitlines()[0].rstrip(".")
                defaults = tuple(cell(name, specs[title], surface) for title, surface in surfaces.items())
                acting = describe(spec.flag.acts_with)
                meaning = f"{spec.flag.help}; {acting}" if acting else spec.flag.help
                rows[name] = FlagRow(group, spec.names, meaning, values(spec), defaults)
            elif spec.flag.help not in rows[name].help:
                rows[name] = rows[name]._replace(help=f"{rows[name].help}; {script}: {spec.flag.help}")
    return list(rows.values())


def cell(name: str, specs: Mapping[str, FlagSpec], surface: CommandLine) -> str:
    """What a script does with a flag: its default, `ignored`, `refused`, or `–` for an unknown flag."""
    if name in specs:
        return default(specs[name])
    return "ignored" if name in surface.ignored else "refused" if name in surface.refused else "–"


def table(rows: Sequence[FlagRow], columns: Sequence[str], level: str) -> str:
    """Rows as Markdown, a heading and a table for each group of flags."""
    groups: dict[str, list[FlagRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lines = []
    for group, members in groups.items():
        heads = ("flag", "meaning", "values", *columns)
        lines += [f"\n{level} {group}\n\n", f"| {' | '.join(heads)} |\n", "|---" * len(heads) + "|\n"]
        for row in members:
            cells = (" ".join(f"`{name}`" for name in row.names), row.help, row.values, *row.defaults)
            text = " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            lines.append(f"| {text} |\n")
    return "".join(lines)


def unsupported() -> str:
    """What each script ignores, and what it refuses with the way out; without the flags of the tables."""
    known = {name for surface in TRAINERS.values() for name in surface.specs}
    ignored: dict[str, list[str]] = {}
    reasons = {name: why for surface in TRAINERS.values() for name, why in surface.accepted.items()}
    for title, surface in TRAINERS.items():
        for name in {*surface.ignored, *surface.accepted} - known:
            ignored.setdefault(name, []).append(title)
    lines = [
        "\n## Flags of other trainers: ignored\n\nThe script accepts them, warns once, and continues.\n\n",
        "| flag | ignored by | why |\n|---|---|---|\n",
        *(
            f"| `--{name}` | {', '.join(titles)} | {reasons.get(name, '')} |\n"
            for name, titles in sorted(ignored.items())
        ),
        "\n## Flags of other trainers: refused\n\n| flag | refused by | what to do |\n|---|---|---|\n",
    ]
    refused: dict[tuple[str, str], list[str]] = {}
    for title, surface in TRAINERS.items():
        for name, hint in surface.refused.items():
            refused.setdefault((name, hint), []).append(title)
    for (name, hint), titles in sorted(refused.items()):
        lines.append(f"| `--{name}` | {', '.join(titles)} | {hint} |\n")
    return "".join(lines)


def page() -> str:
    """The text of docs/flags.md."""
    lines = [INTRODUCTION, "\n## Training, and measuring a LaLoRA context\n"]
    lines.append(table(list_flags(TRAINERS), tuple(TRAINERS), "###"))
    for surface in TOOLS:
        lines.append(f"\n## {surface.prog}\n\n{surface.description}\n")
        lines.append(table(list_flags({"default": surface}), ("default",), "###"))
    return "".join(lines) + unsupported()


def golden(surface: CommandLine) -> str:
    """One line for each flag: names | type | default; then the flags that are ignored and refused."""
    lines = [
        f"{' '.join(spec.names)} | {kind(spec)} | {default(spec)}".rstrip() for spec in surface.specs.values()
    ]
    lines += [f"ignored --{name}" for name in surface.ignored]
    lines += [f"refused --{name}" for name in surface.refused]
    return "\n".join(sorted(lines)) + "\n"


def files() -> dict[Path, str]:
    """What this script writes: text by path."""
    goldens = {"flux": FLUX_TRAIN, "sd": SD_TRAIN, "sdxl": SDXL_TRAIN}
    folder = ROOT / "tests" / "golden"
    return {
        ROOT / "docs" / "flags.md": page(),
        **{folder / f"{name}_flags.txt": golden(surface) for name, surface in goldens.items()},
    }


def main() -> int:
    """Write the files that are not current, or with --check only name them."""
    stale = {
        path: text
        for path, text in files().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{path} is not current; run python tools/make_flags.py" for path in stale))
        return 1 if stale else 0
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
