"""Command line: ``python -m bilevel_lite run TASK ...``, ``hyperclean --dataset mnist ...``."""

import argparse
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from bilevel_lite import __version__, models, plotting
from bilevel_lite.data import DataError
from bilevel_lite.experiment import RunError, bench, collect, job, search, settings, stored
from bilevel_lite.experiment.folder import figures_folder, in_checkout, stored_names, writing
from bilevel_lite.experiment.methods import METHODS, OWN, by_name
from bilevel_lite.experiment.processes import processes, several, told
from bilevel_lite.experiment.stopping import Stopped
from bilevel_lite.experiment.task import TASKS, Task, find, owner
from bilevel_lite.options import options_of
from bilevel_lite.parallel import ProcessLost
from bilevel_lite.refuse import Unseen
from bilevel_lite.session import pick_device
from bilevel_lite.tasks import cleaning_comparison, hypercleaning, studies

DEVICE = "cpu, cuda, ... (default: CUDA if there)"
STORAGE = "Optuna's database (default: SQLite in the output folder)"
# a comparison of several methods
COMPARED = {"seeds": 3, "trials": 8, "search_budget": 10_000, "storage": None}

# what hyperclean can change beside what it names itself
OPTIONS = {
    name: option
    for name, option in settings.of(hypercleaning.HypercleaningSettings).items()
    if name not in ("dataset", "model", "method", "seed")
}
# the same, as --help groups them
SETTINGS = {
    "lengths and steps": (
        "outer_steps", "inner_steps", "inner_lr", "inner_momentum", "inner_optimizer",
        "inner_schedule", "outer_lr", "outer_momentum", "outer_optimizer",
        "evaluate_every", "budget",
    ),
    "batches": ("batch_size", "curvature_batch_size", "outer_batch_size", "cross_batch_size"),
    "the linear system": settings.SYSTEM,
    "the methods' own numbers": tuple(sorted(OWN)),
    "the task": ("noise", "noise_kind", "l2", "stem", "batchnorm", "baselines"),
}  # fmt: skip


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once: not where the text names it, or where there is none."""

    def _get_help_string(self, action):
        silent = action.default is None or isinstance(action.default, bool)
        if silent or "(default: " in action.help:
            return action.help
        return super()._get_help_string(action)


class TaskHelp(argparse.Action):
    """``run TASK --method M --help`` also lists the settings of the task, and M's own."""

    def __call__(self, parser, namespace, values, option=None):
        """Print it, and leave."""
        parser.print_help()
        if (task := getattr(namespace, "task", None)) is not None:
            methods = getattr(namespace, "method", None) or []
            try:
                find(task)
                print(f"\nsettings of {task}, each as --NAME VALUE:")
                _tasks(task, [methods] if isinstance(methods, str) else methods)
            except ValueError as error:
                parser.error(str(error))
        parser.exit()


class Once(argparse.Action):
    """Stores a value; a second one is refused, where argparse would take it instead."""

    taken = False

    def __call__(self, parser, namespace, values, option=None):
        """Store it."""
        if self.taken:
            raise argparse.ArgumentError(self, "is given twice, expected once; give one")
        self.taken = True
        setattr(namespace, self.dest, values)


class Command(argparse.ArgumentParser):
    """A command's options: no word is short for another, --seed not for --seeds; each once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("action", None, Once)


def _defaults(name: str) -> str:
    """What a setting is where it is not given, in words: one value, or one for each dataset."""
    _, usual, _ = OPTIONS[name]
    if usual is None:
        return ""  # the meaning says it
    values = {data: own.get(name, usual) for data, own in hypercleaning.DEFAULTS.items()}
    words = {data: f"{v:g}" if isinstance(v, int | float) else v for data, v in values.items()}
    if len(set(words.values())) == 1:
        return f" (default: {words['mnist']})"
    return f" (default: {', '.join(f'{data} {word}' for data, word in words.items())})"


@cache
def _usual() -> dict[str, dict]:
    return {study: studies.usual(study) for study in studies.STUDIES}


def _usually(name: str) -> str:
    """What the studies take where it is not given, in words: what most do, then the others."""
    said: dict[str, list[str]] = {}
    for study, usual in _usual().items():
        if name in usual:
            word = usual[name]
            word = f"{word:g}" if isinstance(word, float) else f"{word}"
            said.setdefault(word, []).append(study)
    most = max(said, key=lambda word: len(said[word]))
    others = [f"{', '.join(of)} {word}" for word, of in said.items() if word != most]
    return f" (default: {'; '.join([most or 'nothing', *others])})"


def _same(group: Any) -> None:
    """The options of `studies.SAME`: as the tasks that have them declare them."""
    kinds = {key: one.kind.Settings for key, one in studies.STUDIES.items()}
    for name in studies.SAME:
        which = [key for key, kind in kinds.items() if name in options_of(kind)]
        kind, _, meaning = settings.of(kinds[which[0]])[name]
        mine = "" if len(which) > 4 else f"of {', '.join(which)}: "
        words = {word for key in which for word in options_of(kinds[key])[name].known if word}
        group.add_argument(
            f"--{name}", type=kind, choices=sorted(words) or None,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
            help=mine + meaning + _usually(name),
        )  # fmt: skip


def _add_hyperclean(commands: Any) -> None:
    """Add ``hyperclean``: one run, or a comparison of methods."""
    run = commands.add_parser(
        "hyperclean",
        help="learn one weight per training example from a small clean set",
        description="Data hypercleaning. Stop it at any moment; the same command resumes it.",
        formatter_class=Help,
    )
    job = run.add_argument_group("the run")
    job.add_argument(
        "--dataset", choices=sorted(hypercleaning.SIZES), default="digits", help="what to clean"
    )
    job.add_argument(
        "--model", choices=sorted(models.MODELS), default="linear", help="what is trained on it"
    )
    job.add_argument(
        "--method",
        nargs="+",
        choices=["all", *sorted(METHODS)],
        default=["aid-cg"],
        metavar="METHOD",
        help="one of %(choices)s; several, or all (but aid-pcg and nhgd), are compared: a search "
        "for each, then --seeds (default: aid-cg)",
    )
    job.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of split, noise, initial values, batches"
    )
    job.add_argument("--out", required=True, metavar="DIR", help="output folder; one run each")
    job.add_argument("--device", metavar="NAME", help=DEVICE)
    for title, names in SETTINGS.items():
        group = run.add_argument_group(title)
        for name in names:
            kind, _, meaning = OPTIONS[name]
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                metavar={int: "N", float: "X", str: "NAME"}[kind],
                help=meaning + _defaults(name),
            )
    compared = run.add_argument_group("comparison of several methods")
    for name, kind, meaning in (
        ("seeds", int, "final runs of each method"),
        ("trials", int, "points tried for each"),
        ("search-budget", float, "gradients of a trial"),
    ):
        usual = f" (default: {COMPARED[name.replace('-', '_')]:,})"
        letter = {int: "N", float: "X"}[kind]
        compared.add_argument(f"--{name}", type=kind, metavar=letter, help=meaning + usual)
    compared.add_argument("--storage", metavar="URL", help=STORAGE)


def _add_study(commands: Any) -> None:
    """Add ``study``."""
    study = commands.add_parser(
        "study",
        help="one study: a search for each variant, then some seeds",
        description="Stop it at any moment (Ctrl-C, SIGTERM, --minutes): it says what is left, and "
        "the same command resumes it.",
        formatter_class=Help,
    )
    asks = "; ".join(f"{name}: {one.asks}" for name, one in studies.STUDIES.items())
    study.add_argument("study", choices=sorted(studies.STUDIES), help=asks)
    job = study.add_argument_group("the study")
    datasets = dict.fromkeys(d for one in studies.STUDIES.values() for d in one.datasets)
    job.add_argument(
        "--dataset", choices=sorted(datasets), help="what to clean" + _usually("dataset")
    )
    job.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    job.add_argument("--out", required=True, metavar="DIR", help="output folder")
    job.add_argument("--device", metavar="NAME", help=DEVICE)
    job.add_argument("--storage", metavar="URL", help=STORAGE)
    job.add_argument(
        "--minutes", type=float, metavar="M", help="stop after so many; what runs is checkpointed"
    )
    job.add_argument(
        "--status", action="store_true", help="run nothing: what is done, what is left, how long"
    )
    lengths = study.add_argument_group("numbers and lengths")
    for name, one in options_of(studies.Numbers).items():
        word, help_ = name.replace("_", "-"), one.help + _usually(name)
        lengths.add_argument(f"--{word}", type=int, metavar="N", help=help_)
    same = study.add_argument_group("the same for all variants")
    same.add_argument(
        "--at",
        nargs="+",
        metavar="SETTING=VALUE",
        help="no search: all variants with these step sizes and numbers, say inner_lr=0.02",
    )
    same.add_argument(
        "--sizes",
        nargs="+",
        metavar="ROLE=SIZE",
        help="other batch sizes than the study's, say outer_batch_size=1024; the roles: "
        + ", ".join(cleaning_comparison.ROLES),
    )
    _same(same)


def _add_tasks(commands: Any) -> None:
    """Add ``run``, ``search`` and ``tasks``, which serve any task."""
    known = "; ".join(f"{name}: {first_line(task)}" for name, task in TASKS.items())
    for name, asks in (("run", "run a task"), ("search", "search for the settings of a task")):
        one = commands.add_parser(
            name,
            help=f"{asks}, whichever it is",
            description=f"Stop it at any moment; the same command resumes it. Tasks: {known}.",
            formatter_class=Help,
            add_help=False,
        )
        one.add_argument(
            "-h", "--help", nargs=0, action=TaskHelp, default=argparse.SUPPRESS,
            help="show this; after TASK with the settings of the task",
        )  # fmt: skip
        one.add_argument("task", help="its name, or MODULE:NAME for one of your own")
        one.add_argument(
            "--set", nargs="+", action="extend", metavar="NAME=VALUE",
            help="settings, also --NAME VALUE; `tasks NAME` lists a task's, with defaults",
        )  # fmt: skip
        one.add_argument("--out", required=True, metavar="DIR", help="output folder")
        one.add_argument("--device", metavar="NAME", help=DEVICE)
        if name == "run":
            one.add_argument(
                "--method", metavar="METHOD",
                help=f"one of {', '.join(sorted(METHODS))}, or MODULE:NAME for one of your own "
                "(default: the task's)",
            )  # fmt: skip
            one.add_argument(
                "--seed", type=int, metavar="N", help="of everything drawn (default: 0)"
            )
            continue
        one.add_argument(
            "--method", nargs="+", required=True, metavar="METHOD",
            help="one search each; MODULE:NAME for one of your own",
        )  # fmt: skip
        one.add_argument(
            "--over", nargs="+", required=True, metavar="NAME=LOW:HIGH",
            help="what is searched for, on a logarithmic scale; NAME alone: in the range that the "
            "option declares",
        )  # fmt: skip
        for word, default, meaning in (
            ("seeds", 3, "final runs of each"),
            ("trials", 16, "points tried for each"),
            ("search-steps", 100, "outer iterations of a trial"),
            ("outer-steps", 200, "of a final run"),
            ("looks", 50, "evaluations in a final run"),
        ):
            one.add_argument(f"--{word}", type=int, metavar="N", default=default, help=meaning)
        one.add_argument("--storage", metavar="URL", help=STORAGE)
    listing = commands.add_parser("tasks", help="list the tasks, or the settings of one")
    listing.add_argument("task", nargs="?", help="its name, or MODULE:NAME for one of your own")


def _add_bench(commands: Any) -> None:
    """Add ``bench``."""
    speed = commands.add_parser(
        "bench",
        help="what each hypergradient costs, in multiples of one gradient, beside curvlinops",
        description="Measures, then stores data/bench_DEVICE.json and draws bench_DEVICE.svg: in "
        "runs/figures of a checkout, in ./figures elsewhere. Stopped, it resumes.",
        formatter_class=Help,
    )
    speed.add_argument(
        "--models",
        nargs="+",
        choices=sorted(bench.CASES),
        default=bench.MODELS,
        metavar="MODEL",
        help=f"some of %(choices)s (default: {' '.join(bench.MODELS)})",
    )
    speed.add_argument("--device", metavar="NAME", help=DEVICE)
    speed.add_argument("--rounds", type=int, metavar="N", default=15, help="of every row, one each")
    speed.add_argument("--seconds", type=float, metavar="X", default=60.0, help="a row, at most")
    speed.add_argument("--threads", type=int, metavar="N", default=1, help="on a CPU")
    speed.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave out the peak memory"
    )
    speed.add_argument("--out", metavar="DIR", help="output folder (default: runs/bench-DEVICE)")
    place = speed.add_mutually_exclusive_group()
    place.add_argument("--to", metavar="DIR", help="store and draw here instead")
    place.add_argument(
        "--publish",
        action="store_true",
        help="make it the book's record, in the checkout's figures; all models of the record",
    )


def _add_figures(commands: Any) -> None:
    """Add ``figures``, ``collect`` and ``grade``."""
    figures = commands.add_parser(
        "figures",
        help="draw figures/*.svg from figures/data/*.json",
        description="In a checkout its figures, elsewhere ./figures.",
    )
    figures.add_argument(
        "names", nargs="*", help="which, also results of the book; by default all collected ones"
    )
    figures.add_argument("--to", metavar="DIR", help="another folder of figures")
    figures.add_argument(
        "--task", metavar="MODULE:NAME", help="one of your own, whose results are among them"
    )
    gather = commands.add_parser(
        "collect",
        help="gather finished runs into figures/data/NAME.json",
        description="In a checkout into its figures, elsewhere into ./figures.",
    )
    gather.add_argument("folders", nargs="+", help="output folders of finished runs")
    gather.add_argument("--name", required=True, help="of the result, and so of the file")
    gather.add_argument("--to", metavar="DIR", help="another folder of figures")
    gather.add_argument(
        "--add", action="store_true", help="keep the runs that NAME holds already (further seeds)"
    )

    marks = commands.add_parser(
        "grade",
        help="run the exercise checks of submitted notebooks on fresh draws",
        description="Each notebook runs in a process of its own, with a time limit; the verdicts "
        "are made outside it. No sandbox: see chapters/TEACHING.md.",
        formatter_class=Help,
    )
    marks.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help="or folders of them")
    marks.add_argument("--seed", type=int, metavar="N", help="of the draws (default: a new one)")
    marks.add_argument("--out", metavar="FILE", help="write JSON")
    marks.add_argument("--csv", metavar="FILE", help="write CSV, a line for each exercise")
    marks.add_argument(
        "--timeout", type=float, metavar="S", default=600.0, help="seconds for one notebook"
    )


def parser() -> argparse.ArgumentParser:
    """Build the parser; every setting of a task is an option with its default shown."""
    script = Path(sys.argv[0]).stem == "bilevel-lite"
    prog = "bilevel-lite" if script else "python -m bilevel_lite"
    about = "Tasks, among them hypercleaning and its studies; the benchmark; the figures."
    top = argparse.ArgumentParser(prog=prog, description=about)
    top.add_argument("--version", action="version", version=f"bilevel-lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Command)
    for add in (_add_hyperclean, _add_study, _add_tasks, _add_bench, _add_figures):
        add(commands)
    return top


def draw_stored(names: list[str] | None = None, to: str | Path | None = None) -> list[Path]:
    """Draw ``figures/NAME.svg`` from ``figures/data/NAME.json``.

    A task may draw more than one figure: the study of the noise also gets ``NAME_surest.svg``, the
    images that each solver is surest are mislabelled.

    Args:
        names: Which; all that the folder holds by default. A result of the book that the folder
            does not hold is taken from the package.
        to: Another folder than the one that `bilevel_lite.experiment.figures_folder` gives.

    Returns:
        The files written.

    Raises:
        ValueError: for an unknown name, or a result of no task.
        RunError: if a result was edited, or a file cannot be written.
    """
    folder = figures_folder(to)
    written, unknown = [], []
    for name in names or sorted(path.stem for path in (folder / "data").glob("*.json")):
        result = stored(name, folder)
        kind = result.get("kind")
        task = owner(str(kind))
        if not (task or kind == "bench"):
            unknown.append(f"{name}: is of kind {kind!r}")
            continue
        figures = _drawn(result, task) if task else {"": bench.draw_bench(result)}
        for suffix, fig in figures.items():
            path = folder / f"{name}{suffix}.svg"
            # the style's salt makes the file's identifiers always the same
            with writing(path), plotting.plt.rc_context(plotting.STYLE):
                folder.mkdir(parents=True, exist_ok=True)
                fig.savefig(path, metadata={"Date": None})
            plotting.plt.close(fig)
            written.append(path)
    if unknown:
        raise ValueError(
            f"{'; '.join(unknown)}; known: bench, {sorted(TASKS)}; for a task of your own, "
            f"--task MODULE:NAME (figures drawn here: {len(written)})"
        )
    return written


def _drawn(result: dict, task: type[Task]) -> dict:
    """A task's own figures; of runs by several processes, what these told each other."""
    if all("processes" in run for run in result["runs"]):
        from bilevel_lite.drawings import ch19

        return {"": ch19.sent(told(result["runs"]))}
    return task.draw(result)


def _hyperclean(options: dict) -> None:
    methods = options.pop("method")
    search = {name: options.pop(name) for name in COMPARED}
    if methods == ["all"] or len(methods) > 1:
        given = [k for k in OPTIONS if options[k] is not None and k != "budget"]
        if given or options["seed"]:
            name = (given or ["seed"])[0].replace("_", "-")
            raise ValueError(f"--{name}: is chosen by the search, or fixed, in a comparison")
        methods = list(cleaning_comparison.SPACES) if methods == ["all"] else methods
        budget = {} if options["budget"] is None else {"budget": options["budget"]}
        common = {name: options[name] for name in ("dataset", "model", "out", "device")}
        search = {k: COMPARED[k] if value is None else value for k, value in search.items()}
        cleaning_comparison.run(methods=methods, **common, **search, **budget)
        return
    if given := [f"--{k.replace('_', '-')}" for k, value in search.items() if value is not None]:
        raise ValueError(f"{given[0]}: is of a comparison; give several methods, or one --seed")
    settings.require_read(methods, [k for k in OPTIONS if options[k] is not None])
    hypercleaning.run(method=methods[0], **options)


def first_line(task: type[Task]) -> str:
    """What a task says of itself in one line."""
    return (task.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _run(task: str, out: str, device: str | None, **more) -> None:
    kind, words = find(task), more.pop("set") or []
    given = {name: value for name, value in more.items() if value is not None}
    named = [word.partition("=")[2] for word in words if word.startswith("method=")]
    method = given.get("method") or next(iter(named), None)
    own = settings.read(kind.fields(method), words)
    if twice := sorted(set(given) & set(own)):
        raise ValueError(f"--{twice[0]}: is given as an option and among the settings; give one")
    s = kind.settings(**{"seed": 0, **given, **own})
    settings.require_read([s.method], own)
    with processes(device) as (group, place):
        job.run(kind, s, out, place, group)


def _range(kind: type, word: str) -> tuple[str, tuple[float, float]]:
    """``NAME=LOW:HIGH``, or ``NAME`` and the range that its option declares."""
    name, given, ends = word.partition("=")
    if settings.of(kind).get(name, (None,))[0] is not float:
        raise ValueError(f"over: got {word!r}, expected a real setting and 0 < LOW < HIGH")
    if not given:
        one = options_of(kind).get(name)
        if one is None or one.search is None or len(one.search) != 2 or not one.search[0] > 0:
            raise ValueError(f"over: {name} declares no range; give {name}=LOW:HIGH")
        return name, one.search
    try:
        low, high = map(float, ends.split(":"))
    except ValueError:
        raise ValueError(f"over: got {word!r}, expected NAME=LOW:HIGH") from None
    if not 0 < low < high:
        raise ValueError(f"over: got {word!r}, expected a real setting and 0 < LOW < HIGH")
    return name, (low, high)


def _search(options: dict) -> None:
    kind, over, methods = find(options["task"]), {}, options["method"]
    fields = kind.fields(*methods)
    for word in options["over"]:
        name, ends = _range(fields, word)
        if name in over:
            raise ValueError(f"over: {name} is given twice, expected once; give one")
        over[name] = ends
    base = settings.read(fields, options["set"] or [])
    for method in methods:
        for name in {*over, *base} - set(settings.of(settings.Common)):
            if name in OWN or name not in settings.of(kind.Settings):  # a method's own
                if name not in by_name(method).own:
                    raise ValueError(f"{name}: is no option of {method}; search for it by itself")
    short = [name.rpartition(":")[2] for name in methods]
    if len(set(short)) < len(short):
        raise ValueError(f"method: got {', '.join(methods)}, expected different names")
    variants = [
        search.Variant(name, {"method": method}, over)
        for name, method in zip(short, methods, strict=True)
    ]
    own = {
        "seed": "0 in trials, then 0, 1 ...",
        "method": "--method",
        "outer_steps": "--outer-steps",
        "evaluate_every": "--looks",
    }
    settings.require_read(methods, [*base, *over])
    for name in [*own, *over]:
        if name in base:
            raise ValueError(f"set: {name} is chosen by the search ({own.get(name, '--over')})")
    trial, final = ({"outer_steps": options[name]} for name in ("search_steps", "outer_steps"))
    names = ("out", "seeds", "trials", "storage", "device", "looks")
    rest = {name: options[name] for name in names}
    config = {"kind": f"{kind.name}_search", "over": over}
    search.run(kind, config, base, variants, trial, final, **rest)


def _as_settings(words: list[str], top: argparse.ArgumentParser) -> list[str]:
    """``--layers 1`` or ``--layers=1``, a setting of the task, as ``layers=1``."""
    out = []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--") or not (equals or words):
            top.error(
                f"unrecognized arguments: {name}; settings are --NAME VALUE or --set NAME=VALUE"
            )
        out.append(f"{name[2:].replace('-', '_')}={value if equals else words.pop(0)}")
    return out


def _tasks(task: str | None, methods: list[str] | None = None) -> None:
    if task is None:
        for name, kind in sorted(TASKS.items()):
            print(f"{name:<12} {first_line(kind)}")
        return
    kind = find(task)
    default = vars(kind.settings())
    datasets = options_of(kind.Settings)["dataset"].known if "dataset" in default else ()
    others = {one: vars(kind.settings(dataset=one)) for one in datasets}
    of_all, of_task = settings.of(settings.Common), settings.of(kind.Settings)
    known = settings.of(kind.fields(*methods or []))
    own = sorted({*known} - {*of_task} | {*OWN})
    groups = {
        f"of {kind.name}": [name for name in of_task if name not in {*of_all, *OWN}],
        "of all tasks": [name for name in of_all if name not in settings.SYSTEM],
        "of the linear system": settings.SYSTEM,
        "the methods' own numbers": own,
    }
    for title, names in groups.items():
        print(f"\n{title}:")
        for name in names:
            apart: dict[Any, list[str]] = {}
            for one in others if name != "dataset" else ():
                if others[one][name] != default[name]:
                    apart.setdefault(others[one][name], []).append(one)
            note = "; ".join(
                f"{'nothing' if value == '' else value} on {', '.join(where)}"
                for value, where in apart.items()
            )
            usual = "" if name in own else f"={default[name]}"  # its meaning says it
            print(f"{name}{usual}{note and f' ({note})'}  {known[name][2]}")


def _bench(options: dict) -> None:
    device, names = pick_device(options["device"]), list(options["models"])
    if options["publish"] and not in_checkout():
        raise ValueError("--publish: this is an installed package, not a checkout; use --to DIR")
    if options["publish"] and names != list(bench.MODELS):
        raise ValueError(f"--publish: the record holds {' '.join(bench.MODELS)}; got {names}")
    out = options["out"] or f"runs/bench-{device.type}"
    if options["publish"] and not options["memory"]:
        raise ValueError("--publish: the record holds peak memory; leave out --no-memory")
    numbers = (options[name] for name in ("rounds", "seconds"))
    bench.run(names, device, *numbers, out, options["threads"], options["memory"])
    to = options["to"]
    if to is None and not options["publish"] and in_checkout():
        to = "runs/figures"  # a trial does not replace the record
    stored = collect([out], f"bench_{device.type}", to)
    print(stored.resolve())
    (drawing,) = draw_stored([stored.stem], to)
    print(drawing.resolve())
    if in_checkout() and not options["publish"]:
        print("The book's record stays as it was: --publish, or make bench, replaces it.")


def _figures(names: list[str], to: str | None, task: str | None) -> None:
    if task is not None:
        find(task)
    drawn = draw_stored(names, to)
    for path in drawn:
        print(path.resolve())
    if not drawn:
        raise RunError(
            f"{figures_folder(to).resolve()} holds no collected result; `collect` puts one there, "
            f"and a result of the book is drawn by its name: {', '.join(stored_names())}"
        )


def _grade(notebooks: list[str], seed: int | None, out: str | None, timeout: float, csv) -> int:
    from bilevel_lite import grading

    files, done = grading.notebooks(notebooks), []
    grading.writable(files, out=out, csv=csv)
    if hasattr(sys.stdout, "reconfigure"):  # names of files are in any script
        sys.stdout.reconfigure(errors="replace")

    def each(result: dict) -> None:
        done[:] = result["submissions"]
        grading.write(result, out, csv)
        lines = grading.summary(result) if len(done) == 1 else grading.said(done[-1])
        print(lines, flush=True)

    try:
        grading.grade(notebooks, seed, timeout, each)
    except KeyboardInterrupt:
        kept = " and ".join(str(path) for path in (out, csv) if path) or "nowhere but above"
        print(f"\nstopped: {len(done)} of {len(files)} graded, kept in {kept}", file=sys.stderr)
        return 130
    return int(any(one["error"] for one in done))


def _settings(option: str, words: list[str] | None) -> dict[str, float] | None:
    """Read an option's SETTING=VALUE words."""
    out = {}
    for word in words or []:
        name, _, value = word.partition("=")
        if name in out:
            raise ValueError(f"{option}: {name} is given twice, expected once; give one")
        try:
            out[name] = float(value)
        except ValueError:
            raise ValueError(f"{option}: got {word!r}, expected SETTING=NUMBER") from None
    return out or None


def _check(options: dict) -> None:
    """Refuse empty names, which would be the working folder, and a device without numbers."""
    for name in ("out", "to", "name"):
        if options.get(name) == "":
            raise ValueError(f"{name}: got '', expected a name; give one")
    device = options.get("device") or os.environ.get("BILEVEL_LITE_DEVICE") or ""
    if "device" in options and device.startswith("meta"):
        raise ValueError(f"device: got {device!r}, which holds no numbers, expected cpu or cuda")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, or stopped as asked; 1 with one sentence; 130: Ctrl-C."""
    known = parser()
    found, rest = known.parse_known_args(arguments)
    options = vars(found)
    if rest and options["command"] in ("run", "search"):
        options["set"] = [*(options["set"] or []), *_as_settings(rest, known)]
    elif rest:
        known.error(f"unrecognized arguments: {' '.join(rest)}")
    command, names = options.pop("command"), set(options)
    shared = False
    try:
        shared = several()
        if shared and command != "run":
            raise ValueError(
                f"{command} runs in one process; start it on each machine, with --storage where a "
                "search shares its trials. torchrun is for `run`"
            )
        _check(options)
        if command == "hyperclean":
            _hyperclean(options)
        elif command == "study":
            for name in ("at", "sizes"):
                options[name] = _settings(name, options[name])
            studies.run(**options)
        elif command == "run":
            _run(**options)
        elif command == "search":
            _search(options)
        elif command == "tasks":
            _tasks(options["task"])
        elif command == "bench":
            _bench(options)
        elif command == "grade":
            return _grade(**options)
        elif command == "collect":
            print(collect(**options).resolve())
        else:
            _figures(**options)
    except (DataError, RunError, TypeError, ValueError) as error:
        ours = re.match(r"\w+(\(.*?\))?: ", str(error)) or isinstance(error, Unseen)
        if isinstance(error, TypeError) and not ours:
            raise
        name, colon, rest = str(error).partition(": ")
        if colon and name in names:  # as it was typed
            error = f"--{name.replace('_', '-')}: {rest}"
        where = f"process {os.environ.get('RANK')}: " if "RANK" in os.environ else ""
        print(f"{where}error: {error}", file=sys.stderr)
        return 1
    except ProcessLost as lost:
        print(f"error: {lost}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
