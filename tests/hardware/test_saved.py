"""A saved profile is used on the machine, software and disk that it was measured on, and nowhere else."""

from dataclasses import replace

import pytest

from flexrun.hardware import identity, saved
from flexrun.hardware.identity import cpu_cache_bytes, fingerprint, machine_name
from flexrun.hardware.saved import profile_path, saved_profile


@pytest.fixture
def profile(machine, tmp_path):
    hardware = replace(machine, fingerprint=fingerprint(), disk_folder=str(tmp_path))
    hardware.save(profile_path(tmp_path))
    return hardware


def test_what_was_saved_is_found(profile, tmp_path):
    assert saved_profile(tmp_path) == saved_profile(tmp_path, tmp_path / "not" / "yet") == profile


def test_none_is_found_where_none_was_saved(tmp_path):
    assert saved_profile(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "{"])
def test_a_damaged_one_is_measured_again(tmp_path, text):
    profile_path(tmp_path).write_text(text)
    assert saved_profile(tmp_path) is None


def test_that_of_another_machine_is_not_used(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "cpu_name", lambda: "another CPU")
    assert saved_profile(tmp_path) is None


def test_that_of_another_disk_is_not_used(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "_device", lambda folder: str(folder))
    assert saved_profile(tmp_path, tmp_path) == profile
    assert saved_profile(tmp_path, tmp_path / "mounted") is None
    assert saved_profile(tmp_path) == profile


def test_the_fingerprint_names_what_a_measurement_depends_on(monkeypatch):
    before = fingerprint()
    assert machine_name().split(",")[0] in before and "torch" in before and "native" in before
    monkeypatch.setattr(identity, "METHOD", identity.METHOD + 1)
    assert fingerprint() != before


def test_the_largest_cache(tmp_path):
    assert cpu_cache_bytes(tmp_path) == 32 << 20
    for index, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cpu_cache_bytes(tmp_path) == 32 << 20
    (tmp_path / "index2" / "size").write_text("260096K")
    assert cpu_cache_bytes(tmp_path) == 254 << 20
    (tmp_path / "index2" / "size").write_text("many")
    assert cpu_cache_bytes(tmp_path) == 1 << 20
