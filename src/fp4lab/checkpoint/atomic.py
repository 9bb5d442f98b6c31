"""Files and folders that appear under their name whole or not at all, whatever kills the writer.

Everything is written under a hidden name beside the final one, `.NAME.*.part`, brought to the disk, then renamed. The writer
holds a lock on what it writes; a part that nobody holds was left by one that was killed, and the next writer of that name
removes it.
"""

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fp4lab.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Gives a path to write; when the block ends well it becomes `path`, else it is gone.

    Raises UserError when `path` exists and `overwrite` is false, or its folder does not exist.
    """
    path = refuse_existing(path, overwrite)
    _clear(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.chmod(name, 0o644)
        yield Path(name)
        os.fsync(handle)
        os.replace(name, path)
        _sync(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def whole_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """The same for a folder. One that is to be replaced changes names with the new one in one step, then is removed."""
    path = refuse_existing(path, overwrite)
    _clear(path)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    handle = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.chmod(0o755)
        yield part
        for file in part.iterdir():
            _sync(file)
        os.fsync(handle)
        if path.exists():
            _exchange(part, path)
        else:
            os.rename(part, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def refuse_existing(path: str | Path, overwrite: bool) -> Path:
    """The absolute path. Raises UserError when something is there that may not be overwritten, or the folder is missing."""
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder {path.parent} does not exist; create it first")
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not empty and not overwrite:
        how = "--overwrite; in a run, task.overwrite=true"
        raise UserError(f"{path} exists already; give another name, remove it, or allow overwriting ({how})")
    return path


def _clear(path: Path) -> None:
    """Removes what killed writers of this name left."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):  # another process may have been quicker
            handle = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step (Linux renameat2). Raises OSError where the file system cannot."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        raise OSError(ctypes.get_errno(), f"cannot exchange {one} and {other}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
