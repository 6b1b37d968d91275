"""Errors: four parts, each also the standard library's own type."""

import importlib.util

import pytest

from stillroom import errors
from stillroom.errors import MissingError, StillroomError, require


def test_the_four_parts_are_printed_in_order():
    error = StillroomError("two things differ", {"here": 1, "there": "b"}, why="It matters.", fix="Change one.")
    assert str(error) == "two things differ\n  here: 1     there: b\n  It matters.\n  Change one."
    assert (error.what, error.values, error.why, error.fix) == (
        "two things differ",
        {"here": 1, "there": "b"},
        "It matters.",
        "Change one.",
    )


def test_long_values_get_a_line_each():
    error = StillroomError("w", {"here": "a" * 60, "there": "b" * 60}, why="y", fix="f")
    assert str(error).splitlines() == ["w", f"  here: {'a' * 60}", f"  there: {'b' * 60}", "  y", "  f"]


@pytest.mark.parametrize("values", [None, {}])
def test_an_error_without_values_has_no_empty_line(values):
    assert str(StillroomError("w", values, why="y", fix="f")) == "w\n  y\n  f"


def test_values_are_a_copy():
    values = {"here": 1}
    error = StillroomError("w", values, why="y", fix="f")
    values["here"] = 2
    assert error.values == {"here": 1}


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("ConfigError", ValueError),
        ("DataError", ValueError),
        ("MismatchError", ValueError),
        ("MissingError", FileNotFoundError),
        ("StorageError", OSError),
        ("NonFiniteError", ArithmeticError),
        ("OutOfMemoryError", MemoryError),
        ("LostError", ConnectionError),
        ("ReportedElsewhere", errors.StillroomError),
    ],
)
def test_each_error_is_the_standard_type_too_and_says_all_four_parts(name, standard):
    error = getattr(errors, name)("what", {"a": 1, "b": 2}, why="why", fix="fix")
    assert isinstance(error, StillroomError)
    assert isinstance(error, standard)
    assert str(error) == "what\n  a: 1     b: 2\n  why\n  fix"


def test_every_error_class_of_the_module_is_covered_above():
    found = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, StillroomError)}
    assert found == {
        "StillroomError",
        "ConfigError",
        "DataError",
        "MismatchError",
        "MissingError",
        "StorageError",
        "NonFiniteError",
        "OutOfMemoryError",
        "LostError",
        "ReportedElsewhere",
    }


def test_an_interrupt_is_no_error_that_an_except_clause_swallows():
    assert issubclass(errors.Interrupted, KeyboardInterrupt)
    assert not issubclass(errors.Interrupted, Exception)


def test_require_is_silent_where_the_package_is_there():
    assert require("json", "extra", "anything") is None


def test_require_says_what_to_install_and_for_what(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingError) as caught:
        require("wandb", "tracking-extra", "tracking=[wandb]")
    assert str(caught.value).splitlines() == [
        "the package `wandb` is not installed",
        "  needed for: tracking=[wandb]",
        "  It is optional, so that those who do not use it need not install it.",
        '  Install it with `pip install "stillroom[tracking-extra]"`.',
    ]
