"""The budget of the KV cache where nobody gives one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hivtp.runtime.serving.flow import engine, memory
from hivtp.runtime.serving.flow.memory import kv_budget
from hivtp.runtime.serving.settings import ServerSettings
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 16 GiB free."""
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {16 * 2**20} kB\n")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def limit(root: Path, group: str, most: str, current: int) -> None:
    write(root / "sys/fs/cgroup" / group / "memory.max", f"{most}\n")
    write(root / "sys/fs/cgroup" / group / "memory.current", f"{current}\n")


def test_half_of_what_is_free(root: Path, tmp_path_factory: pytest.TempPathFactory):
    assert kv_budget(root) == 8 * GIB
    assert kv_budget(tmp_path_factory.mktemp("nothing")) is None
    assert (kv_budget() or 0) > 0


def test_a_container_sees_its_own_limit(root: Path):
    write(root / "proc/self/cgroup", "0::/\n")
    limit(root, ".", str(6 * GIB), 2 * GIB)
    assert kv_budget(root) == 2 * GIB
    limit(root, ".", "max", 2 * GIB)
    assert kv_budget(root) == 8 * GIB


def test_a_service_and_what_it_is_part_of_have_limits(root: Path):
    write(root / "proc/self/cgroup", "1:name=old:/elsewhere\n0::/system.slice/hivtp.service\n")
    limit(root, "system.slice/hivtp.service", str(6 * GIB), 2 * GIB)
    limit(root, "system.slice", "max", 3 * GIB)
    assert kv_budget(root) == 2 * GIB
    limit(root, "system.slice", str(4 * GIB), 3 * GIB)
    assert kv_budget(root) == GIB // 2
    limit(root, "system.slice", str(2 * GIB), 3 * GIB)
    assert kv_budget(root) == 0


def test_without_memory_there_is_no_server(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    settings = ServerSettings(num_slots=2)
    position = pruned.model.language.kv_bytes_per_position
    # What the system does not tell is no bound.
    for found, positions in ((None, 512), (100 * position, 100), (10**15, 512)):
        monkeypatch.setattr(memory, "kv_budget", lambda found=found: found)
        assert engine.Engine(pruned.model, settings, print).max_positions == positions
    monkeypatch.setattr(memory, "kv_budget", lambda: 0)
    with pytest.raises(SettingsError, match="give more memory"):
        engine.Engine(pruned.model, settings, print)
