"""The hypercleaning job of the command line: baselines, the learned weights, a result, a figure."""

import base64
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bilevel_lite import data, models
from bilevel_lite.algorithms.method import Method
from bilevel_lite.curvature import FISHERS
from bilevel_lite.experiment import Clock, RunError, RunFolder, provenance, writing
from bilevel_lite.session import no_tf32, pick_device, progress
from bilevel_lite.tasks import cleaning_methods
from bilevel_lite.tasks import hypercleaning as hc
from bilevel_lite.tasks.cleaning_methods import METHODS

__all__ = ["DEFAULTS", "METHODS", "OPTIONS", "Settings", "run"]

# What the command line can change, with its type and meaning.
OPTIONS = {
    "outer_steps": (int, "outer iterations"),
    "inner_steps": (int, "inner steps per outer iteration"),
    "inner_lr": (float, "inner step size"),
    "inner_momentum": (float, "inner momentum"),
    "outer_lr": (float, "outer step size"),
    "batch_size": (int, "inner batch; 0 is the whole training set"),
    "curvature_batch_size": (int, "batch of the Hessian; 0 is the whole training set"),
    "outer_batch_size": (int, "batch of f; 0 is the whole validation set"),
    "cross_batch_size": (int, "batch of J; 0 is the whole training set"),
    "iters": (int, "CG, AmIGO or NBO steps on the linear system, or Neumann terms"),
    "damping": (float, "added to the curvature; NHGD: the start of its Fisher"),
    "step": (float, "step on the linear system, of the identity, or of BOME's copy"),
    "strength": (
        float,
        "the method's own number: MRBO's memory, SAMA's alpha, BSG-1's floor, BOME's eta, BVFSM's "
        "nu and slack, F2SA's penalty, NHGD's beta; by default as the method's class has it",
    ),
    "curvature": (str, "H of CG and Neumann: hessian or ggn"),
    "fisher": (str, "gradients of KFAC and EKFAC: mc, exact or empirical"),
    "ema": (float, "memory of KFAC's factors, 0 is none"),
    "every": (int, "outer iterations for which KFAC's factors are kept"),
    "noise": (float, "fraction of training labels redrawn"),
    "noise_kind": (str, "what a redrawn label becomes: uniform (any class) or pair (the next one)"),
    "l2": (float, "coefficient of ||theta||^2 in the inner loss"),
    "stem": (str, "first layers of resnet18: cifar or imagenet"),
    "batchnorm": (
        str,
        "its statistics: batch (in inner steps), refresh (at each outer iteration) or frozen",
    ),
    "evaluate_every": (int, "outer iterations between evaluations and checkpoints"),
    "baselines": (int, "also train the baselines and retrain with the weights; 0 does not"),
    "budget": (float, "stop after so many gradients (of one inner batch), 0 is no such limit"),
}


@dataclass
class Settings:
    """Every number that the result depends on; see `OPTIONS` for their meaning."""

    dataset: str
    model: str
    method: str
    seed: int
    outer_steps: int = 400
    inner_steps: int = 10
    inner_lr: float = 0.1
    inner_momentum: float = 0.9
    outer_lr: float = 1000.0
    batch_size: int = 1000
    curvature_batch_size: int = 2000
    outer_batch_size: int = 0
    cross_batch_size: int = 0
    iters: int = 3
    damping: float = 0.1
    step: float = 0.1
    strength: float | None = None
    curvature: str = "hessian"
    fisher: str = "mc"
    ema: float = 0.0
    every: int = 1
    noise: float = 0.5
    noise_kind: str = "uniform"
    l2: float = 1e-5
    stem: str = "cifar"
    batchnorm: str = "batch"
    evaluate_every: int = 10
    budget: float = 0.0
    baselines: int = 1


# Chosen on the tuning split (of seed 0, but for digits), never on the test set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mnist": {},
    # The lowest tuning loss (mean of seeds 10 to 14, 400 outer steps), one setting after the other:
    # outer_lr of 20, 60, 100, 200 (0.257, 0.243, 0.245, 0.345; 10 inner steps), l2 of 1e-5, 1e-4,
    # 1e-3 (0.258, 0.243, 0.358), inner_steps of 5, 10, 20 (0.242, 0.243, 0.243). The rest is older.
    "digits": {
        "outer_steps": 400,
        "inner_steps": 5,
        "inner_lr": 0.5,
        "outer_lr": 60.0,
        "batch_size": 250,
        "curvature_batch_size": 1000,
        "l2": 1e-4,
    },
    "cifar10": {
        "outer_steps": 1000,
        "inner_lr": 0.02,
        "outer_lr": 1000.0,
        "batch_size": 128,
        "curvature_batch_size": 128,
        "outer_batch_size": 128,
        "cross_batch_size": 128,
        "evaluate_every": 20,
    },
}

# The l2 coefficients among which each baseline chooses, on the tuning split.
BASELINE_L2 = (1e-5, 1e-4, 1e-3)


def run(
    dataset: str,
    model: str,
    method: str,
    seed: int,
    out: str,
    device: str | None = None,
    **options: Any,
) -> dict:
    """Learn one weight per training example; write log, checkpoints, result and figure to ``out``.

    Args:
        dataset: ``"mnist"``, ``"cifar10"`` or ``"digits"``.
        model: A key of `bilevel_lite.models.MODELS`.
        method: One of `METHODS`.
        seed: Of the split, the noise, the initial parameters and the batches.
        out: The output folder. If it holds an unfinished run with the same settings, that run is
            resumed; if it holds a finished one, its result is shown again.
        device: Such as ``"cpu"``; CUDA if there, by default.
        **options: Any of `OPTIONS`; None means the dataset's default.

    Returns:
        The result, as written to ``result.json``.

    Raises:
        ValueError: for an unknown name or a setting out of range.
        DataError: if the dataset cannot be had.
        RunError: if the folder cannot be used.
    """
    for name, value, known in (("dataset", dataset, DEFAULTS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {sorted(known)}")
    chosen = {k: v for k, v in options.items() if v is not None}
    settings = Settings(dataset, model, method, seed, **{**DEFAULTS[dataset], **chosen})
    for name, known in KNOWN.items():
        if getattr(settings, name) not in known:
            raise ValueError(f"{name}: got {getattr(settings, name)!r}, expected {sorted(known)}")
    for name in ("outer_steps", "evaluate_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")
    train, validation, _ = hc.SIZES[dataset]
    for name in OPTIONS:
        most, value = validation if name == "outer_batch_size" else train, getattr(settings, name)
        if name.endswith("batch_size") and not 0 <= value <= most:
            raise ValueError(f"{name}: got {value}, expected 1 to {most}, or 0 for all {most}")
    place = pick_device(device)
    with float32(), RunFolder(out, vars(settings)) as folder:
        if (folder.path / "result.json").exists():
            result = folder.read_result()
            print(f"{folder.path} holds the finished run:")
        else:
            result = run_job(settings, place, folder, build_task(settings, place))
        if settings.baselines:
            _draw(result, folder.path)
    print(table(result))
    return result


@contextmanager
def float32():
    """Hold the default dtype at float32, whatever a notebook has set: layers draw in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    no_tf32()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_job(s: Settings, device: torch.device, folder: RunFolder, task: hc.Hypercleaning) -> dict:
    """Run or resume the job in its folder, and put the result together."""
    method = cleaning_methods.build(s, task)
    state = folder.state or {"baselines": {}, "best": None, "seconds": 0.0, "method": None}
    if state["method"] is not None:
        method.load_state_dict(state["method"])
        print(f"resuming {folder.path} after iteration {method.iteration}")
    clock = Clock(state["seconds"], device)

    def save():
        folder.checkpoint(
            {
                "baselines": state["baselines"],
                "best": state["best"],
                "seconds": clock.seconds,
                "method": method.state_dict(),
            }
        )

    for name in BASELINES if s.baselines else ():
        if name not in state["baselines"]:
            with no_memory(s):
                state["baselines"][name] = _baseline(name, task, s)
            save()

    steps = range(method.iteration, s.outer_steps)
    if 0 < s.budget <= method.gradients:
        steps = range(0)
    for _ in progress(
        steps, initial=method.iteration, total=None if s.budget else s.outer_steps, desc=s.method
    ):
        with clock, no_memory(s):
            task.refresh(method.theta)
            info = method.step()
        last = info.iteration == s.outer_steps or 0 < s.budget <= info.gradients
        if info.iteration % s.evaluate_every == 0 or last:
            row = _evaluate(task, method, info, clock.seconds)
            folder.log(row)
            best = state["best"]
            if best is None or row["tuning_loss"] < best["row"]["tuning_loss"]:
                state["best"] = {
                    "row": row,
                    "lam": method.lam.cpu().clone(),
                    "theta": method.theta.cpu().clone(),
                }
            save()
        if last:
            break

    result = _result(s, task, folder, state)
    result["provenance"] = provenance(device, s.seed, clock.seconds)
    folder.finish(result)
    return result


@contextmanager
def no_memory(s: Settings):
    """Turn a GPU's refusal into a sentence that names the largest batch."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        sizes = {name: getattr(s, name) for name in OPTIONS if name.endswith("batch_size")}
        train, validation, _ = hc.SIZES[s.dataset]
        whole = {name: validation if name == "outer_batch_size" else train for name in sizes}
        name = max(sizes, key=lambda name: sizes[name] or whole[name])
        now = sizes[name] or "the whole set"
        raise RunError(
            f"the device is out of memory: lower --{name.replace('_', '-')} (now {now}); the last "
            "checkpoint is kept"
        ) from error


# what a redrawn label becomes: number of classes -> transition matrix, None is any class
NOISE = {"uniform": lambda classes: None, "pair": data.pair_flips}
KNOWN = {"noise_kind": NOISE, "curvature": ("hessian", "ggn"), "fisher": FISHERS}


def build_task(s: Settings, device: torch.device) -> hc.Hypercleaning:
    """Load the data, split it, redraw labels, build the model: all from the settings' seed."""
    dataset = data.load(s.dataset)
    if len(dataset.image_shape) == 3:
        dataset = data.standardise(dataset)
    options = {"stem": s.stem} if s.model == "resnet18" else {}
    with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
        torch.manual_seed(s.seed)
        if s.model not in models.FLAT:
            shape = (*(1,) * (3 - len(dataset.image_shape)), *dataset.image_shape)
            dataset = dataset._replace(
                x=dataset.x.view(-1, *shape), x_test=dataset.x_test.view(-1, *shape)
            )
        model = models.build(s.model, tuple(dataset.x.shape[1:]), dataset.num_classes, **options)
    return hc.build(
        dataset,
        model,
        s.noise,
        s.l2,
        torch.Generator().manual_seed(s.seed),
        device,
        transition=NOISE[s.noise_kind](dataset.num_classes),
        batchnorm=s.batchnorm,
    )


BASELINES = {
    "noisy": "noisy training labels + validation set",
    "validation": "validation set only",
    "clean": "clean training labels + validation set",
}


def _baseline(name: str, task: hc.Hypercleaning, s: Settings) -> dict:
    """Train without weights; l2 and the iterate are chosen on the tuning split."""
    x, y = task.validation
    labels = {"noisy": task.train[1], "clean": task.y_clean}.get(name)
    if labels is not None:
        x, y = torch.cat([task.train[0], x]), torch.cat([labels, y])
    return _best_fit(task, s, (x, y))


def _best_fit(task: hc.Hypercleaning, s: Settings, split, weights=None) -> dict:
    """Train with fixed weights and report the fit that is best on the tuning split.

    Vector models by L-BFGS, once for each l2 of a grid; the others by SGD with the run's own l2,
    step size and number of steps.
    """
    fits = []
    for l2 in BASELINE_L2 if s.model in models.FLAT else (s.l2,):
        if s.model in models.FLAT:
            theta = hc.train(task.model, split, task.theta0, task.tuning, l2, weights=weights)
        else:
            generator = torch.Generator().manual_seed(s.seed)
            whole, steps = len(split[1]), s.outer_steps * s.inner_steps
            size = min(s.batch_size or whole, whole)
            theta = hc.train_minibatch(
                task, split, l2, s.inner_lr, steps, size, generator, weights, s.inner_momentum
            )
        fits.append((hc.evaluate(task.model, theta, task.tuning), l2, theta))
    tuning, l2, theta = min(fits, key=lambda fit: fit[0]["loss"])
    test = hc.evaluate(task.model, theta, task.test)
    return {
        "l2": l2,
        "tuning_loss": tuning["loss"],
        "tuning_accuracy": tuning["accuracy"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
    }


def _evaluate(task: hc.Hypercleaning, method: Method, info, seconds: float) -> dict:
    """One line of the log. The test columns are for the figure; nothing is chosen by them."""
    row = {
        "iteration": info.iteration,
        "seconds": seconds,
        "gradients": info.gradients,
        "inner_loss": float(info.inner_loss),
        "outer_loss": float(info.outer_loss),
        "negative_curvature": info.solve is not None and info.solve.negative_curvature,
    }
    task.refresh(method.theta)
    for name in ("tuning", "test"):
        for key, value in hc.evaluate(task.model, method.theta, getattr(task, name)).items():
            row[f"{name}_{key}"] = value
    if 0 < int(task.wrong.sum()) < len(task.wrong):
        row["auc"] = hc.auc(method.lam, task.wrong)
        row["precision"] = hc.precision(method.lam, task.wrong)
    return row


def _result(s: Settings, task: hc.Hypercleaning, folder: RunFolder, state: dict) -> dict:
    """Everything that the table and the figure need, and no more."""
    best = state["best"]
    lam = best["lam"].to(task.lam0)
    x = torch.cat([task.train[0], task.validation[0]])
    y = torch.cat([task.train[1], task.validation[1]])
    weights = torch.cat([lam, torch.ones_like(task.validation[1], dtype=lam.dtype)])
    edges = torch.linspace(0, 1, 41)
    wrong = task.wrong.cpu()
    return {
        "kind": "hyperclean",
        "settings": vars(s),
        "sizes": {
            "train": len(task.train[1]),
            "wrong": int(wrong.sum()),
            "validation": len(task.validation[1]),
            "tuning": len(task.tuning[1]),
            "test": len(task.test[1]),
        },
        "source": task.source,
        "baselines": state["baselines"],
        "best": best["row"],
        **({"retrained": _best_fit(task, s, (x, y), weights)} if s.baselines else {}),
        "weights": {
            "edges": edges.tolist(),
            "clean": torch.histogram(best["lam"][~wrong], edges).hist.int().tolist(),
            "corrupted": torch.histogram(best["lam"][wrong], edges).hist.int().tolist(),
        },
        "surest": pictures(task, lam, best["theta"].to(task.theta0)),
        "history": folder.rows(),
    }


def pictures(task: hc.Hypercleaning, lam: torch.Tensor, theta: torch.Tensor, count: int = 12):
    """The images that the weights are surest are mislabelled, as JSON values.

    Returns:
        ``shape``; ``given`` and ``true``, a label each; ``pixels``, grey values from 0 to 255 of
        all images, each stretched to its whole range, compressed by zlib, in base 64.
    """
    task.refresh(theta)
    positions = hc.surest(task, lam, theta, count)
    x = task.train[0][positions].flatten(1).cpu()
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    pixels = ((x - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {
        "shape": list(task.image_shape),
        "given": task.train[1][positions].tolist(),
        "true": task.y_clean[positions].tolist(),
        "pixels": base64.b64encode(zlib.compress(pixels.numpy().tobytes(), 9)).decode(),
    }


def _draw(result: dict, path) -> None:
    from bilevel_lite import plotting

    figure = plotting.draw_hyperclean({"kind": "hyperclean", "runs": [result]})
    with writing(path / "figure.png"):
        figure.savefig(path / "figure.png", dpi=150)
    plotting.plt.close(figure)


def table(result: dict) -> str:
    """The result as text: baselines, the learned weights, and what was learned about labels."""
    known = result["baselines"]
    rows = [(text, known[name]) for name, text in BASELINES.items() if name in known]
    rows.append(("learned weights, as trained", result["best"]))
    if "retrained" in result:
        rows.append(("learned weights + validation, retrained", result["retrained"]))
    lines = [f"{'trained on':<42} test loss  test accuracy"]
    for text, row in rows:
        lines.append(f"{text:<42} {row['test_loss']:9.4f}  {100 * row['test_accuracy']:10.2f} %")
    best, s = result["best"], result["settings"]
    lines.append(
        f"{s['method']} on {s['dataset']}, seed {s['seed']}: best tuning loss "
        f"{best['tuning_loss']:.4f} at iteration {best['iteration']}, after "
        f"{best['gradients']:.0f} gradients and {best['seconds']:.0f} s"
    )
    if "auc" in best:
        lines.append(
            f"corrupted or clean, told by the weight: AUC {best['auc']:.4f}, precision at the "
            f"noise rate {best['precision']:.4f}"
        )
    if result["source"]:
        lines.append(f"data: {result['source']}")
    return "\n".join(lines)
