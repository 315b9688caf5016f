"""The example runs as its first lines say, on fewer machines and sizes."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "policy_tuning.py"


def test_the_example_compares_machines_and_draws_what_memory_brings(monkeypatch, capsys, tmp_path):
    script = runpy.run_path(str(SCRIPT))
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "MACHINES", ("t4-gcp-208gb", "rtx-4090"))
    monkeypatch.setitem(main.__globals__, "GPU_GIB", (1, 8, 24))
    monkeypatch.setattr("sys.argv", ["policy_tuning.py", "--out", str(tmp_path / "plot.svg")])
    main()
    told = capsys.readouterr().out
    assert told.count("tokens/s") == 5
    rates = [float(line.split()[2]) for line in told.splitlines() if " GiB " in line and "tokens/s" in line]
    assert len(rates) == 3 and 0 < rates[1] < rates[2] and rates[0] < rates[1]
    assert "<svg" in (tmp_path / "plot.svg").read_text()
