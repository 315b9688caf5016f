"""The benchmark commands start, measure and report: tiny runs, so that a broken script is found before a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY_WORK = ["--sequences", "4", "--prompt-tokens", "8", "--output-tokens", "3"]


def run(script, *arguments, timeout_seconds=300):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)


def last_json(process):
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def benchmark_modules():
    """The scripts as modules: they import each other by name, as scripts of one folder do."""
    sys.path.insert(0, str(BENCHMARKS))
    import bounds
    import comparison
    import control_group
    import many_lines
    import processes

    yield {module.__name__: module for module in (bounds, comparison, control_group, many_lines, processes)}
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark-model") / "llama-tiny"
    made = run("make_checkpoint.py", "llama-tiny", folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def memory_group(benchmark_modules):
    """MemoryGroup, where this process may make one."""
    control_group = benchmark_modules["control_group"]
    try:
        with control_group.MemoryGroup(1 << 30):
            pass
    except control_group.ControlGroupError as error:
        pytest.skip(str(error))
    return control_group.MemoryGroup


@pytest.mark.parametrize(
    "script", ["cpu_vs_peers.py", "memory_budget.py", "many_lines.py", "workers.py", "four_bits.py"]
)
def test_help(script):
    process = run(script, "--help")
    assert process.returncode == 0 and "usage:" in process.stdout, process.stderr


@pytest.mark.slow
def test_ram_case_reports_ratio_and_bounds(tiny_model, tmp_path):
    pytest.importorskip("transformers")
    process = run(
        *("cpu_vs_peers.py", "--case", "ram-1b", "--model-1b", tiny_model, "--cache-dir", tmp_path, *TINY_WORK),
        *("--rounds", "2", "--batch-sizes", "2", "4", "--peers", "transformers", "--output", tmp_path / "result.json"),
    )
    assert process.returncode == 0, process.stderr
    document = last_json(process)
    assert json.loads((tmp_path / "result.json").read_text()) == document
    (case,) = document["cases"]
    peer = case["peers"]["transformers"]
    assert [entry["settings"]["batch_size"] for entry in peer["sweep"]] == [4, 2]
    assert len(peer["ratios"]) == 2
    for ratio, own, other in zip(peer["ratios"], case["flexrun_runs"], peer["runs"]):
        assert own["generated_tokens"] == other["generated_tokens"] == 4 * 3
        assert ratio == pytest.approx(other["seconds"] / own["seconds"])
    assert 0 < case["bounds"]["compute_ideal_seconds"] < case["bounds"]["wall_seconds"]
    assert case["absent_peers"]["vllm"] == "not asked for"


@pytest.mark.slow
def test_memory_budget_packs_and_runs_inside_its_group(tiny_model, memory_group):
    arguments = ("memory_budget.py", "--model", tiny_model, "--cpu-memory", "6MB", *TINY_WORK)
    process = run(*arguments, "--memory-limit", "900MB", "--check-tokens")
    assert process.returncode == 0, process.stderr
    result = last_json(process)
    assert result["packed_inside"] and all(result["checks"].values())
    assert result["tokens_compared"] == 4 * 3
    assert 0 < result["tier_peak_bytes"] <= result["cpu_memory_bytes"] == 6_000_000
    assert 0 < result["control_group"]["max_usage_bytes"] <= 900_000_000

    starved = run(*arguments, "--memory-limit", "60MB")
    assert starved.returncode == 1
    assert last_json(starved)["checks"] == {"survived": False}


@pytest.mark.slow
def test_many_lines_measures_every_size(tmp_path):
    process = run("many_lines.py", "--lines", "50", "300", "--scratch", tmp_path)
    assert process.returncode == 0, process.stderr
    results = last_json(process)["results"]
    assert [result["lines"] for result in results] == [50, 300]
    assert all(result["run_seconds"] > 0 and result["rss_bytes_peak"] > 1 << 20 for result in results)
    assert list(tmp_path.iterdir()) == []


def test_group_limits_a_process_and_is_removed(memory_group):
    hog = [sys.executable, "-c", "data = bytearray(300 << 20)"]
    with memory_group(100 << 20) as group:
        assert subprocess.run(group.wrap(hog)).returncode == -9
        statistics = group.statistics()
        assert subprocess.run(group.wrap([sys.executable, "-c", "pass"])).returncode == 0
    assert statistics["oom_kills"] == 1
    assert statistics["max_usage_bytes"] is None or 0 < statistics["max_usage_bytes"] <= 100 << 20
    assert not group.folder.exists()


def test_worker_result_is_its_last_json_line(benchmark_modules):
    run_json = benchmark_modules["processes"].run_json
    noise = "print('{not json'); print('{\"engine\": 1}'); print('done')"
    result = run_json([sys.executable, "-c", noise])
    assert result["engine"] == 1 and 0 <= result["outside_cpu_share"] <= 1
    with pytest.raises(benchmark_modules["processes"].RunFailed, match="exit code 3\n  words"):
        run_json([sys.executable, "-c", "import sys; print('words', file=sys.stderr); sys.exit(3)"])


def test_flops_of_a_job_are_those_of_its_tokens(benchmark_modules, tiny_model):
    from flexrun.llm import open_model

    spec = open_model(tiny_model).spec
    layers = spec.num_layers * (spec.flops_per_token("attention") + spec.flops_per_token("mlp"))
    flops = benchmark_modules["bounds"].job_flops(spec, sequences=3, prompt_tokens=5, output_tokens=2)
    # 5 prompt tokens see 1..5 keys, the one decoded token sees 6; each pass ends in one row of logits.
    scores = spec.num_layers * spec.attention_flops_per_token(1)
    assert flops["prefill_flops"] == 3 * (5 * layers + spec.flops_per_token("head") + 15 * scores)
    assert flops["decode_flops"] == 3 * (layers + spec.flops_per_token("head") + 6 * scores)


def test_share_of_bound_uses_the_busiest_lane(benchmark_modules):
    judge = benchmark_modules["comparison"].judge
    bound = {
        "matmul_flops_per_second": {"64": 50.0, "512": 100.0},
        "prefill_flops": 600.0,
        "decode_flops": 400.0,
        "disk": {"bytes_per_second": 10.0},
    }
    lanes = {"disk_read": {"bytes": 300, "busy_seconds": 37.5}}
    result = judge({"seconds": 40.0, "summary": {"lanes": lanes}}, [bound, bound], disk=True)
    assert result["compute_ideal_seconds"] == 10 and result["compute_ideal_seconds_by_rows"] == 14
    assert result["disk_ideal_seconds"] == 30 and result["busiest_lane"] == "disk_read"
    assert result["disk_share_of_rate_while_streaming"] == pytest.approx(0.8)
    assert result["ideal_of_busiest_lane_over_wall"] == 0.75


def test_memory_is_read_at_shares_of_the_answers(benchmark_modules):
    rss_at = benchmark_modules["many_lines"].rss_at
    samples = [(0.0, 10, 0), (0.1, 20, 5), (0.2, 30, 50), (0.3, 40, 95), (0.4, 15, 100)]
    assert (rss_at(samples, 0.1), rss_at(samples, 0.9)) == (30, 40)
    assert rss_at([], 0.1) is None
