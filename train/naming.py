"""How messages name some of many things."""

from collections.abc import Sequence


def name_a_few(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """
    The first names, and how many more there are.

    Example:

    ```python
    >>> name_a_few(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    ```"""
    named = separator.join(names[:most])
    return named if len(names) <= most else f"{named} and {len(names) - most} more"


__all__ = ["name_a_few"]
