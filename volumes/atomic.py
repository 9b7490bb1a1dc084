"""Files that are written whole or not at all, and by one process at a time."""

import contextlib
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKED = (BlockingIOError, PermissionError)  # which of them is raised depends on the system
LOCKED_BYTE = 2**20  # of a lock file, on Windows: behind the text, which others could not read


@contextlib.contextmanager
def replacing(path):
    """A path to write to in this context; the file takes the name `path` when that ends well.

    A temporary file beside it, fsync, rename, fsync of the folder: whatever stops the process or
    the machine, `path` is the file that was there before or the new one. An error leaves the old
    one and no other.
    """
    path = Path(path)
    make_folder(path.parent)
    # Readers go by the suffix. Processes of two machines may have one number.
    process = f"{socket.gethostname()}_{os.getpid()}"
    partial = path.with_name(f".partial_{process}_{path.name}")
    try:
        yield partial
        with open(partial, "r+b" if os.name == "nt" else "rb") as file:  # Windows wants the former
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder):
    """Make a folder, and those above it, so that they survive a power cut."""
    folder = Path(folder)
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder):
    """Make renames in a folder survive a power cut."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder):
    """Remove what a process that was killed had begun to write in a folder."""
    for path in Path(folder).glob(".partial_*"):
        path.unlink(missing_ok=True)


def try_lock(file):
    """Whether this process now holds the lock of a file; True where there are no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except LOCKED:
        return False
    except (OSError, ImportError):
        pass
    return True
