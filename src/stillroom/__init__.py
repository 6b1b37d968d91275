"""Stillroom distils large language models into small ones.

The command line is ``stillroom VERB [RECIPE.yaml] [key=value …]``; from Python, a verb is a function of its config::

    from stillroom.config import load
    from stillroom.distill.config import DistillConfig
    from stillroom.distill.run import run

    run(load(DistillConfig, "recipe.yaml", ["steps=100"]))
"""

from stillroom.errors import StillroomError

__version__ = "0.1.0"
__all__ = ["StillroomError", "__version__"]
