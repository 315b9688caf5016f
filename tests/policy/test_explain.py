"""What a plan says: every byte, every lane, the budgets, what more memory would bring; as a page and as JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from planned_models import GIB, LAPTOP, MIB, T4, planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier, format_bytes
from flexrun.policy.explain import forecast_document, forecast_line, format_plan, format_seconds, plan_document
from flexrun.policy.features import PLANNABLE
from flexrun.policy.forecast import Forecast, forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.search import Plan, search
from flexrun.workload import Workload

JOB = Workload.uniform(32, 100, 20)
SPEC = planned("llama", num_hidden_layers=12)


@pytest.fixture(scope="module")
def streaming() -> Plan:
    """Weights on all three tiers, KV in RAM."""
    return search(SPEC, T4, JOB, Budgets(250 * MIB, 120 * MIB, 10 * GIB), fixed={"kv": Placement(0.0, 1.0)})


@pytest.fixture(scope="module")
def in_ram() -> Plan:
    return search(SPEC, LAPTOP, JOB, Budgets(2 * GIB))


def rows_of(text: str) -> dict[str, list[str]]:
    """The table of bytes: kind -> what is told of each tier."""
    lines = text.split("\n\n")[0].splitlines()
    return {line[:16].strip(): [line[16 + 14 * at : 30 + 14 * at].strip() for at in range(3)] for line in lines}


def test_every_kind_of_bytes_is_told_for_each_tier(streaming):
    rows = rows_of(format_plan(streaming))
    account = streaming.layout.account
    assert rows["bytes"] == ["gpu", "cpu", "disk"]
    kinds = {kind for sizes in account.bytes_by_kind.values() for kind, size in sizes.items() if size}
    assert set(rows) == {"bytes", "total", "budget", *(kind.replace("_", " ") for kind in kinds)}
    for place, tier in enumerate(Tier):
        for kind in kinds:
            size = account.bytes_by_kind[tier].get(kind, 0)
            assert rows[kind.replace("_", " ")][place] == (format_bytes(size) if size else "-")
        assert rows["total"][place] == format_bytes(account.total(tier))
    assert rows["budget"] == ["120.0 MiB", "250.0 MiB", "10.0 GiB"]


def test_without_a_gpu_nothing_is_said_of_one(in_ram):
    text = format_plan(in_ram)
    assert rows_of(text)["bytes"][:2] == ["cpu", "disk"]
    assert rows_of(text)["budget"][:2] == ["2.0 GiB", "-"], "an unlimited disk"
    assert "GPU" not in text
    assert "weights 100% in RAM" in text


def test_the_page_names_policy_forecast_lanes_and_memory(streaming):
    text = format_plan(streaming)
    policy, told = streaming.policy, streaming.forecast
    assert f"{policy.sequences_in_flight} sequences in flight" in text
    assert f"passes of up to {policy.tokens_per_pass:,} tokens" in text
    assert f"{policy.weights.gpu:.0%} on the GPU, {policy.weights.cpu:.0%} in RAM" in text
    assert "KV 100% in RAM" in text
    assert "of the KV off the GPU attended on the CPU" in text
    assert f"{told.generated_tokens_per_second:,.2f} generated tokens/s" in text
    assert f"{told.prompt_tokens / told.prefill_seconds:,.1f} prompt tokens/s" in text
    lines = {line[13:].strip() for line in text.splitlines()}
    for lane, words in {Lane.GPU: "GPU compute", Lane.H2D: "copies to the GPU", Lane.DISK_READ: "disk reads"}.items():
        assert f"{words:<20} {told.utilisation(lane):>4.0%}" in lines
    assert f"{format_seconds(told.bound_seconds)} without any waiting" in text
    assert "8.0 GiB more GPU memory: +" in text
    assert "8.0 GiB more RAM:" in text


def test_what_only_can_be_planned_is_said():
    disk = search(SPEC, LAPTOP, JOB, Budgets(2 * GIB), fixed={"kv": Placement(0.0, 0.5, 0.5)}, features=PLANNABLE)
    assert "KV 50% in RAM, 50% on disk" in format_plan(disk)
    split = {"kv": Placement(0.0, 1.0), "cpu_attention_share": 1.0, "kv_device_tokens_share": 0.25}
    split |= {"sequences_in_flight": 8, "attention_micro_batch": 4, "tokens_per_pass": 512, "half_batches": False}
    text = format_plan(search(SPEC, T4, JOB, Budgets(2 * GIB, 120 * MIB), fixed=split))
    assert "attended on the CPU; of which the newest 25% of each sequence on the GPU" in text
    fewer = search(SPEC, LAPTOP, JOB, Budgets(2 * GIB), fixed={"weight_bits": 4})
    assert "weights in 4 bits, KV in 16 bits" in format_plan(fewer)


def test_a_plan_is_a_json_document(streaming, in_ram):
    for plan in (streaming, in_ram):
        document = json.loads(json.dumps(plan_document(plan)))
        assert (
            Policy(
                **{
                    name: Placement(**value) if isinstance(value, dict) else value
                    for name, value in document["policy"].items()
                }
            )
            == plan.policy
        )
        told = document["forecast"]
        assert told["seconds"] == plan.forecast.seconds
        assert told["prefill_seconds"] + told["decode_seconds"] == pytest.approx(told["seconds"])
        assert told["lanes"][told["binding_lane"]]["seconds"] == told["bound_seconds"] == plan.forecast.bound_seconds
        assert document["bytes"]["disk"]["weights"] == plan.layout.placement.stored_bytes
        assert document["kv_room_tokens"] == plan.layout.kv_tokens
        assert document["model"]["weight_bytes"] == SPEC.weight_bytes
        assert document["search"]["programs"] == plan.programs > 0
        assert document["search"]["simulations"] == plan.simulations > 0
    assert document["budgets"] == {"cpu_bytes": 2 * GIB, "gpu_bytes": 0, "disk_bytes": None}
    prices = plan_document(streaming)["shadow_prices_seconds_per_byte"]
    assert set(prices) == {"gpu", "cpu", "disk"}
    assert prices["gpu"] >= 0
    assert plan_document(streaming)["gains"]["gpu"] == {
        "more_bytes": 8 * GIB,
        "throughput": streaming.gains[Tier.GPU],
    }


def test_a_plan_without_a_search_is_told_too():
    policy = Policy(sequences_in_flight=8, tokens_per_pass=256)
    layout = Layout.of(SPEC, policy, JOB, Budgets(2 * GIB))
    plan = Plan(policy, layout, forecast(layout, JOB, LAPTOP))
    document = json.loads(json.dumps(plan_document(plan)))
    assert (document["gains"], document["shadow_prices_seconds_per_byte"]) == ({}, {})
    assert "more memory" not in format_plan(plan)


def test_one_line_before_a_run(streaming):
    line = forecast_line(streaming.layout, streaming.forecast)
    assert "\n" not in line
    assert line.startswith(f"plan: {streaming.policy.sequences_in_flight} sequences in flight")
    assert f"forecast {streaming.forecast.generated_tokens_per_second:,.1f} tokens/s" in line
    assert "busiest)" in line


def test_a_forecast_of_nothing_divides_by_nothing():
    empty = Forecast(0.0, 0.0, 0.0, 0, 0, 0, dict.fromkeys(Lane, 0.0))
    document = json.loads(json.dumps(forecast_document(empty)))
    assert document["generated_tokens_per_second"] == document["lanes"]["cpu"]["utilisation"] == 0.0
    layout = Layout.of(SPEC, Policy(kv_tokens=4), JOB, Budgets(2 * GIB))
    plan = Plan(layout.policy, layout, empty)
    assert "0.00 generated tokens/s" in format_plan(plan)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (1.26, "1.3 s"),
        (119.94, "119.9 s"),
        (120, "2 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (5403, "1 h 30 min"),
        (86_399, "1 d 0 h"),
        (3 * 86_400 + 7 * 3600 + 100, "3 d 7 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert format_seconds(seconds) == text


def test_gains_too_small_to_matter_are_no_gains(streaming):
    plan = dataclasses.replace(streaming, gains={Tier.GPU: 0.31, Tier.CPU: 0.004})
    text = format_plan(plan)
    assert "8.0 GiB more GPU memory: +31%" in text
    assert "8.0 GiB more RAM: no faster" in text
