"""`stillroom prune`: what it prints of a finished cut."""

from stillroom.cli.prune import summary

RECORD = {"config": {"out": "runs/x"}, "report": "layers          2 of 3: 0, 2"}


def test_the_summary_of_a_cut():
    assert summary(RECORD) == "model           runs/x/model\nlayers          2 of 3: 0, 2"
    held_out = {"model_cross_entropy_nats": 1.25, "cut_cross_entropy_nats": 2.5, "num_tokens": 4096}
    assert summary({**RECORD, "held_out": held_out}).splitlines()[2:] == [
        "held out        cross-entropy 1.2500 nats before, 2.5000 after, with no training (4,096 tokens)"
    ]
