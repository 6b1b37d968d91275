"""The two pictures of losses.md: where each loss takes a student that has one mode, and how it pulls on every column.

python docs/guide/plot_losses.py [FOLDER]     FOLDER is docs/guide; `make docs` does it
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES

FOLDER = Path(__file__).parent
COLUMNS = torch.arange(64, dtype=torch.float64)
MODES = ((0.6, 18.0), (0.4, 44.0))
"""The teacher's two modes: their mass and their column. Both are 4 columns wide."""
MIDDLE = 31
"""Columns before it belong to the first mode."""
CENTRES, WIDTHS = torch.arange(8, 56.25, 0.5, dtype=torch.float64), torch.logspace(0.3, 1.4, 56, dtype=torch.float64)
OTHERWISE = {
    "jensen_shannon": {"beta": 0.9},
    "skew_kl": {"alpha": 0.5},
    "skew_reverse_kl": {"alpha": 0.5},
    "adaptive_kl": {"mu": 0.2},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "hinge_ranking": {"k": 32},
    "logistic_ranking": {"k": 32},
}
"""Settings other than the defaults that are drawn too."""
SYMBOLS = {"alpha": "α", "beta": "β", "mu": "μ"}
GREY, BLUE, ORANGE = "#b8bcc4", "#1f5fbf", "#d9661f"


class Fit(NamedTuple):
    """The student at which a loss is least."""

    centre: float
    width: float
    second: float
    """What it gives to the teacher's second mode, which has 0.4."""
    log_probs: Tensor


def bell(centre: Tensor | float, width: Tensor | float) -> Tensor:
    """log of a discretised normal distribution over the columns."""
    return torch.log_softmax(-(((COLUMNS - centre) / width) ** 2) / 2, -1)


def teacher() -> Tensor:
    """Its log-probabilities, [v]."""
    return torch.logsumexp(torch.stack([bell(at, 4.0) + torch.tensor(mass).log() for mass, at in MODES]), 0)


def losses_of(students: Tensor, name: str, **arguments) -> Tensor:
    """The loss of each student, [n]. The next tokens of cross_entropy are the teacher's: their mean is taken."""
    n = len(students)

    def value(token: int) -> Tensor:
        block = LogitBlock(students.clone(), teacher().repeat(n, 1), torch.full((n,), token))
        return LOSSES[name].load()(block, **arguments)[0]

    if name != "cross_entropy":
        return value(0)
    return torch.stack([p * value(token) for token, p in enumerate(teacher().exp())]).sum(0)


def fit(name: str, **arguments) -> Fit:
    """The best of all students with one mode, by trying each centre and width."""
    centre, width = (grid.reshape(-1, 1) for grid in torch.meshgrid(CENTRES, WIDTHS, indexing="ij"))
    students = bell(centre, width)
    best = int(losses_of(students, name, **arguments).argmin())
    second = students[best, MIDDLE:].exp().sum().item()
    return Fit(centre[best].item(), width[best].item(), second, students[best])


def lands(found: Fit) -> str:
    """In a word: what became of the teacher's second mode."""
    return "covers" if found.second > 0.3 and found.width > 10 else "seeks" if found.second < 0.1 else "between"


def pull(name: str, student: Tensor) -> Tensor:
    """How a step of gradient descent would move each logit, [v]: minus the gradient. The next token is column 18."""
    _, gradient = LOSSES[name].load()(LogitBlock(student[None].clone(), teacher()[None], torch.tensor([18])))
    return -gradient[0]


def told(arguments: dict[str, float]) -> str:
    return ", ".join(f"{SYMBOLS.get(name, name)} = {value}" for name, value in arguments.items())


def grid_of_panels(title: str):
    """A figure with one panel for each loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(4, 3, figsize=(10, 10.6), sharex=True, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axis, name in zip(axes.flat, LOSSES, strict=True):
        axis.set_title(name, fontsize=11, fontweight="bold", family="monospace")
        axis.set_xlim(0, 63)
    for axis in axes[-1]:
        axis.set_xlabel("column")
    return figure, axes


def draw_fits(path: Path) -> None:
    figure, axes = grid_of_panels("A student with one mode, where each loss is least · grey: the teacher")
    for axis, name in zip(axes.flat, LOSSES, strict=True):
        axis.fill_between(COLUMNS.numpy(), teacher().exp().numpy(), color=GREY)
        found = fit(name)
        label = f"default: {lands(found)}" if name in OTHERWISE else lands(found)
        axis.plot(COLUMNS.numpy(), found.log_probs.exp().numpy(), color=BLUE, lw=2, label=label)
        if other := OTHERWISE.get(name):
            found, style = fit(name, **other), {"color": ORANGE, "lw": 1.6, "ls": "--"}
            label = f"{told(other)}: {lands(found)}"
            axis.plot(COLUMNS.numpy(), found.log_probs.exp().numpy(), label=label, **style)
        axis.set_ylim(0, 0.15)
        axis.set_yticks([0, 0.05, 0.1])
        axis.legend(loc="upper right", fontsize=9, frameon=False, handlelength=1.4, borderaxespad=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_pulls(path: Path) -> None:
    student = bell(22.0, 5.0)
    figure, axes = grid_of_panels(
        "How each loss moves the student's logits (minus the gradient), default settings\n"
        "grey: the teacher · dashed: the student, which knows the first mode only"
    )
    for axis, name in zip(axes.flat, LOSSES, strict=True):
        moves = pull(name, student)
        most = moves.abs().max().item()
        highest = student.exp().max()
        axis.fill_between(COLUMNS.numpy(), (0.9 * teacher().exp() / highest).numpy(), color=GREY, alpha=0.6)
        axis.plot(COLUMNS.numpy(), (0.9 * student.exp() / highest).numpy(), color="#444444", lw=1, ls="--")
        colours = [BLUE if move > 0 else ORANGE for move in moves]
        axis.bar(COLUMNS.numpy(), (moves / most).numpy(), width=1.0, color=colours)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_ylim(-1.15, 1.15)
        axis.set_yticks([-1, 0, 1], [f"−{most:.2g}", "0", f"{most:.2g}"])
    axes.flat[list(LOSSES).index("cross_entropy")].text(28, 1.02, "← the next token", va="center", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("← down · up →")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(*(sys.argv[1:] or [FOLDER]))
    draw_fits(folder / "losses.png")
    draw_pulls(folder / "losses-gradients.png")
