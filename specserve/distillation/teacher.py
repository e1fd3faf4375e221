"""What the target with the adapter says of the texts: its likeliest next tokens at each position, computed once.

With a vocabulary of 150,000 whole distributions would take 0.6 MB a token; the `TOP_K` likeliest and the sum of the
others take 1 kB, and hold nearly all of what a draft is accepted for: acceptance is the sum of min(p, q).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from specserve.distillation.engines import device_of
from specserve.distillation.models import Batch, continuation_logits, load_base, with_adapters
from specserve.distillation.samples import NAME, Sample
from specserve.distillation.settings import Job
from specserve.distillation.work import WorkFolder, written_whole

TOP_K = 128
TEXTS_A_BATCH = 8
TEXTS_A_FILE = 64


@dataclass(frozen=True, slots=True)
class Teaching:
    """The teacher's word on all continuations, one text after the other; text i has tokens starts[i] … starts[i+1]."""

    token_ids: Tensor  # [tokens, k] int32
    logprobs: Tensor  # [tokens, k] float32, of the whole vocabulary's softmax at temperature 1
    starts: Tensor  # [texts + 1] int64

    def of(self, texts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids int64 and log-probabilities [tokens, k] of these texts, in their order."""
        rows = torch.cat([torch.arange(int(self.starts[text]), int(self.starts[text + 1])) for text in texts])
        return self.token_ids[rows].long().to(device), self.logprobs[rows].to(device)


def teach(job: Job, work: WorkFolder, samples: Sequence[Sample]) -> Teaching:
    """Run the target with the adapter over the texts. Files that an earlier run wrote are read."""
    begins = range(0, len(samples), TEXTS_A_FILE)
    files = [work.samples / f"teacher-{begin:06}.safetensors" for begin in begins]
    missing = [(begin, file) for begin, file in zip(begins, files, strict=True) if not file.exists()]
    if missing:
        teacher = with_adapters(load_base(job.model, job.settings), {NAME: job.adapter})
        for begin, file in tqdm(missing, desc="Teacher", unit="file", disable=None, leave=False):
            _write(teacher, samples[begin : begin + TEXTS_A_FILE], file, device_of(job.settings))
    parts = [load_file(file) for file in files]
    lengths = torch.tensor([0, *(len(sample.token_ids) for sample in samples)])
    ids, logprobs = (torch.cat([part[name] for part in parts]) for name in ("token_ids", "logprobs"))
    return Teaching(ids, logprobs, lengths.cumsum(0))


@torch.inference_mode()
def _write(teacher: torch.nn.Module, samples: Sequence[Sample], file: Path, device: torch.device) -> None:
    ids, logprobs = [], []
    for begin in range(0, len(samples), TEXTS_A_BATCH):
        logits = continuation_logits(teacher, Batch.of(samples[begin : begin + TEXTS_A_BATCH], device))
        top = logits.log_softmax(-1).topk(min(TOP_K, logits.shape[-1]))
        ids.append(top.indices.int().cpu())
        logprobs.append(top.values.cpu())
    with written_whole(file) as path:
        save_file({"token_ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}, path)
