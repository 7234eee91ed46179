"""The demonstration's picture of answers."""

from pathlib import Path

import matplotlib
import pytest

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.demo import draw_answers
from med3dvlm.train.phantoms.study import write_study


def test_the_picture_of_answers_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    study, model = tmp_path / "study", tmp_path / "model"
    write_study(study, 2, num_validation=0, num_test=1, num_workers=1, progress=False)
    Med3DVLMImageProcessor(image_size=[16, 16, 16]).save_pretrained(model)
    record = {
        "case": "phantom/000002",
        "task": "report",
        "question_type": 0,
        "answer": "A cyst.",
        "expected": "A cyst.",
    }
    picture = tmp_path / "pictures" / "answers.png"
    monkeypatch.setitem(matplotlib.rcParams, "backend", "pdf")  # what the caller draws with stays as it is
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            draw_answers(study, model, [record], picture)
    assert not list(picture.parent.iterdir())
    assert draw_answers(study, model, [record], picture) == picture
    assert picture.read_bytes().startswith(b"\x89PNG") and [path.name for path in picture.parent.iterdir()] == [
        "answers.png"
    ]
    assert matplotlib.get_backend() == "pdf"
