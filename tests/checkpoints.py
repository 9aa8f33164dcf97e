"""Tiny random checkpoints written by transformers: the oracle and our input at once.

Each is built at most once per test run, in a directory that the whole run shares. Weights are drawn wide enough that
the likeliest token leads clearly: float32 rounding then decides nothing.
"""

import json
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (transformers' class prefix, changes to SHAPE)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),  # a KV head for each query head
    "llama-biased-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-odd": (
        "Llama",
        {
            "vocab_size": 331,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 72,
            "intermediate_size": 81,
            "head_dim": 8,
        },
    ),
    "mistral": ("Mistral", {"head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen2-mqa": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def build_checkpoint(name: str, folder: Path, **save: Any) -> Path:
    """Write checkpoint `name` below `folder` unless it is there; `save` goes to `save_pretrained` (max_shard_size)."""
    path = folder / name
    if not (path / "done").exists():
        model_for(name).save_pretrained(path, **save)
        write_tokenizer(path)
        (path / "done").touch()
    return path


def model_for(name: str) -> Any:
    """The random float32 model `name`, the same at every call."""
    import torch
    import transformers

    prefix, changes = CHECKPOINTS[name]
    torch.manual_seed(sorted(CHECKPOINTS).index(name))
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.25)
        model.tie_weights()
    model.generation_config.eos_token_id = [257]
    return model


def load_oracle(path: Path) -> Any:
    """The transformers model of a directory, float32, for greedy generation."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def oracle_greedy(model: Any, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """transformers' greedy continuation of one prompt, new ids only."""
    import torch

    ids = torch.tensor([prompt])
    stop = {"eos_token_id": None} if ignore_eos else {}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, **stop
    )
    return out[0, len(prompt) :].tolist()


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: one token a byte, three special ones, a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
