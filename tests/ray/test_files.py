"""The files of `deploy/ray` are what `serve deploy` takes, and name settings that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hivtp.runtime.integrations.ray import build_app
from hivtp.runtime.integrations.ray.settings import RaySettings

pytestmark = pytest.mark.ray

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"


def read(name: str) -> Any:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((FOLDER / name).read_text())
    return ServeDeploySchema.model_validate(values)


def test_the_server_is_deployed_with_settings_that_there_are():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    [app] = read("hivtp.yaml").applications
    assert app.import_path == f"{build_app.__module__}:{build_app.__name__}"
    settings = RaySettings.of(app.args)
    assert settings.server_settings.api_keys == ("change-me",)
    # As `serve run` and `serve deploy` call it.
    made = call_user_app_builder_with_args_if_necessary(build_app, app.args)
    assert made._bound_deployment.name == "gateway"


def test_the_file_of_ray_serve_llm_is_one():
    [app] = read("llm.yaml").applications
    [config] = app.args["llm_configs"]
    assert config["engine_kwargs"]["hf_overrides"]["hivtp"] == {"preset": "192"}
