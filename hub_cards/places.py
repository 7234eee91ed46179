"""Where models are named to lie: a folder here, or a repository of the Hub."""

import re
from pathlib import Path


NAME_PATTERN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def has_form_of_repository(name: str) -> bool:
    """Whether a name is of the form `org/name` or `name`, whatever is here: `./name` is of neither."""
    return NAME_PATTERN.fullmatch(name) is not None


def has_form_of_owned_repository(name: str) -> bool:
    """Whether a name is of the form `org/name`, whatever is here: `../name` is none."""
    return "/" in name and has_form_of_repository(name)


def is_repository(name: str) -> bool:
    """
    Whether a name is one that a repository of the Hub can have, and not that of a file or folder here. The name of a folder
    that is not there, such as `runs/finetune`, may be one too: only the Hub knows better.
    """
    return has_form_of_repository(name) and not Path(name).exists()


def is_owned_repository(name: str) -> bool:
    """The same for `org/name`, the form that all repositories have but the oldest."""
    return has_form_of_owned_repository(name) and is_repository(name)


__all__ = ["has_form_of_owned_repository", "has_form_of_repository", "is_owned_repository", "is_repository"]
