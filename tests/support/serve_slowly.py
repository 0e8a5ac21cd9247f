"""hivtp serve with a model that takes its time for each token: a script for tests of how a server ends."""

from __future__ import annotations

import sys
import time
from typing import Any

from hivtp.main import main
from hivtp.runtime.generation import Generation

SECONDS_PER_TOKEN = 0.05


def slow(generation: Generation, logits: Any, choose: Any = Generation.choose) -> int:
    time.sleep(SECONDS_PER_TOKEN)
    return choose(generation, logits)


if __name__ == "__main__":
    Generation.choose = slow  # type: ignore[method-assign]
    sys.exit(main(["serve", *sys.argv[1:]]))
