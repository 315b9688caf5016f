"""A machine is measured once, remembered, and never measured where another one was named."""

from __future__ import annotations

import dataclasses

import pytest
from planned_models import LAPTOP, T4, T4_FILE

from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.hardware.identity import fingerprint
from flexrun.hardware.saved import profile_path
from flexrun.llm.machine_profile import ENVIRONMENT_VARIABLE, settle_hardware


@pytest.fixture(autouse=True)
def no_machine_is_named(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def measured(monkeypatch):
    """Measuring gives the laptop at once; the list says where and how it was asked for."""
    asked = []

    def measure(folder, *, quick=False, **options):
        asked.append((folder, quick))
        return dataclasses.replace(LAPTOP, fingerprint=fingerprint(), disk_folder=str(folder))

    monkeypatch.setattr(Hardware, "measure", measure)
    return asked


def test_this_machine_is_measured_once_and_remembered(measured, tmp_path):
    said = []
    first = settle_hardware(None, tmp_path / "cache", tmp_path / "weights", said.append)
    assert measured == [(tmp_path / "weights", True)], "where weights will be read from, in seconds"
    assert "measuring this machine once" in said[0]
    assert Hardware.load(profile_path(tmp_path / "cache")) == first
    again = settle_hardware(None, tmp_path / "cache", tmp_path / "weights", said.append)
    assert again == first
    assert (len(measured), len(said)) == (1, 1)


def test_without_a_folder_for_weights_the_cache_is_measured(measured, tmp_path):
    settle_hardware(None, tmp_path / "cache")
    assert measured == [(tmp_path / "cache", True)]
    assert settle_hardware(None, str(tmp_path / "cache")).name == "laptop"
    assert len(measured) == 1


def test_a_profile_of_other_software_is_measured_again(measured, tmp_path):
    dataclasses.replace(LAPTOP, fingerprint="another", disk_folder=str(tmp_path)).save(profile_path(tmp_path))
    settle_hardware(None, tmp_path)
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_warns_and_goes_on(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    said = []
    found = settle_hardware(None, tmp_path / "file" / "cache", tmp_path / "weights", said.append)
    assert found.name == "laptop"
    assert "warning: the profile cannot be kept" in said[-1]


def test_a_disturbed_measurement_is_used_but_not_kept(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(Hardware, "disturbed", property(lambda self: True))
    said = []
    assert settle_hardware(None, tmp_path, say=said.append).name == "laptop"
    assert not profile_path(tmp_path).exists()
    assert "not kept" in said[-1]


def test_silence_is_the_default(measured, tmp_path, capsys):
    settle_hardware(None, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("named", [T4, T4_FILE, str(T4_FILE)])
def test_a_machine_that_is_named_is_not_measured(measured, tmp_path, named):
    assert settle_hardware(named, tmp_path) == T4
    assert measured == []
    assert not profile_path(tmp_path).exists()


def test_the_environment_may_name_it(measured, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(T4_FILE))
    assert settle_hardware(None, tmp_path) == T4
    assert settle_hardware(LAPTOP, tmp_path) == LAPTOP, "what the caller says wins"
    assert measured == []


def test_a_document_that_cannot_be_read_is_named(measured, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        settle_hardware(tmp_path / "nowhere.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "elsewhere.json"))
    with pytest.raises(ConfigError, match=r"elsewhere\.json"):
        settle_hardware()
    assert measured == []
