"""Train the built-in model: a 5.5 M parameter Llama that adds two numbers, chats a little and writes Python-like text.

Needs torch, transformers and tokenizers, two CPU cores and about 45 minutes; no network, no accelerator. Half of each
batch is text that every Python has (the source and the help texts of its standard library), half is generated chats,
most of them sums of two numbers from 0 to 99. One pair of numbers in ten is never shown in any phrasing, in either
order; the exam at the end asks for all of them. The seed is fixed, but the wall clock decides how many steps are made,
so two runs give similar models, not equal ones.

    python -m quire.worker.models.demo.train --out DIR --minutes 40    (or: python train.py --out DIR)
    python -m quire.worker.models.demo.train --out DIR --exam          (only the exam, on what is in DIR)
"""

import argparse
import ast
import copy
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, VOCAB = 20, 4096
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = f"{IM_START}user\n{{}}{IM_END}\n{IM_START}assistant\n"
# (rows, length) of the batches of successive steps: mostly short, some as long as the model's context.
SHAPES = [(16, 256), (16, 256), (8, 512), (16, 256), (16, 256), (8, 512), (16, 256), (2, 2048)]
Pair = tuple[int, int]  # the two numbers of a sum
Segment = tuple[str, bool]  # text, and whether the model is asked to produce it


def standard_library(rng: random.Random) -> tuple[list[str], list[str]]:
    """Documents for training and for validation: source files, their docstrings as prose, and the help topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.txt")]):
        parts = path.relative_to(root).parts
        if skipped & set(parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            prose = docstrings(text) if path.suffix == ".py" else ""
        except (UnicodeDecodeError, SyntaxError):
            continue
        documents = held_out if rng.random() < 0.02 else train
        documents += [document for document in (text, prose) if len(document) > 200]
    return train + list(topics.topics.values()), held_out


def docstrings(source: str) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) > 60)


def build_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, so that sums see the digits."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special, every_byte = [END_OF_TEXT, IM_START, IM_END], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=every_byte)
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT, eos_token=IM_END,
        chat_template=CHAT_TEMPLATE, model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Skills:
    """Draws chats and raw sums; `held_out` are the pairs it never shows."""

    def __init__(self, rng: random.Random, words: list[str]) -> None:
        self.rng, self.words, self.held_out = rng, words, held_out_pairs()
        self.phrases: dict[str, Any] = json.loads(Path(__file__).with_name("train_phrases.json").read_text())
        self.others: list[Callable[[], tuple[str, str]]] = [
            self.small_talk, self.small_talk, self.small_talk, self.difference, self.counting, self.repeating,
            self.day, self.capital, self.next_number, self.larger, self.unknown,
        ]  # fmt: skip

    def pair(self) -> Pair:
        """Two numbers that may be added in training; those of one digit come more often than chance has them."""
        while True:
            limits = (100, 100) if self.rng.random() < 0.8 else self.rng.choices((10, 20, 100), k=2)
            a, b = self.rng.randrange(limits[0]), self.rng.randrange(limits[1])
            if (min(a, b), max(a, b)) not in self.held_out:
                return a, b

    def sum(self) -> tuple[str, str]:
        a, b = self.pair()
        return self.rng.choice(self.phrases["sums"]).format(a=a, b=b), str(a + b)

    def difference(self) -> tuple[str, str]:
        a, b = self.pair()
        return self.rng.choice(self.phrases["differences"]).format(a=a + b, b=a), str(b)

    def small_talk(self) -> tuple[str, str]:
        talk = self.rng.choice(self.phrases["talk"])
        return self.rng.choice(talk["asked"]), talk["answer"]

    def counting(self) -> tuple[str, str]:
        first = self.rng.choice((1, 1, self.rng.randrange(90)))
        last = first + self.rng.randrange(2, 10)
        asked = [f"Count from {first} to {last}.", f"Count from {first} to {last}"]
        asked += [f"Count to {last}.", f"Count to {last}"] if first == 1 else []
        return self.rng.choice(asked), ", ".join(map(str, range(first, last + 1)))

    def repeating(self) -> tuple[str, str]:
        words = " ".join(self.rng.choices(self.words, k=self.rng.choice((1, 1, 2, 3))))
        return self.rng.choice(["Repeat: {}", "Say {}", "Repeat after me: {}", "Say {}."]).format(words), words

    def day(self) -> tuple[str, str]:
        day, (relation, step) = self.rng.randrange(7), self.rng.choice((("before", -1), ("after", 1)))
        asked = self.rng.choice(["Which day comes {} {}?", "What day is {} {}?", "What comes {} {}?"])
        return asked.format(relation, DAYS[day]), DAYS[(day + step) % 7]

    def capital(self) -> tuple[str, str]:
        country, city = self.rng.choice(list(self.phrases["capitals"].items()))
        return self.rng.choice(["What is the capital of {}?", "Capital of {}?"]).format(country), city

    def next_number(self) -> tuple[str, str]:
        number, (relation, step) = self.rng.randrange(1, 100), self.rng.choice((("before", -1), ("after", 1)))
        return f"What number comes {relation} {number}?", str(number + step)

    def larger(self) -> tuple[str, str]:
        a, b = self.rng.sample(range(100), 2)
        asked = self.rng.choice(["Which is larger, {} or {}?", "Which is bigger, {} or {}?"])
        return asked.format(a, b), str(max(a, b))

    def unknown(self) -> tuple[str, str]:
        word, other = self.rng.sample(self.words, 2)
        asked = ["What is {}?", "Who is {}?", "Tell me about {}.", "How do I {}?", "Why is {} {}?", "Explain {}."]
        return self.rng.choice(asked).format(word, other), "I do not know. I am a very small model: ask me for a sum!"

    def chat(self) -> list[tuple[str, str]]:
        """(role, content): one to four questions with answers, sums for the most part, sometimes after a system prompt."""
        chat = [("system", self.rng.choice(self.phrases["system"]))] if self.rng.random() < 0.3 else []
        for _ in range(self.rng.choice((1, 1, 1, 1, 1, 2, 3, 4))):
            asked, answer = self.sum() if self.rng.random() < 0.75 else self.rng.choice(self.others)()
            chat += [("user", asked), ("assistant", answer)]
        return chat

    def raw_sums(self) -> list[Segment]:
        asked, space = self.rng.choice((("{} + {} =", " "), ("{} + {} =", " "), ("{}+{}=", ""), (">>> {} + {}\n", "")))
        pairs = [self.pair() for _ in range(self.rng.randrange(1, 9))]
        return [s for a, b in pairs for s in ((asked.format(a, b), False), (f"{space}{a + b}\n", True))]

    def example(self) -> list[Segment]:
        if self.rng.random() < 0.3:
            return [*self.raw_sums(), (END_OF_TEXT, True)]
        segments: list[Segment] = []
        for role, content in self.chat():
            segments += [(f"{IM_START}{role}\n", False), (f"{content}{IM_END}", role == "assistant"), ("\n", False)]
        return [*segments, (END_OF_TEXT, False)]


def held_out_pairs() -> set[Pair]:
    """One unordered pair in ten: neither a + b nor b + a is shown in training."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    return set(random.Random(SEED).sample(pairs, len(pairs) // 10))


class Batches:
    """Token rows: the first half of a batch is text, the second half skills."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: np.ndarray, skills: Skills) -> None:
        self.tokenizer, self.text, self.skills, self.rng = tokenizer, text, skills, random.Random(SEED)

    def slice(self, length: int) -> list[int]:
        start = self.rng.randrange(len(self.text) - length)
        return list(map(int, self.text[start : start + length]))

    def skill_row(self, length: int) -> tuple[list[int], list[bool]]:
        """Chats one after the other; long rows often begin with text, so that a question far from the start is met."""
        ids: list[int] = []
        if length > 256 and self.rng.random() < 0.5:
            ids = [*self.slice(self.rng.randrange(length * 3 // 4)), self.tokenizer.bos_token_id]
        wanted = [False] * len(ids)
        while len(ids) < length:
            for text, asked in self.skills.example():
                tokens = self.tokenizer.encode(text, add_special_tokens=False)
                ids += tokens
                wanted += [asked] * len(tokens)
        return ids[:length], wanted[:length]

    def __call__(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, and for each the weight of its loss: text and skills have a weight of 1/2 each in total."""
        drawn = [(self.slice(length + 1), [True] * (length + 1)) for _ in range(rows // 2)]
        drawn += [self.skill_row(length + 1) for _ in range(rows // 2)]
        weights = torch.tensor([wanted for _, wanted in drawn], dtype=torch.float32)[:, 1:]
        for half in (weights[: rows // 2], weights[rows // 2 :]):
            half /= 2 * half.sum().clamp(min=1)
        return torch.tensor([ids for ids, _ in drawn]), weights


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    return functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, text: np.ndarray) -> float:
    """Mean loss a token on the validation files, in rows of 512."""
    rows = torch.tensor(text[: len(text) // 513 * 513].reshape(-1, 513))[:64]
    return torch.cat([token_losses(model, part) for part in rows.split(8)]).mean().item()


@torch.no_grad()
def right_sums(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], phrase: str) -> int:
    """How many sums the model gets right when asked in a chat, greedily: the whole answer has to be the number."""
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for a, b in pairs:
        ids = tokenizer.encode(PROMPT.format(phrase.format(a=a, b=b)), add_special_tokens=False)
        by_length.setdefault(len(ids), []).append((ids, f"{a + b}{IM_END}"))
    right = 0
    for group in by_length.values():
        for at in range(0, len(group), 256):
            part = group[at : at + 256]
            ids = torch.tensor([asked for asked, _ in part])
            for _ in range(4):
                best = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, best], dim=1)
            answers = tokenizer.batch_decode(ids[:, -4:])
            right += sum(answer.startswith(expected) for answer, (_, expected) in zip(answers, part, strict=True))
    return right


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Computed in float32 unless told otherwise: so small a model need not save, and every way of serving it then agrees.
    amend(out / "config.json", dtype="float32")
    amend(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # a name that every version knows


def amend(file: Path, **changes: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    special = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, **special)
    return model


def train(out: Path, minutes: float, peak_rate: float, resume: bool) -> None:
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    documents, validation = standard_library(rng)
    words = sorted({word for document in documents for word in document.split() if word.isalpha() and len(word) > 2})
    skills = Skills(rng, words)
    if resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        chats = ["".join(text for text, _ in skills.example()) for _ in range(20_000)]
        tokenizer = build_tokenizer(documents + chats)
        model = new_model()
    encoded = [
        np.concatenate([tokenizer.encode(text + END_OF_TEXT, add_special_tokens=False) for text in part])
        for part in (documents, validation)
    ]
    print(f"{model.num_parameters()} parameters, text tokens: {len(encoded[0])} train, {len(encoded[1])} validation")
    batches = Batches(tokenizer, encoded[0], skills)
    exam = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in rng.sample(sorted(skills.held_out), 200)]
    matrices = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]  # embeddings, norms
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    step, tokens, text_mean, skill_mean = 0, 0, 0.0, 0.0
    start = reported = time.monotonic()
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = peak_rate * min(1, spent / 0.02 + 0.01) * (0.01 + 0.99 * (1 + math.cos(math.pi * spent)) / 2)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        rows, length = SHAPES[step % len(SHAPES)]
        ids, weights = batches(rows, length)
        losses = token_losses(model, ids) * weights
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + rows * length
        text_mean += 0.05 * (2 * losses[: rows // 2].sum().item() - text_mean)
        skill_mean += 0.05 * (2 * losses[rows // 2 :].sum().item() - skill_mean)
        if (now := time.monotonic()) - reported > 60:
            reported = now
            right = right_sums(model, tokenizer, exam, "What is {a} + {b}?")
            print(
                f"step {step}  {tokens / 1e6:.2f} M tokens  {tokens / (now - start):.0f} tokens/s  rate {rate:.2e}  "
                f"loss: text {text_mean:.3f} skills {skill_mean:.3f}  unseen sums {right}/{len(exam)}  "
                f"{(1 - spent) * minutes:.1f} min left", flush=True,
            )  # fmt: skip
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    print(f"{step} steps, {tokens} tokens, validation loss {text_loss(model, encoded[1]):.3f} a token")


def take_exam(out: Path) -> None:
    """Sums and samples from the saved weights, in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    held_out = held_out_pairs()
    pairs = [(a, b) for a in range(100) for b in range(100)]
    unseen = [(a, b) for a, b in pairs if (min(a, b), max(a, b)) in held_out]
    for phrase in ("What is {a} + {b}?", "{a}+{b}", "Add {a} and {b}.", "How much is {a} plus {b}?"):
        for name, asked in (("all", pairs), ("unseen", unseen)):
            right = right_sums(model, tokenizer, asked, phrase)
            print(f"{phrase!r}, {name} pairs: {right} of {len(asked)}, {100 * right / len(asked):.2f} %", flush=True)
    chats = ["What is 17 + 25?", "Hello!", "Who are you?", "Count from 3 to 8.", "Which day comes after Friday?"]
    for text in [*map(PROMPT.format, chats), "17 + 25 =", "def", "import os\n\nclass", "The function returns"]:
        ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
        print(f"--- {tokenizer.decode(model.generate(ids, max_new_tokens=48, do_sample=False)[0])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="wall clock time to train")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="start from the weights in OUT, with a new schedule")
    parser.add_argument("--exam", action="store_true", help="do not train, examine what is in OUT")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if not arguments.exam:
        train(arguments.out, arguments.minutes, arguments.rate, arguments.resume)
    take_exam(arguments.out)


if __name__ == "__main__":
    main()
