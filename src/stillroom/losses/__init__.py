"""Losses: nats per position, with their gradients. ``config.LOSSES`` is the table of all; this imports no torch."""
