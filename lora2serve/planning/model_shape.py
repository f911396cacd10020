"""A model as a plan sees it: its linear layers and what else it holds, from config.json and its tensors' shapes.

No weight is read, and nothing heavy imported. What transformers would make of it is known to ``--exact`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lora2serve.errors import CheckpointError
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import FLOATS, TensorSpec

IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|decoder_layers)\.(\d+)\.")
EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
ONE_EXPERT = re.compile(r"(?P<owner>.*experts)\.(?P<number>\d+)\.(?P<part>\w+)")
EXPERTS_TRANSPOSED = ("gpt_oss", "aria_text", "llama4_text")
ONE_WAY = "llama4_text"  # whose experts transformers computes in one way only: they stay in 16 bits
ROUTERS = (".gate", ".router", ".router.layer")  # of experts: no linear layers in transformers
TRANSPOSED = ("gpt2", "openai-gpt")  # their weights are stored as (in, out)
HEADS = ("lm_head", "embed_out", "output")
DOWN = ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out")  # from the width of an MLP back to the model's
LIKE_LLAMA = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "granite", "olmo",
    "olmo2", "smollm3",
)  # fmt: skip
EXACT = "--exact asks transformers for the model itself"


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a numbered layer of the model."""

    path: str
    outputs: int
    inputs: int
    layer: int

    @property
    def numel(self) -> int:
        """Values of its weight."""
        return self.outputs * self.inputs

    @property
    def in_attention(self) -> bool:
        """Whether its name says so."""
        return "attn" in self.path or "attention" in self.path


@dataclass(frozen=True)
class ExpertShape:
    """All experts of a layer in one tensor, as transformers has them; each is quantized by itself."""

    path: str
    count: int
    outputs: int
    inputs: int
    quantizable: bool = True

    @property
    def numel(self) -> int:
        """Values of all experts."""
        return self.count * self.outputs * self.inputs


@dataclass(frozen=True)
class ModelShape:
    """All that the memory of a training depends on."""

    hidden: int
    layers: int
    vocabulary: int
    heads: int
    query: int  # outputs of all heads of queries
    key: int  # outputs of all heads of keys; as many of values
    mlp: int  # width between up and down, of all experts that one token goes through
    linears: tuple[LinearShape, ...]
    experts: tuple[ExpertShape, ...]
    others: int  # values of all other parameters, which are never quantized: embeddings, head, norms, biases
    norm_width: int  # values of a token that go through the norms of one layer
    embedding: int  # values of the input embeddings
    head: int  # values of a head of its own; 0 where it is tied to the embeddings
    stored_bytes: int | None = None  # of all weights as they lie, where they are quantized already
    fused_mlp: bool = False  # gate and up are one layer
    gated: bool = True  # whether the MLP has a gate

    @property
    def parameters(self) -> int:
        """Values in all."""
        return sum(each.numel for each in self.matrices) + self.others

    @property
    def matrices(self) -> Sequence[LinearShape | ExpertShape]:
        """What QLoRA quantizes, where it can."""
        return [*self.linears, *self.experts]


def model_shape(config: JsonObject, specs: Sequence[TensorSpec] | None) -> ModelShape:
    """The shape of a causal language model.

    specs: the stored tensors; None where only ``config.json`` is known.
    Raises CheckpointError where config.json does not say enough.
    """
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, Mapping) else config
    quantized = isinstance(config.get("quantization_config"), Mapping)
    stored = sum(spec.nbytes for spec in specs) if specs and quantized else None
    shapes = {spec.name: spec.shape for spec in specs or () if spec.dtype in FLOATS}
    if quantized or not specs:
        shapes = dict(_shapes_of_config(text))
    linears, others = _sorted_out(shapes, str(text.get("model_type")), _tied(config, text, shapes))
    if not linears:
        raise CheckpointError("no linear layers in numbered layers: the memory of this model is not known", EXACT)
    return _shape(text, linears, others, stored)


def _shape(
    text: JsonObject, linears: tuple[LinearShape, ...], others: Mapping[str, tuple[int, ...]], stored: int | None
) -> ModelShape:
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", default=max(1, hidden // 64))
    size = _number(text, "head_dim", default=hidden // heads)
    groups = _number(text, "num_key_value_heads", default=heads)
    vocabulary = _number(text, "vocab_size")
    embeddings = {name: prod(shape) for name, shape in others.items() if len(shape) == 2 and vocabulary in shape}
    head = sum(count for name, count in embeddings.items() if name.removesuffix(".weight").endswith(HEADS))
    experts = _experts(others, str(text.get("model_type")))
    others = {name: shape for name, shape in others.items() if not _of_expert(name, shape)}
    leaves = {linear.path.rsplit(".", 1)[-1] for linear in linears}
    return ModelShape(
        hidden=hidden,
        layers=1 + max(linear.layer for linear in linears),
        vocabulary=vocabulary,
        heads=heads,
        query=heads * size,
        key=groups * size,
        mlp=_mlp_width(text, linears),
        linears=linears,
        others=sum(map(prod, others.values())),
        experts=experts,
        norm_width=_norm_width(others, size, heads * size, groups * size, hidden),
        embedding=sum(embeddings.values()) - head,
        head=head,
        stored_bytes=stored,
        fused_mlp="gate_up_proj" in leaves,
        gated=bool({"gate_proj", "gate_up_proj", "w1"} & leaves) or bool(experts),
    )


def _norm_width(others: Mapping[str, tuple[int, ...]], head: int, query: int, key: int, hidden: int) -> int:
    """Of the first numbered layer; a norm of one head's width is for all heads."""
    names = [name for name in others if name.endswith("weight") and ("norm" in name or ".ln_" in name)]
    layers = [(match[1], name) for name in names if (match := IN_LAYER.search(name))]
    width = 0
    for number, name in layers:
        size = prod(others[name])
        if number == layers[0][0]:
            width += (key if "k_norm" in name else query) if size == head else size
    return width or 2 * hidden


def _mlp_width(text: JsonObject, linears: Sequence[LinearShape]) -> int:
    """What one token goes through: the widest MLP of the model, or its share of the experts."""
    down = [linear.inputs for linear in linears if linear.path.rsplit(".", 1)[-1] in DOWN and not linear.in_attention]
    active = _number(text, "num_experts_per_tok", "num_experts_per_token", default=0)
    width = _number(text, "moe_intermediate_size", "intermediate_size", default=0)
    return max([*down, 0]) + (active * width if active else 0)


def _sorted_out(
    shapes: Mapping[str, tuple[int, ...]], kind: str, tied: bool
) -> tuple[tuple[LinearShape, ...], dict[str, tuple[int, ...]]]:
    """The linear layers that bitsandbytes quantizes, and all other parameters by name."""
    linears, others = [], {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        layer = IN_LAYER.search(name)
        if tied and path.endswith("lm_head"):
            continue  # the embeddings once more
        plain = len(shape) == 2 and name.endswith(".weight") and layer is not None
        if plain and layer and not EXPERTS.search(path) and not path.endswith(ROUTERS) and "norm" not in path:
            outputs, inputs = reversed(shape) if kind in TRANSPOSED else shape
            linears.append(LinearShape(path, outputs, inputs, int(layer[1])))
        else:
            others[name] = shape
    return tuple(linears), others


def _of_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a weight of an expert, or of all of a layer."""
    axes = 2 if ONE_EXPERT.fullmatch(name.removesuffix(".weight")) else 3
    return bool(EXPERTS.search(name)) and len(shape) == axes and not name.endswith("bias")


def _experts(others: Mapping[str, tuple[int, ...]], kind: str) -> tuple[ExpertShape, ...]:
    """Those of each layer put together as transformers does it: gate and up in one, down in another."""
    fused: dict[str, list[int]] = {}
    for name, shape in others.items():
        if not _of_expert(name, shape):
            continue
        one = ONE_EXPERT.fullmatch(name.removesuffix(".weight"))
        if one is None:  # (experts, out, in), or with the last two the other way round
            fused[name] = [shape[0], *(reversed(shape[1:]) if kind in EXPERTS_TRANSPOSED else shape[1:])]
            continue
        is_down = one["part"] in DOWN
        known = fused.setdefault(f"{one['owner']}.{'down_proj' if is_down else 'gate_up_proj'}", [0, 0, shape[1]])
        known[0] = max(known[0], int(one["number"]) + 1)
        if int(one["number"]) == 0:
            known[1] += shape[0]
    return tuple(ExpertShape(name, sizes[0], sizes[1], sizes[2], kind != ONE_WAY) for name, sizes in fused.items())


def _tied(config: JsonObject, text: JsonObject, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the head is the input embeddings: without a word in config.json, where no head is stored."""
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return bool(tied) if tied is not None else not any(name.startswith("lm_head") for name in shapes)


def _number(config: JsonObject, *keys: str, default: int | None = None) -> int:
    """The first of these keys that holds a number; CheckpointError without one and a default."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if default is None:
        raise CheckpointError(f"config.json: no {keys[0]}, expected a whole number", EXACT)
    return default


def _shapes_of_config(text: JsonObject) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a decoder that is built like Llama, by the names that transformers gives them."""
    kind = str(text.get("model_type"))
    if kind not in LIKE_LLAMA:
        raise CheckpointError(f"config.json: a model of type {kind!r} without the headers of its weights", EXACT)
    hidden, vocabulary = _number(text, "hidden_size"), _number(text, "vocab_size")
    heads, mlp = _number(text, "num_attention_heads"), _number(text, "intermediate_size")
    size = _number(text, "head_dim", default=hidden // heads)
    query, key = heads * size, _number(text, "num_key_value_heads", default=heads) * size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(_number(text, "num_hidden_layers")):
        home = f"model.layers.{layer}"
        if kind.startswith("phi3"):
            yield f"{home}.self_attn.qkv_proj.weight", (query + 2 * key, hidden)
            yield f"{home}.mlp.gate_up_proj.weight", (2 * mlp, hidden)
        else:
            yield f"{home}.self_attn.q_proj.weight", (query, hidden)
            yield f"{home}.self_attn.k_proj.weight", (key, hidden)
            yield f"{home}.self_attn.v_proj.weight", (key, hidden)
            yield f"{home}.mlp.gate_proj.weight", (mlp, hidden)
            yield f"{home}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{home}.self_attn.o_proj.weight", (hidden, query)
        yield f"{home}.mlp.down_proj.weight", (hidden, mlp)
        yield f"{home}.input_layernorm.weight", (hidden,)
        yield f"{home}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not text.get("tie_word_embeddings", kind.startswith("gemma")):
        yield "lm_head.weight", (vocabulary, hidden)
