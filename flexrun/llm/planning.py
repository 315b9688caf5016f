"""The planner's Python face: a model by name, a machine, a job, and out comes a policy, a forecast or a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flexrun.config import Policy
from flexrun.core import parse_bytes
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.llm.model_files import read_model_plan
from flexrun.models.spec import ModelSpec
from flexrun.policy.features import RUNNABLE, Features
from flexrun.policy.forecast import Forecast, forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.passes import job_passes
from flexrun.policy.search import Plan, search
from flexrun.policy.simulator import Timeline, simulate_layout
from flexrun.workload import Workload

HOST_SHARE, DEVICE_SHARE = 0.9, 0.92  # of a machine's memory, where no budget is given

Model = ModelSpec | str | Path
Machine = Hardware | str | Path
BudgetsLike = Budgets | Mapping[str, Any] | None


def as_spec(model: Model) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else read_model_plan(model).spec


def as_hardware(hardware: Machine) -> Hardware:
    return hardware if isinstance(hardware, Hardware) else Hardware.load(hardware)


def as_budgets(budgets: BudgetsLike, hardware: Hardware) -> Budgets:
    """Budgets from ``{"gpu": "16GiB", "cpu": ..., "disk": ...}``; what is not given is most of what the machine has."""
    if isinstance(budgets, Budgets):
        return budgets
    given = {name: None if size is None else parse_bytes(size) for name, size in (budgets or {}).items()}
    unknown = set(given) - {"gpu", "cpu", "disk"}
    if unknown:
        raise ConfigError(f"unknown budget {sorted(unknown)[0]!r}", "name gpu, cpu or disk")
    if given.get("cpu") == 0:
        raise ConfigError("a budget of 0 bytes of cpu memory runs nothing", "give --cpu-memory a size, or leave it out")
    most = {
        "cpu": int(hardware.cpu_memory_bytes * HOST_SHARE),
        "gpu": int(hardware.gpu_memory_bytes * DEVICE_SHARE),
        "disk": int(hardware.disk_bytes) or None,
    }
    sizes = {name: most[name] if given.get(name) is None else given[name] for name in most}
    return Budgets(sizes["cpu"], sizes["gpu"], sizes["disk"])


def search_plan(
    model: Model,
    hardware: Machine,
    workload: Workload,
    budgets: BudgetsLike = None,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
    effort: float = 1.0,
) -> Plan:
    """The best plan with all that is known of it: layout, forecast, prices. Arguments as for ``search_policy``."""
    machine, spec = as_hardware(hardware), as_spec(model)
    budgets = as_budgets(budgets, machine)
    return search(spec, machine, workload, budgets, fixed=fixed, features=features, effort=effort)


def search_policy(
    model: Model,
    hardware: Machine,
    workload: Workload,
    budgets: BudgetsLike = None,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
    effort: float = 1.0,
) -> Policy:
    """The policy that ends ``workload`` soonest.

    model: a ModelSpec, or the path or name of a model (its config.json is enough). hardware: a Hardware or the path of
    its document. budgets: a Budgets or {"gpu", "cpu", "disk"} in bytes or text; default: most of what the machine has.
    fixed: Policy fields to keep, for example {"sequences_in_flight": 64}. effort: how many times as long to search.
    Raises NoFit (a BudgetError) naming the budget that is short, and ConfigError for what cannot be read.
    """
    return search_plan(model, hardware, workload, budgets, fixed=fixed, features=features, effort=effort).policy


def plan_of(
    policy: Policy | str | Path, model: Model, hardware: Machine, workload: Workload, budgets: BudgetsLike = None
) -> Plan:
    """The plan of a policy that is given, a Policy or its document. Raises BudgetError where it does not fit."""
    machine = as_hardware(hardware)
    policy = policy if isinstance(policy, Policy) else Policy.from_json(policy)
    layout = Layout.of(as_spec(model), policy, workload, as_budgets(budgets, machine))
    layout.check()
    return Plan(policy, layout, forecast(layout, workload, machine))


def estimate(
    policy: Policy, model: Model, hardware: Machine, workload: Workload, budgets: BudgetsLike = None
) -> Forecast:
    """The forecast of a whole job under a policy. Raises BudgetError where the policy does not fit."""
    return plan_of(policy, model, hardware, workload, budgets).forecast


def simulate(
    policy: Policy,
    model: Model,
    hardware: Machine,
    workload: Workload,
    budgets: BudgetsLike = None,
    *,
    passes: int = 8,
    skip: int = 0,
) -> Timeline:
    """Step by step, ``passes`` passes of a job under a policy, after the first ``skip``; every step is an event."""
    machine = as_hardware(hardware)
    layout = Layout.of(as_spec(model), policy, workload, as_budgets(budgets, machine))
    layout.check()
    chosen = islice(job_passes(workload, layout.policy, layout.micro_batches, skip + passes), skip, None)
    return simulate_layout(layout, machine, chosen, events=True)
