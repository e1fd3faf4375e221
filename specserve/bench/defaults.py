"""What a comparison asks its servers where the user does not say, and in which form all of them take it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache, partial

import msgspec

from specserve.bench.adapter_loads import ranks_of
from specserve.bench.options import ALL_ADAPTERS, TraceOptions
from specserve.bench.plan import AbOptions, Plan, make_plan
from specserve.bench.target import look
from specserve.bench.trace import as_text
from specserve.bench.variants import Variant
from specserve.bench.vocabulary import Vocabulary
from specserve.config import DEMO_ROOT
from specserve.core.errors import InvalidRequestError

DEMO, DEMO_OUTPUT_LEN = "demo", 48
TEXT_ENGINES = ("tgi", "transformers")  # take no token ids


def default_trace(given: TraceOptions, variants: Sequence[Variant]) -> TraceOptions:
    """Greedy unless told otherwise, so that texts can be compared; the demo has prompts of its own, on its adapters."""
    chosen = set(msgspec.to_builtins(given))
    if list(given.lora_modules) == [ALL_ADAPTERS]:
        raise InvalidRequestError("--lora-modules must name the adapters here: servers may list others.")
    if given.temperature is None and not given.seeded:
        given = msgspec.structs.replace(given, temperature=0.0)
    own = {"dataset_name", "dataset_path", "input_len", "lora_modules"} & chosen
    if not own and all(variant.tokenizer == DEMO for variant in variants):
        return msgspec.structs.replace(
            given, dataset_name="custom", dataset_path=str(DEMO_ROOT / "prompts.jsonl"),
            output_len=given.output_len or DEMO_OUTPUT_LEN,
        )  # fmt: skip
    return given


def plan_for(
    variants: Sequence[Variant],
    options: AbOptions,
    trace: TraceOptions,
    tokenizer: str | None,
    headers: Mapping[str, str],
) -> Plan:
    """The plan, in texts if one of the variants takes no token ids: all are to be asked the same.

    `tokenizer`: a folder or hub id; None: the variants', if the dataset needs one. Raises InvalidRequestError.
    """

    @cache
    def tokens() -> Vocabulary:
        return Vocabulary.load(tokenizer or asyncio.run(_tokenizer_of(variants, headers)))

    plan = make_plan(options, trace, tokens, partial(ranks_of, variants))
    ids = any(isinstance(request.prompt, list) for requests in plan.traces.values() for request in requests)
    if not (ids and any(variant.engine in TEXT_ENGINES for variant in variants)):
        return plan
    decode = tokens().decode
    return msgspec.structs.replace(plan, traces={key: as_text(part, decode) for key, part in plan.traces.items()})


async def _tokenizer_of(variants: Sequence[Variant], headers: Mapping[str, str]) -> str:
    """The first variant's that tells its model; servers reached by URL are asked."""
    for variant in variants:
        if variant.tokenizer is not None:
            return variant.tokenizer
        if variant.url is not None:
            return (await look(variant.url, headers)).root
    raise InvalidRequestError("No side tells its model: name its folder or hub id by --tokenizer.", param="tokenizer")
