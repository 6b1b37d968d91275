"""The doctor's own words: how much it looks at, and what the data must not hold."""

from typing import Annotated

from pydantic import Field

from stillroom.config import Config, PathText


class DoctorConfig(Config):
    """`stillroom doctor RECIPE`: look at a run before it is paid for."""

    sequences: Annotated[int, Field(gt=0)] = 256
    """So many of the recipe's documents are looked at."""
    tasks: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Description files of tasks that the student will be evaluated on, in whose items the documents are looked for."""
