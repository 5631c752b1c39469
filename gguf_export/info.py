"""What a GGUF file holds, as data and as text. Only its header and a few small tensors are read.

Source   gguf.LlamaFileType for the names of general.file_type
Differs  bits per weight are counted over stored bytes, so a role's scales are in; rope_freqs.weight, which nobody
         trained, counts as a tensor and as bytes but not as parameters
"""

import dataclasses
import math
import re
from collections import Counter

from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import ARCHITECTURE, SAMPLER_KEYS, TOKENS, check_architecture
from mlx_dgemma.gguf.model import FUSED, SPLIT, check_model
from mlx_dgemma.gguf.reader import GgufFile
from mlx_dgemma.tensors import ENCODER_LAYER_TENSORS, LAYER_TENSORS, MODEL_TENSORS, ROLES
from mlx_dgemma.units import count, human_bytes

ROLE_OF = {row.gguf: row.role for row in (*MODEL_TENSORS, *LAYER_TENSORS, *ENCODER_LAYER_TENSORS)}
ROLE_OF |= {f"{name}.weight": ROLE_OF[f"{FUSED}.weight"] for name in SPLIT}
OTHER = "other"
GUESSED = 1024  # llama.cpp adds it to a file type it has read from the tensors
MAX_TEXT = 100  # characters shown of a file's own text
SAMPLER_FIELDS = tuple(row.field for row in SAMPLER_KEYS.values())
MERGES, TEMPLATE = "tokenizer.ggml.merges", "tokenizer.chat_template"


def summarize(file: GgufFile) -> dict:
    """Everything `info` says. A file that is no whole DiffusionGemma is described too, with the reason as "problem"."""
    config, generation, problem = _model(file)
    architecture, kind = _text(file, "general.architecture"), _text(file, "general.type") or "model"
    return {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "architecture": architecture,
        "type": kind,
        "supported": problem is None,
        "problem": problem,
        "name": _text(file, "general.name"),
        "layers": _whole(file, f"{architecture}.block_count"),
        "sliding_layers": config and sum(layer.is_sliding for layer in config.layers),
        "context_length": _whole(file, f"{architecture}.context_length"),
        "canvas_length": _whole(file, "diffusion.canvas_length"),
        "parameters": sum(_weights(t) for t in file.tensors.values()),
        "tensors": len(file.tensors),
        "types": _histogram(file),
        "recipe": _recipe(file),
        "roles": _roles(file),
        "tokenizer": {
            "kind": _text(file, "tokenizer.ggml.model"),
            "tokens": _length(file, TOKENS),
            "merges": _length(file, MERGES),
        },
        "chat_template": isinstance(file.get(TEMPLATE), str),
        "sampler": generation and dataclasses.asdict(generation),
        "missing": _missing(file)
        if architecture == ARCHITECTURE and _text(file, "general.type") in (None, "model")
        else [],
    }


def as_text(summary: dict) -> str:
    """A summary for people."""
    s, tokenizer, sampler = summary, summary["tokenizer"], summary["sampler"]
    lines = [
        ("file", f"{s['file']}, {human_bytes(s['bytes'])}"),
        ("architecture", f"{s['architecture'] or 'not said'}{_remark(s)}"),
        ("name", s["name"] or "not said"),
        ("parameters", f"{_human(s['parameters'])} in {count(s['tensors'], 'tensor')}"),
        ("layers", _layers(s)),
        ("context", _tokens(s["context_length"])),
        ("canvas", _tokens(s["canvas_length"])),
        ("recipe", s["recipe"] or "not said"),
        ("types", _types(s["types"])),
        ("tokenizer", f"{tokenizer['kind'] or 'none'}, {_tokens(tokenizer['tokens'])}, {tokenizer['merges']} merges"),
        ("chat template", "yes" if s["chat_template"] else "no"),
    ]
    if sampler:
        lines.append(("sampler", ", ".join(f"{name} {sampler[name]}" for name in SAMPLER_FIELDS)))
        lines.append(("stop ids", ", ".join(map(str, sampler["stop_token_ids"]))))
    lines += [("missing", what) for what in s["missing"]]
    if s["problem"]:
        lines.append(("problem", s["problem"]))
    return "\n".join([*(f"{name:<15}{value}" for name, value in lines), *_role_table(s["roles"])])


def _model(file) -> tuple[ModelConfig | None, GenerationConfig | None, str | None]:
    """Both configurations, or why there are none."""
    try:
        check_architecture(file)
        model = check_model(file)
    except DgemmaError as error:
        return None, None, str(error).removeprefix(f"{file.path}: ")
    return model.config, model.generation, None


def _remark(s):
    if s["supported"]:
        return ""
    return " (does not run here)" if s["type"] == "model" else f" (of what this {s['type']} belongs to)"


def _missing(file) -> list[str]:
    """What a DiffusionGemma file may lack and still be read, and what that means."""
    absent = [key for key in SAMPLER_KEYS if key not in file.metadata]
    found = []
    if absent:
        found.append(f"{', '.join(absent)}: the reference's defaults are used")
    if rope.NAME not in file.tensors:
        found.append(f"{rope.NAME}: a quarter of the frequency pairs is taken to rotate; llama.cpp would rotate all")
    tokens, kind = _length(file, TOKENS), file.get("tokenizer.ggml.model")
    if not tokens:
        found.append(f"{TOKENS}: no text can go in or come out")
    elif "token_embd.weight" in file.tensors and tokens < (rows := file.tensors["token_embd.weight"].shape[0]):
        found.append(f"{rows - tokens} of {rows} tokens: the model's last rows have no text")
    if kind == "gemma4" and not _length(file, MERGES):
        found.append(f"{MERGES}: text cannot be split into tokens")
    if not isinstance(file.get(TEMPLATE), str):
        found.append(f"{TEMPLATE}: a chat cannot be put into the model's form")
    return found


def _roles(file) -> list[dict]:
    """One row per role, in the order of the table of roles."""
    roles = {role: [] for role in (*ROLES, OTHER)}
    for t in file.tensors.values():
        roles[ROLE_OF.get(re.sub(r"^blk\.\d+\.", "", t.name), OTHER)].append(t)
    return [_role(role, tensors) for role, tensors in roles.items() if tensors]


def _role(role, tensors):
    weights, nbytes = sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
    return {
        "role": role,
        "tensors": len(tensors),
        "types": dict(Counter(_type_name(t) for t in tensors).most_common()),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / weights, 3),
    }


def _role_table(roles):
    if roles:
        yield ""
        yield f"{'role':<18} {'tensors':>7} {'weights':>9} {'size':>10} {'bits/weight':>11}  types"
    for r in roles:
        weights, size = _human(r["weights"]), human_bytes(r["bytes"])
        numbers = f"{r['tensors']:>7} {weights:>9} {size:>10} {r['bits_per_weight']:>11.2f}"
        yield f"{r['role']:<18} {numbers}  {_types(r['types'])}"


def _layers(s):
    if s["sliding_layers"] is None:
        return "not said" if s["layers"] is None else str(s["layers"])
    return f"{s['layers']}: {s['sliding_layers']} sliding, {s['layers'] - s['sliding_layers']} full attention"


def _tokens(n):
    return "not said" if n is None else count(n, "token")


def _types(histogram):
    return ", ".join(f"{name} {n}" for name, n in histogram.items()) or "none"


def _histogram(file):
    return dict(Counter(_type_name(t) for t in file.tensors.values()).most_common())


def _type_name(tensor):
    """As llama.cpp prints it: "q4_K"."""
    return tensor.type.name.lower().replace("_k", "_K")


def _recipe(file) -> str | None:
    """llama-quantize's name for general.file_type, which says what was asked for and not what each tensor got."""
    import gguf

    number = _whole(file, "general.file_type")
    if number is None:
        return None
    names = {t.value: t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in gguf.LlamaFileType}
    return names.get(number & ~GUESSED, f"unknown (general.file_type {number})")


def _weights(tensor):
    return 0 if tensor.name == rope.NAME else math.prod(tensor.shape)


def _text(file, key) -> str | None:
    """A file's own text on one line without terminal codes, since it may be shown."""
    value = file.get(key)
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else "?" for c in value[:MAX_TEXT])


def _whole(file, key) -> int | None:
    value = file.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _length(file, key) -> int:
    value = file.get(key)
    return len(value) if isinstance(value, list) else 0


def _human(n):
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)
