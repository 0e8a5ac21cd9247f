"""Language backends: embeddings in, logits out; and the scheduler that drives them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hivtp.runtime.language.options import LanguageOptions
from hivtp.runtime.language.remote import RemoteBackend
from hivtp.runtime.language.scheduler import Scheduler
from hivtp_ops.errors import BundleError, EngineWarning, HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hivtp.engines.base import Device
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.manifest import DecoderManifest, LanguageManifest
    from hivtp.runtime.language.base import LanguageBackend
    from hivtp.runtime.language.options import BackendName
    from hivtp.runtime.language.remote import RequestScheduler
    from hivtp.runtime.language.scheduler import SchedulerOptions

__all__ = ["LanguageOptions", "RemoteBackend", "create_language", "open_scheduler"]


def create_language(bundle: Bundle, options: LanguageOptions) -> LanguageBackend | RemoteBackend:
    """Open the language model of a bundle in a backend.

    Args:
        bundle: an opened bundle.
        options: which backend, and how to run it.

    Raises:
        BundleError: the bundle lacks what the backend needs of it, or its embeddings are damaged.
        CheckpointError: the checkpoint is damaged, or is not the one that the bundle was exported from.
        EngineError: the backend cannot load the decoder, or run it on that device.
        MissingExtraError: a package of the backend is not installed.
        OutOfMemoryError: it does not fit into the memory of the device.
        SettingsError: there is no such device.
    """
    manifest = bundle.manifest
    if manifest.language is None:
        raise BundleError(
            f"{bundle.folder} holds the {manifest.vision.graph} graph alone and cannot answer; "
            "export it with --graph vision"
        )
    return _CREATORS[options.backend](bundle, options)


def open_scheduler(language: LanguageBackend | RemoteBackend, options: SchedulerOptions) -> RequestScheduler:
    """A scheduler that decodes with a backend.

    Args:
        language: decodes.
        options: how; of these a remote backend knows the number of slots alone.

    Raises:
        EngineError: the backend is closed.
        OutOfMemoryError: there is no memory for the slots.
    """
    if isinstance(language, RemoteBackend):
        return language.open_scheduler(options.num_slots)
    return Scheduler(language, options)


def _create_onnxruntime(bundle: Bundle, options: LanguageOptions) -> LanguageBackend:
    from hivtp.engines.onnxruntime_cuda import has_cuda_provider
    from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage

    manifest, decoder = _with_decoder(bundle)

    def create(device: Device) -> LanguageBackend:
        return OnnxRuntimeLanguage(bundle.folder, manifest, options.engine_settings, device)

    if options.device == "cuda":
        return create("cuda")
    if options.device == "auto" and decoder.dtype == "float16" and has_cuda_provider():
        try:
            return create("cuda")
        except HivtpError as error:
            message = f"the decoder of {bundle.folder} cannot run on a GPU, taking the CPU: {error}"
            warnings.warn(message, EngineWarning, stacklevel=2)
    return create("cpu")


def _create_openvino(bundle: Bundle, options: LanguageOptions) -> LanguageBackend:
    from hivtp.runtime.language.openvino import OpenVinoLanguage

    _ = _with_decoder(bundle)
    return OpenVinoLanguage(bundle, options.engine_settings)


def _with_decoder(bundle: Bundle) -> tuple[LanguageManifest, DecoderManifest]:
    """The language model of a bundle, and its decoder.

    Raises:
        BundleError: the bundle holds no decoder.
    """
    manifest = bundle.manifest.language
    if manifest is None or manifest.decoder is None:
        raise BundleError(
            f"{bundle.folder} holds no decoder: it was exported with --language-precision none; answer with "
            f'LanguageOptions("transformers", checkpoint=...) and the folder of {bundle.manifest.source.name!r} '
            "(hivtp run: --language-backend transformers --language-checkpoint DIR), or export it again with another "
            "--language-precision"
        )
    return manifest, manifest.decoder


def _create_transformers(bundle: Bundle, options: LanguageOptions) -> LanguageBackend:
    from hivtp.runtime.language.transformers import TransformersLanguage

    return TransformersLanguage(bundle.manifest, options)


def _create_vllm(bundle: Bundle, options: LanguageOptions) -> RemoteBackend:
    from hivtp.runtime.language.vllm.backend import VllmLanguage

    assert bundle.manifest.language is not None, "refused above"
    return VllmLanguage(bundle.manifest.language, options)


# What a creator needs is imported when it is called.
_CREATORS: Mapping[BackendName, Callable[[Bundle, LanguageOptions], LanguageBackend | RemoteBackend]] = {
    "onnxruntime": _create_onnxruntime,
    "openvino": _create_openvino,
    "transformers": _create_transformers,
    "vllm": _create_vllm,
}
