"""The draw itself: which tokens the filters keep, and the one that a uniform number picks.

The kept tokens are laid out by *token id* and the cumulative weight is inverted there. Laid out by probability, two
tokens whose probabilities differ by a rounding error could change places between two placements of the same model
and change the text; by id, a rounding error moves a boundary by a rounding error.

Every result is a function of its own row: only element-wise operations, exact ones (max, topk, sort, comparisons)
and cumulative sums along the row are used. ``torch.sum`` is not: it splits a lone row among threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexrun.sampling.params import SamplingParams


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token a row: temperature, then top_k, then top_p (of what top_k left), then min_p.

    logits: float32 [rows, vocab], finite or -inf (an impossible token), at least one finite a row; unchanged.
    uniforms: float64 [rows] in [0, 1). Returns int64 [rows].
    """
    vocab = logits.shape[1]
    temperature, top_p, min_p = (
        torch.tensor([getattr(row, name) for row in params], dtype=torch.float64, device=logits.device)[:, None]
        for name in ("temperature", "top_p", "min_p")
    )
    top_k = torch.tensor([row.top_k for row in params], device=logits.device)[:, None]
    groups: dict[str, list[int]] = {"top_k": [], "top_p": [], "rest": []}
    for row, row_params in enumerate(params):
        limited = 0 < row_params.top_k < vocab
        groups["top_k" if limited else "top_p" if row_params.top_p < 1.0 else "rest"].append(row)

    token_ids = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for group, members in groups.items():
        if not members:
            continue
        row = torch.tensor(members, device=logits.device)
        scaled = logits.index_select(0, row)
        scaled.sub_(scaled.amax(dim=-1, keepdim=True)).div_(temperature[row].float())
        if group == "top_k":
            token_ids[row] = _draw_top_k(scaled, top_k[row], top_p[row], min_p[row], uniforms[row])
        elif group == "top_p":
            token_ids[row] = _draw_nucleus(scaled, top_p[row], min_p[row], uniforms[row])
        else:
            weights = scaled.exp_()
            token_ids[row] = _pick(weights.masked_fill_(weights < min_p[row], 0.0), uniforms[row])
    return token_ids


def ranked(values: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [rows, count]: ids of the highest ``values`` [rows, vocab], highest first, equals by lowest id.

    ``torch.topk`` alone leaves the choice and the order of equals open. No NaN.
    """
    if count >= values.shape[1]:
        return torch.sort(values, dim=-1, descending=True, stable=True).indices
    top, ids = values.topk(count + 1)
    last = top[:, count - 1 : count]
    ids = ids[:, :count]
    tied = (top[:, count:] == last).squeeze(1)  # the cut falls among equals
    if tied.any():
        keep = _highest(values[tied], last[tied], torch.full_like(ids[tied, :1], count))
        ids[tied] = keep.nonzero()[:, 1].view(-1, count)
    ids = ids.sort(dim=-1).values
    order = torch.sort(values.gather(1, ids), dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _highest(values: torch.Tensor, last: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool [rows, vocab]: the ``count`` [rows, 1] highest values, the lowest of which is ``last`` [rows, 1]."""
    keep = values >= last
    tied = (keep.sum(dim=-1, keepdim=True) > count).squeeze(1)
    if tied.any():  # more values equal the last one than there is room for: the lowest ids stay
        above, equal = values[tied] > last[tied], values[tied] == last[tied]
        room = count[tied] - above.sum(dim=-1, keepdim=True)
        keep[tied] = above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))
    return keep


def _draw_nucleus(scaled: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor):
    """Draw from the likeliest tokens of the whole vocabulary whose weight reaches top_p of the total."""
    values = _descending(scaled)
    reached = values.exp().cumsum(dim=-1, dtype=torch.float64)
    count = 1 + (reached[:, :-1] < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True)
    keep = _highest(scaled, values.gather(1, count - 1), count)
    weights = scaled.exp_()
    return _pick(weights.masked_fill_(~keep | (weights < min_p), 0.0), uniform)


def _draw_top_k(scaled: torch.Tensor, top_k: torch.Tensor, top_p, min_p, uniform) -> torch.Tensor:
    """Draw from the top_k (int64 [rows, 1]) likeliest tokens; top_p is a share of their weight."""
    width = int(top_k.max())
    ids = ranked(scaled, width)
    weights = scaled.gather(1, ids).exp_()
    weights.masked_fill_(torch.arange(width, device=scaled.device) >= top_k, 0.0)
    reached = weights.cumsum(dim=-1, dtype=torch.float64)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    weights.masked_fill_((before >= top_p * reached[:, -1:]) | (weights < min_p), 0.0)
    ids, order = ids.sort(dim=-1)
    position = _pick(weights.gather(1, order), uniform)
    return ids.gather(1, position[:, None]).squeeze(1)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Rows sorted, highest first. On the host NumPy's vector sort is some 20 times faster than torch's."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    negated = values.neg().numpy()
    negated.sort(axis=-1)
    return torch.from_numpy(negated).neg_()


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First position of each row whose cumulative weight exceeds uniform × total; its weight is not zero.

    float64, so that neither the length of the row nor the device's order of summation shows in the result.
    """
    reached = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True).squeeze(1)
