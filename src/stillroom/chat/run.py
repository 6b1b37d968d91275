"""`stillroom chat`: a prompt -> answers, as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from stillroom.chat.answer import Piece, Talker, answers
from stillroom.chat.config import ChatConfig
from stillroom.errors import StillroomError
from stillroom.models import loading
from stillroom.tokenizers import load_tokenizer, template_of

Show = Callable[[Iterator[Piece]], None]
Tell = Callable[[str], None]


def run(config: ChatConfig, prompts: Iterable[str], show: Show, tell: Tell, *, turn_by_turn: bool = False) -> None:
    """Answers each prompt by all models, and hands the pieces of the answers to ``show``.

    Args:
        tell: is given what else there is to say.
        turn_by_turn: an error of a turn, and Ctrl-C while it is answered, end this turn alone. It is forgotten.

    Raises:
        StillroomError: something that the user can mend.
        KeyboardInterrupt: Ctrl-C; the models have stopped.
    """
    talkers = [load(config, place) for place in config.models]
    for talker in talkers:
        if config.system is not None and template_of(talker.tokenizer) is None:
            tell(f"{talker.name} has no chat template: `system` is not used for it")
    for prompt in prompts:
        try:
            _turn(config, talkers, prompt, show)
        except (StillroomError, KeyboardInterrupt) as error:
            if not turn_by_turn:
                raise
            tell(f"error: {error}" if isinstance(error, StillroomError) else "\nstopped; this turn is forgotten")


def _turn(config: ChatConfig, talkers: Sequence[Talker], prompt: str, show: Show) -> None:
    pieces = answers(
        talkers,
        prompt,
        system=config.system,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    with closing(pieces):
        show(pieces)


def load(config: ChatConfig, place: str) -> Talker:
    """A model and its tokenizer; the folder of a run means the model in it."""
    folder = Path(place).expanduser()
    if (folder / "run.json").is_file() and (folder / "model").is_dir():
        place = str(folder / "model")
    device = loading.resolve_device(config.device, "device")
    half = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = ("bfloat16" if half else "float32") if config.dtype == "auto" else config.dtype
    tokenizer = load_tokenizer(place, trust_remote_code=config.trust_remote_code)
    model = loading.load_model(
        place, dtype=getattr(torch, dtype), device=device, trust_remote_code=config.trust_remote_code
    ).requires_grad_(False)
    return Talker(place, model, tokenizer)
