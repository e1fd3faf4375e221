"""Train the tokenizer, and turn the corpus into one token array per (domain, kind, split)."""

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .corpus import Document

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SAMPLE_CHARACTERS = 40_000_000  # enough text for 4096 merges; more only takes longer


def train(documents: list[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (any bytes, nothing unknown) on a sample of the training files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _sample(documents: list[Document]) -> Iterator[str]:
    shuffled = [document for document in documents if document.split == "train"]
    random.Random(0).shuffle(shuffled)
    total = 0
    for document in shuffled:
        yield document.text + document.reply
        total += len(document.text)
        if total > SAMPLE_CHARACTERS:
            return


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the token arrays, named `domain.kind.split`, to the .npz file `path`."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[f"{document.domain}.{document.kind}.{document.split}"].append(document)
    arrays = {}
    for name, members in groups.items():
        random.Random(0).shuffle(members)  # neighbours in a window should not come from one package only
        ids = tokenizer([_rendered(document) for document in members], add_special_tokens=False)["input_ids"]
        arrays[name] = np.concatenate([np.array(document, dtype=np.uint16) for document in ids])
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _rendered(document: Document) -> str:
    if document.kind == "text":
        return BOS + document.text + EOS
    return f"{BOS}{USER}{document.text}{END}{ASSISTANT}{document.reply}{END}{EOS}"
