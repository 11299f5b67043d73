"""Write docs/flags.md (every flag of every script) and tests/golden/*_flags.txt (the frozen command lines).

python tools/make_flags.py           write them
python tools/make_flags.py --check   exit 1 when one of them is not what it would write
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lowrank.config.command_line import CommandLine  # noqa: E402
from lowrank.config.context import CALC_CONTEXT  # noqa: E402
from lowrank.config.flag import FlagSpec, shown  # noqa: E402
from lowrank.config.flux import FLUX_TRAIN  # noqa: E402
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN  # noqa: E402
from lowrank.config.tools import EXTRACT_BASIS, INFERENCE_MERGE, SAVE_RESIDUAL, VISUALIZE_SIMILARITY  # noqa: E402

SURFACES = (
    SD_TRAIN,
    SDXL_TRAIN,
    FLUX_TRAIN,
    SAVE_RESIDUAL,
    INFERENCE_MERGE,
    VISUALIZE_SIMILARITY,
    EXTRACT_BASIS,
    CALC_CONTEXT,
)
INTRODUCTION = """# Flags

Written by `tools/make_flags.py`; a test compares it with the code.

- Names on one line are one flag: kohya's first, then those of diffusers' scripts and of the user's documents.
  Two of them with different values are refused; one name given twice takes the last value.
- Unique beginnings are enough: `--network_mod`. A switch is turned off with `--no-…`, also one from a file.
- `key=value` flags take several words: `--network_args rank_dropout=0.1 target=attn`.
- `--config_file run.toml` holds flags as keys, in any sections; the command line wins. Every run writes one.
- An unknown flag or a value of the wrong type ends with exit code 2, anything else to be corrected with 1.
"""


def kind(spec: FlagSpec) -> str:
    """The type of a flag in one word."""
    if spec.flag.choices:
        return " ".join(spec.flag.choices)
    if spec.flag.convert:
        return spec.flag.convert.__name__.replace("_", " ")
    name = {bool: "switch", int: "integer", float: "number", str: "text"}[spec.kind]
    return f"{name}…" if spec.many else name


def default(spec: FlagSpec) -> str:
    """The default as typed; nothing for one that is unset."""
    return "required" if spec.flag.required else shown(spec.default)


def golden(surface: CommandLine) -> str:
    """One line for each flag: names | type | default; then the flags that are ignored and refused."""
    lines = [
        f"{' '.join(spec.names)} | {kind(spec)} | {default(spec)}".rstrip() for spec in surface.specs.values()
    ]
    lines += [f"ignored --{name}" for name in surface.ignored] + [
        f"refused --{name}" for name in surface.refused
    ]
    return "\n".join(sorted(lines)) + "\n"


def table(surface: CommandLine) -> str:
    """A surface as Markdown: a table for each group, then what is ignored and refused."""
    lines, group = [f"\n## {surface.prog}\n\n{surface.description}\n"], None
    for spec in surface.specs.values():
        if spec.group is not group:
            group = spec.group
            title = (group.__doc__ or "").splitlines()[0]
            lines.append(f"\n### {title}\n\n| flag | type | default | meaning |\n|---|---|---|---|\n")
        cells = (" ".join(f"`{name}`" for name in spec.names), kind(spec), default(spec), spec.flag.help)
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |\n"
        )
    if surface.ignored:
        names = ", ".join(f"`--{name}`" for name in sorted(surface.ignored))
        lines.append(f"\n### Accepted without effect on {surface.ignored_by}\n\n{names}\n")
    if surface.refused:
        rows = "".join(f"| `--{name}` | {way_out} |\n" for name, way_out in sorted(surface.refused.items()))
        lines.append(f"\n### Refused\n\n| flag | way out |\n|---|---|\n{rows}")
    return "".join(lines)


def files() -> dict[Path, str]:
    """What this script writes."""
    return {
        ROOT / "docs" / "flags.md": INTRODUCTION + "".join(table(surface) for surface in SURFACES),
        **{
            ROOT / "tests" / "golden" / f"{name}_flags.txt": golden(surface)
            for name, surface in (("flux", FLUX_TRAIN), ("sd", SD_TRAIN), ("sdxl", SDXL_TRAIN))
        },
    }


def main() -> int:
    stale = [
        path
        for path, text in files().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{path} is stale; run python tools/make_flags.py" for path in stale))
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files()[path], encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
