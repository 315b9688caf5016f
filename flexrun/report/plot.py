"""Pictures without a plotting library: a timeline as lanes of bars, and curves, as SVG that any browser shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from flexrun.core import Event, Lane

WIDTH, LEFT, LANE_HEIGHT, TOP = 1200, 90, 34, 30
COLOURS = {
    "read_weights": "#d08c3c",
    "copy_weights": "#e0b050",
    "read_kv": "#8c6bb1",
    "load_kv": "#9e82c8",
    "save_kv": "#b9a3d8",
    "write_kv": "#6f4f96",
    "attend": "#2f7ebc",
    "attention_inputs": "#5aa7d6",
    "attention_output": "#86c5e6",
    "mlp": "#3f9f6b",
    "experts": "#2c7a4f",
    "logits": "#a0453c",
}
OTHER_COLOUR = "#999999"
CURVE_COLOURS = ("#2f7ebc", "#d08c3c", "#3f9f6b", "#a0453c", "#8c6bb1")
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 720, 400, 70


def timeline_svg(events: Sequence[Event]) -> str:
    """A timeline, a row a lane and a bar a step; hovering over a bar tells the step."""
    lanes = [lane for lane in Lane if any(event.lane is lane for event in events)]
    start = min((event.start_seconds for event in events), default=0.0)
    span = max((event.end_seconds for event in events), default=1.0) - start
    scale = (WIDTH - LEFT - 10) / (span or 1.0)
    height = TOP + LANE_HEIGHT * len(lanes) + 60
    parts = [_header(WIDTH, height), _text(LEFT, 18, f"{span:.4g} s, {len(events):,} steps")]
    for row, lane in enumerate(lanes):
        top = TOP + row * LANE_HEIGHT
        parts.append(_text(6, top + LANE_HEIGHT / 2 + 4, lane.value))
        for event in events:
            if event.lane is not lane:
                continue
            x = LEFT + (event.start_seconds - start) * scale
            width = max((event.end_seconds - event.start_seconds) * scale, 0.05)
            colour = COLOURS.get(event.name, OTHER_COLOUR)
            tip = f"{event.name}, layer {event.layer}, {(event.end_seconds - event.start_seconds) * 1e3:.3f} ms"
            parts.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{LANE_HEIGHT - 6}" fill="{colour}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    seen = [name for name in COLOURS if any(event.name == name for event in events)]
    for number, name in enumerate(seen):
        x, y = LEFT + (number % 8) * 135, height - 40 + (number // 8) * 18
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(_text(x + 17, y, name.replace("_", " ")))
    return "\n".join([*parts, "</svg>\n"])


def curves_svg(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Lines through (x, y) points, one a name, with axes from 0."""
    points = [point for curve in curves.values() for point in curve]
    most_x = max((x for x, _ in points), default=1.0) or 1.0
    most_y = max((y for _, y in points), default=1.0) or 1.0
    width, height = PLOT_WIDTH - 2 * MARGIN, PLOT_HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> str:
        return f"{MARGIN + x / most_x * width:.1f},{PLOT_HEIGHT - MARGIN - y / most_y * height:.1f}"

    parts = [_header(PLOT_WIDTH, PLOT_HEIGHT)]
    axes = f"{place(0, most_y)} {place(0, 0)} {place(most_x, 0)}"
    parts.append(f'<polyline points="{axes}" fill="none" stroke="#444444"/>')
    for share in (0.25, 0.5, 0.75, 1.0):
        x, y = place(share * most_x, 0).split(",")
        parts.append(_text(float(x) - 10, float(y) + 16, f"{share * most_x:.3g}"))
        x, y = place(0, share * most_y).split(",")
        parts.append(_text(float(x) - 48, float(y) + 4, f"{share * most_y:.3g}"))
    parts.append(_text(PLOT_WIDTH / 2 - 60, PLOT_HEIGHT - 24, x_label))
    parts.append(_text(10, MARGIN - 24, y_label))
    for number, (name, curve) in enumerate(curves.items()):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{MARGIN + 30}" y="{24 + number * 18}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(MARGIN + 48, 34 + number * 18, name))
    return "\n".join([*parts, "</svg>\n"])


def _header(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
