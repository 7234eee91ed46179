import pytest

from med3dvlm.hub_cards.places import (
    has_form_of_owned_repository,
    has_form_of_repository,
    is_owned_repository,
    is_repository,
)


@pytest.mark.parametrize(
    "name, may_be, has_owner",
    [
        ("org/med3dvlm", True, True),
        ("org/med3dvlm.v2-small", True, True),
        ("gpt2", True, False),
        ("a/b/c", False, False),
        ("./model", False, False),
        ("/models/a", False, False),
        ("~/model", False, False),
        ("..", False, False),
        ("../model", False, False),
        ("org/", False, False),
        ("", False, False),
    ],
)
def test_what_can_be_the_name_of_a_repository(name, may_be, has_owner):
    assert (is_repository(name), is_owned_repository(name)) == (may_be, has_owner)
    assert (has_form_of_repository(name), has_form_of_owned_repository(name)) == (may_be, has_owner)


def test_what_is_here_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert not is_repository("runs/model") and not is_owned_repository("runs/model") and is_repository("runs/other")
    assert has_form_of_owned_repository("runs/model") and has_form_of_repository("runs/model")
