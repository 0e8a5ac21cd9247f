"""Everything in deploy/ parses, and says of the server what is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from hivtp.runtime.cli.serve import make_parser, settings_from
from hivtp.runtime.serving.server import CLOSING_SECONDS
from hivtp.runtime.serving.settings import ServerSettings
from tests.support.answers import load
from tests.support.serving import serving

if TYPE_CHECKING:
    from collections.abc import Sequence

DEPLOY = Path(__file__).parents[2] / "deploy"
DEFAULTS = ServerSettings()


def served(arguments: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """The settings that a command line gives, with some keys in the place of its file of keys."""
    monkeypatch.delenv("HIVTP_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    given = [
        re.sub(r"^(--api-key-file=)?(/\S+|\$\{CREDENTIALS_DIRECTORY\})/api-keys$", rf"\g<1>{keys}", one)
        for one in arguments
    ]
    assert given != list(arguments) or not any("api-key-file" in one for one in arguments)
    return settings_from(make_parser("hivtp serve").parse_args(given))


# systemd


@pytest.fixture(scope="module")
def unit() -> dict[str, dict[str, list[str]]]:
    """Sections, keys and the values of each key, which may come more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in (DEPLOY / "systemd" / "hivtp.service").read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator
            section.setdefault(key, []).append(value)
    return sections


def test_the_unit_starts_a_server_that_strangers_cannot_use(
    unit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    [command] = unit["Service"]["ExecStart"]
    program, serve, *arguments = shlex.split(command)
    assert (PurePosixPath(program).name, serve) == ("hivtp", "serve")
    settings = served(arguments, tmp_path, monkeypatch)
    assert settings.api_keys == ("secret",)
    assert not settings.is_insecure
    assert unit["Service"]["LoadCredential"] == ["api-keys:/etc/hivtp/api-keys"]


def test_the_unit_lets_answers_end(unit: dict[str, Any]):
    assert float(unit["Service"]["TimeoutStopSec"][0]) > DEFAULTS.drain_seconds + CLOSING_SECONDS
    assert unit["Service"]["KillSignal"] == ["SIGTERM"]


def test_the_unit_allows_little(unit: dict[str, Any]):
    service = unit["Service"]
    assert service["CapabilityBoundingSet"] == [""]
    for key in ("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateDevices", "MemoryDenyWriteExecute"):
        assert service[key] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    # The memory that is free is read from /proc/meminfo.
    assert "ProcSubset" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path):
    text = (DEPLOY / "systemd" / "hivtp.service").read_text()
    # Which must exist where it is checked.
    file = tmp_path / "hivtp.service"
    file.write_text(text.replace("/opt/hivtp/bin/hivtp", "/bin/true"))
    found = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert [line for line in found.stderr.splitlines() if "hivtp.service" in line] == []


# Docker


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "docker" / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_starts_a_server_that_strangers_cannot_use(
    dockerfile: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    known = {
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in dockerfile} <= known
    last = dict(dockerfile)
    program, serve = json.loads(last["ENTRYPOINT"])
    assert (program, serve) == ("hivtp", "serve")
    arguments = json.loads(last["CMD"])
    assert served([*arguments, "--api-key=one"], tmp_path, monkeypatch).api_keys == ("one",)
    with pytest.raises(Exception, match="--api-key, or --insecure"):
        served(arguments, tmp_path, monkeypatch)
    assert last["EXPOSE"] == "8000"
    assert int(last["USER"]) > 0
    assert "/health" in last["HEALTHCHECK"]
    compile(json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2], "healthcheck", "exec")


def test_the_image_is_made_of_what_the_installation_needs():
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    needed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    root = DEPLOY.parent
    assert all((root / name).exists() for name in needed)
    links = {
        link.resolve().relative_to(root.resolve()).parts[0] for link in (root / "src").rglob("*") if link.is_symlink()
    }
    assert links <= needed
    project = (root / "pyproject.toml").read_text()
    assert {"pyproject.toml", *re.findall(r'"(README.md|LICENSE)"', project)} <= needed


# Kubernetes


def documents(name: str) -> dict[str, Any]:
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= set(document) for document in found)
    return {document["kind"]: document for document in found}


def test_the_pods_start_a_server_that_strangers_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pod = documents("hivtp.yaml")["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    settings = served(container["args"], tmp_path, monkeypatch)
    assert settings.api_keys == ("secret",)
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {container["args"][0], "/etc/hivtp"}
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > sleep + settings.drain_seconds + CLOSING_SECONDS


def test_the_probes_ask_what_the_server_answers(pruned_bundle: Path):
    container = documents("hivtp.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    with serving(load(pruned_bundle).model, api_keys=("secret",)) as server:
        # A probe names no key.
        assert {server.client.get(path).status_code for path in probes.values()} == {200}


def test_the_service_leads_to_the_pods():
    found = documents("hivtp.yaml")
    pods = found["Deployment"]["spec"]["template"]
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        selector = found[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == pods["metadata"]["labels"]
    [port] = found["Service"]["spec"]["ports"]
    assert port["targetPort"] in [one["name"] for one in pods["spec"]["containers"][0]["ports"]]
    ingress = documents("ingress.yaml")["Ingress"]
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["name"]) == (found["Service"]["metadata"]["name"], port["name"])
    notes = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert int(notes["proxy-read-timeout"]) > DEFAULTS.request_seconds
    assert notes["proxy-body-size"] == f"{DEFAULTS.max_body_bytes // 2**20}m"
    assert notes["proxy-buffering"] == "off"
    assert "$http_x_session_affinity" in notes["upstream-hash-by"]


# nginx


def test_nginx_waits_as_long_as_an_answer_may_take():
    text = (DEPLOY / "nginx" / "hivtp.conf").read_text()
    [seconds] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(seconds) > DEFAULTS.request_seconds
    assert f"client_max_body_size {DEFAULTS.max_body_bytes // 2**20}m;" in text
    assert "proxy_buffering off;" in text
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_understands_the_file(tmp_path: Path):
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{ include {DEPLOY}/nginx/hivtp.conf; }}\n"
    )
    command = ["nginx", "-t", "-c", str(config), "-p", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
