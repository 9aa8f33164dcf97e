"""Options: four sources, one validation, one table."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.config import EngineConfig
from quire.common.errors import ConfigError
from quire.launch.arguments import Parser, add_options, configuration, printable
from quire.launch.children import write_config
from quire.launch.options import (
    BY_NAME,
    OPTIONS,
    Option,
    build,
    from_environment,
    from_keywords,
    likely_typos,
    markdown,
    parse_size,
    resolve,
    to_flags,
    to_yaml,
)


def parse(*argv: str, environ: dict[str, str] | None = None) -> EngineConfig:
    parser = Parser("serve.py", "")
    add_options(parser)
    return configuration(parser.read(argv), environ or {})


# Values within the limits of every option, by name: those that have limits beyond their type.
WITHIN = {
    "block_size": st.integers(1, 256),
    "max_num_seqs": st.integers(1, 4096),
    "pipeline_depth": st.integers(1, 8),
    "tensor_parallel_size": st.integers(1, 64),
    "frontends": st.integers(1, 64),
    "port": st.integers(0, 65535),
    "master_port": st.integers(1, 65535),
    "max_body_bytes": st.integers(1024, 2**40),
    "gpu_memory_utilization": st.floats(0.0, 1.0, exclude_min=True),
    "drain_timeout": st.floats(0.0, 1e6) | st.just(float("inf")),
    "stall_timeout": st.floats(1.0, 1e6),
    "request_timeout": st.floats(0.0, 86400.0, exclude_min=True),
    "max_queue_time": st.floats(0.0, 86400.0, exclude_min=True),
    "swap_space": st.floats(0.0, 65536.0),
    "kv_disk_space": st.floats(0.0, 65536.0, exclude_min=True),
    "target_itl": st.floats(0.0, 60000.0),
    "max_pinned": st.floats(0.0, 1.0),
}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    if option.choices:
        one: st.SearchStrategy[Any] = st.sampled_from(option.choices)
    elif option.kind is str:
        one = TEXT
    elif option.kind is bool:
        one = st.booleans()
    else:
        one = WITHIN.get(option.name, st.integers(1, 2**31))
    return st.lists(one, max_size=3).map(tuple) if option.several else one


configs = st.fixed_dictionaries({}, optional={o.name: values_of(o) for o in OPTIONS}).map(
    lambda given: build({name: (name, value) for name, value in given.items()})
)


def test_no_two_groups_share_a_name() -> None:
    assert len(BY_NAME) == len(OPTIONS)
    spellings = [flag for option in OPTIONS for flag in option.flags]
    assert len(set(spellings)) == len(spellings)


@settings(max_examples=150, deadline=None)
@given(configs)
def test_any_configuration_survives_the_command_line(config: EngineConfig) -> None:
    assert parse(*to_flags(config)) == config


@settings(max_examples=100, deadline=None)
@given(configs)
def test_any_configuration_survives_yaml(tmp_path_factory: pytest.TempPathFactory, config: EngineConfig) -> None:
    file = tmp_path_factory.mktemp("yaml") / "engine.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse("--config", str(file)) == config


@settings(max_examples=50, deadline=None)
@given(configs)
def test_any_configuration_survives_the_file_that_the_scheduler_reads(
    tmp_path_factory: pytest.TempPathFactory, config: EngineConfig
) -> None:
    assert parse("--config", str(write_config(config, tmp_path_factory.mktemp("run")))) == config


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.name)
def test_every_option_has_a_flag_a_variable_and_a_yaml_key(option: Option, tmp_path: Path) -> None:
    text = {bool: str(not option.default).lower(), int: "1", float: "1.0", str: "x"}[option.kind]
    text = "2048" if option.name == "max_body_bytes" else option.choices[-1] if option.choices else text
    flags = (
        [option.flag if text == "true" else f"--no-{option.flag[2:]}"] if option.kind is bool else [option.flag, text]
    )
    by_flag = parse(*flags)
    file = tmp_path / "engine.yaml"
    file.write_text(f"{option.flag[2:]}: {text}")
    assert by_flag == parse(environ={option.env: text}) == parse("--config", str(file))
    changed = getattr(getattr(by_flag, option.group), option.name)
    assert changed != option.default or option.name in {"tensor_parallel_size", "frontends", "seed"}


def test_the_first_source_wins(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("server: {port: 1}\nblock-size: 2\nmax_num_seqs: 3\n")
    environ = {"QUIRE_PORT": "11", "QUIRE_BLOCK_SIZE": "12", "QUIRE_SEED": ""}
    config = parse("--config", str(file), "--port", "21", environ=environ)
    assert (config.server.port, config.cache.block_size, config.scheduler.max_num_seqs) == (21, 12, 3)
    assert config.model.seed == 0


def test_vllm_spellings_are_taken() -> None:
    config = parse(
        "-tp",
        "2",
        "--kv_cache_memory_bytes",
        "1GiB",
        "--served-model-name",
        "a",
        "--max_model_len=8k",
        "--served-model-name",
        "b",
    )
    assert config == from_keywords(
        {"tp": 2, "kv_cache_memory": 2**30, "served_model_name": ["a", "b"], "max_model_len": 8000}
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("25.6k", 25600),
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1_000", 1000),
        ("1.5G", 3 << 29),
    ],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["", "k", "8q", "1.5", "0x10", "8 k k", "inf", "nan", "--1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--block-size", "0"], ["--block-size", "at least 1", "got 0"]),
        (["--block-size", "257"], ["--block-size", "at most 256", "got 257"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "at most 1", "1.5"]),
        (["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "nan"]),
        (["--drain-timeout", "soon"], ["--drain-timeout", "a number", "'soon'"]),
        (["--port", "http"], ["--port", "whole number", "'http'"]),
        (["--dtype", "float8"], ["--dtype", "'float8'", "bfloat16", "Did you mean float"]),
        (["--tensor-paralel-size", "2"], ["--tensor-paralel-size", "Did you mean --tensor-parallel-size?"]),
        (["--max-model-length=2"], ["--max-model-length", "Did you mean --max-model-len?"]),
        (["--port"], ["--port", "expected one argument"]),
        (["--config", "/nowhere.json"], ["/nowhere.json", "cannot be read"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml", "cannot be read"]),
    ],
)
def test_a_wrong_flag_is_told_with_its_name_and_the_way_out(argv: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert all(part in str(error.value) for part in said), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blok_size: 3", ["'blok_size'", "Did you mean block_size?"]),
        ("server: {prt: 3}", ["'prt'", "Did you mean port?"]),
        ("cache: {port: 3}", ["port", "group server"]),
        ("serve: {port: 3}", ["'serve'", "Did you mean server?"]),
        ("block_size: 0", ["engine.yaml", "block_size", "at least 1", "got 0"]),
        ("block_size: [1]", ["block_size", "expected a whole number", "[1]"]),
        ("port:", ["port", "got None"]),
        ("api_key: [a, 1]", ["api_key", "expected text", "1"]),
        ("- port", ["options by name"]),
        ("{", ["is not YAML"]),
        ("strict_fields: maybe", ["strict_fields", "true or false", "'maybe'"]),
    ],
)
def test_a_wrong_file_is_told_with_its_key(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse("--config", str(file))
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_wrong_json_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text('{"port": 1')
    with pytest.raises(ConfigError, match=r"engine\.json: is not JSON"):
        parse("--config", str(file))
    file.write_text('{"port": "x"}')
    with pytest.raises(ConfigError, match=r"engine\.json, port: expected a whole number"):
        parse("--config", str(file))


def test_a_wrong_variable_is_told_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"QUIRE_MAX_NUM_SEQS: must be at most 4096, got 5000"):
        resolve({}, environ={"QUIRE_MAX_NUM_SEQS": "5000"}, file=None)
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        from_environment({"QUIRE_PORT": "tcp://10.0.0.1:8000"})
    assert [
        line
        for line in likely_typos({"QUIRE_MAX_MODEL_LENGTH": "3", "QUIRE_SERVICE_HOST": "x"})
        if "QUIRE_MAX_MODEL_LEN?" in line
    ]
    assert len(likely_typos({"QUIRE_MAX_MODEL_LENGTH": "3", "QUIRE_SERVICE_HOST": "x"})) == 1


def test_an_option_with_several_values_leaves_words_behind_it_alone() -> None:
    parser = Parser("serve.py", "")
    parser.add_argument("positional", nargs="?")
    add_options(parser)
    values = parser.read(["--api-key", "one", "./my-model", "--api-key=two"])
    assert values.positional == "./my-model"
    assert configuration(values, {}) == from_keywords({"api_key": ["one", "two"]})
    assert configuration(parser.read([]), {"QUIRE_API_KEY": "one,two"}) == from_keywords({"api_key": ["one", "two"]})
    assert "May be repeated." in parser.format_help()


@pytest.mark.parametrize("argv", [["--port", "x" * 500], ["--dtype", "x" * 500], ["--no", "x" * 500]])
def test_long_values_are_not_repeated_at_length(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert len(str(error.value)) < 300


def test_a_wrong_keyword_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean tensor_parallel_size"):
        from_keywords({"tensor_parallel": 2})
    with pytest.raises(ConfigError, match="block_size: must be at least 1, got 0"):
        from_keywords({"block_size": 0})


def test_help_and_table_name_every_option() -> None:
    parser = Parser("serve.py", "")
    add_options(parser)
    text, table = parser.format_help(), markdown()
    for option in OPTIONS:
        assert option.env in text
        for spelling in option.flags:
            assert spelling in text
        assert f"`{option.flag}`" in table
    assert "`16MiB`" in table
    assert "Default: 16MiB." in " ".join(text.split())
    printed = subprocess.run(
        [sys.executable, "-m", "quire.launch.options"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert printed.stdout.strip() == table


def test_no_configuration_holds_a_key_in_the_clear() -> None:
    config = build({"api_key": ("", ["sesame", "open"])})
    assert "sesame" not in repr(config)
    assert build({"api_key": ("", list(config.server.api_key))}) == config  # digests stand for themselves


def test_what_is_printed_holds_no_api_key() -> None:
    config = build({"api_key": ("", ["sesame", "open"]), "port": ("", 81)})
    text = printable(config)
    assert "sesame" not in text
    assert "2 of them" in text
    assert "port: 81" in text


def test_wire_and_options_agree() -> None:
    """The struct that options make is the one that crosses the wire."""
    config = parse("--tp", "2", "--api-key", "k")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config
