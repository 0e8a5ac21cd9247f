from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hivtp.engines.bundle import PLANS_FOLDER, Bundle
from hivtp.engines.tensorrt import plan as plan_module
from hivtp.engines.tensorrt.plan import has_plans, read_plan
from hivtp_ops.errors import BundleError, EngineError
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import CONTENT, H200, RTX, add, make_record

if TYPE_CHECKING:
    from pathlib import Path

STEM = "tensorrt-11.4.0.106-nvidia-h200-sm90"
LIBRARY = fake_gpu.library()
LIBRARY_RTX = fake_gpu.library("tensorrt-rtx", "1.7.1.116", is_portable=True)


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(pruned_bundle, tmp_path / "bundle"))


def plan_files(bundle: Bundle) -> list[str]:
    return sorted(file.name for file in (bundle.folder / PLANS_FOLDER).iterdir())


def test_a_plan_is_found_on_the_machine_that_it_was_built_for(bundle):
    file = add(bundle)
    assert file.name == f"{STEM}.plan"
    assert plan_files(bundle) == [f"{STEM}.json", f"{STEM}.plan"]
    record, content = read_plan(bundle, LIBRARY, H200)
    assert (record, content) == (make_record(bundle), CONTENT)
    # A new driver runs old plans.
    assert read_plan(bundle, LIBRARY, replace(H200, driver="590.1", cuda="13.2"))[1] == CONTENT


def test_the_bundle_stays_whole_with_plans_in_it(bundle):
    add(bundle)
    assert Bundle.open(bundle.folder, check_hashes=True).manifest == bundle.manifest


def test_plans_of_several_machines_lie_side_by_side(bundle):
    add(bundle, b"for the H200")
    add(bundle, b"for the RTX", gpu=RTX)
    add(bundle, b"for any RTX", library="tensorrt-rtx", library_version="1.7.1.116", gpu=None, is_portable=True)
    assert read_plan(bundle, LIBRARY, H200)[1] == b"for the H200"
    assert read_plan(bundle, LIBRARY, RTX)[1] == b"for the RTX"
    assert read_plan(bundle, LIBRARY_RTX, RTX)[1] == b"for any RTX"
    assert len(plan_files(bundle)) == 6


def test_a_plan_takes_the_place_of_the_one_before(bundle):
    add(bundle, b"old")
    add(bundle, b"newer and longer")
    assert read_plan(bundle, LIBRARY, H200)[1] == b"newer and longer"
    assert len(plan_files(bundle)) == 2


def test_a_bundle_without_plans_says_how_to_build_one(bundle):
    assert not has_plans(bundle, "tensorrt")
    with pytest.raises(
        EngineError, match=rf"holds no plan for tensorrt; build one with: hivtp plan {bundle.folder} --engine"
    ):
        read_plan(bundle, LIBRARY, H200)
    add(bundle, library="tensorrt-rtx", library_version="1.7.1.116")
    assert has_plans(bundle, "tensorrt-rtx")
    # The name of the one library begins with that of the other.
    assert not has_plans(bundle, "tensorrt")


@pytest.mark.parametrize(
    ("changes", "gpu", "message"),
    [
        ({"library_version": "11.3.0.99"}, H200, r"built by tensorrt 11\.3\.0\.99, and 11\.4\.0\.106 is installed"),
        ({"graph": {"vision/model.onnx": "0" * 64}}, H200, "built from another graph than the bundle holds now"),
        ({"platform": "win-amd64"}, H200, "built on win-amd64, and this is"),
        ({}, None, "needs an NVIDIA GPU with its driver, and there is none here"),
        ({}, RTX, r"built for NVIDIA H200 \(compute .* 9\.0.*\), and this is NVIDIA GeForce RTX 5090 \(.*12\.0"),
        ({}, replace(H200, name="NVIDIA H100"), "built for NVIDIA H200 .*, and this is NVIDIA H100"),
        ({"gpu": None}, H200, "was built for None"),
        ({"is_portable": True}, replace(RTX, compute_capability=(7, 5)), r"capability 8\.0 and later, and this is"),
        (
            {"is_portable": True, "precision": "fp8"},
            replace(RTX, compute_capability=(8, 6)),
            r"capability 8\.9 and later, and this is",
        ),
        ({"is_portable": True, "gpu": None}, None, "needs an NVIDIA GPU"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_plain_words(bundle, changes, gpu, message):
    add(bundle, **changes)
    with pytest.raises(EngineError, match=message) as caught:
        read_plan(bundle, LIBRARY, gpu)
    assert ("build one with: hivtp plan" in str(caught.value)) == (gpu is not None)


def test_every_plan_that_does_not_fit_is_given_its_reason(bundle):
    add(bundle, gpu=RTX)
    add(bundle, library_version="11.3.0.99")
    with pytest.raises(EngineError) as caught:
        read_plan(bundle, LIBRARY, H200)
    assert "-5090-sm120 was built for NVIDIA GeForce" in str(caught.value)
    assert "11.3.0.99-nvidia-h200-sm90 was built by tensorrt 11.3.0.99" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], "has 6999 bytes instead of 7000: it is truncated or altered"),
        (b"", "has 0 bytes instead of 7000"),
        (CONTENT + b"\0", "has 7001 bytes instead of 7000"),
        (b"b" + CONTENT[1:], "was altered: its sha256 differs from its sidecar's. A plan holds code, so it is not"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_plan_that_was_altered_is_never_given_out(bundle, content, message):
    file = add(bundle)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        read_plan(bundle, LIBRARY, H200)


def test_the_sidecar_is_checked_before_the_plan_is_read(bundle):
    add(bundle, gpu=RTX).unlink()
    with pytest.raises(EngineError, match="was built for NVIDIA GeForce"):
        read_plan(bundle, LIBRARY, H200)


def test_a_damaged_plan_beside_one_that_fits_is_passed_over(bundle):
    add(bundle, gpu=RTX).write_bytes(b"damaged")
    add(bundle)
    assert read_plan(bundle, LIBRARY, H200)[1] == CONTENT


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"{}",
        b"\xff",
        b'{"schema_version": 1}',
        b"[" * 10**5,
        b" " * 2**20 + b"{}",
    ],
)
def test_a_sidecar_that_is_none_is_refused(bundle, content):
    add(bundle).with_suffix(".json").write_bytes(content)
    with pytest.raises(EngineError, match=rf"{STEM} (has a damaged sidecar|cannot be read)"):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", None),
        ("plan", {"num_bytes": "many", "sha256": ""}),
        ("gpu", {"name": "NVIDIA H200"}),
        ("gpu", "NVIDIA H200"),
        ("profiles", ["5:1:1"]),
        ("profiles", [1]),
        ("profiles", "1:1:5"),
        ("graph", []),
        ("verification", True),
        ("profiles", ["1:1:" + "9" * 5000]),
        ("profiles", [["1:1:5"]]),
        ("graph", {"vision/model.onnx": 1}),
        ("gpu", {"name": "NVIDIA H200", "compute_capability": [9], "driver": "1", "cuda": "1"}),
        ("workspace_bytes", "all"),
        ("library", 3),
        ("colour", "red"),
        ("verification", functools.reduce(lambda value, _: [value], range(500), 0)),
    ],
)
def test_values_that_make_no_sense_are_refused(bundle, key, value):
    sidecar = add(bundle).with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {key: value}))
    with pytest.raises(EngineError, match=f"{STEM} has a damaged sidecar"):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize(
    ("version", "shown"), [("2", "2"), ("true", "True"), ("[[[]]]", r"\[\[\[\]\]\]"), ("null", "None")]
)
def test_a_sidecar_of_another_schema_is_refused(bundle, version, shown):
    sidecar = add(bundle).with_suffix(".json")
    sidecar.write_text(f'{{"schema_version": {version}}}')
    with pytest.raises(EngineError, match=f"has a sidecar of version {shown}, this hivtp reads 1"):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize("num_bytes", [-1, 0, 10**15, 10**30])
def test_a_size_that_no_plan_has_allocates_nothing(bundle, num_bytes):
    sidecar = add(bundle).with_suffix(".json")
    record = json.loads(sidecar.read_text())
    record["plan"]["num_bytes"] = num_bytes
    sidecar.write_text(json.dumps(record))
    with pytest.raises(EngineError, match=f"has 7000 bytes instead of {num_bytes}"):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize("failing", [".plan", ".json"])
def test_a_plan_that_cannot_be_written_whole_is_not_there(bundle, monkeypatch, failing):
    add(bundle, b"old")
    write_whole = plan_module.write_whole

    def fail(file: Path, content: bytes) -> None:
        if file.suffix == failing:
            raise OSError(28, "No space left on device")
        write_whole(file, content)

    monkeypatch.setattr(plan_module, "write_whole", fail)
    with pytest.raises(BundleError, match=r"cannot write the plan .*No space left"):
        add(bundle, b"new")
    with pytest.raises(EngineError, match="holds no plan"):
        read_plan(bundle, LIBRARY, H200)


def test_a_bundle_that_cannot_be_written_is_refused(bundle):
    (bundle.folder / PLANS_FOLDER).write_text("no folder")
    with pytest.raises(BundleError, match="cannot write the plan"):
        add(bundle)
