"""The laws run over everything that is registered, and the cover is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, product

from lawbook.cases import AXES, FAMILIES, PROPOSERS, pairwise
from lawbook.mixes import proposer_name
from lawbook.zoo import Zoo
from specserve.models import registry as models
from specserve.speculation import registry as proposers


def test_every_family_is_held(zoo: Callable[[str], Zoo]) -> None:
    configs = [json.loads((zoo(family).target / "config.json").read_text()) for family in FAMILIES]
    assert {config["architectures"][0] for config in configs} == set(models.FAMILIES)


def test_every_proposer_is_held() -> None:
    assert set(proposers.BUILT_IN) <= {proposer_name(proposer) for proposer in PROPOSERS}


def test_cover_has_every_pair() -> None:
    cover = pairwise(AXES)
    for (i, first), (j, second) in combinations(enumerate(AXES.values()), 2):
        assert {(row[i], row[j]) for row in cover} == set(product(first, second))
    assert len(cover) < len(list(product(*AXES.values()))) / 5
