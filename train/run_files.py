"""Names of what a run leaves in its output folder, and the folder that a study is in; nothing here loads a model."""

from pathlib import Path


# In the output folder: the result, speed and scores, the whole recipe, and the cases that were left out.
PUBLISHED, SUMMARY, RECIPE, SKIPPED = "published", "summary.json", "recipe.yaml", "skipped.jsonl"


def folder_of(root: str) -> Path:
    """The folder of a study, which may be given by its manifest."""
    path = Path(root).expanduser().absolute()
    return path if path.is_dir() else path.parent


__all__ = ["PUBLISHED", "RECIPE", "SKIPPED", "SUMMARY", "folder_of"]
