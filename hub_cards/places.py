"""Where models are named to lie: a folder here, or a repository of the Hub."""

import re
from pathlib import Path


def is_repository(name: str) -> bool:
    """
    Whether a name is one that a repository of the Hub can have, and not that of a file or folder here. The name of a folder
    that is not there, such as `runs/finetune`, may be one too: only the Hub knows better.
    """
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()


def is_owned_repository(name: str) -> bool:
    """The same for `org/name`, the form that all repositories have but the oldest."""
    return "/" in name and is_repository(name)


__all__ = ["is_owned_repository", "is_repository"]
