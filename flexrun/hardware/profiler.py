"""Measures this machine: every number of a Hardware document, in seconds (quick) or within a minute."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil
import torch
from tqdm import tqdm

from flexrun.core import DTYPES, nearest_name
from flexrun.errors import ConfigError
from flexrun.hardware import profile_compressed, profile_compute, profile_contention, profile_cuda, profile_lanes
from flexrun.hardware.effort import MIB, Bench, Effort, Shape
from flexrun.hardware.identity import cpu_cache_bytes, fingerprint, machine_name
from flexrun.hardware.profile_lanes import ScratchFile, arena, copy_call
from flexrun.hardware.rates import Processor
from flexrun.machine import available_cores, available_memory_bytes

CPU_DTYPES = ("float32", "bfloat16")
GPU_DTYPES = ("float32", "bfloat16", "float16")
CONTENTION_SHAPE = Shape(1024, 16, 4, 4096)
CONTENTION_ROWS = 256
CONTENTION_FORM = (32, 8, 64)  # heads, KV heads, head_dim
CONTENTION_BYTES = 4 * MIB
CONTENTION_READ_BYTES = 16 * MIB  # as of a unit of weights: busy cores make the end of a read late, however large it is
PAIRS = (  # lanes that share cores or memory on a machine without a GPU, or where one is emulated
    ("compute", "host_copy"),
    ("compute", "disk_read"),
    ("compute", "disk_write"),
    ("compute", "host_attention"),
    ("host_attention", "host_copy"),
    ("host_attention", "disk_read"),
    ("host_copy", "disk_read"),
)
GPU_PAIRS = (("host_attention", "h2d"), ("host_attention", "disk_read"), ("h2d", "disk_read"))


@torch.inference_mode()
def measure(
    folder: str | Path,
    effort: Effort,
    *,
    progress: bool = False,
    dtypes: Sequence[str] | None = None,
    stream: TextIO | None = None,
) -> dict:
    """The fields of a Hardware, as JSON values with four digits each.

    folder: on the disk that weights are streamed from; a scratch file lies there meanwhile. dtypes: those to measure
    (default: float32 and bfloat16, on a GPU float16 too). progress: draw a bar on ``stream`` (default stderr).
    Raises ConfigError where the folder has no room.
    """
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}", nearest_name(dtype, DTYPES))
    has_gpu = torch.cuda.is_available()
    with _progress_bar(progress, _stages(effort, dtypes, has_gpu), stream) as advance, _all_cores():
        others = _other_programs()
        bench = Bench(effort, cache_bytes=cpu_cache_bytes(), advance=advance)
        record: dict = {
            "name": machine_name(),
            "cpu_memory_bytes": available_memory_bytes(),
            "cores": available_cores(),
            "measured": datetime.date.today().isoformat(),
            "fingerprint": fingerprint(),
            "disk_folder": str(Path(folder).resolve()),
        }
        noise, misfit = record["noise"], record["misfit"] = {}, {}
        with ScratchFile(folder, bench) as scratch:
            _keep(record, "disk_write", scratch.write_transfer())
            _keep(record, "disk_read", scratch.read_transfer())
            _keep(record, "host_copy", profile_lanes.host_copy(bench))
            record["cpu"] = _processor(bench, dtypes or CPU_DTYPES, available_memory_bytes(), noise, misfit)
            if has_gpu:
                _measure_gpu(bench, record, dtypes or GPU_DTYPES)
            advance("lanes at once")
            calls, pairs = _contending(scratch, dtypes, has_gpu)
            record["contention"] = profile_contention.shares(calls, pairs, effort.contention_seconds)
            if not has_gpu:
                record["duplex_share"] = _copies_at_once(effort)
        record["disk_bytes"] = shutil.disk_usage(folder).free
        noise["other programs"] = others()
    return _plain(record)


def _stages(effort: Effort, dtypes: Sequence[str] | None, has_gpu: bool) -> int:
    """How often ``advance`` is called, if no shape is left out."""
    cpu = len(dtypes or CPU_DTYPES) * (len(effort.shapes) + 2) + 1
    gpu = len(dtypes or GPU_DTYPES) * (len(effort.shapes) + 1) + 3
    return 4 + cpu + (gpu if has_gpu else 0)


def _keep(record: dict, lane: str, measured: tuple) -> None:
    record[lane], record["misfit"][lane], record["noise"][lane] = measured


def _processor(bench: Bench, dtypes: Sequence[str], memory_bytes: int, noise: dict, misfit: dict) -> Processor:
    label = bench.label
    rates = {}
    for dtype in dtypes:
        fit, overhead_seconds, spread = profile_compute.linear_fit(bench, dtype, memory_bytes)
        decode, prefill, decode_spread, prefill_spread = profile_compute.attention_rates(bench, dtype)
        rates[dtype] = dataclasses.replace(
            fit.rates, decode_kv_bytes_per_second=decode, prefill_attention_flops_per_second=prefill
        )
        misfit[f"{label} matmul {dtype}"] = fit.residual
        noise[f"{label} matmul {dtype}"] = spread
        noise[f"{label} decode attention {dtype}"] = decode_spread
        noise[f"{label} prefill attention {dtype}"] = prefill_spread
    # The overhead hardly depends on the dtype where it matters, which is with the fastest one.
    row_seconds, element_seconds = profile_compute.sampling_costs(bench, dtypes[-1])
    if bench.device.type == "cpu":  # which multiplies straight from codes
        rates = profile_compressed.with_compressed(bench, rates, overhead_seconds, noise, misfit)
        return Processor(rates, overhead_seconds, row_seconds, element_seconds)
    brought_back = profile_compressed.dequantise_bytes_per_second(bench, dtypes[-1])
    return Processor(rates, overhead_seconds, row_seconds, element_seconds, brought_back)


def _measure_gpu(bench: Bench, record: dict, dtypes: Sequence[str]) -> None:
    on_gpu = profile_cuda.cuda_bench(bench)
    record["gpu_memory_bytes"] = profile_cuda.free_memory_bytes()
    record["gpu"] = _processor(on_gpu, dtypes, record["gpu_memory_bytes"], record["noise"], record["misfit"])
    links = profile_cuda.links(on_gpu)
    record["duplex_share"] = links.pop("duplex_share")
    for lane, measured in links.items():
        _keep(record, lane, measured)
    torch.cuda.empty_cache()  # whoever measures goes on with the memory to itself


def _contending(
    scratch: ScratchFile, dtypes: Sequence[str] | None, has_gpu: bool
) -> tuple[dict[str, Callable], tuple[tuple[str, str], ...]]:
    """One call a lane, as lanes run at the same time, and which pairs of them to time."""
    dtype = (dtypes or CPU_DTYPES)[-1]
    bench = scratch.bench
    pool = profile_compute.Pool(max(bench.pool_bytes // 2, 64 * MIB), DTYPES[dtype], bench.device)
    _, kv_heads, head_dim = CONTENTION_FORM
    tokens = bench.effort.context_tokens
    sequences = pool.elements // (2 * kv_heads * head_dim * tokens)
    nbytes = max(bench.pool_bytes // 4, 4 * CONTENTION_BYTES)
    source, target = arena(nbytes), arena(nbytes)
    read_bytes = min(CONTENTION_READ_BYTES, scratch.nbytes)
    calls = {
        "host_attention": profile_compute.decode_call(pool, *CONTENTION_FORM, sequences, tokens),
        "disk_read": scratch.read_call(read_bytes, arena(read_bytes)),
    }
    if has_gpu:
        return {**calls, "h2d": profile_cuda.link_call(16 * MIB)}, GPU_PAIRS
    spec = profile_compute.layer_spec(CONTENTION_SHAPE, dtype)
    copies = pool.module_copies(spec, "mlp", profile_compute.packer(bench, spec))
    calls["compute"] = profile_compute.module_call(spec, "mlp", copies, CONTENTION_ROWS, bench.device)
    calls["host_copy"] = copy_call(source, target, CONTENTION_BYTES)
    calls["disk_write"] = scratch.write_call(CONTENTION_BYTES)
    return calls, PAIRS


def _copies_at_once(effort: Effort) -> float:
    """Speed that the two directions of an emulated accelerator keep while both copy, averaged."""
    source, target = arena(16 * CONTENTION_BYTES), arena(16 * CONTENTION_BYTES)
    calls = {name: copy_call(source, target, CONTENTION_BYTES) for name in ("h2d", "d2h")}
    kept = profile_contention.shares(calls, [("h2d", "d2h")], effort.contention_seconds)
    return (kept["h2d"]["d2h"] + kept["d2h"]["h2d"]) / 2


@contextmanager
def _progress_bar(enabled: bool, stages: int, stream: TextIO | None) -> Iterator[Callable[[str], None]]:
    """Yields what is to be called with the name of each stage as it begins."""
    with tqdm(
        total=stages,
        disable=not enabled,
        file=stream or sys.stderr,
        bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}]",
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        begun = False

        def advance(stage: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            begun = True
            bar.set_description_str(stage)

        yield advance


def _other_programs() -> Callable[[], float]:
    """Call the result for the share of the machine's cores that other programs have used since."""
    process = psutil.Process()

    def used_seconds() -> tuple[float, float]:
        all_times, own = psutil.cpu_times(), process.cpu_times()
        # a virtual machine's stolen time is its neighbours'; waiting for the disk is nobody's
        busy = all_times.user + all_times.system + getattr(all_times, "steal", 0.0)
        return busy - own.user - own.system, time.perf_counter()

    (before, start_seconds) = used_seconds()

    def share() -> float:
        now, end_seconds = used_seconds()
        cores = psutil.cpu_count() or available_cores()
        return min(max((now - before) / (cores * max(end_seconds - start_seconds, 1e-9)), 0.0), 1.0)

    return share


@contextmanager
def _all_cores() -> Iterator[None]:
    """Compute with as many threads as a run does."""
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(value):
    """JSON values, floats with four digits: no reading has more."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
