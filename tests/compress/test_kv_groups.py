"""Records of a compressed KV cache: every value within half a step of its group, in exactly the bytes that are told."""

from __future__ import annotations

import math

import pytest
import torch

from flexrun.compress import GROUP_TOKENS, KVFormat, dequantise_kv, quantise_kv
from flexrun.errors import ExecutionError

BITS = [(8, 8), (4, 4), (8, 4), (4, 8)]


def round_trip(keys, values, form):
    records = torch.full((len(keys), form.record_bytes), 255, dtype=torch.uint8)  # what was there before goes
    quantise_kv(keys, values, form, records)
    back = dequantise_kv(records, form, torch.float32).unflatten(1, (-1, GROUP_TOKENS))
    return records, back[0], back[1]


def half_steps(plane, dim, bits):
    """Half a step of each value's group, were its range divided evenly; float16 factors make it slightly more."""
    low, high = plane.amin(dim, keepdim=True), plane.amax(dim, keepdim=True)
    ulp = torch.maximum(low.abs(), high.abs()) * 2**-10 + 2**-24  # of the minimum, rounded down to float16
    step = ((high - low + ulp) / (2**bits - 1)) * (1 + 2**-10) + 2**-24
    return 0.5 * step + 1e-6 * torch.maximum(low.abs(), high.abs())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 10])
@pytest.mark.parametrize("size", [1.0, 1e-6, 3e4])
def test_each_value_comes_back_within_half_a_step_of_its_group(bits, head_dim, size):
    torch.manual_seed(0)
    form = KVFormat(*bits, 3, head_dim)
    planes = torch.randn(2, 5, GROUP_TOKENS, 3, head_dim).clamp(-2, 2) * size / 2
    planes[:, 1] = 0.25 * size  # constant groups
    planes[:, 2] = 0
    planes[0, 3, :, :, 1] *= 2  # a channel of large keys
    _, *back = round_trip(*planes, form)
    for plane, found, dim, plane_bits in zip(planes, back, (1, 3), bits):
        assert ((found - plane).abs() <= half_steps(plane, dim, plane_bits)).all()
        assert (found[2] == 0).all()
        assert ((found[1] - plane[1]).abs() <= plane[1].abs() * 2**-10 + 2**-24).all()


def test_a_channel_of_large_keys_costs_the_others_nothing_and_a_large_token_of_values_neither():
    form = KVFormat(4, 4, 1, 16)
    keys, values = torch.randn(2, 1, GROUP_TOKENS, 1, 16)
    keys[..., 3] *= 1000
    values[:, 5] *= 1000
    _, found_keys, found_values = round_trip(keys, values, form)
    others = [channel for channel in range(16) if channel != 3]
    assert (found_keys - keys)[..., others].abs().max() < 0.25
    tokens = [token for token in range(GROUP_TOKENS) if token != 5]
    assert (found_values - values)[:, tokens].abs().max() < 0.25


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_what_it_says(bits):
    """Codes are where the words and bytes of the format put them: kernels read them from there."""
    form = KVFormat(*bits, 2, 32)
    levels = [2**each - 1 for each in bits]
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randint(0, level + 1, (1, GROUP_TOKENS, 2, 32), generator=generator).float() for level in levels
    )
    keys[0, :2], values[..., :2] = torch.tensor([0.0, levels[0]]).view(2, 1, 1), torch.tensor([0.0, levels[1]])
    records, *_ = round_trip(keys, values, form)
    all_keys = records.numpy()[0, : 2 * form.key_bytes].reshape(2, -1)
    all_values = records.numpy()[0, 2 * form.key_bytes :].reshape(2, -1)
    key_bytes = form.key_bytes - 32 * 4
    for head in range(2):
        for token in range(GROUP_TOKENS):
            for channel in range(32):
                if bits[0] == 8:
                    code = all_keys[head][channel * 64 + token]
                else:
                    word = all_keys[head][channel // 2 * 64 :].view("<u4")[token % 16]
                    code = word >> (4 * (token // 16) + 16 * (channel % 2)) & 15
                assert code == keys[0, token, head, channel]
                own = all_values[head]
                if bits[1] == 8:
                    code = own[channel // 16 * 1024 + token * 16 + channel % 16]
                else:
                    word = own[channel // 16 * 512 + token // 8 * 64 :].view("<u4")[channel % 16]
                    code = word >> (4 * (token % 8 // 2) + 16 * (token % 2)) & 15
                assert code == values[0, token, head, channel]
        assert (all_keys[head][key_bytes : key_bytes + 64].view("<f2") == 1).all(), "scales of the channels"
    assert form.record_bytes == records.shape[1] and form.key_bytes % 64 == form.value_bytes % 64 == 0


def test_bits_an_element():
    for head_dim, most in ((64, 4.5), (80, 4.5), (128, 4.4), (256, 4.4)):
        form = KVFormat(4, 4, 8, head_dim)
        assert 8 * form.token_bytes / (2 * 8 * head_dim) <= most
    assert KVFormat(8, 4, 8, 128).token_bytes * 8 / (2 * 8 * 128) < 6.5


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (-math.inf, "NaN or infinite"), (7e4, "beyond")])
@pytest.mark.parametrize("plane", ["keys", "values"])
def test_what_no_group_can_hold_is_refused_by_name(value, said, plane):
    form = KVFormat(4, 4, 1, 16)
    planes = {"keys": torch.randn(2, GROUP_TOKENS, 1, 16), "values": torch.randn(2, GROUP_TOKENS, 1, 16)}
    planes[plane][1, 7, 0, 3] = value
    with pytest.raises(ExecutionError, match=f"layer 4: {plane} .*{said}"):
        quantise_kv(
            planes["keys"], planes["values"], form, torch.empty(2, form.record_bytes, dtype=torch.uint8), "layer 4"
        )
