"""Language backends: embeddings in, token ids out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.language.base import LanguageBackend
from hivtp.runtime.language.settings import BackendName, LanguageDtype, LanguageSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hivtp.engines.bundle import Bundle

__all__ = ["BackendName", "LanguageBackend", "LanguageDtype", "LanguageSettings", "create_language"]


def create_language(bundle: Bundle, settings: LanguageSettings | None = None) -> LanguageBackend:
    """Open the language model of a bundle in a backend.

    Args:
        bundle: one that can answer.
        settings: which backend, and how to run it.

    Raises:
        BundleError: the embeddings are damaged.
        CheckpointError: the checkpoint is damaged, or is not the one that the bundle was exported from.
        EngineError: the backend cannot load the decoder.
        MissingExtraError: a package of the backend is not installed.
        SettingsError: there is no such device.
    """
    settings = settings or LanguageSettings()
    return _CREATORS[settings.backend](bundle, settings)


def _create_onnxruntime(bundle: Bundle, settings: LanguageSettings) -> LanguageBackend:
    from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage

    assert bundle.manifest.language is not None, "an encoder bundle has no decoder"
    return OnnxRuntimeLanguage(bundle.folder, bundle.manifest.language, settings.engine)


def _create_transformers(bundle: Bundle, settings: LanguageSettings) -> LanguageBackend:
    from hivtp.runtime.language.transformers import TransformersLanguage

    return TransformersLanguage(bundle.manifest, settings)


_CREATORS: Mapping[BackendName, Callable[[Bundle, LanguageSettings], LanguageBackend]] = {
    "onnxruntime": _create_onnxruntime,
    "transformers": _create_transformers,
}
