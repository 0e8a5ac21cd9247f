"""The exceptions that hivtp raises on bad input, which all derive from HivtpError, and its warnings."""

from __future__ import annotations


class HivtpError(Exception):
    """Base of every error that a caller can cause and can act on."""


class SpecError(HivtpError, ValueError):
    """A pruning spec that cannot work, or does not fit the grid or the encoder."""


class ScoreError(HivtpError, ValueError):
    """Importance scores of the wrong shape or dtype, or with NaN in them."""


class CheckpointError(HivtpError):
    """A folder that is not a supported checkpoint, or that is incomplete or damaged."""


class CheckpointWarning(UserWarning):
    """Something that a checkpoint asks for and a bundle does not do."""


class VerificationError(HivtpError):
    """A graph that differs from its reference, PyTorch or another engine, by more than its tolerance."""


class BundleError(HivtpError):
    """A bundle that is missing, incomplete, altered, or of another schema."""


class HubError(HivtpError):
    """A repository of the Hugging Face hub that is not there, or cannot be reached or downloaded."""


class ImageError(HivtpError, ValueError):
    """An image that cannot be read or is refused."""


class PromptError(HivtpError, ValueError):
    """A prompt that cannot be turned into a model input."""


class ContextLengthError(PromptError):
    """A prompt that is longer than the context of the model."""


class SettingsError(HivtpError, ValueError):
    """A setting of the wrong type or out of its range."""


class RequestError(HivtpError):
    """A request that failed in a way that nobody foresaw; others are not affected."""


class EngineError(HivtpError):
    """An inference engine that is absent, or that failed on a graph."""


class BackendUnavailableError(EngineError):
    """A server that decodes for us and cannot do so now; the same request may succeed later.

    Args:
        message: what is wrong.
        status: of HTTP: 429 or 503, as the server said, or 503 where it could not be asked.
        retry_after: seconds until the request may succeed, as far as that is known.
    """

    def __init__(self, message: str, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class KernelError(HivtpError):
    """A CUDA kernel that cannot be compiled, loaded or started."""


class EngineWarning(UserWarning):
    """An engine that runs differently than expected: another one, or with less precision."""


class OutOfMemoryError(HivtpError, MemoryError):
    """Memory that ran out for one request; others are not affected."""


class MissingExtraError(HivtpError, ImportError):
    """An optional package that is needed here and not installed.

    Args:
        package: the name to import, e.g. "onnxruntime".
        extra: the extra of hivtp that brings it, e.g. "cpu".
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'hivtp[{extra}]'")
        self.package = package
        self.extra = extra
