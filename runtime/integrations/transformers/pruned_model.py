"""A model of transformers that drops visual tokens in its own `generate` and `forward`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.transformers.image_pruner import ImagePruner
from hivtp_ops.errors import PromptError, SettingsError

if TYPE_CHECKING:
    from typing import Self

    import torch

    from hivtp.runtime.integrations.transformers.image_pruner import EncodedImages, Llava
    from hivtp.runtime.vision.packing import NewlineRule
    from hivtp_ops import PruningSpec

# These read the prompt's ids where its embeddings are meant.
UNSUPPORTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size")


class PrunedModel:
    """A model while it is pruned; `prune` makes one.

    `model(...)` takes what the processor gives, too. Its logits, labels and KV cache are those of the shortened
    prompts: a row that keeps fewer tokens than another is padded on the left.

    Attributes:
        model: the model.
        spec: the settings, with their layers resolved.
        grid: rows and columns of patches in a tile.
        newline: see `prune`.
    """

    def __init__(self, model: Llava, spec: PruningSpec, grid: tuple[int, int], newline: NewlineRule) -> None:
        self.model = model
        self.spec = spec
        self.grid = grid
        self.newline = newline
        self._images = ImagePruner(model, spec, grid, newline)
        self._is_restored = False
        self._own_generate = vars(model).get("generate")
        self._unpruned_generate = model.generate
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.generate = self.generate

    def restore(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        if self._is_restored:
            return
        self._is_restored = True
        self._hook.remove()
        del self.model.generate
        if self._own_generate is not None:
            self.model.generate = self._own_generate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.restore()

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; this is the model's `generate` while it is pruned.

        Takes what the processor gives, with every `<image>` of the unpruned model. The output, streamers, stopping
        criteria and logits processors have that prompt as it was given, then the new tokens, and lengths count from
        it. The KV cache is always used and holds the shortened prompt. In a batch whose rows keep different numbers
        of tokens, a repetition penalty may overlook the first tokens of a prompt.

        Raises:
            PromptError: the placeholders do not match the images, or several prompts came without `attention_mask`.
            SettingsError: a way to generate that cannot work here (UNSUPPORTED), a cache that is not empty, or other
                features than those that the model's config names.
            ScoreError: the importance scores hold NaN.
        """
        import torch

        ids = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("pixel_values") is None:
            if ids is not None and (ids == self.model.config.image_token_id).any():
                _check_cache(kwargs)
            return self._unpruned_generate(inputs, generation_config, *args, **kwargs)

        defaults = self.model.generation_config
        sources = kwargs, vars(generation_config or defaults), vars(defaults)

        def setting(name: str) -> Any:
            return next((source[name] for source in sources if source.get(name) is not None), None)

        for name in UNSUPPORTED:
            if setting(name):
                raise SettingsError(f"{name} cannot be used while the model is pruned; leave it out, or restore first")
        if self.model.training and any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules()):
            raise SettingsError("gradient checkpointing allows no KV cache, and pruning needs it; call model.eval()")
        num_prompts, num_given = (0, 0) if ids is None else ids.shape
        if num_prompts > 1 and kwargs.get("attention_mask") is None:
            raise PromptError(f"{num_prompts} prompts came without attention_mask; pass what the processor gave")
        with torch.no_grad():
            shortened = self._shorten(kwargs | {"input_ids": ids})
        # transformers would count the shortened prompt against a total length.
        for bound in ("max", "min"):
            total = setting(f"{bound}_length")
            if total and setting(f"{bound}_new_tokens") is None:
                shortened[f"{bound}_new_tokens"] = max(total - num_given, 0)
            shortened.pop(f"{bound}_length", None)
        return self._unpruned_generate(ids, generation_config, *args, **shortened)

    def encode(
        self, pixel_values: torch.Tensor, image_sizes: Any = None, batch_num_images: Any = None
    ) -> EncodedImages:
        """What is left of some images; see `ImagePruner.encode`."""
        return self._images.encode(pixel_values, image_sizes, batch_num_images)

    def _before_forward(self, _model: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The steps of a generation come by here too, and must cost nothing.
        if not args and kwargs.get("pixel_values") is None:
            return None
        inputs = dict(zip(inspect.signature(self.model.forward).parameters, args, strict=False)) | kwargs
        return None if inputs.get("pixel_values") is None else ((), self._shorten(inputs))

    def _shorten(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Put the embeddings of the shortened prompts in the place of ids and pixels."""
        _check_cache(inputs)
        config = self.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"):
            if inputs.pop(name, None) not in (None, getattr(config, name, None)):
                raise SettingsError(f"{name} cannot differ from the model's config while the model is pruned")
        ids = inputs.pop("input_ids", None)
        if ids is None:
            raise PromptError("images came without input_ids; pass the ids that the processor gave, not embeddings")
        if inputs.get("pixel_values_videos") is not None:
            raise SettingsError("videos cannot be pruned; restore first, or pass images alone")
        names = ("pixel_values", "image_sizes", "batch_num_images")
        images = self._images.encode(*(inputs.pop(name, None) for name in names))
        is_image = ids == config.image_token_id
        if (num_marks := int(is_image.sum())) != len(images.is_kept):
            raise PromptError(
                f"the prompts have {num_marks} image tokens and the images {len(images.is_kept)} before pruning; "
                "pass what the processor gave, unchanged"
            )
        stays = (~is_image).masked_scatter(is_image, images.is_kept.to(ids.device))
        # What goes sorts to the front, where the shorter rows have their padding.
        columns = stays.byte().argsort(dim=1, stable=True)[:, -int(stays.sum(dim=1).max()) :]
        stays, ids = stays.gather(1, columns), ids.gather(1, columns)
        embeds = self.model.get_input_embeddings()(ids)
        is_image = (stays & (ids == config.image_token_id))[..., None].to(embeds.device)
        inputs["inputs_embeds"] = embeds.masked_scatter(is_image, images.embeds.to(embeds))
        mask = inputs.get("attention_mask")
        mask = stays.long() if mask is None else mask.gather(1, columns) * stays
        inputs |= {"attention_mask": mask, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
        if inputs.get("labels") is not None:
            # No token is predicted from the padding before it.
            is_target = stays & stays.roll(1, dims=1)
            inputs["labels"] = inputs["labels"].gather(1, columns).masked_fill(~is_target, -100)
        return inputs


def _check_cache(inputs: dict[str, Any]) -> None:
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise SettingsError(
            "a prompt with images cannot continue a KV cache while the model is pruned, for the cache is shorter than "
            "the prompt; pass the whole conversation without past_key_values"
        )
