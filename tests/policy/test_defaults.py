"""The policy without a search always fits its budgets, and uses what they allow."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.core import Tier
from flexrun.models.families import spec_from_config
from flexrun.placement import memory_account, place_weights
from flexrun.policy.defaults import NoFit, default_policy
from flexrun.workload import Workload

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
}
SPEC = spec_from_config({**LLAMA, "vocab_size": 4000})
MIB = 1 << 20


def account_of(spec, policy, cpu_bytes, gpu_bytes=0):
    on_device = gpu_bytes > 0
    return memory_account(
        spec,
        policy,
        place_weights(spec, policy, on_device=on_device),
        policy.kv_tokens,
        on_device=on_device,
        cpu_budget_bytes=cpu_bytes,
        gpu_budget_bytes=gpu_bytes or None,
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(1, 2000),
    st.integers(1, 200),
    st.integers(1, 400),
    st.one_of(st.just(0), st.integers(1, 200)),
)
def test_a_policy_fits_its_budgets_or_says_what_is_short(sequences, prompt_tokens, max_tokens, cpu_mib, gpu_mib):
    workload = Workload.uniform(sequences, prompt_tokens, max_tokens)
    cpu_bytes, gpu_bytes = cpu_mib * MIB, gpu_mib * MIB
    try:
        policy = default_policy(SPEC, workload, cpu_bytes, gpu_bytes)
    except NoFit as error:
        assert "short by" in error.message
        assert error.hint
        return
    account = account_of(SPEC, policy, cpu_bytes, gpu_bytes)
    assert account.total(Tier.CPU) <= cpu_bytes
    assert not gpu_bytes or account.total(Tier.GPU) <= gpu_bytes
    assert policy.sequences_in_flight <= sequences
    micro_batches = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    assert policy.kv_tokens // micro_batches >= workload.longest_tokens, "a micro-batch holds the longest sequence"


def test_a_model_that_fits_stays_in_ram():
    policy = default_policy(SPEC, Workload.uniform(32, 100, 20), 1000 * MIB)
    assert (policy.weights.cpu, policy.sequences_in_flight) == (1.0, 32)


def test_a_model_that_does_not_fit_keeps_what_it_can():
    budget = SPEC.weight_bytes * 3 // 4
    policy = default_policy(SPEC, Workload.uniform(16, 30, 10), budget)
    assert 0.05 < policy.weights.cpu < 0.75
    assert account_of(SPEC, policy, budget).total(Tier.CPU) > 0.9 * budget


def test_the_gpu_is_filled_first():
    policy = default_policy(SPEC, Workload.uniform(16, 30, 10), 400 * MIB, 80 * MIB)
    assert policy.weights.gpu > 0.3
    assert policy.weights.disk == 0


def test_kv_leaves_the_gpu_where_the_buffers_need_the_room():
    """Half of the GPU would do for the KV, but a large head wants its logits and its ring there too."""
    spec = spec_from_config({**LLAMA, "vocab_size": 60_000})
    workload = Workload.uniform(64, 200, 10)
    policy = default_policy(spec, workload, 1000 * MIB, 240 * MIB)
    assert (policy.kv.gpu, policy.sequences_in_flight) == (0.0, 64)
    assert default_policy(spec, workload, 1000 * MIB, 400 * MIB).kv.gpu == 1.0


def test_max_sequences_bound_what_is_in_flight():
    policy = default_policy(SPEC, Workload.uniform(100, 30, 10), 1000 * MIB, max_sequences=7)
    assert policy.sequences_in_flight == 7


def test_reading_ahead_comes_before_residence():
    workload = Workload.uniform(8, 64, 16)
    policy = default_policy(SPEC, workload, 64 * MIB)
    placement = place_weights(SPEC, policy, on_device=False)
    assert 0 < policy.weights.cpu < 1
    assert account_of(SPEC, policy, 64 * MIB).host_ring_bytes >= 3 * placement.max_layer_stream_bytes[0]
