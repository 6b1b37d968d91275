"""The command line's grammar."""

import pytest

from stillroom.cli.arguments import FLAGS, Arguments, parse
from stillroom.errors import ConfigError

VERBS = ("distill", "merge")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", Arguments()),
        ("distill", Arguments("distill")),
        ("distill r.yaml", Arguments("distill", "r.yaml")),
        ("merge r.yaml steps=3", Arguments("merge", "r.yaml", ["steps=3"])),
        ("distill steps=3 r.yaml out=x", Arguments("distill", "r.yaml", ["steps=3", "out=x"])),
        ("distill a.0.b_c=1", Arguments("distill", None, ["a.0.b_c=1"])),
        ("distill out=a=b", Arguments("distill", None, ["out=a=b"])),
        ("distill steps=", Arguments("distill", None, ["steps="])),
        ("distill a=1 a=2", Arguments("distill", None, ["a=1", "a=2"])),
        ("merge models.qwen2-7b.model=a/b", Arguments("merge", None, ["models.qwen2-7b.model=a/b"])),
        ("distill optimizer.learning-rate=1", Arguments("distill", None, ["optimizer.learning-rate=1"])),
        ("distill ./a=b/r.yaml", Arguments("distill", "./a=b/r.yaml")),
        ("--resume distill r.yaml --quiet", Arguments("distill", "r.yaml", [], {"resume", "quiet"})),
        ("distill --dry-run r.yaml", Arguments("distill", "r.yaml", [], {"dry-run"})),
        ("distill --resume --resume", Arguments("distill", None, [], {"resume"})),
        ("-h", Arguments(None, None, [], {"help"})),
        ("distill --help", Arguments("distill", None, [], {"help"})),
    ],
)
def test_words_find_their_places(line, wanted):
    assert parse(line.split(), VERBS) == wanted


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_may_stand_anywhere(flag):
    for words in ([f"--{flag}", "distill", "r.yaml"], ["distill", f"--{flag}", "r.yaml"]):
        assert parse(words, VERBS) == Arguments("distill", "r.yaml", [], {flag})


@pytest.mark.parametrize(
    ("words", "what", "near"),
    [
        (["distil"], "`distil` is not a verb", "distill"),
        (["mrege", "--resume"], "`mrege` is not a verb", "merge"),
        (["r.yaml"], "`r.yaml` is not a verb", None),
        (["steps=3"], "`steps=3` is not a verb", None),
        ([""], "`` is not a verb", None),
        (["distill", "--resum"], "`--resum` is not a flag", "resume"),
        (["distill", "--dryrun"], "`--dryrun` is not a flag", "dry-run"),
        (["distill", "-x"], "`-x` is not a flag", None),
        (["distill", "--steps=3"], "`--steps=3` is not a flag", None),
        (["distill", "--"], "`--` is not a flag", None),
    ],
)
def test_an_unknown_word_is_refused_with_the_nearest_known(words, what, near):
    with pytest.raises(ConfigError) as caught:
        parse(words, VERBS)
    assert caught.value.what == what
    assert str(caught.value.values.get("did you mean", "")).lstrip("-") == (near or "")
    listed = [names for kind, names in caught.value.values.items() if kind != "did you mean"]
    assert len(listed) == 1
    assert all(name in str(listed[0]) for name in (VERBS if "verb" in what else FLAGS))


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["distill", "a.yaml", "b.yaml"], "b.yaml"),
        (["distill", "a.yaml", "steps", "=", "3"], "steps"),
        (["distill", "a.yaml", "3=4"], "3=4"),
        (["distill", "a.yaml", "=3"], "=3"),
        (["distill", "a.yaml", "objectives.0.weight"], "objectives.0.weight"),
    ],
)
def test_a_second_recipe_is_refused(words, word):
    with pytest.raises(ConfigError) as caught:
        parse(words, VERBS)
    assert caught.value.what == f"`{word}` is neither a setting nor the recipe"
    assert caught.value.values == {"recipe": "a.yaml", "then": word}


def test_a_flag_of_some_verbs_is_refused_by_others():
    assert parse(["doctor", "--json", "r.yaml"], ("distill", "doctor")) == Arguments("doctor", "r.yaml", [], {"json"})
    for words in (["distill", "--json"], ["--json", "distill"]):
        with pytest.raises(ConfigError, match="`distill` has no --json"):
            parse(words, ("distill", "doctor"))


@pytest.mark.parametrize("words", [["--resume", "distill", "--overwrite"], ["--overwrite", "--resume", "distill"]])
def test_resume_and_overwrite_contradict_each_other(words):
    with pytest.raises(ConfigError, match="--resume and --overwrite contradict each other"):
        parse(words, VERBS)
