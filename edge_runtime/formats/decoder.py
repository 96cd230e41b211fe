"""The shape of a decoder, as manifest, exporters and backends agree on it.

Tensors are named as in Hugging Face Llama-type checkpoints everywhere
(``model.layers.3.self_attn.q_proj.weight``). Biases, query/key norms and an untied head are
present when their tensors are, so the spec has no flags for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Sizes of a decoder-only transformer of the Llama, Qwen2, Qwen3 or Mistral type.

    Attributes:
        context_tokens: Longest sequence that the exported files hold, in tokens.
        inv_freq: Rotary inverse frequencies, ``head_dim / 2`` numbers, scaling (YaRN, llama3) applied.
        rope_attention_factor: What rotary cosine and sine are multiplied by (YaRN; otherwise 1).
        tied_embeddings: The head reads the embedding's codes; they are stored once.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_tokens: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]
    tied_embeddings: bool
    rope_attention_factor: float = 1.0

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of one of PROJECTIONS."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (heads, self.hidden_size),
            "k_proj": (kv_heads, self.hidden_size),
            "v_proj": (kv_heads, self.hidden_size),
            "o_proj": (self.hidden_size, heads),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[projection]

    def module_names(self, projections: tuple[str, ...] = PROJECTIONS) -> Iterator[tuple[str, str]]:
        """(full module name, projection) for every layer, in the graph's order."""
        for layer in range(self.num_layers):
            for projection in projections:
                yield module_name(layer, projection), projection

    def to_dict(self) -> dict[str, object]:
        """Plain values, as the manifest holds them."""
        return asdict(self) | {"inv_freq": list(self.inv_freq)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> DecoderSpec:
        """Inverse of ``to_dict``.

        Raises:
            ValueError: A key is missing or unknown, or a size is not a positive number.
        """
        known = {field.name: field.type for field in fields(cls)}
        if set(values) != set(known):
            raise ValueError(f"decoder keys differ: {sorted(set(values) ^ set(known))}")
        loaded: dict[str, object] = {}
        for name, value in values.items():
            if known[name] == "int" and not (type(value) is int and 0 < value < 2**31):
                raise ValueError(f"decoder.{name} must be a positive integer, got {value!r}")
            if known[name] == "float" and not _is_positive(value):
                raise ValueError(f"decoder.{name} must be a positive number, got {value!r}")
            if known[name] == "bool" and type(value) is not bool:
                raise ValueError(f"decoder.{name} must be true or false, got {value!r}")
            loaded[name] = value
        inv_freq = values["inv_freq"]
        if not isinstance(inv_freq, list) or len(inv_freq) * 2 != values["head_dim"]:
            raise ValueError("decoder.inv_freq must hold head_dim / 2 numbers")
        if not all(map(_is_positive, inv_freq)):
            raise ValueError("decoder.inv_freq must hold positive numbers")
        loaded["inv_freq"] = tuple(float(value) for value in inv_freq)
        return cls(**loaded)  # type: ignore[arg-type]


def module_name(layer: int, projection: str) -> str:
    """``(3, "q_proj")`` -> ``model.layers.3.self_attn.q_proj``."""
    block = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
