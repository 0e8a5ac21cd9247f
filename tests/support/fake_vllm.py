"""A server that speaks as vLLM does, and decodes with a bundle of ours: its answers must be those of the bundle."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp import Request, SamplingParams
from hivtp.runtime.generation import Generation, scheduler_for, steps_of
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.language.vllm.answering import expanded
from hivtp.runtime.language.vllm.backend import PLUGIN_SIGNATURE
from hivtp.runtime.vision.encoder import EncodedImage
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.runtime.model import Model


@dataclass
class Fault:
    """What goes wrong with one chat.

    Attributes:
        status: the answer's, with `message` and `headers`, in place of 200.
        drops: the connection is closed before an answer.
        cuts_after: the connection is closed after this many tokens.
        fails_after: an error is streamed after this many tokens, with `status`.
        is_silent: nothing is said until the client leaves.
        ends_after: the answer ends early, but in order.
        line: is streamed in place of an answer.
    """

    status: int = 0
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)
    drops: bool = False
    cuts_after: int | None = None
    fails_after: int | None = None
    ends_after: int | None = None
    is_silent: bool = False
    line: bytes | None = None


class FakeVllm:
    """Serves a model on a free port of this machine, in threads.

    Attributes:
        faults: of the next chats, one each; then there are none.
        chats: the bodies that came.
        num_left: clients that went before their answers were whole.
        key: what a client must name.
        has_plugin: images of any number of tokens are fine.
        token_seconds: that each token takes.
        writes: what becomes of the prompt's token ids before they are told.
    """

    def __init__(self, model: Model, port: int = 0) -> None:
        self.model = model
        self.faults: list[Fault] = []
        self.chats: list[dict[str, Any]] = []
        self.num_left = 0
        self.key: str | None = None
        self.has_plugin = False
        self.models = [{"id": "model", "max_model_len": 400}]
        self.token_seconds = 0.0
        self.writes: Any = list
        self._lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            server_of = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_fault(self) -> Fault:
        with self._lock:
            return self.faults.pop(0) if self.faults else Fault()

    def generation(self, body: dict[str, Any]) -> Generation:
        """What vLLM makes of a chat."""
        messages = [_message(message) for message in body["messages"]]
        top_logprobs = body.get("top_logprobs") if body.get("logprobs") else None
        sampling = SamplingParams(
            max_new_tokens=body["max_completion_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            repetition_penalty=body["repetition_penalty"],
            seed=body.get("seed"),
            logprobs=top_logprobs,
            ignores_eos=not body["stop_token_ids"],
        )
        system = next((message.text for message in messages if message.role == "system"), None)
        rest = [message for message in messages if message.role != "system"]
        request = Request(rest[-1], sampling=sampling, system=system, history=rest[:-1])
        with self._lock:
            return Generation(self.model, self.model.encode(self.model.prepare(request)))

    def steps(self, generation: Generation) -> Iterator[None]:
        steps = steps_of(scheduler_for(self.model, [generation]), generation)
        while True:
            with self._lock:
                try:
                    next(steps)
                except StopIteration:
                    return
            time.sleep(self.token_seconds)
            yield


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeVllm

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._is_allowed():
            self._send(200, {"object": "list", "data": self.server_of.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        widths = [embeds.shape[1] for message in body["messages"] for embeds in _embeds(message)]
        hidden = self.server_of.model.manifest.hidden_size
        if any(width != hidden for width in widths):
            signature = f" ({PLUGIN_SIGNATURE})" if self.server_of.has_plugin else ""
            self._send(400, {"error": {"message": f"wrong width{signature}", "code": 400}})
            return
        self.server_of.chats.append(body)
        fault = self.server_of.take_fault()
        try:
            self._answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.server_of.num_left += 1
            self.close_connection = True

    def _answer(self, body: dict[str, Any], fault: Fault) -> None:
        if fault.drops:
            self._cut()
            return
        if fault.is_silent:
            self.connection.settimeout(20)
            assert self.rfile.read(1) == b"", "the client leaves"
            self.server_of.num_left += 1
            self.close_connection = True
            return
        if fault.status and fault.fails_after is None:
            self._send(fault.status, {"error": {"message": fault.message, "code": fault.status}}, fault.headers)
            return
        try:
            generation = self.server_of.generation(body)
        except HivtpError as error:
            self._send(400, {"error": {"message": str(error), "code": 400}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if fault.line is not None:
            self.wfile.write(fault.line + b"\n\n")
            return
        prompt = expanded(generation, self.server_of.model.manifest.image_token_id)
        self._event({"prompt_token_ids": self.server_of.writes(prompt), "choices": [{"delta": {}}]})
        self.wfile.write(b": keep-alive\n\n")
        if fault.cuts_after == 0:
            self._cut()
            return
        num_sent = 0
        for _ in self.server_of.steps(generation):
            new = generation._new_token_ids[num_sent:]
            num_sent += len(new)
            if new:
                self._event({"choices": [{"token_ids": new, "logprobs": _logprobs(generation, len(new))}]})
            if num_sent == fault.cuts_after:
                self._cut()
                return
            if num_sent == fault.fails_after:
                self._event({"error": {"message": fault.message, "code": fault.status}})
                return
            if num_sent == fault.ends_after:
                break
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _is_allowed(self) -> bool:
        key = self.server_of.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(encoded)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(encoded)


def _embeds(message: dict[str, Any]) -> list[np.ndarray]:
    parts = message["content"] if isinstance(message["content"], list) else []
    encoded = [base64.b64decode(part["image_embeds"]) for part in parts if part["type"] == "image_embeds"]
    return [np.load(io.BytesIO(content), allow_pickle=False) for content in encoded]


def _message(message: dict[str, Any]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return Message(message["role"], [content])
    images = iter(_embeds(message))
    return Message(
        message["role"], [part["text"] if part["type"] == "text" else _image(next(images)) for part in content]
    )


def _image(embeds: np.ndarray) -> ImagePart:
    return ImagePart(EncodedImage(embeds.astype(np.float32), (), len(embeds), embeds.tobytes()))


def _logprobs(generation: Generation, num_new: int) -> dict[str, Any] | None:
    found = generation._logprobs[-num_new:]
    if not found:
        return None
    content = [
        {
            "token": f"token_id:{item.token_id}",
            "logprob": item.logprob,
            "top_logprobs": [{"token": f"token_id:{token_id}", "logprob": value} for token_id, value in item.top],
        }
        for item in found
    ]
    return {"content": content}
