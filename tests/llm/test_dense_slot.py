"""Where no kernel multiplies by codes, as on a GPU, a step of several calls makes each of its matrices dense once."""

import pytest
from tiny_families import prompts

from flexrun import SamplingParams, native
from flexrun.compress import GroupwiseMatrix
from flexrun.config import Placement, Policy
from flexrun.offload.modules import Modules
from flexrun.steps import StepKind

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
MATRICES = {StepKind.ATTENTION_INPUTS: 1, StepKind.ATTENTION_OUTPUT: 1, StepKind.MLP: 2}


@pytest.fixture
def steps(monkeypatch):
    """(kind, rows, matrices made dense as a whole, products with a compressed one) of every step that multiplies."""
    found, dense, products = [], [], []
    run, dequantised, multiply = Modules.run, GroupwiseMatrix.dequantised, GroupwiseMatrix.multiply

    def noted(self, step):
        before = len(dense), len(products)
        run(self, step)
        if step.kind in MATRICES:
            found.append((step.kind, step.rows, len(dense) - before[0], len(products) - before[1]))

    monkeypatch.setattr(Modules, "run", noted)
    monkeypatch.setattr(GroupwiseMatrix, "dequantised", lambda *of: dense.append(of) or dequantised(*of))
    monkeypatch.setattr(GroupwiseMatrix, "multiply", lambda *of: products.append(of) or multiply(*of))
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_is_made_dense_once_for_all_calls_of_a_step(run, steps, monkeypatch, bits):
    policy = Policy(
        sequences_in_flight=3,
        tokens_per_pass=24,
        attention_micro_batch=2,
        token_micro_batch=7,
        weights=Placement(0.3, 0.3, 0.4),
    )
    asked, options = prompts((5, 23, 12)), {"policy": policy, "gpu_memory": "64MiB", "weight_bits": bits}
    expected = [output.outputs[0].token_ids for output in run("llama", asked, GREEDY, **options)]
    assert not any(dense for _, _, dense, _ in steps), "kernels of the CPU multiply by codes"
    steps.clear()
    monkeypatch.setattr(native, "available", False)
    assert [output.outputs[0].token_ids for output in run("llama", asked, GREEDY, **options)] == expected
    assert {rows > 7 for _, rows, _, _ in steps} == {True, False}
    for kind, rows, dense, products in steps:
        assert (dense, products) == ((MATRICES[kind], 0) if rows > 7 else (0, MATRICES[kind])), (kind, rows)
