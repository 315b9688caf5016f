"""Hand-written CPU kernels for what lies between the matmuls, where torch leaves memory bandwidth unused.

The C sources beside this file are built by setup.py as an optional extension. Every function takes torch tensors and
returns False where the kernels do not apply (no library, another dtype, device or layout): the caller then uses torch.
``FLEXRUN_NATIVE=0`` in the environment switches all of them off; the path of a library loads that one (and only it).
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import torch  # before the library: both then share torch's OpenMP threads

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATION = {"silu": 0, "gelu_tanh": 1}
# the structs of kernels.h
_NORM = struct.Struct("@4P8q3fi").pack
_GATED = struct.Struct("@3P5q2i").pack
_ROPE = struct.Struct("@3P5qi").pack
_ATTENTION = struct.Struct("@6P13q2fi").pack
_GROUPWISE = struct.Struct("@2P4q4i").pack  # of groupwise.h
_CODED = struct.Struct("@P3q2i").pack  # of coded.h
_PRODUCT = struct.Struct("@3P3qi").pack  # what follows the matrix
ROWS_AT_ONCE = 192  # of x, that share weights brought back from codes: MOST_INPUTS of groupwise.c
_LAYOUT = 5  # of dispatch.c: a library of other sources would misread the structs


def _load():
    wanted = os.environ.get("FLEXRUN_NATIVE", "1")
    if wanted == "0":
        return None
    paths = sorted(Path(__file__).parent.glob("_kernels*.so")) if wanted == "1" else [wanted]
    for path in paths:
        try:
            library = ctypes.CDLL(str(path))
            if library.flexrun_layout() != _LAYOUT:
                continue
        except (OSError, AttributeError):
            continue
        library.flexrun_select.argtypes = [ctypes.c_char_p]
        library.flexrun_select.restype = ctypes.c_char_p
        for name in ("flexrun_rms_norm", "flexrun_gated", "flexrun_rope"):
            function = getattr(library, name)
            function.argtypes = [ctypes.c_char_p, ctypes.c_int]
            function.restype = None
        for name in ("flexrun_attend", "flexrun_prefill"):
            function = getattr(library, name)
            function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
            function.restype = ctypes.c_int
        coded = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        library.flexrun_attend_coded.argtypes = coded
        library.flexrun_attend_coded.restype = ctypes.c_int
        library.flexrun_decode_codes.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        library.flexrun_decode_codes.restype = None
        library.flexrun_multiply_codes.argtypes = [ctypes.c_char_p, ctypes.c_int]
        library.flexrun_multiply_codes.restype = ctypes.c_int
        return library
    return None


_library = _load()
available = _library is not None
if available:
    instruction_set = _library.flexrun_select(None).decode()
    _rms_norm, _gated, _rope, _attend, _prefill = (
        _library.flexrun_rms_norm,
        _library.flexrun_gated,
        _library.flexrun_rope,
        _library.flexrun_attend,
        _library.flexrun_prefill,
    )
else:
    instruction_set = "none"


def select(name: str | None) -> bool:
    """Use the kernels of an instruction set (portable, avx2, avx512, avx512_vnni or avx512_bf16), or None: the best.

    False, and no change, where the library or the CPU lacks it.
    """
    global instruction_set
    chosen = available and _library.flexrun_select(None if name is None else name.encode())
    if chosen:
        instruction_set = chosen.decode()
    return bool(chosen)


def _code(*tensors) -> int | None:
    """The kernels' number of the dtype that all tensors share, or None where they cannot be passed."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu or tensor.stride(-1) != 1:
            return None
    return _DTYPE.get(dtype)


def rms_norm(hidden, weight, eps: float, offset: float, out, branch=None, scale: float = 1.0) -> bool:
    """``out = rms_norm(hidden) * (weight + offset)`` over the last dimension, after ``hidden += scale * branch``.

    hidden, out: [T, H] or [T, heads, D], strided; branch: [T, H]; weight: [H] or None. ``out`` may be ``hidden``.
    """
    if not available:
        return False
    code = _code(hidden, out)
    dimensions = hidden.dim()
    if code is None or not 2 <= dimensions <= 3 or out.shape != hidden.shape:
        return False
    if weight is not None and (weight.dtype != hidden.dtype or not weight.is_contiguous()):
        return False
    stride, out_stride = hidden.stride(), out.stride()
    shape = hidden.shape
    branch_pointer = branch_stride = 0
    if branch is not None:
        if dimensions != 2 or branch.shape != shape or _code(hidden, branch) is None:
            return False
        branch_pointer, branch_stride = branch.data_ptr(), branch.stride(0)
    packed = _NORM(
        hidden.data_ptr(),
        out.data_ptr(),
        branch_pointer,
        0 if weight is None else weight.data_ptr(),
        shape[0],
        shape[1] if dimensions == 3 else 1,
        shape[-1],
        stride[0],
        stride[1] if dimensions == 3 else 0,
        out_stride[0],
        out_stride[1] if dimensions == 3 else 0,
        branch_stride,
        eps,
        offset,
        scale,
        code,
    )
    _rms_norm(packed, torch.get_num_threads())
    return True


def gated_activation(gate_up, kind: str, out) -> bool:
    """``out = act(gate) * up`` of gate_up [T, 2I] (gate first), out [T, I]; kind: silu or gelu_tanh."""
    if not available:
        return False
    activation, code = _ACTIVATION.get(kind), _code(gate_up, out)
    if activation is None or code is None or gate_up.dim() != 2:
        return False
    rows, width = out.shape
    if gate_up.shape[0] != rows or gate_up.shape[1] != 2 * width:
        return False
    stride, gate = gate_up.stride(0), gate_up.data_ptr()
    up = gate + width * gate_up.element_size()
    packed = _GATED(gate, up, out.data_ptr(), rows, width, stride, stride, out.stride(0), activation, code)
    _gated(packed, torch.get_num_threads())
    return True


def apply_rope(x, cosine, sine) -> bool:
    """Rotate x [T, heads, D] in place, channel ``c < half`` with ``c + half``; cosine, sine: float32 [T, half]."""
    if not available:
        return False
    code = _code(x)
    half = cosine.shape[-1]
    if code is None or x.dim() != 3 or 2 * half > x.shape[2] or cosine.shape != (x.shape[0], half):
        return False
    if cosine.dtype != torch.float32 or sine.dtype != torch.float32 or sine.shape != cosine.shape:
        return False
    if not (cosine.is_contiguous() and sine.is_contiguous()):
        return False
    stride, shape = x.stride(), x.shape
    packed = _ROPE(
        x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), shape[0], shape[1], half, stride[0], stride[1], code
    )
    _rope(packed, torch.get_num_threads())
    return True


def attend(
    query,
    keys,
    values,
    out,
    segments_pointer: int,
    count: int,
    scale,
    window,
    softcap,
    long=False,
    lse=None,
    sinks=None,
) -> bool:
    """Causal attention of ``count`` segments; shapes as in flexrun.attention.attend, which checks them.

    segments_pointer: address of ``Segments.table``, int64 [5, count], in bounds.
    long: by the kernel for many query rows a segment (bfloat16 with AVX512-bf16 only), else by the one that reads KV
    once for few.
    """
    if not available:
        return False
    code = _code(query, keys, values, out)
    if code is None or query.shape[2] % 16:
        return False
    packed = _attention(query, keys, values, out, window, scale, softcap, lse, sinks, code)
    kernel = _prefill if long else _attend
    return kernel(packed, segments_pointer, count, torch.get_num_threads()) == 0


def _attention(query, keys, values, out, window, scale, softcap, lse, sinks, code: int) -> bytes:
    query_stride, out_stride, key_stride, value_stride = query.stride(), out.stride(), keys.stride(), values.stride()
    return _ATTENTION(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        query_stride[0],
        query_stride[1],
        out_stride[0],
        out_stride[1],
        0 if lse is None else lse.stride(0),
        key_stride[0],
        key_stride[1],
        value_stride[0],
        value_stride[1],
        query.shape[1],
        keys.shape[1],
        query.shape[2],
        window,
        scale,
        softcap,
        code,
    )


def attend_coded(query, records, recent, form, table_pointer: int, count: int, options: dict, out, lse=None) -> bool:
    """Attention of ``count`` sequences of one query row each over compressed KV; see flexrun.offload.coded_kv.

    recent: [2, rows, heads, head_dim], the newest keys and values of all places. form: a KVFormat. table_pointer: of
    int64 [5, count]: query row, first record, records, first recent row, recent rows (one at least).
    options: scale, window, softcap and sinks, as for ``attend``.
    """
    if not available:
        return False
    code = _code(query, recent, out)
    if code is None or query.shape[2] % 16 or not records.is_contiguous():
        return False
    packed = _attention(query, *recent, out, lse=lse, code=code, **options)
    sizes = form.record_bytes, form.key_bytes, form.value_bytes, form.key_bits, form.value_bits
    coded = _CODED(records.data_ptr(), *sizes)
    return _library.flexrun_attend_coded(packed, coded, table_pointer, count, torch.get_num_threads()) == 0


def _groupwise(codes, factors, rows: int, columns: int, bits: int, group: int, code: int) -> bytes:
    shift, symmetric = group.bit_length() - 1, factors.shape[2] == 1
    pointers = codes.data_ptr(), factors.data_ptr()
    return _GROUPWISE(*pointers, rows, columns, codes.shape[1], factors.shape[1], shift, bits, symmetric, code)


def dequantise(codes, factors, bits: int, group: int, out) -> bool:
    """A compressed matrix brought back to ``out`` [rows, columns]; codes, factors: see flexrun.compress.groupwise."""
    if not available or not codes.is_cpu or not out.is_contiguous():
        return False
    code = _code(out)
    if code is None:
        return False
    matrix = _groupwise(codes, factors, *out.shape, bits, group, code)
    _library.flexrun_decode_codes(matrix, out.data_ptr(), torch.get_num_threads())
    return True


def multiplies(codes, dtype) -> bool:
    """Whether ``multiply`` takes a compressed matrix where ``codes`` are, for rows of that dtype."""
    return available and codes.is_cpu and dtype in _DTYPE


def multiply(x, codes, factors, bits: int, group: int, bias, out, x_bits: int = 16) -> bool:
    """``out = x @ weights.T + bias`` with a compressed matrix: x [T, K], bias [N] or None, out [T, N] of one dtype.

    x_bits: 8 rounds x before, see flexrun.compress.GroupwiseMatrix.
    """
    if not available or not codes.is_cpu or x.dim() != 2 or out.dim() != 2:
        return False
    code = _code(x, out)
    if code is None or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous())):
        return False
    product = _groupwise(codes, factors, out.shape[1], x.shape[1], bits, group, code) + _PRODUCT(
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.stride(0),
        out.stride(0),
        x_bits,
    )
    return _library.flexrun_multiply_codes(product, torch.get_num_threads()) == 0
