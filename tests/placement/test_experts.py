"""Routed experts are placed one by one, evenly over the layers, and move in groups that a link likes."""

from __future__ import annotations

import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, known, planned

from flexrun.config import Placement, Policy
from flexrun.core import Tier, align_up
from flexrun.llm.model_files import read_model_plan
from flexrun.placement import WeightPlacement, build_scheduler, memory_account, place_weights, unit_of
from flexrun.placement.weights import EXPERT_UNIT_BYTES, EXPERT_UNITS, expert_number
from flexrun.steps import PassShape, StepKind

SPEC = planned("deepseek")  # a dense layer, then five of 16 experts


def place(weights: Placement, on_device: bool = True, spec=SPEC) -> WeightPlacement:
    return place_weights(spec, Policy(weights=weights), on_device=on_device)


def test_an_expert_goes_where_its_own_share_puts_it():
    """Half of them on the GPU: of each layer, some experts are there and some are not."""
    tiers = defaultdict(set)
    for item in place(Placement(0.5, 0.5)).tensors:
        if item.tensor.module == "experts":
            tiers[item.layer].add(item.tier)
    assert set(tiers) == {1, 2, 3, 4, 5}
    assert all(found == {Tier.GPU, Tier.CPU} for found in tiers.values())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8)).filter(sum), st.booleans())
def test_sparse_layers_hold_alike_shares_of_each_tier(parts, on_device):
    gpu, cpu, disk = parts if on_device else (0, parts[1], parts[0] + parts[2])
    total = gpu + cpu + disk
    placed = place(Placement(gpu / total, cpu / total, disk / total), on_device)
    by_layer = defaultdict(lambda: defaultdict(int))
    for item in placed.tensors:
        if item.tensor.module == "experts":
            by_layer[item.layer][item.tier] += item.nbytes
    largest = max(item.nbytes for item in placed.tensors if item.tensor.module == "experts")
    for tier in Tier:
        held = [sizes[tier] for sizes in by_layer.values()]
        assert max(held) - min(held) <= 3 * largest


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
@pytest.mark.parametrize("weights", [Placement(0.0, 0.0, 1.0), Placement(0.25, 0.25, 0.5)])
def test_units_hold_whole_experts_of_one_layer_in_order(name, weights):
    spec = planned(name)
    placed = place(weights, spec=spec)
    experts, moved = defaultdict(set), defaultdict(int)
    for item in placed.tensors:
        key = unit_of(spec, item.layer, item.tensor)
        if item.tensor.module == "experts":
            experts[key].add(expert_number(item.tensor))
        if item.tier is not Tier.GPU:
            moved[key] += align_up(item.nbytes)
    sparse = [unit for unit in placed.units if unit.experts]
    assert sum(unit.experts for unit in sparse) == spec.experts.num_experts * len({unit.layer for unit in sparse})
    for unit in sparse:
        key = (unit.layer, unit.module)
        assert unit.experts == len(experts[key])
        assert sorted(experts[key]) == list(range(min(experts[key]), max(experts[key]) + 1))
        assert unit.disk_bytes + unit.host_bytes == moved[key]
    modules = [unit.module for unit in placed.units if unit.layer == spec.num_layers - 1]
    assert modules[:2] == ["attention", "mlp"]
    assert modules[2:] == [f"experts.{number}" for number in range(len(modules) - 2)]
    assert placed.units[-1].module == "head"


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v2", "gpt-oss-120b"])
def test_groups_are_large_enough_for_a_link_and_not_too_many(name):
    spec = read_model_plan(known(name)).spec
    layer = spec.num_layers - 1
    units = [unit for unit in place(Placement(0, 0, 1), spec=spec).units if unit.layer == layer and unit.experts]
    one = sum(inputs * outputs for inputs, outputs in spec.linear_shapes("expert")) * spec.dtype_bytes
    assert len(units) <= EXPERT_UNITS
    for unit in units[:-1]:
        assert unit.disk_bytes > EXPERT_UNIT_BYTES - one, "another expert would still have been a small copy"


def test_the_steps_of_a_pass_compute_every_expert_once():
    spec = planned("mixtral")
    placed = place(Placement(0.0, 0.5, 0.5), spec=spec)
    account = memory_account(spec, Policy(), placed, 100, on_device=True)
    steps = build_scheduler(spec, placed, account, on_device=True).pass_steps(PassShape(0, 5, 1, (), False))
    computed = defaultdict(int)
    for step in steps:
        if step.kind is StepKind.EXPERTS:
            computed[step.layer] += placed.units[step.unit].experts
            assert placed.units[step.unit].layer == step.layer
    assert computed == dict.fromkeys(range(6), 8)
    flops = sum(step.flops for step in steps if step.kind is StepKind.EXPERTS)
    assert flops == 5 * 6 * spec.flops_per_token("experts")


@pytest.mark.parametrize("weights", [Placement(0.0, 0.0, 1.0), Placement(0.1, 0.3, 0.6)])
def test_tens_of_thousands_of_experts_are_placed_in_no_time(weights):
    spec = read_model_plan(known("deepseek-r1")).spec
    place(Placement(0.0, 0.5, 0.5), spec=spec)  # the tensors are laid out once a model
    started = time.process_time()
    placed = place(weights, spec=spec)
    layout_bytes = memory_account(spec, Policy(weights=weights), placed, 1000, on_device=True)
    assert time.process_time() - started < 0.5
    assert layout_bytes.total(Tier.DISK) > 600 * GIB
    assert sum(unit.experts for unit in placed.units) == 58 * 256


def test_the_first_placement_of_the_largest_model_takes_little_time():
    spec = read_model_plan(known("deepseek-r1")).spec
    started = time.process_time()
    placed = place_weights(spec, Policy(weights=Placement(0.0, 0.1, 0.9), weight_bits=8), on_device=False)
    assert time.process_time() - started < 1.5
    assert placed.stored_bytes < spec.weight_bytes * 0.6


def test_the_ring_holds_groups_not_whole_layers_of_huge_models():
    spec = read_model_plan(known("deepseek-r1")).spec
    placed = place(Placement(0.0, 0.0, 1.0), spec=spec)
    unit, layer = placed.max_unit_stream_bytes[0], placed.max_layer_stream_bytes[0]
    account = memory_account(spec, Policy(), placed, 1000, on_device=False)
    assert layer > 20 * GIB > 2 * GIB > unit
    assert 8 * unit <= account.host_ring_bytes < layer
