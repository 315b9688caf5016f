"""Perplexity is that of transformers over the same pieces, whatever the policy; a table compares settings."""

import math
from itertools import pairwise

import pytest
import torch
import transformers
from tiny_families import EAGER, prompts

from flexrun import LLM
from flexrun.config import Placement, Policy
from flexrun.errors import ConfigError
from flexrun.evals.perplexity import Perplexity, Setting, compare, format_table, perplexity, windows

CONTEXT = 16
TEXT = prompts((70,), 3)[0]


@pytest.fixture
def open_llm(checkpoint, packed_cache):
    def build(**options):
        given = {"dtype": "float32", "threads": 1, "cpu_memory": "256MiB", "disk_dir": packed_cache}
        return LLM(checkpoint("llama"), **{**given, **options})

    return build


def test_every_token_but_the_first_is_predicted_once():
    pieces = list(windows(TEXT, CONTEXT))
    assert all(len(piece) == CONTEXT for piece in pieces[:-1]) and len(pieces[-1]) >= 2
    assert [token for piece in pieces for token in piece[1:]] == TEXT[1:]
    assert all(first[-1] == second[0] for first, second in pairwise(pieces))
    assert list(windows(TEXT[:31], CONTEXT))[-1] == TEXT[15:31], "no piece of one token is left over"


@pytest.mark.usefixtures("matrices_move")
def test_it_is_that_of_transformers_under_any_policy(open_llm, checkpoint):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32, **EAGER).eval()
    nats = 0.0
    with torch.inference_mode():
        for piece in windows(TEXT, CONTEXT):
            logits = model(torch.tensor([piece])).logits[0, :-1].double()
            nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(piece[1:]).unsqueeze(1)).sum())
    streamed = Policy(sequences_in_flight=2, tokens_per_pass=9, weights=Placement(0, 0.4, 0.6))
    settings = [Setting("auto", {}), Setting("streamed", {"policy": streamed})]
    found = list(compare(open_llm, settings, TEXT, CONTEXT))
    for result in found:
        assert result.tokens == len(TEXT) - 1 and result.matrix_bits == 32
        assert result.nats == pytest.approx(nats / result.tokens, rel=1e-5)
    assert [result.setting for result in found] == ["auto", "streamed"]


def test_fewer_bits_are_counted_and_tell(open_llm):
    settings = [Setting.parse(text) for text in ("", "weight-bits=8", "weight-bits=4", "weight-bits=4 keep=*=8")]
    full, eight, four, kept = compare(open_llm, settings, TEXT, CONTEXT)
    assert 4.5 < four.matrix_bits < 0.7 * eight.matrix_bits < 10  # tiny matrices are padded
    assert kept.nats == eight.nats != four.nats
    assert abs(eight.nats - full.nats) < abs(four.nats - full.nats)


def test_settings_are_read_or_refused_by_name():
    assert [Setting.parse(f"kv-bits={bits}").options for bits in ("4", "k8v4")] == [{"kv_bits": 4}, {"kv_bits": "k8v4"}]
    setting = Setting.parse("keep=layers.0.*=16,*.down_proj=8 weight-bits=4")
    assert setting.options == {"weight_bits": 4, "keep": ["layers.0.*=16", "*.down_proj=8"]}
    assert Setting.parse("policy=a.json").options == {"policy": "a.json"} and Setting.parse("").options == {}
    for text in ("weight-bits=3", "kv-bits=k4v8", "bits=4", "keep=", "weight-bits"):
        with pytest.raises(ConfigError, match="cannot read"):
            Setting.parse(text)


def test_texts_and_contexts_that_predict_nothing_are_refused(open_llm):
    llm = open_llm()
    for token_ids, context, complaint in ((TEXT[:1], 16, "two tokens"), (TEXT, 1, "two tokens"), (TEXT, 10**6, "more")):
        with pytest.raises(ConfigError, match=complaint):
            perplexity(llm, token_ids, context)
    llm.close()


def test_the_table_compares_with_the_first():
    results = [Perplexity("", 10, math.log(8), 16, 2.0), Perplexity("weight-bits=4", 10, math.log(10), 4.5, 1.0)]
    head, first, second = format_table(results).splitlines()
    assert head.split() == ["setting", "bits", "perplexity", "change", "tokens/s"]
    assert first.split() == ["as", "stored", "16.00", "8.0000", "-", "5"]
    assert second.split() == ["weight-bits=4", "4.50", "10.0000", "+25.00%", "10"]
    assert results[1].document()["perplexity"] == pytest.approx(10)
