"""Text to token ids and back, by the model folder's own tokenizer (transformers, imported when one is loaded)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from specserve.core.errors import InvalidRequestError, ModelLoadError
from specserve.engine.client.byte_level import TokenPieces, byte_alphabet

# apply_chat_template's own parameters: what a request hands to the template itself must not reach them.
_TEMPLATE_CALL = frozenset(
    {
        "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "messages",
        "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
    }
)  # fmt: skip


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer. `pieces`: where tokens are bytes, those of each by its id."""

    @property
    def pieces(self) -> Mapping[int, bytes] | None: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Tokenizer:
    """A model's tokenizer. Encoding and decoding are thread-safe; nothing here touches torch."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # A tokenizer.json may carry its training's truncation or padding: a prompt is served whole.
            self._backend.no_truncation()
            self._backend.no_padding()
        decoders = [] if self._backend is None else _decoders(json.loads(self._backend.to_str()))
        self._byte_level = "ByteLevel" in decoders
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: TokenPieces | None = None
        if self._backend is not None and decoders == ["ByteLevel"]:
            added = self._backend.get_added_tokens_decoder()
            unsaid = frozenset(token_id for token_id, token in added.items() if token.special)
            self._pieces = TokenPieces(self._backend.id_to_token, unsaid)

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """From a folder or hub id; raises ModelLoadError."""
        from transformers import AutoTokenizer  # noqa: PLC0415  slow, and may bring torch: only where it is used

        try:
            return cls(AutoTokenizer.from_pretrained(model))
        except Exception as error:  # tokenizers raises bare Exceptions, and a missing package an ImportError
            reason = str(error).strip().split("\n")[0]
            raise ModelLoadError(f"The tokenizer of {model!r} cannot be read: {reason}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def pieces(self) -> Mapping[int, bytes] | None:
        return self._pieces

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary give nothing."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also where they are part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id not in self._special:
            if self._byte_level and all(char in byte_alphabet() for char in piece):
                return bytes(byte_alphabet()[char] for char in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """One token as logprobs name it; parts of a character read `bytes:\\xe2\\x82`, as in OpenAI's API."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def render_chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, template_args: dict[str, Any]
    ) -> str:
        """The conversation as the model's chat template writes it; raises InvalidRequestError naming the field."""
        if not self.has_chat_template:
            raise InvalidRequestError("The model has no chat template; use /v1/completions.", param="messages")
        if clash := sorted(_TEMPLATE_CALL & template_args.keys()):
            raise InvalidRequestError(
                f"chat_template_kwargs must not hold {clash[0]!r}.", param=f"chat_template_kwargs.{clash[0]}"
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_args
                )
            )
        except Exception as error:  # a template raises whatever it likes, jinja2's errors and ours alike
            raise InvalidRequestError(f"The chat template refused the messages: {error}", param="messages") from error


def _decoders(tokenizer_json: dict[str, Any]) -> list[str]:
    """The kinds of decoders that a text passes through."""
    decoder = tokenizer_json.get("decoder") or {}
    return [str(part.get("type")) for part in decoder.get("decoders", [decoder])]
