"""The chat template of a checkpoint, of which there may be several, each with a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# What transformers takes where several have names.
DEFAULT = "default"


def choose_template(folder: Path, processor: Any, name: str | None) -> str | None:
    """The template that transformers would take, or the one of a name; None where the checkpoint has none.

    Args:
        folder: of the checkpoint, for messages.
        processor: as transformers opened it. Where it has no template, that of its tokenizer counts.
        name: of a template.

    Raises:
        CheckpointError: there are several and none is the default, or there is none of that name.
    """
    found = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(found, dict):
        chosen = found.get(name or DEFAULT)
        if chosen is None:
            wanted = "none of them is the default" if name is None else f"none is named {name!r}"
            raise CheckpointError(
                f"{folder} has the chat templates {', '.join(sorted(map(str, found)))}, and {wanted}; choose one with "
                "--chat-template NAME"
            )
    else:
        chosen = found
        if name is not None and (name != DEFAULT or found is None):
            has = "has no chat template" if found is None else "has one chat template, without a name"
            raise CheckpointError(f"{folder} {has}, so none is named {name!r}; leave --chat-template out")
    if chosen is not None and not isinstance(chosen, str):
        raise CheckpointError(f"{folder}: its chat template is a {type(chosen).__name__}, expected text")
    return chosen
