"""Runs vLLM's engine in a process of its own: `python -m tests.vllm.engine`, what to do on standard input.

Standard input is pickled (ours, not a stranger's): the arguments of `LLM`, and batches of prompts. Each batch is handed
over whole, so that its images are encoded together. The answers go to the file that the first argument names.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer all batches."""
    from vllm import LLM, SamplingParams

    settings, batches, num_new = pickle.load(sys.stdin.buffer)
    engine = LLM(**settings)
    sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    found: list[list[dict[str, Any]]] = []
    for batch in batches:
        outputs = engine.generate(batch, sampling, use_tqdm=False)
        found.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "num_prompt_tokens": len(output.prompt_token_ids),
                    "num_cached_tokens": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    Path(sys.argv[1]).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
