"""Right and wrong answers to the exercises of chapter 3."""

import math

import torch


def plan(mu_min, mu_max, tolerance):
    rho = (mu_max - mu_min) / (mu_max + mu_min)
    return 2 / (mu_min + mu_max), math.ceil(math.log(tolerance) / math.log(rho))


def plan_largest(mu_min, mu_max, tolerance):  # the safe step, not the best one
    return 1 / mu_max, math.ceil(math.log(tolerance) / math.log(1 - mu_min / mu_max))


def plan_half(mu_min, mu_max, tolerance):
    return plan(mu_min, mu_max, tolerance)[0] / 2, plan(mu_min, mu_max, tolerance)[1]


def plan_products(mu_min, mu_max, tolerance):  # counts products
    step, terms = plan(mu_min, mu_max, tolerance)
    return step, terms - 1


def plan_real(mu_min, mu_max, tolerance):  # forgets to round up
    rho = (mu_max - mu_min) / (mu_max + mu_min)
    return 2 / (mu_min + mu_max), math.log(tolerance) / math.log(rho)


def plan_square_root(mu_min, mu_max, tolerance):  # CG's rate
    root = math.sqrt(mu_max / mu_min)
    return 2 / (mu_min + mu_max), math.ceil(math.log(tolerance / 2) / math.log(1 - 2 / (root + 1)))


def cross(losses, theta, v):
    values, tangent = torch.func.jvp(losses, (theta,), (v,))
    return tangent / len(values)


def cross_backward(losses, theta, v):  # n backward passes
    rows = torch.func.jacrev(losses)(theta)
    return rows @ v / len(rows)


def cross_double_backward(losses, theta, v):
    values, tangent = torch.autograd.functional.jvp(losses, theta, v)
    return tangent / len(values)


def cross_without_mean(losses, theta, v):
    return torch.func.jvp(losses, (theta,), (v,))[1]


def cross_negative(losses, theta, v):
    return -cross(losses, theta, v)


def cross_values(losses, theta, v):
    values = losses(theta)
    return values / len(values)


def cross_sum(losses, theta, v):  # one number: J v summed over the examples
    return cross(losses, theta, v).sum()


def cross_over_d(losses, theta, v):
    return cross(losses, theta, v) * len(losses(theta)) / len(theta)


def cross_row_by_row(losses, theta, v):  # n evaluations
    n = len(losses(theta))
    rows = [torch.func.grad(lambda t, i=i: losses(t)[i])(theta) @ v / n for i in range(n)]
    return torch.stack(rows)


def conjugate_gradients(stale=False, twice=False, half_scaled=False, endless=False):
    def solve(matvec, b, iters, scale=1.0, damping=0.0, tol=1e-10):
        v, r, p = torch.zeros_like(b), b.clone(), b.clone()
        for _ in range(iters):
            hp = matvec(p)
            product = scale * hp + damping * p
            curvature = p @ product + (damping * (p @ p) if twice else 0)
            alpha = (r @ r) / curvature
            old, v = v, v + alpha * p
            r_new = r - alpha * ((hp + damping * p) if half_scaled else product)
            if not endless and r_new.norm() <= tol * b.norm():
                return old if stale else v
            p = r_new + (r_new @ r_new) / (r @ r) * p
            r = r_new
        return v

    return solve


def cg_damping_in_operator_twice(matvec, b, iters, scale=1.0, damping=0.0, tol=1e-10):
    inner = conjugate_gradients()
    return inner(lambda p: matvec(p) + damping / scale * p, b, iters, scale, damping, tol)


def cg_scales_damping(matvec, b, iters, scale=1.0, damping=0.0, tol=1e-10):
    return conjugate_gradients()(matvec, b, iters, scale, scale * damping, tol)


def cg_slips(matvec, b, iters, scale=1.0, damping=0.0, tol=1e-10):  # as printed in the chapter
    v, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(iters):
        hp = matvec(p) + damping * p
        alpha = (r @ r) / (scale * (p @ hp) + damping * (p @ p))
        v_new = v + alpha * p
        r_new = r - alpha * hp
        if r_new.norm() <= tol * b.norm():
            break
        p = r_new + (r_new @ r_new) / (r @ r) * p
        v, r = v_new, r_new
    return v


def deceptive():
    return [1e-4, 0.7, 0.8, 0.9, 1.0], [2e-3, 1.0, 1.0, 1.0, 1.0]


def deceptive_exact():  # two distinct eigenvalues: CG-3 is exact
    return [1e-4, 1.0, 1.0, 1.0], [1e-3, 1.0, 1.0, 1.0]


def deceptive_residual():  # the small direction shows in the residual
    return [1e-4, 0.7, 0.8, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]


def deceptive_condition():
    return [1e-6, 0.8, 0.9, 1.0, 1.1], [1e-4, 1.0, 1.0, 1.0, 1.0]


def energy(first=0, power=0.5, factor=1.0, extra=0):
    def estimate(matvec, b, k, m):
        r, p, total = b, b, 0.0
        for j in range(k + m + extra):
            hp = matvec(p)
            alpha = (r @ r) / (p @ hp)
            if k + first <= j < k + m + first:
                total = total + factor * alpha * (r @ r)
            r_new = r - alpha * hp
            p = r_new + (r_new @ r_new) / (r @ r) * p
            r = r_new
        return total**power

    return estimate


def energy_residual(matvec, b, k, m):  # the residual norm, not the energy error
    v = conjugate_gradients()(matvec, b, k) if k else torch.zeros_like(b)
    return (b - matvec(v)).norm()


RIGHT = {
    "3.A": (0, 0.895),
    "3.B": (0.001, 0.995),
    "3.1": (3, 90),
    "3.2": plan,
    "3.3": cross,
    "3.4": conjugate_gradients(),
    "3.5": deceptive,
    "3.6": energy(),
}

WRONG = {
    "3.A": [
        (0, 0.904),
        (0, 0.99),
        (0.895, 0),
        (1, 0.895),
        (0, 0.105),
        (0, 0.01),
        (0, 0),
        (0, 0.89),
        0,
    ],
    "3.B": [
        (0.001, 0.001),
        (0.995, 0.001),
        (0.001, 10),
        (0.001, 0.909),
        (1, 0.995),
        (0.1, 0.995),
        3,
    ],
    "3.1": [(4, 90), (132, 90), (32, 90), (3, 89), (3, 2301), 3],
    "3.2": [plan_largest, plan_half, plan_products, plan_real, plan_square_root],
    "3.3": [
        cross_without_mean,
        cross_negative,
        cross_values,
        cross_sum,
        cross_over_d,
        cross_row_by_row,
        cross_backward,
        cross_double_backward,
    ],
    "3.4": [
        cg_slips,
        conjugate_gradients(stale=True),
        conjugate_gradients(twice=True),
        conjugate_gradients(half_scaled=True),
        conjugate_gradients(endless=True),
        cg_damping_in_operator_twice,
        cg_scales_damping,
    ],
    "3.5": [deceptive_exact, deceptive_residual, deceptive_condition],
    "3.6": [
        energy(power=1),
        energy(factor=0.5),
        energy(first=1, extra=1),
        energy(first=-1),
        energy_residual,
    ],
}
