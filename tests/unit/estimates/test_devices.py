"""Devices: found by name, and never made up."""

import pytest

from stillroom.errors import ConfigError
from stillroom.estimates.hardware import CPU_FLOPS_A_CORE, DEVICES, UTILIZATION, find_device


def test_names_are_read_as_people_write_them():
    assert find_device("rtx 4090") is DEVICES["RTX4090"]
    assert find_device("h100").flops == 989.4e12


def test_the_cpu_is_this_machine_and_has_no_price():
    cpu = find_device("cpu")
    assert cpu.price is None
    assert "this machine" in cpu.note
    assert "48 to 91" in cpu.note


def test_a_cpu_is_as_fast_as_what_was_measured():
    """GFLOP/s a core of five runs in LOG.md, whose plan is right within a factor of 1.7."""
    planned = CPU_FLOPS_A_CORE * UTILIZATION / 1e9
    assert all(1 / 1.7 < planned / reached < 1.7 for reached in (65, 53, 48, 91, 52))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="did you mean: H100"):
        find_device("H10")
    with pytest.raises(ConfigError, match="not in the table"):
        find_device("abacus")
