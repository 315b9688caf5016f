"""Benchmark harnesses on flexrun: each adapter hands a whole task to one run of the engine."""
