"""The Markdown files of the repository, and the code in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
}
README = DOCUMENTS["README.md"]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_blocks(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """The command lines of a document: those of `sh` blocks and of indented ones, each as one line."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", "").splitlines()]
    return lines + re.findall(r"^ {4}(?:\$ )?(\S.*)$", without_blocks(text), re.MULTILINE)


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every call of a program in a document's command lines."""
    found = []
    for line in shell_lines(text):
        # Of a pipe the part that calls it, without what comes before: variables and folders.
        for part in re.split(r"\s[|;&]+\s", line):
            match = re.match(rf"(?:\S*/)?{re.escape(program)}(?:\s(.*))?$", part)
            if match:
                found.append(shlex.split(match[1] or "", comments=True))
    return found


def inline_code(text: str) -> list[str]:
    """What stands between single backquotes, outside of blocks."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text))


def slugs(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
