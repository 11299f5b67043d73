"""Files that are whole or absent: every write goes to a temporary name, is flushed, and is then renamed."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank.errors import Refused

try:
    import tomllib  # pyright: ignore[reportMissingImports]  # checked as Python 3.10, which has none
except ModuleNotFoundError:  # Python 3.10; `toml` misreads some quoted brackets, so it comes second
    import toml as tomllib


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


@contextlib.contextmanager
def _replacing(path: Path, part: Path, remove: Callable[[Path], object]) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error may be that of the folder itself
            remove(part)
        # safetensors and torch.save wrap a full disk in errors of their own
        wrapped = type(error).__name__ == "SafetensorError" or "inline_container" in str(error)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _replacing(path, temporary, lambda part: part.unlink(missing_ok=True)) as part:
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
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else f"does not exist (seen from {Path.cwd()})"
        raise Refused(f"{option} {path} {what}; give the folder that holds the images")
    return path


def writable_folder(path: str | os.PathLike, option: str = "--output_dir") -> Path:
    """The folder, made if need be, after a file could be written in it. Raises `Refused` naming `option`."""
    folder = Path(path)
    try:
        if not str(path):
            raise FileNotFoundError("the path is empty")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
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


def parse_toml(text: str, where: str | os.PathLike) -> dict:
    """A TOML document as a dict. Raises `Refused` naming `where` it came from."""
    try:
        return tomllib.loads(text)
    except (ValueError, IndexError) as error:  # both raise ValueErrors; toml 0.10 leaks IndexError
        raise Refused(f"{where} is not TOML: {error}; correct the file") from error


def cache_folder(name: str) -> Path:
    """Where content-addressed caches are: `$LOWRANK_CACHE`/name, or `~/.cache/lowrank`/name."""
    return Path(os.environ.get("LOWRANK_CACHE") or Path.home() / ".cache" / "lowrank") / name
