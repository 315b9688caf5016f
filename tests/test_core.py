"""Sizes as text, strict configuration, and errors that carry their remedy."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexrun.core import EventLog, align_up, format_bytes, nearest_name, parse_bytes, strict_dataclass
from flexrun.errors import ConfigError, FlexrunError, RequestError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1", 1),
        ("17B", 17),
        ("1k", 1024),
        ("1 KiB", 1024),
        ("1KB", 1000),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512mb", 512 * 10**6),
        ("1GiB", 1 << 30),
        ("1g", 1 << 30),
        ("1.5GB", 1_500_000_000),
        (" .5 Gi ", 1 << 29),
        ("2TiB", 2 << 40),
        (4096, 4096),
        (1.5e9, 1_500_000_000),
        ("100000000000", 100_000_000_000),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "1X", "GiB 1", "1,5GB", "-1G", -1, True, None, float("nan"), float("inf")])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError) as error:
        parse_bytes(text)
    assert "8GiB" in error.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 40, "3.00 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written(count, text):
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 45))
def test_a_written_size_is_read_as_about_the_same(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.06)


@given(st.integers(0, 1 << 40), st.sampled_from([1, 64, 4096]))
def test_align_up_is_the_next_multiple(count, alignment):
    aligned = align_up(count, alignment)
    assert aligned % alignment == 0
    assert count <= aligned < count + alignment


@dataclass(frozen=True)
class Inner:
    depth: int = 0


@dataclass(frozen=True)
class Outer:
    width: int
    inner: Inner = field(default_factory=Inner)


def test_a_strict_dataclass_takes_nested_mappings():
    assert strict_dataclass(Outer, {"width": 3, "inner": {"depth": 4}}, "file") == Outer(3, Inner(4))
    assert strict_dataclass(Outer, {"width": 3, "inner": Inner(5)}, "file") == Outer(3, Inner(5))


@pytest.mark.parametrize(
    ("values", "complaint", "hint"),
    [
        ({"widht": 3}, "file: unknown key 'widht'", "did you mean 'width'?"),
        ({"zzz": 3}, "file: unknown key 'zzz'", "known names: inner, width"),
        ({"width": 1, "inner": {"deph": 3}}, "file.inner: unknown key 'deph'", "did you mean 'depth'?"),
        ({"width": 1, "inner": 0.5}, "file.inner: expected an object, got float", None),
        ({}, "file: ", None),
        ([1], "file: expected an object, got list", None),
    ],
)
def test_a_strict_dataclass_says_what_is_wrong(values, complaint, hint):
    with pytest.raises(ConfigError) as error:
        strict_dataclass(Outer, values, "file")
    assert error.value.message.startswith(complaint)
    assert error.value.hint == hint


def test_nearest_name_suggests_or_lists():
    assert nearest_name("wieghts", ["kv", "weights"]) == "did you mean 'weights'?"
    assert nearest_name("q", ["kv", "weights"]) == "known names: kv, weights"


def test_errors_print_their_remedy():
    assert str(FlexrunError("it broke")) == "it broke"
    assert str(FlexrunError("it broke", "mend it")) == "it broke\n\nhint: mend it"
    assert RequestError("bad").code == "invalid_request"
    assert RequestError("long", code="context_length_exceeded").code == "context_length_exceeded"


def test_an_event_log_keeps_the_first_events(monkeypatch):
    monkeypatch.setattr(EventLog, "MOST_EVENTS", 3)
    log = EventLog()
    for number in range(5):
        log.append(number)
    assert log == [0, 1, 2]
