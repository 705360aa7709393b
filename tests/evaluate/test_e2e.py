"""The E2E data and its slot rules."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from shoal.errors import InvalidInput
from shoal.evaluate.e2e import E2EInput, parse_mr, read_e2e, slot_error_rate, slot_errors

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "e2e_nlg"
MR = (
    "name[The Vaults], eatType[pub], food[French], priceRange[less than £20], customer rating[average], "
    "area[city centre], familyFriendly[no], near[Café Rouge]"
)
GOOD = (
    "The Vaults is a French pub near cafe Rouge in the centre of the city. It is cheap, has an average rating "
    "and is not for children."
)


@pytest.mark.parametrize("name", ["part.csv", "part.csv.gz"])
def test_rows_are_grouped_by_mr(tmp_path: Path, name: str):
    text = b'MR,ref\n"name[A], area[riverside]","One,  two."\nname[B],Three.\n"name[A], area[riverside]",Four.\n'
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read_e2e(tmp_path / name) == [
        E2EInput("name[A], area[riverside]", ("One, two.", "Four.")),
        E2EInput("name[B]", ("Three.",)),
    ]


def test_bad_files(tmp_path: Path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_e2e(tmp_path / "none.csv")
    (tmp_path / "broken.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_e2e(tmp_path / "broken.csv.gz")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidInput, match="found a, b"):
        read_e2e(tmp_path / "other.csv")
    with pytest.raises(InvalidInput, match="not a meaning representation"):
        parse_mr("a pub")


def test_a_right_text_has_no_errors():
    errors = slot_errors(MR, GOOD)
    assert errors.num_slots == 8
    assert errors.count == 0, errors


@pytest.mark.parametrize(
    ("change", "kind", "slot"),
    [
        ((" near cafe Rouge", ""), "missing", "near"),
        (("The Vaults", "It"), "missing", "name"),
        (("French ", ""), "missing", "food"),
        (("French", "Chinese"), "wrong", "food"),
        (("cheap", "expensive"), "wrong", "pricerange"),
        (("an average rating", "a rating of 5 out of 5"), "wrong", "customer rating"),
        (("not for children", "for children"), "wrong", "familyfriendly"),
        ((" in the centre of the city", " by the river"), "wrong", "area"),
        (("a French pub", "a French coffee shop"), "wrong", "eattype"),
    ],
)
def test_each_error_is_found_alone(change: tuple[str, str], kind: str, slot: str):
    text = GOOD.replace(*change)
    assert text != GOOD
    errors = slot_errors(MR, text)
    assert errors.count == 1, errors
    assert getattr(errors, kind) == (slot,)


def test_additions():
    assert slot_errors("name[Zizzi]", "Zizzi is a restaurant.").count == 0
    assert slot_errors("name[Zizzi]", "Zizzi is a family friendly pub.").added == ("eattype", "familyfriendly")
    # A name is not food.
    assert slot_errors("name[A], near[Raja Indian Cuisine]", "A is near Raja Indian Cuisine.").count == 0


def test_rate_is_errors_over_slots():
    assert slot_error_rate([MR, "name[A], area[riverside]"], [GOOD, "A is good."]).value == pytest.approx(100 / 10)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the E2E data is not at {DATA} (set SHOAL_DATA)")
def test_the_real_data():
    """Sizes as its README states them; the rules find few errors in what people wrote."""
    test = read_e2e(DATA / "testset_w_refs.csv.gz")
    assert len(test) == 630
    assert sum(len(e.references) for e in test) == 4693
    mrs, texts = [e.mr for e in test for _ in e.references], [r for e in test for r in e.references]
    assert slot_error_rate(mrs, texts).value < 15
