"""How a worker sets up its host."""

from dataclasses import replace

import pytest

from quire.common.config import EngineConfig, ParallelConfig
from quire.worker.loading import WEIGHTS_OF_A_THREAD, num_threads
from quire.worker.models.spec import Attention, Decoder, GatedMLP, Layer, RmsNorm, Rope

NORM = RmsNorm(eps=1e-5)
ATTENTION = Attention(num_heads=8, num_kv_heads=2, head_dim=64, rope=Rope(dim=64, theta=1e4))
LAYER = Layer(attn=ATTENTION, mlp=GatedMLP(width=1000), pre_attn=NORM, pre_mlp=NORM)
MODEL = Decoder(
    vocab_size=4000, hidden_size=500, layers=(LAYER,) * 3, norm=NORM, tied_head=True, names={}, dtype="float32"
)


def test_weights_are_those_of_the_matrices() -> None:
    attention = 500 * (8 + 2 + 2) * 64 + 8 * 64 * 500
    assert MODEL.num_weights == 3 * (attention + 3 * 500 * 1000) + 4000 * 500


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "weights", "threads"),
    [
        (16, 1, None, 16, 16),
        (16, 1, None, 3, 3),
        (16, 2, None, 16, 8),
        (2, 4, None, 16, 1),
        (16, 1, None, 0, 1),
        (16, 1, 5, 0, 5),
    ],
)
def test_threads(cores: int, ranks: int, asked: int | None, weights: int, threads: int) -> None:
    config = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=ranks, threads=asked))
    model = replace(MODEL, layers=(), vocab_size=weights * WEIGHTS_OF_A_THREAD // 500)
    assert num_threads(config, model, cores) == threads
