"""What vLLM is asked before it starts: whether its settings and the plugin's can work together."""

from __future__ import annotations

from typing import Any

from hivtp.runtime.integrations.vllm.settings import PluginSettings
from hivtp_ops.errors import SettingsError

# These read the ids of tokens and nothing else.
SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "suffix")


class ConfigCheck:
    """What vLLM calls a VerifyAndUpdateConfig; it has no other need of that class."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse settings that cannot work; see `checked_settings`."""
        checked_settings(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what the model's config alone tells; see `PluginSettings.from_config`."""
        PluginSettings.from_config(model_config.hf_config)


def checked_settings(vllm_config: Any) -> PluginSettings:
    """The plugin's settings, which work with those of vLLM.

    Raises:
        SettingsError, SpecError: see `PluginSettings.from_config`; or vLLM is to do what nobody has tried with fewer
            tokens.
    """
    settings = PluginSettings.from_config(vllm_config.model_config.hf_config)
    if settings.spec is None:
        return settings
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in SPECULATIVE_METHODS:
        raise SettingsError(
            f"hivtp: speculative decoding by {speculative.method!r} runs a second model over the prompt, and that "
            f"model has not been trained on images with dropped tokens; leave it out, or take one of "
            f"{', '.join(SPECULATIVE_METHODS)}"
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        raise SettingsError(
            "hivtp: adapters of the vision tower count its tokens as the unpruned model has them; leave "
            "--enable-tower-connector-lora out (adapters of the language model work)"
        )
    return settings
