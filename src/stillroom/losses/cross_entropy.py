"""Cross-entropy with the data's own next tokens."""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import Block


def cross_entropy(block: Block, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``−T² · log s[next token]`` at temperature T; gradient ``T (s − onehot(next token))``."""
    column = block.next_tokens.unsqueeze(-1)
    nats = block.student(temperature).gather(-1, column).squeeze(-1).neg()
    gradient = block.student_probabilities(temperature).clone()
    gradient.scatter_add_(-1, column, gradient.new_full(column.shape, -1.0))
    return nats * temperature**2, gradient if temperature == 1.0 else gradient.mul_(temperature)
