"""What to export: every setting with its default, and which settings exclude each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from hivtp.export.checkpoint.original_layout.layout import OriginalOptions
from hivtp.export.decoder.build import (
    BLOCK_SIZES,
    CALIBRATED_PRECISIONS,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_ROUNDING,
    HALF_PRECISIONS,
    NUM_BITS,
    DecoderKind,
    PrefillPrecision,
    Rounding,
)
from hivtp.export.graph.builder import VisionPrecision
from hivtp.export.graph.vision import GraphKind
from hivtp.export.language import LanguagePrecision
from hivtp_ops.errors import SpecError
from hivtp_ops.spec import PRESETS, PruningSpec

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.graph.shape import VisionShape

NewlineRule = Literal["kept-rows", "all", "none"]


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Attributes:
        preset: name of the pruning preset, used where `spec` is None.
        spec: a rule of your own; None takes the preset.
        first_layer: first scoring layer, 0-based; None leaves it to the spec.
        num_layers: number of scoring layers; None leaves it to the spec.
        is_pruned: False exports the unpruned model.
        vision_precision: fp32, fp16, fp8 or int8.
        vision_fallback: what the vision graph is written in where its check refuses vision_precision; None ends the
            export there.
        calibration: for fp8: files of images; their activations set its scales.
        language_precision: of the decoder: fp32, int8, int4 or w8a8 for a CPU; fp16 or int4-fp16 for a GPU; "none"
            leaves it out, for those who run the language model of the checkpoint in transformers.
        block_size: weights of an int8 or int4 decoder that share a scale; None for DEFAULT_BLOCK_SIZE.
        prefill_precision: of a prefill decoder, a second one that runs the prompts: w8a8 is faster there than int8 or
            int4, and takes one byte more per weight; None lets one decoder run both.
        language_rounding: of an int4 or w8a8 decoder: "plain" rounds each weight to the nearest; "calibrated" reads a
            text with the model first, and rounds 4 bits by GPTQ and 8-bit activations with SmoothQuant; None takes
            DEFAULT_ROUNDING.
        calibration_text: a file of text like that which the model will read, in UTF-8; None takes one that every
            Python has.
        newline: which rows of patches of a LLaVA-NeXT image end with a newline token.
        keep_total: one budget over all tiles of a LLaVA-NeXT image; None keeps what the spec says of each tile.
        graph: "vision" for a bundle that answers; "encoder" for the graph that emits the features and the
            attention of the scoring layers, without a language model.
        decoder_from: a bundle of the same language model; its decoder is copied instead of written again.
        chat_template: the name of the checkpoint's chat template, where it has several; None takes the default.
        conversation: the form of a conversation, for a checkpoint in the layout of the original LLaVA code; None takes
            that of its kind.
        vision_tower: folder of the vision tower of such a checkpoint, where it does not hold it.
        revision: of a checkpoint that is named by its id on the hub: a branch, tag or commit; None is the main branch.
        overwrite: replace an existing bundle.
    """

    preset: str = "paper"
    spec: PruningSpec | None = None
    first_layer: int | None = None
    num_layers: int | None = None
    is_pruned: bool = True
    vision_precision: VisionPrecision = "fp32"
    vision_fallback: VisionPrecision | None = None
    calibration: tuple[Path, ...] = ()
    language_precision: LanguagePrecision = "fp32"
    block_size: int | None = None
    prefill_precision: PrefillPrecision | None = None
    language_rounding: Rounding | None = None
    calibration_text: Path | None = None
    newline: NewlineRule = "kept-rows"
    keep_total: int | None = None
    graph: GraphKind = "vision"
    decoder_from: Path | None = None
    chat_template: str | None = None
    conversation: str | None = None
    vision_tower: Path | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {
            "vision_precision": get_args(VisionPrecision),
            "vision_fallback": (*get_args(VisionPrecision), None),
            "language_precision": get_args(LanguagePrecision),
            "prefill_precision": (*get_args(PrefillPrecision), None),
            "language_rounding": (*get_args(Rounding), None),
            "newline": get_args(NewlineRule),
            "graph": get_args(GraphKind),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, allowed))}")
        if self.vision_precision != "fp8" and self.calibration:
            raise SpecError(
                f"calibration images are for vision_precision fp8, not {self.vision_precision}; leave them out"
            )
        if "fp8" in (self.vision_fallback, self.vision_precision) and self.vision_fallback is not None:
            raise SpecError("vision_fallback is for precisions that need no calibration images, and fp8 does; drop it")
        self._check_decoder()
        if not self.is_pruned and (self.first_layer, self.num_layers) != (None, None):
            raise SpecError("first_layer and num_layers say which layers score the patches; without pruning none does")
        if self.graph == "encoder" and not self.is_pruned:
            raise SpecError("the encoder graph gives the attention of the scoring layers; it needs pruning")
        if self.graph == "encoder" and self.chat_template is not None:
            raise SpecError("an encoder bundle answers no prompts; drop chat_template")
        for name in ("decoder_from", "block_size", "prefill_precision") if self.graph == "encoder" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"an encoder bundle has no decoder; drop {name}")

    @property
    def original(self) -> OriginalOptions:
        """What a checkpoint in the layout of the original LLaVA code does not say."""
        return OriginalOptions(self.conversation, self.vision_tower)

    @property
    def decoder(self) -> DecoderKind | None:
        """Which decoder the bundle holds; None where it holds none."""
        if self.graph == "encoder" or self.language_precision == "none":
            return None
        block_size = (self.block_size or DEFAULT_BLOCK_SIZE) if self.language_precision in NUM_BITS else None
        return DecoderKind(self.language_precision, block_size, self.prefill_precision, self._rounding)

    @property
    def _rounding(self) -> Rounding | None:
        """None where nothing is rounded that a text could calibrate."""
        precisions = {self.language_precision, self.prefill_precision}
        if self.graph == "encoder" or precisions.isdisjoint(CALIBRATED_PRECISIONS):
            return None
        return self.language_rounding or DEFAULT_ROUNDING

    def check_calibration(self) -> None:
        """Refuse an export in fp8 without images; the choice of layers needs none.

        Raises:
            SpecError: there are none.
        """
        if self.vision_precision == "fp8" and not self.calibration:
            raise SpecError(
                "vision_precision fp8 takes its scales from images like those that you will ask about: give some files "
                "with calibration (--calibration-images)"
            )

    def _check_decoder(self) -> None:
        for name in ("block_size", "prefill_precision", "decoder_from") if self.language_precision == "none" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"{name} is for a decoder, and language_precision none has none; drop one of the two")
        self._check_rounding()
        if self.prefill_precision is not None:
            self._check_prefill(self.prefill_precision)
        if self.block_size is None:
            return
        if self.language_precision not in NUM_BITS:
            raise SpecError(
                f"block_size is for weights rounded in blocks, and those of {self.language_precision} are not; "
                f"drop it, or choose a language_precision of {' or '.join(NUM_BITS)}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise SpecError(f"block_size is {self.block_size}; choose one of {', '.join(map(str, BLOCK_SIZES))}")

    def _check_rounding(self) -> None:
        for name in ("language_rounding", "calibration_text"):
            if getattr(self, name) is not None and self._rounding is None:
                raise SpecError(
                    f"{name} is for decoders in {', '.join(CALIBRATED_PRECISIONS)}, and there is none of these; drop it"
                )
        if self.calibration_text is None:
            return
        if self.language_rounding == "plain":
            raise SpecError("calibration_text is for language_rounding calibrated, not plain; drop one of the two")
        if self.decoder_from is not None:
            raise SpecError(
                "calibration_text is for a decoder that is written, not for decoder_from; drop one of the two"
            )

    def _check_prefill(self, precision: PrefillPrecision) -> None:
        if self.language_precision == precision:
            raise SpecError(f"language_precision {precision} already runs prompts in {precision}; drop one of the two")
        if self.language_precision in HALF_PRECISIONS:
            raise SpecError(
                f"prefill_precision is for a CPU, and language_precision {self.language_precision} is for a GPU; "
                "drop one of the two"
            )

    def resolved_spec(self, shape: VisionShape) -> PruningSpec | None:
        """The spec for a vision tower: preset fitted to its grid, layers to its depth; None without pruning.

        Raises:
            SpecError: it does not fit.
        """
        return self.fitted_spec(shape).resolve(shape.num_layers) if self.is_pruned else None

    def fitted_spec(self, shape: VisionShape) -> PruningSpec:
        """The spec for a vision tower, with its layers as they are given or left open.

        With `keep_total` a tile may keep as much as the whole budget; the runtime shares it out.

        Raises:
            SpecError: it does not fit.
        """
        spec = self.spec or PruningSpec.preset(self.preset, shape.grid)
        layers = {"first_layer": self.first_layer, "num_layers": self.num_layers}
        spec = replace(spec, **{name: value for name, value in layers.items() if value is not None})
        if self.keep_total is not None:
            spec = replace(spec, keep=min(self.keep_total, shape.num_patches))
        spec.validate(shape.grid)
        return spec

    def check_family(self, checkpoint: Checkpoint, shape: VisionShape) -> None:
        """Refuse a budget that the architecture or the rule cannot use.

        Raises:
            SpecError: a budget without tiles, without pruning, or too small for the base tile.
        """
        if self.keep_total is None:
            return
        if not checkpoint.is_tiled:
            raise SpecError("keep_total is a budget over the tiles of an image, and this is LLaVA-1.5; use keep")
        if not self.is_pruned:
            raise SpecError("keep_total needs pruning; drop one of the two")
        minimum = min_for_base(shape)
        if self.keep_total < minimum:
            raise SpecError(f"keep_total is {self.keep_total}; the base tile alone keeps at least {minimum}")


def min_for_base(shape: VisionShape) -> int:
    """The minimum that the base tile gets of a budget: the tokens of the smallest preset."""
    counts = [PruningSpec.preset(name, shape.grid).keep for name in PRESETS]
    return min(count for count in counts if count is not None)
