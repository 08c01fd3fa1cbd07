"""How long work reports how far it is: one callable, so that rooms below the command line draw nothing."""

from collections.abc import Callable

# (what is being done, units done so far, units in all); bytes unless the words say otherwise.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports to nobody."""
