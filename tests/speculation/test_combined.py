"""Two proposers as one: whose drafts a row gets, what they were drawn from, and what the second part reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from specserve.core.errors import InvalidRequestError
from specserve.speculation.combined import CombinedProposer, choose
from specserve.speculation.draft_model import keep_given
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve.speculation.registry import ProposerRegistry
from specserve_kernels.sampling.cut import Cut, DraftSoftmax

VOCAB = 7


def sure(tokens: list[list[int]], counts: list[int]) -> Drafts:
    return Drafts(torch.tensor(tokens), torch.tensor(counts))


def with_probs(tokens: list[list[int]], counts: list[int]) -> Drafts:
    shape = (len(tokens), len(tokens[0]), VOCAB)
    probs = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(-1)
    return Drafts(torch.tensor(tokens), torch.tensor(counts), probs)


def one_hot(token: int) -> list[float]:
    return [float(index == token) for index in range(VOCAB)]


def test_rows_that_the_first_found_nothing_for_get_the_second() -> None:
    first, second = sure([[1, 2], [0, 0], [3, 0]], [2, 0, 1]), sure([[4, 4], [5, 6], [6, 6]], [2, 2, 2])
    chosen = choose(first, second, VOCAB)
    assert chosen.tokens.tolist() == [[1, 2], [5, 6], [3, 0]]
    assert chosen.counts.tolist() == [2, 2, 1]
    assert chosen.probs is None


def test_who_is_sure_is_one_hot_beside_who_is_not() -> None:
    first, second = sure([[1, 2], [0, 0]], [2, 0]), with_probs([[4, 4], [5, 6]], [2, 2])
    chosen = choose(first, second, VOCAB)
    assert isinstance(chosen.probs, Tensor) and isinstance(second.probs, Tensor)
    assert chosen.probs[0].tolist() == [one_hot(1), one_hot(2)]
    assert torch.equal(chosen.probs[1], second.probs[1])
    other = choose(second, first, VOCAB)
    assert isinstance(other.probs, Tensor) and torch.equal(other.probs, second.probs)


@pytest.mark.parametrize("have_probs", [True, False])
def test_given_drafts_are_kept(have_probs: bool) -> None:
    given = (with_probs if have_probs else sure)([[1, 2], [3, 0], [0, 0]], [2, 1, 0])
    own, kept = torch.tensor([4, 5, 6]), torch.rand(3, 2, VOCAB, dtype=torch.float64)
    before = kept.clone()
    assert keep_given(given, 1, own, kept).tolist() == [2, 5, 6]
    assert kept[0, 1].tolist() == (given.probs[0, 1].tolist() if isinstance(given.probs, Tensor) else one_hot(2))
    assert torch.equal(kept[1:], before[1:]) and torch.equal(kept[:, 0], before[:, 0])
    assert keep_given(given, 0, own, None).tolist() == [1, 3, 6]


def test_given_drafts_beside_kept_logits_are_one_hot() -> None:
    given = sure([[1, 2], [3, 0], [0, 0]], [2, 1, 0])
    logits = torch.randn(3, 2, VOCAB, generator=torch.Generator().manual_seed(1))
    kept = softmax_of(logits)
    tokens = torch.stack([keep_given(given, step, torch.tensor([4, 5, 6]), kept) for step in range(2)], dim=1)
    probs = Drafts(tokens, torch.tensor([2, 2, 2]), kept).written_out()
    assert probs is not None and tokens.tolist() == [[1, 2], [3, 5], [6, 6]]
    want = logits.softmax(-1)
    want[0] = torch.tensor([one_hot(1), one_hot(2)])
    want[1, 0] = torch.tensor(one_hot(3))
    torch.testing.assert_close(probs, want)


def softmax_of(logits: Tensor) -> DraftSoftmax:
    """All tokens stay."""
    shape = logits.shape[:2]
    largest = logits.amax(-1)
    total = (logits - largest[..., None]).exp().sum(-1)
    cut = Cut(torch.full(shape, -torch.inf), torch.full(shape, VOCAB, dtype=torch.int32), largest, total)
    return DraftSoftmax(logits, None, cut)


@dataclass
class Part:
    """A proposer in name alone."""

    name: str
    location: Literal["device", "host"] = "device"
    keeps_kv: bool = False

    def propose(self, batch: DraftBatch) -> Drafts:
        raise AssertionError


def test_a_pair_is_what_its_parts_are() -> None:
    pair = CombinedProposer(Part("a", "host"), Part("b"))
    assert (pair.name, pair.location, pair.keeps_kv) == ("a+b", "host", False)
    with pytest.raises(AssertionError, match="would miss drafts"):
        CombinedProposer(Part("a"), Part("b", keeps_kv=True))
    with pytest.raises(AssertionError, match="nothing is left"):
        CombinedProposer(Part("a", keeps_kv=True), Part("b"))


def test_pairs_have_names() -> None:
    with_draft, without = (ProposerRegistry(has_draft_model=has, extra=[Part("mine")]) for has in (True, False))
    lookups = ["mine", "ngram", "suffix"]
    pairs = [f"{first}+{second}" for first in lookups for second in lookups if first != second]
    assert without.names == sorted(lookups + pairs)
    assert with_draft.names == sorted([*without.names, "draft_model", *(f"{name}+draft_model" for name in lookups)])
    keeps = with_draft.keeps_kv()
    assert keeps["ngram+draft_model"] and keeps["draft_model"] and not keeps["suffix+ngram"]
    assert [part.name for part in with_draft.listeners("ngram+suffix")] == ["suffix"]
    assert with_draft.listeners("ngram+draft_model") == []
    with pytest.raises(
        InvalidRequestError, match=r"'ngram.draft_model' is not available.*draft_model needs --draft-model"
    ):
        without.get("ngram+draft_model")
    with pytest.raises(InvalidRequestError, match=r"'draft_model.ngram' is not available; choose from"):
        with_draft.get("draft_model+ngram")
