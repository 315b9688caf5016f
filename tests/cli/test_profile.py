"""``flexrun profile``: what it measures, where it writes, what it prints."""

import json

import pytest

from flexrun.cli import main
from flexrun.hardware import Hardware, Processor, Rates, Transfer
from flexrun.hardware.saved import profile_path


@pytest.fixture
def measured(monkeypatch):
    """Hardware.measure gives a made-up machine; returns the arguments it was called with."""
    calls = []

    def measure(folder, **settings):
        calls.append((str(folder), settings))
        processor = Processor({"float32": Rates(1e11, 1e10, 1e10, 1e10, 1e10)})
        lane = Transfer(2e9, 1e-4)
        return Hardware("bench", processor, 1 << 30, lane, lane, lane, noise={"disk_read": 0.4})

    monkeypatch.setattr(Hardware, "measure", measure)
    return calls


def test_it_is_saved_where_flexrun_looks(measured, tmp_path, capsys):
    assert main(["profile", "--cache-dir", str(tmp_path / "cache")]) == 0
    captured = capsys.readouterr()
    path = profile_path(tmp_path / "cache")
    assert Hardware.load(path).name == "bench" and captured.out == ""
    assert measured == [(str(tmp_path / "cache"), {"quick": False, "progress": False})]
    for part in ("bench", "disk reads", "2 GB/s", "warning: noisy readings: disk reads (40%)", f"saved as {path}"):
        assert part in captured.err


def test_flags(measured, tmp_path, capsys):
    target = tmp_path / "machine.json"
    flags = ["--quick", "--progress", "--disk-dir", str(tmp_path / "disk"), "-o", str(target), "--json"]
    assert main(["profile", "--cache-dir", str(tmp_path / "cache"), *flags]) == 0
    assert measured == [(str(tmp_path / "disk"), {"quick": True, "progress": True})]
    assert json.loads(capsys.readouterr().out) == json.loads(target.read_text())
    assert not (tmp_path / "cache").exists()


def test_a_file_that_cannot_be_written_is_a_usage_error(measured, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["profile", "--cache-dir", str(tmp_path), "-o", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_disk_without_room_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["profile", "--quick", "--cache-dir", str(tmp_path), "--disk-dir", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert "scratch file" in captured.err and "hint: " in captured.err and not profile_path(tmp_path).exists()
