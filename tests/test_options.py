"""Options said once, and a stranger's method: registered, guarded, listed, saved and resumed."""

import copy
import json
import math
import pickle
from dataclasses import MISSING, dataclass

import numpy as np
import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import algorithms, data, linsolve
from bilevel_lite.__main__ import main
from bilevel_lite.algorithms.method import METHODS, Method
from bilevel_lite.curvature import Probes
from bilevel_lite.experiment import job
from bilevel_lite.experiment.methods import METHODS as METHODS_BY_NAME
from bilevel_lite.experiment.methods import Recipe
from bilevel_lite.factors import Layout
from bilevel_lite.kfac_richardson import KFACRichardson
from bilevel_lite.options import check, fraction, one_of, options_of, positive, whole
from bilevel_lite.refuse import NotFinite

OURS = dict(METHODS)

from stranger import Ridge  # noqa: E402
from stranger_method import HeavyBall, Same, Solved  # noqa: E402

for _own in (HeavyBall, Same, Solved):
    METHODS.pop(_own.__name__)


@pytest.fixture(autouse=True)
def only_ours():
    """What a test registers is gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def mine():
    class Mine(Method):
        """Heavy-ball steps on v, of a random length.

        v <- v + inertia (v - v_old) - u linear_lr (H v - b),   u uniform in [0, 1]
        Source: nobody (2026).
        """

        linear_lr: float = positive(help="Step on v", search=(0.01, 1.0))
        inertia: float = fraction(0.5, help="Of v")
        start: str = one_of("zero", "b", help="v at the first step", search=("zero", "b"))
        seed: int = whole(0, least=0, help="Of u")

        choices = ("Hessian", "heavy ball", "single loop")
        remembers = ("v", "old", "generator")
        roles = ("inner", "outer", "curvature")
        step_sizes = ("linear_lr",)

        def __post_init__(self):
            super().__post_init__()
            self.v = self.old = torch.zeros_like(self.theta)
            self.generator = torch.Generator().manual_seed(self.seed)

        def _direction(self):
            inner_loss, f = self._inner_steps(1), self._f(self._draw("outer"))
            v = f.theta if self.start == "b" and self.iteration == 0 else self.v
            u = float(torch.rand((), generator=self.generator))
            r = self._hessian(self._draw("curvature"))(v) - f.theta
            new = v + self.inertia * (v - self.old) - u * self.linear_lr * r
            self.v, self.old = new, v
            return inner_loss, f.value, f.lam - self._cross(self._draw("cross"), new), None

    return Mine


def task(seed=0):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=g), torch.arange(40) % 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
    risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]], l2=0.1)
    problem = bl.BilevelProblem(risk, bl.WeightedRisk(model))

    def batches(salt, size=8):
        return data.Batches(x, y, size, torch.Generator().manual_seed(10 * seed + salt), 2)

    roles = {"inner": batches(1), "outer": batches(2), "curvature": batches(3, 16)}
    at = problem, torch.full((40,), 0.5), bl.flatten(model)
    return at, {f"{role}_batch": sampler for role, sampler in roles.items()}


def make(cls, samplers=0, **given):
    at, roles = task(samplers)
    common = {
        "inner_optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "outer_optimizer": lambda p: torch.optim.Adam(p, 0.05),
        "outer_scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    }
    return cls(*at, 0.2, **{**common, **roles, **given})


# ------------------------------------------------------------------ a stranger's method


def test_it_is_entered_under_its_name_and_in_the_table():
    cls = mine()
    assert METHODS["Mine"] is cls and algorithms.METHODS is METHODS
    assert list(METHODS)[:-1] == list(OURS)
    assert algorithms.table()[-1] == ("Mine", *cls.choices, "nobody (2026)")
    again = mine()  # a notebook's cell that runs twice
    assert METHODS["Mine"] is again and len(METHODS) == len(OURS) + 1

    class Watched(cls):
        """No direction of its own: no other method."""

    assert "Watched" not in METHODS


def test_its_options_are_listed_with_default_range_meaning_and_search():
    found = mine().options()
    assert set(found) == {"linear_lr", "inertia", "start", "seed"} | set(Method.options())
    lr, start = found["linear_lr"], found["start"]
    assert (lr.default, lr.help, lr.search) == (MISSING, "Step on v", (0.01, 1.0))
    assert lr.expected == "a positive number" and not lr.none
    assert (start.default, start.search) == ("zero", ("zero", "b"))
    assert start.expected == "'zero' or 'b'"


def test_its_docstring_is_completed_from_the_fields():
    text = mine().__doc__
    assert text.startswith("Heavy-ball steps on v, of a random length.\n")
    assert text.endswith("""

Args:
    linear_lr: Step on v; a positive number.
    inertia: Of v; a number from 0 up to, not including, 1, by default 0.5.
    start: v at the first step; 'zero' or 'b', by default 'zero'.
    seed: Of u; an integer of at least 0, by default 0.
    **common: See `bilevel_lite.algorithms.method.Method`.

Source: nobody (2026).""")

    with pytest.raises(ValueError, match="damping: got .*inf.*, expected a finite number"):
        bl.KFAC(damping=np.float32("inf"))

    class Mute(bl.solvers.Solver):
        scale: float = positive(1.0, help="Of b")

    assert Mute.__doc__ == "Mute.\n\nArgs:\n    scale: Of b; a positive number, by default 1.0.\n"


BAD = [
    ({"linear_lr": 0.0}, ValueError, "linear_lr: got 0.0, expected a positive number"),
    ({"linear_lr": math.nan}, ValueError, "linear_lr: got nan, expected a positive number"),
    ({"linear_lr": None}, ValueError, "linear_lr: got None, expected a positive number"),
    ({"linear_lr": "0.1"}, ValueError, "linear_lr: got '0.1', expected a positive number"),
    ({"linear_lr": torch.ones(2)}, ValueError, "linear_lr: got tensor.*, expected a positive"),
    ({"inertia": 1.0}, ValueError, "inertia: got 1.0, expected a number from 0 up to, not inc"),
    ({"seed": 2.5}, ValueError, "seed: got 2.5, expected an integer of at least 0"),
    ({"start": "c"}, ValueError, "start: got 'c', expected 'zero' or 'b'"),
    ({"momentum": 3}, TypeError, "momentum: no argument of Mine"),
    ({"solver": bl.CG(2)}, TypeError, r"solver: Mine takes none \(v by: heavy ball\)"),
    ({"outer_lr": -1.0}, ValueError, "outer_lr: got -1.0, expected a positive step size"),
    ({"inner_batch": print}, TypeError, "inner_batch: got builtin_function"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_its_options_are_guarded(given, kind, message):
    at, roles = task()
    good = {"linear_lr": 0.2, "inner_lr": 0.1, "outer_lr": 0.1, **roles}
    mine()(*at, **good)
    with pytest.raises(kind, match=message):
        mine()(*at, **{**good, **given})


def test_a_batch_that_it_has_no_use_for_and_a_missing_option():
    with pytest.raises(ValueError, match="cross_batch: Mine has no use for it"):
        make(mine(), cross_batch=task()[1]["inner_batch"])
    at, roles = task()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'linear_lr'"):
        mine()(*at, inner_lr=0.1, outer_lr=0.1, **roles)
    with pytest.raises(ValueError, match="inner_lr: got None, expected a positive step size .or g"):
        mine()(*at, 0.2, outer_lr=0.1, **roles)


def test_its_resumed_run_is_bit_equal(tmp_path):
    cls = mine()
    whole_run = make(cls)
    for _ in range(3):
        whole_run.step()
    torch.save(whole_run.state_dict(), tmp_path / "state.pt")
    for _ in range(5):
        last = whole_run.step()
    resumed = make(cls, samplers=7, seed=5)  # other draws, until the state is loaded
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(5):
        again = resumed.step()
    # to the last bit: the same operations in the same order
    for name in ("lam", "theta", "v", "old"):
        assert torch.equal(getattr(whole_run, name), getattr(resumed, name))
    assert torch.equal(last.hypergradient, again.hypergradient)
    assert (last.iteration, last.gradients) == (again.iteration, again.gradients)
    assert torch.equal(whole_run.generator.get_state(), resumed.generator.get_state())


def test_it_counts_costs_and_takes_nothing_from_a_step_that_fails():
    method = make(mine())
    # an inner step and f on 8 examples, H v on 16, J v on 8
    assert method.step().gradients == 1 + 1 + 2 * (16 / 8) + 2
    state = method.state_dict()
    method.linear_lr = 1e300
    with pytest.raises(NotFinite, match=r"Mine, step \d .*linear_lr \(now 1e\+300\)"):
        for _ in range(5):
            state = method.state_dict()
            method.step()
    after = method.state_dict()
    for name in ("v", "old"):
        assert torch.equal(after["values"][name], state["values"][name])
    assert torch.equal(after["parts"]["generator"], state["parts"]["generator"])
    for name in ("generator", "now"):
        assert torch.equal(after["parts"]["inner_batch"][name], state["parts"]["inner_batch"][name])


def test_it_refuses_a_state_of_something_else():
    cls = mine()
    with pytest.raises(ValueError, match="state: is of method 'SOBA', expected 'Mine'"):
        at, roles = task()
        roles.pop("curvature_batch")
        make(cls).load_state_dict(bl.SOBA(*at, 0.2, inner_lr=1, outer_lr=1, **roles).state_dict())
    with pytest.raises(ValueError, match="state: outer_scheduler was MultiStepLR, expected None"):
        make(cls, outer_scheduler=None).load_state_dict(make(cls).state_dict())


def loss(lam, theta, batch):
    return (theta - lam).square().sum() + (lam * theta).square().sum()


class Kept(Method):
    """A method that can be pickled: its class can be imported."""

    linear_lr: float = positive(help="Step on v")

    def _direction(self):
        f = self._f(self._draw("outer"))
        inner_loss = self._inner_steps(1)
        return inner_loss, f.value, f.lam - self._cross(self._draw("cross"), f.theta), None


METHODS.pop("Kept")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_goes_on_by_itself(copied):
    at = bl.BilevelProblem(loss, loss), torch.ones(2), torch.ones(2)
    method = Kept(*at, 0.1, inner_lr=0.1, outer_lr=0.1)
    method.step()
    twin = copied(method)
    assert torch.equal(method.step().hypergradient, twin.step().hypergradient)


def test_a_class_that_would_not_be_what_it_says_is_refused():
    with pytest.raises(TypeError, match="Taken.step: every method has an attribute of this name"):

        class Taken(Method):
            step: float = positive(0.1)

            def _direction(self):
                raise NotImplementedError

    with pytest.raises(TypeError, match="Own: has an __init__ of its own; declare its options"):

        class Own(Method):
            def __init__(self, problem, lam, theta):
                pass

    assert not {"Taken", "Own"} & set(METHODS)


# ------------------------------------------------------------------ options


def test_a_default_or_a_search_out_of_range_is_refused_where_it_is_declared():
    with pytest.raises(ValueError, match="option: got -1.0, expected a positive number"):
        positive(-1.0)
    with pytest.raises(ValueError, match="option: got 0.0, expected a positive number"):
        positive(1.0, search=(0.0, 1.0))
    with pytest.raises(ValueError, match="option: got 'c', expected 'a' or 'b'"):
        one_of("a", "b", search=("a", "c"))


def test_any_dataclass_may_declare_options():
    @dataclass
    class Sampler:
        size: int = whole(8, least=2, help="Rows")
        rate: float | None = positive(None, help="Or None")
        seed: int = 0

    check(Sampler())
    assert set(options_of(Sampler)) == set(options_of(Sampler(4))) == {"size", "rate"}
    with pytest.raises(ValueError, match="size: got 1, expected an integer of at least 2"):
        check(Sampler(1))
    with pytest.raises(ValueError, match="rate: got None, expected a positive number"):
        check(Sampler(), "rate")


SOLVERS = (bl.Direct, bl.Identity, bl.Neumann, bl.CG, bl.CGNormal, bl.KFAC, bl.EKFAC)
DECLARED = [*OURS.values(), *SOLVERS, KFACRichardson, Probes, Layout]


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.__name__)
def test_every_option_of_ours_has_a_meaning_and_stands_in_the_docstring(cls):
    known = Method.options() if issubclass(cls, Method) else {}
    own = {k: o for k, o in options_of(cls).items() if k not in known}
    assert own
    text = " ".join(cls.__doc__.split())
    for key, one in own.items():
        assert one.help and one.expected
        assert " ".join(f" {key}: {one.help}; {one.expected}".split()) in text
        assert cls.__doc__.count(f"\n    {key}: ") == 1
        if one.search is not None:
            assert all(one.fits(end) for end in one.search)
    assert max(map(len, cls.__doc__.splitlines())) <= 100
    parts = ["\nArgs:\n", "\nRaises:\n", "\nCost", "\nExample:\n"]
    at = [cls.__doc__.index(part) for part in parts if part in cls.__doc__]
    assert at == sorted(at)


def test_the_step_of_a_linear_iteration_has_one_name():
    named = {name for name, cls in OURS.items() if "linear_lr" in cls.options()}
    assert named == {"AmIGO", "StocBiO", "SOBA", "SABA", "NBO"}


# ------------------------------------------------------------------ Richardson's iteration


def system(seed=0, d=6):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=g)
    return root @ root.T / d + 0.5 * torch.eye(d), torch.randn(d, generator=g)


def test_richardson_is_its_formula_and_from_zero_a_neumann_series():
    h, b = system()
    x0, m = torch.ones(6), torch.diag(1 / h.diagonal())
    v, residuals = x0, []
    for _ in range(4):
        residuals.append(b - (h + 0.3 * torch.eye(6)) @ v)
        v = v + 0.2 * m @ residuals[-1]
    seen = []
    done = linsolve.richardson(h.mv, b, 4, 0.2, 0.3, x0, m.mv, seen.append)
    torch.testing.assert_close(done.solution, v, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(seen), torch.stack(residuals), rtol=1e-12, atol=1e-14)
    assert (done.iterations, done.products, done.residual) == (4, 4, None)
    assert torch.equal(x0, torch.ones(6))  # the caller's start is not touched
    series = linsolve.neumann(h.mv, b, 5, 0.2)
    for start in (None, torch.zeros(6)):
        steps = linsolve.richardson(h.mv, b, 5, 0.2, x0=start)
        torch.testing.assert_close(steps.solution, series.solution, rtol=1e-12, atol=0)
        assert steps.products == series.products == 4
    many = linsolve.richardson(h.mv, b, 2000, 1 / float(torch.linalg.eigvalsh(h)[-1]))
    torch.testing.assert_close(many.solution, torch.linalg.solve(h, b), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected an integer of at least 1"),
        ({"step": 0.0}, "step: got 0.0, expected a positive number"),
        ({"damping": -1.0}, "damping: got -1.0, expected a number that is zero or positive"),
        ({"step": math.inf}, "step: got inf, expected a positive number"),
        ({"step": 9.0, "steps": 9000}, "step: 9.0 makes the Richardson iteration diverge"),
    ],
)
def test_richardson_refuses(options, message):
    h, b = system()
    with pytest.raises(ValueError, match=message):
        linsolve.richardson(h.mv, b, **{"steps": 2, "step": 0.1, **options})


def test_richardson_warns_of_a_step_that_makes_it_diverge():
    h, b = system()
    with pytest.warns(linsolve.DivergenceWarning, match="step: 9.0 makes the Richardson iteration"):
        linsolve.richardson(h.mv, b, 5, 9.0)


# ------------------------------------------------------------------ ... and by its name


RIDGE = "run stranger:ridge --method stranger_method:HeavyBall --device cpu --outer-lr 20".split()


@pytest.fixture
def heavy():
    """A stranger's class, known again though another test has forgotten it."""
    METHODS.update(HeavyBall=HeavyBall, Same=Same, Solved=Solved)
    return HeavyBall


def by_hand(settings, **options):
    """The same run by the class alone."""
    with job.float32():
        return _by_hand(Ridge.make(settings, torch.device("cpu")), options)


def _by_hand(task, options):
    at = task.problem, task.lam0, task.theta0
    sets = {"inner_batch": task.train, "outer_batch": task.validation}
    method = HeavyBall(*at, **options, **sets, inner_lr=0.1, outer_lr=20.0)
    for _ in range(3):
        method.step()
    return task.measure(method.lam, method.theta)["criterion"]


def test_by_its_name_it_runs_with_its_options_as_settings(heavy, tmp_path, capsys):
    words = [
        *RIDGE,
        "--linear-lr",
        "0.2",
        "--set",
        "inertia=0.25",
        "outer_steps=3",
        "start=b",
        "sharp=1",
    ]
    assert main([*words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    own = {"linear_lr": 0.2, "inertia": 0.25, "start": "b", "sharp": True}
    assert {"method": "stranger_method:HeavyBall", **own}.items() <= result["settings"].items()
    expected = by_hand(Ridge.settings(), **own)
    assert result["history"][-1]["criterion"] == pytest.approx(expected, rel=1e-5)
    for change in ({"start": "zero"}, {"sharp": False}, {"inertia": 0.5}):  # each of them counts
        assert abs(by_hand(Ridge.settings(), **{**own, **change}) - expected) > 5e-5 * expected
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "holds the finished run" in capsys.readouterr().out
    assert main([*words[:-1], "--out", str(tmp_path)]) == 1  # another sharp
    assert "sharp" in capsys.readouterr().err


def test_by_its_name_it_is_searched_in_the_range_that_it_declares(heavy, tmp_path):
    pytest.importorskip("optuna")
    words = ["search", *RIDGE[1:-2], "--over", "linear_lr", "outer_lr=0.1:2", "--trials", "2"]
    words += "--seeds 1 --search-steps 3 --outer-steps 4 --looks 2 --set inertia=0.1".split()
    assert main([*words, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert row["method"] == "HeavyBall" and row["space"]["linear_lr"] == [0.01, 1.0]
    assert all(0.01 <= trial["linear_lr"] <= 1.0 for trial in row["trials"])
    assert len({trial["linear_lr"] for trial in row["trials"]}) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "linear_lr: is not given, expected a positive number; "),
        (["--linear-lr", "-1"], "linear_lr: got -1.0, expected a positive number"),
        (["--linear-lr", "x"], "linear_lr: got 'x', expected a number"),
        (["--linear-lr", "0.1", "--inertia", "1"], "inertia: got 1.0, expected a number from 0"),
        (["--linear-lr", "0.1", "--start", "c"], "start: got 'c', expected 'zero' or 'b'"),
        (
            ["--linear-lr", "0.1", "--eta", "1"],
            "eta: is no option of stranger_method:Heavy",
        ),
        (
            ["--linear-lr", "0.1", "--iters", "1"],
            "iters: is not read by stranger_method:HeavyBall; it",
        ),
    ],
)
def test_by_its_name_it_is_guarded(heavy, words, message, tmp_path, capsys):
    assert main([*RIDGE, *words, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("stranger_method:Nobody", "but stranger_method has no method 'Nobody'"),
        ("stranger_method:soba", "but stranger_method has no method 'soba'"),
        ("stranger_method:torch", "but stranger_method has no method 'torch'"),
        ("stranger_method:Same", "method: stranger_method:Same has an option 'eta', which is the"),
        ("nowhere:Nobody", "there is no module 'nowhere' with a method"),
        ("AID", "method: got 'AID', expected one of"),  # a class of the book has other names
        ("stranger_method:Solved", "method: Solved needs damper, which no setting is"),
    ],
)
def test_a_name_that_is_no_method_is_refused(heavy, method, message, tmp_path, capsys):
    words = ["stranger:ridge", "--method", method, "--device", "cpu", "--out", str(tmp_path)]
    for command in (["run", *words], ["search", *words, "--over", "inner_lr"]):
        for own in ([], ["--inertia", "0.1"]):  # the method is looked at before its options
            assert main([*command, *own]) == 1
            assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["pretraining", "unlearnable", "schedules", "hyperclean"])
def test_a_name_that_is_no_method_is_refused_by_every_task(task, tmp_path, capsys):
    """Also where a task makes its method in a way of its own; before anything is loaded."""
    for command in (["run", task], ["search", task, "--over", "inner_lr"]):
        words = ["--method", "nope", "--device", "cpu", "--out", str(tmp_path)]
        assert main([*command, *words]) == 1
        assert "--method: got 'nope', expected one of ['aid-cg'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_search_of_several_has_only_what_all_of_them_have(heavy, tmp_path, capsys):
    search = ["search", "stranger:ridge", "--device", "cpu", "--out", str(tmp_path), "--method"]
    both = [*search, "stranger_method:HeavyBall", "aid-cg", "--over"]
    assert main([*both, "linear_lr"]) == 1
    assert "linear_lr: is no option of aid-cg; search for it by itself" in capsys.readouterr().err
    assert main([*both, "outer_lr=1:2", "--set", "inertia=0.1"]) == 1
    assert "inertia: is no option of aid-cg" in capsys.readouterr().err
    assert main([*search, "bome", "aid-cg", "--over", "eta"]) == 1
    assert "eta: is no option of aid-cg" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_subclass_and_a_recipe_run_too(heavy, tmp_path, capsys):
    heavier = ["--method", "stranger_method:Heavier", "--linear-lr", "0.2", "--drag", "auto"]
    assert main(["run", "stranger:ridge", *heavier, "--out", str(tmp_path / "1")]) == 0
    METHODS_BY_NAME["solved"] = Recipe(Solved, options={"damper": lambda s: bl.CG(s.iters)})
    words = "--method stranger_method:solved --note b --iters 2 --outer-steps 2".split()
    try:
        assert main(["run", "stranger:ridge", *words, "--out", str(tmp_path / "2")]) == 0
    finally:
        METHODS_BY_NAME.pop("solved")
    saved = json.loads((tmp_path / "2" / "result.json").read_text())["settings"]
    assert saved["note"] == "b" and saved["iters"] == 2


def test_the_help_with_a_method_lists_its_options(heavy, capsys):
    with pytest.raises(SystemExit):
        main(["run", "stranger:ridge", "--method", "stranger_method:HeavyBall", "--help"])
    text = capsys.readouterr().out
    assert "\nlinear_lr  stranger_method:HeavyBall: step on v; must be given\n" in text
    assert (
        "\nstart  stranger_method:HeavyBall: v at the first step; by default zero: zero, b\n"
        in text
    )


def test_a_range_that_no_option_declares_is_asked_for(heavy, tmp_path, capsys):
    words = ["search", *RIDGE[1:-2], "--out", str(tmp_path), "--over"]
    assert main([*words, "inertia"]) == 1
    assert "over: inertia declares no range; give inertia=LOW:HIGH" in capsys.readouterr().err
    assert main([*words, "start"]) == 1
    assert "over: got 'start', expected a real setting" in capsys.readouterr().err


def test_the_help_of_a_task_lists_its_settings(capsys):
    with pytest.raises(SystemExit):
        main(["run", "stranger:ridge", "--help"])
    text = capsys.readouterr().out
    assert "settings of stranger:ridge, each as --NAME VALUE:" in text
    expected = (
        "\nof ridge:\nrows=60  training examples\n",
        "\nof all tasks:\n",
        "\nouter_steps=20  outer iterations\n",
        "\nof the linear system:\n",
        "\niters=3  ",
        "\nthe methods' own numbers:\n",
        "\neta  bome: ",
    )
    at = [text.index(one) for one in expected]
    assert at == sorted(at)
