"""A server of vLLM as a language backend, and what it is asked before anybody else asks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.runtime.language.base import closed_error
from hivtp.runtime.language.remote import RemoteBackend
from hivtp.runtime.language.vllm.answering import Answering
from hivtp.runtime.language.vllm.body import chat_body, image_part
from hivtp.runtime.language.vllm.connection import Connection, ServerAddress
from hivtp.runtime.language.vllm.scheduler import VllmScheduler
from hivtp_ops.errors import BackendUnavailableError, EngineError, HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivtp.engines.manifest import LanguageManifest
    from hivtp.runtime.language.options import LanguageOptions
    from hivtp.runtime.language.remote import RemoteRequest
    from hivtp.runtime.language.vllm.answering import Emit

# In what a server with hivtp's plugin answers to embeddings of another width.
PLUGIN_SIGNATURE = "hivtp: images of this server may have any number of tokens"


class VllmLanguage(RemoteBackend):
    """The language model of the bundle's checkpoint in a server of vLLM.

    Args:
        manifest: of the language model.
        options: where the server is, and how to ask it.

    Raises:
        BackendUnavailableError: it cannot be reached.
        EngineError: it wants another key, or has not the model.
        SettingsError: the url cannot be one.
    """

    def __init__(self, manifest: LanguageManifest, options: LanguageOptions) -> None:
        self._manifest = manifest
        self._options = options
        self._address = ServerAddress.of(options)
        self._adds_special_tokens = True
        self._is_closed = False
        card = self._card(options.model_name)
        self.model_name = str(card["id"])
        length = card.get("max_model_len")
        self.context_length = min(
            manifest.context_length, length if isinstance(length, int) else manifest.context_length
        )

    @property
    def description(self) -> str:
        """See RemoteBackend.description."""
        return f"{self.model_name} in vLLM"

    def open_scheduler(self, num_slots: int) -> VllmScheduler:
        """See RemoteBackend.open_scheduler."""
        self._check_open()
        return VllmScheduler(self.context_length, num_slots, self._answering)

    def check(self, ask: Callable[[], object], *, counts_vary: bool) -> None:
        """See RemoteBackend.check."""
        if counts_vary and not self._has_plugin():
            raise EngineError(
                f"this bundle keeps more tokens of one image than of another, and the LLaVA of vLLM ends when images "
                f"of two lengths meet: start the server at {self._address.url} with the architecture of hivtp's plugin "
                '(--hf-overrides, with "preset": "none"), or export the bundle with a preset of an exact count'
            )
        try:
            try:
                ask()
            except PromptError:
                # Templates that write the bos token themselves want no tokenizer that adds another.
                self._adds_special_tokens = False
                ask()
        except BackendUnavailableError:
            raise
        except (EngineError, PromptError) as error:
            raise EngineError(
                f"the vLLM server at {self._address.url} cannot decode for this bundle: {error}; start it with the "
                "checkpoint that the bundle was exported from, and with --enable-mm-embeds"
            ) from error

    def close(self) -> None:
        """See RemoteBackend.close."""
        self._is_closed = True

    def _answering(self, request: RemoteRequest, emit: Emit) -> Answering:
        self._check_open()
        options, image_token_id = self._options, self._manifest.image_token_id
        return Answering(request, self._address, self._body, image_token_id, options.max_retries, emit)

    def _body(self, request: RemoteRequest) -> bytes:
        return chat_body(
            request,
            self.model_name,
            self._manifest.eos_token_ids,
            self._options.dtype,
            adds_special_tokens=self._adds_special_tokens,
        )

    def _card(self, name: str | None) -> dict[str, Any]:
        """What the server says of the model."""
        with Connection(self._address) as connection:
            connection.send("GET", "/v1/models")
            found = connection.read_json()
        try:
            cards = {str(card["id"]): dict(card) for card in found["data"]}
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._address.url} does not list models as vLLM does; is it one?") from error
        if name is None:
            # Adapters are listed after the model that they adapt.
            name = next(iter(cards), None)
        if name is None or name not in cards:
            raise EngineError(
                f"the vLLM server at {self._address.url} has the models {', '.join(cards) or 'none'}, not {name!r}; "
                "set model_name"
            )
        return cards[name]

    def _has_plugin(self) -> bool:
        """Whether images of any number of tokens may meet: the plugin signs what it refuses, vLLM itself does not."""
        wrong = np.zeros((1, self._manifest.hidden_size + 1), np.float32)
        parts = [image_part(wrong, self._options.dtype), {"type": "text", "text": "?"}]
        body = {"model": self.model_name, "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 1}
        with Connection(self._address) as connection:
            try:
                connection.send("POST", "/v1/chat/completions", json.dumps(body).encode())
            except BackendUnavailableError:
                raise
            except HivtpError as error:
                return PLUGIN_SIGNATURE in str(error)
        return False

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed_error()
