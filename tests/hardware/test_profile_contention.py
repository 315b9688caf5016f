"""Lanes that disturb each other are found to, and lanes that do not are not."""

import threading
import time

import pytest

from flexrun.hardware.profile_contention import shares, speeds

pytestmark = pytest.mark.timed


class Resource:
    """Something that is half as fast while two use it."""

    def __init__(self):
        self._lock, self._users = threading.Lock(), 0

    def use(self):
        with self._lock:
            self._users += 1
            seconds = 0.002 * self._users
        time.sleep(seconds)
        with self._lock:
            self._users -= 1


def test_a_shared_resource_costs_both():
    shared = Resource()
    calls = {"compute": shared.use, "disk_read": lambda: shared.use(), "h2d": lambda: time.sleep(0.002)}
    kept = shares(calls, [("compute", "disk_read"), ("compute", "h2d")], 0.15)
    assert set(kept) == set(calls) and set(kept["compute"]) == {"disk_read", "h2d"}
    both = kept["compute"]["disk_read"] + kept["disk_read"]["compute"]
    assert 0.9 < both < 1.7  # they overlap most of the time
    assert kept["compute"]["h2d"] > 0.7 and kept["h2d"]["compute"] > 0.7


def test_calls_longer_than_the_time_are_counted_once():
    start_seconds = time.perf_counter()
    assert speeds([lambda: time.sleep(0.05)], 0.001)[0] == pytest.approx(20, rel=0.3)
    assert time.perf_counter() - start_seconds < 1


def test_an_error_of_a_call_is_raised_and_ends_the_others():
    calls = iter([None])

    def fail_later():
        if next(calls, "over") == "over":
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        speeds([lambda: time.sleep(0.001), fail_later], 5.0)

    def fail_at_once():
        raise ValueError("never ran")

    with pytest.raises(ValueError, match="never ran"):
        speeds([lambda: time.sleep(0.001), fail_at_once], 5.0)
    assert threading.active_count() < 20
