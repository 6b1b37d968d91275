"""Engines: models behind an address."""

MOST_OPENAI = 20
"""Tokens of a position that OpenAI's interface tells at the most."""
