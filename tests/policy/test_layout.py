"""A layout is a policy in bytes: its account is the executor's own, and it says what exceeds which budget."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, MIB, planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError
from flexrun.placement import kv_bytes_per_token, kv_micro_batches, memory_account, place_weights
from flexrun.policy.layout import Budgets, Layout, room_for
from flexrun.workload import Workload

JOB = Workload.of([100, 30, 80, 55], [10, 40, 1, 20])
POLICY = Policy(sequences_in_flight=4, attention_micro_batch=2, tokens_per_pass=128, weights=Placement(0.0, 0.5, 0.5))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(["llama", "gqa", "windows", "mixtral", "deepseek"]),
    st.booleans(),
    st.sampled_from([Placement(0, 1, 0), Placement(0, 0.5, 0.5), Placement(0, 0, 1)]),
    st.sampled_from([Placement(0, 1, 0), Placement(0, 0.5, 0.5)]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(10, 400),
)
def test_the_account_of_a_layout_is_the_memory_account(name, on_device, weights, kv, sequences, micro_batch, mib):
    spec = planned(name)
    policy = Policy(
        sequences_in_flight=sequences, attention_micro_batch=micro_batch, tokens_per_pass=64, weights=weights, kv=kv
    )
    budgets = Budgets(mib * MIB, mib * MIB if on_device else 0)
    layout = Layout.of(spec, policy, JOB, budgets)
    expected = memory_account(
        spec,
        policy,
        place_weights(spec, policy, on_device=on_device),
        layout.kv_tokens,
        on_device=on_device,
        cpu_budget_bytes=mib * MIB,
        gpu_budget_bytes=mib * MIB if on_device else None,
    )
    assert layout.account == expected
    assert layout.micro_batches == kv_micro_batches(policy, layout.kv_tokens, on_device=on_device)
    assert layout.fits == all(expected.total(tier) <= mib * MIB for tier in ((Tier.CPU, Tier.GPU)[: 1 + on_device]))


def test_room_is_for_the_longest_sequences_and_each_slab_for_the_longest():
    needs = sorted((109, 69, 80, 74), reverse=True)
    assert room_for(POLICY, JOB) == sum(needs) + 109
    one_slab = dataclasses.replace(POLICY, attention_micro_batch=4)
    assert room_for(one_slab, JOB) == sum(needs)
    two = dataclasses.replace(POLICY, sequences_in_flight=2)
    assert room_for(two, JOB) == 109 + 80
    layout = Layout.of(planned("llama"), dataclasses.replace(POLICY, kv_tokens=77), JOB, Budgets(GIB))
    assert layout.kv_tokens == 77, "a policy may say how much"


def test_what_exceeds_a_budget_is_told_for_each_tier():
    spec = planned("llama")
    roomy = Layout.of(spec, POLICY, JOB, Budgets(GIB, GIB, GIB))
    assert roomy.fits
    roomy.check()
    sizes = {tier: roomy.account.total(tier) for tier in Tier}
    budgets = Budgets(sizes[Tier.CPU] - 5 * MIB, sizes[Tier.GPU], sizes[Tier.DISK] - MIB)
    tight = Layout.of(spec, POLICY, JOB, budgets)
    assert not tight.fits
    assert tight.excess_bytes(Tier.DISK) == MIB
    assert tight.excess_bytes(Tier.GPU) == 0
    # the ring gives what it can before the budget is exceeded
    assert 0 <= tight.excess_bytes(Tier.CPU) < 5 * MIB


def test_budgets_that_are_not_given_are_not_exceeded():
    layout = Layout.of(planned("llama"), POLICY, JOB, Budgets(GIB))
    assert layout.excess_bytes(Tier.DISK) == layout.excess_bytes(Tier.GPU) == 0
    assert not layout.on_device
    assert layout.budgets.of(Tier.DISK) is None


@pytest.mark.parametrize(
    "budgets, tier", [(Budgets(20 * MIB), "cpu"), (Budgets(GIB, 20 * MIB), "gpu"), (Budgets(GIB, 0, 20 * MIB), "disk")]
)
def test_the_complaint_names_the_tier_its_parts_and_the_budget(budgets, tier):
    policy = dataclasses.replace(POLICY, tokens_per_pass=2048)
    with pytest.raises(BudgetError, match=rf"the policy needs .* of {tier} memory .*weights .*20.0 MiB") as refusal:
        Layout.of(planned("llama"), policy, JOB, budgets).check()
    assert "--policy auto" in refusal.value.hint


def test_weights_on_a_gpu_need_one():
    with pytest.raises(BudgetError, match="on a GPU"):
        Layout.of(planned("llama"), dataclasses.replace(POLICY, weights=Placement(1.0, 0.0)), JOB, Budgets(GIB))


def test_kv_on_disk_counts_there_and_its_staging_in_ram():
    spec = planned("llama")
    policy = dataclasses.replace(POLICY, kv=Placement(0.0, 0.5, 0.5))
    layout = Layout.of(spec, policy, JOB, Budgets(GIB))
    ram, disk = layout.account.bytes_by_kind[Tier.CPU], layout.account.bytes_by_kind[Tier.DISK]
    slab = layout.micro_batches[0].capacity_tokens * kv_bytes_per_token(spec)
    assert ram["kv"] == pytest.approx(slab, abs=4096)
    assert disk["kv"] == pytest.approx(slab, abs=4096)
    assert ram["kv_staging"] == pytest.approx(4 * slab / spec.num_layers, abs=4 * 4096)
    assert [place.home for place in layout.micro_batches] == [Tier.CPU, Tier.DISK]


@pytest.mark.parametrize("name", ["llama", "windows", "deepseek"])
@pytest.mark.parametrize("layers", [1, 3, 6])
def test_a_shallow_layout_is_that_of_the_last_layers(name, layers):
    spec = planned(name)
    policy = dataclasses.replace(POLICY, weights=Placement(0.25, 0.25, 0.5))
    whole = Layout.of(spec, policy, JOB, Budgets(GIB, GIB))
    few = whole.shallow(layers)
    assert few.spec.num_layers == layers
    assert few.spec.layer_windows == spec.layer_windows[-layers:]
    assert few.spec.sparse_layers == spec.sparse_layers[len(spec.sparse_layers) and -layers :]
    assert {unit.layer for unit in few.placement.units} == set(range(layers + 1)), "the head follows the last layer"
    assert few.micro_batches == whole.micro_batches
    assert few.budgets == whole.budgets
    largest = few.placement.max_unit_stream_bytes
    assert few.account.host_ring_bytes >= largest[0]
    assert few.account.device_ring_bytes >= largest[1]


def test_micro_batches_attend_where_the_policy_says():
    policy = dataclasses.replace(POLICY, attention_micro_batch=1, kv=Placement(0.25, 0.75), cpu_attention_share=0.67)
    layout = Layout.of(planned("llama"), policy, JOB, Budgets(GIB, GIB))
    lanes = [(place.home, place.attend_lane) for place in layout.micro_batches]
    assert lanes == [
        (Tier.GPU, Lane.GPU),
        (Tier.CPU, Lane.CPU),
        (Tier.CPU, Lane.CPU),
        (Tier.CPU, Lane.GPU),
    ]
