"""A plan is code: it is loaded where this machine built it, or where the caller says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hivtp.engines.bundle import PLANS_FOLDER, Bundle
from hivtp.engines.tensorrt import trust
from hivtp.engines.tensorrt.plan import read_plan, write_plan
from hivtp.engines.tensorrt.trust import is_own_plan, remember_plan, trust_folder
from hivtp_ops.errors import BundleError, EngineError, EngineWarning
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import CONTENT, H200, add, make_record

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = fake_gpu.library()
SHA256 = "0123456789abcdef" * 4
REFUSAL = r"was not built by this machine, and a plan is code: say trust_plans=True \(--trust-plans\) if you trust"


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(pruned_bundle, tmp_path / "bundle"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Goes to another machine."""
    return lambda: monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))


def test_a_copied_bundle_brings_no_trust_along(bundle, elsewhere, tmp_path):
    add(bundle)
    copy = Bundle.open(shutil.copytree(bundle.folder, tmp_path / "copy"))
    assert read_plan(copy, LIBRARY, H200)[1] == CONTENT
    elsewhere()
    for opened in (bundle, copy):
        with pytest.raises(EngineError, match=REFUSAL):
            read_plan(opened, LIBRARY, H200)
        assert read_plan(opened, LIBRARY, H200, trust_plans=True)[1] == CONTENT
    add(copy)
    assert read_plan(copy, LIBRARY, H200)[1] == CONTENT


def test_a_plan_that_is_not_trusted_is_not_even_read(bundle, elsewhere):
    add(bundle).unlink()
    elsewhere()
    with pytest.raises(EngineError, match=REFUSAL):
        read_plan(bundle, LIBRARY, H200)


def test_a_plan_that_was_exchanged_is_refused_although_this_machine_built_the_old_one(bundle):
    file = add(bundle)
    other = b"b" + CONTENT[1:]
    file.write_bytes(other)
    with pytest.raises(EngineError, match="its sha256 differs"):
        read_plan(bundle, LIBRARY, H200)
    # With a sidecar that says the truth about it.
    file.with_suffix(".json").write_text(make_record(bundle, other).to_json())
    with pytest.raises(EngineError, match=REFUSAL):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize(
    "name", [".local/state/hivtp/plans", "hivtp/plans", "vision/plans", "vision/plans/hivtp/plans", "state/hivtp/plans"]
)
def test_no_record_in_a_bundle_counts(bundle, elsewhere, monkeypatch, name):
    add(bundle)
    elsewhere()
    folder = bundle.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / make_record(bundle).plan.sha256).touch()
    monkeypatch.chdir(bundle.folder)
    with pytest.raises(EngineError, match=REFUSAL):
        read_plan(bundle, LIBRARY, H200)
    # A relative path there would let the folder that a process runs in decide.
    monkeypatch.setenv("XDG_STATE_HOME", name.removesuffix("hivtp/plans") or ".")
    monkeypatch.setenv("HOME", str(bundle.folder.parent))
    with pytest.raises(EngineError, match=REFUSAL):
        read_plan(bundle, LIBRARY, H200)


@pytest.mark.parametrize(
    "sha256",
    [
        *("", ".", "..", "/", "../plans", "vision/plans/x", SHA256.upper(), SHA256[1:]),
        *(f"../{SHA256}", f"x/../{SHA256}", f"/{SHA256}", f"{SHA256}/", f"{SHA256}\n", f"{SHA256}\0"),
    ],
)
def test_a_hash_that_is_not_a_hash_names_no_record(sha256):
    remember_plan(SHA256)
    assert is_own_plan(SHA256)
    assert not is_own_plan(sha256)


def test_a_record_that_is_a_link_a_folder_or_of_another_user_does_not_count(monkeypatch, tmp_path):
    remember_plan(SHA256)
    file = trust_folder() / SHA256
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    monkeypatch.setattr(trust.os, "geteuid", lambda: os.getuid() + 1)
    assert not is_own_plan(SHA256)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file.unlink()
    file.symlink_to(__file__)
    assert not is_own_plan(SHA256)
    file.unlink()
    file.mkdir()
    assert not is_own_plan(SHA256)


def test_records_lie_in_the_users_state_folder(monkeypatch, tmp_path):
    assert trust_folder() == tmp_path / "state" / "hivtp" / "plans"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/state"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert trust_folder() == tmp_path / ".local" / "state" / "hivtp" / "plans"


def test_without_a_home_no_plan_is_trusted_and_building_one_says_so(bundle, monkeypatch):
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    with pytest.warns(EngineWarning, match=r"cannot record that this machine built the plan .*--trust-plans"):
        file = add(bundle)
    assert file.is_file()
    with pytest.raises(EngineError, match=REFUSAL):
        read_plan(bundle, LIBRARY, H200)
    assert read_plan(bundle, LIBRARY, H200, trust_plans=True)[1] == CONTENT


def test_plans_are_neither_written_nor_read_through_a_link_out_of_the_bundle(bundle, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle.folder / PLANS_FOLDER).symlink_to(outside, target_is_directory=True)
    record = make_record(bundle)
    kept = outside / f"{record.stem}.json"
    kept.write_text("somebody's")
    with pytest.raises(BundleError, match="vision/plans is a link that leads out of the bundle"):
        write_plan(bundle, record, memoryview(CONTENT))
    assert [file.name for file in outside.iterdir()] == [kept.name]
    assert kept.read_text() == "somebody's"
    with pytest.raises(EngineError, match="is a link that leads out of the bundle"):
        read_plan(bundle, LIBRARY, H200, trust_plans=True)


@pytest.mark.parametrize("suffix", [".json", ".plan"])
def test_a_plan_or_sidecar_that_is_a_link_out_of_the_bundle_is_refused(bundle, tmp_path, suffix):
    file = add(bundle).with_suffix(suffix)
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(EngineError, match="is a link that leads out of the bundle"):
        read_plan(bundle, LIBRARY, H200, trust_plans=True)


@pytest.mark.parametrize("suffix", [".json", ".plan"])
def test_a_pipe_in_the_place_of_a_plan_or_sidecar_is_waited_for_by_nobody(bundle, suffix):
    file = add(bundle).with_suffix(suffix)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(EngineError, match=r"cannot be read: it is not a regular file|has 0 bytes instead"):
        read_plan(bundle, LIBRARY, H200)
