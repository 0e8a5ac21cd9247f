"""The folder in which an export writes until its bundle is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hivtp.engines.bundle import MANIFEST_NAME
from hivtp.engines.files import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGING_PREFIX = ".hivtp-partial-"
_OWNER = "owner.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Of a staging folder that lies in its destination.
INSIDE = "."


class StagingFolder:
    """A new folder of this process, on the file system of its destination.

    Its owner holds a lock on a file in it while it lives, so that another export can tell whether it is dead, in
    whatever container it runs. The file names the destination once the lock is held.

    Args:
        parent: where to make it.
        destination: what it is for.

    Attributes:
        path: the folder.
        bundle: where the bundle is written; after it has been exchanged with an old one, the old one.
        replaced: where the old one waits while the new one is put in place, on systems that cannot exchange them.
        complete: a file that says that `bundle` is whole and is being put in place.
    """

    def __init__(self, parent: Path, destination: Path) -> None:
        self._set_paths(Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent)))
        self._lock: int | None = None
        try:
            self._lock = os.open(self.path / _OWNER, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            name = INSIDE if parent == destination else destination.name
            if _lock(self._lock, waits=True):
                owner = {"destination": name, "boot": _boot_id()}
                os.write(self._lock, json.dumps(owner).encode())
            self.bundle.mkdir()
        except BaseException:
            self.remove()
            raise

    @classmethod
    def of_dead(cls, path: Path, name: str) -> Self | None:
        """A folder that another process left for a destination when it was killed; None where that is not sure."""
        try:
            lock = os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        if _lock(lock, waits=False):
            with contextlib.suppress(ValueError, OSError):
                owner = parse_json(os.read(lock, 2**16))
                if owner == {"destination": name, "boot": _boot_id()}:
                    folder = cls.__new__(cls)
                    folder._set_paths(path)
                    folder._lock = lock
                    return folder
                if isinstance(owner, dict) and owner.get("destination") == name:
                    warnings.warn(
                        f"{path} was left by an export that did not end, perhaps on another machine; delete it if none "
                        "is running",
                        stacklevel=2,
                    )
        os.close(lock)
        return None

    def contents(self) -> Iterator[Path]:
        """The bundle's files and folders, the manifest last: without it they are not a bundle."""
        return iter(sorted(self.bundle.iterdir(), key=lambda entry: (entry.name == MANIFEST_NAME, entry.name)))

    def remove(self) -> bool:
        """Delete it; the lock goes last, so that what could not be deleted is still recognised."""
        with contextlib.suppress(OSError):
            self.complete.unlink()
        for folder in (self.bundle, self.replaced, self.path):
            shutil.rmtree(folder, ignore_errors=True)
        self.release()
        return not self.path.exists()

    def release(self) -> None:
        """Leave it where it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _set_paths(self, path: Path) -> None:
        self.path = path
        self.bundle, self.replaced, self.complete = (path / name for name in ("bundle", "replaced", "complete"))


def _lock(descriptor: int, *, waits: bool) -> bool:
    """Lock a file; False where another process holds the lock, or the file system knows none."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            return False
        raise
    return True


def _boot_id() -> str:
    """Tells this machine, since it was started, from others; all containers on it share it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
