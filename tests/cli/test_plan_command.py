"""`shoal plan`: the drawing says what the plan does, and the command says what is wrong with its options."""

from __future__ import annotations

import json
import math
import random

import pytest
from typer.testing import CliRunner

import shoal
from shoal.cli.main import app
from shoal.cli.plan import PARTIAL, draw_plan
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.policies import POLICIES, policy_at
from shoal.depth.skipdecode import SkipDecode

runner = CliRunner()


def test_the_example_of_the_docstring() -> None:
    drawn = draw_plan(DepthPlan((ALWAYS, 1, ALWAYS)), prompt_tokens=3, new_tokens=3).plain
    assert drawn.splitlines() == ["layer  prompt · 2 decode passes", "    2  ███ ██", "    1  ███ █·", "    0  ███ ██"]


@pytest.mark.parametrize("seed", range(20))
def test_the_drawing_shows_what_the_plan_runs(seed: int) -> None:
    """Random plans, narrow and wide: the filled eighths of a layer's row are the passes that it serves."""
    rng = random.Random(seed)
    prompt_layers = tuple(range(4)) if seed % 2 else None
    cutoffs = (ALWAYS, *(rng.randrange(200) for _ in range(3)), *((0,) if prompt_layers else (rng.randrange(200),)))
    plan = DepthPlan(cutoffs, prompt_layers=prompt_layers)
    passes = rng.choice([1, 20, 199])
    lines = draw_plan(plan, prompt_tokens=3, new_tokens=passes + 1, width=50).plain.splitlines()
    per_column = int(lines[0].rsplit(", ", 1)[1].split()[0]) if "to a column" in lines[0] else 1
    assert all(len(line) <= 50 for line in lines[1:])
    for layer, line in enumerate(reversed(lines[1:])):
        _, prompt, decode = line.split()
        assert prompt == ("█" if plan.runs_prompt[layer] else "·") * 3
        columns = [range(first, min(first + per_column, passes)) for first in range(0, passes, per_column)]
        served = [sum(layer in plan.active(clock) for clock in clocks) / len(clocks) for clocks in columns]
        assert decode == "".join(PARTIAL[math.ceil(8 * part)] for part in served)


def test_json_holds_the_plan_and_its_costs() -> None:
    result = runner.invoke(
        app, ["plan", "--layers", "24", "--depth", "1/2", "--prompt-tokens", "35", "--new-tokens", "30", "--json"]
    )
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    plan = SkipDecode(depth=0.5).plan(24, prompt_tokens=35, max_new_tokens=30)
    assert DepthPlan.from_dict(data["plan"]) == plan
    assert data["costs"]["dense"]["decode_layer_tokens"] == 24 * 29
    assert data["costs"]["plan"]["decode_layer_tokens"] == sum(plan.depth(clock) for clock in range(29))
    assert data["costs"]["plan"]["prompt_layer_tokens"] == 24 * 35
    assert data["costs"]["shallow prompt"]["prompt_layer_tokens"] == 18 * 35


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_any_policy_by_name(name: str) -> None:
    arguments = ["plan", "--layers", "12", "--policy", name, "--depth", "1/2", "--new-tokens", "20", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    plan = policy_at(name, 0.5, horizon=20).plan(12, prompt_tokens=35, max_new_tokens=20)
    assert DepthPlan.from_dict(data["plan"]) == plan
    assert data["costs"]["plan"]["decode_layer_tokens"] == sum(plan.depth(clock) for clock in range(19))
    assert ("shallow prompt" in data["costs"]) == (name == "skipdecode")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "unified", "--depth", "1/2", "--horizon", "9"], "has no --horizon"),
        (["--policy", "d3", "--depth", "1/2", "--clock", "column"], "has no --clock"),
        (
            ["--policy", "early-termination", "--depth", "1/2", "--prompt-layers", "max_layers"],
            "has no --prompt-layers",
        ),
        (["--policy", "hierarchical"], "give it a depth"),
        (["--policy", "unified", "--depth", "1/12"], "choose between 2/12"),
        (["--policy", "unfied", "--depth", "1/2"], "unfied"),
    ],
)
def test_settings_that_a_policy_does_not_have_are_refused(options: list[str], says: str) -> None:
    result = runner.invoke(app, ["plan", "--layers", "12", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in result.output


def test_the_picture_and_the_table_are_printed() -> None:
    result = runner.invoke(app, ["plan", "--layers", "6", "--min-layers", "2", "--max-layers", "4"])
    assert result.exit_code == 0
    assert "29 decode passes" in result.stdout
    assert "layer-tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "24", "--depth", "1/40"], "outside what 24 layers with 1 warm-up allow: choose between 2/24"),
        (["--layers", "24", "--depth", "3"], "outside the allowed range"),
        (["--layers", "24", "--depth", "half"], "write it as 0.5 or 1/2"),
        (["--layers", "24", "--depth", "1/0"], "write it as 0.5 or 1/2"),
        (["--layers", "24", "--min-layers", "9", "--max-layers", "8"], "min_layers 9 is above max_layers 8"),
        (["--layers", "24", "--min-layers", "9"], "go together"),
        (["--layers", "24", "--depth", "1/2", "--min-layers", "9"], "either depth, or"),
        (["--layers", "24", "--dept", "1/2"], "--depth"),
        (["--depth", "1/2"], "either MODEL or --layers"),
        (["--layers", "24", "--dtype", "bfloat16"], "--dtype and --revision are of a MODEL"),
        (["--layers", "24", "--revision", "main"], "--dtype and --revision are of a MODEL"),
        (["/no/such/model", "--depth", "1/2"], "/no/such/model"),
    ],
)
def test_bad_options_get_a_message_and_no_traceback(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_command_suggests_the_nearest() -> None:
    result = runner.invoke(app, ["pln"])
    assert result.exit_code == 2
    assert "plan" in result.stderr


def test_version_is_that_of_the_package() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"shoal {shoal.__version__}\n"
