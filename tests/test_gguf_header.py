import gguf
import numpy
import pytest

from flexrun.errors import CheckpointError, UnsupportedError
from flexrun.gguf_header import read_gguf_header


@pytest.fixture
def write(raw_gguf):
    return raw_gguf


def _everything(writer):
    for number, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
        getattr(writer, f"add_{kind}")(f"x.{kind}", number)
    writer.add_float32("x.float32", 0.22)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "Ġü\n")
    writer.add_array("x.strings", ["a", "", "日"])
    writer.add_array("x.floats", [0.5, -1.25])
    writer.add_array("x.ints", [3, -4])
    writer.add_tensor("a", numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    writer.add_tensor("b", numpy.arange(5, dtype=numpy.float16))


def test_it_agrees_with_the_gguf_package(write):
    path = write(_everything)
    header, oracle = read_gguf_header(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.pop("x.float32") == 0.22  # the shortest decimal, not 0.2199999988079071
    assert expected.pop("x.float32") == pytest.approx(0.22)
    assert header.metadata == expected
    for tensor in oracle.tensors:
        found = header.tensors[tensor.name]
        assert found.offset_bytes == tensor.data_offset and found.size_bytes == tensor.n_bytes
        assert found.shape == tuple(reversed(tensor.shape.tolist())) and found.kind == tensor.tensor_type.name


def test_another_alignment(write):
    def build(writer):
        writer.add_custom_alignment(128)
        writer.add_tensor("a", numpy.ones(3, numpy.float32))
        writer.add_tensor("b", numpy.full(3, 2, numpy.float32))

    path = write(build)
    place = read_gguf_header(path).tensors["b"]
    assert place.offset_bytes % 128 == 0
    data = path.read_bytes()[place.offset_bytes : place.offset_bytes + place.size_bytes]
    assert numpy.frombuffer(data, numpy.float32).tolist() == [2, 2, 2]


def test_other_versions_big_endian_and_split_files_are_refused(write):
    path = write(endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="big-endian"):
        read_gguf_header(path)
    path = write()
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="version 1"):
        read_gguf_header(path)
    with pytest.raises(UnsupportedError, match="part of a split"):
        read_gguf_header(write(lambda writer: writer.add_uint16("split.count", 3)))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4" + bytes(40)])
def test_what_is_no_gguf_file(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        read_gguf_header(tmp_path / "x.gguf")


def test_absurd_lengths_are_noticed_before_anything_is_allocated(write):
    path = write(lambda writer: writer.add_array("x.list", ["a", "b"]))
    data = bytearray(path.read_bytes())
    at = data.index(b"x.list") + len(b"x.list") + 8
    data[at : at + 8] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.list.*longer than the file"):
        read_gguf_header(path)
