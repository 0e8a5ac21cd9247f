"""Which language backend answers, and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from hivtp.engines.base import EngineSettings, Precision
from hivtp_ops.errors import SettingsError

BackendName = Literal["onnxruntime", "openvino", "transformers"]
LanguageDtype = Literal["float32", "bfloat16", "float16"]
# Of the backends that run the bundle's decoder.
DEVICES = {"onnxruntime": ("auto", "cpu", "cuda"), "openvino": ("auto", "cpu")}
# The options of transformers that the bundle's decoder does not know.
TRANSFORMERS_OPTIONS = ("checkpoint", "dtype")


@dataclass(frozen=True)
class LanguageOptions:
    """How answers are decoded.

    Args:
        backend: "onnxruntime" and "openvino" run the bundle's decoder; "transformers" the language model of a
            checkpoint.
        device: where the model runs. Of onnxruntime "cpu" or "cuda"; "auto" takes a GPU where the decoder is float16
            and CUDA works. Of openvino "cpu" or "auto", which is the same. Of transformers as torch names it: "cpu",
            "cuda", "cuda:1"; "auto" is the CPU.
        num_threads: of onnxruntime and openvino: threads of one run on the CPU; None takes the physical cores.
        checkpoint: of transformers: the Hugging Face folder that the bundle was exported from.
        dtype: of transformers: of weights, activations and KV cache.
        precision: of openvino: of activations and KV cache; see EngineSettings.

    Raises:
        SettingsError: there is no such backend or dtype, or an option belongs to another backend, or the checkpoint
            is missing.
    """

    backend: BackendName = "onnxruntime"
    device: str = "auto"
    num_threads: int | None = None
    checkpoint: str | Path | None = None
    dtype: LanguageDtype = "float32"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            known = ", ".join(get_args(BackendName))
            raise SettingsError(f"no language backend is named {self.backend!r}; there are {known}")
        if self.dtype not in get_args(LanguageDtype):
            known = ", ".join(get_args(LanguageDtype))
            raise SettingsError(f"the dtype of the language model must be one of {known}, not {self.dtype!r}")
        _ = self.engine_settings
        if self.precision != LanguageOptions.precision and self.backend != "openvino":
            raise SettingsError(
                f"precision {self.precision!r} belongs to the language backend openvino; leave it out, or choose "
                "openvino"
            )
        if self.backend == "transformers":
            self._check_checkpoint()
            return
        if self.device not in DEVICES[self.backend]:
            known = ", ".join(DEVICES[self.backend])
            raise SettingsError(f"{self.backend} runs the bundle's decoder on one of {known}, not on {self.device!r}")
        defaults = {option.name: option.default for option in fields(self)}
        for name in TRANSFORMERS_OPTIONS:
            if getattr(self, name) != defaults[name]:
                raise SettingsError(
                    f"{name} {str(getattr(self, name))!r} belongs to the language backend transformers; "
                    f"{self.backend} runs the decoder in the bundle: leave it out, or choose transformers"
                )

    @property
    def engine_settings(self) -> EngineSettings:
        """How the bundle's decoder runs."""
        return EngineSettings(num_threads=self.num_threads, precision=self.precision)

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            raise SettingsError(
                "the language backend transformers needs a checkpoint: the Hugging Face folder that the bundle "
                "was exported from"
            )
        if not isinstance(self.checkpoint, str | Path):
            raise SettingsError(f"checkpoint must be the path of a folder, not a {type(self.checkpoint).__name__}")
