"""Where the weights of a Hugging Face folder lie: which of its files count, and what each of them holds."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hivtp.engines.files import read_json
from hivtp.runtime.checkpoint.weight_names import canonical_name
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# transformers' `variant`, such as fp16, of either.
_VARIANTS = (
    re.compile(r"^model\.([A-Za-z0-9_]+)\.safetensors$"),
    re.compile(r"^model\.safetensors\.index\.(\w+)\.json$"),
)
# How a file begins that `git clone` left without Git LFS.
_LFS_POINTER = b"version https://git-lfs"


class FileStamp(NamedTuple):
    """What changes when a file is written again or exchanged."""

    inode: int
    num_bytes: int
    changed_at_ns: int

    @classmethod
    def of(cls, file: Path) -> FileStamp:
        """The stamp of a file as it is now.

        Raises:
            OSError: it is gone.
        """
        found = file.stat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Location:
    """The place of a weight.

    Attributes:
        file: where it lies.
        name: what it is called there.
        shape: its shape.
        dtype: as safetensors names it, such as "BF16".
        stamp: of the file, when it was opened first.
        num_added_rows: rows that the weight has beyond those of the file: each is the mean of the token embeddings.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    stamp: FileStamp
    num_added_rows: int = 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape with the added rows."""
        return (self.shape[0] + self.num_added_rows, *self.shape[1:]) if self.num_added_rows else self.shape

    def check_unchanged(self) -> None:
        """Refuse a file that is another than the one that was opened first.

        Raises:
            CheckpointError: it was written or exchanged since, or is gone.
        """
        try:
            is_unchanged = FileStamp.of(self.file) == self.stamp
        except OSError as error:
            raise CheckpointError(
                f"{self.file} cannot be read any more ({error.strerror}): it was there when the checkpoint was opened; "
                "start again when nothing else works on that folder"
            ) from error
        if not is_unchanged:
            raise CheckpointError(
                f"{self.file} was changed since the checkpoint was opened, so weights of two states would be mixed; "
                "start again when nothing else writes to that folder"
            )


def locate_weights(folder: Path) -> dict[str, Location]:
    """Read where the weights of a folder lie, by their canonical names.

    Raises:
        CheckpointError: a safetensors file is missing or damaged.
    """
    return by_canonical_name(read_headers(folder))


def by_canonical_name(headers: Iterable[Location]) -> dict[str, Location]:
    """Weights by their canonical names; of two with one name the later counts, as in transformers."""
    named = ((canonical_name(location.name), location) for location in headers)
    return {name: location for name, location in named if name is not None}


def read_headers(folder: Path) -> list[Location]:
    """Every tensor of a folder's weight files, under the name that it has there.

    Raises:
        CheckpointError: a safetensors file is missing or damaged.
    """
    return [location for file in _weight_files(folder) for location in _read_header(file)]


def entry_file(names: Collection[str]) -> str | None:
    """The file, or the index of files, that holds the weights, in the order in which transformers looks.

    A variant such as model.fp16.safetensors counts where there is nothing else; transformers wants its name then.

    Args:
        names: of the files in a folder.

    Raises:
        CheckpointError: there are several variants.
    """
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in names:
            return name
    matches = [(match[1], match[0]) for name in sorted(names) for form in _VARIANTS if (match := form.match(name))]
    variants = sorted({variant for variant, _ in matches})
    if len(variants) > 1:
        raise CheckpointError(
            f"its weights are there as the variants {', '.join(variants)} and as {SINGLE_FILE} they are not; rename "
            f"the files of one of them to {SINGLE_FILE}, or {INDEX_FILE} with its shards"
        )
    return matches[0][1] if matches else None


def shard_names(index_file: Path) -> list[str]:
    """The files that an index names.

    Raises:
        CheckpointError: it is not a valid index.
    """
    try:
        names = set(read_json(index_file)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index_file} is not a valid index of shards: {_reason(error)}") from error
    for name in names:
        if not _is_plain_name(name):
            raise CheckpointError(
                f"{index_file} is not a valid index of shards: it names {name!r}, expected files inside the folder"
            )
    if not names:
        raise CheckpointError(f"{index_file} is not a valid index of shards: it names none")
    return sorted(names)


def _weight_files(folder: Path) -> list[Path]:
    try:
        entry = entry_file([file.name for file in folder.iterdir() if file.is_file()])
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {_reason(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if entry is None:
        raise CheckpointError(f"{folder} holds no weights: it has neither {SINGLE_FILE} nor {INDEX_FILE}")
    if entry.endswith(".safetensors"):
        return [folder / entry]
    names = shard_names(folder / entry)
    missing = [name[:200] for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing)}; download them again"
        )
    return [folder / name for name in names]


def _read_header(file: Path) -> list[Location]:
    from safetensors import SafetensorError, safe_open

    try:
        _check_regular(file)
        stamp = FileStamp.of(file)
        with safe_open(file, framework="np") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  not a mapping
            return [
                Location(file, name, tuple(item.get_shape()), item.get_dtype(), stamp) for name, item in slices.items()
            ]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {_reason(error)}") from error


def _check_regular(file: Path) -> None:
    """Refuse what cannot be mapped, with the system's own reason, which safetensors does not pass on.

    Raises:
        CheckpointError: it is a pointer of Git LFS.
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a pointer of Git LFS, and the weights themselves are not here; run git lfs pull in its "
                "folder, or download the checkpoint with hf download"
            )


def _is_plain_name(name: object) -> bool:
    if not isinstance(name, str) or any(mark in name for mark in "\\\0"):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied; let its owner make it readable"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
