"""Counts in words."""


def count(n: int, what: str) -> str:
    """`1 prompt`, `2 prompts`, `10,000 tokens`."""
    return f"{n:,} {what}{'s' * (n != 1)}"
