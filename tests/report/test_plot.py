"""Pictures are well-formed SVG that shows what they were given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from flexrun.core import Event, Lane
from flexrun.report.plot import curves_svg, timeline_svg

SVG = "{http://www.w3.org/2000/svg}"
EVENTS = [
    Event("read_weights", Lane.DISK_READ, 1.0, 3.0, layer=0),
    Event("mlp", Lane.CPU, 3.0, 4.0, layer=0),
    Event("mlp & <more>", Lane.CPU, 4.0, 5.0, layer=1),
]


def bars(picture: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(picture)
    return [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def test_a_timeline_has_a_bar_for_each_step_as_long_as_it_took():
    found = bars(timeline_svg(EVENTS))
    widths = [float(rect.get("width")) for rect in found]
    assert len(found) == len(EVENTS)
    assert abs(max(widths) / min(widths) - 2.0) < 0.01
    assert any("mlp & <more>" in rect.find(f"{SVG}title").text for rect in found)


def test_lanes_without_a_step_have_no_row():
    words = [text.text for text in ElementTree.fromstring(timeline_svg(EVENTS)).iter(f"{SVG}text")]
    assert {"cpu", "disk_read"} <= set(words)
    assert "gpu" not in words


def test_an_empty_timeline_is_a_picture_still():
    assert bars(timeline_svg([])) == []


def test_curves_rise_where_their_values_do():
    root = ElementTree.fromstring(curves_svg({"a & b": [(1, 2.0), (2, 4.0)]}, "x", "y"))
    lines = [line for line in root.iter(f"{SVG}polyline") if line.get("stroke-width") == "2"]
    (first, last) = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert last[0] > first[0] and last[1] < first[1], "SVG counts y downwards"
    assert any(text.text == "a & b" for text in root.iter(f"{SVG}text"))
