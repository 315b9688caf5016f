"""Names, shapes, bytes and FLOPs that follow from a spec, held against real checkpoints."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_families import TINY

from flexrun.models.families import spec_from_config
from flexrun.models.tensors import PackedTensor


@pytest.mark.parametrize("name", TINY)
def test_every_checkpoint_tensor_is_packed_once_with_its_shape(tiny, name):
    config, tensors, _ = tiny(name)
    spec = spec_from_config(config)
    text = {key: tensor for key, tensor in tensors.items() if not key.startswith(("vision", "multi_modal"))}
    packed = spec.all_tensors()
    shapes = {
        spec.find_source(source, tensors): shape
        for tensor in packed
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True)
    }
    assert shapes == {key: tuple(tensor.shape) for key, tensor in text.items()}
    assert spec.unread_sources(tensors) == []
    assert spec.parameter_count == sum(tensor.numel() for tensor in text.values())
    assert all(tensor.elements == sum(map(_count, tensor.source_shapes)) for tensor in packed)
    places = [(tensor.module, tensor.name) for layer in range(spec.num_layers) for tensor in spec.layer_tensors(layer)]
    per_layer = places[: len(places) // spec.num_layers]
    assert [module for module, _ in per_layer] == sorted(module for module, _ in per_layer)
    assert len(set(per_layer)) == len(per_layer)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_checkpoints_of_the_bare_base_model_are_found(tiny):
    config, tensors, _ = tiny("llama")
    spec = spec_from_config(config)
    bare = {key.removeprefix("model.") for key in tensors}
    names = {spec.find_source(source, bare) for tensor in spec.all_tensors() for source in tensor.sources}
    assert names == bare
    assert spec.find_source("model.nothing", bare) is None


def test_tensors_nobody_reads_are_reported(tiny):
    config, tensors, _ = tiny("mistral")
    spec = spec_from_config(config)
    extra = ["model.layers.1.self_attn.q_proj.bias", "model.layers.0.self_attn.sinks"]
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert spec.unread_sources([*tensors, *extra, *harmless]) == sorted(extra)
    config, tensors, _ = tiny("llama_biases_tied")
    assert spec_from_config(config).unread_sources([*tensors, "lm_head.weight"]) == []
    config, tensors, _ = tiny("gpt_neox")
    buffers = ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]
    assert spec_from_config(config).unread_sources([*tensors, *buffers]) == []


def test_tied_heads_are_absent_and_untied_ones_present(tiny):
    def head(name):
        return [tensor.name for tensor in spec_from_config(tiny(name)[0]).head_tensors()]

    assert head("llama") == ["final_norm.weight", "lm_head.weight"]
    assert head("llama_biases_tied") == ["final_norm.weight"]
    assert head("opt_350m") == ["project_out.weight"]


def test_bytes_and_flops():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 100,
        "max_position_embeddings": 512,
    }
    spec = spec_from_config(config, "bfloat16")
    attention = (8 + 2 + 2) * 16 * 64 + 64 * 8 * 16
    assert spec.layer_bytes(0, "attention") == 2 * (attention + 64)
    assert spec.layer_bytes(0, "mlp") == 2 * (3 * 64 * 100 + 64)
    assert spec.layer_bytes(1) == spec.layer_bytes(1, "attention") + spec.layer_bytes(1, "mlp")
    assert spec.weight_bytes == 2 * spec.layer_bytes(0) + 2 * (2 * 1000 * 64 + 64)
    assert spec.kv_elements_per_token == 2 * 2 * 16
    assert spec.kv_bytes_per_token == 2 * spec.kv_elements_per_token
    assert spec.flops_per_token("attention") == 2 * attention
    assert spec.flops_per_token("mlp") == 2 * 3 * 64 * 100
    assert spec.flops_per_token("head") == 2 * 1000 * 64
    assert spec.attention_flops_per_token(10) == 2 * 2 * 8 * 16 * 10
    assert spec.max_length_tokens is None
    qkv = (8 + 2 + 2) * 16
    assert spec.linear_shapes("attention_inputs") == ((64, qkv),)
    assert spec.linear_shapes("attention_output") == ((128, 64),)
    assert spec.linear_shapes("mlp", 1) == ((64, 200), (100, 64))
    assert spec.linear_shapes("head") == ((64, 1000),)
    assert spec.decode_attention_flops_per_pair == spec.prefill_attention_flops_per_pair == 4 * 8 * 16
    assert spec.decode_absorption_shapes == spec.prefill_expansion_shapes == ()
    assert not spec.is_sparse(0)


@pytest.mark.parametrize("name", TINY)
def test_linear_shapes_are_those_of_the_matrices(tiny, name):
    spec = spec_from_config(tiny(name)[0])
    for module, parts in {"attention": ("attention_inputs", "attention_output"), "mlp": ("mlp",)}.items():
        packed = [tensor.shape for tensor in spec.layer_tensors(1) if tensor.module == module]
        shapes = [shape for part in parts for shape in spec.linear_shapes(part, 1)]
        assert shapes == [shape[::-1] for shape in packed if len(shape) == 2]
        assert spec.flops_per_token(module, 1) == 2 * sum(inputs * outputs for inputs, outputs in shapes)


def test_learned_positions_end_hard(tiny):
    assert spec_from_config(tiny("opt")[0]).max_length_tokens == 256


def test_a_spec_can_be_hashed_and_pickled(tiny):
    spec = spec_from_config(tiny("gemma3")[0])
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, spec_from_config(tiny("gemma3")[0])}) == 1


def test_assemblers_cast_and_order():
    parts = [torch.arange(4.0).view(2, 2), torch.arange(6.0).view(3, 2)]
    packed = PackedTensor("qkv.weight", "attention", (5, 2), ("a", "b"), ((2, 2), (3, 2)))
    assert torch.equal(packed.build(parts, torch.bfloat16), torch.cat(parts).bfloat16())
    fused = torch.arange(12.0)  # two heads of two channels: q0 k0 v0 q1 k1 v1
    packed = PackedTensor("qkv.bias", "attention", (12,), ("a",), ((12,),), "neox_qkv", 2)
    assert packed.build([fused]).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
