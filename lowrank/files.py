"""Files that are whole or absent, and texts of a bounded size.

Every write goes to a temporary name, is flushed, and is then renamed. What a killed process leaves is removed
by the next run in the folder (`remove_leftovers`). Texts, JSON and TOML are read by one function each, which
bounds what it accepts, because the files may come from strangers.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowrank.errors import Refused

try:
    import tomllib  # pyright: ignore[reportMissingImports]  # checked as Python 3.10, which has none
except ModuleNotFoundError:  # Python 3.10; `toml` misreads some quoted brackets, so it comes second
    import toml as tomllib

TEXT = 16 << 20  # bytes of a text file, unless its kind has another limit
CONFIG = 1 << 20  # bytes of a TOML or JSON file of settings
MODEL_JSON = 128 << 20  # bytes of a JSON file of a model; vocabularies have up to 40 MB
TOKENIZER_BITS = 128  # transformers writes a length without limit as int(1e30)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(path: str | os.PathLike) -> Path:
    """Where the folder `path` is filled until it is whole; one name, since all processes of a run fill it."""
    path = Path(path)
    return path.with_name(f".{path.name}.part")


# a file that is being written: its name, the machine's number, the process, and a random number
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{4})-(\d+)-[0-9a-f]{4}\.part")


def _temporary(path: Path) -> Path:
    """A new name beside `path`, by which `remove_leftovers` knows the process."""
    stem = os.fsdecode(os.fsencode(path.name)[:220])  # file systems take names of 255 bytes
    return path.with_name(f".{stem}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:4]}.part")


def _machine() -> str:
    """A number that differs between machines that share a disk."""
    return f"{zlib.crc32(platform.node().encode()) & 0xFFFF:04x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def remove_leftovers(folder: str | os.PathLike, locked: bool = False) -> None:
    """Remove what killed processes left in a folder: files half-written, and folders if it is `locked`.

    A file that another live process is writing stays, and so does one of another machine. Folders are written
    by runs only, which lock their output folder. A folder that was being replaced gets its name back if the
    newer one is missing.
    """
    with contextlib.suppress(OSError):  # e.g. the folder does not exist
        for path in sorted(Path(folder).iterdir()):
            if match := _TEMPORARY.fullmatch(path.name):
                machine, process = match[1], int(match[2])
                if machine == _machine() and (process == os.getpid() or not _is_alive(process)):
                    path.unlink(missing_ok=True)
            elif locked and path.is_dir() and re.fullmatch(r"\..+\.(part|old|gone)", path.name):
                whole = path.with_name(path.name[1:].removesuffix(".old"))
                if path.suffix == ".old" and not whole.exists():
                    os.replace(path, whole)
                else:
                    shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or a folder. A folder is renamed first, so that a kill leaves no half of it there."""
    if path.is_dir() and not path.is_symlink():
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(path: Path, part: Path, remove: Callable[[Path], object]) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error may be that of the folder itself
            remove(part)
        # safetensors and torch.save wrap a full disk in errors of their own
        wrapped = type(error).__name__ == "SafetensorError" or any(
            words in str(error) for words in ("inline_container", "iostream error")
        )
        if isinstance(error, OSError) or wrapped:
            # copying a folder collects (from, to, why) of every file
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
            raise Refused(
                f"could not write {path}: {reason}; nothing was changed there, free space or "
                "permissions and run again, or choose another folder"
            ) from error
        raise


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any failure it is removed.

    Raises `Refused` when the disk is full or the folder is not writable; an older `path` is then untouched.
    """
    path = Path(path)
    with _replacing(path, _temporary(path), lambda part: part.unlink(missing_ok=True)) as part:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors 0.8 writes files that only their owner can read
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """As `atomic`, for a folder of files; an older one is replaced only once the new one is whole."""
    path = Path(path)
    with _replacing(path, part_of(path), lambda part: shutil.rmtree(part, ignore_errors=True)) as part:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        probe = part / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors 0.8 writes files that only their owner can read
                _sync(file)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
        _sync(path.parent)


@contextlib.contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path in a hidden folder beside `path` for a file, or a folder of files, that is checked there.

    On success the files are moved to `path`; on any failure they are removed and `path` stays as it was.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.check")
    with _replacing(path, folder, lambda part: shutil.rmtree(part, ignore_errors=True)) as part:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        made = part / path.name
        yield made
        files = [file for file in sorted(made.rglob("*")) if file.is_file()] if made.is_dir() else [made]
        for file in files:
            target = path / file.relative_to(made) if made.is_dir() else path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(part, ignore_errors=True)


def existing_file(path: str | os.PathLike, way_out: str = "check the path") -> Path:
    """The path, if a file is there. Raises `Refused`."""
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long or a folder closed
        raise Refused(f"{path} does not exist or is not a file; {way_out}")
    return Path(path)


def existing_folder(path: str | os.PathLike, option: str) -> Path:
    """The path of a folder of images. Raises `Refused` naming `option` where there is none."""
    path = Path(path)
    if not os.path.isdir(path):
        missing = not os.path.exists(path)
        what = f"does not exist (seen from {Path.cwd()})" if missing else "is a file, not a folder"
        raise Refused(f"{option} {path} {what}; give the folder that holds the images")
    return path


def writable_folder(path: str | os.PathLike, option: str = "--output_dir") -> Path:
    """The folder, made if need be, after a file could be written in it. Raises `Refused` naming `option`."""
    folder = Path(path)
    try:
        if not str(path):
            raise FileNotFoundError("the path is empty")
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / "writable")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Refused(f"{option} {path} cannot be written to ({error}); name another folder") from error
    return folder


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. Raises `Refused` while another run holds the lock.

    The system drops the lock when its process ends, however it ends. The lock file is removed while it is
    locked. That is safe because filelock does not accept a lock on a file that was removed from its path.
    """
    file = folder / ".lock"
    try:
        lock = FileLock(file).acquire(timeout=0.2, poll_interval=0.05)
    except Timeout as error:
        raise Refused(f"another run is writing to {folder}; wait for it or name another folder") from error
    except OSError as error:
        raise Refused(f"{folder} cannot be locked ({error}); name a folder on a local disk") from error
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises `UnicodeDecodeError` for other bytes.
    """
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig")


def sha256(path: str | os.PathLike, first: int | None = None) -> str:
    """Hex SHA-256 of a file's bytes, or of the `first` of them."""
    with open(path, "rb") as file:
        if first is not None:
            return hashlib.sha256(file.read(first)).hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(
    path: str | os.PathLike,
    name: str,
    limit: int = TEXT,
    way_out: str = "correct the path",
    utf16: bool = False,
) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes, with newlines as in text mode.

    With `utf16` a file may also be in UTF-16 with a byte order mark, as Windows' editors write it.
    `name` goes before the path in messages. Raises `Refused` for a file that is missing, unreadable, too
    large or in another encoding, and for a folder, a device or a pipe, which could be endless.
    """
    try:
        # without O_NONBLOCK, opening a pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise Refused(f"{name} {path} is not a regular file; {way_out}")
            data = b"" if facts.st_size > limit else file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, Refused):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        missing = f"does not exist (seen from {Path.cwd()})" if isinstance(error, FileNotFoundError) else ""
        raise Refused(f"{name} {path} {missing or f'cannot be read ({reason})'}; {way_out}") from error
    if facts.st_size > limit or len(data) > limit:
        raise Refused(f"{name} {path} has more than {limit:,} bytes, the limit for such a file; {way_out}")
    try:
        text = decoded(data) if utf16 else data.decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        kinds = "neither UTF-8 nor UTF-16" if utf16 else "not UTF-8"
        raise Refused(
            f"{name} {path} is {kinds} (byte {error.start}: {error.reason}); save it as UTF-8, or {way_out}"
        ) from error


def parse_toml(text: str, where: str | os.PathLike) -> dict[str, Any]:
    """A TOML document as a dict. Raises `Refused` naming `where` it came from."""
    try:
        # the time to read a key grows with the square of its number of dots
        if any(key.count(".") > 1000 for key in re.findall(r"[^\s=,\[\]{}]+", re.sub(r"[ \t]+", "", text))):
            raise ValueError("a key has more than 1000 parts")
        return _bounded(tomllib.loads(text))
    except (ValueError, IndexError, RecursionError) as error:  # toml 0.10 leaks IndexError
        raise Refused(f"{where} is not TOML: {_reason(error)}; correct the file") from error


def parse_json(
    text: str | bytes,
    where: str | os.PathLike,
    hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    bits: int = 64,
) -> Any:
    """A JSON document; `hook` makes each object. Raises `Refused` naming `where` it came from.

    `bits` is the limit for whole numbers (`TOKENIZER_BITS` for a model's files).
    """
    try:
        return _bounded(json.loads(text, object_pairs_hook=hook), bits)
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{where} is not JSON: {_reason(error)}; correct the file") from error


def read_json(
    path: str | os.PathLike,
    name: str,
    limit: int = CONFIG,
    way_out: str = "correct the file",
    bits: int = 64,
) -> Any:
    """The JSON document in a file, with the limits of `read_text` and `parse_json`. Raises `Refused`."""
    return parse_json(read_text(path, name, limit, way_out), f"{name} {path}", bits=bits)


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _bounded(tree: Any, bits: int = 64) -> Any:
    """The tree. Raises ValueError where it is nested over 64 levels deep or a number has over `bits` bits."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > 64:
            raise ValueError("it is nested over 64 levels deep")
        if any(isinstance(value, int) and value.bit_length() > bits for value in level):
            raise ValueError(f"a whole number in it has over {bits} bits")
        tables = [
            value.values() if isinstance(value, dict) else value
            for value in level
            if isinstance(value, (dict, list))
        ]
        level = [value for table in tables for value in table]
    return tree


def cache_folder(name: str) -> Path:
    """Where content-addressed caches are: `$LOWRANK_CACHE`/name, or `~/.cache/lowrank`/name."""
    return Path(os.environ.get("LOWRANK_CACHE") or Path.home() / ".cache" / "lowrank") / name
