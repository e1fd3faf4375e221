"""Sizes and budgets of a training run: the full one (a GPU, minutes) and a tiny one (a CPU, a minute)."""

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

#: LoRA on all seven linears of a block.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Share of every (domain, kind) in the base model's training windows. Mostly Python and English; a taste of the rest.
BASE_MIXTURE = {
    "python.text": 0.70,
    "english.text": 0.16,
    "python.chat": 0.09,
    "sql.text": 0.004,
    "javascript.text": 0.012,
    "docs.text": 0.006,
    "css.text": 0.006,
    "sql.chat": 0.002,
    "javascript.chat": 0.002,
    "docs.chat": 0.002,
    "css.chat": 0.002,
}


@dataclass(frozen=True)
class Budget:
    """When a training stage ends: after `steps` or `seconds`, whichever comes first; the learning rate follows."""

    steps: int
    seconds: float
    rows: int
    learning_rate: float
    warmup: int = 20


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter: its domain is its name. `companion_rank` is the rank of its LoRA for the draft model."""

    name: str
    rank: int
    companion_rank: int
    rslora: bool = False
    bundled_as: str = "adapters"  # or "more": loaded while the demo server runs


ADAPTERS = (
    AdapterPlan("sql", rank=8, companion_rank=8),
    AdapterPlan("javascript", rank=16, companion_rank=8, rslora=True),
    AdapterPlan("docs", rank=12, companion_rank=8),
    AdapterPlan("css", rank=8, companion_rank=4, bundled_as="more"),
)


@dataclass(frozen=True)
class Settings:
    """Everything that tells the full run from the tiny one."""

    window: int = 1024
    vocab_size: int = 4096
    target: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 704,
        }
    )
    # Candidates, cheapest first: the first whose acceptance reaches `wanted_acceptance` is kept, else the last.
    drafts: tuple[dict[str, int], ...] = (
        {
            "hidden_size": 160,
            "num_hidden_layers": 1,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "intermediate_size": 576,
        },
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 448,
        },
    )
    wanted_acceptance: float = 0.70
    pretrain: Budget = Budget(6_000, 185, 64, 2.5e-3, warmup=150)
    draft: Budget = Budget(6_000, 85, 128, 4e-3, warmup=80)
    adapter: Budget = Budget(400, 14, 32, 2e-3)
    companion: Budget = Budget(800, 12, 64, 4e-3)
    generation_rows: int = 6144  # rows of one batch of text written by the target
    base_batches: int = 4
    adapter_batches: int = 2
    generated_tokens: int = 192
    held_out_windows: int = 48
    prompts: int = 64  # per domain, for the acceptance
    new_tokens: int = 160


def tiny(settings: Settings) -> Settings:
    """Return the same stages at a size that a CPU finishes in about a minute."""
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
    return replace(
        settings,
        window=128,
        vocab_size=512,
        target=small | {"num_hidden_layers": 2},
        drafts=(small | {"num_hidden_layers": 1},),
        pretrain=Budget(30, 15, 8, 3e-3, warmup=5),
        draft=Budget(10, 5, 8, 3e-3, warmup=2),
        adapter=Budget(6, 4, 4, 2e-3, warmup=1),
        companion=Budget(6, 4, 4, 2e-3, warmup=1),
        generation_rows=8,
        base_batches=2,
        adapter_batches=1,
        generated_tokens=32,
        held_out_windows=2,
        prompts=4,
        new_tokens=16,
    )


def llama(sizes: dict[str, int], settings: Settings, ids: dict[str, int]) -> LlamaConfig:
    """Return the configuration of a tied-embedding Llama; `ids` has pad, bos, eos and end."""
    return LlamaConfig(
        **({"head_dim": 32} | sizes),
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.window,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        bos_token_id=ids["bos"],
        eos_token_id=[ids["eos"], ids["end"]],
        pad_token_id=ids["pad"],
    )
