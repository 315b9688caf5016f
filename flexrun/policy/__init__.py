"""Thinking, never doing: from a model, a machine, a workload and budgets to a Policy and its forecast."""
