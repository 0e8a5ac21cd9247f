"""What README and docs say of commands, options, files and bounds is so."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from benchmarks.report.excerpts import write_excerpts
from benchmarks.report.page import EXCERPTED, RESULTS
from hivtp.engines import EngineName
from hivtp.export.verify.language import LANGUAGE_TOLERANCES
from hivtp.export.verify.vision import VISION_TOLERANCES
from hivtp.main import COMMANDS
from tests.support.documents import DOCUMENTS, ROOT, blocks, commands, inline_code, shell_lines, slugs

PARTS = ("hivtp_ops", "engines", "runtime", "export", "benchmarks")
# Folders of tests that have no counterpart in the source.
OWN_FOLDERS = {"support", "clients", "fuzz", "data", "vllm", "ray"}
# Options of other programs.
FOREIGN = {"--index-url", "--batch_size", "--log_samples", "--limit", "--model", "--model_args", "--output_path"}
FOREIGN |= {"--save-outputs", "--load-outputs", "--gen-script", "--compare", "--enable-prompt-tokens-details"}
FOREIGN |= {"--limit-mm-per-prompt", "--enable-mm-embeds"}


@pytest.fixture(params=sorted(DOCUMENTS))
def document(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    text, folder = DOCUMENTS[document], (ROOT / document).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = (folder / target).resolve() if target else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_page_and_image_can_be_found() -> None:
    links = {
        ((ROOT / name).parent / target).resolve()
        for name, text in DOCUMENTS.items()
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    }
    assert set((ROOT / "docs").iterdir()) - links == set()


def test_the_picture_of_the_parts_is_whole_and_says_what_it_shows() -> None:
    root = ElementTree.parse(ROOT / "docs" / "parts.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.get("role") == "img"
    for name in ("title", "desc"):
        found = root.find(space + name)
        assert found is not None
        assert found.text
        assert found.get("id") in (root.get("aria-labelledby") or "").split()
    # Readable on a dark page too.
    assert "prefers-color-scheme: dark" in (root.findtext(f"{space}style") or "")


def test_every_command_of_hivtp_parses(document: str) -> None:
    text = DOCUMENTS[document]
    found = commands(text, "hivtp") + [["export", *given] for given in commands(text, "hivtp-export")]
    for command, *arguments in found:
        module = importlib.import_module(COMMANDS[command][0])
        module.make_parser(f"hivtp {command}").parse_args(arguments)


def test_there_are_commands_to_parse() -> None:
    assert len([call for text in DOCUMENTS.values() for call in commands(text, "hivtp")]) >= 15
    assert {call[0] for call in commands(DOCUMENTS["README.md"], "hivtp")} >= set(COMMANDS) - {"layers"}


def test_every_module_that_is_run_exists(document: str) -> None:
    text = DOCUMENTS[document]
    lines = [*shell_lines(text), *inline_code(text)]
    for module in (name for line in lines for name in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", line)):
        found = importlib.util.find_spec(module)
        assert found is not None, module
        is_package = found.submodule_search_locations is not None
        assert not is_package or importlib.util.find_spec(f"{module}.__main__"), module


def test_every_target_of_make_exists(document: str) -> None:
    text = DOCUMENTS[document]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in [*shell_lines(text), *inline_code(text)]:
        match = re.match(r"make ([\w-]+)", line)
        assert match is None or match[1] in targets, line


def test_every_extra_exists(document: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:hivtp|'\.)\[([\w,-]+)\]", DOCUMENTS[document]):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def test_every_file_that_is_named_exists(document: str) -> None:
    roots = "|".join((*PARTS, "tests", "examples", "docs"))
    for code in inline_code(DOCUMENTS[document]):
        if re.fullmatch(rf"(?:{roots})/[\w./-]+", code):
            assert (ROOT / code).exists(), code


def test_every_option_that_is_named_exists(document: str) -> None:
    known = FOREIGN | {f"--hivtp-{name}" for name in get_args(EngineName)}
    for module, _ in COMMANDS.values():
        parser = importlib.import_module(module).make_parser("hivtp")
        known |= set(parser._option_string_actions)
    for file in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "runtime/integrations").rglob("*.py")]:
        known |= set(re.findall(r"--[\w-]+", file.read_text(encoding="utf-8")))
    for code in inline_code(DOCUMENTS[document]):
        # Calls of other programs have options of their own.
        if code.startswith(("-", "hivtp")):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known, code


def test_every_script_that_is_named_exists(document: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for code in [*inline_code(DOCUMENTS[document]), *shell_lines(DOCUMENTS[document])]:
        for name in re.findall(r"^(?:\S*/)?(hivtp-\w+)(?= )", code):
            assert name in scripts, code


def test_the_map_lists_every_folder() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *PARTS, "tests", "examples"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a checkout")
    folders = {parent.as_posix() for file in tracked for parent in Path(file).parents} - {"."}
    mirrored = {
        folder
        for folder in folders
        if folder.startswith("tests/") and (folder.count("/") > 1 or folder.split("/")[1] not in OWN_FOLDERS)
    }
    listed = re.findall(r"^\| `([\w/]+)` \|", DOCUMENTS["docs/structure.md"], re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == folders - mirrored
    for folder in mirrored:
        source = folder.removeprefix("tests/")
        assert (ROOT / source).is_dir() or source.split("/")[0] in OWN_FOLDERS, folder


def test_the_bounds_are_those_of_the_code() -> None:
    vision = {
        name: [bound.relative_error, bound.importance_error, bound.min_jaccard]
        for name, bound in VISION_TOLERANCES.items()
    }
    assert numbers_of("vision graph") == vision
    assert numbers_of("decoder") == {name: [bound] for name, bound in LANGUAGE_TOLERANCES.items()}


def numbers_of(head: str) -> dict[str, list[float]]:
    """The numbers of a table of docs/exactness.md, by the first cell of each row."""
    [table] = re.findall(rf"^\| {head} \|.*?\n\n", DOCUMENTS["docs/exactness.md"], re.DOTALL | re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("page", EXCERPTED, ids=lambda page: page.name)
def test_the_tables_of_results_are_those_of_the_raw_samples(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / page.name
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    write_excerpts(RESULTS, copy)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "run make report"


def test_blocks_have_a_language() -> None:
    for name, text in DOCUMENTS.items():
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert len(fences) % 2 == 0, name
        assert set(fences[1::2]) <= {""}, name
        assert set(fences[::2]) <= {"", "sh", "python", "json"}, name
        assert all(blocks(text, language) for language in set(fences[::2]) - {""}), name
