"""What a user gets wrong is told to them in one clear message, and the server, where there is one, lives."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ..checkpoints import model_for, write_tokenizer
from ..ports import free_port
from .server import Server, run_to_end

Checkpoint = Callable[[str], Path]


def refused(*flags: object) -> str:
    """What a server that must not start prints: one message, no traceback."""
    code, output = run_to_end("--port", free_port(), *flags)
    assert code == 1, output
    assert "Traceback" not in output
    return output


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint with changes in its config.json."""
    copy = folder / "model"
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_path_that_does_not_exist() -> None:
    assert "/no/such/model" in refused("--model", "/no/such/model")


def test_an_unsupported_architecture_names_the_supported_ones(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = refused("--model", edited(checkpoint("llama"), tmp_path, architectures=["MambaForCausalLM"]))
    assert "MambaForCausalLM" in output
    assert "LlamaForCausalLM" in output
    assert "Qwen3ForCausalLM" in output


def test_a_truncated_shard(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = edited(checkpoint("llama"), tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("--model", copy)


def test_a_missing_shard(tmp_path: Path) -> None:
    model_for("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    write_tokenizer(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert shards[1].name in refused("--model", tmp_path)


def test_no_weights_at_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = edited(checkpoint("llama"), tmp_path)
    (copy / "model.safetensors").unlink()
    assert "safetensors" in refused("--model", copy)


def test_a_context_beyond_the_models_says_the_number_that_works(checkpoint: Checkpoint) -> None:
    assert "512" in refused("--model", checkpoint("llama"), "--max-model-len", 4096)


def test_too_little_memory_for_one_context_says_what_to_lower() -> None:
    output = refused("--kv-cache-memory", "1MiB")
    assert "--max-model-len" in output
    assert "--kv-cache-memory" in output


def test_a_port_in_use_says_by_whom() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = run_to_end("--port", taken.getsockname()[1])
    assert code == 1
    assert f"process {os.getpid()}" in output
    assert "--port" in output


def test_a_misspelt_option_names_the_nearest() -> None:
    code, output = run_to_end("--max-model-length", 5)
    assert code == 1
    assert "--max-model-len" in output


BAD_REQUESTS: list[tuple[str, dict[str, object], int, str | None]] = [
    ("completions", {"prompt": ""}, 400, "prompt"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": [4096]}, 400, "prompt"),
    ("completions", {"prompt": [-1]}, 400, "prompt"),
    ("completions", {"prompt": {"a": 1}}, 400, "prompt"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": "x", "model": "absent"}, 404, "model"),
    ("completions", {"prompt": "x", "n": 10**9}, 400, "n"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("completions", {"prompt": "x", "top_k": -5}, 400, "top_k"),
    ("completions", {"prompt": "x", "min_p": 2}, 400, "min_p"),
    ("completions", {"prompt": "x", "seed": 2**64}, 400, "seed"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"prompt": "x", "stop": [""] * 3}, 400, "stop"),
    ("completions", {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "stop_token_ids": [4096]}, 400, "stop_token_ids"),
    ("completions", {"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty"),
    ("completions", {"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": "hi"}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}, 400, None),
    ("chat/completions", {}, 400, "messages"),
]


@pytest.mark.parametrize(("route", "fields", "status", "param"), BAD_REQUESTS, ids=lambda v: str(v)[:30])
def test_bad_requests(demo: Server, route: str, fields: dict[str, object], status: int, param: str | None) -> None:
    answer = demo.http.post(f"/v1/{route}", json={"model": "demo", **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b"\xff\xfe", b'{"temperature": NaN, "prompt": "x"}', b"[" * 100_000]
)
def test_bodies_that_are_not_a_json_object(demo: Server, content: bytes) -> None:
    answer = demo.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_longer_than_the_context_names_both_numbers(demo: Server) -> None:
    answer = demo.http.post("/v1/completions", json={"model": "demo", "prompt": [7] * 2500})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "2048" in error["message"]
    assert "2500" in error["message"]


def test_the_server_lives_through_all_of_it(demo: Server) -> None:
    assert demo.complete("x", max_tokens=3)
    assert demo.metric("quire:kv_blocks_free") == demo.metric("quire:kv_blocks")


def test_api_keys_guard_everything_but_health() -> None:
    with Server("--api-key", "first-key", "--api-key", "second-key") as server:
        headers = {"authorization": "Bearer second-key"}
        server.wait_ready()
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
            assert server.http.get(path).status_code == 401, path
            assert server.http.get(path, headers={"authorization": "Bearer first-kez"}).status_code == 401
            assert server.http.get(path, headers=headers).status_code in (200, 404)
        answer = server.http.post("/v1/completions", json={"model": "demo", "prompt": "x"})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert not [p for p in server.tree()[1:] if "first-key" in " ".join(p.cmdline())]
