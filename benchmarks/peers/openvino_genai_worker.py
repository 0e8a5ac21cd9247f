"""OpenVINO GenAI, one answer for each line on standard input. Runs in an environment of its own, without hivtp.

python openvino_genai_worker.py FOLDER --threads 2 --new-tokens 16 --prompt TEXT
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image

IMAGE_SIZE = (640, 480)


def images() -> Any:
    """The same ones that the other systems get, each a new one."""
    for seed in itertools.count():
        blobs = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(blobs).resize(IMAGE_SIZE))


def peak_memory_bytes() -> int:
    """The most memory that this process held at once, files that it mapped included."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def other_core_s() -> float:
    """Core-seconds since boot of all but this process."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK") - time.process_time()


class TokenClock(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, tokens: Any) -> Any:
        """Note one token, or some that came together."""
        self.times += [time.perf_counter()] * (len(tokens) if isinstance(tokens, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is left to do."""


def main() -> None:
    """Load, say so, then answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--prompt", required=True)
    options = parser.parse_args()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.VLMPipeline(options.folder, "CPU", **settings)
    config = pipeline.get_generation_config()
    config.max_new_tokens = config.min_new_tokens = options.new_tokens
    config.do_sample, config.ignore_eos = False, True
    source = images()
    print(json.dumps({"ready": openvino.__version__, "genai": openvino_genai.__version__}), flush=True)
    for _ in sys.stdin:
        image, others = openvino.Tensor(next(source)[None]), other_core_s()
        clock, started = TokenClock(), time.perf_counter()
        result = pipeline.generate(options.prompt, images=[image], generation_config=config, streamer=clock)
        answer_ms = (time.perf_counter() - started) * 1e3
        vision_ms = result.perf_metrics.get_prepare_embeddings_duration().mean
        ttft_ms = (clock.times[0] - started) * 1e3
        sample = {
            "vision_ms": vision_ms,
            "prefill_ms": ttft_ms - vision_ms,
            "ttft_ms": ttft_ms,
            "decode_ms_per_token": (clock.times[-1] - clock.times[0]) * 1e3 / (len(clock.times) - 1),
            "answer_ms": answer_ms,
            "num_new_tokens": len(clock.times),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        print(json.dumps({"sample": sample, "others": other_core_s() - others}), flush=True)


if __name__ == "__main__":
    main()
