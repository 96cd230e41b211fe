"""One peer's quantizer on one checkpoint, in the peer's own environment: called by quantization_peers.py.

    python benchmarks/peer_quantizers.py PEER MODEL TOKENS.npy OUT.safetensors

Writes what the peer's 4-bit weights mean as float32, by the checkpoint's names, and the bits that it stores for each of
them (codes, scales, zero points). Needs torch, transformers and the peer alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

GROUP = 32
Found = dict[str, tuple[Any, float]]  # by name: the dequantized weight, and stored bits


def torchao_rtn(model: Any, tokens: Any) -> Found:
    """Symmetric int4 with bf16-sized scales, as IntxWeightOnlyConfig chooses them."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model.model.layers, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))
    return {
        f"{name}.weight": (layer.weight.dequantize(), _bits(layer.weight, 4 + 16 / GROUP))
        for name, layer in _projections(model)
    }


def auto_round(model: Any, tokens: Any, *, iters: int, samples: int = 128) -> Found:
    """Symmetric int4; without iterations its (searched) rounding to nearest, with them tuned on training text."""
    import torch
    from auto_round import AutoRound

    loader = torch.utils.data.DataLoader(
        [{"input_ids": torch.from_numpy(row.astype(np.int64))} for row in tokens[:samples]], batch_size=8
    )
    rounder = AutoRound(
        model, tokenizer=_NoTokenizer(), bits=4, group_size=GROUP, sym=True, iters=iters, dataset=loader, batch_size=8,
        nsamples=min(samples, len(tokens)), seqlen=tokens.shape[1], device_map="cpu", enable_torch_compile=False,
        disable_opt_rtn=False,
    )  # fmt: skip
    quantized, _ = rounder.quantize()
    return {
        f"{name}.weight": (layer.weight.float(), _bits(layer.weight, 4 + 16 / GROUP))
        for name, layer in _projections(quantized)
    }


def hqq_search(model: Any, tokens: Any, *, group: int) -> Found:
    """Float zero points beside the scales: 5 bits a weight in groups of 32, 4.5 in groups of 64."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
    found = {}
    for name, layer in _projections(model):
        quantized = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        found[f"{name}.weight"] = (quantized.dequantize(), _bits(layer.weight, 4 + 32 / group))
    return found


def onnxruntime_nbits(model: Any, tokens: Any, *, algorithm: str) -> Found:
    """MatMulNBitsQuantizer on a graph of one MatMul a weight; the quantized graph says what its codes mean."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    weights = {f"{name}.weight": layer.weight.detach().numpy() for name, layer in _projections(model)}
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"x.{name}", name], [f"y.{name}"], name=name) for name in weights],
        "weights",
        [value(f"x.{name}", shape=["rows", weight.shape[1]]) for name, weight in weights.items()],
        [value(f"y.{name}", shape=["rows", weight.shape[0]]) for name, weight in weights.items()],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), name) for name, weight in weights.items()],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    configs: dict[str, Callable[[], Any]] = {
        "default": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=True),
        "asymmetric": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False),
        "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=GROUP),
        "rtn": nbits.RTNWeightOnlyQuantConfig,
        "k_quant": nbits.KQuantWeightOnlyQuantConfig,
        "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(_inputs(model, tokens[:32])),
    }
    quantizer = nbits.MatMulNBitsQuantizer(
        source, block_size=GROUP, is_symmetric=algorithm != "asymmetric", algo_config=configs[algorithm]()
    )
    quantizer.process()
    target = quantizer.model.model
    sizes = {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in target.graph.initializer}
    bits = {node.output[0]: 8.0 * sum(sizes[name] for name in node.input[1:] if name) for node in target.graph.node}
    session = onnxruntime.InferenceSession(target.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {f"x.{name}": np.eye(weight.shape[1], dtype=np.float32) for name, weight in weights.items()}
    assert {node.op_type for node in onnx.load_from_string(target.SerializeToString()).graph.node} == {"MatMulNBits"}
    outputs = [f"y.{name}" for name in weights]
    found = dict(zip(weights, session.run(outputs, inputs), strict=True))
    return {name: (np.ascontiguousarray(values.T), bits[f"y.{name}"]) for name, values in found.items()}


def llama_cpp(model: Any, tokens: Any, *, kind: str, imatrix: bool, pure: bool, binary: str) -> Found:
    """llama-quantize on the same matrices; every type that it falls back to is counted as it is stored."""
    import subprocess

    import gguf
    from gguf.constants import GGML_QUANT_SIZES

    with tempfile.TemporaryDirectory() as folder:
        source, target, statistics = (f"{folder}/{name}.gguf" for name in ("source", "target", "imatrix"))
        names = _write_gguf(model, source)
        options = ["--pure", "--token-embedding-type", kind] if pure else []
        if imatrix:
            _write_imatrix(model, tokens, statistics)
            options += ["--imatrix", statistics]
        subprocess.run([binary, *options, source, target, kind, "1"], check=True, capture_output=True)
        found = {}
        for tensor in gguf.GGUFReader(target).tensors:
            if tensor.name in names:
                block, size = GGML_QUANT_SIZES[tensor.tensor_type]
                bits = 8.0 * size / block * float(np.prod(tensor.shape))
                found[names[tensor.name]] = (gguf.dequantize(tensor.data, tensor.tensor_type).copy(), bits)
    return found


PEERS: dict[str, Callable[..., Found]] = {
    "torchao-rtn": torchao_rtn,
    "auto-round-rtn": partial(auto_round, iters=0),
    "auto-round-tuned": partial(auto_round, iters=200),
    "hqq-g64": partial(hqq_search, group=64),
    "hqq-g32": partial(hqq_search, group=32),
    **{f"onnxruntime-{a}": partial(onnxruntime_nbits, algorithm=a)
       for a in ("default", "asymmetric", "rtn", "hqq", "k_quant", "gptq")},
    **{f"llama.cpp-{kind}{'-pure' * pure}{'-imatrix' * imatrix}":
       partial(llama_cpp, kind=kind, imatrix=imatrix, pure=pure)
       for kind in ("q4_0", "q4_k_s") for pure in (True, False) for imatrix in (False, True)
       if not (pure and kind == "q4_k_s")},
}  # fmt: skip


def main() -> int:
    """Run one peer; without arguments say what this file is for."""
    if len(sys.argv) < 5:
        print("called by benchmarks/quantization_peers.py; peers:", ", ".join(PEERS))
        return 0
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    peer, model_dir, tokens, out, *more = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    options = {"binary": more[0]} if peer.startswith("llama.cpp") else {}
    found = PEERS[peer](model, np.load(tokens), **options)
    floats = {name: torch.as_tensor(value).detach().float() for name, (value, _) in found.items()}
    weights = {name: np.ascontiguousarray(value.numpy()) for name, value in floats.items()}
    save_file(weights, out, metadata={"bits": json.dumps({name: bits for name, (_, bits) in found.items()})})
    return 0


class _NoTokenizer:
    """Calibration text comes as ids."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        pass


def _projections(model: Any) -> list[tuple[str, Any]]:
    """(name, module) of every projection of the layers; most peers leave embedding and head alone."""
    return [(name, module) for name, module in model.named_modules() if ".layers." in name and name.endswith("_proj")]


def _states(model: Any, tokens: Any) -> list[tuple[str, Any]]:
    """(name, inputs (T, K)) of every projection."""
    import torch

    found: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.append((name, given[0].flatten(0, 1).numpy()))
        )
        for name, module in _projections(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _inputs(model: Any, tokens: Any) -> list[dict[str, Any]]:
    """What each projection reads while the fp model runs over text, as ONNX Runtime's GPTQ asks for it."""
    return [{f"x.{name}.weight": states for name, states in _states(model, row[None])} for row in tokens]


def _bits(weight: Any, each: float) -> float:
    return float(each * weight.numel())


_GGUF_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    parts = name.split(".")
    return f"blk.{parts[2]}.{_GGUF_NAMES[parts[-1]]}.weight"


def _write_gguf(model: Any, path: str) -> dict[str, str]:
    """A float32 GGUF that llama-quantize reads (rows of q and k as they are: they change no row's codes)."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = {_gguf_name(name): f"{name}.weight" for name, _ in _projections(model)}
    names |= {"token_embd.weight": "model.embed_tokens.weight"}
    if not config.tie_word_embeddings:
        names |= {"output.weight": "lm_head.weight"}
    for stored, name in names.items():
        writer.add_tensor(stored, model.get_parameter(name).detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for n, layer in enumerate(model.model.layers):
        writer.add_tensor(f"blk.{n}.attn_norm.weight", layer.input_layernorm.weight.detach().numpy())
        writer.add_tensor(f"blk.{n}.ffn_norm.weight", layer.post_attention_layernorm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


def _write_imatrix(model: Any, tokens: Any, path: str) -> None:
    """Mean squares of every projection's inputs, as llama-imatrix sums them."""
    import gguf

    sums: dict[str, Any] = {}
    for row in tokens:
        for name, states in _states(model, row[None]):
            sums[name] = sums.get(name, 0) + (states.astype(np.float64) ** 2).sum(axis=0)
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data = [{}]  # an importance matrix has no architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["training text"])
    writer.add_uint32("imatrix.chunk_count", len(tokens))
    writer.add_uint32("imatrix.chunk_size", tokens.shape[1])
    for name, total in sums.items():
        writer.add_tensor(f"{_gguf_name(name)}.in_sum2", total.astype(np.float32)[None])
        writer.add_tensor(f"{_gguf_name(name)}.counts", np.full((1, 1), tokens.size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
