"""Readers for the keys of config.json that most checkpoints share. An architecture overrides what differs in it."""

from typing import Any

from ...common.errors import ConfigError
from ...common.model_file import ModelFile
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


def rms(config: ModelFile) -> RmsNorm:
    return RmsNorm(eps=config.number("rms_norm_eps"))


def rope(config: ModelFile, head_dim: int) -> Rope:
    """transformers 5 writes `rope_parameters`, transformers 4 wrote `rope_theta` and `rope_scaling`."""
    params = config.part("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")
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


def gqa(config: ModelFile, **changes: Any) -> Attention:
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


def gated_mlp(config: ModelFile) -> GatedMLP:
    config.require("hidden_act", ("silu", "swish"))
    return GatedMLP(width=config.count("intermediate_size"), bias=config.flag("mlp_bias"))


MOST_LAYERS = 1000


def full_attention(config: ModelFile) -> list[int | None]:
    """No window in any layer, whatever the file says of one: the architecture has none."""
    return [None] * config.count("num_hidden_layers", most=MOST_LAYERS)


def windows(config: ModelFile) -> list[int | None]:
    """The sliding window of each layer as `layer_types` has it, None for full attention."""
    kinds, num_layers = config.names("layer_types"), config.count("num_hidden_layers", most=MOST_LAYERS)
    if len(kinds) != num_layers:
        raise ConfigError(f"{config.where}: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.refusal("layer_types", kind, known=("full_attention", "sliding_attention"))
    return [config.count("sliding_window") if kind == "sliding_attention" else None for kind in kinds]


def qwen_windows(config: ModelFile) -> list[int | None]:
    """As transformers fills in what files without `layer_types` leave out: a window only where it is switched on, and
    then from layer `max_window_layers` on."""
    if config.get("layer_types") is not None:
        return windows(config) if config.flag("use_sliding_window") else full_attention(config)
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return full_attention(config)
    first = 0 if config.get("max_window_layers") == 0 else config.count("max_window_layers", 28)
    window = config.count("sliding_window")
    return [None if i < first else window for i in range(len(full_attention(config)))]


def decoder(config: ModelFile, layers: list[Layer], names: Names = LLAMA_NAMES) -> Decoder:
    return Decoder(
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        layers=tuple(layers),
        norm=rms(config),
        tied_head=config.flag("tie_word_embeddings"),
        names=names,
        dtype=dtype(config),
    )


def dtype(config: ModelFile) -> str:
    """transformers 5 writes `dtype`, transformers 4 wrote `torch_dtype`; float32 when neither is there, as theirs."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return "float32" if config.get(key) is None else config.require(key, DTYPES)
