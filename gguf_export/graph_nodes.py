"""The computation itself, as nodes: one layer of either kind, and what surrounds the layers in each phase.

Shapes   `ne` order, fastest axis first: hidden states are [H, M]. M = T × B tokens, row after row of the batch.
         Letters as in graph.py's DIMS; D, G, S and R are those of the layer's kind
Source   transformers 5.23.0, modeling_diffusion_gemma.py and generation_diffusion_gemma.py; the same steps as
         mlx_dgemma/model.py and sampler.py, in ggml's operations
Differs  one mean square of the residual serves the three norms that read it; the softcap's division happens before the
         product with the vocabulary

The product with weight X.weight is called X, and so is the norm with that weight: names are shared with the MLX
model, so a disagreement is found by name. A node with "when" is there only under those options.
"""

import math

ENCODER, DECODER = {"pass": "encoder"}, {"pass": "decoder"}
FLASH, EXACT_ATTENTION = {"attention": "flash"}, {"attention": "exact"}
EXACT, TOP_K = {"self_conditioning": "exact"}, {"self_conditioning": "top-k"}
# The same functions in operations that suit GPUs (few kernels), or ggml's CPU (threaded, no lookup in float16).
GPU, CPU = {"form": "gpu"}, {"form": "cpu"}
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
VOCABULARY_BLOCK = 512  # one float32 sum over 262,144 terms would lose the small ones; as in mlx_dgemma/sampler.py


class Nodes(list):
    """Nodes in the order in which they are computed; each call appends one and returns its name."""

    def __init__(self, eps: float):
        self.eps = eps

    def add(self, name, op, *inputs, when=None, **params):
        node = {"name": name, "op": op, "inputs": list(inputs)}
        if params:
            node["params"] = params
        if when:
            node["when"] = when
        self.append(node)
        return name

    def norm(self, name, x):
        """RMSNorm with weight `name`.weight."""
        return self.add(name, "mul", self.rms(name + "_rms", x), name + ".weight")

    def rms(self, name, x):
        return self.add(name, "rms_norm", x, eps=self.eps)

    def linear(self, name, x):
        return self.add(name, "mul_mat", name + ".weight", x)

    def reshape(self, name, x, *shape, when=None):
        return self.add(name, "reshape", x, shape=list(shape), when=when)


def layer_nodes(layer, config, split_experts: bool) -> Nodes:
    """One layer; "x" is its input and "layer_out" its result. `layer` is any layer of the kind."""
    n = Nodes(config.rms_norm_eps)
    attended = _attention(n, layer)
    residual = n.add("attn_residual", "add", "x", n.norm("post_attention_norm", attended))
    unit = n.rms("residual_rms", residual)
    dense = n.norm("post_ffw_norm_1", _dense(n, n.add("ffn_norm", "mul", unit, "ffn_norm.weight")))
    ids, weights = _router(n, unit, config)
    chosen = _experts(
        n, n.add("pre_ffw_norm_2", "mul", unit, "pre_ffw_norm_2.weight"), ids, weights, config, split_experts
    )
    mixed = n.add("ffn_mixed", "add", dense, n.norm("post_ffw_norm_2", chosen))
    total = n.add("ffn_residual", "add", residual, n.norm("post_ffw_norm", mixed))
    n.add("layer_out", "mul", total, "enc_layer_output_scale.weight", when=ENCODER)
    n.add("layer_out", "mul", total, "layer_output_scale.weight", when=DECODER)
    return n


def _attention(n, layer):
    x = n.norm("attn_norm", "x")
    q = n.norm("attn_q_norm", n.reshape("q_heads", n.linear("attn_q", x), "D", "N", "M"))
    k_heads = n.reshape("k_heads", n.linear("attn_k", x), "D", "G", "M")
    k = n.norm("attn_k_norm", k_heads)
    # Full layers store no v projection: their values are the k projection, before k_norm and RoPE.
    v_heads = n.reshape("v_heads", n.linear("attn_v", x), "D", "G", "M") if layer.has_v_proj else k_heads
    v = n.rms("v_norm", v_heads)
    factors = [] if layer.is_sliding else ["rope_freqs.weight"]
    q, k = (
        n.add(name, "rope", heads, "positions", *factors, dims="D", base=layer.rope_theta, style="neox")
        for name, heads in (("q_rope", q), ("k_rope", k))
    )
    # The canvas is written behind the prefix too: nothing reads those slots once the prefix has grown over them.
    keys, values = (_stored(n, what, new) for what, new in (("keys", k), ("values", v)))
    queries = n.add("queries", "permute", n.reshape("q_rows", q, "D", "N", "T", "B"), axes=[0, 2, 1, 3])
    # q_norm and k_norm set the scale of the scores, so there is no 1 / sqrt(D).
    n.add("attended", "flash_attn", queries, keys, values, "mask", scale=1.0, when=FLASH)
    # Scores reach tens, since nothing scales them down: half-precision sums would lose what decides.
    scores = n.add("scores", "mul_mat", keys, queries, precision="f32", when=EXACT_ATTENTION)
    shares = n.add("shares", "soft_max", scores, "mask", scale=1.0, when=EXACT_ATTENTION)
    turned = n.add("values_turned", "permute", values, axes=[1, 0, 2, 3], when=EXACT_ATTENTION)
    columns = n.add("values_columns", "cont", turned, when=EXACT_ATTENTION)
    context = n.add("context", "mul_mat", columns, shares, precision="f32", when=EXACT_ATTENTION)
    tokens = n.add("context_tokens", "permute", context, axes=[0, 2, 1, 3], when=EXACT_ATTENTION)
    n.add("attended", "cont", tokens, when=EXACT_ATTENTION)
    return n.linear("attn_output", n.reshape("attended_rows", "attended", "N*D", "M"))


def _stored(n, what, new):
    """Write the new tokens into their slots, then look at the first S slots of every row as heads."""
    rows = n.reshape(f"{what}_rows", new, "D*G", "M")
    target = n.reshape(f"{what}_slots", what, "D*G", "R*B")
    written = n.add(f"{what}_written", "set_rows", target, rows, "slots")
    strides = [1, "D*G", "D", "D*G*R"]
    return n.add(f"{what}_seen", "view", written, shape=["D", "S", "G", "B"], strides=strides, offset=0)


def _dense(n, x):
    return n.linear("ffn_down", _geglu(n, "ffn_act", n.linear("ffn_gate", x), n.linear("ffn_up", x)))


def _geglu(n, name, gate, up):
    """gelu(gate) × up. ggml's CPU looks gelu up in a float16 table; the CPU's form is built from what it computes.

    gelu(x) = x σ(y) with y = x d and d = GELU_SLOPE (1 + 0.044715 x²), so it is silu(y) / d; d is never 0.
    """
    n.add(name, "geglu_split", gate, up, when=GPU)
    return _cpu_geglu(n, name, gate, up)


def _cpu_geglu(n, name, gate, up):
    square = n.add(f"{name}_square", "mul", gate, gate, when=CPU)
    slope = n.add(f"{name}_slope", "scale", square, factor=0.044715 * GELU_SLOPE, bias=GELU_SLOPE, when=CPU)
    silu = n.add(f"{name}_silu", "silu", n.add(f"{name}_in", "mul", slope, gate, when=CPU), when=CPU)
    gelu = n.add(f"{name}_gelu", "div", silu, slope, when=CPU)
    return n.add(name, "mul", gelu, up, when=CPU)


def _router(n, unit, config):
    """Expert numbers [K, M] and their weights [1, K, M]. Reads the raw residual, through a norm without weight."""
    scaled = n.add("router_in", "mul", unit, "ffn_gate_inp.scale")
    scaled = n.add("router_scaled", "scale", scaled, factor=config.hidden_size**-0.5)
    scores = n.add("ffn_gate_inp", "mul_mat", "ffn_gate_inp.weight", scaled, precision="f32")
    # The clamp changes nothing but NaN, with which a sort may run out of its memory.
    shares = n.add("router_shares", "clamp", n.add("router_softmax", "soft_max", scores), min=0.0, max=1.0)
    ids = n.add("experts", "argsort_top_k", shares, k="K")
    rows = n.reshape("router_rows", shares, 1, "E", "M")
    chosen = n.reshape("router_chosen", n.add("router_top", "get_rows", rows, ids), "K", "M")
    scaled = n.add("expert_scaled", "mul", shares, "ffn_down_exps.scale")
    scaled_rows = n.reshape("expert_scaled_rows", scaled, 1, "E", "M")
    weights = n.reshape("expert_scaled_chosen", n.add("expert_scaled_top", "get_rows", scaled_rows, ids), "K", "M")
    weights = n.add("expert_weights", "div", weights, n.add("router_sum", "sum_rows", chosen))
    return ids, n.reshape("expert_weight_rows", weights, 1, "K", "M")


def _experts(n, x, ids, weights, config, split):
    x = n.reshape("expert_in", x, "H", 1, "M")
    if split:
        gate, up = (n.add(f"ffn_{p}_exps", "mul_mat_id", f"ffn_{p}_exps.weight", x, ids) for p in ("gate", "up"))
        act = _geglu(n, "expert_act", gate, up)
    else:
        both = n.add("ffn_gate_up_exps", "mul_mat_id", "ffn_gate_up_exps.weight", x, ids)  # gate rows first
        n.add("expert_act", "geglu", both, when=GPU)
        strides = [1, "2*F", "2*F*K"]
        gate, up = (
            n.add(f"expert_{half}", "view", both, shape=["F", "K", "M"], strides=strides, offset=offset, when=CPU)
            for half, offset in (("gate", 0), ("up", "F"))
        )
        act = _cpu_geglu(n, "expert_act", gate, up)
    out = n.add("ffn_down_exps", "mul_mat_id", "ffn_down_exps.weight", act, ids)  # [H, K, M]
    product = n.add("experts_product", "out_prod", out, weights, when=CPU)  # [H, 1, M]
    n.reshape("experts_out", product, "H", "M", when=CPU)
    # Not every GPU has out_prod: there one view per expert, added up.
    weighted = n.add("experts_weighted", "mul", out, weights, when=GPU)
    total, *parts = (
        n.add(f"expert_{k}", "view", weighted, shape=["H", "M"], strides=[1, "H*K"], offset=f"{k}*H", when=GPU)
        for k in range(config.top_k_experts)
    )
    for k, part in enumerate(parts, 1):
        total = n.add(f"experts_to_{k}", "add", total, part, when=GPU)
    n.add("experts_out", "cont", total, when=GPU) if not parts else n[-1].update(name="experts_out")
    return "experts_out"


def prefill_nodes(config) -> Nodes:
    n = Nodes(config.rms_norm_eps)
    _layers(n, _embed(n, "tokens", config))
    n.norm("output_norm", "layers_out")
    return n


def denoise_nodes(config) -> Nodes:
    n = Nodes(config.rms_norm_eps)
    embedded = _embed(n, "canvas", config)
    n.add("soft_sum", "mul_mat", "embedding_columns", "sc_shares", when=EXACT)
    ids = n.reshape("soft_ids", "sc_tokens", "X*M", when=TOP_K)
    rows = n.add("soft_rows", "get_rows", "token_embd.weight", ids, when=TOP_K)  # [H, X·M]
    tokens = n.reshape("soft_tokens", rows, "H", "X", "M", when=TOP_K)
    weights = n.reshape("soft_rows_weights", "sc_weights", 1, "X", "M", when=TOP_K | CPU)
    n.add("soft_product", "out_prod", tokens, weights, when=TOP_K | CPU)  # [H, 1, M]
    turned = n.add("soft_turned", "permute", tokens, axes=[1, 0, 2, 3], when=TOP_K | GPU)
    columns = n.add("soft_columns", "cont", turned, when=TOP_K | GPU)  # [X, H, M]
    weights = n.reshape("soft_weights", "sc_weights", "X", 1, "M", when=TOP_K | GPU)
    n.add("soft_product", "mul_mat", columns, weights, when=TOP_K | GPU)  # [H, 1, M]
    n.reshape("soft_sum", "soft_product", "H", "M", when=TOP_K)
    soft = n.add("soft_embedding", "scale", "soft_sum", factor=config.hidden_size**0.5)
    x = n.norm("self_cond_pre_norm", soft)
    act = _geglu(n, "self_cond_act", n.linear("self_cond_gate", x), n.linear("self_cond_up", x))
    total = n.add("self_cond_sum", "add", embedded, n.linear("self_cond_down", act))
    _layers(n, n.rms("self_cond_out", total))
    hidden = n.norm("output_norm", "layers_out")
    cap = config.final_logit_softcapping
    capped = n.add("hidden_capped", "scale", hidden, factor=1.0 / cap)
    raw = n.add("logits_raw", "mul_mat", "token_embd.weight", capped)
    n.add("logits", "scale", n.add("logits_tanh", "tanh", raw, when=GPU), factor=cap, when=GPU)
    # tanh runs on one thread of ggml's CPU, silu on all: tanh(y) = 2 silu(z) / z - 1 with z = 2 y, kept off 0.
    double = n.add("logits_double", "scale", raw, factor=2.0, bias=1e-20, when=CPU)
    ratio = n.add("logits_ratio", "div", n.add("logits_silu", "silu", double, when=CPU), double, when=CPU)
    n.add("logits", "scale", ratio, factor=2 * cap, bias=-cap, when=CPU)
    return n


def sample_nodes(config) -> Nodes:
    """Temperature, draft, sample, entropies, acceptance, renoise, and what the next step reads: one static graph."""
    n = Nodes(config.rms_norm_eps)
    V = config.vocab_size
    # Element by element against a full row: ggml's CPU broadcasts a single number far more slowly.
    temperatures = n.add("temperatures", "repeat", "temperature", shape=["V", 1, "B"])
    divided = n.add("divided", "div", n.reshape("logits_rows", "logits", "V", "C", "B"), temperatures)
    processed = n.reshape("processed", divided, "V", "M")
    n.add("draft", "argmax", processed)
    shares = n.add("token_shares", "soft_max", processed)
    _entropies(n, shares)
    sampled = _sample(n, shares, V)
    _accept(n)
    # accepted × sampled + (1 − accepted) × renoise, exact: token ids are below 2^24
    change = n.add(
        "change", "mul", n.reshape("accepted_row", "accepted", 1, "M"), n.add("gain", "sub", sampled, "renoise")
    )
    # The clamp changes nothing, and shows that these ids are within the vocabulary where denoise looks them up.
    within = n.add("next_bounded", "clamp", n.add("next_floats", "add", "renoise", change), min=0.0, max=V - 1.0)
    tokens = n.add("next_tokens", "cast", within, type="i32")
    n.add("next_canvas", "cpy", n.reshape("next_row", tokens, "M"), "canvas")
    n.add("sc_shares_next", "cpy", shares, "sc_shares", when=EXACT)
    top = n.add("sc_top", "top_k", shares, k="X", when=TOP_K)
    rows = n.reshape("share_rows", shares, 1, "V", "M", when=TOP_K)
    chosen = n.add("sc_chosen", "get_rows", rows, top, when=TOP_K)
    n.add("sc_tokens_next", "cpy", top, "sc_tokens", when=TOP_K)
    n.add("sc_weights_next", "cpy", n.reshape("sc_chosen_rows", chosen, "X", "M", when=TOP_K), "sc_weights", when=TOP_K)
    return n


def _entropies(n, shares):
    logs = n.add("share_logs", "log", n.add("shares_above_zero", "clamp", shares, min=1e-37, max=1.0))
    sums = n.add("entropy_sums", "sum_rows", n.add("share_times_log", "mul", shares, logs))  # [1, M]
    # NaN becomes a large entropy: a sort may run out of its memory on NaN.
    n.add("entropy", "clamp", n.add("entropy_raw", "scale", sums, factor=-1.0), min=0.0, max=1e6)


def _sample(n, shares, V):
    """One token per slot by inverting the cumulative distribution at `uniforms`; blocks first, then inside one.

    Returns [1, M] float token ids.
    """
    block = min(VOCABULARY_BLOCK, V)
    blocks = -(-V // block)
    padded = n.add("shares_padded", "pad", shares, right=blocks * block - V) if V % block else shares
    by_block = n.reshape("shares_by_block", padded, block, blocks, "M")
    sums = n.reshape("block_sums", n.add("block_totals", "sum_rows", by_block), blocks, "M")
    up_to = n.add("up_to_block", "cumsum", sums)
    last = n.add("total_seen", "view", up_to, shape=[1, "M"], strides=[1, blocks], offset=blocks - 1)
    target = n.add("target", "mul", n.add("total", "cont", last), "uniforms")  # [1, M]
    targets = n.add("targets", "repeat", target, shape=[blocks, "M"])
    below = n.add("blocks_below", "step", n.add("block_distance", "sub", targets, up_to))
    number = n.add("block", "clamp", n.add("block_count", "sum_rows", below), min=0.0, max=blocks - 1.0)  # [1, M]
    before = n.add("before_block", "sum_rows", n.add("sums_below", "mul", sums, below))
    first = n.add("first_blocks", "scale", n.add("slots_counted", "arange", stop="M"), factor=float(blocks))
    at = n.add("block_row_float", "add", n.reshape("first_block_row", first, 1, "M"), number)
    row = n.reshape("block_row", n.add("block_row_ids", "cast", at, type="i32"), "M")
    inside = n.add("inside", "get_rows", n.reshape("block_rows", padded, block, f"{blocks}*M"), row)  # [block, M]
    up_to = n.add("up_to_token", "cumsum", inside)
    rest = n.add("rests", "repeat", n.add("rest", "sub", target, before), shape=[block, "M"])
    count = n.add("token_count", "sum_rows", n.add("tokens_below", "step", n.add("token_distance", "sub", rest, up_to)))
    token = n.add("token_float", "add", n.add("block_start", "scale", number, factor=float(block)), count)
    # Rounding may step past the last entry with mass; the last token of the vocabulary is the bound.
    return n.add("sampled", "clamp", token, min=0.0, max=V - 1.0)


def _accept(n):
    """From surest to least sure, keep slots while the entropy spent before is within the bound. [C, B] of 0 and 1

    A slot that is not free spends nothing, so that it comes first, and is not kept.
    """
    counted = n.add("entropy_counted", "clamp", n.add("entropy_free", "mul", "entropy", "free"), min=0.0, max=1e6)
    rows = n.reshape("entropy_rows", counted, "C", "B")
    order = n.add("order", "argsort", rows, order="ascending")
    cost = n.reshape("cost", n.add("cost_rows", "get_rows", n.reshape("entropy_slots", counted, 1, "C", "B"), order),
                     "C", "B")  # fmt: skip
    spent = n.add("spent_before", "sub", n.add("spent", "cumsum", cost), cost)
    too_much = n.add("too_much", "step", n.add("overspent", "sub", spent, "entropy_bound"))
    kept = n.add("kept", "scale", too_much, factor=-1.0, bias=1.0)
    rank = n.add("rank", "argsort", n.add("order_float", "cast", order, type="f32"), order="ascending")
    back = n.add("accepted_rows", "get_rows", n.reshape("kept_slots", kept, 1, "C", "B"), rank)
    within = n.reshape("within_bound", back, "C", "B")
    n.add("accepted", "mul", within, n.reshape("free_rows", "free", "C", "B"))


def _embed(n, tokens, config):
    rows = n.add("token_rows", "get_rows", "token_embd.weight", tokens)
    return n.add("embedded", "scale", rows, factor=config.hidden_size**0.5)


def _layers(n, x):
    """Stands for the whole stack, one instance of a template after the other."""
    n.append({"name": "layers_out", "layers": x})
