"""A conversation through pipes, and in a terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hivtp import SamplingParams
from tests.support.command import COMMAND, hivtp, shell
from tests.support.terminal import Terminal

if TYPE_CHECKING:
    from hivtp import Pipeline

EIGHT = ("--max-new-tokens", "8")
SAMPLING = SamplingParams(max_new_tokens=8)
GREETING = "Ask about an image: /image FILE, then a question. /help shows all commands.\n"
PROMPT = "\n> "
FORGOTTEN = "\nStopped; this question and its answer are forgotten.\n> "


def chat(bundle: Path, *lines: object, options: tuple[object, ...] = EIGHT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "chat", bundle, *map(str, options)],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def answers(pipeline: Pipeline, *turns: tuple[str, list[Path]], system: str | None = None) -> str:
    conversation = pipeline.chat(system)
    return "".join(f"{conversation.ask(words, images, SAMPLING).text}\n" for words, images in turns)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What is said beside the answers, without the times."""
    assert done.stderr.startswith(GREETING)
    return [line for line in done.stderr.removeprefix(GREETING).splitlines() if "[first token after" not in line]


def test_through_pipes_only_the_answers_are_output(pruned_bundle, pruned, photo):
    done = chat(pruned_bundle, "how many dogs", f"/image {photo}", "what is it", "", "and where", options=EIGHT)
    expected = answers(pruned, ("how many dogs", []), ("what is it", [photo]), ("and where", []))
    assert (done.returncode, done.stdout) == (0, expected)
    assert messages(done) == [f"{photo}: 512 x 512 pixels, for the next question."]
    assert done.stderr.count("[first token after ") == 3
    assert ">" not in done.stderr


def test_images_system_and_sampling_may_be_given_at_the_start(pruned_bundle, pruned, photo):
    done = chat(pruned_bundle, "what is it", options=(*EIGHT, "--image", photo, "--system", "Be brief."))
    assert done.stdout == answers(pruned, ("what is it", [photo]), system="Be brief.")


def test_several_images_go_with_one_question(pruned_bundle, pruned, photo, photos):
    coffee = photos / "coffee.png"
    question = "is <image> like <image>"
    done = chat(pruned_bundle, f"/image {photo}", f"/image {coffee}", question, "why")
    assert done.stdout == answers(pruned, (question, [photo, coffee]), ("why", []))


def test_a_reset_begins_a_new_conversation_without_images(pruned_bundle, pruned, photo):
    done = chat(pruned_bundle, f"/image {photo}", "what", f"/image {photo}", "/reset", "how many dogs")
    assert done.stdout == answers(pruned, ("what", [photo])) + answers(pruned, ("how many dogs", []))
    assert messages(done)[-1] == "A new conversation."


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(pruned_bundle, pruned, photo, tmp_path):
    (tmp_path / "words.png").write_text("words")
    lines = [
        "/image",
        f"/image {tmp_path / 'absent.png'}",
        f"/image {tmp_path / 'words.png'}",
        f"/image {tmp_path}",
        "/image -",
        "/picture",
        "is <image> red",
        "what " * 600,
        f"  /image '{photo}'  ",
        "what is it",
        "/quit",
        "never read",
    ]
    done = chat(pruned_bundle, *lines)
    assert (done.returncode, done.stdout) == (0, answers(pruned, ("what is it", [photo])))
    for message, part in zip(
        messages(done),
        [
            "Which image? /image FILE",
            "there is no image file",
            "not an image, or a damaged one",
            "is a directory",
            "standard input gives the questions; give the image as a file",
            "There is no command /picture; /help shows all.",
            "has 1 <image> marks and 0 images were given",
            "start a new chat",
            "512 x 512 pixels, for the next question.",
        ],
        strict=True,
    ):
        assert part in message


def test_a_question_may_begin_with_a_path(pruned_bundle, pruned):
    assert chat(pruned_bundle, "/usr/bin is what?").stdout == answers(pruned, ("/usr/bin is what?", []))


def test_help_shows_the_commands(pruned_bundle):
    shown = "\n".join(messages(chat(pruned_bundle, "/help")))
    for command in ("/image FILE", "/reset", "/help", "/quit"):
        assert command in shown
        assert command in hivtp("chat", "--help").stdout


def test_input_that_is_not_utf_8_is_read_as_far_as_it_is(pruned_bundle, pruned):
    done = shell("""printf 'what \\xff is' | hivtp chat "$1" --max-new-tokens 8""", pruned_bundle)
    assert done.returncode == 0
    assert done.stdout == answers(pruned, ("what \ufffd is", []))


def test_an_image_at_the_start_that_cannot_be_read_ends_it_before_the_model_is_loaded(tmp_path):
    done = hivtp("chat", tmp_path, "--image", tmp_path / "absent.png")
    assert done.returncode == 1
    assert done.stderr == f"hivtp chat: there is no image file '{tmp_path / 'absent.png'}'\n"


def test_an_image_may_come_through_a_named_pipe(pruned_bundle, pruned, photo):
    script = 'echo "what is it" | hivtp chat "$1" --max-new-tokens 8 --image <(cat "$2")'
    assert shell(script, pruned_bundle, photo).stdout == answers(pruned, ("what is it", [photo]))


@pytest.fixture
def terminal(pruned_bundle, photo, tmp_path):
    shutil.copy(photo, tmp_path / "photo.png")
    with Terminal([COMMAND, "chat", pruned_bundle, *EIGHT], tmp_path) as terminal:
        terminal.read_until(PROMPT)
        yield terminal


def test_in_a_terminal_lines_are_edited_and_remembered(terminal):
    terminal.type("what are\x7f\x7fs it\r")
    terminal.read_until("\n")
    first = terminal.read_until("[first token after")
    terminal.read_until(PROMPT)
    terminal.type("/reset\r")
    terminal.read_until(PROMPT)
    terminal.type("\x1b[A\x1b[A")
    terminal.read_until("what as it")
    terminal.type("\r")
    terminal.read_until("\n")
    assert terminal.read_until("[first token after").endswith(first)
    terminal.read_until(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_in_a_terminal_names_of_files_are_completed(terminal):
    terminal.type("/image pho\t\r")
    terminal.read_until("photo.png: 512 x 512 pixels, for the next question.\n")
    terminal.read_until("> ")
    terminal.type("/quit\r")
    assert terminal.wait() == 0


def test_in_a_terminal_control_characters_of_an_answer_do_nothing(terminal, pruned):
    terminal.type("how many dogs\r")
    terminal.read_until("how many dogs\n")
    shown = terminal.read_until("[first token after")
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert len(shown) == len(answers(pruned, ("how many dogs", []))) + len("[first token after")


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_leaves(terminal):
    terminal.type("half a quest")
    terminal.read_until("half a quest")
    terminal.type("\x03")
    terminal.read_until(PROMPT)
    terminal.type("/help\r")
    terminal.read_until("/quit")
    terminal.read_until(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(endless_bundle, tmp_path, photo):
    shutil.copy(photo, tmp_path / "photo.png")
    command = [COMMAND, "chat", endless_bundle, "--max-new-tokens", "60000", "--image", "photo.png"]
    with Terminal(command, tmp_path) as terminal:
        terminal.read_until(PROMPT)
        for _ in range(2):
            terminal.type("what is it\r")
            terminal.read_until("what is it\n")
            terminal.read_until("a", seconds=60)
            terminal.type("\x03")
            terminal.read_until(FORGOTTEN)
        # The image is still there for the question that was not answered.
        terminal.type("is <image> red\r")
        terminal.read_until("is <image> red\n")
        terminal.read_until("a")
        terminal.type("\x03")
        terminal.read_until(FORGOTTEN)
        children = terminal_children(terminal.pid)
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown
    assert len(children) == 1, "Ctrl-C did not reach the process that renders the chat template"


def terminal_children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_ctrl_c_while_the_model_loads_leaves(pruned_bundle, tmp_path):
    with Terminal([COMMAND, "chat", pruned_bundle], tmp_path) as terminal:
        # Its own code has begun.
        while not is_importing(terminal.pid):
            time.sleep(0.001)
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert terminal.shown.endswith("\nhivtp chat: stopped\n")
    assert "Traceback" not in terminal.shown


def is_importing(pid: int) -> bool:
    """Whether a process is the command by now, and has loaded its first large library."""
    folder = Path(f"/proc/{pid}")
    return b"\0chat\0" in (folder / "cmdline").read_bytes() and "numpy" in (folder / "maps").read_text()


def test_answers_piped_on_from_a_terminal_are_alone(pruned_bundle, pruned, tmp_path):
    """The prompt and all messages are on standard error."""
    script = f"exec {COMMAND} chat {pruned_bundle} --max-new-tokens 8 > {tmp_path / 'answers'}"
    with Terminal(["/bin/bash", "-c", script], tmp_path) as terminal:
        terminal.read_until(PROMPT)
        terminal.type("how many dogs\r")
        terminal.read_until("[first token after")
        terminal.read_until(PROMPT)
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert (tmp_path / "answers").read_text() == answers(pruned, ("how many dogs", []))


def test_a_terminal_gives_no_image(pruned_bundle, tmp_path):
    with Terminal([COMMAND, "run", pruned_bundle, "what", "--image", "-"], tmp_path) as terminal:
        assert terminal.wait() == 1
    assert terminal.shown.endswith("hivtp run: standard input is a terminal; pipe an image into it, or give a file\n")


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    """readline would read them."""
    monkeypatch.setitem(os.environ, "INPUTRC", os.devnull)
