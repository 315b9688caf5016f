"""Weights take the room that all else leaves: fast tiers first, beside rings that can read ahead."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, MIB, planned

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.policy.fill import NoFit, fill_weights, refuse
from flexrun.policy.layout import Budgets, Layout
from flexrun.workload import Workload

SPEC = planned("llama", num_hidden_layers=16)  # 428 MiB
JOB = Workload.uniform(16, 60, 20)
POLICY = Policy(sequences_in_flight=8, attention_micro_batch=4, tokens_per_pass=200, kv=Placement(0.5, 0.5))


def fill(budgets: Budgets, policy: Policy = POLICY, **options) -> Layout | None:
    return fill_weights(SPEC, policy, JOB, budgets, **options)


def test_all_weights_go_to_a_gpu_that_holds_them():
    layout = fill(Budgets(GIB, GIB))
    assert layout.policy.weights == Placement(1.0, 0.0, 0.0)
    assert layout.account.device_ring_bytes == layout.account.host_ring_bytes == 0


def test_all_weights_go_to_ram_without_a_gpu():
    assert fill(Budgets(GIB)).policy.weights == Placement(0.0, 1.0, 0.0)


@pytest.mark.parametrize("least_rings", [False, True])
def test_what_the_gpu_leaves_goes_to_ram_and_the_rest_to_disk(least_rings):
    layout = fill(Budgets(220 * MIB, 220 * MIB), least_rings=least_rings)
    weights = layout.policy.weights
    assert min(weights.gpu, weights.cpu, weights.disk) > 0.05
    for tier in (Tier.GPU, Tier.CPU):
        assert layout.account.total(tier) > 0.93 * 220 * MIB, f"room is left on {tier}"
    assert fill(Budgets(GIB, 220 * MIB), least_rings=least_rings).policy.weights.disk == 0


def test_reading_ahead_comes_before_residence_unless_told_otherwise():
    budgets = Budgets(220 * MIB, 220 * MIB)
    whole, least = fill(budgets), fill(budgets, least_rings=True)
    account = whole.account
    assert (account.host_ring_bytes, account.device_ring_bytes) >= account.wanted_ring_bytes
    unit = least.placement.max_unit_stream_bytes
    assert unit[0] <= least.account.host_ring_bytes < account.host_ring_bytes
    assert unit[1] <= least.account.device_ring_bytes < account.device_ring_bytes
    assert least.policy.weights.gpu > whole.policy.weights.gpu + 0.05
    assert least.policy.weights.disk < whole.policy.weights.disk


def test_weights_that_are_given_are_kept_or_refused():
    policy = dataclasses.replace(POLICY, weights=Placement(0.25, 0.25, 0.5))
    assert fill(Budgets(GIB, GIB), policy, keep=True).policy == policy
    assert fill(Budgets(GIB, 60 * MIB), policy, keep=True) is None


def test_where_not_even_streaming_fits_there_is_nothing():
    assert fill(Budgets(20 * MIB)) is None
    assert fill(Budgets(GIB, 10 * MIB)) is None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(20, 600), st.one_of(st.just(0), st.integers(10, 600)), st.booleans())
def test_whatever_the_budgets_the_filled_layout_fits_and_little_room_is_left(cpu, gpu, least_rings):
    budgets = Budgets(cpu * MIB, gpu * MIB)
    layout = fill(budgets, least_rings=least_rings)
    if layout is None:
        assert not Layout.of(SPEC, dataclasses.replace(POLICY, weights=Placement(0, 0, 1)), JOB, budgets).fits
        return
    assert layout.fits
    changed = {field: getattr(layout.policy, field) for field in ("weights",)}
    assert dataclasses.replace(POLICY, **changed) == layout.policy, "only the weights are placed"
    weights = layout.policy.weights
    if weights.disk > 0.05 and weights.cpu > 0:
        spare = budgets.cpu_bytes - layout.account.total(Tier.CPU)
        assert spare < 30 * MIB, "a tenth more weights would have fitted in RAM"
    if gpu and weights.gpu < 0.95 and weights.gpu > 0:
        assert budgets.gpu_bytes - layout.account.total(Tier.GPU) < 30 * MIB


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(60, 500), st.integers(1, 100), st.sampled_from(["cpu_bytes", "gpu_bytes"]))
def test_more_memory_never_means_more_on_disk(size, more, name):
    budgets = Budgets(150 * MIB, 150 * MIB)
    less, larger = (dataclasses.replace(budgets, **{name: mib * MIB}) for mib in (size, size + more))
    before, after = fill(less), fill(larger)
    near = 0.02  # whole tensors
    if before is not None:
        assert after.policy.weights.disk <= before.policy.weights.disk + near
        if name == "gpu_bytes":
            assert after.policy.weights.gpu >= before.policy.weights.gpu - near


def test_refusing_names_the_first_tier_that_is_short():
    with pytest.raises(NoFit, match=r"gpu memory is short by .* even with every weight on disk") as refusal:
        refuse(SPEC, POLICY, JOB, Budgets(MIB, MIB))
    assert "raise --gpu-memory" in refusal.value.hint
    with pytest.raises(NoFit, match=r"cpu memory is short by .* and has 1.0 MiB"):
        refuse(SPEC, POLICY, JOB, Budgets(MIB, GIB))
    with pytest.raises(NoFit, match="no policy with the settings that were given fits"):
        refuse(SPEC, POLICY, JOB, Budgets(GIB, GIB))
