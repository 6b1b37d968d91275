"""The engine against every token's log-softmax in float64, however rows are batched, padded and shared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import SaveModel, build_model
from stillroom.errors import DataError, NonFiniteError, OutOfMemoryError
from stillroom.evaluate.tasks import likelihood
from stillroom.evaluate.tasks.likelihood import Likelihood, Request, encode, log_likelihoods


def requests(seed: int = 0, beginning: int = 0) -> list[Request]:
    """Of several lengths; some share a context, one begins another, all share a beginning of so many tokens."""
    random = torch.Generator().manual_seed(seed)

    def draw(number: int) -> list[int]:
        return torch.randint(2, 300, (number,), generator=random).tolist()

    shared = draw(beginning)
    contexts = [draw(n) for n in (1, 4, 9, 4)]
    found = [Request(shared + context, draw(n)) for context in contexts for n in (1, 3, 1)]
    longest = found[-2]
    return [*found, Request(longest.context, longest.continuation[:2]), Request(longest.context[:-1], draw(2))]


def naive(model: PreTrainedModel, request: Request) -> float:
    """Each token's log-softmax in float64, of this text alone."""
    context, continuation = request
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("beginning", [0, 20])
def test_equals_every_token_by_itself(family: str, beginning: int):
    model, asked = build_model(family), requests(beginning=beginning)
    for one, request in zip(log_likelihoods(model, asked), asked, strict=True):
        assert one.log_likelihood == pytest.approx(naive(model, request), abs=1e-5)
        assert (one.num_tokens, one.num_cut) == (len(request.continuation), 0)


@pytest.mark.parametrize("num_tokens", [1, 40, 100_000])
def test_batch_size_and_padding_change_nothing(num_tokens: int, monkeypatch: pytest.MonkeyPatch):
    model, asked = build_model(), requests(beginning=20)
    whole = [one.log_likelihood for one in log_likelihoods(model, asked)]
    found = log_likelihoods(model, asked, num_tokens=num_tokens)
    assert [one.log_likelihood for one in found] == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr(likelihood, "SHARED_TOKENS", 10**9)
    monkeypatch.setattr(likelihood, "CACHE_BYTES", 1)
    found = log_likelihoods(model, asked, num_tokens=num_tokens)
    assert [one.log_likelihood for one in found] == pytest.approx(whole, abs=1e-5)


def test_greedy_is_what_the_model_would_write():
    model = build_model()
    tokens = [5, 6, 7]
    for _ in range(3):
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    likely, other = log_likelihoods(
        model, [Request(tokens[:3], tokens[3:]), Request(tokens[:3], [*tokens[3:5], tokens[5] ^ 1])]
    )
    assert (likely.greedy, other.greedy) == (True, False)


class Reads:
    """Counts the tokens that a model reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_tokens = 0
        model.model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.num_tokens += kwargs["input_ids"].numel()


def test_a_text_that_begins_another_is_not_read_twice():
    model = build_model()
    reads = Reads(model)
    log_likelihoods(model, [Request([5, 6, 7], [8]), Request([5, 6, 7], [9]), Request([5, 6, 7], [8, 9])])
    assert reads.num_tokens == 4


def test_what_all_begin_with_is_read_once():
    model = build_model()
    reads = Reads(model)
    shared = list(range(2, 32))
    log_likelihoods(model, [Request([*shared, i], [i + 1, i + 2]) for i in range(100, 110)])
    assert reads.num_tokens == 30 + 10 * 2


@pytest.mark.parametrize("length", [16, 30])
def test_a_context_that_all_share_is_not_read_beyond_its_last_token(length: int):
    """The last token of the context predicts the first of each continuation, so it is read with each row."""
    model, shared = build_model(), list(range(2, 2 + length))
    asked = [Request(shared, [i, i + 1, i + 2]) for i in range(100, 104)]
    found = [one.log_likelihood for one in log_likelihoods(model, asked)]
    assert found == pytest.approx([naive(model, request) for request in asked], abs=1e-5)


@pytest.mark.parametrize("other", [3, 17, 19])
def test_contexts_that_differ_before_their_end_share_no_more_than_they_have_in_common(other: int):
    model, context = build_model(), list(range(2, 42))
    differs = [*context[:other], 200, *context[other + 1 :]]
    asked = [Request(context, [50, 51]), Request(differs, [50, 51]), Request(context, [52])]
    found = [one.log_likelihood for one in log_likelihoods(model, asked)]
    assert found == pytest.approx([naive(model, request) for request in asked], abs=1e-5)


def test_too_long_a_context_is_cut_at_its_left_and_told():
    model = build_model(max_position_embeddings=8)
    tokens = list(range(10, 30))
    cut, whole = log_likelihoods(model, [Request(tokens[:17], tokens[17:]), Request(tokens[11:17], tokens[17:])])
    assert cut.log_likelihood == pytest.approx(whole.log_likelihood, abs=1e-5)
    assert (cut.num_cut, whole.num_cut) == (11, 0)


def test_too_long_an_answer_is_refused():
    with pytest.raises(DataError, match="too long for the model"):
        log_likelihoods(build_model(max_position_embeddings=8), [Request([1], list(range(9)))])


LINEAR = {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16}


@pytest.mark.parametrize(("family", "settings"), [("gemma2", {}), ("minimax", LINEAR)])
def test_what_is_no_plain_cache_is_not_shared(family: str, settings: dict[str, Any]):
    """Gemma 2's windows are of 8 tokens, and MiniMax keeps states of linear attention, so what they hold of a shared
    beginning must not be read once for all."""
    model = build_model(family, **settings)
    asked = [Request(list(range(2, 40)), [i, i + 1]) for i in range(50, 54)]
    found = [one.log_likelihood for one in log_likelihoods(model, asked)]
    assert found == pytest.approx([naive(model, request) for request in asked], abs=1e-5)


def test_positions_that_turn_with_the_longest_row_are_kept_apart():
    """LongRoPE turns all positions of a batch by its longest row: short and long ones must not share one."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    model = build_model("phi3", rope_parameters=rope, max_position_embeddings=64, original_max_position_embeddings=24)
    shared = list(range(2, 22))
    asked = [Request([*shared, i], list(range(30, 32 + 8 * i))) for i in range(3)]
    assert [len(one.context) + len(one.continuation) - 1 > 24 for one in asked] == [False, True, True]
    found = [one.log_likelihood for one in log_likelihoods(model, asked)]
    assert found == pytest.approx([naive(model, request) for request in asked], abs=1e-4)


def test_logits_that_are_no_numbers_are_refused():
    model = build_model()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError):
        log_likelihoods(model, [Request([1], [2])])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_has_vocabulary_times_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "CACHE_BYTES", 4 * 4000 * 2)
    model = build_model(vocab_size=4000, max_position_embeddings=128)
    with Largest() as largest:
        log_likelihoods(model, [Request([1], list(range(2, 102)))])
    assert 0 < largest.elements <= 2 * 4000 + 16 * 4000  # two rows of logits at a time, beside the weight


def test_memory_that_does_not_suffice_halves_the_batch(monkeypatch: pytest.MonkeyPatch):
    model, asked = build_model(), requests()
    wanted = [one.log_likelihood for one in log_likelihoods(model, asked)]
    answer, sizes = likelihood._answer, []

    def small(*rest: Any) -> Any:
        rows = rest[-1]
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return answer(*rest)

    monkeypatch.setattr(likelihood, "_answer", small)
    assert [one.log_likelihood for one in log_likelihoods(model, asked)] == pytest.approx(wanted, abs=1e-5)
    assert sizes[0] > 2 >= sizes[-1]
    monkeypatch.setattr(likelihood, "_answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(OutOfMemoryError, match="a single text"):
        log_likelihoods(model, asked)


def test_progress_is_told():
    told: list[int] = []
    log_likelihoods(build_model(), requests(), num_tokens=30, done=told.append)
    assert told == sorted(told)
    assert told[-1] == len(requests())


# --- text to tokens ---------------------------------------------------------------------------------------------------


def test_pairs_are_parted_where_the_context_ends(tiny_tokenizer: PreTrainedTokenizerFast):
    (found,) = encode(tiny_tokenizer, [("The still ", "runs")], str)
    whole = tiny_tokenizer("The still runs")["input_ids"]
    assert found.context == tiny_tokenizer("The still")["input_ids"]
    assert found.context + found.continuation == whole


def test_without_a_context_a_beginning_of_sequence_stands_before(tiny_tokenizer: PreTrainedTokenizerFast):
    plain, begun = encode(tiny_tokenizer, [("", "The still"), ("", "<s>The still")], str)
    tokens = tiny_tokenizer("The still", add_special_tokens=False)["input_ids"]
    assert plain == begun == Request([0], tokens)


def test_no_second_beginning_of_sequence(tiny_tokenizer: PreTrainedTokenizerFast):
    (found,) = encode(tiny_tokenizer, [("<s>The", " still")], str)
    assert found.context.count(0) == 1


def test_an_answer_without_a_token_is_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match="item 3: an answer cannot be scored"):
        encode(tiny_tokenizer, [("The", " still"), ("The", "")], lambda i: f"item {i + 2}")


# --- beside lm-eval ---------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(saved_model: SaveModel) -> Any:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    folder: Path = saved_model("llama", seed=3)
    return huggingface.HFLM(
        pretrained=build_model("llama", seed=3),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        batch_size=3,
    )


@pytest.mark.filterwarnings("ignore")
def test_equals_lm_eval(theirs: Any, tiny_tokenizer: PreTrainedTokenizerFast):
    pairs = [
        ("The still", " runs slowly"),
        ("The still ", "runs"),
        ("", "A teacher says"),
        ("", " what it thinks"),
        ("User: how many drops?\n\n", "12"),
        ("User: how many drops?\n\n", "34 drops"),
        ("<s>User", ": how"),
        ("x" * 70, "yz"),
    ]

    class Instance:
        def __init__(self, args: tuple[str, str]) -> None:
            self.args = args

    wanted = theirs.loglikelihood([Instance(pair) for pair in pairs], disable_tqdm=True)
    found: list[Likelihood] = log_likelihoods(theirs.model, encode(tiny_tokenizer, pairs, str))
    assert [one.log_likelihood for one in found] == pytest.approx([one[0] for one in wanted], abs=1e-5)
    assert [one.greedy for one in found] == [one[1] for one in wanted]
