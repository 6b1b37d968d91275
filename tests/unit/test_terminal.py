"""What is said, logged and warned of: without secrets, and without what a terminal would obey."""

import json
import logging
import warnings

import pytest

from stillroom.cli.progress import Progress
from stillroom.terminal import guard_logs, say

EVIL = "\x1b[2J\u202ea\x9b1m https://me:hunter2@h/x"
SAID = "\\x1b[2J\\u202ea\\x9b1m https://***@h/x"


@pytest.mark.parametrize("error", [False, True])
def test_what_is_said_is_harmless_and_holds_no_secret(capsys, error):
    say(EVIL, error=error)
    assert capsys.readouterr() == (("", SAID + "\n") if error else (SAID + "\n", ""))


def test_json_that_is_said_is_read_back(capsys):
    values = {"a\x1b": ["\u202e\x9bé\n", "https://h/x", "me@h"], "b": {"c": "🙂"}}
    say(json.dumps(values, indent=1))
    assert json.loads(capsys.readouterr().out) == values


def test_what_libraries_log_and_warn_of_is_harmless(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler()
    try:
        guard_logs()
        logger = logging.Logger("of a library")
        logger.addHandler(handler)
        logger.warning("unused weights: %s", EVIL)
        assert warnings.formatwarning(EVIL, UserWarning, "x.py", 1, "y").startswith(f"x.py:1: UserWarning: {SAID}\n")
    finally:
        logging.setLogRecordFactory(before)
    assert capsys.readouterr().err == f"unused weights: {SAID}\n"


@pytest.mark.parametrize("live", [False, True])
def test_progress_is_harmless(capsys, monkeypatch, live):
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    with Progress() as progress:
        progress("note", {"text": EVIL})
        progress("task", {"task": f"{EVIL}\n", "model": EVIL, "done": 1, "total": 1})
    err = capsys.readouterr().err
    assert err.startswith(f"{SAID}\n")
    assert err.count("\\x1b[2J") == 3
    assert not set(err) & set("\x9b\u202e")
    assert "\x1b[2J" not in err
