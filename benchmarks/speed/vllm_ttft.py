"""Time to first token of vLLM with the plugin, 192 tokens against 576: `python -m benchmarks.speed.vllm_ttft`.

Both servers run at once, and answer in turns. Needs vLLM: `make vllm` makes an environment that has it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from benchmarks.speed.ttft import PROMPT, drawn_images
from benchmarks.timing.harness import measure_in_turns
from benchmarks.timing.record import Row, report
from benchmarks.timing.vllm_server import core_seconds, vllm_server
from benchmarks.timing.worker import LocalSystem
from benchmarks.timing.workspace import Workspace, add_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from benchmarks.timing.vllm_server import VllmServer
    from benchmarks.timing.worker import Sample

BASELINE = "576 tokens"
PRUNING = {BASELINE: {"preset": "none"}, "192 tokens": {"preset": "192"}}
NUM_NEW = 8


class ServedSystem(LocalSystem):
    """A server that is asked about a new image in each pass.

    Args:
        name: of its row.
        server: answers.
        images: what it is asked about.
    """

    def __init__(self, name: str, server: VllmServer, images: Iterator[Image.Image]) -> None:
        super().__init__(name, self._ask)
        self._server = server
        self._images = images

    def sample(self) -> tuple[Sample, float]:
        """See LocalSystem.sample; what the server takes is not of others."""
        own = core_seconds(self._server)
        sample, others = super().sample()
        return sample, max(0.0, others - (core_seconds(self._server) - own))

    def _ask(self) -> Sample:
        request = urllib.request.Request(
            f"{self._server.url}/v1/chat/completions",
            json.dumps(_question(next(self._images))).encode(),
            {"Content-Type": "application/json"},
        )
        times, usage = [], None
        started = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                usage = chunk.get("usage") or usage
                if any(choice.get("token_ids") for choice in chunk.get("choices", ())):
                    times.append(time.perf_counter())
        assert usage is not None, "it was asked for"
        assert len(times) == NUM_NEW, "one chunk for each token"
        return {
            "ttft_ms": (times[0] - started) * 1e3,
            "decode_ms_per_token": (times[-1] - times[0]) * 1e3 / (NUM_NEW - 1),
            "num_prompt_tokens": usage["prompt_tokens"],
        }


def _question(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_NEW,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "vllm-ttft.json")
    parser.add_argument("--dtype", default="float32", help="of weights and products (default: %(default)s)")
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "vllm")
    with contextlib.ExitStack() as stack:
        systems = []
        for name, pruning in PRUNING.items():
            print(f"  starting {name}", flush=True)
            log = workspace.folder / f"{pruning['preset']}.log"
            server = vllm_server(
                workspace.checkpoint,
                pruning,
                log,
                *("--max-model-len", "2048", "--dtype", options.dtype, "--no-enable-prefix-caching"),
                num_threads=options.threads,
            )
            # All get the same images.
            systems.append(ServedSystem(name, stack.enter_context(server), drawn_images()))
        results = measure_in_turns(systems, options.rounds)
    quantities = {"time to first token": "ttft_ms", "decode per token": "decode_ms_per_token"}
    tables = {
        title: [Row.of(results, name, quantity, BASELINE) for name in PRUNING] for title, quantity in quantities.items()
    }
    for name in PRUNING:
        print(f"{name}: {results.first(name, 'num_prompt_tokens')} tokens in the prompt")
    report(options, tables, {"answers": results})


if __name__ == "__main__":
    main()
