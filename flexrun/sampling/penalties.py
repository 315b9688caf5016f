"""Penalties on tokens already said, as one scatter over the rows that use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def apply_penalties(logits: torch.Tensor, states: Sequence) -> None:
    """Change ``logits`` float32 [rows, vocab] in place by each ``SamplerRow``'s penalties.

    Repetition (Keskar et al. 2019) looks at prompt and output: positive logits are divided by it, negative ones
    multiplied. Then frequency × count and presence are subtracted, counted over the output alone (OpenAI's formula).
    The cost is in proportion to the ids of the rows that have penalties, whatever the vocabulary.
    """
    repeating = [row for row, state in enumerate(states) if state.params.repetition_penalty != 1.0]
    if repeating:
        spoken = [np.concatenate([_ids(states[row].prompt_ids), _ids(states[row].output_ids)]) for row in repeating]
        row, token = _pairs(repeating, spoken)
        factors = [states[row].params.repetition_penalty for row in repeating]
        factor = torch.from_numpy(np.repeat(np.array(factors, np.float32), [len(ids) for ids in spoken]))
        row, token, factor = row.to(logits.device), token.to(logits.device), factor.to(logits.device)
        before = logits[row, token]
        # An id that occurs twice is written twice with the same value, so no deduplication is needed.
        logits[row, token] = torch.where(before > 0, before / factor, before * factor)

    counting = [
        row
        for row, state in enumerate(states)
        if (state.params.presence_penalty or state.params.frequency_penalty) and len(state.output_ids)
    ]
    if counting:
        counted = [np.unique(_ids(states[row].output_ids), return_counts=True) for row in counting]
        row, token = _pairs(counting, [ids for ids, _ in counted])
        charges = [
            states[row].params.frequency_penalty * counts + states[row].params.presence_penalty
            for row, (_, counts) in zip(counting, counted)
        ]
        charge = torch.from_numpy(np.concatenate(charges).astype(np.float32))
        row, token, charge = row.to(logits.device), token.to(logits.device), charge.to(logits.device)
        logits[row, token] = logits[row, token] - charge


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def _pairs(rows: Sequence[int], ids: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int64 [pairs] index tensors: each row number beside each of its ids."""
    row = np.repeat(np.array(rows, np.int64), [len(row_ids) for row_ids in ids])
    return torch.from_numpy(row), torch.from_numpy(np.concatenate(ids))
