"""The study of poisoning: the solvers of the main paper's Table 5, and what they are held against.

Every attack has the same inner steps and the same trials, and searches one number, the step on the
generator, in a box of a factor of five each way around `MIDDLE` (by first trials on 5,000 rows of
MNIST, seed 0, tuning accuracy).
``tgda`` is the linear solver of the public attack that the paper compares with (16 iterations on
the normal equations, undamped); ``NAME-negative`` attacks by minus the cross-entropy, as the papers
do.
What searches for nothing are the fresh defenders alone: on clean rows, with flipped labels, with
noise. With the last two a run steps on the smallest batches, and its generator goes unused; on
clean rows it does the inner steps of an attack by a solver, so that its theta is what theirs is
held against (BOME's theta takes one step an outer iteration).
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks.poisoning import Poisoning

__all__ = ["MIDDLE", "PLAIN", "SOLVERS", "Poisoning", "variants"]

PLAIN = {"clean": "none", "flip": "flip", "noise": "noise"}
# as little as a run can do beside its inner steps, and in these: its defender is what counts
STILL = {
    "method": "aid-identity", "curvature_batch_size": 50, "cross_batch_size": 50,
    "outer_batch_size": 1, "outer_lr": 1e-9,
}  # fmt: skip
IDLE = {**STILL, "inner_steps": 1, "batch_size": 50}
SOLVERS: dict[str, dict] = {
    "identity": {"method": "aid-identity", "step": 0.1},
    "cg-3": {"method": "aid-cg", "iters": 3},
    "cg-3-ggn": {"method": "aid-cg", "iters": 3, "curvature": "ggn"},
    "cg-normal-3": {"method": "aid-cg-normal", "iters": 3},
    "tgda": {"method": "aid-cg-normal", "iters": 16, "damping": 0.0},
    "kfac": {"method": "aid-kfac"},
    "bome": {"method": "bome", "step": 0.1},
    "cg-3-negative": {"method": "aid-cg", "iters": 3, "objective": "negative"},
    "kfac-negative": {"method": "aid-kfac", "objective": "negative"},
}
MIDDLE = {
    "identity": 200.0,
    "cg-3": 10.0,
    "cg-3-ggn": 10.0,
    "cg-normal-3": 50.0,
    "tgda": 50.0,
    "kfac": 50.0,
    "bome": 5000.0,
    "cg-3-negative": 10.0,
    "kfac-negative": 50.0,
}


def variants(dataset: str, model: str) -> list[Variant]:
    """What has nothing to search, then the attacks."""
    plain = [
        Variant(name, {**(STILL if name == "clean" else IDLE), "attack": attack})
        for name, attack in PLAIN.items()
    ]
    # with a linear model GGN and Hessian are the same matrix; of networks H is not positive
    return plain + [
        Variant(name, settings, {"outer_lr": (MIDDLE[name] / 5, MIDDLE[name] * 5)})
        for name, settings in SOLVERS.items()
        if model != "linear" or not name.endswith("-ggn")
    ]
