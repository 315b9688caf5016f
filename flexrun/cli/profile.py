"""Measure this machine, so that plans and forecasts are made for it."""

from __future__ import annotations

import argparse
import sys


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output-file", metavar="FILE", help="hardware JSON; default: where runs look for it")
    parser.add_argument("--quick", action="store_true", help="some seconds in place of a minute, less exact")
    parser.add_argument("--disk-dir", metavar="DIR", help="measure the disk of this folder; default: the cache's")
    parser.add_argument("--cache-dir", metavar="DIR", help="where fetched models and packed weights are kept")
    parser.add_argument("--json", action="store_true", help="print the hardware JSON to stdout")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: a bar on a terminal")


def call(args: argparse.Namespace) -> int:
    from flexrun.hardware import Hardware
    from flexrun.hardware.saved import profile_path
    from flexrun.hardware.summary import format_hardware, warnings_of
    from flexrun.weights.catalog import default_cache_dir

    cache_dir = args.cache_dir or default_cache_dir()
    path = args.output_file or profile_path(cache_dir)
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    hardware = Hardware.measure(args.disk_dir or cache_dir, quick=args.quick, progress=progress)
    hardware.save(path)
    print(format_hardware(hardware), file=sys.stderr)
    for warning in warnings_of(hardware):
        print(f"\nwarning: {warning}", file=sys.stderr)
    print(f"\nsaved as {path}", file=sys.stderr)
    if args.json:
        print(hardware.to_json())
    return 0
