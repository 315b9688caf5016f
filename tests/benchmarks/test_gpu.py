"""The GPU benchmark on the emulated accelerator: every part runs, and a wrong number or token does not go unseen."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexrun import Hardware
from flexrun.core import Lane

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
LAPTOP = ROOT / "configs" / "hardware" / "laptop-cpu.json"
EMULATED = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--hardware", str(LAPTOP)]


@pytest.fixture(scope="module")
def modules():
    """The scripts as modules: they import each other by name, as scripts of one folder do."""
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_checks
    import gpu_offload
    import gpu_peers
    import gpu_report

    yield {module.__name__: module for module in (gpu_checks, gpu_offload, gpu_peers, gpu_report)}
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def small_model(modules, tmp_path_factory):
    from make_checkpoint import make_checkpoint

    return make_checkpoint("llama-small", tmp_path_factory.mktemp("small") / "model", "float32")


def test_the_whole_command_on_an_emulated_accelerator(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--scratch",
        str(tmp_path / "s"),
    ]
    command += ["--peers", "flexgen", "--policy-stride", "30", "--models", "llama-small"]
    command += ["--sequences", "8", "--prompt-tokens", "12", "--output-tokens", "3", "--output", str(tmp_path / "r.md")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert results["checks"]["passed"] and results["checks"]["policies"] >= 4
    assert [row["case"] for row in results["cases"]] == [
        "llama-small, weights offloaded to RAM",
        "llama-small, weights offloaded to disk",
    ]
    for row in results["cases"]:
        assert row["tokens_per_second"] == pytest.approx(8 * 3 / row["seconds"])
        assert row["tiers"]["gpu"]["peak_bytes"] <= row["gpu_memory_bytes"] == 3 << 20
        assert row["policy"]["weights"]["gpu"] < 1, "a budget below the weights is what this is about"
        assert row["share_of_bound"] == pytest.approx(max(row["bound_seconds"].values()) / row["seconds"])
        (peer,) = row["peers"]
        assert peer["skipped"] in ("not installed (pip install flexgen)", "needs a CUDA GPU")
    assert results["cases"][1]["policy"]["weights"]["disk"] > 0
    text = (tmp_path / "r.md").read_text()
    assert "72 of 72 comparisons" in text and "llama-small, weights offloaded to disk | 8 x 12+3" in text
    assert not list((tmp_path / "s").glob("*-bfloat16")), "checkpoints are gone"


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--scratch", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "--device cpu --tiny" in process.stderr


def test_time_that_is_up_leaves_cases_out_in_words(tmp_path):
    command = [*EMULATED, "--scratch", str(tmp_path)]
    command += ["--policy-stride", "99", "--minutes", "0.01", "--places", "RAM"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    cases = json.loads(process.stdout.splitlines()[-1])["cases"]
    assert [row["skipped"] for row in cases] == ["the time was up"] * 2


def test_wrong_attention_is_found(modules, monkeypatch):
    checks, attend = modules["gpu_checks"], modules["gpu_checks"].attend

    def shifted(query, keys, values, segments, *, out, **form):
        attend(query, keys, values, segments, out=out, **form)
        out[-1] += 0.05

    monkeypatch.setattr(checks, "FORMS", checks.FORMS[2:3])
    assert all(check.passed for check in checks.attention_checks(torch.device("cpu")))
    monkeypatch.setattr(checks, "attend", shifted)
    failed = {check.name[:17] for check in checks.attention_checks(torch.device("cpu")) if not check.passed}
    assert "attention float32" in failed


def test_wrong_decoder_is_found(modules, small_model, monkeypatch):
    from flexrun.models import ops

    right, norm = modules["gpu_checks"].decoder_checks(small_model, torch.device("cpu")), ops.rms_norm
    assert all(check.passed for check in right)

    def wrong(x, weight, eps, offset=0.0, out=None):
        return norm(x, weight, 1e-2 if x.dtype is not torch.float64 else eps, offset, out)

    monkeypatch.setattr(ops, "rms_norm", wrong)
    found = list(modules["gpu_checks"].decoder_checks(small_model, torch.device("cpu")))
    assert not all(check.passed for check in found)


def test_policies_cover_every_tier_and_share(modules):
    chosen = modules["gpu_checks"].policies()
    assert len(set(chosen)) == len(chosen)
    for tier in ("gpu", "cpu", "disk"):
        assert {getattr(policy.kv, tier) == 1 for policy in chosen} == {True, False}
        assert {getattr(policy.weights, tier) == 1 for policy in chosen} == {True, False}
    for half in (True, False):
        shares = {policy.cpu_attention_share for policy in chosen if policy.half_batches is half and policy.kv.cpu == 1}
        assert shares == {0.0, 0.5, 1.0}
    for policy in chosen:
        policy.check_runnable()


def test_a_token_that_differs_is_found_unless_it_was_a_tie(modules):
    checks = modules["gpu_checks"]
    expected = checks.Answers([[1, 2, 3], [4, 5, 6]], [[1.0, 1.0, 1.0], [1.0, 1e-6, 1.0]])
    assert checks.first_difference(expected, checks.Answers([[1, 2, 3], [4, 9, 9]], [])) is None
    words = checks.first_difference(expected, checks.Answers([[1, 2, 7], [4, 5, 6]], []))
    assert words.startswith("prompt 0, token 2: 3 became 7")


def test_the_bound_is_what_the_busiest_lane_needs(modules):
    hardware = Hardware.load(LAPTOP)
    seconds = {Lane.GPU: 2.0, Lane.H2D: 100.0, Lane.DISK_READ: 0.5}
    plan = SimpleNamespace(forecast=SimpleNamespace(lane_seconds=seconds))
    rate = hardware.disk_read.bytes_per_second
    lanes = {"disk_read": {"bytes": 3 * rate}, "h2d": {"bytes": 0}, "gpu": {"flops": 1}}
    bounds = modules["gpu_offload"].bound_seconds(lanes, hardware, plan)
    assert bounds == {"gpu": 2.0, "h2d": 0.0, "disk_read": pytest.approx(3.0)}


def test_flexgen_gets_what_its_budget_holds(modules):
    sizes = modules["gpu_peers"].flexgen_sizes
    budget, weights, kv = 8e9, 13e9, 140e6
    micro_batch, count, on_gpu = sizes(False, 512, budget, weights, kv)
    assert on_gpu == 0 and 0.35 * budget < micro_batch * count * kv <= 0.5 * budget
    micro_batch, count, on_gpu = sizes(True, 512, budget, weights, kv)
    assert (micro_batch, count) == (48, 10) and on_gpu * weights / 100 <= 0.4 * budget
    assert sizes(True, 5, budget, weights, kv)[:2] == (5, 1)


def test_peers_that_cannot_run_say_why(modules):
    absent = modules["gpu_peers"].absent
    if absent("flexgen", "opt-6.7b", "cuda") is None:
        assert absent("flexgen", "llama-3.1-8b", "cuda") == "runs OPT only, not llama-3.1-8b"
    assert absent("flexgen", "opt-6.7b", "cpu") is not None


@pytest.mark.slow
def test_accelerate_runs_beside_us(tmp_path):
    pytest.importorskip("accelerate")
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--scratch",
        str(tmp_path / "s"),
    ]
    command += ["--peers", "accelerate", "--policy-stride", "99", "--models", "opt-small"]
    command += ["--sequences", "8", "--prompt-tokens", "12", "--output-tokens", "3"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    for row in json.loads(process.stdout.splitlines()[-1])["cases"]:
        (peer,) = row["peers"]
        assert peer["generated_tokens"] == 8 * 3 and peer["tokens_per_second"] > 0, peer
