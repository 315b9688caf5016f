"""Writes checkpoints as other programs write them: GGUF by the gguf package with llama.cpp's transformations."""

import gguf
import numpy
import pytest
import torch
import transformers

ARCHES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
}
PERMUTED = ("llama", "mistral", "smollm3", "granite")


def permute(weights: numpy.ndarray, heads: int) -> numpy.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def as_llama_cpp_stores(name: str, values: numpy.ndarray, config) -> numpy.ndarray:
    if config.model_type in PERMUTED and ".q_proj." in name:
        return permute(values, config.num_attention_heads)
    if config.model_type in PERMUTED and ".k_proj." in name:
        return permute(values, config.num_key_value_heads)
    if config.model_type in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return values + numpy.float32(1)
    if config.model_type == "gpt_neox" and ".query_key_value." in name:
        by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
        return numpy.concatenate([by_head[:, part].reshape(-1, *values.shape[1:]) for part in range(3)])
    return values


def write_metadata(writer: gguf.GGUFWriter, config) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type not in ("granite", "phi3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if config.model_type in ("mistral", "gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", numpy.array(rope[f"{length}_factor"], numpy.float32))


def tiny_model(**settings) -> transformers.PreTrainedModel:
    """A random float32 model in evaluation mode, its norms and biases random too."""
    config = transformers.AutoConfig.for_model(**{**SIZES, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(4)
    return model


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def write_gguf(path, model, extra=lambda writer: None):
    """``model`` as llama.cpp's converter writes it; ``extra(writer)`` adds to it."""
    config = model.config
    arch = ARCHES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    write_metadata(writer, config)
    extra(writer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, as_llama_cpp_stores(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    """gguf_file(model, extra=...) -> path of a new GGUF file."""
    return lambda model, **options: write_gguf(tmp_path / "model.gguf", model, **options)


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def llama():
    return tiny_model(model_type="llama", head_dim=10)
