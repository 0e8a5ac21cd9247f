"""The body of POST /v1/chat/completions: what is accepted, refused and ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hivtp.runtime.language.sampling import MAX_LOGPROBS, MAX_SEED
from hivtp.runtime.serving.protocol.errors import ApiError, invalid
from hivtp.runtime.serving.protocol.messages import ChatMessage, parse_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.serving.protocol.fields import Fields
    from hivtp.runtime.serving.settings import ServerSettings

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 64
INCLUDES = ("kept_indices", "importance")
# Read here.
ACCEPTED = {"model", "messages", "max_completion_tokens", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"}
ACCEPTED |= {"n", "logprobs", "top_logprobs", "stream", "stream_options", "ignore_eos", "repetition_penalty", "hivtp"}
ACCEPTED |= {"response_format", "tool_choice"}
# What would change the answer and cannot: refused unless it has one of these values, which change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    # A template is a program, and a client's words must not become one.
    "chat_template": (),
    "chat_template_kwargs": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "documents": (),
}
# What has no bearing on the answer of this model.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "tools", "priority"}
IGNORED |= {"prompt_cache_key", "safety_identifier", "verbosity", "prediction", "cache_salt", "request_id"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        messages: the conversation; the last one is the user's.
        model: as the client calls it; None where it says nothing.
        max_tokens: of the answer; None is as many as there is room for.
        temperature, top_p, top_k, repetition_penalty, seed, stop, logprobs, ignores_eos: see SamplingParams.
        streams: the answer is sent as it comes.
        has_usage: the stream ends with a chunk of counts.
        has_continuous_usage: each chunk of the stream has counts.
        includes: what else the answer tells, of INCLUDES; None where the request does not ask for anything.
        ignored: fields without effect.
    """

    messages: tuple[ChatMessage, ...]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignores_eos: bool = False
    streams: bool = False
    has_usage: bool = False
    has_continuous_usage: bool = False
    includes: frozenset[str] | None = None
    ignored: tuple[str, ...] = field(default=())

    @property
    def has_images(self) -> bool:
        """Whether there is an image anywhere."""
        return any(message.images for message in self.messages)


def parse_chat(fields: Fields, settings: ServerSettings) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: the first field that is wrong, or that this server cannot do.
    """
    ignored = _check_unsupported(fields, settings)
    options = fields.object("stream_options")
    limits = [fields.whole(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    return ChatRequest(
        messages=parse_messages(fields.list("messages"), settings.max_images),
        model=fields.text("model"),
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=fields.real("temperature", 0),
        top_p=fields.real("top_p", 0, 1, above=True),
        top_k=_parse_top_k(fields),
        repetition_penalty=fields.real("repetition_penalty", 0, above=True),
        seed=_parse_seed(fields),
        stop=_parse_stop(fields),
        logprobs=_parse_logprobs(fields),
        ignores_eos=bool(fields.flag("ignore_eos")),
        streams=bool(fields.flag("stream")),
        has_usage=options is not None and bool(options.flag("include_usage")),
        has_continuous_usage=options is not None and bool(options.flag("continuous_usage_stats")),
        includes=_parse_includes(fields.object("hivtp")),
        ignored=tuple(ignored),
    )


def _check_unsupported(fields: Fields, settings: ServerSettings) -> Sequence[str]:
    """Refuse what this server cannot do; the names of what it ignores."""
    given = {name: value for name, value in fields.values.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        if name in given and given[name] not in neutral:
            raise invalid(f"{name} is not supported; leave it out", name, "unsupported")
    if fields.whole("n", 1) not in (None, 1):
        raise invalid("n must be 1: there is one answer to a request", "n", "unsupported")
    form = fields.object("response_format")
    if form is not None and form.text("type") != "text":
        raise invalid(
            "response_format must be text: this server does not force an answer into a form",
            "response_format",
            "unsupported_response_format",
        )
    if given.get("tool_choice", "none") not in ("none", "auto"):
        raise invalid("this model calls no tools; tool_choice must be none or auto", "tool_choice", "unsupported")
    unknown = [name for name in given if name not in ACCEPTED | IGNORED and name not in NEUTRAL]
    if unknown and settings.refuses_unknown:
        raise invalid(f"there is no field {unknown[0][:100]!r}", unknown[0][:100], "unknown_field")
    return [name for name in given if name in IGNORED or name in unknown]


def _parse_top_k(fields: Fields) -> int | None:
    top_k = fields.whole("top_k", -1)
    # As in vLLM -1 is no limit.
    return 0 if top_k == -1 else top_k


def _parse_seed(fields: Fields) -> int | None:
    seed = fields.whole("seed", -(2**63), MAX_SEED)
    return None if seed is None else seed % 2**64


def _parse_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.values.get("stop")
    strings = [] if value is None else [value] if isinstance(value, str) else value
    is_list = isinstance(strings, list) and len(strings) <= MAX_STOP_STRINGS
    if not is_list or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_LENGTH for one in strings):
        wanted = f"a string or up to {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_LENGTH} characters"
        raise fields.wrong("stop", wanted)
    return tuple(strings)


def _parse_logprobs(fields: Fields) -> int | None:
    has_logprobs = fields.flag("logprobs")
    num_top = fields.whole("top_logprobs", 0, MAX_LOGPROBS)
    if num_top and not has_logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return (num_top or 0) if has_logprobs else None


def _parse_includes(fields: Fields | None) -> frozenset[str] | None:
    if fields is None:
        return None
    names = fields.list("include") or []
    for place, name in enumerate(names):
        if name not in INCLUDES:
            param = f"{fields.path('include')}[{place}]"
            raise invalid(f"{param} must be one of {', '.join(INCLUDES)}", param)
    return frozenset(names)


def check_model(name: str | None, known: Sequence[str]) -> None:
    """Refuse a request for a model that is not served.

    Raises:
        ApiError: there is no such model.
    """
    if name and name not in known:
        raise ApiError(404, f"there is no model {name[:100]!r} here; ask for {known[0]!r}", "model_not_found", "model")
