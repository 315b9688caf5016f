"""What comes out of generate_iter: one output a request, whatever ends together and whatever is refused."""

from __future__ import annotations

from flexrun import SamplingParams
from flexrun.outputs import Request


def test_choices_that_end_together_are_one_output(open_llm):
    llm = open_llm("llama")
    params = SamplingParams(temperature=1.0, n=3, max_tokens=5, ignore_eos=True)
    requests = [Request(f"r{number}", token_ids=[5 + number, 6, 7], params=params) for number in range(4)]
    outputs = list(llm.generate_iter(requests))
    assert sorted(output.request_id for output in outputs) == ["r0", "r1", "r2", "r3"]
    assert all([choice.index for choice in output.outputs] == [0, 1, 2] for output in outputs)


def test_a_pile_of_refusals_is_handed_on_as_it_is_met(open_llm):
    drawn = 0

    def pile():
        nonlocal drawn
        for number in range(2000):
            drawn += 1
            yield Request(f"bad{number}", token_ids=[])
        yield Request("good", token_ids=[5, 6], params=SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))

    outputs = open_llm("llama").generate_iter(pile())
    assert next(outputs).error is not None and drawn < 600
    rest = list(outputs)
    assert len(rest) == 2000 and rest[-1].error is None


def test_stop_tokens_beside_the_vocabulary_stop_nothing(open_llm):
    llm, vocab_size = open_llm("llama"), open_llm("llama").files.spec.vocab_size
    stops = {"beside": [vocab_size, 2**63 - 1], "none": [], "all": list(range(vocab_size))}
    requests = [
        Request(name, token_ids=[5, 6], params=SamplingParams(temperature=0, min_tokens=3, stop_token_ids=ids))
        for name, ids in stops.items()
    ]
    found = {output.request_id: output for output in llm.generate_iter(requests)}
    assert found["beside"].outputs[0].token_ids == found["none"].outputs[0].token_ids
    assert "leave one out" in found["all"].error.hint


def test_a_run_that_is_cut_short_is_not_judged_by_the_answers_it_had(open_llm):
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (2, 30)]
    requests = [Request(str(number), token_ids=[5, 6], params=each) for number, each in enumerate(params)]
    llm = open_llm("llama")
    outputs = llm.generate_iter(requests)
    next(outputs)
    outputs.close()
    assert set(llm.summary()["forecast"]) == {"planned"}
    again = open_llm("llama")
    list(again.generate_iter(requests))
    assert again.summary()["forecast"]["as_it_came"]["generated_tokens"] == 32
