"""The ceiling that decoding is held against."""

import pytest

from quire.benchmarks.growth import Machine, Shapes

CONFIG = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20, "vocab_size": 100}  # fmt: skip


def test_shapes_are_those_of_the_weights() -> None:
    shapes = Shapes.of(CONFIG)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # queries, keys and values, output
    assert shapes.weights == 3 * (attention + 3 * 8 * 20) + 8 * 100
    assert shapes.kv_values == 3 * 2 * 4


def test_the_ceiling_is_what_is_scarce() -> None:
    shapes, machine = Shapes.of(CONFIG), Machine(read_bytes_per_s=1e6, flop_per_s=1e9)
    assert machine.ceiling(shapes, 2, 1, 0) == pytest.approx(1e6 / (2 * shapes.weights))  # reading them
    assert machine.ceiling(shapes, 2, 100_000, 0) == pytest.approx(1e9 / (2 * shapes.weights))  # multiplying with them
    assert machine.ceiling(shapes, 2, 4, 4096) < machine.ceiling(shapes, 2, 4, 128) < machine.ceiling(shapes, 2, 4, 0)
