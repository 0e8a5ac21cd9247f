"""A question about an empty image, put to a language model in another server before anybody uses the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.generation import Generation, scheduler_for, steps_of
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.language.remote import RemoteBackend
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.request import Request
from hivtp.runtime.vision.encoder import EncodedImage

if TYPE_CHECKING:
    from hivtp.runtime.model import Model

QUESTION = "Is it so?"


def check_remote(model: Model) -> None:
    """Find out whether the server can answer; a language model that runs here needs no such check.

    Raises:
        BackendUnavailableError: the server cannot be asked now.
        EngineError: it cannot answer, and what it lacks.
    """
    if not isinstance(model.language, RemoteBackend):
        return
    manifest = model.bundle.manifest
    vision, pruning = manifest.vision, manifest.pruning
    num_tokens = vision.num_prefix_tokens + vision.capacity
    image = EncodedImage(np.zeros((num_tokens, vision.hidden_size), np.float32), (), num_tokens, b"")

    def ask() -> None:
        message = Message("user", [ImagePart(image), QUESTION])
        request = Request(message, sampling=SamplingParams(max_new_tokens=1, temperature=0))
        generation = Generation(model, model.encode(model.prepare(request)))
        for _ in steps_of(scheduler_for(model, [generation]), generation):
            pass

    counts_vary = manifest.tiling is not None or (pruning is not None and pruning.keep is None)
    model.language.check(ask, counts_vary=counts_vary)
