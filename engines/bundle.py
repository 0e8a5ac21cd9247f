"""The bundle: a folder of graphs and settings, with a manifest that says what each file is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import MAX_JSON_BYTES, parse_json, read_regular
from hivtp.engines.manifest import PROCESSOR_FOLDER
from hivtp.engines.manifest_reader import read_manifest
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.engines.manifest import FileRecord, Manifest

MANIFEST_NAME = "manifest.json"
# Plans belong to a machine and not to the bundle: each has a sidecar with its own hash, and is trusted by other means.
PLANS_FOLDER = "vision/plans"
MAX_MANIFEST_BYTES = 2**22
# Of the settings of a processor: image_processor.json, and prompt.json with its chat template.
MAX_SETTINGS_BYTES = 2**22


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, check_hashes: bool = False) -> Bundle:
        """Open a bundle after checking its schema, and that every file is there, inside, and of the right size.

        A bundle is data, and it may come from a stranger. Nothing outside its folder is read; where the folder is a
        snapshot in the cache of the Hugging Face hub, its files may be links to the cache's blobs.

        Args:
            folder: the bundle.
            check_hashes: also read every file and compare its sha256, and refuse files beside the graphs that the
                manifest does not list. That finds damage; it does not tell who wrote the manifest.

        Raises:
            BundleError: what is wrong, and what to do.
        """
        if not isinstance(folder, str | os.PathLike):
            raise BundleError(f"a bundle is a folder's path, not a {type(folder).__name__}")
        folder = Path(folder)
        try:
            bundle = cls(folder, read_manifest(_read_manifest_file(folder)))
            bundle._check_files(check_hashes=check_hashes)
        except (BundleError, OSError, ValueError) as error:
            raise BundleError(f"cannot open the bundle {folder}: {_reason(error)}") from error
        return bundle

    @property
    def processor_folder(self) -> Path:
        """Where tokenizer, chat template and image preprocessing lie."""
        return self.folder / PROCESSOR_FOLDER

    @property
    def vision_file(self) -> Path:
        """The vision graph."""
        return self.folder / self.manifest.vision.file

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of the processor folder.

        Raises:
            BundleError: the file is missing or damaged.
        """
        file = self.processor_folder / name
        try:
            content = parse_json(read_regular(file, MAX_SETTINGS_BYTES))
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {file}: {_reason(error)}; copy or export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{file} is not a JSON object; copy or export the bundle again")
        return content

    def check_inside(self, name: str) -> None:
        """Refuse a path relative to the bundle that leads out of it when links are followed.

        Raises:
            BundleError: it does.
        """
        _check_inside(self.folder, name)

    def _check_files(self, *, check_hashes: bool) -> None:
        for name, record in self.manifest.files.items():
            self._check_file(name, record)
            if check_hashes and sha256_of(self.folder / name) != record.sha256:
                raise BundleError(
                    f"{name} was altered: its sha256 differs from the manifest's; copy or export the bundle again"
                )
        # It is written to when a plan is built.
        self.check_inside(PLANS_FOLDER)
        if check_hashes:
            self._check_unlisted()

    def _check_file(self, name: str, record: FileRecord) -> None:
        file = self.folder / name
        self.check_inside(name)
        if not file.is_file():
            found = "is not a regular file" if file.exists() else "is missing"
            raise BundleError(f"{name} {found}; copy or export the bundle again")
        num_bytes = file.stat().st_size
        if num_bytes != record.num_bytes:
            raise BundleError(
                f"{name} has {num_bytes} bytes instead of {record.num_bytes}: it is truncated or altered; copy or "
                "export the bundle again"
            )
        if name.startswith(f"{PROCESSOR_FOLDER}/") and num_bytes > MAX_JSON_BYTES:
            raise BundleError(f"{name} has {num_bytes} bytes, and {MAX_JSON_BYTES} are allowed")

    def _check_unlisted(self) -> None:
        """Refuse files that the manifest does not list: a graph may read its weights from them."""
        for name in self._found_files():
            if name not in self.manifest.files:
                raise BundleError(
                    f"it holds {name}, which its manifest does not list; delete it, or copy or export the bundle again"
                )

    def _found_files(self) -> Iterator[str]:
        """What lies in the folders of the manifest's files and below, plans left out."""
        names = self.manifest.files
        folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}
        # A file beside the manifest makes the whole bundle its folder.
        tops = {folder.partition("/")[0] for folder in folders} if all("/" in name for name in names) else {"."}
        for top in sorted(tops):
            for path, subfolders, files in os.walk(self.folder / top):
                place = PurePosixPath(Path(path).relative_to(self.folder).as_posix())
                for subfolder in sorted(subfolders):
                    name = (place / subfolder).as_posix()
                    # A walk does not enter linked folders, and a graph may.
                    if (self.folder / name).is_symlink() and name not in folders:
                        yield name
                    if name == PLANS_FOLDER:
                        subfolders.remove(subfolder)
                for file in sorted(files):
                    name = (place / file).as_posix()
                    if name != MANIFEST_NAME:
                        yield name


def _read_manifest_file(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError("it is not a folder; give the folder that hivtp export wrote")
    if not (folder / MANIFEST_NAME).exists():
        raise BundleError(f"it has no {MANIFEST_NAME}; give the folder that hivtp export wrote")
    _check_inside(folder, MANIFEST_NAME)
    try:
        return read_regular(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(f"its {MANIFEST_NAME} cannot be read: {_reason(error)}") from error


def _check_inside(folder: Path, name: str) -> None:
    root = Path(os.path.realpath(folder))
    roots = [root]
    # The cache of the Hugging Face hub: models--owner--name/snapshots/revision, whose files link to blobs.
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    place = Path(os.path.realpath(folder / name))
    if not any(place.is_relative_to(allowed) for allowed in roots):
        raise BundleError(f"{name} is a link that leads out of the bundle; do not use it")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
