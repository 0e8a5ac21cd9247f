"""The page on a phone, from the keyboard alone, for screen readers, in the dark, and without motion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.miniature.pictures import HELD_OUT, draw
from tests.support.browser import encoded
from tests.support.serving import random_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from tests.support.browser import Playground
    from tests.support.serving import Server

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
CONTROLS = "a, button, input:not([type=file]), textarea, summary, canvas[tabindex]"

# Every visible text with less contrast than WCAG's 4.5 to 1.
FAINT = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(at).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !element.checkVisibility({ visibilityProperty: true })) continue;
    const a = light(channels(getComputedStyle(element).color).slice(0, 3));
    const b = light(groundOf(element));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push([element.textContent.trim().slice(0, 40), contrast.toFixed(2)]);
  }
  return found;
}"""

NAMELESS = """(controls) => [...document.querySelectorAll(controls)]
  .filter((element) => element.checkVisibility())
  .filter((element) => {
    const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
    return !(element.getAttribute("aria-label") || labels || element.textContent).trim();
  })
  .map((element) => element.outerHTML.slice(0, 80))"""

SMALL = """(controls) => [...document.querySelectorAll(controls)]
  .filter((element) => element.checkVisibility() && !element.closest(".skip") && !element.matches(".skip"))
  .map((element) => [element.outerHTML.slice(0, 60), (element.closest("label") ?? element).getBoundingClientRect()])
  .filter(([, box]) => Math.min(box.width, box.height) < 24 || box.left < 0 || box.right > innerWidth + 0.5)
  .map(([words, box]) => `${words} ${box.width} x ${box.height} at ${box.left}`)"""


def ask_about_shapes(playground: Playground) -> str:
    picture = draw(HELD_OUT[7])
    playground.add(encoded(picture.image))
    answer = playground.ask("What colour is the cross?")
    assert answer == "purple"
    return answer


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(shapes: Server, open_page: Callable[..., Playground], scheme: str):
    playground = open_page(shapes, color_scheme=scheme)
    page = playground.page
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")
    assert page.evaluate(FAINT) == []
    ask_about_shapes(playground)
    page.locator(".figures summary").click()
    page.locator("#settings summary").click()
    playground.set_stage("global")
    page.check("#scores")
    page.set_input_files("#file", [{"name": "x.png", "mimeType": "", "buffer": b"words"}])
    page.wait_for_selector(".note")
    playground.context.set_offline(True)
    playground.ask("Which shape is white?")
    assert page.locator(".error").is_visible()
    assert page.evaluate(FAINT) == []
    assert page.evaluate(NAMELESS, CONTROLS) == []
    playground.context.set_offline(False)


def test_a_phone(shapes: Server, open_page: Callable[..., Playground]):
    playground = open_page(shapes, **PHONE)
    page = playground.page

    def fits() -> None:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
        assert page.evaluate(SMALL, CONTROLS) == []

    fits()
    picture = draw(HELD_OUT[7])
    playground.add(encoded(picture.image))
    fits()
    # This key begins a new line here, and the button sends.
    page.locator("#question").tap()
    page.keyboard.type("What colour is the cross?")
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0
    page.locator("#send").tap()
    page.wait_for_selector(".turn:not(.running)")
    assert playground.answer == "purple"
    assert page.locator(".turn .words").is_visible()
    fits()
    # The image is above what is seen now; one tap leads to it, and the question stays at hand.
    page.get_by_role("button", name="Show the patches").tap()
    box = page.locator("#canvas").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < 740
    assert box["width"] > 300
    send = page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= 740
    page.locator("[data-stage='2']").tap()
    assert "window" in page.locator("#explanation").inner_text()
    page.locator("#settings summary").tap()
    fits()
    page.locator("#seed").tap()
    assert page.locator("#seed").is_visible()


def has_visible_focus(page: Page) -> bool:
    """Whether the page looks otherwise where the focus is, beside a caret."""
    hide = "document.activeElement.style.caretColor = 'transparent'"
    page.evaluate(hide)
    with_focus = page.screenshot(animations="disabled")
    page.evaluate("window.had = document.activeElement; document.activeElement.blur()")
    without = page.screenshot(animations="disabled")
    page.evaluate("window.had.focus({ preventScroll: true })")
    return with_focus != without


def test_the_keyboard_alone(shapes: Server, open_page: Callable[..., Playground]):
    playground = open_page(shapes)
    page = playground.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the question"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        # Chromium takes a moment to hand its dialogs over.
        page.wait_for_timeout(300)
        page.keyboard.press("Enter")
    image = encoded(draw(HELD_OUT[7]).image)
    chooser.value.set_files([{"name": "shapes.png", "mimeType": "image/png", "buffer": image}])
    page.wait_for_selector("#strip li")
    # The question comes next, without a further key.
    page.keyboard.type("What colour")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("is the cross?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn:not(.running)")
    assert playground.answer == "purple"
    assert playground.requests[-1]["messages"][0]["content"][1]["text"] == "What colour\nis the cross?"

    page.evaluate("document.activeElement.blur(); document.querySelector('.skip').focus()")
    order: list[Any] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
        )
        if name in order or name == "BODY":
            break
        if name == "stage":
            page.keyboard.press("ArrowLeft")
            assert "regions" in page.locator("#explanation").inner_text()
        if name == "scores":
            page.keyboard.press("Space")
            assert page.locator("#ramp").is_visible()
        if name == "canvas":
            page.keyboard.press("ArrowRight")
            assert page.locator("#readout").inner_text().startswith("Row ")
        order.append(name)
        assert has_visible_focus(page), name
    first = ["canvas", "stage", "scores", "attached", "SUMMARY", "question", "attach", "restart", "send"]
    assert order[: len(first)] == first


def test_a_screen_reader_hears_sentences(talker: Server, open_page: Callable[..., Playground], slowly: None):
    assert slowly is None
    playground = open_page(talker)
    page = playground.page
    page.locator("#settings summary").click()
    page.fill("#max_tokens", "30")
    playground.add(random_image(1))
    page.evaluate("""window.heard = []; new MutationObserver((changes) => {
      for (const change of changes) for (const node of change.addedNodes) window.heard.push(node.textContent);
    }).observe(document.getElementById("spoken"), { childList: true, subtree: true });""")
    playground.ask("what is it")
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    heard = page.evaluate("window.heard")
    assert 1 <= len(heard) < 15
    assert " ".join(heard).split() == playground.answer.split()
    # What moves with each token is not read out.
    assert page.evaluate("document.querySelector('.words').closest('[aria-live]')") is None
    page.locator("#canvas").focus()
    described = page.locator("#canvas").get_attribute("aria-label")
    assert described.startswith("a.png: ")
    assert "patches kept. Arrow keys" in described


def test_nothing_moves_where_nothing_shall(talker: Server, open_page: Callable[..., Playground], slowly: None):
    assert slowly is None
    moves = "getComputedStyle(document.querySelector('.running .status'), '::before').animationName"
    for motion, name in (("no-preference", "pulse"), ("reduce", "none")):
        playground = open_page(talker, reduced_motion=motion)
        playground.ask("what is it", waits=False)
        playground.page.wait_for_selector(".turn.running .status")
        assert playground.page.evaluate(moves) == name
        playground.page.keyboard.press("Escape")
        playground.page.wait_for_selector(".turn:not(.running)")
