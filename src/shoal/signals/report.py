"""A probe fitted on labelled prompts, or tried on others, with the baselines beside it: what `shoal probe` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.engine.engine import Engine
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, MissingExtra
from shoal.models.passes import Ints
from shoal.signals.baselines import bag_of_words, muli
from shoal.signals.extract import GROUP, Report, States, extract
from shoal.signals.fit import Data, FitConfig, Fitted, fit
from shoal.signals.labelled import Labelled, classes_of, split
from shoal.signals.probe import Probe
from shoal.signals.quality import Floats, Quality, quality, reliability

BASELINES = ("MULI", "bag of words")


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
    num_train: int
    num_truncated: int
    """Prompts that were longer than what was read of them."""
    states_bytes: int
    """What the extracted states take."""


def fit_report(
    engine: Engine,
    labelled: Sequence[Labelled],
    directory: Path,
    *,
    name: str,
    positive: str | None,
    max_tokens: int,
    budget_gib: float,
    config: FitConfig,
    report: Report = lambda what, done, total: None,
) -> FitReport:
    """Extract states into `directory`, fit a probe and the baselines. Raises `InvalidInput`."""
    require_scikit_learn()
    classes = classes_of(labelled, positive)
    labels = np.array([classes.index(one.label) for one in labelled])
    texts = [one.text for one in labelled]
    train, validation = map(np.array, split(labelled, share=config.validation, seed=config.seed))
    states = extract(
        engine,
        texts,
        directory,
        max_tokens=max_tokens,
        tokens=config.operator != "pool",
        logits=True,
        budget_gib=budget_gib,
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
    assert states.logits is not None
    report("baselines", 0, 1)
    found = baselines(states.logits.float().numpy(), texts, labels, train, validation, seed=config.seed)
    inputs = {"MULI": states.logits.float().numpy(), "bag of words": np.array(texts, dtype=object)}
    return FitReport(
        fitted=fitted,
        baselines={
            name: quality(model.predict_proba(inputs[name][validation]), labels[validation], threshold=threshold)
            for name, (model, threshold) in found.items()
        },
        num_train=len(train),
        num_truncated=states.num_truncated,
        states_bytes=sum(path.stat().st_size for path in directory.iterdir()),
    )


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
    """Mean weight of each level, by the class that was decided for."""
    out_of_distribution: float
    """Share of the prompts that lie beyond 99% of the training prompts."""
    baselines: Mapping[str, Quality]
    """Trained on other prompts, tried on the same; empty without those."""

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
    max_tokens: int,
    budget_gib: float,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Label prompts in the engine's pass and count.

    Args: `directory`: for states, where `train` or a picture of the levels needs them; `train`: what the baselines are trained on.
    Raises `InvalidInput` for a class that the probe does not know.
    """
    require_scikit_learn()
    ours = probe.settings
    unknown = {one.label for one in (*labelled, *train)} - set(ours.classes)
    if unknown:
        raise InvalidInput(
            f"probe {ours.name!r} knows {', '.join(ours.classes)}, and the data is labelled {unknown.pop()!r}"
        )
    labels = np.array([ours.classes.index(one.label) for one in labelled])
    texts = [one.text for one in labelled]
    observer, found = engine.observer([probe]), []
    for begin in range(0, len(texts), GROUP):
        report("labelling", begin, len(texts))
        done = engine.generate(texts[begin : begin + GROUP], Sampling(max_new_tokens=1), probes=observer)
        found += [(one.labels or {})[ours.name] for one in done]
    probabilities = np.array(
        [[label.probabilities[name] for name in ours.classes] for label in found], dtype=np.float32
    )
    states = extract(
        engine,
        texts,
        directory / "test",
        max_tokens=max_tokens,
        tokens=ours.operator != "pool",
        logits=bool(train),
        budget_gib=budget_gib,
        report=report,
    )
    weights = level_weights(probe, states)
    decided = np.array([ours.classes.index(label.label) for label in found])
    return Evaluation(
        probe=probe,
        quality=quality(probabilities, labels, threshold=ours.threshold),
        reliability=reliability(probabilities, labels),
        layer_weights={
            name: weights[decided == place].mean(axis=0).tolist()
            for place, name in enumerate(ours.classes)
            if (decided == place).any()
        },
        out_of_distribution=float(np.mean([label.out_of_distribution > 0.99 for label in found])),
        baselines=tried_baselines(
            engine, train, states, texts, labels, ours.classes, directory, max_tokens, budget_gib, report
        )
        if train
        else {},
    )


def level_weights(probe: Probe, states: States) -> Floats:
    """[prompts, levels], how much each level weighs."""
    data = Data(states, torch.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    places = np.arange(len(states.lengths))
    groups = [places[at : at + GROUP] for at in range(0, len(places), GROUP)]
    with torch.inference_mode():
        weights = [probe.layer_weights(probe.token_stage(*data.of(group, probe.settings))) for group in groups]
    found: Floats = torch.cat(weights).numpy()
    return found


def tried_baselines(
    engine: Engine,
    train: Sequence[Labelled],
    states: States,
    texts: Sequence[str],
    labels: Ints,
    classes: Sequence[str],
    directory: Path,
    max_tokens: int,
    budget_gib: float,
    report: Report,
) -> dict[str, Quality]:
    """Baselines trained on `train` and tried on the prompts with these states, texts and classes."""
    known = [one.text for one in train]
    read = extract(
        engine, known, directory / "train", max_tokens=max_tokens, tokens=False, logits=True, budget_gib=budget_gib, report=report
    )  # fmt: skip
    assert read.logits is not None
    assert states.logits is not None
    theirs = np.array([classes.index(one.label) for one in train])
    parts = map(np.array, split(train, share=0.15, seed=0))
    found = baselines(read.logits.float().numpy(), known, theirs, *parts, seed=0)
    inputs = {"MULI": states.logits.float().numpy(), "bag of words": np.array(texts, dtype=object)}
    return {
        name: quality(model.predict_proba(inputs[name]), labels, threshold=threshold)
        for name, (model, threshold) in found.items()
    }
