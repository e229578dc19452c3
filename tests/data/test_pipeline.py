"""Windows and batches for any number of processes, streams, sources and epochs, compared with their definitions."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from token_files import write_llmc, write_nanogpt, write_npy

from gpt2_jax.config import IGNORE
from gpt2_jax.data.order import PERIOD, BatchSchedule, permute
from gpt2_jax.data.pipeline import BatchSource, ShuffledWindows, TokenWindows, eval_batches, read_ahead
from gpt2_jax.data.shards import TokenArray, open_tokens
from gpt2_jax.errors import UserError

START = 999  # precedes each document


def windows_of(n_tokens, block_size=4, vocab_size=1000):
    return windows_over([np.arange(n_tokens)], block_size, vocab_size)


def windows_over(streams, block_size=4, vocab_size=1000, document_start=None):
    tokens = [TokenArray(np.asarray(stream, dtype=np.uint16)) for stream in streams]
    return TokenWindows(tokens, [f"stream {n}" for n in range(len(tokens))], block_size, vocab_size, document_start)


def contiguous_rows(process, processes):
    """The rows of one of several processes: those of process 0 first."""
    return lambda size: np.arange(size).reshape(processes, -1)[process]


def strided_rows(process, processes):
    """The rows of one of several processes: every process in turn."""
    return lambda size: np.arange(size)[process::processes]


def batches_of(windows, schedule, num_micro_batches, seed=0, local_rows=np.arange):
    return BatchSource(ShuffledWindows([windows], [1.0], seed), schedule, num_micro_batches, local_rows)


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    batch=st.sampled_from([8, 16]),
    processes=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_every_window_once_per_epoch_for_any_number_of_processes(sizes, block_size, batch, processes, seed):
    sizes[0] += block_size
    starts = 100 * np.arange(len(sizes))  # each token tells its stream and its place
    windows = windows_over([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)], block_size)
    schedule = BatchSchedule(batch, (), block_size)
    n_windows = len(windows)
    assert n_windows == sum((size - 1) // block_size for size in sizes)
    updates = -(-2 * n_windows // batch)
    source = batches_of(windows, schedule, {batch: 1}, seed)
    whole = [source[k][0] for k in range(updates)]
    parts = [batches_of(windows, schedule, {batch: 1}, seed, contiguous_rows(p, processes)) for p in range(processes)]
    for k in range(updates):
        np.testing.assert_array_equal(np.concatenate([own[k][0] for own in parts]), whole[k])
    rows = np.concatenate(whole)[: 2 * n_windows]
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :1] + np.arange(1, block_size + 1))  # whole windows
    expected = sorted(
        start + block_size * window
        for start, size in zip(starts, sizes, strict=True)
        for window in range((size - 1) // block_size)
    )
    for epoch in (rows[:n_windows], rows[n_windows:]):
        assert sorted(epoch[:, 0]) == expected


def test_a_batch_is_a_function_of_the_seed_and_its_index():
    windows, schedule = windows_of(500), BatchSchedule(8, (), 4)
    source = batches_of(windows, schedule, {8: 2}, seed=3)
    assert source[5].shape == (2, 4, 5)
    assert source[5].dtype == np.int32
    expected = [source[k] for k in range(10)]
    for start in (0, 7):
        batches = read_ahead(source, start, 10)
        for k in range(start, 10):
            np.testing.assert_array_equal(next(batches), expected[k])
        with pytest.raises(StopIteration):
            next(batches)
        batches.close()
    assert not np.array_equal(source[0], batches_of(windows, schedule, {8: 2}, seed=4)[0])


def test_the_order_is_that_of_permute():
    """The permutation is pinned, and this pins its use: position p of epoch e is permute(p, e)."""
    windows = windows_of(4 * 10 + 1)
    rows = np.concatenate([batches_of(windows, BatchSchedule(8, (), 4), {8: 1}, 1337)[k][0] for k in range(5)])
    expected = np.concatenate([permute(np.arange(10), 10, 1337, epoch) for epoch in range(4)])
    np.testing.assert_array_equal(rows[:, 0], 4 * expected)


def test_another_number_of_processes_resumes_with_the_next_batch():
    """The batch grows, there are several epochs, and each update restarts with another number of processes."""
    windows = windows_of(4 * 37 + 1)
    schedule, micro = BatchSchedule(16, ((40, 8),), 4), {8: 1, 16: 2}
    expected = [batches_of(windows, schedule, micro)[k] for k in range(12)]
    for k, processes in enumerate([1, 2, 4, 8, 4, 2, 1, 8, 2, 8, 1, 4]):
        batches = []
        for process in range(processes):
            source = batches_of(windows, schedule, micro, local_rows=contiguous_rows(process, processes))
            iterator = read_ahead(source, k, 12)
            batches.append(next(iterator))
            iterator.close()
        np.testing.assert_array_equal(np.concatenate(batches, axis=1), expected[k])


class Recorded(TokenArray):
    """Tokens that record where they are read."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.places = set()

    def read(self, starts, out, rows):
        self.places |= set(map(int, starts))
        super().read(starts, out, rows)

    def __getitem__(self, index):
        self.places.add(index.start or 0)
        return super().__getitem__(index)


@pytest.mark.parametrize("rows_of", [contiguous_rows, strided_rows])
def test_a_process_reads_only_its_own_windows(rows_of):
    schedule, micro = BatchSchedule(16, (), 4), {16: 2}
    whole = batches_of(windows_of(4 * 64 + 1), schedule, micro)[1]
    for process in range(4):
        tokens = Recorded(np.arange(4 * 64 + 1, dtype=np.uint16))
        windows = TokenWindows([tokens], ["recorded"], 4, 1000)
        rows = rows_of(process, 4)
        tokens.places.clear()
        own = batches_of(windows, schedule, micro, local_rows=rows)[1]
        np.testing.assert_array_equal(own, whole[:, rows(8)])
        assert tokens.places == set(own[..., 0].flatten().tolist())
        tokens.places.clear()
        batches = np.concatenate(list(eval_batches(windows, 16, local_rows=rows)))
        np.testing.assert_array_equal(
            batches[:, 0], 4 * np.concatenate([rows(16) + first for first in range(0, 64, 16)])
        )
        assert tokens.places == set(batches[:, 0].tolist())


def test_a_growing_batch_repeats_nothing_and_loses_nothing():
    windows = windows_of(4 * 100 + 1)
    schedule = BatchSchedule(16, ((40, 2), (120, 4)), 4)
    source = batches_of(windows, schedule, {2: 1, 4: 2, 16: 4})
    shapes = [source[k].shape for k in range(15)]
    assert shapes[:6] == [(1, 2, 5)] * 5 + [(2, 2, 5)]
    assert shapes[-1] == (4, 4, 5)
    rows = np.concatenate([source[k].reshape(-1, 5) for k in range(15)])[:100]
    assert sorted(rows[:, 0]) == list(range(0, 400, 4))


def test_sources_are_mixed_by_weight_and_each_has_its_own_epochs():
    first, second = windows_of(4 * 50 + 1), windows_over([500 + np.arange(4 * 10 + 1)])
    sequences = ShuffledWindows([first, second], [3, 1], seed=0)
    rows = sequences[np.arange(PERIOD)][:, 0]
    assert np.sum(rows >= 500) == PERIOD // 4
    for windows, own in ((first, rows[rows < 500]), (second, rows[rows >= 500])):
        everything = sorted(windows[np.arange(len(windows))][:, 0])
        for epoch in range(3):
            assert sorted(own[epoch * len(windows) : (epoch + 1) * len(windows)]) == everything
    # Two sources of the same size are not shuffled alike.
    twins = ShuffledWindows([first, windows_over([500 + np.arange(4 * 50 + 1)])], [1, 1], seed=0)[np.arange(100)][:, 0]
    assert np.sum(twins[twins < 500] == twins[twins >= 500] - 500) < 10


# --- windows -------------------------------------------------------------------------------------------


def test_a_stream_shorter_than_a_window_is_skipped():
    windows = windows_over([np.arange(3), np.arange(100, 109)])
    assert windows[np.arange(len(windows))][:, 0].tolist() == [100, 104]


def test_windows_do_not_cross_streams():
    windows = windows_over([np.arange(start, start + size) for start, size in ((0, 9), (100, 5), (200, 14))])
    assert windows[np.arange(len(windows))][:, 0].tolist() == [0, 4, 100, 200, 204, 208]
    assert windows[np.array([3, 0])].tolist() == [[200, 201, 202, 203, 204], [0, 1, 2, 3, 4]]


@given(
    documents=st.lists(st.integers(1, 25), min_size=1, max_size=30),
    block_size=st.integers(1, 9),
    streams=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_windows_that_start_with_documents(documents, block_size, streams):
    """The definition, token by token: window w starts at the first document start at or after w · block_size."""
    tokens = np.concatenate([[START, *range(100 * n, 100 * n + size)] for n, size in enumerate(documents)] * 3) % 1000
    parts = np.array_split(tokens, streams)
    assume(max(map(len, parts)) > block_size)
    windows = windows_over(parts, block_size, document_start=START)
    expected = []
    for part in parts:
        for start in range(0, (len(part) - 1) // block_size * block_size, block_size):
            stride = part[start : start + block_size].tolist()
            moved = start + (stride.index(START) if START in stride else 0)
            place = moved if moved + block_size + 1 <= len(part) else start
            expected.append(part[place : place + block_size + 1].tolist())
    assert windows[np.arange(len(windows))].tolist() == expected


@pytest.mark.parametrize("write", [write_llmc, write_nanogpt, write_npy])
def test_windows_of_files_equal_windows_of_arrays(tmp_path, write):
    streams = [np.random.default_rng(n).integers(0, 1000, 50 + n).astype(np.uint16) for n in range(3)]
    files = []
    for number, stream in enumerate(streams):
        write(path := tmp_path / f"{number}.{'npy' if write is write_npy else 'bin'}", stream)
        files.append(open_tokens(path))
    for document_start in (None, 7):
        ours = TokenWindows(files, ["a", "b", "c"], 4, 1000, document_start)
        expected = windows_over(streams, document_start=document_start)
        index = np.random.default_rng(0).permutation(len(expected))
        np.testing.assert_array_equal(ours[index], expected[index])
        for position in expected.positions():
            np.testing.assert_array_equal(ours.padded_window(*position), expected.padded_window(*position))


def test_evaluation_covers_every_token_but_the_first_once():
    windows = windows_over([np.arange(23), np.arange(100, 109)])
    for processes in (1, 2):
        parts = [list(eval_batches(windows, 6, local_rows=contiguous_rows(p, processes))) for p in range(processes)]
        batches = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
        assert all(batch.shape == (6, 5) for batch in batches)
        targets = np.concatenate(batches)[:, 1:].flatten()
        assert sorted(targets[targets != IGNORE]) == [*range(1, 23), *range(101, 109)]
    limited = np.concatenate(list(eval_batches(windows, 2, limit=10)))[:, 1:]
    assert np.sum(limited != IGNORE) == 12  # ten targets, rounded up to a window


# --- bad data ------------------------------------------------------------------------------------------


def test_a_text_that_is_too_short_is_an_error():
    with pytest.raises(UserError, match=r"stream 0: 4 tokens are too few for one window of .* 5; .*block_size 1"):
        windows_of(4)


def test_a_token_beyond_the_vocabulary_is_an_error_at_the_start_or_when_it_is_read():
    with pytest.raises(UserError, match=r"stream 0 has the token 99, beyond model.vocab_size = 50"):
        windows_of(100, vocab_size=50)
    stream = np.zeros(1 << 17, dtype=np.uint16)
    stream[-20] = 60
    windows = windows_over([stream], 8, 50)
    batches = read_ahead(batches_of(windows, BatchSchedule(64, (), 8), {64: 1}), 0, 1 + len(windows) // 64)
    with pytest.raises(UserError, match="stream 0 has the token 60"):  # through Grain's thread
        for _ in batches:
            pass
    batches.close()
    with pytest.raises(UserError, match="stream 0 has the token 60"):
        list(eval_batches(windows, 64))
