"""Offline work: so many requests of so many tokens, with prompts that nobody has seen."""

import argparse
import random
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 10, 4000  # past the special ids of most models, and within the built-in model's vocabulary


@dataclass(frozen=True, slots=True)
class Work:
    requests: int
    prompt: int  # tokens of each
    output: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt}/{self.output}"

    @property
    def tokens(self) -> int:
        """That are to come out."""
        return self.requests * self.output


def work(text: str) -> Work:
    """ "32x128/64" as an argument: 32 requests, prompts of 128 tokens, outputs of 64."""
    try:
        requests, rest = text.split("x")
        prompt, output = rest.split("/")
        found = Work(int(requests), int(prompt), int(output))
    except ValueError:
        raise argparse.ArgumentTypeError(f"work is REQUESTSxPROMPT/OUTPUT (32x128/64), not {text!r}") from None
    if min(found.requests, found.prompt, found.output) < 1:
        raise argparse.ArgumentTypeError(f"nothing in {text!r} may be 0")
    return found


def random_prompts(count: int, length: int, seed: object) -> list[list[int]]:
    """Token ids; the same ones for the same seed."""
    rng = random.Random(f"{seed}")
    return [[rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(length)] for _ in range(count)]
