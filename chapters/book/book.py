"""Run the chapters and make the book; the Makefile calls this.

    book.py execute [CH]     run in a fresh kernel, normalise, store
    book.py check [CH]       run and compare with what is stored, change nothing; seconds of each
    book.py run [CH]         run copies in _build/ and render them to _build/html/
    book.py html             render the stored outputs to _build/html/; a warning is a failure
    book.py repo [ADDRESS]   write the repository's address wherever it is needed

A notebook is stored in one form only: a second run gives the same bytes, and a difference in git
means a difference in content.
"""

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import form
import nbformat
import notation
import pages
import reference
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from pages import described
from tqdm.auto import tqdm

ROOT, HERE, BUILD = form.ROOT, Path(__file__).parent, form.ROOT / "_build"
SLOW = 90  # seconds on two cores; a chapter should stay below
JOBS = 8  # notebooks side by side, at most


def execute(path: Path, on_cell=lambda **_: None):
    """Run a notebook in a fresh kernel, in its own folder, and return it normalised."""
    nb = nbformat.read(path, as_version=4)
    NotebookClient(
        nb,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors; not that TCP is unencrypted
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=on_cell,
    ).execute()
    return normalise(nb)


def normalise(nb):
    """Reduce a notebook to what matters: sources, tags, outputs, counts 1 to n, readable ids."""
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nb.nbformat, nb.nbformat_minor = 4, 5
    section, taken, count = "start", {}, 0
    for cell in nb.cells:
        for _, text in form.headings(cell)[:1]:
            section = re.sub(r"[^a-z0-9]+", "-", text.split(" (")[0].lower())[:24].strip("-")
        taken[section] = taken.get(section, 0) + 1
        cell.id = f"{section or 'section'}-{taken[section]}"
        cell.metadata = {"tags": form.tags(cell)} if form.tags(cell) else {}
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = merged(cell.outputs, count)
    return nb


def merged(outputs, count: int) -> list:
    """Outputs without metadata, neighbouring pieces of one stream in one piece."""
    result = []
    for out in outputs:
        if out.output_type == "stream" and result and result[-1].get("name") == out.name:
            result[-1].text += out.text
            continue
        if "metadata" in out:
            out.metadata = {}
        if "execution_count" in out:
            out.execution_count = count
        result.append(out)
    return result


def dumps(nb) -> str:
    """The one form in which a notebook is written."""
    return nbformat.writes(nb, indent=1).rstrip("\n") + "\n"


def essence(nb, pictures: bool = True) -> list[str]:
    """Cell by cell, what two runs share: not the outputs tagged nbval-ignore-output."""
    result = []
    for cell in copy.deepcopy(nb.cells):
        for out in cell.get("outputs", []):
            if not pictures and "image/png" in out.get("data", {}):
                out.data["image/png"] = ""
        if "nbval-ignore-output" in form.tags(cell):
            cell.outputs = []
        result.append(json.dumps(cell, sort_keys=True))
    return result


def attempt(path: Path, **options):
    """Execute one notebook and say how long it took; a run of it, or None, and the seconds.

    What is None has failed, and said why.
    """
    start, nb = time.perf_counter(), None
    try:
        nb = execute(path, **options)
        for cell in nb.cells:
            for out in cell.get("outputs", []):
                if out.get("name") == "stderr":
                    raise ValueError(f"cell {cell.id} wrote to stderr: {out.text.strip()[:300]}")
    except (CellExecutionError, DeadKernelError, TimeoutError, ValueError) as error:
        tqdm.write(f"{path.name}: FAILED\n{error}", file=sys.stderr)
        nb = None
    seconds = time.perf_counter() - start
    tqdm.write(took(path, seconds))
    return nb, seconds


def took(path: Path, seconds: float) -> str:
    """A notebook's line: how long it took, and whether that is too long."""
    slow = f"  SLOW: more than {SLOW} s" if seconds > SLOW else ""
    return f"{path.name}: {seconds:.0f} s{slow}"


def attempts(paths: list[Path], **options):
    """(path, what `attempt` gave) for each, in order, while as many run as there are cores.

    Each kernel has one thread (`form.ENVIRONMENT`).
    """
    pool = ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1))
    try:
        yield from zip(paths, pool.map(lambda path: attempt(path, **options), paths), strict=True)
    except KeyboardInterrupt:
        os._exit(130)  # threads cannot be stopped; a kernel ends when this process does
    finally:
        pool.shutdown(cancel_futures=True)


def selected(chapter: str | None) -> list[Path]:
    """One chapter (`5`, `05`, `03b`) and its solutions; everything if no chapter is named."""
    paths = form.chapters() + form.solutions()
    if chapter:
        paths = [path for path in paths if form.number(path) == (chapter.lstrip("0") or "0")]
        if not paths:
            sys.exit(f"There is no chapter {chapter} in chapters/.")
    return paths


def command_execute(chapter: str | None, fresh: bool) -> int:
    """Store new outputs; a file of which only ignored outputs (timings) would change stays.

    One notebook after the other: the timings that are stored should be undisturbed.
    """
    failures = 0
    for path in selected(chapter):
        nb, _ = attempt(path)
        if nb is None:
            failures += 1
            continue
        old = nbformat.read(path, as_version=4)
        if not fresh and dumps(old) == path.read_text("utf-8") and essence(old) == essence(nb):
            nb = old
            print("  only outputs that may differ would change: the stored ones stay (--fresh)")
        path.write_text(dumps(nb), encoding="utf-8", newline="\n")
        for problem in form.problems(nb, path):
            print(f"  form: {problem}")
        if form.NAME.fullmatch(path.name)[1] in form.CONVERTED:
            for problem in notation.problems(nb):
                print(f"  notation: {problem}")
    return failures


def command_check(chapter: str | None) -> int:
    """Compare a new run with the stored one, all but the bytes of pictures; list the seconds."""
    failures, times = 0, {}
    for path, (nb, seconds) in attempts(selected(chapter)):
        times[path] = seconds
        old = nbformat.read(path, as_version=4)
        stored, new = (essence(x, pictures=False) if x else [] for x in (old, nb))
        failures += stored != new
        for cell, before, after in zip(old.cells, stored, new, strict=False):
            if before != after:
                print(f"  {path.name}: cell {cell.id} differs from the stored one")
    print(f"Seconds of each, the longest first, {min(JOBS, os.cpu_count() or 1)} side by side:")
    for path in sorted(times, key=times.get, reverse=True):
        print(f"  {took(path, times[path])}")
    slow = sum(seconds > SLOW for seconds in times.values())
    print(f"{len(times)} notebooks, {failures} differ or fail, {slow} take more than {SLOW} s")
    return failures


def command_run(chapter: str | None) -> int:
    """Run copies of the notebooks, one progress bar for all their cells, then render the book."""
    paths, failures, done = selected(chapter), 0, {}
    stored = [nbformat.read(path, as_version=4) for path in paths]
    total = sum(cell.cell_type == "code" for nb in stored for cell in nb.cells)
    with tqdm(total=total, unit="cell") as bar:
        for path, (nb, _) in attempts(paths, on_cell=lambda **_: bar.update()):
            done[path] = nb
            failures += nb is None
    return render(done) or failures


def render(done: dict, *options: str) -> int:
    """Render the book: the notebooks given, and the stored outputs of all others.

    Args:
        done: Path -> notebook.
        *options: For Sphinx.
    """
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in form.chapters() + form.solutions():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = done.get(path) or nbformat.read(path, as_version=4)
        target.write_text(dumps(described(nb)), encoding="utf-8", newline="\n")
    shutil.copy(ROOT / "chapters" / "TEACHING.md", source / "chapters")
    write_index(source)
    options = [*options, "-q", "--keep-going", "-E", "-b", "html", "-c", HERE]
    command = [sys.executable, "-m", "sphinx", *options, source, BUILD / "html"]
    status = subprocess.run(command, check=False).returncode
    if problems := pages.broken((BUILD / "html").resolve()):
        print("\n".join(problems), file=sys.stderr)
        status = status or 1
    print(f"The book: open {(BUILD / 'html' / 'index.html').as_uri()}")
    return status


def write_pages(source: Path) -> None:
    """Write the pages that are no notebooks: the reference, the notation, those with numbers."""
    for name, text in reference.pages().items():
        (source / name).write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "chapters" / "NOTATION.md", source / "notation.md")
    for name in ("which_method.md", "coming_from.md"):
        (source / name).write_text(pages.filled(name), encoding="utf-8")


def write_index(source: Path) -> None:
    """Fill the list of chapters into index.md, and write the pages that it links."""
    write_pages(source)
    rows, contents = [], {"chapters": [], "solutions": []}
    for path in form.chapters():
        first = nbformat.read(path, as_version=4).cells[0].source.splitlines()
        about = [line for line in first[1:] if line.strip() and "colab-badge" not in line]
        row = f"- [{first[0].lstrip('# ')}]({path.relative_to(ROOT).as_posix()})"
        contents["chapters"].append(f"chapters/{path.stem}")
        if form.solution_of(path).exists():
            row += f" ([solutions]({form.solution_of(path).relative_to(ROOT).as_posix()}))"
            contents["solutions"].append(f"chapters/solutions/{path.stem}_solutions")
        rows.append(row + (f"  \n  {about[0]}" if about else ""))
    text = (HERE / "index.md").read_text("utf-8").replace("CHAPTER_LIST", "\n".join(rows))
    for name, entries in contents.items():
        text = text.replace(f"{name.upper()}_CONTENTS", "\n".join(entries))
    (source / "index.md").write_text(text, encoding="utf-8")


# owner/name, alone or in an address as git takes it
ADDRESS = r"(?:(?:https://|ssh://)?(?:[\w-]+(?::[^@/]*)?@)?github\.com[:/])?([\w.-]+/[\w.-]+?)(?:\.git)?/?"


def command_repo(new: str | None) -> int:
    """Replace the repository's address in badges, setup cells and the project's files."""
    if not new:
        command = ["git", "remote", "get-url", "origin"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        new = done.stdout.strip()
        if not new:
            sys.exit("There is no remote called origin. Say which: make repo ADDRESS=owner/name")
    match = re.fullmatch(ADDRESS, new)
    if not match:
        sys.exit(f"{new} is not owner/name, nor an https or ssh address of that on github.com.")
    new, old = match[1], form.address()
    ours = re.compile(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])")
    names = ["README.md", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"]
    for path in [ROOT / name for name in names] + form.chapters() + form.solutions():
        if path.exists():
            text = ours.sub(rf"\g<1>{new}", path.read_text("utf-8"))
            path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{old} -> {new}")
    return 0


def main() -> int:
    """Read the command line and run one command."""
    parser = argparse.ArgumentParser(prog="book.py", description="Run chapters, make the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("execute", "check", "run"):
        one = commands.add_parser(name)
        one.add_argument("chapter", nargs="?", help="such as 05; all if left out")
        if name == "execute":
            one.add_argument("--fresh", action="store_true", help="store timings anew too")
    commands.add_parser("html")
    one = commands.add_parser("repo")
    one.add_argument("address", nargs="?", help="owner/name; by default that of the remote origin")
    options = parser.parse_args()
    form.set_environment()
    return {
        "execute": lambda: command_execute(options.chapter, options.fresh),
        "check": lambda: command_check(options.chapter),
        "run": lambda: command_run(options.chapter),
        "html": lambda: render({}, "-W"),
        "repo": lambda: command_repo(options.address),
    }[options.command]()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
