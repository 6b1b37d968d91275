"""The settings of `stillroom chat`: a prompt -> answers in the terminal."""

from typing import Annotated, Literal

from pydantic import Field

from stillroom.config import Config, PathText


class ChatConfig(Config):
    """`stillroom chat`: one prompt, answered by one model or by two side by side."""

    models: Annotated[tuple[PathText, ...], Field(strict=False, min_length=1, max_length=2)]
    """Hub names or folders, the words after `chat`; a folder of a run means its model."""
    prompt: str | None = None
    """The question; null is what stands on stdin, or, where that is a terminal, what is typed there, turn by turn."""
    system: str | None = None
    """A text that the models are told before, where their tokenizers have a chat template."""
    max_tokens: Annotated[int, Field(gt=0)] = 256
    """The most tokens of an answer."""
    temperature: Annotated[float, Field(strict=False, ge=0, le=100)] = 0.7
    """The temperature of the distribution that tokens are drawn from; 0 always takes the likeliest."""
    top_p: Annotated[float, Field(strict=False, gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest that together have this probability."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of what is drawn; both models draw with the same one."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a CUDA device where there is one, and else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
