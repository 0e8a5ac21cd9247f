"""The language model of a checkpoint in transformers: the reference, on any device that torch knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp.engines.torch.errors import require_packages, torch_errors
from hivtp.engines.weights import CheckpointWeights, locate_weights
from hivtp.runtime.device_rows import DeviceRows
from hivtp.runtime.language.compiled import CompiledDecoder
from hivtp.runtime.language.decoding import decode, decode_batch, decode_batch_or_halves, num_new_tokens
from hivtp.runtime.language.dynamic_cache import CachedBatch, CachedSequence, Decoder
from hivtp.runtime.language.static_batch import StaticBatch
from hivtp.runtime.language.static_cache import StaticSequence
from hivtp_ops.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hivtp.engines.base import Device
    from hivtp.engines.bundle import Manifest
    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.language.base import ChooseToken, DecodeRequest, SequenceCache
    from hivtp.runtime.language.settings import LanguageSettings
    from hivtp_ops.errors import HivtpError


class TransformersLanguage:
    """A causal language model of transformers over the weights of the checkpoint that a bundle was exported from.

    Only the language part is read, weight by weight, each once and straight to its device and dtype.

    Compiled, it gives the tokens of the same arithmetic, fused: in float32 those that it gives uncompiled. The first
    runs of each shape take from seconds to minutes, so ask what will be asked once before it counts; CompiledDecoder
    says which shapes there are.

    Args:
        manifest: of the bundle.
        settings: the checkpoint, and how to run it.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or not the one that the bundle was exported from.
        EngineError: torch cannot load it, or cannot compile here.
        MissingExtraError: torch, transformers or safetensors is not installed.
        OutOfMemoryError: it does not fit into the memory of the device.
        SettingsError: torch has no such device.
    """

    def __init__(self, manifest: Manifest, settings: LanguageSettings) -> None:
        assert manifest.language is not None, "check_backend refuses an encoder bundle"
        assert settings.checkpoint is not None, "LanguageSettings asks for it"
        require_packages("torch", "transformers", "safetensors", extra="transformers")
        self.manifest = manifest.language
        self.context_length = manifest.language.context_length
        weights = _open_source(Path(settings.checkpoint), manifest)
        model = _load(weights, settings)
        self._decoder = Decoder(model)
        self._compiled: CompiledDecoder | None = None
        if settings.is_compiled:
            self._compiled = CompiledDecoder(model, self.context_length, _has_exact_counts(manifest))

    @property
    def rows_device(self) -> Device:
        """See LanguageBackend.rows_device. Vision engines take the first GPU; from there rows also go to another."""
        return "cuda" if self._decoder.device.type == "cuda" else "cpu"

    def embed(self, token_ids: Sequence[int]) -> DeviceRows:
        """See LanguageBackend.embed."""
        return DeviceRows.of_tokens(token_ids)

    def is_end(self, token_id: int) -> bool:
        """See LanguageBackend.is_end."""
        return token_id in self.manifest.eos_token_ids

    def new_cache(self) -> CachedSequence | StaticSequence:
        """See LanguageBackend.new_cache."""
        return CachedSequence(self._decoder) if self._compiled is None else StaticSequence(self._compiled)

    def generate(
        self,
        inputs_embeds: Embeddings,
        max_new_tokens: int,
        choose_token: ChooseToken,
        cache: SequenceCache | None = None,
    ) -> Iterator[int]:
        """See LanguageBackend.generate; `inputs_embeds` may also be an array, or a tensor on any device."""
        sequence = self.new_cache() if cache is None else cache
        assert isinstance(sequence, CachedSequence | StaticSequence), "a cache belongs to the backend that made it"
        num_tokens = min(max_new_tokens, self.context_length - sequence.length - len(inputs_embeds))
        if isinstance(sequence, StaticSequence):
            sequence.reserve(sequence.length + len(inputs_embeds) + num_tokens)
        yield from decode(self, sequence, inputs_embeds, num_tokens, choose_token)

    def generate_batch(self, requests: Sequence[DecodeRequest]) -> Iterator[dict[int, int | HivtpError]]:
        """See LanguageBackend.generate_batch.

        Compiled, all sequences have their place in one cache from the start; where there is no memory for it, the
        halves are decoded one after the other.
        """
        compiled = self._compiled
        if compiled is None or not requests:
            yield from decode_batch(self, CachedBatch(self._decoder), requests)
            return
        longest = max(len(request.inputs_embeds) for request in requests)
        num_new = max(num_new_tokens(self, request) for request in requests)
        yield from decode_batch_or_halves(
            self, requests, lambda: StaticBatch(compiled, len(requests), longest, num_new)
        )


def _has_exact_counts(manifest: Manifest) -> bool:
    """Whether every picture becomes as many tokens."""
    return manifest.tiling is None and (manifest.pruning is None or manifest.pruning.keep is not None)


def _open_source(folder: Path, manifest: Manifest) -> CheckpointWeights:
    """The weights of a checkpoint, if it is the one that a bundle was exported from."""
    name = manifest.source.get("name")
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {found}; give the folder of the checkpoint {name!r}, from which the bundle was exported"
        )
    weights = CheckpointWeights(folder, locate_weights(folder))
    if weights.fingerprint != manifest.source.get("fingerprint"):
        raise CheckpointError(
            f"{folder} is not the checkpoint of this {manifest.family} bundle, which was exported from {name!r}: its "
            "config, or the names, shapes, files or first values of its weights are others; give that folder, or "
            "export this one"
        )
    return weights


def _load(weights: CheckpointWeights, settings: LanguageSettings) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, settings.dtype)
    try:
        device = torch.zeros((), dtype=dtype, device=settings.device).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"the device {settings.device!r} cannot be used: {error}; the language model also runs on 'cpu'"
        ) from error
    config = AutoConfig.from_pretrained(weights.folder, local_files_only=True).text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch_errors(device):
        # One weight at a time: no second copy of the model is ever in memory.
        state = {name: weights.language_tensor(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Its frequencies are no weights, so it is made anew off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)
