"""Hardware in plain words, and the warnings that go with a disturbed measurement."""

from __future__ import annotations

from flexrun.core import format_bytes
from flexrun.hardware.hardware import NOISY, Hardware
from flexrun.hardware.rates import Processor, Transfer

_LANE_WORDS = {
    "compute": "computing",
    "host_attention": "attention on the CPU",
    "host_copy": "copies in RAM",
    "h2d": "copies to the GPU",
    "d2h": "copies from the GPU",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
}


def format_hardware(hardware: Hardware) -> str:
    """A short table: what, how fast, how long a request takes beside that, and the spread of its readings."""
    rows = [("", "rate", "latency", "noise")]
    for label, processor in (("cpu", hardware.cpu), ("gpu", hardware.gpu)):
        if processor is not None:
            rows += _processor_rows(label, processor, hardware.noise)
    lanes = ("host_copy", "h2d", "d2h", "disk_read", "disk_write")
    rows += [
        (_LANE_WORDS[lane], *_transfer_cells(getattr(hardware, lane)), _noise_cell(hardware.noise.get(lane)))
        for lane in lanes
        if getattr(hardware, lane) is not None
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    capacities = [f"RAM {format_bytes(hardware.cpu_memory_bytes)}", f"disk {format_bytes(hardware.disk_bytes)}"]
    if hardware.gpu is not None:
        capacities.insert(0, f"GPU {format_bytes(hardware.gpu_memory_bytes)}")
    return "\n".join([hardware.name, f"free: {', '.join(capacities)}", "", *table, *_contention_lines(hardware)])


def warnings_of(hardware: Hardware) -> list[str]:
    """One line a reading that was too noisy to be trusted, with the remedy."""
    remedy = "close other programs and measure again"
    noisy = {name: spread for name, spread in hardware.noise.items() if spread > NOISY}
    others = noisy.pop("other programs", 0.0)
    warnings = [f"other programs used {others:.0%} of the CPU; {remedy}"] if others else []
    words = [f"{_LANE_WORDS.get(name, name)} ({spread:.0%})" for name, spread in noisy.items()]
    return [*warnings, *([f"noisy readings: {', '.join(words)}; {remedy}"] if words else [])]


def _processor_rows(label: str, processor: Processor, noise: dict[str, float]) -> list[tuple[str, str, str, str]]:
    rows = []
    for dtype, rates in processor.rates.items():
        flops, weights = rates.matmul_flops_per_second, rates.weight_bytes_per_second
        overhead = _microseconds(processor.step_overhead_seconds)
        kinds = (
            ("matmul", "matmul", _flops(flops), overhead),
            ("matmul", "weights of few tokens", _speed(weights), ""),
            ("prefill attention", "prefill attention", _flops(rates.prefill_attention_flops_per_second), ""),
            ("decode attention", "decode attention, KV", _speed(rates.decode_kv_bytes_per_second), ""),
        )
        rows += [
            (f"{label} {dtype} {words}", rate, latency, _noise_cell(noise.get(f"{label} {kind} {dtype}")))
            for kind, words, rate, latency in kinds
        ]
    return rows


def _contention_lines(hardware: Hardware) -> list[str]:
    lines = []
    for lane, shares in hardware.contention.items():
        beside = [f"{share:.0%} beside {_LANE_WORDS[other]}" for other, share in shares.items() if share < 0.95]
        if beside:
            lines.append(f"{_LANE_WORDS[lane]}: keeps {', '.join(beside)}")
    return ["", *lines] if lines else []


def _transfer_cells(transfer: Transfer) -> tuple[str, str]:
    return _speed(transfer.bytes_per_second), _microseconds(transfer.latency_seconds)


def _noise_cell(spread: float | None) -> str:
    return "" if spread is None else f"{spread:.0%}"


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def _flops(flops_per_second: float) -> str:
    tera = flops_per_second >= 1e12
    return f"{flops_per_second / (1e12 if tera else 1e9):.3g} {'T' if tera else 'G'}FLOP/s"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"
