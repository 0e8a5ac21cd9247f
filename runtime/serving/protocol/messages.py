"""The messages of a request: roles and contents in all the forms that clients send them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from hivtp.runtime.language.sampling import shortened
from hivtp.runtime.serving.protocol.errors import invalid
from hivtp.runtime.serving.protocol.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Sequence

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_TYPES = ("text", "input_text", "output_text", "refusal")


@dataclass(frozen=True)
class ImageReference:
    """An image as a client names it.

    Attributes:
        url: a data: URI, or an address.
        param: where it stands in the request.
    """

    url: str
    param: str


Part: TypeAlias = "str | ImageReference"


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    Attributes:
        role: who speaks.
        parts: words and images, in the order in which they were sent.
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def images(self) -> list[ImageReference]:
        """The images alone."""
        return [part for part in self.parts if isinstance(part, ImageReference)]


def parse_messages(values: Sequence[Any] | None, max_images: int) -> tuple[ChatMessage, ...]:
    """Read `messages`.

    Raises:
        ApiError: a message is not one that this model can be asked.
    """
    if not values:
        raise invalid("messages must be a list with at least one message", "messages")
    messages = tuple(_parse_message(Fields.of(value, f"messages[{index}]")) for index, value in enumerate(values))
    if messages[-1].role != "user":
        raise invalid("the last message must be of the user: it is what is answered", f"messages[{len(values) - 1}]")
    images = [image for message in messages for image in message.images]
    if len(images) > max_images:
        raise invalid(
            f"the conversation has {len(images)} images, and {max_images} are allowed; leave earlier ones out",
            images[max_images].param,
            "too_many_images",
        )
    return messages


def _parse_message(fields: Fields) -> ChatMessage:
    name = fields.text("role")
    if name not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    role = ROLES[name]
    if fields.values.get("tool_calls"):
        raise invalid("this model calls no tools; leave tool_calls out", fields.path("tool_calls"), "unsupported")
    content = fields.values.get("content")
    if content is None and role == "assistant":
        return ChatMessage(role, ("",))
    if isinstance(content, str):
        parts: list[Part] = [content]
    elif isinstance(content, list):
        parts = [_parse_part(value, role, f"{fields.path('content')}[{place}]") for place, value in enumerate(content)]
    else:
        raise fields.wrong("content", "a string or a list of parts")
    is_empty = not any(isinstance(part, ImageReference) or part.strip() for part in parts)
    if role == "user" and is_empty:
        raise invalid(f"{fields.path('content')} is empty; write what the model is to answer", fields.path("content"))
    return ChatMessage(role, tuple(parts) or ("",))


def _parse_part(value: Any, role: Role, place: str) -> Part:
    if isinstance(value, str):
        return value
    fields = Fields.of(value, place)
    kind = fields.text("type") or next((name for name in ("text", "image_url") if name in fields.values), None)
    if kind in TEXT_TYPES:
        text = fields.text("refusal" if kind == "refusal" else "text")
        if text is None:
            raise fields.wrong("text", "a string")
        return text
    if kind != "image_url":
        raise invalid(
            f"{place} is of type {shortened(kind)}; this model takes text and image_url", f"{place}.type", "unsupported"
        )
    if role != "user":
        raise invalid(f"{place} is an image of the {role}; only a user's message holds images", place, "unsupported")
    if isinstance(fields.values.get("image_url"), str):
        return ImageReference(cast("str", fields.values["image_url"]), fields.path("image_url"))
    image = fields.object("image_url")
    url = None if image is None else image.text("url")
    if image is None or not url:
        param = f"{place}.image_url.url"
        raise invalid(f"{param} must be a data: URI, such as data:image/jpeg;base64,...", param)
    return ImageReference(url, image.path("url"))
