"""A server of a model on a free port of this machine, in a thread, and what tests say to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from PIL import Image

from hivtp.runtime.serving.app import create_app
from hivtp.runtime.serving.server import make_server
from hivtp.runtime.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.flow.service import Service

CHAT = "/v1/chat/completions"


class Server:
    """A running server."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def chat(self, content: Any, **fields: Any) -> httpx.Response:
        """The response to one question of the user."""
        return self.client.post(CHAT, json=body(content, **fields))

    def answer(self, content: Any, **fields: Any) -> str:
        """The words of the answer to one question."""
        response = self.chat(content, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def stream(self, content: Any, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer, without [DONE], which must come last."""
        response = self.chat(content, stream=True, **fields)
        assert response.status_code == 200, response.text
        *events, done = response.content.decode().removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events if event != ": keep-alive"]

    def open_stream(self, content: Any, **fields: Any) -> contextlib.AbstractContextManager[httpx.Response]:
        """A stream that the caller reads, and may leave."""
        return self.client.stream("POST", CHAT, json=body(content, stream=True, **fields))

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.client.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            kind, _, found = head.partition("{")
            if kind == f"hivtp:{name}" and wanted <= set(found.rstrip("}").split(",")):
                return float(value)
        raise AssertionError(f"no metric {name} {labels}")

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Wait until nothing is answered, and no slot is taken."""
        wait_for(lambda: self.service.admission.num_inside == 0 and self.service.engine.state.num_running == 0, seconds)

    def raw(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextlib.contextmanager
def serving(model: Model, *, waits: bool = True, **settings: Any) -> Iterator[Server]:
    """Serve a model while the block runs; it begins when the server is ready, or with `waits=False` when it listens."""
    chosen = ServerSettings(port=0, **settings)
    app = create_app(model, chosen)
    server = make_server(app, chosen)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started and (not waits or app.service.state != "loading"), 60)
    found = Server(app.service, server.servers[0].sockets[0].getsockname()[1])
    try:
        yield found
    finally:
        found.client.close()
        # What a test holds up must not hold up the end.
        if not app.service.given_up.done():
            app.service.given_up.get_loop().call_soon_threadsafe(app.service.give_up)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def body(content: Any, **fields: Any) -> dict[str, Any]:
    """A request with one question of the user."""
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def asking(text: str, *images: bytes | str) -> list[dict[str, Any]]:
    """A question about images: bytes of encoded ones, or URLs."""
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def data_uri(image: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def random_image(seed: int, width: int = 64, height: int = 48, form: str = "PNG") -> bytes:
    """An encoded image of coloured noise, coarse enough to stay so when it is resized."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def log_lines(path: Path) -> list[dict[str, Any]]:
    """A log of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
