"""The front door: `hivtp COMMAND`, one module per command, loaded when it is called."""

from __future__ import annotations

import sys

# As typing has it. Nothing else is imported here: until `main` runs, nobody answers to Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Each command: the module that holds `make_parser` and `run`, and what it does.
COMMANDS = {
    "export": ("hivtp.export.cli.export", "turn a checkpoint into a bundle"),
    "plan": ("hivtp.export.cli.plan", "build a TensorRT plan for a bundle, on the machine that runs it"),
    "layers": ("hivtp.export.cli.layers", "rank the layers that could score the patches, on your own images"),
    "run": ("hivtp.runtime.cli.run", "ask a bundle about images"),
    "chat": ("hivtp.runtime.cli.chat", "talk with a bundle about images, in the terminal"),
    "serve": ("hivtp.runtime.cli.serve", "serve a bundle over OpenAI's chat completions API"),
    "compare": ("hivtp.runtime.cli.compare", "compare engines and bundles on your own images"),
}
# These write files or serve, and go on where nobody reads what they print.
WRITERS = ("export", "plan", "serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is that of `run_guarded`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in COMMANDS:
        return _run(f"hivtp {given[0]}", given[0], given[1:], is_script=arguments is None)
    return _guard("hivtp", lambda: _describe(given), is_script=arguments is None)


def export(arguments: Sequence[str] | None = None) -> int:
    """The script `hivtp-export`: the command `hivtp export`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return _run("hivtp-export", "export", given, is_script=arguments is None)


def _run(program: str, command: str, arguments: Sequence[str], *, is_script: bool) -> int:
    def work() -> int:
        from importlib import import_module

        from hivtp.runtime.cli.console import run_command

        module = import_module(COMMANDS[command][0])
        return run_command(program, module.make_parser(program), module.run, arguments)

    return _guard(program, work, is_script=is_script, is_output_optional=command in WRITERS)


def _guard(program: str, work: Callable[[], int], *, is_script: bool, is_output_optional: bool = False) -> int:
    """Run a part of a command.

    Args:
        program: its name.
        work: the part.
        is_script: this process is the command's own, and ends with it.
        is_output_optional: see `run_guarded`.
    """
    try:
        from hivtp.runtime.cli.console import run_guarded
        from hivtp.runtime.cli.streams import open_closed_descriptors

        if is_script:
            open_closed_descriptors()
        return run_guarded(program, work, is_output_optional=is_output_optional)
    # Ctrl-C while the guard itself was loaded.
    except KeyboardInterrupt:
        print(f"\n{program}: stopped", file=sys.stderr)
        return 130
    finally:
        if is_script:
            _ignore_interrupts()


def _ignore_interrupts() -> None:
    """Nothing is left that Ctrl-C could stop but Python's own end."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _describe(arguments: Sequence[str]) -> int:
    """What `hivtp` says without a command."""
    if arguments in (["--version"], ["-V"]):
        print(f"hivtp {_version()}")
        return 0
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    found = f"hivtp: there is no command {arguments[0]!r}\n\n" if arguments else ""
    print(f"{found}{_usage()}", file=sys.stderr)
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hivtp")
    except PackageNotFoundError:
        return "of unknown version: it was not installed"


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
            "hivtp COMMAND --help shows the options of a command; hivtp --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
