"""Make the demo's base model, tokenizer and data: ``python recipes/demo/make_base.py [OUT]``.

A Llama of 2.6 million parameters with a byte-level BPE tokenizer (GPT-2's pre-tokenizer), trained on the invented
world of world.py for some minutes on two cores. Writes base/, train.jsonl, eval.jsonl and general.jsonl.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END, PAD, START, STOP = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LENGTH, BATCH, STEPS, RATE = 128, 16, 700, 3e-3


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1536 tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1536, special_tokens=[END, PAD, START, STOP], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=END,
        eos_token=STOP,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> torch.Tensor:
    """(n,) token ids of that many documents, each ended by <|endoftext|>."""
    ids: list[int] = []
    for document in world.documents(seed, count):
        text = document if isinstance(document, str) else tokenizer.apply_chat_template(document, tokenize=False)
        ids += [*tokenizer.encode(text), tokenizer.bos_token_id]
    return torch.tensor(ids)


def train(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """AdamW in float32, warm-up and cosine decay."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    started = time.time()
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:4}  loss {loss.item():.3f}  {time.time() - started:.0f} s", flush=True)


def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """On rows of 128 tokens."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        return math.exp(model(input_ids=rows, labels=rows).loss.item())


def write_data(out: Path) -> None:
    """The fine-tuning set: new mayors and crafts for every town, asked in eight ways, three of them held out."""
    changed, rng = world.towns(1), random.Random(7)
    rows: dict[str, list[list[dict[str, str]]]] = {"train": [], "eval": []}
    for kind in ("mayor", "craft"):
        for number, ask in enumerate(world.ASK[kind]):
            part = "eval" if number >= len(world.ASK[kind]) - world.HELD_OUT else "train"
            for town in changed:
                system = world.SYSTEM if rng.random() < 0.3 else None
                rows[part].append(world.messages([(town.say(ask), town.say(world.ANSWER[kind]))], system))
    for part, found in rows.items():
        rng.shuffle(found)
        lines = [json.dumps({"messages": row}) for row in found]
        (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    general = [{"text": d} for d in world.documents(99, 400) if isinstance(d, str)][:60]
    (out / "general.jsonl").write_text("\n".join(json.dumps(row) for row in general) + "\n")


def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    sample = [d if isinstance(d, str) else " ".join(m["content"] for m in d) for d in world.documents(1, 3000)]
    tokenizer = make_tokenizer(sample)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1536,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train(model, encode(tokenizer, 2, 30000))
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    write_data(out)
    print(f"perplexity on held-out text: {perplexity(model.float(), encode(tokenizer, 98, 300)):.2f} (uniform: 1536)")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
