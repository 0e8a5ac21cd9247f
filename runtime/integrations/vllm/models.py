"""The architectures that vLLM looks up here by name: its own LLaVA, with images pruned and embeddings of any length."""

from __future__ import annotations

import functools
from typing import Any

from hivtp.runtime.integrations.vllm.checks import checked_settings
from hivtp.runtime.integrations.vllm.counts import count_tokens
from hivtp.runtime.integrations.vllm.encoding import VllmLayers, encode_images
from hivtp.runtime.integrations.vllm.settings import PluginSettings
from hivtp.runtime.language.vllm.backend import PLUGIN_SIGNATURE
from hivtp_ops.errors import EngineError


class PrunedCounts:
    """Goes before a `BaseLlavaProcessingInfo` of vLLM: its placeholders become those of the tokens that are kept."""

    @functools.cached_property
    def _pruning(self: Any) -> PluginSettings:
        return PluginSettings.from_config(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image."""
        if self._pruning.spec is None:
            unpruned: int = super().get_num_image_tokens(  # type: ignore[misc]  # of the class that comes after this one
                image_width=image_width, image_height=image_height
            )
            return unpruned
        return count_tokens(self._pruning, (image_height, image_width))

    def get_data_parser(self: Any) -> Any:
        """What reads embeddings that were sent."""
        parser = super().get_data_parser()  # type: ignore[misc]
        parse = parser.parse_mm_data

        def signed(*data: Any, **options: Any) -> Any:
            try:
                return parse(*data, **options)
            except ValueError as error:
                raise ValueError(f"{error} ({PLUGIN_SIGNATURE})") from error

        parser.parse_mm_data = signed
        return parser


class PrunedImages:
    """Goes before a LLaVA of vLLM, and takes its images over.

    Args:
        vllm_config: of the engine.
        prefix: of the names of weights.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        from vllm.distributed import tensor_model_parallel_all_reduce

        settings = checked_settings(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # see above
        self._pruning = settings
        self._layers = VllmLayers(tensor_model_parallel_all_reduce)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of images, from pixels or as they were sent; one tensor for each."""
        embeds, pixels = kwargs.get("image_embeds"), kwargs.get("pixel_values")
        if embeds is not None:
            # As a list: vLLM's own LLaVA takes one tensor, so that images of two lengths in one run end the engine.
            return list(embeds)
        if pixels is None or self._pruning.spec is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]  # see above
        return encode_images(self, self._pruning, self._layers, pixels, kwargs.get("image_sizes"))


@functools.cache
def _llava() -> Any:
    from vllm.model_executor.models.llava import (
        LlavaDummyInputsBuilder,
        LlavaForConditionalGeneration,
        LlavaMultiModalProcessor,
        LlavaProcessingInfo,
    )
    from vllm.multimodal import MULTIMODAL_REGISTRY

    class Info(PrunedCounts, LlavaProcessingInfo):  # type: ignore[misc]  # vLLM is not installed beside mypy
        """Of LLaVA-1.5."""

    @MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
    class HivtpLlavaForConditionalGeneration(PrunedImages, LlavaForConditionalGeneration):  # type: ignore[misc]
        """LLaVA-1.5."""

    return HivtpLlavaForConditionalGeneration


@functools.cache
def _llava_next() -> Any:
    from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
    from vllm.model_executor.models.llava_next import (
        LlavaNextForConditionalGeneration,
        LlavaNextMultiModalProcessor,
        LlavaNextProcessingInfo,
    )
    from vllm.multimodal import MULTIMODAL_REGISTRY

    class Info(PrunedCounts, LlavaNextProcessingInfo):  # type: ignore[misc]
        """Of LLaVA-NeXT."""

    @MULTIMODAL_REGISTRY.register_processor(
        LlavaNextMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder
    )
    class HivtpLlavaNextForConditionalGeneration(PrunedImages, LlavaNextForConditionalGeneration):  # type: ignore[misc]
        """LLaVA-NeXT."""

    return HivtpLlavaNextForConditionalGeneration


# Each is made where it is asked for: its base classes come with vLLM, and this module can be imported without.
_MAKERS = {
    "HivtpLlavaForConditionalGeneration": _llava,
    "HivtpLlavaNextForConditionalGeneration": _llava_next,
}


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _MAKERS[name]()
    except ImportError as error:
        raise EngineError(
            f"the plugin of hivtp is made for vLLM 0.32 and 0.33, and this vLLM is another ({error}); install one of "
            "those, or another hivtp"
        ) from error
