"""Devices: found by name, and never made up."""

import pytest

from stillroom.costs.devices import DEVICES, find_device
from stillroom.errors import ConfigError


def test_names_are_read_as_people_write_them():
    assert find_device("rtx 4090") is DEVICES["RTX4090"]
    assert find_device("h100").flops == 989.4e12


def test_the_cpu_is_this_machine_and_has_no_price():
    cpu = find_device("cpu")
    assert cpu.price is None
    assert "this machine" in cpu.note


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="did you mean: H100"):
        find_device("H10")
    with pytest.raises(ConfigError, match="not in the table"):
        find_device("abacus")
