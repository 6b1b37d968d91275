"""`stillroom distill`: what it prints of a finished run."""

from stillroom.cli.arguments import Arguments
from stillroom.cli.distill import main, summary

RECORD = {
    "config": {"out": "runs/x"},
    "student": {"num_parameters": 1234567},
    "steps": 300,
    "num_kept": 98765,
    "time_s": 61.6,
}


def test_the_summary_of_a_run():
    assert summary(RECORD) == "model     runs/x/model (1,234,567 parameters)\ntrained   300 steps, 98,765 tokens, 62 s"


def test_the_summary_tells_what_was_held_out():
    held_out = {"loss_nats": 1.5, "cross_entropy_nats": 2.25, "top1_agreement": 0.5, "num_tokens": 4096}
    assert summary({**RECORD, "held_out": held_out}).splitlines()[2:] == [
        "held out  loss 1.5000, cross entropy 2.2500, top1 agreement 0.5000 (4,096 tokens; nats)"
    ]


def test_flags_reach_the_run_and_only_results_reach_stdout(tmp_path, monkeypatch, capsys):
    import stillroom.distill.run

    told = {}

    def run(config, *, resume, overwrite, report):
        told.update(steps=config.steps, resume=resume, overwrite=overwrite)
        report("note", {"text": "at work"})
        return RECORD

    monkeypatch.setattr(stillroom.distill.run, "run", run)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "student: {model: s}\ndata: {path: d, format: text, length: 8}\nobjectives: [{kind: cross_entropy}]\n"
        "steps: 10\nbatch: {tokens: 64}\noptimizer: {learning_rate: 1e-3}\nout: o\n"
    )
    assert main(Arguments("distill", str(recipe), ["steps=7"], {"resume"})) == 0
    assert told == {"steps": 7, "resume": True, "overwrite": False}
    assert capsys.readouterr() == (summary(RECORD) + "\n", "at work\n")

    assert main(Arguments("distill", str(recipe), [], {"overwrite", "quiet"})) == 0
    assert told == {"steps": 10, "resume": False, "overwrite": True}
    assert capsys.readouterr() == (summary(RECORD) + "\n", "")
