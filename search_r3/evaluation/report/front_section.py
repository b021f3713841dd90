"""The report's first screen: which model is best, whether reasoning helps it and by which kind, and what it costs.

Each answer is one sentence with 95% intervals, beside a forest plot of the best of our systems against the baselines.
All three are about the best of our models, as far as it was measured; the sections below are about all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from search_r3.evaluation.given_reasoning import GIVEN_MODES
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.publish.tables import MODE_LABELS
from search_r3.evaluation.records import SMALL
from search_r3.evaluation.report.axes import number
from search_r3.evaluation.report.headline import FEW, Difference, Estimate, Kind, Ranking, differences, kinds, ranking
from search_r3.evaluation.report.interval_plots import GRAY, Mark, Row, interval_plot
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.page_elements import Answer, Front, Placeholder, Section
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.quality_section import EVALUATE
from search_r3.evaluation.report.study_section import STUDY, against_off
from search_r3.evaluation.report.system_names import is_control, models_of, short_names, split_mode
from search_r3.evaluation.systems import BASELINES

KINDS = {
    "on": "its own reasoning",
    "latent": "reasoning in latent steps",
    "given": "given reasoning",
    "written": "another model's reasoning",
    "read": "reading the first hits",
    "read+on": "reading, then its own reasoning",
    "read-2": "reading twice",
    "given.shuffled": "another query's given reasoning",
    "read.shuffled": "another query's first hits",
}
NAMED = 3
"""Data sets that a sentence names; more are named below it."""
UNTESTED = "°"
"""Marks a data set that was not tested, because its data are not available."""


def front(loaded: Results) -> Section:
    """The three answers and the forest plot."""
    section = Section("answers", "In short", folded=False)
    if not loaded.records:
        section.blocks.append(Placeholder("Nothing has been evaluated yet.", EVALUATE))
        return section
    ranked = ranking(loaded)
    answers = [_best(loaded, ranked), _reasoning(loaded, ranked), _cost(loaded, ranked)]
    section.blocks.append(Front(answers, forest(loaded, ranked)))
    return section


def forest(loaded: Results, ranked: Ranking | None, width: int = WIDTH) -> str:
    """The best of our systems against the baselines on every data set; "" if there is none to compare."""
    ours = ranked.ours if ranked else next((r["system"] for r in loaded.records if split_mode(r["system"])[1]), "")
    baselines = [name for name in BASELINES if any(r["system"] == name for r in loaded.records)]
    found = differences(loaded, ours, baselines) if ours else []
    if not found:
        return ""
    names = short_names(r["system"] for r in loaded.records)
    rows = []
    if ranked and ranked.against:
        marks = [_mark(baselines.index(b), e.value, e, few=False) for b, e in ranked.against.items()]
        rows.append(Row(f"mean of {len(ranked.datasets)}", marks, "strong"))
    for name in dict.fromkeys(d.dataset for d in found):
        rows.append(_row(loaded, [d for d in found if d.dataset == name], baselines))
    legend = [names[baseline] for baseline in baselines]
    description = "; ".join(f"{d.dataset}, {names[d.baseline]}: {_difference(d)}" for d in found)
    title = f"{names[ours]}, against {' and '.join(legend)}"
    note = f"95% intervals; gray: under {FEW} queries"
    if any(d.interval is None for d in found):
        note += f"; {UNTESTED} not tested"
    plot = Plot("forest", title, description, f"{NDCG} minus the baseline's", "", width, note)
    return interval_plot(plot, rows, legend)


def _row(loaded: Results, found: Sequence[Difference], baselines: Sequence[str]) -> Row:
    queries = next(r["num_queries"] for r in loaded.records if r["dataset"] == found[0].dataset)
    untested = UNTESTED * any(d.interval is None for d in found)
    label = f"{found[0].dataset.removesuffix(SMALL)} ({queries:,}){untested}"
    marks = [_mark(baselines.index(d.baseline), d.value, d.interval, few=d.few) for d in found]
    return Row(label, marks, GRAY if found[0].few else "")


def _mark(index: int, value: float, interval: Estimate | None, *, few: bool) -> Mark:
    style = GRAY if few else f"s{index}"
    if interval is None:
        return Mark(value, style=style, shape=index)
    return Mark(value, interval.low, interval.high, style, index)


def _difference(difference: Difference) -> str:
    value = number(difference.value, 3, sign=True)
    return value + (f" ({_ends(difference.interval)})" if difference.interval else ", not tested")


def _best(loaded: Results, ranked: Ranking | None) -> Answer:
    question = "Which model is best?"
    if ranked is None:
        return Answer(question, "Not tested", "No data set with judgments at hand was measured with all systems.")
    names = short_names(r["system"] for r in loaded.records)
    sentence = f"Mean {NDCG} {number(ranked.best_mean.value)} ({_ends(ranked.best_mean, sign=False)})"
    if ranked.ours:
        subject = "it is" if ranked.best == ranked.ours else f"the best of ours, {names[ranked.ours]}, is"
        against = " and ".join(_against(names[baseline], estimate) for baseline, estimate in ranked.against.items())
        sentence += f"; {subject} {against}" if against else ""
    note = _over(ranked.datasets)
    if ranked.left_out:
        models = models_of(loaded.records)
        used = {split_mode(system)[0] for system in ranked.means}
        fewer = dict.fromkeys(models[m] for m, _ in map(split_mode, ranked.left_out) if m not in used)
        note += f" Left out, since measured on too few of these: {', '.join(fewer)}." if fewer else ""
    return Answer(question, names[ranked.best], f"{sentence}.", note)


def _against(name: str, estimate: Estimate) -> str:
    """A difference in words: "0.022 below MiniLM (0.007 to 0.038)", or with its sign if the interval contains 0."""
    if estimate.low <= 0 <= estimate.high:
        return f"not clearly different from {name}: {_signed(estimate)}"
    ends = sorted((abs(estimate.low), abs(estimate.high)))
    word = "above" if estimate.value > 0 else "below"
    return f"{number(abs(estimate.value))} {word} {name} ({number(ends[0])} to {number(ends[1])})"


def _reasoning(loaded: Results, ranked: Ranking | None) -> Answer:
    question = "Does reasoning help?"
    known = kinds(loaded)
    found = sorted((k for k in known if ranked and k.model == ranked.model), key=lambda k: _place(k.mode)) or known
    shown = [kind for kind in found if not is_control(kind.mode)]
    if not shown:
        return Answer(question, "Not tested", "No model has runs with and without reasoning on data at hand.")
    every = models_of(loaded.records)
    models = {kind.model: every[kind.model] for kind in found}
    gains = list(dict.fromkeys(_kind(kind) for kind in shown if kind.helps))
    losses = list(dict.fromkeys(_kind(kind) for kind in shown if kind.change.high < 0))
    if gains and all(kind.mode in GIVEN_MODES for kind in shown if kind.helps):
        verdict = "Only reasoning that it is given"
    elif gains:
        verdict = f"Yes: {' and '.join(gains)}"
    elif losses:
        verdict = "No: it harms" if len(losses) == len({_kind(k) for k in shown}) else "No"
    else:
        verdict = "No gain shown"
    usual = shown[0].datasets
    parts = [f"{name} by {changes}" for name, changes in _by_kind(shown, models, usual)]
    parts[0] = parts[0].replace(" by ", f" changes {NDCG} by ", 1)
    note = _over(usual)
    others = _by_kind([kind for kind in found if is_control(kind.mode)], models, usual)
    controls = [f"{name} {changes}" for name, changes in others]
    note += f" Controls: {'; '.join(controls)}." if controls else ""
    many = dict.fromkeys(kind.datasets for kind in found if kind.datasets != usual and len(kind.datasets) > NAMED)
    note += "".join(f" {len(names)} data sets: {', '.join(names)}." for names in many)
    sentence = f"Against the direct embedding, {'; '.join(parts)}."
    if len(models) == 1 < len(every):
        sentence = f"In {next(iter(models.values()))}, a{sentence[1:]}"
    return Answer(question, verdict, sentence, note + _content(loaded, models))


def _content(loaded: Results, models: Collection[str]) -> str:
    """Whether the content of the reasoning matters, by the studies' control with another query's reasoning."""
    parts = []
    for study in (study for study in loaded.studies if study["system"] in models):
        row = next((row for row in against_off(study) if row["mode"] == "shuffled"), None)
        if row:
            parts.append(f"{_signed(Estimate(row['difference'], row['low'], row['high']))} on {study['dataset']}")
    return f" With another query's reasoning instead: {', '.join(parts)}." if parts else ""


def _by_kind(found: Sequence[Kind], models: Mapping[str, str], usual: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each kind's name and its changes; data sets are named where they are not the `usual` ones."""
    grouped: dict[str, list[str]] = {}
    for kind in found:
        where = f" in {models[kind.model]}" if len(models) > 1 else ""
        count = len(kind.datasets)
        on = f" on {', '.join(kind.datasets)}" if count <= NAMED else f", over {count} data sets"
        where += "" if kind.datasets == usual else on
        grouped.setdefault(_kind(kind), []).append(f"{_signed(kind.change)}{where}")
    return [(name, _listed(changes)) for name, changes in grouped.items()]


def _listed(words: Sequence[str]) -> str:
    """Words in a row: "a", "a and b", "a, b and c"."""
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])


def _cost(loaded: Results, ranked: Ranking | None) -> Answer:
    question = "What does it cost?"
    model = ranked.model if ranked else ""
    if timed := next((one for one in loaded.query_modes if one["figures"]["model"] == model), None):
        measured = {mode for name, mode in (split_mode(r["system"]) for r in loaded.records) if name == model}
        return _timed(question, timed, measured, _batches(loaded, ranked))
    parts, ratios, machines = [], [], []
    for study in (study for study in loaded.studies if study["system"] == model or not model):
        points = {point["budget"]: point for point in study["budgets"] if point.get("latency")}
        direct, reasoned = points.get(None), points.get(study["settings"]["budget"])
        if direct and reasoned:
            a, b = direct["latency"]["batch_1"], reasoned["latency"]["batch_1"]
            ratios.append(b["median_ms"] / a["median_ms"])
            machines.append(study["hardware"])
            parts.append(
                f"{_ms(a['median_ms'])} direct and {_ms(b['median_ms'])} with reasoning on {study['dataset']} "
                f"(95% of queries within {_ms(a['p95_ms'])} and {_ms(b['p95_ms'])})"
            )
    batches = _batches(loaded, ranked)
    if not parts:
        verdict = "Not timed one query at a time"
        return Answer(question, verdict, batches or f"A study times it: {STUDY}.")
    low, high = round(min(ratios)), round(max(ratios))
    times = f"{high}" if low == high else f"{low} to {high}"
    sentence = f"One query takes {', '.join(parts)}."
    note = f"Encoding alone, on {', '.join(dict.fromkeys(machines))}. {batches}".strip()
    return Answer(question, f"{times} times the time of a direct query", sentence, note)


def _timed(question: str, timed: Mapping[str, Any], measured: Collection[str], batches: str) -> Answer:
    """What benchmarks/query_modes.py measured, one query at a time, of the modes whose quality was `measured`."""
    modes = {mode: one for mode, one in timed["figures"]["batches"]["1"].items() if mode in measured}
    parts = [f"{_ms(one['p50_ms'])} {MODE_LABELS.get(mode, mode)}" for mode, one in modes.items()]
    times = max((one["ratio"] for one in modes.values()), default=1.0)
    note = f"Medians; encoding alone, {timed['figures']['engine']} on {timed['hardware']}. {batches}".strip()
    return Answer(question, f"{times:.0f} times the time of a direct query", f"One query takes {_listed(parts)}.", note)


def _batches(loaded: Results, ranked: Ranking | None) -> str:
    """Seconds per query of the evaluation itself, for every mode of the best model."""
    model = ranked.model if ranked else ""
    spent: dict[str, tuple[float, int]] = {}
    for record in loaded.records:
        name, mode = split_mode(record["system"])
        seconds = (record.get("seconds") or {}).get("queries")
        if name == model and ranked and record["dataset"] in ranked.datasets and seconds and not is_control(mode):
            before = spent.get(mode, (0.0, 0))
            spent[mode] = (before[0] + seconds, before[1] + record["num_queries"])
    if not spent:
        return ""
    parts = [f"{MODE_LABELS.get(mode, mode)} {_ms(1e3 * spent[mode][0] / spent[mode][1])}"
             for mode in sorted(spent, key=_place)]  # fmt: skip
    return f"In batches, per query, with other work running: {', '.join(parts)}."


def _place(mode: str) -> int:
    """Where a mode stands: direct and the model's own reasoning before all others, which stay in their order."""
    return {"off": 0, "on": 1}.get(mode, 2)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}\u00a0ms"


def _kind(kind: Kind) -> str:
    return KINDS.get(kind.mode, kind.mode)


def _over(datasets: Sequence[str]) -> str:
    if len(datasets) == 1:
        return f"On {datasets[0]}; 95% interval over its queries."
    return f"Mean over {', '.join(datasets)}; 95% intervals over queries."


def _signed(estimate: Estimate) -> str:
    return f"{number(estimate.value, 3, sign=True)} ({_ends(estimate)})"


def _ends(estimate: Estimate, *, sign: bool = True) -> str:
    return f"{number(estimate.low, 3, sign=sign)} to {number(estimate.high, 3, sign=sign)}"
