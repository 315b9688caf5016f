"""The decode attention kernel against float64 over shapes, strides, threads and instruction sets."""

import attention_oracle
import pytest
import torch
from attention_oracle import oracle

from flexrun import native
from flexrun.attention import Segments


def make(query_lens, kv_lens, num_heads, num_kv_heads, head_dim, dtype, query_position=None):
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
    return attention_oracle.make(query_lens, kv_lens, query_position=query_position, **sizes)


def run(query, keys, values, segments, scale=0.2, window=0, softcap=0.0, sinks=None, lse=None):
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    pointer, count = segments.pointer, len(segments)
    assert native.attend(query, keys, values, out, pointer, count, scale, window, softcap, False, lse, sinks)
    return out


def check(tensors, tolerance, **options):
    options = {"scale": 0.2} | options
    lse = torch.full(tensors[0].shape[:2], float("nan"))
    result = run(*tensors, **options, lse=lse)
    expected, expected_lse = oracle(*tensors, **options)
    torch.testing.assert_close(result.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=5e-6, atol=5e-6)
    assert torch.equal(result, run(*tensors, **options))


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("thread_count", [1, 2, 3])
def test_head_dims(instruction_set, dtype, tolerance, head_dim, thread_count):
    torch.set_num_threads(thread_count)
    check(make([1, 1, 3], [37, 301, 71], 8, 2, head_dim, dtype), tolerance, scale=head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_tensors_that_lie_apart(instruction_set, dtype, tolerance, head_dim):
    """Strides that are no multiples of anything, addresses that are aligned to nothing but their dtype."""
    query, keys, values, segments = make([1, 2], [67, 33], 8, 2, head_dim, dtype)

    def apart(tensor, margin):
        tokens, heads, width = tensor.shape
        wide = torch.full((tokens, heads + 1, width + margin), float("nan"), dtype=dtype)
        wide[:, :heads, 1 : 1 + width] = tensor
        return wide[:, :heads, 1 : 1 + width]

    check((apart(query, 3), apart(keys, 5), apart(values, 7), segments), tolerance, scale=head_dim**-0.5)


@pytest.mark.parametrize("options", [{}, {"window": 6}], ids=str)
def test_a_part_of_the_kv(instruction_set, threads, dtype, tolerance, options):
    positions = [-9, -3, -1, 0, 6, 19, 20, 24, 25, 26, 900, 5]
    tensors = make([3] * len(positions), [20] * 11 + [0], 4, 2, 32, dtype, positions)
    check(tensors, tolerance, **options)


@pytest.mark.parametrize("position", [-2, 600, 699, 5000])
def test_a_part_of_the_kv_split_over_threads(instruction_set, threads, position):
    tensors = make([2], [700], 8, 4, 64, torch.float32, [position])
    check(tensors, {"rtol": 2e-6, "atol": 2e-6})


@pytest.mark.parametrize("heads", [(3, 3), (6, 3), (9, 3), (5, 1), (14, 2)], ids=str)
def test_groups(instruction_set, dtype, tolerance, heads):
    check(make([1, 1, 2], [1, 33, 129], *heads, 32, dtype), tolerance)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 50}, {"window": 700}, {"softcap": 5.0},
                                     {"window": 33, "softcap": 0.7}], ids=str)  # fmt: skip
def test_windows_and_soft_caps(instruction_set, dtype, tolerance, options):
    check(make([1, 8, 1, 5], [900, 260, 31, 5], 4, 2, 32, dtype), tolerance, scale=0.4, **options)


@pytest.mark.parametrize("sink", [-200.0, -3.0, 0.0, 2.5, 200.0])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_sinks(instruction_set, threads, dtype, tolerance, sink, options):
    tensors = make([1, 8, 1, 5], [900, 260, 31, 5], 6, 2, 64, dtype)
    check(tensors, tolerance, sinks=torch.linspace(sink - 1, sink + 1, 6), **options)


def test_sinks_of_rows_that_see_nothing(instruction_set, dtype, tolerance):
    tensors = make([3, 2], [20, 0], 4, 2, 32, dtype, [-1, 4])
    check(tensors, tolerance, sinks=torch.tensor([0.5, -1.0, float("-inf"), 3.0]))


@pytest.mark.parametrize("kv_len", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 513, 1025])
def test_every_kind_of_tail(instruction_set, kv_len):
    check(make([1], [kv_len], 4, 2, 32, torch.float32), {"rtol": 2e-6, "atol": 2e-6})


def test_short_prefills_are_causal(instruction_set, dtype, tolerance):
    check(make([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], 6, 2, 48, dtype), tolerance)


def test_threads_do_not_change_a_bit(instruction_set, threads, dtype):
    tensors = make([1, 1, 4, 1], [3000, 17, 700, 256], 8, 2, 64, dtype)
    result = run(*tensors)
    torch.set_num_threads(1)
    assert torch.equal(result, run(*tensors))


def test_company_does_not_change_a_bit(instruction_set, threads, dtype):
    query, keys, values, segments = make([1, 1, 4, 1], [3000, 17, 700, 256], 8, 2, 64, dtype)
    together = run(query, keys, values, segments)
    for row in segments.rows:
        alone = run(query, keys, values, Segments(*([value] for value in row)))
        rows = slice(row[0], row[0] + row[1])
        assert torch.equal(together[rows], alone[rows])


def test_large_scores_do_not_overflow(instruction_set, dtype, tolerance):
    query, keys, values, segments = make([1, 1], [200, 40], 4, 2, 32, dtype)
    check((query * 30, keys, values, segments), tolerance | {"atol": 2 * tolerance["atol"]}, scale=1.0)


def test_not_applicable_is_false(instruction_set):
    def call(head_dim=32, dtype=torch.float32, spread=1):
        query = torch.zeros(1, 2, head_dim * spread, dtype=dtype)[..., ::spread]
        slab = torch.zeros(4, 1, head_dim, dtype=dtype)
        segments = Segments([0], [1], [0], [4])
        return native.attend(
            query, slab, slab, torch.zeros(1, 2, head_dim, dtype=dtype), segments.pointer, 1, 1.0, 0, 0.0
        )

    assert call()
    assert not call(head_dim=20)
    assert not call(dtype=torch.float64)
    assert not call(spread=2)
