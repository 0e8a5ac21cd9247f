"""Language backends: embeddings in, token ids out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from hivtp.runtime.language.base import LanguageBackend
from hivtp.runtime.language.settings import BackendName, LanguageDtype, LanguageSettings
from hivtp_ops.errors import BundleError, EngineWarning, HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hivtp.engines.bundle import Bundle

__all__ = [
    "BackendName",
    "LanguageBackend",
    "LanguageDtype",
    "LanguageSettings",
    "check_backend",
    "create_language",
]


def check_backend(bundle: Bundle, backend: BackendName) -> None:
    """Refuse a bundle that lacks what a backend needs of it, before anything is loaded.

    Raises:
        BundleError: it cannot answer, or leaves the language model to its checkpoint and the backend has none.
    """
    manifest, folder = bundle.manifest, bundle.folder
    if manifest.language is None:
        raise BundleError(
            f"{folder} holds the {manifest.vision.graph} graph alone and cannot answer; export it with --graph vision"
        )
    if backend == "onnxruntime" and manifest.language.decoder is None:
        raise BundleError(
            f"{folder} holds no decoder: it was exported with --language-precision none; answer with "
            f'language="transformers" and the folder of {manifest.source.get("name")!r} as checkpoint '
            "(hivtp-run: --language transformers --checkpoint DIR), or export it again with another "
            "--language-precision"
        )


def create_language(bundle: Bundle, settings: LanguageSettings | None = None) -> LanguageBackend:
    """Open the language model of a bundle in a backend.

    Args:
        bundle: one that `check_backend` lets pass.
        settings: which backend, and how to run it.

    Raises:
        BundleError: the embeddings are damaged.
        CheckpointError: the checkpoint is damaged, or is not the one that the bundle was exported from.
        EngineError: the backend cannot load the decoder, or run it on that device.
        MissingExtraError: a package of the backend is not installed.
        OutOfMemoryError: it does not fit into the memory of the device.
        SettingsError: there is no such device.
    """
    settings = settings or LanguageSettings()
    return _CREATORS[settings.backend](bundle, settings)


def _create_onnxruntime(bundle: Bundle, settings: LanguageSettings) -> LanguageBackend:
    from hivtp.engines.device import DeviceContext
    from hivtp.engines.onnxruntime_cuda import has_cuda_provider
    from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage
    from hivtp.runtime.language.onnxruntime_device import OnnxRuntimeDeviceLanguage

    manifest = bundle.manifest.language
    assert manifest is not None, "check_backend refuses an encoder bundle"
    assert manifest.decoder is not None, "check_backend refuses a bundle without a decoder"
    is_half = manifest.decoder.dtype == "float16"
    if settings.device == "cuda":
        return OnnxRuntimeDeviceLanguage(bundle.folder, manifest, settings.engine)
    if settings.device == "auto" and is_half and has_cuda_provider():
        try:
            return OnnxRuntimeDeviceLanguage(bundle.folder, manifest, settings.engine)
        except HivtpError as error:
            message = f"the decoder of {bundle.folder} cannot run on a GPU, taking the CPU: {error}"
            warnings.warn(message, EngineWarning, stacklevel=2)
    if is_half:
        return OnnxRuntimeDeviceLanguage(bundle.folder, manifest, settings.engine, DeviceContext("cpu"))
    return OnnxRuntimeLanguage(bundle.folder, manifest, settings.engine)


def _create_transformers(bundle: Bundle, settings: LanguageSettings) -> LanguageBackend:
    from hivtp.runtime.language.transformers import TransformersLanguage

    return TransformersLanguage(
        bundle.manifest, replace(settings, device="cpu") if settings.device == "auto" else settings
    )


_CREATORS: Mapping[BackendName, Callable[[Bundle, LanguageSettings], LanguageBackend]] = {
    "onnxruntime": _create_onnxruntime,
    "transformers": _create_transformers,
}
