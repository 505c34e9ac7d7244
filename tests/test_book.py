"""The book: notebooks that run side by side."""

import threading
import time

import book


def test_notebooks_run_side_by_side_and_come_in_order(monkeypatch):
    running, most = set(), []

    def attempt(path, **options):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.05 if path == "b" else 0.2)
        running.discard(threading.get_ident())
        return None if path == "b" else path.upper()

    monkeypatch.setattr(book, "attempt", attempt)
    monkeypatch.setattr(book.os, "cpu_count", lambda: 2)
    assert list(book.attempts(["a", "b", "c"])) == [("a", "A"), ("b", None), ("c", "C")]
    assert max(most) == 2


def test_a_notebook_that_fails_makes_the_command_fail(monkeypatch):
    monkeypatch.setattr(book, "attempt", lambda path, **options: None)
    monkeypatch.setattr(book, "render", lambda done, *options: 0)
    assert book.command_run("0") == book.command_check("0") == 2  # the chapter and its solutions
