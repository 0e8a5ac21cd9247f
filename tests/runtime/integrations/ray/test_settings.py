from __future__ import annotations

import sys

import pytest

from hivtp.runtime.integrations.ray import build_app
from hivtp.runtime.integrations.ray.settings import RaySettings
from hivtp_ops.errors import MissingExtraError, SettingsError


def test_what_the_command_line_gives_is_text():
    settings = RaySettings.of({"bundle": "folder", "max_replicas": "3", "num_cpus": "0.5", "num_gateways": "2"})
    assert (settings.max_replicas, settings.num_cpus, settings.num_gateways) == (3, 0.5, 2)
    assert type(settings.max_replicas) is int


def test_settings_of_the_parts_are_theirs():
    server = {"num_slots": 8, "api_keys": ["one", "two"], "host": "0.0.0.0"}
    language = {"backend": "vllm", "url": "http://host:8000"}
    settings = RaySettings("folder", threads=2, server=server, vision={"max_tiles": 5}, language=language)
    assert settings.server_settings.api_keys == ("one", "two")
    assert settings.server_settings.num_slots == 8
    assert (settings.vision_options.max_tiles, settings.vision_options.num_threads) == (5, 2)
    assert settings.language_options.url == "http://host:8000"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "say which bundle: bundle=DIR"),
        ({"bundle": ""}, "bundle must be given"),
        ({"bundle": "b", "replicas": 2}, "there are no settings replicas; there are bundle, min_replicas"),
        ({"bundle": "b", "max_replicas": "many"}, "max_replicas must be a number, not 'many'"),
        ({"bundle": "b", "max_replicas": "0"}, "max_replicas is 0, less than min_replicas"),
        ({"bundle": "b", "min_replicas": 0}, "min_replicas must be a number, 1 or more"),
        ({"bundle": "b", "num_cpus": float("inf")}, "num_cpus must be a number"),
        ({"bundle": "b", "num_gpus": True}, "num_gpus must be a number"),
        ({"bundle": "b", "server": {"slots": 3}}, "server: .*slots"),
        ({"bundle": "b", "server": {"host": "0.0.0.0"}}, "no API key is set"),
        ({"bundle": "b", "language": {"backend": "vllm"}}, "needs a url"),
    ],
)
def test_what_cannot_work_is_refused(args, words):
    with pytest.raises(SettingsError, match=words):
        RaySettings.of(args)


def test_ray_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"hivtp\[ray\]"):
        build_app({"bundle": "folder"})
