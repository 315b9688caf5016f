"""Models of a few layers, and machines, for every test that plans: nothing here is ever run.

spec = planned("mixtral")            # a ModelSpec
machine = T4, LAPTOP or NO_GPU       # Hardware
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

from flexrun.hardware import Hardware, Processor, Rates, Transfer
from flexrun.models.families import spec_from_config
from flexrun.models.spec import ModelSpec

CONFIGS = Path(__file__).parent.parent / "configs"
MIB, GIB = 1 << 20, 1 << 30

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}
_ARCHITECTURES = {
    "llama": {},
    "gqa": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 100},
    "windows": {  # the first two layers attend to everything
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
    "deepseek": {  # latent attention, a dense layer before the sparse ones, shared experts
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "kv_lora_rank": 128,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "moe_intermediate_size": 512,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "rope_theta": 10000.0,
    },
}


@cache
def planned(name: str, **changes) -> ModelSpec:
    """The spec of a small model by name, its config changed by ``changes``."""
    return spec_from_config({**_LLAMA, **_ARCHITECTURES[name], **changes}, "auto")


def known(name: str) -> Path:
    """The config of a known model, as configs/models has it."""
    return CONFIGS / "models" / f"{name}.json"


T4_FILE = CONFIGS / "hardware" / "t4-gcp-208gb.json"
T4 = Hardware.load(T4_FILE)
NO_GPU = dataclasses.replace(T4, gpu=None, h2d=None, d2h=None, gpu_memory_bytes=0)

_RATES = Rates(1.5e11, 1.5e10, 1e10, 1e10, 6e10, half_width=100.0, sharpness=3.0, plain_weight_share=0.5)
LAPTOP = Hardware(
    name="laptop",
    cpu=Processor(
        {"float16": _RATES, "bfloat16": _RATES, "float32": _RATES},
        step_overhead_seconds=5e-5,
        row_overhead_seconds=2e-5,
        sample_element_seconds=1e-10,
        dequantise_bytes_per_second=1e10,
    ),
    cpu_memory_bytes=8 * GIB,
    disk_read=Transfer(1.5e9, 1e-4),
    disk_write=Transfer(0.8e9, 1e-4),
    host_copy=Transfer(6e9, 5e-6),
    disk_bytes=100 * GIB,
    cores=2,
    contention={
        "compute": {"disk_read": 0.85, "host_copy": 0.8, "host_attention": 0.6},
        "host_attention": {"compute": 0.5, "host_copy": 0.8},
        "disk_read": {"compute": 0.8},
        "host_copy": {"compute": 0.7},
    },
)
