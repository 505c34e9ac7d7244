"""Stored studies are compared by pairs, on seeds that no search has seen."""

import pytest
import torch
from scipy import stats

from bilevel_lite.experiment import comparing


def run(seed, loss, history=True):
    out = {"seed": seed, "best": {"test_loss": loss}}
    return {**out, "history": [{"seconds": seed, "tuning_loss": loss}]} if history else out


def row(method, runs, chosen=None, **settings):
    return {"method": method, "settings": settings, "chosen": chosen or {}, "runs": runs}


STORED = {
    "study": {"runs": [{"results": [
        row("kfac", [run(0, 0.1), run(1, 0.5), run(2, 0.7, False)], {"damping": 0.1}),
        row("cg", [run(1, 0.6), run(2, 0.9)], {"damping": 0.2}),
    ]}]},
    "later": {"runs": [{"results": [row("kfac", [run(3, 0.6)], damping=0.1)]}]},
    "elsewhere": {"runs": [{"results": [row("kfac", [run(3, 0.6)], damping=0.3)]}]},
    "alone": {"runs": [
        {
            "settings": {"method": "cg", "seed": seed, "damping": 0.2}, "best": {"test_loss": 0.65},
            "history": [{"seconds": 8}, {"seconds": 6 + seed}],
        } for seed in (4, 3)
    ]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _stored(monkeypatch):
    monkeypatch.setattr(comparing, "stored", STORED.__getitem__)


def test_the_searchs_own_seed_is_left_out_and_later_seeds_join():
    rows = comparing.fresh("study", "later", "alone")
    seeds = {name: [one["seed"] for one in r["runs"]] for name, r in rows.items()}
    assert seeds == {"kfac": [1, 2, 3], "cg": [1, 2, 4, 3]}
    assert comparing.fresh("alone")["cg"]["runs"][0]["last"] == {"seconds": 10}
    assert [one["seed"] for one in STORED["study"]["runs"][0]["results"][0]["runs"]] == [0, 1, 2]


def test_runs_at_two_points_are_not_one_row():
    with pytest.raises(ValueError, match=r"kfac: stands at two points.*damping.*0\.3, 0\.1"):
        comparing.fresh("study", "elsewhere")


def test_the_course_is_that_of_the_last_seed_that_has_one():
    courses = comparing.courses("study", "alone")
    assert [courses[name][-1]["seconds"] for name in ("kfac", "cg")] == [1, 9]


def test_a_difference_is_scipys_paired_interval():
    rows = comparing.fresh("study", "later", "alone")
    each, middle, half = comparing.difference(rows["kfac"], rows["cg"])
    interval = stats.ttest_rel([0.5, 0.7, 0.6], [0.6, 0.9, 0.65]).confidence_interval(0.95)
    assert torch.tensor(each).allclose(torch.tensor([-0.1, -0.2, -0.05]))
    assert abs(middle - half - interval.low) < 1e-12 > abs(middle + half - interval.high)


def test_a_memory_is_compared_with_none_at_one_point_whosever_it_is():
    def cell(name, ema, at, *losses, damping=0.5):
        runs = [run(seed, loss) for seed, loss in enumerate(losses, 1)]
        return row(name, runs, {"inner_lr": at}, ema=ema, batch_size=8, damping=damping)

    rows = [
        cell("ema0", 0.0, 0.1, 0.5, 0.4),
        cell("ema0.9", 0.9, 0.2, 0.4, 0.2),
        cell("ema0.9-at0", 0.9, 0.1, 0.45, 0.3),
        cell("ema0-at0.9", 0.0, 0.2, 0.5, 0.3),
        cell("elsewhere", 0.0, 0.3, 0.1, 0.1),
        cell("other damping", 0.0, 0.1, 0.1, 0.1, damping=0.25),
    ]
    pairs = comparing.memory_pairs(rows)
    assert list(pairs) == ["8, 0.5, 0.9 (0.2)", "8, 0.5, 0.9 (0.1)"]
    found = torch.tensor([each for each, *_ in pairs.values()])
    assert found.allclose(torch.tensor([[-0.1, -0.1], [-0.05, -0.1]]))
