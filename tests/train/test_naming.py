import pytest

from med3dvlm.train.naming import name_a_few


@pytest.mark.parametrize(
    "count, options, expected",
    [
        (0, {}, ""),
        (5, {}, "1, 2, 3, 4, 5"),
        (7, {}, "1, 2, 3, 4, 5 and 2 more"),
        (3, {"most": 2, "separator": "; "}, "1; 2 and 1 more"),
    ],
)
def test_the_first_are_named_and_the_others_counted(count, options, expected):
    assert name_a_few([str(number) for number in range(1, count + 1)], **options) == expected
