"""Outputs that appear under their final name only when complete.

Everything is written beside its target, on the same disk, and renamed at the end. An error or an
interrupt removes what was begun; what a killed run left is removed by the next run.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from personae.errors import OutputError

_FULL = "Free some space, or write to another disk."
_FORBIDDEN = "Write to a folder you may write to, or change its permissions."

# Faults that only writing can cause, whichever file is named in them.
_WRITE_ONLY = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: "The disk is read-only; write to another one.",
    errno.EFBIG: "The disk cannot hold a file of this size; write to another one.",
}
_REMEDIES = _WRITE_ONLY | {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: "A part of the path is a file; choose another name.",
    errno.EISDIR: "A directory of that name exists; choose another name.",
    errno.EEXIST: "A file of that name exists; choose another name.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


@contextmanager
def output_errors(
    path: Path, remedies: Mapping[int, str] = _REMEDIES
) -> Generator[None, None, None]:
    """Turn what the system refuses while writing `path` into an error that says what to do.

    Wrap only the writing: a refused *read* inside would be blamed on `path`.

    Raises:
        OutputError: if the disk is full, read-only or forbidden.
        OSError: whatever else the system says, as it is.
    """
    try:
        yield
    except OSError as error:
        remedy = remedies.get(error.errno or 0)
        if remedy is None:
            raise
        found = error.filename
        place = f" ({found})" if found is not None and Path(str(found)) != path else ""
        raise OutputError(f"Cannot write '{path}': {error.strerror}{place}. {remedy}") from error


def require_space(path: Path, nbytes: int) -> None:
    """Check that the disk which holds (or would hold) `path` has `nbytes` bytes free.

    Raises:
        OutputError: if it has fewer.
    """
    path = Path(path).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OutputError(
            f"Cannot write '{path}': it needs {nbytes:,} bytes and the disk has {free:,} free. "
            f"Free {nbytes - free:,} bytes, or write to another disk."
        )


def require_folder(path: Path) -> None:
    """Check that a file could be written at `path`, before what goes into it is computed.

    Raises:
        OutputError: if a folder above it is a file or may not be written to, or `path` is a folder.
    """
    if Path(path).is_dir():
        raise OutputError(f"Cannot write '{path}': it is a folder. Choose another name.")
    require_place(path)


def require_place(path: Path) -> None:
    """Check that something could be made at `path`, before what goes into it is computed.

    Raises:
        OutputError: if a folder above it is a file or may not be written to.
    """
    path = Path(path).absolute()
    existing = next(place for place in path.parents if place.exists())
    if not existing.is_dir():
        raise OutputError(f"Cannot write '{path}': {existing} is a file. Choose another name.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write '{path}': {existing} refuses. {_FORBIDDEN}")


@contextmanager
def atomic_file(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path beside `path`; it becomes `path` if the block succeeds.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    # Named after the process, so that two runs never write into one temporary file.
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def output_directory(
    path: Path, *, overwrite: bool, resumable: bool = False
) -> Generator[Path, None, None]:
    """Yield a temporary directory beside `path`; it becomes `path` if the block succeeds.

    An existing directory is left as it is until the new one is complete, and replaced then.

    Args:
        path: The directory to make. Missing parents are made.
        overwrite: Whether a directory that holds something may be replaced.
        resumable: Whether what an earlier run left in the temporary directory stays there, and
            what this one leaves if it fails; the caller tells finished work from begun.

    Raises:
        OutputError: if `path` exists and may not be replaced, another run is writing it, or
            the disk refuses.
    """
    path = Path(path).resolve()
    partial = path.parent / f".{path.name}.partial"
    replaced = path.parent / f".{path.name}.replaced"
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, path)
    try:
        with output_errors(path):
            _recover(path, replaced)
            _refuse(path, overwrite)
            _empty(partial, ".*.partial" if resumable else "*")
        with output_errors(path, _WRITE_ONLY):
            yield partial
        with output_errors(path):
            _sync_all(partial)
            _swap(partial, path, replaced, overwrite)
    except BaseException:
        if not resumable or not any(partial.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def locked(directory: Path) -> Generator[None, None, None]:
    """Hold an existing directory for changes, against other runs that do the same.

    Raises:
        OutputError: if a living run holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"Another run is changing '{directory}'. Wait for it, then run this again."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _refuse(path: Path, overwrite: bool) -> None:
    """Say before any work what could not be replaced after it.

    Raises:
        OutputError: if `path` is a file, a mount point, or full and not to be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"Cannot write '{path}': it is a file. Choose another name.")
    if path.is_mount():
        raise OutputError(f"Cannot replace '{path}': it is a mount point. Name a folder inside it.")
    if any(path.iterdir()) and not overwrite:
        raise OutputError(f"'{path}' exists and is not empty. Choose another name, or overwrite.")


def _claim(partial: Path, path: Path) -> int:
    """Open the partial directory, locked; the lock of a killed run vanishes with it.

    Raises:
        OutputError: if a living run holds it.
    """
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not os.path.samestat(os.fstat(lock), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        taken = True
    except OSError:  # a file system without locks
        taken = False
    if taken:
        os.close(lock)
        raise OutputError(f"Another run is writing '{path}'. Wait for it, or choose another name.")
    return lock


def _recover(path: Path, replaced: Path) -> None:
    """Undo a swap that was killed half-way: bring the old directory back, or drop it."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _swap(partial: Path, path: Path, replaced: Path, overwrite: bool) -> None:
    """Rename the finished directory to its name; the old one, if any, steps aside first."""
    _refuse(path, overwrite)  # it may have been filled meanwhile
    occupied = path.exists()
    if occupied:
        path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        if occupied:
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(path.parent)


def _empty(directory: Path, pattern: str) -> None:
    """Remove what matches at any depth: everything, or the files `atomic_file` had begun."""
    for place in sorted(directory.rglob(pattern), reverse=True):  # children before parents
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _sync_all(directory: Path) -> None:
    for place in (*directory.rglob("*"), directory):
        if not place.is_symlink():
            _sync(place)


def _sync(path: Path) -> None:
    """Ask the disk to hold a file or directory before a rename relies on it.

    Raises:
        OSError: if a file cannot be brought to disk.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a directory
            raise
    finally:
        os.close(handle)
