"""Memory: sums by hand, the moments of a step, and advice that holds."""

import inspect
from dataclasses import replace

import pytest

from published import PUBLISHED
from stillroom.errors import ConfigError
from stillroom.estimates.memory import Load, TeacherLoad, memory, nearest
from stillroom.estimates.model_size import model_size

STUDENT, TEACHER = (model_size(PUBLISHED[name][0]) for name in ("Qwen2 1.5B", "Qwen2 7B"))
P = STUDENT.total
LOAD = Load(STUDENT, 4096, 16384, half=True, teacher=TeacherLoad(TEACHER, 2))


def test_what_stays_is_a_sum_by_hand():
    stays = memory(LOAD).stays
    assert stays["student's weights"] == 4 * P
    assert stays["optimizer's states"] == 8 * P
    assert stays["teacher's weights"] == 2 * TEACHER.total
    assert memory(replace(LOAD, states="int8")).stays["optimizer's states"] == 2 * P


@pytest.mark.parametrize(("kind", "each"), [("int8", 1.0), ("fp8", 1.0), ("nf4", 0.5 + 1 / 64 + 4 / (64 * 256))])
def test_a_quantized_teacher_has_small_layers_and_whole_ends(kind, each):
    own = TEACHER.parts
    stays = memory(replace(LOAD, teacher=TeacherLoad(TEACHER, 2, quantization=kind))).stays
    assert stays["teacher's weights"] == each * (own["attention"] + own["mlp"]) + 2 * (
        own["embeddings"] + own["head"] + own["norms"]
    )


def test_gradients_stay_between_micro_batches():
    assert "gradients" not in memory(LOAD).comes
    assert memory(replace(LOAD, micro_batches=2)).comes["gradients"] == 4 * P


def test_with_hardly_any_tokens_the_update_needs_most():
    found = memory(replace(LOAD, teacher=None, half=False, length=8, micro_tokens=8))
    assert found.moment == "update"
    assert found.comes == {"gradients": 4 * P, "gradient of the embeddings": 4 * 151936 * 1536}


def test_checkpointing_keeps_one_state_a_layer_and_one_layer():
    plain, recomputing = (memory(replace(LOAD, checkpointing=on)).comes["activations"] for on in (False, True))
    assert recomputing < plain / 8


def test_logits_are_a_chunk_and_never_all():
    assert memory(LOAD).comes["logits"] <= LOAD.logits_bytes
    few = memory(replace(LOAD, length=16, micro_tokens=16, micro_batches=9)).comes
    assert few["logits"] == 2 * 4 * 16 * 151936


def test_adapters_alone_have_gradients_and_states():
    number = STUDENT.adapter_parameters(16)
    h, k, i = 1536, 256, 8960
    assert number == 28 * 16 * (2 * (h + h) + 2 * (h + k) + 3 * (h + i))
    found = memory(replace(LOAD, adapter_parameters=number, frozen=STUDENT.frozen((), adapters=True), micro_batches=2))
    assert found.stays["student's weights"] == 4 * (P + number)
    assert found.stays["optimizer's states"] == 8 * number
    assert found.comes["gradients"] == 4 * number
    assert "head's gradient" not in found.comes
    assert STUDENT.adapter_parameters(16, ["q_proj", "k_proj"]) == 28 * 16 * (h + h + h + k)
    with pytest.raises(ConfigError, match="c_attn"):
        STUDENT.adapter_parameters(16, ["c_attn"])


def test_fsdp_divides_and_ddp_does_not():
    one, fsdp, ddp = (memory(replace(LOAD, parallel=p, num_devices=8)).stays for p in ("none", "fsdp", "ddp"))
    for part in ("student's weights", "teacher's weights", "optimizer's states"):
        assert fsdp[part] == one[part] / 8
        assert ddp[part] == one[part]
    assert ddp["DDP's buckets"] == 4 * P


@pytest.mark.parametrize("gib", [60, 44, 36, 25, 12])
def test_advice_is_a_setting_that_fits(gib):
    assert memory(LOAD).total > gib * 2**30
    said = nearest(LOAD, gib * 2**30)
    assert "would fit with" in said
    assert float(said.rpartition(": ")[2].removesuffix(" GiB")) <= gib


def test_where_nothing_helps_that_is_said():
    assert "is enough" in nearest(LOAD, 2**20)


def test_the_budget_of_logits_by_default_is_that_of_a_run():
    from stillroom.distill.estimate import LOGITS_BYTES
    from stillroom.losses.fused_linear import linear_losses

    assert inspect.signature(linear_losses).parameters["chunk_bytes"].default == LOGITS_BYTES
