"""Token windows on the training device: everything is held there as one array a domain, so there is no loader."""

from pathlib import Path

import numpy as np
import torch

Mixture = dict[str, float]  # "domain.kind" → share of the rows


class Windows:
    """Random and fixed windows of the token arrays that `tokens.encode` wrote."""

    def __init__(self, path: Path, device: str) -> None:
        with np.load(path) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name].astype(np.int32)).to(device) for name in arrays.files}
        self.device = device

    def random(self, mixture: Mixture, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Return [rows, length] training tokens; each row's domain is drawn from the mixture, its start at random."""
        # A tiny run's corpus lacks some of the chats.
        present = {name: share for name, share in mixture.items() if f"{name}.train" in self.arrays}
        shares = torch.tensor(list(present.values()))
        counts = torch.bincount(torch.multinomial(shares, rows, True, generator=generator), minlength=len(present))
        drawn = [
            self._at(f"{name}.train", torch.randint(0, 2**40, (int(count),), generator=generator), length)
            for name, count in zip(present, counts, strict=True)
            if count
        ]
        return torch.cat(drawn)

    def held_out(self, name: str, rows: int, length: int) -> torch.Tensor:
        """Return up to `rows` windows of held-out text, evenly spread over the files: the same ones every time."""
        total = len(self.arrays[f"{name}.held_out"])
        rows = max(1, min(rows, total // length))
        return self._at(f"{name}.held_out", torch.arange(rows) * max(1, (total - length) // rows), length)

    def _at(self, name: str, starts: torch.Tensor, length: int) -> torch.Tensor:
        tokens = self.arrays[name]
        starts = starts % max(1, len(tokens) - length)
        index = (starts[:, None] + torch.arange(length)).to(self.device) % len(tokens)
        return tokens[index].long()
