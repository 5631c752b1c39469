// One denoising pass of DiffusionGemma on stock ggml: a GGUF has the weights, its graph description the computation.
//
//   ./denoise MODEL.gguf MODEL.dgraph.json [OPTION=VALUE ...]     options and values are the description's
//
// Prints one JSON line: for every slot of a fixed canvas the likeliest token and the first eight logits.
//
// Shapes   ggml's order, fastest axis first; letters as in the description's "dims" and "runtime_dims"
// Source   docs/formats.md, "Graph description"; docs/llama_cpp.md walks through it and says how to compile this
// Differs  one phase, nothing in the prefix (P = 0), one row, on the CPU. Shapes are left to ggml's own assertions,
//          which end the process: a host that runs strangers' files checks first, as gguf_export/expansion.py does
#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"

using json = nlohmann::json;
using Names = std::map<std::string, int64_t>;
using Sizes = std::array<int64_t, 4>;
using Tensor = ggml_tensor *;
using Context = ggml_context *;

[[noreturn]] void fail(const std::string & what) { throw std::runtime_error(what); }

// Sizes and rules: "N*D", "(P + t) % R", "k > q - W".

struct Expression {
    const std::string & text;
    const Names & names;
    size_t at = 0;

    int64_t value(size_t level = 0) {
        static const std::vector<std::vector<std::string>> LEVELS = {
            {"<=", ">=", "==", "<", ">"}, {"+", "-"}, {"//", "*", "%"}};
        if (level == LEVELS.size()) return atom();
        for (int64_t left = value(level + 1);;) {
            const auto & ops = LEVELS[level];
            const auto op = std::find_if(ops.begin(), ops.end(), [&](const std::string & op) { return eat(op); });
            if (op == ops.end()) return left;
            left = apply(*op, left, value(level + 1));
        }
    }
    int64_t atom() {
        if (eat("(")) {
            const int64_t inner = value();
            if (!eat(")")) fail("expression '" + text + "' lacks a )");
            return inner;
        }
        const size_t start = at;
        while (at < text.size() && (isalnum((unsigned char) text[at]) || text[at] == '_')) at++;
        const std::string word = text.substr(start, at - start);
        if (!word.empty() && isdigit((unsigned char) word[0])) return std::stoll(word);
        if (!names.count(word)) fail("expression '" + text + "' has unknown name '" + word + "'");
        return names.at(word);
    }
    int64_t apply(const std::string & op, int64_t a, int64_t b) {
        if ((op == "//" || op == "%") && b == 0) fail("expression '" + text + "' divides by zero");
        const int64_t ratio = b ? a / b - (a % b != 0 && (a < 0) != (b < 0)) : 0;  // rounded down, as in Python
        if (op == "+" || op == "-") return op == "+" ? a + b : a - b;
        if (op == "*") return a * b;
        if (op == "//" || op == "%") return op == "//" ? ratio : a - ratio * b;
        return op == "<" ? a < b : op == "<=" ? a <= b : op == ">" ? a > b : op == ">=" ? a >= b : a == b;
    }
    bool eat(const std::string & token) {
        while (at < text.size() && text[at] == ' ') at++;
        if (text.compare(at, token.size(), token) != 0) return false;
        at += token.size();
        return true;
    }
};

int64_t evaluate(const json & number, const Names & names) {
    if (!number.is_string()) return number.get<int64_t>();
    Expression e{number.get_ref<const std::string &>(), names};
    const int64_t found = e.value();
    if (!e.eat("") || e.at != e.text.size()) fail("expression '" + e.text + "' goes on where its end is expected");
    return found;
}

Sizes four(const json & list, const Names & names) {
    Sizes all = {1, 1, 1, 1};
    for (size_t i = 0; i < list.size(); i++) all.at(i) = evaluate(list[i], names);
    return all;
}

// Operations: names and named parameters → ggml's functions. The sample phase needs a dozen more.

struct Call {
    Context ctx;
    const json & params;
    const Names & names;
    std::vector<Tensor> in;

    Tensor maybe(size_t i) const { return i < in.size() ? in[i] : nullptr; }
    float number(const char * name) const { return params.at(name); }
    float number(const char * name, float missing) const { return params.value(name, missing); }
    int count(const char * name) const { return (int) evaluate(params.at(name), names); }
    Sizes sizes(const char * name) const { return four(params.at(name), names); }
};
using Op = std::function<Tensor(const Call &)>;

// clang-format off
Op plain(Tensor f(Context, Tensor)) { return [f](auto & c) { return f(c.ctx, c.in.at(0)); }; }
Op plain(Tensor f(Context, Tensor, Tensor)) { return [f](auto & c) { return f(c.ctx, c.in.at(0), c.in.at(1)); }; }
Op plain(Tensor f(Context, Tensor, Tensor, Tensor)) {
    return [f](auto & c) { return f(c.ctx, c.in.at(0), c.in.at(1), c.in.at(2)); }; }
// clang-format on

Tensor rope(const Call & c) {  // no YaRN: nothing scaled, no correction
    if (c.params.at("style") != "neox") fail("unknown style " + c.params["style"].dump());
    const int dims = c.count("dims"), style = GGML_ROPE_TYPE_NEOX;
    return ggml_rope_ext(c.ctx, c.in.at(0), c.in.at(1), c.maybe(2), dims, style, 0, c.number("base"), 1, 0, 1, 0, 0);
}
Tensor view(const Call & c) {  // strides and offset count elements; axes that are left out have one
    const Sizes n = c.sizes("shape");
    Sizes s = c.sizes("strides");
    for (size_t i = c.params.at("strides").size(); i < s.size(); i++) s[i] = s[i - 1];
    const size_t unit = ggml_type_size(c.in.at(0)->type), from = c.count("offset") * unit;
    return ggml_view_4d(c.ctx, c.in[0], n[0], n[1], n[2], n[3], s[1] * unit, s[2] * unit, s[3] * unit, from);
}
Tensor summed_in_float(Tensor product) {  // attention's scores reach tens: half precision would lose what decides
    ggml_prec_set_acc(product, GGML_PREC_F32);
    return product;
}

// clang-format off
const std::map<std::string, Op> OPS = {
    {"add", plain(ggml_add)}, {"mul", plain(ggml_mul)}, {"div", plain(ggml_div)}, {"cont", plain(ggml_cont)},
    {"geglu", plain(ggml_geglu)}, {"geglu_split", plain(ggml_geglu_split)}, {"get_rows", plain(ggml_get_rows)},
    {"mul_mat_id", plain(ggml_mul_mat_id)}, {"out_prod", plain(ggml_out_prod)}, {"set_rows", plain(ggml_set_rows)},
    {"silu", plain(ggml_silu)}, {"sum_rows", plain(ggml_sum_rows)}, {"tanh", plain(ggml_tanh)}, {"rope", rope},
    {"view", view},
    {"argsort_top_k", [](auto & c) { return ggml_argsort_top_k(c.ctx, c.in.at(0), c.count("k")); }},
    {"clamp", [](auto & c) { return ggml_clamp(c.ctx, c.in.at(0), c.number("min"), c.number("max")); }},
    {"rms_norm", [](auto & c) { return ggml_rms_norm(c.ctx, c.in.at(0), c.number("eps")); }},
    {"scale", [](auto & c) { return ggml_scale_bias(c.ctx, c.in.at(0), c.number("factor"), c.number("bias", 0)); }},
    {"soft_max", [](auto & c) { return ggml_soft_max_ext(c.ctx, c.in.at(0), c.maybe(1), c.number("scale", 1), 0); }},
    {"reshape", [](auto & c) { const Sizes n = c.sizes("shape");
        return ggml_reshape_4d(c.ctx, c.in.at(0), n[0], n[1], n[2], n[3]); }},
    {"permute", [](auto & c) { const Sizes a = c.sizes("axes");
        return ggml_permute(c.ctx, c.in.at(0), (int) a[0], (int) a[1], (int) a[2], (int) a[3]); }},
    {"flash_attn", [](auto & c) { return summed_in_float(
        ggml_flash_attn_ext(c.ctx, c.in.at(0), c.in.at(1), c.in.at(2), c.in.at(3), c.number("scale"), 0, 0)); }},
    {"mul_mat", [](auto & c) { const Tensor product = ggml_mul_mat(c.ctx, c.in.at(0), c.in.at(1));
        return c.params.value("precision", "default") == "f32" ? summed_in_float(product) : product; }},
};
const std::map<std::string, ggml_type> TYPES = {
    {"f32", GGML_TYPE_F32}, {"f16", GGML_TYPE_F16}, {"i32", GGML_TYPE_I32}, {"i64", GGML_TYPE_I64}};
// clang-format on

// Expansion: templates, options and symbols → one flat ggml graph.

struct Scope {  // what a name means to a node: the nodes before it, then these sections, then the scope outside
    std::string prefix;
    Names names;
    std::map<std::string, const json *> sections;
    std::map<std::string, Tensor> known;
    Scope * outer;
};

struct Expansion {
    const json & d;
    std::map<std::string, std::string> options;
    Context weights, leaves, nodes;  // stored in the GGUF; made by the host; computed
    std::map<Tensor, const json *> inputs = {};  // and the rule of each
    int n_nodes = 0;

    bool on(const json & entry) {  // whether all its options are chosen
        const json when = entry.value("when", json::object());
        for (auto & [option, value] : when.items())
            if (options[option] != value) return false;
        return true;
    }

    Tensor resolve(const std::string & name, Scope & scope) {
        if (const auto found = scope.known.find(name); found != scope.known.end()) return found->second;
        for (auto & [kind, section] : scope.sections)
            if (section->contains(name) && on(section->at(name)))
                return scope.known[name] = leaf(kind, scope.prefix + name, section->at(name), scope.names);
        if (!scope.outer) fail("unknown name '" + name + "': no earlier node, weight, persistent tensor or input");
        return resolve(name, *scope.outer);
    }

    Tensor leaf(const std::string & kind, const std::string & name, const json & about, const Names & names) {
        const Sizes n = four(about.at("shape"), names);
        if (kind == "weights") {
            const Tensor weight = ggml_get_tensor(weights, name.c_str());
            if (!weight) fail("the GGUF holds no tensor " + name);
            if (!std::equal(n.begin(), n.end(), weight->ne)) fail(name + " has another shape in the GGUF");
            return weight;
        }
        std::string type = about.at("type");
        if (options.count(type)) type = options[type];  // "cache_type"
        if (!TYPES.count(type)) fail(name + " has unknown type '" + type + "'");
        const Tensor tensor = ggml_new_tensor(leaves, TYPES.at(type), 4, n.data());
        if (kind == "inputs") inputs[tensor] = &about;
        return ggml_set_name(tensor, name.c_str());
    }

    void add(const json & node, Scope & scope) {
        if (!on(node)) return;
        const std::string name = node.at("name");
        if (node.contains("layers")) {
            scope.known[name] = layers(resolve(node["layers"], scope), scope);
            return;
        }
        const std::string op = node.at("op"), where = "node " + scope.prefix + name + ": ";
        if (!OPS.count(op)) fail(where + "unknown op '" + op + "'");
        if (scope.known.count(name)) fail(where + "comes twice");
        try {
            const json params = node.value("params", json::object());
            Call call{nodes, params, scope.names, {}};
            for (const std::string input : node.at("inputs")) call.in.push_back(resolve(input, scope));
            scope.known[name] = ggml_set_name(OPS.at(op)(call), (scope.prefix + name).c_str());
        } catch (const std::exception & error) {
            fail(where + error.what());
        }
        n_nodes++;
    }

    Tensor layers(Tensor x, Scope & outer) {
        int i = 0;
        for (const std::string kind : d.at("layers")) {
            const json & t = d.at("templates").at(kind);
            std::string prefix = t.at("weight_prefix");
            prefix.replace(prefix.find("{layer}"), strlen("{layer}"), std::to_string(i++));
            Scope scope{prefix, outer.names, {}, {{"x", x}}, &outer};
            for (const char * kind : {"weights", "persistent"}) scope.sections[kind] = &t.at(kind);
            for (auto & [letter, size] : t.at("dims").items()) scope.names[letter] = evaluate(size, outer.names);
            for (auto & [name, target] : t.at("inputs").items()) scope.known[name] = resolve(target, outer);
            for (const json & node : t.at("nodes")) add(node, scope);
            x = resolve("layer_out", scope);
        }
        return x;
    }
};

// What the host fills in.

void fill(Tensor input, const json & about, Names names) {
    const int64_t T = names["T"], P = names["P"], last = P + T - 1;
    names["pad"] = names["b"] = 0;  // one row without padding
    if (about.contains("value")) {
        for (int64_t t = 0; t < T; t++) {
            names["t"] = t;
            const int64_t value = evaluate(about["value"], names);  // little-endian: an i32 is its first half
            ggml_backend_tensor_set(input, &value, t * ggml_type_size(input->type), ggml_type_size(input->type));
        }
        return;
    }
    if (!about.contains("visible")) fail(std::string(input->name) + " has no rule, expected a value or a mask");
    const json &all = about["visible"].at("all"), &any = about["visible"].at("any");
    const auto holds = [&](const json & rule) { return evaluate(rule, names) != 0; };
    const int64_t S = input->ne[0], R = evaluate(about.at("slots"), names);
    std::vector<ggml_fp16_t> mask(S * T, ggml_fp32_to_fp16(-INFINITY));
    for (int64_t i = 0; i < S * T; i++) {
        const int64_t k = last - ((last - i % S) % R + R) % R;  // the newest token that slot i % S can hold
        names["k"] = k, names["q"] = P + i / S;
        const bool seen = std::all_of(all.begin(), all.end(), holds) || std::any_of(any.begin(), any.end(), holds);
        if (k >= 0 && seen) mask[i] = ggml_fp32_to_fp16(0);
    }
    ggml_backend_tensor_set(input, mask.data(), 0, ggml_nbytes(input));
}

json read_description(const std::string & path) {
    std::ifstream file(path);
    if (!file) fail(path + " cannot be opened");
    json d = json::parse(file, nullptr, false);
    if (!d.is_object()) fail(path + " is no JSON object, expected a graph description");
    const json format = d.value("format", json::object());
    if (format.value("name", "") != "dgemma-graph" || format.value("major", 0) != 2)
        fail(path + ": format is " + format.dump() + ", expected dgemma-graph 2.x");
    return d;
}

Context read_weights(const std::string & path, const std::string & architecture) {
    Context weights = nullptr;  // in host memory; for a GPU: no_alloc, ggml_backend_alloc_ctx_tensors, and copy
    gguf_context * gguf = gguf_init_from_file(path.c_str(), {/*no_alloc*/ false, &weights});
    if (!gguf) fail(path + " cannot be read as GGUF");
    const int64_t key = gguf_find_key(gguf, "general.architecture");
    const std::string found = key < 0 ? "no architecture" : gguf_get_val_str(gguf, key);
    if (found != architecture) fail(path + " holds " + found + ", the description is of " + architecture);
    gguf_free(gguf);
    return weights;
}

int main(int argc, char ** argv) try {
    if (argc < 3) fail("usage: denoise MODEL.gguf MODEL.dgraph.json [OPTION=VALUE ...]");
    const json d = read_description(argv[2]);
    const json & phase = d.at("phases").at("denoise");

    std::map<std::string, std::string> options;
    for (auto & [name, values] : d.at("options").items()) options[name] = values.at(0);
    for (const std::string & text : std::vector<std::string>(argv + 3, argv + argc)) {
        const std::string name = text.substr(0, text.find('=')), value = text.substr(text.find('=') + 1);
        const json allowed = d["options"].value(name, json::array());
        if (std::count(allowed.begin(), allowed.end(), value) == 0)
            fail("option is " + text + ", expected one of " + d["options"].dump());
        options[name] = value;
    }
    for (auto & [name, value] : phase.at("options").items()) options[name] = value;  // "pass"

    // Sizes: those of the model, then those the host chooses. Here one row, nothing in the prefix, one canvas.
    Names names = d.at("dims").get<Names>();
    const int64_t P = 0, T = evaluate(phase.at("sizes").at("T"), names);
    names["B"] = 1, names["P"] = P, names["T"] = T, names["M"] = T;
    const auto rounded = [U = names.at("U")](int64_t n) { return (n + U - 1) / U * U; };
    names["R_sliding"] = rounded(names.at("W") - 1 + T), names["R_full"] = rounded(P + T);
    names["S_sliding"] = std::min(rounded(P + T), names["R_sliding"]), names["S_full"] = rounded(P + T);

    // Room for headers only, data comes below. A top-k sort is two of ggml's nodes.
    size_t room = 64 + 2 * phase.at("nodes").size();
    for (const std::string kind : d.at("layers")) room += 2 * d.at("templates").at(kind).at("nodes").size();
    const ggml_init_params headers = {
        room * ggml_tensor_overhead() + ggml_graph_overhead_custom(room, false), nullptr, /*no_alloc*/ true};
    const Context weights = read_weights(argv[1], d.at("model").at("architecture"));
    Expansion e{d, options, weights, ggml_init(headers), ggml_init(headers)};
    Scope scope{"", names, {{"inputs", &phase.at("inputs")}}, {}, nullptr};
    for (const char * kind : {"weights", "derived", "persistent"}) scope.sections[kind] = &d.at(kind);
    for (const json & node : phase.at("nodes")) e.add(node, scope);
    const Tensor logits = e.resolve(phase.at("outputs").at(0), scope);

    ggml_cgraph * graph = ggml_new_graph_custom(e.nodes, room, false);
    ggml_set_output(logits);
    ggml_build_forward_expand(graph, logits);

    // A library with its backends built in needs no folder of libggml-cpu-*.so.
    if (ggml_backend_dev_count() == 0) ggml_backend_load_all_from_path(getenv("GGML_LIBRARY"));
    const ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!backend) fail("ggml finds no CPU; set GGML_LIBRARY to the folder of its libraries");
    const ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    if (void * set_n_threads = ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"))
        ((ggml_backend_set_n_threads_t) set_n_threads)(backend, std::thread::hardware_concurrency());
    const ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(e.leaves, backend);
    const ggml_gallocr_t allocator = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
    if (!buffer || !ggml_gallocr_alloc_graph(allocator, graph)) fail("too little memory");

    // An empty prefix, and no belief from a step before. Exact self-conditioning multiplies that belief with a derived
    // table, so the table stays zero too; a host that goes on makes it when it loads.
    ggml_backend_buffer_clear(buffer, 0);
    for (auto & [input, about] : e.inputs) fill(input, *about, names);
    std::vector<int32_t> canvas(T);
    for (int64_t i = 0; i < T; i++) canvas[i] = (int32_t) ((7 * i + 3) % names["V"]);
    ggml_backend_tensor_set(e.resolve("canvas", scope), canvas.data(), 0, T * sizeof(int32_t));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) fail("ggml could not compute the graph");

    const int64_t V = logits->ne[0];
    std::vector<float> found(V * T);
    ggml_backend_tensor_get(logits, found.data(), 0, ggml_nbytes(logits));
    json out = {{"nodes", e.n_nodes}, {"argmax", json::array()}, {"logits", json::array()}};
    for (auto row = found.begin(); row != found.end(); row += V) {
        out["argmax"].push_back(std::max_element(row, row + V) - row);
        out["logits"].push_back(std::vector<float>(row, row + 8));
    }
    std::cout << out << std::endl;
    return 0;
} catch (const std::exception & error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
}
