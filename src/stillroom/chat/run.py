"""`stillroom chat`: a prompt -> answers, as they come."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from stillroom import models
from stillroom.chat.answer import Piece, Talker, answers
from stillroom.chat.config import ChatConfig
from stillroom.tokenizers import load_tokenizer

Show = Callable[[Iterator[Piece]], None]


def run(config: ChatConfig, prompts: Iterable[str], show: Show) -> None:
    """Answers each prompt by all models, and hands the pieces of the answers to ``show``.

    Raises:
        StillroomError: something that the user can mend.
        KeyboardInterrupt: Ctrl-C; the models have stopped.
    """
    talkers = [load(config, place) for place in config.models]
    for prompt in prompts:
        show(
            answers(
                talkers,
                prompt,
                system=config.system,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
            )
        )


def load(config: ChatConfig, place: str) -> Talker:
    """A model and its tokenizer; the folder of a run means the model in it."""
    folder = Path(place).expanduser()
    if (folder / "run.json").is_file() and (folder / "model").is_dir():
        place = str(folder / "model")
    device = models.resolve_device(config.device, "device")
    half = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = ("bfloat16" if half else "float32") if config.dtype == "auto" else config.dtype
    tokenizer = load_tokenizer(place, trust_remote_code=config.trust_remote_code)
    model = models.load_model(
        place, dtype=getattr(torch, dtype), device=device, trust_remote_code=config.trust_remote_code
    ).requires_grad_(False)
    return Talker(place, model, tokenizer)
