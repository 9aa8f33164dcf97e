"""Philox against the known answers of its authors (Random123's kat_vectors), and the draws it makes."""

import pytest
import torch

from quire.kernels.gumbel import gumbel, gumbel_argmax, philox

KNOWN_ANSWERS = [  # counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert philox(words(counter), words(key)) == words(result)  # type: ignore[arg-type]


def test_noise_is_gumbel() -> None:
    """Mean Euler's constant, variance pi^2 / 6; 2^20 draws put both within a hundredth."""
    noise = gumbel(torch.arange(64), torch.arange(64) * 1000, 1 << 14)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - 1.6449) < 0.01


def test_rows_are_independent_of_each_other_and_seeds_of_each_other() -> None:
    seeds, positions = torch.tensor([5, 5, 6, -1, 2**62]), torch.tensor([0, 1, 0, 7, 2**33])
    together = gumbel(seeds, positions, 101)
    for i in range(5):
        assert torch.equal(gumbel(seeds[i : i + 1], positions[i : i + 1], 101)[0], together[i])
    assert len({tuple(row.tolist()) for row in together}) == 5


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    seed, position = torch.tensor([9]), torch.tensor([3])
    assert torch.equal(gumbel(seed, position, 7), gumbel(seed, position, 1000)[:, :7])


def test_draws_follow_the_softmax() -> None:
    """Chi-square over 20,000 positions of one seed; 24.3 is its 99.9 % quantile at 7 degrees of freedom."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -3.0, 0.5, 1.5, -float("inf"), 0.1])
    n = 20_000
    drawn = gumbel_argmax(logits.expand(n, -1), torch.full((n,), 1234), torch.arange(n))
    counts = torch.bincount(drawn, minlength=9).double()
    expected = logits.double().softmax(0) * n
    assert counts[7] == 0
    live = expected > 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 24.3
