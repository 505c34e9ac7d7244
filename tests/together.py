"""What several tests do: a solver's v and J v at one point, and a run that is stopped half-way."""

import json

from bilevel_lite.__main__ import main


def solve_and_cross(solver, problem, lam, theta, batch, b, diagnose=True):
    """Return v, J v on the same batch, and the diagnosis, as `hypergradient` asks for them."""
    at = solver.prepare(problem, lam, theta, batch, cross=True, once=True)
    v, info = at.solve(b, diagnose)
    jv, info.cross = at.cross(v)
    return v, jv, info


def timeless(folder):
    """The numbers of a finished run: neither seconds nor memory nor where it was made."""
    result = json.loads((folder / "result.json").read_text("utf-8"))
    for row in [result["best"], *result["history"]]:
        del row["seconds"]
    return {k: v for k, v in result.items() if k not in ("provenance", "sha256", "memory")}


def stopped_and_resumed(words, folder, monkeypatch, capsys, method, at):
    """Run a command whole, and once more stopped at an iteration of ``method`` and then resumed.

    Returns:
        The numbers of the whole run, which those of the resumed one equal, and what it printed.
    """
    assert main([*words, "--out", str(folder / "whole")]) == 0
    shown, step = capsys.readouterr().out, method.step

    def stops(self):
        if self.iteration == at:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(method, "step", stops)
    assert main([*words, "--out", str(folder / "cut")]) == 130
    monkeypatch.setattr(method, "step", step)
    capsys.readouterr()
    assert main([*words, "--out", str(folder / "cut")]) == 0
    assert "resuming" in capsys.readouterr().out
    whole = timeless(folder / "whole")
    assert timeless(folder / "cut") == whole
    return whole, shown
