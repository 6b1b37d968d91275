"""Time and cost; whether to ask the teacher live or once; and the published distillation of 405B into 70B."""

import pytest

from published import PUBLISHED
from stillroom.estimates import storage
from stillroom.estimates.flops import estimate, forward_flops, live_or_offline, training_flops
from stillroom.estimates.hardware import DEVICES, Device
from stillroom.estimates.model_size import model_size

TEACHER, STUDENT = (model_size(PUBLISHED[f"Llama 3.1 {size}"][0]) for size in ("405B", "70B"))


def test_time_is_flops_over_what_the_devices_do():
    device = Device("x", flops=1e12, memory_bytes=1, price=2.0)
    found = estimate(7.2e15, device, num_devices=4, utilization=0.5)
    assert (found.time_s, found.device_hours, found.cost) == (3600.0, 4.0, 8.0)
    assert estimate(1.0, Device("x", 1e12, 1, None)).cost is None


def test_the_published_case_of_405b_into_70b_on_500m_tokens():
    """What follows from the sizes alone: 2 · 405e9 and 6 · 70e9 FLOPs a token and some attention, 5e8 tokens."""
    teacher, student = forward_flops(TEACHER, 4096), training_flops(STUDENT, 4096)
    assert teacher == pytest.approx(2 * 405.85e9, rel=0.05)
    assert student.total == pytest.approx(6 * 70.55e9, rel=0.05)
    asked, trained = (estimate(5e8 * f, DEVICES["H100"], 32, 0.35).device_hours for f in (teacher, student.total))
    assert (round(asked), round(trained)) == (331, 174)
    # Every logit in bfloat16 is 128 TB; 50 GB, which is what is said to have been kept, are 100 bytes a token, and the
    # default store takes about half of that.
    assert 5e8 * storage.full(128_256).bytes_per_position == 128_256e9
    assert 5e8 * storage.stored(128_256).bytes_per_position == pytest.approx(20e9, rel=0.1)


def test_the_five_days_on_32_h100s():
    """Published of Arcee SuperNova (blog.arcee.ai, "Training Pipeline and Model Composition"): about 500M tokens, whose
    logits would have taken 2.9 PB; five days on 32 H100s.

    2.9 PB are no 500M rows of 128,256 numbers: in float32 they are 5.65e9 rows. So this takes it that rows were padded,
    that the same positions were trained on once, in rows of 8,192, that the 405B was asked before and apart (offline),
    and that the 70B was trained whole, with checkpointed activations, at the default utilisation of 0.35.
    """
    positions = 2.9e15 / storage.full(128_256, 4).bytes_per_position
    assert positions == pytest.approx(5.65e9, rel=0.01)
    flops = positions * training_flops(STUDENT, 8192, checkpointing=True).total
    days = estimate(flops, DEVICES["H100"], 32, 0.35).time_s / 86400
    assert 5 / 1.5 < days < 5 * 1.5
    assert days == pytest.approx(3.5, abs=0.1)


def test_without_padding_five_days_would_be_a_utilisation_of_two_percent():
    flops = 5e8 * training_flops(STUDENT, 8192, checkpointing=True).total
    at_peak = estimate(flops, DEVICES["H100"], 32, 1.0).time_s
    assert at_peak / (5 * 86400) == pytest.approx(0.023, abs=0.002)


def test_asking_once_pays_from_the_second_epoch_or_student_on():
    found = live_or_offline(teacher=10.0, student=3.0, num_tokens=1.0, capture_speed=0.8, store_step=1.0)
    assert found.break_even == 1.25
    assert found.live == 13.0
    assert found.offline == 12.5 + 3.0
    twice = live_or_offline(10.0, 3.0, 1.0, epochs=2, capture_speed=0.8, store_step=1.0)
    assert twice.offline < twice.live


def test_at_the_break_even_both_ways_cost_the_same():
    n = live_or_offline(10.0, 30.0, 1.0).break_even
    found = live_or_offline(10.0, 30.0, 1.0, students=n)
    assert found.live == pytest.approx(found.offline)


def test_a_small_teacher_of_a_large_student_is_never_worth_storing():
    assert live_or_offline(teacher=1.0, student=100.0, num_tokens=1.0).break_even is None
