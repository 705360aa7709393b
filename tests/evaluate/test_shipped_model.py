"""The model that ships: small, documented by its own numbers, and able to run at every depth it was tuned for."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import pytest

from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.depth.checkpoint import TunedDepth
from shoal.evaluate.e2e import slot_errors

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "src" / "shoal" / "data" / "shoal-e2e"
MRS = [
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
    "name[The Vaults], eatType[pub], food[French], priceRange[cheap], area[riverside], familyFriendly[no], near[Café Rouge]",
    "name[Zizzi], eatType[restaurant], food[Italian], customer rating[5 out of 5], familyFriendly[yes]",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shoal-e2e")


@pytest.mark.parametrize("depth", TunedDepth.load(SHIPPED).depths)
def test_it_writes_about_the_restaurant_at_every_depth(engine: Engine, depth: float):
    plan = Dense() if depth == 1 else SkipDecode(depth=depth)
    for mr, generation in zip(MRS, engine.generate(MRS, Sampling(max_new_tokens=100), plan), strict=True):
        assert generation.finish_reason == "stop"
        assert mr.split("[")[1].split("]")[0] in generation.text
        assert slot_errors(mr, generation.text).count <= 1, generation.text
        assert generation.text == generation.text.strip()
        assert "<sep>" not in generation.text
        layers = generation.ledger.decode_layer_tokens / generation.ledger.decode_passes / engine.shape.num_layers
        assert layers == 1 if depth == 1 else layers < depth + 0.2


def test_the_package_data_stays_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) <= 30e6


def test_the_card_is_what_its_numbers_say(engine: Engine):
    spec = importlib.util.spec_from_file_location("card", ROOT / "examples" / "e2e_model" / "card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == module.render(card), "run examples/e2e_model/card.py"
    assert card["model"]["num_layers"] == engine.shape.num_layers
    assert [Fraction(depth) for depth in card["tuned"]["depths"]] == [
        Fraction(depth).limit_denominator(12) for depth in engine.tuned.depths
    ]


def test_it_meets_what_it_promises():
    """E2E test set, greedy: dense at least 65 BLEU; every depth within 1 of it, within chance of what a last round
    at this depth alone gives, and running the layers that it says."""
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    assert card["evaluation"]["split"] == "test"
    assert card["evaluation"]["num_inputs"] == 630
    rows = {row["depth"]: row for row in card["evaluation"]["rows"] if row["system"] == "any-depth"}
    assert sorted(rows) == sorted(card["tuned"]["depths"])
    assert rows["1"]["bleu"]["value"] >= 65
    for depth, row in rows.items():
        assert row["mean_depth"] == pytest.approx(float(Fraction(depth)), rel=0.05)
    paired = {(one["depth"], one["minus"]): one["bleu"] for one in card["evaluation"]["paired"]}
    for depth in set(rows) - {"1"}:
        assert paired[depth, "itself at 1"]["value"] >= -1
        assert paired[depth, "its last round at this depth alone"]["high"] >= 0
