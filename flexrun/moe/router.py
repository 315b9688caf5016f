"""Turns a router's logits into the experts of each token and their weights, by the rule of the model's family.

Weights are float32 throughout, also where a family's own code rounds them to the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexrun.models.routing import RoutingRule


def route(rule: RoutingRule, logits: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> experts of each token [T, k] int64, all different, and their weights [T, k] float32.

    correction: [E] float32, added to the scores for choosing, not for weighing (DeepSeek-V3, arXiv 2408.15664).
    """
    if rule.score == "sparsemixer":
        return _sparsemixer(rule, logits)
    logits = logits.float()
    if rule.score == "chosen_softmax":
        highest, experts = logits.topk(rule.experts_per_token, dim=-1)
        return experts, highest.softmax(dim=-1)
    scores = logits.softmax(dim=-1) if rule.score == "softmax" else logits.sigmoid()
    ranks = scores if correction is None else scores + correction
    if rule.groups > rule.groups_kept:
        ranks = _limit_groups(rule, ranks)
    experts = ranks.topk(rule.experts_per_token, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.renormalise:
        weights /= weights.sum(dim=-1, keepdim=True) + rule.epsilon
    if rule.scaling_factor != 1.0:
        weights *= rule.scaling_factor
    return experts, weights


def _limit_groups(rule: RoutingRule, ranks: Tensor) -> Tensor:
    """ranks [T, E] with -inf in all groups but the best ones."""
    in_groups = ranks.unflatten(-1, (rule.groups, -1))
    if rule.group_score == "max":
        of_groups = in_groups.amax(dim=-1)
    else:
        of_groups = in_groups.topk(2, dim=-1).values.sum(dim=-1)
    kept = of_groups.topk(rule.groups_kept, dim=-1).indices
    left_out = torch.ones_like(of_groups, dtype=torch.bool).scatter_(-1, kept, False)
    return in_groups.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(-2)


def _sparsemixer(rule: RoutingRule, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which logits are near the highest is decided in their own dtype: an expert more or less changes the weights."""
    experts, weights, left = [], [], logits
    for _ in range(rule.experts_per_token):
        highest, chosen = left.max(dim=-1, keepdim=True)
        distances = (highest - logits) / logits.abs().clamp(min=highest)
        near = left.masked_fill(distances > 2 * rule.near, float("-inf"))
        experts.append(chosen)
        weights.append(near.float().softmax(dim=-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, float("-inf"))
    return torch.cat(experts, dim=-1), torch.cat(weights, dim=-1)
