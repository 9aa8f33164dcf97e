"""OpenVINO GenAI's paged, continuously batched pipeline: run_openvino.py MODEL DTYPE, in its own Python.

MODEL is what `optimum-cli export openvino -m CHECKPOINT --task text-generation-with-past --weight-format fp16 MODEL` wrote.
protocol.py says how it is asked.
"""

import sys
from importlib.metadata import version

from protocol import Generate, answer


def load() -> tuple[Generate, str]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2, 2048, 256
    scheduler.enable_prefix_caching = False
    hint = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[sys.argv[2]]
    pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", {"INFERENCE_PRECISION_HINT": hint})

    def generate(prompts: list[list[int]], output: int) -> int:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        done = pipe.generate([ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts], [config] * len(prompts))
        return sum(len(one.m_generation_ids[0]) for one in done)

    return generate, version("openvino-genai")


if __name__ == "__main__":
    answer(load)
