"""A tiny model directory, and one engine with a frontend process that the tests of this folder share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quire.common.config import ServerConfig
from quire.frontend import scheduler_link

from .fake_scheduler import CONTEXT, FakeScheduler, frontend_process, until, wait_ready

VOCABULARY = 2048  # logits are wider than what the tokenizer knows, as in many checkpoints
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "hello world, the quick brown fox jumps over the lazy dog. ",
    "user assistant system\n",
    "héllo wörld 你好 😀 ",
    "0123456789 ",
]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, and a config.json."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(path / "tokenizer.json"))
    names = {
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    eos = tokenizer.token_to_id("<|im_end|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": eos,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def make_scheduler(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FakeScheduler]:
    def make(server: ServerConfig | None = None) -> FakeScheduler:
        return FakeScheduler(tmp_path_factory.mktemp("run"), model_dir, server)

    return make


@pytest.fixture(scope="session")
def shared(make_scheduler) -> Iterator[tuple[FakeScheduler, str]]:
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (_, url):
        wait_ready(url)
        yield scheduler, url


@pytest.fixture
def engine(shared) -> Iterator[FakeScheduler]:
    """The shared scheduler, as new, behind a frontend process that all tests share."""
    scheduler = shared[0]
    scheduler.delay_s, scheduler.tokens_per_step = 0.0, 1
    scheduler.answer = lambda submit: None
    scheduler.submits.clear()
    scheduler.aborts.clear()
    yield scheduler
    scheduler.hold.set()
    until(lambda: scheduler.num_running == 0)


@pytest.fixture
def url(shared, engine) -> str:
    return shared[1]


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    """The tiny model's tokenizer, as the library itself reads it."""
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links of this process take a peer for silent soon."""
    monkeypatch.setattr(scheduler_link, "PEER_TIMEOUT_S", 0.7)
    monkeypatch.setattr(scheduler_link, "HEARTBEAT_S", 0.2)
