"""Hardware: found by what devices call themselves, with figures of one's own."""

from stillroom.config import load
from stillroom.errors import ConfigError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.sections import costs_here


def test_devices_are_known_by_their_own_names():
    for name, known in {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA GeForce RTX 4090": "RTX4090", "cpu": "CPU"}.items():
        found = Hardware.called(name)
        assert found is not None
        assert found.device == known
    assert Hardware.called("Tesla T4") is None
    assert Hardware.called("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_a_device_has_the_memory_that_it_says():
    small = Hardware.called("NVIDIA A100-SXM4-40GB", 42_400_000_000)
    assert small is not None
    assert small.resolved().memory_bytes == 42_400_000_000


def test_figures_of_ones_own_take_the_place_of_the_tables():
    own = load(Hardware, None, ["device=H100", "tflops=700", "memory_gb=94", "price=1.5"]).resolved()
    assert (own.flops, own.memory_bytes, own.price) == (700e12, 94_000_000_000, 1.5)


def test_what_is_assumed_is_said():
    said = " ".join(load(Hardware, None, ["num_devices=2", "states=int8"]).assumptions())
    assert all(word in said for word in ("utilisation", "set price", "8-bit"))


def test_costs_that_are_not_known_are_told_and_are_no_error():
    def costs(_):
        raise ConfigError("the size of the student is not known", {}, why="x", fix="x")

    assert costs_here("cpu", None, costs) == "not told: the size of the student is not known"
    assert costs_here("Abacus", None, costs).startswith("not told: Abacus is not in the table")
