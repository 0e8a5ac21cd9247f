from __future__ import annotations

import pytest

from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.inputs.templating.conversation import as_text, folded, merged

A, B = ImagePart("a"), ImagePart("b")


def user(*parts: str | ImagePart, keeps_places: bool = False) -> Message:
    return Message("user", parts, keeps_places)


def system(*parts: str) -> Message:
    return Message("system", parts)


def assistant(*parts: str) -> Message:
    return Message("assistant", parts)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("a"), user("b"), user("c")], [user("a\nb\nc")]),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ([system("a"), system("b"), user("c")], [system("a\nb"), user("c")]),
        ([assistant("a"), assistant("b"), user("c")], [assistant("a\nb"), user("c")]),
        ([user(A, "a"), user(B, "b")], [user(A, "a", B, "\nb")]),
        ([user("a", A), user("b")], [user("a", A, "\nb")]),
        ([user(A), user("b")], [user(A, "b")]),
        ([user(A), user(B)], [user(A, B)]),
        (
            [user("is ", A, keeps_places=True), user(B, " like it?", keeps_places=True)],
            [user("is ", A, "\n", B, " like it?", keeps_places=True)],
        ),
        # What the template would place first stands where it would have put it.
        ([user(A, "a"), user("is ", B, keeps_places=True)], [user(A, "\na\nis ", B, keeps_places=True)]),
        ([user("is ", B, keeps_places=True), user("a", A)], [user("is ", B, "\n", A, "\na", keeps_places=True)]),
        ([], []),
    ],
)
def test_successive_messages_of_one_role_become_one(messages: list[Message], expected: list[Message]) -> None:
    assert merged(messages) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([system("s"), user("u")], [user("s\nu")]),
        ([system("s"), user(A, "u")], [user(A, "s\nu")]),
        ([system("s"), user("u", A)], [user("s\nu", A)]),
        ([system("s"), user(A)], [user(A, "s\n")]),
        ([system("s"), user(A, " or ", B, keeps_places=True)], [user("s\n", A, " or ", B, keeps_places=True)]),
        ([system("s"), assistant("a"), user("u")], [assistant("a"), user("s\nu")]),
        ([user("u"), system("s"), user("v")], [user("u\ns\nv")]),
        ([user("u"), assistant("a"), system("s"), user("v")], [user("u"), assistant("a"), user("s\nv")]),
    ],
)
def test_system_messages_go_before_the_words_of_the_user(messages: list[Message], expected: list[Message]) -> None:
    assert folded(messages, keeps_first=False) == expected


def test_a_system_message_at_the_beginning_stays_where_there_is_a_place_for_it() -> None:
    messages = [system("s"), user("u"), assistant("a"), system("t"), user("v")]
    expected = [system("s"), user("u"), assistant("a"), user("t\nv")]
    assert folded(messages, keeps_first=True) == expected


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (user("a"), "a"),
        (user(A, "a"), "[IMG]\na"),
        (user("a", A, B), "[IMG]\n[IMG]\na"),
        (user("a ", A, " b", keeps_places=True), "a [IMG] b"),
        (user(A), "[IMG]\n"),
        (assistant("a", "b"), "ab"),
    ],
)
def test_images_stand_first_or_where_they_are_kept(message: Message, text: str) -> None:
    assert as_text(message, "[IMG]") == text


def test_nothing_given_is_changed() -> None:
    messages = [user("a"), user(A, "b")]
    merged(messages)
    folded([system("s"), *messages], keeps_first=False)
    assert messages == [user("a"), user(A, "b")]
