"""Many calls of a server at once, with a bar on a terminal and nothing where the output is piped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from specserve.cli.api import ServerAnsweredError

AT_ONCE = 4  # a server reads few folders at once; more calls would only wait there
REFRESH_SECONDS = 0.2
BAR = "{desc} {n_fmt}/{total_fmt} adapters |{bar:20}| {elapsed}{postfix}"

Calls = Mapping[str, Callable[[], Any]]
Events = queue.SimpleQueue[tuple[str, Any]]  # (name, _BEGUN, or the answer, or a ServerAnsweredError)
_BEGUN = object()


def call_each(title: str, calls: Calls) -> tuple[dict[str, Any], dict[str, str]]:
    """Make every call; returns (what was answered, what went wrong), by name in the order given.

    The threads are daemons: an interrupt ends the command at once, whatever the server is still doing.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    events: Events = queue.SimpleQueue()
    for name in calls:
        todo.put(name)
    for _ in range(min(AT_ONCE, len(calls))):
        threading.Thread(target=_work, args=(todo, calls, events), daemon=True).start()
    ended = _watch(title, len(calls), events)
    errors = {name: str(ended[name]) for name in calls if isinstance(ended[name], ServerAnsweredError)}
    return {name: ended[name] for name in calls if name not in errors}, errors


def _work(todo: queue.SimpleQueue[str], calls: Calls, events: Events) -> None:
    """Make calls until none is left; tells of each when it begins and how it ended."""
    while True:
        try:
            name = todo.get_nowait()
        except queue.Empty:
            return
        events.put((name, _BEGUN))
        try:
            events.put((name, calls[name]()))
        except ServerAnsweredError as error:
            events.put((name, error))
        except Exception as error:  # ours; whoever watches must not wait for ever
            events.put((name, ServerAnsweredError(f"{type(error).__name__}: {error}")))


def _watch(title: str, total: int, events: Events) -> dict[str, Any]:
    """How each call ended, once all have."""
    ended: dict[str, Any] = {}
    running: dict[str, None] = {}
    # disable=None: shown on a terminal alone.
    with tqdm(desc=title, total=total, bar_format=BAR, disable=None, leave=False) as bar:
        while len(ended) < total:
            try:
                name, result = events.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                bar.refresh()  # so that the seconds go on
                continue
            if result is _BEGUN:
                running[name] = None
            else:
                running.pop(name)
                ended[name] = result
            bar.set_postfix_str(", ".join(running), refresh=False)
            bar.update(result is not _BEGUN)
    return ended
