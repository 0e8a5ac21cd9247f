"""Language backends: embeddings in, token ids out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.engines.base import EngineSettings
from hivtp.runtime.language.base import LanguageBackend
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.bundle import LanguageManifest

__all__ = ["LanguageBackend", "create_language"]


def create_language(
    name: str, folder: Path, manifest: LanguageManifest, settings: EngineSettings | None = None
) -> LanguageBackend:
    """Open the decoder of a bundle in a backend.

    Args:
        name: "onnxruntime".
        folder: the bundle's folder.
        manifest: the bundle's decoder.
        settings: how to run it.

    Raises:
        BundleError: the embeddings are damaged.
        EngineError: there is no such backend, or it cannot load the decoder.
        MissingExtraError: the backend's package is not installed.
    """
    if name == "onnxruntime":
        from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage

        return OnnxRuntimeLanguage(folder, manifest, settings or EngineSettings())
    raise EngineError(f"no language backend is named {name!r}; there is onnxruntime")
