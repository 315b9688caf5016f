"""The lengths of what was answered: the workload a run turned out to have, to judge its forecast by."""

from __future__ import annotations

from array import array

import numpy

from flexrun.outputs import RequestOutput
from flexrun.workload import Workload


class Lengths:
    """Two numbers a sequence, in the order of completion."""

    def __init__(self):
        self._prompt, self._generated = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._prompt)

    def add(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            self._prompt.append(len(output.prompt_token_ids))
            self._generated.append(max(len(completion.token_ids), 1))

    def workload(self) -> Workload:
        """Longest first, as a job runs by default."""
        prompt, generated = numpy.array(self._prompt), numpy.array(self._generated)
        order = numpy.argsort(-(prompt + generated), kind="stable")
        return Workload(prompt[order], generated[order])
