"""What lanes cost each other: each keeps only a share of its speed while another runs on the same cores and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
ROUNDS = 3  # the best of so many: other programs only ever make lanes slower
_LEAST_SHARE = 0.01


def speeds(calls: Sequence[Call], seconds: float) -> list[float]:
    """How often each call runs a second when all run at once for ``seconds``, each on a thread of its own.

    Raises what a call raises.
    """
    results, errors = [0.0] * len(calls), []
    start, end = threading.Barrier(len(calls) + 1), threading.Event()

    @torch.inference_mode()
    def loop(place: int) -> None:
        call = calls[place]
        try:
            call()
            start.wait()
            count, first_seconds = 0, time.perf_counter()
            while not count or not end.is_set():
                last_seconds = time.perf_counter()
                call()
                count += 1
            if count > 1:  # the last call may have ended after the others
                results[place] = (count - 1) / (last_seconds - first_seconds)
            else:
                results[place] = 1 / (time.perf_counter() - first_seconds)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            start.abort()
            end.set()

    threads = [threading.Thread(target=loop, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    try:
        start.wait()
        end.wait(seconds)
    except threading.BrokenBarrierError:
        pass
    finally:
        end.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def shares(calls: dict[str, Call], pairs: Sequence[tuple[str, str]], seconds: float) -> dict[str, dict[str, float]]:
    """contention[a][b] of each pair of named lanes, both ways; ``seconds`` is spent on each lane and each pair."""

    def best(*names: str) -> list[float]:
        rounds = [speeds([calls[name] for name in names], seconds / ROUNDS) for _ in range(ROUNDS)]
        return [max(each) for each in zip(*rounds)]

    alone = {name: best(name)[0] for name in calls}
    kept: dict[str, dict[str, float]] = {}
    for pair in pairs:
        for name, beside, speed in zip(pair, reversed(pair), best(*pair)):
            kept.setdefault(name, {})[beside] = min(max(speed / alone[name], _LEAST_SHARE), 1.0)
    return kept
