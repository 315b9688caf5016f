"""Policy and Placement: what they accept, what they refuse, and the JSON document."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexrun.config import Placement, Policy
from flexrun.errors import ConfigError, UnsupportedError


@given(st.floats(0, 1), st.floats(0, 1))
def test_fractions_that_sum_to_one_are_accepted(first, second):
    low, high = sorted((first, second))
    placement = Placement(low, high - low, 1 - high)
    assert placement.gpu + placement.cpu + placement.disk == pytest.approx(1)


@pytest.mark.parametrize(
    ("fractions", "complaint"),
    [
        ((0.5, 0.5, 0.5), "do not sum to 1"),
        ((0.0, 0.0, 0.0), "do not sum to 1"),
        ((-0.1, 1.1, 0.0), "gpu=-0.1 is outside"),
        ((0.0, 1.5, -0.5), "cpu=1.5 is outside"),
        ((float("nan"), 1.0, 0.0), "gpu=nan is outside"),
    ],
)
def test_other_fractions_are_refused(fractions, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Placement(*fractions)


@pytest.mark.parametrize(
    "name", ["sequences_in_flight", "tokens_per_pass", "attention_micro_batch", "token_micro_batch"]
)
@pytest.mark.parametrize("value", [0, -3, 2.0, "8", True, None])
def test_counts_are_whole_and_positive(name, value):
    with pytest.raises(ConfigError, match=name):
        Policy(**{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_kv_tokens_are_whole(value):
    with pytest.raises(ConfigError, match="kv_tokens"):
        Policy(kv_tokens=value)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_the_attention_share_is_a_fraction(share):
    with pytest.raises(ConfigError, match="cpu_attention_share"):
        Policy(cpu_attention_share=share)


@pytest.mark.parametrize(
    ("planned", "named"),
    [
        ({"hidden": Placement(0.5, 0.3, 0.2)}, "hidden states on disk"),
    ],
)
def test_what_is_planned_but_not_run_is_refused_by_name(planned, named):
    Policy().check_runnable()
    with pytest.raises(UnsupportedError, match=named) as error:
        Policy(**planned).check_runnable()
    assert error.value.hint


def test_kv_is_split_by_token_beside_a_device_and_not_where_it_is_latent():
    with pytest.raises(ConfigError, match="kv_device_tokens_share"):
        Policy(kv_device_tokens_share=1.5)
    policy = Policy(kv_device_tokens_share=0.5)
    policy.check_runnable()
    for settings, named in (({"on_device": False}, "there is none"), ({"latents": True}, "latent KV by token")):
        with pytest.raises(UnsupportedError, match=named) as error:
            policy.check_runnable(**settings)
        assert "kv_device_tokens_share to 0" in error.value.hint


def test_hidden_states_leave_a_device_and_no_cpu():
    policy = Policy(hidden=Placement(0.5, 0.5))
    policy.check_runnable(on_device=True)
    with pytest.raises(UnsupportedError, match="hidden states off the CPU"):
        policy.check_runnable(on_device=False)


@pytest.mark.parametrize("bits", [3, "4", "k4v8", [8, 4], None])
def test_kv_bits_are_sixteen_eight_four_or_two_of_them(bits):
    assert [Policy(kv_bits=each).key_value_bits for each in (16, 8, "k8v4", 4)] == [None, (8, 8), (8, 4), (4, 4)]
    with pytest.raises(ConfigError, match="kv_bits"):
        Policy(kv_bits=bits)


def test_compressed_kv_is_refused_where_it_is_not_run():
    policy = Policy(kv_bits=4)
    for on_device in (False, True):
        policy.check_runnable(on_device=on_device)
        with pytest.raises(UnsupportedError, match="latent KV") as error:
            policy.check_runnable(on_device=on_device, latents=True)
        assert "kv_bits to 16" in error.value.hint


def test_activations_are_rounded_on_a_cpu_only():
    policy = Policy(weight_bits=8, activation_bits=8)
    policy.check_runnable(on_device=True)
    with pytest.raises(UnsupportedError, match="activations on a GPU"):
        policy.check_runnable(on_device=True, on_gpu=True)
    with pytest.raises(ConfigError, match="activation_bits"):
        Policy(activation_bits=4)


def test_bits_are_sixteen_eight_or_four():
    with pytest.raises(ConfigError, match="weight_bits"):
        Policy(weight_bits=3)


def test_a_policy_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().tokens_per_pass = 3


def test_the_document_round_trips(tmp_path):
    policy = Policy(
        sequences_in_flight=7,
        tokens_per_pass=99,
        attention_micro_batch=3,
        token_micro_batch=11,
        kv_tokens=1234,
        weights=Placement(0.25, 0.25, 0.5),
        kv=Placement(0.5, 0.5, 0.0),
        cpu_attention_share=0.75,
    )
    path = tmp_path / "policy.json"
    path.write_text(policy.to_json())
    assert Policy.from_json(path) == policy
    assert Policy.from_json(str(path)) == policy
    path.write_text("{}")
    assert Policy.from_json(path) == Policy()


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("{", "is not JSON", None),
        (b"\xff\xfe\x00", "is not JSON", None),
        ("[1]", "expected an object, got list", None),
        ('{"token_per_pass": 1}', "unknown key 'token_per_pass'", "did you mean 'tokens_per_pass'?"),
        ('{"weights": {"gpus": 1}}', "weights: unknown key 'gpus'", "did you mean 'gpu'?"),
        ('{"weights": {"gpu": 0.5}}', "do not sum to 1", "must add up to 1"),
        ('{"weights": 0.5}', "weights: expected an object, got float", None),
        ('{"kv": null}', "kv: expected an object, got NoneType", None),
        ('{"weights": {"gpu": "half"}}', "weights: ", None),
        ('{"sequences_in_flight": 0}', "sequences_in_flight=0", None),
    ],
)
def test_a_bad_document_is_a_config_error(tmp_path, text, complaint, hint):
    path = tmp_path / "policy.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        Policy.from_json(path)
    assert complaint in error.value.message
    if hint is not None:
        assert hint in error.value.hint


def test_an_absent_document_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Policy.from_json(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.from_json(tmp_path)


def test_the_document_is_plain_json():
    assert json.loads(Policy().to_json())["weights"] == {"gpu": 0.0, "cpu": 1.0, "disk": 0.0}


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("configs/policies/*.json")), ids=lambda p: p.stem
)
def test_the_policies_that_come_along_can_be_read(path):
    assert Policy.from_json(path).sequences_in_flight >= 1
