"""Bits where they are needed: one matrix compressed at a time, and a budget given to those that change most."""

import math

import pytest
from tiny_families import prompts

from flexrun import LLM
from flexrun.compress import GroupFormat, WeightBits
from flexrun.config import Placement, Policy
from flexrun.errors import ConfigError
from flexrun.evals.perplexity import perplexity
from flexrun.evals.sensitivity import average_bits, choose, from_changes, matrices, meet, sensitivities

TEXT = prompts((60,), 3)[0]
LOW, HIGH = GroupFormat(4), GroupFormat(8)
IN_RAM = Policy(sequences_in_flight=4, tokens_per_pass=256)


@pytest.fixture
def open_llm(checkpoint, packed_cache):
    opened = []

    def build(**options):
        given = {"dtype": "float32", "threads": 1, "cpu_memory": "256MiB", "disk_dir": packed_cache}
        opened.append(LLM(checkpoint("llama"), **{**given, **options}))
        return opened[-1]

    yield build
    for llm in opened:
        llm.close()


def test_each_matrix_is_compressed_alone_and_put_back(open_llm):
    llm = open_llm(policy=IN_RAM)
    before = perplexity(llm, TEXT, 20).nats
    done = []
    found = sensitivities(llm, TEXT, 20, LOW, lambda: done.append(1))
    assert [(each.layer, each.tensor) for each in found] == list(matrices(llm.spec)) and len(done) == len(found)
    assert all(each.change > 0 for each in found)
    assert perplexity(llm, TEXT, 20).nats == before
    finer = sensitivities(llm, TEXT, 20, HIGH)
    assert all(fine.change < coarse.change / 10 for fine, coarse in zip(finer, found))
    # the same as a run with this matrix (made of one) alone in few bits
    other = open_llm(policy=IN_RAM, weight_bits=16, keep=[f"{found[1].rule}=4"])
    with llm.compressed(found[1].layer, found[1].tensor.name, LOW):
        assert perplexity(llm, TEXT, 20).nats == pytest.approx(perplexity(other, TEXT, 20).nats, abs=1e-7)


def test_matrices_that_are_streamed_are_refused(open_llm, matrices_move):
    llm = open_llm(policy=Policy(sequences_in_flight=4, weights=Placement(0, 0, 1)))
    with pytest.raises(ConfigError, match="not in RAM"):
        sensitivities(llm, TEXT, 20, LOW)


def test_a_budget_goes_to_those_that_change_most_a_byte(open_llm):
    llm = open_llm(policy=IN_RAM)
    found = sensitivities(llm, TEXT, 20, LOW)
    least, most = (average_bits(llm.spec, WeightBits(bits)) for bits in (4, 8))
    assert choose(found, least, LOW, HIGH) == ()
    everything = choose(found, most, LOW, HIGH)
    assert sorted(everything) == sorted(f"{each.rule}=8" for each in found)
    some = choose(found, (least + most) / 2, LOW, HIGH)
    assert everything[0] in some and 0 < len(some) < len(found)
    assert least < average_bits(llm.spec, WeightBits(4, some)) <= (least + most) / 2
    eight = average_bits(llm.spec, WeightBits(8))
    whole = choose(found, eight + 4, HIGH, None, llm.spec.dtype_bytes)
    assert 0 < len(whole) < len(found) and all(rule.endswith("=16") for rule in whole)
    assert eight < average_bits(llm.spec, WeightBits(8, whole)) <= eight + 4
    assert from_changes(llm.spec, {each.rule: each.change for each in found}) == found
    with pytest.raises(ConfigError, match="4 bits for all take"):
        choose(found, least - 0.1, LOW, HIGH)


def test_as_few_matrices_as_a_loss_allows_get_more_bits(open_llm):
    """What is promised is what a run with these rules loses; one matrix less would lose more."""
    llm = open_llm(policy=IN_RAM)
    plain = perplexity(llm, TEXT, 20).nats
    found = sensitivities(llm, TEXT, 20, LOW)
    order = sorted(found, key=lambda each: -each.change / each.tensor.elements)
    everything, worst = meet(llm, TEXT, 20, found, 4, 1e9)
    assert everything == () and worst > 0
    for bits, share in ((4, 0.5), (4, 1e-5), (8, 1e-7)):
        trials = []
        rules, loss = meet(llm, TEXT, 20, found, bits, share * worst, lambda trials=trials: trials.append(1))
        assert 0 < len(rules) <= len(found) and loss <= share * worst and len(trials) <= 5
        assert [rule.rpartition("=")[0] for rule in rules] == [each.rule for each in order[: len(rules)]]
        other = open_llm(policy=IN_RAM, weight_bits=bits, keep=list(rules))
        assert math.expm1(perplexity(other, TEXT, 20).nats - plain) <= loss + 1e-6
    none, loss = meet(llm, TEXT, 20, found, 4, 0.0)
    assert loss == 0.0 and set(none) == {f"{each.rule}=16" for each in found}
    assert perplexity(llm, TEXT, 20).nats == plain
