"""Overlap: 13 words in a row, whatever their case and what stands between them."""

from stillroom.doctor.findings import Shared, TaskTexts, grams, overlap

TWELVE = "one two three four five six seven eight nine ten eleven twelve"
THIRTEEN = f"{TWELVE} thirteen"


def test_grams_are_13_words_in_a_row():
    assert list(grams(f"{THIRTEEN} fourteen")) == [THIRTEEN, THIRTEEN.partition(" ")[2] + " fourteen"]
    assert list(grams(TWELVE)) == []


def test_case_and_punctuation_do_not_hide_what_is_shared():
    said = THIRTEEN.upper().replace(" ", ",  “") + "!\n"
    found = overlap([("a", f"Before. {said} After.")], {"quiz": [TaskTexts("q", [THIRTEEN])]})
    assert found.shown == (Shared("a", "quiz", "q", THIRTEEN),)


def test_documents_and_items_are_counted_once_each():
    long = " ".join(f"w{i}" for i in range(40))
    documents = [("same", long), ("part", " ".join(long.split()[10:23])), ("short", TWELVE), ("other", "x " * 50)]
    tasks = {
        "quiz": [
            TaskTexts("whole", [f"{long} yes", f"{long} no"]),
            TaskTexts("other", [THIRTEEN]),
            TaskTexts("short", [TWELVE]),
        ],
        "far": [TaskTexts("far", ["y " * 30])],
    }
    found = overlap(documents, tasks)
    assert (found.num_documents, found.num_shared) == (4, 2)
    assert found.num_items == {"quiz": 3, "far": 1}
    assert found.num_items_shared == {"quiz": 1, "far": 0}
    assert found.num_short == {"quiz": 1, "far": 0}
    assert [one.document for one in found.shown] == ["same", "part"]


def test_words_shared_over_the_border_of_question_and_answer_count():
    question, answer = THIRTEEN.split(" twelve ")
    item = TaskTexts("q", [f"{question} twelve {answer}", f"{question} twelve wrong"])
    assert overlap([("a", THIRTEEN)], {"quiz": [item]}).num_shared == 1
    assert overlap([("a", f"{TWELVE} other")], {"quiz": [item]}).num_shared == 0
