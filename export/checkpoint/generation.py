"""generation_config.json: where an answer ends, and how its tokens are chosen, as transformers resolves it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.engines.manifest import SamplingDefaults
from hivtp.export.checkpoint.config import CONFIG_FILE, GENERATION_FILE, read_object
from hivtp_ops.errors import CheckpointError, CheckpointWarning

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.checkpoint.folder import Checkpoint

# What changes which tokens are chosen, and a bundle knows nothing of: the value that changes nothing, for each.
_OTHERS: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "watermarking_config": None,
    "stop_strings": None,
    "token_healing": False,
}
# The same of what counts only where tokens are drawn.
_OTHERS_OF_SAMPLING: dict[str, Any] = {
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says of its answers.

    Attributes:
        eos_token_ids: tokens that end an answer.
        sampling: what a request takes where it says nothing.
        ignored: settings that change which tokens are chosen, and that hivtp does not have.
    """

    eos_token_ids: tuple[int, ...]
    sampling: SamplingDefaults
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Any) -> GenerationDefaults:
        """Read what a checkpoint says in generation_config.json, or where there is none in its config.

        Raises:
            CheckpointError: a value cannot work, or no token ends an answer.
        """
        from transformers import GenerationConfig

        folder, has_file = checkpoint.folder, (checkpoint.folder / GENERATION_FILE).exists()
        name = GENERATION_FILE if has_file else CONFIG_FILE
        try:
            if has_file:
                found = GenerationConfig.from_dict(read_object(folder / GENERATION_FILE))
            else:
                found = GenerationConfig.from_model_config(checkpoint.config)
            values = found._get_default_generation_params()
            values |= {key: value for key, value in found.to_dict().items() if value is not None}
            sampling, ignored = _sampling(values), _ignored(values)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
        return cls(_eos_token_ids(checkpoint, tokenizer, values.get("eos_token_id")), sampling, ignored)

    def warn_of_ignored(self, folder: Path) -> None:
        """Name the settings of a checkpoint that its bundle will not follow, in a CheckpointWarning."""
        if self.ignored:
            warnings.warn(
                f"{folder}: {', '.join(self.ignored)} of its {GENERATION_FILE} will not be followed, so answers may "
                "differ from those of transformers; followed are do_sample, temperature, top_p, top_k and "
                "repetition_penalty",
                CheckpointWarning,
                stacklevel=3,
            )


def _sampling(values: dict[str, Any]) -> SamplingDefaults:
    penalty = _number(values, "repetition_penalty")
    if penalty <= 0:
        raise ValueError(f"repetition_penalty is {penalty}, expected more than 0")
    if not isinstance(values["do_sample"], bool):
        raise ValueError(f"do_sample is {values['do_sample']!r}, expected true or false")
    if not values["do_sample"]:
        return SamplingDefaults(repetition_penalty=penalty)
    temperature, top_p, top_k = _number(values, "temperature"), _number(values, "top_p"), values["top_k"]
    if temperature < 0 or not 0 < top_p <= 1 or type(top_k) is not int or top_k < 0:
        raise ValueError(
            f"temperature is {temperature}, top_p {top_p}, top_k {top_k!r}; expected 0 or more, above 0 and at most 1, "
            "and a whole number, 0 or more"
        )
    return SamplingDefaults(temperature, top_p, top_k, penalty)


def _number(values: dict[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return float(value)


def _ignored(values: dict[str, Any]) -> tuple[str, ...]:
    neutral = _OTHERS | (_OTHERS_OF_SAMPLING if values["do_sample"] else {})
    return tuple(
        name for name, nothing in neutral.items() if values.get(name) is not None and values[name] not in (nothing, [])
    )


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Any, found: Any) -> tuple[int, ...]:
    """Those of the generation config, else of the config, else the tokenizer's."""
    num_tokens = checkpoint.config.text_config.vocab_size
    for candidate in (found, checkpoint.config.text_config.eos_token_id, tokenizer.eos_token_id):
        if candidate is None or candidate == []:
            continue
        ids = candidate if isinstance(candidate, list) else [candidate]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < num_tokens:
                raise CheckpointError(
                    f"{checkpoint.folder} names {token_id!r} as eos_token_id, and its vocabulary has the tokens 0 to "
                    f"{num_tokens - 1}; correct it in {GENERATION_FILE} or config.json"
                )
        return tuple(ids)
    raise CheckpointError(
        f"{checkpoint.folder} names no end-of-sequence token; add eos_token_id to its {GENERATION_FILE} or config.json"
    )
