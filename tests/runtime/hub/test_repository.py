from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from hivtp.runtime.hub.cache import id_of, snapshot_of
from hivtp.runtime.hub.repository import find_repository, is_id
from hivtp_ops.errors import HubError
from tests.support.hub import COMMIT, FakeHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "llava-hf/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "a[1].txt", "sub/inner.txt", "large.bin"):
        (folder / name).write_text(f"content of {name}")
    with FakeHub({NAME: folder, "meta/gated": folder}, gated=("meta/gated",)) as served:
        served.use(monkeypatch, tmp_path / "home")
        # Paths that exist come first, so that the tests stand where there are none.
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, True),
        ("a/b", True),
        ("llava-1.5-7b-hf", False),
        ("./llava-hf/tiny", False),
        ("/llava-hf/tiny", False),
        ("../llava-hf", False),
        ("a/b/c", False),
        ("llava-hf/", False),
        ("llava hf/tiny", False),
        ("a\0b/c", False),
        ("é/b", False),
        ("x" * 100 + "/b", False),
    ],
)
def test_an_id_has_an_owner_and_a_name(name: str, expected: bool) -> None:
    assert is_id(name) == expected


def test_a_path_that_exists_is_never_looked_up(tmp_path: Path, hub: FakeHub) -> None:
    hub.status = 500
    (tmp_path / "llava-hf" / "tiny").mkdir(parents=True)
    assert find_repository(NAME) is None
    assert find_repository(tmp_path / "absent") is None
    with pytest.raises(HubError, match="llava-hf/tiny is a path; leave --revision out"):
        find_repository(NAME, "main")


def test_only_what_is_asked_for_is_downloaded(hub: FakeHub) -> None:
    repository = find_repository(NAME)
    assert repository is not None
    assert repository.revision == COMMIT
    assert set(repository.files) == {"config.json", "a[1].txt", "sub/inner.txt", "large.bin"}
    folder = repository.download(["config.json", "a[1].txt", "sub/inner.txt"], is_quiet=True)
    assert (folder / "a[1].txt").read_text() == "content of a[1].txt"
    assert (folder / "sub" / "inner.txt").read_text() == "content of sub/inner.txt"
    assert sorted(hub.sent) == ["a[1].txt", "config.json", "inner.txt"]
    assert not (folder / "large.bin").exists()
    # What is there is not asked for again.
    assert repository.download(["config.json"], is_quiet=True) == folder
    assert len(hub.sent) == 3
    assert id_of(folder) == (NAME, COMMIT)
    assert snapshot_of(folder.parent.parent) == folder


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_the_cache_is_taken(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    repository = find_repository(NAME, revision)
    assert repository is not None
    folder = repository.download(["config.json"], is_quiet=True)
    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = find_repository(NAME, revision)
    assert again is not None
    assert (again.revision, again.files) == (COMMIT, ("config.json",))
    assert again.download(["config.json"]) == folder
    assert hub.sent == []


def test_a_hub_in_trouble_leaves_the_cache(hub: FakeHub) -> None:
    repository = find_repository(NAME)
    assert repository is not None
    folder = repository.download(["config.json"], is_quiet=True)
    hub.status = 503
    again = find_repository(NAME)
    assert again is not None
    assert again.download(["config.json"]) == folder


def test_what_is_not_there_is_explained(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        HubError, match=r"there is no folder llava-hf/none, and the repository .* does not exist, or is pr"
    ):
        find_repository("llava-hf/none")
    with pytest.raises(HubError, match=r"llava-hf/tiny of the hub has no revision 'v2'; check --revision"):
        find_repository(NAME, "v2")
    gated = find_repository("meta/gated")
    assert gated is not None
    with pytest.raises(
        HubError, match=r"is gated: accept its conditions at http.*/meta/gated, and log in with hf auth"
    ):
        gated.download(["config.json"], is_quiet=True)
    hub.status = 500
    with pytest.raises(HubError, match=r"cannot be reached at http.*check the network or HF_ENDPOINT, or bring"):
        find_repository(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be had offline .*HF_HUB_OFFLINE is set.* hf download llava-hf/tiny"):
        find_repository(NAME)


def test_an_id_that_the_hub_does_not_allow_is_explained(hub: FakeHub) -> None:
    for name in ("a--b/c", "a/b..c", "a/b.git"):
        with pytest.raises(HubError, match=r"there is no folder .*, and the hub allows no such id"):
            find_repository(name)
    assert hub.sent == []


def test_a_login_that_may_not_read_is_explained(hub: FakeHub) -> None:
    hub.status = 403
    with pytest.raises(HubError, match=r"may not be read by you \(.*403.*\); log in with hf auth login"):
        find_repository(NAME)


def test_something_else_than_a_hub_is_explained(hub: FakeHub) -> None:
    """As the page of a hotel's network, which answers to every address."""
    hub.page = b"<html>Please log in</html>"
    with pytest.raises(HubError, match=r"does not answer as a hub does"):
        find_repository(NAME)


def test_a_download_that_is_cut_short_is_explained(hub: FakeHub) -> None:
    repository = find_repository(NAME)
    assert repository is not None
    hub.cuts = True
    with pytest.raises(HubError, match=r"cannot be downloaded from the hub: .*try again|cannot be reached at"):
        repository.download(["large.bin"], is_quiet=True)
    hub.cuts = False
    folder = repository.download(["large.bin"], is_quiet=True)
    assert (folder / "large.bin").read_text() == "content of large.bin"


@pytest.mark.usefixtures("hub")
def test_a_hub_that_nobody_runs_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached at http://127.0.0.1:9 "):
        find_repository(NAME)
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("config.json"))


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    repository = find_repository(NAME)
    assert repository is not None
    with pytest.raises(HubError, match=r"cannot be written to the cache of the hub, .*set HF_HOME to another folder"):
        repository.download(["config.json"], is_quiet=True)


def test_without_huggingface_hub_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "huggingface_hub" else found(name, *rest)
    )
    with pytest.raises(HubError, match=r"no folder llava-hf/tiny; .*pip install 'hivtp\[hub\]'"):
        find_repository(NAME)
    # A path needs none of it.
    assert find_repository(tmp_path) is None
