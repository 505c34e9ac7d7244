"""v and J v of one solver at one point, as `hypergradient` asks for them."""


def solve_and_cross(solver, problem, lam, theta, batch, b, diagnose=True):
    """Return v, J v on the same batch, and the diagnosis."""
    at = solver.prepare(problem, lam, theta, batch, cross=True, once=True)
    v, info = at.solve(b, diagnose)
    jv, info.cross = at.cross(v)
    return v, jv, info
