"""What the answer to a refused body adds to msgspec's own words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from serverkit.processes import Server
from specserve.server.adapters import LoadBody
from specserve.server.body_hints import hint
from specserve.server.protocol import ChatBody, CompletionBody

LOAD_FIELDS = "Known here: draft_path, name, path, pinned, weight"


def hinted(kind: type, body: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(msgspec.json.encode(body), type=kind)
    return hint(str(raised.value), kind)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (LoadBody, {"nmae": "a"}, f"; did you mean `name`? {LOAD_FIELDS}"),
        (LoadBody, {"draftPath": "a"}, f"; did you mean `draft_path`? {LOAD_FIELDS}"),
        (LoadBody, {"": 1}, f". {LOAD_FIELDS}"),
        (LoadBody, {"si`ze\n": 1}, f". {LOAD_FIELDS}"),
        (CompletionBody, {"lora": {"name": "a", "scal": 1}}, "; did you mean `scale`? Known here: name, scale"),
        (CompletionBody, {"lora": ["b", {"name": "a", "size": 1}]}, ". Known here: name, scale"),
        (CompletionBody, {"speculation": {"method": "hope"}}, "; it may be 'coupled', 'rejection'"),
        (
            ChatBody,
            {"messages": [{"role": "user"}, {"role": "robot"}]},
            "; it may be 'assistant', 'developer', 'system', 'tool', 'user'",
        ),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "; it may be 'text'"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"txt": "a"}]}]},
            "; did you mean `text`? Known here: text, type",
        ),
        (CompletionBody, {"logit_bias": {"5": "x"}}, ""),
        (CompletionBody, {}, ""),
        (CompletionBody, [], ""),
        (dict[str, list[LoadBody]], {"a": [{"pth": 1}]}, f"; did you mean `path`? {LOAD_FIELDS}"),
    ],
)  # fmt: skip
def test_hints(kind: type, body: Any, said: str) -> None:
    assert hinted(kind, body) == said


@pytest.mark.parametrize(
    ("name", "known"),
    [("x` - at `$.lora", "name"), ("`", "bad_words"), ("$.lora", "bad_words"), ("x" * 100_000, "bad_words")],
)
def test_names_that_look_like_places(name: str, known: str) -> None:
    """A field's name may be made up to look like the rest of the message; then other fields are listed, no more."""
    assert f"Known here: {known}, " in hinted(CompletionBody, {name: 1})
    assert hinted(CompletionBody, {"x` - at `$.no[0].where": 1}) == ""


def test_in_the_answer(scripted_server: Server) -> None:
    body = {"prompt": "x", "lora": {"name": "one", "scal": 1}}
    status, answer = scripted_server.request("POST", "/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, "lora.scal")
    assert answer["error"]["message"] == (
        "Object contains unknown field `scal` - at `$.lora`; did you mean `scale`? Known here: name, scale."
    )
