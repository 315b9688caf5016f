import math

import gguf
import numpy
import pytest
import torch
import transformers

from flexrun.errors import CheckpointError, UnsupportedError
from flexrun.models.families import spec_from_config
from flexrun.weights.gguf_config import llama3_frequency_divisors
from flexrun.weights.readers import check_tensors, open_checkpoint

FAMILIES = {
    "llama": {"model_type": "llama", "head_dim": 10},
    "llama with biases": {"model_type": "llama", "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "llama tied, another base": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    "mistral": {"model_type": "mistral", "head_dim": 10, "sliding_window": 5},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.3,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2 yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "gemma2": {"model_type": "gemma2", "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "num_hidden_layers": 7,
    },
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3", "sliding_window": 7},
    "phi3 longrope, partly rotated": {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.25],
            "long_factor": [1.5, 4.0, 9.3],
        },
    },
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox in sequence": {"model_type": "gpt_neox", "rotary_pct": 0.25, "use_parallel_residual": False},
}


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_a_gguf_file_gives_back_the_model_it_was_made_from(settings, make_model, gguf_file):
    """Names, values and config together: a model rebuilt from the reader computes what the original computes."""
    original = make_model(**settings)
    with open_checkpoint(gguf_file(original)) as reader:
        config = dict(reader.config)
        tensors = {name: reader.read(name, torch.float32) for name in reader.names()}
    rebuilt_config = transformers.AutoConfig.for_model(**config)
    assert config["architectures"] == [type(original).__name__]
    rebuilt = transformers.AutoModelForCausalLM.from_config(rebuilt_config, attn_implementation="eager").eval()
    tensors = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in tensors.items()}
    missing = set(rebuilt.state_dict()) - set(tensors)
    assert missing == ({"lm_head.weight"} if original.config.tie_word_embeddings else set())
    rebuilt.load_state_dict(tensors, strict=False)
    ids = torch.arange(3, 3 + 22).remainder(101)[None]
    with torch.no_grad():
        expected, found = original(ids).logits, rebuilt(ids).logits
    assert expected.std() > 0.05  # a model that computes nothing would prove nothing
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_the_decoder_needs_exactly_what_the_file_holds(settings, make_model, gguf_file):
    with open_checkpoint(gguf_file(make_model(**settings))) as reader:
        spec = spec_from_config(reader.config)
        needed = {
            spec.find_source(source, reader.names()) or source: shape
            for tensor in spec.all_tensors()
            for source, shape in zip(tensor.sources, tensor.source_shapes)
        }
        check_tensors(reader, needed.items())
        assert set(needed) == reader.names()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_frequencies(factor, make_model, gguf_file):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    }
    model = make_model(model_type="llama", head_dim=64, rope_parameters=scaling)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    stored = (plain / inverse).numpy().astype(numpy.float32)
    assert 1.0 < stored.max() == pytest.approx(factor)
    path = gguf_file(model, extra=lambda writer: writer.add_tensor("rope_freqs.weight", stored))
    with open_checkpoint(path) as reader:
        assert reader.config["rope_scaling"] == {key: scaling[key] for key in scaling if key != "rope_theta"}
        assert "rope_freqs.weight" not in reader.names()
        assert reader.config["rope_theta"] == 500_000.0


def test_frequencies_that_follow_no_known_scaling_are_refused(llama, gguf_file):
    stored = llama3_frequency_divisors(10, 10_000.0, 8.0)
    stored[1] = 1.7
    path = gguf_file(llama, extra=lambda writer: writer.add_tensor("rope_freqs.weight", stored))
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        open_checkpoint(path)


def test_frequencies_of_one_mean_no_scaling(llama, gguf_file):
    ones = numpy.ones(5, numpy.float32)
    with open_checkpoint(gguf_file(llama, extra=lambda writer: writer.add_tensor("rope_freqs.weight", ones))) as reader:
        assert "rope_scaling" not in reader.config


def test_ends_of_turns_reach_the_generation_config(llama, gguf_file):
    def tokens(writer):
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)
        writer.add_bos_token_id(1)

    with open_checkpoint(gguf_file(llama, extra=tokens)) as reader:
        assert reader.generation_config == {"eos_token_id": [2, 7]}
        assert (reader.config["eos_token_id"], reader.config["bos_token_id"]) == (2, 1)


def test_numbers_are_those_a_person_wrote(llama, gguf_file):
    with open_checkpoint(gguf_file(llama)) as reader:
        assert reader.config["rms_norm_eps"] == llama.config.rms_norm_eps  # float32 in the file


def _linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.5)


def test_linear_scaling(llama, gguf_file):
    with open_checkpoint(gguf_file(llama, extra=_linear)) as reader:
        assert reader.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (lambda writer: writer.add_expert_count(8), "expert_count"),
        (lambda writer: writer.add_clamp_kqv(3.0), "clamp_kqv"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", numpy.ones(5, numpy.float32)), "longrope"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "spiral"), "spiral"),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", numpy.ones(60, numpy.float32)), "attn_q"),
        (lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", numpy.ones((2, 4, 4), numpy.float32)), "exps"),
    ],
)
def test_what_does_not_run_is_refused_by_name(extra, named, llama, gguf_file):
    with pytest.raises(UnsupportedError, match=named):
        open_checkpoint(gguf_file(llama, extra=extra))


def test_a_partly_rotated_llama_is_refused(raw_gguf):
    def build(writer):
        for name, value in {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "head_count": 4,
            "layer_norm_rms_eps": 1e-5,
            "rope_dimension_count": 4,
        }.items():
            getattr(writer, f"add_{name}")(value)
        for name in ("token_embd.weight", "blk.0.attn_output.weight"):
            writer.add_tensor(name, numpy.ones((32, 32), numpy.float32))

    with pytest.raises(UnsupportedError, match="part of a head"):
        open_checkpoint(raw_gguf(build))


def test_an_unknown_architecture_is_refused_by_name(raw_gguf):
    path = raw_gguf(lambda writer: writer.add_tensor("x.weight", numpy.ones(4, numpy.float32)), arch="mamba")
    with pytest.raises(UnsupportedError, match="mamba"):
        open_checkpoint(path)


def test_missing_metadata_are_named(raw_gguf):
    path = raw_gguf(lambda writer: writer.add_tensor("x.weight", numpy.ones(4, numpy.float32)))
    with pytest.raises(CheckpointError, match=r"llama\.block_count"):
        open_checkpoint(path)


def test_divisors_leave_short_waves_and_stretch_long_ones():
    divisors = llama3_frequency_divisors(128, 500_000.0, 8.0)
    wavelength = 2 * math.pi * 500_000.0 ** (numpy.arange(0, 128, 2) / 128)
    assert (divisors[wavelength < 2048] == 1).all() and (divisors[wavelength > 8192] == 8).all()
    assert (numpy.diff(divisors) >= 0).all()
