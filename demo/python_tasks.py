"""Small Python functions: write a body from its docstring, repair a one-token bug; judged by running them.

Shapes   random.Random in, (prompt, answer, truth, content) out; truth is a Function
Source   our own grammar: filter x map x reduce over lists, arithmetic, strings
Differs  candidates run in a child process behind an allow-list, so a bad answer can only fail
"""

import ast
import json
import random
import re
import subprocess
import sys
from typing import NamedTuple


class Function(NamedTuple):
    header: str  # "def total(items):"
    doc: str
    body: str  # a right body, indented
    kind: str  # which INPUTS it takes

    @property
    def source(self):
        return f"{self.header}\n{self.body}"

    @property
    def documented(self):
        return f'{self.header}\n    """{self.doc}"""'


# ruff: noqa: SIM905  word lists read better as text
# fmt: off
FUNCTION_NAMES = ("total pick find build compute check change convert select measure combine prepare result "
                  "answer process handle apply score make derive").split()
LIST_NAMES = "items numbers values data".split()
PAIR_NAMES = (("a", "b"), ("x", "y"), ("m", "n"), ("left", "right"))
TEXT_NAMES = "text word line name".split()
LETTERS = "aeioubcdlmnrst"

FILTERS = (  # words, condition on x; {k} is drawn
    ("numbers", None), ("even numbers", "x % 2 == 0"), ("odd numbers", "x % 2 == 1"), ("positive numbers", "x > 0"),
    ("negative numbers", "x < 0"), ("numbers above {k}", "x > {k}"), ("numbers below {k}", "x < {k}"),
    ("multiples of {k}", "x % {k} == 0"),
)
MAPS = (  # words, value of x
    ("", "x"), ("doubled", "x * 2"), ("squared", "x * x"), ("negated", "-x"), ("plus {k}", "x + {k}"),
    ("minus {k}", "x - {k}"), ("times {k}", "x * {k}"), ("made positive", "abs(x)"),
)
REDUCES = (  # words, function, how a loop starts and goes on
    ("list", None, "[]", "result.append({v})"), ("sum", "sum", "0", "result += {v}"),
    ("count", "len", "0", "result += 1"), ("maximum", "max", None, None), ("minimum", "min", None, None),
    ("sorted list", "sorted", None, None),
)
PAIRS = (
    ("the sum of {a} and {b}", "{a} + {b}"), ("the product of {a} and {b}", "{a} * {b}"),
    ("the difference of {a} and {b}", "{a} - {b}"), ("the larger of {a} and {b}", "max({a}, {b})"),
    ("the smaller of {a} and {b}", "min({a}, {b})"), ("the distance of {a} and {b}", "abs({a} - {b})"),
    ("{a}", "{a}"), ("{b}", "{b}"),
)
AFTER_PAIR = (
    ("Return {e} plus {k}.", "({c}) + {k}"), ("Return {e} minus {k}.", "({c}) - {k}"),
    ("Return {e} times {k}.", "({c}) * {k}"), ("Return {e} modulo {k}.", "({c}) % {k}"),
    ("Return {e} squared.", "({c}) ** 2"), ("Return {e}.", "{c}"),
    ("Return True if {e} is above {k}.", "({c}) > {k}"), ("Return True if {e} is below {k}.", "({c}) < {k}"),
    ("Return True if {e} is even.", "({c}) % 2 == 0"), ("Return True if {e} is odd.", "({c}) % 2 == 1"),
    ("Return True if {e} is a multiple of {k}.", "({c}) % {k} == 0"),
)
BEFORE_TEXT = (("", ""), (" in upper case", ".upper()"), (" in lower case", ".lower()"), (" stripped", ".strip()"),
               (" reversed", "[::-1]"), (" in title case", ".title()"))
TEXTS = (
    ("Return {e}.", "{c}"), ("Return the first {k} letters of {e}.", "{c}[:{k}]"),
    ("Return the last {k} letters of {e}.", "{c}[-{k}:]"), ("Return {e} without its first {k} letters.", "{c}[{k}:]"),
    ("Return {e} repeated {k} times.", "{c} * {k}"),
    ("Return {e} with '{p}' replaced by '{q}'.", "{c}.replace('{p}', '{q}')"),
    ("Return how often '{p}' occurs in {e}.", "{c}.count('{p}')"), ("Return the length of {e}.", "len({c})"),
    ("Return True if {e} starts with '{p}'.", "{c}.startswith('{p}')"),
    ("Return True if {e} ends with '{p}'.", "{c}.endswith('{p}')"), ("Return the words of {e}.", "{c}.split()"),
    ("Return the number of words in {e}.", "len({c}.split())"),
    ("Return the words of {e} joined by '{p}'.", "'{p}'.join({c}.split())"),
)
# fmt: on


def _list_function(rng):
    name = rng.choice(LIST_NAMES)
    keep, condition = (part and part.format(k=k) for k in [rng.randint(2, 19)] for part in rng.choice(FILTERS))
    words, value = (part.format(k=k) for k in [rng.randint(2, 19)] for part in rng.choice(MAPS))
    reduce, call, start, go_on = rng.choice(REDUCES)
    if reduce == "count":  # mapping first would not change a count
        words, value = "", "x"
    if reduce == "list" and condition is None and value == "x":
        return _list_function(rng)
    words = words and f", each {words}"
    doc = f"Return the {reduce} of the {keep} in {name}{words}."
    if start is not None and rng.random() < 0.4:
        lines = [f"result = {start}", f"for x in {name}:"]
        go_on = "    " + go_on.format(v=value)
        lines += [go_on] if condition is None else [f"    if {condition}:", "    " + go_on]
        return name, f"{doc} Use a loop.", [*lines, "return result"], "list"
    made = f"[{value} for x in {name}{f' if {condition}' if condition else ''}]"
    if condition is None and value == "x":
        made = name
    return name, doc, [f"return {call}({made})" if call else f"return {made}"], "list"


def _pair_function(rng):
    a, b = rng.choice(PAIR_NAMES)
    words, code = (part.format(a=a, b=b) for part in rng.choice(PAIRS))
    doc, after = rng.choice(AFTER_PAIR)
    if not re.search(r" [-+*] ", code) or "(" in code:
        after = after.replace("({c})", "{c}")  # brackets only where they matter
    k = rng.randint(2, 19)
    return f"{a}, {b}", doc.format(e=words, k=k), ["return " + after.format(c=code, k=k)], "pair"


def _text_function(rng):
    name = rng.choice(TEXT_NAMES)
    words, before = rng.choice(BEFORE_TEXT)
    doc, code = rng.choice(TEXTS)
    if before == "" and code == "{c}":
        return _text_function(rng)
    p, q = rng.sample(LETTERS, 2)
    k = rng.randint(2, 5)
    return (
        name,
        doc.format(e=name + words, k=k, p=p, q=q),
        ["return " + code.format(c=name + before, k=k, p=p, q=q)],
        "text",
    )


def draw_function(rng):
    make = rng.choices((_list_function, _pair_function, _text_function), (0.5, 0.25, 0.25))[0]
    parameters, doc, lines, kind = make(rng)
    body = "\n".join("    " + line for line in lines)
    return Function(f"def {rng.choice(FUNCTION_NAMES)}({parameters}):", doc, body, kind)


def _inputs():
    rng = random.Random(0)
    words = "Tree apple Rabbit banana sun idea Moon letter notebook salad Under cabin".split()
    lists = [[rng.randint(-25, 40) for _ in range(n)] for n in [0, 1, 2, *[8] * 13]]
    pairs = [[rng.randint(-20, 40), rng.randint(-20, 40)] for _ in range(60)]
    texts = ["", "a", " Sea ", *(" ".join(rng.sample(words, n)) for n in [1, 1, 1, 2, 2, 3, 3, 4, 5])]
    return {"list": [[x] for x in lists], "pair": pairs, "text": [[x] for x in texts]}


INPUTS = _inputs()  # argument lists

# Bugs

_TOKEN = re.compile(r"\d+|'\w'|\w+|==|\*\*|[-+*%<>]")
# fmt: off
_SWAPS = {"+": "-*", "-": "+", "*": "+-", "%": "*", "<": ">", ">": "<", "==": ["!=", ">"], "sum": ["max", "len"],
          "max": ["min"], "min": ["max"], "len": ["sum"], "sorted": ["sum"], "upper": ["lower"], "lower": ["upper"],
          "title": ["upper"], "strip": ["title"], "count": ["find"], "startswith": ["endswith"],
          "endswith": ["startswith"], "split": ["strip"], "abs": ["len"], "result": ["x"]}
# fmt: on


def break_one_token(rng, function):
    """The function with one token of its body exchanged so that it behaves differently."""
    spots = list(_TOKEN.finditer(function.body))
    while True:
        spot = rng.choice(spots)
        token = spot.group()
        if token.isdigit():
            new = str(max(0, int(token) + rng.choice((-2, -1, 1, 2))))
        elif token[0] == "'":
            new = f"'{rng.choice(LETTERS)}'"
        elif token in _SWAPS:
            new = rng.choice(_SWAPS[token])
        elif token.isidentifier() and re.search(rf"\b{token}\b", function.header):
            new = rng.choice([other for other in ("x", "n", "b", "y") if other != token])
        else:
            continue
        broken = function._replace(body=function.body[: spot.start()] + new + function.body[spot.end() :])
        # Our own source, so it may run here; answers of a model never do.
        if outcomes(broken.source, function.kind) != outcomes(function.source, function.kind):
            return broken


# Tasks


def make_complete(rng):
    function = draw_function(rng)
    return f"Complete:\n{function.documented}", function.body, function, function.doc


def make_fix(rng):
    function = draw_function(rng)
    broken = break_one_token(rng, function)
    return f"Fix the bug:\n{function.documented}\n{broken.body}", function.source, function, function.doc


# Judging


def outcomes(source, kind):
    """What a function returns, or which error it raises, for each of its inputs."""
    space = {}
    exec(source, space)
    call = next(value for name, value in space.items() if name != "__builtins__")
    results = []
    for arguments in INPUTS[kind]:
        try:
            results.append(repr(call(*[x[:] if isinstance(x, list) else x for x in arguments])))
        except Exception as error:
            results.append(type(error).__name__)
    return results


# fmt: off
_NODES = (ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.For, ast.If,
          ast.Expr, ast.Name, ast.Load, ast.Store, ast.Constant, ast.List, ast.Tuple, ast.ListComp, ast.comprehension,
          ast.Call, ast.Attribute, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp,
          ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
_CALLS = {"sum", "len", "max", "min", "sorted", "abs"}
_METHODS = {"append", "upper", "lower", "strip", "title", "replace", "count", "startswith", "endswith", "split",
            "join", "find"}
# fmt: on


def _allowed(source):
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    if len(tree.body) != 1 or functions != tree.body or functions[0].decorator_list:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
        if isinstance(node, ast.Attribute) and node.attr not in _METHODS:
            return False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in _CALLS:
            return False
    return True


_CHILD = """
import json, sys
try:
    import resource
    for what, most in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 1 << 29)):
        resource.setrlimit(what, (most, most))
except (ImportError, ValueError, OSError):
    pass  # Windows has no limits, macOS none on memory; the timeout stands everywhere
source, inputs, calls = json.load(sys.stdin)
import builtins
space = {"__builtins__": {name: getattr(builtins, name) for name in calls}}
exec(source, space)
call = next(value for name, value in space.items() if name != "__builtins__")
results = []
for arguments in inputs:
    try:
        results.append(repr(call(*arguments)))
    except Exception as error:
        results.append(type(error).__name__)
json.dump(results, sys.stdout)
"""


def _outcomes_in_child(source, kind, timeout):
    """`outcomes` of source nobody has read: another process, few names, bounded memory and time."""
    message = json.dumps([source, INPUTS[kind], sorted(_CALLS)])
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD], input=message, capture_output=True, text=True, timeout=timeout
        )
        return json.loads(run.stdout)
    except (subprocess.TimeoutExpired, ValueError, OSError):
        return None


def passes(instance, text, timeout=5.0):
    """Does the answer behave like the true function on every input?"""
    function = instance.truth
    source = text.strip("\n") if instance.task == "python_fix" else f"{function.header}\n{text.rstrip()}"
    return behaves_like(source, function, timeout)


def behaves_like(source, function, timeout=5.0):
    """Is this source, which nobody has read, safe to run, and does it return what the function does?"""
    if not _allowed(source):
        return False
    return _outcomes_in_child(source, function.kind, timeout) == outcomes(function.source, function.kind)
