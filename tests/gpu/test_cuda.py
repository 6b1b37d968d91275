"""What a CUDA device computes, against the CPU in float64. Run by `make gpu`; skipped where there is none."""

import pytest
import torch

from stillroom.batch import Batch
from stillroom.lm_head import LMHead
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.fused_linear import kernel_terms, linear_losses
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.signals import Dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

OBJECTIVES = (
    Objective("forward_kl", forward_kl, 0.6, {"temperature": 2.0}),
    Objective("reverse_kl", reverse_kl, 0.3),
    Objective("cross_entropy", cross_entropy, 0.1),
)


def problem(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Dense, torch.Tensor]:
    """Hidden states, weight, bias, signal and next tokens, rounded to ``dtype`` and equal on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(dtype).to(device)

    hidden, weight, bias = normal(300, 64), normal(5000, 64, size=0.3), normal(5000)
    signal = Dense(normal(300, 96), LMHead(normal(5100, 96, size=0.3), softcap=30.0))
    return hidden, weight, bias, signal, torch.randint(5000, (300,), generator=generator).to(device)


def losses_and_gradients(inputs, softcap: float | None, **options):
    hidden, weight, bias, signal, labels = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    weights = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    head = LMHead(leaves[1], leaves[2], scale=0.9, softcap=softcap)
    result = linear_losses(leaves[0], head, OBJECTIVES, labels, weights, signal, vocab_size=4990, **options)
    result.total.backward()
    return result.total, result.nats, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1 << 28])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_losses_and_gradients_equal_float64_on_the_cpu(dtype, tolerance, chunk_bytes, softcap):
    """Without a softcap by the kernel, with one on tensors."""
    rounded = problem(dtype, "cpu")
    by_kernel = kernel_terms(OBJECTIVES, [], rounded[3], dtype=torch.float32, device=torch.device("cuda"))
    assert by_kernel is not None
    wanted = losses_and_gradients([x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else
                                   Dense(x.hidden.double(), LMHead(x.head.weight.double(), softcap=30.0)) if
                                   isinstance(x, Dense) else x for x in rounded], softcap)  # fmt: skip
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = losses_and_gradients(problem(dtype, "cuda"), softcap, chunk_bytes=chunk_bytes)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    for a, b in zip(found, wanted, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error <= tolerance
    assert (found[1] >= 0).all()


def test_kept_positions_travel_with_the_batch():
    loss_mask = torch.tensor([[True, False, True]])
    zeros = torch.zeros(1, 3, dtype=torch.long)
    batch = Batch(zeros, zeros, loss_mask, zeros, zeros).to("cuda")
    assert batch.kept.tolist() == [0, 2]
    assert batch.kept.is_cuda


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_the_device_trains(precision, tmp_path, saved_model):
    import json

    from stillroom.config import load
    from stillroom.distill.config import DistillConfig
    from stillroom.distill.run import run

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Drop {i} falls, and {i + 1} follow it."}) + "\n" for i in range(64)))
    words = [
        f"teacher={{kind: model, model: {saved_model('llama')}}}",
        "student.init={kind: config, settings: {num_hidden_layers: 1}}",
        f"data={{path: {text}, format: text, length: 32}}",
        "objectives=[{kind: forward_kl}]",
        "batch.tokens=128",
        "optimizer.learning_rate=1e-2",
        "device=cuda",
        f"precision={precision}",
        f"out={tmp_path / 'run'}",
    ]
    losses: list[float] = []

    def report(event, values):
        if event == "step":
            losses.append(values["loss_nats"])

    record = run(load(DistillConfig, None, [*words, "steps=8"]), report=report)
    assert record["status"] == "done"
    assert record["peak_cuda_bytes"] > 0
    assert losses[-1] < losses[0]
