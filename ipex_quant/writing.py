"""Writing files and directories atomically: after an error or a kill, the old or the new one is there as a whole.

Unfinished ones have a private name beside their target, ``.NAME-<16 digits><12 digits>.tmp``, and a lock while their
writer lives. An error removes them; after a kill, the next writer of the same target does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""Errors of the exchange of two directories on a file system that does not support it."""


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace the file `path` by `content`, text in UTF-8; OSError if it cannot be written."""
    with replaced_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Yield a file to write; it replaces `path` at the end, unless there is an exception."""
    path = Path(path)
    _sweep(path)
    with _unfinished_file(path) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
    _sync(path.parent)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError if a file `path` cannot be written; call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a directory", str(path))
    with _unfinished_file(path):
        pass


@contextmanager
def new_directory(path: str | os.PathLike, argument: str) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes the directory `path` at the end, unless there is an exception.

    Raises ValueError, with the name of the `argument`, if `path` exists and is not empty, at the beginning or at the
    end, or while another process writes it; OSError, at the beginning, if it cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{argument}: {path} exists and is not empty; give another directory or remove it")
    with _workspace(path) as (folder, staging):
        if any(other.name < folder.name for other in _unfinished(path)):
            raise ValueError(f"{argument}: another process is writing {path}; give another directory, or wait for it")
        yield staging
        _sync_all(staging)
        try:
            os.rename(staging, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ValueError(f"{argument}: another process wrote {path} meanwhile; give another directory") from error
        _sync(path.parent)


@contextmanager
def replaced_directory(path: str | os.PathLike, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty directory to fill; it replaces the directory `path` at the end, unless there is an exception.

    Other files in `path` are kept, except for names that match one of the patterns `stale`. Raises OSError if `path` is
    no directory or is a mount point, which cannot be replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a directory, got a file", str(path))
    if path.is_mount():
        raise OSError(errno.EBUSY, "a mount point cannot be replaced as a whole; give a directory in it", str(path))
    with _workspace(path) as (folder, staging):
        yield staging
        if path.is_dir():
            _keep_others(path, staging, stale)
        _sync_all(staging)
        _publish(staging, path, folder / "old")
        _sync(path.parent)


# ---------------------------------------------------------------------------------------------------------- unfinished
def _private_name(path: Path) -> str:
    return f".{path.name}-{time.time_ns():016x}{secrets.token_hex(6)}.tmp"


@contextmanager
def _unfinished_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    while True:
        temporary = path.with_name(_private_name(path))
        # with the permissions of the umask, and never through a link
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _is_mine(temporary, descriptor):
            break
        os.close(descriptor)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _workspace(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a locked directory beside `path`, removed afterwards, and an empty one in it that will become `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    while True:
        folder = path.with_name(_private_name(path))
        folder.mkdir()
        with suppress(FileNotFoundError):  # swept by another writer before it had a lock
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            if _is_mine(folder, descriptor):
                break
            os.close(descriptor)
    try:
        staging = folder / path.name
        staging.mkdir()
        yield folder, staging
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _unfinished(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(f".{path.name}-") + r"[0-9a-f]{28}\.tmp")
    with suppress(FileNotFoundError):
        return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
    return []


def _sweep(path: Path) -> None:
    """Remove unfinished files and directories of killed writers of `path`."""
    for other in _unfinished(path):
        with suppress(OSError):  # of another user, or removed by another process by now
            descriptor = os.open(other, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not _lock(descriptor):
                    continue
                if not other.is_dir():
                    other.unlink()
                    continue
                old = other / "old"
                if old.is_dir() and not path.exists():  # killed between two renames
                    os.rename(old, path)
                shutil.rmtree(other)
            finally:
                os.close(descriptor)


def _is_mine(path: Path, descriptor: int) -> bool:
    """Lock the new file or directory at `path`; False if another writer swept it before."""
    return _lock(descriptor) and path.exists()


def _lock(descriptor: int) -> bool:
    """Take the lock; False if another process has it. True on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


# ----------------------------------------------------------------------------------------------------------- replacing
def _keep_others(path: Path, staging: Path, stale: Collection[str]) -> None:
    """Put the other files of `path` into `staging`, as hard links where possible, except for `stale` ones."""
    for other in path.iterdir():
        target = staging / other.name
        if os.path.lexists(target) or any(other.match(pattern) for pattern in stale):
            continue
        with suppress(FileNotFoundError):  # removed since
            if other.is_symlink() or not other.is_dir():
                _link_or_copy(other, target)
            else:
                shutil.copytree(other, target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _publish(staging: Path, path: Path, old: Path) -> None:
    """Move `staging` to `path`; a directory that was there moves to the workspace."""
    while True:
        try:
            os.rename(staging, path)  # if there is none, or an empty one
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # removed since
            if not _exchange(staging, path):
                os.rename(path, old)
                os.rename(staging, path)
            return


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; False if the system does not support it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync_all(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            if not (file := Path(folder) / name).is_symlink():
                _sync(file)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
