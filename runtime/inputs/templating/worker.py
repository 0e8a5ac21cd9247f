"""Renders chat templates in a process of its own, with bounds on its time and memory; run as a script.

A template is a program that came with somebody's checkpoint. Jinja's sandbox keeps it from files and from Python, but
not from looping for ever or building gigabytes, and nothing within the process could stop it.

Protocol: one JSON object per line in, one per line out. {"source", "variables"} gives {"text"} or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    # Last, so that nothing in them stands for a module of the standard library.
    sys.path += settings["folders"]

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
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no private name, as {name!r}")
        jinja2.utils.Namespace.__setitem__(self, name, value)


class Dict:
    """What a template knows as `dict`: it makes dictionaries and gives no other way into Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """See dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """See dict.fromkeys."""
        return dict.fromkeys(*args)


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
    environment.globals.update(
        dict=Dict(), namespace=Namespace, raise_exception=raise_exception, strftime_now=strftime_now
    )
    return environment.from_string(source)


def answer(line: str, max_characters: int) -> str:
    """Render what one line asks for; the line to answer."""
    try:
        asked = json.loads(line)
        text = compiled(asked["source"]).render(**asked["variables"])
        if len(text) > max_characters:
            found = {"error": f"it writes {len(text)} characters, and {max_characters} are allowed"}
        else:
            found = {"text": text}
        return json.dumps(found)
    except MemoryError:
        return json.dumps({"error": "it takes too much memory"})
    except Exception as error:  # noqa: BLE001  a template can raise whatever its expressions raise
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]})


def main(settings: dict[str, Any]) -> None:
    """Answer lines until there are no more."""
    # Where memory cannot be bounded, the time still is.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (settings["max_bytes"], settings["max_bytes"]))
    for line in sys.stdin:
        # The asker stops a template that takes too long; this does where the asker is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * settings["max_seconds"])
        found = answer(line, settings["max_characters"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(found, flush=True)


if __name__ == "__main__":
    main(settings)
