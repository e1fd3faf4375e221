"""A server to be measured: where it is and how it wants to be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import aiohttp
import msgspec

from specserve.bench.records import TracedRequest
from specserve.core.errors import InvalidRequestError

Engine = Literal["specserve", "vllm", "sglang", "tgi", "openai"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK_SECONDS = 30.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """`engine`: whose dialect; "openai" for any other. `model`: the base model's name there.

    `token_counts`: have the server tell how many tokens each event brought, which costs it a little; else each event
    counts as one, and the answer's total is the server's.
    """

    url: str  # without a slash at its end
    engine: Engine
    model: str
    endpoint: str = COMPLETIONS
    headers: Mapping[str, str] = {}
    token_counts: bool = False

    @property
    def generate_url(self) -> str:
        return self.url + self.endpoint

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    @property
    def takes_ids(self) -> bool:
        """Whether a prompt may be token ids."""
        return not self.chat and self.engine != "tgi"

    def body(self, request: TracedRequest) -> dict[str, Any]:
        """The JSON of the API call. The request's fields go last: they may be anything the server knows."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "max_tokens": request.max_tokens}
        if self.chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        body["stream_options"] = {"include_usage": True}
        if self.token_counts and self.engine == "specserve":
            body["return_token_ids"] = True
        elif self.token_counts:
            body["stream_options"]["continuous_usage_stats"] = True
        if request.adapter is not None:
            body |= self._adapter(request.adapter)
        return body | request.fields

    def _adapter(self, name: str) -> dict[str, Any]:
        if self.engine == "specserve":
            return {"lora": name}
        return {"model": f"{self.model}:{name}" if self.engine == "sglang" else name}


class Found(msgspec.Struct, frozen=True):
    """What a server told: whose it is, its base model, that model's folder or id, and its adapters."""

    engine: Engine
    model: str
    root: str
    adapters: list[str]


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    owned_by: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def look(url: str, headers: Mapping[str, str]) -> Found:
    """Ask a server's /v1/models; raises InvalidRequestError if it does not answer as such servers do."""
    if not url.startswith(("http://", "https://")):
        raise InvalidRequestError(f"{url!r} is no URL of a server: http://HOST:PORT.", param="base_url")
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
            async with session.get(url + "/v1/models") as response:
                data = await response.read()
                if response.status != 200:
                    raise InvalidRequestError(f"{url}/v1/models answers {response.status}: {data.decode()[:200]}")
            models = msgspec.json.decode(data, type=_Models).data
            is_tgi = not any(model.owned_by in _OWNERS for model in models) and await _is_tgi(session, url)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise InvalidRequestError(f"No server answers at {url}: {error or type(error).__name__}.") from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{url}/v1/models is no list of models: {error}") from error
    bases = [model for model in models if model.parent is None]
    if not bases:
        raise InvalidRequestError(f"{url}/v1/models lists no base model.")
    engine = "tgi" if is_tgi else _OWNERS.get(bases[0].owned_by or "", "openai")
    adapters = [model.id for model in models if model.parent is not None]
    return Found(engine, bases[0].id, bases[0].root or bases[0].id, adapters)


_OWNERS: Mapping[str, Engine] = {"specserve": "specserve", "vllm": "vllm", "sglang": "sglang"}


async def _is_tgi(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(url + "/info") as response:
        return response.status == 200 and b"text-generation" in await response.read()


async def ask_version(target: Target) -> dict[str, str]:
    """Of the server's software, and what specserve tells beside it: the device, and what weights are kept in. Empty
    where it does not tell."""
    limit = aiohttp.ClientTimeout(total=ASK_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, headers=target.headers) as session,
            session.get(target.url + "/version") as response,
        ):
            found = msgspec.json.decode(await response.read(), type=_Version)
            return {name: value for name, value in msgspec.structs.asdict(found).items() if value is not None}
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        return {}


class _Version(msgspec.Struct):
    version: str
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    draft_weights: str | None = None
