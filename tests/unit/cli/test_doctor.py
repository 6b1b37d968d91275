"""`stillroom doctor`: what its words mean, and what it prints."""

import pytest

from stillroom.cli.doctor import as_text, items_of
from stillroom.doctor.findings import Finding
from stillroom.doctor.run import PARTS

RECORD = {
    "fit": {"tokenizer": "abcd" * 16, "num_tokens": 300, "template": None, "student_columns": 304,
            "teacher_columns": 320, "stored_columns": None, "columns": 300, "device": "cpu"},
    "data": {"whole": False, "rows": 10, "documents": 9, "cut": 2, "split": 0, "dropped_overlong": 0,
             "dropped_empty": 1, "dropped_cut_away": 0, "tokens": 1000, "tokens_learnt": 600, "looked_at": 9},
    "overlap": {"num_documents": 9, "num_shared": 0, "num_items": {"quiz": 3}, "num_items_shared": {"quiz": 0},
                "num_short": {"quiz": 2}, "shown": []},
    "measures": {"student": "new", "student_parameters": 1000, "student_trained": 1000, "teacher_parameters": 2000,
                 "cross_entropy_nats": 5.7, "teacher_cross_entropy_nats": 2.0, "forward_kl_nats": 3.5,
                 "top1_agreement": 0.125, "accepted_mass": 0.25, "num_tokens": 600},
    "own_text": {"reverse_kl_nats": 0.12, "num_tokens": 512},
    "step": {"rows": 4, "longest_row": 32, "micro_batches": 2, "num_tokens": 100, "num_kept": 60, "loss_nats": 3.5,
             "grad_norm": 1.0, "time_s": 2.0, "num_steps": 5400, "peak_memory_bytes": 3 * 2**30,
             "memory_bytes": 80 * 2**30},
    "findings": [],
    "ready": True,
    "verdict": "ready: nothing found",
}  # fmt: skip


def test_the_table_is_aligned_and_says_everything():
    text = as_text(RECORD)
    *table, _, verdict = text.splitlines()
    assert verdict == "ready: nothing found"
    width = max(len(line.partition("  ")[0]) for line in table if line[0] != " ") + 2
    assert all(line[width - 2 : width] == "  " and line[width] != " " for line in table)
    for part in (
        "300 columns compared (student 304, teacher 320)",
        "10 (the first",
        "2 cut after data.length, 1 left out with nothing to learn",
        "600 of 1,000 (60.0%)",
        "9 begin a document, 391 are of prompts",
        "0 of 9 documents (0.0%)",
        "quiz: 0 of 3 items found; 2 are too short to tell",
        "random weights",
        "teacher 2.0000, student 5.7000 nats a token, over 600 tokens",
        "12.5%",
        "KL from teacher 0.1200 nats a token, over 512 that the student wrote",
        "2.00 s (50 tokens/s); 5,400 steps in about 3.0 hours",
        "3.00 GiB of 80.00 GiB on the device",
    ):
        assert part in text
    assert "loss ratio" not in text, "of random weights it tells nothing"


def test_a_trained_student_has_a_loss_ratio_and_what_is_not_finite_no_number():
    measures = {**RECORD["measures"], "student": "trained", "cross_entropy_nats": 4.0}
    assert "0.500, teacher's over student's" in as_text({**RECORD, "measures": measures})
    assert "student not finite" in as_text({**RECORD, "measures": {**measures, "cross_entropy_nats": None}})


def test_findings_come_in_full_before_the_verdict():
    finding = Finding("error", "fit", "they differ", {"one": 1, "other": 2}, "Because.", "Mend it.")._asdict()
    nothing = dict.fromkeys(PARTS)
    text = as_text({**nothing, "findings": [finding], "ready": False, "verdict": "not ready"})
    assert text == "error: they differ\n  one: 1     other: 2\n  Because.\n  Mend it.\n\nnot ready"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run"], "nothing that could be planned"),
        (["--resume"], "nothing that could be planned"),
        (["sequences=0"], "sequences"),
        (["taks=[a]"], "taks"),
        (["no-such-recipe.yaml"], "not there"),
    ],
)
def test_what_cannot_be_meant(here, words, said):
    assert said in here("doctor", *words, code=2).stderr


def test_other_verbs_have_no_json(here):
    assert "`distill` has no --json" in here("distill", "--json", code=2).stderr


def test_help_explains_its_own_words(here):
    text = here("doctor", "--help").stdout
    assert "sequences" in text
    assert "exit\ncode" in text or "exit code" in text


def test_items_of_every_kind_are_read_with_their_answers(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"q": "How many?", "c": ["one", "two"], "t": 1, "s": "So many drops"}\n')
    kinds = {
        "multiple_choice": ("context: q\nchoices: c\ntarget: t\n", ["How many? one", "How many? two"]),
        "minimal_pairs": ("good: q\nbad: s\n", ["How many?", "So many drops"]),
        "exact_match": ("context: q\ntarget: s\n", ["How many? So many drops"]),
        "last_word": ("text: s\n", ["So many  drops"]),
    }
    for kind, (settings, texts) in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(f"kind: {kind}\nname: {kind}\nitems: items.jsonl\n{settings}")
        name, items = items_of(str(tmp_path / f"{kind}.yaml"))
        assert name == kind
        assert [[text.split() for text in item.texts] for item in items] == [[text.split() for text in texts]]
