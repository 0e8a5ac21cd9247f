"""The front door: `hivtp COMMAND`, one module per command, loaded when it is called."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each command: the module that holds `make_parser` and `run`, and what it does.
COMMANDS = {
    "export": ("hivtp.export.cli.export", "turn a checkpoint into a bundle"),
    "plan": ("hivtp.export.cli.plan", "build a TensorRT plan for a bundle"),
    "layers": ("hivtp.export.cli.layers", "rank the layers that could score the patches, on your own images"),
    "run": ("hivtp.runtime.cli.run", "ask a bundle about images"),
    "chat": ("hivtp.runtime.cli.chat", "talk with a bundle about images, in the terminal"),
    "serve": ("hivtp.runtime.cli.serve", "serve a bundle as OpenAI's chat completions"),
    "compare": ("hivtp.runtime.cli.compare", "compare engines and bundles on your own images"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        return _run(f"hivtp {arguments[0]}", arguments[0], arguments[1:])
    if arguments in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"hivtp {version('hivtp')}")
        return 0
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    found = f"hivtp: there is no command {arguments[0]!r}\n\n" if arguments else ""
    print(f"{found}{_usage()}", file=sys.stderr)
    return 2


def export(arguments: Sequence[str] | None = None) -> int:
    """The script `hivtp-export`: the command `hivtp export`."""
    return _run("hivtp-export", "export", sys.argv[1:] if arguments is None else list(arguments))


def _run(program: str, command: str, arguments: Sequence[str]) -> int:
    # An interrupt may come while modules are imported, which takes most of a short command's time.
    try:
        from importlib import import_module

        from hivtp.runtime.cli.console import run_command

        module = import_module(COMMANDS[command][0])
        return run_command(program, module.make_parser(program), module.run, arguments)
    except KeyboardInterrupt:
        print(f"\n{program}: stopped", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hivtp COMMAND ...",
            "",
            "Export and serve LLaVA-class models with visual token pruning inside the graph.",
            "",
            "commands:",
            *lines,
            "",
            "hivtp COMMAND --help says more; hivtp --version names the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
