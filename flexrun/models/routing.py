"""How sparse layers send tokens to experts, as data, and what a config.json says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.family import Family, From

SCORES = ("softmax", "sigmoid", "chosen_softmax", "sparsemixer")


@dataclass(frozen=True)
class RoutingRule:
    """How logits become experts and their weights; moe.router.route computes it, in float32.

    score: ``softmax`` or ``sigmoid`` over all experts; ``chosen_softmax``: the highest logits are chosen, and the
    softmax is over these alone (gpt-oss, Granite); ``sparsemixer``: each expert in turn is weighed against those not
    yet chosen whose logits are near its own (Phi-3.5-MoE, arXiv 2409.12136, without its sampling).
    float32_logits: the logits too are computed in float32, whatever the model's dtype.
    groups: experts stand in so many groups of equal size, and only the ``groups_kept`` best ones are chosen from. A
    group is as good as its ``group_score``: ``max`` or ``top2_sum``.
    renormalise: weights are divided by their sum plus ``epsilon``. scaling_factor: of the weights, at the end.
    near: sparsemixer's relative distance.
    """

    experts_per_token: int
    score: str = "softmax"
    float32_logits: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    renormalise: bool = False
    epsilon: float = 0.0
    scaling_factor: float = 1.0
    near: float = 0.0


@dataclass(frozen=True)
class Experts:
    """The routed experts of a sparse layer. ``shared_intermediate_size``: all shared experts together, 0: none.

    gate_limit: where not 0, experts compute ``(up + 1) * gate * sigmoid(gate_slope * gate)`` with the gate cut off
    above the limit and ``up`` on both sides (gpt-oss), whatever the model's activation.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    routing: RoutingRule | None = None
    gate_limit: float = 0.0
    gate_slope: float = 0.0


def read_experts(
    family: Family, settings: Mapping, size: Callable[[str], int], num_layers: int
) -> tuple[Experts | None, tuple[bool, ...]]:
    """The routed experts and, one a layer, whether the layer has them; (None, ()) where no layer does."""
    keys = family.experts
    if keys is None:
        return None, ()
    number_key = next((key for key in keys.num_experts if settings.get(key) is not None), keys.num_experts[0])
    num_experts, per_token, inner = size(number_key), size(keys.experts_per_token), size(keys.intermediate_size)
    if per_token > num_experts:
        raise ConfigError(f"{keys.experts_per_token}={per_token} is more than {number_key}={num_experts}")
    shared = 0
    if keys.shared_intermediate_size is not None:
        shared = size(keys.shared_intermediate_size)
    elif keys.num_shared_experts is not None and settings.get(keys.num_shared_experts):
        shared = inner * size(keys.num_shared_experts)
    sparse = tuple(_is_sparse(keys.layers, settings, size, layer) for layer in range(num_layers))
    if not any(sparse):
        return None, ()
    routing = _routing(family, settings, num_experts, per_token)
    limits = {name: float(settings[key]) for name, key in keys.gate_limits.items()}
    return Experts(num_experts, per_token, inner, shared, routing, **limits), sparse


def _routing(family: Family, settings: Mapping, num_experts: int, per_token: int) -> RoutingRule:
    for key, runs in family.experts.routing_options.items():
        given = settings.get(key)
        if given is not None and given not in runs:
            known = ", ".join(map(str, runs))
            raise UnsupportedError(f"config option {key}={given!r} in {family.architecture}", f"what runs: {known}")
    values = {}
    for name, setting in family.experts.routing.items():
        value = settings.get(setting.key) if isinstance(setting, From) else setting
        if value is not None:
            values[name] = value
    if settings.get("topk_method") == "greedy":
        values |= {"groups": 1, "groups_kept": 1}
    for name, kind in (("groups", int), ("groups_kept", int), ("scaling_factor", (int, float)), ("near", (int, float))):
        if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
            raise ConfigError(f"the model's config.json gives {family.experts.routing[name].key}={values[name]!r}")
    if "renormalise" in values:
        values["renormalise"] = bool(values["renormalise"])
    rule = RoutingRule(per_token, **values)
    in_group = num_experts // max(rule.groups, 1)
    if rule.groups < 1 or num_experts % rule.groups or (rule.groups > 1 and rule.group_score != "max" and in_group < 2):
        raise ConfigError(f"{num_experts} experts cannot stand in n_group={rule.groups} groups")
    if not 1 <= rule.groups_kept <= rule.groups or rule.groups_kept * in_group < per_token:
        raise ConfigError(f"topk_group={rule.groups_kept} of n_group={rule.groups} groups hold too few experts")
    if rule.score == "sparsemixer" and per_token != 2:
        raise ConfigError(f"{family.architecture} chooses 2 experts a token, not {per_token}")
    return rule


def _is_sparse(rule: str, settings: Mapping, size: Callable[[str], int], layer: int) -> bool:
    if rule == "after":
        first = size("first_k_dense_replace") if settings["first_k_dense_replace"] else 0
        return layer >= first and layer % size("moe_layer_freq") == 0
    if rule == "step":
        dense = settings["mlp_only_layers"] or []
        if not isinstance(dense, list):
            raise ConfigError(f"the model's config.json gives mlp_only_layers={dense!r}; a list of layers is needed")
        return layer not in dense and (layer + 1) % size("decoder_sparse_step") == 0
    return True
