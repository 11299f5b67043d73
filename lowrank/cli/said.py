"""What captions say to the model, where adapters may change a text encoder that says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowrank.models.family import Family, Models, align, release


class Said:
    """Captions to conditions: what adapters can change is made at every call, the rest once.

    Of the text encoders those that adapters can train stay in memory where `trains`, as `encoders`.
    """

    def __init__(
        self, family: Family, models: Models, switches: Any, captions: Sequence[str], trains: bool
    ) -> None:
        family.add(models, ("text",))
        align(models)
        captions = list(dict.fromkeys(captions))
        self._held = dict(zip(captions, family.encode_text(models, captions, switches), strict=True))
        self._family, self._models, self._switches = family, models, switches
        self.encoders: list[nn.Module] = []
        if trains:
            self.encoders = family.keep_trained_text(models)
        else:
            release(models, ("text",))

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of a batch of captions; those of trained encoders with gradient."""
        said = self._family.stack_text([self._held[caption] for caption in captions])
        if not self.encoders:
            return said
        return said | self._family.trained_text(self._models, list(captions), self._switches)
