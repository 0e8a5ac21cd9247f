"""docs/serving.md against the code: every option, field, metric, path and status that it names, and none left out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from hivtp.runtime.cli.serve import make_parser
from hivtp.runtime.language.base import kv_bytes_per_position
from hivtp.runtime.serving.protocol.chat_request import ACCEPTED, IGNORED, NEUTRAL
from hivtp.runtime.serving.settings import ServerSettings
from tests.support.answers import load
from tests.support.serving import serving

if TYPE_CHECKING:
    from tests.support.serving import Server

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def table(*head: str) -> list[list[str]]:
    """The rows of the one table with these titles."""
    lines = PAGE.splitlines()
    [start] = [place for place, line in enumerate(lines) if line == f"| {' | '.join(head)} |"]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert all(len(row) == len(head) for row in rows)
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def as_written(default: Any) -> str:
    """A default of the command line as the page writes it."""
    if default in (None, [], ()):
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 2**20 and default % 2**20 == 0:
        return f"{default // 2**20} MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_first_question_is_answered(server: Server, tmp_path: Path):
    [command] = re.findall(r"(?:^    .*\n)*^.*curl .*-d @-$", PAGE, re.MULTILINE)
    # Larger than what a command line may hold.
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    assert (tmp_path / "photo.jpg").stat().st_size > 2**18
    command = command.replace("curl http://127.0.0.1:8000", f"curl --noproxy '*' -s {server.url}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    usage = json.loads(done.stdout)["usage"]
    assert usage["prompt_tokens_details"]["unpruned_multimodal_tokens"]["image"] == 64


def test_every_option_has_its_row_and_its_default():
    actions = {one.option_strings[-1]: one for one in make_parser("hivtp serve")._actions if one.option_strings}
    del actions["--help"]
    found = {name: default for cell, default, _ in table("option", "default", "what it does") for name in names(cell)}
    # Of a flag the page says what it changes: it is off by default, whatever the setting is.
    expected = {name: "off" if one.nargs == 0 else as_written(one.default) for name, one in actions.items()}
    assert found == expected


def test_every_field_has_its_row_and_its_rule():
    found: dict[str, str] = {}
    for cell, rule in table("field", "rule"):
        for name in names(cell):
            assert name not in found, f"{name} has two rows"
            found[name] = rule.split()[0].rstrip(":,")
    expected = (
        dict.fromkeys(ACCEPTED, "accepted") | dict.fromkeys(NEUTRAL, "refused") | dict.fromkeys(IGNORED, "ignored")
    )
    assert found == expected


def test_what_a_refused_field_may_be(server: Server):
    """The value that its row allows is the one that is taken, and nothing else is."""
    values = {"0": 0, "false": False, "true": True, "1": 1, '`["text"]`': ["text"], "`none` or `auto`": "auto"}
    for cell, rule in table("field", "rule"):
        if not rule.startswith("refused"):
            continue
        allowed = rule.removeprefix("refused unless ") if "unless" in rule else None
        for name in names(cell):
            assert server.chat("what", **{name: ["odd"]}).status_code == 400, name
            if allowed == "empty":
                neutral: Any = NEUTRAL[name][0]
                assert len(neutral) == 0
            elif allowed is not None:
                neutral = values[allowed]
            else:
                assert NEUTRAL[name] == ()
                neutral = None
            assert server.chat("what", **{name: neutral}).status_code == 200, name


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_is_ignored_is_named(server: Server, name: str):
    response = server.chat("what", max_tokens=1, **{name: "anything"})
    assert (response.status_code, response.headers["hivtp-ignored"]) == (200, name)


def test_every_metric_has_its_row(server: Server):
    text = server.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (hivtp:\w+) (\w+)$", text, re.MULTILINE))
    # Older clients of Prometheus name a counter without its ending, and tell beside it when it began.
    counted = {
        name if kind != "counter" or name.endswith("_total") else f"{name}_total": kind
        for name, kind in kinds.items()
        if not name.endswith("_created")
    }
    found = {name: kind for cell, kind, _ in table("metric", "kind", "what it is") for name in names(cell)}
    assert found == counted


def test_every_path_is_served_with_and_without_a_key(pruned_bundle: Path):
    with serving(load(pruned_bundle).model, api_keys=("secret",), model_names=("hivtp",)) as server:
        for cell, _, needs_key in table("path", "what it gives", "key"):
            first, *others = names(cell)
            method, _, path = first.partition(" ")
            for one in (path, *others):
                url = one.replace("{name}", "hivtp")
                status = server.client.request(method, url).status_code
                assert (status == 401) == (needs_key == "yes"), one
                status = server.client.request(method, url, headers={"authorization": "Bearer secret"}).status_code
                assert status in ((415,) if method == "POST" else (200,)), one


def test_every_status_of_the_server_is_explained():
    """Those that the code raises, by what it writes."""
    folder = ROOT / "runtime" / "serving"
    code = "".join(file.read_text() for file in folder.rglob("*.py"))
    # `invalid` gives 400, and Starlette itself 405.
    raised = set(map(int, re.findall(r"ApiError\(\s*(\d{3})\b", code))) | {400, 405}
    written = {int(number) for cell, _ in table("status", "when") for number in re.findall(r"\d{3}", cell)}
    assert written == raised


def test_the_memory_of_a_position_is_what_the_example_says():
    class Llava7B:
        num_layers, num_kv_heads, head_size = 32, 32, 128

    manifest: Any = Llava7B()
    assert kv_bytes_per_position(manifest, 4) == 2**20
    assert kv_bytes_per_position(manifest, 2) == 2**19
    positions, unpruned = 192 + 60 + 512, 576 + 60 + 512
    assert f"{positions} MiB" in PAGE
    assert f"{unpruned:,} MiB" in PAGE
    assert f"--max-kv-bytes {4 * 2**30}" in PAGE
    assert 4 * positions < 4 * 1024


def test_bounds_without_an_option_are_those_of_the_settings():
    settings = ServerSettings()
    paragraph = next(part for part in PAGE.split("\n\n") if part.startswith("Bounds without an option"))
    for text in (
        f"headers of {settings.max_header_bytes // 2**10} KiB within {settings.header_seconds:g} seconds",
        f"{settings.max_waiting_bytes // 2**20} MiB of requests",
        f"{settings.max_prepared} requests whose images",
    ):
        assert text in paragraph.replace("\n", " ")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", PAGE))))
def test_links_lead_somewhere(link: str):
    if not link.startswith("http"):
        assert (ROOT / "docs" / link.partition("#")[0]).exists()
