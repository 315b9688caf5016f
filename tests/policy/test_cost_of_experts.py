"""What mixtures of experts cost: those that are chosen, and those that run on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
from planned_costs import POLICY, alone, costs_of, decoding, layout_of
from planned_models import LAPTOP, T4, planned

from flexrun.config import Placement
from flexrun.core import Lane, Tier
from flexrun.hardware import LinearWork
from flexrun.steps import MicroBatchShape, PassShape, StepKind


def test_experts_that_no_token_chose_are_not_computed():
    spec = planned("deepseek", n_routed_experts=64, num_experts_per_tok=2)
    costs = costs_of(layout_of(spec, POLICY, False), LAPTOP)
    work, rates = LinearWork.of(spec.linear_shapes("expert")), LAPTOP.cpu.rates["float16"]

    def one_expert(rows: float) -> float:
        return rates.linear_seconds(rows, work, spec.dtype_bytes) + LAPTOP.cpu.step_overhead_seconds

    one = costs.experts_seconds(64, 1)
    assert one == pytest.approx(2 * one_expert(1)), "one token meets the experts it is sent to"
    assert costs.experts_seconds(64, 2) < 2 * one
    # many tokens meet them all, each expert its share of the rows
    assert costs.experts_seconds(64, 6400) == pytest.approx(64 * one_expert(6400 * 2 / 64), rel=1e-6)


@pytest.mark.parametrize("half_batches", [False, True])
def test_few_tokens_move_the_chosen_experts_alone(half_batches):
    """In sums as in steps; not in halves, of which the first cannot know what the second chooses."""
    spec = planned("deepseek", n_routed_experts=64, num_experts_per_tok=2)
    policy = dataclasses.replace(
        POLICY, weights=Placement(0.0, 0.5, 0.5), kv=Placement(0.5, 0.5), half_batches=half_batches
    )
    costs = costs_of(layout_of(spec, policy, True), T4)

    def passes(tokens: int) -> PassShape:
        there = MicroBatchShape(0, tokens, 9 * tokens, 9 * tokens, Tier.GPU, Lane.GPU, tokens, 9 * tokens)
        away = dataclasses.replace(there, index=1, home=Tier.CPU, attend_lane=Lane.CPU)
        return PassShape(0, 2 * tokens, 2 * tokens, (there, away), False)

    few, many = (costs.lane_seconds(passes(tokens)) for tokens in (2, 500))
    steps, shape = alone(costs, layout_of(spec, policy, True), passes(2))
    assert any(step.chosen for step in steps) is not half_batches
    for lane in (Lane.DISK_READ, Lane.H2D):
        assert few[lane] == pytest.approx(sum(costs.seconds(step, shape) for step in steps if step.lane is lane))
        assert (few[lane] < 0.5 * many[lane]) is not half_batches


def test_a_group_of_experts_takes_its_share_of_a_layer():
    costs = costs_of(layout_of(planned("mixtral"), POLICY, True), T4)
    for tokens in (1, 7, 300):
        layer = costs.experts_seconds(8, tokens)
        assert costs.experts_seconds(2, tokens) + costs.experts_seconds(6, tokens) == pytest.approx(layer)


def test_experts_on_the_cpu_leave_the_link_and_the_device():
    spec = planned("mixtral")
    alone_on_device, shared, by_cpu = (
        costs_of(
            layout_of(spec, dataclasses.replace(POLICY, kv=Placement(1.0, 0.0), cpu_experts_share=share), True), T4
        )
        for share in (0.0, 0.5, 1.0)
    )
    on_gpu = {"home": Tier.GPU, "lane": Lane.GPU}
    few, many = decoding(4, 10, **on_gpu), decoding(400, 10, **on_gpu)
    none, half, whole = (costs.lane_seconds(few) for costs in (alone_on_device, shared, by_cpu))
    assert none[Lane.CPU] == 0 < half[Lane.CPU] == pytest.approx(whole[Lane.CPU] / 2)
    for lane in (Lane.H2D, Lane.GPU):
        assert none[lane] > half[lane] > whole[lane]
        assert half[lane] == pytest.approx((none[lane] + whole[lane]) / 2, rel=0.01)
    work = LinearWork.of(spec.linear_shapes("expert"))
    hit = 8 * (1 - 0.75**4)
    one = T4.cpu.rates["float16"].linear_seconds(4 * 2 / hit, work, 2) + T4.cpu.step_overhead_seconds
    assert whole[Lane.CPU] == pytest.approx(spec.num_layers * hit * one), "those that were chosen, by their weights"
    assert by_cpu.lane_seconds(many)[Lane.CPU] > 3 * whole[Lane.CPU], "many rows wait for its products"


def test_only_sparse_layers_have_experts():
    spec = planned("deepseek")
    layout = layout_of(spec, POLICY, False)
    steps, _ = alone(costs_of(layout, LAPTOP), layout, decoding(4, 10))
    layers = {step.layer for step in steps if step.kind is StepKind.EXPERTS}
    assert layers == {layer for layer in range(spec.num_layers) if spec.is_sparse(layer)} == {1, 2, 3, 4, 5}
