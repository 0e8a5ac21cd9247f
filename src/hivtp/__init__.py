"""hivtp: export and serve LLaVA-class models with HIVTP visual token pruning inside the graph."""

from __future__ import annotations

# As typing has it. Importing that takes longer than all else here, and a command starts with this module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hivtp.runtime.answer import Answer, Timings
    from hivtp.runtime.answer_stream import AnswerStream
    from hivtp.runtime.chat import Chat
    from hivtp.runtime.inputs.messages import ImagePart, Message
    from hivtp.runtime.language.options import LanguageOptions
    from hivtp.runtime.language.sampling import SamplingParams
    from hivtp.runtime.pipeline import Pipeline
    from hivtp.runtime.request import Request
    from hivtp.runtime.vision.options import VisionOptions
    from hivtp_ops import PruningSpec
    from hivtp_ops.errors import HivtpError

__all__ = [
    "Answer",
    "AnswerStream",
    "Chat",
    "HivtpError",
    "ImagePart",
    "LanguageOptions",
    "Message",
    "Pipeline",
    "PruningSpec",
    "Request",
    "SamplingParams",
    "Timings",
    "VisionOptions",
]

# Where each public name lives. It is imported when it is asked for, so that a command loads
# what it uses, and `import hivtp` not even numpy.
_HOMES = {
    "Answer": "hivtp.runtime.answer",
    "AnswerStream": "hivtp.runtime.answer_stream",
    "Chat": "hivtp.runtime.chat",
    "HivtpError": "hivtp_ops.errors",
    "ImagePart": "hivtp.runtime.inputs.messages",
    "LanguageOptions": "hivtp.runtime.language.options",
    "Message": "hivtp.runtime.inputs.messages",
    "Pipeline": "hivtp.runtime.pipeline",
    "PruningSpec": "hivtp_ops",
    "Request": "hivtp.runtime.request",
    "SamplingParams": "hivtp.runtime.language.sampling",
    "Timings": "hivtp.runtime.answer",
    "VisionOptions": "hivtp.runtime.vision.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
