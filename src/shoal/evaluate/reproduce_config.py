"""What a reproduction is asked for, and all that is checked before anything trains: hours later would be too late."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from shoal.depth.checkpoint import TunedDepth
from shoal.engine.intake import check_length, encode
from shoal.errors import InvalidInput, MissingExtra, PickledCheckpoint
from shoal.evaluate.e2e import E2EInput, read_e2e
from shoal.evaluate.frontier import FrontierConfig, read_task
from shoal.evaluate.frontier_arms import plan_arms
from shoal.evaluate.tasks import TaskInput
from shoal.models.checkpoint import Checkpoint, load_tokenizer, read_sizes
from shoal.models.directory import resolve
from shoal.train.config import TuneConfig

TRAIN, TEST = "trainset.csv", "testset_w_refs.csv"
"""Files of the E2E NLG data; `.gz` may follow."""
PACKAGES = {"accelerate": "train", "sacrebleu": "evaluate", "rouge_score": "evaluate", "jinja2": "evaluate"}
"""What the stages need, and the extra that brings it."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to go on from the dense checkpoint."""

    policy: str | None = None
    """Policy that it is tuned for and measured under; None goes on dense."""
    warmup_layers: int = 1
    """Bottom layers that always run."""


WAYS = {
    "dense": Way(),
    "skipdecode": Way(policy="skipdecode"),
    "skipdecode-no-warmup": Way(policy="skipdecode", warmup_layers=0),
    "early-termination": Way(policy="early-termination"),
}
"""Names of checkpoints: the fair baseline, the method, and what it is compared with."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What to reproduce, and at which scale. The paper's learning rates, batches and epochs are not known."""

    model: str
    """Checkpoint directory or hub id; pickled weights are converted first."""
    data: str = "e2e"
    """Directory of the E2E NLG data, or `e2e` for `$SHOAL_DATA/e2e_nlg`."""
    depths: tuple[float, ...] = (1 / 2, 1 / 3, 1 / 4, 1 / 5)
    """Mean shares of the layers, below 1; every tuning draws one of them, or dense, per batch."""
    epochs: float = 2.0
    """Passes over the training data, once for the dense fine-tuning and once more in each way."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    learning_rate: float = 2e-5
    """Peak of AdamW's learning rate in every tuning."""
    batch_size: int = 128
    """Examples per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to save memory."""
    bfloat16: bool = False
    """Train with matrix products in bfloat16; what is measured runs in float32 in any case."""
    gradient_checkpointing: bool = False
    """Trade training time for memory."""
    limit: int | None = None
    """First so many test inputs."""
    device: str | None = None
    """`cpu` or `cuda`, for tuning and measuring; None takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""
    seed: int = 0
    """Of every tuning (data order, depths, dropout) and of the resamples behind intervals."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise InvalidInput("depths must name at least one depth below 1, such as 1/2")
        for depth in self.depths:
            if not 0 < depth < 1:
                raise InvalidInput(
                    f"depths are shares of the layers, above 0 and below 1 (dense is always measured), got {depth}"
                )
        if len(set(self.depths)) < len(self.depths):
            raise InvalidInput("every depth is measured once, and one of depths is named twice")
        if self.threads is not None and self.threads < 1:
            raise InvalidInput(f"threads must be 1 or more, got {self.threads}")
        for way in WAYS.values():
            self.tuning(way)
            self.frontier("", way, Path(self.data))

    def tuning(self, way: Way) -> TuneConfig:
        """How a way is tuned; `WAYS["dense"]` is also how the first stage is."""
        return TuneConfig(
            policy=way.policy or "skipdecode",
            depths=(1.0,) if way.policy is None else (1.0, 1.0, *self.depths),
            warmup_layers=way.warmup_layers,
            epochs=self.epochs,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            bfloat16=self.bfloat16,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.seed,
        )

    def frontier(self, checkpoint: str, way: Way, test: Path) -> FrontierConfig:
        """How a way's checkpoint is measured. Horizon and warm-up layers come from its `depth_plan.json`."""
        return FrontierConfig(
            models=(checkpoint,),
            task="e2e",
            data=str(test),
            policies=() if way.policy is None else (way.policy,),
            depths=self.depths,
            limit=self.limit,
            dtype="float32",
            device=self.device or "cpu",
            threads=self.threads,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks found."""

    device: str
    """Where everything runs."""
    model: Path | None
    """Directory of the weights; None where they are pickled and have to be converted."""
    num_layers: int
    """Of the model."""
    pairs: list[E2EInput]
    """The training data."""
    test: Path
    """File of the test data."""
    inputs: list[TaskInput]
    """Test inputs, as many as are measured."""
    metric: str
    """The main one."""
    max_new_tokens: int
    """Most tokens of an output."""


def check(config: ReproduceConfig) -> Checked:
    """Look at everything that could end the run later. Raises `InvalidInput`, `CheckpointError` or `MissingExtra`."""
    for package, extra in PACKAGES.items():
        if find_spec(package) is None:
            raise MissingExtra(f"a reproduction needs {package}: pip install 'shoal[{extra}]'")
    device = usable_device(config.device)
    train, test = find_e2e(config.data)
    pairs = read_e2e(train)
    if not pairs:
        raise InvalidInput(f"{train} holds no training examples")
    task, inputs = read_task(config.frontier(config.model, WAYS["dense"], test))

    directory = resolve(config.model, weights=None)
    already = TunedDepth.load(directory)
    if already is not None and min(already.depths) < 1:
        raise InvalidInput(
            f"{config.model} was tuned to skip layers already (policy {already.policy}), so no claim about tuning could be "
            "judged on it: start from an ordinary checkpoint"
        )
    sizes = read_sizes(directory)[0]
    num_layers = sizes.shape.num_layers
    for way in WAYS.values():
        tuned = TunedDepth(
            horizon=1, warmup_layers=way.warmup_layers
        )  # at horizon 1 every token runs the fewest layers
        policies = () if way.policy is None else (way.policy,)
        _, refused = plan_arms(
            config.model, num_layers, tuned, policies=policies, depths=config.depths, horizon=1,
            max_new_tokens=task.max_new_tokens,
        )  # fmt: skip
        if refused:
            raise InvalidInput(
                f"{config.model} has {num_layers} layers, and {refused[0].name} cannot run: {refused[0].reason}"
            )
    tokenizer = load_tokenizer(directory)
    for number, one in enumerate(inputs, 1):
        try:
            check_length(len(encode(one.prompt, tokenizer)), task.max_new_tokens, sizes)
        except InvalidInput as error:
            raise type(error)(f"{test}, input {number}: {error}") from error
    return Checked(
        device=device,
        model=find_weights(config.model),
        num_layers=num_layers,
        pairs=pairs,
        test=test,
        inputs=inputs,
        metric=task.metrics[0],
        max_new_tokens=task.max_new_tokens,
    )


def usable_device(device: str | None) -> str:
    """`device`, or what there is. Raises `InvalidInput` for what tuning would not take: it takes the GPU where there is one."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in (None, "cpu", "cuda"):
        raise InvalidInput(
            f"device must be cpu or cuda, got {device!r}: choose one of several GPUs with CUDA_VISIBLE_DEVICES"
        )
    if device == "cuda" and there == "cpu":
        raise InvalidInput("device cuda cannot be used: PyTorch sees no GPU")
    if device == "cpu" and there == "cuda":
        raise InvalidInput(
            "tuning takes the GPU where there is one: for device cpu hide it with CUDA_VISIBLE_DEVICES=''"
        )
    if there == "cuda" and torch.cuda.device_count() > 1:
        raise InvalidInput(
            f"a reproduction runs on one GPU and sees {torch.cuda.device_count()}: choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return there


def find_e2e(data: str) -> tuple[Path, Path]:
    """Training and test file of the E2E NLG data. Raises `InvalidInput` that says which files are expected, and where."""
    by_name = data == "e2e"
    directory = Path(os.environ.get("SHOAL_DATA", "../shared/data")) / "e2e_nlg" if by_name else Path(data).expanduser()
    found = [
        next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)
        for name in (TRAIN, TEST)
    ]
    train, test = found
    if train is None or test is None:
        lacking = " and ".join(name for name, path in zip((TRAIN, TEST), found, strict=True) if path is None)
        where = f"{directory} ($SHOAL_DATA/e2e_nlg)" if by_name else str(directory)
        raise InvalidInput(
            f"{where} has no {lacking}: give the directory of the E2E NLG data, with {TRAIN} and {TEST}, plain or .gz "
            "(https://github.com/tuetschek/e2e-dataset)"
        )
    return train, test


def find_weights(model: str) -> Path | None:
    """The directory of the model's weights; None where they are pickles. Raises `CheckpointError` for broken ones."""
    try:
        directory = resolve(model)
        Checkpoint.open(directory).check()
    except PickledCheckpoint:
        return None
    return directory
