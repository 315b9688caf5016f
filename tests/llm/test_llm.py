"""LLM as its users meet it: what it takes, what it gives back, and how it refuses."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from tiny_families import VOCABULARY, prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Lane
from flexrun.disk_io import DirectFile
from flexrun.errors import BudgetError, ConfigError, ExecutionError, RequestError
from flexrun.outputs import Request

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
HALF_ON_DISK = Policy(
    sequences_in_flight=3,
    tokens_per_pass=16,
    attention_micro_batch=2,
    token_micro_batch=7,
    weights=Placement(cpu=0.5, disk=0.5),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"


@pytest.fixture(scope="session")
def speaking(checkpoint, tmp_path_factory):
    """The tiny llama with a tokenizer: token 3 + n is the n-th two-letter syllable, or a letter; 2 is </s>."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("speaking") / "model")
    pieces = [*LETTERS, *(first + second for first, second in itertools.product("aeiou", LETTERS))]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {piece: 3 + number for number, piece in enumerate(pieces[: VOCABULARY - 3])}
    merges = [tuple(piece) for piece in vocabulary if len(piece) == 2]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Split("~", "removed")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}.{% endfor %}"
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def llm(open_llm):
    return open_llm("llama")


@pytest.fixture
def talker(speaking, packed_cache):
    with LLM(speaking, dtype="float32", threads=1, cpu_memory="256MiB", disk_dir=packed_cache) as opened:
        yield opened


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# What goes in --------------------------------------------------------------------------------------------


def test_prompts_come_as_text_ids_dicts_or_chats(talker):
    text = "hello there"
    ids = talker.tokenizer.encode(text)
    forms = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = talker.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 1
    assert [output.prompt for output in outputs] == [text, None, text, None]
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert all(output.outputs[0].text == talker.tokenizer.decode(output.outputs[0].token_ids) for output in outputs)
    for alone in forms:
        assert tokens_of(talker.generate(alone, GREEDY, use_tqdm=False)) == tokens_of(outputs[:1])

    conversation = [{"role": "user", "content": "hi"}]
    (chat,) = talker.chat(conversation, GREEDY, use_tqdm=False)
    assert chat.prompt_token_ids == talker.tokenizer.encode("user: hi.")
    assert tokens_of(talker.chat([conversation] * 2, GREEDY, use_tqdm=False)) == tokens_of([chat, chat])


def test_outputs_come_in_the_order_of_the_prompts(llm):
    asked = prompts((3, 40, 1, 17, 8, 25))
    params = [SamplingParams(temperature=0, max_tokens=1 + number, ignore_eos=True) for number in range(6)]
    outputs = llm.generate(asked, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == asked
    assert [len(tokens) for tokens in tokens_of(outputs)] == [1, 2, 3, 4, 5, 6]
    assert [output.request_id for output in outputs] == list("012345")
    assert all(output.finished and output.error is None for output in outputs)


def test_no_prompts_are_no_outputs(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_params_must_be_one_or_one_each(llm):
    with pytest.raises(RequestError, match="2 sampling params for 3 prompts"):
        llm.generate(prompts((1, 2, 3)), [GREEDY, GREEDY], use_tqdm=False)


def test_a_prompt_of_no_known_form_is_refused(llm):
    for prompt, complaint in ((5.0, "type float"), ({"text": "x"}, "keys"), ([1, "x"], "type list")):
        with pytest.raises(RequestError, match=complaint):
            llm.generate([prompt], GREEDY, use_tqdm=False)


def test_requests_without_params_take_the_defaults(llm):
    requests = [Request("a", token_ids=[5, 6]), Request("b", token_ids=[7])]
    outputs = {output.request_id: output for output in llm.generate_iter(requests)}
    assert set(outputs) == {"a", "b"}
    assert all(len(output.outputs[0].token_ids) <= 16 for output in outputs.values())


# Bad requests --------------------------------------------------------------------------------------------


def test_text_without_a_tokenizer_is_the_requests_own_error(llm):
    bad, good = llm.generate(["hello", [5, 6]], GREEDY, use_tqdm=False)
    assert bad.error.code == "no_tokenizer"
    assert "--tokenizer" in bad.error.hint
    assert (bad.prompt, bad.outputs) == ("hello", [])
    assert good.error is None and len(good.outputs[0].token_ids) == 5


def test_bad_requests_fail_alone(llm):
    stops = SamplingParams(temperature=0, max_tokens=5, stop=["x"])
    asked = [[5, 6], [VOCABULARY], [-1], [], [9] * 256, [9] * 255, [7], [5, 6]]
    params = [GREEDY] * 6 + [stops, GREEDY]
    outputs = llm.generate(asked, params, use_tqdm=False)
    assert [output.error and output.error.code for output in outputs] == [
        None,
        "token_out_of_vocabulary",
        "token_out_of_vocabulary",
        "empty_prompt",
        "context_length_exceeded",
        None,
        "no_tokenizer",
        None,
    ]
    assert "256 tokens" in outputs[4].error.message
    assert len(outputs[5].outputs[0].token_ids) == 1, "as many tokens as the context has room for"
    assert outputs[0].outputs == outputs[7].outputs
    assert all(not output.outputs for output in outputs if output.error)


def test_only_bad_requests_are_only_errors(llm):
    outputs = llm.generate([[], [VOCABULARY]], GREEDY, use_tqdm=False)
    assert [output.error.code for output in outputs] == ["empty_prompt", "token_out_of_vocabulary"]


def test_max_model_len_bounds_prompt_and_output(open_llm):
    llm = open_llm("llama", max_model_len=12)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    fits, full, over = llm.generate(prompts((4, 11, 12)), params, use_tqdm=False)
    assert (len(fits.outputs[0].token_ids), len(full.outputs[0].token_ids)) == (8, 1)
    assert over.error.code == "context_length_exceeded"
    with pytest.raises(ConfigError, match="257 is more than the 256 positions"):
        open_llm("llama", max_model_len=257)


def test_a_request_larger_than_the_policys_cache_fails_alone(open_llm):
    policy = Policy(sequences_in_flight=2, attention_micro_batch=1, tokens_per_pass=8, kv_tokens=20)
    large, small = open_llm("llama", policy=policy).generate(prompts((9, 3)), GREEDY, use_tqdm=False)
    assert large.error.code == "kv_cache_too_small"
    assert "13 tokens of KV cache" in large.error.message
    assert small.error is None


# Sampling and stops --------------------------------------------------------------------------------------


def test_choices_and_logprobs(talker):
    params = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=6, logprobs=2, ignore_eos=True)
    (output,) = talker.generate("hello", params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert len(choice.logprobs) == 6
        for token, entries in zip(choice.token_ids, choice.logprobs, strict=True):
            assert token in entries
            assert len(entries) in (2, 3)
            assert entries[token].decoded_token == talker.tokenizer.decode([token], skip_special_tokens=False)
        told = sum(entries[token].logprob for token, entries in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(told)


def test_stop_strings_end_a_text(talker):
    (whole,) = talker.generate("hello", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = text[: text.index(stop)]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, stop=stop, include_stop_str_in_output=include
        )
        (ended,) = talker.generate("hello", params, use_tqdm=False)
        assert ended.outputs[0].text == (cut + stop if include else cut)
        assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", stop)
        assert whole.outputs[0].token_ids[: len(ended.outputs[0].token_ids)] == ended.outputs[0].token_ids


def test_stop_tokens_end_a_text(llm):
    (prompt,) = prompts((6,))
    (whole,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), use_tqdm=False)
    tokens = whole.outputs[0].token_ids
    stop = tokens[4]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, stop_token_ids=[stop])
    (ended,) = llm.generate([prompt], params, use_tqdm=False)
    assert ended.outputs[0].token_ids == tokens[: tokens.index(stop) + 1]
    assert ended.outputs[0].stop_reason == stop


# Piles ---------------------------------------------------------------------------------------------------


def test_an_endless_pile_is_drawn_from_only_as_slots_free_up(open_llm):
    llm = open_llm("llama", policy=HALF_ON_DISK)
    drawn = 0

    def pile():
        nonlocal drawn
        while True:
            drawn += 1
            yield Request(str(drawn), token_ids=[5, 6, 7], params=GREEDY)

    outputs = llm.generate_iter(pile())
    for finished in range(1, 30):
        next(outputs)
        assert drawn <= finished + HALF_ON_DISK.sequences_in_flight
    outputs.close()
    assert len(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == 1, "the engine goes on after a pile is left"


def test_refusals_come_out_of_a_pile_too(llm):
    pile = [Request("bad", token_ids=[VOCABULARY]), Request("good", token_ids=[5], params=GREEDY)]
    pile.append(Request("last", token_ids=[]))
    outputs = {output.request_id: output.error for output in llm.generate_iter(iter(pile))}
    assert outputs["good"] is None
    assert outputs["bad"].code == "token_out_of_vocabulary"
    assert outputs["last"].code == "empty_prompt"


def test_two_iterators_at_once_are_refused(llm):
    first = llm.generate_iter([Request(str(number), token_ids=[5], params=GREEDY) for number in range(90)])
    next(first)
    with pytest.raises(ConfigError, match="already generating"):
        llm.generate([[5]], GREEDY, use_tqdm=False)
    first.close()
    assert llm.generate([[5]], GREEDY, use_tqdm=False)[0].error is None


# Policies, budgets, engines ------------------------------------------------------------------------------


def test_a_policy_document_is_read(open_llm, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(HALF_ON_DISK.to_json())
    llm = open_llm("llama", policy=str(path))
    llm.generate(prompts((5, 9)), GREEDY, use_tqdm=False)
    assert llm.summary()["policy"]["weights"] == {"gpu": 0.0, "cpu": 0.5, "disk": 0.5}
    path.write_text('{"weight": {}}')
    with pytest.raises(ConfigError, match="unknown key 'weight'"):
        open_llm("llama", policy=path)


def test_max_num_seqs_bounds_what_is_in_flight(open_llm):
    for policy in (None, HALF_ON_DISK):
        llm = open_llm("llama", max_num_seqs=2, policy=policy)
        llm.generate(prompts((5, 9, 3)), GREEDY, use_tqdm=False)
        assert llm.summary()["policy"]["sequences_in_flight"] == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cpu_memory": "64KiB"}, r"cpu memory is short by .*even with every weight on disk .*has 64\.0 KiB"),
        ({"cpu_memory": "64KiB", "policy": HALF_ON_DISK}, r"the policy needs .* of cpu memory \(weights"),
        ({"gpu_memory": "16KiB"}, r"gpu memory is short by"),
        ({"gpu_memory": "16KiB", "policy": HALF_ON_DISK}, r"of gpu memory .* the budget is 16\.0 KiB"),
    ],
)
def test_a_budget_too_small_says_by_how_much(open_llm, options, complaint):
    with pytest.raises(BudgetError, match=complaint) as error:
        open_llm("llama", **options).generate([[5, 6]], GREEDY, use_tqdm=False)
    assert error.value.hint


def test_weights_for_a_gpu_that_is_not_there_are_refused(open_llm):
    policy = Policy(weights=Placement(gpu=0.5, cpu=0.5))
    with pytest.raises(BudgetError, match="no GPU memory"):
        open_llm("llama", policy=policy).generate([[5]], GREEDY, use_tqdm=False)


@pytest.mark.usefixtures("matrices_move")
@pytest.mark.parametrize("gpu_memory", [0, "300KiB"])
def test_the_default_policy_lives_within_small_budgets(open_llm, run, gpu_memory):
    asked = prompts((5, 30, 12, 50))
    llm = open_llm("llama", cpu_memory="700KiB", gpu_memory=gpu_memory)
    tokens = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
    for tier, told in llm.summary()["tiers"].items():
        assert told["peak_bytes"] <= told["budget_bytes"], tier
    assert tokens == tokens_of(run("llama", asked, GREEDY))


def test_longer_prompts_get_a_larger_engine(llm):
    llm.generate(prompts((4, 4)), GREEDY, use_tqdm=False)
    small = llm._engine
    llm.generate(prompts((3,)), GREEDY, use_tqdm=False)
    assert llm._engine is small, "what fits reuses the engine"
    llm._run_seconds = 1000.0  # a long day of the small engine
    (output,) = llm.generate(prompts((90,)), GREEDY, use_tqdm=False)
    assert llm._engine is not small
    assert output.error is None
    summary = llm.summary()
    assert (summary["prompt_tokens"], summary["generated_tokens"]) == (90, 5), "totals are of the engine at hand"
    assert summary["seconds"] < 1000


def test_a_failed_run_does_not_spoil_the_next(open_llm, monkeypatch, matrices_move):
    llm = open_llm("llama", policy=HALF_ON_DISK)
    expected = tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False))

    def fail(*_):
        raise ExecutionError("layer-0000.bin: read failed")

    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_into", fail)
        with pytest.raises(ExecutionError, match="read failed"):
            llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == expected


# What a run leaves behind --------------------------------------------------------------------------------


def test_the_summary_adds_up(open_llm, matrices_move):
    llm = open_llm("llama", policy=HALF_ON_DISK)
    assert llm.summary() == {}
    llm.generate(prompts((5, 9, 20)), GREEDY, use_tqdm=False)
    summary = llm.summary()
    assert (summary["prompt_tokens"], summary["generated_tokens"]) == (34, 15)
    assert summary["seconds"] >= summary["prefill_seconds"] + summary["decode_seconds"] > 0
    assert summary["total_tokens_per_second"] == pytest.approx(49 / summary["seconds"])
    assert set(summary["tiers"]) == {"cpu"}
    cpu = summary["tiers"]["cpu"]
    assert cpu["peak_bytes"] == sum(cpu["by_kind"].values()) <= cpu["budget_bytes"] == 256 << 20
    assert set(summary["lanes"]) == {"cpu", "disk_read"}
    assert summary["lanes"]["disk_read"]["bytes"] > 0
    assert 0 < summary["lanes"]["cpu"]["utilisation"] <= 1
    assert summary["process_peak_bytes"] > 0
    json.dumps(summary)


def test_the_trace_shows_every_lane(open_llm, tmp_path, matrices_move):
    path = tmp_path / "trace.json"
    policy = Policy(
        sequences_in_flight=4,
        attention_micro_batch=2,
        tokens_per_pass=32,
        weights=Placement(0.2, 0.4, 0.4),
        cpu_attention_share=0.5,
    )
    llm = open_llm("llama", policy=policy, gpu_memory="8MiB", trace=path)
    llm.generate(prompts((5, 9, 20)), GREEDY, use_tqdm=False)
    llm.generate(prompts((70,)), GREEDY, use_tqdm=False)  # on a second engine, in the same trace
    llm.close()
    rows = json.loads(path.read_text())["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert set(names.values()) == {lane.value for lane in Lane}
    steps = [row for row in rows if row["ph"] == "X"]
    assert {names[row["tid"]] for row in steps} == {"gpu", "cpu", "h2d", "d2h", "disk_read"}
    assert min(row["ts"] for row in steps) == 0
    assert all(row["dur"] >= 0 for row in steps)
    assert {"read_weights", "copy_weights", "attend", "load_kv", "save_kv", "mlp", "logits"} <= {
        row["name"] for row in steps
    }
    assert any(row["args"].get("gigabytes_per_second") for row in steps)


def test_closing_twice_is_safe(open_llm, tmp_path):
    path = tmp_path / "trace.json"
    llm = open_llm("llama", trace=path)
    llm.generate([[5]], GREEDY, use_tqdm=False)
    llm.close()
    written = path.read_text()
    llm.close()
    assert path.read_text() == written
    open_llm("llama").close()
