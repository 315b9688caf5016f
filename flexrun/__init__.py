"""flexrun: throughput runner for language models larger than the GPU, or larger than the RAM."""

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "Budgets": "flexrun.policy.layout",
    "Hardware": "flexrun.hardware",
    "LLM": "flexrun.llm",
    "Policy": "flexrun.config",
    "RequestOutput": "flexrun.outputs",
    "SamplingParams": "flexrun.sampling",
    "Workload": "flexrun.jobs.workload",
    "estimate": "flexrun.llm.planning",
    "search_plan": "flexrun.llm.planning",
    "search_policy": "flexrun.llm.planning",
    "simulate": "flexrun.llm.planning",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    """Public names load their module on first use, so that ``flexrun --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flexrun' has no attribute {name!r}")
    import importlib

    from flexrun.openmp import import_torch

    import_torch()
    return getattr(importlib.import_module(_HOMES[name]), name)
