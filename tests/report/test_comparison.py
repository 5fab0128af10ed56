"""The table of methods: means and spreads, what was equal, and nothing that JSON does not know."""

import json
import math
import statistics

import pytest

from poodle_lightning.report.comparison import (
    Comparison,
    Row,
    explanation,
    mean_and_spread,
    split_facts,
    table,
    write_comparison,
)

SCORES = {"linear_miou": [0.1, 0.3], "knn_miou_small": [0.2, math.nan]}
FOUND = Comparison(
    rows=[
        Row("a", "trained", SCORES, [60.0, None], 1_234_567, 2_000_000_000),
        Row("position alone", "position", {"linear_miou": [0.128], "knn_miou_small": [math.nan]}),
    ],
    equal={"steps": 7, "recipe.lr": 0.1, "recipe.eps": None},
    different={"encoder.output_stride": {"a": 8, "b": 32}},
    seeds=[0, 1],
    notes=["A note."],
)


def test_mean_and_spread_against_the_standard_library():
    values = [0.1, 0.4, 0.25]
    assert mean_and_spread(values) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    mean, spread = mean_and_spread([0.5])
    assert mean == 0.5
    assert math.isnan(spread)
    assert all(map(math.isnan, mean_and_spread([math.nan])))


def test_facts_are_split_into_equal_and_different():
    facts = {"a": {"x": 1, "y": 2, "only": 3}, "b": {"x": 1, "y": 5}}
    assert split_facts(facts) == ({"x": 1}, {"y": {"a": 2, "b": 5}, "only": {"a": 3, "b": None}})


def test_a_row_has_percent_spread_time_and_cost():
    head, _, first, last = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(FOUND).splitlines()
    )
    assert head == ["", "linear all", "k-NN small", "train s", "M param.", "G mult-adds"]
    # the deviation of 10 and 30 over n - 1 is 10 √2
    assert first == ["a", "20.0 ± 14.1", "20.0", "60", "1.23", "2.00"]
    assert last == ["position alone", "12.8", "–", "–", "–", "–"]


def test_what_is_equal_is_said_by_group_and_what_is_not_by_method():
    assert explanation(FOUND).splitlines() == [
        "* equal: steps 7",
        "* equal, recipe: lr 0.1, eps –",
        "* not equal: encoder.output_stride: a 8, b 32",
        "",
        "A note.",
    ]


def test_the_json_has_every_seed_and_no_nan(tmp_path):
    text, data = write_comparison(tmp_path, FOUND)
    assert table(FOUND) in text.read_text()
    content = json.loads(data.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert content["rows"][0]["scores"] == {"linear_miou": [0.1, 0.3], "knn_miou_small": [0.2, None]}
    assert content["summary"]["a"]["linear_miou"]["mean"] == pytest.approx(0.2)
    assert content["summary"]["position alone"]["linear_miou"]["std"] is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
