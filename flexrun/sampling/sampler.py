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


BROKEN = (
    "the model gave NaN or infinite logits",
    "float16 overflows: run it with --dtype bfloat16 or float32; where every prompt fails, check the checkpoint",
)
NONE_LEFT = ("penalties and min_tokens leave no possible token", "ask for less of them")


class UnusableLogits(ExecutionError):
    """Rows of a batch from which no token can be taken; the others can. ``reason``: the complaint without the rows."""

    def __init__(self, rows: list[int], reason: str, hint: str):
        named = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        super().__init__(f"cannot sample row {named}: {reason}", hint)
        self.rows, self.reason = rows, reason


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
    Raises UnusableLogits that names the rows whose logits are NaN, +inf or all -inf.
    """
    if logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(rows)} rows")
    highest, token_ids = logits.max(dim=-1)
    _require_finite(highest, range(len(rows)), BROKEN)
    sampled = Sampled(token_ids, [None] * len(rows), [None] * len(rows))
    special = [row for row, state in enumerate(rows) if _is_special(state)]
    chunk_rows = max(1, _scratch_elements(logits) // logits.shape[1])
    for start in range(0, len(special), chunk_rows):
        _sample_special(logits, rows, special[start : start + chunk_rows], sampled)
    return sampled


def _scratch_elements(logits: torch.Tensor) -> int:
    return HOST_SCRATCH_ELEMENTS if logits.device.type == "cpu" else GPU_SCRATCH_ELEMENTS


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
        _require_finite(highest, members, NONE_LEFT)
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
    widths = [states[position].params.logprobs for position in asking]
    for place, own, top in zip(asking, *logprobs_of(raw.index_select(0, position), chosen[position], widths)):
        sampled.logprobs[members[place]], sampled.top[members[place]] = own, top


@torch.inference_mode()
def score(
    logits: torch.Tensor, token_ids: torch.Tensor, widths: Sequence[int]
) -> tuple[list[TokenLogprob], list[list[TokenLogprob]]]:
    """Log-probabilities of given tokens, as ``logprobs_of``, in blocks that stay in the caches.

    Raises UnusableLogits where they are NaN or infinite.
    """
    _require_finite(logits.max(dim=-1).values, range(len(logits)), BROKEN)
    own: list[TokenLogprob] = []
    top: list[list[TokenLogprob]] = []
    rows = max(1, _scratch_elements(logits) // logits.shape[1])
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        for found, more in zip((own, top), logprobs_of(logits[block], token_ids[block], widths[block])):
            found += more
    return own, top


def logprobs_of(
    raw: torch.Tensor, token_ids: torch.Tensor, widths: Sequence[int]
) -> tuple[list[TokenLogprob], list[list[TokenLogprob]]]:
    """Of each row of logits, the entry of its token, and its ``widths`` likeliest (equals by lowest id).

    raw: float32 [rows, vocab]. token_ids: int64 [rows], on the same device.
    """
    token_ids = token_ids[:, None]
    chosen, total = raw.gather(1, token_ids), raw.logsumexp(dim=-1, keepdim=True)
    ranks = (raw > chosen).sum(dim=-1) + 1
    own = [
        TokenLogprob(*entry)
        for entry in zip(token_ids.squeeze(1).tolist(), (chosen - total).squeeze(1).tolist(), ranks.tolist())
    ]
    width = min(max(widths), raw.shape[1])
    if not width:
        return own, [[] for _ in own]
    top_ids = ranked(raw, width)
    table = zip(widths, top_ids.tolist(), (raw.gather(1, top_ids) - total).tolist())
    return own, [
        [TokenLogprob(*entry) for entry in zip(ids[:count], values, range(1, count + 1))]
        for count, ids, values in table
    ]


def _require_finite(highest: torch.Tensor, members: Sequence[int], complaint: tuple[str, str]):
    """The row maximum is NaN, inf or -inf exactly when the row cannot be sampled."""
    finite = highest.isfinite()
    if not finite.all():
        raise UnusableLogits([members[position] for position in (~finite).nonzero().squeeze(1).tolist()], *complaint)
