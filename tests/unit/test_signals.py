"""Signals: what the teacher said about each position."""

import torch

from stillroom.lm_head import LMHead
from stillroom.signals import Dense


def test_the_signal_of_some_positions_is_their_part_of_it():
    signal = Dense(torch.arange(12.0).view(6, 2), LMHead(torch.ones(3, 2)))
    part = signal.at(torch.tensor([4, 1, 1]))
    assert part.hidden.tolist() == [[8, 9], [2, 3], [2, 3]]
    assert part.head is signal.head
    assert signal.at(torch.tensor([], dtype=torch.long)).hidden.shape == (0, 2)
