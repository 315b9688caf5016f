import math

import pytest

from flexrun.errors import RequestError, UnsupportedError
from flexrun.sampling import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert params.stop == () and params.stop_token_ids == () and params.seed is None and params.logprobs is None
    assert not params.greedy and not params.penalised


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("n", 10**6),
        ("n", 10**400),
        ("temperature", 10**400),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 4.0),
        ("top_k", 2**63),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("seed", 2**64),
        ("seed", 1.0),
        ("logprobs", -1),
        ("logprobs", True),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e300),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 7),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**63]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
    ],
)
def test_bad_value_is_refused_by_field_name(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.message.startswith(f"{field}=") and len(caught.value.message) < 300
    assert caught.value.hint


def test_greedy_with_several_choices_is_refused():
    with pytest.raises(RequestError, match="n=2"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2, temperature=0.5).n == 2


def test_a_prompt_alone_can_only_be_scored():
    assert SamplingParams(prompt_logprobs=0, max_tokens=0).max_tokens == 0
    with pytest.raises(RequestError, match="max_tokens=0") as caught:
        SamplingParams(max_tokens=0)
    assert "prompt_logprobs" in caught.value.hint
    with pytest.raises(RequestError, match="n=2"):
        SamplingParams(prompt_logprobs=0, max_tokens=0, n=2)
    with pytest.raises(RequestError, match="prompt_logprobs=-1"):
        SamplingParams(prompt_logprobs=-1)


def test_stops_are_normalised_and_params_hashable():
    params = SamplingParams(stop="END", stop_token_ids=[3, 5])
    assert params.stop == ("END",) and params.stop_token_ids == (3, 5)
    assert hash(params) == hash(SamplingParams(stop=["END"], stop_token_ids=(3, 5)))
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_minus_one_seed_means_none():
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=0).seed == 0


def test_greedy_below_the_smallest_temperature():
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_from_dict_overrides_defaults_and_keeps_them_for_null():
    defaults = SamplingParams(temperature=0.0, max_tokens=64, top_p=0.9, seed=5)
    params = SamplingParams.from_dict({"temperature": 0.7, "top_p": None, "max_tokens": None}, "line 1", defaults)
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.7, 0.9, None, 5)
    assert defaults.temperature == 0.0
    assert SamplingParams.from_dict({}, "line 1") == SamplingParams()


def test_from_dict_suggests_the_nearest_name_and_says_where():
    with pytest.raises(RequestError, match=r"line 3: unknown sampling option 'temprature'") as caught:
        SamplingParams.from_dict({"temprature": 1}, "line 3")
    assert "'temperature'" in caught.value.hint
    with pytest.raises(RequestError, match=r"line 4: top_p=2"):
        SamplingParams.from_dict({"top_p": 2}, "line 4")


@pytest.mark.parametrize("option", ["logit_bias", "best_of"])
def test_from_dict_refuses_what_would_run_wrongly(option):
    with pytest.raises(UnsupportedError, match=f"line 9: {option}"):
        SamplingParams.from_dict({option: 2}, "line 9")
