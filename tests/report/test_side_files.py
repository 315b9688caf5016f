"""What cannot be written beside the answers is refused before a run, and only told after it."""

from __future__ import annotations

import json
import os

import numpy
import pytest

from flexrun.core import Event, Lane
from flexrun.errors import ConfigError
from flexrun.report.side_files import SideFiles, check_side_file

EVENTS = [Event("attend", Lane.CPU, 0.0, 1.0)]


def test_places_that_cannot_be_written_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(ConfigError, match="no folder") as caught:
        SideFiles(None, tmp_path / "gone" / "profile.json")
    assert f"mkdir -p {tmp_path / 'gone'}" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be written"):
        SideFiles(tmp_path, None)
    check_side_file(tmp_path / "new.json")
    check_side_file(os.devnull)


def test_what_there_is_is_written_and_a_full_disk_is_no_reason_to_fail(tmp_path):
    said = []
    trace, profile = tmp_path / "trace.json", tmp_path / "profile.json"
    SideFiles(trace, profile).write(EVENTS, numpy.ones((2, 3), dtype=int), said.append)
    assert any(row["name"] == "attend" for row in json.loads(trace.read_text())["traceEvents"])
    assert json.loads(profile.read_text())["tokens_by_layer_and_expert"] == [[1, 1, 1]] * 2 and not said
    SideFiles("/dev/full", None).write(EVENTS, None, said.append)
    assert said == ["warning: /dev/full cannot be written: No space left on device"]
