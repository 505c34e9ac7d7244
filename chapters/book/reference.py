"""The API reference of the site: which names it lists, and how a docstring becomes a page.

The docstrings are written to be read in a terminal, with formulas as indented lines. `prepared`
turns them into what Sphinx reads, before its extension napoleon sees Args, Returns and Raises.
"""

# title -> names in bilevel_lite, those of its modules with the module
GROUPS = {
    "A bilevel problem": [
        "BilevelProblem", "WeightedRisk", "SumOfRisks", "flatten", "unflatten", "params.predict",
    ],
    "Hypergradients": [
        "hypergradient", "unrolled_hypergradient", "finite_difference_hypergradient", "check",
        "audit",
    ],
    "Solvers": [
        "CG", "CGNormal", "Neumann", "Identity", "Direct", "KFAC", "EKFAC", "KFACRichardson",
        "NegativeCurvatureWarning", "DivergenceWarning",
    ],
    "Methods": [
        "AID", "ITD", "AmIGO", "StocBiO", "MRBO", "SOBA", "SABA", "NBO", "NHGD", "SAMA", "BSG1",
        "BOME", "BVFSM", "F2SA", "algorithms.method.Method",
    ],
    "Linear systems and derivatives": [
        "linsolve.cg", "linsolve.cg_normal", "linsolve.neumann", "linsolve.richardson",
        "linsolve.direct", "products.gradient", "products.hvp", "products.hvp_operator",
        "products.hessian", "products.cross_vp",
    ],
    "Curvature": [
        "curvature.Hessian", "curvature.GGN", "curvature.Fisher", "curvature.EmpiricalFisher",
        "curvature.ggn_vp", "factors.kfac_factors", "blocks.kfac_operator",
        "ekfac.ekfac_operator", "kronecker.heuristic_damping", "kronecker.kronecker_inverse",
    ],
    "Data and models": [
        "data.load", "data.available", "data.split", "data.corrupt_labels", "data.pair_flips",
        "data.standardise", "data.Batches", "models.build", "models.linear", "models.mlp",
        "models.lenet", "models.resnet18",
    ],
    "Notebooks": [
        "setup", "progress", "exercises.check", "experiment.stored", "plotting.figure",
        "drawings.canvas",
    ],
}  # fmt: skip
MODULES = ["data", "drawings", "exercises", "experiment", "models", "plotting", "tasks"]
