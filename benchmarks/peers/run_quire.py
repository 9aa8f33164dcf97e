"""Quire, offline: run_quire.py MODEL DTYPE [OPTION=VALUE ...], options as `LLM` takes them. protocol.py says how it is asked."""

import sys

from protocol import Generate, answer

from quire import LLM, SamplingParams, __version__


def load() -> tuple[Generate, str]:
    options: dict[str, object] = {"enable_prefix_caching": False, "max_model_len": 2048, "kv_cache_memory": "2GiB"}
    options |= dict(word.split("=", 1) for word in sys.argv[3:])
    llm = LLM(sys.argv[1], dtype=sys.argv[2], **options)

    def generate(prompts: list[list[int]], output: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return sum(len(done.outputs[0].token_ids) for done in llm.generate(prompts, params, use_tqdm=False))

    return generate, __version__


if __name__ == "__main__":
    answer(load)
