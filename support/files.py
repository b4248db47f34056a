"""Files that other processes may read, write or wait for at the same time."""
import contextlib
import os

import filelock


@contextlib.contextmanager
def atomic_write(path):
    """Context: a binary file to write into. It replaces `path` only when it is complete and on
    disk, so a process that is killed leaves either the old file or the new one. The temporary
    file beside it, <name>.<process id>.tmp, is removed on any error, but not by a kill."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locked(path, wait=False):
    """Context: only one process at a time is inside, and its end by any means lets the next one in.

    path: the lock file, whose folder is created. wait=False raises filelock.Timeout where another
    process is inside. On a file system without locks nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(path).acquire(blocking=wait)
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError):
        return contextlib.nullcontext()


def cache_lock(folder):
    """Context: only one process at a time decodes or downloads into `folder`; others wait."""
    path = folder / "decoding.lock"
    try:
        return locked(path)
    except filelock.Timeout:
        print(f"waiting for the process that prepares images in {folder}", flush=True)
        return locked(path, wait=True)
