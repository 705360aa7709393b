"""A probe fitted on labelled prompts, or tried on others, with the baselines beside it: what `shoal probe` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.engine.engine import Engine, Probes
from shoal.engine.intake import encode
from shoal.engine.observing import Label
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, MissingExtra, RequestFailed
from shoal.models.passes import Ints
from shoal.signals.baselines import bag_of_words, muli
from shoal.signals.extract import GROUP, Report, States, extract
from shoal.signals.fit import Data, FitConfig, Fitted, fit
from shoal.signals.labelled import Labelled, check_split, classes_of, split
from shoal.signals.probe import Probe
from shoal.signals.quality import Floats, Quality, quality, reliability


def require_scikit_learn() -> None:
    """Raises `MissingExtra` without it, before hours of work."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingExtra("fitting and judging probes needs scikit-learn: pip install 'shoal[signals]'") from None


@dataclass(frozen=True, eq=False, kw_only=True)
class FitReport:
    """A fitted probe beside the baselines, all on the validation part."""

    fitted: Fitted
    baselines: Mapping[str, Quality]
    num_truncated: int
    """Prompts that were longer than what was read of them."""


def fit_report(
    engine: Engine,
    labelled: Sequence[Labelled],
    directory: Path,
    out: Path,
    *,
    name: str,
    positive: str | None,
    max_tokens: int,
    budget_gib: float,
    replace: bool = False,
    config: FitConfig,
    report: Report = lambda what, done, total: None,
) -> FitReport:
    """Extract states into `directory`, fit a probe, save it as `out`, and fit the baselines.

    Args: `replace`: as in `extract`. What can be refused is refused before the model reads anything; raises `InvalidInput`.
    """
    require_scikit_learn()
    classes = classes_of(labelled, positive)
    labels = np.array([classes.index(one.label) for one in labelled])
    train, validation = split(labelled, share=config.validation, seed=config.seed)
    check_split(labels, train, validation, classes)
    config.trials(engine.config, classes=classes, name=name, max_prompt_tokens=max_tokens)
    check_prompts(engine, labelled, max_tokens=max_tokens)
    states = extract(
        engine,
        [one.text for one in labelled],
        directory,
        max_tokens=max_tokens,
        tokens=config.operator != "pool",
        logits=True,
        budget_gib=budget_gib,
        replace=replace,
        report=report,
    )
    fitted = fit(
        states,
        labels,
        train,
        validation,
        classes=classes,
        name=name,
        model=engine.config,
        max_prompt_tokens=max_tokens,
        config=config,
        report=report,
    )
    fitted.probe.save(out)
    report("baselines", 0, 1)
    inputs = baseline_inputs(states, labelled)
    found = baselines(inputs["MULI"], inputs["bag of words"], labels, train, validation, seed=config.seed)
    return FitReport(
        fitted=fitted,
        baselines={
            name: quality(model.predict_proba(inputs[name][validation]), labels[validation], threshold=threshold)
            for name, (model, threshold) in found.items()
        },
        num_truncated=states.num_truncated,
    )


def check_prompts(
    engine: Engine, labelled: Sequence[Labelled], *, max_tokens: int | None = None, probes: Probes = None
) -> None:
    """Raises `InvalidInput` with file and line where the engine or one of `probes` could not read a prompt, cut to `max_tokens`."""
    for one in labelled:
        try:
            engine.prepare(encode(one.text, engine.tokenizer)[:max_tokens], Sampling(max_new_tokens=1), probes=probes)
        except InvalidInput as error:
            raise InvalidInput(f"{one.where}: {error}") from error


def baselines(
    logits: Floats, texts: Sequence[str], labels: Ints, train: Ints, validation: Ints, *, seed: int
) -> dict[str, tuple[Any, float]]:
    """Both baselines, trained: a classifier with `predict_proba`, and its threshold."""
    return {
        "MULI": muli(logits, labels, train, validation, seed=seed),
        "bag of words": bag_of_words(texts, labels, train, validation, seed=seed),
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """A probe on labelled prompts, as the engine's own pass reads them."""

    probe: Probe
    quality: Quality
    reliability: Sequence[tuple[float, float, float]]
    """As `quality.reliability` has it."""
    layer_weights: Mapping[str, Sequence[float]]
    """Mean weight of each level, by the class that was decided for; empty where nobody asked."""
    out_of_distribution: float
    """Share of the prompts that lie beyond 99% of those that were held out of the probe's training."""
    baselines: Mapping[str, Quality]
    """Trained on other prompts, tried on the same; empty without those."""
    num_truncated: int
    """Prompts of which baselines and `layer_weights` saw the beginning only."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "probe": {**asdict(self.probe.settings), "version": self.probe.version},
            "quality": asdict(self.quality),
            "reliability": [list(one) for one in self.reliability],
            "layer_weights": {name: list(weights) for name, weights in self.layer_weights.items()},
            "out_of_distribution": self.out_of_distribution,
            "baselines": {name: asdict(one) for name, one in self.baselines.items()},
        }


def evaluate(
    engine: Engine,
    probe: Probe,
    labelled: Sequence[Labelled],
    directory: Path,
    *,
    train: Sequence[Labelled] = (),
    levels: bool = True,
    max_tokens: int,
    budget_gib: float,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Label prompts, whole, in the engine's pass and count.

    Args: `directory`: for states, where `train` or `levels` needs them; `train`: what the baselines are trained on; `levels`:
    whether to look at the weights of levels; `max_tokens`: of each prompt, that these two see. Raises `InvalidInput` for a class
    that the probe does not know, and for prompts that it or the model cannot read, before any is read; `RequestFailed` where the
    model fails.
    """
    require_scikit_learn()
    ours = probe.settings
    unknown = {one.label for one in (*labelled, *train)} - set(ours.classes)
    if unknown:
        raise InvalidInput(
            f"probe {ours.name!r} knows {', '.join(ours.classes)}, and the data is labelled {min(unknown)!r}"
        )
    check_prompts(engine, labelled, probes=engine.observer([probe]))
    check_prompts(engine, train, max_tokens=max_tokens)
    labels, known = (np.array([ours.classes.index(one.label) for one in part]) for part in (labelled, train))
    parts = split(train, share=0.15, seed=0)
    if train:
        check_split(known, *parts, ours.classes)

    def read(what: str, prompts: Sequence[Labelled], *, tokens: bool) -> States:
        return extract(
            engine, [one.text for one in prompts], directory / what, max_tokens=max_tokens, tokens=tokens, logits=bool(train),
            budget_gib=budget_gib, report=report,
        )  # fmt: skip

    states = read("test", labelled, tokens=levels and ours.operator != "pool") if levels or train else None
    tried = {}
    if train and states is not None:
        theirs = read("train", train, tokens=False)
        inputs, tests = baseline_inputs(theirs, train), baseline_inputs(states, labelled)
        found = baselines(inputs["MULI"], inputs["bag of words"], known, *parts, seed=0)
        tried = {
            name: quality(model.predict_proba(tests[name]), labels, threshold=threshold)
            for name, (model, threshold) in found.items()
        }
    said = labels_of(engine, probe, labelled, report)
    probabilities = np.array([[label.probabilities[name] for name in ours.classes] for label in said], dtype=np.float32)
    weights: dict[str, Sequence[float]] = {}
    if levels and states is not None:
        by_prompt, decided = level_weights(probe, states), np.array([label.label for label in said])
        weights = {name: by_prompt[decided == name].mean(axis=0).tolist() for name in ours.classes if name in decided}
    return Evaluation(
        probe=probe,
        quality=quality(probabilities, labels, threshold=ours.threshold),
        reliability=reliability(probabilities, labels),
        layer_weights=weights,
        out_of_distribution=float(np.mean([label.out_of_distribution > 0.99 for label in said])),
        baselines=tried,
        num_truncated=states.num_truncated if states is not None else 0,
    )


def labels_of(engine: Engine, probe: Probe, labelled: Sequence[Labelled], report: Report) -> list[Label]:
    """What a probe says of each prompt. Raises `RequestFailed` where the model, or the probe, makes numbers that are not finite."""
    observer, found = engine.observer([probe]), []
    for begin in range(0, len(labelled), GROUP):
        report("labelling", begin, len(labelled))
        group = labelled[begin : begin + GROUP]
        done = engine.generate([one.text for one in group], Sampling(max_new_tokens=1), probes=observer)
        for one, generation in zip(group, done, strict=True):
            if generation.labels is None:
                raise RequestFailed(f"{one.where}: {generation.error}")
            found.append(generation.labels[probe.settings.name])
    return found


def level_weights(probe: Probe, states: States) -> Floats:
    """[prompts, levels], how much each level weighs."""
    data = Data(states, torch.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    places = np.arange(len(states.lengths))
    groups = [places[at : at + GROUP] for at in range(0, len(places), GROUP)]
    with torch.inference_mode():
        weights = [probe.layer_weights(probe.token_stage(*data.of(group, probe.settings))) for group in groups]
    found: Floats = torch.cat(weights).numpy()
    return found


def baseline_inputs(states: States, labelled: Sequence[Labelled]) -> dict[str, Any]:
    """What each baseline reads of prompts."""
    assert states.logits is not None
    return {
        "MULI": states.logits.float().numpy(),
        "bag of words": np.array([one.text for one in labelled], dtype=object),
    }
