"""Hostile input for every reader of files and texts that this program has.

A reader gets a case of its strategy and must return, or raise `Refused` or (a command line) exit with a
message. Everything else is a problem: another exception, more than SECONDS or MEMORY for a case, a file
written outside its folder, or code that ran (`Evil` leaves a folder behind).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapter_files import FLUX_KEY, A, B, whole
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as serialize
from safetensors.torch import save_file

from lowrank.adapters.network_module import method_made_by, options_of
from lowrank.bases.basis_file import read_basis
from lowrank.bases.null_space import null_spaces
from lowrank.cli.lycoris_config import translate
from lowrank.config.flags_data import Captions
from lowrank.data import images
from lowrank.data.cache import Cache
from lowrank.data.captions import draw_caption, possible_captions
from lowrank.data.dataset import Example, from_folders, from_metadata
from lowrank.data.dataset_config import from_config
from lowrank.data.scan import scan
from lowrank.errors import Refused
from lowrank.formats.inspect import report
from lowrank.formats.read import read_adapter
from lowrank.laplace.context_file import read_context
from lowrank.models.weighting import weighted
from lowrank.tensors import TensorFile, read_metadata, read_tensors
from lowrank.train.checkpoints import STATE, WEIGHTS, Names, find_checkpoint
from lowrank.train.prompts import Prompt, read_prompts
from lowrank.train.record import begin_record
from tools.make_flags import SURFACES

SECONDS, MEMORY = 10, 1 << 30


class Evil:
    """A pickle of this makes a folder where it is loaded as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


# ------------------------------------------------------------------ pieces

NUMBERS = st.one_of(
    st.sampled_from(
        ["inf", "-inf", "nan", "1e999", "-0", "0x10", "1_000", "²", "٣", "1e-400", "", " ", "1,2"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.integers(1, 6_000).map(lambda count: "9" * count),
    st.floats(allow_nan=True).map(str),
)
PATHS = st.sampled_from(
    ["/dev/zero", "/dev/full", "a" * 300, "a\0b", "..", "/", "~", "a/" * 3_000, "", "con", "\n"]
)
TEXTS = st.one_of(
    NUMBERS, PATHS, st.text(max_size=30), st.sampled_from(["x" * 70_000, "(" * 5_000, "{a|b}", "--w"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
DEEP = st.sampled_from(
    ["[" * 3_000, '{"a":' * 3_000, "[[" * 40 + "]]" * 40, '{"a":1e999}', '{"a":' + "9" * 5_000 + "}"]
)


def json_texts(known: Any) -> st.SearchStrategy[str]:
    """JSON of any kind, and objects whose keys are `known`."""
    objects = st.dictionaries(st.sampled_from(sorted(known)), JSON, max_size=5)
    return st.one_of(DEEP, st.one_of(objects, st.lists(objects, max_size=2), JSON).map(json.dumps))


def toml_texts(known: Any, tables: tuple[str, ...] = ("[a]",)) -> st.SearchStrategy[str]:
    """Lines of TOML with keys that are `known`, and lines that are none."""
    values = st.one_of(
        JSON.map(json.dumps),
        NUMBERS,
        st.sampled_from(["[" * 3_000, "{a=" * 3_000, "1979-05-27", "'''x", '"\\u0000"']),
    )
    line = st.one_of(
        st.tuples(st.sampled_from(sorted(known)), values).map(" = ".join),
        st.sampled_from([*tables, "a." * 20_000 + "b = 1", "=", "\0", "\ud7ff", "a b = 1"]),
        TEXTS,
    )
    return st.lists(line, max_size=8).map("\n".join)


def mutated(whole_bytes: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of a sound file with a few changed, cut, repeated or put in."""

    def change(data: bytes, edits: list[tuple[int, int, int]]) -> bytes:
        changed = bytearray(data)
        for kind, at, value in edits:
            place = at % max(1, len(changed))
            if kind == 0 and changed:
                changed[place] = value
            elif kind == 1:
                del changed[place:]
            elif kind == 2:
                changed[place:place] = bytes([value]) * (at % 50)
            elif kind == 3:
                del changed[place : place + value]
        return bytes(changed)

    edit = st.tuples(st.integers(0, 3), st.integers(0, 2**20), st.integers(0, 255))
    return st.builds(change, st.sampled_from(whole_bytes), st.lists(edit, min_size=0, max_size=4))


# ------------------------------------------------------------------ files of tensors

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
)
SHAPES = st.sampled_from(
    [(), (0,), (1,), (2,), (64,), (2, 64), (64, 2), (0, 64), (2, 64, 1, 1), (64, 2, 1, 1), (1, 1, 1)]
)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    SHAPES,
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30]),
)
ROLES = (
    *(
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
        "dora_scale",
        "lora_A.weight",
        "lora_B.weight",
        "lora_mid.weight",
    ),
    *(
        "q_layer.weight",
        "p_layer.weight",
        "lambda_layer",
        "base_q",
        "base_p",
        "base_lambda",
        "router",
        "core",
    ),
    *(
        "lora.q.weight",
        "lora.base_r.weight",
        "lora.delta_r.weight",
        "basis_up",
        "basis_down",
        "hada_w1_a",
        "diff",
    ),
)
MODULES = (
    A,
    B,
    FLUX_KEY,
    "transformer.single_transformer_blocks.0.attn.to_q",
    "lora_te1_text_model",
    "",
    "..",
    "x" * 9_000,
)
METADATA = st.dictionaries(
    st.sampled_from(
        [
            *(
                "lowrank.method",
                "lowrank.options",
                "lowrank.kind",
                "lowrank.curvature",
                "lowrank.null",
                "tlora_T",
            ),
            *("tlora_min_rank", "tlora_max_rank", "tlora_alpha", "ss_network_module", "ss_network_args"),
            *("lora_adapter_metadata", "lycoris_config", "lowrank.basis_hash", "lowrank.base_hash", "key"),
        ]
    ),
    st.one_of(
        TEXTS.filter(lambda text: "\ud7ff" not in text),
        json_texts(
            ("algo", "r", "lora_alpha", "unet.lora_alpha", "alpha_pattern", "tlora_alpha", "num_experts")
        ),
        st.sampled_from(
            ["tlora", "effilora", "qrlora", "evil", "os", "lalora_context", "kfac", "basis", "1", "-1"]
        ),
    ),
    max_size=3,
)


@dataclass(frozen=True)
class Tensors:
    """A file of tensors: a sound adapter, some of its tensors replaced or left out, others put in."""

    state: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def save(self, path: Path) -> Path:
        save_file({key: value.clone() for key, value in self.state.items()}, path, self.metadata)
        return path

    def __repr__(self) -> str:
        shapes = {
            key[-60:]: (tuple(x.shape), str(x.dtype)[6:], x.flatten()[:1].tolist())
            for key, x in self.state.items()
        }
        return f"{shapes} {self.metadata!r:.300}"


def tensor_files(sound: list[dict[str, torch.Tensor]], roles: tuple[str, ...]) -> st.SearchStrategy[Tensors]:
    def make(
        state: dict, changed: dict[int, torch.Tensor], gone: set[int], added: dict, metadata: dict
    ) -> Tensors:
        names = sorted(state)
        state = dict(state)
        for index, value in changed.items():
            state[names[index % len(names)]] = value
        for index in gone:
            state.pop(names[index % len(names)], None)
        state |= {f"{module}.{role}": value for (module, role), value in added.items()}
        return Tensors(state, metadata)

    keys = st.tuples(st.sampled_from(MODULES), st.sampled_from(roles))
    return st.builds(
        make,
        st.sampled_from(sound),
        st.dictionaries(st.integers(0, 9), TENSORS, max_size=2),
        st.sets(st.integers(0, 9), max_size=2),
        st.dictionaries(keys, TENSORS, max_size=3),
        METADATA,
    )


def _pair(name: str, roles: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
    return {f"{name}.{role}": torch.ones(shape) for role, shape in zip(roles, shapes, strict=True)}


ADAPTERS = [
    whole(A) | whole(B),
    whole(FLUX_KEY),
    _pair(A, ("q_layer.weight", "p_layer.weight", "lambda_layer"), ((2, 64), (64, 2), (2,))),
    _pair(A, ("lora.q.weight", "lora.base_r.weight", "lora.delta_r.weight"), ((64, 2), (2, 64), (2, 64))),
    whole(A) | {f"{A}.dora_scale": torch.ones(64, 1, 1, 1)},
]
CONTEXT = _pair(A, ("S_diag", "G_diag", "W_probe"), ((64,), (64,), (8,)))
CONTEXT_ROLES = (
    "S_vec",
    "S_val",
    "S_diag",
    "G_vec",
    "G_val",
    "G_diag",
    "W_probe",
    "alpha_mean",
    "alpha_precision",
)
BASIS_ROLES = (
    *("left", "right", "left_values", "right_values", "lora_down.weight.basis", "lora_up.weight.basis"),
    *("lora_down.weight.mean", "lora_up.weight.mean"),
)
ROW = _pair(A, BASIS_ROLES[4:6], ((64, 2), (64, 2)))
NATIVE = _pair(A, BASIS_ROLES[:4], ((64, 2), (2, 64), (2,), (2,)))


# ------------------------------------------------------------------ readers


@dataclass(frozen=True)
class Reader:
    """A strategy, and a function that reads one case in an empty folder."""

    cases: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    share: float = 1.0  # of the cases: a command line takes longer than others


def _text(name: str, read: Callable[[Path], object]) -> Callable[[Any, Path], object]:
    """A reader of a file with a text or bytes in it."""

    def run(case: str | bytes, folder: Path) -> object:
        data = case if isinstance(case, bytes) else case.encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(data)
        return read(folder / name)

    return run


def _saved(read: Callable[[Path], object]) -> Callable[[Tensors, Path], object]:
    return lambda case, folder: read(case.save(folder / "x.safetensors"))


def _picture(folder: Path, name: str = "0.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(folder / name)
    return folder / name


def _adapter(path: Path) -> None:
    for strict in (True, False):
        with contextlib.suppress(Refused):
            read_adapter(path, strict=strict)
    metadata = read_metadata(path)
    options_of(metadata, "x")
    method_made_by(metadata, "x")


def _command_line(case: tuple[int, list[str]], folder: Path) -> None:
    index, words = case
    SURFACES[index % len(SURFACES)].parse(words)


def _flags(index: int) -> list[str]:
    return [name for spec in SURFACES[index].specs.values() for name in spec.names]


def _command_lines(index: int) -> st.SearchStrategy[tuple[int, list[str]]]:
    word = st.one_of(st.sampled_from(_flags(index)), TEXTS)
    return st.tuples(st.just(index), st.lists(word, max_size=8))


def _config(path: Path) -> None:
    surface = SURFACES[path.stat().st_size % 3]
    surface.parse(["--config_file", str(path)])


def _dataset_config(path: Path) -> None:
    _picture(path.parent / "img")
    for dataset in from_config(path, {"resolution": (64, 64)}):
        scan(dataset)


def _metadata_file(path: Path) -> None:
    _picture(path.parent)
    (dataset,) = from_metadata(str(path), str(path.parent), resolution=(64, 64))
    scan(dataset)


def _caption(path: Path) -> None:
    _picture(path.parent)
    for wildcard in (False, True):
        options = {"resolution": (64, 64), "caption_extension": ".txt", "enable_wildcard": wildcard}
        (dataset,) = from_folders(path.parent.parent, **options)
        for example in scan(dataset):
            draw_caption(example, dataset.subsets[0].captions, _random(), epoch=0)


def _random() -> Any:
    import random

    return random.Random(0)


def _draw(case: tuple[str, dict[str, Any]], folder: Path) -> None:
    text, given = case
    options = Captions(**given)
    example = Example(Path("x.png"), (text,), (64, 64), 1, False, 0, None)
    for step in (0, 3):
        draw_caption(example, options, _random(), epoch=1, step=step, max_train_steps=10)
    possible_captions(example, options)


def _state(case: tuple[str, bytes], folder: Path) -> None:
    text, weights = case
    place = folder / "checkpoint-2"
    place.mkdir()
    (place / STATE).write_text(text, encoding="utf-8", errors="replace")
    for name in (WEIGHTS, "optimizer.bin"):
        (place / name).write_bytes(weights)
    find_checkpoint("latest", folder)


def _record(case: tuple[str, str], folder: Path) -> None:
    from lowrank.train.log import RunLog

    class One:
        """An accelerator of one process, as far as the log asks."""

        is_main_process = True

    config, losses = case
    (folder / "config.toml").write_text(config, encoding="utf-8", errors="replace")
    (folder / "loss.csv").write_text(losses, encoding="utf-8", errors="replace")
    log: Any = RunLog(One(), folder, ("mse",), 10, 5)  # pyright: ignore[reportArgumentType]
    log.begin(3)
    log._bar.close()
    begin_record(Names(folder, "cat"), "x = 1\n", "y", resumed=False)


def _image(path: Path) -> None:
    with contextlib.suppress(Refused):
        images.header(path)
    images.read_image(path)


def _cached(path: Path) -> None:
    path.rename(path.with_name("k.safetensors"))
    Cache(path.parent).missing(["k"])


def _picture_bytes() -> list[bytes]:
    found = []
    for kind, more in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("BMP", {})):
        for orientation in (1, 6, 9):
            file, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = orientation
            extra = {} if kind == "BMP" else {"exif": exif}
            Image.effect_noise((24, 16), 90).convert("RGB").save(file, kind, **extra, **more)
            found.append(file.getvalue())
    return found


def _pickles(folder: Path) -> list[bytes]:
    found = []
    for content in (whole(A), {"state_dict": whole(A)}, [1], {**whole(A), "x": Evil(folder / "canary")}):
        file = io.BytesIO()
        torch.save(content, file)
        found.append(file.getvalue())
    return [*found, pickle.dumps(Evil(folder / "canary")), pickle.dumps({"a": 1})]


_CAPTIONS = st.tuples(
    st.one_of(TEXTS, st.text("{}|,()[]:\\ab", max_size=200)),
    st.fixed_dictionaries(
        {},
        optional={
            "enable_wildcard": st.booleans(),
            "shuffle_caption": st.booleans(),
            "keep_tokens": st.integers(0, 9),
            "caption_separator": st.sampled_from([",", ";", " ", "||"]),
            "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5, 1.0]),
            "secondary_separator": st.sampled_from([None, ";", ",,"]),
            "token_warmup_step": st.sampled_from([0.0, 0.5, 5.0]),
        },
    ),
)
_PROMPT = Prompt("")
_PROMPT_KEYS = (
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "sample_steps",
    "scale",
    "seed",
    "enum",
    "subset",
)
_DATASET_KEYS = (
    *(
        "general",
        "datasets",
        "subsets",
        "image_dir",
        "resolution",
        "batch_size",
        "num_repeats",
        "keep_tokens",
    ),
    *("metadata_file", "caption_extension", "enable_bucket", "is_reg", "min_bucket_reso", "flip_aug"),
)
_DATASET_TABLES = (
    "[general]",
    "[[datasets]]",
    "[[datasets.subsets]]",
    'image_dir = "img"',
    "resolution = 64",
)
_META_KEYS = ("0.png", "0", "/dev/zero", "../x.png", "a" * 300 + ".png", "caption", "tags", "image_path")
_LYCORIS_KEYS = (
    "algo",
    "linear_dim",
    "linear_alpha",
    "multiplier",
    "apply_preset",
    "lycoris_config",
    "bypass_mode",
)
_STATE_KEYS = ("current_step", "current_epoch", "position", "run", "files", "seed")


def _sound_state(folder_bytes: bytes) -> str:
    import hashlib

    digest = hashlib.sha256(folder_bytes).hexdigest()
    facts = {"current_step": 2, "current_epoch": 0, "position": 2, "run": {"seed": 0}}
    return json.dumps(facts | {"files": {WEIGHTS: digest, "optimizer.bin": digest}})


def readers(work: Path) -> dict[str, Reader]:
    """Every reader by name."""
    sound = [serialize(state, {"lowrank.method": "lora"}) for state in ADAPTERS]
    lines = st.lists(
        st.one_of(TEXTS, st.builds(lambda a, b: f"x --{a} {b}", st.sampled_from("nwhdslg"), TEXTS))
    )
    config_keys = [name[2:] for name in _flags(0)]
    table = json_texts(_META_KEYS)
    found = {
        **{
            f"command line {surface.prog}": Reader(_command_lines(i), _command_line, 0.4)
            for i, surface in enumerate(SURFACES)
        },
        "config file": Reader(toml_texts(config_keys), _text("x.toml", _config), 0.5),
        "dataset config TOML": Reader(
            toml_texts(_DATASET_KEYS, _DATASET_TABLES), _text("x.toml", _dataset_config)
        ),
        "dataset config JSON": Reader(json_texts(_DATASET_KEYS), _text("x.json", _dataset_config)),
        "metadata file": Reader(table, _text("x.json", _metadata_file)),
        "metadata lines": Reader(
            st.lists(table, max_size=3).map("\n".join), _text("x.jsonl", _metadata_file)
        ),
        "caption file": Reader(st.one_of(st.binary(max_size=200), TEXTS), lambda c, f: _in_folder(c, f)),
        "captions": Reader(_CAPTIONS, _draw),
        "caption weights": Reader(st.text("()[]:\\.1a ", max_size=400), lambda case, _: weighted(case)),
        "prompts": Reader(lines.map("\n".join), _text("x.txt", lambda path: read_prompts(path, _PROMPT))),
        "prompts TOML": Reader(
            toml_texts(_PROMPT_KEYS, ("[prompt]", "[[prompt.subset]]")),
            _text("x.toml", lambda path: read_prompts(path, _PROMPT)),
        ),
        "prompts JSON": Reader(
            json_texts(_PROMPT_KEYS), _text("x.json", lambda path: read_prompts(path, _PROMPT))
        ),
        "LyCORIS config": Reader(json_texts(_LYCORIS_KEYS), _text("x.json", translate)),
        "adapter": Reader(tensor_files(ADAPTERS, ROLES), _saved(_adapter)),
        "adapter report": Reader(tensor_files(ADAPTERS, ROLES), _saved(report)),
        "safetensors bytes": Reader(mutated(sound), _text("x.safetensors", _bytes)),
        "pickles": Reader(mutated(_pickles(work)), _text("x.pt", read_tensors)),
        "basis": Reader(tensor_files([ROW, NATIVE], BASIS_ROLES), _saved(read_basis)),
        "basis with its hash": Reader(tensor_files([NATIVE], BASIS_ROLES), _hashed_basis),
        "context": Reader(tensor_files([CONTEXT], CONTEXT_ROLES), _context),
        "null spaces": Reader(tensor_files([ROW], ("null_up", "null_down")), _null_spaces),
        "cache entry": Reader(st.one_of(mutated(sound)), _text("x.safetensors", _cached)),
        "state": Reader(
            st.tuples(st.one_of(json_texts(_STATE_KEYS), st.just(_sound_state(b"x"))), st.just(b"x")), _state
        ),
        "records": Reader(st.tuples(toml_texts(("output_name",)), _LOSSES), _record),
        "images": Reader(mutated(_picture_bytes()), _text("x.png", _image)),
    }
    return found


_LOSSES = st.lists(
    st.one_of(
        TEXTS, st.lists(NUMBERS, max_size=10).map(",".join), st.just("step,epoch,lr,loss,avr_loss,mse")
    ),
    max_size=6,
).map("\n".join)


def _in_folder(case: str | bytes, folder: Path) -> None:
    (folder / "2_cat").mkdir()
    _text("0.txt", _caption)(case, folder / "2_cat")


def _bytes(path: Path) -> None:
    with contextlib.suppress(Refused):
        TensorFile(path)
    _adapter(path)


def _context(case: Tensors, folder: Path) -> None:
    facts = {"lowrank.kind": "lalora_context", "lowrank.curvature": "diag"}
    read_context(Tensors(case.state, facts | case.metadata).save(folder / "x.safetensors"))


def _hashed_basis(case: Tensors, folder: Path) -> None:
    from lowrank.bases.basis_file import _hash

    facts = {"lowrank.kind": "basis", "lowrank.basis_kind": "x"} | case.metadata
    if all(value.dtype == torch.float32 for value in case.state.values()):
        facts["lowrank.basis_hash"] = _hash(case.state)
    read_basis(Tensors(case.state, facts).save(folder / "x.safetensors"))


def _null_spaces(case: Tensors, folder: Path) -> None:
    path = case.save(folder / "x.safetensors")
    null_spaces({A: torch.eye(8)}, {A: 2}, path)


# ------------------------------------------------------------------ running cases


class Hang(BaseException):
    """A case took longer than SECONDS."""


@dataclass
class Watch:
    """What one reader's cases did: their number, problems, the slowest, the largest growth of memory."""

    work: Path
    cases: int = 0
    slowest: float = 0.0
    memory: int = 0
    outside: list[str] = field(default_factory=list)
    reading: bool = False

    def run(self, reader: Reader, case: Any) -> None:
        """One case; raises what a reader must not raise."""
        folder = self.work / "case"
        if not folder.exists() or os.listdir(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.cases += 1
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        self.reading = True
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # torch warns of pickles of newer protocols
                reader.read(case, folder)
        except Refused as refused:
            assert "\n" not in str(refused).strip() or len(str(refused)) < 2_000, "a message is too long"
        except SystemExit as left:
            assert left.code in (0, 2), f"exit code {left.code}"
        finally:
            self.reading = False
        self.slowest = max(self.slowest, time.process_time() - begin)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        self.memory = max(self.memory, grown)
        assert grown < MEMORY, f"memory grew by {grown:,} bytes"
        assert not (self.work / "canary").exists(), "code from a file ran"
        assert not self.outside, f"written outside the folder: {self.outside}"


@contextlib.contextmanager
def watching(work: Path) -> Iterator[Watch]:
    """Limit time and memory, note writes outside `work`; the limits end with the block."""
    watch = Watch(work)

    def hook(event: str, arguments: tuple) -> None:
        if watch.reading and event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = os.fsdecode(arguments[0]), arguments[1] or "", arguments[2]
            writes = any(letter in mode for letter in "wax+") or (
                isinstance(flags, int) and flags & os.O_CREAT
            )
            inside = os.path.abspath(path).startswith((str(work), "/dev/null"))
            if writes and not inside and "__pycache__" not in path:
                watch.outside.append(path)

    def expired(*_: Any) -> None:
        raise Hang

    sys.addaudithook(hook)
    before = signal.signal(signal.SIGALRM, expired)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY, limit[1]))
    try:
        yield watch
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def attack(name: str, reader: Reader, watch: Watch, cases: int, number: int) -> str | None:
    """Give `cases` cases to a reader; the smallest case that is a problem, or None."""
    last: list[Any] = []

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(case=reader.cases)
    def run(case: Any) -> None:
        last[:] = [case]
        signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS)  # of a busy machine; CPU time is measured in `run`
        try:
            watch.run(reader, case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        run()
    except (Hang, Exception) as error:
        watch.outside.clear()
        shutil.rmtree(watch.work / "canary", ignore_errors=True)
        return f"{name}: {type(error).__name__}: {str(error)[:300]} at {_where(error)}: {repr(last[0])[:600]}"
    return None


def _where(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "lowrank" in file or "networks" in file:
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def campaign(seed: int, cases: int, work: Path) -> dict[str, Any]:
    """Share `cases` among all readers; counts and problems, ready for JSON."""
    work.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    counts: dict[str, int] = {}
    begin = time.monotonic()
    with watching(work.resolve()) as watch:
        chosen = readers(watch.work)
        shares = sum(reader.share for reader in chosen.values())
        for name, reader in chosen.items():
            before = watch.cases
            problem = attack(name, reader, watch, round(cases * reader.share / shares), seed)
            problems += [problem] if problem else []
            counts[name] = watch.cases - before
    return {
        "seed": seed,
        "cases": watch.cases,
        "readers": counts,
        "problems": problems,
        "slowest": round(watch.slowest, 2),
        "memory": watch.memory,
        "seconds": round(time.monotonic() - begin, 1),
    }
