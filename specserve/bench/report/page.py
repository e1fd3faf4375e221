"""The report as one HTML file that needs no other: who wins where at the top, everything measured below."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import NamedTuple

from specserve.bench.compare import Compared
from specserve.bench.records import Comparison, VariantInfo
from specserve.bench.report.tables import at_a_glance, details
from specserve.bench.verdict import break_even_lines, cautions, notes, verdict

COLOURS = 6  # of variants, in the style sheet
HOW = (
    "Both variants got the same requests, in turns. A figure in the table says how many times as fast the second "
    "is, or of throughputs how many times as much it serves; below it stand its bounds. It is coloured where these "
    "leave out 1. Bounds come from resampling rounds and requests: they know that machines drift, and that requests of "
    "one run share a queue. TTFT: time to the first token. TPOT: time per output token after it. ITL: time between two "
    "events of a stream, which may bring several tokens each. E2EL: from sending a request to its end."
)


class Figure(NamedTuple):
    """A picture on the page."""

    svg: str  # an element
    caption: str
    narrow: str | None = None  # the same for a phone, of a picture that takes a row of its own


def page(comparison: Comparison, found: Sequence[Compared], figures: Sequence[Figure], note: str = "") -> str:
    """`note`: what is missing, for the reader."""
    parts = [_head(comparison)]
    parts += [_outcome(compared) for compared in found]
    missing = [note] if note else []
    parts += [_caution(str(line)) for line in (*comparison.facts.get("notes", []), *missing)]
    if figures:
        parts.append('<h2>Pictures</h2><div class="figures">' + "".join(_figure(one) for one in figures) + "</div>")
    parts += [_answers(compared) for compared in found]
    parts.append("<h2>Details</h2>")
    parts += [details(compared) for compared in found]
    parts += [_variants(comparison), f"<details><summary>How to read this</summary><p>{escape(HOW)}</p></details>"]
    resources = files("specserve.bench.report")
    template = Template(resources.joinpath("page.html").read_text(encoding="utf-8"))
    style = resources.joinpath("style.css").read_text(encoding="utf-8")
    title = verdict(found[0]) if found else "Nothing to compare"
    return template.substitute(title=escape(title), style=style, body="\n".join(part for part in parts if part))


def _head(comparison: Comparison) -> str:
    facts = comparison.facts | {"date": str(comparison.facts.get("date", ""))[:16].replace("T", " ")}
    told = [str(facts[name]) for name in ("date", "machine", "device", "model") if facts.get(name)]
    chips = "".join(
        f'<li><span class="dot" style="background: var(--series-{place % COLOURS})"></span>'
        f"<b>{escape(info.variant)}</b>{escape(info.title)}</li>"
        for place, info in enumerate(comparison.variants)
    )
    eyebrow = escape(" · ".join(["specserve bench ab", *told]))
    return f'<p class="eyebrow">{eyebrow}</p><ul class="variants">{chips}</ul>'


def _outcome(compared: Compared) -> str:
    """What a reader sees in ten seconds."""
    said = map(_caution, cautions(compared))
    below = [*break_even_lines(compared, told=True), *notes(compared)]
    parts = [f"<h1>{_emphasised(verdict(compared))}</h1>", *said, at_a_glance(compared)]
    parts += [f'<p class="note">{escape(line)}</p>' for line in below]
    return f"<section>{''.join(parts)}</section>"


def _caution(line: str) -> str:
    return f'<p class="caution">{escape(line)}</p>'


def _emphasised(sentence: str) -> str:
    """What is in parentheses (bounds, numbers of pairs) stands back, each part of it on one line."""

    def quiet(found: re.Match[str]) -> str:
        return f"<small>{found[0]}</small>"

    return re.sub(r"\([^()]*\)", quiet, escape(sentence))


def _figure(one: Figure) -> str:
    caption = f"<figcaption>{escape(one.caption)}</figcaption>"
    if one.narrow is None:
        return f"<figure>{one.svg}{caption}</figure>"
    both = f'<div class="broad">{one.svg}</div><div class="narrow">{one.narrow}</div>'
    return f'<figure class="wide">{both}{caption}</figure>'


def _answers(compared: Compared) -> str:
    found = compared.equality
    if found is None:
        return ""
    a, b = compared.a.variant, compared.b.variant
    text = f"{found.equal} of {found.pairs} answers of {a} and {b} are the same text ({found.share:.1%})"
    if found.first is None:
        return f"<h2>Answers</h2><p>{escape(text)}.</p>"
    one = found.first
    text += f"; on average the first {found.common:.1%} of a text are. The first difference, in request {one.index}:"
    sides = "".join(
        f"<pre><b>{escape(name)}</b> <i>…{escape(one.before)}</i>{escape(rest) or '(end)'}</pre>"
        for name, rest in ((a, one.a), (b, one.b))
    )
    return f"<h2>Answers</h2><p>{escape(text)}</p>{sides}"


def _variants(comparison: Comparison) -> str:
    """All that is known of how it was measured, so that it can be repeated."""
    told = [f"<p><b>{escape(info.variant)}</b> {escape(info.title)}</p>{_told(info)}" for info in comparison.variants]
    facts = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in comparison.facts.items()
    )
    table = f'<div class="scroll"><table><tbody>{facts}</tbody></table></div>' if facts else ""
    return f"<details><summary>How it was measured</summary>{''.join(told)}{table}</details>"


def _told(info: VariantInfo) -> str:
    lines = [" ".join(info.command)] if info.command else []
    lines += [info.url] if info.url else []
    lines += [f"{name}: {_plain(value)}" for name, value in info.server.items()]
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return " ".join(value)  # a command
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
