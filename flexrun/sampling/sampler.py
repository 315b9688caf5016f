"""One call that turns the logits of a batch into tokens, each row by its own request's rules and seed.

Order of operations: min_tokens mask and penalties → temperature → top_k → top_p → min_p → draw. Log-probabilities
are those of the model's own logits, before all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexrun.errors import ExecutionError
from flexrun.sampling.draw import draw, ranked
from flexrun.sampling.params import SamplingParams
from flexrun.sampling.penalties import apply_penalties
from flexrun.sampling.seeds import uniforms

# Rows × vocab worked on at once, beyond plain greedy rows. A few MB on the host, to stay in its caches; on a GPU
# as much as keeps it busy. Rows are independent, so the size never shows in the tokens.
HOST_SCRATCH_ELEMENTS = 1 << 19
GPU_SCRATCH_ELEMENTS = 1 << 23


@dataclass(slots=True)
class SamplerRow:
    """The part of a sequence that its next token depends on, beside the logits.

    seed: resolved (``resolve_seed``). choice_index: which of the request's n texts. step: tokens generated so far.
    prompt_ids, output_ids: read only when the row has penalties; int64 NumPy arrays or ``array("q")`` are read
    without a copy, lists are copied at every step. stop_ids: end-of-sequence and stop tokens, impossible while
    step < min_tokens.
    """

    params: SamplingParams
    seed: int = 0
    choice_index: int = 0
    step: int = 0
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    stop_ids: Sequence[int] = ()

    @property
    def masked(self) -> bool:
        return self.step < self.params.min_tokens and len(self.stop_ids) > 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the raw logits; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int


@dataclass
class Sampled:
    """Tokens of one step. token_ids: int64 [rows], on the device of the logits.

    logprobs: for each row, None where it asked for none, else the chosen token's entry.
    top: for each row, None where it asked for none, else its ``params.logprobs`` likeliest, likeliest first
    (equals by lowest id).
    """

    token_ids: torch.Tensor
    logprobs: list[TokenLogprob | None]
    top: list[list[TokenLogprob] | None]


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> Sampled:
    """Choose the next token of every row. logits: float32 [rows, vocab], left unchanged; -inf is an impossible token.

    Greedy rows without penalties or log-probabilities cost one max over the batch; equals go to the lowest id.
    Raises ExecutionError that names the rows whose logits are NaN, +inf or all -inf.
    """
    if logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows")
    highest, token_ids = logits.max(dim=-1)
    _require_finite(highest, range(len(rows)), "the model gave NaN or infinite logits")
    sampled = Sampled(token_ids, [None] * len(rows), [None] * len(rows))
    special = [row for row, state in enumerate(rows) if _is_special(state)]
    scratch_elements = HOST_SCRATCH_ELEMENTS if logits.device.type == "cpu" else GPU_SCRATCH_ELEMENTS
    chunk_rows = max(1, scratch_elements // logits.shape[1])
    for start in range(0, len(special), chunk_rows):
        _sample_special(logits, rows, special[start : start + chunk_rows], sampled)
    return sampled


def _is_special(row: SamplerRow) -> bool:
    params = row.params
    return not params.greedy or params.logprobs is not None or params.penalised or row.masked


def _sample_special(logits: torch.Tensor, rows: Sequence[SamplerRow], members: list[int], sampled: Sampled):
    """Settle the rows ``members`` of a batch: everything that a plain max does not."""
    states = [rows[member] for member in members]
    index = torch.tensor(members, device=logits.device)
    raw = logits.index_select(0, index)
    adjusted, chosen = raw, sampled.token_ids[index]
    if any(state.params.penalised or state.masked for state in states):
        adjusted = raw.clone()
        apply_penalties(adjusted, states)
        _mask_stops(adjusted, states)
        highest, chosen = adjusted.max(dim=-1)
        _require_finite(highest, members, "penalties and min_tokens leave no possible token")
    random = [position for position, state in enumerate(states) if not state.params.greedy]
    if random:
        drawing = [states[position] for position in random]
        numbers = uniforms(
            [state.seed for state in drawing],
            [state.choice_index for state in drawing],
            [state.step for state in drawing],
        )
        position = torch.tensor(random, device=logits.device)
        chosen[position] = draw(
            adjusted.index_select(0, position),
            [state.params for state in drawing],
            torch.from_numpy(numbers).to(logits.device),
        )
    sampled.token_ids[index] = chosen
    _report_logprobs(raw, states, members, chosen, sampled)


def _mask_stops(logits: torch.Tensor, states: Sequence[SamplerRow]):
    pairs = [(row, token) for row, state in enumerate(states) if state.masked for token in state.stop_ids]
    if pairs:
        index = torch.tensor(pairs, device=logits.device)
        logits[index[:, 0], index[:, 1]] = -torch.inf


def _report_logprobs(raw, states, members, chosen, sampled):
    """Fill in the log-probabilities of the rows that asked for them."""
    asking = [position for position, state in enumerate(states) if state.params.logprobs is not None]
    if not asking:
        return
    position = torch.tensor(asking, device=raw.device)
    raw, chosen = raw.index_select(0, position), chosen[position][:, None]
    logprobs = raw.log_softmax(dim=-1)
    ranks = (raw > raw.gather(1, chosen)).sum(dim=-1) + 1
    width = min(max(states[position].params.logprobs for position in asking), raw.shape[1])
    top_ids = ranked(raw, width) if width else chosen[:, :0]
    table = zip(
        asking,
        chosen.squeeze(1).tolist(),
        logprobs.gather(1, chosen).squeeze(1).tolist(),
        ranks.tolist(),
        top_ids.tolist(),
        logprobs.gather(1, top_ids).tolist(),
    )
    for position, token_id, logprob, rank, ids, values in table:
        count = states[position].params.logprobs
        sampled.logprobs[members[position]] = TokenLogprob(token_id, logprob, rank)
        sampled.top[members[position]] = [
            TokenLogprob(top_id, value, place + 1)
            for place, (top_id, value) in enumerate(zip(ids[:count], values[:count]))
        ]


def _require_finite(highest: torch.Tensor, members: Sequence[int], complaint: str):
    """The row maximum is NaN, inf or -inf exactly when the row cannot be sampled."""
    finite = highest.isfinite()
    if not finite.all():
        rows = [members[position] for position in (~finite).nonzero().squeeze(1).tolist()]
        named = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ExecutionError(
            f"cannot sample row {named}: {complaint}",
            "if it happens at the first step, check the checkpoint and the dtype (float16 overflows; try bfloat16)",
        )
