"""The small endpoints: what is served, how it is, how long a conversation is, what was counted."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.serving.card import card
from hivtp.runtime.serving.flow.stages import folded, read_images
from hivtp.runtime.serving.images.decode import read_size
from hivtp.runtime.serving.protocol.chat_request import check_model
from hivtp.runtime.serving.protocol.errors import ApiError, api_error, invalid
from hivtp.runtime.serving.protocol.fields import parse_object
from hivtp.runtime.serving.protocol.messages import ImageReference, parse_messages
from hivtp.runtime.serving.telemetry.metrics import CONTENT_TYPE
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from hivtp.runtime.serving.flow.service import Service
    from hivtp.runtime.serving.http.asgi import Call


class Endpoints:
    """See each method; all are what Endpoint.answer is.

    Args:
        service: what they tell about.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def health(self, call: Call) -> None:
        """Whether the process lives: 503 when only a restart helps; 200 while it drains."""
        if self._service.state == "failed":
            raise ApiError(503, "the engine has failed", "engine_dead")
        await call.send_json({"status": "ok"})

    async def ready(self, call: Call) -> None:
        """Whether to send requests here: 503 while it loads or drains, or has failed."""
        state = self._service.state
        if state != "ready":
            raise ApiError(503, f"the server is {state}", "not_ready", retry_after=1)
        await call.send_json({"status": "ready"})

    async def metrics(self, call: Call) -> None:
        """All counters, for Prometheus."""
        await call.send_bytes(self._service.metrics.text(), 200, {"content-type": CONTENT_TYPE})

    async def version(self, call: Call) -> None:
        """Which hivtp answers."""
        await call.send_json({"version": version("hivtp")})

    async def models(self, call: Call) -> None:
        """The model, once for each of its names."""
        await call.send_json(
            {"object": "list", "data": [card(self._service, name, self._created) for name in self._service.names]}
        )

    async def model(self, call: Call) -> None:
        """The model of a name."""
        name = call.scope["path_params"]["name"]
        check_model(name, self._service.names)
        await call.send_json(card(self._service, name, self._created))

    async def completions(self, call: Call) -> None:  # noqa: ARG002  nothing of it is read
        """The endpoint of models without chats."""
        raise ApiError(404, "this model answers chats; use POST /v1/chat/completions", "not_found")

    async def tokenize(self, call: Call) -> None:
        """How many positions a conversation takes, images included, and the token ids of its text."""
        service = self._service
        held = service.exchange().held
        try:
            body = await call.read_json(service.settings, held.add)
            found = await service.stages.in_text_thread(self._tokenize, body)
        except HivtpError as error:
            raise api_error(error) from error
        finally:
            held.release()
        await call.send_json(found)

    def _tokenize(self, body: bytes) -> dict[str, Any]:
        service, model, settings = self._service, self._service.model, self._service.settings
        fields = parse_object(body)
        check_model(fields.text("model"), service.names)
        if (prompt := fields.text("prompt")) is not None:
            token_ids = model.template.encode_words(prompt, model.tokenizer)
            return {"count": len(token_ids), "max_model_len": service.engine.max_positions, "tokens": token_ids}
        messages = parse_messages(fields.list("messages"), settings.max_images)
        references = [image for message in messages for image in message.images]
        contents = read_images(references, settings)
        if any(image.param not in contents for image in references):
            param = next(image.param for image in references if image.param not in contents)
            raise invalid(f"{param} must be a data: URI here; nothing is fetched", param)
        system, rest = folded(messages)
        conversation = [] if system is None else [Message("system", [system])]
        conversation += [
            Message(
                message.role, [ImagePart(b"") if isinstance(part, ImageReference) else part for part in message.parts]
            )
            for message in rest
        ]
        text = model.template.render(conversation, model.tokenizer)
        token_ids = model.template.encode(model.tokenizer, text, model.manifest.image_token_id)
        counts = [
            model.images.count_tokens(
                read_size(contents[image.param], image.param, settings.max_image_pixels), len(references)
            )
            for image in references
        ]
        return {
            "count": len(token_ids) + sum(count.num_tokens - 1 for count in counts),
            # Some rules keep more of one image than of another; the count is then the most that it can be.
            "is_exact": all(count.is_exact for count in counts),
            "image_tokens": [count.num_tokens for count in counts],
            "max_model_len": service.engine.max_positions,
            "tokens": token_ids,
        }
