"""The Python API on a real model: python examples/generate.py"""

from flexrun import LLM, SamplingParams


def main() -> None:
    with LLM("smollm2-135m-instruct", cpu_memory="1GiB") as llm:
        greedy = SamplingParams(temperature=0, max_tokens=24)
        prompts = ["The capital of France is", "Water boils at a temperature of"]
        for output in llm.generate(prompts, greedy, use_tqdm=False):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

        question = [{"role": "user", "content": "Name three colours of the rainbow."}]
        sampled = SamplingParams(temperature=0.7, top_p=0.9, n=2, seed=7, max_tokens=32)
        for choice in llm.chat(question, sampled, use_tqdm=False)[0].outputs:
            print(f"choice {choice.index}: {choice.text!r} ({choice.finish_reason})")


if __name__ == "__main__":
    main()
