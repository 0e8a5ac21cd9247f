"""A bundle as a model of lmms-eval: `--model hivtp`, through the entry-point group `lmms_eval.models`."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hivtp.runtime.integrations.lmms_eval.evaluation import Question


def manifests() -> list[Any]:
    """What the entry point gives to lmms-eval: one `ModelManifest`, or nothing where it has no such class.

    Never raises: lmms-eval drops the models of every package when the entry point of one fails.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        return [ModelManifest(model_id="hivtp", simple_class_path=f"{__name__}.BundleModel")]
    except (ImportError, TypeError) as error:
        warnings.warn(f"this lmms-eval gets no model hivtp, which needs one like 0.7: {error}", stacklevel=2)
        return []


def __getattr__(name: str) -> Any:
    # lmms-eval finds the class by this name; its base class comes with lmms-eval, which imports torch.
    if name == "BundleModel":
        return _bundle_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _bundle_model() -> type:
    from lmms_eval import utils
    from lmms_eval.api.model import lmms
    from loguru import logger
    from tqdm import tqdm

    from hivtp.runtime.integrations.lmms_eval.evaluation import BenchmarkModel, Question
    from hivtp.runtime.language.options import BackendName, LanguageOptions
    from hivtp.runtime.pipeline import Pipeline
    from hivtp.runtime.vision.options import VisionOptions

    class BundleModel(lmms):  # type: ignore[misc]  # lmms-eval ships no types
        """A bundle that answers the tasks of lmms-eval.

        Args:
            bundle: the folder that hivtp export wrote.
            batch_size: requests that are answered together.
            threads: of each engine; None leaves the choice to the engine.
            seed: of the first draws, where a task samples.
            skip_errors: a request that fails gets an empty answer, in place of ending the run.
            device: the CPU, or None.
            language: what decodes the answers, as in LanguageOptions.backend.
            checkpoint: as in LanguageOptions.checkpoint.
            max_batch_size: of no effect; it is for batch sizes that are found by trying.
        """

        is_simple = True

        def __init__(
            self,
            bundle: str,
            batch_size: int | str = 1,
            threads: int | None = None,
            seed: int = 0,
            skip_errors: bool = False,
            device: str | None = None,
            language: BackendName = LanguageOptions.backend,
            checkpoint: str | None = None,
            max_batch_size: int | None = None,  # noqa: ARG002  lmms-eval passes it to every model
        ) -> None:
            super().__init__()
            if device not in (None, "cpu"):
                raise SettingsError(f"device is {device!r}, and a bundle is run on the CPU; leave --device out")
            try:
                self.batch_size = int(batch_size)
            except ValueError as error:
                raise SettingsError(f"batch_size must be a number, not {batch_size!r}") from error
            pipeline = Pipeline.load(
                bundle,
                vision=VisionOptions(num_threads=threads),
                language=LanguageOptions(language, num_threads=threads, checkpoint=checkpoint),
            )
            self.model = BenchmarkModel(pipeline, self.batch_size, seed, skip_errors=skip_errors)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
            """A `batch_size` among the model's arguments replaces that of the command line, which is always given."""
            given = utils.simple_parse_args_string(arg_string)
            others = {name: value for name, value in (additional_config or {}).items() if name not in given}
            return super().create_from_arg_string(arg_string, others)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The answers of the requests, in their order."""
            texts = []
            for request, text in zip(requests, self.model.write(self._questions(requests, "settings")), strict=True):
                self.cache_hook.add_partial("generate_until", request.args[:2], text)
                texts.append(text)
            model = self.model
            logger.info(
                f"hivtp wrote {model.num_answers} answers and failed {model.num_errors} requests; the language model "
                f"saw {model.num_kept_tokens} of {model.num_image_tokens} image tokens"
            )
            return texts

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """The loss of each continuation, as lmms-eval has it (the lowest wins), and whether it is greedy."""
            return list(self.model.judge(self._questions(requests, "continuation")))

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Refused."""
            task = requests[0].task_name if requests else "a task"
            raise SettingsError(f"{task} asks in several rounds, which --model hivtp does not do; leave it out")

        def _questions(self, requests: Sequence[Any], second: str) -> Iterator[Question]:
            """The requests one by one, so that the images of one batch are in memory and not those of a task."""
            for request in tqdm(requests, desc="Model Responding", disable=self.rank != 0):
                if len(request.args) != 6:
                    raise SettingsError(
                        f"a request of {request.task_name} has {len(request.args)} parts, and --model hivtp takes "
                        "those of 6: a text, what to do with it, and the images of one document"
                    )
                context, asked, doc_to_visual, doc_id, task, split = request.args
                document = self.task_dict[task][split][doc_id]
                if second == "continuation" and not isinstance(asked, str):
                    asked = asked(document)
                images = tuple(doc_to_visual(document) or ())
                yield Question(f"document {doc_id} of {task} ({split})", context, images, **{second: asked})

    return BundleModel
