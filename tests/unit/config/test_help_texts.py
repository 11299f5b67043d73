"""Every option's help text is understood alone: found with grep, or in one row of docs/flags.md."""

from __future__ import annotations

import re

import pytest

from lowrank.config.context import CALC_CONTEXT
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.merge import INFERENCE_MERGE
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.config.tools import (
    EXPORT,
    EXTRACT_BASIS,
    EXTRACT_LORA,
    IMPORT,
    INSPECT,
    SAVE_RESIDUAL,
    VISUALIZE_SIMILARITY,
)

COMMAND_LINES = (
    *(SD_TRAIN, SDXL_TRAIN, FLUX_TRAIN, CALC_CONTEXT),
    *(EXTRACT_BASIS, EXTRACT_LORA, INFERENCE_MERGE, SAVE_RESIDUAL, VISUALIZE_SIMILARITY),
    *(EXPORT, IMPORT, INSPECT),
)
# Beginnings that need another text to be understood, and words that this project does not use for programs.
DEPENDENT = re.compile(
    r"^(the same|likewise|of (that|it|them)\b|its |their |it |they |those|them\b|keep them|make them|"
    r"how many of them|as (--|in |above)|first of the|second of the|these)|the flag before|given likewise"
)
RIDDLES = re.compile(r"\b(told|said|says|minds|likewise|nobody|of that|of itself)\b")


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: line.prog)
def test_help_text_stands_alone(line):
    for name, spec in line.specs.items():
        text = spec.flag.help
        assert text and not DEPENDENT.search(text), f"--{name}: {text!r} needs another text beside it"
        assert not RIDDLES.search(text), f"--{name}: {text!r} is not plain English"
        assert not text.endswith("."), f"--{name}: {text!r} is a phrase and has no full stop"


@pytest.mark.parametrize(
    "text", ["the same for states", "its learning rate", "as --x, for y", "how many of them"]
)
def test_dependent_help_text_is_recognised(text):
    assert DEPENDENT.search(text)
