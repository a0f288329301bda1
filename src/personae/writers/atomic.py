"""Outputs that appear under their final name only when complete.

Everything is written beside its target, on the same disk, and renamed at the end. An error or an
interrupt removes what was begun; what a killed run left is removed by the next run.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from personae.errors import OutputError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE

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
    errno.ENOTDIR: "Part of the path is a file; choose another name.",
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


def free_space(path: Path) -> int:
    """Free bytes of the disk which holds (or would hold) `path`."""
    path = Path(path).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_space(path: Path, nbytes: int) -> None:
    """Check that the disk which holds (or would hold) `path` has `nbytes` bytes free.

    Raises:
        OutputError: if it has fewer.
    """
    free = free_space(path)
    if free < nbytes:
        raise OutputError(
            f"Cannot write '{Path(path).absolute()}': it needs {nbytes:,} bytes and the disk has "
            f"{free:,} free. Free {nbytes - free:,} bytes, or write to another disk."
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
    path: Path, *, overwrite: bool, note: str | None = None
) -> Generator[Path, None, None]:
    """Yield a temporary directory beside `path`; it becomes `path` if the block succeeds.

    See `output_directories`, of which this is the one for one directory.

    Raises:
        OutputError: as there.
    """
    with output_directories([path], overwrite=overwrite, note=note) as (partial,):
        yield partial


@contextmanager
def output_directories(
    paths: Sequence[Path], *, overwrite: bool, note: str | None = None
) -> Generator[list[Path], None, None]:
    """Yield a temporary directory beside each path; all become these if the block succeeds.

    Existing directories are left as they are until the new ones are complete, and replaced then,
    in one step where the system can exchange two names. The renames follow each other at once, but
    a kill may fall between two of them: `finish` does the rest then.

    Args:
        paths: The directories to make. Missing parents are made.
        overwrite: Whether a directory that holds something may be replaced.
        note: Name of the file by which the caller tells, in each directory, finished work from
            begun. What an earlier run left stays there then, and so does what this one leaves
            if it fails. The file goes when all directories have their names.

    Raises:
        OutputError: if a path exists and may not be replaced, another run is writing it, or
            the disk refuses.
    """
    paths = [Path(path).resolve() for path in paths]
    with ExitStack() as stack:
        partials = [stack.enter_context(_partial(path, overwrite, note)) for path in paths]
        yield partials
        for path, partial in zip(paths, partials, strict=True):
            with output_errors(path):
                _sync_all(partial)
                _refuse(path, overwrite)  # it may have been filled meanwhile
        for path, partial in zip(paths, partials, strict=True):
            with output_errors(path):
                _swap(partial, path)
        _end(paths, note)


def finish(runs: Mapping[Path, str], note: str) -> bool:
    """Do what is left of a run that was killed amid its renames, or after them.

    Args:
        runs: Each directory of the run, to the text with which its note begins if it was this very
            run. The text must tell all the directories, so that one note stands for all.
        note: Name of the file that tells its work, as in `output_directories`.

    Returns:
        Whether there was such a run; all its outputs are complete then.

    Raises:
        OutputError: if another run is writing one of them, or the disk refuses.
    """
    texts = {Path(path).resolve(): text for path, text in runs.items()}
    if not any(begins(path / note, text) for path, text in texts.items()):
        return False  # no name was given yet, so nothing tells that all was complete
    due = [path for path, text in texts.items() if begins(_beside(path) / note, text)]
    if not all(path in due or path.exists() for path in texts):
        return False
    with ExitStack() as stack:
        for path in due:
            with output_errors(path):
                stack.callback(os.close, _claim(_beside(path), path))
                _recover(path)
                _swap(_beside(path), path)
        for path in texts:  # what was replaced, if anything
            shutil.rmtree(_beside(path), ignore_errors=True)
            shutil.rmtree(_replaced(path), ignore_errors=True)
        _end(list(texts), note)
    return True


def begins(path: Path, text: str) -> bool:
    """Whether a file is there and begins with this text."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(text.encode())) == text.encode()


@contextmanager
def _partial(path: Path, overwrite: bool, note: str | None) -> Generator[Path, None, None]:
    """Make and hold the directory that will become `path`; whoever leaves with an error clears it.

    Raises:
        OutputError: if `path` may not be replaced, or another run is writing it.
    """
    partial = _beside(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, path)
    try:
        with output_errors(path):
            _recover(path)
            _refuse(path, overwrite)
            clear(partial, ".*.partial" if note else "*")
        with output_errors(path, _WRITE_ONLY):
            yield partial
    except BaseException:
        if partial.is_dir() and not (note and any(partial.iterdir())):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"


def _replaced(path: Path) -> Path:
    return path.parent / f".{path.name}.replaced"


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


def _recover(path: Path) -> None:
    """Undo a swap that was killed half-way: bring the old directory back, or drop it."""
    replaced = _replaced(path)
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _swap(partial: Path, path: Path) -> None:
    """Give the finished directory its name; the old one, if any, makes room in the same moment.

    Where the system cannot exchange two names, the old one steps aside first.
    """
    replaced = _replaced(path)
    if not path.exists():
        partial.rename(path)
    elif _exchange(partial, path):
        partial.rename(replaced)
    else:
        path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            replaced.rename(path)
            raise
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (renameat2); False where system or disk cannot."""
    call: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    return call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _end(paths: Sequence[Path], note: str | None) -> None:
    """Remove the notes, after every rename: what has none is complete."""
    for path in paths if note else ():
        (path / str(note)).unlink(missing_ok=True)


def clear(directory: Path, pattern: str = ".*.partial") -> None:
    """Remove what matches at any depth: everything, or the files `atomic_file` had begun."""
    for place in sorted(directory.rglob(pattern), reverse=True):  # children before parents
        remove(place)


def remove(place: Path) -> None:
    """Remove what is there, if anything: a folder with all in it, a link and not what it names."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)  # rmtree opens what it is given, and waits for a pipe


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
