"""A KV cache in RAM that an accelerator attends: whole, and compressed, over a link that is the bottleneck.

    python benchmarks/make_checkpoint.py llama-1b MODEL_DIR
    python benchmarks/kv_over_link.py --model MODEL_DIR --cache-dir DIR [--link 200MB] [--bits 16 4]

The accelerator is emulated, with all weights in its memory; every pass brings it the KV of all sequences. What is told
is of passes that decode; each forecast is made before its run. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys

from expert_batching import arguments, drawn_prompts, machine

from flexrun import LLM, Hardware, Policy, SamplingParams
from flexrun.config import KV_BITS, Placement


def run(bits: int | str, prompts: list[list[int]], settings, hardware: Hardware) -> dict:
    policy = Policy(
        sequences_in_flight=settings.sequences,
        tokens_per_pass=settings.sequences * settings.prompt_tokens,
        attention_micro_batch=max(settings.sequences // 4, 1),
        weights=Placement(1, 0, 0),
        kv=Placement(0, 1, 0),
        cpu_attention_share=0.0,
        kv_bits=bits,
    )
    params = SamplingParams(temperature=0, max_tokens=settings.output_tokens, ignore_eos=True)
    options = {"gpu_memory": settings.gpu_memory, "lane_bandwidths": {"h2d": settings.link}, "hardware": hardware}
    with LLM(settings.model, policy=policy, disk_dir=settings.cache_dir / "packed", **options) as llm:
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        summary = llm.summary()
    forecast, decoded = summary["forecast"]["planned"], settings.sequences * (settings.output_tokens - 1)
    return {
        "kv_bits": bits,
        "tokens_per_second": decoded / summary["decode_seconds"],
        "seconds": summary["seconds"],
        "forecast_error": forecast["seconds"] / summary["seconds"] - 1,
        "link_bytes": summary["lanes"]["h2d"]["bytes"],
        "link_busy_share": summary["lanes"]["h2d"]["busy_seconds"] / summary["decode_seconds"],
    }


def main() -> int:
    parser = arguments(__doc__, 8)
    parser.add_argument("--bits", nargs="+", default=["16", "4"], choices=[str(bits) for bits in KV_BITS])
    parser.set_defaults(link=200_000_000, gpu_memory="4GB", prompt_tokens=1024, output_tokens=24)
    settings = parser.parse_args()
    hardware, prompts, results = machine(settings), drawn_prompts(settings), []
    for bits in settings.bits:
        result = run(int(bits) if bits.isdecimal() else bits, prompts, settings, hardware)
        results.append(result)
        print(
            f"KV in {bits:>4} bits: {result['tokens_per_second']:6.2f} tokens/s of decoding, link busy "
            f"{result['link_busy_share']:.0%} of it with {result['link_bytes'] / 1e9:.2f} GB, whole job "
            f"{result['seconds']:.1f} s (forecast {result['forecast_error']:+.0%})"
        )
    print(json.dumps({"runs": results, "link_bytes_per_second": settings.link}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
