"""config.json and generation_config.json, parsed once into frozen values.

Source   transformers 5.23.0, configuration_diffusion_gemma.py and generation_diffusion_gemma.py
Differs  both spellings of the full-attention heads are read: the released `global_head_dim` +
         `num_global_key_value_heads`, and the `per_layer_config` that transformers >= 5.23 writes.
         `released_spelling` turns the second into the first, because mlx-vlm reads only that one.

Field names are transformers' names. Standard library only: conversion plans need nothing else.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .errors import DgemmaError

SLIDING, FULL = "sliding_attention", "full_attention"

# What the other Gemma checkpoints are called, and the tool that runs them.
OTHER_TOOLS = {
    "gemma4": "Gemma 4 generates one token at a time; run it with mlx_lm.generate instead",
    "gemma4_text": "Gemma 4 generates one token at a time; run it with mlx_lm.generate instead",
    "gemma3": "Gemma 3 generates one token at a time; run it with mlx_lm.generate instead",
    "llada": "LLaDA is another diffusion model; run it with transformers",
    "dream": "Dream is another diffusion model; run it with transformers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What differs between the layers of one model."""

    index: int
    is_sliding: bool
    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rotated_pairs: int  # of head_dim // 2 frequency pairs; the rest have frequency 0

    @property
    def has_v_proj(self) -> bool:
        """Full-attention layers store no v_proj: their values are the k projection before k_norm and RoPE."""
        return self.is_sliding


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The text model. Sizes are counts, except where noted."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # dense MLP and self-conditioning
    moe_intermediate_size: int  # one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # sliding layers
    head_dim: int  # sliding layers
    global_head_dim: int  # full-attention layers
    num_global_key_value_heads: int  # full-attention layers
    num_experts: int
    top_k_experts: int
    sliding_window: int  # tokens, the query included
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    final_logit_softcapping: float
    max_position_embeddings: int  # tokens
    canvas_length: int  # tokens
    sliding_rope_theta: float
    full_rope_theta: float
    full_rotary_factor: float  # share of the frequency pairs that rotate
    vision: dict | None = dataclasses.field(hash=False)  # the raw vision_config, None in a text-only checkpoint
    image_token_id: int | None

    @functools.cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        def layer(index, kind):
            if kind == SLIDING:
                return LayerConfig(
                    index=index,
                    is_sliding=True,
                    head_dim=self.head_dim,
                    num_key_value_heads=self.num_key_value_heads,
                    rope_theta=self.sliding_rope_theta,
                    rotated_pairs=self.head_dim // 2,
                )
            return LayerConfig(
                index=index,
                is_sliding=False,
                head_dim=self.global_head_dim,
                num_key_value_heads=self.num_global_key_value_heads,
                rope_theta=self.full_rope_theta,
                rotated_pairs=int(self.full_rotary_factor * self.global_head_dim // 2),
            )

        return tuple(layer(i, kind) for i, kind in enumerate(self.layer_types))


STOP_RULES = ("stable", "confident", "plateau", "patience")  # what they are stands in schedule.py
_LEAST = {
    "max_new_tokens": 1, "max_denoising_steps": 1, "stability_threshold": 0, "patience": 1, "schedule_steps": 1,
    "first_canvas": 1, "conditioning_k": 1,
}  # fmt: skip
_OPTIONAL = ("schedule_steps", "first_canvas", "conditioning_k")
# Settings that transformers does not have: no generation_config.json holds them.
OURS = {"schedule_steps", "stop", "patience", "drop_tail", "first_canvas", "conditioning_k", "conditioning_epsilon"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """The sampler's settings; the defaults are those of transformers' generate.

    Raises DgemmaError where a value cannot work.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48  # N: steps per block at most
    t_min: float = 0.4  # temperature towards the last step
    t_max: float = 0.8  # temperature of the first step
    entropy_bound: float = 0.1  # nats
    stability_threshold: int = 1  # k means k + 1 equal argmax canvases
    confidence_threshold: float = 0.005  # nats, mean entropy of a canvas
    schedule_steps: int | None = None  # steps in which the temperature falls from t_max to t_min; by default all N
    stop: str = "stable"  # a rule of schedule.STOP_RULES
    patience: int = 2  # steps a slot's draft must last, for the rule "patience"
    drop_tail: bool = False  # stop computing slots behind a settled end token
    first_canvas: int | None = None  # slots of the first canvas; doubled from block to block up to C
    conditioning_k: int | None = None  # blocks of tokens that self-conditioning reads of a sure slot; None: all
    conditioning_epsilon: float = 1e-3  # share of the mass that those blocks may lack
    pad_token_id: int = 0
    bos_token_id: int = 2
    stop_token_ids: tuple[int, ...] = (1, 106, 50)  # <eos>, <turn|>, <|tool_response>

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DgemmaError(f"{name} is {value!r}, expected a whole number of at least {least}")
        for name, ids in (("pad", [self.pad_token_id]), ("bos", [self.bos_token_id]), ("stop", self.stop_token_ids)):
            if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
                raise DgemmaError(f"the {name} token id is {ids}, expected whole numbers")
        for name in ("t_min", "t_max", "entropy_bound", "confidence_threshold"):
            value = getattr(self, name)
            # The upper end keeps out infinity and NaN, which compare as neither.
            if not isinstance(value, int | float) or not 0 < value < 1e6:
                raise DgemmaError(f"{name} is {value!r}, expected a number above 0")
        if not isinstance(self.conditioning_epsilon, float) or not 0 < self.conditioning_epsilon < 1:
            raise DgemmaError(f"conditioning_epsilon is {self.conditioning_epsilon!r}, expected a number in (0, 1)")
        if not isinstance(self.drop_tail, bool):
            raise DgemmaError(f"drop_tail is {self.drop_tail!r}, expected true or false")
        if self.stop not in STOP_RULES:
            raise DgemmaError(f"stop is {self.stop!r}, expected one of {', '.join(STOP_RULES)}")
        if self.t_min > self.t_max:
            raise DgemmaError(f"t_min is {self.t_min} and t_max {self.t_max}, expected t_min <= t_max")

    def replace(self, **changes) -> "GenerationConfig":
        """A copy with `changes`; None leaves a value as it is, so command-line options pass straight through."""
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(names)):
            raise DgemmaError(f"setting {unknown[0]!r} is not known, expected some of {', '.join(names)}")
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})


def read_json(path: Path, what: str = "model") -> dict:
    """The JSON object in `path`. Raises DgemmaError when it is missing or not a JSON object.

    what: "model" for a file that was downloaded, else what a person wrote, for the next step an error names.
    """
    mend = "download the file again" if what == "model" else f"correct the {what} file"
    folder = f"a model folder with {path.name} in it" if what == "model" else f"the path of a JSON {what} file"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DgemmaError(f"{path}: not found; expected {folder}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers too long, brackets too deep
        raise DgemmaError(f"{path}: not valid JSON ({error}); {mend}") from None
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{path}: found a {type(value).__name__}, expected a JSON object; {mend}")
    return value


def read_config(folder: Path) -> ModelConfig:
    """The model configuration of a checkpoint folder (Hugging Face's or MLX's)."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), path)


def read_generation_config(folder: Path) -> GenerationConfig:
    """The sampler defaults of a checkpoint folder; transformers' defaults where the file or a key is absent."""
    path = Path(folder) / "generation_config.json"
    return parse_generation_config(read_json(path), path) if path.exists() else GenerationConfig()


def parse_config(raw: dict, path: Path | str = "config.json") -> ModelConfig:
    """config.json as a dictionary → ModelConfig. `path` is named in errors."""
    found = raw.get("model_type")
    if found != "diffusion_gemma":
        hint = OTHER_TOOLS.get(str(found), "this project runs DiffusionGemma checkpoints only")
        raise DgemmaError(f'{path}: model_type is {json.dumps(found)}, expected "diffusion_gemma". {hint}.')
    text = _Section(raw.get("text_config"), path, "text_config")
    if text.get("use_bidirectional_attention") == "all":
        raise DgemmaError(f'{path}: use_bidirectional_attention is "all", expected "vision" or null (a causal encoder)')
    layer_types = _layer_types(text, path)
    global_heads = _global_heads(text, layer_types, path)
    rope = text.section("rope_parameters")
    sliding_rope, full_rope = rope.section(SLIDING), rope.section(FULL)
    hidden_activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if hidden_activation != "gelu_pytorch_tanh":
        raise DgemmaError(f'{path}: hidden_activation is {hidden_activation!r}, expected "gelu_pytorch_tanh"')
    config = ModelConfig(
        vocab_size=text.count("vocab_size"),
        hidden_size=text.count("hidden_size"),
        intermediate_size=text.count("intermediate_size"),
        moe_intermediate_size=text.count("moe_intermediate_size"),
        num_hidden_layers=text.count("num_hidden_layers"),
        num_attention_heads=text.count("num_attention_heads"),
        num_key_value_heads=text.count("num_key_value_heads"),
        head_dim=text.count("head_dim"),
        global_head_dim=global_heads["head_dim"],
        num_global_key_value_heads=global_heads["num_key_value_heads"],
        num_experts=text.count("num_experts"),
        top_k_experts=text.count("top_k_experts"),
        sliding_window=text.count("sliding_window"),
        layer_types=layer_types,
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        final_logit_softcapping=text.number("final_logit_softcapping", 30.0),
        max_position_embeddings=text.count("max_position_embeddings"),
        canvas_length=_Section(raw, path, "config").count("canvas_length", 256),
        sliding_rope_theta=sliding_rope.number("rope_theta", 1e4),
        full_rope_theta=full_rope.number("rope_theta", 1e6),
        full_rotary_factor=full_rope.number("partial_rotary_factor", 0.25),
        vision=raw.get("vision_config"),
        image_token_id=raw.get("image_token_id"),
    )
    if config.top_k_experts > config.num_experts:
        raise DgemmaError(f"{path}: top_k_experts {config.top_k_experts} is above num_experts {config.num_experts}")
    return config


def parse_generation_config(raw: dict, path: Path | str = "generation_config.json") -> GenerationConfig:
    """generation_config.json as a dictionary → GenerationConfig."""
    names = {field.name for field in dataclasses.fields(GenerationConfig)} - {"entropy_bound", "stop_token_ids"}
    known = {name: raw[name] for name in names - OURS if raw.get(name) is not None}
    sampler = _Section(raw.get("sampler_config") or {}, path, "sampler_config").values
    kind = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if kind != "EntropyBoundSamplerConfig":
        raise DgemmaError(f"{path}: sampler {kind!r} is not known, expected EntropyBoundSamplerConfig")
    if "entropy_bound" in sampler:
        known["entropy_bound"] = sampler["entropy_bound"]
    stop = raw.get("eos_token_id")
    if stop is not None:
        known["stop_token_ids"] = tuple(stop) if isinstance(stop, list) else (stop,)
    try:
        return GenerationConfig(**known)
    except DgemmaError as error:
        raise DgemmaError(f"{path}: {error}") from None


def released_spelling(raw: dict) -> dict:
    """config.json with the full-attention heads spelled as in the released checkpoint."""
    config = parse_config(raw)
    text = {key: value for key, value in raw["text_config"].items() if key != "per_layer_config"}
    text["global_head_dim"] = config.global_head_dim
    text["num_global_key_value_heads"] = config.num_global_key_value_heads
    return {**raw, "text_config": text}


class _Section:
    """One JSON object of config.json whose counts must be positive whole numbers."""

    def __init__(self, values, path, name):
        if not isinstance(values, dict):
            raise DgemmaError(f"{path}: {name} is {values!r}, expected a JSON object; download the file again")
        self.values, self.path, self.name = values, path, name

    def get(self, key, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key):
        return _Section(self.get(key, {}), self.path, f"{self.name}.{key}")

    def number(self, key, default):
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise DgemmaError(f"{self.path}: {self.name}.{key} is {value!r}, expected a number above 0")
        return float(value)

    def count(self, key, default=None):
        value = self.get(key, default)
        # The bound keeps an absurd number from becoming an allocation.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise DgemmaError(f"{self.path}: {self.name}.{key} is {value!r}, expected a positive whole number")
        return value


def _layer_types(text, path):
    n_layers = text.count("num_hidden_layers")
    if n_layers > 10_000:
        raise DgemmaError(f"{path}: text_config.num_hidden_layers is {n_layers}, expected at most 10000")
    # By default every sixth layer is full; the last one always is, as transformers has it.
    types = text.get(
        "layer_types", [FULL if (i + 1) % 6 == 0 or i + 1 == n_layers else SLIDING for i in range(n_layers)]
    )
    if not isinstance(types, list) or len(types) != n_layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise DgemmaError(f"{path}: layer_types is {types}, expected {n_layers} of {SLIDING!r} or {FULL!r}")
    if types[-1] != FULL:
        raise DgemmaError(f"{path}: the last of layer_types is {types[-1]!r}, expected {FULL!r}")
    return tuple(types)


def _global_heads(text, layer_types, path):
    """head_dim and num_key_value_heads of the full-attention layers, from either spelling."""
    full = [str(i) for i, kind in enumerate(layer_types) if kind == FULL]
    if text.get("per_layer_config") is not None:
        per_layer = text.section("per_layer_config").values
        found = {json.dumps(per_layer.get(i, {}), sort_keys=True) for i in full}
        if len(found) > 1 or set(per_layer) - set(full):
            raise DgemmaError(f"{path}: per_layer_config {per_layer} must treat the layers {full} alike and no other")
        heads = _Section(per_layer.get(full[0], {}), path, "per_layer_config")
        default_kv = text.count("num_key_value_heads")
        return {
            "head_dim": heads.count("head_dim", text.count("head_dim")),
            "num_key_value_heads": heads.count("num_key_value_heads", default_kv),
        }
    return {
        "head_dim": text.count("global_head_dim", 512),
        "num_key_value_heads": text.count("num_global_key_value_heads", text.get("num_key_value_heads")),
    }
