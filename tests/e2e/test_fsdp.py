"""The losses, of logits and of hidden states, where the student step, head and projectors with it, is held in parts by
two processes (FSDP2 over gloo)."""

import subprocess
import sys
from pathlib import Path

import torch


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("fsdp_losses.py"))
    found = {}
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        ranks = [
            subprocess.Popen([sys.executable, script, str(rank), str(world), str(tmp_path / "meet"), str(out)])
            for rank in range(world)
        ]
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world
        found[world] = torch.load(out, weights_only=True)
    torch.testing.assert_close(found[2]["loss"], found[1]["loss"], rtol=1e-6, atol=1e-7)
    names = found[1]["gradients"].keys()
    assert "model.lm_head.weight" in names
    assert sum("projectors" in name for name in names) == 3
    for name in names:
        torch.testing.assert_close(found[2]["gradients"][name], found[1]["gradients"][name], rtol=1e-4, atol=1e-7)
