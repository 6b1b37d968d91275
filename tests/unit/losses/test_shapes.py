"""The shapes in the annotations of the math layer: checked where asked for, free where not."""

import subprocess
import sys

CHECKED = """
from jaxtyping import install_import_hook
install_import_hook(
    ["stillroom.losses", "stillroom.lm_head", "stillroom.batch", "stillroom.signals"], "beartype.beartype"
)
"""
SETUP = """
import torch
from stillroom.batch import Batch
from stillroom.lm_head import LMHead
from stillroom.losses.block import LogitBlock
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective, position_weights
from stillroom.losses.logits import top1_agreement
from stillroom.signals import Dense

tokens = torch.arange(8).view(2, 4)
batch = Batch(tokens, tokens, tokens > 2, tokens, tokens)
kept = batch.kept
hidden, teacher = torch.randn(8, 3, requires_grad=True), torch.randn(8, 5)
head, teacher_head = LMHead(torch.randn(9, 3), torch.randn(9)), LMHead(torch.randn(12, 5))
objectives = [Objective("a", forward_kl), Objective("b", reverse_kl), Objective("c", cross_entropy)]

def run(hidden=hidden[kept], next_tokens=tokens.flatten()[kept], weights=position_weights(batch, 5)):
    signal = Dense(teacher, teacher_head).at(kept)
    return linear_losses(hidden, head, objectives, next_tokens, weights, signal, measures=[top1_agreement])

def refused(f):
    try:
        f()
    except Exception as error:
        print(type(error).__name__)
    else:
        print("accepted")

block = lambda: LogitBlock(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
"""
RIGHT = "run().total.backward(); print(tuple(hidden.grad.shape), head.logits(hidden).shape[1])"
WRONG = [
    "run(hidden=hidden)",
    "run(hidden=hidden[kept].unsqueeze(0))",
    "run(next_tokens=tokens.flatten())",
    "run(next_tokens=tokens.flatten()[kept].float())",
    "run(weights=position_weights(batch, 5).unsqueeze(-1))",
    "LMHead(torch.randn(9, 3), torch.randn(8))",
    "Batch(tokens, tokens, tokens, tokens, tokens)",
    "Batch(tokens, tokens[:, :3], tokens > 2, tokens, tokens)",
    "LogitBlock(torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, dtype=torch.long))",
    "LogitBlock(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(3, dtype=torch.long))",
    "Dense(teacher, teacher_head).at(kept.float())",
]


def python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wrong_shapes_and_types_are_refused_where_they_are_checked():
    checks = "\n".join(f"refused(lambda: {wrong})" for wrong in WRONG)
    right, *wrong = python(f"{CHECKED}\n{SETUP}\n{RIGHT}\n{checks}")
    assert right == "(8, 3) 9"
    assert dict(zip(WRONG, wrong, strict=True)) == dict.fromkeys(WRONG, "TypeCheckError")


def test_production_does_not_pay_for_checks():
    """Nothing is wrapped, and the checker is not even imported."""
    probe = """
import sys
functions = [linear_losses, forward_kl, reverse_kl.__wrapped__, cross_entropy, top1_agreement, position_weights,
             LogitBlock.__init__, LogitBlock.log_probs, LMHead.logits, Dense.at]
print("beartype" in sys.modules, [hasattr(f, "__wrapped__") for f in functions] == [False] * len(functions))
"""
    assert python(f"{SETUP}\n{RIGHT}\n{probe}") == ["(8, 3) 9", "False True"]
