"""Runs the clients that people have against a live server of the trained miniature.

Each client gets an environment of its own, which is kept for the next run: `python -m tests.clients.run`. It needs PyPI
and, for the client in JavaScript, npm; a client whose environment cannot be made is an error like any other.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.miniature.pictures import HELD_OUT, draw
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER.parents[1] / "benchmarks" / "miniature" / "checkpoint"
KEY = "key-of-the-clients"


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        script: what it does, beside this file.
        packages: that it needs, from PyPI or npm; the first names the client.
    """

    script: str
    packages: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        """Whether it runs in JavaScript."""
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("openai_client.py", ("openai",)),
    Client("litellm_client.py", ("litellm",)),
    Client("langchain_client.py", ("langchain-openai",)),
    Client("pydantic_ai_client.py", ("pydantic-ai-slim[openai]",)),
    Client("llama_index_client.py", ("llama-index-llms-openai-like",)),
    Client("openai_node.mjs", ("openai",)),
)


def main() -> int:
    """Run them; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "hivtp-clients")
    parser.add_argument("--only", help="the script of one client")
    options = parser.parse_args()
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.json"
        settings = ExportSettings(preset="288", first_layer=4, num_layers=2)
        bundle = export_bundle(CHECKPOINT, Path(folder) / "bundle", settings, is_quiet=True).folder
        server, url = start(bundle, Path(folder) / "log")
        try:
            case.write_text(json.dumps(make_case(url)))
            for client in CLIENTS:
                if options.only in (None, client.script):
                    num_failed += not run(client, options.environments, case)
        finally:
            server.terminate()
            server.wait(30)
    return num_failed


def start(bundle: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server, and its address."""
    command = [sys.executable, "-m", "hivtp.main", "serve", str(bundle), "--port", "0", "--threads", "1"]
    with log.open("wb") as file:
        server = subprocess.Popen([*command, "--model-name", "miniature", "--api-key", KEY], stderr=file)
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if '"listening"' in line and line.endswith("}"):
                return server, json.loads(line)["urls"][0]
    raise SystemExit(log.read_text())


def make_case(url: str) -> dict[str, str]:
    """What the clients ask, and what is answered."""
    picture = draw(HELD_OUT[0])
    file = io.BytesIO()
    picture.image.save(file, "PNG")
    colour, count = (next(one for one in picture.questions if one.kind == kind) for kind in ("colour", "count"))
    return {
        "base_url": f"{url}/v1",
        "key": KEY,
        "model": "miniature",
        "image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        "question": colour.text,
        "answer": colour.answer,
        "next_question": count.text,
        "next_answer": count.answer,
    }


def run(client: Client, environments: Path, case: Path) -> bool:
    """Run a client; whether all that it checks is so."""
    folder = environments / Path(client.script).stem
    try:
        program, versions = install_node(client, folder) if client.is_node else install_python(client, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{client.script}: its environment cannot be made: {error}", flush=True)
        return False
    script = FOLDER / client.script
    if client.is_node:
        # Packages are looked for beside the script.
        script = folder / client.script
        script.write_text((FOLDER / client.script).read_text())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HIVTP_CASE": str(case)}
    done = subprocess.run(
        [*program, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    print(f"{client.script}: {'ok' if done.returncode == 0 else 'FAILED'} ({versions})", flush=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    return done.returncode == 0


def install_python(client: Client, folder: Path) -> tuple[list[str], str]:
    """Its interpreter, and the versions of what it uses."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *client.packages], check=True)
        (folder / "complete").touch()
    found = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    versions = {package["name"]: package["version"] for package in json.loads(found.stdout)}
    names = [*(package.partition("[")[0] for package in client.packages), "openai"]
    return [str(python)], ", ".join(f"{name} {versions[name]}" for name in dict.fromkeys(names) if name in versions)


def install_node(client: Client, folder: Path) -> tuple[list[str], str]:
    """Node, and the versions of what it uses."""
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--silent", *client.packages], cwd=folder, check=True)
        (folder / "complete").touch()
    installed = [folder / "node_modules" / name / "package.json" for name in client.packages]
    versions = [json.loads(file.read_text()) for file in installed]
    return ["node"], ", ".join(f"{package['name']} {package['version']}" for package in versions)


if __name__ == "__main__":
    sys.exit(main())
