"""One rank of a group, as a process: replays scripts and writes what rank 0 sampled, with the logits it sampled from.

python rank.py RANK SIZE FOLDER, where FOLDER holds jobs.json (model directory and options per job) and <job>.plans.
"""

import json
import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from quire.common.config import EngineConfig
from quire.common.messages import StepPlan
from quire.worker.loading import load_decoder
from quire.worker.parallel import Group
from quire.worker.runner import Runner


def make_runner(path: Path, config: EngineConfig, max_model_len: int, num_blocks: int, group: Group) -> Runner:
    block_size = config.cache.block_size
    decoder = load_decoder(
        path, config.model, group, torch.device("cpu"), block_size=block_size, max_model_len=max_model_len
    )
    return Runner(
        decoder,
        num_rows=config.scheduler.max_num_seqs,
        max_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
    )


class Recorder:
    """Stands in for the head and keeps its logits."""

    def __init__(self, runner: Runner) -> None:
        self.head = runner.decoder.head
        self.logits: list[torch.Tensor] = []
        runner.decoder.head = self  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.logits.append(self.head(x))
        return self.logits[-1]


def replay(runner: Runner, plans: list[StepPlan]) -> tuple[list[list[int | None]], list[torch.Tensor]]:
    """Ids and logits of each step, padding cut off."""
    recorder = Recorder(runner)
    tokens, logits = [], []
    for plan in plans:
        output = runner.launch(plan).read()
        tokens.append(output.tokens)
        logits.append(recorder.logits.pop()[: len(output.tokens)] if output.tokens else torch.empty(0))
    return tokens, logits


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = Group(rank, size)
    group.join(f"file://{folder}/meet")
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        config = msgspec.convert(job["config"], EngineConfig)
        plans = msgspec.msgpack.decode((folder / f"{name}.plans").read_bytes(), type=list[StepPlan])
        runner = make_runner(Path(job["path"]), config, job["max_model_len"], job["num_blocks"], group)
        tokens, logits = replay(runner, plans)
        if rank == 0:
            save_file({str(i): x.contiguous() for i, x in enumerate(logits)}, folder / f"{name}.logits")
            (folder / f"{name}.tokens").write_text(json.dumps(tokens))
    group.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
