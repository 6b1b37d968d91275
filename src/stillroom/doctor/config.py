"""The doctor's own settings: the documents that it looks at, and the tasks that the data must not hold."""

from typing import Annotated

from pydantic import Field

from stillroom.config import Config, PathText


class DoctorConfig(Config):
    """`stillroom doctor RECIPE`: look at a run before it is paid for."""

    sequences: Annotated[int, Field(gt=0)] = 256
    """The number of the recipe's documents that are looked at."""
    tasks: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Description files of tasks that the student will be evaluated on, in whose items the documents are looked for."""
