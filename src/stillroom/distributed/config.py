"""The settings of a run on many processes."""

from typing import Annotated, Literal

from pydantic import Field

from stillroom.config import Config, Positive


class _Together(Config):
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """The time that a process waits for the others before it says which is lost, in seconds."""


class AutoParallelConfig(_Together):
    """One process alone, or what fits: ddp where a device holds the whole training state, and else fsdp."""

    kind: Literal["auto"] = "auto"


class NoParallelConfig(Config):
    """One process."""

    kind: Literal["none"]


class DdpConfig(_Together):
    """Every process holds the whole student, and they add up their gradients (`torch.nn.parallel`)."""

    kind: Literal["ddp"]


class FsdpConfig(_Together):
    """Each process holds a part of every parameter, its gradient and its optimizer state, and puts a layer together
    when it is needed (FSDP2, `torch.distributed.fsdp.fully_shard`)."""

    kind: Literal["fsdp"]
    replicas: Positive = 1
    """Copies of the student, each of which lies on as many processes as every other (hybrid sharding): as many as there
    are nodes keeps the large messages inside a node."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in the CPU's memory, and step there; on a CPU they are there."""
    reshard: bool = True
    """Let go of a layer after its forward pass, and put it together again for its backward pass."""


ParallelConfig = Annotated[AutoParallelConfig | NoParallelConfig | DdpConfig | FsdpConfig, Field(discriminator="kind")]
