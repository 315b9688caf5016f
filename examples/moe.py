"""Run a mixture of experts under a policy of one's own: python examples/moe.py [MODEL]

MODEL is a name or the folder of any model with experts; without one, SmolLM2 is upcycled into ./smollm2-moe (1.5 GB).
"""

import sys
from pathlib import Path

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import format_bytes

# Attention goes by a few sequences at a time; the experts, each read once a pass, work on all tokens of it.
POLICY = Policy(
    sequences_in_flight=16,
    tokens_per_pass=512,
    attention_micro_batch=4,
    token_micro_batch=256,
    expert_batch=256,
    weights=Placement(cpu=0.5, disk=0.5),  # some experts stay in RAM, the others come from disk in every pass
)
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "The three primary colours are"]


def a_model() -> str | Path:
    if len(sys.argv) > 1:
        return sys.argv[1]
    folder = Path("smollm2-moe")
    if not (folder / "config.json").exists():
        from upcycle_smollm2 import upcycle

        print("upcycling SmolLM2: every expert a copy of its MLP")
        upcycle(folder)
    return folder


def main() -> None:
    with LLM(a_model(), policy=POLICY, cpu_memory="2GiB") as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
        layout = llm.plan.layout
        print(f"{layout.spec.experts.num_experts} experts a layer, {layout.spec.experts.experts_per_token} a token")
        for tier, kinds in layout.account.bytes_by_kind.items():
            held = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds.items() if size)
            print(f"{tier.value}: {held or 'nothing'}")


if __name__ == "__main__":
    main()
