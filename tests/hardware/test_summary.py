"""The table says what was measured in plain words; warnings name the lane and the remedy."""

from dataclasses import replace

from flexrun.hardware.summary import format_hardware, warnings_of


def test_the_table(machine):
    text = format_hardware(machine)
    assert text.startswith("bench\nfree: GPU 8.0 GiB, RAM 16.0 GiB, disk 0 B\n")
    rows = {" ".join(line.split()) for line in text.splitlines()}
    for row in (
        "cpu bfloat16 matmul 400 GFLOP/s 50 us",
        "gpu float16 decode attention, KV 30 GB/s",
        "disk reads 2 GB/s 100 us 20%",
        "copies to the GPU 12 GB/s 10 us",
        "computing: keeps 90% beside disk reads",
    ):
        assert row in rows, text


def test_lanes_that_are_absent_are_not_shown(machine):
    text = format_hardware(replace(machine, gpu=None, h2d=None, d2h=None, contention={}))
    assert "GPU" not in text and "gpu" not in text and "keeps" not in text


def test_noise_is_warned_about(machine):
    assert warnings_of(machine) == [
        "noisy readings: disk reads (20%); close other programs and measure again",
    ]
    quiet = replace(machine, noise={"disk_read": 0.1, "other programs": 0.02})
    assert warnings_of(quiet) == []
    busy = replace(machine, noise={"other programs": 0.5})
    assert warnings_of(busy) == ["other programs used 50% of the CPU; close other programs and measure again"]
