"""Memory limits of control groups, as the kernel's files spell them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from flexrun import machine


@pytest.fixture
def tree(tmp_path):
    """tree(membership, {folder: {file: text}}) -> (membership file, mount)."""

    def build(membership: str, folders: dict[str, dict[str, str]]) -> tuple[Path, Path]:
        for folder, files in folders.items():
            (tmp_path / "mount" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "mount" / folder / name).write_text(text)
        (tmp_path / "cgroup").write_text(membership)
        return tmp_path / "cgroup", tmp_path / "mount"

    return build


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": f"anon 1\nfile {cache}\n"}


def v1(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"cache 5\ntotal_cache {cache}\n",
    }


def test_version_2_counts_page_cache_as_free(tree):
    rooms = machine._control_group_rooms_bytes(*tree("0::/job/step\n", {"job/step": v2("1000", 700, 200)}))
    assert rooms == [500]


def test_every_group_around_the_process_counts(tree):
    folders = {"": v2("max", 10), "job": v2("800", 750), "job/step": v2("1000", 100)}
    assert sorted(machine._control_group_rooms_bytes(*tree("0::/job/step\n", folders))) == [50, 900]


def test_no_limit_is_no_limit(tree):
    assert machine._control_group_rooms_bytes(*tree("0::/job\n", {"job": v2("max", 10)})) == []


def test_version_1_reads_the_memory_hierarchy(tree):
    membership = "3:cpu,cpuacct:/other\n2:memory:/job\n0::/\n"
    folders = {"memory/job": v1(1000, 900, 300), "memory": v1((1 << 63) - 4096, 5), "cpu,cpuacct/other": {}}
    assert machine._control_group_rooms_bytes(*tree(membership, folders)) == [400]


def test_inside_a_container_the_mount_is_the_group_itself(tree):
    membership = "4:memory:/docker/0123\n"
    assert machine._control_group_rooms_bytes(*tree(membership, {"memory": v1(1000, 1)})) == [999]


def test_hybrid_mounts_are_found(tree):
    assert machine._control_group_rooms_bytes(*tree("0::/job\n", {"unified/job": v2("300", 100)})) == [200]


def test_a_full_group_has_no_room(tree):
    assert machine._control_group_rooms_bytes(*tree("0::/job\n", {"job": v2("100", 180)})) == [0]


def test_unreadable_files_are_no_limit(tree, tmp_path):
    membership, mount = tree("0::/job\n", {"job": {"memory.max": "100\n", "memory.current": "text\n"}})
    assert machine._control_group_rooms_bytes(membership, mount) == []
    assert machine._control_group_rooms_bytes(tmp_path / "absent", mount) == []


def test_available_memory_is_the_tightest_limit(monkeypatch):
    free = psutil.virtual_memory().available
    monkeypatch.setattr(machine, "_control_group_rooms_bytes", lambda *_: [1 << 20, 1 << 21])
    assert machine.available_memory_bytes() == 1 << 20
    monkeypatch.setattr(machine, "_control_group_rooms_bytes", lambda *_: [])
    assert machine.available_memory_bytes() == pytest.approx(free, rel=0.2)


def test_this_machine_answers():
    assert machine.available_cores() >= 1
    assert machine.peak_resident_bytes() >= 0.9 * psutil.Process().memory_info().rss
