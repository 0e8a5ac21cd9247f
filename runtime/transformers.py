"""prune: makes a LLaVA of transformers drop visual tokens in its own `generate` and `forward`."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from hivtp.runtime.packing import NewlineRule
from hivtp.runtime.tiling import TileLayout
from hivtp_ops import torch_op
from hivtp_ops.errors import PromptError, ScoreError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self, TypeAlias

    import torch
    from numpy.typing import NDArray
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    from hivtp_ops import PruningSpec

    Llava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration

# Stands where the unpruned model has its `image_newline`, which is a token of no tile.
NEWLINE = -1
# Bounds the attention maps of a scoring layer: 21 MB for each tile of CLIP ViT-L/14 at 336 px.
TILES_PER_MAP = 4
# These read the prompt's ids where its embeddings are meant.
UNSUPPORTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size")


def prune(model: Llava, spec: PruningSpec, *, newline: NewlineRule = "kept-rows") -> PrunedModel:
    """Make a model prune, until `restore` or the end of a `with` block.

    Nothing but this model changes, and of it only `generate` and a hook before `forward`; its attention
    implementation stays, as does every other model. For transformers 5.16 to 5.23.

    Args:
        model: LLaVA-1.5 or LLaVA-NeXT with a CLIP vision tower, on any device and of any dtype.
        spec: the settings; its layers may be left open.
        newline: LLaVA-NeXT: which rows of the unpadded picture keep their newline token: those that kept a patch,
            all, or none.

    Raises:
        SettingsError: the model is of another class, has another vision tower or select strategy, or is pruned
            already; or there is no such newline rule.
        SpecError: the spec does not fit the tower or its grid.
    """
    from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    if not isinstance(model, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration):
        raise SettingsError(
            f"cannot prune a {type(model).__name__}; expected a LlavaForConditionalGeneration or a "
            "LlavaNextForConditionalGeneration of transformers"
        )
    if isinstance(getattr(model.generate, "__self__", None), PrunedModel):
        raise SettingsError("this model is pruned already; call restore() on what prune() gave before pruning again")
    tower, strategy = model.model.vision_tower, model.config.vision_feature_select_strategy
    if not isinstance(tower, CLIPVisionModel):
        raise SettingsError(
            f"the vision tower is a {type(tower).__name__}; the rule needs a CLIPVisionModel, which has a CLS token "
            "and a square grid of patches"
        )
    if strategy not in (["default"] if _has_tiles(model) else ["default", "full"]):
        raise SettingsError(f"vision_feature_select_strategy {strategy!r} is not supported for {type(model).__name__}")
    if newline not in get_args(NewlineRule):
        raise SettingsError(f"newline must be one of {', '.join(get_args(NewlineRule))}, not {newline!r}")
    side = tower.config.image_size // tower.config.patch_size
    spec.validate((side, side))
    return PrunedModel(model, spec.resolve(tower.config.num_hidden_layers), (side, side), newline)


@dataclass(frozen=True)
class EncodedImages:
    """What is left of some images.

    Attributes:
        embeds: [num_kept_tokens, hidden], one image after the other, in the order of the unpruned tokens.
        is_kept: [num_unpruned_tokens] bool, which of the unpruned tokens those are, newlines included.
        kept_indices: [tiles, capacity] int64, as `hivtp_ops.torch_op.hierarchical_prune` gives them.
        kept_counts: [tiles] int64, likewise.
        importance: [tiles, patches] float32, -inf in the padding of LLaVA-NeXT.
    """

    embeds: torch.Tensor
    is_kept: torch.Tensor
    kept_indices: torch.Tensor
    kept_counts: torch.Tensor
    importance: torch.Tensor


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

    def encode(self, pixel_values: torch.Tensor, image_sizes: Any = None) -> EncodedImages:
        """Run the vision tower and the projector, and prune between the two.

        The tower stops at the layer whose features are used, and the projector sees the kept tokens only.

        Args:
            pixel_values: as the processor gives them: [images, 3, H, W]; for LLaVA-NeXT
                [images, most tiles, 3, H, W] or [tiles, 3, H, W].
            image_sizes: LLaVA-NeXT: [images, 2], height and width of each picture in pixels.

        Raises:
            PromptError: pixels and sizes do not match.
            ScoreError: the importance scores hold NaN.
        """
        import torch

        model = self.model.model
        tiles, blocks = self._lay_out(pixel_values, image_sizes)
        features, importance = self._run_tower(tiles)
        is_picture = np.zeros(features.shape[:2], np.bool_)
        for block in blocks:
            is_picture.ravel()[block[block != NEWLINE]] = True
        is_padding = torch.from_numpy(~is_picture[:, 1:]).to(importance.device)
        importance = importance.masked_fill(is_padding, -torch.inf)
        if importance.isnan().any():
            raise ScoreError("the importance scores hold NaN: the vision tower overflowed; load it in a wider dtype")
        kept_indices, kept_counts = torch_op.prune(importance, self.grid, self.spec)

        # Patch i is token i + 1, so that no patch (-1) falls on the CLS, which stays wherever a block has it.
        scattered = torch.zeros(features.shape[:2], dtype=torch.bool, device=kept_indices.device)
        stays = scattered.scatter_(1, kept_indices + 1, True).cpu().numpy()
        stays[:, 0] = True
        flags = [_keep(block, stays.ravel(), self.newline) for block in blocks]
        tokens = np.concatenate([block[is_kept] for block, is_kept in zip(blocks, flags, strict=True)])
        is_kept = np.concatenate([block_flags.ravel() for block_flags in flags])

        is_patch = torch.from_numpy(tokens != NEWLINE).to(features.device)
        rows = torch.from_numpy(tokens).to(features.device)[is_patch]
        embeds = model.multi_modal_projector(features.flatten(0, 1)[rows])
        if len(rows) < len(tokens):
            newlines = model.image_newline.to(embeds).expand(len(tokens), -1)
            embeds = newlines.masked_scatter(is_patch[:, None].to(embeds.device), embeds)
        return EncodedImages(embeds, torch.from_numpy(is_kept), kept_indices, kept_counts, importance)

    def _lay_out(self, pixel_values: torch.Tensor, image_sizes: Any) -> tuple[torch.Tensor, list[NDArray[np.int64]]]:
        """Pixels of all tiles [tiles, 3, H, W], and where the unpruned tokens come from; see `_picture_blocks`."""
        import torch

        config = self.model.config
        if not _has_tiles(self.model):
            size = len(pixel_values), 1 + math.prod(self.grid)
            first = int(config.vision_feature_select_strategy == "default")
            return pixel_values, [np.arange(math.prod(size)).reshape(size)[:, first:]]

        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        if image_sizes is None:
            raise PromptError("LLaVA-NeXT needs image_sizes beside pixel_values; pass both as the processor gave them")
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        layouts = []
        for height, width in torch.as_tensor(image_sizes).tolist():
            rows, cols = get_anyres_image_grid_shape((height, width), pinpoints, side)
            layouts.append(TileLayout(rows, cols, (height, width)))
        if pixel_values.dim() == 5:
            # Pictures with fewer tiles than another are padded with empty ones.
            pictures = zip(pixel_values, layouts, strict=False)
            pixel_values = torch.cat([tiles[: layout.num_tiles] for tiles, layout in pictures])
        if len(pixel_values) != (num_tiles := sum(layout.num_tiles for layout in layouts)):
            raise PromptError(
                f"pixel_values holds {len(pixel_values)} tiles and image_sizes calls for {num_tiles}; "
                "pass both as the processor gave them"
            )
        return pixel_values, _picture_blocks(layouts, self.grid)

    def _run_tower(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [tiles, 1 + patches, width] and importance [tiles, patches] float32."""
        import torch

        tower, config, spec = self.model.model.vision_tower, self.model.config, self.spec
        assert spec.first_layer is not None, "prune() resolves the layers"
        assert spec.num_layers is not None, "prune() resolves the layers"
        scoring = range(spec.first_layer, spec.first_layer + spec.num_layers)
        # Of the hidden states, number i is the output of i layers.
        num_layers, wanted = config.vision_config.num_hidden_layers, config.vision_feature_layer
        wanted = [range(num_layers + 1)[layer] for layer in ([wanted] if isinstance(wanted, int) else wanted)]

        hidden = tower.pre_layrnorm(tower.embeddings(tiles))
        states, scores = {0: hidden}, []
        for index, layer in enumerate(tower.encoder.layers[: max(*wanted, scoring.stop)]):
            if index in scoring:
                outputs = [_run_scoring_layer(layer, part) for part in hidden.split(TILES_PER_MAP)]
                hidden, received = (torch.cat(parts) for parts in zip(*outputs, strict=True))
                scores.append(received)
            else:
                hidden = layer(hidden, attention_mask=None)
            if index + 1 in wanted:
                states[index + 1] = hidden
        return torch.cat([states[index] for index in wanted], dim=-1), torch.stack(scores).mean(dim=0)[:, 1:]

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
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if inputs.pop(name, None) not in (None, getattr(config, name)):
                raise SettingsError(f"{name} cannot differ from the model's config while the model is pruned")
        ids = inputs.pop("input_ids", None)
        if ids is None:
            raise PromptError("images came without input_ids; pass the ids that the processor gave, not embeddings")
        images = self.encode(inputs.pop("pixel_values"), inputs.pop("image_sizes", None))
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


def _run_scoring_layer(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An encoder layer's output, and the mean attention [tiles, tokens] that each token receives, in float32.

    Output and scores come from one map. For ViT-L on a CPU that costs a tenth more than the layer with fused
    attention; the scores beside the fused layer would cost three tenths.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    queries, keys, values = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (queries.float() * attention.scale @ keys.float().transpose(2, 3)).softmax(dim=-1)
    mixed = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
    hidden = hidden + attention.out_proj(mixed)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), weights.mean(dim=(1, 2))


def _picture_blocks(layouts: Sequence[TileLayout], grid: tuple[int, int]) -> list[NDArray[np.int64]]:
    """The unpruned tokens of LLaVA-NeXT pictures: for each, its base tile and then its unpadded view.

    A block [rows, tokens] holds rows of the tower's output [tiles * (1 + patches)], or NEWLINE.
    """
    (rows, cols), blocks, start = grid, [], 0
    for layout in layouts:
        shape = layout.num_tiles, 1 + rows * cols
        base, *tiles = np.arange(start, start + math.prod(shape)).reshape(shape)[:, 1:]
        view = np.reshape(tiles, (layout.tile_rows, layout.tile_cols, rows, cols)).swapaxes(1, 2)
        view = view.reshape(layout.tile_rows * rows, -1)[layout.patch_rows(grid), layout.patch_cols(grid)]
        blocks += [base[None], np.pad(view, ((0, 0), (0, 1)), constant_values=NEWLINE)]
        start += math.prod(shape)
    return blocks


def _keep(block: NDArray[np.int64], stays: NDArray[np.bool_], rule: NewlineRule) -> NDArray[np.bool_]:
    """Which tokens of a block stay, given that of every row of the tower's output."""
    is_newline = block == NEWLINE
    is_kept: NDArray[np.bool_] = stays[block] & ~is_newline
    if rule != "none":
        is_kept |= is_newline & (is_kept.any(axis=1, keepdims=True) | (rule == "all"))
    return is_kept


def _has_tiles(model: Llava) -> bool:
    return bool(model.config.model_type == "llava_next")


def _check_cache(inputs: dict[str, Any]) -> None:
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise SettingsError(
            "a prompt with images cannot continue a KV cache while the model is pruned, for the cache is shorter than "
            "the prompt; pass the whole conversation without past_key_values"
        )
