"""Which language backend answers, and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from hivtp.engines.base import EngineSettings
from hivtp_ops.errors import SettingsError

BackendName = Literal["onnxruntime", "transformers"]
LanguageDtype = Literal["float32", "bfloat16", "float16"]
ONNXRUNTIME_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LanguageSettings:
    """How answers are decoded.

    Args:
        backend: "onnxruntime" runs the bundle's decoder; "transformers" the language model of a checkpoint.
        engine: of onnxruntime: how it runs the decoder.
        checkpoint: of transformers: the Hugging Face folder that the bundle was exported from.
        device: where the model runs. Of onnxruntime "cpu" or "cuda"; "auto" takes a GPU where the decoder is float16
            and CUDA works. Of transformers as torch names it: "cpu", "cuda", "cuda:1"; "auto" is the CPU.
        dtype: of transformers: of weights, activations and KV cache.
        is_compiled: of transformers: whether torch.compile compiles it, over a KV cache of fixed size.

    Raises:
        SettingsError: there is no such backend or dtype, or a setting belongs to the other backend, or the
            checkpoint is missing.
    """

    backend: BackendName = "onnxruntime"
    engine: EngineSettings = field(default_factory=EngineSettings)
    checkpoint: str | Path | None = None
    device: str = "auto"
    dtype: LanguageDtype = "float32"
    is_compiled: bool = False

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            known = " and ".join(get_args(BackendName))
            raise SettingsError(f"no language backend is named {self.backend!r}; there are {known}")
        if self.dtype not in get_args(LanguageDtype):
            known = ", ".join(get_args(LanguageDtype))
            raise SettingsError(f"the dtype of the language model must be one of {known}, not {self.dtype!r}")
        if not isinstance(self.is_compiled, bool):
            raise SettingsError(
                f"whether the language model is compiled must be True or False, not {self.is_compiled!r}"
            )
        if self.backend == "transformers":
            self._check_checkpoint()
            return
        if self.device not in ONNXRUNTIME_DEVICES:
            known = ", ".join(ONNXRUNTIME_DEVICES)
            raise SettingsError(f"the bundle's decoder runs on one of {known}, not on {self.device!r}")
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name in ("checkpoint", "dtype", "is_compiled"):
            if getattr(self, name) != defaults[name]:
                raise SettingsError(
                    f"{name} {str(getattr(self, name))!r} belongs to the language backend transformers; "
                    f"{self.backend} runs the decoder in the bundle: leave it out, or choose transformers"
                )

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            raise SettingsError(
                "the language backend transformers needs a checkpoint: the Hugging Face folder that the bundle "
                "was exported from"
            )
        if not isinstance(self.checkpoint, str | Path):
            raise SettingsError(f"checkpoint must be the path of a folder, not {type(self.checkpoint).__name__}")
