"""What vLLM loads in each of its processes, through the entry-point group `vllm.general_plugins`."""

from __future__ import annotations

MODELS = "hivtp.runtime.integrations.vllm.models"
ARCHITECTURES = ("HivtpLlavaForConditionalGeneration", "HivtpLlavaNextForConditionalGeneration")


def register() -> None:
    """Tell vLLM of the architectures, by name alone: they are imported where one is served. Twice does no harm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from hivtp.runtime.integrations.vllm.checks import ConfigCheck

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
        # vLLM asks it before a process of the engine starts and anything is loaded.
        MODELS_CONFIG_MAP.setdefault(name, ConfigCheck)
