"""Command line: ``python -m bilevel_lite run TASK ...``, ``hyperclean --dataset mnist ...``."""

import argparse
import sys
from pathlib import Path

from bilevel_lite import models, plotting
from bilevel_lite.data import DataError
from bilevel_lite.experiment import RunError, bench, collect, job, search, settings, stored
from bilevel_lite.experiment.methods import METHODS
from bilevel_lite.experiment.supervised import BATCHNORM
from bilevel_lite.experiment.task import TASKS, Task, find, owner
from bilevel_lite.session import pick_device
from bilevel_lite.tasks import (
    cleaning_comparison,
    cleaning_studies,
    hypercleaning,
)

# What hyperclean can change beside what it names itself.
OPTIONS = {
    name: option
    for name, option in settings.of(hypercleaning.Hypercleaning.Settings).items()
    if name not in ("dataset", "model", "method", "seed")
}


def parser() -> argparse.ArgumentParser:
    """Build the parser; every setting of a task is an option with its default shown."""
    top = argparse.ArgumentParser(prog="python -m bilevel_lite", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "hyperclean",
        help="learn one weight per training example from a small clean set",
        description="Data hypercleaning. Stop it at any moment; the same command resumes it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("--dataset", choices=sorted(hypercleaning.SIZES), default="digits")
    run.add_argument("--model", choices=sorted(models.MODELS), default="linear")
    run.add_argument(
        "--method",
        nargs="+",
        choices=["all", *sorted(METHODS)],
        default=["aid-cg"],
        metavar="METHOD",
        help="one of %(choices)s; several, or all, are compared: a search for each, then --seeds",
    )
    run.add_argument("--seeds", type=int, default=3, help="comparison: final runs of each method")
    run.add_argument("--trials", type=int, default=8, help="comparison: points tried for each")
    run.add_argument(
        "--search-budget", type=float, default=10_000, help="comparison: gradients of a trial"
    )
    run.add_argument("--storage", default=None, help="comparison: Optuna's database")
    run.add_argument("--seed", type=int, default=0, help="of split, noise, initial values, batches")
    run.add_argument("--out", required=True, help="output folder; one run each")
    run.add_argument("--device", default=None, help="cpu, cuda, ... (default: CUDA if there)")
    for name, (kind, _, meaning) in OPTIONS.items():
        run.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=None,
            metavar=kind.__name__.upper(),
            help=f"{meaning} (default: depends on the dataset)",
        )

    study = commands.add_parser(
        "study",
        help="one study of full-scale hypercleaning: a search for each variant, then some seeds",
        description="Stop it at any moment; the same command resumes it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    asks = "; ".join(f"{name}: {asks}" for name, (asks, _) in cleaning_studies.STUDIES.items())
    study.add_argument("study", choices=sorted(cleaning_studies.STUDIES), help=asks)
    study.add_argument("--dataset", choices=sorted(hypercleaning.SIZES), default="mnist")
    study.add_argument("--model", choices=sorted(models.MODELS), default="linear")
    study.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    study.add_argument("--out", required=True, help="output folder")
    study.add_argument("--seeds", type=int, default=3, help="final runs of each variant")
    study.add_argument("--trials", type=int, default=16, help="points tried for each variant")
    study.add_argument("--search-steps", type=int, default=400, help="outer iterations of a trial")
    study.add_argument("--outer-steps", type=int, default=1000, help="of a final run")
    study.add_argument("--looks", type=int, default=50, help="evaluations in a final run")
    study.add_argument(
        "--at",
        nargs="+",
        metavar="SETTING=VALUE",
        help="no search: all variants with these step sizes and numbers, say inner_lr=0.02",
    )
    study.add_argument(
        "--sizes",
        nargs="+",
        metavar="ROLE=SIZE",
        help="other batch sizes than the dataset's, say outer_batch_size=1024; the roles: "
        + ", ".join(cleaning_comparison.ROLES),
    )
    study.add_argument("--stem", choices=["cifar", "imagenet"], default="cifar", help="of resnet18")
    study.add_argument("--batchnorm", choices=BATCHNORM, default="batch")
    study.add_argument("--storage", default=None, help="Optuna's database (default: SQLite in OUT)")
    study.add_argument("--device", default=None, help="cpu, cuda, ... (default: CUDA if there)")

    known = "; ".join(f"{name}: {first_line(task)}" for name, task in TASKS.items())
    for name, asks in (("run", "run a task"), ("search", "search for the settings of a task")):
        one = commands.add_parser(
            name,
            help=f"{asks}, whichever it is",
            description=f"Stop it at any moment; the same command resumes it. Tasks: {known}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        one.add_argument("task", help="its name, or MODULE:NAME for one of your own")
        one.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
            help="settings; `tasks NAME` lists those of a task",
        )  # fmt: skip
        one.add_argument("--out", required=True, help="output folder")
        one.add_argument("--device", default=None, help="cpu, cuda, ... (default: CUDA if there)")
        if name == "run":
            one.add_argument("--method", choices=sorted(METHODS), default=None, metavar="METHOD")
            one.add_argument("--seed", type=int, default=0)
            continue
        one.add_argument(
            "--method", nargs="+", choices=sorted(METHODS), required=True, metavar="METHOD",
            help="one search each",
        )  # fmt: skip
        one.add_argument(
            "--over", nargs="+", required=True, metavar="NAME=LOW:HIGH",
            help="what is searched for, on a logarithmic scale",
        )  # fmt: skip
        one.add_argument("--seeds", type=int, default=3, help="final runs of each")
        one.add_argument("--trials", type=int, default=16, help="points tried for each")
        one.add_argument(
            "--search-steps", type=int, default=100, help="outer iterations of a trial"
        )
        one.add_argument("--outer-steps", type=int, default=200, help="of a final run")
        one.add_argument("--looks", type=int, default=50, help="evaluations in a final run")
        one.add_argument("--storage", default=None, help="Optuna's database (default: in OUT)")
    listing = commands.add_parser("tasks", help="list the tasks, or the settings of one")
    listing.add_argument("task", nargs="?", help="its name, or MODULE:NAME for one of your own")

    speed = commands.add_parser(
        "bench",
        help="what each hypergradient costs, in multiples of one gradient, beside curvlinops",
        description="Stores figures/data/bench_DEVICE.json and draws it. Stopped, it resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    speed.add_argument("--models", nargs="+", choices=sorted(bench.CASES), default=bench.MODELS)
    speed.add_argument("--device", default=None, help="cpu, cuda, ... (default: CUDA if there)")
    speed.add_argument("--rounds", type=int, default=15, help="each runs every row once")
    speed.add_argument("--seconds", type=float, default=60.0, help="at most, for one row")
    speed.add_argument("--threads", type=int, default=1, help="on a CPU")
    speed.add_argument("--out", default=None, help="output folder (default: runs/bench-DEVICE)")

    figures = commands.add_parser("figures", help="draw figures/*.svg from figures/data/*.json")
    figures.add_argument("names", nargs="*", help="which; all if left out")
    gather = commands.add_parser("collect", help="gather finished runs into figures/data/NAME.json")
    gather.add_argument("folders", nargs="+", help="output folders of finished runs")
    gather.add_argument("--name", required=True)
    return top


def draw_stored(names: list[str] | None = None) -> list[Path]:
    """Draw ``figures/NAME.svg`` from ``figures/data/NAME.json``.

    A task may draw more than one figure: the study of the noise also gets ``NAME_surest.svg``, the
    images that each solver is surest are mislabelled.

    Args:
        names: Which; all by default.

    Returns:
        The files written.

    Raises:
        ValueError: for an unknown name, or a result of no task.
    """
    folder = Path(__file__).resolve().parent.parent / "figures"
    written = []
    for name in names or sorted(path.stem for path in (folder / "data").glob("*.json")):
        result = stored(name)
        kind = result.get("kind")
        task = owner(str(kind))
        if not (task or kind == "bench"):
            raise ValueError(f"{name}: is of kind {kind!r}; known: bench, {sorted(TASKS)}")
        figures = task.draw(result) if task else {"": bench.draw_bench(result)}
        for suffix, fig in figures.items():
            path = folder / f"{name}{suffix}.svg"
            # the style's salt makes the file's identifiers always the same
            with plotting.plt.rc_context(plotting.STYLE):
                fig.savefig(path, metadata={"Date": None})
            plotting.plt.close(fig)
            written.append(path)
    return written


def _hyperclean(options: dict) -> None:
    methods = options.pop("method")
    search = {name: options.pop(name) for name in ("seeds", "trials", "search_budget", "storage")}
    if methods == ["all"] or len(methods) > 1:
        given = [k for k in OPTIONS if options[k] is not None and k != "budget"]
        if given or options["seed"]:
            name = (given or ["seed"])[0].replace("_", "-")
            raise ValueError(f"--{name}: is chosen by the search, or fixed, in a comparison")
        methods = list(cleaning_comparison.SPACES) if methods == ["all"] else methods
        budget = {} if options["budget"] is None else {"budget": options["budget"]}
        common = {name: options[name] for name in ("dataset", "model", "out", "device")}
        cleaning_comparison.run(methods=methods, **common, **search, **budget)
    else:
        hypercleaning.run(method=methods[0], **options)


def first_line(task: type[Task]) -> str:
    """What a task says of itself in one line."""
    return (task.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _run(task: str, method: str | None, seed: int, out: str, device: str | None, **more) -> None:
    kind = find(task)
    given = {"seed": seed, **({"method": method} if method else {})}
    s = kind.settings(**{**given, **settings.read(kind.Settings, more["set"])})
    job.run(kind, s, out, device)


def _search(options: dict) -> None:
    kind, over = find(options["task"]), {}
    for word in options["over"]:
        name, _, ends = word.partition("=")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            raise ValueError(f"over: got {word!r}, expected NAME=LOW:HIGH") from None
        if settings.of(kind.Settings).get(name, (None,))[0] is not float or not 0 < low < high:
            raise ValueError(f"over: got {word!r}, expected a real setting and 0 < LOW < HIGH")
        over[name] = (low, high)
    variants = [search.Variant(name, {"method": name}, over) for name in options["method"]]
    base = settings.read(kind.Settings, options["set"])
    trial, final = ({"outer_steps": options[name]} for name in ("search_steps", "outer_steps"))
    names = ("out", "seeds", "trials", "storage", "device", "looks")
    rest = {name: options[name] for name in names}
    config = {"kind": f"{kind.name}_search", "over": over}
    search.run(kind, config, base, variants, trial, final, **rest)


def _tasks(task: str | None) -> None:
    if task is None:
        for name, kind in sorted(TASKS.items()):
            print(f"{name:<12} {first_line(kind)}")
        return
    kind = find(task)
    default = vars(kind.settings())
    for name, (_, _, meaning) in settings.of(kind.Settings).items():
        print(f"{name}={default[name]}  {meaning}")


def _settings(option: str, words: list[str] | None) -> dict[str, float] | None:
    """Read an option's SETTING=VALUE words."""
    out = {}
    for word in words or []:
        name, _, value = word.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            raise ValueError(f"{option}: got {word!r}, expected SETTING=NUMBER") from None
    return out or None


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 with one sentence if not, 130 if it was stopped."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "hyperclean":
            _hyperclean(options)
        elif command == "study":
            for name in ("at", "sizes"):
                options[name] = _settings(name, options[name])
            cleaning_studies.run(**options)
        elif command == "run":
            _run(**options)
        elif command == "search":
            _search(options)
        elif command == "tasks":
            _tasks(options["task"])
        elif command == "bench":
            device = pick_device(options["device"])
            out = options["out"] or f"runs/bench-{device.type}"
            names = list(options["models"])
            bench.run(names, device, options["rounds"], options["seconds"], out, options["threads"])
            name = f"bench_{device.type}"
            print(collect([out], name).name)
            draw_stored([name])
        elif command == "collect":
            print(collect(options["folders"], options["name"]).name)
        else:
            for path in draw_stored(options["names"]):
                print(Path(path).name)
    except (DataError, RunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
