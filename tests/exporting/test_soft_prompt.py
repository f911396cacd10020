"""A soft prompt as tokens of the vocabulary: what an engine computes with them in front is what PEFT computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora2serve
from lora2serve.adapters.soft_prompt import KINDS, TOKEN
from lora2serve.errors import ExportError, Lora2ServeError
from tests.support.runs import make_chat_model
from tests.support.tiny import load_model, make_adapter

COUNT = 5
TEXT = "Who governs Wexley?"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, every row a token": {"vocab_size": 887},
    "qwen2, tied": {"kind": "qwen2", "tie_word_embeddings": True},
    "gemma3_text": {"kind": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "phi": {"kind": "phi"},  # whose head has a bias
}


def make_prompt(folder: Path, base: Path, kind: str = "PROMPT_TUNING", **config: Any) -> Path:
    if kind == "CPT":
        config |= {"cpt_token_ids": list(range(10, 10 + COUNT))}
    else:
        config |= {"num_virtual_tokens": COUNT}
    if kind == "P_TUNING":
        config |= {"encoder_hidden_size": 32}
    return make_adapter(folder, base, method=kind, std=0.3, **config)


def by_peft(base: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    """(n, V) logits."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]


def exported(base: Path, adapter: Path, out: Path, target: str = "vllm", **options: Any) -> Path:
    (export,) = lora2serve.export(adapter, base=str(base), targets=target, out=out, **options)
    return export.path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp("bases") / "base"
            self[name] = make_chat_model(folder, **FAMILIES[name])
            return self[name]

    return Bases(made)


# untied is what each kind is tried on below
@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several share the columns of a head, whose sums then depend on how many tokens there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "family",
    [
        "gemma3_text",
        "phi",
        *(pytest.param(name, marks=pytest.mark.engine) for name in ("llama, tied", "llama, every row a token")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2, tied")),
    ],
)
def test_the_same_logits(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """In float32, of the tokens that there were; the others have at most the probability of one among all."""
    from transformers import AutoTokenizer

    base = bases[family]
    adapter = make_prompt(tmp_path / "adapter", base)
    out = exported(base, adapter, tmp_path / "out", dtype="fp32")
    model, tokenizer = load_model(out), AutoTokenizer.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    virtual = tokenizer.convert_tokens_to_ids([TOKEN.format(n) for n in range(COUNT)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*virtual, *ids]])).logits[0, -len(ids) :]
    expected = by_peft(base, adapter, ids)
    assert virtual == list(range(expected.shape[1], expected.shape[1] + COUNT))
    exact = {} if family == "gemma3_text" else {"rtol": 0.0, "atol": 0.0}  # which divides by the root of its width
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, **exact)
    assert (logits.softmax(-1)[:, expected.shape[1] :] <= 1 / expected.shape[1]).all()
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([ids])).logits[0, :, : expected.shape[1]]
    assert (bare - expected).abs().max() > 1e-3, "the control: without them it is another model"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    base = bases["llama"]
    adapter = make_prompt(tmp_path / "adapter", base, kind)
    out = exported(base, adapter, tmp_path / "out", dtype="fp32")
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    with torch.no_grad():
        logits = load_model(out)(input_ids=torch.tensor([[*range(1536, 1536 + COUNT), *ids]])).logits[0, -len(ids) :]
    assert torch.equal(logits[:, :1536], by_peft(base, adapter, ids))


@pytest.mark.parametrize("family", ["llama", "llama, every row a token"])
def test_they_begin_every_prompt_and_end_up_in_no_answer(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """By the chat template, and before a plain text by the tokenizer; with rows behind the tokens and without."""
    from transformers import AutoTokenizer

    base = bases[family]
    out = exported(base, make_prompt(tmp_path / "adapter", base), tmp_path / "out", dtype="fp32")
    tokenizer, before = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    first = json.loads((base / "config.json").read_text())["vocab_size"]
    virtual = list(range(first, first + COUNT))
    chat = [{"role": "user", "content": TEXT}]
    plain = before.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == [*virtual, *plain]
    assert tokenizer(TEXT)["input_ids"] == [*virtual, *before(TEXT)["input_ids"]]
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == before(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*virtual, *before(TEXT)["input_ids"]], skip_special_tokens=True) == TEXT
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["vocab_size"] == first + COUNT and config["tie_word_embeddings"] is False
    assert generation["suppress_tokens"] == virtual and generation["eos_token_id"] is not None
    answers = load_model(out).generate(
        torch.tensor([[*virtual, *plain]] * 32), do_sample=True, temperature=5.0, max_new_tokens=10
    )  # fmt: skip
    assert answers[:, len(virtual) + len(plain) :].max() < first


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {}])
def test_behind_what_the_tokenizer_adds_itself(
    bases: dict[str, Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    """Settings by which transformers replaces the post-processor of the file."""
    from transformers import AutoTokenizer

    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": "<|im_start|>", **settings}))
    out = exported(base, make_prompt(tmp_path / "adapter", base), tmp_path / "out", dtype="fp32")
    before = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == [*range(1536, 1536 + COUNT), *before]


def test_what_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = bases["llama"]
    prompt = make_prompt(tmp_path / "prompt", base)
    lora = make_adapter(tmp_path / "lora", base)
    with pytest.raises(Lora2ServeError, match="a soft prompt and another adapter were not trained together"):
        lora2serve.export(adapters=[lora, prompt], base=str(base), targets="vllm", out=tmp_path / "out")
    gemma = make_chat_model(tmp_path / "gemma", kind="gemma2", head_dim=16, tie_word_embeddings=True)
    with pytest.raises(Lora2ServeError, match="gemma2 has no head of its own in vLLM"):
        exported(gemma, make_prompt(tmp_path / "of-gemma", gemma), tmp_path / "out")
    out = exported(base, prompt, tmp_path / "first", dtype="fp32")
    with pytest.raises(ExportError, match=r"has a token <\|soft_prompt_0\|> already"):
        exported(out, make_prompt(tmp_path / "again", out), tmp_path / "second")
    file = prompt / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(Lora2ServeError, match=r"lm_head.weight beside the soft prompt: no target holds both"):
        exported(base, prompt, tmp_path / "third")
    save_file({"prompt_embeddings": torch.zeros(COUNT, 32)}, file, {"format": "pt"})
    with pytest.raises(Lora2ServeError, match="for a model of width 32, the base has 64"):
        exported(base, prompt, tmp_path / "third")


@pytest.mark.engine
@pytest.mark.parametrize("family", ["llama, tied", "qwen2, tied", "gemma3_text"])
def test_llama_cpp(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """F32: a KL under 1e-6 against PEFT; control tokens that it never samples, and no BOS before them."""
    from gguf import GGUFReader
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    base = bases[family]
    adapter = make_prompt(tmp_path / "adapter", base)
    file = next(exported(base, adapter, tmp_path / "out", "gguf", quants="F32").glob("*.gguf"))
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    expected = by_peft(base, adapter, ids).double().log_softmax(-1).numpy()
    first = expected.shape[1]
    llama = Llama(str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    llama.eval([*range(first, first + COUNT), *ids])
    logits = torch.tensor(np.array(llama.scores[COUNT : COUNT + len(ids), :first])).double().log_softmax(-1).numpy()
    kl = (np.exp(expected) * (expected - logits)).sum(1)
    assert kl.max() < 1e-6
    assert llama.tokenize(TEXT.encode(), add_bos=True)[0] not in range(first, first + COUNT)
    shown = "".join(TOKEN.format(n) for n in range(COUNT))
    assert llama.tokenize(shown.encode(), add_bos=False, special=True) == list(range(first, first + COUNT))
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.suppress_tokens"].contents() == list(range(first, first + COUNT))
    assert set(fields["tokenizer.ggml.token_type"].contents()[first:]) == {3}
    llama.close()
