import subprocess
import sys

import numpy as np
from scipy import stats

from flexrun.sampling import resolve_seed, uniforms


def test_own_seed_wins_and_wraps_to_64_bits():
    assert resolve_seed(7, job_seed=0, request_key="a") == 7
    assert resolve_seed(-2, job_seed=0, request_key="a") == 2**64 - 2


def test_derived_seed_depends_on_job_and_request_and_not_on_the_process():
    seeds = {resolve_seed(None, job, key) for job in (0, 1, 11) for key in ("a", "b", "1a", "line-1")}
    assert len(seeds) == 12
    code = "from flexrun.sampling import resolve_seed; print(resolve_seed(None, 3, 'line-7'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == resolve_seed(None, 3, "line-7")


def test_uniforms_are_pinned():
    """A resumed job must meet the numbers of the version that began it: changing them is a breaking change."""
    drawn = uniforms([0, 1, 2**64 - 1], [0, 0, 3], [0, 5, 1000])
    assert drawn.dtype == np.float64
    np.testing.assert_array_equal(drawn, [0.13870941014555427, 0.1358523770556529, 0.9234643141878413])


def test_uniforms_are_uniform_along_every_coordinate_and_uncorrelated():
    count = 20_000
    run, zero = list(range(count)), [0] * count
    along_step, along_choice, along_seed = (
        uniforms(zero, zero, run),
        uniforms(zero, run, zero),
        uniforms(run, zero, zero),
    )
    for drawn in (along_step, along_choice, along_seed):
        assert drawn.min() >= 0.0 and drawn.max() < 1.0
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(along_step, along_seed)[0, 1]) < 0.03
    assert abs(np.corrcoef(along_step, along_choice)[0, 1]) < 0.03


def test_a_number_does_not_depend_on_its_neighbours():
    together = uniforms([4, 5, 6], [0, 1, 2], [9, 8, 7])
    alone = [uniforms([seed], [choice], [step])[0] for seed, choice, step in ((4, 0, 9), (5, 1, 8), (6, 2, 7))]
    np.testing.assert_array_equal(together, alone)
