"""The public engine: load a model, give it prompts, get completions and what they cost.

    generate / stream / astream  ->  check (intake.py)  ->  queue  ->  Runner.step, step, ...  ->  Generation

Requests enter and leave between passes, each with its own plan and clock.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import reprlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from typing import Any, ClassVar

import torch

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.shape import ModelShape
from shoal.engine.drafting import MAX_DRAFT_TOKENS, Drafter, Drafting, DraftStats
from shoal.engine.intake import Plan, Prompt, check_job, one_per_prompt, prompts_of
from shoal.engine.ledger import EngineStats
from shoal.engine.observing import Observer
from shoal.engine.request import Chunk, Generation, Request
from shoal.engine.routing import PromptStates
from shoal.engine.runner import Runner, free_bytes
from shoal.engine.sampling import Sampling
from shoal.engine.step_time import StepTime
from shoal.engine.text import TextStream
from shoal.errors import InvalidInput, ShoalError
from shoal.models.checkpoint import load_checkpoint, load_tokenizer
from shoal.models.directory import resolve
from shoal.models.executor import Executor, make_decoder
from shoal.models.memory import drop_freed
from shoal.models.weights import DecoderConfig

Probes = Sequence[Any] | Observer | None
"""What reads prompts: probes, files of probes and `Guard`s (`shoal.signals`), or who was made of those."""


class Engine:
    """Runs requests on one model. Safe to call from several threads: passes run one at a time, and everyone shares them."""

    make_drafter: ClassVar[Callable[[Engine], Drafter] | None] = None
    """Set where the package is put together: the engine knows no proposers."""
    make_observer: ClassVar[Callable[[Engine, Sequence[Any]], Observer] | None] = None
    """Set there, too: the engine knows no probes."""

    def __init__(
        self,
        decoder: Executor,
        tokenizer: Any = None,
        *,
        tuned: TunedDepth | None = None,
        max_batch: int = 32,
        max_pass_tokens: int = 2048,
        cache_gib: float | None = None,
    ) -> None:
        """Usually made by `from_pretrained`.

        Args:
            decoder: the model.
            tokenizer: transformers' tokenizer; None works with token ids only.
            tuned: what the checkpoint's `depth_plan.json` says.
            max_batch: most requests that run together, one cache slot each.
            max_pass_tokens: most tokens in one pass, `max_batch` or more; longer prompts are read in chunks.
            cache_gib: KV cache budget in GiB; None takes half of the memory that is free now.
        """
        check_sizes(max_batch=max_batch, max_pass_tokens=max_pass_tokens, cache_gib=cache_gib)
        self.tokenizer, self.tuned = tokenizer, tuned
        self.config: DecoderConfig = decoder.config
        cache_bytes = free_bytes(decoder.device) // 2 if cache_gib is None else int(cache_gib * 2**30)
        self.runner = Runner(decoder, max_batch=max_batch, max_pass_tokens=max_pass_tokens, cache_bytes=cache_bytes)
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._mailboxes: dict[int, deque[Chunk]] = {}
        self._unread: list[Chunk] = []
        self._in_pass = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        revision: str | None = None,
        token: str | None = None,
        max_batch: int = 32,
        max_pass_tokens: int = 2048,
        cache_gib: float | None = None,
    ) -> Engine:
        """Load a checkpoint directory or a hub id.

        Args:
            dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16", or "int8": products with 8-bit weights (CPU only),
                everything else in bfloat16.
            device: "cpu", "cuda" or "cuda:1".
            threads: CPU threads of this process's tensor operations; None leaves PyTorch's choice.
            revision, token: of a hub id.
            max_batch, max_pass_tokens, cache_gib: see `Engine`.

        Raises `CheckpointError` (`UnsupportedArchitecture`, `PickledCheckpoint`) or `InvalidInput`.
        """
        if threads is not None:
            if threads < 1:
                raise InvalidInput(f"threads must be 1 or more, got {threads}")
            torch.set_num_threads(threads)
        check_sizes(max_batch=max_batch, max_pass_tokens=max_pass_tokens, cache_gib=cache_gib)
        directory = resolve(os.fspath(path), revision=revision, token=token)
        config, weights = load_checkpoint(directory, dtype=dtype, device=device)  # layers are read last, by the decoder
        tokenizer, tuned = load_tokenizer(directory), TunedDepth.load(directory)
        decoder = make_decoder(config, weights)
        del weights
        drop_freed()
        return cls(
            decoder,
            tokenizer,
            tuned=tuned,
            max_batch=max_batch,
            max_pass_tokens=max_pass_tokens,
            cache_gib=cache_gib,
        )

    @property
    def shape(self) -> ModelShape:
        """The decoder's sizes."""
        return self.config.shape

    @property
    def stats(self) -> EngineStats:
        """Costs that requests share, since the last `stats.reset()`."""
        return self.runner.tally.stats

    @property
    def step_time(self) -> StepTime:
        """What passes take on this machine, learnt from those that have run: `predict` one, `forecast` a request."""
        return self.runner.tally.step_time

    @property
    def drafting(self) -> DraftStats:
        """What drafting did for all requests so far."""
        return self.runner.tally.drafting

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running, or `step` has chunks to return that another call's pass made."""
        return bool(self._unread) or self.runner.has_work

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        *,
        draft: Drafting | Sequence[Drafting] = None,
        probes: Probes = None,
        shared_tokens: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> list[Generation]:
        """Complete prompts.

        Args:
            prompts: a string, a list of token ids, or several of those.
            sampling: one, or one per prompt; None is `Sampling()`, greedy.
            plan: a policy or plan, or one per prompt; None is `Dense()`.
            draft: how to draft, or one per prompt; the tokens stay the same. "auto", "self", "ngram", "suffix", "trigram", the path
                of a smaller checkpoint with the same tokenizer, or a class of `shoal.draft`; None is not at all.
            probes: what classifies the prompts from the states of the pass that reads them: probes, files of probes, or `Guard`s,
                which may end a request there; or what `observer` made of those.
            shared_tokens: how many of the prompt's first tokens other prompts begin with, too, or one number per prompt: they are
                computed once and kept for later calls, the tokens stay the same (`engine/prefixes.py`). Routers, attention probes
                and scores of those tokens have to see all of them: such requests compute them anew.
            timeout_s: seconds from now after which unfinished requests end with `finish_reason="timeout"`.

        Returns one `Generation` per prompt in order (`Sampling.n` in a row where more than one is asked for). Raises
        `InvalidInput` before anything runs; a request that fails alone comes back with `finish_reason="error"`.
        """
        chunks = self._submit(
            prompts, sampling, plan, draft, probes, shared_tokens, timeout_s=timeout_s, streaming=False
        )
        done = [chunk.generation for chunk in chunks if chunk.generation is not None]
        return sorted(done, key=lambda generation: (generation.index, generation.sample))

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        *,
        draft: Drafting | Sequence[Drafting] = None,
        probes: Probes = None,
        shared_tokens: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Complete prompts and yield what each gains, pass by pass; arguments as for `generate`.

        The texts of a request's chunks add up to its completion, and its last chunk carries the `Generation`. Requests are
        checked and queued at the call; closing the iterator cancels what is unfinished.
        """
        return self._submit(prompts, sampling, plan, draft, probes, shared_tokens, timeout_s=timeout_s, streaming=True)

    async def astream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        *,
        draft: Drafting | Sequence[Drafting] = None,
        probes: Probes = None,
        shared_tokens: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: passes run in a worker thread, and concurrent streams share them.

        Requests are checked and queued when the first chunk is asked for.
        """

        def follow() -> Generator[Chunk, None, None]:  # queues in the worker thread, too: a pass may be under way
            yield from self._submit(
                prompts, sampling, plan, draft, probes, shared_tokens, timeout_s=timeout_s, streaming=True
            )

        chunks = follow()
        turn = threading.Lock()  # a cancelled task leaves while its pass still runs in the worker thread

        def advance() -> Chunk | None:
            with turn:
                return next(chunks, None)

        def close() -> None:
            with turn:
                chunks.close()

        try:
            while (chunk := await asyncio.to_thread(advance)) is not None:
                yield chunk
        finally:
            await asyncio.shield(asyncio.to_thread(close))

    def add(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        plan: Plan | None = None,
        *,
        draft: Drafting = None,
        probes: Probes = None,
        shared_tokens: int = 0,
        index: int = 0,
        timeout_s: float | None = None,
        streaming: bool = True,
    ) -> list[int]:
        """Queue one prompt for `step`; returns its request ids, `Sampling.n` of them.

        `index` comes back in its chunks; without `streaming`, text is decoded once, at the end.
        """
        requests = self.prepare(
            prompt,
            sampling,
            plan,
            draft,
            probes=probes,
            shared_tokens=shared_tokens,
            index=index,
            timeout_s=timeout_s,
            streaming=streaming,
        )
        self.submit(requests)
        return [request.request_id for request in requests]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests of `prepare` for `step`."""
        with self._lock:
            self.runner.submit(requests)

    def step(self) -> list[Chunk]:
        """Run one pass; returns what each request gained. Chunks of `stream` and `generate` calls go to those, too.

        What added requests gained in passes of those calls comes with the next `step`.
        """
        with self._lock:
            chunks = self._run_pass()
            self._deliver(chunks)
            unread, self._unread = self._unread, []
            return unread + chunks

    def drop_prefixes(self) -> None:
        """Let go of the shared prefixes that no waiting request needs; otherwise they go when the cache budget wants room."""
        with self._lock:
            self.runner.prefixes.drop()

    def cancel(self, request_id: int) -> None:
        """End a request before the next pass, with `finish_reason="cancelled"`. One that has already ended is left alone."""
        with self._lock:
            self.runner.cancelled.add(request_id)

    def prepare(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        plan: Plan | None = None,
        draft: Drafting = None,
        *,
        probes: Probes = None,
        shared_tokens: int = 0,
        index: int = 0,
        timeout_s: float | None = None,
        streaming: bool = True,
    ) -> list[Request]:
        """Check one prompt and make its requests, one per sample; nothing is queued. Waits for no pass that another thread runs.

        Arguments as for `add`; raises `InvalidInput`.
        """
        if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s >= 0):
            raise InvalidInput(f"timeout_s must be 0 or more seconds, got {timeout_s!r}")
        job = check_job(
            prompt,
            sampling,
            plan,
            config=self.config,
            tokenizer=self.tokenizer,
            tuned=self.tuned,
            cache=self.runner.cache,
            draft_tokens=0 if draft is None else MAX_DRAFT_TOKENS,
        )
        if not 0 <= shared_tokens < len(job.prompt):
            raise InvalidInput(
                f"shared_tokens must be 0 to {len(job.prompt) - 1}, one fewer than the prompt has, got {shared_tokens}"
            )
        observer = self.observer(probes)
        if observer and job.plan.prompt_layers is not None:
            raise InvalidInput(
                "probes read what every layer makes of the prompt, and this plan leaves layers out: "
                "give it no prompt_layers, or ask for no probes"
            )
        drafter = None if draft is None else self._drafter()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return [
            Request(
                request_id=next(self._ids),
                index=index,
                sample=sample,
                prompt=job.prompt,
                sampling=job.sampling,
                plan=job.plan,
                stop_token_ids=job.stop_token_ids,
                eos_token_ids=job.eos_token_ids,
                text=TextStream(self.tokenizer, job.sampling.stop, streaming=streaming),
                deadline=deadline,
                future_blocks=job.future_blocks,
                prompt_states=PromptStates(job.router, self.shape, len(job.prompt)) if job.router else None,
                reading=observer.begin(len(job.prompt)) if observer else None,
                shared_tokens=shared_tokens,
                draft=drafter.resolve(draft, len(job.prompt), job.sampling.max_new_tokens) if drafter else None,
            )
            for sample in range(job.sampling.n)
        ]

    def observer(self, probes: Probes) -> Observer | None:
        """Who reads prompts for these probes; None for none of them.

        Give it as `probes` to several calls that ask for the same: a pass then reads their prompts together. Raises `InvalidInput`
        or `CheckpointError` for probes that cannot be read or were made for another model.
        """
        if probes is None or isinstance(probes, list | tuple):
            assert Engine.make_observer, "import shoal, which says how"
            return Engine.make_observer(self, probes) if probes else None
        if not hasattr(probes, "begin"):
            raise InvalidInput(f"probes must be a list of probes or their files, got {reprlib.repr(probes)}")
        return probes  # type: ignore[return-value]

    def _drafter(self) -> Drafter:
        """Who drafts, made when it is first asked for."""
        if self.runner.drafter is None:
            with self._lock:
                if self.runner.drafter is None:  # still
                    assert Engine.make_drafter, "import shoal, which says how"
                    self.runner.drafter = Engine.make_drafter(self)
        return self.runner.drafter

    def _submit(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] | None,
        plan: Plan | Sequence[Plan] | None,
        draft: Drafting | Sequence[Drafting],
        probes: Probes,
        shared_tokens: int | Sequence[int],
        *,
        timeout_s: float | None,
        streaming: bool,
    ) -> Generator[Chunk, None, None]:
        """Check all prompts, then queue them together; the iterator follows them."""
        listed = prompts_of(prompts)
        samplings = one_per_prompt("sampling", sampling, len(listed))
        plans = one_per_prompt("plan", plan, len(listed))
        drafts = one_per_prompt("draft", draft, len(listed))
        shared = one_per_prompt("shared_tokens", shared_tokens, len(listed))
        observer = self.observer(probes)
        requests: list[Request] = []
        jobs = zip(listed, samplings, plans, drafts, strict=True)
        for index, (job, num_shared) in enumerate(zip(jobs, shared, strict=True)):
            try:
                requests += self.prepare(
                    *job,
                    probes=observer,
                    shared_tokens=num_shared,
                    index=index,
                    timeout_s=timeout_s,
                    streaming=streaming,
                )
            except InvalidInput as error:
                raise type(error)(f"prompt {index}: {error}") from error
        mailbox: deque[Chunk] = deque()
        with self._lock:
            self._mailboxes.update({request.request_id: mailbox for request in requests})
            self.runner.submit(requests)
        chunks = self._follow({request.request_id for request in requests}, mailbox)
        next(chunks)  # enter it, so that closing it later always cancels
        return chunks

    def _follow(self, unfinished: set[int], mailbox: deque[Chunk]) -> Generator[Any, None, None]:
        """Yield the chunks of these requests, running a pass when there are none: whoever runs one delivers to everyone."""
        try:
            yield None
            while unfinished:
                with self._lock:
                    if not mailbox:
                        self._unread += self._deliver(self._run_pass())
                while mailbox:
                    chunk = mailbox.popleft()
                    if chunk.generation is not None:
                        unfinished.discard(chunk.request_id)
                    yield chunk
        finally:
            if unfinished:
                with self._lock:
                    for request_id in unfinished:
                        self._mailboxes.pop(request_id, None)
                    self.runner.cancelled |= unfinished
                    if not self._in_pass:  # closed from within a pass, they end before the next one
                        ended = self.runner.end_early()  # frees their cache now
                        self._unread += self._deliver([c for c in ended if c.request_id not in unfinished])

    def _run_pass(self) -> list[Chunk]:
        """One pass of the runner. Raises `ShoalError` when called from within one, as by a logits processor."""
        if self._in_pass:
            raise ShoalError("the engine is in the middle of a pass: a logits processor cannot run it")
        self._in_pass = True
        try:
            return self.runner.step()
        finally:
            self._in_pass = False

    def _deliver(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Put chunks where their followers look; returns those that nobody follows, of requests that were added for `step`."""
        unfollowed = []
        for chunk in chunks:
            mailbox = self._mailboxes.get(chunk.request_id)
            if mailbox is None:
                unfollowed.append(chunk)
                continue
            mailbox.append(chunk)
            if chunk.generation is not None:
                del self._mailboxes[chunk.request_id]
        return unfollowed


def check_sizes(*, max_batch: int, max_pass_tokens: int, cache_gib: float | None) -> None:
    """Raises `InvalidInput` where the sizes of an `Engine` are outside what is allowed."""
    for name, value in {"max_batch": max_batch, "max_pass_tokens": max_pass_tokens}.items():
        if value < 1:
            raise InvalidInput(f"{name} must be 1 or more, got {value}")
    if max_batch > max_pass_tokens:
        raise InvalidInput(
            f"max_batch {max_batch} is above max_pass_tokens {max_pass_tokens}: "
            "each request that runs brings at least one token to a pass"
        )
    if cache_gib is not None and not 0 < cache_gib < float("inf"):
        raise InvalidInput(f"cache_gib must be above 0 and finite, got {cache_gib}")
