"""Readers for the keys of config.json that most checkpoints share. An architecture overrides what differs in it."""

from collections.abc import Sequence
from typing import Any

from ...common.errors import ConfigError
from .spec import Attention, Cat, Decoder, GatedMLP, Layer, LinearScaling, Llama3Scaling, Names, RmsNorm, Rope

DTYPES = ("float32", "float16", "bfloat16")
LAYER = "model.layers.{i}."
LLAMA_NAMES: Names = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "pre_attn": LAYER + "input_layernorm",
    "attn.qkv": Cat(tuple(f"{LAYER}self_attn.{x}_proj" for x in "qkv")),
    "attn.q_norm": LAYER + "self_attn.q_norm",
    "attn.k_norm": LAYER + "self_attn.k_norm",
    "attn.out": LAYER + "self_attn.o_proj",
    "pre_mlp": LAYER + "post_attention_layernorm",
    "mlp.up": Cat((LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj")),
    "mlp.down": LAYER + "mlp.down_proj",
}


class Config(dict[str, Any]):
    """config.json, or an object in it, whose values are read with their type and range. `where` names it in errors."""

    def __init__(self, values: Any, where: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected an object, found {values!r:.80}")
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self.where}: {key} is missing")

    def refusal(self, key: str, value: object, *, known: Sequence[str]) -> ConfigError:
        return ConfigError(f"{self.where}: {key} {value!r:.200} is not supported; known are: {', '.join(known)}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` stands for an absent or null one."""
        value = default if default is not None and self.get(key) is None else self[key]
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.where}: {key} must be a positive integer, got {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, likewise."""
        value = default if default is not None and self.get(key) is None else self[key]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.where}: {key} must be a positive number, got {value!r:.80}")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean; absent and null are false."""
        value = self.get(key) or False
        if type(value) is not bool:
            raise ConfigError(f"{self.where}: {key} must be true or false, got {value!r:.80}")
        return value

    def require(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """One of the `known` values."""
        value = self.get(key, default) if default is not None else self[key]
        if value not in known:
            raise self.refusal(key, value, known=known)
        return str(value)


def rms(config: Config) -> RmsNorm:
    return RmsNorm(eps=config.number("rms_norm_eps"))


def rope(config: Config, head_dim: int) -> Rope:
    """transformers 5 writes `rope_parameters`, transformers 4 wrote `rope_theta` and `rope_scaling`."""
    if config.get("rope_parameters") is not None:
        params = Config(config["rope_parameters"], f"{config.where}: rope_parameters")
    else:
        params = Config(config.get("rope_scaling") or {}, f"{config.where}: rope_scaling")
    theta = params.number("rope_theta", config.number("rope_theta", 10000.0))
    partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise config.refusal("partial_rotary_factor", partial, known=["1.0"])
    if "rope_type" not in params and "type" in params:
        params["rope_type"] = params["type"]  # before transformers 4.43
    match params.require("rope_type", ("default", "linear", "llama3"), "default"):
        case "linear":
            return Rope(dim=head_dim, theta=theta, scaling=LinearScaling(factor=params.number("factor")))
        case "llama3":
            scaling = Llama3Scaling(
                factor=params.number("factor"),
                low_freq_factor=params.number("low_freq_factor"),
                high_freq_factor=params.number("high_freq_factor"),
                original_context=params.count("original_max_position_embeddings"),
            )
            if scaling.low_freq_factor >= scaling.high_freq_factor:
                raise ConfigError(f"{params.where}: low_freq_factor must be less than high_freq_factor, got {params}")
            return Rope(dim=head_dim, theta=theta, scaling=scaling)
    return Rope(dim=head_dim, theta=theta)


def gqa(config: Config, **changes: Any) -> Attention:
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = config.count("head_dim", config.count("hidden_size") // heads)
    if head_dim % 2:
        raise ConfigError(f"{config.where}: head_dim {head_dim} is odd; rotary embedding needs pairs")
    bias = config.flag("attention_bias")
    fields = {"qkv_bias": bias, "out_bias": bias, "rope": rope(config, head_dim)}
    return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **{**fields, **changes})


def gated_mlp(config: Config) -> GatedMLP:
    config.require("hidden_act", ("silu", "swish"))
    return GatedMLP(width=config.count("intermediate_size"), bias=config.flag("mlp_bias"))


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, None for full attention."""
    num_layers = config.count("num_hidden_layers")
    window = config.count("sliding_window") if config.get("sliding_window") is not None else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0  # Qwen; Mistral: all layers
        sliding = window is not None and config.get("use_sliding_window", True)
        return [window if sliding and i >= first else None for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ConfigError(f"{config.where}: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    known = ("full_attention", "sliding_attention") if window else ("full_attention",)
    for kind in kinds:
        if kind not in known:
            raise config.refusal("layer_types", kind, known=known)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def decoder(config: Config, layers: list[Layer], names: Names = LLAMA_NAMES) -> Decoder:
    return Decoder(
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        layers=tuple(layers),
        norm=rms(config),
        tied_head=config.flag("tie_word_embeddings"),
        names=names,
        dtype=dtype(config),
    )


def dtype(config: Config) -> str:
    """transformers 5 writes `dtype`, transformers 4 wrote `torch_dtype`; float32 when neither is there, as theirs."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return "float32" if config.get(key) is None else config.require(key, DTYPES)
