"""Output that goes nowhere: full disks, closed streams, readers that leave. Real commands, as a shell starts them."""

from __future__ import annotations

import json

import pytest

from hivtp.engines.bundle import Bundle
from tests.support.command import shell

RUN = 'hivtp run "$1" what --max-new-tokens 3'
FULL = ": cannot write the output: No space left on device\n"


@pytest.mark.parametrize("options", ["", "--json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_a_full_disk_loses_is_an_error(pruned_bundle, options, unbuffered):
    done = shell(f"PYTHONUNBUFFERED={unbuffered} {RUN} {options} > /dev/full", pruned_bundle)
    assert (done.returncode, done.stderr) == (1, f"hivtp run{FULL}")


def test_an_answer_of_a_chat_that_a_full_disk_loses_is_an_error(pruned_bundle):
    done = shell('echo what | hivtp chat "$1" --max-new-tokens 3 > /dev/full', pruned_bundle)
    assert done.returncode == 1
    assert done.stderr.endswith(f"\nhivtp chat{FULL}")


def test_an_answer_that_nobody_can_read_is_not_begun(pruned_bundle):
    done = shell(f"{RUN} >&-", pruned_bundle)
    message = "standard output is closed, so there is nowhere to write the answer; open it"
    assert (done.returncode, done.stderr) == (1, f"hivtp run: {message}\n")


def test_a_reader_that_leaves_ends_a_run_quietly(endless_bundle):
    done = shell(f"{RUN} --max-new-tokens 60000 | head -c 1 > /dev/null", endless_bundle)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_never_was_ends_a_run_quietly(pruned_bundle):
    done = shell(f"{RUN} | true", pruned_bundle)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_messages_that_nobody_can_read_cost_no_answer(pruned_bundle, photo, tmp_path, errors):
    script = f'{RUN} --image "$2" --json --overlay "$3" {errors}'
    done = shell(script, pruned_bundle, photo, tmp_path / "kept.png")
    assert done.returncode == 0
    # And they are not in the output in their place.
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    assert (tmp_path / "kept.png").is_file()


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_an_error_that_nobody_can_read_is_an_exit_code(errors):
    done = shell(f"hivtp run /nowhere what {errors}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("command", ["--help", "--version", "run --help", "chat --help", "export --help"])
@pytest.mark.parametrize(("output", "code"), [(">/dev/full", 1), ("| true", 141), (">&-", 0), ("2>&-", 0)])
def test_help_that_cannot_be_written_is_no_traceback(command, output, code):
    done = shell(f"hivtp {command} {output}")
    # `true` may leave before or after a short text, and argparse passes over what it cannot write at once.
    assert done.returncode in {0, code}
    if output == ">&-":
        # argparse shows the help of a command where it can be seen.
        assert done.stderr == "" or done.stderr.startswith(f"usage: hivtp {command.split()[0]}")
    else:
        assert done.stderr == "" or done.stderr.endswith("No space left on device\n") == (output == ">/dev/full")
        assert len(done.stderr.splitlines()) <= 1
    assert (done.stdout != "") == (output == "2>&-")


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("2>&1 | true", 0, None),
        (">&- 2>&-", 0, None),
        ("> /dev/full", 1, "hivtp-export: done, but the output could not be written: No space left on device"),
    ],
)
def test_a_bundle_is_whole_where_nobody_reads_what_is_said_of_it(tiny_checkpoint, tmp_path, output, code, message):
    script = f'PYTHONUNBUFFERED=1 hivtp-export "$1" "$2" --graph encoder {output}'
    done = shell(script, tiny_checkpoint, tmp_path / "bundle")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if message is not None:
        assert done.stderr.splitlines()[-1] == message
    assert Bundle.open(tmp_path / "bundle", check_hashes=True).manifest.family == "llava"
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_a_file_never_takes_the_place_of_a_closed_stream():
    """What a library prints would go into it."""
    script = """exec python -c 'import os, sys
from hivtp.main import main
from hivtp.runtime.cli import console
run = console.run_command
console.run_command = lambda *arguments: os.open(sys.argv[0], os.O_RDONLY) < 3
sys.argv = [sys.executable, "run"]
sys.exit(main())' <&- >&- 2>&-"""
    assert shell(script).returncode == 0
