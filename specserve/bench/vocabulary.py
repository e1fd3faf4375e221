"""The tokenizer of a benchmark's client: random prompts are made of its tokens, texts measured by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specserve.config import DEMO_ROOT
from specserve.core.errors import InvalidRequestError


class Vocabulary:
    """Tokens of a model. `ids`: all but the special ones, which no random prompt should hold."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        self.ids = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]

    @classmethod
    def load(cls, model: str, param: str = "tokenizer") -> Vocabulary:
        """From a folder or hub id, or of the bundled demo; raises InvalidRequestError for the flag `param`."""
        from transformers import AutoTokenizer  # noqa: PLC0415  slow: only where it is used

        try:
            return cls(AutoTokenizer.from_pretrained(str(DEMO_ROOT / "target") if model == "demo" else model))
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = str(error).strip().split("\n")[0]
            raise InvalidRequestError(
                f"The tokenizer of {model!r} cannot be read ({reason}); name its folder or hub id by --{param}.",
                param=param,
            ) from error

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones at its ends included."""
        return [len(ids) for ids in self._tokenizer(list(texts)).input_ids] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
