"""How another engine differs from flexrun, and what it ran: all that a forecast of it needs beside model and machine.

Sources, by file of the released code: FlexGen (arXiv 2303.06865), FMInference/FlexLLMGen; MoE-Gen (arXiv 2503.09716),
EfficientMoE/MoE-Gen. Byte counts are what the kernels read and write that this code launches one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flexrun.config import Placement


@dataclass(frozen=True)
class EngineTraits:
    """What an engine does otherwise than flexrun.

    Fields named ``_bytes`` are memory traffic an element, beyond what ``Rates.linear_seconds`` counts.

    module_batching: weights stream once for all sequences, and lanes run freely beside each other (MoE-Gen's paper,
        section 4). Otherwise a block of micro-batches goes through each half layer, attention or MLP; every micro-batch
        ends in a device-wide sync, and the first one waits for the weights of the next half layer (FlexGen's
        flex_opt.py, generation_loop_overlap_multi_batch).
    whole_tensors: a matrix lies where the middle of its bytes falls: disk first, then CPU, then GPU (flex_opt.py,
        init_weight_list). Otherwise fractions are met.
    ends_resident: embedding and head stay on the GPU; otherwise they move in every pass (flex_opt.py, OutputEmbed).
    full_prompt_logits: the head is computed for every prompt token (pytorch_backend.py, opt_output_embed).
    score_bytes: of a prompt's score matrix, stored whole with its future tokens (pytorch_backend.py, mha: product,
        mask, softmax, product); 0 is a fused causal kernel. latent_score_bytes: the same for latent attention
        (MoE-Gen's deepseekv2_initializer.py, prefill_attn: also a scale, softmax in fp32 and casts).
    kv_copies: times the cache is read or written on the GPU before the products of a decoded token: a transposed copy
        (pytorch_backend.py, mha_gen), or appending the new token (Mixtral_Initializer.py, decoding_attn).
    expands_groups: grouped heads are copied to one for each query head (decoding_attn, repeat_kv).
    expands_latent: keys and values of all heads are made from the latents of the whole context for every token, on the
        processor that attends (deepseekv2_initializer.py, decoding_attn; the CPU kernel takes expanded heads).
    dequantise_bytes: compression.py, decompress: two nibbles 3; writing them to every other element, where memory with
        error correction reads the sectors first, 8; dividing and adding in place 8. Weights are unpacked again for
        every micro-batch. compress_bytes: minimum, maximum, five elementwise steps, packing.
    cpu_attention_bytes: of attention on the CPU (pytorch_backend.py, mha_gen: transposed fp32 copies, products).
    cpu_convert_bytes: of the fp32 copy that the launching thread makes of a cache in host memory before it.
    cpu_blocks: the thread that launches GPU work also does the CPU's, so that the two take turns; otherwise both attend
        at once (Hetero_Attn.cpp, _attn_mode_2).
    kv_pinned: the cache is in pinned memory; otherwise the launching thread makes a pinned copy of what goes to the
        GPU, and a copy thread one of what comes back (pytorch_backend.py, general_copy).
    reads_then_sends: a copy thread reads a whole tensor from disk before it sends it to the GPU (pytorch_backend.py,
        copy_worker_func).
    expert_rows: most rows of one call of an expert (Wrapper.py); 0 is no limit.

    Calibrated, two an engine, on the row that published.py names:
    matmul_share: part of the machine's matmul rate that its kernels reach.
    cpu_bytes_per_second: memory traffic of its attention on the CPU; None is the machine's rate of reading a cache.
    sync_seconds: for how long the link idles with each micro-batch attended on the GPU, because the buffer is free only
        when the launching thread has waited for the stream (Hetero_Attn.cpp, _attn_mode_1; _attn_mode_2 does not wait).
    """

    name: str
    module_batching: bool = False
    whole_tensors: bool = False
    ends_resident: bool = True
    full_prompt_logits: bool = False
    score_bytes: float = 0.0
    latent_score_bytes: float = 0.0
    kv_copies: float = 0.0
    expands_groups: bool = False
    expands_latent: bool = False
    dequantise_bytes: float = 0.0
    compress_bytes: float = 0.0
    cpu_attention_bytes: float = 2.0
    cpu_convert_bytes: float = 0.0
    cpu_blocks: bool = False
    kv_pinned: bool = True
    reads_then_sends: bool = False
    expert_rows: int = 0
    matmul_share: float = 1.0
    cpu_bytes_per_second: float | None = None
    sync_seconds: float = 0.0


@dataclass(frozen=True)
class PeerRun:
    """One setting of a peer, as published.

    sequences: of a block, all of which end before the next block begins; 0 is as many as host memory holds beside the
        weights. micro_batch: sequences attended together.
    weights, kv, hidden: Placement fractions. cpu_attention: share of the sequences whose cache the CPU attends.
    overlap: transfers run beside computing. pinned_weights: so is the host memory of the weights.
    projected: decoding was measured on some layers of the first decoded token and multiplied (FlexGen's bench_suite.py,
        --debug fewer_batch).
    prefill_sequences: sequences that stream the weights together in prefill, where that is not the whole block.
    """

    sequences: int
    micro_batch: int
    prompt_tokens: int
    generated_tokens: int
    weights: Placement = field(default_factory=Placement)
    kv: Placement = field(default_factory=Placement)
    hidden: Placement = field(default_factory=lambda: Placement(gpu=1.0, cpu=0.0))
    cpu_attention: float = 0.0
    weight_bits: int = 16
    kv_bits: int = 16
    overlap: bool = True
    pinned_weights: bool = True
    projected: bool = False
    prefill_sequences: int = 0

    @property
    def decode_context_tokens(self) -> float:
        """Cached tokens a decoded token meets, on average."""
        return self.prompt_tokens + (1 if self.projected else self.generated_tokens / 2)


FLEXGEN = EngineTraits(
    "FlexGen",
    whole_tensors=True,
    ends_resident=False,
    full_prompt_logits=True,
    score_bytes=12.0,
    kv_copies=2.0,
    dequantise_bytes=19.0,
    compress_bytes=24.0,
    cpu_attention_bytes=12.0,
    cpu_convert_bytes=6.0,
    cpu_blocks=True,
    kv_pinned=False,
    reads_then_sends=True,
    matmul_share=0.8712,
    cpu_bytes_per_second=9.972e10,
)

MOE_GEN = EngineTraits(
    "MoE-Gen",
    module_batching=True,
    latent_score_bytes=26.0,
    kv_copies=2.0,
    expands_groups=True,
    expands_latent=True,
    expert_rows=2048,
    matmul_share=0.9281,
    sync_seconds=7.764e-3,
)
