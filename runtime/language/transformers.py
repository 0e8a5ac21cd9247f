"""The language model of a checkpoint in transformers: the reference, on any device that torch knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.runtime.config import read_config
from hivtp.runtime.language.base import closed_error, kv_bytes_per_position
from hivtp.runtime.language.dynamic_cache import TransformersSlots
from hivtp.runtime.language.torch_errors import require_packages, torch_errors
from hivtp.runtime.weights import open_source
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hivtp.engines.manifest import Manifest
    from hivtp.runtime.language.options import LanguageOptions
    from hivtp.runtime.weights import CheckpointWeights


class TransformersLanguage:
    """A causal language model of transformers over the weights of the checkpoint that a bundle was exported from.

    Only the language part is read, weight by weight, each once and straight to its device and dtype.

    Args:
        manifest: of the bundle.
        options: the checkpoint, and how to run it.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or not the one that the bundle was exported from.
        EngineError: torch cannot load it.
        MissingExtraError: torch, transformers or safetensors is not installed.
        OutOfMemoryError: it does not fit into the memory of the device.
        SettingsError: torch has no such device.
    """

    def __init__(self, manifest: Manifest, options: LanguageOptions) -> None:
        assert manifest.language is not None, "the factory refuses an encoder bundle"
        assert options.checkpoint is not None, "LanguageOptions asks for it"
        require_packages("torch", "transformers", "safetensors", extra="transformers")
        import torch

        self.context_length = manifest.language.context_length
        self.kv_bytes_per_position = kv_bytes_per_position(manifest.language, getattr(torch, options.dtype).itemsize)
        self.description = f"{options.dtype} language model in transformers"
        self.device = torch_device(options.device, options.dtype)
        self._loaded: Any = _load(open_source(options.checkpoint, manifest), self.device, options.dtype)

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See LanguageBackend.embed."""
        import torch

        table: torch.Tensor = self._model.get_input_embeddings().weight
        with torch.inference_mode():
            vectors: NDArray[np.float32] = table[torch.tensor(token_ids, dtype=torch.long)].float().cpu().numpy()
        return vectors

    def open_slots(self, num_slots: int, capacity: int) -> TransformersSlots:
        """See LanguageBackend.open_slots."""
        return TransformersSlots(self._model, num_slots, capacity)

    def close(self) -> None:
        """See LanguageBackend.close."""
        self._loaded = None

    @property
    def _model(self) -> Any:
        if (loaded := self._loaded) is None:
            raise closed_error()
        return loaded


def torch_device(name: str, dtype: str) -> torch.device:
    """The device of a name, on which the dtype can be used; "auto" is the CPU.

    Raises:
        SettingsError: torch has no such device.
    """
    import torch

    try:
        return torch.zeros((), dtype=getattr(torch, dtype), device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"the device {name!r} cannot be used: {error}; torch also runs on 'cpu'") from error


def _load(weights: CheckpointWeights, device: torch.device, dtype_name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, dtype_name)
    config = read_config(weights.folder).text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch_errors(device, "language model"):
        # One weight at a time: no second copy of the model is ever in memory.
        state = {name: weights.language_tensor(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Its frequencies are not weights, so it is made anew off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)
