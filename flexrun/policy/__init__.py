"""Thinking, never doing: from a model, a workload and budgets to a Policy."""

from flexrun.policy.defaults import NoFit, default_policy

__all__ = ["NoFit", "default_policy"]
