"""The adapter files of --base_weights: strengths, hashes, and whether they change text encoders."""

from __future__ import annotations

from lowrank.config.command_line import Parsed
from lowrank.files import sha256
from lowrank.naming.keys import is_text_encoder
from lowrank.tensors import read_names


def base_weights(parsed: Parsed) -> list[tuple[str, float]]:
    """The files of --base_weights and their strengths."""
    files, strengths = parsed.value("base_weights"), parsed.value("base_weights_multiplier")
    return list(zip(files, (*strengths, *[1.0] * len(files)), strict=False))


def merged_hashes(parsed: Parsed) -> list[tuple[str, float]]:
    """What --base_weights change the model by: each file's SHA-256 and its strength."""
    return [(sha256(path), strength) for path, strength in base_weights(parsed)]


def changes_text(parsed: Parsed) -> bool:
    """Whether --base_weights have layers of text encoders, so that captions are encoded after the merge."""
    return any(is_text_encoder(key) for path, _ in base_weights(parsed) for key in read_names(path))
