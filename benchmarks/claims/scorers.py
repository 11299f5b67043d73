"""Scorers: which content, style or words a picture shows.

`Judge` is the classifier of the glyph world. `Nearest` compares embeddings of CLIP or DINO: the content of a
picture is right if its nearest reference among all subjects is the wanted one, and the style in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims.world import FolderWorld
from lowrank.errors import Refused
from tools.glyph_world import scorer

DEMO = Path(__file__).resolve().parents[2] / "assets/demo/scorer"


class Judge:
    """The ResNet of the glyph world, trained on all contents and styles."""

    reads_words = True

    def __init__(self, folder: Path = DEMO) -> None:
        self._model = scorer.load(folder)

    def _right(self, pictures: np.ndarray, kind: str, name: str) -> np.ndarray:
        return scorer.read(self._model, pictures)[kind][0] == scorer.LABELS[kind].index(name)

    def content(self, pictures: np.ndarray, name: str) -> np.ndarray:
        """Return for each picture (N, H, W, 3) whether it shows this content."""
        return self._right(pictures, "content", name)

    def style(self, pictures: np.ndarray, name: str) -> np.ndarray:
        """Return for each picture whether it has this style."""
        return self._right(pictures, "style", name)

    def words(self, pictures: np.ndarray, words: str, _all: Sequence[str]) -> np.ndarray:
        """Return for each picture whether it has the style that "in … style" names."""
        return self.style(pictures, words.removeprefix("in ").removesuffix(" style"))


class Nearest:
    """Embeddings of a local CLIP or DINO folder, compared with the references of a `FolderWorld`."""

    def __init__(self, kind: str, folder: Path, world: FolderWorld) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise Refused(f"--scorer_path {folder} has no config.json; give a local folder of transformers")
        self.reads_words = kind == "clip"
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._tokenizer: Any = (
            AutoTokenizer.from_pretrained(folder, local_files_only=True) if self.reads_words else None
        )
        self._references = {
            part: {name: self._embed(world.pictures(part, name)).mean(0) for name in names}
            for part, names in (("c", world.contents), ("s", world.styles))
        }

    @torch.no_grad()
    def _embed(self, pictures: np.ndarray) -> Tensor:
        """Return unit vectors (N, D) of pictures."""
        inputs = self._processor(images=list(pictures), return_tensors="pt")
        if self.reads_words:
            out = self._model.get_image_features(**inputs)
        else:
            out = self._model(**inputs)
        return torch.nn.functional.normalize(_vector(out).float(), dim=-1)

    def _right(self, pictures: np.ndarray, part: str, name: str) -> np.ndarray:
        names = list(self._references[part])
        references = torch.nn.functional.normalize(torch.stack(list(self._references[part].values())), dim=-1)
        nearest = (self._embed(pictures) @ references.T).argmax(1)
        return (nearest == names.index(name)).numpy()

    def content(self, pictures: np.ndarray, name: str) -> np.ndarray:
        """Return for each picture (N, H, W, 3) whether this subject is its nearest."""
        return self._right(pictures, "c", name)

    def style(self, pictures: np.ndarray, name: str) -> np.ndarray:
        """Return for each picture whether this style is its nearest."""
        return self._right(pictures, "s", name)

    @torch.no_grad()
    def words(self, pictures: np.ndarray, words: str, every: Sequence[str]) -> np.ndarray:
        """Return for each picture whether these words are the nearest. Raises `Refused` for DINO."""
        if self._tokenizer is None:
            raise Refused("DINO reads no text, so it cannot score a prompt; use --scorer clip for this claim")
        tokens = self._tokenizer(list(every), padding=True, return_tensors="pt")
        texts = _vector(self._model.get_text_features(**tokens)).float()
        nearest = (self._embed(pictures) @ torch.nn.functional.normalize(texts, dim=-1).T).argmax(1)
        return (nearest == list(every).index(words)).numpy()


def _vector(out: Any) -> Tensor:
    """One vector for each sample of what a model of transformers returns."""
    if isinstance(out, Tensor):
        return out
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state[:, 0] if pooled is None else pooled
