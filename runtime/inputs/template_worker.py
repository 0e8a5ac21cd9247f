"""Renders chat templates in a process of its own, with bounds on its time and memory; run as a script.

A template is a program that came with somebody's checkpoint. Jinja's sandbox keeps it from files and from Python, but
not from looping for ever or building gigabytes, and nothing within the process could stop it.

Protocol: one JSON object per line in, one per line out. {"source", "variables"} gives {"text"} or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

if TYPE_CHECKING:
    from collections.abc import Callable


class Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, a tag that marks an assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """See jinja2.ext.Extension.parse."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(lineno)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Refuses private names, by which a template could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *pairs = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*pairs, **kwargs).items():
            Namespace.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no private name, as {name!r}")
        jinja2.utils.Namespace.__setitem__(self, name, value)


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template in a sandbox like that of `transformers.utils.chat_template_utils`."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(namespace=Namespace, raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


def answer(line: str, max_characters: int) -> dict[str, str]:
    """Render what one line asks for."""
    try:
        asked = json.loads(line)
        text = compiled(asked["source"]).render(**asked["variables"])
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # noqa: BLE001  a template can raise whatever its expressions raise
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    if len(text) > max_characters:
        return {"error": f"it writes {len(text)} characters, and {max_characters} are allowed"}
    return {"text": text}


def main(max_bytes: int, max_characters: int) -> None:
    """Answer lines until there are no more."""
    # Where memory cannot be bounded, the time still is.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    for line in sys.stdin:
        print(json.dumps(answer(line, max_characters)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
