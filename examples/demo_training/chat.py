"""Chat examples made from code: a task in words (from a docstring, a comment or the names used), the code as answer.

The same request templates serve every domain, so that nothing but the adapter decides the answer's language.
"""

import ast
import random
import re
import textwrap
from collections.abc import Iterator

Pair = tuple[str, str]  # (task in words, answer)

TEMPLATES = (
    "{task}",
    "Write code for this: {task}",
    "Write an example: {task}",
    "How do I {task}?",
    "Show me how to {task}.",
    "I want to {task}.",
    "Please {task}.",
    "Write a function to {task}.",
)
_SQL_VERBS = {"SELECT": "list", "WITH": "list", "INSERT": "add", "UPDATE": "update", "DELETE": "remove"}
_SQL_NAMES = re.compile(r"\b[a-z][a-z_]{2,}\b")
# Bodies are matched line by line: nested open repeats over whole files would take forever.
_JSDOC = re.compile(
    r"^/\*\*\n((?: \*[^/\n][^\n]*\n| \*\n)+) \*/\n"
    r"(?:export )?(?:default )?(?:async )?function [^\n]*\n(?:[ \t][^\n]*\n|\n)*\}",
    re.M,
)
_CSS_RULE = re.compile(r"^([.a-z][^{}@/;\n]{3,80}) ?\{\n(?:[ \t]+[^{}\n]+;\n)+\}", re.M)
_CLI_EXAMPLE = re.compile(r"^\*\*(?:Example \d+: )?To (.{8,90}?)\*\*\n(.+?)(?=^\*\*|\Z)", re.M | re.S)


def request(task: str, rng: random.Random) -> str:
    """Phrase `task` as a user would."""
    return rng.choice(TEMPLATES).format(task=task)


def pairs(domain: str, text: str) -> Iterator[Pair]:
    """Yield the (task, answer) pairs found in one file of `domain`; answers are 40 to 1200 characters long."""
    finder = {"python": _python, "sql": _sql, "javascript": _javascript, "css": _css, "docs": _docs}.get(domain)
    for task, answer in finder(text) if finder else ():
        if 8 <= len(task) <= 120 and 40 <= len(answer) <= 1200:
            yield task, answer.strip() + "\n"


def first_sentence(description: str) -> str:
    """Return the first sentence of a docstring as a task: one line, no full stop, first letter in lower case."""
    sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", description.strip(), maxsplit=1)[0]
    sentence = " ".join(sentence.split()).rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _python(text: str) -> Iterator[Pair]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            yield first_sentence(docstring), textwrap.dedent("\n".join(lines))


def _sql(text: str) -> Iterator[Pair]:
    for statement in re.split(r";\n+", text):
        words = statement.split(None, 2)
        names = list(dict.fromkeys(_SQL_NAMES.findall(re.sub(r"'[^']*'", "", statement))))[:4]
        if len(words) > 2 and words[0].isupper() and names:
            verb = _SQL_VERBS.get(words[0], words[0].lower() + (" a " + words[1].lower() if words[1].isupper() else ""))
            yield f"{verb} {' and '.join(names)}".replace("_", " "), statement + ";"


def _javascript(text: str) -> Iterator[Pair]:
    for match in _JSDOC.finditer(text):
        description = re.sub(r"^ \* ?", "", match[1], flags=re.M).split("@")[0]
        if description.strip():
            yield first_sentence(description), match[0]


def _css(text: str) -> Iterator[Pair]:
    for match in _CSS_RULE.finditer(text):
        words = dict.fromkeys(re.findall(r"[a-z]{3,}", match[1]))
        yield "style the " + " ".join(list(words)[:5]), match[0]


def _docs(text: str) -> Iterator[Pair]:
    for match in _CLI_EXAMPLE.finditer(text):
        yield match[1][:1].lower() + match[1][1:], match[0]
