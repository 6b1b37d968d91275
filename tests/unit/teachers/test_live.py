"""The live teacher: frozen, in evaluation mode, without gradients."""

import torch

from conftest import build_batch, build_model
from stillroom.teachers.live import LiveTeacher


def test_a_teacher_never_trains():
    model = build_model("gpt2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = LiveTeacher(model)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    batch = build_batch(20, 9)
    with torch.enable_grad():
        signal = teacher.forward(batch).signal
    assert not signal.hidden.requires_grad
    assert not signal.head.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_teacher_has_no_dropout():
    """gpt2 drops a tenth of its hidden states where it trains."""
    model = build_model("gpt2")
    assert model.config.resid_pdrop > 0
    batch = build_batch(20, 9)
    teacher = LiveTeacher(model.train())
    state = torch.get_rng_state()
    one, two = (teacher.forward(batch).signal.hidden for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_signal_is_of_the_kept_positions():
    model = build_model("gemma2")
    batch = build_batch(20, 9, 31)
    with torch.no_grad():
        own = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[batch.loss_mask]
    signal = LiveTeacher(model).forward(batch).signal
    torch.testing.assert_close(signal.head.logits(signal.hidden), own, rtol=1e-5, atol=1e-5)
