"""What is said once, when the engine is ready."""

import ipaddress
import json

from ..common.config import EngineConfig
from ..common.messages import Capacity, Welcome

QUESTION = "What is 17 + 25?"


def banner(version: str, url: str, welcome: Welcome, capacity: Capacity) -> str:
    """Model, address, what fits at once, and a first request to try."""
    config, model = welcome.config, welcome.model
    workers = config.parallel.tensor_parallel_size
    concurrency = capacity.num_tokens / capacity.max_model_len
    rows = [
        ("model", f"{model.model} ({model.architecture}{f', {workers} workers' if workers > 1 else ''})"),
        ("address", url),
        ("KV cache", f"{capacity.num_tokens:,} tokens in {capacity.num_blocks:,} blocks of {capacity.block_size}"),
        ("", f"Maximum concurrency for {capacity.max_model_len:,} tokens per request: {concurrency:.2f}x"),
        ("try", sample(url, config)),
        ("chat", f"quire chat --url {url}"),
        ("stop", f"Ctrl-C; running requests get {config.server.drain_timeout:g} s to finish"),
    ]
    lines = [f"  {name:<10}{text}".rstrip() for name, text in rows]
    return "\n".join(["", f"Quire {version} is ready", *lines, *_warnings(config), ""])


def sample(url: str, config: EngineConfig) -> str:
    """A curl that asks the model something."""
    name = config.model.served_model_name[0] if config.model.served_model_name else config.model.model
    body = json.dumps(
        {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}, ensure_ascii=False
    )
    key = ' -H "Authorization: Bearer $API_KEY"' if _has_keys(config) else ""
    quoted = body.replace("'", "'\\''")
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{quoted}'"


def _has_keys(config: EngineConfig) -> bool:
    return bool(config.server.api_key or config.server.api_keys_file)


def _warnings(config: EngineConfig) -> list[str]:
    if _has_keys(config) or _is_loopback(config.server.host):
        return []
    return [f"  warning   anybody who reaches {config.server.host} may use this server: consider --api-key"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
