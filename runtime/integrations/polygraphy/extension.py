"""What hivtp adds to `polygraphy run`: its engines, images prepared as a bundle says, and a comparison of kept sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.polygraphy.base import require_polygraphy
from hivtp.runtime.integrations.polygraphy.comparison import ENGINES

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "hivtp.runtime.integrations.polygraphy"

try:
    from polygraphy.tools.args import ComparatorCompareArgs, DataLoaderArgs, ModelArgs
    from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
except ImportError:
    # As in base.py: this module can be imported without Polygraphy.
    BaseArgs = BaseRunnerArgs = DataLoaderArgs = object


def argument_groups() -> Sequence[Any]:
    """The entry point, group `polygraphy.run.plugins`; where it raises, Polygraphy says so and goes on without it.

    Raises:
        EngineError: Polygraphy is of a version whose interfaces are others.
    """
    require_polygraphy()
    return [EngineArgs(), *(_runner_args(engine) for engine in ENGINES), ImageArgs(), CompareArgs()]


class EngineArgs(BaseArgs):  # type: ignore[misc]  # Polygraphy ships no types
    """hivtp Engines: running the vision graph of a bundle in engines of hivtp."""

    def add_parser_args_impl(self) -> None:
        """Add how engines are opened."""
        self.group.add_argument(
            "--hivtp-checkpoint",
            metavar="DIR",
            help="For --hivtp-transformers: the folder that the bundle was exported from",
        )
        self.group.add_argument(
            "--hivtp-threads",
            type=int,
            metavar="N",
            help="Threads of an engine other than transformers (default: physical cores)",
        )
        self.group.add_argument(
            "--hivtp-trust-plans",
            action="store_true",
            default=None,
            help="Load TensorRT plans that another machine built. A plan is code, so trust who made it",
        )

    def parse_impl(self, args: Any) -> None:
        """Read the arguments.

        Attributes:
            settings (dict): the keyword arguments of `bundle_runner`.
        """
        self.settings = {
            "checkpoint": args.hivtp_checkpoint,
            "num_threads": args.hivtp_threads,
            "trust_plans": args.hivtp_trust_plans,
        }


class EngineRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """hivtp Inference: running a bundle in an engine of hivtp.

    Depends on:

        - EngineArgs
        - ModelArgs
    """

    engine: str

    def get_name_opt_impl(self) -> tuple[str, str]:
        """The name of the runner and its option."""
        return f"the engine {self.engine} of hivtp", f"hivtp-{self.engine}"

    def get_extra_help_text_impl(self) -> str:
        """What the model must be."""
        return "The model is the vision/model.onnx of a bundle, one of its plans, or its folder."

    def add_to_script_impl(self, script: Any) -> None:
        """Add the runner."""
        from polygraphy.tools.script import make_invocable

        script.add_import(imports=["bundle_runner"], frm=f"{PACKAGE}.runner")
        model = self.arg_groups[ModelArgs].path
        script.add_runner(make_invocable("bundle_runner", model, self.engine, **self.arg_groups[EngineArgs].settings))


def _runner_args(engine: str) -> Any:
    # Polygraphy tells groups apart by their class.
    return type(f"{engine}-Args", (EngineRunnerArgs,), {"engine": engine, "__doc__": EngineRunnerArgs.__doc__})()


class ImageArgs(DataLoaderArgs):  # type: ignore[misc]
    """hivtp Images: images as inputs, prepared as the bundle says.

    Takes the place of Polygraphy's own group where images are given.

    Depends on:

        - DataLoaderArgs
        - ModelArgs
    """

    def add_parser_args_impl(self) -> None:
        """Add the images."""
        self.group.add_argument(
            "--hivtp-images",
            nargs="+",
            metavar="IMAGE",
            help="Image files to run in place of generated inputs, resized, cut into tiles and normalised as the "
            "bundle of the model says",
        )

    def parse_impl(self, args: Any) -> None:
        """Read the arguments.

        Attributes:
            images (List[str]): image files, or None.
        """
        from polygraphy.logger import G_LOGGER

        self.images = args.hivtp_images
        if not self.images:
            return
        super().parse_impl(args)
        if self.load_inputs_paths or self.data_loader_script:
            G_LOGGER.critical("--hivtp-images gives the inputs; leave --load-inputs and --data-loader-script out")
        self.arg_groups[DataLoaderArgs] = self

    def add_to_script_impl(self, script: Any, user_input_metadata_str: Any = None) -> Any:  # noqa: ARG002
        """Add the data loader; the images decide the shapes."""
        from polygraphy.tools.script import make_invocable

        script.add_import(imports=["bundle_images"], frm=f"{PACKAGE}.images")
        return script.set_data_loader(make_invocable("bundle_images", self.arg_groups[ModelArgs].path, self.images))

    def is_using_random_data(self) -> bool:
        """Never: images are real."""
        return False


class CompareArgs(BaseArgs):  # type: ignore[misc]
    """Comparison Function: `hivtp`: the comparison of kept sets, embeddings and scores.

    Depends on:

        - ComparatorCompareArgs
        - ModelArgs
    """

    def add_parser_args_impl(self) -> None:
        """Add `--compare hivtp`, and the bounds."""
        compare = self.arg_groups[ComparatorCompareArgs]
        # Polygraphy has no way to register a comparison, so a test runs its command with this one.
        compare._comparison_func_map["hivtp"] = [self]
        [option] = [action for action in compare.group._group_actions if action.dest == "compare"]
        option.choices.append("hivtp")
        at_export = "what the bundle was checked with at export"
        for name, what in (
            ("min-kept-agreement", "Least agreement of the kept patches, the mean over the tiles of a run"),
            ("max-embeddings-error", "Largest relative error of the embeddings where both keep a patch"),
            ("max-score-error", "Largest error of the scores of a tile, over how much they differ"),
        ):
            self.group.add_argument(f"--hivtp-{name}", type=float, metavar="X", help=f"{what} (default: {at_export})")

    def parse_impl(self, args: Any) -> None:
        """Read the arguments.

        Attributes:
            bounds (dict): the keyword arguments of `KeptSets.of_bundle`.
        """
        self.bounds = {
            "min_jaccard": args.hivtp_min_kept_agreement,
            "relative_error": args.hivtp_max_embeddings_error,
            "importance_error": args.hivtp_max_score_error,
        }

    def add_to_script_impl(self, script: Any) -> Any:
        """Add the comparison."""
        from polygraphy.tools.script import make_invocable

        script.add_import(imports=["KeptSets"], frm=f"{PACKAGE}.kept_sets")
        compare = make_invocable("KeptSets.of_bundle", self.arg_groups[ModelArgs].path, **self.bounds)
        return script.add_var(compare, "kept_sets", category="Comparison Functions")
