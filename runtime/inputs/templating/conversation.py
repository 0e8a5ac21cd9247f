"""Conversations brought into the shape that chat templates take: roles in turn, and a system message first or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.inputs.messages import ImagePart, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.inputs.messages import Part

# Stands for an image.
_MARK = "\0"


def merged(messages: Sequence[Message]) -> list[Message]:
    """Successive messages of one role as one, with a line break between them: templates want roles to alternate."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1].role == message.role:
            message = _together(found.pop(), message)
        found.append(message)
    return found


def folded(messages: Sequence[Message], *, keeps_first: bool) -> list[Message]:
    """System messages put before the user's next words.

    Args:
        messages: roles alternate, and the last one is the user's.
        keeps_first: a system message at the beginning stays one.
    """
    found: list[Message] = []
    system: list[str] = []
    for place, message in enumerate(messages):
        if message.role == "system" and not (keeps_first and place == 0):
            system.append(message.text)
            continue
        if message.role == "user" and system:
            message = _after_words("\n".join(system), message)
            system = []
        found.append(message)
    return merged(found)


def as_text(message: Message, image_token: str) -> str:
    """Words and image tokens as one text; images that have no place of their own come first, a line for each."""
    return "".join(part if isinstance(part, str) else image_token for part in _placed(message).parts)


def left_to_template(message: Message) -> Message:
    """The message with its images where a template puts them, if that is where they stand: first, a line for each."""
    text, num_images = as_text(message, _MARK), len(message.images)
    lines = f"{_MARK}\n" * num_images
    if not message.keeps_places or not text.startswith(lines) or text.count(_MARK) != num_images:
        return message
    return Message(message.role, [*map(ImagePart, message.images), text[len(lines) :]])


def _placed(message: Message) -> Message:
    """The message with its images where `as_text` puts them."""
    if message.keeps_places or not message.images:
        return message
    parts: list[Part] = []
    for source in message.images:
        parts += [ImagePart(source), "\n"]
    return Message(message.role, [*parts, message.text], keeps_places=True)


def _together(first: Message, second: Message) -> Message:
    if first.keeps_places != second.keeps_places:
        first, second = _placed(first), _placed(second)
    keeps_places = first.keeps_places or second.keeps_places
    parts, more = list(first.parts), list(second.parts)
    place = next((place for place, part in enumerate(more) if isinstance(part, str)), None)
    if keeps_places:
        more.insert(0, "\n")
    elif place is not None and first.text:
        more[place] = f"\n{more[place]}"
    return Message(first.role, _joined([*parts, *more]), keeps_places)


def _after_words(words: str, message: Message) -> Message:
    parts = list(message.parts)
    # After images that come first, so that the text begins where the model expects it.
    texts = [place for place, part in enumerate(parts) if isinstance(part, str)]
    place = 0 if message.keeps_places else min(texts, default=len(parts))
    return Message("user", _joined([*parts[:place], f"{words}\n", *parts[place:]]), message.keeps_places)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts as one."""
    found: list[Part] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found
