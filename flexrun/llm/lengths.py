"""The lengths of what was answered: the workload a run turned out to have, to judge its forecast by."""

from __future__ import annotations

from array import array

import numpy

from flexrun.outputs import Request, RequestOutput
from flexrun.prefixes import NONE, Prefixes
from flexrun.workload import Workload, longest_answers_first


class Lengths:
    """Three numbers a sequence, in the order of completion: two lengths, and the prefix that its prompt began with."""

    def __init__(self):
        self._prompt, self._generated, self._prefix = array("q"), array("q"), array("q")
        self._prefixes, self._before = Prefixes(), 0
        self._in_flight: dict[str, int] = {}
        self.cut_short = False  # whether answers under way were given up: what was measured is not all of these

    def __len__(self) -> int:
        return len(self._prompt)

    def begin(self, prefixes: Prefixes) -> None:
        """What comes next shares these."""
        self._before = len(self._prefixes)
        self._prefixes = self._prefixes.joined(prefixes)
        self._in_flight.clear()

    def sent(self, request: Request, prefix: int) -> None:
        """A request, and the prefix that it shares."""
        if prefix != NONE:
            self._in_flight[request.request_id] = prefix + self._before

    def add(self, output: RequestOutput) -> None:
        prefix = self._in_flight.pop(output.request_id, NONE)
        for completion in output.outputs:
            self._prompt.append(len(output.prompt_token_ids))
            self._generated.append(max(len(completion.token_ids), 1))
            self._prefix.append(prefix)

    def workload(self) -> Workload:
        """In the order that a job runs in by default, those that share a prefix together."""
        prompt, generated, prefix = (numpy.array(column) for column in (self._prompt, self._generated, self._prefix))
        order = longest_answers_first(prompt, generated)
        order = order[self._prefixes.order(prefix[order])]
        return Workload(prompt[order], generated[order]).sharing(self._prefixes, prefix[order])
