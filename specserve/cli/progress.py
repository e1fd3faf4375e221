"""Many calls of a server at once, with a bar on a terminal and nothing where the output is piped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from tqdm import tqdm

from specserve.cli.api import ServerAnsweredError

T = TypeVar("T")
AT_ONCE = 4  # a server reads few folders at once; more calls would only wait there
REFRESH_SECONDS = 0.2


def call_each(
    title: str, calls: Mapping[str, Callable[[], T]], *, unit: str = " adapters"
) -> tuple[dict[str, T], dict[str, str]]:
    """Make every call; returns (what was answered, what went wrong), by name in the order given.

    The threads are daemons: an interrupt ends the command at once, whatever the server is still doing.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    events: queue.SimpleQueue[tuple[str, T | ServerAnsweredError | None]] = queue.SimpleQueue()
    for name in calls:
        todo.put(name)
    for _ in range(min(AT_ONCE, len(calls))):
        threading.Thread(target=_work, args=(todo, calls, events), daemon=True).start()
    ended = _watch(title, len(calls), events, unit)
    answers, errors = {}, {}
    for name in calls:
        result = ended[name]
        if isinstance(result, ServerAnsweredError):
            errors[name] = str(result)
        else:
            answers[name] = result
    return answers, errors


def _work(
    todo: queue.SimpleQueue[str],
    calls: Mapping[str, Callable[[], T]],
    events: queue.SimpleQueue[tuple[str, T | ServerAnsweredError | None]],
) -> None:
    """Make calls until none is left; tells of each when it begins (None) and how it ended."""
    while True:
        try:
            name = todo.get_nowait()
        except queue.Empty:
            return
        events.put((name, None))
        try:
            events.put((name, calls[name]()))
        except ServerAnsweredError as error:
            events.put((name, error))
        except Exception as error:  # ours; whoever watches must not wait for ever
            events.put((name, ServerAnsweredError(f"{type(error).__name__}: {error}")))


def _watch(
    title: str,
    total: int,
    events: queue.SimpleQueue[tuple[str, T | ServerAnsweredError | None]],
    unit: str,
) -> dict[str, T | ServerAnsweredError]:
    ended: dict[str, T | ServerAnsweredError] = {}
    running: dict[str, None] = {}
    form = "{desc} {n_fmt}/{total_fmt}{unit} |{bar:20}| {elapsed} {postfix}"
    # disable=None: shown on a terminal alone.
    with tqdm(desc=title, total=total, unit=unit, bar_format=form, disable=None, leave=False) as bar:
        while len(ended) < total:
            try:
                name, result = events.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                bar.refresh()  # so that the seconds go on
                continue
            if result is None:
                running[name] = None
            else:
                running.pop(name)
                ended[name] = result
                bar.update()
            bar.set_postfix_str(", ".join(running))
    return ended
