"""What an adapter must know about one merged linear layer of a model: its place, its width and its parts."""

from __future__ import annotations

from dataclasses import dataclass

ModuleKey = tuple[int, str, int | None]
"""(layer, module name such as "self_attn.q_proj", expert or None)."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of the model as it is computed: several checkpoint modules may be merged into it.

    `parts` are (module name, out_features) in the order in which their outputs are concatenated, say
    (("self_attn.q_proj", 2048), ("self_attn.k_proj", 512), ("self_attn.v_proj", 512)).
    """

    layer: int
    in_features: int
    parts: tuple[tuple[str, int], ...]
    expert: int | None = None

    @property
    def out_features(self) -> int:
        return sum(width for _, width in self.parts)

    @property
    def keys(self) -> tuple[ModuleKey, ...]:
        """Module keys of the parts, in order."""
        return tuple((self.layer, name, self.expert) for name, _ in self.parts)
