"""flexrun: throughput runner for language models larger than the GPU, or larger than the RAM."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["LLM", "Policy", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "flexrun.llm",
    "Policy": "flexrun.config",
    "RequestOutput": "flexrun.outputs",
    "SamplingParams": "flexrun.sampling",
}


def __getattr__(name: str):
    """Public names load their module on first use, so that ``flexrun --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flexrun' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
