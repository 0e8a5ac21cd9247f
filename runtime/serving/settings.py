"""How the server behaves: one value, whose defaults the command line shows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hivtp_ops.errors import SettingsError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """How the server behaves.

    Args:
        host, port: where it listens; port 0 takes a free one.
        api_keys: a client names one of these; none lets everybody in.
        is_insecure: listen beyond this machine without keys.
        allowed_hosts: names that the Host header may have, beside those of this machine while it listens there alone.
        allowed_origins: web pages of these origins may use the server; "*" is all.
        model_names: what clients call the model, the first in answers; none takes the checkpoint's name, and "hivtp".
        num_slots: requests that are decoded together.
        max_queued: further requests that wait; one more is refused with 429.
        max_context: positions of a prompt and its answer; None takes the model's context.
        max_tokens: of an answer, and what a request gets that names no number; None takes what the context leaves.
        max_kv_bytes: KV cache of all requests together; None takes half of the memory that is free at the start.
        chunk_size: while others decode, a prompt runs in chunks of this many positions, and otherwise in longer ones;
            None runs it whole.
        steps_per_chunk: decode steps between two chunks.
        reuses_prefix: a chat's next turn finds the KV cache of the last one. Never across API keys; and never with a
            prefill decoder, which would round it otherwise.
        idle_seconds: after this time without a request the KV cache of finished ones is given up, and its memory.
        max_prepared: requests whose images are decoded or encoded, and that wait for a slot.
        num_image_threads: images that are decoded and resized at once.
        image_domains: hosts from which images are downloaded; `*.example.org` is every host below example.org, and
            `example.org:8443` another port. None are by default: a client then sends a data: URI.
        max_images: of a conversation.
        max_image_bytes, max_image_pixels: of one image.
        fetch_seconds: for a whole download.
        max_body_bytes: of a request.
        max_waiting_bytes: of all requests and images that wait to be prepared; one more is refused with 429.
        max_header_bytes: of all headers together.
        header_seconds, body_seconds: in which a client must have sent its headers, and the body.
        queue_seconds: until a request must have got a slot; then it is refused with 429.
        request_seconds: for a whole answer.
        keep_alive_seconds: after this time without a token a stream gets a comment, so that no proxy gives it up.
        drain_seconds: after SIGTERM the answers that have begun may take this long.
        log_format: "json" or "text".
        refuses_unknown: fields that the server does not know are an error, not ignored.

    Raises:
        SettingsError: a setting of the wrong type or out of its range, or the server would let in strangers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    is_insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ()
    num_slots: int = 4
    max_queued: int = 16
    max_context: int | None = None
    max_tokens: int | None = None
    max_kv_bytes: int | None = None
    chunk_size: int | None = 64
    steps_per_chunk: int = 4
    reuses_prefix: bool = True
    idle_seconds: float = 300.0
    max_prepared: int = 4
    num_image_threads: int = 2
    image_domains: tuple[str, ...] = ()
    max_images: int = 8
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 25_000_000
    fetch_seconds: float = 10.0
    max_body_bytes: int = 32 * 2**20
    max_waiting_bytes: int = 256 * 2**20
    max_header_bytes: int = 64 * 2**10
    header_seconds: float = 15.0
    body_seconds: float = 30.0
    queue_seconds: float = 30.0
    request_seconds: float = 300.0
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 30.0
    log_format: str = "json"
    refuses_unknown: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, str(field.type), field.default)
        if self.log_format not in ("json", "text"):
            raise SettingsError(f"log_format must be json or text, not {self.log_format!r}")
        if self.port > 65535:
            raise SettingsError(f"port must be at most 65535, not {self.port}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise SettingsError("an API key must be printable ASCII without spaces around it")
        if not self.is_on_loopback and not self.api_keys and not self.is_insecure:
            raise SettingsError(
                f"{self.host} can be reached from other machines, and no API key is set: anybody could use the model; "
                "give --api-key, or --insecure if something else keeps strangers out"
            )

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK_HOSTS

    def _check(self, name: str, kind: str, default: Any) -> None:
        value = getattr(self, name)
        if value is None and "None" in kind:
            return
        if kind.startswith("tuple"):
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                raise SettingsError(f"{name} must be a tuple of strings, not {value!r}")
        elif kind == "bool" or kind == "str":
            if not isinstance(value, type(default)):
                raise SettingsError(f"{name} must be a {type(default).__name__}, not {value!r}")
        elif kind == "float":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise SettingsError(f"{name} must be a number above 0, not {value!r}")
        else:
            minimum = 0 if name in ("port", "max_queued", "steps_per_chunk", "max_images") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SettingsError(f"{name} must be a whole number, {minimum} or more, not {value!r}")
