"""`stillroom evaluate`: what it prints, and its exit code."""

from stillroom.cli.arguments import Arguments
from stillroom.cli.evaluate import main, summary

RECORD = {
    "config": {"out": "runs/x", "models": {"teacher": {}, "distilled": {}}},
    "metrics": {
        "teacher": {"cross_entropy_nats": 1.5},
        "distilled": {"cross_entropy_nats": 2.25, "top1_agreement": 0.875, "entropy_nats": 1.0},
    },
    "refused": {"distilled": {"forward_kl_nats": "its tokenizer differs", "reverse_kl_nats": "its tokenizer differs"}},
    "differences": [{"what": "cross_entropy_nats", "sentence": "teacher beats distilled by 0.75 nats"}],
    "sentences": ["cross-entropy: teacher beats distilled by 0.75 nats"],
    "tasks": {
        "blimp": {
            "metric": "acc",
            "shots": 0,
            "version": "1",
            "unit": "%",
            "scores": {"teacher": 0.6},
            "normalised": {"teacher": 0.2},
        },
        "wiki": {
            "metric": "ppl",
            "shots": 5,
            "version": "2.0 (lm-eval 0.4.13)",
            "unit": "",
            "scores": {"teacher": 23.4, "distilled": 31.0},
            "normalised": {},
        },
    },
    "failed_tasks": {"mmlu": "no network"},
    "reports": ["runs/x/report.md", "runs/x/report.html"],
}

TEXT = """\
                                                  teacher  distilled
cross-entropy, nats a token                        1.5000     2.2500
same top token as the teacher                           -      87.5%
entropy, nats a token                                   -     1.0000
blimp: acc, 0 shots, version 1                      60.0%          -
blimp: normalised                                   20.0%          -
wiki: ppl, 5 shots, version 2.0 (lm-eval 0.4.13)  23.4000    31.0000

distilled has no KL to the teacher, reverse KL: its tokenizer differs

cross-entropy: teacher beats distilled by 0.75 nats

the task mmlu failed: no network

results   runs/x/results.json
report    runs/x/report.md
report    runs/x/report.html"""


def test_the_summary_of_a_run():
    assert summary(RECORD) == TEXT


def test_a_failed_task_is_the_exit_code(monkeypatch, capsys):
    import stillroom.evaluate.run

    record = dict(RECORD)
    monkeypatch.setattr(stillroom.evaluate.run, "run", lambda *_, **__: record)
    words = ["models.teacher=t", "data={path: d, format: text}", "out=o"]
    assert main(Arguments("evaluate", None, words, {"quiet"})) == 2
    assert capsys.readouterr() == (TEXT + "\n", "")
    record["failed_tasks"] = {}
    assert main(Arguments("evaluate", None, words, {"quiet"})) == 0
