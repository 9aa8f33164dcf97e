"""vLLM, offline: run_vllm.py MODEL DTYPE [CORES], in its own Python. protocol.py says how it is asked.

By itself, vLLM leaves one core to its scheduler, which does not sleep. CORES ("0-1") are where it shall compute instead.
"""

import os
import sys

from protocol import Generate, answer


def load() -> tuple[Generate, str]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB, as the others have
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[3:]:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = sys.argv[3]
    import vllm

    llm = vllm.LLM(sys.argv[1], dtype=sys.argv[2], max_model_len=2048, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], output: int) -> int:
        params = vllm.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return generate, vllm.__version__


if __name__ == "__main__":
    answer(load)
