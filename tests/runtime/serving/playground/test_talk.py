"""Questions, answers as they stream, stopping, and errors shown as what they are."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.miniature.pictures import HELD_OUT, draw
from tests.support.browser import encoded
from tests.support.serving import asking, random_image, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page, Route

    from hivtp import Pipeline
    from tests.support.browser import Playground
    from tests.support.serving import Server

pytestmark = pytest.mark.browser


def words_of(page: Page) -> str:
    return page.locator(".turn .words").last.inner_text()


def test_answers_are_those_of_the_model(shapes: Server, open_page: Callable[..., Playground]):
    picture = draw(HELD_OUT[7])
    image = encoded(picture.image)
    playground = open_page(shapes)
    playground.add(image)
    right = 0
    for number, question in enumerate(picture.questions):
        if number:
            playground.page.click("#restart")
            playground.add(image)
        answer = playground.ask(question.text)
        assert answer == shapes.answer(asking(question.text, image), max_tokens=20)
        right += answer == question.answer
    assert right >= 6


def test_a_conversation_goes_on(shapes: Server, open_page: Callable[..., Playground]):
    playground = open_page(shapes)
    playground.add(encoded(draw(HELD_OUT[7]).image))
    first = playground.ask("What colour is the cross?")
    playground.ask("Which shape is white?")
    messages = playground.requests[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0] == playground.requests[0]["messages"][0]
    assert messages[1]["content"] == first
    assert messages[2]["content"] == "Which shape is white?"
    # The server had the first turn already.
    figures = playground.page.locator(".figures").last
    figures.locator("summary").click()
    assert re.search(r"Prompt: \d+ tokens, \d+ of them known from before", figures.inner_text())
    assert "144 → 72 image tokens" in figures.inner_text()
    playground.page.click("#restart")
    assert playground.page.locator(".turn").count() == 0
    assert playground.page.locator("#empty").is_visible()


def test_an_answer_streams_with_its_figures(talker: Server, open_page: Callable[..., Playground], slowly: None):
    assert slowly is None
    playground = open_page(talker)
    page = playground.page
    page.locator("#settings summary").click()
    page.fill("#max_tokens", "40")
    playground.add(random_image(1))
    playground.ask("what is it", waits=False)
    page.wait_for_selector(".turn.running .words:not(:empty)")
    early = words_of(page)
    # What was kept is shown while the answer still comes.
    assert page.locator("#tokens").is_visible()
    page.wait_for_selector(".turn:not(.running)")
    whole = words_of(page)
    assert len(early) < len(whole)
    assert whole.startswith(early.rstrip())
    assert whole.split() == talker.answer(asking("what is it", random_image(1)), max_tokens=40).split()
    assert "Cut at the limit of 40 tokens." in page.locator(".turn").last.inner_text()
    # All of it was said to a screen reader, once.
    assert page.locator("#spoken").inner_text().split() == whole.split()

    summary = page.locator(".figures summary").inner_text()
    found = re.fullmatch(r"(\d[\d.]* m?s) to the first token · ([\d.]+) tokens/s · 40 tokens", summary)
    assert found
    # At 0.03 seconds for each token.
    assert 5 < float(found[2]) < 34
    page.locator(".figures summary").click()
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator(".figures tbody tr").all()]
    assert [row[0] for row in rows] == [
        "Time to the first token",
        "Tokens per second",
        "Waiting for others",
        "Reading the images",
        "Vision encoder and pruning",
        "Prefill of the prompt",
    ]
    assert rows[0][1] == found[1]
    assert float(rows[1][1]) == float(found[2])
    assert float(rows[1][2].replace(",", "")) > 1
    assert all(re.fullmatch(r"\d[\d.]* m?s", row[2]) for row in rows if "second" not in row[0])


def test_settings_are_sent_and_kept_to(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    page = playground.page
    defaults = page.evaluate(
        "['temperature', 'top_p', 'max_tokens'].map((id) => document.getElementById(id).placeholder)"
    )
    assert defaults == ["0", "1", str(talker.service.max_tokens)]
    playground.ask("what is it", waits=False)
    page.click("#send")
    page.wait_for_selector(".turn:not(.running)")
    assert set(playground.requests[-1]) == {"model", "messages", "stream", "stream_options", "hivtp"}

    page.locator("#settings summary").click()
    values = {"temperature": "0.7", "top_p": "0.9", "top_k": "5", "repetition_penalty": "1.1", "max_tokens": "6"}
    values["seed"] = "3"
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.fill("#system", "be brief")
    playground.ask("how many")
    sent = playground.requests[-1]
    assert {name: sent[name] for name in values} == {name: float(value) for name, value in values.items()}
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    assert "6 tokens" in page.locator(".figures summary").last.inner_text()
    # What no server would take is not sent; its field is seen even if it was folded away.
    page.fill("#top_p", "3")
    page.locator("#settings summary").click()
    number = len(playground.requests)
    page.fill("#question", "what")
    page.click("#send")
    page.wait_for_selector("#top_p", state="visible")
    page.wait_for_function("document.activeElement.id === 'top_p'")
    assert len(playground.requests) == number


@pytest.mark.parametrize("how", ["button", "key", "start over", "leaving"])
def test_stopping_gives_the_slot_back(endless: Pipeline, open_page: Callable[..., Playground], slowly: None, how: str):
    assert slowly is None
    with serving(endless.model, model_names=("talker",)) as server:
        playground = open_page(server)
        page = playground.page
        playground.add(random_image(2))
        playground.ask("what is it", waits=False)
        page.wait_for_selector(".turn.running .words:not(:empty)")
        assert server.service.engine.state.num_running == 1
        started = time.monotonic()
        match how:
            case "button":
                assert page.locator("#send").inner_text() == "Stop"
                page.click("#send")
            case "key":
                page.locator("#question").press("Escape")
            case "start over":
                page.click("#restart")
            case "leaving":
                page.goto("about:blank")
        server.wait_until_idle(3)
        # The whole answer would have taken more than ten seconds.
        assert time.monotonic() - started < 3
        assert server.metric("request_failures_total", code="client_gone") == 1
        if how == "leaving":
            page.go_back()
            return
        assert page.locator("#send").inner_text() == "Ask"
        if how == "start over":
            assert page.locator(".turn").count() == 0
            return
        page.wait_for_selector(".turn:not(.running)")
        part = words_of(page)
        assert "Stopped." in page.locator(".turn").inner_text()
        assert page.locator("#tokens").is_visible()
        # The conversation goes on from what was said.
        playground.ask("how many", waits=False)
        page.wait_for_selector(".turn:nth-child(2).running .words:not(:empty)")
        page.click("#send")
        said = playground.requests[-1]["messages"][1]
        assert said["role"] == "assistant"
        assert said["content"].split() == part.split()


def test_stopped_before_the_first_word(
    endless: Pipeline, open_page: Callable[..., Playground], monkeypatch: pytest.MonkeyPatch
):
    encode = type(endless.model).encode_images

    def slow(model: object, images: object) -> object:
        time.sleep(1)
        return encode(model, images)

    monkeypatch.setattr(type(endless.model), "encode_images", slow)
    with serving(endless.model, max_tokens=4) as server:
        playground = open_page(server)
        playground.add(random_image(3))
        playground.ask("what is it", waits=False)
        wait_for(lambda: server.service.admission.num_inside == 1)
        playground.page.click("#send")
        playground.page.wait_for_selector(".turn.failed")
        assert "Stopped before the first word." in playground.page.locator(".turn").inner_text()
        server.wait_until_idle(5)
        # It may be asked again, image and all.
        assert playground.page.input_value("#question") == "what is it"
        playground.page.click("#send")
        playground.page.wait_for_selector(".turn:not(.running) .figures")
        assert playground.page.locator(".turn").count() == 1
        assert len(playground.requests[-1]["messages"][0]["content"]) == 2


def test_a_busy_server_says_when_to_come_back(endless: Pipeline, open_page: Callable[..., Playground], slowly: None):
    assert slowly is None
    with serving(endless.model, num_slots=1, max_queued=0, max_tokens=200) as server:
        playground = open_page(server)
        page = playground.page
        with server.open_stream("how many", max_tokens=200, ignore_eos=True) as stream:
            lines = stream.iter_lines()
            next(lines)
            playground.add(random_image(4))
            playground.ask("what is it")
            assert "The server is busy" in playground.error
            assert re.search(r"There may be room in \d+ seconds?\.", playground.error)
            assert "429 · queue_full" in playground.error
            again = page.get_by_role("button", name="Ask again")
            assert re.fullmatch(r"Ask again \(\d+ s\)", again.inner_text())
        server.wait_until_idle()
        again.click()
        page.wait_for_selector(".turn .words:not(:empty)")
        page.wait_for_selector(".turn:not(.running)", timeout=60_000)
        assert page.locator(".error").count() == 0
        assert len(playground.requests[-1]["messages"][0]["content"]) == 2


def test_a_body_too_large_is_refused_in_words(endless: Pipeline, open_page: Callable[..., Playground]):
    noise = random_image(5, 600, 600, "BMP")
    with serving(endless.model, max_body_bytes=100_000) as server:
        playground = open_page(server)
        playground.add(noise, names=("noise.bmp",))
        playground.ask("what is it")
        # The page knows it before it sends anything.
        assert playground.error.startswith("Too large\n")
        assert "takes 97.7 KiB" in playground.error
        assert playground.requests == []

        def lie(route: Route) -> None:
            response = route.fetch()
            card = response.json()
            card["data"][0]["limits"]["body_bytes"] = 10**9
            route.fulfill(response=response, json=card)

        other = open_page(server)
        other.context.route("**/v1/models", lie)
        other.page.reload()
        other.page.wait_for_selector("#model span")
        other.add(noise, names=("noise.bmp",))
        other.ask("what is it")
        # And it knows what to make of the server's own word.
        assert other.error.startswith("Too large\n")
        assert "413 · body_too_large" in other.error


def test_a_context_too_short(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    playground.ask("what is it " * 300)
    assert playground.error.startswith("The conversation is too long\n")
    assert "400 · context_length_exceeded" in playground.error


def test_an_error_names_the_image_as_the_user_does(talker: Server, open_page: Callable[..., Playground]):
    # A browser shows an image of one row, and the server does not take it.
    playground = open_page(talker)
    playground.add(random_image(6, 64, 64), random_image(7, 64, 1), names=("whole.png", "line.png"))
    playground.ask("what is it")
    assert playground.error.startswith("The server did not take this\n")
    assert "\nline.png: 64 x 1 pixels are too few; send at least 2 on each side.\n" in playground.error


def test_a_damaged_image_that_a_browser_shows_in_part(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    playground.add(random_image(9, 200, 200)[:-60], names=("half.png",))
    playground.ask("what is it")
    assert "\nhalf.png: " in playground.error
    assert "a damaged one" in playground.error
    # Without it the question can be asked.
    playground.page.get_by_role("button", name="Remove half.png").click()
    playground.page.get_by_role("button", name="Ask again").click()
    playground.page.wait_for_selector(".turn .words:not(:empty)")
    assert playground.requests[-1]["messages"][0]["content"] == "what is it"


def test_a_server_that_is_gone(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    playground.context.set_offline(True)
    playground.ask("what is it")
    assert playground.error.startswith("The server cannot be reached\n")
    playground.context.set_offline(False)
    assert playground.page.input_value("#question") == "what is it"


def test_a_server_that_ends_while_it_answers(endless: Pipeline, open_page: Callable[..., Playground], slowly: None):
    assert slowly is None
    with serving(endless.model) as server:
        playground = open_page(server)
        playground.ask("what is it", waits=False)
        playground.page.wait_for_selector(".turn.running .words:not(:empty)")
        server.service.given_up.get_loop().call_soon_threadsafe(server.service.give_up)
        playground.page.wait_for_selector(".turn .error")
        assert "shutting down" in playground.error
        assert words_of(playground.page)
        playground.ask("how many")
        assert playground.error.startswith("The server is not ready\n")
        assert "503 · shutting_down" in playground.error


def test_what_the_model_writes_is_text(talker: Server, open_page: Callable[..., Playground]):
    text = '<img src=x onerror="document.title=1"><script>document.title=2</script> &amp; **b**\n  <b>'
    usage = {"completion_tokens": 2, "prompt_tokens": 1, "prompt_tokens_details": {}}
    usage["prompt_tokens_details"] = {
        "cached_tokens": 0,
        "multimodal_tokens": {"image": 0},
        "unpruned_multimodal_tokens": {"image": 0},
    }

    def answer(route: Route) -> None:
        delta = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], "usage": usage}
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (delta, last))
        route.fulfill(body=f": keep-alive\n\n{events}data: [DONE]\n\n", content_type="text/event-stream")

    playground = open_page(talker)
    playground.context.route("**/v1/chat/completions", answer)
    playground.ask("<i>what</i> is it")
    assert playground.page.locator(".words").evaluate("element => element.textContent") == text
    assert playground.page.locator(".words *, .asked i, #spoken img").count() == 0
    assert playground.page.title() == "hivtp playground"


def test_an_answer_that_breaks_off_is_no_answer(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    playground.context.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=": keep-alive\n\n", content_type="text/event-stream"),
    )
    playground.ask("what is it")
    assert playground.error.startswith("The answer broke off\n")
    playground.context.unroute("**/v1/chat/completions")
    playground.context.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>bad gateway")
    )
    playground.ask("what is it")
    assert playground.error.startswith("The server failed\n")
    assert "502" in playground.error


def test_a_key_is_asked_for_and_not_kept(endless: Pipeline, open_page: Callable[..., Playground]):
    with serving(endless.model, api_keys=("right-key",), max_tokens=4) as server:
        playground = open_page(server)
        page = playground.page
        page.wait_for_selector("#key-form:not([hidden])")
        assert "tokens" not in page.locator("body").inner_text()
        for key, answer in (("wrong-key", "does not know this key"), ("schlüssel", "ASCII")):
            page.fill("#key", key)
            page.locator("#key").press("Enter")
            page.wait_for_selector(f"#key-note:has-text('{answer}')")
        page.fill("#key", "right-key")
        page.locator("#key").press("Enter")
        page.wait_for_selector("#model span")
        assert not page.locator("#key-form").is_visible()
        assert page.evaluate("document.activeElement.id") == "question"
        playground.add(random_image(8))
        assert playground.ask("what is it")
        stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert stored == [0, 0, "", f"{server.url}/"]
        page.reload()
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.input_value("#key") == ""
