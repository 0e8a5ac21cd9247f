"""What the plugin does to vLLM, of which there is none here: a stand-in notes what it is told."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hivtp.runtime.integrations.vllm import models, plugin
from hivtp.runtime.integrations.vllm.checks import ConfigCheck, checked_settings
from hivtp.runtime.language.vllm.backend import PLUGIN_SIGNATURE
from hivtp_ops.errors import EngineError, SettingsError, SpecError
from tests.runtime.integrations.vllm.configs import llava


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As little of vLLM as `register` needs."""
    registered: dict[str, str] = {}

    def register_model(name: str, path: str) -> None:
        assert name not in registered, "vLLM warns where a name comes twice"
        registered[name] = path

    package, config = ModuleType("vllm"), ModuleType("vllm.model_executor.models.config")
    registry = SimpleNamespace(get_supported_archs=registered.keys, register_model=register_model)
    package.ModelRegistry, config.MODELS_CONFIG_MAP = registry, {}
    modules = {"vllm": package, "vllm.model_executor": ModuleType("vllm.model_executor")}
    modules |= {"vllm.model_executor.models": ModuleType("vllm.model_executor.models"), config.__name__: config}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(registered=registered, checks=config.MODELS_CONFIG_MAP)


def test_the_entry_point_leads_to_register():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert points["hivtp"].load() is plugin.register


def test_architectures_are_registered_by_name_and_once(vllm):
    plugin.register()
    plugin.register()
    assert sorted(vllm.registered) == sorted(plugin.ARCHITECTURES) == sorted(vllm.checks)
    for name, path in vllm.registered.items():
        module, _, found = path.partition(":")
        assert importlib.import_module(module) is models
        assert found == name
    assert all(check is ConfigCheck for check in vllm.checks.values())


def test_the_plugin_imports_nothing_heavy():
    code = """
import sys
import hivtp.runtime.integrations.vllm.plugin
heavy = {"torch", "transformers", "vllm", "onnxruntime", "PIL"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_models_are_found_by_name_alone():
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = models.Other


@pytest.mark.usefixtures("vllm")
def test_a_vllm_that_has_moved_its_classes_is_named():
    with pytest.raises(EngineError, match=r"made for vLLM 0\.32 and 0\.33, and this vLLM is another"):
        _ = models.HivtpLlavaForConditionalGeneration


def engine_config(hivtp: Any, method: str | None = None, adapts_tower: bool | None = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=llava(hivtp)),
        speculative_config=None if method is None else SimpleNamespace(method=method),
        lora_config=None if adapts_tower is None else SimpleNamespace(enable_tower_connector_lora=adapts_tower),
    )


def test_a_config_that_works_passes():
    assert checked_settings(engine_config({"preset": "192"})).spec.keep == 192
    for method in ("ngram", "suffix"):
        ConfigCheck.verify_and_update_config(engine_config({"preset": "192"}, method))
    ConfigCheck.verify_and_update_config(engine_config({"preset": "192"}, adapts_tower=False))
    # Without pruning all is vLLM's own affair.
    ConfigCheck.verify_and_update_config(engine_config({"preset": "none"}, "eagle3", adapts_tower=True))


def test_a_config_that_cannot_work_is_refused_before_anything_is_loaded():
    with pytest.raises(SpecError, match="more of one image than of another"):
        ConfigCheck.verify_and_update_model_config(engine_config({"preset": "paper"}).model_config)
    with pytest.raises(SpecError, match="more of one image than of another"):
        ConfigCheck.verify_and_update_config(engine_config({"preset": "paper"}))
    with pytest.raises(SettingsError, match=r"speculative decoding by 'eagle3' .*ngram, ngram_gpu, suffix"):
        ConfigCheck.verify_and_update_config(engine_config({"preset": "192"}, "eagle3"))
    with pytest.raises(SettingsError, match="leave --enable-tower-connector-lora out"):
        ConfigCheck.verify_and_update_config(engine_config({"preset": "192"}, adapts_tower=True))


def test_what_is_refused_of_embeddings_is_signed():
    """A front end finds out by it whether images of several lengths may meet; see `VllmLanguage.check`."""

    def parse_mm_data(data):
        if data == "wrong":
            raise ValueError("hidden size mismatch")
        return data

    class Base:
        def get_data_parser(self):
            return SimpleNamespace(parse_mm_data=parse_mm_data)

    class Info(models.PrunedCounts, Base):
        pass

    parser = Info().get_data_parser()
    assert parser.parse_mm_data("right") == "right"
    with pytest.raises(ValueError, match=rf"hidden size mismatch \({re.escape(PLUGIN_SIGNATURE)}\)"):
        parser.parse_mm_data("wrong")
