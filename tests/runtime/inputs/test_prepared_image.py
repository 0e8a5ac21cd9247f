from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp import Answer, Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.cli.run import main
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.prepared_image import PreparedImage, prepare_images
from hivtp_ops.errors import BundleError, ImageError, PromptError, SettingsError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = "What is in the picture?"


@pytest.fixture(scope="module")
def next_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT with the grids 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 of tiles of 64 pixels."""
    folder = tmp_path_factory.mktemp("next")
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", text=text)
    return export_bundle(checkpoint, folder / "bundle", ExportSettings(keep_total=60), is_quiet=True).folder


@pytest.fixture(scope="module")
def llava_next(next_bundle: Path) -> Pipeline:
    return Pipeline.load(next_bundle, num_threads=1)


@pytest.fixture
def files(photos: Path, tmp_path: Path) -> dict[str, Path]:
    """A picture of three tiles and one of five."""
    saved = {"wide": (128, 64), "square": (128, 128)}
    for name, size in saved.items():
        load_image(photos / "coffee.png").resize(size).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in saved}


def test_a_picture_beyond_the_limit_of_tiles_is_refused_by_name_tiling_and_limit(next_bundle, files) -> None:
    pipeline = Pipeline.load(next_bundle, num_threads=1, max_tiles=4)
    assert len(pipeline.generate(PROMPT, [files["wide"]], max_new_tokens=1).kept_indices) == 3
    message = (
        rf"'{files['square']}': an image of 128 x 128 pixels becomes a base tile and 2 x 2 more, 5 tiles, "
        "and the limit is 4; scale it down, or raise max_tiles"
    )
    with pytest.raises(ImageError, match=f"^{message}$"):
        pipeline.generate(PROMPT, [files["square"]])
    with pytest.raises(ImageError, match=f"^image 2 of 2: {message}$"):
        pipeline.generate("<image> or <image>", [files["wide"], files["square"]])
    with pytest.raises(ImageError, match=r"^the PIL image: an image of 128 x 128"):
        pipeline.generate(PROMPT, [load_image(files["square"])])
    with pytest.raises(ImageError, match=message):
        pipeline.chat().ask(PROMPT, [files["square"]])


def test_a_picture_beyond_the_limit_costs_no_other_request_its_answer(next_bundle, llava_next, files) -> None:
    requests = [Request(PROMPT, [files[name]], 3) for name in ("wide", "square", "wide")]
    first, refused, last = Pipeline.load(next_bundle, num_threads=1, max_tiles=3).generate_batch(requests)
    assert isinstance(refused, ImageError)
    assert "5 tiles, and the limit is 3" in str(refused)
    expected = llava_next.generate(PROMPT, [files["wide"]], max_new_tokens=3)
    assert first.token_ids == last.token_ids == expected.token_ids


@pytest.mark.parametrize("max_tiles", [1, 0, -1, True, 2.5, "5", None])
def test_a_limit_that_no_picture_can_meet_is_refused_for_both_families(next_bundle, pruned_bundle, max_tiles) -> None:
    for bundle in (next_bundle, pruned_bundle):
        with pytest.raises(SettingsError, match="max_tiles must be a whole number, 2 or more"):
            Pipeline.load(bundle, max_tiles=max_tiles)


def test_the_command_takes_the_limits(next_bundle, files, capsys) -> None:
    arguments = [str(next_bundle), PROMPT, "--image", str(files["square"]), "--max-new-tokens", "1", "--json"]
    assert main([*arguments, "--max-tiles", "4"]) == 1
    output = capsys.readouterr()
    assert (output.out, "5 tiles, and the limit is 4" in output.err) == ("", True)
    assert main([*arguments, "--max-tiles", "5", "--max-tiles-per-run", "2"]) == 0
    in_runs = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["kept_indices"] == in_runs["kept_indices"]
    assert main([*arguments, "--max-tiles-per-run", "0"]) == 1
    assert "max_tiles_per_run must be a whole number, 1 or more" in capsys.readouterr().err


def test_tiles_of_all_pictures_run_in_chunks_of_the_size_set(next_bundle, llava_next, files) -> None:
    pipeline = Pipeline.load(next_bundle, num_threads=1, max_tiles_per_run=3)
    engine, num_tiles = pipeline.images._encoder._vision.engine, []
    run = engine.run
    engine.run = lambda inputs: num_tiles.append(len(inputs["pixel_values"])) or run(inputs)
    requests = [Request(PROMPT, [files["square"]], 8), Request("<image> or <image>", list(files.values()), 8)]
    answers = pipeline.generate_batch(requests)
    # Five and three tiles, of which the square's are asked for twice and run once.
    assert num_tiles == [3, 3, 2]
    for answer, expected in zip(answers, llava_next.generate_batch(requests), strict=True):
        assert isinstance(answer, Answer)
        assert (answer.token_ids, answer.kept_indices) == (expected.token_ids, expected.kept_indices)


def test_an_image_that_cannot_be_read_is_named_among_several(pruned, photo, tmp_path) -> None:
    with pytest.raises(ImageError, match=r"^image 2 of 3: the bytes given: not an image"):
        prepare_images(pruned.images, [photo, b"words", photo])
    with pytest.raises(ImageError, match=r"^there is no image file"):
        prepare_images(pruned.images, [tmp_path / "absent.png"])


def prepared(pipeline: Pipeline, file: Path) -> PreparedImage:
    [image] = prepare_images(pipeline.images, [file])
    return image


def test_pictures_prepared_for_the_other_family_are_refused(pruned, llava_next, files) -> None:
    own, other = (prepared(pipeline, files["wide"]) for pipeline in (pruned, llava_next))
    with pytest.raises(ImageError, match=r"for LLaVA-NeXT, as pixels .*\[3, 3, 64, 64\]; this bundle is LLaVA-1.5"):
        pruned.images.encode([own, other])
    with pytest.raises(ImageError, match=r"for LLaVA-1.5, as pixels .*\[1, 3, 64, 64\]; this bundle is LLaVA-NeXT"):
        llava_next.images.encode([other, own])
    small = PreparedImage(np.zeros((1, 3, 32, 32), np.float32), None)
    with pytest.raises(ImageError, match=r"shape \[1, 3, 32, 32\]; .* tiles of 64 x 64 pixels"):
        pruned.images.encode([small])


def test_a_request_prepared_for_the_other_family_fails_alone(next_bundle, pruned, files, monkeypatch) -> None:
    pipeline = Pipeline.load(next_bundle, num_threads=1)
    foreign, prepare = prepared(pruned, files["wide"]), pipeline.images.prepare
    monkeypatch.setattr(
        pipeline.images, "prepare", lambda image: foreign if image.size == (128, 128) else prepare(image)
    )
    good, bad = pipeline.generate_batch([Request(PROMPT, [files[name]], 3) for name in ("wide", "square")])
    assert isinstance(good, Answer)
    assert isinstance(bad, ImageError)


def test_what_is_no_request_fails_alone(pruned, photo) -> None:
    good = Request("what", [photo], 3)
    answers = pruned.generate_batch([good, {"prompt": "what"}, "what", None, good])
    assert [isinstance(answer, Answer) for answer in answers] == [True, False, False, False, True]
    for answer, name in zip(answers[1:4], ("dict", "str", "NoneType"), strict=True):
        assert isinstance(answer, PromptError)
        assert f"a batch holds a Request for each answer, not a {name}" in str(answer)
    for requests in (good, "what", None, iter([good])):
        with pytest.raises(PromptError, match="requests must be a list of Request, not"):
            pruned.generate_batch(requests)


def edited(folder: Path, file: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle with a changed file, and a manifest that knows its new size."""
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))
    if file != "manifest.json":
        size = (folder / file).stat().st_size
        edited(folder, "manifest.json", lambda manifest: manifest["files"][file].update(num_bytes=size))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("manifest.json", {"family": "llava"}, "its family is 'llava', and it has a tiling"),
        ("manifest.json", {"tiling": None}, "its family is 'llava_next', and it has no tiling"),
        ("manifest.json", {"family": "qwen"}, "its family is 'qwen'"),
        ("processor/image_processor.json", {"image_grid_pinpoints": [[64, 100]]}, r"pinpoints\[0\] is \(64, 100\)"),
        ("processor/image_processor.json", {"image_grid_pinpoints": []}, "image_grid_pinpoints is"),
        ("processor/image_processor.json", {"image_grid_pinpoints": {"a": 1}}, "image_grid_pinpoints is"),
        ("processor/image_processor.json", {"image_grid_pinpoints": [[64, 64]]}, "its pinpoints are .* manifest's"),
    ],
)
def test_a_bundle_whose_tiling_is_corrupt_is_refused(next_bundle, tmp_path, file, changes, message) -> None:
    folder = edited(shutil.copytree(next_bundle, tmp_path / "bundle"), file, lambda content: content.update(changes))
    with pytest.raises(BundleError, match=message):
        Pipeline.load(folder)


def test_a_budget_below_what_the_rule_can_give_is_refused(next_bundle, tmp_path) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    edited(folder, "manifest.json", lambda manifest: manifest["tiling"].update(keep_total=3))
    with pytest.raises(SpecError, match="its base tile alone keeps 7 or more; use at least 7"):
        Pipeline.load(folder).generate(PROMPT, [Image.new("RGB", (128, 64))])
