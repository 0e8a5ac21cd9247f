"""The entry point for lmms-eval, against stand-ins of its few names; test_real.py runs the real one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from hivtp.runtime.integrations.lmms_eval import plugin as lmms_eval
from hivtp_ops.errors import BundleError, SettingsError
from tests.support.answers import at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp import Pipeline

ROOT = Path(__file__).parents[4]


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """What `lmms_eval.api.model.lmms` 0.6 and 0.7 have, as far as a model leans on it."""

    is_simple = True
    rank = 0

    def __init__(self) -> None:
        self.cached: list[tuple[Any, ...]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any]) -> Any:
        return cls(**parse(arg_string), **additional_config)


def parse(text: str) -> dict[str, Any]:
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    return {name: int(value) if value.isnumeric() else value for name, value in pairs}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def install(name: str, **content: object) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    install("lmms_eval", utils=SimpleNamespace(simple_parse_args_string=parse))
    install("lmms_eval.models")
    install("lmms_eval.models.registry_v2", ModelManifest=Manifest)
    install("lmms_eval.api")
    install("lmms_eval.api.model", lmms=Lmms)
    install("loguru", logger=SimpleNamespace(info=print))
    lmms_eval._bundle_model.cache_clear()
    yield
    lmms_eval._bundle_model.cache_clear()


@pytest.fixture
def make_model(stand_in: None, pruned_bundle: Path) -> Any:  # noqa: ARG001
    documents = {"task": {"test": [{"images": []}, {"images": [Image.new("RGB", (40, 30), "red")]}]}}

    def make(arguments: str = "threads=1", bundle: Path = pruned_bundle, **options: Any) -> Any:
        model = lmms_eval.BundleModel.create_from_arg_string(f"bundle={bundle},{arguments}", options)
        model.task_dict = documents
        return model

    return make


def request(text: str, asked: object, doc_id: int) -> SimpleNamespace:
    return SimpleNamespace(
        args=(text, asked, lambda document: document["images"] or None, doc_id, "task", "test"), task_name="task"
    )


def test_the_entry_point_is_registered_and_leads_to_the_manifests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(name, target)] = project["entry-points"]["lmms_eval.models"].items()
    assert (name, target) == ("hivtp", f"{lmms_eval.__name__}:manifests")


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_there_is_no_model_and_no_error() -> None:
    with pytest.warns(UserWarning, match="this lmms-eval gets no model hivtp"):
        assert lmms_eval.manifests() == []


def test_a_manifest_of_another_form_breaks_nothing(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    def other(name: str) -> None:
        """A manifest of a version to come."""

    monkeypatch.setattr(sys.modules["lmms_eval.models.registry_v2"], "ModelManifest", other)
    with pytest.warns(UserWarning, match="unexpected keyword argument"):
        assert lmms_eval.manifests() == []


def test_the_manifest_names_a_class_that_is_there(stand_in: None) -> None:  # noqa: ARG001
    [manifest] = lmms_eval.manifests()
    assert manifest.model_id == "hivtp"
    module, _, name = manifest.simple_class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    assert issubclass(model, Lmms)
    assert model.is_simple
    assert not hasattr(lmms_eval, "AnotherModel")


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.modules['lmms_eval'] = None\n"
        "import hivtp.runtime.integrations.lmms_eval.plugin as entry; assert entry.manifests() == []\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnxruntime", "transformers", "loguru"} & set(done.stdout.split())


def test_requests_are_answered_in_their_order(
    make_model: Any, pruned: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    model, settings = make_model(), {"max_new_tokens": 4, "until": None}
    requests = [request("what", settings, 1), request("how many", settings, 0), request("where", settings, 1)]
    image = Image.new("RGB", (40, 30), "red")
    expected = [
        pruned.generate("what", [image], at_most(4)).text.lstrip(),
        pruned.generate("how many", (), at_most(4)).text.lstrip(),
        pruned.generate("where", [image], at_most(4)).text.lstrip(),
    ]
    assert model.generate_until(requests) == expected
    assert [entry[2] for entry in model.cached] == expected
    assert model.cached[0][:2] == ("generate_until", ("what", settings))
    assert "wrote 3 answers and failed 0 requests" in capsys.readouterr().out


def test_a_bundle_without_a_decoder_answers_with_its_checkpoint(
    make_model: Any, bare_bundle: Path, tiny_checkpoint: Path, pruned: Pipeline
) -> None:
    with pytest.raises(BundleError, match="holds no decoder"):
        make_model(bundle=bare_bundle)
    model = make_model(f"language=transformers,checkpoint={tiny_checkpoint}", bundle=bare_bundle)
    image = Image.new("RGB", (40, 30), "red")
    expected = pruned.generate("what", [image], at_most(4)).text.lstrip()
    assert model.generate_until([request("what", {"max_new_tokens": 4}, 1)]) == [expected]
    [(loss, _)] = model.loglikelihood([request("what", " a dog", 1)])
    assert loss == pytest.approx(make_model().loglikelihood([request("what", " a dog", 1)])[0][0], rel=1e-4)


def test_likelihoods_are_losses(make_model: Any) -> None:
    model = make_model()
    found = model.loglikelihood([request("what", " a dog", 1), request("what", lambda _: " a cat", 1)])
    assert all(loss > 0 and isinstance(is_greedy, bool) for loss, is_greedy in found)
    assert found[0] != found[1]


def test_the_batch_size_of_the_model_arguments_wins(make_model: Any) -> None:
    # lmms-eval passes its own default of 1 beside them.
    assert make_model("batch_size=3", batch_size=1).batch_size == 3
    assert make_model(batch_size="2").batch_size == 2
    assert make_model(max_batch_size=64).batch_size == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:0"}, "device is 'cuda:0', and a bundle is run on the CPU"),
        ({"batch_size": "auto"}, "batch_size must be a number, not 'auto'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(make_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_model(**options)


def test_what_a_bundle_does_not_do_is_refused(make_model: Any) -> None:
    model = make_model()
    with pytest.raises(SettingsError, match="task asks in several rounds"):
        model.generate_until_multi_round([request("what", {}, 0)])
    with pytest.raises(SettingsError, match="a request of task has 2 parts"):
        model.loglikelihood([SimpleNamespace(args=("", " a"), task_name="task")])
