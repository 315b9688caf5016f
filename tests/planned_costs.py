"""What steps of planned models cost, for every test of costs: a layout, its costs, and passes of one micro-batch."""

from __future__ import annotations

import dataclasses

from planned_models import GIB

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import build_scheduler
from flexrun.policy.cost import StepCosts
from flexrun.policy.layout import Budgets, Layout
from flexrun.steps import MicroBatchShape, PassShape, Step
from flexrun.workload import Workload

RAGGED = Workload.of([200, 150, 300, 80] * 5, [20, 9, 30, 12] * 5)
POLICY = Policy(sequences_in_flight=8, tokens_per_pass=400, attention_micro_batch=2, token_micro_batch=128)
RAM, DISK = Placement(), Placement(0.0, 0.0, 1.0)


def layout_of(spec: ModelSpec, policy: Policy, on_device: bool, job: Workload = RAGGED) -> Layout:
    return Layout.of(spec, policy, job, Budgets(8 * GIB, 8 * GIB if on_device else 0))


def costs_of(layout: Layout, machine: Hardware) -> StepCosts:
    return StepCosts(layout.spec, layout.policy, layout.placement, machine, on_device=layout.on_device)


def alone(costs: StepCosts, layout: Layout, shape: PassShape) -> tuple[list[Step], PassShape]:
    """The steps of a pass that is the whole run, so that all it loads is its own."""
    shape = dataclasses.replace(shape, index=0, more=False)
    scheduler = build_scheduler(
        layout.spec, layout.placement, layout.account, on_device=layout.on_device, policy=layout.policy
    )
    return scheduler.pass_steps(shape), shape


def whole(query: int, kv: int, decode: int = 0, decode_kv: int = 0, home=Tier.CPU, lane=Lane.CPU) -> PassShape:
    pairs = decode_kv + (query - decode) * max(kv - decode_kv, 0)
    part = MicroBatchShape(0, query, kv, pairs, home, lane, decode, decode_kv)
    return PassShape(0, query, max(decode, 1), (part,), False)


def decoding(sequences: int, context: int, **place) -> PassShape:
    return whole(sequences, sequences * context, sequences, sequences * context, **place)
