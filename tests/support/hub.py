"""A Hugging Face hub on loopback: what huggingface_hub asks of it to list and download a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves folders as repositories, each with the one commit COMMIT, whose branch is main.

    Args:
        repositories: folders by their ids.
        gated: ids whose files are refused.
    """

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repositories = repositories
        self.gated = gated
        # What every request is answered with, where it is set.
        self.status: int | None = None
        self.page: bytes | None = None
        # Whether files end before they should.
        self.cuts = False
        # Paths of the files whose content was sent.
        self.sent: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What makes huggingface_hub use it, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "0",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make huggingface_hub use it in this process, with a cache of its own."""
        from huggingface_hub import constants

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def log_message(self, *_arguments: object) -> None:
                pass

            def _answer(self, *, with_body: bool) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                parts = path.split("/")
                is_api = parts[:2] == ["api", "models"]
                name = "/".join(parts[2:4] if is_api else parts[:2])
                rest = parts[4:] if is_api else parts[2:]
                folder = hub.repositories.get(name)
                if hub.status is not None:
                    self._refuse(hub.status, "Trouble")
                elif hub.page is not None:
                    self._send(hub.page, with_body, {"Content-Type": "text/html"})
                elif folder is None:
                    self._refuse(404, "RepoNotFound")
                elif len(rest) >= 2 and rest[1] not in ("main", COMMIT):
                    self._refuse(404, "RevisionNotFound")
                elif is_api and rest[:1] == ["tree"]:
                    self._json([entry(file, folder) for file in files_of(folder)], with_body)
                elif is_api:
                    files = [{"rfilename": file.relative_to(folder).as_posix()} for file in files_of(folder)]
                    gated = "manual" if name in hub.gated else False
                    self._json({"id": name, "sha": COMMIT, "siblings": files, "gated": gated, "tags": []}, with_body)
                elif name in hub.gated:
                    self._refuse(403, "GatedRepo")
                else:
                    self._file(folder / "/".join(rest[2:]), with_body)

            def _file(self, file: Path, with_body: bool) -> None:
                if not file.is_file():
                    self._refuse(404, "EntryNotFound")
                    return
                content = file.read_bytes()
                if with_body:
                    hub.sent.append(file.name)
                self._send(content, with_body, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

            def _json(self, content: object, with_body: bool) -> None:
                self._send(json.dumps(content).encode(), with_body, {"Content-Type": "application/json"})

            def _send(self, content: bytes, with_body: bool, headers: dict[str, str]) -> None:
                self.send_response(200)
                for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body and hub.cuts and "ETag" in headers:
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(content)

            def _refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def entry(file: Path, folder: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": file.relative_to(folder).as_posix(),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
