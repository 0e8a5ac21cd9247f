"""hivtp: export and serve LLaVA-class models with HIVTP visual token pruning inside the graph."""

from __future__ import annotations

from hivtp.runtime.answer import Answer, Timings
from hivtp.runtime.answer_stream import AnswerStream
from hivtp.runtime.chat import Chat
from hivtp.runtime.pipeline import Pipeline
from hivtp.runtime.request import Request
from hivtp_ops import PruningSpec
from hivtp_ops.errors import HivtpError

__all__ = ["Answer", "AnswerStream", "Chat", "HivtpError", "Pipeline", "PruningSpec", "Request", "Timings"]
