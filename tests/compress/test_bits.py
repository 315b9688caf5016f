"""Which matrices are compressed: rules by the checkpoint's names, most bits for what is packed together."""

from types import SimpleNamespace

import pytest

from flexrun.compress import GroupFormat, WeightBits
from flexrun.errors import ConfigError


def tensor(name, *sources, module="mlp", shape=(8, 8), dtype=None):
    return SimpleNamespace(name=name, sources=sources, module=module, shape=shape, dtype=dtype)


STEM = "model.layers.3."
QKV = tensor("qkv.weight", *(f"{STEM}self_attn.{name}_proj.weight" for name in "qkv"), module="attention")
DOWN = tensor("down.weight", f"{STEM}mlp.down_proj.weight")
GATE_UP = tensor("gate_up.weight", f"{STEM}mlp.gate_proj.weight", f"{STEM}mlp.up_proj.weight")
HEAD = tensor("lm_head.weight", "lm_head.weight", module="head")


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((), [4, 4, 4, 4]),
        (("*.down_proj=8",), [4, 8, 4, 4]),
        (("layers.3.*=16",), [16, 16, 16, 4]),
        (("model.layers.3.mlp.*.weight=8",), [4, 8, 8, 4]),
        (("*.v_proj=8",), [8, 4, 4, 4]),  # one part of three
        (("*.down_proj=8", "layers.3.*=16"), [16, 8, 16, 4]),  # the first that fits
        (("layers.3.*=16", "*.down_proj=8"), [16, 16, 16, 4]),
        (("lm_head=16", "*=8"), [8, 8, 8, 16]),
        (("layers.30.*=16",), [4, 4, 4, 4]),
    ],
)
def test_rules(keep, expected):
    bits = WeightBits(4, keep)
    found = [bits.of(3, each) for each in (QKV, DOWN, GATE_UP, HEAD)]
    assert found == [None if number == 16 else GroupFormat(number) for number in expected]


def test_some_in_few_bits_and_the_rest_as_they_are():
    assert WeightBits(16, ("*.down_proj=4",)).of(3, DOWN) == GroupFormat(4)
    assert WeightBits(16, ("*.down_proj=4",)).of(3, QKV) is None


@pytest.mark.parametrize(
    "stays",
    [
        tensor("token_embedding.weight", "model.embed_tokens.weight", module="embedding"),
        tensor("mlp_norm.weight", f"{STEM}post_attention_layernorm.weight", shape=(8,)),
        tensor("router.weight", f"{STEM}mlp.gate.weight"),
        tensor("kv_b.weight", f"{STEM}self_attn.kv_b_proj.weight", module="attention"),
        tensor("odd.weight", f"{STEM}odd.weight", dtype="float32"),
    ],
)
def test_what_is_not_only_multiplied_by_stays(stays):
    assert WeightBits(4, ("*=4",)).of(3, stays) is None
    with pytest.raises(ConfigError, match="no matrix that can be compressed"):
        WeightBits(16, (f"{stays.sources[0]}=4",)).check([(3, stays), (3, DOWN)])


def test_every_rule_must_fit_something():
    rules = WeightBits(4, ("*.down_proj=8", "*.up_proj=16"))
    rules.check([(3, DOWN), (3, GATE_UP)])
    with pytest.raises(ConfigError, match=r"--keep \*\.up_proj=16"):
        rules.check([(3, DOWN)])
    for bad in ("*.down_proj", "=8", "*.down_proj=5"):
        with pytest.raises(ConfigError, match="PATTERN=BITS"):
            WeightBits(4, (bad,)).check([(3, DOWN)])
