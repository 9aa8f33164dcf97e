"""Hugging Face transformers: run_transformers.py MODEL DTYPE {static,continuous}, in its own Python. protocol.py says how it is asked."""

import sys

from protocol import Generate, answer


def load() -> tuple[Generate, str]:
    import torch
    import transformers

    dtype = getattr(torch, sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype, attn_implementation="sdpa")
    model = model.eval()

    def wanted(output: int, **more: int) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0, **more
        )

    def static(prompts: list[list[int]], output: int) -> int:
        with torch.inference_mode():
            done = model.generate(torch.tensor(prompts), generation_config=wanted(output))
        return sum(len(row) for row in done) - sum(map(len, prompts))

    def continuous(prompts: list[list[int]], output: int) -> int:
        done = model.generate_batch(prompts, generation_config=wanted(output, eos_token_id=-1))
        return sum(len(one.generated_tokens) for one in done.values())

    return {"static": static, "continuous": continuous}[sys.argv[3]], transformers.__version__


if __name__ == "__main__":
    answer(load)
