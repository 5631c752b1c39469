"""What was measured: a JSON file that grows model by model, and tables for people.

Source   docs/quality.md has every field
Differs  a file is rewritten whole after each model and moved into place, so that an interrupted run loses one model
"""

import json
from pathlib import Path

from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import replace_text

from .quality_scores import typical

FORMAT, VERSION = "dgemma-quality", 1
TYPICAL = "typical"
HEADLINE = "self_conditioned"  # the pass that a model spends nearly all its steps in


def new_report(setting: dict) -> dict:
    """setting: what two reports must share to be compared."""
    return {"format": FORMAT, "version": VERSION, "setting": setting, "reference": None, "candidates": []}


def read_report(path: str | Path) -> dict:
    """Raises DgemmaError for what is no report."""
    report = read_json(Path(path), "report")
    if (report.get("format"), report.get("version")) != (FORMAT, VERSION) or not isinstance(
        report.get("setting"), dict
    ):
        raise DgemmaError(
            f"{path}: found format {report.get('format')!r} {report.get('version')}, expected {FORMAT!r} {VERSION}; "
            "make it with `python -m benchmarks.quality REF CANDIDATE --json FILE`"
        )
    if not isinstance(report.get("candidates"), list) or not all(isinstance(c, dict) for c in report["candidates"]):
        raise DgemmaError(f"{path}: candidates is no list of models; correct the report file, or measure again")
    return report


def check_setting(report: dict, setting: dict, path: str | Path, advice: str) -> None:
    """Raises DgemmaError where a report is of another reference, other data or other settings."""
    for key, value in setting.items():
        if report["setting"].get(key) != value:
            raise DgemmaError(
                f"{path}: {key} is {_short(report['setting'].get(key))}, expected {_short(value)}; {advice}"
            )


def _short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def write_report(report: dict, path: str | Path) -> None:
    """Complete or not at all. Raises DgemmaError."""
    replace_text(path, json.dumps(report, indent=1, ensure_ascii=False))


def put(report: dict, row: dict) -> None:
    """A candidate's row, in the place of an older one."""
    kept = [old for old in report["candidates"] if old["model"] != row["model"]]
    at = next((i for i, old in enumerate(report["candidates"]) if old["model"] == row["model"]), len(kept))
    report["candidates"] = [*kept[:at], row, *kept[at:]]


def merge(reports: list[tuple[str, dict]]) -> dict:
    """Reports of one reference on the same data as one; of a model that comes twice the later row counts."""
    (first, merged), *others = reports
    merged = {**merged, "candidates": list(merged["candidates"])}
    for path, report in others:
        check_setting(report, merged["setting"], path, f"it cannot be drawn with {first}; measure it again")
        for row in report["candidates"]:
            put(merged, row)
    return merged


def kl_of(row: dict, pass_: str = HEADLINE) -> dict | None:
    """The headline: KL from the reference on corrupted slots, self-conditioned (or in another pass), over all noise.

    pass_ TYPICAL: the headline's geometric mean over instances.
    """
    if pass_ == TYPICAL:
        return typical(row["kl_by_instance"]) if "kl_by_instance" in row else None
    return ((row.get("denoising") or {}).get(pass_) or {}).get("mean", {}).get("corrupted", {}).get("kl")


# Tables


def comparison(a: str, b: str, found: dict) -> str:
    """What `quality_scores.compare` found, in lines for people."""
    wins, ratio, difference = found["wins"], found["ratio"], found["difference"]
    share = f"{wins['right'] / wins['n']:.1%} (95 % interval {wins['low']:.1%} … {wins['high']:.1%})"
    lines = [
        f"{a} against {b}",
        f"  KL is lower in {wins['right']} of {wins['n']} instances: {share}",
        f"  geometric mean of the KLs' ratio: {ratio['mean']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})",
    ]
    if difference:
        spread = "" if difference["se"] is None else f" ± {difference['se']:.2e}"
        lines.append(f"  difference of mean KLs: {difference['mean']:+.2e}{spread} nats, which a few instances decide")
    return "\n".join(lines)


def tables(report: dict) -> str:
    rows = [row for row in [report["reference"], *report["candidates"]] if row and "error" not in row]
    width = max([24, *(len(row["model"]) for row in rows)])
    parts = [_denoising(rows, width)]
    if any(row.get("tasks") for row in rows):
        parts.append(_tasks(rows, width))
    return "\n\n".join(parts)


def _denoising(rows, width):
    lines = [
        "Corrupted slots, second pass (self-conditioned), all shares of noise; ± standard error over instances",
        f"{'model':{width}}{'MB':>10}{'cross-entropy':>19}{'KL':>23}"
        f"{'typical KL':>12}{'argmax':>10}{'experts':>10}{'perplexity':>12}",
    ]
    for row in rows:
        found = row["denoising"][HEADLINE]["mean"]["corrupted"]
        lines.append(
            f"{row['model']:{width}}{row['weights_bytes'] / 1e6:>10,.2f}{_pm(found['cross_entropy'], '.5f'):>19}"
            f"{_pm(found.get('kl'), '.2e'):>23}{_mean(kl_of(row, TYPICAL), '.2e'):>12}"
            f"{_mean(found.get('same_argmax'), '.3%'):>10}{_mean(found.get('same_experts'), '.2%'):>10}"
            f"{row['encoder']['perplexity']:>12.3f}"
        )
    return "\n".join(lines)


def _tasks(rows, width):
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks") or {}))
    shown = [task for task in tasks if task != "all"]
    whole = "all" if "all" in tasks else shown[0]
    column = max(22, *(len(task) + 2 for task in shown))
    lines = [
        f"Right answers with Wilson's 95 % interval; then of {whole}: steps per block, blocks that took all steps, "
        "loops, tokens per forward; lost and gained against the reference",
        f"{'model':{width}}" + "".join(f"{task:>{column}}" for task in shown)
        + f"{'steps':>16}{'at limit':>10}{'loops':>8}{'TPF':>16}{'lost':>6}{'gained':>8}",
    ]  # fmt: skip
    for row in rows:
        found = row.get("tasks") or {}
        cells = "".join(f"{_rate(found.get(task)):>{column}}" for task in shown)
        last = found.get(whole) or {}
        lines.append(
            f"{row['model']:{width}}{cells}{_pm(last.get('steps_per_block'), '.2f'):>16}"
            f"{_share(last.get('blocks_at_limit')):>10}{_share(last.get('loops')):>8}"
            f"{_pm(last.get('tokens_per_forward'), '.2f'):>16}{last.get('lost', '–'):>6}{last.get('gained', '–'):>8}"
        )
    return "\n".join(lines)


def _pm(value, form):
    if value is None:
        return "–"
    return f"{value['mean']:{form}}" + ("" if value["se"] is None else f" ± {value['se']:{form}}")


def _mean(value, form):
    return "–" if value is None else f"{value['mean']:{form}}"


def _rate(row):
    return "–" if row is None else f"{row['rate']:.1%} ({100 * row['low']:.1f}..{100 * row['high']:.1f})"


def _share(value):
    return "–" if value is None else f"{value['rate']:.1%}"
