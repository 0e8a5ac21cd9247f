"""Which language backend answers, and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hivtp.engines.base import EngineSettings, Precision
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

BackendName = Literal["onnxruntime", "openvino", "transformers", "vllm"]
LanguageDtype = Literal["float32", "bfloat16", "float16"]
# Of the backends that run the bundle's decoder.
DEVICES: Mapping[BackendName, tuple[str, ...]] = {"onnxruntime": ("auto", "cpu", "cuda"), "openvino": ("auto", "cpu")}
# The options that some backends alone know.
OWNERS: Mapping[str, tuple[BackendName, ...]] = {
    "device": ("onnxruntime", "openvino", "transformers"),
    "precision": ("openvino",),
    "checkpoint": ("transformers",),
    "dtype": ("transformers", "vllm"),
    "url": ("vllm",),
    "api_key": ("vllm",),
    "model_name": ("vllm",),
    "max_silence": ("vllm",),
    "max_retries": ("vllm",),
}


@dataclass(frozen=True)
class LanguageOptions:
    """How answers are decoded.

    Args:
        backend: "onnxruntime" and "openvino" run the bundle's decoder; "transformers" the language model of a
            checkpoint; "vllm" asks a server of vLLM, which has the checkpoint that the bundle was exported from.
        device: where the model runs. Of onnxruntime "cpu" or "cuda"; "auto" takes a GPU where the decoder is float16
            and CUDA works. Of openvino "cpu" or "auto", which is the same. Of transformers as torch names it: "cpu",
            "cuda", "cuda:1"; "auto" is the CPU.
        num_threads: of onnxruntime and openvino: threads of one run on the CPU; None takes the physical cores.
        checkpoint: of transformers: the Hugging Face folder that the bundle was exported from.
        dtype: of transformers: of weights, activations and KV cache. Of vllm: in which images are sent, float32 or
            float16, which is half as much.
        precision: of openvino: of activations and KV cache; see EngineSettings.
        url: of vllm: of the server, "http://host:8000".
        api_key: of vllm: what the server wants to be told; None tells it nothing.
        model_name: of vllm: what the server calls the model; None takes the one that it has.
        max_silence: of vllm: seconds that the server may take for its first token, or between two.
        max_retries: of vllm: how often a request is sent again that the server has not begun to answer.

    Raises:
        SettingsError: there is no such backend or dtype, or an option belongs to another backend, or one is missing
            or out of its range.
    """

    backend: BackendName = "onnxruntime"
    device: str = "auto"
    num_threads: int | None = None
    checkpoint: str | Path | None = None
    dtype: LanguageDtype = "float32"
    precision: Precision = "auto"
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    model_name: str | None = None
    max_silence: float = 120.0
    max_retries: int = 2

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            known = ", ".join(get_args(BackendName))
            raise SettingsError(f"no language backend is named {self.backend!r}; there are {known}")
        if self.dtype not in get_args(LanguageDtype):
            known = ", ".join(get_args(LanguageDtype))
            raise SettingsError(f"the dtype of the language model must be one of {known}, not {self.dtype!r}")
        _ = self.engine_settings
        self._check_owners()
        match self.backend:
            case "onnxruntime" | "openvino":
                self._check_device()
            case "transformers":
                self._check_checkpoint()
            case "vllm":
                self._check_server()

    @property
    def engine_settings(self) -> EngineSettings:
        """How the bundle's decoder runs."""
        return EngineSettings(num_threads=self.num_threads, precision=self.precision)

    def _check_owners(self) -> None:
        for option in fields(self):
            owners, value = OWNERS.get(option.name), getattr(self, option.name)
            if owners is not None and self.backend not in owners and value != option.default:
                shown = "" if option.name == "api_key" else f" {str(value)!r}"
                raise SettingsError(
                    f"{option.name}{shown} belongs to the language backend {' or '.join(owners)}, and this is "
                    f"{self.backend}: leave it out, or choose {' or '.join(owners)}"
                )

    def _check_device(self) -> None:
        if self.device not in DEVICES[self.backend]:
            known = ", ".join(DEVICES[self.backend])
            raise SettingsError(f"{self.backend} runs the bundle's decoder on one of {known}, not on {self.device!r}")

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            raise SettingsError(
                "the language backend transformers needs a checkpoint: the Hugging Face folder that the bundle "
                "was exported from"
            )
        if not isinstance(self.checkpoint, str | Path):
            raise SettingsError(f"checkpoint must be the path of a folder, not a {type(self.checkpoint).__name__}")

    def _check_server(self) -> None:
        if not isinstance(self.url, str) or not self.url.startswith(("http://", "https://")):
            raise SettingsError(f'the language backend vllm needs a url, such as "http://host:8000", not {self.url!r}')
        if self.dtype == "bfloat16":
            raise SettingsError("images are sent to vLLM in float32 or float16; numpy files have no bfloat16")
        for name in ("api_key", "model_name"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.isprintable() or not value.isascii()):
                raise SettingsError(f"{name} must be printable ASCII")
        silence, retries = self.max_silence, self.max_retries
        if isinstance(silence, bool) or not isinstance(silence, int | float) or not 0 < silence < float("inf"):
            raise SettingsError(f"max_silence must be seconds, a number above 0, not {silence!r}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise SettingsError(f"max_retries must be a whole number, 0 or more, not {retries!r}")
