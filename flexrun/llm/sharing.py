"""Order and shared prefixes of requests that are all at hand, and whether the engine at hand has room for a job's."""

from __future__ import annotations

import dataclasses

import numpy

from flexrun.llm.intake import Intake
from flexrun.offload.engine import Engine
from flexrun.outputs import Request
from flexrun.placement import in_whole_groups, why_not_shared
from flexrun.prefixes import ROOT, Prefixes, PrefixTree, shareable_tokens
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload, longest_answers_first

REOPEN_SHARE = 0.75  # of the prompt tokens of a job: an engine without room for its prefixes is opened anew for less


def longest_first(requests: list[Request], intake: Intake) -> list[Request]:
    """Requests in the order to run, encoded; those that will be refused keep what they came with."""
    encoded = [intake.lengths(request) for request in requests]
    prompts = numpy.array([len(ids or ()) for ids, _ in encoded], dtype=numpy.int64)
    totals = numpy.array([total for _, total in encoded], dtype=numpy.int64)
    order = longest_answers_first(prompts, totals - prompts)
    ordered = [(requests[row], encoded[row][0]) for row in order.tolist()]
    return [dataclasses.replace(request, token_ids=ids) if ids else request for request, ids in ordered]


def arranged(requests: list[Request], intake: Intake, *, shares: bool, unit: int) -> tuple[list[Request], Workload]:
    """The requests (encoded, those that will be refused with no token ids) in the order to run, each naming its prefix;
    and the workload of them, with the prefixes that they name. shares: whether to look for any, of whole units."""
    if not shares:
        return requests, intake.workload(requests)
    tree, nodes = PrefixTree(unit=unit), []
    for request in requests:
        params, ids = request.params or SamplingParams(), request.token_ids
        if not ids:
            nodes.append(ROOT)
            continue
        scored = None if params.prompt_logprobs is None else request.score_start or 1
        most = shareable_tokens(len(ids), intake.lengths(request)[1] - len(ids), scored)
        nodes.append(tree.add(ids[:most], params.n))
    prefixes, prefix_of = tree.chosen()
    chosen = prefix_of[nodes]
    order = prefixes.order(chosen)
    ordered = [dataclasses.replace(requests[row], prefix=int(chosen[row])) for row in order]
    return ordered, intake.workload(ordered, prefixes)


def serves(engine: Engine, workload: Workload, planned_rows: int) -> bool:
    """Whether an engine has the slots and the room that a workload can use. planned_rows: of the one it was for."""
    slots = engine.policy.sequences_in_flight
    if workload.prefix_tokens_of(slots) > engine.prefix_tokens:
        spared = workload.prefill_tokens < REOPEN_SHARE * int(workload.prompt_tokens.sum())
        if spared and why_not_shared(engine.spec, engine.policy, on_device=engine.on_device) is None:
            return False
        workload = workload.apart()
    slots_suffice = len(workload) <= slots or planned_rows > slots  # more rows would not have had more slots
    longest_fits = engine.kv.largest_sequence_tokens >= workload.longest_tokens
    return slots_suffice and longest_fits and engine.kv_tokens >= workload.kv_tokens_of(slots)


def prefixes_at_hand(engine: Engine, workload: Workload | None) -> Prefixes:
    """Those of a workload, where an engine has room for them; else none."""
    if workload is None or workload.prefix_tokens_of(engine.policy.sequences_in_flight) > engine.prefix_tokens:
        return Prefixes()
    if not in_whole_groups(engine.policy, workload.prefixes):
        return Prefixes()
    return workload.prefixes
