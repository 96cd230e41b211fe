"""Small models of every architecture, a tokenizer and checkpoints on disk: nothing comes from a hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline import tracking
from pipeline.config import load_configs
from pipeline.data.packing import train_tokenizer
from pipeline.settings import Config

MakeModel = Callable[..., PreTrainedModel]
VOCABULARY = 320
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
TEXTS = [f"def function_{n}(x, y):\n    return x + {n} * y  # the {n}th of many words\n" for n in range(60)]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model("qwen2", num_hidden_layers=2)``: random weights, vectors too, so that none is trivially right."""

    def make(architecture: str = "llama", **sizes: Any) -> PreTrainedModel:
        config_class, model_class = CLASSES[architecture]
        torch.manual_seed(3)
        model = model_class(config_class(**(SIZES | sizes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.2 if parameter.ndim < 2 else 0.1
                parameter.copy_(torch.randn_like(parameter) * spread + (1.0 if parameter.ndim < 2 else 0.0))
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, VOCABULARY)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Tokenizer) -> Path:
    """A Llama checkpoint in two shards with a tokenizer; read only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("llama").save_pretrained(folder, max_shard_size="200KB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ci_configs() -> dict[str, Config]:
    """The smallest experiment, one configuration a submodel."""
    return load_configs(["experiment=ci"])


@pytest.fixture
def restored_torch() -> Iterator[None]:
    """What a stage sets for its process is undone."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's schema migrations take seconds; every test starts from a copy."""
    store = tmp_path_factory.mktemp("store")
    with tracking.open_client(store) as client:
        client.search_experiments()
    return store / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Path:
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def client(store: Path) -> Iterator[Any]:
    with tracking.open_client(store) as client:
        yield client
