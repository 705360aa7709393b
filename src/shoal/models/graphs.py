"""Decoding on CUDA devices: static shapes, recorded once and replayed as CUDA graphs.

A decode pass launches ten to thirty small kernels per layer, and launching one takes longer than running it. A CUDA graph launches
a recorded sequence at once, but with the shapes and addresses that it was recorded with. So what differs between passes is data, in
buffers that stay where they are, and what shapes depend on is rounded up, so that few graphs serve all passes:

    slot              0   1   2   3   4   5   6   7   scratch
    layer 3 serves    x   x   x   .   x   x   .   .             window 0..8: rows 3, 6 and 7 are computed and thrown away
    layer 2 serves    .   .   .   .   x   x   .   .             window 4..6

Row `i` of every buffer belongs to cache slot `i`: a layer reads a window of its cache in place, whatever rows it serves. A row in
the window that it does not serve writes its key and value to the scratch slot, the cache's last, and gets its state back
afterwards. Where all rows of a pass run the same layers, embedding, layers and head are one graph; otherwise each is its own.

Letters: R rows in the pass, n in a window, L layers, d hidden size, H_q and H_kv heads of width D, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.decode_rows import DecodeRows, Window, decode_rows, power_of_two, window_around
from shoal.models.decoder import Decoder, DecoderLayer, rotate
from shoal.models.layout import on
from shoal.models.passes import Ints, LayerCaches, Pass

Step = Callable[[], object]
LayerCache = tuple[Tensor, Tensor]
"""Keys and values of a layer, each [slots, H_kv, S, D]."""

MIN_KEYS = 64
"""Fewest positions that attention reads; from here on they double."""
MAX_PASS_GRAPHS = 256
"""Most graphs of whole passes; passes beyond them are replayed layer by layer."""
MAX_STEP_GRAPHS = 2048
"""Most graphs of a layer, an embedding or a head; steps beyond them are launched kernel by kernel."""


class GraphDecoder(Decoder):
    """A `Decoder` that replays decode passes, one token per row, as CUDA graphs; other passes run as they do there.

    The last slot of the cache's tensors belongs to no request: rows that a layer does not serve write there. Graphs are recorded
    when they are first needed, and anew when the cache replaces its tensors. On other devices than CUDA's the steps run without
    being recorded, which is of use in tests only. The buffers are shared by all passes: one thread at a time may call it.
    """

    _static: StaticDecode | None = None

    @torch.inference_mode()
    def __call__(self, work: Pass, cache: LayerCaches) -> Tensor:
        """As `Decoder.__call__`."""
        # A graph neither shows nor takes states, and knows one mask.
        plain = work.state_sums or work.watched or work.given or work.trees
        rows = None if plain else decode_rows(work)
        return super().__call__(work, cache) if rows is None else self.decode(rows, cache)

    @torch.inference_mode()
    def decode(self, rows: DecodeRows, cache: LayerCaches) -> Tensor:
        """Logits [len(rows.emitting), V] in the model's dtype; keys and values of every (layer, row) that ran are in `cache`
        afterwards."""
        if self._static is None or not self._static.is_over(cache):
            self._static = None  # its graphs give their memory back before others take it
            self._static = StaticDecode(self, cache)
        return self._static(rows, cache)


class StaticDecode:
    """Decode passes of one decoder over one set of cache tensors. Graphs do not keep those tensors alive."""

    def __init__(self, decoder: Decoder, cache: LayerCaches) -> None:
        """Allocates the buffers; records nothing yet."""
        shape, self.decoder = decoder.config.shape, decoder
        self.num_slots, self.capacity = cache.keys[0].shape[0] - 1, cache.keys[0].shape[2]
        self._known = [weakref.ref(tensor) for tensor in (*cache.keys, *cache.values)]

        def buffer(*size: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=decoder.device)

        # Token, position, and where to write: the row's slot, or the scratch slot where there is no row; then that per layer.
        self.inputs = buffer(3 + shape.num_layers, self.num_slots, dtype=torch.int64)
        self.host = np.zeros(self.inputs.shape, dtype=np.int64)
        self.x = buffer(self.num_slots, shape.hidden_size)
        self.bias = buffer(self.num_slots, 1, 1, self.capacity)  # 0 where a row may look, -inf elsewhere
        dim = 2 * len(decoder.config.rotary.inv_freq) if decoder.config.rotary else 0
        self.cos_sin = (buffer(self.num_slots, 1, dim), buffer(self.num_slots, 1, dim))
        self.key_positions = torch.arange(self.capacity, device=decoder.device)
        self.logits = buffer(self.num_slots, shape.vocab_size)
        self._passes: dict[Hashable, Step] = {}
        self._steps: dict[Hashable, Step] = {}
        self._record = Recorder(self.x) if decoder.device.type == "cuda" else lambda step: step

    def is_over(self, cache: LayerCaches) -> bool:
        """Whether `cache` still has the tensors that the graphs read and write."""
        tensors = (*cache.keys, *cache.values)
        return all(known() is tensor for known, tensor in zip(self._known, tensors, strict=True))

    def __call__(self, rows: DecodeRows, cache: LayerCaches) -> Tensor:
        """One pass; see `GraphDecoder.decode`."""
        counts = [
            layer.num_tokens_run + (0 if served is None else len(served))
            for layer, served in zip(self.decoder.layers, rows.layers, strict=True)
        ]
        self._load(rows)
        caches = {i: (cache.keys[i], cache.values[i]) for i, served in enumerate(rows.layers) if served is not None}
        window, num_keys = self._extent(rows.slots)
        key = (window, num_keys, *caches)
        if rows.share_layers and (key in self._passes or len(self._passes) < MAX_PASS_GRAPHS):
            self._replay(self._passes, key, partial(self._pass, caches, window, num_keys))
        else:
            self._replay_steps(rows, caches, window)
        for layer, count in zip(self.decoder.layers, counts, strict=True):
            layer.num_tokens_run = count  # without what was run to fill a window, or to be recorded
        return self.logits[on(self.logits.device, rows.emitting)]

    def _load(self, rows: DecodeRows) -> None:
        """Bring what is new in this pass into the buffers, in one copy."""
        self.host[:2, rows.slots] = rows.token_ids, rows.positions
        self.host[2:] = self.num_slots
        self.host[2, rows.slots] = rows.slots
        used = 3
        if not rows.share_layers:
            used = len(self.host)
            for row, served in zip(self.host[3:], rows.layers, strict=True):
                if served is not None:
                    row[served] = served
        self.inputs[:used].copy_(torch.from_numpy(self.host[:used]))

    def _extent(self, slots: Ints) -> tuple[Window, int]:
        """The window around `slots`, and how many positions their rows read, both rounded up to what there are graphs for."""
        longest = int(self.host[1, slots].max()) + 1
        return window_around(slots, self.num_slots), min(self.capacity, max(MIN_KEYS, power_of_two(longest)))

    def _replay_steps(self, rows: DecodeRows, caches: dict[int, LayerCache], window: Window) -> None:
        """A pass as a graph for the embedding, for each layer and for the head."""
        self._replay(self._steps, ("embed", window), partial(self._embed, window))
        extents = {
            id(served): self._extent(served) for served in {id(s): s for s in rows.layers if s is not None}.values()
        }
        for index, cache in caches.items():
            key = (index, *extents[id(rows.layers[index])])
            self._replay(self._steps, key, partial(self._some_rows, cache, *key))
        self._replay(self._steps, ("head", window), partial(self._head, window))

    def _replay(self, graphs: dict[Hashable, Step], key: Hashable, step: Step) -> None:
        """Replay a step, recorded when it is first met; launch its kernels where there are too many graphs."""
        if key not in graphs and len(graphs) < MAX_STEP_GRAPHS:
            graphs[key] = self._record(step)
        graphs.get(key, step)()

    # What is recorded: it reads and writes buffers and caches only, and every shape in it follows from its arguments.

    def _pass(self, caches: dict[int, LayerCache], window: Window, num_keys: int) -> None:
        """A pass whose rows all run the layers in `caches`, which stand bottom first."""
        self._embed(window)
        for index, cache in caches.items():
            self._layer(cache, index, window, num_keys, self.x[slice(*window)], self.inputs[2])
        self._head(window)

    def _embed(self, window: Window) -> None:
        """States, masks and rotations of the rows in a window."""
        rows, decoder = slice(*window), self.decoder
        token_ids, positions = self.inputs[0, rows], self.inputs[1, rows]
        x = F.embedding(token_ids, decoder.embedding)
        if decoder.position_table is not None:
            x += F.embedding(positions + decoder.config.position_offset, decoder.position_table)
        self.x[rows] = x
        hidden = self.key_positions > positions.view(-1, 1, 1, 1)
        self.bias[rows] = torch.zeros_like(self.bias[rows]).masked_fill_(hidden, -torch.inf)
        if decoder.rotary:
            for buffer, new in zip(self.cos_sin, decoder.rotary(positions, decoder.dtype), strict=True):
                buffer[rows] = new

    def _some_rows(self, cache: LayerCache, index: int, window: Window, num_keys: int) -> None:
        """A layer that serves some rows of the window; the others get their state back."""
        write_slots, rows = self.inputs[3 + index], slice(*window)
        x = self.x[rows].clone()
        self._layer(cache, index, window, num_keys, x, write_slots)
        served = (write_slots[rows] != self.num_slots).unsqueeze(1)
        self.x[rows] = torch.where(served, x, self.x[rows])

    def _layer(
        self, cache: LayerCache, index: int, window: Window, num_keys: int, x: Tensor, write_slots: Tensor
    ) -> None:
        """A layer on x [n, d], in place."""
        rows, layer = slice(*window), self.decoder.layers[index]
        attend = partial(
            attend_window,
            layer,
            *cache,
            first_slot=window[0],
            write_slots=write_slots[rows],
            positions=self.inputs[1, rows],
            bias=self.bias[rows, ..., :num_keys],
            cos_sin=(self.cos_sin[0][rows], self.cos_sin[1][rows]) if self.decoder.rotary else None,
        )
        layer(x, attend)

    def _head(self, window: Window) -> None:
        """Logits of the rows in a window."""
        rows = slice(*window)
        self.logits[rows] = self.decoder.head(self.decoder.final_norm(self.x[rows]))


def attend_window(
    layer: DecoderLayer,
    keys: Tensor,
    values: Tensor,
    qkv: Tensor,
    *,
    first_slot: int,
    write_slots: Tensor,
    positions: Tensor,
    bias: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Self-attention of one token in each of n neighbouring slots, from qkv [n, (H_q + 2 H_kv) D] to [n, H_q D].

    Args:
        keys, values: [slots, H_kv, S, D], the layer's whole cache, which is written too.
        first_slot: slot of the first row.
        write_slots: int64 [n], where each row's key and value go: its slot, or one that nobody reads.
        positions: int64 [n].
        bias: [n, 1, 1, num_keys], 0 where a row may look and -inf elsewhere; no key from `num_keys` on is read.
        cos_sin: of the positions, each [n, 1, dim]; None without rotary embedding.
    """
    num_rows, num_kv_heads, num_keys = len(qkv), keys.shape[1], bias.shape[-1]
    heads = qkv.view(num_rows, -1, layer.head_dim)
    q, k, v = torch.split(heads, layer.head_split, dim=1)
    if layer.q_norm and layer.k_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if cos_sin is not None:
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
    keys[write_slots, :, positions] = k
    values[write_slots, :, positions] = v
    # The query heads of a group stand as queries of one head: they see the same keys. With `enable_gqa` and a mask PyTorch would
    # copy each key for every query head.
    q = q.reshape(num_rows, num_kv_heads, -1, layer.head_dim)
    window = slice(first_slot, first_slot + num_rows)
    k, v = keys[window, :, :num_keys], values[window, :, :num_keys]
    mask = bias.expand(-1, num_kv_heads, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(num_rows, -1)


class Recorder:
    """Records steps as CUDA graphs that share one pool of memory: they run in turn, and nothing outlives a step but buffers."""

    def __init__(self, state: Tensor) -> None:
        """`state`: the buffer that steps change in place."""
        self.state = state
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(state.device)  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        """What replays `step`. It runs once before, so that libraries allocate and choose kernels outside the graph."""
        with torch.cuda.device(self.state.device):
            before = self.state.clone()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.state.copy_(before)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only this one's work is recorded.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                step()
        return graph.replay
