"""People's answers against hand-computed and published values."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate.preference.answers import (
    Sheet,
    evaluate_answers,
    nominal_alpha,
    read_sheet,
)
from stages.evaluate.preference.questions import Key, Question


def key_of(*pairs, checks=()):
    """A key with a question per (left, right), each of a prompt of its own, then the checks."""
    models = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    questions = [
        Question(id=f"q{n}", left=left, right=right, prompt=f"prompt {n}", check=None)
        for n, (left, right) in enumerate(pairs)
    ]
    questions += [
        Question(id=f"c{n}", left=models[0], right=models[0], prompt="check", check=side)
        for n, side in enumerate(checks)
    ]
    return Key(page="page", models=models, questions={one.id: one for one in questions})


def sheet(choices, rater="ann", seconds=5.0):
    return Sheet(rater=rater, choices=choices, seconds=dict.fromkeys(choices, seconds))


def numbered(text):
    """Choices of q0, q1, …: l, r or t."""
    words = {"l": "left", "r": "right", "t": "tie"}
    return {f"q{n}": words[letter] for n, letter in enumerate(text) if letter != "."}


class TestWinRate:
    def test_counts_the_model_not_the_place(self):
        key = key_of(("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"))
        (found,) = evaluate_answers(key, [sheet(numbered("lrtl"))], seed=0).win_rates
        assert (found.wins, found.losses, found.ties) == (2, 1, 1)
        assert found.rate.mean == (1 + 1 + 0.5 + 0) / 4

    def test_answers_of_several_people_to_a_prompt_are_one_value(self):
        key = key_of(*[("a", "b")] * 6)
        sheets = [sheet(numbered("llllrr"), "ann"), sheet(numbered("lllrr."), "bob")]
        (found,) = evaluate_answers(key, sheets, seed=0).win_rates
        assert found.rate.mean == pytest.approx((1 + 1 + 1 + 0.5 + 0 + 0) / 6)
        assert (found.rate.count, found.rate.prompts) == (11, 6)
        assert found.rate.low is not None

    def test_checks_do_not_count(self):
        key = key_of(("a", "b"), checks=["left"])
        (found,) = evaluate_answers(key, [sheet({"q0": "right", "c0": "left"})], seed=0).win_rates
        assert (found.wins, found.losses, found.ties) == (0, 1, 0)

    def test_a_pair_without_answers_has_no_rate(self):
        key = key_of(("a", "b"), ("a", "c"))
        rates = evaluate_answers(key, [sheet({"q0": "left"})], seed=0).win_rates
        known = {(one.first, one.second): one.rate.mean for one in rates}
        assert known["a", "b"] == 1
        assert math.isnan(known["a", "c"])


class TestStrengths:
    def strengths(self, *games):
        """Of (left, right, times that the left one won)."""
        pairs = [(left, right) for left, right, wins, total in games for _ in range(total)]
        text = "".join("l" * wins + "r" * (total - wins) for *_, wins, total in games)
        return evaluate_answers(key_of(*pairs), [sheet(numbered(text))], seed=0).strengths

    def test_are_the_ratio_of_wins_in_closed_form(self):
        """Three models, each pair with the odds 2:1 and 4:1 that strengths 4, 2, 1 would give."""
        found = self.strengths(("a", "b", 200, 300), ("b", "c", 200, 300), ("a", "c", 240, 300))
        assert list(found) == ["a", "b", "c"]
        assert found["a"] / found["b"] == pytest.approx(2, rel=0.01)
        assert found["a"] / found["c"] == pytest.approx(4, rel=0.01)
        assert math.prod(found.values()) == pytest.approx(1)

    def test_maximise_the_likelihood(self):
        """No small change of a strength raises the likelihood of the wins and the added ties."""
        games = [("a", "b", 7, 10), ("b", "c", 3, 9), ("a", "c", 5, 6)]
        found = self.strengths(*games)

        def likelihood(strengths):
            terms = []
            for one, two, wins, total in games:
                chance = strengths[one] / (strengths[one] + strengths[two])
                losses = total - wins
                terms += [(wins + 0.5) * math.log(chance), (losses + 0.5) * math.log(1 - chance)]
            return sum(terms)

        best = likelihood(found)
        for name in found:
            for factor in (0.99, 1.01):
                assert likelihood(found | {name: found[name] * factor}) < best

    def test_stay_finite_if_one_always_wins(self):
        found = self.strengths(("a", "b", 9, 9), ("a", "c", 9, 9), ("b", "c", 5, 9))
        assert found["a"] > 5
        assert all(math.isfinite(value) for value in found.values())

    def test_two_models_have_a_win_rate_instead(self):
        assert not self.strengths(("a", "b", 1, 2))


class TestAgreement:
    def test_is_krippendorffs_published_example(self):
        """Four observers and twelve units (2011, section C): alpha = 0.743."""
        rows = [
            "1 2 3 3 2 1 4 1 2 . . .",
            "1 2 3 3 2 2 4 1 2 5 . 3",
            ". 3 3 3 2 3 4 2 2 5 1 .",
            "1 2 3 3 2 4 4 1 2 5 1 .",
        ]
        units = [
            [value for value in column if value != "."]
            for column in zip(*(row.split() for row in rows), strict=True)
        ]
        assert nominal_alpha(units) == pytest.approx(0.743, abs=5e-4)

    @given(st.lists(st.lists(st.sampled_from("lrt"), min_size=1, max_size=5), max_size=8))
    def test_equals_the_definition_by_pairs(self, units):
        shared = [unit for unit in units if len(unit) > 1]
        values = [value for unit in shared for value in unit]
        found = nominal_alpha(units)
        if len(set(values)) < 2:
            assert found is None
            return
        observed = sum(
            (one != other) / (len(unit) - 1)
            for unit in shared
            for i, one in enumerate(unit)
            for j, other in enumerate(unit)
            if i != j
        ) / len(values)
        expected = sum(
            one != other for i, one in enumerate(values) for j, other in enumerate(values) if i != j
        ) / (len(values) * (len(values) - 1))
        assert found == pytest.approx(1 - observed / expected, abs=1e-9)

    def test_is_none_with_one_person(self):
        key = key_of(("a", "b"), ("a", "b"))
        assert evaluate_answers(key, [sheet(numbered("lr"))], seed=0).agreement is None


class TestCareless:
    def careless(self, choices, *, seconds=5.0, checks=()):
        key = key_of(*[("a", "b")] * 12, checks=checks)
        answers = sheet(choices, seconds=seconds)
        return " ".join(evaluate_answers(key, [answers], seed=0).careless.get("ann", ()))

    def test_missed_checks_are_named(self):
        choices = numbered("lrlr") | {"c0": "left", "c1": "tie"}
        assert "1 of 2 attention checks missed" in self.careless(choices, checks=["left", "right"])

    def test_answers_without_looking_are_named(self):
        assert "0.4 s per answer" in self.careless(numbered("lrlr"), seconds=0.4)

    def test_one_key_held_down_is_named(self):
        assert "100% of the answers are right" in self.careless(numbered("r" * 12))
        assert not self.careless(numbered("r" * 6))

    def test_careful_answers_are_not(self):
        choices = numbered("lrltrllrrltr") | {"c0": "left"}
        assert not self.careless(choices, checks=["left"])


class TestFiles:
    @pytest.fixture
    def write(self, tmp_path):
        def write(name="answers.json", **changes):
            content = {"page": "page", "rater": "ann", "answers": {"q0": ANSWER}} | changes
            (tmp_path / name).write_text(json.dumps(content))
            return tmp_path / name

        return write

    def test_are_read(self, write):
        found = read_sheet(write(), key_of(("a", "b")))
        assert found == sheet({"q0": "left"}, seconds=2.5)

    def test_without_a_name_are_named_after_the_file(self, write):
        assert read_sheet(write("bob.json", rater=""), key_of(("a", "b"))).rater == "bob"

    @pytest.mark.parametrize(
        "changes",
        [
            {"page": "other"},
            {"page": 3},
            {"answers": []},
            {"answers": {}},
            {"answers": {"q9": {"choice": "left", "seconds": 1}}},
            {"answers": {"q0": {"choice": "up", "seconds": 1}}},
            {"answers": {"q0": {"choice": ["left"], "seconds": 1}}},
            {"answers": {"q0": {"choice": "left"}}},
            {"answers": {"q0": {"choice": "left", "seconds": -1}}},
            {"answers": {"q0": {"choice": "left", "seconds": "1"}}},
            {"answers": {"q0": "left"}},
        ],
    )
    def test_of_another_form_are_refused_by_name(self, write, changes):
        with pytest.raises(ValueError, match=r"answers\.json"):
            read_sheet(write(**changes), key_of(("a", "b")))

    def test_of_one_person_count_once(self):
        key = key_of(("a", "b"))
        with pytest.raises(ValueError, match="two files hold answers of 'ann'"):
            evaluate_answers(key, [sheet({"q0": "left"}), sheet({"q0": "tie"})], seed=0)


ANSWER = {"choice": "left", "seconds": 2.5}


def test_intervals_hold_the_true_rate_about_as_often_as_stated():
    """People who prefer the first model with probability 0.7, at 30 prompts."""
    rng = np.random.default_rng(0)
    key = key_of(*[("a", "b")] * 30)
    hits = 0
    for trial in range(40):
        text = "".join("l" if rng.random() < 0.7 else "r" for _ in range(30))
        (found,) = evaluate_answers(key, [sheet(numbered(text))], seed=trial).win_rates
        hits += found.rate.low <= 0.7 <= found.rate.high
    assert hits >= 33
