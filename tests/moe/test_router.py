"""Every routing rule against the router module that transformers runs for the family."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.families import spec_from_config
from flexrun.models.routing import RoutingRule
from flexrun.moe import route

HIDDEN, TOKENS = 48, 400
SIZES = {
    "vocab_size": 131,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 77,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 4,
}
LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": None,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 22,
    "first_k_dense_replace": 1,
}
GLM = {"n_routed_experts": 12, "moe_intermediate_size": 22, "head_dim": 8}
QWEN = {"num_experts": 12, "moe_intermediate_size": 22, "shared_expert_intermediate_size": 33}
LIMITED = {"n_group": 4, "topk_group": 2}
# name -> (configuration class, router class, arguments)
ROUTERS = {
    "mixtral": ("MixtralConfig", "mixtral.MixtralTopKRouter", {"num_local_experts": 12}),
    "olmoe": ("OlmoeConfig", "olmoe.OlmoeTopKRouter", {"num_experts": 12}),
    "olmoe_renormalised": ("OlmoeConfig", "olmoe.OlmoeTopKRouter", {"num_experts": 12, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeConfig", "qwen2_moe.Qwen2MoeTopKRouter", QWEN),
    "qwen3_moe": ("Qwen3MoeConfig", "qwen3_moe.Qwen3MoeTopKRouter", {**QWEN, "norm_topk_prob": True}),
    "gpt_oss": ("GptOssConfig", "gpt_oss.GptOssTopKRouter", {"num_local_experts": 12}),
    "glm4_moe": ("Glm4MoeConfig", "glm4_moe.Glm4MoeTopkRouter", {**GLM, "routed_scaling_factor": 2.5}),
    "glm4_moe_limited": ("Glm4MoeConfig", "glm4_moe.Glm4MoeTopkRouter", {**GLM, **LIMITED, "norm_topk_prob": False}),
    "deepseek_v2": (
        "DeepseekV2Config",
        "deepseek_v2.DeepseekV2TopkRouter",
        {
            **LATENT,
            **LIMITED,
            "n_routed_experts": 12,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2Config",
        "deepseek_v2.DeepseekV2TopkRouter",
        {**LATENT, **LIMITED, "n_routed_experts": 12, "topk_method": "greedy"},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "deepseek_v3.DeepseekV3TopkRouter",
        {**LATENT, "n_routed_experts": 32},  # 4 of 8 groups, renormalised, times 2.5
    ),
    "granitemoe": ("GraniteMoeConfig", "granitemoe.GraniteMoeTopKRouter", {"num_local_experts": 12}),
    "phimoe": (
        "PhimoeConfig",
        "phimoe.PhimoeTopKRouter",
        {"num_local_experts": 12, "num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    ),
}
RULES = {
    "mixtral": RoutingRule(4, renormalise=True),
    "olmoe": RoutingRule(4),
    "gpt_oss": RoutingRule(4, "chosen_softmax"),
    "deepseek_v2": RoutingRule(4, "softmax", True, 4, 2, "max", scaling_factor=16.0),
    "deepseek_v2_lite": RoutingRule(4, "softmax", True),
    "deepseek_v3": RoutingRule(4, "sigmoid", True, 8, 4, "top2_sum", True, 1e-20, 2.5),
    "glm4_moe": RoutingRule(4, "sigmoid", True, 1, 1, "top2_sum", True, 1e-20, 2.5),
    "phimoe": RoutingRule(2, "sparsemixer", near=0.2),
}


def config_of(name: str):
    class_name, _, arguments = ROUTERS[name]
    return getattr(transformers, class_name)(**{**SIZES, **arguments})


def rule_of(name: str) -> RoutingRule:
    given = {**SIZES, **ROUTERS[name][2], "model_type": config_of(name).model_type}
    return spec_from_config(given, "float32").experts.routing


def router_of(name: str, config) -> torch.nn.Module:
    module, _, class_name = ROUTERS[name][1].partition(".")
    loaded = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    router = getattr(loaded, class_name)(config).eval()
    generator = torch.Generator().manual_seed(3)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() > 1 else 0.1)
    return router


def logits_of(rule: RoutingRule, router, hidden: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if rule.float32_logits else hidden.dtype
    bias = getattr(router, "bias", None)
    return torch.nn.functional.linear(
        hidden.to(dtype), router.weight.to(dtype), None if bias is None else bias.to(dtype)
    )


def dense(experts: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.zeros(len(experts), num_experts).scatter_(1, experts, weights.float())


@torch.inference_mode()
@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_transformers(name):
    rule, router = rule_of(name), router_of(name, config_of(name))
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))
    logits = logits_of(rule, router, hidden)
    experts, weights = route(rule, logits, getattr(router, "e_score_correction_bias", None))
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert experts.shape == weights.shape == (TOKENS, rule.experts_per_token)
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    _, expected_weights, expected_experts = router(hidden)
    num_experts = logits.shape[1]
    found, expected = dense(experts, weights, num_experts), dense(expected_experts, expected_weights, num_experts)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(set(experts.flatten().tolist())) > num_experts // 2, "a router that prefers a few tests little"


@torch.inference_mode()
@pytest.mark.parametrize("name", ROUTERS)
def test_bfloat16_rows_choose_as_in_transformers(name):
    """Weights stay in float32, where some families round them."""
    rule, router = rule_of(name), router_of(name, config_of(name)).bfloat16()
    correction = getattr(router, "e_score_correction_bias", None)
    if correction is not None:
        correction = router.e_score_correction_bias = correction.float()
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    experts, weights = route(rule, logits_of(rule, router, hidden), correction)
    assert weights.dtype == torch.float32
    _, expected_weights, expected_experts = router(hidden)
    ordered, expected_order = experts.sort(dim=1), expected_experts.sort(dim=1)
    assert (ordered.values == expected_order.values).float().mean() > 0.99  # equal logits may change places
    same = (ordered.values == expected_order.values).all(dim=1)
    found, expected = weights.gather(1, ordered.indices), expected_weights.gather(1, expected_order.indices).float()
    torch.testing.assert_close(found[same], expected[same], atol=1e-6, rtol=0.01)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_read_from_the_config(name):
    assert rule_of(name) == RULES[name]


def test_the_correction_chooses_and_does_not_weigh():
    rule = RoutingRule(1, "sigmoid")
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    experts, weights = route(rule, logits, torch.tensor([0.0, 0.0, 1.0]))
    assert experts.tolist() == [[2]]
    assert weights.item() == pytest.approx(0.5)


def test_groups_keep_tokens_from_better_experts():
    logits = torch.tensor([[9.0, 0.0, -1.0, 5.0, 5.0, 1.0]])
    for group_score, expected in (("max", [0, 1]), ("top2_sum", [3, 4])):
        rule = RoutingRule(2, "sigmoid", groups=2, groups_kept=1, group_score=group_score)
        experts, _ = route(rule, logits)
        assert sorted(experts[0].tolist()) == expected


@pytest.mark.parametrize(
    ("name", "change", "error", "named"),
    [
        ("deepseek_v3", {"n_group": 5}, ConfigError, "n_group=5"),
        ("deepseek_v3", {"topk_group": 9}, ConfigError, "topk_group=9"),
        ("deepseek_v3", {"n_group": 32, "topk_group": 8}, ConfigError, "n_group=32"),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError, "scoring_func='softmax'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, UnsupportedError, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob=True"),
        ("glm4_moe", {"routed_scaling_factor": "1"}, ConfigError, "routed_scaling_factor='1'"),
        ("phimoe", {"num_experts_per_tok": 3}, ConfigError, "2 experts a token"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_by_name(name, change, error, named):
    given = {**SIZES, **ROUTERS[name][2], "model_type": config_of(name).model_type, **change}
    with pytest.raises(error) as caught:
        spec_from_config(given, "float32")
    assert named in caught.value.message
