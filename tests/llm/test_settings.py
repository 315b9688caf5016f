"""Settings that cannot work are refused when the model is opened, each with its remedy."""

from __future__ import annotations

import pytest

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.llm import LLM


@pytest.mark.parametrize(("name", "value"), [("max_num_seqs", 0), ("threads", -2), ("disk_dir", "/dev/null/disk_dir")])
def test_settings_that_cannot_work_have_a_remedy(checkpoint, name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        LLM(checkpoint("llama"), **{name: value})
    assert caught.value.hint


def test_unknown_devices_are_refused_by_name(checkpoint):
    with pytest.raises(UnsupportedError, match="device='tpu'"):
        LLM(checkpoint("llama"), device="tpu")
