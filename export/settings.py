"""What to export: every setting with its default, and what settings exclude each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from hivtp.export.decoder.build import (
    BLOCK_SIZES,
    DEFAULT_BLOCK_SIZE,
    HALF_PRECISIONS,
    NUM_BITS,
    DecoderKind,
    PrefillPrecision,
)
from hivtp.export.graph.builder import VisionPrecision
from hivtp.export.graph.vision import GraphKind
from hivtp.export.language import LanguagePrecision
from hivtp_ops.errors import SpecError
from hivtp_ops.spec import PRESETS, PruningSpec

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.graph.clip import VisionShape

NewlineRule = Literal["kept-rows", "all", "none"]


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Attributes:
        preset: name of the pruning preset, used where `spec` is None.
        spec: a pruning spec of one's own.
        first_layer: first scoring layer, 0-based; None leaves it to the spec.
        num_layers: number of scoring layers; None leaves it to the spec.
        is_pruned: False exports the unpruned model.
        vision_precision: fp32, fp16, fp8 or int8.
        calibration: for fp8: picture files, whose activations it is scaled to.
        language_precision: of the decoder: fp32, int8, int4 or w8a8 for a CPU; fp16 or int4-fp16 for a GPU; "none"
            leaves it out, for those who run the language model of the checkpoint in transformers.
        block_size: weights of a decoder of int8 or int4 that share a scale; None for DEFAULT_BLOCK_SIZE.
        prefill_precision: of a second decoder, which runs the prompts: w8a8 multiplies sooner than int8 or int4 do,
            and takes a byte more for each weight; None lets one decoder run all.
        newline: which picture rows of LLaVA-NeXT end with a newline token.
        keep_total: one budget over all tiles of a LLaVA-NeXT picture; None keeps per tile what the spec says.
        graph: "vision" for a bundle that answers; "encoder" for the graph that emits the features and the
            attention of the scoring layers, without a language model.
        decoder_from: a bundle of the same language model whose decoder is taken over instead of written again.
        chat_template: the name of the checkpoint's chat template, where it has several; None takes the default.
        revision: of a checkpoint that is named by its id on the hub: a branch, tag or commit; None is the main branch.
        overwrite: replace an existing bundle.
    """

    preset: str = "paper"
    spec: PruningSpec | None = None
    first_layer: int | None = None
    num_layers: int | None = None
    is_pruned: bool = True
    vision_precision: VisionPrecision = "fp32"
    calibration: tuple[Path, ...] = ()
    language_precision: LanguagePrecision = "fp32"
    block_size: int | None = None
    prefill_precision: PrefillPrecision | None = None
    newline: NewlineRule = "kept-rows"
    keep_total: int | None = None
    graph: GraphKind = "vision"
    decoder_from: Path | None = None
    chat_template: str | None = None
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {
            "vision_precision": get_args(VisionPrecision),
            "language_precision": get_args(LanguagePrecision),
            "prefill_precision": (*get_args(PrefillPrecision), None),
            "newline": get_args(NewlineRule),
            "graph": get_args(GraphKind),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, allowed))}")
        if self.vision_precision != "fp8" and self.calibration:
            raise SpecError(
                f"calibration pictures are for vision_precision fp8, not {self.vision_precision}; leave them out"
            )
        self._check_decoder()
        if not self.is_pruned and (self.first_layer, self.num_layers) != (None, None):
            raise SpecError("first_layer and num_layers say what scores the patches, and without pruning nothing does")
        if self.graph == "encoder" and not self.is_pruned:
            raise SpecError("the encoder graph emits the scoring layers' attention, so it needs a spec for them")
        if self.graph == "encoder" and self.chat_template is not None:
            raise SpecError("an encoder bundle is asked nothing; drop chat_template")
        for name in ("decoder_from", "block_size", "prefill_precision") if self.graph == "encoder" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"an encoder bundle has no decoder; drop {name}")

    @property
    def decoder(self) -> DecoderKind | None:
        """Which decoder the bundle holds; None where it holds none."""
        if self.graph == "encoder" or self.language_precision == "none":
            return None
        block_size = (self.block_size or DEFAULT_BLOCK_SIZE) if self.language_precision in NUM_BITS else None
        return DecoderKind(self.language_precision, block_size, self.prefill_precision)

    def check_calibration(self) -> None:
        """Refuse an export in fp8 without pictures; who only chooses layers needs none.

        Raises:
            SpecError: there are none.
        """
        if self.vision_precision == "fp8" and not self.calibration:
            raise SpecError(
                "vision_precision fp8 is scaled to pictures like those that the model is meant for: give some files "
                "with calibration (--calibration-pictures)"
            )

    def _check_decoder(self) -> None:
        for name in ("block_size", "prefill_precision", "decoder_from") if self.language_precision == "none" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"{name} is for a decoder, and language_precision none has none; drop one of the two")
        if self.prefill_precision is not None:
            self._check_prefill(self.prefill_precision)
        if self.block_size is None:
            return
        if self.language_precision not in NUM_BITS:
            raise SpecError(
                f"block_size is for weights rounded in blocks, and {self.language_precision} has none; "
                f"drop it, or choose a language_precision of {' or '.join(NUM_BITS)}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise SpecError(f"block_size is {self.block_size}; choose one of {', '.join(map(str, BLOCK_SIZES))}")

    def _check_prefill(self, precision: PrefillPrecision) -> None:
        if self.language_precision == precision:
            raise SpecError(f"language_precision {precision} runs prompts in {precision} already; drop one of the two")
        if self.language_precision in HALF_PRECISIONS:
            raise SpecError(
                f"prefill_precision is for a CPU, and language_precision {self.language_precision} for a GPU; "
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
        """Refuse what the architecture cannot do.

        Raises:
            SpecError: a budget without tiles, without pruning, or too small for the base tile.
        """
        if self.keep_total is None:
            return
        if checkpoint.family != "llava_next":
            raise SpecError("keep_total shares a budget between the tiles of LLaVA-NeXT; this is LLaVA-1.5: use keep")
        if not self.is_pruned:
            raise SpecError("keep_total needs pruning; drop one of the two")
        least = min_for_base(shape)
        if self.keep_total < least:
            raise SpecError(f"keep_total is {self.keep_total}; the base tile alone keeps at least {least}")


def min_for_base(shape: VisionShape) -> int:
    """Tokens that the base tile gets at least from a budget: those of the smallest preset."""
    counts = [PruningSpec.preset(name, shape.grid).keep for name in PRESETS]
    return min(count for count in counts if count is not None)
